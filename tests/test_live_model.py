"""The live model of the pages: what Python computes, in a browser, from the disk, by keyboard.

Needs Chromium (`$CHROMIUM` may name it) and `pip install -e '.[browser]'`; without them all but the
tests of the build are skipped.
"""

import base64
import contextlib
import functools
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import live_model
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sphinx.errors import ExtensionError
from tools.chapters import ROOT

from modernbert_mini import FillMask, ModernBertConfig, ModernBertForMaskedLM, Tokenizer
from modernbert_mini.sources import Source

STATIC = ROOT / "book" / "_static" / "live"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
# Float32 sums in another order. Logits are larger than the rest, by an order of magnitude.
CLOSE, CLOSE_LOGITS = 3e-5, 3e-4


@pytest.fixture(scope="module")
def chromium():
    reason = "needs a browser's driver: pip install -e '.[browser]'"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    if not CHROMIUM:
        pytest.skip("needs Chromium (or $CHROMIUM, its path): not found")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A bare page with both views, and beside it what a build writes."""
    folder = tmp_path_factory.mktemp("site")
    make_site(folder)
    return folder


def make_site(folder: Path, checkpoint: str | Path = "mini") -> None:
    shutil.copytree(STATIC, folder / "live")
    shutil.copy(STATIC.parent / "book.css", folder)
    (folder / "live" / "mini").mkdir()
    for name, text in live_model.scripts(Source(checkpoint)).items():
        (folder / "live" / "mini" / name).write_text(text, encoding="utf-8")
    views = [(STATIC / name).read_text("utf-8") for name in ("widget.html", "tokens.html")]
    code = [f'<script src="live/{name}"></script>' for name in live_model.CODE]
    head = '<meta charset="utf-8"><link rel="icon" href="data:,">'
    head += "".join(f'<link rel="stylesheet" href="{x}">' for x in ("book.css", "live/live.css"))
    page = f'<!doctype html><html lang="en"><title>Live</title>{head}{"".join(views + code)}'
    (folder / "index.html").write_text(page, encoding="utf-8")


@contextlib.contextmanager
def watched(chromium, address: str, **options):
    """A page; at the end no script of it may have failed, and it may have asked nobody else."""
    context = chromium.new_context(**options)
    page, told, own = context.new_page(), [], address.split("/index.html")[0]
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("console", lambda said: said.type == "error" and told.append(said.text))
    page.on(
        "request",
        lambda asked: asked.url.startswith((own, "data:")) or told.append(asked.url),
    )
    page.goto(address)
    yield page
    context.close()
    assert not told


@pytest.fixture
def page(chromium, site):
    with watched(chromium, (site / "index.html").as_uri()) as page:
        yield page


# ---- the same numbers ----

# A page with the tokenizer T and the model M, for tests that want more than it shows.
LOAD = """async () => {
  const load = (name) => new Promise((resolve, reject) => {
    const script = document.createElement("script");
    Object.assign(script, { src: `live/mini/${name}`, onload: resolve, onerror: reject });
    document.head.append(script);
  });
  await load("tokenizer.js");
  const parts = [];
  for (let i = 0; i < liveMini.parts; i++) {
    await load(`weights-${i}.js`);
    parts.push(Uint8Array.from(atob(liveMini.weights[i]), (c) => c.charCodeAt(0)));
  }
  window.bytes = new Uint8Array(await new Blob(parts).arrayBuffer());
  window.T = new Tokenizer(liveMini.tokenizer);
  window.M = new ModernBert(liveMini.config, bytes);
}"""
RUN = """async ([ids, places, name]) => {
  const model = name ? new window[name](liveMini.config, bytes) : M;
  const { logits, attentions } = await model.run(ids, places);
  const packed = async (lists) => {
    const bytes = new Uint8Array(await new Blob(lists).arrayBuffer());
    let letters = "";
    for (let i = 0; i < bytes.length; i += 32768)
      letters += String.fromCharCode(...bytes.subarray(i, i + 32768));
    return btoa(letters);
  };
  return [await packed(logits), await packed(attentions.flat())];
}"""


@pytest.fixture(scope="module")
def loaded(chromium, site):
    with watched(chromium, (site / "index.html").as_uri()) as page:
        page.evaluate(LOAD)
        yield page


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained("mini")


@pytest.fixture(scope="module")
def model() -> ModernBertForMaskedLM:
    return ModernBertForMaskedLM.from_pretrained("mini").eval()


WRITTEN = """
|Hello, world!|  two  spaces |\t tab\n\n  lines\r\n | trailing |it's they'll I'd we've 'tis 's
1969 3.14 x2|naïve|nai\u0308ve|Å Å A\u030a|ﬁ ﬂ|e\u0301\u0327 e\u0327\u0301|각|\u1100\u1161\u11a8
日本語のテキスト|Привет, мир|\u05e9\u05dc\u05d5\u05dd|\u0645\u0631\u062d\u0628\u0627
☕|👩\u200d👩\u200d👧 🇫🇷 👍🏽|\u200b\u200d\ufeff|a\u00a0b\u3000c\u2028d|\x85a\x85 b\ufeff c
\x00\x1f\x7f|ª²½Ⅷ٣|[MASK]|[MASK].| [MASK] |a [MASK] b|a  \n\t[MASK][MASK]  b|a\u00a0\u3000[MASK]
a\ufeff[MASK]|a\x85[MASK]|[ MASK]|[mask]|[CLS] and [SEP]|[PAD][UNK]|[[MASK]]|[MASK|MASK]
e [MASK]\u0301|__proto__ constructor undefined|a undefined|def f(x):\n    return x ** 2
<b>&amp;</b>|\\n \\ $& `${x}`|🙂🙂🙂[MASK]🙂
""".strip("\n")


def texts() -> list[str]:
    """Written by hand, and drawn from the alphabets that go wrong."""
    draw = random.Random(0)
    alphabets = [
        "ab 's'tTHEn. \n",
        " \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u202f\u3000\ufeffa",
        "eéÅaA\u0301\u0327\u030a\u0308\u0345ﬁ가각\u1100\u1161\u11a8",
        "👩\u200d👧🇫🇷☕a1 ",
        "०१٣²½Ⅷ12x ",
    ]
    special = ["[MASK]", " [MASK]", "[SEP]", "[CLS]", "[PAD]", "[UNK]", "[MASK", " ", ""]
    drawn = []
    for i in range(300):
        alphabet = alphabets[i % len(alphabets)]
        pieces = ["".join(draw.choices(alphabet, k=draw.randint(1, 9))) for _ in range(4)]
        drawn.append("".join(piece + draw.choice(special) for piece in pieces))
    return ["", *WRITTEN.split("|"), *drawn, "a" * 3000, "né" * 500]


def assert_same_ids(page, tokenizer: Tokenizer, given: list[str]) -> None:
    # As one string: the driver is slow with long lists.
    encode = "texts => JSON.stringify(JSON.parse(texts).map((text) => T.encode(text)))"
    found = json.loads(page.evaluate(encode, json.dumps(given)))
    expected = tokenizer(given).input_ids
    assert [t for t, a, b in zip(given, found, expected, strict=True) if a != b] == []


def test_ids_are_those_of_python(loaded, tokenizer):
    given = texts()
    assert len({*given}) > 330
    assert_same_ids(loaded, tokenizer, given)


@pytest.mark.parametrize("block", [(0, 0x3400), (0xA000, 0xAC00), (0xF900, 0x10000)], ids=str)
def test_ids_are_those_of_python_for_every_character(loaded, tokenizer, block):
    assert_same_ids(loaded, tokenizer, [f"a{chr(c)} {chr(c)}1[MASK]" for c in range(*block)])


PLANTED_CUTS = {
    "no normal form": ('part.normalize("NFC")', "part"),
    "JavaScript's white space": ('SPACE = "\\\\p{White_Space}"', 'SPACE = "\\\\s"'),
    "[MASK] keeps its space": ("lstrip ?", "false ?"),
    "the last of equal pairs": ("ranks.indexOf", "ranks.lastIndexOf"),
    "merges by neighbours alone": ("ranks[at - 1] = rank(at - 1)", "ranks[at - 1] = Infinity"),
}


@pytest.mark.parametrize("bug", PLANTED_CUTS)
def test_the_comparison_of_ids_finds_planted_bugs(loaded, tokenizer, bug):
    right, wrong = PLANTED_CUTS[bug]
    source = (STATIC / "tokenizer.js").read_text("utf-8")
    assert right in source
    source = source.replace(right, wrong).replace("const Tokenizer = (", "const Broken = (")
    loaded.evaluate(
        f"() => {{ {source}; window.R = T; window.T = new Broken(liveMini.tokenizer) }}"
    )
    with pytest.raises(AssertionError, match=r"\[.+\] == \[\]"):
        assert_same_ids(loaded, tokenizer, texts())
    loaded.evaluate("() => { window.T = R }")


def run(page, ids: list[int], places: list[int], name: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Logits (places, V) and attention weights (layers·H, L, L), computed in the page."""
    found = page.evaluate(RUN, [ids, places, name])
    logits, weights = (np.frombuffer(base64.b64decode(x), np.float32) for x in found)
    return logits.reshape(len(places), -1), weights.reshape(-1, len(ids), len(ids))


