import pytest
import torch

from modernbert_mini.alternating_attention import (
    layer_pattern,
    packed_backends,
    packed_mask,
    padded_backends,
    padded_mask,
    window_mask,
)

HALF_WINDOWS = {"full_attention": None, "sliding_attention": 3}


def test_every_third_layer_of_the_base_model_is_global():
    pattern = layer_pattern(22, 3)
    assert [i for i, kind in enumerate(pattern) if kind == "full_attention"] == [*range(0, 22, 3)]
    assert layer_pattern(3, 1) == ["full_attention"] * 3
    assert layer_pattern(3, 9) == ["full_attention"] + ["sliding_attention"] * 2


def test_a_window_of_128_shows_129_keys():
    seen = window_mask(1000, 64).sum(-1)
    assert seen[500] == 129 and seen[0] == 65 and seen[-1] == 65
    assert window_mask(10, 0).equal(torch.eye(10, dtype=torch.bool))


def test_window_edges_are_included():
    mask = window_mask(10, 3)
    assert mask[5].tolist() == [False, False, *[True] * 7, False]
    assert mask.equal(mask.T)


def test_no_mask_where_nothing_is_hidden():
    assert padded_mask(None, 10, None) is None
    assert padded_mask(None, 10, 9) is None
    assert padded_mask(None, 10, 8) is not None


def test_padding_hides_keys_in_every_row():
    real = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    full = padded_mask(real, 4, None).expand(2, 1, 4, 4)
    assert full[0, 0].all(0).tolist() == [True, True, True, False]
    assert full[1, 0].any(0).tolist() == [False, True, True, True]
    local = padded_mask(real, 4, 1)
    assert local[0, 0].equal(window_mask(4, 1) & real[0].bool())


def test_packed_mask_is_block_diagonal():
    mask = packed_mask(torch.tensor([0, 2, 3, 7]), None)
    assert mask.equal(torch.block_diag(torch.ones(2, 2), torch.ones(1, 1), torch.ones(4, 4)).bool())
    local = packed_mask(torch.tensor([0, 2, 3, 7]), 1)
    assert local.equal(mask & window_mask(7, 1))


@pytest.mark.parametrize("kind", HALF_WINDOWS)
def test_packed_and_padded_agree(kind):
    lengths = [5, 1, 9, 9, 2]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, len(lengths), 2, 9, 4, generator=generator).unbind()
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    pack = [x.transpose(1, 2)[real].transpose(0, 1) for x in (q, k, v)]  # (H, N, D)
    results = []
    for name in ("eager", "sdpa"):
        padded = padded_backends(name, real, 9, HALF_WINDOWS, q.device)[kind]
        results.append(padded(q, k, v, dropout=0.0)[0].transpose(1, 2)[real].transpose(0, 1))
        results.append(packed_backends(name, cu_seqlens, HALF_WINDOWS)[kind](*pack, dropout=0.0)[0])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-6, rtol=0)


def test_no_sequence_sees_another():
    cu_seqlens = torch.tensor([0, 4, 10])
    q, k, v = torch.randn(3, 2, 10, 4, generator=torch.Generator().manual_seed(0)).unbind()
    changed = v.clone()
    changed[:, 4:] += 100
    for name in ("eager", "sdpa"):
        attend = packed_backends(name, cu_seqlens, HALF_WINDOWS)["full_attention"]
        before, after = attend(q, k, v, dropout=0.0)[0], attend(q, k, changed, dropout=0.0)[0]
        torch.testing.assert_close(before[:, :4], after[:, :4])
        assert not torch.allclose(before[:, 4:], after[:, 4:])
