"""Unpadding changes where the work happens and nothing else: not one output, not one gradient."""

import copy
import itertools

import pytest
import torch

from modernbert_mini import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    Tokenizer,
)
from modernbert_mini.config import ConfigError
from modernbert_mini.unpadding import (
    FlatteningCollator,
    cumulative_lengths,
    first_fit,
    join,
    pack_sequences,
    pad,
    positions,
    unpad,
)

MASKS = {
    "right": [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]],
    "left": [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]],
    "both sides": [[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]],
    "no padding": [[1, 1, 1, 1]] * 3,
}
masks = pytest.mark.parametrize("mask", [torch.tensor(m) for m in MASKS.values()], ids=MASKS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_lengths(count, seed, longest=90):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, longest + 1, (count,), generator=generator)


def tiny(**changes):
    config = {
        "model_type": "modernbert",
        "vocab_size": 60,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "local_attention": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        **changes,
    }
    return ModernBertConfig.from_dict(config)


def padded_batch(lengths, seed=0):
    real = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, L)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, real.shape, generator=generator) * real
    return ids, real.long()


# ---- cumulative lengths and positions ----


def test_cumulative_lengths_start_at_0_rise_and_end_at_the_number_of_tokens():
    bounds = cumulative_lengths(torch.tensor([5, 3, 8]))
    assert bounds.tolist() == [0, 5, 8, 16] and bounds.dtype == torch.int32


@pytest.mark.parametrize("seed", range(3))
def test_lengths_come_back_from_their_sums(seed):
    lengths = draw_lengths(7, seed)
    assert torch.equal(cumulative_lengths(lengths).diff(), lengths.int())


def test_positions_restart_in_each_sequence():
    bounds = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    assert positions(bounds).tolist() == [0, 1, 2, 0, 0, 1]


# ---- unpad and pad ----


@masks
def test_unpad_keeps_the_real_tokens_in_their_order(mask):
    ids = torch.arange(12).view(3, 4)
    packed, indices, bounds, longest = unpad(ids, mask)
    assert packed.tolist() == [i for i, m in zip(range(12), mask.flatten(), strict=True) if m]
    assert torch.equal(packed, indices)  # here each token is named by its place
    assert torch.equal(bounds.diff(), mask.sum(dim=-1).int()) and bounds[0] == 0
    assert longest == mask.sum(dim=-1).max() and isinstance(longest, int)


@masks
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
def test_pad_puts_back_what_unpad_took_and_zeros_elsewhere(mask, shape):
    x = draw(3, 4, *shape)
    packed, indices, *_ = unpad(x, mask)
    back = pad(packed, indices, 3, 4)
    assert back.shape == x.shape and packed.shape == (mask.sum(), *shape)
    assert torch.equal(back[mask.bool()], x[mask.bool()])
    assert not back[~mask.bool()].any()
    assert torch.equal(unpad(back, mask)[0], packed)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_a_mask_of_any_dtype_will_do(dtype):
    mask = torch.tensor(MASKS["left"])
    packed, *_ = unpad(torch.arange(12).view(3, 4), mask.to(dtype))
    assert packed.tolist() == [0, 1, 2, 3, 7, 10, 11]


