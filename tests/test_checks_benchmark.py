"""The checks of chapter 14: solutions pass, stubs are greeted, each mistake gets its own hint."""

import math
import statistics

import pytest
import torch
from torch.nn import functional as F

from modernbert_mini import checks
from modernbert_mini.alternating_attention import band_mask
from modernbert_mini.benchmark import needed_pairs

# ---- pairs in a window ----


def pairs_by_rows(length, half_window):
    """Another way: token by token."""
    half = length if half_window is None else half_window
    return sum(min(length, i + half + 1) - max(0, i - half) for i in range(length))


PAIRS = {
    "edges": lambda n, w: n * (2 * w + 1),
    "one side": lambda n, w: n * w,
    "without itself": lambda n, w: needed_pairs(n, w) - n,
    "causal": lambda n, w: n * (w + 1) - w * (w + 1) // 2,
    "window too small": lambda n, w: needed_pairs(n, w - 1),
    "one end": lambda n, w: n * (2 * w + 1) - w * (w + 1) // 2,
    "ends of W": lambda n, w: n * (2 * w + 1) - 2 * w,
    "all": lambda n, w: n**2,
    "half a pair": lambda n, w: float(needed_pairs(n, w)),
    "no short text": lambda n, w: n * (2 * w + 1) - w * (w + 1),
    "no global layer": lambda n, w: needed_pairs(n, -1 if w is None else w),
    "off at W = L": lambda n, w: needed_pairs(n, w) + (n == w),
    "something else": lambda n, w: 3 * n,
    "text": lambda n, w: str(n),
}

# ---- places ----


def places(lengths, size):
    ordered = sorted(lengths)
    groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return sum(len(group) * max(group) for group in groups)


def of_groups(lengths, size, count):
    return sum(count(lengths[i : i + size]) for i in range(0, len(lengths), size))


def sorts_in_place(lengths, size):
    lengths.sort()
    return places(lengths, size)


