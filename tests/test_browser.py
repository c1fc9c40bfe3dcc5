"""The book in a real browser: links, search, keyboard, phone, dark, and what axe-core finds.

Needs Chromium and `pip install -e '.[browser]'`; without them every test here is skipped. The pages
are those of the fixture `html`: opened from the disk as a reader offline opens them, and from a
local server where the test says so.
"""

import contextlib
import functools
import http.server
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import explorer_data
import pytest
import torch
from tools.chapters import NOTEBOOKS, ROOT

from modernbert_mini.alternating_attention import window_mask
from modernbert_mini.benchmark import needed_pairs
from modernbert_mini.rope import inverse_frequencies, rotary_table
from modernbert_mini.unpadding import first_fit

NEEDED = "needs a browser's driver: pip install -e '.[browser]'"
sync_api = pytest.importorskip("playwright.sync_api", reason=NEEDED)
axe = pytest.importorskip("axe_playwright_python.base", reason=NEEDED)

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (or $CHROMIUM, its path): not found"),
]
PHONE, LAPTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
# What a page may ask for: its own files, and what it carries in itself.
LOCAL = re.compile(r"(file|data|blob|about):|http://127\.0\.0\.1:")


# Not for the whole session: while Playwright runs, no other test can start an event loop.
@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


def new_page(browser: sync_api.Browser, **options) -> sync_api.Page:
    """A page of its own, patient enough for a busy machine."""
    page = browser.new_page(**options)
    page.set_default_timeout(300_000)
    return page


@pytest.fixture
def open_page(chromium, html):
    """Open a page of the book from the disk; at the end nothing may have gone wrong in it."""
    with contextlib.ExitStack() as stack:
        told: list[str] = []

        def open_it(name: str, **options) -> sync_api.Page:
            page = new_page(chromium, **{"viewport": LAPTOP} | options)
            stack.callback(page.close)
            listen(page, told)
            page.goto((html / f"{name}.html").as_uri())
            return page

        yield open_it
        assert not told


def listen(page: sync_api.Page, told: list[str]) -> None:
    """Note errors of scripts, errors in the console, and requests that leave the machine."""

    def request(asked):
        if not LOCAL.match(asked.url):
            told.append(f"{page.url} asks {asked.url}")

    page.on("pageerror", lambda error: told.append(f"{page.url}: {error}"))
    page.on(
        "console",
        lambda said: said.type == "error" and told.append(f"{page.url}: {said.text}"),
    )
    page.on("request", request)


@pytest.fixture(scope="module")
def paths(html) -> list[Path]:
    """Every page that a reader can come to."""
    chapters = [path for name in ("book", "notebooks") for path in (html / name).rglob("*.html")]
    return sorted([*chapters, html / "search.html"])


VISIT = """() => ({
  formulas: document.querySelectorAll(".math").length,
  set: document.querySelectorAll(".math mjx-container").length,
  links: [...document.querySelectorAll("a[href]")].map((a) => a.href),
})"""


@pytest.fixture(scope="module")
def visits(chromium, paths) -> dict[Path, dict]:
    """What each page does when it is opened from the disk, and how wide it is on a phone."""
    found = {}
    for path in paths:
        page, told = new_page(chromium, viewport=LAPTOP), []
        listen(page, told)
        page.goto(path.as_uri())
        page.evaluate("async () => { await window.MathJax?.startup?.promise }")
        found[path] = page.evaluate(VISIT) | {"told": told}
        page.set_viewport_size(PHONE)
        found[path]["wide"] = page.evaluate(WIDE)
        page.close()
    return found


# How far the page reaches beyond the window, and the elements that push it.
WIDE = """() => {
  const limit = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= limit) return [];
  const clipped = (e) => {
    for (let p = e.parentElement; p; p = p.parentElement)
      if (getComputedStyle(p).overflowX !== "visible") return true;
    return false;
  };
  return [...document.querySelectorAll("article *")]
    .filter((e) => e.getBoundingClientRect().right > limit + 1 && !clipped(e))
    .slice(0, 5).map((e) => e.outerHTML.slice(0, 120)).concat("wide");
}"""


# ---- reading ----


def test_pages_read_from_the_disk_ask_nobody_and_report_no_error(visits):
    assert not [line for visit in visits.values() for line in visit["told"]]


def test_formulas_are_set_without_the_network(visits):
    unset = {path.name: v for path, v in visits.items() if v["set"] < v["formulas"]}
    assert not unset and sum(visit["formulas"] for visit in visits.values()) > 50


def test_no_page_is_wider_than_a_phone(visits):
    assert not {path.name: visit["wide"] for path, visit in visits.items() if visit["wide"]}


