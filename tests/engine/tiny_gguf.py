"""Writes small whole GGUF models with the `gguf` package's own writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 256, 4, 2, 16, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def _byte_level_vocabulary() -> dict[str, Any]:
    from ragate_engine.weights.tokenizer import _BYTES

    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
    tokens = [
        *_BYTES,
        *("".join(merge.split()) for merge in merges),
        "<|im_start|>",
        "<|im_end|>",
        "[PAD]",
        "<x>",
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 4) + [3, 3, 5, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 4,
        "tokenizer.ggml.eos_token_id": len(tokens) - 3,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def _sentencepiece_vocabulary() -> dict[str, Any]:
    words = ["he", "ll", "hell", "hello", "▁w", "▁hello", "▁", *"helowrd12"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "\n\n"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(words))] + [-1000.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def interleave(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def random_blocks(kind: Kind, rows: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of any block type, of random codes under small finite scales: uint8 [rows, row_bytes]."""
    from ragate_engine.quant.formats import FORMATS

    form = FORMATS[kind]
    blocks = rng.integers(0, 256, (rows * width // form.block_weights, form.block_bytes), dtype=np.uint8)
    for start in SCALE_BYTES[kind]:
        halves = rng.uniform(-0.1, 0.1, len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


SCALE_BYTES = {
    Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,),
    Kind.IQ4_NL: (0,), Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
}  # fmt: skip
"""Where the float16 numbers of a block lie."""


def write_tiny(
    path: Path,
    arch: str = "llama",
    *,
    tokenizer: str = "gpt2",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    kinds: dict[str, Kind] | None = None,
) -> dict[str, np.ndarray]:
    """Write a two-layer model to `path`; returns its float32 weights by GGUF name, q and k in plain order.

    `metadata` and `tensors` replace or add (`None` removes); `kinds` quantizes a tensor.
    """
    rng = np.random.default_rng(0)
    words = _byte_level_vocabulary() if tokenizer == "gpt2" else _sentencepiece_vocabulary()
    values: dict[str, Any] = {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "general.file_type": 3,
        **words,
        **(metadata or {}),
    }
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "token_embd.weight": (len(words["tokenizer.ggml.tokens"]), HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (q, HIDDEN),
            f"blk.{i}.attn_k.weight": (kv, HIDDEN),
            f"blk.{i}.attn_v.weight": (kv, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, q),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, INNER),
        }
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    weights |= tensors or {}
    weights = {name: array for name, array in weights.items() if array is not None}

    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, array in weights.items():
        stored = array
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            stored = interleave(array, HEADS if ".attn_q." in name else KV_HEADS)
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, stored)
        else:
            writer.add_tensor(name, gguf.quants.quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
