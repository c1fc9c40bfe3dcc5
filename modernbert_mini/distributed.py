"""Training on several processes: one option between replicas (DDP) and shards (FSDP2).

Chapter 15 builds this module. Sources: Li et al., "PyTorch Distributed", arXiv:2006.15704 (DDP);
Rajbhandari et al., "ZeRO", arXiv:1910.02054 (what may be spread, and what that saves); Zhao et al.,
"PyTorch FSDP", arXiv:2304.11277.

``torchrun`` starts the processes; ``joined`` finds out that it did and gives the ``World`` that
``pretrain`` trains in. A run does not depend on how many there are, but for the order of sums, so
a checkpoint that four have written is gone on from by two, or by one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .recipe import check

SILENCE = timedelta(minutes=10)  # of another process, after which it counts as lost
PATIENCE = timedelta(days=7)  # while the first process works alone: a corpus takes its time


class LostProcessError(RuntimeError):
    """Another process of the world is gone."""


# --- who takes what -----------------------------------------------------------------------


def share_streams(tokens: Sequence[int], processes: int) -> list[list[int]]:
    """Deal the streams of a batch out: as many to each process, and nearly as many tokens.

    Every process waits for the slowest at the end of a step, so what counts is the largest share.
    The fullest streams go first, a round at a time; in a round, whoever has least so far gets the
    fullest. The numbers have to be equal because sharded weights are put together in every pass,
    and that takes all processes.

    >>> share_streams([9, 1, 8, 2], processes=2)
    [[0, 1], [2, 3]]

    Args:
        tokens: of each stream.
        processes: a divisor of their number.

    Returns:
        For each process the numbers of its streams, in order.
    """
    fullest = sorted(range(len(tokens)), key=lambda i: -tokens[i])
    shares: list[list[int]] = [[] for _ in range(processes)]
    load = [0] * processes
    for start in range(0, len(tokens), processes):
        hungry = sorted(range(processes), key=load.__getitem__)
        for rank, stream in zip(hungry, fullest[start : start + processes], strict=True):
            shares[rank].append(stream)
            load[rank] += tokens[stream]
    return [sorted(share) for share in shares]


# --- where it runs ------------------------------------------------------------------------


class World:
    """One process that trains alone, and what is different when several do.

    ``pretrain`` asks it for all that depends on other processes. Masks and dropout follow from
    the step and the stream, not from the process, so a run does not depend on how many there are,
    but for the order of sums.

    Args:
        device: "cpu", "cuda", or "auto": a GPU where there is one.

    Attributes:
        rank, size: the number of this process, from 0, and how many there are.

    Raises:
        ConfigError: for a GPU that is not there.
    """

    rank, size = 0, 1

    def __init__(self, device: str = "auto") -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        found = self.device.type != "cuda" or torch.cuda.is_available()
        check(found, f"device {device!r}", "one that torch finds here", "Use cpu or auto.")

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training; its parameters stay those of ``model``."""
        return model

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager:
        """Around each forward and backward pass; ``last`` is that of a step."""
        return nullcontext()

    def share(self, tokens: Sequence[int]) -> list[int]:
        """Which streams of a batch this process takes, by ``share_streams``."""
        return share_streams(tokens, self.size)[self.rank]

    def turns(self, batches: Iterable) -> Iterator[tuple[Any, bool]]:
        """The batches of an evaluation that this process takes, and whether each counts."""
        return ((batch, True) for batch in batches)

    def sum(self, number: float) -> float:
        """The sum of a number over all processes."""
        return number

    def number(self, tensor: Tensor) -> float:
        """The value of a tensor () that may be spread over the processes."""
        return tensor.item()

    def whole(self, tensor: Tensor) -> Tensor | None:
        """A tensor put together from the parts that the processes hold, for a checkpoint.

        All have to ask, and the first one gets it.
        """
        return tensor

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This process's part of a tensor from a checkpoint, spread as ``like`` is."""
        return tensor.to(like.device)

    def wait(self) -> None:
        """Go on when every process has come here, however long the first one takes."""

    def lost(self, error: Exception) -> str | None:
        """What to say of an error that comes from another process; None for any other error."""
        return None


