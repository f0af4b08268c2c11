"""Which device serves: a card that is new enough, or the CPU; and what to say when a card fails."""

from __future__ import annotations

import ctypes
import threading
import warnings
from dataclasses import dataclass

import torch

from ragate_engine.errors import DeviceError, EngineError

ALONE = threading.RLock()
"""Held while a graph is captured, and by what must not happen meanwhile in any engine of this process: waiting for
the whole card, or giving memory back to it."""

MIN_CAPABILITY = (8, 0)
"""Ampere: the first cards that multiply bfloat16."""


@dataclass(frozen=True)
class Card:
    """A card as it is now; memory in bytes."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int
    """What no process holds, ours included."""


def pick_device(wanted: str) -> torch.device:
    """`auto` is the card where there is a usable one. Raises DeviceError where `cuda` is asked for and is none."""
    if wanted == "cpu":
        return torch.device("cpu")
    reason = why_no_card()
    if reason is None:
        return torch.device("cuda")
    if wanted == "cuda":
        raise DeviceError(f"{reason}: use device cpu or auto")
    return torch.device("cpu")


def why_no_card() -> str | None:
    """What keeps the current card from serving, as half a sentence; `None` where nothing does."""
    with warnings.catch_warnings(record=True) as said:  # torch warns of drivers that are too old
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        because = "torch.cuda.is_available() is false"
        if said:
            because = str(said[0].message).split(". ")[0].split("\n")[0]
        elif torch.version.cuda is None:
            because = "this torch is built without CUDA"
        return f"no NVIDIA card is usable here ({because})"
    if torch.version.hip is not None:
        return "the card here is not NVIDIA's, the only ones that this engine serves"
    try:
        name, found = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError) as error:
        return f"the NVIDIA card does not answer ({_first_line(error)})"
    if found < MIN_CAPABILITY:
        return (
            f"{name} has compute capability {found[0]}.{found[1]} and this engine needs "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} (Ampere) or newer"
        )
    return None


def card() -> Card:
    """The current card. Raises DeviceError where it does not answer."""
    try:
        free, total = torch.cuda.mem_get_info()
        return Card(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), total, free)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"the NVIDIA card does not answer ({_first_line(error)}): use device cpu") from None


def wake(device: torch.device) -> None:
    """Begin what takes some tenths of a second each, in threads, while headers are read: the card's context, and
    Triton's hash of itself, which is part of the name of every compiled kernel."""
    if device.type == "cuda":
        threading.Thread(target=_touch, args=(device,), name="ragate-wake", daemon=True).start()
        threading.Thread(target=hash_triton, name="ragate-hash", daemon=True).start()


_hashing = threading.Lock()


def hash_triton() -> None:
    """Have Triton hash itself once: of many threads that ask at the same time each would read half a gigabyte."""
    with _hashing:
        try:
            from triton.runtime.cache import triton_key
        except ImportError:  # it lived elsewhere in older versions; then the first kernel pays
            return
        triton_key()


def _touch(device: torch.device) -> None:
    try:
        torch.empty(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError):
        return  # who uses the card next hears of it in the main thread


def failure(error: BaseException, name: str = "the card") -> EngineError:
    """What to tell every request when a step ended in `error`: an EngineError as it is, a lost card in one sentence."""
    if isinstance(error, EngineError):
        return error
    if isinstance(error, torch.OutOfMemoryError) or (is_lost(error) and "out of memory" in str(error)):
        return DeviceError(
            f"{name} ran out of memory in mid-run: end what else uses it, or leave it more room with kv_gib"
        )
    if is_lost(error):
        return DeviceError(f"{name} was lost in mid-run ({_first_line(error)})")
    return DeviceError(f"the engine stopped: {type(error).__name__}: {error}")


def is_lost(error: BaseException) -> bool:
    """Whether `error` comes from a card that no longer serves this process: nothing on it can be used again."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    accelerator = getattr(torch, "AcceleratorError", None)  # since torch 2.8
    if accelerator is not None and isinstance(error, accelerator):
        return True
    text = str(error)
    return (
        text.startswith(("CUDA error", "CUDA driver error", "Triton Error [CUDA]")) or "CUBLAS_STATUS" in text
    )


def keep_for_ever(thing: object) -> None:
    """Never free `thing`: page-locked memory that is freed after its card is lost ends the process at once."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return text or type(error).__name__
