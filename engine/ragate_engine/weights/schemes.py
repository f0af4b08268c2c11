"""What `quantization_config` of a Hugging Face folder says: how its quantized weights are packed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ragate_engine.quant import packed
from ragate_engine.weights.fields import Fields

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ragate_engine.quant.tensor import QuantTensor

_READ = "AWQ, GPTQ and compressed-tensors"

_WORDS = ("qweight", "qzeros", "scales", "g_idx")
_COMPRESSED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
PARTS = frozenset((*_WORDS, *_COMPRESSED))
"""The tensors that stand beside a quantized `weight`, or in place of it."""

IGNORED = ("input_scale", "input_zero_point", "k_scale", "v_scale")
"""Ranges for activations and a cache that other engines quantize: here they keep the precision they have."""


@dataclass(frozen=True)
class Scheme:
    """One packing, of every quantized weight of a folder."""

    named: str
    """For people and fingerprints, such as `GPTQ int4 g128 act-order`."""
    shape: Callable[..., tuple[int, int]]
    """`shape(parts, name=name)`: [out, in] of a weight; parts other than weight_shape may lie on the meta device."""
    unpack: Callable[..., QuantTensor]
    """`unpack(parts, name=name)`: the weight, on the device of its parts."""
    bits: int
    group: int
    """Weights that share a scale; -1 is a whole row."""
    ordered: bool = False
    """Whether g_idx may say that inputs were grouped in another order (act-order)."""


INT8 = Scheme(
    "int8 per channel",
    partial(packed.int8_shape, group=-1),
    partial(packed.unpack_int8, group=-1),
    bits=8,
    group=-1,
)
"""Weights in int8 with a `weight_scale` beside them: they say all there is to know, with or without a configuration."""


def read_scheme(path: Path, values: Mapping[str, Any]) -> Scheme | None:
    """The packing that config.json (`path`, with these `values`) states; `None` where it states none.

    Which weights are quantized is seen in their names, so lists of those that are not (`modules_to_not_convert`,
    `ignore`) decide nothing. Raises ModelFileError for a method, version or width that is not read.
    """
    text = values.get("text_config")
    holders = (values, text if isinstance(text, dict) else {})
    stated = next((found for part in holders if (found := Fields(path, part).get(_KEY, dict))), None)
    if not stated:
        return None
    fields = Fields(path, stated)
    method = fields.get("quant_method", str)
    if method not in _METHODS:
        fields.refuse(
            f"its weights are quantized by {str(method)[:40]!r}, which is not read: take {_READ}, or GGUF"
        )
    return _METHODS[method](fields)


_KEY = "quantization_config"


def _awq(fields: Fields) -> Scheme:
    """AutoAWQ's fields, under the names that transformers or AutoAWQ itself gives them."""
    version = _first(fields, "version", "checkpoint_format", "format") or "gemm"
    if version.lower() != "gemm":
        fields.refuse(f"its AWQ weights are packed as {version[:40]!r}: the version that is read is gemm")
    own = "w_bit" in fields.values
    bits = fields.need("w_bit" if own else "bits", int)
    group = fields.need("q_group_size" if own else "group_size", int)
    _check(fields, "AWQ", bits, packed.AWQ_BITS, group)
    return Scheme(
        _named("AWQ", bits, group),
        partial(packed.awq_shape, bits=bits, group=group),
        partial(packed.unpack_awq, bits=bits, group=group),
        bits,
        group,
    )