def expected(model, ids: list[int], places: list[int]) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        output = model(torch.tensor([ids]), output_attentions=True)
    return output.logits[0, places].numpy(), torch.cat([a[0] for a in output.attentions]).numpy()


def probabilities(logits: np.ndarray) -> np.ndarray:
    return torch.tensor(logits).softmax(dim=-1).numpy()


PROSE = "Plants create [MASK] through photosynthesis. The method returns a [MASK] of strings. "
SENTENCES = {
    "empty": "",
    "one mask": "The capital of France is [MASK].",
    "mask alone": "[MASK]",
    "bytes": "☕ naïve [MASK] 日本",
    "the window's edge": PROSE * 4,
    "beyond the window": PROSE * 9,
    "far beyond": PROSE * 20,
}


@pytest.mark.parametrize("name", SENTENCES)
def test_predictions_and_attention_are_those_of_python(loaded, model, tokenizer, name):
    ids = tokenizer(SENTENCES[name]).input_ids
    mask = tokenizer.mask_token_id
    places = [i for i, token in enumerate(ids) if token == mask or i == 0]
    logits, weights = run(loaded, ids, places)
    same_logits, same_weights = expected(model, ids, places)
    if "beyond" in name:
        assert len(ids) > 2 * model.config.half_window + 2  # no token sees them all
    np.testing.assert_allclose(logits, same_logits, atol=CLOSE_LOGITS, rtol=0)
    np.testing.assert_allclose(
        probabilities(logits), probabilities(same_logits), atol=CLOSE, rtol=0
    )
    np.testing.assert_allclose(weights, same_weights, atol=CLOSE, rtol=0)


