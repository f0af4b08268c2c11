"""`Scheduler`: which tokens of which requests the next step computes. It never imports torch.

One rule: computed catches up with wanted. A fresh prompt, the rest of a chunked one, tokens that a grammar forced
and a sampled token are all just tokens that are wanted and not computed.
"""

from __future__ import annotations

from collections import deque

from ragate_engine.blocks import BlockPool, extend_hashes
from ragate_engine.config import BLOCK_SIZE, MAX_LEN
from ragate_engine.request import Request, Row, Status, StepPlan, Usage


class Scheduler:
    """Admits, budgets, chunks and preempts. `plan` chooses the rows of a step, `launched` records that they run."""

    def __init__(
        self, pool: BlockPool, max_batch: int, max_step_tokens: int, usage: Usage, max_len: int = MAX_LEN
    ) -> None:
        self.max_len = max_len
        self.pool = pool
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.usage = usage
        self._slots = list(range(max_batch))[::-1]
        # of the running requests: blocks in their tables, tokens computed, slots a contiguous allocator would reserve
        self._listed = self._computed = self._reserved = 0
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
            if budget == 0:
                break
            wanted = len(request.tokens) + request.pending
            count = min(wanted - request.computed, budget)
            if (
                count <= 0
                or request.status is not Status.RUNNING
                or (request.pending and self._ending(request))
            ):
                continue  # nothing to do, preempted by an earlier row of this plan, or its last token is on its way
            reach = request.computed + count
            if reach > len(request.blocks) * BLOCK_SIZE and not self._reserve(request, reach):
                continue
            rows.append(Row(request, request.computed, count, reach == wanted, request.epoch))
            budget -= count
        # newcomers come after those that run, and never preempt them
        pending = {h for r in self.running for h in self._uncomputed(r)} if self.waiting else set()
        for request in list(self.waiting):
            if budget == 0 or len(self.running) == self.max_batch:
                break
            extend_hashes(request.hashes, request.tokens, request.root)
            if self._first_missing(request) in pending:
                continue  # a running request is about to compute this block: in a moment it is in the cache
            if not self._admit(request):
                break
            count = min(request.missing, budget)
            reach = request.computed + count
            self._reserve(request, reach)
            rows.append(Row(request, request.computed, count, reach == len(request.tokens), request.epoch))
            budget -= count
            pending.update(self._uncomputed(request))
        return StepPlan(tuple(rows))

    def launched(self, plan: StepPlan) -> None:
        """The step was queued on the device: advance its requests and publish the blocks that it fills.

        Later steps run after it, so that they may read what it writes.
        """
        for row in plan.rows:
            request = row.request
            request.computed += row.count
            request.pending += row.wants_logits
            self._computed += row.count
            if request.computed // BLOCK_SIZE > request.committed:
                self.publish(request)
        self._count_slots()

    def publish(self, request: Request) -> None:
        """Offer the blocks of a running request that are full, and whose tokens are known, to the prefix cache."""
        full = min(request.computed, len(request.tokens)) // BLOCK_SIZE
        if request.committed >= full or request.status is not Status.RUNNING:
            return
        extend_hashes(request.hashes, request.tokens, request.root)
        for i in range(request.committed, full):
            self.pool.commit(request.blocks[i], request.hashes[i])
        request.committed = full

    def finish(self, request: Request) -> None:
        """Take a request out, whatever its state, and give its blocks back."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._slots.append(request.slot)
            self._joins(request, -1)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        self._release(request)
        request.slot, request.pending = -1, 0
        request.status = Status.FINISHED

    def check(self) -> None:
        """Assert that every block is held by exactly the requests that list it."""
        self.pool.check([request.blocks for request in self.running])

    def _ending(self, request: Request) -> bool:
        """Whether the token that is being sampled is the last one allowed, so that nothing comes after it."""
        return len(request.output) + 1 >= request.params.max_tokens or len(request.tokens) + 1 >= self.max_len

    def _count_slots(self) -> None:
        """Add this step to the counters of KV slots."""
        usage = self.usage
        # blocks that are shared are full: what is unused is in the last blocks, which are private
        usage.kv_slots_held += (self.pool.num_blocks - self.pool.free_blocks) * BLOCK_SIZE
        usage.kv_slots_unused += self._listed * BLOCK_SIZE - self._computed
        usage.kv_slots_contiguous += self._reserved
        usage.kv_slots_contiguous_unused += self._reserved - self._computed

    def _joins(self, request: Request, sign: int) -> None:
        """Count a request in (1) when it starts to run, or out (-1) when it stops."""
        self._listed += sign * len(request.blocks)
        self._computed += sign * request.computed
        self._reserved += sign * min(request.prompt_len + request.params.max_tokens, self.max_len)

    def _uncomputed(self, request: Request) -> list[bytes]:
        """Hashes of the full blocks that a running request has yet to compute."""
        if not self.pool.prefix_cache or request.missing < 2:
            return []
        extend_hashes(request.hashes, request.tokens, request.root)
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
        request.committed = len(found)
        request.slot = self._slots.pop()
        self._joins(request, 1)
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
                self._listed += need
                return True
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue: it keeps its tokens and computes them again, to the same bits."""
        self.running.remove(request)
        self._slots.append(request.slot)
        self._joins(request, -1)
        request.slot, request.pending, request.epoch = -1, 0, request.epoch + 1
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
