"""The tools of chapter 16 measure what they say, and leave the model as it was."""

import math
import re

import pytest
import torch
from tools.shapes import Tracer
from torch.nn import functional as F

from modernbert_mini import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    Tokenizer,
    inspection,
)

B, L, H, D, V = 3, 23, 5, 6, 101  # noqa: E741
LENGTHS = [23, 14, 9]


@pytest.fixture(scope="module")
def model() -> ModernBertForMaskedLM:
    torch.manual_seed(0)
    config = ModernBertConfig.from_dict(
        {
            "model_type": "modernbert",
            "vocab_size": V,
            "hidden_size": H * D,
            "intermediate_size": 17,
            "num_hidden_layers": 4,
            "num_attention_heads": H,
            "global_attn_every_n_layers": 3,
            "local_attention": 8,
            "pad_token_id": 0,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,  # large, so that every part shows in the output
        }
    )
    model = ModernBertForMaskedLM(config).eval()
    with torch.no_grad():  # norms and biases that do something
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = (torch.arange(L) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": torch.randint(1, V, (B, L)) * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def packed(batch) -> dict[str, torch.Tensor]:
    real = batch["attention_mask"].bool()
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return {"input_ids": batch["input_ids"][real], "cu_seqlens": bounds}


@pytest.fixture(scope="module")
def labels(batch) -> torch.Tensor:
    hidden = (torch.rand(B, L, generator=torch.Generator().manual_seed(2)) < 0.4) & batch[
        "attention_mask"
    ].bool()
    return torch.where(hidden, batch["input_ids"], -100)


def hooks(model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def same(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- where attention goes ----


def distance(weights, tokens=None):
    length = weights.shape[-1]
    tokens = torch.ones(len(weights), length, dtype=torch.bool) if tokens is None else tokens
    return inspection.distance_profile(weights, tokens) @ torch.arange(length).float()


def test_who_looks_at_oneself_looks_no_distance():
    assert distance(torch.eye(L).expand(2, 1, L, L)).item() == 0


@pytest.mark.parametrize("step", [1, -4])
def test_who_looks_so_many_places_away_looks_that_far(step):
    weights = torch.eye(L).roll(step, 0)[None, None]
    # Those at the edge wrap around, so look at the profile and not at its mean.
    profile = inspection.distance_profile(weights, torch.ones(1, L))[0]
    assert profile[abs(step)] == pytest.approx((L - abs(step)) / L)


def test_uniform_attention_has_the_distance_of_the_formula():
    everyone = torch.ones(2, L, dtype=torch.bool)
    weights = inspection.uniform_attention(everyone)
    same(weights.sum(-1), torch.ones(2, 1, L))
    assert distance(weights).item() == pytest.approx((L * L - 1) / (3 * L))
    near = inspection.uniform_attention(everyone, 2)[0, 0]
    assert near[10].nonzero().flatten().tolist() == [8, 9, 10, 11, 12]
    assert near[0].nonzero().flatten().tolist() == [0, 1, 2]


def test_each_row_of_a_profile_sums_to_one(model, batch):
    attentions = model.model(**batch, output_attentions=True).attentions
    for kind, weights in zip(model.config.layer_types, attentions, strict=True):
        profile = inspection.distance_profile(weights, batch["attention_mask"])
        assert profile.shape == (H, L)
        same(profile.sum(-1), torch.ones(H))
        if kind == "sliding_attention":
            assert not profile[:, model.config.half_window + 1 :].any()
        else:
            assert profile[:, model.config.half_window + 1 :].all()


def test_padding_takes_no_part_in_a_profile(model, batch):
    alone = []
    for ids, length in zip(batch["input_ids"], LENGTHS, strict=True):
        weights = model.model(ids[None, :length], output_attentions=True).attentions[0]
        profile = inspection.distance_profile(weights, torch.ones(1, length))
        alone.append(F.pad(profile, (0, L - length)) * length)
    weights = model.model(**batch, output_attentions=True).attentions[0]
    together = inspection.distance_profile(weights, batch["attention_mask"])
    same(together, sum(alone) / sum(LENGTHS))


def test_tokens_that_do_not_count_can_hold_anything():
    weights = torch.rand(1, 2, L, L)
    tokens = torch.ones(1, L, dtype=torch.bool)
    tokens[0, [0, 7, L - 1]] = False
    other = weights.clone()
    other[..., ~tokens[0]] = torch.rand(3)
    other[:, :, ~tokens[0]] = torch.rand(3, L)
    same(inspection.distance_profile(weights, tokens), inspection.distance_profile(other, tokens))


def test_each_query_counts_the_same_however_little_it_gives_to_the_tokens_that_count():
    weights = torch.tensor([[0.9, 0.1, 0, 0], [0, 0.5, 0, 0.5], [0, 0.2, 0.8, 0], [0, 0, 0, 1.0]])
    tokens = torch.tensor([[False, True, True, True]])  # query 1 … 3, each a third
    profile = inspection.distance_profile(weights[None, None], tokens)[0]
    same(profile, torch.tensor([0.5 + 0.8 + 1, 0.2, 0.5, 0]) / 3)
    weights[1] = torch.tensor([0.98, 0.01, 0, 0.01])
    same(inspection.distance_profile(weights[None, None], tokens)[0], profile)


def test_value_norms_are_the_lengths_of_what_a_head_writes(model):
    layer = model.model.layers[1]
    x = torch.randn(7, 1, H * D)  # seven texts of one token: each looks at itself alone
    found = inspection.value_norms(layer, x)
    assert found.shape == (7, H, 1)
    caught = []
    with torch.no_grad(), layer.attn.register_forward_hook(lambda m, i, out: caught.append(out[0])):
        for head in range(H):
            others = [(1, h) for h in range(H) if h != head]
            with inspection.ablated_heads(model, others):
                inputs = torch.ones(1, 1), torch.zeros(1, 1)
                layer(x, *inputs, lambda q, k, v, dropout: (v, None))
    same(found[..., 0].T, torch.stack(caught).norm(dim=-1)[..., 0])


# ---- the residual stream ----


def test_the_stream_is_the_hidden_states_before_the_final_norm(model, batch):
    stream = inspection.residual_stream(model, **batch)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True, keep_padded=True).hidden_states
    assert stream.shape == (5, B, L, H * D)
    same(stream[:-1], torch.stack(hidden[:-1]), atol=0)
    assert (stream[-1] - hidden[-1]).abs().max() > 0.1
    same(model.model.final_norm(stream[-1]), hidden[-1], atol=0)
    assert hooks(model) == 0


def test_the_stream_of_a_bare_encoder_and_of_a_packed_batch_are_the_same(model, batch, packed):
    stream = inspection.residual_stream(model, **batch)
    same(inspection.residual_stream(model.model, **batch), stream, atol=0)
    real = batch["attention_mask"].bool()
    same(inspection.residual_stream(model, **packed), stream[:, real])


def test_the_lens_on_the_last_state_is_the_model(model, batch):
    stream = inspection.residual_stream(model, **batch)
    expected = logits(model, batch | {"keep_padded": True})
    same(inspection.logit_lens(model, stream[-1]), expected, atol=0)
    assert inspection.logit_lens(model, stream).shape == (5, B, L, V)


def test_hooks_go_when_the_model_refuses_its_input(model):
    for tool in (inspection.residual_stream, inspection.head_means):
        with pytest.raises(ValueError, match="input_ids"):
            tool(model, **({} if tool is inspection.residual_stream else {"tokens": None}))
        assert hooks(model) == 0


def test_rank_counts_what_is_likelier():
    scores = torch.randn(4, 9, V)
    order = scores.argsort(dim=-1, descending=True)
    assert torch.equal(inspection.token_rank(scores, order[..., 0]), torch.zeros(4, 9).long())
    assert (inspection.token_rank(scores, order[..., 37]) == 37).all()
    assert inspection.token_rank(torch.zeros(1, V), torch.tensor([5])).item() == 0


# ---- probes ----


def test_ridge_finds_a_linear_map():
    x, weight, offset = torch.randn(80, 7) + 3, torch.randn(7, 2), torch.randn(2)
    found = inspection.fit_ridge(x, x @ weight + offset, penalty=1e-12)
    new = torch.randn(5, 7)
    same(found(new).float(), new @ weight + offset)


def test_ridge_is_the_least_of_its_loss():
    x, y, penalty = torch.randn(50, 6).double(), torch.randn(50, 1).double(), 0.3
    centred, aim = x - x.mean(0), y - y.mean(0)
    weight = inspection.fit_ridge(x, y, penalty).weight
    strength = penalty * centred.square().sum(-1).mean()

    def loss(w):
        return (centred @ w - aim).square().sum() + strength * w.square().sum()

    (slope,) = torch.autograd.grad(loss(weight.requires_grad_()), weight)
    assert slope.abs().max() < 1e-9


@pytest.mark.parametrize("rows", [11, 40])
def test_both_ways_to_solve_agree(rows):
    # Features that are all zero change nothing, but for the system that is solved.
    x, y, new = torch.randn(rows, 20), torch.randn(rows, 3), torch.randn(4, 20)
    wide = inspection.fit_ridge(F.pad(x, (0, 60)), y)
    same(inspection.fit_ridge(x, y)(new), wide(F.pad(new, (0, 60))), atol=1e-9)


def test_ridge_does_not_mind_scale_or_place():
    x, y, new = torch.randn(30, 8), torch.randn(30, 2), torch.randn(5, 8)
    moved = inspection.fit_ridge(1000 * x + 7, y)
    same(inspection.fit_ridge(x, y)(new), moved(1000 * new + 7), atol=1e-4)


def test_features_that_never_vary_predict_the_mean():
    y = torch.randn(30, 2)
    found = inspection.fit_ridge(torch.full((30, 4), 0.1), y)
    same(found(torch.full((1, 4), 0.1))[0].float(), y.mean(0))


def test_a_probe_separates_what_is_separable():
    labels = torch.arange(200) % 4
    features = 5 * torch.eye(4)[labels] + 0.1 * torch.randn(200, 4)
    assert inspection.probe_accuracy(features, labels, seed=0) == (1, 1)


def test_on_shuffled_labels_a_probe_is_at_chance_and_may_still_memorise():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 500, generator=generator)
    labels = torch.randint(5, (400,), generator=generator)
    scores = torch.tensor([inspection.probe_accuracy(features, labels, s) for s in range(8)])
    test, train = scores.mean(0).tolist()
    assert abs(test - 0.2) < 3 * math.sqrt(0.2 * 0.8 / 400)
    assert train == 1


def test_a_split_is_decided_by_its_seed():
    features, labels = torch.randn(60, 5), torch.randint(3, (60,))
    scores = [inspection.probe_accuracy(features, labels, seed) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


# ---- ablations ----


def test_the_mean_of_the_masked_losses_is_the_loss(model, batch, packed, labels):
    losses = inspection.masked_losses(model, labels, **batch)
    assert losses.shape == ((labels != -100).sum(),)
    with torch.no_grad():
        same(losses.mean(), model(**batch, labels=labels).loss)
    real = batch["attention_mask"].bool()
    same(inspection.masked_losses(model, labels[real], **packed), losses)


def test_ablating_no_head_changes_nothing(model, batch):
    before = logits(model, batch)
    with inspection.ablated_heads(model, []):
        same(logits(model, batch), before, atol=0)


@pytest.mark.parametrize("heads", [[(0, 0)], [(1, 4), (1, 2)], [(3, 1), (0, 3)]])
def test_ablating_heads_is_zeroing_their_columns_of_the_output_matrix(model, batch, heads):
    before = logits(model, batch)
    with inspection.ablated_heads(model, heads):
        inside = logits(model, batch)
    same(logits(model, batch), before, atol=0)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for layer, head in heads:
            model.model.layers[layer].attn.Wo.weight[:, head * D : (head + 1) * D] = 0
        same(inside, logits(model, batch))
        model.load_state_dict(kept, strict=False)
    assert (inside - before).abs().max() > 0.01
    assert hooks(model) == 0


def test_ablation_is_the_same_on_both_backends_and_packed(model, batch, packed):
    real, found = batch["attention_mask"].bool(), []
    with inspection.ablated_heads(model, [(0, 1), (2, 3)]):
        for name in ("eager", "sdpa"):
            model.attn_implementation = name
            found += [logits(model, batch)[real], logits(model, packed)]
    model.attn_implementation = "auto"
    for other in found[1:]:
        same(other, found[0])


def test_ablation_changes_no_tensor_that_somebody_else_holds(model, batch):
    held = []
    wo = model.model.layers[1].attn.Wo
    with (
        wo.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0])),
        inspection.ablated_heads(model, [(1, 2)]),
    ):
        logits(model, batch)
    assert held[0][:, 2 * D : 3 * D].abs().min() > 0


