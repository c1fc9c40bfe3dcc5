"""Checks of chapter 14, speed."""

import copy
import math
import statistics
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from modernbert_mini import benchmark as reference
from modernbert_mini import transplant
from modernbert_mini.alternating_attention import band_mask
from modernbert_mini.checks._machinery import exercise, expect, expect_tensor
from modernbert_mini.model import ModernBertModel


def same(value, right) -> bool:
    """Two numbers, up to rounding."""
    return math.isclose(value, right, rel_tol=1e-6, abs_tol=1e-9)


def a_number(value, what: str) -> None:
    """Expect a plain number."""
    expect(
        isinstance(value, int | float) and not isinstance(value, bool),
        f"Is {what} a plain number? The check got a value of type `{type(value).__name__}`.",
    )


@exercise("14.1", "Pairs in a window", difficulty=2, minutes=10)
def needed_pairs(answer):
    right = reference.needed_pairs
    length, window = 10, 2
    out = answer(length, window)
    a_number(out, "your result")
    expect(
        not isinstance(out, float),
        "Can there be half a pair? Count in whole numbers: `//` where you wrote `/`.",
    )
    full = length * (2 * window + 1)
    for wrong, hint in [
        (full, "What does the *first* token see on its left? Your count gives it a whole window."),
        (
            length * window,
            "Which keys lie within W of a query? Those on the left, those on the right, and its "
            "own. You count one side.",
        ),
        (
            right(length, window) - length,
            "Does a token see itself? Distance 0 is within every window; one pair a token is "
            "missing.",
        ),
        (
            length * (window + 1) - window * (window + 1) // 2,
            "Is the model causal? Yours sees only one side; an encoder looks both ways.",
        ),
        (
            right(length, window - 1),
            "Is a key exactly W away inside? `|i − j| <= W`: both ends are.",
        ),
        (
            full - window * (window + 1) // 2,
            "How many ends has a text? You took off the missing keys of one; the other lacks as "
            "many.",
        ),
        (full - 2 * window, "How many keys does the *second* token lack? You took off W an end."),
        (length**2, "Where does the window come in? This is every pair."),
    ]:
        expect(out != wrong, hint)
    expect(
        out == right(length, window),
        f"10 tokens, W = 2: there are {right(length, window)} pairs. You say {out}. "
        "Draw the grid of 10 × 10 and count a row at a time.",
    )
    expect(
        answer(7, 0) == 7,
        f"W = 0: each of 7 tokens sees itself alone. You say {answer(7, 0)}.",
    )
    expect(
        answer(7, 100) == 49,
        f"The window is longer than the text: 7 tokens have 49 pairs. You say {answer(7, 100)}. "
        "What does your formula take off at the ends then?",
    )
    expect(
        answer(7, None) == 49,
        "What does a global layer see? With `None` for the window, every pair.",
    )
    for n, w in ((1, 1), (8, 7), (8, 8), (129, 64), (8192, 64)):
        expect(
            answer(n, w) == right(n, w),
            f"Wrong for {n} tokens and W = {w}: {right(n, w)} pairs, you say {answer(n, w)}.",
        )
    return f"8,192 tokens, W = 64: {right(8192, 64) / 8192**2:.1%} of all pairs."


