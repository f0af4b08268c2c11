"""Typed reads out of a model file's metadata, which nobody vouches for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ragate_engine.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

T = TypeVar("T")


@dataclass(frozen=True)
class Fields:
    """The metadata of one file; `prefix` stands before every key (`llama.` in GGUF)."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    def refuse(self, reason: str) -> NoReturn:
        """Raise ModelFileError: the file's name, then `reason`."""
        raise ModelFileError(f"{self.path}: {reason}")

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value of `key`; `None` where missing or null; ModelFileError for another type.

        An int passes for a float. A list of equal ints passes for an int: some state a number per layer.
        """
        value = self.values.get(self.prefix + key)
        if value is None:
            return None
        if kind is int and isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 1 << 1000 else math.inf
        if not isinstance(value, kind) or (type(value) is bool and kind is not bool):
            self.refuse(f"{self.prefix}{key} is {str(value)[:40]!r}, expected {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            self.refuse(f"{self.prefix}{key} is {value}, expected a finite number")
        return value

    def need(self, key: str, kind: type[T]) -> T:
        """The value of `key`. ModelFileError where it is missing."""
        value = self.get(key, kind)
        if value is None:
            self.refuse(f"{self.prefix}{key} is missing: fetch or convert the model again")
        return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelFileError."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{path} must hold a JSON object")
    return found
