"""Writes constraints.txt: every version that pip chooses today for a developer's environment, within the ranges."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = (
    "# Versions of an environment that passed all tests. `make lock` makes it anew; pip takes it by --constraint.\n"
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[dev]"], check=True)
        freeze = [python, "-m", "pip", "freeze", "--exclude-editable"]
        listed = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout
    lines = []
    for line in listed.splitlines():
        # Neither builds of one machine's index (2.13.0+cpu) nor addresses of files: any index must serve it.
        name, _, version = re.sub(r"\+[\w.]+$", "", line).partition("==")
        if not version:
            sys.exit(f"pip froze {line!r}, which is no version of an index")
        lines.append(f"{name}=={version}\n")
    (ROOT / "constraints.txt").write_text(HEADER + "".join(sorted(lines, key=str.lower)), encoding="utf-8")
    print(f"constraints.txt: {len(lines)} versions")


main()
