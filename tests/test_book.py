"""The book builds from a clean state with warnings as errors, and its pages need no network."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import book_settings
import nbformat
import pytest
import yaml
from tools import address, book
from tools.chapters import NOTEBOOKS, ROOT

pytestmark = pytest.mark.slow


def build(source: Path, output: Path) -> subprocess.CompletedProcess:
    """Run Jupyter Book with the gate's options."""
    program = Path(sys.executable).parent / "jupyter-book"
    return subprocess.run(
        [program, "build", source, "--path-output", output, "-W", "--keep-going", "-n"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"},
    )


class Page(HTMLParser):
    """What a page loads, where it links, and its anchors."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.links, self.ids, self.images = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes.get("id"), attributes.get("name")} - {None}
        if tag in {"script", "img", "iframe", "source", "video", "audio"} and "src" in attributes:
            self.loads.append(attributes["src"])
        if tag == "link" and attributes.get("rel") not in {"canonical", "next", "prev", "search"}:
            self.loads.append(attributes.get("href", ""))
        if tag == "img":
            self.images.append((attributes.get("src", ""), attributes.get("alt") or ""))
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])


@pytest.fixture(scope="session")
def pages(html) -> dict[Path, Page]:
    found = {path: Page(path) for path in html.rglob("*.html") if "_static" not in path.parts}
    assert len(found) >= len(contents())
    return found


def contents() -> list[str]:
    return re.findall(r"(?:file|root): (\S+)", (ROOT / "_toc.yml").read_text("utf-8"))


def test_every_page_of_the_contents_is_built(html):
    assert [name for name in contents() if not (html / f"{name}.html").is_file()] == []


def test_reading_leaves_no_request_to_another_machine(html, pages):
    for path, page in pages.items():
        remote = [src for src in page.loads if re.match(r"(https?:)?//", src)]
        assert not remote, path
        scripts = re.findall(r"<script>(.*?)</script>", path.read_text("utf-8"), re.S)
        assert not [s for s in scripts if re.search(r"""(src|from|import)\W+https?://""", s)], path
    for sheet in html.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text("utf-8")), (
            sheet
        )


def test_what_a_page_loads_is_there(html, pages):
    for path, page in pages.items():
        for src in page.loads:
            target = urlsplit(src)
            if not target.scheme and target.path:
                assert (path.parent / unquote(target.path)).exists(), (path.name, src)


def test_formulas_are_set_by_a_script_of_the_book(html, pages):
    for name in (n for n in contents() if n.startswith("notebooks/03")):
        loads = pages[html / f"{name}.html"].loads
        assert any("_static/mathjax/" in src for src in loads)


def test_every_link_inside_the_book_leads_somewhere(html, pages):
    broken = []
    for path, page in pages.items():
        for href in page.links:
            link = urlsplit(href)
            if link.scheme or link.netloc or href.startswith("#") and len(href) == 1:
                continue
            to = (path.parent / unquote(link.path)).resolve() if link.path else path
            known = pages.get(to)
            anchor = unquote(link.fragment)
            if not to.exists() or (anchor and known and anchor not in known.ids):
                broken.append(f"{path.relative_to(html)}: {href}")
    assert not broken


def test_every_picture_of_a_chapter_is_described(html, pages):
    for notebook in NOTEBOOKS:
        own = [
            i for i in pages[html / f"notebooks/{notebook.stem}.html"].images if "_images" in i[0]
        ]
        assert all(len(alt) >= 15 and "_images" not in alt for _, alt in own), own


def test_chapters_open_in_colab_and_show_no_badge(html):
    url = address.address(ROOT)
    for notebook in NOTEBOOKS:
        text = (html / f"notebooks/{notebook.stem}.html").read_text("utf-8")
        assert address.colab(url, f"notebooks/{notebook.name}") in text
        assert address.BADGE_IMAGE not in text
        (card,) = re.findall(r"<div[^>]*><b>Cost</b>.*?</div>", text, re.S)
        assert "not yet measured" not in card


def test_launch_and_edit_links_open_the_page_they_stand_on(html, pages):
    url = address.address(ROOT)
    for name in contents():
        (source,) = (s for s in (f"{name}.md", f"{name}.ipynb") if (ROOT / s).is_file())
        links = pages[html / f"{name}.html"].links
        opened = [path for link in links if (path := address.opened(url, link))]
        assert all((ROOT / path).is_file() for path in opened), name
        assert f"{url}/edit/main/{source}" in links, name
        launched = [link for link in links if "colab.research.google.com" in link]
        assert {address.opened(url, link) for link in launched} == (
            {source} if source.endswith(".ipynb") else set()
        ), name


def test_chapters_lead_to_what_moves(html, pages):
    for chapter, label in book_settings.EXPLORED.items():
        links = pages[html / f"{chapter}.html"].links
        assert any(link.endswith(f"#{label}") for link in links), chapter


