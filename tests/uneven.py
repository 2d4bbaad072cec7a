"""Conversations as plain batches: little of some rows is learned, much of others."""

from typing import Any

import torch
from oracles import VOCABULARY, texts
from torch import Tensor
from torch.utils.data import DataLoader

FIELDS = {"vocab_size": VOCABULARY, "mask_token_id": VOCABULARY - 1, "eos_token_id": VOCABULARY - 2}
LENGTHS, ANSWERS = [40, 9, 33, 12, 25, 38], [34, 2, 3, 7, 1, 20]


def rows() -> list[dict[str, list[int]]]:
    found = []
    for ids, answer in zip(texts(3, LENGTHS, VOCABULARY - 3), ANSWERS, strict=True):
        ids = [*ids, *[VOCABULARY - 2] * (answer % 4)]  # ends of text, which count less the more there are
        found.append({"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[-answer:]})
    return found


def collate(some: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Padded to the longest of the batch, as collators do."""
    width = max(len(row["input_ids"]) for row in some)
    pads = {"input_ids": 0, "labels": -100}
    found = {name: torch.tensor([x[name] + [pad] * (width - len(x[name])) for x in some]) for name, pad in pads.items()}
    real = [[1] * len(x["input_ids"]) + [0] * (width - len(x["input_ids"])) for x in some]
    return {**found, "attention_mask": torch.tensor(real)}


def loader(batch_size: int, data: Any = None, **given: Any) -> DataLoader[Any]:
    return DataLoader(data or rows(), batch_size=batch_size, collate_fn=collate, **given)
