"""`ragate models advise`: in which formats a model fits this machine, how fast it can be there, and what each loses."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ragate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ragate_engine import Form, Kept, WeightBytes
    from ragate_engine.config import ModelConfig
    from ragate_engine.devices import Card
    from ragate_engine.roofline import Ceilings
    from ragate_engine.weights import Checkpoint

PLAIN, INT4 = "bf16", "int4 g128"
"""Floats of 16 bits, and what AWQ and GPTQ make; other formats go by the names of llama.cpp's mixes."""
CONTEXT = 4096
"""Tokens of a request, where nothing is said and the model reads as many."""
ENOUGH = 16
"""Requests at once that a format should leave room for."""


@dataclass(frozen=True)
class Quality:
    """What a format loses: the rise of perplexity over 16-bit floats, as published."""

    name: str
    loss: float
    """The rise as a share, by which formats are ordered."""
    text: str
    """The rise as it was published."""


QUALITIES = (
    Quality(PLAIN, 0.0, "0"),
    Quality("Q8_0", 0.003 / 6.2332, "+0.003"),
    Quality("Q6_K", 0.022 / 6.2332, "+0.022"),
    Quality("Q5_K_M", 0.057 / 6.2332, "+0.057"),
    Quality("Q4_K_M", 0.175 / 6.2332, "+0.175"),
    Quality(INT4, 0.22 / 5.47, "+0.13/0.22"),
    Quality("Q4_0", 0.469 / 6.2332, "+0.469"),
    Quality("Q2_K", 3.52 / 6.2332, "+3.520"),
)
"""Finest first. GGUF: Llama-3-8B, 6.2332 in F16, by llama.cpp (tools/perplexity/README.md). int4: Llama-2-7B, 5.47 in
FP16, AWQ 5.60 and GPTQ 5.69 (Lin et al. 2023, AWQ, table 4)."""
FP8 = 'kv_dtype = "fp8_e4m3"'
"""The setting that halves the KV of a request on a card."""
TOO_COARSE = 0.1
"""A format that loses more is advised only where no other fits."""

MEASURED = (
    (1, (0.065, 0.107), (3.591, 0.785)),
    (8, (0.073, 0.096), (3.633, 0.751)),
    (32, (0.098, 0.115), (3.778, 0.775)),
    (128, (0.200, 0.194), (4.356, 0.650)),
    (256, (0.335, 0.237), (5.283, 0.501)),
)
"""Decoding in bfloat16 on an H200: requests at once; then, for SmolLM2-135M and for Llama-3-8B, the least milliseconds
that a step takes and the share of that limit which the engine reached (bench/results/engine-h200-*.json)."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second of decoding: no more than the machine allows, and what to expect where that is known."""

    limit: float
    expected: float | None


@dataclass(frozen=True)
class Row:
    """A format on this machine."""

    name: str
    kept: Kept
    is_file: bool
    """Whether the model at hand has this format."""
    file_bytes: int
    weight_bytes: int
    """In memory."""
    kv_bytes: int
    """Of a request: in bfloat16 on a card, in float32 on a CPU."""
    kv_fp8_bytes: int | None
    """The same with the 8-bit cache that a card can have."""
    requests: int
    """That fit at once."""
    requests_fp8: int | None
    alone: Speed | None
    """With one request; `None` where none fits."""
    together: Speed | None
    """With all that fit."""
    loss: float | None
    """As in `Quality`; `None` where nothing is published."""
    perplexity: str
    refused: str | None
    """Why it does not fit."""

    @property
    def unpacked(self) -> bool:
        """Whether a card holds it in bfloat16 though its file is quantized."""
        return self.kept == "bf16" and self.name != PLAIN


@dataclass(frozen=True)
class Advice:
    """A model's formats on this machine, finest first, and which of them to take."""

    model: str
    quantization: str
    parameters: int
    context: int
    device: str
    free_bytes: int
    total_bytes: int
    rates: str
    """How the machine's rates are known."""
    kv_gib: int | None
    """What `kv_gib` is taken to be on a CPU."""
    rows: tuple[Row, ...]
    advised: str | None
    why: str
    how: str


