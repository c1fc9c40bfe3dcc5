"""Each exercise of chapter 3: the solution passes, and each mistake gets its own hint."""

import math

import pytest
import torch

from modernbert_mini import attention, checks, rope


def halves(x):
    return x.chunk(2, dim=-1)


def relative_score(q, k, distance, inv_freq):
    return q @ turned(k, distance, inv_freq)


def turned(x, position, inv_freq):
    return rope.apply_rotary(x, *rope.rotary_table(torch.tensor(position), inv_freq))


def stretched(head_dim, theta, trained, wanted):
    return rope.inverse_frequencies(head_dim, theta, max(1.0, wanted / trained))


SOLUTIONS = {
    "rotate_half": rope.rotate_half,
    "inverse_frequencies": rope.inverse_frequencies,
    "rotary_table": rope.rotary_table,
    "relative_score": relative_score,
    "apply_rotary": rope.apply_rotary,
    "stretched_frequencies": stretched,
}


# ---- rotate_half ----


def neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def in_place(x):
    a, b = (half.clone() for half in halves(x))
    x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :] = -b, a
    return x


def minus_on_the_wrong_half(x):
    a, b = halves(x)
    return torch.cat((b, -a), dim=-1)


def no_minus(x):
    return x.roll(x.shape[-1] // 2, dims=-1)


def not_swapped(x):
    a, b = halves(x)
    return torch.cat((-a, b), dim=-1)


def half_lost(x):
    return -halves(x)[1]


def written_size(x):
    return torch.cat((-x[..., 4:], x[..., :4]), dim=-1)


def wrong_dim(x):
    a, b = x.chunk(2, dim=0)
    return torch.cat((-b, a), dim=0)


def widened(x):
    return rope.rotate_half(x).float()


# ---- inverse_frequencies ----


def exponents(head_dim):
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def growing(head_dim, theta):
    return theta ** exponents(head_dim)


def half_exponent(head_dim, theta):
    return theta ** -(exponents(head_dim) / 2)


def exponent_not_divided(head_dim, theta):
    return theta ** -torch.arange(0, head_dim, 2, dtype=torch.float32)


def to_the_end(head_dim, theta):
    return theta ** -torch.linspace(0, 1, head_dim // 2)


def from_one(head_dim, theta):
    return theta ** -(exponents(head_dim) + 2 / head_dim)


def common_logarithm(head_dim, theta):
    return torch.exp(-exponents(head_dim) * math.log10(theta))


def per_dimension(head_dim, theta):
    return theta ** -(torch.arange(head_dim) / head_dim)


def double_precision(head_dim, theta):
    return rope.inverse_frequencies(head_dim, theta).double()


def theta_ignored(head_dim, theta):
    return rope.inverse_frequencies(head_dim, 10_000.0)


def as_wavelengths(head_dim, theta):
    return 2 * math.pi / rope.inverse_frequencies(head_dim, theta)


def full_circles(head_dim, theta):
    return 2 * math.pi * rope.inverse_frequencies(head_dim, theta)


def slow_first(head_dim, theta):
    return rope.inverse_frequencies(head_dim, theta).flip(0)


def a_list(head_dim, theta):
    return rope.inverse_frequencies(head_dim, theta).tolist()


# ---- rotary_table ----


def one_tensor(positions, inv_freq):
    return rope.rotary_table(positions, inv_freq)[0]


def half_width(positions, inv_freq):
    angles = positions[..., None] * inv_freq
    return angles.cos(), angles.sin()


def on_its_side(positions, inv_freq):
    return tuple(t.T for t in rope.rotary_table(positions, inv_freq))


def sine_first(positions, inv_freq):
    return rope.rotary_table(positions, inv_freq)[::-1]


def each_repeated(positions, inv_freq):
    angles = (positions[..., None] * inv_freq).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def counted(positions, inv_freq):
    return rope.rotary_table(torch.arange(len(positions)), inv_freq)


def starts_at_one(positions, inv_freq):
    return rope.rotary_table(positions + 1, inv_freq)


def degrees(positions, inv_freq):
    return rope.rotary_table(positions, inv_freq.deg2rad())


def turns_right(positions, inv_freq):
    cos, sin = rope.rotary_table(positions, inv_freq)
    return cos, -sin


def float16_positions(positions, inv_freq):
    return rope.rotary_table(positions.half(), inv_freq)


def outer(positions, inv_freq):
    angles = torch.outer(positions.float(), inv_freq)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


# ---- relative_score ----


def wrong_way(q, k, distance, inv_freq):
    return q @ turned(k, -distance, inv_freq)


def turned_both(q, k, distance, inv_freq):
    return turned(q, distance, inv_freq) @ turned(k, distance, inv_freq)


def not_summed(q, k, distance, inv_freq):
    return q * turned(k, distance, inv_freq)


def scaled(q, k, distance, inv_freq):
    return relative_score(q, k, distance, inv_freq) * len(q) ** -0.5


def distance_twice(q, k, distance, inv_freq):
    return turned(q, -distance, inv_freq) @ turned(k, distance, inv_freq)


def absolute_distance(q, k, distance, inv_freq):
    return q @ turned(k, abs(distance), inv_freq)


# ---- apply_rotary ----


def no_quarter_turn(x, cos, sin):
    return x * cos + x * sin


def minus(x, cos, sin):
    return x * cos - rope.rotate_half(x) * sin


def cosine_and_sine_swapped(x, cos, sin):
    return x * sin + rope.rotate_half(x) * cos


def pairs_neighbours(x, cos, sin):
    return x * cos + neighbours(x) * sin


def cosine_only(x, cos, sin):
    return x * cos


def overwrites(x, cos, sin):
    quarter = rope.rotate_half(x)
    x *= cos
    x += quarter * sin
    return x


def stays_wide(x, cos, sin):
    return x * cos + rope.rotate_half(x) * sin


def rounded_on_the_way(x, cos, sin):
    return x * cos.to(x.dtype) + rope.rotate_half(x) * sin.to(x.dtype)


def unturned(x, cos, sin):
    return x.clone()


class Remembers:
    """Right on its first shapes; keeps the table of its first call for ever after."""

    def __init__(self):
        self.tables = {}

    def __call__(self, x, cos, sin):
        cos, sin = self.tables.setdefault(x.shape[-2:], (cos, sin))
        return rope.apply_rotary(x, cos, sin)


# ---- stretched_frequencies ----


def multiplied(head_dim, theta, trained, wanted):
    return rope.inverse_frequencies(head_dim, theta) * max(1.0, wanted / trained)


def whole_factor(head_dim, theta, trained, wanted):
    return rope.inverse_frequencies(head_dim, theta) / max(1, wanted // trained)


def rounded_up(head_dim, theta, trained, wanted):
    return rope.inverse_frequencies(head_dim, theta) / math.ceil(wanted / trained)


def larger_base(head_dim, theta, trained, wanted):
    return rope.inverse_frequencies(head_dim, theta * wanted / trained)


def smaller_base(head_dim, theta, trained, wanted):
    return rope.inverse_frequencies(head_dim, theta * trained / wanted)


def squeezed(head_dim, theta, trained, wanted):
    return rope.inverse_frequencies(head_dim, theta, wanted / trained)


MISTAKES = {  # exercise -> mistake -> a piece of the hint that it must get
    "rotate_half": {
        neighbours: "interleaved layout",
        in_place: "change its argument",
        minus_on_the_wrong_half: "Which half gets the minus?",
        no_minus: "Where is the minus?",
        not_swapped: "Do the halves change places?",
        half_lost: "Expected `(2, 4, 8)`, got `(2, 4, 4)`",
        written_size: "wrong for one vector with D = 6",
        wrong_dim: "Along which dimension do you cut?",
        widened: "keep the dtype",
        torch.clone: "Does anything turn?",
        torch.cos: "numbers are not",
    },
    "inverse_frequencies": {
        growing: "Do your frequencies grow?",
        half_exponent: "2i/D or i/D",
        exponent_not_divided: "Is the exponent divided by D?",
        to_the_end: "Where does the exponent stop?",
        from_one: "How far does pair 0 turn",
        common_logarithm: "with the natural log",
        per_dimension: "One frequency per dimension, or per pair?",
        double_precision: "got `torch.float64`",
        theta_ignored: "Does `theta` reach your formula?",
        as_wavelengths: "tokens per turn",
        full_circles: "Where does the 2π come from?",
        slow_first: "In which order?",
        a_list: "Is your result a tensor?",
    },
    "rotary_table": {
        one_tensor: "return two tensors",
        half_width: "as wide as the vectors",
        on_its_side: "on its side",
        sine_first: "In which order do you return them?",
        each_repeated: "a a b b c c d d",
        counted: "the positions you were given",
        starts_at_one: "start at 0 or at 1",
        degrees: "Degrees or radians?",
        turns_right: "Your sines have the other sign",
        float16_positions: "half precision",
        outer: "a batch of positions",
    },
    "relative_score": {
        wrong_way: "Which side turns, and which way?",
        turned_both: "Equal turns cancel",
        not_summed: "one per dimension",
        scaled: "Dividing by √D",
        distance_twice: "counted twice",
        absolute_distance: "Does the sign of the distance count?",
    },
    "apply_rotary": {
        no_quarter_turn: "Which vector does `sin` multiply?",
        minus: "Which way do you turn?",
        cosine_and_sine_swapped: "Which of the two goes with `x`?",
        pairs_neighbours: "pair i with i + D/2, or with i + 1?",
        cosine_only: "What does the sine multiply?",
        overwrites: "write into `x`",
        stays_wide: "Which dtype comes back?",
        rounded_on_the_way: "Widen `x` to float32 first",
        unturned: "Does anything turn?",
    },
    "stretched_frequencies": {
        multiplied: "Faster or slower?",
        whole_factor: "rounded down to 1 by `//`",
        rounded_up: "Is the factor rounded up?",
        larger_base: "Did you change the base?",
        smaller_base: "Is it theta that you divide?",
        squeezed: "shorter than in training",
    },
}
CASES = [
    pytest.param(name, mistake, said, id=f"{name}-{mistake.__name__}")
    for name, mistakes in MISTAKES.items()
    for mistake, said in mistakes.items()
]


def check(name):
    return getattr(checks.rope, name)


def test_every_exercise_of_the_chapter_is_tested():
    mine = {number for number in checks.EXERCISES if number.startswith("3.")}
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


@pytest.mark.parametrize(("name", "mistake", "said"), CASES)
def test_a_mistake_gets_its_own_hint(name, mistake, said):
    result = check(name)(mistake)
    assert not result.passed and result.written
    assert said in result.message, result.message


@pytest.mark.parametrize("name", MISTAKES)
def test_no_two_mistakes_get_the_same_hint(name):
    messages = [check(name)(mistake).message for mistake in MISTAKES[name]]
    assert len(set(messages)) == len(messages)


def test_a_function_that_remembers_is_caught_by_the_real_model():
    result = check("apply_rotary")(Remembers())
    assert not result.passed and "in `mini` the logits move" in result.message


def test_the_swap_is_undone():
    before = attention.apply_rotary
    assert check("apply_rotary")(rope.apply_rotary)
    assert attention.apply_rotary is before


def test_checks_leave_the_random_state_alone():
    state = torch.random.get_rng_state()
    for name, solution in SOLUTIONS.items():
        check(name)(solution)
    assert torch.equal(torch.random.get_rng_state(), state)
