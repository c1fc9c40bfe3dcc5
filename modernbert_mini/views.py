"""Interactive views that need no kernel: HTML and CSS alone, so they work in the saved page too.

Every view is an object: a notebook shows its HTML, a terminal its `repr`. The HTML carries no
script and fetches nothing; choices are radio buttons, so the keyboard reaches them. It takes its
text colour from the page around it, and so it reads in light and in dark.
"""

import html
import struct
import uuid
import zlib
from base64 import b64encode
from collections.abc import Sequence

import torch

MAX_ROWS = 6000  # one line of text per layer, head and token: about 300 kB of HTML
SHADES = 16  # of colour: each pixel of a map is four bits
# Between the two blues of the book's palette: at this strength both black and white words stay
# readable on it, on a light page and on a dark one.
BLUE, STRONGEST = (30, 130, 200), 0.6


def attention_view(
    tokens: Sequence[str], weights: torch.Tensor, start: tuple[int, int, int] = (0, 0, 0)
) -> "AttentionView":
    """Show which token looks where, head by head.

    In a notebook: choose a layer and a head, then hover over a token, tap it, or step through
    them with the arrow keys. The colours say where that token looks, a line gives the largest
    weights in words, and a square shows all tokens at once.

    Args:
        tokens: L strings; a leading space is drawn as "␣".
        weights: (layers, H, L, L) between 0 and 1, the row is the token that looks. For a text
            alone in its batch, that is `torch.cat(output.attentions)`.
        start: layer, head and token that are chosen at first.

    Raises:
        ValueError: where the shape does not fit the tokens, a number is no weight, or there is
            too much for a page.

    Chapter 5 uses it.
    """
    weights = torch.as_tensor(weights).detach().float().cpu()
    length = len(tokens)
    if weights.dim() != 4 or weights.shape[-2:] != (length, length) or not weights.numel():
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} for {length} tokens; expected "
            f"(layers, heads, {length}, {length}). One text: torch.cat(output.attentions)."
        )
    if not ((weights >= 0) & (weights <= 1.001)).all():
        raise ValueError("attention weights lie between 0 and 1; are these scores?")
    if weights[..., 0].numel() > MAX_ROWS:
        raise ValueError(
            f"{weights[..., 0].numel():,} rows of weights; a page takes {MAX_ROWS:,}. "
            "Show fewer layers or heads (weights[:4]) or a shorter text."
        )
    sizes = weights.shape[:3]
    if not all(0 <= i < size for i, size in zip(start, sizes, strict=True)):
        raise ValueError(f"start {start}; there are {tuple(sizes)} layers, heads and tokens")
    return AttentionView(list(tokens), weights, start)


