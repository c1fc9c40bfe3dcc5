"""Run notebooks as Colab does: its versions, each notebook alone in an empty folder.

    python -m tools.colab                   every notebook
    python -m tools.colab 03_rope 07        those whose names begin so

`make colab` calls it. In `.cache/colab` it makes a fresh environment with the versions of
`.ci/colab.txt`, as far as pip has them for this Python, and says where they differ. For each
notebook it then plays a runtime that has just been started: the package is not there, the setup
cell brings it, is run again, and the other cells follow. The setup cell installs from the
repository's address; git is told to find a local copy behind it, with the files as they stand.
Colab's own packages must be the same before and after.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path

import nbclient
import nbformat
from packaging.utils import canonicalize_name

from . import address
from .chapters import NOTEBOOKS, ROOT, tagged

PINS = ROOT / ".ci" / "colab.txt"
GPU_ONLY = {"triton"}  # what Colab has only where there is a GPU
PACKAGE = "modernbert-mini"
LIMIT = 600  # seconds that one cell may take, also where the machine has much else to do
STOPS = (
    nbclient.exceptions.CellExecutionError,
    nbclient.exceptions.CellTimeoutError,
    nbclient.exceptions.DeadKernelError,
)
# Runs last, in the kernel: where the package came from, and which IPython ran the cells.
WITNESS = """\
import json as _json, sys as _sys
import IPython as _ipython
print(_json.dumps([modernbert_mini.__file__, _sys.prefix, _ipython.__version__]))"""


class ColabError(RuntimeError):
    """A notebook would not run on Colab; the message says which and why."""


def pins() -> dict[str, str]:
    """Colab's versions, by canonical name."""
    found = re.findall(r"^([\w.-]+)==(\S+)$", PINS.read_text("utf-8"), re.M)
    return {canonicalize_name(name): number for name, number in found}


def wanted(torch: str = "auto", gpu: bool = False) -> dict[str, str]:
    """What to ask pip for.

    Args:
        torch: a version, or "colab" for Colab's own, or "auto": Colab's, except where pip gave
            this environment a build without CUDA. That one is then taken again, since Colab's
            would bring gigabytes of CUDA.
        gpu: whether to imitate a runtime with a GPU, as far as packages go.
    """
    versions = {n: v for n, v in pins().items() if gpu or n not in GPU_ONLY}
    if torch not in ("auto", "colab"):
        versions["torch"] = torch
    elif torch == "auto" and version("torch").endswith("+cpu"):
        versions["torch"] = version("torch").removesuffix("+cpu")
    return versions


def environment(
    folder: Path, python: str, versions: dict[str, str], borrow: bool
) -> tuple[Path, dict[str, str]]:
    """Make an environment with these versions; return its Python and all that it holds.

    What pip does not have in that version for this Python is taken in another.

    Args:
        borrow: whether to use the torch of this environment in place of a copy of its own.
    """
    asked = {"python": python, "borrow": borrow, "versions": versions}
    stamp, executable = folder / "made.json", folder / "bin" / "python"
    made = json.loads(stamp.read_text("utf-8")) if stamp.is_file() else {}
    if made.get("asked") == asked:
        return executable, made["installed"]
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    if borrow:
        borrow_torch(folder)
    tools = {"pip", "setuptools"} & versions.keys()  # as on Colab, before they install the rest
    pip(executable, "install", *(f"{name}=={versions[name]}" for name in sorted(tools)))
    rest = {name: f"{name}=={number}" for name, number in versions.items() if name not in tools}
    if not pip(executable, "install", "--no-compile", *rest.values()):
        for name, pin in rest.items():
            if not pip(executable, "install", pin) and not pip(executable, "install", name):
                raise ColabError(f"pip cannot install {name} in any version")
    made = {"asked": asked, "installed": installed(executable)}
    stamp.write_text(json.dumps(made), encoding="utf-8")
    return executable, made["installed"]


def borrow_torch(folder: Path) -> None:
    """Let an environment find this one's torch, where its own pip cannot write to it."""
    site, links = Path(sysconfig.get_path("purelib")), folder / "borrowed"
    links.mkdir()
    for name in ("torch", "torchgen", "functorch", f"torch-{version('torch')}.dist-info"):
        (links / name).symlink_to(site / name, target_is_directory=True)
    (found,) = folder.glob("lib/python*/site-packages")
    (found / "borrowed.pth").write_text(f"{links}\n", encoding="utf-8")


