"""Kill saving processes for real, and look at what each leaves behind.

Run by test_checkpoints.py as a script of its own, since it forks. It prints a JSON object: for
each scenario the number of kills and, of those, how many left the old, the new or no checkpoint.
It stops with an AssertionError at the first folder that mixes two checkpoints.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch

from modernbert_mini import (
    CheckpointError,
    ModernBertConfig,
    ModernBertModel,
    atomic,
    checkpoints,
)

SMALL = {"vocab_size": 7, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 4}
REST = {"num_hidden_layers": 1, "pad_token_id": 0}
# Every call by which a save changes the disk.
CALLS = [
    *((os, name) for name in ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "fsync")),
    (safetensors.torch, "save_file"),
    (checkpoints, "write_json"),
    (atomic, "exchange"),
]


def make_model(mark: int, shape: int = 8) -> ModernBertModel:
    """A model whose weights all are ``mark``, and whose config says so if ``shape`` differs."""
    model = ModernBertModel(ModernBertConfig(**SMALL | {"intermediate_size": shape}, **REST))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float(mark))
    return model


def read(folder: Path) -> str:
    """Which checkpoint a folder holds, as "weights/shape", or "none"; never a mixture."""
    if not folder.exists() or not (folder / "config.json").exists():
        return "none"
    model = ModernBertModel.from_pretrained(folder)
    marks = {float(value) for p in model.parameters() for value in p.flatten()[[0, -1]]}
    assert len(marks) == 1, f"a mixture of {marks}"
    return f"{marks.pop():.0f}/{model.config.intermediate_size}"


def die_at(step: int) -> None:
    """Patch this process so that it dies just before its n-th change to the disk."""
    count = 0

    def mortal(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in CALLS:
        setattr(module, name, mortal(getattr(module, name)))


def in_child(work) -> bool:
    """Run ``work`` in a forked process; whether it was killed."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the save itself failed"
    return os.WIFSIGNALED(status)


PATH_MKDIR = Path.mkdir


def no_exchange(*_):
    raise OSError("no exchange here")


def no_siblings(path, *args, **kwargs):
    if ".saving-" in path.name and path.parent.name != "checkpoint":
        raise PermissionError("the parent folder is not ours")
    PATH_MKDIR(path, *args, **kwargs)


# name -> (old model and its shard size, new model and its shard size, what the child lacks)
SCENARIOS = {
    "new folder": (None, (2, 4, "5GB"), None),
    "same config": ((1, 4, "5GB"), (2, 4, "5GB"), None),
    "other config": ((1, 4, "5GB"), (2, 8, "5GB"), None),
    "shards to one file": ((1, 4, 500), (2, 4, "5GB"), None),
    "one file to shards": ((1, 4, "5GB"), (2, 8, 500), None),
    "other config, no exchange": ((1, 4, "5GB"), (2, 8, "5GB"), "exchange"),
    "shards, no exchange": ((1, 4, 500), (2, 8, 500), "exchange"),
    "same config, no siblings": ((1, 4, "5GB"), (2, 4, "5GB"), "siblings"),
    "other config, no siblings": ((1, 4, "5GB"), (2, 8, "5GB"), "siblings"),
}


def each_step(root: Path, old, new, lacks) -> Counter:
    """Kill a save before each of its changes to the disk, until it lives to its end."""
    seen = Counter()
    for step in range(1, 1000):
        shutil.rmtree(root)
        folder = root / "checkpoint"
        if old:
            make_model(*old[:2]).save_pretrained(folder, max_shard_size=old[2])
            (folder / "notes").mkdir()
            (folder / "notes" / "README.md").write_text("mine")
        before = read(folder)

        def save(step=step, folder=folder):
            if lacks == "exchange":
                atomic.exchange = no_exchange
            if lacks == "siblings":
                Path.mkdir = no_siblings
            die_at(step)
            make_model(*new[:2]).save_pretrained(folder, max_shard_size=new[2])

        killed = in_child(save)
        left = read(folder)
        assert left in (before, f"{new[0]}/{new[1]}", "none"), (step, left)
        assert not old or (folder / "notes" / "README.md").read_text() == "mine"
        if left == "none" and old:
            explains_itself(folder)
        make_model(3).save_pretrained(folder)
        assert read(folder) == "3/8", (step, read(folder))
        assert [path.name for path in root.iterdir()] == ["checkpoint"], list(root.iterdir())
        rest = {path.name for path in folder.iterdir()} - {"notes"}
        assert rest == {"config.json", "model.safetensors"}, rest
        if not killed:
            return seen
        seen["old" if left == before else "none" if left == "none" else "new"] += 1
    raise AssertionError("a save of a thousand steps")


def explains_itself(folder: Path) -> None:
    """The error about a half-moved checkpoint has to name the folder that completes it."""
    try:
        ModernBertModel.from_pretrained(folder)
    except CheckpointError as error:
        assert "interrupted save" in str(error) and ".saving-" in str(error), error
    else:
        raise AssertionError("a folder without config.json loads")


def any_moment(root: Path, kills: int) -> Counter:
    """Kill a process that saves two models in turn, after a random time."""
    shutil.rmtree(root)
    folder = root / "checkpoint"
    models = [make_model(1, 4), make_model(2, 8)]
    models[0].save_pretrained(folder)
    seen = Counter()
    draw = random.Random(0)
    for _ in range(kills):
        child = os.fork()
        if not child:
            while True:
                for model in models:
                    model.save_pretrained(folder)
        time.sleep(draw.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = read(folder)
        assert left in ("1/4", "2/8"), left
        seen[left] += 1
    models[0].save_pretrained(folder)
    assert [p.name for p in root.iterdir()] == ["checkpoint"], list(root.iterdir())
    return seen


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    # Syncing is against power cuts: a killed process loses nothing that the kernel has. It is slow.
    os.fsync = lambda descriptor: None
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "root"
        root.mkdir()
        result = {name: each_step(root, *rest) for name, rest in SCENARIOS.items()}
        result["any moment"] = any_moment(root, int(sys.argv[1]))
    print(json.dumps(result))
