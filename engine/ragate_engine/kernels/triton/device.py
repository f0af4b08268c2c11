"""What all kernels ask of the card: how many programs it runs at once, and whether launches may overlap."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

PDL = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
"""Programmatic dependent launch: a kernel is set up while the one before it ends (Hopper and later)."""

COMPILED = os.environ.get("TRITON_INTERPRET") != "1"
"""Whether kernels run as machine code: the interpreter knows no inline assembly."""

ASM = int(COMPILED) + int(COMPILED and PDL)
"""What kernels write in assembly: 0 nothing, 1 what cards from Ampere on know, 2 what Hopper knows."""


def launch() -> dict[str, Any]:
    """Launch options that go with `PDL`."""
    return {"launch_pdl": True} if PDL else {}


@functools.cache
def programs() -> int:
    """Multiprocessors of the card; a small number where kernels are interpreted."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)
    return 4


@functools.cache
def shared_memory() -> int:
    """Bytes of shared memory that one program may have; the H200's where kernels are interpreted."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return int(getattr(properties, "shared_memory_per_block_optin", 232_448))
    return 232_448
