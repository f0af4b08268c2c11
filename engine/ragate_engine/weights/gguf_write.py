"""Writes a model as one GGUF file, quantized as llama.cpp's own mixes are, a few rows at a time.

A Hugging Face folder becomes what llama.cpp's convert_hf_to_gguf.py and llama-quantize make of it; another GGUF file
keeps its metadata, and the bytes of every tensor that is of the wanted type already. The `gguf` package writes the
header; the tensors follow it straight from the source, so that no more than one of them is in memory.
"""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import gguf as container
import numpy as np
import torch

from ragate_engine.devices import pick_device
from ragate_engine.errors import ConfigError, ModelFileError
from ragate_engine.quant.encode import encode
from ragate_engine.quant.formats import SIZES, Kind
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.rope import divisors
from ragate_engine.weights import Checkpoint, gguf, gguf_vocab, names
from ragate_engine.weights.gguf import GGUFFile, Order, TensorInfo
from ragate_engine.weights.stream import Source, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path
    from typing import BinaryIO

    from ragate_engine.config import ModelConfig
    from ragate_engine.weights.stream import Weight

MIXES = {
    "Q2_K": (10, Kind.Q2_K),
    "Q4_0": (2, Kind.Q4_0),
    "Q4_K_M": (15, Kind.Q4_K),
    "Q5_K_M": (17, Kind.Q5_K),
    "Q6_K": (18, Kind.Q6_K),
    "Q8_0": (7, Kind.Q8_0),
}
"""What can be written: its number (`llama_ftype` in llama.h), and the type of most of its matrices."""

_NARROWER = {
    Kind.Q2_K: Kind.Q4_0,
    Kind.Q3_K: Kind.Q4_0,
    Kind.Q4_K: Kind.Q5_0,
    Kind.Q5_K: Kind.Q5_1,
    Kind.Q6_K: Kind.Q8_0,
}
"""What stands in for a type of blocks of 256 where rows are no multiple of that (`tensor_type_fallback`)."""

_OWN = (
    *("GGUF.", "split.", "general.architecture", "general.alignment"),
    *("general.file_type", "general.quantization_version"),
)
"""Metadata that is not copied from another GGUF file: it is the header's, the mix's or the writer's."""

_ALIGN = 32
_ROWS_BYTES = 64 << 20
"""Float32 bytes of the rows that are encoded and written at a time."""
_COPY_BYTES = 16 << 20


def write_gguf(
    source: Checkpoint,
    path: Path,
    mix: str,
    progress: Callable[[int, int], None],
    device: str = "auto",
) -> None:
    """Write `source` to `path`, whole or not at all, as one of `MIXES`; the bytes do not depend on the `device`.

    `progress` is told the bytes of weights written so far, and how many there will be. Raises ConfigError for an
    unknown mix and for a model that a GGUF file cannot describe, ModelFileError for a source that cannot be read or
    lacks its tokenizer, and where `path` cannot be written.
    """
    if mix not in MIXES:
        raise ConfigError(f"there is no GGUF mix {mix!r}: take one of {', '.join(MIXES)}")
    if path.exists() and any(path.samefile(file) for file in source.files):
        raise ConfigError(f"{path} is the model that is to be read: write to another file")
    if path.is_dir() or not path.name:
        raise ConfigError(f"{path} is a folder: name the file to write")
    target = pick_device(device)
    plan = _from_folder(source, mix) if source.path.is_dir() else _from_gguf(source, mix)
    temporary = path.with_name(f".{path.name}.partial")  # of a run that was killed the next one takes it over
    try:
        _write_header(plan, temporary)
        with open(temporary, "ab") as file:
            _write_tensors(plan, file, target, progress)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


# --- which type a tensor gets ---------------------------------------------------------------------------


