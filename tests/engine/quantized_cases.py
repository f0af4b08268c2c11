"""Random quantized weights of every kind that the card's kernel takes, for the interpreter's tests and the card's."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ragate_engine.quant.tensor import QuantTensor


class Kind(NamedTuple):
    """Codes of so many bits in groups; beside each scale nothing, a zero, or an offset."""

    bits: int
    group: int
    beside: str = "nothing"
    ordered: bool = False


KINDS = [
    Kind(4, 128, "zero"),  # AWQ
    Kind(4, 128),  # GPTQ, symmetric
    Kind(4, 64, "zero", ordered=True),  # GPTQ, act-order
    Kind(2, 64, "zero"),
    Kind(3, 128, "zero"),
    Kind(8, 128, "zero"),
    Kind(4, 32),  # Q4_0
    Kind(4, 32, "offset"),  # Q4_1, Q4_K
    Kind(5, 32),  # Q5_0
    Kind(5, 32, "offset"),  # Q5_1, Q5_K
    Kind(8, 32),  # Q8_0
    Kind(2, 16, "offset"),  # Q2_K
    Kind(3, 16),  # Q3_K
    Kind(6, 16),  # Q6_K
    Kind(8, 0),  # int8, a scale a row
]


def random_weight(kind: Kind, out: int, width: int, seed: int = 0) -> QuantTensor:
    """[out, width] of `kind`; group 0 is the whole row."""
    make = torch.Generator().manual_seed(seed)
    bits, group = kind.bits, kind.group or width
    shape = (out, width // group)
    scales = torch.rand(shape, generator=make) * 0.02 + 0.005
    least, most = (-(1 << bits - 1), 1 << bits - 1) if kind.beside == "nothing" else (0, 1 << bits)
    codes = torch.randint(least, most, (out, width), generator=make).to(torch.int8 if least else torch.uint8)
    offsets = None
    if kind.beside == "zero":
        offsets = -torch.randint(0, 1 << bits, shape, generator=make) * scales
    elif kind.beside == "offset":
        offsets = torch.randn(shape, generator=make) * 0.05
    order = torch.randperm(width, generator=make) if kind.ordered else None
    return QuantTensor(bits, group, codes, scales, offsets, (out, width), order)
