"""Fill in the [MASK]s of a text, in the format of ``transformers``' fill-mask pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .heads import ModernBertForMaskedLM
    from .tokenizer import Tokenizer

BATCH_SIZE = 32


class FillMask:
    """The most probable tokens for each mask of a text.

    Chapter 1 uses it.

    Args:
        model: a ``ModernBertForMaskedLM``; it is put into evaluation mode, since dropout would
            change the answers from call to call.
        tokenizer: the tokenizer of the same checkpoint.

    Raises:
        TypeError: when the model cannot predict tokens.
        ValueError: when the tokenizer has no mask token.
    """

    def __init__(self, model: ModernBertForMaskedLM, tokenizer: Tokenizer) -> None:
        if not hasattr(model, "decoder"):
            raise TypeError(
                f"{type(model).__name__} has no vocabulary head: load ModernBertForMaskedLM"
            )
        if tokenizer.mask_token_id is None:
            raise ValueError("this tokenizer has no mask token")
        self.model = model.eval()
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def __call__(
        self, text: str | Sequence[str], top_k: int = 5, targets: str | Sequence[str] | None = None
    ) -> list:
        """Predict the masked tokens of one text or several.

        A text with one mask gives a list of ``top_k`` dicts, best first: ``score`` (probability),
        ``token`` (id), ``token_str``, ``sequence`` (the text with the token filled in). A text with
        several masks gives one such list per mask, each mask predicted by itself. Several texts
        give a list of these; a list of one text gives what the text alone would. ``targets`` limits
        the answers to some tokens (a word of several tokens counts as its first one).

        Raises:
            ValueError: for a text without a mask, ``top_k`` below 1, or no usable target.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        texts = [text] if isinstance(text, str) else list(text)
        target_ids = None if targets is None else self._target_ids(targets)
        answers = []
        for start in range(0, len(texts), BATCH_SIZE):
            answers += self._fill(texts[start : start + BATCH_SIZE], top_k, target_ids)
        return answers[0] if len(answers) == 1 else answers

    def _fill(self, texts: list[str], top_k: int, target_ids: list[int] | None) -> list:
        """The answers for one batch of texts."""
        device = next(self.model.parameters()).device
        batch = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        is_mask = batch.input_ids == self.tokenizer.mask_token_id  # (B, L)
        masks_per_text = is_mask.sum(dim=1).tolist()
        for text, count in zip(texts, masks_per_text, strict=True):
            if count == 0:
                raise ValueError(f"no {self.tokenizer.mask_token} in the text {text!r}")
        hidden = self.model.model(**batch).last_hidden_state  # (B, L, C)
        # Only these rows are asked for, and the decoder is the widest matrix of the model.
        logits = self.model.decoder(self.model.head(hidden[is_mask]))  # (masks, V)
        probabilities = logits.float().softmax(dim=-1)  # (masks, V)
        if target_ids is not None:
            probabilities = probabilities[:, target_ids]  # (masks, targets)
        scores, best = probabilities.topk(min(top_k, probabilities.shape[-1]))  # 2 × (masks, top_k)
        if target_ids is not None:
            best = torch.tensor(target_ids, device=device)[best]  # (masks, top_k)
        rows = iter(zip(scores.tolist(), best.tolist(), strict=True))
        answers = []
        for ids, count in zip(batch.input_ids.tolist(), masks_per_text, strict=True):
            positions = [i for i, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
            lists = [self._describe(ids, at, *next(rows), count == 1) for at in positions]
            answers.append(lists[0] if count == 1 else lists)
        return answers

    def _describe(
        self, ids: list[int], at: int, scores: list[float], tokens: list[int], only_mask: bool
    ) -> list[dict[str, Any]]:
        """One dict per candidate for the mask at position ``at`` of ``ids``."""
        answers = []
        for score, token in zip(scores, tokens, strict=True):
            filled = [*ids[:at], token, *ids[at + 1 :]]
            filled = [i for i in filled if i != self.tokenizer.pad_token_id]
            # With more masks in the text, skipping special tokens would hide the others.
            sequence = self.tokenizer.decode(filled, skip_special_tokens=only_mask)
            answers.append(
                {
                    "score": score,
                    "token": token,
                    "token_str": self.tokenizer.decode(token),
                    "sequence": sequence,
                }
            )
        return answers

    def _target_ids(self, targets: str | Sequence[str]) -> list[int]:
        """The ids of the words in ``targets``, without repeats."""
        vocabulary = self.tokenizer.get_vocab()
        ids = []
        for target in [targets] if isinstance(targets, str) else targets:
            pieces = [vocabulary[target]] if target in vocabulary else self._pieces(target)
            ids += pieces[:1]
        if not ids:
            raise ValueError("targets must name at least one token")
        return sorted(set(ids))

    def _pieces(self, target: str) -> list[int]:
        """The tokens of a target that is no single token, with a warning."""
        pieces = self.tokenizer.encode(target, add_special_tokens=False)
        used = self.tokenizer.convert_ids_to_tokens(pieces[:1])
        warnings.warn(
            f"target {target!r} is no token of the vocabulary: "
            + (f"its first piece {used[0]!r} stands for it" if used else "left out"),
            stacklevel=5,
        )
        return pieces
