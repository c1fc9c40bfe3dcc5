"""Checks of chapter 12, pre-training."""

import math

import torch
from torch.nn import functional as F

from modernbert_mini import pretraining as reference
from modernbert_mini.checks._machinery import (
    Hint,
    exercise,
    expect,
    expect_close,
    expect_tensor,
)

MASK_ID, VOCAB = 99, 100
SPECIAL = [0, 1, 99]


def _near(share, wanted, n, sigmas=5):
    """Whether a share counted over n draws is within some standard deviations."""
    return abs(share - wanted) < sigmas * math.sqrt(max(wanted * (1 - wanted), 1e-4) / n)


@exercise("12.1", "Hide tokens", difficulty=2, minutes=12)
def mask(answer):
    chance = torch.Generator().manual_seed(0)
    special = torch.tensor(SPECIAL)
    ids = torch.randint(VOCAB, (200, 300), generator=chance)
    given = ids.clone()

    def call(seed, **more):
        return answer(ids, torch.Generator().manual_seed(seed), MASK_ID, special, VOCAB, **more)

    out = call(1)
    expect(torch.equal(ids, given), "Does your function write into `ids`? Work on a copy.")
    expect(
        isinstance(out, tuple | list) and len(out) == 2,
        "What does `my_mask` return? Two tensors: what the model sees, and the labels.",
    )
    seen, labels = out
    expect_tensor(seen, ids.shape, ids.dtype, "what the model sees")
    expect_tensor(labels, ids.shape, ids.dtype, "the labels")
    asked = labels != -100
    ordinary = ~torch.isin(ids, special)
    expect(asked.any(), "Is anything asked? All your labels are −100.")
    expect(
        not (labels == seen)[asked].all(),
        "Do the labels hold the answer? Yours hold what the model *sees*; the answer is what stood "
        "there before.",
    )
    expect(
        not asked.all(),
        "Which places are asked about? You give a label to every token; −100 belongs where nothing "
        "was chosen.",
    )
    expect(
        torch.equal(labels[asked], ids[asked]),
        "Is a label the id that stood at its place? Some of yours are not.",
    )
    expect(
        not (asked & ~ordinary).any(),
        "Are special tokens spared? Some of yours are chosen: [CLS] is nothing to guess.",
    )
    expect(
        torch.equal(seen[~asked], ids[~asked]),
        "Does a token change that is not asked about? Every change has to be among the chosen.",
    )
    n = int(ordinary.sum())
    share = asked.sum().item() / n
    for wrong, hint in (
        (0.15, "15 % is BERT's rate. What does the argument `probability` say?"),
        (
            0.7,
            "Which side of `probability` is chosen? You choose seven tokens in ten: `<`, not `>`.",
        ),
        (0.3 * 0.8, "Are the kept ones chosen too? All 30 % carry a label, whatever they show."),
        (0.3 * 0.9, "Do all chosen tokens carry a label? One kind of yours carries none."),
    ):
        expect(not _near(share, wrong, n), hint)
    expect(_near(share, 0.3, n), f"30 % of the ordinary tokens are chosen; yours are {share:.1%}.")
    _expect_fates(ids, seen, asked, special)
    expect(
        all(torch.equal(a, b) for a, b in zip(out, call(1), strict=True)),
        "Does all chance come from `generator`? Called twice with the same one, yours differs: "
        "give "
        "every draw `generator=generator`.",
    )
    expect(
        not torch.equal(seen, call(2)[0]),
        "Is `generator` used? With another seed, yours hides the same tokens.",
    )
    expect(
        not (call(1, probability=0.0)[1] != -100).any(),
        "What does `probability=0.0` hide? Nothing. Is a rate written into your code?",
    )
    return _mini_guesses(answer)


