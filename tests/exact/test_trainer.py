"""transformers' Trainer on our model: the losses of their Llama with the same weights, however it makes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    default_data_collator,
)

from hybrid import HybridForCausalLM

pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
IDS = torch.randint(4, 40, (8, 9), generator=torch.Generator().manual_seed(1))
EVEN = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
UNEVEN = [{"input_ids": row[:size]} for row, size in zip(IDS.tolist(), 2 * [3, 9, 5, 4], strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4, eos_token_id=3, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


def said(kind: Any, folder: Path, out: Path, trainer: Any = Trainer, **options: Any) -> list[dict[str, float]]:
    """What a short job logs."""
    flat = options.pop("flat", None)
    collator = default_data_collator if flat is None else DataCollatorWithFlattening(**flat)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(out), max_steps=3, per_device_train_batch_size=2, report_to=[], logging_steps=1, use_cpu=True,
        disable_tqdm=True, save_strategy="no", remove_unused_columns=False, **options,
    )  # fmt: skip
    data: Any = EVEN if flat is None else UNEVEN
    with torch.random.fork_rng(devices=[]):
        job = trainer(
            model=kind.from_pretrained(folder), args=arguments, train_dataset=data, eval_dataset=data[:3],
            data_collator=collator,
        )  # fmt: skip
        job.train()
        if options.get("predict_with_generate"):
            texts = job.predict(data[:3]).predictions
            return [dict(enumerate(row)) for row in texts.tolist()]
    return [{k: v for k, v in line.items() if "loss" in k} for line in job.state.log_history]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 1}, {"label_smoothing_factor": 0.2},
        {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2}, {"flat": {}},
        {"flat": {"return_flash_attn_kwargs": True, "return_seq_idx": True}}, {"neftune_noise_alpha": 5.0},
        {"gradient_checkpointing": True},
        {"predict_with_generate": True, "generation_max_length": 14, "trainer": Seq2SeqTrainer},
    ],
    ids=lambda options: "-".join(map(str, options)),
)  # fmt: skip
def test_it_learns_as_llama_does(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    ours, theirs = (said(kind, folder, tmp_path, **options) for kind in (HybridForCausalLM, LlamaForCausalLM))
    assert len(ours) >= 3
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_text_begins_with_bos_where_none_is_given(folder: Path) -> None:
    ours, theirs = (kind.from_pretrained(folder) for kind in (HybridForCausalLM, LlamaForCausalLM))
    want = theirs.generate(max_new_tokens=6)
    assert torch.equal(ours.generate(max_new_tokens=6), want)
    other = theirs.generate(torch.tensor([[5]]), max_new_tokens=6)
    assert torch.equal(ours.generate(max_new_tokens=6, bos_token_id=5), other)
