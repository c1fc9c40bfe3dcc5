"""Run every chapter and record what it costs: seconds, peak memory, megabytes fetched.

    python tests/tools/costs.py [03_rope …]     measure all chapters, or these
    python tests/tools/costs.py --readme        only write the README's tables anew

Writes `modernbert_mini/recorded/costs.json`, which the cost card of each chapter shows, and the
README's tables: what chapters cost, and how `mini` scores, from what its training recorded.
Each notebook runs alone, in a fresh kernel, with an empty Hub cache, so that "fetched" is what
a first reader downloads.
"""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import torch
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "modernbert_mini" / "mini" / "training.json"
RECORD = ROOT / "modernbert_mini" / "recorded" / "costs.json"
# The kernel's own peak, and that of the processes that it started; kilobytes but on macOS.
PEAK = """\
import resource, sys
print(sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF,
      resource.RUSAGE_CHILDREN)) / (1024 if sys.platform != "darwin" else 1024**2))"""


def cpu() -> str:
    """The processor's name, how many of its cores torch uses, and how many there are."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (line := re.search(r"model name\s*: (.+)", info.read_text())):
        name = line[1]
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {torch.get_num_threads()} of {count} cores"


def commit() -> str:
    """The commit that was measured; "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "none"


def measure(notebook: Path) -> dict[str, object]:
    """Execute a notebook in a fresh kernel and say what that took."""
    book = nbformat.read(notebook, as_version=4)
    book.cells.append(nbformat.v4.new_code_cell(PEAK))
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_HOME": cache}
        client = NotebookClient(
            book,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(notebook.parent)}},
        )
        start = time.perf_counter()
        client.execute(env=environment)
        seconds = time.perf_counter() - start
        fetched = sum(
            path.stat().st_size
            for path in Path(cache).rglob("*")
            if path.is_file() and not path.is_symlink()
        )
    return {
        "seconds": round(seconds, 1),
        "peak_ram_mb": round(float(book.cells[-1]["outputs"][0]["text"])),
        "fetched_mb": round(fetched / 1e6, 1),
        "hub": "offline" if os.environ.get("HF_HUB_OFFLINE") == "1" else "asked",
        "cpu": cpu(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def costs_table(costs: dict[str, dict]) -> str:
    """What each chapter costs."""
    if not costs:
        return "Not measured yet."
    rows = ["| chapter | seconds | peak memory | fetched |", "|---|--:|--:|--:|"]
    for name, cost in sorted(costs.items()):
        rows.append(
            f"| `{name}` | {cost['seconds']:.0f} | {cost['peak_ram_mb']:,.0f} MB "
            f"| {cost['fetched_mb']:.0f} MB |"
        )
    machines = {f"{c['cpu']}, torch {c['torch']}, {c['date']}" for c in costs.values()}
    return "\n".join([*rows, "", f"Measured on {'; '.join(sorted(machines))}, by `make costs`."])


def scores_table(training: dict) -> str:
    """How `mini` scores on text that it was not trained on."""
    rows = ["| on held-out text | loss per hidden token (nats) | right at once |", "|---|--:|--:|"]
    for name, key in (("`mini`", "held_out"), ("word frequencies alone", "unigram")):
        score = training[key]["all"]
        rows.append(f"| {name} | {score['loss']:.2f} | {score['top1']:.0%} |")
    count = training["held_out"]["all"]["positions"]
    return "\n".join(
        [*rows, "", f"{count:,} hidden tokens; `mini` has {training['parameters']:,} parameters."]
    )


def fill(page: str) -> str:
    """Put the tables between the README's marks."""
    tables = {
        "costs": costs_table(json.loads(RECORD.read_text())),
        "scores": scores_table(json.loads(TRAINING.read_text())),
    }
    for name, text in tables.items():
        between = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        page = re.sub(between, rf"\g<1>{text}\n\g<2>", page, flags=re.S)
    return page


def main(names: list[str]) -> int:
    costs = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    costs = {n.stem: costs[n.stem] for n in notebooks if n.stem in costs}
    for notebook in notebooks:
        if not names or notebook.stem in names:
            costs[notebook.stem] = measure(notebook)
            print(notebook.stem, costs[notebook.stem], flush=True)
    RECORD.write_text(json.dumps(costs, indent=2, sort_keys=True) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text("utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
