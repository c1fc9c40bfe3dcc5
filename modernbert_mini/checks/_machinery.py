"""The machinery behind the exercises: a check asks questions, and answers instead of raising.

A check is a function of the learner's answer. Its body goes from basic to subtle and calls
`expect(condition, hint)`; the first hint that fires names the mistake. `@exercise` runs the body,
turns whatever happens into a `CheckResult`, and keeps the exercise in a registry; that an answer
passed goes into the learner's record.
"""

import functools
import html
import inspect
import linecache
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from modernbert_mini.checks import _progress

EXERCISES: dict[str, "Exercise"] = {}  # number -> exercise; checks/__init__.py sorts it

_PACKAGE = str(Path(__file__).parent.parent)
_NOT_THE_LEARNERS = (_PACKAGE, *{sysconfig.get_path(p) for p in ("stdlib", "purelib", "platlib")})


class Hint(Exception):
    """What a check says to the learner; its text asks the diagnostic question."""


class NotWritten(Exception):
    """The answer is still a stub: it is, or returned, `None` or `...`."""


@dataclass(frozen=True)
class Exercise:
    """Number, title and cost of one exercise; `difficulty` runs from 1 to 3."""

    number: str
    title: str
    difficulty: int
    minutes: int

    @property
    def stars(self) -> str:
        """The difficulty as three stars, filled from the left."""
        return "★" * self.difficulty + "☆" * (3 - self.difficulty)

    @property
    def heading(self) -> str:
        """The line that heads the exercise in its notebook."""
        return f"Exercise {self.number} · {self.title}  ({self.stars} · {self.minutes} minutes)"


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check: true when passed, rich in a notebook, one line elsewhere."""

    exercise: Exercise
    passed: bool
    message: str
    written: bool = True

    def __bool__(self) -> bool:
        return self.passed

    @property
    def verdict(self) -> str:
        """The outcome in a few words."""
        return "✓ passed" if self.passed else "→ not there yet" if self.written else "✎ to do"

    def __repr__(self) -> str:
        head = f"{self.verdict} · Exercise {self.exercise.number} {self.exercise.title}"
        return f"{head}\n  {self.message}" if self.message else head

    def _repr_html_(self) -> str:
        # Text and background are the host page's own, so the card reads in light and in dark; only
        # the bar and a faint tint carry colour, and the verdict says the same in words.
        colour = "0,158,115" if self.passed else "213,94,0" if self.written else "86,180,233"
        message = html.escape(self.message, quote=False).replace("\n", "<br>")
        message = re.sub(r"`([^`]+)`", r"<code>\1</code>", message)
        return (
            f'<div style="border-left:5px solid rgb({colour});background:rgba({colour},.12);'
            'color:inherit;padding:.6em 1em;margin:.4em 0;border-radius:4px;line-height:1.5">'
            f"<b>{self.verdict}</b> · Exercise {self.exercise.number} "
            f"{html.escape(self.exercise.title)}<br>{message}</div>"
        )


def expect(condition: object, hint: str) -> None:
    """Raise `Hint(hint)` unless `condition` holds."""
    if not condition:
        raise Hint(hint)


def expect_tensor(
    value: object,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    what: str = "your result",
) -> None:
    """Expect a tensor of this shape (and dtype, where given) without NaN in it."""
    expect(
        isinstance(value, torch.Tensor),
        f"Is {what} a tensor? The check got a value of type `{type(value).__name__}`.",
    )
    expect(
        tuple(value.shape) == tuple(shape),
        f"Which shape should {what} have? Expected `{tuple(shape)}`, got `{tuple(value.shape)}`.",
    )
    expect(
        dtype is None or value.dtype == dtype,
        f"Which dtype should {what} have? Expected `{dtype}`, got `{value.dtype}`.",
    )
    expect(
        not value.isnan().any(),
        f"Where does the NaN in {what} come from? A division by zero, or a power of a negative?",
    )


def expect_close(
    value: torch.Tensor,
    right: torch.Tensor,
    mistakes: list[tuple[torch.Tensor, str]],
    otherwise: str,
) -> None:
    """Expect the right numbers; where they are those of a known mistake, give that one's hint.

    Args:
        value: the learner's result.
        right: what it should be.
        mistakes: what each likely mistake computes, with its hint; the first that fits speaks.
        otherwise: the hint for numbers that nobody expected.
    """
    if _close(value, right):
        return
    for wrong, hint in mistakes:
        expect(not _close(value, wrong), hint)
    raise Hint(otherwise)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_shape = one.shape == other.shape
    return same_shape and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5)


def _blank(value: object) -> bool:
    if isinstance(value, tuple):
        return any(_blank(item) for item in value)
    return value is None or value is ...


def _watched(answer: object) -> object:
    """The learner's function, raising `NotWritten` where it returns nothing."""
    if _blank(answer):
        raise NotWritten("There is nothing here yet. Fill in the cell above, then run this again.")
    if not inspect.isroutine(answer):
        return answer

    @functools.wraps(answer)
    def watched(*args, **kwargs):
        result = answer(*args, **kwargs)
        if _blank(result):
            name = getattr(answer, "__name__", "it")
            raise NotWritten(
                f"`{name}` returns `{result}`. "
                "If you have written it already, is the `return` missing?"
            )
        return result

    return watched


def _where(error: Exception) -> str:
    """The last line of the learner's own code that the error passed through, in words."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*_NOT_THE_LEARNERS, "<frozen")):
            line = linecache.getline(frame.filename, frame.lineno).strip()
            return f" on line {frame.lineno} of `{frame.name}`" + (f": `{line}`" if line else "")
    return ""


def exercise(number: str, title: str, *, difficulty: int, minutes: int) -> Callable:
    """Make a check of the decorated function and register its exercise.

    The check takes the learner's answers, runs the body on them and returns a `CheckResult`. It
    never raises, so a notebook full of stubs runs from top to bottom. What the body returns, if
    anything, is the remark shown when the answer passes.
    """

    def decorate(body: Callable) -> Callable[..., CheckResult]:
        this = EXERCISES[number] = Exercise(number, title, difficulty, minutes)

        @functools.wraps(body)
        def check(*answers) -> CheckResult:
            try:
                remark = body(*map(_watched, answers))
            except Hint as hint:
                return CheckResult(this, False, str(hint))
            except NotWritten as note:
                return CheckResult(this, False, f"Not written yet. {note}", written=False)
            except Exception as error:
                # torch raises NotImplementedError too, but always with a text
                if isinstance(error, NotImplementedError) and not str(error):
                    note = "Not written yet. Replace `raise NotImplementedError` with your code."
                    return CheckResult(this, False, note, written=False)
                said = f"{type(error).__name__}: {error}".strip(": ")
                where = _where(error)
                what = f"Your code raised an error{where}" if where else "The check stopped"
                return CheckResult(this, False, f"{what}\n{said}")
            _progress.passed(number, sys._getframe(1))
            return CheckResult(this, True, remark or "")

        check.exercise = this
        return check

    return decorate
