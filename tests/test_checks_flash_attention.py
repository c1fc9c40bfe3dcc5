"""The checks of chapter 8 name each mistake."""

import math
from functools import cache

import pytest
import torch

from modernbert_mini import checks
from modernbert_mini.alternating_attention import window_mask
from modernbert_mini.attention import eager_attention

# ---- right answers ----


def parts(m, scores):
    new = torch.maximum(m, scores.amax(-1))
    safe = new.masked_fill(new.isneginf(), 0.0)
    return new, (m - safe).exp(), (scores - safe[..., None]).exp()


def update(m, total, mixed, scores, v):
    new, factor, powers = parts(m, scores)
    return new, factor * total + powers.sum(-1), factor[..., None] * mixed + powers @ v


def merge(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    a, b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]
    return a * out_a + b * out_b, lse


def tiles_in_window(length, half_window, rows, cols):
    count = 0
    for top in range(0, length, rows):
        first = max(top - half_window, 0)
        last = min(min(top + rows, length) - 1 + half_window, length - 1)
        count += last // cols - first // cols + 1
    return count


def traffic(L, D, b, rows):
    return b * (4 * L * D + 4 * L * L), b * L * D * (2 + 2 * math.ceil(L / rows))


def tiles(
    update=update,
    *,
    size=16,
    scale=True,
    start=-torch.inf,
    hidden=-torch.inf,
    safe=True,
    use_mask=True,
    flip=False,
    whole_only=False,
    square=False,
    longest=None,
):
    """Tiled attention as exercise 8.5 asks for it; each option is a mistake."""

    def attend(q, k, v, mask):
        L = q.shape[-2]
        if square:
            (q @ k.mT).relu()
        out = []
        for top in range(0, L, size):
            queries = q[..., top : top + size, :] * (q.shape[-1] ** -0.5 if scale else 1.0)
            m = torch.full_like(queries[..., 0], start)
            total, mixed = torch.zeros_like(m), torch.zeros_like(queries)
            end = L - L % size if whole_only else min(L, longest or L)
            for left in range(0, end, size):
                there = slice(left, min(left + size, end))
                scores = queries @ k[..., there, :].mT
                if mask is not None and use_mask:
                    seen = mask[..., top : top + size, there]
                    scores = scores.masked_fill(seen if flip else ~seen, hidden)
                m, total, mixed = update(m, total, mixed, scores, v[..., there, :])
            if safe:
                total = total.masked_fill(total == 0, 1.0)
            out.append(mixed / total[..., None])
        return torch.cat(out, dim=-2)

    return attend


SOLUTIONS = {
    "update": update,
    "merge": merge,
    "tiles_in_window": tiles_in_window,
    "traffic": traffic,
    "in_mini": tiles(),
}

# ---- update ----


def maximum_of_the_tile(m, total, mixed, scores, v):
    _, total, mixed = update(m, total, mixed, scores, v)
    return scores.amax(-1), total, mixed


def maximum_stays(m, total, mixed, scores, v):
    powers = (scores - m[..., None]).exp()
    return m, total + powers.sum(-1), mixed + powers @ v


def one_maximum_for_all(m, total, mixed, scores, v):
    _, total, mixed = update(m, total, mixed, scores, v)
    return torch.maximum(m, scores.max()), total, mixed


def sum_not_rescaled(m, total, mixed, scores, v):
    new, factor, powers = parts(m, scores)
    return new, total + powers.sum(-1), factor[..., None] * mixed + powers @ v


def factor_upside_down(m, total, mixed, scores, v):
    new, factor, powers = parts(m, scores)
    return new, total / factor + powers.sum(-1), mixed / factor[..., None] + powers @ v


def old_sum_lost(m, total, mixed, scores, v):
    new, factor, powers = parts(m, scores)
    return new, powers.sum(-1), factor[..., None] * mixed + powers @ v


def new_scaled_too(m, total, mixed, scores, v):
    new, factor, powers = parts(m, scores)
    return new, factor * (total + powers.sum(-1)), factor[..., None] * (mixed + powers @ v)


