"""Checks of chapter 6, alternating attention."""

import torch

from modernbert_mini import alternating_attention as reference
from modernbert_mini.checks._machinery import Hint, exercise, expect, expect_tensor

GLOBAL, LOCAL = "full_attention", "sliding_attention"


def _marks(pattern: list[str]) -> str:
    """A pattern in letters: G for a global layer, l for a local one."""
    return " ".join("G" if kind == GLOBAL else "l" for kind in pattern)


@exercise("6.1", "Layer pattern", difficulty=1, minutes=5)
def layer_pattern(answer):
    num_layers, every_n = 8, 3
    out = answer(num_layers, every_n)
    expect(
        isinstance(out, list | tuple),
        "Is your result a list of names, one for each layer? "
        f"The check got a value of type `{type(out).__name__}`.",
    )
    strange = [kind for kind in out if kind not in (GLOBAL, LOCAL)]
    expect(
        not strange,
        f"Which two names do the layers have? `{strange[:1]}` is neither "
        f'`"{GLOBAL}"` nor `"{LOCAL}"`.',
    )
    expect(
        len(out) == num_layers,
        f"Is there one name for each layer? {num_layers} layers, {len(out)} names.",
    )
    out, layers = list(out), range(num_layers)
    right = reference.layer_pattern(num_layers, every_n)

    def pattern(is_global):
        return [GLOBAL if is_global(i) else LOCAL for i in layers]

    mistakes = [
        (
            pattern(lambda i: i % every_n),
            "Which kind is the rare one? `i % n` is 0, and so false, at layers 0, n, 2n, …: "
            "those are the global ones.",
        ),
        (
            pattern(lambda i: (i + 1) % every_n == 0),
            "Where does the pattern start? Yours has the global layer at the end of each group. "
            "ModernBERT has it at the start: layer 0 is global.",
        ),
        (
            pattern(lambda i: i % every_n == 1),
            "Does counting start at 0 or at 1? Your first global layer is number 1.",
        ),
        (
            pattern(lambda i: i == 0),
            "What happens after the first group? Only your layer 0 is global; layers n, 2n, … "
            "are too.",
        ),
        (
            pattern(lambda i: i % every_n == 0 or i == num_layers - 1),
            "Does anything force the last layer to be global? Published models end on a global "
            "layer because of their number of layers; the rule itself does not ask for it.",
        ),
        (
            pattern(lambda i: i % (every_n + 1) == 0),
            "How many local layers stand between two global ones? Every n-th layer is global, so "
            "n − 1 of them, not n.",
        ),
    ]
    for wrong, hint in mistakes:
        expect(out != wrong, hint)
    expect(
        out == right,
        f"For 8 layers with every 3rd one global, your pattern is `{_marks(out)}`. "
        "Write the numbers 0 to 7 above it: at which numbers should a G stand?",
    )
    expect(
        list(answer(5, 2)) == reference.layer_pattern(5, 2),
        "Does `every_n` reach your code? With every 2nd layer global you give "
        f"`{_marks(list(answer(5, 2)))}`.",
    )
    expect(
        list(answer(3, 1)) == [GLOBAL] * 3,
        "What if every layer is global, `every_n=1`? Then there is no local layer at all.",
    )
    return f"22 layers, as in ModernBERT-base: `{_marks(answer(22, 3))}`."


def _distance(length: int) -> torch.Tensor:
    """Key position minus query position: (L, L)."""
    position = torch.arange(length)
    return position[None, :] - position[:, None]


