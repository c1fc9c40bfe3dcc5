"""Train in worlds of one, two and four processes for real, and print what came of it as JSON.

Run by test_distributed.py as a script of its own, since it forks: a process that is forked has
torch imported already, and starts at once. The processes meet as those of ``torchrun`` do, through
a store that their parent holds.
"""

import builtins
import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

import forked
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before the fork, so that it is imported once
from torch.distributed.tensor import DTensor

from modernbert_mini import ConfigError, distributed, pretraining

# No size is a multiple of 4, so slices are uneven, and some are empty.
TINY = {
    "hidden_size": 22,
    "intermediate_size": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "local_attention": 8,
    "embedding_dropout": 0.1,  # so that chance matters
}
STEPS = 6
STANDSTILL = 300  # seconds, after which a process says where it stands, and ends


def recipe(folder: Path, parallel: str) -> pretraining.PretrainingConfig:
    """Two steps of four streams, four of eight; clipped gradients, three evaluations."""
    return pretraining.PretrainingConfig(
        folder=str(folder),
        corpora={"letters": 1},
        model=TINY,
        vocab_size=290,
        held_out_percent=10,
        max_sequence_length=32,
        batch_warmup_from=256,
        batch_warmup_tokens=512,
        batch_tokens=512,
        microbatch_tokens=64,
        training_tokens=2 * 256 + 4 * 512,
        warmup_tokens=256,
        decay_tokens=1536,
        learning_rate=1e-2,
        clip_norm=1.0,
        average=1,
        log_every=1,
        evaluate_every=2,
        checkpoint_every=2,
        parallel=parallel,
        device="cpu",
    )


class Stopped(Exception):
    """A run that is not to go on."""


def train(folder: Path, parallel: str, until: int = STEPS) -> dict:
    """Train, or go on, up to a step; what this process then holds, or the error that it met."""
    step = pretraining.Run.step

    def stopping(run):
        if run.steps == until:
            raise Stopped
        return step(run)

    pretraining.Run.step = stopping
    try:
        run = pretraining.pretrain(recipe(folder, parallel), resume=True)
    except Stopped:
        return {}
    except pretraining.TrainingError as error:
        return {"error": str(error)}
    held = [p.detach() for p in run.model.parameters()]
    held += [x for s in run.optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in held]
    return {
        "numbers": sum(x.numel() for x in held),
        "local_numbers": sum(x.numel() for x in local),
        "module": type(run.module).__name__,
    }


def dying(folder: Path, parallel: str) -> dict:
    """The same, but the second process is killed in its fourth step."""
    draw = pretraining.Run.mask

    def mask(run, stream, number):
        if run.steps == 3 and run.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(run, stream, number)

    pretraining.Run.mask = mask
    return train(folder, parallel)


def running_away(folder: Path, parallel: str) -> dict:
    """The same, but in the fourth step the weights of the second process are no numbers."""
    draw = pretraining.Run.mask

    def mask(run, stream, number):
        if run.steps == 3 and run.world.rank == 1:
            with torch.no_grad():
                run.model.decoder.bias.fill_(float("nan"))
        return draw(run, stream, number)

    pretraining.Run.mask = mask
    return train(folder, parallel)


def refused(folder: Path, parallel: str) -> dict:
    """Begin anew where a run is: the first process sees it, while the others wait for data."""
    try:
        pretraining.pretrain(recipe(folder, parallel))
    except (ConfigError, distributed.LostProcessError) as error:
        return {"error": str(error)}
    return {}


def measures(folder: Path, parallel: str) -> dict:
    """What a world does with numbers, and how it deals out what is uneven."""
    with distributed.joined("cpu", parallel) as world:
        turns = [[batch, counts] for batch, counts in world.turns("abcde")]
        total = world.sum(world.rank + 1)
        world.wait()
        return {"turns": turns, "sum": total, "kind": type(total).__name__}


def together(size: int, work) -> list[dict | None]:
    """What ``work`` returns in each of so many processes; None where one was killed."""
    gate, opened = os.pipe()
    children = []
    for rank in range(size):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            code = 1
            try:
                faulthandler.dump_traceback_later(STANDSTILL, exit=True)
                os.close(opened)
                os.environ |= {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": os.read(gate, 5).decode(),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(size),
                }
                os.write(write, json.dumps(work()).encode())
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)
        children.append((child, read))
    # The store has a thread that looks addresses up. A process forked meanwhile would inherit the
    # resolver's lock and wait for it forever, so all are forked before the store is there.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(opened, f"{store.port:05d}".encode() * size)
    os.close(opened)
    os.close(gate)
    found = []
    for child, read in children:
        with builtins.open(read, "rb") as pipe:
            said = pipe.read().decode()
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a process failed"
        found.append(json.loads(said) if said else None)
    return found


def curve(folder: Path) -> dict:
    """What the log says last of each step, and the weights, flattened."""
    log = pretraining.read_log(folder)
    train = {line["step"]: line for line in log if line["event"] == "train"}
    scores = {line["step"]: line for line in log if line["event"] == "evaluation"}
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    moments = [x for name in state["model"] for x in (state["optimizer"][name]["exp_avg_sq"],)]
    kept = torch.load(min((folder / "decay").glob("*.pt")), weights_only=True)
    return {
        "loss": [train[step]["loss"] for step in sorted(train)],
        "norm": [train[step]["gradient_norm"] for step in sorted(train)],
        "held_out": [scores[step]["held_out"]["all"] for step in sorted(scores)],
        "weights": torch.cat([x.flatten() for x in state["model"].values()]).tolist(),
        "moments": torch.cat([x.flatten() for x in moments]).tolist(),
        "kept": [kept["step"], sum(x.double().sum().item() for x in kept["model"].values())],
        "processes": [line["machine"]["processes"] for line in log if line["event"] == "start"],
        "resumed_at": [line["resumed_at"]["step"] for line in log if line["event"] == "start"],
    }


def main(root: Path) -> dict:
    def fresh(name: str, like: str = "alone") -> Path:
        """A folder with the data of the first run, or with all of another one."""
        ignore = shutil.ignore_patterns("log*", "check*", "decay", "loss*")
        shutil.copytree(root / like, root / name, ignore=ignore if like == "alone" else None)
        return root / name

    found = {"alone": together(1, partial(train, root / "alone", "ddp"))}
    for parallel, size in (("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4)):
        name = f"{parallel} {size}"
        found[name] = together(size, partial(train, fresh(name), parallel))
    # Four processes save at step 2 and stop after 3; others go on.
    together(4, partial(train, fresh("stopped"), "fsdp2", until=3))
    for parallel, size in (("fsdp2", 2), ("ddp", 1)):
        name = f"resumed {parallel} {size}"
        found[name] = together(size, partial(train, fresh(name, "stopped"), parallel))
    found["killed"] = together(2, partial(dying, fresh("killed"), "ddp"))
    together(2, partial(train, root / "killed", "ddp"))
    found["nan"] = together(2, partial(running_away, fresh("nan"), "fsdp2"))
    refusals = together(2, partial(refused, root / "killed", "ddp"))
    curves = {name: curve(root / name) for name in found if name != "nan"}
    found["refused"] = refusals
    found["measures"] = together(2, partial(measures, root, "ddp"))
    return {"found": found, "curves": curves}


if __name__ == "__main__":
    forked.prepare()
    with tempfile.TemporaryDirectory() as place:
        result = main(Path(place))
    Path(sys.argv[1]).write_text(json.dumps(result))
