"""What book/where-sources-disagree.md says, row by row: each row names its tests.

A test holds this package to the row's line "Here" and, where the installed ``transformers`` can
show it, to that line too. Where a source would give another number, the test computes that number
as well: a row that nobody could tell from its neighbour would not be worth its place.
"""

import ast
import itertools
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from parity import BASE, CLASSES, make_batch, make_labels, make_pair, scores, transformers
from test_model import pack
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.modernbert import modeling_modernbert as theirs_module

from modernbert_mini import heads, pretraining, rope
from modernbert_mini.alternating_attention import layer_pattern, padded_mask
from modernbert_mini.attention import eager_attention
from modernbert_mini.config import ConfigError, ModernBertConfig
from modernbert_mini.geglu import ACTIVATIONS, GeGLU, gated_linear_unit
from modernbert_mini.model import check_inputs
from modernbert_mini.tokenizer import Tokenizer

PAGE = Path(__file__).resolve().parents[1] / "book" / "where-sources-disagree.md"
MODERNBERT = ("ModernBERT-base", "ModernBERT-large")
ETTIN = tuple(f"ettin-encoder-{size}" for size in ("17m", "32m", "68m", "150m", "400m", "1b"))
MMBERT = ("mmBERT-small", "mmBERT-base")


@pytest.fixture(scope="module")
def published(reference) -> dict[str, dict]:
    """The published configs, as their files hold them."""
    names = (*MODERNBERT, *ETTIN, *MMBERT)
    return {n: json.loads((reference / "configs" / f"{n}.json").read_text("utf-8")) for n in names}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained("mini")


def both(name: str, **values):
    """Our model and transformers' of class ``name``, in one list: what holds for each."""
    return list(make_pair(name, "published", **values))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- the encoder


def test_gelu_is_the_exact_one():
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    exact = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    approximate = x * (1 + torch.tanh(inner)) / 2
    for table in (ACTIVATIONS, ACT2FN):
        close(table["gelu"](x), exact, atol=1e-12)
        for name in ("gelu_new", "gelu_pytorch_tanh"):
            close(table[name](x), approximate, atol=1e-12)
    assert f"{(exact - approximate).abs().max():.5f}" == "0.00047"
    assert ModernBertConfig().hidden_activation == "gelu"


def test_the_first_half_of_wi_is_activated():
    one, low = torch.ones(3), torch.full((3,), -9.0)
    # GELU shuts at −9: where it acts on the first half, nothing of the second comes through.
    close(gated_linear_unit(torch.cat((low, one))), torch.zeros(3))
    close(gated_linear_unit(torch.cat((one, low))), low * F.gelu(one))
    config = transformers.ModernBertConfig(**BASE)
    theirs, ours = theirs_module.ModernBertMLP(config), GeGLU(48, 40)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 48)
    close(ours(x), theirs(x))
    ours.Wi.weight.data = ours.Wi.weight.data.roll(40, 0)  # the halves, exchanged
    assert (ours(x) - theirs(x)).abs().max() > 1e-3


