"""Checks of chapter 2, tokens."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain, combinations, count, pairwise

import torch

from modernbert_mini.checks._machinery import Hint, exercise, expect, expect_tensor

Word = tuple[str, ...]
Pair = tuple[str, str]

TEXTS = (
    "The method returns a list of strings, sorted by their length.",
    "Don't stop: it's 1970, isn't it?",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "A naïve café in Zürich sells tea ☕ to 東京.",
    "Unquestionably, hippopotamuses misunderstand electroencephalography.",
    "  two spaces,\ttabs,\r\n\r\nand     runs",
)


def _join(word: Word, pair: Pair) -> Word:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return tuple(out)


def _expect_equal(
    value: object, right: object, mistakes: Iterable[tuple[object, str]], otherwise: str
) -> None:
    """As `expect_close`, for values that are equal or not."""
    if value == right:
        return
    for wrong, hint in mistakes:
        expect(value != wrong, hint)
    raise Hint(otherwise)


@cache
def _tokenizer():
    from modernbert_mini import Tokenizer

    return Tokenizer.from_pretrained("mini")


@cache
def _model():
    from modernbert_mini import ModernBertForMaskedLM

    return ModernBertForMaskedLM.from_pretrained("mini").eval()


@exercise("2.1", "Count pairs", difficulty=1, minutes=5)
def count_pairs(answer):
    words = {("l", "o", "w"): 5, ("l", "o", "w", "er"): 2, ("a",): 9, ("o", "l", "l", "l", "l"): 3}
    given = dict(words)
    found = answer(given)
    expect(given == words, "Does your function change its argument? It should only count.")
    expect(
        isinstance(found, dict),
        "Does your function return all counts? A dictionary (or Counter) from each pair to its "
        f"number is asked for; you return a value of type `{type(found).__name__}`.",
    )
    found = {pair: n for pair, n in found.items() if n}

    def counted(pairs_of: Callable[[Word], Iterable], weighted: bool = True) -> Counter:
        counts: Counter = Counter()
        for word, n in words.items():
            for pair in pairs_of(word):
                counts[pair] += n if weighted else 1
        return counts

    expect(
        found != counted(lambda word: word),
        "Pairs or pieces? These are the counts of single pieces.",
    )
    expect(
        not any(isinstance(key, str) for key in found),
        "Which keys do you use? A pair is a tuple of two pieces, `('l', 'o')`. As one string, "
        "`('a', 'bc')` and `('ab', 'c')` would be the same.",
    )
    _expect_equal(
        found,
        counted(pairwise),
        [
            (
                counted(pairwise, weighted=False),
                "How often does each word stand in the text? Yours counts every word once, but "
                "`low` stands there 5 times.",
            ),
            (
                counted(lambda word: set(pairwise(word))),
                "How often is (l, l) in `ollll`? Three times. Yours counts a pair once per word.",
            ),
            (
                counted(lambda word: _without_overlap(word)),
                "How often is (l, l) in `ollll`? Three times: an l in the middle belongs to two "
                "pairs. Yours skips those that overlap, as a merge would. Counting comes before "
                "merging.",
            ),
            (
                counted(lambda word: map(tuple, map(sorted, pairwise(word)))),
                "Are (l, o) and (o, l) the same? No: a merge joins them in this order.",
            ),
            (
                counted(lambda word: pairwise(word[:-1])),
                "Does the last pair of each word count? `low` has two pairs, (l, o) and (o, w).",
            ),
            (
                counted(lambda word: pairwise(word[1:])),
                "Does the first pair of each word count? `low` has two pairs, (l, o) and (o, w).",
            ),
            (
                counted(lambda word: combinations(word, 2)),
                "Neighbours only? Yours pairs each piece with every later one; l and w never "
                "stand side by side in `low`.",
            ),
            (
                Counter(pairwise(chain.from_iterable(w * n for w, n in words.items()))),
                "Does a pair end where a word ends? Yours also counts pairs across words.",
            ),
            (
                counted(lambda word: pairwise("".join(word))),
                "What are the neighbours? Pieces, not letters: `er` is one piece by now.",
            ),
        ],
        "Count by hand for `low`, which stands there 5 times: (l, o) and (o, w), 5 each. "
        f"Yours gives {dict(found)}.",
    )
    return "Each pair with its number. The first merge would be l + o."


def _without_overlap(word: Word) -> Iterable[Pair]:
    last = None
    for pair in pairwise(word):
        last = None if pair == last else pair
        if last:
            yield pair


@exercise("2.2", "Merge a pair", difficulty=1, minutes=8)
def join(answer):
    word = ("b", "a", "n", "a", "n", "a", "s")
    out = answer(word, ("a", "n"))
    expect(
        not isinstance(out, str),
        "Where are the borders? A string has lost them; return the pieces.",
    )
    expect(
        not isinstance(out, list),
        "A list or a tuple? Words are the keys of a dictionary, and a list cannot be one: "
        "end with `tuple(…)`.",
    )
    expect(isinstance(out, tuple), f"Is it a tuple of pieces? It is a `{type(out).__name__}`.")
    expect(
        "".join(out) == "".join(word),
        f"Are all letters still there? `{'|'.join(word)}` became `{'|'.join(out)}`. "
        "A merge only removes borders.",
    )
    once = ("b", "an", "a", "n", "a", "s")
    _expect_equal(
        out,
        ("b", "an", "an", "a", "s"),
        [
            (once, "What about the second `an`? Every place where the pair stands is joined."),
            (("b", "a", "n", "an", "a", "s"), "What about the first `an`? Join every place."),
            (
                ("b", "a", "na", "na", "s"),
                "Which comes first? The pair is (a, n), in this order; yours joins n with a.",
            ),
            (word, "Does anything change? The pair (a, n) stands in the word twice."),
        ],
        f"Expected `b|an|an|a|s`, got `{'|'.join(out)}`.",
    )
    triple = answer(("a", "a", "a"), ("a", "a"))
    _expect_equal(
        triple,
        ("aa", "a"),
        [
            (("a", "aa"), "From which side? Pairs that overlap are joined from the left: `aa|a`."),
            (
                ("aaa",),
                "How much may one merge join? Two pieces. Yours goes on to join what it has just "
                "made, so `a|a|a` becomes one piece.",
            ),
            (
                ("aa", "aa"),
                "Is each piece used once? From `a|a|a` yours makes four letters: after a match, "
                "go on behind *both* pieces.",
            ),
        ],
        f"From `a|a|a` and the pair (a, a), expected `aa|a`, got `{triple}`.",
    )
    _expect_equal(
        answer(("xa", "n", "a", "no", "a", "n"), ("a", "n")),
        ("xa", "n", "a", "no", "an"),
        [],
        "Do you compare whole pieces? `xa` only ends in a, and `no` only starts with n: neither "
        "is part of the pair (a, n). A replacement in a string does not see the borders.",
    )
    for short in (("a",), ()):
        expect(
            answer(short, ("a", "n")) == short,
            f"What of a word without any pair? `{short}` should come back as it is.",
        )
    return "With this and the counts, training is a loop of three lines."


@exercise("2.3", "Bytes as letters", difficulty=2, minutes=10)
def byte_letters(answer):
    from tokenizers import pre_tokenizers

    out = answer()
    expect(
        not isinstance(out, dict),
        "A list, please: the letter of byte b at place b. A dictionary holds the same, but its "
        "order is not that of the bytes.",
    )
    expect(
        isinstance(out, list | tuple | str) and len(out) == 256,
        "Is there one letter for each of the 256 bytes, at its place?",
    )
    out = list(out)
    expect(
        all(isinstance(letter, str) and len(letter) == 1 for letter in out),
        "Is each entry one character? `chr` makes the character of a number.",
    )
    twice = [letter for letter, n in Counter(out).items() if n > 1]
    expect(
        not twice,
        f"Can every letter be turned back? {twice[:1]} stands for two bytes.",
    )
    plain, everything_moved = list(map(chr, range(256))), [chr(256 + b) for b in range(256)]
    by_number = [chr(b) if _visible(b) else chr(256 + b) for b in range(256)]
    _expect_equal(
        out,
        _byte_letters(),
        [
            (
                plain,
                "Can you see all of these? Byte 32 is a space and byte 10 a line break: they need "
                "a visible stand-in.",
            ),
            (
                everything_moved,
                "Do visible characters keep their own letter? `A` should stay `A`.",
            ),
            (
                by_number,
                "Which letter does byte 127 borrow? The borrowed letters are taken one after the "
                "other, 256, 257, …, without gaps; yours skips ahead by the number of the byte.",
            ),
            (
                _byte_letters(lambda b: chr(b).isprintable()),
                "What about the space? Python calls it printable, but in a list of tokens you "
                "could not see it. It becomes `Ġ`.",
            ),
            (
                _byte_letters(lambda b: _visible(b) or b == 0xAD),
                "What about byte AD? In Latin-1 it is the soft hyphen, which most screens hide.",
            ),
            (
                _byte_letters(lambda b: _visible(b) or b == 0xA0),
                "What about byte A0? In Latin-1 it is the no-break space: as invisible as "
                "any space.",
            ),
            (
                _byte_letters(lambda b: _visible(b) or b in (0xA0, 0xAD)),
                "What about bytes A0 and AD? In Latin-1 they are the no-break space and the soft "
                "hyphen, and both are invisible.",
            ),
            (
                _byte_letters(lambda b: 32 < b < 127),
                "Do the visible characters above 127 keep theirs? In Latin-1 byte E9 is é.",
            ),
            (
                _byte_letters(start=257),
                "Where does borrowing start? Byte 0 takes letter number 256, `Ā`.",
            ),
            (
                sorted(_byte_letters()),
                "In which order? Place b holds the letter of byte b; these are sorted letters.",
            ),
        ],
        "Which byte goes wrong first? Compare with `as_letters`: byte 0 is `Ā`, byte 10 `Ċ`, "
        f"byte 32 `Ġ`, byte 65 `A`. Yours: {[out[b] for b in (0, 10, 32, 65)]}.",
    )
    assert sorted(out) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return "All 256: the letters in which GPT-2, RoBERTa and ModernBERT write their vocabularies."


def _visible(byte: int) -> bool:
    return byte != 32 and chr(byte).isprintable()


def _byte_letters(keeps: Callable[[int], bool] = _visible, start: int = 256) -> list[str]:
    borrowed = count(start)
    return [chr(b) if keeps(b) else chr(next(borrowed)) for b in range(256)]


class _Ranks(dict):
    """Ranks of merges that notice when someone walks through all of them."""

    walked = False

    def _walk(self):
        self.walked = True
        return super().__iter__()

    __iter__ = _walk

    def keys(self):
        self.walked = True
        return super().keys()

    def items(self):
        self.walked = True
        return super().items()


def _ranks(*merges: str) -> _Ranks:
    return _Ranks({tuple(merge.split("+")): rank for rank, merge in enumerate(merges)})


def _greedy(word: str, pieces: set[str]) -> Word:
    """WordPiece's way: the longest known piece, from the left."""
    out = []
    while word:
        size = next(n for n in range(len(word), 0, -1) if n == 1 or word[:n] in pieces)
        out.append(word[:size])
        word = word[size:]
    return tuple(out)


