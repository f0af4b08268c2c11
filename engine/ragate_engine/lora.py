"""LoRA adapters: PEFT's folder read, checked and written; added to a model's weights; stacked to be served beside.

An adapter gives a weight W [out, in] a pair A [r, in] and B [out, r]: it stands for W + scale B A (Hu et al. 2021).
On disk it is what PEFT writes: `adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ragate_engine.config import ModelConfig
from ragate_engine.errors import ConfigError, ModelFileError
from ragate_engine.files import write_whole
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.weights import Checkpoint, names
from ragate_engine.weights.fields import Fields, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
PREFIX = "base_model.model."
LEAVES = ("q", "k", "v", "o", "gate", "up", "down")
"""What an adapter may change, by our names (`weights/names.py`)."""
TARGETS = tuple(names.to_hf(f"layers.0.{leaf}", False).split(".")[-2] for leaf in LEAVES)
"""The same by Hugging Face's: q_proj, ..."""
PRODUCTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Weights of a layer that are multiplied as one."""
STEP = 16
"""Ranks that a card adds at once: every adapter's are padded to a multiple, so that no step is shared."""
MAX_RANK = 1024
_FINITE = "expected finite numbers: it is damaged, or its training diverged"

_REFUSED: dict[str, tuple[object, ...]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],),
    # the others begin from a base that is changed too, which the folder does not hold
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
"""Fields of adapter_config.json that change what an adapter is, and the values that we serve."""

Weight = torch.Tensor | QuantTensor


class Pair(NamedTuple):
    """What an adapter holds for one weight [out, in], in float32."""

    a: torch.Tensor
    """[r, in]"""
    b: torch.Tensor
    """[out, r]"""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: the weight `name` becomes W + scale B A for each `name` in `pairs`, others stay."""

    name: str
    rank: int
    scale: float
    pairs: Mapping[str, Pair]
    """By canonical name, such as `layers.3.q`."""

    @cached_property
    def digest(self) -> str:
        """sha256, hex, of what decides the output: scale and pairs, whatever file they came from."""
        found = hashlib.sha256(repr((self.rank, self.scale)).encode())
        for name, pair in sorted(self.pairs.items()):
            found.update(name.encode())
            for half in pair:
                found.update(half.detach().cpu().contiguous().numpy().data)
        return found.hexdigest()


def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """The adapter in PEFT's `folder`, for a base of this configuration; it is called by the folder's name.

    Of the scales PEFT knows, alpha / r and rsLoRA's alpha / sqrt(r) (Kalajdzievski 2023) are served. Raises
    ModelFileError, one sentence with file and tensor, for what is missing, damaged, not served or of another base.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ModelFileError(f"{folder} has no {CONFIG}: give the folder of a LoRA adapter as PEFT writes it")
    meta = Fields(folder / CONFIG, read_json(folder / CONFIG))
    if meta.values.get("peft_type") != "LORA":
        meta.refuse(f"peft_type is {str(meta.values.get('peft_type'))[:40]!r}: only LORA adapters are served")
    for key, served in _REFUSED.items():
        value = meta.values.get(key)
        if value is not None and value not in served:
            meta.refuse(f"{key} is {str(value)[:40]!r}, which is not served: train a plain LoRA adapter")
    rank, alpha = meta.need("r", int), meta.need("lora_alpha", float)
    if not 1 <= rank <= MAX_RANK:
        meta.refuse(f"r is {rank}, expected 1 to {MAX_RANK}")
    scale = alpha / (rank**0.5 if meta.get("use_rslora", bool) else rank)
    base = meta.get("base_model_name_or_path", str) or "another base"
    path = folder / WEIGHTS
    if not path.is_file():
        for name in PICKLES:
            if (folder / name).exists():
                raise ModelFileError(
                    f"{folder / name} is a pickle, which may run code when it is read: save the adapter as {WEIGHTS}"
                )
        raise ModelFileError(f"{folder} has no {WEIGHTS}: copy the adapter again")
    return Adapter(folder.resolve().name, rank, scale, _read_pairs(path, config, rank, base))


