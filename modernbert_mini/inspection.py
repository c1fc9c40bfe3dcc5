"""Looking inside a trained model: attention distance, the residual stream, probes, ablations.

Chapter 16 builds this module. Every tool takes a model of this package and leaves it as it was.
Those that read or change layers use forward hooks, so they work on both attention backends, on
padded and packed input, and on the models of ``transformers`` whose modules go by the same names.
Sources: Clark et al., "What Does BERT Look At?", ACL W19-4828 (attention); Kobayashi et al.,
"Attention is Not Only a Weight", arXiv:2004.10102 (norms); nostalgebraist, "interpreting GPT: the
logit lens" (2020), and Yom Din et al., "Jump to Conclusions", arXiv:2303.09435 (lenses); Hewitt
and Liang, "Designing and Interpreting Probes with Control Tasks", arXiv:1909.03368 (probes);
Michel et al., "Are Sixteen Heads Really Better than One?", arXiv:1905.10650 (ablations).
"""

import html
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .alternating_attention import padded_mask


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder inside a model with a head; a bare encoder is its own. Chapter 16."""
    return getattr(model, model.base_model_prefix, model)


# --- Where attention goes ---------------------------------------------------------------------


def distance_profile(weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How the attention of each head is spread over distances.

    A token that does not count takes no part, neither as one that looks nor as one that is looked
    at; what a query gives to the others is scaled to sum to 1.

    Args:
        weights: (B, H, L, L) attention weights; the row is the token that looks.
        tokens: (B, L), true at the tokens that count: the real ones, or those without specials.

    Returns:
        (H, L) dtype of ``weights``: the share of a head's attention that goes d tokens away, left
        and right together, for d = 0 … L − 1; the mean over all queries, so each row sums to 1.
        ``profile @ torch.arange(L)`` is then the mean distance in tokens. Chapter 16.
    """
    counted = tokens.bool()[:, None, None, :]  # (B, 1, 1, L)
    weights = weights * counted
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    weights = weights * tokens.bool()[:, None, :, None]  # padding looks around, too: leave it out
    summed = weights.sum(dim=0).flatten(1)  # (H, L·L)
    position = torch.arange(weights.shape[-1], device=weights.device)  # (L,)
    distance = (position[:, None] - position).abs().flatten()  # (L·L,)
    profile = summed.new_zeros(len(summed), len(position))  # (H, L)
    profile.index_add_(1, distance, summed)
    return profile / profile.sum(dim=-1, keepdim=True)


def uniform_attention(tokens: torch.Tensor, half_window: int | None = None) -> torch.Tensor:
    """The attention of a head that does not choose: the same weight for each key in sight.

    Args:
        tokens: (B, L), true at real tokens.
        half_window: W for a local layer, None for a global one.

    Returns:
        (B, 1, L, L) float32 weights, the baseline for everything measured on attention.
        Chapter 16.
    """
    length = tokens.shape[1]
    sight = padded_mask(tokens, length, half_window, tokens.device).float()  # (B, 1, L, L)
    return sight / sight.sum(dim=-1, keepdim=True).clamp_min(1)