def test_heads_come_back_after_an_error(model, batch):
    before = logits(model, batch)
    with pytest.raises(KeyError), inspection.ablated_heads(model, [(1, 1)]):
        raise KeyError
    same(logits(model, batch), before, atol=0)


def test_all_heads_off_leaves_tokens_that_know_nothing_of_each_other(model, batch):
    everything = [(layer, head) for layer in range(4) for head in range(H)]
    ids = batch["input_ids"][:1]
    with inspection.ablated_heads(model, everything):
        same(logits(model, {"input_ids": ids.flip(1)}), logits(model, {"input_ids": ids}).flip(1))


@pytest.mark.parametrize("head", [(4, 0), (0, H), (-1, 0), (0, -1)])
def test_a_head_that_does_not_exist_is_refused(model, head):
    context = inspection.ablated_heads(model, [head])
    with pytest.raises(ValueError, match="4 layers of 5"), context:
        pass


def test_a_head_that_gives_its_mean_gives_what_it_gave_where_there_is_one_token(model):
    one = {"input_ids": torch.tensor([[7]])}
    means = inspection.head_means(model, torch.ones(1, 1), **one)
    assert means.shape == (4, H, D)
    before = logits(model, one)
    with inspection.ablated_heads(model, [(0, 2), (3, 0)], means):
        same(logits(model, one), before)
    with inspection.ablated_heads(model, [(0, 2), (3, 0)]):
        assert (logits(model, one) - before).abs().max() > 0.01


