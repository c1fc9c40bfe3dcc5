"""Masked language modelling from text to checkpoint: masks, packing, optimiser, schedule, loop.

Chapter 12 builds this module. Sources: Devlin et al., "BERT", arXiv:1810.04805, section 3.1
(masked tokens); Warner et al., "Smarter, Better, Faster, Longer", arXiv:2412.13663, section 2.2
and appendix A (the recipe), and the authors' code, github.com/AnswerDotAI/ModernBERT:
yamls/modernbert, src/sequence_packer.py, src/bert_layers/initialization.py.

A run is one function, ``pretrain(config)``, and one folder: token shards, a log of one JSON
object a line, and a checkpoint from which the run goes on as if it had never stopped.
``export(folder, target)`` makes a loadable model of it at any time.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import pickle
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, astuple, dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import cloze, data
from .atomic import claiming, writing
from .config import ConfigError, ModernBertConfig
from .distributed import World, joined
from .heads import ModernBertForMaskedLM
from .recipe import PretrainingConfig, check
from .sources import find_folder
from .tokenizer import Tokenizer, train_bpe
from .unpadding import first_fit, join

IGNORED = -100  # the label of a position that carries no loss
WINDOW = (
    8  # shards whose pieces are shuffled together: what the order of training may hold in memory
)
LOOKAHEAD = 16  # pieces that do not fit before a batch counts as full


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why, and from where it can."""


# --- masking ------------------------------------------------------------------------------


