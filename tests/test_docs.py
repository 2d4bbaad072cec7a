"""What the pages show runs as it stands: the blocks of a page, one after the other, in one namespace and one folder.

`python` blocks are executed. So are `console` blocks: what stands behind a $ is a command of ours. `bash` blocks are
for models, files and machines that a test has not, so their commands are parsed and not run.
"""

import importlib
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import hybrid.commands
import hybrid.commands.train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("hybrid/models/*/README.md"))]
SNIPPET = re.compile(r'^--8<-- "([^":]+)(?::(\w+))?"$', re.M)
BLOCK = re.compile(r"^```(python|console|bash)\n(.*?)^```$", re.M | re.S)


def text_of(page: Path) -> str:
    """A page with what it takes from other files."""

    def taken(match: re.Match[str]) -> str:
        text = (ROOT / match[1]).read_text()
        if match[2]:
            begin, end = (f"<!-- --8<-- [{edge}:{match[2]}] -->" for edge in ("start", "end"))
            assert text.count(begin) == text.count(end) == 1, f"{match[1]} has no part {match[2]}"
            text = text[text.index(begin) + len(begin) : text.index(end)]
        return text

    return SNIPPET.sub(taken, page.read_text())


def blocks(page: Path, *kinds: str) -> list[tuple[str, str]]:
    return [(kind, code) for kind, code in BLOCK.findall(text_of(page)) if kind in kinds]


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind `hybrid` of every command line in the page's bash blocks."""
    for _, code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words[:1] == ["hybrid"]:
                    yield words[1:]


def names(pages: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in pages]


RUN = [page for page in PAGES if blocks(page, "python", "console")]
PARSED = [page for page in PAGES if list(commands(page))]


@pytest.mark.parametrize("page", RUN, ids=names(RUN))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, (kind, code) in enumerate(blocks(page, "python", "console"), 1):
        if kind == "python":
            exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)
            continue
        for line in code.splitlines():
            assert line.startswith("$ hybrid "), line
            hybrid.commands.main(shlex.split(line)[2:])


@pytest.mark.parametrize("page", PARSED, ids=names(PARSED))
def test_commands_are_taken(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    taken = []
    monkeypatch.setattr(hybrid.commands, "call", lambda function, options: taken.append(function))
    beside = hybrid.commands.COMMANDS["train"]
    given = [words for words in commands(page) if words[0] != "train" or words[1] in beside]
    for words in given:
        hybrid.commands.main(words)
    assert len(taken) == len(given)


@pytest.mark.slow  # parsing a recipe takes seconds
@pytest.mark.parametrize("page", PARSED, ids=names(PARSED))
def test_jobs_are_taken(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid.training.cli import HybridCLI

    monkeypatch.chdir(ROOT)
    parsed = []
    monkeypatch.setattr(HybridCLI, "instantiate_classes", lambda self: parsed.append(self.subcommand))
    monkeypatch.setattr(HybridCLI, "_run_subcommand", lambda self, name: None)
    for words in commands(page):
        if words[0] == "train" and words[1] not in hybrid.commands.COMMANDS["train"] and "--print_config" not in words:
            hybrid.commands.train.train([word.replace("RECIPE", "training/recipes/stdlib.yaml") for word in words[1:]])
            assert parsed.pop() == words[1]


@pytest.mark.parametrize("package", ["hybrid", "hybrid.sampling", "hybrid.training"])
def test_the_reference_has_every_public_name(package: str) -> None:
    page = (ROOT / "docs" / "api" / f"{package.rpartition('.')[2]}.md").read_text()
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", page, re.M)}
    assert set(importlib.import_module(package).__all__) - {"__version__"} <= shown


def test_the_reference_has_no_name_that_is_not_there() -> None:
    entry = re.compile(r"^::: (\S+)$(?:\n    options:\n      members: \[(.*)\])?", re.M)
    for page in (ROOT / "docs" / "api").iterdir():
        for name, members in entry.findall(page.read_text()):
            found = pkgutil.resolve_name(name)
            assert [member for member in members.split(", ") if member and not hasattr(found, member)] == []


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
