"""A GPU on paper: it runs a Triton kernel program by program, with PyTorch for the arithmetic.

The exercises of chapter 9 run on it, and its kernels where Triton is missing. It knows that part
of Triton's language which a kernel of attention needs, it is slow, and it forgives nothing: what
a real GPU would do in silence (read beyond a tensor, write a number twice in any order) ends here
with a sentence.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from types import FunctionType, SimpleNamespace

import torch

NOBODY, SEVERAL = -1, -2  # beside the numbers of programs
SAME_IN_TORCH = ["abs", "cos", "erf", "exp", "exp2", "log", "log2", "sin", "sqrt", "where"]
SAME_IN_TORCH += ["bfloat16", "float16", "float32", "int32", "int64"]


class PaperError(Exception):
    """What a kernel did that a GPU would not forgive, or would not tell."""


class Pointer:
    """A place in the memory of a tensor, or many places: an offset of any shape."""

    def __init__(self, memory: SimpleNamespace, offset: torch.Tensor):
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.numbers.dtype)

    def __add__(self, places: int | torch.Tensor) -> "Pointer":
        return Pointer(self.memory, self.offset + places)

    __radd__ = __add__


def arange(start: int, stop: int) -> torch.Tensor:
    """The whole numbers from ``start`` to ``stop``; Triton wants a power of two of them."""
    count = stop - start
    if count < 1 or count & (count - 1):
        raise PaperError(f"tl.arange of {count} numbers: is that a power of two?")
    return torch.arange(start, stop)


def dot(a: torch.Tensor, b: torch.Tensor, acc=None, **_) -> torch.Tensor:
    """Matrix product of two tiles, summed in float32."""
    sizes = (*a.shape, b.shape[-1])
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise PaperError(f"tl.dot of {tuple(a.shape)} and {tuple(b.shape)}: do the sides meet?")
    if min(sizes) < 16:
        raise PaperError(f"tl.dot of {tuple(a.shape)} and {tuple(b.shape)}: no side below 16")
    if a.dtype != b.dtype:
        raise PaperError(f"tl.dot of {a.dtype} and {b.dtype}: which one is to be cast?")
    product = a.float() @ b.float()
    return product if acc is None else acc + product


class PaperGPU:
    """Runs kernels, and counts what they load and store.

    Attributes:
        language: what stands for ``triton.language`` inside a kernel.
        loaded, stored: bytes that went in and out, by the name of the argument.
        trace: for each load, the program, the name of the argument and the places that it read.
    """

    def __init__(self):
        def extreme(choose):
            return lambda a, b: choose(torch.as_tensor(a), torch.as_tensor(b))

        self.language = SimpleNamespace(
            program_id=lambda axis: torch.tensor(self.program[axis]),
            num_programs=lambda axis: torch.tensor(self.grid[axis]),
            load=self.load,
            store=self.store,
            arange=arange,
            dot=dot,
            trans=lambda x: x.mT,
            zeros=lambda shape, dtype: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            maximum=extreme(torch.maximum),
            minimum=extreme(torch.minimum),
            cdiv=lambda a, b: -(-a // b),
            range=range,
            static_range=range,
            constexpr=None,
            **{name: getattr(torch, name) for name in SAME_IN_TORCH},
        )
        self.loaded, self.stored, self.trace = Counter(), Counter(), []

    def run(self, kernel: Callable, grid: tuple[int, ...], *arguments, **sizes) -> "PaperGPU":
        """Run a kernel once for each program of the grid, one after the other.

        Args:
            kernel: a function written for Triton; ``triton.jit`` around it does not matter.
            grid: how many programs there are along each axis; or a function of ``sizes``.
            arguments: tensors and numbers; a tensor becomes a pointer to its first number.
            sizes: the rest, by name.

        Raises:
            PaperError: where the kernel leaves the memory of a tensor, or programs get in each
                other's way.
        """
        function = self.on_paper(kernel)
        names, memories = function.__code__.co_varnames, {}
        pointers = [
            self._pointer(name, each, memories) if isinstance(each, torch.Tensor) else each
            for name, each in zip(names, arguments, strict=False)
        ]
        self.grid = (*map(int, grid(sizes) if callable(grid) else grid), 1, 1)[:3]
        for program in product(*map(range, self.grid)):
            self.program = program
            function(*pointers, *arguments[len(pointers) :], **sizes)
        return self

    def on_paper(self, kernel: Callable) -> FunctionType:
        """The kernel, and the functions that it calls, with this machine in place of Triton."""
        function = plain(kernel)
        names = dict(function.__globals__)
        for name, value in function.__globals__.items():
            other = plain(value)
            if isinstance(other, FunctionType) and other.__globals__ is function.__globals__:
                names[name] = _in(names, other)
        names["tl"] = self.language
        return _in(names, function)

    def _pointer(self, name: str, tensor: torch.Tensor, memories: dict) -> Pointer:
        storage = tensor.detach().untyped_storage()
        numbers = torch.empty(0, dtype=tensor.dtype).set_(storage)
        # Two arguments may be views of one tensor, as q, k and v are: who touched what is common.
        new = torch.full((2, len(numbers)), NOBODY)
        readers, writers = memories.setdefault(storage.data_ptr(), new)
        memory = SimpleNamespace(name=name, numbers=numbers, readers=readers, writers=writers)
        return Pointer(memory, torch.tensor(tensor.storage_offset()))

    def load(self, pointer: Pointer, mask=None, other=None) -> torch.Tensor:
        """Read numbers; where the mask is false, ``other``, and without that anything at all."""
        memory, places, mask = self._places("tl.load", pointer, mask)
        read = memory.numbers[places.where(mask, 0)]
        places = places[mask]
        self._alone(memory.writers[places], "reads", memory.name, "writes")
        before = memory.readers[places]
        mine = (before == NOBODY) | (before == self._number())
        memory.readers[places] = torch.where(mine, self._number(), SEVERAL)
        self.loaded[memory.name] += read.element_size() * len(places)
        self.trace.append((self.program, memory.name, places))
        if other is None:
            # Triton promises nothing about these numbers; a NaN makes sure that it is noticed.
            other = torch.nan if read.is_floating_point() else -(2**30)
        return read.where(mask, other)

    def store(self, pointer: Pointer, value, mask=None) -> None:
        """Write numbers where the mask is true."""
        memory, places, mask = self._places("tl.store", pointer, mask)
        value = torch.as_tensor(value).to(memory.numbers.dtype).expand(places.shape)
        places = places[mask]
        self._alone(memory.writers[places], "writes", memory.name, "writes, too")
        self._alone(memory.readers[places], "writes", memory.name, "reads")
        memory.numbers[places] = value[mask]
        memory.writers[places] = self._number()
        self.stored[memory.name] += memory.numbers.element_size() * len(places)

    def _places(self, what, pointer, mask):
        if not isinstance(pointer, Pointer):
            raise PaperError(f"{what} wants a pointer: a tensor's argument plus the places in it")
        mask = torch.tensor(True) if mask is None else torch.as_tensor(mask)
        places, mask = torch.broadcast_tensors(pointer.offset, mask)
        size = len(pointer.memory.numbers)
        beyond = places[mask & ((places < 0) | (places >= size))]
        if len(beyond):
            raise PaperError(
                f"{what} in program {self.program} goes to number {int(beyond[0])} of "
                f"`{pointer.memory.name}`, which has {size}: what should its mask leave out?"
            )
        return pointer.memory, places, mask

    def _number(self) -> int:
        (x, y, z), (_, b, c) = self.program, self.grid
        return (x * b + y) * c + z

    def _alone(self, others: torch.Tensor, does: str, name: str, do: str) -> None:
        if ((others != NOBODY) & (others != self._number())).any():
            raise PaperError(
                f"program {self.program} {does} a number of `{name}` that another one {do}: "
                "which of them comes first on a GPU? Nobody knows."
            )


class PaperKernel:
    """A kernel that is launched as Triton launches one, ``kernel[grid](...)``, and runs on paper.

    Attributes:
        fn: what was written.
        sizes: those that tuning would choose, such as ``OWN`` and ``OTHER``.
        gpu: the machine of the last launch, with what it counted.
    """

    def __init__(self, fn: Callable, sizes: dict[str, int] | None = None):
        self.fn, self.sizes, self.gpu = plain(fn), sizes or {}, None

    def __getitem__(self, grid: tuple | Callable) -> Callable:
        return partial(self._launch, grid)

    def _launch(self, grid, *arguments, **sizes) -> None:
        compiling = ("num_warps", "num_stages", "enable_fp_fusion")  # no matter here
        sizes = {name: size for name, size in sizes.items() if name not in compiling}
        self.gpu = PaperGPU()
        self.gpu.run(self.fn, grid, *arguments, **self.sizes, **sizes)


def stand_in() -> tuple[SimpleNamespace, SimpleNamespace]:
    """What stands for the modules ``triton`` and ``triton.language`` where Triton is missing."""

    def autotune(configs, **_):
        return lambda kernel: PaperKernel(kernel.fn, configs[0].kwargs)

    triton = SimpleNamespace(
        __version__="on paper",
        jit=lambda fn, **_: PaperKernel(fn),
        autotune=autotune,
        Config=lambda sizes, **_: SimpleNamespace(kwargs=sizes),
        JITFunction=type("Compiled", (), {}),  # no kernel is one: nothing is compiled
        cdiv=lambda a, b: -(-a // b),
        next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
    )
    return triton, PaperGPU().language


def plain(kernel: object) -> object:
    """What was written: without ``triton.jit``, tuning and the wrapper of a check around it."""
    while isinstance(kernel, PaperKernel) or type(kernel).__module__.startswith("triton."):
        if not hasattr(kernel, "fn"):
            break
        kernel = kernel.fn
    return plain(kernel.__wrapped__) if hasattr(kernel, "__wrapped__") else kernel


def _in(names: dict, function: FunctionType) -> FunctionType:
    code, defaults, closure = function.__code__, function.__defaults__, function.__closure__
    again = FunctionType(code, names, function.__name__, defaults, closure)
    again.__kwdefaults__ = function.__kwdefaults__
    return again
