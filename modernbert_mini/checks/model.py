"""Checks of chapter 10, the whole model."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from modernbert_mini.checkpoints import SkipInit
from modernbert_mini.checks._machinery import (
    Hint,
    NotWritten,
    exercise,
    expect,
    expect_close,
    expect_tensor,
)
from modernbert_mini.config import ModernBertConfig
from modernbert_mini.heads import ModernBertForMaskedLM, mean_pool
from modernbert_mini.model import ModernBertModel

# (vocabulary, hidden, intermediate, layers) of ModernBERT-base and -large, from their configs.
BASE, LARGE = (50_368, 768, 1152, 22), (50_368, 1024, 2624, 28)


def _generator(seed: int = 10) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sample(*shape: int, seed: int = 10) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator(seed))


def _tiny(**changes) -> ModernBertConfig:
    """A config in which every mistake shows: a short window, two very different bases."""
    values = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "local_attention": 4,
        "global_rope_theta": 900.0,
        "local_rope_theta": 7.0,
        "pad_token_id": 0,
    }
    return ModernBertConfig(**{**values, **changes})


@torch.no_grad()
def _tiny_encoder() -> ModernBertModel:
    """An encoder whose weights are large, and whose norms have learned something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10)
        model = ModernBertModel(_tiny(initializer_range=0.3)).eval()
    generator = _generator()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


# ---- 10.1


@exercise("10.1", "Count to the last digit", difficulty=1, minutes=8)
def count(answer):
    for sizes in (BASE, LARGE, (101, 8, 12, 1)):
        out = answer(*sizes)
        expect(
            isinstance(out, int) and not isinstance(out, bool),
            f"Is the count a whole number? The check got `{out!r}`. Use `//` where you divide.",
        )
        _compare_counts(out, *sizes)
    return f"{answer(*BASE):,} for ModernBERT-base, to the last digit."


def _compare_counts(out: int, V: int, C: int, inner: int, n: int) -> None:
    attention, gated, norms = 4 * C * C, 3 * C * inner, 2 * C
    layers = n * (attention + gated + norms) - C
    head = C * C + C
    right = V * C + C + layers + C + head + V
    what = f"For vocabulary {V:,}, hidden {C:,}, intermediate {inner:,}, {n} layers you are"
    outside = (
        "Beside those of the layers there is one after the embedding, one at the end of the "
        "encoder, and one in the head."
    )
    wrong = {
        right + V * C: "the decoder's matrix is the embedding's: a tied matrix is counted once.",
        right - V: "the decoder has a bias, one number for each entry of the vocabulary.",
        right + V * C - V: "the decoder's matrix is tied to the embedding and adds nothing, and "
        "its bias of V numbers is missing.",
        right + C: "which layer has no `attn_norm`? The embedding is normed already.",
        right - n * C * inner: "`Wi` makes two halves of width I, so it has 2·I rows.",
        right - n * C * C: "is the output projection `Wo` of attention in it?",
        right - 2 * n * C * C: "`Wqkv` is three matrices in one: queries, keys and values.",
        right
        + n * C * inner: "after the gate there are I numbers, so `Wo` of GeGLU has I columns.",
        right - C: f"is a norm missing? {outside}",
        right - 2 * C: f"are two norms missing? {outside}",
        right - 3 * C: f"are three norms missing? {outside}",
        right - head: "is the prediction head in it: a dense matrix and a norm?",
        right - head - V: "this is the encoder alone. The head has a dense matrix and a norm, the "
        "decoder a bias.",
        right - C * C: "is the dense matrix of the prediction head in it?",
        right + n * (2 * C) + 2 * C: "do your norms have a bias? In ModernBERT they have a weight "
        "each and nothing else.",
        right
        + n * (3 * C + C + 2 * inner + C): "do your matrices have biases? In ModernBERT the only "
        "bias is the decoder's.",
    }
    if out == right:
        return
    expect(out not in wrong, f"{what} off by {out - right:+,}: {wrong.get(out)}")
    raise Hint(
        f"{what} off by {out - right:+,}. Count one part after the other and compare with "
        "`sum(p.numel() for p in part.parameters())` of that part of `mini`."
    )


