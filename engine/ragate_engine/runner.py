"""`Runner`: a step plan -> index tensors on the device -> forward -> logits of the rows that want them."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from ragate_engine.config import BLOCK_SIZE, MAX_LEN, EngineConfig
from ragate_engine.errors import DeviceError, OutOfMemoryError, PromptTooLongError
from ragate_engine.kernels import StepInputs, choose
from ragate_engine.kv import KVCache, block_bytes
from ragate_engine.model import Decoder
from ragate_engine.request import Row, StepPlan
from ragate_engine.weights import Checkpoint

CPU_KV_BYTES = 2 << 30
GROUP_ROWS = 16
"""Rows that attention reads KV for together."""
WORTH_SHARING = 8
"""Leading blocks that decode rows must have in common to be read together."""


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
        most = config.max_batch * -(-self.max_len // BLOCK_SIZE)
        blocks = min(self._kv_budget(config) // per_block, most)
        self.kv = KVCache(model, blocks, self.kernels, self.dtype, self.device)
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

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> tuple[list[Row], torch.Tensor]:
        """Run a step. Returns the rows that reach the end of their sequence, and float32 logits [rows, vocab]."""
        rows = sorted(plan.rows, key=lambda row: (row.count > 1, row.request.blocks))
        tables = np.zeros((len(rows), max(len(row.request.blocks) for row in rows)), np.int32)
        ids, positions, row_table, wanted, at = [], [], [], [], 0
        for i, row in enumerate(rows):
            tables[i, : len(row.request.blocks)] = row.request.blocks
            ids.extend(row.request.tokens[row.start : row.start + row.count])
            positions.append(np.arange(row.start, row.start + row.count, dtype=np.int32))
            row_table.append(np.full(row.count, i, np.int32))
            at += row.count
            if row.wants_logits:
                wanted.append(at - 1)
        position = np.concatenate(positions)
        table_of = np.concatenate(row_table)
        slots = tables[table_of, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        groups = attention_groups(rows, tables)
        singles = sum(row.count == 1 for row in rows)
        step = StepInputs(
            positions=self._put(position),
            slots=self._put(slots.astype(np.int32)),
            row_table=self._put(table_of),
            tables=self._put(tables),
            groups=self._put(groups),
            singles=singles,
            single_groups=int((groups[:, 0] < singles).sum()),
        )
        logits = self.decoder.forward(
            self._put(np.array(ids)), step, self.kv, self._put(np.array(wanted, np.int64))
        )
        return [row for row in rows if row.wants_logits], logits

    def _put(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def attention_groups(rows: list[Row], tables: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Rows to read KV for together: int32 [n, 3] of (first row, rows, leading blocks shared and full for all).

    `rows` come sorted: single tokens first, those with equal tables side by side; then chunks, cut into pieces of 16
    tokens. Grouping changes what is read how often, never a row's result.
    """
    groups: list[list[int]] = []
    at = 0
    lead = -1  # the table that the open group of single tokens is compared with; -1 where none is open
    for i, row in enumerate(rows):
        if row.count == 1:
            full = (row.start + 1) // BLOCK_SIZE
            if lead >= 0 and groups[-1][1] < GROUP_ROWS:
                known = groups[-1][2]
                equal = tables[lead, : min(known, full)] == tables[i, : min(known, full)]
                shared = len(equal) if equal.all() else int(equal.argmin())
                if shared >= WORTH_SHARING and 2 * shared >= known:
                    groups[-1][1] += 1
                    groups[-1][2] = shared
                    at += 1
                    continue
            lead = i
            groups.append([at, 1, full])
        else:
            lead = -1
            first = row.start
            while first < row.start + row.count:
                # pieces end at multiples of 16 positions, so all but a piece's last block is full for all its rows
                count = min(row.start + row.count, (first // GROUP_ROWS + 1) * GROUP_ROWS) - first
                groups.append([at + first - row.start, count, (first + 1) // BLOCK_SIZE])
                first += count
        at += row.count if row.count > 1 else 1
    return np.array(groups, np.int32)
