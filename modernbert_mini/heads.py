"""The five heads: what a ModernBERT is used for.

Chapter 10 builds this module. Sources: Devlin et al., "BERT", arXiv:1810.04805, sections 3.1
and 4 (the tasks); the shape of the head is that of transformers' modeling_modernbert.py.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .checkpoints import PretrainedModel
from .config import ConfigError, ModernBertConfig
from .geglu import ACTIVATIONS
from .model import EncoderOutput, ModernBertModel, init_parameter, layer_norm


@dataclass
class HeadOutput:
    """What a head returns.

    Attributes:
        logits: the scores; each head states their shape.
        loss: a scalar where labels were given, else None.
        hidden_states: as in ``EncoderOutput``.
        attentions: as in ``EncoderOutput``.
    """

    logits: torch.Tensor
    loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class QuestionAnsweringOutput:
    """What the question answering head returns.

    Attributes:
        start_logits: (B, L) or (N,), how well the answer could start at each token.
        end_logits: the same for its end.
        loss: a scalar where positions were given, else None.
        hidden_states: as in ``EncoderOutput``.
        attentions: as in ``EncoderOutput``.
    """

    start_logits: torch.Tensor
    end_logits: torch.Tensor
    loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class PredictionHead(nn.Module):
    """What stands between the encoder and every task: dense, activation, norm."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, config.classifier_bias)
        self.act = ACTIVATIONS[config.classifier_activation]
        self.norm = layer_norm(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., C) to (..., C)."""
        return self.norm(self.act(self.dense(x)))


class EncoderWithHead(PretrainedModel):
    """What the five classes share: an encoder, the prediction head, and their starting values."""

    def __init__(self, config: ModernBertConfig, attn_implementation: str = "auto"):
        super().__init__(config)
        self.model = ModernBertModel(config, attn_implementation)
        self.head = PredictionHead(config)

    @property
    def attn_implementation(self) -> str:
        """The attention backend in use; assign another name to change it."""
        return self.model.attn_implementation

    @attn_implementation.setter
    def attn_implementation(self, name: str):
        self.model.attn_implementation = name

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding (V, C)."""
        return self.model.get_input_embeddings()

    def gradient_checkpointing_enable(self) -> None:
        """Trade time for memory in training; see ``ModernBertModel``."""
        self.model.gradient_checkpointing_enable()

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self.model.gradient_checkpointing_disable()

    def init_weights(self) -> None:
        """Draw every weight anew, those of the encoder too."""
        for name, parameter in self.named_parameters():
            init_parameter(name, parameter, self.config)


class EncoderWithClassifier(EncoderWithHead):
    """What four of them share: a linear classifier on top, one output per label by default."""

    def __init__(
        self,
        config: ModernBertConfig,
        attn_implementation: str = "auto",
        outputs: int | None = None,
    ):
        super().__init__(config, attn_implementation)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, outputs or config.num_labels)
        self.init_weights()


class ModernBertForMaskedLM(EncoderWithHead):
    """Which token stands behind each [MASK]: logits (B, L, V), or (N, V) for a packed stream.

    With ``config.sparse_prediction`` and labels, logits are (M, V) for the M labelled tokens
    alone: the decoder is the dearest layer of a small model, and the rest adds no loss.
    """

    def __init__(self, config: ModernBertConfig, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self) -> None:
        """Let the decoder read the token embedding, unless the config says otherwise."""
        if self.config.tie_word_embeddings:
            self.decoder.weight = self.model.embeddings.tok_embeddings.weight

    def get_output_embeddings(self) -> nn.Linear:
        """The decoder (C → V)."""
        return self.decoder

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **encoder_options,
    ) -> HeadOutput:
        """Score every vocabulary entry at every token.

        Args:
            labels: shape of ``input_ids``, ids; ``sparse_pred_ignore_index`` where no loss counts.
            encoder_options: as in ``ModernBertModel.forward``.
        """
        inputs, restore = self.model.unpadded(
            *(input_ids, attention_mask, position_ids, inputs_embeds),
            labels=labels,
            **encoder_options,
        )
        labels = inputs.pop("labels")
        encoded = self.model(**inputs)
        x = encoded.last_hidden_state
        ignore = self.config.sparse_pred_ignore_index if self.config.sparse_prediction else -100
        if self.config.sparse_prediction and labels is not None:
            x, labels = x[labels != ignore], labels[labels != ignore]  # (M, C), (M,)
        logits = self.decoder(self.head(x))
        loss = None
        if labels is not None:
            scores = logits.flatten(0, -2).float()
            loss = F.cross_entropy(scores, labels.flatten(), ignore_index=ignore)
            if self.config.sparse_prediction:
                return _output(encoded, logits, loss)
        return _output(encoded, restore(logits), loss, restore)


