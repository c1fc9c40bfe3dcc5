import warnings

import pytest
import torch
from parity import BASE, VARIANTS, make_batch, make_pair

from modernbert_mini.config import ConfigError, ModernBertConfig
from modernbert_mini.model import CHUNK, ModernBertModel, in_chunks, initial_std
from modernbert_mini.unpadding import join, pack_sequences

LENGTHS = (1, 200, 37, 64, 2, 129)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ModernBertModel(ModernBertConfig(**BASE)).eval()


def pack(batch):
    """The packed stream of a padded batch: what ``forward`` takes in its place."""
    real = batch["attention_mask"].bool()
    lengths = real.sum(-1)
    return {
        "input_ids": batch["input_ids"][real],
        "cu_seqlens": torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))),
        "max_seqlen": int(lengths.max()),
    }


# ---- properties


@pytest.mark.parametrize("name", ["auto", "eager", "sdpa"])
def test_padding_changes_nothing(model, name):
    model.attn_implementation = name
    batch = make_batch()
    together = model(**batch).last_hidden_state
    for row, length in enumerate(LENGTHS):
        alone = model(batch["input_ids"][row : row + 1, :length]).last_hidden_state
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["auto", "eager", "sdpa"])
def test_packed_equals_padded(model, name):
    model.attn_implementation = name
    batch = make_batch()
    padded = model(**batch, output_hidden_states=True)
    packed = model(**pack(batch), output_hidden_states=True)
    real = batch["attention_mask"].bool()
    for ours, theirs in zip(packed.hidden_states, padded.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs[real], atol=1e-5, rtol=0)


def shapes_inside(model, **batch):
    """What the layers get to see."""
    shapes = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(inputs[0].shape)))
        for layer in model.layers
    ]
    out = model(**batch)
    for hook in hooks:
        hook.remove()
    return out, {*shapes}


def given_as(batch, model, how):
    """The same batch in another form."""
    ids = batch["input_ids"]
    if how == "inputs_embeds":
        vectors = model.embeddings.tok_embeddings(ids)
        return {"inputs_embeds": vectors, "attention_mask": batch["attention_mask"]}
    if how == "position_ids":
        return batch | {"position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
    return batch | ({"position_ids": torch.arange(ids.shape[1])} if how == "one row" else {})


@pytest.mark.parametrize("how", ["input_ids", "inputs_embeds", "position_ids", "one row"])
@pytest.mark.parametrize("left", [False, True])
def test_auto_unpads_once_and_pads_once(how, left):
    model = ModernBertModel(ModernBertConfig(**BASE, classifier_pooling="mean")).eval()
    batch = make_batch(left=left)
    real = batch["attention_mask"].bool()
    out, shapes = shapes_inside(model, **given_as(batch, model, how), output_hidden_states=True)
    assert shapes == {(sum(LENGTHS), model.config.hidden_size)}
    kept, shapes = shapes_inside(model, **batch, output_hidden_states=True, keep_padded=True)
    assert shapes == {(*real.shape, model.config.hidden_size)}
    for ours, theirs in zip(out.hidden_states, kept.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)
        assert not ours[~real].any()
    torch.testing.assert_close(out.last_hidden_state, out.hidden_states[-1])


def test_auto_unpads_where_that_pays(model):
    def packs(**batch):
        _, shapes = shapes_inside(model, **batch)
        return all(len(shape) == 2 for shape in shapes)

    window = 2 * model.config.half_window
    short, long = (torch.ones(2, n, dtype=torch.long) for n in (window, window + 1))
    assert not packs(input_ids=short) and packs(input_ids=long)
    assert not packs(input_ids=short, attention_mask=torch.ones_like(short))
    assert packs(**make_batch((5, 9)))
    assert not packs(**make_batch((5, 9)), keep_padded=True)
    assert not packs(**make_batch((5, 9)), output_attentions=True)
    # A classifier that reads position 0 gets what stands there in transformers.
    assert not packs(**make_batch((5, 9), left=True))
    model.attn_implementation = "sdpa"
    assert not packs(**make_batch((5, 9)))


@pytest.mark.parametrize("name", ["auto", "eager", "sdpa"])
def test_the_company_of_a_text_changes_nothing(model, name):
    model.attn_implementation = name
    texts = [torch.randint(1, 90, (n,)) for n in (70, 3, 150, 1, 33)]
    alone = torch.cat([model(text[None]).last_hidden_state[0] for text in texts])
    order = [3, 0, 4, 2, 1]
    together = model(**join([texts[i] for i in order])).last_hidden_state
    parts = together.split([len(texts[i]) for i in order])
    again = torch.cat([parts[order.index(i)] for i in range(len(texts))])
    torch.testing.assert_close(again, alone, atol=1e-5, rtol=0)
    for streams in (pack_sequences(texts, 160), pack_sequences(texts, 400)):
        lengths = [sorted(s["cu_seqlens"].diff().tolist()) for s in streams]
        for stream, present in zip(streams, lengths, strict=True):
            rows = model(**stream).last_hidden_state.split(stream["cu_seqlens"].diff().tolist())
            for row in rows:
                i = [len(text) for text in texts].index(len(row))
                assert len(row) in present
                expected = alone.split([len(text) for text in texts])[i]
                torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_positions_restart_in_a_packed_stream(model):
    # Distances alone would not show it, but far into a long stream float32 angles are coarse.
    x = torch.zeros(7, 48)
    stream = model._rotary_tables(x, None, torch.tensor([0, 3, 7]))
    alone = [model._rotary_tables(x[:length], None, None) for length in (3, 4)]
    for kind, tables in stream.items():
        for table, *parts in zip(tables, *(a[kind] for a in alone), strict=True):
            assert torch.equal(table, torch.cat(parts))


def test_only_distances_between_positions_matter(model):
    ids = make_batch((50,))["input_ids"]
    shifted = model(ids, position_ids=torch.arange(100, 150)).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, shifted, atol=1e-4, rtol=0)
    spread = model(ids, position_ids=torch.arange(0, 100, 2)).last_hidden_state
    assert (model(ids).last_hidden_state - spread).abs().max() > 1e-2