def mask_tokens(
    input_ids: Tensor,
    generator: torch.Generator,
    *,
    mask_token_id: int,
    special_ids: Iterable[int],
    vocab_size: int,
    probability: float = 0.3,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Hide some tokens and return what the model sees and what it must say.

    Each token that is not special is chosen with ``probability``. Of the chosen, ``mask_share``
    become [MASK], ``random_share`` a random ordinary token, the rest stay as they are, so that
    the model cannot trust a token for being visible.

    The paper masks 30 % and says no more; its code splits them 80/10/10 as here, but chooses
    special tokens like all others and draws them too: pass no ``special_ids`` to do the same.

    Args:
        input_ids: int64 of any shape.
        generator: on the CPU; the only source of chance.
        special_ids: never chosen, never drawn.

    Returns:
        Inputs and labels, both int64 shaped as ``input_ids``; labels hold the original id where
        a token was chosen and -100 elsewhere.

    Source: arXiv:1810.04805, section 3.1; the rate is arXiv:2412.13663's, section 2.2.2; the
    authors' src/sequence_packer.py. Chapter 12.
    """
    special = torch.zeros(vocab_size, dtype=torch.bool)
    special[torch.tensor(list(special_ids), dtype=torch.long)] = True
    chosen = torch.rand(input_ids.shape, generator=generator) < probability
    chosen &= ~special[input_ids]
    labels = torch.where(chosen, input_ids, IGNORED)
    # One more draw decides the fate of every chosen token.
    fate = torch.rand(input_ids.shape, generator=generator)
    ordinary = (~special).nonzero().squeeze(-1)  # (ordinary tokens,)
    draw = torch.randint(len(ordinary), input_ids.shape, generator=generator)
    masked = torch.where(chosen & (fate < mask_share), mask_token_id, input_ids)
    replaced = chosen & (fate >= mask_share) & (fate < mask_share + random_share)
    return torch.where(replaced, ordinary[draw], masked), labels


class MaskingCollator:
    """Adds masks and labels to a batch, padded or packed; chapter 12.

    Call it with a dict that has ``input_ids`` (int64, any shape); it returns a copy in which they
    are masked and ``labels`` stand beside them. Everything else passes through.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        probability: float = 0.3,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        seed: int = 0,
        mask_special_tokens: bool = False,
    ) -> None:
        self.settings = {
            "mask_token_id": tokenizer.mask_token_id,
            "special_ids": [] if mask_special_tokens else special_ids(tokenizer),
            "vocab_size": len(tokenizer),
            "probability": probability,
            "mask_share": mask_share,
            "random_share": random_share,
        }
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: dict) -> dict:
        input_ids, labels = mask_tokens(batch["input_ids"], self.generator, **self.settings)
        return {**batch, "input_ids": input_ids, "labels": labels}


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that are never masked and never drawn as a random token."""
    roles = ("unk", "cls", "sep", "pad", "mask")
    ids = (getattr(tokenizer, f"{role}_token_id") for role in roles)
    return sorted({i for i in ids if i is not None})


# --- packing ------------------------------------------------------------------------------


def cut_documents(shard: data.TokenShard, max_length: int) -> np.ndarray:
    """Cut each document into pieces that fit ``max_length`` with [CLS] and [SEP] around them.

    A long document is cut into pieces of nearly equal length, so that no stub is left over.

    Returns:
        (pieces, 2) int64: start and length in the shard's tokens. Every token is in one piece.
    """
    room = max_length - 2
    if room < 1:
        raise ValueError(f"max_length {max_length} leaves no room between [CLS] and [SEP]")
    pieces = []
    for start, end in itertools.pairwise(shard.offsets.tolist()):
        parts = math.ceil((end - start) / room)
        bounds = [start + (end - start) * i // parts for i in range(parts + 1)] if parts else []
        pieces.extend((a, b - a) for a, b in itertools.pairwise(bounds))
    return np.array(pieces, dtype=np.int64).reshape(-1, 2)


class PackedBatches:
    """Endless packed streams of whole pieces, shuffled anew in every epoch; chapter 12.

    A stream is a dict of ``input_ids`` (N,) int64, ``cu_seqlens`` (S + 1,) int32 and
    ``max_seqlen``: each sequence is [CLS], a piece of one document, [SEP], and attention stays
    within it, so packing mixes nothing. Pieces that do not fit wait for the next streams.

    What comes next depends on the arguments and on ``state_dict`` alone. Shards are read from
    disk as they are needed: the pieces of ``WINDOW`` shards, drawn at random, are shuffled
    together, so memory does not grow with the corpus.

    Args:
        shards: where the tokens are.
        tokens_per_batch: the most tokens in a stream, special tokens counted.
        max_length: the longest sequence, special tokens counted.
        repeats: how often each shard is seen in one epoch.
        seed: of the order; one number, or several.

    Attributes:
        tokens: how many were handed out so far, special tokens counted.

    Raises:
        ConfigError: where there is no text, or a sequence does not fit a stream.
    """

    def __init__(
        self,
        shards: list[data.TokenShard],
        tokenizer: Tokenizer,
        *,
        tokens_per_batch: int,
        max_length: int,
        repeats: list[int] | None = None,
        seed: int | list[int] = 0,
    ) -> None:
        found, room = f"sequences of {max_length} tokens", f"at most {tokens_per_batch}, a stream"
        check(max_length <= tokens_per_batch, found, room, "Cut them shorter.")
        self.shards, self.max_length, self.capacity = shards, max_length, tokens_per_batch
        self.cls, self.sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.visits = np.repeat(np.arange(len(shards)), repeats or 1)
        text = sum(len(shards[i].tokens) for i in self.visits)
        check(text > 0, "no text", "at least one token", "Look at the corpora and their repeats.")
        self.seed = [seed] if isinstance(seed, int) else list(seed)
        self.tokens = 0
        self.epoch, self.window, self.position, self.waiting = 0, 0, 0, []
        self.order = self.shuffled()

    def shuffled(self) -> np.ndarray:
        """The pieces of this window of this epoch in the order of training: (pieces, 3)."""
        shards = np.random.default_rng([*self.seed, self.epoch]).permutation(self.visits)
        shards = shards[self.window * WINDOW : (self.window + 1) * WINDOW]
        pieces = [np.zeros((0, 3), dtype=np.int64), *map(self.pieces, shards)]
        random = np.random.default_rng([*self.seed, self.epoch, self.window])
        return random.permutation(np.concatenate(pieces))

    def pieces(self, shard: int) -> np.ndarray:
        """Where the pieces of a shard are: (pieces, 3), its number, start and length."""
        cut = cut_documents(self.shards[shard], self.max_length)
        return np.insert(cut, 0, shard, axis=1)

    def next_piece(self) -> list[int]:
        """One that waits, or the next in order."""
        if self.waiting:
            return self.waiting.pop(0)
        while self.position == len(self.order):
            self.window, self.position = self.window + 1, 0
            if self.window * WINDOW >= len(self.visits):
                self.epoch, self.window = self.epoch + 1, 0
            self.order = self.shuffled()
        self.position += 1
        return self.order[self.position - 1].tolist()

    def plan(self, streams: int) -> list[list[list[int]]]:
        """What goes into the next streams, filled as well as ``first_fit`` does: their pieces."""
        room, chosen, left = streams * self.capacity, [], []
        while room > 2 and len(left) < LOOKAHEAD:
            piece = self.next_piece()
            fits = piece[2] + 2 <= room
            (chosen if fits else left).append(piece)
            room -= (piece[2] + 2) * fits
        bins = first_fit([length + 2 for _, _, length in chosen], self.capacity)
        self.waiting = [chosen[i] for spare in bins[streams:] for i in spare] + left + self.waiting
        filled = [[chosen[i] for i in full] for full in bins[:streams]]
        self.tokens += sum(map(stream_length, filled))
        return filled

    def take(self, streams: int) -> list[dict]:
        """The next streams."""
        return [self.stream(pieces) for pieces in self.plan(streams)]

    def __iter__(self) -> Iterator[dict]:
        while True:
            yield from self.take(1)

    def one_epoch(self) -> Iterator[dict]:
        """Every piece once, in the order of the shards; for evaluation. Nothing is counted."""
        group: list[list[int]] = []
        for piece in itertools.chain.from_iterable(map(self.pieces, range(len(self.shards)))):
            if stream_length(group) + piece[2] + 2 > self.capacity:
                yield self.stream(group)
                group = []
            group.append(piece.tolist())
        yield self.stream(group)

    def stream(self, pieces: list[list[int]]) -> dict:
        """Gather pieces into one packed stream."""
        sequences = []
        for shard, start, length in pieces:
            ids = np.empty(length + 2, dtype=np.int64)
            ids[0], ids[-1] = self.cls, self.sep
            ids[1:-1] = self.shards[shard].tokens[start : start + length]
            sequences.append(torch.from_numpy(ids))
        return join(sequences)

    def state_dict(self) -> dict:
        """Where the data stands, as plain numbers."""
        names = ("epoch", "window", "position", "tokens", "waiting")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        """Go on where ``state_dict`` was taken."""
        vars(self).update(state, waiting=[list(piece) for piece in state["waiting"]])
        self.order = self.shuffled()


def stream_length(pieces: list[list[int]]) -> int:
    """Tokens of a stream of these pieces, special ones counted."""
    return sum(length + 2 for _, _, length in pieces)


# --- optimiser --------------------------------------------------------------------------


class AdamW(torch.optim.Optimizer):
    """AdamW whose weight decay does not depend on the learning rate; chapter 12.

    PyTorch's multiplies the decay by the learning rate: a weight shrinks by ``lr * weight_decay``
    at each step, so whoever halves the rate halves the decay. Here, as in the paper and as the
    authors of AdamW meant it, it shrinks by ``weight_decay`` itself while the rate is at its peak,
    and by the same share of that as the rate is of its peak. For the same effect the number has to
    be smaller: 1e-5 in the paper against PyTorch's usual 1e-2.

    Args:
        params: groups with their own ``weight_decay``.
        lr: the peak of the learning rate; set each group's ``lr`` to schedule it.
        fully_decoupled: False for PyTorch's rule.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101,
    algorithm 2; arXiv:2412.13663, appendix A.3.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        fully_decoupled: bool = True,
    ) -> None:
        settings = {"lr": lr, "peak_lr": lr, "betas": tuple(betas), "eps": eps}
        settings |= {"weight_decay": weight_decay, "fully_decoupled": fully_decoupled}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
        """Change one parameter."""
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        # A mean over few steps leans less on the zeros it began with: Adam's bias correction.
        beta1, beta2 = (1 - (1 - beta) / (1 - beta ** state["step"]) for beta in group["betas"])
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
        rate = group["lr"] / self.surprise(gradient, square, group["eps"])
        unit = group["peak_lr"] if group["fully_decoupled"] else 1.0
        parameter.mul_(1 - rate / unit * group["weight_decay"])
        parameter.sub_(mean / (square.sqrt() + group["eps"]) * rate)

    def surprise(self, gradient: Tensor, square: Tensor, eps: float) -> float | Tensor:
        """What the learning rate of this parameter is divided by."""
        return 1.0


