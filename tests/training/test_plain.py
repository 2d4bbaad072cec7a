"""Batches as people have them: what is left out is filled in, and what cannot be meant is said."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from oracles import MASK, VOCABULARY, texts, tiny
from tiny_job import CONFIG
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, default_data_collator

import hybrid.training
from hybrid.noise import Noise, corrupt
from hybrid.training import Batch, HybridTask, Losses, Objective, as_batch, losses
from hybrid.training.text.tokenizing import train_bpe

IDS = torch.tensor(texts(5, [12] * 4))
FIELDS = {**CONFIG, "vocab_size": VOCABULARY, "mask_token_id": MASK}


def whole(ids: Tensor, **given: Tensor) -> Batch:
    found = {"target": torch.ones_like(ids, dtype=torch.bool), "doc": ids * 0, "index": torch.arange(len(ids))}
    return Batch(input_ids=ids, **{**found, **given})  # type: ignore[typeddict-item]


def same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)  # type: ignore[literal-required]


# --- What a batch is made of --------------------------------------------------------------------------------


def test_every_name_is_there() -> None:
    assert set(hybrid.training.__all__) <= set(dir(hybrid.training))
    for name in hybrid.training.__all__:
        assert getattr(hybrid.training, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Objektiv'"):
        hybrid.training.Objektiv  # noqa: B018


def test_what_is_left_out_is_filled_in() -> None:
    for given in (IDS, {"input_ids": IDS}, {"input_ids": IDS.int(), "token_type_ids": IDS}):
        assert same(as_batch(given), whole(IDS))
    assert as_batch(IDS, 7, 3)["index"].tolist() == [7, 10, 13, 16]
    assert as_batch({"input_ids": IDS, "index": IDS[:, 0]}, 7)["index"].tolist() == IDS[:, 0].tolist()


def test_padding_is_nobodys_and_never_learned() -> None:
    real = torch.arange(12).expand(4, -1) < torch.tensor([12, 3, 7, 1])[:, None]
    expected = whole(IDS, target=real, doc=torch.where(real, 0, -1))
    assert same(as_batch({"input_ids": IDS, "attention_mask": real.long()}), expected)
    assert same(as_batch({"input_ids": IDS, "doc": torch.where(real, 0, -1)}), expected), "target True there or not"


def test_labels_say_what_is_learned() -> None:
    learned = torch.arange(12).expand(4, -1) > 4
    assert same(as_batch({"input_ids": IDS, "labels": torch.where(learned, IDS, -100)}), whole(IDS, target=learned))


def test_collators_of_transformers_are_enough() -> None:
    lengths = 12, 5, 9
    rows = [{"input_ids": x[:n], "labels": [-100] * 2 + x[2:n]} for x, n in zip(IDS.tolist(), lengths, strict=False)]
    flat = DataCollatorWithFlattening(return_tensors="pt")(rows)
    batch = as_batch(flat)
    assert batch["doc"].tolist() == [[0] * 12 + [1] * 5 + [2] * 9]
    assert batch["target"].tolist() == [[i >= 2 for n in lengths for i in range(n)]]
    tokenizer = train_bpe(["abc"], 300)
    padded = as_batch(dict(DataCollatorForSeq2Seq(tokenizer)(rows)))
    assert (padded["doc"] >= 0).sum(1).tolist() == [12, 5, 9]
    assert padded["target"].sum(1).tolist() == [10, 3, 7]
    assert same(as_batch(default_data_collator([{"input_ids": row} for row in IDS.tolist()])), whole(IDS))


WRONG: list[tuple[Any, type[Exception], str]] = [
    ({"ids": IDS}, TypeError, "input_ids .* a dictionary with ids"),
    (IDS.float(), TypeError, "integers.* torch.float32"),
    ("text", TypeError, "a str"),
    ({"input_ids": IDS, "target": torch.ones_like(IDS)}, TypeError, "target is torch.int64; it is bool"),
    (IDS[:, :1], ValueError, r"\[4, 1\].*at least 2 tokens"),
    (IDS[0], ValueError, r"\[12\]"),
    ({"input_ids": IDS, "attention_mask": IDS[:, 1:]}, ValueError, r"attention_mask has shape \[4, 11\]"),
    ({"input_ids": IDS, "labels": IDS.roll(-1, 1)}, ValueError, "not shifted"),
    ({"input_ids": torch.full((1, 300), 3)}, ValueError, "rows of 300 tokens, and max_position_embeddings is 256"),
    ({"input_ids": IDS.masked_fill(IDS[1, 3] == IDS, MASK)}, ValueError, rf"the mask token \({MASK}\)"),
    ({"input_ids": IDS + VOCABULARY}, ValueError, f"vocabulary has {VOCABULARY}"),
    ({"input_ids": IDS - 99}, ValueError, "vocabulary"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "said"), WRONG)
def test_what_cannot_be_meant_is_said(given: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        losses(tiny(0), given)


def test_a_model_that_is_no_hybrid_is_said() -> None:
    with pytest.raises(TypeError, match=r"Linear, and no HybridForCausalLM.*convert"):
        losses(torch.nn.Linear(2, 2), IDS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no mask_token_id"):
        losses(tiny(0, mask_token_id=None), IDS)
    with pytest.raises(ValueError, match="clean_attention='full' shows"):
        losses(tiny(0, clean_attention="full"), IDS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"denominator": "mean"}, "denominator is 'mean'; use 'per_token' or 'pooled'"),
        ({"noise": Noise(t_per="row")}, "t_per is 'row'; use 'block'"),  # type: ignore[arg-type]
    ],
)
def test_a_loop_of_ones_own_is_told_of_a_word_that_means_nothing(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        losses(tiny(0), IDS, Objective(**given))


def test_the_mask_token_may_be_the_padding() -> None:
    ids = torch.cat([IDS, torch.full((4, 3), MASK)], 1)
    found = losses(tiny(0), {"input_ids": ids, "attention_mask": (ids != MASK).long()})
    assert float(found.total) == pytest.approx(float(losses(tiny(0), IDS).total), rel=1e-6)


@pytest.mark.parametrize("denominator", ["per_token", "pooled"])
@pytest.mark.parametrize("nothing", ["labels", "attention_mask", "doc"])
def test_where_nothing_is_to_be_learned_the_loss_is_0_and_so_are_gradients(nothing: str, denominator: Any) -> None:
    none = {"labels": IDS * 0 - 100, "attention_mask": IDS * 0, "doc": IDS * 0 - 1}[nothing]
    model = tiny(0)
    objective = Objective(denominator=denominator, z_loss=1e-3)
    found = losses(model, {"input_ids": IDS, nothing: none, "index": torch.arange(4)}, objective)
    assert float(found.total) == float(found.ar) == float(found.diffusion) == 0  # type: ignore[arg-type]
    found.total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(not g.any() for g in gradients)
    both = losses(model, torch.cat([IDS, IDS]), objective)
    mixed = {"input_ids": torch.cat([IDS, IDS]), nothing: torch.cat([as_labels(nothing), none])}
    assert float(losses(model, mixed, objective).ar) == pytest.approx(float(both.ar), rel=1e-6)  # type: ignore[arg-type]


def as_labels(name: str) -> Tensor:
    return {"labels": IDS, "attention_mask": IDS * 0 + 1, "doc": IDS * 0}[name]


def test_noise_of_a_row_does_not_change_with_the_padding_behind_it() -> None:
    config = tiny(0).config
    for noise in (Noise(), Noise(block_sizes=(2, 8), canvas_prob=0.9, draft_prob=0.3, antithetic=False)):
        one = corrupt(*whole(IDS).values(), noise, config, 3)  # type: ignore[arg-type]
        wide = as_batch({"input_ids": torch.cat([IDS, IDS], 1), "attention_mask": torch.arange(24).expand(4, -1) < 12})
        other = corrupt(*wide.values(), noise, config, 3)  # type: ignore[arg-type]
        assert torch.equal(one.masked, other.masked[:, :12]) and not other.masked[:, 12:].any()
        assert torch.equal(one.weight, other.weight[:, :12])


# --- In a job -----------------------------------------------------------------------------------------------


class Seeing(HybridTask):
    """Keeps what each step's loss was of."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"config": FIELDS, **given})
        self.seen: list[tuple[str, list[list[int]], list[int]]] = []

    def _losses(self, batch: Batch, seed: int) -> Losses:
        stage = "train" if self.training else "val"
        self.seen.append((stage, batch["input_ids"].tolist(), batch["index"].tolist()))
        return super()._losses(batch, seed)


