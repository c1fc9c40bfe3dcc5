"""Rotary position embeddings: a token's position turns its queries and keys.

Chapter 3 builds this module. Source: Su et al., "RoFormer: Enhanced Transformer with Rotary
Position Embedding", arXiv:2104.09864, section 3.2. Linear interpolation: Chen et al.,
"Extending Context Window of Large Language Models via Positional Interpolation",
arXiv:2306.15595.
"""

import torch


def inverse_frequencies(
    head_dim: int,
    theta: float,
    factor: float = 1.0,
    device: torch.device | None = None,
) -> torch.Tensor:
    """How far each pair of dimensions turns per position.

    Args:
        head_dim: D, even.
        theta: the base; a larger one makes the slow pairs slower.
        factor: linear interpolation; positions count as ``position / factor``.
        device: where to put the result.

    Returns:
        (D/2,) float32, radians per position, falling from 1 to about 1/theta.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / theta**exponents / factor  # (D/2,)


def rotary_table(
    positions: torch.Tensor, inv_freq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every angle that a sequence needs.

    Both stay float32 whatever the model's dtype: at position 8,000 bfloat16 can only tell
    positions 32 apart from each other.

    Args:
        positions: (L,), (N,) or (B, L) integers.
        inv_freq: (D/2,) float32, from ``inverse_frequencies``.

    Returns:
        cos, sin: each (*positions.shape, D) float32; the second half repeats the first.
    """
    angles = positions[..., None].float() * inv_freq  # (..., D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (..., D)
    return angles.cos(), angles.sin()


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Turn every pair (i, i + D/2) by 90 degrees: (a, b) becomes (−b, a).

    Args:
        x: (..., D), D even.

    Returns:
        (..., D), dtype of ``x``.
    """
    a, b = x.chunk(2, dim=-1)  # 2 × (..., D/2)
    return torch.cat((-b, a), dim=-1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn queries or keys by their positions' angles.

    Args:
        x: (..., D), any floating dtype.
        cos, sin: float32 and broadcastable to ``x``, from ``rotary_table``.

    Returns:
        Shape and dtype of ``x``; computed in float32.
    """
    half = x.shape[-1] // 2
    wide = x.float()
    # rotate_half(wide)·sin: the halves change places, and the sine of the first one its sign.
    signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)  # (..., D)
    return (wide * cos).addcmul_(wide.roll(half, dims=-1), signed).to(x.dtype)
