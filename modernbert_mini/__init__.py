"""ModernBERT from scratch: the model, its tokenizer and its checkpoints in code meant to be read.

Public names load on first use, so that `import modernbert_mini` costs little more than
`import torch`.
"""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "CheckpointError": "sources",
    "ConfigError": "config",
    "FillMask": "fill_mask",
    "FlatteningCollator": "unpadding",
    "MaskingCollator": "pretraining",
    "ModernBertConfig": "config",
    "ModernBertForMaskedLM": "heads",
    "ModernBertForMultipleChoice": "heads",
    "ModernBertForQuestionAnswering": "heads",
    "ModernBertForSequenceClassification": "heads",
    "ModernBertForTokenClassification": "heads",
    "ModernBertModel": "model",
    "Tokenizer": "tokenizer",
    "explain_divergence": "transplant",
    "pack_sequences": "unpadding",
    "start_at": "chapters",
    "swap": "transplant",
}
_MODULES = {
    "alternating_attention",
    "atomic",
    "attention",
    "benchmark",
    "chapters",
    "checkpoints",
    "checks",
    "cli",
    "config",
    "data",
    "distributed",
    "doctor",
    "fill_mask",
    "flash_attention",
    "geglu",
    "heads",
    "inputs",
    "inspection",
    "linear",
    "model",
    "model_card",
    "operators",
    "plots",
    "pretraining",
    "recipe",
    "rope",
    "sources",
    "tokenizer",
    "transplant",
    "triton_kernel",
    "unpadding",
    "views",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
