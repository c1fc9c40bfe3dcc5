"""The Triton kernels: on paper everywhere, in Triton's interpreter or on a GPU where these are.

Whether Triton interprets or compiles is settled when it is first imported, and nothing else in
this suite may see the one or the other by accident. So the tests named `test_kernel_…` run here
on the GPU on paper, which needs no Triton, and once more in processes of their own.
"""

import math
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from modernbert_mini import triton_kernel
from modernbert_mini.alternating_attention import packed_mask
from modernbert_mini.checks._paper_gpu import PaperError, PaperGPU, PaperKernel, stand_in
from modernbert_mini.config import ConfigError
from modernbert_mini.triton_kernel import tl, triton_attention

RUN_BY = os.environ.get("TRITON_TEST", "paper")  # or "interpreter", or "cuda"
DEVICE = "cuda" if RUN_BY == "cuda" else "cpu"
OWN, OTHER = 32, 16  # rows of a tile, on paper and in the interpreter
H = 2
needs_triton = pytest.mark.skipif(
    triton_kernel.triton is None, reason="needs Triton: `pip install triton` on Linux"
)
on_paper = pytest.mark.skipif(RUN_BY != "paper", reason="looks at the GPU on paper")
KERNELS = ["forward_kernel", "query_kernel", "key_value_kernel"]


@pytest.fixture(autouse=True)
def machine(request, monkeypatch):
    """Run the kernels on paper, unless this process is there for another machine."""
    if RUN_BY == "paper" and "test_kernel_" in request.node.name:
        monkeypatch.setattr(triton_kernel, "triton", stand_in()[0])
        for name in KERNELS:
            kernel = PaperKernel(getattr(triton_kernel, name), {"OWN": OWN, "OTHER": OTHER})
            monkeypatch.setattr(triton_kernel, name, kernel)


def again(**environment: str) -> None:
    """Run the tests of the kernels once more, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    inherited = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [*command, "-k", "test_kernel_", __file__],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
    assert " passed" in child.stdout


@needs_triton
@on_paper
def test_all_of_it_in_the_interpreter():
    again(TRITON_TEST="interpreter", TRITON_INTERPRET="1")


@needs_triton
@on_paper
@pytest.mark.gpu
def test_all_of_it_on_a_gpu():
    again(TRITON_TEST="cuda")


# ---- what works without Triton ----


def stream(lengths, size=16, dtype=torch.float32, seed=0):
    """Queries, keys and values of a packed stream, as `Wqkv` lays them out, and its boundaries."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, H, size, generator=generator).to(DEVICE, dtype)
    q, k, v = (x.transpose(0, 1).requires_grad_() for x in qkv.unbind(1))
    return (q, k, v), torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)


def call(qkv, bounds, half_window=None, **more):
    longest = int(bounds.diff().max())
    given = {"cu_seqlens": bounds, "max_seqlen": longest, "half_window": half_window, **more}
    return triton_attention(*qkv, **given)[0]


@pytest.fixture
def pretend(monkeypatch):
    """A Triton that compiles, whether it is here or not."""
    compiled = SimpleNamespace(JITFunction=type(triton_kernel.load_rows))
    return partial(monkeypatch.setattr, triton_kernel, "triton", compiled)


def refused(*said, **more):
    with pytest.raises(ConfigError) as error:
        call(*stream([5]), **more)
    message = str(error.value)
    assert all(word in message for word in ('"sdpa"', *said)), message


def test_without_triton_the_module_is_there_and_says_what_to_do(monkeypatch):
    code = "import sys; sys.modules['triton'] = None; import modernbert_mini.triton_kernel as t"
    code += "; assert t.triton is None and t.forward_kernel.__doc__"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setattr(triton_kernel, "triton", None)
    refused("not installed", "pip install triton")


def test_dropout_is_refused():
    refused("dropout 0.1", dropout=0.1)


