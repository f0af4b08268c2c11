"""Embedding, final norm and head of a quantized folder: safetensors' own bytes, written one tensor at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from allocations import Allocations
from safetensors.torch import load_file, save
from tiny_folder import save_tiny
from tiny_gguf import write_tiny

from bench.random_model import TINY, random_checkpoint
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.quantize import write
from ragate_engine.quantize.write import dense_tensor, write_top
from ragate_engine.weights import Checkpoint, open_checkpoint


def at_once(source: Checkpoint) -> dict[str, torch.Tensor]:
    """All of them in memory, by the names in the file."""
    found = {}
    for name in source.names & {"embed", "final_norm", "lm_head"}:
        weight = source.load(name)
        plain = weight.dequantize(torch.float16) if isinstance(weight, QuantTensor) else weight
        found |= dense_tensor(source.config, name, plain)
    return found


@pytest.mark.parametrize("pieces", [1000, 1 << 24])
@pytest.mark.parametrize("kind", ["gguf", "gguf, untied", "llama", "qwen2", "gemma3"])
def test_the_file_is_the_one_that_safetensors_writes(
    kind: str, pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_PIECE_WEIGHTS", pieces)
    if kind.startswith("gguf"):
        tables = ["token_embd.weight", "output.weight"] if kind == "gguf, untied" else ["token_embd.weight"]
        tensors = {"output.weight": torch.randn(266, 64).numpy()} if len(tables) == 2 else {}
        write_tiny(
            tmp_path / "m.gguf",
            tensors=tensors,
            kinds=dict.fromkeys(tables, gguf.GGMLQuantizationType.Q8_0),
        )
        source = open_checkpoint(tmp_path / "m.gguf")
    else:
        save_tiny(tmp_path, kind, torch.bfloat16)
        source = open_checkpoint(tmp_path)
    found = write_top(tmp_path / "top.safetensors", source)
    wanted = at_once(source)
    assert found == sorted(wanted) == sorted(load_file(tmp_path / "top.safetensors"))
    assert len(wanted) == 2 + (not source.config.tie_embeddings)
    assert (tmp_path / "top.safetensors").read_bytes() == save(wanted, {"format": "pt"})
    assert not list(tmp_path.glob("*.partial"))


def test_never_more_than_one_table_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_PIECE_WEIGHTS", 1 << 12)
    config = replace(TINY, vocab_size=4096, hidden_size=64)
    source = random_checkpoint(config, quantized="q8_0")
    assert isinstance(source.load("embed"), QuantTensor) and isinstance(source.load("lm_head"), QuantTensor)
    with Allocations() as drawing:
        source.load("embed")
    with Allocations() as writing:
        write_top(tmp_path / "top.safetensors", source)
    # a few rows besides: codes, float32, float16
    assert writing.most < drawing.most + 8 * (1 << 12)