def test_every_link_inside_the_book_arrives(chromium, html, visits):
    targets: dict[str, set[str]] = {}
    for visit in visits.values():
        for link in visit["links"]:
            page, _, anchor = link.partition("#")
            if page.startswith("file:"):
                targets.setdefault(page, set()).add(anchor)
    assert len(targets) >= len(NOTEBOOKS)
    page, lost = new_page(chromium), []
    for target, anchors in targets.items():
        if not target.endswith(".html"):  # a source or a notebook to download
            path = Path(urllib.request.url2pathname(target.removeprefix("file://")))
            lost += [] if path.is_file() else [target]
            continue
        page.goto(target)  # raises where there is no such file
        lost += [f"{target}#{a}" for a in page.evaluate(ARRIVE, sorted(anchors - {""}))]
    page.close()
    assert not lost


ARRIVE = """(anchors) => anchors.filter((anchor) => {
  location.hash = anchor;
  return document.querySelector(":target") === null;
})"""


def test_the_next_button_leads_through_the_whole_book(open_page, html, paths):
    page = open_page("book/index")
    met = [page.url]
    while page.locator("a.right-next").count():
        with page.expect_navigation():
            page.click("a.right-next")
        met.append(page.url)
        assert len(met) <= len(paths)
    assert sorted(met) == [path.as_uri() for path in paths if path.parent != html]


