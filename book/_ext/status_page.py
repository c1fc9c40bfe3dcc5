"""The status page: how the chapters of these very pages ran, with what, and on what."""

import importlib.metadata
import platform
from pathlib import Path

import nbformat
import torch

from modernbert_mini import benchmark

PROGRAMS = (
    "modernbert-mini",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "matplotlib",
    "triton",
    "flash-attn",
    "jupyter-book",
    "Sphinx",
)
# What the package carries of measurements, and what a page calls them.
RECORDS = {
    "speed": "speed on a CPU",
    "compiled": "speed on a CPU, transformers compiled",
    "gpu": "speed on a GPU",
}


def page(notebooks: list[Path], costs: dict[str, dict]) -> str:
    """The page's tables in Markdown.

    Args:
        notebooks: the chapters as they are rendered, with their outputs.
        costs: for each chapter, by the name of its notebook, what `plots.CostCard.of` takes.
    """
    machine = benchmark.describe_machine(torch.device("cpu"))
    return "\n\n".join(
        [
            "## Chapters",
            chapters(notebooks, costs),
            "## Machine",
            built_on(machine),
            "## Versions",
            versions(),
            "## Records",
            "Numbers of other machines stand in files that the package carries.",
            records(),
        ]
    )


def chapters(notebooks: list[Path], costs: dict[str, dict]) -> str:
    """A line for each chapter: whether its cells ran, and what that cost."""
    rows = [
        "| chapter | cells that ran | seconds | peak memory | fetched |",
        "|---|--:|--:|--:|--:|",
    ]
    for path in notebooks:
        book = nbformat.read(path, as_version=4)
        title = book.cells[0].source.splitlines()[0].removeprefix("# ")
        code = [c for c in book.cells if c.cell_type == "code" and c.source.strip()]
        ran = sum(c.execution_count is not None for c in code)
        cells = [f"{ran} of {len(code)}", *cost_cells(costs.get(path.stem))]
        rows.append(f"| [{title}](../notebooks/{path.name}) | {' | '.join(cells)} |")
    return "\n".join([*rows, "", told(costs)])


def cost_cells(cost: dict | None) -> list[str]:
    """Seconds, memory and what was fetched, or that nobody has measured it."""
    if cost is None:
        return ["not yet measured", "", ""]
    fetched = f"{cost['fetched_mb']:.0f} MB" if cost["fetched_mb"] >= 1 else "nothing"
    return [f"{cost['seconds']:.0f}", f"{cost['peak_ram_mb']:,.0f} MB", fetched]


def told(costs: dict[str, dict]) -> str:
    """On what the chapters ran, once for each such machine and day."""
    runs = {
        f"{c['cpu']}, torch {c['torch']}, commit {c['commit']}, {c['date']}, the Hub {c['hub']}"
        for c in costs.values()
    }
    return f"Measured on {'; '.join(sorted(runs))}." if runs else "Not yet measured."


def built_on(machine: dict) -> str:
    """What these pages were built on."""
    cuda = torch.cuda.is_available()
    rows = {
        "date": machine["date"].replace("T", " "),
        "commit": machine["commit"] or "unknown",
        "processor": f"{machine['cpu']}, {machine['cores']} cores",
        "GPU": torch.cuda.get_device_name() if cuda else "none",
        "system": machine["system"],
        "Python": platform.python_version(),
    }
    return table(("these pages", "built on"), rows)


def versions() -> str:
    """The programs that matter to the chapters."""
    return table(("program", "version"), {name: version(name) for name in PROGRAMS})


def version(name: str) -> str:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def records() -> str:
    """Where and when the numbers were taken that the package carries."""
    rows = ["| record | device | torch | commit | date |", "|---|---|---|---|---|"]
    for name, words in RECORDS.items():
        report = benchmark.recorded(name)
        if report is None:
            rows.append(f"| {words} | not yet measured | | | |")
            continue
        machine = report["machine"]
        device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
        cells = [device, machine["torch"], machine["commit"] or "unknown", machine["date"][:10]]
        rows.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(rows)


def table(heads: tuple[str, str], rows: dict[str, str]) -> str:
    """A table of two columns."""
    lines = [f"| {' | '.join(heads)} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])
