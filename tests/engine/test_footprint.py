"""What weights take, worked out from headers: to the byte what a decoder holds, and what it takes to load them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from allocations import Allocations
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_cases import KINDS, Kind, random_weight
from test_packed import RECIPES, folder
from tiny_gguf import write_tiny

from bench.random_model import LLAMA_8B, QWEN_1_5B, TINY, write_safetensors
from ragate_engine import Engine, EngineConfig, open_checkpoint
from ragate_engine.config import ModelConfig
from ragate_engine.footprint import INT4, Kept, WeightBytes, file_bytes, forms_of, weight_bytes
from ragate_engine.layers import Keep, Linear
from ragate_engine.model import Decoder
from ragate_engine.quant.formats import FORMATS, form_of
from ragate_engine.quant.formats import Kind as Stored
from ragate_engine.quant.tensor import Form, QuantTensor
from ragate_engine.weights import Checkpoint, names
from ragate_engine.weights.gguf_write import MIXES

CPU = torch.device("cpu")
MODEL = replace(
    TINY, vocab_size=64, hidden_size=512, intermediate_size=1024, num_heads=8, num_kv_heads=4, head_dim=64
)


def triton_kernels() -> Any:
    pytest.importorskip("triton")
    from ragate_engine.kernels import triton

    return triton


# --- by hand ----------------------------------------------------------------------------------------------


def test_llama_3_8b_on_a_card_worked_out_by_hand() -> None:
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    table, norms = 128256 * 4096, 65 * 4096
    turns = 32 * 128 * (6144 + 2 * 4096) // 64  # counts for 32 tiles of every 64 rows of qkv, o and down
    plain = weight_bytes(LLAMA_8B, forms_of(LLAMA_8B, "bf16"), "bf16")
    assert plain == WeightBytes(held=2 * (layers + 2 * table + norms), read=2 * (layers + table + norms))
    # 8 bits and a bfloat16 scale for 32 weights; the embedding is unpacked
    packed = weight_bytes(LLAMA_8B, forms_of(LLAMA_8B, "Q8_0"), "packed")
    assert packed.read == (layers + table) * 34 // 32 + 2 * norms + turns
    assert packed.held == packed.read + 2 * table
    # codes, and a scale and a zero of two bytes each for 128 weights; the head stays as it is
    int4 = weight_bytes(LLAMA_8B, forms_of(LLAMA_8B, INT4), "packed")
    assert int4.read == layers // 2 + layers // 128 * 4 + 2 * (table + norms) + turns
    # a byte a weight, and a float32 scale for each row; embedding and head stay as they are
    rows = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    int8 = weight_bytes(LLAMA_8B, forms_of(LLAMA_8B, "Q8_0"), "int8")
    assert int8.held == layers + 4 * rows + 2 * (2 * table + norms)
    # unpacked it is as large as it was
    assert weight_bytes(LLAMA_8B, forms_of(LLAMA_8B, "Q2_K"), "bf16") == plain


def test_a_tied_table_is_held_once_unless_it_is_packed_for_the_head() -> None:
    table = QWEN_1_5B.vocab_size * QWEN_1_5B.hidden_size
    plain = weight_bytes(QWEN_1_5B, forms_of(QWEN_1_5B, "bf16"), "bf16")
    assert plain.held == plain.read
    int4 = weight_bytes(QWEN_1_5B, forms_of(QWEN_1_5B, INT4), "packed")
    assert int4.held == int4.read
    packed = weight_bytes(QWEN_1_5B, forms_of(QWEN_1_5B, "Q8_0"), "packed")
    assert packed.held == packed.read + 2 * table


# --- what headers say --------------------------------------------------------------------------------------


def assert_as_loaded(checkpoint: Checkpoint) -> None:
    """Every form is what the loaded tensor is."""
    forms = checkpoint.forms
    assert forms.keys() == checkpoint.names
    for name, form in forms.items():
        weight = checkpoint.load(name)
        if isinstance(weight, QuantTensor):
            assert (form.bits, form.group) == (weight.bits, weight.group), name
            assert form.beside or weight.offsets is None, name  # zeros that are all the middle are dropped
            assert form.ordered or weight.order is None, name
        else:
            assert form.bits == 0, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_form_of_a_folders_weights_is_known_before_they_are_read(recipe: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder(tmp_path / "q", recipe, plain=("v_proj",)).write())
    assert_as_loaded(checkpoint)
    stored = sum(file.stat().st_size for file in checkpoint.files if file.suffix == ".safetensors")
    assert file_bytes(checkpoint.config, checkpoint.forms) == pytest.approx(
        stored, rel=0.15
    )  # less the header


def test_the_form_of_a_gguf_files_weights_is_known_before_they_are_read(tmp_path: Path) -> None:
    kinds = [kind for kind in FORMATS if FORMATS[kind].block_weights == 32 and kind != Stored.IQ4_NL]
    leaves = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_down")
    chosen = {
        f"blk.1.{leaf}.weight": gguf.GGMLQuantizationType(int(kind))
        for leaf, kind in zip(leaves, kinds, strict=False)
    }
    write_tiny(tmp_path / "m.gguf", kinds=chosen)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert_as_loaded(checkpoint)
    tensors = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert file_bytes(checkpoint.config, checkpoint.forms) == sum(int(tensor.n_bytes) for tensor in tensors)


def test_offsets_stand_beside_the_scales_of_the_formats_that_have_minima() -> None:
    assert {kind.name for kind in FORMATS if form_of(kind).beside} == {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_is_described_as_it_is_written(mix: str) -> None:
    forms = forms_of(LLAMA_8B, mix)
    assert forms["layers.5.q"] == form_of(MIXES[mix][1])
    assert forms["final_norm"] == Form(4)
    phi = replace(LLAMA_8B, arch="phi3")
    assert forms_of(phi, mix)["layers.5.q"] == forms_of(phi, mix)["layers.5.v"]


# --- what a decoder holds -----------------------------------------------------------------------------------


@dataclass
class Made:
    """A weight that is made, with the form that a header would state."""

    weight: QuantTensor | torch.Tensor
    form: Form

    def __call__(self) -> QuantTensor | torch.Tensor:
        return self.weight


def made(kind: Kind | None, shape: tuple[int, ...], seed: int) -> Made:
    if kind is None or len(shape) == 1:
        return Made(torch.ones(shape, dtype=torch.bfloat16), Form(2))
    weight = random_weight(kind._replace(ordered=False), *shape, seed=seed)
    if kind.ordered:  # the same for all that share an input
        weight = replace(weight, order=torch.arange(shape[1] - 1, -1, -1))
    form = Form(1.0, weight.bits, weight.group, weight.offsets is not None, kind.ordered)
    return Made(weight, form)


def bytes_of(found: Any) -> Iterator[tuple[int, int]]:
    """Address and bytes of every tensor in what kernels packed."""
    if isinstance(found, torch.Tensor):
        yield found.untyped_storage().data_ptr(), found.untyped_storage().nbytes()
    elif isinstance(found, tuple):
        for part in found:
            yield from bytes_of(part)
    elif hasattr(found, "__dataclass_fields__"):
        for field in fields(found):
            yield from bytes_of(getattr(found, field.name))


def held_by(decoder: Decoder, config: ModelConfig) -> int:
    """Bytes of a decoder's weights; of a table that a CPU keeps quantized, those of the dense one of a card."""
    products: list[Any] = [
        p for layer in decoder.layers for p in (layer.qkv, layer.o, layer.gated, layer.down)
    ]
    parts = [
        found
        for product in [*products, decoder.head]
        for found in (
            product.kept.weights if product.kept else product.packed,
            getattr(product, "bias", None),
        )
    ]
    parts += [norm for layer in decoder.layers for norm in (layer.attn_norm, layer.mlp_norm)]
    parts.append(decoder.final_norm)
    table = decoder.embedding.weight
    dense = 2 * config.vocab_size * config.hidden_size if isinstance(table, QuantTensor) else 0
    if not dense:
        parts.append(table)
    return dense + sum(dict(pair for part in parts for pair in bytes_of(part)).values())


