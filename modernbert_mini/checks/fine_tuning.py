"""Checks of chapter 13, fine-tuning."""

import math
from functools import cache

import torch
from torch.nn import functional as F

from modernbert_mini import fine_tuning
from modernbert_mini.checks._machinery import exercise, expect, expect_close, expect_tensor
from modernbert_mini.config import ModernBertConfig
from modernbert_mini.heads import (
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    PredictionHead,
)
from modernbert_mini.tokenizer import Tokenizer
from modernbert_mini.transplant import swap

IGNORED = fine_tuning.IGNORED


@exercise("13.1", "Labels for tokens", difficulty=1, minutes=8)
def token_labels(answer):
    words = [None, 0, 1, 1, 1, 2, 2, 3, None]
    labels = [4, 0, 7, 2]
    given = (list(words), list(labels))
    out = answer(*given)
    if isinstance(out, torch.Tensor):
        out = out.tolist()
    expect(given == (words, labels), "Does your function write into its arguments?")
    expect(
        isinstance(out, list) and len(out) == len(words),
        f"One label for each token: {len(words)} of them. How many does yours return?",
    )
    right = [IGNORED, 4, 0, IGNORED, IGNORED, 7, IGNORED, 2, IGNORED]
    if out == right:
        other = answer([0, 0, None, None, 1, None, 0], [3, 5])
        expect(
            list(other) == [3, IGNORED, IGNORED, IGNORED, 5, IGNORED, IGNORED],
            "Right here, wrong where a word index comes back after another word, as it does in "
            "a pair of texts cut by a window. Did you remember every word that had its turn?",
        )
        return "One label for each word, and no loss anywhere else."
    every = [IGNORED if w is None else labels[w] for w in words]
    expect(
        out != every,
        "Do all pieces of a word carry its label? Then a long word counts more than a short one. "
        "Only the first piece does; the others get −100.",
    )
    expect(
        out != [IGNORED, 4, IGNORED, IGNORED, 0, IGNORED, 7, 2, IGNORED],
        "Which piece carries the label: the first or the last? Yours is the last. The model is "
        "read where it was taught, and that is the first.",
    )
    expect(
        out[1] == labels[0],
        "Is the first word's label at its own token? Position 0 is [CLS], and belongs to no word.",
    )
    specials = [i for i, word in enumerate(words) if word is None]
    expect(
        all(out[i] == IGNORED for i in specials),
        "What should the model say at [CLS] and [SEP]? Nothing: −100, which the loss leaves out. "
        "A 0 would be a class.",
    )
    expect(
        not any(out[i] in (0, None) and right[i] == IGNORED for i in (3, 4, 6)),
        "What stands at the other pieces of a word? −100. A 0 there teaches class 0.",
    )
    expect(
        False,
        "Follow one word: `words[i]` says which word token i belongs to, None for none. Its label "
        "stands at the first such i.",
    )


@exercise("13.2", "Slower below", difficulty=1, minutes=8)
def layer_rates(answer):
    layers, lr, decay = 3, 0.8, 0.5
    out = answer(layers, lr, decay)
    out = torch.as_tensor(out, dtype=torch.float64) if out is not None else out
    expect_tensor(out, (layers + 2,), what="the list of rates: embedding, layers, head")
    steps = torch.arange(layers + 2, dtype=torch.float64)
    right = lr * decay ** (layers + 1 - steps)
    expect_close(
        out,
        right,
        [
            (
                right.flip(0),
                "Which end learns fastest? The head is new, so it has the most to learn. Yours "
                "is the embedding.",
            ),
            (
                lr * decay ** (layers - steps),
                "Is the rate of the head itself `lr`? Yours is larger: the exponent is one short.",
            ),
            (
                lr * decay ** (layers + 2 - steps),
                "Is the rate of the head itself `lr`? Yours has been made smaller once already.",
            ),
            (
                lr * decay ** (layers - (steps - 1).clamp(min=0)).clamp(max=layers),
                "How many steps down is the embedding? One below the first layer, not the same "
                "rate.",
            ),
            (
                lr * (1 - decay * (layers + 1 - steps)),
                "Do you subtract, or multiply? Each step multiplies by `decay`; subtracting "
                "makes rates negative.",
            ),
            (
                lr * (steps + 1) / (layers + 2),
                "Where does `decay` come in? Your rates fall evenly, whatever it is.",
            ),
            (
                torch.full_like(steps, lr),
                "Do all parts learn alike? That is `decay = 1`. Multiply once for each step down.",
            ),
        ],
        "From the top: the head has `lr`, the last layer `lr · decay`, the one below it "
        "`lr · decay²`, and so on down to the embedding.",
    )
    same = torch.as_tensor(answer(6, 1e-3, 1.0), dtype=torch.float64)
    expect(
        tuple(same.shape) == (8,) and torch.allclose(same, torch.full_like(same, 1e-3)),
        "With `decay = 1` and 6 layers there are 8 equal rates. Is a number written into your "
        "code?",
    )
    return "The new part learns, what was learned before moves little."


