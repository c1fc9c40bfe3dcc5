"""Where the files of a checkpoint come from: a folder, the package itself, or the Hub.

Chapter 11 uses this module. Source: https://huggingface.co/docs/huggingface_hub (cache,
revisions, offline mode).
"""

import os
import re
from importlib import resources
from pathlib import Path

from .atomic import leftovers

HUB_SECONDS = 2  # to wait for the Hub's first answer, unless HF_HUB_ETAG_TIMEOUT says otherwise
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


def few(names: list[str], most: int = 4) -> str:
    """List some names and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
