"""Checks of chapter 1: fill a mask by hand, pool vectors, count pairs, swap a norm."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from modernbert_mini.alternating_attention import window_mask
from modernbert_mini.checks._machinery import exercise, expect, expect_tensor
from modernbert_mini.heads import ModernBertForMaskedLM
from modernbert_mini.tokenizer import Tokenizer

TEXTS = ("The capital of France is [MASK].", "[MASK] is the capital of France, a large country.")


@functools.cache
def _mini() -> tuple[ModernBertForMaskedLM, Tokenizer]:
    return ModernBertForMaskedLM.from_pretrained("mini"), Tokenizer.from_pretrained("mini")


@exercise("1.1", "Fill a mask by hand", difficulty=1, minutes=10)
def fill_by_hand(answer):
    """``answer(model, tokenizer, text, k)`` gives k pairs (token text, probability)."""
    model, tokenizer = _mini()
    k = 4
    for text in TEXTS:
        given = answer(model, tokenizer, text, k)
        pairs = isinstance(given, list) and all(
            isinstance(pair, tuple | list) and len(pair) == 2 for pair in given
        )
        expect(pairs, f"Is your result a list of pairs `(text, probability)`? It is {given!r:.80}.")
        expect(len(given) == k, f"How many pairs are asked for? k is {k}, you give {len(given)}.")
        words, scores = [p[0] for p in given], [float(p[1]) for p in given]
        _expect_scores(model, tokenizer, text, scores)
        best = _logits(model, tokenizer, text).softmax(-1).topk(k).indices.tolist()
        expect(
            all(isinstance(word, str) for word in words),
            "What is the first part of a pair: a token's number, or its text? Numbers become text "
            "with `tokenizer.decode`.",
        )
        right = [tokenizer.decode(i) for i in best]
        expect(
            words == right or words != tokenizer.convert_ids_to_tokens(best),
            "Why do your words start with `Ġ`? The vocabulary writes a space so; "
            "`tokenizer.decode` turns it back.",
        )
        expect(
            words == right,
            "The probabilities are right. Does each stand beside the text of its own token?",
        )
    return "These are the numbers of `FillMask`."


def _logits(model, tokenizer, text: str, special: bool = True) -> torch.Tensor:
    """The logits (V,) at the mask."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids
    at = ids[0].tolist().index(tokenizer.mask_token_id)
    with torch.no_grad():
        return model(input_ids=ids).logits[0, at]


def _expect_scores(model, tokenizer, text: str, scores: list[float]) -> None:
    """Compare k probabilities with the right ones, and with those of usual mistakes."""
    k = len(scores)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        all_logits = model(input_ids=ids).logits[0]  # (L, V)
    at = ids[0].tolist().index(tokenizer.mask_token_id)
    logits = all_logits[at]

    def same(values: torch.Tensor) -> bool:
        return torch.allclose(torch.tensor(scores), values.float(), rtol=1e-3, atol=1e-6)

    right = logits.softmax(-1).topk(k).values
    expect(
        scores == sorted(scores, reverse=True),
        "Which answer comes first? The most probable one should.",
    )
    expect(
        not same(logits.topk(k).values),
        "Can a probability be above 1, or below 0? These are logits: softmax is still to come.",
    )
    expect(
        not same(logits.topk(k).values.softmax(-1)),
        f"Do your {k} probabilities sum to 1? Then what is left for the other words? "
        "Softmax has to see the whole vocabulary, before you pick the best.",
    )
    expect(
        not any(same(all_logits.softmax(0)[row].topk(k).values) for row in range(len(all_logits))),
        "Over what does your softmax sum to 1: over the vocabulary, or over the positions of the "
        "text? The vocabulary is the last dimension.",
    )
    ends = {0: "the first token, [CLS]", len(all_logits) - 1: "the last token, [SEP]"}
    for row, where in ends.items():
        expect(
            not same(all_logits[row].softmax(-1).topk(k).values),
            f"Which row of the logits did you read? These are the answers at {where}. "
            "The mask stands where `input_ids == tokenizer.mask_token_id`.",
        )
    for row in range(len(all_logits)):
        expect(
            row == at or not same(all_logits[row].softmax(-1).topk(k).values),
            f"Which row of the logits did you read? In {text!r} the mask is token {at}, "
            f"these are the answers at token {row}.",
        )
    bare = _logits(model, tokenizer, text, special=False).softmax(-1).topk(k).values
    expect(
        not same(bare),
        "Did the model see [CLS] and [SEP]? It was trained with them around every text: call "
        "`tokenizer(text, return_tensors='pt')`.",
    )
    expect(
        same(right),
        f"Is this softmax over the vocabulary at the mask? For {text!r} the best probability is "
        f"{right[0]:.4f}, yours is {scores[0]:.4f}. Is the model in evaluation mode?",
    )


