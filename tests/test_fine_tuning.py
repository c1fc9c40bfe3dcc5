"""Fine-tuning: what tasks make of rows, what training changes, what transformers makes of it."""

import hashlib
import json
import math
import re
import sys
import types
from dataclasses import asdict, replace
from importlib.resources import files

import pytest
import torch
from tools import fine_tuned
from tools.theirs import Theirs

from modernbert_mini import data, fine_tuning, task_data
from modernbert_mini.config import ConfigError, ModernBertConfig
from modernbert_mini.fine_tuning import TASKS, FineTuningConfig
from modernbert_mini.heads import ModernBertForMaskedLM
from modernbert_mini.sources import find_folder
from modernbert_mini.tokenizer import Tokenizer, train_bpe

TEXTS = [
    "The river rises in the hills and flows to the sea.",
    "A violin is a wooden string instrument.",
    "Mercury is the planet nearest the sun.",
    "The treaty ended the war between the two kingdoms.",
]
ROWS = {
    "sequence-classification": [
        {"text": text, "label": label} for text, label in zip(TEXTS, "abab", strict=True)
    ],
    "token-classification": [
        {"words": text.split(), "labels": ["B-X" if w[0].isupper() else "O" for w in text.split()]}
        for text in TEXTS
    ],
    "question-answering": [
        {"question": "What?", "context": text, "answer": text.split()[1]} for text in TEXTS
    ],
    "multiple-choice": [
        {"context": text[:10], "choices": [text[10:], TEXTS[i - 1]], "label": i % 2}
        for i, text in enumerate(TEXTS)
    ],
    "sentence-embedding": [{"query": text.split()[1], "text": text} for text in TEXTS],
}
each_task = pytest.mark.parametrize("name", TASKS)
quick = FineTuningConfig(epochs=3, lr=3e-3, batch_tokens=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random checkpoint of a masked language model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer(train_bpe(TEXTS, 320))
    tokenizer.save_pretrained(folder)
    size = len(tokenizer)
    config = ModernBertConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        local_attention=6,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    ModernBertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """That a head is new is said by a warning each time, and tested elsewhere."""


def load(name, folder, **options):
    torch.manual_seed(0)
    return TASKS[name].load(folder, ROWS[name], **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- how fast each part learns ----------------------------------------------------------------


def test_rates_fall_from_the_head_to_the_embedding(folder):
    model = load("sequence-classification", folder)
    groups = fine_tuning.layer_wise_groups(model, FineTuningConfig(lr=1.0, layer_decay=0.5))
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = {name: rate[id(p)] for name, p in model.named_parameters()}
    assert {rate for name, rate in found.items() if "embeddings" in name} == {1 / 16}
    for i in range(3):
        layer = {rate for name, rate in found.items() if f"layers.{i}." in name}
        assert layer == {0.5 ** (3 - i)}
    top = ("model.final_norm", "head.", "classifier.")
    assert {rate for name, rate in found.items() if name.startswith(top)} == {1.0}


def test_every_parameter_is_in_one_group_and_only_matrices_decay(folder):
    model = load("token-classification", folder)
    groups = fine_tuning.layer_wise_groups(model, FineTuningConfig())
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))
    for group in groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


def test_the_rate_rises_and_falls_to_the_end():
    shares = [fine_tuning.warmup_then_linear(i, warmup=3, total=10) for i in range(10)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a > b > 0 for a, b in zip(shares[3:], shares[4:], strict=False))
    assert fine_tuning.warmup_then_linear(0, warmup=0, total=1) == 1.0


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("sequence-classification", {"text": "x", "label": "a"}, "the only label is 'a'"),
        ("token-classification", {"words": ["x"], "labels": ["O"]}, "the only label is 'O'"),
    ],
)
def test_one_label_alone_is_refused(name, row, said, folder):
    with pytest.raises(ValueError, match=said):
        TASKS[name].load(folder, [row, row])


def test_labels_are_counted_in_the_order_of_the_alphabet():
    rows = [{"label": x, "labels": [x, "z"]} for x in "hgfedcba"]
    assert fine_tuning.label_names(rows, "label") == list("abcdefgh")
    assert fine_tuning.label_names(rows, "labels") == list("abcdefghz")


# --- batches ----------------------------------------------------------------------------------


def test_batches_hold_every_row_once_and_no_more_tokens_than_allowed():
    features = [{"sequences": [[0] * n], "i": i} for i, n in enumerate((5, 9, 2, 30, 4, 4))]
    for generator in (None, torch.Generator().manual_seed(1)):
        batches = list(fine_tuning.token_batches(features, 12, generator))
        assert sorted(f["i"] for batch in batches for f in batch) == list(range(6))
        for batch in batches:
            assert len(batch) == 1 or sum(len(f["sequences"][0]) for f in batch) <= 12
    plain = [f["i"] for batch in fine_tuning.token_batches(features, 12) for f in batch]
    assert plain == list(range(6))


