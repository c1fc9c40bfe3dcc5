"""Filling masks: its format and numbers are those of ``transformers``' pipeline."""

import math

import pytest
import torch

from modernbert_mini import FillMask, ModernBertConfig, ModernBertForMaskedLM, ModernBertModel
from modernbert_mini.fill_mask import BATCH_SIZE
from modernbert_mini.tokenizer import Tokenizer, train_bpe

CORPUS = ["the cat sat on the mat and the other cat sat on the hat", "a dog, a log and a fog"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(CORPUS, 300))


@pytest.fixture(scope="module")
def model(tokenizer) -> ModernBertForMaskedLM:
    return random_model(tokenizer)


@pytest.fixture(scope="module")
def fill(model, tokenizer) -> FillMask:
    return FillMask(model, tokenizer)


def random_model(tokenizer: Tokenizer) -> ModernBertForMaskedLM:
    """A tiny model whose random answers differ clearly from each other."""
    torch.manual_seed(0)
    model = ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            local_attention=4,
            initializer_range=0.5,
            embedding_dropout=0.5,
            pad_token_id=tokenizer.pad_token_id,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
        )
    )
    model.init_weights()
    return model


def assert_same(ours, theirs) -> None:
    """Equal structure, types, keys and their order; scores within 1e-5 of each other."""
    assert type(ours) is type(theirs)
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    else:
        assert ours == theirs


# --- Properties -------------------------------------------------------------------------------


def test_scores_are_probabilities_in_falling_order(fill, tokenizer):
    scores = [answer["score"] for answer in fill("the [MASK] sat", top_k=len(tokenizer))]
    assert scores == sorted(scores, reverse=True)
    assert math.isclose(sum(scores), 1.0, abs_tol=1e-4)


def test_the_score_is_the_models_own_probability(fill, model, tokenizer):
    ids = tokenizer("the [MASK] sat", return_tensors="pt").input_ids
    at = ids[0].tolist().index(tokenizer.mask_token_id)
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits[0, at].softmax(-1)
    for answer in fill("the [MASK] sat", top_k=7):
        assert answer["score"] == pytest.approx(float(probabilities[answer["token"]]), abs=1e-6)


def test_the_sequence_holds_the_token_where_the_mask_stood(fill, tokenizer):
    for answer in fill("the cat [MASK] on the mat", top_k=20):
        assert answer["token_str"] == tokenizer.decode([answer["token"]])
        if answer["token"] < tokenizer.vocab_size:  # special tokens are left out of the sequence
            before, after = tokenizer.encode("the cat")[1:-1], tokenizer.encode(" on the mat")[1:-1]
            assert answer["sequence"] == tokenizer.decode([*before, answer["token"], *after])


def test_an_answer_does_not_depend_on_its_batch(fill):
    texts = ["the [MASK]", "a [MASK] and a much longer text: the cat sat on the mat", "[MASK]"]
    together = fill(texts)
    assert_same(together, [fill(text) for text in texts])


def test_many_texts_pass_the_size_of_a_batch(fill):
    texts = [f"the cat [MASK] on {'the ' * (i % 3)}mat" for i in range(2 * BATCH_SIZE + 1)]
    answers = fill(texts, top_k=1)
    assert len(answers) == len(texts)
    assert_same(answers[-1], fill(texts[-1], top_k=1))


def test_several_masks_give_one_list_each(fill):
    first, second = fill("the [MASK] sat on the [MASK]", top_k=3)
    assert len(first) == len(second) == 3
    for answer in (*first, *second):
        assert answer["sequence"].count("[MASK]") == 1 + (answer["token_str"] == "[MASK]")


def test_top_k_ends_at_the_vocabulary(fill, tokenizer):
    assert len(fill("the [MASK]", top_k=10**6)) == len(tokenizer)


def test_no_texts_give_no_answers(fill):
    assert fill([]) == []


def test_a_model_in_training_mode_still_answers_alike(model, tokenizer):
    model.train()
    fill = FillMask(model, tokenizer)
    assert not model.training
    assert fill("the [MASK]") == fill("the [MASK]")


def test_no_graph_is_kept(fill, monkeypatch, model):
    seen = []
    hook = model.decoder.register_forward_hook(lambda m, i, out: seen.append((i[0], out)))
    fill(["the [MASK] sat on the mat", "[MASK] [MASK]"])
    hook.remove()
    (rows, logits), *more = seen
    assert not more
    assert not logits.requires_grad
    assert rows.shape == (3, model.config.hidden_size), "only masked positions are decoded"


