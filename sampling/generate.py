"""`generate`: continue text in one of four modes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hybrid import HybridForCausalLM, KVCache
from hybrid.common.checks import require
from hybrid.law import Law
from hybrid.sampling.options.auto import chosen
from hybrid.sampling.options.checks import Options
from hybrid.sampling.options.merge import LENGTHS, merge
from hybrid.sampling.options.prompt import check_cache, checked_prompt, prompt_of
from hybrid.sampling.options.settings import new_tokens, plan_of
from hybrid.sampling.record import scores_of
from hybrid.sampling.request import check_streamer, made
from hybrid.sampling.row import Plan, Row
from hybrid.sampling.rows import Rows
from hybrid.sampling.stats import GenerationStats
from hybrid.sampling.their_loop import in_their_loop


@dataclass
class GenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences: int64 `[B, T + new]`: the input as given and the new tokens, right-padded.
        scores: with `output_scores`, for each new token float32 `[B, V]`: the logits it was chosen by, processed and
            warped, at the moment when it was revealed. 0 behind the end of a row.
        log_probs: with `output_scores`, float32 `[B, new]`: the model's log-probability of each new token at that
            moment, before any warping. 0 behind the end of a row.
        stats: the ledger of forwards.
        past_key_values: hand it to the next `generate`, in any mode, with the whole text. None for models with
            `clean_attention="full"`, which have no exact cache.
    """

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    log_probs: Tensor | None = None
    stats: GenerationStats | None = None
    past_key_values: KVCache | None = None


@torch.no_grad()
def generate(
    model: HybridForCausalLM,
    input_ids: Any = None,
    attention_mask: Any = None,
    *,
    past_key_values: KVCache | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    **kwargs: Any,
) -> Tensor | GenerateOutput:
    """Continue `input_ids`, int64 `[B, T]`.

    Args:
        input_ids: a list, an array or a tokenizer's output will do. Without any, a text begins with `bos_token_id`.
        attention_mask: 0 for padding, anywhere in a row. Without it, pad tokens are padding where a text cannot end
            with them.
        mode: "ar" one token a forward; "block" drafts `block_size` tokens at once, then settles them;
            "diffusion" drafts all that is left at once; "speculative" drafts a block once and keeps what the
            left-to-right model confirms: the same tokens as "ar", in fewer forwards; "auto" takes the one that
            `hybrid bench calibrate` measured to be fastest, of those that change no token and those named in
            `auto_allow`, and says in `stats.choice` what it took and why.
        max_new_tokens: tokens a row at most (default 128, or what the context has room for).
        block_size: the window of "block" and "speculative". By default the checkpoint's; "speculative" then makes
            it as narrow as its drafts deserve.
        fused: "speculative" verifies and drafts in one forward a round instead of two.
        drafts_per_round: "speculative" gives a window this many drafts before it is verified, in which a reveal rule
            shows some of it and then the last one all that is left. With a rule or one of its options and without this,
            as many as the rule takes; without both, one.
        reveal: which drafts are shown after each forward in "block" and "diffusion": a rule of `hybrid.sampling.reveal`
            by its name and with its options, or a function; by default "threshold" with a `confidence_threshold` of
            0.9. An option that one rule alone has names it; of those that several have, `steps_per_block` means
            "steps" and `confidence_threshold` "threshold".
        sub_block_size: fill a block in parts of this size, one after the other, as Fast-dLLM v2 does.
        blocks_in_flight, block_add_threshold: for models with clean_attention="block" in mode="block": draft so many
            blocks at once, each seeing the unfinished ones before it; the next one joins when this share of the last
            one's slots is shown (default 0.1, 0: at once). Behind the first block only what the rule is sure of is
            shown ("threshold", "factor"). This changes the text, as a lower threshold does.
        kwargs: the options here, and transformers' own: do_sample, temperature, top_k, top_p, min_p, eos_token_id,
            pad_token_id, num_return_sequences, return_dict_in_generate, generation_config, repetition_penalty,
            no_repeat_ngram_size, bad_words_ids, sequence_bias, suppress_tokens, min_new_tokens, logits_processor,
            stopping_criteria, stop_strings (with `tokenizer`), max_time, streamer, output_scores. temperature 0 is
            greedy, and do_sample alone draws from the whole law (transformers adds a top_k of 50 of its own). A
            processor sees the text before the token that it judges: where it looks at what that says, "block" and
            "diffusion" draft from left to right, a slot each. One of the caller's that is an object is copied for
            every row but the first.
        streamer: is told the prompt and then what is settled, and drafts where it has `put_draft`; of a batch a list of
            them, one a row, each told what the row alone would tell it, or None. `end` is called when its row has
            ended, and whatever fails.
        draft_adapter: a `DraftAdapter`, or the folder of one (peft's format): active while drafting only.
        scheme: a class of your own that spends the forwards of the mode, made from the one that it has
            (docs/howto/add-a-mode.md).
        watchers: functions that are called after every forward with a list of `Step`s, one an active row.
        generator: source of all randomness when sampling: one, or one per row; by default freshly seeded.
            PyTorch's global random state is neither read nor changed.
        past_key_values: the cache of an earlier `generate` in any mode; `input_ids` is then the whole text.
        guidance_scale: for models with clean_attention="full", classifier-free guidance as LLaDA has it (its
            `cfg_scale` is one less): each draft also looks at the text without its prompt, and goes away from that.
            1 is none. For others it is transformers', with mode="ar".
        cache: for models with clean_attention="full", which have no exact one: "prefix" reuses the keys of what stands
            before the block while it is drafted, "dual" also those of what stands behind it (Fast-dLLM). Both change
            the text, and `stats.approximate` says so.

    Returns:
        `sequences`, or a `GenerateOutput` with `return_dict_in_generate=True`. Options that only transformers'
        own loops have (beam search and the like) send mode="ar" there.

    Raises:
        ValueError: an argument is out of range or does not go with another; the message names it.
    """
    if getattr(kwargs.get("generation_config"), "is_assistant", False):  # transformers' loop asks, for another model
        return model._transformers_generate(
            input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
    input_ids, attention_mask = prompt_of(input_ids, attention_mask, kwargs)
    options = merge(model, kwargs)
    if input_ids is None and kwargs.get("inputs_embeds") is not None:
        return in_their_loop(model, None, attention_mask, options, kwargs, past_key_values, generator)
    begin = options.get("bos_token_id", model.config.bos_token_id)
    if input_ids is None and attention_mask is None and begin is not None:
        input_ids = torch.tensor([[begin]])
    input_ids, real, texts = checked_prompt(model, input_ids, attention_mask, options)
    repeats, choice = options.whole("num_return_sequences", 1), None
    if options.get("mode") == "auto":
        options, choice = chosen(model, options, repeats * len(texts))
    require(choice is not None or "auto_allow" not in options.explicit, "auto_allow says what mode='auto' may choose.")
    if options.theirs:
        return in_their_loop(model, input_ids, real, options, kwargs, past_key_values, generator)
    input_ids, texts = input_ids.repeat_interleave(repeats, 0), [text for text in texts for _ in range(repeats)]
    plan, lengths = plan_of(model.config, options), [len(text) for text in texts]
    count = new_tokens(model.config, options, max(lengths))
    if past_key_values is not None:
        check_cache(model, past_key_values, texts, plan.law)
    call = _Call(model, plan, options, generator)
    call.run(texts, lengths, [length + count for length in lengths], past_key_values)

    pads = (options.get("pad_token_id"), model.config.pad_token_id, *plan.eos, 0)
    pad = next(int(p) for p in pads if p is not None)
    new = [torch.tensor(row.new, device=input_ids.device) for row in call.rows]
    tail = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=pad)
    return call.output(torch.cat([input_ids, tail], 1), choice)


