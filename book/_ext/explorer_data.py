"""What the explorers of the rendered book show: numbers of the package, computed at each build.

The page `book/explorers` carries them as JSON in the page itself, since a page that is opened from
a disk may fetch nothing.
"""

import itertools
import json

import torch

from modernbert_mini import ModernBertConfig, Tokenizer, data, plots
from modernbert_mini.alternating_attention import layer_pattern
from modernbert_mini.benchmark import skewed_lengths
from modernbert_mini.rope import inverse_frequencies
from modernbert_mini.views import TileView

BASE = ModernBertConfig()  # its defaults are those of ModernBERT-base
MOST_LAYERS = 28
SAMPLE = 32  # texts


def rope() -> dict:
    """How far each pair turns per position, for the two bases of ModernBERT-base."""
    kinds = {"full_attention": "global layers", "sliding_attention": "local layers"}
    bases = []
    for kind, name in kinds.items():
        theta = BASE.rope_parameters[kind]["rope_theta"]
        frequencies = inverse_frequencies(BASE.head_dim, theta).tolist()
        bases.append({"name": name, "theta": theta, "frequencies": frequencies})
    return {
        "bases": bases,
        "context": BASE.max_position_embeddings,
        "window": BASE.local_attention,
    }


def window() -> dict:
    """Which layers are global, for every choice of how often; True is global."""
    patterns = {
        str(n): [kind == "full_attention" for kind in layer_pattern(MOST_LAYERS, n)]
        for n in range(1, 7)
    }
    return {
        "patterns": patterns | {"never": [False] * MOST_LAYERS},
        "every": str(BASE.global_attn_every_n_layers),
        "layers": BASE.num_hidden_layers,
        "half_window": BASE.half_window,
        "length": BASE.max_position_embeddings,
    }


def padding() -> dict:
    """Lengths in tokens of three sets of texts."""
    tokenizer = Tokenizer.from_pretrained("mini")
    articles = data.vital_articles()
    texts = list(itertools.islice(articles.documents, SAMPLE))
    longest = 512
    return {
        "samples": {
            f"{SAMPLE} summaries from Wikipedia": [len(ids) for ids in tokenizer(texts).input_ids],
            "the texts of the benchmark": list(skewed_lengths(SAMPLE, longest)),
            "all of one length": [longest // 4] * SAMPLE,
        },
        "batch": 8,
        "capacity": longest,
    }


def tiles() -> dict:
    """The steps of FlashAttention over chapter 8's scores, for tiles of several sizes."""
    drawing = torch.Generator().manual_seed(3)
    scores = 2 * torch.randn(8, 8, generator=drawing)
    values = torch.randint(0, 10, (8,), generator=drawing).float()
    runs = {}
    for half_window in (None, 2):
        for rows in (2, 4, 8):
            for cols in (1, 2, 4, 8):
                view = TileView(scores.double(), values.double(), rows, cols, half_window)
                steps = [
                    {"top": top, "left": left, "last": last, "rows": [_numbers(r) for r in table]}
                    for top, left, last, table in view.steps
                ]
                runs[f"{rows}×{cols}×{half_window or 'none'}"] = {
                    "tiles": view.tiles,
                    "steps": steps,
                }
    return {
        "scores": [[round(s, 4) for s in row] for row in scores.tolist()],
        "values": values.tolist(),
        "runs": runs,
    }


def _numbers(row: tuple) -> list[float | None]:
    """Query, maximum, factor, sum and accumulator of a row; no number stands for −∞."""
    query, _, *running = row
    return [query, *(None if x == float("-inf") else round(x, 6) for x in running)]


EXPLORERS = {
    "rope": rope,
    "window": window,
    "padding": padding,
    "tiles": tiles,
}


def page() -> str:
    """The HTML that the page of the explorers includes: palette, data and scripts."""
    palette = "".join(f"--mb-{name}:{value};" for name, value in plots.PALETTE.items())
    parts = [
        '<link rel="stylesheet" href="../_static/explorers/explorers.css">',
        f"<style>:root{{{palette}}}</style>",
    ]
    for name, compute in EXPLORERS.items():
        # "<" would let a text end the script.
        text = json.dumps(compute(), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text = text.replace("<", "\\u003c")
        parts.append(f'<script type="application/json" id="mb-data-{name}">{text}</script>')
    for name in ("common", *EXPLORERS):
        parts.append(f'<script defer src="../_static/explorers/{name}.js"></script>')
    return "\n".join(parts)