def test_questions_with_three_choices_and_with_four_do_not_mix(folder, tokenizer):
    name = "multiple-choice"
    rows = [
        {"context": "The", "choices": list("abcdef")[: 2 + i % 2], "label": 1} for i in range(6)
    ]
    task, model = TASKS[name], load(name, folder)
    batches = list(fine_tuning.token_batches(task.features(rows, tokenizer, model, 32), 500))
    assert [len(batch) for batch in batches] == [1] * 6
    config = FineTuningConfig(epochs=40, lr=1e-2, layer_decay=1.0)
    fine_tuning.fine_tune(task, model, tokenizer, rows, config)
    assert fine_tuning.evaluate(task, model, tokenizer, rows) == {"accuracy": 1}


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"lr": -1.0}, {"layer_decay": 0}, {"batch_tokens": 0}, {"max_length": 7}],
)
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        FineTuningConfig(**change)


@each_task
def test_a_wide_model_learns_more_slowly(name):
    task = TASKS[name]
    assert fine_tuning.settings_for(task, ModernBertConfig(hidden_size=192)) == task.defaults
    wide = fine_tuning.settings_for(task, ModernBertConfig())  # ModernBERT-base
    assert 1e-5 <= wide.lr <= 8e-5 and wide.epochs >= 1
    assert wide.max_length >= max(128, task.defaults.max_length)


# --- training ---------------------------------------------------------------------------------


@each_task
def test_training_lowers_the_loss_and_answers_what_it_was_told(name, folder, tokenizer):
    task, rows = TASKS[name], ROWS[name]
    model = load(name, folder)
    config = FineTuningConfig(epochs=60, lr=1e-2, layer_decay=1.0, batch_tokens=512)
    result = fine_tuning.fine_tune(task, model, tokenizer, rows, config)
    assert result.losses[-1] < 0.3 * result.losses[0]
    scores = fine_tuning.evaluate(task, result.model, tokenizer, rows)
    assert scores[task.metric] == 1.0
    assert not result.model.training and all(p.requires_grad for p in model.parameters())


@each_task
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(name, folder, tokenizer):
    found = []
    for seed in (0, 0, 1):
        model = load(name, folder)
        config = replace(quick, seed=seed)
        fine_tuning.fine_tune(TASKS[name], model, tokenizer, ROWS[name], config)
        found.append(weights(model))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert any(not torch.equal(found[0][n], found[2][n]) for n in found[0])


def test_training_leaves_the_checkpoint_alone(folder, tokenizer):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    name = "sequence-classification"
    fine_tuning.fine_tune(TASKS[name], load(name, folder), tokenizer, ROWS[name], quick)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_frozen_encoder_keeps_its_weights_and_its_head_learns(folder, tokenizer):
    name = "sequence-classification"
    model = load(name, folder)
    before = weights(model)
    config = replace(quick, frozen=True)
    fine_tuning.fine_tune(TASKS[name], model, tokenizer, ROWS[name], config)
    for key, old in before.items():
        if key.startswith("model."):
            assert torch.equal(old, model.get_parameter(key)), key
        elif key.startswith("classifier."):
            assert not torch.equal(old, model.get_parameter(key)), key


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (1, 4), (2.5, 10), (0.01, 1)])
def test_epochs_may_be_fractions(epochs, steps, folder, tokenizer):
    name, seen = "sequence-classification", []
    config = FineTuningConfig(epochs=epochs, batch_tokens=1)
    fine_tuning.fine_tune(
        TASKS[name],
        load(name, folder),
        tokenizer,
        ROWS[name],
        config,
        lambda step, total, loss: seen.append((step, total)),
    )
    assert seen == [(i + 1, steps) for i in range(steps)]


def test_a_share_of_an_epoch_is_a_random_share_of_the_rows(folder, tokenizer, monkeypatch):
    name, seen = "sequence-classification", []
    task, rows = TASKS[name], [{"text": str(i), "label": "ab"[i % 2]} for i in range(20)]
    make = type(task).features

    def noting(self, rows, *rest):
        seen.append([row["text"] for row in rows])
        return make(self, rows, *rest)

    monkeypatch.setattr(type(task), "features", noting)
    for seed in (0, 1):
        config = FineTuningConfig(epochs=0.25, seed=seed)
        fine_tuning.fine_tune(task, load(name, folder), tokenizer, rows, config)
    assert [len(set(some)) for some in seen] == [5, 5] and set(seen[0]) != set(seen[1])


def test_a_loss_that_is_no_number_stops_the_run(folder, tokenizer):
    name = "sequence-classification"
    model = load(name, folder)
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="step 1: the loss is nan"):
        fine_tuning.fine_tune(TASKS[name], model, tokenizer, ROWS[name], quick)


def test_nothing_to_train_on_is_refused(folder, tokenizer):
    name = "sequence-classification"
    with pytest.raises(ValueError, match="no rows"):
        fine_tuning.fine_tune(TASKS[name], load(name, folder), tokenizer, [], quick)