def _expect_fates(ids, seen, asked, special):
    """80 % [MASK], 10 % another, 10 % the same."""
    n = int(asked.sum())
    masked = (seen == MASK_ID)[asked].sum().item() / n
    kept = (seen == ids)[asked].sum().item() / n
    expect(
        masked < 0.999,
        "What do chosen tokens show? Yours are all [MASK]; 10 % show another token, 10 % stay.",
    )
    expect(
        masked > 0,
        "What do chosen tokens show? None of yours is [MASK].",
    )
    expect(
        not _near(masked, 0.9, n) or kept > 0.05,
        "Do some chosen tokens stay as they are? None of yours does.",
    )
    expect(
        not _near(kept, 0.2, n) or not _near(masked, 0.8, n),
        "Do some chosen tokens become another one? Yours become [MASK], or stay.",
    )
    # A fate of one draw, and another of a second: 80 %, then 10 % of the other 20 %.
    expect(
        not (_near(masked, 0.8, n) and _near(kept, 0.18, n, 3)),
        "10 % of what? You give 10 % of the *remaining* fifth a random token: 2 % of the chosen. "
        "One draw settles all three fates.",
    )
    expect(
        _near(masked, 0.8, n),
        f"80 % of the chosen show [MASK]; of yours {masked:.1%}.",
    )
    drawn = seen[asked & (seen != MASK_ID) & (seen != ids)]
    expect(
        len(drawn.unique()) > 1 or not len(drawn),
        "Is a random token random for each place? Yours is the same id everywhere.",
    )
    expect(
        not torch.isin(drawn, special).any(),
        "May a random token be special? Yours sometimes are [CLS] or [MASK].",
    )
    # A random one is the old one by chance, once in 97 times.
    expect(
        _near(kept, 0.1 + 0.1 / 97, n),
        f"10 % of the chosen stay as they are; of yours {kept:.1%}.",
    )


def _mini_guesses(answer) -> str:
    """How well the embedded checkpoint guesses what the learner's mask hides."""
    from modernbert_mini import ModernBertForMaskedLM, Tokenizer

    tokenizer = Tokenizer.from_pretrained("mini")
    model = ModernBertForMaskedLM.from_pretrained("mini", attn_implementation="sdpa").eval()
    text = "A list is a sequence of objects. The method returns the number of items in the list."
    ids = tokenizer([text], return_tensors="pt")["input_ids"].repeat(8, 1)
    special = torch.tensor(reference.special_ids(tokenizer))
    chance = torch.Generator().manual_seed(0)
    seen, labels = answer(ids, chance, tokenizer.mask_token_id, special, len(tokenizer))
    asked = labels != -100
    with torch.no_grad():
        logits = model(seen).logits[asked]
    right = (logits.argmax(dim=-1) == labels[asked]).float().mean()
    loss = F.cross_entropy(logits, labels[asked])
    return (
        f"Behind your mask, `mini` guesses {right:.0%} of {int(asked.sum())} tokens at once, at a "
        f"loss of {loss:.2f} nats."
    )


