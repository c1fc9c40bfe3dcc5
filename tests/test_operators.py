"""The operator that a compiled graph calls for its global layers."""

import pytest
import torch

from modernbert_mini.alternating_attention import packed_backends, packed_sdpa_attention
from modernbert_mini.operators import compiled_backends, compiled_sdpa_attention, forward_op

LENGTHS = [5, 1, 70, 12]
HALF_WINDOWS = {"full_attention": None, "sliding_attention": 8}


@pytest.fixture
def stream():
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, sum(LENGTHS), 16, requires_grad=True) for _ in range(3))
    return q, k, v, torch.tensor([0, *LENGTHS]).cumsum(0).int()


def gradients(attend, *inputs):
    out = attend(*inputs)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def test_it_is_a_whole_operator(stream):
    torch.library.opcheck(forward_op, stream)


def test_numbers_and_gradients_are_those_of_sdpa(stream):
    *inputs, cu_seqlens = stream
    plain = gradients(lambda *qkv: packed_sdpa_attention(*qkv, lengths=LENGTHS)[0], *inputs)
    whole = gradients(lambda *qkv: compiled_sdpa_attention(*qkv, cu_seqlens=cu_seqlens)[0], *inputs)
    for a, b in zip(whole, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", HALF_WINDOWS)
def test_a_compiled_graph_gets_the_same_backends(stream, kind):
    *inputs, cu_seqlens = stream
    plain, whole = (
        packed_backends("sdpa", cu_seqlens, HALF_WINDOWS),
        compiled_backends(cu_seqlens, HALF_WINDOWS, sum(LENGTHS)),
    )
    a, b = (backends[kind](*inputs, dropout=0.0)[0] for backends in (plain, whole))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_dropout_is_refused(stream):
    *inputs, cu_seqlens = stream
    with pytest.raises(NotImplementedError, match="attention_dropout"):
        compiled_sdpa_attention(*inputs, cu_seqlens=cu_seqlens, dropout=0.1)
