"""Padded batches to packed streams and back: no work on empty places.

Chapter 7 builds this module. Sources: Portes et al., "MosaicBERT", arXiv:2312.17482 (unpadding
once, before the embeddings); Warner et al., "Smarter, Better, Faster, Longer", arXiv:2412.13663,
section 2.1.2.
"""

import torch
from torch.nn import functional as F


def cumulative_lengths(lengths: torch.Tensor) -> torch.Tensor:
    """Where each sequence of a packed stream starts, and where the last one ends.

    Args:
        lengths: (S,) integers.

    Returns:
        (S + 1,) int32, from 0 to N; FlashAttention asks for this dtype.
    """
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))  # (S + 1,)


def unpad(
    x: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Take the real tokens out of a padded batch, row after row.

    Args:
        x: (B, L, ...), anything that has one entry per token.
        attention_mask: (B, L), nonzero at real tokens, on whichever side the padding is.

    Returns:
        The packed stream (N, ...); the place of each of its tokens in the flattened batch, (N,);
        ``cu_seqlens`` (B + 1,) int32; and the length of the longest sequence.
    """
    real = attention_mask.bool()
    lengths = real.sum(dim=-1)  # (B,)
    indices = real.flatten().nonzero()[:, 0]  # (N,)
    return x.flatten(0, 1)[indices], indices, cumulative_lengths(lengths), int(lengths.max())


def pad(x: torch.Tensor, indices: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Put a packed stream (N, ...) back into a batch (B, L, ...), with zeros where padding was."""
    padded = x.new_zeros(batch * length, *x.shape[1:])  # (B·L, ...)
    return padded.index_copy(0, indices, x).unflatten(0, (batch, length))


def positions(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The position of each token of a packed stream (N,), counted from 0 in each sequence."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())  # (N,)
    return torch.arange(len(starts), device=starts.device) - starts
