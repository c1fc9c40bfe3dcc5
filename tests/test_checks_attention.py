"""Each exercise of chapter 5: the solution passes, and each mistake gets its own hint."""

import pytest
import torch
from torch import nn

from modernbert_mini import attention, checks
from modernbert_mini.attention import eager_attention
from modernbert_mini.rope import apply_rotary

LOWEST = torch.finfo(torch.float32).min


def one_head(q, k, v):
    return eager_attention(q, k, v)[0]


def stable_softmax(x):
    x = x.float()
    e = (x - x.amax(dim=-1, keepdim=True)).exp()
    return e / e.sum(dim=-1, keepdim=True)


def masked_weights(scores, mask):
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)


def split_heads(qkv, num_heads):
    return tuple(x.unflatten(-1, (num_heads, -1)).transpose(-2, -3) for x in qkv.chunk(3, dim=-1))


def in_chunks(q, k, v, size):
    return torch.cat([one_head(part, k, v) for part in q.split(size, dim=-2)], dim=-2)


SOLUTIONS = {
    "one_head": one_head,
    "stable_softmax": stable_softmax,
    "masked_weights": masked_weights,
    "split_heads": split_heads,
    "in_chunks": in_chunks,
    "module": attention.Attention,
}


# ---- one_head ----


def scores_of(q, k):
    return q @ k.T * q.shape[-1] ** -0.5


def unscaled(q, k, v):
    return (q @ k.T).softmax(-1) @ v


def divided_by_size(q, k, v):
    return (q @ k.T / q.shape[-1]).softmax(-1) @ v


def root_of_length(q, k, v):
    return (q @ k.T * len(q) ** -0.5).softmax(-1) @ v


def columns_sum_to_one(q, k, v):
    return scores_of(q, k).softmax(0) @ v


def all_sum_to_one(q, k, v):
    return scores_of(q, k).flatten().softmax(0).view(len(q), -1) @ v


def no_softmax(q, k, v):
    return scores_of(q, k) @ v


def keys_ask(q, k, v):
    return scores_of(k, q).softmax(-1) @ v


def weights_turned(q, k, v):
    return scores_of(q, k).softmax(-1).T @ v


def mixes_keys(q, k, v):
    return one_head(q, k, k)


def mixes_queries(q, k, v):
    return one_head(q, k, q)


def scaled_late(q, k, v):
    return unscaled(q, k, v) * q.shape[-1] ** -0.5


def no_exponential(q, k, v):
    scores = scores_of(q, k)
    return scores / scores.sum(-1, keepdim=True) @ v


def only_weights(q, k, v):
    return scores_of(q, k).softmax(-1)


def written_scale(q, k, v):
    return (q @ k.T / 2).softmax(-1) @ v


def scales_the_query_in_place(q, k, v):
    q *= q.shape[-1] ** -0.5
    return unscaled(q, k, v)


def plain_mean(q, k, v):
    return v.mean(0, keepdim=True).expand_as(v)


# ---- stable_softmax ----


def plain(x):
    e = x.float().exp()
    return e / e.sum(-1, keepdim=True)


def wrong_dimension(x):
    return stable_softmax(x.transpose(-1, -2)).transpose(-1, -2)


def not_divided(x):
    return x.float().exp()


def logarithms(x):
    return x - x.exp().sum(-1, keepdim=True).log()


def upside_down(x):
    return stable_softmax(-x)


def one_sum(x):
    return x.exp() / x.exp().sum()


def of_torch(x):
    return x.float().softmax(-1)


def minus_mean(x):
    return plain(x.float() - x.float().mean(-1, keepdim=True).nan_to_num(neginf=0))


def one_maximum(x):
    return plain(x - x.max())


def stays_narrow(x):
    return stable_softmax(x).to(x.dtype)


def widened_late(x):
    e = (x - x.amax(-1, keepdim=True)).exp().float()
    return e / e.sum(-1, keepdim=True)


def overwrites(x):
    x -= x.amax(-1, keepdim=True)
    return plain(x)


def minus_absolute(x):
    return plain(x.float() - x.float().abs().amax(-1, keepdim=True))


# ---- masked_weights ----


def inverted(scores, mask):
    return masked_weights(scores, ~mask)


def multiplied_before(scores, mask):
    return (scores * mask).softmax(-1)


def multiplied_after(scores, mask):
    return scores.softmax(-1) * mask


def forgotten(scores, mask):
    return scores.softmax(-1)


def mask_added(scores, mask):
    return (scores + mask).softmax(-1)


def a_little_lower(scores, mask):
    return (scores + (~mask) * -10.0).softmax(-1)


