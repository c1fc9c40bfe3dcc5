"""From a pre-trained encoder to a model for your task: five tasks, one training loop.

Chapter 13 builds this module. Sources: Devlin et al., "BERT", arXiv:1810.04805, section 4 and
appendix A.3 (the tasks, a few epochs at a small learning rate); Howard and Ruder, "Universal
Language Model Fine-tuning", arXiv:1801.06146, section 3.2 (smaller rates in lower layers);
Rajpurkar et al., "SQuAD", arXiv:1606.05250, section 6.1 (exact match and F1); Reimers and
Gurevych, "Sentence-BERT", arXiv:1908.10084 (mean pooling); Henderson et al., arXiv:1705.00652,
section 4.4 (the other texts of a batch as wrong answers).

A task says how rows become packed streams, how they are scored, and which head learns.
``fine_tune`` trains it, ``predict`` asks it, ``save`` writes what ``transformers`` loads.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import statistics
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ConfigError, ModernBertConfig
from .heads import (
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    pool_packed,
)
from .model import ModernBertModel
from .tokenizer import Tokenizer
from .unpadding import FlatteningCollator, join

IGNORED = -100  # the label of a token that carries no loss


@dataclass(frozen=True)
class FineTuningConfig:
    """All that a fine-tuning run depends on, beside its rows and its starting weights.

    ``lr`` is that of the head. Each layer below learns at ``layer_decay`` times the rate of the
    one above it, the embedding last. ``frozen`` trains the head alone. ``epochs`` below 1 take a
    random share of the rows. ``max_length`` counts the tokens of a text with its special ones.

    Raises:
        ConfigError: for a value with which no run could work.
    """

    epochs: float = 1.0
    lr: float = 2e-3
    layer_decay: float = 0.8
    frozen: bool = False
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    clip_norm: float = 1.0
    batch_tokens: int = 2048
    max_length: int = 128
    seed: int = 0

    def __post_init__(self):
        least = {"max_length": 8, "batch_tokens": 1, "weight_decay": 0, "warmup": 0}
        for name in ("epochs", "lr", "layer_decay", "clip_norm", *least):
            value = getattr(self, name)
            if not (value >= least[name] if name in least else value > 0):
                expected = f"at least {least[name]}" if name in least else "a number above 0"
                usual = f"The default is {getattr(type(self), name)}."
                raise ConfigError(f"{name} {value!r}", expected, usual)


@dataclass
class FineTuningResult:
    """What a run leaves: the trained model in evaluation mode, its losses, its time.

    ``losses`` holds one number a step; ``seconds`` counts training alone.
    """

    model: nn.Module
    losses: list[float]
    seconds: float
    tokens: int


# --- how fast each part learns ------------------------------------------------------------


def depth_of(name: str, num_layers: int) -> int:
    """How high a parameter stands: 0 for the embedding, 1 to n for n layers, n + 1 above them."""
    if match := re.search(r"\blayers\.(\d+)\.", name):
        return int(match[1]) + 1
    return 0 if "embeddings." in name else num_layers + 1


def layer_wise_groups(model: nn.Module, config: FineTuningConfig) -> list[dict]:
    """Groups for AdamW: the rate falls by ``layer_decay`` from layer to layer, top to bottom.

    Matrices decay, norms and biases do not. Frozen parameters are left out.

    Source: arXiv:1801.06146, section 3.2. Chapter 13.
    """
    num_layers = model.config.num_hidden_layers
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (depth_of(name, num_layers), parameter.ndim >= 2)
            groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr * config.layer_decay ** (num_layers + 1 - depth),
            "weight_decay": config.weight_decay if is_matrix else 0.0,
        }
        for (depth, is_matrix), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def warmup_then_linear(step: int, *, warmup: int, total: int) -> float:
    """The learning rate as a share of its peak at ``step``, counted from 0, of ``total``.

    Rises linearly over ``warmup`` steps, then falls linearly towards 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (total - step) / (total - warmup)


