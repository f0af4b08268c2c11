"""What the quantized kernels ask of Triton's compiler, and what a newer one could take away: seen in compiled code.

Compiled for a Hopper card in a process of its own, since this one interprets kernels; no card is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KINDS = [(4, 128, 1), (4, 32, 2), (6, 16, 0), (2, 64, 1), (2, 16, 2)]
"""Bits, group, and what stands beside a scale: nothing, a zero, an offset."""
LAUNCHES = [(1, 28672, 4096), (1, 4096, 14336), (60, 4096, 14336), (1000, 28672, 4096)]
"""Rows of x, and the weight's shape: one chain and segments, few rows and many."""


@pytest.fixture(scope="module")
def code() -> list[dict[str, object]]:
    cases = [(*kind, *launch) for kind in KINDS for launch in LAUNCHES]
    script = Path(__file__).parent / "quantized_code.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [{"case": case, **found} for case, found in zip(cases, json.loads(done.stdout), strict=True)]


def test_a_product_walks_k_in_the_order_of_memory(code) -> None:
    """Of a wider layout the tensor cores would take columns 0, 1, 4, 5, ... first, and give other bits."""
    assert {tuple(found["widths"]) for found in code} == {("2",)}


def test_no_code_changes_its_thread(code) -> None:
    for found in code:
        assert found["through shared memory"] == 0, found
        assert found["shuffles"] == 0, found


def test_products_out_of_registers_end_before_the_registers_are_used_again(code) -> None:
    many = [found for found in code if not found["few"]]
    assert many and all(found["register products"] for found in many)
    for found in many:
        assert found["waits"] == ["0"], found


def test_unpacking_takes_few_instructions(code) -> None:
    """Of 16 rows and 256 columns, 2,048 pairs of codes, a warp has 64 in each of its threads."""
    few = {
        tuple(found["case"][:3]): found["instructions"] for found in code if found["case"][3:5] == (1, 28672)
    }
    most = {(4, 128, 1): 400, (4, 32, 2): 330, (6, 16, 0): 480, (2, 64, 1): 330, (2, 16, 2): 260}
    assert few.keys() == most.keys()
    for kind, instructions in few.items():
        assert 2 * 64 < instructions <= most[kind], kind


def test_everything_fits_the_shared_memory_of_a_program(code) -> None:
    assert max(found["shared"] for found in code) <= 232_448
