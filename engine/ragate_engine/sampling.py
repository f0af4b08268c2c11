"""From logits to a sampled token by keyed Gumbel noise, and the one definition of that noise for CPU and card.

The noise of a token is a function of (seed, position, token): no batch, no schedule and no mask can change it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ragate_engine.request import SamplingParams

Logits = npt.NDArray[np.float32]
Bits = npt.NDArray[np.int32]


def allowed_tokens(mask: Bits, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Bit mask [ceil(V / 32)] -> bool [V]."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little", count=vocab_size).view(np.bool_)


def philox(counters: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Philox4x32-10 of counters [n, 4] under a key of two 32-bit words: [n, 4].

    Source: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    low = np.uint64(0xFFFFFFFF)
    a, b, c, d = (counters[:, i].astype(np.uint64) for i in range(4))
    for turn in range(10):
        k0 = np.uint64((key[0] + turn * 0x9E3779B9) % 2**32)
        k1 = np.uint64((key[1] + turn * 0xBB67AE85) % 2**32)
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (q >> np.uint64(32)) ^ b ^ k0, q & low, (p >> np.uint64(32)) ^ d ^ k1, p & low
    return np.stack([a, b, c, d], axis=1).astype(np.uint32)


def uniform(seed: int, position: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """A number in (0, 1) for each of `tokens` (ascending): word token % 4 of Philox at (token // 4, position).

    A float32 multiple of 2^-32, rounded; the ends are moved inside. The key is `seed` modulo 2^64.
    """
    seed %= 2**64
    blocks, at = np.unique(tokens >> 2, return_inverse=True)
    counters = np.zeros((len(blocks), 4), np.uint32)
    counters[:, 0], counters[:, 1] = blocks, position
    words = philox(counters, (seed % 2**32, seed >> 32))[at, tokens & 3]
    u: npt.NDArray[np.float32] = words.astype(np.float32) * np.float32(2**-32)
    return np.minimum(np.maximum(u, np.float32(2**-33)), np.float32(1 - 2**-24))


def gumbel(seed: int, position: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Gumbel noise of each of `tokens` (ascending). 1 - u, not u: a float is finest near 0, where the highest are."""
    return -np.log(-np.log1p(-uniform(seed, position, tokens).astype(np.float64)))


def sample(logits: Logits, allowed: npt.NDArray[np.bool_], params: SamplingParams, position: int) -> int:
    """A token from softmax(logits / temperature), cut to `allowed`, top-k and top-p, by the Gumbel-max trick.

    Ties are broken by the lowest id, at the cuts and at the end; -1 where nothing is allowed (a logit that is not
    finite is not). Source: Gumbel 1954; Holtzman et al. 2020 for top-p.
    """
    ids = np.flatnonzero(allowed & np.isfinite(logits))
    if not len(ids):
        return -1
    scaled = (logits[ids].astype(np.float64) - logits[ids].max()) / params.temperature
    if params.top_k or params.top_p < 1.0:
        order = np.lexsort((ids, -scaled))
        if params.top_k:
            order = order[: params.top_k]
        if params.top_p < 1.0:
            weights = np.exp(scaled[order])
            before = np.cumsum(weights) - weights
            order = order[before < params.top_p * weights.sum()]
        kept = np.sort(order)
        ids, scaled = ids[kept], scaled[kept]
    return int(ids[np.argmax(scaled + gumbel(params.seed, position, ids))])
