"""RTN, GPTQ and AWQ of one weight and of one layer, against plain references."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ragate_engine.config import ModelConfig
from ragate_engine.layers import rope_tables
from ragate_engine.quantize.awq import SHARES, SWEEPS, Rows, Sample, Seen, awq, find_scales, rounded
from ragate_engine.quantize.gptq import Hessian, gptq
from ragate_engine.quantize.layer import STAGES, attention_costs, run_layer
from ragate_engine.quantize.recipe import Recipe
from ragate_engine.quantize.rtn import rtn
from ragate_engine.weights import names

CPU = torch.device("cpu")


def activations(width: int, count: int = 1024, seed: int = 0) -> torch.Tensor:
    """Inputs as in language models: channels that go together, and some far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
    return (torch.randn(count, width, generator=generator) @ mix) * torch.exp(
        torch.randn(width, generator=generator)
    )


def weights(out: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * width**-0.5


def loss(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> float:
    return float((x @ (other - weight).T).square().mean())


# --- round to nearest -----------------------------------------------------------------------------------


def plain_grid(row: list[float], bits: int, symmetric: bool) -> tuple[float, int]:
    """AutoGPTQ's Quantizer.find_params for one group, with the scale rounded to float16 at once."""
    low, high = min(0.0, *row), max(0.0, *row)
    if symmetric:
        high = max(-low, high)
        low = -high
    scale = float(np.float16(np.float32((np.float32(high) - np.float32(low)) / np.float32(2**bits - 1))))
    return scale, 2 ** (bits - 1) if symmetric else min(2**bits - 1, round(-low / scale))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_is_that_of_a_loop_over_groups(bits: int, symmetric: bool) -> None:
    weight = weights(5, 48)
    weight[1] = weight[1].abs() + 0.5  # a grid that would not reach zero, were it not made to
    found = rtn(weight, bits, 16, symmetric)
    for o in range(5):
        for g in range(3):
            row = weight[o, 16 * g : 16 * g + 16].tolist()
            scale, zero = plain_grid(row, bits, symmetric)
            assert (float(found.scales[o, g]), int(found.zeros[o, g])) == (scale, zero)
            codes = [min(2**bits - 1, max(0, round(w / scale) + zero)) for w in row]
            assert found.codes[o, 16 * g : 16 * g + 16].tolist() == codes
    assert torch.equal(found.scales, found.scales.half().float())


def test_each_weight_lies_within_half_a_step_of_the_grid() -> None:
    weight = weights(8, 64)
    found = rtn(weight, 4, 32, symmetric=False)
    error = (found.dequantize() - weight).abs().unflatten(1, (2, 32))
    assert bool((error <= 0.501 * found.scales.unsqueeze(-1)).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_above_zero_cost_a_group_of_positive_weights_one_step_of_its_grid(bits: int) -> None:
    weight = weights(4, 32).abs() + 0.1
    found = rtn(weight, bits, 32, symmetric=False, least_zero=1)
    assert found.zeros.tolist() == [[1]] * 4
    assert bool(((found.dequantize() - weight).abs() <= 0.51 * weight.amax() / (2**bits - 2)).all())


def test_a_group_of_zeros_stays_zero() -> None:
    assert rtn(torch.zeros(2, 32), 4, 16, symmetric=False, least_zero=1).dequantize().count_nonzero() == 0


# --- GPTQ -----------------------------------------------------------------------------------------------


def plain_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, symmetric: bool, order: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, in] and g_idx [in], column by column as in section 3 of the paper: no blocks, no Cholesky.

    After a column is rounded, it is eliminated from the inverse Hessian (equation 3).
    """
    width = weight.shape[1]
    chosen = list(range(width))
    if order != "given":
        chosen.sort(key=lambda i: -float(hessian[i, i]))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(width, dtype=hessian.dtype)
    inverse = torch.linalg.inv(damped)[chosen][:, chosen]
    rest = weight[:, chosen].clone()
    ahead = [
        [plain_grid(row[g : g + group].tolist(), bits, symmetric) for row in weight]
        for g in range(0, width, group)
    ]
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    g_idx = torch.empty(width, dtype=torch.int64)
    for place, column in enumerate(chosen):
        if order == "static":
            grids, g_idx[column] = ahead[column // group], column // group
        else:
            if place % group == 0:
                grids = [plain_grid(row.tolist(), bits, symmetric) for row in rest[:, place : place + group]]
            g_idx[column] = place // group
        scale, zero = torch.tensor(grids, dtype=weight.dtype).T
        code = (torch.round(rest[:, place] / scale) + zero).clamp(0, 2**bits - 1)
        codes[:, column] = code.to(torch.uint8)
        error = (rest[:, place] - scale * (code - zero)) / inverse[0, 0]
        rest[:, place:] -= error[:, None] * inverse[0]
        inverse = (inverse - inverse[:, :1] * inverse[:1] / inverse[0, 0])[1:, 1:]
    return codes, g_idx


@pytest.mark.parametrize("order", ["given", "static", "grouped"])
@pytest.mark.parametrize(
    ("width", "group", "bits", "symmetric"),
    [
        (48, 16, 2, False),
        (96, 32, 3, True),
        (256, 64, 4, False),
        (192, 48, 4, False),
        (384, 192, 4, True),
        (160, 160, 8, False),
    ],
)
def test_gptq_in_blocks_equals_the_paper_column_by_column(
    width: int, group: int, bits: int, symmetric: bool, order: str
) -> None:
    x = activations(width).double()
    weight, hessian = weights(24, width).double(), 2 * x.T @ x / len(x)
    found = gptq(weight, hessian, bits, group, symmetric, order)  # type: ignore[arg-type]
    codes, g_idx = plain_gptq(weight, hessian, bits, group, symmetric, order)
    assert torch.equal(found.g_idx.long(), g_idx)
    assert torch.equal(found.codes, codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["static", "grouped"])
def test_gptq_loses_less_than_half_of_what_rounding_loses(bits: int, order: str) -> None:
    x, weight = activations(192), weights(64, 192)
    hessian = Hessian(192, CPU)
    for part in x.split(100):
        hessian.add(part)
    assert torch.allclose(hessian.mean(), 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-3)
    found = gptq(weight, hessian.mean(), bits, 64, False, order)  # type: ignore[arg-type]
    rounded = rtn(weight, bits, 64, symmetric=False)
    fresh = activations(192)[512:]
    assert loss(fresh, weight, found.dequantize()) < 0.5 * loss(fresh, weight, rounded.dequantize())


def test_inputs_that_are_never_used_get_no_weight_and_do_no_harm() -> None:
    x, weight = activations(64), weights(16, 64)
    x[:, 5] = 0
    found = gptq(weight, x.T @ x, 4, 32, symmetric=False)
    assert found.dequantize()[:, 5].count_nonzero() == 0
    assert loss(x, weight, found.dequantize()) < loss(x, weight, rtn(weight, 4, 32, False).dequantize())


# --- AWQ ------------------------------------------------------------------------------------------------


def expected_cost(rows: Rows, scales: torch.Tensor, group: int) -> float:
    """What `find_scales` minimizes, one group of one row at a time."""
    total = 0.0
    for row, cost in zip((rows.weight * scales).tolist(), rows.costs.tolist(), strict=True):
        for at in range(0, len(row), group):
            part = row[at : at + group]
            span = max(0.0, *part) - min(0.0, *part)
            inputs = zip(rows.power[at : at + group].tolist(), scales[at : at + group].tolist(), strict=True)
            total += cost * span**2 * sum(power / scale**2 for power, scale in inputs)
    return total


def test_no_other_scales_are_expected_to_lose_less() -> None:
    x = activations(64, 200)
    power, columns = (
        x.square().mean(0),
        torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(8))),
    )
    pair = [
        Rows(weights(24, 64) * columns, power, torch.ones(24)),
        Rows(weights(40, 64, seed=2) * columns, power, torch.rand(40)),
    ]

    def cost(scales: torch.Tensor) -> float:
        return sum(expected_cost(each, scales, 32) for each in pair)

    found = find_scales(pair, 32, (1, 1, 64))
    least = cost(found)
    magnitude = x.abs().mean(0)
    assert least < 0.8 * min(cost(magnitude.pow(step / 20)) for step in range(20))  # the paper's own search
    generator = torch.Generator().manual_seed(9)
    for size in (0.02, 0.1):
        for _ in range(20):
            assert cost(found * torch.exp(size * torch.randn(64, generator=generator))) > 0.999 * least


def test_heads_that_share_a_row_of_v_share_its_scale_and_idle_channels_do_no_harm() -> None:
    power = torch.rand(64) + 0.1
    power[5] = 0
    scales = find_scales([Rows(weights(24, 64), power, torch.ones(24))], 32, (2, 2, 16)).view(2, 2, 16)
    assert torch.equal(scales[:, 0], scales[:, 1])
    assert scales.unique().numel() == 32
    assert bool(scales.isfinite().all()) and float(scales.amin()) > 1e-3 and float(scales.amax()) < 1e3


def plain_rounded(row: list[float], gram: np.ndarray, bits: int, group: int) -> tuple[list[int], np.ndarray]:
    """Codes and dequantized weights of one row, before it is stretched."""
    weight = np.array(row)
    gram = gram + np.diag(np.diag(gram))
    off, codes = np.zeros(len(row)), [0] * len(row)
    for _ in range(SWEEPS):
        for at in range(0, len(row), group):
            part, least, best = weight[at : at + group], np.inf, off
            for share in SHARES:
                scale, zero = plain_grid((part * share).tolist(), bits, symmetric=False)
                code = np.clip(np.round(part / scale) + zero, 0, 2**bits - 1)
                level, tried = np.zeros(len(row)), off.copy()
                level[at : at + group], tried[at : at + group] = code - zero, -part
                fit = -(level @ gram @ tried) / (level @ gram @ level)  # the change is tried + scale * level
                tried += np.clip(fit, 0.75 * scale, 1.25 * scale) * level
                lost = tried @ gram @ tried
                if lost < least:
                    least, best = lost, tried
                    codes[at : at + group] = code.astype(int).tolist()
            off = best
    return codes, weight + off


def test_each_group_takes_the_range_that_changes_its_row_least() -> None:
    x, weight = activations(96, 300).double(), weights(6, 96).double()
    weight[:, ::16] *= 4
    gram = x.T @ x / len(x)
    found = rounded(weight, gram, 4, 32)
    for o in range(6):
        codes, values = plain_rounded(weight[o].tolist(), gram.numpy(), 4, 32)
        assert found.codes[o].tolist() == codes
        there = values != 0
        ratio = found.dequantize()[o].double().numpy()[there] / values[there]
        assert ratio.min() > 0.9 and ratio.max() < 1.2 and ratio.std() < 1e-3  # one stretch for the row
    assert not torch.equal(found.codes, rtn(weight, 4, 32, symmetric=False).codes)


def test_rows_keep_the_size_of_their_outputs() -> None:
    x, weight = activations(256), weights(32, 256)
    gram = x.T @ x / len(x)
    found = rounded(weight, gram, 4, 64).dequantize()
    twice = gram + torch.diag(gram.diagonal())
    kept = ((weight @ twice) * found).sum(1) / ((weight @ twice) * weight).sum(1)
    assert float((kept - 1).abs().amax()) < 1e-3
    fresh = activations(256)[512:]
    lost = loss(fresh, weight, rtn(weight, 4, 64, symmetric=False).dequantize())
    assert loss(fresh, weight, found) < 0.8 * lost


def test_a_row_of_zeros_stays_zero() -> None:
    assert rounded(torch.zeros(2, 32), torch.eye(32), 4, 16).dequantize().count_nonzero() == 0


def test_a_sample_keeps_evenly_spaced_tokens() -> None:
    x = torch.randn(1500, 8)
    sample = Sample(1500)
    for part in x.split([700, 1, 799]):
        sample.add(part)
    assert torch.equal(sample.tokens(), x[::3])


MHA = ModelConfig("qwen2", 64, 64, 96, 1, 4, 4, 16, 128, qkv_bias=True)
GEMMA = replace(MHA, arch="gemma3", num_kv_heads=2, sandwich_norm=True, qkv_bias=False, qk_norm=True)


def random_layer(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    layer = {}
    for name, shape in names.expected(config).items():
        if name.startswith("layers.0."):
            drawn = torch.randn(shape, generator=generator)
            layer[name.removeprefix("layers.0.")] = (
                drawn * shape[-1] ** -0.5 if len(shape) == 2 else torch.exp(drawn)
            )
    return layer


def seen_in(
    layer: dict[str, torch.Tensor], config: ModelConfig, h: torch.Tensor
) -> tuple[torch.Tensor, Seen]:
    """The output of a layer, and what AWQ sees in it."""
    tables = rope_tables(config.rope, config.head_dim, len(h), CPU)
    seen = Seen(layer, config, 0, tables, len(h))
    return run_layer(layer, config, 0, tables, h, seen.add), seen


@pytest.mark.parametrize("norm", [False, True])
def test_what_errors_in_keys_and_values_cost_is_the_slope_of_the_attention(norm: bool) -> None:
    """Of one head, by autograd. The columns of o are orthogonal: their lengths are all that is looked at."""
    torch.manual_seed(2)
    config = replace(MHA, num_heads=1, num_kv_heads=1, qk_norm=norm)
    layer = random_layer(config)
    layer["o"] = torch.linalg.qr(torch.randn(64, 16))[0] * torch.linspace(0.5, 2, 16)
    if norm:  # along k itself a norm has no slope, across it its stretch: 15 of 16 directions
        layer["k_norm"] = torch.ones(16)
    x, tables = torch.randn(12, 64), rope_tables(config.rope, 16, 12, CPU)
    costs = attention_costs(layer, config, 0, tables, x)
    for leaf in ("k", "v"):

        def output(error: torch.Tensor, leaf: str = leaf) -> torch.Tensor:
            # one more input for each token and channel, through which the error comes in
            wide = torch.cat([x, torch.eye(12)], dim=1)
            linear = {each: F.pad(layer[each], (0, 12)) for each in "qkv"}
            linear[leaf] = torch.cat([layer[leaf], error.T], dim=1)
            return attention_output(layer | linear, config, tables, wide)

        slopes = torch.autograd.functional.jacobian(output, torch.zeros(12, 16)).square().sum((0, 1))
        if leaf == "v":
            expected = slopes / layer["o"].square().sum(0)
            assert torch.allclose(expected, expected[:, :1].expand_as(expected), rtol=1e-3)
            assert torch.allclose(costs["v"], expected[:, 0], rtol=1e-3)
        else:
            across = slopes.mean(1)
            assert torch.allclose(costs["k"], across, rtol=1e-3 if not norm else 0.35)
    assert costs["v"][0] > 2 * costs["v"][6:].amax()  # all look at the first token


def attention_output(
    layer: dict[str, torch.Tensor],
    config: ModelConfig,
    tables: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
) -> torch.Tensor:
    """The output of the attention of one head, written out: x [n, in] -> [n, hidden]."""
    q, k, v = (F.linear(x, layer[leaf], layer[f"{leaf}_bias"]) for leaf in "qkv")
    if config.qk_norm:
        q, k = (
            F.rms_norm(part, (16,), layer[f"{leaf}_norm"], config.norm_eps)
            for part, leaf in ((q, "q"), (k, "k"))
        )
    cos, sin = (torch.cat([table, table], dim=1) for table in tables)
    q, k = (part * cos + torch.cat([-part[:, 8:], part[:, :8]], dim=1) * sin for part in (q, k))
    scores = (q @ k.T / 4).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ v @ layer["o"].T


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_what_errors_in_rows_cost_is_the_slope_of_the_block(activation: str) -> None:
    config = replace(MHA, num_kv_heads=2, activation=activation)
    layer, h = random_layer(config), torch.randn(20, 64, generator=torch.Generator().manual_seed(6))
    inputs: list[torch.Tensor] = []
    run_layer(layer, config, 0, rope_tables(config.rope, 16, 20, CPU), h,
              lambda stage, x: inputs.append(x) if stage == "gate_up" else None)  # fmt: skip
    _, seen = seen_in(layer, config, h)
    act = F.silu if activation == "silu" else lambda x: F.gelu(x, approximate="tanh")
    for leaf in ("gate", "up"):

        def output(error: torch.Tensor, leaf: str = leaf) -> torch.Tensor:
            gate, up = (inputs[0] @ layer[each].T + (error if each == leaf else 0) for each in ("gate", "up"))
            return (act(gate) * up) @ layer["down"].T

        slopes = torch.autograd.functional.jacobian(output, torch.zeros(20, 96)).square().sum((0, 1)).mean(0)
        assert torch.allclose(seen.row_costs(leaf), slopes, rtol=1e-3)
    columns = layer["o"].square().sum(0).view(2, 2, 16)  # two heads for each row of v
    assert torch.allclose(seen.row_costs("v"), torch.cat([columns[0].sum(0), columns[1].sum(0)]))
    assert torch.equal(seen.row_costs("down"), torch.ones(64))


def test_inputs_count_by_what_their_errors_cost() -> None:
    layer, h = random_layer(MHA), torch.randn(30, 64, generator=torch.Generator().manual_seed(7))
    shown: dict[str, list[torch.Tensor]] = {stage: [] for stage in STAGES}
    tables = rope_tables(MHA.rope, 16, 30, CPU)
    seen = Seen(layer, MHA, 0, tables, 60)
    for part in (h, 2 * h):
        run_layer(layer, MHA, 0, tables, part, seen.add)
        run_layer(layer, MHA, 0, tables, part, lambda stage, x: shown[stage].append(x))
    for leaf, stage in (("q", "qkv"), ("v", "qkv"), ("o", "o"), ("up", "gate_up"), ("down", "down")):
        expected = torch.zeros(len(seen.gram(leaf)), len(seen.gram(leaf)))
        for x in shown[stage]:
            costs = (
                attention_costs(layer, MHA, 0, tables, x).get(leaf, torch.ones(30))
                if stage == "qkv"
                else None
            )
            for t, token in enumerate(x):
                expected += (1.0 if costs is None else costs[t]) * token.outer(token) / 60
        assert torch.allclose(seen.gram(leaf), expected, rtol=1e-3, atol=1e-5), leaf


@pytest.mark.parametrize("config", [MHA, replace(MHA, num_kv_heads=2), GEMMA])
def test_scales_are_folded_so_that_the_layer_stays_what_it_was(config: ModelConfig) -> None:
    layer, h = random_layer(config), torch.randn(100, 64, generator=torch.Generator().manual_seed(4))
    tables = rope_tables(config.rope, 16, 100, CPU)
    before, seen = seen_in(layer, config, h)
    # so fine that only a mistake in folding would show
    fine = SimpleNamespace(bits=8, group_of=lambda width: 8)
    plain, linears = awq(layer, seen, fine, config)  # type: ignore[arg-type]
    after = run_layer(plain | {leaf: q.dequantize() for leaf, q in linears.items()}, config, 0, tables, h)
    assert float((after - before).norm() / before.norm()) < 0.03
    assert not torch.allclose(plain["attn_norm"], layer["attn_norm"], rtol=0.05)
    if config.qkv_bias:
        assert not torch.allclose(plain["v_bias"], layer["v_bias"], rtol=0.05)


@pytest.mark.parametrize("config", [MHA, GEMMA])
def test_awq_loses_less_than_rounding(config: ModelConfig) -> None:
    layer, h = random_layer(config), activations(64, 300)
    tables = rope_tables(config.rope, 16, 300, CPU)
    exact, seen = seen_in(layer, config, h)
    plain, linears = awq(layer, seen, Recipe("awq", 4, 32), config)
    found = run_layer(plain | {leaf: q.dequantize() for leaf, q in linears.items()}, config, 0, tables, h)
    rounded = {leaf: rtn(layer[leaf], 4, 32, False).dequantize() for leaf in linears}
    baseline = run_layer(layer | rounded, config, 0, tables, h)
    assert float((found - exact).square().mean()) < 0.7 * float((baseline - exact).square().mean())
