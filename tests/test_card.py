"""The package on Colab's T4 as far as that shows without one: `tools.card` stands for it."""

import pytest
import torch
from tools.card import Card

from modernbert_mini import (
    ConfigError,
    FillMask,
    FlatteningCollator,
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    Tokenizer,
    benchmark,
)
from modernbert_mini.fine_tuning import TASKS, FineTuningConfig, fine_tune, predict

T4 = (7, 5)


@pytest.fixture
def card():
    with Card(T4) as card:
        yield card


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained("mini")


# ---- the card itself ----


def test_what_is_made_or_moved_there_stays_there(card):
    made, moved = torch.ones(2, 3, device="cuda"), torch.ones(2, 3).to("cuda:0")
    for x in (made, moved, made + moved, made.half(), made[0], made.mT, made.sum() * 2):
        assert x.is_cuda and x.device == torch.device("cuda", 0)
    assert made.cpu().device.type == "cpu" and made.device.type == "cuda"
    assert torch.equal(made.cpu(), torch.ones(2, 3))
    home = torch.ones(2)
    home.to("cuda").zero_()
    assert home.sum() == 2, "a copy on the card is another tensor"


def test_a_model_moves_there_with_its_gradients(card):
    linear = torch.nn.Linear(3, 1).to("cuda")
    linear(torch.ones(2, 3, device="cuda")).sum().backward()
    assert linear.weight.is_cuda and linear.weight.grad.is_cuda
    optimizer = torch.optim.AdamW(linear.parameters())
    optimizer.step()
    assert not linear.cpu().weight.is_cuda


@pytest.mark.parametrize(
    "mix",
    [
        lambda: torch.ones(2, device="cuda") + torch.ones(2),
        lambda: torch.nn.Linear(2, 2).to("cuda")(torch.ones(1, 2)),
        lambda: torch.cat([torch.ones(2), torch.ones(2, device="cuda")]),
        lambda: torch.nn.functional.cross_entropy(
            torch.ones(2, 3, device="cuda"), torch.tensor([0, 1])
        ),
    ],
    ids=["sum", "module", "cat", "loss"],
)
def test_two_sides_do_not_mix(card, mix):
    with pytest.raises(RuntimeError, match="on the same device"):
        mix()


def test_numbers_may_come_from_the_other_side(card):
    assert (torch.ones(2, device="cuda") * torch.tensor(2.0)).is_cuda


def test_what_a_t4_lacks(card):
    with pytest.raises(RuntimeError, match="bfloat16 on a Tesla T4"):
        torch.ones(2, dtype=torch.bfloat16).to("cuda")
    with pytest.raises(TypeError, match="to numpy"):
        torch.ones(2, device="cuda").numpy()


def test_an_ampere_card_has_bfloat16_and_leaves_no_trace():
    before = torch.cuda.is_available(), torch.cuda.device_count()
    with Card((8, 0), "A100"):
        assert torch.ones(2, dtype=torch.bfloat16, device="cuda").is_cuda
        assert torch.cuda.get_device_name() == "A100" and torch.cuda.is_available()
    assert not torch.ones(2).is_cuda
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == before


# ---- the package on it ----

TEXTS = ["The river rises in the [MASK].", "A [MASK] is a tool with which wood is cut in two."]


def on_card(encoding: dict) -> dict:
    return {name: x.to("cuda") for name, x in encoding.items()}


@pytest.mark.parametrize("implementation", ["auto", "sdpa", "eager"])
def test_half_precision_gives_the_numbers_of_the_cpu(card, tokenizer, implementation):
    asked = {"attn_implementation": implementation, "dtype": torch.float16}
    here = ModernBertForMaskedLM.from_pretrained("mini", **asked)
    there = ModernBertForMaskedLM.from_pretrained("mini", device="cuda", **asked)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = here(**batch).logits
        found = there(**on_card(batch)).logits
    assert found.is_cuda and found.dtype == torch.float16
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "triton"])
def test_kernels_for_newer_cards_are_refused_and_name_what_works(card, tokenizer, implementation):
    model = ModernBertForMaskedLM.from_pretrained(
        "mini", attn_implementation=implementation, dtype=torch.float16, device="cuda"
    )
    with pytest.raises(ConfigError, match=r"7[.,] ?5.*attn_implementation"):
        model(**on_card(tokenizer(TEXTS, padding=True, return_tensors="pt")))