def _gptq(fields: Fields) -> Scheme:
    """AutoGPTQ's and GPTQModel's fields."""
    version = _first(fields, "checkpoint_format", "format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        fields.refuse(
            f"its GPTQ weights are packed as {version[:40]!r}: the formats that are read are gptq and gptq_v2"
        )
    words = fields.get("pack_dtype", str) or "int32"
    if words.removeprefix("torch.") != "int32":
        fields.refuse(f"its GPTQ weights are packed in words of type {words[:40]!r}: int32 is read")
    bits, group = fields.need("bits", int), fields.need("group_size", int)
    _check(fields, "GPTQ", bits, packed.GPTQ_BITS, group)
    number = 2 if version == "gptq_v2" else 1
    meta = fields.get("meta", dict)
    maker = str(meta.get("quantizer", "")) if meta else ""
    if number == 1 and bits == 3 and "gptqmodel" in maker.lower():
        # it subtracts one from whole words, not from each zero point: at 3 bits that is not what others write
        fields.refuse("GPTQModel's 3-bit weights of format gptq are not read: convert them to gptq_v2")
    act_order = bool(fields.get("desc_act", bool))
    return Scheme(
        _named("GPTQ", bits, group) + (" act-order" if act_order else ""),
        partial(packed.gptq_shape, bits=bits, group=group),
        partial(packed.unpack_gptq, bits=bits, group=group, version=number),
        bits,
        group,
        act_order,
    )


def _compressed(fields: Fields) -> Scheme:
    """compressed-tensors: one group of settings for all quantized weights, integers."""
    for key in ("sparsity_config", "transform_config"):
        other = fields.get(key, dict)
        if other and other.get("format") != "dense":
            fields.refuse(
                f"{key} is set, which is not read: take weights that are quantized and nothing else"
            )
    groups = fields.need("config_groups", dict)
    parts = [Fields(fields.path, group) for group in groups.values() if isinstance(group, dict)]
    settings = [Fields(fields.path, part.need("weights", dict)) for part in parts]
    stated = {
        (
            one.need("num_bits", int),
            one.get("type", str) or "int",
            one.get("strategy", str),
            one.get("group_size", int),
        )
        for one in settings
    }
    if len(stated) != 1:
        fields.refuse(
            "config_groups quantizes weights in more ways than one, or in none: one for all is read"
        )
    ((bits, kind, strategy, group),) = stated
    form = parts[0].get("format", str) or fields.get("format", str)
    if kind != "int" or form not in ("pack-quantized", "int-quantized", "naive-quantized"):
        fields.refuse(
            f"its weights are compressed as {str(form)[:40]!r} of type {kind[:40]!r}: "
            "pack-quantized and int-quantized weights of type int are read"
        )
    if strategy not in ("group", "channel", "tensor", None):
        fields.refuse(f"its weights are scaled by {str(strategy)[:40]!r}: group, channel and tensor are read")
    if strategy == "group" and group is None:
        fields.refuse("group_size is missing from its config_groups: fetch or convert the model again")
    group = -1 if strategy in ("channel", "tensor") or group is None else group
    act_order = any(one.values.get("actorder") in ("group", "dynamic", True) for one in settings)
    name = _named("compressed-tensors", bits, group) + (" act-order" if act_order else "")
    if form == "pack-quantized":
        _check(fields, "compressed-tensors", bits, packed.COMPRESSED_BITS, group)
        shape = partial(packed.compressed_shape, bits=bits, group=group)
        unpack = partial(packed.unpack_compressed, bits=bits, group=group)
        return Scheme(name, shape, unpack, bits, group, act_order)
    _check(fields, form, bits, (8,), group)
    shape = partial(packed.int8_shape, group=group)
    return Scheme(name, shape, partial(packed.unpack_int8, group=group), bits, group, act_order)


_METHODS = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}


def _first(fields: Fields, *keys: str) -> str | None:
    """The value of the first key that is there."""
    return next((value for key in keys if (value := fields.get(key, str)) is not None), None)


def _check(fields: Fields, method: str, bits: int, known: tuple[int, ...], group: int) -> None:
    if bits not in known:
        fields.refuse(f"its weights have {bits} bits: of {method}, {packed.listed(known)} are read")
    if group < 1 and group != -1:
        fields.refuse(f"its weights are in groups of {group}, which cannot be")


def _named(method: str, bits: int, group: int) -> str:
    return f"{method} int{bits} {'per channel' if group == -1 else f'g{group}'}"
