"""Masked language modelling from text to checkpoint: masks, packing, schedule, loop.

Chapter 12 builds this module. Sources: Devlin et al., "BERT", arXiv:1810.04805, section 3.1
(masked tokens); Warner et al., "Smarter, Better, Faster, Longer", arXiv:2412.13663, section 2.2
and appendix A (30 % masking, trapezoidal schedule, optimiser), and the training configuration
modernbert-base-pretrain.yaml of the authors' code.

A run is one function, ``pretrain(config)``, and one folder: token shards, a log of one JSON
object a line, and a checkpoint from which the run goes on as if it had never stopped.
``export(folder, target)`` makes a loadable checkpoint of it at any time.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import data
from .atomic import writing
from .config import ModernBertConfig
from .heads import ModernBertForMaskedLM
from .tokenizer import Tokenizer, train_bpe

IGNORED = -100  # the label of a position that carries no loss


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

    Args:
        input_ids: int64 of any shape.
        generator: on the CPU; the only source of chance.

    Returns:
        Inputs and labels, both int64 shaped as ``input_ids``; labels hold the original id where
        a token was chosen and -100 elsewhere.

    Source: arXiv:1810.04805, section 3.1; the rate is arXiv:2412.13663's. Chapter 12.
    """
    special = torch.zeros(vocab_size, dtype=torch.bool)
    special[list(special_ids)] = True
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
    ) -> None:
        self.settings = {
            "mask_token_id": tokenizer.mask_token_id,
            "special_ids": special_ids(tokenizer),
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
    """Endless packed batches of whole pieces, shuffled anew in every epoch; chapter 12.

    A batch is a dict of ``input_ids`` (N,) int64, ``cu_seqlens`` (S + 1,) int32 and
    ``max_seqlen``: each sequence is [CLS], a piece of one document, [SEP]. What comes next
    depends on ``seed``, ``epoch`` and ``position`` alone; assign them, and ``tokens``, to go on
    where an earlier run stopped. With several processes, each takes its own of every ``world``
    batches, and ``tokens`` counts what all of them were given.

    Args:
        shards: where the tokens are.
        repeats: how often each shard is seen in one epoch.
        tokens_per_batch: the most tokens in a batch, special tokens counted.
        max_length: the longest sequence, special tokens counted.
    """

    def __init__(
        self,
        shards: list[data.TokenShard],
        tokenizer: Tokenizer,
        *,
        tokens_per_batch: int,
        max_length: int,
        repeats: list[int] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if max_length > tokens_per_batch:
            raise ValueError(f"a sequence of {max_length} does not fit {tokens_per_batch} tokens")
        self.cls, self.sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.ids = np.concatenate([shard.tokens for shard in shards])
        self.tokens_per_batch, self.seed, self.shuffle = tokens_per_batch, seed, shuffle
        first, pieces = 0, []
        for shard, repeat in zip(shards, repeats or [1] * len(shards), strict=True):
            pieces.extend([cut_documents(shard, max_length) + (first, 0)] * repeat)
            first += len(shard.tokens)
        self.pieces = np.concatenate(pieces)
        self.rank, self.world = rank, world
        self.epoch, self.position, self.tokens = 0, 0, 0

    def __iter__(self) -> Iterator[dict]:
        while True:
            plan = self.plan(self.epoch)
            while self.position + self.world <= len(plan):
                group = plan[self.position : self.position + self.world]
                # Counted before it is handed out: a checkpoint written after the step is right.
                self.position += self.world
                self.tokens += sum(int((self.pieces[which, 1] + 2).sum()) for which in group)
                yield self.batch(group[self.rank])
            self.epoch, self.position = self.epoch + 1, 0

    def one_epoch(self) -> Iterator[dict]:
        """The batches of the current epoch, from the first, leaving the position alone."""
        return map(self.batch, self.plan(self.epoch))

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Which pieces make up each batch of an epoch: every piece once, in shuffled order."""
        order = np.arange(len(self.pieces))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        lengths = self.pieces[order, 1] + 2
        return [order[a:b] for a, b in itertools.pairwise(fill(lengths, self.tokens_per_batch))]

    def batch(self, which: np.ndarray) -> dict:
        """Gather pieces into one packed stream."""
        starts, lengths = self.pieces[which].T
        bounds = np.concatenate([[0], np.cumsum(lengths + 2)])
        ids = np.empty(bounds[-1], dtype=np.int64)
        ids[bounds[:-1]], ids[bounds[1:] - 1] = self.cls, self.sep
        for bound, start, length in zip(bounds, starts, lengths, strict=False):
            ids[bound + 1 : bound + 1 + length] = self.ids[start : start + length]
        return {
            "input_ids": torch.from_numpy(ids),
            "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
            "max_seqlen": int(lengths.max()) + 2,
        }


def fill(lengths: np.ndarray, capacity: int) -> list[int]:
    """Where to cut a row of lengths so that each part sums to at most ``capacity``, greedily."""
    bounds, total = [0], 0
    for i, length in enumerate(lengths.tolist()):
        if total + length > capacity:
            bounds.append(i)
            total = 0
        total += length
    return [*bounds, len(lengths)]


# --- optimiser and schedule ---------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for AdamW: matrices decay, norms, biases and the embedding do not.

    The published recipe spares norms and biases. The embedding is spared too: here most rows
    are rare words, which decay would shrink between their appearances.
    """
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "tok_embeddings" not in name
        (decayed if matrix else spared).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


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
    if tokens <= start:
        return 1.0
    return max(0.0, 1.0 - math.sqrt((tokens - start) / decay))


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
def evaluate(model: ModernBertForMaskedLM, batches: Iterable[dict]) -> dict[str, float]:
    """Masked loss (nats), top-1 and top-5 accuracy of a model with ``sparse_prediction``."""
    was_training = model.training
    model.eval()
    scores = MaskedScores()
    for batch in batches:
        labels = batch["labels"]
        scores.add(model(**batch).logits, labels[labels != IGNORED])
    model.train(was_training)
    return scores.means()


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


# --- one run ------------------------------------------------------------------------------


@dataclass
class PretrainingConfig:
    """All that a run depends on; lengths and durations are in tokens.

    ``corpora`` names the corpora of ``data.py`` and how often each is seen in one epoch. ``model``
    holds the fields of ``ModernBertConfig`` that differ from ModernBERT-base; the vocabulary and
    the special ids follow from the tokenizer.
    """

    folder: str
    corpora: dict[str, int]
    model: dict = field(default_factory=dict)
    wordnet_folder: str = str(data.WORDNET_FOLDER)
    vocab_size: int = 8192
    held_out_percent: float = 2.0
    total_tokens: int = 40_000_000
    warmup_tokens: int = 1_000_000
    decay_tokens: int = 8_000_000
    batch_tokens: int = 8192
    max_length: int = 256
    mask_probability: float = 0.3
    peak_lr: float = 2e-3
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    clip_norm: float = 1.0
    log_every: int = 20  # steps
    evaluate_every: int = 500  # steps
    checkpoint_every: int = 200  # steps
    seed: int = 0

    @classmethod
    def from_toml(cls, path: str | os.PathLike) -> PretrainingConfig:
        """Read a TOML file whose keys are the fields; raises TypeError for an unknown one."""
        with open(path, "rb") as file:
            return cls(**tomllib.load(file))


@dataclass
class TrainingData:
    """Tokens of a run: shards to train on with their repeats, and a shard held out, by corpus."""

    tokenizer: Tokenizer
    train: dict[str, data.TokenShard]
    held_out: dict[str, data.TokenShard]
    repeats: list[int]


def prepare_data(config: PretrainingConfig) -> TrainingData:
    """Load the corpora, train the tokenizer and write the shards, or open those of this run.

    Everything lies under the run's folder: tokenizer/, train/<corpus>/, held_out/<corpus>/,
    corpora.json with source, licence, size and hash of each corpus.
    """
    folder = Path(config.folder)
    about = folder / "corpora.json"
    if not about.exists():
        _write_data(config, folder)  # corpora.json last: a run that was stopped starts over
    return TrainingData(
        tokenizer=Tokenizer.from_pretrained(folder / "tokenizer"),
        train={name: data.open_shard(folder / "train" / name) for name in config.corpora},
        held_out={name: data.open_shard(folder / "held_out" / name) for name in config.corpora},
        repeats=list(config.corpora.values()),
    )


def _write_data(config: PretrainingConfig, folder: Path) -> None:
    corpora = [load_corpus(name, config) for name in config.corpora]
    splits = {c.name: data.split_held_out(c.documents, config.held_out_percent) for c in corpora}
    backend = train_bpe(
        (text for name, (train, _) in splits.items() for text in train * config.corpora[name]),
        config.vocab_size,
    )
    longest = config.model.get("max_position_embeddings", 8192)
    Tokenizer(backend, model_max_length=longest).save_pretrained(folder / "tokenizer")

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]

    summaries = []
    for corpus in corpora:
        train, held_out = splits[corpus.name]
        shard = data.tokenise_to_shards(train, encode_batch, folder / "train" / corpus.name)
        other = data.tokenise_to_shards(held_out, encode_batch, folder / "held_out" / corpus.name)
        summaries.append(
            corpus.summary()
            | {"repeats": config.corpora[corpus.name]}
            | {"train_tokens": len(shard.tokens), "held_out_tokens": len(other.tokens)}
        )
    with writing(folder / "corpora.json") as file:
        file.write(json.dumps(summaries, indent=2).encode())


def load_corpus(name: str, config: PretrainingConfig) -> data.Corpus:
    """One corpus of ``data.py`` by its name; raises ValueError for an unknown one."""
    loaders = {
        "vital-articles": data.vital_articles,
        "python-docs": data.python_docs,
        "wordnet": lambda: data.wordnet(config.wordnet_folder),
    }
    if name not in loaders:
        raise ValueError(f"unknown corpus {name!r}; known are {', '.join(loaders)}")
    return loaders[name]()


class Run:
    """Model, optimiser, data and chance of one run, as ``pretrain`` steps through it.

    ``step()`` is one optimiser step on one batch; ``state_dict()`` holds all that the next step
    depends on, so a run that is resumed gives the same weights, bit for bit on one machine.
    """

    def __init__(self, config: PretrainingConfig, training_data: TrainingData) -> None:
        self.config = config
        rank, world = process_rank()
        torch.manual_seed(config.seed)
        self.model = ModernBertForMaskedLM(model_config(config, training_data.tokenizer))
        self.model.init_weights()
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.peak_lr,
            betas=tuple(config.betas),
            eps=config.eps,
            fused=True,
        )
        self.batches = PackedBatches(
            list(training_data.train.values()),
            training_data.tokenizer,
            tokens_per_batch=config.batch_tokens // world,
            max_length=config.max_length,
            repeats=training_data.repeats,
            seed=config.seed,
            rank=rank,
            world=world,
        )
        self.stream = iter(self.batches)
        self.collate = MaskingCollator(training_data.tokenizer, config.mask_probability)
        self.steps, self.seconds = 0, 0.0

    @property
    def tokens(self) -> int:
        """Training tokens so far, special tokens counted."""
        return self.batches.tokens

    def learning_rate(self) -> float:
        """The rate for the next step."""
        config = self.config
        share = warmup_stable_decay(
            self.tokens,  # those of the coming step included, so that the first is not wasted
            warmup=config.warmup_tokens,
            decay=config.decay_tokens,
            total=config.total_tokens,
        )
        return config.peak_lr * share

    def step(self) -> dict[str, float]:
        """Train on one batch; return loss (nats a masked token), gradient norm and rate."""
        began = time.perf_counter()
        # Masks follow from the step alone, so a resumed run draws the same ones.
        self.collate.generator.manual_seed(step_seed(self.config.seed, self.steps))
        batch = self.collate(next(self.stream))
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.model(**batch).loss
        loss.backward()
        average_gradients(self.model)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.seconds += time.perf_counter() - began
        return {"loss": loss.item(), "gradient_norm": norm.item(), "lr": rate}

    @property
    def finished(self) -> bool:
        """Whether all tokens are seen: the next full batch would go past the end."""
        return self.tokens + self.config.batch_tokens > self.config.total_tokens

    def state_dict(self) -> dict:
        """Tensors and plain numbers only, so that it loads with ``weights_only=True``."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counters": [self.steps, self.seconds],
            "position": [self.batches.epoch, self.batches.position, self.batches.tokens],
            "generator": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where ``state_dict`` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.seconds = state["counters"]
        self.batches.epoch, self.batches.position, self.batches.tokens = state["position"]
        self.stream = iter(self.batches)
        torch.set_rng_state(state["generator"])


def process_rank() -> tuple[int, int]:
    """This process's number and how many train together: (0, 1) unless torchrun started them."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over the processes, in one exchange."""
    _, world = process_rank()
    if world == 1:
        return
    gradients = [p.grad for p in model.parameters()]
    together = torch.cat([g.flatten() for g in gradients])  # (parameters,)
    torch.distributed.all_reduce(together)
    parts = (together / world).split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def step_seed(seed: int, step: int) -> int:
    """A seed for the masks of one step, another one in every process."""
    rank, _ = process_rank()
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def model_config(config: PretrainingConfig, tokenizer: Tokenizer) -> ModernBertConfig:
    """The model's config for training: only masked positions are decoded."""
    return ModernBertConfig(
        vocab_size=config.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sparse_prediction=True,
        **config.model,
    )