def test_a_cpu_without_the_interpreter_is_refused(pretend):
    pretend()
    refused("on the cpu", "TRITON_INTERPRET=1")


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_a_gpu_before_ampere_is_refused(pretend, monkeypatch, capability):
    pretend()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ConfigError, match='{}.{}.*8.0 or more.*"sdpa"'.format(*capability)):
        triton_kernel.check_machine(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    triton_kernel.check_machine(torch.device("cuda"))


def test_the_package_imports_without_triton():
    code = "import sys; before = {*sys.modules}; from modernbert_mini import ModernBertModel; "
    code += "ModernBertModel.from_pretrained('mini'); print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "modernbert_mini.triton_kernel" not in done.stdout.split()


# ---- what the kernels compute ----


def reference(qkv, bounds, half_window=None):
    return scaled_dot_product_attention(*qkv, attn_mask=packed_mask(bounds, half_window))


def apart(one, other):
    return (one.float() - other.float()).abs().max().item()


CASES = {  # lengths, half window, head dimension
    "one token": ([1], None, 16),
    "tokens alone": ([1, 1, 1], 0, 16),
    "a whole tile": ([OWN], None, 16),
    "one more than a tile": ([OWN + 1], None, 32),
    "one less than two": ([2 * OWN - 1], 3, 32),
    "many sequences": ([3, 17, 1, 40, 2, 9], None, 64),
    "an empty one between": ([7, 0, 5], 2, 16),
    "itself only": ([37, 6], 0, 16),
    "neighbours": ([41, 35], 1, 16),
    "window over tiles": ([100], 20, 16),
    "window of the model": ([150, 3], 64, 64),
    "window beyond the text": ([45, 50], 1000, 16),
    "head of 24": ([35, 9], 5, 24),
    "head of 48": ([35, 9], None, 48),
    "head of 1": ([20], 4, 1),
    "head of 128": ([33], 7, 128),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_sdpa(case):
    lengths, half_window, size = CASES[case]
    qkv, bounds = stream(lengths, size)
    out, expected = call(qkv, bounds, half_window), reference(qkv, bounds, half_window)
    assert out.shape == expected.shape and apart(out, expected) < 1e-5
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours = torch.autograd.grad(out, qkv, upstream)
    theirs = torch.autograd.grad(expected, qkv, upstream)
    for name, one, other in zip("qkv", ours, theirs, strict=True):
        assert apart(one, other) < 1e-4, name


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str
)
def test_kernel_works_in_16_bits(dtype, bound):
    qkv, bounds = stream([50, 21], 32, dtype)
    wide = [x.detach().float().requires_grad_() for x in qkv]
    out, expected = call(qkv, bounds, 9), reference(wide, bounds, 9)
    assert out.dtype == dtype and apart(out, expected) < bound
    ours = torch.autograd.grad(out.float().square().sum(), qkv)
    theirs = torch.autograd.grad(expected.square().sum(), wide)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype and apart(one, other) < 10 * bound


def test_kernel_keeps_its_log_sum_exp_in_base_two():
    qkv, bounds = stream([20, 3])
    lse = triton_kernel.forward(*(x.detach() for x in qkv), bounds, 20, None)[1]
    scores = qkv[0] @ qkv[1].mT * 16**-0.5
    natural = scores.masked_fill(~packed_mask(bounds, None), -torch.inf).logsumexp(-1)
    assert apart(lse * math.log(2), natural) < 1e-5


def test_kernel_leaves_a_token_that_sees_itself_only_as_it_is():
    qkv, bounds = stream([40])
    assert torch.equal(call(qkv, bounds, 0), qkv[2])


@pytest.mark.parametrize("half_window", [None, 5])
def test_kernel_gives_a_sequence_the_same_bits_in_any_stream(half_window):
    (q, k, v), bounds = stream([11, 45, 70])
    together = call((q, k, v), bounds, half_window)
    alone = call([x[:, 11:56] for x in (q, k, v)], bounds.new_tensor([0, 45]), half_window)
    assert torch.equal(together[:, 11:56], alone)
    assert torch.equal(call((q, k, v), bounds, half_window, max_seqlen=300), together)
    assert apart(call((q, k, v), bounds.long(), half_window), together) < 1e-5


def test_kernel_reads_nothing_of_other_sequences():
    (q, k, v), bounds = stream([20, 30, 20])
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :20] = x[:, 50:] = torch.nan
    out = call((q, k, v), bounds)[:, 20:50]
    assert out.isfinite().all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x[:, 20:50].isfinite().all() for x in grads)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the tiles are as large as tuning made them")
