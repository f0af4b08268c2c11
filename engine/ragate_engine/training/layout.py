"""A forward pass as tensors: the tokens of its packs in a row, and where attention finds each example's own.

Prefixes stand first, one after the other, then the own tokens of every member. For attention the own tokens are padded
on the right, members of like length together: what a query must not see lies behind it, so no padding needs a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ragate_engine.training.packs import Pack
    from ragate_engine.training.recipe import Example

_SHORTEST = 0.6
"""Of the longest own part in a bucket: shorter ones begin another, which costs launches and saves padding."""


class Bucket(NamedTuple):
    """Members of one pack whose own tokens are padded to one length."""

    pack: int
    members: int
    length: int


@dataclass(frozen=True)
class Layout:
    """One forward pass over `packs`: M tokens, of which W predict something trained."""

    prefixes: tuple[int, ...]
    """Tokens of each pack's prefix; 0 where there is none."""
    buckets: tuple[Bucket, ...]
    own: int
    """Own tokens of all members."""
    ids: torch.Tensor
    """int64 [M]."""
    positions: torch.Tensor
    """int64 [M]: of each token in its example."""
    padded: torch.Tensor
    """int64 [sum of members * length]: the own token at each padded place; where there is none, any."""
    real: torch.Tensor
    """bool [sum of members * length]: whether there is one."""
    places: torch.Tensor
    """int64 [own]: the padded place of each own token."""
    rows: torch.Tensor
    """int64 [W]: tokens whose output predicts a trained one."""
    targets: torch.Tensor
    """int64 [W]: what they predict."""
    weights: torch.Tensor
    """float32 [W]: what it counts in the loss."""


def lay_out(examples: Sequence[Example], packs: Sequence[Pack], device: torch.device) -> Layout:
    """The tensors of a pass over `packs` of `examples`, on `device`."""
    heads = [examples[pack.members[0]].prompt[: pack.prefix] for pack in packs]
    ids = [token for head in heads for token in head]
    positions = [place for head in heads for place in range(len(head))]
    first = len(ids)
    padded: list[int] = []
    real: list[bool] = []
    places: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    buckets: list[Bucket] = []
    for number, pack in enumerate(packs):
        for members in _alike(pack, examples):
            length = examples[members[0]].length - pack.prefix
            buckets.append(Bucket(number, len(members), length))
            for i in members:
                example = examples[i]
                start, size = len(ids) - first, example.length - pack.prefix
                places += range(len(padded), len(padded) + size)
                padded += [*range(start, start + size), *[start] * (length - size)]
                real += [*[True] * size, *[False] * (length - size)]
                ids += (example.prompt + example.answer)[pack.prefix : -1]
                positions += range(pack.prefix, example.length)
                before = len(ids) - len(example.answer)
                trained = [j for j, weight in enumerate(example.weights) if weight > 0]
                rows += [before + j for j in trained]
                targets += [example.answer[j] for j in trained]
                weights += [example.weights[j] for j in trained]

    def whole(values: list[int]) -> torch.Tensor:
        return _on(np.array(values, dtype=np.int64), device)

    return Layout(
        prefixes=tuple(pack.prefix for pack in packs),
        buckets=tuple(buckets),
        own=len(ids) - first,
        ids=whole(ids),
        positions=whole(positions),
        padded=whole(padded),
        real=_on(np.array(real), device),
        places=whole(places),
        rows=whole(rows),
        targets=whole(targets),
        weights=_on(np.array(weights, dtype=np.float32), device),
    )


def _alike(pack: Pack, examples: Sequence[Example]) -> list[tuple[int, ...]]:
    """The members of a pack, longest first, in runs of like length."""
    own = [examples[i].length - pack.prefix for i in pack.members]
    cuts = [0]
    for at, size in enumerate(own):
        if size < _SHORTEST * own[cuts[-1]]:
            cuts.append(at)
    return [pack.members[start:stop] for start, stop in pairwise([*cuts, len(own)])]


def _on(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device)


class _Padded(torch.autograd.Function):
    """Rows of x [own, width] at their padded places. Each row has one place, so the gradient is a reading, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.padded)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.index_select(0, ctx.layout.places), None


class _Unpadded(torch.autograd.Function):
    """The rows of padded x that are own tokens: `_Padded` backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.places)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout = ctx.layout
        return gradient.index_select(0, layout.padded).mul_(layout.real.unsqueeze(1)), None


def pad(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Own tokens [own, width] -> [sum of members * length, width] in the order of `layout.buckets`."""
    found: torch.Tensor = _Padded.apply(x, layout)  # type: ignore[no-untyped-call]
    return found


def unpad(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`pad` backwards."""
    found: torch.Tensor = _Unpadded.apply(x, layout)  # type: ignore[no-untyped-call]
    return found
