"""The plans for teaching from the book, and how long each section takes in front of a class.

An estimate, from what stands in the notebooks: words read aloud, a moment for each line of code
that a class sees. Exercises take the minutes that they state.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

from modernbert_mini.chapters import CHAPTERS
from modernbert_mini.checks import EXERCISES

# Brysbaert, "How many words do we read per minute?", 2019, doi:10.1016/j.jml.2019.104047: aloud.
WORDS_PER_MINUTE = 183
SECONDS_PER_LINE = 5  # of code; ours, and a guess
UNSEEN = {"solution", "setup", "cost", "colab-badge", "remove-cell"}
OPENING, EXERCISING = "Opening", "Exercises"
CORE = ("Opening", "The question", "The naive version", "The real version")


@dataclass(frozen=True)
class Section:
    """A section of a chapter, and its minutes: rounded up, of talk or of exercises."""

    title: str
    minutes: int


@dataclass(frozen=True)
class Step:
    """A piece of a plan: sections of a chapter, named by how they begin, and exercises."""

    chapter: int
    sections: tuple[str, ...] = CORE
    exercises: tuple[str, ...] = ()


@dataclass(frozen=True)
class Other:
    """A piece of a plan that no chapter holds."""

    what: str
    minutes: int


@dataclass(frozen=True)
class Plan:
    """What is taught, in order, and the minutes that there are for it."""

    minutes: int
    parts: tuple[Step | Other, ...]


BREAK = Other("*break*", 15)
LUNCH = Other("*lunch*", 60)
HALF_DAY = Plan(
    240,
    (
        Other("arrive, start JupyterLab, run `doctor`", 20),
        Step(
            1, ("Opening", "Run it", "The question", "Change", "The same numbers"), ("1.1", "1.3")
        ),
        BREAK,
        Step(3, (*CORE, "What breaks"), ("3.1", "3.2", "3.4", "3.5")),
        BREAK,
        Step(6, ("The question", "The naive version", "How far"), ("6.1",)),
        Other("questions, `checks.progress()`, where to go on", 15),
    ),
)
FIRST_DAY = Plan(
    480,
    (
        Other("arrive, start JupyterLab, run `doctor`", 20),
        Step(1, ("Opening", "Run it", "The question", "Change", "The same numbers"), ("1.1",)),
        Step(2, CORE, ("2.1",)),
        BREAK,
        Step(3, (*CORE, "What breaks"), ("3.1", "3.2", "3.5")),
        LUNCH,
        Step(4, CORE, ("4.1", "4.2")),
        Step(5, CORE, ("5.1", "5.2")),
        BREAK,
        Step(6, (*CORE, "How far", "What breaks"), ("6.1", "6.2")),
        Other("questions, `checks.progress()`", 15),
    ),
)
SECOND_DAY = Plan(
    480,
    (
        Other("what stayed open yesterday", 15),
        Step(7, (*CORE, "What breaks"), ("7.1", "7.2")),
        Step(8, ("The question", "The naive version", "Step by step"), ("8.1",)),
        BREAK,
        Step(10, CORE, ("10.1",)),
        LUNCH,
        Step(11, (*CORE, "What breaks"), ("11.1", "11.3")),
        Step(13, ("The question", "The naive version"), ("13.2",)),
        Step(14, ("The question", "The naive version", "What was tried"), ("14.2",)),
        BREAK,
        Step(16, ("The question", "First tool", "Third tool"), ("16.1",)),
        Other("each with a text of their own: fill masks, look inside, ask", 30),
        Other("questions, `checks.progress()`, where to go on", 15),
    ),
)
PLANS = {"half-day": HALF_DAY, "first-day": FIRST_DAY, "second-day": SECOND_DAY}


def sections(notebook: Path) -> list[Section]:
    """The sections of a chapter in their order; what stands before the first is its opening."""
    talk = {OPENING: 0.0}
    here = OPENING
    for cell in nbformat.read(notebook, as_version=4).cells:
        tags = {*cell["metadata"].get("tags", [])}
        if tags & UNSEEN:
            continue
        if cell["cell_type"] == "code":
            if "hide-input" not in tags:
                talk[here] += lines_of_code(cell["source"]) * SECONDS_PER_LINE / 60
            continue
        for part in re.split(r"^(?=## )", cell["source"], flags=re.M):
            if part.startswith("## "):
                here = part.splitlines()[0][3:].strip()
            talk[here] = talk.get(here, 0.0) + words(part) / WORDS_PER_MINUTE
    chapter = int(notebook.stem.split("_")[0])
    if EXERCISING in talk:
        talk[EXERCISING] = sum(e.minutes for e in exercises(chapter))
    return [Section(title, math.ceil(minutes)) for title, minutes in talk.items()]


def words(text: str) -> int:
    """Words that a teacher would say: no formulas, no addresses, no tags."""
    text = re.sub(r"\$\$.*?\$\$|```.*?```|<[^>]+>|\]\([^)]*\)", " ", text, flags=re.S)
    return len(re.findall(r"\w[\w'’.-]*", text))


def lines_of_code(source: str) -> int:
    """Lines that are neither empty nor a comment."""
    return sum(bool(line.strip()) and line.strip()[0] != "#" for line in source.splitlines())


def exercises(chapter: int) -> list:
    """The exercises of a chapter, as their checks are registered."""
    return [e for number, e in EXERCISES.items() if number.split(".")[0] == str(chapter)]


def chosen(step: Step, notebooks: Path) -> list[Section]:
    """The sections that a step takes; those that begin alike are put together.

    Raises:
        ValueError: for a beginning with which no section begins.
    """
    there = sections(notebooks / f"{CHAPTERS[step.chapter].notebook}.ipynb")
    found = []
    for start in step.sections:
        alike = [section for section in there if section.title.startswith(start)]
        if not alike:
            raise ValueError(f"chapter {step.chapter} has no section {start!r}")
        names = list(dict.fromkeys(short(section.title) for section in (alike[0], alike[-1])))
        found.append(Section(" … ".join(names), sum(section.minutes for section in alike)))
    return found


def plan_rows(plan: Plan, notebooks: Path) -> list[tuple[int, int, str]]:
    """Start in minutes, minutes and words of each row of a plan."""
    rows, clock = [], 0

    def add(minutes: int, what: str) -> None:
        nonlocal clock
        rows.append((clock, minutes, what))
        clock += minutes

    for part in plan.parts:
        if isinstance(part, Other):
            add(part.minutes, part.what)
            continue
        chapter = CHAPTERS[part.chapter]
        link = f"[{part.chapter} · {chapter.title}](../notebooks/{chapter.notebook}.ipynb)"
        taken = chosen(part, notebooks)
        names = ", ".join(f"{section.title} ({section.minutes})" for section in taken)
        add(sum(section.minutes for section in taken), f"{link}: {names}")
        if part.exercises:
            tasks = [EXERCISES[number] for number in part.exercises]
            names = ", ".join(f"{one.number} {one.title} ({one.minutes})" for one in tasks)
            add(sum(one.minutes for one in tasks), f"exercises {names}")
    return rows


def short(title: str) -> str:
    """A section's title without what stands behind its colon."""
    return title.split(":")[0]