def test_seeds_are_compared_and_their_spread_is_that_of_a_sample(folder, tokenizer):
    name = "sequence-classification"
    rows = ROWS[name]
    scores = fine_tuning.compare_seeds(TASKS[name], folder, tokenizer, rows, rows, quick, (0, 1))
    assert len(scores) == 2 and set(scores[0]) == {"accuracy", "macro_f1"}
    assert fine_tuning.spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(fine_tuning.spread([1.0])[1])


# --- transformers loads what is saved, and scores the same -------------------------------------


def scored_by_transformers(name, saved, rows, max_length):
    pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = Tokenizer.from_pretrained(saved)
    model = Theirs.load(name, saved, tokenizer.pad_token_id)
    return fine_tuning.evaluate(TASKS[name], model, tokenizer, rows, max_length=max_length), model


@each_task
def test_transformers_loads_the_checkpoint_and_scores_the_same(name, folder, tokenizer, tmp_path):
    task, rows, model = TASKS[name], ROWS[name], load(name, folder)
    fine_tuning.fine_tune(task, model, tokenizer, rows, quick)
    fine_tuning.save(task, model, tokenizer, tmp_path)
    ours = fine_tuning.evaluate(task, model, tokenizer, rows, max_length=64)
    scores, theirs = scored_by_transformers(name, tmp_path, rows, 64)
    assert scores == pytest.approx(ours)
    stream = task.stream(model, task.features(rows, tokenizer, model, 64))
    with torch.no_grad():
        mine, other = model(**stream), theirs(**stream)
    for key in ("logits", "start_logits", "end_logits", "last_hidden_state"):
        if hasattr(mine, key):
            assert torch.allclose(getattr(mine, key), getattr(other, key), atol=1e-5), key


def test_a_saved_embedding_model_says_how_its_vectors_are_made(folder, tokenizer, tmp_path):
    name = "sentence-embedding"
    fine_tuning.save(TASKS[name], load(name, folder), tokenizer, tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [m["type"].rsplit(".", 1)[1] for m in modules] == ["Transformer", "Pooling", "Normalize"]
    assert all((tmp_path / m["path"] / "config.json").is_file() for m in modules)
    pooling = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    assert pooling == {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}


# --- rows become tokens -----------------------------------------------------------------------


def test_each_label_stands_at_the_first_token_of_its_word(tokenizer, folder):
    model = load("token-classification", folder)
    row = ROWS["token-classification"][0]
    (feature,) = TASKS["token-classification"].features([row], tokenizer, model, 64)
    (ids,) = feature["sequences"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(row["words"])
    labels = feature["labels"]
    assert [model.config.id2label[labels[i]] for i in feature["first"]] == row["labels"]
    assert [i for i, label in enumerate(labels) if label >= 0] == feature["first"]
    assert len(feature["first"]) < len(ids) - 2  # some words are several tokens here


def test_words_are_encoded_as_they_stand_in_a_text(tokenizer):
    ids, _ = fine_tuning.word_tokens(TEXTS[0].split(), tokenizer, 64)
    assert ids == tokenizer(TEXTS[0])["input_ids"]


def test_words_behind_the_cut_have_no_answer_and_count_as_wrong(tokenizer, folder):
    task, row = TASKS["token-classification"], ROWS["token-classification"][0]
    ids, first = fine_tuning.word_tokens(row["words"], tokenizer, 8)
    assert len(ids) <= 8 and ids[-1] == tokenizer.sep_token_id
    answer = row["labels"][: len(first)]
    assert task.score([row], [answer])["accuracy"] == len(first) / len(row["words"])


@pytest.mark.parametrize("context", [*TEXTS, "naïve  café — “quoted” 1,234.5 words"])
def test_every_word_of_a_text_survives_the_way_to_tokens_and_back(context, tokenizer, folder):
    """The words are read off the tokens that training is told to find."""
    task, model = TASKS["question-answering"], load("question-answering", folder)
    words = [*context.split(), *re.findall(r"\w+", context)]
    for answer in [*words, " ".join(context.split()[:2]), context.split(".")[0]]:
        if answer not in context:
            continue
        row = {"question": "Which?", "context": context, "answer": answer}
        task.check(row)
        (feature,) = task.features([row], tokenizer, model, 128)
        start, end = (feature[key] - feature["skip"] for key in fine_tuning.POSITIONS)
        offsets = feature["offsets"]
        assert answer in context[offsets[start][0] : offsets[end][1]]
        first, last = context.find(answer), context.find(answer) + len(answer) - 1
        assert start == 0 or offsets[start - 1][1] <= first  # no token too many on either side
        assert offsets[end][0] <= last


def test_an_answer_behind_the_cut_adds_no_loss(tokenizer, folder):
    task, model = TASKS["question-answering"], load("question-answering", folder)
    row = {"question": "Which?", "context": TEXTS[0], "answer": "sea"}
    (feature,) = task.features([row], tokenizer, model, 16)
    assert feature["start_positions"] == feature["end_positions"] > 8192
    (whole,) = task.features([row], tokenizer, model, 64)
    with torch.no_grad():
        both = task.loss(model, task.collate([feature, whole]))
        alone = task.loss(model, task.collate([whole]))
    assert both == pytest.approx(alone.item(), abs=1e-5)


def test_a_question_that_is_too_long_leaves_room_for_the_context(tokenizer, folder):
    task, model = TASKS["question-answering"], load("question-answering", folder)
    row = {"question": "Why? " * 99, "context": TEXTS[0], "answer": "river"}
    (feature,) = task.features([row], tokenizer, model, 64)
    (ids,) = feature["sequences"]
    assert len(ids) <= 64 and feature["skip"] <= 33 and feature["offsets"][0][0] == 0
    assert feature["start_positions"] < len(ids)
    asked = tokenizer.decode(ids[: feature["skip"]], skip_special_tokens=True)
    assert row["question"].startswith(asked) and len(asked) > 20


def test_the_best_span_does_not_end_before_it_starts_and_is_not_too_long():
    starts, ends = torch.tensor([0.0, 1, 5, 0]), torch.tensor([9.0, 2, 0, 1])
    assert fine_tuning.best_span(starts, ends, 30) == (0, 0)
    starts = torch.tensor([4.0, 1, 5, 0])
    ends = torch.tensor([0.0, 0, 0, 9])
    assert fine_tuning.best_span(starts, ends, 30) == (2, 3)
    assert fine_tuning.best_span(torch.tensor([9.0, 0, 0, 0]), ends, 30) == (0, 3)
    assert fine_tuning.best_span(torch.tensor([8.0, 0, 0, 0]), ends, 2) == (2, 3)


# --- scores -----------------------------------------------------------------------------------


def test_macro_f1_counts_a_rare_label_like_a_frequent_one():
    truth = ["a"] * 8 + ["b", "b"]
    assert fine_tuning.macro_f1(truth, truth) == 1
    # a: precision 8/10, recall 1; b: nothing found
    assert fine_tuning.macro_f1(truth, ["a"] * 10) == pytest.approx((16 / 18 + 0) / 2)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("O B-P I-P O", {(1, 3, "P")}),
        ("B-P B-P", {(0, 1, "P"), (1, 2, "P")}),
        ("I-P I-P", {(0, 2, "P")}),
        ("B-P I-Q", {(0, 1, "P"), (1, 2, "Q")}),
        ("O O", set()),
        ("B-P", {(0, 1, "P")}),
    ],
)
def test_entities_are_read_as_conll_reads_them(labels, found):
    assert fine_tuning.entities(labels.split()) == found


