"""Is this machine ready for the book? One line for each thing, and how to mend what is wrong.

``modernbert-mini doctor`` prints it. Nothing is imported before it has been looked for, so it
answers where half of an installation is missing. Nothing is changed and nothing is sent, but for
one question to the Hugging Face Hub, whether it is there.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from . import __version__

OK, NOTE, FAULT = "ok", "note", "FAULT"  # runs; runs with less; a chapter will not run
DISTRIBUTION = "modernbert-mini"
PUBLISHED = "answerdotai/ModernBERT-base"
PUBLISHED_MB = 600  # 149,655,232 numbers of four bytes
SPARE_MB = 1000  # of memory, for JupyterLab, a browser and the system beside a chapter
SENTENCE = "Plants create [MASK] through photosynthesis."
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}  # of logits, against eager


@dataclass(frozen=True)
class Finding:
    """What one look at the machine has found.

    Attributes:
        name: what was looked at.
        level: ``ok``, ``note`` (the book runs, with less) or ``FAULT`` (a chapter will not run).
        found: what is there, or missing.
        mend: what to do about it; empty where nothing has to be done.
    """

    name: str
    level: str
    found: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{self.level:5}  {self.name}: {self.found}"
        return f"{line}. {self.mend}" if self.mend else line


def examine() -> list[Finding]:
    """Look at everything, in the order in which faults are best mended."""
    found: list[Finding] = []
    for look in LOOKS:
        try:
            found += look()
        except Exception as error:  # one look that stops must not hide the others
            name = look.__name__.replace("_", " ")
            mend = "Please report this, with the lines below."
            found.append(Finding(name, FAULT, f"{type(error).__name__}: {one_line(error)}", mend))
    return found


def python() -> Iterator[Finding]:
    """The interpreter: new enough, and not of 32 bits."""
    version = platform.python_version()
    if numbers(version) < (3, 11):
        mend = "Install Python 3.11 or newer and make the environment with it."
        yield Finding("Python", FAULT, f"{version} is older than 3.11", mend)
    elif sys.maxsize < 2**32:
        mend = "Install a 64-bit Python: torch exists for no other."
        yield Finding("Python", FAULT, f"{version} is of 32 bits", mend)
    else:
        yield Finding("Python", OK, version)


def package() -> Iterator[Finding]:
    """This package: installed, and the copy that Python finds is the one that pip knows."""
    try:
        installed = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        mend = "Run `python -m pip install .` in the repository's folder."
        yield Finding(DISTRIBUTION, FAULT, "here as a folder, but not installed", mend)
        return
    if installed != __version__:
        mend = "Install it again, or start Python in another folder."
        found = f"pip knows version {installed}, Python finds {__version__}"
        yield Finding(DISTRIBUTION, FAULT, found, mend)
    else:
        yield Finding(DISTRIBUTION, OK, installed)


def dependencies() -> Iterator[Finding]:
    """What every chapter imports: there, new enough, and it can be imported."""
    for name, (least, optional) in requirements().items():
        if not optional:
            yield dependency(name, least)


def dependency(name: str, least: str) -> Finding:
    """One package that has to be there."""
    wanted = f'"{name}>={least}"'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, FAULT, "missing", f"Run `python -m pip install {wanted}`.")
    if numbers(version) < numbers(least):
        mend = f"Run `python -m pip install --upgrade {wanted}`."
        return Finding(name, FAULT, f"{version} is older than {least}", mend)
    try:
        importlib.import_module(name.replace("-", "_"))
    except Exception as error:  # a library of the system may be missing: OSError, RuntimeError
        mend = f"Run `python -m pip install --force-reinstall {wanted}`."
        return Finding(name, FAULT, f"{version} does not import: {one_line(error)}", mend)
    return Finding(name, OK, version)


def requirements() -> dict[str, tuple[str, bool]]:
    """What the installed package asks for: name -> (least version, whether only an extra does)."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    found = {}
    for line in lines:
        match = re.match(r"([\w.-]+)\s*(?:\[[^]]*\])?[^;]*?[>=]=\s*([\d.]+)", line)
        if match and match[1] != DISTRIBUTION:
            found.setdefault(match[1], (match[2], "extra ==" in line))
    return found


def comparison() -> Iterator[Finding]:
    """``transformers``, beside which chapters put their numbers."""
    name = "transformers"
    least = requirements().get(name, ("5", True))[0]
    wanted = f'`python -m pip install "{name}>={least}"`'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = "missing: chapters leave out the comparison with it"
        yield Finding(name, NOTE, found, f"To have it: {wanted}.")
        return
    if numbers(version) < numbers(least):
        found = f"{version} is older than {least}: chapters leave out the comparison with it"
        yield Finding(name, NOTE, found, f"To have it: {wanted}.")
    else:
        yield Finding(name, OK, version)


