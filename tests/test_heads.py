import pytest
import torch
from parity import BASE, CLASSES, VARIANTS, make_batch, make_labels, make_pair, scores
from test_model import pack
from torch.nn import functional as F

from modernbert_mini import heads
from modernbert_mini.config import ConfigError, ModernBertConfig

HEADS = CLASSES[1:]


def build(name, **values):
    torch.manual_seed(0)
    return getattr(heads, name)(ModernBertConfig(**{**BASE, **values})).eval()


def batch_for(name, **options):
    choices = 2 if name == "ModernBertForMultipleChoice" else None
    return make_batch(choices=choices, **options)


# ---- properties


def test_the_decoder_is_the_embedding_unless_untied():
    tied = build("ModernBertForMaskedLM")
    assert tied.decoder.weight is tied.model.embeddings.tok_embeddings.weight
    untied = build("ModernBertForMaskedLM", tie_word_embeddings=False)
    assert untied.decoder.weight is not untied.model.embeddings.tok_embeddings.weight


def test_sparse_prediction_scores_labelled_tokens_only():
    dense, sparse = (build("ModernBertForMaskedLM", sparse_prediction=s) for s in (False, True))
    batch = make_batch()
    labels = make_labels("ModernBertForMaskedLM", batch)["labels"]
    full, few = (model(**batch, labels=labels) for model in (dense, sparse))
    torch.testing.assert_close(few.logits, full.logits[labels != -100], atol=1e-5, rtol=0)
    torch.testing.assert_close(few.loss, full.loss)
    assert sparse(**batch).logits.shape == full.logits.shape  # no labels: all of them


def test_mean_pooling_leaves_padding_out():
    model = build("ModernBertForSequenceClassification", classifier_pooling="mean")
    batch = make_batch((5, 9))
    together = model(**batch).logits
    alone = model(batch["input_ids"][:1, :5]).logits
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_multiple_choice_finds_cls_behind_left_padding():
    model = build("ModernBertForMultipleChoice")
    right, left = (make_batch((6, 9), choices=2, left=side) for side in (False, True))
    left_positions = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(
        model(**right).logits, model(**left, position_ids=left_positions).logits, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("num_labels", "labels", "loss"),
    [
        (1, torch.tensor([0.5, -1.0]), F.mse_loss),
        (3, torch.tensor([2, 0]), F.cross_entropy),
        (3, torch.tensor([[1.0, 0, 1], [0, 0, 1]]), F.binary_cross_entropy_with_logits),
    ],
)
def test_labels_choose_the_loss(num_labels, labels, loss):
    model = build("ModernBertForSequenceClassification", num_labels=num_labels)
    out = model(**make_batch((4, 9)), labels=labels)
    logits = out.logits.squeeze(-1) if num_labels == 1 else out.logits
    torch.testing.assert_close(out.loss, loss(logits, labels))


def test_problem_type_overrules_the_labels():
    model = build("ModernBertForSequenceClassification", num_labels=3, problem_type="regression")
    labels = torch.ones(2, 3)
    out = model(**make_batch((4, 9)), labels=labels)
    torch.testing.assert_close(out.loss, F.mse_loss(out.logits, labels))


@pytest.mark.parametrize("name", HEADS)
def test_traces_to_one_graph(name):
    model = build(name)
    batch = batch_for(name, lengths=(33, 20))
    labels = make_labels(name, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for mine, theirs in zip(
        scores(compiled(**batch, **labels)), scores(model(**batch, keep_padded=True)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


# ---- packed equals padded


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", HEADS)
def test_packed_equals_padded_in_scores_and_gradients(name, pooling):
    model = build(name, classifier_pooling=pooling)
    batch = batch_for(name, lengths=(1, 50, 37, 9))
    if name == "ModernBertForQuestionAnswering":  # padding takes part in its loss: have none
        batch = batch_for(name, lengths=(250, 250))
    labels = make_labels(name, batch)
    padded = model(**batch, **labels, keep_padded=True)
    padded.loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    flat = {key: value.flatten(0, -2) for key, value in batch.items()}
    real = flat["attention_mask"].bool()
    packed_labels = {
        key: value[batch["attention_mask"].bool()] if value.dim() > 1 else value
        for key, value in labels.items()
    }
    choices = {"num_choices": 2} if name == "ModernBertForMultipleChoice" else {}
    packed = model(**pack(flat), **packed_labels, **choices)
    for mine, theirs in zip(scores(packed), scores(padded), strict=True):
        if theirs.shape[:2] == real.shape:
            theirs = theirs[real]
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed.loss, padded.loss, atol=1e-5, rtol=0)
    packed.loss.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-4)


def test_packed_answers_are_looked_for_in_their_own_text():
    model = build("ModernBertForQuestionAnswering")
    batch = make_batch((5, 9))
    where = {"start_positions": torch.tensor([1, 7]), "end_positions": torch.tensor([4, 8])}
    alone = [
        model(
            batch["input_ids"][i : i + 1, :length],
            **{key: value[i : i + 1] for key, value in where.items()},
        ).loss
        for i, length in enumerate((5, 9))
    ]
    torch.testing.assert_close(model(**pack(batch), **where).loss, sum(alone) / 2)


def test_packed_choices_must_be_counted():
    model = build("ModernBertForMultipleChoice")
    stream = pack(make_batch((4, 5, 6)))
    for num_choices in (None, 2):
        with pytest.raises(ConfigError, match="num_choices"):
            model(**stream, num_choices=num_choices)
    with pytest.raises(ConfigError, match=r"shape \(3, 6\)"):
        model(make_batch((4, 5, 6))["input_ids"])


# ---- parity


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", HEADS)
def test_equals_transformers_in_scores_losses_and_gradients(name, variant):
    ours, theirs = make_pair(name, variant)
    batch = batch_for(name)
    labels = make_labels(name, batch)
    if variant == "sparse prediction" and name == "ModernBertForMaskedLM":
        labels["labels"][labels["labels"] == -100] = -7
    mine, reference = (m(**batch, **labels, output_hidden_states=True) for m in (ours, theirs))
    for a, b in zip(scores(mine), scores(reference), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for a, b in zip(mine.hidden_states, reference.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.loss, reference.loss, atol=1e-5, rtol=0)
    mine.loss.backward()
    reference.loss.backward()
    compare_gradients(ours, theirs)


def compare_gradients(ours, theirs):
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if (grad := expected[name].grad) is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", HEADS)
def test_eager_gradients_equal_transformers(name):
    ours, theirs = make_pair(name, "published", "eager")
    batch = batch_for(name)
    labels = make_labels(name, batch)
    for model in (ours, theirs):
        model(**batch, **labels).loss.backward()
    compare_gradients(ours, theirs)


@pytest.mark.parametrize("labels", ["regression", "multi"])
def test_other_losses_equal_transformers(labels):
    number = 1 if labels == "regression" else 3
    ours, theirs = make_pair("ModernBertForSequenceClassification", "published", num_labels=number)
    target = torch.rand(6) if number == 1 else torch.randint(0, 2, (6, 3)).float()
    mine, reference = (m(**make_batch(), labels=target).loss for m in (ours, theirs))
    torch.testing.assert_close(mine, reference, atol=1e-5, rtol=0)
