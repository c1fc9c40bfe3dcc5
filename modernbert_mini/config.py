"""The numbers that make a ModernBERT: sizes, layer kinds, rotary bases, special tokens.

A ``config.json`` comes in two forms. The published checkpoints state the layer pattern and the
rotary bases as ``global_attn_every_n_layers``, ``global_rope_theta`` and ``local_rope_theta``;
``transformers`` 5 states them as ``layer_types`` and ``rope_parameters``. Both are read, and
both are written, so that older and newer readers understand the file.
"""

import copy
import json
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .alternating_attention import layer_pattern
from .geglu import ACTIVATIONS

LAYER_TYPES = ("full_attention", "sliding_attention")
POOLINGS = ("cls", "mean")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
ROPE_TYPES = ("default", "linear")
# Far beyond any model; a corrupt number is refused before it takes the machine's memory or hours.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**16,
    "max_position_embeddings": 2**40,
}
# The published name of each layer kind's rotary base.
THETA_NAMES = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}


class ConfigError(ValueError):
    """A configuration, or an input that does not fit it.

    Attributes:
        found: what is wrong.
        expected: what would be right.
        remedy: what to do.
        file: the file at fault, if there is one.
    """

    def __init__(self, found: str, expected: str, remedy: str, file: Path | str | None = None):
        self.found, self.expected, self.remedy, self.file = found, expected, remedy, file
        where = f"{file}: " if file else ""
        super().__init__(f"{where}found {found}; expected {expected}. {remedy}")


