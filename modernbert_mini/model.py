"""The encoder: embeddings, a stack of pre-norm layers, a final norm.

Chapter 10 builds this module. Source: Warner et al., "Smarter, Better, Faster, Longer",
arXiv:2412.13663, section 2 and table 4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .alternating_attention import packed_backends, padded_backends
from .attention import Attend, Attention
from .checkpoints import PretrainedModel
from .config import ConfigError, ModernBertConfig
from .flash_attention import flash_attention, flash_kernel, flash_works
from .geglu import GeGLU
from .inputs import check_inputs
from .operators import compiled_backends
from .rope import inverse_frequencies, rotary_table
from .unpadding import pad, positions, unpad

IMPLEMENTATIONS = ("auto", "eager", "sdpa", "flash_attention_2", "triton")
CHUNK = 2048  # tokens that go through a feed-forward block at a time, on a CPU
KERNELS = ("flash_attention_2", "triton")  # they know packed streams alone


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


def unchanged(x):
    """What puts back a batch that was never unpadded."""
    return x


def in_chunks(function: Callable, x: torch.Tensor, size: int = CHUNK) -> torch.Tensor:
    """Apply a function of single tokens to a packed stream (N, C), ``size`` tokens at a time.

    The feed-forward block is several times as wide inside as outside. In chunks that takes little
    memory, and each chunk finds that of the last one still in the cache. A GPU wants all its
    work at once, and so do gradients: there the function sees the whole stream.
    """
    whole = x.is_cuda or x.dim() > 2 or torch.is_grad_enabled() or torch.compiler.is_compiling()
    return function(x) if whole else torch.cat([function(chunk) for chunk in x.split(size)])


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
        return in_chunks(self.feed_forward, x + mixed), weights

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The second half of the layer: (..., L, C) to (..., L, C), token by token."""
        return x + self.mlp(self.mlp_norm(x))


