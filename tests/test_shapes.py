"""The shape comments of the model's code say what the tensors are."""

import importlib.util
import re

import pytest
import torch
from tools.shapes import Tracer, claims

from modernbert_mini import alternating_attention, attention, config, geglu, heads, model, rope

MODULES = [rope, geglu, attention, alternating_attention, model, heads]

# All sizes differ, also those that arithmetic makes of them, so that no comment is right by luck.
B, L, H, D, I, V, LABELS, CHOICES = 2, 17, 3, 14, 23, 101, 5, 4  # noqa: E741
C = H * D
LENGTHS = [9, 1, 11, 7, 3, 6, 8, 10]  # of a packed stream; the longest outgrows the window
N, S = sum(LENGTHS), len(LENGTHS)


def tiny(**changes) -> config.ModernBertConfig:
    return config.ModernBertConfig.from_dict(
        {
            "model_type": "modernbert",
            "vocab_size": V,
            "hidden_size": C,
            "intermediate_size": I,
            "num_hidden_layers": 4,
            "num_attention_heads": H,
            "local_attention": 6,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            **changes,
        }
    )


def sizes(lengths: set[int], batch: set[int], **more: int) -> dict[str, set[int]]:
    fixed = {"H": H, "D": D, "C": C, "I": I, "V": V, "N": N, "S": S, **more}
    return {**{name: {size} for name, size in fixed.items()}, "L": lengths, "B": batch}


