"""The results document, the table, the picture and the page: what they show, refuse and never hide."""

import copy
import json
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hybrid.evals.columns import COLUMNS, columns_markdown, share
from hybrid.evals.document import Act, Results, Row
from hybrid.evals.picture import curves_svg, frontier_picture, frontier_svg
from hybrid.evals.report import render_report, write_report
from hybrid.evals.results import check_results, load_results
from hybrid.evals.table import (
    efficient,
    frontier_table,
    in_a_sentence,
    likelihood_table,
    notices,
    pareto,
    speed_key,
    takeaway,
)

Document = dict[str, Any]
EVIL = "<script>alert('sample')</script>"


def _row(mode: str, setting: str, quality: float | None, speed: float | None, **more: Any) -> Document:
    return {"mode": mode, "setting": setting, "settings": {"block_size": 8, "max_new_tokens": 64},
            "quality": quality, "quality_standard_error": 0.0123, "exact": 0.4321, "distinct_2": 0.3142,
            "agreement": 0.8765, "tokens_per_forward": speed, "tokens_per_draft": 3.57, "acceptance": None,
            "tokens_per_second": 1234.5, "time_to_first_token": 0.0042, "lossless": False, "prompts": 200,
            "forwards": {"prefill": 7, "settle": 210, "draft": 345}, "tokens_out": 3200, "repetition_4": 0.0625,
            "entropy": 1.75, "tokens_per_forward_standard_error": 0.125, "ar_nats_per_token": 0.5,
            "histograms": {"tokens_per_step": {"1": 7, "10": 3, "2": 5}, "acceptance": {}},
            "timing": {"repeats": 3, "peak_memory_bytes": 3 << 20, "same_outputs": 1.0,
                       "tokens_per_second": {"median": 1234.5, "low": 1111.0, "high": 1301.0},
                       "time_to_first_token": {"median": 0.0042, "low": 0.004, "high": 0.005},
                       "latency": [{"batch_size": 4, "seconds": {"median": 0.25, "low": 0.2, "high": 0.3},
                                    "time_to_first_token": None, "same_tokens": 1.0}]}} | more


def _document() -> Document:
    rows = [
        _row("ar", "greedy", 0.912, 1.0, agreement=1.0, lossless=True, speedup=1.0, throughput=1.0),
        _row("block", "block 8, threshold 0.9", 0.934, 2.37),
        _row("diffusion", "4 steps [$x^2$]", 0.71, 4.62),
        _row("speculative", "block 8", 0.912, 2.11, agreement=0.99996, lossless=True, acceptance=3.19),
    ]
    puzzles = {
        "name": "puzzles", "title": "4x4 sudoku, held-out grids",
        "quality": {"name": "solved", "unit": "share", "higher_is_better": True, "description": "Whole."},
        "model": {"path": "runs/puzzles", "parameters": 456789, "block_size": 8},
        "training": {"seconds": 271.8, "steps": 380, "curves": {
            "step": [0, 10, 20], "ar_loss": [2.0, 1.5, 1.0], "diffusion_loss": [None, 2.5, 2.0]}},
        "likelihood": [
            {"name": "exact, left to right", "law": "ar", "bits_per_byte": 1.234, "nats_per_token": 2.345,
             "standard_error": 0.011, "bound": False},
            {"name": "block bound, size 8", "law": "block", "bits_per_byte": None,
             "nats_per_token": 2.567, "standard_error": 0.022, "bound": True}],
        "rows": rows, "notes": ["Never seen in training."],
        "samples": [{"prompt": EVIL, "target": "a & b", "outputs": {"greedy": "a & b", "block 8": EVIL}}],
    }
    bare = {"name": "bare", "title": "Only what must be there",
            "quality": {"name": "surprise", "unit": "nats per token", "higher_is_better": False},
            "rows": [{"mode": "ar", "setting": "greedy", "quality": 2.5, "tokens_per_forward": 1.0},
                     {"mode": "novel", "setting": "one run", "quality": 2.25, "tokens_per_forward": None}]}
    return {"schema": "hybrid-frontier/1", "created": "2026-01-02T03:04:05Z", "hybrid": "0.1.0",
            "environment": {"python": "3.11.7", "cpu": "a small one", "threads": 2}, "acts": [puzzles, bare]}


def typed(document: Document) -> Results:
    return check_results(document, "the results document")


