"""What every exercise check does, whatever it is handed."""

import re

import pytest
import torch

from modernbert_mini import checks
from modernbert_mini.checks import _machinery
from modernbert_mini.checks._machinery import CheckResult, exercise, expect, expect_close
from modernbert_mini.checks._machinery import expect_tensor as expect_a_tensor


@pytest.fixture
def double(monkeypatch):
    """A check of one function that should double a number."""
    monkeypatch.setattr(_machinery, "EXERCISES", {})

    @exercise("0.1", "Double <it>", difficulty=2, minutes=5)
    def check(answer):
        expect(answer(2) == 4, "Is `2` doubled & added?\nOr squared?")
        expect(answer(3) == 6, "Does 3 work?")
        return "Twice as much."

    return check


def test_a_right_answer_passes(double):
    result = double(lambda x: 2 * x)
    assert result and result.passed and result.message == "Twice as much."
    assert repr(result).startswith("✓ passed · Exercise 0.1")


def test_the_first_hint_that_fires_is_the_message(double):
    result = double(lambda x: x + 5)
    assert not result and result.written and result.message.startswith("Is `2` doubled")
    assert double(lambda x: x * x).message == "Does 3 work?"


def stub(x):
    raise NotImplementedError


@pytest.mark.parametrize(
    "answer", [None, ..., stub, lambda x: None, lambda x: ..., lambda x: (x, None)]
)
def test_a_stub_is_not_written_yet(double, answer):
    result = double(answer)
    assert not result and not result.written and result.message.startswith("Not written yet.")


def test_a_forgotten_return_is_asked_about(double):
    def forgets(x):
        x = 2 * x

    assert "`forgets` returns `None`" in double(forgets).message


def test_an_error_names_the_learners_own_line(double):
    def broken(x):
        y = x + 1
        return torch.zeros(2) @ torch.zeros(3, y)

    message = double(broken).message
    line = broken.__code__.co_firstlineno + 2
    assert f"on line {line} of `broken`: `return torch.zeros(2) @ torch.zeros(3, y)`" in message
    assert "RuntimeError" in message


def test_an_error_deep_in_a_library_still_names_the_learners_line(double):
    def deep(x):
        return torch.nn.Linear(2, 2)(torch.zeros(3))

    assert "`return torch.nn.Linear(2, 2)(torch.zeros(3))`" in double(deep).message


def test_an_error_of_torch_that_is_not_implemented_is_no_stub(double):
    def unsupported(x):
        raise NotImplementedError('"cos" not implemented for "Int"')

    assert double(unsupported).written


def test_what_is_no_function_does_not_raise(double):
    result = double(3)
    assert not result and result.written and "TypeError" in result.message


def test_the_card_escapes_and_sets_code(double):
    card = double(lambda x: x + 5)._repr_html_()
    assert "Double &lt;it&gt;" in card and "<code>2</code> doubled &amp; added?<br>" in card
    assert "color:inherit" in card  # readable in light and in dark


def test_the_three_outcomes_look_different(double):
    cards = [double(answer)._repr_html_() for answer in (lambda x: 2 * x, lambda x: x, None)]
    assert len({re.search(r"solid (rgb\([^)]+\))", card)[1] for card in cards}) == 3
    assert len({re.search(r"<b>(.+?)</b>", card)[1] for card in cards}) == 3


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1.0, 2.0], "type `list`"),
        (torch.zeros(3), "`(2,)`, got `(3,)`"),
        (torch.zeros(2).double(), "got `torch.float64`"),
        (torch.tensor([0.0, float("nan")]), "NaN"),
    ],
)
def test_expect_tensor_says_what_it_got(value, said):
    with pytest.raises(checks.Hint, match=re.escape(said)):
        expect_a_tensor(value, (2,), torch.float32)


def test_expect_close_recognises_mistakes_in_order():
    right, wrong = torch.ones(3), torch.zeros(3)
    expect_close(right + 1e-7, right, [], "other")
    for value, said in ((wrong, "first"), (wrong + 5, "other"), (torch.ones(2), "other")):
        with pytest.raises(checks.Hint, match=said):
            expect_close(value, right, [(wrong, "first"), (wrong, "second")], "other")


def test_the_registry_is_complete_and_in_order():
    numbers = [[int(n) for n in number.split(".")] for number in checks.EXERCISES]
    assert numbers == sorted(numbers) and numbers
    assert len(numbers) == len(_machinery.EXERCISES)
    for number, one in checks.EXERCISES.items():
        assert one.number == number and 1 <= one.difficulty <= 3 and one.minutes > 0
        assert one.heading.startswith(f"Exercise {number} · {one.title}  ({one.stars} · ")


def test_a_check_knows_its_exercise(double):
    assert double.exercise.stars == "★★☆"
    assert isinstance(double(None), CheckResult)
