"""What a model's weights take in each format: in a file, and in memory as the engine keeps them there."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ragate_engine.config import ModelConfig
    from ragate_engine.quant.formats import Kind
    from ragate_engine.weights import Checkpoint

PLAIN, INT4 = "bf16", "int4 g128"
"""Floats of 16 bits, and what AWQ and GPTQ make; other formats go by the names of llama.cpp's mixes."""


@dataclass(frozen=True)
class Form:
    """How a matrix is stored."""

    size: float
    """Bytes a weight in a file, scales included."""
    bits: int = 0
    """Of a code; 0 where weights are plain floats."""
    group: int = 1
    """Weights that share a scale."""
    beside: bool = False
    """Whether a zero or an offset stands beside each scale."""

    def packed(self, count: int) -> int:
        """Bytes of `count` weights as a card keeps them: codes, scales in bfloat16 and as much for what is beside."""
        return count * self.bits // 8 + count // self.group * (4 if self.beside else 2)

    def unpacked_codes(self, count: int) -> int:
        """Bytes of `count` weights as a CPU keeps a table to look up in: a byte each, scales and offsets float32."""
        return count + count // self.group * (8 if self.beside else 4)


Kept = Literal["bf16", "packed", "float32"]
"""What the engine makes of weights in memory: on a card bfloat16, or the codes of the file; on a CPU float32."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights."""

    held: int
    read: int
    """Of them, by each step."""


def format_of(quantization: str) -> str:
    """The row that a model of this `quantization` belongs to, or a name of its own."""
    if quantization.lower() in ("bfloat16", "float16", "float32", "bf16", "f16", "f32"):
        return PLAIN
    return INT4 if " int4 g128" in quantization else quantization


def forms_of(config: ModelConfig, name: str) -> dict[str, Form]:
    """How each tensor of a model is stored in the format called `name`; GGUF as llama.cpp's mixes are."""
    from ragate_engine.weights import names

    shapes = names.expected(config)
    if name == PLAIN:
        return dict.fromkeys(shapes, Form(2))
    if name == INT4:
        return {each: _packed_form(each, shape, 4, 128) for each, shape in shapes.items()}
    return {each: _form(_kind(_fused(each, config), shape, name, config)) for each, shape in shapes.items()}


def _packed_form(name: str, shape: tuple[int, ...], bits: int, group: int) -> Form:
    """In a folder with AWQ or GPTQ: the matrices of layers are quantized, if their rows divide into groups."""
    if len(shape) == 1 or not name.startswith("layers.") or shape[1] % group:
        return Form(2)
    return Form(bits / 8 + (2 + bits / 8) / group, bits, group, True)  # a float16 scale and a zero


def _kind(name: str, shape: tuple[int, ...], mix: str, config: ModelConfig) -> Kind:
    from ragate_engine.weights import names
    from ragate_engine.weights.gguf_write import tensor_kind

    return tensor_kind(names.to_gguf(name), shape, mix, config)


def _form(kind: Kind) -> Form:
    from ragate_engine.quant.formats import DENSE, FORMATS, Kind

    if kind in DENSE:
        return Form(DENSE[kind].itemsize)
    stored = FORMATS[kind]
    beside = kind in (Kind.Q4_1, Kind.Q5_1, Kind.Q2_K, Kind.Q4_K, Kind.Q5_K)
    return Form(stored.block_bytes / stored.block_weights, stored.bits, stored.group, beside)


def _fused(name: str, config: ModelConfig) -> str:
    """The tensor that holds `name` in a GGUF file: Phi-3's q, k and v are one, as are gate and up."""
    layer, _, leaf = name.rpartition(".")
    if config.arch != "phi3" or leaf not in ("q", "k", "v", "gate"):
        return name
    return f"{layer}.{'up' if leaf == 'gate' else 'qkv'}"


def forms_of_file(checkpoint: Checkpoint) -> dict[str, Form] | None:
    """How each tensor of the model at hand is stored; `None` where that is as its format has it, or plain."""
    from ragate_engine.weights import gguf, names

    shapes = names.expected(checkpoint.config)
    if checkpoint.path.suffix == ".gguf" and checkpoint.path.is_file():
        infos = gguf.read_header(checkpoint.path).tensors
        stored = {each: names.to_gguf(_fused(each, checkpoint.config)) for each in shapes}
        return {each: _form(infos[stored[each]].kind) for each in shapes}
    found = re.search(r"int(\d) (?:g(\d+)|per channel)", checkpoint.quantization)
    if found is None:
        return None
    bits, group = int(found[1]), found[2]
    return {
        each: _packed_form(each, shape, bits, int(group) if group else shape[-1])
        for each, shape in shapes.items()
    }


def weights_of(config: ModelConfig, forms: Mapping[str, Form], kept: Kept) -> Weights:
    """What the engine holds of a model, and reads of it in a step: `layers.py` and `kernels/cpu` in numbers."""
    from ragate_engine.weights import names

    held = read = 0
    for name, shape in names.expected(config).items():
        form, count = forms[name], math.prod(shape)
        if kept == "float32":
            # in panels of 16 outputs
            product = 4 * count if len(shape) == 1 else 4 * -(-shape[0] // 16) * 16 * shape[1]
            table = form.unpacked_codes(count) if form.bits else 4 * count
        else:
            takes = kept == "packed" and form.bits and not shape[0] % 16 and not shape[-1] % 16
            product, table = form.packed(count) if takes else 2 * count, 2 * count
        if name != "embed":
            held, read = held + product, read + product
        elif not config.tie_embeddings:
            held += table
        else:
            # plain weights on a card are table and head in one
            held += table if kept == "bf16" or (kept == "packed" and product == table) else table + product
            read += product
    return Weights(held, read)
