"""Each exercise of chapter 2: the solution passes, and each mistake gets its own hint.

At the end, what the chapter says about the published tokenizer.
"""

import json
from collections import Counter
from itertools import chain, combinations, count, pairwise

import pytest
import torch

from modernbert_mini import Tokenizer, checks
from modernbert_mini.tokenizer import train_bpe


def count_pairs(words):
    counts = Counter()
    for word, times in words.items():
        for pair in pairwise(word):
            counts[pair] += times
    return counts


def join(word, pair):
    out, i = [], 0
    while i < len(word):
        size = 2 if word[i : i + 2] == pair else 1
        out.append("".join(word[i : i + size]))
        i += size
    return tuple(out)


def letters(keeps, start=256):
    borrowed = count(start)
    return [chr(b) if keeps(b) else chr(next(borrowed)) for b in range(256)]


def visible(b):
    return chr(b).isprintable() and b != 32


def byte_letters():
    return letters(visible)


def encode_word(word, ranks):
    pieces = tuple(word)
    while known := [pair for pair in pairwise(pieces) if pair in ranks]:
        pieces = join(pieces, min(known, key=ranks.get))
    return pieces


def offsets(text, tokens):
    whose = [i for i, character in enumerate(text) for _ in character.encode()]
    spans, byte = [], 0
    for token in tokens:
        last = byte + len(token) - 1
        spans.append((whose[byte], whose[last] + 1))
        byte = last + 1
    return spans


def collate(rows, pad_id):
    longest = max(map(len, rows))
    ids = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


SOLUTIONS = {
    "count_pairs": count_pairs,
    "join": join,
    "byte_letters": byte_letters,
    "encode_word": encode_word,
    "offsets": offsets,
    "collate": collate,
}


# ---- count_pairs ----


def tallied(words, pairs_of, weighted=True):
    counts = Counter()
    for word, times in words.items():
        for pair in pairs_of(word):
            counts[pair] += times if weighted else 1
    return counts


def each_word_once(words):
    return tallied(words, pairwise, weighted=False)


def once_per_word(words):
    return tallied(words, lambda word: set(pairwise(word)))


def overlap_skipped(words):
    return tallied(words, apart)


def apart(word):
    found, i = [], 0
    while i < len(word) - 1:
        found.append(word[i : i + 2])
        i += 2 if word[i : i + 2] == word[i + 1 : i + 3] else 1
    return found


def unordered(words):
    return tallied(words, lambda word: (tuple(sorted(pair)) for pair in pairwise(word)))


def last_pair_lost(words):
    return tallied(words, lambda word: [word[i : i + 2] for i in range(len(word) - 2)])


def first_pair_lost(words):
    return tallied(words, lambda word: [word[i : i + 2] for i in range(1, len(word) - 1)])


def not_neighbours(words):
    return tallied(words, lambda word: combinations(word, 2))


def across_words(words):
    return Counter(pairwise(chain.from_iterable(word * n for word, n in words.items())))


def of_letters(words):
    return tallied(words, lambda word: pairwise("".join(word)))


def pieces_counted(words):
    return tallied(words, iter)


def keys_joined(words):
    return tallied(words, lambda word: map("".join, pairwise(word)))


def the_best_only(words):
    return count_pairs(words).most_common(1)[0]


def emptied(words):
    return Counter({words.popitem()[0]: 1})


def doubled(words):
    return {pair: 2 * n for pair, n in count_pairs(words).items()}


# ---- join ----


def first_only(word, pair):
    for i in range(len(word) - 1):
        if word[i : i + 2] == pair:
            return (*word[:i], "".join(pair), *word[i + 2 :])
    return word


def last_only(word, pair):
    for i in reversed(range(len(word) - 1)):
        if word[i : i + 2] == pair:
            return (*word[:i], "".join(pair), *word[i + 2 :])
    return word


def order_ignored(word, pair):
    return join(word, pair[::-1])


def untouched(word, pair):
    return word


def from_the_right(word, pair):
    return tuple(piece[::-1] for piece in join(word[::-1], pair[::-1])[::-1])