def test_half_an_entity_is_no_entity():
    truth = [["B-P", "I-P", "O"]]
    assert fine_tuning.entity_f1(truth, truth) == 1
    assert fine_tuning.entity_f1(truth, [["B-P", "O", "O"]]) == 0
    assert "entity_f1" in TASKS["token-classification"].score(
        [{"labels": truth[0]}], [["B-P", "O", "O"]]
    )


@pytest.mark.parametrize(
    ("truth", "found", "f1"),
    [
        ("The river", "river", 1),
        ("red river", "river", 2 / 3),
        ("river", "sea", 0),
        ("a", "the", 1),
        ("river, river", "river", 2 / 3),
    ],
)
def test_answers_are_compared_as_squad_does(truth, found, f1):
    assert fine_tuning.overlap_f1(truth, found) == pytest.approx(f1)


def test_ranks_count_texts_once_and_any_text_of_the_query():
    rows = [
        {"query": "q", "text": "a"},
        {"query": "r", "text": "b"},
        {"query": "q", "text": "c"},
        {"query": "s", "text": "b"},
    ]
    scores = torch.tensor(
        [[0.1, 0.5, 0.9, 0.5], [0.9, 0.5, 0.2, 0.5], [0.1, 0.5, 0.9, 0.5], [0.0, 0.3, 0.3, 0.3]]
    )
    found = fine_tuning.ranking_scores(rows, scores)
    # q finds c at once, twice; r is second behind a; s ties with c, which counts as before it
    assert found["recall@1"] == 0.5 and found["recall@5"] == 1.0
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 + 1 / 2) / 4)


def test_a_contrastive_loss_is_that_of_a_guess_where_all_is_alike():
    same = torch.ones(8, 4) / 2
    assert fine_tuning.contrastive_loss(same, same, 0.05) == pytest.approx(math.log(8), abs=1e-5)
    apart = torch.eye(8)
    assert fine_tuning.contrastive_loss(apart, apart, 0.05) < 1e-6
    assert fine_tuning.contrastive_loss(apart, apart.roll(1, 0), 0.05) > 19


def test_a_contrastive_loss_counts_both_directions():
    a, b = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    there, back = (torch.diag((x @ y.T / 0.5).softmax(dim=1)) for x, y in ((a, b), (b, a)))
    expected = -(there.log().mean() + back.log().mean()) / 2
    assert fine_tuning.contrastive_loss(a, b, 0.5) == pytest.approx(expected.item(), abs=1e-5)


