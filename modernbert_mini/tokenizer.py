"""Text to token ids and back: byte-level BPE in the form in which ModernBERT publishes it.

The merging itself is done by the ``tokenizers`` library, which reads the same ``tokenizer.json`` as
the published models. This module adds what a model needs around it: batches, padding, truncation,
tensors, special tokens by role, loading and saving. Chapter 2 builds it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import writing
from .sources import DOWNLOAD_AGAIN, CheckpointError, Source

if TYPE_CHECKING:
    import tokenizers
    import torch

ROLES = ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")
SPECIAL_TOKENS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
PADDINGS = (False, True, "longest", "max_length")
TRUNCATIONS = (False, True, "longest_first", "only_first", "only_second")
# Some checkpoints write 1e30 where they know no limit.
NO_LIMIT = 10**9


class Encoding(dict):
    """What a tokenizer returns: a dict whose entries are attributes too.

    Keys: ``input_ids`` and ``attention_mask`` (1 for a token, 0 for padding), and on request
    ``offset_mapping`` (start and end of each token in characters of the text). Values are lists,
    or int64 tensors of shape (B, L), offsets (B, L, 2). ``model(**encoding)`` works as with any
    dict.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} in this encoding, only {sorted(self)}") from None

    def to(self, device: torch.device | str) -> Encoding:
        """Move the tensors to ``device`` in place and return the encoding itself."""
        for name, value in self.items():
            if hasattr(value, "to"):
                self[name] = value.to(device)
        return self