def trainer(**given: Any) -> L.Trainer:
    return L.Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
           "enable_model_summary": False, "max_epochs": 1, **given}
    )  # fmt: skip


class Batches:
    """Can be gone through, and nothing else."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from IDS.split(2)


class Own(L.LightningDataModule):
    """Anybody's."""

    def train_dataloader(self) -> Any:
        return DataLoader([{"input_ids": row} for row in IDS], batch_size=2)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(IDS, batch_size=2)  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = val_dataloader


@pytest.mark.parametrize("kind", ["loader", "tensor", "iterable", "module"])
def test_a_job_takes_whatever_gives_batches(kind: str) -> None:
    given = {
        "loader": Own().train_dataloader(), "tensor": Own().val_dataloader(), "iterable": Batches(), "module": Own(),
    }[kind]  # fmt: skip
    task, run = Seeing(), trainer()
    before = HybridTask(config=FIELDS)
    run.fit(task, given)
    steps = [ids for stage, ids, _ in task.seen if stage == "train"]
    assert steps == [IDS[:2].tolist(), IDS[2:].tolist()]
    assert run.global_step == 2 and task.tokens_seen == IDS.numel() and before.model is None
    held_out = Own().val_dataloader()
    assert run.validate(task, held_out, verbose=False)[0]["val/loss"] > 0
    assert run.test(task, Own(), verbose=False)[0]["test/ar"] > 0
    rows = [row for batch in run.predict(task, held_out) or [] for row in batch]
    assert [row["row"] for row in rows] == [0, 1, 2, 3] and all(row["targets"] == 12 for row in rows)


