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
