"""What the explorers show is what the package computes; the status page tells what happened."""

import json
import math
import re

import explorer_data
import nbformat
import pytest
import status_page
import torch
from tools.chapters import ROOT

from modernbert_mini import ModernBertConfig, Tokenizer, benchmark, data, plots
from modernbert_mini.alternating_attention import window_mask
from modernbert_mini.attention import eager_attention
from modernbert_mini.rope import rotary_table

STATIC = ROOT / "book" / "_static" / "explorers"


def test_the_angles_are_those_of_the_model():
    shown = explorer_data.rope()
    config = ModernBertConfig()
    assert shown["context"] == config.max_position_embeddings
    assert shown["window"] == config.local_attention
    for base, kind in zip(shown["bases"], ("full_attention", "sliding_attention"), strict=True):
        assert base["theta"] == config.rope_parameters[kind]["rope_theta"]
        frequencies = torch.tensor(base["frequencies"])
        assert len(frequencies) == config.head_dim // 2 and frequencies[0] == 1
        # The slowest of D/2 pairs turns by θ to the power of −(D − 2)/D.
        slowest = base["theta"] ** -(1 - 2 / config.head_dim)
        assert frequencies[-1].item() == pytest.approx(slowest, rel=1e-5)
        cos, _ = rotary_table(torch.tensor([100]), frequencies)
        expected = [math.cos(100 * f) for f in base["frequencies"]]
        torch.testing.assert_close(cos[0, :32], torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_layers_are_those_of_the_model():
    shown = explorer_data.window()
    config = ModernBertConfig()
    own = shown["patterns"][shown["every"]][: shown["layers"]]
    assert own == [kind == "full_attention" for kind in config.layer_types]
    assert shown["half_window"] == config.half_window
    assert all(shown["patterns"]["1"]) and not any(shown["patterns"]["never"])
    assert {len(pattern) for pattern in shown["patterns"].values()} == {explorer_data.MOST_LAYERS}


def test_the_lengths_are_those_of_the_texts():
    shown = explorer_data.padding()["samples"]
    wikipedia, skewed, even = shown.values()
    tokenizer = Tokenizer.from_pretrained("mini")
    texts = list(data.vital_articles().documents)[:3]
    assert wikipedia[:3] == [len(tokenizer(text).input_ids) for text in texts]
    assert skewed == list(benchmark.table_rows()["skewed"].lengths)
    assert len(set(even)) == 1 and len({len(lengths) for lengths in shown.values()}) == 1


def test_every_way_through_the_tiles_ends_in_attention():
    shown = explorer_data.tiles()
    scores = torch.tensor(shown["scores"]).double()
    values = torch.tensor(shown["values"]).double()
    length = len(values)
    # Scores as they are: the queries are their rows, the keys are units; no scale is left.
    scaled = scores * length**0.5
    for name, run in shown["runs"].items():
        rows, cols, window = name.split("×")
        mask = None if window == "none" else window_mask(length, int(window))
        unit = torch.eye(length).double()
        (expected,) = eager_attention(scaled[None], unit[None], values[None, :, None], mask=mask)[0]
        last = [row for step in run["steps"] if step["last"] for row in step["rows"]]
        assert [query for query, *_ in last] == list(range(length)), name
        results = torch.tensor([mixed / total for *_, total, mixed in last]).double()
        torch.testing.assert_close(results, expected[:, 0], atol=2e-3, rtol=0)
        assert run["tiles"] == math.ceil(length / int(rows)) * math.ceil(length / int(cols))
        assert len(run["steps"]) <= run["tiles"]


def test_a_page_carries_palette_data_and_scripts():
    page = explorer_data.page()
    for name, value in plots.PALETTE.items():
        assert f"--mb-{name}:{value};" in page
    for name, compute in explorer_data.EXPLORERS.items():
        found = re.search(rf'id="mb-data-{name}">(.*?)</script>', page, re.S)
        assert json.loads(found[1]) == json.loads(json.dumps(compute()))
        assert f"explorers/{name}.js" in page and (STATIC / f"{name}.js").is_file()
        assert f'data-explorer="{name}"' in (ROOT / "book" / "explorers.md").read_text("utf-8")


def test_a_text_cannot_end_the_script_that_carries_it(monkeypatch):
    monkeypatch.setitem(explorer_data.EXPLORERS, "rope", lambda: {"text": "</script><b>"})
    assert "</script><b>" not in explorer_data.page()


@pytest.mark.parametrize("path", sorted(STATIC.iterdir()), ids=lambda path: path.name)
def test_an_explorer_fetches_nothing_and_knows_no_colour_but_the_palette(path):
    text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|\bfetch\(|XMLHttpRequest|\bimport\b|url\((?!#)", text)
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b", text)


# ---- the status page ----


@pytest.fixture
def notebook(tmp_path):
    new = nbformat.v4
    cells = [new.new_code_cell("1 + 1", execution_count=1), new.new_code_cell("2 + 2")]
    book = new.new_notebook(cells=[new.new_markdown_cell("# 3 · A toy\n\nText."), *cells])
    nbformat.write(book, tmp_path / "03_toy.ipynb")
    return tmp_path / "03_toy.ipynb"


COST = {
    "seconds": 12.3,
    "peak_ram_mb": 1234,
    "fetched_mb": 0.0,
    "hub": "offline",
    "cpu": "A processor, 1 of 2 cores",
    "torch": "2.13.0",
    "commit": "abc",
    "date": "2026-01-02",
}


def test_status_tells_what_ran_and_what_it_took(notebook):
    page = status_page.page([notebook], {"03_toy": COST})
    row = "| [3 · A toy](../notebooks/03_toy.ipynb) | 1 of 2 | 12 | 1,234 MB | nothing |"
    assert row in page
    assert "A processor, 1 of 2 cores, torch 2.13.0, commit abc, 2026-01-02" in page
    assert f"| torch | {torch.__version__} |" in page
    assert f"| date | {benchmark.describe_machine(torch.device('cpu'))['date'][:10]}" in page


def test_status_says_what_nobody_measured(notebook, monkeypatch):
    monkeypatch.setattr(status_page, "PROGRAMS", ("no-such-program",))
    monkeypatch.setattr(status_page, "RECORDS", {"nothing": "speed on the moon"})
    page = status_page.page([notebook], {})
    assert "| 1 of 2 | not yet measured |" in page and "Not yet measured." in page
    assert "| no-such-program | not installed |" in page
    assert "| speed on the moon | not yet measured |" in page
