"""The output folder: packed shards, config.json and the tokenizer, as transformers, vLLM and our engine read them."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import processors

from ragate_engine.files import write_whole
from ragate_engine.quant.packed import pack_awq, pack_gptq, unpack_awq, unpack_gptq
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.quantize.layer import LINEARS, STAGES
from ragate_engine.quantize.rtn import Quantized
from ragate_engine.weights import names
from ragate_engine.weights.fields import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ragate_engine.config import ModelConfig, RopeConfig
    from ragate_engine.quantize.recipe import Recipe
    from ragate_engine.weights import Checkpoint
    from ragate_engine.weights.tokenizer import Tokenizer

_MODELS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}
"""`model_type` and class in transformers, by `ModelConfig.arch`."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of plain tensors, widest first as safetensors lays them out."""
_PIECE_WEIGHTS = 1 << 24
"""Of a table, written at a time."""


def shard_path(folder: Path, index: int, config: ModelConfig) -> Path:
    """The file of layer `index`; the one after the last layer has what is above and below the layers."""
    return folder / f"model-{index + 1:05}-of-{config.num_layers + 1:05}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file whole. Raises OSError."""
    # copies, for a format that has no place for memory that is shared, as g_idx is
    owned = {name: part.to("cpu", copy=True).contiguous() for name, part in tensors.items()}
    write_whole(path, save(owned, {"format": "pt"}))


# --- tensors --------------------------------------------------------------------------------------------


def layer_tensors(
    config: ModelConfig,
    index: int,
    recipe: Recipe,
    dense: Mapping[str, torch.Tensor],
    quantized: Mapping[str, Quantized],
) -> dict[str, torch.Tensor]:
    """A layer as it is stored, by Hugging Face name: linears packed, norms and biases plain."""
    stored: dict[str, torch.Tensor] = {}
    for leaf, tensor in dense.items():
        stored |= dense_tensor(config, f"layers.{index}.{leaf}", tensor)
    for leaf, parts in _stored_linears(config).items():
        each = [quantized[part] for part in parts]
        codes, scales, zeros = (
            torch.cat([getattr(part, field) for part in each]) for field in ("codes", "scales", "zeros")
        )
        if recipe.method == "awq":
            packed = pack_awq(codes, scales, zeros, recipe.bits)
        else:
            packed = pack_gptq(codes, scales, zeros, each[0].g_idx, recipe.bits)
        stored |= {f"{_base(config, index, leaf)}.{part}": tensor for part, tensor in packed.items()}
    return stored


