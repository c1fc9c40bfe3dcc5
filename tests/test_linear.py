"""A linear layer is a 1 × 1 convolution, and goes that way only where it was measured to pay."""

import pytest
import torch
from parity import BASE
from torch import nn
from torch.nn import functional as F

from modernbert_mini import ModernBertConfig, ModernBertModel, linear
from modernbert_mini.linear import ENOUGH, Linear, convolution_pays, convolve


@pytest.fixture
def on_amd(monkeypatch):
    """As on a processor of AMD with two threads."""
    monkeypatch.setattr(linear, "made_by_amd", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1,), (2, 5), (3, 2, 4)])
def test_the_convolution_is_the_product(shape, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 12), torch.randn(20, 12)
    b = torch.randn(20) if bias else None
    torch.testing.assert_close(convolve(x, weight, b), F.linear(x, weight, b))


def test_rows_that_are_not_side_by_side_in_memory():
    x, weight = torch.randn(12, 40).T, torch.randn(20, 12)
    torch.testing.assert_close(convolve(x, weight), F.linear(x, weight))


def test_the_result_is_laid_out_like_that_of_a_product():
    x, weight = torch.randn(ENOUGH, 12), torch.randn(20, 12)
    assert convolve(x, weight).is_contiguous()


def test_gradients_are_those_of_the_product():
    layer, x = nn.Linear(12, 20), torch.randn(9, 12, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    a, b = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (convolve, F.linear))
    for ours, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_where_it_pays(on_amd):
    assert convolution_pays(torch.zeros(ENOUGH, 3))
    assert convolution_pays(torch.zeros(2, ENOUGH // 2, 3))
    assert not convolution_pays(torch.zeros(ENOUGH - 1, 3))
    assert not convolution_pays(torch.zeros(ENOUGH, 3, dtype=torch.bfloat16))
    assert not convolution_pays(torch.zeros(ENOUGH, 3, device="meta"))
    with torch.enable_grad():
        assert not convolution_pays(torch.zeros(ENOUGH, 3))


@torch.no_grad()
def test_one_thread_or_another_make_of_processor_keep_the_product(on_amd, monkeypatch):
    x = torch.zeros(ENOUGH, 3)
    monkeypatch.setattr(linear, "made_by_amd", lambda: False)
    assert not convolution_pays(x)
    monkeypatch.setattr(linear, "made_by_amd", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not convolution_pays(x)


@torch.no_grad()
def test_without_onednn_the_product_is_kept(on_amd, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not convolution_pays(torch.zeros(ENOUGH, 3))


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("vendor_id : AuthenticAMD\nmodel name : AMD EPYC", True),
        ("vendor_id : GenuineIntel\nmodel name : Intel(R) Xeon(R)", False),
        (None, True),  # no such file: what Python says of the processor counts
    ],
)
def test_who_made_the_processor(tmp_path, monkeypatch, told, expected):
    file = tmp_path / "cpuinfo"
    if told is not None:
        file.write_text(told)
    monkeypatch.setattr(linear, "Path", lambda name: file)
    windows = "AMD64 Family 25 Model 33 Stepping 2, AuthenticAMD"
    monkeypatch.setattr(linear.platform, "processor", lambda: windows)
    assert linear.made_by_amd.__wrapped__() is expected


def test_the_model_is_the_same_either_way(on_amd, monkeypatch):
    torch.manual_seed(0)
    config = ModernBertConfig(**BASE | {"max_position_embeddings": ENOUGH})
    model = ModernBertModel(config).eval()
    ids = torch.randint(3, config.vocab_size, (3, ENOUGH))
    mask = torch.ones_like(ids)
    mask[1, 500:] = 0
    seen = []
    monkeypatch.setattr(linear, "convolve", lambda x, *w: seen.append(len(x)) or convolve(x, *w))
    with torch.no_grad():
        convolved = model(ids, attention_mask=mask).last_hidden_state
    assert len(seen) >= 4 * config.num_hidden_layers  # each matrix, some in chunks
    seen.clear()
    multiplied = model(ids, attention_mask=mask).last_hidden_state.detach()
    assert not seen  # with gradients
    torch.testing.assert_close(convolved, multiplied, atol=1e-5, rtol=0)


def test_a_checkpoint_sees_a_linear_layer():
    layer = Linear(3, 5, bias=False)
    assert isinstance(layer, nn.Linear) and list(layer.state_dict()) == ["weight"]
