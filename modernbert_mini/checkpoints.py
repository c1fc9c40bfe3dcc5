"""Checkpoints: a folder's or the Hub's files in, a model out, and back again.

A checkpoint is ``config.json`` beside weights: ``model.safetensors``, or shards of it listed in an
index, or an older ``pytorch_model.bin``. Nothing read here runs code, and every fault of a file is
a ``CheckpointError`` that names the file and the remedy. Chapter 11 builds this module.
Sources: the safetensors format, https://github.com/huggingface/safetensors#format, and the files
of answerdotai/ModernBERT-base.
"""

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .atomic import CONFIG, INDEX, WEIGHTS, replacing
from .config import ConfigError, ModernBertConfig
from .sources import DOWNLOAD_AGAIN, CheckpointError, Source, few

# The first of these that a checkpoint has is read.
WEIGHT_FILES = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")

# First part of a stored name -> how the name begins in a model with a head.
NAME_MAP = {
    "model": "model",
    "head": "head",
    "decoder": "decoder",
    "classifier": "classifier",
    # Exports of the bare encoder drop the prefix.
    "embeddings": "model.embeddings",
    "layers": "model.layers",
    "final_norm": "model.final_norm",
}
EMBEDDING = "model.embeddings.tok_embeddings.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_HEADER = 100_000_000  # bytes; safetensors refuses more as well


# --- Reading weights --------------------------------------------------------------------------


def read_header(path: Path | str) -> tuple[dict[str, dict[str, Any]], int]:
    """Read the header of a safetensors file, and nothing after it.

    Returns:
        For each tensor its "dtype", "shape" and "data_offsets" (first byte and the one after the
        last, counted from the start of the data), the key "__metadata__" if the file has it;
        and the byte of the file at which the data starts.

    Raises:
        CheckpointError: where the file is truncated or is not safetensors. Chapter 11.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise CheckpointError(
                path,
                f"{size:,} bytes that announce a header of {length:,}",
                "a safetensors file: 8 bytes of header length, the header, the tensors",
                f"It is cut short, or another kind of file. {DOWNLOAD_AGAIN}",
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=unique_keys)
        ends = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
        promised = max(ends, default=0)
        whole = promised == size - 8 - length
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        found = f"a header that does not parse ({error})"
        raise CheckpointError(path, found, "a JSON header", DOWNLOAD_AGAIN) from error
    if not whole:
        raise CheckpointError(
            path,
            f"{size - 8 - length:,} bytes of tensors",
            f"the {promised:,} that its header lists",
            f"It is cut short, or was changed. {DOWNLOAD_AGAIN}",
        )
    return header, 8 + length


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of JSON pairs; a name that comes twice is a ValueError."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return result


def open_weights(path: Path) -> dict[str, torch.Tensor]:
    """Map a file's tensors into memory by name; their bytes are read when they are used.

    Raises:
        CheckpointError: where the file is broken, or wants to run code.
    """
    if path.suffix == ".safetensors":
        import safetensors.torch

        read_header(path)  # says more clearly than the library what is wrong
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:
            raise CheckpointError(
                path, f"no usable tensors ({error})", "a safetensors file", DOWNLOAD_AGAIN
            ) from error
    return open_pickle(path)


def open_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Map the tensors of a ``pytorch_model.bin``. What is no tensor is refused, never run.

    Raises:
        CheckpointError: where the file is broken, or holds anything but tensors by name.
    """
    expected = "tensors by name, saved with torch.save"
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        found = f"a pickle that calls {name[1]}" if name else "a pickle that does not parse"
        remedy = "It could run any code, so it was not loaded. Ask for a safetensors file."
        raise CheckpointError(path, found, expected, remedy) from error
    except Exception as error:
        found = f"no archive of tensors ({str(error).splitlines()[0]})"
        raise CheckpointError(path, found, expected, DOWNLOAD_AGAIN) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        kind = type(tensors).__name__
        remedy = "Save the model's state_dict() alone."
        raise CheckpointError(path, f"a {kind} that holds other things", expected, remedy)
    return tensors


