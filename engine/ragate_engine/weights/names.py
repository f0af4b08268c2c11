"""One set of tensor names for every model: which there must be, in what shape, what GGUF and HF call them.

Canonical names: `embed`, `final_norm`, `lm_head` (absent when tied), and for layer i `layers.{i}.` with
`attn_norm q k v o q_bias k_bias v_bias q_norm k_norm attn_post_norm mlp_norm mlp_post_norm gate up down`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ragate_engine.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ragate_engine.config import ModelConfig

_GGUF_TOP = {"token_embd.weight": "embed", "output_norm.weight": "final_norm", "output.weight": "lm_head"}
_GGUF_LAYER = {
    "attn_norm.weight": "attn_norm",
    "attn_q.weight": "q",
    "attn_k.weight": "k",
    "attn_v.weight": "v",
    "attn_qkv.weight": "qkv",
    "attn_output.weight": "o",
    "attn_q.bias": "q_bias",
    "attn_k.bias": "k_bias",
    "attn_v.bias": "v_bias",
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    "post_attention_norm.weight": "attn_post_norm",
    "ffn_norm.weight": "mlp_norm",
    "post_ffw_norm.weight": "mlp_post_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
}

_HF_TOP = {"embed_tokens.weight": "embed", "norm.weight": "final_norm", "lm_head.weight": "lm_head"}
_HF_LAYER = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.qkv_proj.weight": "qkv",
    "self_attn.o_proj.weight": "o",
    "self_attn.q_proj.bias": "q_bias",
    "self_attn.k_proj.bias": "k_bias",
    "self_attn.v_proj.bias": "v_bias",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "post_attention_layernorm.weight": "mlp_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.gate_up_proj.weight": "gate_up",
    "mlp.down_proj.weight": "down",
}
_HF_SANDWICH = {
    "post_attention_layernorm.weight": "attn_post_norm",
    "pre_feedforward_layernorm.weight": "mlp_norm",
    "post_feedforward_layernorm.weight": "mlp_post_norm",
}
"""Gemma 2 and 3 use the name of Llama's norm before the MLP for the norm after attention."""


def from_gguf(name: str) -> str | None:
    """The canonical name of a GGUF tensor (`qkv` where the file fuses the three); `None` if there is none."""
    if match := re.fullmatch(r"blk\.(\d{1,6})\.(.+)", name):
        leaf = _GGUF_LAYER.get(match[2])
        return f"layers.{int(match[1])}.{leaf}" if leaf else None
    return _GGUF_TOP.get(name)


def from_hf(name: str, sandwich_norm: bool) -> str | None:
    """The canonical name of a Hugging Face tensor (`qkv`, `gate_up` where fused); `None` if there is none."""
    name = re.sub(r"^(language_model\.model\.|model\.language_model\.|language_model\.|model\.)", "", name)
    if match := re.fullmatch(r"layers\.(\d{1,6})\.(.+)", name):
        leaf = (_HF_SANDWICH.get(match[2]) if sandwich_norm else None) or _HF_LAYER.get(match[2])
        return f"layers.{int(match[1])}.{leaf}" if leaf else None
    return _HF_TOP.get(name)


def to_gguf(name: str) -> str:
    """The GGUF name of a canonical tensor (`layers.0.qkv` where the three are to be fused)."""
    layer, dot, leaf = name.rpartition(".")
    table = _GGUF_LAYER if dot else _GGUF_TOP
    stored = next(theirs for theirs, ours in table.items() if ours == leaf)
    return f"{layer.replace('layers.', 'blk.')}{dot}{stored}"


def to_hf(name: str, sandwich_norm: bool) -> str:
    """The Hugging Face name of a canonical tensor (`layers.0.qkv` and `gate_up` where it is to be fused)."""
    layer, dot, leaf = name.rpartition(".")
    table = (_HF_LAYER | _HF_SANDWICH if sandwich_norm else _HF_LAYER) if dot else _HF_TOP
    stored = next(theirs for theirs, ours in table.items() if ours == leaf)
    return stored if leaf == "lm_head" else f"model.{layer}{dot}{stored}"


def expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this configuration has, with its shape ([out_features, in_features])."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (q_width, hidden),
        "k": (kv_width, hidden),
        "v": (kv_width, hidden),
        "o": (hidden, q_width),
        "mlp_norm": (hidden,),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    if config.qkv_bias:
        layer |= {"q_bias": (q_width,), "k_bias": (kv_width,), "v_bias": (kv_width,)}
    if config.qk_norm:
        layer |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.sandwich_norm:
        layer |= {"attn_post_norm": (hidden,), "mlp_post_norm": (hidden,)}
    names: dict[str, tuple[int, ...]] = {"embed": (config.vocab_size, hidden), "final_norm": (hidden,)}
    if not config.tie_embeddings:
        names["lm_head"] = (config.vocab_size, hidden)
    for i in range(config.num_layers):
        names |= {f"layers.{i}.{leaf}": shape for leaf, shape in layer.items()}
    return names


def fused_parts(leaf: str, config: ModelConfig) -> dict[str, slice]:
    """The rows of each part of a fused matrix: `qkv` and `gate_up` of Phi-3."""
    if leaf == "qkv":
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}
    inner = config.intermediate_size
    return {"gate": slice(0, inner), "up": slice(inner, 2 * inner)}


def check(path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelFileError unless the shapes `found` in a file are exactly the ones `wanted`."""
    for name, shape in wanted.items():
        if name not in found:
            raise ModelFileError(f"{path} lacks the tensor {name}: fetch or convert it again")
        if found[name] != shape:
            is_shape = list(found[name])
            raise ModelFileError(f"{path}: tensor {name} has shape {is_shape}, expected {list(shape)}")
    for name in found:
        if name not in wanted:
            raise ModelFileError(f"{path} has a tensor {name}, which its configuration has no place for")
