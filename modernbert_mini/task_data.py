"""Rows for the five tasks of chapter 13: from the vital articles, the Hub, or your own file.

Offline, the tasks are made from Wikipedia's vital articles (see ``data.py``): their text, titles,
descriptions and topics are Wikipedia's own, and each maker below says exactly how a row comes
about. Online, ``hub_rows`` brings the usual data sets in the same form, and ``read_rows`` reads a
CSV or JSON-lines file. The baselines that the chapter states are here too.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from . import data
from .fine_tuning import Task, ranking_scores

VALIDATION_PERCENT, TEST_PERCENT = 5, 15
# A row of these is a long text, or four pairs of texts: all of the test would outlast the training.
TEST_ROWS_AT_MOST = {"token-classification": 500, "multiple-choice": 500}
CHOICES = 4
PASSAGES = 2
SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]\"%])\.\s+(?=[A-Z])")


class RowError(ValueError):
    """A file of rows that cannot be used; the message names the lines."""


@dataclass(frozen=True)
class TaskData:
    """Rows of one task, in three parts, with where they come from and under which licence.

    ``test`` is for the last word alone; settings are chosen on ``validation``.
    """

    train: list[dict]
    validation: list[dict]
    test: list[dict]
    source: str
    licence: str


# --- from the vital articles --------------------------------------------------------------


def vital_article_task(name: str) -> TaskData:
    """The rows of a task, made from Wikipedia's vital articles.

    An article is in the test part, in validation or in training by the hash of its text alone, so
    no article is in two parts, and the split is the same on every machine. ``mini`` was trained on
    the plain text of most of them (never on their labels); rows whose right answer is from an
    article that it has not seen carry ``"unseen": True``, and where the test part is cut to
    ``TEST_ROWS_AT_MOST``, all of them stay.

    Raises:
        CorpusNotFoundError: where the package with the articles is not installed. Chapter 13.
    """
    corpus, parts = data.vital_articles(), defaultdict(list)
    for record, document in zip(data.vital_article_records(), corpus.documents, strict=True):
        article = {**record, "unseen": data.is_held_out(document)}
        parts[part_of(document)].append(article)
    rows = {part: list(ROW_MAKERS[name](parts[part])) for part in ("train", "validation", "test")}
    rows["test"] = at_most(rows["test"], TEST_ROWS_AT_MOST.get(name, len(rows["test"])))
    return TaskData(**rows, source=corpus.source, licence=corpus.licence)


def at_most(rows: Sequence[dict], number: int) -> list[dict]:
    """All unseen rows, and as many of the first others as make the number, in the old order."""
    others = number - sum(row["unseen"] for row in rows)
    kept = []
    for row in rows:
        others -= not row["unseen"]
        if row["unseen"] or others >= 0:
            kept.append(row)
    return kept


def part_of(document: str) -> str:
    """Which part a document falls into."""
    if data.is_held_out(document, TEST_PERCENT):  # those held out of pre-training are among them
        return "test"
    held_out = data.is_held_out(document, TEST_PERCENT + VALIDATION_PERCENT)
    return "validation" if held_out else "train"


def topic_rows(articles: Sequence[dict]) -> Iterator[dict]:
    """Sequence classification: an article's summary, and its topic in the list of vital articles.

    Eleven topics; articles without one are left out.
    """
    for article in articles:
        if article["topic"] != "Uncategorized":
            yield {
                "text": article["extract"],
                "label": article["topic"],
                "unseen": article["unseen"],
            }


def restoring_rows(articles: Sequence[dict]) -> Iterator[dict]:
    """Token classification: give a text its capitals, commas and full stops back.

    A row is a summary cut at spaces. From each word, a comma or full stop at its end is taken
    away and the rest is written in lower case; the label shows how it stood: ``word``, ``Word``,
    ``word,``, ``Word,``, ``word.`` or ``Word.``. Other marks stay. The labels are the text itself,
    so nobody had to guess them.
    """
    for article in articles:
        words, labels = strip_words(article["extract"])
        if words:
            yield {"words": words, "labels": labels, "unseen": article["unseen"]}


def strip_words(text: str) -> tuple[list[str], list[str]]:
    """The words of a text without capitals, commas and full stops, and a label for each."""
    words, labels = [], []
    for word in text.split():
        core = word.rstrip(".,")
        if core:
            mark = word[len(core)] if len(word) > len(core) else ""
            first = next((c for c in core if c.isalpha()), "")
            words.append(core.lower())
            labels.append(("Word" if first.isupper() else "word") + mark)
    return words, labels


def restore(words: Sequence[str], labels: Sequence[str]) -> str:
    """The text that words and their labels stand for."""
    written = []
    for word, label in zip(words, labels, strict=False):
        if label.startswith("W"):
            first = next((i for i, c in enumerate(word) if c.isalpha()), 0)
            word = word[:first] + word[first : first + 1].upper() + word[first + 1 :]
        written.append(word + label[4:])
    return " ".join(written)


def definition_rows(articles: Sequence[dict]) -> Iterator[dict]:
    """Question answering: who or what something is, answered by words of a text.

    The question asks for an article's title: "What is Tomato?", "Who is T. S. Eliot?". The
    answer is Wikipedia's own short description of the article ("edible berry"), so only articles
    are taken whose first sentence holds their description word for word. The context is that
    sentence and the first sentence of another article of the topic, in random order. What stands
    in brackets is taken out of description and sentences alike.
    """
    by_topic = defaultdict(list)
    for article in articles:
        sentence = without_brackets(first_sentence(article["extract"]))
        by_topic[article["topic"]].append((article, sentence))
    for group in by_topic.values():
        for article, sentence in group:
            description = without_brackets(article["description"])
            found = re.search(rf"(?<!\w){re.escape(description)}(?!\w)", sentence, re.I)
            if not description or not found or len(group) < PASSAGES:
                continue
            chance = random.Random(article["title"])
            others = chance.sample([s for a, s in group if a is not article], PASSAGES - 1)
            place = chance.randrange(PASSAGES)
            before = "".join(other + " " for other in others[:place])
            start = len(before) + found.start()
            yield {
                "question": f"{'Who' if article['topic'] == 'People' else 'What'} is "
                f"{article['title']}?",
                "context": before + " ".join([sentence, *others[place:]]),
                "answer": found[0],
                "answer_start": start,
                "unseen": article["unseen"],
            }


def first_sentence(text: str) -> str:
    """A text up to its first full stop with a letter from A to Z after it."""
    return sentences_of(" ".join(text.split()))[0]


def without_brackets(text: str) -> str:
    """A text without what stands in round brackets."""
    return re.sub(r"\s*\([^()]*\)", "", text).strip()


def continuation_rows(articles: Sequence[dict]) -> Iterator[dict]:
    """Multiple choice: an opening sentence, and which of four sentences comes next.

    The right one is the second sentence of the same article, the wrong ones are second sentences
    of other articles of its topic, in random order.
    """
    by_topic = defaultdict(list)
    for article in articles:
        sentences = sentences_of(" ".join(article["extract"].split()))
        if len(sentences) > 1:
            first, second = sentences[:2]
            by_topic[article["topic"]].append((article, first, second))
    for group in by_topic.values():
        for article, first, second in group:
            chance = random.Random(article["title"])
            others = [s for a, _, s in group if a is not article]
            if len(others) >= CHOICES - 1:
                choices, label = chance.sample(others, CHOICES - 1), chance.randrange(CHOICES)
                choices.insert(label, second)
                yield {
                    "context": first,
                    "choices": choices,
                    "label": label,
                    "unseen": article["unseen"],
                }


def retrieval_rows(articles: Sequence[dict]) -> Iterator[dict]:
    """Sentence embedding: an article's short description, and the summary that it should find.

    Articles without a description are left out. The title is in neither column, but most
    summaries begin with it.
    """
    for article in articles:
        if article["description"].strip():
            yield {
                "query": article["description"],
                "text": article["extract"],
                "unseen": article["unseen"],
            }


ROW_MAKERS: dict[str, Callable[[Sequence[dict]], Iterator[dict]]] = {
    "sequence-classification": topic_rows,
    "token-classification": restoring_rows,
    "question-answering": definition_rows,
    "multiple-choice": continuation_rows,
    "sentence-embedding": retrieval_rows,
}


# --- from the Hub -------------------------------------------------------------------------


HUB_SETS: dict[str, tuple[str, str | None, str]] = {
    # task -> data set, its configuration, and the split that stands for a test here
    "sequence-classification": ("fancyzhx/ag_news", None, "test"),
    "token-classification": ("lhoestq/conll2003", None, "test"),
    "question-answering": ("rajpurkar/squad", None, "validation"),
    "multiple-choice": ("allenai/swag", "regular", "validation"),
    "sentence-embedding": ("sentence-transformers/natural-questions", "pair", "train"),
}
TEST_ROWS = 2000


def hub_task(name: str, train_rows: int = 8000) -> TaskData:
    """The rows of a task from the usual data set of the Hub, in the form of this module.

    Needs the package ``datasets`` and the network. The last rows of the training split are the
    validation part; the test part is at most 2,000 rows.

    Args:
        train_rows: how many rows to take for training.

    Raises:
        ImportError: where ``datasets`` is not installed. Chapter 13.
    """
    from datasets import load_dataset

    path, configuration, test_split = HUB_SETS[name]
    sets = load_dataset(path, configuration)
    make, train = HUB_ROWS[name], sets["train"].shuffle(seed=0)
    last = len(train) - (TEST_ROWS if test_split == "train" else 0)
    cut = max(0, last - TEST_ROWS)
    rows = {
        "train": train.select(range(min(train_rows, cut))),
        "validation": train.select(range(cut, last)),
        "test": sets[test_split]
        .shuffle(seed=0)
        .select(range(min(TEST_ROWS, len(sets[test_split])))),
    }
    if test_split == "train":
        rows["test"] = train.select(range(last, len(train)))
    made = {part: list(map(make(sets["train"].features), some)) for part, some in rows.items()}
    return TaskData(**made, source=f"{path} of the Hugging Face Hub", licence="see its card")


def _class_rows(features):
    return lambda row: {
        "text": row["text"],
        "label": features["label"].names[row["label"]],
    }


def _tag_rows(features):
    names = features["ner_tags"].feature.names
    return lambda row: {"words": row["tokens"], "labels": [names[i] for i in row["ner_tags"]]}


def _squad_rows(features):
    return lambda row: {
        "question": row["question"],
        "context": row["context"],
        "answer": row["answers"]["text"][0],
        "answer_start": row["answers"]["answer_start"][0],
    }


def _swag_rows(features):
    return lambda row: {
        "context": row["sent1"],
        "choices": [f"{row['sent2']} {row[f'ending{i}']}" for i in range(4)],
        "label": row["label"],
    }


def _pair_rows(features):
    return lambda row: {"query": row["query"], "text": row["answer"]}


HUB_ROWS: dict[str, Callable] = {
    "sequence-classification": _class_rows,
    "token-classification": _tag_rows,
    "question-answering": _squad_rows,
    "multiple-choice": _swag_rows,
    "sentence-embedding": _pair_rows,
}


# --- from your own file -------------------------------------------------------------------


def read_rows(path: str | os.PathLike, task: Task, labelled: bool = True) -> list[dict]:
    """The rows of a CSV file (with a header), or of a file of JSON objects, one a line.

    In a CSV file, ``words`` and ``labels`` are cut at spaces, and choices stand in columns
    ``choice0``, ``choice1``, …. In either, an empty line is skipped.

    Args:
        labelled: whether the rows are to be trained or scored on; a prediction needs less.

    Raises:
        RowError: naming the line of each bad row (the first ten), or where there is none at all.
        OSError: where the file cannot be read. Chapter 13.
    """
    path = Path(path)
    readers = {".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix not in readers:
        raise RowError(f"{path}: a file that ends in .csv or .jsonl is expected")
    rows, bad = [], []
    try:
        for line, row in readers[path.suffix](path):
            try:
                if isinstance(row, ValueError):
                    raise row
                task.check(row, labelled)
                rows.append(row)
            except ValueError as error:
                bad.append(f"line {line}: {error}")
    except UnicodeDecodeError as error:
        raise RowError(f"{path}: not UTF-8 text ({error})") from error
    except csv.Error as error:
        raise RowError(f"{path}: {error}") from error
    if bad:
        more = [f"and {len(bad) - 10} more"] if len(bad) > 10 else []
        raise RowError("\n  ".join([f"{path}: {len(bad)} bad rows", *bad[:10], *more]))
    if not rows:
        raise RowError(f"{path}: no rows")
    return rows


def _json_rows(path: Path) -> Iterator[tuple[int, dict | ValueError]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield number, ValueError(f"no JSON ({error})")
                continue
            if not isinstance(row, dict):
                yield number, ValueError("no JSON object")
                continue
            if "text" in row and type(row.get("label")) is int:
                row["label"] = str(row["label"])  # classes are often numbered
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict | ValueError]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        line = 2  # of the row to come: a quoted field may run over several lines
        for row in reader:
            if None in row:
                yield line, ValueError(f"{len(row[None])} fields more than the header has")
            elif None in row.values():
                yield line, ValueError("fewer fields than the header has")
            else:
                yield line, _from_cells(row)
            line = reader.line_num + 1


def _from_cells(row: dict[str, str]) -> dict:
    """A row of texts as the tasks take it: lists where they want lists, numbers where numbers."""
    row = dict(row)
    for column in ("words", "labels"):
        if column in row:
            row[column] = row[column].split()
    choices = sorted((c for c in row if re.fullmatch(r"choice\d+", c)), key=lambda c: int(c[6:]))
    if choices:
        row["choices"] = [row.pop(column) for column in choices]
        if row.get("label", "").strip().isdecimal():
            row["label"] = int(row["label"])
    return row


def split_rows(rows: Sequence[dict], percent: float = 10.0) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows to test on, about ``percent`` of them, by their hash alone.

    Equal rows fall on the same side, so none is in both.
    """
    train, test = [], []
    for row in rows:
        held_out = data.is_held_out(json.dumps(row, sort_keys=True, ensure_ascii=False), percent)
        (test if held_out else train).append(row)
    return train, test