# --- rows and features --------------------------------------------------------------------


WIDE, RATE_OF_WIDE = 512, 5e-5


def settings_for(task: Task, config: ModernBertConfig) -> FineTuningConfig:
    """Settings to start from: ``task.defaults``, or for a wide model, slower ones.

    A model of 512 or more dimensions, such as the published ones, learns at 5e-5, the largest rate
    in BERT's own list (arXiv:1810.04805, appendix A.3). It takes all rows at least once, longer
    texts, and larger batches. Chapter 13.
    """
    usual = task.defaults
    if config.hidden_size < WIDE:
        return usual
    return replace(
        usual,
        lr=RATE_OF_WIDE,
        epochs=max(1.0, usual.epochs),
        batch_tokens=4096,
        max_length=max(128, 2 * usual.max_length),
    )


def label_names(rows: Sequence[dict], column: str) -> list[str]:
    """Every label that occurs in a column of labels, or of lists of them, sorted."""
    values = (row[column] for row in rows)
    return sorted({v for value in values for v in ([value] if isinstance(value, str) else value)})


def named_classes(rows: Sequence[dict], column: str) -> dict[int, str]:
    """A number for every label of a column.

    Raises:
        ValueError: for fewer than two. A head with one output is trained as a regression.
    """
    names = label_names(rows, column)
    if len(names) < 2:
        only = f"the only label is {names[0]!r}" if names else "there are no labels"
        raise ValueError(f"column {column!r}: {only}; two or more are needed to tell apart")
    return dict(enumerate(names))


def token_batches(
    features: Sequence[dict], batch_tokens: int, generator: torch.Generator | None = None
) -> Iterator[list[dict]]:
    """Batches of at most ``batch_tokens`` tokens, in random order where a generator is given.

    A feature that is longer on its own makes a batch of its own. Questions with three choices and
    with four do not meet in one batch, since the head returns a row of scores for each question.
    """
    order = range(len(features))
    if generator is not None:
        order = torch.randperm(len(features), generator=generator).tolist()
    batch, room = [], batch_tokens
    for i in order:
        size = sum(map(len, features[i]["sequences"]))
        alike = not batch or len(batch[0]["sequences"]) == len(features[i]["sequences"])
        if batch and (size > room or not alike):
            yield batch
            batch, room = [], batch_tokens
        batch.append(features[i])
        room -= size
    if batch:
        yield batch


def macro_f1(truth: Sequence[str], found: Sequence[str]) -> float:
    """The mean F1 of all labels that occur, each counting the same however rare it is."""
    right = Counter(t for t, f in zip(truth, found, strict=True) if t == f)
    both = Counter(truth) + Counter(found)
    return statistics.mean(2 * right[label] / both[label] for label in both)


