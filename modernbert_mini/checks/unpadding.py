"""Checks of chapter 7, unpadding."""

import torch

from modernbert_mini import unpadding as reference
from modernbert_mini.checks._machinery import (
    Hint,
    exercise,
    expect,
    expect_close,
    expect_tensor,
)


@exercise("7.1", "Bounds from lengths", difficulty=1, minutes=5)
def cumulative_lengths(answer):
    lengths = torch.tensor([5, 2, 3])
    given = lengths.clone()
    out = answer(lengths)
    expect(
        torch.equal(given, lengths),
        "Does your function write into `lengths`? An operation whose name ends in `_` does.",
    )
    expect(
        isinstance(out, torch.Tensor),
        f"Is your result a tensor? The check got a value of type `{type(out).__name__}`.",
    )
    right = torch.tensor([0, 5, 7, 10])
    mistakes = [
        (
            [5, 7, 10],
            "Where does the first text start? Three texts have four bounds: put a 0 in front.",
        ),
        (
            [0, 5, 7],
            "Where does the last text end? You have the three starts; the end, N, is missing.",
        ),
        ([0, 5, 2, 3], "Are these places or lengths? Every bound is the *sum* of what is before."),
        (
            [0, 4, 6, 9],
            "Is a bound the last token of a text, or the first token after it? As with slices in "
            "Python, the end is not part of it: the first text is `stream[0:5]`.",
        ),
        ([1, 6, 8, 11], "Where does counting start? The first token of a stream is number 0."),
        ([5, 7, 10, 0], "On which side is the 0? It stands in front; yours is at the end."),
        (
            [10, 5, 3, 0],
            "From which end do you sum? Bounds rise from 0 to N; yours say how much is left.",
        ),
        (
            [0, 5, 10, 15],
            "Have all texts the same length? Yours puts a bound after every 5 tokens.",
        ),
    ]
    for wrong, hint in mistakes:
        expect(out.tolist() != wrong, hint)
    expect_tensor(out, (4,))
    expect(
        out.tolist() == right.tolist(),
        f"Texts of 5, 2 and 3 tokens start at 0, 5 and 7, and end at 10. You say {out.tolist()}.",
    )
    expect(
        out.dtype == torch.int32,
        f"Which dtype do the kernels ask for? 32-bit integers, `torch.int32`; yours is "
        f"`{out.dtype}`.",
    )
    other = torch.tensor([1, 1, 8, 40, 2])
    expect(
        answer(other).tolist() == [0, 1, 2, 10, 50, 52],
        "Right for three texts, wrong for five. Is a number written into your code?",
    )
    return "`cu_seqlens.diff()` gives the lengths back: nothing is lost."


@exercise("7.2", "Positions that restart", difficulty=2, minutes=8)
def positions(answer):
    cu_seqlens = torch.tensor([0, 4, 5, 7], dtype=torch.int32)
    given = cu_seqlens.clone()
    out = answer(cu_seqlens)
    expect(
        torch.equal(given, cu_seqlens),
        "Does your function write into `cu_seqlens`? The caller needs the bounds again.",
    )
    expect_tensor(out, (7,))
    expect(
        not out.is_floating_point(),
        f"Are positions whole numbers? Yours have dtype `{out.dtype}`.",
    )
    right = [0, 1, 2, 3, 0, 0, 1]
    mistakes = [
        (
            [0, 1, 2, 3, 4, 5, 6],
            "Where does the second text start to count? Your positions run on to the end of the "
            "stream.",
        ),
        ([1, 2, 3, 4, 1, 1, 2], "Which position has the first token of a text? 0, not 1."),
        (
            [0, 0, 0, 0, 1, 2, 2],
            "Is this the place in the text, or the number of the text? Yours says which text a "
            "token belongs to.",
        ),
        (
            [3, 2, 1, 0, 0, 1, 0],
            "From which end do you count? Yours counts how many tokens are still to come.",
        ),
        (
            [0, 0, 0, 0, 4, 5, 5],
            "What do you take off from what? You have the place where each text starts; the "
            "position is how far beyond it the token stands.",
        ),
        (
            [0, 1, 2, 3, 4, 1, 1],
            "To which text does the token *at* a bound belong? It is the first of the next one. "
            "Yours still counts on there.",
        ),
        (
            [0, 1, 2, 0, 0, 1, 2],
            "Where does a text end? One token too early in yours: token 3 is the last of the "
            "first text.",
        ),
        (
            [0, 1, 2, 3, 0, 1, 2],
            "What does the third bound say? The text at 4 has a single token, and another starts "
            "at 5. Yours restarts only once.",
        ),
    ]
    for wrong, hint in mistakes:
        expect(out.tolist() != wrong, hint)
    expect(
        out.tolist() == right,
        f"Texts of 4, 1 and 2 tokens: 0 1 2 3, 0, 0 1. You have {out.tolist()}.",
    )
    for bounds in ([0, 3], [0, 1, 2, 3], [0, 2, 9, 30, 31]):
        bounds = torch.tensor(bounds)
        expect(
            answer(bounds).tolist() == reference.positions(bounds).tolist(),
            f"Right for bounds 0 4 5 7, wrong for {bounds.tolist()}. Is a number written into "
            "your code?",
        )
    return "At each bound they fall back to 0."


