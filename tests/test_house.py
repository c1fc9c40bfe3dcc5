"""The house is in order: files agree with each other, nothing leaks, the package stays small."""

import ast
import doctest
import importlib
import io
import json
import pkgutil
import re
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from rattler import MatchSpec
from tools import costs
from tools.chapters import NOTEBOOKS, ROOT

import modernbert_mini

PACKAGE = ROOT / "modernbert_mini"
BINARY = {".safetensors", ".png", ".woff2", ".ico"}


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def own_files() -> list[Path]:
    """What is committed, or would be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git repository here, so no list of the project's own files")
    files = [ROOT / line for line in listed.stdout.splitlines()]
    return [f for f in files if f.is_file() and f.suffix not in BINARY]


# ---- nothing of a machine, no strange host ----

LOCAL_PATH = re.compile(
    r"(?<![\w.~-])/(?:work|root|home|opt|tmp|Users|mnt|srv)/|file:///\w|[A-Z]:\\+Users"
)
KNOWN_HOSTS = {
    "127.0.0.1",
    "aclanthology.org",
    "arxiv.org",
    "colab.research.google.com",
    "creativecommons.org",
    "docs.cloud.google.com",
    "docs.pytorch.org",
    "doi.org",
    "en.wikipedia.org",
    "example.org",
    "git-lfs.github.com",
    "github.com",
    "huggingface.co",
    "mybinder.org",
    "jfly.uni-koeln.de",
    "triton-lang.org",
    "www.apache.org",
    "www.lesswrong.com",
    "www.nvidia.com",
    "www.w3.org",
}
# Files that vocabularies, weights and texts are made of, not written by hand.
GENERATED = {"tokenizer.json"}


def leaks(text: str) -> list[str]:
    """Paths of some machine, and addresses that are not on the list."""
    found = [match[0] for match in LOCAL_PATH.finditer(text)]
    for url in re.findall(r"https?://[^\s\"'<>)\]}`|]+", text.replace("\\", "")):
        try:
            host = urlsplit(url).hostname
        except ValueError:
            host = url
        if host not in KNOWN_HOSTS:
            found.append(url)
    return found


def test_no_file_names_a_path_of_some_machine_or_an_unknown_host():
    found = {
        str(path.relative_to(ROOT)): leaked
        for path in own_files()
        if path.name not in GENERATED and path != Path(__file__)
        if (leaked := leaks(path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    "text", ["see /home/me/x", "file:///etc/x", "https://pypi.example.net/simple", "(/opt/x/y)"]
)
def test_a_leak_is_found(text):
    assert leaks(text)


def test_a_known_address_is_no_leak():
    assert not leaks("https://arxiv.org/abs/2412.13663, notebooks/tmp/x and a/root/b")


# ---- text is the same on every system ----


def unsaid(code: str) -> list[str]:
    """Calls that read or write text in whatever encoding a system has: on Windows not UTF-8."""
    found = []
    for node in ast.walk(ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M))):
        if not isinstance(node, ast.Call) or "/proc/" in ast.unparse(node):
            continue
        owner, dot, name = ast.unparse(node.func).rpartition(".")
        modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
        binary = any(
            isinstance(m, str) and re.fullmatch("[rwxa]?b[+]?|[rwxa][+]?b", m) for m in modes
        )
        said = any(k.arg in ("encoding", None) for k in node.keywords) or "utf-8" in modes
        texts = name == "open" and owner not in ("os", "tarfile") and not binary
        if not said and (texts or (dot and name in ("read_text", "write_text"))):
            found.append(ast.unparse(node)[:80])
    return found


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("Path(p).read_text()", 1),
        ("p.write_text(json.dumps(x))", 1),
        ("open(p)", 1),
        ("p.open('a')", 1),
        ("p.read_text('utf-8'); p.write_text(x, encoding='utf-8')", 0),
        ("open(p, 'rb'); p.open('wb'); p.open('r+b'); os.open(p, 0)", 0),
        ("%pip install x\nopen('/proc/cpuinfo')", 0),
    ],
)
def test_a_silent_encoding_is_found(code, count):
    assert len(unsaid(code)) == count


def test_what_a_reader_runs_reads_and_writes_utf8():
    found = {str(p.relative_to(ROOT)): unsaid(p.read_text("utf-8")) for p in PACKAGE.rglob("*.py")}
    for notebook in NOTEBOOKS:
        cells = nbformat.read(notebook, as_version=4).cells
        code = [cell.source for cell in cells if cell.cell_type == "code"]
        found[notebook.name] = [call for source in code for call in unsaid(source)]
    assert not {where: calls for where, calls in found.items() if calls}


# ---- links ----


def links(path: Path) -> list[str]:
    """Relative links of a page or a notebook."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def slugs(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_internal_link_leads_somewhere():
    broken = []
    for page in own_files():
        if page.suffix not in {".md", ".ipynb"}:
            continue
        for link in links(page):
            target, _, anchor = link.partition("#")
            to = (page.parent / target).resolve() if target else page
            if not to.exists() or (anchor and to.suffix == ".md" and anchor not in slugs(to)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


# ---- chapters are listed where readers look ----


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chapter_is_in_the_contents_the_landing_page_and_the_readme(notebook):
    assert f"notebooks/{notebook.stem}" in re.findall(r"file: (\S+)", read("_toc.yml"))
    title = nbformat.read(notebook, as_version=4).cells[0].source.splitlines()[0]
    name = re.match(r"# \d+ · (.+)", title)[1]
    assert f"[{name}](../notebooks/{notebook.name})" in read("book/index.md")
    assert f"[{name}](notebooks/{notebook.name})" in read("README.md")


def test_what_is_still_to_come_is_not_there_yet():
    there = {int(n.stem.split("_")[0]) for n in NOTEBOOKS}
    for page in ("book/index.md", "README.md"):
        rows = re.findall(r"^\| (\d+) \| (.+)$", read(page), re.M)
        assert [int(n) for n, _ in rows] == list(range(1, 17))
        assert {int(n) for n, row in rows if "to come" not in row} == there, page


def test_every_page_is_in_the_contents():
    pages = {f"book/{p.stem}" for p in (ROOT / "book").glob("*.md")} - {"book/LICENSE"}
    assert pages <= {*re.findall(r"(?:file|root): (\S+)", read("_toc.yml"))}


def test_the_glossary_is_sorted():
    block = re.search(r"```\{glossary\}\n(.+?)```", read("book/glossary.md"), re.S)[1]
    terms = [line for line in block.splitlines() if line and not line.startswith(" ")]
    assert terms == sorted(terms, key=str.casefold)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "book"])
