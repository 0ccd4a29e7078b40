"""Runs the contract at the lowest and the newest versions that pyproject.toml allows, warnings as errors.

Each end has an environment of its own in .compat; torch is as pinned, and everything else as in constraints.txt. Where
constraints.txt has an end's versions itself, the environment that `make setup` made from it is that end's; `make test`
has run all of it there, so that --untested leaves it out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: What `make setup` made.
SHARED = ROOT / ".venv" / "bin" / "python"
BORDERS = ("transformers", "tokenizers", "peft", "safetensors", "accelerate", "sentencex")
#: Chosen anew with them: each of them allows versions of its own.
FOLLOWING = ("huggingface-hub", "huggingface_hub", "hf-xet")
TESTS = (
    "tests/contract",
    "tests/parity/test_side_by_side.py",
    "tests/parity/test_fine_tuning.py",
    "tests/parity/test_generation.py",
    "tests/parity/test_compression_generate.py",
    "tests/unit/test_loading.py",
    "tests/unit/test_text.py",
    "tests/integration/test_hub.py",
)


def ends() -> dict[str, dict[str, str]]:
    """The versions at each end, by package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest, newest = {}, {}
    for requirement in project["dependencies"]:
        found = re.fullmatch(r"([\w-]+)>=([\d.]+),<=([\d.]+)", requirement)
        if found is not None and found[1] in BORDERS:
            lowest[found[1]], newest[found[1]] = found[2], found[3]
    missing = [name for name in BORDERS if name not in lowest]
    if missing:
        sys.exit(f"pyproject.toml names no lowest and newest version of {', '.join(missing)}")
    return {"lowest": lowest, "newest": newest}


def pinned_versions() -> dict[str, str]:
    """The versions of constraints.txt, by package."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name.lower(): version for name, equals, version in (line.partition("==") for line in lines) if equals}


def environment(end: str, versions: dict[str, str]) -> str:
    """The Python of an environment with these versions."""
    kept = pinned_versions()
    if SHARED.exists() and all(kept.get(name) == version for name, version in versions.items()):
        return str(SHARED)
    folder = ROOT / ".compat" / end
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
    chosen = {name: version for name, version in kept.items() if name not in BORDERS + FOLLOWING} | versions
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in chosen.items()), encoding="utf-8")
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    subprocess.run([*install, "--editable", f"{ROOT}[dev]"], check=True)
    return python


def main() -> None:
    only = [argument for argument in sys.argv[1:] if argument != "--untested"] or ["lowest", "newest"]
    for end, versions in ends().items():
        if end not in only:
            continue
        started = time.monotonic()
        python = environment(end, versions)
        if python == str(SHARED) and "--untested" in sys.argv:
            print(f"--- {end}: the versions of constraints.txt, tested by make test", flush=True)
            continue
        installed = time.monotonic()
        told = ", ".join(f"{name} {version}" for name, version in versions.items())
        print(f"--- {end}: {told}; installed in {installed - started:.0f} s", flush=True)
        pytest = [python, "-m", "pytest", "-q", "-W", "error", "-m", "not slow", "--numprocesses", "auto", *TESTS]
        subprocess.run(pytest, cwd=ROOT, check=True)
        readme = [python, str(ROOT / ".ci" / "readme.py"), "python"]
        subprocess.run(readme, check=True, env=os.environ | {"PYTHONWARNINGS": "error:::thoughtformer"})
        print(f"--- {end}: passed in {time.monotonic() - installed:.0f} s", flush=True)


main()
