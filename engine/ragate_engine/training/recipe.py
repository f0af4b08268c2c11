"""What is learned (`Example`), how (`TuneRecipe`) and what came of it (`TuneReport`): checked before work begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ragate_engine.errors import ConfigError
from ragate_engine.lora import MAX_RANK
from ragate_engine.quantize.layer import LINEARS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ragate_engine.config import ModelConfig


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn after it, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    weights: tuple[float, ...]
    """Loss weight of each token of the answer; 0 is not trained."""

    @property
    def length(self) -> int:
        """Tokens that go through the model: the last one of the answer is only predicted."""
        return len(self.prompt) + len(self.answer) - 1


@dataclass(frozen=True)
class TuneRecipe:
    """How to train an adapter: checked when made. Raises ConfigError."""

    rank: int = 16
    alpha: float = 32.0
    """The adapter adds alpha / rank * B A x (Hu et al. 2021, section 4.1)."""
    targets: tuple[str, ...] = LINEARS
    """Linears that get a pair: any of q, k, v, o, gate, up, down."""
    base: Literal["dense", "packed"] = "dense"
    """`dense`: frozen weights unpacked, bfloat16 on a card. `packed`: kept as codes and unpacked in every product
    (QLoRA, Dettmers et al. 2023); a plain model is rounded to 4 bits in groups of 64 for it."""
    epochs: int = 1
    batch: int = 32
    """Examples of one optimizer step."""
    learning_rate: float = 2e-4
    warmup: float = 0.03
    """Share of the steps in which the rate rises to its peak; it then falls to 0 along a cosine."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    seed: int = 0
    """Of the adapter's first weights and of the order of the examples."""
    pass_tokens: int = 20_480
    """Tokens of one forward pass: memory grows with it. A step takes as many passes as it needs."""
    checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the layer again: slower, far less memory."""
    save_seconds: float = 60.0
    """Time between two saved states; 0 saves after every step."""
    evaluate_every: int = 100
    """Steps between two looks at the held-out examples."""

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch", "pass_tokens", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rank > MAX_RANK:
            raise ConfigError(f"rank must be at most {MAX_RANK}, got {self.rank}")
        for name in ("alpha", "learning_rate", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a number above 0, got {value}")
        for name in ("weight_decay", "save_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be 0 or more, got {value}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup must be a share of the steps, from 0 up to 1, got {self.warmup}")
        if self.base not in ("dense", "packed"):
            raise ConfigError(f"base must be dense or packed, got {self.base!r}")
        if unknown := [leaf for leaf in self.targets if leaf not in LINEARS]:
            raise ConfigError(f"there is no linear {unknown[0]!r} to adapt: choose from {', '.join(LINEARS)}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(f"targets must name each linear once and one at least, got {self.targets}")

    @property
    def scale(self) -> float:
        """What the product of the pair is multiplied by."""
        return self.alpha / self.rank

    def steps(self, examples: int) -> int:
        """Optimizer steps over so many examples; the last of an epoch may be short."""
        return self.epochs * -(-examples // self.batch)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step counted from 0: linear to the peak, then half a cosine (Loshchilov & Hutter)."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


@dataclass(frozen=True)
class TuneStep:
    """What progress is told after an optimizer step."""

    step: int
    """Steps done."""
    steps: int
    loss: float
    """Weighted mean of -ln p of the step's trained tokens, before the step."""
    learning_rate: float
    tokens_per_second: float
    """Of the examples as if each stood alone, over this step."""
    held_out: float | None
    """The loss on the held-out examples where this step looked at them."""


@dataclass(frozen=True)
class TuneReport:
    """What a finished run was."""

    folder: Path
    """The adapter, in PEFT's layout, and the log of its steps."""
    steps: int
    loss: float
    """Of the last step."""
    held_out: float | None
    """The last loss on the held-out examples."""
    parameters: int
    """Weights of the adapter."""
    tokens: int
    """Of all steps, each example counted alone."""
    computed_tokens: int
    """The same with shared prefixes counted once a pack: what the card worked on."""
    seconds: float
    """Of all steps, in every run where it was resumed."""
    peak_bytes: int | None
    """Memory of the card at most, in this run; `None` on a CPU."""


def check_examples(examples: Sequence[Example], config: ModelConfig, what: str = "example") -> None:
    """Raise ConfigError for the first example that cannot be trained on; `what` names the list it is of."""
    for i, example in enumerate(examples):
        name = f"{what} {i}"
        if not example.prompt or not example.answer:
            raise ConfigError(f"{name} has no {'answer' if example.prompt else 'prompt'}: leave it out")
        if len(example.weights) != len(example.answer):
            raise ConfigError(
                f"{name} has {len(example.weights)} weights for {len(example.answer)} answer tokens: give one each"
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in example.weights):
            raise ConfigError(f"{name} has a loss weight that is negative or no number: give 0 or more")
        if not any(example.weights):
            raise ConfigError(f"{name} has no trained token, all its weights are 0: leave it out")
        if example.length > config.max_len:
            raise ConfigError(
                f"{name} has {example.length} tokens, more than the model's window of {config.max_len}: "
                "shorten it or leave it out"
            )
        lowest, highest = (pick(*map(pick, (example.prompt, example.answer))) for pick in (min, max))
        if lowest < 0 or highest >= config.vocab_size:
            raise ConfigError(
                f"{name} has token {highest if lowest >= 0 else lowest}, which is none of the model's "
                f"{config.vocab_size}: make it with this model's tokenizer"
            )
