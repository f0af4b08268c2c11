"""On the card: weights become the same GGUF blocks as on a CPU, byte for byte."""

from __future__ import annotations

import pytest
import torch
from on_card import CARD, NEEDS_CARD

from ragate_engine.quant.encode import WRITTEN, encode
from ragate_engine.quant.formats import Kind

pytestmark = NEEDS_CARD


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
def test_a_card_writes_the_bytes_that_a_cpu_writes(kind: Kind) -> None:
    random = torch.Generator().manual_seed(11)
    rows = torch.randn(512, 1024, generator=random)
    rows *= torch.exp(torch.randn(512, 32, generator=random) * 3).repeat_interleave(32, dim=1).clamp(max=1e3)
    rows[5] = 0
    rows[6:9, 100:] = 0
    rows[9:20] = rows[9:20].round()  # ties
    assert torch.equal(encode(kind, rows.to(CARD)).cpu(), encode(kind, rows))
