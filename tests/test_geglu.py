import math

import pytest
import torch
from torch import nn

from modernbert_mini.geglu import ACTIVATIONS, GeGLU, gated_linear_unit


@pytest.fixture
def x():
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


def test_first_half_is_activated_and_second_half_gates():
    x = torch.tensor([1.0, -2.0, 10.0, 100.0])
    out = gated_linear_unit(x, torch.relu)
    assert out.tolist() == [10.0, 0.0]


def test_a_closed_gate_lets_nothing_through(x):
    x[..., 6:] = 0
    assert (gated_linear_unit(x) == 0).all()


def test_gelu_is_the_exact_one():
    x = torch.linspace(-4, 4, 101)
    exact = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    torch.testing.assert_close(ACTIVATIONS["gelu"](x), exact, atol=1e-6, rtol=0)
    assert (ACTIVATIONS["gelu_new"](x) - exact).abs().max() > 1e-4


def test_block_keeps_the_shape_and_works_token_by_token(x):
    block = GeGLU(12, 7)
    out = block(x)
    assert out.shape == x.shape
    torch.testing.assert_close(block(x[:, 2:3]), out[:, 2:3])


@pytest.mark.parametrize("bias", [False, True])
def test_block_is_its_formula(x, bias):
    block = GeGLU(12, 7, activation="silu", bias=bias)
    signal, gate = block.Wi(x).split(7, dim=-1)
    torch.testing.assert_close(block(x), block.Wo(nn.functional.silu(signal) * gate))
    assert len(list(block.parameters())) == (4 if bias else 2)


def test_dropout_acts_in_training_only(x):
    block = GeGLU(12, 64, dropout=0.5)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_those_of_transformers(name):
    theirs = pytest.importorskip("transformers.activations").ACT2FN[name]
    x = torch.linspace(-5, 5, 201)
    torch.testing.assert_close(ACTIVATIONS[name](x), theirs(x), atol=1e-6, rtol=0)