class ModernBertForSequenceClassification(EncoderWithClassifier):
    """One label, several or a number for each text: logits (B, num_labels)."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **encoder_options,
    ) -> HeadOutput:
        """Pool each text to one vector and classify it.

        Args:
            labels: (B,) class ids, (B, num_labels) floats for several labels at once, or (B,)
                floats for regression; ``config.problem_type`` decides, else their dtype.
            encoder_options: as in ``ModernBertModel.forward``.
        """
        encoded = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, cu_seqlens, **encoder_options
        )
        x = encoded.last_hidden_state
        if cu_seqlens is not None:
            pooled = pool_packed(x, cu_seqlens, self.config.classifier_pooling)
        elif self.config.classifier_pooling == "cls":
            # Position 0, as in transformers: right for right-padded batches only.
            pooled = x[:, 0]  # (B, C)
        else:
            pooled = mean_pool(x, attention_mask)
        logits = self.classifier(self.drop(self.head(pooled)))  # (B, num_labels)
        loss = None if labels is None else self._loss(logits, labels)
        return _output(encoded, logits, loss)

    def _loss(self, logits, labels):
        problem = self.config.problem_type
        if problem is None:
            many = "multi" if labels.is_floating_point() else "single"
            single = self.config.num_labels == 1
            problem = "regression" if single else f"{many}_label_classification"
        if problem == "regression":
            return F.mse_loss(logits.view(labels.shape), labels.to(logits.dtype))
        if problem == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten())
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class ModernBertForTokenClassification(EncoderWithClassifier):
    """A label for each token: logits (B, L, num_labels), or (N, num_labels) when packed."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **encoder_options,
    ) -> HeadOutput:
        """Classify every token.

        Args:
            labels: shape of ``input_ids``, class ids; −100 where no loss counts.
            encoder_options: as in ``ModernBertModel.forward``.
        """
        inputs, restore = self.model.unpadded(
            *(input_ids, attention_mask, position_ids, inputs_embeds),
            labels=labels,
            **encoder_options,
        )
        labels = inputs.pop("labels")
        encoded = self.model(**inputs)
        logits = self.classifier(self.drop(self.head(encoded.last_hidden_state)))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return _output(encoded, restore(logits), loss, restore)


