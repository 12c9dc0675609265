"""A tiny random model of every causal family that transformers has a config for.

Most families become small by the same settings; the others have their own below.
"""

from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
    "moe_intermediate_size": 32, "num_dense_layers": 1,
}  # fmt: skip
_LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
           "linear_num_value_heads": 4, "shared_expert_intermediate_size": 32}  # fmt: skip
_BOTH = {
    **COMMON, **EXPERTS, **_LINEAR, "n_routed_experts": 4, "n_shared_experts": 1, "ffn_dim": 64,
    "moe_shared_expert_intermediate_size": 32, "decoder_ffn_dim": 64, "dff": 64,
    "word_embed_proj_dim": 32,
}  # fmt: skip
_TEXT = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}

_ENCODER = {**COMMON, "is_decoder": True}
_SEQ2SEQ = {
    "vocab_size": 264, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
_LATENT = {  # multi-head latent attention, and what chooses its keys
    **_BOTH, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "first_k_dense_replace": 1,
}  # fmt: skip
_GPTJ = {
    "vocab_size": 264, "n_positions": 128, "n_ctx": 128, "n_embd": 32, "n_layer": 3, "n_head": 4,
    "rotary_dim": 4, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
           "num_attention_heads": 4, "image_size": 32, "patch_size": 16}  # fmt: skip
_QWEN_VISION = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 4,
                "out_hidden_size": 32, "num_position_embeddings": 16}  # fmt: skip
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 264,
              "num_kv_shared_layers": 0}  # fmt: skip
_GEMMA4 = {**COMMON, "head_dim": 8, "global_head_dim": 8, "per_layer_config": None}
_STREAMS = {"hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
            "indexer_budget": 8, "indexer_compress_ratio": 2, "ple_embed_dim": 32,
            "ngram_vocab_size_base": 64, "split_ngram_parts": 1}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16,
          "shared_intermediate_size": 64}  # fmt: skip
