"""Runs the bash and python examples of README and docs/usage.md as a reader would, in a folder of text for each page.

Those of make and pip are left out.

With an argument, those of that language alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/usage.md")


def main() -> None:
    languages = sys.argv[1] if len(sys.argv) > 1 else "bash|python"
    for page in PAGES:
        run(page, languages)


def run(page: str, languages: str) -> None:
    blocks = re.findall(rf"```({languages})\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "books")
        text.mkdir()
        prose = (ROOT / "src/thoughtformer/assets/page.txt").read_text(encoding="utf-8")
        (text / "page.txt").write_text(prose * 20, encoding="utf-8")
        Path(folder, "chapter.txt").write_text(prose[:2000], encoding="utf-8")
        num_run = 0
        for language, block in blocks:
            if re.match(r"(make|git|pip) ", block):
                continue
            command = ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [sys.executable, "-c", block]
            print(f"--- {page}, {language}:\n{block}", flush=True)
            subprocess.run(command, cwd=folder, check=True, env=os.environ | {"PATH": path})
            num_run += 1
    if num_run == 0:
        sys.exit(f"{page} has no example to run")
    print(f"{num_run} examples of {page} ran")


main()