def tiles_own_maximum(m, total, mixed, scores, v):
    new, factor, _ = parts(m, scores)
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return new, factor * total + powers.sum(-1), factor[..., None] * mixed + powers @ v


def nothing_subtracted(m, total, mixed, scores, v):
    new, factor, _ = parts(m, scores)
    powers = scores.exp()
    return new, factor * total + powers.sum(-1), factor[..., None] * mixed + powers @ v


def accumulator_not_rescaled(m, total, mixed, scores, v):
    new, factor, powers = parts(m, scores)
    return new, factor * total + powers.sum(-1), mixed + powers @ v


def divided_too_early(m, total, mixed, scores, v):
    new, total, mixed = update(m, total, mixed, scores, v)
    return new, total, mixed / total[..., None]


def old_accumulator_lost(m, total, mixed, scores, v):
    new, factor, powers = parts(m, scores)
    return new, factor * total + powers.sum(-1), powers @ v


def minus_infinity_times_zero(m, total, mixed, scores, v):
    new, total, mixed = update(m, total, mixed, scores, v)
    return new, total + 0 * m, mixed


def nan_for_the_blind(m, total, mixed, scores, v):
    new = torch.maximum(m, scores.amax(-1))
    factor, powers = (m - new).exp(), (scores - new[..., None]).exp()
    return new, factor * total + powers.sum(-1), factor[..., None] * mixed + powers @ v


def blind_count(m, total, mixed, scores, v):
    # A hidden query gets the exponentials of 0, under a maximum of 0 that stays.
    scores = torch.where(scores.isneginf().all(-1, keepdim=True), 0.0, scores)
    return update(m, total, mixed, scores, v)


def no_heads(m, total, mixed, scores, v):
    new = torch.maximum(m, scores.amax(-1))
    safe = new.masked_fill(new.isneginf(), 0.0)
    factor, powers = (m - safe).exp(), (scores - safe[..., None]).exp()
    mixed = factor.reshape(-1, 1) * mixed.reshape(-1, mixed.shape[-1])
    new_part = powers.reshape(-1, powers.shape[-1]) @ v.reshape(-1, v.shape[-1])[: powers.shape[-1]]
    return new, factor * total + powers.sum(-1), mixed + new_part


def writes_over(m, total, mixed, scores, v):
    new, factor, powers = parts(m, scores)
    mixed *= factor[..., None]
    return new, factor * total + powers.sum(-1), mixed + powers @ v


def two_things(m, total, mixed, scores, v):
    return update(m, total, mixed, scores, v)[1:]


# ---- merge ----


def equal_halves(out_a, lse_a, out_b, lse_b):
    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)


def added(out_a, lse_a, out_b, lse_b):
    return out_a + out_b, torch.logaddexp(lse_a, lse_b)


def by_count(out_a, lse_a, out_b, lse_b):
    return 0.75 * out_a + 0.25 * out_b, torch.logaddexp(lse_a, lse_b)


def logarithm_as_weight(out_a, lse_a, out_b, lse_b):
    a = (lse_a / (lse_a + lse_b))[..., None]
    return a * out_a + (1 - a) * out_b, torch.logaddexp(lse_a, lse_b)


def exchanged(out_a, lse_a, out_b, lse_b):
    return merge(out_a, lse_b, out_b, lse_a)


def not_divided(out_a, lse_a, out_b, lse_b):
    mixed = lse_a.exp()[..., None] * out_a + lse_b.exp()[..., None] * out_b
    return mixed, torch.logaddexp(lse_a, lse_b)


def logarithms_added(out_a, lse_a, out_b, lse_b):
    return merge(out_a, lse_a, out_b, lse_b)[0], lse_a + lse_b


def larger_logarithm(out_a, lse_a, out_b, lse_b):
    return merge(out_a, lse_a, out_b, lse_b)[0], torch.maximum(lse_a, lse_b)


def no_logarithm(out_a, lse_a, out_b, lse_b):
    return merge(out_a, lse_a, out_b, lse_b)[0], lse_a.exp() + lse_b.exp()


