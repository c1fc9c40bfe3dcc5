"""From a folder of text to predictions with the commands of chapter 12, in the package's record.

    python tests/tools/own_text.py

Starts in an empty folder, as a newcomer does. The text stands for the reader's own: docstrings of
three packages that are installed wherever this one is, which `mini` has not read. Then come the
commands, as they stand in the record: pre-train on the text, predict a hidden word, fine-tune on
labelled rows and predict labels; and the same fine-tuning from `mini` itself, to compare. The rows
are of other files than the text; the names of the packages are taken out. Writes
`modernbert_mini/recorded/own_text.json`: ten minutes on one core.
"""

import csv
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from modernbert_mini import data
from modernbert_mini.pretraining import processor_name, utc_now

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "modernbert_mini" / "recorded" / "own_text.json"
PACKAGES = ("numpy", "torch", "matplotlib")
NAMES = re.compile(r"\b(numpy|np|torch|matplotlib|mpl|plt|pyplot|pytorch)\b", re.I)
ROWS = 150  # of each package, a third of them to test on
QUESTION = "Returns a [MASK] with the same shape as the input."
TUNE = "fine-tune sequence-classification rows.csv --test test.csv --epochs 2"
COMMANDS = (
    "pretrain --config own-text --corpus notes --folder run",
    f'fill-mask "{QUESTION}" --model run/model --top-k 3',
    f"{TUNE} --model run/model --baseline --output labels --predict new.csv",
    f'fill-mask "{QUESTION}" --top-k 3',
    f"{TUNE} --predict new.csv",
)


def docstrings(package: str) -> dict[str, list[str]]:
    """Docstrings of a package by the part of the work that their file belongs to."""
    root = Path(metadata.distribution(package).locate_file(package))
    parts: dict[str, list[str]] = {"notes": [], "rows": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "test" in name:
            continue
        draw = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
        part = "notes" if draw < 5 else "rows" if draw < 8 else "test"
        for text in data._docstrings(path):
            text = NAMES.sub("package", text)
            if text not in parts[part]:
                parts[part].append(text)
    return parts


def write_files(folder: Path) -> dict:
    """What the reader brings: a folder of text, labelled rows, and rows to predict."""
    (folder / "notes").mkdir()
    found = {package: docstrings(package) for package in PACKAGES}
    for package, parts in found.items():
        (folder / "notes" / f"{package}.txt").write_text("\n\n".join(parts["notes"]), "utf-8")
    counts = {}
    for part, most in (("rows", ROWS * 2 // 3), ("test", ROWS // 3)):
        rows = [(text[:600], p) for p in PACKAGES for text in spread(found[p][part], most)]
        write_csv(folder / f"{part}.csv", ("text", "label"), rows)
        counts[part] = len(rows)
    new = [(found[p]["test"][-1][:200],) for p in PACKAGES]
    write_csv(folder / "new.csv", ("text",), new)
    size = sum(path.stat().st_size for path in (folder / "notes").iterdir())
    return counts | {"text_bytes": size, "new": [text for (text,) in new]}


def spread(texts: list[str], most: int) -> list[str]:
    """At most so many of some texts, evenly spread over them."""
    return [texts[i * len(texts) // most] for i in range(most)] if len(texts) > most else texts


def write_csv(path: Path, header: tuple, rows: list[tuple]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def main() -> None:
    """Run the commands one after the other and write down what they say."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        brought, steps = write_files(folder), []
        for command in COMMANDS:
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "modernbert_mini", *shlex.split(command)],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            print(command, done.stdout, done.stderr, sep="\n", flush=True)
            done.check_returncode()
            said = done.stdout.splitlines()
            said += [
                line for line in done.stderr.splitlines() if line.startswith("modernbert-mini")
            ]
            seconds = round(time.perf_counter() - began)
            output = [line.replace(f"{folder}{os.sep}", "") for line in said if line]
            steps.append(
                {"command": f"modernbert-mini {command}", "seconds": seconds, "output": output}
            )
        log = [json.loads(line) for line in (folder / "run" / "log.jsonl").open(encoding="utf-8")]
        evaluations = [line for line in log if line["event"] == "evaluation"]
        start = next(line for line in log if line["event"] == "start")
    record = {
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "brought": brought,
        "steps": steps,
        "tokens": evaluations[-1]["tokens"],
        "held_out": [[e["tokens"], round(e["held_out"]["all"]["loss"], 4)] for e in evaluations],
        "unigram_loss": round(start["unigram"]["all"]["loss"], 4),
        "machine": start["machine"] | {"processor": processor_name()},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "date": utc_now()[:10],
    }
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
