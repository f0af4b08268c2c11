"""The C kernels behind the common names: built on first use with the machine's compiler, called through ctypes.

Tensors are float32 and contiguous. The library is cached in the user's cache folder under the hash of its source,
so that a new version never meets an old binary.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ragate_engine.config import BLOCK_SIZE
from ragate_engine.kernels import HeadShape, LayerKV, StepInputs
from ragate_engine.kernels.reference import embed as embed

NAME = "cpu-1"
SOURCE = Path(__file__).with_name("kernels.c")
GROUP_ROWS = 16
"""Rows that attention reads KV for together."""
WORTH_SHARING = 8
"""Leading blocks that single-token rows must have in common to be read together."""
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread"]


def _targets() -> list[list[str]]:
    """Compiler flags to try, best first: every one has fused multiply-add, so all give the same bits."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "fma avx2"
        if "fma" not in flags or "avx2" not in flags:
            return []
        wide = [["-march=x86-64-v4", "-mprefer-vector-width=512"]] if "avx512vl" in flags else []
        return [*wide, ["-march=x86-64-v3"], ["-mavx2", "-mfma"]]
    return [[]]


def build(source: Path, targets: list[list[str]], folder: Path) -> Path | None:
    """Compile `source` for the first target that the compiler takes; `None` where there is no compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    for target in targets:
        key = hashlib.sha256(source.read_bytes() + repr((FLAGS, target, compiler)).encode()).hexdigest()[:16]
        library = folder / f"kernels-{key}.so"
        if library.exists():
            return library
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            command = [*compiler.split(), *FLAGS, *target, str(source), "-o", str(made), "-lm"]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                os.replace(made, library)
                return library
    return None


def _cache_folder() -> Path:
    import platformdirs

    return Path(os.environ.get("RAGATE_CACHE") or platformdirs.user_cache_dir("ragate")) / "kernels"


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        path = build(SOURCE, _targets(), _cache_folder())
        return ctypes.CDLL(str(path)) if path is not None else None
    except OSError:  # a read-only cache, or a folder mounted noexec
        return None


def available() -> bool:
    """Whether the library could be built (a C compiler, and on x86 a CPU with FMA)."""
    return _library() is not None


def set_threads(threads: int) -> None:
    """How many threads the kernels use, the caller's included."""
    _call("rg_set_threads", c_int(threads))


def _call(name: str, *arguments: object) -> None:
    library = _library()
    assert library is not None
    getattr(library, name)(*arguments)


def _ptr(tensor: torch.Tensor | None) -> c_void_p:
    if tensor is None:
        return c_void_p(None)
    # every type here has four bytes: a tensor of torch's default type, which others may set, has no place
    assert tensor.is_contiguous() and tensor.element_size() == 4
    return c_void_p(tensor.data_ptr())


@dataclass(frozen=True)
class Packed:
    """A weight as panels of 16 output columns: [ceil(out / 16)][in][16], zero padded."""

    panels: torch.Tensor
    out_features: int