@exercise("12.2", "Warm up, stay, fall", difficulty=1, minutes=8)
def rate(answer):
    def call(tokens, warmup=100, decay=400, total=1000):
        return answer(tokens, warmup, decay, total)

    expect(
        isinstance(call(300), int | float),
        f"Is the share a number? The check got a value of type `{type(call(300)).__name__}`.",
    )
    expect(abs(call(0)) < 1e-9, f"Where does the warm-up start? At 0; yours at {call(0):.3g}.")
    expect(
        abs(call(25) - 0.25) < 1e-6,
        f"A quarter through the warm-up the share is 0.25; yours is {call(25):.3g}. Is the rise "
        "linear, over the warm-up alone?",
    )
    expect(
        abs(call(100) - 1) < 1e-6 and abs(call(350) - 1) < 1e-6,
        f"Between warm-up and fall the share is 1; yours is {call(350):.3g} at 350 of 1,000 "
        f"tokens.",
    )
    expect(
        abs(call(600) - 1) < 1e-6,
        "When does the fall begin? Over the *last* `decay` tokens: at 600 of 1,000, the share is "
        f"still 1; yours is {call(600):.3g}.",
    )
    middle = call(664)
    for wrong, hint in (
        (
            0.84,
            "Which curve is the fall? Yours is a straight line; it is one minus a square *root*.",
        ),
        (
            1 - 0.16**2,
            "Root or square? Yours falls slowly at first: one minus the *root*, not the square.",
        ),
        (
            0.4,
            "Root of what? Yours is the root of a fall; it is one *minus the root* of the way.",
        ),
        (
            0.84**0.5,
            "Is it the root of what is left, or one minus the root of what is done? The latter.",
        ),
        (
            (1 + math.cos(0.16 * math.pi)) / 2,
            "Is that a cosine? The fall here is one minus the square root.",
        ),
        (
            1 - math.sqrt(0.664),
            "How far has the fall come? Count from where it began, not from the first token.",
        ),
        (
            1 - math.sqrt(64 / 1000),
            "How far has the fall come? Divide by `decay`, not by `total`.",
        ),
    ):
        expect(abs(middle - wrong) > 1e-6, hint)
    expect(
        abs(middle - 0.6) < 1e-6,
        f"After 16 % of the fall the share is 1 − √0.16 = 0.6; yours is {middle:.3g}.",
    )
    expect(abs(call(1000)) < 1e-6, f"At the end the share is 0; yours is {call(1000):.3g}.")
    expect(
        not isinstance(call(1200), complex) and call(1200) >= 0,
        f"And beyond the end? Never below 0; yours is {call(1200):.3g}.",
    )
    for name, changes in (("warmup", {"warmup": 0}), ("decay", {"decay": 0})):
        try:
            value = [call(tokens, **changes) for tokens in (0, 300, 900, 1000)]
        except ZeroDivisionError as error:
            raise Hint(f"What if `{name}` is 0? Yours divides by it.") from error
        wanted = [
            reference.warmup_stable_decay(
                t, **{"warmup": 100, "decay": 400, "total": 1000} | changes
            )
            for t in (0, 300, 900, 1000)
        ]
        expect(
            all(abs(a - b) < 1e-6 for a, b in zip(value, wanted, strict=True)),
            f"Without `{name}`, at 0, 300, 900 and 1,000 tokens the shares are "
            f"{', '.join(f'{w:.3g}' for w in wanted)}; yours are "
            f"{', '.join(f'{v:.3g}' for v in value)}.",
        )
    expect(
        abs(call(30, 40, 10, 200) - 0.75) < 1e-6,
        "Right for these lengths, wrong for others. Is a number written into your code?",
    )
    return "Until the fall, nothing depends on `total`: the run can be prolonged."


