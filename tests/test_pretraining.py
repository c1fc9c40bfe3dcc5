"""Pre-training does what the recipe says: masks, packing, optimiser, schedule, scores, export."""

import io
import itertools
import json
import math
import os
import sys
import types
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modernbert_mini import (
    ConfigError,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Tokenizer,
    data,
    model_card,
    pretraining,
)
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
    return to_shards(TEXTS, tokenizer, tmp_path)[0]


def to_shards(texts, tokenizer, folder, **settings) -> list[data.TokenShard]:
    return data.tokenise_to_shards(
        texts,
        lambda texts: [tokenizer.encode(t, add_special_tokens=False) for t in texts],
        folder,
        **settings,
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
    assert batches.tokens == 0  # looking is not training


@pytest.mark.parametrize("streams", [1, 3])
def test_training_sees_every_piece_before_any_twice(shard, tokenizer, streams):
    batches = packed(shard, tokenizer)
    pieces = {tuple(p) for p in batches.pieces(0).tolist()}
    handed, order = [], []
    make = batches.stream
    batches.stream = lambda chosen: handed.extend(map(tuple, chosen)) or make(chosen)
    while batches.epoch == 0:
        order += batches.take(streams)
    first = handed[: len(pieces)]
    # What waited at the end of the epoch comes first in the next.
    late = [tuple(p) for p in batches.waiting]
    assert len(set(first)) >= len(pieces) - pretraining.LOOKAHEAD - len(late)
    assert {*handed, *late} == pieces
    for stream in order:
        assert len(stream["input_ids"]) <= 128 and stream["max_seqlen"] <= 24


def test_streams_are_full(shard, tokenizer):
    for streams in (1, 4):
        batches = packed(shard, tokenizer)
        taken = [stream for _ in range(12) for stream in batches.take(streams)]
        assert len(taken) == 12 * streams
        assert np.mean([len(stream["input_ids"]) for stream in taken]) > 0.98 * 128
        assert batches.tokens == sum(len(stream["input_ids"]) for stream in taken)


def test_no_sequence_sees_another(shard, tokenizer):
    """The loss of a stream is that of its sequences alone."""
    config = pretraining.PretrainingConfig("", {"x": 1}, model=TINY, vocab_size=VOCAB)
    model = pretraining.build_model(config, tokenizer).eval()
    stream = packed(shard, tokenizer).take(1)[0]
    whole = model(**stream).logits
    apart = [model(torch.tensor([row])).logits[0] for row in sequences(stream)]
    torch.testing.assert_close(whole, torch.cat(apart), atol=1e-5, rtol=1e-4)


def test_every_epoch_has_its_own_order_and_a_seed_repeats_it(shard, tokenizer):
    def order(epoch, **changes):
        batches = packed(shard, tokenizer, **changes)
        batches.epoch = epoch
        return batches.shuffled().tolist()

    assert order(0) == order(0) != order(1)
    assert order(0, seed=4) != order(0)
    assert sorted(order(0)) == sorted(order(1))


def test_shards_are_shuffled_a_few_at_a_time(tokenizer, tmp_path, monkeypatch):
    """Memory holds the pieces of WINDOW shards, and yet every piece comes up in an epoch."""
    monkeypatch.setattr(pretraining, "WINDOW", 2)
    shards = to_shards(TEXTS, tokenizer, tmp_path, tokens_per_shard=500)
    assert len(shards) > 6
    settings = {"tokens_per_batch": 128, "max_length": 24, "repeats": [2] + [1] * (len(shards) - 1)}
    batches = pretraining.PackedBatches(shards, tokenizer, **settings)
    seen, most = [], 0
    while batches.epoch == 0:
        seen.append(tuple(batches.next_piece()))
        most = max(most, len(batches.order))
    seen.pop()  # the first of the next epoch
    expected = [tuple(p) for i in [0, *range(len(shards))] for p in batches.pieces(i).tolist()]
    assert sorted(seen) == sorted(expected)
    assert most < len(expected) / 2
    assert [shard for shard, *_ in seen] != sorted(shard for shard, *_ in seen)


def test_a_repeated_shard_is_seen_as_often_in_each_epoch(shard, tokenizer):
    once, thrice = (packed(shard, tokenizer, repeats=[n]) for n in (1, 3))
    assert sorted(thrice.order.tolist()) == sorted(3 * once.order.tolist())


def test_batches_go_on_from_a_state(shard, tokenizer):
    whole = packed(shard, tokenizer)
    expected = [whole.take(2) for _ in range(60)]  # into the next epoch
    assert whole.epoch > 0
    for stop in (1, 29, 50):
        first, second = packed(shard, tokenizer), packed(shard, tokenizer)
        for _ in range(stop):
            first.take(2)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for mine, theirs in zip(second.take(2), expected[stop], strict=True):
            assert torch.equal(mine["input_ids"], theirs["input_ids"])
        assert second.tokens > first.tokens


def test_no_text_and_too_long_a_sequence_are_refused(shard, tokenizer, tmp_path):
    empty = to_shards([], tokenizer, tmp_path / "empty")
    with pytest.raises(ConfigError, match="no text"):
        pretraining.PackedBatches(empty, tokenizer, tokens_per_batch=128, max_length=24)
    with pytest.raises(ConfigError, match="sequences of 200 tokens"):
        packed(shard, tokenizer, max_length=200)


# --- optimiser --------------------------------------------------------------------------


def descend(optimizer_class, gradients, lr=0.1, **settings) -> torch.Tensor:
    """Where one parameter goes under some gradients."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
    optimizer = optimizer_class([parameter], lr=lr, **settings)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.fixture
def gradients() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, generator=draw) for _ in range(20)]


def test_with_pytorchs_decay_adamw_is_pytorchs(gradients):
    settings = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    ours = descend(pretraining.AdamW, gradients, fully_decoupled=False, **settings)
    theirs = descend(torch.optim.AdamW, gradients, **settings)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("optimizer_class", [pretraining.AdamW, pretraining.StableAdamW])
def test_fully_decoupled_decay_does_not_depend_on_the_rate(optimizer_class):
    nothing = [torch.zeros(2, 3)]
    start = descend(optimizer_class, [])
    for lr in (0.1, 1e-4):
        left = descend(optimizer_class, nothing * 3, lr=lr, weight_decay=0.2)
        torch.testing.assert_close(left, start * 0.8**3)


def test_decay_follows_the_schedule():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = pretraining.AdamW([parameter], lr=0.5, weight_decay=0.2)
    optimizer.param_groups[0]["lr"] = 0.25  # half of the peak
    parameter.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize("scale", [1, 1e-5])  # the second is near eps
def test_stable_adamw_is_its_formula(gradients, scale):
    """Written once more, in numpy, as the paper has it: moments first, then their correction."""
    gradients = [gradient * scale for gradient in gradients]
    beta1, beta2, eps, lr, decay = 0.9, 0.98, 1e-6, 0.1, 0.01
    gradients[10] *= 30  # a spike
    weights, u, v = np.linspace(-1, 1, 6).reshape(2, 3), 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double().numpy()
        u, v = beta1 * u + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        u_hat, v_hat = u / (1 - beta1**t), v / (1 - beta2**t)
        rms = np.sqrt(np.mean(g * g / np.maximum(v_hat, eps**2)))
        rate = lr / max(1, rms)
        weights = weights * (1 - rate / lr * decay) - rate * u_hat / (np.sqrt(v_hat) + eps)
    settings = {"betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
    found = descend(pretraining.StableAdamW, gradients, **settings)
    torch.testing.assert_close(found.double(), torch.from_numpy(weights), atol=1e-5, rtol=1e-5)


def test_a_spike_moves_stable_adamw_less():
    calm = [torch.full((2, 3), 1e-3 * (-1) ** i) for i in range(200)]
    spike = [torch.full((2, 3), 10.0)]
    moved = {}
    for kind in (pretraining.AdamW, pretraining.StableAdamW):
        moved[kind] = (descend(kind, calm + spike) - descend(kind, calm)).abs().max()
    assert moved[pretraining.StableAdamW] < 0.25 * moved[pretraining.AdamW]


# --- schedules --------------------------------------------------------------------------


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


def test_without_decay_the_rate_stays():
    rates = [pretraining.warmup_stable_decay(t, warmup=0, decay=0, total=10) for t in range(20)]
    assert set(rates) == {1.0}


def test_every_batch_size_has_as_many_steps():
    sizes, tokens = [], 0
    while tokens < 300_000:
        sizes.append(pretraining.batch_size(tokens, start=768, full=4608, warmup=200_000))
        tokens += sizes[-1]
    counts = {size: sizes.count(size) for size in sizes}
    assert [*counts] == [768 * i for i in range(1, 7)] and sizes == sorted(sizes)
    below = [counts[768 * i] for i in range(1, 6)]
    assert max(below) - min(below) <= 1
    assert abs(sum(size for size in sizes if size < 4608) - 200_000) < 4608
    assert pretraining.batch_size(0, start=4608, full=4608, warmup=0) == 4608


def test_norms_biases_and_the_embedding_do_not_decay(tokenizer):
    config = pretraining.PretrainingConfig("", {"x": 1}, model=TINY, vocab_size=VOCAB)
    model = pretraining.build_model(config, tokenizer)
    decayed, spared = pretraining.parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {names[id(p)] for p in decayed["params"]}
    kinds = {name.split(".")[-2] for name in inside}
    assert kinds == {"Wqkv", "Wo", "Wi", "dense"}
    assert len(inside) + len(spared["params"]) == len(names)
    more = {names[id(p)] for p in pretraining.parameter_groups(model, 0.1, True)[0]["params"]}
    assert more - inside == {"model.embeddings.tok_embeddings.weight"}


# --- weights from weights ---------------------------------------------------------------


def sized(layers: int, heads: int, inner: int, head_dim: int = 4) -> ModernBertForMaskedLM:
    torch.manual_seed(layers)
    config = ModernBertConfig(
        vocab_size=11,
        hidden_size=heads * head_dim,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        pad_token_id=0,
    )
    model = ModernBertForMaskedLM(config)
    for name, parameter in model.named_parameters():  # so that norms differ from each other too
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter)
    return model


def test_the_small_matrix_stands_in_the_middle_and_goes_on_around_it():
    for new, old in ((7, 3), (8, 3), (1024, 768), (5, 5), (9, 2)):
        places = pretraining.wrap(new, old).tolist()
        offset = (new - old) // 2
        assert places[offset : offset + old] == [*range(old)]
        assert all((b - a) % old == 1 % old for a, b in itertools.pairwise(places))


def test_tiling_keeps_every_head_whole():
    small, large = sized(2, heads=3, inner=6), sized(3, heads=6, inner=10)
    pretraining.tile(small, large)
    mine, theirs = (
        m.model.layers[0].attn.Wqkv.weight.unflatten(0, (3, -1, 4)) for m in (large, small)
    )
    # 3 → 6 heads: one before, the three, two after.
    columns = torch.tensor([*range(12)] * 3)[8 - 2 : 8 - 2 + 24]  # 12 → 24: six before, six after
    for new, old in enumerate([2, 0, 1, 2, 0, 1]):
        assert torch.equal(mine[:, new], theirs[:, old][..., columns])
    back = (m.model.layers[0].attn.Wo.weight.unflatten(1, (-1, 4)) for m in (large, small))
    mine, theirs = back
    assert torch.equal(mine[6:18, 1:4], theirs)


def test_tiling_keeps_the_two_halves_of_geglu_apart():
    small, large = sized(2, heads=3, inner=6), sized(2, heads=3, inner=10)
    pretraining.tile(small, large)
    mine, theirs = (m.model.layers[1].mlp.Wi.weight.unflatten(0, (2, -1)) for m in (large, small))
    assert torch.equal(mine[:, 2:8], theirs)
    assert torch.equal(mine[:, 8:], theirs[:, :2]) and torch.equal(mine[:, :2], theirs[:, 4:])


def test_layers_are_spread_and_what_is_missing_keeps_its_start():
    small, large = sized(4, heads=2, inner=6), sized(6, heads=2, inner=6)
    before = large.model.layers[1].attn_norm.weight.clone()
    pretraining.tile(small, large)
    for new, old in enumerate([0, 1, 1, 2, 3, 3]):  # round(i * 4 / 6)
        a, b = (m.model.layers[k].mlp.Wo.weight for m, k in ((large, new), (small, old)))
        assert torch.equal(a, b), new
    assert torch.equal(
        large.model.layers[1].attn_norm.weight, small.model.layers[1].attn_norm.weight
    )
    deep = sized(12, heads=2, inner=6)
    before = deep.model.layers[1].attn_norm.weight.clone()
    pretraining.tile(small, deep)  # layer 1 comes from layer 0, which has no attn_norm
    assert torch.equal(deep.model.layers[1].attn_norm.weight, before)


def test_a_model_tiled_to_its_own_size_is_itself():
    small, same = sized(3, heads=2, inner=6), sized(3, heads=2, inner=6)
    same.init_weights()
    pretraining.tile(small, same)
    for (name, a), b in zip(small.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((2, 3, 5), "intermediate_size"), ((2, 2, 6), "hidden_size"), ((2, 3, 6, 8), "head_dim")],
)
def test_what_cannot_be_tiled_is_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        pretraining.tile(sized(2, heads=3, inner=6), sized(*sizes))


def test_without_sizes_a_run_goes_on_with_the_model_it_starts_from():
    tokenizer = Tokenizer.from_pretrained("mini")
    mini = ModernBertForMaskedLM.from_pretrained("mini")
    config = pretraining.PretrainingConfig("", {"x": 1}, tokenizer="mini", initialize_from="mini")
    model = pretraining.build_model(config, tokenizer)
    assert model.config.sparse_prediction
    assert model.config.with_overrides(sparse_prediction=False) == mini.config
    for (name, a), b in zip(model.named_parameters(), mini.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_from_weights_is_scored_before_its_first_step(config, tmp_path):
    pretraining.pretrain(config)
    scores = pretraining.export(config.folder, tmp_path / "first")
    places = {"tokenizer": str(tmp_path / "first"), "initialize_from": str(tmp_path / "first")}
    second = replace(config, folder=str(tmp_path / "second"), model={}, **places)
    pretraining.pretrain(second)
    before, *_, after = events(second, "evaluation")
    assert (before["step"], before["tokens"]) == (0, 0)
    assert before["held_out"]["all"]["loss"] == pytest.approx(scores["all"]["loss"])
    assert after["held_out"]["all"]["loss"] != before["held_out"]["all"]["loss"]
    again = pretraining.pretrain(second, resume=True)
    assert [e["step"] for e in events(second, "evaluation")].count(0) == 1 and again.finished


def test_a_tiled_mini_learns_faster_than_random_weights(tmp_path):
    """Tiling changes what the model computes, so it is no better at once: it gets there sooner."""
    from pydoc_data.topics import topics

    tokenizer = Tokenizer.from_pretrained("mini")
    shards = to_shards([topics[name] for name in sorted(topics)[:8]], tokenizer, tmp_path)
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 7}
    recipe = {"tokenizer": "mini", "model": sizes | {"intermediate_size": 320}}
    last = {}
    for start in ("mini", None):
        config = pretraining.PretrainingConfig("", {"x": 1}, **recipe, initialize_from=start)
        model = pretraining.build_model(config, tokenizer)
        batches = pretraining.PackedBatches(shards, tokenizer, tokens_per_batch=512, max_length=128)
        optimizer = pretraining.AdamW(pretraining.parameter_groups(model, 0.0), lr=1e-3)
        collate = pretraining.MaskingCollator(tokenizer)
        for _ in range(6):
            loss = model(**collate(batches.take(1)[0])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        last[start] = loss.item()
    assert last["mini"] < last[None] - 1


def test_the_mean_of_models_is_the_mean_of_each_weight():
    models = [dict(sized(2, 2, 6).named_parameters()) for _ in range(1)]
    models += [{k: v + i for k, v in models[0].items()} for i in (1, 5)]
    for name, mean in pretraining.average_weights(models).items():
        torch.testing.assert_close(mean, models[0][name] + 2)
        assert mean.dtype == torch.float32


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
    (first,) = data.tokenise_to_shards(["x"], lambda texts: [[0, 0, 0, 1]], tmp_path / "a")
    (second,) = data.tokenise_to_shards(["x"], lambda texts: [[2]], tmp_path / "b")
    logits = pretraining.unigram_logits([first, second], [1, 2], vocab_size=6)
    # Counts 3, 1, 2, 0, 0, 0, each plus one, of 12 in all.
    assert logits.exp().tolist() == pytest.approx([4 / 12, 2 / 12, 3 / 12, 1 / 12, 1 / 12, 1 / 12])
    batch = {"labels": torch.tensor([-100, 0, 2, 3, -100])}
    scores = pretraining.evaluate_unigram(logits, [batch])
    assert scores["loss"] == pytest.approx(-math.log(4 / 12 * 3 / 12 * 1 / 12) / 3)
    assert (scores["top1"], scores["positions"]) == (1 / 3, 3)


def test_held_out_masks_never_change(shard, tokenizer):
    batches = [
        pretraining.fixed_masks(packed(shard, tokenizer).one_epoch(), tokenizer) for _ in range(2)
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
        lambda name, config: data.Corpus(name, EASY_TEXTS, "made for this test", "CC0"),
    )
    return pretraining.PretrainingConfig(
        folder=str(tmp_path / "run"),
        corpora={"one": 1, "two": 2},
        model=TINY,
        vocab_size=VOCAB,
        held_out_percent=10,
        training_tokens=40 * 512,
        warmup_tokens=2 * 512,
        decay_tokens=10 * 512,
        batch_tokens=512,
        max_sequence_length=32,
        learning_rate=1e-2,
        log_every=5,
        evaluate_every=15,
        checkpoint_every=8,
    )


def events(config, kind: str) -> list[dict]:
    return [line for line in pretraining.read_log(config.folder) if line["event"] == kind]


@pytest.mark.parametrize("optimizer", ["StableAdamW", "AdamW"])
def test_a_run_learns_more_than_frequencies(config, optimizer):
    run = pretraining.pretrain(replace(config, optimizer=optimizer))
    assert config.training_tokens - 512 < run.tokens <= config.training_tokens
    start, last = events(config, "start")[0], events(config, "evaluation")[-1]
    assert last["held_out"]["all"]["loss"] < start["unigram"]["all"]["loss"] - 0.15
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
    resumed = pretraining.pretrain(config, resume=True)
    assert events(config, "start")[1]["resumed_at"]["step"] == 8
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def state_bytes(run) -> bytes:
    file = io.BytesIO()
    torch.save(run.state_dict() | {"progress": None}, file)  # without the seconds
    return file.getvalue()


def test_a_state_goes_through_a_file_and_back(config):
    run = pretraining.Run(config, pretraining.prepare_data(prepared(config)))
    for _ in range(3):
        run.step()
    path = Path(config.folder) / "checkpoint.pt"
    pretraining.save_checkpoint(run, path)
    other = pretraining.Run(config, run.data)
    pretraining.load_checkpoint(other, path)
    assert state_bytes(other) == state_bytes(run)
    assert (other.steps, other.tokens, other.saved) == (3, run.tokens, 3)
    assert run.step() | {} == other.step()
    assert state_bytes(other) == state_bytes(run)


def prepared(config):
    Path(config.folder).mkdir(exist_ok=True)
    return config


def test_microbatches_change_nothing_but_the_order_of_sums(config):
    """The weight of a token does not depend on the stream that it is in."""
    run = pretraining.Run(replace(config, microbatch_tokens=128), fresh_data(config))
    gradients = []
    run.optimizer.step = lambda: gradients.append([p.grad.clone() for p in run.model.parameters()])
    run.model.config.embedding_dropout = 0.0
    run.model.eval()
    run.step()
    run.steps = 0
    run.begin(0)
    streams = [run.mask(stream, i) for i, stream in enumerate(run.batches.take(4))]
    counts = [int((s["labels"] != -100).sum()) for s in streams]
    assert len({*counts}) > 1
    run.model.zero_grad()
    total = sum(run.model(**s).loss * n for s, n in zip(streams, counts, strict=True))
    (total / sum(counts)).backward()
    for parameter, gradient in zip(run.model.parameters(), gradients[0], strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


def fresh_data(config):
    return pretraining.prepare_data(prepared(config))


class Together(pretraining.World):
    """One of two processes that run one after the other; ``hidden`` tokens in both streams."""

    size = 2

    def __init__(self, rank: int, hidden: int = 0) -> None:
        super().__init__("cpu")
        self.rank, self.hidden, self.own = rank, hidden, []

    def sum(self, number: float) -> float:
        self.own.append(number)
        return self.hidden if len(self.own) == 1 and self.hidden else number


def test_processes_share_a_batch(config):
    config = replace(config, microbatch_tokens=128)
    training_data, gradients, losses = fresh_data(config), [], []
    before = Together(0), Together(1)
    for world in before:
        pretraining.Run(config, training_data, world).step()
    hidden = sum(world.own[0] for world in before)
    for world in (pretraining.World("cpu"), Together(0, hidden), Together(1, hidden)):
        run = pretraining.Run(config, training_data, world)
        kept = []
        run.optimizer.step = lambda run=run, kept=kept: kept.extend(
            p.grad.clone() for p in run.model.parameters()
        )
        losses.append(run.step()["loss"])
        gradients.append(kept)
    assert losses[1] + losses[2] == pytest.approx(losses[0])
    for alone, first, second in zip(*gradients, strict=True):  # processes average gradients
        torch.testing.assert_close((first + second) / 2, alone, atol=1e-6, rtol=1e-4)


def test_a_batch_has_to_fit_the_processes(config):
    with pytest.raises(ConfigError, match="batches of 1 streams; expected a multiple of 2"):
        pretraining.Run(config, fresh_data(config), Together(0))


PHASES = [
    {"training_tokens": 4096, "learning_rate": 1e-2, "warmup_tokens": 1024},
    {
        "training_tokens": 4096,
        "max_sequence_length": 64,
        "global_rope_theta": 160_000,
        "learning_rate": 5e-3,
        "weight_decay": 1e-6,
        "batch_tokens": 1024,
    },
    {"name": "decay", "training_tokens": 2048, "decay_tokens": 2048, "corpora": {"two": 1}},
]


def test_phases_follow_each_other(config):
    config = replace(config, phases=PHASES, model=TINY | {"global_rope_theta": 10_000.0})
    run = pretraining.Run(config, fresh_data(config))
    seen = []
    while not run.finished:
        values = run.step()
        group = run.optimizer.param_groups[0]
        rope = run.model.config.rope_parameters
        seen.append(
            (
                run.phase,
                run.batches.max_length,
                rope["full_attention"]["rope_theta"],
                rope["sliding_attention"]["rope_theta"],
                group["weight_decay"],
                values["batch"],
                len(run.batches.visits),
            )
        )
    assert sorted({*seen}) == [
        (0, 32, 10_000, 10_000, 1e-5, 512, 3),
        (1, 64, 160_000, 10_000, 1e-6, 1024, 3),
        (2, 32, 160_000, 10_000, 1e-5, 512, 1),
    ]
    steps = [sum(s[0] == phase for s in seen) for phase in range(3)]
    assert steps == [8, 4, 4]
    assert 4096 * 2 + 2048 - 2048 < run.tokens <= 4096 * 2 + 2048
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {16}  # it goes on


def test_a_longer_context_with_a_larger_base_changes_what_global_layers_see(config):
    run = pretraining.Run(replace(config, phases=PHASES), fresh_data(config))
    stream = run.batches.take(1)[0]
    run.model.eval()
    for parameter in run.model.parameters():
        parameter.data *= 20  # so that a position matters before any training
    before = run.model(**stream).logits
    run.phases[0].global_rope_theta = 1000.0
    run.begin(0)
    assert (before - run.model(**stream).logits).abs().max() > 1e-2


def test_a_run_resumed_in_a_later_phase_is_the_same(config, tmp_path):
    config = replace(config, phases=PHASES, average=2, evaluate_every=1, checkpoint_every=10)
    whole = pretraining.pretrain(config)
    config.folder = str(tmp_path / "other")
    run = pretraining.Run(config, fresh_data(config))
    for _ in range(13):
        run.step()
    pretraining.save_checkpoint(run, tmp_path / "other" / "checkpoint.pt")
    resumed = pretraining.pretrain(config, resume=True)
    assert state_bytes(resumed) == state_bytes(whole)
    assert (resumed.tokens, resumed.steps) == (whole.tokens, whole.steps)
    assert len(pretraining.kept(resumed)) == 2


def test_the_best_of_the_decay_are_averaged(config, tmp_path):
    config = replace(config, average=2, evaluate_every=2)
    run = pretraining.pretrain(config)
    lines = [e for e in events(config, "evaluation") if 30 < e["step"] < run.steps]
    best = sorted(lines, key=lambda line: line["held_out"]["all"]["loss"])[:2]
    kept = pretraining.kept(run)
    assert {state["step"] for state in kept} == {line["step"] for line in best}
    final = {name: p.detach() for name, p in run.model.named_parameters()}
    scores = pretraining.export(config.folder, tmp_path / "out")
    model = ModernBertForMaskedLM.from_pretrained(tmp_path / "out")
    mean = pretraining.average_weights([final, *(state["model"] for state in kept)])
    last = events(config, "evaluation")[-1]["held_out"]["all"]["loss"]
    expected = mean if scores["all"]["loss"] < last else final
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{last:.4f}" in card and "these are the weights of the" in card


# --- precision and places -----------------------------------------------------------------


def test_bfloat16_is_for_hardware_that_has_it(monkeypatch):
    cuda = torch.device("cuda")
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert pretraining.uses_bfloat16("auto", cuda) is expected
    assert not pretraining.uses_bfloat16("auto", torch.device("cpu"))
    assert pretraining.uses_bfloat16("bfloat16", torch.device("cpu"))
    assert not pretraining.uses_bfloat16("float32", cuda)


def test_bfloat16_trains_nearly_the_same(config):
    training_data = fresh_data(config)
    losses = []
    for precision in ("float32", "bfloat16"):
        run = pretraining.Run(replace(config, precision=precision), training_data)
        losses.append([run.step()["loss"] for _ in range(5)])
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match="device 'cuda'"):
        pretraining.World("cuda")
    assert pretraining.World("auto").device == torch.device("cpu")


def test_gradients_are_clipped_where_the_recipe_says(config):
    config = replace(config, clip_norm=0.01)
    run = pretraining.Run(config, fresh_data(config))
    norms = []
    run.optimizer.step = lambda: norms.append(
        torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item()
    )
    values = run.step()
    assert values["gradient_norm"] > 0.02  # what it was
    assert norms[0] == pytest.approx(0.01, rel=1e-3)


# --- what goes wrong ----------------------------------------------------------------------


def interrupted(config, monkeypatch, steps: int = 11) -> dict:
    """A run that was stopped; its checkpoint is of step 8."""
    step = pretraining.Run.step

    def stop(run):
        if run.steps == steps:
            raise KeyboardInterrupt
        return step(run)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining.Run, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            pretraining.pretrain(config)
    return checkpoint_of(config)


def checkpoint_of(config) -> bytes:
    return (Path(config.folder) / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_the_run(config, monkeypatch, bad):
    good = interrupted(config, monkeypatch)
    draw = pretraining.Run.mask

    def spoil(run, stream, number):
        if run.steps == 10:
            with torch.no_grad():  # as if the weights had run away
                run.model.decoder.bias.fill_(float(bad))
        return draw(run, stream, number)

    monkeypatch.setattr(pretraining.Run, "mask", spoil)
    with pytest.raises(pretraining.TrainingError) as caught:
        pretraining.pretrain(config, resume=True)
    text = str(caught.value)
    assert "step 11: the loss is nan" in text and "Lower the learning rate" in text
    assert "The checkpoint of step 8 in" in text
    assert checkpoint_of(config) == good
    monkeypatch.setattr(pretraining.Run, "mask", draw)
    assert pretraining.pretrain(config, resume=True).finished


needs_full = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="no /dev/full here, the disk that is always full"
)


@needs_full
def test_a_full_disk_at_a_checkpoint_leaves_the_last_one(config, monkeypatch):
    good = interrupted(config, monkeypatch)
    beside = Path(config.folder) / ".checkpoint.pt.partial"
    beside.symlink_to("/dev/full")
    with pytest.raises(pretraining.TrainingError) as caught:
        pretraining.pretrain(config, resume=True)
    assert "checkpoint.pt could not be written" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert "The checkpoint of step 8 in" in str(caught.value)
    assert checkpoint_of(config) == good
    assert not beside.is_symlink()  # what half was written is gone
    assert pretraining.pretrain(config, resume=True).finished


@needs_full
def test_a_full_disk_at_the_log_leaves_the_checkpoint(config, monkeypatch):
    good = interrupted(config, monkeypatch)
    log, step = Path(config.folder) / "log.jsonl", pretraining.Run.step

    def fill(run):
        if run.steps == 9:
            log.unlink()
            log.symlink_to("/dev/full")
        return step(run)

    monkeypatch.setattr(pretraining.Run, "step", fill)
    with pytest.raises(pretraining.TrainingError, match="No space left.*\n.*step 8"):
        pretraining.pretrain(config, resume=True)
    assert checkpoint_of(config) == good


@needs_full
def test_a_full_disk_while_tokenising_stops_the_run(config):
    folder = Path(config.folder) / "train" / "two"
    folder.mkdir(parents=True)
    (folder / ".00000.tokens.partial").symlink_to("/dev/full")
    with pytest.raises(pretraining.TrainingError, match="No space left on device"):
        pretraining.pretrain(config)
    assert not (Path(config.folder) / "checkpoint.pt").exists()
    assert pretraining.pretrain(config).finished  # begins the data again


def test_a_folder_that_cannot_be_made_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.folder = str(tmp_path / "file" / "run")
    with pytest.raises(OSError, match="file"):
        pretraining.pretrain(config)


def test_an_unwritable_folder_is_named(config, monkeypatch):
    Path(config.folder).mkdir(mode=0o555)
    monkeypatch.chdir(Path(config.folder).parent)  # whose own parents may be closed to others
    os.chmod(".", 0o755)
    config.folder = "run"
    unwritable = pytest.raises(pretraining.TrainingError, match="run cannot be written")
    with without_rights_of_root(), unwritable:
        pretraining.pretrain(config)


@contextmanager
def without_rights_of_root():
    """Root may write anywhere; nobody may not."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_two_processes_do_not_train_in_one_folder(config):
    Path(config.folder).mkdir()
    in_use = pytest.raises(OSError, match="in use by another process")
    with pretraining.claiming(Path(config.folder)), in_use:
        pretraining.pretrain(config)


def test_a_run_is_not_overwritten(config, monkeypatch):
    good = interrupted(config, monkeypatch)
    with pytest.raises(ConfigError, match="a run in this folder.*--resume"):
        pretraining.pretrain(config)
    assert checkpoint_of(config) == good


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed 1; expected seed 0"),
        ({"model": {"hidden_size": 64} | {}}, "model"),
        ({"max_sequence_length": 16}, "max_sequence_length 16"),
        ({"corpora": {"one": 2, "two": 2}}, "corpora"),
        ({"vocab_size": 290}, "vocab_size 290; expected vocab_size 300"),
        ({"optimizer": "AdamW"}, 'optimizer "AdamW"'),
    ],
)
def test_a_recipe_that_does_not_fit_the_checkpoint_is_refused(config, monkeypatch, changes, said):
    good = interrupted(config, monkeypatch)
    recipe = (Path(config.folder) / "recipe.json").read_bytes()
    if "model" in changes:
        changes = {"model": TINY | {"intermediate_size": 64}}
    with pytest.raises(ConfigError) as caught:
        pretraining.pretrain(replace(config, **changes), resume=True)
    assert said in str(caught.value) and "as in this folder" in str(caught.value)
    assert checkpoint_of(config) == good
    assert (Path(config.folder) / "recipe.json").read_bytes() == recipe  # what the run was made by