# ---- 10.2


def _layer_inputs(model: ModernBertModel, x: torch.Tensor, kind: str):
    attend = model._backends(x, None, None, False)
    return *model._rotary_tables(x, None, None)[kind], attend[kind]


@exercise("10.2", "Your own layer in the real model", difficulty=2, minutes=12)
@torch.no_grad()
def layer(answer):
    answer = inspect.unwrap(answer)  # weights that are None, as sdpa's are, are no empty answer
    model = _tiny_encoder()
    model.attn_implementation = "eager"
    block, x = model.layers[1], _sample(2, 9, 24)
    inputs = _layer_inputs(model, x, block.kind)
    given = x.clone()
    out = answer(block, given, *inputs)
    if out is None or out is ...:
        raise NotWritten(f"Your layer returns `{out}`. Is the `return` missing?")
    expect(
        isinstance(out, tuple) and len(out) == 2,
        "A layer returns two things: the new stream, and the attention weights that `self.attn` "
        "gave (they may be None).",
    )
    expect(
        torch.equal(given, x),
        "Does your layer write into the `x` it was given? `x += …` changes the tensor of whoever "
        "called, and so the hidden states that the encoder keeps. `x = x + …` makes a new one.",
    )
    expect_tensor(out[0], x.shape)
    _compare_layers(out[0], block, x, inputs)
    expect(
        out[1] is not None,
        "What became of the attention weights? With the eager backend `self.attn` returns them "
        "as its second value: hand them on.",
    )
    return _swap_layer_into_mini(answer)


def _compare_layers(out, block, x, inputs) -> None:
    def attn(x):
        return block.attn(x, *inputs)[0]

    one, two, mlp = block.attn_norm, block.mlp_norm, block.mlp
    middle = x + attn(one(x))
    expect_close(
        out,
        block(x, *inputs)[0],
        [
            (
                two(one(x + attn(x)) + mlp(one(x + attn(x)))),
                "Where do your norms stand? After each sum: that is post-norm, the order of BERT. "
                "Here a norm stands before each block, and nothing touches the stream itself.",
            ),
            (
                one(x) + attn(one(x)) + mlp(two(one(x) + attn(one(x)))),
                "What do you add attention's result to? To the normed vector, it seems. "
                "The stream goes past the norm untouched.",
            ),
            (
                middle + mlp(two(x)),
                "What does your GeGLU read? The stream from before attention. The two blocks come "
                "one after the other: the second reads what the first has written.",
            ),
            (
                attn(one(x)) + mlp(two(attn(one(x)))),
                "Is attention's result added to `x`, or put in its place? The stream is lost.",
            ),
            (
                mlp(two(middle)),
                "Is GeGLU's result added to `x`, or put in its place? The stream is lost.",
            ),
            (
                x + attn(x) + mlp(two(x + attn(x))),
                "Does attention read the normed stream? `self.attn_norm` is not used.",
            ),
            (
                middle + mlp(middle),
                "Does GeGLU read the normed stream? `self.mlp_norm` is not used.",
            ),
            (
                x + attn(two(x)) + mlp(one(x + attn(two(x)))),
                "Which norm belongs to which block? `attn_norm` and `mlp_norm` changed places.",
            ),
            (middle, "That is the layer's first half. Where is GeGLU?"),
            (x + mlp(two(x)), "That is the layer's second half. Where is attention?"),
            (
                middle + mlp(one(middle)),
                "Is `attn_norm` used twice? GeGLU has a norm of its own, `mlp_norm`.",
            ),
        ],
        "Write it as two sentences: x becomes x plus attention of its norm; x becomes x plus GeGLU "
        "of its norm. Which of the four calls differs?",
    )


