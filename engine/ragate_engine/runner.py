"""`Runner`: owns the device: weights, KV cache, kernels, and how steps run on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ragate_engine import budget
from ragate_engine.config import BLOCK_SIZE, MAX_LEN, EngineConfig, ModelConfig
from ragate_engine.devices import ALONE, card, pick_device
from ragate_engine.errors import ConfigError, OutOfMemoryError, PromptTooLongError
from ragate_engine.footprint import weight_bytes
from ragate_engine.kernels import choose, reference
from ragate_engine.kernels.fallback import checked
from ragate_engine.kv import KVCache, block_bytes
from ragate_engine.layers import Keep, Weight
from ragate_engine.lora import Adapter, held_values, merging, product_shapes, read_adapter, read_adapters
from ragate_engine.model import Decoder
from ragate_engine.steps import HostSteps, Steps
from ragate_engine.trial import run_steps, try_kept
from ragate_engine.weights import Checkpoint

if TYPE_CHECKING:
    from ragate_engine.kernels.triton.ahead import AheadCompiler

CPU_KV_BYTES = 2 << 30
CPU_BATCH = 64
CPU_STEP_TOKENS = 512
KV_DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class Runner:
    """Owns the device: weights, KV cache, kernels."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        progress: Callable[[int, int], None] = lambda d, t: None,
    ) -> None:
        self.config = config
        self.device = pick_device(config.device)
        on_card = self.device.type == "cuda"
        self.dtype = {
            "auto": torch.bfloat16 if on_card else torch.float32,
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[config.dtype]
        if config.kv_dtype != "auto" and checkpoint.config.qkv_bias:
            # measured on Qwen2.5-1.5B: perplexity 44.9 instead of 19.4
            raise ConfigError(
                f"kv_dtype {config.kv_dtype} is not for {checkpoint.path.name}: keys of a model whose k has a bias are "
                "mostly that bias, and 8 bits lose what is beside it; leave kv_dtype out"
            )
        if config.kv_dtype != "auto" and not on_card:
            raise ConfigError(f"kv_dtype {config.kv_dtype} needs an NVIDIA card: leave it out on a CPU")
        if config.weights in ("packed", "int8") and not (on_card and self.dtype == torch.bfloat16):
            raise ConfigError(f"weights {config.weights} needs an NVIDIA card and bfloat16: leave it out")
        kv_dtype = KV_DTYPES.get(config.kv_dtype, self.dtype)
        self.max_batch = config.max_batch or (budget.CARD_BATCH if on_card else CPU_BATCH)
        self.max_step_tokens = config.max_step_tokens or (
            budget.CARD_STEP_TOKENS if on_card else CPU_STEP_TOKENS
        )
        self.overlap = on_card if config.overlap is None else config.overlap
        """Whether a step is launched before the last one is read."""
        self.device_name = "the CPU"
        self.keep: Keep = "dense"
        self._compiler: AheadCompiler | None = None
        model = checkpoint.config
        self.adapters = read_adapters(config.adapters, model)
        """Beside the weights, in the order of their slots."""
        self.merged: Adapter | None = None
        if config.merge_adapter is not None:
            self.merged = read_adapter(config.merge_adapter, model)
        self.vocab_size = model.vocab_size
        self.window = model.max_len
        if on_card:
            self._load_on_card(checkpoint, kv_dtype, progress)
        else:
            self._load_on_cpu(checkpoint, progress)

    def _load_on_cpu(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> None:
        model, config = checkpoint.config, self.config
        memory = CPU_KV_BYTES if config.kv_bytes is None else config.kv_bytes
        per_block = block_bytes(model, self.dtype)
        # the window is at most what the pool could hold: a file may claim any length, and rope tables are sized by it
        self.max_len = min(config.max_len or MAX_LEN, model.max_len, memory // per_block * BLOCK_SIZE)
        if self.max_len < 2 * BLOCK_SIZE:
            raise OutOfMemoryError(
                f"the KV cache has room for {self.max_len} tokens of {per_block // BLOCK_SIZE} bytes each: "
                "give it more with kv_gib"
            )
        # the C kernels hold float32 and walk a head sixteen floats at a time
        plain = self.dtype != torch.float32 or model.head_dim % BLOCK_SIZE != 0
        self.kernels, self.backend = choose(self.device, "reference" if plain else config.kernels)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if hasattr(self.kernels, "set_threads"):
            self.kernels.set_threads(config.threads or os.cpu_count() or 1)
        self.decoder = Decoder(
            model,
            self._merging(checkpoint.load),
            self.kernels,
            self.dtype,
            self.device,
            self.max_len,
            progress,
            adapters=self.adapters,
        )
        # never more than max_batch sequences of the longest kind could use
        most = self.max_batch * -(-self.max_len // BLOCK_SIZE)
        self.kv = KVCache(model, min(memory // per_block, most), self.kernels, self.dtype, self.device)
        self.steps: Steps = HostSteps(self.decoder, self.kv, self.kernels, self.max_batch, self.device)

    def _merging(self, load: Callable[[str], Weight]) -> Callable[[str], Weight]:
        """`load`, with the adapter added that is to be merged."""
        if self.merged is None:
            return load
        kernels = self.kernels

        def multiply(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            if b.device.type == "cuda":
                return b @ a
            # the backend's own product: its bits are the same on every CPU, those of a library's are not
            product: torch.Tensor = kernels.linear(b, kernels.pack_linear(a.T.contiguous()), None)
            return product

        return merging(load, self.merged, multiply)

    def _load_on_card(
        self, checkpoint: Checkpoint, kv_dtype: torch.dtype, progress: Callable[[int, int], None]
    ) -> None:
        model, config = checkpoint.config, self.config
        self.kernels, self.backend = choose(self.device, config.kernels)
        own = self.backend.startswith("triton")
        parts = 0
        if own:
            from ragate_engine.card import MAX_PARTS, buckets_of, most_wanted_of

            parts = MAX_PARTS
        here = card()
        self.device_name = here.name
        if own and config.weights in ("packed", "int8"):
            self.keep = config.weights
        need = self._need(checkpoint, kv_dtype, parts)
        # refused before a byte is read; a window longer than the pool is cut to it
        self.max_len = min(need.window, budget.kv_blocks(here, need) * BLOCK_SIZE)
        if own:
            from ragate_engine.kernels.triton.ahead import AheadCompiler

            self._compiler = AheadCompiler(
                model,
                self.dtype,
                kv_dtype,
                buckets_of(self.max_step_tokens),
                most_wanted_of(self.max_batch),
                checkpoint.forms if self.keep == "packed" else None,
                frozenset(product_shapes(self.adapters, model)),
            )
        self.decoder = self._decoder_on_card(checkpoint, progress)
        fell: Mapping[str, str] = {}
        if self._compiler is not None:
            self._compiler.wait_for_first()
            found = checked(
                self.kernels, reference, self._trial(model), together=frozenset({"attention", "pick"})
            )
            fell = found.fell
            if fell:
                self.kernels, self.backend = found.ops, found.name
                del self.decoder  # the layout of packed weights may be another: load them again
                with ALONE:
                    torch.cuda.empty_cache()
                need = self._need_without(fell, checkpoint, kv_dtype, parts)
                self.max_len = min(need.window, budget.kv_blocks(card(), need) * BLOCK_SIZE)
                self.decoder = self._decoder_on_card(checkpoint, progress)
        with ALONE:
            torch.cuda.empty_cache()  # what was read ahead goes back before free memory is measured
        blocks = budget.kv_blocks(card(), need.loaded())
        self.kv = KVCache(model, blocks, self.kernels, kv_dtype, self.device)
        if kv_dtype != self.dtype:
            self.kv.scale(self.decoder.kv_ranges())
        self.steps = self._steps(
            self.decoder,
            self.kv,
            self.max_batch,
            self.max_step_tokens,
            self.max_len,
            self.kernels,
            own and not fell,
        )
        with ALONE:
            torch.cuda.synchronize()  # steps run on a stream of their own

    def _need(self, checkpoint: Checkpoint, kv_dtype: torch.dtype, parts: int) -> budget.Need:
        """What the card must hold, with the weights as `self.keep` has them."""
        model, forms = checkpoint.config, checkpoint.forms
        can_pack = (
            self.keep != "int8" and self.dtype == torch.bfloat16 and hasattr(self.kernels, "pack_quantized")
        )
        return budget.need_of(
            model,
            checkpoint.parameters,
            self.config,
            self.dtype.itemsize,
            block_bytes(model, kv_dtype),
            parts,
            None if self.keep == "dense" else weight_bytes(model, forms, self.keep).held,
            weight_bytes(model, forms, "packed").held if can_pack and self.merged is None else None,
            held_values(self.adapters, model),
        )

    def _need_without(
        self, fell: Mapping[str, str], checkpoint: Checkpoint, kv_dtype: torch.dtype, parts: int
    ) -> budget.Need:
        """What the card must hold when the kernels that `fell` are exchanged: weights that they packed become dense.

        Raises OutOfMemoryError where there is no room for that.
        """
        wanted = self.keep
        reason = fell.get("quantized" if wanted == "packed" else wanted)
        if reason is None:
            return self._need(checkpoint, kv_dtype, parts)
        self.keep = "dense"
        need = self._need(checkpoint, kv_dtype, parts)
        try:
            budget.kv_blocks(card(), need)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"the kernel for weights = {wanted} does not run on {self.device_name} ({reason}), and unpacked {error}"
            ) from None
        return need

    def _decoder_on_card(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> Decoder:
        try:
            with checkpoint.stream(self.device) as load:
                return Decoder(
                    checkpoint.config,
                    self._merging(load),
                    self.kernels,
                    self.dtype,
                    self.device,
                    self.max_len,
                    progress,
                    self.keep,
                    self.adapters,
                )
        except torch.OutOfMemoryError as e:
            raise OutOfMemoryError(
                f"{self.device_name} ran out of memory while the weights were loaded: end what else uses it, or use "
                "device cpu"
            ) from e

    def _steps(
        self,
        decoder: Decoder,
        kv: KVCache,
        max_batch: int,
        max_step_tokens: int,
        max_len: int,
        kernels: ModuleType,
        own: bool,
    ) -> Steps:
        """Steps in graphs where all kernels are the card's own, else plain ones."""
        if not own:
            return HostSteps(decoder, kv, kernels, max_batch, self.device)
        from ragate_engine.card import CardSteps

        return CardSteps(decoder, kv, max_batch, max_step_tokens, max_len, self.config)

    def _trial(self, model: ModelConfig) -> Callable[[ModuleType, Mapping[str, str]], None]:
        kept = self.decoder.kept()

        def trial(ops: ModuleType, fell: Mapping[str, str]) -> None:
            try_kept(ops, kept, self.device)
            run_steps(
                model,
                ops,
                self.dtype,
                self.device,
                lambda decoder, kv, batch, rows, length: self._steps(
                    decoder, kv, batch, rows, length, ops, not fell
                ),
                adapters=self.adapters,
            )

        return trial

    def close(self) -> None:
        """Wait for what still runs beside the engine."""
        if self._compiler is not None:
            self._compiler.stop()

    def check_length(self, prompt_tokens: int) -> None:
        """Raise PromptTooLongError where a prompt leaves no room for an answer in window or pool."""
        room = min(self.max_len, self.kv.num_blocks * BLOCK_SIZE)
        if prompt_tokens >= room:
            which = "the model's window" if room == self.window else "the KV cache or the max_len setting"
            raise PromptTooLongError(
                f"the prompt has {prompt_tokens} tokens and {which} holds {room}: shorten the contexts or use a model "
                "with a longer window"
            )
