"""The scheduler on its own: no model, no torch; every request ends, within every budget, and no block is lost."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future

from hypothesis import given, settings
from hypothesis import strategies as st

from ragate_engine.blocks import BlockPool
from ragate_engine.request import Request, SamplingParams, Status, Usage
from ragate_engine.scheduler import Scheduler


def request(number: int, tokens: list[int], wanted: int = 1) -> Request:
    return Request(number, list(tokens), len(tokens), SamplingParams(max_tokens=wanted), Future())


def run_to_end(scheduler: Scheduler, limit: int = 10_000) -> list[list[tuple[int, int, int]]]:
    """Play the engine: launch each plan, append a token where logits are wanted, finish at max_tokens."""
    history = []
    while scheduler.running or scheduler.waiting:
        plan = scheduler.plan()
        assert plan.rows, "nothing can run although requests are waiting"
        assert plan.tokens <= scheduler.max_step_tokens
        assert len(scheduler.running) <= scheduler.max_batch
        history.append([(row.request.id, row.start, row.count) for row in plan.rows])
        scheduler.launched(plan)
        scheduler.check()
        for row in plan.rows:
            if row.wants_logits and row.current:
                row.request.pending -= 1
                row.request.tokens.append(row.request.id)
                if len(row.request.tokens) - row.request.prompt_len >= row.request.params.max_tokens:
                    scheduler.finish(row.request)
        assert len(history) < limit
    return history


def make(blocks: int = 64, batch: int = 8, budget: int = 64, cache: bool = True) -> Scheduler:
    return Scheduler(BlockPool(blocks, cache), batch, budget, Usage())


def test_a_long_prompt_is_computed_in_chunks_beside_running_requests() -> None:
    scheduler = make(budget=32)
    scheduler.add(request(0, [1] * 5, wanted=3))
    scheduler.add(request(1, [2] * 70))
    assert run_to_end(scheduler) == [
        [(0, 0, 5), (1, 0, 27)],
        [(0, 5, 1), (1, 27, 31)],
        [(0, 6, 1), (1, 58, 12)],
    ]


def test_a_request_waits_for_the_prefix_that_another_is_computing() -> None:
    scheduler = make(budget=64)
    head = list(range(32))
    scheduler.add(request(0, [*head, 1, 2, 3]))
    scheduler.add(request(1, [*head, 4, 5, 6]))
    assert run_to_end(scheduler) == [[(0, 0, 35)], [(1, 32, 3)]]
    assert scheduler.usage.prompt_tokens_cached == 32


def test_others_do_not_wait_behind_one_that_waits_for_a_prefix() -> None:
    scheduler = make(budget=64)
    head = list(range(32))
    scheduler.add(request(0, [*head, 1, 2, 3]))
    scheduler.add(request(1, [*head, 4, 5, 6]))
    scheduler.add(request(2, [9] * 7))
    assert run_to_end(scheduler)[0] == [(0, 0, 35), (2, 0, 7)]


def test_the_last_token_is_computed_even_when_the_whole_prompt_is_cached() -> None:
    scheduler = make()
    scheduler.add(request(0, list(range(32))))
    run_to_end(scheduler)
    scheduler.add(request(1, list(range(32))))
    assert run_to_end(scheduler) == [[(1, 16, 16)]]


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens() -> None:
    scheduler = make(blocks=4, cache=False)
    old, young = request(0, [1] * 16, wanted=30), request(1, [2] * 16, wanted=20)
    scheduler.add(old)
    scheduler.add(young)
    run_to_end(scheduler)
    assert scheduler.usage.preemptions >= 1
    assert scheduler.usage.rows_recomputed >= 16
    assert young.tokens == [2] * 16 + [1] * 20
    assert scheduler.pool.free_blocks == 4


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=12),
    st.integers(9, 30),
    st.integers(1, 6),
    st.integers(16, 80),
    st.booleans(),
)
def test_every_request_ends_and_every_block_comes_back(
    asked: list[tuple[int, int, int]], blocks: int, batch: int, budget: int, cache: bool
) -> None:
    scheduler = make(blocks, batch, budget, cache)
    requests = [request(i, [family] * length, wanted) for i, (family, length, wanted) in enumerate(asked)]
    for r in requests:
        scheduler.add(r)
    history = run_to_end(scheduler)
    assert all(r.status is Status.FINISHED for r in requests)
    assert scheduler.pool.free_blocks == blocks
    if scheduler.usage.preemptions == 0:  # then each token was computed once, in order
        for r in requests:
            rows = [(start, count) for step in history for i, start, count in step if i == r.id]
            assert all(a + n == b for (a, n), (b, _) in zip(rows, rows[1:], strict=False))
            assert rows[-1][0] + rows[-1][1] == len(r.tokens) - 1


def test_scheduler_and_front_door_do_not_import_torch() -> None:
    code = "import sys, ragate_engine, ragate_engine.scheduler; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
