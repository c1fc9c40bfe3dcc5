"""FlashAttention over a packed stream, written in Triton: forward, backward, sliding window.

Chapter 9 builds this module. Sources: Dao et al., "FlashAttention", arXiv:2205.14135, and Dao,
"FlashAttention-2", arXiv:2307.08691 (tiles, the softmax that runs along, backward by
recomputation); Milakov and Gimelshein, "Online normalizer calculation for softmax",
arXiv:1805.02867; Tillet et al., "Triton", 2019, doi:10.1145/3315508.3329973.

The rotary embedding stays outside: every tile of queries would turn all its keys again, and by
the bytes that chapter 9 counts, that costs more than it saves. (On a clock: not yet measured.)

Without Triton the module can be imported and read, not run. On tensors of a CPU it runs in
Triton's interpreter, where TRITON_INTERPRET=1 is set before Triton is first imported.
"""

from types import SimpleNamespace

import torch

from .config import ConfigError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)

INSTEAD = 'Use attn_implementation="sdpa" instead'


def jit(kernel):
    """``triton.jit``; the plain function where Triton is missing.

    Sizes that change from batch to batch must not make Triton compile again.
    """
    if not triton:
        return kernel
    return triton.jit(kernel, do_not_specialize=["max_seqlen", "num_tokens"])


def tuned(kernel):
    """Let Triton time several tile sizes, once for each head dimension, window and dtype.

    The interpreter gets one size: it has nothing to win. Its tiles are small and unequal, so that
    a short text takes several of them and a mistaken size shows.
    """
    if not triton:
        return kernel
    configs = [triton.Config({"OWN": 32, "OTHER": 16})]
    if isinstance(kernel, triton.JITFunction):
        # Rows of the tile, rows of the other side, warps of 32 threads, loads under way at once.
        # Triton passes over those that do not fit the GPU.
        sizes = [
            (32, 32, 4, 2),
            (64, 32, 4, 3),
            (64, 64, 4, 3),
            (128, 32, 4, 3),
            (128, 64, 4, 3),
            (128, 64, 8, 3),
            (128, 128, 8, 2),
        ]
        configs = [
            triton.Config({"OWN": own, "OTHER": other}, num_warps=warps, num_stages=stages)
            for own, other, warps, stages in sizes
        ]
    choice = {"early_config_prune": worth_a_try}
    return triton.autotune(configs, key=["D", "HALF_WINDOW"], prune_configs_by=choice)(kernel)


def worth_a_try(configs: list, arguments: dict, **_) -> list:
    """Only the smallest tile for float32: larger ones take minutes to compile, and are slow."""
    return configs[:1] if arguments["q"].dtype == torch.float32 else configs


@jit
def find_work(cu_seqlens, max_seqlen, OWN: tl.constexpr):
    """What this program works on: where its sequence starts, how long it is, its first row.

    Axis 0 of the grid counts the tiles of all sequences, as if each were ``max_seqlen`` long. A
    row behind the end of its sequence means that there is nothing to do.
    """
    tiles = tl.cdiv(max_seqlen, OWN)
    sequence = tl.program_id(0) // tiles
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    # In 64 bits: a place in a long stream times a stride outgrows 32.
    return start.to(tl.int64), length.to(tl.int32), tl.program_id(0) % tiles * OWN