class ModernBertModel(PretrainedModel):
    """The encoder without a head.

    Args:
        config: its sizes.
        attn_implementation: "eager" (returns weights), "sdpa" (fast everywhere),
            "flash_attention_2" or "triton" (GPU kernels for packed streams), or "auto", the
            fastest that this machine and this batch allow.

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
        keep_padded: bool = False,
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
            keep_padded: whether "auto" computes padding like text, as transformers does. By
                default it leaves padding out wherever that pays, and returns zeros there; hooks on
                its layers then see the stream.

        Raises:
            ConfigError: where inputs disagree with each other, with the config or the machine.
        """
        batch, restore = self.unpadded(
            *(input_ids, attention_mask, position_ids, inputs_embeds, cu_seqlens, max_seqlen),
            output_attentions=output_attentions,
            keep_padded=keep_padded,
        )
        x = self.embeddings(batch["input_ids"], batch["inputs_embeds"])  # (..., L, C)
        attend = self._backends(x, **batch)
        rope = self._rotary_tables(x, batch["position_ids"], batch["cu_seqlens"])
        hidden_states, attentions = [x] if output_hidden_states else [], []
        for layer in self.layers:
            x, weights = self._run(layer, x, *rope[layer.kind], attend[layer.kind])
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                attentions.append(weights)
        x = restore(self.final_norm(x))
        hidden_states = (*map(restore, hidden_states[:-1]), x)
        return EncoderOutput(
            last_hidden_state=x,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def unpadded(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        **others: Any,
    ) -> tuple[dict[str, Any], Callable]:
        """Check a batch, and make a packed stream of it where that pays.

        ``forward`` does so itself. A head that goes on with the stream calls it first, and so
        does who has compiled the model: ``torch.compile`` cannot look into a mask.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, cu_seqlens, max_seqlen: as in
                ``forward``.
            others: what else ``forward`` takes; ``labels`` (B, L) may be among them.

        Returns:
            All of it as a packed stream, and a function that puts results (N, ...) back into
            (B, L, ...). Where nothing is gained: the batch, and a function that does nothing.

        Raises:
            ConfigError: where inputs disagree with each other, with the config or the machine.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch |= {"position_ids": position_ids, "inputs_embeds": inputs_embeds}
        batch |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen} | others
        if torch.compiler.is_compiling():
            return batch, unchanged
        given = (input_ids, attention_mask, position_ids, inputs_embeds, cu_seqlens, max_seqlen)
        check_inputs(self.config, *given)
        if cu_seqlens is not None or not self._pays(**batch):
            return batch | {"keep_padded": True}, unchanged
        if attention_mask is None:
            attention_mask = torch.ones_like(_first(input_ids, inputs_embeds)).bool()
        if position_ids is not None:
            batch["position_ids"] = position_ids.expand(attention_mask.shape)
        _, indices, cu_seqlens, longest = unpad(attention_mask, attention_mask)
        rows, length = attention_mask.shape
        taken = {k: unpad(x, attention_mask)[0] for k, x in batch.items() if torch.is_tensor(x)}
        bounds = {"attention_mask": None, "cu_seqlens": cu_seqlens, "max_seqlen": longest}
        return batch | taken | bounds, partial(pad, indices=indices, batch=rows, length=length)

    def _pays(
        self,
        input_ids,
        attention_mask,
        inputs_embeds,
        labels=None,
        output_attentions=False,
        keep_padded=False,
        **_,
    ) -> bool:
        """Whether a padded batch is to run as a packed stream."""
        if output_attentions or self.attn_implementation in KERNELS:
            return not output_attentions
        if self.attn_implementation != "auto" or keep_padded:
            return False
        if attention_mask is None or attention_mask.all():
            # Local layers gain by their band, and a GPU by its kernel.
            length = _first(input_ids, inputs_embeds).shape[1]
            return length > 2 * self.config.half_window or self._implementation(False) in KERNELS
        # As in transformers, pooling may read position 0 and a loss may count labels on padding.
        read = self.config.classifier_pooling == "cls" and (attention_mask[:, 0] == 0).any()
        counted = labels is not None and (labels[attention_mask == 0] >= 0).any()
        return not (read or counted)

    def _run(self, layer, *inputs):
        """Run a layer; when checkpointing, drop its activations and compute them again later."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _implementation(self, output_attentions: bool) -> str:
        """The backend's name, with "auto" resolved."""
        if output_attentions:
            return "eager"  # the only one that ever holds the weights
        if self.attn_implementation != "auto":
            return self.attn_implementation
        return "flash_attention_2" if flash_works(*self._machine()) else "sdpa"

    def _machine(self) -> tuple[torch.device, torch.dtype, float]:
        """Device, dtype and dropout of attention."""
        weight = self.get_input_embeddings().weight
        dtype, kind = weight.dtype, weight.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return weight.device, dtype, self.config.attention_dropout if self.training else 0.0

    def _backends(
        self, x, attention_mask=None, cu_seqlens=None, max_seqlen=None, output_attentions=False, **_
    ) -> dict[str, Attend]:
        """One backend for each kind of layer, bound to this batch."""
        name = self._implementation(output_attentions)
        half_windows = {"full_attention": None, "sliding_attention": self.config.half_window}
        if cu_seqlens is None:
            name = "sdpa" if name in KERNELS else name
            return padded_backends(name, attention_mask, x.shape[1], half_windows, x.device)
        if name == "sdpa" and torch.compiler.is_compiling():
            return compiled_backends(cu_seqlens, half_windows, len(x))
        if name not in KERNELS:
            return packed_backends(name, cu_seqlens, half_windows, len(x))
        if name == "triton":
            from .triton_kernel import triton_attention as attend  # imports Triton, if there
        else:
            attend = partial(flash_attention, kernel=flash_kernel(*self._machine()))
        max_seqlen = max_seqlen or int(cu_seqlens.diff().max())
        bounds = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        return {kind: partial(attend, **bounds, half_window=w) for kind, w in half_windows.items()}

    def _rotary_tables(self, x, position_ids, cu_seqlens):
        """cos and sin for each kind of layer, shaped to broadcast against (..., H, L, D)."""
        if position_ids is None:
            position_ids = torch.arange(x.shape[-2], device=x.device)
            if cu_seqlens is not None:
                position_ids = positions(cu_seqlens, len(x))
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


def _first(input_ids, inputs_embeds):
    """One number for each token, (B, L)."""
    return input_ids if inputs_embeds is None else inputs_embeds[..., 0]


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
