"""What MkDocs calls while it builds: adds the pages of reference.py, makes links to files outside of docs/ text.

Such links work in the repository; on the site they go to `repo_url` where mkdocs.yml has one.
"""

from __future__ import annotations

import logging
import re
from pathlib import PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

from docs_tools.reference import PAGES

FENCE = re.compile(r"^```(\w+) [^\n`]+$", re.MULTILINE)  # "```timeline 10": words that only tests read
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_startup(**_: Any) -> None:
    """Griffe tells of parameters without a type in docstrings, which this house writes as prose."""
    logging.getLogger("griffe").setLevel(logging.ERROR)


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """A page's text with its links out of docs/ turned."""
    return inward(FENCE.sub(r"```\1", markdown), page.file.src_uri, config.repo_url)


def inward(markdown: str, uri: str, repo_url: str | None) -> str:
    """Markdown of the page `uri` whose links to files outside of docs/ lead to the repository, or are text."""
    depth = len(PurePosixPath(uri).parts) - 1

    def turned(found: re.Match[str]) -> str:
        text, path = found[1], PurePosixPath(found[2])
        ups = sum(part == ".." for part in path.parts)
        if ups <= depth:
            return found[0]
        target = "/".join(path.parts[ups:])
        if repo_url:
            return f"[{text}]({repo_url.rstrip('/')}/blob/main/{target}{found[3] or ''})"
        return text if text.strip("`") == target else f"{text} (`{target}`)"

    return LINK.sub(turned, markdown)
