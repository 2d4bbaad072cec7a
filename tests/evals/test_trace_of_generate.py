"""The page and the canvas show what generate did, in every mode."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import COMBINATIONS, MASK, generators, padded, texts, tiny

from hybrid.evals.laboratory.traces import Trace, write_trace
from hybrid.sampling.display.slots import advance
from hybrid.training.text.tokenizing import character_tokenizer

WAYS = [*((m, c, p, {}) for m, c, p in COMBINATIONS), ("speculative", "causal", "in_place", {"fused": True})]


@pytest.mark.parametrize(("mode", "clean", "prediction", "options"), WAYS)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_last_canvas_is_the_text(mode: str, clean: str, prediction: str, options: Any, sampled: bool) -> None:
    model = tiny(2, peaked=0.4, clean_attention=clean, diffusion_prediction=prediction)
    rows = texts(3, [5, 1, 8])
    ids, mask = padded(rows, "left")
    trace, options = Trace(), dict(options)
    if mode in ("block", "diffusion"):
        options |= {"reveal": "remdm", "steps_per_block": 3} if sampled else {"confidence_threshold": 0.4}
    if sampled:
        options |= {"do_sample": True, "generator": generators(3)}
    out: Any = model.generate(
        ids, mask, mode=mode, max_new_tokens=11, eos_token_id=[4, 9], watchers=[trace], return_dict_in_generate=True,
        **options,
    )  # fmt: skip
    for row, (prompt, stats) in enumerate(zip(rows, out.stats.rows, strict=True)):
        slots: list[Any] = []
        for step in trace.row(row):
            slots = advance(slots, step, len(prompt))
        new = out.sequences[row, ids.shape[1] :][: stats.tokens].tolist()
        assert [slot.token for slot in slots] == new and all(slot.settled for slot in slots)
        assert all(0 < slot.confidence <= 1 and slot.revealed >= 1 for slot in slots)
        drafts = {step.forward for step in trace.row(row) if step.kind == "draft"}
        assert len(drafts) == stats.draft


def test_an_infill_is_shown_too(tmp_path: Path) -> None:
    model, tokenizer = tiny(2), character_tokenizer("abcdefghijklmnopqrst")
    row = texts(1, [9])[0]
    row[4] = row[5] = row[7] = MASK
    trace = Trace()
    filled = model.infill(torch.tensor([row]), watchers=[trace])
    slots: list[Any] = []
    for step in trace.row(0):
        slots = advance(slots, step, 4)
    assert [slot.token for slot in slots] == filled[0, 4:].tolist()
    page = write_trace(tmp_path / "page.html", {"infill": trace}, tokenizer, row[:4]).read_text()
    assert re.search(r"infill", page) and json.dumps(tokenizer.decode(filled[0, 4:5]))[1:-1] in page
