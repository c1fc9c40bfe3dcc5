"""Checks of what a model is given: a clear sentence instead of a crash deep in a kernel.

Chapter 10 uses this module. It guards ``ModernBertModel`` and, with it, all five heads.
"""

import warnings

import torch

from .config import ConfigError, ModernBertConfig


def check_inputs(
    config: ModernBertConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None = None,
) -> None:
    """Refuse input that the model could only answer with an error or with nonsense.

    Args:
        config: of the model.
        input_ids, attention_mask, position_ids, inputs_embeds, cu_seqlens, max_seqlen: as in
            ``ModernBertModel.forward``.

    Raises:
        ConfigError: saying what was found, what was expected and what to do.
    """
    if (input_ids is None) == (inputs_embeds is None):
        both = "both" if input_ids is not None else "neither"
        raise ConfigError(f"{both} of input_ids and inputs_embeds", "one of them", "Pass one.")
    shape = tuple(input_ids.shape) if input_ids is not None else tuple(inputs_embeds.shape[:-1])
    packed = cu_seqlens is not None
    if len(shape) != (1 if packed else 2):
        raise ConfigError(
            f"input of shape {shape}" + (" with cu_seqlens" if packed else ""),
            "(tokens,) with cu_seqlens, or (batch, length) without",
            "A single text needs a batch dimension: input_ids[None].",
        )
    if 0 in shape:
        raise ConfigError(f"input of shape {shape}", "at least one token", "Drop empty input.")
    if input_ids is not None:
        if input_ids.is_floating_point() or input_ids.is_complex():
            raise ConfigError(
                f"input_ids of dtype {input_ids.dtype}",
                "integers",
                "Pass vectors as inputs_embeds.",
            )
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ConfigError(
                f"token id {low if low < 0 else high}",
                f"0 to {config.vocab_size - 1}, the model's vocabulary",
                "Use the tokenizer of this very checkpoint.",
            )
    if attention_mask is not None:
        _check_attention_mask(attention_mask, shape, packed)
    if position_ids is not None and tuple(position_ids.shape) not in {
        shape,
        shape[-1:],
        (1, shape[-1]),
    }:
        raise ConfigError(
            f"position_ids of shape {tuple(position_ids.shape)} for input of shape {shape}",
            "one position for each token",
            "Leave position_ids out to count from 0.",
        )
    longest = shape[-1]
    if packed:
        longest = _check_cu_seqlens(cu_seqlens, shape[0])
        if max_seqlen is not None and max_seqlen < longest:
            raise ConfigError(
                f"max_seqlen {max_seqlen} for a sequence of {longest} tokens",
                f"{longest}, the longest sequence",
                "Leave max_seqlen out to have it counted.",
            )
    if longest > config.max_position_embeddings:
        warnings.warn(
            f"{longest} tokens in a sequence; the config states at most "
            f"{config.max_position_embeddings}. The output may be poor: truncate the text.",
            stacklevel=3,
        )


def _check_attention_mask(attention_mask, shape, packed):
    if packed:
        raise ConfigError(
            "attention_mask beside cu_seqlens",
            "one of them",
            "A packed stream has no padding: leave attention_mask out.",
        )
    if tuple(attention_mask.shape) != shape:
        raise ConfigError(
            f"attention_mask of shape {tuple(attention_mask.shape)} for input of shape {shape}",
            "the same shape",
            "Take both from one call of the tokenizer.",
        )
    empty = (~attention_mask.bool().any(dim=-1)).nonzero().flatten().tolist()
    if empty:
        raise ConfigError(
            f"no real token in row {empty[0]} of attention_mask",
            "at least one in each row",
            "Drop the empty rows.",
        )


def _check_cu_seqlens(cu_seqlens, num_tokens) -> int:
    """Check the boundaries of a packed stream; return the length of its longest sequence."""
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    if bounds[:1] != [0] or bounds[-1] != num_tokens or not lengths or min(lengths) < 1:
        shown = ", ".join(map(str, bounds[:8])) + (", …" if len(bounds) > 8 else "")
        raise ConfigError(
            f"cu_seqlens [{shown}] for {num_tokens} tokens",
            f"boundaries that start at 0, rise, and end at {num_tokens}",
            "They are the cumulative sum of the lengths, with a 0 in front.",
        )
    return max(lengths)