class Task:
    """One way to use the encoder. Subclasses say how; ``TASKS`` lists them by name.

    Attributes:
        name: as the command line has it.
        model_class: the head that learns.
        columns: what a row holds, by column, in words for a message.
        inputs: those columns that a prediction needs; training needs all.
        metric: the score that counts, one of those that ``score`` returns.
        defaults: settings that suit the embedded checkpoint; ``settings_for`` has those of larger
            ones.
    """

    name: ClassVar[str]
    model_class: ClassVar[type]
    columns: ClassVar[dict[str, str]]
    inputs: ClassVar[tuple[str, ...]]
    metric: ClassVar[str]
    defaults: ClassVar[FineTuningConfig] = FineTuningConfig()

    def check(self, row: dict, labelled: bool = True) -> None:
        """Raise ValueError, saying what is wrong, for a row that cannot be used."""
        for column in self.columns if labelled else self.inputs:
            if column not in row:
                raise ValueError(f"no {column!r}: {self.columns[column]}")

    def overrides(self, rows: Sequence[dict]) -> dict[str, Any]:
        """Fields of the model's config that follow from the training rows."""
        return {}

    def load(self, name_or_path: str | os.PathLike, rows: Sequence[dict], **options) -> nn.Module:
        """The pre-trained encoder under a new head for these rows; options as ``from_pretrained``.

        The head that is new is drawn from torch's global random state.
        """
        return self.model_class.from_pretrained(name_or_path, **self.overrides(rows), **options)

    def features(self, rows: Sequence[dict], tokenizer: Tokenizer, model: nn.Module, n: int):
        """Rows as dicts with ``sequences``, lists of ids of at most ``n`` tokens, and labels.

        Labels are there where the rows have them.
        """
        raise NotImplementedError

    def collate(self, features: list[dict]) -> dict[str, Any]:
        """One packed stream of a batch, with its labels: ``model(**stream)`` gives the loss."""
        return FlatteningCollator()(
            [{**feature, "input_ids": feature["sequences"][0]} for feature in features]
        )

    def loss(self, model: nn.Module, stream: dict[str, Any]) -> Tensor:
        """What training makes smaller."""
        return model(**stream).loss

    def stream(self, model: nn.Module, batch: list[dict]) -> dict[str, Any]:
        """A packed batch without its labels, where the model is: what a prediction may see."""
        stream = to_device(self.collate(batch), next(model.parameters()).device)
        return {k: v for k, v in stream.items() if k not in ("labels", *POSITIONS)}

    def answers(self, model: nn.Module, batch: list[dict]) -> list:
        """One answer for each feature of a batch."""
        raise NotImplementedError

    def score(self, rows: Sequence[dict], answers: Sequence) -> dict[str, float]:
        """How good answers are, from 0 to 1."""
        raise NotImplementedError

    def printable(self, answer: Any) -> Any:
        """An answer as JSON can hold it."""
        return answer


POSITIONS = ("start_positions", "end_positions")
BEYOND = 1_000_000  # the position of an answer behind the cut: past the end of any text, no loss


# --- five tasks ---------------------------------------------------------------------------


class SequenceClassification(Task):
    """One label for a text; an answer is a label."""

    name = "sequence-classification"
    model_class = ModernBertForSequenceClassification
    columns: ClassVar = {"text": "a text", "label": "its label"}
    inputs = ("text",)
    metric = "accuracy"
    defaults = FineTuningConfig(epochs=0.8, batch_tokens=512, max_length=32)

    def check(self, row, labelled=True):
        super().check(row, labelled)
        require_text(row, *(self.columns if labelled else self.inputs))

    def overrides(self, rows):
        return {"id2label": named_classes(rows, "label")}

    def features(self, rows, tokenizer, model, n):
        texts = [row["text"] for row in rows]
        ids = tokenizer(texts, truncation=True, max_length=n)["input_ids"]
        label2id = model.config.label2id
        return [
            {"sequences": [x], "labels": label2id.get(row.get("label"), IGNORED)}
            for x, row in zip(ids, rows, strict=True)
        ]

    def answers(self, model, batch):
        best = model(**self.stream(model, batch)).logits.argmax(dim=-1)  # (S,)
        return [model.config.id2label[i] for i in best.tolist()]

    def score(self, rows, answers):
        truth = [row["label"] for row in rows]
        right = [t == a for t, a in zip(truth, answers, strict=True)]
        return {"accuracy": statistics.mean(right), "macro_f1": macro_f1(truth, answers)}


