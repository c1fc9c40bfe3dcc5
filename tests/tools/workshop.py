"""Make what a workshop needs, in the folder `workshop/`.

    python -m tools.workshop               the notebooks, and the bundle but for others' wheels
    python -m tools.workshop --wheels      the wheels too, for machines like this one
    python -m tools.workshop --rehearse    run every student notebook from top to bottom

`student/` has the chapters without their solutions, `instructor/` with them unfolded, with the
notes of `book/teaching.md` and minutes for each section, `bundle/` what a participant copies: the
student notebooks, wheels, an install script that needs no network. Run it with `--wheels` on one
machine of each kind that the room has, and put the folders `wheels/` together.
"""

import argparse
import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

import modernbert_mini

from . import distribution
from .chapters import HEADING, NOTEBOOKS, tags

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "book" / "_ext"))
import teaching  # noqa: E402

PARTICIPANT = Path(__file__).parent / "participant"
PAGE = ROOT / "book" / "teaching.md"
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
# What a participant installs, beside this package and what it asks for.
NEEDED = ("torch", "jupyterlab", "ipywidgets", "transformers")
# No version: a torch for CUDA asks for one of its own.
TRITON = "triton; platform_system == 'Linux' and platform_machine == 'x86_64'"
GREETING = (
    "> **Student copy.** The solutions that the text mentions are with your teacher. "
    "`checks.progress()` shows what you have done."
)


def student(book: NotebookNode) -> NotebookNode:
    """A chapter without solutions and without Colab's badge."""
    book = deepcopy(book)
    book.cells = [c for c in book.cells if not {"solution", "colab-badge"} & {*tags(c)}]
    book.cells.insert(1, note("student-copy", GREETING))
    return book


def instructor(book: NotebookNode, chapter: int, notebook: Path, page: str) -> NotebookNode:
    """A chapter with its solutions open, the notes of a teacher, and minutes."""
    book, sections = deepcopy(book), teaching.sections(notebook)
    book.cells = [cell for cell in book.cells if "colab-badge" not in tags(cell)]
    for cell in book.cells:
        if "solution" in tags(cell):
            cell.metadata.pop("cellView", None)
            cell.metadata.pop("jupyter", None)
            cell.metadata["tags"] = ["solution"]
        elif cell.cell_type == "markdown":
            add_minutes(cell, sections)
    book.cells[1:1] = [note("teachers-notes", notes(chapter, sections, page))]
    for i in range(len(book.cells) - 1, -1, -1):
        heading = HEADING.search(book.cells[i].source)
        hints = hints_of(heading[1]) if heading else []
        if hints:
            text = "".join(f"\n- {hint}" for hint in hints)
            told = f"*For the teacher: what the check may ask.*\n{text}"
            book.cells.insert(i + 1, note(f"hints-{heading[1].replace('.', '-')}", told))
    return book


def note(name: str, text: str) -> NotebookNode:
    """A cell of ours; its name is its id."""
    return nbformat.v4.new_markdown_cell(text, id=name, metadata={"tags": ["workshop"]})


def add_minutes(cell: NotebookNode, sections: list[teaching.Section]) -> None:
    """Put its minutes below each heading of a section."""
    for section in sections:
        minutes = f"*{section.minutes} minute{'s' if section.minutes > 1 else ''}*"
        heading = rf"^## {re.escape(section.title)}\s*$"
        cell.source = re.sub(
            heading, lambda m, add=minutes: f"{m[0].rstrip()}\n\n{add}", cell.source, flags=re.M
        )


def notes(chapter: int, sections: list[teaching.Section], page: str) -> str:
    """Minutes of each section, and what `teaching.md` says of the chapter."""
    rows = [f"| {section.title} | {section.minutes} |" for section in sections]
    table = "\n".join(["| section | minutes |", "|---|--:|", *rows])
    found = re.search(rf"^### {chapter} · [^\n]*\n(.*?)(?=^#|\Z)", page, re.M | re.S)
    said = found[1].strip() if found else ""
    # What the page links from the book lies beside the notebook here.
    said = re.sub(r"\(\.\./notebooks/([\w.]+)(?:#[\w-]*)?\)", r"(\1)", said)
    return f"## For the teacher\n\n{table}\n\n{said}".strip()


@cache
def hints_of(number: str) -> list[str]:
    """The questions that the check of an exercise may ask, in its order."""
    for functions in modules_of_checks():
        for check in functions.values():
            if number_of(check) == number:
                said = map(wording, strings(check, functions))
                return list(dict.fromkeys(hint for hint in said if "? " in f"{hint} "))
    return []