class AttentionView:
    """What `attention_view` returns: HTML in a notebook, the largest weights as text elsewhere.

    Attributes:
        tokens: L strings.
        weights: (layers, H, L, L) float32.
        start: layer, head and token that are chosen at first.
    """

    def __init__(self, tokens: list[str], weights: torch.Tensor, start: tuple[int, int, int]):
        self.tokens = tokens
        self.weights = weights
        self.start = start
        visible = [t.replace(" ", "␣").replace("\n", "⏎") or "∅" for t in tokens]
        # A word that stands twice is told apart by its position.
        self._names = [f"{t}({i})" if visible.count(t) > 1 else t for i, t in enumerate(visible)]
        self._visible = visible

    def __repr__(self) -> str:
        layers, heads, length, _ = self.weights.shape
        lines = [
            f"attention of {length} tokens in {layers} layers × {heads} heads; "
            "the three largest weights of each head"
        ]
        for layer in range(layers):
            for head in range(heads):
                values, places = self.weights[layer, head].flatten().topk(min(3, length**2))
                pairs = [
                    f"{self._names[place // length]} → {self._names[place % length]} {value:.2f}"
                    for value, place in zip(values.tolist(), places.tolist(), strict=True)
                ]
                lines.append(f"layer {layer} head {head}: " + ", ".join(pairs))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        # Two copies on one page must not share their radio buttons.
        me = f"av{uuid.uuid4().hex[:8]}"
        layers, heads, length, _ = self.weights.shape
        layer, head, token = self.start
        choices = _choices(me, "l", "Layer", [f"<span>{i}</span>" for i in range(layers)], layer)
        choices += _choices(me, "h", "Head", [f"<span>{i}</span>" for i in range(heads)], head)
        chips = [
            f'<span style="--i:{i}">{html.escape(t)}</span>' for i, t in enumerate(self._visible)
        ]
        # Layer by layer, head by head, one paragraph per token that looks.
        panels = "".join(
            "<div hidden>" + "".join(map(self._line, range(length), rows)) + "</div>"
            for rows in self.weights.flatten(0, 1)
        )
        return (
            f'<div id="{me}" class="mb-av"><style>{self._css(me)}</style>'
            f'<div class="c">{choices}</div>'
            + _choices(me, "t", "Token that looks: hover, tap, or step with ← →", chips, token)
            + f'<div class="r"><div class="p" aria-live="polite">{panels}</div>'
            '<div class="s"><div class="m" role="img" aria-label="All weights of this head as a '
            'square of colours: each row is a token that looks."></div>'
            "<small>row: who looks<br>column: at whom</small></div></div>"
            f'<small class="k">weight {_legend()}</small></div>'
        )

    def _line(self, query: int, row: torch.Tensor) -> str:
        """Where one token looks, in words."""
        values, places = row.topk(min(4, len(row)))
        found = [
            f"{html.escape(self._names[place])} {value:.0%}"
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
            if value >= 0.005
        ]
        return f"<p hidden><b>{html.escape(self._names[query])}</b> → {' · '.join(found)}</p>"

    def _css(self, me: str) -> str:
        layers, heads, length, _ = self.weights.shape
        rules = [_STYLE.replace("#ID", f"#{me}").replace("LENGTH", str(length))]
        for i in range(layers * heads):
            chosen = (
                f"#{me}:has(.l>:nth-of-type({i // heads + 1}) :checked)"
                f":has(.h>:nth-of-type({i % heads + 1}) :checked)"
            )
            picture = b64encode(_png(self.weights[i // heads, i % heads])).decode()
            rules.append(f"{chosen}{{--m:url(data:image/png;base64,{picture})}}")
            rules.append(f"{chosen} .p>:nth-child({i + 1}){{display:block!important}}")
        for i in range(1, length + 1):
            # A token under the pointer goes before the chosen one.
            looks = (
                f"#{me}:not(:has(.t>:hover)):has(.t>:nth-of-type({i}) :checked)",
                f"#{me}:has(.t>:nth-of-type({i}):hover)",
            )
            rules.append(f"{','.join(looks)}{{--q:{i - 1}}}")
            lines = ",".join(f"{look} .p p:nth-child({i})" for look in looks)
            rules.append(f"{lines}{{display:block!important}}")
        return "".join(rules)


# A map is one small picture, a pixel per weight. Each word shows the pixel of its own column in
# the row of the token that looks: a picture scaled so that one pixel is twice as wide and high as
# the word, moved so that the pixel's middle lies under it.
_STYLE = """
#ID{--q:0;color:inherit;font-size:1em;line-height:1.5;max-width:46em;margin:.6em 0}
#ID fieldset{border:0;margin:0 0 .5em;padding:0;min-width:0}
#ID legend{float:none;width:auto;font-size:.85em;margin:0;padding:0;opacity:.8}
#ID label{display:inline-block;position:relative;cursor:pointer;margin:0 .2em .25em 0}
#ID input{position:absolute;inset:0;width:100%;height:100%;margin:0;opacity:0;cursor:pointer}
#ID label>span{display:block;min-width:1.6em;padding:.15em .45em;text-align:center;
border:1px solid rgba(128,128,128,.45);border-radius:4px;white-space:pre}
#ID label:has(:checked)>span{outline:2px solid currentColor;outline-offset:-1px;font-weight:600}
#ID label:has(:focus-visible)>span{outline:3px solid #D55E00}
#ID .c{display:flex;flex-wrap:wrap;gap:0 2em}
#ID .t span{font-family:ui-monospace,monospace;font-size:.9em;image-rendering:pixelated;
background:var(--m) calc((2*var(--i) + .5)/(2*LENGTH - 1)*100%)
calc((2*var(--q) + .5)/(2*LENGTH - 1)*100%)/calc(200%*LENGTH) calc(200%*LENGTH)}
#ID .t label:hover>span{outline:2px solid currentColor;outline-offset:-1px}
#ID .r{display:flex;flex-wrap:wrap;gap:.5em 1.5em;align-items:flex-start}
#ID .p{flex:1 1 16em;min-height:3em}
#ID .p p{margin:.2em 0;overflow-wrap:anywhere}
#ID .s{display:flex;gap:.6em;align-items:flex-end}
#ID .m{position:relative;width:11em;height:11em;border:1px solid rgba(128,128,128,.45);
background:var(--m) 0 0/100% 100%;image-rendering:pixelated}
#ID .m::after{content:"";position:absolute;left:-3px;right:-3px;box-sizing:border-box;
top:calc(100%*var(--q)/LENGTH - 1px);height:calc(100%/LENGTH + 2px);border:2px solid currentColor}
#ID small{line-height:1.3}
#ID .s small{opacity:.8}
#ID .k span{padding:.1em .5em;margin-left:.3em;border:1px solid rgba(128,128,128,.45)}
""".replace("\n", "")


def _choices(me: str, group: str, title: str, names: list[str], chosen: int) -> str:
    """A row of radio buttons with these names, which are HTML."""
    buttons = "".join(
        f'<label><input type="radio" name="{me}{group}"{" checked" * (i == chosen)}>{name}</label>'
        for i, name in enumerate(names)
    )
    return f'<fieldset class="{group}"><legend>{title}</legend>{buttons}</fieldset>'


def _alpha(shade: int) -> float:
    """How opaque a shade is. Shades follow the weight's square root: weak links show, too."""
    return STRONGEST * shade / (SHADES - 1)


def _shades(weights: torch.Tensor) -> torch.Tensor:
    """The shade of each weight: integers from 0 to SHADES − 1."""
    return (weights.clamp(0, 1).sqrt() * (SHADES - 1)).round().byte()


def _legend() -> str:
    steps = (0.0, 0.05, 0.25, 0.5, 1.0)
    return "".join(
        f'<span style="background:rgba({",".join(map(str, BLUE))},{_alpha(shade):.2f})">'
        f"{step:.0%}</span>"
        for step, shade in zip(steps, _shades(torch.tensor(steps)).tolist(), strict=True)
    )


def _png(weights: torch.Tensor) -> bytes:
    """A picture of (L, L) weights: one colour, a pixel each, four bits a pixel."""
    shades = _shades(weights).tolist()
    length = len(shades)
    lines = bytearray()
    for row in shades:
        row = [*row, 0] if length % 2 else row  # two pixels to the byte
        lines.append(0)  # each line starts with its filter: none
        lines += bytes(16 * a + b for a, b in zip(row[::2], row[1::2], strict=True))
    opacity = bytes(round(255 * _alpha(shade)) for shade in range(SHADES))

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    # width, height, bits a pixel, 3 = palette; then deflate, default filters, not interlaced
    header = struct.pack(">IIBBBBB", length, length, 4, 3, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"PLTE", bytes(BLUE) * SHADES)
        + chunk(b"tRNS", opacity)
        + chunk(b"IDAT", zlib.compress(bytes(lines), 9))
        + chunk(b"IEND", b"")
    )


MAX_STEPS = 80  # of a tile view: more would be long to step through


def tile_view(
    scores: torch.Tensor,
    values: torch.Tensor,
    rows: int,
    cols: int,
    half_window: int | None = None,
) -> "TileView":
    """Show the online softmax at work, one tile of the score matrix after the other.

    In a notebook: choose a step, or go through them with the arrow keys. A frame moves over the
    square of scores; the table beside it holds the running numbers of the queries in the frame.

    Args:
        scores: (L, L), the row is the query.
        values: (L,), one number for each key.
        rows: queries in a tile.
        cols: keys in a tile.
        half_window: W, or None; tiles that lie wholly outside the window are left out.

    Raises:
        ValueError: where shapes do not fit, or there are too many steps for a page.

    Chapter 8 uses it.
    """
    scores, values = torch.as_tensor(scores).double(), torch.as_tensor(values).double()
    length = len(values)
    if values.dim() != 1 or not length or tuple(scores.shape) != (length, length):
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} and values of shape {tuple(values.shape)}; "
            "expected (L, L) and (L,)"
        )
    if rows < 1 or cols < 1:
        raise ValueError(f"tiles of {rows} × {cols}; both must be 1 or more")
    view = TileView(scores, values, rows, cols, half_window)
    if len(view.steps) > MAX_STEPS:
        raise ValueError(f"{len(view.steps)} steps; a page takes {MAX_STEPS}. Take larger tiles.")
    return view


