"""An engine without a model: answers any schema of ours with valid JSON that depends on the prompt alone."""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ragate_engine.errors import EngineClosedError
from ragate_engine.request import Completion, SamplingParams, TokenInfo, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WORDS = ("paged", "cache", "block", "token", "batch", "prefix", "kernel", "weight", "scale", "judge", "score")


class FakeTokenizer:
    """One token a character."""

    def encode(self, text: str) -> list[int]:
        """Code points of the text."""
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these code points."""
        return "".join(map(chr, ids))


class FakeEngine:
    """Stands in for `ragate_engine.Engine`: one worker thread, newest request first, tokens of one character.

    `answer` may replace the text of a completion; `hang` makes matching prompts wait for ever; `fail` raises.
    """

    def __init__(
        self,
        max_len: int = 100_000,
        name: str = "fake",
        answer: Callable[[str, str], str | None] = lambda prompt, schema: None,
        hang: Callable[[str], bool] = lambda prompt: False,
        fail: Callable[[str], Exception | None] = lambda prompt: None,
    ) -> None:
        self.max_len = max_len
        self.adapters: tuple[str, ...] = ()
        self.name = name
        self.tokenizer = FakeTokenizer()
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.answer, self.hang, self.fail = answer, hang, fail
        self._usage = Usage()
        self._queue: list[tuple[str, SamplingParams, Future[Completion]]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """A chat template of one tag a turn."""
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"
        return self.tokenizer.encode(text)

    def submit(
        self, prompt: Sequence[int], params: SamplingParams | None = None, adapter: str | None = None
    ) -> Future[Completion]:
        """Queue a prompt."""
        if self._closing:
            raise EngineClosedError("the engine is closed")
        future: Future[Completion] = Future()
        text, params = self.tokenizer.decode(prompt), params or SamplingParams()
        self.prompts.append(text)
        self.params.append(params)
        if not self.hang(text):
            with self._wake:
                self._queue.append((text, params, future))
                self._wake.notify()
        return future

    def describe(self, adapter: str | None = None) -> dict[str, str]:
        """The real engine's fields."""
        digest = hashlib.sha256(self.name.encode()).hexdigest()
        return {
            "engine": "1",
            "backend": "fake",
            "dtype": "float32",
            "arch": "fake",
            "weights": digest,
            "quantization": "none",
            "tokenizer": "chars",
        }

    def usage(self) -> Usage:
        """A copy of the counters."""
        return Usage(**{**vars(self._usage), "seconds": {}})

    def close(self) -> None:
        """Stop the worker."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._queue or self._closing):
                    self._wake.wait()
                if self._closing:
                    return
                text, params, future = self._queue.pop()
            if not future.set_running_or_notify_cancel():
                continue
            if error := self.fail(text):
                future.set_exception(error)
            else:
                future.set_result(self._complete(text, params))

    def _complete(self, prompt: str, params: SamplingParams) -> Completion:
        chance = Chance(self.name + prompt + str(params.temperature and params.seed))
        text = self.answer(prompt, params.schema or "")
        if text is None:
            text = write(json.loads(params.schema), chance) if params.schema else f"It is {chance.words(5)}."
        cuts = [i for stop in params.stop if (i := text.find(stop)) >= 0]
        text = text[: min(cuts)] if cuts else text
        finish = "stop" if len(text) <= params.max_tokens else "length"
        text = text[: params.max_tokens]
        self._usage.requests += 1
        self._usage.steps += 1
        self._usage.prompt_tokens += len(prompt)
        self._usage.tokens_out += len(text)
        return Completion(text, tuple(_tokens(text, prompt)), finish, len(prompt), 0)


def _tokens(text: str, prompt: str) -> list[TokenInfo]:
    tokens = []
    for i, character in enumerate(text):
        if character in "01" and text[:i].endswith('":'):
            doubt = -0.5 - Chance(prompt + text[:i]).below(100) / 50
            other = "1" if character == "0" else "0"
            top = ((character, -0.1), (other, doubt), (character + "}", doubt - 1))
            tokens.append(TokenInfo(ord(character), i, logprob=-0.1, top=top))
        else:
            tokens.append(TokenInfo(ord(character), i, forced=True))
    return tokens


class Chance:
    """Numbers that depend on a text alone."""

    def __init__(self, seed: str) -> None:
        self._seed, self._count = seed, 0

    def below(self, n: int) -> int:
        """The next number in [0, n)."""
        self._count += 1
        return int.from_bytes(hashlib.sha256(f"{self._count}{self._seed}".encode()).digest()[:8]) % n

    def words(self, n: int) -> str:
        """The next n words."""
        return " ".join(WORDS[self.below(len(WORDS))] for _ in range(n))


def write(tree: Any, chance: Chance) -> str:
    """Compact JSON that matches a schema of `ragate.judge`."""
    if "const" in tree:
        return json.dumps(tree["const"], ensure_ascii=False)
    if "enum" in tree:
        return json.dumps(tree["enum"][chance.below(len(tree["enum"]))])
    if tree["type"] == "object":
        parts = (f"{json.dumps(k)}:{write(v, chance)}" for k, v in tree["properties"].items())
        return "{" + ",".join(parts) + "}"
    if tree["type"] == "array":
        trees = tree.get("prefixItems") or [tree["items"]] * (1 + chance.below(3))
        return "[" + ",".join(write(t, chance) for t in trees) + "]"
    return json.dumps(chance.words(3))
