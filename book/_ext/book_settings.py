"""What `_config.yml` cannot say without saying it twice, and the tables that a build generates."""

import json
import re
from pathlib import Path

import explorer_data
import status_page
import teaching
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config

from modernbert_mini import plots

ROOT = Path(__file__).resolve().parents[2]
# The explorer of a chapter, by its label in book/explorers.md and book/live.md.
EXPLORED = {
    "notebooks/01_tour": "live-model",
    "notebooks/02_tokenizer": "explore-tokens",
    "notebooks/03_rope": "explore-rope",
    "notebooks/05_attention": "live-model",
    "notebooks/06_alternating_attention": "explore-window",
    "notebooks/07_unpadding": "explore-padding",
    "notebooks/08_flash_attention": "explore-tiles",
}
MENDED = {
    # ARIA has retired the role; an entry of the bibliography stands in a list.
    'role="doc-biblioentry"': 'role="listitem"',
    # A box to tick has no name of its own.
    '<input class="task-list-item-checkbox"': (
        '<input aria-label="done" class="task-list-item-checkbox"'
    ),
}


def settle(app: Sphinx, config: Config) -> None:
    """Adjust what Jupyter Book derived, keeping the rest of its options."""
    # The theme would show a second search bar above the page.
    config.html_theme_options["navbar_persistent"] = []
    config.html_theme_options["home_page_in_toc"] = True
    config.html_context["default_mode"] = "auto"
    # No chapter shows a widget that needs a running kernel, and these scripts live on a CDN.
    config.nb_ipywidgets_js = {}


def write_pages(app: Sphinx) -> None:
    """Write what pages include: costs, status, plans for teaching, data of the explorers."""
    recorded = ROOT / "modernbert_mini" / "recorded" / "costs.json"
    costs = json.loads(recorded.read_text("utf-8")) if recorded.is_file() else {}
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    pages = {
        "costs.md": plots.cost_table(costs),
        "status.md": status_page.page(notebooks, costs),
        "explorers.html": explorer_data.page(),
        **teaching.pages(ROOT / "notebooks"),
    }
    folder = ROOT / "book" / "_generated"
    folder.mkdir(exist_ok=True)
    for name, text in pages.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


def link_explorer(app: Sphinx, doctree: nodes.document) -> None:
    """Lead from a chapter to its explorer, below what opens it.

    The notebook does not say it: an explorer is a part of the rendered book, not of Colab.
    """
    label = EXPLORED.get(app.env.docname)
    opening = next(doctree.findall(nodes.paragraph), None)
    if label and opening:
        words = nodes.inline("", "See it move", classes=["std-ref"])
        link = addnodes.pending_xref(
            "",
            words,
            refdomain="std",
            reftype="ref",
            reftarget=label,
            refexplicit=True,
            refwarn=True,
        )
        link["refdoc"] = app.env.docname
        opening.parent.insert(opening.parent.index(opening) + 1, nodes.paragraph("", "", link))


def drop_thebe(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Leave out the scripts of live code: they come from a CDN, and declare a name twice."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script}{getattr(script, 'attributes', '')}".lower()
    ]


def mend(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Set right what a screen reader stumbles over in the HTML of docutils and MyST."""
    for old, new in MENDED.items():
        context["body"] = context.get("body", "").replace(old, new)


def spare_prose(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]):
    """Keep napoleon, which runs next, from reading prose as markup."""
    # "(*positions.shape, D)" starts no italics.
    lines[:] = [re.sub(r"(?<=[(, ])\*(?=\w)", r"\\*", line) for line in lines]
    # What stands before a colon in a property's first line is no type.
    if what == "property":
        lines[:0] = ["..", ""]  # an empty comment


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", settle)
    app.connect("builder-inited", write_pages)
    app.connect("doctree-read", link_explorer)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("html-page-context", mend)
    app.connect("autodoc-process-docstring", spare_prose, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
