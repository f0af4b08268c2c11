"""Hugging Face folders: config.json, and weights in *.safetensors, plain or quantized, as canonical tensors."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ragate_engine.config import ModelConfig, RopeConfig
from ragate_engine.errors import ConfigError, ModelFileError
from ragate_engine.quant.tensor import Form
from ragate_engine.weights import names
from ragate_engine.weights.fields import Fields, read_json
from ragate_engine.weights.gguf import window_layers
from ragate_engine.weights.schemes import IGNORED, INT8, PARTS, Scheme, read_scheme
from ragate_engine.weights.stream import Joined, Source, Stored, Weight

if TYPE_CHECKING:
    from pathlib import Path

    from ragate_engine.quant.tensor import QuantTensor

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PART_DTYPES = {**_DTYPES, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
"""Of the parts of quantized weights."""

_ARCH = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
    "phi3": "phi3",
}
"""Values of `model_type` that the decoder serves."""

_HEAD_DIM = {"qwen3": 128, "gemma2": 256, "gemma3": 256}
"""transformers' own defaults, where it is not hidden_size / num_attention_heads."""

_MAX_LAYERS = 1024

_IGNORED = ("rotary_emb.inv_freq", "vision_tower.", "multi_modal_projector.")
"""Tensors of a folder that the text decoder does without."""


def model_config(folder: Path) -> ModelConfig:
    """The decoder that config.json describes. Raises ModelFileError for an architecture we do not serve."""
    path = folder / "config.json"
    if not path.exists():
        raise ModelFileError(f"{folder} has no config.json: give a .gguf file or a Hugging Face model folder")
    values = read_json(path)
    kind = values.get("model_type")
    if kind not in _ARCH:
        raise ModelFileError(
            f"{path} describes a model of type {str(kind)[:40]!r}, which this engine does not serve: "
            f"it serves {', '.join(_ARCH)}"
        )
    if isinstance(values.get("text_config"), dict):  # the language half of a Gemma 3 that also sees
        values = {"tie_word_embeddings": values.get("tie_word_embeddings", True)} | values["text_config"]
    arch = _ARCH[kind]
    meta = Fields(path, values)
    gemma = arch in ("gemma2", "gemma3")
    for switch in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if meta.get(switch, bool):
            meta.refuse(f"{switch} is set, which this engine does not serve")
    activation = meta.get("hidden_activation", str) or meta.get("hidden_act", str)
    if activation not in (("gelu_pytorch_tanh", None) if gemma else ("silu", None)):
        meta.refuse(f"activation {activation!r} is not one of a {arch} model")
    layers = meta.need("num_hidden_layers", int)
    hidden = meta.need("hidden_size", int)
    heads = meta.need("num_attention_heads", int)
    if not 1 <= layers <= _MAX_LAYERS or hidden < 1 or heads < 1:
        meta.refuse(f"{layers} layers of width {hidden} with {heads} heads cannot be")
    head_dim = meta.get("head_dim", int) or _HEAD_DIM.get(arch) or hidden // heads
    if head_dim < 2 or head_dim % 2:
        meta.refuse(f"heads of {head_dim} values cannot be turned by a rope")
    window = meta.get("sliding_window", int) or None
    window = None if window == -1 else window  # how some tools write that there is none
    if arch in ("qwen2", "qwen3") and not meta.get("use_sliding_window", bool):
        window = None
    scalar = meta.get("query_pre_attn_scalar", float) or 256.0
    if scalar <= 0:
        meta.refuse(f"query_pre_attn_scalar is {scalar}, which cannot be")
    rope, local_rope = _ropes(meta, arch)
    tied = meta.get("tie_word_embeddings", bool)
    try:
        return ModelConfig(
            arch=arch,
            vocab_size=meta.need("vocab_size", int),
            hidden_size=hidden,
            intermediate_size=meta.need("intermediate_size", int),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=meta.get("num_key_value_heads", int) or heads,
            head_dim=head_dim,
            max_len=meta.need("max_position_embeddings", int),
            norm_eps=meta.need("rms_norm_eps", float),
            rope=rope,
            local_rope=local_rope,
            tie_embeddings=gemma if tied is None else tied,
            qkv_bias=arch == "qwen2",
            qk_norm=arch in ("qwen3", "gemma3"),
            sandwich_norm=gemma,
            activation="gelu_tanh" if gemma else "silu",
            embed_scale=math.sqrt(hidden) if gemma else 1.0,
            attn_scale=scalar**-0.5 if gemma else None,
            window=window,
            window_layers=_sliding(meta, arch, layers) if window else (),
            attn_soft_cap=meta.get("attn_logit_softcapping", float) if gemma else None,
            logit_soft_cap=meta.get("final_logit_softcapping", float) if gemma else None,
        )
    except ConfigError as error:
        meta.refuse(str(error))


