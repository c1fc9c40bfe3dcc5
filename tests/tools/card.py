"""A GPU on paper: tensors that say they lie on one, and the errors that real ones would give.

While a `Card` is active, torch reports a GPU of its compute capability (Colab's T4 by default).
What is made on "cuda" or moved there is computed by the CPU, but remembered as the card's. So a
chapter or a function goes the way it would go on that GPU, and fails where it would fail there:
where a tensor of the card meets one of the CPU, and where bfloat16 is put on a card that has
none. It measures nothing.
"""

import contextlib
import re
import time
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# What may take tensors of both sides: it copies, or reads places from small tensors of the CPU.
BOTH_SIDES = {"copy_", "__set__", "__setitem__", "__getitem__"}


class Event:
    """Stands for `torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self, stream: object = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * max(end.at - self.at, 1e-6)

    def synchronize(self) -> None:
        pass


class Card(TorchFunctionMode):
    """A machine with one GPU (`with Card(): …`)."""

    def __init__(self, capability: tuple[int, int] = (7, 5), name: str = "Tesla T4"):
        super().__init__()
        self.capability, self.name = capability, name
        self.here: dict[int, StorageWeakRef] = {}  # memory that is the card's

    def __enter__(self) -> "Card":
        said = {
            "is_available": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_capability": self.capability,
            "get_device_name": self.name,
            "is_bf16_supported": True,  # emulation counts there
            "memory_allocated": 0,
            "max_memory_allocated": 1 << 20,
            "synchronize": None,
            "empty_cache": None,
            "reset_peak_memory_stats": None,
            "manual_seed_all": None,
        }
        self.patches = contextlib.ExitStack()
        for function, answer in said.items():
            self.patches.enter_context(mock.patch.object(torch.cuda, function, return_value=answer))
        self.patches.enter_context(mock.patch.object(torch.cuda, "Event", Event))
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.patches.close()

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is the card's."""
        found = self.here.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def put(self, tensor: torch.Tensor) -> None:
        """Say that a tensor is the card's."""
        if tensor.dtype == torch.bfloat16 and self.capability < (8, 0):
            raise RuntimeError(f"bfloat16 on a {self.name}, which has none")
        storage = tensor.untyped_storage()
        self.here[storage._cdata] = StorageWeakRef(storage)

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        name = getattr(function, "__name__", "")
        if function is torch.device or name == "_parse_to":  # names, and nothing that lies there
            return function(*arguments, **options)
        given = [x for x in tree_iter((arguments, options)) if isinstance(x, torch.Tensor)]
        if name == "__get__":
            return self._read(function, given[0], arguments, options)
        if name in ("numpy", "__array__") and self.has(given[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        target = CPU if name == "cpu" else CUDA if name == "cuda" else _target(arguments, options)
        if target is None:
            here = self._side(name, given)
            result = function(*arguments, **options)
        else:
            here = target.type == "cuda"
            arguments, options = tree_map(_at_home, (arguments, options))
            function = torch.Tensor.cpu if name == "cuda" else function
            result = function(*arguments, **options)
            if given and self.has(given[0]) != here and _same_memory(result, given[0]):
                result = result.clone()
        if here:
            for tensor in tree_iter(result):
                if isinstance(tensor, torch.Tensor):
                    self.put(tensor)
        return result

    def _read(self, getter, tensor: torch.Tensor, arguments: tuple, options: dict):
        """An attribute of a tensor, such as its device or its gradient."""
        answers = {"device": CUDA, "is_cuda": True, "is_cpu": False}
        attribute = getattr(getter.__self__, "__name__", "")
        here = self.has(tensor)
        if here and attribute in answers:
            return answers[attribute]
        result = getter(*arguments, **options)
        if here and isinstance(result, torch.Tensor):
            self.put(result)
        return result

    def _side(self, name: str, given: list[torch.Tensor]) -> bool:
        """Whether a result is the card's; an error where the sides are mixed."""
        if name in BOTH_SIDES or re.match("_[^_]", name):  # or a question of torch's own
            return bool(given) and self.has(given[0])
        # A single number may come from anywhere, and so may what autograd hands on.
        sides = {self.has(x) for x in given if x.dim()} or {self.has(x) for x in given}
        if len(sides) == 2 and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, "
                "but found at least two devices, cuda:0 and cpu!"
            )
        return True in sides


def _target(arguments: tuple, options: dict) -> torch.device | None:
    """The device that a call names."""
    for value in (*arguments, *options.values()):
        if isinstance(value, torch.device):
            return value
        if isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda"):
            return torch.device(value)
    return None


def _at_home(value: object) -> object:
    """An argument with the card's name taken for the CPU's."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


def _same_memory(one: object, other: torch.Tensor) -> bool:
    return isinstance(one, torch.Tensor) and one.data_ptr() == other.data_ptr()
