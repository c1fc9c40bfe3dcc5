"""The table of chapters is the book's, and a late learner gets what the earlier ones build."""

import re

import nbformat
import pytest
from tools import sync
from tools.chapters import NOTEBOOKS, ROOT

from modernbert_mini import checks, geglu, rope, start_at
from modernbert_mini.chapters import CHAPTERS, built


def test_titles_and_notebooks_are_those_of_the_book():
    written = {}
    for path in NOTEBOOKS:
        first = nbformat.read(path, as_version=4).cells[0].source
        number, title = re.match(r"# (\d+) · (.+)", first).groups()
        written[int(number)] = (title, path.stem)
    there = {n: (c.title, c.notebook) for n, c in CHAPTERS.items() if n in written}
    assert there == written


def test_chapters_to_come_are_named_as_the_readme_names_them():
    rows = re.findall(
        r"^\| (\d+) \| \[?([^|\]]+?)(?:\]\S+)? \|", (ROOT / "README.md").read_text(), re.M
    )
    assert {int(n): title for n, title in rows} == {n: c.title for n, c in CHAPTERS.items()}


def test_the_record_of_pieces_is_what_the_chapters_build():
    package = ROOT / "modernbert_mini"
    recorded = (package / sync.RECORD).read_text(encoding="utf-8")
    assert recorded == sync.built(NOTEBOOKS, package), "run make sync"


def test_a_late_learner_gets_the_packages_own_pieces():
    mine = {}
    start = start_at(6, mine)
    assert mine["rotate_half"] is rope.rotate_half and mine["GeGLU"] is geglu.GeGLU
    assert [*start.brought] == [2, 3, 4, 5] and "apply_rotary" in start.brought[3]
    assert not start.kept and "banded_attention" not in mine
    names = [name for names in start.brought.values() for name in names]
    assert names == [*mine]


def test_the_names_land_where_it_is_called():
    here = {}
    exec("from modernbert_mini import start_at\nstart_at(4)", here)
    assert here["rotate_half"] is rope.rotate_half


def test_what_the_notebook_has_already_stays():
    def own(x):
        return x

    mine = {"rotate_half": own}
    start = start_at(4, mine)
    assert mine["rotate_half"] is own and start.kept == ["rotate_half"]
    assert "rotate_half" not in start.brought[3]
    assert (
        "Left as you had them: rotate_half." in repr(start) and "rotate_half" in start._repr_html_()
    )


def test_twice_is_as_good_as_once():
    mine = {}
    assert start_at(6, mine) == start_at(6, mine)


def test_it_says_what_came_from_where():
    start = start_at(4, {})
    assert repr(start).splitlines()[0] == "You start at chapter 4, GeGLU (04_geglu.ipynb)."
    assert "   3 Rotary position embeddings: inverse_frequencies, " in repr(start)
    assert "<code>rotate_half</code>" in start._repr_html_()
    assert repr(start_at(1, {})) == (
        "You start at chapter 1, From BERT to ModernBERT (01_tour.ipynb)."
    )


@pytest.mark.parametrize("chapter", [0, 17, -1])
def test_a_chapter_that_is_not_there_is_refused(chapter):
    with pytest.raises(ValueError, match=f"no chapter {chapter}: the book has 1 to 16"):
        start_at(chapter, {})


@pytest.mark.parametrize("chapter", ["6", 6.0, True, None])
def test_what_is_no_number_of_a_chapter_is_refused(chapter):
    with pytest.raises(TypeError, match="number of a chapter"):
        start_at(chapter, {})


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_chapter_can_be_the_first(chapter):
    mine = {}
    start_at(chapter, mine)
    assert set(mine) >= {name for n in range(1, chapter) for name in built(n)}


def test_every_exercise_belongs_to_a_chapter():
    assert {int(number.split(".")[0]) for number in checks.EXERCISES} <= set(CHAPTERS)