@pytest.fixture
def document() -> Document:
    return _document()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of that document; its folder."""
    return write_report(_document(), tmp_path_factory.mktemp("report") / "new").parent


class _Page(HTMLParser):
    """The tags with their attributes, the text that is read, and the text inside style and script."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.code, self._inside = "", "", ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.code += data
        else:
            self.text += data


def _printed(table: Any, width: int = 110) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize(("points", "best"), [
    ([], set()),
    ([(0.9, 1.0)], {0}),
    ([(0.9, 1.0), (0.8, 2.0), (0.7, 1.5)], {0, 1}),
    ([(0.9, 2.0), (0.9, 2.0), (0.9, 1.0)], {0, 1}),  # exact ties stand together; as good but slower does not
    ([(0.9, 2.0), (0.8, 2.0)], {0}),
    ([(0.9, None), (0.5, 1.0)], {1}),  # without a speed: neither efficient nor in anybody's way
    ([(None, None), (0.5, 1.0)], {1}),
])
def test_pareto(points: list[tuple[float | None, float | None]], best: set[int]) -> None:
    assert pareto(_rows(points)) == best


def _rows(points: list[Any]) -> list[Row]:
    return [Row(mode="ar", setting="s", quality=q, tokens_per_forward=s) for q, s in points]


def test_pareto_where_lower_is_better() -> None:
    points = [(2.0, 1.0), (3.0, 2.0), (3.5, 1.5)]
    assert pareto(_rows(points), higher_is_better=False) == {0, 1}


