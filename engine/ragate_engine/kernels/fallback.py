"""Kernels that do not compile on a card: a trial at the start finds them, and their references take their place.

Operations that share a layout change together. What was exchanged is part of the backend's name, and so of every
fingerprint, because the bits change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch

from ragate_engine.devices import is_lost
from ragate_engine.errors import EngineError

FAMILIES: dict[str, tuple[str, ...]] = {
    "linear": ("pack_linear", "linear"),
    "gated": ("pack_gated", "gated"),
    "quantized": ("pack_quantized", "quantized"),
    "int8": ("pack_int8", "int8"),
    "adapters": ("act_mul",),
    "embed": ("embed",),
    "norm": ("rms_norm", "last_norm"),
    "attention": ("make_kv", "rope_write_kv", "plan_attention", "attention"),
    "pick": ("pick", "likeliest"),
}
"""The operations of a backend, those together that read what the others write."""
STEPS = "steps"
"""What falls when a trial fails outside of them: the backend's own way to run steps."""


@dataclass(frozen=True)
class Checked:
    """Operations that have all run once."""

    ops: ModuleType
    name: str
    """For the fingerprint: the backend's own where nothing fell, else such as `triton-3 (attention: reference)`."""
    fell: Mapping[str, str] = field(default_factory=dict)
    """Family -> why its kernel does not run, one line."""


class _FailedError(Exception):
    """An operation of the backend failed in the trial."""

    def __init__(self, family: str, reason: str) -> None:
        super().__init__(reason)
        self.family = family
        self.reason = reason


def checked(
    backend: ModuleType,
    reference: ModuleType,
    trial: Callable[[ModuleType, Mapping[str, str]], None],
    together: frozenset[str] = frozenset(),
) -> Checked:
    """`backend`, with those families taken from `reference` whose kernels fail in `trial`.

    `trial(ops, fell)` runs every operation that serving will call; where something has fallen, in steps that take
    plain operations. When a family falls it is run again without it, and the families in `together` fall with any
    other. Errors of a lost card or of memory are no compile failures: they are raised, and so is what fails twice.
    """
    fell: dict[str, str] = {}
    while True:
        try:
            trial(_composed(backend, reference, fell, watched=True), fell)
            break
        except _FailedError as error:
            family, reason = error.family, error.reason
        except Exception as error:
            if STEPS in fell or is_no_fault_of_a_kernel(error):
                raise
            family, reason = STEPS, _line(error)
        fell[family] = reason
        for other in together:
            fell.setdefault(other, f"it goes with {family}")
    name = str(backend.NAME)
    if fell:
        name += f" ({', '.join(sorted(fell))}: reference)"
    return Checked(_composed(backend, reference, fell, watched=False), name, fell)


def is_no_fault_of_a_kernel(error: Exception) -> bool:
    """Whether `error` is of the card or its memory, so that another kernel would not help."""
    return isinstance(error, torch.OutOfMemoryError | EngineError) or is_lost(error)


def _line(error: Exception) -> str:
    lines = str(error).strip().split("\n")
    return f"{type(error).__name__}: {lines[0][:200]}"


def _composed(
    backend: ModuleType, reference: ModuleType, fell: Mapping[str, str], watched: bool
) -> ModuleType:
    """A module with the backend's names, of which the families in `fell` are the reference's."""
    ops = ModuleType(f"{backend.__name__}.checked")
    ops.__dict__.update({name: value for name, value in vars(backend).items() if not name.startswith("__")})
    for family, names in FAMILIES.items():
        for name in names:
            if family in fell and hasattr(reference, name):
                ops.__dict__[name] = getattr(reference, name)
            elif family in fell:
                ops.__dict__.pop(name, None)  # then weights are unpacked for the plain product
            elif watched and hasattr(backend, name):
                ops.__dict__[name] = _watched(getattr(backend, name), family)
    return ops


def _watched(op: Callable[..., object], family: str) -> Callable[..., object]:
    @functools.wraps(op)
    def run(*arguments: object, **named: object) -> object:
        try:
            return op(*arguments, **named)
        except Exception as error:
            if is_no_fault_of_a_kernel(error):
                raise
            raise _FailedError(family, _line(error)) from error

    return run