@exercise("12.3", "One step of AdamW", difficulty=2, minutes=15)
def adamw(answer):
    chance = torch.Generator().manual_seed(0)
    w, g, m = torch.randn(3, 4, 5, generator=chance)
    v = torch.rand(4, 5, generator=chance)
    t, lr, peak, decay, eps = 3, 0.05, 0.1, 0.2, 1e-6
    betas = (0.9, 0.98)
    given = [x.clone() for x in (w, g, m, v)]

    def call(**more):
        return answer(w, g, m, v, t, lr, peak, **{"betas": betas, "eps": eps} | more)

    out = call()
    expect(
        all(torch.equal(a, b) for a, b in zip(given, (w, g, m, v), strict=True)),
        "Does your step change what it was given? An operation whose name ends in `_`, or `+=`, "
        "does.",
    )
    expect(
        isinstance(out, tuple | list) and len(out) == 3,
        "What does `my_adamw` return? Three tensors: the new `w`, `m` and `v`.",
    )
    for value, name in zip(out, ("w", "m", "v"), strict=True):
        expect_tensor(value, (4, 5), w.dtype, f"the new `{name}`")
    new_m, new_v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
    expect_close(
        out[1],
        new_m,
        [
            (
                0.1 * m + 0.9 * g,
                "Which of the two is the slow one? The old mean keeps the share β₁.",
            ),
            (m + 0.1 * g, "Is it still a mean? The old one has to shrink by β₁."),
            (0.98 * m + 0.02 * g, "Which β belongs to the mean of the gradient? The first."),
            (
                new_m / (1 - 0.9**t),
                "Which mean is kept? The plain one; the correction is for the step alone.",
            ),
            (m, "Is the mean renewed? You return the old `m`."),
        ],
        "The new `m` is β₁ times the old one plus (1 − β₁) times the gradient.",
    )
    expect_close(
        out[2],
        new_v,
        [
            (0.98 * v + 0.02 * g, "Mean of what? `v` is the mean of the *squared* gradient."),
            (0.9 * v + 0.1 * g**2, "Which β belongs to the mean of the squares? The second."),
            (0.98 * v + 0.02 * g.abs(), "Absolute value or square? `v` is the mean of the square."),
            (
                new_v / (1 - 0.98**t),
                "Which mean is kept? The plain one; the correction is for the step alone.",
            ),
            (v, "Is the mean of the squares renewed? You return the old `v`."),
        ],
        "The new `v` is β₂ times the old one plus (1 − β₂) times the squared gradient.",
    )
    m_hat, v_hat = new_m / (1 - 0.9**t), new_v / (1 - 0.98**t)
    right = w - lr * m_hat / (v_hat.sqrt() + eps)
    early = new_m / (1 - 0.9 ** (t - 1)) / ((new_v / (1 - 0.98 ** (t - 1))).sqrt() + eps)
    expect_close(
        out[0],
        right,
        [
            (
                w - lr * new_m / (new_v.sqrt() + eps),
                "Are the means corrected? They began at zero, and are too small in the first "
                "steps: divide by 1 − βᵗ.",
            ),
            (
                w + lr * m_hat / (v_hat.sqrt() + eps),
                "Uphill or downhill? The step goes *against* the gradient.",
            ),
            (
                w - lr * m_hat / (v_hat + eps),
                "Is the root missing? Divide by the root of the mean square.",
            ),
            (w - peak * m_hat / (v_hat.sqrt() + eps), "Which rate is taken? `rate`, not its peak."),
            (
                w - lr * g / (v_hat.sqrt() + eps),
                "Along what does it step? Along the mean `m`, not this step's gradient alone.",
            ),
            (
                w - lr * early,
                "From which number does `t` count? From 1: the first step is corrected by 1 − β.",
            ),
            (
                w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.98**t)).sqrt() + eps),
                "Old means or new ones? First renew both, then step.",
            ),
        ],
        "The step is `rate` times the corrected mean over (the root of the corrected mean square + "
        "ε).",
    )
    step = right - w
    expect_close(
        call(decay=decay)[0],
        w * (1 - decay * lr / peak) + step,
        [
            (
                w * (1 - decay * lr) + step,
                "That is PyTorch's rule, decay times rate. Fully decoupled, it is decay times rate "
                "*over peak*.",
            ),
            (
                w * (1 - decay) + step,
                "Does the decay follow the schedule? At half the peak it is half: decay · rate / "
                "peak.",
            ),
            (w * (1 + decay * lr / peak) + step, "Does the weight shrink? Yours grows."),
            (right, "Is `decay` used? Yours changes nothing."),
            (
                right * (1 - decay * lr / peak),
                "What shrinks? The old weight, before the step; yours shrinks the step too.",
            ),
            (w * (1 - decay * peak / lr) + step, "Rate over peak, or peak over rate?"),
        ],
        "With a decay, the old weight is multiplied by 1 − decay · rate / peak before the step.",
    )
    tiny = torch.zeros(4, 5)
    still = answer(w, tiny, tiny, tiny, 1, lr, peak, betas=betas, eps=eps)[0]
    expect(
        torch.equal(still, w),
        "What if there never was a gradient? The weight stays. Where is ε? It stands *beside* the "
        "root, so that 0 / 0 cannot come up.",
    )
    expect_close(
        answer(w, g, m, v, t, lr, peak, betas=betas, eps=0.5)[0],
        w - lr * m_hat / (v_hat.sqrt() + 0.5),
        [
            (
                w - lr * m_hat / (v_hat + 0.5).sqrt(),
                "Inside the root, or beside it? ε is added to the root.",
            )
        ],
        "Right for a small ε, wrong for a large one. Is it added to the root?",
    )
    return "Two hundred such steps are those of `torch.optim.AdamW`, but for the decay."