def weight_files(source: Source) -> dict[Path, set[str] | None]:
    """Find a checkpoint's weights: each file, with the names that the index wants in it.

    Raises:
        CheckpointError: where there are none, and where the index is no good.
    """
    path = source.require(*WEIGHT_FILES)
    if path.suffix != ".json":
        return {path: None}
    suffix = Path(path.name.removesuffix(".index.json")).suffix
    try:
        weight_map = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)["weight_map"]
        shards: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            shards.setdefault(shard, set()).add(name)
        if not shards:
            raise ValueError("it lists nothing")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        found = f"no index ({error})"
        raise CheckpointError(path, found, "JSON with a weight_map", DOWNLOAD_AGAIN) from error
    for shard in shards:
        # The index is input: it must not lead out of the checkpoint's folder.
        if not re.fullmatch(rf"\w[\w.-]*\{suffix}", str(shard)):
            raise CheckpointError(
                path,
                f"a shard named {shard!r}",
                f"names of files beside it, ending in {suffix}",
                "Do not trust this checkpoint.",
            )
    files = {}
    for shard, names in shards.items():
        file = source.find(shard)
        if file is None:
            expected = f"all {len(shards)} shards beside their index"
            raise CheckpointError(path, f"no {shard}", expected, "Download the missing file.")
        files[file] = names
    return files


# --- From stored names to parameters ----------------------------------------------------------


def full_name(name: str) -> str | None:
    """Return a tensor's name as a model with a head has it; None if no such model has it."""
    first, dot, rest = name.partition(".")
    return NAME_MAP[first] + dot + rest if first in NAME_MAP else None


