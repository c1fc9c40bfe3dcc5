"""Checks of chapter 5, attention."""

from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modernbert_mini import attention
from modernbert_mini.checks._machinery import Hint, exercise, expect, expect_close, expect_tensor
from modernbert_mini.rope import apply_rotary, inverse_frequencies, rotary_table

B, H, L, D = 2, 3, 5, 4
C = H * D


def _sample(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


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


@exercise("5.1", "One head", difficulty=1, minutes=8)
def one_head(answer):
    q, k, v = _sample(3, L, D)
    given = [x.clone() for x in (q, k, v)]
    out = answer(*given)
    if isinstance(out, tuple) and out:
        out = out[0]
    expect(
        not isinstance(out, torch.Tensor) or out.shape != (L, L),
        "Are these the weights, one number for each pair of tokens? They still have to mix the "
        "values: what comes out is one vector per token.",
    )
    expect_tensor(out, (L, D))
    expect(
        all(torch.equal(a, b) for a, b in zip(given, (q, k, v), strict=True)),
        "Does your function write into its arguments? `scores *= …` is fine on your own tensor, "
        "not on `q`, `k` or `v`.",
    )
    scores = q @ k.T
    scaled = scores * D**-0.5

    def mix(x, values=v, dim=-1):
        return x.softmax(dim=dim) @ values

    expect_close(
        out,
        mix(scaled),
        [
            (mix(scores), "Where is the scale? The scores are multiplied by D^-0.5."),
            (
                mix(scores / D),
                f"Do you divide by D or by its square root? For D = {D} that is {D}, not "
                f"{D**0.5:.0f}.",
            ),
            (
                mix(scores * L**-0.5),
                "Whose square root is it? That of the head dimension, the last size of `q`; "
                "yours is that of the number of tokens.",
            ),
            (
                mix(scaled, dim=0),
                "Along which dimension does the softmax run? Each row belongs to one query, so "
                "each row must sum to 1: `dim=-1`. Your columns do.",
            ),
            (
                scaled.flatten().softmax(0).view(L, L) @ v,
                "Does every query get a whole 1 to share out? In yours all of them together do.",
            ),
            (
                scaled @ v,
                "Where is the softmax? Raw scores may be negative, and do not sum to 1.",
            ),
            (
                mix(scaled.T),
                "Which side asks? Row i of the scores belongs to query i: `q @ k.T`, "
                "not `k @ q.T`.",
            ),
            (
                scaled.softmax(-1).T @ v,
                "Do the weights mix as they stand? Yours are transposed before they meet `v`.",
            ),
            (
                mix(scaled, k),
                "What do the weights mix? The keys said who is asked; what is handed on are the "
                "values.",
            ),
            (mix(scaled, q), "What do the weights mix? Not the queries: the values."),
            (
                mix(scores) * D**-0.5,
                "When does the scale come in? Before the softmax. Yours shrinks the result.",
            ),
            (
                scaled / scaled.sum(-1, keepdim=True) @ v,
                "Are the weights positive? Dividing scores by their sum is not softmax: the "
                "exponential comes first.",
            ),
        ],
        "The shape is right, the numbers are not. Print the weights: does every row sum to 1? "
        "Then compare with the three steps: scores, softmax, weighted mean.",
    )
    q, k, v = _sample(3, 7, 9)
    expect_close(
        torch.as_tensor(answer(q, k, v)),
        attention.eager_attention(q, k, v)[0],
        [],
        f"Right for D = {D}, wrong for D = 9 and 7 tokens. Is a size written into your code?",
    )
    return "Scores, softmax, weighted mean: that is attention."


@exercise("5.2", "A softmax that never overflows", difficulty=2, minutes=12)
def stable_softmax(answer):
    x = 2 * _sample(H, L, D)
    given = x.clone()
    with _Watch() as watch:
        out = answer(given)
    expect_tensor(out, x.shape)
    expect(
        not any("softmax" in name for name in watch.names),
        "Is that PyTorch's own softmax? Write it from `exp` and `sum`.",
    )
    expect(torch.equal(given, x), "Does your function write into its argument? Make a new tensor.")
    expect_close(
        out,
        x.softmax(-1),
        [
            (
                x.softmax(-2),
                "Which numbers sum to 1? Those of the last dimension, `dim=-1`.",
            ),
            (x.exp(), "Where is the division? The exponentials must still sum to 1."),
            (
                (x - x.logsumexp(-1, keepdim=True)),
                "Are these logarithms? The weights are their exponentials.",
            ),
            (
                (-x).softmax(-1),
                "Does a larger score get a larger weight? In yours it gets a smaller one.",
            ),
            (
                x.exp() / x.exp().sum(),
                "Over what do you sum? Each row has a sum of its own: `dim=-1, keepdim=True`.",
            ),
        ],
        "The numbers are not those of exp(x) / Σ exp(x), taken along the last dimension. "
        "Try it on one row of three numbers.",
    )
    large = torch.tensor([1000.0, 999.0, 998.0])
    expect(
        torch.allclose(answer(large), large.softmax(-1)),
        "What is exp(1000) in float32? Infinite, and ∞/∞ is NaN. Subtract the largest score of "
        "the row first: that changes no weight.",
    )
    lone = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 800.0])
    expect(
        torch.allclose(answer(lone), lone.softmax(-1)),
        "What do you subtract? After subtracting the mean, a lone large score can still overflow. "
        "After subtracting the largest, nothing is above 0.",
    )
    deep = torch.tensor([-500.0, -501.0])
    expect(
        torch.allclose(answer(deep), deep.softmax(-1)),
        "Is it the largest score that you subtract, or the largest without its sign? In a row far "
        "below 0 the second makes every exponential 0, and 0/0 is NaN.",
    )
    rows = torch.tensor([[500.0, 501.0], [-500.0, -501.0]])
    expect(
        torch.allclose(answer(rows), rows.softmax(-1)),
        "Whose maximum do you subtract? With that of the whole tensor, a row far below it loses "
        "all its exponentials to 0, and 0/0 is NaN. Each row has its own.",
    )
    low = torch.zeros(1, 4096, dtype=torch.bfloat16)
    low_out = answer(low)
    expect(
        low_out.dtype == torch.float32,
        "In which dtype do the weights come back? The exercise asks for float32, whatever comes "
        f"in; bfloat16 went in and `{low_out.dtype}` came out.",
    )
    mixed = (3 * _sample(1, 512)).bfloat16()
    expect(
        torch.allclose(answer(mixed), mixed.float().softmax(-1), rtol=1e-4),
        "At which point do you widen to float32? Exponentials that were taken in bfloat16 have "
        "lost their digits already: widen first.",
    )
    return "No score is too large for it now, and no row too long."


