"""Each exercise of chapter 4: the solution passes, and each mistake gets its own hint."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modernbert_mini import checks, geglu


def halves(x):
    return x.chunk(2, dim=-1)


def matched_width(mlp_width, multiple):
    return max(1, round(2 * mlp_width / 3 / multiple)) * multiple


def smaller(Wi, Wo, keep):
    width = Wo.shape[1]
    return Wi[torch.cat((keep, keep + width))], Wo[:, keep]


def folded(norm_weight, Wi):
    return Wi @ norm_weight.diag()


SOLUTIONS = {
    "gelu": F.gelu,
    "gate": geglu.gated_linear_unit,
    "matched_width": matched_width,
    "block": geglu.GeGLU,
    "smaller": smaller,
    "folded": folded,
}


# ---- gelu ----


def opening(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def no_root(x):
    return x * 0.5 * (1 + torch.erf(x))


def no_half(x):
    return x * (1 + torch.erf(x / math.sqrt(2)))


def no_one(x):
    return x * torch.erf(x / math.sqrt(2))


def bell_curve(x):
    return x * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def gelu_in_place(x):
    return x.mul_(opening(x))


def gelu_widened(x):
    return F.gelu(x).float()


def gelu_overflows(x):  # right near zero, not a number far out
    return torch.where(x.abs() < 100, F.gelu(x), x * (x.exp() - x.exp()))


def gelu_as_list(x):
    return F.gelu(x).tolist()


# ---- gate ----


def wrong_half(x, activation):
    linear, activated = halves(x)
    return activation(activated) * linear


def every_other(x, activation):
    return activation(x[..., ::2]) * x[..., 1::2]


def both_halves(x, activation):
    a, b = halves(x)
    return activation(a) * activation(b)


def after_the_product(x, activation):
    a, b = halves(x)
    return activation(a * b)


def added(x, activation):
    a, b = halves(x)
    return activation(a) + b


def one_half(x, activation):
    return activation(halves(x)[0])


def no_activation(x, activation):
    a, b = halves(x)
    return a * b


def sigmoid_gate(x, activation):
    a, b = halves(x)
    return torch.sigmoid(a) * b


def torch_glu(x, activation):
    return F.glu(x)


def always_gelu(x, activation):
    return geglu.gated_linear_unit(x)


def full_width(x, activation):
    return activation(x) * x


def gate_in_place(x, activation):
    a, b = halves(x)
    b *= activation(a)
    return b


def written_width(x, activation):
    return activation(x[..., :6]) * x[..., 6:12]


def gate_widened(x, activation):
    return geglu.gated_linear_unit(x.float(), activation)


def gate_of_ones(x, activation):
    return torch.ones_like(halves(x)[0])


# ---- matched_width ----


def rounded_down(mlp_width, multiple):
    return max(1, 2 * mlp_width // 3 // multiple) * multiple


def rounded_up(mlp_width, multiple):
    return math.ceil(2 * mlp_width / 3 / multiple) * multiple


def may_be_nothing(mlp_width, multiple):
    return round(2 * mlp_width / 3 / multiple) * multiple


def no_multiple(mlp_width, multiple):
    return round(2 * mlp_width / 3)


def a_fraction(mlp_width, multiple):
    return 2 * mlp_width / 3


def scaled(factor):
    def width(mlp_width, multiple):
        return round(factor * mlp_width / multiple) * multiple

    width.__name__ = f"times_{factor:.2f}"
    return width


# ---- block ----


class Block(geglu.GeGLU):
    """The right block, to be spoilt."""

    def __init__(self, hidden_size, intermediate_size, bias=False, dropout=0.0):
        super().__init__(hidden_size, intermediate_size, bias=bias, dropout=dropout)


def with_forward(name, forward):
    return type(name, (Block,), {"forward": forward})


def with_gate(gate):
    def forward(self, x):
        return self.Wo(self.drop(gate(self.Wi(x), F.gelu)))

    return with_forward(gate.__name__, forward)


def with_activation(name, activation):
    def forward(self, x):
        return self.Wo(self.drop(geglu.gated_linear_unit(self.Wi(x), activation)))

    return with_forward(name, forward)


class AlwaysBias(Block):
    def __init__(self, hidden_size, intermediate_size, bias=True, dropout=0.0):
        super().__init__(hidden_size, intermediate_size, True, dropout)


class NeverBias(Block):
    def __init__(self, hidden_size, intermediate_size, bias=False, dropout=0.0):
        super().__init__(hidden_size, intermediate_size, False, dropout)


class NarrowWi(Block):
    def __init__(self, hidden_size, intermediate_size, bias=False, dropout=0.0):
        super().__init__(hidden_size, intermediate_size, bias, dropout)
        self.Wi = nn.Linear(hidden_size, intermediate_size, bias=bias)


class WideWo(Block):
    def __init__(self, hidden_size, intermediate_size, bias=False, dropout=0.0):
        super().__init__(hidden_size, intermediate_size, bias, dropout)
        self.Wo = nn.Linear(2 * intermediate_size, hidden_size, bias=bias)


class OtherNames(nn.Module):
    def __init__(self, hidden_size, intermediate_size, bias=False, dropout=0.0):
        super().__init__()
        self.up = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)


def residual(self, x):
    return x + Block.forward(self, x)


def normed(self, x):
    return Block.forward(self, F.layer_norm(x, x.shape[-1:]))


def no_dropout(self, x):
    return self.Wo(geglu.gated_linear_unit(self.Wi(x)))


def dropout_last(self, x):
    return self.drop(self.Wo(geglu.gated_linear_unit(self.Wi(x))))


def dropout_half_always(self, x):
    units = geglu.gated_linear_unit(self.Wi(x))
    return self.Wo(self.drop(units) if self.training else units * (1 - self.drop.p / 2))


# ---- smaller ----


def activated_only(Wi, Wo, keep):
    return Wi[keep], Wo[:, keep]


def rows_of_wo(Wi, Wo, keep):
    return smaller(Wi, Wo, keep)[0], Wo[keep]


def first_half_twice(Wi, Wo, keep):
    return Wi[torch.cat((keep, keep))], Wo[:, keep]


def linear_first(Wi, Wo, keep):
    return Wi[torch.cat((keep + Wo.shape[1], keep))], Wo[:, keep]


def side_by_side(Wi, Wo, keep):
    rows = torch.stack((keep, keep + Wo.shape[1]), dim=1).flatten()
    return Wi[rows], Wo[:, keep]


def interleaved(Wi, Wo, keep):
    return Wi[torch.cat((2 * keep, 2 * keep + 1))], Wo[:, keep]


def in_order(Wi, Wo, keep):
    return smaller(Wi, Wo, keep.sort().values)


def wo_in_order(Wi, Wo, keep):
    return smaller(Wi, Wo, keep)[0], Wo[:, keep.sort().values]


def first_columns(Wi, Wo, keep):
    return smaller(Wi, Wo, keep)[0], Wo[:, : len(keep)]


def only_wi(Wi, Wo, keep):
    return smaller(Wi, Wo, keep)[0]


def silenced(Wi, Wo, keep):
    Wi[[i for i in range(len(Wi)) if i not in keep]] = 0
    return Wi, Wo


# ---- folded ----


def rows_scaled(norm_weight, Wi):
    return norm_weight.diag() @ Wi


def divided(norm_weight, Wi):
    return Wi / norm_weight


def unchanged(norm_weight, Wi):
    return Wi.clone()


def activated_half_only(norm_weight, Wi):
    first, second = Wi.chunk(2)
    return torch.cat((first * norm_weight, second))


def linear_half_only(norm_weight, Wi):
    first, second = Wi.chunk(2)
    return torch.cat((first, second * norm_weight))


def folded_twice(norm_weight, Wi):
    return Wi * norm_weight**2


def on_its_side(norm_weight, Wi):
    return (Wi * norm_weight).T


def folded_in_place(norm_weight, Wi):
    return Wi.mul_(norm_weight)


def written_size(norm_weight, Wi):
    return torch.cat((Wi[:8] * norm_weight, Wi[8:]))


MISTAKES = {  # exercise -> mistake -> a piece of the hint that it must get
    "gelu": {
        opening: "Is this the opening or the result?",
        tanh_gelu: "Exact or tanh?",
        quick_gelu: "1.702",
        F.silu: "Is this SiLU?",
        F.relu: "Is this ReLU?",
        no_root: "What does `erf` take?",
        no_half: "How far open can it get?",
        no_one: "Where does the opening start?",
        bell_curve: "The curve or the area under it?",
        gelu_in_place: "change its argument",
        gelu_widened: "keep the dtype",
        gelu_overflows: "And far out?",
        gelu_as_list: "Is your result a tensor?",
        torch.cos: "Look at a few points",
    },
    "gate": {
        wrong_half: "Which half goes through the activation?",
        every_other: "Where do you cut?",
        both_halves: "How often do you activate?",
        after_the_product: "What comes first",
        added: "Added or multiplied?",
        one_half: "What happened to the second half?",
        no_activation: "Where is the activation?",
        sigmoid_gate: "Whose opening is it?",
        torch_glu: "Is this `F.glu`?",
        always_gelu: "the activation that you are given",
        full_width: "How wide is the result?",
        gate_in_place: "write into `x`",
        written_width: "wrong for one vector with I = 2",
        gate_widened: "keep the dtype",
        gate_of_ones: "The shape is right, the numbers are not",
    },
    "matched_width": {
        scaled(1): "Do both have the same weights per unit?",
        scaled(1 / 2): "Did you count `Wo`?",
        scaled(3 / 2): "Wider or narrower?",
        scaled(4 / 3): "Which way round is the fraction",
        scaled(2): "Did you count the halves?",
        scaled(1 / 3): "3,072 units become 2,048",
        rounded_down: "Do you always round down?",
        rounded_up: "Do you always round up?",
        may_be_nothing: "What of a very small MLP?",
        no_multiple: "Is it a multiple?",
        a_fraction: "Is a number of units a whole number?",
    },
    "block": {
        with_gate(wrong_half): "Which half goes through the activation?",
        with_gate(every_other): "Where do you cut?",
        with_gate(both_halves): "How often do you activate?",
        with_gate(after_the_product): "What comes first",
        with_gate(one_half): "What happened to the second half?",
        with_gate(no_activation): "Where is the activation?",
        with_gate(torch_glu): "Is this `F.glu`?",
        with_activation("tanh", tanh_gelu): "Exact or tanh?",
        with_activation("relu", F.relu): "Yours is ReLU",
        with_activation("silu", F.silu): "Yours is SiLU",
        with_forward("residual", residual): "Who adds the block's result",
        with_forward("normed", normed): "Who applies the norm?",
        AlwaysBias: "Is there a bias?",
        NeverBias: "What does `bias=True` do?",
        NarrowWi: "How wide is `Wi`?",
        WideWo: "What enters `Wo`?",
        OtherNames: "Which weights does the block have?",
        with_forward("no_dropout", no_dropout): "Does dropout act in training?",
        with_forward("dropout_last", dropout_last): "Where does dropout stand?",
        with_forward("dropout_half_always", dropout_half_always): "stop outside training",
    },
    "smaller": {
        activated_only: "What of the linear half?",
        rows_of_wo: "Row or column?",
        first_half_twice: "Which rows are the linear half?",
        linear_first: "In which order do the halves stand?",
        side_by_side: "stand side by side?",
        interleaved: "Where are the two rows of unit u?",
        in_order: "In which order come the units?",
        wo_in_order: "the units in the same order",
        first_columns: "Which columns of `Wo`?",
        only_wi: "return two matrices",
        silenced: "write into the matrices",
    },
    "folded": {
        rows_scaled: "Row or column?",
        divided: "Multiply or divide?",
        unchanged: "Does the weight enter at all?",
        activated_half_only: "And the linear half?",
        linear_half_only: "And the activated half?",
        folded_twice: "How often is the weight applied?",
        on_its_side: "lies on its side",
        folded_in_place: "write into its arguments",
        written_size: "Right for a square matrix",
    },
}
CASES = [
    pytest.param(name, mistake, said, id=f"{name}-{mistake.__name__}")
    for name, mistakes in MISTAKES.items()
    for mistake, said in mistakes.items()
]


def check(name):
    return getattr(checks.geglu, name)


def test_every_exercise_of_the_chapter_is_tested():
    mine = {number for number in checks.EXERCISES if number.startswith("4.")}
    assert mine == {check(name).exercise.number for name in SOLUTIONS}
    assert SOLUTIONS.keys() == MISTAKES.keys() and all(len(m) >= 3 for m in MISTAKES.values())


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_passes(name):
    result = check(name)(SOLUTIONS[name])
    assert result.passed, result
    assert result.message


class UnwrittenBlock(nn.Module):
    def __init__(self, hidden_size, intermediate_size, bias=False, dropout=0.0):
        super().__init__()
        raise NotImplementedError


def unwritten(*args):
    raise NotImplementedError


STUBS = {name: [unwritten, ..., lambda *args: None] for name in SOLUTIONS}
STUBS["block"] = [
    UnwrittenBlock,
    ...,
    None,
    with_forward("returns_nothing", lambda self, x: None),
    with_forward("unwritten_forward", unwritten),
]


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_stub_is_not_written_yet(name):
    for answer in STUBS[name]:
        result = check(name)(answer)
        assert not result.passed and not result.written, result
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


@pytest.mark.parametrize("answer", [Block(8, 6), lambda x: x], ids=["object", "function"])
def test_a_block_must_be_a_class(answer):
    result = check("block")(answer)
    assert not result.passed and "Is it a class?" in result.message


def right_when_narrow(x, activation):
    """Right up to 100 units, and another half after that."""
    return (geglu.gated_linear_unit if x.shape[-1] < 200 else wrong_half)(x, activation)


def test_a_part_that_is_right_when_small_is_caught_by_the_real_model():
    for name, answer in (("gate", right_when_narrow), ("block", with_gate(right_when_narrow))):
        result = check(name)(answer)
        assert not result.passed and "in `mini` the logits move" in result.message


def test_the_swap_is_undone():
    before = geglu.gated_linear_unit
    assert check("gate")(geglu.gated_linear_unit)
    assert geglu.gated_linear_unit is before


def test_checks_leave_the_random_state_alone():
    state = torch.random.get_rng_state()
    for name, solution in SOLUTIONS.items():
        check(name)(solution)
    assert torch.equal(torch.random.get_rng_state(), state)
