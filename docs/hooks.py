"""What mkdocs does for this repository besides.

The pages link to recipes and source files, which no site has: each such file gets a page of its own under `source/`, so
that one link is right on disk, on a forge and on the site. And the four folders that are one package once installed are
shown to mkdocstrings as that package.
"""

import json
import logging
import os
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".html": "html"}
log = logging.getLogger("mkdocs.hooks.source")


@event_priority(100)  # before mkdocstrings looks
def on_config(config: Any) -> Any:
    """Lay out the package as it is installed, whatever the environment has of it."""
    tree = Path(tempfile.mkdtemp(prefix="hybrid-docs-"), "hybrid")
    tree.mkdir()
    for path in (ROOT / "hybrid").iterdir():
        (tree / path.name).symlink_to(path)
    for name in ("sampling", "training", "evals"):
        (tree / name).symlink_to(ROOT / name)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(tree.parent)]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every file and folder that a page links to and that is no page."""
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        file = waiting.pop()
        for _, target, _, _ in LINK.findall(file.content_string):
            found = outside(file.src_uri, target)
            if found is None or files.get_file_from_path(page_of(found)) is not None:
                continue
            if (ROOT / found).exists():
                page = File.generated(
                    config, page_of(found), content=shown(found), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(page)
                waiting.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Send links to what is no page to the pages that `on_files` made of it."""

    def turned(match: re.Match[str]) -> str:
        begin, target, anchor, end = match.groups()
        found = outside(page.file.src_uri, target)
        if found is None:
            return match[0]
        if not (ROOT / found).exists():
            log.warning("%s links to %s, and there is no such file", page.file.src_uri, target)
        return f"{begin}{os.path.relpath(page_of(found), PurePosixPath(page.file.src_uri).parent)}{anchor or ''}{end}"

    return LINK.sub(turned, markdown)


def outside(page: str, target: str) -> str | None:
    """Where in the repository a link leads that stands on `page`, if that is no page of the site."""
    if page.startswith("source/"):
        here = PurePosixPath(page.removeprefix("source/")).parent
    else:
        here = PurePosixPath("docs", page).parent
    found = os.path.normpath(here / target)
    if found.startswith(".."):
        log.warning("%s links to %s, which is outside of the repository", page, target)
        return None
    return None if found.startswith("docs/") and not page.startswith("source/") else found


def page_of(path: str) -> str:
    """The page that shows a file or folder of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def shown(path: str) -> str:
    """A file as it stands, or what a folder has, as the text of a page."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(x.name for x in file.iterdir() if x.is_file())
        return f"# {path}/\n\n" + "\n".join(f"- [{name}]({file.name}/{name})" for name in names) + "\n"
    text = file.read_text()
    if file.suffix == ".md":
        return text
    if file.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(f"```python\n{cell}\n```" if kind == "code" else cell for kind, cell in cells) + "\n"
    return f"# {path}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{text}````\n"
