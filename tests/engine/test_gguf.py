"""GGUF files: configuration, names, un-permuted rows, and every way in which a file can be broken."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import cached_model
from tiny_gguf import HEAD_DIM, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, write_tiny

from ragate_engine import ModelFileError
from ragate_engine.config import RopeConfig
from ragate_engine.weights import Checkpoint, names, open_checkpoint
from ragate_engine.weights.gguf import quantization, read_header

if TYPE_CHECKING:
    from pathlib import Path


def dense(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of the checkpoint in float32, whatever form it is stored in."""
    tensor = checkpoint.load(name)
    return tensor if isinstance(tensor, torch.Tensor) else tensor.dequantize()


def refusal(path: Path, **changes) -> str:
    """What opening a tiny model with these changes says."""
    write_tiny(path, **changes)
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert path.name in text
    assert "\n" not in text
    return text


def test_the_header_reads_as_the_gguf_package_reads_it(tmp_path):
    write_tiny(tmp_path / "m.gguf", kinds={"blk.0.ffn_up.weight": Kind.Q5_1})
    ours, theirs = read_header(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    stated = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == stated
    assert {(t.name, t.kind, t.offset, t.nbytes) for t in ours.tensors.values()} == {
        (t.name, t.tensor_type, t.data_offset, t.n_bytes) for t in theirs.tensors
    }


def test_a_llama_file_gives_its_weights_with_q_and_k_in_plain_order(tmp_path):
    weights = write_tiny(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.names == set(names.expected(checkpoint.config))
    for stored, array in weights.items():
        assert torch.equal(dense(checkpoint, names.from_gguf(stored)), torch.from_numpy(array)), stored


def test_rows_of_a_quantized_q_are_put_back_in_order_without_loss(tmp_path):
    weights = write_tiny(tmp_path / "m.gguf", kinds={"blk.1.attn_q.weight": Kind.Q4_1})
    theirs = gguf.quants.dequantize(
        gguf.quants.quantize(weights["blk.1.attn_q.weight"], Kind.Q4_1), Kind.Q4_1
    )
    assert torch.equal(dense(open_checkpoint(tmp_path / "m.gguf"), "layers.1.q"), torch.from_numpy(theirs))


def test_a_qwen2_file_has_biases_and_keeps_its_rows_as_they_are(tmp_path):
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    sizes = {"q": q, "k": kv, "v": kv}
    biases = {
        f"blk.{i}.attn_{part}.bias": np.arange(sizes[part], dtype=np.float32)
        for i in range(LAYERS)
        for part in "qkv"
    }
    weights = write_tiny(tmp_path / "m.gguf", "qwen2", tensors=biases)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config.qkv_bias
    for stored, array in weights.items():
        assert torch.equal(dense(checkpoint, names.from_gguf(stored)), torch.from_numpy(array)), stored


def test_a_phi3_file_has_its_fused_matrices_split(tmp_path):
    rng = np.random.default_rng(5)
    rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    changes: dict[str, np.ndarray | None] = {}
    for i in range(LAYERS):
        changes |= {f"blk.{i}.{name}.weight": None for name in ("attn_q", "attn_k", "attn_v", "ffn_gate")}
        changes[f"blk.{i}.attn_qkv.weight"] = rng.standard_normal((rows, HIDDEN)).astype(np.float32)
        changes[f"blk.{i}.ffn_up.weight"] = rng.standard_normal((2 * INNER, HIDDEN)).astype(np.float32)
    write_tiny(tmp_path / "m.gguf", "phi3", tensors=changes, metadata={"phi3.attention.sliding_window": 7})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    fused = [dense(checkpoint, f"layers.1.{part}") for part in "qkv"]
    assert torch.equal(torch.cat(fused), torch.from_numpy(changes["blk.1.attn_qkv.weight"]))
    stacked = torch.cat([dense(checkpoint, "layers.0.gate"), dense(checkpoint, "layers.0.up")])
    assert torch.equal(stacked, torch.from_numpy(changes["blk.0.ffn_up.weight"]))
    assert checkpoint.config.window == 7


def test_a_gemma3_file_is_configured_as_gemma3(tmp_path):
    extra = {
        f"blk.{i}.{name}.weight": np.ones(size, np.float32)
        for i in range(LAYERS)
        for name, size in (("post_attention_norm", HIDDEN), ("post_ffw_norm", HIDDEN),
                           ("attn_q_norm", HEAD_DIM), ("attn_k_norm", HEAD_DIM))
    }  # fmt: skip
    stated = {
        "gemma3.attention.key_length": HEAD_DIM,
        "gemma3.attention.value_length": HEAD_DIM,
        "gemma3.attention.sliding_window": 8,
        "gemma3.rope.freq_base": 1e6,
    }
    write_tiny(tmp_path / "m.gguf", "gemma3", tokenizer="llama", tensors=extra, metadata=stated)
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert (config.qk_norm, config.sandwich_norm, config.activation) == (True, True, "gelu_tanh")
    assert (config.embed_scale, config.attn_scale) == (math.sqrt(HIDDEN), HEAD_DIM**-0.5)
    assert (config.window, config.window_layers) == (8, (True, True))
    assert config.rope_of(0) == RopeConfig(theta=10_000.0)
    assert config.rope.theta == 1e6
    assert config.attn_soft_cap is None


def test_a_gemma2_file_is_configured_as_gemma2(tmp_path):
    posts = {
        f"blk.{i}.{name}.weight": np.ones(HIDDEN, np.float32)
        for i in range(LAYERS)
        for name in ("post_attention_norm", "post_ffw_norm")
    }
    stated = {"gemma2.attention.sliding_window": 8, "gemma2.attn_logit_softcapping": 40.0}
    write_tiny(tmp_path / "m.gguf", "gemma2", tokenizer="llama", tensors=posts, metadata=stated)
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert (config.window_of(0), config.window_of(1)) == (8, None)
    assert (config.attn_soft_cap, config.logit_soft_cap) == (40.0, 30.0)
    assert (config.qk_norm, config.sandwich_norm, config.local_rope) == (False, True, None)


def test_a_qwen3_file_normalizes_its_heads(tmp_path):
    norms = {
        f"blk.{i}.attn_{part}_norm.weight": np.full(HEAD_DIM, 2.0, np.float32)
        for i in range(LAYERS)
        for part in "qk"
    }
    write_tiny(tmp_path / "m.gguf", "qwen3", tensors=norms, metadata={"qwen3.rope.freq_base": 1e6})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert (checkpoint.config.qk_norm, checkpoint.config.qkv_bias, checkpoint.config.rope.theta) == (
        True,
        False,
        1e6,
    )
    assert torch.equal(checkpoint.load("layers.1.k_norm"), torch.full((HEAD_DIM,), 2.0))


def test_the_real_gemma_slides_on_all_layers_but_each_sixth():
    config = open_checkpoint(cached_model("gemma-3-270m")).config
    assert [i for i in range(config.num_layers) if config.window_of(i) is None] == [5, 11, 17]
    assert config.window == 512
    assert (config.rope_of(5).theta, config.rope_of(4).theta) == (1_000_000.0, 10_000.0)


def test_the_scaled_rope_of_llama_3_is_found_from_its_divisors(tmp_path):
    turns = 8192 * 500_000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM) / (2 * math.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    divisors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    base = {"llama.rope.freq_base": 500_000.0}
    write_tiny(tmp_path / "m.gguf", metadata=base, tensors={"rope_freqs.weight": divisors})
    rope = open_checkpoint(tmp_path / "m.gguf").config.rope
    assert rope == RopeConfig(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    divisors[3] *= 1.5
    text = refusal(tmp_path / "n.gguf", metadata=base, tensors={"rope_freqs.weight": divisors})
    assert "rope_freqs" in text


def test_an_output_matrix_of_its_own_unties_the_embedding(tmp_path):
    head = np.zeros((266, HIDDEN), np.float32)
    write_tiny(tmp_path / "m.gguf", tensors={"output.weight": head})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert not checkpoint.config.tie_embeddings
    assert checkpoint.load("lm_head").shape == (266, HIDDEN)
    write_tiny(tmp_path / "n.gguf")
    assert "lm_head" not in open_checkpoint(tmp_path / "n.gguf").names


def test_identity_is_the_sha256_of_the_file(tmp_path):
    write_tiny(tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    assert open_checkpoint(tmp_path / "m.gguf").identity == hashlib.sha256(raw).hexdigest()


def test_every_recipe_has_the_name_that_llama_cpp_gives_it(tmp_path):
    write_tiny(tmp_path / "m.gguf")
    file = read_header(tmp_path / "m.gguf")
    recipes = [recipe for recipe in gguf.LlamaFileType if recipe.value <= 40 or recipe.value == 1024]
    assert len(recipes) > 30
    for recipe in recipes:
        named = quantization(replace(file, metadata={"general.file_type": recipe.value}))
        assert named == recipe.name.removeprefix("MOSTLY_").removeprefix("ALL_")
    for unknown in (5, 33, 99, -1, "15", None):
        assert quantization(replace(file, metadata={"general.file_type": unknown})) == "F32"


def test_the_quantization_is_named_by_the_file_or_by_most_of_its_matrices(tmp_path):
    write_tiny(tmp_path / "m.gguf", metadata={"general.file_type": 15})
    assert open_checkpoint(tmp_path / "m.gguf").quantization == "Q4_K_M"
    leaves = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_down")
    kinds = {f"blk.{i}.{leaf}.weight": Kind.Q8_0 for i in range(LAYERS) for leaf in leaves}
    write_tiny(tmp_path / "n.gguf", metadata={"general.file_type": None}, kinds=kinds)
    assert open_checkpoint(tmp_path / "n.gguf").quantization == "Q8_0"


# --- what is refused ------------------------------------------------------------------------------------


def test_an_architecture_we_do_not_serve_is_named_beside_those_we_do(tmp_path):
    text = refusal(tmp_path / "m.gguf", arch="mamba")
    assert "'mamba'" in text
    assert "qwen2" in text


def test_a_tensor_type_we_do_not_read_is_named_with_the_way_out(tmp_path):
    path = tmp_path / "m.gguf"
    write_tiny(path)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"blk.1.ffn_down.weight") + len("blk.1.ffn_down.weight") + 4 + 16
    assert struct.unpack_from("<I", raw, at) == (0,)
    struct.pack_into("<I", raw, at, Kind.IQ4_XS)
    path.write_bytes(raw)
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_down\.weight has type IQ4_XS.*Q4_K_M"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metadata": {"llama.block_count": None}}, "llama.block_count is missing"),
        ({"metadata": {"llama.block_count": 3}}, "lacks the tensor layers.2."),
        ({"metadata": {"llama.block_count": 4_000_000_000}}, "cannot be"),
        ({"metadata": {"llama.block_count": "two"}}, "expected int"),
        ({"metadata": {"llama.embedding_length": 128}}, "has shape"),
        ({"metadata": {"llama.attention.head_count": 64 * 3}}, "cannot be turned"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "not a multiple"),
        ({"metadata": {"llama.attention.layer_norm_rms_epsilon": math.nan}}, "finite"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"metadata": {"split.count": 3}}, "llama-gguf-split"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "yarn"),
        ({"metadata": {"llama.rope.freq_base": 0.0}}, "rope"),
        ({"tensors": {"token_embd.weight": None}}, "token_embd.weight"),
        ({"tensors": {"token_embd.weight": np.ones((265, HIDDEN), np.float32)}}, "266 tokens but 265 embeddings"),
        ({"tensors": {"blk.0.attn_q.weight": None}}, "lacks the tensor layers.0.q"),
        ({"tensors": {"blk.0.ssm_a.weight": np.ones(8, np.float32)}}, "blk.0.ssm_a.weight"),
        ({"tensors": {"blk.7.attn_norm.weight": np.ones(HIDDEN, np.float32)}}, "no place"),
        ({"metadata": {"tokenizer.ggml.pre": "klingon"}}, "klingon"),
        ({"metadata": {"tokenizer.ggml.model": "bert"}}, "'bert'"),
        ({"metadata": {"tokenizer.ggml.tokens": None}}, "tokenizer.ggml.tokens is missing"),
        ({"metadata": {"tokenizer.ggml.merges": None}}, "tokenizer.ggml.merges is missing"),
        ({"metadata": {"tokenizer.ggml.merges": ["zz yy"]}}, "merges do not fit"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 9999}}, "beyond its 266 tokens"),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused_in_one_sentence(tmp_path, changes, said):
    assert said in refusal(tmp_path / "m.gguf", **changes)


