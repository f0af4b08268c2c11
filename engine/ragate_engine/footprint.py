"""What a model's weights take in each format: in a file, and in memory as the engine keeps them there, to the byte.

It is `layers.py`, `model.py` and the kernels' ways to pack in numbers, so that nothing need be loaded to know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from ragate_engine.quant.formats import form_of
from ragate_engine.quant.tensor import Form
from ragate_engine.weights import names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ragate_engine.config import ModelConfig

PLAIN, INT4 = "bf16", "int4 g128"
"""Floats of 16 bits, and what AWQ and GPTQ make; other formats go by the names of llama.cpp's mixes."""
FLOATS = Form(2)
"""What is taken of a tensor that no header describes."""
MOST_INT8_COLUMNS = (1 << 31) // (127 * 128)
"""Wider matrices are not multiplied in int8."""

Kept = Literal["bf16", "packed", "int8", "float32"]
"""What becomes of weights in memory: on a card bfloat16, the codes of the file, or int8; on a CPU float32."""


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights."""

    held: int
    read: int
    """Of them, by each step."""


def forms_of(config: ModelConfig, name: str) -> dict[str, Form]:
    """How each tensor of a model is stored in the format called `name`; GGUF as llama.cpp's mixes are.

    `name` is `PLAIN`, `INT4` or one of `gguf_write.MIXES`; KeyError for others.
    """
    from ragate_engine.weights.gguf_write import tensor_kind  # brings a package that takes its time

    shapes = names.expected(config)
    if name == PLAIN:
        return dict.fromkeys(shapes, FLOATS)
    if name == INT4:
        return {each: _int4(each, shape) for each, shape in shapes.items()}
    return {
        each: form_of(tensor_kind(names.to_gguf(_fused(each, config)), shape, name, config))
        for each, shape in shapes.items()
    }


def _int4(name: str, shape: tuple[int, ...]) -> Form:
    """In a folder with AWQ or GPTQ: the matrices of layers are quantized, if their rows divide into groups of 128."""
    if len(shape) == 1 or not name.startswith("layers.") or shape[1] % 128:
        return FLOATS
    return Form(4 / 8 + (2 + 4 / 8) / 128, 4, 128, True)  # a float16 scale and a zero of 4 bits


def _fused(name: str, config: ModelConfig) -> str:
    """The tensor that holds `name` in a GGUF file: Phi-3's q, k and v are one, as are gate and up."""
    layer, _, leaf = name.rpartition(".")
    if config.arch != "phi3" or leaf not in ("q", "k", "v", "gate"):
        return name
    return f"{layer}.{'up' if leaf == 'gate' else 'qkv'}"


def file_bytes(config: ModelConfig, forms: Mapping[str, Form]) -> int:
    """Bytes of all tensors in the file."""
    shapes = names.expected(config)
    return round(sum(forms.get(name, FLOATS).size * math.prod(shape) for name, shape in shapes.items()))


def weight_bytes(config: ModelConfig, forms: Mapping[str, Form], kept: Kept) -> WeightBytes:
    """What the engine holds of a model whose tensors are stored in `forms`, and what it reads of it in a step.

    Of files with zeros or a g_idx the bytes of both are counted, which the engine drops where they say nothing.
    """
    shapes = names.expected(config)
    head = "embed" if config.tie_embeddings else "lm_head"
    vectors = [shape for shape in shapes.values() if len(shape) == 1]
    products = [(f"layers.{i}.", leaves) for i in range(config.num_layers) for leaves in _PRODUCTS]
    read = sum(_held([(FLOATS, shape)], kept, False) for shape in vectors)
    for prefix, leaves in [*products, ("", (head,))]:
        parts = [(forms.get(prefix + leaf, FLOATS), shapes[prefix + leaf]) for leaf in leaves]
        # the head is never in int8
        read += _held(parts, "bf16" if kept == "int8" and not prefix else kept, leaves == _GATED)
    stored, rows, width = forms.get("embed", FLOATS), *shapes["embed"]
    table = 2 * rows * width
    if kept == "float32":
        table = _codes(stored, rows, width) if stored.bits else 4 * rows * width
    # a dense table is the head too where they are tied; a packed one is packed (or unpacked) for it again, and a CPU
    # keeps its products in panels
    shared = config.tie_embeddings and kept != "float32" and not (kept == "packed" and stored.bits)
    return WeightBytes(held=read + (0 if shared else table), read=read)


_GATED = ("gate", "up")
_PRODUCTS = (("q", "k", "v"), ("o",), _GATED, ("down",))
"""The matrices of a layer, those together that become one product."""

Matrix = tuple[Form, "tuple[int, ...]"]
"""How a weight is stored, and its shape."""


def _held(parts: Sequence[Matrix], kept: Kept, gated: bool) -> int:
    """Bytes of weights that become one product, or of a vector."""
    shapes = [shape for _, shape in parts]
    count = sum(math.prod(shape) for shape in shapes)
    if len(shapes[0]) == 1:
        return 4 * count if kept == "float32" else 2 * count
    width = shapes[0][1]
    if kept == "float32":
        return 4 * width * -(-sum(shape[0] for shape in shapes) // 16) * 16  # in panels of 16 outputs
    if (
        kept == "int8"
        and width % 16 == 0
        and width <= MOST_INT8_COLUMNS
        and all(s[0] % 16 == 0 for s in shapes)
    ):
        return count + 4 * sum(shape[0] for shape in shapes)
    if kept == "packed" and all(_packable(form, shape) for form, shape in parts):
        runs = [
            (kind, sum(shape[0] for _, shape in run))
            for kind, run in groupby(parts, lambda part: replace(part[0], size=0))
        ]  # a launch each
        if not gated or len(runs) == 1:
            return sum(_packed(kind, rows, width, gated) for kind, rows in runs)
    return 2 * count


def _packable(form: Form, shape: tuple[int, ...]) -> bool:
    """Whether a card's kernels take the codes as they are (`packable` of `kernels/triton/quantized.py`)."""
    power_of_two = form.group & (form.group - 1) == 0
    cut = form.group >= 16 and (power_of_two or form.group == shape[1])
    return form.bits > 0 and shape[0] % 16 == 0 and shape[1] % 16 == 0 and cut


def _packed(form: Form, rows: int, width: int, gated: bool) -> int:
    """Bytes of weights as a card keeps them (`kernels/triton/quantized.py`): codes in whole steps of columns, scales in
    bfloat16 and as much for what is beside, the order of columns, and a count for each tile of a weight in segments."""
    segments = 4 if not gated and rows <= 8192 and width >= 4096 else 1
    step = segments * (256 if form.bits in (3, 5) else 128)
    padded = -(-width // step) * step
    groups = -(-padded // form.group)
    order = 8 * width if form.ordered else 0
    done = -(-rows // 64) * 128 if segments > 1 else 0
    return order + done + rows * (padded * form.bits // 8 + groups * (4 if form.beside else 2))


def _codes(form: Form, rows: int, width: int) -> int:
    """Bytes of weights as a CPU keeps a table to look up in: a byte a code, scales and offsets float32."""
    order = 8 * width if form.ordered else 0
    return order + rows * (width + width // form.group * (8 if form.beside else 4))
