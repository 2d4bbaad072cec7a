"""Hybrid autoregressive/diffusion language models: one backbone, one checkpoint, four ways to decode it."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hybrid.backbone import HybridModel
from hybrid.cache import KVCache
from hybrid.config import HybridConfig
from hybrid.layout import Layout, visible
from hybrid.model import HybridForCausalLM, HybridForSequenceClassification
from hybrid.renamed import find_by_old_names

# In a source tree, `hybrid.sampling`, `hybrid.training` and `hybrid.evals` are beside this folder, not in it.
if not Path(__file__).with_name("sampling").is_dir():
    __path__.append(str(Path(__file__).parents[1]))
find_by_old_names()

try:
    __version__ = version("hybrid-lm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "HybridConfig", "HybridForCausalLM", "HybridForSequenceClassification", "HybridModel", "KVCache", "Layout",
    "__version__", "visible",
]  # fmt: skip
