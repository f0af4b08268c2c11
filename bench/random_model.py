"""Models with random weights, of shapes that are known: speed and bits need no real weights, nor a network.

`random_checkpoint` makes the weights where they are wanted, one tensor at a time; `write_safetensors` puts a model of
the same shape on a disk, for what is measured from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch

from ragate_engine.config import ModelConfig, RopeConfig
from ragate_engine.errors import ModelFileError
from ragate_engine.lora import LEAVES, Adapter, Pair
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.weights import Checkpoint, names, open_checkpoint

LLAMA_8B = ModelConfig(
    arch="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_len=8192,
    rope=RopeConfig(500_000.0),
)
SMOL_135M = ModelConfig(
    arch="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_len=8192,
    rope=RopeConfig(100_000.0),
    tie_embeddings=True,
)
QWEN_0_5B = ModelConfig(
    arch="qwen2",
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    max_len=32768,
    norm_eps=1e-6,
    rope=RopeConfig(1_000_000.0),
    tie_embeddings=True,
    qkv_bias=True,
)
QWEN_1_5B = ModelConfig(
    arch="qwen2",
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    max_len=32768,
    norm_eps=1e-6,
    rope=RopeConfig(1_000_000.0),
    tie_embeddings=True,
    qkv_bias=True,
)
TINY = ModelConfig(
    arch="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_len=2048,
)
SHAPES = {"8b": LLAMA_8B, "1.5b": QWEN_1_5B, "0.5b": QWEN_0_5B, "135m": SMOL_135M, "tiny": TINY}
"""Llama-3-8B, Qwen2.5-1.5B and 0.5B, SmolLM2-135M, and one for tests."""


class Quantized(NamedTuple):
    """A kind of quantized weights: bits, group, what stands beside a scale; the same of the tensors that a mix keeps
    finer; bytes a weight in files of this kind; whether the head is quantized too."""

    bits: int
    group: int
    beside: str
    finer: tuple[int, int, str] | None
    size: float
    head: bool


QUANTIZED = {
    "int4": Quantized(4, 128, "zero", None, 0.5 + 2.5 / 128, head=False),
    "q4_k_m": Quantized(4, 32, "offset", (6, 16, "nothing"), 4.85 / 8, head=True),
    "q6_k": Quantized(6, 16, "nothing", None, 210 / 256, head=True),
    "q8_0": Quantized(8, 32, "nothing", None, 34 / 32, head=True),
}
"""By the end of a name such as `8b-int4`: AWQ or GPTQ at 4 bits, and three mixes of GGUF."""
SHARD_BYTES = 4 << 30


def open_model(model: str, device: str, seed: int = 0) -> Checkpoint:
    """A checkpoint by the name of a shape (random weights on `device`), or by the path of a model on disk."""
    shape, _, kind = model.partition("-")
    if shape in SHAPES and (not kind or kind in QUANTIZED):
        return random_checkpoint(SHAPES[shape], seed, device, kind or None)
    if not Path(model).exists():
        raise SystemExit(f"{model} is neither a model on disk nor one of {', '.join(SHAPES)}")
    try:
        return open_checkpoint(model)
    except ModelFileError as error:
        raise SystemExit(str(error)) from error


def random_checkpoint(
    config: ModelConfig, seed: int = 0, device: str = "cpu", quantized: str | None = None
) -> Checkpoint:
    """Weights drawn on `device` when they are asked for; a tensor depends on its name, kind and `seed` alone.

    Matrices have variance 1 / fan-in, so that activations keep their size from layer to layer: normal in bfloat16, or
    of uniform codes where they are `quantized` (a name in `QUANTIZED`).
    """
    tensors: dict[str, Callable[[], torch.Tensor | QuantTensor]] = {
        name: partial(_draw, name, shape, seed, device) for name, shape in names.expected(config).items()
    }
    if quantized is not None:
        for name, kind in _kinds(config, QUANTIZED[quantized]).items():
            tensors[name] = partial(draw_codes, name, names.expected(config)[name], seed, device, *kind)
    path = Path(f"random-{config.arch}-{seed}")
    return Checkpoint(path, config, None, tensors, quantized or "bfloat16", files=())


def _kinds(config: ModelConfig, quantized: Quantized) -> dict[str, tuple[int, int, str]]:
    """Bits, group and what stands beside a scale, of each tensor that is quantized."""
    plain = (quantized.bits, quantized.group, quantized.beside)
    found = {}
    for name, shape in names.expected(config).items():
        layer, _, leaf = name.removeprefix("layers.").partition(".")
        if len(shape) != 2 or (not leaf and not quantized.head) or shape[-1] % quantized.group:
            continue
        # llama.cpp keeps v and down finer in the first and last eighth of the layers and in each third between
        i, n = int(layer) if leaf else 0, config.num_layers
        fine = not leaf or (
            leaf in ("v", "down") and (i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2)
        )
        found[name] = quantized.finer if quantized.finer is not None and fine else plain
    return found


def draw_codes(
    name: str, shape: tuple[int, ...], seed: int, device: str, bits: int, group: int, beside: str
) -> QuantTensor:
    """Uniform codes in groups, with variance 1 / fan-in; beside each scale nothing, a zero or an offset."""
    number = int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=7).digest())
    generator = torch.Generator(device).manual_seed(number)
    middle = 1 << bits - 1
    codes = torch.randint(0, 2 * middle, shape, generator=generator, dtype=torch.uint8, device=device)
    # uniform codes have a deviation of 2 ** bits / sqrt(12)
    drawn = torch.rand((shape[0], shape[1] // group), generator=generator, dtype=torch.float32, device=device)
    scales = drawn * 0.4 + 0.8
    scales *= shape[1] ** -0.5 * 12**0.5 / (2 * middle)
    if beside == "nothing":
        signed = (codes.to(torch.int16) - middle).to(torch.int8)
        return QuantTensor(bits, group, signed, scales, None, (shape[0], shape[1]))
    offsets = -middle * scales if beside == "zero" else -(middle - 0.5) * scales
    return QuantTensor(bits, group, codes, scales, offsets, (shape[0], shape[1]))


def _draw(name: str, shape: tuple[int, ...], seed: int, device: str) -> torch.Tensor:
    if name.endswith("norm"):
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    number = int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=7).digest())
    generator = torch.Generator(device).manual_seed(number)
    drawn = torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)
    return drawn.mul_(shape[-1] ** -0.5 if len(shape) == 2 else 0.1)


def random_adapter(
    config: ModelConfig, name: str = "random", rank: int = 8, seed: int = 0, leaves: Sequence[str] = LEAVES
) -> Adapter:
    """A LoRA adapter of every layer's `leaves`, whose changes are about a third of the weights' size."""
    generator = torch.Generator().manual_seed(seed)
    scale, shapes = 2.0, names.expected(config)
    pairs = {}
    for weight in (f"layers.{layer}.{leaf}" for layer in range(config.num_layers) for leaf in leaves):
        outer, inner = shapes[weight]
        a = torch.randn(rank, inner, generator=generator, dtype=torch.float32) * inner**-0.5
        b = torch.randn(outer, rank, generator=generator, dtype=torch.float32) * (0.3 / scale / rank**0.5)
        pairs[weight] = Pair(a, b)
    return Adapter(name, rank, scale, pairs)


def write_safetensors(config: ModelConfig, folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write config.json and bfloat16 weights in shards, as a hub does; returns the bytes of the weights.

    The values repeat one drawn buffer: who reads them must move every byte, who writes them need not draw 8 billion.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = total = 0
    for name, shape in names.expected(config).items():
        size = 2 * _count(shape)
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][_hf_name(name)] = shape
        filled += size
        total += size
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(min(1 << 25, total), generator=generator, dtype=torch.float32) * 0.02
    weights = _bytes(values)
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, shard, weights)
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(_hf_config(config), indent=1))
    return total


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], weights: memoryview) -> None:
    """One safetensors file: the length of its header (8 bytes, little-endian), the header in JSON, the data."""
    header: dict[str, object] = {}
    at = 0
    for name, shape in tensors.items():
        size = 2 * _count(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            source = _bytes(torch.ones(shape)) if "norm" in name else weights
            left = 2 * _count(shape)
            while left:
                left -= file.write(source[:left])


def _hf_name(name: str) -> str:
    """The Hugging Face name of a canonical tensor: `names.from_hf` backwards."""
    layer, dot, leaf = name.rpartition(".")
    table = names._HF_LAYER if dot else names._HF_TOP
    stored = next(theirs for theirs, ours in table.items() if ours == leaf)
    return stored if leaf == "lm_head" else f"model.{layer}{dot}{stored}"


def _hf_config(config: ModelConfig) -> dict[str, object]:
    """config.json of a Llama or Qwen2."""
    if config.arch not in ("llama", "qwen2"):
        raise ValueError(f"no config.json is written for {config.arch}")
    return {
        "model_type": config.arch,
        "torch_dtype": "bfloat16",
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
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
    }


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.bfloat16().contiguous().view(-1).view(torch.int16).numpy().data).cast("B")


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