def tensor_kind(name: str, shape: tuple[int, ...], mix: str, config: ModelConfig) -> Kind:
    """The type of a tensor, by its GGUF name, in a mix: norms and biases as float32, matrices as llama.cpp chooses.

    After `llama_tensor_get_type_impl` and `tensor_type_fallback` of src/llama-quant.cpp in
    https://github.com/ggml-org/llama.cpp, without an importance matrix. Rows that no block divides, which llama.cpp
    leaves alone or refuses, are float16.
    """
    if len(shape) == 1:
        return Kind.F32
    kind = _wanted(name, shape[-1], mix, config)
    if shape[-1] % SIZES[kind][0]:
        kind = _NARROWER.get(kind, kind)
    return Kind.F16 if shape[-1] % SIZES[kind][0] else kind


def _wanted(name: str, width: int, mix: str, config: ModelConfig) -> Kind:
    default = MIXES[mix][1]
    if name == "output.weight" or (name == "token_embd.weight" and config.tie_embeddings):
        return Kind.Q8_0 if width % SIZES[default][0] or default == Kind.Q8_0 else Kind.Q6_K
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None:
        return default
    leaf, layers = match[2], config.num_layers
    many = _more_bits(int(match[1]), layers)
    if leaf in ("attn_v", "attn_qkv"):
        shared = config.num_heads // config.num_kv_heads
        kind = default
        if mix == "Q2_K":
            kind = Kind.Q4_K if shared >= 4 else Kind.Q3_K
        elif mix in ("Q4_K_M", "Q5_K_M") and many:
            kind = Kind.Q6_K
        # Models that llama.cpp calls 70B: many heads share a small matrix, so its bits are cheap.
        is_70b = layers == 80 and (config.arch == "qwen2" or (config.arch == "llama" and shared > 1))
        return Kind.Q5_K if is_70b and kind in (Kind.Q3_K, Kind.Q4_K) else kind
    if mix == "Q2_K" and leaf in ("ffn_down", "attn_output"):
        return Kind.Q3_K
    if mix in ("Q4_K_M", "Q5_K_M") and leaf == "ffn_down" and many:
        return Kind.Q6_K
    return default


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and each third between (`use_more_bits`)."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


# --- what is written ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written. Its rows are those of `parts`, one after the other, each in the `order` of rows."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    parts: tuple[Callable[[], Weight], ...]
    order: Order | None = None
    verbatim: Stored | None = None
    """Where the very bytes lie, if they do."""

    @property
    def nbytes(self) -> int:
        block, block_bytes = SIZES[self.kind]
        return math.prod(self.shape) // block * block_bytes


Entry = tuple[str, Any, Any, Any]
"""Metadata: key, value, its type and that of its items (`gguf.GGUFValueType`; `None` where it is no array)."""


@dataclass(frozen=True)
class _Plan:
    """All that will be in the file; the weights are still where they are."""

    arch: str
    metadata: list[Entry]
    tensors: list[_Tensor]
    origin: Path
    """What errors name."""


def _from_gguf(source: Checkpoint, mix: str) -> _Plan:
    """The same metadata and names, q and k in the order in which they lie there."""
    file = gguf.read_header(source.path)
    # what an adapter has changed is no more what lies there
    made = {tensor.name: tensor for tensor in _tensors(source, source.config, source.changed)}
    tensors = []
    for info in file.tensors.values():
        wanted = tensor_kind(info.name, info.shape, mix, source.config)
        if info.name in made:
            tensors.append(replace(made[info.name], kind=wanted))
            continue
        kind = info.kind if len(info.shape) == 1 else wanted
        stored = gguf.stored(file, info)
        verbatim = stored if info.kind == kind else None
        tensors.append(_Tensor(info.name, info.shape, kind, (stored,), verbatim=verbatim))
    metadata = []
    for key, entry in container.GGUFReader(source.path).fields.items():  # which tells the types of numbers
        if key.startswith(_OWN) or file.metadata[key] == []:  # the package writes no empty array
            continue
        inner = entry.types[-1] if entry.types[0] == container.GGUFValueType.ARRAY else None
        metadata.append((key, entry.contents(), entry.types[0], inner))
    return _Plan(file.metadata["general.architecture"], [*metadata, *_numbers(mix)], tensors, source.path)


def _numbers(mix: str) -> list[Entry]:
    """What names the mix."""
    values = {
        "general.file_type": MIXES[mix][0],
        "general.quantization_version": container.GGML_QUANT_VERSION,
    }
    return list(map(_typed, values.items()))


