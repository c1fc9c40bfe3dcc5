"""Pairs of models with the same weights, ours and transformers', on tiny random configs."""

import pytest
import torch

from modernbert_mini import config as config_module
from modernbert_mini import heads, model

transformers = pytest.importorskip("transformers", minversion="5")

CLASSES = (
    "ModernBertModel",
    "ModernBertForMaskedLM",
    "ModernBertForSequenceClassification",
    "ModernBertForTokenClassification",
    "ModernBertForMultipleChoice",
    "ModernBertForQuestionAnswering",
)

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "local_attention": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "initializer_range": 0.2,  # large weights: an error anywhere must show in the output
    "initializer_cutoff_factor": 2.0,
}

# Each varies something that a config can vary; together they vary all of it.
VARIANTS = {
    "published": {},
    "one head": {"num_attention_heads": 1, "hidden_size": 34},
    "five heads": {"num_attention_heads": 5, "hidden_size": 40},
    "seven heads of 2": {"num_attention_heads": 7, "hidden_size": 14, "num_hidden_layers": 3},
    "window 0": {"local_attention": 0},
    "window 2": {"local_attention": 2},
    "odd window": {"local_attention": 7},
    "window beyond the text": {"local_attention": 1000},
    "all layers global": {"global_attn_every_n_layers": 1},
    "every second layer global": {"global_attn_every_n_layers": 2},
    "first layer global": {"global_attn_every_n_layers": 9},
    "irregular layers": {
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "full_attention",
            "sliding_attention",
        ]
    },
    "one layer": {"num_hidden_layers": 1},
    "all biases": {
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
        "decoder_bias": True,
    },
    "no decoder bias": {"decoder_bias": False},
    "silu": {"hidden_activation": "silu", "classifier_activation": "silu"},
    "tanh gelu": {"hidden_activation": "gelu_pytorch_tanh", "classifier_activation": "relu"},
    "mean pooling": {"classifier_pooling": "mean"},
    "untied decoder": {"tie_word_embeddings": False},
    "sparse prediction": {"sparse_prediction": True, "sparse_pred_ignore_index": -7},
    "ettin's bases": {"local_rope_theta": 160_000.0},
    "other bases": {"global_rope_theta": 500.0, "local_rope_theta": 20.0},
    "rope_parameters": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        }
    },
    "no pad id": {"pad_token_id": None},
    "other epsilon": {"norm_eps": 1e-2},
}


def make_pair(name: str, variant: str, attn_implementation: str = "sdpa", **overrides):
    """Our model and transformers', both of class ``name``, in float32 and with equal weights."""
    values = {**BASE, **VARIANTS[variant], **overrides}
    torch.manual_seed(0)
    theirs = getattr(transformers, name)._from_config(
        transformers.ModernBertConfig(**values), attn_implementation=attn_implementation
    )
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:  # else all ones, all zeros
                parameter.add_(0.3 * torch.randn_like(parameter))
    ours = getattr(heads if "For" in name else model, name)(
        config_module.ModernBertConfig(**values), attn_implementation=attn_implementation
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def make_batch(lengths=(1, 200, 37, 64, 2, 129), seed=0, choices=None, left=False):
    """A padded batch of random ids: ``input_ids`` and ``attention_mask``, (B, L) each.

    With ``choices``, both are (B / choices, choices, L).
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(longest - length, None) if left else slice(length)
        ids[row, where] = torch.randint(1, BASE["vocab_size"], (length,), generator=generator)
        mask[row, where] = 1
    if choices:
        ids, mask = (x.view(-1, choices, longest) for x in (ids, mask))
    return {"input_ids": ids, "attention_mask": mask}


def make_labels(name: str, batch, seed=1):
    """Labels that fit a class and a batch, as keyword arguments of ``forward``."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def draw(high, shape):
        return torch.randint(0, high, shape, generator=generator)

    if name == "ModernBertForMaskedLM":
        chosen = (torch.rand(ids.shape, generator=generator) < 0.3) & mask.bool()
        chosen[0, 0] = True
        return {"labels": torch.where(chosen, ids, -100)}
    if name == "ModernBertForTokenClassification":
        return {"labels": torch.where(mask.bool(), draw(2, ids.shape), -100)}
    if name == "ModernBertForQuestionAnswering":
        starts = draw(ids.shape[-1] - 1, (len(ids),))
        starts[0] = 1000  # beyond the end: adds no loss
        return {"start_positions": starts, "end_positions": starts + 1}
    if name == "ModernBertForMultipleChoice":
        return {"labels": draw(ids.shape[1], (len(ids),))}
    if name == "ModernBertForSequenceClassification":
        return {"labels": draw(2, (len(ids),))}
    return {}


def scores(output) -> list[torch.Tensor]:
    """What a model predicts, whichever class it is of."""
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return [value for n in names if (value := getattr(output, n, None)) is not None]