class Tokenizer:
    """Byte-level BPE with special tokens, padding and truncation.

    Each role of a special token is an attribute, and so is its id: ``mask_token``,
    ``mask_token_id``, … (None where the vocabulary has no such token).

    Args:
        backend: a ``tokenizers.Tokenizer``.
        special_tokens: maps roles (``mask_token``, …) to tokens; a role that it leaves out is
            found in the backend.
        model_max_length: the length in tokens at which ``truncation=True`` cuts.
        padding_side: "right" or "left".

    Raises:
        CheckpointError: when a special token is not in the vocabulary.
    """

    cls_token: str | None
    sep_token: str | None
    pad_token: str | None
    mask_token: str | None
    unk_token: str | None
    cls_token_id: int | None
    sep_token_id: int | None
    pad_token_id: int | None
    mask_token_id: int | None
    unk_token_id: int | None

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str] | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
    ) -> None:
        self.backend = backend
        self.backend.no_padding()
        self.backend.no_truncation()
        self.model_max_length = model_max_length
        self.padding_side = padding_side
        for role, token in (find_special_tokens(backend) | (special_tokens or {})).items():
            token_id = None if token is None else backend.token_to_id(token)
            if token is not None and token_id is None:
                raise CheckpointError(
                    file="tokenizer.json",
                    found=f"no entry for the {role} {token!r}",
                    expected="every special token in the vocabulary",
                    remedy="Take tokenizer.json and tokenizer_config.json from one checkpoint.",
                )
            setattr(self, role, token)
            setattr(self, f"{role}_id", token_id)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str | None = None) -> Tokenizer:
        """Load a tokenizer from "mini", a folder, or a Hub id (at a ``revision`` of it).

        Reads ``tokenizer.json``, and, where they exist, ``special_tokens_map.json`` and
        ``tokenizer_config.json``.

        Raises:
            CheckpointError: when a file is missing or broken.
        """
        source = Source(name_or_path, revision)
        backend = read_backend(source.require("tokenizer.json"))
        return cls(backend, **read_settings(source))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``.

        ``transformers.AutoTokenizer`` loads the folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.no_padding()
        self.backend.no_truncation()
        roles = {role: getattr(self, role) for role in ROLES if getattr(self, role) is not None}
        settings = {
            "clean_up_tokenization_spaces": False,
            **roles,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": self.padding_side,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        if self.model_max_length is not None:
            settings["model_max_length"] = self.model_max_length
        properties = special_token_properties(self.backend)
        special = {role: properties.get(token, token) for role, token in roles.items()}
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
        write_text(folder / "special_tokens_map.json", json.dumps(special, indent=2))

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_offsets_mapping: bool = False,
        add_special_tokens: bool = True,
        padding_side: str | None = None,
    ) -> Encoding:
        """Encode one text, or a list of texts, or pairs of them.

        One text gives lists of L ids; a list of texts gives lists of such lists. With
        ``return_tensors="pt"`` both give int64 tensors (B, L), one text as B = 1. ``max_length``
        counts tokens, special ones included, and defaults to ``model_max_length``.
        ``padding=True`` is "longest", ``truncation=True`` is "longest_first", as in
        ``transformers``.

        Raises:
            TypeError: for anything but strings.
            ValueError: for an unknown option, for pairs that do not match, and for tensors of
                texts that differ in length without padding.
        """
        check_option("padding", padding, PADDINGS)
        check_option("truncation", truncation, TRUNCATIONS)
        check_option("return_tensors", return_tensors, (None, "pt"))
        check_option("padding_side", padding_side, (None, "left", "right"))
        single = isinstance(text, str)
        batch = pair_up(text, text_pair)
        if max_length is not None and not truncation and padding != "max_length":
            warnings.warn(
                "max_length changes nothing without truncation=True or padding='max_length'",
                stacklevel=2,
            )
        self._set_truncation(truncation, max_length, text_pair is not None, add_special_tokens)
        self._set_padding(padding, max_length, padding_side or self.padding_side)
        encoded = self.backend.encode_batch(batch, add_special_tokens=add_special_tokens)
        encoding = Encoding(
            input_ids=[row.ids for row in encoded],
            attention_mask=[row.attention_mask for row in encoded],
        )
        if return_offsets_mapping:
            encoding["offset_mapping"] = [row.offsets for row in encoded]
        if return_tensors == "pt":
            return as_tensors(encoding)
        return Encoding({key: rows[0] for key, rows in encoding.items()}) if single else encoding

    def encode(self, text: str, text_pair: str | None = None, **options: Any) -> list[int]:
        """The ids of one text (or pair), special tokens included; options as in a call."""
        return self(text, text_pair, **options).input_ids

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of one sequence of ids: an int, a list, a 1-D tensor or array."""
        return self.backend.decode(as_list(ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(self, batch: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """The text of each row: a list of lists, or a tensor of shape (B, L)."""
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    def convert_ids_to_tokens(self, ids: Any) -> str | None | list[str | None]:
        """The token of an id, or of each id in a list; None for an id outside the vocabulary."""
        tokens = [self.backend.id_to_token(i) for i in as_list(ids)]
        return tokens[0] if is_single(ids) else tokens

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | None | list[int | None]:
        """The id of a token, or of each token in a list; ``unk_token_id`` for an unknown token."""
        if isinstance(tokens, str):
            token_id = self.backend.token_to_id(tokens)
            return self.unk_token_id if token_id is None else token_id
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of BPE tokens *without* the added ones, as in ``transformers``.

        An embedding table needs a row for every id: size it by ``len(tokenizer)``.
        """
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        roles = ", ".join(f"{role}={getattr(self, role)!r}" for role in ROLES)
        return f"Tokenizer({len(self):,} ids, {roles}, model_max_length={self.model_max_length})"

    def _limit(self, max_length: int | None, option: str) -> int | None:
        """``max_length``, or the model's, or None with a warning."""
        if max_length is None and self.model_max_length is None:
            warnings.warn(
                f"{option} has no effect: pass max_length, this tokenizer names no limit",
                stacklevel=4,
            )
        return self.model_max_length if max_length is None else max_length

    def _set_truncation(
        self, truncation: bool | str, max_length: int | None, pair: bool, special: bool
    ) -> None:
        # The backend remembers its setting, so every call sets or clears it.
        self.backend.no_truncation()
        limit = self._limit(max_length, f"truncation={truncation!r}") if truncation else None
        if limit is None:
            return
        smallest = self.backend.num_special_tokens_to_add(pair) if special else 0
        if limit < smallest:
            raise ValueError(f"max_length={limit} leaves no room for {smallest} special tokens")
        strategy = "longest_first" if truncation is True else truncation
        self.backend.enable_truncation(limit, strategy=strategy)

    def _set_padding(self, padding: bool | str, max_length: int | None, side: str) -> None:
        self.backend.no_padding()
        length = (
            self._limit(max_length, "padding='max_length'") if padding == "max_length" else None
        )
        if not padding or (padding == "max_length" and length is None):
            return
        if self.pad_token is None:
            raise ValueError("this tokenizer has no padding token, so it cannot pad")
        self.backend.enable_padding(
            direction=side, pad_id=self.pad_token_id, pad_token=self.pad_token, length=length
        )


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE in the published form on ``texts``.

    NFC normalisation, GPT-2's byte alphabet and word split, then merges; the five special tokens
    take the last ids, and [MASK] swallows the space on its left. ``vocab_size`` counts all ids, at
    least 261 (256 bytes and 5 special tokens); a corpus too small for that many merges gives fewer.
    Wrap the result in ``Tokenizer`` to use it. Source: answerdotai/ModernBERT-base,
    tokenizer.json. Chapter 2.

    Raises:
        ValueError: when ``vocab_size`` is too small.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as split
    from tokenizers.processors import TemplateProcessing

    alphabet = split.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}, not {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = split.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(
        [
            AddedToken(token, lstrip=token == "[MASK]", normalized=False, special=True)
            for token in SPECIAL_TOKENS
        ]
    )
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        # Both segments have type 0: ModernBERT has no token types.
        pair="[CLS]:0 $A:0 [SEP]:0 $B:0 [SEP]:0",
        special_tokens=[(token, backend.token_to_id(token)) for token in SPECIAL_TOKENS],
    )
    return backend


