"""The chapters run as on Colab: its versions, alone in a folder, the package from the repository.

`make colab` runs them all; here two do, and what would go wrong there is planted.
"""

import json
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from tools import address, colab, costs
from tools.chapters import NOTEBOOKS, ROOT, tagged

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
URL = address.address(ROOT)
SETUP = address.setup_cell(URL)


def test_colab_has_all_that_the_package_asks_for():
    assert "3.13" in SpecifierSet(PROJECT["requires-python"])
    for line in PROJECT["dependencies"]:
        asked = Requirement(line)
        assert colab.pins()[canonicalize_name(asked.name)] in asked.specifier, line


@pytest.mark.parametrize(
    ("here", "asked", "taken"),
    [
        ("2.13.0+cpu", "auto", "2.13.0"),
        ("2.13.0", "auto", colab.pins()["torch"]),
        ("2.13.0+cpu", "colab", colab.pins()["torch"]),
        ("2.13.0+cpu", "2.10.0", "2.10.0"),
    ],
)
def test_torch_is_colabs_unless_that_brings_cuda(monkeypatch, here, asked, taken):
    monkeypatch.setattr(colab, "version", lambda name: here)
    assert colab.wanted(asked)["torch"] == taken


def test_only_a_runtime_with_a_gpu_has_triton():
    assert "triton" not in colab.wanted() and "triton" in colab.wanted(gpu=True)
    here = {name: number for name, number in colab.pins().items() if name != "triton"}
    assert not colab.differences(here, gpu=False)
    assert colab.differences(here, gpu=True) == [
        f"triton: absent here, {colab.pins()['triton']} on Colab"
    ]


def test_what_an_installation_does_to_others_is_told():
    before = {"torch": "2.11.0", "numpy": "2.1.3", "six": "1"}
    after = {"torch": "2.13.0", "numpy": "2.1.3", "new": "2", colab.PACKAGE: "1"}
    assert colab.changes(before, after) == [
        "torch: 2.11.0 before, 2.13.0 after",
        "six: 1 before, absent after",
    ]


def chapter(*code: str, setup: str = SETUP) -> nbformat.NotebookNode:
    new = nbformat.v4
    cells = [new.new_markdown_cell("# 3 · A toy")]
    cells.append(new.new_code_cell(setup, metadata={"tags": ["setup"]}))
    cells += [new.new_code_cell(source) for source in code]
    return new.new_notebook(cells=cells)


def test_the_setup_cell_runs_again_after_the_cell_that_needs_it():
    played = colab.played(chapter("modernbert_mini.__file__", "1 + 1"))
    sources = [cell.source for cell in played.cells[1:]]
    assert sources == [SETUP, "modernbert_mini.__file__", SETUP, "1 + 1", colab.WITNESS]
    assert len(tagged(played, "setup")) == 2


@pytest.fixture
def project(tmp_path) -> Path:
    """A small repository whose files are not all committed."""
    root = tmp_path / "project"
    root.mkdir()
    colab.git(root, "init", "--quiet")
    (root / ".gitignore").write_text("*.log\n", encoding="utf-8")
    (root / "committed.py").write_text("1", encoding="utf-8")
    colab.git(root, "add", "committed.py")
    (root / "new über.py").write_text("2", encoding="utf-8")
    (root / "run.log").write_text("3", encoding="utf-8")
    return root


def test_the_local_repository_holds_the_files_as_they_stand(project, tmp_path):
    bare = colab.publish(project, tmp_path / "published.git")
    listed = colab.git(bare, "ls-tree", "-rz", "--name-only", "main").split("\0")
    assert {*listed} - {""} == {".gitignore", "committed.py", "new über.py"}
    assert colab.git(project, "status", "--short", "committed.py").startswith("A")
    seen = colab.surroundings(Path(sys.executable), bare, URL)
    assert seen["GIT_CONFIG_KEY_0"] == f"url.{bare.as_uri()}.insteadOf"
    assert seen["GIT_CONFIG_VALUE_0"] == URL and "PYTHONPATH" not in seen


def cheapest(count: int) -> list[Path]:
    recorded = json.loads(costs.RECORD.read_text("utf-8"))
    measured = [path for path in NOTEBOOKS if path.stem in recorded]
    return sorted(measured, key=lambda path: recorded[path.stem]["seconds"])[:count]


TOY = """\
[project]
name = "modernbert-mini"
version = "0.0.1"
dependencies = {dependencies}

[tool.setuptools]
packages = ["modernbert_mini"]
"""


def toy(folder: Path, dependencies: list[str]) -> Path:
    """A repository whose package is nearly nothing."""
    (folder / "modernbert_mini").mkdir(parents=True)
    (folder / "modernbert_mini" / "__init__.py").touch()
    text = TOY.format(dependencies=json.dumps(dependencies))
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    colab.git(folder, "init", "--quiet")
    return folder


@pytest.mark.slow
def test_two_chapters_run_as_on_colab_and_planted_faults_show(tmp_path):
    if not metadata.version("torch").endswith("+cpu"):
        pytest.skip("torch came with CUDA, which takes minutes to install again: see make colab")
    # Only what the chapters cannot do without: so they also show that they do without the rest.
    versions = colab.wanted()
    spared = {"transformers", "scikit-learn"}
    versions = {name: number for name, number in versions.items() if name not in spared}
    executable, here = colab.environment(tmp_path / "venv", sys.executable, versions, borrow=True)
    named = {difference.split(":")[0] for difference in colab.differences(here, gpu=False)}
    assert named <= {"torch", "setuptools", *spared}  # newer torch asks for newer setuptools

    def play(notebook: Path, repository: Path) -> str:
        variables = colab.surroundings(executable, repository, URL)
        return colab.run(notebook, tmp_path, executable, variables, here)

    repository = colab.publish(ROOT, tmp_path / "repository.git")
    for notebook in cheapest(2):
        assert play(notebook, repository) == colab.pins()["ipython"]
        assert [path.name for path in (tmp_path / "content" / notebook.stem).iterdir()] == [
            notebook.name
        ]

    faults = {
        "NameError": (chapter("modernbert_mini", setup=SETUP.rpartition("\n")[0]), []),
        "ZeroDivisionError": (chapter("modernbert_mini", "1 / 0"), []),
        "changed Colab's packages: tqdm: 4.67.3 before, 4.67.1": (
            chapter("modernbert_mini"),
            ["tqdm==4.67.1"],
        ),
    }
    for i, (said, (book, dependencies)) in enumerate(faults.items()):
        small = colab.publish(toy(tmp_path / f"toy{i}", dependencies), tmp_path / f"toy{i}.git")
        path = tmp_path / f"0{i}_toy.ipynb"
        nbformat.write(book, path)
        with pytest.raises(colab.ColabError, match=said):
            play(path, small)
