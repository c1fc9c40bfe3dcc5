import pytest
import torch

from modernbert_mini.attention import Attention, eager_attention, sdpa_attention
from modernbert_mini.rope import inverse_frequencies, rotary_table

B, H, L, D = 2, 3, 11, 8


@pytest.fixture
def qkv():
    return torch.randn(3, B, H, L, D, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.fixture
def mask():
    mask = torch.rand(B, 1, L, L, generator=torch.Generator().manual_seed(1)) < 0.5
    return mask | torch.eye(L, dtype=torch.bool)


def test_weights_are_a_distribution_over_visible_keys(qkv, mask):
    _, weights = eager_attention(*qkv, mask=mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, L))
    assert (weights[~mask.expand_as(weights)] == 0).all() and (weights >= 0).all()


def test_equal_keys_give_the_plain_mean(qkv):
    q, k, v = qkv
    out, _ = eager_attention(q, torch.ones_like(k), v)
    torch.testing.assert_close(out, v.mean(-2, keepdim=True).expand_as(out))


def test_a_query_that_sees_nothing_gets_a_number(qkv):
    out, weights = eager_attention(*qkv, mask=torch.zeros(B, 1, L, L, dtype=torch.bool))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / L))
    assert out.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_eager_equals_sdpa(qkv, mask, masked):
    chosen = mask if masked else None
    eager, _ = eager_attention(*qkv, mask=chosen)
    fused, weights = sdpa_attention(*qkv, mask=chosen)
    torch.testing.assert_close(eager, fused, atol=1e-6, rtol=0)
    assert weights is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_runs_in_float32(dtype):
    # With 4,096 equal scores, a sum in half precision would stop growing far too early.
    q = torch.zeros(1, 1, 4096, 2, dtype=dtype)
    out, weights = eager_attention(q[:, :, :1], q, torch.ones_like(q))
    assert out.dtype == weights.dtype == dtype
    assert weights[0, 0, 0, 0].item() == pytest.approx(1 / 4096, rel=1e-2)
    torch.testing.assert_close(out.float(), torch.ones(1, 1, 1, 2), atol=1e-2, rtol=0)


def test_packed_layout_gives_the_same_as_a_batch_of_one(qkv):
    q, k, v = (x[0] for x in qkv)
    torch.testing.assert_close(
        eager_attention(q, k, v)[0], eager_attention(*(x[:1] for x in qkv))[0][0]
    )


def test_wqkv_rows_are_queries_then_keys_then_values_head_by_head():
    attention = Attention(H * D, H)
    x = torch.randn(B, L, H * D)
    seen = {}

    def attend(q, k, v, *, dropout):
        seen.update(q=q, k=k, v=v)
        return v, None

    still = rotary_table(torch.zeros(L), inverse_frequencies(D, 1e4))
    attention(x, *still, attend)
    for i, name in enumerate("qkv"):
        rows = attention.Wqkv.weight[i * H * D : (i + 1) * H * D]
        for head in range(H):
            expected = x @ rows[head * D : (head + 1) * D].T
            torch.testing.assert_close(seen[name][:, head], expected)


def test_values_are_not_rotated_but_queries_and_keys_are():
    attention = Attention(H * D, H)
    x = torch.randn(1, L, H * D)
    calls = []

    def attend(q, k, v, *, dropout):
        calls.append((q, k, v))
        return v, None

    for positions in (torch.zeros(L), torch.arange(L)):
        attention(x, *rotary_table(positions, inverse_frequencies(D, 1e4)), attend)
    (q0, k0, v0), (q1, k1, v1) = calls
    assert torch.equal(v0, v1)
    assert not torch.allclose(q0[..., 1:, :], q1[..., 1:, :])
    assert not torch.allclose(k0[..., 1:, :], k1[..., 1:, :])


def test_dropout_reaches_the_backend_in_training_only():
    attention = Attention(H * D, H, dropout=0.25)
    seen = []

    def attend(q, k, v, *, dropout):
        seen.append(dropout)
        return v, None

    table = rotary_table(torch.arange(L), inverse_frequencies(D, 1e4))
    attention(torch.randn(1, L, H * D), *table, attend)
    attention.eval()(torch.randn(1, L, H * D), *table, attend)
    assert seen == [0.25, 0.0]


def test_dropped_weights_are_scaled_up(qkv):
    torch.manual_seed(0)
    _, kept = eager_attention(*qkv)
    _, weights = eager_attention(*qkv, dropout=0.5)
    dropped = weights == 0
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(weights[~dropped], 2 * kept[~dropped])


def test_a_query_that_sees_nothing_gets_no_nan(qkv):
    q, k, v = qkv
    nothing = torch.zeros(L, L, dtype=torch.bool)
    eager, weights = eager_attention(q, k, v, mask=nothing)
    fused, _ = sdpa_attention(q, k, v, mask=nothing)
    torch.testing.assert_close(eager, v.mean(-2, keepdim=True).expand_as(v))
    assert fused.eq(0).all() and not weights.isnan().any()
