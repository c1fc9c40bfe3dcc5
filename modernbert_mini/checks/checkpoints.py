"""Checks of chapter 11, real checkpoints."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from modernbert_mini.checkpoints import match_names
from modernbert_mini.checks._machinery import Hint, exercise, expect, expect_close, expect_tensor
from modernbert_mini.config import ModernBertConfig
from modernbert_mini.sources import resolve_file

PREFIX = "model."


def _tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(11)
    return {
        "wide": torch.randn(3, 5, generator=draw),
        "again": torch.randn(2, 2, 2, generator=draw),
        "half": torch.randn(4, 3, generator=draw).bfloat16(),
    }


def _parts(raw: bytes) -> tuple[dict, int]:
    """The header of a sound file, and the byte at which its data starts."""
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), start


@exercise("11.1", "Read the header", difficulty=1, minutes=8)
def header(answer):
    raw = safetensors.torch.save(_tensors(), metadata={"format": "pt"})
    right = _parts(raw)[0]
    found = _ask_header(answer, raw)
    expect(
        isinstance(found, dict),
        f"Is the header parsed? The check got a value of type `{type(found).__name__}`; "
        "`json.loads` makes a dictionary of the text.",
    )
    expect(
        "__metadata__" in found or set(found) != set(_tensors()),
        "Where is `__metadata__`? It is no tensor, but it stands in the header: leave it in, "
        "the caller decides.",
    )
    expect(found == right, f"The header should hold {sorted(right)}, yours holds {sorted(found)}.")
    other = safetensors.torch.save({f"layer.{i}": torch.zeros(1) for i in range(300)})
    expect(
        _ask_header(answer, other) == _parts(other)[0],
        "Right for a short header, wrong for one of many thousand bytes. "
        "Does the length use all eight bytes, or only the first?",
    )


def _ask_header(answer: Callable, raw: bytes) -> object:
    try:
        return answer(raw)
    except ValueError as error:  # JSON or text that does not parse carries what it was given
        given = getattr(error, "doc", getattr(error, "object", None))
        raise _misread(given, raw, _parts(raw)[1]) or error from error


def _misread(given: object, raw: bytes, start: int) -> Hint | None:
    """What is wrong with the bytes that were taken for the header; None where that is unclear."""
    if isinstance(given, str):
        given = given.encode()
    if not isinstance(given, bytes):
        return None
    if given.startswith(raw[:8]):
        return Hint(
            "Where does the JSON text begin? The first eight bytes are its length, not its start."
        )
    if given == raw[8 : start - 8]:
        return Hint(
            "Where does the JSON text end? The length counts from byte 8, so it ends at 8 + length."
        )
    if len(given) > start - 8:
        return Hint(
            "Which end of the eight bytes comes first? Your length is "
            f"beyond the file of {len(raw):,} bytes. The smallest part stands first: little-endian."
        )
    return Hint(
        f"How long is the JSON text? It has {start - 8} bytes, and your slice has {len(given)}. "
        "The length is a number of eight bytes."
    )


@exercise("11.2", "A tensor by hand", difficulty=2, minutes=12)
def tensor(answer):
    tensors = _tensors()
    raw = safetensors.torch.save(tensors, metadata={"format": "pt"})
    entries, start = _parts(raw)
    right = tensors["wide"]
    found = answer(raw, "wide")
    expect(
        isinstance(found, torch.Tensor), "Is your result a tensor? `torch.frombuffer` makes one."
    )
    expect(
        found.dim() != 1,
        f"What about the shape? Yours is flat, of {found.numel()} numbers; the header says "
        f"`{entries['wide']['shape']}`.",
    )
    expect_tensor(found, right.shape)
    first, last = entries["wide"]["data_offsets"]
    mistakes = [
        (_floats(raw[first:last], 3, 5), "From where do the offsets count? Yours start at byte 0 "
         "of the file; they count from the end of the header."),
        (_floats(raw[start - 8 + first : start - 8 + last], 3, 5), "Are the eight bytes of the "
         "length part of the header's length? They are not: the data starts 8 bytes later."),
        (right.T.contiguous().view(3, 5), "In which order are the numbers written? Row after row, "
         "the last dimension fastest; a plain `view` of the shape reads them."),
        (_floats(bytes(byte for i in range(first, last, 4)
                       for byte in raw[start + i : start + i + 4][::-1]), 3, 5),
         "Which byte of a number comes first? The format is little-endian throughout."),
    ]  # fmt: skip
    expect_close(
        found,
        right,
        mistakes,
        "The shape is right, the numbers are not. Which bytes of the file do you read? "
        f"The tensor `wide` lies at bytes {start + first} to {start + last}.",
    )
    right = tensors["half"]
    try:
        found = answer(raw, "half")
    except (RuntimeError, ValueError) as error:
        raise Hint(
            "Right for F32, and an error for the tensor of BF16. Do you look at the entry's dtype? "
            f"A number of bfloat16 has two bytes. ({error})"
        ) from error
    expect_tensor(found, right.shape, right.dtype, "the tensor of BF16")
    expect(torch.equal(found, right), "Right for F32, wrong numbers for the tensor of BF16.")
    expect(
        torch.equal(answer(raw, "again"), tensors["again"]),
        "Right for one tensor of F32 and wrong for another. Is a name or an offset written "
        "into your code?",
    )


def _floats(raw: bytes, *shape: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).view(shape)


@exercise("11.3", "Is the file whole?", difficulty=2, minutes=10)
def is_whole(answer):
    raw = safetensors.torch.save(_tensors(), metadata={"format": "pt"})
    entries, start = _parts(raw)

    def ask(given: bytes, what: str) -> bool:
        try:
            found = answer(given)
        except (ValueError, LookupError, TypeError) as error:
            raise Hint(
                f"Your function raised {type(error).__name__} for {what}. "
                "What should it answer there? A file that cannot be read is not whole: `False`."
            ) from error
        expect(isinstance(found, bool), f"Is the answer `True` or `False`? Yours is `{found!r}`.")
        return found

    expect(
        ask(raw, "a whole file"),
        "A whole file, and your answer is `False`. Where do the offsets count from? "
        "The file ends at 8 + header length + the largest end.",
    )
    expect(
        not ask(raw[:-1], "a file that lacks one byte"),
        "One byte is missing at the end, and your answer is `True`. The header is complete; "
        "do you compare what it promises with the size of the file?",
    )
    expect(
        not ask(raw[: start - 9], "a file that ends in its header"),
        "The file ends within its header, and your answer is `True`.",
    )
    expect(not ask(raw[:5], "a file of 5 bytes"), "Five bytes are no file, and you say `True`.")
    expect(
        not ask(raw + b"more", "a file with bytes too many"),
        "Four bytes too many, and your answer is `True`. Is a file that holds more than its header "
        "lists the one that was saved?",
    )
    turned = dict(sorted(entries.items(), key=lambda item: str(item[1].get("data_offsets", ""))))
    text = json.dumps(dict(reversed(turned.items()))).encode()
    shuffled = len(text).to_bytes(8, "little") + text + raw[start:]
    expect(
        ask(shuffled, "a file whose header lists the tensors in another order"),
        "This file is whole; its header lists the tensors in another order. "
        "Do you take the end of the last one listed, or the largest end?",
    )
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 598635032\n"
    expect(
        not ask(pointer, "a Git LFS pointer"),
        "This is a Git LFS pointer, three lines of text, and your answer is `True`.",
    )


@exercise("11.4", "Translate the names", difficulty=2, minutes=10)
def names(answer):
    inner = ["embeddings.norm.weight", "layers.0.attn.Wqkv.weight", "final_norm.weight"]
    head = ["head.dense.weight", "decoder.bias"]
    full = [PREFIX + name for name in inner] + head

    def ask(stored: list[str], own: list[str]) -> dict[str, str]:
        found = answer(list(stored), list(own))
        expect(
            isinstance(found, dict),
            f"Is the result a dictionary? It is of type `{type(found).__name__}`.",
        )
        right = match_names(own, stored)[0]
        expect(
            found != {b: a for a, b in right.items()} or found == right,
            "Which way round? The key is the model's own name, the value the stored one.",
        )
        return found

    found = ask(full, full)
    expect(
        set(found) >= set(head),
        "Names that agree already have to stay as they are: "
        f"{sorted(set(full) - set(found))} lost its partner. Only the encoder's names are in "
        "two forms, a head's name never takes the prefix.",
    )
    expect(
        found == {name: name for name in full},
        "Names that agree already have to stay as they are.",
    )
    found = ask(inner, full)
    expect(
        not set(found) & set(head),
        "The file holds no head, and yet your result gives one a partner. Whose?",
    )
    expect(
        found == {PREFIX + name: name for name in inner},
        "A bare export, `layers.0…`, into a model with a head, `model.layers.0…`: "
        "do you look for the name with `model.` before it?",
    )
    found = ask(full, inner)
    expect(found, "Into the bare encoder: do you look for the name without `model.` as well?")
    stripped = {name.lstrip(PREFIX) for name in full} - {*inner, *full}
    expect(
        not stripped & (set(found) | set(found.values())),
        "How do you take the prefix off? `lstrip('model.')` removes any of the letters m, o, d, e, "
        "l and the dot, so `layers` becomes `ayers`. `removeprefix` removes the word.",
    )
    expect(
        not {value for value in found.values()} & set(head),
        "Into the bare encoder, the head's tensors have no place: leave them out.",
    )
    expect(
        found == {name: PREFIX + name for name in inner},
        "A file with `model.` into the bare encoder: do you look for the name without it?",
    )


@exercise("11.5", "Your own loader", difficulty=3, minutes=20)
def loader(answer):
    from modernbert_mini.heads import ModernBertForMaskedLM
    from modernbert_mini.model import ModernBertModel

    sizes = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 6}
    config = ModernBertConfig(**sizes, num_hidden_layers=2, pad_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(11)
        saved = ModernBertForMaskedLM(config)
        for parameter in saved.parameters():
            nn.init.normal_(parameter)
        saved.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        _compare(answer, ModernBertForMaskedLM(config), saved, path)
        encoder = ModernBertModel(config)
        _compare(answer, encoder, saved.model, path)
    path = resolve_file("mini", "model.safetensors")
    mini = ModernBertForMaskedLM.from_pretrained("mini")
    _compare(answer, ModernBertForMaskedLM(mini.config), mini, path)
    total = sum(parameter.numel() for parameter in mini.parameters())
    return f"Your loader filled all {total:,} parameters of `mini`."


def _compare(answer: Callable, model: nn.Module, right: nn.Module, path: Path) -> None:
    kind = type(model).__name__
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    found = answer(model, path)
    expect(found is model, "Which model do you return? Fill the one you are given, and return it.")
    expected = dict(right.named_parameters())
    given = dict(model.named_parameters())
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    expect(
        all(value.shape == shapes.get(name) for name, value in right.state_dict().items()),
        "Did a parameter change its shape, or disappear?",
    )
    same = [name for name in expected if name in given and torch.equal(given[name], before[name])]
    same = [name for name in same if not torch.equal(before[name], expected[name])]
    expect(
        len(same) < len(expected),
        f"Nothing in this {kind} has changed: no stored name was one of its own. "
        "Does the file put `model.` before the names, and the model not? "
        "`strict=False` hides exactly this.",
    )
    expect(not same, f"These were never filled: {', '.join(same[:4])}. Under which name are they?")
    for name, value in expected.items():
        if torch.equal(given[name], value):
            continue
        expect(
            not torch.equal(given[name].flatten().sort().values, value.flatten().sort().values),
            f"{name} has the right numbers in another order. Is something cut up, turned or "
            "reshaped on the way? `Wqkv` holds the rows of q, k and v in this order, and stays so.",
        )
        raise Hint(f"{name} is wrong. Which bytes of the file are its own?")
    if hasattr(model, "decoder"):
        expect(
            model.decoder.weight is model.model.embeddings.tok_embeddings.weight,
            "Is the decoder still tied? Its numbers are right now, but it has become a parameter "
            "of its own, and training would pull the two apart. The file does not hold it: "
            "call `model.tie_weights()`, or copy into the parameters that are there.",
        )
    expect(
        all(parameter.requires_grad for parameter in model.parameters()),
        "Can the model still be trained? A parameter came out with `requires_grad=False`.",
    )