def test_head_means_are_over_the_tokens_named(model, batch):
    mask = batch["attention_mask"]
    whole = inspection.head_means(model, mask, **batch)
    parts = [
        inspection.head_means(model, torch.ones(1, n), input_ids=ids[None, :n]) * n
        for ids, n in zip(batch["input_ids"], LENGTHS, strict=True)
    ]
    same(whole, sum(parts) / sum(LENGTHS))


def test_a_window_of_its_own_width_changes_nothing(model, batch):
    before = logits(model, batch)
    with inspection.narrowed_window(model, model.config.half_window):
        same(logits(model, batch), before, atol=0)
    with inspection.narrowed_window(model, 1):
        assert (logits(model, batch) - before).abs().max() > 0.01
    same(logits(model, batch), before, atol=0)
    assert model.config.local_attention == 8


def test_in_a_window_of_nothing_local_layers_see_the_token_itself(model, batch):
    with inspection.narrowed_window(model, 0):
        attentions = model.model(**batch, output_attentions=True).attentions
    for kind, weights in zip(model.config.layer_types, attentions, strict=True):
        profile = inspection.distance_profile(weights, batch["attention_mask"])
        assert (profile[:, 0] == 1).all() == (kind == "sliding_attention")


def test_the_window_comes_back_after_an_error(model):
    with pytest.raises(KeyError), inspection.narrowed_window(model, 1):
        raise KeyError
    assert model.config.local_attention == 8
    with pytest.raises(ValueError, match="0 or more"), inspection.narrowed_window(model, -1):
        pass