def overflows(out_a, lse_a, out_b, lse_b):
    a, b = lse_a.exp()[..., None], lse_b.exp()[..., None]
    return (a * out_a + b * out_b) / (a + b), (a + b).log()[..., 0]


def minus_absolute(out_a, lse_a, out_b, lse_b):
    top = torch.maximum(lse_a.abs(), lse_b.abs())
    a, b = (lse_a - top).exp()[..., None], (lse_b - top).exp()[..., None]
    return (a * out_a + b * out_b) / (a + b), (a + b).log()[..., 0] + top


def needs_both(out_a, lse_a, out_b, lse_b):
    low = torch.minimum(lse_a, lse_b)
    shift = torch.maximum(lse_a, lse_b) + 0 * low
    a, b = (lse_a - shift).exp()[..., None], (lse_b - shift).exp()[..., None]
    return (a * out_a + b * out_b) / (a + b), shift + (a + b).log()[..., 0]


def result_only(out_a, lse_a, out_b, lse_b):
    return merge(out_a, lse_a, out_b, lse_b)[0]


# ---- tiles_in_window ----


def every_tile(length, half_window, rows, cols):
    return math.ceil(length / rows) * math.ceil(length / cols)


def always_three(length, half_window, rows, cols):
    return math.ceil(length / rows) * 3


def pairs(length, half_window, rows, cols):
    return window_mask(length, half_window).sum().item()