@dataclass
class ModernBertConfig:
    """Every number of a model; the defaults are those of ModernBERT-base.

    Lengths count tokens, dropouts are probabilities. The layer pattern and the rotary bases
    each stand here in both forms and agree: where ``layer_types`` or ``rope_parameters`` is
    given it decides, else it is filled in from the published names.

    Raises:
        ConfigError: where no model could be built from the values.
    """

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    local_attention: int = 128
    global_attn_every_n_layers: int | None = 3
    layer_types: list[str] | None = None
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    rope_parameters: dict[str, dict[str, Any]] | None = None
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    decoder_bias: bool = True
    classifier_bias: bool = False
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    classifier_dropout: float = 0.0
    classifier_activation: str = "gelu"
    classifier_pooling: str = "cls"
    tie_word_embeddings: bool = True
    sparse_prediction: bool = False
    sparse_pred_ignore_index: int = -100
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0
    pad_token_id: int | None = 50283
    bos_token_id: int | None = 50281
    eos_token_id: int | None = 50282
    cls_token_id: int | None = 50281
    sep_token_id: int | None = 50282
    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        _check_numbers(self)
        self._agree_on_layers()
        self._agree_on_rope()
        self._agree_on_labels()
        _check_choices(self)

    def _agree_on_layers(self):
        if self.layer_types is None:
            every_n = self.global_attn_every_n_layers or 3
            self.layer_types = layer_pattern(self.num_hidden_layers, every_n)
            return
        # Only a regular pattern has a published form.
        self.global_attn_every_n_layers = next(
            (
                n
                for n in range(1, self.num_hidden_layers + 1)
                if self.layer_types == layer_pattern(self.num_hidden_layers, n)
            ),
            None,
        )

    def _agree_on_rope(self):
        given = self.rope_parameters or {}
        if not isinstance(given, dict) or not all(
            isinstance(given.get(kind) or {}, dict) for kind in LAYER_TYPES
        ):
            raise ConfigError(
                f"rope_parameters {given!r}",
                f"a dictionary for each of {', '.join(LAYER_TYPES)}",
                "Leave it out for the defaults.",
            )
        self.rope_parameters = {
            kind: {"rope_type": "default", "rope_theta": getattr(self, name)}
            | (given.get(kind) or {})
            for kind, name in THETA_NAMES.items()
        }
        for kind, name in THETA_NAMES.items():
            setattr(self, name, self.rope_parameters[kind]["rope_theta"])

    def _agree_on_labels(self):
        if self.id2label is None:
            number = 2 if self.num_labels is None else self.num_labels
            ok = _is_number(number, int) and number > 0
            _check(ok, f"num_labels {number!r}", "a positive integer", "Count the labels.")
            self.id2label = {i: f"LABEL_{i}" for i in range(number)}
        try:
            self.id2label = {int(i): label for i, label in self.id2label.items()}
        except (AttributeError, ValueError) as error:
            raise ConfigError(
                f"id2label {self.id2label!r}",
                "an object that names each class id",
                'For example {"0": "no", "1": "yes"}.',
            ) from error
        self.num_labels = len(self.id2label)
        if self.label2id is None:
            self.label2id = {label: i for i, label in self.id2label.items()}

    @property
    def head_dim(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def half_window(self) -> int:
        """W, how many neighbours on each side a local layer sees."""
        return self.local_attention // 2

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModernBertConfig":
        """Read a parsed ``config.json`` of either form; unknown keys are kept in ``extra``."""
        values = dict(values)
        model_type = values.pop("model_type", None)
        if model_type != "modernbert":
            raise ConfigError(
                f"model_type {model_type!r}",
                "'modernbert'",
                "This package loads the ModernBERT family: ModernBERT, Ettin encoders, mmBERT.",
            )
        known = {f.name for f in fields(cls)} - {"extra"}
        extra = {key: values.pop(key) for key in list(values) if key not in known}
        if values.get("id2label") is not None:
            values.pop("num_labels", None)  # the labels themselves say how many there are
        if scaling := extra.pop("rope_scaling", None):  # how transformers 4 said it, for all layers
            ok = isinstance(scaling, dict)
            _check(ok, f"rope_scaling {scaling!r}", "an object", "Leave it out for none.")
            scaling = {"rope_type": scaling.get("type"), **scaling}
            given = values.get("rope_parameters") or {}
            values["rope_parameters"] = {
                k: {**(given.get(k) or {}), **scaling} for k in LAYER_TYPES
            }
        return cls(**values, extra=extra)

    @classmethod
    def from_file(cls, path: Path | str) -> "ModernBertConfig":
        """Read a ``config.json``.

        Raises:
            ConfigError: naming the file, where it is no JSON object or no usable config.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"a JSON {type(values).__name__}")
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"no config ({error})", "a JSON object", "Fetch the file again.", path
            ) from error
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(error.found, error.expected, error.remedy, path) from error

    def to_dict(self) -> dict[str, Any]:
        """The config as ``config.json`` holds it: both forms, and the unknown keys it came with."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        extra = values.pop("extra")
        del values["num_labels"]  # id2label says it
        values["id2label"] = {str(i): label for i, label in self.id2label.items()}
        return copy.deepcopy({**extra, **values, "model_type": "modernbert"})

    def with_overrides(self, **overrides: Any) -> "ModernBertConfig":
        """A copy with some fields changed, and what follows from them derived again.

        Raises:
            ConfigError: for a name that is no field.
        """
        unknown = sorted(set(overrides) - {f.name for f in fields(self)})
        if unknown:
            raise ConfigError(
                f"unknown field {', '.join(unknown)}",
                "fields of ModernBertConfig",
                "Check the spelling; help(ModernBertConfig) lists them.",
            )
        derived: dict[str, Any] = {}
        if {"num_hidden_layers", "global_attn_every_n_layers"} & set(overrides):
            derived["layer_types"] = None
        if set(THETA_NAMES.values()) & set(overrides):
            derived["rope_parameters"] = {
                kind: {k: v for k, v in rope.items() if k != "rope_theta"}
                for kind, rope in self.rope_parameters.items()
            }
        if {"num_labels", "id2label"} & set(overrides):
            derived |= {"num_labels": None, "id2label": None, "label2id": None}
        return replace(self, **{**derived, **overrides})


def _check(condition: bool, found: str, expected: str, remedy: str) -> None:
    if not condition:
        raise ConfigError(found, expected, remedy)


def _is_number(value: object, kind: type | tuple) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_numbers(config: ModernBertConfig) -> None:
    """Refuse sizes, probabilities and switches that no model could have."""
    remedy = "Compare the file with the published config.json."
    for name, most in LARGEST.items():
        value = getattr(config, name)
        ok = _is_number(value, int) and 0 < value <= most
        _check(ok, f"{name} {value!r}", f"an integer from 1 to {most:,}", remedy)
    value = config.local_attention
    ok = _is_number(value, int) and value >= 0
    _check(ok, f"local_attention {value!r}", "an integer, 0 or more", remedy)
    value = config.global_attn_every_n_layers
    ok = value is None or (_is_number(value, int) and value > 0)
    _check(ok, f"global_attn_every_n_layers {value!r}", "a positive integer", remedy)
    for name in (
        "norm_eps",
        "initializer_range",
        "initializer_cutoff_factor",
        *THETA_NAMES.values(),
    ):
        value = getattr(config, name)
        ok = _is_number(value, (int, float)) and 0 < value < float("inf")
        _check(ok, f"{name} {value!r}", "a positive number", remedy)
    for name in ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"):
        value = getattr(config, name)
        ok = _is_number(value, (int, float)) and 0 <= value < 1
        _check(ok, f"{name} {value!r}", "a probability, from 0 to below 1", remedy)
    for item in fields(config):
        value = getattr(config, item.name)
        if item.type is bool:
            _check(isinstance(value, bool), f"{item.name} {value!r}", "true or false", remedy)
    heads, width = config.num_attention_heads, config.hidden_size
    _check(
        width % heads == 0,
        f"hidden_size {width} with {heads} heads",
        "a hidden_size that the heads divide",
        f"{width} heads would be the most; published models have heads of 64 dimensions.",
    )
    _check(
        config.head_dim % 2 == 0,
        f"heads of {config.head_dim} dimensions",
        "an even number, since rotary embeddings turn pairs",
        "Choose hidden_size and num_attention_heads so that their ratio is even.",
    )
    value = config.pad_token_id
    ok = value is None or (_is_number(value, int) and 0 <= value < config.vocab_size)
    _check(
        ok,
        f"pad_token_id {value!r} with a vocabulary of {config.vocab_size}",
        "an id inside the vocabulary, or null",
        "Set pad_token_id to the tokenizer's.",
    )


def _check_choices(config: ModernBertConfig) -> None:
    """Refuse names outside the closed lists."""

    def known(name: str, value: object, choices: Collection[str]) -> None:
        ok = isinstance(value, str) and value in choices
        _check(ok, f"{name} {value!r}", f"one of {', '.join(choices)}", "Choose a listed one.")

    _check(
        isinstance(config.layer_types, list),
        f"layer_types {config.layer_types!r}",
        "a list with one name for each layer",
        "Leave it out to have the regular pattern.",
    )
    known("hidden_activation", config.hidden_activation, ACTIVATIONS)
    known("classifier_activation", config.classifier_activation, ACTIVATIONS)
    known("classifier_pooling", config.classifier_pooling, POOLINGS)
    if config.problem_type is not None:
        known("problem_type", config.problem_type, PROBLEM_TYPES)
    for kind in config.layer_types:
        known("layer type", kind, LAYER_TYPES)
    _check(
        len(config.layer_types) == config.num_hidden_layers,
        f"{len(config.layer_types)} layer_types for {config.num_hidden_layers} layers",
        "one for each layer",
        "Leave layer_types out to have the regular pattern.",
    )
    for kind, rope in config.rope_parameters.items():
        known(f"rope type of {kind}", rope["rope_type"], ROPE_TYPES)
        theta, factor = rope["rope_theta"], rope.get("factor", 1.0)
        for name, value in (("rope_theta", theta), ("factor", factor)):
            ok = _is_number(value, (int, float)) and 0 < value < float("inf")
            _check(ok, f"{name} {value!r} of {kind}", "a positive number", "Leave it out.")