def test_noise_is_new_every_epoch_and_held_out_noise_is_not() -> None:
    task = Seeing()
    trainer(max_epochs=3, num_sanity_val_steps=0).fit(task, Own())
    numbers = [n for stage, _, index in task.seen if stage == "train" for n in index]
    assert numbers == list(range(12))
    held_out = [index for stage, _, index in task.seen if stage == "val"]
    assert held_out == [[0, 1], [2, 3]] * 3


def test_numbers_go_on_when_a_job_is_resumed(tmp_path: Any) -> None:
    first, second = Seeing(), Seeing()
    run = trainer(max_epochs=2, num_sanity_val_steps=0)
    run.fit(first, Own())
    run.save_checkpoint(tmp_path / "at.ckpt")
    trainer(max_epochs=3, num_sanity_val_steps=0).fit(second, Own(), ckpt_path=tmp_path / "at.ckpt")
    assert [index for stage, _, index in second.seen if stage == "train"] == [[8, 9], [10, 11]]


def test_a_tokenizer_of_ones_own_decides_the_vocabulary_and_is_saved(tmp_path: Any) -> None:
    tokenizer = train_bpe(["abc abd"], 300)
    task = HybridTask(config=CONFIG, tokenizer=tokenizer)
    trainer(callbacks=[hybrid.training.SaveModel(str(tmp_path / "model"))]).fit(task, DataLoader(IDS + 3))
    assert task.model is not None and task.model.config.vocab_size == len(tokenizer)
    assert (tmp_path / "model/tokenizer.json").exists()


def test_without_a_tokenizer_the_config_says_the_vocabulary(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="give vocab_size, and mask_token_id"):
        trainer().fit(HybridTask(config=CONFIG), Batches())
    trainer(callbacks=[hybrid.training.SaveModel(str(tmp_path / "model"))]).fit(HybridTask(config=FIELDS), Batches())
    assert not (tmp_path / "model/tokenizer.json").exists()
    assert hybrid.HybridForCausalLM.from_pretrained(tmp_path / "model").config.mask_token_id == MASK


def test_ones_own_module_and_loop_take_the_same_loss() -> None:
    class Mine(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny(0, dtype=torch.float32)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return losses(self.model, batch, Objective(diffusion_weight=1.0), seed=batch_idx).total

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    mine = Mine()
    before = float(losses(mine.model, IDS).total)
    trainer(max_epochs=20).fit(mine, Own().train_dataloader())
    assert float(losses(mine.model, IDS).total) < 0.8 * before


# --- Going on -----------------------------------------------------------------------------------------------


class Resumable:
    """A loader that can tell where it is, as torchdata's `StatefulDataLoader` does."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[Tensor]:
        self.at %= 9
        while self.at < 9:
            self.at += 1
            yield IDS[:2] * 0 + self.at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [3, 4, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_loader_that_can_be_resumed_goes_on_where_the_steps_ended(
    error: type[BaseException], stop: int, accumulate: int, tmp_path: Path
) -> None:
    """Asked to end in the middle of a step, too, when it has given batches beyond; or failed after it had been saved at
    the beginning of a step, when it has given its first batch."""
    class Stops(Seeing):
        until = -1

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == self.until:
                raise error

    def run(task: Stops, state: Path | None = None) -> list[int]:
        saver = hybrid.training.SaveModel(str(tmp_path / f"{task.until}"), minutes=0 if error is MemoryError else 9)
        with contextlib.suppress(SystemExit, error):
            trainer(max_epochs=2, callbacks=[saver], accumulate_grad_batches=accumulate, limit_val_batches=0).fit(
                task, Resumable(), ckpt_path=state
            )
        return [ids[0][0] for stage, ids, _ in task.seen if stage == "train"]

    first, second = Stops(), Stops()
    first.until = stop
    done = stop + 1 if error is KeyboardInterrupt else stop
    before = run(first)[: done // accumulate * accumulate]
    assert before + run(second, tmp_path / f"{stop}.ckpt") == list(range(1, 10)) * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_our_own_data_go_on_exactly_with_workers(workers: int, tmp_path: Path) -> None:
    def run(epochs: int, state: Path | None = None) -> list[list[int]]:
        task, saver = Seeing(config=CONFIG), hybrid.training.SaveModel(str(tmp_path / "model"))
        data = hybrid.training.SudokuData(count=20, batch_size=4, num_workers=workers)
        job = trainer(max_steps=epochs, max_epochs=None, callbacks=[saver], limit_val_batches=0)
        job.fit(task, data, ckpt_path=state)
        return [index for _, _, index in task.seen]

    whole = run(8)
    assert run(3) + run(8, tmp_path / "model.ckpt") == whole
    assert [n for batch in whole for n in batch] == list(range(32))
