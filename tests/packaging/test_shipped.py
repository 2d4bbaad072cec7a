"""The model that comes with the package: whole, small, found by its name without a network, and worth shipping."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.checkpoints.place import MODELS, place, shipped
from hybrid.evals.laboratory.ngram import NGram
from hybrid.evals.likelihood import ar_nll, tokenized
from hybrid.texts import encode_document
from hybrid.training.tasks.stdlib import load_stdlib

NAME = "hybrid-stdlib"


def test_has_all_that_was_promised() -> None:
    assert NAME in shipped()
    folder = MODELS / NAME
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 16 * 2**20
    for name in ("config.json", "tokenizer.json", "recipe.yaml", "metrics.csv", "README.md"):
        assert (folder / name).stat().st_size > 0
    with safe_open(weights, "pt") as stored:
        assert {stored.get_slice(key).get_dtype() for key in stored.keys()} == {"BF16"}  # noqa: SIM118


def test_loads_anywhere_without_a_network(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "hybrid", "generate", "import os\n", "--max-new-tokens", "4", "--mode", "speculative"],
        cwd=tmp_path, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}, text=True, capture_output=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("import os\n") and "4 tokens" in said.stderr


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(NAME) == str(MODELS / NAME)
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir()
    assert place(NAME) == NAME
    assert place("some/hub-name") == "some/hub-name"


def test_the_drafter_fits_the_model_that_it_is_for() -> None:
    drafters = shipped("adapter_config.json")
    assert drafters == ["smollm2-drafter"] and not {*drafters} & {*shipped()}
    assert sum(file.stat().st_size for file in (MODELS / "smollm2-drafter").iterdir()) <= 16 * 2**20
    sizes = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.device("meta"):
        model = HybridForCausalLM(HybridConfig(**sizes, mask_token_id=16))
    with pytest.raises(ValueError, match="for hidden states of 288"), torch.device("meta"):
        DraftAdapter.from_pretrained("smollm2-drafter", HybridForCausalLM(HybridConfig(**sizes | {"hidden_size": 288})))
    adapter = DraftAdapter.from_pretrained("smollm2-drafter", model.to_empty(device="cpu"))
    assert adapter.head is not None and len(adapter.head.ids) > 4000 and 16 not in adapter.head.ids


@pytest.mark.slow
def test_beats_the_5_gram_on_files_that_neither_saw() -> None:
    model = HybridForCausalLM.from_pretrained(NAME).eval()
    assert model.dtype == torch.float32  # stored in half of it, and computed exactly enough for lossless decoding
    tokenizer, corpus = AutoTokenizer.from_pretrained(model.name_or_path), load_stdlib()
    begin = tokenizer.bos_token_id
    counted = [token for d in corpus.train for token in (begin, *encode_document(tokenizer, d.text))]
    held_out = tokenized(tokenizer, [d.text for d in corpus.test], length=256, begin=begin, rows=24)
    nats = float(ar_nll(model, held_out.ids, held_out.target).sum())
    baseline = NGram(np.array(counted), order=5, vocab_size=len(tokenizer)).score(held_out)
    assert nats < 0.95 * baseline.nats


def test_the_shipped_model_guesses_ahead() -> None:
    model = HybridForCausalLM.from_pretrained("hybrid-stdlib")
    ids = torch.arange(100, 124)[None]
    options: dict[str, Any] = {"max_new_tokens": 48, "eos_token_id": [], "return_dict_in_generate": True}
    exact, headed = model.generate(ids, **options), model.generate(ids, mode="speculative", block_size=6, **options)
    model.set_draft_head(None)
    masked = model.generate(ids, mode="speculative", block_size=6, **options)
    assert torch.equal(exact.sequences, headed.sequences) and torch.equal(exact.sequences, masked.sequences)
    assert headed.stats.forwards < 0.8 * masked.stats.forwards
