"""Grammar masks: the fast path through slices allows exactly what walking the whole vocabulary allows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from models import cached_model

from ragate_engine import grammar
from ragate_engine.errors import GrammarError
from ragate_engine.grammar import Grammars
from ragate_engine.weights import open_checkpoint

TEXT = {"type": "string", "pattern": '^[^ "\\\\\\x00-\\x1f\\x7f-\\x9f][^"\\\\\\x00-\\x1f\\x7f-\\x9f]{2,59}$'}
SCHEMA = json.dumps({"type": "object", "properties": {"reason": TEXT, "verdict": {"enum": [0, 1]}},
                     "required": ["reason", "verdict"], "additionalProperties": False})  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return open_checkpoint(cached_model("smollm2-135m")).tokenizer


def masks(tokenizer, vocab: int, text: str) -> list[np.ndarray]:
    """The mask before each token of `text`."""
    state = Grammars(tokenizer, vocab).start(SCHEMA)
    forced = tokenizer.decode(state.forced())
    assert text.startswith(forced)
    found = []
    for token in tokenizer.encode(text[len(forced) :]):
        row = np.zeros(-(-vocab // 32), np.int32)
        state.fill_mask(row)
        found.append(row)
        state.consume(token)
    return found


def test_slices_change_no_mask_up_to_the_bound_of_a_string(tokenizer, monkeypatch) -> None:
    text = '{"reason":"a long reason, naïve and 日本, that goes on to sixty letters","verdict":1}'
    assert len(json.loads(text)["reason"]) > 50
    fast = masks(tokenizer, 49152, text)
    monkeypatch.setattr(grammar, "SLICES", [])
    slow = masks(tokenizer, 49152, text)
    assert len(fast) > 15
    assert all(np.array_equal(a, b) for a, b in zip(fast, slow, strict=True))
    assert sum(int(np.unpackbits(row.view(np.uint8)).sum()) for row in fast) > 0


def test_forced_text_is_compact_json(tokenizer) -> None:
    state = Grammars(tokenizer, 49152).start('{"const": {"a": 1, "b": [true, null]}}')
    assert tokenizer.decode(state.forced()) == '{"a":1,"b":[true,null]}'
    assert state.complete


def test_a_schema_that_is_none_is_refused_in_one_line(tokenizer) -> None:
    for schema in ("{", '{"type": "nonsense"}', '{"type": "string", "pattern": "("}'):
        with pytest.raises(GrammarError) as e:
            Grammars(tokenizer, 49152).start(schema)
        assert "\n" not in str(e.value)
