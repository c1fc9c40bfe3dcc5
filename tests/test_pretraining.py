"""Pre-training does what the recipe says: masks, packing, schedule, scores, resuming, export."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modernbert_mini import ModernBertForMaskedLM, Tokenizer, data, model_card, pretraining
from modernbert_mini.tokenizer import train_bpe

WORDS = [*"abcdefghijklmno"]
VOCAB = 300


def sentence(i: int) -> str:
    """A stretch of the alphabet, from another letter and of another length for every i."""
    return " ".join(WORDS[(i + j) % len(WORDS)] for j in range(5 + i % 23))


TEXTS = tuple(sentence(i) for i in range(15 * 23))  # all different
# One letter a text: whoever looks at a neighbour knows it, whoever counts does not.
EASY_TEXTS = tuple(" ".join([WORDS[i % 15]] * (5 + i % 23)) for i in range(15 * 23))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(TEXTS, VOCAB))


@pytest.fixture
def shard(tokenizer, tmp_path) -> data.TokenShard:
    return data.tokenise_to_shards(
        TEXTS,
        lambda texts: [tokenizer.encode(t, add_special_tokens=False) for t in texts],
        tmp_path,
    )


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from threads, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def packed(shard, tokenizer, **changes) -> pretraining.PackedBatches:
    settings = {"tokens_per_batch": 128, "max_length": 24, "seed": 3} | changes
    return pretraining.PackedBatches([shard], tokenizer, **settings)


# --- masking ------------------------------------------------------------------------------

SPECIAL = [95, 96, 97, 98, 99]


def mask(ids: torch.Tensor, seed: int = 0, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {"mask_token_id": 99, "special_ids": SPECIAL, "vocab_size": 100} | changes
    return pretraining.mask_tokens(ids, torch.Generator().manual_seed(seed), **settings)


def near(share: float, expected: float, n: int) -> bool:
    """Within five standard deviations of a share counted over n draws."""
    return abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


def test_masking_keeps_its_shares():
    ids = torch.randint(95, (200_000,), generator=torch.Generator().manual_seed(1))
    seen, labels = mask(ids)
    chosen = labels != -100
    n = int(chosen.sum())
    assert near(n / len(ids), 0.3, len(ids))
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(seen[~chosen], ids[~chosen])
    assert near((seen[chosen] == 99).sum() / n, 0.8, n)
    # A random token is the old one once in 95 times.
    assert near((seen[chosen] == ids[chosen]).sum() / n, 0.1 + 0.1 / 95, n)
    drawn = seen[chosen & (seen != 99) & (seen != ids)]
    assert drawn.unique().tolist() == list(range(95))


def test_special_tokens_are_never_masked_and_never_drawn():
    ids = torch.tensor(SPECIAL).repeat(2000)
    seen, labels = mask(ids)
    assert torch.equal(seen, ids) and (labels == -100).all()
    seen, _ = mask(torch.zeros(50_000, dtype=torch.long), mask_share=0.0, random_share=1.0)
    assert not set(seen.tolist()) & set(SPECIAL)


def test_masks_follow_from_the_generator_alone():
    ids = torch.randint(95, (3, 70), generator=torch.Generator().manual_seed(1))
    original = ids.clone()
    assert torch.equal(mask(ids)[0], mask(ids)[0])
    assert not torch.equal(mask(ids)[0], mask(ids, seed=1)[0])
    assert torch.equal(ids, original)


def test_the_collator_takes_padded_batches_too(tokenizer):
    batch = tokenizer(list(TEXTS[:20]), padding=True, return_tensors="pt")
    masked = pretraining.MaskingCollator(tokenizer, seed=1)(batch)
    assert torch.equal(masked["attention_mask"], batch["attention_mask"])
    assert (masked["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (masked["labels"] != -100).any()
    assert (masked["input_ids"] == tokenizer.mask_token_id).any()


# --- packing ------------------------------------------------------------------------------


def test_pieces_cover_every_token_once(shard):
    pieces = pretraining.cut_documents(shard, max_length=12)
    covered = np.concatenate([np.arange(a, a + n) for a, n in pieces])
    assert covered.tolist() == list(range(len(shard.tokens)))
    assert pieces[:, 1].max() <= 10
    # Long documents are cut evenly: no stub of one token beside a piece of ten.
    assert pieces[pieces[:, 1] < 5, 1].size == 0
    ends = set((pieces.sum(axis=1)).tolist())
    assert set(shard.offsets[1:].tolist()) <= ends  # no piece crosses a document's end


def sequences(batch: dict) -> list[list[int]]:
    bounds = batch["cu_seqlens"].tolist()
    return [batch["input_ids"][a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]


def test_an_epoch_holds_every_piece_once_between_cls_and_sep(shard, tokenizer):
    batches = packed(shard, tokenizer)
    seen = []
    for batch in batches.one_epoch():
        assert batch["input_ids"].dtype == torch.int64 and batch["cu_seqlens"].dtype == torch.int32
        assert len(batch["input_ids"]) == batch["cu_seqlens"][-1] <= 128
        rows = sequences(batch)
        assert batch["max_seqlen"] == max(map(len, rows)) <= 24
        for row in rows:
            assert (row[0], row[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
            seen.append(tuple(row[1:-1]))
    pieces = pretraining.cut_documents(shard, 24)
    assert sorted(seen) == sorted(tuple(shard.tokens[a : a + n].tolist()) for a, n in pieces)


def test_batches_are_nearly_full(shard, tokenizer):
    sizes = [len(batch["input_ids"]) for batch in packed(shard, tokenizer).one_epoch()]
    assert min(sizes[:-1]) > 128 - 24


def test_every_epoch_has_its_own_order_and_a_seed_repeats_it(shard, tokenizer):
    plans = [[w.tolist() for w in packed(shard, tokenizer).plan(e)] for e in (0, 1, 0)]
    assert plans[0] == plans[2] != plans[1]
    assert packed(shard, tokenizer, seed=4).plan(0)[0].tolist() != plans[0][0]


def test_a_repeated_shard_is_seen_as_often_in_each_epoch(shard, tokenizer):
    once, thrice = (packed(shard, tokenizer, repeats=[n]) for n in (1, 3))
    assert len(thrice.pieces) == 3 * len(once.pieces)
    both = pretraining.PackedBatches(
        [shard, shard], tokenizer, tokens_per_batch=128, max_length=24, shuffle=False
    )
    rows = [row for batch in both.one_epoch() for row in sequences(batch)]
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]


def test_batches_go_on_from_a_position(shard, tokenizer):
    whole = packed(shard, tokenizer)
    length = len(whole.plan(0))
    stream = iter(whole)
    expected = [next(stream)["input_ids"] for _ in range(length + 3)]  # into the next epoch
    for stop in (1, length, length + 2):
        first, second = packed(shard, tokenizer), packed(shard, tokenizer)
        stream = iter(first)
        for _ in range(stop):
            next(stream)
        second.epoch, second.position = first.epoch, first.position
        assert torch.equal(next(iter(second))["input_ids"], expected[stop])


def test_processes_share_the_batches(shard, tokenizer):
    alone = packed(shard, tokenizer)
    pair = [packed(shard, tokenizer, rank=rank, world=2) for rank in (0, 1)]
    streams = [iter(p) for p in pair]
    stream = iter(alone)
    for _ in range(len(alone.plan(0)) // 2):
        for own in streams:
            assert torch.equal(next(own)["input_ids"], next(stream)["input_ids"])
        assert pair[0].tokens == pair[1].tokens == alone.tokens


def test_gradients_are_averaged_over_processes(monkeypatch):
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    mine = [p.grad.clone() for p in model.parameters()]
    monkeypatch.setattr(pretraining, "process_rank", lambda: (0, 2))
    # The other process's gradient is 1 everywhere.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(1.0))
    pretraining.average_gradients(model)
    for parameter, own in zip(model.parameters(), mine, strict=True):
        torch.testing.assert_close(parameter.grad, (own + 1) / 2)


# --- optimiser and schedule ---------------------------------------------------------------


def rate(tokens: float, total: float = 1000) -> float:
    return pretraining.warmup_stable_decay(tokens, warmup=100, decay=400, total=total)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [(0, 0), (25, 0.25), (100, 1), (600, 1), (700, 0.5), (856, 0.2), (1000, 0), (1200, 0)],
)
def test_the_schedule_rises_stays_and_falls(tokens, share):
    assert rate(tokens) == pytest.approx(share)


def test_the_stable_part_does_not_know_the_end():
    assert [rate(t, total=1000) for t in range(600)] == [rate(t, total=5000) for t in range(600)]


def test_norms_biases_and_the_embedding_do_not_decay(tokenizer):
    config = pretraining.PretrainingConfig("", {}, model=TINY, vocab_size=VOCAB)
    model = ModernBertForMaskedLM(pretraining.model_config(config, tokenizer))
    decayed, spared = pretraining.parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {names[id(p)] for p in decayed["params"]}
    kinds = {name.split(".")[-2] for name in inside}
    assert kinds == {"Wqkv", "Wo", "Wi", "dense"}
    assert len(inside) + len(spared["params"]) == len(names)


# --- scores -------------------------------------------------------------------------------


def test_scores_are_what_a_plain_count_gives():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(20, (50,), generator=torch.Generator().manual_seed(1))
    scores = pretraining.MaskedScores()
    scores.add(logits[:20], labels[:20])
    scores.add(logits[20:], labels[20:])
    means = scores.means()
    order = logits.argsort(descending=True).tolist()
    rank = [row.index(label) for row, label in zip(order, labels.tolist(), strict=True)]
    assert means["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert means["top1"] == sum(r == 0 for r in rank) / 50
    assert means["top5"] == sum(r < 5 for r in rank) / 50
    assert means["positions"] == 50


def test_the_unigram_baseline_counts_tokens(tmp_path):
    first = data.tokenise_to_shards(["x"], lambda texts: [[0, 0, 0, 1]], tmp_path / "a")
    second = data.tokenise_to_shards(["x"], lambda texts: [[2]], tmp_path / "b")
    logits = pretraining.unigram_logits([first, second], [1, 2], vocab_size=6)
    # Counts 3, 1, 2, 0, 0, 0, each plus one, of 12 in all.
    assert logits.exp().tolist() == pytest.approx([4 / 12, 2 / 12, 3 / 12, 1 / 12, 1 / 12, 1 / 12])
    batch = {"labels": torch.tensor([-100, 0, 2, 3, -100])}
    scores = pretraining.evaluate_unigram(logits, [batch])
    assert scores["loss"] == pytest.approx(-math.log(4 / 12 * 3 / 12 * 1 / 12) / 3)
    assert (scores["top1"], scores["positions"]) == (1 / 3, 3)


def test_held_out_masks_never_change(shard, tokenizer):
    batches = [
        pretraining.fixed_masks(packed(shard, tokenizer, shuffle=False).one_epoch(), tokenizer)
        for _ in range(2)
    ]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        # All that is asked for shows [MASK], and nothing else does.
        assert torch.equal(one["input_ids"] == tokenizer.mask_token_id, one["labels"] != -100)
    asked = sum(int((b["labels"] != -100).sum()) for b in batches[0])
    everything = len(shard.tokens)
    assert near(asked / everything, 0.15, everything)


# --- runs ---------------------------------------------------------------------------------

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "local_attention": 8,
    "embedding_dropout": 0.1,  # so that a resumed run needs torch's own generator too
}


@pytest.fixture
def config(tmp_path, monkeypatch) -> pretraining.PretrainingConfig:
    """A run of about 40 steps on a synthetic corpus."""
    monkeypatch.setattr(
        pretraining,
        "load_corpus",
        lambda name, config: data.make_corpus(name, EASY_TEXTS, "made for this test", "CC0"),
    )
    return pretraining.PretrainingConfig(
        folder=str(tmp_path / "run"),
        corpora={"one": 1, "two": 2},
        model=TINY,
        vocab_size=VOCAB,
        held_out_percent=10,
        total_tokens=40 * 512,
        warmup_tokens=2 * 512,
        decay_tokens=10 * 512,
        batch_tokens=512,
        max_length=32,
        peak_lr=1e-2,
        log_every=5,
        evaluate_every=15,
        checkpoint_every=8,
    )


def events(config, kind: str) -> list[dict]:
    return [line for line in pretraining.read_log(config.folder) if line["event"] == kind]


def test_a_run_learns_more_than_frequencies(config):
    run = pretraining.pretrain(config)
    assert config.total_tokens - 512 < run.tokens <= config.total_tokens
    start, last = events(config, "start")[0], events(config, "evaluation")[-1]
    assert last["held_out"]["all"]["loss"] < start["unigram"]["all"]["loss"] - 0.3
    assert last["held_out"]["all"]["positions"] == start["unigram"]["all"]["positions"]
    assert events(config, "end")[0]["step"] == run.steps
    assert [line["step"] for line in events(config, "train")][:3] == [5, 10, 15]
    assert start["config"]["corpora"] == {"one": 1, "two": 2}


def test_a_resumed_run_gives_the_same_weights_bit_for_bit(config, tmp_path, monkeypatch):
    whole = pretraining.pretrain(config).model.state_dict()
    config.folder = str(tmp_path / "stopped")
    step = pretraining.Run.step

    def stop_at_13(run):
        if run.steps == 13:  # five steps after the last checkpoint
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(pretraining.Run, "step", stop_at_13)
    with pytest.raises(KeyboardInterrupt):
        pretraining.pretrain(config)
    monkeypatch.setattr(pretraining.Run, "step", step)
    torch.manual_seed(99)  # whatever the new process has drawn before
    resumed = pretraining.pretrain(config)
    assert events(config, "start")[1]["resumed_at"]["step"] == 8
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_a_checkpoint_is_old_or_new_never_half(config, monkeypatch):
    run = pretraining.pretrain(config)
    path = Path(config.folder) / "checkpoint.pt"
    before = path.read_bytes()

    def broken(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        pretraining.save_checkpoint(run, path)
    assert path.read_bytes() == before


def test_nothing_held_out_is_in_the_training_shards(config):
    training_data = pretraining.prepare_data(config)
    for name in config.corpora:
        train = {tuple(training_data.train[name][i]) for i in range(len(training_data.train[name]))}
        held_out = training_data.held_out[name]
        assert 10 < len(held_out) < 80
        assert not train & {tuple(held_out[i]) for i in range(len(held_out))}


def test_data_is_prepared_once(config, monkeypatch):
    first = pretraining.prepare_data(config)
    monkeypatch.setattr(pretraining, "load_corpus", None)
    second = pretraining.prepare_data(config)
    assert first.train["one"].sha256 == second.train["one"].sha256


def test_an_unknown_corpus_is_named():
    with pytest.raises(ValueError, match="unknown corpus 'x'; known are vital-articles"):
        pretraining.load_corpus("x", pretraining.PretrainingConfig("", {}))


def test_a_recipe_is_read_from_toml(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('folder = "run"\ncorpora = { wordnet = 2 }\n[model]\nhidden_size = 64\n')
    config = pretraining.PretrainingConfig.from_toml(file)
    assert config.corpora == {"wordnet": 2} and config.model == {"hidden_size": 64}
    file.write_text('folder = "run"\ncorpora = {}\nlearning_rat = 1\n')
    with pytest.raises(TypeError, match="learning_rat"):
        pretraining.PretrainingConfig.from_toml(file)


# --- export -------------------------------------------------------------------------------


def test_an_exported_run_loads_and_its_card_agrees_with_the_log(config, tmp_path):
    run = pretraining.pretrain(config)
    target = tmp_path / "out"
    pretraining.export(config.folder, target)
    model = ModernBertForMaskedLM.from_pretrained(target)
    tokenizer = Tokenizer.from_pretrained(target)
    assert not model.config.sparse_prediction
    batch = tokenizer([TEXTS[0], TEXTS[1]], padding=True, return_tensors="pt")
    run.model.eval()
    assert torch.equal(model(**batch).logits, run.model(**batch).logits)
    card = (target / "README.md").read_text()
    facts = json.loads((target / "training.json").read_text())
    assert facts["held_out"] == events(config, "evaluation")[-1]["held_out"]
    assert f"{facts['held_out']['all']['loss']:.3f}" in card
    assert f"{facts['unigram']['all']['loss']:.3f}" in card
    assert facts["tokens"] == run.tokens and facts["finished"]
    assert "intermediate" not in card
    assert (target / "loss.png").stat().st_size > 1000
    for text in (card, json.dumps(facts)):
        assert str(tmp_path) not in text and os.sep + "usr" not in text


def test_a_card_written_while_training_goes_on_describes_the_checkpoint(config, tmp_path):
    pretraining.pretrain(config)
    path = Path(config.folder) / "log.jsonl"
    lines = [line for line in pretraining.read_log(config.folder) if line["event"] != "end"]
    for line in lines:  # the log is ahead: three steps more, with scores that are not these
        if line["event"] == "evaluation":
            line |= {"step": line["step"] + 3}
            line["held_out"]["all"]["loss"] = 99
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pretraining.export(config.folder, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["held_out"]["all"]["loss"] < 10
    assert not facts["finished"]
    assert "intermediate" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_counts_a_repeated_step_once():
    recipe = {"folder": "/x", "seed": 0}
    start = {"event": "start", "config": recipe, "time": "2026-01-01T00:00:00Z"}
    start |= dict.fromkeys(("parameters", "corpora", "machine"), 0) | {"unigram": {}}
    clock = {"time": "2026-01-01T00:01:00Z", "seconds": 50, "tokens_per_second": 7}

    def train(step, loss, lr):
        return {"event": "train", "step": step, "tokens": step, "loss": loss, "lr": lr, **clock}

    held_out = {"event": "evaluation", "step": 2, "tokens": 2, **clock}
    held_out |= {"held_out": {"all": {"loss": 5.0}}}
    log = [start, train(1, 9.0, 0.1), train(2, 8.0, 0.2), start, train(2, 7.0, 0.2), held_out]
    log += [train(3, 6.0, 0.1)]
    facts = model_card.summarise(log)
    assert facts["curve"]["train"] == [[1, 9.0], [2, 7.0], [3, 6.0]]
    assert (facts["resumed"], facts["decay_started_at"], facts["finished"]) == (1, 2, False)
    assert facts["recipe"] == {"seed": 0, "total_tokens": 3}


# --- mini ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini_facts(root) -> dict:
    return json.loads((root / "modernbert_mini" / "mini" / "training.json").read_text())


def test_mini_is_small_enough_to_ship(root):
    files = (root / "modernbert_mini" / "mini").iterdir()
    assert sum(file.stat().st_size for file in files) < 16e6


def test_mini_beats_the_unigram_baseline_clearly(mini_facts):
    for name, scores in mini_facts["held_out"].items():
        baseline = mini_facts["unigram"][name]
        assert scores["positions"] == baseline["positions"]
        assert scores["loss"] < baseline["loss"] - 1
        assert scores["top1"] > 2 * baseline["top1"]


def test_the_scores_on_the_card_of_mini_can_be_measured_again(mini_facts, tmp_path):
    """On held-out Wikipedia, the one corpus that is the same for every Python and system."""
    try:
        corpus = data.vital_articles()
    except data.CorpusNotFoundError as error:
        pytest.skip(str(error))
    recipe = mini_facts["recipe"]
    tokenizer = Tokenizer.from_pretrained("mini")
    _, held_out = data.split_held_out(corpus.documents, recipe["held_out_percent"])
    shard = data.tokenise_to_shards(
        held_out, lambda texts: tokenizer(texts, add_special_tokens=False).input_ids, tmp_path
    )
    batches = pretraining.PackedBatches(
        [shard],
        tokenizer,
        tokens_per_batch=recipe["batch_tokens"],
        max_length=recipe["max_length"],
        shuffle=False,
    )
    model = ModernBertForMaskedLM.from_pretrained("mini", sparse_prediction=True)
    found = pretraining.evaluate(model, pretraining.fixed_masks(batches.one_epoch(), tokenizer))
    expected = mini_facts["held_out"]["vital-articles"]
    assert found["positions"] == expected["positions"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=2e-3)
    assert found["top1"] == pytest.approx(expected["top1"], abs=2e-3)
