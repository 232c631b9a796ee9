"""Files of the repository that pages link to become pages of the site, so that links lead somewhere here and there.

A page of docs/ links to `../../gkt_fast/gkt.py` as it does on a forge. Here Markdown becomes a page, pictures and
tables are copied, and other text is shown as code, all under `repository/`. A link to nothing, or to a folder, stays
as it is, and the strict build fails.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
FOLDER = "repository"
COPIED = (".png", ".svg", ".csv")
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cu": "cuda", ".cuh": "cuda", ".txt": "cmake"}
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
TARGET = re.compile(r'(\]\(|(?:src|srcset|href)=")([^)\s"#]+)')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to outside of docs/, and what these link to in turn."""
    waiting = [
        (file.src_uri, Path(file.abs_src_path or "").read_text()) for file in files.documentation_pages()
    ]
    while waiting:
        page, text = waiting.pop()
        for target in linked(page, text):
            uri = uri_of(target)
            if uri is None or files.get_file_from_path(uri) is not None:
                continue
            if target.endswith(COPIED):
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
                continue
            source = (ROOT / target).read_text()
            content = source if target.endswith(".md") else shown(target, source)
            files.append(File.generated(config, uri, content=content))
            if target.endswith(".md"):
                waiting.append((uri, source))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of the repository into those of the site."""
    here = page.file.src_uri

    def turned(prefix: str, target: str) -> str:
        uri = uri_of(repository_path(here, target))
        return f"{prefix}{target if uri is None else relpath(uri, dirname(here) or '.')}"

    return replace_targets(markdown, turned)


def linked(page: str, text: str) -> Iterator[str]:
    """Where the links of a page lead, as paths in the repository."""
    found = []
    replace_targets(text, lambda prefix, target: found.append(target) or prefix)
    for target in found:
        if not re.match(r"[a-z]+:", target):
            yield repository_path(page, target)


def replace_targets(text: str, replace: Callable[[str, str], str]) -> str:
    """Replaces what starts a link (`](` or an attribute) and its target, outside of code."""
    parts = CODE.split(text)
    parts[::2] = [TARGET.sub(lambda match: replace(match[1], match[2]), part) for part in parts[::2]]
    return "".join(parts)


def repository_path(page: str, target: str) -> str:
    """The path in the repository that a link on a page of the site leads to."""
    home = page.removeprefix(f"{FOLDER}/") if page.startswith(f"{FOLDER}/") else join("docs", page)
    return normpath(join(dirname(home), target))


def uri_of(path: str) -> str | None:
    """Where the site has a file of the repository; None: it has not."""
    if path.startswith(os.pardir) or not (ROOT / path).is_file():
        return None
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    suffix = "" if path.endswith((*COPIED, ".md")) else ".md"
    return f"{FOLDER}/{path}{suffix}"


def shown(path: str, source: str) -> str:
    """A page that shows a file as code, and that the search leaves out."""
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n``````{language}\n{source}``````\n"