KINDS_AND_OTHERS = [*KINDS, Kind(4, 8), None]
"""Also what the card's kernels do not take, and plain floats."""
KEEPS: dict[Keep, Kept] = {"dense": "bf16", "packed": "packed", "int8": "int8"}


@pytest.mark.parametrize("keep", KEEPS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_decoder_holds_to_the_byte_what_was_worked_out(keep: Keep, data: st.DataObject) -> None:
    kernels = triton_kernels()
    config = replace(
        MODEL,
        num_layers=1,
        tie_embeddings=data.draw(st.booleans()),
        qkv_bias=data.draw(st.booleans()),
        vocab_size=data.draw(st.sampled_from([64, 72])),
    )
    one = data.draw(st.sampled_from(KINDS_AND_OTHERS))
    kinds = st.sampled_from([one, one, one, data.draw(st.sampled_from(KINDS_AND_OTHERS))])
    shapes = names.expected(config)
    tensors = {name: made(data.draw(kinds), shape, i) for i, (name, shape) in enumerate(shapes.items())}
    decoder = Decoder(config, lambda name: tensors[name](), kernels, torch.bfloat16, CPU, 16, keep=keep)
    forms = {name: tensor.form for name, tensor in tensors.items()}
    found = weight_bytes(config, forms, KEEPS[keep])
    quantized_on_cpu = tensors["embed"].form.bits and config.tie_embeddings and keep != "packed"
    # a CPU keeps the quantized table, so that the dense head is no part of it
    again = 2 * config.vocab_size * config.hidden_size if quantized_on_cpu else 0
    assert found.held + again == held_by(decoder, config)


@pytest.mark.parametrize("width", [2048, 2080, 4128])
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_packed_codes_take_what_the_kernels_layout_of_them_does(kind: Stored, width: int) -> None:
    form, kernels = form_of(kind), triton_kernels()
    groups = torch.ones(32, width // form.group)
    codes = torch.zeros(32, width, dtype=torch.uint8 if form.beside else torch.int8)
    weight = QuantTensor(
        form.bits, form.group, codes, groups, groups * 0.3 if form.beside else None, (32, width)
    )
    held = sum(size for _, size in bytes_of(kernels.pack_quantized([weight])))
    config = replace(MODEL, vocab_size=32, hidden_size=width)
    head = {name: Form(2) for name in names.expected(config)} | {"lm_head": form}
    without = weight_bytes(config, head | {"lm_head": Form(2)}, "packed").read - 2 * 32 * width
    assert weight_bytes(config, head, "packed").read - without == held
    assert form.size == FORMATS[kind].block_bytes / FORMATS[kind].block_weights


@pytest.mark.parametrize("stored", ["gguf", "folder"])
def test_on_a_cpu_weights_take_what_a_running_engine_holds(stored: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    if stored == "folder":
        path = tmp_path / "folder"
        write_safetensors(replace(TINY, intermediate_size=120), path)
    else:
        quantized = ("token_embd.weight", "blk.0.ffn_up.weight")
        kinds = dict(
            zip(quantized, (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1), strict=True)
        )
        write_tiny(path, kinds=kinds)
    checkpoint = open_checkpoint(path)
    with Engine(checkpoint, EngineConfig(device="cpu", kv_bytes=1 << 20)) as engine:
        decoder = engine._runner.decoder
        if engine._runner.backend.startswith("reference"):
            pytest.skip("the plain kernels have another layout")
        products = [p for layer in decoder.layers for p in (layer.qkv, layer.o, layer.gated, layer.down)]
        held = sum(product.packed.panels.nbytes for product in [*products, decoder.head])
        norms = [norm for layer in decoder.layers for norm in (layer.attn_norm, layer.mlp_norm)]
        held += sum(norm.nbytes for norm in [*norms, decoder.final_norm]) + decoder.embedding.weight.nbytes
    assert weight_bytes(checkpoint.config, checkpoint.forms, "float32").held == held


# --- what loading takes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", [Kind(4, 128, "zero"), Kind(6, 16)])
def test_weights_are_made_one_product_at_a_time(keep: Keep, kind: Kind) -> None:
    """Beside what stays, loading takes what one product does: the same for any number of layers."""
    kernels = triton_kernels()
    most = []
    for layers in (1, 4):
        config = replace(MODEL, num_layers=layers)
        shapes = names.expected(config)
        with torch.inference_mode(), Allocations() as allocations:

            def load(name: str, shapes: dict[str, tuple[int, ...]] = shapes) -> QuantTensor | torch.Tensor:
                return made(kind if name.startswith("layers") else None, shapes[name], 0)()

            decoder = Decoder(config, load, kernels, torch.bfloat16, CPU, 16, keep=keep)
            most.append(allocations.most - allocations.alive)
        assert len(decoder.layers) == layers
    pair = 2 * config.intermediate_size * config.hidden_size
    assert most[0] == pytest.approx(most[1], abs=0.02 * pair)
    assert most[1] < 9 * pair


def test_a_large_head_is_packed_while_there_is_room() -> None:
    config = replace(MODEL, vocab_size=8192, num_layers=16)
    shapes = names.expected(config)
    stored = {shape: made(Kind(6, 16), shape, 0)() for shape in set(shapes.values())}
    with torch.inference_mode(), Allocations() as allocations:

        def load(name: str) -> QuantTensor | torch.Tensor:
            weight = stored[shapes[name]]
            if isinstance(weight, torch.Tensor) or name == "embed":
                return torch.zeros(shapes[name], dtype=torch.bfloat16)
            return replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone())

        decoder = Decoder(config, load, triton_kernels(), torch.bfloat16, CPU, 16, keep="packed")
        extra = allocations.most - allocations.alive
    assert decoder.head.kept is not None
    # packing takes some 7 bytes for each weight of the head, which are as many as in four pairs
    assert extra < 9 * 2 * config.intermediate_size * config.hidden_size


def test_a_product_of_several_weights_holds_no_copy_of_them() -> None:
    weights = [random_weight(Kind(4, 128), 256, 512, seed) for seed in range(3)]
    with torch.inference_mode(), Allocations() as allocations:
        linear = Linear(list(weights), [], triton_kernels(), torch.bfloat16, CPU, "packed")
    assert linear.kept is not None
    assert allocations.alive == sum(size for _, size in bytes_of(linear.kept.weights))