def test_an_embedding_has_length_one_and_does_not_depend_on_its_neighbours(folder, tokenizer):
    name = "sentence-embedding"
    task, model = TASKS[name], load(name, folder)
    together = fine_tuning.predict(task, model, tokenizer, ROWS[name])
    alone = fine_tuning.predict(task, model, tokenizer, ROWS[name][2:3])
    assert torch.allclose(together[2], alone[0], atol=1e-6)
    assert torch.allclose(torch.stack(together).norm(dim=-1), torch.ones(4, 2), atol=1e-6)


def test_an_embedding_is_the_mean_of_all_tokens(folder, tokenizer):
    name = "sentence-embedding"
    model = load(name, folder)
    found = fine_tuning.predict(TASKS[name], model, tokenizer, ROWS[name])[1][1]
    with torch.no_grad():
        x = model(**tokenizer(ROWS[name][1]["text"], return_tensors="pt")).last_hidden_state
    mean = x[0].mean(dim=0)
    assert torch.allclose(found, mean / mean.norm(), atol=1e-5)


def test_an_embedding_model_cannot_be_frozen(folder, tokenizer):
    name = "sentence-embedding"
    with pytest.raises(ValueError, match="nothing left to train"):
        fine_tuning.fine_tune(
            TASKS[name], load(name, folder), tokenizer, ROWS[name], replace(quick, frozen=True)
        )


@each_task
def test_a_prediction_needs_no_labels(name, folder, tokenizer):
    task = TASKS[name]
    rows = [{c: row[c] for c in task.inputs} for row in ROWS[name]]
    for row in rows:
        task.check(row, labelled=False)
    model = load(name, folder)
    answers = fine_tuning.predict(task, model, tokenizer, rows)
    full = fine_tuning.predict(task, model, tokenizer, ROWS[name])
    printed = [json.dumps(task.printable(a)) for a in answers]
    assert printed == [json.dumps(task.printable(a)) for a in full]


# --- rows of your own -------------------------------------------------------------------------


def as_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@each_task
def test_json_lines_are_read_as_they_are(name, tmp_path):
    path = as_jsonl(tmp_path / "rows.jsonl", ROWS[name])
    assert task_data.read_rows(path, TASKS[name]) == ROWS[name]


CSV = {
    "sequence-classification": ('text,label\n"one, two",a\nthree,b\n', {"text": "one, two"}),
    "token-classification": ("words,labels\na b,X Y\n", {"words": ["a", "b"]}),
    "question-answering": ("question,context,answer,answer_start\nq,a b a,a,4\n", {"answer": "a"}),
    "multiple-choice": ("context,choice1,choice0,label\nc,y,x,1\n", {"choices": ["x", "y"]}),
    "sentence-embedding": ("query,text\nq,t\n", {"query": "q"}),
}


@each_task
def test_csv_is_read_with_lists_where_a_task_wants_lists(name, tmp_path):
    path = tmp_path / "rows.csv"
    text, part = CSV[name]
    path.write_text("\ufeff" + text, encoding="utf-8")  # as spreadsheets write it
    row = task_data.read_rows(path, TASKS[name])[0]
    assert row.items() >= part.items()
    TASKS[name].check(row)