def _sliding(meta: Fields, arch: str, layers: int) -> tuple[bool, ...]:
    """Which layers slide: as `layer_types` says, else by the rule of the architecture."""
    kinds = meta.get("layer_types", list)
    if kinds is not None:
        if set(kinds) <= {"sliding_attention", "full_attention"}:
            return tuple(kind == "sliding_attention" for kind in kinds)
        meta.refuse("layer_types has kinds of attention that this engine does not serve")
    if arch in ("gemma2", "gemma3"):
        return window_layers(arch, layers)
    if arch in ("qwen2", "qwen3"):
        first = meta.get("max_window_layers", int) or 0
        return tuple(i >= first for i in range(layers))
    return ()


def _ropes(meta: Fields, arch: str) -> tuple[RopeConfig, RopeConfig | None]:
    """The rope and the one of sliding layers, from transformers 5's `rope_parameters` or the older fields."""
    stated = meta.get("rope_parameters", dict)
    if stated is None:
        stated = {"rope_theta": meta.get("rope_theta", float)} | (meta.get("rope_scaling", dict) or {})
        if arch == "gemma3":
            local = {"rope_theta": meta.get("rope_local_base_freq", float)}
            stated = {"full_attention": stated, "sliding_attention": local}
    share = meta.get("partial_rotary_factor", float) or 1.0
    if "full_attention" in stated:
        parts = Fields(meta.path, stated)
        full, sliding = parts.need("full_attention", dict), parts.get("sliding_attention", dict)
        sliding_rope = _rope(Fields(meta.path, sliding), share) if sliding else None
        return _rope(Fields(meta.path, full), share), sliding_rope
    return _rope(Fields(meta.path, stated), share), None


def _rope(stated: Fields, share: float) -> RopeConfig:
    kind = stated.get("rope_type", str) or stated.get("type", str) or "default"
    theta = stated.get("rope_theta", float) or 10_000.0
    share = stated.get("partial_rotary_factor", float) or share
    if theta <= 0 or not 0 < share <= 1 or (stated.get("factor", float) or 1.0) <= 0:
        stated.refuse(f"a rope of base {theta} over {share:.0%} of each head cannot be")
    if kind == "default":
        return RopeConfig(theta, partial=share)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor=stated.need("factor", float), partial=share)
    if kind == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            factor=stated.need("factor", float),
            low_freq_factor=stated.need("low_freq_factor", float),
            high_freq_factor=stated.need("high_freq_factor", float),
            original_max_len=stated.need("original_max_position_embeddings", int),
            partial=share,
        )
    stated.refuse(f"its rope is scaled by {kind[:40]!r}, which this engine does not know")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The folder's safetensors: those that the index names, else model.safetensors, else all there are."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = Fields(index, read_json(index)).need("weight_map", dict).values()
        if not all(
            isinstance(shard, str) and re.fullmatch(r"[^/\\]+\.safetensors", shard) for shard in shards
        ):
            raise ModelFileError(f"{index} names files that are not *.safetensors beside it")
        files = tuple(folder / shard for shard in sorted(set(shards)))
    elif (folder / "model.safetensors").exists():
        files = (folder / "model.safetensors",)
    else:
        files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise ModelFileError(f"{folder} has no *.safetensors file: weights of another kind are not read")
    for file in files:
        if not file.exists():
            raise ModelFileError(f"{file} is missing, though {index.name} names it: fetch the model again")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"{file} is not a usable safetensors file: {error}: fetch it again") from None


