"""Fixtures and rules that every test shares."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of published reference data (real tokenizer, configs, outputs), read-only.

    Looked for in `$MODERNBERT_REFERENCE`, then beside the repository; skips where it is absent.
    """
    named = os.environ.get("MODERNBERT_REFERENCE")
    for folder in [Path(named)] if named else [ROOT.parent / "shared" / "reference"]:
        if folder.is_dir():
            return folder
    pytest.skip("no reference data here (set MODERNBERT_REFERENCE to the folder that holds it)")


@pytest.fixture(scope="session")
def html(tmp_path_factory) -> Path:
    """The pages: those that `$MODERNBERT_HTML` names, or those of `make book`, or made anew.

    Those of `make book` serve as long as nothing has changed since that they are made of.
    """
    if named := os.environ.get("MODERNBERT_HTML"):
        return Path(named).resolve()
    made = ROOT / "_build" / "html"
    index = made / "book" / "index.html"
    if index.is_file() and index.stat().st_mtime > max(p.stat().st_mtime for p in _sources()):
        return made
    from tools import book

    output = tmp_path_factory.mktemp("book")
    source = output / "source"
    book.stage(ROOT, source)
    book.run(source)
    book.keep(book.collect(source), source)
    book.render(source, output)
    return output / "_build" / "html"


def _sources() -> list[Path]:
    """All that the pages are made of."""
    patterns = (
        "book/**/*.*",
        "notebooks/*.ipynb",
        "modernbert_mini/**/*.py",
        "modernbert_mini/mini/*",
        "_*.yml",
    )
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return [path for path in found if "_generated" not in path.parts]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    network = os.environ.get("MODERNBERT_NETWORK") == "1"
    for item in items:
        if item.get_closest_marker("network") and not network:
            item.add_marker(pytest.mark.skip(reason="needs the Hub: set MODERNBERT_NETWORK=1"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: none found"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
