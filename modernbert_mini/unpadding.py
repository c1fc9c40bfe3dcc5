"""Padded batches to packed streams and back: no work on empty places.

Chapter 7 builds this module. Sources: Portes et al., "MosaicBERT", arXiv:2312.17482 (unpadding
once, before the embeddings); Krell et al., "Efficient Sequence Packing without
Cross-contamination", arXiv:2107.02027 (packing as a bin packing problem); Warner et al.,
"Smarter, Better, Faster, Longer", arXiv:2412.13663, section 2.1.2.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .config import ConfigError


def cumulative_lengths(lengths: Tensor) -> Tensor:
    """Where each sequence of a packed stream starts, and where the last one ends.

    Args:
        lengths: (S,) integers.

    Returns:
        (S + 1,) int32, from 0 to N; FlashAttention asks for this dtype.
    """
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()  # (S + 1,)


def unpad(x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
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


def pad(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """Put a packed stream (N, ...) back into a batch (B, L, ...), with zeros where padding was."""
    padded = x.new_zeros(batch * length, *x.shape[1:])  # (B·L, ...)
    return padded.index_copy_(0, indices, x).unflatten(0, (batch, length))


def positions(cu_seqlens: Tensor, num_tokens: int | None = None) -> Tensor:
    """The position of each token of a packed stream (N,), counted from 0 in each sequence.

    Whoever knows N and says so spares a GPU the wait for it.
    """
    lengths = cu_seqlens.diff()  # (S,)
    starts = cu_seqlens[:-1].repeat_interleave(lengths, output_size=num_tokens)  # (N,)
    return torch.arange(len(starts), device=starts.device) - starts


def join(sequences: Sequence[Tensor]) -> dict[str, Tensor | int]:
    """Put sequences end to end in one packed stream, ready for ``model(**stream)``.

    Args:
        sequences: S tensors of ids, each (tokens,).

    Returns:
        ``input_ids`` (N,), ``cu_seqlens`` (S + 1,) int32, and ``max_seqlen``, the longest one.

    Raises:
        ConfigError: for no sequence, or one that is empty or of another shape, naming it.
    """
    bad = [i for i, ids in enumerate(sequences) if ids.dim() != 1 or not len(ids)]
    if bad or not sequences:
        found = f"sequence {bad[0]}: shape {tuple(sequences[bad[0]].shape)}" if bad else "nothing"
        raise ConfigError(found, "sequences of at least one token", "One text each, none empty.")
    lengths = torch.tensor([len(ids) for ids in sequences], device=sequences[0].device)  # (S,)
    return {
        "input_ids": torch.cat(list(sequences)),
        "cu_seqlens": cumulative_lengths(lengths),
        "max_seqlen": int(lengths.max()),
    }


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put lengths into bins: the longest first, each into the first bin that has room for it.

    Args:
        lengths: of the sequences, in tokens.
        capacity: the most tokens that a bin may hold.

    Returns:
        For each bin, the indices of its sequences.

    Raises:
        ConfigError: for a sequence that fits no bin, naming it.
    """
    bins, room = [[] for _ in lengths], [capacity] * len(lengths)  # never more bins than that
    for i, n in sorted(enumerate(lengths), key=lambda pair: -pair[1]):
        if n > capacity:
            remedy = "Truncate it, or raise the capacity."
            raise ConfigError(f"sequence {i} of {n} tokens", f"at most {capacity}", remedy)
        place = next(b for b, free in enumerate(room) if free >= n)
        bins[place].append(i)
        room[place] -= n
    return [chosen for chosen in bins if chosen]


def pack_sequences(sequences: Sequence, capacity: int) -> list[dict[str, Tensor | int]]:
    """Pack whole sequences into few streams of at most ``capacity`` tokens, by ``first_fit``.

    Args:
        sequences: ids with their special tokens, as lists or (tokens,) tensors.
        capacity: the most tokens in one stream.

    Returns:
        A dict for each stream, as ``join`` makes it.

    Raises:
        ConfigError: for a sequence that is empty, or longer than ``capacity``, naming it.
    """
    ids = [torch.as_tensor(sequence) for sequence in sequences]
    return [join([ids[i] for i in chosen]) for chosen in first_fit([len(x) for x in ids], capacity)]


class FlatteningCollator:
    """The padding-free collator: ``DataLoader(…, collate_fn=FlatteningCollator())``.

    ``DataCollatorWithFlattening`` of transformers is made for decoders. It differs so: it returns
    ``input_ids`` (1, N) with ``position_ids`` that restart, and boundaries only on request, under
    other names; without labels it takes ``input_ids`` for labels; it replaces the first label of
    each sequence by −100; it cannot take one label per sequence; it never reads
    ``attention_mask``, so padding in a feature stays. Chapter 7.
    """

    def __call__(self, features: Sequence[Mapping]) -> dict[str, Tensor | int]:
        """Join the real tokens of a batch of features.

        Args:
            features: S dicts with ``input_ids`` (a list or a (tokens,) tensor). Read where
                present: ``attention_mask``, whose zeros are left out, and ``labels`` or
                ``label``: integers in a row are for tokens, all else is for the sequence.

        Returns:
            As ``join``; and ``labels``, (N,) for tokens, (S,) or (S, num_labels) for sequences.

        Raises:
            ConfigError: for no features, or one without a real token, naming it.
            IndexError: where a mask, or labels of tokens, are not as long as the ids.
        """
        batch = join([_real(feature, feature["input_ids"]) for feature in features])
        labels = [feature.get("labels", feature.get("label")) for feature in features]
        if all(label is None for label in labels):
            return batch
        labels = [torch.as_tensor(label) for label in labels]
        if labels[0].is_floating_point() or not labels[0].dim():
            return batch | {"labels": torch.stack(labels)}
        labels = [_real(*pair) for pair in zip(features, labels, strict=True)]
        return batch | {"labels": torch.cat(labels)}


def _real(feature: Mapping, values: Sequence | Tensor) -> Tensor:
    """Those of a feature's values, one for each token, that do not stand at padding."""
    mask = feature.get("attention_mask", [1] * len(feature["input_ids"]))
    return torch.as_tensor(values)[torch.as_tensor(mask).bool()]
