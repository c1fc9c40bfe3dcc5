import math

import pytest
import torch

from modernbert_mini.rope import apply_rotary, inverse_frequencies, rotary_table, rotate_half

D, L = 16, 40


@pytest.fixture
def x():
    return torch.randn(2, 3, L, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def table():
    return rotary_table(torch.arange(L), inverse_frequencies(D, 10_000.0))


def test_frequencies_fall_from_one_towards_one_over_theta():
    freq = inverse_frequencies(64, 160_000.0)
    assert freq.dtype == torch.float32 and freq.shape == (32,)
    assert freq[0] == 1.0 and (freq.diff() < 0).all()
    ratio = (freq[1:] / freq[:-1]).log()
    torch.testing.assert_close(ratio, torch.full((31,), -math.log(160_000.0) / 32))


def test_linear_interpolation_equals_dividing_the_positions():
    stretched = rotary_table(torch.arange(0, 400, 4), inverse_frequencies(D, 1e4, factor=4.0))
    plain = rotary_table(torch.arange(100), inverse_frequencies(D, 1e4))
    for a, b in zip(stretched, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_rotation_keeps_norms(x, table):
    torch.testing.assert_close(apply_rotary(x, *table).norm(dim=-1), x.norm(dim=-1))


def test_rotation_at_position_zero_is_the_identity(x, table):
    rotated = apply_rotary(x, *table)
    assert torch.equal(rotated[..., 0, :], x[..., 0, :])
    assert not torch.allclose(rotated[..., 1:, :], x[..., 1:, :])


def test_scores_depend_on_distance_alone(x):
    q, k = x[0, 0, 0], x[0, 0, 1]
    inv_freq = inverse_frequencies(D, 10_000.0)

    def score(i, j):
        rotated = [
            apply_rotary(v, *rotary_table(torch.tensor(p), inv_freq)) for v, p in ((q, i), (k, j))
        ]
        return rotated[0] @ rotated[1]

    torch.testing.assert_close(score(3, 10), score(503, 510), atol=1e-4, rtol=0)
    assert abs(score(3, 10) - score(10, 3)) > 1e-3  # but not on its absolute value


def test_rotate_half_twice_turns_around(x):
    assert torch.equal(rotate_half(rotate_half(x)), -x)


def test_pairs_are_half_a_head_apart():
    unit = torch.zeros(D)
    unit[0] = 1.0
    turned = apply_rotary(unit, *rotary_table(torch.tensor(1), inverse_frequencies(D, 1e4)))
    assert turned.nonzero().flatten().tolist() == [0, D // 2]
    assert turned[0] == pytest.approx(math.cos(1)) and turned[D // 2] == pytest.approx(math.sin(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rotates_in_float32(x, table, dtype):
    half = apply_rotary(x.to(dtype), *table)
    assert half.dtype == dtype
    assert torch.equal(half, apply_rotary(x.to(dtype).float(), *table).to(dtype))


def test_positions_may_differ_between_rows():
    positions = torch.stack((torch.arange(L), torch.arange(L).flip(0)))
    cos, sin = rotary_table(positions, inverse_frequencies(D, 1e4))
    assert cos.shape == sin.shape == (2, L, D)
    assert torch.equal(cos[0], cos[1].flip(0))


def test_equals_transformers(x):
    modeling = pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    cos, sin = rotary_table(torch.arange(L)[None], inverse_frequencies(D, 10_000.0))
    q, k = modeling.apply_rotary_pos_emb(x, 2 * x, cos, sin)
    for theirs, ours in ((q, apply_rotary(x, cos, sin)), (k, apply_rotary(2 * x, cos, sin))):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