def test_a_file_of_another_kind_is_refused(tmp_path):
    for content in (b"", b"PK\x03\x04 not a model", b"GG", b"GGUF", b"GGUF\x01\x00\x00\x00" + bytes(64)):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(ModelFileError, match=r"m\.gguf"):
            open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(ModelFileError, match="does not exist"):
        open_checkpoint(tmp_path / "absent.gguf")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write_tiny(tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, len(raw), 1499), len(raw) - 64]:
        cut.write_bytes(raw[:size])
        with pytest.raises(ModelFileError, match=r"cut\.gguf"):
            open_checkpoint(cut)


@pytest.mark.parametrize("change", [lambda raw: raw[:20_000], lambda raw: raw[:-8] + bytes(8)])
def test_a_file_that_changes_after_it_was_opened_is_refused_when_read(tmp_path, change):
    path = tmp_path / "m.gguf"
    write_tiny(path)
    os.utime(path, ns=(0, 0))
    checkpoint = open_checkpoint(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ModelFileError, match="changed while it was read"):
        checkpoint.load("layers.1.down")


@pytest.mark.parametrize("offset", [8, 16])
def test_counts_that_the_file_cannot_hold_are_refused_at_once(tmp_path, offset):
    write_tiny(tmp_path / "m.gguf")
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    for count in (2**63, 2**40, 2**23):
        struct.pack_into("<Q", raw, offset, count)
        (tmp_path / "m.gguf").write_bytes(raw)
        with pytest.raises(ModelFileError, match="claims"):
            open_checkpoint(tmp_path / "m.gguf")