def test_fill_mask_brings_its_inputs_to_the_card(card, tokenizer):
    model = ModernBertForMaskedLM.from_pretrained("mini", dtype=torch.float16, device="cuda")
    for found in FillMask(model, tokenizer)(TEXTS, top_k=2):
        assert len(found) == 2 and all(0 < entry["score"] < 1 for entry in found)


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        (ModernBertForMaskedLM, lambda n: torch.zeros(n, dtype=torch.long)),
        (ModernBertForSequenceClassification, lambda n: torch.tensor([0, 1])),
        (ModernBertForTokenClassification, lambda n: torch.zeros(n, dtype=torch.long)),
    ],
)
@pytest.mark.filterwarnings("ignore:mini as")
def test_heads_learn_from_packed_streams_there(card, tokenizer, head, labels):
    model = head.from_pretrained("mini", device="cuda").train()
    stream = FlatteningCollator()([{"input_ids": ids} for ids in tokenizer(TEXTS)["input_ids"]])
    given = {k: x.to("cuda") if torch.is_tensor(x) else x for k, x in stream.items()}
    output = model(**given, labels=labels(len(stream["input_ids"])).to("cuda"))
    output.loss.backward()
    assert output.loss.is_cuda and model.get_input_embeddings().weight.grad.is_cuda


@pytest.mark.filterwarnings("ignore:mini as")
def test_heads_of_pairs_and_answers_work_there(card, tokenizer):
    batch = on_card(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    answers = ModernBertForQuestionAnswering.from_pretrained("mini", device="cuda")
    ends = torch.tensor([1, 2], device="cuda")
    assert answers(**batch, start_positions=ends, end_positions=ends).loss.is_cuda
    choices = ModernBertForMultipleChoice.from_pretrained("mini", device="cuda")
    pair = {name: x[None] for name, x in batch.items()}
    assert choices(**pair, labels=torch.tensor([0], device="cuda")).logits.shape == (1, 2)


# ---- training and measuring on it ----

ROWS = {
    "sequence-classification": [{"text": text, "label": text[0]} for text in TEXTS],
    "token-classification": [
        {"words": text.split(), "labels": ["B-X", *["O"] * (len(text.split()) - 1)]}
        for text in TEXTS
    ],
    "question-answering": [
        {"question": "What?", "context": text, "answer": text.split()[1]} for text in TEXTS
    ],
    "multiple-choice": [
        {"context": "The", "choices": [text, TEXTS[0]], "label": 0} for text in TEXTS
    ],
    "sentence-embedding": [{"query": text.split()[1], "text": text} for text in TEXTS],
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore")
def test_each_task_is_tuned_and_asked_there(card, tokenizer, name):
    task = TASKS[name]
    model = task.load("mini", ROWS[name]).to("cuda")
    result = fine_tune(task, model, tokenizer, ROWS[name], FineTuningConfig(epochs=1))
    assert result.model.get_input_embeddings().weight.is_cuda
    assert len(predict(task, result.model, tokenizer, ROWS[name])) == len(TEXTS)


@pytest.mark.parametrize("task", ["encode", "score", "train"])
def test_the_benchmark_runs_there_in_half_precision(card, monkeypatch, task):
    device = benchmark.find_device("cuda")
    assert benchmark.best_dtype(device) == torch.float16
    # Its largest product takes a CPU minutes, and the card on paper compiles nothing.
    monkeypatch.setattr(benchmark, "gemm_rate", lambda device: 1.0)
    ours = benchmark.Contender(benchmark.OURS, "auto", sparse=task != "encode")
    monkeypatch.setattr(benchmark, "contenders", lambda *_: [ours])
    row = benchmark.Row("small", "three texts", task, (9, 30, 17))
    config = benchmark.shape_config("mini")
    (entry,) = benchmark.measure(row, "mini", config, device, 1, with_memory=False).entries
    assert entry.name == benchmark.OURS