def test_the_given_start_of_an_answer_counts(tmp_path, tokenizer, folder):
    path = tmp_path / "rows.csv"
    path.write_text(CSV["question-answering"][0], encoding="utf-8")
    task = TASKS["question-answering"]
    (row,) = task_data.read_rows(path, task)
    (feature,) = task.features([row], tokenizer, load("question-answering", folder), 64)
    assert feature["offsets"][feature["start_positions"] - feature["skip"]][1] == 5


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("sequence-classification", "text,label\none,a\n,b\n", "line 3: 'text' is empty"),
        ("sequence-classification", "text,label\none,a\ntwo\n", "line 3: fewer fields"),
        ("sequence-classification", "text,label\none,a,b\n", "line 2: 1 fields more"),
        ("sequence-classification", 'text,label\n"a\nb",x\n"",y\n', "line 4: 'text' is empty"),
        ("sequence-classification", "text,topic\none,a\n", "line 2: no 'label': its label"),
        ("token-classification", "words,labels\na b,X\n", "line 2: 2 words and 1 labels"),
        ("question-answering", "question,context,answer\nq,c,d\n", "line 2: the answer 'd' does"),
        (
            "question-answering",
            "question,context,answer,answer_start\nq,c d,d,0\n",
            "line 2: the answer 'd' does not stand at character 0",
        ),
        (
            "question-answering",
            "question,context,answer,answer_start\nq,c d,d,x\n",
            "line 2: answer_start 'x' is no number",
        ),
        ("multiple-choice", "context,choice0,label\nc,x,0\n", "line 2: 'choices' is not a list of"),
        ("multiple-choice", "context,choice0,choice1,label\nc,x,y,2\n", "line 2: label 2 is no"),
        ("multiple-choice", "context,choice0,choice1,label\nc,x,y,z\n", "line 2: label 'z' is no"),
        (
            "multiple-choice",
            "context,choice0,choice1,label\nc,x,y,-1\n",
            "line 2: label '-1' is no",
        ),
        ("multiple-choice", "context,choice0,choice1,label\nc,x,,0\n", "line 2: a choice is empty"),
        ("sentence-embedding", "query,text\nq, \n", "line 2: 'text' is no text"),
        ("sentence-embedding", "query,text\n", "no rows"),
        ("sentence-embedding", "", "no rows"),
    ],
)
def test_a_bad_row_is_refused_by_its_line(name, text, said, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(task_data.RowError) as error:
        task_data.read_rows(path, TASKS[name])
    assert said in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 3: no JSON"),
        ("[1]", "line 3: no JSON object"),
        ('{"text": 5, "label": "a"}', "line 3: 'text' is no text"),
        ('{"text": "x"}', "line 3: no 'label'"),
        ('{"text": "x", "label": null}', "line 3: 'label' is empty"),
    ],
)
def test_a_bad_line_of_json_is_refused_too(line, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "x", "label": "a"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(task_data.RowError) as error:
        task_data.read_rows(path, TASKS["sequence-classification"])
    assert said in str(error.value)


def test_numbers_are_labels_too(tmp_path):
    path = as_jsonl(tmp_path / "rows.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": 0}])
    rows = task_data.read_rows(path, TASKS["sequence-classification"])
    assert [row["label"] for row in rows] == ["1", "0"]


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("multiple-choice", {"context": "c", "choices": ["x", "y"], "label": 1.0}, "label 1.0 is"),
        ("multiple-choice", {"context": "c", "choices": ["x", "y"], "label": True}, "label True"),
        (
            "question-answering",
            {"question": "q", "context": "c", "answer": "c", "answer_start": [0]},
            "answer_start [0] is no number",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_line(name, row, said, tmp_path):
    with pytest.raises(task_data.RowError) as error:
        task_data.read_rows(as_jsonl(tmp_path / "rows.jsonl", [row]), TASKS[name])
    assert f"line 1: {said}" in str(error.value)


def test_many_bad_rows_are_counted_and_ten_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + ",a\n" * 25, encoding="utf-8")
    with pytest.raises(task_data.RowError, match="25 bad rows") as error:
        task_data.read_rows(path, TASKS["sequence-classification"])
    assert "line 11:" in str(error.value) and "line 12:" not in str(error.value)
    assert "and 15 more" in str(error.value)


@pytest.mark.parametrize("name", ["rows.txt", "rows"])
def test_another_kind_of_file_is_refused(name, tmp_path):
    with pytest.raises(task_data.RowError, match=r"\.csv or \.jsonl"):
        task_data.read_rows(tmp_path / name, TASKS["sequence-classification"])


def test_text_of_another_encoding_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\nnaïve,a\n".encode("latin-1"))
    with pytest.raises(task_data.RowError, match="not UTF-8"):
        task_data.read_rows(path, TASKS["sequence-classification"])


