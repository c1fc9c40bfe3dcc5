"""Checkpoints: a folder's or the Hub's files in, a model out, and back again.

A checkpoint is ``config.json`` beside weights: ``model.safetensors``, or shards of it listed in an
index, or an older ``pytorch_model.bin``. Nothing read here runs code, and every fault of a file is
a ``CheckpointError`` that names the file and the remedy. Chapter 11 builds this module.
Sources: the safetensors format, https://github.com/huggingface/safetensors#format, and the files
of answerdotai/ModernBERT-base.
"""

import ctypes
import json
import os
import pickle
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .config import ConfigError, ModernBertConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
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
HUB_SECONDS = 2  # to wait for the Hub's first answer, unless HF_HUB_ETAG_TIMEOUT says otherwise
LARGEST_HEADER = 100_000_000  # bytes; safetensors refuses more as well
DOWNLOAD_AGAIN = "Download the file again."


class CheckpointError(ValueError):
    """A checkpoint that cannot be had, or cannot be trusted.

    Attributes:
        file: the file, folder or Hub repository at fault.
        found: what is wrong with it.
        expected: what would be right.
        remedy: what to do.
    """

    def __init__(self, file: Path | str, found: str, expected: str, remedy: str):
        self.file, self.found, self.expected, self.remedy = str(file), found, expected, remedy
        super().__init__(self.file, found, expected, remedy)

    def __str__(self) -> str:
        return f"{self.file}: found {self.found}; expected {self.expected}. {self.remedy}"


# --- Finding the files ------------------------------------------------------------------------


class Source:
    """Where the files of one checkpoint come from: a folder, the package, or the Hub.

    Args:
        name_or_path: "mini" (the embedded checkpoint), a folder, or a Hub id like "owner/name".
        revision: branch, tag or commit of a Hub repository; by default "main".

    Raises:
        CheckpointError: for a path that is no folder.
    """

    def __init__(self, name_or_path: str | os.PathLike, revision: str | None = None):
        self.name, self.revision = str(name_or_path), revision
        self.folder = find_folder(name_or_path)

    def find(self, filename: str) -> Path | None:
        """Return where ``filename`` lies on disk, downloading it if need be; None if absent."""
        if self.folder is None:
            path = hub_file(self.name, filename, self.revision)
            if path is not None:
                # snapshots/<commit>/<file>: the other files have to be of the same commit.
                self.revision = path.parents[filename.count("/")].name
        else:
            path = self.folder / filename
            path = path if path.is_file() else None
        if path is not None:
            refuse_stand_in(path)
        return path

    def require(self, *filenames: str) -> Path:
        """Return the first of ``filenames`` that is there.

        Raises:
            CheckpointError: where none is.
        """
        for filename in filenames:
            if path := self.find(filename):
                return path
        raise CheckpointError(
            self.folder / filenames[0] if self.folder else f"{self.name}/{filenames[0]}",
            "no such file" + (self._instead() if self.folder else " in this repository"),
            " or ".join(filenames),
            "Check the name: a checkpoint holds config.json, tokenizer.json and model.safetensors.",
        )

    def _instead(self) -> str:
        """What the folder holds in place of the file that is missing."""
        if left := leftovers(self.folder):
            return f", but an interrupted save, whose new files lie in {left[0]}: move them up"
        names = sorted(entry.name for entry in self.folder.iterdir())
        return f" in a folder that holds {few(names)}" if names else " in an empty folder"


def resolve_file(
    name_or_path: str | os.PathLike, filename: str, revision: str | None = None
) -> Path:
    """Return where one file of a checkpoint lies on disk, downloading it if need be.

    Args:
        name_or_path: "mini", a folder, or a Hub id.
        filename: a name like "tokenizer.json".
        revision: branch, tag or commit of a Hub repository.

    Raises:
        CheckpointError: where it cannot be had. Chapter 11.
    """
    return Source(name_or_path, revision).require(filename)


def find_folder(name_or_path: str | os.PathLike) -> Path | None:
    """Return the folder that a name stands for; None where it is a Hub id.

    Raises:
        CheckpointError: for a file, and for a path that does not exist and is no Hub id either.
    """
    if name_or_path == "mini":
        return Path(str(resources.files(__package__) / "mini"))
    path = Path(os.path.expanduser(name_or_path))
    if path.is_dir():
        return path
    if path.exists():
        remedy = f"Pass its folder: {str(path.parent)!r}."
        raise CheckpointError(path, "a file", "the folder of a checkpoint", remedy)
    if isinstance(name_or_path, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name_or_path):
        return None
    remedy = 'Check the path, or use the embedded checkpoint "mini".'
    raise CheckpointError(path, "no such folder", "a folder, a Hub id or 'mini'", remedy)