def pretrain(config: PretrainingConfig) -> Run:
    """Train until ``total_tokens`` are seen, from the folder's checkpoint where there is one.

    Writes log.jsonl (one object a line: start, train, evaluation, end) and checkpoint.pt into
    the run's folder. Under ``torchrun`` the processes share each batch. Chapter 12.
    """
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if process_rank()[0] == 0:
        prepare_data(config)  # alone: two processes must not write the same files
    if process_rank()[1] > 1:
        torch.distributed.barrier()
    training_data = prepare_data(config)
    run = Run(config, training_data)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        run.load_state_dict(torch.load(checkpoint, weights_only=True))
    if process_rank()[0] > 0:  # helps with the gradients; the first process keeps the books
        while not run.finished:
            run.step()
        return run
    held_out = held_out_batches(config, training_data)
    log = Log(folder / "log.jsonl")
    log.write("start", **describe_run(run, training_data, held_out))
    while not run.finished:
        values = run.step()
        if run.steps % config.log_every == 0 or run.finished:
            log.write("train", **progress(run), **values)
        if run.steps % config.evaluate_every == 0:
            log_evaluation(log, run, held_out)
        if run.steps % config.checkpoint_every == 0:
            save_checkpoint(run, checkpoint)
    save_checkpoint(run, checkpoint)
    log_evaluation(log, run, held_out)
    log.write("end", **progress(run))
    return run