def test_a_window_of_128_is_129_keys():
    assert padded_mask(None, 300, ModernBertConfig().half_window)[150].sum() == 129
    values = {"local_attention": 128, "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    values["max_position_embeddings"] = 512
    ids = make_batch((300,))["input_ids"]
    other = ids.clone()
    other[0, 150] = ids[0, 150] % 90 + 1
    for model in both("ModernBertModel", **values):
        changed = (model(ids).last_hidden_state - model(other).last_hidden_state).abs()
        reached = (changed.amax(-1)[0] > 0).nonzero().flatten().tolist()
        assert reached == [*range(150 - 64, 150 + 64 + 1)]
    # What transformers calls sliding_window is a half here and a half and itself there.
    assert model.config.sliding_window == 64
    assert model.layers[0].attn.sliding_window == 65


def test_layer_0_is_global_and_the_last_may_be_local():
    # 22 layers end with a global one; 23 do not, and the original code would refuse them.
    assert layer_pattern(22, 3).count("full_attention") == 8
    for config_class in (ModernBertConfig, transformers.ModernBertConfig):
        kinds = config_class(num_hidden_layers=23).layer_types
        assert kinds[0] == kinds[21] == "full_attention" and kinds[22] == "sliding_attention"


def test_published_models_end_with_a_global_layer(published):
    for values in published.values():
        kinds = ModernBertConfig.from_dict(values).layer_types
        assert kinds[0] == kinds[-1] == "full_attention"
        assert (len(kinds) - 1) % 3 == 0


def test_the_rotary_bases_of_published_models(published):
    for name, values in published.items():
        config = ModernBertConfig.from_dict(values)
        bases = {kind: values["rope_theta"] for kind, values in config.rope_parameters.items()}
        local = 10_000 if name in MODERNBERT else 160_000
        assert bases == {"full_attention": 160_000, "sliding_attention": local}


def test_a_missing_local_base_is_10000_and_matters():
    for config_class in (ModernBertConfig, transformers.ModernBertConfig):
        parameters = config_class(global_rope_theta=500.0).rope_parameters
        assert parameters["sliding_attention"]["rope_theta"] == 10_000
    right, _ = make_pair("ModernBertModel", "published")
    wrong, _ = make_pair("ModernBertModel", "ettin's bases")  # equal weights, another base
    batch = make_batch()
    assert (right(**batch).last_hidden_state - wrong(**batch).last_hidden_state).abs().max() > 1e-3


def test_rotary_tables_stay_float32():
    ours, theirs = both("ModernBertModel")
    x, positions = torch.zeros(1, 9, 48, dtype=torch.bfloat16), torch.arange(9)
    cos, _ = ours._rotary_tables(x, None, None)["full_attention"]
    rounded, _ = theirs.rotary_emb(x, positions[None], "full_attention")
    assert (cos.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(cos.bfloat16(), rounded[0])


def test_casting_a_model_leaves_its_frequencies_alone():
    ours, theirs = both("ModernBertModel", num_attention_heads=1, hidden_size=64)
    x = torch.zeros(1, 1001, 64)
    frequencies = theirs.rotary_emb.full_attention_inv_freq.clone()
    before = ours._rotary_tables(x, None, None)["full_attention"]
    after = ours.bfloat16()._rotary_tables(x.bfloat16(), None, None)["full_attention"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    cast = theirs.bfloat16().rotary_emb.full_attention_inv_freq
    assert cast.dtype == torch.bfloat16
    radians = 1000 * (cast.float() - frequencies).abs().max()
    assert radians > 0.9  # a seventh of a turn, 1,000 tokens into the text
    built = transformers.ModernBertModel._from_config(theirs.config, dtype=torch.bfloat16)
    assert built.rotary_emb.full_attention_inv_freq.dtype == torch.float32


def test_each_rounding_in_the_rotation_costs_accuracy():
    positions = torch.arange(4096)
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rope.rotary_table(positions, rope.inverse_frequencies(64, 10_000.0))
    low_cos, low_sin = cos.bfloat16(), sin.bfloat16()
    angles = positions[:, None].double() / 10_000.0 ** (torch.arange(0, 64, 2).double() / 64)
    angles = torch.cat((angles, angles), dim=-1)
    true = x.double() * angles.cos() + rope.rotate_half(x.double()) * angles.sin()
    now = theirs_module.apply_rotary_pos_emb(
        x[None, None], x[None, None], low_cos[None], low_sin[None]
    )
    once = x * low_cos + rope.rotate_half(x) * low_sin  # everything in bfloat16, as in 4.48
    errors = [
        (y.double() - true).square().mean().sqrt()
        for y in (rope.apply_rotary(x, cos, sin), now[0][0, 0], once)
    ]
    assert errors[0] < 0.9 * errors[1] < 0.9 * 0.9 * errors[2]


def test_softmax_sums_in_float32():
    q, k, v = torch.randn(3, 2, 500, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, weights = eager_attention(q, k, v)
    mine = (q @ k.transpose(-1, -2)) * 16**-0.5
    assert torch.equal(weights, mine.softmax(-1, dtype=torch.float32).bfloat16())
    _, reference = theirs_module.eager_attention_forward(
        torch.nn.Module(), q[None], k[None], v[None], None, 16**-0.5
    )
    assert torch.equal(weights, reference[0])
    # PyTorch sums in float32 even when not asked to: at most a tie is rounded the other way.
    assert (weights != mine.softmax(-1)).float().mean() < 1e-3
    powers = (mine - mine.amax(-1, keepdim=True)).exp()
    by_hand = powers / powers.sum(-1, keepdim=True)
    true = mine.double().softmax(-1)
    errors = [((w - true) / true).abs().max() for w in (weights, by_hand)]
    assert errors[0] < errors[1] / 5


def test_layer_0_has_no_attention_norm():
    for model in both("ModernBertModel"):
        names = {name for name, _ in model.named_parameters()}
        assert "layers.0.attn_norm.weight" not in names
        assert {"layers.1.attn_norm.weight", "layers.0.mlp_norm.weight"} <= names
        assert "embeddings.norm.weight" in names


def test_padding_holds_numbers_that_no_token_sees():
    batch = make_batch((5, 9, 30))
    padding = batch["attention_mask"] == 0
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(padding, 42)}
    states = []
    for model in both("ModernBertModel"):
        first, second = (model(**b).last_hidden_state for b in (batch, other))
        close(first[~padding], second[~padding])
        assert first[padding].abs().mean() > 0.1  # not the zeros of 4.48's flash attention
        assert (first[padding] - second[padding]).abs().max() > 0.1  # made from the pad ids
        states.append(first)
    close(*states)


def test_padding_comes_back_as_zeros():
    ours, theirs = both("ModernBertModel")
    batch = make_batch((5, 9, 30))
    real = batch["attention_mask"].bool()
    kept = ours(**batch).last_hidden_state  # by sdpa, as in transformers
    ours.attn_implementation = "auto"
    states = ours(**batch).last_hidden_state
    close(states[real], kept[real])
    assert not states[~real].any()
    close(ours(**batch, keep_padded=True).last_hidden_state, theirs(**batch).last_hidden_state)


def test_a_packed_stream_has_no_padding():
    ours, _ = both("ModernBertModel")
    batch = make_batch((5, 9, 30))
    stream = ours(**pack(batch)).last_hidden_state
    assert stream.shape == (5 + 9 + 30, 48)
    close(stream, ours(**batch).last_hidden_state[batch["attention_mask"].bool()])


def test_the_last_hidden_state_is_normed():
    batch = make_batch((5, 9))
    for model in both("ModernBertModel"):
        out = model(**batch, output_hidden_states=True)
        before, after = out.hidden_states[-2:]
        assert torch.equal(after, out.last_hidden_state)
        seen = []
        model.final_norm.register_forward_hook(lambda _, x, y, seen=seen: seen.append((x[0], y)))
        model(**batch)
        ((entered, left),) = seen
        assert torch.equal(left, after) and not torch.equal(entered, after)
        assert (entered - before).abs().max() > 1e-3  # the last layer stands between them


def test_one_attention_dropout_acts_on_weights_and_output():
    ids = make_batch((40,))["input_ids"]
    for model in both("ModernBertModel", attention_dropout=0.5, attn_implementation="eager"):
        seen = {}

        def watch(module, inputs, output, seen=seen):
            seen["output"] = output

        model.layers[1].attn.out_drop.register_forward_hook(watch)
        weights = model.train()(ids, output_attentions=True).attentions[0]
        for dropped in (weights, seen["output"]):
            assert 0.3 < (dropped == 0).float().mean() < 0.7
    assert ModernBertConfig().attention_dropout == 0  # the paper's 0.1 is not in the config


def test_reference_compile_is_kept_and_ignored(monkeypatch):
    values = {**BASE, "model_type": "modernbert", "reference_compile": True}
    config = ModernBertConfig.from_dict(values)
    assert config.to_dict()["reference_compile"] is True
    assert "reference_compile" not in transformers.ModernBertConfig(**values).to_dict()

    def refuse(*args, **kwargs):
        raise AssertionError("compiled without being asked to")

    monkeypatch.setattr(torch, "compile", refuse)
    ids = make_batch((4,))["input_ids"]
    heads.ModernBertForMaskedLM(config)(ids)
    transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**values))(ids)
    source = Path(theirs_module.__file__).read_text("utf-8")
    assert "torch.compile" not in source and "compiled_mlp" not in source


# ---- heads and losses


def test_pooling_is_cls_where_the_config_is_silent():
    for config_class in (ModernBertConfig, transformers.ModernBertConfig):
        assert config_class().classifier_pooling == "cls"


def test_published_models_pool_by_the_mean(published):
    for values in published.values():
        assert ModernBertConfig.from_dict(values).classifier_pooling == "mean"


def test_the_mean_leaves_padding_out():
    batch = make_batch((5, 9))
    real = batch["attention_mask"][..., None]
    for model in both("ModernBertForSequenceClassification", classifier_pooling="mean"):
        x = model.model(**batch).last_hidden_state
        over_tokens = (x * real).sum(1) / real.sum(1)
        over_places = (x * real).mean(1)  # the original code: zeros at padding, divided by L
        logits = model(**batch).logits
        close(logits, model.classifier(model.head(over_tokens)))
        assert (model.classifier(model.head(over_places)) - logits)[0].abs().max() > 1e-4
        # A batch without padding needs no mask; transformers 4.48 failed without one.
        ids = batch["input_ids"][1:]
        close(model(ids).logits, logits[1:])


@pytest.mark.parametrize("name", ["SequenceClassification", "MultipleChoice"])
def test_where_cls_is_looked_for(name):
    options = {"choices": 2} if name == "MultipleChoice" else {}
    right, left = (make_batch((6, 9), left=side, **options) for side in (False, True))
    left["position_ids"] = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for model in both(f"ModernBertFor{name}"):
        gap = (model(**right).logits - model(**left).logits).flatten().abs()
        # The second text fills its row: only the first one has padding before it.
        assert gap[-1] < 1e-5
        assert gap[0] < 1e-5 if name == "MultipleChoice" else gap[0] > 1e-3


def test_every_task_has_the_head_of_masked_language_modelling():
    for package in (heads, transformers):
        config = (ModernBertConfig if package is heads else transformers.ModernBertConfig)(**BASE)
        masked = package.ModernBertForMaskedLM(config)
        classifier = package.ModernBertForSequenceClassification(config)
        classifier.head.load_state_dict(masked.head.state_dict(), strict=True)
        x = torch.randn(4, 48)
        close(classifier.head(x), masked.head(x))
        dense, norm = masked.head.dense, masked.head.norm
        close(masked.head(x), norm(F.gelu(dense(x))))
        assert isinstance(norm, torch.nn.LayerNorm)


def test_the_classifier_has_a_bias_and_classifier_bias_is_another():
    def biases(model):
        return {name for name, _ in model.named_parameters() if name.endswith("bias")}

    for name in ("ModernBertForSequenceClassification", "ModernBertForQuestionAnswering"):
        for model in both(name):
            assert biases(model) == {"classifier.bias"}
        for model in both(name, classifier_bias=True):
            assert biases(model) == {"classifier.bias", "head.dense.bias"}
    for model in both("ModernBertForMaskedLM"):
        assert biases(model) == {"decoder.bias"}


def test_question_answering_counts_padding_in_its_softmax():
    batch = make_batch((5, 60))
    where = {"start_positions": torch.tensor([1, 7]), "end_positions": torch.tensor([3, 40])}
    ours, theirs = both("ModernBertForQuestionAnswering")

    def loss(model, row, length):
        one = {key: value[row : row + 1, :length] for key, value in batch.items()}
        return model(**one, **{key: value[row : row + 1] for key, value in where.items()}).loss

    crowded = loss(ours, 0, 60)  # 55 places of padding beside a text of 5
    close(crowded, loss(theirs, 0, 60))
    assert crowded > loss(ours, 0, 5) + 0.1
    alone = (loss(ours, 0, 5) + loss(ours, 1, 60)) / 2
    close(ours(**pack(batch), **where).loss, alone)


def test_the_masked_loss_is_a_mean_of_labelled_tokens():
    ours, theirs = both("ModernBertForMaskedLM")
    parts = [make_batch((lengths,), seed=lengths) for lengths in (9, 150)]
    labels = [make_labels("ModernBertForMaskedLM", part)["labels"] for part in parts]
    counts = [int((x != -100).sum()) for x in labels]
    losses = [ours(**p, labels=x).loss for p, x in zip(parts, labels, strict=True)]
    for loss, part, x in zip(losses, parts, labels, strict=True):
        close(loss, theirs(**part, labels=x).loss)
    exact = sum(c * loss for c, loss in zip(counts, losses, strict=True)) / sum(counts)
    # Two steps of accumulation: the mean of means counts the short text's tokens for more.
    assert (exact - sum(losses) / 2).abs() > 1e-3
    summed = [
        theirs(**p, labels=x, num_items_in_batch=sum(counts)).loss
        for p, x in zip(parts, labels, strict=True)
    ]
    close(sum(summed), exact)
    with pytest.raises(TypeError, match="num_items_in_batch"):
        ours(**parts[0], labels=labels[0], num_items_in_batch=1)


def test_sparse_prediction_is_off_until_asked_for():
    batch = make_batch((9, 30))
    labels = make_labels("ModernBertForMaskedLM", batch)["labels"]
    for sparse, shape in ((None, (2, 30, 97)), (True, (int((labels != -100).sum()), 97))):
        options = {} if sparse is None else {"sparse_prediction": sparse}
        for model in both("ModernBertForMaskedLM", **options):
            assert model(**batch, labels=labels).logits.shape == shape


def test_labels_do_not_settle_the_problem_type():
    ours, theirs = both("ModernBertForSequenceClassification", num_labels=3)
    batch, classes = make_batch((5, 9)), torch.tensor([1, 2])
    many = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    close(ours(**batch, labels=classes).loss, theirs(**batch, labels=classes).loss)
    assert ours.config.problem_type is None
    assert theirs.config.problem_type == "single_label_classification"
    logits = ours(**batch).logits
    close(ours(**batch, labels=many).loss, F.binary_cross_entropy_with_logits(logits, many))
    with pytest.raises(ValueError):
        theirs(**batch, labels=many)


# ---- training

SIZES = {
    **BASE,
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_hidden_layers": 8,
    "initializer_range": 0.02,
}


def fresh(name: str):
    """Two models with starting values, ours and transformers'."""
    torch.manual_seed(0)
    return [
        getattr(heads, name)(ModernBertConfig(**SIZES)),
        getattr(transformers, name)(transformers.ModernBertConfig(**SIZES)),
    ]


def test_starting_values_have_the_spread_of_transformers():
    small = 0.02 / math.sqrt(2 * 8)
    for name in ("ModernBertForMaskedLM", "ModernBertForSequenceClassification"):
        for model in fresh(name):
            stated = {
                "model.embeddings.tok_embeddings.weight": 0.02,
                "model.layers.3.attn.Wqkv.weight": 0.02,
                "model.layers.3.mlp.Wi.weight": 0.02,
                "model.layers.3.attn.Wo.weight": small,
                "model.layers.3.mlp.Wo.weight": small,
                "head.dense.weight": small,  # the original code: 0.02 in the masked model
            }
            if "Masked" not in name:
                stated["classifier.weight"] = 128**-0.5
            parameters = dict(model.named_parameters())
            for parameter, std in stated.items():
                # A normal distribution cut at two standard deviations keeps 0.8796 of its own.
                x = parameters[parameter]
                assert x.abs().max() <= 2 * std
                rows = 0.15 if "classifier" in parameter else 0.03  # the classifier has 256 values
                assert x.std().item() == pytest.approx(0.8796 * std, rel=rows)
            # The row of [PAD] is drawn like the others, though the embedding knows its padding.
            assert model.model.embeddings.tok_embeddings.weight[0].std() > 0.01


def test_the_cut_must_be_stated():
    for config_class, error in (
        (ModernBertConfig, ConfigError),
        (transformers.ModernBertConfig, Exception),
    ):
        assert config_class().initializer_cutoff_factor == 2
        with pytest.raises(error, match="initializer_cutoff_factor"):
            config_class(initializer_cutoff_factor=None)


def test_masking_spares_special_tokens(tokenizer):
    special = torch.tensor(pretraining.special_ids(tokenizer))
    settings = {"special_ids": special.tolist(), "vocab_size": len(tokenizer)}
    ids = torch.full((400, 100), 5)
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    masked, labels = pretraining.mask_tokens(
        ids,
        torch.Generator().manual_seed(0),
        mask_token_id=tokenizer.mask_token_id,
        **settings,
    )
    chosen = labels != -100
    assert not chosen[:, 0].any() and not chosen[:, -1].any()
    assert chosen[:, 1:-1].float().mean() == pytest.approx(0.3, abs=0.02)
    hidden, kept = masked[chosen] == tokenizer.mask_token_id, masked[chosen] == 5
    assert hidden.float().mean() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean() == pytest.approx(0.1, abs=0.02)
    drawn, _ = pretraining.mask_tokens(
        torch.full((200, 1000), 5),
        torch.Generator().manual_seed(0),
        mask_token_id=tokenizer.mask_token_id,
        **settings,
        probability=1.0,
        mask_share=0.0,
        random_share=1.0,
    )
    assert not torch.isin(drawn, special).any()
    assert drawn.unique().numel() == len(tokenizer) - len(special)  # and each other token is


def test_transformers_masks_half_as_much_and_may_draw_special_tokens(tokenizer):
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, mask_token="[MASK]", pad_token="[PAD]"
    )
    collate = transformers.DataCollatorForLanguageModeling
    assert (collate(fast).mlm_probability, collate(fast).mask_replace_prob) == (0.15, 0.8)
    # All chosen, none hidden, all drawn at random: 200,000 draws from 8,192 ids.
    draw = collate(
        fast, mlm_probability=1.0, mask_replace_prob=0.0, random_replace_prob=1.0, seed=0
    )
    drawn = draw([[5] * 1000] * 200)["input_ids"]
    assert torch.isin(drawn, torch.tensor(pretraining.special_ids(tokenizer))).any()