def _from_folder(source: Checkpoint, mix: str) -> _Plan:
    """Metadata of our own, q and k of a llama in llama.cpp's order, Phi-3's fused matrices put together again."""
    if source.tokenizer is None:
        raise ModelFileError(
            f"{source.path} has no tokenizer.json, which a GGUF file must carry: fetch it too"
        )
    config = _described(source.config)
    stated = _metadata(config, source.path.resolve().name)
    tensors = [
        replace(tensor, kind=tensor_kind(tensor.name, tensor.shape, mix, config))
        for tensor in _tensors(source, config)
    ]
    _check_described(source, config, stated, tensors)
    stated |= gguf_vocab.vocabulary(source.path, source.tokenizer, config.vocab_size)
    if config.rope.scaling == "llama3":
        tensors.append(_rope_divisors(source.path, config))
    return _Plan(config.arch, [*map(_typed, stated.items()), *_numbers(mix)], tensors, source.path)


def _described(config: ModelConfig) -> ModelConfig:
    """The configuration as GGUF can state it, which computes the same.

    Mistral is a llama there. Only Gemma and Phi-3 files state a window: other models are given a context no longer
    than theirs, within which it hides nothing.
    """
    arch = "llama" if config.arch == "mistral" else config.arch
    if config.window is None or arch in ("gemma2", "gemma3", "phi3"):
        return replace(config, arch=arch)
    return replace(
        config, arch=arch, max_len=min(config.max_len, config.window), window=None, window_layers=()
    )


def _metadata(config: ModelConfig, name: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_len,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": round(config.head_dim * config.rope.partial),
        "rope.freq_base": float(config.rope.theta),
    }
    if config.rope.scaling == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope.factor)}
    if config.rope.scaling == "llama3" and config.rope.original_max_len != 8192:  # what readers take it for
        values["rope.scaling.original_context_length"] = config.rope.original_max_len
    if config.window is not None or config.arch == "phi3":
        values["attention.sliding_window"] = config.window or 0
    if config.local_rope is not None:
        values["rope.freq_base_swa"] = float(config.local_rope.theta)
    if config.attn_soft_cap is not None:
        values["attn_logit_softcapping"] = config.attn_soft_cap
    if config.logit_soft_cap is not None:
        values["final_logit_softcapping"] = config.logit_soft_cap
    general = {"general.architecture": config.arch, "general.type": "model", "general.name": name}
    return general | {f"{config.arch}.{key}": value for key, value in values.items()}


def _typed(entry: tuple[str, Any]) -> Entry:
    """Metadata with the type that GGUF gives such a value."""
    kinds = container.GGUFValueType
    key, value = entry
    inner = kinds.get_type(value[0]) if isinstance(value, list) else None
    return key, value, kinds.UINT32 if type(value) is int else kinds.get_type(value), inner


def _tensors(
    source: Checkpoint, config: ModelConfig, wanted: Collection[str] | None = None
) -> Iterator[_Tensor]:
    """By GGUF names, those that hold any of `wanted`; every type is still float32."""
    shapes = names.expected(config)
    fused = {"q": "qkv k v", "gate": "up up"} if config.arch == "phi3" else {}
    skipped = {"k", "v", "up"} if config.arch == "phi3" else set()
    for name, shape in shapes.items():
        prefix, dot, leaf = name.rpartition(".")
        if leaf in skipped:
            continue
        stored, *others = fused.get(leaf, leaf).split()
        parts = [name, *(f"{prefix}.{other}" for other in others)]
        if wanted is not None and not any(part in wanted for part in parts):
            continue
        order = None
        if config.arch == "llama" and leaf in ("q", "q_bias", "k", "k_bias"):
            heads = config.num_heads if leaf[0] == "q" else config.num_kv_heads
            order = np.argsort(gguf.row_order(heads, config.head_dim))
        rows = sum(shapes[part][0] for part in parts)
        loaders = tuple(source.tensors[part] for part in parts)
        yield _Tensor(names.to_gguf(f"{prefix}{dot}{stored}"), (rows, *shape[1:]), Kind.F32, loaders, order)


