"""transformers' own modelling tests on our models: `ModelTesterMixin` as it stands in the source distribution of the
installed version. It is never part of this repository: `HYBRID_TRANSFORMERS_TESTS` names the folder where it was
unpacked (`.ci/run` does that), and without it these tests are skipped.
"""

import copy
import importlib
import itertools
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid import HybridConfig, HybridForCausalLM, HybridForSequenceClassification, HybridModel

FOLDER = os.environ.get("HYBRID_TRANSFORMERS_TESTS", "")

# Tests of the mixin that do not apply, each with the reason.
EAGER = "eager attention is refused, on purpose: the rule of visibility is a boolean mask"
EXCLUDED = {
    "test_eager_matches_sdpa_inference": EAGER,
    "test_attention_outputs": "attentions are refused, on purpose: no kernel here gives them",
    "test_model_outputs_equivalence": "asks for attentions; tests/exact/test_forward.py has the rest of it",
    "test_retain_grad_hidden_states_attentions": "asks for attentions",
    "test_can_set_attention_dynamically": EAGER,
    "test_sdpa_can_dispatch_non_composite_models": EAGER,
    "test_correct_missing_keys": "a language model is not loaded from a folder without its head, on purpose",
    "test_model_weights_reload_no_missing_tied_weights": "a folder that lacks weights is refused, on purpose",
    "test_generation_tester_mixin_inheritance": "the generation mixin is not in the source distribution",
}  # fmt: skip


def load() -> Any:
    """The module, whose neighbours of other kinds (export, generation) stand in for themselves as nothing."""
    if not (Path(FOLDER) / "test_modeling_common.py").is_file():
        pytest.skip(
            "HYBRID_TRANSFORMERS_TESTS names no folder with test_modeling_common.py, from the source distribution of "
            "transformers",
            allow_module_level=True,
        )
    pytest.importorskip("parameterized", reason="transformers' tests need it")
    package = types.ModuleType("transformers_tests")
    package.__path__ = [FOLDER]
    sys.modules["transformers_tests"] = package
    absent = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
    for name, kind in absent.items():
        outer, _, _ = name.partition(".")
        sys.modules[f"transformers_tests.{outer}"] = types.ModuleType(outer)
        inner = types.ModuleType(name)
        setattr(inner, kind, type(kind, (), {}))
        sys.modules[f"transformers_tests.{name}"] = inner
    return importlib.import_module("transformers_tests.test_modeling_common")


common = load()


class Tester:
    """What the mixin asks of a family's tests."""

    is_training = True
    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 3, 7, 32, 2, 4

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.config_tester = None

    def get_config(self) -> HybridConfig:
        return HybridConfig(
            vocab_size=99, mask_token_id=3, hidden_size=self.hidden_size, intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers, num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[HybridConfig, dict[str, Any]]:
        ids = common.ids_tensor([self.batch_size, self.seq_length], 97).clamp(min=4)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestModels(common.ModelTesterMixin, unittest.TestCase):  # type: ignore[misc]
    all_model_classes: tuple[Any, ...] = (HybridForCausalLM, HybridForSequenceClassification)
    test_all_params_have_gradient = False
    test_resize_embeddings = True

    def setUp(self) -> None:
        self.model_tester = Tester(self)

    def _prepare_for_class(
        self, inputs: dict[str, Any], model_class: Any, return_labels: bool = False
    ) -> dict[str, Any]:
        found = copy.deepcopy(inputs)
        if return_labels:
            one_a_row = model_class is HybridForSequenceClassification
            found["labels"] = torch.zeros(3, dtype=torch.int64) if one_a_row else found["input_ids"].clone()
        return found


class TestBase(TestModels):
    """The transformer without a head, which has no loss."""

    all_model_classes = (HybridModel,)
    is_training = False

    def setUp(self) -> None:
        super().setUp()
        self.model_tester.is_training = False

    def _prepare_for_class(
        self, inputs: dict[str, Any], model_class: Any, return_labels: bool = False
    ) -> dict[str, Any]:
        return copy.deepcopy(inputs)


for tests, (name, reason) in itertools.product((TestModels, TestBase), EXCLUDED.items()):
    every = [x for x in dir(tests) if x == name or x.startswith(f"{name}_")]
    assert every, f"{name} is excluded and is no test any more"
    for full in every:
        setattr(tests, full, unittest.skip(reason)(getattr(tests, full)))