MASKS = {
    "on the right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "on the left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "in the middle": [[1, 0, 1, 0, 1], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0]],
}


@exercise("7.3", "Unpad and pad, round the real encoder", difficulty=2, minutes=12)
def unpad_and_pad(unpad, pad):
    x = torch.arange(1, 16).view(3, 5)  # (B, L), without a zero
    for side, rows in MASKS.items():
        _expect_unpad(unpad, x, torch.tensor(rows), side)
    vectors = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor(MASKS["in the middle"])
    try:
        packed, _ = unpad(vectors, mask)
        deep = packed.shape == (7, 4) and torch.equal(packed, vectors[mask.bool()])
    except (RuntimeError, IndexError, ValueError, TypeError):
        deep = False
    expect(
        deep,
        "Does your `unpad` take vectors too, `(B, L, C)`? It works on ids `(B, L)` alone; join "
        "only the first two dimensions.",
    )
    for side, rows in MASKS.items():
        _expect_pad(pad, torch.tensor(rows), side)
    return _round_mini(unpad, pad)


def _expect_unpad(unpad, x, mask, side):
    given = x.clone()
    out = unpad(given, mask)
    expect(torch.equal(x, given), "Does your `unpad` write into `x`? It should leave it alone.")
    expect(
        isinstance(out, tuple | list) and len(out) == 2,
        "What does `my_unpad` return? Two things: the packed tokens, and their indices.",
    )
    packed, indices = out
    real, right = mask.bool(), x[mask.bool()]
    expect(
        isinstance(packed, torch.Tensor) and packed.dim() == 1,
        "Which shape has a stream of ids? `(N,)`, one row and no batch; yours is "
        f"`{tuple(getattr(packed, 'shape', ()))}`.",
    )
    expect(
        not torch.equal(packed, x.flatten()),
        "Is the padding gone? Your stream still has all B · L places.",
    )
    expect(
        not torch.equal(packed, x[~real]),
        "What does a 1 in the mask say? *Real*. You took the padding and left the text.",
    )
    lengths = mask.sum(dim=-1).tolist()
    in_front = torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])
    expect(
        torch.equal(packed, right) or not torch.equal(packed, in_front),
        f"Where in the row are the real tokens? Yours takes the first ones of each row, but here "
        f"the padding is {side}: ask the mask, not the length.",
    )
    expect(
        torch.equal(packed, right) or not torch.equal(packed, x.T[real.T]),
        "Text after text, or column after column? Yours takes the first token of every text, then "
        "the second of every text.",
    )
    expect(
        torch.equal(packed, right),
        f"With the padding {side}, the real tokens are {right.tolist()}; yours are "
        f"{packed.tolist()}.",
    )
    expect(
        isinstance(indices, torch.Tensor) and indices.shape == packed.shape,
        "Is there one index for each token? They should have the shape of the stream, "
        f"`{tuple(packed.shape)}`; yours have `{tuple(getattr(indices, 'shape', ()))}`.",
    )
    place = torch.arange(5).expand(3, 5)[real]
    expect(
        place.tolist() == (x[real] - 1).tolist() or indices.tolist() != place.tolist(),
        "Is an index the place in the row, or in the whole batch? Lay the rows end to end and "
        "count through: the second row starts at L.",
    )
    expect(
        indices.tolist() == (right - 1).tolist(),
        f"With the padding {side}, the indices are {(right - 1).tolist()}; yours are "
        f"{indices.tolist()}.",
    )