@exercise("12.4", "A batch in parts", difficulty=2, minutes=10)
def accumulate(answer):
    from modernbert_mini import ModernBertForMaskedLM
    from modernbert_mini.unpadding import join

    model = ModernBertForMaskedLM.from_pretrained("mini", sparse_prediction=True).eval()
    chance = torch.Generator().manual_seed(0)
    streams = []
    for n, share in ((60, 0.4), (24, 0.1), (40, 0.3)):
        ids = torch.randint(300, 2000, (n,), generator=chance)
        labels = torch.where(torch.rand(n, generator=chance) < share, ids, -100)
        labels[0] = ids[0]
        streams.append(join([ids]) | {"labels": labels})

    def both(some):
        model.zero_grad()
        loss = answer(model, some)
        grads = [p.grad for p in model.parameters()]
        expect(
            all(g is not None for g in grads),
            "Is there a gradient? After your function some parameters have none: call `backward`.",
        )
        return loss, torch.cat([g.flatten() for g in grads])

    model.zero_grad()
    counts = [int((s["labels"] != -100).sum()) for s in streams]
    vectors, means = [], []
    for stream in streams:
        loss = model(**stream).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        vectors.append(torch.cat([g.flatten() for g in gradients]))
        means.append(loss.item())
    lengths = [len(s["input_ids"]) for s in streams]

    def weighted(weights):
        return sum(w * x for w, x in zip(weights, vectors, strict=True))

    def shares(numbers):
        return [x / sum(numbers) for x in numbers]

    loss, found = both(streams)
    expect(
        isinstance(loss, int | float) or getattr(loss, "ndim", 1) == 0,
        "What does `my_accumulate` return? One number, the loss of the batch.",
    )
    expect(
        not (torch.is_tensor(loss) and loss.requires_grad),
        "Does your loss still hold the graph? Return a number, with `.item()`; else every stream "
        "stays in memory, which is what the parts are to avoid.",
    )
    right = weighted(shares(counts))
    scale = right.abs().max()
    expect_close(
        found / scale,
        right / scale,
        [
            (
                weighted([1 / 3] * 3) / scale,
                "Does every hidden token weigh the same? You average the streams' means: a token "
                "of a stream with few of them weighs more. Weigh each by its hidden tokens.",
            ),
            (
                weighted([1.0] * 3) / scale,
                "Is the sum a mean? You add the streams' gradients up as they are.",
            ),
            (
                weighted(shares(lengths)) / scale,
                "Which tokens count? You weigh by the *length* of a stream; the loss is a mean "
                "over its hidden tokens.",
            ),
            (
                weighted(counts) / scale,
                "Is it still a mean? You weigh by hidden tokens, and do not divide by all of them.",
            ),
            (
                vectors[-1] / scale,
                "Is the gradient of every stream in the sum? Only the last one's is left: no "
                "`zero_grad` between them.",
            ),
            (
                vectors[0] / scale,
                "Is the gradient of every stream in the sum? Only the first one's is there.",
            ),
            (
                counts[-1] / sum(counts) * vectors[-1] / scale,
                "Is the gradient of every stream in the sum? Only the last one's is left: no "
                "`zero_grad` between them.",
            ),
        ],
        "The gradient is not that of the mean over all hidden tokens.",
    )
    expected = sum(s * m for s, m in zip(shares(counts), means, strict=True))
    expect(
        abs(float(loss) - expected) < 1e-4,
        f"The gradient is right. The loss of the batch is {expected:.4f}; you return "
        f"{float(loss):.4f}.",
    )
    nothing = {**streams[1], "labels": torch.full_like(streams[1]["labels"], -100)}
    loss, found = both([streams[0], nothing])
    expect(
        math.isfinite(loss) and bool(found.isfinite().all()),
        "What if nothing is hidden in a stream? Its mean is 0 / 0, and your gradient is no number.",
    )
    gap = (found - vectors[0]).abs().max() / scale
    expect(gap < 1e-4, "A stream in which nothing is hidden should change nothing; yours does.")
    return (
        f"`mini` on three streams of {', '.join(map(str, counts))} hidden tokens: the gradient of "
        f"the whole batch, to {float((both(streams)[1] - right).abs().max() / scale):.0e}."
    )