@exercise("6.2", "The window, in the real model", difficulty=2, minutes=10)
def window_mask(answer):
    length, w = 12, 3
    out = answer(length, w)
    expect(
        not isinstance(out, torch.Tensor) or out.dtype == torch.bool,
        "Is your mask made of True and False? "
        f"A comparison gives bool; yours is `{getattr(out, 'dtype', None)}`, and attention would "
        "*add* it to the scores.",
    )
    expect_tensor(out, (length, length), torch.bool, "your mask")
    d = _distance(length)
    right = d.abs() <= w
    ring = torch.minimum(d.abs(), length - d.abs()) <= w
    block = torch.arange(length) // (2 * w + 1)
    mistakes = [
        (
            ~right,
            "What does True mean? Here it means *may be seen*. Yours is true where the key is "
            "too far away.",
        ),
        (
            d.abs() < w,
            f"Are both ends of the window in it? A key exactly {w} away is seen: `<=`, not `<`. "
            "With W = 64 yours has 127 keys and not 129.",
        ),
        (
            (d >= -w) & (d < w),
            f"Is the window the same on both sides? Yours has {w} keys on the left and {w - 1} on "
            "the right: a Python range leaves its end out.",
        ),
        (
            (d > -w) & (d <= w),
            f"Is the window the same on both sides? Yours has {w - 1} keys on the left and {w} on "
            "the right.",
        ),
        (
            (d <= 0) & (d >= -w),
            "May a token look to its right? This is an encoder: the window has two sides. Yours "
            "sees the past alone.",
        ),
        (
            (d >= 0) & (d <= w),
            "May a token look to its left? Yours sees itself and what follows.",
        ),
        (
            d <= w,
            "How far back does your window reach? A distance has no sign: without `abs`, every "
            "key on the left passes.",
        ),
        (
            d >= -w,
            "How far ahead does your window reach? A distance has no sign: without `abs`, every "
            "key on the right passes.",
        ),
        (
            d.abs() <= w // 2,
            "Is `half_window` halved already? It is W, the number of keys on *each* side. Yours "
            "is halved once more.",
        ),
        (
            d.abs() <= 2 * w,
            "Is `half_window` the whole width? Yours sees 2·W keys on each side.",
        ),
        (
            right & (d != 0),
            "Does a token see itself? At distance 0 your mask is False.",
        ),
        (
            ring,
            "Is the text a ring? Your first token sees the last ones: at the ends the window is "
            "cut off, it does not go round.",
        ),
        (
            block[:, None] == block[None, :],
            "Does the window move along with the token? Yours cuts the text into blocks, and two "
            "neighbours on either side of a cut do not see each other.",
        ),
    ]
    for wrong, hint in mistakes:
        expect(not torch.equal(out, wrong), hint)
    row = "".join("#" if seen else "." for seen in out[5].tolist())
    expect(
        torch.equal(out, right),
        f"Row 5 of your mask, for 12 tokens and W = 3, is `{row}`. It should have a # at the "
        "places 2 to 8. Which of them are off?",
    )
    for other, v in ((7, 0), (5, 9), (150, 64)):
        mask = answer(other, v)
        same = mask.shape == (other, other) and torch.equal(mask, _distance(other).abs() <= v)
        expect(
            same,
            f"Right for 12 tokens and W = 3, wrong for {other} tokens and W = {v}. Is a size "
            "written into your code?",
        )
    return _swap_into_mini(answer)


def _swap_into_mini(answer) -> str:
    """Run the embedded checkpoint on a text longer than its window, with the learner's mask."""
    from modernbert_mini import ModernBertForMaskedLM, swap

    model = ModernBertForMaskedLM.from_pretrained("mini").eval()
    ids = torch.arange(100, 320)[None]  # (B, L)
    calls = 0

    def counted(length, half_window):
        nonlocal calls
        calls += 1
        return answer(length, half_window)

    with torch.no_grad():
        expected = model(ids).logits
        logits = swap(model, "window_mask", counted)(ids).logits
    difference = float((logits - expected).abs().max())
    if not difference < 1e-4:
        raise Hint(
            f"Your mask passes alone, but in `mini` the logits move by {difference:.1e}. Does it "
            "remember something from an earlier call?"
        )
    local = model.config.layer_types.count(LOCAL)
    return (
        f"`mini` read {ids.shape[1]} tokens through your window: called {calls} time for "
        f"{local} local layers, and no logit moved by more than {difference:.0e}."
    )


