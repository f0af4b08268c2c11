"""`ragate doctor`: what device, compiler, versions and models there are, and what `ragate eval` would run."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ragate import catalog
from ragate.endpoint import is_url, shown
from ragate.errors import CatalogError, RagateError

if TYPE_CHECKING:
    from ragate.config import Settings

USUAL_TOKENS = 2000
"""Tokens of a usual call of the judge, prompt and answer."""


def findings(settings: Settings) -> Iterator[str]:
    """Lines of the report, most basic first."""
    yield f"python      {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    packages = ("ragate", "torch", "transformers", "ragas")
    yield "versions    " + ", ".join(f"{name} {_version(name)}" for name in packages)
    choice, problem = _judge(settings)
    yield f"card        {_card()}"
    yield f"kernels     {_kernels(settings, choice)}"
    here = [m.name for m in catalog.models() if catalog.is_cached(m.name)]
    yield f"models      {', '.join(here) or 'none yet'} in {catalog.cache_folder()}"
    if choice is None:
        yield f"judge       {problem}"
    else:
        yield f"judge       {choice.title}"
        if choice.note:
            yield f"            {choice.note}"
        if room := _room(settings, choice):
            yield f"            {room}"
    yield f"target      {shown(settings.target)}"
    try:
        from ragate.suite import baseline_of_suite, load_suite

        suite = load_suite(settings)
        yield f"test set    {settings.testset}: {len(suite.items)} items, {len(suite.reserve)} in reserve"
        path = baseline_of_suite(settings, suite.name)
        yield f"baseline    {path}{'' if path.exists() else ': none yet; make one with `ragate baseline set`'}"
    except RagateError as e:
        yield f"test set    {e}"
    yield "settings"
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name != "origins":
            if name in ("judge", "target"):
                value = shown(value)
            text = ",".join(value) if isinstance(value, tuple) else "not set" if value is None else value
            if name == "gate":
                text = {metric: rule.model_dump(exclude_none=True) for metric, rule in value.items()}
            yield f"  {name:16} {text!s:40} {settings.origins.get(name, 'default')}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _judge(settings: Settings) -> tuple[catalog.JudgeChoice | None, str]:
    """The judge that is a file here; else `None` and what to say of it."""
    if is_url(settings.judge):
        return None, shown(settings.judge)
    from ragate.suite import local_judge

    try:
        return local_judge(settings, pull=False), ""
    except CatalogError as e:
        return None, f"{settings.judge}: {e}"


def _card() -> str:
    from ragate_engine import EngineError, devices

    if reason := devices.why_no_card():
        return f"none: {reason}"
    try:
        card = devices.card()
    except EngineError as e:
        return str(e)
    capability = ".".join(map(str, card.capability))
    memory = f"{card.free / 2**30:.1f} of {card.total / 2**30:.1f} GiB free"
    return f"{card.name}, compute capability {capability}, {memory}, driver {_driver()}"


def _driver() -> str:
    """The version of the card's driver, which torch does not tell."""
    if tool := shutil.which("nvidia-smi"):
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            return said.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            pass
    return "unknown (no nvidia-smi)"


def _kernels(settings: Settings, choice: catalog.JudgeChoice | None) -> str:
    """Which kernels run; on a card each is tried, and those that do not compile are named."""
    from ragate_engine import EngineError
    from ragate_engine.devices import pick_device
    from ragate_engine.kernels import cpu

    try:
        if pick_device(settings.device).type == "cuda":
            return f"Triton {_version('triton')}: {_tried(choice, 'cuda', settings.weights)}"
    except EngineError as e:
        return str(e)
    except Exception as e:  # a compiler may fail with anything
        return " ".join(f"they do not run here: {type(e).__name__}: {e}".split())[:300]
    return "C" if cpu.available() else "plain torch (slower): no C compiler found; install gcc or clang"


def _tried(
    choice: catalog.JudgeChoice | None,
    device: Literal["cpu", "cuda"],
    weights: Literal["auto", "packed", "dense", "int8"] = "auto",
) -> str:
    """The backend that an engine ends up with for a model of the judge's shapes: one layer of it, made up, answers.

    Of `packed` weights the layer is the judge's own, since their kinds decide what is compiled.
    """
    import torch

    from ragate_engine import Engine, EngineConfig, ModelConfig, SamplingParams
    from ragate_engine.trial import ROWS, small_model
    from ragate_engine.weights import Checkpoint, names, open_checkpoint

    model = ModelConfig("llama", 1024, 512, 1024, 1, 8, 2, 64, 1024)
    own: Mapping[str, Callable[[], Any]] = {}
    if choice is not None:
        judge = open_checkpoint(choice.path)
        model = replace(small_model(judge.config), max_len=1024)
        if weights == "packed":
            own = {name: load for name, load in judge.tensors.items() if name.startswith("layers.")}
    tensors = {
        name: own.get(name) or partial(torch.full, shape, 1e-2, dtype=torch.bfloat16)
        for name, shape in names.expected(model).items()
    }
    config = EngineConfig(device=device, max_batch=1, max_len=2 * ROWS[0], kv_bytes=64 << 20, weights=weights)
    with Engine(Checkpoint(Path("made"), model, None, tensors, "bfloat16", files=()), config) as engine:
        engine.submit([1] * ROWS[0], SamplingParams(max_tokens=3)).result(timeout=300)
        backend = engine.describe()["backend"]
    return backend if "(" in backend else f"{backend}, all compiled"


def _room(settings: Settings, choice: catalog.JudgeChoice) -> str | None:
    """How much KV cache the judge gets on the card, or why it does not fit; `None` where it runs on the CPU."""
    import torch

    from ragate_engine import EngineConfig, EngineError, budget, devices, weight_bytes
    from ragate_engine.kv import block_bytes
    from ragate_engine.weights import open_checkpoint

    try:
        if devices.pick_device(settings.device).type == "cpu":
            return None
        from ragate_engine.card import MAX_PARTS

        checkpoint = open_checkpoint(choice.path)
        kv = None if settings.kv_gib is None else int(settings.kv_gib * 2**30)
        config = EngineConfig(max_batch=settings.max_batch, kv_bytes=kv)
        kept = torch.bfloat16 if settings.kv_dtype == "auto" else torch.float8_e4m3fn
        block = block_bytes(checkpoint.config, kept)
        model, forms, way = checkpoint.config, checkpoint.forms, settings.weights
        held = weight_bytes(model, forms, way).held if way in ("packed", "int8") else None
        packed = weight_bytes(model, forms, "packed").held if way != "int8" else None
        need = budget.need_of(model, checkpoint.parameters, config, 2, block, MAX_PARTS, held, packed)
        blocks = budget.kv_blocks(devices.card(), need)
    except EngineError as e:
        return f"it does not fit: {e} (`ragate models advise {choice.name or choice.path}` shows what would)"
    except ImportError as e:
        return f"its kernels cannot be loaded: {e}"
    at_once = budget.requests_that_fit(blocks, USUAL_TOKENS)
    return (
        f"{blocks:,} KV blocks of 16 tokens: room for {at_once:,} requests of {USUAL_TOKENS:,} tokens at once"
    )
