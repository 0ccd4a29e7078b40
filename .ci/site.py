"""Hooks of the docs' site: the repository's root pages become pages of it, other links to files become words."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}


def on_files(files: Any, config: Any) -> Any:
    """Adds the root's pages."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points links at the site's pages; those to files that the site hasn't lose their address."""
    place = page.file.src_uri
    is_root = place in PAGES.values()
    folder = "" if is_root else posixpath.dirname(f"docs/{place}")

    def link(match: re.Match[str]) -> str:
        text, address = match[1], match[2]
        if "://" in address or address.startswith("#"):
            return match[0]
        path, hash_, anchor = address.partition("#")
        target = posixpath.normpath(posixpath.join(folder, path))
        target = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if target is None or files.get_file_from_path(target) is None:
            return text.removeprefix("!")
        start = posixpath.dirname("" if is_root else place)
        return f"{text}({posixpath.relpath(target, start or '.')}{hash_}{anchor})"

    markdown = re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", link, markdown)
    return markdown.replace('"docs/images/', '"images/') if is_root else markdown
