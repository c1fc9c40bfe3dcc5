"""Build the package as others get it: a wheel, or a source distribution.

Both are built from a copy, since setuptools leaves files of its own beside what it builds.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")


def copy(into: Path) -> Path:
    """Copy what a distribution is made of."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "modernbert_mini", into / "modernbert_mini", ignore=ignore)
    for name in SOURCES:
        shutil.copy(ROOT / name, into)
    return into


def wheel(into: Path, source: Path | None = None) -> Path:
    """Build the wheel, from this repository or from another folder, and return its place."""
    with tempfile.TemporaryDirectory() as folder:
        source = source or copy(Path(folder, "source"))
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        command += ["--quiet", "--disable-pip-version-check", "--wheel-dir", into, source]
        subprocess.run(command, check=True)
    (built,) = into.glob("modernbert_mini-*.whl")
    return built


def sdist(into: Path) -> Path:
    """Build the source distribution, and return its place."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"from setuptools import build_meta; build_meta.build_sdist({str(into)!r})"
        command = [sys.executable, "-c", code]
        source = copy(Path(folder, "source"))
        subprocess.run(command, check=True, cwd=source, capture_output=True)
    (built,) = into.glob("modernbert_mini-*.tar.gz")
    return built


def unpack(archive: Path, into: Path) -> Path:
    """Unpack a source distribution, and return its folder."""
    with tarfile.open(archive) as file:
        file.extractall(into, filter="data")
    (folder,) = into.iterdir()
    return folder