def test_a_stable_run_can_be_prolonged(config, monkeypatch):
    interrupted(config, monkeypatch)
    longer = replace(config, training_tokens=60 * 512)
    assert pretraining.pretrain(longer, resume=True).steps > 50


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda _: b"x" * 99]
)
def test_a_damaged_checkpoint_is_named(config, monkeypatch, damage):
    path = Path(config.folder) / "checkpoint.pt"
    path_bytes = interrupted(config, monkeypatch)
    path.write_bytes(damage(path_bytes))
    with pytest.raises(ConfigError, match="checkpoint.pt: found no checkpoint"):
        pretraining.pretrain(config, resume=True)


def test_changed_shards_are_refused(config, monkeypatch):
    interrupted(config, monkeypatch)
    path = Path(config.folder) / "train" / "one" / "00000.tokens"
    raw = bytearray(path.read_bytes())
    raw[10] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match="00000.tokens: found sha256"):
        pretraining.pretrain(config, resume=True)


@pytest.mark.parametrize(
    ("documents", "said"),
    [((), "no text"), (("", ""), "no text"), (("a b c",), "nothing held out")],
)
def test_an_empty_corpus_is_named(config, monkeypatch, documents, said):
    monkeypatch.setattr(
        pretraining, "load_corpus", lambda name, config: data.Corpus(name, documents, "", "")
    )
    with pytest.raises(ConfigError, match=said):
        pretraining.pretrain(config)
    assert not (Path(config.folder) / "checkpoint.pt").exists()


