"""Compiles quantized kernels for a Hopper card, without one, and prints what `test_quantized_code.py` looks at."""

from __future__ import annotations

import importlib
import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ragate_engine.quant.tensor import Form

kernels = importlib.import_module("ragate_engine.kernels.triton.quantized")
ahead = importlib.import_module("ragate_engine.kernels.triton.ahead")
kernels.device.shared_memory = lambda: 232_448  # type: ignore[attr-defined]
kernels.device.programs = lambda: 132  # type: ignore[attr-defined]


def compiled(bits: int, group: int, kind: int, rows: int, out: int, width: int) -> dict[str, object]:
    """What became of the product of `rows` rows with a weight [out, width]."""
    low, high = kernels.PLANES[bits]
    walk = kernels.walk_of(bits, group)

    def fake(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(1, dtype=dtype).expand(shape)

    packed = ahead._stand_in(fake, Form(1, bits, group, kind > 0), out, width, False)
    assert packed.kind == kind
    segments = packed.segments
    tile = kernels.best_tile(rows, packed)
    fixed = {
        "BM": tile.rows, "BN": tile.columns, "S": segments, "BLOCKS": tile.inner // walk.block, "LOW": low,
        "HIGH": high, "BITS": bits, "GROUP": group, "GROUPS": walk.groups, "KIND": kind, "COUNTED": True,
        "HAS_BIAS": False, "GATED": False, "GELU": False, "STAGES": tile.stages, "ASM": 2, "PDL": True, "EVEN": True,
    }  # fmt: skip
    types = {
        "bias": "*bf16",
        "y": "*bf16",
        "count": "*i32",
        "sums": "*fp32",
        "done": "*i32",
        "low": "*i16",
        "high": "*i16",
        "post": "fp32",
    }
    types["scales"] = "*i64" if packed.scales.dtype == torch.int64 else "*i32"
    types["x"] = "*bf16" if tile.few else f"tensordesc<bf16[{tile.rows},{walk.block}]>"
    function = kernels._few if tile.few else kernels._many
    names = function.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name][0] == "*" or name in ("N", "K", "SPAN", "stride")
    }
    source = ASTSource(
        function, signature, {(i,): fixed[name] for i, name in enumerate(names) if name in fixed}, aligned
    )
    options = {"num_warps": tile.warps, "num_stages": 3}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    weights = tile.columns * tile.inner // (tile.warps if segments == 1 or not tile.few else 1)
    text = made.asm["ttgir"]
    loop = text[text.index("scf.for") :]
    return {
        "few": tile.few,
        "shared": made.metadata.shared,
        "widths": sorted(set(re.findall(r"kWidth = (\d+)", text))),
        "register products": len(re.findall(r"warp_group_dot %\w+, .*dot_op<\{opIdx = 0", text)),
        "waits": sorted(set(re.findall(r"pendings = (\d+)", text))),
        "through shared memory": len(re.findall(r"local_store|ttg.local_alloc %", loop[: loop.index("scf.yield")])),
        "shuffles": made.asm["ptx"].count("shfl.sync.bfly"),
        "instructions": loop_of(made.asm["sass"]) * 4096 // weights,
    }  # fmt: skip


def loop_of(machine: str) -> int:
    """Instructions of the longest loop."""
    lines = machine.splitlines()
    labels = {line.removesuffix(":"): i for i, line in enumerate(lines) if line.startswith("LBB")}
    jumps = [(i, re.search(r"BRA (LBB\d+)", line)) for i, line in enumerate(lines)]
    return max(i - labels[found[1]] for i, found in jumps if found and labels.get(found[1], i) <= i)


if __name__ == "__main__":
    print(json.dumps([compiled(*case) for case in json.loads(sys.argv[1])]))
