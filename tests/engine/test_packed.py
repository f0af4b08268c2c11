"""AWQ, GPTQ and compressed-tensors: weights of the published unpacking to the bit, and folders that open and run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_against_transformers import logits_of

from ragate_engine import ModelFileError
from ragate_engine.quant.packed import (
    pack_awq,
    pack_gptq,
    pack_words,
    unpack_awq,
    unpack_compressed,
    unpack_gptq,
    unpack_int8,
    unpack_words,
)
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.weights import open_checkpoint
from ragate_engine.weights.stream import Uploader

Tensors = dict[str, torch.Tensor]

# --- the published unpackings, as they stand ------------------------------------------------------------


def published_awq(parts: Tensors, group: int) -> torch.Tensor:
    """AutoAWQ, awq/utils/packing_utils.py: `unpack_awq`, `reverse_awq_order` and `dequantize_gemm`, 4 bits."""
    shifts = torch.arange(0, 32, 4)
    codes, zeros = (
        torch.bitwise_right_shift(parts[key][:, :, None], shifts[None, None, :]).to(torch.int8).flatten(1)
        for key in ("qweight", "qzeros")
    )
    order = torch.arange(codes.shape[1]).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].view(-1)
    codes, zeros = codes[:, order] & 15, zeros[:, order] & 15
    group = codes.shape[0] if group == -1 else group
    return ((codes - zeros.repeat_interleave(group, 0)) * parts["scales"].repeat_interleave(group, 0)).T


def published_gptq(parts: Tensors, bits: int, version: int) -> torch.Tensor:
    """AutoGPTQ, qlinear_cuda.py, `forward`; version 2 leaves its `zeros + 1` out, as GPTQModel does."""
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    if bits == 3:
        shifts = torch.tensor(
            [
                [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0],
                [0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31],
                [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0],
            ],
            dtype=torch.int32,
        ).reshape(1, 3, 12)
        zeros = qzeros.reshape(len(qzeros), -1, 3, 1).expand(-1, -1, -1, 12) >> shifts.unsqueeze(0)
        zeros[:, :, 0, 10] = (zeros[:, :, 0, 10] & 0x3) | ((zeros[:, :, 1, 0] << 2) & 0x4)
        zeros[:, :, 1, 11] = (zeros[:, :, 1, 11] & 0x1) | ((zeros[:, :, 2, 0] << 1) & 0x6)
        zeros = zeros & 0x7
        zeros = torch.cat([zeros[:, :, 0, :11], zeros[:, :, 1, 1:12], zeros[:, :, 2, 1:11]], dim=2)
        weight = qweight.reshape(-1, 3, 1, qweight.shape[1]).expand(-1, -1, 12, -1)
        weight = (weight >> shifts.unsqueeze(-1)) & 0x7
        weight[:, 0, 10] = (weight[:, 0, 10] & 0x3) | ((weight[:, 1, 0] << 2) & 0x4)
        weight[:, 1, 11] = (weight[:, 1, 11] & 0x1) | ((weight[:, 2, 0] << 1) & 0x6)
        weight = weight & 0x7
        weight = torch.cat([weight[:, 0, :11], weight[:, 1, 1:12], weight[:, 2, 1:11]], dim=1)
    else:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32).unsqueeze(0)
        zeros = (qzeros.unsqueeze(2).expand(-1, -1, 32 // bits) >> shifts.unsqueeze(0)) & (2**bits - 1)
        weight = (qweight.unsqueeze(1).expand(-1, 32 // bits, -1) >> shifts.unsqueeze(-1)) & (2**bits - 1)
    if version == 1:
        zeros = (zeros + 1) & (2**bits - 1)
    zeros = zeros.reshape(scales.shape)
    weight = weight.reshape(-1, weight.shape[2])
    g_idx = parts["g_idx"].long()
    return (scales[g_idx] * (weight - zeros[g_idx])).T


def published_pack(value: torch.Tensor, bits: int, dim: int = 1) -> torch.Tensor:
    """compressed-tensors, pack_quantized.py: `pack_to_int32` of signed values."""
    value = (value.int() + (1 << (bits - 1))).to(torch.uint8)
    value = value.T.contiguous() if dim == 0 else value
    value = torch.nn.functional.pad(value, (0, -value.shape[1] % (32 // bits)))
    fields = value.view(len(value), -1, 32 // bits).to(torch.int32)
    packed = (fields << torch.arange(32 // bits, dtype=torch.int32) * bits).sum(dim=2, dtype=torch.int32)
    return (packed.T if dim == 0 else packed).contiguous()


def published_unpack(value: torch.Tensor, bits: int, shape: torch.Size, dim: int = 1) -> torch.Tensor:
    """compressed-tensors, pack_quantized.py: `unpack_from_int32`, to signed values."""
    factor, mask = 32 // bits, (1 << bits) - 1
    value = value.T if dim == 0 else value
    unpacked = torch.zeros((value.shape[0], value.shape[1] * factor), dtype=torch.int32)
    for i in range(factor):
        unpacked[:, i::factor] = (value >> (bits * i)) & mask
    unpacked = (unpacked.T if dim == 0 else unpacked)[: shape[0], : shape[1]]
    return (unpacked - 2**bits // 2).to(torch.int8)


def published_dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, g_idx: torch.Tensor | None
) -> torch.Tensor:
    """compressed-tensors, lifecycle/forward.py: `dequantize` by groups, in the order that g_idx gives the columns."""
    group = codes.shape[1] // scales.shape[1]
    order = torch.arange(codes.shape[1]) if g_idx is None else torch.argsort(g_idx)
    out = codes[:, order].to(scales.dtype)
    if zeros is not None:
        out = out - zeros.to(scales.dtype).repeat_interleave(group, 1)
    return (out * scales.repeat_interleave(group, 1))[:, torch.argsort(order)]


# --- tensors of every kind ------------------------------------------------------------------------------

SIZES = st.sampled_from([32, 64, 96])
SEEDS = st.integers(0, 2**32)


def words(random: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=random).int()


def scales_of(random: torch.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Of all magnitudes that float16 has, subnormal ones too."""
    return torch.exp2(
        torch.randint(-22, 8, shape, generator=random) + torch.rand(shape, generator=random)
    ).to(dtype)


