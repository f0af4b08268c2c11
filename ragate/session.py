"""Engines of this process, one per model file: the judge, the demo's writer and LangChain users share them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ragate_engine import EngineConfig

if TYPE_CHECKING:
    from ragate_engine import Engine

_lock = threading.Lock()
_engines: dict[Path, Engine] = {}
_config = EngineConfig()


def configure(config: EngineConfig) -> None:
    """How engines opened from now on run: the command line's device, batch and memory."""
    global _config
    _config = config


def open_engine(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Engine:
    """The engine that serves the model at `path`, loaded on first use. Raises the engine's own errors."""
    from ragate_engine import Engine

    path = path.resolve()
    with _lock:
        if path not in _engines:
            _engines[path] = Engine.load(path, _config, progress)
            # what is loaded by now stays: the collector need not walk it again for every few thousand tokens
            gc.freeze()
        return _engines[path]


def close_engines() -> None:
    """Close every engine of this process."""
    with _lock:
        while _engines:
            _engines.popitem()[1].close()
        gc.unfreeze()