@exercise("13.3", "The best span", difficulty=2, minutes=12)
def best_span(answer):
    def ask(starts, ends, longest):
        out = answer(torch.tensor(starts), torch.tensor(ends), longest)
        ok = isinstance(out, tuple | list) and len(out) == 2
        expect(ok, "Two numbers: the first and the last token of the answer.")
        return tuple(int(x) for x in out)

    out = ask([1.5, 0, 5, 1, 0, 0, 0], [0.0, 6, 1, 0, 3, 0, 4], 3)
    expect(
        out != (2, 1),
        "May an answer end before it starts? The best start is token 2 and the best end token 1. "
        "Choose them together, not each alone.",
    )
    expect(
        out != (2, 6),
        "How long may an answer be? Yours is 5 tokens, from 2 to 6, and `longest` is 3.",
    )
    expect(
        out != (2, 5),
        "Is the end included? The second number is the last token of the answer itself.",
    )
    expect(
        out != (0, 1),
        "Is a better sum in reach? An answer of exactly `longest` tokens is allowed, and neither "
        "the best start nor the best end need be in it.",
    )
    expect(out != (2, 2), "Whose end is token 2? Compare the sums of all pairs up to `longest`.")
    expect(
        out == (2, 4), f"The best sum is 8, from token 2 to 4. Yours is from {out[0]} to {out[1]}."
    )
    out = ask([3.0, 0, 4, 0], [0.0, 9, 0, 0], 3)
    expect(
        out == (0, 1),
        "Do you fix the best start first and then look for an end? Here a weaker start has a far "
        "better end: compare the sums of all pairs.",
    )
    out = ask([-1.0, -5, -5], [-9.0, -9, -2], 3)
    expect(
        out[0] <= out[1],
        "What stands at the pairs that are not allowed? Logits may be negative, and then a 0 "
        "wins. Put −∞ there.",
    )
    expect(
        out == (0, 2),
        "Do you multiply the two logits? Two bad ones would make a good one. They add: the "
        "probabilities behind them multiply.",
    )
    out = ask([5.0, 0, 0, 0], [0.0, 0, 3, 4], 3)
    expect(
        out == (0, 2),
        f"With `longest = 3`, tokens 0 to 2 are allowed, 0 to 3 are one too many. Yours: {out}.",
    )
    return "The best pair that is an answer at all."