@contextlib.contextmanager
def served(folder: Path):
    """The address of a local server of a folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_search_by_keyboard_finds_the_chapter(chromium, html):
    with served(html) as address:
        page, told = new_page(chromium), []
        listen(page, told)
        page.goto(f"{address}/book/index.html")
        page.keyboard.press("Control+k")
        page.keyboard.type("wavelength")
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results li a")
        results = page.eval_on_selector_all(
            "#search-results li a", "found => found.map(a => a.href)"
        )
        assert any("03_rope" in link for link in results)
        with page.expect_navigation():
            page.click("#search-results li a[href*='03_rope']")
        assert "Rotary position embeddings" in page.title()
        page.close()
        assert not told


def test_a_search_finds_pages_from_the_disk_too(chromium, html):
    page, told = new_page(chromium), []
    listen(page, told)
    page.goto((html / "search.html").as_uri() + "?q=wavelength")
    page.wait_for_selector("#search-results li a")
    page.close()
    # The theme asks each result for an excerpt, which a page from a disk may not fetch.
    assert not [
        line
        for line in told
        if "from origin 'null' has been blocked" not in line
        and "net::ERR_FAILED" not in line
        and "Failed to fetch" not in line
    ]


def test_a_solution_opens_by_keyboard(open_page):
    page = open_page("notebooks/03_rope")
    summary = page.locator(".tag_solution details > summary").first
    code = page.locator(".tag_solution details .cell_input").first
    assert "solution" in summary.inner_text() and not code.is_visible()
    summary.focus()
    page.keyboard.press("Enter")
    code.wait_for(state="visible")
    page.keyboard.press("Enter")
    code.wait_for(state="hidden")


def background(page: sync_api.Page) -> int:
    """How light the page is, from 0 to 255."""
    return int(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))


def test_dark_mode_is_one_button_and_stays(open_page):
    page = open_page("notebooks/03_rope", color_scheme="light")
    assert background(page) > 200
    button = page.locator("button.theme-switch-button:visible")
    for _ in range(3):  # it goes round: automatic, light, dark
        button.click()
        if background(page) < 60:
            break
    assert background(page) < 60
    with page.expect_navigation():
        page.click("a.right-next")
    assert background(page) < 60


def test_the_landing_page_says_it_all_in_one_screen(open_page):
    page = open_page("book/index", viewport={"width": 1440, "height": 900})
    for part in ("article h1", ".mb-pitch", ".mb-show", "table.mb-map"):
        box = page.locator(part).first.bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 900, part
    cards = page.locator(".mb-map tbody tr")
    assert cards.count() == 16
    first = cards.first.locator("a")
    first.focus()
    with page.expect_navigation():
        page.keyboard.press("Enter")
    assert page.url.endswith("notebooks/01_tour.html")


# ---- the explorers ----


@pytest.fixture
def explorers(open_page) -> sync_api.Page:
    page = open_page("book/explorers")
    page.wait_for_selector("[data-explorer=tiles] table")
    return page


def explorer(page: sync_api.Page, name: str) -> sync_api.Locator:
    return page.locator(f"[data-explorer={name}]")


@pytest.mark.parametrize("name", explorer_data.EXPLORERS)
def test_every_control_of_an_explorer_works_by_keyboard(explorers, name):
    box = explorer(explorers, name)
    told = box.locator(".mb-told")
    sliders = box.get_by_role("slider")
    assert sliders.count()
    for slider in sliders.all():
        before = told.inner_text()
        slider.focus()
        # Up, or where it stands at its end already, down.
        at_end = slider.input_value() == slider.get_attribute("max")
        explorers.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
        assert told.inner_text() != before, slider.get_attribute("id")
    for group in box.locator("fieldset").all():
        before = told.inner_text()
        group.locator("input:checked").focus()
        explorers.keyboard.press("ArrowRight")
        assert told.inner_text() != before, group.inner_text()
    assert box.locator("svg[role=img]").first.get_attribute("aria-label")


def test_tiles_go_on_and_back_by_buttons(explorers):
    box = explorer(explorers, "tiles")
    told = box.locator(".mb-told")
    box.get_by_role("button", name="Next").press("Enter")
    assert told.inner_text().startswith("Step 2 of")
    box.get_by_role("button", name="Back").press("Space")
    box.get_by_role("button", name="Back").press("Enter")
    assert told.inner_text().startswith("Step 1 of")
    results = []
    for _ in range(100):
        results += box.locator("td.mb-result").all_inner_texts()
        before = told.inner_text()
        box.get_by_role("button", name="Next").click()
        if told.inner_text() == before:
            break
    run = explorer_data.tiles()["runs"]["4×2×none"]
    rows = [row for step in run["steps"] if step["last"] for row in step["rows"]]
    assert results == [f"{mixed / total:.3f}" for *_, total, mixed in rows]


def test_pasted_lengths_are_counted(explorers):
    box = explorer(explorers, "padding")
    area = box.get_by_role("textbox")
    area.fill("10, 20\n30; 40 words")
    # Batches of eight: four texts of at most 40 tokens, 160 places for 100 tokens.
    assert box.locator(".mb-told").inner_text().startswith("4 texts, 100 tokens, the longest 40.")
    assert "160 places, 60 of them padding: 38%" in box.inner_text()
    area.fill("none")
    assert "Type or paste lengths" in box.locator(".mb-told").inner_text()


@pytest.mark.parametrize("window", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_the_results_of_the_tiles_are_in_sight(open_page, window):
    page = open_page("book/explorers", viewport=window)
    box = explorer(page, "tiles")
    while not box.locator("td.mb-result").count():
        box.get_by_role("button", name="Next").click()
    assert box.locator(".mb-scroll").evaluate("box => box.scrollWidth <= box.clientWidth")


def test_nothing_moves_by_itself_for_readers_who_want_no_motion(open_page):
    still = open_page("book/explorers", reduced_motion="reduce")
    assert still.locator(".mb-explorer button").get_by_text("Play", exact=True).is_hidden()
    moving = open_page("book/explorers", reduced_motion="no-preference")
    walk = moving.get_by_role("button", name="Walk along the text")
    told = explorer(moving, "rope").locator(".mb-told")
    before = told.inner_text()
    walk.click()
    moving.wait_for_function("before => !document.body.innerText.includes(before)", arg=before)
    moving.get_by_role("button", name="Pause").click()
    before = told.inner_text()
    moving.wait_for_timeout(300)
    assert told.inner_text() == before


def test_the_explorers_compute_what_the_package_computes(explorers):
    def js(name, *arguments):
        given = json.dumps(arguments)
        return explorers.evaluate(f"MB.math.{name}(...{given})")

    frequencies = inverse_frequencies(64, 160_000.0)
    positions = torch.tensor([0, 1, 100, 8191])
    cos, sin = rotary_table(positions, frequencies)
    for p, position in enumerate(positions.tolist()):
        for pair in (0, 7, 31):
            angle = 2 * torch.pi * js("turned", frequencies[pair].item(), position)
            expected = torch.stack((cos[p, pair], sin[p, pair])).double()
            found = torch.tensor([angle], dtype=torch.float64)
            found = torch.cat((found.cos(), found.sin()))
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    share = cos[2, :32].mean().item()
    assert js("agreement", frequencies.tolist(), 100) == pytest.approx(share, abs=1e-4)

    assert [js("neededPairs", n, w) for n, w in ((10, 3), (10, 20), (10, None), (8192, 64))] == [
        needed_pairs(n, w) for n, w in ((10, 3), (10, 20), (10, None), (8192, 64))
    ]
    draw = random.Random(0)
    for capacity in (64, 100, 512):
        lengths = [draw.randint(1, 64) for _ in range(40)]
        assert js("firstFit", lengths, capacity) == first_fit(lengths, capacity)


@pytest.mark.parametrize("half_window", [1, 3, 8])
@pytest.mark.parametrize("place", [0, 10, 39])
def test_the_reach_is_what_masks_let_through(explorers, half_window, place):
    length, kinds = 40, [True, False, False, True, False, False]
    found = explorers.evaluate(
        "given => MB.math.reach(...given)", [kinds, 5, place, half_window, length]
    )
    heard = torch.zeros(length)
    heard[place] = 1
    for layer in reversed(range(6)):
        mask = torch.ones(length, length) if kinds[layer] else window_mask(length, half_window)
        heard = (heard @ mask.float() > 0).float()
        places = heard.nonzero()[:, 0]
        assert found[layer] == [places.min(), places.max()]
        assert len(places) == found[layer][1] - found[layer][0] + 1


# ---- everyone can use it ----

# The standard's levels A and AA. The second run looks again at what the theme changes: colours.
RULES = {
    "light": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"],
    "dark": {"type": "rule", "values": ["color-contrast", "link-in-text-block"]},
}

# The colours of code hang on the kind of a word alone: one word of each kind is enough, and
# thousands of others would take minutes.
RUN = """async ([options, theme]) => {
  document.documentElement.dataset.theme = theme;
  const met = new Set();
  for (const word of document.querySelectorAll(".highlight pre span[class], .sig span[class]")) {
    const kind = `${word.className} in ${word.closest("[class*=highlight-], .sig").className}`;
    if (met.has(kind)) word.replaceWith(...word.childNodes);
    met.add(kind);
  }
  await new Promise((resume) => setTimeout(resume, 350)); // colours fade
  const { violations } = await axe.run(document, options);
  return violations.flatMap(({ id, nodes }) =>
    nodes.map(({ target, html }) => [id, String(target), html.slice(0, 200)]));
}"""


def violations(page: sync_api.Page, theme: str) -> list[list[str]]:
    """What axe-core finds on a page: the rule, where, and the element."""
    page.evaluate("async () => { await window.MathJax?.startup?.promise }")
    page.evaluate(axe.AXE_SCRIPT)
    # Nothing is to be loaded a second time: a page from a disk may not.
    return page.evaluate(RUN, [{"runOnly": RULES[theme], "preload": False}, theme])


@pytest.mark.parametrize("theme", RULES)
def test_axe_finds_nothing(chromium, paths, html, theme):
    found = {}
    for path in paths:
        page = new_page(chromium, viewport=LAPTOP)
        page.goto(path.as_uri())
        if told := violations(page, theme):
            found[str(path.relative_to(html))] = told
        page.close()
    assert not found, json.dumps(found, indent=1)


@pytest.mark.parametrize("theme", RULES)
def test_axe_can_find_something(open_page, theme):
    page = open_page("book/status")
    page.evaluate("document.querySelector('article p').style.color = '#888'")
    page.evaluate("document.querySelector('article p').style.background = '#777'")
    assert {rule for rule, *_ in violations(page, theme)} == {"color-contrast"}


# ---- JupyterLab ----


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def ask(address: str) -> dict | list | None:
    """What a server answers, None where it does not."""
    with contextlib.suppress(OSError), urllib.request.urlopen(address) as answer:
        return json.load(answer)


def wait_until(is_so, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def has_kernel(address: str) -> bool:
    """Whether a JupyterLab has a kernel that listens to it, and has nothing to do."""
    kernels = ask(f"{address}/api/kernels") or []
    return any(k["execution_state"] == "idle" and k["connections"] for k in kernels)


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab over a folder that holds chapter 1 and nothing else."""
    (tmp_path / "room").mkdir()
    shutil.copy(ROOT / "notebooks" / "01_tour.ipynb", tmp_path / "room")
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.port={port}"]
    command += ["--IdentityProvider.token=", "--ServerApp.root_dir=" + str(tmp_path / "room")]
    command += ["--allow-root", "--ServerApp.ip=127.0.0.1"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "MODERNBERT_PROGRESS": "off",
        **{f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")},
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
    }
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # Every cell in the page, wherever the window has been scrolled to.
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    wait_until(lambda: server.poll() is not None or ask(f"{address}/api"))
    assert server.poll() is None, (tmp_path / "log").read_text()
    yield address
    server.terminate()
    server.wait(20)
    log.close()


# One line, since JupyterLab indents what is typed.
ANSWER = (
    "count_pairs = lambda length, half_window: sum("
    "abs(i - j) <= half_window for i in range(length) for j in range(length))"
)


def test_a_learner_runs_chapter_1_and_solves_an_exercise(chromium, lab):
    page = new_page(chromium, viewport=LAPTOP)
    page.goto(f"{lab}/lab/tree/01_tour.ipynb")
    page.wait_for_selector(".jp-CodeCell")
    wait_until(lambda: has_kernel(lab))
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.click('[data-command="runmenu:run-all"]')
    stub = page.locator(".jp-CodeCell", has_text="def count_pairs(length, half_window):").first
    check = page.locator(".jp-CodeCell", has_text=re.compile(r"count_pairs\(count_pairs\)")).first
    check.get_by_text("to do").wait_for()
    wait_until(lambda: has_kernel(lab))
    assert not page.locator(".jp-RenderedText[data-mime-type*=stderr]").count()
    stub.locator(".cm-content").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(ANSWER)
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")
    check.get_by_text("✓ passed").wait_for()
    page.close()
