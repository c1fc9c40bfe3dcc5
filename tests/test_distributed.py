"""Several processes train as one does: for real, over gloo, two and four of them."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch

from modernbert_mini import ConfigError, cli, distributed, pretraining, recipe
from modernbert_mini.distributed import Group, World, share_streams

forks = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="forks processes that have torch loaded"
)
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "CUDA_VISIBLE_DEVICES": "",
}
WORLDS = ["ddp 2", "ddp 4", "fsdp2 2", "fsdp2 4"]
# Of loss and gradient norm, as a share. float32 rounds at 6e-8; sums in another order differ by a
# few of that, and each step carries it on.
TOLERANCE = 1e-6


# --- who takes what -----------------------------------------------------------------------


def test_every_stream_is_dealt_out_once_and_as_many_to_each():
    tokens = [31, 7, 90, 12, 44, 44, 3, 61]
    for processes in (1, 2, 4, 8):
        shares = share_streams(tokens, processes)
        assert sorted(i for share in shares for i in share) == list(range(8))
        assert {len(share) for share in shares} == {8 // processes}
        assert all(share == sorted(share) for share in shares)
    assert share_streams(tokens, 1) == [[*range(8)]]  # in order: one process is as before


def test_shares_are_balanced_by_tokens():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        tokens = torch.randint(1, 1000, (32,), generator=generator).tolist()
        load = [sum(tokens[i] for i in share) for share in share_streams(tokens, 4)]
        in_turn = [sum(tokens[i::4]) for i in range(4)]
        assert max(load) - min(load) < (max(in_turn) - min(in_turn)) / 4


# --- real processes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """What tests/distributed_runs.py finds out."""
    target = tmp_path_factory.mktemp("runs") / "runs.json"
    script = Path(__file__).with_name("distributed_runs.py")
    command = [sys.executable, script, target]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text())


def assert_same_curve(one: dict, other: dict) -> None:
    for name in ("loss", "norm"):
        assert len(one[name]) == len(other[name]) == 6
        assert one[name] == pytest.approx(other[name], rel=TOLERANCE), name
    assert len(one["held_out"]) == 3
    for a, b in zip(one["held_out"], other["held_out"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=TOLERANCE)
        assert a["positions"] == b["positions"] > 30
    for name in ("weights", "moments"):
        torch.testing.assert_close(
            torch.tensor(one[name]), torch.tensor(other[name]), rtol=0.0, atol=1e-5
        )
    assert one["kept"] == pytest.approx(other["kept"], rel=TOLERANCE)


@forks
@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_several_processes_have_the_loss_curve_of_one(runs, world):
    alone, found = runs["curves"]["alone"], runs["curves"][world]
    assert_same_curve(found, alone)
    assert alone["processes"] == [1] and found["processes"] == [int(world[-1])]
    assert alone["loss"][-1] < alone["loss"][0] - 0.1


@forks
@pytest.mark.slow
def test_replicas_hold_everything_and_shards_a_slice(runs):
    for world in WORLDS:
        held = runs["found"][world]
        numbers = held[0]["numbers"]
        local = [process["local_numbers"] for process in held]
        if world.startswith("ddp"):
            assert local == [numbers] * len(held)
            assert {process["module"] for process in held} == {"DistributedDataParallel"}
        else:
            assert sum(local) == numbers and max(local) < 1.1 * numbers / len(held)


@forks
@pytest.mark.slow
@pytest.mark.parametrize("world", ["resumed fsdp2 2", "resumed ddp 1"])
def test_what_four_have_saved_two_or_one_go_on_from(runs, world):
    found = runs["curves"][world]
    assert found["processes"] == [4, int(world[-1])] and found["resumed_at"] == [0, 2]
    assert_same_curve(found, runs["curves"]["alone"])


@forks
@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on_bit_for_bit(runs):
    first, second = runs["found"]["killed"]
    assert second is None  # it is the one that was killed
    assert "Process 0 of 2 has lost another one" in first["error"]
    assert "The checkpoint of step 2" in first["error"]
    resumed, whole = runs["curves"]["killed"], runs["curves"]["ddp 2"]
    assert resumed["resumed_at"] == [0, 2]
    for name in ("loss", "norm", "weights", "moments"):
        assert resumed[name] == whole[name], name


@forks
@pytest.mark.slow
def test_no_process_goes_on_where_another_ones_loss_is_no_number(runs):
    for process in runs["found"]["nan"]:
        assert "step 4: the loss is nan" in process["error"]
        assert "The checkpoint of step 2" in process["error"]


@forks
@pytest.mark.slow
def test_where_the_first_process_gives_up_the_others_do_not_wait(runs):
    first, second = runs["found"]["refused"]
    assert "a run in this folder" in first["error"]
    assert "Process 1 of 2 has lost another one" in second["error"]


@forks
@pytest.mark.slow
def test_a_world_adds_up_and_takes_turns(runs):
    first, second = runs["found"]["measures"]
    assert first["turns"] == [["a", True], ["c", True], ["e", True]]
    assert second["turns"] == [["b", True], ["d", True], ["e", False]]
    assert first["sum"] == second["sum"] == 3 and first["kind"] == "int"


# --- torchrun -----------------------------------------------------------------------------

RECIPE = """
folder = "{folder}"
training_tokens = 12_800
warmup_tokens = 512
decay_tokens = 1024
batch_tokens = 512
microbatch_tokens = 256
max_sequence_length = 64
vocab_size = 300
held_out_percent = 10
log_every = 1
checkpoint_every = 5
evaluate_every = 1000
device = "cpu"