def test_rows_are_split_by_themselves_alone():
    rows = [{"text": str(i), "label": "a"} for i in range(500)]
    train, test = task_data.split_rows(rows + rows)
    assert 60 < len(test) < 140 and len(train) + len(test) == 1000
    keys = {json.dumps(row) for row in test}
    assert not keys & {json.dumps(row) for row in train}
    assert task_data.split_rows(rows[::-1])[1] == test[: len(test) // 2][::-1]


# --- rows from the vital articles and from the Hub ----------------------------------------------


@pytest.fixture(scope="module")
def made():
    try:
        return {name: task_data.vital_article_task(name) for name in TASKS}
    except data.CorpusNotFoundError as error:
        pytest.skip(str(error))


@each_task
def test_every_row_that_is_made_can_be_used(name, made):
    rows = made[name]
    assert len(rows.train) > 1000 and len(rows.validation) > 90 and len(rows.test) > 250
    for row in rows.train + rows.validation + rows.test:
        TASKS[name].check(row)
    assert "Wikipedia" in rows.source and rows.licence == "CC BY-SA 4.0"


@each_task
def test_no_row_is_in_two_parts_and_what_mini_never_saw_is_in_the_test(name, made):
    parts = [made[name].train, made[name].validation, made[name].test]
    keys = [{json.dumps([row[c] for c in TASKS[name].columns]) for row in rows} for rows in parts]
    assert not keys[0] & keys[2] and not keys[1] & keys[2] and not keys[0] & keys[1]
    assert not any(row["unseen"] for rows in parts[:2] for row in rows)
    assert sum(row["unseen"] for row in parts[2]) > 30


def test_a_long_test_is_cut_but_keeps_what_mini_never_saw():
    rows = [{"i": i, "unseen": i % 3 == 2} for i in range(12)]
    kept = [row["i"] for row in task_data.at_most(rows, 7)]
    assert kept == [0, 1, 2, 3, 5, 8, 11]
    assert task_data.at_most(rows, 12) == rows


def test_words_and_labels_stand_for_the_text():
    text = 'In 1867, "Marie" Curie of the U.K. (Paris) was born.'
    words, labels = task_data.strip_words(text)
    assert words[:4] == ["in", "1867", '"marie"', "curie"]
    assert labels[:4] == ["Word", "word,", "Word", "Word"]
    assert task_data.restore(words, labels) == text.replace("U.K.", "U.k.")


def test_a_question_is_not_answered_by_its_own_words(made):
    rows = made["question-answering"].test
    share = sum(row["answer"].lower() in row["question"].lower() for row in rows) / len(rows)
    assert share < 0.05


def test_what_is_right_stands_once_in_a_row(made):
    for row in made["multiple-choice"].train:
        assert row["choices"].count(row["choices"][row["label"]]) == 1
        assert row["context"] not in row["choices"]
    rows, whole = made["question-answering"].train, 0
    for row in rows:
        sentences = task_data.sentences_of(row["context"])
        assert len(set(sentences)) == len(sentences)
        whole += len(sentences) >= task_data.PASSAGES
    assert whole / len(rows) > 0.98  # a name like "Ürümqi" at its start hides a sentence's start


def test_places_of_right_answers_are_even(made):
    labels = [row["label"] for row in made["multiple-choice"].train]
    for i in range(4):
        assert labels.count(i) / len(labels) == pytest.approx(0.25, abs=0.03)


def test_first_sentences_end_where_a_capital_follows():
    text = "Dr. No of the U.S. team, b. 1900, won (twice).\nThen he lost."
    assert task_data.sentences_of(" ".join(text.split()))[-1] == "Then he lost."
    assert task_data.without_brackets("painter (1840–1926) of (big) things") == "painter of things"


class FakeSet(list):
    def __init__(self, rows, features):
        super().__init__(rows)
        self.features = features

    def shuffle(self, seed):
        return self

    def select(self, places):
        return FakeSet([self[i] for i in places], self.features)


HUB_ROWS = {
    "sequence-classification": (
        {"text": "x", "label": 1},
        {"label": types.SimpleNamespace(names=["World", "Sports"])},
    ),
    "token-classification": (
        {"tokens": ["EU", "rejects"], "ner_tags": [1, 0]},
        {"ner_tags": types.SimpleNamespace(feature=types.SimpleNamespace(names=["O", "B-ORG"]))},
    ),
    "question-answering": (
        {
            "question": "q",
            "context": "a b",
            "answers": {"text": ["b", "b"], "answer_start": [2, 2]},
        },
        {},
    ),
    "multiple-choice": (
        {"sent1": "s", "sent2": "He", **{f"ending{i}": f"e{i}" for i in range(4)}, "label": 3},
        {},
    ),
    "sentence-embedding": ({"query": "q", "answer": "a"}, {}),
}


@each_task
def test_rows_of_the_hub_take_the_same_form(name, monkeypatch):
    row, features = HUB_ROWS[name]
    asked = []

    def load_dataset(path, configuration):
        asked.append(path)
        parts = {"train": 9000, "test": 3000, "validation": 500}
        return {part: FakeSet([row] * n, features) for part, n in parts.items()}

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    rows = task_data.hub_task(name, train_rows=100)
    assert asked == [task_data.HUB_SETS[name][0]]
    assert (len(rows.train), len(rows.validation)) == (100, 2000)
    assert len(rows.test) == (500 if task_data.HUB_SETS[name][2] == "validation" else 2000)
    for each in (rows.train[0], rows.test[0]):
        TASKS[name].check(each)


# --- baselines --------------------------------------------------------------------------------


def test_bm25_prefers_rare_words_and_short_texts():
    bm25 = task_data.BM25(["the cat", "the dog", "the bird", "a long text about the dog and so on"])
    cat, dog, bird, long = bm25.scores("the dog", ["the cat", "the dog", "the bird", TEXTS[0]])
    assert dog > cat == bird > 0
    assert (
        bm25.scores("dog", ["dog", "dog " + "x " * 20])[0]
        > bm25.scores("dog", ["dog", "dog " + "x " * 20])[1]
    )
    assert bm25.scores("nothing", ["the cat"]) == [0]


def test_bm25_is_the_formula():
    """Robertson and Zaragoza, section 3, by hand: two texts of 1 and 3 words, k1 1.2, b 0.75."""
    rarity = math.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    expected = rarity * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 3 / 2))
    found = task_data.BM25(["cat", "dog dog bird"]).scores("A dog?", ["dog, dog; bird"])
    assert found == [pytest.approx(expected)]


@each_task
def test_every_task_has_a_baseline_that_is_better_than_chance(name, made):
    if name == "sequence-classification":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    task, rows = TASKS[name], made[name]
    test = rows.test[::8]
    scores = task_data.BASELINES[name].score(task, rows.train[::3], test)
    least = {
        "sequence-classification": 0.7,
        "token-classification": 0.25,
        "question-answering": 0.6,
        "multiple-choice": 0.6,
        "sentence-embedding": 0.7,
    }
    assert scores[task.metric] > least[name]