def greedy_chain(word, pair):
    out = []
    for piece in word:
        if out and out[-1].endswith(pair[0]) and piece == pair[1]:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)


def one_step_only(word, pair):
    out = []
    for i, piece in enumerate(word):
        if word[i : i + 2] == pair:
            out.append("".join(pair))
        elif i == 0 or word[i - 1 : i + 1] != pair:
            out.append(piece)
    return tuple(out)


def letters_lost(word, pair):
    return tuple(piece for piece in join(word, pair) if len(piece) > 1)


def a_list(word, pair):
    return list(join(word, pair))


def a_string(word, pair):
    return "|".join(join(word, pair))


def text_replaced(word, pair):
    return tuple(" ".join(word).replace(" ".join(pair), "".join(pair)).split())


def needs_a_pair(word, pair):
    return join(word, pair) if len(word) > 1 else ("?",)


# ---- byte_letters ----


def latin_1():
    return list(map(chr, range(256)))


def all_moved():
    return [chr(256 + b) for b in range(256)]


def by_number():
    return [chr(b) if visible(b) else chr(256 + b) for b in range(256)]


def space_kept():
    return letters(lambda b: chr(b).isprintable())


def soft_hyphen_kept():
    return letters(lambda b: visible(b) or b == 0xAD)


def hard_space_kept():
    return letters(lambda b: visible(b) or b == 0xA0)


def both_kept():
    return letters(lambda b: 32 < b < 127 or b >= 0xA0)


def ascii_only():
    return letters(lambda b: 32 < b < 127)


def one_too_far():
    return letters(visible, start=257)


def in_order():
    return sorted(byte_letters())


def a_table():
    return dict(enumerate(byte_letters()))


def half_of_them():
    return byte_letters()[:128]


def numbers():
    return list(map(ord, byte_letters()))


def hexadecimal():
    return [chr(b) if visible(b) else "·" for b in range(256)]


def control_pictures():
    return letters(visible, start=0x2400)


# ---- encode_word ----


def ranked(word, ranks, first=min, steps=99):
    pieces = tuple(word)
    for _ in range(steps):
        known = [pair for pair in pairwise(pieces) if pair in ranks]
        if not known:
            break
        pieces = join(pieces, first(known, key=ranks.get))
    return pieces


def last_rank_first(word, ranks):
    return ranked(word, ranks, first=max)


def leftmost(word, ranks):
    return ranked(word, ranks, first=lambda known, key: known[0])


def one_merge(word, ranks):
    return ranked(word, ranks, steps=1)


def no_merge(word, ranks):
    return tuple(word)


def longest_piece(word, ranks):
    known, out = {"".join(pair) for pair in ranks}, []
    while word:
        size = next(n for n in range(len(word), 0, -1) if n == 1 or word[:n] in known)
        out.append(word[:size])
        word = word[size:]
    return out


def unknown_is_zero(word, ranks):
    pieces = tuple(word)
    while len(pieces) > 1:
        pieces = join(pieces, min(pairwise(pieces), key=lambda pair: ranks.get(pair, 0)))
    return pieces


def replayed(word, ranks):
    pieces = tuple(word)
    for pair in ranks:
        pieces = join(pieces, pair)
    return pieces


def glued(word, ranks):
    return "|".join(encode_word(word, ranks))


def last_piece_lost(word, ranks):
    return encode_word(word, ranks)[:-1]


def stops_at_two(word, ranks):
    pieces, used = tuple(word), set()
    while known := [p for p in pairwise(pieces) if p in ranks and p not in used]:
        best = min(known, key=ranks.get)
        used.add(best)
        pieces = first_only(pieces, best)
    return pieces


def needs_a_letter(word, ranks):
    return encode_word(word, ranks) or ("",)


class RemembersAWord:
    """Right on the first words; later gives words of three letters the pieces of the first."""

    __name__ = "RemembersAWord"

    def __init__(self):
        self.calls = 0

    def __call__(self, word, ranks):
        self.calls += 1
        return tuple(word) if self.calls > 10 else encode_word(word, ranks)