def dense_tensor(config: ModelConfig, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A plain tensor under its Hugging Face name. Gemma's norms are stored without the 1 that is added to them."""
    norm = config.sandwich_norm and name.endswith("norm")
    return {names.to_hf(name, config.sandwich_norm): tensor - 1.0 if norm else tensor}


def read_layer(
    stored: Mapping[str, torch.Tensor],
    config: ModelConfig,
    index: int,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """What a reader makes of `layer_tensors`: weights of `dtype` on `device`, by leaf. Raises ModelFileError."""
    here = {name: tensor.to(device) for name, tensor in stored.items()}
    weights: dict[str, torch.Tensor] = {}
    for leaf, parts in _stored_linears(config).items():
        base = _base(config, index, leaf)
        packed = {
            name.removeprefix(f"{base}."): here.pop(name) for name in stored if name.startswith(f"{base}.q")
        }
        packed |= {
            part: here.pop(f"{base}.{part}") for part in ("scales", "g_idx") if f"{base}.{part}" in here
        }
        if recipe.method == "awq":
            tensor = unpack_awq(packed, recipe.bits, recipe.group, base)
        else:
            tensor = unpack_gptq(packed, recipe.bits, recipe.group, base, version=1)
        sizes = [names.expected(config)[f"layers.0.{part}"][0] for part in parts]
        weights |= zip(parts, tensor.dequantize(dtype).split(sizes), strict=True)
    for name, plain in here.items():
        canonical = names.from_hf(name, config.sandwich_norm) or name
        norm = config.sandwich_norm and canonical.endswith("norm")
        weights[canonical.rpartition(".")[2]] = (1.0 + plain if norm else plain).to(dtype)
    return weights


def write_top(path: Path, source: Checkpoint) -> list[str]:
    """Write embedding, final norm and head, which stay as they are: packed ones (of a GGUF file) become float16.

    One at a time and a few rows of it, since they may be the largest tensors. Returns their names. Raises OSError.
    """
    kept = [name for name in ("embed", "final_norm", "lm_head") if name in source.names]
    # in the order of safetensors' own writer
    first_rows = sorted((*_first_row(source, name), name) for name in kept)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for place, stored, name in first_rows:
        dtype, shape = _DTYPES[place], names.expected(source.config)[name]
        size = math.prod(shape) * dtype.itemsize
        label = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        header[stored] = {"dtype": label, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        for _, _, name in first_rows:
            yield from _pieces(source, name)

    write_whole(path, pieces())
    return sorted(stored for _, stored, _ in first_rows)


def _first_row(source: Checkpoint, name: str) -> tuple[int, str]:
    """The place in `_DTYPES` of the dtype that a tensor is stored in, and its name in the file."""
    ((stored, row),) = _rows(source, name, source.load(name), slice(0, 1)).items()
    return _DTYPES.index(row.dtype), stored


def _pieces(source: Checkpoint, name: str) -> Iterator[bytes]:
    weight = source.load(name)
    step = max(1, _PIECE_WEIGHTS // math.prod(weight.shape[1:]))
    for first in range(0, weight.shape[0], step):
        (rows,) = _rows(source, name, weight, slice(first, first + step)).values()
        yield rows.contiguous().view(torch.uint8).numpy().tobytes()


def _rows(
    source: Checkpoint, name: str, weight: torch.Tensor | QuantTensor, rows: slice
) -> dict[str, torch.Tensor]:
    """Rows of `weight` as they are stored, by its name in the file."""
    plain = weight.rows(rows).dequantize(torch.float16) if isinstance(weight, QuantTensor) else weight[rows]
    return dense_tensor(source.config, name, plain.cpu())


def _stored_linears(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The linears of a layer as files have them: Phi-3's are fused, and so share a grid's columns."""
    return STAGES if config.arch == "phi3" else {leaf: (leaf,) for leaf in LINEARS}


def _base(config: ModelConfig, index: int, leaf: str) -> str:
    return names.to_hf(f"layers.{index}.{leaf}", config.sandwich_norm).removesuffix(".weight")


# --- what describes them --------------------------------------------------------------------------------


def write_end(source: Checkpoint, folder: Path, recipe: Recipe, shards: Mapping[Path, Sequence[str]]) -> None:
    """Tokenizer, index and, last of all, config.json. `shards`: the tensors in each file. Raises OSError."""
    if source.path.is_dir():
        for name in _TOKENIZER_FILES:
            if (source.path / name).is_file():
                write_whole(folder / name, (source.path / name).read_bytes())
    elif source.tokenizer is not None:
        for name, values in _tokenizer_files(source.tokenizer).items():
            write_whole(folder / name, _json(values))
    total = sum(shard.stat().st_size for shard in shards)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: shard.name for shard, tensors in shards.items() for name in tensors},
    }
    write_whole(folder / "model.safetensors.index.json", _json(index))
    write_whole(
        folder / "config.json",
        _json(_model_json(source) | {"quantization_config": quantization_json(recipe)}),
    )


def quantization_json(recipe: Recipe) -> dict[str, Any]:
    """`quantization_config`, in the words of AutoAWQ, or of AutoGPTQ (which RTN is written as, too)."""
    if recipe.method == "awq":
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": recipe.bits,
            "group_size": recipe.group,
            "w_bit": recipe.bits,
            "q_group_size": recipe.group,
            "zero_point": True,
            "modules_to_not_convert": None,
        }
    return {
        "quant_method": "gptq",
        "bits": recipe.bits,
        "group_size": recipe.group,
        "desc_act": recipe.desc_act,
        "sym": recipe.symmetric,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "meta": {"quantizer": f"ragate:{recipe.method}"},
    }


def _model_json(source: Checkpoint) -> dict[str, Any]:
    """config.json without the quantization: the source's own, or one made from what a GGUF file says."""
    config = source.config
    if source.path.is_dir():
        values = read_json(source.path / "config.json")
        if isinstance(
            values.get("text_config"), dict
        ):  # of a Gemma 3 that also sees: its language half is kept
            kind, name = _MODELS["gemma3"]
            ends = {key: values[key] for key in ("eos_token_id", "bos_token_id") if key in values}
            values = ends | values["text_config"] | {"model_type": kind, "architectures": [name]}
    else:
        values = _made_json(config, source.tokenizer)
    values.pop("dtype", None)
    # what the kernels of others multiply in; Gemma's activations outgrow float16
    return values | {"torch_dtype": "bfloat16" if config.sandwich_norm else "float16"}


def _made_json(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    arch = "mistral" if config.arch == "llama" and config.window else config.arch
    kind, name = _MODELS[arch]
    values: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_json(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else "silu",
    }
    if config.rope.partial != 1:
        values["partial_rotary_factor"] = config.rope.partial
    if config.window is not None:
        values["sliding_window"] = config.window
    elif arch in ("mistral", "phi3"):
        values["sliding_window"] = None
    if config.window_layers:
        values["layer_types"] = [
            "sliding_attention" if slides else "full_attention" for slides in config.window_layers
        ]
    if config.local_rope is not None:
        values["rope_local_base_freq"] = config.local_rope.theta
    if config.sandwich_norm:
        scale = config.attn_scale or config.head_dim**-0.5
        values |= {
            "hidden_activation": values["hidden_act"],
            "query_pre_attn_scalar": round(scale**-2),
            "attn_logit_softcapping": config.attn_soft_cap,
            "final_logit_softcapping": config.logit_soft_cap,
        }
    if tokenizer is not None:
        values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.eos_ids)}
    return values


def _rope_json(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    values: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        values |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_len,
        }
    return values


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """tokenizer.json and its companions, from a GGUF file's vocabulary: the same ids for the same text."""
    hf = HfTokenizer.from_str(tokenizer.hf.to_str())
    bos, eos = (
        None if token is None else tokenizer.token_bytes(token).decode()
        for token in (tokenizer.bos_id, tokenizer.eos_id)
    )
    if tokenizer.add_bos and bos is not None:
        hf.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
        "bos_token": bos,
        "eos_token": eos,
    }
    if tokenizer.template is not None:
        settings["chat_template"] = tokenizer.template.source
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.eos_ids)}
    return {
        "tokenizer.json": json.loads(hf.to_str()),
        "tokenizer_config.json": settings,
        "generation_config.json": ends,
    }


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def free_bytes(folder: Path) -> int:
    """Room on the disk of `folder`."""
    return shutil.disk_usage(folder).free
