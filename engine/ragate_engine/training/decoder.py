"""`TunedDecoder`: the frozen model with an adapter on its linears, from the tokens of a pass to its loss."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ragate_engine.layers import dense, rope_tables
from ragate_engine.quantize.layer import STAGES, turned
from ragate_engine.training.attention import attention
from ragate_engine.training.frozen import Frozen
from ragate_engine.training.vector import Vector

if TYPE_CHECKING:
    from collections.abc import Callable

    from ragate_engine.layers import Weight
    from ragate_engine.training.layout import Layout
    from ragate_engine.training.recipe import TuneRecipe
    from ragate_engine.training.vector import Pairs
    from ragate_engine.weights import Checkpoint

HEAD_ROWS = 1024
"""Rows whose logits are there at once: of 152,000 float32 each in Qwen2."""

Tables = tuple[torch.Tensor, torch.Tensor]


class _Layer:
    """One layer over the tokens of a pass: the arithmetic of `quantize.layer.run_layer`, with pairs and packs."""

    def __init__(
        self,
        index: int,
        decoder: TunedDecoder,
        load: Callable[[str], Weight],
        packed: bool,
    ) -> None:
        config, dtype, device = decoder.config, decoder.dtype, decoder.device
        self.config, self.scale = config, decoder.scale
        self.rope, self.window = config.rope_of(index), config.window_of(index)

        def weight(leaf: str) -> Weight:
            return load(f"layers.{index}.{leaf}")

        self.stages: dict[str, Frozen] = {}
        self.widths: dict[str, list[int]] = {}
        for stage, leaves in STAGES.items():
            weights = [weight(leaf) for leaf in leaves]
            biased = stage == "qkv" and config.qkv_bias
            biases = [dense(weight(f"{leaf}_bias"), dtype, device) for leaf in leaves] if biased else []
            self.widths[stage] = [each.shape[0] for each in weights]
            self.stages[stage] = Frozen(weights, biases, dtype, device, packed)
        norms = ["attn_norm", "mlp_norm"]
        norms += ["q_norm", "k_norm"] if config.qk_norm else []
        norms += ["attn_post_norm", "mlp_post_norm"] if config.sandwich_norm else []
        self.norms = {leaf: dense(weight(leaf), dtype, device) for leaf in norms}

    def __call__(
        self, pairs: dict[str, Pairs], tables: Tables, layout: Layout, h: torch.Tensor
    ) -> torch.Tensor:
        """h [M, hidden] -> [M, hidden]; `tables`: cos and sin of each token, float32 [M, rotary / 2]."""
        config = self.config
        dim = config.head_dim
        x = self._norm("attn_norm", h)
        q, k, v = (part.unflatten(1, (-1, dim)) for part in self._product("qkv", x, pairs))
        if config.qk_norm:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        heads = torch.cat([turned(torch.cat([q, k], dim=1), tables), v], dim=1)
        (x,) = self._product("o", attention(heads, config, self.window, layout), pairs)
        if config.sandwich_norm:
            x = self._norm("attn_post_norm", x)
        h = h + x
        gate, up = self._product("gate_up", self._norm("mlp_norm", h), pairs)
        acted = F.silu(gate) if config.activation == "silu" else F.gelu(gate, approximate="tanh")
        (x,) = self._product("down", acted * up, pairs)
        if config.sandwich_norm:
            x = self._norm("mlp_post_norm", x)
        return h + x

    def _norm(self, leaf: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.norms[leaf]
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)

    def _product(self, stage: str, x: torch.Tensor, pairs: dict[str, Pairs]) -> list[torch.Tensor]:
        """W x + scale * B A x of each linear of `stage`."""
        found = dict(zip(STAGES[stage], self.stages[stage](x).split(self.widths[stage], dim=1), strict=True))
        a, b = pairs[stage]
        if a is not None:
            inner = F.linear(x, a).split(a.shape[0] // len(b), dim=1)
            for (leaf, out), u in zip(b.items(), inner, strict=True):
                found[leaf] = torch.addmm(found[leaf], u, out.t(), alpha=self.scale)
        return list(found.values())


class TunedDecoder:
    """A frozen model and the shape of its adapter."""

    def __init__(
        self, source: Checkpoint, recipe: TuneRecipe, longest: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`longest`: tokens of the longest example. Raises ModelFileError, ConfigError."""
        config = source.config
        self.config, self.dtype, self.device = config, dtype, device
        self.scale = recipe.scale
        self.checkpointing = recipe.checkpointing
        self.vector = Vector(config, recipe)
        ropes = {config.rope_of(i) for i in range(config.num_layers)}
        self.tables = {rope: rope_tables(rope, config.head_dim, longest, device) for rope in ropes}
        with source.stream(device) as load:
            self.table = dense(load("embed"), dtype, device)
            self.head = self.table if config.tie_embeddings else dense(load("lm_head"), dtype, device)
            self.final_norm = dense(load("final_norm"), dtype, device)
            self.layers = [_Layer(i, self, load, recipe.base == "packed") for i in range(config.num_layers)]

    def loss(self, adapter: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Sum over the trained tokens of a pass of weight * -ln p, float32 scalar; `adapter` is the float32 vector."""
        h = self.table[layout.ids] * self.config.embed_scale
        turns = {
            rope: (cos[layout.positions], sin[layout.positions]) for rope, (cos, sin) in self.tables.items()
        }
        for layer, pairs in zip(self.layers, self.vector.by_layer(adapter.to(self.dtype)), strict=True):
            run = partial(layer, pairs, turns[layer.rope], layout)
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(run, h, use_reentrant=False, preserve_rng_state=False)
            else:
                h = run(h)
        x = F.rms_norm(h[layout.rows], self.final_norm.shape, self.final_norm, self.config.norm_eps)
        parts = zip(*(each.split(HEAD_ROWS) for each in (x, layout.targets, layout.weights)), strict=True)
        # logits are computed again for the backward pass rather than kept
        losses = [
            checkpoint(self._head_loss, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
        return torch.stack(losses).sum()

    def _head_loss(self, x: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [W, hidden], normed -> the sum of weight * -ln p."""
        logits = F.linear(x, self.head).float()
        if self.config.logit_soft_cap is not None:
            logits = self.config.logit_soft_cap * torch.tanh(logits / self.config.logit_soft_cap)
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
