"""Set this machine up for the workshop, with no network: python install.py

Makes an environment beside this file, installs the wheels into it, and says whether all is well.
"""

import hashlib
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WHEELS = HERE / "wheels"
BIN = HERE / ".venv" / ("Scripts" if sys.platform == "win32" else "bin")


class Stop(Exception):
    """Why the machine cannot be set up, in one line, and what to do."""


def main():
    try:
        check_python()
        check_files()
        make_environment()
        install()
    except Stop as stop:
        print(f"Stopped: {stop}", file=sys.stderr)
        return 1
    code = subprocess.run([str(BIN / "modernbert-mini"), "doctor"], check=False).returncode
    if code == 0:
        print(f"\nStart with:\n\n    {BIN.relative_to(HERE) / 'jupyter'} lab notebooks\n")
    return code


def check_python():
    if sys.version_info < (3, 11):  # noqa: UP036
        version = platform.python_version()
        raise Stop(f"this is Python {version}. Use 3.11 or newer: python3.12 install.py")


def check_files():
    """Every file of the list is there, and is what was put into the bundle."""
    for line in (HERE / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        expected, name = line.split("  ", 1)
        path = HERE / name
        if not path.is_file():
            raise Stop(f"{name} is missing. Copy the folder again.")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise Stop(f"{name} is damaged. Copy the folder again.")


def make_environment():
    if (BIN / "modernbert-mini").exists() or (BIN / "modernbert-mini.exe").exists():
        return
    command = [sys.executable, "-m", "venv", "--clear", str(HERE / ".venv")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        if "ensurepip" in done.stdout + done.stderr:
            raise Stop("Python has no venv. On Debian and Ubuntu: sudo apt install python3-venv")
        raise Stop(f"no environment can be made: {' '.join(done.stderr.split())[-200:]}")


def install():
    """Take everything from the wheels of the bundle and nothing from elsewhere."""
    print("Installing; this takes a few minutes.", flush=True)
    options = ["--no-index", "--find-links", str(WHEELS), "--constraint", "constraints.txt"]
    options += ["--quiet", "--disable-pip-version-check", "--requirement", "requirements.txt"]
    command = [str(BIN / "python"), "-m", "pip", "install", *options]
    done = subprocess.run(command, cwd=HERE, check=False, capture_output=True, text=True)
    if done.returncode:
        found = sorted("-".join(p.stem.split("-")[2:]) for p in WHEELS.glob("torch-*.whl"))
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Stop(
            f"{said[0] if said else done.stderr[-200:]}\n"
            f"The bundle's torch is for {', '.join(found) or 'no machine at all'}; this is Python "
            f"{platform.python_version()} on {platform.system()} {platform.machine()}."
        )


if __name__ == "__main__":
    sys.exit(main())