def test_a_model_of_another_size_is_the_same_there_too(chromium, tmp_path, tokenizer):
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4}
    pattern = {"num_hidden_layers": 5, "global_attn_every_n_layers": 2, "local_attention": 6}
    special = {f"{role}_token_id": 0 for role in ("pad", "cls", "sep", "bos", "eos")}
    bases = {"global_rope_theta": 500.0, "local_rope_theta": 50.0, "norm_eps": 1e-3}
    config = ModernBertConfig(len(tokenizer), **special, **sizes, **pattern, **bases)
    torch.manual_seed(0)
    model = ModernBertForMaskedLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for folder in (tmp_path / "other", tmp_path / "site"):
        folder.mkdir()
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    make_site(tmp_path / "site", tmp_path / "other")
    ids = tokenizer(SENTENCES["the window's edge"]).input_ids
    with watched(chromium, (tmp_path / "site" / "index.html").as_uri()) as page:
        page.evaluate(LOAD)
        logits, weights = run(page, ids, [0, 5])
        load(page)
        assert view(page).locator(".live-heads canvas").count() == 20
    same_logits, same_weights = expected(model, ids, [0, 5])
    np.testing.assert_allclose(logits, same_logits, atol=CLOSE_LOGITS, rtol=0)
    np.testing.assert_allclose(weights, same_weights, atol=CLOSE, rtol=0)