def match_names(
    wanted: Iterable[str], stored: Iterable[str]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Pair a model's parameter names with the names in a checkpoint.

    Returns:
        parameter -> stored name; parameters without one; stored names without a parameter.

    Raises:
        ValueError: where two stored names mean the same parameter. Chapter 11.
    """
    parameters = {full_name(name): name for name in wanted}
    found: dict[str, str] = {}
    unused = []
    for name in stored:
        parameter = parameters.get(full_name(name))
        if parameter is None:
            unused.append(name)
        elif parameter in found:
            raise ValueError(f"both {found[parameter]} and {name}")
        else:
            found[parameter] = name
    return found, [name for name in parameters.values() if name not in found], unused


class Weights:
    """The tensors of a checkpoint by name, mapped from their files and not yet read.

    Raises:
        CheckpointError: where a file is broken, or files contradict each other.
    """

    def __init__(self, files: dict[Path, set[str] | None]):
        self.files: dict[str, Path] = {}
        self.mapped: dict[str, torch.Tensor] = {}
        for path, names in files.items():
            tensors = open_weights(path)
            if wrong := set(tensors) ^ (set(tensors) if names is None else names):
                raise CheckpointError(
                    path,
                    f"a disagreement with its index over {few(sorted(wrong))}",
                    "each tensor in the shard that the index names",
                    "Download all shards and the index again, from one revision.",
                )
            self.mapped |= tensors
            self.files |= dict.fromkeys(tensors, path)
        self.where = next(iter(files)).parent if len(files) > 1 else next(iter(files))

    def check(self, name: str, shape: torch.Size) -> None:
        """Refuse a tensor that cannot be a parameter of this shape, before its bytes are read.

        Raises:
            CheckpointError: for a wrong shape or dtype.
        """
        tensor = self.mapped[name]
        if tensor.shape != shape:
            raise CheckpointError(
                self.files[name],
                f"{name} of shape {tuple(tensor.shape)}",
                f"{tuple(shape)}, as the config says",
                "Take config.json and weights from one checkpoint, and the class that saved it; "
                "a new classifier needs num_labels=… .",
            )
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                self.files[name],
                f"{name} as {kind}",
                "a dense floating-point tensor of 16, 32 or 64 bits",
                "Quantised checkpoints cannot be loaded; take the original.",
            )

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors are the same in dtype, shape and every value."""
        a, b = self.mapped[name], self.mapped[other]
        return a.dtype == b.dtype and torch.equal(a, b)

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a tensor's finished value; without a conversion it stays mapped to the file.

        Raises:
            CheckpointError: where it holds NaN or infinity.
        """
        tensor = self.mapped.pop(name).detach().contiguous()
        if (tensor.dtype, tensor.device) != (dtype, device):
            # A mapping of its own, dropped after the copy: memory holds one original at a time.
            tensor = open_weights(self.files[name])[name].detach()
        # Both ends of the range pass NaN on, and need no copy of the tensor.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise CheckpointError(
                self.files[name],
                f"NaN or infinity in {name}",
                "finite numbers",
                "The training run that saved it broke down; take an earlier checkpoint.",
            )
        return tensor.to(device=device, dtype=dtype).contiguous()


def pair_weights(
    model: "PretrainedModel", weights: Weights, new_task: bool
) -> tuple[dict[str, str], list[str], list[str]]:
    """Pair parameters with checked tensors; say which parts of heads are new or not used.

    A tied decoder has no parameter of its own: stored all the same, it must equal the embedding.
    For a new task, a classifier of another shape counts as absent.

    Raises:
        CheckpointError: where the checkpoint is not one of this model.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    try:
        found, missing, unused = match_names(shapes, weights.mapped)
    except ValueError as error:
        remedy = "Take the checkpoint from its first source."
        raise CheckpointError(weights.where, str(error), "one of them", remedy) from error
    if "decoder.weight" in unused and hasattr(model, "decoder"):
        unused.remove("decoder.weight")
        if EMBEDDING in missing:
            missing.remove(EMBEDDING)
            found[EMBEDDING] = "decoder.weight"
        elif not weights.equal(found[EMBEDDING], "decoder.weight"):
            raise CheckpointError(
                weights.files["decoder.weight"],
                "a decoder.weight that differs from the embedding",
                "equal ones, since the config ties them",
                "Pass tie_word_embeddings=False to keep both.",
            )
    for name, stored in list(found.items()):
        other_shape = weights.mapped[stored].shape != shapes[name]
        if other_shape and new_task and name.startswith("classifier."):
            missing.append(name)
            unused.append(found.pop(name))
        else:
            weights.check(stored, shapes[name])
    heads = ("head.", "decoder.", "classifier.")
    if lost := [name for name in missing if not name.startswith(heads)]:
        raise CheckpointError(
            weights.where,
            f"no tensor for {few(lost)}",
            f"all {len(shapes)} tensors of a {type(model).__name__} of this config",
            "Take config.json and weights from one checkpoint.",
        )
    if foreign := [name for name in unused if not name.startswith(heads)]:
        raise CheckpointError(
            weights.where,
            f"{few(foreign)}, which no part of this model takes",
            "the tensors of a ModernBERT model of this config",
            "Take config.json and weights from one checkpoint.",
        )
    return found, missing, unused


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Read a dtype by name; None and "auto" mean: as stored.

    Raises:
        ConfigError: for anything but a floating-point dtype of 16, 32 or 64 bits.
    """
    chosen = None if dtype == "auto" else dtype
    chosen = getattr(torch, chosen, chosen) if isinstance(chosen, str) else chosen
    if chosen is not None and chosen not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ConfigError(f"dtype {dtype!r}", f"one of {names}", "Leave it out for the stored one.")
    return chosen


class PretrainedModel(nn.Module):
    """What all models share: loading from a checkpoint and saving as one.

    Args:
        config: its sizes.
    """

    base_model_prefix = "model"

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config = config

    def tie_weights(self) -> None:
        """Share the parameters that the config ties; a model without a decoder has none."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        attn_implementation: str = "auto",
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **config_overrides: Any,
    ) -> Self:
        """Load a model in evaluation mode.

        A head that the checkpoint lacks is newly initialised, and one warning names its tensors
        and those of another task's head that are left out.

        Args:
            name_or_path: "mini" (the embedded checkpoint), a folder, or a Hub id.
            revision: branch, tag or commit of a Hub repository.
            attn_implementation: as the model class takes it.
            dtype: of the parameters; by default as stored.
            device: to load to; by default the CPU, where the weights stay mapped to the file.
            config_overrides: fields of the config to change, such as ``num_labels=3``.

        Raises:
            CheckpointError: where the checkpoint cannot be had or is not sound.
            ConfigError: where the config or an override is impossible. Chapter 11.
        """
        dtype, device = resolve_dtype(dtype), torch.device(device or "cpu")
        source = Source(name_or_path, revision)
        config = ModernBertConfig.from_file(source.require(CONFIG))
        config = config.with_overrides(**config_overrides)
        with torch.device("meta"), SkipInit():  # shapes without memory or starting values
            model = cls(config, attn_implementation=attn_implementation)
        weights = Weights(weight_files(source))
        new_task = bool({"num_labels", "id2label"} & set(config_overrides))
        new_task |= config.extra.get("architectures") not in (None, [cls.__name__])
        found, missing, unused = pair_weights(model, weights, new_task)
        # One dtype for all, even where a file mixes them: that of the largest tensor.
        dtype = dtype or max(map(weights.mapped.get, found.values()), key=torch.numel).dtype
        state = {name: weights.read(stored, dtype, device) for name, stored in found.items()}
        fill(model, state, missing, dtype, device)
        if missing or (unused and hasattr(model, cls.base_model_prefix)):
            new = f" Newly initialised, to be trained: {', '.join(missing)}." if missing else ""
            left = f" Not used: {', '.join(unused)}." if unused else ""
            warnings.warn(f"{name_or_path} as {cls.__name__}:{new}{left}", stacklevel=2)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike, max_shard_size: int | str = "5GB") -> None:
        """Save config and weights, in the form that ``transformers`` reads.

        Other files of the folder stay. A process killed at any moment leaves the old checkpoint or
        the new one; ``replacing`` says what that rests on.

        Args:
            folder: made if need be.
            max_shard_size: bytes in one file at most, or text like "5GB"; larger models are split.

        Raises:
            CheckpointError: where ``folder`` is a file.
            ValueError: for a size that cannot be read. Chapter 11.
        """
        limit = parse_size(max_shard_size)
        if os.path.isfile(os.path.expanduser(folder)):
            raise CheckpointError(folder, "a file", "a folder to save into", "Choose another name.")
        # A tied decoder is the same parameter as the embedding, so it is listed once.
        tensors = {name: parameter.detach() for name, parameter in self.named_parameters()}
        dtype = next(iter(tensors.values())).dtype
        config = self.config.to_dict()
        config.pop("torch_dtype", None)  # the older name of dtype
        config |= {"architectures": [type(self).__name__]}
        config |= {"dtype": str(dtype).removeprefix("torch.")}
        with replacing(folder) as staging:
            write_json(staging / CONFIG, config)
            write_weights(staging, tensors, limit)


