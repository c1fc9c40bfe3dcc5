"""A recipe for pre-training: what a run depends on, read from a TOML or YAML file.

It reads like table 3 of Warner et al., "Smarter, Better, Faster, Longer", arXiv:2412.13663: one
column for each phase, and below them what all phases share. Chapter 12 uses this module.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any

from . import data
from .config import ConfigError

UNITS = {"": 0, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
OPTIMIZERS = ("StableAdamW", "AdamW")
PRECISIONS = ("auto", "float32", "bfloat16")
ENGINES = ("ddp", "fsdp2")
# What a phase may change; durations count from its start, and are its own alone.
DURATIONS = ("training_tokens", "warmup_tokens", "decay_tokens", "batch_warmup_tokens")
PHASE_FIELDS = (
    *DURATIONS,
    "max_sequence_length",
    "batch_tokens",
    "microbatch_tokens",
    "batch_warmup_from",
    "learning_rate",
    "weight_decay",
    "global_rope_theta",
    "corpora",
)


def count_tokens(value: int | float | str) -> int:
    """A number of tokens as people write it: 50_000, 3e9, "1,024", "1.719 trillion".

    >>> count_tokens("1.719 trillion")
    1719000000000

    Raises:
        ValueError: where it is no whole number.
    """
    match = re.fullmatch(r"([\d.,_]+(?:e\+?\d+)?) ?([a-z]*)", str(value).strip().lower())
    if not match or match[2] not in UNITS:
        raise ValueError(f"{value!r} is no number of tokens, such as 50000 or '3 billion'")
    number = Decimal(re.sub("[,_]", "", match[1])).scaleb(UNITS[match[2]])
    if number != int(number):
        raise ValueError(f"{value!r} is no whole number of tokens")
    return int(number)


@dataclass
class PretrainingConfig:
    """All that a run depends on.

    A recipe without ``phases`` is one phase. With them, each is a column of the paper's table: a
    dict with any of ``PHASE_FIELDS`` and a ``name``, which takes from the top what it leaves out,
    but for durations: those that it leaves out are 0. The optimiser goes on from phase to phase;
    the order of the data and the schedule begin anew.

    Attributes:
        folder: of the run; everything that it writes lies there.
        corpora: how often each is seen in one epoch, by its name in ``data.CORPORA`` or its path.
        model: the fields of ``ModernBertConfig`` that differ from ModernBERT-base, or none, to go
            on with the model of ``initialize_from`` as it is; the vocabulary and the special ids
            follow from the tokenizer.
        tokenizer: "mini", a folder or a Hub id; by default one is trained on the corpora.
        vocab_size: of the tokenizer that is trained.
        initialize_from: "mini", a folder or a Hub id of a smaller model to tile; by default the
            weights are random.
        held_out_percent: share of the documents that is evaluated on and never trained on.
        held_out_tokens: most tokens of each corpus in one evaluation.
        training_tokens: length of the phase; all durations count tokens, special ones included.
        max_sequence_length: longest sequence; longer documents are cut.
        batch_tokens: tokens in one step of the optimiser.
        microbatch_tokens: tokens in one packed stream; by default the whole batch.
        batch_warmup_from, batch_warmup_tokens: the batch grows in equal steps from the first to
            ``batch_tokens`` within the second, as many updates at each size.
        learning_rate: at its peak.
        warmup_tokens, decay_tokens: the rate's rise at the start and 1 - sqrt fall at the end.
        weight_decay: taken off at each step while the rate is at its peak; see
            ``fully_decoupled_decay``.
        global_rope_theta: rotary base of the global layers from this phase on; by default the
            model's.
        mask_probability, mask_share, random_share: which tokens are chosen, and what share of
            those shows [MASK] or a random token.
        mask_special_tokens: whether [CLS] and [SEP] can be chosen and drawn, as in the authors'
            packer.
        optimizer: "StableAdamW" or "AdamW".
        fully_decoupled_decay: whether weights shrink by the decay itself, as in the paper, or by
            decay times learning rate, as in PyTorch.
        decay_embeddings: whether the embedding decays too, as in the authors' code.
        clip_norm: largest norm of the gradient; 0 for any. StableAdamW clips its updates itself.
        precision: "bfloat16" for autocast, "float32", or "auto": bfloat16 where a GPU has it.
        device: "cpu", "cuda", or "auto".
        parallel: what several processes do, which ``torchrun`` has started: "ddp" holds everything
            in each, "fsdp2" a slice in each. It can change when a run is resumed.
        average: how many of the decay's best checkpoints are averaged with the final one.
        log_every, evaluate_every, checkpoint_every: in steps.
        seed: of weights, order and masks.

    Raises:
        ConfigError: for values with which no run could be made.
    """

    folder: str
    corpora: dict[str, int]
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    vocab_size: int = 8192
    wordnet_folder: str = str(data.WORDNET_FOLDER)
    initialize_from: str | None = None
    held_out_percent: float = 2.0
    held_out_tokens: int = 1_000_000
    training_tokens: int = 40_000_000
    max_sequence_length: int = 256
    batch_tokens: int = 8192
    microbatch_tokens: int | None = None
    batch_warmup_from: int | None = None
    batch_warmup_tokens: int = 0
    learning_rate: float = 2e-3
    warmup_tokens: int = 1_000_000
    decay_tokens: int = 8_000_000
    weight_decay: float = 1e-5
    global_rope_theta: float | None = None
    mask_probability: float = 0.3
    mask_share: float = 0.8
    random_share: float = 0.1
    mask_special_tokens: bool = False
    optimizer: str = "StableAdamW"
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    fully_decoupled_decay: bool = True
    decay_embeddings: bool = False
    clip_norm: float = 0.0
    precision: str = "auto"
    device: str = "auto"
    parallel: str = "ddp"
    average: int = 0
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 200
    seed: int = 0
    phases: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for kind, convert in (("int", count_tokens), ("float", float)):
            for f in fields(self):
                value = getattr(self, f.name)
                if f.type.split(" ")[0] == kind and not (value is None and "None" in f.type):
                    setattr(self, f.name, convert_field(f.name, value, convert))
        for name in ("batch_tokens", "max_sequence_length", "log_every", "evaluate_every") + (
            "checkpoint_every",
            "vocab_size",
        ):
            check(getattr(self, name) > 0, f"{name} 0", "at least 1", "Raise it.")
        self.betas = tuple(convert_field("betas", beta, float) for beta in self.betas)
        check(bool(self.corpora), "no corpus", "at least one", "Name it under corpora.")
        choices = {"optimizer": OPTIMIZERS, "precision": PRECISIONS, "parallel": ENGINES}
        for name, known in choices.items():
            value = getattr(self, name)
            remedy = "Mind the spelling."
            check(value in known, f"{name} {value!r}", f"one of {', '.join(known)}", remedy)
        for phase in self.columns() if self.phases else [self]:
            phase.check_durations()

    def check_durations(self) -> None:
        """Refuse a phase whose parts do not fit each other."""
        batch, micro = self.batch_tokens, self.microbatch_tokens or self.batch_tokens
        first = self.batch_warmup_from or batch
        for name, smaller, larger in (
            ("max_sequence_length", "microbatch_tokens", (self.max_sequence_length, micro)),
            ("batch_tokens", "training_tokens", (batch, self.training_tokens)),
        ):
            less, more = larger
            remedy = f"Raise {smaller} or lower {name}."
            check(less <= more, f"{name} {less:,}", f"at most {smaller}, {more:,}", remedy)
        for name, number, unit in (
            ("batch_tokens", batch, micro),
            ("batch_warmup_from", first, micro),
            ("batch_tokens", batch, first),
        ):
            remedy = "A batch is made of whole microbatches, and grows by the size it starts from."
            check(number % unit == 0, f"{name} {number:,}", f"a multiple of {unit:,}", remedy)
        room = self.training_tokens - self.warmup_tokens - self.decay_tokens
        found = f"a warm-up of {self.warmup_tokens:,} and a decay of {self.decay_tokens:,} tokens"
        check(room >= 0, found, f"at most {self.training_tokens:,} together", "Shorten them.")

    def columns(self) -> list[PretrainingConfig]:
        """One recipe without phases for each phase, in order."""
        if not self.phases:
            return [self]
        columns = []
        for number, phase in enumerate(self.phases, start=1):
            where = f"phase {number}: "
            refuse_unknown(phase, (*PHASE_FIELDS, "name"), where)
            check(
                "training_tokens" in phase,
                where + "no training_tokens",
                "the length of each phase",
                "State it.",
            )
            values = {k: v for k, v in phase.items() if k != "name"}
            columns.append(replace(self, **dict.fromkeys(DURATIONS, 0) | values, phases=[]))
        return columns

    def with_places(
        self, corpora: list[str] | None = None, folder: str | None = None
    ) -> PretrainingConfig:
        """The same recipe for other text, each corpus seen once an epoch, or in another folder."""
        new = self if folder is None else replace(self, folder=folder)
        if corpora is None:
            return new
        phases = [{k: v for k, v in phase.items() if k != "corpora"} for phase in self.phases]
        return replace(new, corpora=dict.fromkeys(corpora, 1), phases=phases)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PretrainingConfig:
        """Make a recipe of parsed values.

        Raises:
            ConfigError: for a field that is unknown or missing, or an impossible value.
        """
        refuse_unknown(values, [f.name for f in fields(cls)])
        for name in ("folder", "corpora"):
            check(name in values, f"no {name}", "a recipe that states it", f"Add {name}.")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> PretrainingConfig:
        """Read a recipe from a .toml, .yaml or .yml file, or one of the package by its name.

        Raises:
            ConfigError: naming the file, where it is no recipe.
            OSError: where it cannot be read. Chapter 12.
        """
        path = find_recipe(path)
        text = path.read_text(encoding="utf-8")
        try:
            if path.suffix.lower() == ".toml":
                values = tomllib.loads(text)
            else:
                import yaml

                try:
                    values = yaml.safe_load(text)
                except yaml.YAMLError as error:
                    raise ValueError(" ".join(str(error).split())) from error
            if not isinstance(values, dict):
                raise ValueError("not a table of fields")
        except ValueError as error:
            expected, remedy = "TOML (.toml) or YAML (.yaml)", "Mend the line."
            raise ConfigError(f"no recipe ({error})", expected, remedy, path) from error
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(error.found, error.expected, error.remedy, path) from error


def find_recipe(name_or_path: str | os.PathLike) -> Path:
    """Where a recipe lies: the path itself, or a file of the package's folder ``recipes``."""
    path = Path(os.path.expanduser(name_or_path))
    shipped = Path(str(resources.files(__package__) / "recipes" / f"{name_or_path}.toml"))
    return shipped if not path.exists() and path.name == str(path) and shipped.exists() else path


def convert_field(name: str, value: Any, convert: Any) -> Any:
    """``convert(value)``, or an error that names the field; YAML reads 8e-4 as text."""
    try:
        if isinstance(value, bool):
            raise ValueError("yes or no")
        return convert(value)
    except (ValueError, TypeError, ArithmeticError) as error:
        expected = "a whole number of at least 0" if convert is count_tokens else "a number"
        raise ConfigError(f"{name} {value!r}", expected, "Write it like 50000 or 8e-4.") from error


def check(condition: bool, found: str, expected: str, remedy: str) -> None:
    """Raise a ``ConfigError`` unless the condition holds."""
    if not condition:
        raise ConfigError(found, expected, remedy)


def refuse_unknown(values: dict[str, Any], known: list[str] | tuple, where: str = "") -> None:
    """Refuse fields that no recipe has, with what was probably meant."""
    for name in values:
        close = difflib.get_close_matches(str(name), known, n=1)
        remedy = f"Did you mean {close[0]}?" if close else "help(PretrainingConfig) lists them."
        found = f"{where}unknown field {name!r}"
        check(name in known, found, "the fields of a recipe", remedy)