def pip(executable: Path, *arguments: str) -> bool:
    """Run an environment's pip; whether it succeeded. What it said is shown where it did not."""
    command = [executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return done.returncode == 0


def installed(executable: Path) -> dict[str, str]:
    """The packages of an environment and their versions."""
    command = [executable, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return {canonicalize_name(entry["name"]): entry["version"] for entry in listed}


def differences(here: dict[str, str], gpu: bool) -> list[str]:
    """Where an environment is not Colab's, a line each."""
    return [
        f"{name}: {here.get(name, 'absent')} here, {number} on Colab"
        for name, number in pins().items()
        if here.get(name) != number and (gpu or name not in GPU_ONLY or name in here)
    ]


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What became of the packages that were there before, a line for each that is not the same."""
    return [
        f"{name}: {number} before, {after.get(name, 'absent')} after"
        for name, number in before.items()
        if after.get(name) != number
    ]


def publish(root: Path, folder: Path) -> Path:
    """Put the files of a repository, as they stand, into a bare one at ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    tree = folder.with_suffix(".tree")
    shutil.rmtree(tree, ignore_errors=True)
    listed = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, tree / name)
    git(tree, "init", "--quiet", "--initial-branch", "main")
    git(tree, "add", "--all")
    who = ["-c", "user.name=colab", "-c", "user.email=colab@example.org"]
    git(tree, *who, "-c", "commit.gpgsign=false", "commit", "--quiet", "-m", "As it stands")
    git(tree.parent, "clone", "--quiet", "--bare", tree, folder)
    shutil.rmtree(tree)
    return folder


def git(folder: Path, *arguments: str | Path) -> str:
    """Run git in a folder and return what it said."""
    command = ["git", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def surroundings(executable: Path, repository: Path, url: str) -> dict[str, str]:
    """The variables of a kernel: its own Python first, and ``url`` leads to ``repository``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return kept | {
        "PATH": os.pathsep.join([str(executable.parent), os.environ["PATH"]]),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else a debugger that nobody uses says so
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": url,
    }


def played(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook with its setup cell run again after the cell that follows it.

    Only so both faults show: a first run that leaves the next cell without the package, and a
    second run that fails.
    """
    (setup,) = tagged(book, "setup")
    at = book.cells.index(setup)
    witness = nbformat.v4.new_code_cell(WITNESS)
    again = nbformat.v4.new_code_cell(setup.source, metadata={"tags": ["setup"]})
    book.cells = [*book.cells[: at + 2], again, *book.cells[at + 2 :], witness]
    return book


def kernel(folder: Path, executable: Path) -> str:
    """Register an environment's kernel where only this process looks; return its name."""
    name = "as-on-colab"
    spec = folder / "kernels" / name / "kernel.json"
    spec.parent.mkdir(parents=True, exist_ok=True)
    start = [str(executable), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    about = {"argv": start, "display_name": name, "language": "python"}
    spec.write_text(json.dumps(about), encoding="utf-8")
    os.environ["JUPYTER_PATH"] = str(folder)
    return name


def run(
    notebook: Path,
    folder: Path,
    executable: Path,
    variables: dict[str, str],
    colabs: dict[str, str],
) -> str:
    """Play one notebook in a new runtime; return the IPython that ran it.

    Args:
        folder: where the notebook's own, empty one is made.
        executable: of the environment.
        variables: of the kernel.
        colabs: the packages of a new runtime. Others, left by the notebook before, are removed.

    Raises:
        ColabError: where a cell fails, where Colab's packages do not stay as they are, or where
            the package did not come from the repository.
    """
    if left := installed(executable).keys() - colabs.keys():
        pip(executable, "uninstall", "--yes", *left)
    content = folder / "content" / notebook.stem
    shutil.rmtree(content, ignore_errors=True)
    content.mkdir(parents=True)
    alone = Path(shutil.copy(notebook, content))
    book = played(nbformat.read(alone, as_version=4))
    client = nbclient.NotebookClient(
        book,
        timeout=LIMIT,
        kernel_name=kernel(folder, executable),
        resources={"metadata": {"path": str(content)}},
    )
    try:
        client.execute(env=variables)
    except STOPS as error:
        raise ColabError(str(error)) from None
    finally:
        nbformat.write(book, alone)
    where, prefix, ipython = json.loads(book.cells[-1].outputs[0]["text"])
    if not Path(where).is_relative_to(prefix):
        raise ColabError(f"the package came from {where}, not from the repository")
    if found := changes(colabs, installed(executable)):
        raise ColabError("the notebook changed Colab's packages: " + "; ".join(found))
    return ipython


def main(arguments: list[str]) -> int:
    """Run the notebooks named, or all; 1 where one would not run on Colab."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", default=[""], help="how their names begin")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "colab")
    parser.add_argument("--python", default=sys.executable, help="Colab's is 3.13")
    parser.add_argument(
        "--torch",
        default="auto",
        help="colab, or a version (default: Colab's, unless that brings CUDA here)",
    )
    parser.add_argument("--gpu", action="store_true", help="the packages of a GPU runtime")
    options = parser.parse_args(arguments)
    chosen = [n for n in NOTEBOOKS if n.stem.startswith(tuple(options.notebooks))]
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = shutil.which(options.python) or options.python
    versions = wanted(options.torch, options.gpu)
    executable, colabs = environment(folder / "venv", python, versions, borrow=False)
    number = subprocess.run([executable, "--version"], capture_output=True, text=True, check=True)
    print(f"{number.stdout.strip()} here, 3.13 on Colab")
    print(*differences(colabs, options.gpu), sep="\n", flush=True)
    repository = publish(ROOT, folder / "repository.git")
    variables = surroundings(executable, repository, address.address(ROOT))
    failed = 0
    for notebook in chosen:
        start = time.perf_counter()
        try:
            ipython = run(notebook, folder, executable, variables, colabs)
        except ColabError as error:
            failed += 1
            print(f"{notebook.stem}: FAILED\n{error}", flush=True)
        else:
            seconds = time.perf_counter() - start
            print(f"{notebook.stem}: {seconds:.0f} s on IPython {ipython}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} notebooks run as on Colab")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
