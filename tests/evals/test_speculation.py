"""Speculation is measured on the same answers, in turns, and its figures are the ledger's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import texts, tiny

from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.commands import main
from hybrid.evals.timing.speculation import measure
from hybrid.training.running.checkpoint import save_folder
from hybrid.training.text.tokenizing import train_bpe

PROMPTS = texts(3, [4, 7, 2])


def test_every_lossless_way_gives_the_answers_of_ar() -> None:
    model = tiny(1, peaked=0.4)
    adapter = DraftAdapter(model, 2, 4.0)
    for i, up in enumerate(adapter.up.values()):
        up.data.normal_(generator=torch.Generator().manual_seed(i))
    found = {way.name: way for way in measure(model, PROMPTS, adapter, new_tokens=11, window=4, rounds=1)}
    assert list(found) == [
        "ar", "window 4", "window 4, adapter", "window 4, adapter, fused", "window as it pays, adapter",
        "transformers generate", "transformers, prompt lookup",
    ]  # fmt: skip
    assert all(way.same == 1 and way.tokens == 33 and way.tokens_per_second > 0 for way in found.values())
    assert found["ar"].tokens_per_forward == 1 and found["ar"].kept is None
    options = {"mode": "speculative", "block_size": 4, "max_new_tokens": 11, "return_dict_in_generate": True}
    stats = [model.generate(torch.tensor([p]), draft_adapter=adapter, **options).stats for p in PROMPTS]
    rounds = [n for s in stats for n in s.rows[0].accepted]
    way = found["window 4, adapter"]
    assert way.kept == pytest.approx(sum(rounds) / len(rounds))
    assert way.tokens_per_forward == pytest.approx(30 / sum(s.draft + s.settle for s in stats))
    assert way.kept != found["window 4"].kept


@pytest.mark.parametrize("fields", [{"attention_bias": True}, {"scale_embeddings": True}, {"norm": "rms_offset"}])
def test_what_neither_peer_is_has_none(fields: dict[str, Any]) -> None:
    found = measure(tiny(**fields), PROMPTS, None, new_tokens=3, window=3, rounds=1)
    assert [way.name for way in found] == ["ar", "window 3", "window 3, fused"]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="prompts"):
        measure(tiny(), [], None, new_tokens=3, window=3, rounds=1)
    with pytest.raises(ValueError, match="speculative"):
        measure(tiny(clean_attention="full"), PROMPTS, None, new_tokens=3, window=3, rounds=1)


def test_a_head_and_normed_queries_have_their_peers_too() -> None:
    model = tiny(1, peaked=0.4, qk_norm=True, draft_head_size=6)
    found = {way.name: way for way in measure(model, PROMPTS, None, new_tokens=11, window=4, rounds=1)}
    assert list(found)[2:] == [
        "window 4, fused", "window as it pays", "transformers generate", "transformers, prompt lookup",
    ]  # fmt: skip
    assert all(way.same == 1 for way in found.values())


def test_the_command_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_bpe(["why not, said the cat on the mat"] * 9, 280)
    model = tiny(1, dtype=torch.float32, vocab_size=len(tokenizer), mask_token_id=0)
    save_folder(model, tokenizer, tmp_path / "model")
    DraftAdapter(model).save_pretrained(tmp_path / "adapter")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "why"}) + "\n")
    model, prompts = str(tmp_path / "model"), str(tmp_path / "prompts.jsonl")
    words = ["--new-tokens", "4", "--rounds", "1", "--adapter", str(tmp_path / "adapter")]
    main(["bench", "speculation", model, prompts, *words])
    out = capsys.readouterr().out
    assert "window 8, adapter" in out and "prompt lookup" in out and "100%" in out
    assert "of 9 slots" in out and "a token behind" in out and "thread" in out
    with pytest.raises(SystemExit):
        main(["bench", "speculation", model])
    assert "prompts" in capsys.readouterr().err
    main(["bench", *words, f"--prompts={prompts}", "--speculation", model])  # as it was written in the last version
    out, said = capsys.readouterr()
    assert "window 8, adapter" in out and "`hybrid bench speculation` now" in said
