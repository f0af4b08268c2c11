"""On the card: training has the gradients of the CPU as far as bfloat16 goes, and the same bytes every time.

Run with `pytest -m gpu tests/gpu`. Needs an NVIDIA card.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from on_card import BF16, CARD, FP32, NEEDS_CARD, error

from bench.random_model import QWEN_0_5B, SMOL_135M, random_checkpoint
from ragate_engine import Example, ModelConfig, TuneRecipe, TuneStep, tune_adapter
from ragate_engine.lora import WEIGHTS
from ragate_engine.training.decoder import TunedDecoder
from ragate_engine.training.layout import lay_out
from ragate_engine.training.packs import passes

pytestmark = NEEDS_CARD
QUICK = TuneRecipe(batch=8, epochs=2, learning_rate=1e-3, save_seconds=0)


def judged(count: int) -> list[Example]:
    """Examples of two kinds with long beginnings."""
    random = np.random.default_rng(0)

    def tokens(size: int) -> tuple[int, ...]:
        return tuple(random.integers(3, 40_000, size).tolist())

    heads = [tokens(300), tokens(173)]
    return [Example(heads[i % 2] + tokens(20 + 31 * i), tokens(12), (1.0,) * 12) for i in range(count)]


@pytest.mark.parametrize("base", ["dense", "packed"])
@pytest.mark.parametrize("config", [SMOL_135M, QWEN_0_5B], ids=["smollm2", "qwen2"])
def test_gradients_are_those_of_the_cpu(config: ModelConfig, base: str) -> None:
    source = random_checkpoint(replace(config, num_layers=2))
    examples = judged(6)
    found = []
    for device, dtype in ((torch.device("cpu"), FP32), (CARD, BF16)):
        decoder = TunedDecoder(source, TuneRecipe(base=base), 1024, dtype, device)  # type: ignore[arg-type]
        first = decoder.vector.initial(0)
        first += torch.randn(len(first), generator=torch.Generator().manual_seed(1)) * 0.02
        vector = first.to(device).requires_grad_()
        (packs,) = passes(examples, 10_000)
        loss = decoder.loss(vector, lay_out(examples, packs, device))
        loss.backward()
        assert vector.grad is not None
        found.append((float(loss.detach()), vector.grad.cpu()))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.01)
    assert error(found[1][1], found[0][1]) < 0.05


@pytest.mark.parametrize("change", [{}, {"checkpointing": True}, {"base": "packed"}, {"pass_tokens": 1500}])
def test_a_run_stopped_and_resumed_has_the_bytes_of_one_that_was_not(
    change: dict[str, object], tmp_path: Path
) -> None:
    source = random_checkpoint(replace(SMOL_135M, num_layers=4))
    recipe = replace(QUICK, **change)  # type: ignore[arg-type]

    def stop(step: TuneStep) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    tune_adapter(source, judged(20), whole, recipe, "cuda")
    with pytest.raises(KeyboardInterrupt):
        tune_adapter(source, judged(20), stopped, recipe, "cuda", stop)
    tune_adapter(source, judged(20), stopped, recipe, "cuda")
    assert (stopped / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
