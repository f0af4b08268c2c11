"""The driver: a decoder is quantized layer by layer, each for what the quantized layers before it give it.

In memory are one layer's weights and the hidden states of the calibration sequences. Every finished layer is a file
of its own, so that a run which was stopped goes on after the last whole layer; what it hands on to the next layer is
computed from the stored bytes in either case, so that the result is the same.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ragate_engine.devices import pick_device
from ragate_engine.errors import ConfigError, ModelFileError, OutOfMemoryError
from ragate_engine.files import write_whole
from ragate_engine.layers import dense, rope_tables
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.quantize.awq import FOLDED, Seen, awq
from ragate_engine.quantize.gptq import Hessian, gptq
from ragate_engine.quantize.layer import LINEARS, STAGES, run_layer
from ragate_engine.quantize.recipe import Recipe
from ragate_engine.quantize.rtn import rtn
from ragate_engine.quantize.write import (
    free_bytes,
    layer_tensors,
    read_layer,
    shard_path,
    write_end,
    write_shard,
    write_top,
)
from ragate_engine.weights import names
from ragate_engine.weights.fields import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from ragate_engine.quantize.rtn import Quantized
    from ragate_engine.weights import Checkpoint

STATE = "quantizing.json"
"""In the folder while it is not finished: what is being made, so that only the same is resumed."""

_DIGESTS = ("source", "calibration")
"""Settings in `STATE` that are no words for people."""

_VERSION = 3
"""Of the arithmetic: raised where the same settings give other bytes."""


def quantize(
    source: Checkpoint,
    folder: Path,
    method: str,
    bits: int,
    group: int,
    calibration: Sequence[Sequence[int]],
    device: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    symmetric: bool = False,
    desc_act: bool = False,
) -> None:
    """Quantize the linears of `source` into a Hugging Face `folder`, by `method` rtn, gptq or awq.

    `calibration`: token sequences (rtn looks at none). `device`: auto, cpu (float32) or cuda (bfloat16 activations).
    `progress` gets layers done and all layers. Called again with the same arguments it resumes, with the same result.
    The bits of gptq and awq depend on torch's number of threads, or on the card: a run goes on with the same only.

    Raises ConfigError (settings, a folder that holds something else, no room on the disk), ModelFileError (a damaged
    model), OutOfMemoryError.
    """
    recipe = Recipe(method, bits, group, symmetric, desc_act)
    recipe.check(source.config)
    place = pick_device(device)
    if recipe.calibrated:
        _check_calibration(source, calibration)
    with _explained(folder):
        _prepare(source, folder, recipe, calibration, place)
        with torch.inference_mode():
            shards = _Run(source, folder, recipe, calibration, place).layers(progress)
        write_end(source, folder, recipe, shards)
        (folder / STATE).unlink(missing_ok=True)


class _Run:
    """What the layers of one run share."""

    def __init__(
        self,
        source: Checkpoint,
        folder: Path,
        recipe: Recipe,
        calibration: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        self.source, self.config = source, source.config
        self.folder, self.recipe = folder, recipe
        self.calibration, self.device = calibration, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.tokens = sum(map(len, calibration))

    def layers(self, progress: Callable[[int, int], None]) -> dict[Path, list[str]]:
        """Quantize and write every layer that is not there yet; the tensors in each file."""
        count = self.config.num_layers
        hidden = self._embedded() if self.recipe.calibrated else []
        longest = max(map(len, self.calibration), default=1)
        ropes = {self.config.rope_of(i) for i in range(count)}
        tables = {rope: rope_tables(rope, self.config.head_dim, longest, self.device) for rope in ropes}
        shards: dict[Path, list[str]] = {}
        for i in range(count):
            path, turns = shard_path(self.folder, i, self.config), tables[self.config.rope_of(i)]
            last = not self.recipe.calibrated or i + 1 == count
            if not path.exists():
                stored = self._quantized(i, hidden, turns)
                write_shard(path, stored)
                shards[path] = sorted(stored)
            else:
                try:
                    shards[path] = _names_in(path)
                    stored = {} if last else load_file(path)
                except SafetensorError as error:
                    raise ModelFileError(f"{path} is damaged ({error}): delete it and run again") from None
            if not last:
                weights = read_layer(stored, self.config, i, self.recipe, self.device, self.dtype)
                hidden = [run_layer(weights, self.config, i, turns, h) for h in hidden]
            progress(i + 1, count)
        top = shard_path(self.folder, count, self.config)
        shards[top] = write_top(top, self.source)
        return shards

    def _embedded(self) -> list[torch.Tensor]:
        """The hidden states before the first layer, [n, hidden] for each sequence."""
        table = self.source.load("embed")
        hidden = []
        for tokens in self.calibration:
            ids = torch.tensor(tokens, dtype=torch.int64)
            rows = table.rows(ids).dequantize() if isinstance(table, QuantTensor) else table[ids].float()
            hidden.append((rows * self.config.embed_scale).to(self.device, self.dtype))
        return hidden

    def _quantized(
        self, index: int, hidden: Sequence[torch.Tensor], tables: tuple[torch.Tensor, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The tensors of layer `index` as they are stored."""
        weights, plain = self._weights(index)
        if self.recipe.method == "rtn":
            quantized = {leaf: self._rounded(weights[leaf]) for leaf in LINEARS}
        elif self.recipe.method == "gptq":
            quantized = self._by_gptq(index, weights, hidden, tables)
        else:
            seen = Seen(weights, self.config, index, tables, self.tokens)
            self._watch(index, weights, hidden, tables, seen.add)
            for stage, leaves in STAGES.items():
                self._require_finite(index, stage, seen.gram(leaves[0]).diagonal())
            folded, quantized = awq(weights, seen, self.recipe, self.config)
            plain = {leaf: folded[leaf] if leaf in FOLDED else tensor for leaf, tensor in plain.items()}
        return layer_tensors(self.config, index, self.recipe, plain, quantized)

    def _by_gptq(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: Sequence[torch.Tensor],
        tables: tuple[torch.Tensor, torch.Tensor],
    ) -> dict[str, Quantized]:
        recipe = self.recipe
        hessians = {
            stage: Hessian(weights[leaves[0]].shape[1], self.device) for stage, leaves in STAGES.items()
        }
        self._watch(index, weights, hidden, tables, lambda stage, x: hessians[stage].add(x))
        quantized: dict[str, Quantized] = {}
        for stage, leaves in STAGES.items():
            hessian = hessians.pop(stage).mean()
            self._require_finite(index, stage, hessian)
            # rows do not touch each other: those with the same inputs share the factorization
            stacked = torch.cat([weights[leaf] for leaf in leaves])
            group = recipe.group_of(stacked.shape[1])
            found = gptq(
                stacked, hessian, recipe.bits, group, recipe.symmetric, recipe.order, recipe.least_zero
            )
            start = 0
            for leaf in leaves:
                quantized[leaf] = found.rows(start, start + len(weights[leaf]))
                start += len(weights[leaf])
        return quantized

    def _weights(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """A layer by leaf: all of it in float32 on the device, and its norms and biases as they are stored."""
        weights, plain = {}, {}
        prefix = f"layers.{index}."
        for name in names.expected(self.config):
            if not name.startswith(prefix):
                continue
            stored, leaf = self.source.load(name), name.removeprefix(prefix)
            weights[leaf] = dense(stored, torch.float32, self.device)
            if not bool(weights[leaf].isfinite().all()):
                raise ModelFileError(
                    f"{self.source.path}: {name} has weights that are no finite numbers: fetch it again"
                )
            if isinstance(stored, torch.Tensor) and leaf not in LINEARS:
                plain[leaf] = stored
        return weights, plain

    def _rounded(self, weight: torch.Tensor) -> Quantized:
        recipe = self.recipe
        return rtn(weight, recipe.bits, recipe.group_of(weight.shape[1]), recipe.symmetric, recipe.least_zero)

    def _watch(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: Sequence[torch.Tensor],
        tables: tuple[torch.Tensor, torch.Tensor],
        watch: Callable[[str, torch.Tensor], None],
    ) -> None:
        """Show what goes into each stage."""
        cast = {leaf: weight.to(self.dtype) for leaf, weight in weights.items()}
        for h in hidden:
            run_layer(cast, self.config, index, tables, h, watch)

    def _require_finite(self, index: int, stage: str, seen: torch.Tensor) -> None:
        if not bool(seen.isfinite().all()):
            raise ModelFileError(
                f"{self.source.path}: what goes into {', '.join(STAGES[stage])} of layer {index} is not finite: "
                "the model is damaged, or its activations outgrow the device's dtype (try device cpu)"
            )


# --- what is checked first, and what went wrong -----------------------------------------------------------


def _check_calibration(source: Checkpoint, calibration: Sequence[Sequence[int]]) -> None:
    if not calibration or not all(calibration):
        raise ConfigError(
            "there is no calibration text, or some of it is empty: give sequences of tokens, or use rtn"
        )
    highest, lowest = max(map(max, calibration)), min(map(min, calibration))
    if lowest < 0 or highest >= source.config.vocab_size:
        raise ConfigError(
            f"the calibration has token {highest if lowest >= 0 else lowest}, which is none of the model's "
            f"{source.config.vocab_size}: make it with this model's tokenizer"
        )


def _prepare(
    source: Checkpoint,
    folder: Path,
    recipe: Recipe,
    calibration: Sequence[Sequence[int]],
    device: torch.device,
) -> None:
    """Make the folder ready for a new run, or for more of the same. Raises ConfigError where it holds another."""
    settings: dict[str, Any] = {
        "version": _VERSION,
        "source": source.identity,
        "method": recipe.method,
        "bits": recipe.bits,
        "group": recipe.group,
        "symmetric": recipe.symmetric,
        "desc_act": recipe.desc_act,
        "device": device.type,
        "calibration": "",
    }
    if recipe.calibrated:
        lines = json.dumps([list(tokens) for tokens in calibration])
        settings["calibration"] = hashlib.sha256(lines.encode()).hexdigest()
        # sums are split among threads, and by what the card is: that rounds them otherwise
        if device.type == "cpu":
            settings["threads"] = torch.get_num_threads()
        else:
            settings["card"] = torch.cuda.get_device_name(device)
    state = folder / STATE
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: give a folder, which need not be there yet")
    folder.mkdir(parents=True, exist_ok=True)
    if state.exists():
        before = read_json(state)
        if other := sorted(key for key in settings if before.get(key) != settings[key]):
            # its own value is the way to go on with it; a digest tells nobody anything
            said = [
                f"{key} ({before[key]})" if key in before and key not in _DIGESTS else key for key in other
            ]
            raise ConfigError(
                f"{folder} holds an unfinished run with another {', '.join(said)}: give another folder, or delete it"
            )
    elif _is_finished(folder, source):
        raise ConfigError(
            f"{folder} is finished, all its layers are there: give another folder, or delete it to make it again"
        )
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ConfigError(f"{folder} already holds files: give another folder, or delete it")
    missing = _bytes_to_write(source, folder, recipe) - free_bytes(folder)
    if missing > 0:
        raise ConfigError(
            f"{folder}: the disk lacks {missing / 1e9:.1f} GB for this model: free them, or take another"
        )
    write_whole(state, (json.dumps(settings, indent=1) + "\n").encode())


def _is_finished(folder: Path, source: Checkpoint) -> bool:
    """Is every file of a quantized `source` there, config.json, the last to be written, among them?"""
    shards = [shard_path(folder, i, source.config) for i in range(source.config.num_layers + 1)]
    return all(path.is_file() for path in (*shards, folder / "config.json"))


def _bytes_to_write(source: Checkpoint, folder: Path, recipe: Recipe) -> int:
    """Of the layers that are not there yet and the rest: plain tensors are taken for float32, the widest."""
    config = source.config
    shapes = names.expected(config)
    layer = 0
    for name, shape in shapes.items():
        if name.startswith("layers.0."):
            layer += recipe.nbytes(*shape) if name.removeprefix("layers.0.") in LINEARS else 4 * shape[0]
    left = sum(not shard_path(folder, i, config).exists() for i in range(config.num_layers))
    top = sum(
        2 * torch.Size(shape).numel() for name, shape in shapes.items() if not name.startswith("layers.")
    )
    return left * layer + top


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what the system says of memory and disk into a sentence."""
    again = "what is finished is kept, and the same command goes on from there"
    try:
        yield
    except OSError as error:
        raise ModelFileError(f"{folder} cannot be written: {error.strerror or error}; {again}") from None
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(_too_little(folder, error, again)) from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(_too_little(folder, error, again)) from None


def _too_little(folder: Path, error: BaseException, again: str) -> str:
    what = str(error).split(". ")[0] or type(error).__name__
    return f"{folder}: the memory did not suffice ({what}); {again} once some is free"


def _names_in(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return sorted(file.keys())
