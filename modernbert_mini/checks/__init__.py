"""Checks for the exercises of the book, one module per chapter: `checks.rope.rotate_half(answer)`.

A new chapter adds its module to this folder and nothing else. `EXERCISES` maps the number of
each exercise to its title, difficulty and minutes, in the order of the book.
"""

import importlib
import pkgutil

from modernbert_mini.checks import _machinery
from modernbert_mini.checks._machinery import CheckResult, Exercise, Hint

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

EXERCISES: dict[str, Exercise] = dict(
    sorted(_machinery.EXERCISES.items(), key=lambda item: [int(n) for n in item[0].split(".")])
)

__all__ = ["EXERCISES", "CheckResult", "Exercise", "Hint"]