# ---- offsets ----


def end_included(text, tokens):
    return [(a, b - 1) for a, b in offsets(text, tokens)]


def with_length(text, tokens):
    return [(a, b - a) for a, b in offsets(text, tokens)]


def space_trimmed(text, tokens):
    return [(a + (text[a] == " "), b) for a, b in offsets(text, tokens)]


def from_one(text, tokens):
    return [(a + 1, b + 1) for a, b in offsets(text, tokens)]


def from_zero_each(text, tokens):
    return [(0, b - a) for a, b in offsets(text, tokens)]


def in_bytes(text, tokens):
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    return list(pairwise(ends))


def by_finished_characters(text, tokens):
    raw = text.encode()

    def place(size):
        return len(raw[:size].decode(errors="ignore"))

    return [(place(a), place(b)) for a, b in in_bytes(text, tokens)]


def one_short(text, tokens):
    return offsets(text, tokens)[:-1]


def starts_only(text, tokens):
    return [a for a, _ in offsets(text, tokens)]


def reversed_spans(text, tokens):
    return offsets(text, tokens)[::-1]


# ---- collate ----


def mask_of_ones(rows, pad_id):
    batch = collate(rows, pad_id)
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def mask_upside_down(rows, pad_id):
    batch = collate(rows, pad_id)
    return {**batch, "attention_mask": 1 - batch["attention_mask"]}


def mask_from_ids(rows, pad_id):
    batch = collate(rows, pad_id)
    return {**batch, "attention_mask": (batch["input_ids"] != pad_id).long()}


def padded_with_zero(rows, pad_id):
    return collate(rows, 0)


def cut_to_the_shortest(rows, pad_id):
    return collate([row[: min(map(len, rows))] for row in rows], pad_id)


def padded_to_64(rows, pad_id):
    batch = collate([*rows, [0] * 64], pad_id)
    return {name: tensor[:-1] for name, tensor in batch.items()}


def on_the_left(rows, pad_id):
    batch = collate([row[::-1] for row in rows], pad_id)
    return {name: tensor.flip(1) for name, tensor in batch.items()}


def sorted_by_length(rows, pad_id):
    return collate(sorted(rows, key=len, reverse=True), pad_id)


def rows_grow(rows, pad_id):
    batch = collate(rows, pad_id)
    for row in rows:
        row += [pad_id] * (4 - len(row))
    return batch


def ids_alone(rows, pad_id):
    return collate(rows, pad_id)["input_ids"]


def lists(rows, pad_id):
    return {name: tensor.tolist() for name, tensor in collate(rows, pad_id).items()}


def float_ids(rows, pad_id):
    batch = collate(rows, pad_id)
    return {**batch, "input_ids": batch["input_ids"].float()}


def boolean_mask(rows, pad_id):
    batch = collate(rows, pad_id)
    return {**batch, "attention_mask": batch["attention_mask"].bool()}


def mask_one_short(rows, pad_id):
    batch = collate(rows, pad_id)
    return {
        **batch,
        "attention_mask": batch["attention_mask"].roll(-1, dims=1) * batch["attention_mask"],
    }


class RemembersARow:
    """Right once; then its mask keeps the lengths of the first batch."""

    __name__ = "RemembersARow"

    def __init__(self):
        self.lengths = None

    def __call__(self, rows, pad_id):
        batch = collate(rows, pad_id)
        self.lengths = self.lengths or [len(row) for row in rows]
        places = torch.arange(batch["input_ids"].shape[1])
        batch["attention_mask"] = (places < torch.tensor(self.lengths)[:, None]).long()
        return batch