def test_an_array_longer_than_the_file_is_refused_at_once(tmp_path):
    write_tiny(tmp_path / "m.gguf")
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    at = raw.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    struct.pack_into("<Q", raw, at, 2**60)
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(ModelFileError, match="claims"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[bytes]:
    """Tiny whole files of both tokenizer kinds, quantized in part."""
    folder = tmp_path_factory.mktemp("originals")
    kinds = {"blk.0.attn_q.weight": Kind.Q4_0, "blk.1.ffn_up.weight": Kind.Q8_0}
    write_tiny(folder / "a.gguf", kinds=kinds)
    write_tiny(folder / "b.gguf", tokenizer="llama", kinds=kinds)
    return [(folder / name).read_bytes() for name in ("a.gguf", "b.gguf")]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_loads_or_is_refused_but_never_crashes(originals, tmp_path, data):
    raw = bytearray(originals[data.draw(st.integers(0, 1))])
    header = raw.index(b"blk.1.ffn_down.weight") + 64
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(raw) - 8)))
        extremes = st.sampled_from([bytes(8), b"\xff" * 8, b"\xff" * 4, bytes(4)])
        value = data.draw(st.binary(min_size=1, max_size=1) | st.binary(min_size=8, max_size=8) | extremes)
        raw[at : at + len(value)] = value
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    said = path.name
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names:
            checkpoint.load(name)
        checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("hello world 12"))
    except ModelFileError as error:
        said = str(error)
    assert path.name in said


# --- against transformers -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen-0.5b", "gemma-3-270m"])
def test_every_weight_equals_that_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    path = cached_model(name)
    checkpoint = open_checkpoint(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    theirs = model.state_dict()
    gemma = checkpoint.config.sandwich_norm
    seen = set()
    for stored, weights in theirs.items():
        name = names.from_hf(stored, gemma)
        if name == "lm_head" and checkpoint.config.tie_embeddings:
            continue
        seen.add(name)
        ours = dense(checkpoint, name)
        assert torch.equal(ours - 1 if gemma and name.endswith("norm") else ours, weights), stored
    assert seen == checkpoint.names