def held_out_batches(config: PretrainingConfig, training_data: TrainingData) -> dict[str, list]:
    """Held-out batches with fixed masks, by corpus."""
    return {
        name: fixed_masks(
            PackedBatches(
                [shard],
                training_data.tokenizer,
                tokens_per_batch=config.batch_tokens,
                max_length=config.max_length,
                shuffle=False,
            ).one_epoch(),
            training_data.tokenizer,
        )
        for name, shard in training_data.held_out.items()
    }


def log_evaluation(log: Log, run: Run, held_out: dict[str, list]) -> None:
    """Write down how the run does on held-out text."""
    log.write("evaluation", **score(run, held_out))


def score(run: Run, held_out: dict[str, list]) -> dict:
    """Where the run stands, and its scores on every corpus apart and on all of them together."""
    scores = {name: evaluate(run.model, batches) for name, batches in held_out.items()}
    return progress(run) | {"held_out": scores | {"all": pooled(scores)}}


def pooled(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over the positions of all corpora."""
    positions = sum(s["positions"] for s in scores.values())
    means = {
        key: sum(s[key] * s["positions"] for s in scores.values()) / positions
        for key in ("loss", "top1", "top5")
    }
    return means | {"positions": positions}


def progress(run: Run) -> dict[str, float]:
    """Where a run stands; ``seconds`` counts training steps alone, over all resumptions."""
    return {
        "step": run.steps,
        "tokens": run.tokens,
        "epoch": run.batches.epoch,
        "seconds": round(run.seconds, 1),
        "tokens_per_second": round(run.tokens / run.seconds) if run.seconds else 0,
    }


def describe_run(run: Run, training_data: TrainingData, held_out: dict[str, list]) -> dict:
    """What the model card needs to know: recipe, data, machine, and the unigram baseline."""
    logits = unigram_logits(
        list(training_data.train.values()), training_data.repeats, run.config.vocab_size
    )
    baseline = {name: evaluate_unigram(logits, batches) for name, batches in held_out.items()}
    return {
        "config": asdict(run.config),
        "corpora": json.loads((Path(run.config.folder) / "corpora.json").read_text()),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "machine": {
            "processor": processor_name(),
            "processes": process_rank()[1],
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "resumed_at": progress(run),
        "unigram": baseline | {"all": pooled(baseline)},
    }


def processor_name() -> str:
    """The processor's own name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Log:
    """A file of JSON objects, one a line, each with its event and the time it was written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **values: object) -> None:
        """Append one line."""
        line = {"event": event, "time": utc_now()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | values) + "\n")


def utc_now() -> str:
    """The time, as the log writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def save_checkpoint(run: Run, path: Path) -> None:
    """Write the run's state so that a reader sees the old file or the new one, never half."""
    with writing(path) as file:
        torch.save(run.state_dict(), file)


def export(folder: str | os.PathLike, target: str | os.PathLike) -> None:
    """Write a run's checkpoint as a model with its tokenizer and a model card.

    Args:
        folder: of the run; it may still be training.
        target: gets what ``from_pretrained`` and ``transformers`` read, README.md, training.json
            and loss.png.

    Every number of the card is the run's own: from its log up to the checkpoint, and from scoring
    the exported weights once more. Chapter 12.
    """
    from .model_card import write_card

    folder = Path(folder)
    log = read_log(folder)
    config = PretrainingConfig(**log[0]["config"] | {"folder": str(folder)})
    training_data = prepare_data(config)
    run = Run(config, training_data)
    run.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True))
    log = [line for line in log if line.get("step", 0) <= run.steps]
    log.append({"event": "evaluation", "time": utc_now()})
    log[-1] |= score(run, held_out_batches(config, training_data))
    run.model.config.sparse_prediction = False  # who loads it wants every logit
    run.model.eval().save_pretrained(target)
    training_data.tokenizer.save_pretrained(target)
    write_card(log, run.model, training_data.tokenizer, Path(target))


def read_log(folder: str | os.PathLike) -> list[dict]:
    """The lines of a run's log, in order."""
    text = (Path(folder) / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