@exercise("5.3", "The mask", difficulty=2, minutes=10)
def masked_weights(answer):
    scores = _sample(B, H, L, L)
    mask = torch.tensor([[True, True, True, True, False], [True, True, True, False, False]])
    mask = mask[:, None, None, :]  # (B, 1, 1, L)
    given, given_mask = scores.clone(), mask.clone()
    out = answer(given, given_mask)
    expect_tensor(out, scores.shape)
    expect(
        torch.equal(given, scores) and torch.equal(given_mask, mask),
        "Does your function write into its arguments? `masked_fill_` and `+=` do; "
        "`masked_fill` and `+` do not.",
    )
    everything = mask.expand_as(scores)
    leak = out[~everything].max()
    expect(
        not 0 < leak < 1e-3,
        f"Is a hidden key hidden altogether? It still gets {leak:.0e}. The number you add must "
        "be low enough for any score.",
    )
    lowest = torch.finfo(torch.float32).min
    right = scores.masked_fill(~mask, lowest).softmax(-1)
    expect_close(
        out,
        right,
        [
            (
                scores.masked_fill(mask, lowest).softmax(-1),
                "What does True mean here? That a query may see this key. Yours hides exactly "
                "what should be seen.",
            ),
            (
                (scores * mask).softmax(-1),
                "Does a score of 0 hide a key? exp(0) is 1: it gets a weight like any other. "
                "Hidden is a score that is very low. (`finfo.tiny` is almost 0; `finfo.min` is the "
                "lowest.)",
            ),
            (
                scores.softmax(-1) * mask,
                "Do the rows still sum to 1? The mask comes before the softmax, so that the "
                "visible keys share the whole 1.",
            ),
            (scores.softmax(-1), "Does the mask do anything? All keys are still seen."),
            ((scores + mask).softmax(-1), "What do you add? True and False add 1 and 0."),
        ],
        "Look at one row: are the weights of hidden keys 0, and do the others sum to 1?",
    )
    huge = 1e6 * scores
    expect(
        (answer(huge, mask)[~everything] == 0).all(),
        "And for scores of a million? A fixed number like −10,000 is not low enough for them: "
        "the lowest one of the dtype is.",
    )
    square = torch.ones(L, L, dtype=torch.bool).tril()
    try:
        squared = answer(scores, square)
    except RuntimeError as error:
        raise Hint(
            f"Does it take a mask (L, L) as well? It stopped with: {str(error).splitlines()[0]}"
        ) from None
    expect(
        torch.allclose(squared, scores.masked_fill(~square, lowest).softmax(-1)),
        "Rows or columns? In a mask (L, L) the row is the query and the column is the key.",
    )
    blind = square.clone()
    blind[2] = False
    expect(
        answer(scores, blind).isfinite().all(),
        "What does a query get that may see no key at all? Yours gets NaN, since all its scores "
        "are −∞. With the lowest finite number it gets a plain mean.",
    )
    low = answer(scores.half(), blind)
    expect(
        low.isfinite().all(),
        "And in float16? A number like −1e9 is −∞ there. Ask for the lowest number of the dtype "
        "that came in: `torch.finfo(scores.dtype).min`.",
    )
    return "Hidden keys get nothing, visible ones share the whole 1."


