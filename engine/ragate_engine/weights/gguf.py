"""GGUF files: a strict reader of the header, the model configuration in its metadata, and tensors on demand.

The header is parsed here rather than by `gguf.GGUFReader`: that one trusts every count in the file (a corrupt
array length makes it loop for hours) and takes seconds over a large vocabulary; the package's import alone would
be felt at each start.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ragate_engine.config import ModelConfig, RopeConfig
from ragate_engine.errors import ConfigError, ModelFileError
from ragate_engine.quant import formats
from ragate_engine.quant.formats import Kind
from ragate_engine.rope import divisors
from ragate_engine.weights import names
from ragate_engine.weights.fields import Fields
from ragate_engine.weights.stream import Source, Stored, Weight

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata types by their number, as `struct` spells them: uint8 to float64."""
_STRING, _ARRAY = 8, 9
Order = np.ndarray[Any, np.dtype[np.int64]]
"""Rows of a tensor in the order in which they are wanted."""

_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_COUNT = 1 << 22
"""No header has more entries, array items or tensors than this."""
_MAX_TEXT = 1 << 24
"""Bytes of the longest text in a header: a chat template, at most."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file: `shape` in torch's order, `offset` from the start of the file."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """The parsed header of one file."""

    source: Source
    metadata: Mapping[str, Any]
    """Numbers, booleans and strings as such; arrays as lists."""
    tensors: Mapping[str, TensorInfo]

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self.source.path


class _Header:
    """A cursor over the header that never reads past the end nor believes a count the file cannot hold."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def number(self, code: str) -> Any:
        item = struct.Struct("<" + code)
        (value,) = item.unpack_from(self.data, self.at)
        self.at += item.size
        return value

    def count(self, what: str, item_bytes: int, limit: int = _MAX_COUNT) -> int:
        """A uint64 count of things that take at least `item_bytes` each."""
        value = int(self.number("Q"))
        if value > limit or value * item_bytes > len(self.data) - self.at:
            raise ValueError(f"its header claims {value} {what}, more than the file can hold")
        return value

    def string(self) -> str:
        size = self.count("bytes of text", 1, _MAX_TEXT)
        raw = self.data[self.at : self.at + size]
        self.at += size
        return raw.decode("utf-8")

    def strings(self, count: int) -> list[str]:
        """As many strings in a row: of a vocabulary there are hundreds of thousands, so without a call for each."""
        data, at, end = self.data, self.at, len(self.data)
        length = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            (size,) = length(data, at)
            at += 8
            if size > end - at:
                raise ValueError(f"its header claims {size} bytes of text, more than the file can hold")
            found.append(data[at : at + size].decode("utf-8"))
            at += size
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_scalar(kind))
        item = self.number("I")
        if item == _ARRAY:
            raise ValueError("its metadata has an array of arrays, which no known model uses")
        if item == _STRING:
            return self.strings(self.count("strings", 8))
        packed = struct.Struct("<" + _scalar(item))
        size = self.count("array items", packed.size) * packed.size
        found = [value for (value,) in packed.iter_unpack(self.data[self.at : self.at + size])]
        self.at += size
        return found


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"its metadata has a value of the unknown type {kind}")
    return _SCALARS[kind]


def read_header(path: Path) -> GGUFFile:
    """Metadata and tensor table of a GGUF file, version 2 or 3, every extent checked against the file's size.

    Raises ModelFileError, one sentence that names the file, for anything else.
    """
    try:
        source = Source.of(path)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(source, _Header(data))
    except struct.error:
        raise ModelFileError(f"{path} is cut short inside its header: fetch it again") from None
    except UnicodeDecodeError:
        raise ModelFileError(f"{path} has text in its header that is not UTF-8: fetch it again") from None
    except (ValueError, KeyError, OverflowError) as error:
        raise ModelFileError(f"{path} is not a usable GGUF file: {error}: fetch it again") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from None


