"""Which exercises a learner has done, kept in a small file of the learner's own.

The file lies in the folder that the system sets apart for data of programs, or where
`MODERNBERT_PROGRESS` says: the path of a file, or `off`. While tests run, and with them the
chapters, nothing is kept unless that variable names a file.
"""

import datetime
import html
import json
import linecache
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import platformdirs

from modernbert_mini.atomic import claiming, writing
from modernbert_mini.chapters import CHAPTERS

if TYPE_CHECKING:
    from modernbert_mini.checks._machinery import Exercise

PATIENCE = 2.0  # seconds to wait for another notebook that writes
SOLUTION = "# @title Solution"  # the first line of the book's own solutions


@dataclass(frozen=True)
class Progress:
    """Exercises done and open: text in a terminal, rich in a notebook.

    Attributes:
        exercises: those asked about, in the order of the book.
        done: number of each exercise that was done -> when it was done first, in UTC.
        file: where that is kept; None where nothing is.
    """

    exercises: tuple["Exercise", ...]
    done: dict[str, str]
    file: Path | None

    @property
    def open(self) -> list[str]:
        """Numbers of the exercises that are still to do."""
        return [e.number for e in self.exercises if e.number not in self.done]

    @property
    def head(self) -> str:
        """The whole in one line."""
        finished = [e for e in self.exercises if e.number in self.done]
        minutes = [sum(e.minutes for e in some) for some in (finished, self.exercises)]
        return (
            f"{len(finished)} of {len(self.exercises)} exercises done, "
            f"{minutes[0]} of {minutes[1]} minutes"
        )

    @property
    def foot(self) -> str:
        """Where the record is."""
        where = self.file or "nowhere: MODERNBERT_PROGRESS is off, or tests are running"
        return f"Kept in {where}"

    def chapters(self) -> Iterator[tuple[int, list["Exercise"]]]:
        """Number of a chapter, and its exercises."""
        for chapter, group in groupby(self.exercises, lambda e: int(e.number.split(".")[0])):
            yield chapter, list(group)

    def _line(self, one: "Exercise") -> str:
        mark = "✓" if one.number in self.done else "·"
        return f"{mark} {one.number} {one.title}  ({one.stars} · {one.minutes} minutes)"

    def __repr__(self) -> str:
        lines = [self.head]
        alone = len({*(number for number, _ in self.chapters())}) == 1
        for number, group in self.chapters():
            if alone:
                lines += [f"  {self._line(one)}" for one in group]
                continue
            marks = "  ".join(f"{'✓' if e.number in self.done else '·'} {e.number}" for e in group)
            lines += [f"{number:4} {CHAPTERS[number].title}", f"       {marks}"]
        return "\n".join([*lines, self.foot])

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{self.head}</b></p>"]
        for number, group in self.chapters():
            finished = sum(e.number in self.done for e in group)
            items = "".join(
                f'<li style="list-style:none">{html.escape(self._line(e))}</li>' for e in group
            )
            begun = " open" if 0 < finished < len(group) else ""
            parts.append(
                f"<details{begun}><summary>{number} · {html.escape(CHAPTERS[number].title)}: "
                f"{finished} of {len(group)}</summary><ul>{items}</ul></details>"
            )
        return "".join(parts) + f"<p><small>{html.escape(self.foot)}</small></p>"


def progress_file() -> Path | None:
    """Where the done exercises are kept; None where nothing is to be kept."""
    if named := os.environ.get("MODERNBERT_PROGRESS"):
        return None if named == "off" else Path(named).expanduser()
    if "PYTEST_VERSION" in os.environ:  # pytest sets it, and the kernels of nbmake inherit it
        return None
    return platformdirs.user_data_path("modernbert-mini", appauthor=False) / "progress.json"


def read(path: Path) -> dict[str, str]:
    """Number of each done exercise -> when it was done first, in UTC.

    A file that is no record of progress is moved aside, with a warning, so that nothing of it is
    lost and the next exercise can be kept.

    Raises:
        OSError: where the file cannot be read.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        done = json.loads(raw)["done"]
        if all(isinstance(part, str) for item in done.items() for part in item):
            return done
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    aside = path.with_name(f"{path.name}.unreadable")
    os.replace(path, aside)
    warnings.warn(f"{path} is no record of progress; it is now {aside}", stacklevel=2)
    return {}


def keep(number: str, path: Path) -> None:
    """Keep that an exercise is done; the first time counts.

    Raises:
        OSError: where the file cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        done = read(path)
        if number in done:
            return
        done[number] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with writing(path) as file:
            file.write(json.dumps({"version": 1, "done": done}, indent=1).encode() + b"\n")


def passed(number: str, caller: FrameType) -> None:
    """Keep a passed exercise, unless it is the book's own solution that has passed.

    Never raises: where nothing can be kept, a warning says why.
    """
    path = progress_file()
    if path is None or linecache.getline(caller.f_code.co_filename, 1).startswith(SOLUTION):
        return
    try:
        keep(number, path)
    except OSError as error:
        warnings.warn(f"exercise {number} is done, but that was not kept: {error}", stacklevel=3)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other notebooks from writing; wait for one that does."""
    until = time.monotonic() + PATIENCE
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(claiming(folder))
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        yield
