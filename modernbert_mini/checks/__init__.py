"""Checks for the exercises of the book, one module per chapter: `checks.rope.rotate_half(answer)`.

A new chapter adds its module to this folder and nothing else. `EXERCISES` maps the number of
each exercise to its title, difficulty and minutes, in the order of the book. `progress()` shows
which of them are done.
"""

import importlib
import pkgutil

from modernbert_mini.checks import _machinery, _progress
from modernbert_mini.checks._machinery import CheckResult, Exercise, Hint
from modernbert_mini.checks._progress import Progress

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

EXERCISES: dict[str, Exercise] = dict(
    sorted(_machinery.EXERCISES.items(), key=lambda item: [int(n) for n in item[0].split(".")])
)


def progress(chapter: int | None = None) -> Progress:
    """The exercises that you have done and those still open, of the book or of one chapter.

    A check that passes is kept at once, in a file of your own; `MODERNBERT_PROGRESS` may name
    another file, or say `off`. The book's own solutions do not count.

    Raises:
        ValueError: for a chapter that has no exercises.
    """
    asked = [n for n in EXERCISES if chapter is None or n.split(".")[0] == str(chapter)]
    if not asked:
        raise ValueError(f"chapter {chapter} has no exercises")
    file = _progress.progress_file()
    done = _progress.read(file) if file else {}
    mine = {number: done[number] for number in asked if number in done}
    return Progress(tuple(EXERCISES[number] for number in asked), mine, file)


__all__ = ["EXERCISES", "CheckResult", "Exercise", "Hint", "Progress", "progress"]
