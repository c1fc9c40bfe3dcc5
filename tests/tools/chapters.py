"""The rules that every chapter follows, as functions that say what is wrong with a notebook."""

import ast
import json
import re
from pathlib import Path

import nbformat

from . import address

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Calls that leave a picture in the page.
DRAWS = re.compile(
    r"\bplt\.(?:subplots|figure|plot|imshow)\b|\bplots\.(?!style\b|cost_card\b)\w+\("
)
DIRECTIVE = re.compile(r"^\s*(?:```+|:::+)\{|\{(?:cite|ref|doc|term|numref|eq)\}`", re.M)
# How a notebook asks Colab for a runtime with its free GPU.
COLAB_GPU = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}}
HEADING = re.compile(r"^### Exercise (\d+\.\d+) · .+\((?:★|☆){3} · \d+ minutes?\)\s*$", re.M)


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def tagged(book: dict, tag: str) -> list[dict]:
    return [cell for cell in book["cells"] if tag in tags(cell)]


def problems(path: Path, url: str) -> list[str]:
    """Everything about a chapter that breaks a rule; empty when nothing does."""
    book = nbformat.read(path, as_version=4)
    return [
        # As it stands on disk: nbformat mends cell ids while it reads.
        *_form(json.loads(path.read_text(encoding="utf-8"))),
        *_opening(book, path, url),
        *_runtime(book),
        *_figures(book),
        *_prose(book),
        *_exercises(book, path),
    ]


def _form(book: dict) -> list[str]:
    found = []
    if (book["nbformat"], book["nbformat_minor"]) < (4, 5):
        found.append("format older than 4.5: cells have no ids")
    if book["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("kernelspec is not python3")
    ids = [cell.get("id") for cell in book["cells"]]
    found += [f"cell id {i!r} twice" for i in {i for i in ids if ids.count(i) > 1}]
    for cell in book["cells"]:
        if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"]):
            found.append(f"cell {cell['id']}: has outputs (run nbstripout --keep-id)")
    return found


def _opening(book: dict, path: Path, url: str) -> list[str]:
    found = []
    title, *rest = book["cells"]
    number, name = re.match(r"(\d+)_(\w+)", path.stem).groups()
    if not re.match(rf"# {int(number)} · \S", title["source"]):
        found.append(f"the first cell does not start with '# {int(number)} · Title'")
    badges = tagged(book, "colab-badge")
    if [c["source"] for c in badges] != [address.badge(url, f"notebooks/{path.name}")]:
        found.append("the Colab badge is missing or leads elsewhere (run make address)")
    elif rest[0] is not badges[0] or "remove-cell" not in tags(badges[0]):
        found.append("the badge is not the second cell, tagged remove-cell")
    setups = tagged(book, "setup")
    if [c["source"].strip() for c in setups] != [address.setup_cell(url)]:
        found.append("the setup cell is missing or another one (run make address)")
    elif any(c["cell_type"] == "code" for c in book["cells"][: book["cells"].index(setups[0])]):
        found.append("code stands before the setup cell")
    costs = [c["source"] for c in tagged(book, "cost")]
    if len(costs) != 1 or f'cost_card("{path.stem}")' not in costs[0]:
        found.append(f'no cell tagged cost with cost_card("{path.stem}")')
    return found


def _runtime(book: dict) -> list[str]:
    """A chapter that uses a GPU asks Colab for one, and no other does."""
    asked = {key: book["metadata"].get(key) for key in COLAB_GPU}
    code = "\n".join(c["source"] for c in book["cells"] if c["cell_type"] == "code")
    if "torch.cuda." in code:
        return [] if asked == COLAB_GPU else [f"uses a GPU, but its metadata lack {COLAB_GPU}"]
    idle = asked["accelerator"] and "cuda" not in code
    return ["uses no GPU, but asks Colab for one"] if idle else []


def _figures(book: dict) -> list[str]:
    found = []
    for cell in book["cells"]:
        if cell["cell_type"] != "code" or not _draws(cell["source"]):
            continue
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        if len(alt) < 15:
            found.append(f"cell {cell['id']}: draws, but has no alt text that describes it")
    return found


def _draws(source: str) -> bool:
    """Whether running a cell draws: a call at its top level, not inside a function it defines."""
    try:
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "pass", source, flags=re.M))
    except SyntaxError:
        return bool(DRAWS.search(source))
    inside = (ast.FunctionDef, ast.ClassDef)
    return any(DRAWS.search(ast.unparse(s)) for s in tree.body if not isinstance(s, inside))


def _prose(book: dict) -> list[str]:
    found = []
    for cell in book["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        if DIRECTIVE.search(cell["source"]):
            found.append(f"cell {cell['id']}: a MyST directive or role, which Colab shows raw")
        for image in re.findall(r"!\[([^\]]*)\]\(", cell["source"]):
            if not image:
                found.append(f"cell {cell['id']}: an image without alt text")
        for word in re.findall(r"\b(simply|obviously)\b", cell["source"], re.I):
            found.append(f"cell {cell['id']}: says {word!r}")
    return found


def _exercises(book: dict, path: Path) -> list[str]:
    """Three or more, each with its stub, its check and a folded solution that ends in a check."""
    found, chapter = [], str(int(path.stem.split("_")[0]))
    headings = {}
    for i, cell in enumerate(book["cells"]):
        if cell["cell_type"] == "markdown" and (match := HEADING.search(cell["source"])):
            headings[match[1]] = i
        elif "### Exercise" in cell["source"]:
            found.append(f"cell {cell['id']}: not '### Exercise N.n · Title  (★☆☆ · 5 minutes)'")
    if len(headings) < 3:
        found.append(f"{len(headings)} exercises; a chapter has three or more")
    if list(headings) != [f"{chapter}.{n + 1}" for n in range(len(headings))]:
        found.append(f"exercises are numbered {list(headings)}")
    solutions = {}
    for cell in tagged(book, "solution"):
        title = re.match(r"# @title Solution (\d+\.\d+)\n", cell["source"])
        solutions[title[1] if title else cell["id"]] = cell
        folded = cell["metadata"].get("jupyter", {}).get("source_hidden") is True
        if (
            not folded
            or "hide-cell" not in tags(cell)
            or cell["metadata"].get("cellView") != "form"
        ):
            found.append(f"cell {cell['id']}: a solution that is not folded everywhere")
        if not re.search(r"^checks\.\w+\.\w+\(", cell["source"].strip().splitlines()[-1]):
            found.append(f"cell {cell['id']}: a solution that does not end in its check")
    found += [f"exercise {n} has no solution" for n in headings if n not in solutions]
    found += [f"solution {n} has no exercise" for n in solutions if n not in headings]
    stops = [*list(headings.values())[1:], len(book["cells"])]
    for number, start, stop in zip(headings, headings.values(), stops, strict=True):
        own = [c for c in book["cells"][start:stop] if "solution" not in tags(c)]
        if not any("checks." in c["source"] for c in own if c["cell_type"] == "code"):
            found.append(f"exercise {number} has no check")
    return found