MISTAKES = {  # exercise -> mistake -> a piece of the hint that it must get
    "count_pairs": {
        each_word_once: "counts every word once",
        once_per_word: "counts a pair once per word",
        overlap_skipped: "Counting comes before merging",
        unordered: "Are (l, o) and (o, l) the same?",
        last_pair_lost: "Does the last pair",
        first_pair_lost: "Does the first pair",
        not_neighbours: "Neighbours only?",
        across_words: "where a word ends",
        of_letters: "Pieces, not letters",
        pieces_counted: "Pairs or pieces?",
        keys_joined: "Which keys do you use?",
        the_best_only: "return all counts",
        emptied: "change its argument",
        doubled: "Count by hand",
    },
    "join": {
        first_only: "the second `an`",
        last_only: "the first `an`",
        order_ignored: "Which comes first?",
        untouched: "Does anything change?",
        from_the_right: "From which side?",
        greedy_chain: "How much may one merge join?",
        one_step_only: "Is each piece used once?",
        letters_lost: "Are all letters still there?",
        a_list: "end with `tuple(…)`",
        a_string: "Where are the borders?",
        text_replaced: "Do you compare whole pieces?",
        needs_a_pair: "a word without any pair",
    },
    "byte_letters": {
        latin_1: "Can you see all of these?",
        all_moved: "keep their own letter?",
        by_number: "Which letter does byte 127 borrow?",
        space_kept: "What about the space?",
        soft_hyphen_kept: "What about byte AD?",
        hard_space_kept: "What about byte A0?",
        both_kept: "bytes A0 and AD",
        ascii_only: "visible characters above 127",
        one_too_far: "Where does borrowing start?",
        in_order: "In which order?",
        a_table: "A list, please",
        half_of_them: "each of the 256 bytes",
        numbers: "Is each entry one character?",
        hexadecimal: "stands for two bytes",
        control_pictures: "Which byte goes wrong first?",
    },
    "encode_word": {
        last_rank_first: "with the *smallest* rank",
        leftmost: "takes the leftmost pair",
        one_merge: "Is one merge enough?",
        no_merge: "Does anything happen?",
        longest_piece: "That is WordPiece",
        unknown_is_zero: "Is every pair in `ranks`?",
        replayed: "how many merges do you look at?",
        glued: "return the pieces?",
        last_piece_lost: "Are all letters",
        stops_at_two: "a pair that stands there twice",
        needs_a_letter: "a word without any pair",
    },
    "offsets": {
        end_included: "Is the end included?",
        with_length: "start and length?",
        space_trimmed: "Whose is the space?",
        from_one: "Does counting start at 0?",
        from_zero_each: "Where does each token start?",
        in_bytes: "Characters or bytes?",
        by_finished_characters: "only a part of a character",
        one_short: "one span for each token",
        starts_only: "Is each span a pair",
        reversed_spans: "expected [('A', (0, 1))",
    },
    "collate": {
        mask_of_ones: "Is everything real?",
        mask_upside_down: "the other way round",
        mask_from_ids: "from the lengths, not from the ids",
        padded_with_zero: "With which id do you fill?",
        cut_to_the_shortest: "cut to the shortest",
        padded_to_64: "work for nothing",
        on_the_left: "On which side?",
        sorted_by_length: "still in their order?",
        rows_grow: "change the rows",
        ids_alone: "Which entries does the model ask for?",
        lists: "Is input_ids a tensor?",
        float_ids: "Ids are whole numbers",
        boolean_mask: "Which dtype should the mask have?",
        mask_one_short: "Expected attention_mask",
    },
}
CASES = [
    pytest.param(name, mistake, said, id=f"{name}-{mistake.__name__}")
    for name, mistakes in MISTAKES.items()
    for mistake, said in mistakes.items()
]


def check(name):
    return getattr(checks.tokenizer, name)


def test_every_exercise_of_the_chapter_is_tested():
    mine = {number for number in checks.EXERCISES if number.startswith("2.")}
    assert mine == {check(name).exercise.number for name in SOLUTIONS}
    assert SOLUTIONS.keys() == MISTAKES.keys() and all(len(m) >= 3 for m in MISTAKES.values())


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_passes(name):
    result = check(name)(SOLUTIONS[name])
    assert result.passed, result
    assert result.message


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_stub_is_not_written_yet(name):
    def stub(*args):
        raise NotImplementedError

    for answer in (stub, ..., lambda *args: None):
        result = check(name)(answer)
        assert not result.passed and not result.written
        assert result.message.startswith("Not written yet")


