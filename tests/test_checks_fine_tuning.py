"""Each exercise of chapter 13: the solution passes, and each mistake gets its own hint."""

import pytest
import torch
from torch.nn import functional as F

from modernbert_mini import checks, fine_tuning

IGNORED = -100


def token_labels(words, labels):
    seen, found = set(), []
    for word in words:
        first = word is not None and word not in seen
        found.append(labels[word] if first else IGNORED)
        seen.add(word)
    return found


def layer_rates(layers, lr, decay):
    return [lr * decay ** (layers + 1 - depth) for depth in range(layers + 2)]


def own_head(self, x):
    return self.norm(self.act(self.dense(x)))


SOLUTIONS = {
    "token_labels": token_labels,
    "layer_rates": layer_rates,
    "best_span": fine_tuning.best_span,
    "contrastive_loss": fine_tuning.contrastive_loss,
    "own_head": own_head,
}


# ---- token_labels ----


def all_pieces(words, labels):
    return [IGNORED if w is None else labels[w] for w in words]


def last_piece(words, labels):
    after = [*words[1:], None]
    pairs = zip(words, after, strict=True)
    return [labels[w] if w is not None and w != n else IGNORED for w, n in pairs]


def zero_at_specials(words, labels):
    right = token_labels(words, labels)
    return [0 if w is None else x for w, x in zip(words, right, strict=True)]


def zero_at_pieces(words, labels):
    right = token_labels(words, labels)
    return [0 if w is not None and x == IGNORED else x for w, x in zip(words, right, strict=True)]


def no_cls(words, labels):
    return [*token_labels(words, labels)[1:], IGNORED]


def neighbours_only(words, labels):
    before = [None, *words[:-1]]
    pairs = zip(words, before, strict=True)
    return [labels[w] if w is not None and w != b else IGNORED for w, b in pairs]


def labels_alone(words, labels):
    return labels


# ---- layer_rates ----


def upside_down(layers, lr, decay):
    return layer_rates(layers, lr, decay)[::-1]


def one_short(layers, lr, decay):
    return [r / decay for r in layer_rates(layers, lr, decay)]


def one_long(layers, lr, decay):
    return [r * decay for r in layer_rates(layers, lr, decay)]


def embedding_like_layer_0(layers, lr, decay):
    rates = layer_rates(layers, lr, decay)
    return [rates[1], *rates[1:]]


def subtracted(layers, lr, decay):
    return [lr * (1 - decay * (layers + 1 - depth)) for depth in range(layers + 2)]


def evenly(layers, lr, decay):
    return [lr * (depth + 1) / (layers + 2) for depth in range(layers + 2)]


def all_alike(layers, lr, decay):
    return [lr] * (layers + 2)


def without_embedding(layers, lr, decay):
    return layer_rates(layers, lr, decay)[1:]


def three_layers(layers, lr, decay):
    return layer_rates(3, lr, decay)


# ---- best_span ----


def pairs(starts, ends, longest):
    n = len(starts)
    return [(a, b) for a in range(n) for b in range(a, min(n, a + longest))]


def each_alone(starts, ends, longest):
    return int(starts.argmax()), int(ends.argmax())


def no_limit(starts, ends, longest):
    return fine_tuning.best_span(starts, ends, len(starts))


def end_behind(starts, ends, longest):
    start, end = fine_tuning.best_span(starts, ends, longest)
    return start, end + 1


def too_short(starts, ends, longest):
    return fine_tuning.best_span(starts, ends, longest - 1)


def start_first(starts, ends, longest):
    start = int(starts.argmax())
    return start, start + int(ends[start : start + longest].argmax())


def masked_with_zero(starts, ends, longest):
    scores = (starts[:, None] + ends).triu().tril(longest - 1)
    return divmod(int(scores.argmax()), len(ends))


def multiplied(starts, ends, longest):
    return max(pairs(starts, ends, longest), key=lambda p: float(starts[p[0]] * ends[p[1]]))


def one_too_long(starts, ends, longest):
    return fine_tuning.best_span(starts, ends, longest + 1)


def start_alone(starts, ends, longest):
    return int(starts.argmax())


# ---- contrastive_loss ----


def loss_of(scores):
    own = torch.arange(len(scores))
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def no_temperature(queries, texts, temperature):
    return loss_of(queries @ texts.T)


def times_temperature(queries, texts, temperature):
    return loss_of(queries @ texts.T * temperature)


def one_way(queries, texts, temperature):
    return F.cross_entropy(queries @ texts.T / temperature, torch.arange(len(texts)))


def other_way(queries, texts, temperature):
    return one_way(texts, queries, temperature)


def summed(queries, texts, temperature):
    return one_way(queries, texts, temperature) + other_way(queries, texts, temperature)


def right_pairs_only(queries, texts, temperature):
    return -(queries * texts).sum(-1).mean() / temperature


def with_themselves(queries, texts, temperature):
    return loss_of(queries @ queries.T / temperature)


def rewarded(queries, texts, temperature):
    return -loss_of(queries @ texts.T / temperature)