def _swap_layer_into_mini(answer) -> str:
    from modernbert_mini.transplant import swap

    model = ModernBertForMaskedLM.from_pretrained("mini")
    ids = torch.arange(100, 260).view(2, 80)
    difference = float((swap(model, "layer", answer)(ids).logits - model(ids).logits).abs().max())
    expect(
        difference < 1e-4,
        f"Your layer passes alone, but in `mini` the logits move by {difference:.1e}. "
        "Layer 0 has an `attn_norm` that does nothing: does your code norm it all the same?",
    )
    return (
        f"`mini` ran on your layer, {len(model.model.layers)} times over: max |Δ| {difference:.0e}."
    )


# ---- 10.3


@exercise("10.3", "One vector for a text", difficulty=1, minutes=8)
def pool(answer):
    x = _sample(3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    out = answer(x, mask)
    expect(
        not isinstance(out, torch.Tensor) or out.shape != (3, 5, 8),
        "One vector for each text, or one for each token? Sum over dimension 1, the tokens.",
    )
    expect_tensor(out, (3, 8))
    real = mask[..., None].float()
    expect_close(
        out,
        mean_pool(x, mask),
        [
            (
                x.mean(dim=1),
                "Is padding in your mean? Then a text's vector depends on its company.",
            ),
            (
                (x * real).mean(dim=1),
                "By how many do you divide? Padding is out of the sum, and still in the count.",
            ),
            ((x * real).sum(dim=1), "Is this the sum or the mean? Divide by the count of tokens."),
            (x[:, 0], "Is this the mean? It is the first token's vector: the other way to pool."),
            (
                (x * real).sum(dim=1) / real.sum(),
                "By how many do you divide? Each text has a count of its own; this is that of the "
                "batch.",
            ),
            (
                (x * (1 - real)).sum(dim=1) / (1 - real).sum(dim=1).clamp_min(1),
                "Which tokens are real, those with 1 or with 0? Yours is the mean of padding.",
            ),
        ],
        "The third text has one real token: its pooled vector should be that token's vector.",
    )
    left = mask.flip(1)
    expect_close(
        answer(x.flip(1), left),
        out,
        [],
        "Right for padding on the right, wrong for padding on the left. Do you count the real "
        "tokens from the start, instead of asking the mask which they are?",
    )
    expect(
        answer(x, mask.bool()).shape == (3, 8) and torch.allclose(answer(x, mask.bool()), out),
        "The mask may be true and false as well as 1 and 0. Does your code take both?",
    )
    low = answer(x.bfloat16(), mask)
    expect(
        low.dtype == torch.bfloat16,
        f"Which dtype comes back? bfloat16 went in, `{low.dtype}` came out. Bring the mask to the "
        "dtype of `x` before you multiply.",
    )
    return "The same text gets the same vector, on whichever side and however far it is padded."


# ---- 10.4


@exercise("10.4", "The loss of hidden tokens", difficulty=2, minutes=10)
def masked_loss(answer):
    logits = 2 * _sample(2, 6, 11)
    labels = torch.full((2, 6), -100)
    labels[0, 1], labels[0, 2], labels[0, 4], labels[1, 3] = 7, 0, 10, 2
    out = torch.as_tensor(answer(logits, labels))
    expect(
        out.numel() == 1,
        f"Is the loss one number? Yours has shape `{tuple(out.shape)}`: take the mean.",
    )
    right = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    chosen = labels != -100
    log_p = logits.log_softmax(dim=-1)
    each = -log_p[chosen].gather(-1, labels[chosen][:, None])[:, 0]  # (M,)
    by_row = torch.stack([each[:3].mean(), each[3:].mean()])
    as_index = -log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0]  # (B, L)
    last = -log_p.gather(-1, torch.where(chosen, labels, 10)[..., None])[..., 0]  # (B, L)
    over_tokens = logits.log_softmax(dim=1)
    sideways = -over_tokens[chosen].gather(-1, labels[chosen][:, None]).mean()
    expect_close(
        out.reshape(()).float(),
        right,
        [
            (
                each.sum() / labels.numel(),
                "By how many do you divide? Only labelled tokens are asked, so only they count.",
            ),
            (each.sum(), "Is this the sum or the mean over the labelled tokens?"),
            (
                as_index.mean(),
                "Do unlabelled tokens add to your loss? −100 means: not asked. Here it was taken "
                "for class 0.",
            ),
            (
                last.mean(),
                "Do unlabelled tokens add to your loss? −100 means: not asked. Here it was taken "
                "for the last class.",
            ),
            (-right, "Which sign has the loss? A probability below 1 has a negative logarithm."),
            (
                right / math.log(2),
                "Which logarithm? Yours has base 2. The usual loss is in nats, base e.",
            ),
            (
                by_row.mean(),
                "Is it a mean of means? Each labelled token counts the same, in whichever text.",
            ),
            (
                sideways,
                "Over which dimension is your softmax? The entries of the vocabulary compete, in "
                "the last dimension, not the tokens.",
            ),
            (
                -each.neg().exp().mean(),
                "Where is the logarithm? This is the mean probability.",
            ),
            (
                each.neg().exp().mean(),
                "Where is the logarithm? This is the mean probability.",
            ),
            (
                -logits[chosen].gather(-1, labels[chosen][:, None]).mean(),
                "Where is the softmax? These are raw logits: all others must enter as well.",
            ),
        ],
        "Take one labelled token: its loss is the log of the sum of all exponentials, minus its "
        "own logit. Is that what you average?",
    )
    far = answer(logits * 60 + 500, labels)
    expect(
        torch.isfinite(torch.as_tensor(far)).all(),
        "What if a logit is 500? `exp` of it is infinite. Subtract the largest logit first, or use "
        "`log_softmax` or `logsumexp`, which do.",
    )
    return "For a model that knows nothing, this number is ln V."