@exercise("5.4", "Split the heads", difficulty=2, minutes=12)
def split_heads(answer):
    qkv = _sample(B, L, 3 * C)
    three = answer(qkv, H)
    expect(
        isinstance(three, tuple | list | torch.Tensor) and len(three) == 3,
        "Does your function return three tensors: `return q, k, v`?",
    )
    shapes = {tuple(x.shape) for x in three if isinstance(x, torch.Tensor)}
    expect(
        shapes != {(B, L, H, D)},
        "Which comes first, heads or tokens? You have (B, L, H, D). Attention multiplies the last "
        "two dimensions, so the heads must go before the tokens: (B, H, L, D).",
    )
    expect(
        shapes != {(B, H, D, L)},
        "Which comes last? The D numbers of a head. You have (B, H, D, L): keys are turned on "
        "their side only where the scores are computed.",
    )
    for name, x in zip("qkv", three, strict=True):
        expect_tensor(x, (B, H, L, D), what=f"`{name}`")

    def parts(x):
        return x.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)

    right = parts(qkv)
    thirds = qkv.chunk(3, dim=-1)
    mine = torch.stack(tuple(three))
    orders = [
        (
            right[list(order)],
            f"In which order do the thirds of the last dimension stand? Queries, keys, values. "
            f"You return {said}.",
        )
        for order, said in [
            ((0, 2, 1), "queries, values, keys"),
            ((1, 0, 2), "keys, queries, values"),
            ((1, 2, 0), "keys, values, queries"),
            ((2, 0, 1), "values, queries, keys"),
            ((2, 1, 0), "values, keys, queries"),
        ]
    ]
    expect_close(
        mine,
        right,
        [
            *orders,
            (
                torch.stack([x.reshape(B, H, L, D) for x in thirds]),
                "Can `reshape` or `view` alone bring the heads forward? It only cuts the row of "
                "numbers anew, so tokens get mixed. Unfold (B, L, H, D) first, then transpose.",
            ),
            (
                qkv.unflatten(-1, (H, 3, D)).permute(3, 0, 2, 1, 4),
                "Which is the outer division: by q, k, v or by heads? Here it is (3, H, D). Yours "
                "is (H, 3, D), as in checkpoints that keep each head's q, k, v together.",
            ),
            (
                torch.stack([x.unflatten(-1, (D, H)).permute(0, 3, 1, 2) for x in thirds]),
                "Do the D numbers of a head lie side by side? They do: unfold to (H, D). Yours "
                "is (D, H), which deals them out like cards.",
            ),
            (
                qkv.reshape(3, B, H, L, D),
                "Can one `reshape` do it all? It cuts the row of numbers anew, across texts and "
                "tokens. First unfold the last dimension alone, then move dimensions.",
            ),
        ],
        "The shapes are right, the numbers are not. Try `qkv = torch.arange(3 * C)` for one "
        "token: head 0 of the queries should hold 0, 1, 2, …, D − 1.",
    )
    try:
        other = torch.stack(tuple(answer(_sample(1, 7, 60), 2)))
        fits = torch.equal(
            other, _sample(1, 7, 60).unflatten(-1, (3, 2, 10)).permute(2, 0, 3, 1, 4)
        )
    except (RuntimeError, ValueError):
        fits = False
    expect(
        fits,
        f"Right for {H} heads of {D}, wrong for 2 heads of 10. Is a size written into your code?",
    )
    return "No number was computed: splitting heads only reads the same numbers in another order."