class TokenClassification(Task):
    """A label for each word; an answer is the list of them.

    A word may be several tokens: the first carries the label, the others none.
    """

    name = "token-classification"
    model_class = ModernBertForTokenClassification
    columns: ClassVar = {"words": "a list of words", "labels": "as many labels"}
    inputs = ("words",)
    metric = "macro_f1"
    defaults = FineTuningConfig(
        epochs=0.12, lr=3e-3, layer_decay=0.9, batch_tokens=512, max_length=256
    )

    def check(self, row, labelled=True):
        super().check(row, labelled)
        for column in self.columns if labelled else self.inputs:
            value = row[column]
            if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
                raise ValueError(f"{column!r} is not a list of words")
        if not row["words"]:
            raise ValueError("no words")
        if labelled and len(row["words"]) != len(row["labels"]):
            raise ValueError(f"{len(row['words'])} words and {len(row['labels'])} labels")

    def overrides(self, rows):
        return {"id2label": named_classes(rows, "labels")}

    def features(self, rows, tokenizer, model, n):
        label2id, found = model.config.label2id, []
        for row in rows:
            ids, first = word_tokens(row["words"], tokenizer, n)
            labels = [IGNORED] * len(ids)
            for place, label in zip(first, row.get("labels", ()), strict=False):
                labels[place] = label2id.get(label, IGNORED)
            found.append({"sequences": [ids], "labels": labels, "first": first})
        return found

    def answers(self, model, batch):
        stream = self.stream(model, batch)
        best = model(**stream).logits.argmax(dim=-1)  # (N,)
        found = []
        for feature, labels in zip(
            batch, best.split(stream["cu_seqlens"].diff().tolist()), strict=True
        ):
            found.append([model.config.id2label[labels[i].item()] for i in feature["first"]])
        return found

    def score(self, rows, answers):
        # A word behind the cut has no answer: it counts as wrong.
        pairs = [
            (label, answer[i] if i < len(answer) else "")
            for row, answer in zip(rows, answers, strict=True)
            for i, label in enumerate(row["labels"])
        ]
        truth, found = zip(*pairs, strict=True)
        scores = {
            "accuracy": statistics.mean(t == f for t, f in pairs),
            "macro_f1": macro_f1(truth, found),
        }
        if all(re.fullmatch(r"O|[BI]-.+", label) for label in truth):
            scores["entity_f1"] = entity_f1([row["labels"] for row in rows], answers)
        return scores


def word_tokens(words: Sequence[str], tokenizer: Tokenizer, n: int) -> tuple[list[int], list[int]]:
    """The ids of a list of words, and where the first token of each word stands.

    Each word but the first is encoded with the space before it, as it stands in a text: byte-level
    BPE has other tokens for the start of a line. Words that do not fit ``n`` tokens are left out.
    """
    spaced = [word if i == 0 else " " + word for i, word in enumerate(words)]
    ids, first = [tokenizer.cls_token_id], []
    for pieces in tokenizer(spaced, add_special_tokens=False)["input_ids"]:
        if len(ids) + len(pieces) + 1 > n or not pieces:
            break
        first.append(len(ids))
        ids += pieces
    return [*ids, tokenizer.sep_token_id], first


