"""What ``torch.compile`` has to take whole: attention that must know how long each sequence is.

Chapter 14 builds this module. A graph is traced for all batches at once, so it cannot hold a loop
over the sequences of one of them. An operator can: the graph calls it and does not look inside.
Source: PyTorch, "Custom operators", https://docs.pytorch.org/docs/stable/library.html.
"""

from functools import partial

import torch
from torch import Tensor

from .alternating_attention import band_mask, banded_attention, packed_sdpa_attention
from .attention import Attend


def attend_globally(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``packed_sdpa_attention``, with lengths that it looks up itself."""
    return packed_sdpa_attention(q, k, v, lengths=cu_seqlens.diff().tolist())[0].contiguous()


def attend_backwards(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients, written out: inside an operator PyTorch keeps no record to go back over."""
    lengths, scale = cu_seqlens.diff().tolist(), q.shape[-1] ** -0.5
    parts = []
    for g, q_, k_, v_ in zip(*(x.split(lengths, dim=-2) for x in (grad, q, k, v)), strict=True):
        weights = (q_ @ k_.mT * scale).softmax(dim=-1)  # (H, L, L)
        change = g @ v_.mT  # (H, L, L)
        # A softmax passes on only what differs from the mean: one weight grows at others' cost.
        change = weights * (change - (weights * change).sum(dim=-1, keepdim=True)) * scale
        parts.append((change @ k_, change.mT @ q_, weights.mT @ g))
    return tuple(torch.cat(x, dim=-2) for x in zip(*parts, strict=True))


forward_op = torch.library.custom_op("modernbert_mini::sdpa", attend_globally, mutates_args=())
backward_op = torch.library.custom_op(
    "modernbert_mini::sdpa_backward", attend_backwards, mutates_args=()
)


@forward_op.register_fake
def _(q, k, v, cu_seqlens):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@backward_op.register_fake
def _(grad, q, *rest):
    return tuple(torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3))


def save_for_backward(ctx, inputs, output) -> None:
    """Keep the inputs; the weights are too large to keep."""
    ctx.save_for_backward(*inputs)


def gradients(ctx, grad) -> tuple:
    """Those of q, k and v; boundaries have none."""
    return *backward_op(grad, *ctx.saved_tensors), None


forward_op.register_autograd(gradients, setup_context=save_for_backward)


def compiled_sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, dropout: float = 0.0
) -> tuple[Tensor, None]:
    """Global attention over a packed stream (H, N, D), as one operator of a compiled graph."""
    if dropout:
        raise NotImplementedError("attention_dropout over a packed stream under torch.compile")
    return forward_op(q, k, v, cu_seqlens), None


def compiled_backends(
    cu_seqlens: Tensor, half_windows: dict[str, int | None], num_tokens: int
) -> dict[str, Attend]:
    """As ``packed_backends("sdpa", …)``, in a graph that fits batches of all lengths."""
    return {
        kind: partial(compiled_sdpa_attention, cu_seqlens=cu_seqlens)
        if half_window is None
        else partial(banded_attention, mask=band_mask(cu_seqlens, half_window, num_tokens))
        for kind, half_window in half_windows.items()
    }