# ---- 10.5


@exercise("10.5", "Starting values", difficulty=2, minutes=15)
def starting_values(answer):
    config = _tiny(
        vocab_size=900, hidden_size=96, intermediate_size=80, num_hidden_layers=8, norm_bias=True
    )
    with torch.device("meta"), SkipInit():  # no values yet: the answer brings them
        model = ModernBertForMaskedLM(config)
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        returned = answer(model)
    expect(
        isinstance(returned, nn.Module),
        "Return the model at the end, so that the check can look at it.",
    )
    values = dict(model.named_parameters())
    untouched = [name for name, p in values.items() if (p == 7.0).all()]
    expect(
        len(untouched) < len(values),
        "Did you write into the model's parameters, or into copies of them? Nothing has changed. "
        "`parameter.fill_(…)` and `nn.init.trunc_normal_(parameter, …)` write in place.",
    )
    expect(not untouched, f"Was `{untouched[:1]}` forgotten? It still holds its old numbers.")
    expect(
        model.decoder.weight is model.model.embeddings.tok_embeddings.weight,
        "Are decoder and embedding still one tensor? Fill parameters; do not replace them.",
    )
    _check_norms_and_biases(values)
    _check_matrices(values, config)
    return "Norms 1, biases 0, and what writes to the stream starts smaller the more layers write."


def _check_norms_and_biases(values: dict[str, torch.Tensor]) -> None:
    norms = {n: p for n, p in values.items() if n.endswith("norm.weight")}
    zeros = {n: p for n, p in values.items() if n.endswith("bias")}
    for name, p in norms.items():
        expect((p != 0).any(), f"With a norm of 0 nothing comes through: `{name}` starts at 1.")
        expect(
            (p == 1).all(),
            f"Is `{name}` drawn at random? A norm starts at 1, so that it only norms.",
        )
    for name, p in zeros.items():
        expect(
            (p != 1).any(), f"Does `{name}` start at 1? It is a bias: 0 leaves things as they are."
        )
        expect((p == 0).all(), f"Is `{name}` drawn at random? A bias starts at 0.")