def test_the_standard_error_of_single_texts_is_the_usual_one():
    values = torch.randn(50)
    found = inspection.standard_error(values, torch.arange(50).flip(0))
    assert found == pytest.approx((values.std(correction=0) / 50**0.5).item())


def test_copies_of_a_token_in_the_same_text_add_no_certainty():
    values, texts = torch.randn(50), torch.arange(50) // 3
    found = inspection.standard_error(values, texts)
    again = inspection.standard_error(values.repeat(4), texts.repeat(4))
    assert again == pytest.approx(found)
    assert inspection.standard_error(values.repeat(4), torch.arange(200)) < found


def test_the_standard_error_is_the_spread_over_draws_of_texts():
    generator, means, errors = torch.Generator().manual_seed(0), [], []
    for _ in range(400):
        shift = torch.randn(30, generator=generator)
        texts = torch.arange(30).repeat_interleave(8)
        values = shift[texts] + torch.randn(240, generator=generator)
        means.append(values.mean())
        errors.append(inspection.standard_error(values, texts))
    spread = torch.stack(means).std().item()
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.1)


# ---- vectors as arrows ----


def test_rank_correlation_sees_order_alone():
    x = torch.randn(40)
    assert inspection.rank_correlation(x, x.exp()) == pytest.approx(1)
    assert inspection.rank_correlation(x, -(x**3)) == pytest.approx(-1)
    assert abs(inspection.rank_correlation(x, x[torch.randperm(40)])) < 0.7


