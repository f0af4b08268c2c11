"""Every weight of an adapter in one float32 vector: one thing to step, to save and to cast."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ragate_engine.quantize.layer import STAGES
from ragate_engine.weights import names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ragate_engine.config import ModelConfig
    from ragate_engine.training.recipe import TuneRecipe


class Pairs(NamedTuple):
    """The pairs of the linears of one stage, which share their input."""

    a: torch.Tensor | None
    """[pairs * rank, in], stacked in the order of `b`; `None` where no linear of the stage is adapted."""
    b: dict[str, torch.Tensor]
    """[out, rank] by leaf."""


class Vector:
    """Where each matrix lies in the vector: by layer, by stage, its stacked A and then its B."""

    def __init__(self, config: ModelConfig, recipe: TuneRecipe) -> None:
        self.rank = recipe.rank
        self.layers = config.num_layers
        shapes = names.expected(config)
        self.stages = {
            stage: {leaf: shapes[f"layers.0.{leaf}"] for leaf in leaves if leaf in recipe.targets}
            for stage, leaves in STAGES.items()
        }
        self.sizes = [
            size
            for _ in range(self.layers)
            for linears in self.stages.values()
            if linears
            for size in (
                sum(self.rank * width for _, width in linears.values()),
                *(out * self.rank for out, _ in linears.values()),
            )
        ]

    def initial(self, seed: int) -> torch.Tensor:
        """A as PEFT draws it, kaiming uniform with a = sqrt(5), which is within 1 / sqrt(in); B zero."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.zeros(sum(self.sizes), dtype=torch.float32)
        for layer in self._split(drawn):
            for pairs in layer.values():
                if pairs.a is not None:
                    pairs.a.uniform_(
                        -(pairs.a.shape[1] ** -0.5), pairs.a.shape[1] ** -0.5, generator=generator
                    )
        return drawn

    def by_layer(self, vector: torch.Tensor) -> list[dict[str, Pairs]]:
        """Views of `vector`, by stage, for each layer."""
        return list(self._split(vector))

    def by_leaf(self, vector: torch.Tensor) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """A [rank, in] and B [out, rank] of each adapted linear, for each layer."""
        found = []
        for layer in self._split(vector):
            pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            for stacked, b in layer.values():
                if stacked is not None:
                    pairs |= zip(b, zip(stacked.split(self.rank), b.values(), strict=True), strict=True)
            found.append(pairs)
        return found

    def _split(self, vector: torch.Tensor) -> Iterator[dict[str, Pairs]]:
        parts = iter(vector.split(self.sizes))
        for _ in range(self.layers):
            layer = {}
            for stage, linears in self.stages.items():
                a = next(parts).view(len(linears) * self.rank, -1) if linears else None
                layer[stage] = Pairs(a, {leaf: next(parts).view(-1, self.rank) for leaf in linears})
            yield layer