def test_every_mask_value_but_zero_is_real():
    packed, *_ = unpad(torch.arange(4)[None], torch.tensor([[1, 0, 2, -1]]))
    assert packed.tolist() == [0, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes_pass_through(dtype):
    x, mask = torch.ones(3, 4, dtype=dtype), torch.tensor(MASKS["right"])
    packed, indices, *_ = unpad(x, mask)
    assert packed.dtype == pad(packed, indices, 3, 4).dtype == dtype


def test_gradients_flow_to_the_real_tokens_alone():
    x, mask = draw(3, 4, 2).requires_grad_(), torch.tensor(MASKS["holes"])
    packed, indices, *_ = unpad(x, mask)
    pad(packed * 2, indices, 3, 4).sum().backward()
    assert torch.equal(x.grad, (2.0 * mask)[..., None].expand(3, 4, 2))


# ---- join ----


def test_join_is_what_unpad_makes_of_the_padded_batch():
    ids, mask = padded_batch(torch.tensor([4, 1, 7]))
    stream = join([row[: m.sum()] for row, m in zip(ids, mask, strict=True)])
    packed, _, bounds, longest = unpad(ids, mask)
    assert torch.equal(stream["input_ids"], packed)
    assert torch.equal(stream["cu_seqlens"], bounds) and stream["cu_seqlens"].dtype == torch.int32
    assert stream["max_seqlen"] == longest


@pytest.mark.parametrize(
    ("sequences", "said"),
    [
        ([], "nothing"),
        ([torch.tensor([1]), torch.tensor([])], "sequence 1: shape (0,)"),
        ([torch.ones(2, 3).long()], "sequence 0: shape (2, 3)"),
        ([torch.tensor([1]), torch.tensor(7)], "sequence 1: shape ()"),
    ],
    ids=["none", "empty", "a batch", "a number"],
)
def test_join_names_what_it_cannot_take(sequences, said):
    with pytest.raises(ConfigError) as error:
        join(sequences)
    assert said in str(error.value)


# ---- first fit ----


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_in_one_bin_and_no_bin_is_overfull(seed):
    lengths, capacity = draw_lengths(60, seed).tolist(), 100
    bins = first_fit(lengths, capacity)
    assert sorted(itertools.chain(*bins)) == list(range(60))
    assert all(0 < sum(lengths[i] for i in chosen) <= capacity for chosen in bins)


@pytest.mark.parametrize("seed", range(5))
def test_no_sequence_would_have_fitted_into_an_earlier_bin(seed):
    lengths, capacity = draw_lengths(40, seed).tolist(), 100
    bins = first_fit(lengths, capacity)
    for b, chosen in enumerate(bins):
        for i, earlier in itertools.product(chosen, bins[:b]):
            before = [j for j in earlier if (-lengths[j], j) < (-lengths[i], i)]
            assert sum(lengths[j] for j in before) + lengths[i] > capacity


def test_the_longest_go_first():
    # In the order given, 4 4 | 6 … would take three bins; sorted, 6 4 | 6 4 fill two to the brim.
    assert first_fit([4, 4, 6, 6], 10) == [[2, 0], [3, 1]]


@pytest.mark.parametrize("seed", range(20))
def test_bins_stay_within_the_known_bound(seed):
    # The fewest bins: tried out for eight sequences. First-fit decreasing: at most 11/9 of that
    # and 6/9 of a bin more (Dósa, 2007).
    lengths, capacity = draw_lengths(8, seed, longest=9).tolist(), 10
    assert len(first_fit(lengths, capacity)) <= 11 / 9 * fewest(lengths, capacity) + 6 / 9


def fewest(lengths, capacity):
    """The smallest number of bins, by trying every assignment."""
    for bins in range(1, len(lengths) + 1):
        for places in itertools.product(range(bins), repeat=len(lengths) - 1):
            full = [0] * bins
            for n, place in zip(lengths, (0, *places), strict=True):
                full[place] += n
            if max(full) <= capacity:
                return bins
    return 0


def test_equal_lengths_keep_their_order():
    assert first_fit([3, 3, 3, 3, 3], 6) == [[0, 1], [2, 3], [4]]


def test_nothing_fits_into_no_bin():
    assert first_fit([], 10) == [] and pack_sequences([], 10) == []


@pytest.mark.parametrize("pack", [first_fit, lambda n, c: pack_sequences([[1] * x for x in n], c)])
def test_a_sequence_that_is_too_long_is_named(pack):
    assert pack([10, 3], 10)
    with pytest.raises(ConfigError, match=r"sequence 2 of 11 tokens.*at most 10"):
        pack([5, 10, 11], 10)


# ---- pack_sequences ----


def test_packed_sequences_come_out_whole():
    sequences = [[1] * 4, torch.tensor([2] * 6), [3], [4] * 6]
    streams = pack_sequences(sequences, 10)
    assert [s["input_ids"].tolist() for s in streams] == [[2] * 6 + [1] * 4, [4] * 6 + [3]]
    assert [s["cu_seqlens"].tolist() for s in streams] == [[0, 6, 10], [0, 6, 7]]
    assert [s["max_seqlen"] for s in streams] == [6, 6]
    assert all(s["input_ids"].dtype == torch.int64 for s in streams)


def test_an_empty_sequence_cannot_be_packed():
    with pytest.raises(ConfigError, match="none empty"):
        pack_sequences([[1, 2], []], 10)


@torch.no_grad()
def test_a_sequence_does_not_care_with_whom_it_is_packed():
    torch.manual_seed(0)
    model = ModernBertForMaskedLM(tiny()).eval()
    ids = [torch.randint(1, 60, (int(n),)) for n in draw_lengths(9, 3, longest=40)]
    alone = [model(row[None]).logits[0] for row in ids]
    for capacity in (40, 64, 1000):
        for chosen in first_fit([len(row) for row in ids], capacity):
            stream = join([ids[i] for i in chosen])
            parts = model(**stream).logits.split(stream["cu_seqlens"].diff().tolist())
            for i, part in zip(chosen, parts, strict=True):
                torch.testing.assert_close(part, alone[i], rtol=0, atol=1e-5)


# ---- the model: the same outputs, losses and gradients ----


def gradients(model, **batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal_gradients(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5, msg=name)


LENGTHS = torch.tensor([31, 1, 17, 9])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_masked_language_modelling_packed_and_padded(implementation, side):
    torch.manual_seed(1)
    model = ModernBertForMaskedLM(tiny(), implementation)
    ids, mask = padded_batch(LENGTHS)
    if side == "left":  # positions then start late in a padded batch: RoPE does not mind
        ids, mask = ids.flip(1), mask.flip(1)
    labels = torch.where((draw(*ids.shape) > 0.5) & mask.bool(), ids, -100)
    features = [
        {"input_ids": i.tolist(), "attention_mask": m.tolist(), "labels": t.tolist()}
        for i, m, t in zip(ids, mask, labels, strict=True)
    ]
    padded, expected = gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    packed, found = gradients(model, **FlatteningCollator()(features))
    torch.testing.assert_close(packed.loss, padded.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed.logits, padded.logits[mask.bool()], rtol=0, atol=1e-5)
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("problem", ["single", "multi", "regression"])
def test_sequence_classification_packed_and_padded(pooling, problem):
    labels = {
        "single": torch.tensor([2, 0, 1, 2]),
        "multi": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]]),
        "regression": draw(4),
    }[problem]
    torch.manual_seed(2)
    width = 1 if problem == "regression" else 3
    model = ModernBertForSequenceClassification(
        tiny(classifier_pooling=pooling, num_labels=width), "sdpa"
    )
    ids, mask = padded_batch(LENGTHS)
    features = [
        {"input_ids": row[:n], "labels": label}
        for row, n, label in zip(ids, LENGTHS, labels, strict=True)
    ]
    padded, expected = gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    packed, found = gradients(model, **FlatteningCollator()(features))
    torch.testing.assert_close(packed.logits, padded.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed.loss, padded.loss, rtol=0, atol=1e-5)
    assert_equal_gradients(found, expected)


