"""Every chapter follows the rules, its `package` cells are the package, its address is right."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from tools import address, sync
from tools.chapters import COLAB_GPU, NOTEBOOKS, ROOT, problems

from modernbert_mini import checks

URL = address.address(ROOT)
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_chapters():
    assert NOTEBOOKS


@each
def test_the_rules_of_a_chapter(notebook):
    assert not problems(notebook, URL)


@each
def test_package_cells_are_the_package(notebook):
    found = sync.differences(notebook, ROOT / "modernbert_mini")
    assert not found, "run make sync:\n" + "\n".join(map(str, found))


@each
def test_exercises_are_headed_as_their_checks_are_registered(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    lines = [line for cell in cells for line in cell.source.splitlines()]
    headings = [line.removeprefix("### ") for line in lines if line.startswith("### Exercise")]
    chapter = str(int(notebook.stem.split("_")[0]))
    registered = [e.heading for n, e in checks.EXERCISES.items() if n.split(".")[0] == chapter]
    assert headings == registered


@each
def test_every_heading_level_follows_the_one_before(notebook):
    level = 0
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"```.*?```", "", cell.source, flags=re.S)
            for heading in re.findall(r"^(#+) \S", text, re.M):
                assert len(heading) <= level + 1, (cell.id, cell.source[:60])
                level = len(heading)


# ---- that the rules can fail ----


def chapter(*, alt="A line that falls from left to right.") -> nbformat.NotebookNode:
    """A small chapter that breaks no rule."""
    new = nbformat.v4
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = new.new_notebook(metadata={"kernelspec": kernel})
    add = book.cells.append
    path = "notebooks/03_toy.ipynb"
    add(new.new_markdown_cell("# 3 · A toy"))
    badge_tags = {"tags": ["remove-cell", "colab-badge"]}
    add(new.new_markdown_cell(address.badge(URL, path), metadata=badge_tags))
    setup_tags = {"tags": ["setup", "hide-input"]}
    add(new.new_code_cell(address.setup_cell(URL), metadata=setup_tags))
    card = 'modernbert_mini.plots.cost_card("03_toy")'
    add(new.new_code_cell(card, metadata={"tags": ["remove-input", "cost"]}))
    picture = {"mystnb": {"image": {"alt": alt}}}
    add(new.new_code_cell("plt = plots.style()\nplt.plot([2, 1])", metadata=picture))
    double = 'SIZE = 4\n\n\ndef double(x):\n    """Twice."""\n    return 2 * x  # mine'
    add(new.new_code_cell(double, metadata={"tags": ["package"]}))
    for n in (1, 2, 3):
        add(new.new_markdown_cell(f"### Exercise 3.{n} · Twice  (★☆☆ · 5 minutes)"))
        add(new.new_code_cell("def twice(x):\n    raise NotImplementedError"))
        add(new.new_code_cell("checks.toy.twice(twice)"))
        folded = {
            "tags": ["solution", "hide-cell"],
            "jupyter": {"source_hidden": True},
            "cellView": "form",
        }
        solution = f"# @title Solution 3.{n}\ntwice = double\nchecks.toy.twice(twice)"
        add(new.new_code_cell(solution, metadata=folded))
    return book


MODULE = '''"""A module."""

SIZE = 4


def double(x):
    """Twice `x`.

    Args:
        x: a number.
    """
    # Said differently, the same.
    return 2 * x


class Box:
    """A box."""

    def open(self):
        return self
'''


@pytest.fixture
def toy(tmp_path) -> Path:
    """A project of one chapter and one module."""
    (tmp_path / "modernbert_mini").mkdir()
    (tmp_path / "modernbert_mini" / "toy.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    nbformat.write(chapter(), tmp_path / "notebooks" / "03_toy.ipynb")
    return tmp_path / "notebooks" / "03_toy.ipynb"


def change(path: Path, edit) -> None:
    book = nbformat.read(path, as_version=4)
    edit(book)
    nbformat.write(book, path)


def test_a_good_chapter_passes(toy):
    assert not problems(toy, URL)


def _output(book):
    book.cells[2].outputs = [nbformat.v4.new_output("stream", text="x")]


def _source(index, source):
    return lambda book: book.cells[index].update(source=source)


def _metadata(index, **metadata):
    return lambda book: book.cells[index].update(metadata=metadata)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_output, "has outputs"),
        (lambda b: b.metadata.kernelspec.update(name="venv"), "kernelspec"),
        (_source(5, "torch.cuda.is_available()"), "metadata lack"),
        (lambda b: b.metadata.update(accelerator="GPU"), "uses no GPU"),
        (_source(0, "# A toy"), "does not start with"),
        (_source(1, address.badge(URL, "notebooks/04_toy.ipynb")), "leads elsewhere"),
        (_metadata(1, tags=["colab-badge"]), "tagged remove-cell"),
        (_source(2, "import modernbert_mini"), "the setup cell"),
        (_source(3, 'modernbert_mini.plots.cost_card("04_toy")'), "cost_card"),
        (_metadata(4), "alt text"),
        (_source(0, "# 3 · A toy\n\n```{note}\nHi.\n```"), "MyST"),
        (_source(0, "# 3 · A toy\n\nSee {cite}`warner2024modernbert`."), "MyST"),
        (_source(0, "# 3 · A toy\n\nThis is simply true."), "says 'simply'"),
        (lambda b: b.cells.pop(6), "has no exercise"),
        (lambda b: b.cells.pop(9), "has no solution"),
        (lambda b: b.cells.pop(8), "has no check"),
        (_source(6, "### Exercise 3.1: Twice"), "not '### Exercise"),
        (lambda b: b.cells[9].metadata.pop("cellView"), "not folded"),
        (_source(9, "# @title Solution 3.1\ntwice = double"), "does not end in its check"),
        (lambda b: b.cells.__delitem__(slice(-4, None)), "2 exercises"),
    ],
)
def test_a_broken_rule_is_named(toy, edit, said):
    change(toy, edit)
    assert any(said in problem for problem in problems(toy, URL)), problems(toy, URL)


def test_two_cells_with_one_id_are_named(toy):
    book = json.loads(toy.read_text())
    book["cells"][3]["id"] = book["cells"][2]["id"]
    toy.write_text(json.dumps(book))
    assert any("twice" in problem for problem in problems(toy, URL))


def test_tools_keep_what_asks_colab_for_a_gpu(toy, tmp_path):
    def ask(book):
        book.cells[5].source = book.cells[5].source.replace("2 * x", "x + x")
        book.cells[-1].source += "\ntorch.cuda.is_available()"
        book.cells[-1].outputs = [nbformat.v4.new_output("stream", text="x")]
        book.metadata.update(COLAB_GPU)

    def kept() -> bool:
        return COLAB_GPU.items() <= json.loads(toy.read_text())["metadata"].items()

    change(toy, ask)
    assert sync.rewrite(toy, package(toy)) == 1 and kept()
    program = Path(sys.executable).parent
    subprocess.run([program / "nbstripout", "--keep-id", toy], check=True)
    assert not nbformat.read(toy, as_version=4).cells[-1].outputs and kept()
    text = tmp_path / "toy.py"
    subprocess.run([program / "jupytext", "--to", "py:percent", "--output", text, toy], check=True)
    update = ["--to", "ipynb", "--update", "--output", toy, text]
    subprocess.run([program / "jupytext", *update], check=True)
    assert kept()


def test_a_function_that_draws_needs_alt_text_only_where_it_is_called(toy):
    change(toy, _source(4, "def draw():\n    plt.plot([1])"))
    change(toy, _metadata(4))
    assert not problems(toy, URL)


def package(toy) -> Path:
    return toy.parents[1] / "modernbert_mini"


def test_docstrings_and_comments_may_differ(toy):
    assert not sync.differences(toy, package(toy))


@pytest.mark.parametrize(
    ("source", "piece", "said"),
    [
        ("def double(x):\n    return x * 2", "double", "is not the code"),
        ("def double(x: int):\n    return 2 * x", "double", "is not the code"),
        ("@cache\ndef double(x):\n    return 2 * x", "double", "is not the code"),
        ("def triple(x):\n    return 3 * x", "triple", "no such name"),
        ("SIZE = 5", "SIZE", "is not the code"),
        ("class Box:\n    def open(self):\n        return None", "Box", "is not the code"),
        ("print('hello')", "the cell", "defines nothing"),
        ("def double(x)", "the cell", "does not parse"),
    ],
)
def test_a_package_cell_that_differs_is_named(toy, source, piece, said):
    change(toy, _source(5, source))
    (found,) = sync.differences(toy, package(toy))
    assert found.piece == piece and said in found.reason


def test_a_cell_may_name_another_module(toy):
    change(toy, _metadata(5, tags=["package"], module="other"))
    (found,) = sync.differences(toy, package(toy))
    assert "no module other.py" in found.reason
    (package(toy) / "toy.py").rename(package(toy) / "other.py")
    assert not sync.differences(toy, package(toy))


def test_sync_rewrites_what_differs_and_nothing_else(toy):
    mixed = "import math\n\nSIZE = 5\n\n\n@cache\ndef double(x):\n    return x + x\n\nprint(SIZE)"
    change(toy, _source(5, mixed))
    before = json.loads(toy.read_text())
    assert sync.rewrite(toy, package(toy)) == 2
    assert not sync.differences(toy, package(toy))
    after = json.loads(toy.read_text())
    source = "".join(after["cells"][5].pop("source"))
    before["cells"][5].pop("source")
    assert after == before
    assert source == (
        'import math\n\nSIZE = 4\n\n\ndef double(x):\n    """Twice `x`."""\n'
        "    # Said differently, the same.\n    return 2 * x\n\nprint(SIZE)"
    )
    assert sync.rewrite(toy, package(toy)) == 0


# ---- the address ----


def test_every_mention_of_the_repository_is_its_address():
    pages = [p for pattern in address.PAGES for p in ROOT.glob(pattern)]
    for page in [*pages, *NOTEBOOKS]:
        text = page.read_text(encoding="utf-8")
        mentions = re.findall(r"/github/([\w-]+/[\w-]+)/blob", text)
        mentions += re.findall(r"git\+https://github\.com/([\w-]+/[\w-]+)", text)
        mentions += re.findall(r"git clone https://github\.com/([\w-]+/[\w-]+)", text)
        assert set(mentions) <= {address.slug(URL)}, page.name


def test_launch_links_open_files_of_the_branch_that_is_published():
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    assert config["repository"] == {"url": URL, "branch": "main"}
    for page in [*(p for pattern in address.PAGES for p in ROOT.glob(pattern)), *NOTEBOOKS]:
        for link in re.findall(r"https:/{2}[^\s\"'<>)\\]+", page.read_text("utf-8")):
            path = address.opened(URL, link)
            assert path is None or (ROOT / path).is_file(), f"{page.name}: {link}"


def test_each_row_of_the_readme_opens_its_own_chapter():
    rows = re.findall(r"^\| \d+ \|.*$", (ROOT / "README.md").read_text("utf-8"), re.M)
    opened = []
    for row in rows:
        links = re.findall(r"\]\(([^)\s]+)\)", row)
        paths = {address.opened(URL, link) or link for link in links if ".ipynb" in link}
        assert len(paths) <= 1, row  # reading and launching lead to one notebook
        opened += paths
    assert opened == [f"notebooks/{notebook.name}" for notebook in NOTEBOOKS]


@pytest.mark.parametrize(
    ("link", "path"),
    [
        (f"{URL}/edit/main/book/a.md", "book/a.md"),
        (f"{URL}/blob/main/notebooks/03_rope.ipynb#step", "notebooks/03_rope.ipynb"),
        (address.colab(URL, "notebooks/03_rope.ipynb"), "notebooks/03_rope.ipynb"),
        (f"{URL}/blob/main/a%20b.md", "a b.md"),
        (URL, None),
        (f"{URL}/issues/new?title=x", None),
        ("https://github.com/other/repository/blob/main/a.md", None),
    ],
)
def test_what_a_launch_link_opens(link, path):
    assert address.opened(URL, link) == path


def test_a_launch_link_to_another_branch_is_refused():
    with pytest.raises(ValueError, match="the branch master, not to main"):
        address.opened(URL, f"{URL}/blob/master/README.md")


def test_the_setup_cell_installs_what_the_repository_holds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (asked,) = re.findall(r'"([\w-]+) @ git\+([^"]+)"', address.setup_cell(URL))
    assert asked == (project["name"], URL)


def test_one_command_carries_a_new_address_everywhere(toy):
    root, new = toy.parents[1], "https://github.com/someone/their.fork"
    for name in ("_config.yml", "README.md", "CONTRIBUTING.md", "CITATION.cff", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "book", root / "book")
    change(toy, _source(2, "import modernbert_mini"))
    assert problems(toy, URL)
    assert address.carry(root, URL, new)
    assert address.address(root) == new
    assert not problems(toy, new)
    left = [
        page.name
        for page in [*root.rglob("*.md"), *root.glob("*.*"), toy]
        if page.is_file() and address.slug(URL) in page.read_text(encoding="utf-8")
    ]
    assert not left
    assert not address.carry(root, new, new)


@pytest.mark.parametrize("url", ["example.org", "https://github.com/one", "git@github.com:a/b.git"])
def test_an_address_of_another_form_is_refused(url, capsys):
    assert address.main([url]) == 2
    assert "is not of the form" in capsys.readouterr().err