def meeting_place() -> tuple[dist.Store, int, int]:
    """The store where the processes find each other, this one's number, and how many there are.

    ``torchrun`` keeps its store over a restart, with the addresses of processes that are dead. So
    each attempt gets a shelf of its own, but for runs on several machines: each of them counts its
    restarts alone. There, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and every attempt has a store
    of its own.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=SILENCE))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    return store, rank, size


class Group(World):
    """One of several processes that train together; the two below say how.

    Collectives on CPU tensors go through gloo, those of a GPU through NCCL.

    Raises:
        ConfigError: for more processes on a machine than it has GPUs.
    """

    def __init__(self, device: str = "auto") -> None:
        super().__init__(device)
        backend = "gloo"
        if self.device.type == "cuda":
            place, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            found = f"process {place} of this machine"
            remedy = "Start as many processes as it has GPUs (--nproc-per-node)."
            check(place < cards, found, f"at most {cards - 1}, one for each GPU", remedy)
            self.device = torch.device("cuda", place)
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        store, self.rank, self.size = meeting_place()
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.size, timeout=SILENCE
        )
        self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    def turns(self, batches: Iterable) -> Iterator[tuple[Any, bool]]:
        """Every ``size``-th batch, in as many turns for each process.

        Where the batches do not come out even, the last one is gone through again, uncounted.
        """
        batches = list(batches)
        for i in range(self.rank, self.size * math.ceil(len(batches) / self.size), self.size):
            yield batches[min(i, len(batches) - 1)], i < len(batches)

    def sum(self, number: float) -> float:
        """The sum in float64, in an order that is the same in every process."""
        total = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(total)
        return type(number)(total.item())

    def wait(self) -> None:
        try:
            dist.barrier(self.patient)
        except RuntimeError as error:
            raise LostProcessError(self.lost(error) or str(error)) from error

    def lost(self, error: Exception) -> str | None:
        """Gloo has no error of its own: it names its source file in the message."""
        if isinstance(error, LostProcessError):
            return str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            return None
        cause = re.sub(r"^\[\S+\] |\. This is .*", "", str(error), flags=re.DOTALL)
        return f"Process {self.rank} of {self.size} has lost another one: {cause}."


class Replicated(Group):
    """Distributed data parallel: every process holds everything, and gradients are averaged.

    ``DistributedDataParallel`` starts to exchange the gradients of the last layers while those of
    the first are still being computed. Passes before the last of a step add to gradients at home.

    Source: Li et al., arXiv:2006.15704. Chapter 15.
    """

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        on = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=on, gradient_as_bucket_view=True)

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager:
        return nullcontext() if last else module.no_sync()


class Sharded(Group):
    """FSDP2: each process holds a slice of every parameter, gradient and moment (ZeRO stage 3).

    A layer's weights are put together just before it runs, forward and backward, and given up
    after it. Gradients are summed and sliced in every pass, not in the last of a step alone: kept
    whole in between, they would take the memory that slicing saves.

    Source: Zhao et al., arXiv:2304.11277; torch.distributed.fsdp.fully_shard. Chapter 15.
    """

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        # Embedding, final norm and head go together, since the decoder is the embedding. By default
        # they would stay whole after an evaluation, and the optimiser would not find its slices.
        return fully_shard(model, mesh=mesh, reshard_after_forward=True)

    def number(self, tensor: Tensor) -> float:
        return tensor.full_tensor().item()

    def whole(self, tensor: Tensor) -> Tensor | None:
        """On the CPU, one tensor after the other, so that no GPU holds all of them."""
        tensor = tensor.full_tensor()
        return None if self.rank else tensor.cpu()

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Each process has read the file, so each cuts its own slice out."""
        from torch.distributed.tensor import distribute_tensor

        tensor = tensor.to(like.device)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


PARALLEL = {"ddp": Replicated, "fsdp2": Sharded}


@contextmanager
def joined(device: str = "auto", parallel: str = "ddp") -> Iterator[World]:
    """The world that this process trains in: that of ``torchrun``, or itself alone.

    Args:
        device: as ``World`` takes it.
        parallel: "ddp" or "fsdp2"; one process needs neither.

    Raises:
        ConfigError: for a device that is not there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(device)
        return
    yield PARALLEL[parallel](device)
    # Only at a good end: after an error the others may never come here.
    dist.destroy_process_group()


# --- what it costs ------------------------------------------------------------------------

# Bytes for each parameter where weights are float32 and products run under autocast.
STATE_BYTES = {"weights": 4, "gradients": 4, "moments": 8}
# What each stage of ZeRO spreads over the processes.
SPREAD = {
    0: (),
    1: ("moments",),
    2: ("moments", "gradients"),
    3: ("moments", "gradients", "weights"),
}


def state_bytes(parameters: int, processes: int = 1, stage: int = 0) -> int:
    """Bytes that a process holds for weights, gradients and the two moments of Adam.

    Stage 0 is DDP, 3 is FSDP. Activations and what is put together for a layer come on top.

    Source: Rajbhandari et al., arXiv:1910.02054, section 3 and figure 1. Its 2 + 2 + 12 bytes are
    for float16 weights and gradients beside a float32 copy; here they are 4 + 4 + 8. Chapter 15.
    """
    part = math.ceil(parameters / processes)
    held = {name: part if name in SPREAD[stage] else parameters for name in STATE_BYTES}
    return sum(STATE_BYTES[name] * held[name] for name in STATE_BYTES)


def model_flops_utilisation(
    flops: float, seconds: float, processors: int, peak_per_second: float
) -> float:
    """MFU: the operations that a model needs, as a share of what its processors could have done.

    Operations that are done for other reasons, such as recomputation or padding, do not count.

    Args:
        flops: needed over the whole run, forward and backward; see ``benchmark.count_flops``.
        seconds: on the clock.
        processors: how many work side by side.
        peak_per_second: of one, in the precision that is used, without sparsity.

    Source: Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B. Chapter 15.
    """
    return flops / (seconds * processors * peak_per_second)
