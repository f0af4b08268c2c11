"""Engines of this process, one per model and adapter: the judge, the demo's writer and LangChain users share them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ragate_engine import EngineConfig

if TYPE_CHECKING:
    from ragate_engine import Engine

_lock = threading.Lock()
_engines: dict[tuple[Path, Path | None], Engine] = {}
_config = EngineConfig()


def configure(config: EngineConfig) -> None:
    """How engines opened from now on run: the command line's device, batch and memory."""
    global _config
    _config = config


def open_engine(
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    adapter: Path | None = None,
) -> Engine:
    """The engine that serves the model at `path` with `adapter`, loaded on first use.

    It is merged into the weights, or beside packed ones: requests name what `worn` says. Raises the engine's errors.
    """
    from ragate_engine import Engine

    key = path.resolve(), adapter.resolve() if adapter is not None else None
    with _lock:
        if key not in _engines:
            beside = adapter is not None and _config.weights == "packed"
            how = {"adapters": (adapter,)} if beside else {"merge_adapter": adapter}
            _engines[key] = Engine.load(path, replace(_config, **how), progress)
            # what is loaded by now stays: the collector need not walk it again for every few thousand tokens
            gc.freeze()
        return _engines[key]


def worn(engine: Engine) -> str | None:
    """The adapter that requests to a judge's engine name: the one beside its weights, if there is one."""
    return engine.adapters[0] if len(engine.adapters) == 1 else None


def close_engines() -> None:
    """Close every engine of this process."""
    with _lock:
        while _engines:
            _engines.popitem()[1].close()
        gc.unfreeze()