def test_token_classification_packed_and_padded():
    torch.manual_seed(3)
    model = ModernBertForTokenClassification(tiny(num_labels=5), "sdpa")
    ids, mask = padded_batch(LENGTHS)
    labels = torch.where(mask.bool(), ids % 5, -100)
    features = [
        {"input_ids": i, "attention_mask": m, "labels": t}
        for i, m, t in zip(ids, mask, labels, strict=True)
    ]
    padded, expected = gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    packed, found = gradients(model, **FlatteningCollator()(features))
    torch.testing.assert_close(packed.loss, padded.loss, rtol=0, atol=1e-5)
    assert_equal_gradients(found, expected)


# ---- a padded batch, which the model unpads by itself ----


@pytest.mark.parametrize("head", [ModernBertForMaskedLM, ModernBertForTokenClassification])
def test_the_model_unpads_by_itself(head):
    torch.manual_seed(4)
    model = head(tiny(num_labels=60))
    ids, mask = padded_batch(LENGTHS)
    labels = torch.where(mask.bool(), ids % 5, -100)
    padded, expected = gradients(
        model, input_ids=ids, attention_mask=mask, labels=labels, keep_padded=True
    )
    alone, found = gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    stream, indices, cu_seqlens, _ = unpad(ids, mask)
    by_hand = pad(model(stream, cu_seqlens=cu_seqlens).logits, indices, *mask.shape)
    real = mask.bool()
    assert padded.logits[~real].abs().max() > 0  # a rectangle computes its padding …
    assert not alone.logits[~real].any()  # … and who has unpadded puts zeros there
    torch.testing.assert_close(alone.logits, by_hand, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone.logits[real], padded.logits[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(alone.loss, padded.loss, rtol=0, atol=1e-5)
    assert_equal_gradients(found, expected)


@torch.no_grad()
def test_padding_in_front_stays_where_column_0_may_be_read():
    torch.manual_seed(5)
    model = ModernBertForSequenceClassification(tiny(classifier_pooling="cls"))
    ids, mask = (x.flip(1) for x in padded_batch(LENGTHS))
    kept = model(ids, attention_mask=mask, keep_padded=True).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, kept, rtol=0, atol=1e-5)


# ---- the collator ----


def test_features_as_the_tokenizer_gives_them():
    tokenizer = Tokenizer.from_pretrained("mini")
    texts = ["The river rises.", "Rain.", "Bread is baked from flour and water."]
    single = [tokenizer(text) for text in texts]
    stream = FlatteningCollator()(single)
    packed, _, bounds, longest = unpad(
        *(tokenizer(texts, padding=True, return_tensors="pt")[k] for k in single[0])
    )
    assert torch.equal(stream["input_ids"], packed) and torch.equal(stream["cu_seqlens"], bounds)
    assert stream.keys() == {"input_ids", "cu_seqlens", "max_seqlen"}
    assert stream["max_seqlen"] == longest


@masks
def test_padding_inside_features_is_left_out_with_its_labels(mask):
    features = [
        {"input_ids": (10 * b + torch.arange(4)).tolist(), "attention_mask": m.tolist()}
        for b, m in enumerate(mask)
    ]
    for feature in features:
        feature["labels"] = [-i for i in feature["input_ids"]]
    stream = FlatteningCollator()(features)
    ids = 10 * torch.arange(3)[:, None] + torch.arange(4)
    assert torch.equal(stream["input_ids"], ids[mask.bool()])
    assert torch.equal(stream["labels"], -stream["input_ids"])
    assert torch.equal(stream["cu_seqlens"].diff(), mask.sum(dim=-1).int())


@pytest.mark.parametrize("name", ["labels", "label"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 0], torch.tensor([1, 0])),
        ([0.5, 2.0], torch.tensor([0.5, 2.0])),
        ([[1.0, 0.0, 1.0], [0.0] * 3], torch.tensor([[1.0, 0.0, 1.0], [0.0] * 3])),
        ([torch.tensor(1), torch.tensor(0)], torch.tensor([1, 0])),
        # As many labels of a text as it has tokens: floats are still the text's.
        ([[1.0, 0.0], [0.0, 1.0]], torch.tensor([[1.0, 0.0], [0.0, 1.0]])),
        ([[4, 5], [6, 7]], torch.tensor([4, 5, 6, 7])),
    ],
    ids=["class", "number", "several", "tensors", "several, as many as tokens", "tokens"],
)
def test_labels_of_tokens_are_joined_and_labels_of_texts_stacked(name, given, expected):
    features = [{"input_ids": [8, 9], name: label} for label in given]
    labels = FlatteningCollator()(features)["labels"]
    assert torch.equal(labels, expected) and labels.dtype == expected.dtype