def overflowing(queries, texts, temperature):
    powers = (queries @ texts.T / temperature).exp()
    rows, columns = powers / powers.sum(1, keepdim=True), powers / powers.sum(0)
    return -(rows.diagonal().log().mean() + columns.diagonal().log().mean()) / 2


def not_reduced(queries, texts, temperature):
    return queries @ texts.T / temperature


# ---- own_head ----


def norm_first(self, x):
    return self.act(self.norm(self.dense(x)))


def no_activation(self, x):
    return self.norm(self.dense(x))


def no_norm(self, x):
    return self.act(self.dense(x))


def dense_alone(self, x):
    return self.dense(x)


def no_dense(self, x):
    return self.norm(self.act(x))


def residual(self, x):
    return self.norm(x + self.act(self.dense(x)))


def tanh_gelu(self, x):
    return self.norm(F.gelu(self.dense(x), approximate="tanh"))


def relu(self, x):
    return self.norm(F.relu(self.dense(x)))


def berts_pooler(self, x):
    return self.norm(torch.tanh(self.dense(x)))


def untransposed(self, x):
    return self.norm(self.act(x @ self.dense.weight + self.dense.bias))


class Remembers:
    """Right the first times."""

    __name__ = "remembers"

    def __init__(self, right):
        self.calls, self.right = 0, right

    def __call__(self, head, x):
        self.calls += 1
        return own_head(head, x) * (1 if self.calls <= self.right else 2)


MISTAKES = {
    "token_labels": {
        all_pieces: "all pieces of a word",
        last_piece: "the first or the last",
        zero_at_specials: "at [CLS] and [SEP]",
        zero_at_pieces: "teaches class 0",
        no_cls: "first word's label",
        neighbours_only: "had its turn",
        labels_alone: "One label for each token",
    },
    "layer_rates": {
        upside_down: "Which end learns fastest",
        one_short: "one short",
        one_long: "smaller once already",
        embedding_like_layer_0: "How many steps down is the embedding",
        subtracted: "subtract, or multiply",
        evenly: "Where does `decay` come in",
        all_alike: "Do all parts learn alike",
        without_embedding: "Which shape",
        three_layers: "a number written into",
    },
    "best_span": {
        each_alone: "end before it starts",
        no_limit: "How long may an answer be",
        end_behind: "Is the end included",
        too_short: "exactly `longest` tokens",
        start_first: "fix the best start first",
        masked_with_zero: "Put −∞ there",
        multiplied: "They add",
        one_too_long: "one too many",
        start_alone: "Two numbers",
    },
    "contrastive_loss": {
        no_temperature: "Where is the temperature",
        times_temperature: "divide by the temperature, or multiply",
        one_way: "find its query too",
        other_way: "find its text too",
        summed: "but their sum",
        right_pairs_only: "Are only the right pairs",
        with_themselves: "with themselves",
        rewarded: "right way round",
        overflowing: "overflows",
        not_reduced: "Which shape",
    },
    "own_head": {
        norm_first: "In which order",
        no_activation: "Where is the activation",
        no_norm: "Where is the norm",
        dense_alone: "the dense layer alone",
        no_dense: "Where is the dense layer",
        residual: "a residual",
        tanh_gelu: "Which GELU",
        relu: "Which activation",
        berts_pooler: "BERT's pooler",
        untransposed: "Wᵀ",
    },
}
CASES = [(name, m, said) for name, mistakes in MISTAKES.items() for m, said in mistakes.items()]


def check(name):
    return getattr(checks.fine_tuning, name)


def test_every_exercise_of_the_chapter_is_tested():
    mine = {number for number in checks.EXERCISES if number.startswith("13.")}
    assert mine == {check(name).exercise.number for name in SOLUTIONS}
    assert SOLUTIONS.keys() == MISTAKES.keys() and all(len(m) >= 3 for m in MISTAKES.values())


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_passes(name):
    result = check(name)(SOLUTIONS[name])
    assert result.passed, result
    assert result.message


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_stub_is_not_written_yet(name):
    def stub(*args):
        raise NotImplementedError

    for answer in (stub, ..., lambda *args: None):
        result = check(name)(answer)
        assert not result.passed and not result.written
        assert result.message.startswith("Not written yet")


@pytest.mark.parametrize(("name", "mistake", "said"), CASES)
def test_a_mistake_gets_its_own_hint(name, mistake, said):
    result = check(name)(mistake)
    assert not result.passed and result.written
    assert said in result.message, result.message


@pytest.mark.parametrize("name", MISTAKES)
def test_no_two_mistakes_get_the_same_hint(name):
    messages = [check(name)(mistake).message for mistake in MISTAKES[name]]
    assert len(set(messages)) == len(messages)


@pytest.mark.parametrize(("right", "said"), [(1, "wrong in the model"), (2, "wrong in `mini`")])
def test_a_head_that_remembers_is_caught_by_the_models(right, said):
    result = check("own_head")(Remembers(right))
    assert not result.passed and said in result.message


def test_checks_leave_the_random_state_alone():
    checks.fine_tuning._classifier.cache_clear()
    checks.fine_tuning._mini.cache_clear()
    state = torch.random.get_rng_state()
    for name, solution in SOLUTIONS.items():
        check(name)(solution)
    assert torch.equal(torch.random.get_rng_state(), state)