def _check_matrices(values: dict[str, torch.Tensor], config: ModernBertConfig) -> None:
    kept = 0.8796  # of its spread, by a normal distribution cut at two standard deviations
    wide, layers = config.initializer_range, config.num_hidden_layers
    small = wide / math.sqrt(2 * layers)
    groups: dict[str, list[torch.Tensor]] = {}
    for name, p in values.items():
        module = name.split(".")[-2]
        if p.dim() == 2:
            groups.setdefault(module, []).append(p.detach().flatten())
    spread = {module: torch.cat(parts).std().item() for module, parts in groups.items()}
    furthest = {module: torch.cat(parts).abs().max().item() for module, parts in groups.items()}

    def near(value: float, wanted: float) -> bool:
        return abs(value - wanted) < 0.06 * wanted

    for module, value in spread.items():
        expect(
            value > 1e-6,
            f"Are all numbers of `{module}` equal? Equal rows get equal gradients and stay equal.",
        )
    expect(
        not any(near(spread["Wqkv"], scale * wide**2) for scale in (1, kept)),
        "Variance or standard deviation? `initializer_range` is a standard deviation, and so is "
        "the `std` of `trunc_normal_`.",
    )
    for std in (small, kept * small, config.hidden_size**-0.5, kept * config.hidden_size**-0.5):
        expect(
            not near(spread["tok_embeddings"], std),
            "What did your code do with the decoder? It is the embedding's own tensor: whoever "
            "fills it as an output overwrites the embedding.",
        )
    for module in ("Wqkv", "Wi"):
        expect(
            not near(spread[module], small) and not near(spread[module], small * kept),
            f"Is `{module}` scaled down too? Only what writes into the stream is.",
        )
    for module in ("Wo", "dense"):
        value = spread[module]
        other = "" if module == "Wo" else " The head's dense matrix starts like an output."
        for factor, hint in (
            (1.0, f"Is `{module}` scaled down? What writes to the stream starts smaller.{other}"),
            (
                1 / math.sqrt(layers),
                f"How many blocks write to the stream? Two in each layer; your `{module}` counts "
                "one, √layers where √(2·layers) belongs.",
            ),
            (
                1 / (2 * layers),
                f"Is the square root missing in the scale of `{module}`? Independent writes add up "
                "in variance, so the spread is divided by √(2·layers).",
            ),
            (
                1 / layers,
                f"Is `{module}` divided by the number of layers? It is √(2·layers).",
            ),
        ):
            wrong = wide * factor
            expect(not near(value, wrong) and not near(value, kept * wrong), hint)
    for module, value in spread.items():
        std = small if module in ("Wo", "dense") else wide
        if near(value, std):
            expect(
                furthest[module] <= 2.001 * std,
                f"Where is `{module}` cut? The furthest number is {furthest[module] / std:.1f} "
                "standard deviations out. The bounds `a` and `b` of `trunc_normal_` are numbers, "
                "not multiples of `std`; left out, they are ±2.",
            )
        expect(
            near(value, kept * std),
            f"The numbers of `{module}` spread by {value:.5f}; a normal distribution with standard "
            f"deviation {std:.5f}, cut at two of them, spreads by {kept * std:.5f}.",
        )


# ---- 10.6


