"""The checks of chapter 1: solutions pass, stubs get a friendly word, mistakes their own hint."""

import pytest
import torch

from modernbert_mini.checks import tour

# --- Solutions --------------------------------------------------------------------------------


def fill_by_hand(model, tokenizer, text, k):
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    at_mask = logits[batch.input_ids == tokenizer.mask_token_id]
    best = at_mask[0].softmax(dim=-1).topk(k)
    return [(tokenizer.decode(i), p.item()) for p, i in zip(best.values, best.indices, strict=True)]


def mean_pool(hidden, mask):
    mask = mask[..., None]
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def count_pairs(length, half_window):
    return sum(min(i, half_window) + 1 + min(length - 1 - i, half_window) for i in range(length))


def norm(x, weight, eps):
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


SOLUTIONS = {
    tour.fill_by_hand: fill_by_hand,
    tour.mean_pool: mean_pool,
    tour.count_pairs: count_pairs,
    tour.norm: norm,
}
checks = pytest.mark.parametrize("check", SOLUTIONS, ids=lambda check: check.__name__)


@checks
def test_the_solution_passes_with_a_remark(check):
    result = check(SOLUTIONS[check])
    assert result, result
    assert result.message


@checks
def test_the_stub_gets_a_friendly_word(check):
    def stub(*arguments):
        raise NotImplementedError

    for empty in (stub, lambda *arguments: None, ...):
        result = check(empty)
        assert not result
        assert not result.written
        assert "ot written yet" in result.message


@checks
def test_code_that_raises_is_told_where(check):
    def wrong(*arguments):
        return {}["key"]

    result = check(wrong)
    assert not result
    assert "KeyError" in result.message
    assert "wrong" in result.message


# --- Mistakes ---------------------------------------------------------------------------------


def _at_mask(model, tokenizer, text, special=True):
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=special)
    with torch.no_grad():
        logits = model(**batch).logits[0]
    return logits, batch.input_ids[0].tolist().index(tokenizer.mask_token_id)


def _pairs(tokenizer, probabilities, k):
    best = probabilities.topk(k)
    return [(tokenizer.decode(i), p.item()) for p, i in zip(*best, strict=True)]


def fill_variant(change):
    """A wrong answer: ``change(logits, at)`` gives probabilities over the vocabulary."""

    def answer(model, tokenizer, text, k):
        return _pairs(tokenizer, change(*_at_mask(model, tokenizer, text)), k)

    return answer


def fill_without_special_tokens(model, tokenizer, text, k):
    logits, at = _at_mask(model, tokenizer, text, special=False)
    return _pairs(tokenizer, logits[at].softmax(-1), k)


def fill_where_the_first_text_has_its_mask(model, tokenizer, text, k):
    _, row = _at_mask(model, tokenizer, tour.TEXTS[0])
    return _pairs(tokenizer, _at_mask(model, tokenizer, text)[0][row].softmax(-1), k)


def fill_with_softmax_of_the_best(model, tokenizer, text, k):
    logits, at = _at_mask(model, tokenizer, text)
    best = logits[at].topk(k)
    return [
        (tokenizer.decode(i), p.item())
        for p, i in zip(best.values.softmax(-1), best.indices, strict=True)
    ]


def fill_changed(change):
    """A wrong answer: the right one with something done to it."""
    return lambda model, tokenizer, text, k: change(
        fill_by_hand(model, tokenizer, text, k), tokenizer
    )


def _ids(pairs, tokenizer):
    return [(tokenizer.encode(word, add_special_tokens=False)[0], p) for word, p in pairs]


def _raw(pairs, tokenizer):
    return [(tokenizer.convert_ids_to_tokens(i), p) for i, p in _ids(pairs, tokenizer)]


def centred(x, dim=-1):
    return x - x.mean(dim=dim, keepdim=True)


