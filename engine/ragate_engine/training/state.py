"""What a run keeps in its folder: the state that it resumes from and the log of its steps, each written whole."""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ragate_engine.errors import ConfigError, ModelFileError
from ragate_engine.files import write_whole
from ragate_engine.lora import CONFIG
from ragate_engine.weights.fields import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ragate_engine.training.recipe import Example, TuneRecipe
    from ragate_engine.weights import Checkpoint

STATE = "tuning.safetensors"
"""While a run is not finished: the adapter's vector, the optimizer's moments, how many steps are in them."""
LOG = "tuning.json"
"""What is trained, and a row for each step up to the last save."""

_DIGESTS = ("source", "examples")
"""Settings that are no words for people."""
_FREE = ("save_seconds", "evaluate_every")
"""Of a recipe: what changes no bit, and so may differ when a run is resumed."""
_VERSION = 1
"""Of the arithmetic: raised where the same settings give other bytes."""


class State(NamedTuple):
    """Where a run stands between two steps."""

    step: int
    vector: torch.Tensor
    """float32 [weights of the adapter], as the two below."""
    mean: torch.Tensor
    """AdamW's moving average of the gradient."""
    square: torch.Tensor
    """And of its square."""


class Journal:
    """State and log in `folder`; made for a new run, or taken up where one was stopped."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Raises ConfigError where the folder holds something else, ModelFileError where a file is damaged."""
        self.folder = folder
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self.resumed: State | None = None
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file: give a folder, which need not be there yet")
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CONFIG).exists():
            raise ConfigError(
                f"{folder} holds a finished adapter: give another folder, or delete it to train it again"
            )
        if (folder / LOG).exists():
            self._take_up()
        elif any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ConfigError(f"{folder} already holds files: give another folder, or delete it")
        else:
            self.write_log()

    def _take_up(self) -> None:
        """Go on from the saved state, or from the start where none was saved yet."""
        found = read_json(self.folder / LOG)
        before, rows = found.get("settings"), found.get("steps")
        if not isinstance(before, dict) or not isinstance(rows, list):
            raise ModelFileError(f"{self.folder / LOG} is damaged: delete the folder and train again")
        if other := sorted(key for key, value in self.settings.items() if before.get(key) != value):
            said = [
                f"{key} ({before[key]})" if key in before and key not in _DIGESTS else key for key in other
            ]
            raise ConfigError(
                f"{self.folder} holds an unfinished run with another {', '.join(said)}: "
                "give another folder, or delete it"
            )
        path = self.folder / STATE
        if not path.exists():
            return
        try:
            tensors = load_file(path)
            step = int(tensors.pop("step"))
            self.resumed = State(step, **tensors)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ModelFileError(f"{path} is damaged ({error}): delete the folder and train again") from None
        self.rows = rows[:step]  # the log is written before the state, so it may be ahead

    def save(self, state: State) -> None:
        """Keep `state`, and the rows so far. Raises OSError."""
        self.write_log()
        tensors = {"step": torch.tensor(state.step), "vector": state.vector.detach()}
        tensors |= {"mean": state.mean, "square": state.square}
        write_whole(
            self.folder / STATE, save({name: part.cpu().contiguous() for name, part in tensors.items()})
        )

    def write_log(self) -> None:
        """Write the log. Raises OSError."""
        text = json.dumps({"settings": self.settings, "steps": self.rows}, indent=1)
        write_whole(self.folder / LOG, (text + "\n").encode())

    def drop_state(self) -> None:
        """The run is finished: its state is needed no more. Raises OSError."""
        (self.folder / STATE).unlink(missing_ok=True)


def settings_of(
    source: Checkpoint, examples: Sequence[Example], recipe: TuneRecipe, device: torch.device
) -> dict[str, Any]:
    """Everything that decides the adapter's bytes, and torch, the number of threads or the card that round them."""
    listed = hashlib.sha256()
    for example in examples:
        listed.update(struct.pack("<2q", len(example.prompt), len(example.answer)))
        listed.update(array("q", example.prompt + example.answer))
        listed.update(array("d", example.weights))
    settings: dict[str, Any] = {
        "version": _VERSION,
        "source": source.identity,
        "examples": listed.hexdigest(),
        "count": len(examples),
        "torch": str(torch.__version__),
        "device": device.type,
    }
    if device.type == "cpu":
        settings["threads"] = torch.get_num_threads()
    else:
        settings["card"] = torch.cuda.get_device_name(device)
    decides = {name: value for name, value in asdict(recipe).items() if name not in _FREE}
    return settings | decides | {"targets": list(recipe.targets)}