def test_the_embedding_does_not_decay():
    ours, theirs = fresh("ModernBertForMaskedLM")
    names = {id(parameter): name for name, parameter in ours.named_parameters()}
    decayed, spared = (
        {names[id(p)] for p in group["params"]}
        for group in pretraining.parameter_groups(ours, 1e-5)
    )
    embedding = "model.embeddings.tok_embeddings.weight"
    assert {n for n in spared if "norm" not in n and not n.endswith("bias")} == {embedding}
    usual = transformers.Trainer.get_decay_parameter_names(None, theirs)
    assert {*usual} - {"decoder.weight"} == decayed | {embedding}  # the decoder is the embedding


def test_pytorch_multiplies_the_decay_by_the_learning_rate():
    ours, _ = fresh("ModernBertForMaskedLM")
    decayed, spared = pretraining.parameter_groups(ours, weight_decay=0.1)
    before = [group["params"][0].detach().clone() for group in (decayed, spared)]
    for parameter in ours.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW([decayed, spared], lr=0.5).step()
    # Fully decoupled, at the peak of the schedule: 1 − 0.1.
    close(decayed["params"][0], before[0] * (1 - 0.5 * 0.1), atol=1e-7)
    assert torch.equal(spared["params"][0], before[1])


def test_the_rate_falls_to_zero_and_theirs_to_a_thousandth():
    def ours(share):  # of the way through the fall
        return pretraining.warmup_stable_decay(share * 50, warmup=0, decay=50, total=50)

    def original(share, end=0.001):
        return max(end, end + (1 - end) * (1 - math.sqrt(share)))

    assert (ours(1), original(1)) == (0, 0.001)
    for share in (0.01, 0.3, 0.9):
        assert abs(ours(share) - original(share)) <= 0.001
    steps = {"num_warmup_steps": 0, "num_stable_steps": 0, "num_decay_steps": 50}
    for more, expected in (
        ({}, (1 + math.cos(math.pi * 0.3)) / 2),
        ({"decay_type": "1-sqrt"}, ours(0.3)),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = transformers.get_wsd_schedule(optimizer, **steps, **more).lr_lambdas[0]
        assert theirs(15) == pytest.approx(expected) and theirs(50) == 0


def test_a_batch_grows_in_fewer_and_larger_steps():
    first, full, tokens = 96, 576, 900_000  # sequences of one token, for one process

    sizes = range(first, full)
    whole = sum(sizes)
    thresholds = [tokens * part / whole for part in itertools.accumulate(sizes)]

    def original(seen):
        return next((s for s, t in zip(sizes, thresholds, strict=True) if seen < t), full)

    def count(size_after):
        steps, seen = {}, 0
        while seen < tokens:
            size = size_after(seen)
            steps[size] = steps.get(size, 0) + 1
            seen += size
        return steps

    ours = count(lambda seen: pretraining.batch_size(seen, start=first, full=full, warmup=tokens))
    theirs = count(original)
    assert [*ours] == [96, 192, 288, 384, 480] and [*theirs] == [*range(96, 576)]
    for steps in (ours, theirs):
        assert max(steps.values()) - min(steps.values()) <= 1


def test_tiling_row_by_row_is_head_by_head_from_base_to_large():
    def whole_heads(new, old, head_dim):
        """Where each row comes from, if heads are tiled: as rows of the small matrix."""
        heads = pretraining.wrap(new // head_dim, old // head_dim) * head_dim
        return (heads[:, None] + torch.arange(head_dim)).flatten()

    assert torch.equal(pretraining.wrap(1024, 768), whole_heads(1024, 768, 64))
    # 192 to 256 with heads of 64: 32 rows, half a head, would stand before the first.
    rows = pretraining.wrap(256, 192)
    assert rows[:64].tolist() == [*range(160, 192), *range(32)]
    small, large = (
        heads.ModernBertForMaskedLM(
            ModernBertConfig(
                vocab_size=11,
                hidden_size=size,
                num_attention_heads=size // 64,
                num_hidden_layers=1,
                intermediate_size=8,
                pad_token_id=0,
            )
        )
        for size in (192, 256)
    )
    pretraining.tile(small, large)
    found, source = (m.model.layers[0].attn.Wqkv.weight for m in (large, small))
    columns = pretraining.wrap(256, 192)
    assert torch.equal(found[:256], source[whole_heads(256, 192, 64)][:, columns])


# ---- tokenizer and configs


def test_the_vocabulary_ends_with_83_unused_tokens(reference):
    tokenizer = Tokenizer.from_pretrained(reference / "ModernBERT-base")
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert len(tokens) == 50_368 == 64 * 787
    assert tokens[50_280:50_285] == ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    assert tokens[50_285:] == [f"[unused{i}]" for i in range(83)]
    # Unused is not unreachable: the text itself can name such a token.
    assert tokenizer.encode("a [unused82]", add_special_tokens=False)[-1] == 50_367


def test_the_rows_of_unused_tokens_are_scored(published):
    with torch.device("meta"):
        model = heads.ModernBertForMaskedLM(
            ModernBertConfig.from_dict(published["ModernBERT-base"])
        )
    assert model.decoder.weight.shape == (50_368, 768)
    assert model.decoder.bias.shape == (50_368,)


def check_mask(tokenizer):
    left = tokenizer.encode("Paris is [MASK].", add_special_tokens=False)
    none = tokenizer.encode("Paris is[MASK].", add_special_tokens=False)
    right = tokenizer.encode("Paris is [MASK] .", add_special_tokens=False)
    assert left == none != right
    assert len(right) == len(left)  # " ." in the place of "."
    sep = tokenizer.encode("Paris is [SEP].", add_special_tokens=False)
    assert len(sep) == len(left) + 1  # the other special tokens leave the space alone


def test_mask_swallows_the_space_on_its_left(tokenizer):
    check_mask(tokenizer)


def test_the_published_mask_swallows_the_space_too(reference):
    check_mask(Tokenizer.from_pretrained(reference / "ModernBERT-base"))


def test_there_are_no_token_types(tokenizer):
    assert {*tokenizer("one", "two")} == {"input_ids", "attention_mask"}
    for name in CLASSES:
        batch = make_batch((5, 9), choices=2 if name == "ModernBertForMultipleChoice" else None)
        ours, theirs = both(name)
        types = batch["attention_mask"]
        with pytest.raises(TypeError, match="token_type_ids"):
            ours(**batch, token_type_ids=types)
        for a, b in zip(
            scores(theirs(**batch, token_type_ids=types)), scores(theirs(**batch)), strict=True
        ):
            assert torch.equal(a, b)


def test_the_longest_text_is_the_configs(published):
    for name, values in published.items():
        assert values["max_position_embeddings"] == (7_999 if name in ETTIN else 8_192)
    ids, bounds = torch.ones(8_000, dtype=torch.long), torch.tensor([0, 8_000])
    for name, warned in (("ettin-encoder-17m", True), ("ModernBERT-base", False)):
        config = ModernBertConfig.from_dict(published[name])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_inputs(config, ids, None, None, None, bounds)
        assert [str(w.message)[:11] for w in caught] == ["8000 tokens"] * warned


def test_longer_texts_run():
    ours, theirs = both("ModernBertModel", max_position_embeddings=16)
    batch = make_batch((40,))
    with pytest.warns(UserWarning, match="40 tokens in a sequence.* at most 16"):
        mine = ours(**batch).last_hidden_state
    close(mine, theirs(**batch).last_hidden_state)


def test_keys_that_nobody_reads(published):
    base, ettin, mmbert = (published[n] for n in (MODERNBERT[0], ETTIN[0], MMBERT[0]))
    assert base["position_embedding_type"] == "absolute"
    assert ettin["position_embedding_type"] == mmbert["position_embedding_type"] == "sans_pos"
    assert mmbert["cls_token_id"] == mmbert["sep_token_id"] == 1 and mmbert["bos_token_id"] == 2
    unread = {"position_embedding_type": "absolute", "layer_norm_eps": 0.5}
    unread |= {"cls_token_id": 7, "sep_token_id": 7, "bos_token_id": 8, "eos_token_id": 9}
    batch = make_batch((5, 9))
    models = zip(from_files({}), from_files(unread), from_files({"norm_eps": 0.5}), strict=True)
    for plain, with_keys, with_eps in models:
        logits = plain(**batch).logits
        assert torch.equal(with_keys(**batch).logits, logits)
        assert (with_eps(**batch).logits - logits).abs().max() > 1e-3
    kept = ModernBertConfig.from_dict({**mmbert, **unread}).to_dict()
    assert {key: kept[key] for key in unread} == unread


def from_files(extra: dict):
    """Our model and transformers', from parsed config files; equal weights whatever they say."""
    values = {**BASE, "model_type": "modernbert", **extra}
    models = [
        heads.ModernBertForMaskedLM(ModernBertConfig.from_dict(values)),
        transformers.ModernBertForMaskedLM(transformers.ModernBertConfig.from_dict(values)),
    ]
    weights = both("ModernBertForMaskedLM")[0].state_dict()
    for model in models:
        model.load_state_dict(weights, strict=True)
    return [model.eval() for model in models]


def test_parameters_are_counted_to_the_digit(published):
    text = PAGE.read_text("utf-8")
    stated = {"ModernBERT-base": 149, "ModernBERT-large": 395, "mmBERT-small": 140}
    stated["mmBERT-base"] = 307
    for name, values in published.items():
        with torch.device("meta"):
            model = heads.ModernBertForMaskedLM(ModernBertConfig.from_dict(values))
        sizes = {n: p.numel() for n, p in model.named_parameters()}
        encoder = sum(p.numel() for p in model.model.parameters())
        everything = sum(sizes.values())
        assert f"| `{name}` | {encoder:,} | {everything:,} |" in text
        if name in stated:  # the encoder, rounded; the masked model, cut off
            assert round(encoder / 1e6) == everything // 10**6 == stated[name]
        if name == "ModernBERT-base":
            original = everything - sizes["decoder.bias"] - sizes["model.final_norm.weight"]
            assert f"{original:,} for base" in text
    ours, theirs = both("ModernBertForMaskedLM")
    assert theirs.num_parameters() == sum(p.numel() for p in ours.parameters())


# ---- the page itself

SOURCES = ("Paper", "Original code", "`transformers`", "Configs", "Here", "Test")


def rows() -> dict[str, str]:
    """The page's rows, by heading."""
    titles, bodies = [], []
    for part in re.split(r"^### ", PAGE.read_text("utf-8"), flags=re.M)[1:]:
        title, body = part.split("\n", 1)
        titles.append(title)
        bodies.append(re.split(r"^## ", body, flags=re.M)[0])
    return dict(zip(titles, bodies, strict=True))


def row_tests() -> list[str]:
    """The tests of this file that belong to rows, by name."""
    tree = ast.parse(Path(__file__).read_text("utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [n for n in names if n.startswith("test_") and not n.startswith("test_page_")]


def test_page_each_row_hears_every_source():
    assert len(rows()) >= 18
    for title, body in rows().items():
        found = re.findall(r"^\* - (.+)$", body, re.M)
        assert found == [s for s in SOURCES if s != "Configs" or s in found], title


def test_page_each_row_names_its_tests_and_each_test_has_its_row():
    named = []
    for title, body in rows().items():
        here = re.findall(r"`(test_\w+)`", body.split("* - Test")[1])
        assert here, title
        named += here
    assert sorted(named) == sorted(row_tests())


def test_page_states_the_versions_that_run():
    version = transformers.__version__
    assert f"`transformers` {version}." in PAGE.read_text("utf-8")
    assert f"transformers=={version}\n" in (PAGE.parents[1] / ".ci/constraints.txt").read_text()


def test_page_points_at_fixed_versions_of_files():
    text = PAGE.read_text("utf-8")
    files = re.findall(r"https://github\.com/\S+/(?:blob|tree)/(\S+)", text)
    assert len(files) > 60
    for file in files:
        assert re.match(r"([0-9a-f]{40}|v\d+\.\d+\.\d+)/", file), file
    defined = set(re.findall(r"^\[([\w-]+)\]: ", text, re.M))
    used = set(re.findall(r"\]\[([\w-]+)\]|\[([\w-]+)\]\[\]", text))
    assert defined == {a or b for a, b in used}