def entities(labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """The entities of a text labelled B-X, I-X and O, each as (start, end, X).

    An I-X that follows no X begins one, as in the CoNLL-2000 evaluation.
    """
    found, start, kind = set(), 0, None
    for i, label in enumerate([*labels, "O"]):
        mark, _, name = label.partition("-")
        if kind is not None and (mark != "I" or name != kind):
            found.add((start, i, kind))
            kind = None
        if mark in ("B", "I") and kind is None:
            start, kind = i, name
    return found


def entity_f1(truth: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """F1 over whole entities: right are those with the right words and the right kind."""
    real = [entities(labels) for labels in truth]
    mine = [entities(labels) for labels in found]
    right = sum(len(a & b) for a, b in zip(real, mine, strict=True))
    total = sum(map(len, real)) + sum(map(len, mine))
    return 2 * right / total if total else 1.0


class QuestionAnswering(Task):
    """The words of a text that answer a question; an answer is these words.

    A row may say at which character the answer starts, ``answer_start``; else its first
    occurrence counts.
    """

    name = "question-answering"
    model_class = ModernBertForQuestionAnswering
    columns: ClassVar = {
        "question": "a question",
        "context": "a text that holds the answer",
        "answer": "words of that text",
    }
    inputs = ("question", "context")
    metric = "f1"
    defaults = FineTuningConfig(
        epochs=1.6, lr=3e-3, layer_decay=0.9, batch_tokens=512, max_length=192
    )
    longest_answer = 30  # tokens

    def check(self, row, labelled=True):
        super().check(row, labelled)
        require_text(row, *(self.columns if labelled else self.inputs))
        if labelled:
            try:
                start = answer_start(row)
            except (ValueError, TypeError):
                raise ValueError(f"answer_start {row['answer_start']!r} is no number") from None
            if start < 0 or not row["context"].startswith(row["answer"], start):
                where = "in the context" if start < 0 else f"at character {start} of the context"
                raise ValueError(f"the answer {row['answer']!r} does not stand {where}")

    def overrides(self, rows):
        return {"id2label": {0: "start", 1: "end"}}

    def features(self, rows, tokenizer, model, n):
        questions, contexts = ([row[k] for row in rows] for k in ("question", "context"))
        # A question fills half of the places at most: there must be a context to answer from.
        asked = tokenizer(questions, truncation=True, max_length=n // 2 + 1)["input_ids"]
        given = tokenizer(contexts, add_special_tokens=False, return_offsets_mapping=True)
        found = []
        for row, question, ids, offsets in zip(
            rows, asked, given["input_ids"], given["offset_mapping"], strict=True
        ):
            # [CLS] question [SEP] fill the first ``skip`` places, the last [SEP] the last one.
            skip, room = len(question), n - len(question) - 1
            feature = {"sequences": [[*question, *ids[:room], tokenizer.sep_token_id]]}
            feature |= {"skip": skip, "offsets": offsets[:room], "context": row["context"]}
            if "answer" in row:
                places = answer_tokens(row, feature["offsets"])
                shifted = [BEYOND if p is None else p + skip for p in places]
                feature |= dict(zip(POSITIONS, shifted, strict=True))
            found.append(feature)
        return found

    def collate(self, features):
        stream = join([torch.tensor(feature["sequences"][0]) for feature in features])
        for name in POSITIONS:
            if all(name in feature for feature in features):
                stream[name] = torch.tensor([feature[name] for feature in features])
        return stream

    def answers(self, model, batch):
        stream = self.stream(model, batch)
        out = model(**stream)
        sizes = stream["cu_seqlens"].diff().tolist()
        pairs = zip(out.start_logits.split(sizes), out.end_logits.split(sizes), strict=True)
        found = []
        for feature, (starts, ends) in zip(batch, pairs, strict=True):
            skip, offsets = feature["skip"], feature["offsets"]
            start, end = best_span(starts[skip:-1], ends[skip:-1], self.longest_answer)
            found.append(feature["context"][offsets[start][0] : offsets[end][1]].strip())
        return found

    def score(self, rows, answers):
        truth = [row["answer"] for row in rows]
        pairs = list(zip(truth, answers, strict=True))
        return {
            "exact_match": statistics.mean(words_of(t) == words_of(a) for t, a in pairs),
            "f1": statistics.mean(overlap_f1(t, a) for t, a in pairs),
        }


def answer_start(row: dict) -> int:
    """The character of the context at which the answer starts; −1 where it does not stand there."""
    given = row.get("answer_start")
    return row["context"].find(row["answer"]) if given in (None, "") else int(given)


def answer_tokens(row: dict, offsets: Sequence[tuple[int, int]]) -> tuple[int | None, int | None]:
    """The first and the last token of the answer, counted in the context; None behind the cut.

    A token covers the characters from its start up to its end, and byte-level BPE counts the
    space before a word to the word's first token.
    """
    start = answer_start(row)
    last = start + len(row["answer"]) - 1
    ends = [end for _, end in offsets]
    first_token = next((i for i, end in enumerate(ends) if end > start), None)
    return first_token, next((i for i, end in enumerate(ends) if end > last), None)


def best_span(starts: Tensor, ends: Tensor, longest: int) -> tuple[int, int]:
    """The span with the largest sum of its start's and its end's logit.

    Args:
        starts: (L,), how well the answer could start at each token; ``ends`` likewise.
        longest: the most tokens in an answer.

    Returns:
        Its first and its last token. No span ends before it starts.
    """
    scores = starts[:, None] + ends[None, :]  # (L, L)
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(longest - 1)  # (L, L)
    best = scores.masked_fill(~allowed, float("-inf")).argmax().item()
    return best // len(ends), best % len(ends)


def words_of(answer: str) -> list[str]:
    """An answer as SQuAD compares it: lower case, without punctuation and articles."""
    text = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in text.split() if word not in ("a", "an", "the")]


def overlap_f1(truth: str, found: str) -> float:
    """How many words two answers share: the harmonic mean of precision and recall."""
    a, b = words_of(truth), words_of(found)
    if not a or not b:
        return float(a == b)
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b))


