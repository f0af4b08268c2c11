"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): what rounding a column loses, the columns after it make good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from ragate_engine.errors import ModelFileError
from ragate_engine.quantize.rtn import Quantized, codes_on, find_grid, trivial_index

if TYPE_CHECKING:
    from collections.abc import Iterator

Order = Literal["given", "static", "grouped"]
"""In which order columns are rounded: as they are given, or those with the largest activations first. `static` groups
are neighbours in the weight, with grids found ahead, so that any reader understands them; `grouped` are neighbours in
the order of rounding, which the file must state (`desc_act`)."""

BLOCK = 128
"""Columns whose errors are passed on within the block at once, and to the rest of the row in one product."""
DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean."""


class Hessian:
    """Of the squared error of a linear's outputs, over its inputs: 2 X^T X / n, float32 [in, in]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.count = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in inputs [n, in] of any dtype."""
        wide = x.float()
        self.total.addmm_(wide.T, wide)
        self.count += len(x)

    def mean(self) -> torch.Tensor:
        """The Hessian itself; zeros where there were no inputs."""
        return self.total * (2 / max(self.count, 1))


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    group: int,
    symmetric: bool,
    order: Order = "static",
    least_zero: int = 0,
) -> Quantized:
    """Quantize `weight`, float32 [out, in], for inputs of this `hessian`, float32 [in, in] (algorithm 1).

    `group` must divide a row. Raises ModelFileError where the Hessian cannot be factorized.
    """
    width = weight.shape[1]
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    columns = torch.where(dead, 0.0, weight).T.contiguous()  # a column is a row here: memory side by side
    index = trivial_index(width, group, weight.device)
    static: tuple[torch.Tensor, torch.Tensor] | None = None
    if order == "static":
        static = find_grid(columns.T.unflatten(1, (-1, group)), bits, symmetric, least_zero)
    if order != "given":
        chosen = torch.argsort(diagonal, descending=True, stable=True)
        columns, hessian, dead = columns[chosen], hessian[chosen][:, chosen], dead[chosen]
        if order == "static":
            index = index[chosen]
    factor = _inverse_factor(hessian, dead)
    del hessian

    groups = width // group
    scales, zeros = static or (
        columns.new_empty(weight.shape[0], groups),
        columns.new_empty(weight.shape[0], groups),
    )
    group_of = index.tolist()
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    for first, last in _blocks(width, group):
        errors = torch.empty_like(columns[first:last])
        for i in range(first, last):
            g = group_of[i]
            if static is None and i % group == 0:
                scales[:, g], zeros[:, g] = find_grid(columns[i : i + group].T, bits, symmetric, least_zero)
            code = codes_on(columns[i], scales[:, g], zeros[:, g], bits)
            codes[i] = code
            error = (columns[i] - (code - zeros[:, g]) * scales[:, g]) / factor[i, i]
            columns[i + 1 : last].addr_(factor[i, i + 1 : last], error, alpha=-1)
            errors[i - first] = error
        columns[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)

    if order != "given":
        back = torch.argsort(chosen)
        codes, index = codes[back], index[back]
    return Quantized(bits, codes.T.contiguous(), scales, zeros.to(torch.uint8), index)


def _blocks(width: int, group: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `BLOCK` columns; a group begins where a block does, or lies within one.

    So its grid is found from weights that have taken in every error before it.
    """
    span = group if group >= BLOCK else BLOCK // group * group
    for start in range(0, width, span):
        stop = min(start + span, width)
        for first in range(start, stop, BLOCK):
            yield first, min(first + BLOCK, stop)


def _inverse_factor(hessian: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """R, upper triangular, with R^T R the inverse of the damped Hessian.

    With P the reversal of order and L the Cholesky factor of P H P: H = U U^T for U = P L P, upper, so R = U^-1. That
    is one factorization and one triangular solve, and the inverse of H is never formed.
    """
    diagonal = torch.where(dead, 1.0, hessian.diagonal())
    mean = hessian.diagonal()[~dead].mean() if not bool(dead.all()) else diagonal.mean()
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = hessian.clone()
        damped.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
    else:
        raise ModelFileError(
            "the Hessian of the calibration activations cannot be factorized: take other text"
        )
    # P L P is inverted as P L^-1 P
    identity = torch.eye(len(lower), device=lower.device, dtype=lower.dtype)
    inverse: torch.Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)