@exercise("14.2", "What sorting leaves of the padding", difficulty=1, minutes=8)
def padded_places(answer):
    lengths = [9, 2, 6, 3, 7]
    given = list(lengths)
    out = answer(lengths, 2)
    expect(
        lengths == given,
        "Whose list do you sort? `.sort()` changes the caller's; `sorted` makes a new one.",
    )
    a_number(out, "your result")
    for wrong, hint in [
        (27, "Where is the padding? This is the sum of the lengths, the tokens alone."),
        (45, "How many rectangles are there? You made one of all texts."),
        (37, "Are the texts sorted? Neighbours in the list differ in length; sort first."),
        (
            9 * 2 + 6 * 2 + 2,
            "From which end are the micro-batches filled? Sorted upwards, the shortest go first, "
            "and the longest text is alone here.",
        ),
        (
            3 * 2 + 7 * 2 + 9 * 2,
            "How many rows has the last micro-batch? Five texts by twos: one is left over.",
        ),
        (3 * 2 + 7 * 2, "Where is the fifth text? A micro-batch that is not full counts too."),
        (2 * 2 + 6 * 2 + 9, "Which row sets the length? The longest of its micro-batch."),
        (29 - 27, "Padding, or places? Count every place of the rectangles, text and padding."),
    ]:
        expect(out != wrong, hint)
    expect(
        out == 29,
        f"Sorted by twos: (2, 3), (6, 7), (9): 2·3 + 2·7 + 1·9 = 29 places. You say {out}.",
    )
    expect(
        answer([5, 5, 5], 10) == 15,
        "Three texts, micro-batches of ten: one rectangle of three rows. Yours has others.",
    )
    expect(answer(lengths, 1) == 27, "One text at a time has no padding. Is yours the sum then?")
    return "Micro-batches of one have no padding, and the most calls."


@exercise("14.3", "The ratio of two contenders", difficulty=2, minutes=10)
def paired_ratio(answer):
    ours, theirs = [2.0, 4.0, 1.2, 1.0, 1.5], [4.0, 16.0, 1.8, 2.5, 4.5]
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    given = list(ours), list(theirs)
    out = answer(ours, theirs)
    expect(
        (ours, theirs) == given,
        "Do you sort the lists that you were given? The rounds lose their order for the caller.",
    )
    expect(
        isinstance(out, tuple | list) and len(out) == 3,
        "Three numbers are asked for: lower quartile, median, upper quartile.",
    )
    for value in out:
        a_number(value, "each of them")
    low, middle, high = out
    right = reference.spread(ratios)
    inverse = statistics.median([1 / r for r in ratios])
    for wrong, hint in [
        (
            statistics.median(theirs) / statistics.median(ours),
            "Which comes first, the ratio or the median? Divide within each round, then take the "
            "median. A slow minute hits both numbers of a round.",
        ),
        (
            sum(theirs) / sum(ours),
            "Do all rounds count alike? In a ratio of sums or means, a slow round counts most.",
        ),
        (
            min(theirs) / min(ours),
            "Were the two fastest runs in the same round? Best against best compares two moments.",
        ),
        (
            statistics.mean(ratios),
            "Mean or median? A single round that something disturbed pulls the mean along.",
        ),
        (
            inverse,
            "Which is divided by which? Above 1 means that *they* take longer: theirs by ours.",
        ),
        (
            statistics.median(b / a for a, b in zip(sorted(ours), sorted(theirs), strict=True)),
            "Which numbers belong together? Sorting each list tears the rounds apart.",
        ),
    ]:
        expect(not same(middle, wrong), hint)
    expect(
        same(middle, right.median),
        f"The ratios are {', '.join(f'{r:g}' for r in ratios)}; the middle one is "
        f"{right.median:g}. You say {middle:g}.",
    )
    expect(
        not (same(low, min(ratios)) and same(high, max(ratios))),
        "Quartiles, or the ends? Smallest and largest hang on a single round each.",
    )
    expect(low <= middle <= high, "In which order? Lower quartile, median, upper quartile.")
    deviation = statistics.stdev(ratios)
    expect(
        not same(high - middle, deviation) and not same(high - middle, statistics.pstdev(ratios)),
        "Is this a standard deviation? Quartiles: a quarter of the rounds lies below, one above.",
    )
    expect(
        same(low, right.low) and same(high, right.high),
        f"The quartiles are {right.low:g} and {right.high:g}, you say {low:g} and {high:g}. "
        "`statistics.quantiles(…, n=4, method='inclusive')` gives all three.",
    )
    twice = answer([1.0, 2.0, 3.0], [3.0, 6.0, 9.0])
    expect(
        all(same(value, 3.0) for value in twice),
        "They take three times as long in every round, however slow the machine is. Yours says "
        f"{tuple(twice)}.",
    )
    return "The machine slowed down fourfold in between, and the ratio did not notice."


