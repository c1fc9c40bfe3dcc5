"""Fifty everyday facts with a word left out, and how many of them a model knows.

Held-out text asks how well a model continues the kind of text that it was trained on; a cloze set
asks what it has learnt about the world. The sentences were written for this purpose, before any
model had answered them, and are never trained on. ``pretraining.export`` scores every model on
them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from .heads import ModernBertForMaskedLM
from .tokenizer import Tokenizer

BLANK = "[MASK]"  # as the file writes it; each tokenizer has its own


@dataclass(frozen=True)
class Fact:
    """A sentence with one [MASK] before its full stop, and the words that make it true."""

    topic: str
    sentence: str
    answers: tuple[str, ...]


def facts() -> list[Fact]:
    """The 50 facts, in the order of the file ``cloze.json``."""
    text = (resources.files(__package__) / "cloze.json").read_text(encoding="utf-8")
    return [
        Fact(topic, sentence, tuple(answers))
        for topic, pairs in json.loads(text).items()
        for sentence, answers in pairs.items()
    ]


def answer_ids(fact: Fact, tokenizer: Tokenizer) -> set[int]:
    """The ids of the answers that are one token after a space; a small vocabulary may lack all."""
    pieces = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in fact.answers]
    return {ids[0] for ids in pieces if len(ids) == 1}


@torch.no_grad()
def score(model: ModernBertForMaskedLM, tokenizer: Tokenizer) -> dict[str, Any]:
    """How many facts a model completes: with its best guess, or with one of its five best.

    A guess counts if it is one of the fact's answers, letter for letter, as one token. The model
    chooses among all tokens. A fact none of whose answers is one token counts as wrong.

    Returns:
        ``facts`` (how many), ``answerable`` (those with an answer in the vocabulary), ``top1`` and
        ``top5`` (shares of all), and ``answers``: for each fact its topic, sentence, five best
        guesses with their probabilities, and at which of them the first right one stands (None
        where all are wrong).

    Chapter 12.
    """
    asked = facts()
    sentences = [fact.sentence.replace(BLANK, tokenizer.mask_token) for fact in asked]
    batch = tokenizer(sentences, padding=True, return_tensors="pt").to(model.decoder.weight.device)
    hidden = batch.input_ids == tokenizer.mask_token_id  # (B, L)
    batch["labels"] = torch.where(hidden, batch.input_ids, -100)
    was_training = model.training
    logits = model.eval()(**batch).logits
    model.train(was_training)
    if logits.ndim == 3:  # a model with sparse_prediction has picked them already
        logits = logits[hidden]  # (B, V)
    scores, ids = logits.float().softmax(dim=-1).topk(5)  # 2 × (B, 5)
    answers = []
    for fact, best, guesses in zip(asked, scores.tolist(), ids.tolist(), strict=True):
        words = [tokenizer.decode(guess).strip() for guess in guesses]
        answers.append(
            {
                "topic": fact.topic,
                "sentence": fact.sentence,
                "guesses": [[word, round(p, 3)] for word, p in zip(words, best, strict=True)],
                "right_at": place(guesses, fact, tokenizer),
            }
        )
    return count([a["right_at"] for a in answers], tokenizer) | {"answers": answers}


def score_frequencies(logits: Tensor, tokenizer: Tokenizer) -> dict[str, Any]:
    """The same counts for a model that guesses the most frequent tokens everywhere.

    Args:
        logits: (V,), as ``pretraining.unigram_logits`` gives them.
    """
    guesses = logits.topk(5).indices.tolist()
    return count([place(guesses, fact, tokenizer) for fact in facts()], tokenizer)


def place(guesses: list[int], fact: Fact, tokenizer: Tokenizer) -> int | None:
    """At which guess, from 1, the first right one stands."""
    right = answer_ids(fact, tokenizer)
    return next((number for number, guess in enumerate(guesses, 1) if guess in right), None)


def count(places: list[int | None], tokenizer: Tokenizer) -> dict[str, Any]:
    """Number of facts and of those that can be answered, and the shares that are right."""
    found = [place for place in places if place is not None]
    total = len(places)
    answerable = sum(bool(answer_ids(fact, tokenizer)) for fact in facts())
    shares = {"top1": found.count(1) / total, "top5": len(found) / total}
    return {"facts": total, "answerable": answerable} | shares
