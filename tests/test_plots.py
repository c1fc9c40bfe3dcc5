"""The book's figures: the map of the model, the palette, the cost card."""

import json
import subprocess
import sys
from itertools import combinations

import pytest
from matplotlib.colors import to_rgb

from modernbert_mini import plots


@pytest.fixture(autouse=True)
def no_display():
    import matplotlib
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    with matplotlib.rc_context():
        yield
    plt.close("all")


def contrast(one: str, other: str) -> float:
    """Contrast ratio as WCAG 2 defines it."""

    def luminance(colour):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def bold(figure) -> list[str]:
    return [t.get_text() for t in figure.axes[0].texts if t.get_weight() == "bold"]


def test_the_map_lights_what_it_is_asked_to():
    assert bold(plots.model_map()) == []
    assert bold(plots.model_map("rope")) == ["rope"]
    assert bold(plots.model_map("unpadding", "head")) == ["unpad", "re-pad", "head"]
    assert bold(plots.model_map("norm")).count("norm") == 3


@pytest.mark.parametrize("part", plots.PARTS)
def test_every_part_can_be_lit(part):
    assert bold(plots.model_map(part))


def test_the_map_is_the_same_whatever_is_lit():
    def words(figure):
        return [(t.get_text(), t.get_position()) for t in figure.axes[0].texts]

    assert words(plots.model_map()) == words(plots.model_map(*plots.PARTS))


def test_words_stay_inside_their_boxes():
    figure = plots.model_map(*plots.PARTS)
    figure.canvas.draw()
    patches = [p.get_window_extent() for p in figure.axes[0].patches]
    for text in figure.axes[0].texts:
        if text.get_weight() == "bold":
            box = text.get_window_extent()
            assert any(
                p.x0 <= box.x0 and p.x1 >= box.x1 and p.y0 <= box.y0 and p.y1 >= box.y1
                for p in patches
            ), text.get_text()


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="not on the map.*'pooling'.*rope"):
        plots.model_map("pooling")


def test_the_map_is_not_shown_twice():
    import matplotlib.pyplot as plt

    plots.model_map("rope")
    assert not plt.get_fignums()


def test_ink_reads_on_the_card_and_lines_differ_in_dash_and_colour():
    assert contrast(plots.INK, plots.CARD) > 10
    assert contrast(plots.MUTED, plots.CARD) > 4.5 and contrast(plots.MUTED, plots.FAINT) > 4.5
    plt = plots.style()
    cycle = list(plt.rcParams["axes.prop_cycle"])
    assert all(contrast(line["color"], plots.CARD) > 2 for line in cycle)
    for one, other in combinations(cycle, 2):
        assert one["color"] != other["color"] and one["linestyle"] != other["linestyle"]


def recorded(tmp_path, monkeypatch, costs):
    if costs is not None:
        (tmp_path / "recorded").mkdir()
        (tmp_path / "recorded" / "costs.json").write_text(json.dumps(costs))
    monkeypatch.setattr(plots, "files", lambda package: tmp_path)


def test_the_cost_card_says_what_was_measured(tmp_path, monkeypatch):
    cost = {"seconds": 20.4, "peak_ram_mb": 512, "date": "2026-01-02", "cpu": "a <CPU>, 2 cores"}
    cost |= {"hub": "offline"}
    long = {**cost, "seconds": 150, "fetched_mb": 598.6, "hub": "asked"}
    recorded(tmp_path, monkeypatch, {"03_rope": {**cost, "fetched_mb": 0.0}, "11_long": long})
    card = plots.cost_card("03_rope")
    assert repr(card).startswith(
        "20 s on a CPU · 0.5 GB of memory at most · nothing fetched, with the Hub"
    )
    assert "2026-01-02 on a &lt;CPU&gt;, 2 cores" in card._repr_html_()
    assert "2.5 minutes" in repr(plots.cost_card("11_long"))
    assert "599 MB fetched" in repr(plots.cost_card("11_long"))


@pytest.mark.parametrize("costs", [None, {}, {"01_tour": {}}])
def test_a_chapter_without_a_record_says_so(tmp_path, monkeypatch, costs):
    recorded(tmp_path, monkeypatch, costs)
    assert repr(plots.cost_card("03_rope")) == "not yet measured"


def test_importing_plots_does_not_import_matplotlib():
    code = "import sys, modernbert_mini.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