@exercise("6.3", "How far does a token hear?", difficulty=2, minutes=10)
def reach(answer):
    w, length = 4, 100
    local = [LOCAL] * 3

    def ask(kinds, position, half_window=w):
        given = list(kinds)
        value = answer(given, half_window, length, position)
        expect(given == list(kinds), "Does your function change the list it was given?")
        expect(
            isinstance(value, int) and not isinstance(value, bool),
            "Is the answer a whole number of tokens? "
            f"The check got a value of type `{type(value).__name__}`.",
        )
        return value

    middle = ask(local, 50)
    k = len(local)
    said = {
        2 * w + 1: "What do the layers add to each other? Yours is the width of one window. The "
        "second layer hears through the ends of the first.",
        k * w: "How many sides does a window have, and does a token hear itself? Yours counts "
        "one side.",
        k * w + 1: "How many sides does a window have? Yours counts one.",
        2 * k * w: "Does a token hear itself? Yours counts its neighbours alone.",
        k * (2 * w + 1): "Is the token itself counted once, or once in every layer? The windows "
        "of neighbouring layers meet at the same token.",
        (2 * w + 1) ** k: "Do windows multiply or add up? Two neighbours hear nearly the same "
        "tokens: each layer adds W tokens on either side, no more.",
        2 * (k - 1) * w + 1: "Does the first layer count? After one layer a token hears W on "
        "either side, not only itself.",
        2 * (k + 1) * w + 1: "How many layers are there? You count one too many.",
        length: "Is a layer of kind `sliding_attention` local or global? Yours treats it as "
        "global.",
    }
    expect(
        middle == 2 * k * w + 1,
        said.get(
            middle,
            f"Three local layers with W = {w}: layer 1 "
            f"brings in W tokens on either side. What does layer 2 add? You say {middle}.",
        ),
    )
    expect(
        ask([LOCAL], 50) == 2 * w + 1,
        "Right for three local layers, wrong for one. Is a number written into your code?",
    )
    edge = ask(local, 0)
    expect(
        edge != middle,
        "What lies to the left of the first token? Nothing: at the ends of the text the reach is "
        "cut off.",
    )
    expect(
        edge == k * w + 1,
        f"The first token hears itself and {k * w} tokens to its right. You say {edge}.",
    )
    near_end = ask(local, 95)
    expect(
        near_end == k * w + 1 + 4,
        "And at the other end? The token at 95 of 0 … 99 has four tokens to its right. "
        f"You say {near_end}; it hears {k * w + 1 + 4}.",
    )
    expect(
        ask(local, 50, 60) == length,
        "May a token hear more tokens than there are? With W = 60 the text ends before the "
        "reach does.",
    )
    first, last = ask([GLOBAL, LOCAL, LOCAL], 50), ask([LOCAL, LOCAL, GLOBAL], 50)
    expect(
        first not in (2 * k * w + 1, 2 * (k - 1) * w + 1),
        "What does one global layer do? Through it, everything reaches everywhere.",
    )
    expect(
        first == length and last == length,
        "Does it matter where the global layer stands? Local layers before it and after it take "
        "nothing away: one is enough, anywhere.",
    )
    expect(
        ask([GLOBAL] * 2, 50) == length,
        "What if all layers are global? Then every token hears all tokens.",
    )
    base = answer([LOCAL] * 22, 64, 8192, 4096)
    return (
        f"22 local layers with W = 64 would hear {base:,} of 8,192 tokens. One global layer: all."
    )


@exercise("6.4", "A mask for a packed stream", difficulty=2, minutes=12)
def packed_mask(answer):
    w = 2
    cu_seqlens = torch.tensor([0, 4, 5, 11])
    n = 11
    given = cu_seqlens.clone()
    out = answer(given, w)
    expect(
        torch.equal(given, cu_seqlens),
        "Does your function change `cu_seqlens`? The caller needs it for the next layer.",
    )
    expect_tensor(out, (n, n), torch.bool, "your mask")
    window = _distance(n).abs() <= w
    inside = reference.packed_mask(cu_seqlens, None)
    right = inside & window
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    place = torch.arange(n) - starts
    lengths = cu_seqlens.diff()
    late = torch.arange(3).repeat_interleave(lengths).roll(1)
    late[0] = 0
    early = torch.arange(3).repeat_interleave(lengths).roll(-1)
    early[-1] = 2
    mistakes = [
        (~right, "What does True mean? *May be seen*. Yours is the other way round."),
        (
            window,
            "Where do the documents end? Token 3 and token 4 are neighbours in the stream, and "
            "belong to different documents: they must not see each other.",
        ),
        (
            inside,
            "And the window? Your mask shows every token of the same document. Here W = 2.",
        ),
        (
            (place[:, None] - place[None, :]).abs() <= w,
            "What do your places say about two documents? The third token of one and the third of "
            "another have the same place. Compare the documents too.",
        ),
        (
            (late[:, None] == late[None, :]) & window,
            "To which document does the token at a boundary belong? `cu_seqlens[s]` is the *first* "
            "token of document s. Yours gives it to the document before.",
        ),
        (
            (early[:, None] == early[None, :]) & window,
            "To which document does the token before a boundary belong? It is the last one of its "
            "own document. Yours gives it to the next.",
        ),
        (
            right & (_distance(n) <= 0),
            "May a token look to its right? This is an encoder; your mask is causal.",
        ),
        (
            inside & (_distance(n).abs() < w),
            "Are both ends of the window in it? A key exactly W away is seen.",
        ),
        (inside | window, "*Or* or *and*? A key must be near **and** in the same document."),
    ]
    for wrong, hint in mistakes:
        expect(not torch.equal(out, wrong), hint)
    row = "".join("#" if seen else "." for seen in out[5].tolist())
    expect(
        torch.equal(out, right),
        "The documents are tokens 0–3, 4 and 5–10. Token 5 with W = 2 sees `.....###...`; your row "
        f"is `{row}`.",
    )
    try:
        whole = answer(cu_seqlens, None)
    except (TypeError, RuntimeError) as error:
        raise Hint(
            "What does `half_window=None` mean? A global layer: no window, documents only. Yours "
            f"stops with a {type(error).__name__}."
        ) from None
    expect(
        isinstance(whole, torch.Tensor) and torch.equal(whole, inside),
        "With `half_window=None` the layer is global. It sees its whole document, and still no "
        "other document.",
    )
    other = torch.tensor([0, 2, 3, 8, 9], dtype=torch.int32)
    expect(
        torch.equal(answer(other, 1), reference.packed_mask(other, 1)),
        "Right for three documents, wrong for four (2, 1, 5 and 1 tokens, as int32). Is a number "
        "written into your code?",
    )
    return "Blocks along the diagonal, and in each block a band."