def scheme(folder: Path) -> Scheme | None:
    """How config.json says that weights are quantized, if it does. Raises ModelFileError for ways not read."""
    path = folder / "config.json"
    return read_scheme(path, read_json(path))


def quantization(files: tuple[Path, ...], stated: Scheme | None) -> str:
    """The name of the scheme, or the dtype of the weights: that of the first tensor with two dimensions."""
    if stated is not None:
        return stated.named
    kinds = []
    for file in files:
        with _open(file) as opened:
            parts = [opened.get_slice(name) for name in sorted(opened.keys())]
            kinds += [part.get_dtype() for part in parts if len(part.get_shape()) == 2]
    if "I8" in kinds:
        return INT8.named
    kind = kinds[0] if kinds else "F32"
    return str(_DTYPES.get(kind, kind)).removeprefix("torch.")


def _starts(source: Source) -> dict[str, int]:
    """Where each tensor begins in a file that `safe_open` has found sound.

    Format: 8 bytes, little-endian, the length of a JSON object {name: {"data_offsets": [start, stop], ...}}; the
    object; the data, from which the offsets count.
    """
    with source.open() as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _decoded(dtype: torch.dtype, shape: tuple[int, ...], add_one: bool, data: torch.Tensor) -> torch.Tensor:
    if data.storage_offset() % dtype.itemsize:  # a header of odd length
        data = data.clone()
    tensor = data.view(dtype).view(shape)
    # Gemma multiplies by (1 + w), in float32 whatever w is stored as.
    return 1.0 + tensor.float() if add_one else tensor


def tensors(
    folder: Path, files: tuple[Path, ...], config: ModelConfig, stated: Scheme | None
) -> dict[str, Stored | Joined]:
    """Where each tensor lies, by canonical name. Raises ModelFileError where they do not fit `config` or `stated`."""
    found = _Found(config, stated)
    for file in files:
        try:
            source = Source.of(file)
        except OSError as error:
            raise ModelFileError(f"{file} cannot be read: {error.strerror or error}") from None
        with _open(file) as opened:
            starts = _starts(source)
            for stored in opened.keys():  # noqa: SIM118 - not a dict
                found.take(opened, stored, source, starts[stored])
    for module, parts in found.parts.items():
        found.join(module, parts)
    names.check(folder, found.shapes, names.expected(config))
    return found.weights


@dataclass
class _Parts:
    """A quantized weight whose parts are being found, perhaps in several files."""

    file: Path
    """The file of the first of them."""
    stored: dict[str, Stored] = field(default_factory=dict)
    shown: dict[str, torch.Tensor] = field(default_factory=dict)
    """On the meta device, for their shapes and dtypes; only weight_shape has its values."""


