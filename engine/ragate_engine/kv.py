"""The KV cache of every layer, and how many blocks fit a number of bytes."""

from __future__ import annotations

from types import ModuleType

import torch

from ragate_engine.config import BLOCK_SIZE, ModelConfig
from ragate_engine.errors import OutOfMemoryError
from ragate_engine.kernels import LayerKV


def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers: 2 (K, V) x layers x KV heads x head size x 16 tokens x item size."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * BLOCK_SIZE * dtype.itemsize


class KVCache:
    """K and V tensors per layer, in the layout of the kernels that read them."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        kernels: ModuleType,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        try:
            self.layers: list[LayerKV] = [
                kernels.make_kv(num_blocks, config.num_kv_heads, config.head_dim, dtype, device)
                for _ in range(config.num_layers)
            ]
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
            need = num_blocks * block_bytes(config, dtype)
            raise OutOfMemoryError(
                f"no memory for {need / 2**30:.1f} GiB of KV cache on {device}: ask for less with kv_gib"
            ) from e

    def scale(self, ranges: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Set what 8-bit values are multiplied by: `ranges` are, per layer, the sizes [kv_heads] of K and V."""
        for i, (k, v) in enumerate(ranges):
            layer = self.layers[i]
            limit = torch.finfo(layer.k.dtype).max
            self.layers[i] = layer._replace(k_scale=(k / limit).float(), v_scale=(v / limit).float())