def half_the_window(length, half_window, rows, cols):
    return tiles_in_window(length, half_window // 2, rows, cols)


def ends_outside(length, half_window, rows, cols):
    return tiles_in_window(length, max(half_window - 2, 0), rows, cols)


def rounded_down(length, half_window, rows, cols):
    reach = half_window // cols
    groups = range(math.ceil(length / rows))
    last = math.ceil(length / cols) - 1
    return sum(min(g + reach, last) - max(g - reach, 0) + 1 for g in groups)


def one_beyond(length, half_window, rows, cols):
    return tiles_in_window(length, half_window + 2, rows, cols)


def first_query_only(length, half_window, rows, cols):
    count = 0
    for top in range(0, length, rows):
        last = min(top + half_window, length - 1)
        count += last // cols - max(top - half_window, 0) // cols + 1
    return count


def rows_for_columns(length, half_window, rows, cols):
    return tiles_in_window(length, half_window, rows, rows)


def rest_lost(length, half_window, rows, cols):
    return tiles_in_window(length // rows * rows, half_window, rows, cols)


def wide_window(length, half_window, rows, cols):
    if half_window >= length:
        return 0
    return tiles_in_window(length, half_window, rows, cols)


def whole_mask(length, half_window, rows, cols):
    parts = window_mask(length, half_window).split(rows)
    return sum(bool(tile.any()) for part in parts for tile in part.split(cols, dim=1))


def half_a_tile(length, half_window, rows, cols):
    return tiles_in_window(length, half_window, rows, cols) + 0.5


# ---- traffic ----


def billed(eager=None, tiled=None):
    def answer(L, D, b, rows):
        right = traffic(L, D, b, rows)
        first = right[0] if eager is None else eager(L, D, b, rows)
        return first, right[1] if tiled is None else tiled(L, D, b, rows)

    return answer


numbers_only = billed(
    lambda L, D, b, rows: 4 * L * D + 4 * L * L, lambda L, D, b, rows: L * D * (2 + 2 * L // rows)
)
square_alone = billed(lambda L, D, b, rows: b * 4 * L * L)
two_squares = billed(lambda L, D, b, rows: b * (4 * L * D + 2 * L * L))
three_squares = billed(lambda L, D, b, rows: b * (4 * L * D + 3 * L * L))
no_result = billed(lambda L, D, b, rows: b * (3 * L * D + 4 * L * L))
keys_once = billed(None, lambda L, D, b, rows: b * 4 * L * D)
keys_alone = billed(None, lambda L, D, b, rows: b * L * D * (2 + math.ceil(L / rows)))
one_way = billed(None, lambda L, D, b, rows: b * L * D * (1 + 2 * math.ceil(L / rows)))
as_many_as_rows = billed(None, lambda L, D, b, rows: b * L * D * (2 + 2 * rows))
scores_stored = billed(None, lambda L, D, b, rows: traffic(L, D, b, rows)[1] + b * L * L)
rest_forgotten = billed(None, lambda L, D, b, rows: b * L * D * (2 + 2 * (L // rows)))
written_size = billed(
    lambda L, D, b, rows: b * (4 * L * 64 + 4 * L * L),
    lambda L, D, b, rows: b * L * 64 * (2 + 2 * math.ceil(L / rows)),
)


def one_number(L, D, b, rows):
    return traffic(L, D, b, rows)[0]


# ---- in_mini ----


def mean_of_values(q, k, v, mask):
    return v.mean(-2, keepdim=True).expand_as(v)


def fused(q, k, v, mask):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def with_softmax(q, k, v, mask):
    out = []
    for i in range(0, q.shape[-2], 16):
        scores = q[..., i : i + 16, :] @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[..., i : i + 16, :], -torch.inf)
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, -2)


def with_weights(q, k, v, mask):
    return tiles()(q, k, v, mask), torch.zeros(1)


def rows_of_the_mask(q, k, v, mask):
    if mask is not None:
        mask = mask.roll(3, dims=-1)
    return tiles()(q, k, v, mask)


def batches_only(q, k, v, mask):
    B, H, L, D = q.shape
    return tiles()(q, k, v, mask)


def hidden_for_good(m, total, mixed, scores, v):
    return update(m, total, mixed, scores.clamp(min=-3.0), v)


def padded_only(q, k, v, mask):
    if mask is not None and mask.shape[-2:] == (70, 70) and mask.dim() == 2:
        mask = mask.roll(1, 0)
    return tiles()(q, k, v, mask)


MISTAKES = {  # exercise -> mistake -> a piece of the hint that it must get
    "update": {
        maximum_of_the_tile: "larger than that of the tiles before",
        maximum_stays: "Does the maximum ever move?",
        one_maximum_for_all: "Whose maximum is it?",
        sum_not_rescaled: "With which maximum were the old exponentials taken?",
        factor_upside_down: "Which way round is the factor?",
        old_sum_lost: "Where is the old sum?",
        new_scaled_too: "What is scaled?",
        tiles_own_maximum: "not that of the tile",
        nothing_subtracted: "Without it they overflow",
        accumulator_not_rescaled: "Is the accumulator rescaled as well?",
        divided_too_early: "When do you divide by the sum?",
        old_accumulator_lost: "Where is the old accumulator?",
        minus_infinity_times_zero: "What comes out of the first tile",
        nan_for_the_blind: "keys are all hidden so far",
        blind_count: "saw nothing so far",
        no_heads: "with heads in front",
        writes_over: "write into its arguments",
        two_things: "return 3 things",
    },
    "merge": {
        equal_halves: "Does each half weigh the same?",
        added: "halves sum to 1",
        by_count: "by the number of keys",
        logarithm_as_weight: "It is a logarithm",
        exchanged: "Yours are exchanged",
        not_divided: "Where is the division?",
        logarithms_added: "Can logarithms of sums be added?",
        larger_logarithm: "Is the larger one enough?",
        no_logarithm: "Is this the sum itself?",
        overflows: "exp(1000) overflows",
        minus_absolute: "without its sign",
        needs_both: "one half saw no key",
        result_only: "return 2 things",
    },
    "tiles_in_window": {
        every_tile: "Do you count all tiles?",
        always_three: "What do the first and the last queries see?",
        pairs: "Do you count pairs of tokens?",
        rounded_down: "Do you round the right way?",
        one_beyond: "expected 22, got",
        half_the_window: "W to *each* side",
        ends_outside: "Are the window's ends inside?",
        first_query_only: "Who in a tile of queries sees furthest",
        rows_for_columns: "in the right places",
        rest_lost: "What becomes of the rest?",
        wide_window: "(33, 100, 8, 8)",
        half_a_tile: "a whole number",
        whole_mask: "Do you build the whole mask?",
    },
    "traffic": {
        numbers_only: "Numbers or bytes?",
        square_alone: "What else is moved",
        two_squares: "the weights are written and read",
        three_squares: "one too few",
        no_result: "Is the result in it?",
        keys_once: "How often do keys and values come",
        keys_alone: "Keys *and* values",
        one_way: "What is moved once?",
        as_many_as_rows: "How many groups of queries",
        scores_stored: "Do the scores leave the chip?",
        rest_forgotten: "What becomes of the rest?",
        written_size: "Is a size written into your code?",
        one_number: "return two numbers",
    },
    "in_mini": {
        tiles(scale=False): "Where is the scale?",
        tiles(accumulator_not_rescaled): "the numbers are not",
        mean_of_values: "Do the scores matter at all?",
        fused: "fused kernel",
        with_softmax: "call a softmax",
        tiles(square=True): "How large is the largest tensor?",
        tiles(use_mask=False): "Does the mask do anything?",
        tiles(flip=True): "What does True mean here?",
        rows_of_the_mask: "Do you cut rows *and* columns",
        tiles(nan_for_the_blind): "maximum is still −∞",
        padded_only: "what such a tile added gone again",
        tiles(safe=False): "Its sum is 0",
        batches_only: "not enough values to unpack",
        with_weights: "return one tensor",
        tiles(longest=100): "in `mini` the logits move",
    },
}
CASES = [
    pytest.param(name, mistake, said, id=f"{name}-{i}-{mistake.__name__}")
    for name, mistakes in MISTAKES.items()
    for i, (mistake, said) in enumerate(mistakes.items())
]


def check(name):
    return getattr(checks.flash_attention, name)


def test_every_exercise_of_the_chapter_is_tested():
    mine = {number for number in checks.EXERCISES if number.startswith("8.")}
    assert mine == {check(name).exercise.number for name in SOLUTIONS}
    assert SOLUTIONS.keys() == MISTAKES.keys() and all(len(m) >= 3 for m in MISTAKES.values())


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_passes(name):
    result = check(name)(SOLUTIONS[name])
    assert result.passed, result
    assert result.message


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_stub_is_not_written_yet(name):
    def stub(*args):
        raise NotImplementedError

    for answer in (stub, ..., lambda *args: None):
        result = check(name)(answer)
        assert not result.passed and not result.written
        assert result.message.startswith("Not written yet")


@cache
def judged(name, mistake):
    """What a check says of a mistake; asked once, since some run a whole model."""
    return check(name)(mistake)


@pytest.mark.parametrize(("name", "mistake", "said"), CASES)
def test_a_mistake_gets_its_own_hint(name, mistake, said):
    result = judged(name, mistake)
    assert not result.passed and result.written
    assert said in result.message, result.message


@pytest.mark.parametrize("name", MISTAKES)
def test_no_two_mistakes_get_the_same_hint(name):
    messages = [judged(name, mistake).message for mistake in MISTAKES[name]]
    assert len(set(messages)) == len(messages)


def test_other_right_ways_pass():
    # Hidden by the lowest finite number: wiped out by the factor of the first visible key.
    assert check("in_mini")(tiles(hidden=torch.finfo(torch.float32).min))
    assert check("in_mini")(tiles(size=64))
    assert check("tiles_in_window")(lambda *sizes: float(tiles_in_window(*sizes)))


def test_the_helpers_of_the_tests_agree_with_eager():
    q, k, v = torch.randn(3, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    mask = window_mask(50, 3)
    right = eager_attention(q, k, v, mask=mask)[0]
    torch.testing.assert_close(tiles()(q, k, v, mask), right, atol=1e-6, rtol=0)


def test_checks_leave_the_random_state_alone():
    state = torch.random.get_rng_state()
    for name, solution in SOLUTIONS.items():
        check(name)(solution)
    assert torch.equal(torch.random.get_rng_state(), state)
