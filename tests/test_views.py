"""The kernel-free views: what the HTML says is what the weights are."""

import base64
import html
import re
import struct
import zlib
from html.parser import HTMLParser

import pytest
import torch

from modernbert_mini import views

TOKENS = ["[CLS]", " a", " <b>", " a", "\n", ""]
L, LAYERS, H = len(TOKENS), 2, 3


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(LAYERS, H, L, L, generator=generator)).softmax(-1)


@pytest.fixture
def page(weights):
    return views.attention_view(TOKENS, weights, start=(1, 2, 4))._repr_html_()


class Page(HTMLParser):
    """What a page consists of; `balanced` says whether every element is closed."""

    def __init__(self, source):
        super().__init__()
        self.open, self.balanced, self.tags, self.inputs, self.lines = [], True, [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "input":
            self.inputs.append(dict(attributes))
        elif tag != "br":
            self.open.append(tag)
        if tag == "p":
            self.lines.append("")

    def handle_endtag(self, tag):
        self.balanced &= self.open.pop() == tag

    def handle_data(self, data):
        if "p" in self.open:
            self.lines[-1] += data


def read_png(data: bytes) -> tuple[list[list[int]], bytes]:
    """Palette index of each pixel, and the opacity of each palette entry."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + body
        )
        chunks[kind], at = body, at + 12 + size
    width, height, bits, colours = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (bits, colours) == (4, 3) and len(chunks[b"PLTE"]) == 3 * len(chunks[b"tRNS"])
    raw, stride = zlib.decompress(chunks[b"IDAT"]), (width + 1) // 2 + 1
    rows = []
    for y in range(height):
        line = raw[y * stride : (y + 1) * stride]
        assert line[0] == 0
        rows.append([half for byte in line[1:] for half in (byte >> 4, byte & 15)][:width])
    return rows, chunks[b"tRNS"]


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_a_picture_holds_the_weights(length):
    weights = torch.rand(length, length, generator=torch.Generator().manual_seed(length))
    rows, opacity = read_png(views._png(weights))
    assert len(rows) == length
    alpha = torch.tensor([[opacity[i] for i in row] for row in rows]) / 255
    back = (alpha / views.STRONGEST) ** 2
    torch.testing.assert_close(back, weights, atol=0.07, rtol=0)  # 16 shades of the square root


def test_each_head_has_its_picture_and_its_rule(page, weights):
    pictures = re.findall(
        r":has\(\.l>:nth-of-type\((\d)\) :checked\):has\(\.h>:nth-of-type\((\d)\) :checked\)"
        r"\{--m:url\(data:image/png;base64,([^)]+)\)\}",
        page,
    )
    assert len(pictures) == LAYERS * H
    for layer, head, data in pictures:
        expected = views._shades(weights[int(layer) - 1, int(head) - 1]).tolist()
        assert read_png(base64.b64decode(data))[0] == expected


def test_lines_name_the_largest_weights_head_by_head(page, weights):
    lines = Page(page).lines
    assert len(lines) == LAYERS * H * L
    names = ["[CLS]", "␣a(1)", "␣<b>", "␣a(3)", "⏎", "∅"]
    for number, line in enumerate(lines):
        row = weights.flatten(0, 2)[number]
        query, found = line.split(" → ")
        assert query == names[number % L]
        first = found.split(" · ")[0]
        assert first == f"{names[row.argmax()]} {row.max():.0%}"
        percents = [int(p) for p in re.findall(r" (\d+)%", found)]
        assert percents == sorted(percents, reverse=True) and 0 < len(percents) <= 4


def test_a_rule_for_every_token_shows_its_line_and_its_row(page):
    for i in range(1, L + 1):
        assert f".t>:nth-of-type({i}):hover){{--q:{i - 1}}}" in page
        assert f".t>:nth-of-type({i}):hover) .p p:nth-child({i}){{display:block" in page
    assert f"nth-of-type({L + 1}):hover" not in page


def test_everything_is_a_radio_button_of_its_group(page):
    inputs = Page(page).inputs
    assert len(inputs) == LAYERS + H + L and all(i["type"] == "radio" for i in inputs)
    groups = {}
    for i in inputs:
        groups.setdefault(i["name"], []).append("checked" in i)
    assert [chosen.index(True) for chosen in groups.values()] == [1, 2, 4]
    assert [sum(chosen) for chosen in groups.values()] == [1, 1, 1]


def test_the_page_needs_nothing_from_outside_and_runs_nothing(page):
    assert Page(page).balanced and not Page(page).open
    assert "script" not in Page(page).tags and "http" not in page
    assert not re.search(r"\bon\w+=", page)
    assert html.escape("<b>") in page and "<b>␣a" in page and "␣<b>" not in page


def test_two_copies_share_no_radio_button(weights):
    view = views.attention_view(TOKENS, weights)
    one, other = (
        {i["name"] for i in Page(v).inputs} for v in (view._repr_html_(), view._repr_html_())
    )
    assert not one & other


def test_a_terminal_gets_the_largest_weights(weights):
    lines = repr(views.attention_view(TOKENS, weights)).splitlines()
    assert len(lines) == 1 + LAYERS * H and lines[0].startswith("attention of 6 tokens in 2 layers")
    query, key = divmod(int(weights[1, 2].argmax()), L)
    names = ["[CLS]", "␣a(1)", "␣<b>", "␣a(3)", "⏎", "∅"]
    largest = f"layer 1 head 2: {names[query]} → {names[key]} {weights[1, 2].max():.2f}, "
    assert lines[-1].startswith(largest)


def test_sixty_tokens_of_a_small_model_stay_small():
    weights = torch.rand(6, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    view = views.attention_view(["token"] * 60, weights / weights.sum(-1, keepdim=True))
    assert len(view._repr_html_()) < 300_000


def test_one_token_works():
    assert Page(views.attention_view(["x"], torch.ones(1, 1, 1, 1))._repr_html_()).lines == [
        "x → x 100%"
    ]


@pytest.mark.parametrize(
    ("tokens", "shape", "fill", "start", "said"),
    [
        (["a"], (1, 1, 2, 2), 0.5, (0, 0, 0), "for 1 tokens"),
        (["a", "b"], (1, 2, 2), 0.5, (0, 0, 0), "torch.cat"),
        (["a", "b"], (1, 1, 2, 3), 0.5, (0, 0, 0), "expected"),
        ([], (1, 1, 0, 0), 0.5, (0, 0, 0), "for 0 tokens"),
        (["a", "b"], (1, 1, 2, 2), 3.0, (0, 0, 0), "are these scores?"),
        (["a", "b"], (1, 1, 2, 2), -0.1, (0, 0, 0), "are these scores?"),
        (["a", "b"], (1, 1, 2, 2), float("nan"), (0, 0, 0), "are these scores?"),
        (["a", "b"], (60, 60, 2, 2), 0.5, (0, 0, 0), "fewer layers"),
        (["a", "b"], (1, 1, 2, 2), 0.5, (1, 0, 0), "start (1, 0, 0)"),
        (["a", "b"], (1, 1, 2, 2), 0.5, (0, 0, 2), "start (0, 0, 2)"),
    ],
)
def test_what_cannot_be_shown_is_refused(tokens, shape, fill, start, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        views.attention_view(tokens, torch.full(shape, fill), start)


def test_weights_of_a_training_run_in_half_precision_are_taken(weights):
    half = weights.bfloat16().requires_grad_()
    assert "layer 0 head 0" in repr(views.attention_view(TOKENS, half))
