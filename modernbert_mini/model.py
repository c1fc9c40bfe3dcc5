"""The encoder: embeddings, a stack of pre-norm layers, a final norm.

Chapter 10 builds this module. Source: Warner et al., "Smarter, Better, Faster, Longer",
arXiv:2412.13663, section 2 and table 4.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .alternating_attention import packed_backends, padded_backends
from .attention import Attend, Attention
from .checkpoints import PretrainedModel
from .config import ConfigError, ModernBertConfig
from .geglu import GeGLU
from .rope import inverse_frequencies, rotary_table

IMPLEMENTATIONS = ("auto", "eager", "sdpa")


@dataclass
class EncoderOutput:
    """What the encoder returns.

    Attributes:
        last_hidden_state: (B, L, C), or (N, C) for a packed stream; after the final norm.
        hidden_states: the embeddings' output, then each layer's, the last one normed; or None.
        attentions: the weights of each layer, (B, H, L, L) or (H, N, N); or None.
    """

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def layer_norm(config: ModernBertConfig) -> nn.LayerNorm:
    """The norm that stands everywhere in the model: over C, by default without bias."""
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class Embeddings(nn.Module):
    """Token ids to normed vectors. Positions are no part of it: RoPE brings them in later."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.tok_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.norm = layer_norm(config)
        self.drop = nn.Dropout(config.embedding_dropout)

    def forward(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map ids (..., L), or vectors (..., L, C) in their place, to (..., L, C)."""
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        return self.drop(self.norm(x))


class EncoderLayer(nn.Module):
    """One pre-norm layer: attention, then GeGLU, each added to what came in."""

    def __init__(self, config: ModernBertConfig, index: int):
        super().__init__()
        self.kind = config.layer_types[index]
        # Layer 0 has no attn_norm: the embeddings are normed already.
        self.attn_norm = layer_norm(config) if index else nn.Identity()
        self.attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            bias=config.attention_bias,
            dropout=config.attention_dropout,
        )
        self.mlp_norm = layer_norm(config)
        self.mlp = GeGLU(
            config.hidden_size,
            config.intermediate_size,
            activation=config.hidden_activation,
            bias=config.mlp_bias,
            dropout=config.mlp_dropout,
        )

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map (..., L, C) to (..., L, C); also the attention weights, where there are any."""
        mixed, weights = self.attn(self.attn_norm(x), cos, sin, attend)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), weights


