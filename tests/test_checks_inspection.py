"""Each exercise of chapter 16: the solution passes, and each mistake gets its own hint."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

from modernbert_mini import checks, inspection


@contextmanager
def one_head(model, layer, head):
    with inspection.ablated_heads(model, [(layer, head)]):
        yield


def distance_of(weights, tokens):
    length = weights.shape[-1]
    return inspection.distance_profile(weights, tokens) @ torch.arange(length).float()


def probe(train_x, train_y, test_x):
    return inspection.fit_ridge(train_x, F.one_hot(train_y))(test_x).argmax(dim=-1)


SOLUTIONS = {
    "attention_distance": distance_of,
    "logit_lens": inspection.logit_lens,
    "token_rank": inspection.token_rank,
    "ablated_head": one_head,
    "linear_probe": probe,
    "standard_error": inspection.standard_error,
}


# ---- attention_distance ----


def distances(weights):
    position = torch.arange(weights.shape[-1])
    return (position[:, None] - position).abs().float()


def per_query(weights, tokens, distance=None):
    """(B, H, L), with the keys that count."""
    kept = weights * tokens[:, None, None, :]
    kept = kept / kept.sum(-1, keepdim=True)
    return (kept * (distances(weights) if distance is None else distance)).sum(-1)


def over_queries(rows, tokens):
    return (rows * tokens[:, None]).sum((0, 2)) / tokens.sum()


def for_each_text(weights, tokens):
    return per_query(weights, tokens).mean(-1)


def summed(weights, tokens):
    return over_queries(per_query(weights, tokens), tokens) * tokens.sum()


def averaged_over_keys_too(weights, tokens):
    return (weights * distances(weights)).mean((0, 2, 3))


def signed(weights, tokens):
    position = torch.arange(weights.shape[-1])
    rows = per_query(weights, tokens, (position - position[:, None]).float())
    return over_queries(rows, tokens)


def absolute_too_late(weights, tokens):
    return signed(weights, tokens).abs()


def squared(weights, tokens):
    return over_queries(per_query(weights, tokens, distances(weights) ** 2), tokens)


def favourite(weights, tokens):
    length = weights.shape[-1]
    rows = distances(weights)[torch.arange(length), weights.argmax(-1)]
    return over_queries(rows, tokens)


def padding_looks(weights, tokens):
    return per_query(weights, tokens).mean((0, 2))


def padding_divides(weights, tokens):
    return (per_query(weights, tokens) * tokens[:, None]).mean((0, 2))


def text_by_text(weights, tokens):
    rows = per_query(weights, tokens)
    return torch.stack([row[:, t].mean(-1) for row, t in zip(rows, tokens, strict=True)]).mean(0)


def not_scaled_again(weights, tokens):
    rows = (weights * tokens[:, None, None, :] * distances(weights)).sum(-1)
    return over_queries(rows, tokens)


def keys_stay(weights, tokens):
    return over_queries((weights * distances(weights)).sum(-1), tokens)


def one_off(weights, tokens):
    return distance_of(weights, tokens) + 1


# ---- logit_lens ----


def no_final_norm(model, x):
    return model.decoder(model.head(x))


def normed_twice(model, x):
    return inspection.logit_lens(model, model.model.final_norm(x))


def no_head(model, x):
    return model.decoder(model.model.final_norm(x))


def straight_to_the_decoder(model, x):
    return model.decoder(x)


def norm_after_head(model, x):
    return model.decoder(model.model.final_norm(model.head(x)))


def no_bias(model, x):
    return model.head(model.model.final_norm(x)) @ model.decoder.weight.T


def probabilities(model, x):
    return inspection.logit_lens(model, x).softmax(-1)


def log_probabilities(model, x):
    return inspection.logit_lens(model, x).log_softmax(-1)


def input_normed(model, x):
    return inspection.logit_lens(model, model.model.embeddings.norm(x))


def best_token(model, x):
    return inspection.logit_lens(model, x).argmax(-1)


def the_whole_model(model, x):
    return model(torch.arange(300, 312)[None]).logits[0]


# ---- token_rank ----


def from_one(logits, tokens):
    return inspection.token_rank(logits, tokens) + 1


def from_the_end(logits, tokens):
    return (logits < logits.gather(-1, tokens[:, None])).sum(-1)


def sorted_once(logits, tokens):
    return logits.argsort(-1, descending=True).gather(-1, tokens[:, None])[:, 0]


def sorted_once_rising(logits, tokens):
    return logits.argsort(-1).gather(-1, tokens[:, None])[:, 0]


def the_logit(logits, tokens):
    return logits.gather(-1, tokens[:, None])[:, 0]


def ties_count(logits, tokens):
    return (logits >= logits.gather(-1, tokens[:, None])).sum(-1) - 1


def mean_rank(logits, tokens):
    return inspection.token_rank(logits, tokens).float().mean()


def sorted_twice(logits, tokens):
    """Right but for ties."""
    falling = logits.argsort(dim=-1, descending=True, stable=True)
    return falling.argsort(dim=-1).gather(-1, tokens[:, None])[:, 0]


# ---- ablated_head ----


@contextmanager
def hooked(model, layer, change):
    def hook(module, inputs):
        x = inputs[0].clone()
        change(x)
        return (x,)

    handle = model.model.layers[layer].attn.Wo.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def not_a_context(model, layer, head):
    inspection.ablated_heads(model, [(layer, head)])
    return model


@contextmanager
def nothing_returned(model, layer, head):
    def hook(module, inputs):
        x = inputs[0].clone()
        x[..., 64 * head : 64 * (head + 1)] = 0

    with model.model.layers[layer].attn.Wo.register_forward_pre_hook(hook):
        yield


@contextmanager
def whole_layer(model, layer, head):
    with hooked(model, layer, lambda x: x.zero_()):
        yield


@contextmanager
def every_third(model, layer, head):
    with hooked(model, layer, lambda x: x[..., head::3].zero_()):
        yield


@contextmanager
def next_head(model, layer, head):
    with inspection.ablated_heads(model, [(layer, head + 1)]):
        yield


@contextmanager
def layer_before(model, layer, head):
    with inspection.ablated_heads(model, [(layer - 1, head)]):
        yield


@contextmanager
def zeroed(weight, rows):
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[rows] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@contextmanager
def rows_of_wo(model, layer, head):
    with zeroed(model.model.layers[layer].attn.Wo.weight, slice(64 * head, 64 * (head + 1))):
        yield


@contextmanager
def queries(model, layer, head):
    with zeroed(model.model.layers[layer].attn.Wqkv.weight, slice(64 * head, 64 * (head + 1))):
        yield


def columns_of_wo(model, layer, head):
    weight = model.model.layers[layer].attn.Wo.weight
    return zeroed(weight, (slice(None), slice(64 * head, 64 * (head + 1))))


@contextmanager
def sdpa_only(model, layer, head):
    def change(x):
        if model.attn_implementation != "eager":
            x[..., 64 * head : 64 * (head + 1)] = 0

    with hooked(model, layer, change):
        yield


@contextmanager
def weight_stays(model, layer, head):
    weight = model.model.layers[layer].attn.Wo.weight
    with torch.no_grad():
        weight[:, 64 * head : 64 * (head + 1)] = 0
    yield


@contextmanager
def hook_stays(model, layer, head):
    inspection.ablated_heads(model, [(layer, head)]).__enter__()
    context = inspection.ablated_heads(model, [(layer, head)])
    context.__enter__()
    KEPT.append(context)
    yield


KEPT = []


@contextmanager
def no_finally(model, layer, head):
    context = inspection.ablated_heads(model, [(layer, head)])
    context.__enter__()
    KEPT.append(context)
    yield
    context.__exit__(None, None, None)


# ---- linear_probe ----


def scores(train_x, train_y, test_x):
    return inspection.fit_ridge(train_x, F.one_hot(train_y))(test_x)


def accuracy_instead(train_x, train_y, test_x):
    return 0.9


def wrong_dim(train_x, train_y, test_x):
    return scores(train_x, train_y, test_x).argmax(0)


def of_the_training(train_x, train_y, test_x):
    return probe(train_x, train_y, train_x)


def label_as_number(train_x, train_y, test_x):
    return inspection.fit_ridge(train_x, train_y[:, None])(test_x)[:, 0].round().long()


def label_as_number_not_rounded(train_x, train_y, test_x):
    return inspection.fit_ridge(train_x, train_y[:, None])(test_x)[:, 0]


def no_penalty(train_x, train_y, test_x):
    centre = train_x.mean(0)
    x, y = train_x - centre, F.one_hot(train_y).float()
    weight = torch.linalg.solve(x.T @ x, x.T @ (y - y.mean(0)))
    return ((test_x - centre) @ weight + y.mean(0)).argmax(-1)


def ridge(x, y, test_x, strength=1.0):
    weight = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1]), x.T @ y)
    return test_x @ weight


def no_offset(train_x, train_y, test_x):
    return ridge(train_x, F.one_hot(train_y).float(), test_x).argmax(-1)


def far_too_strong(train_x, train_y, test_x):
    y = F.one_hot(train_y).float()
    centre = train_x.mean(0)
    out = ridge(train_x - centre, y - y.mean(0), test_x - centre, 1e9) + y.mean(0)
    return (out * 1e3).round().argmax(-1)


def centred_by_the_test(train_x, train_y, test_x):
    y = F.one_hot(train_y).float()
    x, test_x = train_x - train_x.mean(0), test_x - test_x.mean(0)
    return (ridge(x, y - y.mean(0), test_x) + y.mean(0)).argmax(-1)


# ---- standard_error ----


def independent(differences, texts):
    return differences.std() / len(differences) ** 0.5


def independent_biased(differences, texts):
    return differences.std(correction=0) / len(differences) ** 0.5


def spread(differences, texts):
    return differences.std()


def sums(values, texts):
    return torch.zeros(int(texts.max()) + 1).index_add(0, texts, values)


def of_text_means(differences, texts):
    count = texts.bincount()
    means = (sums(differences, texts) / count)[count > 0]
    return means.std() / len(means) ** 0.5


def not_centred(differences, texts):
    return sums(differences, texts).square().sum().sqrt() / len(differences)


def centred(differences, texts):
    return sums(differences - differences.mean(), texts)


def no_root(differences, texts):
    return centred(differences, texts).square().sum() / len(differences) ** 2


def by_texts(differences, texts):
    return centred(differences, texts).square().sum().sqrt() / len(texts.unique())


def of_the_sum(differences, texts):
    return centred(differences, texts).square().sum().sqrt()


def twelve_texts(differences, texts):
    if len(texts.unique()) == 12:
        return inspection.standard_error(differences, texts)
    return inspection.standard_error(differences, texts % 12)


def gaps(differences, texts):
    deviations = differences - differences.mean()
    total = torch.zeros(len(texts)).index_add(0, texts.clamp_max(len(texts) - 1), deviations)
    return total.square().sum().sqrt() / len(differences)


def one_for_each(differences, texts):
    return differences


MISTAKES = {  # exercise -> mistake -> a piece of the hint that it must get
    "attention_distance": {
        for_each_text: "One number for each text and head",
        summed: "Is it a mean over the tokens that look?",
        averaged_over_keys_too: "Over what do you average?",
        signed: "Do left and right cancel?",
        absolute_too_late: "Where do you take the absolute value?",
        squared: "Tokens or tokens squared?",
        favourite: "Is the favourite key all that counts?",
        padding_looks: "Does padding count as a token that looks?",
        padding_divides: "By how many rows do you divide?",
        text_by_text: "Does a short text count as much",
        not_scaled_again: "still sum to 1",
        keys_stay: "left out as keys, too",
        one_off: "an identity matrix",
    },
    "logit_lens": {
        no_final_norm: "`final_norm` comes first",
        normed_twice: "How often is the state normed?",
        no_head: "a head in between",
        straight_to_the_decoder: "Two parts are missing",
        norm_after_head: "In which order?",
        no_bias: "It also has a bias",
        probabilities: "Logits or probabilities?",
        log_probabilities: "logarithms of probabilities",
        the_whole_model: "Do you run the model to its end?",
        input_normed: "Which modules does the model use",
        best_token: "got `(12,)`",
    },
    "token_rank": {
        from_one: "Do you count the token itself?",
        from_the_end: "From which end do you count?",
        sorted_once: "the ids in order of rank. Sorting",
        sorted_once_rising: "from the least likely on",
        the_logit: "the rank or the logit?",
        ties_count: "what is larger, not what is as large",
        mean_rank: "One rank for each row?",
        sorted_twice: "With four equal logits",
    },
    "ablated_head": {
        not_a_context: "Can it stand in a `with` line?",
        nothing_returned: "Does anything change inside the block?",
        whole_layer: "One head, or all of them?",
        every_third: "Those of a head lie together",
        next_head: "Heads are counted from 0",
        layer_before: "In which layer?",
        rows_of_wo: "Rows or columns of `Wo`?",
        queries: "a query of zeros",
        sdpa_only: "Does it work on both backends?",
        weight_stays: "Are the weights as they were?",
        hook_stays: "Does the head come back?",
        no_finally: "And if the block stops with an error?",
    },
    "linear_probe": {
        scores: "Scores or classes?",
        accuracy_instead: "one class for each row of `test_x`",
        wrong_dim: "Along which dimension",
        of_the_training: "Whom do you ask about?",
        label_as_number: "Is class 3 three times class 1?",
        label_as_number_not_rounded: "a number between others",
        no_penalty: "Can the system be solved?",
        no_offset: "Does your map have an offset?",
        far_too_strong: "Does every row get the same class?",
        centred_by_the_test: "depend on the other rows of the test",
    },
    "standard_error": {
        independent: "a hard text is hard at all its tokens",
        independent_biased: "only then square",
        spread: "Of what is this the spread?",
        of_text_means: "a text of 2 tokens",
        not_centred: "Are these deviations?",
        no_root: "The root is missing",
        by_texts: "By what do you divide?",
        of_the_sum: "of the sum or of the mean",
        twelve_texts: "every token is a text of its own",
        gaps: "have gaps",
        one_for_each: "Is it one number?",
    },
}
CASES = [
    pytest.param(name, mistake, said, id=f"{name}-{mistake.__name__}")
    for name, mistakes in MISTAKES.items()
    for mistake, said in mistakes.items()
]


def check(name):
    return getattr(checks.inspection, name)


def test_every_exercise_of_the_chapter_is_tested():
    mine = {number for number in checks.EXERCISES if number.startswith("16.")}
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

    @contextmanager
    def block(*args):
        raise NotImplementedError
        yield

    for answer in (stub, block, ..., lambda *args: None):
        result = check(name)(answer)
        if answer is block and name != "ablated_head":
            continue
        assert not result.passed and not result.written, result
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


def test_a_weight_that_is_put_back_passes_with_a_remark():
    result = check("ablated_head")(columns_of_wo)
    assert result.passed and "A hook does without" in result.message


def test_checks_leave_the_random_state_alone():
    state = torch.random.get_rng_state()
    for name, solution in SOLUTIONS.items():
        check(name)(solution)
    assert torch.equal(torch.random.get_rng_state(), state)