PLANTED = {
    "window too narrow": (
        "const first = Math.max(0, i - reach);",
        "const first = Math.max(0, i - reach + 1);",
    ),
    "window too wide": ("local_attention / 2)", "local_attention / 2) + 1"),
    "every layer global": ('kind === "full_attention"', "true"),
    "turned one way, then back": ("b * Math.cos(angle) + a", "b * Math.cos(angle) - a"),
    "one rotary base": ("rope_parameters[kind]", 'rope_parameters["full_attention"]'),
    "gelu by tanh": (
        "(1 + erf(x / Math.SQRT2))",
        "(1 + Math.tanh(0.7978845608 * (x + 0.044715 * x ** 3)))",
    ),
    "gate activated": ("gelu(value) * gate[i]", "value * gelu(gate[i])"),
    "no scale": (" / Math.sqrt(dim)", ""),
    "a norm in layer 0": (
        "i ? this.norm(x, `${name}.attn_norm`) : x",
        "this.norm(x, `${name}.mlp_norm`)",
    ),
    "no bias at the end": (
        "add(logits.subarray(start, start + bias.length), bias)",
        "logits.subarray(start, start + bias.length)",
    ),
    "variance without mean": ("(value - mean) ** 2", "value ** 2"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_comparison_finds_planted_bugs(loaded, model, tokenizer, bug):
    right, wrong = PLANTED[bug]
    source = (STATIC / "model.js").read_text("utf-8")
    assert right in source
    name = "Broken" + re.sub(r"\W", "", bug)
    source = source.replace("const ModernBert = (", f"window.{name} = (").replace(right, wrong)
    loaded.evaluate(f"() => {{ {source} }}")
    ids = tokenizer(SENTENCES["beyond the window"]).input_ids
    places = [ids.index(tokenizer.mask_token_id)]
    logits, weights = run(loaded, ids, places, name)
    same_logits, same_weights = expected(model, ids, places)
    with np.errstate(invalid="ignore"):
        far = abs(probabilities(logits) - probabilities(same_logits)).max() > CLOSE
        assert far or abs(weights - same_weights).max() > CLOSE


TURNS = """async ([ids, name]) => {
  const model = name ? new window[name](liveMini.config, bytes) : M;
  let turns = 0;
  const timer = setInterval(() => turns++);
  await model.run(ids, []);
  clearInterval(timer);
  return turns;
}"""


def test_the_page_has_its_turns_while_the_model_works(loaded, tokenizer):
    ids = tokenizer(SENTENCES["beyond the window"]).input_ids
    assert loaded.evaluate(TURNS, [ids, ""]) > 5
    source = (STATIC / "model.js").read_text("utf-8").replace("SLICE = 12", "SLICE = Infinity")
    loaded.evaluate(f"() => {{ {source.replace('const ModernBert =', 'window.InOnePiece =')} }}")
    assert loaded.evaluate(TURNS, [ids, "InOnePiece"]) == 0


# ---- the page ----


def view(page, n: int = 0):
    return page.locator(".live-model").nth(n)


def load(page, n: int = 0) -> None:
    view(page, n).locator(".live-load").click()
    view(page, n).locator(".live-load").wait_for(state="hidden")


def write(page, text: str) -> None:
    """Type a sentence and wait for what the model says."""
    page.locator("textarea").first.fill(text)
    settle(page)


def settle(page) -> None:
    page.wait_for_function("!document.querySelector('.live-model').matches('.live-waiting')")


def said(model, tokenizer, text: str) -> list[list[tuple[str, float]]]:
    """What the page shall show: for each mask its five best tokens, with their shares."""
    answers = FillMask(model, tokenizer)(text, top_k=5)
    lists = [answers] if isinstance(answers[0], dict) else answers
    return [[(a["token_str"].replace(" ", "·"), a["score"]) for a in answers] for answers in lists]


SHOWN = """() => [...document.querySelectorAll(".live-guesses ol")].map((list) =>
  [...list.children].map((row) => [row.firstChild.textContent, row.lastChild.textContent]))"""


def assert_shows(page, model, tokenizer, text: str) -> None:
    found, lists = page.evaluate(SHOWN), said(model, tokenizer, text)
    assert [[token for token, _ in rows] for rows in found] == [[t for t, _ in r] for r in lists]
    shares = [float(share.removesuffix("%")) / 100 for rows in found for _, share in rows]
    assert shares == pytest.approx([p for rows in lists for _, p in rows], abs=6e-4)


def test_a_click_loads_the_model_and_shows_what_python_says(page, model, tokenizer):
    root, button = view(page), view(page).locator(".live-load")
    size = sum(p.stat().st_size for p in (Path(Source("mini").folder).glob("*.safetensors")))
    megabytes = int(re.search(r"\((\d+) MB\)", button.inner_text())[1])
    assert 4 / 3 * size / 1e6 <= megabytes <= 4 / 3 * size / 1e6 + 2
    assert page.evaluate("document.scripts.length") == len(live_model.CODE)
    page.evaluate(
        """() => {
          const bar = document.querySelector(".live-progress");
          window.seen = new Set();
          new MutationObserver(() => seen.add(bar.value)).observe(bar, { attributes: true });
        }"""
    )
    load(page)
    seen = sorted(page.evaluate("[...seen]"))
    assert len(seen) > 5 and seen[-1] == 1
    assert root.locator(".live-progress").is_hidden()
    assert_shows(page, model, tokenizer, page.locator("textarea").first.input_value())
    examples = root.locator(".live-examples option").evaluate_all("all => all.map((o) => o.value)")
    assert len(examples) > 4
    for text in examples[1:]:
        root.locator(".live-examples").select_option(text)
        settle(page)
        assert_shows(page, model, tokenizer, text)


def test_tokens_and_heads_are_those_of_python(page, model, tokenizer):
    load(page)
    text = "A 🪿 naïve\nword [MASK]"
    write(page, text)
    labels = view(page).locator(".live-tokens label").all_inner_texts()
    ids = tokenizer(text).input_ids
    assert [int(label.split()[-1]) for label in labels] == ids
    names = [" ".join(label.split()[:-1]) for label in labels]
    assert names[0] == "[CLS]" and "⏎" in names and any(n.startswith("·n") for n in names)
    assert any(re.fullmatch("[0-9A-F]{2}( [0-9A-F]{2})*", name) for name in names)
    _, weights = expected(model, ids, [0])
    row = weights[4, ids.index(tokenizer.mask_token_id)]  # layer 1, head 1
    view(page).locator(".live-heads label").nth(4).click()
    assert view(page).locator(".live-heads canvas").count() == len(weights)
    caption = view(page).locator("figcaption").inner_text()
    assert caption.startswith("Layer 1, local, head 1: “[MASK]” looks at ")
    shares = [float(x) / 100 for x in re.findall(r"([\d.]+)%", caption)]
    assert shares == pytest.approx(sorted(row)[:-4:-1], abs=6e-4)
    drawn = view(page).locator(".live-chosen text").all_inner_texts()
    assert len(drawn) == (row >= 0.02).sum()
    assert len(ids) == view(page).locator(".live-lines text[text-anchor=start]").count()
    # A token on the left of the lines can be chosen there.
    view(page).locator(".live-lines text[data-token='2']").first.click()
    assert view(page).locator(".live-tokens input").nth(2).is_checked()


def test_merges_are_those_of_the_word(page, tokenizer):
    load(page, 1)
    view(page, 1).locator("textarea").fill("see photosynthesis")
    tokens = view(page, 1).locator(".live-tokens label")
    tokens.nth(tokens.count() - 2).click()
    rows = [r.split("\n") for r in view(page, 1).locator(".live-merges li").all_inner_texts()]
    assert rows[0] == list("·photosynthesis")
    assert all("".join(row) == "·photosynthesis" for row in rows)
    assert [len(row) for row in rows] == list(range(len(rows[0]), len(rows[-1]) - 1, -1))
    pieces = tokenizer.backend.encode(" photosynthesis", add_special_tokens=False).tokens
    assert rows[-1] == [piece.replace("Ġ", "·") for piece in pieces]
    # The tokenizer's own view fetches no weights.
    assert page.evaluate("Object.keys(liveMini.weights).length") == 0
    assert not page.evaluate("[...document.scripts].some((s) => s.src.includes('weights'))")


def test_everything_is_done_by_keyboard(page, model, tokenizer):
    focus = "document.activeElement.className || document.activeElement.tagName"
    page.keyboard.press("Tab")
    assert page.evaluate(focus) == "TEXTAREA"
    page.keyboard.press("Tab")
    assert page.evaluate(focus) == "live-load"
    page.keyboard.press("Enter")
    view(page).locator(".live-load").wait_for(state="hidden")
    assert page.evaluate(focus) == "TEXTAREA"
    page.keyboard.press("Control+a")
    page.keyboard.type("The capital of France is ")
    page.keyboard.press("Tab")
    assert page.evaluate(focus) == "live-mask"
    page.keyboard.press("Enter")
    page.keyboard.type(".")
    settle(page)
    assert_shows(page, model, tokenizer, "The capital of France is [MASK].")
    for stop in ("live-mask", "live-examples"):
        page.keyboard.press("Tab")
        assert page.evaluate(focus) == stop
    page.keyboard.press("Tab")
    checked = view(page).locator(".live-tokens input:checked")
    place, before = int(checked.input_value()), view(page).locator("figcaption").inner_text()
    page.keyboard.press("ArrowRight")
    assert int(checked.input_value()) == place + 1
    after = view(page).locator("figcaption").inner_text()
    assert after != before
    page.keyboard.press("Tab")  # how the word is put together
    page.keyboard.press("Enter")
    assert view(page).locator(".live-merges li").first.is_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert view(page).locator("figcaption").inner_text().startswith("Layer 0, global, head 1: ")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == (
        "Which token looks where"
    )


def test_texts_that_are_no_plain_sentence(page):
    load(page)
    status = view(page).locator(".live-status")
    write(page, "")
    assert "2 tokens" in status.inner_text() and "Insert a [MASK]" in status.inner_text()
    write(page, "[MASK] and [MASK]")
    assert view(page).locator(".live-guesses p").all_inner_texts() == ["[MASK] 1", "[MASK] 2"]
    page.locator("textarea").first.fill("word 7 " * 280)
    page.wait_for_function(
        "document.querySelector('.live-status').textContent.includes('takes 512')"
    )
    view(page).locator(".live-tokens label").nth(3).click()  # nothing to look at: no error either
    write(page, "<b>&amp; [MASK]</b> <script>")
    assert view(page).locator(".live-guesses li").count() == 5


def test_only_the_last_of_quick_changes_is_answered(page, model, tokenizer):
    load(page)
    for text in ("A [MASK].", PROSE * 10, "The capital of France is [MASK]."):
        page.locator("textarea").first.fill(text)
        page.wait_for_timeout(300)
    settle(page)
    assert_shows(page, model, tokenizer, "The capital of France is [MASK].")


def test_a_file_that_is_missing_is_said_and_can_be_tried_again(chromium, tmp_path):
    make_site(tmp_path)
    lost = tmp_path / "live" / "mini" / "weights-1.js"
    text = lost.read_text()
    lost.unlink()
    context = chromium.new_context()
    page = context.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    view(page).locator(".live-load").click()
    page.wait_for_function(
        "document.querySelector('.live-status').textContent.includes('weights-1.js')"
    )
    assert view(page).locator(".live-load").is_enabled()
    lost.write_text(text)
    load(page)
    assert view(page).locator(".live-guesses li").count() == 5
    context.close()


@contextlib.contextmanager
def served(folder: Path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_it_works_from_a_server_too(chromium, site, model, tokenizer):
    with (
        served(site) as address,
        watched(chromium, f"{address}/index.html", reduced_motion="reduce") as page,
    ):
        load(page)
        assert_shows(page, model, tokenizer, page.locator("textarea").first.input_value())
        assert page.evaluate("document.getAnimations().length") == 0


# ---- the build ----


def small_book(folder: Path) -> Path:
    """A book of two pages with this book's settings, one of them with the model; its HTML."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    config["sphinx"]["local_extensions"] = {"live_model": "book/_ext"}
    config["execute"]["execute_notebooks"] = "off"
    config["bibtex_bibfiles"] = ["empty.bib"]
    (folder / "empty.bib").write_text("")
    ignore = shutil.ignore_patterns("*.md", "_generated", "__pycache__")
    shutil.copytree(ROOT / "book", folder / "book", ignore=ignore)
    (folder / "_config.yml").write_text(yaml.safe_dump(config, allow_unicode=True), "utf-8")
    toc = "format: jb-book\nroot: book/index\nchapters:\n- file: book/plain\n"
    (folder / "_toc.yml").write_text(toc)
    view = "```{raw} html\n:file: _static/live/widget.html\n```"
    (folder / "book" / "index.md").write_text(f"# Index\n\nHere.\n\n{view}\n")
    (folder / "book" / "plain.md").write_text("# Plain\n\nNothing.\n")
    program = Path(sys.executable).parent / "jupyter-book"
    command = [program, "build", folder, "--path-output", folder, "-W", "--keep-going", "-n", "-q"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return folder / "_build" / "html"


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    return small_book(tmp_path_factory.mktemp("book"))


@pytest.mark.slow
def test_a_build_writes_mini_and_loads_code_on_pages_that_show_it(book):
    index, plain = ((book / "book" / f"{p}.html").read_text("utf-8") for p in ("index", "plain"))
    assert [f"_static/live/{name}" in index for name in live_model.CODE] == [True] * 4
    assert "live/live.css" in index and "live" not in re.sub(r"<title>.*?</title>", "", plain)
    folder = book / "_static" / "live" / "mini"
    about = json.loads(
        json.loads(re.search(r"JSON\.parse\((.*)\);", (folder / "about.js").read_text())[1])
    )
    parts = [(folder / f"weights-{i}.js").read_text() for i in range(about["parts"])]
    weights = b"".join(base64.b64decode(re.search(r'"(.*)"', part)[1]) for part in parts)
    assert len(weights) == about["bytes"]
    assert weights == (Path(Source("mini").folder) / "model.safetensors").read_bytes()
    assert about["config"] == json.loads((Path(Source("mini").folder) / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_of_a_book_fits(chromium, book, theme, width):
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=theme)
    page = context.new_page()
    page.goto((book / "book" / "index.html").as_uri())
    load(page)
    write(page, "Pneumonoultramicroscopicsilicovolcanoconiosis is a [MASK] " + "☕" * 40)
    view(page).locator(".live-merges summary").click()
    view(page).locator(".live-tokens label").nth(2).click()
    box = view(page).bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    inside = """root => [...root.querySelectorAll("*")].filter((e) => !e.closest("svg") &&
      e.getBoundingClientRect().right > root.getBoundingClientRect().right + 1).length"""
    assert view(page).evaluate(inside) == 0
    context.close()


AXE = """async (theme) => {
  document.documentElement.dataset.theme = theme;
  await new Promise((resume) => setTimeout(resume, 350)); // colours fade
  const { violations } = await axe.run(document.querySelector(".live-model"));
  return violations.flatMap(({ id, nodes }) => nodes.map(({ html }) => [id, html]));
}"""


@pytest.mark.slow
def test_axe_finds_nothing_in_light_and_in_dark(chromium, book):
    axe = pytest.importorskip("axe_playwright_python.base", reason="needs axe-core")
    context = chromium.new_context()
    page = context.new_page()
    page.goto((book / "book" / "index.html").as_uri())
    page.evaluate(axe.AXE_SCRIPT)
    found = [page.evaluate(AXE, theme) for theme in ("light", "dark")]
    load(page)
    view(page).locator(".live-merges summary").click()
    view(page).locator(".live-tokens label").nth(2).click()
    found += [page.evaluate(AXE, theme) for theme in ("light", "dark")]
    context.close()
    assert found == [[], [], [], []]


# ---- a checkpoint that the scripts cannot run is refused ----


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(Source("mini").folder, folder / "other"))


@pytest.mark.parametrize(
    ("file", "keys", "value", "told"),
    [
        ("config.json", ["hidden_activation"], "silu", "config.json: hidden_activation is 'silu'"),
        ("config.json", ["norm_bias"], True, "config.json: norm_bias is True"),
        ("tokenizer.json", ["normalizer", "type"], "NFKC", "tokenizer.json, normalizer: type"),
        ("tokenizer.json", ["model", "byte_fallback"], True, "byte_fallback is True"),
        ("tokenizer.json", ["pre_tokenizer"], None, "pre_tokenizer: type is None"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_the_scripts_do_not_know_stops_the_build(tmp_path, file, keys, value, told):
    folder = copied(tmp_path)
    content = json.loads((folder / file).read_text("utf-8"))
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / file).write_text(json.dumps(content), "utf-8")
    with pytest.raises(ExtensionError, match=re.escape(told)):
        live_model.scripts(Source(folder))


def test_weights_of_another_precision_become_float32(tmp_path):
    folder = copied(tmp_path)
    path = folder / "model.safetensors"
    halved = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(halved, path)
    (tmp_path / "wide").write_bytes(live_model.float32(path))
    wide = load_file(tmp_path / "wide")
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in halved.items())
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}


def test_the_version_follows_the_checkpoint(tmp_path):
    folder = copied(tmp_path)
    before = live_model.scripts(Source(folder))["about.js"]
    weights = load_file(folder / "model.safetensors")
    weights["decoder.bias"] += 1
    save_file(weights, folder / "model.safetensors")
    assert live_model.scripts(Source(folder))["about.js"] != before