@torch.no_grad()
def infill(
    model: HybridForCausalLM,
    input_ids: Any = None,
    attention_mask: Any = None,
    *,
    generator: torch.Generator | list[torch.Generator] | None = None,
    **kwargs: Any,
) -> Tensor | GenerateOutput:
    """Fill every mask token of `input_ids`, int64 `[B, T]`, wherever it stands, with both sides seen.

    What stands before a row's first mask is read as clean text; from there to the end the text is one canvas.

    Args:
        attention_mask: 0 for padding, anywhere in a row.
        block_size: reveal the masks in this many slots at a time, from left to right; by default in any order.
        generator: source of all randomness when sampling, as in `generate`.
        kwargs: reveal, do_sample, temperature, top_k, top_p, min_p, watchers, output_scores, return_dict_in_generate
            and the other options, as in `generate`. End-of-text tokens do not end a gap.

    Returns:
        `input_ids` with the masks filled, or a `GenerateOutput` with `return_dict_in_generate=True`, whose
        `past_key_values` is None.

    Raises:
        ValueError: an argument is out of range, does not go with another, or a row has no mask token.
    """
    for name in (*LENGTHS, "mode", "past_key_values", "num_return_sequences", "auto_allow"):
        require(kwargs.get(name) is None, f"{name}: infill fills the gaps that are there; leave it out.")
    input_ids, attention_mask = prompt_of(input_ids, attention_mask, kwargs)
    options = merge(model, kwargs, infill=True)
    require(not options.theirs, f"{', '.join(sorted(options.theirs))}: only generate with mode='ar' has this.")
    require((problem := Law.of(model.config).refusal("infill")) is None, problem or "")
    input_ids, real, texts = checked_prompt(model, input_ids, attention_mask, options, gaps=True)
    call = _Call(model, plan_of(model.config, options, infill=True), options, generator)
    call.run(texts, [text.index(model.config.mask_token_id) for text in texts], [len(text) for text in texts], None)
    filled = [torch.tensor(row.text, device=real.device) for row in call.rows]
    index = (real.cumsum(1) - 1).clamp(min=0)
    padded = torch.nn.utils.rnn.pad_sequence(filled, batch_first=True)
    return call.output(padded.gather(1, index).where(real, input_ids))