@dataclass(frozen=True)
class Machine:
    """Where a model is to run: a card, or else the CPU; bytes of its memory, and its rates."""

    card: Card | None
    total: int
    free: int
    cores: int
    rates: Ceilings

    @property
    def name(self) -> str:
        """For people."""
        return self.card.name if self.card else f"the CPU, {self.cores} cores"


def advise(model: str, device: str = "auto", context: int | None = None) -> Advice:
    """Advice on `model`, a catalogue name or a path, for requests of `context` tokens [4,096]. Imports torch.

    Only headers are read. Raises CatalogError, ConfigError for a context that the model does not read, and the
    engine's errors.
    """
    from ragate import catalog
    from ragate_engine.weights import open_checkpoint

    checkpoint = open_checkpoint(catalog.resolve_judge(model, pull=False).path)
    longest = checkpoint.config.max_len
    if context is not None and not 1 <= context <= longest:
        raise ConfigError(f"{model} reads 1 to {longest:,} tokens and --context is {context:,}: ask for less")
    return advice_on(model, checkpoint, machine(device), context or min(CONTEXT, longest))


def machine(device: str) -> Machine:
    """This machine's card, or its CPU. Raises DeviceError where `device` is cuda and there is no card."""
    from ragate import rates
    from ragate_engine import devices

    cores = os.cpu_count() or 1
    picked = devices.pick_device(device)
    if picked.type == "cuda":
        card = devices.card()
        return Machine(card, card.total, card.free, cores, rates.of_card(card.name, picked))
    return Machine(None, *_memory(), cores, rates.of_cpu(cores))