def _expect_pad(pad, mask, side):
    stream = torch.arange(1.0, 1 + 2 * mask.sum()).view(-1, 2).requires_grad_()  # (N, C)
    indices = mask.flatten().nonzero()[:, 0]
    out = pad(stream, indices, 3, 5)
    expect_tensor(out, (3, 5, 2), None, "the padded batch")
    right = reference.pad(stream.detach(), indices, 3, 5)
    lengths = mask.sum(dim=-1).tolist()
    parts = stream.detach().split(lengths)
    in_front = torch.stack([torch.cat((p, p.new_zeros(5 - len(p), 2))) for p in parts])
    full = torch.cat((stream.detach(), stream.new_zeros(15 - len(stream), 2))).view(3, 5, 2)
    found = out.detach()
    expect(
        torch.equal(found, right) or not torch.equal(found, in_front),
        f"Did you use the indices? Yours fills each row from the left, but here the padding was "
        f"{side}.",
    )
    expect(
        not torch.equal(found, full),
        "Where does each token go? Yours fills the batch place by place, as if there had been no "
        "padding: `indices` says where each one came from.",
    )
    expect(
        torch.equal(found[mask.bool()], stream.detach()),
        f"With the padding {side}, some tokens are at another place than they came from.",
    )
    expect(
        not found[~mask.bool()].any(),
        "What stands where padding was? Zeros. Yours has other numbers there.",
    )
    expect(
        out.requires_grad,
        "Can a gradient find its way back? Your batch is cut off from the stream: no `detach`, no "
        "`.data`, no `no_grad`.",
    )


def _round_mini(unpad, pad) -> str:
    """Unpad a batch, run the embedded checkpoint on the stream, pad what comes out."""
    from modernbert_mini import ModernBertModel

    model = ModernBertModel.from_pretrained("mini", attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, 8000, (4, 90), generator=generator)  # (B, L)
    worst = 0.0
    for left in (False, True):
        mask = torch.arange(90) < torch.tensor([90, 17, 60, 1])[:, None]
        mask = (mask.flip(1) if left else mask).long()
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).last_hidden_state  # (B, L, C)
            stream, indices = unpad(ids, mask)
            bounds = reference.cumulative_lengths(mask.sum(dim=-1))
            states = model(stream, cu_seqlens=bounds).last_hidden_state  # (N, C)
            out = pad(states, indices, *mask.shape)  # (B, L, C)
        gap = (out - expected)[mask.bool()].abs().max().item()
        if not gap < 1e-4 or out[~mask.bool()].any():
            raise Hint(
                "Both pass alone, but round `mini` the vectors move by "
                f"{gap:.1e}. Does one of them remember something from an earlier call?"
            )
        worst = max(worst, gap)
    return (
        f"`mini` read {int(mask.sum())} tokens in place of {mask.numel()}, padded right and left, "
        f"and no vector of a real token moved by more than {worst:.0e}."
    )