def _leftmost(word: str, ranks: dict[Pair, int]) -> Word:
    pieces = tuple(word)
    while fits := [pair for pair in pairwise(pieces) if pair in ranks]:
        pieces = _join(pieces, fits[0])
    return pieces


def _by_rank(word: str, ranks: dict[Pair, int], first: Callable = min, steps: int = 99) -> Word:
    pieces = tuple(word)
    for _ in range(steps):
        fits = [pair for pair in pairwise(pieces) if pair in ranks]
        if not fits:
            break
        pieces = _join(pieces, first(fits, key=ranks.__getitem__))
    return pieces


@exercise("2.4", "Your own encoder in the real model", difficulty=3, minutes=15)
def encode_word(answer):
    ranks = _ranks("a+t", "t+h", "e+r", "e+a", "e+at", "h+e")
    pieces = {"".join(pair) for pair in dict.keys(ranks)}
    word = "weather"
    right = _by_rank(word, ranks)
    first = answer(word, ranks)
    expect(
        isinstance(first, list | tuple),
        "Does your function return the pieces? A list or a tuple of strings is asked for, you "
        f"return a value of type `{type(first).__name__}`.",
    )
    out = tuple(first)
    expect(
        "".join(out) == word,
        f"Are all letters of `{word}` still there? You return `{'|'.join(map(str, out))}`.",
    )
    _expect_equal(
        out,
        right,
        [
            (
                _by_rank(word, ranks, max),
                "Which merge comes first? The one that training learnt first, with the *smallest* "
                "rank; yours starts with the largest.",
            ),
            (
                _greedy(word, pieces),
                "Do you take the longest piece? That is WordPiece. BPE takes the pair with the "
                "smallest rank, wherever it stands and however short it is.",
            ),
            (
                _leftmost(word, ranks),
                "Which merge comes first? Yours takes the leftmost pair that fits. BPE takes the "
                "one with the smallest rank, wherever it stands.",
            ),
            (
                _by_rank(word, ranks, steps=1),
                "Is one merge enough? Go on until no pair of neighbours is in `ranks`.",
            ),
            (
                tuple(word),
                "Does anything happen? The pair (a, t) stands in the word and has rank 0.",
            ),
            (
                (word,),
                "Is every pair in `ranks`? `ranks.get(pair, 0)` makes rank 0 of a pair that "
                "was never learnt; leave such pairs alone.",
            ),
        ],
        f"For `{word}`, expected `{'|'.join(right)}`, got `{'|'.join(out)}`. "
        "Take the merge with the smallest rank among the pairs that are there, join, repeat.",
    )
    expect(
        not ranks.walked,
        "Right, but how many merges do you look at? You go through all of `ranks`, and mini has "
        "thousands. Go through the *pairs of the word* and look each one up.",
    )
    _expect_equal(
        tuple(answer("aaaa", _ranks("a+a"))),
        ("aa", "aa"),
        [],
        "What of a pair that stands there twice? `a|a|a|a` with the merge a + a is `aa|aa`.",
    )
    for short in ("", "x"):
        expect(
            tuple(answer(short, ranks)) == tuple(short),
            f"What of a word without any pair, `{short!r}`? It comes back as it is.",
        )
    return _encode_for_mini(answer)


