"""What running the chapters costs, in the package's record and in the README.

    python tests/tools/costs.py    write the README's tables anew

`make costs` runs the chapters, writes `modernbert_mini/recorded/costs.json`, which the cost card of
each chapter shows, and the README's tables: what chapters cost, and how `mini` scores, from what
its training recorded; and how fast the package is, from `modernbert_mini/recorded/speed.json`,
which `modernbert-mini benchmark --json` writes.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from modernbert_mini import benchmark, plots
from modernbert_mini.pretraining import processor_name

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "modernbert_mini" / "mini" / "training.json"
RECORD = ROOT / "modernbert_mini" / "recorded" / "costs.json"


def cpu() -> str:
    """The processor's name, how many of its cores torch uses, and how many there are."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor_name()}, {torch.get_num_threads()} of {count} cores"


def commit() -> str:
    """The commit that was measured; "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "none"


def scores_table(training: dict) -> str:
    """How `mini` scores on text that it was not trained on, and on everyday facts."""
    rows = [
        "| on held-out text, and on everyday facts | loss per hidden token (nats) | right at once "
        "| facts right at once | among the five best |",
        "|---|--:|--:|--:|--:|",
    ]
    lines = [("`mini`", training["held_out"], training["cloze"])]
    if first := (training["began_with"] or {}).get("scores"):
        lines.append(("the first `mini`", first["held_out"], first["cloze"]))
    lines.append(("word frequencies alone", training["unigram"], training["unigram_cloze"]))
    for name, held_out, cloze in lines:
        score = held_out["all"]
        rows.append(
            f"| {name} | {score['loss']:.2f} | {score['top1']:.0%} | {cloze['top1']:.0%} "
            f"| {cloze['top5']:.0%} |"
        )
    count = training["held_out"]["all"]["positions"]
    facts = training["cloze"]["facts"]
    return "\n".join(
        [
            *rows,
            "",
            f"{count:,} hidden tokens; {facts} facts such as “The capital of France is [MASK].”; "
            f"`mini` has {training['parameters']:,} parameters.",
        ]
    )


def fill(page: str) -> str:
    """Put the tables between the README's marks."""
    tables = {
        "costs": plots.cost_table(json.loads(RECORD.read_text("utf-8"))),
        "scores": scores_table(json.loads(TRAINING.read_text("utf-8"))),
        "speed": benchmark.speed_table(benchmark.recorded("speed")),
    }
    for name, text in tables.items():
        between = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        page = re.sub(between, rf"\g<1>{text}\n\g<2>", page, flags=re.S)
    return page


def write_readme() -> None:
    """Put what is recorded into the README's tables."""
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_readme())