class _Call:
    """One call of `generate` or `infill`: all its rows, admitted at once."""

    def __init__(self, model: HybridForCausalLM, plan: Plan, options: Options, generator: Any) -> None:
        self.model, self.plan, self.options, self.generator = model, plan, options, generator
        self.rows: list[Row] = []

    def run(self, texts: list[list[int]], lengths: list[int], limits: list[int], cache: KVCache | None) -> None:
        """Decode to the end."""
        model, plan, options, count = self.model, self.plan, self.options, len(texts)
        streamers, generators = _streamers(options, count), _generators(self.generator, count)
        if cache is None:
            cache = KVCache(model.config, count, max(limits) + plan.block_size, model.device, model.dtype)
        rows, self.cache = Rows(model, count, adapter=options.get("draft_adapter"), cache=cache), cache
        self.stats = rows.stats
        self.stats.mode, self.stats.cache = plan.mode, plan.cache
        try:
            for i, (text, length, limit) in enumerate(zip(texts, lengths, limits, strict=True)):
                own = replace(options, ours={**options.ours, "streamer": streamers[i]})
                self.rows.append(made(model, plan, own, text, length, limit, i, generators[i], copied=i > 0))
                rows.add(self.rows[-1])
            while rows.waiting or rows.active:
                for row in rows.step():
                    if row.error is not None:
                        raise row.error
        except BaseException:
            # Something of the caller's failed: the cache goes back to the text that the caller has.
            rows.end_streams()
            self._restore_order()
            cache.rewind([min(n, m) for n, m in zip(cache.lengths, lengths, strict=True)])
            raise
        self._restore_order()
        self.stats.finish([row.stats for row in self.rows])

    def _restore_order(self) -> None:
        """Rows may have changed places: the caller's cache gets its own order back."""
        places = [row.place for row in self.rows if row.place >= 0]
        if len(places) == len(self.cache.lengths) and places != sorted(places):
            self.cache.select(places)
        self.cache.focus(0, len(self.cache.lengths))

    def output(self, sequences: Tensor, choice: str | None = None) -> Tensor | GenerateOutput:
        """What the caller asked for."""
        options, infill = self.options, self.plan.mode == "infill"
        if not options.get("return_dict_in_generate"):
            return sequences
        self.stats.choice = choice
        exact = Law.of(self.model.config).cached and options.get("use_cache", True) and not infill
        scores = log_probs = None
        if options.get("output_scores"):
            records = [row.record for row in self.rows if row.record is not None]
            counts = [row.limit - row.prompt if infill else row.stats.tokens for row in self.rows]
            scores, log_probs = scores_of(records, counts)
        return GenerateOutput(
            sequences=sequences, scores=scores, log_probs=log_probs, stats=self.stats,
            past_key_values=self.cache if exact else None,
        )  # fmt: skip


def _streamers(given: Options, rows: int) -> Sequence[Any]:
    """One for each row, or None where nobody is shown it."""
    streamer = given.get("streamer")
    found = list(streamer) if isinstance(streamer, list | tuple) else [streamer] * rows
    require(
        len(found) == rows and (streamer is None or rows == 1 or isinstance(streamer, list | tuple)),
        f"streamer: one shows one text, and the batch has {rows} rows: pass a list with one for each of them, or None "
        "for those that nobody is shown.",
    )
    for one in found:
        check_streamer(one)
    shown = [id(one) for one in found if one is not None]
    require(len(set(shown)) == len(shown), "streamer: one of the list is there twice, and would mix two texts.")
    return found


def _generators(generator: Any, rows: int) -> Sequence[torch.Generator]:
    """One for each row; by default one that is freshly seeded for all."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if isinstance(generator, torch.Generator):
        return [generator] * rows
    require(
        isinstance(generator, Sequence) and not isinstance(generator, str),
        f"generator is {generator!r}; pass a torch.Generator (torch.Generator().manual_seed(0), say), or a list.",
    )
    generators = list(generator)
    require(
        len(generators) == rows and all(isinstance(g, torch.Generator) for g in generators),
        f"generator: one torch.Generator, or a list with one for each of the {rows} rows; got {len(generators)}.",
    )
    return generators