_INKLING = {
    **_BOTH, "unpadded_vocab_size": 264, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 8, "d_rel": 4, "rel_extent": 32, "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2,
    "loop_gate_rank": 4,
}  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie",
            "megatron-bert", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
            ),
        _ENCODER,
    ),
    "xmod": {**_ENCODER, "default_language": "en_XX"},
    "big_bird": {**_ENCODER, "attention_type": "original_full"},
    "rembert": {**_ENCODER, "input_embedding_size": 16, "output_embedding_size": 24},
    "roc_bert": {
        **_ENCODER, "pronunciation_embed_dim": 8, "pronunciation_vocab_size": 264,
        "shape_embed_dim": 8, "shape_vocab_size": 264,
    },
    "roformer": {**_ENCODER, "embedding_size": 32},
    **dict.fromkeys(
        ("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
        {**_SEQ2SEQ, "decoder_vocab_size": 264},
    ),
    "bigbird_pegasus": {**_SEQ2SEQ, "attention_type": "original_full"},
    "whisper": {**_SEQ2SEQ, "max_target_positions": 128, "max_source_positions": 64},
    "prophetnet": {
        "vocab_size": 264, "hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "num_encoder_layers": 3, "num_decoder_layers": 3, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "max_position_embeddings": 128, "is_decoder": True,
    },
    **dict.fromkeys(
        (
            "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa",
            "glm4_moe_lite", "hy_v4", "minicpm3", "sarvam_mla", "youtu",
        ),
        _LATENT,
    ),
    **dict.fromkeys(("codegen", "gptj"), _GPTJ),
    "bailing_hybrid": {
        **_LATENT, "q_lora_rank": None, "num_shared_experts": 1, "num_experts_per_token": 2,
        "num_expert_group": 1, "linear_head_dim": 8, "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "dory": {
        **_BOTH, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1,
    },
    "falcon_h1": {**_BOTH, **_MAMBA, "mamba_d_ssm": 64},
    "jamba": {**_BOTH, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "minimax_m3_vl_text": {
        **_LATENT, "dense_intermediate_size": 64, "shared_intermediate_size": 32, "rotary_dim": 4,
    },
    "nemotron_h": {
        **{name: value for name, value in _BOTH.items() if name != "num_hidden_layers"},
        "layers_block_type": ["linear_attention", "full_attention", "mlp"], "ssm_state_size": 8,
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 16,
    },
    "bamba": {**_BOTH, **_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_BOTH, **_MAMBA,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "mamba2": {
        "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8,
        "state_size": 8, "n_groups": 2, "chunk_size": 16,
    },
    "zamba": {
        **_BOTH, "num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        **_BOTH, "num_key_value_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 4,
        "mamba_headdim": 16, "chunk_size": 16, "adapter_rank": 4, "hybrid_layer_ids": [1],
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
    },
    "blt": {
        "vocab_size": 260, "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3], "cross_attn_k": 2,
        **{
            f"{part}_config": {**COMMON, "vocab_size": 260, "head_dim": 8, "num_key_value_heads": 4,
                               "hidden_size_global": 64 if part != "patcher" else 32}
            for part in ("patcher", "encoder", "decoder", "global")
        },
    },
    "cohere_compass_text": {
        **_BOTH, "sliding_window": 8,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "cpmant": {
        "vocab_size": 264, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64,
        "num_hidden_layers": 3, "prompt_length": 4,
    },
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128, "vocab_size": 264,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4,
                       "moe_top_k": 2},
    },
    "deepseek_v4": {
        **_LATENT, "num_key_value_heads": 1, "head_dim": 16, "o_groups": 2, "o_lora_rank": 8,
        "sliding_window": 8,
    },
    "dots3_note_text": {**_LATENT, "per_layer_config": None, "head_dim": 16},
    "dots3_note": {
        "text_config": {**_LATENT, "per_layer_config": None, "head_dim": 16},
        "vision_config": {
            **_VISION, "adapter_in_dim": 32, "adapter_out_dim": 32, "per_layer_config": None,
            "num_local_experts": 2, "moe_intermediate_size": 32,
        },
        "audio_config": {
            **COMMON, "num_key_value_heads": 4, "head_dim": 8, "adapter_input_size": 32,
            "adapter_out_dim": 32, "downsample_hidden_size": 8, "feature_size": 16,
            "conv_output_size": 16,
        },
    },
    "falcon": {**_TEXT, "new_decoder_architecture": False},
    "gpt_neo": {
        "vocab_size": 264, "max_position_embeddings": 128, "hidden_size": 32, "num_layers": 3,
        "attention_types": [[["global", "local", "global"], 1]], "num_heads": 4, "window_size": 8,
    },
    "hrm_text": {**COMMON, "head_dim": 8, "num_hidden_layers": 2},
    **dict.fromkeys(("inkling2_loop_text", "inkling2_text", "inkling_text"), _INKLING),
    "kimi_linear": {
        **_LATENT, "q_lora_rank": None, "num_shared_experts": 1, "num_experts_per_token": 2,
        "linear_head_dim": 8, "linear_num_heads": 4,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
    "lfm2_moe": {**_BOTH, "layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {
        **{name: value for name, value in _LATENT.items() if name != "num_hidden_layers"},
        "num_layers": 3, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32,
        "moe_topk": 2, "zero_expert_num": 2,
    },
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_moe"),
        {"text_config": {**_BOTH}, "vision_config": _QWEN_VISION},
    ),
    "qwen4_exp_text": {**_BOTH, **_STREAMS},
    "qwen4_exp": {
        "text_config": {**_BOTH, **_STREAMS}, "vision_config": _QWEN_VISION
    },
    "zaya": {
        **_BOTH, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "router_hidden_size": 8
    },
    "emu3": {
        "text_config": COMMON,
        "vq_config": {"base_channels": 32, "hidden_size": 32, "codebook_size": 64,
                      "channel_multiplier": [1, 1]},
    },
    "gemma3": {"text_config": {**COMMON, "head_dim": 8}, "vision_config": _VISION},
    "gemma3n_text": {**COMMON, **_PER_LAYER, "head_dim": 8, "laurel_rank": 4},
    "gemma3n": {
        "text_config": {**COMMON, **_PER_LAYER, "head_dim": 8, "laurel_rank": 4},
        "audio_config": {"hidden_size": 32, "conf_num_attention_heads": 4,
                         "conf_num_hidden_layers": 2},
    },
    "gemma4_text": {**_GEMMA4, **_PER_LAYER},
    "gemma4": {"text_config": {**_GEMMA4, **_PER_LAYER}},
    "gemma4_unified": {"text_config": _GEMMA4},
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        {"text_config": {**_GEMMA4, "hidden_size_per_layer_input": 0,
                         "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 3},
         "backbone_hidden_size": 32, "num_centroids": 8, "centroid_intermediate_top_k": 2},
    ),
    "git": {**COMMON, "vision_config": _VISION},
    "got_ocr2": {
        "text_config": COMMON, "vision_config": {**_VISION, "mlp_dim": 64, "output_channels": 8},
    },
    "llama4": {
        "text_config": {**_BOTH, "intermediate_size_mlp": 64},
        "vision_config": {**_VISION, "vision_output_dim": 64, "projector_input_dim": 64,
                          "projector_output_dim": 64},
    },
    "mllama": {
        "text_config": {**COMMON, "cross_attention_layers": [2]},
        "vision_config": {**_VISION, "attention_heads": 4, "num_global_layers": 1,
                          "vision_output_dim": 64, "intermediate_layers_indices": [0]},
    },
    "moshi": {
        **COMMON, "head_dim": 8, "ffn_dim": 64, "audio_vocab_size": 64,
        "audio_encoder_config": {**COMMON, "head_dim": 8, "num_filters": 4, "codebook_size": 64,
                                 "codebook_dim": 8, "upsample_groups": 32},
        "depth_decoder_config": {**COMMON, "head_dim": 8, "ffn_dim": 64, "input_size": 32,
                                 "audio_vocab_size": 64, "max_position_embeddings": 9},
    },
    "moss_transcribe_diarize": {
        "text_config": {**COMMON, "head_dim": 8},
        "audio_config": {**_VISION, "max_source_positions": 64},
    },
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"),
        {"decoder": {**_TEXT, "ffn_dim": 64}, "text_encoder": {"model_type": "t5"},
         "audio_encoder": {"model_type": "encodec"}},
    ),
    "phi4_multimodal": {
        **COMMON, "vision_config": _VISION, "audio_config": {"hidden_size": 32,
        "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 4,
        "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8},
    },
    "reformer": {
        "attention_head_size": 8, "attn_layers": ["local", "lsh", "local"], "hidden_size": 32,
        "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [8, 24], "feed_forward_size": 64,
        "vocab_size": 264, "max_position_embeddings": 128, "num_attention_heads": 4,
        "is_decoder": True,
    },
    "xlm": {
        "vocab_size": 264, "emb_dim": 32, "n_layers": 3, "n_heads": 4,
        "max_position_embeddings": 128, "causal": True,
    },
    "xlnet": {
        "vocab_size": 264, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64,
        "attn_type": "uni",
    },
}  # fmt: skip


NOT_BUILT: dict[str, tuple[str, str]] = {
    "gemma3n": (
        "its image tower needs timm and Pillow (gemma3n_text is its text tower)", "requires the",
    ),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"),
        (
            "transformers builds its causal class from the decoder's config only; its tokens are "
            "codes of sound", "Config' object has no attribute 'dropout'",
        ),
    ),
}  # fmt: skip
"""Why a family cannot be built here, and what the error says."""


def tiny_config(kind: str) -> Any:
    """The config of a tiny model of one family."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**SETTINGS.get(kind, _BOTH))
