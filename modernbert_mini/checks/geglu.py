"""Checks of chapter 4, GeGLU."""

import inspect
import math

import torch
from torch import nn
from torch.nn import functional as F

from modernbert_mini.checks._machinery import (
    Hint,
    NotWritten,
    exercise,
    expect,
    expect_close,
    expect_tensor,
)
from modernbert_mini.geglu import GeGLU, gated_linear_unit

C, I = 8, 6  # noqa: E741  the book's letter for the intermediate size


def _sample(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


@exercise("4.1", "GELU from erf", difficulty=1, minutes=5)
def gelu(answer):
    x = torch.linspace(-4, 4, 33).view(3, 11)
    given = x.clone()
    out = answer(given)
    expect_tensor(out, x.shape)
    expect(
        torch.equal(given, x),
        "Does your function change its argument? Make a new tensor; the caller may need `x` again.",
    )
    phi = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    bell = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    root = "What does `erf` take? Φ(x) is ½ (1 + erf(x / √2)): the √2 divides x, inside."
    expect_close(
        out,
        x * phi,
        [
            (
                phi,
                "Is this the opening or the result? You have Φ(x); GELU is x times that.",
            ),
            (
                _tanh_gelu(x),
                "Exact or tanh? Your numbers are those of the tanh formula, which differs in the "
                "fourth digit. ModernBERT uses `erf`.",
            ),
            (
                _quick_gelu(x),
                "Where does the 1.702 come from? x · sigmoid(1.702 x) is a crude approximation.",
            ),
            (F.silu(x), "Is this SiLU? x · sigmoid(x) has the wrong curve: GELU's is Φ(x)."),
            (x.clamp(min=0), "Is this ReLU? GELU lets a little through below zero."),
            (x * 0.5 * (1 + torch.erf(x)), root),
            (x * 0.5 * (1 + torch.erf(x * math.sqrt(2))), root),
            (x * 0.5 * (1 + torch.erf(x / 2)), root),
            (
                x * (1 + torch.erf(x / math.sqrt(2))),
                "How far open can it get? Yours opens to 2; the ½ is missing.",
            ),
            (
                x * torch.erf(x / math.sqrt(2)),
                "Where does the opening start? `erf` runs from −1 to 1, Φ from 0 to 1: add 1, "
                "then halve.",
            ),
            (
                x * bell,
                "The curve or the area under it? You multiply by the bell curve's height. Φ is the "
                "area to the left of x.",
            ),
        ],
        "Look at a few points: GELU(0) is 0, GELU(1) is 0.8413, GELU(−1) is −0.1587. "
        "Which of these do you miss?",
    )
    expect(
        answer(x.bfloat16()).dtype == torch.bfloat16,
        "Does the result keep the dtype of `x`? bfloat16 went in, something else came out.",
    )
    far = answer(torch.tensor([-1e4, 1e4]))
    expect(
        torch.equal(far, torch.tensor([0.0, 1e4])),
        f"And far out? GELU(−10,000) is 0 and GELU(10,000) is 10,000; yours gives {far.tolist()}.",
    )
    return "x times the share of the bell curve that lies below x."


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.chunk(2, dim=-1)


_WRONG_HALF = (
    "Which half goes through the activation? In ModernBERT it is the first one; the second stays "
    "linear. Yours are the other way round."
)
_NEIGHBOURS = (
    "Where do you cut? The first I numbers are one half, the last I the other. "
    "You take every other number."
)


def _wrong_gates(x: torch.Tensor, act) -> list[tuple[torch.Tensor, str]]:
    """What likely mistakes make of both halves, with their hints."""
    a, b = _halves(x)
    return [
        (a * act(b), _WRONG_HALF),
        (act(x[..., ::2]) * x[..., 1::2], _NEIGHBOURS),
        (x[..., ::2] * act(x[..., 1::2]), _NEIGHBOURS),
        (
            act(a) * act(b),
            "How often do you activate? One half only: the linear half must be able to be negative "
            "and large.",
        ),
        (
            act(a * b),
            "What comes first, the activation or the product? Activate one half, then multiply.",
        ),
        (act(a) + b, "Added or multiplied? A gate multiplies: a shut unit lets nothing through."),
        (act(a), "What happened to the second half? Your result is the first one alone."),
        (a * b, "Where is the activation? Your result is the product of two linear halves."),
        (
            torch.sigmoid(a) * b,
            "Whose opening is it? You gate by a sigmoid, as the first GLU did. Here the half goes "
            "through the activation, x · Φ(x), not Φ(x) alone.",
        ),
        (a * torch.sigmoid(b), "Is this `F.glu`? It puts a sigmoid on the second half."),
    ]


@exercise("4.2", "The gate", difficulty=1, minutes=8)
def gate(answer):
    x = _sample(2, 4, 2 * I)
    given = x.clone()
    out = answer(given, F.gelu)
    expect(
        getattr(out, "shape", None) != x.shape,
        "How wide is the result? 2·I numbers go in and I come out, one for each unit.",
    )
    expect_tensor(out, (2, 4, I))
    expect(
        torch.equal(given, x),
        "Does your gate write into `x`? `*=` on a half changes the caller's tensor.",
    )
    expect_close(
        out,
        gated_linear_unit(x),
        _wrong_gates(x, F.gelu),
        "The shape is right, the numbers are not. Try x = [1, −2, 10, 100] with ReLU: "
        "the result should be [10, 0].",
    )
    expect_close(
        answer(x, F.relu),
        gated_linear_unit(x, F.relu),
        [
            (
                gated_linear_unit(x, F.gelu),
                "Do you use the activation that you are given? The check passed `F.relu`, and you "
                "computed GELU.",
            )
        ],
        "Right with GELU, wrong with ReLU. Does the activation stand in the right place?",
    )
    small = torch.arange(4.0)
    try:
        same = torch.equal(answer(small, F.relu), gated_linear_unit(small, F.relu))
    except (RuntimeError, IndexError):
        same = False
    expect(
        same,
        f"Right for a batch with I = {I}, wrong for one vector with I = 2. Is a size or a "
        "dimension written into your code? The halves lie in the last one, `dim=-1`.",
    )
    expect(
        answer(x.bfloat16(), F.gelu).dtype == torch.bfloat16,
        "Does the result keep the dtype of `x`? bfloat16 went in, something else came out.",
    )
    moved, layers = _swapped(answer, "gated_linear_unit")
    return (
        f"`mini` ran on your gate in all {layers} layers, and no logit moved by more than "
        f"{moved:.0e}."
    )


def _mini() -> tuple[nn.Module, torch.Tensor]:
    from modernbert_mini import ModernBertForMaskedLM

    ids = torch.arange(100, 180)[None]  # (B, L)
    return ModernBertForMaskedLM.from_pretrained("mini").eval(), ids


@torch.no_grad()
def _swapped(own, part: str) -> tuple[float, int]:
    """How far the logits of mini move with the learner's part in every layer."""
    from modernbert_mini.transplant import swap

    model, ids = _mini()
    mine = swap(model, part, own)
    return _moved(mine, model, ids), model.config.num_hidden_layers


def _moved(mine: nn.Module, model: nn.Module, ids: torch.Tensor) -> float:
    moved = float((mine(ids).logits - model(ids).logits).abs().max())
    if not moved < 1e-3:
        raise Hint(
            f"Yours passes alone, but in `mini` the logits move by {moved:.1e}. Does it depend on "
            "the size of its input, or remember something from an earlier call?"
        )
    return moved


@exercise("4.3", "A width that matches", difficulty=2, minutes=8)
def matched_width(answer):
    out = answer(3072, 64)
    expect(
        not isinstance(out, torch.Tensor | float),
        f"Is a number of units a whole number? You return {out!r}, of type `{type(out).__name__}`.",
    )
    mistakes = {
        3072: "Do both have the same weights per unit? An MLP has two per unit and number of the "
        "token, in and out. How many has GeGLU?",
        1536: "Did you count `Wo`? `Wi` doubles, but `Wo` stays: three matrices' worth against "
        "two, so two thirds, not one half.",
        4608: "Wider or narrower? GeGLU has more weights per unit, so it gets fewer units.",
        4096: "Which way round is the fraction, and of what? 2·C·I′ = 3·C·I; solve it for I.",
        6144: "Did you count the halves? The width I is that *after* the gate; `Wi` has 2·I.",
    }
    expect(out == 2048, mistakes.get(out, f"3,072 units become 2,048, yours are {out}. 2·I′ = 3·I"))
    up = answer(4096, 256)
    expect(
        up % 256 == 0,
        f"Is it a multiple? The check asked for a multiple of 256 and got {up:,}.",
    )
    expect(
        up != 2560,
        "Do you always round down? For 4,096 units the exact width is 2,730.7; of 2,560 and 2,816 "
        "the second is closer.",
    )
    expect(
        up == 2816, f"For 4,096 units and multiples of 256, 2,816 comes closest; yours is {up:,}."
    )
    down = answer(1000, 64)
    expect(
        down != 704,
        "Do you always round up? For 1,000 units the exact width is 666.7; of 640 and 704 the "
        "first is closer.",
    )
    expect(down == 640, f"For 1,000 units and multiples of 64, 640 comes closest; yours is {down}.")
    expect(
        answer(24, 64) != 0,
        "What of a very small MLP? The closest multiple of 64 to 16 is 0, and a block of no units "
        "is none.",
    )
    expect(answer(24, 64) == 64, "For 24 units and multiples of 64, the smallest block has 64.")
    return "Two thirds of the units, three halves of the weights each."


@exercise("4.4", "Your own block in the real model", difficulty=2, minutes=15)
def block(answer):
    expect(
        inspect.isclass(answer) and issubclass(answer, nn.Module),
        "Is it a class? Pass `MyBlock` itself, a subclass of `nn.Module`, not an object or a "
        "function.",
    )
    with torch.random.fork_rng(devices=[]):  # starting values and dropout draw at random
        _expect_block(answer)
    with torch.random.fork_rng(devices=[]):
        moved, layers = _swapped(answer, "mlp")
    return (
        f"`mini` ran on your block: {layers} layers, its own weights, and no logit moved by more "
        f"than {moved:.0e}."
    )


def _expect_block(answer: type) -> None:
    own = answer(C, I)
    _expect_weights(own)
    x = 2 * _sample(3, 5, C)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(_sample(*parameter.shape))
        out = own.eval()(x)
    if out is None or out is ...:
        raise NotWritten(f"`forward` returns `{out}`. Is the `return` missing?")
    expect_tensor(out, x.shape)
    both, project = F.linear(x, own.Wi.weight), own.Wo.weight.T
    normed = F.linear(F.layer_norm(x, (C,)), own.Wi.weight)
    right = gated_linear_unit(both) @ project
    with torch.no_grad():
        expect_close(
            out,
            right,
            [
                (
                    x + right,
                    "Who adds the block's result to the token? The layer does, outside. Your "
                    "block adds its input as well.",
                ),
                (
                    gated_linear_unit(normed) @ project,
                    "Who applies the norm? The layer does, before the block. Yours norms again.",
                ),
                *(
                    (gated_linear_unit(both, act) @ project, hint)
                    for act, hint in (
                        (
                            _tanh_gelu,
                            "Exact or tanh? ModernBERT's GELU is the exact one, `F.gelu(x)`.",
                        ),
                        (F.relu, "Which activation? Yours is ReLU; this block has GELU."),
                        (F.silu, "Which activation? Yours is SiLU; this block has GELU."),
                    )
                ),
                *((wrong @ project, hint) for wrong, hint in _wrong_gates(both, F.gelu)),
            ],
            "The shape is right, the numbers are not. The three steps are `Wi`, the gate, `Wo`: "
            "print the result of each beside the package's.",
        )
    _expect_dropout(answer, x)


def _expect_weights(own: nn.Module) -> None:
    mine = {name: tuple(p.shape) for name, p in own.named_parameters()}
    expect(
        "Wi.bias" not in mine and "Wo.bias" not in mine,
        "Is there a bias? `nn.Linear` makes one unless told `bias=False`; your block was asked for "
        "none.",
    )
    expect(
        mine.get("Wi.weight") != (I, C),
        f"How wide is `Wi`? It feeds both halves: 2·I rows, {2 * I} here, and yours has {I}.",
    )
    expect(
        mine.get("Wo.weight") != (C, 2 * I),
        f"What enters `Wo`? The gate has halved the width: {I} numbers, and yours takes {2 * I}.",
    )
    right = {"Wi.weight": (2 * I, C), "Wo.weight": (C, I)}
    expect(
        mine == right,
        f"Which weights does the block have? The checkpoint brings `{right}` here. "
        f"Yours has `{mine}`.",
    )


@torch.no_grad()
def _expect_dropout(answer: type, x: torch.Tensor) -> None:
    own = answer(C, I, bias=True, dropout=1.0)  # every unit dropped, so that no luck is involved
    expect(
        {"Wi.bias", "Wo.bias"} <= dict(own.named_parameters()).keys(),
        "What does `bias=True` do? Then both matrices have a bias; yours ignores it.",
    )
    out = own.train()(x)
    own.eval()
    expect(
        not torch.allclose(out, own(x)),
        "Does dropout act in training? With `dropout=1.0` every unit should be dropped while "
        "`training` is on.",
    )
    expect(
        torch.allclose(out, own.Wo.bias.expand_as(out)),
        "Where does dropout stand? Between the gate and `Wo`: with every unit dropped, the bias of "
        "`Wo` is all that is left.",
    )
    right = GeGLU(C, I, bias=True)
    right.load_state_dict(own.state_dict())
    expect(
        torch.allclose(own(x), right(x), atol=1e-5),
        "Does dropout stop outside training? In `eval()` mode nothing may be dropped: use "
        "`nn.Dropout`, or pass `training=self.training`.",
    )


@exercise("4.5", "A smaller block", difficulty=2, minutes=12)
def smaller(answer):
    Wi, Wo, keep = _sample(2 * I, C), _sample(C, I), torch.tensor([5, 1, 4])
    given = Wi.clone(), Wo.clone()
    both = answer(*given, keep)
    expect(
        isinstance(both, tuple | list) and len(both) == 2,
        "Does your function return two matrices, `Wi` and `Wo`?",
    )
    expect(
        torch.equal(given[0], Wi) and torch.equal(given[1], Wo),
        "Does your function write into the matrices that it got? Return new ones.",
    )
    new_Wi, new_Wo = both
    n = len(keep)
    expect(
        getattr(new_Wi, "shape", None) != (n, C),
        "What of the linear half? Unit u has two rows of `Wi`: row u and row u + I.",
    )
    expect(
        getattr(new_Wo, "shape", None) != (n, I),
        "Row or column? What unit u writes is *column* u of `Wo`; you kept rows.",
    )
    expect_tensor(new_Wi, (2 * n, C), what="Wi")
    expect_tensor(new_Wo, (C, n), what="Wo")
    first, second = Wi[keep], Wi[keep + I]
    ordered = keep.sort().values
    expect_close(
        new_Wi,
        torch.cat((first, second)),
        [
            (
                torch.cat((first, first)),
                "Which rows are the linear half? Not the first half again: rows u + I.",
            ),
            (
                torch.cat((second, first)),
                "In which order do the halves stand? The activated one comes first.",
            ),
            (
                torch.stack((first, second), dim=1).flatten(0, 1),
                "Do the two rows of a unit stand side by side? All activated rows come first, then "
                "all linear ones.",
            ),
            (
                torch.cat((Wi[2 * keep], Wi[2 * keep + 1])),
                "Where are the two rows of unit u? Not at 2u and 2u + 1: the halves are not "
                "interleaved.",
            ),
            (
                torch.cat((Wi[ordered], Wi[ordered + I])),
                "In which order come the units? In that of `keep`, and [5, 1, 4] is not sorted.",
            ),
        ],
        "The shape of `Wi` is right, its rows are not. For keep = [5, 1, 4] and I = 6 they are "
        "5, 1, 4, 11, 7, 10.",
    )
    expect_close(
        new_Wo,
        Wo[:, keep],
        [
            (
                Wo[:, ordered],
                "Do both matrices have the units in the same order? `Wi` follows `keep`, `Wo` is "
                "sorted: each unit then writes what another one should.",
            ),
            (
                Wo[:, :n],
                "Which columns of `Wo`? Those of the units in `keep`; you took the first ones.",
            ),
        ],
        "`Wi` is right. For `Wo`, take the columns of the units in `keep`.",
    )
    return _shrink_mini(answer)


@torch.no_grad()
def _shrink_mini(answer) -> str:
    """Drop the quieter half of one block's units in mini, and compare with silencing them."""
    model, ids = _mini()
    mine, _ = _mini()
    mlp = mine.model.layers[2].mlp
    width = mlp.Wo.in_features
    keep = mlp.Wo.weight.norm(dim=0).argsort(descending=True)[: width // 2]
    new_Wi, new_Wo = answer(mlp.Wi.weight, mlp.Wo.weight, keep)
    mlp.Wi.weight, mlp.Wo.weight = nn.Parameter(new_Wi), nn.Parameter(new_Wo)
    silent = torch.ones(width, dtype=torch.bool)
    silent[keep] = False
    model.model.layers[2].mlp.Wo.weight[:, silent] = 0
    moved = _moved(mine, model, ids)
    return (
        f"A block of `mini` runs on {len(keep)} of its {width} units, and gives what it gives with "
        f"the others silenced: max |Δ| of the logits {moved:.0e}."
    )


@exercise("4.6", "Fold the norm into the block", difficulty=3, minutes=12)
def folded(answer):
    weight, Wi = 1 + 0.5 * _sample(C), _sample(C, C)  # 2·I = C, so that a mix-up keeps the shape
    given = weight.clone(), Wi.clone()
    out = answer(*given)
    expect_tensor(out, Wi.shape)
    expect(
        torch.equal(given[0], weight) and torch.equal(given[1], Wi),
        "Does your function write into its arguments? Return a new matrix.",
    )
    first, second = Wi.chunk(2)
    expect_close(
        out,
        Wi * weight,
        [
            (
                Wi * weight[:, None],
                "Row or column? Number c of the token meets *column* c of `Wi`. You scaled rows, "
                "which is what comes out.",
            ),
            (
                Wi / weight,
                "Multiply or divide? `Wi @ (weight * x)` should equal `new_Wi @ x`.",
            ),
            (Wi, "Does the weight enter at all? Your matrix is the old one."),
            (
                torch.cat((first * weight, second)),
                "And the linear half? Both halves read the same normed token, so all rows change.",
            ),
            (
                torch.cat((first, second * weight)),
                "And the activated half? Both halves read the same normed token.",
            ),
            (Wi * weight.square(), "How often is the weight applied? Once is enough."),
            (
                (Wi * weight).T,
                "Does `Wi` still have one row per output? Yours lies on its side.",
            ),
        ],
        "Write the first output as a sum: Σ_c Wi[0, c] · (weight[c] · x[c]). Which number "
        "multiplies x[c]?",
    )
    wide = _sample(2 * I, C)
    wide_out = answer(weight, wide)
    expect(
        wide_out.shape == wide.shape and torch.allclose(wide_out, wide * weight),
        f"Right for a square matrix, wrong for one of {(2 * I, C)}. Is a size written into your "
        "code?",
    )
    return _fold_mini(answer)


@torch.no_grad()
def _fold_mini(answer) -> str:
    """Fold every norm before a block of mini, and set its weight to 1."""
    model, ids = _mini()
    mine, _ = _mini()
    for layer in mine.model.layers:
        layer.mlp.Wi.weight.copy_(answer(layer.mlp_norm.weight.clone(), layer.mlp.Wi.weight))
        layer.mlp_norm.weight.fill_(1.0)
    moved = _moved(mine, model, ids)
    count = len(mine.model.layers) * mine.config.hidden_size
    return (
        f"`mini` runs with plain norms before its blocks: {count:,} weights less, and no logit "
        f"moved by more than {moved:.0e}."
    )