@pytest.mark.parametrize(("name", "mistake", "said"), CASES)
def test_a_mistake_gets_its_own_hint(name, mistake, said):
    result = check(name)(mistake)
    assert not result.passed and result.written
    assert said in result.message, result.message


@pytest.mark.parametrize("name", MISTAKES)
def test_no_two_mistakes_get_the_same_hint(name):
    messages = [check(name)(mistake).message for mistake in MISTAKES[name]]
    assert len(set(messages)) == len(messages)


@pytest.mark.parametrize(
    ("name", "forgetful", "said"),
    [
        ("encode_word", RemembersAWord, "passes on small words"),
        ("collate", RemembersARow, "in `mini` a logit moves"),
    ],
)
def test_what_passes_alone_may_fail_in_the_real_model(name, forgetful, said):
    result = check(name)(forgetful().__call__)
    assert not result.passed and said in result.message, result.message


def test_checks_leave_the_random_state_alone():
    state = torch.random.get_rng_state()
    for name, solution in SOLUTIONS.items():
        check(name)(solution)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- what the chapter says of the published tokenizer ----


@pytest.fixture(scope="module")
def published(reference) -> Tokenizer:
    return Tokenizer.from_pretrained(reference / "ModernBERT-base")


@pytest.mark.parametrize("name", ["mini", "published"])
def test_the_published_offsets_keep_the_space(name, request):
    tokenizer = (
        Tokenizer.from_pretrained("mini") if name == "mini" else request.getfixturevalue(name)
    )
    options = {"return_offsets_mapping": True, "add_special_tokens": False}
    assert tokenizer("the old town", **options).offset_mapping == [(0, 3), (3, 7), (7, 12)]
    form = json.loads(tokenizer.backend.to_str())
    assert form["pre_tokenizer"]["trim_offsets"] and form["post_processor"]["type"] != "ByteLevel"


def test_robertas_last_step_trims_the_space():
    from tokenizers import processors

    backend = train_bpe(["the old town, the old town"] * 9, 300)
    for trim, start in ((True, 4), (False, 3)):
        backend.post_processor = processors.RobertaProcessing(
            ("[SEP]", 1), ("[CLS]", 0), trim_offsets=trim, add_prefix_space=False
        )
        found = backend.encode("the old town", add_special_tokens=False).offsets
        assert (start, 7) in found


def test_the_published_vocabulary_has_runs_of_spaces(published):
    added = published.backend.get_added_tokens_decoder()
    runs = {i: token.content for i, token in added.items() if token.content.isspace()}
    assert runs == {50278 - n: " " * n for n in range(2, 25)}
    assert list(runs) == list(range(50254, 50277))
    tokens = published.convert_ids_to_tokens(published.encode("if x:\n        return x"))
    assert tokens == ["[CLS]", "if", "Ġx", ":", "Ċ", " " * 8, "return", "Ġx", "[SEP]"]


def test_only_the_published_mask_strips_and_on_its_left(published):
    added = published.backend.get_added_tokens_decoder().values()
    assert [token.content for token in added if token.lstrip] == ["[MASK]"]
    assert not any(token.rstrip for token in added)
    for text in ("photo[MASK]", "photo [MASK]", "photo\n\n[MASK]"):
        assert published.encode(text) == published.encode("photo[MASK]")


def test_the_published_letters_are_those_of_utf_8(published):
    vocabulary = published.get_vocab()
    missing = [b for b, letter in enumerate(byte_letters()) if letter not in vocabulary]
    assert missing == [0xC0, 0xC1, *range(0xF5, 0x100)]


def test_the_encoder_by_rank_gives_the_published_ids(published):
    form = json.loads(published.backend.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(form["merges"])}
    for word in ("Ġphotosynthesis", "Ġhippopotamuses", "Ġwhereabouts", "1234567", "ĠnaÃ¯ve"):
        by_hand = [form["vocab"][piece] for piece in encode_word(word, ranks)]
        assert by_hand == [token.id for token in published.backend.model.tokenize(word)]