def _encode_for_mini(answer) -> str:
    """Cut real texts with the learner's encoder and mini's merges, and let mini read the ids."""
    import json

    from tokenizers import pre_tokenizers

    tokenizer = _tokenizer()
    form = json.loads(tokenizer.backend.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(form["merges"])}
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str

    def encode(text: str) -> list[int]:
        ids = []
        for word, _ in cut(unicodedata.normalize("NFC", text)):
            pieces = tuple(answer(word, ranks))
            right = _by_rank(word, ranks, steps=len(word))
            expect(
                pieces == right,
                f"Your function passes on small words, but of `{word}` it makes "
                f"`{'|'.join(map(str, pieces))}`; mini's tokenizer makes `{'|'.join(right)}`. "
                "Does it remember something from an earlier word?",
            )
            ids += [form["vocab"][piece] for piece in pieces]
        return ids

    total = 0
    for text in TEXTS:
        ids = encode(text)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        total += len(ids)
    before, after = "The method returns a", " of strings."
    row = [tokenizer.cls_token_id, *encode(before), tokenizer.mask_token_id, *encode(after)]
    ids = torch.tensor([[*row, tokenizer.sep_token_id]])  # (1, L)
    with torch.no_grad():
        best = _model()(ids).logits[ids == tokenizer.mask_token_id].argmax()
    return (
        f"{total} tokens of {len(TEXTS)} texts, each with the id that mini's tokenizer gives. And "
        f"`mini` read your ids: `{before} [MASK]{after}` → `{tokenizer.decode(best).strip()}`."
    )


