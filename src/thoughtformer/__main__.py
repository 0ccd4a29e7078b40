"""`python -m thoughtformer`: the command line."""

from __future__ import annotations

from thoughtformer.cli import main

main()
