"""The way to a kernel, and what it is handed. No GPU is needed: stand-ins look at the arguments.

A stand-in computes attention from nothing but what it was given, by the rules that both libraries
state: (N, H, D), int32 boundaries, and a window whose two ends both count.
"""

import re
import sys
from inspect import signature
from types import ModuleType

import pytest
import torch
from parity import BASE

from modernbert_mini import ConfigError, ModernBertConfig, ModernBertModel, model, views
from modernbert_mini.alternating_attention import packed_mask, window_mask
from modernbert_mini.attention import eager_attention
from modernbert_mini.flash_attention import flash_attention, flash_kernel

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
H, D = 3, 4
LENGTHS = [5, 1, 11, 2]
N = sum(LENGTHS)
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).int()


def compute(q, k, v, cu_q, cu_k, window):
    """Attention by the rules of the libraries: windows with −1 for "no end", both ends seen."""
    out = torch.empty_like(q)
    for start, end, *keys in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        scores = torch.einsum("ihd,jhd->hij", q[start:end], k[slice(*keys)]) * q.shape[-1] ** -0.5
        i, j = torch.arange(scores.shape[1])[:, None], torch.arange(scores.shape[2])
        left, right = (reach if reach >= 0 else N for reach in window)
        scores = scores.masked_fill((j < i - left) | (j > i + right), -torch.inf)
        out[start:end] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[slice(*keys)])
    return out


class StandIn:
    """A kernel that computes the right thing and remembers with what it was called."""

    def flash_attn(
        self, q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, causal=False, window_size=(-1, -1)
    ):
        self.seen = dict(locals())
        return compute(q, k, v, cu_q, cu_k, window_size)

    def torch(self, q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        self.seen = dict(locals())
        return compute(q, k, v, cu_q, cu_k, window_size)


def old_flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, causal=False):
    raise AssertionError("it knows no windows")


