"""The cloze set is well formed, and is scored as it says."""

import json
from types import SimpleNamespace

import pytest
import torch

from modernbert_mini import FillMask, ModernBertForMaskedLM, Tokenizer, cloze, data


@pytest.fixture(scope="module")
def mini() -> Tokenizer:
    return Tokenizer.from_pretrained("mini")


class Rigged(torch.nn.Module):
    """Gives the guesses that it is told, and nothing where it is told none."""

    def __init__(self, guesses: dict[str, list[str]], tokenizer: Tokenizer) -> None:
        super().__init__()
        self.decoder = torch.nn.Linear(1, 1)
        self.guesses = {
            tuple(tokenizer.encode(sentence)): [first_piece(word, tokenizer) for word in words]
            for sentence, words in guesses.items()
        }
        self.pad, self.vocab_size = tokenizer.pad_token_id, len(tokenizer)

    def forward(self, input_ids, attention_mask, labels):
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            ids = tuple(i for i in ids if i != self.pad)
            for rank, guess in enumerate(self.guesses.get(ids, [])):
                logits[row, :, guess] = 9 - rank
        return SimpleNamespace(logits=logits)


def first_piece(word: str, tokenizer: Tokenizer) -> int:
    return tokenizer.encode(f" {word}", add_special_tokens=False)[0]


def test_there_are_fifty_facts_of_nine_topics():
    facts = cloze.facts()
    assert len(facts) == len({fact.sentence for fact in facts}) == 50
    assert len({fact.topic for fact in facts}) == 9


@pytest.mark.parametrize("fact", cloze.facts(), ids=lambda fact: fact.sentence)
def test_a_fact_is_one_sentence_with_one_mask_inside(fact):
    assert fact.sentence.count(cloze.BLANK) == 1
    assert fact.sentence.endswith(".") and not fact.sentence.startswith(cloze.BLANK)
    assert fact.answers and len(set(fact.answers)) == len(fact.answers)
    before = fact.sentence.lower().split()
    assert not [word for word in fact.answers if word.lower() in before], "the sentence tells"


@pytest.mark.parametrize("name", ["mini", "published"])
def test_the_first_answer_is_one_token(name, mini, request):
    tokenizer = mini
    if name == "published":
        folder = request.getfixturevalue("reference") / "ModernBERT-base"
        tokenizer = Tokenizer.from_pretrained(folder)
    for fact in cloze.facts():
        first = tokenizer.encode(f" {fact.answers[0]}", add_special_tokens=False)
        assert len(first) == 1, fact
        assert first[0] in cloze.answer_ids(fact, tokenizer)


def test_what_a_vocabulary_cannot_say_is_wrong(mini, monkeypatch):
    fact = cloze.Fact("animals", "It is a [MASK].", ("hippopotamus", "rhinoceros"))
    monkeypatch.setattr(cloze, "facts", lambda: [fact])
    scored = cloze.score(Rigged({fact.sentence: ["hippopotamus"]}, mini), mini)
    assert (scored["answerable"], scored["top5"]) == (0, 0)


def test_no_sentence_stands_in_the_training_text():
    try:
        corpora = [data.vital_articles(), data.python_docs(), data.wordnet()]
    except data.CorpusNotFoundError as error:
        pytest.skip(str(error))
    text = "\n".join(document for corpus in corpora for document in corpus.documents)
    for fact in cloze.facts():
        for word in fact.answers:
            assert fact.sentence.replace(cloze.BLANK, word) not in text


def test_one_right_guess_counts_at_its_place(mini):
    guesses = {
        "The capital of France is [MASK].": ["Paris", "France", "city", "the", "of"],
        "A cow gives [MASK].": ["the", "of", "a", "in", "milk"],
        "The sun rises in the [MASK].": ["sun", "West", "sky", "world", "year", "east"],
    }
    scored = cloze.score(Rigged(guesses, mini), mini)
    assert (scored["facts"], scored["answerable"]) == (50, 50)
    assert (scored["top1"], scored["top5"]) == (1 / 50, 2 / 50)
    places = {a["sentence"]: a["right_at"] for a in scored["answers"]}
    assert [places[sentence] for sentence in guesses] == [1, 5, None]
    assert [word for word, _ in scored["answers"][0]["guesses"]] == list(guesses.values())[0]


def test_frequencies_guess_the_same_everywhere(mini):
    logits = torch.zeros(len(mini))
    for weight, word in enumerate(["milk", "the", "of", "Paris"], start=1):
        logits[first_piece(word, mini)] = weight
    scored = cloze.score_frequencies(logits, mini)
    # Paris is guessed first; milk answers a cow's gift, a sheep's use and what cheese is made of.
    assert (scored["top1"], scored["top5"]) == (1 / 50, 4 / 50)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_model_is_scored_as_fill_mask_answers(mini, sparse):
    model = ModernBertForMaskedLM.from_pretrained("mini", sparse_prediction=sparse).train()
    scored = cloze.score(model, mini)
    assert model.training
    answer = scored["answers"][2]
    expected = FillMask(model, mini)(answer["sentence"])
    assert [word for word, _ in answer["guesses"]] == [e["token_str"].strip() for e in expected]
    assert [p for _, p in answer["guesses"]] == pytest.approx(
        [e["score"] for e in expected], abs=1e-3
    )


def test_what_the_card_of_mini_says_can_be_counted_again(mini, root):
    recorded = json.loads((root / "modernbert_mini" / "mini" / "training.json").read_text())[
        "cloze"
    ]
    scored = cloze.score(ModernBertForMaskedLM.from_pretrained("mini"), mini)
    assert [a["sentence"] for a in recorded["answers"]] == [f.sentence for f in cloze.facts()]
    for share in ("top1", "top5"):  # another processor may turn one near tie around
        assert scored[share] == pytest.approx(recorded[share], abs=0.021)
