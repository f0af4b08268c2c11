"""JSON schema -> which tokens may come next, and which must: llguidance behind two small classes."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING

import llguidance
import numpy as np
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from ragate_engine.errors import GrammarError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ragate_engine.weights.tokenizer import Tokenizer


_TEXT = r"[^\"\\\x00-\x1f\x7f-\x9f]"
SLICES = [_TEXT + "{1,10}", _TEXT + "{1,30}", _TEXT + "+"]
"""Tokens of plain text by length: where a string may still take all of a slice, its mask is ready made. The
class must be that of the schemas' own patterns: llguidance's default slices hold characters that those forbid, and
then the whole vocabulary is walked at each token, an order of magnitude slower."""


class Grammars:
    """Compiles schemas for one tokenizer. Output is compact JSON; properties come in the schema's order."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.words = -(-vocab_size // 32)
        eos = sorted(tokenizer.eos_ids)
        if not eos:
            raise GrammarError("this model has no end token, which a schema needs")
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer.hf.to_str(),
            n_vocab=vocab_size,
            eos_token=eos if len(eos) > 1 else eos[0],
            slices=SLICES,
        )
        self._executor = llguidance.LLExecutor()
        self._compile = functools.lru_cache(maxsize=4096)(self._compile_schema)

    def _compile_schema(self, schema: str) -> str:
        try:
            json.loads(schema)
            grammar: str = llguidance.LLMatcher.grammar_from_json_schema(
                schema, defaults={"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
            )
        except ValueError as e:
            raise GrammarError(f"the schema is not JSON or not a JSON schema: {e}") from None
        problem = llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem:
            raise GrammarError(
                f"the schema cannot be compiled to a grammar: {problem.strip().splitlines()[0]}"
            )
        return grammar

    def fill_masks(self, states: Sequence[GrammarState], masks: np.ndarray) -> bool:
        """Write what each state allows into its row of `masks`, int32 [n, ceil(vocab / 32)], in several threads.

        False where one of them could not: then ask each by itself, so that it fails alone.
        """
        try:
            fill_next_token_bitmask_par(
                self._executor, [(state.matcher, i) for i, state in enumerate(states)], masks
            )
        except (ValueError, RuntimeError):
            return False
        return True

    def start(self, schema: str) -> GrammarState:
        """A fresh state for one output. Raises GrammarError where the schema cannot be compiled."""
        return GrammarState(llguidance.LLMatcher(self._tokenizer, self._compile(schema)), self.words)


class GrammarState:
    """Where one output stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int) -> None:
        self.matcher = matcher
        self._words = words
        self.raise_on_error()

    def raise_on_error(self) -> None:
        """Raise GrammarError where the matcher has failed."""
        if self.matcher.is_error():
            raise GrammarError(f"the grammar failed: {self.matcher.get_error().strip().splitlines()[0]}")

    @property
    def complete(self) -> bool:
        """Whether nothing may follow. A matcher that failed has stopped too: that raises."""
        self.raise_on_error()
        return bool(self.matcher.is_stopped())

    def forced(self) -> list[int]:
        """Tokens that must come next (consumed by this call); empty where there is a choice."""
        tokens: list[int] = [] if self.complete else list(self.matcher.compute_ff_tokens())
        if tokens and not self.matcher.consume_tokens(tokens):
            self.raise_on_error()
        return tokens

    def fill_mask(self, row: np.ndarray) -> None:
        """Write the allowed tokens into `row`, int32 [ceil(vocab / 32)], bit i of word w for token 32 w + i."""
        fill_next_token_bitmask(self.matcher, row.reshape(1, self._words), 0)
        self.raise_on_error()

    def consume(self, token: int) -> None:
        """Advance by a sampled token."""
        if not self.matcher.consume_token(token):
            self.raise_on_error()
            raise GrammarError(f"token {token} is not allowed here")
