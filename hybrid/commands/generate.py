"""`hybrid generate`: continue a prompt from the command line."""

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from hybrid.commands.models import load, load_tokenizer
from hybrid.commands.options import Choice, On, Window, check_counts, check_file
from hybrid.commands.options import given as stated
from hybrid.commands.samples import write_samples
from hybrid.common.files import BadLine, real_text
from hybrid.evals.laboratory.traces import Trace, write_trace
from hybrid.law import Law
from hybrid.sampling.display.watch import Watch
from hybrid.sampling.record import Watcher
from hybrid.texts import chat_text, decode, encode, encode_gaps

# What every mode takes.
COMMON = (
    "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop_strings",
    "tokenizer",
)  # fmt: skip


def generate(
    prompt: str,
    model: str = "hybrid-stdlib",
    mode: Literal["ar", "block", "diffusion", "speculative", "auto"] = "ar",
    infill: bool = False,
    chat: bool = False,
    max_new_tokens: int | None = None,
    window: Window = Window(),
    choice: Choice = Choice(),
    stop: str | None = None,
    seed: int = 0,
    watch: bool = False,
    pause: float = 0.0,
    trace: Path | None = None,
    jsonl: Path | None = None,
    batch_size: int | None = None,
    on: On = On(),
    adapter: str | None = None,
) -> None:
    """Continue a prompt, or fill gaps in it.

    Prints the text, and on the error stream what it took: tokens, forwards, tokens a second. Try the same prompt with
    --mode ar and --mode speculative: the text is the same, the number of forwards is not. With --infill the prompt has
    gaps: `hybrid generate --infill 'def add(a, b):<mask:12>return c'` fills twelve tokens, seeing both sides.

    Args:
        prompt: the text to continue; "-" reads it from the standard input.
        model: folder of a trained model, hub name or shipped model.
        mode: "ar" is one token a forward; "block" drafts a window of tokens and settles it; "diffusion" drafts all
            that is left at once; "speculative" drafts a window and keeps what the left-to-right model confirms;
            "auto" is the fastest lossless one that `hybrid bench calibrate` measured.
        infill: fill each <mask> or <mask:N> of the prompt with one or N tokens, instead of continuing it.
        chat: the prompt is a user's message to a model of chat, put in its chat template; prints the answer alone.
        max_new_tokens: how many tokens at most (default: 128, or what the context has room for).
        stop: end the text with this string.
        seed: of the sampling.
        watch: show the text while it comes about: settled tokens, drafts, and what is still hidden.
        pause: seconds to wait after each forward, so that --watch can be followed.
        trace: write a page to this file that shows, for every mode that the model has, which forward revealed which
            token and how sure the model was.
        jsonl: write to this file, a line for each prompt; the prompt is then a JSONL file of them, each line with
            "messages", to be answered as a chat, or "prompt", to be continued. The same command goes on where it was
            stopped.
        batch_size: prompts at once with --jsonl (default: 16).
        adapter: folder of a draft adapter (peft's format), active while drafting only.
    """
    if jsonl is not None and (infill or watch or trace is not None):
        raise ValueError("--jsonl writes a file of texts: leave --infill, --watch and --trace out.")
    if jsonl is not None and chat:
        raise ValueError('--chat: the lines of --jsonl say it themselves, with "messages" or "prompt": leave it out.')
    if jsonl is None and batch_size is not None:
        raise ValueError("--batch-size is of --jsonl, with many prompts: leave it out.")
    if pause and not watch:
        raise ValueError("--pause is of --watch: give that, too, or leave it out.")
    if chat and infill:
        raise ValueError("--chat puts a message in the chat template, and --infill fills gaps: leave one out.")
    if not choice.temperature and (idle := {"top_k", "top_p", "min_p"} & set(stated(choice))):
        raise ValueError(f"{', '.join(sorted(idle))}: nothing is sampled without a --temperature: give one above 0.")
    if infill and mode != "ar":
        raise ValueError("--infill fills gaps, and --mode says how text is continued: leave one out.")
    if infill and (stop is not None or max_new_tokens is not None):
        raise ValueError("--stop, --max-new-tokens: a gap has its length; leave them out with --infill.")
    check_counts(batch_size=batch_size)
    check_file("trace", trace)
    check_file("jsonl", jsonl)
    loaded, tokenizer = load(model, on), load_tokenizer(model)
    options = {
        **stated(window), **stated(choice), "max_new_tokens": max_new_tokens, "do_sample": choice.temperature > 0,
        "temperature": choice.temperature or None, "stop_strings": stop, "tokenizer": tokenizer if stop else None,
        "draft_adapter": adapter,
    }  # fmt: skip
    given: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    if jsonl is not None:
        given = {"mode": mode, "max_new_tokens": 128, **given}
        made = write_samples(
            Path(prompt), jsonl, loaded, tokenizer, batch_size=batch_size or 16, seed=seed, options=given
        )
        print(f"[{made} lines written to {jsonl}]", file=sys.stderr)
        return
    ids = _ids(loaded, tokenizer, sys.stdin.read() if prompt == "-" else prompt, chat, infill)
    _show(loaded, tokenizer, ids, "infill" if infill else mode, given, seed, chat, pause if watch else None, trace)


def _ids(model: Any, tokenizer: Any, text: str, chat: bool, infill: bool) -> list[int]:
    try:
        real_text(text)
    except BadLine as error:
        raise ValueError(f"prompt {error}.") from error
    if chat:
        return encode(tokenizer, chat_text(tokenizer, [{"role": "user", "content": text}], "--chat"), "--chat")
    if not infill:
        return encode(tokenizer, text)
    mask = model.config.mask_token_id
    if mask is None:
        raise ValueError("model: a pure AR model (mask_token_id is None) fills no gaps; see `hybrid convert`.")
    return encode_gaps(tokenizer, text, mask)


def _show(
    model: Any, tokenizer: Any, ids: list[int], mode: str, given: dict[str, Any], seed: int, chat: bool,
    pause: float | None, trace: Path | None,
) -> None:  # fmt: skip
    """Prints the text, and on the error stream what it took. `pause`: between forwards that are watched."""

    def run(mode: str, watchers: list[Watcher], **options: Any) -> Any:
        how = {"generator": torch.Generator().manual_seed(seed), "return_dict_in_generate": True, **options}
        way = model.infill if mode == "infill" else partial(model.generate, mode=mode)
        return way(torch.tensor([ids]), watchers=watchers, **how)

    shown = ids[: ids.index(model.config.mask_token_id)] if mode == "infill" else ids
    traced: dict[str, Trace] = {}
    watchers: list[Watcher] = []
    with contextlib.ExitStack() as stack:
        if trace is not None:
            watchers.append(traced.setdefault(mode, Trace()))
        if pause is not None:
            watchers.append(stack.enter_context(Watch(tokenizer, [shown], pause=pause, keep=False)))
        out = run(mode, watchers, **given)
    if trace is not None:
        for other in () if mode == "infill" else Law.of(model.config).modes:
            if other not in traced:
                run(other, [traced.setdefault(other, Trace())], **{k: v for k, v in given.items() if k in COMMON})
        print(f"[{write_trace(trace, traced, tokenizer, shown)}]", file=sys.stderr)
    found = out.sequences[0].tolist()
    print(decode(tokenizer, found[len(ids) :], after=ids) if chat else decode(tokenizer, found))
    print(f"[{out.stats}]", file=sys.stderr)
    if out.stats.choice:
        print(f"[{out.stats.choice}]", file=sys.stderr)
