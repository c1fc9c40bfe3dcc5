"""FlashAttention over a packed stream, by the kernel that this machine has.

Chapter 8 builds this module. Sources: Dao et al., "FlashAttention", arXiv:2205.14135; Dao,
"FlashAttention-2", arXiv:2307.08691. Two libraries bring a kernel for sequences of different
length with a window: ``flash_attn``, and newer releases of torch itself.
"""

from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from pkgutil import resolve_name

import torch

from .config import ConfigError

AUTO = 'Use attn_implementation="auto" instead.'


def flash_kernel(device: torch.device, dtype: torch.dtype, dropout: float = 0.0) -> Callable:
    """The variable-length attention that this machine offers.

    Args:
        device, dtype: of queries, keys and values.
        dropout: probability of dropping a weight; torch's own kernel has no dropout.

    Returns:
        A function of q, k, v (N, H, D); the boundaries of queries and of keys, (S + 1,) int32;
        the longest length of each; ``window_size``; and ``dropout_p``, where there is dropout.

    Raises:
        ConfigError: saying whether device, its generation, dtype or library is missing.
    """
    if device.type != "cuda":
        raise ConfigError(f"tensors on the {device.type}", "a CUDA device", AUTO)
    # By generation, not by torch.cuda.is_bf16_supported(), which is true where it is emulated.
    cc = torch.cuda.get_device_capability(device)  # Ampere: (8, 0); Colab's T4: (7, 5)
    if cc < (8, 0) or dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(f"{dtype} on compute capability {cc}", "16 bits on (8, 0) or later", AUTO)
    needed = {"window_size", "dropout_p"} if dropout else {"window_size"}
    for name in ("flash_attn.flash_attn_varlen_func", "torch.nn.attention.varlen.varlen_attn"):
        with suppress(ImportError, AttributeError):
            if needed <= signature(kernel := resolve_name(name)).parameters.keys():
                return kernel
    raise ConfigError(f"no kernel that takes {sorted(needed)}", "flash-attn or a newer torch", AUTO)


def flash_works(device: torch.device, dtype: torch.dtype, dropout: float = 0.0) -> bool:
    """Whether ``flash_kernel`` finds one."""
    with suppress(ConfigError):
        return bool(flash_kernel(device, dtype, dropout))
    return False


# They look for libraries, which no graph can: torch.compile is to ask once. This is what
# torch.compiler.assume_constant_result says too, importing the whole compiler to do so.
flash_kernel._dynamo_marked_constant = flash_works._dynamo_marked_constant = True


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    half_window: int | None,
    kernel: Callable,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """Attention over a packed stream, all sequences in one call of a kernel.

    Args:
        q, k, v: (H, N, D), bfloat16 or float16.
        cu_seqlens: (S + 1,) integers from 0 to N.
        max_seqlen: length of the longest sequence.
        half_window: W, or None for a global layer.
        kernel: from ``flash_kernel``.
        dropout: probability of dropping a weight.

    Returns:
        The mixed values (H, N, D), and None for the weights.
    """
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # 3 × (N, H, D)
    ends = (cu_seqlens.int(),) * 2 + (max_seqlen,) * 2  # of queries, and of keys
    reach = -1 if half_window is None else half_window  # to each side; −1 is without end
    options = {"dropout_p": dropout} if dropout else {}
    return kernel(q, k, v, *ends, window_size=(reach, reach), **options).transpose(0, 1), None
