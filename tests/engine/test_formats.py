"""Block formats: decoded to the bit as the `gguf` package decodes them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import cached_model
from tiny_gguf import random_blocks

from ragate_engine.quant import formats
from ragate_engine.quant.formats import DENSE, FORMATS, SIZES, Kind, decode
from ragate_engine.quant.tensor import QuantTensor


def decoded(kind: Kind, stored: np.ndarray) -> QuantTensor | torch.Tensor:
    return decode(kind, torch.from_numpy(stored.copy()))


def same_bits(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    """Equal bit for bit, but for the payload of NaNs."""
    mine = ours.numpy()
    return bool(
        ((mine.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(mine) & np.isnan(theirs))).all()
    )


def test_every_listed_type_is_read():
    blocks = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"}
    assert {kind.name for kind in formats.SUPPORTED} == blocks | {"F16", "BF16", "F32"}
    sizes = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "IQ4_NL": 18} | {
        "Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210,
    }  # fmt: skip
    assert {kind.name: form.block_bytes for kind, form in FORMATS.items()} == sizes


def test_types_and_their_sizes_are_those_of_ggml():
    theirs = {kind.name: (kind.value, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {kind.name: (kind.value, *SIZES[kind]) for kind in Kind}
    both = ours.keys() & theirs.keys()  # a newer package may know more
    assert {name: ours[name] for name in both} == {name: theirs[name] for name in both}
    assert {kind.name for kind in formats.SUPPORTED} <= both


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_block_decodes_to_the_bits_of_the_reference(kind, data):
    size = FORMATS[kind].block_bytes
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    raw = data.draw(st.binary(min_size=rows * blocks * size, max_size=rows * blocks * size))
    stored = np.frombuffer(raw, np.uint8).reshape(rows, blocks * size)
    with np.errstate(all="ignore"):
        assert same_bits(decoded(kind, stored).dequantize(), gguf.quants.dequantize(stored, kind))


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_random_blocks_with_finite_scales_decode_to_the_bits_of_the_reference(kind):
    stored = random_blocks(kind, 32, 2048, np.random.default_rng(1))
    tensor = decoded(kind, stored)
    theirs = gguf.quants.dequantize(stored, kind)
    assert np.isfinite(theirs).all()
    assert same_bits(tensor.dequantize(), theirs)
    low = 0 if tensor.offsets is not None else -(2 ** (tensor.bits - 1))
    ends = (-127, 113) if kind == Kind.IQ4_NL else (low, low + 2**tensor.bits - 1)
    assert (tensor.codes.min().item(), tensor.codes.max().item()) == ends


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_a_tensor_decoded_in_chunks_is_the_tensor_decoded_whole(kind, monkeypatch):
    stored = random_blocks(kind, 7, 1024, np.random.default_rng(2))
    whole = decoded(kind, stored).dequantize()
    monkeypatch.setitem(formats._CHUNK_BYTES, "cpu", 3 * FORMATS[kind].block_bytes)
    assert torch.equal(decoded(kind, stored).dequantize(), whole)


@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.name)
def test_dense_tensors_keep_their_dtype_and_values_and_are_not_copied(kind):
    values = torch.tensor([[1.5, -2.0, 0.0], [3.0, -0.0, 1e-3]]).to(DENSE[kind])
    stored = values.view(torch.uint8)
    read = decode(kind, stored)
    assert read.dtype == DENSE[kind]
    assert torch.equal(read, values)
    assert read.data_ptr() == stored.data_ptr()


def test_rows_of_a_tensor_are_the_rows_of_its_weights():
    tensor = decoded(Kind.Q4_K, random_blocks(Kind.Q4_K, 9, 512, np.random.default_rng(3)))
    index = torch.tensor([8, 0, 0, 3])
    assert torch.equal(tensor.rows(index).dequantize(), tensor.dequantize()[index])
    assert torch.equal(tensor.rows(slice(2, 5)).dequantize(), tensor.dequantize()[2:5])
    assert tensor.rows(index).shape == (4, 512)


def test_dequantizing_to_another_dtype_rounds_once_at_the_end():
    tensor = decoded(Kind.Q6_K, random_blocks(Kind.Q6_K, 4, 256, np.random.default_rng(4)))
    assert torch.equal(tensor.dequantize(torch.bfloat16), tensor.dequantize().to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_dequantized_some_rows_at_a_time_are_those_dequantized_at_once(dtype, monkeypatch):
    for kind in (Kind.Q4_1, Kind.Q6_K):
        tensor = decoded(kind, random_blocks(kind, 7, 512, np.random.default_rng(5)))
        whole = tensor.dequantize(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(QuantTensor, "_rows_at_once", 3)
            assert torch.equal(tensor.dequantize(dtype), whole)
    assert tensor.rows(slice(0, 0)).dequantize(dtype).shape == (0, 512)


def test_codes_and_scales_that_do_not_fit_are_refused():
    codes, scales = torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 2)
    with pytest.raises(ValueError, match="groups of 48"):
        QuantTensor(4, 48, codes, scales, None, (2, 64))
    with pytest.raises(ValueError, match="scales have shape"):
        QuantTensor(4, 32, codes, torch.ones(2, 4), None, (2, 64))
    with pytest.raises(ValueError, match="codes have shape"):
        QuantTensor(4, 32, codes, scales, None, (4, 32))


@pytest.mark.parametrize(
    "name",
    ["smollm2-135m", pytest.param("qwen-0.5b", marks=pytest.mark.slow),
     pytest.param("gemma-3-270m", marks=pytest.mark.slow)],
)  # fmt: skip
def test_tensors_of_a_real_file_decode_to_the_bits_of_the_reference(name):
    from ragate_engine.weights import gguf as reader

    file = reader.read_header(cached_model(name))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file.path).tensors}
    quantized = [info for info in file.tensors.values() if info.kind in FORMATS and "blk.1" in info.name]
    assert len(quantized) >= 7
    for info in quantized:
        ours = reader.stored(file, info)().dequantize()
        assert same_bits(ours, gguf.quants.dequantize(stored[info.name].data, info.kind)), info.name