def test_pages_do_not_call_things_easy(page):
    pages = sorted((ROOT / page).glob("*.md")) or [ROOT / page]
    for path in pages:
        assert not re.search(r"\b(simply|obviously)\b", path.read_text("utf-8"), re.I), path


# ---- examples run ----


def examples() -> list:
    pages = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]
    found = []
    for page in pages:
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)):
            found.append(pytest.param(code, id=f"{page.name}-{i}"))
    return found


@pytest.mark.parametrize("code", examples())
def test_the_examples_of_the_pages_run(code):
    exec(compile(code, "example", "exec"), {})


MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(modernbert_mini.__path__, "modernbert_mini.")
    if not m.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", modernbert_mini.__all__)
def test_every_public_name_is_there(name):
    assert getattr(modernbert_mini, name) is not None
    assert name in dir(modernbert_mini)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        modernbert_mini.nothing  # noqa: B018


# ---- small and quick ----


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_costs_little_more_than_torch():
    code = (
        "import time, torch; t = time.perf_counter(); import modernbert_mini;"
        "print(time.perf_counter() - t)"
    )
    assert statistics.median(float(run(code)) for _ in range(3)) <= 0.3


def test_the_public_names_load_nothing_heavy():
    names = ", ".join(n for n in modernbert_mini.__all__ if n != "__version__")
    code = f"from modernbert_mini import {names}; import sys; print(*sys.modules)"
    assert not {"transformers", "matplotlib", "jupyter_client"} & {*run(code).split()}