class MultipleChoice(Task):
    """Which of several endings fits a text; an answer is the index of one."""

    name = "multiple-choice"
    model_class = ModernBertForMultipleChoice
    columns: ClassVar = {
        "context": "a text",
        "choices": "a list of endings",
        "label": "the index of the right one, from 0",
    }
    inputs = ("context", "choices")
    metric = "accuracy"
    defaults = FineTuningConfig(epochs=0.09, batch_tokens=1024, max_length=64)

    def check(self, row, labelled=True):
        super().check(row, labelled)
        require_text(row, "context")
        choices = row["choices"]
        if not isinstance(choices, list) or len(choices) < 2:
            raise ValueError("'choices' is not a list of two or more")
        if not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise ValueError("a choice is empty")
        label = row["label"] if labelled else 0
        if type(label) is not int or label not in range(len(choices)):
            raise ValueError(f"label {label!r} is no index of {len(choices)} choices")

    def features(self, rows, tokenizer, model, n):
        return [
            {
                "sequences": tokenizer(
                    [row["context"]] * len(row["choices"]),
                    row["choices"],
                    truncation=True,
                    max_length=n,
                )["input_ids"],
                "labels": row.get("label", IGNORED),
            }
            for row in rows
        ]

    def collate(self, features):
        stream = join([torch.tensor(ids) for f in features for ids in f["sequences"]])
        labels = torch.tensor([feature["labels"] for feature in features])
        return stream | {"num_choices": len(features[0]["sequences"]), "labels": labels}

    def answers(self, model, batch):
        return model(**self.stream(model, batch)).logits.argmax(dim=-1).tolist()

    def score(self, rows, answers):
        right = [row["label"] == answer for row, answer in zip(rows, answers, strict=True)]
        return {"accuracy": statistics.mean(right)}


class SentenceEmbedding(Task):
    """A vector for each text, near that of the text that belongs to it.

    An answer is the row's two vectors, (2, C), of length 1.
    """

    name = "sentence-embedding"
    model_class = ModernBertModel
    columns: ClassVar = {"query": "a short text", "text": "the text that it should find"}
    inputs = ("query", "text")
    metric = "mrr"
    defaults = FineTuningConfig(
        epochs=0.33, lr=3e-3, layer_decay=0.9, batch_tokens=2048, max_length=48
    )
    temperature = 0.05

    def check(self, row, labelled=True):
        super().check(row, labelled)
        require_text(row, *self.columns)

    def features(self, rows, tokenizer, model, n):
        queries, texts = (
            tokenizer([row[c] for row in rows], truncation=True, max_length=n)["input_ids"]
            for c in self.columns
        )
        return [{"sequences": pair} for pair in zip(queries, texts, strict=True)]

    def collate(self, features):
        queries, texts = zip(*(feature["sequences"] for feature in features), strict=True)
        return join([torch.tensor(ids) for ids in queries + texts])

    def loss(self, model, stream):
        queries, texts = embed_packed(model, stream).chunk(2)  # 2 × (B, C)
        return contrastive_loss(queries, texts, self.temperature)

    def answers(self, model, batch):
        queries, texts = embed_packed(model, self.stream(model, batch)).chunk(2)  # 2 × (B, C)
        return list(torch.stack((queries, texts), dim=1).cpu())  # B × (2, C)

    def printable(self, answer):
        return {"cosine": round(float(answer[0] @ answer[1]), 4)}

    def score(self, rows, answers):
        queries, texts = torch.stack(list(answers)).unbind(dim=1)  # 2 × (B, C)
        return ranking_scores(rows, queries @ texts.T)