@exercise("7.4", "Best fit", difficulty=3, minutes=15)
def best_fit(answer):
    lengths, capacity = [3, 8, 1, 5, 9, 4, 1], 10
    given = list(lengths)
    out = answer(lengths, capacity)
    expect(lengths == given, "Does your function change the list of lengths? The caller needs it.")
    expect(
        isinstance(out, list | tuple) and all(isinstance(b, list | tuple) for b in out),
        "What does `my_best_fit` return? A list of streams, and each is a list of indices.",
    )
    flat = sorted(i for b in out for i in b)
    expect(
        flat != sorted(lengths),
        "Lengths or indices? Your streams hold the lengths; the caller wants to know *which* "
        "texts go where.",
    )
    expect(
        flat == list(range(len(lengths))),
        f"Is every text in exactly one stream? There are seven, 0 to 6; yours are {flat}.",
    )
    full = [sum(lengths[i] for i in b) for b in out]
    expect(
        max(full) <= capacity,
        f"Is a stream overfull? One of yours holds {max(full)} tokens, the capacity is 10. Does "
        "its room shrink when a text goes in?",
    )
    down = sorted(range(7), key=lambda i: -lengths[i])
    up = sorted(range(7), key=lambda i: lengths[i])
    place = {
        "first": lambda fits, room: fits[0],
        "best": lambda fits, room: min(fits, key=lambda b: room[b]),
        "worst": lambda fits, room: max(fits, key=lambda b: room[b]),
        "last": lambda fits, room: fits[-1],
        "late": lambda fits, room: min(reversed(fits), key=lambda b: room[b]),
        "next": lambda fits, room: len(room) - 1 if len(room) - 1 in fits else None,
    }

    def packed(way, order=range(7), spare=0):
        return _same(_pack(lengths, capacity, order, place[way], spare))

    mistakes = [
        (
            packed("first"),
            "The first stream that has room, or the one with the *least* room left? Yours is "
            "first fit.",
        ),
        (
            packed("worst"),
            "The fullest stream or the emptiest? Yours always takes the one with the most room.",
        ),
        (
            packed("next"),
            "Do you look at all open streams? Yours looks at the last one and never goes back.",
        ),
        (
            packed("last"),
            "Which of the streams with room? Yours takes the one that was opened last.",
        ),
        (
            packed("best", spare=1),
            "May a text fill a stream to the very brim? Room for exactly the length is enough: "
            "`<=`, not `<`.",
        ),
        (
            packed("late"),
            "Two streams have the same room left: which one? The earlier; yours takes the later.",
        ),
        (
            packed("best", down),
            "In which order do the texts come? As they are given. Yours sorts them, the longest "
            "first: that is best fit *decreasing*.",
        ),
        (
            packed("first", down),
            "Is this `first_fit` of the chapter? It sorts, and takes the first.",
        ),
        (
            packed("best", up),
            "In which order do the texts come? As they are given. Yours takes the shortest first.",
        ),
        (
            _same([[i] for i in range(7)]),
            "Do texts share a stream? Each of yours has one for itself.",
        ),
    ]
    for wrong, hint in mistakes:
        expect(_same(out) != wrong, hint)
    expect(
        _same(out) == packed("best"),
        "Lengths 3 8 1 5 9 4 1, capacity 10. The 1 at place 2 finds 7 and 2 tokens of room: it "
        f"goes to the 8. Follow your code from there; it says {[list(b) for b in out]}.",
    )
    other = [4, 4, 9, 3, 12, 7, 6, 1, 15, 2]
    right = _same(_pack(other, 16, range(10), place["best"], 0))
    expect(
        _same(answer(other, 16)) == right,
        "Right for a capacity of 10, wrong for 16. Is a number written into your code?",
    )
    try:
        answer([3, 11], 10)
    except ValueError:
        pass
    else:
        raise Hint(
            "What becomes of a text that no stream can hold? Say so: raise a `ValueError`. Yours "
            "packs 11 tokens into a capacity of 10 without a word."
        )
    lengths = torch.randint(20, 250, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    mine, first = len(answer(lengths, 512)), len(reference.first_fit(lengths, 512))
    least = -(-sum(lengths) // 512)
    return (
        f"400 texts, capacity 512: {mine} streams without sorting, {first} by first fit on sorted "
        f"lengths; fewer than {least} is impossible."
    )


def _pack(lengths, capacity, order, choose, spare):
    bins, room = [], []
    for i in order:
        fits = [b for b, free in enumerate(room) if free >= lengths[i] + spare]
        b = choose(fits, room) if fits else None
        if b is None:
            bins.append([])
            room.append(capacity)
            b = len(bins) - 1
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


def _same(bins) -> list[list[int]]:
    """Streams in an order of their own, so that only their content is compared."""
    return sorted(sorted(b) for b in bins)


@exercise("7.5", "A mean for each text", difficulty=2, minutes=10)
def mean_pool(answer):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 1, 3])
    cu_seqlens = reference.cumulative_lengths(lengths)
    x = torch.randn(8, 3, generator=generator)  # (N, C)
    given = x.clone()
    out = answer(x, cu_seqlens)
    expect(torch.equal(given, x), "Does your function write into `x`? It should leave it alone.")
    shape = tuple(getattr(out, "shape", ()))
    expect(
        shape not in ((3,), (1, 3)),
        "One vector for each text, or one for all? Three texts give `(3, 3)`: yours is a mean over "
        "the whole stream.",
    )
    expect(
        shape != (3, 1),
        "Over which dimension is the mean? Over the tokens of a text, not over the C numbers of a "
        "token.",
    )
    expect_tensor(out, (3, 3))
    parts = x.split(lengths.tolist())
    sums = torch.stack([p.sum(dim=0) for p in parts])
    bounds = cu_seqlens.tolist()
    late = torch.stack([x[a : b + 1].mean(dim=0) for a, b in zip(bounds, bounds[1:], strict=False)])
    no_cls = torch.stack([p[1:].sum(dim=0) / max(len(p) - 1, 1) for p in parts])
    expect_close(
        out,
        sums / lengths[:, None],
        [
            (sums, "A sum or a mean? Divide by the number of tokens of each text."),
            (
                sums / 4,
                "By which length do you divide? Yours takes the longest one for all: in a padded "
                "batch that would be the mean over padding too.",
            ),
            (sums / 8, "By which length do you divide? By that of the text, not of the stream."),
            (
                sums / (lengths[:, None] + 1),
                "By which length do you divide? Yours is one too many for each text.",
            ),
            (
                x[cu_seqlens[:-1].long()],
                "Is this the mean, or [CLS]? You took the first token of each text.",
            ),
            (
                late,
                "Where does a text end? A bound is the first token *after* it: yours takes one "
                "token of the next text along.",
            ),
            (no_cls, "Does the first token count? Yours leaves [CLS] out of the mean."),
            (
                torch.stack([p.amax(dim=0) for p in parts]),
                "Mean or maximum? Yours takes the largest of each number.",
            ),
            (
                x.mean(dim=0).expand(3, 3),
                "Whose mean is it? Yours gives every text the mean of the whole stream.",
            ),
        ],
        "Compute the second text by hand: it has a single token, so its mean is that token.",
    )
    lengths = torch.tensor([1, 70, 2, 2, 9])
    x = torch.randn(84, 5, generator=generator, requires_grad=True)
    out = answer(x, reference.cumulative_lengths(lengths))
    right = torch.stack([p.mean(dim=0) for p in x.split(lengths.tolist())])
    expect(
        out.shape == right.shape and torch.allclose(out, right, atol=1e-5),
        "Right for three texts, wrong for five. Is a number written into your code?",
    )
    expect(
        out.requires_grad,
        "Can a gradient find its way back? Your mean is cut off from the stream, so a model could "
        "not learn through it.",
    )
    half = answer(x.detach().bfloat16(), reference.cumulative_lengths(lengths))
    expect(
        half.dtype == torch.bfloat16,
        f"Which dtype comes out? That of the vectors: given `bfloat16`, yours is `{half.dtype}`.",
    )
    return "The mean of every text, and no padding to leave out of it."