@exercise("5.5", "A few queries at a time", difficulty=2, minutes=12)
def in_chunks(answer):
    q, k, v = _sample(3, H, 10, D)
    out = answer(q, k, v, 5)
    expect_tensor(out, (H, 10, D))

    def cut(*tensors, size=5):
        return zip(*(x.split(size, dim=-2) for x in tensors), strict=True)

    def attend(*qkv):
        return attention.eager_attention(*qkv)[0]

    expect_close(
        out,
        attend(q, k, v),
        [
            (
                torch.cat([attend(*part) for part in cut(q, k, v)], dim=-2),
                "Which keys does a query see? All of them. In yours, only those of its own chunk: "
                "cut the queries, leave keys and values whole.",
            ),
            (
                sum(attend(q, *part) for part in cut(k, v)),
                "Do you cut the keys? Each chunk then has a softmax of its own, and the weights "
                "of a query sum to the number of chunks. Cut the queries.",
            ),
            (
                sum(attend(q, *part) for part in cut(k, v)) / 2,
                "Do you cut the keys and average? Each chunk then counts the same, however "
                "high its scores are. Cut the queries.",
            ),
            (
                torch.cat([((a @ k.mT).softmax(-1) @ v) for (a,) in cut(q)], dim=-2),
                "Where is the scale? Each chunk needs D^-0.5, as the whole does.",
            ),
            (
                torch.cat([attend(a, k, v) for (a,) in [*cut(q)][::-1]], dim=-2),
                "In which order do you join the chunks? The first queries come first.",
            ),
        ],
        "Join the chunks along the dimension of the tokens. Is every row that of its own query?",
    )
    expect(
        getattr(answer(q, k, v, 4), "shape", None) == (H, 10, D),
        "What becomes of the rest? 10 queries in chunks of 4 leave 2 over.",
    )
    q, k, v = _sample(3, H, 64, D)
    with _Watch() as watch:
        answer(q, k, v, 8)
    expect(
        not any("scaled_dot" in name or "_safe_softmax" in name for name in watch.names),
        "Is that PyTorch's fused kernel? It saves the memory already. Here, do it by hand.",
    )
    expect(
        watch.largest < H * 64 * 64,
        "How large is the largest tensor? Yours still holds a number for every pair of tokens, "
        f"{watch.largest:,} in all. With chunks of 8 queries, {H * 8 * 64:,} are enough.",
    )
    return (
        f"The same numbers, and no tensor larger than {watch.largest:,} numbers; the square of "
        f"all scores would have {H * 64 * 64:,}. The fused kernel goes further: it cuts the keys, "
        "too (chapter 8)."
    )


@exercise("5.6", "Your own attention in the real model", difficulty=3, minutes=25)
def module(answer):
    with torch.random.fork_rng(devices=[]):  # new modules draw their weights; nobody should see
        return _module(answer)