@dataclass
class _Found:
    """The tensors of a folder, while its files are gone through."""

    config: ModelConfig
    stated: Scheme | None
    weights: dict[str, Stored | Joined] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parts: dict[str, _Parts] = field(default_factory=dict)
    """By module, such as `model.layers.0.mlp.up_proj`: the parts of its quantized weight."""

    def take(self, opened: Any, stored: str, source: Source, offset: int) -> None:
        """Take in the tensor that the file has under the name `stored`, or leave it out. Raises ModelFileError."""
        config, file, part = self.config, source.path, opened.get_slice(stored)
        kind, shape = part.get_dtype(), tuple(part.get_shape())
        module, _, leaf = stored.rpartition(".")
        packed = leaf in PARTS or (leaf == "weight" and kind == "I8")
        name = names.from_hf(f"{module}.weight" if packed else stored, config.sandwich_norm)
        if name is None and any(ignored in stored for ignored in _IGNORED):
            return
        if name == "lm_head" and config.tie_embeddings:
            return
        if self.stated is not None and (leaf in IGNORED or self._is_filler(opened, stored, name)):
            return
        if name is None:
            raise ModelFileError(f"{file}: tensor {stored} is none of a {config.arch} decoder's")
        dtype = (_PART_DTYPES if packed else _DTYPES).get(kind)
        if dtype is None:
            raise ModelFileError(
                f"{file}: tensor {stored} has type {kind}, which is not read: "
                f"take weights in {', '.join(_DTYPES)}, or GGUF"
            )
        if packed:
            whole = Stored(
                source,
                offset,
                math.prod(shape) * dtype.itemsize,
                partial(_decoded, dtype, shape, False),
                mapped=True,
            )
            small = leaf == "weight_shape" and math.prod(shape) <= 2
            shown = opened.get_tensor(stored) if small else torch.empty(shape, dtype=dtype, device="meta")
            self._add_part(module, leaf, whole, shown)
            return
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        for piece, rows in self._pieces(name).items():
            first, stop, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
            piece_shape = (stop - first, *shape[1:]) if shape else ()
            add_one = config.sandwich_norm and piece.endswith("norm")
            weight = Stored(
                source,
                offset + first * row_bytes,
                max(0, stop - first) * row_bytes,
                partial(_decoded, dtype, piece_shape, add_one),
                mapped=True,
                form=Form(dtype.itemsize),
            )
            self._add(piece, piece_shape, weight, f"{file}: tensor {stored}")

    def join(self, module: str, parts: _Parts) -> None:
        """Take in the quantized weight of `module`, whose parts are all known. Raises ModelFileError."""
        origin = f"{parts.file}: {module}"
        scheme = INT8 if self.stated is None and "weight" in parts.stored else self.stated
        if scheme is None:
            raise ModelFileError(
                f"{origin} is packed, but config.json has no quantization_config that says how"
            )
        shape = scheme.shape(parts.shown, name=origin)
        name = names.from_hf(f"{module}.weight", self.config.sandwich_norm)
        assert name is not None
        form = Form(
            sum(part.nbytes for part in parts.stored.values()) / math.prod(shape),
            scheme.bits,
            shape[1] if scheme.group == -1 else scheme.group,
            not parts.stored.keys().isdisjoint(("qzeros", "weight_zero_point")),
            scheme.ordered and not parts.stored.keys().isdisjoint(("g_idx", "weight_g_idx")),
        )
        for piece, rows in self._pieces(name).items():
            first, stop, _ = rows.indices(shape[0])
            weight = Joined(parts.stored, partial(_unpacked, scheme, rows, origin), form)
            self._add(piece, (stop - first, shape[1]), weight, origin)

    def _add(self, piece: str, shape: tuple[int, ...], weight: Stored | Joined, origin: str) -> None:
        if piece in self.weights:
            raise ModelFileError(f"{origin} is there twice")
        self.weights[piece], self.shapes[piece] = weight, shape

    def _add_part(self, module: str, leaf: str, whole: Stored, shown: torch.Tensor) -> None:
        parts = self.parts.setdefault(module, _Parts(whole.source.path))
        if leaf in parts.stored:
            raise ModelFileError(f"{whole.source.path}: tensor {module}.{leaf} is there twice")
        parts.stored[leaf], parts.shown[leaf] = whole, shown

    def _pieces(self, name: str) -> dict[str, slice]:
        """The canonical tensors that a stored one holds, with their rows: more than one where it is fused."""
        prefix, _, leaf = name.rpartition(".")
        if leaf in ("qkv", "gate_up"):
            return {f"{prefix}.{key}": rows for key, rows in names.fused_parts(leaf, self.config).items()}
        return {name: slice(None)}

    def _is_filler(self, opened: Any, stored: str, name: str | None) -> bool:
        """Is it one of the zeros that AutoGPTQ writes as the bias of a projection that has none?"""
        if not stored.endswith("_proj.bias") or (self.config.qkv_bias and name is not None):
            return False
        return not bool(opened.get_tensor(stored).any())


def _unpacked(scheme: Scheme, rows: slice, name: str, parts: dict[str, Weight]) -> QuantTensor:
    weight = scheme.unpack(parts, name=name)
    return weight if rows == slice(None) else weight.rows(rows)
