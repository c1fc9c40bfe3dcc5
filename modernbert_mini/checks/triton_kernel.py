"""Checks of chapter 9, writing the kernel. Every answer runs on the GPU on paper."""

import functools
import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from modernbert_mini.alternating_attention import packed_mask
from modernbert_mini.checks._machinery import Hint, exercise, expect, expect_close, expect_tensor
from modernbert_mini.checks._paper_gpu import PaperError, PaperGPU

LOG2_E = math.log2(math.e)


def _sample(*shape: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _nothing(*shape: int) -> torch.Tensor:
    """Memory that nobody has written yet: NaN says so."""
    return torch.full(shape, torch.nan)


def _run(kernel, grid, *arguments, told: Callable = lambda gpu, error: "", **sizes) -> PaperGPU:
    """Run a kernel on paper; what paper does not forgive becomes a hint, by ``told`` if it can."""
    gpu = PaperGPU()
    try:
        return gpu.run(kernel, grid, *arguments, **sizes)
    except PaperError as error:
        raise Hint(told(gpu, str(error)) or str(error)) from None


def _written(out: torch.Tensor, what: str) -> None:
    expect(
        not out.isnan().all(),
        f"Does your kernel write anything? `{what}` is untouched: the last line is a `tl.store`.",
    )


# ---- 9.1 ----


def _first_place(gpu: PaperGPU) -> int | None:
    """Where the second program starts to read."""
    places = [places for program, _, places in gpu.trace if program == (1, 0, 0)]
    return int(places[0].flatten()[0]) if places and places[0].numel() else None


def _told_by_add(gpu: PaperGPU, error: str) -> str:
    start = _first_place(gpu)
    if "another one" in error and start == 0:
        return (
            "Which part is whose? Program 1 starts at number 0, as program 0 does. Where does "
            "`tl.program_id(0)` come in?"
        )
    if "another one" in error and start == 1:
        return (
            "Program 1 starts at number 1, and program 0 has that one, too. How many numbers does "
            "each program take? So where does the next one start?"
        )
    return ""


@exercise("9.1", "The residual stream", difficulty=1, minutes=10)
def add(answer):
    x, y = _sample(16), _sample(16, seed=10)
    out = torch.full((16,), torch.inf)
    _run(answer, (3,), x, y, out, 10, told=_told_by_add, BLOCK=4)
    _written(out.masked_fill(out.isinf(), torch.nan), "out")
    expect(
        out[:10].isfinite().all(),
        "Are there numbers that no program wrote? Three programs of four numbers take care of 10.",
    )
    expect_close(
        out[:10],
        (x + y)[:10],
        [
            (x[:10], "Where is `y`? You store `x` as it is."),
            (y[:10], "Where is `x`? You store `y` as it is."),
            ((x - y)[:10], "Plus or minus? The residual stream *adds*."),
            ((x * y)[:10], "Plus or times? The residual stream *adds*."),
            (2 * x[:10], "Is `y` loaded through the pointer `y`? You add `x` to itself."),
        ],
        "Compare number by number with `x + y`: which ones differ?",
    )
    expect(
        out[11:].isinf().all(),
        "What becomes of numbers 10 and 11? The third program has four numbers, and only two of "
        "them exist. Give `tl.store` a mask.",
    )
    expect(
        out[10].isinf(),
        "Is number `n` still inside? Numbers run from 0 to n - 1, so the mask is `places < n`.",
    )
    tight = _nothing(10)

    def told(gpu, error):
        return (
            "The store has a mask, and the load? It reads numbers 10 and 11, which are somebody "
            f"else's memory.\n{error}"
            if "tl.load" in error
            else ""
        )

    _run(answer, (3,), x[:10].clone(), y[:10].clone(), tight, 10, told=told, BLOCK=4)
    for n, block in ((1, 16), (33, 8)):
        out = _nothing(n)
        grid = (-(-n // block),)
        other = (
            f"Right for 10 numbers in blocks of 4, wrong for {n} in blocks of {block}. Is a size "
            "written into your code?"
        )
        given = _sample(n), _sample(n, seed=11)
        _run(answer, grid, *given, out, n, told=lambda *_, other=other: other, BLOCK=block)
        expect(torch.equal(out, given[0] + given[1]), other)
    return "Programs, pointers, masks: the rest of the chapter is made of these."


# ---- 9.2 ----


@functools.cache
def _mini():
    from modernbert_mini import ModernBertForMaskedLM, Tokenizer

    tokenizer = Tokenizer.from_pretrained("mini")
    return ModernBertForMaskedLM.from_pretrained("mini").eval(), tokenizer


def _moved(part: str, own: Callable, text: str) -> float:
    """How far the logits of mini move when a part of it is exchanged."""
    from modernbert_mini import swap

    model, tokenizer = _mini()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float((swap(model, part, own)(ids).logits - model(ids).logits).abs().max())


def _run_geglu(answer, x: torch.Tensor, **more) -> torch.Tensor:
    """x (N, 2·I), with rows that may lie apart."""
    tokens, width = x.shape[0], x.shape[1] // 2
    roomy = _nothing(tokens, width + 1)[:, :width]  # (N, I), and a number of room behind each row
    block = 1 << (width - 1).bit_length()
    _run(answer, (tokens,), x, roomy, x.stride(0), roomy.stride(0), width, BLOCK=block, **more)
    return roomy


@exercise("9.2", "GeGLU in one kernel", difficulty=2, minutes=15)
def geglu(answer):
    def told(gpu, error):
        if "another one" in error and gpu.stored["out"] > 6 * 4:
            return (
                "Where does a row of `out` end? A block is a power of two, and 6 is none: without "
                f"a mask of `columns < I`, a program writes into the next row.\n{error}"
            )
        if "another one" in error:
            return (
                "Which row is whose? Every program writes into the first one. Where does "
                f"`tl.program_id(0) * out_row` come in?\n{error}"
            )
        if "tl.load" in error:
            return (
                "Does the load stay in its row? `columns` runs to BLOCK, the row to I, and its "
                f"gate to 2·I.\n{error}"
            )
        return ""

    room = 2 * _sample(3 * 12 + 16)
    x = room[:36].view(3, 12)  # (N, 2·I)
    out = _run_geglu(answer, x, told=told)
    _written(out, "out")
    signal, gate = x.chunk(2, dim=-1)
    shifted = room.as_strided((3, 6), (12, 1), 8)
    narrow = room.as_strided((3, 12), (6, 1))
    near, far = narrow.chunk(2, dim=-1)
    tanh = F.gelu(signal, approximate="tanh")
    expect(
        not out.isnan().all(dim=-1).any(),
        "Does every token get its row? Rows of `out` are untouched: where does "
        "`tl.program_id(0) * out_row` come in?",
    )
    expect_close(
        out.nan_to_num(0.123),
        F.gelu(signal) * gate,
        [
            (
                signal * F.gelu(gate),
                "Which half is activated? `Wi` puts the input first and the gate behind it: GELU "
                "takes the *first* half.",
            ),
            (
                F.gelu(signal) * shifted,
                "Where does the gate start? Behind I numbers, not behind BLOCK: I is 6 here, and "
                "BLOCK is 8.",
            ),
            (
                F.gelu(near) * far,
                "How far is it from one row of `x` to the next? `x_row` numbers: a row holds 2·I.",
            ),
            (F.gelu(signal), "Where is the gate? Multiply by the second half."),
            (signal * gate, "Where is GELU? You multiply the halves as they are."),
            (
                F.silu(signal) * gate,
                "Is that GELU? x · sigmoid(x) is SiLU. GELU is x · Φ(x), with `tl.erf`.",
            ),
            (
                torch.sigmoid(1.702 * signal) * signal * gate,
                "Is that the exact GELU? You have its approximation by a sigmoid. Take `tl.erf`.",
            ),
            (
                signal * (1 + torch.erf(signal / 2**0.5)) * gate,
                "Is Φ(x) at most 1? Yours goes up to 2: a factor of 0.5 is missing.",
            ),
            (
                0.5 * signal * (1 + torch.erf(signal)) * gate,
                "What stands inside erf? Φ(x) = (1 + erf(x / √2)) / 2: the root is missing.",
            ),
            (
                tanh * gate,
                "Is that the exact GELU? You have the tanh approximation; ModernBERT has erf.",
            ),
        ],
        "Compare with `F.gelu(x[:, :I]) * x[:, I:]`, row by row.",
    )
    apart = _sample(3, 20)[:, :12]
    expect(
        torch.allclose(
            _run_geglu(answer, apart, told=told),
            F.gelu(apart[:, :6]) * apart[:, 6:],
            atol=1e-5,
        ),
        "And where rows lie further apart than 2·I? Use `x_row`, not 2·I.",
    )
    half = 2 * _sample(2, 12).half()
    exact = F.gelu(half[:, :6].float()) * half[:, 6:].float()
    expect(
        (_run_geglu(answer, half, told=told) - exact).abs().max() < 1e-3,
        "And in float16? Compute in float32: `.to(tl.float32)` behind the load.",
    )

    def own(x):
        out = _run_geglu(answer, x.reshape(-1, x.shape[-1]))  # (N, I)
        return out.reshape(*x.shape[:-1], -1)

    moved = _moved("gated_linear_unit", own, "The river rises in the [MASK].")
    expect(moved < 1e-3, f"In `mini`, logits move by {moved:.0e}. Which sizes does it have?")
    return (
        "One kernel in place of three operations, and in all layers of `mini` no logit moves by "
        f"more than {moved:.0e}."
    )


# ---- 9.3 ----


def _mixed(acc, total, top, q, keys, values, seen, scale):
    scores = (q.float() @ keys.float().mT * scale).masked_fill(~seen, -1e30)
    higher = torch.maximum(top, scores.amax(1))
    shrink, powers = torch.exp2(top - higher), torch.exp2(scores - higher[:, None])
    acc = acc * shrink[:, None] + powers @ values.float()
    return acc, total * shrink + powers.sum(1), higher


@exercise("9.3", "One more tile, on the chip", difficulty=2, minutes=15)
def tile(answer):
    R, K, D = 64, 32, 16
    scale = D**-0.5 * LOG2_E
    q, keys, values = _sample(R, D), 2 * _sample(3, K, D, seed=10), _sample(3, K, D, seed=11)
    empty = torch.zeros(R, D), torch.zeros(R), torch.full((R,), -torch.inf)
    everything = torch.ones(R, K, dtype=torch.bool)

    def ask(state, i, seen=everything, kind=torch.float32):
        given = [x.to(kind) for x in (q, keys[i], values[i])]
        try:
            result = PaperGPU().on_paper(answer)(*(x.clone() for x in state), *given, seen, scale)
        except PaperError as error:
            expect(
                "to be cast" not in str(error),
                "Which dtype do your exponentials have? They are float32, the values are "
                "float16, and `tl.dot` multiplies what is alike: `powers.to(values.dtype)`.\n"
                f"{error}",
            )
            expect(
                "do the sides meet" not in str(error),
                "Rows times rows? A score is a row of `q` times a row of `keys`, so `tl.dot` "
                f"wants `tl.trans(keys)`.\n{error}",
            )
            raise Hint(str(error)) from None
        expect(
            isinstance(result, tuple) and len(result) == 3,
            "Does your function return three things: acc, total, top?",
        )
        for x, shape, name in zip(
            result, ((R, D), (R,), (R,)), ("acc", "total", "top"), strict=True
        ):
            expect_tensor(x.nan_to_num() if isinstance(x, torch.Tensor) else x, shape, what=name)
        return result

    first = _mixed(*empty, q, keys[0], values[0], everything, scale)
    acc, total, top = ask(first, 1)
    old_acc, old_total, old_top = first
    right = _mixed(*first, q, keys[1], values[1], everything, scale)
    scores = q @ keys[1].mT * scale
    raw = q @ keys[1].mT
    expect_close(
        top,
        right[2],
        [
            (scores.amax(1), "Is the old maximum lost? `top` is the larger one of old and new."),
            (old_top, "Does `top` ever move? This tile may hold a larger score."),
            (
                torch.maximum(old_top, scores.max()),
                "Whose maximum is it? One for each row: `tl.max(scores, 1)`.",
            ),
            (
                torch.maximum(old_top, raw.amax(1)),
                "Where is `scale`? It holds D^-0.5 and log2(e), and belongs to the scores.",
            ),
        ],
        "Is `top` the maximum of the old one and of `q @ keys.T * scale`, row by row?",
    )
    powers = torch.exp2(scores - top[:, None])
    natural = torch.exp(scores - top[:, None])
    expect_close(
        total,
        right[1],
        [
            (
                old_total + powers.sum(1),
                "Is the old sum relative to the new `top`? Multiply it by `tl.exp2(top - higher)` "
                "first.",
            ),
            (
                torch.exp(old_top - top) * old_total + natural.sum(1),
                "Base 2 or base e? `scale` has log2(e) in it, so take `tl.exp2`.",
            ),
            (powers.sum(1), "Where is the old sum? The tiles before count, too."),
            (
                torch.exp2(top - old_top) * old_total + powers.sum(1),
                "Which way round? `top` grew, so the old sum must shrink: exp2(old - new).",
            ),
        ],
        "Compare with: exp2(old top - new top) times the old sum, plus the sum of "
        "exp2(scores - new top).",
    )
    expect_close(
        acc,
        right[0],
        [
            (
                old_acc + powers @ values[1],
                "Is the accumulator rescaled, too? The sum is. Both are relative to `top`.",
            ),
            (
                right[0] / right[1][:, None],
                "Already divided by the sum? The next tile adds to a sum, not to a mean. The "
                "kernel divides once, behind the loop.",
            ),
            (powers @ values[1], "Where is the old accumulator? The tiles before count, too."),
        ],
        "Compare with: exp2(old top - new top) times the old accumulator, plus powers @ values.",
    )
    some = _sample(R, K, seed=12) > 0
    some[:8] = False  # these rows see nothing of the tile
    some[8:, 0] = True
    state = ask(empty, 0, some)
    seen_right = _mixed(*empty, q, keys[0], values[0], some, scale)
    everything_right = _mixed(*empty, q, keys[0], values[0], everything, scale)
    expect(
        not torch.allclose(state[1][8:], everything_right[1][8:], atol=1e-4),
        "What does `seen` do? Where it is false, the score has to be replaced before the maximum "
        "is taken: `tl.where`.",
    )
    expect(
        not any(x[:8].isnan().any() for x in state),
        "And a row that has seen nothing so far? With -inf for hidden scores, `top` stays -inf, "
        "and -inf - (-inf) is not a number. Take a finite number, such as -1e30.",
    )
    expect(
        torch.allclose(state[0][8:], seen_right[0][8:], atol=1e-4)
        and torch.allclose(state[1][8:], seen_right[1][8:], atol=1e-4),
        "What do hidden keys still weigh? A score of 0 is no low score: exp2(0 - top) is above "
        "0. Take -1e30.",
    )
    late = ask(state, 2)
    acc, total, _ = _mixed(*empty, q, keys[2], values[2], everything, scale)
    fresh = acc / total[:, None]
    expect(
        torch.allclose((late[0] / late[1][:, None])[:8], fresh[:8], atol=1e-4),
        "What is left of the hidden tile once a row sees its first key? Nothing may be: with a "
        "score as low as -1e30, the factor is exactly 0.",
    )
    half = ask(empty, 0, kind=torch.float16)
    expect(
        torch.allclose(half[0], everything_right[0], atol=0.1) and half[0].dtype == torch.float32,
        "And with float16 queries, keys and values? Scores, sum and accumulator stay float32; only "
        "the exponentials are cast, for `tl.dot`.",
    )
    return "This is the inner loop of the kernel: two products and a rescaling."


# ---- 9.4 ----


def _backward(n: int, D: int, seed: int = 9):
    """Queries, keys and gradients (n, D), and the base-2 log-sum-exp of each query."""
    q, k, grad = _sample(3, n, D, seed=seed)
    return q, k, grad, (q @ k.mT * D**-0.5).logsumexp(-1) * LOG2_E


@exercise("9.4", "The gradient of the values", difficulty=3, minutes=25)
def value_gradient(answer):
    D, OWN, OTHER = 16, 32, 16

    def told(gpu, error):
        if "`dv`" in error and "another one" in error:
            return (
                "Who owns a row of `dv`? Every query adds to the gradient of every value. If "
                "programs own queries, they all write to the same place. Let a program own *keys*, "
                f"and loop over the queries.\n{error}"
            )
        if "do the sides meet" in error:
            return (
                "Which way does the square of weights lie? For `dv` its rows are keys and its "
                f"columns queries: `tl.dot(k, tl.trans(q))`.\n{error}"
            )
        if "tl.store" in error:
            return f"The last tile of keys is not full. What does the store's mask say?\n{error}"
        if "tl.load" in error:
            return f"The last tile of queries or keys is not full. Mask every load.\n{error}"
        return ""

    def ask(n, seed=9):
        q, k, grad, lse = _backward(n, D, seed)
        dv = _nothing(n, D)
        _run(answer, (-(-n // OWN),), q, k, grad, lse, dv, n, told=told, D=D, OWN=OWN, OTHER=OTHER)
        return dv, (q, k, grad, lse)

    dv, (q, k, grad, lse) = ask(64)
    _written(dv, "dv")
    expect(not dv[OWN:].isnan().any(), "Are all keys done? Program 1 owns keys 32 to 63.")
    logits = q @ k.mT * D**-0.5 * LOG2_E
    weights = torch.exp2(logits - lse[:, None])
    expect_close(
        dv.nan_to_num(0.123),
        weights.mT @ grad,
        [
            (
                torch.exp(logits - lse[:, None]).mT @ grad,
                "Base 2 or base e? `lse` is in base 2, and the scores need log2(e): take "
                "`tl.exp2`.",
            ),
            (
                torch.exp2(logits / LOG2_E - lse[:, None]).mT @ grad,
                "Are scores and `lse` in the same base? Multiply the scores by log2(e) as well.",
            ),
            (
                torch.exp2(logits * D**0.5 - lse[:, None]).mT @ grad,
                "Where is the scale? A score is q · k times D^-0.5.",
            ),
            (
                torch.exp2(logits.mT - lse[:, None]) @ grad,
                "Whose log-sum-exp is it? A weight is normalised over the keys of its *query*. "
                "Queries are columns here: `sums[None, :]`.",
            ),
            (
                weights @ grad,
                "Which way does the square of weights lie? For `dv` it is turned over.",
            ),
            (
                torch.exp2(logits).mT @ grad,
                "Where is `lse`? Without it these are exponentials, not weights.",
            ),
            (
                weights[-OTHER:].mT @ grad[-OTHER:],
                "Does each tile of queries add to what was there? Yours holds the last one only.",
            ),
            (
                weights[:OTHER].mT @ grad[:OTHER],
                "How many tiles of queries are there? Yours holds the first one only.",
            ),
        ],
        "Compare with `weights.T @ grad`, where a weight is exp2(score - lse of its query).",
    )
    dv, (q, k, grad, lse) = ask(75, seed=12)
    weights = torch.exp2(q @ k.mT * D**-0.5 * LOG2_E - lse[:, None])
    expect(
        not dv.isnan().any(),
        "Where does NaN come from with 75 tokens? A load with a mask and without `other` brings "
        "anything at all, and anything times 0 need not be 0.",
    )
    expect_close(
        dv,
        weights.mT @ grad,
        [
            (
                weights[:64].mT @ grad[:64],
                "What about the queries behind the last full tile? `range(0, n, OTHER)`.",
            ),
        ],
        "Right for 64 tokens, wrong for 75: what happens in the tiles that are not full?",
    )
    return "Nobody waits for anybody: each number of `dv` has one program that writes it."


# ---- 9.5 ----


def _attend(answer, q, k, v, bounds, half_window, told=lambda gpu, error: "", longest=None):
    """Run a whole kernel: q, k, v (H, N, D)."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    H, N, D = q.shape
    longest = int(bounds.diff().max()) if longest is None else longest
    out, (OWN, OTHER) = _nothing(H, N, D), (32, 16)
    grid = -(-longest // OWN) * (len(bounds) - 1), H
    sizes = {"HALF_WINDOW": half_window, "D": D, "OWN": OWN, "OTHER": OTHER}
    args = (q, k, v, out, N * D, D, bounds, longest)
    return out, _run(answer, grid, *args, told=told, **sizes)


def _told_by_attention(gpu: PaperGPU, error: str) -> str:
    heads = gpu.grid[1] > 1
    if "`out`" in error and "another one" in error and heads:
        return (
            "Whose head is it? Two programs write to the same place; `tl.program_id(1)` is the "
            f"head, and heads lie `head` numbers apart.\n{error}"
        )
    if "tl.store" in error and "goes to number" in error:
        return f"The last tile of queries is not full. What does the store's mask say?\n{error}"
    if "another one" in error:
        return (
            "Who stops at the end of a sequence? A program behind it has nothing to do, and a "
            "last tile writes its rows up to the end alone. Yours writes into the next sequence."
            f"\n{error}"
        )
    return ""


@exercise("9.5", "Your kernel in the real model", difficulty=3, minutes=45)
def in_mini(answer):
    def compare(lengths, half_window, mistakes=(), otherwise="", H=1, D=16, seed=9, **more):
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        q, k, v = _sample(3, H, sum(lengths), D, seed=seed)
        q = 2 * q
        out, gpu = _attend(answer, q, k, v, bounds, half_window, _told_by_attention, **more)
        _written(out, "out")
        expect(
            half_window is None or not out.isnan().any(),
            "Where does NaN come from? In a window some rows see nothing of a tile that others "
            "need. Hide with -1e30, not with -inf.",
        )

        def expected(half_window=half_window, bounds=bounds, factor=D**-0.5):
            scores = (q @ k.mT * factor).masked_fill(~packed_mask(bounds, half_window), -torch.inf)
            return scores.softmax(-1) @ v

        right = expected()
        expect_close(
            out.nan_to_num(123.0), right, [(f(expected), hint) for f, hint in mistakes], otherwise
        )
        return gpu

    compare(
        [32],
        None,
        [
            (
                lambda expected: expected(factor=1.0),
                "Where is the scale? A score is q · k times D^-0.5.",
            ),
            (
                lambda expected: expected(factor=16**-0.5 * LOG2_E),
                "Base 2 or base e? With log2(e) in the scores it is `tl.exp2`, without it "
                "`tl.exp`.",
            ),
            (
                lambda expected: expected(factor=16**-0.5 / LOG2_E),
                "Base 2 or base e? `tl.exp2` wants log2(e) in the scores, and `tl.exp` does not.",
            ),
        ],
        "One text of 32 tokens, one tile of queries, two tiles of keys, and the result is wrong. "
        "Compare your inner loop with exercise 9.3.",
    )
    compare(
        [75],
        None,
        [],
        "Right for 32 tokens, wrong for 75. Which tiles are not full, and which keys of the last "
        "one do not exist?",
    )
    compare(
        [40, 7, 33],
        None,
        [
            (
                lambda expected: expected(bounds=torch.tensor([0, 80])),
                "Where does a text end? Your queries see the keys of other texts.",
            ),
        ],
        "Right for one text, wrong for three in a stream. Where does each one start, and how long "
        "is it? `tl.load(cu_seqlens + sequence)`.",
    )
    compare(
        [40, 7, 33],
        None,
        [],
        "What if `max_seqlen` is larger than the longest text? The number of tiles of a sequence "
        "in the grid comes from it.",
        longest=100,
    )
    compare([40, 7], None, [], "Right for one head, wrong for three.", H=3)

    def windows(W):
        return [
            (lambda expected: expected(None), "Where is the window? Your queries see everything."),
            (
                lambda expected: expected(W - 1),
                "Are the window's ends inside? |i - j| may be *equal* to W.",
            ),
            (lambda expected: expected(W // 2), "W is the *half* window: W keys on each side."),
        ]

    lost = (
        "Which keys does a tile of queries need? Its first row sees the furthest to the left, its "
        "*last* row the furthest to the right."
    )
    compare([20], 6, windows(6), lost)
    compare([96], 3, windows(3), lost, seed=13)
    gpu = compare([256], 10, windows(10), lost)
    keys = gpu.loaded["k"] // (16 * 4)
    needed = sum(-(-min(32 + 20, 256) // 16) * 16 + 16 for _ in range(8))
    expect(
        keys <= needed,
        f"Do you skip tiles outside the window, or hide them? For 256 queries and W = 10 your "
        f"kernel loads {keys} keys; the tiles that anybody can see have at most {needed}.",
    )

    def own(q, k, v, *, mask=None, dropout=0.0):
        half_window = None if mask is None or mask.all() else 64
        bounds = torch.tensor([0, q.shape[-2]])
        return _attend(answer, q[0], k[0], v[0], bounds, half_window)[0][None], None

    text = "The river rises in the hills and flows to the [MASK]. " * 7
    moved = _moved("eager_attention", own, text)
    expect(moved < 1e-3, f"In `mini`, logits move by {moved:.0e}. Its heads have 64 numbers.")
    return f"It runs in all layers of `mini`, and no logit moves by more than {moved:.0e}."
