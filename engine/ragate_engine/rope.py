"""How fast each pair of a head turns with the position: the one place where ropes are scaled."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ragate_engine.config import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int) -> npt.NDArray[np.float64]:
    """Radians a token, float64 [rotary_dim / 2], fastest first.

    Sources: Su et al. 2021, section 3.2.2; `linear` Chen et al. 2023; `llama3` as in the Llama 3.1 release.
    """
    rotary = int(head_dim * rope.partial)
    plain: npt.NDArray[np.float64] = rope.theta ** -(np.arange(0, rotary, 2, dtype=np.float64) / rotary)
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling != "llama3":
        return plain
    wavelength = 2 * math.pi / plain
    low = rope.original_max_len / rope.low_freq_factor
    high = rope.original_max_len / rope.high_freq_factor
    smooth = (rope.original_max_len / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * plain / rope.factor + smooth * plain
    return np.where(wavelength > low, plain / rope.factor, np.where(wavelength < high, plain, blended))


def divisors(rope: RopeConfig, head_dim: int) -> npt.NDArray[np.float32]:
    """What scaling divides each of the `frequencies` by, float32: llama.cpp's `rope_freqs.weight`."""
    plain = frequencies(replace(rope, scaling="none"), head_dim)
    return (plain / frequencies(rope, head_dim)).astype(np.float32)