@exercise("13.4", "Find your own text", difficulty=2, minutes=12)
def contrastive_loss(answer):
    random = torch.Generator().manual_seed(4)
    queries, texts = F.normalize(torch.randn(2, 6, 8, generator=random), dim=-1)
    temperature = 0.2
    given = queries.clone(), texts.clone()
    out = answer(*given, temperature)
    expect_tensor(out, ())
    expect(
        torch.equal(given[0], queries) and torch.equal(given[1], texts),
        "Does your function write into its arguments?",
    )
    own = torch.arange(6)

    def loss(scores):
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

    cosines = queries @ texts.T
    one_way = F.cross_entropy(cosines / temperature, own)
    back = F.cross_entropy(cosines.T / temperature, own)
    expect_close(
        out,
        loss(cosines / temperature),
        [
            (
                loss(cosines),
                "Where is the temperature? Cosines lie between −1 and 1: a softmax over them is "
                "nearly flat. Divide by it.",
            ),
            (
                loss(cosines * temperature),
                "Do you divide by the temperature, or multiply? A small one must sharpen.",
            ),
            (one_way, "Each query finds its text. Does each text find its query too? Take both."),
            (back, "Each text finds its query. Does each query find its text too? Take both."),
            (
                one_way + back,
                "Both directions, but their sum: take the mean, so that a guess costs log B.",
            ),
            (
                -cosines.diagonal().mean() / temperature,
                "Are only the right pairs in your loss? Without wrong texts to push away, all "
                "vectors may become the same.",
            ),
            (
                loss(queries @ queries.T / temperature),
                "Whom do the queries meet? You compare them with themselves.",
            ),
            (
                -loss(cosines / temperature),
                "A loss is what training makes smaller. Is yours the right way round?",
            ),
        ],
        "Right shape, wrong number. The steps: all cosines, divided by the temperature; row i "
        "has its right answer in column i; cross-entropy along rows and along columns; the mean.",
    )
    big = answer(queries[:2], texts[:2], 1e-3)
    expect(
        math.isfinite(float(big)),
        "With a temperature of 0.001 the loss is no number. `exp` overflows: use a softmax or a "
        "cross-entropy that subtracts the maximum.",
    )
    return "The other texts of the batch serve as wrong answers, at no extra cost."


@cache
def _classifier():
    """A small classifier with random weights, no two norms or biases alike, and a batch."""
    config = ModernBertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
        initializer_range=0.5,
        classifier_bias=True,
        pad_token_id=0,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(13)
        model = ModernBertForSequenceClassification(config).eval()
        for parameter in model.head.parameters():
            parameter.add_(0.5 * torch.rand_like(parameter))
        return model, torch.randint(3, 50, (4, 7))


@cache
def _mini():
    """The embedded masked language model, which shares the head, and a text for it."""
    model = ModernBertForMaskedLM.from_pretrained("mini").eval()
    text = "A violin is a [MASK] string instrument."
    return model, Tokenizer.from_pretrained("mini")(text, return_tensors="pt")["input_ids"]


@exercise("13.5", "Your own head", difficulty=1, minutes=8)
@torch.no_grad()
def own_head(answer):
    model, ids = _classifier()
    head: PredictionHead = model.head
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    given = x.clone()
    out = answer(head, given)
    expect_tensor(out, (4, 16))
    expect(torch.equal(given, x), "Does your function write into its argument?")
    dense, act, norm = head.dense, head.act, head.norm
    expect_close(
        out,
        norm(act(dense(x))),
        [
            (act(norm(dense(x))), "In which order? The norm comes last, after the activation."),
            (norm(dense(x)), "Where is the activation? Without it two linear maps are one."),
            (act(dense(x)), "Where is the norm? The classifier was trained on normed vectors."),
            (dense(x), "That is the dense layer alone: activation and norm are missing."),
            (norm(act(x)), "Where is the dense layer, `self.dense`?"),
            (norm(x + act(dense(x))), "Is there a residual here? In layers yes, in the head no."),
            (
                norm(F.gelu(dense(x), approximate="tanh")),
                "Which GELU? Yours is the approximation by tanh; the head has the exact one, "
                "`self.act`.",
            ),
            (norm(F.relu(dense(x))), "Which activation? The head's own is `self.act`, no ReLU."),
            (norm(torch.tanh(dense(x))), "Is that BERT's pooler? It had a tanh; here is GELU."),
            (norm(act(x @ dense.weight + dense.bias)), "`nn.Linear` computes x @ Wᵀ. Yours: W."),
        ],
        "Three steps, in this order: `self.dense`, `self.act`, `self.norm`.",
    )
    before = model(ids).logits
    after = swap(model, "head", answer)(ids).logits
    expect_close(after, before, [], "Right alone, wrong in the model. Does it keep state?")
    mini, ids = _mini()
    before = mini(ids).logits
    after = swap(mini, "head", answer)(ids).logits  # here each token has a vector: (1, L, C)
    expect_close(
        after,
        before,
        [],
        "Right in a classifier, wrong in `mini`, where the head works on every token. Does your "
        "head take a text for granted where a vector is all it gets?",
    )
    return "Swapped into a classifier and into `mini`, the logits stay as they were."
