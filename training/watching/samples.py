"""What the model writes while it learns, in every mode that it has, and whether speculation has become worth it."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.common.checks import require
from hybrid.common.files import whole_lines, write_whole
from hybrid.law import Law
from hybrid.texts import decode, encode
from hybrid.training.objectives.rollouts import as_for_use
from hybrid.training.watching.csv_log import write
from hybrid.training.watching.showing import show_table
from hybrid.training.watching.throughput import aside

if TYPE_CHECKING:
    from hybrid.evals.passes.outputs import Prompt

COLUMNS = ("step", "mode", "prompt", "output", "target", "edit_similarity", "distinct_2", "tokens_per_forward",
           "acceptance")  # fmt: skip


class SampleModes(L.Callback):
    """Every `every` steps and at the end, continues held-out prompts greedily with the current weights, in all modes
    that the model has.

    Figures go to the loggers, a mode each: `samples/tokens_per_forward_MODE` (see `GenerationStats`),
    `samples/acceptance` (tokens gained in a round of speculation; above 2, a round of two forwards pays), and of the
    same outputs `samples/edit_similarity_MODE` (to the true continuation) and `samples/distinct_2_MODE`. The texts are
    in `samples.jsonl` beside the CSV log, and in a table of loggers that take tables. With an average of the weights
    (EMA), it is the weights being trained that are sampled; with a `Drafter`, the model and its drafts.

    Nothing of the training changes: losses are the same, bit for bit, with and without. In training on several
    processes the first one samples, and the others wait for it.

    Args:
        every: steps.
        prompts: texts to continue; None takes the beginnings of validation rows: up to the response where only a part
            of a row is learned, else half of it.
        count: prompts, when they come from validation rows.
        max_new_tokens: of each sample; with `prompts` left out, never more than is left of the row.
        block_size: window of the block and speculative modes; None is the model's.
        confidence_threshold: of the block and diffusion modes.

    Raises:
        ValueError: a number is out of range, `prompts` is empty, or a sharded strategy keeps the weights apart.
    """

    def __init__(
        self, every: int = 1000, prompts: list[str] | None = None, count: int = 4, max_new_tokens: int = 32,
        block_size: int | None = None, confidence_threshold: float = 0.9,
    ) -> None:  # fmt: skip
        for name, value in (
            ("every", every), ("count", count), ("max_new_tokens", max_new_tokens), ("block_size", block_size),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"SampleModes: {name} is {value}; it must be at least 1.")
        if not 0 <= confidence_threshold <= 1:
            raise ValueError(f"SampleModes: confidence_threshold is {confidence_threshold}; it is a probability.")
        require(prompts is None or all(prompts), "SampleModes: a prompt is empty; give text, or leave prompts out.")
        require(prompts != [], "SampleModes: prompts is empty; leave it out for the beginnings of validation rows.")
        self.every, self.prompts, self.count, self.max_new_tokens = every, prompts, count, max_new_tokens
        self.block_size, self.confidence_threshold = block_size, confidence_threshold
        self._sampled_at = -1

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                "SampleModes: this strategy leaves each process a part of the weights, and sampling reads them whole: "
                "take the callback out, and sample from the folder that is saved."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Processes agree on the folder here, all together.
        self.file = Path(trainer.log_dir or ".") / "samples.jsonl" if trainer.loggers else None
        self._sampled_at = trainer.global_step
        self._chosen = self._choose(pl_module)
        grid = Law.of(pl_module.model.config).grid
        if grid is not None and self.block_size not in (None, grid):
            raise ValueError(
                f"SampleModes: block_size is {self.block_size}, and this model decodes in blocks of {grid}: leave it "
                "out."
            )
        if trainer.is_global_zero and self.file is not None and self.file.exists():
            _rewind(self.file, trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            self._sample_once(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._sample_once(trainer, pl_module)

    def _sample_once(self, trainer: L.Trainer, task: Any) -> None:
        if trainer.global_step == self._sampled_at or not trainer.is_global_zero:
            return
        self._sampled_at = trainer.global_step
        try:
            with aside(trainer), as_for_use(task.model):
                self._sample(trainer, task)
        except Exception as error:  # too little memory, say: a job is worth more than its samples
            warnings.warn(
                f"no samples at step {trainer.global_step} ({type(error).__name__}: {error}); the job goes on.",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip

    def _choose(self, task: Any) -> "list[Prompt]":
        if task.tokenizer is None or (self.prompts is None and task.data is None):
            raise ValueError("SampleModes: with data of your own, give the task a tokenizer, and prompts here.")
        return self._of_rows(task) if self.prompts is None else [self._given(task, text) for text in self.prompts]

    def _given(self, task: Any, text: str) -> "Prompt":
        from hybrid.evals.passes.outputs import Prompt

        ids = encode(task.tokenizer, text, "SampleModes: a prompt")
        limit = task.model.config.max_position_embeddings - self.max_new_tokens
        if not 0 < len(ids) <= limit:
            raise ValueError(
                f"SampleModes: the prompt {text[:40]!r} has {len(ids)} tokens; with max_new_tokens="
                f"{self.max_new_tokens} the model has room for 1 to {limit}."
            )
        return Prompt(ids=ids, text=text, target="")

    def _of_rows(self, task: Any) -> "list[Prompt]":
        from hybrid.evals.passes.outputs import Prompt

        found: list[Prompt] = []
        rows, tokenizer = task.data.validation_rows, task.tokenizer
        # Spread over the rows, since neighbours are often of one document.
        for row in range(0, len(rows.ids), max(1, len(rows.ids) // self.count)):
            ids, target, doc = rows.ids[row], rows.target[row], rows.doc[row]
            at = int(target.long().argmax()) or len(ids) // 2
            same = (doc == doc[at]).nonzero()[:, 0]  # a prompt is of one document
            before, after = ids[int(same[0]) : at].tolist(), ids[at : int(same[-1]) + 1].tolist()
            if before and after and len(found) < self.count:
                target_text = decode(tokenizer, after[: self.max_new_tokens], after=before)
                found.append(Prompt(ids=before, text=decode(tokenizer, before), target=target_text))
        if not found:
            raise ValueError("SampleModes: no validation row has a prompt with text behind it: give prompts.")
        return found

    def _options(self, task: Any) -> dict[str, dict[str, Any]]:
        """Those of each mode that the model has."""
        window = {} if self.block_size is None else {"block_size": self.block_size}
        sure = {"confidence_threshold": self.confidence_threshold}
        drafter = {}
        if isinstance(task.beside, DraftAdapter):  # what is learned are the drafts
            drafter = {"draft_adapter": task.artifact().to(task.model.device, task.model.dtype)}
        ways: dict[str, dict[str, Any]] = {
            "ar": {}, "block": {**window, **sure}, "diffusion": sure, "speculative": {**window, **drafter},
        }  # fmt: skip
        return {mode: options for mode, options in ways.items() if mode in Law.of(task.model.config).modes}

    def _sample(self, trainer: L.Trainer, task: Any) -> None:
        # Lazily: the decode loop and what judges it stand above training.
        from hybrid.evals.measures import distinct, edit_similarity
        from hybrid.evals.passes import outputs

        new = self.max_new_tokens
        if self.prompts is None:
            new = max(1, min(new, task.data.length - max(len(prompt.ids) for prompt in self._chosen)))
        figures: dict[str, float | None] = {}
        table: list[dict[str, Any]] = []
        for mode, options in self._options(task).items():
            made = outputs.decode(
                task.model, task.tokenizer, self._chosen, outputs.Setting(name=mode, mode=mode, options=options),
                max_new_tokens=new, batch_size=len(self._chosen),
            )  # fmt: skip
            texts = zip(self._chosen, made.tokens, made.texts, made.stats.rows, strict=True)
            rows = [
                {
                    "step": trainer.global_step, "mode": mode, "prompt": prompt.text, "output": text,
                    "target": prompt.target, "distinct_2": distinct(tokens),
                    "edit_similarity": edit_similarity(text, prompt.target) if prompt.target else None,
                    "tokens_per_forward": alone.tokens_per_forward, "acceptance": alone.acceptance,
                }
                for prompt, tokens, text, alone in texts
            ]  # fmt: skip
            table += rows
            figures[f"samples/tokens_per_forward_{mode}"] = made.stats.tokens_per_forward
            if mode == "speculative":
                figures["samples/acceptance"] = made.stats.acceptance
            for name in ("edit_similarity", "distinct_2"):
                known = [row[name] for row in rows if row[name] is not None]
                figures[f"samples/{name}_{mode}"] = sum(known) / len(known) if known else None
        write(trainer, {name: value for name, value in figures.items() if value is not None})
        self._keep(trainer, table)

    def _keep(self, trainer: L.Trainer, table: list[dict[str, Any]]) -> None:
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        for logger in trainer.loggers:
            logger.save()
            rows = [[row[name] for name in COLUMNS] for row in table]
            show_table(logger, "samples/texts", COLUMNS, rows, trainer.global_step - 1)


def _rewind(file: Path, step: int) -> None:
    """Forget what was sampled after `step`: the job goes on from there, and samples it again."""
    kept = [line + b"\n" for line in whole_lines(file) if 0 < step >= json.loads(line)["step"]]
    write_whole(file, b"".join(kept))