@pytest.mark.parametrize("speed", ["tokens_per_forward", "tokens_per_second", "time_to_first_token"])
def test_a_speed_without_a_quality_is_refused(document: Document, tmp_path: Any, speed: str) -> None:
    row = {"mode": "block", "setting": "block 8", "quality": None, "tokens_per_forward": None} | {speed: 2.0}
    with pytest.raises(ValueError, match="only printed beside a quality measured on the same outputs"):
        Row(**row)
    document["acts"][0]["rows"].append(row)
    with pytest.raises(ValueError, match=r"acts\[0\].rows.*only printed beside a quality"):
        write_report(document, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(("value", "text"), [
    (1.0, "100%"), (1, "100%"), (0.0, "0%"), (0.9654, "96.5%"), (0.9996, "99.96%"), (0.999999, "99.9999%"),
    (0.0001, "0.01%"), (None, "–")])
def test_a_share_is_100_percent_only_where_it_is_one(value: float | None, text: str) -> None:
    assert share(value) == text


def test_terminal_tables(document: Document) -> None:
    act, bare = typed(document).acts
    text = _printed(frontier_table(act))
    for said in ("solved", "91.2% ± 1.2", "2.37", "3.19", "1,234", "31.4%", "87.6%", "4 steps [$x^2$]"):
        assert said in text
    starred = [line for line in text.splitlines() if line.startswith("●")]
    marked = {line.split()[1] for line in starred if "efficient" not in line}
    assert marked == {"block", "diffusion"}
    # A lossless row that is not is shown as it is, and spoken of.
    assert "99.996%" in text and len(notices(act)) == 1 and "block 8 (speculative)" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 110

    text = _printed(likelihood_table(act.title, act.likelihood or []))
    assert "1.234 ± 0.011" in text and "2.567 ± 0.022" in text and "2.345 ±" not in text
    assert "A bound lies above the exact number" in text
    assert "one run" in _printed(frontier_table(bare))


def test_takeaway(document: Document) -> None:
    act = document["acts"][0]
    said = takeaway(Act(**act))
    assert said is not None and "block 8, threshold 0.9 (block), 93.4% ± 1.2 at 2.37" in said
    assert in_a_sentence(Act(**act)) == (
        "4x4 sudoku, held-out grids: block (block 8, threshold 0.9) was 2.37 tokens per forward where left to right "
        "has one, at solved 93.4% where left to right has 91.2%."
    )
    for row in act["rows"]:
        row["speedup"] = 0.8 if row["mode"] == "block" else 1.0
    act["rows"][1] |= {"speedup": 1.5, "agreement": 1}
    name = f"{act['rows'][1]['mode']} ({act['rows'][1]['setting']})"
    assert f"{name} was 1.50 times as fast as left to right, with the same text." in (in_a_sentence(Act(**act)) or "")
    act["rows"] = [act["rows"][0], act["rows"][2]]
    assert "No other setting is faster" in (takeaway(Act(**act)) or "")
    assert "nothing was faster" in (in_a_sentence(Act(**act)) or "")
    act["rows"] = act["rows"][1:]
    assert takeaway(Act(**act)) is None and in_a_sentence(Act(**act)) is None


def test_what_is_fast_is_what_was_timed(document: Document) -> None:
    """By the clock, where all rows were timed one text at a time; else, and beside a ceiling, in tokens per forward."""
    act = document["acts"][0]
    rows = [row for row in act["rows"] if row["tokens_per_forward"] is not None]
    assert speed_key(Act(**act)) == "tokens_per_forward"
    for row in rows:
        row["speedup"] = 1 / row["tokens_per_forward"]
    assert speed_key(Act(**act)) == "speedup" and efficient(Act(**act)) != pareto(Act(**act).rows)
    rows[0]["speedup"] = None
    assert speed_key(Act(**act)) == "tokens_per_forward"
    rows[0]["speedup"], act["ceiling"] = 1.0, [{"block_size": 4, "tokens_per_forward": 3.0}]
    assert speed_key(Act(**act)) == "tokens_per_forward"


def test_every_column_is_explained() -> None:
    text = columns_markdown()
    assert len({column.key for column in COLUMNS}) == len(COLUMNS)
    assert all(column.meaning.endswith(".") and column.meaning in text for column in COLUMNS)


def test_page_shows_the_numbers(written: Path) -> None:
    page = _Page((written / "report.html").read_text())
    for said in ("4x4 sudoku, held-out grids", "93.4% ± 1.2", "2.37", "4.62", "3.57", "1,234", "43.2%",
                 "31.4%", "99.996%", "4.2 ms", "7 + 210 + 345", "3,200", "1.234 ± 0.011", "2.567 ± 0.022",
                 "456,789", "271.8", "a small one", "block_size 8", "Never seen in training.",
                 "4 steps [$x^2$]", "= target",
                 "Only what must be there", "one run", "A bound lies above the exact number",
                 "block 8 (speculative) is lossless by construction, yet only 99.996%"):
        assert said in page.text, said
    for column in COLUMNS:
        assert column.meaning in page.text
    rows = [attrs for tag, attrs in page.tags if tag == "tr" and "data-point" in attrs]
    assert [attrs.get("class") for attrs in rows] == [None, "efficient", "efficient", None, "efficient", None]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and rows[1]["data-point"] in ids


def test_page_asks_nobody_for_anything(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = _Page(text)
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attrs.get(name) or "#").startswith("#"), (tag, attrs)
    assert "url(http" not in text.replace(" ", "") and "@import" not in text and "://" not in page.code
    assert "default-src 'none'" in text


def test_what_the_document_says_is_text_and_never_markup(document: Document) -> None:
    act = document["acts"][0]
    act["title"] = act["notes"][0] = act["quality"]["name"] = EVIL
    act["rows"][1]["setting"] = '"><b onclick="x">'
    document["environment"]["cpu"] = EVIL
    text = render_report(typed(document))
    page = _Page(text)
    assert EVIL not in text and "&lt;script&gt;" in text and page.text.count(EVIL) >= 5
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [attrs for _, attrs in page.tags if "onclick" in attrs]


def test_files_round_trip(document: Document, written: Path, tmp_path: Any) -> None:
    names = {path.name for path in written.iterdir()}
    assert names == {"frontier.csv", "frontier.png", "frontier.svg", "report.html", "results.json"}
    assert load_results(written / "results.json") == typed(document)
    again = json.loads((written / "results.json").read_text())
    assert again == document

    # The same results are the same bytes, whoever wrote them and in whatever order.
    shuffled = {key: again[key] for key in reversed(again)}
    before = copy.deepcopy(shuffled)
    assert write_report(shuffled, tmp_path / "b") == tmp_path / "b" / "report.html"
    assert shuffled == before and list(shuffled) == list(before)
    for name in ("frontier.csv", "frontier.svg", "report.html", "results.json"):
        assert (written / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_half_a_surrogate_pair_does_not_lose_a_measurement(document: Document, tmp_path: Any) -> None:
    document["acts"] = document["acts"][:1]
    document["acts"][0]["samples"][0]["outputs"]["greedy"] = "cut \ud83d"
    write_report(document, tmp_path)
    assert load_results(tmp_path / "results.json").plain() == document


def test_an_old_report_survives_a_refused_one(document: Document, written: Path) -> None:
    old = {path.name: path.read_bytes() for path in written.iterdir()}
    document["acts"][0]["rows"][0]["quality"] = float("nan")
    with pytest.raises(ValueError):
        write_report(document, written)
    assert {path.name: path.read_bytes() for path in written.iterdir()} == old


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_refused_with_the_name_of_its_field(document: Document, tmp_path: Any, value: float) -> None:
    document["acts"][0]["rows"][1]["settings"]["deep"] = [{"er": value}]
    with pytest.raises(ValueError, match=r"acts\[0\]\.rows\[1\]\.settings\.deep\[0\]\.er.*write null"):
        write_report(document, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _set(place: str, value: Any) -> Any:
    def change(document: Document) -> None:
        here: Any = document
        *way, last = [int(step) if step.isdigit() else step for step in place.split(".")]
        for step in way:
            here = here[step]
        if value is None:
            del here[last]
        else:
            here[last] = value
    return change


@pytest.mark.parametrize(("change", "message"), [
    (_set("schema", "hybrid-frontier/7"), "schema is 'hybrid-frontier/7'.*reads 'hybrid-frontier/1'.*Measure"),
    (_set("schema", None), "schema is None"),
    (_set("acts", []), "the field acts is empty; measure"),
    (_set("acts.0", 3), r"acts\[0\] is 3; it must be an object"),
    (_set("acts.0.quality.unit", None), r"the field acts\[0\]\.quality\.unit is missing"),
    (_set("acts.0.rows.1.mode", 3), r"acts\[0\]\.rows\[1\]\.mode is 3; it must be text"),
    (_set("acts.0.rows.1.tokens_per_forward", None), r"acts\[0\]\.rows\[1\]\.tokens_per_forward is missing"),
    (_set("acts.0.rows.1.agreement", "all"), r"rows\[1\]\.agreement is 'all'; it must be a number or null"),
    (_set("acts.0.rows.1.quality", True), r"rows\[1\]\.quality is True; it must be a number"),
    (_set("acts.0.likelihood.0.bound", None), r"likelihood\[0\]\.bound is missing"),
    (_set("acts.0.training.curves.ar_loss", [1.0]), r"training\.curves has lists of unequal length"),
    (_set("acts.1.name", "puzzles"), r"acts\[1\]\.name 'puzzles' stands twice"),
])
def test_load_results_names_the_field(document: Document, tmp_path: Any, change: Any, message: str) -> None:
    change(document)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as error:
        load_results(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "NaN", '{"schema": "hybrid-frontier/1", "created": NaN}'])
def test_load_results_refuses_what_is_no_document(tmp_path: Any, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results\.json"):
        load_results(path)


def test_what_json_cannot_hold_is_named(document: Document, tmp_path: Any) -> None:
    document["acts"][0]["rows"][0]["settings"]["path"] = tmp_path
    with pytest.raises(ValueError, match=r"rows\[0\]\.settings\.path is a \w*Path; convert it"):
        write_report(document, tmp_path / "new")


def test_pictures(document: Document, tmp_path: Any) -> None:
    path = tmp_path / "pictures" / "frontier.png"
    frontier_picture(typed(document), path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1680, 750)
    assert [file.name for file in path.parent.iterdir()] == ["frontier.png"]
    with pytest.raises(ValueError, match=r"ends in \.png or \.svg"):
        frontier_picture(typed(document), path.with_suffix(".jpg"))

    act, bare = typed(document).acts
    picture = frontier_svg(act)
    assert picture.startswith("<svg ") and "block, block 8, threshold 0.9: 93.4% ± 1.2 at 2.37" in picture
    curves = curves_svg(act)
    assert curves is not None and "diffusion loss" in curves
    assert curves_svg(bare) is None


@pytest.mark.parametrize("acts", [1, 2, 3])
def test_nothing_in_the_picture_is_cut_off(document: Document, acts: int, tmp_path: Any) -> None:
    from matplotlib.image import imread

    path = tmp_path / "frontier.png"
    named = [document["acts"][0] | {"name": f"act {i}"} for i in range(acts)]
    frontier_picture(typed(document | {"acts": named}), path)
    pixels = imread(path)
    for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        assert (edge == pixels[0, 0]).all()


def test_drawing_leaves_other_peoples_matplotlib_alone(document: Document) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    render_report(typed(document | {"acts": document["acts"][:1]}))
    assert dict(matplotlib.rcParams) == before