def test_a_change_travels_one_half_window_a_local_layer():
    values = {**BASE, "layer_types": ["sliding_attention"] * 4, "local_attention": 6}
    model = ModernBertModel(ModernBertConfig(**values)).eval()
    ids = make_batch((60,))["input_ids"]
    other = ids.clone()
    other[0, 30] = (ids[0, 30] % 90) + 1
    changed = (model(ids).last_hidden_state != model(other).last_hidden_state).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [*range(30 - 4 * 3, 30 + 4 * 3 + 1)]


def test_layer_zero_has_no_attention_norm(model):
    names = [name for name, _ in model.named_parameters() if "attn_norm" in name]
    assert names == [f"layers.{i}.attn_norm.weight" for i in (1, 2, 3)]


def test_inputs_embeds_stand_in_for_ids(model):
    batch = make_batch()
    vectors = model.embeddings.tok_embeddings(batch["input_ids"])
    from_vectors = model(inputs_embeds=vectors, attention_mask=batch["attention_mask"])
    assert torch.equal(from_vectors.last_hidden_state, model(**batch).last_hidden_state)


def test_hidden_states_and_attentions_come_on_request(model):
    batch = make_batch((7, 4))
    quiet = model(**batch)
    assert quiet.hidden_states is None and quiet.attentions is None
    full = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(full.hidden_states) == 5 and len(full.attentions) == 4
    assert full.hidden_states[-1] is full.last_hidden_state
    for weights in full.attentions:
        assert weights.shape == (2, 3, 7, 7)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))
        assert (weights[1, :, :, 4:] == 0).all()
    packed = model(**pack(batch), output_attentions=True)
    assert packed.attentions[0].shape == (3, 11, 11)
    assert (packed.attentions[0][:, :7, 7:] == 0).all()


# ---- training


def test_starting_values_have_the_stated_spread():
    config = ModernBertConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=8, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = ModernBertModel(config)
    # A normal distribution cut at two standard deviations keeps 0.8796 of its spread.
    for module, std in (("Wqkv", 0.02), ("Wi", 0.02), ("Wo", 0.02 / 4)):
        assert initial_std(module, config) == pytest.approx(std)
        weights = [p for n, p in model.named_parameters() if f".{module}." in n]
        assert len(weights) == (16 if module == "Wo" else 8)
        drawn = torch.cat([w.flatten() for w in weights])
        assert drawn.std().item() == pytest.approx(0.8796 * std, rel=0.02)
        assert drawn.abs().max() <= 2 * std
    assert all((p == 1).all() for n, p in model.named_parameters() if "norm" in n)