ROWS = {  # three texts of 5, 2 and 4 tokens: ids, mask, labels
    "right": ([1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]),
    "left": ([0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]),
}


def _features(side):
    """Three features, padded to six places on one side."""
    features = []
    for b, mask in enumerate(ROWS[side]):
        ids = [10 * (b + 1) + sum(mask[: i + 1]) if real else 0 for i, real in enumerate(mask)]
        labels = [100 + i if i % 2 else -100 for i in ids]  # 1st, 3rd, … token of a text
        features.append({"input_ids": ids, "attention_mask": list(mask), "labels": labels})
    return features


@exercise("7.6", "A collator of your own", difficulty=3, minutes=15)
def collate(answer):
    for side in ROWS:
        features = _features(side)
        out = answer(features)
        expect(
            features == _features(side),
            "Does your collator change the features? A data loader hands out the same ones again.",
        )
        _expect_stream(out, features, side)
    return _trains_like_padded(answer)


def _expect_stream(out, features, side):
    names = ("input_ids", "cu_seqlens", "labels")
    expect(isinstance(out, dict), f"A dict is asked for; yours is a `{type(out).__name__}`.")
    missing = [name for name in names if name not in out]
    expect(not missing, f"Which key is missing? The model also needs `{'`, `'.join(missing)}`.")
    for name in names:
        expect(
            isinstance(out[name], torch.Tensor),
            f"Is `{name}` a tensor? Yours is a `{type(out[name]).__name__}`.",
        )
    ids, bounds, labels = (out[name] for name in names)
    texts = reference.FlatteningCollator()(features)
    right, lengths = texts["input_ids"], texts["cu_seqlens"].diff().tolist()
    full = sum(len(feature["input_ids"]) for feature in features)
    expect(
        ids.shape != (1, len(right)),
        "One row, or a batch of one row? A stream of ids is `(N,)`; yours is `(1, N)`.",
    )
    expect(
        ids.numel() != full,
        "Is the padding gone? Your stream has all the places of the features. `attention_mask` "
        "says which are real.",
    )
    in_front = [f["input_ids"][:n] for f, n in zip(features, lengths, strict=True)]
    expect(
        torch.equal(ids, right) or ids.tolist() != sum(in_front, []),
        f"Where in a feature are the real tokens? Here the padding is on the {side}, and yours "
        "takes the first ones: ask the mask.",
    )
    counted = [
        i for f in features for i, y in zip(f["input_ids"], f["labels"], strict=True) if y > 0
    ]
    expect(
        ids.tolist() != counted,
        "Is a token without a label padding? The model has to read it all the same: ask "
        "`attention_mask`, not `labels`.",
    )
    expect(
        torch.equal(ids, right) or ids.sort()[0].tolist() != right.sort()[0].tolist(),
        "In which order do texts and tokens come? As they are given; yours have changed places.",
    )
    expect(
        torch.equal(ids, right),
        f"With the padding on the {side}, the stream is {right.tolist()}; yours is {ids.tolist()}.",
    )
    expect(
        bounds.tolist() != [6, 12, 18] and bounds.tolist() != [0, 6, 12, 18],
        "Whose lengths are in your bounds? Those of the padded rows: count real tokens only.",
    )
    expect(
        bounds.tolist() == texts["cu_seqlens"].tolist(),
        f"Texts of {', '.join(map(str, lengths))} tokens: which bounds? "
        f"{texts['cu_seqlens'].tolist()}; yours are {bounds.tolist()}.",
    )
    _expect_labels(labels, texts, lengths)


