"""What is asked of a quantizer (`Recipe`), and whether a model can be written so: found out before it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragate_engine.errors import ConfigError
from ragate_engine.quantize.layer import LINEARS
from ragate_engine.weights import names

if TYPE_CHECKING:
    from ragate_engine.config import ModelConfig
    from ragate_engine.quantize.gptq import Order

METHODS: dict[str, tuple[int, ...]] = {"rtn": (2, 3, 4, 8), "gptq": (2, 3, 4, 8), "awq": (4,)}
"""The bits that each method is stored with: AWQ's layout has 4 alone, GPTQ's (RTN uses it too) these."""


@dataclass(frozen=True)
class Recipe:
    """How to quantize: checked when made. Raises ConfigError."""

    method: str
    bits: int
    group: int
    """Weights that share a scale; -1 is a whole row."""
    symmetric: bool = False
    """Zero points in the middle: coarser, but some fast kernels want it (vLLM's Marlin for GPTQ)."""
    desc_act: bool = False
    """GPTQ: groups of columns in the order of their activations, which the file states in g_idx."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"there is no method {self.method!r}: choose from {', '.join(METHODS)}")
        if self.bits not in METHODS[self.method]:
            allowed = ", ".join(map(str, METHODS[self.method]))
            raise ConfigError(f"{self.method} cannot be stored with {self.bits} bits: take {allowed}")
        if self.group < 2 and self.group != -1:
            raise ConfigError(f"a group has 2 weights or more, or is a whole row (-1), not {self.group}")
        if self.symmetric and self.method == "awq":
            raise ConfigError("awq is stored with zero points: leave symmetric out, or take gptq")
        if self.desc_act and self.method != "gptq":
            raise ConfigError(f"{self.method} has no order of columns: leave desc_act out, or take gptq")

    @property
    def calibrated(self) -> bool:
        """Does the method look at activations?"""
        return self.method != "rtn"

    @property
    def order(self) -> Order:
        """GPTQ's order of columns."""
        return "grouped" if self.desc_act else "static"

    @property
    def least_zero(self) -> int:
        """GPTQ files store zero points minus one, and readers differ on what 0 wraps to: it is kept out of them."""
        return 0 if self.method == "awq" else 1

    def group_of(self, width: int) -> int:
        """Weights in a group of a row of `width`."""
        return width if self.group == -1 else self.group

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError for a matrix of the model that groups or 32-bit words do not divide."""
        shapes = names.expected(config)
        for leaf in LINEARS:
            out, width = shapes[f"layers.0.{leaf}"]
            if width % self.group_of(width):
                fits = [
                    g
                    for g in (256, 128, 64, 32, 16)
                    if all(shapes[f"layers.0.{x}"][1] % g == 0 for x in LINEARS)
                ]
                way_out = f"take {fits[0]}" if fits else "take -1, the whole row"
                raise ConfigError(
                    f"layers.0.{leaf} has rows of {width} weights, which do not divide into groups of {self.group}: "
                    f"{way_out}"
                )
            words = ((out, "rows"),) if self.method == "awq" else ((out, "rows"), (width, "columns"))
            for count, what in words:
                if count * self.bits % 32:
                    raise ConfigError(
                        f"layers.0.{leaf} has {count} {what} of {self.bits} bits, which do not fill 32-bit words: "
                        f"{self.method} cannot store it, a GGUF file can"
                    )

    def nbytes(self, out: int, width: int) -> int:
        """Bytes of a stored matrix [out, width]: codes, zero points, float16 scales, g_idx."""
        groups = width // self.group_of(width)
        return out * width * self.bits // 8 + out * groups * (self.bits + 16) // 8 + 4 * width