def test_what_the_model_does_not_take_is_dropped():
    feature = {"input_ids": [1, 2], "token_type_ids": [0, 0], "text": "a b", "labels": None}
    assert FlatteningCollator()([feature]).keys() == {"input_ids", "cu_seqlens", "max_seqlen"}


def test_features_are_left_as_they_are():
    features = [{"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0], "labels": [3, 4, -100]}]
    before = copy.deepcopy(features)
    FlatteningCollator()(features)
    assert features == before


def test_it_serves_a_data_loader():
    features = [{"input_ids": list(range(1, n + 1)), "label": n % 2} for n in (3, 1, 2)]
    loader = torch.utils.data.DataLoader(features, batch_size=2, collate_fn=FlatteningCollator())
    first, second = loader
    assert first["cu_seqlens"].tolist() == [0, 3, 4] and first["labels"].tolist() == [1, 1]
    assert second["input_ids"].tolist() == [1, 2] and second["max_seqlen"] == 2


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ([], "nothing"),
        ([{"input_ids": [1]}, {"input_ids": []}], "sequence 1: shape (0,)"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "sequence 0: shape (0,)"),
    ],
    ids=["no features", "an empty one", "all padding"],
)
def test_a_batch_without_tokens_is_refused(features, said):
    with pytest.raises(ConfigError) as error:
        FlatteningCollator()(features)
    assert said in str(error.value)


