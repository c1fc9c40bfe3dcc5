"""Hold the `package` cells of the notebooks and the package together.

A cell tagged `package` builds a piece of the package: every function, class and constant in it
is the same code as the one of that name in the module that the notebook builds. "The same" is
said of syntax trees, with docstrings and comments apart. The module is named after the notebook
(`03_rope.ipynb` builds `rope.py`) unless the cell's metadata says `"module": "heads"`.

    python tests/tools/sync.py            rewrite the cells that differ, from the package
    python tests/tools/sync.py --check    only say which differ

Which chapter builds what is also recorded in the package, where `start_at` reads it.
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path("recorded", "pieces.json")  # in the package
Piece = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Difference:
    """One piece of a `package` cell that is not what the package has."""

    notebook: str
    cell: str
    piece: str
    reason: str

    def __str__(self) -> str:
        return f"{self.notebook}, cell {self.cell}: {self.piece}: {self.reason}"


def module_of(notebook: Path, cell: dict, package: Path) -> Path:
    """The module that a cell builds."""
    named = cell["metadata"].get("module") or re.sub(r"^\d+_", "", notebook.stem)
    return package / f"{named.removesuffix('.py')}.py"


def pieces(source: str) -> dict[str, Piece]:
    """Top-level functions, classes and constants, by name."""
    found: dict[str, Piece] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    found[target.id] = node
    return found


def bare(node: ast.AST) -> str:
    """A syntax tree as text, docstrings left out."""
    node = ast.parse(ast.unparse(node))
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):  # noqa: SIM102
            if ast.get_docstring(inner, clean=False) is not None:
                inner.body = inner.body[1:] or [ast.Pass()]
    return ast.dump(node)


def span(node: Piece) -> slice:
    """The lines of a piece, decorators included, as a slice of the source's lines."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return slice(first - 1, node.end_lineno)


def short(source: str) -> str:
    """A piece with every docstring cut to its first line: a chapter explains in its own words."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if ast.get_docstring(node) is None:
            continue
        text = node.body[0]
        if text.end_lineno > text.lineno:
            lines[text.lineno - 1] = lines[text.lineno - 1].rstrip() + '"""'
            for i in range(text.lineno, text.end_lineno):
                lines[i] = None
    return "\n".join(line for line in lines if line is not None)


def package_cells(notebook: Path) -> Iterator[dict]:
    """The cells of a notebook that carry the tag."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "package" in cell["metadata"].get("tags", []):
            yield cell


def differences(notebook: Path, package: Path) -> list[Difference]:
    """Where the `package` cells of a notebook are not the package."""
    found = []
    for cell in package_cells(notebook):
        module = module_of(notebook, cell, package)

        def differ(piece: str, reason: str, cell=cell) -> None:
            found.append(Difference(notebook.name, cell["id"], piece, reason))

        if not module.is_file():
            differ("the cell", f"there is no module {module.name}")
            continue
        real = pieces(module.read_text(encoding="utf-8"))
        try:
            shown = pieces(cell["source"])
        except SyntaxError as error:
            differ("the cell", f"does not parse: {error}")
            continue
        if not shown:
            differ("the cell", "defines nothing")
        for name, node in shown.items():
            if name not in real:
                differ(name, f"{module.name} has no such name")
            elif bare(node) != bare(real[name]):
                differ(name, f"is not the code of {module.name}")
    return found


def rewrite(notebook: Path, package: Path) -> int:
    """Rewrite the pieces that differ, from the package; return how many."""
    book = nbformat.read(notebook, as_version=4)
    count = 0
    for cell in book.cells:
        if "package" not in cell["metadata"].get("tags", []):
            continue
        module = module_of(notebook, cell, package).read_text(encoding="utf-8")
        real = pieces(module)
        # From the last to the first, so that line numbers above stay true.
        for name, node in sorted(pieces(cell["source"]).items(), key=lambda p: -p[1].lineno):
            if name in real and bare(node) != bare(real[name]):
                lines = cell["source"].splitlines()
                piece = "\n".join(module.splitlines()[span(real[name])])
                lines[span(node)] = short(piece).splitlines()
                cell["source"] = "\n".join(lines)
                count += 1
    if count:
        nbformat.write(book, notebook)
    return count


def built(notebooks: list[Path], package: Path) -> str:
    """What each chapter builds, as JSON: notebook -> module -> public names, in their order."""
    found: dict[str, dict[str, list[str]]] = {}
    for notebook in notebooks:
        modules = found[notebook.stem] = {}
        for cell in package_cells(notebook):
            names = modules.setdefault(module_of(notebook, cell, package).stem, [])
            new = (name for name in pieces(cell["source"]) if not name.startswith("_"))
            names += [name for name in new if name not in names]
    return json.dumps(found, indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="say what differs, change nothing")
    arguments = parser.parse_args()
    package, left = ROOT / "modernbert_mini", []
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        if not arguments.check and (count := rewrite(notebook, package)):
            print(f"{notebook.name}: {count} rewritten")
        left += differences(notebook, package)
    record, now = package / RECORD, built(notebooks, package)
    if not arguments.check:
        record.write_text(now, encoding="utf-8")
    elif not record.is_file() or record.read_text(encoding="utf-8") != now:
        left.append(f"{record.name} does not say what the chapters build")
    for difference in left:
        print(difference)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