def norm_in_place(x, weight, eps):
    x -= x.mean(dim=-1, keepdim=True)
    x /= (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    x *= weight
    return x


MISTAKES = [
    # (check, wrong answer, a piece of its own hint)
    (tour.fill_by_hand, lambda m, t, text, k: {}, "list of pairs"),
    (
        tour.fill_by_hand,
        lambda m, t, text, k: fill_by_hand(m, t, text, 2),
        "How many pairs are asked",
    ),
    (tour.fill_by_hand, fill_changed(lambda p, t: p[::-1]), "comes first"),
    (tour.fill_by_hand, fill_variant(lambda logits, at: logits[at]), "These are logits"),
    (tour.fill_by_hand, fill_with_softmax_of_the_best, "sum to 1?"),
    (tour.fill_by_hand, fill_variant(lambda x, at: x.softmax(0)[at]), "over the positions"),
    (tour.fill_by_hand, fill_variant(lambda x, at: x[0].softmax(-1)), "[CLS]. The mask"),
    (tour.fill_by_hand, fill_variant(lambda x, at: x[-1].softmax(-1)), "[SEP]. The mask"),
    (tour.fill_by_hand, fill_where_the_first_text_has_its_mask, "In '[MASK] is the capital"),
    (tour.fill_by_hand, fill_without_special_tokens, "Did the model see [CLS]"),
    (
        tour.fill_by_hand,
        fill_variant(lambda x, at: (x[at] / 2).softmax(-1)),
        "the best probability is",
    ),
    (tour.fill_by_hand, fill_changed(_ids), "a token's number"),
    (tour.fill_by_hand, fill_changed(_raw), "start with `Ġ`"),
    (
        tour.fill_by_hand,
        fill_changed(lambda p, t: [("x", score) for _, score in p]),
        "beside the text of its own",
    ),
    (tour.mean_pool, lambda h, m: h.mean(-1), "lost the C numbers"),
    (tour.mean_pool, lambda h, m: h, "Which shape"),
    (tour.mean_pool, lambda h, m: h[:, 0], "[CLS] pooling"),
    (tour.mean_pool, lambda h, m: (h * m[..., None]).sum(1), "This is the sum"),
    (tour.mean_pool, lambda h, m: h.amax(1), "No token is padding"),
    (tour.mean_pool, lambda h, m: h.mean(1), "Did the padding vote"),
    (tour.mean_pool, lambda h, m: (h * m[..., None]).mean(1), "divide by all 5"),
    (
        tour.mean_pool,
        lambda h, m: (h * m[..., None]).sum(1) / m.sum(1).float().mean(),
        "*own* number",
    ),
    (
        tour.mean_pool,
        lambda h, m: torch.stack(
            [row[: int(n)].mean(0) for row, n in zip(h, m.sum(1), strict=True)]
        ),
        "do not come out right",
    ),
    (tour.mean_pool, lambda h, m: mean_pool(h, m.float().clamp(min=1e-6)), "exactly 0"),
    (tour.count_pairs, lambda n, w: "many", "one whole number"),
    (tour.count_pairs, lambda n, w: 0, "May a token look at itself?"),
    (tour.count_pairs, lambda n, w: 2 * w + 1, "beyond the text"),
    (
        tour.count_pairs,
        lambda n, w: count_pairs(n, w) if n < 3 else n * (2 * w + 1),
        "the *first* token",
    ),
    (tour.count_pairs, lambda n, w: count_pairs(n, w) if n < 3 else n * 2 * w, "Two things"),
    (
        tour.count_pairs,
        lambda n, w: count_pairs(n, w) - (n if n > 1 else 0),
        "only its neighbours",
    ),
    (tour.count_pairs, lambda n, w: count_pairs(n, max(w - 1, 0)), "inside or outside"),
    (tour.count_pairs, lambda n, w: count_pairs(n, w // 2), "one side of it"),
    (tour.count_pairs, lambda n, w: (count_pairs(n, w) + n) // 2, "as a decoder would"),
    (tour.count_pairs, lambda n, w: n * n, "a global layer"),
    (tour.count_pairs, lambda n, w: count_pairs(n, w + 1), "Draw an 11 × 11 grid"),
    (
        tour.count_pairs,
        lambda n, w: n * (2 * w + 1) - w * (w + 1) if n > 1 else 1,
        "longer than the text",
    ),
    (tour.norm, lambda x, w, e: x * (x.square().mean(-1, keepdim=True) + e).rsqrt(), "RMSNorm"),
    (
        tour.norm,
        lambda x, w, e: centred(x, 1) * (centred(x, 1).square().mean(1, keepdim=True) + e).rsqrt(),
        "You took (1,)",
    ),
    (tour.norm, lambda x, w, e: x * w, "What is left of the mean"),
    (
        tour.norm,
        lambda x, w, e: centred(x) / (x.var(-1, keepdim=True) + e).sqrt() * w,
        "C or by C - 1",
    ),
    (
        tour.norm,
        lambda x, w, e: centred(x) / (x.var(-1, keepdim=True, correction=0) + e) * w,
        "or by its square root",
    ),
    (tour.norm, lambda x, w, e: centred(x), "variance of each vector 1"),
    (tour.norm, lambda x, w, e: norm(x, 1, e), "Where is the weight"),
    (tour.norm, lambda x, w, e: norm(x, 1, e) * w.square(), "come last"),
    (
        tour.norm,
        lambda x, w, e: centred(x) / (x.std(-1, keepdim=True, correction=0) + e) * w,
        "under the square root",
    ),
    (tour.norm, norm_in_place, "leave its input as it was"),
]


@pytest.mark.parametrize(
    ("check", "wrong", "hint"), MISTAKES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_mistake_gets_its_own_hint(check, wrong, hint):
    result = check(wrong)
    assert not result
    assert hint in result.message, result.message
    others = [other for c, _, other in MISTAKES if c is check and other != hint]
    assert not any(other in result.message for other in others)


def test_the_norms_of_the_model_come_back():
    model, tokenizer = tour._mini()
    batch = tokenizer("the cat", return_tensors="pt")
    before = model(**batch).logits
    with tour.swapped_norms(model, lambda x, weight, eps: x) as count:
        # one after the embeddings, one and then two a layer, the last one, the head's
        assert count == 2 * len(model.model.layers) - 1 + 3
        assert not torch.allclose(model(**batch).logits, before)
    assert torch.equal(model(**batch).logits, before)