def embed_packed(model: nn.Module, stream: dict[str, Any]) -> Tensor:
    """A vector of length 1 for each sequence of a packed stream: the mean of its tokens, (S, C)."""
    x = model(**stream).last_hidden_state  # (N, C)
    return F.normalize(pool_packed(x, stream["cu_seqlens"], "mean"), dim=-1)


def contrastive_loss(queries: Tensor, texts: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each query's own text among those of the batch, and back.

    Args:
        queries, texts: (B, C) of length 1; row i of one belongs to row i of the other.
        temperature: divides the cosines; the smaller, the more the nearest wrong text counts.

    Source: arXiv:1705.00652, section 4.4. Chapter 13.
    """
    scores = queries @ texts.T / temperature  # (B, B)
    own = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def ranking_scores(rows: Sequence[dict], scores: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10, and the mean of 1/rank, of each query's own text among all texts.

    Arguments as in ``ranks_of``.
    """
    ranks = ranks_of(rows, scores).double()
    recall = {f"recall@{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    return recall | {"mrr": (1 / ranks).mean().item()}


def ranks_of(rows: Sequence[dict], scores: Tensor) -> Tensor:
    """At which place, from 1, each query's own text comes among all texts, (rows,).

    Args:
        rows: with ``query`` and ``text``. A text that occurs twice is one text, and a query that
            occurs with several texts may find any of them.
        scores: (rows, rows), how well each query fits the text of each row.

    A wrong text with the same score as the right one counts as ranked before it.
    """
    texts: dict[str, list[int]] = {}
    own: dict[str, set[str]] = {}
    for i, row in enumerate(rows):
        texts.setdefault(row["text"], []).append(i)
        own.setdefault(row["query"], set()).add(row["text"])
    scores = scores[:, [places[0] for places in texts.values()]]  # (rows, texts)
    column = {text: i for i, text in enumerate(texts)}
    ranks = []
    for row, line in zip(rows, scores, strict=True):
        mine = [column[text] for text in own[row["query"]]]
        best = line[mine].max()
        others = line >= best
        others[mine] = False
        ranks.append(1 + int(others.sum()))
    return torch.tensor(ranks)


def require_text(row: dict, *columns: str) -> None:
    """Raise ValueError where a column of a row is not a text with something in it."""
    for column in columns:
        if not isinstance(row[column], str) or not row[column].strip():
            raise ValueError(
                f"{column!r} is empty" if not row[column] else f"{column!r} is no text"
            )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SequenceClassification(),
        TokenClassification(),
        QuestionAnswering(),
        MultipleChoice(),
        SentenceEmbedding(),
    )
}


# --- training, asking, saving -------------------------------------------------------------