def _read_pairs(path: Path, config: ModelConfig, rank: int, base: str) -> dict[str, Pair]:
    """The pairs of a safetensors file by canonical name, those of fused matrices taken apart."""
    try:
        with safe_open(path, framework="pt") as file:
            halves: dict[str, dict[str, str]] = {}
            for key in file.keys():  # noqa: SIM118  (not a dict)
                name, half = _canonical(path, key)
                first = halves.setdefault(name, {}).setdefault(half, key)
                if first != key:
                    raise ModelFileError(
                        f"{path}: {first} and {key} are of one weight: save the adapter again"
                    )
            if not halves:
                raise ModelFileError(f"{path} holds no tensor: save the adapter again")
            pairs: dict[str, Pair] = {}
            for name, keys in halves.items():
                for half in "AB":
                    if half not in keys:
                        other = next(iter(keys.values()))
                        raise ModelFileError(
                            f"{path}: {other} has no lora_{half} beside it: copy the adapter again"
                        )
                shapes = _shapes_of(path, config, name, keys["A"])
                expected = {"A": (rank, next(iter(shapes.values()))[1]),
                            "B": (sum(shape[0] for shape in shapes.values()), rank)}  # fmt: skip
                read = {half: _read_half(path, file, keys[half], expected[half], half, base) for half in "AB"}
                at = 0
                for part, (rows, _) in shapes.items():
                    pairs[part] = Pair(read["A"], read["B"][at : at + rows].contiguous())
                    at += rows
            return pairs
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path} cannot be read ({error}): copy the adapter again") from None


def _canonical(path: Path, key: str) -> tuple[str, str]:
    """The canonical weight that a tensor belongs to, and which half it is: A or B."""
    match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", key)
    name = names.from_hf(f"{match[1]}.weight", False) if match else None
    if match is None or name is None or name.rpartition(".")[2] not in (*LEAVES, "qkv", "gate_up"):
        raise ModelFileError(
            f"{path}: {key[:120]} is not served: an adapter may change {', '.join(TARGETS)} and nothing else"
        )
    return name, match[2]


