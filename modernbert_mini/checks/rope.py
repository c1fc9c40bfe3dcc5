"""Checks of chapter 3, rotary position embeddings."""

from unittest.mock import patch

import torch

from modernbert_mini import rope
from modernbert_mini.checks._machinery import Hint, exercise, expect, expect_close, expect_tensor

D = 8


def _sample(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _interleave(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack((a, b), dim=-1).flatten(-2)


@exercise("3.1", "Rotate half", difficulty=1, minutes=5)
def rotate_half(answer):
    x = _sample(2, 4, D)
    given = x.clone()
    out = answer(given)
    expect_tensor(out, x.shape)
    expect(
        torch.equal(given, x),
        "Does your function change its argument? The caller still needs `x` for `x * cos`: "
        "make a new tensor instead of writing into the old one.",
    )
    (a, b), (even, odd) = x.chunk(2, dim=-1), (x[..., ::2], x[..., 1::2])
    neighbours = (
        "Is dimension i paired with i + D/2, or with its neighbour? "
        "Your numbers pair 0 with 1, 2 with 3, …: that is the interleaved layout."
    )
    first = x.chunk(2, dim=0)
    middle = x.chunk(2, dim=1)
    other_dim = "Along which dimension do you cut? The pairs lie in the last one, `dim=-1`."
    expect_close(
        out,
        rope.rotate_half(x),
        [
            (_interleave(-odd, even), neighbours),
            (_interleave(odd, -even), neighbours),
            (
                torch.cat((b, -a), dim=-1),
                "Which half gets the minus? (a, b) becomes (−b, a): a quarter turn to the left. "
                "Yours turns to the right.",
            ),
            (
                torch.cat((b, a), dim=-1),
                "Where is the minus? Swapping the halves is a mirror: done twice it gives `x`. "
                "A quarter turn done twice gives −x.",
            ),
            (
                torch.cat((-a, b), dim=-1),
                "Do the halves change places? Yours stay where they were.",
            ),
            (
                torch.cat((a, -b), dim=-1),
                "Do the halves change places? Yours stay where they were.",
            ),
            (x, "Does anything turn? Your result is `x` itself."),
            (torch.cat((-first[1], first[0]), dim=0), other_dim),
            (torch.cat((-middle[1], middle[0]), dim=1), other_dim),
        ],
        "The shape is right, the numbers are not. Print `x[0, 0]` beside your result: "
        "where does the first number of the second half go, and with which sign?",
    )
    small = torch.arange(6.0)
    small_out = answer(small)
    expect(
        small_out.shape == small.shape and torch.equal(small_out, rope.rotate_half(small)),
        f"Right for D = {D}, wrong for one vector with D = 6. Is a size written into your code?",
    )
    expect(
        answer(x.bfloat16()).dtype == torch.bfloat16,
        "Does the result keep the dtype of `x`? bfloat16 went in, something else came out.",
    )
    return "A quarter turn of every pair. Do it twice and you have −x; four times, and x is back."


@exercise("3.2", "Frequencies", difficulty=1, minutes=8)
def inverse_frequencies(answer):
    theta = 10_000.0
    out = answer(D, theta)
    expect(
        not isinstance(out, torch.Tensor) or out.shape != (D,),
        f"One frequency per dimension, or per pair? D = {D} dimensions make {D // 2} pairs.",
    )
    expect_tensor(out, (D // 2,), torch.float32)
    i = torch.arange(D // 2, dtype=torch.float64)
    ln = torch.tensor(theta, dtype=torch.float64).log()
    missing = "Where does theta enter? In `exp` form it is exp(−2i/D · ln θ), with the natural log."
    expect_close(
        out,
        rope.inverse_frequencies(D, theta),
        [
            (
                theta ** (2 * i / D),
                "Do your frequencies grow? The first pair is the fast one: is the minus in the "
                "exponent, or the `1 /`, missing?",
            ),
            (
                theta ** (-i / D),
                "Is the exponent 2i/D or i/D? Yours reaches only half way down: the last pair "
                "should turn almost θ times slower than the first.",
            ),
            (
                theta ** (-2 * i),
                "Is the exponent divided by D? Yours falls too fast: the last pairs stand still.",
            ),
            (
                theta ** (-i / (D / 2 - 1)),
                "Where does the exponent stop? The last one is (D − 2)/D, just short of 1. "
                "`linspace(0, 1)` goes one step too far.",
            ),
            (
                theta ** (-2 * (i + 1) / D),
                "How far does pair 0 turn per position? By 1 radian, so i starts at 0, not at 1.",
            ),
            (torch.exp(-2 * i / D), missing),
            (torch.exp(-2 * i / D * ln / torch.tensor(10.0).log()), missing),
            (torch.exp(-2 * i / D * ln / torch.tensor(2.0).log()), missing),
            (
                2 * torch.pi * theta ** (2 * i / D),
                "Radians per token, or tokens per turn? These are wavelengths, 2π / ω.",
            ),
            (
                2 * torch.pi * theta ** (-2 * i / D),
                "Where does the 2π come from? Pair 0 turns by 1 radian per position, not by a "
                "full circle.",
            ),
            (
                rope.inverse_frequencies(D, theta).flip(0),
                "In which order? Pair 0 comes first and turns fastest.",
            ),
        ],
        "Compare with the formula for D = 8, θ = 10000: it gives 1, 0.1, 0.01, 0.001. "
        "Which of the four do you get, and where does the first wrong one come from?",
    )
    expect_close(
        answer(64, 160_000.0),
        rope.inverse_frequencies(64, 160_000.0),
        [
            (
                rope.inverse_frequencies(64, theta),
                "Does `theta` reach your formula? 160,000 gives the numbers of 10,000.",
            )
        ],
        f"Right for D = {D}, wrong for D = 64. Is a size written into your code?",
    )
    return "Fast hands and slow hands: 1 radian per token down to almost 1/θ."


@exercise("3.3", "The table", difficulty=2, minutes=10)
def rotary_table(answer):
    inv_freq = rope.inverse_frequencies(D, 10_000.0)
    positions = torch.tensor([0, 1, 5, 1000])
    both = answer(positions, inv_freq)
    expect(
        isinstance(both, tuple | list) and len(both) == 2,
        "Does your function return two tensors, the cosines and the sines: `return cos, sin`?",
    )
    cos, sin = both
    half = (len(positions), D // 2)
    expect(
        getattr(cos, "shape", None) != half,
        f"Is the table as wide as the vectors? There are D/2 = {D // 2} angles; both members of a "
        "pair need theirs, so put the angles beside themselves.",
    )
    expect(
        getattr(cos, "shape", None) != (D, len(positions)),
        "Which comes first, positions or dimensions? Your table is on its side.",
    )
    expect_tensor(cos, (len(positions), D), torch.float32, "cos")
    expect_tensor(sin, (len(positions), D), torch.float32, "sin")
    right_cos, right_sin = rope.rotary_table(positions, inv_freq)
    expect(
        not (torch.allclose(cos, right_sin) and torch.allclose(sin, right_cos)),
        "In which order do you return them? At position 0 nothing turns: cos is 1 and sin is 0.",
    )
    angles = positions[:, None] * inv_freq
    doubled = angles.repeat_interleave(2, dim=-1)

    def table(*more):
        return rope.rotary_table(*more, inv_freq)[0]

    expect_close(
        cos,
        right_cos,
        [
            (
                doubled.cos(),
                "Are the angles laid out a b c d a b c d, or a a b b c c d d? Dimension i is "
                "paired with i + D/2, so it is the whole row that repeats.",
            ),
            (
                table(torch.arange(len(positions))),
                "Do you use the positions you were given? Your rows are those of 0, 1, 2, 3.",
            ),
            (
                table(positions + 1),
                "Does counting start at 0 or at 1? At position 0 nothing turns, so cos is 1.",
            ),
            (
                torch.cat((angles, angles), dim=-1).deg2rad().cos(),
                "Degrees or radians? `cos` takes radians, and so do the frequencies.",
            ),
            (
                torch.cat((angles, angles), dim=-1),
                "Are these the angles or their cosines?",
            ),
        ],
        "Look at the row of position 1: it should hold the cosines of the frequencies, twice over.",
    )
    expect_close(
        sin,
        right_sin,
        [(-right_sin, "Which way do you turn? Your sines have the other sign.")],
        "The cosines are right, the sines are not. Do both come from the same angles?",
    )
    far = torch.tensor([8001])
    expect(
        (answer(far, inv_freq)[0] - table(far)).abs().max() < 1e-3,
        "Near 0 your table is right, at position 8,001 it is not. Does anything on the way to the "
        "angle go through half precision? bfloat16 cannot tell 8,001 from 8,000.",
    )
    batch = torch.arange(6).view(2, 3)
    try:
        shape = tuple(answer(batch, inv_freq)[0].shape)
    except (RuntimeError, ValueError, IndexError) as error:
        shape = type(error).__name__
    expect(
        shape == (2, 3, D),
        f"Does it also take a batch of positions, (B, L)? Expected `{(2, 3, D)}`, got `{shape}`. "
        "`positions[..., None]` adds the dimension that the frequencies fill.",
    )
    return "One row per position, one column per dimension, both halves the same."


@exercise("3.4", "Turn one side only", difficulty=2, minutes=8)
def relative_score(answer):
    inv_freq = rope.inverse_frequencies(D, 10_000.0)
    q, k = _sample(2, D)

    def turned(x, position):
        return rope.apply_rotary(x, *rope.rotary_table(torch.tensor(position), inv_freq))

    m, n = 11, 14
    out = torch.as_tensor(answer(q, k, n - m, inv_freq))
    expect(
        out.numel() != D,
        "Is the score one number? Yours still has one per dimension: sum the products.",
    )
    expect(out.numel() == 1, f"Is the score one number? Yours has shape `{tuple(out.shape)}`.")
    right = turned(q, m) @ turned(k, n)
    expect_close(
        out.reshape(()),
        right,
        [
            (
                turned(q, n) @ turned(k, m),
                "Which side turns, and which way? The key stands `distance` further right, so the "
                "key turns by +distance. Turning the query instead needs −distance.",
            ),
            (
                q @ k,
                "Did anything turn, or did both turn by the same angle? Equal turns cancel: this "
                "is the score of q and k without positions.",
            ),
            (
                right * D**-0.5,
                "Is this the plain score? Dividing by √D comes later, in attention.",
            ),
            (
                turned(q, 0) @ turned(k, 2 * (n - m)),
                "Is the distance counted twice? One side turns by it, the other not at all.",
            ),
        ],
        "Expected the score of a query at position 11 and a key at 14. Turn `k` with "
        "`apply_rotary` by the table of position `distance`, then take the dot product with `q`.",
    )
    expect_close(
        torch.as_tensor(answer(q, k, -3, inv_freq)).reshape(()),
        turned(q, 14) @ turned(k, 11),
        [
            (
                right,
                "Does the sign of the distance count? A key 3 to the left is not 3 to the right.",
            )
        ],
        "Right for a key on the right, wrong for one on the left, at distance −3.",
    )
    return "One turn instead of two: the score knows the distance and nothing else."


@exercise("3.5", "Your own rotation in the real model", difficulty=2, minutes=12)
def apply_rotary(answer):
    positions = torch.arange(5)
    cos, sin = rope.rotary_table(positions, rope.inverse_frequencies(D, 10_000.0))
    x = _sample(2, 3, 5, D)
    given = x.clone()
    out = answer(given, cos, sin)
    expect_tensor(out, x.shape)
    expect(
        torch.equal(given, x),
        "Does your function write into `x`? `x += …` and `x[…] = …` change the caller's tensor.",
    )
    turned = rope.rotate_half(x)
    neighbours = _interleave(-x[..., 1::2], x[..., ::2])
    expect_close(
        out,
        rope.apply_rotary(x, cos, sin),
        [
            (
                x * cos + x * sin,
                "Which vector does `sin` multiply? Not `x` again: its quarter turn.",
            ),
            (
                x * cos - turned * sin,
                "Which way do you turn? Later positions turn counter-clockwise: "
                "`+`, not `−`, before the sine.",
            ),
            (
                x * sin + turned * cos,
                "Which of the two goes with `x`? At position 0, cos is 1 and `x` must stay.",
            ),
            (
                x * cos + neighbours * sin,
                "Does your quarter turn pair i with i + D/2, or with i + 1? The table repeats by "
                "halves, so the pairs must too.",
            ),
            (x * cos, "Half of it is there. What does the sine multiply?"),
            (x, "Does anything turn? Your result is `x` itself."),
        ],
        "Check against one pair by hand: (a, b) at angle φ becomes "
        "(a cos φ − b sin φ, b cos φ + a sin φ).",
    )
    low = x.bfloat16()
    low_out = answer(low, cos, sin)
    expect(
        low_out.dtype == torch.bfloat16,
        "Which dtype comes back? bfloat16 went in and must come out: the attention that follows "
        f"expects its own dtype, and got `{low_out.dtype}`.",
    )
    expect(
        torch.equal(low_out, rope.apply_rotary(low, cos, sin)),
        "In which dtype do you multiply? Widen `x` to float32 first and round once, at the end. "
        "Your bfloat16 result was rounded on the way.",
    )
    return _swap_into_mini(answer)


def _swap_into_mini(answer) -> str:
    """Run the embedded checkpoint with the learner's rotation in place of its own."""
    from modernbert_mini import ModernBertForMaskedLM, attention

    model = ModernBertForMaskedLM.from_pretrained("mini").eval()
    ids = torch.arange(100, 180)[None]  # (B, L)
    calls = 0

    def counted(x, cos, sin):
        nonlocal calls
        calls += 1
        return answer(x, cos, sin)

    with torch.no_grad():
        expected = model(ids).logits
        with patch.object(attention, "apply_rotary", counted):
            logits = model(ids).logits
    difference = float((logits - expected).abs().max())
    if not difference < 1e-4:
        raise Hint(
            f"Your function passes alone, but in `mini` the logits move by {difference:.1e}. "
            "Does it remember something from an earlier call?"
        )
    return (
        f"`mini` ran on your function: {calls} calls for {model.config.num_hidden_layers} layers, "
        f"and no logit moved by more than {difference:.0e}."
    )


@exercise("3.6", "Stretch the positions", difficulty=3, minutes=10)
def stretched_frequencies(answer):
    theta, trained, wanted = 10_000.0, 1024, 1536
    plain = rope.inverse_frequencies(D, theta)
    out = answer(D, theta, trained, wanted)
    expect_tensor(out, (D // 2,))
    factor = wanted / trained
    expect_close(
        out,
        plain / factor,
        [
            (
                plain * factor,
                "Faster or slower? Your hands turn faster, and leave the trained angles sooner.",
            ),
            (
                plain,
                "Does anything change? With trained = 1024 and wanted = 1536 the factor is 1.5: "
                "is it rounded down to 1 by `//`, or left out?",
            ),
            (
                plain / 2,
                "Is the factor rounded up? 1536 / 1024 is 1.5; a whole number wastes resolution.",
            ),
            (
                rope.inverse_frequencies(D, theta * factor),
                "Did you change the base? That is the other way, which leaves the fastest pair "
                "as it was. Interpolation slows every pair by the same factor.",
            ),
            (
                rope.inverse_frequencies(D, theta / factor),
                "Is it theta that you divide? It is the frequencies, all by the same factor.",
            ),
        ],
        "Each pair should reach at position 1,536 the angle that it had at 1,024 in training.",
    )
    expect_close(
        answer(D, theta, trained, 256),
        plain,
        [
            (
                plain * 4,
                "What if the text is shorter than in training? Then nothing needs stretching: "
                "the factor never goes below 1.",
            )
        ],
        "For a text shorter than those of training, the frequencies should stay as they were.",
    )
    return "Position `wanted` now turns as far as position `trained` did, in every pair."
