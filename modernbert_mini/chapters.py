"""The book's chapters and what each builds, and the way in for a learner who comes late."""

from __future__ import annotations

import html
import json
import sys
from dataclasses import dataclass, field
from importlib import import_module
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Chapter:
    """Title of a chapter, and its notebook without ``.ipynb``."""

    title: str
    notebook: str


CHAPTERS = {
    1: Chapter("From BERT to ModernBERT", "01_tour"),
    2: Chapter("Tokens", "02_tokenizer"),
    3: Chapter("Rotary position embeddings", "03_rope"),
    4: Chapter("GeGLU", "04_geglu"),
    5: Chapter("Attention", "05_attention"),
    6: Chapter("Alternating attention", "06_alternating_attention"),
    7: Chapter("Unpadding", "07_unpadding"),
    8: Chapter("FlashAttention", "08_flash_attention"),
    9: Chapter("Writing the kernel", "09_triton_kernel"),
    10: Chapter("The whole model", "10_model"),
    11: Chapter("Real checkpoints", "11_checkpoints"),
    12: Chapter("Pre-training", "12_pretraining"),
    13: Chapter("Fine-tuning", "13_fine_tuning"),
    14: Chapter("Speed", "14_benchmark"),
    15: Chapter("More than one machine", "15_distributed"),
    16: Chapter("Looking inside", "16_inspection"),
}


@dataclass(frozen=True)
class Start:
    """What `start_at` brought into a notebook: text in a terminal, rich in a notebook.

    Attributes:
        chapter: where the learner goes on.
        brought: number of an earlier chapter -> the names that came from it.
        kept: names that the notebook had already; they were left as they are.
    """

    chapter: int
    brought: dict[int, list[str]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    @property
    def _head(self) -> str:
        here = CHAPTERS[self.chapter]
        return f"You start at chapter {self.chapter}, {here.title} ({here.notebook}.ipynb)."

    @property
    def _foot(self) -> str:
        if not self.kept:
            return ""
        return f"Left as you had them: {', '.join(self.kept)}."

    def __repr__(self) -> str:
        lines = [self._head, "From the chapters before it you have:" if self.brought else ""]
        for number, names in self.brought.items():
            lines.append(f"{number:4} {CHAPTERS[number].title}: {', '.join(names)}")
        return "\n".join(line for line in [*lines, self._foot] if line)

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td style="text-align:right">{number}</td>'
            f'<td style="text-align:left">{html.escape(CHAPTERS[number].title)}</td>'
            f'<td style="text-align:left"><code>{"</code> <code>".join(names)}</code></td></tr>'
            for number, names in self.brought.items()
        )
        head = "<tr><th></th><th>chapter</th><th>what you have from it</th></tr>"
        table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>" if rows else ""
        return f"<p>{html.escape(self._head)}</p>{table}<p>{html.escape(self._foot)}</p>"


def start_at(chapter: int, namespace: dict[str, Any] | None = None) -> Start:
    """Bring the pieces that the earlier chapters build into a notebook: `start_at(6)`.

    They are the package's own, so what you write on top of them works as if you had built them.
    A name that the notebook uses already for something else stays as it is.

    Args:
        chapter: the number of the chapter that you want to start with, 1 to 16.
        namespace: where the names go; by default the globals of the caller.

    Returns:
        What came from where; the last line of a cell shows it.

    Raises:
        ValueError: for a number that no chapter has.
        TypeError: for what is no whole number.
    """
    if isinstance(chapter, bool) or not isinstance(chapter, int):
        raise TypeError(f"start_at takes the number of a chapter, such as 6; got {chapter!r}")
    if chapter not in CHAPTERS:
        raise ValueError(f"there is no chapter {chapter}: the book has 1 to {max(CHAPTERS)}")
    if namespace is None:
        namespace = sys._getframe(1).f_globals
    start = Start(chapter)
    for number in range(1, chapter):
        for name, piece in built(number).items():
            if namespace.get(name, piece) is piece:
                namespace[name] = piece
                start.brought.setdefault(number, []).append(name)
            else:
                start.kept.append(name)
    return start


def built(chapter: int) -> dict[str, Any]:
    """The public functions, classes and constants that a chapter builds, by name.

    They come from the package, which the cells of the chapter match; a chapter that builds
    nothing, or is still to come, has none.
    """
    recorded = files(__package__) / "recorded" / "pieces.json"
    modules = json.loads(recorded.read_text("utf-8")).get(CHAPTERS[chapter].notebook, {})
    return {
        name: getattr(import_module(f"{__package__}.{module}"), name)
        for module, names in modules.items()
        for name in names
    }
