"""Replace a checkpoint on disk in one step, so that nobody ever reads half of one.

Chapter 11 explains the recipe: write beside the old one, bring it to the disk, change places.
"""

import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` at the end: a reader never sees half of it.

    Where the writing fails, the old file stays and the half of the new one is removed, so that a
    full disk has room again.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def claiming(folder: Path) -> Iterator[None]:
    """Keep a folder to this process; the claim ends with the process, however it ends.

    Raises:
        BlockingIOError: where another process holds it. Where locks are unknown (Windows, some
            network folders), nobody is kept out.
    """
    lock = None
    if fcntl is not None:
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise BlockingIOError(f"{folder} is in use by another process") from error
        except OSError:
            pass  # a file system without locks
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[Path]:
    """Give an empty folder for a new checkpoint, which takes the old one's place at the end.

    What makes it safe: everything is written and synced to disk beside ``folder`` first. Then one
    system call makes the change: a rename where ``folder`` is new or only the weights differ, else
    an exchange of the two folders (Linux, macOS). Where the system knows no exchange of folders,
    files move one by one while ``config.json`` is absent: a process killed in those milliseconds
    leaves a folder that does not load, and whose error message says where the files are.

    What a killed process leaves is cleared by the next save.
    """
    folder = Path(os.path.realpath(os.path.expanduser(folder)))
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
        try:
            os.replace(staging / WEIGHTS, folder / WEIGHTS)
        except PermissionError:  # Windows: a file that a model has mapped may move, but not go
            move_files(staging, folder, new, old)
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
