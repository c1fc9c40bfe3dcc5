"""Checks of chapter 16, looking inside."""

import torch

from modernbert_mini import inspection
from modernbert_mini.checks._machinery import Hint, exercise, expect, expect_close, expect_tensor


def _sample(*shape: int, seed: int = 16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _mini():
    from modernbert_mini import ModernBertForMaskedLM

    return ModernBertForMaskedLM.from_pretrained("mini").eval()


@exercise("16.1", "Attention distance", difficulty=1, minutes=10)
def attention_distance(answer):
    length = 6
    distance = (torch.arange(length)[:, None] - torch.arange(length)).abs().float()
    everyone = torch.ones(1, length, dtype=torch.bool)
    weights = _sample(1, 2, length, length).softmax(dim=-1)
    out = answer(weights, everyone)
    expect(
        not isinstance(out, torch.Tensor) or out.shape != (1, 2),
        "One number for each text and head, or one for each head? Average over the texts, too.",
    )
    expect_tensor(out, (2,))
    right = (weights * distance).sum(-1).mean((0, 2))
    signed = weights * (torch.arange(length) - torch.arange(length)[:, None])
    expect_close(
        out,
        right,
        [
            (
                right * length,
                "Is it a mean over the tokens that look? Yours adds them up, so longer texts get "
                "longer distances.",
            ),
            (
                right / length,
                "Over what do you average? The weights of one query sum to 1 already: add over "
                "the keys, and average over the queries alone.",
            ),
            (
                signed.sum(-1).mean((0, 2)),
                "Do left and right cancel? A key 3 to the left is as far away as one 3 to the "
                "right: take the absolute value.",
            ),
            (
                signed.sum(-1).mean((0, 2)).abs(),
                "Where do you take the absolute value? Of each distance, before anything is "
                "averaged; afterwards, left and right have cancelled already.",
            ),
            (
                (weights * distance.square()).sum(-1).mean((0, 2)),
                "Tokens or tokens squared? No square is needed: the mean of |i − j|.",
            ),
            (
                distance[torch.arange(length), weights.argmax(-1)].mean((0, 2)),
                "Is the favourite key all that counts? Weigh every distance by its weight, not "
                "only that of the largest one.",
            ),
        ],
        "Try weights that are an identity matrix: every token looks at itself, so the distance is "
        "0. Then shift the ones by one place: it is nearly 1. Which of the two do you miss?",
    )
    # Two texts, the second of four tokens; its padding sees the real tokens, and nobody sees it.
    tokens = torch.tensor([[True] * length, [True] * 4 + [False] * 2])
    scores = _sample(2, 2, length, length, seed=17).masked_fill(~tokens[:, None, None], -torch.inf)
    weights = scores.softmax(dim=-1)
    queries = (weights * distance).sum(-1).transpose(0, 1)  # (H, B, L)
    expect_close(
        answer(weights, tokens),
        queries[:, tokens].mean(-1),
        [
            (
                queries.mean((1, 2)),
                "Does padding count as a token that looks? It has a row of weights like any "
                "other; only rows where `tokens` is true belong in the mean.",
            ),
            (
                (queries * tokens).mean((1, 2)),
                "By how many rows do you divide? You leave the padding's rows out of the sum, and "
                "count them all the same: divide by `tokens.sum()`.",
            ),
            (
                torch.stack([queries[:, b, tokens[b]].mean(-1) for b in range(2)]).mean(0),
                "Does a short text count as much as a long one? Average over all tokens at once, "
                "not over each text first.",
            ),
        ],
        "Right for one text without padding, wrong for two of different length. Which rows and "
        "columns does `tokens` switch off?",
    )
    weights = _sample(1, 2, length, length, seed=18).softmax(dim=-1)
    inner = torch.tensor([[False] + [True] * (length - 2) + [False]])
    kept = weights * inner[:, None, None]
    every = (kept / kept.sum(-1, keepdim=True) * distance).sum(-1)
    expect_close(
        answer(weights, inner),
        every[:, :, 1:-1].mean((0, 2)),
        [
            (
                (kept * distance).sum(-1)[:, :, 1:-1].mean((0, 2)),
                "Do the weights of a query still sum to 1? With keys left out they do not: divide "
                "by what is left of them.",
            ),
            (
                (weights * distance).sum(-1)[:, :, 1:-1].mean((0, 2)),
                "Are the tokens that do not count left out as keys, too? Here [CLS] and [SEP] "
                "still pull at the distance of everyone else.",
            ),
        ],
        "Right with padding, wrong where two real tokens are left out, as [CLS] and [SEP] are. "
        "They neither look nor are looked at.",
    )
    return "A mean over queries, of a mean over keys, and nobody counts who should not."


@exercise("16.2", "The logit lens", difficulty=2, minutes=10)
def logit_lens(answer):
    model = _mini()
    ids = torch.arange(300, 312)[None]
    stream = inspection.residual_stream(model, input_ids=ids)
    x = stream[2, 0]
    with torch.no_grad():
        out = answer(model, x.clone())
        norm, head, decoder = model.model.final_norm, model.head, model.decoder
        right = inspection.logit_lens(model, x)
        last = model(ids).logits[0]
        mistakes = [
            (
                decoder(head(x)),
                "What stands between the last layer and the head? The stream is not normed: "
                "`final_norm` comes first.",
            ),
            (
                decoder(head(norm(norm(x)))),
                "How often is the state normed? The final norm has a weight, so doing it twice "
                "changes the numbers.",
            ),
            (
                decoder(norm(x)),
                "Does the decoder read the stream itself? A masked model has a head in between: "
                "dense, activation, norm.",
            ),
            (
                decoder(x),
                "Two parts are missing before the decoder: the final norm, then the head.",
            ),
            (
                decoder(norm(head(x))),
                "In which order? First the final norm, then the head: as the model does after its "
                "last layer.",
            ),
            (
                right - decoder.bias,
                "Is the decoder its matrix alone? It also has a bias, one number for each token.",
            ),
            (
                right.softmax(-1),
                "Logits or probabilities? Leave the softmax to the reader.",
            ),
            (
                right.log_softmax(-1),
                "Logits or logarithms of probabilities? They differ by one number for each row.",
            ),
            (
                inspection.logit_lens(model, stream[-1, 0]),
                "Do you run the model to its end? The lens leaves the other layers out.",
            ),
            (
                last,
                "Do you run the model to its end? The lens leaves the other layers out.",
            ),
        ]
        expect_tensor(out, right.shape)
        expect_close(
            out,
            right,
            mistakes,
            "Which modules does the model use after its last layer? Print `model`, and call those "
            "below the layers, in order.",
        )
        expect_close(
            answer(model, stream[-1, 0]),
            last,
            [],
            "Right in the middle, wrong at the end: with the last state, the lens must give the "
            "model's own logits.",
        )
        expect_tensor(answer(model, stream[:, :, :3]), (*stream.shape[:2], 3, right.shape[-1]))
    return "On the last state of the stream, your lens is the model."


@exercise("16.3", "The rank of the right token", difficulty=1, minutes=6)
def token_rank(answer):
    logits = torch.tensor([[0.1, 2.0, -1.0, 0.7, 1.5], [3.0, -2.0, 0.0, 1.0, 2.0]])
    tokens = torch.tensor([3, 1])
    out = answer(logits, tokens)
    expect(
        not isinstance(out, torch.Tensor) or out.dim() > 0 and out.shape != (2, 1),
        "One rank for each row? Return a tensor of shape `(2,)` for two rows of logits.",
    )
    expect_tensor(out, (2,))
    falling, rising = logits.argsort(-1, descending=True), logits.argsort(-1)
    own = tokens[:, None]
    expect_close(
        out,
        torch.tensor([2, 4]),
        [
            (
                torch.tensor([3, 5]),
                "Do you count the token itself? Nothing is likelier than the likeliest: its rank "
                "is 0.",
            ),
            (
                rising.argsort(-1).gather(-1, own)[:, 0],
                "From which end do you count? Rank 0 is the likeliest token.",
            ),
            (
                falling.gather(-1, own)[:, 0],
                "Does `argsort` give ranks? It gives the ids in order of rank. Sorting those once "
                "more would give ranks; counting what is larger is shorter.",
            ),
            (
                rising.gather(-1, own)[:, 0],
                "Does `argsort` give ranks? It gives ids in order, here from the least likely on.",
            ),
            (
                logits.gather(-1, own)[:, 0],
                "Is this the rank or the logit? Count how many logits of the row are larger.",
            ),
        ],
        "Count by hand: in the first row, two logits are larger than the 0.7 of token 3.",
    )
    ties = torch.zeros(1, 4)
    expect_close(
        answer(ties, torch.tensor([2])),
        torch.tensor([0]),
        [
            (
                torch.tensor([3]),
                "Is an equal logit a likelier one? Count what is larger, not what is as large.",
            ),
            (
                torch.tensor([4]),
                "Is an equal logit a likelier one? And is the token its own rival?",
            ),
        ],
        "With four equal logits nothing is likelier than token 2, so its rank is 0. Sorting puts "
        "equal numbers in an order that means nothing.",
    )
    return "Nothing sorted, one comparison per token of the vocabulary."


@exercise("16.4", "Switch a head off", difficulty=2, minutes=15)
def ablated_head(answer):
    layer, head = 2, 1
    model, other = _mini(), _mini()
    size, count = model.config.head_dim, model.config.num_attention_heads
    ids = torch.arange(300, 340)[None]

    def columns(head):
        return slice(size * head, size * (head + 1))

    @torch.no_grad()
    def logits(of=model):
        return of(ids).logits

    before = {name: p.clone() for name, p in model.named_parameters()}
    as_it_was = logits()
    block = answer(model, layer, head)
    expect(
        hasattr(block, "__enter__"),
        "Can it stand in a `with` line? Yours cannot: is `@contextmanager` missing above `def`, "
        "or the `yield` inside?",
    )
    with block:
        inside = logits()
        model.attn_implementation = "eager"
        inside_eager = logits()
        model.attn_implementation = "auto"
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    expect_close(
        inside,
        _without(other, layer, columns(head), logits),
        [
            (
                as_it_was,
                "Does anything change inside the block? The logits are those of the whole model. "
                "A pre-hook has to *return* the new inputs, as a tuple.",
            ),
            (
                _without(other, layer, slice(None), logits),
                "One head, or all of them? Inside your block, layer 2 has no attention left.",
            ),
            (
                _without(other, layer, slice(head, None, count), logits),
                "Which numbers of a token belong to head 1? Those of a head lie together: "
                "D of them, from head·D on. Yours stand apart.",
            ),
            (
                _without(other, layer, columns(head + 1), logits),
                "Which head did you switch off? Heads are counted from 0.",
            ),
            (
                _without(other, layer - 1, columns(head), logits),
                "In which layer? Layers are counted from 0, and this is the one before.",
            ),
            (
                _without(other, layer, columns(head), logits, where="rows"),
                "Rows or columns of `Wo`? A head comes in by its columns. A row is a number of the "
                "output, to which all heads contribute.",
            ),
            (
                _without(other, layer, columns(head), logits, where="q"),
                "What happens with a query of zeros? All its scores are equal, so the head still "
                "hands on a mean of everything. It has to hand on nothing.",
            ),
        ],
        "Inside the block, what does `Wo` get from head 1? It should be zero, and everything else "
        "as before.",
    )
    expect(
        torch.allclose(inside, inside_eager, atol=1e-3),
        "Does it work on both backends? Your way changes `sdpa` and leaves `eager` as it was, or "
        "the other way round. What leaves the heads passes through `Wo` on both.",
    )
    left = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    expect(
        not left,
        f"Are the weights as they were? After the block, `{(left or [''])[0]}` is still changed.",
    )
    expect(
        torch.equal(logits(), as_it_was),
        "Does the head come back? After the block the logits are still those without it: is a "
        "hook left behind? `handle.remove()` goes after the `yield`.",
    )
    try:
        with answer(model, layer, head):
            raise KeyError
    except KeyError:
        pass
    expect(
        torch.equal(logits(), as_it_was),
        "And if the block stops with an error? Then the line after `yield` never runs and the head "
        "stays off: put it under `finally:`.",
    )
    remark = "`mini` without one head, and whole again afterwards, whatever happened in between."
    if changed:
        remark += " (You changed a weight and put it back. A hook does without.)"
    return remark


def _without(model, layer, numbers, logits, where="columns"):
    """Logits of a copy in which some numbers of a weight are zero."""
    attn = model.model.layers[layer].attn
    weight = attn.Wqkv.weight if where == "q" else attn.Wo.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[(slice(None), numbers) if where == "columns" else numbers] = 0
        out = logits(model)
        weight.copy_(kept)
    return out


@exercise("16.5", "A linear probe", difficulty=2, minutes=15)
def linear_probe(answer):
    # Four classes at the corners of a square, far from the origin; a third feature never varies.
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]) * 8 + 30
    labels = torch.arange(200) % 4
    x = torch.cat((corners[labels] + _sample(200, 2), torch.ones(200, 1)), dim=-1)
    (train_x, test_x), (train_y, test_y) = x.split(120), labels.split(120)
    try:
        out = answer(train_x, train_y, test_x)
    except torch.linalg.LinAlgError as error:
        raise Hint(
            "Can the system be solved? One feature here never varies, so the matrix has no "
            "inverse. Add the penalty to its diagonal."
        ) from error
    expect(
        isinstance(out, torch.Tensor) and out.dim() > 0 and not isinstance(out, float),
        "Is it one class for each row of `test_x`? The check does the scoring itself.",
    )
    expect(
        out.shape != (80, 4),
        "Scores or classes? Take the class with the largest score: `argmax(dim=-1)`.",
    )
    expect(
        out.shape != (4,),
        "Along which dimension do you take the largest? There is one answer for each row.",
    )
    expect(
        out.shape != (120,),
        "Whom do you ask about? These are answers for the rows that you fitted on. The check "
        "wants those of `test_x`.",
    )
    expect_tensor(out, (80,))
    expect(
        not out.is_floating_point() or torch.equal(out, out.round()),
        "Is a class a number between others? You fit the label itself. Give each class a column "
        "of zeros and ones: `F.one_hot`.",
    )

    def accuracy(predicted, truth):
        return (predicted == truth).float().mean().item()

    got = accuracy(out, test_y)
    numbers = inspection.fit_ridge(train_x, train_y[:, None])(test_x)[:, 0].round()
    expect(
        not got < 0.95 or accuracy(out, numbers) < 0.9,
        "Is class 3 three times class 1? You fit the label as a number, and these four classes do "
        "not lie in a row. Give each class a column: `F.one_hot`.",
    )
    expect(
        len(out.unique()) > 1,
        "Does every row get the same class? A penalty far too strong makes all weights nearly 0.",
    )
    # Two classes on one line through the origin, on the same side of it.
    side = torch.arange(60) % 2
    line = (1.0 + 4.0 * side + 0.2 * _sample(60))[:, None]
    on_line = accuracy(answer(line[:40], side[:40], line[40:]), side[40:])
    expect(
        on_line > 0.95,
        "Does your map have an offset? Two classes at 1 and 5 cannot be told apart by a slope "
        "alone. Take the means of `x` and of the targets off first, and put them back.",
    )
    expect(
        got > 0.95,
        f"Four classes that lie well apart: only {got:.0%} right. Are features and targets centred "
        "by means of their own, and is the penalty small?",
    )
    moved = answer(line[:40], side[:40], line[40:][side[40:] == 1])
    alone = torch.cat([answer(train_x, train_y, row[None]) for row in test_x[:5]])
    expect(
        torch.equal(alone, out[:5]) and bool((moved == 1).all()),
        "Does the answer for one row depend on the other rows of the test? Centre the test with "
        "the means of the *training* rows: the test must not take part in the fit.",
    )
    return "Fitted on one part, asked about the other, and nothing leaks between them."