@jit
def find_tiles(first, length, HALF_WINDOW: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Which rows of the other side the OWN rows from ``first`` on can see.

    Three numbers: the first row, the one up to which tiles of OTHER rows need no mask, and the
    end. What lies outside is never loaded; this, not a mask, is what makes a window cheap.
    """
    if HALF_WINDOW is None:
        low, middle, high = 0, length // OTHER * OTHER, length
    else:
        low = tl.maximum(first - HALF_WINDOW, 0)
        middle, high = low, tl.minimum(first + OWN + HALF_WINDOW, length)
    return low, middle, high


@jit
def load_rows(
    start, stride, rows, length, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of a (length, D) matrix, with zeros beyond its edges: (rows, BLOCK_D)."""
    columns = tl.arange(0, BLOCK_D)
    places = start + rows[:, None] * stride + columns[None, :]
    if MASKED or D != BLOCK_D:
        inside = (rows < length)[:, None] & (columns < D)[None, :]
        tile = tl.load(places, mask=inside, other=0.0)
    else:
        tile = tl.load(places)
    return tile


@jit
def store_rows(start, stride, rows, length, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write such rows, and nothing beyond the edges."""
    columns = tl.arange(0, BLOCK_D)
    places = start + rows[:, None] * stride + columns[None, :]
    inside = (rows < length)[:, None] & (columns < D)[None, :]
    tl.store(places, tile.to(start.dtype.element_ty), mask=inside)


@jit
def visible(rows, columns, length, HALF_WINDOW: tl.constexpr):
    """True where a column lies in the sequence and in the window of a row: (rows, columns)."""
    seen = (columns < length)[None, :]
    if HALF_WINDOW is not None:
        seen = seen & (tl.abs(rows[:, None] - columns[None, :]) <= HALF_WINDOW)
    return seen


@jit
def dot(a, b):
    """Matrix product, summed in float32; float32 tiles are not cut down to TF32."""
    return tl.dot(a, b, input_precision="ieee")


@jit
def mix_values(
    acc, total, top, q, rows, k, k_row, v, v_row, low, high, length,
    MASKED: tl.constexpr, HALF_WINDOW: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """The softmax that runs along: take in the keys and values from ``low`` to ``high``.

    ``top`` is the largest score so far; ``total``, the sum of exponentials, and ``acc``, the sum
    of values, are relative to it.
    """
    for begin in range(low, high, OTHER):
        columns = begin + tl.arange(0, OTHER)
        keys = load_rows(k, k_row, columns, length, MASKED, D, BLOCK_D)
        values = load_rows(v, v_row, columns, length, MASKED, D, BLOCK_D)
        scores = dot(q, tl.trans(keys)) * (D**-0.5 * 1.4426950408889634)  # e^x = 2^(x·log2(e))
        if MASKED:
            # A finite number: with -inf, a row that sees nothing of its first tile would be NaN.
            # What such a row gathers there is wiped out by the first key that it does see.
            scores = tl.where(visible(rows, columns, length, HALF_WINDOW), scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - higher)
        powers = tl.exp2(scores - higher[:, None])
        acc = acc * shrink[:, None] + dot(powers.to(values.dtype), values)
        total = total * shrink + tl.sum(powers, 1)
        top = higher
    return acc, total, top


@tuned
@jit
def forward_kernel(
    q, q_head, q_row, k, k_head, k_row, v, v_head, v_row, out, lse,
    out_row, cu_seqlens, max_seqlen, num_tokens,
    HALF_WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: their mixed values, and the logarithm of their sum."""
    start, length, first = find_work(cu_seqlens, max_seqlen, OWN)
    if first >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    q += head * q_head + start * q_row
    k += head * k_head + start * k_row
    v += head * v_head + start * v_row
    out += head * D + start * out_row
    lse += head * num_tokens + start

    rows = first + tl.arange(0, OWN)
    queries = load_rows(q, q_row, rows, length, True, D, BLOCK_D)
    acc = tl.zeros((OWN, BLOCK_D), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    top = tl.full((OWN,), -float("inf"), tl.float32)
    edges = find_tiles(first, length, HALF_WINDOW, OWN, OTHER)
    for i in tl.static_range(2):  # tiles that need no mask, then those that do
        acc, total, top = mix_values(
            acc, total, top, queries, rows, k, k_row, v, v_row, edges[i], edges[i + 1], length,
            i == 1, HALF_WINDOW, D, BLOCK_D, OTHER,
        )  # fmt: skip
    store_rows(out, out_row, rows, length, acc / total[:, None], D, BLOCK_D)
    # With base 2, as the exponentials. A weight is then one exp2 away: 2^(score - lse).
    tl.store(lse + rows, top + tl.log2(total), mask=rows < length)


@jit
def gather_for_queries(
    dq, q, grad, lse, delta, rows, k, k_row, v, v_row, low, high, length,
    MASKED: tl.constexpr, HALF_WINDOW: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Add what the keys from ``low`` to ``high`` say about the queries of a tile."""
    for begin in range(low, high, OTHER):
        columns = begin + tl.arange(0, OTHER)
        keys = load_rows(k, k_row, columns, length, MASKED, D, BLOCK_D)
        values = load_rows(v, v_row, columns, length, MASKED, D, BLOCK_D)
        scores = dot(q, tl.trans(keys)) * (D**-0.5 * 1.4426950408889634)
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            weights = tl.where(visible(rows, columns, length, HALF_WINDOW), weights, 0.0)
        slopes = weights * (dot(grad, tl.trans(values)) - delta[:, None])
        dq += dot(slopes.to(keys.dtype), keys)
    return dq


@tuned
@jit
def query_kernel(
    q, q_head, q_row, k, k_head, k_row, v, v_head, v_row, grad, grad_head, grad_row,
    out, lse, delta, dq, out_row, cu_seqlens, max_seqlen, num_tokens,
    HALF_WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: their gradient, and ``delta`` for the next kernel."""
    start, length, first = find_work(cu_seqlens, max_seqlen, OWN)
    if first >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    q += head * q_head + start * q_row
    k += head * k_head + start * k_row
    v += head * v_head + start * v_row
    grad += head * grad_head + start * grad_row
    out += head * D + start * out_row
    dq += head * D + start * out_row
    lse += head * num_tokens + start
    delta += head * num_tokens + start

    rows = first + tl.arange(0, OWN)
    queries = load_rows(q, q_row, rows, length, True, D, BLOCK_D)
    grads = load_rows(grad, grad_row, rows, length, True, D, BLOCK_D)
    mixed = load_rows(out, out_row, rows, length, True, D, BLOCK_D)
    deltas = tl.sum(mixed.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + rows, deltas, mask=rows < length)
    sums = tl.load(lse + rows, mask=rows < length, other=0.0)
    acc = tl.zeros((OWN, BLOCK_D), tl.float32)
    edges = find_tiles(first, length, HALF_WINDOW, OWN, OTHER)
    for i in tl.static_range(2):
        acc = gather_for_queries(
            acc, queries, grads, sums, deltas, rows, k, k_row, v, v_row, edges[i], edges[i + 1],
            length, i == 1, HALF_WINDOW, D, BLOCK_D, OTHER,
        )  # fmt: skip
    store_rows(dq, out_row, rows, length, acc * D**-0.5, D, BLOCK_D)


@jit
def gather_for_keys(
    dk, dv, k, v, rows, q, q_row, grad, grad_row, lse, delta, low, high, length,
    MASKED: tl.constexpr, HALF_WINDOW: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Add what the queries from ``low`` to ``high`` say about the keys and values of a tile.

    Rows are keys here and columns are queries: the square of weights lies on its side.
    """
    for begin in range(low, high, OTHER):
        columns = begin + tl.arange(0, OTHER)
        queries = load_rows(q, q_row, columns, length, MASKED, D, BLOCK_D)
        grads = load_rows(grad, grad_row, columns, length, MASKED, D, BLOCK_D)
        sums = tl.load(lse + columns, mask=columns < length, other=0.0)
        deltas = tl.load(delta + columns, mask=columns < length, other=0.0)
        scores = dot(k, tl.trans(queries)) * (D**-0.5 * 1.4426950408889634)
        weights = tl.exp2(scores - sums[None, :])
        if MASKED:
            weights = tl.where(visible(rows, columns, length, HALF_WINDOW), weights, 0.0)
        dv += dot(weights.to(grads.dtype), grads)
        slopes = weights * (dot(v, tl.trans(grads)) - deltas[None, :])
        dk += dot(slopes.to(queries.dtype), queries)
    return dk, dv


@tuned
@jit
def key_value_kernel(
    q, q_head, q_row, k, k_head, k_row, v, v_head, v_row, grad, grad_head, grad_row,
    lse, delta, dk, dv, out_row, cu_seqlens, max_seqlen, num_tokens,
    HALF_WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values of one head: their gradients."""
    start, length, first = find_work(cu_seqlens, max_seqlen, OWN)
    if first >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    q += head * q_head + start * q_row
    k += head * k_head + start * k_row
    v += head * v_head + start * v_row
    grad += head * grad_head + start * grad_row
    dk += head * D + start * out_row
    dv += head * D + start * out_row
    lse += head * num_tokens + start
    delta += head * num_tokens + start

    rows = first + tl.arange(0, OWN)
    keys = load_rows(k, k_row, rows, length, True, D, BLOCK_D)
    values = load_rows(v, v_row, rows, length, True, D, BLOCK_D)
    acc_k = tl.zeros((OWN, BLOCK_D), tl.float32)
    acc_v = tl.zeros((OWN, BLOCK_D), tl.float32)
    # A window is the same from both sides: these are the queries that see the keys of the tile.
    edges = find_tiles(first, length, HALF_WINDOW, OWN, OTHER)
    for i in tl.static_range(2):
        acc_k, acc_v = gather_for_keys(
            acc_k, acc_v, keys, values, rows, q, q_row, grad, grad_row, lse, delta,
            edges[i], edges[i + 1], length, i == 1, HALF_WINDOW, D, BLOCK_D, OTHER,
        )  # fmt: skip
    store_rows(dk, out_row, rows, length, acc_k * D**-0.5, D, BLOCK_D)
    store_rows(dv, out_row, rows, length, acc_v, D, BLOCK_D)


def launch(kernel, inputs, others, cu_seqlens, max_seqlen, half_window) -> None:
    """Start a kernel: one program for each tile of each sequence, and for each head.

    Args:
        kernel: one of the three above.
        inputs: its inputs (H, N, D), with any strides; rows that lie apart are copied together.
        others: its other tensors, those of ``torch.empty_like`` or of its forward pass.
        cu_seqlens, max_seqlen, half_window: as for ``triton_attention``.
    """
    heads, tokens, size = inputs[0].shape
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in inputs]
    strided = [each for x in inputs for each in (x, x.stride(0), x.stride(1))]

    def grid(meta):
        # From numbers that the host has: to ask the device for the lengths would make it wait.
        return triton.cdiv(max_seqlen, meta["OWN"]) * (len(cu_seqlens) - 1), heads

    with torch.cuda.device_of(inputs[0]):
        kernel[grid](
            *strided, *others, heads * size, cu_seqlens, max_seqlen, tokens,
            HALF_WINDOW=half_window, D=size, BLOCK_D=max(16, triton.next_power_of_2(size)),
            enable_fp_fusion=True,  # a·b + c in one step; newer releases ask for it to be said
        )  # fmt: skip


def empty_rows(x: torch.Tensor) -> torch.Tensor:
    """Memory for (H, N, D), laid out so that merging the heads of a token moves nothing."""
    heads, tokens, size = x.shape
    return x.new_empty(tokens, heads, size).transpose(0, 1)  # (H, N, D)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    half_window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mixed values (H, N, D), and for each query log2 of its sum of 2^score, (H, N)."""
    out = empty_rows(q)  # (H, N, D)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)  # (H, N)
    launch(forward_kernel, [q, k, v], [out, lse], cu_seqlens, max_seqlen, half_window)
    return out, lse


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    half_window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v from that of ``out``, 3 × (H, N, D)."""
    dq, dk, dv = empty_rows(q), empty_rows(q), empty_rows(q)  # 3 × (H, N, D)
    delta = torch.empty_like(lse)  # (H, N)
    bounds = cu_seqlens, max_seqlen, half_window
    launch(query_kernel, [q, k, v, grad], [out, lse, delta, dq], *bounds)
    launch(key_value_kernel, [q, k, v, grad], [lse, delta, dk, dv], *bounds)
    return dq, dk, dv


# As operators of torch, which torch.compile takes as they are instead of looking into them.
forward_op = torch.library.custom_op("modernbert_mini::forward", forward, mutates_args=())
backward_op = torch.library.custom_op("modernbert_mini::backward", backward, mutates_args=())


@forward_op.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, half_window):
    return empty_rows(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@backward_op.register_fake
def _(grad, q, *rest):
    return empty_rows(q), empty_rows(q), empty_rows(q)


def save_for_backward(ctx, inputs, output) -> None:
    """Keep what the backward pass needs: N numbers a head beside the tensors themselves."""
    q, k, v, cu_seqlens, *ctx.bounds = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def gradients(ctx, grad, _):
    """The gradients of the operator's six arguments; the last three have none."""
    return *backward_op(grad, *ctx.saved_tensors, *ctx.bounds), None, None, None


forward_op.register_autograd(gradients, setup_context=save_for_backward)


def check_machine(device: torch.device) -> None:
    """Refuse what the kernels cannot run on, and say what to do instead.

    Raises:
        ConfigError: where Triton is missing, the GPU is too old or there is none.
    """
    if not triton:
        raise ConfigError(
            "triton is not installed",
            "Triton, which comes with torch for CUDA on Linux",
            f"`pip install triton` (Linux only). {INSTEAD}.",
        )
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:  # Colab's T4 has 7.5
            raise ConfigError(
                f"a GPU of compute capability {major}.{minor}", "8.0 or more", f"{INSTEAD}."
            )
    elif isinstance(load_rows, triton.JITFunction):
        raise ConfigError(
            f"tensors on the {device.type}",
            "a CUDA device",
            f"{INSTEAD}, or set TRITON_INTERPRET=1 before Python starts, to learn or to test.",
        )


def triton_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    half_window: int | None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """Attention over a packed stream by the kernels of this module, with gradients.

    Args:
        q, k, v: (H, N, D) of one dtype: bfloat16, float16 or float32; strides as they come.
        cu_seqlens: (S + 1,) int32 or int64, from 0 to N.
        max_seqlen: length of the longest sequence, or more; rows beyond it are not computed.
        half_window: W, or None for a global layer.
        dropout: of the weights; only 0 is possible.

    Returns:
        The mixed values (H, N, D), dtype of ``q``, and None for the weights.

    Raises:
        ConfigError: for a dropout, and where ``check_machine`` refuses.
    """
    if dropout:
        raise ConfigError(
            f"attention dropout {dropout} with the Triton kernel", "0", f"{INSTEAD}, which has it."
        )
    check_machine(q.device)
    dtype = q.dtype
    if dtype == torch.bfloat16 and not q.is_cuda:
        # The interpreter keeps bfloat16 as bare bits, and would multiply these.
        q, k, v = q.float(), k.float(), v.float()
    out, _ = forward_op(q, k, v, cu_seqlens, max_seqlen, half_window)
    return out.to(dtype), None
