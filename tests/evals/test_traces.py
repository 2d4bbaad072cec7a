"""The page of traces: what it says of each token, and that nothing in it can break out or ask for anything."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sequences import ar, block, speculative, step, tell

from hybrid.evals.laboratory.traces import Trace, write_trace
from hybrid.training.text.tokenizing import character_tokenizer, train_bpe

LETTERS = character_tokenizer("abcdefghijklmnopqrstuvwxyz <>/&\"'=()\n")
EVIL = "</script><script>alert('a & b')</script>"
PROMPT = LETTERS.encode(EVIL)
N = len(PROMPT)
TEXT = [*LETTERS.encode("<b></script>"), LETTERS.eos_token_id]


def traced(told: list[list[Any]]) -> Trace:
    trace = Trace()
    tell(trace, told)
    return trace


@pytest.fixture
def traces() -> dict[str, Trace]:
    wrong = [LETTERS.encode("z")[0]]
    return {
        "ar": traced(ar(TEXT, N)),
        "block": traced(block(TEXT, N, [[0, 5], range(1, 5), range(6, len(TEXT) - 1)])),
        "speculative": traced(speculative(TEXT, N, [TEXT[1:3] + wrong, TEXT[4:7], TEXT[8:]])),
        "<i>diffusion</i>": traced(block(TEXT, N, [range(len(TEXT) - 1)])),
    }


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts.setdefault(self.tags[-1][0], []).append(data)


def read(path: Path) -> tuple[Page, list[dict[str, Any]]]:
    page = Page(path.read_text(encoding="utf-8"))
    return page, json.loads(page.texts["script"][0])


def canvases(panel: dict[str, Any]) -> list[list[Any]]:
    """The cells after each forward, put together as the page's script does it."""
    cells: list[Any] = []
    found = []
    for frame in panel["frames"]:
        cells = cells[: frame["at"]] + frame["cells"]
        found.append(cells)
    return found


def test_the_page_tells_every_canvas_of_every_mode(traces: dict[str, Trace], tmp_path: Path) -> None:
    path = write_trace(tmp_path / "new" / "trace.html", traces, LETTERS, PROMPT)
    _, panels = read(path)
    assert [panel["name"] for panel in panels] == list(traces)
    for panel, trace in zip(panels, traces.values(), strict=True):
        frames = canvases(panel)
        assert [frame["forward"] for frame in panel["frames"]] == list(range(1, len(trace.steps) + 1))
        for one, cells in zip(trace.steps, frames, strict=True):
            behind = cells[one.position - N :]
            assert [cell and cell[1] for cell in behind] == one.settled + one.window
            assert [bool(cell and cell[4]) for cell in behind] == [True] * len(one.settled) + [False] * len(one.window)
        assert "".join(cell[0] for cell in frames[-1]) == LETTERS.decode(TEXT)
    revealed = {panel["name"]: [cell[3] for cell in canvases(panel)[-1]] for panel in panels}
    assert revealed["ar"] == list(range(1, len(TEXT) + 1))
    assert revealed["block"] == [1, 2, 3, 3, 3, 3, 2, *[4] * (len(TEXT) - 7)]
    assert revealed["speculative"] == [1, 2, 2, 3, 4, 4, 4, 5, *[6] * (len(TEXT) - 8)]


def test_the_head_of_each_mode_counts_as_the_ledger_does(traces: dict[str, Trace], tmp_path: Path) -> None:
    page, panels = read(write_trace(tmp_path / "t.html", traces, LETTERS, PROMPT))
    n = len(TEXT)
    counts = [(p["tokens"], p["forwards"], p["tokens_per_forward"]) for p in panels]
    assert counts == [(n, n, 1.0), (n, 5, (n - 1) / 4), (n, 7, (n - 1) / 6), (n, 3, (n - 1) / 2)]
    bold = "".join(page.texts["b"])
    assert re.findall(r"\d+\.\d\d", bold) == [f"{per:.2f}" for _, _, per in counts]


def test_no_text_breaks_out_and_no_request_leaves(traces: dict[str, Trace], tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.html", traces, LETTERS, PROMPT, title=EVIL + " \ud83d")
    page, panels = read(path)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2, "the data and the program"
    assert not {"link", "img", "iframe", "object"} & set(tags)
    assert tags.count("i") == len(traces), "one for each scale, none from a name"
    assert not re.search(r"https?://|@import|url\(", path.read_text())
    assert not any(attribute in attrs for _, attrs in page.tags for attribute in ("src", "href"))
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert EVIL in "".join(page.texts["pre"]), "it is shown as it is"
    assert panels[3]["name"] == "<i>diffusion</i>"


def test_of_a_batch_the_row_that_was_asked_for_is_shown(tmp_path: Path) -> None:
    a, b, c = LETTERS.encode("abc")
    trace = traced([
        [step(1, "prefill", 2, [a]), step(1, "prefill", 1, [b], row=1)],
        [step(2, "settle", 3, [LETTERS.eos_token_id]), step(2, "settle", 2, [c], row=1)],
        [step(3, "settle", 3, [c], row=1)],
    ])  # fmt: skip
    for row, prompt, text in ((0, [a, b], "a<|eos|>"), (1, [c], "bcc")):
        _, (panel,) = read(write_trace(tmp_path / "t.html", {"ar": trace}, LETTERS, prompt, row=row))
        assert "".join(cell[0] for cell in canvases(panel)[-1]) == text


def test_a_character_of_several_tokens_comes_together_as_they_do(tmp_path: Path) -> None:
    tokenizer = train_bpe(["x" * 9], 260)
    text = tokenizer.encode("日")
    _, (panel,) = read(write_trace(tmp_path / "t.html", {"ar": traced(ar(text, 1))}, tokenizer, [5]))
    assert [[cell[0] for cell in cells] for cells in canvases(panel)] == [["�"], ["�", "�"], ["日", "", ""]]


def test_a_text_that_ends_with_the_prompt_has_no_tokens_per_forward(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.html", {"ar": traced(ar(TEXT[:1], N))}, LETTERS, PROMPT)
    page, (panel,) = read(path)
    assert panel["tokens_per_forward"] is None and "–" in "".join(page.texts["b"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"traces": {}}, "traces: it is empty"),
        ({"traces": {"ar": Trace()}}, r"traces: 'ar' has no step of row 0, but of rows \[\]"),
        ({"row": 3}, r"traces: 'ar' has no step of row 3, but of rows \[0\]"),
        ({"prompt_ids": [1, *PROMPT]}, "traces: 'ar': prompt: it has 41 tokens .*without padding"),
    ],
)
def test_bad_input_is_named(traces: dict[str, Trace], change: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = {"traces": traces, "tokenizer": LETTERS, "prompt_ids": PROMPT} | change
    with pytest.raises(ValueError, match=said):
        write_trace(tmp_path / "t.html", **given)
    assert not (tmp_path / "t.html").exists()