def test_equal_values_share_their_rank():
    a, b = torch.tensor([1.0, 1, 2, 3]), torch.tensor([4.0, 3, 2, 1])
    # Ranks 1.5 1.5 3 4 and 4 3 2 1: covariance −4.5, variances 4.5 and 5.
    assert inspection.rank_correlation(a, b) == pytest.approx(-4.5 / math.sqrt(4.5 * 5))
    assert inspection.rank_correlation(a[[1, 0, 2, 3]], b) == pytest.approx(-4.5 / 22.5**0.5)


def test_mean_cosine_of_pairs():
    x = torch.randn(12, 5)
    pairs = F.cosine_similarity(x[:, None], x, dim=-1)[~torch.eye(12, dtype=torch.bool)]
    assert inspection.mean_cosine(x) == pytest.approx(pairs.mean().item(), abs=1e-6)
    assert inspection.mean_cosine(torch.ones(4, 3)) == pytest.approx(1)
    assert inspection.mean_cosine(torch.eye(6)) == pytest.approx(0)
    assert inspection.mean_cosine(torch.tensor([[1.0], [-2.0]])) == pytest.approx(-1)


def test_nearest_leaves_the_row_itself_out():
    x = torch.randn(20, 4)
    x[7] = 3 * x[2] + 0.01
    cosine, rows = inspection.nearest(x, 2, 3)
    assert rows[0] == 7 and 2 not in rows
    assert cosine[0] > cosine[1] > cosine[2]
    same(cosine, F.cosine_similarity(x[rows], x[2], dim=-1))


# ---- the table ----


@pytest.fixture(scope="module")
def mini():
    model = ModernBertForMaskedLM.from_pretrained("mini").eval()
    return model, Tokenizer.from_pretrained("mini")


def test_the_last_row_of_a_lens_table_is_what_the_model_says(mini):
    model, tokenizer = mini
    text = "The river flows into the [MASK]."
    table = inspection.lens_table(model, tokenizer, text)
    batch = tokenizer(text, return_tensors="pt")
    best = logits(model, batch)[0].softmax(-1).topk(5)
    assert len(table.guesses) == model.config.num_hidden_layers + 1
    for place, row in enumerate(table.guesses[-1]):
        assert [token for token, _ in row] == [tokenizer.decode([i]) for i in best.indices[place]]
        assert [p for _, p in row] == pytest.approx(best.values[place].tolist(), abs=1e-6)
    assert "[MASK]" in table.tokens and "␣river" in repr(table)
    assert len(repr(table).splitlines()) == model.config.num_hidden_layers + 2


