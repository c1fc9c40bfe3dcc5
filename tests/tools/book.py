"""Run every chapter once, measure what it costs, and build the book from what it put out.

`make book` calls it; with `--record`, as `make costs` does, the costs also go to the package and
to the README.

The chapters run in `.cache/book`, a copy of the book: nbmake executes them there and leaves
their outputs in place, and Jupyter Book then only renders. Each cost card shows what that very
run cost. A chapter that outruns its minute stops the build.
"""

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import torch
import yaml

from . import costs

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60  # seconds that a chapter may take on two cores
CARRIED = ("book", "notebooks", "_config.yml", "_toc.yml")

# Two cells around each chapter; what they define starts with an underscore and is theirs alone.
BEFORE = "import time as _time\n\n_start = _time.time()"
AFTER = """\
import json as _json, os as _os, resource as _resource, sys as _sys
from pathlib import Path as _Path

_home = _os.environ.get("HF_HOME", "~/.cache/huggingface")
_fetched = [f.stat() for f in _Path(_home).expanduser().rglob("*")
            if f.is_file() and not f.is_symlink()]
_peak = sum(_resource.getrusage(who).ru_maxrss  # kilobytes, but on macOS
            for who in (_resource.RUSAGE_SELF, _resource.RUSAGE_CHILDREN))
print(_json.dumps({
    "seconds": round(_time.time() - _start, 1),
    "peak_ram_mb": round(_peak / (1024 if _sys.platform != "darwin" else 1024**2)),
    "fetched_mb": round(sum(s.st_size for s in _fetched if s.st_mtime > _start) / 1e6, 1),
}))"""


class BookError(RuntimeError):
    """The book cannot be built; the message says why."""


def stage(root: Path, source: Path) -> None:
    """Copy the book to ``source``, with a measuring cell before and after each chapter."""
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    ignore = shutil.ignore_patterns("_generated", "__pycache__", ".ipynb_checkpoints")
    for name in CARRIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, source / name, ignore=ignore)
        else:
            shutil.copy(root / name, source / name)
    config = yaml.safe_load((source / "_config.yml").read_text("utf-8"))
    config["execute"]["execute_notebooks"] = "off"  # nbmake has done it by then
    (source / "_config.yml").write_text(yaml.safe_dump(config, allow_unicode=True), "utf-8")
    for path in chapters(source):
        book = nbformat.read(path, as_version=4)
        around = [nbformat.v4.new_code_cell(code) for code in (BEFORE, AFTER)]
        book.cells = [around[0], *book.cells, around[1]]
        nbformat.write(book, path)


def chapters(source: Path) -> list[Path]:
    """The notebooks of a copy, in the order of the book."""
    return sorted((source / "notebooks").glob("*.ipynb"))


def run(source: Path) -> None:
    """Execute every chapter with nbmake, which leaves the outputs in it.

    Raises:
        BookError: where a cell fails; nbmake has shown it.
    """
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "--nbmake"]
    command += ["--nbmake-timeout=300", "--nbmake-kernel=python3", "--overwrite", "-q"]
    done = subprocess.run([*command, source / "notebooks"], cwd=ROOT, check=False)
    if done.returncode:
        raise BookError("a chapter failed; its cell and its error stand above")


def collect(source: Path) -> dict[str, dict]:
    """Take the measuring cells out, fill the cost cards, and return what each chapter cost.

    Raises:
        BookError: naming the chapters that took longer than a minute.
    """
    from modernbert_mini import plots

    where = {
        "hub": "offline" if os.environ.get("HF_HUB_OFFLINE") == "1" else "asked",
        "cpu": costs.cpu(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": costs.commit(),
    }
    found = {}
    for path in chapters(source):
        book = nbformat.read(path, as_version=4)
        last = book.cells.pop()
        del book.cells[0]
        measured = json.loads(last.outputs[0]["text"])
        found[path.stem] = measured | where
        card = plots.CostCard.of(found[path.stem])
        data = {"text/plain": repr(card), "text/html": card._repr_html_()}
        for cell in book.cells:
            if "cost" in cell.metadata.get("tags", []):
                cell.outputs = [nbformat.v4.new_output("display_data", data=data)]
        nbformat.write(book, path)
    slow = [f"{name} took {c['seconds']} s" for name, c in found.items() if c["seconds"] > LIMIT]
    if slow:
        raise BookError(f"more than {LIMIT} s: {'; '.join(slow)}")
    return found


def keep(found: dict[str, dict], root: Path) -> None:
    """Write the costs beside the package's code, where cost cards and tables find them."""
    record = root / costs.RECORD.relative_to(ROOT)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def render(source: Path, output: Path) -> None:
    """Build the HTML of a copy with warnings as errors, in ``output/_build/html``.

    Raises:
        BookError: where Jupyter Book finds fault; it has said what.
    """
    program = Path(sys.executable).parent / "jupyter-book"
    command = [program, "build", source, "--path-output", output, "-W", "--keep-going", "-n", "-q"]
    if subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode:
        raise BookError("the book does not build; the warnings stand above")


def main(arguments: list[str]) -> int:
    """Build the book of this repository; with ``--record`` keep what its chapters cost."""
    shutil.rmtree(ROOT / "_build", ignore_errors=True)
    source = ROOT / ".cache" / "book"  # nbmake passes over folders named _build
    try:
        stage(ROOT, source)
        run(source)
        found = collect(source)
        keep(found, source)
        if "--record" in arguments:
            keep(found, ROOT)
            costs.write_readme()
        render(source, ROOT)
    except BookError as error:
        print(f"No book: {error}.", file=sys.stderr)
        return 1
    print(f"The book is at file://{ROOT / '_build' / 'html' / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
