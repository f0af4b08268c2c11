"""`choose` and `sample` of `pick.py` in plain torch and numpy: the oracle of the kernels, and their stand-in."""

from __future__ import annotations

import struct

import torch

from ragate_engine.kernels.triton.pick import HEADER, ROW, PickWorkspace
from ragate_engine.request import SamplingParams


def allowed(logits: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[W, V] bool: the tokens that each row's mask (none: every one) and a logit above -inf allow."""
    possible = logits > float("-inf")
    if mask is None:
        return possible
    lines = rows[:, 0].long()
    bits = (mask[lines.clamp(min=0)].unsqueeze(-1) >> torch.arange(32, device=mask.device)) & 1
    return possible & (bits.flatten(1)[:, : logits.shape[1]].bool() | (lines < 0)[:, None])


def choose(
    workspace: PickWorkspace | None,
    logits: torch.Tensor,
    rows: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    sampled: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """The likeliest allowed token of each row, its log-sum-exp and its alternatives, to `out` and `sampled`."""
    real = logits.shape[0] if count is None else int(count)
    logits, rows = logits[:real], rows[:real]
    top = (out.shape[1] - HEADER) // 2
    open_ = allowed(logits, rows, mask)
    # a stable sort, not topk, which chooses freely among equals; + 0.0 makes -0.0 an equal of 0.0
    values, ids = (logits + 0.0).masked_fill(~open_, float("-inf")).sort(dim=-1, descending=True, stable=True)
    ids = ids.masked_fill(values == float("-inf"), -1).int()
    lse = torch.logsumexp(logits, -1)
    lse = lse.masked_fill(lse == float("inf"), float("nan"))
    out[:real, 0], out[:real, 3] = ids[:, 0], 0
    out[:real, 1], out[:real, 2] = values[:, 0].view(torch.int32), lse.view(torch.int32)
    kept = min(top, logits.shape[1])
    out[:real, HEADER : HEADER + top] = -1
    out[:real, HEADER + top :] = torch.tensor(float("-inf"), dtype=torch.float32).view(torch.int32)
    out[:real, HEADER : HEADER + kept] = ids[:, :kept]
    out[:real, HEADER + top : HEADER + top + kept] = values[:, :kept].contiguous().view(torch.int32)
    _to_pool(rows, out[:real], sampled)


def sample(
    workspace: PickWorkspace | None,
    logits: torch.Tensor,
    rows: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    sampled: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> None:
    """After `choose`: rows of temperature > 0 get a sampled token in place of the likeliest."""
    from ragate_engine import sampling

    real = logits.shape[0] if count is None else int(count)
    open_ = allowed(logits[:real], rows[:real], mask).cpu().numpy()
    values = logits[:real].cpu().numpy()
    for w, row in enumerate(rows[:real].cpu().numpy()):
        _, _, temperature, top_p, top_k, low, high, position = struct.unpack(ROW.format, row.tobytes())
        sound = bool(out[w, 2:3].view(torch.float32).isfinite())
        if temperature > 0 and sound and open_[w].any():
            params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=low | high << 32)
            token = sampling.sample(values[w], open_[w], params, position)
            out[w, 0] = token
            out[w, 1] = logits[w, token : token + 1].view(torch.int32)[0]
    _to_pool(rows[:real], out[:real], sampled)


def _to_pool(rows: torch.Tensor, out: torch.Tensor, sampled: torch.Tensor | None) -> None:
    """Each row's token to its slot, 0 where there is none."""
    if sampled is not None:
        slots = rows[:, 1].long()
        sampled[slots[slots >= 0]] = out[slots >= 0, 0].clamp(min=0)
