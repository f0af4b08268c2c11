"""`Scheduler`: which tokens of which requests the next step computes. It never imports torch.

One rule: computed catches up with wanted. A fresh prompt, the rest of a chunked one, tokens that a grammar forced
and a sampled token are all just tokens that are wanted and not computed.
"""

from __future__ import annotations

from collections import deque

from ragate_engine.blocks import BlockPool, extend_hashes
from ragate_engine.config import BLOCK_SIZE
from ragate_engine.request import Request, Row, Status, StepPlan, Usage


class Scheduler:
    """Admits, budgets, chunks and preempts. `plan` chooses the rows of a step, `settle` records that they ran."""

    def __init__(self, pool: BlockPool, max_batch: int, max_step_tokens: int, usage: Usage) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.usage = usage
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request behind those that wait."""
        self.waiting.append(request)

    def plan(self) -> StepPlan:
        """Rows for the next step, within the token budget; empty when nothing can run."""
        rows: list[Row] = []
        budget = self.max_step_tokens
        for request in list(self.running):
            if request.status is not Status.RUNNING:
                continue  # preempted by an earlier row of this plan
            count = min(request.missing, budget)
            if count and self._reserve(request, request.computed + count):
                rows.append(Row(request, request.computed, count))
                budget -= count
        # newcomers come after those that run, and never preempt them
        pending = {h for r in self.running for h in self._uncomputed(r)} if self.waiting else set()
        for request in list(self.waiting):
            if budget == 0 or len(self.running) == self.max_batch:
                break
            extend_hashes(request.hashes, request.tokens)
            if self._first_missing(request) in pending:
                continue  # a running request is about to compute this block: in a moment it is in the cache
            if not self._admit(request):
                break
            count = min(request.missing, budget)
            self._reserve(request, request.computed + count)
            rows.append(Row(request, request.computed, count))
            budget -= count
            pending.update(self._uncomputed(request))
        return StepPlan(tuple(rows))

    def settle(self, plan: StepPlan) -> None:
        """The step has run: advance its requests and publish the blocks that it filled."""
        for row in plan.rows:
            request = row.request
            if request.status is not Status.RUNNING:
                continue
            request.computed = row.start + row.count
            extend_hashes(request.hashes, request.tokens)
            for i in range(row.start // BLOCK_SIZE, request.computed // BLOCK_SIZE):
                self.pool.commit(request.blocks[i], request.hashes[i])

    def finish(self, request: Request) -> None:
        """Take a request out, whatever its state, and give its blocks back."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        self._release(request)
        request.status = Status.FINISHED

    def check(self) -> None:
        """Assert that every block is held by exactly the requests that list it."""
        self.pool.check([request.blocks for request in self.running])

    def _uncomputed(self, request: Request) -> list[bytes]:
        """Hashes of the full blocks that a running request has yet to compute."""
        if not self.pool.prefix_cache or request.missing < 2:
            return []
        extend_hashes(request.hashes, request.tokens)
        return request.hashes[request.computed // BLOCK_SIZE :]

    def _first_missing(self, request: Request) -> bytes | None:
        """Hash of the first full block of a waiting request that is not in the cache."""
        usable = (len(request.tokens) - 1) // BLOCK_SIZE
        return next((h for h in request.hashes[:usable] if not self.pool.cached(h)), None)

    def _admit(self, request: Request) -> bool:
        """Start a waiting request from what the prefix cache has; False where its prompt would not fit now."""
        # the last token is always computed: its logits are wanted
        usable = (len(request.tokens) - 1) // BLOCK_SIZE
        found = self.pool.match(request.hashes[:usable])
        if -(-len(request.tokens) // BLOCK_SIZE) - len(found) > self.pool.free_blocks:
            self.pool.release(found)
            return False
        request.blocks = found
        request.computed = len(found) * BLOCK_SIZE
        if request.preempted:
            self.usage.rows_recomputed += request.rows_lost - request.computed
        else:
            request.cached_tokens = min(request.computed, request.prompt_len)
            self.usage.prompt_tokens_cached += request.cached_tokens
        request.status = Status.RUNNING
        self.waiting.remove(request)
        self.running.append(request)
        return True

    def _reserve(self, request: Request, tokens: int) -> bool:
        """Give `request` blocks for its first `tokens`, preempting from the youngest; False if it fell itself."""
        need = -(-tokens // BLOCK_SIZE) - len(request.blocks)
        while need > 0:
            fresh = self.pool.allocate(need)
            if fresh is not None:
                request.blocks.extend(fresh)
                return True
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue: it keeps its tokens and computes them again, to the same bits."""
        self.running.remove(request)
        request.rows_lost = max(request.computed, request.rows_lost)
        request.preempted = True
        self._release(request)
        request.computed = 0
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        self.usage.preemptions += 1

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