@exercise("10.6", "Your own encoder", difficulty=3, minutes=25)
@torch.no_grad()
def encoder(answer):
    model = _tiny_encoder()
    ids = torch.randint(1, 61, (2, 19), generator=_generator())
    called = []
    hooks = [m.register_forward_hook(lambda *_: called.append(1)) for m in (model, *model.layers)]
    out = answer(model, ids)
    for hook in hooks:
        hook.remove()
    expect_tensor(out, (2, 19, 24))
    expect(
        not called,
        "Did you call the model, or a whole layer of it? Take its parts instead: `attn_norm`, "
        "`attn`, `mlp_norm`, `mlp`.",
    )
    expect_close(
        out,
        _run(model, ids),
        [
            (
                _run(model, ids, final=False),
                "Where is the last norm? `model.final_norm` is unused.",
            ),
            (
                _run(model, ids, window=None),
                "Do your local layers look at everything? Where a layer's `kind` is "
                "`sliding_attention` it sees `config.half_window` tokens on each side.",
            ),
            (
                _run(model, ids, kinds=["sliding_attention"] * 4),
                "Are all your layers local? Layer 0 and every third one after it are global.",
            ),
            (
                _run(model, ids, kinds=["full_attention"] * 4),
                "Are all your layers global? Ask each one: `layer.kind`.",
            ),
            (
                _run(model, ids, window=model.config.local_attention),
                "How far does a local layer see? `local_attention` is the whole window; "
                "`half_window` is how far it goes on each side.",
            ),
            (
                _run(model, ids, rope="full_attention"),
                "Which base do your local layers turn with? `config.rope_parameters` has one for "
                "each kind, and yours is the global one everywhere.",
            ),
            (
                _run(model, ids, rope="sliding_attention"),
                "Which base do your global layers turn with? `config.rope_parameters` has one for "
                "each kind, and yours is the local one everywhere.",
            ),
            (
                _run(model, ids, normed=False),
                "Is the embedding normed? `model.embeddings` does it; its `tok_embeddings` alone "
                "does not.",
            ),
            (
                _run(model, ids, order=reversed),
                "In which order do the layers run? Yours go backwards.",
            ),
            (
                _run(model, ids, count=3),
                "Do all layers run? The last one seems to be left out.",
            ),
            (
                _run(model, ids, halves=("attn",)),
                "That is attention alone. Where is `mlp`, with its norm and its sum?",
            ),
            (
                _run(model, ids, post=True),
                "Where do your norms stand? Before each block, and not after the sums.",
            ),
        ],
        "The shape is right, the numbers are not. Compare after the embedding first, then after "
        "layer 0, then after layer 1: `model(ids, output_hidden_states=True).hidden_states`.",
    )
    return _encoder_on_mini(answer)


def _run(
    model: ModernBertModel,
    ids: torch.Tensor,
    *,
    final: bool = True,
    normed: bool = True,
    post: bool = False,
    window: int | None = -1,
    kinds: list[str] | None = None,
    rope: str | None = None,
    order: Callable = iter,
    count: int | None = None,
    halves: tuple[str, ...] = ("attn", "mlp"),
) -> torch.Tensor:
    """The encoder's forward, with any of the usual mistakes planted in it."""
    from modernbert_mini.alternating_attention import padded_backends

    x = model.embeddings(ids) if normed else model.embeddings.tok_embeddings(ids)
    reach = model.config.half_window if window == -1 else window
    windows = {"full_attention": None, "sliding_attention": reach}
    attend = padded_backends("sdpa", None, ids.shape[1], windows, ids.device)
    tables = model._rotary_tables(x, None, None)
    layers = list(zip(model.layers, kinds or model.config.layer_types, strict=True))
    for block, kind in list(order(layers))[:count]:
        for half in halves:
            norm = getattr(block, f"{half}_norm")
            read = x if post else norm(x)
            if half == "attn":
                written = block.attn(read, *tables[rope or kind], attend[kind])[0]
            else:
                written = block.mlp(read)
            x = norm(x + written) if post else x + written
    return model.final_norm(x) if final else x


def _encoder_on_mini(answer) -> str:
    model = ModernBertModel.from_pretrained("mini")
    ids = torch.arange(100, 400).view(2, 150)
    difference = float((answer(model, ids) - model(ids).last_hidden_state).abs().max())
    expect(
        difference < 1e-3,
        f"Right on a tiny model, but on `mini` the result moves by {difference:.1e}. Is a size, a "
        "number of layers or a base written into your code?",
    )
    return f"`mini` runs on your encoder: max |Δ| {difference:.0e} over 300 tokens."