def _expect_labels(labels, texts, lengths):
    right = texts["labels"]
    expect(
        labels.shape == right.shape,
        f"Is there a label for each token of the stream? {len(right)} tokens, and yours have the "
        f"shape `{tuple(labels.shape)}`. Cut them with the same mask as the ids.",
    )
    first_gone = right.clone()
    first_gone[texts["cu_seqlens"][:-1].long()] = -100
    shifted = torch.cat((right[1:], right.new_tensor([-100])))
    mistakes = [
        (
            first_gone,
            "Where is the label of each first token? Yours is overwritten by −100. A decoder "
            "needs that, since it predicts from the token before; an encoder loses a label.",
        ),
        (
            texts["input_ids"],
            "Are the labels the ids? You return the ids a second time: then every token counts.",
        ),
        (
            shifted,
            "Does a label stand beside its own token? Yours are shifted by one, as for a decoder.",
        ),
        (
            right.clamp_min(0),
            "What stands where no label counts? −100. With 0, the loss asks for token 0 there.",
        ),
    ]
    for wrong, hint in mistakes:
        expect(not torch.equal(labels, wrong), hint)
    expect(
        torch.equal(labels, right),
        f"The labels of texts of {', '.join(map(str, lengths))} tokens are {right.tolist()}; "
        f"yours are {labels.tolist()}.",
    )


def _trains_like_padded(answer) -> str:
    """Loss and gradients of the embedded checkpoint: the stream against the padded batch."""
    from modernbert_mini import ModernBertForMaskedLM

    model = ModernBertForMaskedLM.from_pretrained("mini", attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, 8000, (3, 50), generator=generator)  # (B, L)
    mask = (torch.arange(50) < torch.tensor([50, 9, 31])[:, None]).long()
    labels = torch.where((torch.rand(3, 50, generator=generator) < 0.3) & mask.bool(), ids, -100)
    features = [
        {"input_ids": i, "attention_mask": m, "labels": y}
        for i, m, y in zip(ids.tolist(), mask.tolist(), labels.tolist(), strict=True)
    ]
    batches = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels},
        {name: answer(features)[name] for name in ("input_ids", "cu_seqlens", "labels")},
    ]
    losses, gradients = [], []
    for batch in batches:
        loss = model(**batch).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        losses.append(loss.item())
    gap = max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))
    if not (abs(losses[0] - losses[1]) < 1e-4 and gap < 1e-4):
        raise Hint(
            f"Right for three short texts, but the loss of `mini` is {losses[1]:.4f} on your "
            f"stream and {losses[0]:.4f} on the padded batch. Is a number written into your code?"
        )
    return (
        f"`mini` learns the same from {len(batches[1]['input_ids'])} tokens as from "
        f"{mask.numel()} places: loss {losses[1]:.4f}, no gradient further apart than {gap:.0e}."
    )
