"""The book builds from a clean state with warnings as errors, and its pages need no network."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from tools import address
from tools.chapters import NOTEBOOKS, ROOT

pytestmark = pytest.mark.slow


def build(source: Path, output: Path) -> subprocess.CompletedProcess:
    """Build as `make book` does."""
    program = Path(sys.executable).parent / "jupyter-book"
    return subprocess.run(
        [program, "build", source, "--path-output", output, "-W", "--keep-going", "-n"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"},
    )


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("book")
    done = build(ROOT, output)
    said = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0, "\n".join(said[-40:] + [s for s in said if "WARNING" in s])
    return output / "_build" / "html"


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


@pytest.fixture(scope="module")
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
        assert "<b>Cost</b>" in text and "not yet measured" not in text


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
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# One")])
    book.cells.append(nbformat.v4.new_code_cell(code))
    nbformat.write(book, folder / "one.ipynb")
    return folder


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