def test_a_lens_table_is_html_that_needs_nothing(mini):
    table = inspection.lens_table(*mini, "a < b & c [MASK]")
    page, again = table._repr_html_(), table._repr_html_()
    assert not re.search(r"<script|https?:|@import|url\(", page)
    assert "&lt;" in page and "&amp;" in page
    assert not re.findall(r"[<>]", re.sub(r"<style>.*?</style>|<[^<>]+>", "", page))
    (one,), (other,) = (set(re.findall(r'id="(\w+)"', p)) for p in (page, again))
    assert one != other
    assert page.count('tabindex="0"') == len(table.tokens) * len(table.guesses)
    shades = [float(shade) for shade in re.findall(r"rgba\(0,114,178,([\d.]+)\)", page)]
    asked = table.hidden * len(table.guesses)
    assert sum(table.hidden) == 1 and all(
        s <= 0.15 for s, a in zip(shades, asked, strict=True) if not a
    )


# ---- other models, shape comments ----


def test_the_tools_work_on_the_models_of_transformers(model, batch, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model.save_pretrained(tmp_path)
    theirs = transformers.ModernBertForMaskedLM.from_pretrained(
        tmp_path, attn_implementation="sdpa"
    ).eval()
    real = batch["attention_mask"].bool()
    stream = inspection.residual_stream(theirs, **batch)
    same(stream[:, real], inspection.residual_stream(model, **batch)[:, real], atol=2e-5)
    same(inspection.logit_lens(theirs, stream[2]), inspection.logit_lens(model, stream[2]))
    heads = [(1, 0), (2, 4)]
    means = inspection.head_means(model, real, **batch)
    same(inspection.head_means(theirs, real, **batch), means)
    with (
        inspection.ablated_heads(theirs, heads, means),
        inspection.ablated_heads(model, heads, means),
    ):
        same(logits(theirs, batch)[real], logits(model, batch)[real], atol=2e-5)


def test_every_shape_comment_is_true_and_reached(model, batch, packed, labels):
    tracer = Tracer([inspection])
    many = {"L": {L, L * L, sum(LENGTHS)}, "B": {B}, "H": {H}, "D": {D}, "C": {H * D}, "V": {V}}
    many |= {"M": {int((labels != -100).sum())}, "N": {200}, "layers": {4}, "texts": {B}}
    texts = torch.arange(B)[:, None].expand(B, L)[labels != -100]
    attentions = model.model(**batch, output_attentions=True).attentions
    with tracer.at(many):
        inspection.distance_profile(attentions[0], batch["attention_mask"])
        inspection.uniform_attention(batch["attention_mask"], 2)
        stream = inspection.residual_stream(model, **batch)
        inspection.value_norms(model.model.layers[1], stream[1])
        losses = inspection.masked_losses(model, labels, **batch)
        inspection.standard_error(losses, texts)
        inspection.head_means(model, batch["attention_mask"], **batch)
        with inspection.ablated_heads(model, [(1, 1)]):
            logits(model, batch)
        inspection.nearest(torch.randn(200, H * D), 3, 2)
    assert not tracer.failures, "\n".join(tracer.failures)
    assert not tracer.unreached(), "never run: " + "\n".join(tracer.unreached())


def test_a_bare_encoder_is_its_own():
    config = ModernBertConfig.from_dict(
        {"model_type": "modernbert", "vocab_size": 9}
        | {
            "hidden_size": 8,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "pad_token_id": 0,
            "num_hidden_layers": 1,
        }
    )
    bare = ModernBertModel(config)
    assert inspection.encoder_of(bare) is bare
    headed = ModernBertForMaskedLM(config)
    assert inspection.encoder_of(headed) is headed.model