def _near(k: torch.Tensor, size: int) -> torch.Tensor:
    """For each block its keys and those of both neighbours: (H, blocks, 3·size, D)."""
    blocks = -(-k.shape[1] // size)
    padded = k.new_zeros(k.shape[0], (blocks + 2) * size, k.shape[2])
    padded[:, size : size + k.shape[1]] = k
    return torch.stack([padded[:, b * size : (b + 3) * size] for b in range(blocks)], dim=1)


@exercise("6.5", "The keys of a band", difficulty=3, minutes=15)
def near_keys(answer):
    h, n, d, size = 2, 12, 3, 4
    # counted from 1, so that a zero is a fill and nothing else
    k = torch.arange(1.0, 1 + h * n * d).view(h, n, d)
    given = k.clone()
    out = answer(given, size)
    expect(torch.equal(given, k), "Does your function write into `k`? Other layers' work is in it.")
    right = _near(k, size)
    shape = tuple(getattr(out, "shape", ()))
    expect(
        shape != (h, 3, d, 3 * size),
        "Where does `unfold` put the window? At the very end: your last two dimensions are "
        "(D, 3·size) and should be (3·size, D).",
    )
    expect(
        shape != (3, h, 3 * size, d),
        "In which order are the dimensions? Heads first: (H, blocks, 3·size, D).",
    )
    expect(
        shape != (h, 3, 2 * size, d),
        "How many blocks can a window touch? It has two sides: the block before, its own, the one "
        "after.",
    )
    expect(
        shape != (h, 1, 3 * size, d),
        "How far apart do your groups start? Each block gets its own three, so the next group "
        "starts `size` further on, not `3 * size`; and both ends need zeros to reach over.",
    )
    expect_tensor(out, tuple(right.shape))
    before, own, after = right.split(size, dim=2)
    ring = torch.stack([k.roll((1 - b) * size, dims=1)[:, : 3 * size] for b in range(3)], dim=1)
    mistakes = [
        (
            ring,
            "What stands before the first block? Nothing, so zeros. Yours goes round to the end of "
            "the stream.",
        ),
        (
            torch.cat((own, before, after), dim=2),
            "In which order do the three blocks come? As in the stream: before, own, after.",
        ),
        (
            torch.cat((after, own, before), dim=2),
            "In which order do the three blocks come? Yours run backwards.",
        ),
        (
            torch.cat((own, after, torch.cat((after[:, 1:], after[:, -1:] * 0), dim=1)), dim=2),
            "Which block is in the middle? Yours starts at the block itself; it should start one "
            "block earlier. Are the zeros in front missing?",
        ),
        (
            torch.cat((torch.cat((before[:, :1], before[:, :-1]), dim=1), before, own), dim=2),
            "Which block is in the middle? Yours ends at the block itself; it should end one block "
            "later.",
        ),
    ]
    for wrong, hint in mistakes:
        expect(not (out.shape == wrong.shape and torch.equal(out, wrong)), hint)
    expect(
        torch.equal(torch.where(right == 0, right, out), right),
        "Some keys stand at the wrong place. Print `k[0, :, 0]` and your result `[0, :, :, 0]`: "
        "each row should be 12 numbers in the order of the stream.",
    )
    expect(
        torch.equal(out, right),
        "What fills the places before the stream and after it? Zeros: the mask hides them, but "
        "a NaN or infinity would get through.",
    )
    for length in (10, 3):
        short = torch.arange(1.0, 1 + h * length * d).view(h, length, d)
        try:
            result = answer(short, size)
        except (RuntimeError, ValueError, IndexError) as error:
            result = error
        same = isinstance(result, torch.Tensor) and result.shape == _near(short, size).shape
        said = (
            f"shape `{tuple(result.shape)}`"
            if isinstance(result, torch.Tensor)
            else f"a {type(result).__name__}"
        )
        expect(
            same and torch.equal(result, _near(short, size)),
            f"What if the stream is no multiple of the block? {length} tokens in blocks of {size}: "
            f"the last block is filled up with zeros. Yours gives {said}.",
        )
    expect(
        answer(k.bfloat16(), size).dtype == torch.bfloat16,
        "Do the zeros have the dtype of `k`? bfloat16 went in, something else came out.",
    )
    shared = out.untyped_storage().nbytes() < out.numel() * out.element_size()
    return "Each block of queries has its three blocks of keys. " + (
        "They are overlapping views of one tensor: nothing is copied."
        if shared
        else "Yours copies every key three times; `unfold` would give views."
    )


@exercise("6.6", "The bill", difficulty=2, minutes=10)
def pairs(answer):
    w, length = 5, 40

    def count(kinds, half_window=w, tokens=length):
        value = answer(list(kinds), half_window, tokens)
        expect(
            isinstance(value, int) and not isinstance(value, bool),
            "Is the answer a whole number of pairs? "
            f"The check got a value of type `{type(value).__name__}`.",
        )
        return value

    whole = count([GLOBAL])
    expect(
        whole == length**2,
        f"How many pairs has one global layer? Each of {length} queries meets {length} keys, "
        f"itself among them. You count {whole:,}.",
    )
    one = count([LOCAL])
    full, ends = length * (2 * w + 1), w * (w + 1)
    said = {
        full: "What about the first and the last tokens? Their windows are cut off. Yours counts "
        "keys that do not exist.",
        length * 2 * w - ends: "Does a token see itself? Yours counts its neighbours alone.",
        length * 2 * w: "Does a token see itself, and are windows cut off at the ends? Yours "
        "counts 2·W keys for everyone.",
        full - 2 * ends: "How many keys are missing at one end? W + (W − 1) + … + 1 of them, which "
        "is W(W + 1)/2. Yours takes off twice that at each end.",
        full - ends // 2: "How many ends has a text? Yours cuts the windows off at one of them.",
        full - w * w: "How many keys are missing at one end? The first token misses W of them, the "
        "next W − 1, and so on down to 1. Yours takes off a little less.",
        full - w * (w - 1): "How many keys does the very first token miss? W of them. Yours takes "
        "off a little less.",
        length * (w + 1) - ends // 2: "How many sides does the window have? Yours counts one.",
        length**2: "Is a `sliding_attention` layer local? Yours counts all pairs.",
    }
    expect(
        one == full - ends,
        said.get(
            one,
            f"One local layer, {length} tokens, W = {w}: the window mask has "
            f"{full - ends:,} True in it. You count {one:,}.",
        ),
    )
    expect(
        count([GLOBAL, LOCAL, LOCAL]) == whole + 2 * one,
        "Does every layer send its own bill? A global layer and two local ones cost the sum of "
        "the three.",
    )
    for tokens in (w + 1, 3):
        short = count([LOCAL], tokens=tokens)
        expect(
            short == tokens**2,
            f"What if the text is shorter than the window? With {tokens} tokens and W = {w}, every "
            f"token sees every token: {tokens**2} pairs. You count {short}.",
        )
    expect(
        count([LOCAL], 64, 500) == int(reference.window_mask(500, 64).sum()),
        "Right for W = 5, wrong for W = 64 and 500 tokens. Is a number written into your code?",
    )
    base = reference.layer_pattern(22, 3)
    share = answer(base, 64, 8192) / answer([GLOBAL] * 22, 64, 8192)
    return f"ModernBERT-base at 8,192 tokens pays {share:.0%} of what 22 global layers would."