class StableAdamW(AdamW):
    """AdamW with smaller steps where the gradient is larger than it used to be; chapter 12.

    Adam divides by a slow mean of the squared gradient. When gradients grow suddenly, that mean is
    too small and the step too large. So the rate of each tensor is divided by the root mean square
    of gradient over expectation, where that is above 1. It stands in for gradient clipping.

    Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language
    models", arXiv:2304.13013, algorithm 2; arXiv:2412.13663, section 2.2.2.
    """

    def surprise(self, gradient: Tensor, square: Tensor, eps: float) -> Tensor:
        """Root mean square of the gradient over what was expected, at least 1: a scalar tensor."""
        return (gradient.square() / square.clamp(min=eps**2)).mean().sqrt().clamp(min=1.0)


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_embeddings: bool = False
) -> list[dict]:
    """Two groups for AdamW: matrices decay, norms, biases and the embedding do not.

    The paper spares norms and biases (arXiv:2412.13663, appendix A.3). The embedding is spared
    too, unless it is asked for: here most rows are rare words, which decay would shrink between
    their appearances. The authors' code decays it.
    """
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and (decay_embeddings or "tok_embeddings" not in name)
        (decayed if matrix else spared).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


# --- schedules --------------------------------------------------------------------------


def warmup_stable_decay(tokens: float, *, warmup: float, decay: float, total: float) -> float:
    """The learning rate as a share of its peak, after ``tokens`` of ``total`` training tokens.

    Linear over the first ``warmup`` tokens, then constant, then 1 - sqrt over the last ``decay``.
    Until the decay starts nothing depends on ``total``: a run can be prolonged, or ended early,
    from any checkpoint of the stable part.

    Source: arXiv:2412.13663, section 2.2.2 (trapezoidal schedule, 1-sqrt decay).
    """
    if tokens < warmup:
        return tokens / warmup
    start = total - decay
    if tokens <= start or not decay:
        return 1.0
    return max(0.0, 1.0 - math.sqrt((tokens - start) / decay))


