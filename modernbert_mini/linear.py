"""A linear layer that goes through whichever library of the processor is faster.

Chapter 14 builds this module. On a processor, PyTorch multiplies matrices by Intel's MKL and
convolves by oneDNN. A convolution whose kernel is 1 × 1 is a linear layer, so the same product can
go either way. Source: Lin et al., "Network In Network", arXiv:1312.4400, section 3.1.
"""

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ENOUGH = 1024  # tokens; with fewer, preparing the convolution takes what it gains


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``F.linear`` as a 1 × 1 convolution: tokens are the pixels of an image, I its channels.

    Args:
        x: (..., I). Channels lie last in memory, where oneDNN wants them, so nothing is copied.
        weight: (O, I).
        bias: (O,) or None.

    Returns:
        (..., O), up to rounding what ``F.linear`` gives.
    """
    image = x.reshape(1, -1, 1, x.shape[-1]).movedim(-1, 1)  # (1, I, tokens, 1)
    out = F.conv2d(image, weight[:, :, None, None], bias)  # (1, O, tokens, 1)
    return out.movedim(1, -1).reshape(*x.shape[:-1], -1)


@cache
def made_by_amd() -> bool:
    """Whether the processor is AMD's: there oneDNN's threads lose less time than MKL's do."""
    told = platform.processor()
    with suppress(OSError):  # only Linux has this file, and there the line above says little
        told = Path("/proc/cpuinfo").read_text("utf-8")
    return "AuthenticAMD" in told


def convolution_pays(x: torch.Tensor) -> bool:
    """Whether ``convolve`` is to be expected faster than ``F.linear`` for tokens (..., I)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    much = x.numel() >= ENOUGH * x.shape[-1] and torch.get_num_threads() > 1
    known = x.device.type == "cpu" and x.dtype == torch.float32
    return much and known and made_by_amd() and torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """``nn.Linear``, by oneDNN instead of MKL where that has been measured to pay."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., I) to (..., O)."""
        if convolution_pays(x):
            return convolve(x, self.weight, self.bias)
        return super().forward(x)