# --- baselines ----------------------------------------------------------------------------


def tfidf_and_logistic_regression(train: Sequence[dict], test: Sequence[dict]) -> list[str]:
    """Sequence classification without a network: weighted word counts and a linear model.

    scikit-learn's, with words and pairs of words, sublinear counts, and C = 10 (chosen on the
    validation part of the vital articles among 1, 3, 10 and 30).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2),
        LogisticRegression(C=10, max_iter=1000),
    )
    model.fit([row["text"] for row in train], [row["label"] for row in train])
    return model.predict([row["text"] for row in test]).tolist()


def label_of_the_word(train: Sequence[dict], test: Sequence[dict]) -> list[list[str]]:
    """Token classification without context: the label that each word had most often in training.

    A word that training does not know gets the label that unknown words would have had there:
    the most frequent one among the words that occur once.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for row in train:
        for word, label in zip(row["words"], row["labels"], strict=True):
            counts[word][label] += 1
    rare = Counter(next(iter(c)) for c in counts.values() if c.total() == 1)
    best = {word: c.most_common(1)[0][0] for word, c in counts.items()}
    unknown = (rare or Counter(best.values())).most_common(1)[0][0]
    return [[best.get(word, unknown) for word in row["words"]] for row in test]


def words_after_is(train: Sequence[dict], test: Sequence[dict]) -> list[str]:
    """Question answering by rule: what stands after "is", in the sentence nearest the question.

    The sentence is the one that BM25 ranks first. The answer is what follows its first "is",
    "was", "are" or "were" and an article, up to a comma, a full stop, or "that", "which", "who",
    "whose", "where" or "used"; the whole sentence where there is none.
    """
    bm25 = BM25([s for row in train for s in sentences_of(row["context"])])
    answers = []
    for row in test:
        sentences = sentences_of(row["context"])
        scores = bm25.scores(row["question"], sentences)
        best = sentences[scores.index(max(scores))]
        found = AFTER_IS.search(best)
        answers.append(found[1] if found else best)
    return answers


