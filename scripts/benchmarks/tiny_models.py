"""Tiny models with random weights of any class of transformers: its own configuration, with small numbers."""

import dataclasses
import re
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)


__all__ = ["CLASSES", "KINDS", "PAD", "VOCABULARY", "class_names", "tiny_model"]

VOCABULARY, PAD, CLASSES = 64, 0, 3
_NOISE = 0.05  # added to all weights, as initial zeros and ones hide mistakes
KINDS = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "classifier": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES}
# The first pattern that a setting's name matches gives its small value; the others stay as they are.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"^(type|task_type|shape|pronunciation|entity)_vocab_sizes?$", 4),
    (r"vocab", VOCABULARY),
    (r"^(pad_token_id|pad_index)$", PAD),
    (r"^bos_token_id$", 1),
    (r"^(eos|sep|cls|decoder_start|eod|forced_eos)_token_id$", 2),
    (r"token_(id|index)$", VOCABULARY - 1),
    (r"^(moe|expert|shared|dense|mlp).*(intermediate|ffn|hidden)_size|expert_intermediate_size", 16),
    (r"intermediate_size|^(encoder_|decoder_)?ffn_(hidden_size|dim)$|^d_?ff$", 48),
    (r"^(d_inner|n_inner|dim_ff)$|hidden_dim$", 48),
    (r"head_?(dim|size)$|^d_kv$|^d_head$", 8),
    (r"^(linear_(key|value)_head_dim|mamba_(d_head|headdim)|kv_channels|dim_head|linear_head_dim|rotary_dim)$", 8),
    (r"(q|kv|o)_lora_rank$|adapter_rank|laurel_rank|gated_norm_rank|hc_lowrank|hidden_size_per_layer_input", 8),
    (r"^num_(local_|routed_)?experts$|^n_routed_experts$|^moe_num_experts$|^zero_expert_num$", 4),
    (r"num_experts_per_tok|^(moe_)?top_?k$|moe_topk|^num_selected_experts$|num_experts_per_token|moe_num_active", 2),
    (r"^(n_group|topk_group|num_expert_group|n_groups|mamba_n_groups)$", 1),
    (r"shared_experts$", 1),
    (r"key_value_heads|kv_heads|kv_n_heads|num_ln_in_parallel", 2),
    (r"heads?$|^n_heads?$|num_query_groups$", 4),
    (r"layers$|^n_layers?$|^depth$|^num_hidden_groups$", 2),
    (r"chunk_size$|chunk_length$|^block_size$", 0),  # at most 16: see `_small`
    (r"hidden_size(_global)?$|^(d_model|n_embd|dim|emb_dim|embed_dim|embedding_(size|dim)|lru_width)$", 32),
    (r"^(dim_model_base|embed_size)$|(input|output)_embedding_size|word_embed_proj_dim|_embed_dim$|_emb_size$", 32),
    (r"positions$|max_position_embeddings|^n_ctx$|max_seq_len|context_length|max_sequence_length", 64),
    (r"^image_size$|^crop_size$", 16),
    (r"^patch_size$", 8),
    (r"(mamba_d_|ssm_)?state(_size)?$", 8),
)  # fmt: skip
_ZERO = re.compile(r"drop|mask_(time|feature)_prob")


_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8}
_SHARED_CACHE = {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What the rules do not know, by the configuration's model type.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _HYBRID,
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"num_local_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_moe": {"moe_k": 2},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gemma3n_text": _SHARED_CACHE,
    "gemma4_text": _SHARED_CACHE,
    "gemma4_unified_text": _SHARED_CACHE,
    "git": {"vision_config": {"image_size": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA2 | {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": _HYBRID,
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 4, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"channel_shrink_ratio": 2, "hidden_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "minicpm3": {"num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {"num_latents": 4, "d_latents": 32, "num_self_attends_per_block": 1, "max_position_embeddings": 64},
    "qwen3_next": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen4_exp_text": _HYBRID,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "reformer": {
        "axial_pos_embds": False, "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4, "is_decoder": True,
    },
    "zamba": {
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 3,
        "attention_head_dim": 16, "attention_hidden_size": 64, "mamba_dt_rank": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "t5": {"decoder_start_token_id": PAD},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip


def class_names(kind: str) -> dict[str, str]:
    """Return the model type of every class of a kind, `causal` or `classifier`, by the class's name."""
    names: dict[str, str] = {}
    for model_type, value in KINDS[kind].items():
        name = value if isinstance(value, str) else value[0]
        names.setdefault(name, model_type)
    return dict(sorted(names.items()))


def tiny_model(kind: str, name: str) -> PreTrainedModel:
    """Return a tiny model of a class, in float32 and without dropout, its weights off their initial zeros and ones.

    Args:
        kind (`str`): `causal` or `classifier`.
        name (`str`): of the class.
    """
    model_class = getattr(transformers, name)
    special = {"num_labels": CLASSES, "pad_token_id": PAD} if kind == "classifier" else {"is_decoder": True}
    config = _tiny_config(model_class.config_class, special)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.pad_token_id = PAD
    torch.manual_seed(0)
    model = model_class(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += _NOISE * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d):
            module.p = 0.0
    return model.float()


def _tiny_config(kind: type[PreTrainedConfig], more: dict[str, Any]) -> PreTrainedConfig:
    values = _small(kind)
    accepted = _fields(kind) | set(_SPECIAL.get(kind.model_type, {}))
    kept = {key: value for key, value in values.items() if key in accepted}
    return kind(**(kept | {key: value for key, value in more.items() if key not in values or key != "is_decoder"}))


@cache
def _fields(kind: type[PreTrainedConfig]) -> frozenset[str]:
    names = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return frozenset(names | set(kind.attribute_map))


def _small(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return settings of a configuration class with small values, those of inner configurations as dictionaries."""
    try:
        default = vars(kind())
    except Exception:  # it has no valid defaults
        default = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in default.items():
        if key.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, PreTrainedConfig):
            inner = _small(type(value))
            values[key] = {name: inner[name] for name in inner if name in _fields(type(value))}
        elif isinstance(value, float) and _ZERO.search(key):
            values[key] = 0.0
        elif isinstance(value, int):
            small = next((size for pattern, size in _SIZES if re.search(pattern, key)), None)
            if small:
                values[key] = small
            elif small == 0:
                values[key] = PAD if "pad" in key else min(value, 16)
    if "qk_nope_head_dim" in values:  # multi-head latent attention
        values |= {"num_key_value_heads": 4, "qk_head_dim": 16}
    special = _SPECIAL.get(kind.model_type, {})
    for key, value in special.items():
        values[key] = values[key] | value if isinstance(value, dict) and isinstance(values.get(key), dict) else value
    return values