class SkipInit(TorchFunctionMode):
    """Leave out torch's own starting values while modules are built.

    A checkpoint replaces them anyway, and drawing even meta tensors imports torch's compiler,
    which takes seconds.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def fill(
    model: PretrainedModel,
    state: dict[str, torch.Tensor],
    missing: Iterable[str],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Put tensors in the place of a meta model's parameters, and initialise the missing ones."""
    for name in missing:
        owner, _, leaf = name.rpartition(".")
        shape = model.get_parameter(name).shape
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        setattr(model.get_submodule(owner), leaf, parameter)
    if missing:
        model.init_weights()  # draws only what is real: on the meta device it does nothing
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()


# --- Writing ----------------------------------------------------------------------------------


def parse_size(size: int | str) -> int:
    """Read a number of bytes, such as 1000 or "5GB".

    Raises:
        ValueError: where it is none.
    """
    match = re.fullmatch(r"([0-9]+) ?([KMG]?)B?", str(size).upper())
    if not match or not int(match[1]):
        raise ValueError(f"a size like 5000000 or '5GB' is expected, not {size!r}")
    return int(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write indented JSON with a newline at its end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], limit: int) -> None:
    """Write ``model.safetensors``, or shards of at most ``limit`` bytes and their index."""
    from safetensors.torch import save_file

    shards: list[dict[str, torch.Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    n = len(shards)
    files = [WEIGHTS] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    for file, shard in zip(files, shards, strict=True):
        contiguous = {name: tensor.contiguous() for name, tensor in shard.items()}
        save_file(contiguous, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG, folder / file)  # safetensors makes it the owner's alone
    if n > 1:
        pairs = zip(files, shards, strict=True)
        weight_map = {name: file for file, shard in pairs for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
