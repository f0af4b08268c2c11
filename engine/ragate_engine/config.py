"""What a model is (`ModelConfig`) and how the engine runs it (`EngineConfig`), validated once, here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ragate_engine.errors import ConfigError

BLOCK_SIZE = 16
"""Tokens in one KV block: the unit of allocation, of sharing and of the prefix cache."""

MAX_LEN = 1 << 24
"""The longest window believed of a model file."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. `theta` is the base; `scaling` follows the Hugging Face names.

    Source: Su et al. 2021 (RoFormer); `linear` is Chen et al. 2023, `llama3` is the Llama 3.1 model card.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192
    partial: float = 1.0
    """Share of each head that is rotated (Phi-3 small models use less than 1)."""


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer, whatever file it came from.

    The switches (`qkv_bias`, `qk_norm`, `sandwich_norm`, ...) say what a layer does, so that one decoder
    serves Llama, SmolLM, Mistral, Qwen2, Qwen3, Gemma 2/3 and Phi-3; nothing else asks for `arch`.
    """

    arch: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_len: int
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    local_rope: RopeConfig | None = None
    """Rope of the sliding-window layers where it differs (Gemma 3)."""
    tie_embeddings: bool = False
    qkv_bias: bool = False
    """Qwen2: bias on q, k and v."""
    qk_norm: bool = False
    """Qwen3, Gemma 3: RMS norm over each head of q and k before rope."""
    sandwich_norm: bool = False
    """Gemma 2/3: norms after attention and after the MLP as well as before."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embed_scale: float = 1.0
    """Gemma: embeddings are multiplied by sqrt(hidden_size)."""
    attn_scale: float | None = None
    """Multiplier of q.k; `None` is 1/sqrt(head_dim)."""
    window: int | None = None
    """Sliding window in tokens, for the layers that `window_layers` marks."""
    window_layers: tuple[bool, ...] = ()
    """Per layer: does it slide? Empty means that all do when `window` is set (Mistral v0.1)."""
    attn_soft_cap: float | None = None
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_len",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"model field {name} must be positive, got {getattr(self, name)}")
        if self.max_len > MAX_LEN:
            raise ConfigError(
                f"model field max_len is {self.max_len}: no model reaches beyond {MAX_LEN} tokens"
            )
        if self.window is not None and self.window < 1:
            raise ConfigError(f"model field window must be positive, got {self.window}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model has {self.num_heads} heads, which is not a multiple of its {self.num_kv_heads} KV heads"
            )
        if self.window_layers and len(self.window_layers) != self.num_layers:
            raise ConfigError(
                f"window_layers has {len(self.window_layers)} entries for {self.num_layers} layers"
            )

    def window_of(self, layer: int) -> int | None:
        """The sliding window of `layer` in tokens, or `None` where it attends to everything."""
        if self.window is None or (self.window_layers and not self.window_layers[layer]):
            return None
        return self.window

    def rope_of(self, layer: int) -> RopeConfig:
        """The rope of `layer`: Gemma 3 turns its sliding layers with another base."""
        if self.local_rope is not None and self.window_of(layer) is not None:
            return self.local_rope
        return self.rope


_CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "kv_dtype": ("auto", "fp8_e4m3", "fp8_e5m2"),
    "weights": ("auto", "packed", "dense", "int8"),
    "kernels": ("auto", "reference"),
}


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. Only device, dtype, kv_dtype, weights, kernels and adapters may change an output bit."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: float32 on a CPU, bfloat16 on a card."""
    max_len: int | None = None
    """Longest sequence in tokens; `None` is the model's own window."""
    max_batch: int | None = None
    """Requests that run at once; `None` is 64 on a CPU, 1,024 on a card."""
    max_step_tokens: int | None = None
    """Rows of one forward pass: the chunk size of prefill and the token budget of a step. `None` is 512 on a CPU,
    8,192 on a card."""
    kv_bytes: int | None = None
    """Bytes for KV blocks; `None` is 2 GiB on a CPU, most of the free memory on a card."""
    kv_dtype: Literal["auto", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """`auto` keeps K and V in `dtype`. The 8-bit floats, on a card only, hold twice the tokens."""
    weights: Literal["auto", "packed", "dense", "int8"] = "auto"
    """On a card: `packed` keeps the codes of quantized weights, which takes a quarter of the memory at 4 bits, and
    multiplies with them rounded to bfloat16 once; `dense` unpacks them at the start; `int8` rounds weights and
    activations, each row by its own scale, and multiplies whole numbers. `auto` is `dense`."""
    merge_adapter: Path | None = None
    """Folder of a LoRA adapter (PEFT) that is added to the weights as they are loaded."""
    adapters: tuple[Path, ...] = ()
    """Folders of LoRA adapters that stay beside the weights: a request names the one it wants, by its folder's name."""
    prefix_cache: bool = True
    cuda_graphs: bool = True
    """Replay the launches of a step as one graph (on a card)."""
    overlap: bool | None = None
    """Launch a step before the last one is read; `None`: on a card."""
    threads: int | None = None
    """CPU threads; `None` is one per core."""
    kernels: Literal["auto", "reference"] = "auto"
    """`reference` forces the plain torch kernels (for tests and for machines without a C compiler)."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if isinstance(self.adapters, str | Path):
            raise ConfigError(f"adapters must be a list of folders, got {str(self.adapters)!r}")
        if self.merge_adapter is not None and self.weights == "packed":
            raise ConfigError(
                "an adapter cannot be merged into packed weights: use weights dense or int8, or serve it beside them "
                "with adapters"
            )
        if self.max_batch is not None and self.max_batch < 1:
            raise ConfigError(f"max_batch must be at least 1, got {self.max_batch}")
        if self.max_step_tokens is not None and self.max_step_tokens < BLOCK_SIZE:
            raise ConfigError(f"max_step_tokens must be at least {BLOCK_SIZE}, got {self.max_step_tokens}")
        if self.max_len is not None and self.max_len < BLOCK_SIZE:
            raise ConfigError(f"max_len must be at least {BLOCK_SIZE}, got {self.max_len}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}")