def _module(answer) -> str:
    mine = answer(C, H)
    expect(
        isinstance(mine, torch.nn.Module),
        "Is it a class derived from `nn.Module`? The check builds it with hidden_size and "
        f"num_heads, and got a `{type(mine).__name__}`.",
    )
    expect(
        type(mine).forward is not torch.nn.Module.forward,
        "Where is `forward`? It takes `x, cos, sin, attend`.",
    )
    shapes = {name: tuple(p.shape) for name, p in mine.named_parameters()}
    wanted = {"Wqkv.weight": (3 * C, C), "Wo.weight": (C, C)}
    expect(
        not any(name.endswith("bias") for name in shapes),
        "Does ModernBERT's attention have biases? It has none: `bias=False`.",
    )
    expect(
        shapes == wanted,
        f"Which weights does a checkpoint hold? For C = {C}: {wanted}. Yours: {shapes}.",
    )
    theirs = attention.Attention(C, H).requires_grad_(False)
    generator = torch.Generator().manual_seed(6)
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * C**-0.5)
    mine.requires_grad_(False).load_state_dict(theirs.state_dict())
    mine.eval(), theirs.eval()
    x = _sample(B, L, C)
    cos, sin = rotary_table(torch.arange(L), inverse_frequencies(D, 10.0))
    attend = attention.eager_attention
    result = mine(x, cos, sin, attend)
    expect(
        isinstance(result, tuple) and len(result) == 2,
        "What does `forward` return? Two things: the new vectors, and the weights that `attend` "
        "handed over.",
    )
    out, weights = result
    expect_tensor(out, (B, L, C))
    right, right_weights = theirs(x, cos, sin, attend)
    q, k, v = theirs.Wqkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)

    def turn(t):
        return apply_rotary(t, cos, sin)

    def merge(t):
        return t.transpose(1, 2).flatten(2)

    def run(*qkv):
        return attend(*qkv)[0]

    def views(t):
        return t.transpose(1, 2).reshape(B, H, L, D)

    qh, kh, vh = theirs.Wqkv(x).unflatten(-1, (H, 3, D)).permute(3, 0, 2, 1, 4)
    done = run(turn(q), turn(k), v)
    expect_close(
        out,
        right,
        [
            (
                theirs.Wo(merge(run(q, k, v))),
                "Where do the positions come in? Queries and keys are turned by `apply_rotary` "
                "before they meet.",
            ),
            (
                theirs.Wo(merge(run(turn(q), turn(k), turn(v)))),
                "What is turned? Queries and keys. A value says what a token offers, not where it "
                "stands: it stays.",
            ),
            (
                theirs.Wo(merge(run(turn(q), k, v))),
                "Are both turned? Only queries are. Their difference of angle is the distance.",
            ),
            (merge(done), "Where is `Wo`? It mixes what the heads have found."),
            (
                theirs.Wo(done.reshape(B, L, C)),
                "How do the heads come together again? Transpose to (B, L, H, D) first. A "
                "`reshape` straight from (B, H, L, D) mixes tokens.",
            ),
            (
                theirs.Wo(done.transpose(1, 2).transpose(2, 3).flatten(2)),
                "Do the D numbers of a head end up side by side? Head by head: (H, D), not (D, H).",
            ),
            (
                theirs.Wo(merge(run(turn(qh), turn(kh), vh))),
                "Which is the outer division of `Wqkv`: q, k, v or the heads? It is (3, H, D).",
            ),
            (
                theirs.Wo(merge(run(turn(k), turn(q), v))),
                "Which third are the queries? The first. You have queries and keys exchanged.",
            ),
            (
                theirs.Wo(merge(run(turn(q), turn(v), k))),
                "In which order do the thirds stand? Queries, keys, values.",
            ),
            (
                theirs.Wo(merge(run(*(turn(views(t)) for t in (q, k)), views(v)))),
                "How do you split the heads? `reshape` alone mixes tokens: unfold to "
                "(B, L, H, D), then transpose.",
            ),
            (
                theirs.Wo(merge(run(turn(q) * D**-0.5, turn(k), v))),
                "Is the scale in there twice? `attend` multiplies by D^-0.5 already.",
            ),
            (
                x + right,
                "Do you add `x`? The layer around attention does that already.",
            ),
        ],
        "The shapes are right, the numbers are not. Go step by step: Wqkv, split, turn, attend, "
        "merge, Wo. `torch.equal` against the package's module shows where they part.",
    )
    expect(
        weights is not None and torch.allclose(weights, right_weights, atol=1e-5),
        "Do you hand on the weights that `attend` returned? A caller may want to look at them.",
    )
    mask = torch.ones(L, L, dtype=torch.bool).tril()
    seen = mine(x, cos, sin, partial(attend, mask=mask))[0]
    expect(
        torch.allclose(seen, theirs(x, cos, sin, partial(attend, mask=mask))[0], atol=1e-5),
        "Do you call the `attend` that you were given? It knows the mask, and it decides how "
        "attention is computed. Yours goes its own way.",
    )
    try:
        packed = mine(x[0], cos, sin, attend)[0]
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        packed = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    expect(
        isinstance(packed, torch.Tensor) and torch.allclose(packed, right[0], atol=1e-5),
        "Does it also take one stream of tokens, (N, C), without a batch? Count dimensions from "
        "the end: `dim=-2`." + (f" It stopped with: {packed}" if isinstance(packed, str) else ""),
    )
    return _swap_into_mini(answer)


def _swap_into_mini(answer) -> str:
    """Run the embedded checkpoint with the learner's attention in all its layers."""
    from modernbert_mini import ModernBertForMaskedLM
    from modernbert_mini.transplant import swap

    model = ModernBertForMaskedLM.from_pretrained("mini").eval()
    ids = torch.arange(100, 340).view(2, 120)  # (B, L)
    real = torch.ones_like(ids)
    real[1, 90:] = 0
    own = swap(model, "attn", answer)
    with torch.no_grad():
        difference = (own(ids, real).logits - model(ids, real).logits)[real.bool()].abs().max()
    expect(
        difference < 1e-3,
        f"Your module passes alone, but in `mini` the logits move by {difference:.1e}. There, "
        "C = 192 and H = 3: is a size written into your code, or does it remember an earlier call?",
    )
    return (
        f"`mini` ran on your attention in all {model.config.num_hidden_layers} layers, on padded "
        f"texts, and no logit moved by more than {difference:.0e}."
    )
