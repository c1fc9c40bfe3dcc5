"""Kill pre-training runs for real, and see whether each goes on to the same weights, bit for bit.

Run by test_pretraining_kill.py as a script of its own, since it forks. Its argument is how often
to kill at a random moment. It prints a JSON object: how many runs were killed at each kind of
moment. It stops with an AssertionError at the first run that ends up elsewhere, or whose checkpoint
does not load after a kill.
"""

import builtins
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import forked
import torch

from modernbert_mini import atomic, pretraining

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "local_attention": 8,
    "embedding_dropout": 0.1,  # so that chance matters
}
STEPS = 12


def recipe(folder: Path) -> pretraining.PretrainingConfig:
    """Two phases of six steps, a growing batch, a checkpoint every three steps."""
    phase = {"training_tokens": 6 * 256, "batch_tokens": 256, "microbatch_tokens": 128}
    first = {"warmup_tokens": 256, "batch_warmup_from": 128, "batch_warmup_tokens": 256}
    second = {"max_sequence_length": 64, "global_rope_theta": 160_000, "decay_tokens": 1024}
    return pretraining.PretrainingConfig(
        folder=str(folder),
        corpora={"one": 1, "two": 2},
        model=TINY,
        vocab_size=290,
        held_out_percent=10,
        max_sequence_length=32,
        learning_rate=1e-2,
        average=1,
        log_every=1,
        evaluate_every=2,
        checkpoint_every=3,
        phases=[phase | first, phase | second],
    )


def weights(folder: Path) -> str:
    """A hash of every weight and every moment of the optimiser in a finished run's checkpoint."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    digest = hashlib.sha256()
    for name, tensor in state["model"].items():
        moments = state["optimizer"][name]
        for x in (tensor, moments["exp_avg"], moments["exp_avg_sq"]):
            digest.update(name.encode() + x.numpy().tobytes())
    return digest.hexdigest()


def train(folder: Path) -> None:
    """What the command does, resuming whatever is there."""
    pretraining.pretrain(recipe(folder), resume=True)


def mortal_run(folder: Path, moment: int) -> None:
    """The same, dying at a moment."""
    die_at(moment)
    train(folder)


class Counted:
    """Counts calls, and kills this process just before the n-th."""

    def __init__(self, fatal: int) -> None:
        self.fatal, self.count, self.kinds = fatal, 0, []

    def mortal(self, function, kind):
        def call(*args, **kwargs):
            self.count += 1
            self.kinds.append(kind)
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call


def die_at(moment: int) -> Counted:
    """Patch this process so that it dies before its n-th change to the disk or to the weights."""
    counted = Counted(moment)
    for module, name, kind in (
        (os, "replace", "rename"),
        (os, "fsync", "sync"),
        (pretraining.Run, "step", "step"),
        (pretraining.AdamW, "update", "update"),
        (pretraining, "evaluate", "evaluation"),
        (pretraining.Log, "write", "log"),
        (torch, "save", "save"),
    ):
        setattr(module, name, counted.mortal(getattr(module, name), kind))
    whole = torch.save

    def in_pieces(state, file):
        """Write a checkpoint a piece at a time, as a large one is, and die between two."""
        buffer = io.BytesIO()
        whole(state, buffer)
        raw = buffer.getvalue()
        for start in range(0, len(raw), len(raw) // 3):
            counted.mortal(file.write, "half a checkpoint")(raw[start : start + len(raw) // 3])
            file.flush()

    torch.save = in_pieces
    return counted


def in_child(work) -> tuple[bool, str]:
    """Run ``work`` in a forked process; whether it was killed, and what it returned."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.write(write, json.dumps(work()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with builtins.open(read, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run itself failed"
    return os.WIFSIGNALED(status), said


def check_after_kill(folder: Path) -> None:
    """The checkpoint, if there is one by now, is whole."""
    if (folder / "checkpoint.pt").exists():
        torch.load(folder / "checkpoint.pt", weights_only=True)
        pretraining.read_log(folder)


def chosen_moments(folder: Path) -> list[tuple[int, str]]:
    """Moments to die at: for each kind of change, some of those that a whole run makes."""

    def rehearse():
        counted = die_at(0)
        train(folder)
        return counted.kinds

    killed, said = in_child(rehearse)
    assert not killed
    kinds = json.loads(said)
    draw, moments = random.Random(0), []
    for kind in dict.fromkeys(kinds):
        of_kind = [i for i, k in enumerate(kinds, start=1) if k == kind]
        some = {of_kind[0], of_kind[-1], *draw.sample(of_kind, min(2, len(of_kind)))}
        moments += [(moment, kind) for moment in sorted(some)]
    return moments


def each_kind(root: Path, expected: str) -> Counter:
    """Kill a run at each of the moments, and let it go on."""
    seen = Counter()
    for moment, kind in chosen_moments(root / "rehearsal"):
        folder = root / "run"
        shutil.rmtree(folder, ignore_errors=True)
        killed, _ = in_child(partial(mortal_run, folder, moment))
        assert killed, (moment, kind)
        check_after_kill(folder)
        killed, _ = in_child(partial(train, folder))
        assert not killed and weights(folder) == expected, (moment, kind)
        assert not [p for p in folder.rglob("*.partial")], "half a file was left"
        seen[kind] += 1
    return seen


def any_moment(root: Path, kills: int, expected: str) -> Counter:
    """Kill runs after a random time, again and again, until each has ended."""
    draw, seen, folder = random.Random(1), Counter(), root / "any"
    while seen["any moment"] < kills:
        child = os.fork()
        if not child:
            train(folder)
            os._exit(0)
        time.sleep(draw.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            seen["any moment"] += 1
            check_after_kill(folder)
        else:
            assert os.WEXITSTATUS(status) == 0 and weights(folder) == expected
            seen["ended"] += 1
            shutil.rmtree(folder)
    train(folder)
    assert weights(folder) == expected
    return seen


if __name__ == "__main__":
    forked.prepare()
    assert atomic.fcntl is not None
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        in_child(lambda: train(root / "whole"))
        expected = weights(root / "whole")
        result = each_kind(root, expected) + any_moment(root, int(sys.argv[1]), expected)
    print(json.dumps(result))
