"""The canvas in the terminal and in a log, and the slots and pieces that it is made of."""

import io
import re
from collections.abc import Sequence
from time import perf_counter

import pytest
from rich.console import Console
from sequences import ar, block, speculative, step, tell
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hybrid.sampling.display.pieces import Pieces
from hybrid.sampling.display.slots import Slot, advance
from hybrid.sampling.display.watch import Watch
from hybrid.training.text.tokenizing import character_tokenizer, train_bpe

LETTERS = character_tokenizer("abcdefghijklmnopqrstuvwxyz \n")
PROMPT = LETTERS.encode("the ")
N = len(PROMPT)


def ids(text: str) -> list[int]:
    return LETTERS.encode(text)


def console(terminal: bool = True, width: int = 40, height: int = 10) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, color_system="standard", width=width, height=height,
        legacy_windows=False, _environ={"TERM": "xterm"},
    )  # fmt: skip


def output(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def seen(screen: Console) -> str:
    """Without the codes for colours and the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output(screen))


def after(told: Sequence[Sequence[object]]) -> list[Slot]:
    slots: list[Slot] = []
    for steps in told:
        for one in steps:
            slots = advance(slots, one, N)  # type: ignore[arg-type]
    return slots


# --- Slots --------------------------------------------------------------------------------------------------


def test_left_to_right_every_token_is_revealed_and_settled_by_its_own_forward() -> None:
    slots = after(ar(ids("cat"), N))
    assert [(s.revealed, s.settled) for s in slots] == [(1, 1), (2, 2), (3, 3)]
    assert [s.token for s in slots] == ids("cat")


def test_a_settled_draft_keeps_the_forward_that_drafted_it() -> None:
    told = block(ids("cats"), N, [[1], [0, 2]])
    assert [(s.token is None, s.revealed) for s in after(told[:2])] == [
        (False, 1), (True, None), (False, 2), (True, None)
    ]  # fmt: skip
    assert [(s.revealed, s.settled) for s in after(told)] == [(1, 1), (3, 4), (2, 4), (3, 4)]


def test_a_rejected_draft_gives_way_to_the_token_of_the_verification() -> None:
    told = speculative(ids("catnip"), N, [ids("axx"), ids("nip")])
    assert [s.token for s in after(told)] == ids("catnip")
    # c by the prompt's forward; a drafted, t by the verification; then the second window, drafted afresh.
    assert [s.revealed for s in after(told)] == [1, 2, 3, 4, 4, 4]
    assert [s.settled for s in after(told)] == [1, 3, 3, 5, 5, 5]


def test_a_token_that_is_hidden_again_or_changed_is_revealed_anew() -> None:
    a, b, c = ids("abc")
    windows: list[list[int | None]] = [[a, b], [a, None], [a, b], [c, b]]
    told = [[step(i + 1, "draft", N, window=window)] for i, window in enumerate(windows)]
    assert [[s.revealed for s in after(told[: i + 1])] for i in range(4)] == [[1, 1], [1, None], [1, 3], [4, 3]]


def test_drafts_behind_text_that_was_settled_with_them_are_new() -> None:
    a, b = ids("ab")
    told = [[step(1, "draft", N, window=[a, a])], [step(2, "settle", N, [a], [a, b])]]
    assert [(s.revealed, s.settled) for s in after(told)] == [(1, 2), (2, None), (2, None)]


def test_steps_of_another_prompt_or_a_second_call_are_refused() -> None:
    told = ar(ids("cat"), N)
    with pytest.raises(ValueError, match=r"prompt: it has 4 tokens .* position 5.*without padding"):
        advance([], told[1][0], N)
    with pytest.raises(ValueError, match="each call with a watcher of its own"):
        advance(after(told), told[0][0], N)


# --- Pieces -------------------------------------------------------------------------------------------------


def test_pieces_join_to_the_text_also_where_characters_are_spread_over_tokens() -> None:
    tokenizer = train_bpe(["x = 1\n" * 9], 300)
    text = "x = 1 日本😀\n"
    tokens = tokenizer.encode(text)
    pieces = Pieces(tokenizer)(tokens)
    assert len(pieces) == len(tokens) and "".join(pieces) == text
    assert "" in pieces, "three bytes of 日 are three tokens here, and one shows it"
    half = [*tokens[:-3], None, *tokens[-2:]]
    assert Pieces(tokenizer)(half)[-3] == "" and "\N{REPLACEMENT CHARACTER}" in "".join(Pieces(tokenizer)(half))


def test_a_decoder_that_drops_the_first_space_costs_no_piece_its_own() -> None:
    inner = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2}))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert tokenizer.decode([1]) == "cat"
    assert Pieces(tokenizer)([0, None, 1, 2]) == [" the", "", " cat", "s"]


def test_control_characters_cannot_reach_the_terminal() -> None:
    tokenizer = train_bpe(["x" * 9], 260)
    screen = console()
    tokens = tokenizer.encode("\x1b[2J\x07\x9b\r")
    with Watch(tokenizer, [tokenizer.encode("\x1b]0;x\x07")], console=screen) as watch:
        tell(watch, [[step(1, "settle", len(tokenizer.encode("\x1b]0;x\x07")), tokens)]])
    assert "␛[2J␇" in output(screen) and "␛]0;x␇" in output(screen)
    assert not re.search(r"\x1b\[2J|\x1b\]0|\x07|\x9b", output(screen))


# --- In a terminal ------------------------------------------------------------------------------------------


def test_settled_drafts_and_hidden_slots_look_apart() -> None:
    watch = Watch(LETTERS, [PROMPT], console=console(terminal=False))
    watch([step(1, "prefill", N, ids("c"))])
    watch([step(2, "draft", N + 1, window=[*ids("at"), None, *ids("\n")], confidence=[0.9, 0.2, 1.0, 0.9])])
    canvas = watch.canvas()
    assert canvas.plain == "the cat·↵\n"
    styles = {canvas.plain[span.start : span.end]: span.style for span in canvas.spans}
    assert styles["the "] == "bold" and "c" not in styles, "settled text is plain"
    assert styles["a"] == styles["↵\n"] == "italic cyan"
    assert styles["t"] == "italic dim cyan", "the model is not sure of it"
    assert styles["·"] == "dim"


@pytest.mark.parametrize("keep", [True, False])
def test_a_terminal_shows_every_forward_and_gets_its_cursor_back(keep: bool) -> None:
    screen = console()
    with Watch(LETTERS, [PROMPT], keep=keep, console=screen) as watch:
        tell(watch, block(ids("cats"), N, [[1], [0, 2]]))
    places = [seen(screen).index(text) for text in ("the c\n", "the c·t·", "the cats", "forward 4, settle: 4 settled")]
    assert places == sorted(places)
    assert output(screen).rindex("\x1b[?25h") > output(screen).rindex("\x1b[?25l")
    assert output(screen).endswith("\x1b[2K") != keep, "erased up to the first line, unless it is to be kept"


def test_the_cursor_comes_back_after_an_error() -> None:
    screen = console()
    with pytest.raises(KeyError), Watch(LETTERS, [PROMPT], console=screen):
        raise KeyError
    assert "\x1b[?25h" in output(screen)


def test_a_long_text_is_shown_from_its_end_and_kept_whole() -> None:
    screen = console(width=10, height=6)
    text = ids("abcdefghi\n" * 12 + "end")
    with Watch(LETTERS, [PROMPT], console=screen) as watch:
        tell(watch, ar(text, N))
        running = output(screen)
    up = [len(jumps) // len("\x1b[1A\x1b[2K") for jumps in re.findall(r"(?:\x1b\[1A\x1b\[2K)+", output(screen))]
    assert 0 < max(up) < 6, "a frame taller than the terminal cannot be drawn over"
    frame = running[running.rindex("\x1b[1A") :]
    assert "end" in frame and "forward" in frame, "the last frame shows the end, and what was done"
    assert output(screen)[len(running) :].count("abcdefghi") == 12


def test_rows_of_a_batch_have_canvases_of_their_own() -> None:
    screen = console()
    prompts = [PROMPT, ids("a")]
    end = LETTERS.eos_token_id
    with Watch(LETTERS, prompts, console=screen) as watch:
        first, second = ar([*ids("ca"), end], N), ar([*ids("do"), end], 1, row=1)
        tell(watch, [a + b for a, b in zip(first[:2], second[:2], strict=True)])
        watch(second[2])  # the first row has ended
    assert watch.canvas(0).plain == "the ca" and watch.canvas(1).plain == "ado<|eos|>"
    assert "row 1, forward 3" in output(screen) and "row 0, forward 2" in output(screen)


def test_more_rows_than_there_is_room_for_are_counted() -> None:
    screen = console(height=8)
    with Watch(LETTERS, [PROMPT] * 9, console=screen, keep=False) as watch:
        watch([step(1, "prefill", N, ids("c"), row=row) for row in range(9)])
    assert "(7 rows more) row 1, forward 1" in seen(screen)


def test_it_rests_after_each_forward_but_not_in_a_log() -> None:
    spent = []
    for terminal in (True, False):
        with Watch(LETTERS, [PROMPT], pause=0.05, console=console(terminal)) as watch:
            begin = perf_counter()
            tell(watch, ar(ids("cats"), N))
            spent.append(perf_counter() - begin)
    assert spent[0] >= 4 * 0.05 > spent[1]


# --- In a log -----------------------------------------------------------------------------------------------


def test_without_a_terminal_there_is_one_plain_line_a_forward() -> None:
    screen = Console(file=io.StringIO(), width=20)
    with Watch(LETTERS, [PROMPT], console=screen) as watch:
        tell(watch, block(ids("cat and dog and\nbird"), N, [range(0, 18, 2), range(1, 18, 2)]))
    assert output(screen).splitlines() == [
        "   1 prefill + c",
        "   2 draft   ? a· ·n· ·o· ·n·↵·i··",
        "   3 draft   ? at and dog and↵bir·",
        "   4 settle  + at and dog and↵bird",
    ]


def test_a_log_of_a_batch_names_the_row() -> None:
    screen = Console(file=io.StringIO())
    with Watch(LETTERS, [PROMPT, PROMPT], console=screen) as watch:
        watch([step(1, "prefill", N, ids("c")), step(1, "prefill", N, row=1)])
    assert output(screen).splitlines() == ["   1 prefill row 0 + c", "   1 prefill row 1 "]


# --- Bad input ----------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"prompts: it is empty.*\[ids\]"):
        Watch(LETTERS, [])
    for pause in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"pause: it is .*seconds"):
            Watch(LETTERS, [PROMPT], pause=pause)
    with pytest.raises(ValueError, match="prompts: there are 1, but row 1"):
        Watch(LETTERS, [PROMPT], console=console(False))([step(1, "prefill", N, row=1)])
