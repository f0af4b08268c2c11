"""Rope frequencies: to the bit those of the formulas as published, in the tables and in what a GGUF file stores."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from tiny_folder import save_tiny

from ragate_engine import open_checkpoint, write_gguf
from ragate_engine.config import RopeConfig
from ragate_engine.layers import rope_tables
from ragate_engine.rope import divisors, frequencies

LLAMA_31_8B = RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192), 128
LLAMA_32_1B = RopeConfig(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192), 64
OF_TESTS = RopeConfig(10_000.0, "llama3", 4.0, 1.0, 4.0, 64), 64
UNEVEN = RopeConfig(123_456.7, "llama3", 6.3, 1.5, 7.0, 3000, partial=0.75), 96
LLAMA_3 = [LLAMA_31_8B, LLAMA_32_1B, OF_TESTS, UNEVEN]


def released(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """`apply_scaling` of the Llama 3.1 release (reference_impl/model.py), one frequency at a time."""
    found = []
    low_wavelength = rope.original_max_len / rope.low_freq_factor
    high_wavelength = rope.original_max_len / rope.high_freq_factor
    for freq in plain:
        wavelength = 2 * math.pi / freq
        if wavelength < high_wavelength:
            found.append(freq)
        elif wavelength > low_wavelength:
            found.append(freq / rope.factor)
        else:
            smooth = (rope.original_max_len / wavelength - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            found.append((1 - smooth) * freq / rope.factor + smooth * freq)
    return np.array(found)


def converted(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """`generate_extra_tensors` of convert_hf_to_gguf.py: what it writes as rope_freqs.weight, in float64 until then."""
    found = []
    for freq in plain:
        wavelength = 2 * math.pi / freq
        if wavelength < rope.original_max_len / rope.high_freq_factor:
            found.append(1.0)
        elif wavelength > rope.original_max_len / rope.low_freq_factor:
            found.append(rope.factor)
        else:
            smooth = (rope.original_max_len / wavelength - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            found.append(1 / ((1 - smooth) / rope.factor + smooth))
    return np.array(found, dtype=np.float32)


def plain(rope: RopeConfig, head_dim: int) -> np.ndarray:
    rotary = int(head_dim * rope.partial)
    return rope.theta ** -(np.arange(0, rotary, 2, dtype=np.float64) / rotary)


@pytest.mark.parametrize(("rope", "head_dim"), LLAMA_3)
def test_llama_3_frequencies_are_the_releases_to_the_last_bit(rope: RopeConfig, head_dim: int) -> None:
    wanted = released(rope, plain(rope, head_dim))
    np.testing.assert_array_equal(frequencies(rope, head_dim), wanted)
    kinds = {
        "kept": wanted == plain(rope, head_dim),
        "divided": wanted == plain(rope, head_dim) / rope.factor,
    }
    assert all(kind.any() for kind in kinds.values()) and not (kinds["kept"] | kinds["divided"]).all()


@pytest.mark.parametrize(("rope", "head_dim"), LLAMA_3)
def test_tables_turn_by_these_frequencies(rope: RopeConfig, head_dim: int) -> None:
    cos, sin = rope_tables(rope, head_dim, 3000, torch.device("cpu"))
    angles = np.arange(3000.0)[:, None] * released(rope, plain(rope, head_dim))
    np.testing.assert_array_equal(cos.numpy(), np.cos(angles).astype(np.float32))
    np.testing.assert_array_equal(sin.numpy(), np.sin(angles).astype(np.float32))


@pytest.mark.parametrize(("rope", "head_dim"), LLAMA_3)
def test_divisors_are_those_that_llama_cpps_converter_writes(rope: RopeConfig, head_dim: int) -> None:
    wanted = converted(rope, plain(rope, head_dim))
    np.testing.assert_array_equal(divisors(rope, head_dim), wanted)
    assert wanted.min() == 1 and wanted.max() == np.float32(rope.factor)


def test_a_written_file_holds_the_divisors_and_is_read_as_the_same_rope(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama3-rope")
    source, path = open_checkpoint(tmp_path), tmp_path / "x.gguf"
    write_gguf(source, path, "Q8_0", lambda done, total: None)
    (stored,) = (t.data for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    np.testing.assert_array_equal(stored, converted(OF_TESTS[0], plain(*OF_TESTS)))
    assert open_checkpoint(path).config.rope == source.config.rope == OF_TESTS[0]


@pytest.mark.parametrize(("rope", "head_dim"), LLAMA_3[:3])
def test_transformers_turns_as_fast(rope: RopeConfig, head_dim: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stated = {
        "rope_type": "llama3",
        "rope_theta": rope.theta,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_len,
    }
    config = SimpleNamespace(
        rope_parameters=stated,
        head_dim=head_dim,
        standardize_rope_params=lambda: None,
        max_position_embeddings=1,
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    np.testing.assert_allclose(frequencies(rope, head_dim), theirs.numpy(), rtol=2e-6)


def test_a_linear_rope_divides_all_alike_and_a_plain_one_none() -> None:
    linear = RopeConfig(10_000.0, "linear", factor=3.0)
    np.testing.assert_array_equal(frequencies(linear, 64), plain(linear, 64) / 3.0)
    np.testing.assert_array_equal(frequencies(RopeConfig(10_000.0, partial=0.5), 64), plain(linear, 32))