@exercise("14.4", "The work of one layer", difficulty=2, minutes=15)
def layer_flops(answer):
    sizes = SimpleNamespace(hidden_size=12, intermediate_size=20, half_window=3)
    wide, inner, n = 12, 20, 8
    linear = 2 * n * (4 * wide**2 + 3 * wide * inner)
    pairs = reference.needed_pairs(n, 3)
    out = answer(sizes, [n], 3)
    a_number(out, "your result")
    right = linear + 4 * wide * pairs
    for wrong, hint in [
        (
            right // 2,
            "What is one multiply-add? A multiplication *and* an addition: two operations, so all "
            "of it is twice what you have.",
        ),
        (
            right - 2 * n * wide * inner,
            "How many columns does `Wi` put out? 2·I, a value and a gate.",
        ),
        (right - 2 * n * wide**2, "Which matrix is forgotten? `Wo` of attention has C² numbers."),
        (
            right - 2 * n * 2 * wide**2,
            "How many vectors does `Wqkv` make of each token? Three: 3·C² numbers, not C².",
        ),
        (right - 2 * n * wide * inner * 1.0 - 2 * n * wide * inner, "Where is `Wi`?"),
        (
            right - 2 * wide * pairs,
            "How many products does attention have? Queries by keys, then weights by values.",
        ),
        (linear, "Where is attention? Each pair of a query and a key costs 2·C, twice."),
        (
            linear + 4 * wide * n**2,
            "Which pairs does a local layer need? Not all L²: `needed_pairs` counts them.",
        ),
        (
            linear + 4 * wide * n,
            "What does attention count? *Pairs* of tokens, not tokens.",
        ),
    ]:
        expect(not same(out, wrong), hint)
    expect(
        same(out, right),
        f"8 tokens, C = 12, I = 20, W = 3: matrices {linear:,}, attention {4 * wide * pairs:,}, "
        f"together {right:,}. You say {out:,}.",
    )
    both = answer(sizes, [n, 5], None)
    each = answer(sizes, [n], None) + answer(sizes, [5], None)
    joined = answer(sizes, [n + 5], None)
    expect(
        same(answer(sizes, [n], None), linear + 4 * wide * n**2),
        "`None` for the window is a global layer: every pair of a text.",
    )
    expect(
        not same(both, joined) and same(both, each),
        "Do the tokens of two texts meet? Pairs are counted text by text, then added.",
    )
    config = reference.shape_config("mini")
    row = reference.Row("", "", "encode", (300, 40))
    windows = [None if k == "full_attention" else config.half_window for k in config.layer_types]
    total = sum(answer(config, list(row.lengths), window) for window in windows)
    expect(
        same(total, reference.count_flops(config, row, 0)),
        f"All layers of `mini` on texts of 300 and 40 tokens: "
        f"{reference.count_flops(config, row, 0):,}. Yours add up to {total:,}.",
    )
    return "Summed over the layers, these are the numbers of `count_flops`."


@exercise("14.5", "When does a band pay?", difficulty=2, minutes=12)
def band_pairs(answer):
    def right(length, window):
        return band_mask(torch.tensor([0, length]), window).numel()

    length, window = 100, 32
    out = answer(length, window)
    a_number(out, "your result")
    for wrong, hint in [
        (
            length * 3 * window,
            "How many blocks are there? 100 tokens in blocks of 32 are three and a bit: the last "
            "block is filled up.",
        ),
        (
            length // window * window * 3 * window,
            "What about the tokens that are left over? Round the number of blocks *up*.",
        ),
        (
            length * (2 * window + 1),
            "What does the band *compute*? It meets whole blocks, three for each query. 2·W + 1 "
            "is what it keeps.",
        ),
        (
            reference.needed_pairs(length, window),
            "Needed, or computed? The window needs these; the band computes more, whole blocks.",
        ),
        (
            4 * window * window,
            "How many blocks of keys does a query meet? Its own, and one on each side.",
        ),
        (
            4 * window * 2 * window,
            "On how many sides does a block have neighbours? The one before *and* the one after.",
        ),
        (4 * 3 * window, "How many queries has a block? You counted keys for one of them."),
        (length**2, "This is the whole square. What does a band leave out?"),
    ]:
        expect(out != wrong, hint)
    expect(
        out == right(length, window),
        f"100 tokens, W = 32: 4 blocks of 32 queries, each with 96 keys, "
        f"{right(length, window):,} pairs. You say {out:,}.",
    )
    expect(
        answer(100, 4) == right(100, 4),
        "How short may a block be? Never below 16 tokens: for W = 4, the blocks have 16.",
    )
    expect(
        answer(10, 32) == right(10, 32),
        "What if the text is shorter than a block? Then it is the block: 10 queries, 30 keys.",
    )
    for n, w in ((128, 64), (129, 64), (192, 64), (1000, 5)):
        expect(
            answer(n, w) == right(n, w),
            f"Wrong for {n} tokens and W = {w}: {right(n, w):,} pairs, you say {answer(n, w):,}.",
        )
    first = next(n for n in range(1, 9999) if all(right(m, 64) < m * m for m in range(n, n + 200)))
    return f"W = 64: from {first} tokens on, the band computes fewer pairs than the square."