def test_the_status_page_tells_of_each_chapter_that_all_its_cells_ran(html):
    text = (html / "book/status.html").read_text("utf-8")
    for notebook in NOTEBOOKS:
        row = re.search(rf"<tr[^>]*>(?:(?!</tr>).)*{notebook.stem}\.html.*?</tr>", text, re.S)[0]
        ran, cells = re.search(r"(\d+) of (\d+)", row).groups()
        assert ran == cells and int(cells) > 10, notebook.name


def test_no_directive_shows_raw(pages):
    for path in pages:
        text = re.sub(
            r"<(pre|code|script|style)\b.*?</\1>", "", path.read_text("utf-8"), flags=re.S
        )
        assert not re.search(r"\{(note|figure|cite|term|eval-rst|glossary)\}|^:::", text, re.M), (
            path
        )


# ---- that the gate can fail ----


def small_book(folder: Path, code: str, text: str) -> Path:
    """A book of two pages with this book's settings."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    config["sphinx"].pop("local_extensions")
    config["bibtex_bibfiles"] = ["empty.bib"]
    (folder / "empty.bib").write_text("")
    for key in ("html_static_path", "html_css_files", "html_js_files", "html_favicon"):
        config["sphinx"]["config"].pop(key)
    (folder / "_config.yml").write_text(yaml.safe_dump(config))
    (folder / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters:\n- file: one\n")
    (folder / "index.md").write_text(f"# Index\n\n{text}\n")
    nbformat.write(chapter(code), folder / "one.ipynb")
    return folder


def chapter(code: str) -> nbformat.NotebookNode:
    new = nbformat.v4
    card = new.new_code_cell("1", metadata={"tags": ["cost"]})
    return new.new_notebook(cells=[new.new_markdown_cell("# One"), card, new.new_code_cell(code)])


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        ("raise KeyError('planted')", "See [one](one.ipynb).", "planted"),
        ("1 + 1", "See [two](two.ipynb).", "two.ipynb"),
    ],
    ids=["a cell that fails", "a link that leads nowhere"],
)
def test_the_gate_stops(tmp_path, code, text, said):
    done = build(small_book(tmp_path, code, text), tmp_path / "out")
    assert done.returncode != 0
    assert said in done.stdout + done.stderr


@pytest.fixture
def staged(tmp_path):
    """What becomes of a book with one chapter of this code, before it is rendered."""

    def build(code: str) -> Path:
        (tmp_path / "notebooks").mkdir()
        (tmp_path / "book").mkdir()
        nbformat.write(chapter(code), tmp_path / "notebooks" / "01_one.ipynb")
        for name in ("_config.yml", "_toc.yml"):
            shutil.copy(ROOT / name, tmp_path / name)
        book.stage(tmp_path, tmp_path / "source")
        book.run(tmp_path / "source")
        return tmp_path / "source"

    return build


def test_a_chapter_is_run_once_and_measured(staged):
    source = staged("import time\ntime.sleep(1.5)\nblock = bytearray(300_000_000)\nlen(block)")
    before = nbformat.read(source / "notebooks" / "01_one.ipynb", as_version=4)
    found = book.collect(source)
    book.keep(found, source)
    cost = json.loads((source / "modernbert_mini" / "recorded" / "costs.json").read_text())
    assert cost == found and 1.5 <= found["01_one"]["seconds"] < 20
    assert 300 < found["01_one"]["peak_ram_mb"] < 600 and found["01_one"]["fetched_mb"] == 0
    after = nbformat.read(source / "notebooks" / "01_one.ipynb", as_version=4)
    assert len(after.cells) == len(before.cells) - 2 == 3
    assert after.cells[2].outputs[0].data["text/plain"] == "300000000"
    (card,) = after.cells[1].outputs
    assert found["01_one"]["cpu"] in card.data["text/plain"] and "Cost" in card.data["text/html"]
    config = yaml.safe_load((source / "_config.yml").read_text("utf-8"))
    assert config["execute"]["execute_notebooks"] == "off"


def test_a_chapter_that_outruns_its_minute_stops_the_build(staged, monkeypatch):
    source = staged("import time\ntime.sleep(0.2)")
    monkeypatch.setattr(book, "LIMIT", 0)
    with pytest.raises(book.BookError, match="more than 0 s: 01_one took"):
        book.collect(source)


def test_a_chapter_that_fails_stops_the_build(staged, capfd):
    with pytest.raises(book.BookError, match="a chapter failed"):
        staged("raise KeyError('planted')")
    assert "planted" in capfd.readouterr().out


def test_what_a_chapter_fetches_is_counted(staged, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "older").write_bytes(bytes(5_000_000))
    source = staged(
        "import os, pathlib\n"
        "pathlib.Path(os.environ['HF_HOME'], 'new').write_bytes(bytes(2_000_000))"
    )
    assert book.collect(source)["01_one"]["fetched_mb"] == 2.0
