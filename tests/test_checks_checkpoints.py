"""The checks of chapter 11: solutions pass, stubs are told so, each mistake has its own hint."""

import functools
import json

import nbformat
import pytest
import torch
from torch import nn

from modernbert_mini import checks
from modernbert_mini.checkpoints import match_names

CHECKS = checks.checkpoints


def parse(raw, order="little", begin=8, end=8, length=8):
    n = int.from_bytes(raw[:length], order)
    return json.loads(raw[begin : end + n])


def read(raw, name, shift=0, dtypes=None, shape=None):
    start = 8 + int.from_bytes(raw[:8], "little") + shift
    entry = parse(raw)[name]
    first, last = entry["data_offsets"]
    dtypes = dtypes or {"F32": torch.float32, "BF16": torch.bfloat16}
    data = bytearray(raw[start + first : start + last])
    flat = torch.frombuffer(data, dtype=dtypes[entry["dtype"]])
    return flat.view(shape or entry["shape"])


def read_from_the_file(raw, name):
    first, last = parse(raw)[name]["data_offsets"]
    return torch.frombuffer(bytearray(raw[first:last]), dtype=torch.float32).view(3, 5)


def whole(raw):
    if len(raw) < 8:
        return False
    n = int.from_bytes(raw[:8], "little")
    if n > len(raw) - 8:
        return False
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    return max(entry["data_offsets"][1] for entry in header.values()) == len(raw) - 8 - n


def whole_by_header(raw):
    n = int.from_bytes(raw[:8], "little")
    return len(raw) >= 8 + n


def whole_without_care(raw):
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    return max(entry["data_offsets"][1] for entry in header.values()) == len(raw) - 8 - n


def whole_from_zero(raw):
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    return max(entry["data_offsets"][1] for entry in header.values()) == len(raw)


def whole_by_the_last(raw):
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") > len(raw) - 8:
        return False
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    return list(header.values())[-1]["data_offsets"][1] == len(raw) - 8 - n


def whole_or_more(raw):
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") > len(raw) - 8:
        return False
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    return max(entry["data_offsets"][1] for entry in header.values()) <= len(raw) - 8 - n


def translate(stored, own):
    return match_names(own, stored)[0]


def translate_backwards(stored, own):
    return {b: a for a, b in translate(stored, own).items()}


def translate_with_lstrip(stored, own):
    found = {name: name for name in own if name in stored}
    found |= {"model." + name: name for name in stored if "model." + name in own}
    return found or {name.lstrip("model."): name for name in stored}  # noqa: B005


def translate_prefix_all(stored, own):
    return {"model." + name.removeprefix("model."): name for name in stored}


def translate_only_equal(stored, own):
    return {name: name for name in own if name in stored}


def translate_one_way(stored, own):
    found = {name: name for name in own if name in stored}
    return found | {"model." + name: name for name in stored if "model." + name in own}


def translate_with_heads(stored, own):
    found = translate(stored, own)
    return found | {name: name for name in stored if name.startswith(("head", "decoder"))}


def load(model, path, change=lambda name, tensor: tensor, tie=True):
    raw = path.read_bytes()
    stored = [name for name in parse(raw) if name != "__metadata__"]
    own = dict(model.named_parameters())
    for name, source in translate(stored, own).items():
        own[name].data.copy_(change(name, read(raw, source)))
    return model


def load_strictly_nothing(model, path):
    raw = path.read_bytes()
    state = {name: read(raw, name) for name in parse(raw) if name != "__metadata__"}
    model.load_state_dict(state, strict=False)
    return model


def load_untied(model, path):
    load(model, path)
    if hasattr(model, "decoder"):
        model.decoder.weight = nn.Parameter(model.decoder.weight.detach().clone())
    return model


def load_shuffled(model, path):
    def change(name, tensor):
        return torch.cat(tensor.chunk(3)[::-1]) if "Wqkv" in name else tensor

    return load(model, path, change)


def load_scaled(model, path):
    return load(model, path, lambda name, tensor: 2 * tensor)


def load_frozen(model, path):
    return load(model, path).requires_grad_(False)


def load_another(model, path):
    return type(model)(model.config)


def load_head_only(model, path):
    raw = path.read_bytes()
    own = dict(model.named_parameters())
    for name in parse(raw):
        if name in own and "layers" not in name:
            own[name].data.copy_(read(raw, name))
    return model