AFTER_IS = re.compile(
    r"\b(?:is|was|are|were)\s+(?:an?\s|the\s)?(.+?)"
    r"(?:[,.;]|\s(?:that|which|who|whose|where|used)\b)"
)


def sentences_of(text: str) -> list[str]:
    """A text cut at full stops before a letter from A to Z, each part with its full stop.

    An initial ("T. S. Eliot") and "U.S." end no sentence.
    """
    return [s.rstrip(".") + "." for s in SENTENCE_END.split(text)]


def choice_by_overlap(train: Sequence[dict], test: Sequence[dict]) -> list[int]:
    """Multiple choice by rule: the ending that BM25 ranks first for the context."""
    bm25 = BM25([choice for row in train for choice in row["choices"]])
    found = []
    for row in test:
        scores = bm25.scores(row["context"], row["choices"])
        found.append(scores.index(max(scores)))
    return found


class BM25:
    """Ranks texts by the words they share with a query, the rare ones first.

    Args:
        texts: from which it learns how rare each word is, and how long texts are.
        k1: how soon more of the same word stops counting.
        b: how much long texts are marked down.

    Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond",
    2009, section 3; the logarithm is Lucene's, which is never negative.
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.2, b: float = 0.75) -> None:
        documents = [word_counts(text) for text in texts]
        counts = Counter(word for words in documents for word in words)
        number = len(texts)
        self.k1, self.b, self.unknown = k1, b, math.log(1 + (number + 0.5) / 0.5)
        self.rarity = {
            word: math.log(1 + (number - n + 0.5) / (n + 0.5)) for word, n in counts.items()
        }
        self.mean_length = sum(words.total() for words in documents) / number

    def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        """How well each text fits the query; 0 where they share no word."""
        wanted = {word: self.rarity.get(word, self.unknown) for word in word_counts(query)}
        return [self._score(wanted, word_counts(text)) for text in texts]

    def _score(self, wanted: dict[str, float], counts: Counter) -> float:
        shared = wanted.keys() & counts.keys()
        if not shared:
            return 0.0
        norm = self.k1 * (1 - self.b + self.b * counts.total() / self.mean_length)
        return sum(wanted[w] * counts[w] * (self.k1 + 1) / (counts[w] + norm) for w in shared)


@lru_cache(maxsize=50_000)
def word_counts(text: str) -> Counter:
    """How often each word stands in a text, in lower case, without punctuation."""
    return Counter(re.findall(r"\w+", text.lower()))


def bm25_ranking(rows: Sequence[dict]) -> torch.Tensor:
    """Retrieval by words: BM25's score of each row's query for each row's text, (rows, rows)."""
    texts = [row["text"] for row in rows]
    bm25 = BM25(texts)
    return torch.tensor([bm25.scores(row["query"], texts) for row in rows])


@dataclass(frozen=True)
class Baseline:
    """What a task is compared with: its name in words, and its scores on a test part."""

    name: str
    score: Callable[[Task, Sequence[dict], Sequence[dict]], dict[str, float]]


def _by_answers(answer: Callable[[Sequence[dict], Sequence[dict]], list]) -> Callable:
    return lambda task, train, test: task.score(test, answer(train, test))


BASELINES: dict[str, Baseline] = {
    "sequence-classification": Baseline(
        "TF-IDF and logistic regression", _by_answers(tfidf_and_logistic_regression)
    ),
    "token-classification": Baseline("each word's usual label", _by_answers(label_of_the_word)),
    "question-answering": Baseline("BM25's sentence, what follows is", _by_answers(words_after_is)),
    "multiple-choice": Baseline("BM25's choice", _by_answers(choice_by_overlap)),
    "sentence-embedding": Baseline(
        "BM25", lambda task, train, test: ranking_scores(test, bm25_ranking(test))
    ),
}
