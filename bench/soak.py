"""Many short requests from many threads, some aborted, in a pool too small for them: nothing leaks, nothing drifts.

Checked: every future is resolved (an answer of the length asked for, or cancelled); equal requests get equal answers
all the way; the block pool's invariants whenever the engine falls idle; the counters add up; memory of the card and
of the process is the same at the end as after a fifth of the way. Exit code 1 where anything fails.

usage: python bench/soak.py 135m|1.5b|8b|MODEL_PATH [--requests 100000] [--out JSON]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import result
from bench.invariance import Answer, Asked, token_bytes
from bench.random_model import SHAPES, open_model
from ragate_engine import Completion, Engine, EngineConfig, SamplingParams
from ragate_engine.config import ModelConfig

THREADS = 4
ROUNDS = 20
"""The submitting threads meet this often, with the engine idle: its invariants are checked there."""
IN_FLIGHT = 96
"""Requests that each thread keeps in the air."""
ABORTED = 0.05
MAX_PROMPT, MAX_TOKENS = 48, 24
MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help=f"one of {', '.join(SHAPES)} (random weights), or a path")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    args = parser.parse_args(arguments)
    checkpoint = open_model(args.model, args.device)
    # a pool for an eighth of what max_batch requests can grow to
    slots = args.max_batch * (MAX_PROMPT + MAX_TOKENS) // 8
    config = EngineConfig(
        device="cuda" if args.device == "cuda" else "cpu",
        max_len=2 * (MAX_PROMPT + MAX_TOKENS),
        max_batch=args.max_batch,
        max_step_tokens=1024,
        kv_bytes=slots * token_bytes(checkpoint.config, args.device, "auto"),
    )
    with Engine(checkpoint, config) as engine:
        warm_up(engine, args.max_batch)
        soak = Soak(engine, kinds(checkpoint.config), args.requests, args.device)
        soak.run()
    problems = soak.problems()
    found = result.header(args.device) | {"model": args.model} | soak.describe() | {"problems": problems}
    for name in ("requests", "answered", "aborted", "preemptions", "checks", "seconds", "memory"):
        print(f"{name:12} {found[name]}")
    print("\n".join(problems) or "no leak, no drift, every future resolved, equal requests equal answers")
    result.save(found, args.out)
    return int(bool(problems))


def kinds(config: ModelConfig, count: int = 512) -> list[Asked]:
    """Short requests, to be asked again and again; half of them behind a shared head."""
    rng = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(100, config.vocab_size - 100) for _ in range(n)]

    head = tokens(24)
    return [
        (
            (head if i % 2 else []) + tokens(rng.randint(1, MAX_PROMPT - len(head))),
            SamplingParams(
                max_tokens=rng.randint(1, MAX_TOKENS),
                temperature=0.0 if i % 4 else 0.8,
                seed=i,
                logprobs=i % 3,
                ignore_eos=True,
            ),
        )
        for i in range(count)
    ]


def warm_up(engine: Engine, max_batch: int) -> None:
    """Every batch size that a graph is captured for, so that what is captured later is no leak."""
    size = 1
    while size <= max_batch:
        params = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=2)
        futures = [engine.submit([100 + i % 100, 101, 102], params) for i in range(size)]
        for future in futures:
            future.result()
        size *= 2


@dataclass
class Soak:
    """The submitting threads, what they saw, and the memory measured on the way."""

    engine: Engine
    asked: list[Asked]
    requests: int
    device: str
    submitted: int = 0
    answered: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    answered_tokens: int = 0
    checks: int = 0
    failures: list[str] = field(default_factory=list)
    first_answers: dict[int, Answer] = field(default_factory=dict)
    memory: list[dict[str, float]] = field(default_factory=list)

    def run(self) -> None:
        """All rounds; returns when every future is resolved."""
        self._lock = threading.Lock()
        self.before = self.engine.usage()
        started = time.perf_counter()
        share = self.requests // (ROUNDS * THREADS)
        for number in range(ROUNDS):
            threads = [
                threading.Thread(target=self._submit, args=(number * THREADS + i, share))
                for i in range(THREADS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self._check_idle(number)
        self.seconds = time.perf_counter() - started
        self.after = self.engine.usage()

    def _submit(self, seed: int, count: int) -> None:
        """One thread's share of a round: some futures in the air, each awaited or cancelled in the end."""
        rng = random.Random(seed)
        flying: list[tuple[int, Future[Completion]]] = []
        sent = 0
        while sent < count or flying:
            if sent < count and len(flying) < IN_FLIGHT:
                kind = rng.randrange(len(self.asked))
                flying.append((kind, self.engine.submit(*self.asked[kind])))
                sent += 1
                with self._lock:
                    self.submitted += 1
                    self.prompt_tokens += len(self.asked[kind][0])
                if rng.random() < ABORTED:
                    rng.choice(flying)[1].cancel()
                continue
            self._settle(*flying.pop(0))

    def _settle(self, kind: int, future: Future[Completion]) -> None:
        try:
            completion = future.result(timeout=120)
        except CancelledError:
            with self._lock:
                self.aborted += 1
            return
        except Exception as error:
            with self._lock:
                self.failures.append(f"a request failed: {type(error).__name__}: {error}"[:300])
            return
        answer = (completion.tokens, completion.finish)
        with self._lock:
            self.answered += 1
            self.answered_tokens += len(completion.tokens)
            if len(completion.tokens) != self.asked[kind][1].max_tokens:
                self.failures.append(f"request {kind} was answered with {len(completion.tokens)} tokens")
            if self.first_answers.setdefault(kind, answer) != answer:
                self.failures.append(f"request {kind} was answered in two ways")

    def _check_idle(self, number: int) -> None:
        """All futures are resolved; the engine may still be dropping the last cancelled ones."""
        for _ in range(100):
            try:
                self.engine.check()
                self.checks += 1
                break
            except (AssertionError, RuntimeError) as error:
                problem = error
                time.sleep(0.01)
        else:
            self.failures.append(f"engine.check() failed after round {number}: {problem}")
        self.memory.append({"requests": self.submitted, **memory(self.device)})

    def problems(self) -> list[str]:
        """What went wrong, in sentences; empty where nothing did."""
        found = self.failures[:20]
        if self.answered + self.aborted != self.submitted and not self.failures:
            found.append(f"{self.submitted} requests, {self.answered} answered, {self.aborted} aborted")
        used = {name: getattr(self.after, name) - getattr(self.before, name) for name in COUNTERS}
        if used["requests"] != self.submitted:
            found.append(f"the engine counted {used['requests']} requests of {self.submitted}")
        if used["prompt_tokens"] != self.prompt_tokens:
            found.append(f"the engine counted {used['prompt_tokens']} prompt tokens of {self.prompt_tokens}")
        most = self.answered_tokens + self.aborted * MAX_TOKENS
        if not self.answered_tokens <= used["tokens_out"] <= most:
            found.append(
                f"the engine counted {used['tokens_out']} tokens of {self.answered_tokens} to {most}"
            )
        if not self.aborted:
            found.append("nothing was aborted")
        if not used["preemptions"]:
            found.append("nothing was preempted")
        found += [f"{name} drifted by {drift:+.0f} MiB" for name, drift in self.drift().items() if drift > 64]
        return found

    def drift(self) -> dict[str, float]:
        """MiB of growth from a fifth of the way to the end, medians of four rounds each."""
        early, late = self.memory[ROUNDS // 5 : ROUNDS // 5 + 4], self.memory[-4:]
        return {
            name: statistics.median(row[name] for row in late) - statistics.median(row[name] for row in early)
            for name in self.memory[0]
            if name != "requests"
        }

    def describe(self) -> dict[str, Any]:
        """The fields of the result."""
        return {
            "requests": self.submitted,
            "answered": self.answered,
            "aborted": self.aborted,
            "preemptions": self.after.preemptions - self.before.preemptions,
            "tokens_out": self.after.tokens_out - self.before.tokens_out,
            "checks": self.checks,
            "seconds": round(self.seconds, 2),
            "memory": {name: round(value, 1) for name, value in self.drift().items()},
            "memory_MiB": [{name: round(value, 1) for name, value in row.items()} for row in self.memory],
        }


COUNTERS = ("requests", "prompt_tokens", "tokens_out", "preemptions")


def memory(device: str) -> dict[str, float]:
    """MiB: resident in the process; reserved by torch on the card; in use on the card by anyone."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"process": pages * os.sysconf("SC_PAGE_SIZE") / MIB}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"torch_reserved": torch.cuda.memory_reserved() / MIB, "card_used": (total - free) / MIB}
    return found


if __name__ == "__main__":
    sys.exit(main())