def _memory() -> tuple[int, int]:
    """Bytes of this machine's memory, and those of them that can be had."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = re.search(r"MemAvailable: +(\d+) kB", _text("/proc/meminfo"))
    free = int(found[1]) << 10 if found else total
    limit = _text("/sys/fs/cgroup/memory.max").strip()  # of a container
    return (min(total, int(limit)), min(free, int(limit))) if limit.isdigit() else (total, free)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def advice_on(model: str, checkpoint: Checkpoint, here: Machine, context: int) -> Advice:
    """`advise` for a model that is open and a machine that is known."""
    from ragate_engine import forms_of

    own = format_of(checkpoint.quantization)
    qualities = {quality.name: quality for quality in QUALITIES}
    qualities.setdefault(own, Quality(own, math.inf, "not known"))
    rows: list[Row] = []
    for quality in qualities.values():
        is_file = quality.name == own
        forms = checkpoint.forms if is_file else {}
        forms = forms or forms_of(checkpoint.config, quality.name)
        ways: list[Kept] = ["float32"]
        if here.card:
            ways = ["bf16"] if quality.name == PLAIN else ["packed", "bf16"] if is_file else ["packed"]
        rows += [_row(checkpoint, here, context, quality, forms, kept, is_file) for kept in ways]
    advised, why = _choose(model, rows, here, context)
    return Advice(
        model=model,
        quantization=checkpoint.quantization,
        parameters=checkpoint.parameters,
        context=context,
        device=here.name,
        free_bytes=here.free,
        total_bytes=here.total,
        rates=here.rates.origin,
        kv_gib=None if here.card else _kv_gib(rows[0].kv_bytes),
        rows=tuple(rows),
        advised=advised.name if advised else None,
        why=why,
        how=_way(model, rows, advised),
    )


# --- what fits, and how fast it is ----------------------------------------------------------------------


def _row(
    checkpoint: Checkpoint,
    here: Machine,
    context: int,
    quality: Quality,
    forms: Mapping[str, Form],
    kept: Kept,
    is_file: bool,
) -> Row:
    from ragate_engine import OutOfMemoryError, file_bytes, weight_bytes

    config = checkpoint.config
    stored = checkpoint.file_bytes if is_file else 0
    weights = weight_bytes(config, forms, kept)
    kv = _kv_bytes(config, context, 2 if here.card else 4)
    requests, requests_fp8, refused = 0, 0 if here.card else None, None
    try:
        if here.card:
            requests, requests_fp8 = (
                _requests_on_card(here.card, checkpoint, context, weights, item) for item in (2, 1)
            )
        else:
            requests = _requests_on_cpu(here, weights, kv)
    except OutOfMemoryError as error:
        refused = str(error)
    speeds = [
        _speed(config, here, weights, kept, count, context) if count else None
        for count in (requests and 1, requests)
    ]
    return Row(
        name=quality.name,
        kept=kept,
        is_file=is_file,
        file_bytes=stored or file_bytes(config, forms),
        weight_bytes=weights.held,
        kv_bytes=kv,
        kv_fp8_bytes=kv // 2 if here.card else None,
        requests=requests,
        requests_fp8=requests_fp8,
        alone=speeds[0],
        together=speeds[1],
        loss=quality.loss if quality.loss < math.inf else None,
        perplexity=quality.text,
        refused=refused,
    )


def _kv_bytes(config: ModelConfig, tokens: int, item_bytes: int) -> int:
    """Of a request of `tokens` tokens, in whole blocks."""
    from ragate_engine.config import BLOCK_SIZE

    rounded = -(-tokens // BLOCK_SIZE) * BLOCK_SIZE
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * rounded * item_bytes


def _requests_on_card(
    card: Card, checkpoint: Checkpoint, context: int, weights: WeightBytes, kv_item: int
) -> int:
    """How many requests fit at once by the engine's own sums. Raises OutOfMemoryError."""
    from ragate_engine import EngineConfig, budget

    try:
        from ragate_engine.card import MAX_PARTS
    except ImportError as error:
        raise ConfigError(
            f"the kernels for {card.name} cannot be loaded ({error}): install triton, or take --device cpu"
        ) from None
    config = checkpoint.config
    block = _kv_bytes(config, 1, kv_item)
    need = budget.need_of(config, checkpoint.parameters, EngineConfig(), 2, block, MAX_PARTS, weights.held)
    blocks = budget.kv_blocks(card, need)
    return min(budget.CARD_BATCH, budget.requests_that_fit(blocks, context))