def value_norms(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The length of what each head would write if it looked at one token and no other.

    A weight says how much is taken; this says of what. Their product is the length of what
    arrives (arXiv:2004.10102, section 3).

    Args:
        layer: an encoder layer.
        x: (..., L, C), what enters the layer.

    Returns:
        (..., H, L) dtype of ``x``: the norm of the value of each token after its head's columns
        of ``Wo``. Chapter 16.
    """
    heads = layer.attn.num_heads
    qkv = layer.attn.Wqkv(layer.attn_norm(x)).unflatten(-1, (3, heads, -1))  # (..., L, 3, H, D)
    value = qkv[..., 2, :, :].transpose(-2, -3)  # (..., H, L, D)
    columns = layer.attn.Wo.weight.unflatten(-1, (heads, -1)).permute(1, 2, 0)  # (H, D, C)
    return (value @ columns).norm(dim=-1)


# --- The residual stream ----------------------------------------------------------------------


@torch.no_grad()
def residual_stream(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """The residual stream between the layers, from the embeddings to the end.

    Not ``hidden_states``, whose last entry has been through the final norm already: here every
    state is as the next module finds it.

    Args:
        model: with or without a head.
        inputs: as the encoder takes them, such as ``input_ids`` and ``attention_mask``.

    Returns:
        (layers + 1, ..., L, C): entry i is what i layers have made. Chapter 16.
    """
    encoder, stream = encoder_of(model), []
    with ExitStack() as hooks:
        for module in (*encoder.layers, encoder.final_norm):
            keep = module.register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0]))
            hooks.enter_context(keep)  # leaving the block removes the hook
        encoder(**inputs, keep_padded=True)
    return torch.stack(stream)  # (..., L, C)


@torch.no_grad()
def logit_lens(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Read a state of the residual stream as if the remaining layers were not there.

    Args:
        model: a masked language model.
        x: (..., C), from ``residual_stream``: not normed.

    Returns:
        (..., V) logits; those of the last state are the model's own. Chapter 16.
    """
    return model.decoder(model.head(encoder_of(model).final_norm(x)))


def token_rank(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How many tokens the model finds likelier than the right one: 0 means first.

    Args:
        logits: (..., V).
        tokens: (...) ids.

    Returns:
        (...) int64. Chapter 16.
    """
    own = logits.gather(-1, tokens[..., None])
    return (logits > own).sum(dim=-1)


# --- Probes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearMap:
    """``y = (x − centre) @ weight + offset``, all float64; ``fit_ridge`` makes it. Chapter 16."""

    centre: torch.Tensor
    weight: torch.Tensor
    offset: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., features) to (..., outputs), float64."""
        return (x.double() - self.centre) @ self.weight + self.offset


def fit_ridge(x: torch.Tensor, y: torch.Tensor, penalty: float = 0.1) -> LinearMap:
    """Fit a linear map by least squares with a penalty on large weights, in closed form.

    Args:
        x: (N, features), any dtype.
        y: (N, outputs).
        penalty: strength of the penalty, relative to the mean squared length of a centred row of
            ``x``, so that it means the same for vectors of any size and scale.

    Returns:
        The map that fits best; computed in float64. Chapter 16.
    """
    x, y = x.double(), y.double()
    centre, offset = x.mean(dim=0), y.mean(dim=0)
    x, y = x - centre, y - offset
    # A feature that never varies, such as [CLS] before the first layer, must not divide by zero.
    strength = (penalty * x.square().sum(dim=-1).mean()).clamp_min(1e-9)
    if len(x) >= x.shape[1]:
        weight = torch.linalg.solve(x.mT @ x + strength * torch.eye(x.shape[1]).to(x), x.mT @ y)
    else:  # more features than rows: the same answer from the smaller system
        weight = x.mT @ torch.linalg.solve(x @ x.mT + strength * torch.eye(len(x)).to(x), y)
    return LinearMap(centre, weight, offset)


def probe_accuracy(features: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[float, float]:
    """Split at random, fit a linear classifier on three quarters, score it on both parts.

    Args:
        features: (N, features).
        labels: (N,) class ids from 0.
        seed: of the split.

    Returns:
        The share of right answers on the rows held back, and on those fitted. Only the first is a
        result; the second shows how much the probe can memorise. Chapter 16.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order.tensor_split([3 * len(labels) // 4])
    targets = F.one_hot(labels, int(labels.max()) + 1)
    probe = fit_ridge(features[train], targets[train])
    right = [(probe(features[rows]).argmax(dim=-1) == labels[rows]) for rows in (test, train)]
    return tuple(r.double().mean().item() for r in right)


# --- Ablations --------------------------------------------------------------------------------


@torch.no_grad()
def masked_losses(model: nn.Module, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """The loss of every hidden token by itself.

    Args:
        model: a masked language model.
        labels: shaped as ``input_ids``; the right id where a token is hidden, −100 elsewhere.
        inputs: as the encoder takes them.

    Returns:
        (M,) float32, in nats, in the order of the hidden tokens. Chapter 16.
    """
    hidden = labels != -100
    x = encoder_of(model)(**inputs).last_hidden_state[hidden]  # (M, C)
    # Decode the M rows alone: the decoder is the widest matrix of the model.
    logits = model.decoder(model.head(x)).float()  # (M, V)
    return F.cross_entropy(logits, labels[hidden], reduction="none")


@contextmanager
def ablated_heads(
    model: nn.Module, heads: Iterable[tuple[int, int]], means: torch.Tensor | None = None
) -> Iterator[None]:
    """Switch attention heads off for as long as a ``with`` block lasts.

    What a head has mixed is replaced on its way into ``Wo``, so no weight changes and nothing is
    left behind, whatever happens in the block.

    Args:
        model: with or without a head.
        heads: (layer, head) of each head to switch off, counted from 0.
        means: (layers, H, D), what each head gives on average: it then gives that, always. By
            default zeros.

    Raises:
        ValueError: for a head that the model does not have. Chapter 16.
    """
    layers, count = encoder_of(model).layers, model.config.num_attention_heads
    chosen: dict[int, list[int]] = {}
    for layer, head in heads:
        if not (0 <= layer < len(layers) and 0 <= head < count):
            raise ValueError(f"no head {head} in layer {layer}: {len(layers)} layers of {count}")
        chosen.setdefault(layer, []).append(head)

    def hook(layer: int) -> Callable:
        def replace(module: nn.Module, inputs: tuple) -> tuple:
            mixed = inputs[0].unflatten(-1, (count, -1)).clone()  # (..., L, H, D)
            mixed[..., chosen[layer], :] = 0 if means is None else means[layer, chosen[layer]]
            return (mixed.flatten(-2),)

        return replace

    with ExitStack() as hooks:
        for layer in chosen:
            hooks.enter_context(layers[layer].attn.Wo.register_forward_pre_hook(hook(layer)))
        yield


@torch.no_grad()
def head_means(model: nn.Module, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """What each head gives on average over some tokens.

    Args:
        model: with or without a head.
        tokens: (B, L), true at the tokens to average over.
        inputs: as the encoder takes them.

    Returns:
        (layers, H, D), for ``ablated_heads``. Chapter 16.
    """
    encoder, mixed = encoder_of(model), []
    with ExitStack() as hooks:
        for layer in encoder.layers:
            keep = layer.attn.Wo.register_forward_pre_hook(
                lambda _, inputs: mixed.append(inputs[0])
            )
            hooks.enter_context(keep)
        encoder(**inputs, keep_padded=True)
    means = torch.stack([x[tokens.bool()].mean(dim=0) for x in mixed])  # (layers, C)
    return means.unflatten(-1, (model.config.num_attention_heads, -1))


@contextmanager
def narrowed_window(model: nn.Module, half_window: int) -> Iterator[None]:
    """Give the local layers another window for as long as a ``with`` block lasts.

    Args:
        model: one of this package.
        half_window: W, tokens in sight on each side; 0 leaves a token itself alone.

    Raises:
        ValueError: for a negative W. Chapter 16.
    """
    if half_window < 0:
        raise ValueError(f"half_window is {half_window}; 0 or more is expected")
    before = model.config.local_attention
    model.config.local_attention = 2 * half_window
    try:
        yield
    finally:
        model.config.local_attention = before


def standard_error(values: torch.Tensor, texts: torch.Tensor) -> float:
    """How far the mean of some values would move with other texts.

    Tokens of one text rise and fall together, so it is texts that are counted as independent, not
    tokens ("clustered" standard error).

    Args:
        values: (M,), such as differences of two losses at the same tokens.
        texts: (M,) ids: which text each value is from.

    Returns:
        The standard error of ``values.mean()``, in the unit of the values. Chapter 16.
    """
    which, group = texts.unique(return_inverse=True)
    sums = values.new_zeros(len(which)).index_add(0, group, values - values.mean())  # (texts,)
    return (sums.square().sum().sqrt() / len(values)).item()


# --- Vectors as arrows ------------------------------------------------------------------------


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Whether two lists of numbers rise together, by their ranks alone (Spearman's ρ).

    Args:
        a, b: (N,). Equal values share the mean of their ranks.

    Returns:
        Between −1 and 1. Chapter 16.
    """
    return torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1].item()


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()  # 1-based rank of the last of each group of equal values
    return (last - (count - 1) / 2)[place]


def mean_cosine(x: torch.Tensor) -> float:
    """The mean cosine over all pairs of different rows: 0 where directions are spread evenly.

    Args:
        x: (N, C), N at least 2.

    Returns:
        Between −1/(N − 1) and 1. Chapter 16.
    """
    x = F.normalize(x.double(), dim=-1)
    n = len(x)
    return ((x.sum(dim=0).square().sum() - n) / (n * (n - 1))).item()


def nearest(vectors: torch.Tensor, row: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that point most nearly the same way as one row, itself apart.

    Args:
        vectors: (N, C).
        row: which one.
        k: how many neighbours.

    Returns:
        Cosines (k,), falling, and the rows (k,). Chapter 16.
    """
    unit = F.normalize(vectors, dim=-1)
    cosine = unit @ unit[row]  # (N,)
    cosine[row] = -torch.inf
    return cosine.topk(k)


# --- A sentence under the lens ----------------------------------------------------------------


@dataclass(frozen=True)
class LensTable:
    """What ``lens_table`` returns: a table in a notebook, lines of text elsewhere. Chapter 16.

    Attributes:
        tokens: L strings, as the model reads them.
        guesses: ``guesses[layers][position]`` is a list of (token, probability), best first.
        hidden: whether each token is a mask; the columns of the others are drawn faintly.
    """

    tokens: list[str]
    guesses: list[list[list[tuple[str, float]]]]
    hidden: list[bool]

    def __repr__(self) -> str:
        rows = [["reads", *map(_visible, self.tokens)]]
        for layers, row in enumerate(self.guesses):
            rows.append([_after(layers), *(_visible(guesses[0][0]) for guesses in row)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        # HTML and CSS alone: a cell under the pointer, or reached by tab, shows its list below.
        me = f"lens{uuid.uuid4().hex[:8]}"
        names = "".join(f"<th>{html.escape(_visible(token))}</th>" for token in self.tokens)
        rows = [f"<tr><th>reads</th>{names}</tr>"]
        for layers, row in enumerate(self.guesses):
            cells = [
                _cell(f"{_after(layers)}, {_visible(token)}", guesses, asked)
                for token, guesses, asked in zip(self.tokens, row, self.hidden, strict=True)
            ]
            rows.append(f"<tr><th>{_after(layers)}</th>{''.join(cells)}</tr>")
        return (
            f'<div id="{me}"><style>{_LENS_STYLE.replace("#ID", f"#{me}")}</style>'
            f"<div><table>{''.join(rows)}</table></div>"
            "<p>Hover over a cell, tap it, or reach it by tab: its best guesses stand here.</p>"
            "</div>"
        )


@torch.no_grad()
def lens_table(model: nn.Module, tokenizer: Callable, text: str, top_k: int = 5) -> LensTable:
    """What the model would say after each layer, at every token of a text.

    Args:
        model: a masked language model.
        tokenizer: of the same checkpoint.
        text: short; it may hold masks.
        top_k: how many guesses to keep for each place.

    Returns:
        The table. Chapter 16.
    """
    batch = tokenizer(text, return_tensors="pt")
    guesses = []
    for x in residual_stream(model, **batch):
        best = logit_lens(model, x[0]).float().softmax(dim=-1).topk(top_k)
        guesses.append(
            [
                [(tokenizer.decode([i]), p) for i, p in zip(ids, ps, strict=True)]
                for ids, ps in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        )
    ids = batch["input_ids"][0].tolist()
    hidden = [i == tokenizer.mask_token_id for i in ids]
    return LensTable([tokenizer.decode([i]) for i in ids], guesses, hidden)


def _after(layers: int) -> str:
    return f"after {layers}"


def _visible(token: str) -> str:
    return token.replace(" ", "␣").replace("\n", "⏎") or "∅"


def _cell(place: str, guesses: list[tuple[str, float]], asked: bool) -> str:
    best, sure = guesses[0]
    shade = (0.75 if asked else 0.15) * sure
    listed = " · ".join(f"{_visible(token)} {p:.0%}" for token, p in guesses)
    return (
        f'<td tabindex="0" style="background:rgba(0,114,178,{shade:.2f})">'
        f"{html.escape(_visible(best))}<span>{html.escape(f'{place} → {listed}')}</span></td>"
    )


# The list of a cell is placed against the outer box, so that the scrolling one cannot cut it off.
_LENS_STYLE = """
#ID{position:relative;color:inherit;padding-bottom:3.6em;margin:.6em 0}
#ID>div{overflow-x:auto}
#ID tr{background:none!important}
#ID table{border-collapse:collapse;font-size:.85em;margin:0;color:inherit}
#ID td,#ID th{padding:.25em .5em;white-space:nowrap;text-align:center;color:inherit;
border:1px solid rgba(128,128,128,.35);background:none}
#ID td{font-family:ui-monospace,monospace;cursor:default}
#ID p,#ID td span{position:absolute;left:0;right:0;bottom:0;height:3.3em;margin:0;
text-align:left;white-space:normal;font-size:.9rem;line-height:1.5;overflow:hidden}
#ID td span{visibility:hidden}
#ID td:hover,#ID td:focus{outline:2px solid currentColor;outline-offset:-1px}
#ID td:hover span,#ID:not(:has(td:hover)) td:focus span{visibility:visible}
#ID:has(td:hover) p,#ID:has(td:focus) p{visibility:hidden}
""".replace("\n", "")