def test_gradient_checkpointing_changes_no_gradient(model):
    batch = make_batch()
    grads = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.train().zero_grad()
        model(**batch).last_hidden_state.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert model.gradient_checkpointing
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_gradient_checkpointing_keeps_fewer_activations(model):
    def saved_bytes():
        total = 0

        def pack_hook(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            model(**make_batch())
        return total

    model.train()
    plain = saved_bytes()
    model.gradient_checkpointing_enable()
    assert saved_bytes() < plain / 4


@pytest.mark.parametrize("field", ["embedding_dropout", "attention_dropout", "mlp_dropout"])
def test_dropout_acts_in_training_only(field):
    model = ModernBertModel(ModernBertConfig(**BASE, **{field: 0.5}))
    batch = make_batch((20, 9))
    assert not torch.equal(model(**batch).last_hidden_state, model(**batch).last_hidden_state)
    model.eval()
    assert torch.equal(model(**batch).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.slow
def test_compiles_to_one_graph(model):
    batch = make_batch((33, 20, 5))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    expected = model(**batch, keep_padded=True).last_hidden_state
    torch.testing.assert_close(compiled(**batch).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_traces_to_one_graph_for_any_length(model):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for lengths in ((33, 20), (150, 12, 3), (77, 60), (180, 44, 9)):
        batch = make_batch(lengths)
        expected = model(**batch, keep_padded=True).last_hidden_state
        torch.testing.assert_close(compiled(**batch).last_hidden_state, expected)
    assert len(graphs) <= 3, "lengths must be dynamic, not compiled one by one"


def test_token_by_token_work_goes_in_chunks_where_nobody_wants_gradients():
    x, seen = torch.randn(10, 4), []

    def double(part):
        seen.append(len(part))
        return 2 * part

    with torch.no_grad():
        torch.testing.assert_close(in_chunks(double, x, 4), 2 * x)
        in_chunks(double, x[None], 4)  # a padded batch
    in_chunks(double, x, 4)  # somebody may want gradients
    assert seen == [4, 4, 2, 1, 10]


def test_a_stream_of_several_chunks_is_encoded_as_with_gradients(model):
    stream, _ = model.unpadded(**make_batch((CHUNK, 70)))
    with torch.no_grad():
        chunked = model(**stream).last_hidden_state
    torch.testing.assert_close(chunked, model(**stream).last_hidden_state)


def test_a_compiled_model_takes_streams_of_all_lengths(model):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for lengths in ((33, 20), (150, 12, 3), (77, 60), (180, 44, 9), (60, 70, 80, 90), (2, 66)):
        stream, restore = model.unpadded(**make_batch(lengths))
        expected = model(**stream).last_hidden_state
        torch.testing.assert_close(compiled(**stream).last_hidden_state, expected)
        assert restore(expected).shape[:2] == (len(lengths), max(lengths))
    assert len(graphs) <= 3, "one graph for all batches, not one for each"


def test_a_compiled_model_learns_from_streams(model):
    stream, _ = model.unpadded(**make_batch((33, 20, 5)))
    torch._dynamo.reset()
    gradients = []
    for net in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        net(**stream).last_hidden_state.pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain)


# ---- input that cannot be answered

BAD_INPUT = {
    "nothing": ({}, "neither of input_ids and inputs_embeds"),
    "both": (
        {"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 48)},
        "both of input_ids and inputs_embeds",
    ),
    "no batch dimension": ({"input_ids": torch.ones(4, dtype=torch.long)}, r"shape \(4,\)"),
    "three dimensions": (
        {"input_ids": torch.ones(2, 2, 2, dtype=torch.long)},
        r"shape \(2, 2, 2\)",
    ),
    "no rows": ({"input_ids": torch.ones(0, 4, dtype=torch.long)}, r"shape \(0, 4\)"),
    "no tokens": ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, r"shape \(2, 0\)"),
    "floats": ({"input_ids": torch.ones(1, 2)}, "dtype torch.float32"),
    "id too large": ({"input_ids": torch.tensor([[5, 97]])}, "token id 97"),
    "id negative": ({"input_ids": torch.tensor([[5, -1]])}, "token id -1"),
    "mask of another shape": (
        {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 5)},
        r"attention_mask of shape \(2, 5\)",
    ),
    "empty row": (
        {
            "input_ids": torch.ones(2, 3, dtype=torch.long),
            "attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]]),
        },
        "no real token in row 1",
    ),
    "positions of another shape": (
        {"input_ids": torch.ones(2, 4, dtype=torch.long), "position_ids": torch.ones(2, 5)},
        r"position_ids of shape \(2, 5\)",
    ),
    "mask on a packed stream": (
        {
            "input_ids": torch.ones(4, dtype=torch.long),
            "attention_mask": torch.ones(4),
            "cu_seqlens": torch.tensor([0, 4]),
        },
        "attention_mask beside cu_seqlens",
    ),
    "max_seqlen too small": (
        {
            "input_ids": torch.ones(4, dtype=torch.long),
            "cu_seqlens": torch.tensor([0, 1, 4]),
            "max_seqlen": 2,
        },
        "max_seqlen 2 for a sequence of 3 tokens",
    ),
    "packed in two dimensions": (
        {"input_ids": torch.ones(1, 4, dtype=torch.long), "cu_seqlens": torch.tensor([0, 4])},
        r"shape \(1, 4\) with cu_seqlens",
    ),
}
BAD_BOUNDS = ([1, 4], [0, 3], [0, 5], [0, 3, 2, 4], [0, 2, 2, 4], [0], [])


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused(model, name):
    inputs, finding = BAD_INPUT[name]
    with pytest.raises(ConfigError, match=finding) as caught:
        model(**inputs)
    assert caught.value.expected and caught.value.remedy


@pytest.mark.parametrize("bounds", BAD_BOUNDS, ids=str)
def test_bad_boundaries_are_refused(model, bounds):
    bounds = torch.tensor(bounds, dtype=torch.long)
    with pytest.raises(ConfigError, match="cu_seqlens"):
        model(torch.ones(4, dtype=torch.long), cu_seqlens=bounds)


def test_an_unknown_backend_is_refused(model):
    with pytest.raises(ConfigError, match="attn_implementation 'flash'"):
        model.attn_implementation = "flash"


def test_more_tokens_than_trained_on_warn(model):
    with pytest.warns(UserWarning, match="257 tokens in a sequence.* at most 256"):
        model(torch.ones(1, 257, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(1, 256, dtype=torch.long))
        model(torch.ones(400, dtype=torch.long), cu_seqlens=torch.tensor([0, 200, 400]))


# ---- parity


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_equals_transformers_layer_by_layer(variant, name):
    ours, theirs = make_pair("ModernBertModel", variant, name)
    batch = make_batch()
    with torch.no_grad():
        mine = ours(**batch, output_hidden_states=True)
        reference = theirs(**batch, output_hidden_states=True)
    assert reference.last_hidden_state.abs().max() > 0.5  # not equal for being zero
    for a, b in zip(mine.hidden_states, reference.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_attention_weights_equal_transformers():
    ours, theirs = make_pair("ModernBertModel", "published", "eager")
    batch = make_batch()
    mine, reference = (m(**batch, output_attentions=True).attentions for m in (ours, theirs))
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("left", [False, True])
def test_left_padding_equals_transformers(left):
    ours, theirs = make_pair("ModernBertModel", "published")
    batch = make_batch(left=left)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for extra in ({}, {"position_ids": positions}):
        mine, reference = (m(**batch, **extra).last_hidden_state for m in (ours, theirs))
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_bfloat16_stays_within_its_bound(name):
    # bfloat16 keeps 8 bits. After a norm most values lie within ±4, where one unit in the last
    # place is 2⁻⁶; errors add up over layers. The bound is on the distance to float32 that
    # transformers itself has, plus a quarter.
    ours, theirs = make_pair("ModernBertModel", "published", name, initializer_range=0.05)
    batch = make_batch()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        exact = theirs(**batch).last_hidden_state[real]
        errors = [
            (m.bfloat16()(**batch).last_hidden_state[real].float() - exact).square().mean().sqrt()
            for m in (ours, theirs)
        ]
    assert errors[0] <= 1.25 * errors[1]
    assert errors[0] < 0.05