class ModernBertForQuestionAnswering(EncoderWithClassifier):
    """Where in the text the answer starts and ends: two logits for each token."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **encoder_options,
    ) -> QuestionAnsweringOutput:
        """Score every token as the answer's start and as its end.

        Args:
            start_positions, end_positions: (B,) token indices counted in each sequence; those
                beyond its end add no loss.
            encoder_options: as in ``ModernBertModel.forward``.
        """
        if start_positions is not None:
            # As in transformers, the loss counts padding among the places, with its numbers.
            encoder_options["keep_padded"] = True
        encoded = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, cu_seqlens, **encoder_options
        )
        logits = self.classifier(self.drop(self.head(encoded.last_hidden_state)))
        start_logits, end_logits = logits.unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = _position_loss(start_logits, start_positions, cu_seqlens)
            loss = (start_loss + _position_loss(end_logits, end_positions, cu_seqlens)) / 2
        return QuestionAnsweringOutput(
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            loss=loss,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


class ModernBertForMultipleChoice(EncoderWithClassifier):
    """Which of several endings fits best: logits (B, choices)."""

    def __init__(self, config: ModernBertConfig, attn_implementation: str = "auto"):
        super().__init__(config, attn_implementation, outputs=1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        num_choices: int | None = None,
        **encoder_options,
    ) -> HeadOutput:
        """Encode each choice on its own and score it.

        Args:
            input_ids: (B, choices, L), or (N,) with ``cu_seqlens`` and ``num_choices``, the
                choices of a question one after the other.
            attention_mask, position_ids: (B, choices, L).
            inputs_embeds: (B, choices, L, C) or (N, C).
            labels: (B,) index of the right choice.
            num_choices: choices of each question; a packed stream does not show it.
            encoder_options: as in ``ModernBertModel.forward``.
        """
        if cu_seqlens is None:
            num_choices = _num_choices(input_ids, inputs_embeds)
            input_ids, attention_mask, position_ids, inputs_embeds = (
                None if x is None else x.flatten(0, 1)
                for x in (input_ids, attention_mask, position_ids, inputs_embeds)
            )
        elif num_choices is None or (len(cu_seqlens) - 1) % num_choices:
            raise ConfigError(
                f"{len(cu_seqlens) - 1} packed sequences and num_choices {num_choices}",
                "a num_choices that divides them",
                "Pass num_choices=… beside cu_seqlens.",
            )
        encoded = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, cu_seqlens, **encoder_options
        )
        x = encoded.last_hidden_state
        if cu_seqlens is not None:
            pooled = pool_packed(x, cu_seqlens, self.config.classifier_pooling)
        elif self.config.classifier_pooling == "cls":
            pooled = first_real_token(x, attention_mask)
        else:
            pooled = mean_pool(x, attention_mask)
        logits = self.classifier(self.drop(self.head(pooled)))  # (B·choices, 1)
        logits = logits.view(-1, num_choices)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return _output(encoded, logits, loss)


def mean_pool(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of the real tokens' vectors: (B, L, C) to (B, C)."""
    if attention_mask is None:
        return x.mean(dim=1)
    real = attention_mask.bool()[..., None].to(x.dtype)  # (B, L, 1)
    return (x * real).sum(dim=1) / real.sum(dim=1)


def first_real_token(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The vector of [CLS], on whichever side the padding is: (B, L, C) to (B, C)."""
    if attention_mask is None:
        return x[:, 0]
    first = attention_mask.bool().int().argmax(dim=-1)  # (B,)
    return x[torch.arange(len(x), device=x.device), first]


def pool_packed(x: torch.Tensor, cu_seqlens: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector for each sequence of a packed stream.

    Args:
        x: (N, C).
        cu_seqlens: (S + 1,) integers.
        pooling: "cls" for the first token's vector, "mean" for the mean.

    Returns:
        (S, C).
    """
    if pooling == "cls":
        return x[cu_seqlens[:-1].long()]
    lengths = cu_seqlens.diff().long()  # (S,)
    return torch.segment_reduce(x, "mean", lengths=lengths, axis=0)


def _num_choices(input_ids, inputs_embeds) -> int:
    given, dims = (input_ids, 3) if input_ids is not None else (inputs_embeds, 4)
    if given is None or given.dim() != dims:
        raise ConfigError(
            "no input" if given is None else f"input of shape {tuple(given.shape)}",
            "(batch, choices, length)",
            "Stack the choices of each question in a second dimension.",
        )
    return given.shape[1]


def _position_loss(logits, positions, cu_seqlens):
    """Cross-entropy over the tokens of each sequence; a position past the end adds nothing.

    In a padded batch the softmax runs over padding too, as in transformers.
    """
    if cu_seqlens is not None:
        parts = logits.split(cu_seqlens.diff().tolist())
        logits = pad_sequence(parts, batch_first=True, padding_value=float("-inf"))  # (S, L)
    positions = positions.flatten().clamp(0, logits.shape[1])
    return F.cross_entropy(logits, positions, ignore_index=logits.shape[1])


def _output(encoded: EncoderOutput, logits, loss, restore=lambda x: x) -> HeadOutput:
    states = encoded.hidden_states and tuple(map(restore, encoded.hidden_states))
    return HeadOutput(logits, loss, states, encoded.attentions)