def test_labels_and_masks_that_do_not_fit_their_tokens_are_refused():
    collate = FlatteningCollator()
    # Together the labels fit the tokens: each feature has to be looked at.
    with pytest.raises(IndexError, match="shape"):
        collate([{"input_ids": [1, 2], "labels": [1]}, {"input_ids": [1, 2], "labels": [1, 2, 3]}])
    with pytest.raises(IndexError, match="shape"):
        collate([{"input_ids": [1, 2], "attention_mask": [1, 1, 1]}])


def test_a_feature_without_its_label_is_refused():
    with pytest.raises((TypeError, RuntimeError)):
        FlatteningCollator()([{"input_ids": [1]}, {"input_ids": [2], "labels": 1}])


# ---- the collator of transformers, and what its model makes of it ----


@pytest.fixture
def theirs():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers


def test_how_the_collator_of_transformers_differs(theirs):
    features = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0], "labels": [1, 2, -100]},
        {"input_ids": [8, 9], "attention_mask": [1, 1], "labels": [3, 4]},
    ]
    ours = FlatteningCollator()(features)
    collate = theirs.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    other = collate(features)
    assert ours["input_ids"].tolist() == [5, 6, 8, 9]
    assert other["input_ids"].tolist() == [[5, 6, 7, 8, 9]]  # a batch of one, padding in it
    assert ours["labels"].tolist() == [1, 2, 3, 4]
    assert other["labels"].tolist() == [[-100, 2, -100, -100, 4]]  # first labels gone
    assert ours["cu_seqlens"].tolist() == [0, 2, 4]
    assert other["cu_seq_lens_q"].tolist() == [0, 3, 5] and other["max_length_q"] == 3
    assert other["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    bare = [{"input_ids": [5, 6]}, {"input_ids": [7]}]
    plain = theirs.DataCollatorWithFlattening()(bare)
    assert plain.keys() == {"input_ids", "labels", "position_ids"}
    assert plain["labels"].tolist() == [[-100, 6, -100]]
    with pytest.raises(TypeError):
        theirs.DataCollatorWithFlattening()([{"input_ids": [5, 6], "labels": 1}])


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_modernbert_of_transformers_mixes_flattened_texts_without_flash_attention(
    theirs, implementation
):
    shape = {k: v for k, v in tiny().to_dict().items() if "token_id" not in k}
    config = theirs.ModernBertConfig(
        **shape | {"pad_token_id": 0, "attn_implementation": implementation}
    )
    for name in ("bos", "eos", "cls", "sep"):
        setattr(config, f"{name}_token_id", None)
    torch.manual_seed(0)
    other = theirs.ModernBertForMaskedLM(config).eval()
    ours = ModernBertForMaskedLM(tiny()).eval()
    ours.load_state_dict(other.state_dict())
    features = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    alone = other(torch.tensor([[8, 9]])).logits[0]
    batch = theirs.DataCollatorWithFlattening()(features)
    del batch["labels"]
    mixed = other(**batch).logits[0, 3:]
    apart = ours(**FlatteningCollator()(features)).logits[3:]
    assert (mixed - alone).abs().max() > 0.01  # the second text has seen the first
    torch.testing.assert_close(apart, alone, rtol=0, atol=1e-5)
