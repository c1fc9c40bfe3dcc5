"""What every figure of the book shares: one palette, one style, the map of the model, the costs.

Figures are drawn on their own light card, so they read the same on a white page and in dark
mode. The colours are those of Okabe and Ito, "Color Universal Design" (2008,
https://jfly.uni-koeln.de/color/), which colour-blind readers can tell apart; lines differ in
their dashes too. matplotlib is imported on first use.
"""

import html
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",  # pale: for areas, not for thin lines
    "yellow": "#F0E442",  # pale: for areas, not for thin lines
    "black": "#000000",
}
INK, MUTED, RULE, CARD, FAINT = "#1B1F24", "#5C6470", "#C9CED6", "#FBFBF9", "#EEF0F2"

ARROW = {"arrowstyle": "-|>", "color": MUTED, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}


def style() -> Any:
    """Set the book's figure style and return `matplotlib.pyplot`: `plt = plots.style()`."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    lines = [PALETTE[name] for name in ("blue", "vermillion", "green", "purple", "orange")]
    plt.rcParams.update(
        {
            "axes.axisbelow": True,
            "axes.edgecolor": MUTED,
            "axes.facecolor": CARD,
            "axes.grid": True,
            "axes.labelcolor": INK,
            "axes.prop_cycle": cycler(color=lines)
            + cycler(linestyle=["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11.5,
            "axes.titleweight": "bold",
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "figure.facecolor": CARD,
            "figure.figsize": (6.6, 3.4),
            "font.size": 10.5,
            "grid.color": RULE,
            "grid.linewidth": 0.6,
            "image.cmap": "cividis",
            "legend.frameon": False,
            "lines.linewidth": 2,
            "savefig.facecolor": CARD,
            "text.color": INK,
            "xtick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.color": MUTED,
            "ytick.labelcolor": INK,
        }
    )
    return plt


# part -> (words, centre x, centre y, width) of every box that carries its name, in map units
_BOXES = {
    "tokenizer": [("tokenizer", 2.35, 5.6, 1.5)],
    "unpadding": [("unpad", 4.05, 5.6, 1.0), ("re-pad", 5.35, 0.75, 1.05)],
    "embeddings": [("embeddings", 5.75, 5.6, 1.6)],
    "norm": [
        ("norm", 7.55, 5.6, 1.0),
        ("norm", 1.35, 3.1, 1.0),
        ("norm", 5.75, 3.1, 1.0),
        ("final norm", 1.9, 0.75, 1.45),
    ],
    "attention": [("attention", 3.35, 3.1, 2.1)],
    "rope": [("rope", 2.83, 2.9, 0.88)],
    "window": [("window", 3.87, 2.9, 0.98)],
    "geglu": [("GeGLU", 7.25, 3.1, 1.15)],
    "head": [("head", 3.75, 0.75, 1.0)],
    "checkpoint": [("checkpoint: the weights on disk", 4.6, 1.52, 4.6)],
}
PARTS = tuple(_BOXES)


def model_map(*lit: str) -> "Figure":
    """Draw the map of the model, the same in every chapter, with the named parts lit.

    Args:
        lit: any of `PARTS`; none draws the plain map.

    Returns:
        The figure, closed for pyplot, so that a cell which ends with this call shows it once.

    Raises:
        ValueError: a name that is not on the map.
    """
    unknown = set(lit) - set(PARTS)
    if unknown:
        raise ValueError(f"not on the map: {sorted(unknown)}; the parts are {', '.join(PARTS)}")
    plt = style()
    figure, ax = plt.subplots(figsize=(7.2, 4.6))
    ax.set(xlim=(0, 8.6), ylim=(0.1, 6.1))
    ax.axis("off")

    # the stack of layers, drawn as a card with copies behind it
    for shift in (0.16, 0.08, 0.0):
        _box(ax, 4.3 + shift, 3.25 + shift, 8.1, 2.0, fill="white", edge=RULE, radius=0.15)
    ax.text(0.4, 4.02, "N layers", color=MUTED, fontsize=9.5, style="italic", va="center")
    for part, boxes in _BOXES.items():
        for words, x, y, width in boxes:
            _part(ax, part, words, x, y, width, bright=part in lit)

    # the words in, the words out
    ax.text(0.75, 5.6, "text", ha="center", va="center", fontsize=11.5, family="monospace")
    ax.text(7.2, 0.75, "prediction", ha="center", va="center", fontsize=11.5, family="monospace")
    top, middle, bottom = 5.6, 3.1, 0.75
    _arrows(ax, top, (1.15, 1.6), (3.1, 3.55), (4.55, 4.95), (6.55, 7.05))
    _arrows(ax, middle, (0.45, 0.85), (1.85, 2.3), (4.4, 4.68), (4.92, 5.25), (6.25, 6.67))
    _arrows(ax, middle, (7.82, 8.03))
    _arrows(ax, bottom, (0.45, 1.17), (2.62, 3.25), (4.25, 4.82), (5.88, 6.45))
    # from row to row, and around each sub-layer: the residual stream
    _path(ax, (8.05, top), (8.35, top), (8.35, 4.72), (0.12, 4.72), (0.12, middle), (0.5, middle))
    _path(
        ax, (8.27, middle), (8.5, middle), (8.5, 2.04), (0.12, 2.04), (0.12, bottom), (0.5, bottom)
    )
    for x in (2.9, 4.6, 6.3):  # the checkpoint fills every box above it
        ax.annotate("", xy=(x, 2.2), xytext=(x, 1.75), arrowprops={**ARROW, "linestyle": ":"})
    for start, plus in ((0.55, 4.8), (4.95, 8.15)):
        _path(ax, (start, middle), (start, 3.86), (plus, 3.86), (plus, middle + 0.13), head=True)
        ax.text(plus, middle, "+", ha="center", va="center", fontsize=10.5, color=INK)
        ax.add_patch(plt.Circle((plus, middle), 0.12, fill=False, color=MUTED, lw=1.2))
    plt.close(figure)
    return figure


def _part(
    ax: "Axes", part: str, words: str, x: float, y: float, width: float, *, bright: bool
) -> None:
    tall = {"attention": 1.05, "rope": 0.42, "window": 0.42, "checkpoint": 0.42}.get(part, 0.62)
    edge, fill = (PALETTE["vermillion"], "#FFD58A") if bright else (RULE, FAINT)
    _box(ax, x, y, width, tall, fill=fill, edge=edge, radius=0.1, width=2.2 if bright else 1.0)
    ax.text(
        x,
        y + (0.32 if part == "attention" else 0.0),
        words,
        ha="center",
        va="center",
        color=INK if bright else MUTED,
        fontsize=10.5,
        weight="bold" if bright else "normal",
    )


def _box(
    ax: "Axes",
    x: float,
    y: float,
    w: float,
    h: float,
    *,
    fill: str,
    edge: str,
    radius: float,
    width: float = 1.0,
) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner, shape = (x - w / 2, y - h / 2), f"round,pad=0,rounding_size={radius}"
    ax.add_patch(FancyBboxPatch(corner, w, h, shape, facecolor=fill, edgecolor=edge, lw=width))


def _arrows(ax: "Axes", y: float, *spans: tuple[float, float]) -> None:
    for start, end in spans:
        _path(ax, (start, y), (end, y), head=True)


def _path(ax: "Axes", *points: tuple[float, float], head: bool = False) -> None:
    *_, before, last = points
    ax.plot(*zip(*points, strict=True), color=MUTED, lw=1.2, ls="-", solid_joinstyle="round")
    if head:
        ax.annotate("", xy=last, xytext=before, arrowprops=ARROW)


@dataclass(frozen=True)
class CostCard:
    """What a chapter cost when it last ran; shown as a card in notebooks, as a line elsewhere."""

    words: str

    @classmethod
    def of(cls, record: dict | None) -> "CostCard":
        """The card of one record: `seconds`, `peak_ram_mb`, `fetched_mb`, `hub`, `date`, `cpu`."""
        if record is None:
            return cls("not yet measured")
        seconds = record["seconds"]
        time = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"
        return cls(
            f"{time} on a CPU · {record['peak_ram_mb'] / 1024:.1f} GB of memory at most · "
            f"{_fetched(record)} · measured {record['date']} on {record['cpu']}"
        )

    def __repr__(self) -> str:
        return self.words

    def _repr_html_(self) -> str:
        return (
            '<div style="border-left:5px solid rgb(86,180,233);background:rgba(86,180,233,.12);'
            'color:inherit;padding:.5em 1em;border-radius:4px">'
            f"<b>Cost</b> · {html.escape(self.words)}</div>"
        )


def _fetched(record: dict) -> str:
    if record["fetched_mb"] >= 1:
        return f"{record['fetched_mb']:.0f} MB fetched"
    # A run that may not ask the Hub says nothing about what a run that may would fetch.
    return "nothing fetched" + (", with the Hub switched off" if record["hub"] == "offline" else "")


def cost_card(chapter: str) -> CostCard:
    """The measured cost of a chapter, such as "03_rope", from its last recorded run."""
    path = files("modernbert_mini") / "recorded" / "costs.json"
    costs = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return CostCard.of(costs.get(chapter))


def cost_table(costs: dict[str, dict]) -> str:
    """What each chapter costs, as a Markdown table; the records as `CostCard.of` takes them."""
    if not costs:
        return "Not measured yet."
    rows = ["| chapter | seconds | peak memory |", "|---|--:|--:|"]
    rows += [
        f"| `{name}` | {c['seconds']:.0f} | {c['peak_ram_mb']:,.0f} MB |"
        for name, c in sorted(costs.items())
    ]
    total = sum(c["seconds"] for c in costs.values())
    rows.append(f"| all | {total:.0f} | |")
    runs = {f"{c['cpu']}, torch {c['torch']}, {c['date']}, {_fetched(c)}" for c in costs.values()}
    return "\n".join([*rows, "", f"Measured on {'; '.join(sorted(runs))}."])