PLACES = {
    "tokens": lambda n, size: sum(n),
    "one rectangle": lambda n, size: len(n) * max(n),
    "unsorted": lambda n, size: of_groups(n, size, lambda g: len(g) * max(g)),
    "downwards": lambda n, size: of_groups(sorted(n)[::-1], size, lambda g: len(g) * g[0]),
    "last one full": lambda n, size: of_groups(sorted(n), size, lambda g: size * max(g)),
    "last one dropped": lambda n, size: places(sorted(n)[: len(n) // size * size], size),
    "shortest": lambda n, size: of_groups(sorted(n), size, lambda g: len(g) * min(g)),
    "padding only": lambda n, size: places(n, size) - sum(n),
    "in place": sorts_in_place,
    "something else": lambda n, size: 7,
    "few texts": lambda n, size: places(n, size) if len(n) >= size else size * max(n),
    "never alone": lambda n, size: places(n, max(size, 2)),
}

# ---- paired ratios ----


def paired_ratio(ours, theirs):
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return tuple(statistics.quantiles(ratios, n=4, method="inclusive"))


def each(ours, theirs):
    return [b / a for a, b in zip(ours, theirs, strict=True)]


def around(middle, ours, theirs):
    low, _, high = paired_ratio(ours, theirs)
    return low, middle, high


def plus_minus(ours, theirs, deviation):
    ratios = each(ours, theirs)
    middle, width = statistics.median(ratios), deviation(ratios)
    return middle - width, middle, middle + width


def sorted_in_place(ours, theirs):
    result = paired_ratio(ours, theirs)
    ours.sort()
    return result


RATIOS = {
    "of medians": lambda a, b: around(statistics.median(b) / statistics.median(a), a, b),
    "of sums": lambda a, b: around(sum(b) / sum(a), a, b),
    "of the best": lambda a, b: around(min(b) / min(a), a, b),
    "mean": lambda a, b: around(statistics.mean(each(a, b)), a, b),
    "upside down": lambda a, b: paired_ratio(b, a),
    "torn apart": lambda a, b: paired_ratio(sorted(a), sorted(b)),
    "in place": sorted_in_place,
    "one number": lambda a, b: statistics.median(each(a, b)),
    "text": lambda a, b: ("2", "3", "4"),
    "ends": lambda a, b: (min(each(a, b)), paired_ratio(a, b)[1], max(each(a, b))),
    "order": lambda a, b: paired_ratio(a, b)[::-1],
    "deviation": lambda a, b: plus_minus(a, b, statistics.stdev),
    "other quartiles": lambda a, b: tuple(statistics.quantiles(each(a, b), n=4)),
    "something else": lambda a, b: (0.0, 1.0, 2.0),
}

# ---- the work of a layer ----


def layer_flops(config, lengths, half_window):
    wide, inner = config.hidden_size, config.intermediate_size
    pairs = sum(needed_pairs(n, half_window) for n in lengths)
    return 2 * sum(lengths) * (4 * wide**2 + 3 * wide * inner) + 4 * wide * pairs


def less(count):
    return lambda c, n, w: layer_flops(c, n, w) - 2 * sum(n) * count(c)


LAYERS = {
    "multiply-adds": lambda c, n, w: layer_flops(c, n, w) // 2,
    "half of Wi": less(lambda c: c.hidden_size * c.intermediate_size),
    "no Wo": less(lambda c: c.hidden_size**2),
    "one of q, k, v": less(lambda c: 2 * c.hidden_size**2),
    "no Wi": less(lambda c: 2 * c.hidden_size * c.intermediate_size),
    "one product": lambda c, n, w: (
        layer_flops(c, n, w) - 2 * c.hidden_size * sum(needed_pairs(x, w) for x in n)
    ),
    "no attention": lambda c, n, w: (
        layer_flops(c, n, w) - 4 * c.hidden_size * sum(needed_pairs(x, w) for x in n)
    ),
    "all pairs": lambda c, n, w: layer_flops(c, n, None),
    "tokens for pairs": lambda c, n, w: layer_flops(c, n, 0),
    "one long text": lambda c, n, w: layer_flops(c, [sum(n)], w),
    "never global": lambda c, n, w: layer_flops(c, n, c.half_window),
    "made for one size": lambda c, n, w: layer_flops(c, n, w) * (1 + (c.hidden_size > 100)),
    "something else": lambda c, n, w: 12,
    "text": lambda c, n, w: "12",
}

# ---- the pairs of a band ----


def band_pairs(length, half_window):
    size = min(max(half_window, 16), length)
    return math.ceil(length / size) * size * 3 * size


BANDS = {
    "not rounded": lambda n, w: n * 3 * w,
    "rounded down": lambda n, w: n // w * w * 3 * w,
    "needed keys": lambda n, w: n * (2 * w + 1),
    "needed": needed_pairs,
    "own block": lambda n, w: math.ceil(n / w) * w * w,
    "one neighbour": lambda n, w: math.ceil(n / w) * w * 2 * w,
    "one query": lambda n, w: math.ceil(n / w) * 3 * w,
    "square": lambda n, w: n * n,
    "tiny blocks": lambda n, w: math.ceil(n / min(w, n)) * min(w, n) * 3 * min(w, n),
    "long blocks": lambda n, w: math.ceil(n / max(w, 16)) * 3 * max(w, 16) ** 2,
    "one block more": lambda n, w: (
        band_pairs(n, w) + (n >= w and n % max(w, 16) == 0) * 3 * max(w, 16) ** 2
    ),
    "something else": lambda n, w: 5,
    "text": lambda n, w: "5",
}

# ---- the roof ----


def exactly(i, o, size, corner):
    return corner * size * i * o / (2 * i * o - corner * size * (i + o))


def tokens_to_the_roof(i, o, size, corner):
    gain = 2 * i * o - corner * size * (i + o)
    return math.ceil(corner * size * i * o / gain) if gain > 0 else math.inf


def roof_without(read=1, written=1, bytes_=None, operations=2):
    def wrong(i, o, size, corner):
        size = bytes_ or size
        gain = operations * i * o - corner * size * (read * i + written * o)
        return math.ceil(corner * size * i * o / gain) if gain > 0 else math.inf

    return wrong


ROOFS = {
    "weights only": roof_without(read=0, written=0),
    "multiply-adds": roof_without(operations=1),
    "numbers for bytes": roof_without(bytes_=1),
    "nothing written": roof_without(written=0),
    "nothing read": roof_without(read=0),
    "the corner": lambda i, o, size, corner: corner,
    "rounded down": lambda *a: math.floor(exactly(*a)) if exactly(*a) > 0 else math.inf,
    "parts of a token": lambda *a: exactly(*a) if exactly(*a) > 0 else math.inf,
    "never infinite": lambda *a: math.ceil(exactly(*a)),
    "square layers": lambda i, o, size, corner: (
        tokens_to_the_roof(i, o, size, corner) + (i == 256 or i > o)
    ),
    "nan": lambda *a: math.nan,
    "something else": lambda *a: 7,
    "text": lambda *a: "7",
}

# ---- a GeGLU in chunks ----


def chunked(self, x, size=256):
    parts = []
    for part in x.split(size, dim=-2):
        value, gate = self.Wi(part).chunk(2, dim=-1)
        parts.append(self.Wo(F.gelu(value) * gate))
    return torch.cat(parts, dim=-2)


def with_part(change):
    def wrong(self, x):
        value, gate = self.Wi(x).chunk(2, dim=-1)
        return change(self, x, value, gate)

    return wrong


def last_dropped(self, x):
    return chunked(self, x[: len(x) // 256 * 256])


def last_zero(self, x):
    out = torch.zeros_like(x)
    for i in range(len(x) // 256):
        part = slice(256 * i, 256 * i + 256)
        out[part] = chunked(self, x[part])
    return out


def into_x(self, x):
    for i in range(0, len(x), 256):
        x[i : i + 256] = chunked(self, x[i : i + 256].clone())
    return x


def late(self, x):
    both = self.Wi(x)
    return torch.cat([self.Wo(F.gelu(a) * b) for a, b in [both.chunk(2, dim=-1)]])


def rows_only(self, x):
    return torch.cat([chunked(self, part) for part in x.split(256)], dim=0).view(-1, x.shape[-1])


def remembers(self, x):
    if x.shape[-2] == 600 and x.dim() == 2:
        return 1.1 * chunked(self, x)
    return chunked(self, x)


GEGLUS = {
    "last tokens dropped": last_dropped,
    "last tokens zero": last_zero,
    "into x": into_x,
    "other half": with_part(lambda m, x, a, b: m.Wo(F.gelu(b) * a)),
    "no activation": with_part(lambda m, x, a, b: m.Wo(a * b)),
    "no gate": with_part(lambda m, x, a, b: m.Wo(F.gelu(a))),
    "x added": lambda m, x: x + chunked(m, x),
    "nothing done": lambda m, x: x.clone(),
    "tanh twice": with_part(lambda m, x, a, b: m.Wo(F.gelu(F.gelu(a)) * b)),
    "all of Wi": late,
    "long chunks": lambda m, x: chunked(m, x, 1000),
    "streams only": rows_only,
    "remembers": remembers,
}

EXERCISES = {
    "needed_pairs": (needed_pairs, pairs_by_rows, PAIRS),
    "padded_places": (places, places, PLACES),
    "paired_ratio": (paired_ratio, paired_ratio, RATIOS),
    "layer_flops": (layer_flops, layer_flops, LAYERS),
    "band_pairs": (
        band_pairs,
        lambda n, w: band_mask(torch.tensor([0, n]), w).numel(),
        BANDS,
    ),
    "tokens_to_the_roof": (tokens_to_the_roof, tokens_to_the_roof, ROOFS),
    "chunked_geglu": (chunked, lambda m, x: chunked(m, x, 100), GEGLUS),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_solutions_pass(name):
    for solution in EXERCISES[name][:2]:
        result = getattr(checks.benchmark, name)(solution)
        assert result, result.message
        assert result.message


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_is_greeted(name):
    def stub(*args):
        raise NotImplementedError

    for empty in (stub, ..., lambda *args: None):
        result = getattr(checks.benchmark, name)(empty)
        assert not result and not result.written
        assert result.message.startswith("Not written yet.")


@pytest.mark.parametrize("name", EXERCISES)
def test_each_mistake_gets_its_own_hint(name):
    said = {}
    for mistake, wrong in EXERCISES[name][2].items():
        result = getattr(checks.benchmark, name)(wrong)
        assert not result, mistake
        assert result.written and "raised" not in result.message, (mistake, result.message)
        assert "The check stopped" not in result.message, (mistake, result.message)
        assert result.message not in said.values(), (mistake, result.message)
        said[mistake] = result.message
    assert len(said) >= 5
