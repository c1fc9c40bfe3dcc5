"""Which tokens a layer may look at: everywhere, or only at its neighbours.

Chapter 6 builds this module. Sources: Warner et al., "Smarter, Better, Faster, Longer",
arXiv:2412.13663, section 2.1.2 (every third layer is global, the others see a window of 128
tokens); Beltagy et al., "Longformer", arXiv:2004.05150, section 3.1 (sliding windows,
computed in blocks that overlap).
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch.nn import functional as F

from .attention import Attend, eager_attention, sdpa_attention

LayerType = Literal["full_attention", "sliding_attention"]


def layer_pattern(num_layers: int, every_n: int) -> list[LayerType]:
    """Name the kind of each layer: layer 0 is global, then every ``every_n``-th one."""
    return ["sliding_attention" if i % every_n else "full_attention" for i in range(num_layers)]


def window_mask(length: int, half_window: int, device: torch.device | None = None) -> torch.Tensor:
    """True where two positions are at most ``half_window`` apart, both ends included.

    Args:
        length: L.
        half_window: W; a token sees W neighbours on each side and itself, 2·W + 1 keys.
        device: where to put the result.

    Returns:
        (L, L) bool.
    """
    position = torch.arange(length, device=device)  # (L,)
    distance = position[:, None] - position[None, :]  # (L, L)
    return distance.abs() <= half_window


def padded_mask(
    attention_mask: torch.Tensor | None,
    length: int,
    half_window: int | None,
    device: torch.device | None = None,
) -> torch.Tensor | None:
    """The keys each query may see in a padded batch.

    Args:
        attention_mask: (B, L), nonzero at real tokens, or None where all are real.
        length: L.
        half_window: W, or None for a global layer.
        device: where to put the result.

    Returns:
        Bool, broadcastable to (B, H, L, L); None where every query sees every key.
    """
    mask = None
    if half_window is not None and half_window < length - 1:
        mask = window_mask(length, half_window, device)  # (L, L)
    if attention_mask is not None:
        real = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        mask = real.expand(-1, -1, length, -1) if mask is None else mask & real  # (B, 1, L, L)
    return mask


def packed_mask(cu_seqlens: torch.Tensor, half_window: int | None) -> torch.Tensor:
    """The keys each query may see in a packed stream: those of its own sequence.

    Args:
        cu_seqlens: (S + 1,) integers from 0 to N: where each sequence starts, and the end.
        half_window: W, or None for a global layer.

    Returns:
        (N, N) bool. It grows with N², so only the teaching backend uses it.
    """
    lengths = cu_seqlens.diff()  # (S,)
    sequence = torch.arange(len(lengths), device=cu_seqlens.device)  # (S,)
    sequence = sequence.repeat_interleave(lengths)  # (N,)
    mask = sequence[:, None] == sequence[None, :]  # (N, N)
    if half_window is not None:
        mask = mask & window_mask(len(sequence), half_window, cu_seqlens.device)
    return mask


def packed_sdpa_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, lengths: list[int], dropout: float = 0.0
) -> tuple[torch.Tensor, None]:
    """Global attention over a packed stream, one sequence after the other or all at once.

    Args:
        q, k, v: (H, N, D).
        lengths: of the S sequences; they sum to N.
        dropout: probability of dropping a weight.

    Returns:
        The mixed values (H, N, D), and None for the weights.
    """
    if len({*lengths}) == 1:  # sequences of one length stack into a batch
        q, k, v = (x.unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in (q, k, v))
        return end_to_end([sdpa_attention(q, k, v, dropout=dropout)[0]]), None
    # One split and one concatenation: slicing instead would make the backward pass write a
    # gradient of the whole stream for every sequence.
    parts = zip(*(x[None].split(lengths, dim=-2) for x in (q, k, v)), strict=True)
    return end_to_end([sdpa_attention(*qkv, dropout=dropout)[0] for qkv in parts]), None


def end_to_end(parts: list[torch.Tensor]) -> torch.Tensor:
    """Results (sequences, H, length, D) as one packed stream (H, N, D).

    In memory each token's heads lie side by side, which is how SDPA writes them and how the next
    layer reads them. So this is one copy at the most, and later none.
    """
    return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in parts]).transpose(0, 1)


def band_mask(
    cu_seqlens: torch.Tensor, half_window: int, num_tokens: int | None = None
) -> torch.Tensor:
    """The keys that each query of a packed stream may see, block by block.

    The stream is cut into blocks at least as long as half a window. What a query may see then
    lies in its own block or in a neighbour of it, so the mask grows with N·W and not with N².

    Args:
        cu_seqlens: (S + 1,) integers from 0 to N.
        half_window: W.
        num_tokens: N; counted when not given, for which a GPU has to be waited for.

    Returns:
        (blocks, 1, size, 3·size) bool: for each block its queries, and the keys of the block
        before, of its own and of the one after.
    """
    lengths = cu_seqlens.diff()  # (S,)
    sequence = torch.arange(len(lengths), device=cu_seqlens.device)  # (S,)
    sequence = sequence.repeat_interleave(lengths, output_size=num_tokens)  # (N,)
    # Blocks of a handful of tokens would cost more in overhead than they spare in work.
    size = min(max(half_window, 16), len(sequence))
    # What fills up the last block belongs to no sequence; nor does what lies beyond both ends.
    sequence = F.pad(sequence, (0, -len(sequence) % size), value=-1)
    own = sequence.unflatten(0, (-1, size))  # (blocks, size)
    near = F.pad(sequence, (size, size), value=-2).unfold(0, 3 * size, size)  # (blocks, 3·size)
    place = torch.arange(-size, 2 * size, device=cu_seqlens.device)  # (3·size,)
    distance = place[size:-size, None] - place  # (size, 3·size)
    mask = (own[..., None] == near[:, None]) & (distance.abs() <= half_window)
    return mask[:, None]  # (blocks, 1, size, 3·size)


def banded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor, dropout: float = 0.0
) -> tuple[torch.Tensor, None]:
    """Local attention over a packed stream, all blocks of all sequences at once.

    Args:
        q, k, v: (H, N, D).
        mask: (blocks, 1, size, 3·size), from ``band_mask``.
        dropout: probability of dropping a weight.

    Returns:
        The mixed values (H, N, D), and None for the weights.
    """
    blocks, _, size, _ = mask.shape
    length = q.shape[-2]

    def alone(block: int, mask: torch.Tensor) -> torch.Tensor:
        """A block that lacks a neighbour, or part of one: only the keys that are there."""
        begin, end = block * size, min((block + 1) * size, length)
        first, last = max(begin - size, 0), min(end + size, length)
        mask = mask[:, : end - begin, first - begin + size : last - begin + size]
        inputs = q[None, :, begin:end], k[None, :, first:last], v[None, :, first:last]
        return sdpa_attention(*inputs, mask=mask, dropout=dropout)[0]  # (1, H, size, D)

    if blocks < 4:
        return end_to_end([alone(i, mask[i]) for i in range(blocks)]), None
    # All others go in one call. Neighbours share keys: overlapping views of one tensor, no copies.
    inner = q[:, size : (blocks - 2) * size].unflatten(1, (-1, size))  # (H, inner, size, D)
    k_, v_ = (x[:, : (blocks - 1) * size].unfold(1, 3 * size, size) for x in (k, v))
    inputs = inner.transpose(0, 1), k_.permute(1, 0, 3, 2), v_.permute(1, 0, 3, 2)
    inner = sdpa_attention(*inputs, mask=mask[1:-2], dropout=dropout)[0]  # (inner, H, size, D)
    ends = alone(blocks - 2, mask[-2]), alone(blocks - 1, mask[-1])
    return end_to_end([alone(0, mask[0]), inner, *ends]), None


def padded_backends(
    implementation: str,
    attention_mask: torch.Tensor | None,
    length: int,
    half_windows: dict[str, int | None],
    device: torch.device,
) -> dict[str, Attend]:
    """One backend for each kind of layer, with the batch's mask bound to it.

    Args:
        implementation: "eager" or "sdpa".
        attention_mask: (B, L) or None.
        length: L.
        half_windows: W for each kind of layer, None where it sees everything.
        device: where the batch is.
    """
    attend: Callable = {"eager": eager_attention, "sdpa": sdpa_attention}[implementation]
    return {
        kind: partial(attend, mask=padded_mask(attention_mask, length, half_window, device))
        for kind, half_window in half_windows.items()
    }


def packed_backends(
    implementation: str,
    cu_seqlens: torch.Tensor,
    half_windows: dict[str, int | None],
    num_tokens: int | None = None,
) -> dict[str, Attend]:
    """The same for a packed stream of ``num_tokens`` with boundaries ``cu_seqlens`` (S + 1,)."""
    if implementation == "eager":
        return {
            kind: partial(eager_attention, mask=packed_mask(cu_seqlens, half_window))
            for kind, half_window in half_windows.items()
        }
    lengths = cu_seqlens.diff().tolist()
    return {
        kind: partial(packed_sdpa_attention, lengths=lengths)
        if half_window is None
        else partial(banded_attention, mask=band_mask(cu_seqlens, half_window, num_tokens))
        for kind, half_window in half_windows.items()
    }
