"""`Decoder`: one transformer for every architecture we serve; its switches are fields of `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from ragate_engine.config import ModelConfig
from ragate_engine.kernels import HeadShape, LayerKV, StepInputs
from ragate_engine.kv import KVCache
from ragate_engine.layers import Embedding, Gated, Keep, Kept, Linear, LowRank, Weight, dense, rope_tables
from ragate_engine.lora import Adapter, slot_of_columns
from ragate_engine.quant.tensor import QuantTensor

Load = Callable[[str], Weight]
Tables = tuple[torch.Tensor, torch.Tensor]


class Layer:
    """Attention and MLP of one layer, pre-norm, with Gemma's norms behind each where the model has them."""

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        load: Load,
        tables: Tables,
        kernels: ModuleType,
        dtype: torch.dtype,
        device: torch.device,
        keep: Keep,
        adapters: Sequence[Adapter],
    ) -> None:
        def weight(name: str) -> Weight:
            return load(f"layers.{index}.{name}")

        def vector(name: str) -> torch.Tensor:
            return dense(weight(name), dtype, device).contiguous()

        def linear(*names: str, bias: bool = False) -> Linear:
            biases = [vector(f"{name}_bias") for name in names] if bias else []
            weights = [weight(name) for name in names]
            return Linear(weights, biases, kernels, dtype, device, keep, low_rank(*names))

        def low_rank(*leaves: str) -> LowRank | None:
            names = [f"layers.{index}.{leaf}" for leaf in leaves]
            return LowRank.of(adapters, config, names, kernels, dtype, device)

        self.kernels = kernels
        self.config = config
        self.qkv = linear("q", "k", "v", bias=config.qkv_bias)
        self.o = linear("o")
        gate, up, beside = weight("gate"), weight("up"), low_rank("gate", "up")
        self.gated = Gated(gate, up, config.activation, kernels, dtype, device, keep, beside)
        self.down = linear("down")
        self.attn_norm, self.mlp_norm = vector("attn_norm"), vector("mlp_norm")
        self.q_norm = vector("q_norm") if config.qk_norm else None
        self.k_norm = vector("k_norm") if config.qk_norm else None
        self.attn_post_norm = vector("attn_post_norm") if config.sandwich_norm else None
        self.mlp_post_norm = vector("mlp_post_norm") if config.sandwich_norm else None
        self.cos, self.sin = tables
        self.window = config.window_of(index)
        self.scale = config.attn_scale if config.attn_scale is not None else config.head_dim**-0.5
        self.shape = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim, 2 * tables[0].shape[1])

    def __call__(
        self,
        h: torch.Tensor,
        delta: torch.Tensor | None,
        step: StepInputs,
        kv: LayerKV,
        own: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """h [M, hidden] is updated in place (it takes in `delta`); returns what the next norm must add to it.

        `own` [M, columns]: whose adapter is whose, as in `LowRank`.
        """
        ops, eps, rows = self.kernels, self.config.norm_eps, step.rows
        qkv = self.qkv(ops.rms_norm(h, delta, self.attn_norm, eps, rows), rows, own=own)
        ops.rope_write_kv(qkv, self.q_norm, self.k_norm, eps, self.cos, self.sin, step, kv, self.shape)
        attended = ops.attention(
            qkv, kv, step, self.shape, self.scale, self.window, self.config.attn_soft_cap
        )
        out = self.o(attended, rows, own=own)
        if self.attn_post_norm is not None:
            out = ops.rms_norm(out, None, self.attn_post_norm, eps, rows)
        out = self.gated(ops.rms_norm(h, out, self.mlp_norm, eps, rows), rows, own)
        out = self.down(out, rows, own=own)
        if self.mlp_post_norm is not None:
            out = ops.rms_norm(out, None, self.mlp_post_norm, eps, rows)
        return out

    def kv_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How large K and V may become, per KV head: six standard deviations for inputs of unit size.

        From weights alone, so that an 8-bit cache has the same scales whatever was computed before.
        """
        shape = self.shape
        gain = self.attn_norm.float()
        size = (self.qkv.weight().float() * gain).norm(dim=1) * 6
        if self.qkv.bias is not None:
            size = size + self.qkv.bias.float().abs()
        heads = size.view(-1, shape.head_dim).amax(1)
        k, v = heads[shape.heads : shape.heads + shape.kv_heads], heads[shape.heads + shape.kv_heads :]
        if self.k_norm is not None:  # a normed head has at most this size, whatever its weights
            k = torch.full_like(k, float(self.k_norm.float().abs().max()) * shape.head_dim**0.5)
        return k, v


class Decoder:
    """Embedding, layers, final norm and output head."""

    def __init__(
        self,
        config: ModelConfig,
        load: Load,
        kernels: ModuleType,
        dtype: torch.dtype,
        device: torch.device,
        max_len: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        keep: Keep = "dense",
        adapters: Sequence[Adapter] = (),
    ) -> None:
        """`keep`: how weights stay where the kernels have a product for them; the head is never in int8.

        `adapters` stay beside the weights; a row names its own by its place among them (`StepInputs.adapters`).
        """
        self.config = config
        self.kernels = kernels
        ropes = {config.rope_of(i) for i in range(config.num_layers)}
        tables = {rope: rope_tables(rope, config.head_dim, max_len, device) for rope in ropes}
        # the largest tensors first, while nothing else is there: packing takes some bytes a weight for a moment
        table = load("embed")
        self.embedding = Embedding(table, config.embed_scale, kernels, dtype, device)
        # a dense table is the head too where they are tied; a packed one (on a CPU) is unpacked for it
        if not (config.tie_embeddings and keep == "packed" and isinstance(table, QuantTensor)):
            table = self.embedding.weight  # what was read may go
        head_keep: Keep = "packed" if keep == "packed" else "dense"
        head = table if config.tie_embeddings else load("lm_head")
        self.head = Linear([head], [], kernels, dtype, device, head_keep)
        del table, head
        self.final_norm = dense(load("final_norm"), dtype, device).contiguous()
        progress(1, config.num_layers + 1)
        self.adapters = tuple(adapters)
        self._slot_of_columns = torch.tensor(slot_of_columns(adapters), dtype=torch.int32, device=device)
        self.layers: list[Layer] = []
        for i in range(config.num_layers):
            self.layers.append(
                Layer(i, config, load, tables[config.rope_of(i)], kernels, dtype, device, keep, self.adapters)
            )
            progress(i + 2, config.num_layers + 1)

    def kept(self) -> list[Kept]:
        """The weights that were not unpacked."""
        products = [p for layer in self.layers for p in (layer.qkv, layer.o, layer.gated, layer.down)]
        return [product.kept for product in [*products, self.head] if product.kept is not None]

    def kv_ranges(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`Layer.kv_range` of every layer."""
        return [layer.kv_range() for layer in self.layers]

    def forward(
        self, ids: torch.Tensor, step: StepInputs, kv: KVCache, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ids [M] -> float32 logits [W, vocab] of the rows `step.wanted`, in `out` where that is given."""
        h = self.embedding(ids, step)
        own: torch.Tensor | None = None
        if step.adapters is not None:
            own = (step.adapters[:, None] == self._slot_of_columns).float()
        delta: torch.Tensor | None = None
        for layer, cache in zip(self.layers, kv.layers, strict=True):
            delta = layer(h, delta, step, cache, own)
        assert delta is not None
        if not len(step.wanted):  # a chunk in the middle of a prompt
            return torch.empty(0, self.config.vocab_size, dtype=torch.float32, device=h.device)
        last = self.kernels.last_norm(h, delta, self.final_norm, self.config.norm_eps, step)
        logits = self.head(last, step.wanted_rows, wide=True, out=out)
        cap = self.config.logit_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
