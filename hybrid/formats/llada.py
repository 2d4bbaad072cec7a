"""LLaDA (arXiv 2502.09992): Llama under OLMo's names, trained from scratch without any order."""

from transformers import LlamaConfig

from hybrid.formats import Format

NOTHING = (False, None)
BLOCK, LAYER = "model.transformer.blocks.*", "model.layers.*"

FORMAT = Format(
    model_type="llada",
    like=LlamaConfig,
    fields={
        "d_model": "hidden_size", "mlp_hidden_size": "intermediate_size", "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "embedding_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings", "weight_tying": "tie_word_embeddings",
        "init_std": "initializer_range", "activation_type": "hidden_act",
    },
    defaults={"mask_token_id": 126336, "bos_token_id": None},  # nor does Llama's, 1, mean anything here
    always={"clean_attention": "full", "diffusion_prediction": "in_place"},
    # OLMo's configuration can say much; what it means where it says nothing is rarely what LLaDA is.
    only=(
        ("block_type", ("llama",), "another order of things in a layer than Llama's"),
        ("block_group_size", (1, None), "layers in groups"),
        ("layer_norm_type", ("rms",), "another norm than RMSNorm"),
        ("layer_norm_with_affine", (True, None), "norms without weights"),
        ("rope", (True,), "other positions than RoPE"),
        ("alibi", NOTHING, "ALiBi"),
        ("attention_layer_norm", NOTHING, "a norm over all heads together"),
        ("input_emb_norm", NOTHING, "scaled embeddings"),
        ("scale_logits", NOTHING, "scaled logits"),
        ("multi_query_attention", NOTHING, "a second way to count key heads"),
        ("include_bias", NOTHING, "biases in every layer"),
        ("include_qkv_bias", NOTHING, "biases on queries, keys and values under OLMo's names"),
        ("bias_for_layer_norm", NOTHING, "biases in norms"),
    ),
    names={
        "model.transformer.wte": "model.embed_tokens",
        "model.transformer.ln_f": "model.norm",
        "model.transformer.ff_out": "lm_head",
        f"{BLOCK}.attn_norm": f"{LAYER}.input_layernorm",
        f"{BLOCK}.q_proj": f"{LAYER}.self_attn.q_proj",
        f"{BLOCK}.k_proj": f"{LAYER}.self_attn.k_proj",
        f"{BLOCK}.v_proj": f"{LAYER}.self_attn.v_proj",
        f"{BLOCK}.attn_out": f"{LAYER}.self_attn.o_proj",
        f"{BLOCK}.ff_norm": f"{LAYER}.post_attention_layernorm",
        f"{BLOCK}.ff_proj": f"{LAYER}.mlp.gate_proj",
        f"{BLOCK}.up_proj": f"{LAYER}.mlp.up_proj",
        f"{BLOCK}.ff_out": f"{LAYER}.mlp.down_proj",
    },
)
