"""What a learner has done is kept, survives what may happen to a file, and is shown."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from modernbert_mini import checks
from modernbert_mini.checks import _progress

RIGHT = "def mine(x):\n    a, b = x.chunk(2, dim=-1)\n    return torch.cat((-b, a), dim=-1)\n\n\n"
CHECK = "checks.rope.rotate_half(mine)"


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "learner" / "progress.json"
    monkeypatch.setenv("MODERNBERT_PROGRESS", str(path))
    return path


def answer(right: bool) -> checks.CheckResult:
    import torch

    names = {"checks": checks, "torch": torch}
    exec(RIGHT if right else "def mine(x):\n    return x", names)
    return eval(CHECK, names)


def done(file: Path) -> list[str]:
    return [*json.loads(file.read_text())["done"]]


def test_passing_a_check_keeps_it(file):
    assert answer(right=True)
    assert done(file) == ["3.1"]
    progress = checks.progress()
    assert [*progress.done] == ["3.1"] and "3.1" not in progress.open and "3.2" in progress.open


def test_a_wrong_answer_keeps_nothing_and_takes_nothing_away(file):
    assert not answer(right=False)
    assert not file.exists()
    answer(right=True)
    before = file.read_text()
    answer(right=False)
    assert file.read_text() == before


def test_the_first_time_counts(file):
    file.parent.mkdir()
    file.write_text('{"version": 1, "done": {"3.1": "2026-01-01T00:00:00+00:00"}}')
    answer(right=True)
    assert checks.progress().done == {"3.1": "2026-01-01T00:00:00+00:00"}


def test_nothing_is_kept_while_tests_run(monkeypatch):
    monkeypatch.delenv("MODERNBERT_PROGRESS", raising=False)
    assert _progress.progress_file() is None
    assert answer(right=True) and not checks.progress().done
    assert "nowhere" in repr(checks.progress())


def test_a_learner_has_a_file_of_their_own(monkeypatch):
    monkeypatch.delenv("MODERNBERT_PROGRESS", raising=False)
    monkeypatch.delenv("PYTEST_VERSION")
    path = _progress.progress_file()
    assert path.name == "progress.json" and path.parent.name == "modernbert-mini"
    assert path.is_relative_to(Path.home())
    monkeypatch.setenv("MODERNBERT_PROGRESS", "off")
    assert _progress.progress_file() is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"done": ["3.1"]}', '{"done": {"3.1": 1}}', '{"version": 1}', "\x00"],
)
def test_a_file_that_is_no_record_is_moved_aside(file, text):
    file.parent.mkdir()
    file.write_text(text)
    with pytest.warns(UserWarning, match="no record of progress"):
        answer(right=True)
    assert done(file) == ["3.1"]
    assert file.with_name("progress.json.unreadable").read_text() == text


def test_bytes_that_are_no_text_are_moved_aside(file):
    file.parent.mkdir()
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="no record"):
        assert not checks.progress().done


def test_where_nothing_can_be_written_the_check_still_answers(tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("MODERNBERT_PROGRESS", str(tmp_path / "a file" / "progress.json"))
    with pytest.warns(UserWarning, match="3.1 is done, but that was not kept"):
        assert answer(right=True)


def test_a_full_disk_leaves_the_old_record(file, monkeypatch):
    answer(right=True)
    before = file.read_text()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        _progress.keep("3.2", file)
    assert file.read_text() == before and [*file.parent.iterdir()] == [file]


def test_notebooks_that_write_at_once_lose_nothing(file):
    numbers = [n for n in checks.EXERCISES][:24]
    threads = [threading.Thread(target=_progress.keep, args=(n, file)) for n in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done(file)) == sorted(numbers)


def test_a_notebook_that_holds_the_folder_for_long_is_not_waited_for(file, monkeypatch):
    monkeypatch.setattr(_progress, "PATIENCE", 0.1)
    file.parent.mkdir()
    with (
        _progress.claiming(file.parent),
        pytest.warns(UserWarning, match="not kept: .* in use by another process"),
    ):
        assert answer(right=True)


# ---- in a notebook ----


def run_notebook(*cells: str) -> list:
    new = nbformat.v4
    book = new.new_notebook(cells=[new.new_code_cell(cell) for cell in cells])
    return NotebookClient(book, kernel_name="python3", timeout=120).execute().cells


def test_the_books_own_solution_does_not_count_but_the_learners_does(file):
    setup = "import torch\nfrom modernbert_mini import checks"
    solution = f"# @title Solution 3.1\n{RIGHT}{CHECK}"
    (out,) = run_notebook(setup, solution)[1].outputs
    assert "passed" in out.data["text/plain"] and not file.exists()
    cells = run_notebook(setup, RIGHT, CHECK, "checks.progress(3)")
    assert done(file) == ["3.1"]
    shown = cells[3].outputs[0].data
    assert "✓ 3.1 Rotate half" in shown["text/plain"] and "1 of 6" in shown["text/html"]


def test_nbmake_keeps_nothing(tmp_path):
    new = nbformat.v4
    cells = ["import torch\nfrom modernbert_mini import checks", f"{RIGHT}assert {CHECK}"]
    cells.append("assert checks.progress().file is None")
    book = new.new_notebook(cells=[new.new_code_cell(cell) for cell in cells])
    nbformat.write(book, tmp_path / "book.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-kernel=python3", "-q"]
    free = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "MODERNBERT"))}
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", tmp_path / "book.ipynb"],
        cwd=tmp_path, env=free, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout


# ---- what is shown ----


def test_the_whole_book_in_text(file):
    answer(right=True)
    text = repr(checks.progress())
    minutes = sum(e.minutes for e in checks.EXERCISES.values())
    count = len(checks.EXERCISES)
    assert text.startswith(f"1 of {count} exercises done, 5 of {minutes} minutes")
    assert "   3 Rotary position embeddings\n       ✓ 3.1  · 3.2" in text and str(file) in text


def test_one_chapter_names_its_exercises(file):
    progress = checks.progress(3)
    assert [e.number for e in progress.exercises] == progress.open
    assert all(e.title in repr(progress) for e in progress.exercises)


def test_the_rich_view_opens_the_chapter_that_was_begun(file):
    answer(right=True)
    view = checks.progress()._repr_html_()
    assert view.count("<details open>") == 1
    assert "<details open><summary>3 · Rotary position embeddings: 1 of" in view


def test_a_chapter_without_exercises_is_refused():
    with pytest.raises(ValueError, match="chapter 99 has no exercises"):
        checks.progress(99)
