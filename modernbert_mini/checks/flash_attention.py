"""Checks of chapter 8, FlashAttention."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modernbert_mini.alternating_attention import window_mask
from modernbert_mini.attention import eager_attention
from modernbert_mini.checks._machinery import Hint, exercise, expect, expect_close, expect_tensor

R, K, D = 4, 5, 3  # queries and keys of a tile, numbers of a head


def _sample(*shape: int, seed: int = 8) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class _Watch(TorchDispatchMode):
    """The operations that run inside it, and the size of the largest tensor that they make."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.add(str(function))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def _start() -> tuple[torch.Tensor, ...]:
    return torch.full((R,), -torch.inf), torch.zeros(R), torch.zeros(R, D)


def _update(m, total, mixed, scores, v):
    new = torch.maximum(m, scores.amax(-1))
    factor = (m - new).exp()
    powers = (scores - new[:, None]).exp()
    return new, factor * total + powers.sum(-1), factor[:, None] * mixed + powers @ v


def _three(result, shapes, names) -> tuple[torch.Tensor, ...]:
    expect(
        isinstance(result, tuple | list) and len(result) == len(names),
        f"Does your function return {len(names)} things: {', '.join(names)}?",
    )
    for x, shape, name in zip(result, shapes, names, strict=True):
        # NaN gets a hint of its own.
        expect_tensor(x.nan_to_num() if isinstance(x, torch.Tensor) else x, shape, what=name)
    return tuple(result)


@exercise("8.1", "One more tile", difficulty=2, minutes=12)
def update(answer):
    scores, v = 3 * _sample(3, R, K), _sample(3, K, D, seed=9)
    shapes, names = ((R,), (R,), (R, D)), ("the maximum", "the sum", "the accumulator")
    state = _update(*_start(), scores[0], v[0])
    given = [x.clone() for x in (*state, scores[1], v[1])]
    m, total, mixed = _three(answer(*given), shapes, names)
    expect(
        all(torch.equal(a, b) for a, b in zip(given, (*state, scores[1], v[1]), strict=True)),
        "Does your function write into its arguments? Make new tensors.",
    )
    old, old_total, old_mixed = state
    right = _update(*state, scores[1], v[1])
    tile = scores[1].amax(-1)
    expect_close(
        m,
        right[0],
        [
            (tile, "Is the maximum of this tile larger than that of the tiles before? Take both."),
            (old, "Does the maximum ever move? The new tile may hold a larger score."),
            (
                torch.maximum(old, scores[1].max()),
                "Whose maximum is it? Each query has its own; yours is that of the whole tile.",
            ),
        ],
        "Is the maximum the larger one of the old one and the largest score of the tile, for each "
        "query by itself?",
    )
    factor, powers = (old - m).exp(), (scores[1] - m[:, None]).exp()
    own = (scores[1] - tile[:, None]).exp()
    raw = scores[1].exp()
    expect_close(
        total,
        right[1],
        [
            (
                old_total + powers.sum(-1),
                "With which maximum were the old exponentials taken? With the old one. Multiply "
                "the old sum by exp(old − new) before you add.",
            ),
            (
                (m - old).exp() * old_total + powers.sum(-1),
                "Which way round is the factor? The maximum grew, so the old exponentials must "
                "shrink: exp(old − new).",
            ),
            (powers.sum(-1), "Where is the old sum? The tiles before count, too."),
            (
                factor * (old_total + powers.sum(-1)),
                "What is scaled? Only what was there before. The new exponentials have the new "
                "maximum already.",
            ),
            (
                factor * old_total + own.sum(-1),
                "Which maximum do you subtract from the new scores? The new one of the row, not "
                "that of the tile.",
            ),
            (
                factor * old_total + raw.sum(-1),
                "Do you subtract the maximum from the new scores? Without it they overflow.",
            ),
        ],
        "Compare with: exp(old − new) times the old sum, plus the sum of exp(scores − new).",
    )
    expect_close(
        mixed,
        right[2],
        [
            (
                old_mixed + powers @ v[1],
                "Is the accumulator rescaled as well? The sum is. Both hold exponentials with the "
                "old maximum.",
            ),
            (
                right[2] / right[1][:, None],
                "When do you divide by the sum? At the very end, once. Divided now, the next tile "
                "would be added to a mean, not to a sum.",
            ),
            (powers @ v[1], "Where is the old accumulator? The tiles before count, too."),
        ],
        "Compare with: exp(old − new) times the old accumulator, plus exp(scores − new) @ v.",
    )
    first = answer(*_start(), scores[2], v[2])
    expect(
        all(x.isfinite().all() for x in first),
        "What comes out of the first tile, where the maximum so far is −∞? exp(−∞ − new) is 0, "
        "but −∞ times 0, or −∞ − (−∞), is NaN.",
    )
    hidden = scores[2].clone()
    hidden[1] = -torch.inf
    blind = answer(*_start(), hidden, v[2])
    expect(
        not any(x.isnan().any() for x in blind),
        "And a query whose keys are all hidden so far? Its maximum stays −∞, and −∞ − (−∞) is "
        "NaN. Subtract 0 there.",
    )
    m, total, mixed = answer(*blind, scores[0], v[0])
    after = _update(*_start(), scores[0], v[0])
    expect(
        torch.allclose(mixed[1] / total[1], after[2][1] / after[1][1], atol=1e-5),
        "What has a query kept that saw nothing so far? Sum and accumulator must still be 0.",
    )
    heads = answer(*(x.expand(2, *x.shape) for x in (*state, scores[1], v[1])))
    expect(
        heads[2].shape == (2, R, D) and torch.allclose(heads[2][1], right[2], atol=1e-5),
        "And with heads in front? Count dimensions from the end: `dim=-1`, `[..., None]`.",
    )
    return "Three numbers a query, however long the row: that is the online softmax."


