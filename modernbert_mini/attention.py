"""Multi-head self-attention, by hand and by PyTorch's fused kernel.

Chapter 5 builds this module. Source: Vaswani et al., "Attention Is All You Need",
arXiv:1706.03762, section 3.2. Every function takes tensors whose last three dimensions are
heads, length and head dimension, so that a padded batch (B, H, L, D) and a packed stream
(H, N, D) go through the same code.
"""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from .linear import Linear
from .rope import apply_rotary


class Attend(Protocol):
    """What ``Attention`` needs from a backend: queries, keys and values in, values mixed out."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


def eager_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: scores, softmax, weighted mean.

    Args:
        q, k, v: (..., H, L, D), any floating dtype.
        mask: bool, broadcastable to (..., H, L, L); True where a query may see a key.
        dropout: probability of dropping a weight.

    Returns:
        The mixed values (..., H, L, D) and the weights (..., H, L, L), dtype of ``q``.
    """
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # (..., H, L, L)
    if mask is not None:
        # The most negative number instead of −inf: a query that may see no key at all, which
        # only padding can be, then gets a plain mean and not NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, lowest)
    # Summed in half precision, thousands of small exponentials would vanish one by one. PyTorch's
    # softmax sums in float32 anyway; here it is said, since one written by hand would not.
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=dropout, training=dropout > 0)
    return weights @ v, weights


def sdpa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """Attention by ``torch.nn.functional.scaled_dot_product_attention``.

    The same arguments and numbers as ``eager_attention``; it never holds all the weights, so
    it cannot return them. On a CPU it is fast with four dimensions, (B, H, L, D), and slow with
    three. Where a query may see no key, its result is 0.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None


class Attention(nn.Module):
    """Self-attention with rotary positions; the backend comes in as an argument.

    Args:
        hidden_size: C, a multiple of ``num_heads``.
        num_heads: H.
        bias: whether both projections have a bias; published models have none.
        dropout: probability, for the weights and for the output.
    """

    def __init__(self, hidden_size: int, num_heads: int, bias: bool = False, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.Wqkv = Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.Wo = Linear(hidden_size, hidden_size, bias=bias)
        self.out_drop = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Let every token look at the tokens that ``attend`` shows it.

        Args:
            x: (..., L, C).
            cos, sin: float32, broadcastable to (..., H, L, D).
            attend: a backend with its mask already bound.

        Returns:
            (..., L, C), and the weights (..., H, L, L) where the backend has them.
        """
        qkv = self.Wqkv(x)  # (..., L, 3·C)
        # The rows of Wqkv are all queries, then all keys, then all values, head by head.
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # (..., L, 3, H, D)
        qkv = qkv.transpose(-2, -4)  # (..., H, 3, L, D)
        q, k, v = qkv.unbind(dim=-3)  # 3 × (..., H, L, D)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        out, weights = attend(q, k, v, dropout=self.dropout if self.training else 0.0)
        out = out.transpose(-2, -3).flatten(-2)  # (..., L, C)
        return self.out_drop(self.Wo(out)), weights