OFFSET_TEXTS = (
    "A naïve café.",
    "tea ☕, x = 東京\n\tdone",
    "two  spaces — and 👩\u200d👧 é",
)


def _offsets(text: str, tokens: list[str]) -> list[tuple[int, int]]:
    """The rule of the library: the characters that a token has at least one byte of."""
    owner = [i for i, character in enumerate(text) for _ in character.encode()]
    spans, at = [], 0
    for token in tokens:
        spans.append((owner[at], owner[at + len(token) - 1] + 1))
        at += len(token)
    return spans


def _byte_offsets(tokens: list[str]) -> list[tuple[int, int]]:
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    return list(pairwise(ends))


def _completed(text: str, tokens: list[str]) -> list[tuple[int, int]]:
    """Characters counted only once their last byte is there: pieces of one have an empty span."""
    done = [0]
    for character in text:
        done.append(done[-1] + len(character.encode()))

    def characters(size: int) -> int:
        return sum(end <= size for end in done) - 1

    return [(characters(a), characters(b)) for a, b in _byte_offsets(tokens)]


@exercise("2.5", "Offsets", difficulty=3, minutes=15)
def offsets(answer):
    tokenizer = _tokenizer()

    def tokens_of(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))

    def ask(text: str) -> list:
        spans = answer(text, tokens_of(text))
        return [tuple(int(n) for n in span) for span in spans]

    text = "A plain cat."
    tokens = tokens_of(text)
    spans = answer(text, tokens)
    expect(
        isinstance(spans, list | tuple) and len(spans) == len(tokens),
        f"Is there one span for each token? {len(tokens)} tokens went in; return a list of as "
        "many pairs.",
    )
    expect(
        all(isinstance(span, list | tuple) and len(span) == 2 for span in spans),
        "Is each span a pair, (start, end)?",
    )
    right = _offsets(text, tokens)
    shown = list(zip(tokens, right, strict=True))
    _expect_equal(
        ask(text),
        right,
        [
            (
                [(a, b - 1) for a, b in right],
                "Is the end included? As in a slice, `text[start:end]`, it is not.",
            ),
            (
                [(a, b - a) for a, b in right],
                "Start and end, or start and length? Each pair holds two places in the text.",
            ),
            (
                [(a + (text[a] == " "), b) for a, b in right],
                "Whose is the space? `Ġ` is part of the token, so the space is in its span.",
            ),
            (
                [(a + 1, b + 1) for a, b in right],
                "Does counting start at 0? The first character has number 0.",
            ),
            (
                [(0, b - a) for a, b in right],
                "Where does each token start? Yours all start at 0.",
            ),
        ],
        f"For {text!r}, expected {shown}, got {ask(text)}.",
    )
    for text in OFFSET_TEXTS:
        tokens = tokens_of(text)
        right, found = _offsets(text, tokens), ask(text)
        assert (
            right
            == tokenizer(text, return_offsets_mapping=True, add_special_tokens=False).offset_mapping
        )
        wrong = next(
            (i for i, pair in enumerate(zip(found, right, strict=True)) if len({*pair}) > 1), 0
        )
        _expect_equal(
            found,
            right,
            [
                (
                    _byte_offsets(tokens),
                    "Characters or bytes? `é` is one character and two bytes, and each letter of "
                    "a token stands for a byte.",
                ),
                (
                    _completed(text, tokens),
                    "What of a token that is only a part of a character? It gets the span of the "
                    "whole character, and so does each of its other parts. Yours is empty until "
                    "the last byte has come.",
                ),
            ],
            f"In {text!r}, token {wrong} is {tokens[wrong]!r}: expected {right[wrong]}, "
            f"got {found[wrong]}. Which characters does it have at least one byte of?",
        )
    return "The same spans as mini's tokenizer gives, split characters included."


