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

from .fill_mask import FillMask
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
    """The ids of the answers that are one token after a space.

    Raises:
        ValueError: where none is, so that the tokenizer cannot give a right answer.
    """
    pieces = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in fact.answers]
    ids = {ids[0] for ids in pieces if len(ids) == 1}
    if not ids:
        raise ValueError(f"none of {', '.join(fact.answers)} is one token: {fact.sentence!r}")
    return ids


def score(model: ModernBertForMaskedLM, tokenizer: Tokenizer) -> dict[str, Any]:
    """How many facts a model completes: its best guess, or one of its five best.

    A guess counts if it is one of the fact's answers, letter for letter, as one token. The model
    chooses among all tokens, and is put into evaluation mode.

    Returns:
        ``facts`` (how many), ``top1`` and ``top5`` (shares of them), and ``answers``: for each
        fact its topic, sentence, five best guesses with their probability, and at which of them
        the first right one stands (None where all are wrong).

    Raises:
        ValueError: as ``answer_ids`` does. Chapter 12.
    """
    asked = facts()
    sentences = [fact.sentence.replace(BLANK, tokenizer.mask_token) for fact in asked]
    answers = []
    for fact, guesses in zip(asked, FillMask(model, tokenizer)(sentences, top_k=5), strict=True):
        right = answer_ids(fact, tokenizer)
        places = [place for place, guess in enumerate(guesses, 1) if guess["token"] in right]
        answers.append(
            {
                "topic": fact.topic,
                "sentence": fact.sentence,
                "guesses": [[g["token_str"].strip(), round(g["score"], 3)] for g in guesses],
                "right_at": places[0] if places else None,
            }
        )
    return count([a["right_at"] for a in answers]) | {"answers": answers}


def score_frequencies(logits: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """The same counts for a model that guesses the most frequent tokens everywhere.

    Args:
        logits: (V,), as ``pretraining.unigram_logits`` gives them.
    """
    best = logits.topk(5).indices.tolist()
    places = []
    for fact in facts():
        right = answer_ids(fact, tokenizer)
        places.append(next((p for p, guess in enumerate(best, 1) if guess in right), None))
    return count(places)


def count(places: list[int | None]) -> dict[str, Any]:
    """Number of facts, and the shares right at once and within five."""
    found = [place for place in places if place is not None]
    total = len(places)
    return {"facts": total, "top1": found.count(1) / total, "top5": len(found) / total}