def padded(*shape: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(*shape, dtype=torch.long)
    mask[..., -1, 9:] = 0
    return {"input_ids": torch.randint(1, V, shape), "attention_mask": mask}


def packed() -> dict[str, torch.Tensor]:
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    return {"input_ids": torch.randint(1, V, (N,)), "cu_seqlens": bounds.int()}


def run_everything(tracer: Tracer) -> None:
    """All six classes, padded and packed, both backends, every loss."""
    ids, classes = torch.randint(1, V, (B, L)), torch.randint(LABELS, (B,))
    position = torch.tensor([2, 5])
    stream = packed()
    every = torch.randint(LABELS, (N,))
    starts = torch.tensor([0] * S)
    with tracer.at(sizes({L}, {B})):
        rope.rotate_half(torch.rand(B, L, D))  # apply_rotary has it folded away
    for name in ("eager", "sdpa"):
        with tracer.at(sizes({L}, {B}, num_labels=LABELS)):
            batch = padded(B, L)
            model.ModernBertModel(tiny(), name)(**batch, position_ids=torch.arange(L).expand(B, L))
            model.ModernBertModel(tiny(), name)(ids)
            masked = torch.where(torch.rand(B, L) < 0.3, ids, -100)
            masked[0, 0] = ids[0, 0]
            heads.ModernBertForMaskedLM(tiny(), name)(**batch, labels=masked)
            sparse = tiny(sparse_prediction=True)
            heads.ModernBertForMaskedLM(sparse, name)(**batch, labels=masked)
            for pooling in ("cls", "mean"):
                labelled = tiny(num_labels=LABELS, classifier_pooling=pooling)
                one = heads.ModernBertForSequenceClassification(labelled, name)
                one(**batch, labels=classes)
                one(ids, labels=torch.rand(B, LABELS))
            one = heads.ModernBertForTokenClassification(tiny(num_labels=LABELS), name)
            one(**batch, labels=torch.randint(LABELS, (B, L)))
        with tracer.at(sizes({L}, {B}, num_labels=2)):
            answer = {"start_positions": position, "end_positions": position}
            heads.ModernBertForQuestionAnswering(tiny(num_labels=2), name)(**batch, **answer)
        with tracer.at(sizes({L}, {B, B * CHOICES}, choices=CHOICES, num_choices=CHOICES)):
            for pooling in ("cls", "mean"):
                one = heads.ModernBertForMultipleChoice(tiny(classifier_pooling=pooling), name)
                one(**padded(B, CHOICES, L), labels=torch.tensor([0, 3]))
        # In a packed stream, "L" is the length of a sequence, or of the stream as a whole.
        lengths = {N, *LENGTHS}
        with tracer.at(sizes(lengths, {S}, num_labels=LABELS)):
            heads.ModernBertForMaskedLM(tiny(), name)(**stream, labels=stream["input_ids"])
            for pooling in ("cls", "mean"):
                labelled = tiny(num_labels=LABELS, classifier_pooling=pooling)
                heads.ModernBertForSequenceClassification(labelled, name)(**stream)
            one = heads.ModernBertForTokenClassification(tiny(num_labels=LABELS), name)
            one(**stream, labels=every)
        with tracer.at(sizes(lengths, {S}, num_labels=2)):
            answer = {"start_positions": starts, "end_positions": starts}
            heads.ModernBertForQuestionAnswering(tiny(num_labels=2), name)(**stream, **answer)
        with tracer.at(sizes(lengths, {S // CHOICES, S}, choices=CHOICES, num_choices=CHOICES)):
            for pooling in ("cls", "mean"):
                one = heads.ModernBertForMultipleChoice(tiny(classifier_pooling=pooling), name)
                one(**stream, num_choices=CHOICES)


def test_the_sizes_differ():
    all_sizes = [L, H, D, C, I, V, N, S, LABELS, 2 * I, 3 * C, D // 2, L + 1, S + 1, B * L]
    assert len({*all_sizes}) == len(all_sizes)


def test_every_shape_comment_is_true_and_reached():
    torch.manual_seed(0)
    tracer = Tracer(MODULES)
    run_everything(tracer)
    assert not tracer.failures, "\n".join(sorted(set(tracer.failures)))
    assert not tracer.unreached(), "never run: " + "\n".join(tracer.unreached())
    assert len(tracer.reached) > 20


def planted(tmp_path, source: str):
    """A module made of `source`."""
    path = tmp_path / "planted.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CODE = """\
import torch

def split(x):
    q, k = x.chunk(
        2, dim=-1
    )  # 2 × (B, L, D/2)
    both = torch.stack([q, k])  # (2, ..., D/2)
    first, last = q[:, :1], k[:, -1]  # (B, 1, D/2), (B, D/2)
    for _ in range(2):
        q = q + 1  # (B, L, D/2)
    return q.transpose(1, 2)  # (B, D/2, L)
"""


def trace(module) -> Tracer:
    tracer = Tracer([module])
    with tracer.at({"B": {2}, "L": {3, 7}, "D": {10}}):
        module.split(torch.zeros(2, 3, 10))
    return tracer


def test_true_comments_pass(tmp_path):
    tracer = trace(planted(tmp_path, CODE.replace("(2, ..., D/2)", "(..., L, D/2)")))
    assert not tracer.failures and not tracer.unreached()
    assert len(tracer.reached) == 5


@pytest.mark.parametrize(
    ("right", "wrong", "line"),
    [
        ("2 × (B, L, D/2)", "2 × (B, L, D)", 6),
        ("2 × (B, L, D/2)", "2 × (L, B, D/2)", 6),
        ("2 × (B, L, D/2)", "3 × (B, L, D/2)", 6),
        ("(2, ..., D/2)", "(..., B, D/2)", 7),
        ("(B, 1, D/2), (B, D/2)", "(B, 1, D/2), (B, 1, D/2)", 8),
        ("q + 1  # (B, L, D/2)", "q + 1  # (B, D/2)", 10),
        ("(B, D/2, L)", "(B, D/2, L + 1)", 11),
        ("(B, D/2, L)", "(B, D/2, 2·L)", 11),
    ],
)
def test_a_planted_wrong_comment_fails(tmp_path, right, wrong, line):
    source = CODE.replace("(2, ..., D/2)", "(..., L, D/2)") if line != 7 else CODE
    tracer = trace(planted(tmp_path, source.replace(right, wrong)))
    assert [int(re.search(r":(\d+):", f)[1]) for f in tracer.failures][:1] == [line]


def test_one_letter_means_one_size_in_a_call(tmp_path):
    source = "def split(x):\n    a = x[:, :, 0]  # (B, L)\n    b = x.flatten(1)[:, :7]  # (B, L)\n"
    assert len(trace(planted(tmp_path, source)).failures) == 1


def test_an_unreached_comment_is_reported(tmp_path):
    source = CODE + "\ndef never(x):\n    y = x[0]  # (L, D)\n"
    assert trace(planted(tmp_path, source)).unreached() == ["planted.py:14: (L, D)"]


def test_words_in_brackets_are_no_shape():
    assert not claims("x = 1  # (see the paper)\ny = 2  # (B, as above)\n")


def test_a_comment_at_no_assignment_is_refused():
    with pytest.raises(ValueError, match="nothing is assigned"):
        claims("print(1)  # (B, L)\n")