def test_kernel_never_loads_a_tile_outside_the_window():
    # The first tile of queries sees up to key 31 + 5, in tiles of 16 up to key 47. What stands
    # behind is not a number, and would spoil everything if it were loaded and then masked.
    (q, k, v), bounds = stream([200])
    clean = call((q, k, v), bounds, 5)
    with torch.no_grad():
        spoilt = [x.index_fill(1, torch.arange(48, 200), torch.nan) for x in (q, k, v)]
    out = call([x.requires_grad_() for x in spoilt], bounds, 5)
    (dq,) = torch.autograd.grad(out.sum(), spoilt[0])
    assert torch.equal(out[:, :OWN], clean[:, :OWN]) and dq[:, :OWN].isfinite().all()
    # The same from the side of the keys: a gradient behind query 47 is none of theirs.
    upstream = torch.ones_like(clean).index_fill(1, torch.arange(48, 200), torch.nan)
    for x in torch.autograd.grad(clean, (k, v), upstream):
        assert x[:, :OWN].isfinite().all()
        assert x[:, OWN : 2 * OWN].isnan().any(), "the trap is armed"


@on_paper
def test_kernel_loads_less_where_it_sees_less():
    loaded = {}
    for half_window in (None, 5):
        for length in (256, 512):
            call(*stream([length]), half_window)
            loaded[half_window, length] = triton_kernel.forward_kernel.gpu.loaded["k"]
    assert loaded[None, 512] == 4 * loaded[None, 256]
    assert 1.9 < loaded[5, 512] / loaded[5, 256] < 2.2
    # 32 rows see 5 + 32 + 5 keys, three tiles of 16; a key has 16 numbers of 4 bytes.
    assert loaded[5, 512] <= H * (512 // OWN) * 3 * OTHER * 16 * 4


def test_kernel_survives_scores_that_overflow_an_exponential():
    (q, k, v), bounds = stream([50])
    large = [q * 100, k * 100, v]
    assert (large[0] @ large[1].mT).abs().max() > 10_000
    # Scores of this size carry an error of 1e-3 themselves.
    assert apart(call(large, bounds), reference(large, bounds)) < 1e-2


def test_kernel_survives_a_first_tile_that_is_hidden():
    # The last rows of the first tile of queries see nothing of the first tile of keys, and what
    # they do see has low scores: nothing of the hidden one may be left.
    (q, k, v), bounds = stream([64])
    q, k, v = q.abs() + 1, -100 * (k.abs() + 1), v
    assert apart(call((q, k, v), bounds, 3), reference((q, k, v), bounds, 3)) < 1e-3


def test_kernel_takes_any_strides():
    lengths = [30, 15]
    qkv, bounds = stream(lengths)
    expected = call(qkv, bounds)
    layouts = {
        "(H, N, D)": lambda x: x.contiguous(),
        "(D, N, H)": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        "every other row": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
        "(N, D, H)": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }
    for name, layout in layouts.items():
        assert torch.equal(call([layout(x) for x in qkv], bounds), expected), name
    # The gradient of a sum is one number, expanded: all its strides are 0.
    ours = torch.autograd.grad(expected.sum(), qkv)
    theirs = torch.autograd.grad(reference(qkv, bounds).sum(), qkv)
    assert all(apart(one, other) < 1e-4 for one, other in zip(ours, theirs, strict=True))


def test_kernel_copies_nothing_on_the_way_in_and_out(monkeypatch):
    def copy(self):
        raise AssertionError("copied")

    qkv, bounds = stream([10])
    monkeypatch.setattr(torch.Tensor, "contiguous", copy)
    out = call([x.detach() for x in qkv], bounds)
    assert out.transpose(0, 1).flatten(1).data_ptr() == out.data_ptr()


def test_kernel_stands_in_the_layer_of_a_real_model():
    from modernbert_mini import ModernBertModel
    from modernbert_mini.alternating_attention import packed_sdpa_attention
    from modernbert_mini.rope import inverse_frequencies, rotary_table

    model = ModernBertModel.from_pretrained("mini").to(DEVICE).eval()
    lengths = [33, 5]
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    size = model.config.head_dim
    places = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    tables = rotary_table(places, inverse_frequencies(size, 10_000.0, device=DEVICE))
    x = model.embeddings(torch.arange(300, 338, device=DEVICE)).detach()
    layer = model.layers[0].attn
    bound = {"cu_seqlens": bounds, "max_seqlen": 33, "half_window": None}
    results = []
    for attend in (
        partial(triton_attention, **bound),
        partial(packed_sdpa_attention, lengths=lengths),
    ):
        layer.zero_grad()
        out, weights = layer(x, *tables, attend)
        out.square().sum().backward()
        results.append((out, layer.Wqkv.weight.grad.clone()))
        assert weights is None
    (out, grad), (expected, expected_grad) = results
    assert apart(out, expected) < 1e-5 * expected.abs().max()
    assert apart(grad, expected_grad) < 1e-4 * expected_grad.abs().max()


def test_kernel_is_an_operator_that_torch_compile_takes_whole():
    qkv, bounds = stream([9, 14])
    sample = (*qkv, bounds, 14, 4)
    torch.library.opcheck(triton_kernel.forward_op, sample)

    def function(q, k, v, bounds, longest):
        out = triton_attention(q * 2, k, v, cu_seqlens=bounds, max_seqlen=longest, half_window=4)
        return out[0].square()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([9, 14, 2, 6], [3, 20, 11, 1, 4]):
        # The second batch must not ask for another program.
        with torch._dynamo.config.patch(error_on_recompile=len(lengths) == 5):
            qkv, bounds = stream(lengths)
            given = (*qkv, bounds, max(lengths))
            one, other = compiled(*given), function(*given)
            assert apart(one, other) < 1e-6
            one, other = (torch.autograd.grad(out.sum(), qkv) for out in (one, other))
            assert all(apart(a, b) < 1e-5 for a, b in zip(one, other, strict=True))


def test_kernel_refuses_a_second_derivative():
    qkv, bounds = stream([5])
    (first,) = torch.autograd.grad(call(qkv, bounds).sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), qkv[0])