@exercise("14.6", "How many tokens until the roof?", difficulty=2, minutes=12)
def tokens_to_the_roof(answer):
    def right(i, o, size, corner):
        saved = 2 * i * o - corner * size * (i + o)
        return math.inf if saved <= 0 else math.ceil(corner * size * i * o / saved)

    i, o, size, corner = 768, 2304, 4, 100.0
    out = answer(i, o, size, corner)
    a_number(out, "your result")
    expect(not math.isnan(out), "Where does the NaN come from? Is 0 divided by 0, or ∞ by ∞?")
    exact = corner * size * i * o / (2 * i * o - corner * size * (i + o))
    for wrong, hint in [
        (
            math.ceil(corner * size / 2),
            "What else is moved besides the weights? The tokens: i numbers in and o numbers out, "
            "for each.",
        ),
        (
            math.ceil(corner * size * i * o / (i * o - corner * size * (i + o)))
            if i * o > corner * size * (i + o)
            else math.inf,
            "How many operations is a multiply-add? Two: the work is 2·N·i·o.",
        ),
        (
            math.ceil(corner * i * o / (2 * i * o - corner * (i + o))),
            "Bytes or numbers? A number in bfloat16 has 2 bytes, in float32 4.",
        ),
        (
            math.ceil(corner * size * i * o / (2 * i * o - corner * size * i)),
            "What does the layer *write*? N·o numbers go back to memory.",
        ),
        (
            math.ceil(corner * size * i * o / (2 * i * o - corner * size * o)),
            "What does the layer *read*? Besides the weights, N·i numbers of the tokens.",
        ),
        (corner, "The corner is in FLOP per byte. Which N gives a layer that intensity?"),
    ]:
        expect(not same(out, wrong), hint)
    expect(
        not same(out, math.floor(exact)),
        "On which side of the corner is your N? Rounded down, it still waits for memory.",
    )
    expect(
        not same(out, exact),
        "Are there parts of a token? Round up to the first whole number of tokens.",
    )
    expect(
        same(out, right(i, o, size, corner)),
        f"768 → 2,304 in 4 bytes, corner 100: {right(i, o, size, corner)} tokens. You say {out}. "
        "Write the intensity as a function of N and solve for N.",
    )
    expect(
        answer(64, 64, 4, 295.0) == math.inf,
        "A layer of 64 × 64 in float32: its intensity never reaches 295, however many tokens "
        f"come. Your formula says {answer(64, 64, 4, 295.0)}; return `math.inf` there.",
    )
    for case in ((256, 768, 2, 153.0), (768, 768, 4, 12.0), (2304, 768, 2, 203.1)):
        expect(
            same(answer(*case), right(*case)),
            f"Wrong for {case[0]} → {case[1]}, {case[2]} bytes, corner {case[3]:g}: "
            f"{right(*case)} tokens, you say {answer(*case)}.",
        )
    return "One sentence at a time leaves a card idle; a batch of them does not."