def test_text_that_cannot_be_read_is_named(config, monkeypatch):
    """The text is at fault, not the run's folder."""

    def closed(name, config):
        raise PermissionError(13, "Permission denied", "mine/a.txt")

    monkeypatch.setattr(pretraining, "load_corpus", closed)
    with pytest.raises(PermissionError, match="mine/a.txt"):
        pretraining.pretrain(config)


def test_a_missing_corpus_says_what_there_is(config, monkeypatch):
    monkeypatch.undo()
    config.corpora = {"no/such/folder": 1}
    with pytest.raises(data.CorpusNotFoundError, match="vital-articles.*does not exist"):
        pretraining.pretrain(config)


# --- log, plot, data ----------------------------------------------------------------------


def test_half_a_line_of_the_log_is_dropped(config, monkeypatch):
    interrupted(config, monkeypatch)
    path = Path(config.folder) / "log.jsonl"
    with path.open("a") as file:
        file.write('{"event": "tra')
    assert pretraining.read_log(config.folder)[-1]["event"] == "train"
    pretraining.pretrain(config, resume=True)
    assert [json.loads(line) for line in path.read_text().splitlines()][-1]["event"] == "end"


def test_the_end_leaves_a_plot_and_the_recipe(config):
    pretraining.pretrain(config)
    folder = Path(config.folder)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (
        pretraining.PretrainingConfig.from_dict(json.loads((folder / "recipe.json").read_text()))
        == config
    )
    assert not [p.name for p in folder.iterdir() if "partial" in p.name]