def mini() -> Iterator[Finding]:
    """The embedded checkpoint: every file there, and bit for bit what was shipped."""
    folder = Path(str(files(__package__) / "mini"))
    listed = (folder / "SHA256SUMS").read_text(encoding="ascii").splitlines()
    again = "Install the package again: its copy is incomplete."
    for line in listed:
        expected, name = line.split()
        path = folder / name
        if not path.is_file():
            yield Finding("mini", FAULT, f"{name} is missing", again)
            return
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            yield Finding("mini", FAULT, f"{name} is not the file that was shipped", again)
            return
    yield Finding("mini", OK, f"{len(listed)} files, {listed[0][:12]}…")


def data() -> Iterator[Finding]:
    """The data package: there, and its file the one that the book is written for."""
    if not importlib.util.find_spec("numpy"):
        return  # said above
    from . import data

    name = data.VITAL_ARTICLES_PACKAGE
    mend = f"Run `python -m pip install {name}=={data.VITAL_ARTICLES_VERSION}`."
    try:
        records = data.vital_article_records()
    except data.CorpusNotFoundError:
        found = "missing: Python's own manual stands in, and chapters 12 and 13 have less to learn"
        yield Finding(name, NOTE, found, mend)
    except ValueError:
        version = importlib.metadata.version(name)
        yield Finding(name, FAULT, f"{version} has another text", mend)
    else:
        yield Finding(name, OK, f"{len(records):,} articles")


def memory() -> Iterator[Finding]:
    """Memory that is free, against the hungriest chapter on record."""
    recorded = files(__package__) / "recorded" / "costs.json"
    costs = json.loads(recorded.read_text(encoding="utf-8"))
    hungriest = max(costs, key=lambda name: costs[name]["peak_ram_mb"])
    peak = costs[hungriest]["peak_ram_mb"]
    if not importlib.util.find_spec("psutil"):
        found = f"unknown, since psutil is missing; {hungriest} takes {peak:,} MB"
        yield Finding("memory", NOTE, found, "Run `python -m pip install psutil` to know.")
        return
    import psutil

    free = psutil.virtual_memory().available // 1024**2
    found = f"{free:,} MB free; the hungriest chapter, {hungriest}, takes {peak:,} MB"
    if free < peak:
        mend = "Close other programs and notebooks that are still running."
        yield Finding("memory", FAULT, found, mend)
    elif free < peak + SPARE_MB:
        yield Finding("memory", NOTE, found, "Run one chapter at a time.")
    else:
        yield Finding("memory", OK, found)


def disk() -> Iterator[Finding]:
    """Room on the disk: for what chapters write, and for the published weights."""
    free = shutil.disk_usage(Path.cwd()).free // 1024**2
    if free < 100:
        mend = "Make room: chapters write small files into the folder for temporary ones."
        yield Finding("disk", FAULT, f"{free:,} MB free", mend)
    elif free < 2 * PUBLISHED_MB:
        found = f"{free:,} MB free; the published weights take {PUBLISHED_MB} MB"
        yield Finding("disk", NOTE, found, "Make room before you load them.")
    else:
        yield Finding("disk", OK, f"{free:,} MB free")


def kernel() -> Iterator[Finding]:
    """What notebooks run in: this very Python, as Jupyter's kernel ``python3``."""
    if in_colab():
        yield Finding("kernel", OK, "Colab's")
        return
    if not importlib.util.find_spec("ipykernel"):
        mend = "Run `python -m pip install ipykernel jupyterlab`."
        yield Finding("kernel", FAULT, "ipykernel is missing: no notebook can run", mend)
        return
    from jupyter_client.kernelspec import KernelSpecManager

    program = Path(KernelSpecManager().get_kernel_spec("python3").argv[0])
    here = Path(sys.executable).parent  # a bare "python" means: the one that runs Jupyter
    if program.is_absolute() and not (program.exists() and program.parent.samefile(here)):
        mend = "Run `python -m ipykernel install --sys-prefix`, then start JupyterLab again."
        yield Finding("kernel", FAULT, "Jupyter's python3 is another Python than this one", mend)
    else:
        yield Finding("kernel", OK, f"ipykernel {importlib.metadata.version('ipykernel')}")


def frontend() -> Iterator[Finding]:
    """Something to open notebooks with."""
    if in_colab():
        return
    for name in ("jupyterlab", "notebook"):
        if importlib.util.find_spec(name):
            yield Finding("JupyterLab", OK, f"{name} {importlib.metadata.version(name)}")
            return
    mend = "Run `python -m pip install jupyterlab`, or open the notebooks in an editor."
    yield Finding("JupyterLab", NOTE, "missing", mend)


def gpu() -> Iterator[Finding]:
    """The GPU, if any, and what its generation means."""
    if (torch := usable_torch()) is None:
        return
    if not torch.cuda.is_available():
        yield Finding("GPU", OK, "none; the book needs none")
        return
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    if major < 8:
        found = f"{name}: older than what FlashAttention asks for; sdpa is used"
        yield Finding("GPU", NOTE, found)
    else:
        yield Finding("GPU", OK, name)