def a_fixed_number(scores, mask):
    return scores.masked_fill(~mask, -10_000.0).softmax(-1)


def minus_infinity(scores, mask):
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def lowest_of_float32(scores, mask):
    added = torch.zeros_like(mask, dtype=torch.float).masked_fill(~mask, -1e30).to(scores.dtype)
    return (scores + added).softmax(-1)


def fills_in_place(scores, mask):
    return scores.masked_fill_(~mask, LOWEST).softmax(-1)


def rows_for_columns(scores, mask):
    mask = mask if mask.dim() == 4 else mask.T
    return masked_weights(scores, mask)


def batch_only(scores, mask):
    return masked_weights(scores, mask.expand(2, 1, 1, 5))


# ---- split_heads ----


def ordered(*order):
    def split(qkv, num_heads):
        three = split_heads(qkv, num_heads)
        return tuple(three[i] for i in order)

    split.__name__ = "order_" + "".join("qkv"[i] for i in order)
    return split


def heads_after_tokens(qkv, num_heads):
    return tuple(x.transpose(1, 2) for x in split_heads(qkv, num_heads))


def keys_on_their_side(qkv, num_heads):
    return tuple(x.transpose(-1, -2) for x in split_heads(qkv, num_heads))


def reshaped(qkv, num_heads):
    batch, length, _ = qkv.shape
    return tuple(x.reshape(batch, num_heads, length, -1) for x in qkv.chunk(3, dim=-1))


