"""The plans for teaching fit into their time, and their minutes are those of the exercises."""

import math
import re

import nbformat
import pytest
import teaching
from tools.chapters import NOTEBOOKS, ROOT

from modernbert_mini import checks
from modernbert_mini.chapters import CHAPTERS

FOLDER = ROOT / "notebooks"
PAGE = (ROOT / "book" / "teaching.md").read_text(encoding="utf-8")
each_plan = pytest.mark.parametrize("name", teaching.PLANS)


@each_plan
def test_a_plan_fits_into_its_time_and_leaves_some(name):
    plan = teaching.PLANS[name]
    start, minutes, _ = teaching.plan_rows(plan, FOLDER)[-1]
    assert 15 <= plan.minutes - (start + minutes) <= plan.minutes / 3


@each_plan
def test_the_minutes_of_exercises_are_those_of_their_checks(name):
    rows = [
        row for row in teaching.plan_rows(teaching.PLANS[name], FOLDER) if "exercises" in row[2]
    ]
    assert rows
    for _, minutes, what in rows:
        told = dict(re.findall(r"(\d+\.\d+) .*?\((\d+)\)", what))
        assert told == {n: str(checks.EXERCISES[n].minutes) for n in told}
        assert minutes == sum(map(int, told.values()))


@each_plan
def test_no_plan_sits_still_for_long(name):
    """Between two breaks or exercises nobody listens for more than an hour and a quarter."""
    talk = 0
    for _, minutes, what in teaching.plan_rows(teaching.PLANS[name], FOLDER):
        talk = talk + minutes if what.startswith("[") else 0
        assert talk <= 80, what


def test_the_page_includes_every_table():
    included = set(re.findall(r"_generated/(teaching-[\w-]+\.md)", PAGE))
    assert included == set(teaching.pages(FOLDER))


def test_the_table_of_chapters_counts_their_exercises():
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (\d+) \| (\d+) \| (\d+) \|$", "\n".join(
        teaching.chapter_table(FOLDER).splitlines()), re.M)  # fmt: skip
    there = {n for n, c in CHAPTERS.items() if (FOLDER / f"{c.notebook}.ipynb").is_file()}
    assert {int(row[0]) for row in rows} == there and len(rows) == len(NOTEBOOKS)
    for number, title, talk, count, minutes in rows:
        tasks = teaching.exercises(int(number))
        assert title == CHAPTERS[int(number)].title and int(talk) > 10
        assert (int(count), int(minutes)) == (len(tasks), sum(t.minutes for t in tasks))


def test_every_chapter_that_is_there_has_notes():
    noted = [int(n) for n in re.findall(r"^### (\d+) · ", PAGE, re.M)]
    assert noted == sorted(noted)
    assert {int(path.stem.split("_")[0]) for path in NOTEBOOKS} <= {*noted}
    for number in noted:
        assert f"### {number} · {CHAPTERS[number].title}\n" in PAGE


def test_mistakes_are_linked_to_the_section_that_plants_them():
    for notebook, anchor in re.findall(r"\.\./notebooks/([\w.]+)#([\w-]+)\)", PAGE):
        cells = nbformat.read(FOLDER / notebook, as_version=4).cells
        headings = re.findall(r"^## (.+)$", "\n".join(c.source for c in cells), re.M)
        assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    linked = set(re.findall(r"\.\./notebooks/(\d+)_\w+\.ipynb#what-", PAGE))
    assert len(linked) >= 14


# ---- how minutes are counted ----


@pytest.fixture
def chapter(tmp_path):
    new = nbformat.v4
    text = " ".join(["word"] * 366)
    cells = [
        new.new_markdown_cell(f"# 3 · Toy\n\n{text}\n\n$$x + y$$ ![a](b.png)"),
        new.new_code_cell("import x", metadata={"tags": ["setup"]}),
        new.new_markdown_cell("## Evidence: it works"),
        new.new_code_cell("\n".join(["x = 1"] * 24) + "\n\n# a comment"),
        new.new_code_cell("y = 1\n" * 99, metadata={"tags": ["hide-input"]}),
        new.new_markdown_cell("## Exercises\n\n" + text),
        new.new_code_cell("z = 1\n" * 99, metadata={"tags": ["solution"]}),
        new.new_markdown_cell("## Quiz\n\nOne?"),
    ]
    nbformat.write(new.new_notebook(cells=cells), tmp_path / "03_rope.ipynb")
    return tmp_path / "03_rope.ipynb"


def test_words_and_visible_lines_make_the_minutes(chapter):
    minutes = sum(e.minutes for n, e in checks.EXERCISES.items() if n.startswith("3."))
    assert [(s.title, s.minutes) for s in teaching.sections(chapter)] == [
        ("Opening", math.ceil((366 + 3) / 183)),
        ("Evidence: it works", 3),
        ("Exercises", minutes),
        ("Quiz", 1),
    ]


def test_a_section_that_is_not_there_stops_the_build(chapter):
    with pytest.raises(ValueError, match="chapter 3 has no section 'The question'"):
        teaching.chosen(teaching.Step(3, ("The question",)), chapter.parent)


def test_a_plan_that_is_too_long_stops_the_build():
    with pytest.raises(ValueError, match="a plan of 60 minutes takes 61"):
        teaching.plan_table(teaching.Plan(60, (teaching.Other("talk", 61),)), FOLDER)


def test_a_plan_says_what_is_left(chapter):
    plan = teaching.Plan(90, (teaching.Step(3, ("Evidence",), ("3.1",)), teaching.Other("ask", 75)))
    table = teaching.plan_table(plan, chapter.parent)
    assert "| 0:00 | 3 | [3 · Rotary position embeddings]" in table and ": Evidence (3) |" in table
    assert (
        "| 0:03 | 5 | exercises 3.1 Rotate half (5) |" in table and "| 0:08 | 75 | ask |" in table
    )
    assert table.endswith("83 minutes are planned, 7 of 90 are left over.")
