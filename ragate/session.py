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
    """The engine that serves the model at `path` with `adapter`, loaded on first use; its requests name `beside`.

    Raises the engine's own errors.
    """
    from ragate_engine import Engine

    key = path.resolve(), adapter.resolve() if adapter is not None else None
    with _lock:
        if key not in _engines:
            worn = replace(_config, adapters=(adapter,)) if adapter and beside(adapter) else None
            _engines[key] = Engine.load(path, worn or replace(_config, merge_adapter=adapter), progress)
            # what is loaded by now stays: the collector need not walk it again for every few thousand tokens
            gc.freeze()
        return _engines[key]


def beside(adapter: Path | None) -> str | None:
    """What requests call an adapter that stays beside packed weights; `None` where it is merged into the weights."""
    return adapter.resolve().name if adapter is not None and _config.weights == "packed" else None


def close_engines() -> None:
    """Close every engine of this process."""
    with _lock:
        while _engines:
            _engines.popitem()[1].close()
        gc.unfreeze()