def hub_file(repo: str, filename: str, revision: str | None = None) -> Path | None:
    """Return a Hub file's place in the local cache, downloading it if need be.

    Returns None where the repository is there but has no such file.

    Raises:
        CheckpointError: where neither the Hub nor the cache has the answer.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    try:
        cached = hub.try_to_load_from_cache(repo, filename, revision=revision)
    except errors.HFValidationError as error:
        remedy = 'Check the path, or use the embedded checkpoint "mini".'
        raise CheckpointError(repo, "no such folder", f"a folder, or: {error}", remedy) from error
    if cached is not None and re.fullmatch("[0-9a-f]{40}", revision or ""):
        return Path(cached) if isinstance(cached, str) else None  # a commit never changes
    if trouble := hub_trouble(repo, filename, revision):
        if isinstance(cached, str):
            return Path(cached)
        if cached is not None:  # known from before to be absent
            return None
        raise CheckpointError(
            f"{repo}/{filename}",
            f"the Hub out of reach ({trouble}), no copy in the cache {constants.HF_HUB_CACHE}, "
            "and no folder of this name",
            "a connection to the Hugging Face Hub, or the files on disk",
            'Use the embedded checkpoint "mini", pass the folder of a downloaded checkpoint, or '
            "connect once to fill the cache (HF_HUB_ETAG_TIMEOUT sets how many seconds to wait).",
        )
    try:
        return Path(hub.hf_hub_download(repo, filename, revision=revision))
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError) as error:
        absent = isinstance(error, errors.EntryNotFoundError)
        if absent and not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        what = {
            errors.GatedRepoError: "a repository that asks for consent first",
            errors.RepositoryNotFoundError: "no such public repository, and no folder of this name",
            errors.RevisionNotFoundError: f"no revision {revision!r}",
        }.get(type(error), str(error).splitlines()[0])
        raise CheckpointError(
            f"{repo}/{filename}",
            what,
            "a folder, 'mini', or a model that this machine may read",
            f"Check the name on {constants.ENDPOINT}; `hf auth login` opens private models.",
        ) from error


def hub_trouble(repo: str, filename: str, revision: str | None) -> str | None:
    """Ask the Hub once, quickly, for a file's header; return what went wrong, None if it answers.

    ``hf_hub_download`` alone retries for half a minute before it gives up on a first download.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    set_by_user = constants.HF_HUB_ETAG_TIMEOUT != constants.DEFAULT_ETAG_TIMEOUT
    seconds = constants.HF_HUB_ETAG_TIMEOUT if set_by_user else HUB_SECONDS
    url = hf_hub_url(repo, filename, revision=revision)
    try:
        answer = get_hf_file_metadata(url, timeout=seconds)
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        return f"it answers {status}" if status >= 500 else None
    except errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # httpx's, requests' or the system's, depending on versions
        return f"{constants.ENDPOINT}: {str(error) or type(error).__name__}"
    return None if answer.commit_hash else f"{constants.ENDPOINT} does not answer like the Hub"


def refuse_stand_in(path: Path) -> None:
    """Refuse what failed downloads leave in a file's place.

    Raises:
        CheckpointError: for a Git LFS pointer, an HTML page, an empty or unreadable file.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(256).lstrip()
    except OSError as error:
        remedy = "Check its permissions."
        raise CheckpointError(path, f"no way to read it ({error})", "a file", remedy) from error
    if start.startswith(b"version https://git-lfs.github.com"):
        found, remedy = "a Git LFS pointer", "Run `git lfs pull` in the folder that was cloned."
    elif start[:9].lower() == b"<!doctype" or start[:5].lower() == b"<html":
        found, remedy = "an HTML page", "Use the Hub's download link (/resolve/, not /blob/)."
    elif not start:
        found, remedy = "an empty file", DOWNLOAD_AGAIN
    else:
        return
    raise CheckpointError(path, found, "the file itself", remedy)


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


def few(names: list[str], most: int = 4) -> str:
    """List some names and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


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


@contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[Path]:
    """Give an empty folder for a new checkpoint, which takes the old one's place at the end.

    What makes it safe: everything is written and synced to disk beside ``folder`` first. Then one
    system call makes the change: a rename where ``folder`` is new or only the weights differ, else
    an exchange of the two folders (Linux, macOS). Where the system knows no exchange of folders,
    files move one by one while ``config.json`` is absent: a process killed in those milliseconds
    leaves a folder that does not load, and whose error message says where the files are.

    What a killed process leaves is cleared by the next save.

    Raises:
        CheckpointError: where ``folder`` is a file.
    """
    folder = Path(os.path.realpath(os.path.expanduser(folder)))
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(folder, "a file", "a folder to save into", "Choose another name.")
    staging = make_staging(folder)
    lock = try_lock(staging)
    try:
        yield staging
        for path in (*staging.iterdir(), staging):
            sync(path)
        install(staging, folder)
    except BaseException:
        if not (staging / "old").exists():  # else ``move_files`` was stopped half-way
            shutil.rmtree(staging, ignore_errors=True)
        raise
    else:
        shutil.rmtree(staging, ignore_errors=True)  # after an exchange it holds the old files
        clear_leftovers(folder)
    finally:
        if lock:
            os.close(lock)


def make_staging(folder: Path) -> Path:
    """Make a folder to write into: beside ``folder``, or in it where that is not allowed."""
    name = f".{folder.name}.saving-{secrets.token_hex(4)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        staging = folder.parent / name
        staging.mkdir()
    except OSError:
        staging = folder / name
        staging.mkdir()
    if folder.exists():
        shutil.copymode(folder, staging)
    return staging


def leftovers(folder: Path) -> list[Path]:
    """List the staging folders of other saves into ``folder``, running or killed."""
    prefix = f".{folder.name}.saving-"
    places = (place for place in (folder.parent, folder) if place.is_dir())
    return [path for place in places for path in place.iterdir() if path.name.startswith(prefix)]


def clear_leftovers(folder: Path) -> None:
    """Remove the staging folders of killed saves; where locks are unknown (Windows), none."""
    for path in leftovers(folder):
        if lock := try_lock(path):
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def try_lock(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives; None where another holds the lock."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def sync(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk, where it can."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_checkpoint_file(name: str) -> bool:
    """Whether a save replaces the file of this name."""
    return name in (CONFIG, WEIGHTS, INDEX) or bool(
        re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)
    )


def install(staging: Path, folder: Path) -> None:
    """Put the files of ``staging`` in the place of the checkpoint in ``folder``."""
    if not folder.exists():
        os.rename(staging, folder)
        sync(folder.parent)
        return
    new = sorted(path.name for path in staging.iterdir())
    old = sorted(path.name for path in folder.iterdir() if is_checkpoint_file(path.name))
    if new == old == [CONFIG, WEIGHTS] and same_bytes(staging / CONFIG, folder / CONFIG):
        os.replace(staging / WEIGHTS, folder / WEIGHTS)
    else:
        try:
            if staging.parent == folder:
                raise OSError("a folder cannot change places with one inside it")
            link_others(folder, staging)
            exchange(staging, folder)
        except OSError:
            move_files(staging, folder, new, old)
    sync(folder)
    sync(folder.parent)


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two small files are equal."""
    return a.read_bytes() == b.read_bytes()


def link_others(folder: Path, staging: Path) -> None:
    """Give ``staging`` every file of ``folder`` that is not replaced, by hard link or copy."""
    ours = leftovers(folder)

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    for path in folder.iterdir():
        if path in ours or is_checkpoint_file(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, staging / path.name, symlinks=True, copy_function=link)
        else:
            link(path, staging / path.name)


def exchange(a: Path, b: Path) -> None:
    """Let two folders change places in one step.

    Raises:
        OSError: where the system or the file system cannot.
    """
    here = Path.cwd()
    name = {"linux": "renameat2", "darwin": "renamex_np"}.get(sys.platform)
    swap = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if swap is None:
        raise OSError("this system knows no exchange of folders")
    if name == "renameat2":
        failed = swap(-100, bytes(a), -100, bytes(b), 2)  # AT_FDCWD twice, RENAME_EXCHANGE
    else:
        failed = swap(bytes(a), bytes(b), 2)  # RENAME_SWAP
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(a))
    if here.is_relative_to(b):
        os.chdir(here)  # into the new folder of that name


def move_files(staging: Path, folder: Path, new: list[str], old: list[str]) -> None:
    """Replace files one by one; ``config.json`` leaves first and comes last, so none can mix."""
    away = staging / "old"
    away.mkdir()
    gone = []
    try:
        for name in sorted(old, key=CONFIG.__ne__):
            os.replace(folder / name, away / name)
            gone.append(name)
    except OSError:
        for name in reversed(gone):
            os.replace(away / name, folder / name)
        away.rmdir()
        raise
    for name in sorted(new, key=CONFIG.__eq__):
        os.replace(staging / name, folder / name)
