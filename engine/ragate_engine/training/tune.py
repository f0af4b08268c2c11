"""The driver: steps of AdamW over an adapter's vector, saved now and then, resumed to the same bytes."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ragate_engine.devices import failure, is_lost, pick_device
from ragate_engine.errors import ConfigError, ModelFileError, OutOfMemoryError, TrainingError
from ragate_engine.lora import Adapter, Pair, write_adapter
from ragate_engine.training.decoder import TunedDecoder
from ragate_engine.training.layout import lay_out
from ragate_engine.training.packs import passes
from ragate_engine.training.recipe import TuneReport, TuneStep, check_examples
from ragate_engine.training.state import Journal, State, settings_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ragate_engine.training.recipe import Example, TuneRecipe
    from ragate_engine.weights import Checkpoint

BETAS = (0.9, 0.999)


def tune_adapter(
    source: Checkpoint,
    examples: Sequence[Example],
    folder: Path,
    recipe: TuneRecipe,
    device: str = "auto",
    progress: Callable[[TuneStep], None] = lambda step: None,
    *,
    held_out: Sequence[Example] = (),
) -> TuneReport:
    """Train a LoRA adapter of `source` on `examples` and write it to `folder` in PEFT's layout, with the log of steps.

    It is trained in float32 and written in bfloat16.

    `device`: auto, cpu (float32) or cuda (bfloat16 with float32 adapter weights). The loss of a step is the sum of
    weight * -ln p over the sum of weights, of all its examples. `held_out` is only looked at. Called again with the
    same arguments it resumes, with the same result: bits depend on torch and its number of threads, or on the card.

    Raises ConfigError (examples, a folder that holds something else), ModelFileError (a damaged model, a disk),
    OutOfMemoryError, DeviceError (a card that is missing or lost), TrainingError (a loss that is not finite).
    """
    if not examples:
        raise ConfigError("there are no examples to train on: give one at least")
    check_examples(examples, source.config)
    check_examples(held_out, source.config, "held-out example")
    place = pick_device(device)
    folder = Path(folder)
    with _explained(folder, recipe), _deterministic():
        journal = Journal(folder, settings_of(source, examples, recipe, place))
        return _Run(source, examples, held_out, recipe, journal, place).finish(progress)


class _Run:
    """The model, the adapter's vector and its optimizer."""

    def __init__(
        self,
        source: Checkpoint,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        recipe: TuneRecipe,
        journal: Journal,
        device: torch.device,
    ) -> None:
        self.source, self.recipe, self.journal, self.device = source, recipe, journal, device
        self.examples, self.held_out = examples, held_out
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        longest = max(example.length for example in (*examples, *held_out))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.decoder = TunedDecoder(source, recipe, longest, dtype, device)
        self.steps = recipe.steps(len(examples))
        before = journal.resumed
        first = self.decoder.vector.initial(recipe.seed) if before is None else before.vector
        self.vector = first.to(device).requires_grad_()
        self.optimizer = torch.optim.AdamW(
            [self.vector], betas=BETAS, weight_decay=recipe.weight_decay, fused=device.type == "cuda"
        )
        self.done = 0
        if before is not None:
            self.done = before.step
            self.optimizer.state[self.vector] = {
                "step": torch.tensor(
                    float(before.step), dtype=torch.float32, device=device if device.type == "cuda" else None
                ),
                "exp_avg": before.mean.to(device),
                "exp_avg_sq": before.square.to(device),
            }

    def finish(self, progress: Callable[[TuneStep], None]) -> TuneReport:
        """Take the steps that are left and write the adapter."""
        rows = self.journal.rows
        saved = time.monotonic()
        while self.done < self.steps:
            row = self._step()
            if self.held_out and (self.done % self.recipe.evaluate_every == 0 or self.done == self.steps):
                row["held_out"] = self._evaluate()
            rows.append(row)
            if time.monotonic() - saved >= self.recipe.save_seconds and self.done < self.steps:
                self.journal.save(self._state())
                saved = time.monotonic()
            rate = row["tokens"] / row["seconds"]
            progress(TuneStep(self.done, self.steps, row["loss"], row["rate"], rate, row.get("held_out")))
        self.journal.write_log()  # first: an adapter that is there ends the run
        write_adapter(
            self.journal.folder,
            self._adapter(),
            self.source.path.name,
            {},
        )
        self.journal.drop_state()
        looks = [row["held_out"] for row in rows if "held_out" in row]
        return TuneReport(
            folder=self.journal.folder,
            steps=self.steps,
            loss=rows[-1]["loss"],
            held_out=looks[-1] if looks else None,
            parameters=self.vector.numel(),
            tokens=sum(row["tokens"] for row in rows),
            computed_tokens=sum(row["computed_tokens"] for row in rows),
            seconds=sum(row["seconds"] for row in rows),
            peak_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        )

    def _step(self) -> dict[str, Any]:
        """One optimizer step: what the log says of it."""
        started = time.perf_counter()
        recipe = self.recipe
        batch = self._batch(self.done)
        weight = sum(sum(example.weights) for example in batch)
        self.optimizer.zero_grad()
        losses = []
        computed = 0
        for packs in passes(batch, recipe.pass_tokens):
            layout = lay_out(batch, packs, self.device)
            computed += len(layout.ids)
            loss = self.decoder.loss(self.vector, layout) / weight
            loss.backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_([self.vector], recipe.clip)
        found, size = torch.stack([torch.stack(losses).sum(), norm]).tolist()
        if not np.isfinite([found, size]).all():
            if self.done:
                self.journal.save(self._state())
            raise TrainingError(
                f"{self.journal.folder}: the {'gradient' if np.isfinite(found) else 'loss'} of step {self.done + 1} "
                "is not finite, the state before it is kept: take a lower learning_rate, in another folder"
            )
        rate = recipe.rate(self.done, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.done += 1
        return {
            "step": self.done,
            "loss": found,
            "norm": size,
            "rate": rate,
            "tokens": sum(example.length for example in batch),
            "computed_tokens": computed,
            "trained_tokens": sum(sum(w > 0 for w in example.weights) for example in batch),
            "seconds": time.perf_counter() - started,
        }

    def _batch(self, step: int) -> list[Example]:
        """The examples of a step: every epoch has an order of its own, which the seed decides."""
        count, size = len(self.examples), self.recipe.batch
        epoch, at = divmod(step, -(-count // size))
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(count)
        return [self.examples[i] for i in order[at * size : (at + 1) * size]]

    @torch.no_grad()
    def _evaluate(self) -> float:
        """The loss on the held-out examples."""
        total = weight = 0.0
        size = self.recipe.batch
        for at in range(0, len(self.held_out), size):
            batch = self.held_out[at : at + size]
            weight += sum(sum(example.weights) for example in batch)
            for packs in passes(batch, self.recipe.pass_tokens):
                total += float(self.decoder.loss(self.vector, lay_out(batch, packs, self.device)))
        return total / weight

    def _state(self) -> State:
        moments = self.optimizer.state[self.vector]
        return State(self.done, self.vector, moments["exp_avg"], moments["exp_avg_sq"])

    def _adapter(self) -> Adapter:
        layers = self.decoder.vector.by_leaf(self.vector.detach().cpu())
        pairs = {
            f"layers.{i}.{leaf}": Pair(
                *(half.bfloat16() for half in pair)
            )  # half the bytes of what was trained
            for i, layer in enumerate(layers)
            for leaf, pair in layer.items()
        }
        return Adapter(self.journal.folder.resolve().name, self.recipe.rank, self.recipe.scale, pairs)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Have torch take the algorithms that give the same bits every time, and none that does not."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextmanager
def _explained(folder: Path, recipe: TuneRecipe) -> Iterator[None]:
    """Turn what the system says of memory and disk into a sentence."""
    try:
        yield
    except OSError as error:
        raise ModelFileError(
            f"{folder} cannot be written: {error.strerror or error}; the last saved state is kept"
        ) from None
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_little(folder, recipe, error) from None
    except RuntimeError as error:
        if is_lost(error):
            raise failure(error) from None
        if "can't allocate memory" not in str(error):
            raise
        raise _too_little(folder, recipe, error) from None


def _too_little(folder: Path, recipe: TuneRecipe, error: BaseException) -> OutOfMemoryError:
    what = str(error).split(". ")[0] or type(error).__name__
    ways = [f"fewer pass_tokens than {recipe.pass_tokens}"]
    ways += [] if recipe.checkpointing else ["checkpointing"]
    ways += ["base packed"] if recipe.base == "dense" else []
    return OutOfMemoryError(
        f"{folder}: the memory did not suffice ({what}): take {' or '.join(ways)}, in another folder"
    )
