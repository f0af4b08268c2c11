"""What the tests on a card share: where they run, how far off a result is, kernels compiled side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

CARD = torch.device("cuda")
NEEDS_CARD = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Size of the difference over the size of what is expected; NaN where either holds one."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def name_of(value: object) -> str:
    """A test's parameter in its name."""
    return str(value).removeprefix("torch.").replace(" ", "")


def compile_together(launches: Iterable[Callable[[], object]]) -> None:
    """Make the launches from as many threads as there are cores; what does not compile fails where it is used."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(launch) for launch in launches]:
            done.exception()
    torch.cuda.synchronize()


def on_device(count: int) -> torch.Tensor:
    """A number of rows as the kernels read it: int32 [1], somewhere in a larger buffer."""
    return torch.full((4,), count, dtype=torch.int32, device=CARD)[1:2]