def test_tensorboard_gets_the_numbers_where_it_is_installed(config, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append(str(folder))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(pretraining.importlib.util, "find_spec", lambda name: name == "tensorboard")
    pretraining.pretrain(config)
    line = events(config, "train")[0]
    assert ("train/loss", line["loss"], line["step"]) in written
    line = events(config, "evaluation")[-1]
    assert ("evaluation/loss", line["held_out"]["all"]["loss"], line["step"]) in written
    assert ("evaluation/top1", line["held_out"]["all"]["top1"], line["step"]) in written
    assert written[0].endswith("tensorboard") and written[-1] == "closed"


def test_a_bar_shows_loss_speed_and_the_time_left(config, capsys, monkeypatch):
    import tqdm

    class Loud(tqdm.tqdm):
        def __init__(self, *args, disable, **settings):
            super().__init__(*args, disable=disable is True, mininterval=0, **settings)

    monkeypatch.setattr(tqdm, "tqdm", Loud)
    pretraining.pretrain(config, progress=True)
    shown = capsys.readouterr().err
    assert "tok/s" in shown and "loss=" in shown and "<00:0" in shown


def test_tokens_are_counted_exactly(config, monkeypatch):
    """What the log counts is what went through the model."""
    through = []
    forward = ModernBertForMaskedLM.forward

    def counted(model, input_ids=None, **more):
        through.append(len(input_ids) if model.training else 0)
        return forward(model, input_ids, **more)

    monkeypatch.setattr(ModernBertForMaskedLM, "forward", counted)
    run = pretraining.pretrain(replace(config, microbatch_tokens=256))
    assert sum(through) == run.tokens == events(config, "end")[0]["tokens"]


def test_nothing_held_out_is_in_the_training_shards(config):
    training_data = fresh_data(config)
    for name in config.corpora:
        (train,), (held_out,) = training_data.train[name], training_data.held_out[name]
        assert 10 < len(held_out) < 80
        assert not {tuple(d) for d in train} & {tuple(d) for d in held_out}
        assert len(train) + len(held_out) == len(EASY_TEXTS)


def test_a_corpus_streams_through(config, monkeypatch):
    """Of 20,000 documents, no more than a few batches of the tokenizer are alive at once."""

    class Document(str):
        """A text that can be watched."""

    alive, most = weakref.WeakSet(), 0

    class Corpus:
        def __iter__(self):
            nonlocal most
            for i in range(20_000):
                document = Document(f"{TEXTS[i % len(TEXTS)]} {i}")
                alive.add(document)
                most = max(most, len(alive))
                yield document

    monkeypatch.setattr(
        pretraining, "load_corpus", lambda name, config: data.Corpus(name, Corpus(), "", "CC0")
    )
    config.corpora = {"one": 1}
    (about,) = json.loads((prepare(config) / "corpora.json").read_text())["corpora"]
    assert about["documents"] == 20_000 and 500 < most < 5_000


def prepare(config) -> Path:
    fresh_data(config)
    return Path(config.folder)


def test_data_is_prepared_once(config, monkeypatch):
    first = fresh_data(config)
    monkeypatch.setattr(pretraining, "load_corpus", None)
    second = fresh_data(config)
    assert first.train["one"][0].sha256 == second.train["one"][0].sha256


def test_a_finished_tokenizer_is_used_as_it_is(config, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config.tokenizer = str(tmp_path / "tokenizer")
    training_data = fresh_data(config)
    assert training_data.tokenizer.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
    assert pretraining.Run(config, training_data).model.config.vocab_size == len(tokenizer)


def test_your_own_text_is_a_corpus(config, monkeypatch, tmp_path):
    monkeypatch.undo()
    (tmp_path / "mine").mkdir()
    lines = (json.dumps({"text": text}) for text in EASY_TEXTS)
    (tmp_path / "mine" / "a.jsonl").write_text("\n".join(lines))
    config.corpora = {str(tmp_path / "mine"): 1}
    assert pretraining.pretrain(config).finished
    (about,) = events(config, "start")[0]["corpora"]
    assert about["name"] == "mine" and about["documents"] == len(EASY_TEXTS)
    assert about["train_tokens"] + about["held_out_tokens"] > 1000


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
    assert facts["began_with"] is None and "pre-trained from scratch" in card
    assert facts["cloze"]["facts"] == 50 and facts["unigram_cloze"]["facts"] == 50
    lacking = 50 - facts["cloze"]["answerable"]
    assert f"{lacking} have no such word in this vocabulary" in card
    assert f"| out | {facts['cloze']['top1']:.0%} | {facts['cloze']['top5']:.0%} |" in card
    assert "intermediate" not in card
    assert (target / "loss.png").stat().st_size > 1000
    for text in (card, json.dumps(facts)):
        assert str(tmp_path) not in text and os.sep + "usr" not in text


def test_a_run_that_goes_on_says_with_what_it_began(config, tmp_path):
    first = pretraining.pretrain(config)
    pretraining.export(config.folder, tmp_path / "first")
    before = json.loads((tmp_path / "first" / "training.json").read_text())
    folder, start = str(tmp_path / "second"), str(tmp_path / "first")
    second = replace(config, folder=folder, model={}, tokenizer=start, initialize_from=start)
    second.learning_rate = 1e-3
    tokens = pretraining.pretrain(second).tokens
    pretraining.export(folder, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    began_with, scores = facts["began_with"], facts["began_with"]["scores"]
    assert (began_with["name"], began_with["recipe"]) == ("first", before["recipe"])
    assert (began_with["tokens"], facts["tokens"]) == (first.tokens, tokens)
    for corpus, score in before["held_out"].items():
        assert scores["held_out"][corpus] == pytest.approx(score)
    assert scores["cloze"] == before["cloze"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Begun with the weights of first" in card and "first, which it began with" in card
    assert f"trained on {first.tokens / 1e6:.1f} million tokens" in card
    assert "from scratch" not in card and str(tmp_path) not in json.dumps(facts) + card


def test_the_card_counts_guesses_that_repeat_the_sentence():
    def answer(sentence, guess, right_at=None):
        return {"sentence": sentence, "guesses": [[guess, 0.5]], "right_at": right_at}

    answers = [
        answer("Water is [MASK].", "water"),
        answer("Water is [MASK].", "wet", 1),
        answer("Water is [MASK].", "ate"),
        answer("A mask is a [MASK].", "MASK"),
        answer("Ice is [MASK].", "mask", 3),
    ]
    cloze = {"facts": 5, "top5": 2 / 5, "answers": answers}
    (line,) = model_card.cloze_limits({"cloze": cloze})
    assert "Of 5 everyday facts it has 2" in line
    assert "Of its 4 wrong first guesses, 2 repeat" in line
    assert model_card.cloze_limits({}) == []


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
    assert facts["recipe"] == {"seed": 0}


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
    shards = to_shards(held_out, tokenizer, tmp_path)
    phase = pretraining.PretrainingConfig(**recipe | {"folder": ""}).columns()[0]
    batches = pretraining.PackedBatches(
        shards,
        tokenizer,
        tokens_per_batch=pretraining.stream_tokens(phase),
        max_length=phase.max_sequence_length,
    )
    model = ModernBertForMaskedLM.from_pretrained("mini", sparse_prediction=True)
    found = pretraining.evaluate(model, pretraining.fixed_masks(batches.one_epoch(), tokenizer))
    expected = mini_facts["held_out"]["vital-articles"]
    assert found["positions"] == expected["positions"]
    assert found["loss"] == pytest.approx(expected["loss"], abs=2e-3)
    assert found["top1"] == pytest.approx(expected["top1"], abs=2e-3)


# --- what the chapter shows -----------------------------------------------------------------


def test_the_recorded_way_from_own_text_is_the_one_that_the_tool_goes(root):
    from tools.own_text import COMMANDS

    record = json.loads(
        (root / "modernbert_mini" / "recorded" / "own_text.json").read_text("utf-8")
    )
    assert [s["command"] for s in record["steps"]] == [f"modernbert-mini {c}" for c in COMMANDS]
    assert all(step["output"] for step in record["steps"])
    (first, before), *_, (last, after) = record["held_out"]
    recipe = pretraining.PretrainingConfig.from_file("own-text")
    assert first == 0 and 0 <= recipe.training_tokens - last < recipe.batch_tokens
    assert after < before < record["unigram_loss"]


def test_the_recorded_context_extension_compares_what_it_says(root):
    path = root / "modernbert_mini" / "recorded" / "context_extension.json"
    record = json.loads(path.read_text("utf-8"))
    shipped, larger, *trained = record["scores"].values()
    assert shipped["tokens"] == larger["tokens"] == 0
    assert [*record["scores"]][2:] == [*record["ways"]]
    lengths = {*map(int, shipped["by_length"])}
    assert record["recipe"]["max_sequence_length"] == min(lengths)
    assert {w.get("max_sequence_length") for w in record["ways"].values()} == {max(lengths), None}
    thetas = [score["global_rope_theta"] for score in record["scores"].values()]
    assert thetas[1] == thetas[2] == 16 * thetas[0] and thetas[3] == thetas[4] == thetas[0]
    for score in record["scores"].values():
        assert len(score["by_position"]) * record["bin"] == max(lengths)
        assert min(score["hidden_tokens"].values()) > 2000
    assert all(score["tokens"] > 100_000 for score in trained)