def fine_tune(
    task: Task,
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[dict],
    config: FineTuningConfig,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> FineTuningResult:
    """Train a model on rows, in place, and return it with what was measured.

    Args:
        model: as ``task.load`` gives it.
        progress: called after each step with the step, how many there are, and the loss.

    Raises:
        ValueError: where there is nothing to train or to train on, or the loss is no number.
            Chapter 13.
    """
    if not rows:
        raise ValueError("no rows to train on")
    if config.epochs < 1:
        share = max(1, round(config.epochs * len(rows)))
        rows = random.Random(config.seed).sample(rows, share)
    features = task.features(rows, tokenizer, model, config.max_length)
    generator = torch.Generator().manual_seed(config.seed)
    epochs = [
        list(token_batches(features, config.batch_tokens, generator))
        for _ in range(math.ceil(config.epochs))
    ]
    plan = list(itertools.chain(*epochs))
    steps = round(max(1, config.epochs) / len(epochs) * len(plan))
    plan = plan[:steps]
    if config.frozen:
        if not hasattr(model, model.base_model_prefix):
            raise ValueError("this model is all encoder: frozen, it has nothing left to train")
        getattr(model, model.base_model_prefix).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        layer_wise_groups(model, config), betas=(0.9, 0.98), eps=1e-6, fused=True
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    warmup, device = int(config.warmup * steps), next(model.parameters()).device
    losses, tokens, started = [], 0, time.perf_counter()
    model.train()
    for step, batch in enumerate(plan):
        stream = to_device(task.collate(batch), device)
        loss = task.loss(model, stream)
        if not math.isfinite(loss.item()):
            raise ValueError(f"step {step + 1}: the loss is {loss.item()}; take a smaller lr")
        share = warmup_then_linear(step, warmup=warmup, total=steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
        tokens += len(stream["input_ids"])
        progress(step + 1, steps, losses[-1])
    seconds = time.perf_counter() - started
    return FineTuningResult(model.eval().requires_grad_(True), losses, seconds, tokens)


def to_device(stream: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A stream with its tensors on a device."""
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in stream.items()}


@torch.no_grad()
def predict(
    task: Task,
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[dict],
    max_length: int | None = None,
    batch_tokens: int = 8192,
) -> list:
    """One answer for each row, which needs no label; each task says what an answer is.

    Args:
        max_length: where texts are cut, by default where training with ``task.defaults`` does.
    """
    length = max_length or task.defaults.max_length
    features = task.features(rows, tokenizer, model.eval(), length)
    batches = token_batches(features, batch_tokens)
    return [answer for batch in batches for answer in task.answers(model, batch)]


def evaluate(
    task: Task, model: nn.Module, tokenizer: Tokenizer, rows: Sequence[dict], **options
) -> dict[str, float]:
    """The scores of a model's answers to rows with labels; options as in ``predict``."""
    return task.score(rows, predict(task, model, tokenizer, rows, **options))


def compare_seeds(
    task: Task,
    name_or_path: str | os.PathLike,
    tokenizer: Tokenizer,
    train: Sequence[dict],
    test: Sequence[dict],
    config: FineTuningConfig,
    seeds: Sequence[int],
) -> list[dict[str, float]]:
    """The scores of one run for each seed, which draws the new head and the order of the rows."""
    scores = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = task.load(name_or_path, train)
        fine_tune(task, model, tokenizer, train, replace(config, seed=seed))
        scores.append(evaluate(task, model, tokenizer, test, max_length=config.max_length))
    return scores


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; one value alone has no spread, so NaN."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.mean(values), deviation


def save(task: Task, model: nn.Module, tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Write a checkpoint that ``transformers`` loads: config, weights and tokenizer.

    An embedding model also gets the small files from which ``sentence_transformers``, and
    servers of it, learn that a text's vector is the mean of its tokens, made to have length 1.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if isinstance(task, SentenceEmbedding):
        for name, value in sentence_transformers_files(model).items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sentence_transformers_files(model: nn.Module) -> dict[str, Any]:
    """What ``sentence_transformers`` reads beside a checkpoint, by file name."""
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    return {
        "modules.json": [
            {
                "idx": i,
                "name": str(i),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, (path, kind) in enumerate(kinds)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": model.config.hidden_size,
            "pooling_mode_mean_tokens": True,
        },
        "2_Normalize/config.json": {},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }
