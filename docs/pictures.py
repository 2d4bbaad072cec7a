"""Draws the pictures of concepts.md: `python docs/pictures.py`, from anywhere; the pictures are kept beside it."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from torch import Tensor
from transformers import AutoTokenizer

from hybrid import HybridForCausalLM, Layout, visible
from hybrid.evals.laboratory.traces import Trace
from hybrid.sampling.display.pieces import Pieces
from hybrid.sampling.display.slots import Slot, advance
from hybrid.texts import encode

HERE = Path(__file__).parent
PROMPT, NEW = "if __name__ ==", 28
WAYS = {
    "ar": {"mode": "ar"},
    "block (windows of 8, shown at 0.5)": {"mode": "block", "block_size": 8, "confidence_threshold": 0.5},
    "diffusion (one window, shown at 0.4)": {"mode": "diffusion", "confidence_threshold": 0.4},
    "speculative (windows of 8)": {"mode": "speculative", "block_size": 8},
}
STYLE = (
    "text{font:13px ui-monospace,monospace;fill:#222}.s{font-size:10px;fill:#777}.h{font:14px sans-serif}"
    ".on{fill:#31688e}.off{fill:#eee}.own{fill:#35b779}"
)
WIDTH = 800


def picture(body: Sequence[str], height: int, about: str) -> str:
    """An SVG of its own ground, so that it is read on dark pages too."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{about}">\n'
        f'<style>{STYLE}</style>\n<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n'
        + "\n".join(body) + "\n</svg>\n"
    )  # fmt: skip


def sight(x: int, y: int, title: str, names: Sequence[str], seen: Tensor, noisy: Sequence[bool]) -> list[str]:
    """Who sees whom: a row for each token that looks, a column for each that is looked at."""
    size, left, top = 20, x + 44, y + 46
    body = [f'<text class="h" x="{x}" y="{y + 12}">{escape(title)}</text>']
    for i, name in enumerate(names):
        body.append(f'<text x="{left - 6}" y="{top + i * size + 14}" text-anchor="end">{name}</text>')
        body.append(f'<text x="{left + i * size + 9}" y="{top - 6}" text-anchor="middle" class="s">{name}</text>')
        for j, sees in enumerate(seen[i].tolist()):
            kind = "off" if not sees else "own" if noisy[j] else "on"
            place = f'x="{left + j * size}" y="{top + i * size}"'
            body.append(f'<rect class="{kind}" {place} width="{size - 2}" height="{size - 2}"/>')
    return body


def who_sees_whom() -> str:
    """The rule over three layouts: plain text, a window behind it, and the two views of training."""
    five, at = torch.arange(5)[None], torch.arange(3, 7)[None]
    text = Layout.causal(five)
    drafting = Layout.causal(torch.arange(3)[None]).cat(Layout.window(at))
    four = torch.arange(4)[None]
    both = Layout.causal(four).cat(Layout.of(four, four // 2 * 2, stream=1))
    body = []
    for x, title, layout, names in (
        (10, "text, left to right", text, "t0 t1 t2 t3 t4"),
        (235, "text, and a window of 4 masks", drafting, "t0 t1 t2 m3 m4 m5 m6"),
        (500, "training: text, and blocks of 2", both, "t0 t1 t2 t3 m0 m1 m2 m3"),
    ):
        body += sight(x, 10, title, names.split(), visible(layout, layout)[0], (layout.stream[0] > 0).tolist())
    body.append('<text class="s" x="10" y="238">rows look, columns are looked at; blue: clean text, green: masks of '
                "the same window</text>")  # fmt: skip
    return picture(body, 250, "Which token sees which")


def which_forward_wrote_what() -> str:
    """The shipped model continues a line in four ways; each token has the colour of the forward that showed it."""
    model = HybridForCausalLM.from_pretrained("hybrid-stdlib").eval()
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    prompt = encode(tokenizer, PROMPT)
    body, y = [f'<text class="h" x="10" y="22">{escape(PROMPT.strip())} … continued, {NEW} tokens</text>'], 50
    for name, options in WAYS.items():
        trace = Trace()
        options = {"eos_token_id": [], **options}
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, watchers=[trace], return_dict_in_generate=True, **options
        )
        slots: list[Slot] = []
        for step in trace.row():
            slots = advance(slots, step, len(prompt))
        count, last = out.stats.forwards, max(slot.revealed or 0 for slot in slots)
        body.append(f'<text class="h" x="10" y="{y}">{escape(name)}: {count} forwards</text>')
        x, y = 10, y + 10
        for slot, piece in zip(slots, Pieces(tokenizer)([slot.token for slot in slots]), strict=True):
            shown = piece.replace("\n", "↵").replace(" ", "·")
            wide = 8 * len(shown) + 8
            if x + wide > WIDTH - 10:
                x, y = 10, y + 38
            share = ((slot.revealed or 1) - 1) / max(1, last - 1)
            ground, ink = to_hex(colormaps["viridis"](share)), "#fff" if share < 0.6 else "#222"
            body.append(f'<rect x="{x}" y="{y}" width="{wide - 2}" height="20" rx="3" fill="{ground}"/>')
            body.append(f'<text x="{x + 3}" y="{y + 14}" style="fill:{ink}">{escape(shown)}</text>')
            body.append(f'<text class="s" x="{x + 3}" y="{y + 31}">{slot.revealed}</text>')
            x += wide
        y += 62
    return picture(body, y - 20, "Which forward wrote which token, in four modes")


def main() -> None:
    (HERE / "visible.svg").write_text(who_sees_whom())
    (HERE / "trace.svg").write_text(which_forward_wrote_what())


if __name__ == "__main__":
    main()
