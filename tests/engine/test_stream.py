"""Weights on their way to a device: every byte, in any order, whatever the pieces; and files that change or vanish.

The threads, pieces and order are the same on a CPU, which has no streams to wait for; tests/gpu has the card's half.
"""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_gguf import HEADS, HIDDEN, INNER, write_tiny

from ragate_engine import ModelFileError
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.weights import Checkpoint, open_checkpoint
from ragate_engine.weights.stream import Source, Stored, Uploader, Weight

CPU = torch.device("cpu")


def uploader(checkpoint: Checkpoint, order: list[str] | None = None, **settings: int) -> Uploader:
    return Uploader(checkpoint.tensors, sorted(checkpoint.names) if order is None else order, CPU, **settings)


def same(a: Weight, b: Weight) -> bool:
    if isinstance(a, QuantTensor) and isinstance(b, QuantTensor):
        return a.bits == b.bits and torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
    assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("stream") / "m.gguf"
    kinds = {
        "blk.0.attn_q.weight": Kind.Q4_0,
        "blk.1.ffn_up.weight": Kind.Q8_0,
        "blk.1.attn_k.weight": Kind.Q5_1,
    }
    write_tiny(path, kinds=kinds)
    return open_checkpoint(path)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_tensor_arrives_whole_in_whatever_order_it_is_asked_for(
    quantized: Checkpoint, data: st.DataObject
):
    foreseen = data.draw(st.permutations(sorted(quantized.names)))
    asked = data.draw(st.permutations(sorted(quantized.names)))
    asked = [
        *asked,
        *data.draw(st.lists(st.sampled_from(asked), max_size=3)),
    ]  # a tied embedding is asked for twice
    pieces = dict(
        threads=data.draw(st.integers(1, 4)),
        chunk_bytes=data.draw(st.sampled_from([64, 1000, 4096, 1 << 20])),
        ahead_bytes=data.draw(st.sampled_from([0, 5000, 1 << 30])),
    )
    with uploader(quantized, foreseen, **pieces) as stream:
        for name in asked:
            assert same(stream.load(name), quantized.load(name)), name


def test_what_is_read_ahead_stays_within_its_bytes_and_one_tensor(quantized: Checkpoint):
    with uploader(quantized, ahead_bytes=40_000) as stream:
        largest = max(stored.nbytes for stored in quantized.tensors.values())
        for name in sorted(quantized.names):
            stream.load(name)
            assert sum(len(flight.data) for flight in stream._flying.values()) <= 40_000 + largest
        assert stream._flying == {}


def test_loaders_that_are_no_files_are_called_when_asked_for(quantized: Checkpoint):
    drawn = torch.arange(6.0)
    tensors = {**quantized.tensors, "drawn": lambda: drawn}
    with Uploader(tensors, ["drawn", "layers.0.q"], CPU) as stream:
        assert stream.load("drawn") is drawn
        assert same(stream.load("layers.0.q"), quantized.load("layers.0.q"))
        with pytest.raises(KeyError):
            stream.load("absent")


def test_a_checkpoint_streams_to_a_cpu_by_loading(quantized: Checkpoint):
    before = threading.active_count()
    with quantized.stream(CPU) as load:
        assert threading.active_count() == before
        assert same(load("layers.1.up"), quantized.load("layers.1.up"))


def test_weights_may_be_loaded_in_inference_mode(quantized: Checkpoint):
    with torch.inference_mode(), uploader(quantized, chunk_bytes=500) as stream:
        assert same(stream.load("layers.1.down"), quantized.load("layers.1.down"))


def test_parts_of_a_fused_matrix_are_ranges_of_its_bytes(tmp_path: Path):
    fused = torch.randn((HEADS + 2 * 2) * 16, HIDDEN)
    config = {
        "model_type": "phi3", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "vocab_size": 8, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(str(config).replace("'", '"'))
    stacked = torch.randn(2 * INNER, HIDDEN).bfloat16()
    save_file(
        {
            "model.layers.0.self_attn.qkv_proj.weight": fused,
            "model.layers.0.mlp.gate_up_proj.weight": stacked,
            "model.layers.0.self_attn.o_proj.weight": torch.randn(HIDDEN, HIDDEN),
            "model.layers.0.mlp.down_proj.weight": torch.randn(HIDDEN, INNER),
            "model.layers.0.input_layernorm.weight": torch.randn(HIDDEN),
            "model.layers.0.post_attention_layernorm.weight": torch.randn(HIDDEN),
            "model.norm.weight": torch.randn(HIDDEN),
            "model.embed_tokens.weight": torch.randn(8, HIDDEN),
            "lm_head.weight": torch.randn(8, HIDDEN),
        },
        tmp_path / "model.safetensors",
    )
    with uploader(open_checkpoint(tmp_path), chunk_bytes=777) as stream:
        assert torch.equal(torch.cat([stream.load(f"layers.0.{part}") for part in "qkv"]), fused)
        assert torch.equal(stream.load("layers.0.up"), stacked[INNER:])


def test_weights_behind_a_header_of_odd_length_are_read(tmp_path: Path):
    values = torch.randn(3, 5)
    path = tmp_path / "m.bin"
    path.write_bytes(b"odd" + values.numpy().tobytes())
    from ragate_engine.weights.safetensors import _decoded

    decode = partial(_decoded, torch.float32, (3, 5), False)
    for mapped in (False, True):
        assert torch.equal(Stored(Source.of(path), 3, 60, decode, mapped)(), values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:30_000]), "changed while it was read"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_a_file_that_changes_under_way_ends_the_load_in_one_sentence(tmp_path: Path, change, said: str):
    path = tmp_path / "m.gguf"
    write_tiny(path)
    checkpoint = open_checkpoint(path)
    change(path)
    with uploader(checkpoint, threads=2) as stream, pytest.raises(ModelFileError, match=said) as caught:
        stream.load("layers.1.down")
    assert "m.gguf" in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name == "ragate-upload"]


def test_a_file_that_shrinks_between_two_pieces_is_refused(tmp_path: Path):
    path = tmp_path / "w.bin"
    path.write_bytes(bytes(1000))
    stored = Stored(Source.of(path), 0, 1000, lambda data: data)
    with stored.source.open() as file:
        path.write_bytes(bytes(400))
        with pytest.raises(ModelFileError, match="became shorter"):
            stored.read_into(file, 200, torch.empty(800, dtype=torch.uint8))


def test_a_device_without_room_is_an_error_of_the_one_who_asks(quantized: Checkpoint, monkeypatch):
    def full(*size: int, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("none left")

    with uploader(quantized, ahead_bytes=0) as stream:
        monkeypatch.setattr(torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            stream.load("layers.0.q")


def test_leaving_early_ends_the_threads(quantized: Checkpoint):
    with uploader(quantized, chunk_bytes=64) as stream:
        stream.load("layers.0.q")
    assert not [thread for thread in threading.enumerate() if thread.name == "ragate-upload"]


def test_dense_weights_are_not_copied_again(tmp_path: Path):
    path = tmp_path / "w.bin"
    path.write_bytes(np.arange(8, dtype=np.float32).tobytes())
    seen: list[torch.Tensor] = []

    def decode(data: torch.Tensor) -> torch.Tensor:
        seen.append(data)
        return data.view(torch.float32)

    with Uploader({"w": Stored(Source.of(path), 0, 32, decode)}, ["w"], CPU) as stream:
        weight = stream.load("w")
    assert isinstance(weight, torch.Tensor)
    assert weight.data_ptr() == seen[0].data_ptr()
    assert weight.tolist() == list(range(8))