def _shapes_of(path: Path, config: ModelConfig, name: str, key: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that `name` stands for: more than one where it is fused."""
    layer, _, leaf = name.rpartition(".")
    parts = list(names.fused_parts(leaf, config)) if leaf in ("qkv", "gate_up") else [leaf]
    if int(layer.removeprefix("layers.")) >= config.num_layers:
        raise ModelFileError(
            f"{path}: {key} is of a layer that this model of {config.num_layers} layers has not: "
            "the adapter was trained on another base"
        )
    shapes = names.expected(config)
    return {f"{layer}.{part}": shapes[f"{layer}.{part}"] for part in parts}


def _read_half(
    path: Path, file: Any, key: str, expected: tuple[int, int], half: str, base: str
) -> torch.Tensor:
    """One tensor in float32; its shape is looked at before it is read."""
    shape = tuple(file.get_slice(key).get_shape())
    if shape != expected:
        at = 0 if half == "A" else 1  # where the rank stands
        why = f"it was trained on another base ({base[:80]})"
        if len(shape) == 2 and shape[at] != expected[at]:
            why = f"{CONFIG} says r = {expected[at]}"
        raise ModelFileError(f"{path}: {key} has shape {list(shape)}, expected {list(expected)}: {why}")
    tensor: torch.Tensor = file.get_tensor(key)
    if not tensor.is_floating_point():
        raise ModelFileError(
            f"{path}: {key} is {tensor.dtype}, expected floats: save the adapter unquantized"
        )
    tensor = tensor.float().contiguous()
    if not torch.isfinite(tensor).all():
        raise ModelFileError(f"{path}: {key} holds NaN or infinity, {_FINITE}")
    return tensor


def write_adapter(folder: str | Path, adapter: Adapter, base: str, extra: Mapping[str, object]) -> None:
    """Write `adapter` as PEFT does, for the model called `base`; `extra` fields go into adapter_config.json too.
    Weights keep their type.

    Each file appears whole or not at all. Raises ModelFileError for what is not finite, OSError from the disk.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in adapter.pairs.items():
        module = PREFIX + names.to_hf(name, False).removesuffix("weight")
        for half, values in zip("AB", pair, strict=True):
            if not torch.isfinite(values).all():
                raise ModelFileError(
                    f"{folder / WEIGHTS}: {module}lora_{half} holds NaN or infinity, {_FINITE}"
                )
            # halves of a fused matrix share an A, which a file may not
            tensors[f"{module}lora_{half}.weight"] = values.detach().to("cpu").clone()
    alpha = adapter.scale * adapter.rank
    changed = {name.rpartition(".")[2] for name in adapter.pairs}
    fields = {
        **extra,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": [target for leaf, target in zip(LEAVES, TARGETS, strict=True) if leaf in changed],
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    write_whole(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    write_whole(folder / CONFIG, (json.dumps(fields, indent=2) + "\n").encode())


# ---- added to the weights ----


def merging(
    load: Callable[[str], Weight],
    adapter: Adapter,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[str], Weight]:
    """`load` with `adapter` added: W + (scale B) A in float32, quantized weights unpacked first.

    `multiply` is the product of float32 [out, r] and [r, in] on the weights' device: in the hands of the caller, for
    its bits are then the backend's.
    """

    def load_merged(name: str) -> Weight:
        weight = load(name)
        pair = adapter.pairs.get(name)
        if pair is None:
            return weight
        wide = weight.dequantize(torch.float32) if isinstance(weight, QuantTensor) else weight.float()
        added = multiply((pair.b * adapter.scale).to(wide.device), pair.a.to(wide.device))
        if not torch.isfinite(added).all():
            raise ConfigError(
                f"adapter {adapter.name}'s numbers for {name} are too large for float32: train it again"
            )
        return wide + added

    return load_merged


@dataclass(frozen=True)
class MergedCheckpoint(Checkpoint):
    """A model with an adapter added to its weights, as a quantizer reads them: those that changed in float32."""

    digest: str = ""
    """Of the adapter."""

    @property
    def identity(self) -> str:
        """sha256, hex, of the model's own and the adapter's. Raises ModelFileError where a file cannot be read."""
        return hashlib.sha256(f"{super().identity} {self.digest}".encode()).hexdigest()


def merge_adapter(source: Checkpoint, folder: str | Path) -> MergedCheckpoint:
    """`source` with the adapter in PEFT's `folder` added to its weights, one at a time as they are read.

    Raises ModelFileError as `read_adapter` does, ConfigError from a weight's loader where the sum overflows.
    """
    adapter = read_adapter(folder, source.config)
    load = merging(source.load, adapter, torch.matmul)
    merged = {name: partial(load, name) for name in adapter.pairs}
    return MergedCheckpoint(
        source.path,
        source.config,
        source.tokenizer,
        {**source.tensors, **merged},
        f"{source.quantization} + {adapter.name}",
        source.files,
        frozenset(merged),
        adapter.digest,
    )


# ---- stacked, to be served beside the weights ----


class ProductShape(NamedTuple):
    """The two weights of all adapters for one product of the base: [columns, inner], then [outer, columns]."""

    leaves: tuple[str, ...]
    """Of the base's product."""
    outer: int
    columns: int
    inner: int


def slot_of_columns(adapters: Sequence[Adapter]) -> list[int]:
    """Which adapter each column belongs to: its ranks, padded to whole steps of 16."""
    return [slot for slot, adapter in enumerate(adapters) for _ in range(-(-adapter.rank // STEP) * STEP)]


def _changed(adapters: Sequence[Adapter], weights: Sequence[str]) -> list[str]:
    """Those of `weights` that any adapter changes."""
    return [name for name in weights if any(name in adapter.pairs for adapter in adapters)]


def product_shapes(adapters: Sequence[Adapter], config: ModelConfig) -> list[ProductShape]:
    """What stands beside the products of each layer; a layer's product that no adapter changes has nothing."""
    shapes, width = names.expected(config), len(slot_of_columns(adapters))
    found = []
    for layer in range(config.num_layers):
        for leaves in PRODUCTS:
            weights = [f"layers.{layer}.{leaf}" for leaf in leaves]
            if changed := _changed(adapters, weights):
                outer = sum(shapes[name][0] for name in weights)
                found.append(ProductShape(leaves, outer, len(changed) * width, shapes[weights[0]][1]))
    return found


def held_values(adapters: Sequence[Adapter], config: ModelConfig) -> int:
    """How many numbers all adapters are, stacked."""
    return sum(shape.columns * (shape.inner + shape.outer) for shape in product_shapes(adapters, config))


def stacked(
    adapters: Sequence[Adapter], config: ModelConfig, weights: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A [L C, in] and scale B [out, L C] of all adapters, for the product of `weights` one below the other.

    L of them are changed by any adapter, and each has C columns: `slot_of_columns`. In B the rows of a weight are zero
    in the columns of another. `None` where no adapter changes any. Float32.
    """
    changed, shapes = _changed(adapters, weights), names.expected(config)
    if not changed:
        return None
    width = len(slot_of_columns(adapters))
    a = torch.zeros(len(changed) * width, shapes[weights[0]][1], dtype=torch.float32)
    b = torch.zeros(sum(shapes[name][0] for name in weights), len(changed) * width, dtype=torch.float32)
    row = 0
    for name in weights:
        rows = slice(row, row + shapes[name][0])
        row = rows.stop
        if name not in changed:
            continue
        at = changed.index(name) * width
        for adapter in adapters:
            if (pair := adapter.pairs.get(name)) is not None:
                a[at : at + adapter.rank] = pair.a
                b[rows, at : at + adapter.rank] = pair.b * adapter.scale
            at += -(-adapter.rank // STEP) * STEP
    return a, b


def read_adapters(folders: Sequence[str | Path], config: ModelConfig) -> tuple[Adapter, ...]:
    """The adapters in `folders`, whose names must differ. Raises ModelFileError or ConfigError."""
    found: dict[str, Adapter] = {}
    for folder in folders:
        adapter = read_adapter(folder, config)
        if adapter.name in found:
            raise ConfigError(
                f"two adapters are called {adapter.name!r}: requests name them, so rename the folder {folder}"
            )
        found[adapter.name] = adapter
    return tuple(found.values())
