"""ragate_engine: a paged-KV inference engine whose output bits do not depend on who shares the batch.

The front door: `Engine`, `EngineConfig`, `SamplingParams`, `Completion` and the errors; `open_checkpoint`,
`quantize_model` and `write_gguf` for models as files; `forms_of`, `file_bytes` and `weight_bytes` for what they take;
`read_adapter`, `write_adapter` and `merge_adapter` for LoRA adapters, `tune_adapter` with `Example` and `TuneRecipe` to
train one.
Importing this package does not import torch; the first touch of those does.
"""

from __future__ import annotations

from importlib import import_module
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
    TrainingError,
)
from ragate_engine.request import Completion, SamplingParams, TokenInfo, Usage

if TYPE_CHECKING:
    from ragate_engine.engine import Engine
    from ragate_engine.footprint import Kept, WeightBytes, file_bytes, forms_of, weight_bytes
    from ragate_engine.lora import Adapter, merge_adapter, read_adapter, write_adapter
    from ragate_engine.quant.tensor import Form
    from ragate_engine.quantize import quantize as quantize_model
    from ragate_engine.training.recipe import Example, TuneRecipe, TuneReport, TuneStep
    from ragate_engine.training.tune import tune_adapter
    from ragate_engine.weights import Checkpoint, open_checkpoint
    from ragate_engine.weights.gguf_write import write_gguf
    from ragate_engine.weights.tokenizer import Tokenizer

__all__ = [
    "Adapter",
    "Checkpoint",
    "Completion",
    "ConfigError",
    "DeviceError",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "Example",
    "Form",
    "GrammarError",
    "Kept",
    "ModelConfig",
    "ModelFileError",
    "OutOfMemoryError",
    "PromptTooLongError",
    "SamplingParams",
    "TokenInfo",
    "Tokenizer",
    "TrainingError",
    "TuneRecipe",
    "TuneReport",
    "TuneStep",
    "Usage",
    "WeightBytes",
    "file_bytes",
    "forms_of",
    "merge_adapter",
    "open_checkpoint",
    "quantize_model",
    "read_adapter",
    "tune_adapter",
    "weight_bytes",
    "write_adapter",
    "write_gguf",
]


_LATER = {
    "Adapter": ("lora", "Adapter"),
    "Checkpoint": ("weights", "Checkpoint"),
    "Engine": ("engine", "Engine"),
    "Example": ("training.recipe", "Example"),
    "Form": ("quant.tensor", "Form"),
    "Kept": ("footprint", "Kept"),
    "Tokenizer": ("weights.tokenizer", "Tokenizer"),
    "TuneRecipe": ("training.recipe", "TuneRecipe"),
    "TuneReport": ("training.recipe", "TuneReport"),
    "TuneStep": ("training.recipe", "TuneStep"),
    "WeightBytes": ("footprint", "WeightBytes"),
    "file_bytes": ("footprint", "file_bytes"),
    "forms_of": ("footprint", "forms_of"),
    "merge_adapter": ("lora", "merge_adapter"),
    "open_checkpoint": ("weights", "open_checkpoint"),
    "quantize_model": ("quantize", "quantize"),
    "read_adapter": ("lora", "read_adapter"),
    "tune_adapter": ("training.tune", "tune_adapter"),
    "weight_bytes": ("footprint", "weight_bytes"),
    "write_adapter": ("lora", "write_adapter"),
    "write_gguf": ("weights.gguf_write", "write_gguf"),
}
"""Where names are that bring torch."""


def __getattr__(name: str) -> Any:
    """Import what brings torch only when it is asked for."""
    if name in _LATER:
        module, own = _LATER[name]
        return getattr(import_module(f"ragate_engine.{module}"), own)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