[corpora]
"{text}" = 1

[model]
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 2
num_attention_heads = 1
"""


def launch(config: Path, *more: str, restarts: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", str(restarts), "-m", "modernbert_mini"]
    command += ["pretrain", "--config", str(config), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, env=ENVIRONMENT, **pipes)


def kill_second(process: subprocess.Popen, log: Path, step: int) -> list[psutil.Process]:
    """Kill the process of rank 1 by SIGKILL once the log is past a step; all that were there."""
    until = time.monotonic() + 600
    while f'"step": {step}' not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "the run does not get on"
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children()
    (second,) = (worker for worker in workers if worker.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    return workers


@forks
@pytest.mark.slow
def test_torchrun_ends_a_run_that_has_lost_a_process_and_resumes_it(tmp_path):
    """Killed once: it ends. Killed when it may restart: torchrun resumes it by itself."""
    text = tmp_path / "text.jsonl"
    lines = (json.dumps({"text": f"the cat sat on mat {n} " * (n % 9 + 1)}) for n in range(300))
    text.write_text("\n".join(lines))
    config, folder = tmp_path / "recipe.toml", tmp_path / "run"
    config.write_text(RECIPE.format(folder=folder.as_posix(), text=text.as_posix()))
    log = folder / "log.jsonl"

    first = launch(config)
    workers = kill_second(first, log, step=7)
    said = first.communicate(timeout=300)[0]
    assert first.returncode == 1
    assert not any(worker.is_running() for worker in workers), "a process was left behind"
    assert '"event": "end"' not in log.read_text() and "Signal 9" in said

    again = launch(config, "--resume", "--parallel", "fsdp2", restarts=1)
    kill_second(again, log, step=17)
    said = again.communicate(timeout=600)[0]
    assert again.returncode == 0, said
    assert said.count("held-out loss") == 1, "the first process alone reports"
    starts = [line for line in pretraining.read_log(folder) if line["event"] == "start"]
    resumed_at = [line["resumed_at"]["step"] for line in starts]
    assert resumed_at[0] == 0 and all(step % 5 == 0 for step in resumed_at)
    assert all(a < b for a, b in pairwise(resumed_at)) and len(starts) == 3
    assert pretraining.read_log(folder)[-1]["event"] == "end"
    assert (folder / "model" / "model.safetensors").exists()


# --- worlds in this process ---------------------------------------------------------------


def test_one_process_trains_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.joined("cpu", "fsdp2") as world:
        assert type(world) is World and (world.rank, world.size) == (0, 1)
    assert world.lost(RuntimeError("gloo: connection closed")) is None
    assert list(world.turns("ab")) == [("a", True), ("b", True)]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="process 2 of this machine.*--nproc-per-node"):
        Group("cuda")


def test_an_unknown_engine_is_refused():
    with pytest.raises(ConfigError, match="parallel 'zero'.*ddp, fsdp2"):
        pretraining.PretrainingConfig("x", {"a": 1}, parallel="zero")
    assert tuple(distributed.PARALLEL) == recipe.ENGINES


def test_parallel_says_where_it_changes_nothing(tmp_path, capsys):
    config = tmp_path / "recipe.toml"
    config.write_text(RECIPE.format(folder=(tmp_path / "run").as_posix(), text="no/such/text"))
    assert cli.main(["pretrain", "--config", str(config), "--parallel", "fsdp2"]) == 2
    assert "--parallel changes nothing" in capsys.readouterr().err


def test_processes_that_cannot_see_the_folder_say_so(tmp_path, monkeypatch):
    """The second of two machines that share no disk: the first one's data is not there."""

    class Second(World):
        rank, size = 1, 2

    config = pretraining.PretrainingConfig(str(tmp_path / "run"), {"python-docs": 1}, device="cpu")
    with pytest.raises(ConfigError, match="no data for process 1.*all machines can reach it"):
        pretraining.pretrain(config, world=Second("cpu"))


# --- arithmetic ---------------------------------------------------------------------------


def test_bytes_of_each_stage():
    assert distributed.state_bytes(1000) == 16_000
    assert [distributed.state_bytes(1000, 4, stage) for stage in range(4)] == [
        16_000,
        4000 + 4000 + 2000,
        4000 + 1000 + 2000,
        4000,
    ]
    assert distributed.state_bytes(10, 4, 3) == 3 * 16  # the largest slice


def test_utilisation_is_a_share_of_the_peak():
    assert distributed.model_flops_utilisation(80.0, 2.0, 4, 20.0) == 0.5
