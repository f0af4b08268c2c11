"""From logits to a sampled token by keyed Gumbel noise (greedy ones are picked by a kernel)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ragate_engine.request import SamplingParams

Logits = npt.NDArray[np.float32]
Bits = npt.NDArray[np.int32]


def allowed_tokens(mask: Bits, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Bit mask [ceil(V / 32)] -> bool [V]."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little", count=vocab_size).view(np.bool_)


def gumbel(seed: int, position: int, count: int) -> npt.NDArray[np.float64]:
    """Noise for one place of one sequence: keyed by (seed, position), so no batch or schedule can change it."""
    uniform = np.random.Generator(np.random.Philox(key=[seed % 2**64, position])).random(count)
    return -np.log(-np.log(np.maximum(uniform, 1e-300)))


def sample(logits: Logits, allowed: npt.NDArray[np.bool_], params: SamplingParams, position: int) -> int:
    """A token from softmax(logits / temperature), cut to `allowed`, top-k and top-p, by the Gumbel-max trick.

    Ties at the cut are broken by the lowest id. Source: Gumbel 1954; Holtzman et al. 2020 for top-p.
    """
    ids = np.flatnonzero(allowed)
    scaled = logits[ids].astype(np.float64) / params.temperature
    order = np.lexsort((ids, -scaled))
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        weights = np.exp(scaled[order] - scaled[order[0]])
        before = np.cumsum(weights) - weights
        order = order[before < params.top_p * weights.sum()]
    noise = gumbel(params.seed, position, len(logits))
    kept = np.sort(order)
    return int(ids[kept[np.argmax(scaled[kept] + noise[ids[kept]])]])