def attention() -> Iterator[Finding]:
    """Every way to compute attention, tried on ``mini`` and compared with the plainest one."""
    if (torch := usable_torch()) is None:
        return
    from . import ModernBertForMaskedLM, Tokenizer
    from .config import ConfigError
    from .model import IMPLEMENTATIONS

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    old = on_gpu and torch.cuda.get_device_capability() < (8, 0)
    half = torch.float16 if old else torch.bfloat16
    ids = Tokenizer.from_pretrained("mini")(SENTENCE, return_tensors="pt")["input_ids"][0]
    ends = torch.tensor([0, len(ids)], dtype=torch.int32)
    expected = None
    for name in ("eager", *(n for n in IMPLEMENTATIONS if n not in ("auto", "eager"))):
        kernel = on_gpu and name not in ("eager", "sdpa")
        dtype = half if kernel else torch.float32
        options = {"attn_implementation": name, "dtype": dtype, "device": device}
        try:
            model = ModernBertForMaskedLM.from_pretrained("mini", **options).eval()
            with torch.no_grad():
                batch = {"input_ids": ids.to(device), "cu_seqlens": ends.to(device)}
                logits = model(**batch).logits.float().cpu()
        except ConfigError as error:
            found = f"needs {error.expected}; here: {error.found}"
            yield Finding(f"attention, {name}", NOTE, found)
            continue
        expected = logits if expected is None else expected
        away = (logits - expected).abs().max().item()
        bound = TOLERANCE[str(dtype).removeprefix("torch.")]
        found = f"within {away:.0e} of the plain one" if away else "works"
        if away > bound or logits.isnan().any():
            mend = "Please report this, with the lines below."
            yield Finding(f"attention, {name}", FAULT, f"off by {away:.1g}", mend)
        else:
            yield Finding(f"attention, {name}", OK, found)


def hub() -> Iterator[Finding]:
    """Whether published weights can be had: from the Hub, or from its cache on this disk."""
    if not importlib.util.find_spec("huggingface_hub"):
        return  # said above
    from huggingface_hub import try_to_load_from_cache

    from .sources import hub_trouble

    trouble = hub_trouble(PUBLISHED, "config.json", None)
    cached = isinstance(try_to_load_from_cache(PUBLISHED, "model.safetensors"), str)
    if trouble is None:
        yield Finding("Hugging Face Hub", OK, "answers")
    elif cached:
        yield Finding("Hugging Face Hub", OK, f"out of reach ({trouble}), {PUBLISHED} in the cache")
    else:
        found = f"out of reach ({trouble}): chapters go on with mini alone"
        yield Finding("Hugging Face Hub", NOTE, found)


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python,
    package,
    dependencies,
    comparison,
    mini,
    data,
    memory,
    disk,
    kernel,
    frontend,
    gpu,
    attention,
    hub,
)


def environment() -> dict[str, Any]:
    """What a bug report needs to know of this machine; no name of a person, no path."""
    about: dict[str, Any] = {
        DISTRIBUTION: __version__,
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "place": place(),
        "cores": os.cpu_count(),
    }
    needed = [name for name, (_, optional) in requirements().items() if not optional]
    for name in [*needed, "transformers", "triton", "flash-attn", "ipykernel", "jupyterlab"]:
        try:
            about[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if (torch := usable_torch()) is not None:
        about["CUDA"] = torch.version.cuda or "none"
        about["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for name in ("HF_HUB_OFFLINE", "TRITON_INTERPRET", "OMP_NUM_THREADS"):
        if name in os.environ:
            about[name] = os.environ[name]
    return about


def place() -> str:
    """Where Python runs, as far as that makes a difference."""
    if in_colab():
        return "Colab"
    if "BINDER_SERVICE_HOST" in os.environ:
        return "Binder"
    return "notebook" if "JPY_PARENT_PID" in os.environ else "terminal"  # kernels set it


def in_colab() -> bool:
    """Whether this is one of Colab's machines, in a notebook or in its terminal."""
    return "COLAB_RELEASE_TAG" in os.environ


def usable_torch() -> Any:
    """The module ``torch``; None where it cannot be imported, which ``dependencies`` says."""
    try:
        return importlib.import_module("torch")
    except Exception:
        return None


def report(found: list[Finding], about: dict[str, Any]) -> str:
    """All findings, the verdict, and the environment for a bug report."""
    faults = sum(finding.level == FAULT for finding in found)
    verdict = "Ready." if not faults else f"Not ready: {faults} to mend, from the top."
    block = "\n".join(f"{name}: {value}" for name, value in about.items())
    lines = "\n".join(map(str, found))
    return f"{lines}\n\n{verdict}\n\nFor a bug report:\n\n```\n{block}\n```"


def as_json(found: list[Finding], about: dict[str, Any]) -> str:
    """The same for programs: ``ready``, ``findings``, ``environment``."""
    ready = not any(finding.level == FAULT for finding in found)
    findings = [asdict(finding) for finding in found]
    result = {"ready": ready, "findings": findings, "environment": about}
    return json.dumps(result, indent=2, ensure_ascii=False)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def one_line(error: Exception) -> str:
    """What an error says, without line breaks and a full stop at its end."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