@exercise("8.2", "Two halves, one result", difficulty=2, minutes=12)
def merge(answer):
    q, k, v = _sample(3, 2, 8, D)
    k = k * torch.linspace(0.5, 3, 8)[:, None]

    def half(keys, values):
        scores = q @ keys.mT
        return scores.softmax(-1) @ values, scores.logsumexp(-1)

    one, two = half(k[:, :6], v[:, :6]), half(k[:, 6:], v[:, 6:])
    out, lse = _three(answer(*one, *two), ((2, 8, D), (2, 8)), ("the result", "the log-sum-exp"))
    right, right_lse = half(k, v)
    (a, la), (b, lb) = one, two
    weight = torch.sigmoid(la - lb)[..., None]
    by_lse = (la / (la + lb))[..., None]
    expect_close(
        out,
        right,
        [
            ((a + b) / 2, "Does each half weigh the same? The one with higher scores weighs more."),
            (a + b, "Do the weights of the two halves sum to 1?"),
            (
                0.75 * a + 0.25 * b,
                "Do you weigh by the number of keys? What counts is the sum of exponentials: "
                "exp(lse).",
            ),
            (
                by_lse * a + (1 - by_lse) * b,
                "Is the log-sum-exp itself the weight? It is a logarithm: take exp first.",
            ),
            (
                (1 - weight) * a + weight * b,
                "Which half gets which weight? Yours are exchanged.",
            ),
            (
                la.exp()[..., None] * a + lb.exp()[..., None] * b,
                "Where is the division? exp(lse) of one half, divided by the sum of both.",
            ),
        ],
        "The weight of a half is exp(lse of the half), divided by the sum of both. Try it with "
        "one key in each half.",
    )
    expect_close(
        lse,
        right_lse,
        [
            (la + lb, "Can logarithms of sums be added? exp(a) + exp(b) is not exp(a + b)."),
            (torch.maximum(la, lb), "Is the larger one enough? The other half adds to the sum."),
            (
                la.exp() + lb.exp(),
                "Is this the sum itself? The log-sum-exp is its logarithm.",
            ),
        ],
        "The result is right; the log-sum-exp is not: log(exp(lse_a) + exp(lse_b)).",
    )
    high = answer(a, la + 1000, b, lb + 1000)
    low = answer(a, la - 1000, b, lb - 1000)
    expect(
        all(x.isfinite().all() for x in high)
        and torch.allclose(high[0], right, atol=1e-4)
        and torch.allclose(high[1], right_lse + 1000, atol=1e-2),
        "And for scores around 1,000? exp(1000) overflows. Subtract the larger log-sum-exp first, "
        "or use `torch.logaddexp`.",
    )
    expect(
        all(x.isfinite().all() for x in low) and torch.allclose(low[0], right, atol=1e-4),
        "And for scores around −1,000? exp(−1000) is 0, and 0/0 is NaN. Subtract the larger one, "
        "not the larger one without its sign.",
    )
    nothing = answer(a, la, torch.zeros_like(b), torch.full_like(lb, -torch.inf))
    expect(
        all(torch.allclose(x, y, atol=1e-5) for x, y in zip(nothing, one, strict=True)),
        "And where one half saw no key? Its log-sum-exp is −∞, so its weight is 0, and the other "
        "half is the result.",
    )
    return "Two processors, each with half of the keys, and no trace of the cut in the result."