class ModernBertModel(PretrainedModel):
    """The encoder without a head.

    Args:
        config: its sizes.
        attn_implementation: "eager" (returns weights), "sdpa" (fast), or "auto".

    Raises:
        ConfigError: for an unknown implementation.
    """

    def __init__(self, config: ModernBertConfig, attn_implementation: str = "auto"):
        super().__init__(config)
        self.attn_implementation = attn_implementation
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(
            EncoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.final_norm = layer_norm(config)
        self.gradient_checkpointing = False
        self.init_weights()

    @property
    def attn_implementation(self) -> str:
        """The attention backend in use; assign another name to change it."""
        return self._attn_implementation

    @attn_implementation.setter
    def attn_implementation(self, name: str):
        if name not in IMPLEMENTATIONS:
            raise ConfigError(
                f"attn_implementation {name!r}",
                f"one of {', '.join(IMPLEMENTATIONS)}",
                "'auto' takes the fastest that works.",
            )
        self._attn_implementation = name

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> EncoderOutput:
        """Encode a padded batch or a packed stream.

        Args:
            input_ids: (B, L) padded, or (N,) packed, integers.
            attention_mask: (B, L), nonzero at real tokens; None where all are real.
            position_ids: (L,), (B, L) or (N,); by default 0, 1, 2, … in each sequence.
            inputs_embeds: (B, L, C) or (N, C), in place of ``input_ids``.
            cu_seqlens: (S + 1,) integers; says that the input is packed, and where to cut it.
            max_seqlen: length of the longest packed sequence; computed when not given.
            output_hidden_states: whether to return what each layer puts out.
            output_attentions: whether to return attention weights; uses the eager backend.

        Raises:
            ConfigError: where inputs disagree with each other or with the config.
        """
        if not torch.compiler.is_compiling():  # looking into tensors would break the graph
            check_inputs(
                self.config, input_ids, attention_mask, position_ids, inputs_embeds, cu_seqlens
            )
        x = self.embeddings(input_ids, inputs_embeds)  # (..., L, C)
        attend = self._backends(x, attention_mask, cu_seqlens, output_attentions)
        rope = self._rotary_tables(x, position_ids, cu_seqlens)
        hidden_states, attentions = [x], []
        for layer in self.layers:
            x, weights = self._run(layer, x, *rope[layer.kind], attend[layer.kind])
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                attentions.append(weights)
        x = self.final_norm(x)
        hidden_states[-1] = x
        return EncoderOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _run(self, layer, *inputs):
        """Run a layer; when checkpointing, drop its activations and compute them again later."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _backends(self, x, attention_mask, cu_seqlens, output_attentions):
        name = self.attn_implementation
        if output_attentions:
            name = "eager"  # the only one that ever holds the weights
        elif name == "auto":
            name = "sdpa"
        half_windows = {"full_attention": None, "sliding_attention": self.config.half_window}
        if cu_seqlens is not None:
            return packed_backends(name, cu_seqlens, half_windows)
        return padded_backends(name, attention_mask, x.shape[1], half_windows, x.device)

    def _rotary_tables(self, x, position_ids, cu_seqlens):
        """cos and sin for each kind of layer, shaped to broadcast against (..., H, L, D)."""
        if position_ids is None:
            position_ids = torch.arange(x.shape[-2], device=x.device)
            if cu_seqlens is not None:
                starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
                position_ids = position_ids - starts
        if position_ids.dim() == 2:
            position_ids = position_ids[:, None]  # (B, 1, L)
        tables = {}
        for kind, rope in self.config.rope_parameters.items():
            inv_freq = inverse_frequencies(
                self.config.head_dim, rope["rope_theta"], rope.get("factor", 1.0), x.device
            )
            tables[kind] = rotary_table(position_ids, inv_freq)
        return tables

    def gradient_checkpointing_enable(self) -> None:
        """Trade time for memory in training: keep one activation a layer, recompute the rest."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self.gradient_checkpointing = False

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding (V, C)."""
        return self.embeddings.tok_embeddings

    def init_weights(self) -> None:
        """Draw every weight anew."""
        for name, parameter in self.named_parameters():
            init_parameter(name, parameter, self.config)


@torch.no_grad()
def init_parameter(name: str, parameter: torch.Tensor, config: ModernBertConfig) -> None:
    """Fill one parameter with its starting values, as transformers does.

    Norms start at 1 and biases at 0. The rest is drawn from a normal distribution that is cut
    at ``initializer_cutoff_factor`` standard deviations.

    Args:
        name: dotted, as in ``named_parameters``.
        parameter: filled in place.
        config: states the standard deviations.
    """
    *_, module, kind = name.split(".")
    if parameter.is_meta:  # a shape without memory, soon to be filled from a checkpoint
        return
    if kind == "bias":
        parameter.zero_()
    elif module.endswith("norm"):
        parameter.fill_(1.0)
    else:
        std = initial_std(module, config)
        cut = config.initializer_cutoff_factor * std
        nn.init.trunc_normal_(parameter, std=std, a=-cut, b=cut)


def initial_std(module: str, config: ModernBertConfig) -> float:
    """Standard deviation of a matrix's starting values, by the name of its module.

    What writes into the residual stream starts smaller: each of the 2·layers blocks adds to
    it, and so the sum keeps its size however many there are.
    """
    base = config.initializer_range
    residual = base / math.sqrt(2 * config.num_hidden_layers)
    return {
        "tok_embeddings": base,
        "Wqkv": base,
        "Wi": base,
        "Wo": residual,
        "dense": residual,
        "decoder": residual,
        "classifier": config.hidden_size**-0.5,
    }[module]


def check_inputs(
    config: ModernBertConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Refuse input that the model could only answer with an error or with nonsense.

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
