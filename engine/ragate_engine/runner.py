"""`Runner`: owns the device: weights, KV cache, kernels, and how steps run on it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ragate_engine.config import BLOCK_SIZE, MAX_LEN, EngineConfig
from ragate_engine.errors import DeviceError, OutOfMemoryError, PromptTooLongError
from ragate_engine.kernels import choose
from ragate_engine.kv import KVCache, block_bytes
from ragate_engine.model import Decoder
from ragate_engine.steps import HostSteps, Steps
from ragate_engine.weights import Checkpoint

CPU_KV_BYTES = 2 << 30


def pick_device(wanted: str) -> torch.device:
    """`auto` is the card where there is one. Raises DeviceError where `cuda` is asked for and missing."""
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if wanted == "cuda":
        raise DeviceError(
            "no NVIDIA card is usable here (torch.cuda.is_available() is false): use device cpu or auto"
        )
    return torch.device("cpu")


class Runner:
    """Owns the device: weights, KV cache, kernels."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        progress: Callable[[int, int], None] = lambda d, t: None,
    ) -> None:
        self.device = pick_device(config.device)
        self.dtype = {
            "auto": torch.float32 if self.device.type == "cpu" else torch.bfloat16,
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[config.dtype]
        model = checkpoint.config
        per_block = block_bytes(model, self.dtype)
        # the window is at most what the pool could hold: a file may claim any length, and rope tables are sized by it
        self.max_len = min(
            config.max_len or MAX_LEN, model.max_len, self._memory(config) // per_block * BLOCK_SIZE
        )
        if self.max_len < 2 * BLOCK_SIZE:
            raise OutOfMemoryError(
                f"the KV cache has room for {self.max_len} tokens of {per_block // BLOCK_SIZE} bytes each: "
                "give it more with kv_gib"
            )
        # the C kernels hold float32 and walk a head sixteen floats at a time
        plain = self.device.type == "cpu" and (
            self.dtype != torch.float32 or model.head_dim % BLOCK_SIZE != 0
        )
        self.kernels, self.backend = choose(self.device, "reference" if plain else config.kernels)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.own_threads = hasattr(self.kernels, "set_threads")
        """Whether the kernels bring their own threads."""
        if self.own_threads:
            self.kernels.set_threads(config.threads or os.cpu_count() or 1)
        try:
            self.decoder = Decoder(
                model, checkpoint.load, self.kernels, self.dtype, self.device, self.max_len, progress
            )
        except torch.OutOfMemoryError as e:
            free = torch.cuda.mem_get_info()[0] / 2**30
            raise OutOfMemoryError(
                f"the weights of this model do not fit {self.device} ({free:.1f} GiB left): "
                "use a smaller model or device cpu"
            ) from e
        # never more than max_batch sequences of the longest kind could use
        on_card = self.device.type == "cuda"
        self.max_batch = config.max_batch or (1024 if on_card else 64)
        self.max_step_tokens = config.max_step_tokens or (8192 if on_card else 512)
        most = self.max_batch * -(-self.max_len // BLOCK_SIZE)
        blocks = min(self._kv_budget(config) // per_block, most)
        self.kv = KVCache(model, blocks, self.kernels, self.dtype, self.device)
        self.steps: Steps
        if self.backend.startswith("triton"):
            from ragate_engine.card import CardSteps

            self.steps = CardSteps(
                self.decoder, self.kv, self.max_batch, self.max_step_tokens, self.max_len, config
            )
        else:
            self.steps = HostSteps(self.decoder, self.kv, self.kernels, self.max_batch, self.device)
        self.overlap = on_card if config.overlap is None else config.overlap
        """Whether a step is launched before the last one is read."""
        self.vocab_size = model.vocab_size
        self.window = model.max_len

    def _memory(self, config: EngineConfig) -> int:
        """Bytes that KV blocks could have at most."""
        if config.kv_bytes is not None:
            return config.kv_bytes
        if self.device.type == "cpu":
            return CPU_KV_BYTES
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def _kv_budget(self, config: EngineConfig) -> int:
        if config.kv_bytes is not None:
            return config.kv_bytes
        if self.device.type == "cpu":
            return CPU_KV_BYTES
        return int(torch.cuda.mem_get_info()[0] * 0.8)

    def check_length(self, prompt_tokens: int) -> None:
        """Raise PromptTooLongError where a prompt leaves no room for an answer in window or pool."""
        room = min(self.max_len, self.kv.num_blocks * BLOCK_SIZE)
        if prompt_tokens >= room:
            which = "the model's window" if room == self.window else "the KV cache or the max_len setting"
            raise PromptTooLongError(
                f"the prompt has {prompt_tokens} tokens and {which} holds {room}: shorten the contexts or use a model "
                "with a longer window"
            )
