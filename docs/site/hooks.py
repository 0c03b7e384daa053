"""Makes the site of the documents in the tree: README.md and CONTRIBUTING.md become pages of it."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "SECURITY.md": "security.md",
}
_LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(?=\))")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the tree as links between pages."""
    origin = {to: name for name, to in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return rewritten(markdown, origin)


def rewritten(markdown: str, origin: str) -> str:
    """The text of the document `origin`, a path from the root of the tree."""
    page = _page(origin)

    def link(found: re.Match[str]) -> str:
        target = _page(normpath(PurePosixPath(origin).parent / found[2]))
        return f"{found[1]}{relpath(target, PurePosixPath(page).parent)}{found[3] or ''}"

    return _LINK.sub(link, markdown)


def _page(path: str) -> str:
    """The page of a path from the root of the tree."""
    return PAGES.get(path, path.removeprefix("docs/"))
