"""From what a client asked to jobs: texts are encoded, limits are kept, options find their names.

All of it runs in one thread: a tokenizer that is told for one text whether special tokens are meant must not be read
for another meanwhile.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.sampling.display.pieces import Pieces
from hybrid.sampling.places import free_bytes
from hybrid.sampling.request import Request, options_of
from hybrid.sampling.row import Plan
from hybrid.sampling.schemes.speculation import Fused
from hybrid.sampling.serve.decoder import Decoder
from hybrid.sampling.serve.grammar import Follow, Grammar
from hybrid.sampling.serve.jobs import End, Job, News
from hybrid.sampling.serve.protocol import ApiError, Asked, Chat, Completion, expect
from hybrid.sampling.serve.text import Stops, Text
from hybrid.texts import chat_text, count_spelled, decode, encode, encode_behind, encode_gaps

NEW_TOKENS = {Completion: 128, Chat: 1024}  # where a request does not say
GAP = 16  # tokens between a prompt and a suffix, likewise
STOP = 256  # characters of a stop string
BIASES = 1024  # tokens with a bias
TOO_LONG = "context_length_exceeded"
COPIES = 4  # of the logits of a window, while a rule looks at them
SHARE = 0.25  # of the memory that is free


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for at most.

    Attributes:
        body: bytes of a request.
        prompt: tokens of a prompt.
        max_tokens: new tokens of a text.
        canvas: new tokens of a text whose window is all of it: of `diffusion`, of gaps that are filled, and of models
            that see everything at once.
        window: slots that a text of `block` and `speculative` puts into one forward.
        n: texts for one prompt.
        stops: strings that end a text.
        max_queue: texts that wait.
        seconds: of a request, waiting included.
        sending: seconds that a client may take to send a request.
        connections: at once.
    """

    body: int = 2 * 2**20
    prompt: int
    max_tokens: int
    canvas: int
    window: int = 256
    n: int = 16
    stops: int = 16
    max_queue: int = 256
    seconds: float = 600.0
    sending: float = 20.0
    connections: int = 1024


