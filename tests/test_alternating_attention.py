import pytest
import torch

from modernbert_mini.alternating_attention import (
    band_mask,
    banded_attention,
    layer_pattern,
    packed_backends,
    packed_mask,
    packed_sdpa_attention,
    padded_backends,
    padded_mask,
    window_mask,
)
from modernbert_mini.attention import sdpa_attention

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


def stream(length, heads=2, head_dim=4):
    q, k, v = torch.randn(3, heads, length, head_dim, generator=torch.Generator().manual_seed(1))
    return [x.requires_grad_() for x in (q, k, v)]


@pytest.mark.parametrize("half_window", [0, 1, 15, 16, 17, 40, 200])
@pytest.mark.parametrize("lengths", [[1], [2], [16], [100], [5, 1, 37, 16, 16, 3], [1] * 20])
def test_the_band_is_the_window(lengths, half_window):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = stream(sum(lengths))
    mask = packed_mask(cu_seqlens, half_window)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    band, weights = banded_attention(q, k, v, mask=band_mask(cu_seqlens, half_window))
    assert weights is None
    torch.testing.assert_close(band, right, atol=1e-6, rtol=0)
    push = torch.randn(band.shape, generator=torch.Generator().manual_seed(2))
    for mine, theirs in zip(
        torch.autograd.grad(band, (q, k, v), push),
        torch.autograd.grad(right, (q, k, v), push),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_a_band_shows_as_many_keys_as_the_whole_mask():
    cu_seqlens = torch.tensor([0, 5, 6, 150, 211])
    band = band_mask(cu_seqlens, 64)[:, 0].flatten(0, 1)[:211]
    assert band.sum(-1).equal(packed_mask(cu_seqlens, 64).sum(-1))


def test_a_band_grows_with_the_length_and_not_with_its_square():
    sizes = [band_mask(torch.tensor([0, n]), 64).numel() for n in (1024, 2048, 4096)]
    assert sizes == [192 * 1024, 192 * 2048, 192 * 4096]


def test_a_wide_window_on_a_short_stream_makes_no_wide_band():
    assert band_mask(torch.tensor([0, 10]), 4096).shape == (1, 1, 10, 30)


def test_local_layers_of_a_packed_stream_never_hold_a_square():
    attend = packed_backends("sdpa", torch.tensor([0, 3000]), {"sliding_attention": 64})
    assert attend["sliding_attention"].keywords["mask"].numel() < 3000**2 / 10


@pytest.mark.parametrize("lengths", [[20, 20], [40], [8] * 5, [25, 15]], ids=str)
def test_global_layers_take_sequences_of_one_length_at_once(lengths):
    q, k, v = inputs = stream(40)
    out, _ = packed_sdpa_attention(q, k, v, lengths=lengths)
    alone = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
    expected = torch.cat([sdpa_attention(*(x[None] for x in part))[0][0] for part in alone], 1)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_dropout_reaches_every_packed_backend():
    q, k, v = (x.detach() for x in stream(40))
    cu_seqlens = torch.tensor([0, 25, 40])
    for attend in (
        lambda dropout: packed_sdpa_attention(q, k, v, lengths=[25, 15], dropout=dropout)[0],
        lambda dropout: banded_attention(q, k, v, mask=band_mask(cu_seqlens, 4), dropout=dropout)[
            0
        ],
    ):
        assert attend(0.0).equal(attend(0.0))
        assert not attend(0.5).allclose(attend(0.0))