def reshaped_at_once(qkv, num_heads):
    batch, length, width = qkv.shape
    return qkv.reshape(3, batch, num_heads, length, width // 3 // num_heads).unbind(0)


def head_by_head(qkv, num_heads):
    return qkv.unflatten(-1, (num_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)


def dealt_out(qkv, num_heads):
    return tuple(x.unflatten(-1, (-1, num_heads)).permute(0, 3, 1, 2) for x in qkv.chunk(3, -1))


def one_tensor(qkv, num_heads):
    return torch.cat(split_heads(qkv, num_heads), dim=-1)


def written_size(qkv, num_heads):
    return tuple(x.unflatten(-1, (3, 4)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))


# ---- in_chunks ----


def own_chunk_only(q, k, v, size):
    parts = zip(*(x.split(size, dim=-2) for x in (q, k, v)), strict=True)
    return torch.cat([one_head(*part) for part in parts], dim=-2)


def keys_cut(q, k, v, size):
    parts = zip(k.split(size, dim=-2), v.split(size, dim=-2), strict=True)
    return sum(one_head(q, *part) for part in parts)


def keys_averaged(q, k, v, size):
    return keys_cut(q, k, v, size) / (k.shape[-2] // size)


def unscaled_chunks(q, k, v, size):
    parts = q.split(size, dim=-2)
    return torch.cat([(part @ k.mT).softmax(-1) @ v for part in parts], dim=-2)


def backwards(q, k, v, size):
    parts = q.split(size, dim=-2)
    return torch.cat([one_head(part, k, v) for part in parts[::-1]], dim=-2)


def rest_lost(q, k, v, size):
    parts = [q[..., i * size : (i + 1) * size, :] for i in range(q.shape[-2] // size)]
    return torch.cat([one_head(part, k, v) for part in parts], dim=-2)


def all_at_once(q, k, v, size):
    return one_head(q, k, v)


def fused(q, k, v, size):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def joined_elsewhere(q, k, v, size):
    return torch.cat([one_head(part, k, v) for part in q.split(size, dim=-2)], dim=-1)


# ---- module ----


class Own(nn.Module):
    """The package's attention, written so that a mistake is one overridden method."""

    bias = False

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.Wqkv = nn.Linear(hidden_size, 3 * hidden_size, bias=self.bias)
        self.Wo = nn.Linear(hidden_size, hidden_size, bias=self.bias)

    def split(self, x):
        return split_heads(self.Wqkv(x), self.num_heads)

    def turn(self, q, k, v, cos, sin):
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v

    def merge(self, out):
        return out.transpose(-2, -3).flatten(-2)

    def forward(self, x, cos, sin, attend):
        out, weights = attend(*self.turn(*self.split(x), cos, sin), dropout=0.0)
        return self.Wo(self.merge(out)), weights


class NoPositions(Own):
    def turn(self, q, k, v, cos, sin):
        return q, k, v


class ValuesTurned(Own):
    def turn(self, q, k, v, cos, sin):
        return tuple(apply_rotary(x, cos, sin) for x in (q, k, v))


class QueriesOnly(Own):
    def turn(self, q, k, v, cos, sin):
        return apply_rotary(q, cos, sin), k, v


class NoWo(Own):
    def forward(self, x, cos, sin, attend):
        out, weights = attend(*self.turn(*self.split(x), cos, sin), dropout=0.0)
        return self.merge(out), weights


class MergedByReshape(Own):
    def merge(self, out):
        heads, length, size = out.shape[-3:]
        return out.reshape(*out.shape[:-3], length, heads * size)


class MergedNumberByNumber(Own):
    def merge(self, out):
        return out.transpose(-2, -3).transpose(-1, -2).flatten(-2)


class HeadByHead(Own):
    def split(self, x):
        return self.Wqkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)


class KeysFirst(Own):
    def split(self, x):
        q, k, v = super().split(x)
        return k, q, v


class ValuesSecond(Own):
    def split(self, x):
        q, k, v = super().split(x)
        return q, v, k


class SplitByReshape(Own):
    def split(self, x):
        return reshaped(self.Wqkv(x), self.num_heads)


class ScaledTwice(Own):
    def turn(self, q, k, v, cos, sin):
        q, k, v = super().turn(q, k, v, cos, sin)
        return q * q.shape[-1] ** -0.5, k, v


class AddsX(Own):
    def forward(self, x, cos, sin, attend):
        out, weights = super().forward(x, cos, sin, attend)
        return x + out, weights


class OneResult(Own):
    def forward(self, x, cos, sin, attend):
        return super().forward(x, cos, sin, attend)[0]


class WeightsLost(Own):
    def forward(self, x, cos, sin, attend):
        return super().forward(x, cos, sin, attend)[0], None


class GoesItsOwnWay(Own):
    def forward(self, x, cos, sin, attend):
        return super().forward(x, cos, sin, lambda q, k, v, dropout: eager_attention(q, k, v))


class BatchesOnly(Own):
    def split(self, x):
        batch, length, _ = x.shape
        qkv = self.Wqkv(x).view(batch, length, 3, self.num_heads, -1)
        return qkv.permute(2, 0, 3, 1, 4)


class WithBias(Own):
    bias = True


class ThreeMatrices(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        for name in "qkvo":
            setattr(self, name, nn.Linear(hidden_size, hidden_size, bias=False))

    def forward(self, x, cos, sin, attend):
        return x, None


class NoForward(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()


def not_a_module(hidden_size, num_heads):
    return hidden_size


class Remembers(Own):
    """Right on every small input; with more than 100 tokens it forgets the last ones."""

    def turn(self, q, k, v, cos, sin):
        q, k, v = super().turn(q, k, v, cos, sin)
        return q, k, v * (torch.arange(v.shape[-2]) < 100)[:, None]


MISTAKES = {  # exercise -> mistake -> a piece of the hint that it must get
    "one_head": {
        unscaled: "Where is the scale?",
        divided_by_size: "by D or by its square root",
        root_of_length: "Whose square root",
        columns_sum_to_one: "Along which dimension does the softmax run?",
        all_sum_to_one: "a whole 1 to share out",
        no_softmax: "Where is the softmax?",
        keys_ask: "Which side asks?",
        weights_turned: "transposed before they meet",
        mixes_keys: "handed on are the values",
        mixes_queries: "Not the queries",
        scaled_late: "When does the scale come in?",
        no_exponential: "the exponential comes first",
        only_weights: "Are these the weights",
        written_scale: "wrong for D = 9",
        scales_the_query_in_place: "write into its arguments",
        plain_mean: "numbers are not",
    },
    "stable_softmax": {
        plain: "exp(1000)",
        wrong_dimension: "Which numbers sum to 1?",
        not_divided: "Where is the division?",
        logarithms: "Are these logarithms?",
        upside_down: "a larger score get a larger weight",
        one_sum: "Over what do you sum?",
        of_torch: "PyTorch's own softmax",
        minus_mean: "subtracting the mean",
        one_maximum: "Whose maximum",
        stays_narrow: "asks for float32",
        widened_late: "widen first",
        overwrites: "write into its argument",
        minus_absolute: "without its sign",
    },
    "masked_weights": {
        inverted: "What does True mean here?",
        multiplied_before: "Does a score of 0 hide a key?",
        multiplied_after: "Do the rows still sum to 1?",
        forgotten: "Does the mask do anything?",
        mask_added: "What do you add?",
        a_little_lower: "hidden altogether",
        a_fixed_number: "scores of a million",
        minus_infinity: "may see no key at all",
        lowest_of_float32: "And in float16?",
        fills_in_place: "write into its arguments",
        rows_for_columns: "Rows or columns?",
        batch_only: "a mask (L, L) as well",
    },
    "split_heads": {
        ordered(0, 2, 1): "You return queries, values, keys",
        ordered(1, 0, 2): "You return keys, queries, values",
        ordered(1, 2, 0): "You return keys, values, queries",
        ordered(2, 0, 1): "You return values, queries, keys",
        ordered(2, 1, 0): "You return values, keys, queries",
        heads_after_tokens: "heads or tokens?",
        keys_on_their_side: "Which comes last?",
        reshaped: "so tokens get mixed",
        reshaped_at_once: "across texts and tokens",
        head_by_head: "(H, 3, D)",
        dealt_out: "deals them out like cards",
        one_tensor: "return three tensors",
        written_size: "wrong for 2 heads of 10",
    },
    "in_chunks": {
        own_chunk_only: "Which keys does a query see?",
        keys_cut: "sum to the number of chunks",
        keys_averaged: "Each chunk then counts the same",
        unscaled_chunks: "Where is the scale?",
        backwards: "In which order do you join",
        rest_lost: "What becomes of the rest?",
        all_at_once: "How large is the largest tensor?",
        fused: "fused kernel",
        joined_elsewhere: "Expected `(3, 10, 4)`",
    },
    "module": {
        NoPositions: "Where do the positions come in?",
        ValuesTurned: "What is turned?",
        QueriesOnly: "Are both turned?",
        NoWo: "Where is `Wo`?",
        MergedByReshape: "come together again",
        MergedNumberByNumber: "end up side by side",
        HeadByHead: "outer division of `Wqkv`",
        KeysFirst: "Which third are the queries?",
        ValuesSecond: "In which order do the thirds stand?",
        SplitByReshape: "How do you split the heads?",
        ScaledTwice: "Is the scale in there twice?",
        AddsX: "Do you add `x`?",
        OneResult: "Two things",
        WeightsLost: "hand on the weights",
        GoesItsOwnWay: "the `attend` that you were given",
        BatchesOnly: "one stream of tokens",
        WithBias: "have biases",
        ThreeMatrices: "Which weights does a checkpoint hold?",
        NoForward: "Where is `forward`?",
        not_a_module: "derived from `nn.Module`",
        Remembers: "in `mini` the logits move",
    },
}
CASES = [
    pytest.param(name, mistake, said, id=f"{name}-{mistake.__name__}")
    for name, mistakes in MISTAKES.items()
    for mistake, said in mistakes.items()
]


def check(name):
    return getattr(checks.attention, name)


def test_every_exercise_of_the_chapter_is_tested():
    mine = {number for number in checks.EXERCISES if number.startswith("5.")}
    assert mine == {check(name).exercise.number for name in SOLUTIONS}
    assert SOLUTIONS.keys() == MISTAKES.keys() and all(len(m) >= 3 for m in MISTAKES.values())


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_passes(name):
    result = check(name)(SOLUTIONS[name])
    assert result.passed, result
    assert result.message


def test_the_module_of_the_tests_passes_too():
    assert check("module")(Own)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_stub_is_not_written_yet(name):
    def stub(*args):
        raise NotImplementedError

    for answer in (stub, ..., lambda *args: None):
        result = check(name)(answer)
        assert not result.passed and not result.written
        assert result.message.startswith("Not written yet")


def test_a_module_whose_methods_are_stubs_is_not_written_yet():
    class Stub(Own):
        def forward(self, x, cos, sin, attend):
            raise NotImplementedError

    class EmptyStub(nn.Module):
        def __init__(self, hidden_size, num_heads):
            raise NotImplementedError

    for answer in (Stub, EmptyStub):
        assert check("module")(answer).message.startswith("Not written yet")


@pytest.mark.parametrize(("name", "mistake", "said"), CASES)
def test_a_mistake_gets_its_own_hint(name, mistake, said):
    result = check(name)(mistake)
    assert not result.passed and result.written
    assert said in result.message, result.message


@pytest.mark.parametrize("name", MISTAKES)
def test_no_two_mistakes_get_the_same_hint(name):
    messages = [check(name)(mistake).message for mistake in MISTAKES[name]]
    assert len(set(messages)) == len(messages)


def test_a_row_that_sees_nothing_may_also_get_zeros():
    def zeros(scores, mask):
        return masked_weights(scores, mask) * mask.any(-1, keepdim=True)

    assert check("masked_weights")(zeros)


def test_checks_leave_the_random_state_alone():
    state = torch.random.get_rng_state()
    for name, solution in SOLUTIONS.items():
        check(name)(solution)
    assert torch.equal(torch.random.get_rng_state(), state)
