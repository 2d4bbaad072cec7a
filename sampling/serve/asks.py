"""From what a client asked to jobs: texts are encoded, limits are kept, options find their names.

All of it runs in one thread: a tokenizer that is told for one text whether special tokens are meant must not be read
for another meanwhile.
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.sampling.display.pieces import Pieces
from hybrid.sampling.request import Request, options_of
from hybrid.sampling.row import Plan
from hybrid.sampling.schemes.speculation import Fused
from hybrid.sampling.serve.decoder import Decoder
from hybrid.sampling.serve.grammar import JSON_OBJECT, Follow, Grammar, Grammars
from hybrid.sampling.serve.jobs import End, Job, News
from hybrid.sampling.serve.limits import Limits
from hybrid.sampling.serve.protocol import ApiError, Asked, Chat, Completion, Format
from hybrid.sampling.serve.text import Stops, Text
from hybrid.texts import chat_text, count_spelled, decode, encode, encode_behind, encode_gaps

NEW_TOKENS = {Completion: 128, Chat: 1024}  # where a request does not say
GAP = 16  # tokens between a prompt and a suffix, likewise
STOP = 256  # characters of a stop string
BIASES = 1024  # tokens with a bias

Tell = Callable[[Job, News | End], None]


@dataclass(kw_only=True)
class Ask:
    """A request that was understood.

    Attributes:
        prompts: of the texts to be made, token ids; gaps are mask tokens.
        echoes: what stands before each answer.
        jobs: `n` for each prompt.
    """

    body: Asked
    prompts: list[list[int]]
    echoes: list[str]
    jobs: list[Job] = field(default_factory=list)
    grammar: Grammar | None = None

    @property
    def scored(self) -> bool:
        """Whether tokens of the prompt have log-probabilities."""
        return isinstance(self.body, Completion) and self.body.echo and self.body.logprobs is not None


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
        self, model: HybridForCausalLM, tokenizer: Any, reader: Any, decoder: Decoder, limits: Limits,
        grammars: Grammars | None,
    ) -> None:  # fmt: skip
        """`reader`: a copy of the tokenizer for the decoding thread."""
        self.model, self.tokenizer, self.reader = model, tokenizer, reader
        self.decoder, self.limits, self.grammars = decoder, limits, grammars
        self._pieces = None if reader is None else Pieces(reader)
        self.longest = 4 * max(map(len, reader.get_vocab())) if reader is not None else 0  # characters of a token

    def pieces(self, tokens: Sequence[int | None]) -> list[str]:
        """The text of single tokens, for the decoding thread."""
        if self._pieces is None:
            return ["" if token is None else f"{token} " for token in tokens]
        known = [None if token is None or token >= len(self.reader) else token for token in tokens]
        return self._pieces(known)

    def grammar(self, asked: Format) -> Grammar:
        """What a text has to keep to. For a thread of its own: building it may take long.

        Raises:
            ApiError: it cannot be built.
        """
        if self.tokenizer is None or self.grammars is None:
            why = "this model has no tokenizer" if self.tokenizer is None else "outlines-core is not installed here"
            raise ApiError(400, f"response_format: {why}.", param="response_format")
        if asked.json_schema is not None:
            return self.grammars.get("schema", json.dumps(asked.json_schema.schema_))
        return self.grammars.get("regex", asked.regex or JSON_OBJECT)

    def prepare(
        self, body: Asked, grammar: Grammar | None, user: str, tell: Tell, loop: asyncio.AbstractEventLoop
    ) -> Ask:
        """The jobs of a request, which are not submitted yet.

        Raises:
            ApiError: it cannot be done, or asks for more than may be.
        """
        try:
            self._check_sizes(body)
            ask = self._encoded(body)
            ask.grammar = grammar
            for prompt in ask.prompts:
                for choice in range(body.n):
                    ask.jobs.append(self._job(ask, prompt, choice, user, tell, loop))
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        return ask

    def _check_sizes(self, body: Asked) -> None:
        limits = self.limits
        if body.n > limits.n:
            raise ApiError(400, f"n is {body.n}, and at most {limits.n} may be.", param="n")
        if len(body.stops) > limits.stops or any(not 0 < len(stop) <= STOP for stop in body.stops):
            raise ApiError(
                400, f"stop: at most {limits.stops} strings of 1 to {STOP} characters may be.", param="stop"
            )
        if self.tokenizer is None and (body.stops or isinstance(body, Chat)):
            what = "stop" if body.stops else "messages"
            raise ApiError(400, f"{what}: this model has no tokenizer, so that it reads and writes ids.", param=what)
        for token in body.logit_bias or ():
            if not (token.isascii() and token.isdigit() and int(token[:12]) < self.model.config.vocab_size):
                raise ApiError(400, f"logit_bias: {token[:40]!r} is no token id of this model.", param="logit_bias")
        if len(body.logit_bias or ()) > BIASES:
            raise ApiError(400, f"logit_bias: at most {BIASES} tokens may have one.", param="logit_bias")

    # --- Texts to tokens --------------------------------------------------------------------------

    def _encoded(self, body: Asked) -> Ask:
        self._check_texts(body)
        if isinstance(body, Chat):
            chat = chat_text(self.tokenizer, [message.plain for message in body.messages], "messages")
            found = Ask(body=body, prompts=[encode(self.tokenizer, chat, "messages")], echoes=[""])
        else:
            assert isinstance(body, Completion)
            given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
            if not given:
                raise ApiError(400, "prompt: there is none.", param="prompt")
            prompts = [given] if isinstance(given[0], int) else given
            most, count = self.limits.max_queue + self.decoder.session.slots, len(prompts) * body.n
            if count > most:
                raise ApiError(400, f"prompt: {count} texts, and at most {most} may be.", param="prompt")
            ids = [self._ids(body, prompt) for prompt in prompts]
            echoes = [self._echo(body, prompt) for prompt in prompts]
            found = Ask(body=body, prompts=ids, echoes=echoes)
        for ids_ in found.prompts:
            if len(ids_) > self.limits.prompt:
                raise ApiError(
                    400, f"The prompt has {len(ids_)} tokens, and at most {self.limits.prompt} may be.",
                    param="prompt", code="context_length_exceeded",
                )  # fmt: skip
        return found

    def _check_texts(self, body: Asked) -> None:
        """Refuse what is too long before it is encoded, which takes its time."""
        if self.tokenizer is None:
            return
        if isinstance(body, Chat):
            texts = [message.plain["content"] for message in body.messages]
        else:
            assert isinstance(body, Completion)
            prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
            texts = [text for text in (*prompts, body.suffix) if isinstance(text, str)]
        most = self.limits.prompt
        for text in texts:
            if len(text) > most * self.longest or count_spelled(self.tokenizer, text) > most:
                raise ApiError(
                    400, f"The prompt has more than {most} tokens.", param="prompt", code="context_length_exceeded"
                )

    def _ids(self, body: Completion, prompt: Any) -> list[int]:
        mask, gaps = self.model.config.mask_token_id, body.hybrid.mode == "infill"
        if isinstance(prompt, list):
            ids = list(prompt)
        elif self.tokenizer is None:
            raise ApiError(400, "prompt: this model has no tokenizer: send token ids.", param="prompt")
        elif gaps and body.suffix is None and mask is not None:
            asked = sum(int(count or 1) for count in re.findall(r"<mask(?::(\d{1,9}))?>", prompt))
            if asked:  # else encoding says how gaps are written
                self._check_canvas(asked, "prompt")
            return encode_gaps(self.tokenizer, prompt, mask)
        else:
            ids = encode(self.tokenizer, prompt)
        if body.suffix is not None:
            if self.tokenizer is None:
                raise ApiError(400, "suffix: this model has no tokenizer: send ids with mask tokens.", param="suffix")
            gap = GAP if body.max_tokens is None else body.max_tokens
            self._check_canvas(gap, "max_tokens")
            if mask is not None:  # else it is refused with all that needs one
                ids += [mask] * gap + encode_behind(self.tokenizer, body.suffix, "suffix")
        return ids

    def _check_canvas(self, gap: int, param: str) -> None:
        if not 0 < gap <= self.limits.canvas:
            raise ApiError(
                400, f"{param}: {gap} tokens to be filled, and 1 to {self.limits.canvas} may be.", param=param
            )

    def _echo(self, body: Completion, prompt: Any) -> str:
        if not body.echo or self.tokenizer is None:
            return ""
        return prompt if isinstance(prompt, str) else decode(self.tokenizer, self._known(prompt))

    def _known(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i < len(self.tokenizer)]

    # --- Options ----------------------------------------------------------------------------------

    def _job(
        self, ask: Ask, ids: list[int], choice: int, user: str, tell: Tell, loop: asyncio.AbstractEventLoop
    ) -> Job:
        body = ask.body
        options, only_score = self._options(ask), False
        if isinstance(body, Completion) and body.max_tokens == 0 and options.get("mode") != "infill":
            if not ask.scored:
                raise ApiError(400, "max_tokens is 0: that goes with echo and logprobs, to score.", param="max_tokens")
            options.setdefault("mode", "ar")
            only_score = True
        _, plan = options_of(self.model, options, self.decoder.session.options)
        ends, filled = frozenset(plan.eos), plan.mode == "infill"
        if filled:
            self._check_infill(body)
        else:
            options["max_new_tokens"] = 0 if only_score else self._length(body, plan, len(ids))
        self._check_window(plan, options)
        reads = self.tokenizer is not None and not filled
        text = Text(self.reader, ids, body.stops) if reads else None
        if text is not None and body.stops:
            options["stopping_criteria"] = [Stops(text, len(ids))]
        processors: list[Any] = []
        if body.presence_penalty or body.frequency_penalty:
            processors.append(Penalties(len(ids), body.presence_penalty or 0.0, body.frequency_penalty or 0.0))
        if ask.grammar is not None:
            processors.append(Follow(ask.grammar, len(ids), ends))
        if processors:
            options["logits_processor"] = processors
        likeliest = None
        if isinstance(body, Chat) and body.logprobs:
            likeliest = body.top_logprobs or 0
        elif isinstance(body, Completion) and body.logprobs is not None:
            likeliest = body.logprobs
        request = Request(
            ids, seed=None if body.seed is None else body.seed + choice, likeliest=likeliest, score_prompt=ask.scored,
            **options,
        )  # fmt: skip
        self.decoder.check(request)
        job = Job(
            request=request, mode=plan.mode, user=user, ends=ends, text=text, tell=tell, loop=loop,
            number=len(ask.jobs), watched=body.stream, drafts=body.hybrid.drafts,
            ids=body.hybrid.return_token_ids or self.tokenizer is None, pieces=self.pieces,
            mask=self.model.config.mask_token_id,
        )  # fmt: skip
        job.deadline = job.arrived + self.limits.seconds
        return job

    def _options(self, ask: Ask) -> dict[str, Any]:
        """Of `generate`."""
        body = ask.body
        options = body.hybrid.options()
        sampling = {"temperature": body.temperature, "top_p": body.top_p}
        options |= {name: value for name, value in sampling.items() if value is not None}
        if body.temperature == 0:  # then the others keep the likeliest token, too, and nothing is drawn
            options = {k: v for k, v in options.items() if k not in ("temperature", "top_p", "top_k", "min_p")}
            options["do_sample"] = False
        if body.logit_bias:
            options["sequence_bias"] = {(int(token),): float(bias) for token, bias in body.logit_bias.items()}
        between = isinstance(body, Completion) and body.suffix is not None
        if between and options.setdefault("mode", "infill") != "infill":
            raise ApiError(
                400, f"suffix: what stands between is filled, and hybrid.mode is {options['mode']!r}: leave one out.",
                param="suffix",
            )  # fmt: skip
        if isinstance(body, Chat) and options.get("mode") == "infill":
            raise ApiError(400, "hybrid.mode: gaps are filled by /v1/completions.", param="hybrid.mode")
        if ask.scored and body.stream:
            raise ApiError(400, "stream: the prompt's log-probabilities come in one piece: leave stream out.")
        return options

    def _check_infill(self, body: Asked) -> None:
        """What has no meaning in a gap."""
        assert isinstance(body, Completion)
        asked = {
            "stop": body.stops, "echo": body.echo, "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "response_format": body.response_format is not None and body.response_format.type != "text",
            "max_tokens": body.suffix is None and body.max_tokens is not None,
        }  # fmt: skip
        for name, given in asked.items():
            if given:
                raise ApiError(
                    400, f"{name}: gaps are filled in any order and have their length: leave it out.", param=name
                )

    def _length(self, body: Asked, plan: Plan, prompt: int) -> int:
        """New tokens at most."""
        limits, room = self.limits, self.model.config.max_position_embeddings - prompt
        later = isinstance(body, Chat) and body.max_completion_tokens is not None
        asked = body.max_completion_tokens if later and isinstance(body, Chat) else body.max_tokens
        name = "max_completion_tokens" if later else "max_tokens"
        most = min(limits.max_tokens, limits.canvas) if plan.to_limit else limits.max_tokens
        if asked is None:
            return max(1, min(NEW_TOKENS[type(body)], most, room))
        if asked < 1:
            raise ApiError(400, f"{name} is {asked}; ask for at least 1.", param=name)
        if asked > most:
            why = f" in one window (mode {plan.mode!r})" if plan.to_limit and most < limits.max_tokens else ""
            raise ApiError(400, f"{name} is {asked}, and at most {most} may be{why}.", param=name)
        if asked > room:
            raise ApiError(
                400, f"{name} is {asked}, and behind a prompt of {prompt} tokens the context of "
                f"{self.model.config.max_position_embeddings} has room for {max(0, room)}.",
                param=name, code="context_length_exceeded",
            )  # fmt: skip
        return asked

    def _check_window(self, plan: Plan, options: dict[str, Any]) -> None:
        if plan.to_limit:
            return
        width = plan.block_size * plan.blocks_in_flight
        if issubclass(plan.scheme, Fused):
            width = plan.block_size * (1 + plan.block_size)
        if width > self.limits.window:
            raise ApiError(
                400, f"hybrid.block_size: {width} slots in one forward, and at most {self.limits.window} may be.",
                param="hybrid.block_size",
            )  # fmt: skip
