"""Hybrid autoregressive/diffusion language models: one backbone, one checkpoint, four ways to decode it.

Names are looked up when they are first used. transformers' Auto classes know the model type either way.
"""
# ruff: noqa: F401 (the imports are for those who read types)

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.common.lazy import import_with, names_of
from hybrid.common.renamed import find_by_old_names

if TYPE_CHECKING:
    from hybrid.backbone import HybridModel
    from hybrid.cache import KVCache
    from hybrid.config import HybridConfig
    from hybrid.layout import Layout, visible
    from hybrid.model import HybridForCausalLM, HybridForSequenceClassification

# In a source tree, `hybrid.sampling`, `hybrid.training` and `hybrid.evals` are beside this folder, not in it.
if not Path(__file__).with_name("sampling").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

try:
    __version__ = version("hybrid-lm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__getattr__, _names = names_of(__name__)
__all__ = [*_names, "__version__"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


find_by_old_names()
import_with("transformers.models.auto.configuration_auto", "hybrid.config")
import_with("transformers.models.auto.modeling_auto", "hybrid.model")