def test_low_precision_scores_still_sum_to_one(tokenizer):
    fill = FillMask(random_model(tokenizer).to(torch.bfloat16), tokenizer)
    scores = [answer["score"] for answer in fill("the [MASK]", top_k=len(tokenizer))]
    assert math.isclose(sum(scores), 1.0, abs_tol=1e-4)


# --- Targets ----------------------------------------------------------------------------------


def test_targets_limit_the_answers_without_changing_scores(fill, tokenizer):
    everything = {a["token_str"]: a["score"] for a in fill("the [MASK]", top_k=len(tokenizer))}
    answers = fill("the [MASK]", targets=["b", "a", "a", "c"], top_k=10)
    assert sorted(a["token_str"] for a in answers) == ["a", "b", "c"]
    for answer in answers:
        assert answer["score"] == pytest.approx(everything[answer["token_str"]], abs=1e-6)
    assert len(fill("the [MASK]", targets="b")) == 1


def test_a_target_of_several_tokens_counts_as_its_first_and_says_so(fill):
    with pytest.warns(UserWarning, match="'zqzq'.*'z'"):
        (answer,) = fill("the [MASK]", targets="zqzq")
    assert answer["token_str"] == "z"


def test_no_usable_target_is_an_error(fill):
    with pytest.raises(ValueError, match="at least one"):
        fill("the [MASK]", targets=[])
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="at least"):
        fill("the [MASK]", targets=[""])


# --- Mistaken input ---------------------------------------------------------------------------


def test_a_text_without_a_mask_is_named(fill):
    with pytest.raises(ValueError, match=r"no \[MASK\] in the text 'the hat'"):
        fill(["the [MASK]", "the hat"])
    with pytest.raises(ValueError, match=r"no \[MASK\]"):
        fill("")


def test_top_k_starts_at_one(fill):
    with pytest.raises(ValueError, match="at least 1"):
        fill("the [MASK]", top_k=0)


def test_anything_but_text_is_a_type_error(fill):
    with pytest.raises(TypeError, match="item 0"):
        fill([7])


def test_a_model_without_a_vocabulary_is_refused(model, tokenizer):
    with pytest.raises(TypeError, match="ModernBertForMaskedLM"):
        FillMask(ModernBertModel(model.config), tokenizer)


def test_a_tokenizer_without_a_mask_is_refused(model):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    with pytest.raises(ValueError, match="no mask token"):
        FillMask(model, Tokenizer(Backend(models.BPE())))


# --- Equality with transformers ---------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory, reference):
    """One random model with the published tokenizer, here and in a pipeline."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_pretrained(reference / "ModernBERT-base")
    model = random_model(tokenizer)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    pipeline = transformers.pipeline(
        "fill-mask",
        model=transformers.AutoModelForMaskedLM.from_pretrained(folder),
        tokenizer=transformers.AutoTokenizer.from_pretrained(reference / "ModernBERT-base"),
    )
    return FillMask(model, tokenizer), pipeline


@pytest.mark.filterwarnings("ignore:target")
@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("The capital of France is [MASK].", {}),
        (["The capital of France is [MASK]."], {}),
        (["A [MASK].", "A longer text with its [MASK] in the middle.", "[MASK]"], {"top_k": 2}),
        (["One [MASK].", "Two [MASK] of [MASK]."], {"top_k": 3}),
        ("Two [MASK] of [MASK] at [MASK]", {"top_k": 1}),
        (["Two [MASK] of [MASK] in a list"], {}),
        ("naïve 東京 [MASK] 🤗 [SEP] and [PAD] specials", {"top_k": 4}),
        ("Hi [MASK]", {"targets": ["Paris", "London", "Paris"]}),
        ("Hi [MASK]", {"targets": "Paris", "top_k": 9}),
        ("Hi [MASK] and [MASK]", {"targets": [" Paris", "zzqqxx"], "top_k": 2}),
        (["Hi [MASK]", "Ho [MASK]"], {"targets": ["ĠParis"], "top_k": 1}),
    ],
    ids=str,
)
def test_answers_are_those_of_the_pipeline(both, text, options):
    ours, theirs = both
    assert_same(ours(text, **options), theirs(text, **options))