def code_lines(source: str) -> int:
    """Lines that hold code: no blank ones, no comments, no docstrings."""
    documents = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            documents |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped and token.string.strip():
            lines |= {*range(token.start[0], token.end[0] + 1)}
    return len(lines - documents)


def test_code_lines_counts_code():
    source = (
        '"""Doc.\n\nMore."""\n\n# why\nx = 1  # what\n\n\ndef f():\n    "d"\n    return (\n1\n)\n'
    )
    assert code_lines(source) == 5


def test_the_model_can_be_read_in_one_sitting():
    parts = "tokenizer rope geglu attention alternating_attention unpadding flash_attention"
    parts += " model heads checkpoints"
    files = [PACKAGE / f"{part}.py" for part in parts.split()]
    assert sum(code_lines(f.read_text("utf-8")) for f in files if f.is_file()) < 1500


# ---- files that must agree ----


def pins() -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", read(".ci/constraints.txt"), re.M))


def test_environment_agrees_with_the_constraints():
    environment = yaml.safe_load(read("environment.yml"))
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    pinned = dict(p.split("==") for p in pip if "==" in p)
    assert pinned.items() <= pins().items()
    assert pinned["torch"] == "2.13.0"
    assert "--constraint .ci/constraints.txt" in pip and "-e .[test]" in pip


def test_conda_can_read_the_environment():
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["channels"] == ["conda-forge"]
    assert re.fullmatch(r"[\w.-]+", environment["name"])
    specs = {
        spec.name.normalized: spec
        for line in environment["dependencies"]
        if isinstance(line, str)
        for spec in [MatchSpec(line, strict=True)]
    }
    assert specs["python"].version == "3.11.*" and "pip" in specs  # conda warns where pip lacks
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    for line in pip:
        assert line.startswith("-") or Requirement(line).specifier, line


def test_what_runs_here_is_what_the_constraints_say():
    from importlib.metadata import version

    for name in ("torch", "transformers", "tokenizers", "safetensors", "jupyter-book", "Sphinx"):
        assert version(name).split("+")[0] == pins()[name]


def test_continuous_integration_runs_the_two_commands():
    assert read(".ci/run").splitlines() == ["#!/bin/sh", "exec make test"]
    steps = {
        name: str(yaml.safe_load(read(f".github/workflows/{name}.yml"))["jobs"])
        for name in ("cpu", "gpu", "book", "colab", "browser")
    }
    assert ".ci/run" in steps["cpu"] and "make book" in steps["book"] and "--nbmake" in steps["gpu"]
    assert "tools.colab --torch colab" in steps["colab"]
    assert "make browser" in steps["browser"] and "make pdf" in steps["browser"]
    for text in steps.values():
        actions = re.findall(r"uses': '([^']+)'", text)
        assert actions and all(re.fullmatch(r"actions/[\w-]+@v\d+", a) for a in actions)


def test_the_version_stands_in_one_place():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == modernbert_mini.__version__
    assert not re.search(r'^version = "', read("pyproject.toml"), re.M)


def test_the_licences_are_there():
    assert "Apache License" in read("LICENSE") and "END OF TERMS" in read("LICENSE")
    assert "CC BY 4.0" in read("book/LICENSE.md")


def test_the_readme_shows_what_was_recorded():
    text = read("README.md")
    assert costs.fill(text) == text, "run python tests/tools/costs.py"
    assert "<!-- costs -->\n| chapter" in text and "<!-- scores -->\n| on held-out" in text
    assert "<!-- speed -->\n| work" in text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_chapter_has_a_recorded_cost_below_a_minute(notebook):
    cost = json.loads(costs.RECORD.read_text())[notebook.stem]
    assert 0 < cost["seconds"] < 60
    assert cost["peak_ram_mb"] > 50 and cost["fetched_mb"] >= 0 and cost["torch"] and cost["cpu"]
