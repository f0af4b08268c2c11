"""ggml's own quantizer, out of the library that `xllamacpp` brings."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from ragate_engine.quant.formats import Kind


def quantize(kind: Kind, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows of float32 as ggml writes them, uint8 [n, row_bytes]; skips where its symbols are not exported."""
    from ragate_engine.quant.formats import FORMATS

    module = pytest.importorskip("xllamacpp.xllamacpp")
    try:
        chunk = ctypes.CDLL(module.__file__).ggml_quantize_chunk
    except (OSError, AttributeError):
        pytest.skip("this build of xllamacpp does not show ggml's symbols")
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64
    chunk.restype = size
    chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    form = FORMATS[kind]
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    out = np.zeros((len(rows), rows.shape[1] // form.block_weights * form.block_bytes), dtype=np.uint8)
    written = chunk(int(kind), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
    assert written == out.nbytes
    return out
