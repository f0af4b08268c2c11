"""ragate_engine: a paged-KV inference engine whose output bits do not depend on who shares the batch.

The front door: `Engine`, `EngineConfig`, `SamplingParams`, `Completion` and the errors. Importing this package
does not import torch; the first touch of `Engine` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ragate_engine.config import EngineConfig, ModelConfig
from ragate_engine.errors import (
    ConfigError,
    DeviceError,
    EngineClosedError,
    EngineError,
    GrammarError,
    ModelFileError,
    OutOfMemoryError,
    PromptTooLongError,
)
from ragate_engine.request import Completion, SamplingParams, TokenInfo, Usage

if TYPE_CHECKING:
    from ragate_engine.engine import Engine

__all__ = [
    "Completion",
    "ConfigError",
    "DeviceError",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "GrammarError",
    "ModelConfig",
    "ModelFileError",
    "OutOfMemoryError",
    "PromptTooLongError",
    "SamplingParams",
    "TokenInfo",
    "Usage",
]


def __getattr__(name: str) -> Any:
    """Import the engine itself only when it is asked for: it brings torch."""
    if name == "Engine":
        from ragate_engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