def groups_in_any_order(random: torch.Generator, width: int, groups: int) -> torch.Tensor:
    return (torch.arange(width) // (width // groups))[torch.randperm(width, generator=random)].int()


def awq_parts(random: torch.Generator, out: int, width: int, group: int) -> Tensors:
    groups = 1 if group == -1 else width // group
    return {
        "qweight": words(random, width, out // 8),
        "qzeros": words(random, groups, out // 8),
        "scales": scales_of(random, groups, out),
    }


def gptq_parts(
    random: torch.Generator, out: int, width: int, bits: int, group: int, act_order: bool
) -> Tensors:
    groups = 1 if group == -1 else width // group
    in_turn = torch.arange(width, dtype=torch.int32) // (width // groups)
    return {
        "qweight": words(random, width * bits // 32, out),
        "qzeros": words(random, groups, out * bits // 32),
        "scales": scales_of(random, groups, out),
        "g_idx": groups_in_any_order(random, width, groups) if act_order else in_turn,
    }


# --- bits -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(bits=st.integers(2, 8), blocks=st.integers(1, 3), seed=SEEDS)
def test_codes_are_one_stream_of_bits(bits: int, blocks: int, seed: int):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (2, 32 * blocks), generator=random, dtype=torch.uint8)
    packed = pack_words(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (2, bits * blocks)
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum((word % 2**32) << 32 * i for i, word in enumerate(stream))
        assert [number >> bits * i & (1 << bits) - 1 for i in range(len(row))] == row
    assert torch.equal(unpack_words(packed, bits), codes)


def test_codes_that_do_not_fill_words_are_refused():
    with pytest.raises(ValueError, match="do not fill"):
        pack_words(torch.zeros(2, 12, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="no whole number"):
        unpack_words(torch.zeros(2, 4, dtype=torch.int32), 3)


@settings(deadline=None)
@given(out=SIZES, width=SIZES, group=st.sampled_from([8, 32, -1]), seed=SEEDS)
def test_awq_weights_are_those_of_autoawq(out: int, width: int, group: int, seed: int):
    parts = awq_parts(torch.Generator().manual_seed(seed), out, width, group)
    weight = unpack_awq(parts, 4, group, "w")
    assert weight.shape == (out, width) and weight.group == (width if group == -1 else group)
    wide = {**parts, "scales": parts["scales"].float()}
    assert torch.equal(weight.dequantize(), published_awq(wide, group))
    assert torch.equal(weight.dequantize(torch.float16), published_awq(parts, group))


@settings(deadline=None)
@given(
    out=SIZES, width=SIZES, bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([8, 32, -1]),
    act_order=st.booleans(), version=st.sampled_from([1, 2]), seed=SEEDS,
)  # fmt: skip
def test_gptq_weights_are_those_of_autogptq(
    out: int, width: int, bits: int, group: int, act_order: bool, version: int, seed: int
):
    parts = gptq_parts(torch.Generator().manual_seed(seed), out, width, bits, group, act_order)
    weight = unpack_gptq(parts, bits, group, "w", version)
    wide = {**parts, "scales": parts["scales"].float()}
    assert torch.equal(weight.dequantize(), published_gptq(wide, bits, version))
    assert torch.equal(weight.dequantize(torch.float16), published_gptq(parts, bits, version))
    if not act_order:
        assert weight.order is None
        assert same(
            weight, unpack_gptq({k: v for k, v in parts.items() if k != "g_idx"}, bits, group, "w", version)
        )


@settings(deadline=None)
@given(
    out=st.integers(1, 40), groups=st.integers(1, 3), group=st.sampled_from([6, 16]), bits=st.sampled_from([4, 8]),
    zeros=st.sampled_from(["none", "packed", "plain"]), act_order=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_packed_weights_are_those_of_compressed_tensors(
    out: int, groups: int, group: int, bits: int, zeros: str, act_order: bool, seed: int
):
    random = torch.Generator().manual_seed(seed)
    low, high, width = -(1 << bits - 1), 1 << bits - 1, groups * group
    codes = torch.randint(low, high, (out, width), generator=random, dtype=torch.int8)
    zero = torch.randint(low, high, (out, groups), generator=random, dtype=torch.int8)
    parts = {
        "weight_packed": published_pack(codes, bits),
        "weight_scale": scales_of(random, out, groups, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([out, width]),
    }
    if zeros != "none":
        parts["weight_zero_point"] = published_pack(zero, bits, 0) if zeros == "packed" else zero
    if act_order:
        parts["weight_g_idx"] = groups_in_any_order(random, width, groups)
    assert torch.equal(published_unpack(parts["weight_packed"], bits, codes.shape), codes)
    assert torch.equal(published_unpack(published_pack(zero, bits, 0), bits, zero.shape, 0), zero)
    weight = unpack_compressed(parts, bits, group, "w")
    for dtype in (torch.float32, torch.bfloat16):
        scales = parts["weight_scale"].to(dtype)
        expected = published_dequantize(
            codes, scales, None if zeros == "none" else zero, parts.get("weight_g_idx")
        )
        assert torch.equal(weight.dequantize(dtype), expected), dtype
    assert (weight.offsets is None) == (zeros == "none" or not zero.any())


@settings(deadline=None)
@given(out=SIZES, width=SIZES, form=st.sampled_from(["column", "vector", "one", "groups"]), seed=SEEDS)
def test_int8_weights_are_scaled_by_row_by_tensor_or_by_group(out: int, width: int, form: str, seed: int):
    random = torch.Generator().manual_seed(seed)
    shape = {"column": (out, 1), "vector": (out,), "one": (1,), "groups": (out, width // 16)}[form]
    codes = torch.randint(-128, 128, (out, width), generator=random, dtype=torch.int8)
    scales = scales_of(random, *shape, dtype=torch.bfloat16)
    zeros = torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)
    wide = (scales if form == "groups" else scales.view(-1, 1).expand(out, 1)).float()
    shift = zeros if form == "groups" else zeros.view(-1, 1).expand(out, 1)
    group = 16 if form == "groups" else -1
    parts = {"weight": codes, "weight_scale": scales}
    plain = unpack_int8(parts, group, "w")
    assert plain.offsets is None and torch.equal(plain.codes, codes)
    assert torch.equal(plain.dequantize(), published_dequantize(codes, wide, None, None))
    shifted = unpack_int8({**parts, "weight_zero_point": zeros}, group, "w")
    assert torch.equal(shifted.dequantize(), published_dequantize(codes, wide, shift, None))
    assert torch.equal(parts["weight"], codes), "the file's bytes are not written to"


@settings(deadline=None)
@given(
    out=SIZES, width=SIZES, bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from([16, -1]),
    version=st.sampled_from([1, 2]), middle=st.booleans(), act_order=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_what_is_packed_is_unpacked(
    out: int, width: int, bits: int, group: int, version: int, middle: bool, act_order: bool, seed: int
):
    random = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else width // group
    codes = torch.randint(0, 1 << bits, (out, width), generator=random, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (out, groups), generator=random, dtype=torch.uint8)
    if middle:
        zeros.fill_(1 << bits - 1)
    scales = scales_of(random, out, groups)
    g_idx = torch.arange(width, dtype=torch.int32) // (width // groups)
    if act_order:
        g_idx = groups_in_any_order(random, width, groups)
    expected = (codes.float() - zeros[:, g_idx.long()]) * scales[:, g_idx.long()].float()
    packed = pack_gptq(codes, scales, zeros, g_idx, bits, version)
    weight = unpack_gptq(packed, bits, group, "w", version)
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(published_gptq({**packed, "scales": scales.T.float()}, bits, version), expected)
    assert (weight.offsets is None) == bool((zeros == 1 << bits - 1).all())
    if bits == 4 and not act_order:
        packed = pack_awq(codes, scales, zeros)
        assert torch.equal(unpack_awq(packed, 4, group, "w").dequantize(), expected)
        assert torch.equal(published_awq({**packed, "scales": scales.T.float()}, group), expected)


def test_columns_in_another_order_follow_their_rows_and_device(monkeypatch):
    random = torch.Generator().manual_seed(1)
    parts = gptq_parts(random, 32, 64, 4, 16, True)
    weight = unpack_gptq(parts, 4, 16, "w", 1)
    whole = weight.dequantize()
    assert weight.order is not None and weight.order.dtype == torch.int64
    assert torch.equal(parts["g_idx"][weight.order], torch.arange(64) // 16)
    assert torch.equal(weight.rows(slice(3, 9)).dequantize(), whole[3:9])
    assert torch.equal(weight.rows(torch.tensor([5, 0])).dequantize(), whole[[5, 0]])
    assert torch.equal(weight.to("cpu").dequantize(), whole)
    assert weight.nbytes == 32 * 64 + 2 * 4 * 32 * 4 + 8 * 64
    monkeypatch.setattr(QuantTensor, "_rows_at_once", 5)
    assert torch.equal(weight.dequantize(), whole)
    assert torch.equal(weight.dequantize(torch.bfloat16), whole.bfloat16())
    with pytest.raises(ValueError, match="order has shape"):
        QuantTensor(4, 16, weight.codes, weight.scales, weight.offsets, weight.shape, torch.arange(3))


# --- folders --------------------------------------------------------------------------------------------

HIDDEN, INNER, VOCAB, LAYERS = 64, 96, 50, 2
CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
K = "model.layers.0.self_attn.k_proj"


def awq_settings(**changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    } | changes


def gptq_settings(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False} | changes


def compressed_settings(form: str = "pack-quantized", **changes: Any) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
    } | changes
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "config_groups": {"group_0": group}, "sparsity_config": {}, "quantization_status": "compressed",
    }  # fmt: skip


CHANNEL = {"strategy": "channel", "group_size": None, "num_bits": 8}
RECIPES: dict[str, dict[str, Any] | None] = {
    "AWQ int4 g32": awq_settings(),
    "AWQ int4 per channel": {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "version": "GEMM"},
    "GPTQ int4 g32": gptq_settings(),
    "GPTQ int4 g32 act-order": gptq_settings(desc_act=True, checkpoint_format="gptq_v2"),
    "GPTQ int2 g32": gptq_settings(bits=2),
    "GPTQ int3 per channel": gptq_settings(bits=3, group_size=-1),
    "GPTQ int8 g32 act-order": gptq_settings(bits=8, desc_act=True, checkpoint_format="gptq"),
    "compressed-tensors int4 g32": compressed_settings(),
    "compressed-tensors int4 g32 act-order": compressed_settings(symmetric=False, actorder="group"),
    "compressed-tensors int8 per channel": compressed_settings(symmetric=False, **CHANNEL),
    "compressed-tensors int8 per tensor scales": compressed_settings(
        "int-quantized", **{**CHANNEL, "strategy": "tensor"}
    ),
    "int8 per channel": None,
}


def quantized(recipe: str, random: torch.Generator, out: int, width: int) -> tuple[Tensors, torch.Tensor]:
    """A random weight as `recipe` stores it, and what the published unpacking makes of it, in float32."""
    stated = RECIPES[recipe] or {}
    act_order = "act-order" in recipe
    if stated.get("quant_method") == "awq":
        group = stated.get("group_size", -1)
        parts = awq_parts(random, out, width, group)
        parts["scales"] = scales_like_a_model(random, parts["scales"].shape, 4)
        return parts, published_awq({**parts, "scales": parts["scales"].float()}, group)
    if stated.get("quant_method") == "gptq":
        bits, version = stated["bits"], 2 if stated.get("checkpoint_format") == "gptq_v2" else 1
        parts = gptq_parts(random, out, width, bits, stated["group_size"], act_order)
        parts["scales"] = scales_like_a_model(random, parts["scales"].shape, bits)
        return parts, published_gptq({**parts, "scales": parts["scales"].float()}, bits, version)
    bits = 4 if "int4" in recipe else 8
    groups = width // 32 if "g32" in recipe else 1
    rows = 1 if "tensor scales" in recipe else out
    low, high = -(1 << bits - 1), 1 << bits - 1
    codes = torch.randint(low, high, (out, width), generator=random, dtype=torch.int8)
    scales = scales_like_a_model(random, torch.Size((rows, groups)), bits).bfloat16()
    parts = {"weight_scale": scales[:, 0] if rows == 1 else scales}
    weights = stated["config_groups"]["group_0"]["weights"] if stated else {"symmetric": True}
    zeros = None
    if not weights["symmetric"]:
        zeros = torch.randint(low, high, (out, groups), generator=random, dtype=torch.int8)
        parts["weight_zero_point"] = published_pack(zeros, bits, 0)
    if act_order:
        parts["weight_g_idx"] = groups_in_any_order(random, width, groups)
    if stated.get("format") == "pack-quantized":
        parts |= {"weight_packed": published_pack(codes, bits), "weight_shape": torch.tensor([out, width])}
    else:
        parts["weight"] = codes
    wide = scales.float().expand(out, groups)
    return parts, published_dequantize(codes, wide, zeros, parts.get("weight_g_idx"))


def scales_like_a_model(random: torch.Generator, shape: torch.Size, bits: int) -> torch.Tensor:
    return ((torch.rand(shape, generator=random) + 0.5) * 0.4 / 2**bits).half()


@dataclass
class Folder:
    """A tiny quantized model, and the same with the weights that the published unpacking gives."""

    path: Path
    settings: dict[str, Any] | None
    tensors: Tensors = field(default_factory=dict)
    dense: Tensors = field(default_factory=dict)

    def write(self) -> Path:
        self.path.mkdir(exist_ok=True)
        stated = {} if self.settings is None else {"quantization_config": self.settings}
        (self.path / "config.json").write_text(json.dumps(CONFIG | stated))
        save_file(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()},
            self.path / "model.safetensors",
        )
        return self.path

    def refusal(self, load: str | None = None) -> str:
        """What opening it says, or reading the weight `load`: one sentence that names the folder."""
        self.write()
        if load is None:
            with pytest.raises(ModelFileError) as caught:
                open_checkpoint(self.path)
        else:
            checkpoint = open_checkpoint(self.path)
            with pytest.raises(ModelFileError) as caught:
                checkpoint.load(load)
        text = str(caught.value)
        assert str(self.path) in text and "\n" not in text
        return text


def folder(path: Path, recipe: str, plain: tuple[str, ...] = ()) -> Folder:
    """A tiny model as `recipe` stores it; projections whose names end as in `plain` are not quantized."""
    random = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random) * 0.2

    made = Folder(path, RECIPES[recipe])
    common = {
        "model.embed_tokens.weight": drawn(VOCAB, HIDDEN),
        "lm_head.weight": drawn(VOCAB, HIDDEN),
        "model.norm.weight": 1 + drawn(HIDDEN),
    }
    for i in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            common[f"model.layers.{i}.{norm}.weight"] = 1 + drawn(HIDDEN)
        for key, (out, width) in PROJECTIONS.items():
            name = f"model.layers.{i}.{key}"
            parts, weight = quantized(recipe, random, out, width)
            made.dense[f"{name}.weight"] = weight
            if name.endswith(plain) and plain:
                common[f"{name}.weight"] = weight
            else:
                made.tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    made.tensors |= common
    made.dense |= common
    return made


def same(a: object, b: object) -> bool:
    if isinstance(a, QuantTensor) and isinstance(b, QuantTensor):
        pairs = [(a.codes, b.codes), (a.scales, b.scales), (a.offsets, b.offsets), (a.order, b.order)]
        return a.group == b.group and all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_quantized_folder_runs_with_the_logits_of_its_dequantized_weights(tmp_path: Path, recipe: str):
    made = folder(tmp_path / "q", recipe)
    dense = Folder(tmp_path / "d", None, made.dense)
    checkpoint, plain = open_checkpoint(made.write()), open_checkpoint(dense.write())
    assert checkpoint.quantization == recipe.replace("per tensor scales", "per channel")
    assert checkpoint.parameters == plain.parameters == sum(tensor.numel() for tensor in made.dense.values())
    weight = checkpoint.load("layers.1.gate")
    assert isinstance(weight, QuantTensor)
    assert (weight.order is not None) == ("act-order" in recipe)
    assert torch.equal(weight.dequantize(), made.dense["model.layers.1.mlp.gate_proj.weight"])
    tokens = [7, 3, 49, 0, 21, 21, 8]
    logits = logits_of(made.path, tokens, "reference")
    assert torch.isfinite(logits).all() and logits.std() > 0.1
    assert torch.equal(logits, logits_of(dense.path, tokens, "reference"))


@pytest.mark.parametrize(
    "recipe", ["AWQ int4 g32", "GPTQ int4 g32 act-order", "compressed-tensors int8 per channel"]
)
def test_the_parts_of_a_weight_stream_in_any_order(tmp_path: Path, recipe: str):
    checkpoint = open_checkpoint(folder(tmp_path, recipe).write())
    names = sorted(checkpoint.names)
    for asked, ahead in ((names, 1 << 20), (names[::-1], 3000), (names, 0)):
        with Uploader(
            checkpoint.tensors, names, torch.device("cpu"), chunk_bytes=100, ahead_bytes=ahead, threads=2
        ) as stream:
            assert all(same(stream.load(name), checkpoint.load(name)) for name in asked)
            assert same(stream.load("layers.1.o"), checkpoint.load("layers.1.o")), "asked for a second time"
            assert stream._flying == {}


def test_parts_may_lie_in_several_files(tmp_path: Path):
    made = folder(tmp_path, "GPTQ int4 g32 act-order")
    at_once = open_checkpoint(made.write())
    whole = {name: at_once.load(name) for name in at_once.names}
    (tmp_path / "model.safetensors").unlink()
    for i in range(3):
        part = {name: made.tensors[name] for name in sorted(made.tensors)[i::3]}
        save_file(part, tmp_path / f"model-{i}.safetensors")
    split = open_checkpoint(tmp_path)
    assert all(same(split.load(name), weight) for name, weight in whole.items())


def test_weights_that_are_not_quantized_stay_plain(tmp_path: Path):
    made = folder(tmp_path, "AWQ int4 g32", plain=("layers.1.mlp.down_proj",))
    made.settings = awq_settings(modules_to_not_convert=["model.layers.1.mlp.down_proj"])
    checkpoint = open_checkpoint(made.write())
    assert torch.equal(checkpoint.load("layers.1.down"), made.dense["model.layers.1.mlp.down_proj.weight"])
    assert isinstance(checkpoint.load("layers.0.down"), QuantTensor)
    assert isinstance(checkpoint.load("lm_head"), torch.Tensor)


@pytest.mark.parametrize("act_order", [False, True])
def test_fused_matrices_of_phi3_are_split_after_unpacking(tmp_path: Path, act_order: bool):
    random = torch.Generator().manual_seed(5)
    made = folder(tmp_path, "GPTQ int4 g32")
    made.settings = gptq_settings(desc_act=act_order)
    for i in range(LAYERS):
        for fused, rows in (("self_attn.qkv_proj", 2 * HIDDEN), ("mlp.gate_up_proj", 2 * INNER)):
            parts = gptq_parts(random, rows, HIDDEN, 4, 32, act_order)
            made.tensors |= {f"model.layers.{i}.{fused}.{key}": tensor for key, tensor in parts.items()}
    gone = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    made.tensors = {name: t for name, t in made.tensors.items() if name.split(".")[-2] not in gone}
    made.write()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    checkpoint = open_checkpoint(tmp_path)

    def stacked(*names: str) -> torch.Tensor:
        return torch.cat([checkpoint.load(f"layers.1.{name}").dequantize() for name in names])

    for fused, names in (("self_attn.qkv_proj", ("q", "k", "v")), ("mlp.gate_up_proj", ("gate", "up"))):
        parts = {
            key: made.tensors[f"model.layers.1.{fused}.{key}"]
            for key in ("qweight", "qzeros", "scales", "g_idx")
        }
        assert torch.equal(
            stacked(*names), published_gptq({**parts, "scales": parts["scales"].float()}, 4, 1)
        )
    assert checkpoint.load("layers.1.k").shape == (32, HIDDEN)


def test_zeros_that_stand_for_no_bias_are_left_out_and_a_bias_is_not(tmp_path: Path):
    made = folder(tmp_path, "GPTQ int4 g32")
    made.tensors |= {
        f"{K}.bias": torch.zeros(32).half(),
        "model.layers.1.mlp.up_proj.bias": torch.zeros(INNER).half(),
    }
    assert "layers.0.k_bias" not in open_checkpoint(made.write()).names
    made.tensors[f"{K}.bias"][3] = 1
    assert "k_bias" in made.refusal()


def test_ranges_for_activations_and_cache_are_left_out(tmp_path: Path):
    made = folder(tmp_path, "compressed-tensors int8 per tensor scales")
    made.tensors |= {f"{K}.input_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    assert isinstance(open_checkpoint(made.write()).load("layers.0.k"), QuantTensor)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("compressed-tensors int4 g32", {"strategy": None}),
        ("compressed-tensors int8 per channel", {**CHANNEL, "strategy": None, "symmetric": False}),
    ],
)
def test_a_strategy_that_is_not_stated_follows_from_the_group(
    tmp_path: Path, recipe: str, changes: dict[str, Any]
):
    made = folder(tmp_path, recipe)
    made.settings = compressed_settings(**changes)
    assert open_checkpoint(made.write()).quantization == recipe


def test_a_g_idx_from_before_calibration_says_nothing(tmp_path: Path):
    made = folder(tmp_path, "compressed-tensors int4 g32")
    plain = open_checkpoint(made.write()).load("layers.0.k")
    made.tensors[f"{K}.weight_g_idx"] = torch.full((HIDDEN,), -1, dtype=torch.int32)
    assert same(open_checkpoint(made.write()).load("layers.0.k"), plain)


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "stated", "said"),
    [
        ("AWQ int4 g32", {"quant_method": "bitsandbytes"}, "'bitsandbytes', which is not read: take AWQ"),
        ("AWQ int4 g32", {"bits": 4}, "'None'"),
        ("AWQ int4 g32", {"quant_method": 7}, "quant_method is '7'"),
        ("AWQ int4 g32", awq_settings(version="gemv"), "'gemv'"),
        ("AWQ int4 g32", awq_settings(version="marlin"), "the version that is read is gemm"),
        ("AWQ int4 g32", awq_settings(bits=8), "8 bits: of AWQ, 4 bits are read"),
        ("AWQ int4 g32", awq_settings(bits=None), "bits is missing"),
        ("AWQ int4 g32", awq_settings(group_size=0), "groups of 0"),
        ("AWQ int4 g32", awq_settings(group_size=40), "rows of 96 weights, which groups of 40 do not divide"),
        ("AWQ int4 g32", awq_settings(group_size=16), "qzeros has shape [3, 8], expected [6, 8]"),
        ("AWQ int4 g32", gptq_settings(), "has shape"),
        ("AWQ int4 g32", None, "no quantization_config that says how"),
        ("GPTQ int4 g32", gptq_settings(bits=5), "5 bits: of GPTQ, 2, 3, 4 and 8 bits are read"),
        ("GPTQ int4 g32", gptq_settings(bits="4"), "expected int"),
        ("GPTQ int4 g32", gptq_settings(bits=3), "qzeros has shape [3, 8], expected [4, 6]"),
        ("GPTQ int4 g32", gptq_settings(bits=8, group_size=16), "qzeros has shape [3, 8], expected [3, 16]"),
        ("GPTQ int4 g32", gptq_settings(group_size=-7), "groups of -7"),
        ("GPTQ int4 g32", gptq_settings(checkpoint_format="marlin"), "'marlin'"),
        (
            "GPTQ int3 per channel",
            gptq_settings(bits=3, group_size=-1, meta={"quantizer": ["gptqmodel:2.1.0"]}),
            "convert them to gptq_v2",
        ),
        ("GPTQ int4 g32", gptq_settings(pack_dtype="int16"), "'int16'"),
        ("GPTQ int4 g32", compressed_settings(), "lacks its weight_packed"),
        ("compressed-tensors int4 g32", compressed_settings("nvfp4-pack-quantized"), "'nvfp4-pack-quantized'"),
        ("compressed-tensors int4 g32", compressed_settings(type="float"), "type 'float'"),
        ("compressed-tensors int4 g32", compressed_settings(strategy="block"), "'block'"),
        ("compressed-tensors int4 g32", compressed_settings(group_size=None), "group_size is missing"),
        ("compressed-tensors int4 g32", compressed_settings(num_bits=3), "4 and 8 bits are read"),
        ("compressed-tensors int4 g32", compressed_settings(num_bits=8), "[64, 96] weights of 8 bits do not fill"),
        ("compressed-tensors int4 g32", compressed_settings(group_size=16), "has shape [64, 3], expected [64, 6]"),
        ("compressed-tensors int4 g32", compressed_settings("int-quantized"), "8 bits are read"),
        ("compressed-tensors int4 g32", compressed_settings() | {"config_groups": {}}, "or in none"),
        ("compressed-tensors int4 g32", compressed_settings() | {"config_groups": {"a": {}}}, "weights is missing"),
        ("compressed-tensors int4 g32", compressed_settings() | {"sparsity_config": {"format": "s24"}}, "sparsity"),
        ("compressed-tensors int4 g32", compressed_settings() | {"transform_config": {"a": 1}}, "transform_config"),
        ("compressed-tensors int4 g32", None, "no quantization_config that says how"),
    ],
)  # fmt: skip
def test_a_quantization_that_is_not_read_is_refused_in_one_sentence(
    tmp_path: Path, recipe: str, stated: dict[str, Any] | None, said: str
):
    made = folder(tmp_path, recipe)
    made.settings = stated
    assert said in made.refusal()


def test_two_ways_to_quantize_one_model_are_refused(tmp_path: Path):
    made = folder(tmp_path, "compressed-tensors int4 g32")
    groups = [compressed_settings(num_bits=bits)["config_groups"]["group_0"] for bits in (4, 8)]
    made.settings = compressed_settings() | {"config_groups": dict(enumerate(groups))}
    assert "more ways than one" in made.refusal()


@pytest.mark.parametrize(
    ("recipe", "part", "changed", "said"),
    [
        ("AWQ int4 g32", "qzeros", None, "k_proj lacks its qzeros"),
        ("AWQ int4 g32", "scales", None, "k_proj lacks its scales"),
        ("AWQ int4 g32", "scales", torch.ones(2, 31), "scales has shape [2, 31], expected [2, 32]"),
        ("AWQ int4 g32", "scales", torch.ones(2, 32, dtype=torch.int32), "is of type int32, expected float16"),
        ("AWQ int4 g32", "qweight", torch.ones(64, 5, dtype=torch.int32), "qzeros has shape [2, 4], expected [2, 5]"),
        ("AWQ int4 g32", "qweight", torch.ones(64, dtype=torch.int32), "expected a matrix"),
        ("AWQ int4 g32", "qweight", torch.ones(64, 4), "is of type float32, expected int32"),
        ("AWQ int4 g32", "qweight", torch.ones(64, 4, dtype=torch.uint8), "has type U8"),
        ("GPTQ int4 g32", "qzeros", None, "lacks its qzeros"),
        ("GPTQ int4 g32", "qzeros", torch.ones(1, 4, dtype=torch.int32), "expected [2, 4]"),
        ("GPTQ int4 g32", "g_idx", torch.zeros(63, dtype=torch.int32), "g_idx has shape [63], expected [64]"),
        ("GPTQ int3 per channel", "qweight", torch.ones(5, 32, dtype=torch.int32), "3-bit codes"),
        ("GPTQ int3 per channel", "qweight", torch.ones(6, 33, dtype=torch.int32), "3-bit codes"),
        ("compressed-tensors int4 g32", "weight_shape", None, "lacks its weight_shape"),
        ("compressed-tensors int4 g32", "weight_shape", torch.tensor([32, 65]), "do not fill"),
        ("compressed-tensors int4 g32", "weight_shape", torch.tensor([32, -64]), "do not fill"),
        ("compressed-tensors int4 g32", "weight_shape", torch.tensor([32, 64, 1]), "weight_shape has shape [3]"),
        ("compressed-tensors int4 g32", "weight_zero_point", torch.zeros(32, 3, dtype=torch.int8), "expected [32, 2]"),
        ("compressed-tensors int4 g32", "weight_zero_point", torch.zeros(32, 2), "expected int8 or int32"),
        ("compressed-tensors int4 g32", "weight_g_idx", torch.zeros(2, dtype=torch.int32), "expected [64]"),
        ("int8 per channel", "weight_scale", None, "lacks its weight_scale"),
        ("int8 per channel", "weight_scale", torch.ones(31, 1), "weight_scale has shape [31, 1], expected [32, 1]"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_before_a_weight_is_read(
    tmp_path: Path, recipe: str, part: str, changed: torch.Tensor | None, said: str
):
    made = folder(tmp_path, recipe)
    made.tensors.pop(f"{K}.{part}", None)
    if changed is not None:
        made.tensors[f"{K}.{part}"] = changed
    assert said in made.refusal()


def test_a_weight_of_another_shape_or_there_twice_is_refused(tmp_path: Path):
    made = folder(tmp_path, "AWQ int4 g32")
    for part, shape in (("qweight", (64, 8)), ("qzeros", (2, 8)), ("scales", (2, 64))):
        made.tensors[f"{K}.{part}"] = torch.ones(
            shape, dtype=torch.float16 if part == "scales" else torch.int32
        )
    assert "layers.0.k has shape [64, 64], expected [32, 64]" in made.refusal()
    made = folder(tmp_path, "AWQ int4 g32")
    made.tensors[f"{K}.weight"] = torch.ones(32, 64)
    assert "there twice" in made.refusal()
    made = folder(tmp_path, "AWQ int4 g32")
    save_file({f"{K}.scales": torch.ones(2, 32)}, tmp_path / "more.safetensors")
    where = dict.fromkeys(made.tensors, "model.safetensors") | {"more": "more.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert "k_proj.scales is there twice" in made.refusal()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "recipe", ["AWQ int4 g32", "GPTQ int4 g32", "compressed-tensors int4 g32", "int8 per channel"]
)
def test_a_scale_that_is_no_number_is_refused(tmp_path: Path, recipe: str, value: float):
    made = folder(tmp_path, recipe)
    part = "scales" if f"{K}.scales" in made.tensors else "weight_scale"
    made.tensors[f"{K}.{part}"].view(-1)[5] = value
    assert "k_proj has a scale that is no finite number" in made.refusal(load="layers.0.k")


@pytest.mark.parametrize("recipe", ["GPTQ int4 g32 act-order", "compressed-tensors int4 g32 act-order"])
@pytest.mark.parametrize("value", [-1, 1, 2, 2**31 - 1])
def test_a_g_idx_that_points_to_no_group_or_overfills_one_is_refused(tmp_path: Path, recipe: str, value: int):
    made = folder(tmp_path, recipe)
    (name,) = (name for name in made.tensors if name.startswith(K) and name.endswith("g_idx"))
    g_idx = made.tensors[name]
    g_idx[int((g_idx == 0).nonzero()[0])] = value
    assert "g_idx does not give each of 2 groups 32 of 64 inputs" in made.refusal(load="layers.0.k")


UNPACKINGS = {
    "AWQ int4 g32": lambda parts: unpack_awq(parts, 4, 32, "the weight"),
    "GPTQ int3 per channel": lambda parts: unpack_gptq(parts, 3, -1, "the weight", 1),
    "GPTQ int4 g32 act-order": lambda parts: unpack_gptq(parts, 4, 32, "the weight", 2),
    "compressed-tensors int4 g32 act-order": lambda parts: unpack_compressed(parts, 4, 32, "the weight"),
    "compressed-tensors int8 per channel": lambda parts: unpack_compressed(parts, 8, -1, "the weight"),
    "int8 per channel": lambda parts: unpack_int8(parts, -1, "the weight"),
}


@settings(deadline=None, max_examples=200)
@given(data=st.data(), recipe=st.sampled_from(list(UNPACKINGS)))
def test_parts_of_any_shape_and_type_are_a_weight_or_are_refused_by_name(data: st.DataObject, recipe: str):
    parts, whole = quantized(recipe, torch.Generator().manual_seed(0), 32, 64)
    assert torch.equal(UNPACKINGS[recipe](parts).dequantize(), whole)
    key = data.draw(st.sampled_from(sorted(parts)))
    dtype = data.draw(st.sampled_from([torch.int8, torch.int32, torch.int64, torch.float16, torch.float32]))
    shape = data.draw(
        st.lists(st.sampled_from([0, 1, 2, 3, 16, 32, 64]), max_size=3) | st.just(list(parts[key].shape))
    )
    parts[key] = torch.full(shape, data.draw(st.sampled_from([-1, 0, 1, 40]))).to(dtype)
    said = "the weight"
    try:
        weight = UNPACKINGS[recipe](parts)
    except ModelFileError as error:
        said = str(error)
    else:
        assert torch.isfinite(weight.dequantize()).all() and weight.shape[0] == 32
    assert said.startswith("the weight") and "\n" not in said


def test_bits_that_a_format_does_not_have_are_refused_by_its_unpacking():
    parts = {"weight_packed": torch.zeros(2, 2, dtype=torch.int32)}
    for refused in (
        lambda: unpack_awq(parts, 3, 8, "w"),
        lambda: unpack_gptq(parts, 6, 8, "w", 1),
        lambda: unpack_compressed(parts, 2, 8, "w"),
    ):
        with pytest.raises(ModelFileError, match=r"w is packed in . bits: of .* are read"):
            refused()
    with pytest.raises(ValueError, match="4 bits, not 8"):
        pack_awq(
            torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1), torch.zeros(8, 1, dtype=torch.uint8), 8
        )
