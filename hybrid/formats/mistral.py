"""Mistral (arXiv 2310.06825) without its sliding window, which releases from v0.2 on do not have. A pure AR model."""

from transformers import MistralConfig

from hybrid.formats import Format

FORMAT = Format(model_type="mistral", like=MistralConfig, architecture="MistralForCausalLM")
