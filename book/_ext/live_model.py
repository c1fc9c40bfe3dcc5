"""The live model of the pages: writes `mini` as scripts, and loads them where a page shows it.

A page opened from disk may run scripts beside it, but may not fetch files. So the build puts the
checkpoint into scripts: the weights as base64 of the safetensors file, in parts, so that a
progress bar can tell how far they are. Nothing of it is committed; it follows `mini`.
"""

import hashlib
import json
from base64 import b64encode
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from modernbert_mini.sources import Source

PART = 3 * 2**18  # bytes of a part; base64 turns 3 bytes into 4 letters, with nothing left over
CODE = ("mini/about.js", "tokenizer.js", "model.js", "widget.js")
MARK = 'class="live-model"'

# What the scripts take for granted. Where a new `mini` differs, the build says so.
CONFIG = {
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "tie_word_embeddings": True,
}
TOKENIZER = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "model": {"type": "BPE", "byte_fallback": False, "ignore_merges": False},
}


def check(found: dict, expected: dict, file: str) -> None:
    """Refuse a checkpoint that the scripts cannot run.

    Raises:
        ExtensionError: naming the file and what differs.
    """
    for key, value in expected.items():
        if isinstance(value, dict):
            check(found.get(key) or {}, value, f"{file}, {key}")
        elif found.get(key) != value:
            raise ExtensionError(
                f"{file}: {key} is {found.get(key)!r}; book/_static/live knows {value!r} alone"
            )


def scripts(source: Source) -> dict[str, str]:
    """The checkpoint as scripts: their text by file name.

    Each one fills in a field of the global ``liveMini``, which ``about.js`` makes.
    """
    config = json.loads(source.require("config.json").read_text("utf-8"))
    tokenizer = json.loads(source.require("tokenizer.json").read_text("utf-8"))
    check(config, CONFIG, "config.json")
    check(tokenizer, TOKENIZER, "tokenizer.json")
    weights = float32(source.require("model.safetensors"))
    parts = [weights[i : i + PART] for i in range(0, len(weights), PART)]
    files = {"tokenizer.js": f"liveMini.tokenizer = {parsed(tokenizer)};\n"}
    for i, part in enumerate(parts):
        files[f"weights-{i}.js"] = f'liveMini.weights[{i}] = "{b64encode(part).decode()}";\n'
    about = {
        # Part of each address, so that no cache mixes two checkpoints.
        "version": hashlib.sha256("".join(files.values()).encode()).hexdigest()[:12],
        "config": config,
        "bytes": len(weights),
        "part": PART,
        "parts": len(parts),
        "megabytes": round(sum(map(len, files.values())) / 1e6),
        "weights": [],
    }
    return {"about.js": f"const liveMini = {parsed(about)};\n"} | files


def float32(path: Path) -> bytes:
    """A safetensors file with every tensor in float32; the file itself, where they are."""
    tensors = load_file(path)
    if all(tensor.dtype == torch.float32 for tensor in tensors.values()):
        return path.read_bytes()
    return save({name: tensor.float() for name, tensor in tensors.items()})


def parsed(value: dict) -> str:
    """A JavaScript expression for a value; in a literal, a key like `__proto__` would be lost."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"JSON.parse({json.dumps(text, ensure_ascii=False)})"


def write(app: Sphinx) -> None:
    """Write the scripts beside the pages."""
    if app.builder.format != "html":
        return
    folder = Path(app.outdir) / "_static" / "live" / "mini"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, text in scripts(Source("mini")).items():
        (folder / name).write_text(text, encoding="utf-8")


def load(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Let a page that shows the model load its code, and no other page."""
    if MARK in context.get("body", ""):
        app.add_css_file("live/live.css")
        for name in CODE:
            app.add_js_file(f"live/{name}", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write)
    app.connect("html-page-context", load)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
