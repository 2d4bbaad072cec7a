"""Group relative policy optimization (GRPO, arXiv 2402.03300, section 4.1): the model writes, and learns from what its
texts are worth.

Behind each prompt a group of texts is drawn; what a text is worth beside the others of its group is its advantage A:

    A = (reward - mean of the group) / standard deviation of the group
    L = - mean over texts of mean over tokens of min(r A, clip(r, 1 - c, 1 + c) A)  +  kl_weight * KL
    r = p(token | before) / p_old(token | before),   KL = s / p - log(s / p) - 1,   s = p_start(token | before)

p is the model's left-to-right law, which is exact, so that nothing here is estimated but the mean over texts. Whatever
is lossless may write them: speculation draws from the same law in fewer forwards.

Shapes: P prompts, G texts each, T tokens, n tokens that were written, over all texts.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.common.checks import check_choices, require
from hybrid.law import Law
from hybrid.texts import decode
from hybrid.training.batch import Batch, check_batch
from hybrid.training.component import Component, Losses, Part, wide
from hybrid.training.objectives.cross_entropy import cross_entropy
from hybrid.training.objectives.rollouts import Texts, questions_of, write
from hybrid.training.tasks.rewards import Reward, reward_of


class Policies(nn.Module):
    """The models beside the one that learns; saved with the job, so that it goes on as it was.

    Attributes:
        start: the model that the job began with; None where nothing keeps to it.
        writer: the model that writes, where it is not always the one that learns.
    """

    def __init__(self, start: HybridForCausalLM | None, writer: HybridForCausalLM | None) -> None:
        super().__init__()
        self.start, self.writer = start, writer
        self.tokenizer: Any = None
        self.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class GRPO(Component):
    """What is learned, and how texts are written.

    A row of the data is a prompt, which is what stands before the first token to be learned, and a reference answer,
    which only the reward sees. `train/reward` is the mean reward, `val/reward` that of held-out prompts;
    `train/undecided` the share of groups whose texts are all worth the same, of which nothing is learned;
    `train/clipped` the share of tokens whose gradient is cut off; `train/written` the tokens of a text; and where texts
    are written by speculation, `train/kept` the tokens that a round gives. The job needs a tokenizer.

    Attributes:
        reward: "reference" (1 for the row's own answer), "countdown", or a function of (prompt, answer, reference),
            itself or as "package.module.name" (see `hybrid.training.tasks.rewards`).
        group: texts of a prompt.
        scale: what advantages are divided by: the group's standard deviation, or "none" (Dr. GRPO, arXiv 2503.20783:
            with it, prompts that are nearly always or nearly never solved count for more).
        mean: tokens of a "text" share its weight, so those of long texts count less; or each "token" counts one
            `max_new_tokens`-th of a text (Dr. GRPO).
        clip: c; it takes a hand only where `inner_steps` is above 1.
        kl_weight: 0: nothing keeps the model to its start, and no copy of that is kept.
        inner_steps: steps that are taken on texts of the same weights; above 1, a copy of these is kept.
        temperature: of the law p, in writing and in learning.
        max_new_tokens: of a text; None: as many as the row itself has behind its prompt.
        mode: "ar" or "speculative", the ways of writing that keep to the law.
        block_size: the window of speculation; None: the model's.
        slots: texts that are written at once.
    """

    whole_model: ClassVar[str] = "GRPO: each process writes with the whole model"

    reward: str | Reward
    group: int = 8
    scale: Literal["deviation", "none"] = "deviation"
    mean: Literal["text", "token"] = "text"
    clip: float = 0.2
    kl_weight: float = 0.04
    inner_steps: int = 1
    temperature: float = 1.0
    max_new_tokens: int | None = None
    mode: Literal["ar", "speculative"] = "ar"
    block_size: int | None = None
    slots: int = 256

    def check(self, config: HybridConfig, length: int) -> None:
        """Raise ValueError for settings that do not go with the model or with sequences of `length` tokens."""

        law, most = Law.of(config), self.max_new_tokens
        reward_of(self.reward)
        require(
            law.exact,
            f"GRPO: it learns by left-to-right probabilities, and clean_attention is {config.clean_attention!r}, which "
            "has none in one forward: use a clean_attention='causal' model.",
        )
        require(
            self.mode in ("ar", "speculative"),
            f"mode is {self.mode!r}; texts must follow the law that is learned: use 'ar' or 'speculative'.",
        )
        require(law.refusal(self.mode) is None, str(law.refusal(self.mode)))
        require(self.group >= 2, f"group is {self.group}; a text is judged beside others of its prompt: 2 or more.")
        check_choices(self)
        require(self.mean == "text" or most is not None, "mean='token': a text's weight needs max_new_tokens.")
        require(self.clip > 0, f"clip is {self.clip}; it must be above 0 (0.2 is usual).")
        require(self.kl_weight >= 0, f"kl_weight is {self.kl_weight}; it must not be negative.")
        require(self.inner_steps >= 1, f"inner_steps is {self.inner_steps}; it must be at least 1.")
        require(self.temperature > 0, f"temperature is {self.temperature}; texts are drawn, so it must be above 0.")
        require(
            most is None or 1 <= most < config.max_position_embeddings,
            f"max_new_tokens is {most}; it must be at least 1, and leave room for a prompt in the context of "
            f"{config.max_position_embeddings}.",
        )
        require(
            self.block_size is None or (self.mode == "speculative" and self.block_size >= 2),
            f"block_size is {self.block_size}; it is the window of mode='speculative', 2 or more: leave it out.",
        )
        require(self.slots >= 1, f"slots is {self.slots}; it must be at least 1.")

    def attach(self, model: HybridForCausalLM, seed: int) -> Policies:
        def copied(needed: bool) -> HybridForCausalLM | None:
            return copy.deepcopy(model) if needed else None

        return Policies(copied(self.kl_weight > 0), copied(self.inner_steps > 1))

    def prepare(self, tokenizer: Any, beside: Policies) -> None:
        if tokenizer is None:
            raise ValueError("GRPO: a reward reads text, so the task needs a tokenizer: HybridTask(tokenizer=...).")
        beside.tokenizer = tokenizer

    def begin_step(self, model: HybridForCausalLM, step: int, beside: Policies) -> None:
        if beside.writer is not None and step % self.inner_steps == 0:
            beside.writer.load_state_dict(model.state_dict())

    def loss(
        self, model: HybridForCausalLM, batch: Batch, seed: int, progress: float = 1.0, beside: Any = None
    ) -> Losses:  # fmt: skip
        check_batch(batch, model.config)
        writer = beside.writer if beside.writer is not None and model.training else model
        texts = self.written(writer, batch, seed)
        rewards = self.rewards(texts, beside.tokenizer)
        return self.losses(model, texts, rewards, writer, beside.start)

    def counts(
        self, model: HybridForCausalLM, batch: Batch, seed: int, progress: float = 1.0, beside: Any = None
    ) -> dict[str, Tensor]:  # fmt: skip
        texts = torch.tensor(self.group * len(questions_of(batch)), device=batch["index"].device)
        return {"policy": texts} | ({"kl": texts} if self.kl_weight > 0 else {})

    def written(self, writer: HybridForCausalLM, batch: Batch, seed: int) -> Texts:
        """A group of texts behind each prompt of `batch`, by the weights of `writer`, drawn from `seed`."""
        window = {"block_size": self.block_size or writer.config.block_size} if self.mode == "speculative" else {}
        return write(
            writer, batch, seed, group=self.group, max_new_tokens=self.max_new_tokens, slots=self.slots,
            mode=self.mode, do_sample=True, temperature=self.temperature, **window,
        )  # fmt: skip

    def rewards(self, texts: Texts, tokenizer: Any) -> Tensor:
        """What the `texts` of each prompt's group are worth, float64 `[P, G]`; `tokenizer` turns them into words.

        Raises:
            ValueError: a reward that is no finite number.
        """
        worth, found = reward_of(self.reward), []
        for place, answer in enumerate(texts.answers):
            question = texts.questions[place // self.group]
            prompt, *behind = (
                decode(tokenizer, ids, after=before)
                for ids, before in (
                    (question.prompt, ()), (answer, question.prompt), (question.reference, question.prompt),
                )
            )  # fmt: skip
            found.append(float(worth(prompt, *behind)))
        rewards = torch.tensor(found, dtype=torch.float64).view(-1, self.group)
        if not rewards.isfinite().all():
            raise ValueError(f"the reward of a text is {found[int((~rewards.isfinite()).view(-1).int().argmax())]}.")
        return rewards

    def advantages(self, rewards: Tensor) -> Tensor:
        """What each text is worth beside the others of its group, float64 `[P, G]` as `rewards` are."""
        # A mean can be off by a last bit, which a standard deviation as small would make a 1.
        same = (rewards == rewards[:, :1]).all(1, keepdim=True)
        above = (rewards - rewards.mean(1, keepdim=True)).masked_fill(same, 0.0)
        if self.scale == "none":
            return above
        return above / above.square().mean(1, keepdim=True).sqrt().masked_fill(same, 1.0)

    def losses(
        self, model: HybridForCausalLM, texts: Texts, rewards: Tensor, writer: HybridForCausalLM,
        start: HybridForCausalLM | None,
    ) -> Losses:  # fmt: skip
        """The loss of `texts` that `writer` wrote, and the figures of a step.

        Args:
            rewards: float64 `[P, G]`.
            start: what the model began as, where something keeps it there (`kl_weight`).
        """
        batch, device = texts.batch, texts.batch["input_ids"].device
        text, _ = batch["target"].nonzero(as_tuple=True)  # of each token that was written
        new = log_probs(model, batch, self.temperature)
        with torch.no_grad():
            old = new.detach() if writer is model else log_probs(writer, batch, self.temperature)
            began = None if start is None else log_probs(start, batch, self.temperature)
        length = batch["target"].sum(1)
        shared = length[text] if self.mean == "text" else torch.full_like(text, self.max_new_tokens or 1)
        weight = shared.to(new.dtype).reciprocal()
        advantage = self.advantages(rewards).flatten().to(device, new.dtype)[text]
        ratio = (new - old).exp()
        free, held = ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage
        many, tokens = length.new_tensor(len(length)), length.sum()
        same = (rewards == rewards[:, :1]).all(1)
        parts = {
            "policy": Part(-(weight * torch.minimum(free, held)).sum(), many, 1.0),
            "reward": Part(rewards.sum().to(device, wide(new).dtype), many),
            "undecided": Part(same.sum().to(device, new.dtype), many.new_tensor(len(same))),
            "clipped": Part((held < free).sum().to(new.dtype), tokens),
            "written": Part(tokens.to(new.dtype), many),
        }
        if began is not None:
            ahead = began - new
            parts["kl"] = Part((weight * (ahead.exp() - ahead - 1)).sum(), many, self.kl_weight)
        if texts.rounds:
            parts["kept"] = Part(new.new_tensor(texts.gained), many.new_tensor(texts.rounds))
        return Losses(parts=parts, slots=batch["input_ids"].numel(), logits=len(new))


def log_probs(model: HybridForCausalLM, batch: Batch, temperature: float = 1.0) -> Tensor:
    """`[n]`, log p of each target of `batch` given what stands before it, row by row."""
    ids, follows = batch["input_ids"], batch["target"][:, 1:]
    hidden = model.model.states(ids, Law.of(model.config).clean_rows(batch["doc"]))
    logits = model.lm_head(hidden[:, :-1][follows])
    logits = logits if temperature == 1 else logits / temperature
    return -cross_entropy(logits, ids[:, 1:][follows], model.config.mask_token_id)[0]
