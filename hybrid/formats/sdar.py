"""SDAR (arXiv 2510.06303): Qwen3, trained on in blocks that are bidirectional inside."""

from transformers import Qwen3Config

from hybrid.formats import Format

FORMAT = Format(
    model_type="sdar",
    like=Qwen3Config,
    defaults={"mask_token_id": 151669, "block_size": 4},
    always={"qk_norm": True, "clean_attention": "block", "diffusion_prediction": "in_place"},
    architecture="SDARForCausalLM",
)
