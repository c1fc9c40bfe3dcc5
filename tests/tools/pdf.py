"""The whole book as one PDF: `make pdf`, after `make book`.

Chromium prints the very pages that `make book` made: one document of all of them, in the order of
the contents, with links that lead from page to page, bookmarks and page numbers. Needs Chromium
and `pip install -e '.[browser]'`.
"""

import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup, Tag

ROOT = Path(__file__).resolve().parents[2]
STYLE = Path(__file__).with_name("pdf.css")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Attributes that name an element of the same page.
REFERENCES = ("for", "aria-labelledby", "aria-describedby", "aria-controls")
UNPRINTED = ".headerlink, .copybtn, .toggle-button, noscript, script[src*='live/']"
FOOTER = (
    "<div style='width:100%;text-align:center;font:8px sans-serif;color:#444'>"
    "<span class='pageNumber'></span></div>"
)


class PdfError(RuntimeError):
    """The PDF cannot be made; the message says why."""


def chromium() -> str | None:
    """The path of a Chromium, `$CHROMIUM` first; None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def contents(toc: Path) -> list[tuple[str, list[str]]]:
    """The parts of the book and their pages, without suffix; the first part has no name."""
    told = yaml.safe_load(toc.read_text("utf-8"))
    parts = [("", [told["root"]])]
    parts += [(p["caption"], [c["file"] for c in p["chapters"]]) for p in told["parts"]]
    return parts


class Printed:
    """All pages of a built book as one document.

    Args:
        html: the folder of the built pages.
        parts: from `contents`.
    """

    def __init__(self, html: Path, parts: list[tuple[str, list[str]]]):
        self.html, self.parts = html, parts
        self.names = [name for _, names in parts for name in names]
        soups = [
            BeautifulSoup((html / f"{n}.html").read_text("utf-8"), "html.parser")
            for n in self.names
        ]
        self.head = soups[0].head
        self.titles = {
            name: soup.title.get_text().split(" — ")[0]
            for name, soup in zip(self.names, soups, strict=True)
        }
        self.articles = {
            name: soup.select_one("article.bd-article")
            for name, soup in zip(self.names, soups, strict=True)
        }
        met = Counter(e["id"] for a in self.articles.values() for e in a.select("[id]"))
        self.shared = {name for name, count in met.items() if count > 1}
        for name, article in self.articles.items():
            self._settle(name, article)
        for element in self.head.select("link[href], script[src]"):
            attribute = "href" if element.name == "link" else "src"
            element[attribute] = self._local(self.names[0], element[attribute])

    def _key(self, name: str, anchor: str = "") -> str:
        """The id that an anchor of a page has in the document."""
        page = name.replace("/", "--")
        if not anchor:
            return f"page--{page}"
        return f"{page}--{anchor}" if anchor in self.shared else anchor

    def _settle(self, name: str, article: Tag) -> None:
        for element in article.select(UNPRINTED):
            element.decompose()
        for alive in article.select(".live-model"):
            note = BeautifulSoup("<p><em>Here the web pages show it alive.</em></p>", "html.parser")
            alive.replace_with(note)
        for element in article.select("[id]"):
            element["id"] = self._key(name, element["id"])
        for attribute in REFERENCES:
            for element in article.select(f"[{attribute}]"):
                keys = [self._key(name, key) for key in element[attribute].split()]
                element[attribute] = " ".join(keys)
        for link in article.select("a[href]"):
            link["href"] = self._target(name, link["href"])
        for element in article.select("[src]"):
            element["src"] = self._local(name, element["src"])
        for element in article.select("link[href]"):
            element["href"] = self._local(name, element["href"])
        for fold in article.select("details"):
            fold["open"] = ""

    def _target(self, name: str, href: str) -> str:
        """Where a link of a page leads in the document."""
        link = urlsplit(href)
        if link.scheme or link.netloc:
            return href
        to = name
        if link.path:
            path = Path(os.path.normpath((self.html / name).parent / unquote(link.path)))
            to = str(path.relative_to(self.html).with_suffix(""))
        return f"#{self._key(to, link.fragment)}" if to in self.articles else href

    def _local(self, name: str, source: str) -> str:
        """A file that a page loads, as seen from the root of the pages."""
        if urlsplit(source).scheme:
            return source
        return os.path.relpath((self.html / name).parent / source, self.html)

    def document(self, pages: dict[str, int], about: str) -> str:
        """The document, in which the contents tell these page numbers."""
        lines = [f"<p class='about'>{about}</p><nav class='book-contents'>"]
        for caption, names in self.parts:
            lines.append(f"<p>{caption}</p><ul>" if caption else "<ul>")
            for name in names:
                number = pages.get(self._key(name), "")
                link = f"<a href='#{self._key(name)}'>{self.titles[name]}</a>"
                lines.append(f"<li>{link}<span>{number}</span></li>")
            lines.append("</ul>")
        lines.append("</nav>")
        inside = [
            f"<div class='page' id='{self._key(name)}'>{article.decode_contents()}</div>"
            for name, article in self.articles.items()
        ]
        # The first page is the title's; the contents stand after it.
        cover = f"<header><h1>{self.titles[self.names[0]]}</h1>{''.join(lines)}</header>"
        return (
            f"<!DOCTYPE html><html lang='en' data-theme='light'><head>{self.head.decode_contents()}"
            f"<style>{STYLE.read_text('utf-8')}</style></head><body><div class='bd-content'>"
            f"<article class='bd-article'>{cover}{''.join(inside)}</article></div></body></html>"
        )


def numbers(pdf: Path) -> dict[str, int]:
    """The page on which each target of a link stands."""
    from pypdf import PdfReader

    reader = PdfReader(pdf)
    found = {}
    for name, destination in reader.named_destinations.items():
        found[name.lstrip("/")] = reader.get_destination_page_number(destination) + 1
    return found


def make(html: Path, toc: Path, output: Path, about: str) -> int:
    """Print the book; returns how many pages it has.

    Raises:
        PdfError: where there is no book, no Chromium, or no driver for it.
    """
    parts = contents(toc)
    for name in (name for _, names in parts for name in names):
        if not (html / f"{name}.html").is_file():
            raise PdfError(f"{name}.html is not there; run `make book` first")
    if not chromium():
        raise PdfError("Chromium is not installed (Debian: apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
        from pypdf import PdfReader
    except ImportError as error:
        raise PdfError(f"{error.name} is missing: pip install -e '.[browser]'") from error
    printed, draft = Printed(html, parts), html / "_print.html"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            pages: dict[str, int] = {}
            # Twice: only a printed book knows its page numbers.
            for _ in range(2):
                draft.write_text(printed.document(pages, about), encoding="utf-8")
                page = browser.new_page(viewport={"width": 760, "height": 1000})
                page.set_default_timeout(600_000)
                page.goto(draft.as_uri())
                page.evaluate("async () => { await window.MathJax?.startup?.promise }")
                page.pdf(
                    path=output,
                    format="A4",
                    outline=True,
                    tagged=True,
                    print_background=True,
                    display_header_footer=True,
                    header_template="<span></span>",
                    footer_template=FOOTER,
                    margin={"top": "18mm", "bottom": "18mm", "left": "17mm", "right": "17mm"},
                )
                page.close()
                pages = numbers(output)
        finally:
            browser.close()
            draft.unlink(missing_ok=True)
    return len(PdfReader(output).pages)


def main(arguments: list[str]) -> int:
    """Print the book of this repository to `_build/modernbert-from-scratch.pdf`."""
    from modernbert_mini import __version__, benchmark

    html = Path(arguments[0]) if arguments else ROOT / "_build" / "html"
    output = html.parent / "modernbert-from-scratch.pdf"
    about = f"Version {__version__}, commit {benchmark.own_commit() or 'unknown'}"
    try:
        count = make(html.resolve(), ROOT / "_toc.yml", output, about)
    except PdfError as error:
        print(f"No PDF: {error}.", file=sys.stderr)
        return 1
    print(f"{count} pages: file://{output.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