def pack_linear(weight: torch.Tensor) -> Packed:
    """Prepare `weight` [out, in]."""
    out_features, in_features = weight.shape
    rows = -(-out_features // BLOCK_SIZE)
    padded = torch.nn.functional.pad(weight.float(), (0, 0, 0, rows * BLOCK_SIZE - out_features))
    return Packed(padded.view(rows, BLOCK_SIZE, in_features).transpose(1, 2).contiguous(), out_features)


def linear(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    wide: bool = False,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, out] = x [M, in] W^T + bias; always float32, so `wide` changes nothing."""
    height, in_features = x.shape
    y = torch.empty(height, packed.out_features, dtype=torch.float32)
    _call("rg_linear", _ptr(x), _ptr(packed.panels), _ptr(bias), _ptr(y), c_long(height), c_long(in_features),
          c_long(packed.out_features))  # fmt: skip
    return y


def pack_gated(gate: torch.Tensor, up: torch.Tensor) -> Packed:
    """Prepare the gate and up weights [out, in] of an MLP."""
    return pack_linear(torch.cat([gate, up]))


def gated(x: torch.Tensor, packed: Packed, activation: str, rows: torch.Tensor | None = None) -> torch.Tensor:
    """act(x gate^T) * (x up^T): [M, in] -> [M, out]."""
    return act_mul(linear(x, packed, None), activation)


def rms_norm(
    h: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """h [M, D] += x [M, D] unless None; returns h / rms(h) * weight."""
    y = torch.empty_like(h)
    _call(
        "rg_rms_norm",
        _ptr(h),
        _ptr(x),
        _ptr(weight),
        _ptr(y),
        c_long(h.shape[0]),
        c_long(h.shape[1]),
        c_float(eps),
    )
    return y


def last_norm(
    h: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, step: StepInputs
) -> torch.Tensor:
    """`rms_norm` of h + x for the rows whose logits are wanted: [W, hidden]."""
    return rms_norm(h[step.wanted], x[step.wanted], weight, eps)


def make_kv(blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> LayerKV:
    """K [blocks, kv_heads, head_dim, 16] (a block's keys side by side) and V [blocks, kv_heads, 16, head_dim]."""
    # numpy's zeros take memory page by page as it is touched; torch's would touch all of it now
    k = np.zeros((blocks, kv_heads, head_dim, BLOCK_SIZE), np.float32)
    v = np.zeros((blocks, kv_heads, BLOCK_SIZE, head_dim), np.float32)
    return LayerKV(torch.from_numpy(k), torch.from_numpy(v))


def rope_write_kv(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    step: StepInputs,
    kv: LayerKV,
    shape: HeadShape,
) -> None:
    """qkv [M, (heads + 2 kv_heads) head_dim]: norm and rotate q and k in place, write k and v to their slots."""
    _call("rg_rope_write_kv", _ptr(qkv), _ptr(q_norm), _ptr(k_norm), _ptr(cos), _ptr(sin), _ptr(step.positions),
          _ptr(step.slots), _ptr(kv.k), _ptr(kv.v), c_long(qkv.shape[0]), c_long(shape.heads),
          c_long(shape.kv_heads), c_long(shape.head_dim), c_long(shape.rotary_dim), c_float(eps))  # fmt: skip


def plan_attention(
    starts: npt.NDArray[np.int32], counts: npt.NDArray[np.int32], tables: npt.NDArray[np.int32]
) -> torch.Tensor:
    """Rows to read KV for together: int32 [n, 3] of (first row, rows, leading blocks shared and full for all).

    Requests come sorted: single tokens first, those with equal tables side by side; then chunks, which are cut into
    pieces of 16 tokens. Grouping changes what is read how often, never a row's result.
    """
    groups: list[list[int]] = []
    at = 0
    lead = -1  # the table that the open group of single tokens is compared with; -1 where none is open
    for i, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        if count == 1:
            full = (start + 1) // BLOCK_SIZE
            if lead >= 0 and groups[-1][1] < GROUP_ROWS:
                known = groups[-1][2]
                equal = tables[lead, : min(known, full)] == tables[i, : min(known, full)]
                shared = len(equal) if equal.all() else int(equal.argmin())
                if shared >= WORTH_SHARING and 2 * shared >= known:
                    groups[-1][1] += 1
                    groups[-1][2] = shared
                    at += 1
                    continue
            lead = i
            groups.append([at, 1, full])
        else:
            lead = -1
            first = start
            while first < start + count:
                # pieces end at multiples of 16 positions, so all but a piece's last block is full for all its rows
                rows = min(start + count, (first // GROUP_ROWS + 1) * GROUP_ROWS) - first
                groups.append([at + first - start, rows, (first + 1) // BLOCK_SIZE])
                first += rows
        at += count
    return torch.tensor(groups, dtype=torch.int32)


def attention(
    qkv: torch.Tensor,
    kv: LayerKV,
    step: StepInputs,
    shape: HeadShape,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Causal attention of each row over its own blocks: [M, heads * head_dim]; head_dim a multiple of 16."""
    out = torch.empty(qkv.shape[0], shape.heads * shape.head_dim, dtype=torch.float32)
    _call("rg_attention", _ptr(qkv), _ptr(kv.k), _ptr(kv.v), _ptr(out), _ptr(step.positions),
          _ptr(step.row_table), _ptr(step.tables), _ptr(step.work), c_long(step.work.shape[0]),
          c_long(step.tables.shape[1]), c_long(shape.heads), c_long(shape.kv_heads), c_long(shape.head_dim),
          c_long(window or 0), c_float(scale), c_float(soft_cap or 0.0))  # fmt: skip
    return out


def act_mul(
    x: torch.Tensor,
    activation: str,
    dtype: torch.dtype = torch.float32,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, 2F] is gate | up; returns act(gate) * up [M, F]; float32, as all here."""
    y = torch.empty(x.shape[0], x.shape[1] // 2, dtype=torch.float32)
    _call("rg_act_mul", _ptr(x), _ptr(y), c_long(x.shape[0]), c_long(y.shape[1]), c_int(activation != "silu"))
    return y


def pick(logits: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [M, V], mask [M, ceil(V / 32)] int32 bits: (ids [M], log-sum-exp over all tokens [M])."""
    rows, vocabulary = logits.shape
    ids, lse = torch.empty(rows, dtype=torch.int32), torch.empty(rows, dtype=torch.float32)
    _call("rg_pick", _ptr(logits), _ptr(mask), _ptr(ids), _ptr(lse), c_long(rows), c_long(vocabulary),
          c_long(mask.shape[1]))  # fmt: skip
    return ids, lse


def likeliest(logits: torch.Tensor, mask: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` likeliest allowed tokens, best first: ids (-1 where fewer) and logits, [M, count] each."""
    rows, vocabulary = logits.shape
    ids = torch.empty(rows, count, dtype=torch.int32)
    values = torch.empty(rows, count, dtype=torch.float32)
    _call("rg_likeliest", _ptr(logits), _ptr(mask), _ptr(ids), _ptr(values), c_long(rows), c_long(vocabulary),
          c_long(mask.shape[1]), c_long(count))  # fmt: skip
    return ids, values
