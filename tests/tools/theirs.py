"""A model of transformers behind the signature of this package's: packed streams in and out."""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "sentence-embedding": "AutoModel",
}


class Theirs(nn.Module):
    """Pads a packed stream, asks the model of transformers, and packs its answer again."""

    def __init__(self, model: nn.Module, pad_id: int):
        super().__init__()
        self.model, self.pad_id, self.config = model, pad_id, model.config

    @classmethod
    def load(cls, task: str, folder, pad_id: int) -> "Theirs":
        """The checkpoint of a task; AssertionError where a key is missing or unexpected."""
        import transformers

        auto = getattr(transformers, AUTO[task])
        model, report = auto.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        return cls(model.eval(), pad_id)

    def forward(self, input_ids, cu_seqlens, max_seqlen, num_choices=None):
        parts = input_ids.split(cu_seqlens.diff().tolist())
        ids = pad_sequence(parts, batch_first=True, padding_value=self.pad_id)  # (B, L)
        lengths = torch.tensor([len(part) for part in parts])
        real = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, L)
        inputs = {"input_ids": ids, "attention_mask": real.long()}
        if num_choices:
            inputs = {k: v.unflatten(0, (-1, num_choices)) for k, v in inputs.items()}
        out = self.model(**inputs)
        if num_choices is None:
            for key, value in out.items():
                if torch.is_tensor(value) and value.shape[:2] == real.shape:
                    out[key] = value[real]
        return out