def old_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    raise AssertionError("it knows no windows")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of this compute capability and these libraries."""

    def give(capability=(8, 0), *, flash_attn=None, torch_kernel=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for name, function, kernel in (
            ("flash_attn", "flash_attn_varlen_func", flash_attn),
            ("torch.nn.attention.varlen", "varlen_attn", torch_kernel),
        ):
            module = None if kernel is None else ModuleType(name)
            if kernel not in (None, "empty"):
                setattr(module, function, kernel)
            monkeypatch.setitem(sys.modules, name, module)  # None: the import fails
            parent, _, child = name.rpartition(".")
            if parent:
                monkeypatch.setattr(sys.modules[parent], child, module, raising=False)

    return give


@pytest.fixture
def varlen():
    module = pytest.importorskip("torch.nn.attention.varlen", reason="older than torch 2.10")
    if "window_size" not in signature(module.varlen_attn).parameters:
        pytest.skip("the varlen_attn of this torch has no window_size")
    return module


def qkv(length=N, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, H, length, D, generator=generator).to(dtype).unbind()


# ---- which kernel ----


def test_flash_attn_goes_before_torch(gpu):
    one = StandIn()
    gpu(flash_attn=one.flash_attn, torch_kernel=one.torch)
    assert flash_kernel(CUDA, torch.bfloat16) == one.flash_attn


@pytest.mark.parametrize("other", [None, "empty", old_flash_attn])
def test_torch_takes_its_place_where_flash_attn_is_absent_or_too_old(gpu, other):
    one = StandIn()
    gpu(flash_attn=other, torch_kernel=one.torch)
    assert flash_kernel(CUDA, torch.float16) == one.torch


def test_the_kernel_of_this_torch_is_known_by_its_signature(gpu, varlen):
    gpu(torch_kernel=varlen.varlen_attn)
    assert flash_kernel(CUDA, torch.bfloat16) is varlen.varlen_attn


def test_dropout_takes_a_kernel_that_has_it(gpu):
    one = StandIn()
    gpu(flash_attn=one.flash_attn, torch_kernel=one.torch)
    assert flash_kernel(CUDA, torch.bfloat16, dropout=0.1) == one.flash_attn
    gpu(torch_kernel=one.torch)
    assert flash_kernel(CUDA, torch.bfloat16) == one.torch
    with pytest.raises(ConfigError, match="dropout_p"):
        flash_kernel(CUDA, torch.bfloat16, dropout=0.1)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ampere_and_newer_have_a_kernel(gpu, capability, dtype):
    one = StandIn()
    gpu(capability, torch_kernel=one.torch)
    assert flash_kernel(CUDA, dtype) == one.torch


def test_what_counts_is_the_generation_and_not_emulated_bfloat16(gpu, monkeypatch):
    gpu((7, 5), torch_kernel=StandIn().torch)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    with pytest.raises(ConfigError):
        flash_kernel(CUDA, torch.bfloat16)


@pytest.mark.parametrize(
    ("device", "dtype", "machine", "said"),
    [
        (CPU, torch.bfloat16, {}, "tensors on the cpu; expected a CUDA device"),
        (
            CUDA,
            torch.float16,
            {"capability": (7, 5)},
            "torch.float16 on compute capability (7, 5); expected 16 bits on (8, 0) or later",
        ),
        (
            CUDA,
            torch.float32,
            {"capability": (9, 0)},
            "torch.float32 on compute capability (9, 0); expected 16 bits on (8, 0) or later",
        ),
        (CUDA, torch.bfloat16, {}, "['window_size']; expected flash-attn or a newer torch"),
        (
            CUDA,
            torch.bfloat16,
            {"flash_attn": old_flash_attn, "torch_kernel": old_torch},
            "['window_size']; expected flash-attn or a newer torch",
        ),
    ],
)
def test_what_is_missing_is_named(gpu, device, dtype, machine, said):
    if machine.get("capability"):
        machine = {**machine, "torch_kernel": StandIn().torch}
    gpu(**machine)
    with pytest.raises(ConfigError) as error:
        flash_kernel(device, dtype)
    assert said in str(error.value)
    assert str(error.value).endswith('Use attn_implementation="auto" instead.')


def test_a_machine_without_a_gpu_is_never_asked_for_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: 1 / 0)
    with pytest.raises(ConfigError):
        flash_kernel(CPU, torch.bfloat16)


# ---- what the kernel is handed ----


@pytest.mark.parametrize("library", ["flash_attn", "torch"])
@pytest.mark.parametrize("half_window", [None, 0, 1, 3, 64])
def test_the_stand_in_gets_all_that_it_needs_for_the_right_numbers(library, half_window):
    q, k, v = qkv()
    kernel = getattr(StandIn(), library)
    out, weights = flash_attention(
        q, k, v, cu_seqlens=CU_SEQLENS, max_seqlen=11, half_window=half_window, kernel=kernel
    )
    right = eager_attention(q, k, v, mask=packed_mask(CU_SEQLENS, half_window))[0]
    assert weights is None and out.shape == (H, N, D)
    torch.testing.assert_close(out, right, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("half_window", "window"), [(64, (64, 64)), (0, (0, 0)), (None, (-1, -1))])
def test_half_a_window_is_what_lies_on_each_side(half_window, window):
    one = StandIn()
    given = {"cu_seqlens": CU_SEQLENS, "max_seqlen": 11, "half_window": half_window}
    flash_attention(*qkv(), **given, kernel=one.torch)
    assert one.seen["window_size"] == window


def test_tokens_come_before_heads_and_nothing_is_copied():
    one = StandIn()
    q, k, v = qkv()
    given = {"cu_seqlens": CU_SEQLENS, "max_seqlen": 11, "half_window": None}
    out, _ = flash_attention(q, k, v, **given, kernel=one.torch)
    for mine, theirs in zip((q, k, v), (one.seen[name] for name in "qkv"), strict=True):
        assert theirs.shape == (N, H, D) and theirs.stride(-1) == 1
        assert theirs.data_ptr() == mine.data_ptr()
        assert theirs.untyped_storage().nbytes() == mine.untyped_storage().nbytes()
    assert one.seen["cu_q"].data_ptr() == CU_SEQLENS.data_ptr()
    assert out._base is not None  # a view of what the kernel returned


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries_are_int32_for_queries_and_keys(dtype):
    one = StandIn()
    given = {"cu_seqlens": CU_SEQLENS.to(dtype), "max_seqlen": 11, "half_window": 2}
    flash_attention(*qkv(), **given, kernel=one.torch)
    for name in ("cu_q", "cu_k"):
        assert one.seen[name].dtype == torch.int32 and one.seen[name].equal(CU_SEQLENS)
    assert one.seen["max_q"] == one.seen["max_k"] == 11


def test_dropout_is_handed_on_where_there_is_any():
    one = StandIn()
    given = {"cu_seqlens": CU_SEQLENS, "max_seqlen": 11, "half_window": 2}
    flash_attention(*qkv(), **given, kernel=one.flash_attn, dropout=0.25)
    assert one.seen["dropout_p"] == 0.25
    flash_attention(*qkv(), **given, kernel=one.flash_attn)
    assert one.seen["dropout_p"] == 0.0


def test_no_dropout_is_no_argument_since_torch_has_none():
    given = {"cu_seqlens": CU_SEQLENS, "max_seqlen": 11, "half_window": 2}
    flash_attention(*qkv(), **given, kernel=StandIn().torch, dropout=0.0)


def test_gradients_come_back_through_the_views():
    given = {"cu_seqlens": CU_SEQLENS, "max_seqlen": 11, "half_window": 2}
    mine, right = ([x.clone().requires_grad_() for x in qkv()] for _ in range(2))
    flash_attention(*mine, **given, kernel=StandIn().torch)[0].square().sum().backward()
    mask = packed_mask(CU_SEQLENS, 2)
    eager_attention(*right, mask=mask)[0].square().sum().backward()
    for a, b in zip(mine, right, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("half_window", [None, 3])
def test_the_real_kernel_agrees_with_eager(half_window):
    try:
        kernel = flash_kernel(CUDA, torch.bfloat16)
    except ConfigError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, H, N, 64, generator=generator).to(CUDA, torch.bfloat16).unbind()
    cu_seqlens = CU_SEQLENS.to(CUDA)
    given = {"cu_seqlens": cu_seqlens, "max_seqlen": 11, "half_window": half_window}
    out, _ = flash_attention(q, k, v, **given, kernel=kernel)
    mask = packed_mask(cu_seqlens, half_window)
    right = eager_attention(q.float(), k.float(), v.float(), mask=mask)[0]
    torch.testing.assert_close(out.float(), right, atol=2e-2, rtol=0)


# ---- in the model ----


@pytest.fixture
def small():
    torch.manual_seed(0)
    config = ModernBertConfig(**{**BASE, "local_attention": 6})
    return ModernBertModel(config).eval()


@pytest.fixture
def batch():
    ids = torch.randint(5, BASE["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("library", ["flash_attn", "torch"])
def test_a_model_hands_all_its_layers_to_the_kernel(monkeypatch, small, batch, library):
    one = StandIn()
    monkeypatch.setattr(model, "flash_kernel", lambda *machine: getattr(one, library))
    calls = []
    monkeypatch.setattr(
        model,
        "flash_attention",
        lambda *qkv, **given: calls.append(given) or flash_attention(*qkv, **given),
    )
    with torch.no_grad():
        small.attn_implementation = "eager"
        right = small(**batch).last_hidden_state
        small.attn_implementation = "flash_attention_2"
        out = small(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(out[real], right[real], atol=1e-5, rtol=0)
    kinds = small.config.layer_types
    windows = [None if kind == "full_attention" else 3 for kind in kinds]
    assert [given["half_window"] for given in calls] == windows
    assert len(set(kinds)) == 2  # or the line above would show little
    assert all(given["cu_seqlens"].tolist() == [0, 9, 13] for given in calls)
    assert all(given["max_seqlen"] == 9 for given in calls)


def test_a_model_on_a_machine_without_a_kernel_says_so_when_it_runs(small, batch):
    small.attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match='CUDA device. Use attn_implementation="auto"'):
        small(**batch)
    small.attn_implementation = "auto"
    assert small(**batch).last_hidden_state.shape[:2] == (2, 9)


# ---- what the chapter says of other sources ----


def test_the_log_sum_exp_of_pytorchs_kernel_is_natural():
    q, k, v = torch.randn(3, 1, 2, 30, 8, generator=torch.Generator().manual_seed(0))
    lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[1]
    scores = q @ k.mT * q.shape[-1] ** -0.5
    torch.testing.assert_close(lse.reshape(1, 2, 30), scores.logsumexp(-1), atol=1e-5, rtol=0)


def test_the_log_sum_exp_of_torchs_kernel_has_heads_first(varlen):
    x = torch.empty(N, H, 64, device="meta", dtype=torch.bfloat16)
    bounds, asked = CU_SEQLENS.to("meta"), varlen.AuxRequest(lse=True)
    _, lse = varlen.varlen_attn(x, x, x, bounds, bounds, 11, 11, return_aux=asked)
    assert lse.shape == (H, N)


@pytest.mark.parametrize("half_window", [None, 64])
def test_torchs_real_kernel_takes_the_call(varlen, half_window):
    q, k, v = torch.empty(3, H, N, 64, device="meta", dtype=torch.bfloat16).unbind()
    given = {"cu_seqlens": CU_SEQLENS.to("meta"), "max_seqlen": 11, "half_window": half_window}
    out, _ = flash_attention(q, k, v, **given, kernel=varlen.varlen_attn)
    assert out.shape == (H, N, 64) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("half_window", [None, 0, 3])
def test_a_token_always_sees_itself(half_window):
    assert packed_mask(CU_SEQLENS, half_window).diagonal().all()


# ---- the view of the chapter ----


def told(view):
    """The result of each query, and how many tiles there were."""
    results = {
        query: mixed / total
        for *_, last, table in view.steps
        if last
        for query, _, _, _, total, mixed in table
    }
    return [results[i] for i in range(view.length)], len(view.steps)


@pytest.mark.parametrize("half_window", [None, 0, 2])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (4, 2), (3, 5), (7, 7), (9, 9)])
def test_the_steps_of_a_tile_view_end_in_the_right_results(rows, cols, half_window):
    generator = torch.Generator().manual_seed(0)
    scores, values = 3 * torch.randn(7, 7, generator=generator), torch.arange(7.0)
    mask = window_mask(7, 7 if half_window is None else half_window)
    right = scores.masked_fill(~mask, -torch.inf).double().softmax(-1) @ values.double()
    view = views.tile_view(scores, values, rows, cols, half_window)
    results, steps = told(view)
    assert results == pytest.approx(right.tolist())
    assert steps == sum(bool(t.any()) for r in mask.split(rows) for t in r.split(cols, dim=1))
    assert view.tiles == len(mask.split(rows)) * len(mask.split(cols))


def test_a_tile_view_has_a_button_and_a_table_for_each_step():
    view = views.tile_view(torch.zeros(8, 8), torch.arange(8.0), 4, 2, half_window=2)
    page, other = view._repr_html_(), view._repr_html_()
    assert page.count("<input") == page.count("<table>") == len(view.steps) == 6
    assert page.count(" class=x") == view.tiles - 6 == 2
    assert "<script" not in page and "http" not in page
    assert re.search('name="(.*?)"', page)[1] != re.search('name="(.*?)"', other)[1]


def test_a_tile_view_reads_as_text():
    text = repr(views.tile_view(torch.zeros(4, 4), torch.arange(4.0), 2, 2))
    assert text.startswith("4 of 4 tiles") and "step 4: queries 2–3, keys 2–3" in text
    assert text.count("result 1.500") == 4 and "factor 1.000" in text


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (((4, 4), (5,), 2, 2), "expected"),
        (((4, 5), (4,), 2, 2), "expected"),
        (((0, 0), (0,), 2, 2), "expected"),
        (((4, 4), (4,), 0, 2), "1 or more"),
        (((16, 16), (16,), 1, 1), "larger tiles"),
    ],
)
def test_a_tile_view_refuses_what_it_cannot_show(sizes, said):
    scores, values, rows, cols = sizes
    with pytest.raises(ValueError, match=said):
        views.tile_view(torch.zeros(scores), torch.zeros(values), rows, cols)
