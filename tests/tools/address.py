"""Carry the repository's address from `_config.yml` to everything that is derived from it.

    python tests/tools/address.py https://github.com/you/your-fork    set it, and carry it
    python tests/tools/address.py                                     carry what is set

Derived are: the Colab badge and the setup cell of every notebook, and every mention of the
repository in the README and the other pages. Launch and edit links of the book come from
`_config.yml` while it builds.
"""

import re
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"https://github\.com/([A-Za-z0-9][\w-]*/[\w.-]+)")
BADGE_IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
# Pages that mention the repository, besides the notebooks.
PAGES = ["README.md", "CONTRIBUTING.md", "CITATION.cff", "pyproject.toml", "book/*.md"]
BINDER = "https://mybinder.org"


def address(root: Path) -> str:
    """The repository's address, as `_config.yml` states it."""
    line = re.search(r"^  url: (\S+)$", (root / "_config.yml").read_text(encoding="utf-8"), re.M)
    if line is None or not ADDRESS.fullmatch(line[1]):
        raise SystemExit("_config.yml: repository.url is not https://github.com/OWNER/NAME")
    return line[1]


def slug(url: str) -> str:
    """OWNER/NAME."""
    return ADDRESS.fullmatch(url)[1]


def colab(url: str, path: str) -> str:
    """Where Colab opens a notebook of the repository."""
    return f"https://colab.research.google.com/github/{slug(url)}/blob/main/{path}"


def binder(url: str) -> str:
    """Where Binder opens the notebooks of the repository, in JupyterLab."""
    return f"{BINDER}/v2/gh/{slug(url)}/main?urlpath=lab/tree/notebooks"


def binder_badge(url: str) -> str:
    """The line that shows Binder's button."""
    return f"[![Open in Binder]({BINDER}/badge_logo.svg)]({binder(url)})"


def badge(url: str, path: str) -> str:
    """The line that shows Colab's button."""
    return f"[![Open in Colab]({BADGE_IMAGE})]({colab(url, path)})"


def setup_cell(url: str) -> str:
    """The cell that every notebook starts with: does nothing where the package is installed."""
    return (
        "try:\n"
        "    import modernbert_mini\n"
        "except ImportError:\n"
        f'    %pip install -q "modernbert-mini @ git+{url}"\n'
        "    import modernbert_mini"
    )


def opened(url: str, link: str) -> str | None:
    """The path in the repository that a launch or edit link opens; None for any other link.

    Raises:
        ValueError: for one that leads to another branch than main.
    """
    places = (url, f"https://colab.research.google.com/github/{slug(url)}")
    place = next((place for place in places if link.startswith(f"{place}/")), link)
    found = re.match(r"/(?:blob|edit|tree|raw|blame)/([^/]+)/([^?#]+)", link.removeprefix(place))
    if found is None:
        return None
    if found[1] != "main":
        raise ValueError(f"{link} leads to the branch {found[1]}, not to main")
    return unquote(found[2])


def carry(root: Path, old: str, new: str) -> list[str]:
    """Write the address wherever it belongs; return the files that changed."""
    changed = []
    config = root / "_config.yml"
    pages = [p for pattern in PAGES for p in sorted(root.glob(pattern))]
    for page in [config, *pages]:
        before = page.read_text(encoding="utf-8")
        # github.com/OWNER/NAME, Colab's …/github/OWNER/NAME/…, Binder's …/gh/OWNER/NAME/…
        mention = rf"(github\.com/|/github/|/gh/){re.escape(slug(old))}\b"
        after = re.sub(mention, rf"\g<1>{slug(new)}", before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            changed.append(str(page.relative_to(root)))
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        book = nbformat.read(notebook, as_version=4)
        before = [cell["source"] for cell in book.cells]
        for cell in book.cells:
            tags = cell["metadata"].get("tags", [])
            if "colab-badge" in tags:
                cell["source"] = badge(new, f"notebooks/{notebook.name}")
            elif "setup" in tags:
                cell["source"] = setup_cell(new)
        if before != [cell["source"] for cell in book.cells]:
            nbformat.write(book, notebook)
            changed.append(str(notebook.relative_to(root)))
    return changed


def main(arguments: list[str]) -> int:
    old = address(ROOT)
    new = arguments[0].rstrip("/").removesuffix(".git") if arguments else old
    if not ADDRESS.fullmatch(new):
        print(f"{new!r} is not of the form https://github.com/OWNER/NAME", file=sys.stderr)
        return 2
    for path in carry(ROOT, old, new):
        print(f"changed {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