def special_token_properties(backend: tokenizers.Tokenizer) -> dict[str, dict[str, Any]]:
    """What ``special_tokens_map.json`` says of each added token, by its text."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word")
    return {
        token.content: {name: getattr(token, name) for name in names}
        for token in backend.get_added_tokens_decoder().values()
    }


def find_special_tokens(backend: tokenizers.Tokenizer) -> dict[str, str | None]:
    """The token of each role, read from the backend itself; None where there is none.

    [CLS] and [SEP] are whatever frames an empty text, so <bos> and <eos> are found too; the
    others are known by name, in any brackets.
    """
    frame = backend.encode("").tokens
    by_name = {
        re.sub(r"\W", "", token.content).lower(): token.content
        for token in backend.get_added_tokens_decoder().values()
        if token.special
    }
    return {
        "unk_token": by_name.get("unk"),
        "cls_token": frame[0] if frame else by_name.get("cls"),
        "sep_token": frame[-1] if frame else by_name.get("sep"),
        "pad_token": by_name.get("pad"),
        "mask_token": by_name.get("mask"),
    }


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Parse a ``tokenizer.json``; CheckpointError when it is something else."""
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        for pair in (None, "b"):  # a broken template shows only in use
            backend.encode("a", pair)
        return backend
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library's Rust code is no Exception
        read_json(path)  # a more telling error where it is no JSON at all
        found, expected = f"JSON that is no tokenizer ({error})", "a file of the tokenizers library"
        raise CheckpointError(path, found, expected, DOWNLOAD_AGAIN) from error


def read_settings(source: Source) -> dict[str, Any]:
    """What the settings files of a checkpoint say, as arguments of ``Tokenizer``.

    Where both files give a value, that of ``tokenizer_config.json`` counts.
    """
    special: dict[str, str] = {}
    settings: dict[str, Any] = {"special_tokens": special}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path := source.find(file)) is None:
            continue
        values = read_json(path)
        for role in ROLES:
            if (token := values.get(role)) is not None:
                # Files give the token bare, or with its properties.
                token = token.get("content") if isinstance(token, dict) else token
                special[role] = expect_setting(path, role, token, str)
        if (limit := values.get("model_max_length")) is not None:
            limit = expect_setting(path, "model_max_length", limit, (int, float))
            settings["model_max_length"] = int(limit) if limit < NO_LIMIT else None
        if (side := values.get("padding_side")) is not None:
            settings["padding_side"] = expect_setting(path, "padding_side", side, str)
    return settings


def expect_setting(path: Path, name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    """``value``, or a CheckpointError where it is not of this kind."""
    if not isinstance(value, kind):
        found = f"{name} {value!r}"
        raise CheckpointError(path, found, "text, or a number for a length", DOWNLOAD_AGAIN)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; CheckpointError when it holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        found = f"no JSON ({error})"
        raise CheckpointError(path, found, "a JSON object", DOWNLOAD_AGAIN) from error
    if not isinstance(data, dict):
        found = f"a JSON {type(data).__name__}"
        raise CheckpointError(path, found, "a JSON object", DOWNLOAD_AGAIN)
    return data


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    with writing(path) as file:
        file.write(text.encode("utf-8"))


def check_option(name: str, value: Any, allowed: tuple) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, not {value!r}")


def pair_up(
    text: str | Sequence[str], text_pair: str | Sequence[str] | None
) -> list[str] | list[tuple[str, str]]:
    """One list of texts, or of pairs of texts, from what a caller may pass."""
    if text_pair is not None and isinstance(text, str) != isinstance(text_pair, str):
        raise ValueError("text and text_pair must both be one string, or both be lists")
    first = as_texts(text)
    if text_pair is None:
        return first
    second = as_texts(text_pair)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} texts, but {len(second)} pair texts")
    return list(zip(first, second, strict=True))


def as_texts(text: str | Sequence[str]) -> list[str]:
    """A list of strings; TypeError for anything else."""
    texts = [text] if isinstance(text, str) else text
    if isinstance(texts, bytes) or not isinstance(texts, Sequence):
        raise TypeError(f"expected a string or a list of strings, not {type(texts).__name__}")
    for position, item in enumerate(texts):
        if not isinstance(item, str):
            raise TypeError(
                f"expected a string or a list of strings, but item {position} is a "
                f"{type(item).__name__}; pairs of texts go into text_pair"
            )
    return list(texts)


def as_tensors(encoding: Encoding) -> Encoding:
    """Lists of equal length to int64 tensors (B, L)."""
    import torch

    lengths = {len(ids) for ids in encoding["input_ids"]}
    if len(lengths) > 1:
        raise ValueError(
            f"texts of {min(lengths)} to {max(lengths)} tokens do not fit one tensor: "
            "pass padding=True (and truncation=True for long texts)"
        )
    length = max(lengths, default=0)
    shapes = {"offset_mapping": (len(encoding["input_ids"]), length, 2)}
    plain = (len(encoding["input_ids"]), length)
    return Encoding(
        {
            key: torch.tensor(rows, dtype=torch.long).reshape(shapes.get(key, plain))
            for key, rows in encoding.items()
        }
    )


def is_single(ids: Any) -> bool:
    """Whether ``ids`` is one id rather than several (a Python, NumPy or 0-D tensor integer)."""
    return not isinstance(ids, Iterable) or getattr(ids, "ndim", 1) == 0


def as_list(ids: Any) -> list[int]:
    """One id or a 1-D sequence of them as a list of Python ints."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return [int(ids)] if is_single(ids) else [int(i) for i in ids]