# ---- what the compiler makes of them ----

# Shared memory that one program may use, in kilobytes: NVIDIA, CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability".
SHARED = {80: 163, 89: 99, 90: 227}


def compiled_for(tuned, capability, config, dtype, size, half_window):
    """A kernel, compiled for a GPU of this capability; the GPU itself is not needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = tuned.fn.arg_names
    fixed = {"HALF_WINDOW": half_window, "D": size, "BLOCK_D": max(16, size), **config.kwargs}
    kinds = dict.fromkeys(("q", "k", "v", "grad", "out", "dq", "dk", "dv"), f"*{dtype}")
    kinds |= {"lse": "*fp32", "delta": "*fp32", "cu_seqlens": "*i32"}
    kinds |= dict.fromkeys(fixed, "constexpr")
    source = ASTSource(
        fn=tuned.fn,
        signature={name: kinds.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in fixed.items()},
    )
    from triton import compile

    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options["enable_fp_fusion"] = True
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("capability", "config", "dtype", "size", "half_window"),
    [(80, 2, "bf16", 64, 64), (89, 0, "fp32", 32, None), (90, 2, "fp16", 64, None)],
)
def test_compiles_for_a_gpu_that_is_not_here(name, capability, config, dtype, size, half_window):
    tuned = getattr(triton_kernel, name)
    if not isinstance(tuned.fn, triton_kernel.triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    made = compiled_for(tuned, capability, tuned.configs[config], dtype, size, half_window)
    assert made.metadata.shared <= SHARED[capability] * 1024
    # Tensor cores do the products of 16 bits; float32 is multiplied in full.
    tensor_cores = any(word in made.asm["ptx"] for word in ("mma.sync", "wgmma"))
    assert tensor_cores == (dtype != "fp32") and "tf32" not in made.asm["ptx"]


# ---- the GPU on paper ----


def copy_kernel(x, out, n, BLOCK):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < n
    tl.store(out + places, tl.load(x + places, mask=inside), mask=inside)


def careless_kernel(x, out, n, BLOCK):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + places, tl.load(x + places), mask=places < n)


def unread_kernel(x, out, n, BLOCK):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(x + places, mask=places < n), 0))


def overlapping_kernel(x, out, n, BLOCK):
    places = tl.program_id(0) * BLOCK // 2 + tl.arange(0, BLOCK)
    tl.store(out + places, tl.load(x + places, mask=places < n), mask=places < n)


def sum_in_one_place_kernel(x, out, n, BLOCK):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    more = tl.sum(tl.load(x + places, mask=places < n, other=0.0), 0)
    tl.store(out, tl.load(out) + more)


def shift_in_place_kernel(x, out, n, BLOCK):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    following = tl.load(x + places + 1, mask=places + 1 < n, other=0.0)
    tl.store(x + places, following, mask=places < n)


def no_pointer_kernel(x, out, n, BLOCK):
    tl.store(tl.arange(0, BLOCK), 0.0)


def run_on_paper(kernel, x, block=4):
    out = torch.zeros_like(x)
    grid = (-(-len(x) // block),)
    return out, PaperGPU().run(kernel, grid, x, out, len(x), BLOCK=block)


@pytest.fixture
def numbers():
    return torch.arange(10.0)


@on_paper
def test_paper_runs_a_kernel_and_counts_its_bytes(numbers):
    out, gpu = run_on_paper(copy_kernel, numbers)
    assert torch.equal(out, numbers)
    assert gpu.loaded == {"x": 40} and gpu.stored == {"out": 40}
    assert [len(places) for _, _, places in gpu.trace] == [4, 4, 2]


@on_paper
@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (careless_kernel, r"tl.load in program \(2, 0, 0\) goes to number 10 of `x`, which has 10"),
        (overlapping_kernel, "writes a number of `out` that another one writes, too"),
        (sum_in_one_place_kernel, "reads a number of `out` that another one writes"),
        (shift_in_place_kernel, "writes a number of `x` that another one reads"),
        (no_pointer_kernel, "tl.store wants a pointer"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_paper_forgives_nothing(numbers, kernel, said):
    with pytest.raises(PaperError, match=said):
        run_on_paper(kernel, numbers)


@on_paper
def test_paper_sees_a_race_between_two_views_of_one_tensor():
    both = torch.arange(16.0)
    with pytest.raises(PaperError, match="another one"):
        # The first half moves to the right by two programs' worth: over what others still read.
        PaperGPU().run(copy_kernel, (2,), both[:8], both[4:12], 8, BLOCK=4)


@on_paper
def test_paper_fills_what_a_mask_leaves_out_with_nan(numbers):
    out, _ = run_on_paper(unread_kernel, numbers)
    assert out[:2].isfinite().all() and out[2].isnan()


@on_paper
@pytest.mark.parametrize(
    ("shapes", "dtypes", "said"),
    [
        (((16, 16), (32, 16)), ("float32", "float32"), "do the sides meet"),
        (((8, 16), (16, 16)), ("float32", "float32"), "no side below 16"),
        (((16, 16), (16, 16)), ("float32", "float16"), "which one is to be cast"),
    ],
)
def test_paper_multiplies_what_tensor_cores_multiply(shapes, dtypes, said):
    a, b = (torch.ones(x, dtype=getattr(torch, y)) for x, y in zip(shapes, dtypes, strict=True))
    with pytest.raises(PaperError, match=said):
        PaperGPU().language.dot(a, b)


@on_paper
def test_paper_wants_powers_of_two(numbers):
    with pytest.raises(PaperError, match="power of two"):
        run_on_paper(copy_kernel, numbers, block=5)


@on_paper
def test_paper_stands_in_for_triton(numbers):
    triton, _ = stand_in()
    kernel = triton.autotune([triton.Config({"BLOCK": 4}, num_warps=1)], key=[])(
        triton.jit(copy_kernel, do_not_specialize=["n"])
    )
    out = torch.zeros_like(numbers)
    kernel[lambda sizes: (triton.cdiv(10, sizes["BLOCK"]),)](numbers, out, 10, num_warps=4)
    assert torch.equal(out, numbers) and kernel.gpu.loaded["x"] == 40
    assert triton.next_power_of_2(24) == 32
