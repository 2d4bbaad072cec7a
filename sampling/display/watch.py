"""The canvas filling in the terminal, forward by forward."""

import math
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hybrid.sampling.display.pieces import Pieces, visible
from hybrid.sampling.display.slots import Slot, advance
from hybrid.sampling.record import Step
from hybrid.texts import decode

HIDDEN = "·"
DRAFT, UNSURE, PROMPT, FAINT = "italic cyan", "italic dim cyan", "bold", "dim"
_SURE = 0.5  # a draft of a lower probability is shown faintly
_LEAST_LINES = 3  # of a row's canvas; rows for which the terminal has less room are left out


class Watch:
    """Shows what is settled, drafted and hidden after each forward; one of the `watchers` of `generate`.

    Settled tokens are plain, drafts cyan and slanted (faint below a probability of 0.5), hidden slots dots, the prompt
    bold. A text taller than the terminal is shown from its end. Where the console is no terminal, there is one line
    for each row and forward with what became of it, and no pause.

        with Watch(tokenizer, [ids], pause=0.1) as watch:
            model.generate(torch.tensor([ids]), mode="block", watchers=[watch])
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        *,
        pause: float = 0.0,
        keep: bool = True,
        console: Console | None = None,
    ) -> None:
        """`prompts`: token ids of each row of the batch, without padding. `pause`: seconds to rest after each forward.
        `keep`: leave the whole last canvas in the terminal at the end. `console`: where to draw; without it the error
        stream, so that the output stays free for the text.

        Raises ValueError for an empty batch, and for a pause that is negative or not finite.
        """
        if not prompts:
            raise ValueError("prompts: it is empty; give the token ids of each row, [ids] for a single one.")
        if not (math.isfinite(pause) and pause >= 0):
            raise ValueError(f"pause: it is {pause}; give seconds to rest after each forward, 0 for none.")
        self.pause, self.keep = pause, keep
        self.console = console or Console(stderr=True)
        self._pieces = Pieces(tokenizer)
        self._lengths = [len(ids) for ids in prompts]
        self._prompts = [visible(decode(tokenizer, ids)) for ids in prompts]
        self._slots: list[list[Slot]] = [[] for _ in prompts]
        self._last: list[Step | None] = [None for _ in prompts]
        self._live: Live | None = None
        self._over = False

    def __enter__(self) -> "Watch":
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            # Output that goes to a file must not be turned aside to the terminal.
            self._live = Live(
                console=self.console, get_renderable=self._screen, auto_refresh=False, transient=not self.keep,
                vertical_overflow="crop", redirect_stdout=sys.stdout.isatty(),
            )  # fmt: skip
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._over = self.keep
            self._live.stop()
            self._live = None

    def __call__(self, steps: Sequence[Step]) -> None:
        """Draw what `steps` changed. Raises ValueError for steps of rows or positions that the prompts do not have."""
        for step in steps:
            if step.row >= len(self._slots):
                raise ValueError(
                    f"prompts: there are {len(self._slots)}, but row {step.row} is being decoded; give one for each."
                )
            self._slots[step.row] = advance(self._slots[step.row], step, self._lengths[step.row])
            self._last[step.row] = step
            if self._live is None:
                self.console.print(self._line(step), soft_wrap=True)
        if self._live is not None:
            self._live.refresh()
            time.sleep(self.pause)

    def canvas(self, row: int = 0) -> Text:
        """The row's prompt and what stands behind it now."""
        drawn = self._drawn(self._slots[row])
        return Text(overflow="fold").append(self._prompts[row], PROMPT).append_text(drawn)

    def _drawn(self, slots: Sequence[Slot]) -> Text:
        text = Text()
        for slot, piece in zip(slots, self._pieces([slot.token for slot in slots]), strict=True):
            if slot.token is None:
                text.append(HIDDEN, FAINT)
            elif slot.settled is not None:
                text.append(piece)
            else:
                # A drafted end of line would otherwise not be seen to be a draft.
                text.append(piece.replace("\n", "↵\n"), DRAFT if slot.confidence >= _SURE else UNSURE)
        return text

    def _status(self, row: int) -> Text:
        step, slots = self._last[row], self._slots[row]
        settled = sum(slot.settled is not None for slot in slots)
        hidden = sum(slot.token is None for slot in slots)
        words = "before the first forward" if step is None else (
            f"forward {step.forward}, {step.kind}: "
            f"{settled} settled, {len(slots) - settled - hidden} drafted, {hidden} hidden"
        )  # fmt: skip
        words = words if len(self._slots) == 1 else f"row {row}, {words}"
        return Text(words, style=FAINT, no_wrap=True, overflow="ellipsis")

    def _line(self, step: Step) -> Text:
        """What a step did to its row, in one line for a log."""
        changed = self._slots[step.row][-len(step.settled) - len(step.window) :] if step.confidence else []
        head = f"{step.forward:4} {step.kind:7} "
        if len(self._slots) > 1:
            head += f"row {step.row} "
        drawn = self._drawn(changed)
        text = Text(head + ("+ " if step.settled else "? " if step.window else ""))
        return text.append(drawn.plain.replace("↵\n", "↵").replace("\n", "↵"))

    def _screen(self) -> Group:
        width, height = self.console.size
        room = len(self._slots) if self._over else max(1, min(len(self._slots), height // (_LEAST_LINES + 1)))
        lines: list[Text] = []
        for row in range(room):
            canvas = self.canvas(row).wrap(self.console, width)
            # One line of the terminal stays free for the cursor.
            tail = len(canvas) if self._over else max(1, (height - 1) // room - 1)
            lines += [*canvas[-tail:], self._status(row)]
        if room < len(self._slots):
            more = Text(f"({len(self._slots) - room} rows more) ", FAINT, no_wrap=True, overflow="ellipsis")
            lines[-1] = more.append_text(lines[-1])
        return Group(*lines)