def canvas_of(model: HybridForCausalLM, slots: int) -> int:
    """New tokens whose logits, those of all `slots` together, take a quarter of the memory that is free now."""
    each = slots * model.config.vocab_size * torch.float32.itemsize * COPIES
    return max(16, int(SHARE * free_bytes(model)) // each)


class Penalties:
    """The logits processor of presence_penalty and frequency_penalty: of the tokens that were generated so far."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        new = ids[0, self.prompt :]
        counts = scores.new_zeros(scores.shape[-1]).index_add_(0, new, scores.new_ones(len(new)))
        return scores - self.presence * (counts > 0) - self.frequency * counts


class Asks:
    """Makes jobs of what clients ask."""

    def __init__(
        self, model: HybridForCausalLM, tokenizer: Any, reader: Any, decoder: Decoder, limits: Limits
    ) -> None:
        """`reader`: a copy of the tokenizer for the decoding thread; None, like that: there is none."""
        self.model, self.tokenizer, self.reader = model, tokenizer, reader
        self.decoder, self.limits = decoder, limits
        self.pieces = None if reader is None else Pieces(reader)
        self.longest = 4 * max(map(len, reader.get_vocab())) if reader is not None else 0  # characters of a token

    def prepare(
        self, body: Asked, grammar: Grammar | None, user: str, arrived: float, tell: Callable[[Job, News | End], None]
    ) -> list[Job]:
        """The jobs of a request, `n` for each prompt, which are not submitted yet.

        Raises:
            ApiError: it cannot be done, or asks for more than may be.
        """
        try:
            self._check_sizes(body)
            prompts, echoes, jobs = self._prompts(body), self._echoes(body), list[Job]()
            for number in range(len(prompts) * body.n):
                prompt, choice = divmod(number, body.n)
                request, plan, text = self._request(body, prompts[prompt], choice, grammar)
                jobs.append(Job(
                    body=body, request=request, plan=plan, text=text, pieces=self.pieces, user=user, tell=tell,
                    number=number, echo=echoes[prompt], arrived=arrived, deadline=arrived + self.limits.seconds,
                ))  # fmt: skip
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        return jobs

    def _check_sizes(self, body: Asked) -> None:
        limits, biases = self.limits, body.logit_bias or {}
        expect(body.n <= limits.n, f"n is {body.n}, and at most {limits.n} may be.", "n")
        few = len(body.stops) <= limits.stops and all(0 < len(stop) <= STOP for stop in body.stops)
        expect(few, f"stop: at most {limits.stops} strings of 1 to {STOP} characters may be.", "stop")
        if self.tokenizer is None:
            reads = "this model has no tokenizer, so that it reads and writes ids."
            echo = isinstance(body, Completion) and body.echo and not body.scored
            for name, given in (("stop", body.stops), ("messages", isinstance(body, Chat)), ("echo", echo)):
                expect(not given, f"{name}: {reads}", name)
        for token in biases:
            good = token.isascii() and token.isdigit() and int(token[:12]) < self.model.config.vocab_size
            expect(good, f"logit_bias: {token[:40]!r} is no token id of this model.", "logit_bias")
        expect(len(biases) <= BIASES, f"logit_bias: at most {BIASES} tokens may have one.", "logit_bias")

    # --- Texts to tokens --------------------------------------------------------------------------

    def _prompts(self, body: Asked) -> list[list[int]]:
        most, queue = self.limits.prompt, self.limits.max_queue + self.decoder.session.slots
        if isinstance(body, Chat):
            messages = [message.plain for message in body.messages]
            texts, count, where = [message["content"] for message in messages], body.n, "messages"
        else:
            texts = [text for text in (*body.prompts, body.suffix) if isinstance(text, str)]
            count, where = len(body.prompts) * body.n, "prompt"
        expect(count, "prompt: there is none.", "prompt")
        expect(count <= queue, f"{where}: {count} texts, and at most {queue} may be.", where)
        for text in texts if self.tokenizer is not None else ():  # encoding what is too long takes its time
            short = len(text) <= most * self.longest and count_spelled(self.tokenizer, text) <= most
            expect(short, f"The prompt has more than {most} tokens.", "prompt", TOO_LONG)
        if isinstance(body, Chat):
            found = [encode(self.tokenizer, chat_text(self.tokenizer, messages, where), where)]
        else:
            found = [self._ids(body, prompt) for prompt in body.prompts]
        for ids in found:
            size = f"The prompt has {len(ids)} tokens, and at most {most} may be."
            expect(len(ids) <= most, size, "prompt", TOO_LONG)
            if body.fills and (gaps := ids.count(self.model.config.mask_token_id)):
                self._check_canvas(gaps, "prompt")
        return found

    def _ids(self, body: Completion, prompt: str | list[int]) -> list[int]:
        mask = self.model.config.mask_token_id
        bare = isinstance(prompt, str) or body.suffix is not None
        if self.tokenizer is None and bare:
            name, send = ("prompt", "token ids") if isinstance(prompt, str) else ("suffix", "ids with mask tokens")
            raise ApiError(400, f"{name}: this model has no tokenizer: send {send}.", param=name)
        if isinstance(prompt, str) and body.fills and body.suffix is None and mask is not None:
            # Counted before they are made, and however many: `<mask:9999999999>` is 80 GB of them.
            asked = sum(int(count or 1) for count in re.findall(r"<mask(?::(\d+))?>", prompt))
            if asked:  # else encoding says how gaps are written
                self._check_canvas(asked, "prompt")
            return encode_gaps(self.tokenizer, prompt, mask)
        ids = encode(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if body.suffix is not None:
            gap = GAP if body.max_tokens is None else body.max_tokens
            self._check_canvas(gap, "max_tokens")
            if mask is not None:  # else it is refused with all that needs one
                ids += [mask] * gap + encode_behind(self.tokenizer, body.suffix, "suffix")
        return ids

    def _check_canvas(self, gap: int, param: str) -> None:
        most = self.limits.canvas
        expect(0 < gap <= most, f"{param}: {gap} tokens to be filled, and 1 to {most} may be.", param)

    def _echoes(self, body: Asked) -> list[str]:
        if not isinstance(body, Completion):
            return [""]
        if not body.echo or self.tokenizer is None:
            return [""] * len(body.prompts)
        known = len(self.tokenizer)
        return [
            prompt if isinstance(prompt, str) else decode(self.tokenizer, [i for i in prompt if i < known])
            for prompt in body.prompts
        ]

    # --- Options ----------------------------------------------------------------------------------

    def _request(
        self, body: Asked, ids: list[int], choice: int, grammar: Grammar | None
    ) -> tuple[Request, Plan, Text | None]:
        """What the session is asked for; its plan; and what makes text of its tokens as they come, if anything does."""
        options = self._options(body)
        _, plan = options_of(self.model, options, self.decoder.session.options)
        if not body.fills:
            options["max_new_tokens"] = self._length(body, plan, len(ids))
        self._check_window(plan, options)
        text = None if self.reader is None or body.fills else Text(self.reader, ids, body.stops)
        if text is not None and body.stops:
            options["stopping_criteria"] = [Stops(text, len(ids))]
        processors = list[Any]()
        if body.presence_penalty or body.frequency_penalty:
            processors.append(Penalties(len(ids), body.presence_penalty or 0.0, body.frequency_penalty or 0.0))
        if grammar is not None:
            processors.append(Follow(grammar, len(ids), frozenset(plan.eos)))
        if processors:
            options["logits_processor"] = processors
        seed = None if body.seed is None else body.seed + choice
        likeliest = (body.top_logprobs or 0 if body.logprobs else None) if isinstance(body, Chat) else body.logprobs
        request = Request(ids, seed=seed, likeliest=likeliest, score_prompt=body.scored, **options)
        self.decoder.session.check(request)
        return request, plan, text

    def _options(self, body: Asked) -> dict[str, Any]:
        """Of `generate`, for all texts."""
        options = body.hybrid.options()
        sampling = {"temperature": body.temperature, "top_p": body.top_p}
        options |= {name: value for name, value in sampling.items() if value is not None}
        if body.temperature == 0:  # then the others keep the likeliest token, too, and nothing is drawn
            options = {k: v for k, v in options.items() if k not in ("temperature", "top_p", "top_k", "min_p")}
            options["do_sample"] = False
        if body.logit_bias:
            options["sequence_bias"] = {(int(token),): float(bias) for token, bias in body.logit_bias.items()}
        if body.fills:
            options["mode"] = "infill"
        elif body.max_tokens == 0 and body.scored:
            options.setdefault("mode", "ar")
        return options

    def _length(self, body: Asked, plan: Plan, prompt: int) -> int:
        """New tokens at most."""
        limits, context = self.limits, self.model.config.max_position_embeddings
        room, later = context - prompt, isinstance(body, Chat) and body.max_completion_tokens is not None
        name = "max_completion_tokens" if later else "max_tokens"
        asked: int | None = getattr(body, name)
        most = min(limits.max_tokens, limits.canvas) if plan.to_limit else limits.max_tokens
        if asked is None:
            asked = max(1, min(NEW_TOKENS[type(body)], most, room))
        if asked == 0 and body.scored:
            return 0
        expect(asked >= 1, f"{name} is {asked}; ask for at least 1.", name)
        why = f" in one window (mode {plan.mode!r})" if plan.to_limit and most < limits.max_tokens else ""
        expect(asked <= most, f"{name} is {asked}, and at most {most} may be{why}.", name)
        expect(
            asked <= room,
            f"{name} is {asked}, and behind a prompt of {prompt} tokens the context of {context} has room for "
            f"{max(0, room)}.", name, TOO_LONG,
        )  # fmt: skip
        return asked

    def _check_window(self, plan: Plan, options: dict[str, Any]) -> None:
        width, most = plan.block_size * plan.blocks_in_flight, self.limits.window
        if issubclass(plan.scheme, Fused):
            width = plan.block_size * (1 + plan.block_size)
        why = f"hybrid.block_size: {width} slots in one forward, and at most {most} may be."
        expect(plan.to_limit or width <= most, why, "hybrid.block_size")
