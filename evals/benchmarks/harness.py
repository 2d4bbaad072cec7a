"""Tasks of EleutherAI's lm-evaluation-harness (extra `eval`): the model type `hybrid`.

    import lm_eval, hybrid.evals.benchmarks.harness  # the import registers the type
    lm_eval.simple_evaluate("hybrid", "pretrained=runs/text,mode=block,confidence_threshold=0.8", tasks=["lambada"])

No result depends on the batch size or on which other requests there are (see `answers`).
"""

import json
from collections import Counter
from typing import Any

import torch
from transformers import AutoTokenizer

from hybrid import HybridForCausalLM
from hybrid.checkpoints.place import place
from hybrid.common.checks import require
from hybrid.evals.benchmarks.answers import Answers
from hybrid.evals.benchmarks.reader import Reader, batches
from hybrid.texts import begin_of, chat_text, prefix_of

try:
    import lm_eval.models  # noqa: F401, which lm-eval makes known only while nobody else has made a type known
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(
        f"hybrid.evals.benchmarks.harness runs tasks of lm-evaluation-harness, which is not installed ({error}): "
        "pip install 'hybrid-lm[eval]'."
    ) from error

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p")
COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # what tasks call it


@register_model("hybrid")
class HybridLM(TemplateLM):
    """A checkpoint as lm-eval's model type.

    Attributes:
        answers: what it answers with; `answers.stats` is the ledger of every batch that `generate_until` decoded.
    """

    def __init__(
        self, pretrained: str | HybridForCausalLM, *, tokenizer: Any = None, mode: str | None = None,
        likelihood: str | None = None, likelihood_block_size: int | None = None, samples: int = 32, seed: int = 0,
        batch_size: int | str = 8, max_length: int | None = None, max_gen_toks: int | None = None,
        device: str | None = None, dtype: str | None = None, add_bos_token: bool | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """
        Args:
            pretrained: folder of a model, a hub name, or the model itself (then with `tokenizer`).
            tokenizer: its tokenizer, or where that is; by default beside the model.
            mode: how `generate_until` decodes: "ar", "block", "diffusion", "speculative" or "auto"; by default "ar"
                where the model can, else "block".
            likelihood: what `loglikelihood` gives: "ar" exactly; "block" and "masked" minus a bound, estimated with
                `samples` masks a request. By default "ar" where the model can, else the law of its training.
            likelihood_block_size: the window of likelihood="block"; by default the checkpoint's.
            samples: masks a request; the error falls with their square root. Continuations of one length to the same
                context get the same masks, so that choices are compared with less noise.
            seed: of the masks and of sampling.
            batch_size: requests at once; of a bound, masks of one request at once.
            max_length: tokens of prompt and answer together; by default the model's context. Prompts are cut on
                the left.
            max_gen_toks: tokens to generate where the task does not say; by default 256, or half of max_length.
            add_bos_token: whether a text begins with the bos token; by default where its tokenizer puts one, or has one
                (models that were trained here have seen it). lm-eval's `hf` leaves out one that the tokenizer has and
                does not put there: False gives its numbers.
            device, dtype: where to run ("cpu", "cuda") and in which numbers ("float32").
            options: any other of `generate` (`temperature=`, `confidence_threshold=`, `block_size=` …). They win
                over what a task asks for; of the sampling options, one given here replaces all of the task's.

        Raises:
            ValueError: an argument is out of range or not one that the model can do; the message names it.
        """
        super().__init__()
        self.model = HybridForCausalLM.from_pretrained(pretrained) if isinstance(pretrained, str) else pretrained
        kind = getattr(torch, dtype, None) if dtype else self.model.dtype
        require(isinstance(kind, torch.dtype), f"dtype is {dtype!r}; use float32, bfloat16 or float64.")
        self.model.eval().to(device, kind)
        self._device = self.model.device
        if tokenizer is None and not isinstance(pretrained, str):
            raise ValueError("tokenizer: pretrained is a model, not a folder; pass its tokenizer as well.")
        named = tokenizer if tokenizer is not None else pretrained
        self.tokenizer = AutoTokenizer.from_pretrained(place(named)) if isinstance(named, str) else named
        try:
            self.batch_size = int(batch_size)
        except ValueError:
            raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number.") from None
        self.answers = Answers.usual(
            self.model, self.tokenizer, mode=mode, likelihood=likelihood, likelihood_block_size=likelihood_block_size,
            samples=samples, seed=seed, batch_size=self.batch_size,
            options={name: value for name, value in options.items() if value is not None},
        )  # fmt: skip
        self.prefix, begin = prefix_of(self.tokenizer), begin_of(self.tokenizer)
        if add_bos_token is not None:
            begin = [self.prefix] if add_bos_token else []
        context = self.model.config.max_position_embeddings
        self.max_length = context if max_length is None else max_length
        self.reader = Reader(
            tokenizer=self.tokenizer, context=context, max_length=self.max_length, begin=begin, where="the task"
        )  # fmt: skip
        self.max_gen_toks = min(256, self.max_length // 2) if max_gen_toks is None else max_gen_toks
        self.reader.check_answer(self.max_gen_toks)

    # --- Text and tokens ----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        found = self.tokenizer.eos_token_id
        return None if found is None else int(found)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self.prefix

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        require(
            self.tokenizer.chat_template is not None,
            "apply_chat_template: this model's tokenizer has no chat template; run the task without.",
        )
        return chat_text(
            self.tokenizer, chat_history, "the task", add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids without a beginning of text, which each use adds for itself; a chat has its own."""
        return self.reader.ids(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.reader.pair(context, continuation)

    # --- Likelihood ---------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (texts or None, context, continuation): `Answers.score`."""
        rows = []
        for texts, given, scored in requests:
            name = "a task's continuation" if texts is None else f"the continuation {texts[1][:40]!r}"
            require(bool(scored), f"{name} is empty: there is nothing to score.")
            room = self.max_length - len(scored)
            require(
                room >= 1,
                f"{name} has {len(scored)} tokens, and max_length is {self.max_length}, with at least one before it: "
                "leave that document out, or use a model with a longer context.",
            )
            rows.append((given[-room:], scored))
        found, law = {}, self.answers.likelihood
        lengths = [len(given) + len(scored) for given, scored in rows]
        with tqdm(total=len(rows), desc=f"likelihood, {law}", disable=disable_tqdm) as bar:
            for some in batches(lengths, self.batch_size if law == "ar" else 1):
                for i, answer in zip(some, self.answers.score([rows[i] for i in some]), strict=True):
                    found[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                bar.update(len(some))
        return [found[i] for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in nats (or minus the bound), each token scored once, in windows of `max_length`."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1)
            mine = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += mine
            counts.append(len(mine))
        each = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        found = [sum((next(each)[0] for _ in range(count)), 0.0) for count in counts]
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    # --- Generation ---------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each ending before the first of its task's until-strings."""
        asked = [self._asked(dict(kwargs)) for _, kwargs in (request.args for request in requests)]
        rows, times, seeds = [], Counter[str](), []
        for request, (count, _, _) in zip(requests, asked, strict=True):
            rows.append(self.reader.prompt(request.args[0])[-(self.max_length - count) :])
            key = json.dumps(request.args, default=str)
            seeds.append(self.answers.seed_of(rows[-1], times[key]))  # a task's repeats must differ
            times[key] += 1
        groups: dict[str, list[int]] = {}
        for i in range(len(rows)):
            groups.setdefault(json.dumps(asked[i], default=str), []).append(i)
        found = {}
        with tqdm(total=len(rows), desc=f"generating, {self.answers.mode}", disable=disable_tqdm) as bar:
            for group in groups.values():
                count, until, options = asked[group[0]]
                for places in batches([len(rows[i]) for i in group], self.batch_size):
                    some = [group[place] for place in places]
                    texts = self.answers.write(
                        [rows[i] for i in some], count, until, options, [seeds[i] for i in some]
                    )  # fmt: skip
                    for i, text in zip(some, texts, strict=True):
                        found[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(some))
        return [found[i] for i in range(len(rows))]

    def _asked(self, task: dict[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
        """From a task's generation arguments: how many tokens, the until-strings, and options of `generate`."""
        until = task.pop("until", None) or []
        until = [word for word in ([until] if isinstance(until, str) else until) if word]
        counts = [count for name in COUNTS if (count := task.pop(name, None)) is not None]
        count = int(counts[0]) if counts else self.max_gen_toks
        require(
            0 < count < self.max_length,
            f"max_gen_toks: the task asks for {count} tokens, and max_length is {self.max_length}, the prompt "
            "included: give the task fewer with gen_kwargs, or use a model with a longer context.",
        )
        sampled = task.get("do_sample", (task.get("temperature") or 0) > 0)
        ours = self.answers.options
        if not sampled or any(name in ours for name in SAMPLING):
            task = {name: value for name, value in task.items() if name not in SAMPLING}
        else:
            task["do_sample"] = True
        options = {"mode": self.answers.mode, "do_sample": False, **task, **ours}
        self.answers.check(options)
        return count, until, options