SOLUTIONS = {
    "header": parse,
    "tensor": read,
    "is_whole": whole,
    "names": translate,
    "loader": load,
}
# exercise -> (a wrong answer, words of the hint that it has to get)
WRONG = {
    "header": [
        (lambda raw: parse(raw, "big"), "little-endian"),
        (lambda raw: parse(raw, begin=0), "first eight bytes are its length"),
        (lambda raw: parse(raw, end=0), "ends at 8 + length"),
        (lambda raw: parse(raw, length=1), "a number of eight bytes"),
        (lambda raw: raw[8 : 8 + int.from_bytes(raw[:8], "little")], "Is the header parsed"),
        (lambda raw: {k: v for k, v in parse(raw).items() if k[0] != "_"}, "leave it in"),
        (lambda raw: {"wide": 1}, "should hold"),
    ],
    "tensor": [
        (read_from_the_file, "count from the end of the header"),
        (lambda raw, name: read(raw, name, shift=-8), "8 bytes later"),
        (lambda raw, name: read(raw, name, shape=[-1]), "Yours is flat"),
        (lambda raw, name: read(raw, name, shape=[5, 3]), "Which shape"),
        (lambda raw, name: read(raw, name, shift=12), "Which bytes of the file"),
        (lambda raw, name: read(raw, name).T.contiguous().view(3, 5), "last dimension fastest"),
        (
            lambda raw, name: read(raw, name, dtypes=dict.fromkeys(("F32", "BF16"), torch.float32)),
            "look at the entry's dtype",
        ),
        (lambda raw, name: read(raw, name).float(), "Which dtype"),
        (lambda raw, name: read(raw, "half" if name == "half" else "wide"), "written"),
    ],
    "is_whole": [
        (lambda raw: True, "One byte is missing"),
        (whole_by_header, "One byte is missing"),
        (lambda raw: False, "A whole file"),
        (whole_from_zero, "A whole file"),
        (whole_without_care, "cannot be read is not whole"),
        (whole_by_the_last, "largest end"),
        (whole_or_more, "too many"),
        (lambda raw: "yes", "`True` or `False`"),
    ],
    "names": [
        (translate_backwards, "Which way round"),
        (translate_with_lstrip, "removeprefix"),
        (translate_prefix_all, "never takes the prefix"),
        (translate_only_equal, "with `model.` before it"),
        (translate_one_way, "without `model.` as well"),
        (translate_with_heads, "have no place"),
        (lambda stored, own: list(stored), "a dictionary"),
    ],
    "loader": [
        (load_strictly_nothing, "strict=False"),
        (load_untied, "still tied"),
        (load_shuffled, "another order"),
        (load_scaled, "is wrong"),
        (load_frozen, "requires_grad"),
        (load_another, "return it"),
        (load_head_only, "never filled"),
    ],
}


@functools.cache
def verdict(name, number):
    return getattr(CHECKS, name)(WRONG[name][number][0])


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_solution_passes(name):
    result = getattr(CHECKS, name)(SOLUTIONS[name])
    assert result, result


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_stub_is_told_so(name):
    def stub(*args):
        raise NotImplementedError

    for empty in (stub, ..., None, lambda *args: None):
        result = getattr(CHECKS, name)(empty)
        assert not result and not result.written and "ot written yet" in result.message


@pytest.mark.parametrize(
    ("name", "number"), [(name, n) for name, wrong in WRONG.items() for n in range(len(wrong))]
)
def test_a_wrong_answer_gets_its_own_hint(name, number):
    result, words = verdict(name, number), WRONG[name][number][1]
    assert not result and result.written
    assert words in result.message, result.message


@pytest.mark.parametrize("name", WRONG)
def test_hints_differ(name):
    messages = {verdict(name, number).message for number in range(len(WRONG[name]))}
    assert len(messages) >= 3


def test_the_exercises_of_the_chapter_are_registered():
    found = [exercise for number, exercise in checks.EXERCISES.items() if number.startswith("11.")]
    assert [exercise.number for exercise in found] == [f"11.{n}" for n in range(1, 6)]


def test_every_check_is_used_in_the_chapter(root):
    book = nbformat.read(root / "notebooks" / "11_checkpoints.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in book.cells)
    for name in SOLUTIONS:
        assert text.count(f"checks.checkpoints.{name}(") == 2, name
