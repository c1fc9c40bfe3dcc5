"""The feed-forward block of ModernBERT: a gated linear unit with GELU, "GeGLU".

Chapter 4 builds this module. Source: Shazeer, "GLU Variants Improve Transformer",
arXiv:2002.05202, section 2.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .linear import Linear

# The names that published configs use. "gelu" is the exact one, x·Φ(x) through erf; the tanh
# approximation goes by two names and differs from it by up to 5e-4 a call.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def gated_linear_unit(
    x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu
) -> torch.Tensor:
    """Split the last dimension in two halves, activate the first and multiply by the second.

    Args:
        x: (..., 2·I), any floating dtype.
        activation: applied to the first half, elementwise.

    Returns:
        (..., I): ``activation(x[..., :I]) * x[..., I:]``, dtype of ``x``.
    """
    signal, gate = x.chunk(2, dim=-1)  # 2 × (..., I)
    return activation(signal) * gate


class GeGLU(nn.Module):
    """Feed-forward block: expand to 2·I, gate down to I, project back to C.

    Args:
        hidden_size: C.
        intermediate_size: I, the width after the gate.
        activation: a key of ``ACTIVATIONS``.
        bias: whether both projections have a bias; published models have none.
        dropout: probability, applied between gate and output projection.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "gelu",
        bias: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        # One matrix for both halves: one product instead of two.
        self.Wi = Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.act = ACTIVATIONS[activation]
        self.drop = nn.Dropout(dropout)
        self.Wo = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., C) to (..., C), token by token."""
        x = self.Wi(x)  # (..., 2·I)
        x = gated_linear_unit(x, self.act)  # (..., I)
        return self.Wo(self.drop(x))
