"""Builds the wheel, installs it alone into an empty environment, away from the checkout, and has it run the demo."""

from __future__ import annotations

import subprocess
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        venv.create(folder / "empty", with_pip=True)
        python = str(folder / "empty" / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
        build = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
        subprocess.run(build, check=True)
        (wheel,) = folder.glob("*.whl")
        subprocess.run([*pip, f"{wheel}[pinned]"], check=True)
        command = str(folder / "empty" / "bin" / "thoughtformer")
        subprocess.run([command, "--version"], check=True, cwd=folder)
        subprocess.run([command, "demo", "--quick"], check=True, cwd=folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, ran alone")


main()