def _count(length, half_window, rows, cols) -> int:
    mask = window_mask(length, half_window)
    return sum(bool(tile.any()) for part in mask.split(rows) for tile in part.split(cols, dim=1))


@exercise("8.3", "Which tiles?", difficulty=2, minutes=12)
def tiles_in_window(answer):
    def ask(*sizes):
        count = answer(*sizes)
        expect(
            isinstance(count, int) or (isinstance(count, float) and count == int(count)),
            f"Is the result a whole number? The check got `{count!r}`.",
        )
        return int(count)

    length, window, rows, cols = 64, 8, 8, 8
    found, right = ask(length, window, rows, cols), _count(length, window, rows, cols)
    expect(
        found != (length // rows) * (length // cols),
        "Do you count all tiles? Those that lie wholly outside the window are left out.",
    )
    expect(
        found != length // rows * 3,
        "What do the first and the last queries see? Beside the first tile there is nothing on "
        "the left, and beside the last one nothing on the right.",
    )
    expect(
        found != window_mask(length, window).sum(),
        "Do you count pairs of tokens? Count tiles: one visible pair is enough.",
    )
    expect(found == right, f"64 tokens, W = 8, tiles of 8 × 8: expected {right}, got {found}.")
    far, seen = ask(64, 24, 8, 8), _count(64, 24, 8, 8)
    expect(
        far != _count(64, 12, 8, 8),
        "How far does a query see? W to *each* side; yours sees half of that.",
    )
    expect(far == seen, f"64 tokens, W = 24, tiles of 8 × 8: expected {seen}, got {far}.")
    inner, seen = ask(64, 7, 8, 8), _count(64, 7, 8, 8)
    expect(
        inner != 64 // 8,
        "Do you round the right way? W = 7 is less than a tile, and yet the window reaches into "
        f"the next one: expected {seen} tiles, got {inner}.",
    )
    expect(
        inner == seen,
        "Who in a tile of queries sees furthest to the right? Its *last* query: with W = 7, from "
        f"7 to 14. Expected {seen} tiles, got {inner}.",
    )
    edge, seen = ask(64, 9, 8, 8), _count(64, 9, 8, 8)
    expect(
        edge == seen,
        "Are the window's ends inside? With W = 9, query 7 sees key 16, the first one of the next "
        f"tile: expected {seen} tiles, got {edge}.",
    )
    wide, seen = ask(64, 8, 16, 4), _count(64, 8, 16, 4)
    expect(
        wide == seen,
        "Are rows and columns in the right places? Tiles of 16 queries × 4 keys: expected "
        f"{seen}, got {wide}.",
    )
    rest, seen = ask(61, 8, 8, 8), _count(61, 8, 8, 8)
    ragged, ragged_seen = ask(70, 3, 16, 8), _count(70, 3, 16, 8)
    expect(
        (rest, ragged) == (seen, ragged_seen),
        "What becomes of the rest? 61 tokens in tiles of 8 leave a smaller tile at the end: "
        f"expected {seen} and {ragged_seen}, got {rest} and {ragged}.",
    )
    for sizes in ((10, 0, 1, 1), (33, 100, 8, 8), (1, 5, 64, 64), (129, 64, 32, 64)):
        got, seen = ask(*sizes), _count(*sizes)
        expect(
            got == seen,
            f"Length, half window, rows, cols = {sizes}: expected {seen} tiles, got {got}.",
        )
    length = 8192
    with _Watch() as watch:
        answer(length // 8, 64, 64, 64)
    expect(
        watch.largest < (length // 8) ** 2,
        "Do you build the whole mask? For a million tokens it would not fit into memory. A "
        "group of queries sees one stretch of keys: where does it start, and where does it end?",
    )
    all_tiles = (length // 64) ** 2
    return f"In ModernBERT's window that is {answer(length, 64, 64, 64):,} tiles of {all_tiles:,}."


@exercise("8.4", "The bill in bytes", difficulty=1, minutes=8)
def traffic(answer):
    L, b, rows = 512, 2, 128
    size = 64
    result = answer(L, size, b, rows)
    expect(
        isinstance(result, tuple | list) and len(result) == 2,
        "Does your function return two numbers: eager, tiles?",
    )
    eager, tiles = result
    expect(
        eager != 4 * L * size + 4 * L * L and tiles != L * size * (2 + 2 * L // rows),
        "Numbers or bytes? Each number takes b bytes.",
    )
    right = b * (4 * L * size + 4 * L * L)
    expect(
        eager != b * 4 * L * L,
        "What else is moved in eager attention? Q, K and V are read, and O is written.",
    )
    expect(
        eager != b * (4 * L * size + 2 * L * L),
        "How often is a square moved? The scores are written and read, the weights are written "
        "and read.",
    )
    expect(
        eager != b * (4 * L * size + 3 * L * L),
        "How often is a square moved? Three times is one too few: the softmax reads one square "
        "and writes another one.",
    )
    expect(
        eager != b * (3 * L * size + 4 * L * L),
        "Is the result in it? O is written as well.",
    )
    expect(eager == right, f"Eager, 512 tokens, D = 64, 2 bytes: expected {right:,}, got {eager}.")
    right = b * L * size * (2 + 2 * L // rows)
    expect(
        tiles != b * 4 * L * size,
        "How often do keys and values come to the chip? Once for each group of queries, not once.",
    )
    expect(
        tiles != b * L * size * (2 + L // rows),
        "What passes by for each group of queries? Keys *and* values.",
    )
    expect(
        tiles != b * L * size * (1 + 2 * L // rows),
        "What is moved once? Queries in, and results out.",
    )
    expect(
        tiles != b * L * size * (2 + 2 * rows),
        "How many groups of queries are there? L / rows, not rows.",
    )
    expect(
        tiles != b * (L * size * (2 + 2 * L // rows) + 4 * L * L)
        and tiles != b * (L * size * (2 + 2 * L // rows) + L * L),
        "Do the scores leave the chip? Not in tiles: no square is moved.",
    )
    expect(tiles == right, f"Tiles of 128 rows, same sizes: expected {right:,}, got {tiles}.")
    last = answer(500, size, b, rows)[1]
    right = b * 500 * size * (2 + 2 * math.ceil(500 / rows))
    expect(
        last == right,
        "What becomes of the rest? 500 queries in groups of 128 are 4 groups, and the last one "
        f"takes all keys, too: expected {right:,}, got {last}.",
    )
    other = answer(300, 32, 4, 50)
    expect(
        tuple(other) == (4 * (4 * 300 * 32 + 4 * 300**2), 4 * 300 * 32 * (2 + 2 * 6)),
        "Right for these sizes, wrong for L = 300, D = 32, b = 4, rows = 50. Is a size written "
        "into your code?",
    )
    long = answer(8192, 64, 2, 128)
    return f"At 8,192 tokens tiles move {long[0] / long[1]:.1f} times less than eager attention."


@exercise("8.5", "Your tiles in the real model", difficulty=3, minutes=30)
def in_mini(answer):
    H, L, size = 2, 70, 16
    q, k, v = (x[None] for x in _sample(3, H, L, size))
    q = 3 * q
    right = eager_attention(q, k, v)[0]
    out = answer(q, k, v, None)
    expect(
        not isinstance(out, tuple | list),
        "Does your function return one tensor, the results? In tiles there are no weights to show.",
    )
    expect_tensor(out.nan_to_num() if isinstance(out, torch.Tensor) else out, (1, H, L, size))
    expect(
        not out.isnan().any(),
        "Where does the NaN come from, without any mask? Is the maximum −∞ at the start, and the "
        "sum 0 only then?",
    )
    unscaled = eager_attention(q * size**0.5, k, v)[0]
    expect_close(
        out,
        right,
        [
            (unscaled, "Where is the scale? The scores are multiplied by D^-0.5."),
            (
                v.mean(-2, keepdim=True).expand_as(v),
                "Do the scores matter at all? Every query gets the plain mean.",
            ),
        ],
        "The shape is right, the numbers are not. Is the accumulator rescaled when the maximum "
        "grows, and divided by the sum once, at the end? Does every tile of keys pass by, the "
        "smaller last one too? Try 4 tokens in tiles of 2.",
    )
    q, k, v = (x[None] for x in _sample(3, H, 512, size))
    with _Watch() as watch:
        answer(q, k, v, None)
    expect(
        not any("scaled_dot" in name or "_safe_softmax" in name for name in watch.names),
        "Is that PyTorch's fused kernel? It has tiles already. Here, write them yourself.",
    )
    expect(
        not any("softmax" in name for name in watch.names),
        "Does your code call a softmax? That needs the whole row. In tiles there are a maximum, a "
        "sum and an accumulator.",
    )
    expect(
        watch.largest < H * 512 * 512 / 2,
        f"How large is the largest tensor? Yours has {watch.largest:,} numbers; the square of all "
        f"scores has {H * 512 * 512:,}. Cut queries and keys.",
    )
    q, k, v = (x[None] for x in _sample(3, H, L, size))
    length = torch.arange(L)
    mask = (length < 60)[None, None, None].expand(1, 1, L, L)
    masked = answer(q, k, v, mask)
    right = eager_attention(q, k, v, mask=mask)[0]
    expect_close(
        masked.nan_to_num(nan=7e7),
        right,
        [
            (eager_attention(q, k, v)[0], "Does the mask do anything? All keys are still seen."),
            (
                eager_attention(q, k, v, mask=~mask)[0],
                "What does True mean here? That a query may see this key.",
            ),
        ],
        "Right without a mask, wrong with one of shape (B, 1, L, L) that hides the last ten keys. "
        "Do you cut rows *and* columns of the mask as those of the scores?",
    )
    local = window_mask(L, 2)
    masked = answer(q, k, v, local)
    expect(
        not masked.isnan().any(),
        "What happens in a tile in which a query sees no key? If none was seen before either, its "
        "maximum is still −∞, and −∞ − (−∞) is NaN. Subtract 0 there.",
    )
    expect(
        torch.allclose(masked, eager_attention(q, k, v, mask=local)[0], atol=1e-5),
        "Right with padding, wrong with a window of shape (L, L). There, whole tiles are hidden. "
        "Is what such a tile added gone again when the first visible key comes?",
    )
    blind = local.clone()
    blind[5] = False
    expect(
        answer(q, k, v, blind).isfinite().all(),
        "What does a query get that may see no key at all? Its sum is 0, and 0/0 is NaN.",
    )
    stream = answer(q[0], k[0], v[0], None)
    expect(
        stream.shape == q[0].shape
        and torch.allclose(stream, eager_attention(q[0], k[0], v[0])[0], atol=1e-5),
        "And for one stream of tokens, (H, N, D), without a batch? Count dimensions from the end.",
    )
    return _in_the_model(answer)


def _in_the_model(answer) -> str:
    from modernbert_mini import ModernBertForMaskedLM, swap

    model = ModernBertForMaskedLM.from_pretrained("mini", attn_implementation="eager").eval()
    ids = torch.randint(300, 4000, (2, 150), generator=torch.Generator().manual_seed(8))
    real = torch.ones_like(ids)
    real[1, 40:] = 0
    mine = swap(model, "eager_attention", lambda q, k, v, *, mask: (answer(q, k, v, mask), None))
    with torch.no_grad():
        apart = (mine(ids, attention_mask=real).logits - model(ids, attention_mask=real).logits)[
            real.bool()
        ]
    gap = apart.abs().max()
    if not gap < 1e-3:
        raise Hint(
            f"Alone it is right; in `mini` the logits move by {gap:.1g}. Texts there have 150 "
            "tokens and 40. Is a length written into your code?"
        )
    return f"Your tiles do the work of all layers of `mini`; its logits move by {gap:.0e}."