@exercise("1.2", "One vector for a text", difficulty=2, minutes=10)
def mean_pool(answer):
    """``answer(hidden, mask)`` gives the mean (B, C) over the real tokens of (B, L, C)."""
    torch.manual_seed(0)
    B, L, C = 3, 5, 4
    hidden = torch.randn(B, L, C)
    full = torch.ones(B, L, dtype=torch.long)
    given = answer(hidden.clone(), full.clone())
    expect(
        not (isinstance(given, torch.Tensor) and given.shape == (B, L)),
        "Over which dimension do you take the mean? You kept the tokens and lost the C numbers of "
        "a vector.",
    )
    expect_tensor(given, (B, C))
    expect(
        not torch.allclose(given, hidden[:, 0]),
        "Is this a mean? It is the vector of the first token. That is [CLS] pooling, "
        "another good way, but not this one.",
    )
    expect(
        not torch.allclose(given, hidden.sum(1)),
        "By what do you divide? This is the sum over the tokens.",
    )
    expect(
        torch.allclose(given, hidden.mean(1), atol=1e-5),
        "No token is padding here. Is your result `hidden.mean(dim=1)` in this case?",
    )

    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    given = answer(hidden.clone(), mask.clone())
    expect_tensor(given, (B, C))
    expect(
        not torch.allclose(given, hidden.mean(1), atol=1e-5),
        "Did the padding vote? Tokens with mask 0 are not part of the text.",
    )
    real = (hidden * mask[..., None]).sum(1)
    expect(
        not torch.allclose(given, real / L, atol=1e-5),
        f"By what do you divide? You add up the real tokens, but divide by all {L}: "
        "a short text then gets a short vector.",
    )
    expect(
        not torch.allclose(given, real / mask.sum(1).float().mean(), atol=1e-5)
        and not torch.allclose(given, real / mask.sum(), atol=1e-5),
        "Does each text divide by its *own* number of tokens? Sum the mask over one dimension, "
        "not over the batch.",
    )
    expect(
        torch.allclose(given, real / mask.sum(1, keepdim=True), atol=1e-5),
        "Texts of 3, 5 and 3 real tokens do not come out right. Is the mask (B, L) given a last "
        "dimension before it meets hidden (B, L, C)?",
    )
    wild = hidden.masked_fill(mask[..., None] == 0, 1e4)
    expect(
        torch.allclose(answer(wild, mask.clone()), given, atol=1e-3),
        "The result changes with the vectors of padding tokens. Is their weight exactly 0?",
    )
    return "Padding has no vote, and every text divides by its own length."


@exercise("1.3", "Count what a local layer looks at", difficulty=2, minutes=10)
def count_pairs(answer):
    """``answer(length, half_window)`` counts the pairs (query, key) of a local layer."""
    given = answer(1, 3)
    expect(
        isinstance(given, int) or (isinstance(given, torch.Tensor) and given.numel() == 1),
        f"Is your result one whole number? It is a `{type(given).__name__}`.",
    )
    expect(int(given) != 0, "May a token look at itself? One token alone still has one pair.")
    expect(
        int(given) == 1,
        f"A text of one token has one pair: the token and itself. You count {int(given)}. "
        "Can a window reach beyond the text?",
    )
    length, half_window = 11, 4
    right = _pairs(length, half_window)
    usual = {
        length * (2 * half_window + 1): (
            "What does the *first* token see on its left? At both ends of the text the window is "
            f"cut off; you count all {2 * half_window + 1} keys for everyone."
        ),
        length * 2 * half_window: (
            "Two things: a token sees itself too, and at the ends of the text the window is cut."
        ),
        right - length: "Does a token see itself? You count only its neighbours.",
        _pairs(length, half_window - 1): (
            "Is the key at distance W inside or outside? In `|i - j| <= W` it is inside."
        ),
        (right + length) // 2: (
            "Does a token look to both sides? You count one side only, as a decoder would."
        ),
        _pairs(length, half_window // 2): (
            "Is `half_window` the whole window or one side of it? W is the reach on *each* side."
        ),
        length**2: "Do all tokens see all tokens? That is a global layer.",
    }
    draw = "Draw an 11 × 11 grid and mark the squares with |i - j| <= 4: how many in each row?"
    given = int(answer(length, half_window))
    expect(
        given == right,
        f"For {length} tokens and W = {half_window} you count {given}, but there are {right}. "
        + usual.get(given, draw),
    )
    for length, half_window in ((3, 10), (10, 10), (11, 10), (64, 0), (130, 64)):
        given, right = int(answer(length, half_window)), _pairs(length, half_window)
        expect(
            given == right,
            f"For {length} tokens and W = {half_window} you count {given}, but there are {right}. "
            + ("Is the window longer than the text here?" if length <= 2 * half_window else "")
            + ("With W = 0 each token sees itself." if half_window == 0 else ""),
        )
    share = answer(8192, 64) / 8192**2
    return f"At 8,192 tokens and W = 64 a local layer looks at {share:.1%} of all pairs."