@exercise("12.5", "Cut evenly", difficulty=1, minutes=8)
def cut(answer):
    out = answer(10, 4)
    expect(
        isinstance(out, list | tuple) and all(isinstance(n, int) for n in out),
        "What does `my_cut` return? A list of whole numbers, the lengths of the pieces.",
    )
    out = list(out)
    mistakes = [
        (
            [4, 4, 2],
            "Are the pieces even? Yours fill up the first ones and leave a stub at the end.",
        ),
        ([4, 4], "Is every token in a piece? Yours drop the rest."),
        ([3, 3, 3], "Is every token in a piece? Three times three leaves one out."),
        ([4, 4, 4], "Do the pieces sum to the document? Yours are longer than it is."),
        (
            [5, 5],
            "Does every piece fit? Yours are longer than `room`; round the number of pieces *up*.",
        ),
        ([10], "Does the piece fit? `room` is 4."),
        ([2, 2, 2, 2, 2], "As few pieces as possible: three are enough for 10 tokens."),
        ([3, 3, 2, 2], "As few pieces as possible: three are enough for 10 tokens."),
        ([0, 3, 6, 10], "Bounds or lengths? Yours say where pieces begin and end."),
    ]
    for wrong, hint in mistakes:
        expect(out != wrong, hint)
    expect(sum(out) == 10, f"Do the pieces sum to the document? Yours sum to {sum(out)}, not 10.")
    expect(max(out) <= 4, f"Does every piece fit? One of yours has {max(out)} tokens, `room` is 4.")
    expect(
        len(out) == 3 and max(out) - min(out) <= 1,
        f"Three pieces that differ by one token at most; yours are {out}.",
    )
    try:
        empty = answer(0, 4)
    except ZeroDivisionError as error:
        raise Hint(
            "What about an empty document? Yours divides by its number of pieces, 0."
        ) from error
    expect(list(empty) == [], f"An empty document has no piece; yours has {list(empty)}.")
    expect(
        list(answer(8, 4)) == [4, 4],
        f"What if it fits exactly? 8 tokens are two pieces of 4; yours are {list(answer(8, 4))}.",
    )
    for n, room in ((1, 7), (7, 7), (1000, 126), (127, 126), (100_003, 254)):
        lengths = list(answer(n, room))
        right = sum(lengths) == n and max(lengths) <= room and len(lengths) == math.ceil(n / room)
        expect(
            right and max(lengths) - min(lengths) <= 1,
            f"Right for 10 tokens, wrong for {n:,} in pieces of {room}. Is a number written into "
            f"your "
            "code?",
        )
    return "No stub: a piece of three tokens has little context to learn from."