def _parse(source: Source, header: _Header) -> GGUFFile:
    if header.data[:4] != MAGIC:
        raise ValueError("it does not begin with the bytes GGUF")
    header.at = 4
    version = header.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not 2 or 3 (little-endian)")
    tensor_count = header.count("tensors", 24)
    metadata: dict[str, Any] = {}
    for _ in range(header.count("metadata entries", 13)):
        key = header.string()
        if key in metadata:
            raise ValueError(f"metadata key {key!r} appears twice")
        metadata[key] = header.value(header.number("I"))
    infos = [_tensor_info(header) for _ in range(tensor_count)]

    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1 or align & (align - 1):
        raise ValueError(f"alignment {align!r} is not a power of two")
    start = -(-header.at // align) * align
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in tensors:
            raise ValueError(f"tensor {info.name!r} appears twice")
        if info.offset % align:
            raise ValueError(f"tensor {info.name!r} begins at {info.offset}, off the alignment of {align}")
        offset = start + info.offset
        if offset + info.nbytes > len(header.data):
            size = len(header.data)
            raise ValueError(f"tensor {info.name!r} ends at byte {offset + info.nbytes}, the file at {size}")
        tensors[info.name] = TensorInfo(info.name, info.kind, info.shape, offset, info.nbytes)
    return GGUFFile(source, metadata, tensors)


def _tensor_info(header: _Header) -> TensorInfo:
    """The next row of the tensor table; its offset still counts from the start of the data."""
    name = header.string()
    dims = header.number("I")
    if dims > _MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {dims} dimensions")
    shape = tuple(header.number("Q") for _ in range(dims))[::-1]
    code = header.number("I")
    offset = header.number("Q")
    try:
        kind = Kind(code)
    except ValueError:
        raise ValueError(f"tensor {name!r} has the unknown type {code}") from None
    block, block_bytes = formats.SIZES[kind]
    if not shape or min(shape) < 1 or shape[-1] % block:
        raise ValueError(f"tensor {name!r} of type {kind.name} has the impossible shape {list(shape)}")
    return TensorInfo(name, kind, shape, offset, math.prod(shape) // block * block_bytes)


def stored(file: GGUFFile, info: TensorInfo, part: slice | None = None, order: Order | None = None) -> Stored:
    """Where a tensor lies and how it is read: dense as stored, quantized as `QuantTensor`.

    `part` takes a range of its rows (they follow each other in the file), `order` puts them into another order.
    """
    first, stop, _ = (part or slice(None)).indices(info.shape[0])
    row_bytes = info.nbytes // info.shape[0]
    return Stored(
        source=file.source,
        offset=info.offset + first * row_bytes,
        nbytes=(stop - first) * row_bytes,
        decode=partial(_decoded, info.kind, len(info.shape) == 1, row_bytes, order),
        form=formats.form_of(info.kind),
    )


def _decoded(kind: Kind, vector: bool, row_bytes: int, order: Order | None, data: torch.Tensor) -> Weight:
    rows = data.view(-1, row_bytes)
    if order is not None:
        rows = rows[torch.from_numpy(order).to(data.device)]
    weight = formats.decode(kind, rows)
    return weight.reshape(-1) if vector and isinstance(weight, torch.Tensor) else weight


# --- the model configuration ----------------------------------------------------------------------------

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
"""Values of `general.architecture` that the decoder serves (Mistral and SmolLM files say llama)."""


def model_config(file: GGUFFile) -> ModelConfig:
    """The decoder that the metadata describes. Raises ModelFileError for an architecture we do not serve."""
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelFileError(
            f"{file.path} holds a {str(arch)[:40]!r} model, an architecture that this engine does not serve: "
            f"it serves {', '.join(ARCHITECTURES)}"
        )
    meta = Fields(file.path, file.metadata, f"{arch}.")
    if meta.get("expert_count", int):
        meta.refuse("it is a mixture of experts, which this engine does not serve: take a dense model")
    if file.metadata.get("split.count", 1) not in (0, 1):
        meta.refuse("it is one part of a split model: join the parts with `llama-gguf-split --merge`")
    embed = file.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        meta.refuse("it has no matrix token_embd.weight: it is not a whole language model")

    gemma = arch in ("gemma2", "gemma3")
    hidden = meta.need("embedding_length", int)
    layers = meta.need("block_count", int)
    heads = meta.need("attention.head_count", int)
    if min(hidden, layers, heads) < 1 or layers > len(file.tensors):
        meta.refuse(f"{layers} layers of width {hidden} with {heads} heads cannot be: fetch it again")
    head_dim = meta.get("attention.key_length", int) or hidden // heads
    if meta.get("attention.value_length", int) not in (None, head_dim):
        meta.refuse("its keys and values differ in width, which this engine does not serve")
    if head_dim < 2 or head_dim % 2:
        meta.refuse(f"heads of {head_dim} values cannot be turned by a rope: fetch it again")
    window = meta.get("attention.sliding_window", int) or None
    window = None if window == -1 else window  # how some tools write that there is none
    # 27B models scale by the mean head width, not their own; llama.cpp tells them by depth, so do we.
    wide = (arch, layers) in (("gemma2", 46), ("gemma3", 62))
    local_theta = meta.get("rope.freq_base_swa", float) or 10_000.0
    try:
        return ModelConfig(
            arch=arch,
            vocab_size=embed.shape[0],
            hidden_size=hidden,
            intermediate_size=meta.need("feed_forward_length", int),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=meta.get("attention.head_count_kv", int) or heads,
            head_dim=head_dim,
            max_len=meta.need("context_length", int),
            norm_eps=meta.need("attention.layer_norm_rms_epsilon", float),
            rope=_rope(file, meta, head_dim),
            local_rope=RopeConfig(theta=local_theta) if arch == "gemma3" else None,
            tie_embeddings="output.weight" not in file.tensors,
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
            sandwich_norm=gemma,
            activation="gelu_tanh" if gemma else "silu",
            embed_scale=math.sqrt(hidden) if gemma else 1.0,
            attn_scale=((hidden // heads if wide else head_dim) ** -0.5) if gemma else None,
            window=window,
            window_layers=window_layers(arch, layers) if window and gemma else (),
            attn_soft_cap=meta.get("attn_logit_softcapping", float) or (50.0 if arch == "gemma2" else None),
            logit_soft_cap=meta.get("final_logit_softcapping", float) or (30.0 if arch == "gemma2" else None),
        )
    except ConfigError as error:
        meta.refuse(str(error))


def window_layers(arch: str, layers: int) -> tuple[bool, ...]:
    """Which layers slide: in Gemma 2 every other one from the first, in Gemma 3 all but each sixth."""
    period = 2 if arch == "gemma2" else 6
    return tuple((i + 1) % period != 0 for i in range(layers))


def _rope(file: GGUFFile, meta: Fields, head_dim: int) -> RopeConfig:
    theta = meta.get("rope.freq_base", float)
    theta = 10_000.0 if theta is None else theta
    turned = meta.get("rope.dimension_count", int) or head_dim
    share = turned / head_dim
    if theta <= 0 or not 0 < share <= 1 or turned % 2 or (share < 1 and meta.prefix == "llama."):
        meta.refuse(f"a rope of base {theta} over {turned} of {head_dim} values cannot be: fetch it again")
    kind = meta.get("rope.scaling.type", str) or "none"
    if any(name.startswith("rope_factors_") for name in file.tensors):
        kind = "longrope"
    if kind not in ("none", "linear"):
        meta.refuse(
            f"its rope is scaled by {kind[:40]!r}, which this engine does not know: take a version without it"
        )
    if kind == "linear":
        factor = meta.need("rope.scaling.factor", float)
        if factor <= 0:
            meta.refuse(f"rope.scaling.factor is {factor}: fetch it again")
        return RopeConfig(theta, "linear", factor=factor, partial=share)
    if "rope_freqs.weight" in file.tensors:
        return _llama3_rope(file, meta, theta, head_dim)
    return RopeConfig(theta, partial=share)


def _llama3_rope(file: GGUFFile, meta: Fields, theta: float, head_dim: int) -> RopeConfig:
    """Llama 3.1 files store what each frequency is divided by: find the parameters that give that."""
    info = file.tensors["rope_freqs.weight"]
    _require_readable(file, info)
    found = stored(file, info)()
    original = meta.get("rope.scaling.original_context_length", int) or 8192
    plain = found.float() if isinstance(found, torch.Tensor) else torch.empty(0, dtype=torch.float32)
    if plain.shape == (head_dim // 2,) and bool((plain >= 1).all()):
        rope = RopeConfig(theta, "llama3", float(plain.max()), 1.0, 4.0, original)
        if np.allclose(plain.numpy(), divisors(rope, head_dim), rtol=1e-3):
            return rope
    meta.refuse("rope_freqs.weight is not the scaling of Llama 3.1, the only one this engine knows")


# --- tensors --------------------------------------------------------------------------------------------


def row_order(heads: int, head_dim: int) -> Order:
    """Rows of a llama q or k matrix in Hugging Face's order.

    llama.cpp's converter interleaves the two halves of each head, for its pairwise rope; this undoes it, so
    that one rotate-half rope serves every architecture.
    """
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _require_readable(file: GGUFFile, info: TensorInfo) -> None:
    """Raise ModelFileError for a tensor of a type that `formats` has no row for."""
    if info.kind not in formats.SUPPORTED:
        readable = ", ".join(kind.name for kind in formats.SUPPORTED)
        raise ModelFileError(
            f"{file.path}: tensor {info.name} has type {info.kind.name}, which this engine cannot read: "
            f"take a file quantized as Q4_K_M or Q8_0, or made of {readable}"
        )
    if len(info.shape) == 1 and info.kind not in formats.DENSE:
        raise ModelFileError(
            f"{file.path}: vector {info.name} is quantized ({info.kind.name}): convert it again"
        )


def tensors(file: GGUFFile, config: ModelConfig) -> dict[str, Stored]:
    """Where each tensor lies, by canonical name. Raises ModelFileError where they do not fit `config`."""
    wanted = names.expected(config)
    found: dict[str, Stored] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for info in file.tensors.values():
        _require_readable(file, info)
        if info.name == "rope_freqs.weight":
            continue  # read into the configuration
        name = names.from_gguf(info.name)
        if name is None:
            raise ModelFileError(f"{file.path}: tensor {info.name} is none of a {config.arch} decoder's")
        prefix, _, leaf = name.rpartition(".")
        if leaf == "up" and info.name.replace("ffn_up", "ffn_gate") not in file.tensors:
            leaf = "gate_up"  # Phi-3 stacks the gate on top of the up matrix
        if leaf in ("qkv", "gate_up"):
            for part, rows in names.fused_parts(leaf, config).items():
                found[f"{prefix}.{part}"] = stored(file, info, rows)
                shapes[f"{prefix}.{part}"] = (len(range(info.shape[0])[rows]), *info.shape[1:])
            continue
        order: Order | None = None
        if (
            config.arch == "llama"
            and leaf in ("q", "q_bias", "k", "k_bias")
            and info.shape == wanted.get(name)
        ):
            order = row_order(config.num_heads if leaf[0] == "q" else config.num_kv_heads, config.head_dim)
        found[name] = stored(file, info, order=order)
        shapes[name] = info.shape
    names.check(file.path, shapes, wanted)
    return found


_RECIPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0",
    37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0", 1024: "GUESSED",
}  # fmt: skip
"""Names of `general.file_type`, by number (`llama_ftype` in llama.h)."""


def quantization(file: GGUFFile) -> str:
    """The name of the file's recipe, such as Q4_K_M; if it states none, the type of most of its matrices."""
    number = file.metadata.get("general.file_type")
    if isinstance(number, int) and number in _RECIPES:
        return _RECIPES[number]
    kinds = [info.kind.name for info in file.tensors.values() if len(info.shape) > 1]
    return max(sorted(set(kinds)), key=kinds.count)
