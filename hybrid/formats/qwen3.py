"""Qwen3 (arXiv 2505.09388): Llama with normed queries and keys. A pure AR model."""

from transformers import Qwen3Config

from hybrid.formats import Format

FORMAT = Format(
    model_type="qwen3",
    like=Qwen3Config,
    always={"qk_norm": True},
    architecture="Qwen3ForCausalLM",
)
