"""Loading and saving: every form a checkpoint comes in, and every way it can be broken."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import parity
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import modernbert_mini
from modernbert_mini import (
    CheckpointError,
    ConfigError,
    ModernBertConfig,
    atomic,
    checkpoints,
    sources,
)
from modernbert_mini.checkpoints import read_header
from modernbert_mini.sources import resolve_file

EMBEDDING = checkpoints.EMBEDDING
WO, NORM = "model.layers.1.attn.Wo.weight", "model.final_norm.weight"
CLASSIFIER = ["classifier.weight", "classifier.bias"]
HEAD = ["head.dense.weight", "head.norm.weight"]


def ours(name):
    return getattr(modernbert_mini, name)


@pytest.fixture
def saved(tmp_path):
    """Save one of our models, by class name and config values; gives model and folder."""

    def save(name="ModernBertForMaskedLM", max_shard_size="5GB", **values):
        torch.manual_seed(0)
        model = ours(name)(ModernBertConfig(**parity.BASE | values)).eval()
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size)
        return model, folder

    return save


def predict(model):
    choices = 3 if "Choice" in type(model).__name__ else None
    with torch.no_grad():
        return parity.scores(model(**parity.make_batch((12, 12, 12), choices=choices)))


def assert_same(model, other):
    """The same weights, bit for bit, and so the same scores.

    Of those the last bit is free: some processors sum in an order that hangs on where in memory a
    weight stands, and one that was loaded stands elsewhere than one that was drawn.
    """
    mine, others = model.state_dict(), other.state_dict()
    assert mine.keys() == others.keys()
    assert [name for name in mine if not torch.equal(mine[name], others[name])] == []
    for a, b in zip(predict(model), predict(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def edit(folder, change, file="model.safetensors"):
    """Rewrite a safetensors file after ``change(tensors)``."""
    tensors = safetensors.torch.load_file(folder / file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors = change(tensors) or tensors
    safetensors.torch.save_file(tensors, folder / file, metadata={"format": "pt"})


def load_quietly(name, *args, **kwargs):
    """Load, and collect the warnings' texts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = ours(name).from_pretrained(*args, **kwargs)
    return model, [str(warning.message) for warning in caught]


# --- There and back ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", ["published", "all biases", "untied decoder", "irregular layers", "rope_parameters"]
)
@pytest.mark.parametrize("name", parity.CLASSES)
def test_round_trip_with_transformers_both_ways(name, variant, tmp_path):
    model, theirs = parity.make_pair(name, variant)
    model.save_pretrained(tmp_path / "ours")
    loaded, info = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert_same(theirs, loaded.eval())

    theirs.save_pretrained(tmp_path / "theirs")
    again, caught = load_quietly(name, tmp_path / "theirs")
    assert not caught
    assert_same(model, again)


@pytest.mark.parametrize("name", parity.CLASSES)
def test_what_is_saved_loads_as_it_was(name, saved):
    model, folder = saved(name)
    again, caught = load_quietly(name, folder)
    assert not caught
    assert not again.training
    assert {n for n, p in again.named_parameters() if p.is_meta} == set()
    assert all(p.requires_grad for p in again.parameters())
    assert_same(model, again)