@exercise("16.6", "How sure is the difference?", difficulty=3, minutes=12)
def standard_error(answer):
    # Texts of different length, each with a shift of its own.
    texts = torch.arange(12).repeat_interleave(
        torch.tensor([3, 9, 5, 14, 7, 4, 11, 6, 8, 2, 13, 10])
    )
    texts = texts.roll(20)
    differences = 0.3 + _sample(12)[texts] + 0.5 * _sample(len(texts), seed=19)
    out = torch.as_tensor(answer(differences, texts))
    expect(out.numel() == 1, f"Is it one number? Yours has shape `{tuple(out.shape)}`.")
    right = torch.tensor(inspection.standard_error(differences, texts))
    m, count = len(differences), texts.bincount().float()
    raw = torch.zeros(12).index_add(0, texts, differences)
    means, centred = raw / count, raw - count * differences.mean()
    expect_close(
        out.reshape(()),
        right,
        [
            (
                differences.std() / m**0.5,
                "Are the tokens of one text independent? This is the formula for values that are. "
                "Here a hard text is hard at all its tokens: add up within each text first.",
            ),
            (
                differences.std(correction=0) / m**0.5,
                "Are the tokens of one text independent? This is the formula for values that are. "
                "Add up the deviations within each text, and only then square.",
            ),
            (
                differences.std(),
                "Of what is this the spread? It is that of single tokens. The mean of many tokens "
                "is much steadier.",
            ),
            (
                means.std() / 12**0.5,
                "Does a text of 2 tokens count as much as one of 14? This is the error of a mean "
                "of text means. The loss is a mean over tokens.",
            ),
            (
                raw.square().sum().sqrt() / m,
                "Are these deviations? Take the overall mean off before you add up, or the "
                "difference itself ends up in its own error.",
            ),
            (
                centred.square().sum() / m**2,
                "Variance or standard error? The root is missing.",
            ),
            (
                centred.square().sum().sqrt() / 12,
                "By what do you divide? By the number of tokens: it is their mean.",
            ),
            (
                centred.square().sum().sqrt(),
                "Is this the error of the sum or of the mean? Divide by the number of tokens.",
            ),
        ],
        "In the formula's order: deviations from the overall mean; their sum within each text; the "
        "squares of those sums added up; the root; divided by the number of tokens.",
    )
    single = torch.arange(len(differences))
    expect_close(
        torch.as_tensor(answer(differences, single)).reshape(()),
        torch.tensor(inspection.standard_error(differences, single)),
        [],
        "Right for these texts, wrong where every token is a text of its own. Is a number of "
        "texts written into your code?",
    )
    shifted = torch.as_tensor(answer(differences, texts * 7 + 100)).reshape(())
    expect(
        torch.allclose(shifted.float(), right, rtol=1e-4),
        "Right for texts 0 to 11, wrong where their numbers have gaps. They are names, not places.",
    )
    return "Texts are what you drew at random, so texts are what you count."
