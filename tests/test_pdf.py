"""The PDF of the book: all pages in one document, links that lead inside it, page numbers."""

import pytest
from bs4 import BeautifulSoup
from tools import pdf

PAGE = """<!DOCTYPE html><html><head><title>{title} — Book</title>
<link rel="stylesheet" href="../style.css"><style>section {{ color: black }}</style></head>
<body><nav>menu</nav><article class="bd-article"><section id="{name}"><h1>{title}</h1>{body}
<h2 id="quiz">Quiz<a class="headerlink" href="#quiz">#</a></h2></section></article></body></html>"""
TOC = """format: jb-book
root: book/index
parts:
- caption: All
  chapters: [{file: book/one}, {file: notes/two}]
"""
LONG = "<p>Words that fill a page.</p>" * 200
BODIES = {
    "book/index": ("The book", "<p>Hello. <a href='one.html'>one</a></p>"),
    "book/one": ("One", f"<p>See <a href='../notes/two.html#quiz'>two</a>.</p>{LONG}"),
    "notes/two": (
        "Two",
        "<details><summary>Show</summary>Answer</details><img src='../images/a.png' alt='A'>"
        "<p><a href='#quiz'>here</a> <a href='https://example.org/x'>out</a>"
        " <a href='../book/missing.html'>gone</a></p>"
        "<label for='quiz'>a label</label><div class='live-model'><button>Load</button></div>",
    ),
}


@pytest.fixture
def html(tmp_path):
    for name, (title, body) in BODIES.items():
        path = tmp_path / "html" / f"{name}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PAGE.format(title=title, name=path.stem, body=body), encoding="utf-8")
    (tmp_path / "_toc.yml").write_text(TOC)
    return tmp_path / "html"


@pytest.fixture
def document(html):
    printed = pdf.Printed(html, pdf.contents(html.parent / "_toc.yml"))
    printed.document({}, "a draft")
    return BeautifulSoup(printed.document({"page--book--one": 7}, "Version 1"), "html.parser")


def test_each_page_stands_once_and_in_order(document):
    assert [h.get_text() for h in document.select(".page h1")] == ["The book", "One", "Two"]
    assert not document.select("nav:not(.book-contents), .headerlink, .live-model")
    assert document.select_one("details").has_attr("open")


def test_no_two_elements_share_an_id(document):
    ids = [element["id"] for element in document.select("[id]")]
    assert len(ids) == len(set(ids)) and "one" in ids
    assert document.select_one("label")["for"] == "notes--two--quiz"


def test_links_lead_inside_the_document(document):
    links = {a.get_text(): a["href"] for a in document.select(".page a")}
    assert links == {
        "one": "#page--book--one",
        "two": "#notes--two--quiz",
        "here": "#notes--two--quiz",
        "out": "https://example.org/x",
        "gone": "../book/missing.html",
    }
    ids = {element["id"] for element in document.select("[id]")}
    assert {link[1:] for link in links.values() if link.startswith("#")} <= ids


def test_files_are_found_from_the_root_of_the_pages(document):
    assert document.select_one("img")["src"] == "images/a.png"
    assert document.select_one("link")["href"] == "style.css"


def test_the_contents_name_parts_pages_and_numbers(document):
    lines = [line.get_text(" ") for line in document.select(".book-contents li, .book-contents p")]
    assert lines == ["The book", "All", "One 7", "Two"]
    assert "Version 1" in document.select_one("header").get_text()


def test_what_is_missing_is_said(html, tmp_path, monkeypatch):
    with pytest.raises(pdf.PdfError, match="book/index.html is not there; run `make book` first"):
        pdf.make(tmp_path, tmp_path / "_toc.yml", tmp_path / "x.pdf", "")
    monkeypatch.setattr(pdf, "chromium", lambda: None)
    with pytest.raises(pdf.PdfError, match="Chromium is not installed"):
        pdf.make(html, tmp_path / "_toc.yml", tmp_path / "x.pdf", "")


def test_a_printed_book_has_bookmarks_links_and_the_right_numbers(html, tmp_path):
    pytest.importorskip("playwright", reason="needs pip install -e '.[browser]'")
    pypdf = pytest.importorskip("pypdf", reason="needs pip install -e '.[browser]'")
    if not pdf.chromium():
        pytest.skip("needs Chromium (or $CHROMIUM, its path): not found")
    output = tmp_path / "book.pdf"
    count = pdf.make(html, tmp_path / "_toc.yml", output, "Version 1")
    reader = pypdf.PdfReader(output)
    assert count == len(reader.pages) > 5 and not (html / "_print.html").exists()
    texts = [page.extract_text() for page in reader.pages]
    numbers = pdf.numbers(output)
    for title, key in (("One", "page--book--one"), ("Two", "page--notes--two")):
        assert texts[numbers[key] - 1].startswith(title)
        assert f"{title}\n{numbers[key]}" in texts[1] or f"{title} {numbers[key]}" in texts[1]
    titles = []

    def walk(outline):
        for entry in outline:
            walk(entry) if isinstance(entry, list) else titles.append(entry.title)

    walk(reader.outline)
    assert {"One", "Two", "Quiz"} <= {*titles}
