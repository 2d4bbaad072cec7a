"""Qwen2 and Qwen2.5 (arXiv 2412.15115): Llama with biases on queries, keys and values. A pure AR model."""

from transformers import Qwen2Config

from hybrid.formats import Format

FORMAT = Format(
    model_type="qwen2",
    like=Qwen2Config,
    always={"attention_bias": True},
    architecture="Qwen2ForCausalLM",
)