def test_saved_config_is_in_the_form_of_transformers_and_keeps_unknown_keys(saved, tmp_path):
    _, folder = saved()
    config = json.loads((folder / "config.json").read_text())
    config |= {"made_by": "a friend", "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_quietly("ModernBertForMaskedLM", folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["ModernBertForMaskedLM"]
    assert config["model_type"] == "modernbert"
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    assert config["made_by"] == "a friend"
    assert len(config["layer_types"]) == 4 and "sliding_attention" in config["rope_parameters"]


def test_saved_weights_are_in_the_published_form(saved):
    model, folder = saved()
    header, start = read_header(folder / "model.safetensors")
    assert header.pop("__metadata__") == {"format": "pt"}
    assert set(header) == set(model.state_dict()) - {"decoder.weight"}  # tied, so stored once
    data = header[EMBEDDING]["data_offsets"]
    raw = (folder / "model.safetensors").read_bytes()[start:][slice(*data)]
    by_hand = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    embedding = model.model.embeddings.tok_embeddings.weight
    assert torch.equal(by_hand.view(embedding.shape), embedding)
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1  # who may read the config may read the weights


def test_the_decoder_is_tied_again_after_loading(saved):
    _, folder = saved()
    model, _ = load_quietly("ModernBertForMaskedLM", folder)
    assert model.decoder.weight is model.model.embeddings.tok_embeddings.weight
    _, folder = saved(tie_word_embeddings=False)
    model, _ = load_quietly("ModernBertForMaskedLM", folder)
    assert model.decoder.weight is not model.model.embeddings.tok_embeddings.weight
    assert not torch.equal(model.decoder.weight, model.model.embeddings.tok_embeddings.weight)


def test_weights_that_are_not_contiguous_are_saved_in_order(saved, tmp_path):
    model, _ = saved("ModernBertModel")
    weight = model.layers[0].attn.Wo.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    model.save_pretrained(tmp_path / "again")
    assert_same(model, load_quietly("ModernBertModel", tmp_path / "again")[0])


@pytest.mark.parametrize("size", [200, 20_000, "30KB"])
def test_shards(size, saved, tmp_path):
    model, folder = saved(max_shard_size=size)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors" and len(shards) > 1
    assert set(index["weight_map"].values()) == set(shards)
    limit = checkpoints.parse_size(size)
    for shard in shards:
        header, start = read_header(folder / shard)
        data = (folder / shard).stat().st_size - start
        assert data <= limit or len(header) == 2, shard  # one tensor (and the metadata) may exceed
    assert_same(model, load_quietly("ModernBertForMaskedLM", folder)[0])
    loaded, info = transformers.ModernBertForMaskedLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    for a, b in zip(predict(model), predict(loaded.eval()), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("size", [0, "", "-3GB", "many", 2.5])
def test_a_shard_size_has_to_be_a_size(size, saved):
    with pytest.raises(ValueError, match="a size like"):
        saved(max_shard_size=size)


# --- Names, heads, dtypes ---------------------------------------------------------------------


def test_a_bare_export_loads_into_a_model_with_a_head_and_warns_once(saved):
    encoder, folder = saved("ModernBertModel")
    assert not any(
        name.startswith("model.") for name in read_header(folder / checkpoints.WEIGHTS)[0]
    )
    model, caught = load_quietly("ModernBertForTokenClassification", folder, num_labels=5)
    assert len(caught) == 1
    assert all(name in caught[0] for name in [*HEAD, *CLASSIFIER]) and "layers" not in caught[0]
    assert_same(encoder, model.model)
    assert model.classifier.weight.shape == (5, 48)
    # drawn as a new model's: truncated normal with standard deviation hidden^-0.5, bias zero
    assert 0.6 < model.classifier.weight.std().item() * 48**0.5 < 1.1
    assert not model.classifier.bias.any()
    assert bool((model.head.norm.weight == 1).all())
    assert all(p.isfinite().all() for p in model.parameters())


def test_new_heads_follow_the_seed(saved):
    _, folder = saved("ModernBertModel")
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model, _ = load_quietly("ModernBertForSequenceClassification", folder)
        heads.append(model.classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_masked_language_model_loads_into_the_bare_encoder_in_silence(saved):
    model, folder = saved()
    encoder, caught = load_quietly("ModernBertModel", folder)
    assert not caught
    assert_same(model.model, encoder)


def test_a_masked_language_model_loads_into_a_classifier_and_names_what_is_left(saved):
    model, folder = saved()
    classifier, caught = load_quietly("ModernBertForSequenceClassification", folder)
    assert len(caught) == 1
    assert "Not used: decoder.bias" in caught[0]
    assert all(name in caught[0] for name in CLASSIFIER) and "head." not in caught[0]
    assert_same(model.model, classifier.model)
    assert torch.equal(model.head.dense.weight, classifier.head.dense.weight)


def test_another_number_of_labels_means_a_new_classifier(saved):
    _, folder = saved("ModernBertForSequenceClassification", num_labels=2)
    model, caught = load_quietly("ModernBertForSequenceClassification", folder, num_labels=3)
    assert len(caught) == 1 and "Newly initialised" in caught[0]
    assert model.config.num_labels == 3 and model.classifier.weight.shape == (3, 48)
    model, caught = load_quietly("ModernBertForSequenceClassification", folder, num_labels=2)
    assert not caught
    # another task, whose classifier cannot be the same
    model, caught = load_quietly("ModernBertForMultipleChoice", folder)
    assert len(caught) == 1 and model.classifier.weight.shape == (1, 48)


def test_overrides_of_the_config(saved):
    _, folder = saved()
    model, _ = load_quietly(
        "ModernBertForSequenceClassification", folder, classifier_pooling="mean", local_attention=6
    )
    assert model.config.classifier_pooling == "mean" and model.config.half_window == 3
    with pytest.raises(ConfigError, match="num_label"):
        load_quietly("ModernBertForSequenceClassification", folder, num_label=3)
    with pytest.raises(ConfigError, match="attn_implementation"):
        load_quietly("ModernBertModel", folder, attn_implementation="fast")
    model, _ = load_quietly("ModernBertForMaskedLM", folder, attn_implementation="eager")
    assert model.attn_implementation == "eager"


@pytest.mark.parametrize("form", ["safetensors", "shards", "pickle", "sharded pickle"])
@pytest.mark.parametrize("dtype", [None, "auto", torch.bfloat16, "float64"])
def test_every_form_of_weights_in_every_dtype(form, dtype, saved):
    model, folder = saved(max_shard_size=3000 if form == "shards" else "5GB")
    if "pickle" in form:
        (folder / checkpoints.WEIGHTS).unlink()
        state = model.state_dict()
        halves = [dict(list(state.items())[:9]), dict(list(state.items())[9:])]
        if form == "pickle":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            for number, half in enumerate(halves):
                torch.save(half, folder / f"pytorch_model-{number}.bin")
            names = {k: f"pytorch_model-{n}.bin" for n, half in enumerate(halves) for k in half}
            index = folder / "pytorch_model.bin.index.json"
            index.write_text(json.dumps({"weight_map": names}))
    loaded, caught = load_quietly("ModernBertForMaskedLM", folder, dtype=dtype)
    assert not caught
    names = {None: torch.float32, "auto": torch.float32, "float64": torch.float64}
    wanted = names.get(dtype, dtype)
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.to(wanted), loaded.get_parameter(name))


def test_the_stored_dtype_is_kept_and_a_mixture_becomes_one(saved):
    model, folder = saved()
    model.to(torch.bfloat16).save_pretrained(folder)
    edit(folder, lambda t: t.update({NORM: t[NORM].float()}))
    loaded, _ = load_quietly("ModernBertForMaskedLM", folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for dtype in ("int8", torch.int32, "float99", "Tensor"):
        with pytest.raises(ConfigError, match="dtype"):
            load_quietly("ModernBertForMaskedLM", folder, dtype=dtype)


def test_a_stored_copy_of_the_tied_decoder_must_be_a_copy(saved):
    model, folder = saved()
    edit(folder, lambda t: t.update({"decoder.weight": t[EMBEDDING].clone()}))
    assert_same(model, load_quietly("ModernBertForMaskedLM", folder)[0])

    def keep_the_decoder_alone(tensors):
        del tensors[EMBEDDING]

    edit(folder, keep_the_decoder_alone)
    assert_same(model, load_quietly("ModernBertForMaskedLM", folder)[0])
    saved()
    edit(folder, lambda t: t.update({"decoder.weight": t[EMBEDDING] + 1}))
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        load_quietly("ModernBertForMaskedLM", folder)
    both, _ = load_quietly("ModernBertForMaskedLM", folder, tie_word_embeddings=False)
    assert torch.equal(both.decoder.weight, both.model.embeddings.tok_embeddings.weight + 1)


def test_loaded_weights_can_be_trained_without_touching_the_file(saved):
    _, folder = saved()
    before = (folder / checkpoints.WEIGHTS).read_bytes()
    model, _ = load_quietly("ModernBertForMaskedLM", folder)
    batch = parity.make_batch((9, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert (folder / checkpoints.WEIGHTS).read_bytes() == before
    model.save_pretrained(folder)  # over the very file that the weights are mapped from
    assert_same(model, load_quietly("ModernBertForMaskedLM", folder)[0])


def test_every_parameter_has_its_place_in_the_name_map():
    names = {full for name in parity.CLASSES for full in map(checkpoints.full_name, _names(name))}
    assert None not in names
    assert {name.split(".")[0] for name in names} == {"model", "head", "decoder", "classifier"}
    assert checkpoints.full_name("bert.encoder.layer.0.weight") is None


def _names(class_name):
    with torch.device("meta"):
        return ours(class_name)(ModernBertConfig(**parity.BASE)).state_dict()


# --- Broken and hostile files -----------------------------------------------------------------


def rewrite(**change):
    """A breaker that changes keys of config.json."""

    def breaker(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return breaker


def replace(file, content):
    """A breaker that puts bytes in a file's place."""

    def breaker(folder):
        (folder / file).write_bytes(content)

    return breaker


def cut(file, keep):
    """A breaker that keeps only the first bytes of a file; negative counts from its end."""

    def breaker(folder):
        (folder / file).write_bytes((folder / file).read_bytes()[:keep])

    return breaker


def tensors(change):
    """A breaker that changes the stored tensors."""
    return lambda folder: edit(folder, change)


def header(change):
    """A breaker that rewrites the JSON text of the header."""

    def breaker(folder):
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        before = raw[8 : 8 + length]
        text = change(before.decode()).encode()
        assert text != before
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return breaker


def entry(name, **change):
    """A breaker that changes one tensor's entry in the header."""

    def rewritten(text):
        whole = json.loads(text)
        whole[name] |= change
        return json.dumps(whole)

    return header(rewritten)


def index(change):
    """A breaker that shards the checkpoint and changes the index's weight_map."""

    def breaker(folder):
        ours("ModernBertForMaskedLM").from_pretrained(folder).save_pretrained(folder, 3000)
        path = folder / "model.safetensors.index.json"
        whole = json.loads(path.read_text())
        result = change(whole["weight_map"], folder)
        path.write_text(result if isinstance(result, str) else json.dumps(whole))

    return breaker


def point_to(shard):
    return index(lambda names, folder: names.update({EMBEDDING: shard}))


def drop_shard(names, folder):
    (folder / names[EMBEDDING]).unlink()


def swap_entry(names, folder):
    other = next(shard for shard in names.values() if shard != names[EMBEDDING])
    names[EMBEDDING] = other


def copy_into_two(names, folder):
    value = safetensors.torch.load_file(folder / names[EMBEDDING])[EMBEDDING].clone()
    other = next(shard for shard in names.values() if shard != names[EMBEDDING])
    edit(folder, lambda t: t.update({EMBEDDING: value}), other)


def as_pickle(value):
    """A breaker that has pytorch_model.bin hold ``value`` in place of safetensors."""

    def breaker(folder):
        (folder / "model.safetensors").unlink()
        torch.save(value, folder / "pytorch_model.bin")

    return breaker


def remove(*names):
    def breaker(folder):
        for name in names:
            (folder / name).unlink()

    return breaker


def set_to(name, value):
    return tensors(lambda t: t.update({name: value(t[name])}))


def poke(number):
    def value(tensor):
        tensor.view(-1)[17] = number
        return tensor

    return value


def pop(name):
    def change(tensors):
        del tensors[name]

    return tensors(change)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 598635032\n"
HTML = b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"

# what it is -> (how to make it, the file at fault, words that the finding has to hold)
BROKEN = {
    "empty folder": (
        remove("config.json", "model.safetensors"),
        "config.json",
        "an empty folder",
    ),
    "no config": (remove("config.json"), "config.json", "model.safetensors"),
    "no weights": (remove("model.safetensors"), "model.safetensors", "config.json"),
    "config is an LFS pointer": (replace("config.json", LFS), "config.json", "LFS pointer"),
    "config is HTML": (replace("config.json", HTML), "config.json", "HTML page"),
    "config is no JSON": (replace("config.json", b"{"), "config.json", "no config"),
    "config is a list": (replace("config.json", b"[]"), "config.json", "list"),
    "another model type": (rewrite(model_type="bert"), "config.json", "bert"),
    "impossible heads": (rewrite(num_attention_heads=5), "config.json", "5 heads"),
    "weights are an LFS pointer": (replace("model.safetensors", LFS), "model.safetensors", "LFS"),
    "weights are HTML": (replace("model.safetensors", HTML), "model.safetensors", "HTML page"),
    "weights are empty": (replace("model.safetensors", b""), "model.safetensors", "empty file"),
    "weights are 5 bytes": (cut("model.safetensors", 5), "model.safetensors", "5 bytes"),
    "cut in the header": (cut("model.safetensors", 100), "model.safetensors", "100 bytes"),
    "cut in the data": (cut("model.safetensors", -7), "model.safetensors", "bytes of tensors"),
    "bytes too many": (
        lambda folder: (folder / "model.safetensors").open("ab").write(b"1234"),
        "model.safetensors",
        "bytes of tensors",
    ),
    "header of a terabyte": (
        replace("model.safetensors", (2**40).to_bytes(8, "little") + bytes(99)),
        "model.safetensors",
        "1,099,511,627,776",
    ),
    "random bytes": (
        replace("model.safetensors", bytes(range(256)) * 9),
        "model.safetensors",
        "header",
    ),
    "header is no JSON": (header(lambda t: t.replace(":", ";")), "model.safetensors", "parse"),
    "header nested deep": (
        header(lambda t: "[" * 50_000 + "]" * 50_000),
        "model.safetensors",
        "parse",
    ),
    "header names a tensor twice": (
        header(lambda t: t.replace('"model.final_norm.weight"', '"model.embeddings.norm.weight"')),
        "model.safetensors",
        "twice",
    ),
    "tensors that overlap": (entry(NORM, data_offsets=[192, 384]), "model.safetensors", ""),
    "shape beyond the data": (entry(WO, shape=[48, 96]), "model.safetensors", ""),
    "a negative shape": (entry(WO, shape=[-48, -48]), "model.safetensors", ""),
    "offsets that are text": (
        entry(NORM, data_offsets=["0", "192"]),
        "model.safetensors",
        "parse",
    ),
    "unknown dtype": (
        header(lambda t: t.replace('"F32"', '"Q99"', 1)),
        "model.safetensors",
        "",
    ),
    "a tensor is missing": (pop(WO), "model.safetensors", WO),
    "a layer too many": (
        tensors(lambda t: t.update({"model.layers.4.attn.Wo.weight": t[WO].clone()})),
        "model.safetensors",
        "model.layers.4.attn.Wo.weight",
    ),
    "a foreign tensor": (
        tensors(lambda t: t.update({"pooler.weight": t[WO].clone()})),
        "model.safetensors",
        "pooler.weight",
    ),
    "with prefix and without": (
        tensors(lambda t: t.update({"layers.1.attn.Wo.weight": t[WO].clone()})),
        "model.safetensors",
        "both",
    ),
    "a wrong shape": (set_to(WO, lambda t: t[:, :24].clone()), "model.safetensors", "(48, 24)"),
    "a transposed matrix": (
        set_to("model.layers.1.mlp.Wi.weight", lambda t: t.t().contiguous()),
        "model.safetensors",
        "(48, 80)",
    ),
    "the config of another": (rewrite(intermediate_size=44), "model.safetensors", "Wi.weight"),
    "fewer layers in the config": (
        rewrite(num_hidden_layers=3, layer_types=None),
        "model.safetensors",
        "model.layers.3",
    ),
    "integers": (set_to(WO, lambda t: t.to(torch.int8)), "model.safetensors", "int8"),
    "booleans": (set_to(WO, lambda t: t > 0), "model.safetensors", "bool"),
    "8-bit floats": (
        set_to(WO, lambda t: t.to(torch.float8_e4m3fn)),
        "model.safetensors",
        "float8",
    ),
    "one NaN": (set_to(WO, poke(float("nan"))), "model.safetensors", f"infinity in {WO}"),
    "one infinity": (set_to(WO, poke(float("-inf"))), "model.safetensors", f"infinity in {WO}"),
    "index leads up": (point_to("../model.safetensors"), "index.json", "../model"),
    "index leads to the root": (point_to("/etc/passwd"), "index.json", "/etc/passwd"),
    "index leads to a drive": (point_to("C:\\model.safetensors"), "index.json", "C:"),
    "index leads to a hidden file": (point_to(".model.safetensors"), "index.json", "'.model"),
    "index leads to another kind": (point_to("config.json"), "index.json", "config.json"),
    "index leads to a number": (point_to(7), "index.json", "a shard named 7"),
    "index leads to a list": (point_to(["a"]), "index.json", "no index"),
    "index of nothing": (index(lambda names, f: names.clear()), "index.json", "lists nothing"),
    "index is no JSON": (index(lambda names, f: "{"), "index.json", "no index"),
    "index is a list": (index(lambda names, f: "[]"), "index.json", "no index"),
    "index has no map": (index(lambda names, f: "{}"), "index.json", "weight_map"),
    "index is a pointer": (index(lambda names, f: LFS.decode()), "index.json", "LFS"),
    "a shard is missing": (index(drop_shard), "index.json", "model-000"),
    "a tensor in another shard": (index(swap_entry), "model-000", EMBEDDING),
    "a tensor in two shards": (index(copy_into_two), "model-000", EMBEDDING),
    "a tensor that no index lists": (
        index(lambda names, f: names.pop("decoder.bias") and None),
        "model-000",
        "decoder.bias",
    ),
    "a pickle of a list": (as_pickle([torch.ones(2)]), "pytorch_model.bin", "a list"),
    "a pickle within a pickle": (
        as_pickle({"state_dict": {"a": torch.ones(2)}}),
        "pytorch_model.bin",
        "a dict that holds other things",
    ),
    "a sparse tensor": (
        as_pickle({WO: torch.eye(48).to_sparse()}),
        "pytorch_model.bin",
        "",
    ),
    "a pickle cut short": (
        lambda folder: (
            as_pickle({WO: torch.eye(48)})(folder),
            cut("pytorch_model.bin", 700)(folder),
        ),
        "pytorch_model.bin",
        "no archive",
    ),
    "a pickle without an archive": (
        lambda folder: (
            remove("model.safetensors")(folder),
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1})),
        ),
        "pytorch_model.bin",
        "",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_checkpoints_are_refused_with_file_finding_and_remedy(what, saved):
    breaker, file, found = BROKEN[what]
    _, folder = saved()
    breaker(folder)
    start = time.process_time()  # others may be using the machine too
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        ours("ModernBertForMaskedLM").from_pretrained(folder)
    seconds = time.process_time() - start
    error = caught.value
    assert file in str(error.file), error.file
    assert found in error.found, error.found
    assert len(error.expected) > 3 and len(error.remedy) > 9
    assert all(str(part) in str(error) for part in (error.file, error.found, error.expected))
    assert error.remedy in str(error) and "\n" not in str(error)
    assert seconds < 1


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_with_code_in_it_is_never_run(archive, saved, tmp_path):
    model, folder = saved()
    canary = tmp_path / "the code ran"
    state = dict(model.state_dict()) | {"canary": Canary(canary)}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        ours("ModernBertForMaskedLM").from_pretrained(folder)
    assert not canary.exists()
    if archive:
        assert "a pickle that calls pathlib.Path.touch" in caught.value.found or (
            "a pickle that calls" in caught.value.found
        )
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert canary.exists()  # the file was loaded: the test can fail


def test_a_path_that_is_no_folder(saved, tmp_path):
    _, folder = saved()
    with pytest.raises(CheckpointError, match="a file") as caught:
        resolve_file(folder / "model.safetensors", "config.json")
    assert str(folder) in caught.value.remedy
    for path in (tmp_path / "nowhere", "./nowhere", "a/b/c", "no such model", "~x/y"):
        with pytest.raises(CheckpointError, match="no such folder"):
            resolve_file(path, "config.json")
    with pytest.raises(CheckpointError, match="a file"):
        ours("ModernBertModel")(ModernBertConfig(**parity.BASE)).save_pretrained(
            folder / "config.json"
        )


def test_errors_survive_pickling():
    error = CheckpointError("a file", "this", "that", "Do so.")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.remedy == "Do so."


def test_folders_are_found_by_text_and_from_home(saved, monkeypatch):
    _, folder = saved()
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in (str(folder), folder, f"~/{folder.name}"):
        assert resolve_file(name, "config.json").samefile(folder / "config.json")
    monkeypatch.chdir(folder.parent)
    assert resolve_file(folder.name, "config.json").exists()
    Path("mini").mkdir()  # the embedded checkpoint is meant, whatever lies around
    with pytest.raises(CheckpointError, match="no such file"):
        resolve_file("./mini", "config.json")
    package = Path(modernbert_mini.__file__).parent
    assert sources.find_folder("mini") == package / "mini"


# --- The Hub ----------------------------------------------------------------------------------

COMMITS = {"main": "a" * 40, "old": "b" * 40}


class Hub:
    """A server that speaks as much of the Hub's protocol as a download needs."""

    def __init__(self):
        self.files: dict[tuple[str, str], bytes] = {}  # (commit, name) -> content
        self.asked: list[tuple[str, str]] = []  # (method, name)
        self.break_off_at: int | None = None
        self.down = False

    def add(self, folder, revision="main"):
        for path in folder.iterdir():
            self.files[COMMITS[revision], path.name] = path.read_bytes()

    def downloaded(self):
        names = [name for method, name in self.asked if method == "GET"]
        self.asked.clear()
        return sorted(names)

    def answer(self, request, method):
        owner, model, resolve, revision, name = request.path.lstrip("/").split("/")
        assert resolve == "resolve"
        self.asked.append((method, name))
        if self.down:
            return self.send(request, 503, {})
        if (owner, model) != ("owner", "model"):
            return self.send(request, 404, {"X-Error-Code": "RepoNotFound"})
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self.send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": commit}
        content = self.files.get((commit, name))
        if content is None:
            return self.send(request, 404, headers | {"X-Error-Code": "EntryNotFound"})
        headers |= {"ETag": f'"{hash((commit, name)) & 0xFFFFFFFF:x}"'}
        body = content if method == "GET" else b""
        start, status = 0, 200
        if body and (wanted := request.headers.get("Range")):
            start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            body = body[start:]
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = str(len(content) - start)
        if body and self.break_off_at and len(body) > self.break_off_at:
            body, self.break_off_at = body[: self.break_off_at], None
            request.close_connection = True
        return self.send(request, status, headers, body)

    def send(self, request, status, headers, body=b""):
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        if "Content-Length" not in headers:
            request.send_header("Content-Length", "0")
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, with an empty cache before it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            hub.answer(self, "HEAD")

        def do_GET(self):
            hub.answer(self, "GET")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # a client that no longer waits is no error here
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    disable_progress_bars()
    with use_endpoint(monkeypatch, constants, f"http://127.0.0.1:{server.server_port}"):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
    server.shutdown()
    server.server_close()


@contextmanager
def use_endpoint(monkeypatch, constants, endpoint):
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield


def test_only_the_files_that_are_needed_are_fetched_and_only_once(hub, saved, monkeypatch):
    model, folder = saved()
    for other in ("pytorch_model.bin", "tf_model.h5", "README.md", "tokenizer.json"):
        (folder / other).write_bytes(b"never asked for")
    hub.add(folder)
    loaded, caught = load_quietly("ModernBertForMaskedLM", "owner/model")
    assert hub.downloaded() == ["config.json", "model.safetensors"] and not caught
    assert_same(model, loaded)
    assert_same(model, load_quietly("ModernBertForMaskedLM", "owner/model")[0])
    assert hub.downloaded() == []
    assert resolve_file("owner/model", "tokenizer.json").read_bytes() == b"never asked for"
    assert hub.downloaded() == ["tokenizer.json"]
    with pytest.raises(CheckpointError, match="no such file in this repository"):
        resolve_file("owner/model", "vocab.txt")
    # offline, by the user's will or by accident, the cache answers
    from huggingface_hub import constants

    hub.asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert_same(model, load_quietly("ModernBertForMaskedLM", "owner/model")[0])
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
            resolve_file("owner/model", "other.json")
    assert hub.asked == []
    hub.down = True
    assert_same(model, load_quietly("ModernBertForMaskedLM", "owner/model")[0])
    with use_endpoint(monkeypatch, constants, "http://127.0.0.1:9"):
        assert_same(model, load_quietly("ModernBertForMaskedLM", "owner/model")[0])


def test_shards_and_pickles_come_from_the_hub_too(hub, saved):
    model, folder = saved(max_shard_size=30_000)
    hub.add(folder)
    assert_same(model, load_quietly("ModernBertForMaskedLM", "owner/model")[0])
    names = sorted(path.name for path in folder.iterdir())
    assert hub.downloaded() == names and len(names) > 3

    hub.files.clear()
    shutil.rmtree(folder)
    model, folder = saved()
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    hub.add(folder, "old")
    loaded, _ = load_quietly("ModernBertForMaskedLM", "owner/model", revision="old")
    assert hub.downloaded() == ["config.json", "pytorch_model.bin"]
    assert_same(model, loaded)
    # what is known to be absent is not asked for again
    loaded, _ = load_quietly("ModernBertForMaskedLM", "owner/model", revision=COMMITS["old"])
    assert hub.asked == []


def test_a_revision_is_honoured_and_all_files_are_of_one_commit(hub, saved, monkeypatch):
    new, folder = saved()
    hub.add(folder)
    old, folder = saved(norm_eps=0.01, norm_bias=True)
    hub.add(folder, "old")
    for revision, model in {"old": old, COMMITS["old"]: old, "main": new, None: new}.items():
        loaded, _ = load_quietly("ModernBertForMaskedLM", "owner/model", revision=revision)
        assert loaded.config.norm_eps == model.config.norm_eps
        assert_same(model, loaded)
    with pytest.raises(CheckpointError, match="no revision 'older'"):
        resolve_file("owner/model", "config.json", "older")
    # the branch moves on between two files: the second has to come from the first's commit
    source = sources.Source("owner/model")
    source.require("config.json")
    monkeypatch.setitem(COMMITS, "main", COMMITS["old"])
    assert COMMITS["old"] not in str(source.require("model.safetensors"))


def test_a_broken_connection_is_taken_up_again(hub, saved, caplog):
    model, folder = saved()
    hub.add(folder)
    hub.break_off_at = 50_000
    assert_same(model, load_quietly("ModernBertForMaskedLM", "owner/model")[0])
    assert hub.downloaded() == ["config.json", "model.safetensors", "model.safetensors"]


def test_names_that_the_hub_does_not_know(hub):
    for name in ("owner/other", "modern-bert"):
        start = time.perf_counter()
        with pytest.raises(CheckpointError):
            resolve_file(name, "config.json")
        assert time.perf_counter() - start < 5


def test_what_the_hub_sends_is_not_trusted(hub, saved):
    _, folder = saved()
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {EMBEDDING: "../../../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add(folder)
    with pytest.raises(CheckpointError, match="a shard named"):
        ours("ModernBertForMaskedLM").from_pretrained("owner/model")
    assert hub.downloaded() == ["config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("trouble", ["closed port", "silent server", "down", "another server"])
def test_an_unreachable_hub_is_said_within_seconds(trouble, hub, monkeypatch):
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    hub.down = trouble == "down"
    if trouble == "closed port":
        endpoint = "http://127.0.0.1:9"
    if trouble == "silent server":
        monkeypatch.setattr(Hub, "answer", lambda *args: time.sleep(6))
    if trouble == "another server":
        monkeypatch.setattr(Hub, "answer", lambda self, request, _: self.send(request, 200, {}))
    start = time.perf_counter()
    with (
        use_endpoint(monkeypatch, constants, endpoint),
        pytest.raises(CheckpointError) as caught,
    ):
        ours("ModernBertForMaskedLM").from_pretrained("owner/model")
    assert time.perf_counter() - start < 5  # the library alone takes 23 seconds
    error = caught.value
    assert error.file == "owner/model/config.json"
    assert "the Hub out of reach" in error.found
    assert '"mini"' in error.remedy and "folder" in error.remedy


def test_the_environment_variables_of_the_hub_hold(tmp_path):
    code = """
from modernbert_mini import sources
try:
    sources.resolve_file("owner/model", "config.json")
except sources.CheckpointError as error:
    print(error)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "http://127.0.0.1:9" in result.stdout and str(tmp_path) in result.stdout
    assert result.stderr == ""  # no trace of retries


# --- Saving, interrupted ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork to kill saving processes")
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one():
    script = Path(__file__).with_name("killed_saves.py")
    result = subprocess.run(
        [sys.executable, script, "60"], capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr[-2000:]
    left = json.loads(result.stdout)
    print(left)
    for name, seen in left.items():
        assert seen["old" if name != "any moment" else "1/4"] >= 8, (name, seen)
        # only where files have to move one by one is there a moment without a checkpoint
        assert "none" not in seen or "no exchange" in name or "no siblings" in name, (name, seen)
    assert sum(sum(seen.values()) for seen in left.values()) > 200


def test_a_failing_save_leaves_the_old_checkpoint_and_no_litter(saved, monkeypatch):
    model, folder = saved()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*args, **kwargs):
        (args[1]).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    other = ours("ModernBertModel")(ModernBertConfig(**parity.BASE | {"norm_bias": True}))
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full_disk)
        with pytest.raises(OSError, match="No space"):
            other.save_pretrained(folder)
        with pytest.raises(OSError, match="No space"):
            other.save_pretrained(folder.parent / "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def refuse(*args):
    raise OSError("not here")


@pytest.mark.parametrize("exchange", [True, False])
def test_other_files_of_the_folder_stay(exchange, saved, monkeypatch, tmp_path):
    if not exchange:
        monkeypatch.setattr(atomic, "exchange", refuse)
    _, folder = saved(max_shard_size=9000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "runs" / "1").mkdir(parents=True)
    (folder / "runs" / "1" / "log").write_text("loss 3.1")
    (folder / "link").symlink_to("tokenizer.json")
    inode = (folder / "tokenizer.json").stat().st_ino
    monkeypatch.chdir(folder)
    model = ours("ModernBertModel")(ModernBertConfig(**parity.BASE | {"norm_bias": True}))
    model.save_pretrained(".")
    assert sorted(path.name for path in Path().iterdir()) == [
        "config.json",
        "link",
        "model.safetensors",
        "runs",
        "tokenizer.json",
    ]
    assert Path.cwd() == folder and os.path.samefile(".", folder)
    assert (folder / "tokenizer.json").stat().st_ino == inode
    assert (folder / "runs" / "1" / "log").read_text() == "loss 3.1"
    assert os.readlink(folder / "link") == "tokenizer.json"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert_same(model.eval(), load_quietly("ModernBertModel", folder)[0])


def test_the_same_config_changes_one_file_and_nothing_else(saved, monkeypatch):
    model, folder = saved()
    monkeypatch.setattr(atomic, "exchange", refuse)
    monkeypatch.setattr(atomic, "move_files", refuse)
    inode = (folder / "config.json").stat().st_ino, folder.stat().st_ino
    nn.init.ones_(model.head.dense.weight)
    model.save_pretrained(folder)
    assert ((folder / "config.json").stat().st_ino, folder.stat().st_ino) == inode
    assert_same(model, load_quietly("ModernBertForMaskedLM", folder)[0])


def test_files_that_cannot_be_moved_are_put_back(saved, monkeypatch):
    """As on Windows, where a file that a program maps cannot be replaced."""
    old, folder = saved()
    monkeypatch.setattr(atomic, "exchange", refuse)
    real = os.replace

    def replace(source, target):
        if str(source).endswith(f"{folder.name}/model.safetensors"):
            raise PermissionError("a program maps this file")
        real(source, target)

    model = ours("ModernBertForMaskedLM")(ModernBertConfig(**parity.BASE | {"norm_bias": True}))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(PermissionError):
            model.save_pretrained(folder)
    assert_same(old, load_quietly("ModernBertForMaskedLM", folder)[0])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_save_through_a_link_changes_what_it_points_to(saved, tmp_path):
    _, folder = saved()
    link = tmp_path / "latest"
    link.symlink_to(folder.name)
    model = ours("ModernBertModel")(ModernBertConfig(**parity.BASE | {"norm_bias": True})).eval()
    model.save_pretrained(link)
    assert link.is_symlink()
    assert_same(model, load_quietly("ModernBertModel", folder)[0])


def test_weights_that_a_model_has_mapped_are_replaced_where_a_system_lets_them_move_alone(
    saved, monkeypatch
):
    model, folder = saved()
    move = os.replace

    def as_on_windows(source, target):
        if target == folder / "model.safetensors" and target.exists():
            raise PermissionError(13, "a user-mapped section is open", str(target))
        move(source, target)

    monkeypatch.setattr(atomic.os, "replace", as_on_windows)
    with torch.no_grad():
        model.head.dense.weight.add_(1)
    model.save_pretrained(folder)
    monkeypatch.undo()
    assert_same(model, load_quietly("ModernBertForMaskedLM", folder)[0])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_running_save_of_another_process_is_left_alone(saved):
    model, folder = saved()
    with atomic.replacing(folder) as other:
        (other / "begun").write_text("…")
        model.save_pretrained(folder)
        assert (other / "begun").exists()
        (other / "begun").unlink()
        shutil.copy(folder / "config.json", other)
        shutil.copy(folder / "model.safetensors", other)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert_same(model, load_quietly("ModernBertForMaskedLM", folder)[0])


# --- Memory, published sizes, published weights -----------------------------------------------

MEASURE = """
import gc, sys
import safetensors.torch, torch
from modernbert_mini import ModernBertForMaskedLM

def memory(kind):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))

tiny, *folders = sys.argv[1:]
ModernBertForMaskedLM.from_pretrained(tiny)  # whatever loads on first use
for folder in folders:
    for dtype in ("auto", "bfloat16"):
        gc.collect()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # begin a new peak
        before = memory("VmRSS")
        model = ModernBertForMaskedLM.from_pretrained(folder, dtype=dtype)
        print(folder, dtype, memory("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
        del model
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_is_at_most_a_fifth_above_the_weights(saved, tmp_path):
    _, tiny = saved()
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8}
    sizes |= {"num_hidden_layers": 9, "vocab_size": 20_000, "pad_token_id": 0}
    with torch.device("meta"):
        model = ours("ModernBertForMaskedLM")(ModernBertConfig(**sizes))
    model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.01)
    folders = [tmp_path / form for form in ("one", "shards", "pickle")]
    model.save_pretrained(folders[0])
    model.save_pretrained(folders[1], "30MB")
    folders[2].mkdir()
    shutil.copy(folders[0] / "config.json", folders[2])
    torch.save(model.state_dict(), folders[2] / "pytorch_model.bin")
    stored = sum(p.nbytes for p in model.parameters())
    assert stored > 100e6
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tiny, *folders], capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 6
    for folder, dtype, peak, final in lines:
        print(f"{Path(folder).name}, {dtype}: peak {int(peak) / stored:.3f} × the stored weights")
        assert int(final) == (stored if dtype == "auto" else stored // 2)
        # Less than half would mean that the measurement sees nothing.
        assert 0.4 * stored < int(peak) < 1.2 * stored


PUBLISHED = {
    "ModernBERT-base": 149_655_232,
    "ModernBERT-large": 395_881_664,
    "ettin-encoder-17m": 16_913_600,
    "ettin-encoder-32m": 32_081_344,
    "ettin-encoder-68m": 68_457_664,
    "ettin-encoder-1b": 1_031_314_112,
    "mmBERT-small": 140_897_536,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_published_number_of_parameters(name, reference):
    config = ModernBertConfig.from_file(reference / "configs" / f"{name}.json")
    with torch.device("meta"):
        model = ours("ModernBertForMaskedLM")(config)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    if name == "ModernBERT-base":
        assert len(dict(model.named_parameters())) == 137


def test_every_published_config_builds(reference):
    for path in sorted((reference / "configs").glob("*.json")):
        config = ModernBertConfig.from_file(path)
        with torch.device("meta"):
            ours("ModernBertForMaskedLM")(config)
        ettin_like = path.stem.startswith(("ettin", "mmBERT"))
        assert config.local_rope_theta == (160_000 if ettin_like else 10_000)


@pytest.mark.network
def test_published_weights_give_the_published_outputs(reference):
    expected = json.loads((reference / "ModernBERT-base" / "expected.json").read_text())
    name = expected["model"]
    model = ours("ModernBertForMaskedLM").from_pretrained(name).float()
    path = resolve_file(name, "model.safetensors")
    assert path.stat().st_size == expected["weights_bytes"]
    whole, part = expected["last_hidden_state"], expected["slices"]
    with torch.no_grad():
        hidden = model.model(torch.tensor([whole["input_ids"]])).last_hidden_state[0]
        output = model(torch.tensor([part["input_ids"]]), output_hidden_states=True)
    values = torch.tensor(whole["values"])
    torch.testing.assert_close(hidden, values, atol=whole["atol"], rtol=0)
    corner = torch.tensor(part["mlm_logits_0_0to3_0to3"])
    torch.testing.assert_close(output.logits[0, :3, :3], corner, atol=part["atol"], rtol=0)
    corner = torch.tensor(part["last_hidden_state_0_0to3_0to3"])
    torch.testing.assert_close(
        output.hidden_states[-1][0, :3, :3], corner, atol=part["atol"], rtol=0
    )


@pytest.mark.network
def test_published_weights_fill_the_published_masks(reference):
    expected = json.loads((reference / "ModernBERT-base" / "expected.json").read_text())
    name = expected["model"]
    tokenizer = modernbert_mini.Tokenizer.from_pretrained(name)
    for case in expected["fill_mask"]:
        model = ours("ModernBertForMaskedLM").from_pretrained(name, dtype=case["dtype"])
        answers = modernbert_mini.FillMask(model, tokenizer)(case["text"], top_k=5)
        assert [answer["token_str"].strip() for answer in answers] == case["top5"]
        for answer, score in zip(answers, case.get("scores", []), strict=False):
            assert answer["score"] == pytest.approx(score, rel=case["score_rtol"])