class Largest(TorchDispatchMode):
    """The largest tensor that operations make, views apart."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves
        here = {t.untyped_storage().data_ptr() for t in leaves((args, kwargs)) if tensor(t)}
        made = [t for t in leaves(out) if tensor(t)]
        new = [t.nbytes for t in made if t.untyped_storage().data_ptr() not in here]
        self.bytes = max([self.bytes, *new])
        return out


def tensor(x) -> bool:
    return isinstance(x, torch.Tensor)


@exercise("14.7", "A GeGLU that needs less room, in the real model", difficulty=3, minutes=20)
def chunked_geglu(answer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mini = ModernBertModel.from_pretrained("mini").eval()
        mlp, x = mini.layers[1].mlp, torch.randn(1300, mini.config.hidden_size)  # (N, C)
    given = x.clone()
    with torch.no_grad():
        right, out = mlp(x), answer(mlp, x)
        expect(
            torch.equal(given, x),
            "Do you write into `x`? The layer adds it to your result afterwards; write into a "
            "tensor of your own.",
        )
        expect(
            not (tensor(out) and out.shape[-1] == x.shape[-1] and out.shape[0] < len(x)),
            f"Where are the last tokens? {len(x)} went in, {len(out)} came out: 1,300 is no "
            "multiple of the chunk.",
        )
        expect_tensor(out, tuple(x.shape), x.dtype)
        value, gate = mlp.Wi(x).chunk(2, dim=-1)
        none = (out - x).abs().max() < 1e-6 or not out.any()
        left = out[-(1300 % 256) :]
        expect(not none, "Does the result hold anything? It is what went in, or zeros.")
        for wrong, hint in [
            (mlp.Wo(F.gelu(gate) * value), "Which half is activated? The first; the second gates."),
            (mlp.Wo(value * gate), "Where is the activation? Without it two layers are one."),
            (mlp.Wo(F.gelu(value)), "Where is the gate? The activated half is multiplied by it."),
            (right + x, "Who adds `x`? The layer does; here it is added twice then."),
        ]:
            expect(not torch.allclose(out, wrong, atol=1e-4), hint)
        expect(
            not (torch.allclose(out[:1024], right[:1024], atol=1e-4) and not left.any()),
            "Are the last tokens still zeros? A loop over `N // chunk` leaves out the rest.",
        )
        expect(
            torch.allclose(out, right, atol=1e-4),
            f"Your numbers are not GeGLU's: max |Δ| {(out - right).abs().max():.1e}. Do chunks "
            "cut the *tokens*, the dimension before the last?",
        )
        with Largest() as largest:
            answer(mlp, x)
        whole = len(x) * 2 * mini.config.intermediate_size * 4
        expect(
            largest.bytes < whole,
            "What is the largest tensor that you make? `Wi(x)` of all tokens, as before. Cut the "
            "tokens *before* `Wi`.",
        )
        allowed = max(x.nbytes, 512 * 2 * mini.config.intermediate_size * 4)
        expect(
            largest.bytes <= allowed,
            f"How long are your chunks? One of your tensors has {largest.bytes:,} bytes; at most "
            "512 tokens at a time keep it below the result itself.",
        )
        batch = torch.randn(2, 7, mini.config.hidden_size)  # (B, L, C)
        again = answer(mlp, batch)
        expect(
            again.shape == batch.shape and torch.allclose(again, mlp(batch), atol=1e-4),
            "Does it take a padded batch (B, L, C) too? Tokens are the dimension before the last: "
            "`x.split(512, dim=-2)`.",
        )
        swapped = transplant.swap(copy.copy(mini), "mlp", answer)
        ids = torch.arange(300, 900)
        bounds = torch.tensor([0, 100, 600])
        moved = swapped(ids, cu_seqlens=bounds).last_hidden_state
        kept = mini(ids, cu_seqlens=bounds).last_hidden_state
    expect(
        torch.allclose(moved, kept, atol=1e-3),
        "In the whole model the numbers move. Does a layer keep something from the last call?",
    )
    return (
        f"Largest new tensor: {largest.bytes / 1e6:.1f} MB instead of {whole / 1e6:.1f}, the same "
        "numbers in the whole model."
    )