@exercise("12.6", "Tile the heads", difficulty=3, minutes=20)
def tile_heads(answer):
    old, dim, columns = 3, 4, 6
    heads, size = 6, 9
    weight = torch.arange(3.0 * old * dim * columns).view(3 * old * dim, columns)
    given = weight.clone()
    out = answer(weight, dim, heads, size)
    expect(torch.equal(weight, given), "Does your function write into the weight? Work on a copy.")
    expect_tensor(out, (3 * heads * dim, size), weight.dtype)
    parts = weight.view(3, old, dim, columns)
    h, c = reference.wrap(heads, old), reference.wrap(size, columns)

    def laid(places, cols=c):
        return parts[:, places][..., cols].flatten(0, 2)

    rows = reference.wrap(heads * dim, old * dim)
    flat = weight[:, c].view(3, old * dim, size)
    split = reference.wrap(3 * heads * dim, 3 * old * dim)
    edge = torch.arange(heads) % old
    odd = (torch.arange(heads) - -(-(heads - old) // 2)) % old
    side = (torch.arange(size) - -(-(size - columns) // 2)) % columns
    mirrored = torch.tensor([0, 0, 1, 2, 2, 1])
    padded = torch.zeros(3, heads, dim, size)
    padded[:, 1:4, :, 1:7] = parts
    mistakes = [
        (
            weight[split][:, c],
            "Where do queries end and keys begin? You tile all rows as one; each of the three "
            "parts is tiled by itself.",
        ),
        (
            flat[:, rows].flatten(0, 1),
            "Is a head copied whole? You tile row by row, and a head's dimensions end up in two "
            "heads.",
        ),
        (laid(edge), "Where do the old heads stand? In the *middle*; yours begin at the top."),
        (
            laid(h, torch.arange(size) % columns),
            "Where do the old columns stand? In the *middle*; yours begin at the left.",
        ),
        (
            laid(edge, torch.arange(size) % columns),
            "Where does the old weight stand? In the *middle*, heads and columns; yours begins at "
            "the edge.",
        ),
        (laid(odd), "Three heads more: one before and two after. Yours are the other way round."),
        (
            laid(h, side),
            "Three columns more: one before and two after. Yours are the other way round.",
        ),
        (
            laid(odd, side),
            "Three more: one before and two after, for heads and columns. Yours are the other way "
            "round.",
        ),
        (
            laid(mirrored),
            "Does it go on, or turn back? Tiles repeat; yours are mirrored at the edge.",
        ),
        (
            padded.flatten(0, 2),
            "What stands around the old weight? Its own continuation; yours is zero there.",
        ),
        (
            torch.cat(
                [laid(h).view(3, heads, dim, size)[:, i].flatten(0, 1) for i in range(heads)]
            ),
            "Which comes first, the part or the head? All queries, then all keys, then all values.",
        ),
    ]
    expect_close(
        out,
        laid(h),
        mistakes,
        "Some row or column is not the copy that it should be: heads "
        f"{h.tolist()} of the old ones, columns {c.tolist()}.",
    )
    expect_close(
        answer(weight, dim, old, columns),
        weight,
        [],
        "Tiled to its own size, a weight is itself. Is a number written into your code?",
    )
    expect_close(
        answer(weight, dim, 7, 20),
        parts[:, reference.wrap(7, old)][..., reference.wrap(20, columns)].flatten(0, 2),
        [],
        "Right for six heads, wrong for seven heads and 20 columns. Does it go round more than "
        "once?",
    )
    return _larger_mini(answer)


def _larger_mini(answer) -> str:
    """Put the learner's Wqkv into a model tiled from the embedded checkpoint."""
    from modernbert_mini import ModernBertForMaskedLM

    mini = ModernBertForMaskedLM.from_pretrained("mini", attn_implementation="sdpa").eval()
    heads = mini.config.num_attention_heads + 2
    size = heads * mini.config.head_dim
    wider = mini.config.with_overrides(hidden_size=size, num_attention_heads=heads)
    with torch.random.fork_rng(devices=[]):
        models = [ModernBertForMaskedLM(wider).eval() for _ in range(2)]
    for model in models:
        reference.tile(mini, model)
    with torch.no_grad():
        for old, new in zip(mini.model.layers, models[1].model.layers, strict=True):
            tiled = answer(old.attn.Wqkv.weight, mini.config.head_dim, heads, size)
            new.attn.Wqkv.weight.copy_(tiled)
        ids = torch.randint(300, 2000, (1, 30), generator=torch.Generator().manual_seed(0))
        gap = (models[0](ids).logits - models[1](ids).logits).abs().max().item()
    expect(gap < 1e-4, f"In a larger `mini`, yours and the package's differ by {gap:.1e}.")
    return (
        f"A `mini` of {heads} heads and {size} dimensions gives the same scores with your `Wqkv`."
    )
