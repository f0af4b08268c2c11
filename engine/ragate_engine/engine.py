"""`Engine`: the loop in its own thread. Plan, launch, land the step before, choose; completions are futures."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from ragate_engine.blocks import BlockPool, extend_hashes
from ragate_engine.config import BLOCK_SIZE, EngineConfig
from ragate_engine.devices import failure, is_lost, keep_for_ever, pick_device, wake
from ragate_engine.errors import ConfigError, EngineClosedError, EngineError, GrammarError, PromptTooLongError
from ragate_engine.request import Completion, Request, SamplingParams, Status, TokenInfo, Usage
from ragate_engine.runner import Runner
from ragate_engine.scheduler import Scheduler
from ragate_engine.steps import Chosen, Flight
from ragate_engine.weights import Checkpoint, open_checkpoint
from ragate_engine.weights.tokenizer import Tokenizer

VERSION = "2"
"""Raised when a change may alter output bits: it is part of the fingerprint."""

if TYPE_CHECKING:
    from ragate_engine.grammar import Grammars

TOGETHER = 4
"""Masks that are worth filling in several threads."""


class Engine:
    """A model, served. Thread-safe: submit from anywhere; one thread of its own runs the model.

    The tokens and logprobs of a request depend on its prompt and parameters alone, never on its neighbours, on
    `EngineConfig.max_batch`, on chunking or on the state of the prefix cache.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.config = config or EngineConfig()
        started = time.perf_counter()
        self._checkpoint = checkpoint
        checkpoint.hash_ahead()  # the fingerprint will want it, and a large file takes seconds
        self._runner = Runner(checkpoint, self.config, progress)
        self._usage = Usage(
            seconds={"load": time.perf_counter() - started, "plan": 0, "launch": 0, "wait": 0, "choose": 0}
        )
        pool = BlockPool(self._runner.kv.num_blocks, self.config.prefix_cache)
        self._scheduler = Scheduler(
            pool, self._runner.max_batch, self._runner.max_step_tokens, self._usage, self.max_len
        )
        self._flight: Flight | None = None
        """The step that was launched and not yet read."""
        self._forget_prefixes = False
        self._cancelled = threading.Event()
        """Set when a future was cancelled, so that the loop looks for it."""
        tokenizer = checkpoint.tokenizer
        self._end_tokens = frozenset(tokenizer.eos_ids) if tokenizer is not None else frozenset()
        self._texts: dict[int, str] = {}
        """Tokens as text, as far as they were asked for."""
        self._ids = itertools.count()
        self._inbox: list[Request] = []
        self._wake = threading.Condition()
        self._closing = False
        self._failure: EngineError | None = None
        self._thread = threading.Thread(target=self._loop, name="ragate-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: EngineConfig | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Engine:
        """Open a GGUF file or a Hugging Face folder and start serving it; `progress(done, total)` counts layers.

        Raises ModelFileError, ConfigError, DeviceError or OutOfMemoryError, each with one sentence.
        """
        config = config or EngineConfig()
        wake(pick_device(config.device))
        return cls(open_checkpoint(path), config, progress)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises EngineError where the model came without one."""
        if self._checkpoint.tokenizer is None:
            raise EngineError("this model has no tokenizer: put tokenizer.json beside its weights")
        return self._checkpoint.tokenizer

    @cached_property
    def _grammars(self) -> Grammars:
        """Made for the first schema: it walks the whole vocabulary, and a model may have no end token for it."""
        from ragate_engine.grammar import Grammars

        return Grammars(self.tokenizer, self._runner.vocab_size)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters beside the weights, which requests may name."""
        return tuple(each.name for each in self._runner.adapters)

    @cached_property
    def max_len(self) -> int:
        """The longest sequence, prompt and answer together, in tokens."""
        return min(self._runner.max_len, self._runner.kv.num_blocks * BLOCK_SIZE)

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation by the model's chat template, ready for the assistant's turn.

        Special-token text inside the messages stays text.
        """
        return self.tokenizer.encode_chat(messages)

    def submit(
        self, prompt: Sequence[int], params: SamplingParams | None = None, adapter: str | None = None
    ) -> Future[Completion]:
        """Queue a prompt of token ids; the future gives its Completion. Cancelling the future aborts the request.

        `adapter` is the name of one of `EngineConfig.adapters`: its folder's; `None` is the base alone. Raises
        PromptTooLongError, GrammarError (bad schema), ConfigError (no such adapter) or EngineClosedError at once.
        """
        params = params or SamplingParams()
        if not prompt:
            raise EngineError("the prompt is empty: send at least one token")
        if min(prompt) < 0 or max(prompt) >= self._runner.vocab_size:
            raise EngineError(f"the prompt holds a token id outside [0, {self._runner.vocab_size})")
        self._runner.check_length(len(prompt))
        future: Future[Completion] = Future()
        future.add_done_callback(self._notice_cancel)
        request = Request(next(self._ids), list(prompt), len(prompt), params, future)
        if adapter is not None:
            request.adapter = self._slot_of(adapter)
            request.root = bytes.fromhex(self._runner.adapters[request.adapter].digest)
        if params.schema is not None:
            request.grammar = self._grammars.start(params.schema)
        if self.config.prefix_cache:
            # in the caller's thread: the engine's has enough to do
            extend_hashes(request.hashes, request.tokens, request.root)
        with self._wake:
            if self._failure is not None:
                raise self._failure
            if self._closing:
                raise EngineClosedError("the engine is closed")
            self._inbox.append(request)
            self._wake.notify()
        return future

    def _slot_of(self, adapter: str) -> int:
        """The place of the adapter called so. Raises ConfigError, which names those there are."""
        there = [each.name for each in self._runner.adapters]
        if adapter not in there:
            known = f"there are {', '.join(there)}" if there else "this engine was started without any"
            raise ConfigError(f"no adapter is called {adapter!r}: {known}")
        return there.index(adapter)

    def _notice_cancel(self, future: Future[Completion]) -> None:
        if future.cancelled():
            self._cancelled.set()

    def usage(self) -> Usage:
        """A copy of the counters."""
        with self._wake:
            return Usage(**{**vars(self._usage), "seconds": dict(self._usage.seconds)})

    def describe(self, adapter: str | None = None) -> dict[str, str]:
        """What decides the output bits of requests with `adapter`, field by field, for a fingerprint.

        Raises ConfigError where no adapter is called so.
        """
        kv = "" if self.config.kv_dtype == "auto" else f", KV {self.config.kv_dtype}"
        kept = {weights.operation for weights in self._runner.decoder.kept()}
        products = "".join(f", {name} products" for name in sorted(kept))
        found = {
            "engine": VERSION,
            "backend": self._runner.backend,
            "dtype": str(self._runner.dtype).removeprefix("torch.") + products + kv,
            "arch": self._checkpoint.config.arch,
            "weights": self._checkpoint.identity,
            "quantization": self._checkpoint.quantization,
            "tokenizer": self._checkpoint.tokenizer.identity if self._checkpoint.tokenizer else "none",
        }
        runner = self._runner
        if runner.merged is not None:
            found["merged_adapter"] = runner.merged.digest
        if adapter is not None:
            found["adapter"] = runner.adapters[self._slot_of(adapter)].digest
        elif runner.adapters:  # beside adapters the base's own gate and up are another product
            found["adapter"] = "none"
        return found

    def check(self) -> None:
        """Assert the invariants of pool and scheduler; call it when idle."""
        self._scheduler.check()

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix before the next step is planned: for benches."""
        with self._wake:
            self._forget_prefixes = True

    def close(self) -> None:
        """Stop the loop; requests that are not done get EngineClosedError. Safe to call twice."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the loop, in the engine's own thread ----

    def _loop(self) -> None:
        # of this thread: where kernels bring their own threads, OpenMP's waiting ones would take their cores
        # (and torch's own vector code rounds unlike its scalar code where it cuts a tensor between threads)
        torch.set_num_threads(
            1 if self._runner.device.type == "cpu" else self.config.threads or os.cpu_count() or 1
        )
        try:
            with torch.inference_mode(), self._runner.steps.entered():
                while self._take_inbox():
                    self._step()
            self._fail_all(EngineClosedError("the engine was closed before this request was done"))
        except BaseException as e:  # a panic in a native library too: every future must be resolved
            error = failure(e, self._runner.device_name)
            if is_lost(e):
                keep_for_ever(self._runner.steps)
            logging.getLogger(__name__).debug("the engine's loop ended", exc_info=e)
            if error is not e:
                # without its frames, which would keep the engine and its memory for as long as anyone has the error
                error.__cause__ = e.with_traceback(None)
            with self._wake:
                self._failure = error
            self._fail_all(error)

    def _take_inbox(self) -> bool:
        """Wait for work, move new requests to the scheduler, drop cancelled ones; False when closing."""
        with self._wake:
            while not (
                self._inbox
                or self._closing
                or self._flight
                or self._scheduler.running
                or self._scheduler.waiting
            ):
                self._wake.wait()
            if self._forget_prefixes:
                self._scheduler.pool.forget()
                self._forget_prefixes = False
            arrived, self._inbox = self._inbox, []
            for request in arrived:  # from here on the scheduler knows them, whatever happens
                self._scheduler.add(request)
            if self._closing:
                return False
        for request in arrived:
            self._usage.requests += 1
            self._usage.prompt_tokens += request.prompt_len
            if request.grammar is not None:
                with self._failing_alone(request):
                    self._extend_by_grammar(request)
        if self._cancelled.is_set():
            self._cancelled.clear()
            for request in [*self._scheduler.running, *self._scheduler.waiting]:
                if request.future.cancelled():
                    self._scheduler.finish(request)
                    request.future.set_running_or_notify_cancel()  # wakes those who wait for it
        return True

    @contextmanager
    def _failing_alone(self, request: Request) -> Iterator[None]:
        """What goes wrong inside is this request's failure, not its neighbours'."""
        try:
            yield
        except EngineError as e:
            self._fail(request, e)
        except Exception as e:
            self._fail(request, EngineError(f"this request failed: {type(e).__name__}: {e}"))

    def _step(self) -> None:
        """Plan and launch a step; land the one before it; then queue the choice of the new one's tokens.

        What a grammar allows is known only when the token before has landed, so the choice is queued last. On the
        device the forward pass runs meanwhile.
        """
        seconds, clock = self._usage.seconds, time.perf_counter
        t0 = clock()
        plan = self._scheduler.plan()
        t1 = clock()
        seconds["plan"] += t1 - t0
        if not plan.rows and self._flight is None:
            # nothing runs and the first in the queue does not fit: it never will
            if self._scheduler.waiting and not self._scheduler.running:
                request = self._scheduler.waiting[0]
                error = PromptTooLongError(
                    f"the KV cache cannot hold {len(request.tokens)} tokens: give it more memory"
                )
                self._fail(request, error)
            return
        flight = None
        if plan.rows:
            flight = self._runner.steps.launch(plan)
            self._scheduler.launched(plan)
            self._usage.steps += 1
            self._usage.rows += plan.tokens
            seconds["launch"] += clock() - t1
        self._land()
        self._flight = flight
        if flight is not None:
            t2 = clock()
            self._choose(flight)
            seconds["choose"] += clock() - t2
            if not self._runner.overlap:
                self._land()

    def _choose(self, flight: Flight) -> None:
        """Queue the choice of the next token of each row whose request still wants one."""
        mask_of = [-1] * len(flight.rows)
        flight.valid = [row.current for row in flight.rows]
        bound: list[int] = []
        for i, row in enumerate(flight.rows):
            if not flight.valid[i]:
                if row.request.epoch == row.epoch:
                    row.request.pending -= 1  # what this row brings is not the next token any more
            elif row.request.grammar is not None:
                mask_of[i] = len(bound)
                bound.append(i)
        masks = self._runner.steps.masks(len(bound))
        states = [g for i in bound if (g := flight.rows[i].request.grammar) is not None]
        filled = len(states) >= TOGETHER and self._grammars.fill_masks(states, masks)
        for line, i in enumerate(bound):
            with self._failing_alone(flight.rows[i].request):
                if not filled:
                    states[line].fill_mask(masks[line])
                states[line].raise_on_error()
            flight.valid[i] = not flight.rows[i].request.done
        self._runner.steps.choose(flight, mask_of, masks)

    def _land(self) -> None:
        """Read the step in flight, if there is one, and take its tokens."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        clock = time.perf_counter
        t0 = clock()
        chosen = self._runner.steps.read(flight)
        t1 = clock()
        self._usage.seconds["wait"] += t1 - t0
        for i, row in enumerate(flight.rows):
            request = row.request
            if not flight.valid[i] or not row.current:
                continue
            request.pending -= 1
            # no context manager here: this runs for every token
            try:
                self._take(request, chosen, i)
            except EngineError as e:
                self._fail(request, e)
            except Exception as e:
                self._fail(request, EngineError(f"this request failed: {type(e).__name__}: {e}"))
            else:
                if len(request.tokens) % BLOCK_SIZE == 0 or request.grammar is not None:
                    self._scheduler.publish(request)
        self._usage.seconds["choose"] += clock() - t1

    def _take(self, request: Request, chosen: Chosen, i: int) -> None:
        """Take the token chosen for a request: end it, or want the token (and what is forced after it) computed."""
        params, token, lse = request.params, chosen.ids[i], chosen.lse[i]
        if not math.isfinite(lse):
            raise EngineError("the model's output is not a number: its weights may be damaged")
        if token < 0:
            raise GrammarError("the grammar allows no token here")
        logprob: float | None = None
        top: tuple[tuple[str, float], ...] = ()
        if params.logprobs:
            logprob = chosen.logits[i] - lse
            ids = chosen.top_ids[i, : params.logprobs].tolist()
            logits = chosen.top_logits[i, : params.logprobs].tolist()
            top = tuple((self._token_text(t), x - lse) for t, x in zip(ids, logits, strict=True) if t >= 0)
        if request.grammar is not None:
            request.grammar.consume(token)
        if token in self._end_tokens and not params.ignore_eos:
            self._complete(request, "stop")
            return
        self._append(request, token, False, logprob, top)
        if request.grammar is not None and not request.done:
            self._extend_by_grammar(request)
        elif self._too_long(request) and not request.done:
            self._complete(request, "length")

    def _token_text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            tokenizer = self._checkpoint.tokenizer
            text = tokenizer.token_bytes(token).decode("utf-8", "replace") if tokenizer else ""
            self._texts[token] = text
        return text

    def _extend_by_grammar(self, request: Request) -> None:
        """Append what the grammar forces; end the request where it is complete, or too long."""
        assert request.grammar is not None
        for token in request.grammar.forced():
            if self._too_long(request):
                self._complete(request, "length")
                return
            if token in self._end_tokens:
                self._complete(request, "stop")
                return
            self._append(request, token, True, None, ())
            if request.done:
                return
        if request.grammar.complete:
            self._complete(request, "stop")
        elif self._too_long(request):
            self._complete(request, "length")

    def _too_long(self, request: Request) -> bool:
        """Whether a request has all the tokens that its limit or the window allows."""
        return len(request.output) >= request.params.max_tokens or len(request.tokens) >= self.max_len

    def _append(
        self,
        request: Request,
        token: int,
        forced: bool,
        logprob: float | None,
        top: tuple[tuple[str, float], ...],
    ) -> None:
        """Append an output token; end the request where a stop string is complete."""
        request.tokens.append(token)
        request.output.append(TokenInfo(token, len(request.text), forced, logprob, top))
        self._usage.tokens_out += 1
        self._usage.tokens_forced += forced
        if self._checkpoint.tokenizer is not None:
            request.text += request.decoder.decode(self._checkpoint.tokenizer.token_bytes(token))
            for stop in request.params.stop:
                at = request.text.find(stop)
                if at >= 0:
                    request.text = request.text[:at]
                    request.decoder.reset()
                    self._complete(request, "stop")
                    return

    def _complete(self, request: Request, finish: str) -> None:
        request.text += request.decoder.decode(b"", final=True)
        self._retire(request)
        completion = Completion(
            request.text, tuple(request.output), finish, request.prompt_len, request.cached_tokens
        )
        if request.future.set_running_or_notify_cancel():
            request.future.set_result(completion)

    def _fail(self, request: Request, error: EngineError) -> None:
        self._retire(request)
        if request.future.set_running_or_notify_cancel():
            request.future.set_exception(error)

    def _retire(self, request: Request) -> None:
        if request.status is not Status.FINISHED:
            self._scheduler.finish(request)

    def _fail_all(self, error: EngineError) -> None:
        with self._wake:
            for request in self._inbox:
                self._scheduler.add(request)
            self._inbox = []
        for request in [*self._scheduler.running, *self._scheduler.waiting]:
            self._fail(request, error)