def _rope_divisors(path: Path, config: ModelConfig) -> _Tensor:
    """Llama 3.1's scaling as llama.cpp stores it: what each frequency is divided by."""
    rope = config.rope
    stored = torch.from_numpy(divisors(rope, config.head_dim))
    if (rope.low_freq_factor, rope.high_freq_factor) != (1.0, 4.0) or float(stored.max()) != rope.factor:
        raise ConfigError(
            f"{path}: its rope is scaled by other factors than Llama 3.1's, which GGUF cannot state"
        )
    return _Tensor("rope_freqs.weight", tuple(stored.shape), Kind.F32, (lambda: stored,))


def _check_described(
    source: Checkpoint, config: ModelConfig, stated: dict[str, Any], tensors: list[_Tensor]
) -> None:
    """Raise ConfigError unless a reader will take the file for the model that it is."""
    infos = {
        tensor.name: TensorInfo(tensor.name, tensor.kind, tensor.shape, 0, tensor.nbytes)
        for tensor in tensors
    }
    found = gguf.model_config(GGUFFile(Source.of(source.path), stated, infos))
    if config.rope.scaling == "llama3":  # told by a tensor
        found = replace(found, rope=config.rope)
    for field in fields(config):
        ours, theirs = getattr(config, field.name), getattr(found, field.name)
        if ours != theirs:
            raise ConfigError(
                f"{source.path}: a {config.arch} GGUF file cannot state that {field.name} is {ours}; "
                f"it would be taken for {theirs}"
            )


# --- bytes ----------------------------------------------------------------------------------------------


def _write_header(plan: _Plan, path: Path) -> None:
    writer = container.GGUFWriter(path, plan.arch)
    try:
        for key, value, kind, inner in plan.metadata:
            if key != "general.architecture":
                writer.add_key_value(key, value, kind, sub_type=inner)
        for tensor in plan.tensors:
            writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),  # not looked at where a type is given, unless it is uint8
                tensor.nbytes,
                raw_dtype=container.GGMLQuantizationType(int(tensor.kind)),
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _write_tensors(
    plan: _Plan, file: BinaryIO, device: torch.device, progress: Callable[[int, int], None]
) -> None:
    total = sum(tensor.nbytes for tensor in plan.tensors)
    done = 0
    file.write(b"\0" * (-file.tell() % _ALIGN))
    for tensor in plan.tensors:
        start = file.tell()
        for data in _pieces(plan.origin, tensor, device):
            file.write(data.numpy().data)
            done += len(data)
            progress(done, total)
        assert file.tell() - start == tensor.nbytes, f"{tensor.name} has another size than the header says"
        file.write(b"\0" * (-file.tell() % _ALIGN))


def _pieces(origin: Path, tensor: _Tensor, device: torch.device) -> Iterator[torch.Tensor]:
    """The bytes of a tensor in turn, each uint8 [n] on the host."""
    if tensor.verbatim is not None:
        with tensor.verbatim.source.open() as file:
            for start in range(0, tensor.nbytes, _COPY_BYTES):
                data = torch.empty(min(_COPY_BYTES, tensor.nbytes - start), dtype=torch.uint8)
                tensor.verbatim.read_into(file, start, data)
                yield data
        return
    width = tensor.shape[-1]
    step = max(1, _ROWS_BYTES // 4 // width)
    for part in tensor.parts:
        weight = part()
        if isinstance(weight, torch.Tensor) and weight.dim() == 1:
            weight = weight.unsqueeze(1)  # a row each: vectors, too, have an order
        order = torch.arange(weight.shape[0]) if tensor.order is None else torch.from_numpy(tensor.order)
        for index in order.split(step):
            rows = (
                weight.rows(index).to(device) if isinstance(weight, QuantTensor) else weight[index].to(device)
            )
            dense = rows.dequantize() if isinstance(rows, QuantTensor) else rows
            try:
                yield encode(tensor.kind, dense).cpu().view(-1)
            except ValueError as error:
                raise ModelFileError(f"{origin}: tensor {tensor.name} cannot be written: {error}") from None
