"""swap changes what it says and nothing else; explain_divergence names the first culprit."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modernbert_mini import ModernBertConfig, attention, geglu, heads, model, rope
from modernbert_mini.transplant import FUNCTIONS, MODULES, explain_divergence, swap

IDS = torch.tensor([[5, 9, 2, 14, 3, 8, 30, 31, 7], [6, 1, 4, 4, 0, 0, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


@pytest.fixture
def base():
    config = ModernBertConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=5,
        num_attention_heads=3,
        local_attention=4,
        initializer_range=0.3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return heads.ModernBertForMaskedLM(config).eval()


@torch.no_grad()
def scores(net):
    return net(**BATCH).logits[BATCH["attention_mask"].bool()]


def no_turn(x, cos, sin):
    return x


def other_half(self, x):
    a, b = self.Wi(x).chunk(2, dim=-1)
    return self.Wo(F.gelu(b) * a)


class Mlp(nn.Module):
    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.Wi = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.Wo = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        a, b = self.Wi(x).chunk(2, dim=-1)
        return self.Wo(F.gelu(a) * b)


# ---- swap ----

SAME = {
    "apply_rotary": rope.apply_rotary,
    "rotate_half": rope.rotate_half,
    "rotary_table": rope.rotary_table,
    "inverse_frequencies": rope.inverse_frequencies,
    "gated_linear_unit": geglu.gated_linear_unit,
    "eager_attention": attention.eager_attention,
    "window_mask": lambda length, half_window: (
        (torch.arange(length)[:, None] - torch.arange(length)).abs() <= half_window
    ),
    "padded_mask": model.padded_backends.__globals__["padded_mask"],
    "embeddings": model.Embeddings,
    "layer": model.EncoderLayer,
    "attn_norm": nn.LayerNorm,
    "attn": attention.Attention,
    "mlp_norm": nn.LayerNorm,
    "mlp": geglu.GeGLU,
    "final_norm": nn.LayerNorm,
    "head": heads.PredictionHead,
}
WRONG = {
    "apply_rotary": no_turn,
    "rotate_half": lambda x: x.flip(-1),
    "rotary_table": lambda positions, inv_freq: rope.rotary_table(positions + positions, inv_freq),
    "inverse_frequencies": lambda head_dim, theta: torch.ones(head_dim // 2),
    "gated_linear_unit": lambda x, activation: x.chunk(2, dim=-1)[0],
    "eager_attention": lambda q, k, v: (v, None),
    "window_mask": lambda n, half_window: torch.ones(n, n, dtype=torch.bool),
    "padded_mask": lambda *_: None,
    "embeddings": lambda self, ids, embeds: self.tok_embeddings(ids),
    "layer": lambda self, x, cos, sin, attend: (x, None),
    "attn_norm": lambda self, x: x,
    "attn": lambda self, x, cos, sin, attend: (x, None),
    "mlp_norm": lambda self, x: x,
    "mlp": other_half,
    "final_norm": lambda self, x: x,
    "head": lambda self, x: x,
}


def test_every_part_is_tried():
    assert set(SAME) == set(WRONG) == {*FUNCTIONS, *MODULES}


@pytest.mark.parametrize("part", SAME)
def test_the_packages_own_part_changes_nothing(base, part):
    torch.testing.assert_close(scores(swap(base, part, SAME[part])), scores(base))


@pytest.mark.parametrize("part", WRONG)
def test_another_part_changes_the_new_model_and_not_the_old(base, part):
    before = scores(base)
    changed = swap(base, part, WRONG[part])
    assert not torch.allclose(scores(changed), before, atol=1e-3)
    assert scores(base).equal(before)
    assert explain_divergence(changed, base, BATCH).first


def test_the_weights_are_shared(base):
    changed = swap(base, "mlp", Mlp)
    assert changed.model.layers[2].mlp.Wi.weight is base.model.layers[2].mlp.Wi.weight
    assert changed.decoder.weight is base.model.embeddings.tok_embeddings.weight
    assert {id(p) for p in changed.parameters()} == {id(p) for p in base.parameters()}


def test_swaps_add_up(base):
    both = swap(swap(base, "rope", no_turn), "mlp", other_half)
    turned = swap(swap(base, "mlp", other_half), "rope", no_turn)
    torch.testing.assert_close(scores(both), scores(turned))
    for one in (swap(base, "rope", no_turn), swap(base, "mlp", other_half)):
        assert not torch.allclose(scores(one), scores(both), atol=1e-3)
    copied = copy.deepcopy(both)
    assert scores(copied).equal(scores(both))


def test_only_the_layers_that_are_named(base):
    one = swap(base, "mlp", other_half, layers=[3])
    assert explain_divergence(one, base, BATCH).first == "layers.3.mlp"
    one = swap(base, "rope", no_turn, layers=[2])
    assert explain_divergence(one, base, BATCH).first == "layers.2.attn"


def test_layer_0_gets_a_norm_only_when_named(base):
    assert isinstance(swap(base, "attn_norm", nn.LayerNorm).model.layers[0].attn_norm, nn.Identity)
    one = swap(base, "attn_norm", nn.LayerNorm, layers=[0])
    assert isinstance(one.model.layers[0].attn_norm, nn.LayerNorm)


def test_the_mode_and_the_gradient_go_through(base):
    assert not any(m.training for m in swap(base, "mlp", Mlp).modules())
    changed = swap(base.train(), "mlp", Mlp)
    assert changed.model.layers[1].mlp.training
    changed(**BATCH).logits.sum().backward()
    assert base.model.layers[1].mlp.Wi.weight.grad.abs().sum() > 0


def test_checkpointed_layers_run_the_learners_part_again(base):
    changed = swap(base, "rope", no_turn).train()
    wanted = torch.autograd.grad(changed(**BATCH).logits.square().mean(), changed.parameters())
    changed.gradient_checkpointing_enable()
    found = torch.autograd.grad(changed(**BATCH).logits.square().mean(), changed.parameters())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_an_encoder_alone_has_parts_and_no_head(base):
    encoder = base.model
    changed = swap(encoder, "rope", no_turn)
    assert explain_divergence(changed, encoder, BATCH).first == "layers.0.attn"
    with pytest.raises(ValueError, match="no head"):
        swap(encoder, "head", heads.PredictionHead)


class Renamed(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.up = nn.Linear(hidden_size, hidden_size)


class Greedy(nn.Module):
    def __init__(self, hidden_size, temperature):
        super().__init__()


@pytest.mark.parametrize(
    ("part", "own", "layers", "said"),
    [
        ("wheel", no_turn, None, "no part 'wheel'"),
        ("rope", None, None, "a function or a class is expected"),
        ("mlp", Renamed, None, "Renamed has the weights up.weight .24, 24."),
        ("mlp", Greedy, None, "asks for 'temperature'"),
        ("mlp", Mlp, [5], "no layer 5; the model has layers 0 to 4"),
        ("window_mask", no_turn, [1], "called once for all layers"),
        ("final_norm", nn.LayerNorm, [1], "there is one final_norm"),
    ],
)
def test_what_cannot_be_swapped_is_refused(base, part, own, layers, said):
    with pytest.raises(ValueError, match=said):
        swap(base, part, own, layers)


# ---- explain_divergence ----


def test_a_model_agrees_with_itself(base, capsys):
    result = explain_divergence(swap(base, "mlp", Mlp), base, BATCH)
    assert result.first is None and all(s.leaving == 0 for s in result.stages)
    assert "agree: max |Δ| is exactly 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "layers", "first"),
    [
        ("embeddings", None, "embeddings"),
        ("attn_norm", [2], "layers.2.attn_norm"),
        ("mlp_norm", [4], "layers.4.mlp_norm"),
        ("gated_linear_unit", [1], "layers.1.mlp"),
        ("rotate_half", None, "layers.0.attn"),
        ("rotary_table", None, "rotary table of layers.0"),
        ("window_mask", None, "mask of layers.1"),
        ("final_norm", None, "final_norm"),
        ("head", None, "head"),
    ],
)
def test_the_first_culprit_is_named(base, part, layers, first, capsys):
    result = explain_divergence(swap(base, part, WRONG[part], layers), base, BATCH)
    assert result.first == first
    printed = capsys.readouterr().out
    (marked,) = [line for line in printed.splitlines() if "←" in line]
    assert marked.startswith(first) and result.verdict in printed


def test_it_says_between_which_parts_of_a_module_to_look(base):
    said = explain_divergence(swap(base, "rope", no_turn), base, BATCH).verdict
    assert "layers.0.attn.Wqkv still agrees, and layers.0.attn.Wo gets something else" in said


def test_a_forgotten_residual_is_the_layers_fault(base):
    def forgets(self, x, cos, sin, attend):
        mixed, weights = self.attn(self.attn_norm(x), cos, sin, attend)
        return mixed + self.mlp(self.mlp_norm(mixed)), weights

    result = explain_divergence(swap(base, "layer", forgets, layers=[2]), base, BATCH)
    assert result.first == "layers.2"
    assert "layers.2.attn still agrees, and layers.2.mlp_norm gets" in result.verdict


def test_another_pattern_is_no_modules_fault(base, tmp_path):
    base.save_pretrained(tmp_path)
    shifted = ["sliding_attention", *base.config.layer_types[:-1]]
    other = heads.ModernBertForMaskedLM.from_pretrained(tmp_path, layer_types=shifted)
    result = explain_divergence(other, base, BATCH)
    assert result.first == "kind of layers.0" and "layer_types" in result.verdict


def test_weights_that_differ_are_named(base):
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.model.layers[1].attn.Wqkv.weight[0, 0] += 1
    result = explain_divergence(changed, base, BATCH)
    assert result.first == "layers.1.attn.Wqkv"
    assert "layers.1.attn.Wqkv.weight differs: max |Δ| 1.0e+00" in result.verdict


def test_the_tolerance_decides(base):
    def a_little_more(self, x):
        return self.Wo(geglu.gated_linear_unit(self.Wi(x))) + 1e-4

    changed = swap(base, "mlp", a_little_more, layers=[1])
    assert explain_divergence(changed, base, BATCH).first == "layers.1.mlp"
    assert explain_divergence(changed, base, BATCH, tolerance=0.01).first is None


def test_nan_is_a_difference(base):
    changed = swap(base, "mlp", lambda self, x: x * float("nan"), layers=[3])
    assert explain_divergence(changed, base, BATCH).first == "layers.3.mlp"


def test_another_length_is_a_difference(base):
    changed = swap(base, "mlp", lambda self, x: self.Wo(self.Wi(x)[..., :20])[..., :1], layers=[3])
    assert explain_divergence(changed, base, BATCH).first == "layers.3.mlp"


def test_padding_positions_do_not_count(base):
    def elsewhere(self, x):
        x = x.clone()
        x[1, 4:, 0] += 5
        return F.layer_norm(x, x.shape[-1:], self.weight, eps=self.eps)

    assert explain_divergence(swap(base, "final_norm", elsewhere), base, BATCH).first is None
    alone = {"input_ids": IDS}
    assert explain_divergence(swap(base, "final_norm", elsewhere), base, alone).first


def test_modes_and_hooks_are_left_as_they_were(base):
    base.train()
    base.model.layers[0].eval()
    explain_divergence(base, base, BATCH)
    assert base.training and not base.model.layers[0].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_texts_go_through_minis_tokenizer(base):
    mini = heads.ModernBertForMaskedLM.from_pretrained("mini")
    changed = swap(mini, "rope", no_turn)
    for text in ("Plants [MASK].", ["Plants [MASK].", "One more text, a longer one."]):
        assert explain_divergence(changed, mini, text).first == "layers.0.attn"
    with pytest.raises(ValueError, match="knows 40 tokens"):
        explain_divergence(base, base, "A text.")


def test_against_transformers(base, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    base.save_pretrained(tmp_path)
    theirs = transformers.ModernBertForMaskedLM.from_pretrained(tmp_path).eval()
    result = explain_divergence(base, theirs, BATCH)
    assert result.first is None and len(result.stages) > 40
    assert any(s.name == "mask of layers.1" for s in result.stages)
    for part, first in (("mlp", "layers.0.mlp"), ("apply_rotary", "layers.0.attn")):
        assert explain_divergence(swap(base, part, WRONG[part]), theirs, BATCH).first == first
    narrow = swap(base, "window_mask", lambda n, w: torch.eye(n, dtype=torch.bool))
    first = explain_divergence(narrow, theirs, BATCH).first
    assert first == "mask of layers.1"


def test_models_without_a_common_layer_are_refused(base):
    with pytest.raises(ValueError, match="no layer in common"):
        explain_divergence(base, Stranger(), BATCH)


class Stranger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(40, 24)

    def forward(self, input_ids, attention_mask):
        return self.embeddings(input_ids)