def batch_size(tokens: int, *, start: int, full: int, warmup: int) -> int:
    """How large the next batch is after ``tokens`` training tokens, in tokens.

    It grows from ``start`` by ``start`` until it is ``full`` after ``warmup`` tokens. Each size
    is used for as many steps as the others, so a larger one for more tokens.

    Source: arXiv:2412.13663, appendix A.1.
    """
    levels = range(1, full // start)  # those below the full size
    seen = 0
    for level in levels:
        seen += level
        if tokens < warmup * seen / sum(levels):
            return level * start
    return full


# --- weights from weights ---------------------------------------------------------------

# Which axis of the model each axis of a parameter runs along, by the name of its module: C hidden
# size, I intermediate size, heads, and parts of these one after the other.
AXES = {
    "tok_embeddings": ("V", "C"),
    "norm": ("C",),
    "attn_norm": ("C",),
    "mlp_norm": ("C",),
    "final_norm": ("C",),
    "Wqkv": ("q|k|v", "C"),
    "attn.Wo": ("C", "heads"),
    "Wi": ("input|gate", "C"),
    "mlp.Wo": ("C", "I"),
    "dense": ("C", "C"),
    "decoder": ("V", "C"),
}


def wrap(new: int, old: int) -> Tensor:
    """For each of ``new`` places the one of ``old`` that it is a copy of: (new,) int64.

    The old row stands in the middle, and goes on around both ends.

    >>> wrap(7, 3).tolist()
    [1, 2, 0, 1, 2, 0, 1]
    """
    return (torch.arange(new) - (new - old) // 2) % old


@torch.no_grad()
def tile(small: ModernBertForMaskedLM, large: ModernBertForMaskedLM) -> None:
    """Start a larger model from a smaller one, as ModernBERT-large started from base.

    Every matrix of the small model stands in the middle of the large one's, head by head, and is
    repeated around its edges. Layer i comes from layer round(i * old / new). A norm that the small
    model lacks (layer 0 has no ``attn_norm``) keeps its starting value.

    Raises:
        ConfigError: where the large model is smaller, or differs in vocabulary or head dimension.

    Source: arXiv:2412.13663, appendix A.2; the authors' src/bert_layers/initialization.py.
    """
    old, new = small.config, large.config
    for name in ("vocab_size", "head_dim"):
        found, expected = (f"{name} {getattr(c, name)}" for c in (new, old))
        check(found == expected, found, expected + " as in the small model", "Keep it.")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        found, least = (getattr(c, name) for c in (new, old))
        check(found >= least, f"{name} {found}", f"at least {least}", "Tile to a larger model.")
    inner = wrap(new.intermediate_size, old.intermediate_size)
    heads = wrap(new.num_attention_heads, old.num_attention_heads) * old.head_dim
    heads = (heads[:, None] + torch.arange(old.head_dim)).flatten()
    maps = {
        "V": torch.arange(old.vocab_size),
        "C": wrap(new.hidden_size, old.hidden_size),
        "I": inner,
        "heads": heads,
        "q|k|v": torch.cat([heads + part * old.hidden_size for part in range(3)]),
        "input|gate": torch.cat([inner, inner + old.intermediate_size]),
    }
    source = dict(small.named_parameters())
    layers = old.num_hidden_layers / new.num_hidden_layers
    for name, parameter in large.named_parameters():
        *path, module, _ = name.split(".")
        if "layers" in path:
            at = path.index("layers") + 1
            nearest = min(round(int(path[at]) * layers), old.num_hidden_layers - 1)
            name = name.replace(f"layers.{path[at]}.", f"layers.{nearest}.")
        if name in source:
            weight = source[name]
            axes = AXES.get(".".join([*path[-1:], module])) or AXES[module]
            for dim, axis in enumerate(axes[: weight.ndim]):
                weight = weight.index_select(dim, maps[axis])
            parameter.copy_(weight)


def average_weights(models: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each parameter over several models of one shape, summed in float64.

    ModernBERT-base is the mean of its last checkpoint and the three best of the decay.
    Source: arXiv:2412.13663, appendix A.4.
    """
    models = list(models)
    return {
        name: sum(model[name].double() for model in models).div(len(models)).to(weight.dtype)
        for name, weight in models[0].items()
    }


# --- evaluation ---------------------------------------------------------------------------


@dataclass
class MaskedScores:
    """Sums over masked positions, from which the means follow."""

    positions: int = 0
    loss_sum: float = 0.0
    top1: int = 0
    top5: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count M predictions: logits (M, V), or (1, V) for the same one everywhere."""
        log_probabilities = logits.float().log_softmax(dim=-1).expand(len(labels), -1)  # (M, V)
        best = log_probabilities.topk(5, dim=-1).indices  # (M, 5)
        hit = best == labels[:, None]  # (M, 5)
        self.positions += len(labels)
        self.loss_sum -= log_probabilities.gather(1, labels[:, None]).double().sum().item()
        self.top1 += int(hit[:, 0].sum())
        self.top5 += int(hit.any(dim=-1).sum())

    def means(self) -> dict[str, float]:
        """Loss in nats a token, top-1 and top-5 accuracy, and how many positions there were."""
        return {
            "loss": self.loss_sum / self.positions,
            "top1": self.top1 / self.positions,
            "top5": self.top5 / self.positions,
            "positions": self.positions,
        }


def fixed_masks(batches: Iterable[dict], tokenizer: Tokenizer, probability: float = 0.15) -> list:
    """Held-out batches with masks that never change, so that scores can be compared.

    15 % of the tokens, as the published recipe evaluates, and every one of them shows [MASK].
    """
    collate = MaskingCollator(tokenizer, probability, mask_share=1.0, random_share=0.0, seed=0)
    return [collate(batch) for batch in batches]


@torch.no_grad()
def evaluate(
    model: ModernBertForMaskedLM, batches: Iterable[dict], world: World | None = None
) -> dict[str, float]:
    """Masked loss (nats), top-1 and top-5 accuracy of a model with ``sparse_prediction``.

    The processes of a ``world`` take turns with the batches; each gets the scores of all.
    """
    world, was_training = world or World("cpu"), model.training
    model.eval()
    scores = MaskedScores()
    for batch, counts in world.turns(batches):
        batch = to_device(batch, model.decoder.weight.device)
        labels, logits = batch["labels"], model(**batch).logits
        if counts:
            scores.add(logits, labels[labels != IGNORED])
    model.train(was_training)
    return MaskedScores(*map(world.sum, astuple(scores))).means()


def unigram_logits(shards: list[data.TokenShard], repeats: list[int], vocab_size: int) -> Tensor:
    """Log-probabilities (V,) of a model that knows only how often each token occurs.

    One is added to every count, so that no held-out token is impossible.
    """
    counts = np.ones(vocab_size)
    for shard, repeat in zip(shards, repeats, strict=True):
        counts += repeat * np.bincount(shard.tokens, minlength=vocab_size)
    return torch.from_numpy(np.log(counts / counts.sum()))


def evaluate_unigram(logits: Tensor, batches: Iterable[dict]) -> dict[str, float]:
    """The same scores for ``unigram_logits``, on the same positions."""
    scores = MaskedScores()
    for batch in batches:
        labels = batch["labels"]
        scores.add(logits[None], labels[labels != IGNORED])
    return scores.means()


# --- precision and place ------------------------------------------------------------------


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16; "auto" does on GPUs that have it (Ampere and newer)."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return precision == "bfloat16"


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch whose tensors are on ``device``."""
    return {k: x.to(device) if torch.is_tensor(x) else x for k, x in batch.items()}


# --- data of a run ----------------------------------------------------------------------


@dataclass
class TrainingData:
    """Tokens of a run, by corpus: shards to train on, and shards held out."""

    tokenizer: Tokenizer
    train: dict[str, list[data.TokenShard]]
    held_out: dict[str, list[data.TokenShard]]

    def mixture(self, corpora: dict[str, int]) -> tuple[list[data.TokenShard], list[int]]:
        """The shards to train on, and how often each is seen in an epoch."""
        pairs = [
            (shard, repeat)
            for name, repeat in corpora.items()
            for shard in self.train[data.corpus_name(name)]
        ]
        return [shard for shard, _ in pairs], [repeat for _, repeat in pairs]


def prepare_data(config: PretrainingConfig) -> TrainingData:
    """Read the corpora, train the tokenizer and write the shards, or open those of this run.

    Everything lies under the run's folder: tokenizer/, train/<corpus>/, held_out/<corpus>/, and
    corpora.json with source, licence, size and hash of each corpus. That is written last: what a
    stopped process leaves is begun again.

    Raises:
        CorpusNotFoundError: where a corpus is not here.
        ConfigError: where a corpus is empty, nothing is held out, or the folder's data is of
            another recipe.
    """
    folder = Path(config.folder)
    names = [data.corpus_name(name) for name in all_corpora(config)]
    twice = {name for name in names if names.count(name) > 1}
    check(not twice, f"two corpora called {twice}", "different names", "Rename a file or folder.")
    if not (folder / "corpora.json").exists():
        _write_data(config, folder)
    made_with = json.loads((folder / "corpora.json").read_text("utf-8"))["made_with"]
    compare(data_settings(config), made_with, folder / "corpora.json")
    return TrainingData(
        tokenizer=Tokenizer.from_pretrained(folder / "tokenizer"),
        train={name: data.open_shards(folder / "train" / name) for name in names},
        held_out={name: data.open_shards(folder / "held_out" / name) for name in names},
    )


def all_corpora(config: PretrainingConfig) -> dict[str, int]:
    """Every corpus that some phase names, with its repeats where it is named first."""
    named: dict[str, int] = {}
    for recipe in [config, *config.columns()]:
        named = recipe.corpora | named
    return named


def data_settings(config: PretrainingConfig) -> dict:
    """What tokenizer and shards follow from, ready for JSON."""
    names = ("vocab_size", "tokenizer", "held_out_percent")
    return {"corpora": all_corpora(config)} | {name: getattr(config, name) for name in names}


def compare(mine: dict, theirs: dict, file: Path) -> None:
    """Refuse a recipe that does not fit what a run's folder was made with."""
    for name, value in theirs.items():
        found, expected = (f"{name} {json.dumps(v)}" for v in (mine.get(name), value))
        if found != expected:
            remedy = "Restore the recipe, or train in another folder."
            raise ConfigError(found, expected + ", as in this folder", remedy, file)


def _write_data(config: PretrainingConfig, folder: Path) -> None:
    corpora = {name: load_corpus(name, config) for name in all_corpora(config)}

    def training_text() -> Iterator[str]:
        for name, repeats in all_corpora(config).items():
            for document in itertools.chain.from_iterable([corpora[name].documents] * repeats):
                if not data.is_held_out(document, config.held_out_percent):
                    yield document

    longest = config.model.get("max_position_embeddings", 8192)
    if config.tokenizer is None:
        tokenizer = Tokenizer(
            train_bpe(training_text(), config.vocab_size), model_max_length=longest
        )
    else:
        tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    tokenizer.save_pretrained(folder / "tokenizer")

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.backend.encode_batch(texts, add_special_tokens=False)]

    summaries = []
    for named, corpus in corpora.items():
        tally = data.Tally()
        train, held_out = (
            data.ShardWriter(folder / p / corpus.name) for p in ("train", "held_out")
        )
        for text, ids in data.tokenise(tally.watch(corpus.documents), encode_batch):
            (held_out if data.is_held_out(text, config.held_out_percent) else train).add(ids)
        sizes = {
            f"{kind}_tokens": sum(len(shard.tokens) for shard in writer.close())
            for kind, writer in (("train", train), ("held_out", held_out))
        }
        check(sum(sizes.values()) > 0, "no text", "a corpus with some", f"Look at {named}.")
        remedy = "Change held_out_percent; so few documents fall on one side by chance."
        found = f"{corpus.name}: nothing to train on or nothing held out, {sizes}"
        check(all(sizes.values()), found, "some documents on both sides", remedy)
        about = {"name": corpus.name, "source": corpus.source, "licence": corpus.licence}
        repeats = {"repeats": all_corpora(config)[named]}
        summaries.append(about | tally.summary() | repeats | sizes)
    with writing(folder / "corpora.json") as file:
        about = {"made_with": data_settings(config), "corpora": summaries}
        file.write(json.dumps(about, indent=2).encode())


def load_corpus(name: str, config: PretrainingConfig) -> data.Corpus:
    """One corpus of ``data.py`` by its name, or the reader's own text by its path."""
    if name == "wordnet":
        return data.wordnet(config.wordnet_folder)
    return data.CORPORA[name]() if name in data.CORPORA else data.text_files(name)


# --- one run ----------------------------------------------------------------------------


class Run:
    """Model, optimiser, data and chance of one run, as ``pretrain`` steps through it.

    ``step()`` is one step of the optimiser on one batch; ``state_dict()`` holds all that the next
    step depends on, so a run that is resumed gives the same weights, bit for bit on one machine.
    """

    def __init__(
        self, config: PretrainingConfig, training_data: TrainingData, world: World | None = None
    ) -> None:
        self.config, self.data, self.world = config, training_data, world or World(config.device)
        self.phases = config.columns()
        for recipe in self.phases:
            first = (recipe.batch_warmup_from or recipe.batch_tokens) // stream_tokens(recipe)
            found, size = f"batches of {first} streams", self.world.size
            remedy = "Lower microbatch_tokens, or use fewer processes."
            check(first % size == 0, found, f"a multiple of {size}, the processes", remedy)
        torch.manual_seed(config.seed)
        self.model = build_model(config, training_data.tokenizer).to(self.world.device).train()
        self.module = self.world.wrap(self.model)
        groups = parameter_groups(self.model, config.weight_decay, config.decay_embeddings)
        self.optimizer = {"AdamW": AdamW, "StableAdamW": StableAdamW}[config.optimizer](
            groups,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            fully_decoupled=config.fully_decoupled_decay,
        )
        self.collate = MaskingCollator(
            training_data.tokenizer,
            config.mask_probability,
            config.mask_share,
            config.random_share,
            mask_special_tokens=config.mask_special_tokens,
        )
        self.bfloat16 = uses_bfloat16(config.precision, self.world.device)
        self.steps, self.seconds, self.earlier = 0, 0.0, 0
        self.saved = 0  # step of the last good checkpoint
        self.begin(0)

    def begin(self, phase: int) -> None:
        """Set a phase up: its data from the start, its rates, its rotary base."""
        self.phase, self.recipe = phase, self.phases[phase]
        shards, repeats = self.data.mixture(self.recipe.corpora)
        self.batches = PackedBatches(
            shards,
            self.data.tokenizer,
            tokens_per_batch=stream_tokens(self.recipe),
            max_length=self.recipe.max_sequence_length,
            repeats=repeats,
            seed=[self.config.seed, phase],
        )
        for group, decay in zip(
            self.optimizer.param_groups, (self.recipe.weight_decay, 0.0), strict=True
        ):
            group |= {"peak_lr": self.recipe.learning_rate, "weight_decay": decay}
        for recipe in self.phases[: phase + 1]:
            if recipe.global_rope_theta is not None:  # the tables are made anew in every pass
                config = self.model.config
                config.global_rope_theta = recipe.global_rope_theta
                config.rope_parameters["full_attention"]["rope_theta"] = recipe.global_rope_theta

    @property
    def tokens(self) -> int:
        """Training tokens so far, special tokens counted."""
        return self.earlier + self.batches.tokens

    @property
    def finished(self) -> bool:
        """Whether all phases are seen: the next full batch would go past the end of the last."""
        recipe = self.recipe
        full = self.batches.tokens + recipe.batch_tokens > recipe.training_tokens
        return full and self.phase == len(self.phases) - 1

    def learning_rate(self) -> float:
        """The rate for the next step."""
        recipe = self.recipe
        return recipe.learning_rate * warmup_stable_decay(
            self.batches.tokens,  # those of the coming step included, so the first is not wasted
            warmup=recipe.warmup_tokens,
            decay=recipe.decay_tokens,
            total=recipe.training_tokens,
        )

    @property
    def decaying(self) -> bool:
        """Whether the rate is on its way down."""
        recipe = self.recipe
        return self.batches.tokens > recipe.training_tokens - recipe.decay_tokens

    def autocast(self) -> AbstractContextManager:
        """Around passes: matrices in bfloat16 where the recipe and the hardware say so."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bfloat16)

    def step(self) -> dict[str, float]:
        """Train on one batch; return loss (nats a masked token), gradient norm and rate.

        Raises:
            TrainingError: for a loss or a gradient that is no number; the weights stay as they
                were.
        """
        began, recipe, world = time.perf_counter(), self.recipe, self.world
        if self.batches.tokens + recipe.batch_tokens > recipe.training_tokens:
            self.earlier += self.batches.tokens
            self.begin(self.phase + 1)
            recipe = self.recipe
        size = batch_size(
            self.batches.tokens,
            start=recipe.batch_warmup_from or recipe.batch_tokens,
            full=recipe.batch_tokens,
            warmup=recipe.batch_warmup_tokens,
        )
        plan = self.batches.plan(size // stream_tokens(recipe))
        mine = world.share([stream_length(pieces) for pieces in plan])
        streams = {i: self.mask(self.batches.stream(plan[i]), i) for i in mine}
        masked = {i: int((stream["labels"] != IGNORED).sum()) for i, stream in streams.items()}
        loss, total = 0.0, world.sum(sum(masked.values()))
        for i, stream in streams.items():
            # Dropout, too, follows from step and stream alone.
            torch.manual_seed(self.draw(i, 1))
            with world.accumulating(self.module, last=i == mine[-1]):
                with self.autocast():
                    mean = self.module(**to_device(stream, world.device)).loss
                # Each masked token counts the same, whichever stream it is in. Processes average
                # their gradients, hence the factor.
                part = mean * (masked[i] / total)
                (part * world.size).backward()
            loss += part.item()
        loss, rate = world.sum(loss), self.learning_rate()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or math.inf)
        norm = world.number(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.steps + 1}: the loss is {loss}, the norm of its gradient {norm}. "
                "Lower the learning rate or lengthen the warm-up."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.seconds += time.perf_counter() - began
        return {"loss": loss, "gradient_norm": norm, "lr": rate, "batch": size}

    def mask(self, stream: dict, number: int) -> dict:
        """Mask a stream of the coming step; at least one token of it, since a loss needs some."""
        self.collate.generator.manual_seed(self.draw(number, 0))
        while True:
            masked = self.collate(stream)
            if (masked["labels"] != IGNORED).any():
                return masked

    def draw(self, stream: int, purpose: int) -> int:
        """A seed for one stream of the coming step: the same in every process, and when resumed."""
        origin = [self.config.seed, self.steps, stream, purpose]
        return int(np.random.SeedSequence(origin).generate_state(1)[0])

    def fixed(self) -> dict:
        """What may not change while a run goes on, ready for JSON."""
        fixed = {"seed": self.config.seed, "model": self.config.model, "phase": self.phase}
        fixed["max_sequence_length"] = self.recipe.max_sequence_length
        fixed["repeats"] = self.recipe.corpora
        fixed["shards"] = [shard.sha256 for shard in self.batches.shards]
        fixed["optimizer"] = self.config.optimizer
        return json.loads(json.dumps(fixed))

    def state_dict(self) -> dict:
        """Tensors and plain values only, so that it loads with ``weights_only=True``.

        Every process has to call it, and the first one gets it. Parameters go by their names and
        are whole, so another number of processes can go on from them.
        """
        whole, parameters = self.world.whole, dict(self.model.named_parameters())
        random = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return {
            "fixed": self.fixed(),
            "model": {name: whole(p.detach()) for name, p in parameters.items()},
            "optimizer": {
                name: {k: whole(x) if torch.is_tensor(x) else x for k, x in state.items()}
                for name, p in parameters.items()
                if (state := self.optimizer.state.get(p))
            },
            "progress": [self.steps, self.seconds, self.earlier],
            "batches": self.batches.state_dict(),
            "random": random,
        }

    def load_state_dict(self, state: dict, file: Path | str = "checkpoint.pt") -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ConfigError: where the recipe does not fit what was trained so far.
        """
        phase = state["fixed"]["phase"]
        found, expected = f"{len(self.phases)} phases", f"more than {phase}, as in this folder"
        check(phase < len(self.phases), found, expected, "Restore the recipe.")
        self.begin(phase)
        compare(self.fixed(), state["fixed"], Path(file))
        part = self.world.part
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(part(state["model"][name], parameter))
                if name in state["optimizer"]:
                    self.optimizer.state[parameter] = {
                        key: part(x, parameter).clone() if torch.is_tensor(x) else x
                        for key, x in state["optimizer"][name].items()
                    }
        self.steps, self.seconds, self.earlier = state["progress"]
        self.saved = self.steps
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"] and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.world.device)


def stream_tokens(recipe: PretrainingConfig) -> int:
    """The most tokens in one packed stream."""
    return recipe.microbatch_tokens or recipe.batch_tokens


def build_model(config: PretrainingConfig, tokenizer: Tokenizer) -> ModernBertForMaskedLM:
    """The model that a run starts from: random weights, or those of a smaller model, tiled.

    A recipe that names weights and no sizes goes on with that very model. Only masked positions
    are decoded in training.
    """
    small = None
    if config.initialize_from is not None:
        small = ModernBertForMaskedLM.from_pretrained(config.initialize_from)
    vocab_size = config.vocab_size if config.tokenizer is None else len(tokenizer)
    values = {
        "pad_token_id": tokenizer.pad_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sparse_prediction": True,
    }
    if small and not config.model:
        sizes = small.config.with_overrides(**values)
    else:
        values["vocab_size"] = small.config.vocab_size if small else vocab_size
        sizes = ModernBertConfig(**values | config.model)
    model = ModernBertForMaskedLM(sizes)
    check(
        len(tokenizer) <= model.config.vocab_size,
        f"a tokenizer of {len(tokenizer):,} ids",
        f"at most {model.config.vocab_size:,}, those of the model",
        "Take the model's own tokenizer.",
    )
    if small is not None:
        tile(small, model)
    return model


def pretrain(
    config: PretrainingConfig,
    *,
    resume: bool = False,
    world: World | None = None,
    progress: bool = False,
) -> Run:
    """Train until all phases are seen.

    The run's folder gets recipe.json, the data, log.jsonl (one object a line: start, train,
    evaluation, end), checkpoint.pt, and at the end loss.png.

    Args:
        resume: go on from the folder's checkpoint, or from the start if there is none yet.
        world: where it runs; by default with the processes that ``torchrun`` has started, or
            alone. Several have to see the same folder.
        progress: whether to show a bar on a terminal.

    Raises:
        ConfigError: for a recipe that does not fit itself, its data or the run that it resumes.
        CorpusNotFoundError: where a corpus is not here.
        TrainingError: for a loss that is no number, a disk that takes no more, or another process
            that is gone; the last good checkpoint is intact. Chapter 12.
        OSError: where the folder cannot be written, or another process trains in it.
    """
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        world = world or stack.enter_context(joined(config.device, config.parallel))
        if world.rank == 0:
            stack.enter_context(claiming(folder))
            refuse_to_overwrite(folder, resume)
            try:
                training_data = prepare_data(config)  # alone: two must not write the same files
            except OSError as error:
                elsewhere = error.filename and not Path(error.filename).is_relative_to(folder)
                if elsewhere or isinstance(error, data.CorpusNotFoundError):
                    raise
                raise TrainingError(f"{folder} cannot be written: {error}") from error
        world.wait()
        if world.rank:
            remedy = "Put the run's folder where all machines can reach it."
            found = f"no data for process {world.rank}"
            expected = "what the first process has written"
            check((folder / "corpora.json").exists(), found, expected, remedy)
            training_data = prepare_data(config)
        run = Run(config, training_data, world)
        if (folder / "checkpoint.pt").exists():
            load_checkpoint(run, folder / "checkpoint.pt")
        try:
            if world.rank == 0:  # now that the recipe is known to fit what is there
                with writing(folder / "recipe.json") as file:
                    file.write(json.dumps(asdict(config), indent=2).encode())
            train(run, progress)
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError | TrainingError) else world.lost(error)
            if cause is None:
                raise
            raise TrainingError(
                f"{cause}\nStopped after step {run.steps}. The checkpoint of step {run.saved} in "
                f"{folder} is intact: resume from there."
            ) from error
    return run


def refuse_to_overwrite(folder: Path, resume: bool) -> None:
    """Leave a run alone unless it is to go on."""
    if (folder / "checkpoint.pt").exists() and not resume:
        remedy = "Resume it (--resume), or name another folder."
        raise ConfigError("a run in this folder", "none yet", remedy, folder)


def train(run: Run, progress: bool) -> None:
    """Step to the end, and write down and save as the recipe says."""
    from tqdm import tqdm

    config, folder = run.config, Path(run.config.folder)
    held_out = held_out_batches(config, run.data)
    log = Log(folder, active=run.world.rank == 0, steps=run.steps)
    log.write("start", **describe_run(run, held_out))
    # Asked of the run and not of the disk: there, other processes may see what the first has just
    # written, and not wait for it.
    if run.steps == 0:
        save_checkpoint(run, folder / "checkpoint.pt")  # a disk that is full says so now
        if config.initialize_from:
            log_evaluation(log, run, held_out)
    total = sum(recipe.training_tokens for recipe in run.phases)
    bar = tqdm(
        total=total,
        initial=run.tokens,
        unit="tok",
        unit_scale=True,
        disable=None if progress and run.world.rank == 0 else True,
    )
    with bar:
        while not run.finished:
            values = run.step()
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
            bar.update(run.tokens - bar.n)
            if run.steps % config.log_every == 0 or run.finished:
                log.write("train", **standing(run), **values)
            if run.steps % config.evaluate_every == 0 and not run.finished:
                log_evaluation(log, run, held_out)
            if run.steps % config.checkpoint_every == 0:
                save_checkpoint(run, folder / "checkpoint.pt")
    save_checkpoint(run, folder / "checkpoint.pt")
    log_evaluation(log, run, held_out)
    log.write("end", **standing(run))
    log.close()
    if run.world.rank == 0:
        from .model_card import draw_curve, summarise

        draw_curve(summarise(read_log(folder)), folder / "loss.png")


def held_out_batches(config: PretrainingConfig, training_data: TrainingData) -> dict[str, list]:
    """Held-out batches with fixed masks, by corpus: its first ``held_out_tokens``."""
    recipe, batches = config.columns()[0], {}
    for name, shards in training_data.held_out.items():
        packed = PackedBatches(
            shards,
            training_data.tokenizer,
            tokens_per_batch=stream_tokens(recipe),
            max_length=recipe.max_sequence_length,
        )
        most = max(1, config.held_out_tokens // stream_tokens(recipe))
        first = itertools.islice(packed.one_epoch(), most)
        batches[name] = fixed_masks(first, training_data.tokenizer)
    return batches


def log_evaluation(log: Log, run: Run, held_out: dict[str, list]) -> None:
    """Write down how the run does on held-out text; keep weights that may be averaged."""
    scores = score(run, held_out)
    log.write("evaluation", **scores)
    if run.config.average and run.decaying and not run.finished:
        keep_best(run, scores["held_out"]["all"]["loss"])


def score(run: Run, held_out: dict[str, list]) -> dict:
    """Where the run stands, and its scores: on each corpus, on all of them, on everyday facts."""
    with run.autocast():
        scores = {name: evaluate(run.model, x, run.world) for name, x in held_out.items()}
        facts = cloze.score(run.model, run.data.tokenizer)
    return standing(run) | {"held_out": scores | {"all": pooled(scores)}, "cloze": facts}


def pooled(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over the positions of all corpora."""
    positions = sum(s["positions"] for s in scores.values())
    means = {
        key: sum(s[key] * s["positions"] for s in scores.values()) / positions
        for key in ("loss", "top1", "top5")
    }
    return means | {"positions": positions}


def standing(run: Run) -> dict[str, float]:
    """Where a run stands; ``seconds`` counts training steps alone, over all resumptions."""
    return {
        "step": run.steps,
        "tokens": run.tokens,
        "phase": run.phase,
        "epoch": run.batches.epoch,
        "seconds": round(run.seconds, 1),
        "tokens_per_second": round(run.tokens / run.seconds) if run.seconds else 0,
    }


def describe_run(run: Run, held_out: dict[str, list]) -> dict:
    """What the model card needs to know: recipe, data, machine, and the unigram baseline."""
    shards, repeats = run.data.mixture(all_corpora(run.config))
    logits = unigram_logits(shards, repeats, run.model.config.vocab_size)
    baseline = {name: evaluate_unigram(logits, batches) for name, batches in held_out.items()}
    device = run.world.device
    prepared = json.loads((Path(run.config.folder) / "corpora.json").read_text("utf-8"))
    return {
        "config": asdict(run.config),
        "corpora": prepared["corpora"],
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "machine": {
            "processor": processor_name(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "precision": "bfloat16" if run.bfloat16 else "float32",
            "processes": run.world.size,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "resumed_at": standing(run),
        "unigram": baseline | {"all": pooled(baseline)},
        "unigram_cloze": cloze.score_frequencies(logits, run.data.tokenizer),
        "began_with": origin(run.config.initialize_from),
    }


def origin(initialize_from: str | None) -> dict | None:
    """How the weights that a run begins with were trained, as far as their folder tells."""
    folder = initialize_from and find_folder(initialize_from)
    if not folder:
        return initialize_from and {"name": initialize_from}
    path, facts = folder / "training.json", {}
    if path.is_file():
        facts = json.loads(path.read_text(encoding="utf-8"))
    return {"name": folder.name} | {k: v for k, v in facts.items() if k != "curve"}


def processor_name() -> str:
    """The processor's own name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Log:
    """A file of JSON objects, one a line, each with its event and the time it was written.

    Where TensorBoard is installed, it gets every number too, in the folder ``tensorboard``.

    Args:
        folder: of the run.
        active: False for a process that leaves writing to another.
        steps: where the run stands; TensorBoard forgets what a killed process told it beyond.
    """

    def __init__(self, folder: Path, active: bool = True, steps: int = 0) -> None:
        self.path, self.active, self.board = folder / "log.jsonl", active, None
        if not active:
            return
        if self.path.exists():  # a process that was killed may have left half a line
            text = self.path.read_bytes()
            with self.path.open("r+b") as file:
                file.truncate(text.rfind(b"\n") + 1)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=steps + 1)

    def write(self, event: str, **values: object) -> None:
        """Append one line."""
        if not self.active:
            return
        line = {"event": event, "time": utc_now()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | values) + "\n")
        if self.board and "step" in values:
            scores = values.get("held_out", {}).get("all", {})
            for name, value in (values | scores).items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{event}/{name}", value, values["step"])

    def close(self) -> None:
        """Let TensorBoard's last numbers reach the disk."""
        if self.board:
            self.board.close()


def utc_now() -> str:
    """The time, as the log writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def save_checkpoint(run: Run, path: Path) -> None:
    """Write the run's state so that a reader sees the old file or the new one, never half.

    Raises:
        OSError: where the disk does not take it; the old file stays.
    """
    state = run.state_dict()
    if run.world.rank == 0:
        save(state, path)
    run.world.wait()
    run.saved = run.steps


def save(state: dict, path: Path) -> None:
    """``torch.save`` in one step, with an error that says what happened where."""
    try:
        with writing(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path} could not be written: {cause}") from error


def load(path: Path) -> dict:
    """What ``save`` wrote.

    Raises:
        ConfigError: for a file that is none, or is damaged.
    """
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        found = f"no checkpoint ({(str(error) or type(error).__name__).splitlines()[0]})"
        remedy = "Restore it from a copy, or train in another folder."
        raise ConfigError(found, "a checkpoint of a run", remedy, path) from error


def load_checkpoint(run: Run, path: Path) -> None:
    """Go on from the checkpoint in a file."""
    run.load_state_dict(load(path), path)


def keep_best(run: Run, loss: float) -> None:
    """Keep the weights of this step beside those of the best evaluations of the decay so far."""
    weights = {name: run.world.whole(p.detach()) for name, p in run.model.named_parameters()}
    if run.world.rank:
        return
    folder = Path(run.config.folder) / "decay"
    folder.mkdir(exist_ok=True)
    save({"step": run.steps, "loss": loss, "model": weights}, folder / f"{run.steps:09}.pt")
    losses = {path: load(path)["loss"] for path in sorted(folder.glob("*.pt"))}
    for path in sorted(losses, key=losses.get)[run.config.average :]:
        path.unlink()


def kept(run: Run) -> list[dict]:
    """What ``keep_best`` kept, up to where the run stands."""
    paths = sorted((Path(run.config.folder) / "decay").glob("*.pt"))
    return [state for state in map(load, paths) if state["step"] < run.steps]


def export(folder: str | PathLike, target: str | PathLike) -> dict:
    """Write a run's checkpoint as a model with its tokenizer and a model card.

    Where the recipe averages and the run has ended, the mean of the final weights and the best of
    the decay takes their place if it has the lower held-out loss.

    Args:
        folder: of the run; it may still be training.
        target: gets what ``from_pretrained`` and ``transformers`` read, README.md, training.json
            and loss.png.

    Returns:
        The held-out scores of what was written.

    Every number of the card is the run's own: from its log up to the checkpoint, and from scoring
    the exported weights once more. Chapter 12.
    """
    from .model_card import write_card

    folder = Path(folder)
    values = json.loads((folder / "recipe.json").read_text("utf-8")) | {"folder": str(folder)}
    config = PretrainingConfig.from_dict(values)
    training_data = prepare_data(config)
    run = Run(config, training_data, World("cpu"))
    load_checkpoint(run, folder / "checkpoint.pt")
    log = [line for line in read_log(folder) if line.get("step", 0) <= run.steps]
    held_out = held_out_batches(config, training_data)
    scores = score(run, held_out)
    best = kept(run) if config.average and run.finished else []
    if best:
        final = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        mean = average_weights([state["model"] for state in best] + [final])
        run.model.load_state_dict(mean, strict=False)
        averaged = score(run, held_out)
        before, after = (s["held_out"]["all"]["loss"] for s in (scores, averaged))
        steps = ", ".join(str(state["step"]) for state in best)
        told = f"The mean of steps {steps} and the last has a held-out loss of {after:.4f}, "
        told += f"the last alone {before:.4f}: these are the weights of the "
        told += "mean." if after < before else "last."
        log.append({"event": "remark", "time": utc_now(), "text": told})
        if after < before:
            scores = averaged
        else:
            run.model.load_state_dict(final, strict=False)
    log.append({"event": "evaluation", "time": utc_now()} | scores)
    run.model.config.sparse_prediction = False  # who loads it wants every logit
    run.model.eval().save_pretrained(target)
    training_data.tokenizer.save_pretrained(target)
    write_card(log, run.model, training_data.tokenizer, Path(target))
    return scores["held_out"]


def read_log(folder: str | PathLike) -> list[dict]:
    """The finished lines of a run's log, in order."""
    text = (Path(folder) / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
