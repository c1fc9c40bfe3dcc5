"""The cloze set is well formed, and is scored as it says."""

import pytest
import torch

from modernbert_mini import ModernBertForMaskedLM, Tokenizer, cloze, data


@pytest.fixture(scope="module")
def mini() -> Tokenizer:
    return Tokenizer.from_pretrained("mini")


class Rigged:
    """Gives the guesses that it is told, in place of FillMask."""

    def __init__(self, guesses: dict[str, list[str]], tokenizer: Tokenizer) -> None:
        self.guesses, self.tokenizer = guesses, tokenizer

    def __call__(self, sentences: list[str], top_k: int) -> list[list[dict]]:
        return [
            [self.describe(word) for word in self.guesses.get(sentence, ["the"] * top_k)]
            for sentence in sentences
        ]

    def describe(self, word: str) -> dict:
        token = self.tokenizer.encode(f" {word}", add_special_tokens=False)[0]
        return {"token": token, "token_str": f" {word}", "score": 0.2}


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


def test_a_tokenizer_without_any_of_the_words_is_refused(mini):
    fact = cloze.Fact("animals", "It is a [MASK].", ("hippopotamus", "rhinoceros"))
    with pytest.raises(ValueError, match="none of hippopotamus, rhinoceros"):
        cloze.answer_ids(fact, mini)


def test_no_sentence_stands_in_the_training_text():
    try:
        corpora = [data.vital_articles(), data.python_docs(), data.wordnet()]
    except data.CorpusNotFoundError as error:
        pytest.skip(str(error))
    text = "\n".join(document for corpus in corpora for document in corpus.documents)
    for fact in cloze.facts():
        for word in fact.answers:
            assert fact.sentence.replace(cloze.BLANK, word) not in text


def test_one_right_guess_counts_at_its_place(mini, monkeypatch):
    guesses = {
        "The capital of France is [MASK].": ["Paris", "France", "city", "the", "of"],
        "A cow gives [MASK].": ["the", "of", "a", "in", "milk"],
        "The sun rises in the [MASK].": ["sun", "West", "sky", "world", "year"],
    }
    monkeypatch.setattr(cloze, "FillMask", lambda model, tokenizer: Rigged(guesses, tokenizer))
    scored = cloze.score(None, mini)
    assert (scored["facts"], scored["top1"], scored["top5"]) == (50, 1 / 50, 2 / 50)
    places = {a["sentence"]: a["right_at"] for a in scored["answers"]}
    assert [places[sentence] for sentence in guesses] == [1, 5, None]
    assert scored["answers"][0]["guesses"][0] == ["Paris", 0.2]


def test_frequencies_guess_the_same_everywhere(mini):
    logits = torch.zeros(len(mini))
    for weight, word in enumerate(["milk", "the", "of", "Paris"], start=1):
        logits[mini.encode(f" {word}", add_special_tokens=False)[0]] = weight
    scored = cloze.score_frequencies(logits, mini)
    # Paris is guessed first; milk answers a cow's gift, a sheep's use and what cheese is made of.
    assert (scored["top1"], scored["top5"]) == (1 / 50, 4 / 50)


def test_a_model_is_scored(mini):
    model = ModernBertForMaskedLM.from_pretrained("mini")
    scored = cloze.score(model, mini)
    assert scored["facts"] == len(scored["answers"]) == 50
    assert 0 <= scored["top1"] <= scored["top5"] <= 1
    assert model.training is False
