"""Fast-dLLM v2 (arXiv 2509.26328): Qwen2.5, trained on in blocks that are bidirectional inside; AR's shift is kept."""

from transformers import Qwen2Config

from hybrid.formats import Format

FORMAT = Format(
    model_type="Fast_dLLM_Qwen",
    like=Qwen2Config,
    fields={"bd_size": "block_size"},
    defaults={"mask_token_id": 151665, "block_size": 32},  # the released config.json does not have the first
    always={"attention_bias": True, "clean_attention": "block", "diffusion_prediction": "next"},
)