def _requests_on_cpu(here: Machine, weights: WeightBytes, kv: int) -> int:
    """How many requests of `kv` bytes fit beside the weights. Raises OutOfMemoryError."""
    from ragate_engine import OutOfMemoryError, budget
    from ragate_engine.runner import CPU_BATCH

    room = here.free - budget.margin(here.total) - weights.held
    if room < kv:
        raise OutOfMemoryError(
            f"the weights need {gib(weights.held)}, a request {gib(kv)}, and {gib(here.free)} of memory are free: "
            "take a smaller model, or a shorter --context"
        )
    return min(CPU_BATCH, min(room, _kv_gib(kv) << 30) // kv)


def _kv_gib(kv: int) -> int:
    """The engine's usual room for KV on a CPU, or what enough requests of `kv` bytes take."""
    from ragate_engine.runner import CPU_KV_BYTES

    return -(-max(CPU_KV_BYTES, ENOUGH * kv) // 2**30)


def _speed(
    config: ModelConfig, here: Machine, weights: WeightBytes, kept: Kept, batch: int, context: int
) -> Speed:
    """Decoding by `batch` requests that each have `context` tokens behind them."""
    from ragate_engine.roofline import Shape

    # a sliding layer looks no further back than its window
    reach = (
        sum(min(context, config.window_of(i) or context) for i in range(config.num_layers))
        / config.num_layers
    )
    plain = Shape(config)
    weight_size = weights.read / (plain.layer_weights + plain.head_weights)
    shape = Shape(config, weight_size, 2 if here.card else 4)
    seconds = here.rates.seconds(shape.step(batch, reach))
    limit = batch / seconds
    return Speed(limit, limit * share_reached(batch, seconds * 1e3) if kept == "bf16" else None)


def share_reached(batch: int, limit_ms: float) -> float:
    """Of the least time of a step of `batch` requests in bfloat16, the share that is reached on a card.

    Between and beyond what was measured: along the logarithms of requests and of time, never beyond either end.
    """
    points = []
    for model in (1, 2):
        times, shares = ([(row[0], row[model][i]) for row in MEASURED] for i in (0, 1))  # type: ignore[index]
        points.append((_between(batch, times), _between(batch, shares)))
    return _between(limit_ms, points)


def _between(x: float, points: Sequence[tuple[float, float]]) -> float:
    """y at `x` on the line through `points` (rising x) over the logarithm of x; flat beyond its ends."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)
    return points[-1][1]


# --- which to take --------------------------------------------------------------------------------------


def _choose(model: str, rows: Sequence[Row], here: Machine, context: int) -> tuple[Row | None, str]:
    """The row to take, and why; or `None` and what to do instead."""
    known = [row for row in rows if row.loss is not None and not row.unpacked]
    good = [row for row in known if row.loss is not None and row.loss < TOO_COARSE]
    wanted = f"{ENOUGH} requests of {context:,} tokens at once"
    fp8 = next((row for row in good if (row.requests_fp8 or 0) >= ENOUGH), None)
    for row in good:
        if row.requests >= ENOUGH:
            finer = f"; {fp8.name} would, given {FP8}" if fp8 and fp8 is not row else ""
            return row, f"the finest format that leaves room for {wanted} ({row.requests:,} fit){finer}"
    if fp8:
        return fp8, f"the finest format that leaves room for {wanted}, given {FP8}"
    most = max(row.requests for row in good)
    for row in good:
        if row.requests and 2 * row.requests >= most:
            holds = f"it holds {row.requests}, the smallest {most}"
            return row, f"no format leaves room for {wanted}; the finest of those that come near ({holds})"
    for row in known:
        if row.requests or row.requests_fp8:
            given = "" if row.requests else f" given {FP8}"
            coarse = "; a smaller model in a finer format will judge better" if row not in good else ""
            return row, f"the finest with room for a request of {context:,} tokens{given}{coarse}"
    least = min(rows, key=lambda row: row.weight_bytes)
    if least.refused is None:
        tokens = f"a request of {context:,} tokens"
        return None, f"beside {model} there is no room for {tokens} on {here.name}: lower --context"
    return None, f"{model} fits {here.name} in no format: as {least.name} {least.refused}"


def _way(model: str, rows: Sequence[Row], advised: Row | None) -> str:
    """What to do to have the advised format."""
    from ragate_engine.weights.gguf_write import MIXES

    if advised is None:
        return ""
    kept = ' Keep it packed: weights = "packed" in ragate.toml.' if advised.kept == "packed" else ""
    if advised.is_file:
        return f"{model} has this format.{kept}"
    own = next(row for row in rows if row.is_file)
    if own.loss is None or advised.loss is None or own.loss > advised.loss:
        return (
            f"{model} is {own.name}, from which nothing finer can be made: fetch it as {advised.name}.{kept}"
        )
    if advised.name in MIXES:
        return f"make it: ragate models quantize {model} {advised.name}.gguf --method gguf --type {advised.name}.{kept}"
    if advised.name == INT4:
        return f"make it: ragate models quantize {model} int4 --method awq.{kept}"
    return f"fetch {model} as {advised.name}.{kept}"


def format_of(quantization: str) -> str:
    """The row that a model of this `quantization` belongs to, or a name of its own."""
    if quantization.lower() in ("bfloat16", "float16", "float32", "bf16", "f16", "f32"):
        return PLAIN
    return INT4 if " int4 g128" in quantization else quantization


def gib(size: int, unit: str = " GiB") -> str:
    """`size` bytes for people."""
    return f"{size / 2**30:.{1 if size >= 10 << 30 else 2}f}{unit}"
