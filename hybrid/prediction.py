"""What `hybrid.law.Law` says of predictions, by its former names."""

from torch import Tensor

from hybrid.config import HybridConfig
from hybrid.law import Law
from hybrid.layout import Layout


def without_mask(logits: Tensor, config: HybridConfig) -> Tensor:
    return Law.of(config).without_mask(logits)


def predictions(hidden: Tensor, layout: Layout, config: HybridConfig) -> Tensor:
    return Law.of(config).predictions(hidden, layout)