class TileView:
    """What `tile_view` returns: HTML in a notebook, the same steps as text elsewhere.

    Attributes:
        steps: for each tile its first query and key, and for each of its queries
            (query, scores, maximum, factor, sum, accumulator); hidden scores are −∞.
        tiles: how many tiles there are in all, those that are left out included.
    """

    def __init__(self, scores, values, rows, cols, half_window):
        length = len(values)
        self.rows, self.cols, self.length = rows, cols, length
        self.steps = []
        self.tiles = -(-length // rows) * -(-length // cols)
        place = torch.arange(length)
        if half_window is not None:
            hidden = (place[:, None] - place).abs() > half_window
            scores = scores.masked_fill(hidden, -torch.inf)
        for top in range(0, length, rows):
            maximum = torch.full((min(rows, length - top),), -torch.inf, dtype=scores.dtype)
            total, mixed = torch.zeros_like(maximum), torch.zeros_like(maximum)
            for left in range(0, length, cols):
                tile = scores[top : top + rows, left : left + cols]
                if tile.isneginf().all():
                    continue
                new = torch.maximum(maximum, tile.amax(dim=1))
                shift = new.masked_fill(new.isneginf(), 0.0)
                factor, powers = (maximum - shift).exp(), (tile - shift[:, None]).exp()
                maximum, total = new, factor * total + powers.sum(dim=1)
                mixed = factor * mixed + powers @ values[left : left + cols]
                table = (maximum, factor, total, mixed)
                lines = zip(*(x.tolist() for x in (tile, *table)), strict=True)
                last = not (scores[top : top + rows, left + cols :] > -torch.inf).any()
                self.steps.append((top, left, last, [(top + i, *x) for i, x in enumerate(lines)]))

    def _told(self, number: int) -> str:
        top, left, *_ = self.steps[number]
        bottom, right = min(top + self.rows, self.length), min(left + self.cols, self.length)
        return f"step {number + 1}: queries {top}–{bottom - 1}, keys {left}–{right - 1}"

    def __repr__(self) -> str:
        lines = [f"{len(self.steps)} of {self.tiles} tiles, {self.length} queries and keys"]
        for number, (_, _, last, table) in enumerate(self.steps):
            lines.append(self._told(number))
            for query, _, maximum, factor, total, mixed in table:
                result = f", result {mixed / total:.3f}" if last else ""
                lines.append(
                    f"  query {query}: maximum {_number(maximum)}, factor {factor:.3f}, "
                    f"sum {total:.3f}, accumulator {mixed:.3f}{result}"
                )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        me = f"tv{uuid.uuid4().hex[:8]}"
        names = [f"<span>{i}</span>" for i in range(1, len(self.steps) + 1)]
        order = {step[:2]: i + 1 for i, step in enumerate(self.steps)}
        tiles = "".join(
            f'<i style="{self._place(top, left)};--n:{order.get((top, left), 0)}"'
            f"{'' if (top, left) in order else ' class=x'}></i>"
            for top in range(0, self.length, self.rows)
            for left in range(0, self.length, self.cols)
        )
        panels = "".join(
            f"<div hidden>{self._panel(number)}</div>" for number in range(len(self.steps))
        )
        return (
            f'<div id="{me}" class="mb-tv"><style>{self._css(me)}</style>'
            + _choices(me, "t", "Step: choose, or go on with ← →", names, 0)
            + '<div class="r"><div><div class="g" role="img" aria-label="The square of scores, cut '
            f'into tiles; a frame lies on the tile of this step.">{tiles}<b></b></div>'
            "<small>row: query, column: key<br>coloured: taken in · hatched: left out</small></div>"
            f'<div class="p" aria-live="polite">{panels}</div></div></div>'
        )

    def _place(self, top: int, left: int) -> str:
        high, wide = min(self.rows, self.length - top), min(self.cols, self.length - left)
        sizes = zip("yxhw", (top, left, high, wide), strict=True)
        return ";".join(f"--{name}:{100 * size / self.length:g}%" for name, size in sizes)

    def _panel(self, number: int) -> str:
        _, _, last, table = self.steps[number]
        head = "<tr><th>query<th>scores<th>maximum m<th>factor α<th>sum ℓ<th>accumu&shy;lator a"
        body = "".join(
            f"<tr><th>{query}<td>{' '.join(map(_number, scores))}<td>{_number(maximum)}"
            f"<td>{factor:.3f}<td>{total:.3f}<td>{mixed:.3f}"
            + (f"<td><b>{mixed / total:.3f}</b>" if last else "")
            for query, scores, maximum, factor, total, mixed in table
        )
        head += "<th>result a ÷ ℓ" if last else ""
        return f"<p>{self._told(number)}</p><table>{head}{body}</table>"

    def _css(self, me: str) -> str:
        rules = [_TILE_STYLE.replace("#ID", f"#{me}")]
        for number, (top, left, *_) in enumerate(self.steps):
            chosen = f"#{me}:has(.t>:nth-of-type({number + 1}) :checked)"
            rules.append(f"{chosen}{{--s:{number + 1}}}{chosen} b{{{self._place(top, left)}}}")
            rules.append(f"{chosen} .p>:nth-child({number + 1}){{display:block!important}}")
        return "".join(rules)


_TILE_STYLE = """
#ID{--s:1;color:inherit;font-size:1em;line-height:1.5;max-width:46em;margin:.6em 0}
#ID fieldset{border:0;margin:0 0 .5em;padding:0;min-width:0}
#ID legend{float:none;width:auto;font-size:.85em;margin:0;padding:0;opacity:.8}
#ID label{display:inline-block;position:relative;cursor:pointer;margin:0 .2em .25em 0}
#ID input{position:absolute;inset:0;width:100%;height:100%;margin:0;opacity:0;cursor:pointer}
#ID label>span{display:block;min-width:1.9em;padding:.15em .4em;text-align:center;
border:1px solid rgba(128,128,128,.45);border-radius:4px}
#ID label:has(:checked)>span{outline:2px solid currentColor;outline-offset:-1px;font-weight:600}
#ID label:has(:focus-visible)>span{outline:3px solid #D55E00}
#ID .r{display:flex;flex-wrap:wrap;gap:.8em 1em;align-items:flex-start}
#ID .g{position:relative;width:10em;height:10em;border:1px solid rgba(128,128,128,.6)}
#ID .g>*{position:absolute;box-sizing:border-box;top:var(--y);left:var(--x);
height:var(--h);width:var(--w)}
#ID .g i{border:1px solid rgba(128,128,128,.3);
background:rgba(30,130,200,clamp(0,(var(--s) - var(--n) + 1)*.4,.4))}
#ID .g i.x{background:
repeating-linear-gradient(45deg,transparent 0 4px,rgba(128,128,128,.35) 4px 5px)}
#ID .g b{border:3px solid #D55E00;transition:top .4s,left .4s}
#ID .p{flex:1 1 18em;min-width:0;overflow-x:auto}
#ID .p p{margin:0 0 .3em}
#ID table{border-collapse:collapse;font-size:.85em;margin:0;color:inherit;background:none;
display:table}
#ID td,#ID th{padding:.15em .4em;text-align:right;vertical-align:bottom;line-height:1.3;
min-width:0;font-variant-numeric:tabular-nums;
border:0;border-bottom:1px solid rgba(128,128,128,.35);color:inherit;background:none}
#ID tr{background:none!important}#ID td:nth-child(2){white-space:nowrap}
#ID small{opacity:.8;line-height:1.3;display:block}
#ID th{width:min-content;hyphens:manual}
@media (max-width:500px){#ID table{font-size:.75em}#ID td,#ID th{padding:.15em}}
@media (prefers-reduced-motion:reduce){#ID .g b{transition:none}}
""".replace("\n", "")


def _number(value: float) -> str:
    return "−∞" if value == float("-inf") else f"{value:.1f}".replace("-", "−")