@exercise("2.6", "A padding collator", difficulty=2, minutes=12)
def collate(answer):
    pad = 7
    rows = [[5, 6], [1, 2, pad, 3], [4]]
    given = [list(row) for row in rows]
    out = answer(given, pad)
    expect(
        isinstance(out, dict) and {"input_ids", "attention_mask"} <= out.keys(),
        "Which entries does the model ask for? Return a dictionary with `input_ids` and "
        "`attention_mask`.",
    )
    expect(
        given == rows,
        "Does your function change the rows it was given? `row += …` and `row.append` do: the "
        "caller's texts would carry padding from then on.",
    )
    ids, mask = out["input_ids"], out["attention_mask"]
    shape, longest = (len(rows), max(map(len, rows))), max(map(len, rows))
    shortest = min(map(len, rows))
    seen = tuple(getattr(ids, "shape", ()))
    expect(
        seen != (len(rows), shortest),
        "Does every row keep all its tokens? Yours are cut to the shortest; fill up to the "
        "longest.",
    )
    expect(
        not (len(seen) == 2 and seen[0] == len(rows) and seen[1] > longest),
        f"How long must the rows be? As long as the longest, {longest} here; yours are "
        f"{seen[-1] if seen else 0}: work for nothing.",
    )
    expect_tensor(ids, shape, what="input_ids")
    expect(ids.dtype == torch.long, f"Ids are whole numbers: int64, not `{ids.dtype}`.")
    right = torch.full(shape, pad)
    real = torch.zeros(shape, dtype=torch.long)
    for i, row in enumerate(rows):
        right[i, : len(row)] = torch.tensor(row)
        real[i, : len(row)] = 1
    on_the_left = torch.stack(
        [torch.roll(r, longest - len(row)) for r, row in zip(right, rows, strict=True)]
    )
    expect(
        not torch.equal(ids, on_the_left),
        "On which side? Here padding goes to the right. On the left it works as well, but then "
        "position 0 is no longer [CLS].",
    )
    expect(
        not torch.equal(ids, right.masked_fill(real == 0, 0)),
        "With which id do you fill? `pad_id` is given; 0 is an ordinary token.",
    )
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    expect(
        not torch.equal(ids, right[order]),
        "Are the rows still in their order? Yours are sorted by length, and the labels of the "
        "texts would no longer fit.",
    )
    expect(
        torch.equal(ids, right),
        f"Expected input_ids `{right.tolist()}`, got `{ids.tolist()}`.",
    )
    expect_tensor(mask, shape, what="attention_mask")
    expect(
        not (mask == 1).all(),
        "Is everything real? A mask of ones lets each token look at the padding.",
    )
    expect(
        not torch.equal(mask.long(), 1 - real),
        "Is 1 a token or padding? It is a token; yours is the other way round.",
    )
    expect(
        not torch.equal(mask.long(), (right != pad).long()),
        "May a text itself hold the id of padding? The second row does, and it is real there. "
        "Make the mask from the lengths, not from the ids.",
    )
    expect(
        torch.equal(mask.long(), real),
        f"Expected attention_mask `{real.tolist()}`, got `{mask.tolist()}`.",
    )
    expect(
        mask.dtype == torch.long,
        "Which dtype should the mask have? int64 like the ids, as the library's; "
        f"not `{mask.dtype}`.",
    )
    return _batch_for_mini(answer)


def _batch_for_mini(answer) -> str:
    """The model must say of each text in the batch what it says of the text alone."""
    tokenizer, model = _tokenizer(), _model()
    rows = [tokenizer.encode(text) for text in TEXTS[:3]]
    with torch.no_grad():
        batch = model(**answer([list(row) for row in rows], tokenizer.pad_token_id)).logits
        alone = [model(torch.tensor([row])).logits[0] for row in rows]
    difference = max(
        float((batch[i, : len(row)] - alone[i]).abs().max()) for i, row in enumerate(rows)
    )
    expect(
        difference < 1e-3,
        f"Your batches look right, but in `mini` a logit moves by {difference:.1e} against the "
        "text alone. Does your function remember something from an earlier call?",
    )
    return (
        f"`mini` read {len(rows)} texts of {min(map(len, rows))} to {max(map(len, rows))} tokens "
        f"in your batch: no logit is further than {difference:.0e} from that of the text alone."
    )
