"""transformers reads the GPTQ and AWQ models that we write, and gives a text the perplexity that we do.

Needs `pip install gptqmodel optimum`, with which transformers reads both; skipped where they are missing.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from models import cached_model

from bench.logits import logits_of
from ragate_engine import EngineConfig
from ragate_engine.quantize import quantize
from ragate_engine.weights import open_checkpoint

pytestmark = pytest.mark.slow

TEXT = (
    "The Eiffel Tower is a lattice tower on the Champ de Mars in Paris, France. It is named after the engineer Gustave "
    "Eiffel, whose company designed and built the tower from 1887 to 1889. It was the tallest building in the world "
    "until the Chrysler Building in New York was finished in 1930. Water boils at a lower temperature on a mountain, "
    "since the air presses less. A cache keeps what was computed before, so that it need not be computed again; when "
    "it is full, what was used least is thrown out first. "
)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_perplexity_in_transformers_is_ours(method: str, tmp_path: Path) -> None:
    for package in ("gptqmodel", "optimum"):
        pytest.importorskip(package, reason=f"pip install {package}, with which transformers reads {method}")
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(cached_model("smollm2-135m"))
    assert source.tokenizer is not None
    tokens = source.tokenizer.encode(TEXT, special=False)
    folder = tmp_path / method
    quantize(source, folder, method, 4, 64, [tokens[:64], tokens[64:]], "cpu")

    (logits,) = logits_of(open_checkpoint(folder), [tokens], EngineConfig(device="cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    ours, other = perplexity(logits, tokens), perplexity(expected, tokens)
    assert ours == pytest.approx(other, rel=0.01)
    # of the same weights, not of some that are as good
    assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.97


def perplexity(logits: torch.Tensor, tokens: list[int]) -> float:
    """Of the tokens after the first."""
    following = torch.tensor(tokens[1:])
    return math.exp(float(torch.nn.functional.cross_entropy(logits[:-1].float(), following)))
