"""Kernels that do not compile: found by the trial, replaced by their references, and named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch

from bench.random_model import random_adapter
from ragate_engine import Adapter, DeviceError, ModelConfig
from ragate_engine.kernels import reference
from ragate_engine.kernels.fallback import FAMILIES, checked
from ragate_engine.kv import KVCache
from ragate_engine.model import Decoder
from ragate_engine.steps import HostSteps
from ragate_engine.trial import run_steps, small_model

CPU = torch.device("cpu")
PLAIN = {
    family: names for family, names in FAMILIES.items() if family not in ("quantized", "int8", "adapters")
}
"""What every backend has, the reference too, and every model needs."""
TINY = ModelConfig("llama", 48, 32, 40, 7, 4, 2, 16, 64)


class CompilationError(Exception):
    """What a compiler says."""


def backend(*broken: str, error: Exception | None = None) -> ModuleType:
    """The reference kernels under another name, some of which do not compile."""
    ops = ModuleType("fast")
    ops.__dict__.update({name: value for name, value in vars(reference).items() if not name.startswith("__")})
    ops.__dict__["NAME"] = "fast-1"

    def fails(*arguments: object, **named: object) -> None:
        raise error or CompilationError("at 12:8: no such layout\n    acc = tl.dot(a, b)")

    for name in broken:
        ops.__dict__[name] = fails
    return ops


def trial(
    ops: ModuleType,
    fell: Mapping[str, str],
    model: ModelConfig = TINY,
    adapters: Sequence[Adapter] = (),
) -> None:
    def steps_of(decoder: Decoder, kv: KVCache, batch: int, rows: int, length: int) -> HostSteps:
        return HostSteps(decoder, kv, ops, batch, CPU)

    run_steps(model, ops, torch.float32, CPU, steps_of, (20, 1), adapters)


def test_a_backend_that_compiles_is_used_as_it_is() -> None:
    fast = backend()
    found = checked(fast, reference, trial)
    assert (found.name, found.fell) == ("fast-1", {})
    assert all(getattr(found.ops, name) is getattr(fast, name) for names in PLAIN.values() for name in names)


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family, names in PLAIN.items() for name in names],
    ids=lambda value: value,
)
def test_whichever_kernel_does_not_compile_its_family_falls_back_alone(family: str, name: str) -> None:
    fast = backend(name)
    found = checked(fast, reference, trial)
    assert found.name == f"fast-1 ({family}: reference)"
    assert found.fell == {family: "CompilationError: at 12:8: no such layout"}
    for other, names in PLAIN.items():
        source = reference if other == family else fast
        assert all(getattr(found.ops, op) is getattr(source, op) for op in names)
    trial(found.ops, found.fell)


def test_a_product_of_packed_weights_that_does_not_compile_is_gone_and_they_are_unpacked() -> None:
    fast = backend("quantized")
    fast.__dict__["pack_quantized"] = lambda weights, gated: (weights, gated)

    def with_packed(ops: ModuleType, fell: Mapping[str, str]) -> None:
        if hasattr(ops, "pack_quantized"):
            ops.quantized(ops.pack_quantized([], False))
        trial(ops, fell)

    found = checked(fast, reference, with_packed)
    assert found.name == "fast-1 (quantized: reference)"
    assert not hasattr(found.ops, "pack_quantized") and not hasattr(found.ops, "quantized")


def test_a_kernel_that_adapters_alone_need_is_tried_where_there_are_any() -> None:
    adapters = [random_adapter(TINY)]

    def with_adapters(ops: ModuleType, fell: Mapping[str, str]) -> None:
        trial(ops, fell, adapters=adapters)

    assert checked(backend("act_mul"), reference, trial).fell == {}
    assert checked(backend("act_mul"), reference, with_adapters).name == "fast-1 (adapters: reference)"


def test_several_kernels_may_fall_and_are_named_in_order() -> None:
    found = checked(backend("linear", "attention"), reference, trial)
    assert found.name == "fast-1 (attention, linear: reference)"


def test_families_that_need_the_backends_own_steps_fall_with_any_other() -> None:
    found = checked(backend("gated"), reference, trial, together=frozenset({"attention", "pick"}))
    assert found.name == "fast-1 (attention, gated, pick: reference)"
    assert found.fell["attention"] == "it goes with gated"


def test_a_backend_may_lack_what_a_family_adds_to_plain_steps() -> None:
    fast = backend()
    del fast.__dict__["plan_attention"]
    found = checked(fast, reference, trial, together=frozenset({"attention"}))
    assert found.name == "fast-1 (attention, steps: reference)"


def test_a_trial_that_fails_outside_the_operations_changes_the_steps() -> None:
    def with_own_steps(ops: ModuleType, fell: Mapping[str, str]) -> None:
        if not fell:
            raise CompilationError("in the sampler")
        trial(ops, fell)

    found = checked(backend(), reference, with_own_steps, together=frozenset({"attention"}))
    assert found.name == "fast-1 (attention, steps: reference)"
    with pytest.raises(CompilationError):
        checked(backend(), reference, partial(_fails, CompilationError("always")))


def _fails(error: Exception, ops: ModuleType, fell: Mapping[str, str]) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        DeviceError("gone"),
    ],
    ids=str,
)
def test_a_lost_or_full_card_is_no_compile_failure(error: Exception) -> None:
    with pytest.raises(type(error)):
        checked(backend("linear", error=error), reference, trial)
    with pytest.raises(type(error)):
        checked(backend(), reference, partial(_fails, error))


def test_the_trial_has_a_layer_of_each_kind_of_the_model() -> None:
    assert small_model(TINY).num_layers == 1
    mixed = replace(TINY, window=8, window_layers=(True,) * 5 + (False, True))
    small = small_model(mixed)
    assert [small.window_of(i) for i in range(small.num_layers)] == [8, None]
    everywhere = small_model(replace(TINY, window=8))
    assert [everywhere.window_of(i) for i in range(everywhere.num_layers)] == [8]
    trial(reference, {}, replace(mixed, qk_norm=True, sandwich_norm=True, qkv_bias=True, tie_embeddings=True))