# --- the embedded checkpoint ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["token-classification", "sentence-embedding"])
def test_a_few_steps_lift_mini_on_every_pile_of_real_rows(name, made):
    """Not a score worth having: a sign that real rows and real weights fit together.

    Five piles of rows, not one, and no margin chosen by hand: by luck alone all five would rise
    once in 32 times.
    """
    task, tokenizer = TASKS[name], Tokenizer.from_pretrained("mini")
    torch.manual_seed(0)
    model = task.load("mini", made[name].train)
    piles = [made[name].test[i : i + 40] for i in range(0, 200, 40)]

    def scores():
        return [fine_tuning.evaluate(task, model, tokenizer, p)[task.metric] for p in piles]

    before = scores()
    config = replace(task.defaults, epochs=1, batch_tokens=1024)
    fine_tuning.fine_tune(task, model, tokenizer, made[name].train[:150], config)
    assert all(new > old for new, old in zip(scores(), before, strict=True))


def test_the_embedded_checkpoint_stays_as_it_is(made):
    path = find_folder("mini") / "model.safetensors"
    before, name = path.read_bytes(), "sequence-classification"
    task = TASKS[name]
    model = task.load("mini", made[name].train)
    tokenizer = Tokenizer.from_pretrained("mini")
    fine_tuning.fine_tune(task, model, tokenizer, made[name].train[:8], quick)
    assert path.read_bytes() == before


# --- the record -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record():
    path = files("modernbert_mini") / "recorded" / "fine_tuning.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_record_has_all_tasks_with_baseline_seeds_and_where_it_comes_from(record):
    assert list(record) == list(TASKS)
    for name, found in record.items():
        task = TASKS[name]
        assert found["settings"] == asdict(task.defaults), "make tuned"
        assert found["baseline"]["name"] == task_data.BASELINES[name].name
        for kind, runs in found["runs"].items():
            seeds = [run["seed"] for run in runs]
            assert 0 in seeds and len(seeds) == len(set(seeds)), (name, kind)
            for scores in [run[part] for run in runs for part in ("scores", "unseen")]:
                assert 0 < scores[task.metric] < 1
        assert {"fine-tuned", "frozen"} <= found["runs"].keys()
        assert all(found[key] for key in ("date", "torch", "cpu", "threads", "weights", "data"))


def test_the_record_has_the_baseline_on_what_the_model_reads(record):
    scores = record["sequence-classification"]["baseline"]
    assert scores["as_read"]["accuracy"] < scores["scores"]["accuracy"]


def test_the_record_is_made_of_one_run_of_each_kind_first():
    made = list(fine_tuned.jobs(list(TASKS)))
    assert len(made) == len(set(made))
    assert [job[0] for job in made[:5]] == list(TASKS)
    assert {job[1:] for job in made[5:10]} == {("frozen", 0)}
    task = TASKS["sequence-classification"]
    assert fine_tuned.settings(task, "fine-tuned", 2) == replace(task.defaults, seed=2)
    assert fine_tuned.settings(task, "frozen", 0).frozen
    assert fine_tuned.settings(task, "layer_decay 1.0", 0).layer_decay == 1.0


def test_the_record_is_written_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuned, "RECORD", tmp_path / "record.json")
    assert fine_tuned.read() == {}
    record = {
        "question-answering": {"losses": [1.5, -2, 3e-05], "found": ["1,\n 2", "[3, 4]"]},
        "sequence-classification": {"runs": {"frozen": [{"seed": 0}]}, "found": []},
    }
    fine_tuned.write(record)
    assert fine_tuned.read() == record
    assert list(fine_tuned.read())[0] == "sequence-classification"
    assert "[1.5, -2, 3e-05]" in (tmp_path / "record.json").read_text()


def test_the_record_is_of_the_weights_that_are_shipped(record):
    weights = (find_folder("mini") / "model.safetensors").read_bytes()
    assert {found["weights"] for found in record.values()} == {hashlib.sha256(weights).hexdigest()}


def test_each_task_was_trained_in_less_than_a_minute(record):
    for name, found in record.items():
        assert found["threads"] == 1
        for run in found["runs"]["fine-tuned"]:
            assert run["cpu_seconds"] < 60 and run["test_cpu_seconds"] < 30, name


def test_moving_the_encoder_pays_in_every_task(record):
    for name, found in record.items():
        fine_tuned, frozen = (
            [run["scores"][found["metric"]] for run in found["runs"][kind]]
            for kind in ("fine-tuned", "frozen")
        )
        assert min(fine_tuned) > max(frozen), name


def test_transformers_scored_the_saved_models_the_same(record):
    for name, found in record.items():
        both = found["transformers"]
        assert both["rows"] >= 100 and both["theirs"] == pytest.approx(both["ours"]), name
