"""A run that is killed goes on to the same weights, bit for bit; killed for real, by SIGKILL."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not sys.platform.startswith("linux"),
    reason="forks processes and kills them, as Linux does",
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_to_the_same_weights():
    """At every kind of change to disk and weights, within a save too, and at random moments."""
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, script, "8"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    for kind in ("rename", "sync", "step", "update", "evaluation", "log", "half a checkpoint"):
        assert kills[kind] >= 2, kind
    assert kills["any moment"] == 8


RECIPE = """
folder = "{folder}"
training_tokens = 30_720
warmup_tokens = 512
decay_tokens = 4096
batch_tokens = 512
max_sequence_length = 64
vocab_size = 400
held_out_percent = 10
log_every = 1
checkpoint_every = 20
evaluate_every = 1000

[corpora]
"{text}" = 1

[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
embedding_dropout = 0.1
"""


@pytest.mark.slow
def test_the_command_is_killed_and_resumed(tmp_path):
    text = tmp_path / "text.jsonl"
    lines = (json.dumps({"text": f"the cat sat on mat {n} " * (n % 9 + 1)}) for n in range(300))
    text.write_text("\n".join(lines))

    def command(name: str, *more: str) -> subprocess.Popen:
        recipe = tmp_path / f"{name}.toml"
        folder = (tmp_path / name).as_posix()
        recipe.write_text(RECIPE.format(folder=folder, text=text.as_posix()))
        arguments = [sys.executable, "-m", "modernbert_mini", "pretrain", "--config", recipe, *more]
        return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)

    whole, killed = command("whole"), command("killed")
    log = tmp_path / "killed" / "log.jsonl"
    for _ in range(6000):  # until it is some way past a checkpoint
        if log.exists() and '"step": 25' in log.read_text():
            break
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert '"event": "end"' not in log.read_text()
    resumed = command("killed", "--resume")
    for process in (whole, resumed):
        assert process.wait() == 0, process.communicate()[1]
    weights = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    starts = [json.loads(line) for line in log.read_text().splitlines() if '"start"' in line]
    first, second = (line["resumed_at"]["step"] for line in starts)
    assert first == 0 and second in (20, 40)  # the last checkpoint before the kill