def plan_table(plan: Plan, notebooks: Path) -> str:
    """A plan as a table in Markdown, with the time that is left at its end.

    Raises:
        ValueError: where it takes longer than there is time.
    """
    rows = plan_rows(plan, notebooks)
    end = rows[-1][0] + rows[-1][1]
    if end > plan.minutes:
        raise ValueError(f"a plan of {plan.minutes} minutes takes {end}")
    lines = ["| from | minutes | what |", "|--:|--:|---|"]
    lines += [f"| {clock(start)} | {minutes} | {what} |" for start, minutes, what in rows]
    spare = f"{end} minutes are planned, {plan.minutes - end} of {plan.minutes} are left over."
    return "\n".join([*lines, "", spare])


def clock(minutes: int) -> str:
    """Hours and minutes."""
    return f"{minutes // 60}:{minutes % 60:02}"


def chapter_table(notebooks: Path) -> str:
    """What each chapter takes in front of a class, as a table in Markdown."""
    lines = ["| | chapter | talk | exercises | minutes of exercises |", "|--:|---|--:|--:|--:|"]
    for number, chapter in CHAPTERS.items():
        path = notebooks / f"{chapter.notebook}.ipynb"
        if not path.is_file():
            continue
        talk = sum(s.minutes for s in sections(path) if s.title != EXERCISING)
        tasks = exercises(number)
        minutes = sum(one.minutes for one in tasks)
        lines.append(f"| {number} | {chapter.title} | {talk} | {len(tasks)} | {minutes} |")
    return "\n".join(lines)


def pages(notebooks: Path) -> dict[str, str]:
    """What `teaching.md` includes: name of a file -> its text."""
    tables = {f"teaching-{name}.md": plan_table(plan, notebooks) for name, plan in PLANS.items()}
    return tables | {"teaching-chapters.md": chapter_table(notebooks)}