@cache
def modules_of_checks() -> list[dict[str, ast.FunctionDef]]:
    """Name -> function, for every module of checks."""
    found = []
    for path in sorted((ROOT / "modernbert_mini" / "checks").glob("[!_]*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        found.append({node.name: node for node in body if isinstance(node, ast.FunctionDef)})
    return found


def number_of(function: ast.FunctionDef) -> str | None:
    """The number in `@exercise("3.1", …)`."""
    for call in function.decorator_list:
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "exercise":
            return call.args[0].value
    return None


def strings(node: ast.AST, helpers: dict[str, ast.FunctionDef]) -> Iterator[ast.AST]:
    """Whole strings below a node, and in the helpers that it names, in the order of the source."""
    if isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    ):
        yield node
        return
    if isinstance(node, ast.Name) and node.id in helpers:
        others = {name: helper for name, helper in helpers.items() if name != node.id}
        yield from strings(helpers[node.id], others)
    for child in ast.iter_child_nodes(node):
        yield from strings(child, helpers)


def wording(string: ast.AST) -> str:
    """A string as it is read, with … for what is filled in."""
    if isinstance(string, ast.Constant):
        return " ".join(string.value.split())
    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in string.values]
    return " ".join("".join(parts).split())


def requirements() -> str:
    """What a participant installs, with the versions that the book is tested with."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text("utf-8"), re.M))
    lines = [f"modernbert-mini[train]=={modernbert_mini.__version__}"]
    lines += [f"{name}=={pins[name]}" for name in NEEDED]
    return "\n".join([*lines, TRITON]) + "\n"


def write_notebooks(output: Path) -> None:
    """Write the student's and the teacher's notebooks."""
    page = PAGE.read_text(encoding="utf-8")
    for name in ("student", "instructor"):
        shutil.rmtree(output / name, ignore_errors=True)
        (output / name).mkdir(parents=True)
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        chapter = int(path.stem.split("_")[0])
        nbformat.write(student(book), output / "student" / path.name)
        nbformat.write(instructor(book, chapter, path, page), output / "instructor" / path.name)


def write_bundle(output: Path, *, wheels: bool) -> Path:
    """Write what a participant copies; wheels that are there already stay."""
    bundle = output / "bundle"
    folder = bundle / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("modernbert_mini-*.whl"):
        old.unlink()
    distribution.wheel(folder)
    shutil.copytree(output / "student", bundle / "notebooks", dirs_exist_ok=True)
    shutil.copytree(PARTICIPANT, bundle, dirs_exist_ok=True)
    shutil.copy(CONSTRAINTS, bundle / "constraints.txt")
    (bundle / "requirements.txt").write_text(requirements(), encoding="utf-8")
    if wheels:
        download(bundle)
    write_sums(bundle)
    return bundle


def download(bundle: Path) -> None:
    """Bring every wheel that machines like this one need; those in the folder are not asked for."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    command += ["--only-binary", ":all:", "--find-links", "wheels", "--dest", "wheels"]
    command += ["--constraint", "constraints.txt", "--requirement", "requirements.txt"]
    subprocess.run(command, cwd=bundle, check=True)


def write_sums(bundle: Path) -> None:
    """Write the checksum of every file, by which `install.py` knows a bad copy."""
    listed = [p for p in sorted(bundle.rglob("*")) if p.is_file() and p.name != "SHA256SUMS"]
    names = {path: path.relative_to(bundle) for path in listed}
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name.as_posix()}"
        for path, name in names.items()
        if not {".venv", "__pycache__", ".ipynb_checkpoints"} & {*name.parts}
    ]
    (bundle / "SHA256SUMS").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def rehearse(notebook: Path) -> list[str]:
    """Run a student notebook from top to bottom; say what went wrong with it.

    Raises:
        nbclient.exceptions.CellExecutionError: where a cell stops.
    """
    book = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        run = {"resources": {"metadata": {"path": folder}}, "kernel_name": "python3"}
        NotebookClient(book, timeout=300, **run).execute()
    outputs = [o for cell in book.cells if cell.cell_type == "code" for o in cell.outputs]
    text = "\n".join(json.dumps(output, ensure_ascii=False) for output in outputs)
    answers = dict(re.findall(r"(?:✎ to do · Exercise (\d+\.\d+)) [^\n]*?(Not written yet)", text))
    chapter = int(notebook.stem.split("_")[0])
    asked = [one.number for one in teaching.exercises(chapter)]
    return [f"exercise {n} does not say that it is not written" for n in asked if n not in answers]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "workshop", metavar="FOLDER")
    parser.add_argument("--wheels", action="store_true", help="download the wheels, too")
    parser.add_argument("--rehearse", action="store_true", help="run every student notebook")
    options = parser.parse_args(arguments)
    write_notebooks(options.output)
    bundle = write_bundle(options.output, wheels=options.wheels)
    size = sum(p.stat().st_size for p in (bundle / "wheels").iterdir()) / 1e6
    count = len([*(bundle / "wheels").iterdir()])
    print(f"{len(NOTEBOOKS)} chapters for students and teachers: {options.output}")
    print(f"for each participant: {bundle}, {count} wheels, {size:,.0f} MB")
    if count == 1:
        print(
            "The other wheels are not there yet: make workshop WHEELS=1, where there is a network"
        )
    wrong = 0
    for notebook in sorted((options.output / "student").glob("*.ipynb")) * options.rehearse:
        problems = rehearse(notebook)
        print(f"{notebook.name}: {'; '.join(problems) or 'runs, all exercises are open'}")
        wrong += len(problems)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