def _pairs(length: int, half_window: int) -> int:
    return int(window_mask(length, half_window).sum())


@exercise("1.4", "Your own norm inside mini", difficulty=3, minutes=15)
def norm(answer):
    """``answer(x, weight, eps)`` is LayerNorm without bias, and then every norm of mini."""
    torch.manual_seed(0)
    x, weight, eps = torch.randn(2, 3, 8) + 3, torch.ones(8), 1e-5
    given = answer(x.clone(), weight, eps)
    expect_tensor(given, (2, 3, 8))
    rms = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    expect(
        not torch.allclose(given, rms, atol=1e-4),
        "Is the mean of each vector 0 afterwards? You divide by its size without taking the mean "
        "away: that is RMSNorm.",
    )
    for dim in ((0,), (1,), (0, 1, 2), (1, 2)):
        wrong = x - x.mean(dim, keepdim=True)
        wrong = wrong * (wrong.square().mean(dim, keepdim=True) + eps).rsqrt()
        expect(
            not torch.allclose(given, wrong, atol=1e-4),
            f"Over which dimension do you normalise? You took {dim} of (B, L, C). Each token is "
            "normed by itself, over its own C numbers: `dim=-1`.",
        )
    expect(
        given.mean(-1).abs().max() < 1e-4,
        "What is left of the mean of each vector? It should be 0, here it is up to "
        f"{given.mean(-1).abs().max():.3f}.",
    )
    unbiased = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt()
    expect(
        not torch.allclose(given, unbiased, atol=1e-5),
        "Does your variance divide by C or by C - 1? `var` and `std` divide by C - 1 unless you "
        "say `correction=0`.",
    )
    variance = x - x.mean(-1, keepdim=True)
    variance = variance / (variance.square().mean(-1, keepdim=True) + eps)
    expect(
        not torch.allclose(given, variance, atol=1e-4),
        "Do you divide by the variance, or by its square root?",
    )
    right = nn.functional.layer_norm(x, (8,), weight, None, eps)
    expect(
        torch.allclose(given, right, atol=1e-4),
        "Is the variance of each vector 1 afterwards? "
        f"Here it lies between {given.var(-1, correction=0).min():.3f} and "
        f"{given.var(-1, correction=0).max():.3f}.",
    )
    weight = torch.rand(8) + 1
    given = answer(x.clone(), weight, eps)
    expect(
        not torch.allclose(given, right, atol=1e-4),
        "Where is the weight? Each of the C numbers is multiplied by its own at the end.",
    )
    expect(
        torch.allclose(given, right * weight, atol=1e-4),
        "Does the weight come last, after mean and size are gone?",
    )
    small = x * 1e-3
    expected = nn.functional.layer_norm(small, (8,), weight, None, eps)
    given = answer(small.clone(), weight, eps)
    expect(
        torch.allclose(given, expected, atol=1e-4),
        "Where does eps stand: under the square root, beside the variance? For very small vectors "
        f"that matters: the largest difference is {(given - expected).abs().max():.2f}.",
    )
    model, tokenizer = _mini()
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        before = model(**batch).logits
        with swapped_norms(model, answer) as count:
            after = model(**batch).logits
    difference = float((before - after).abs().max())
    expect(
        math.isfinite(difference) and difference < 1e-2,
        f"Alone your norm is right, but inside `mini` the logits move by {difference:.3g}. "
        "Does it work on (B, L, C) of any size, and leave its input as it was?",
    )
    return (
        f"Your norm ran in {count} places of `mini`; the logits moved by {difference:.1e} at most."
    )


@contextlib.contextmanager
def swapped_norms(model: nn.Module, norm: Callable) -> Iterator[int]:
    """Let ``norm(x, weight, eps)`` stand in for every LayerNorm of a model for a while."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    for module in norms:
        # Bound now: in a closure all of them would share the last module.
        module.forward = functools.partial(_forward, module, norm)
    try:
        yield len(norms)
    finally:
        for module in norms:
            del module.forward


def _forward(module: nn.LayerNorm, norm: Callable, x: torch.Tensor) -> torch.Tensor:
    return norm(x, module.weight, module.eps)
