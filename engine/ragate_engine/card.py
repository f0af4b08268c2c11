"""`CardSteps`: steps on an NVIDIA card. One plan buffer in, one CUDA graph a step, one small copy out.

A step's inputs travel as one int32 buffer: a header, fields per row at places fixed by the bucket (the padded number
of rows), then attention items and block tables packed behind them. What a bucket launches is fixed, so that it is
captured as a graph the second time it is met; how many rows are real is read by the kernels from the header.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ragate_engine.config import BLOCK_SIZE, EngineConfig
from ragate_engine.devices import ALONE
from ragate_engine.kernels import StepInputs
from ragate_engine.kernels.triton import device
from ragate_engine.kernels.triton.attention import Work
from ragate_engine.kernels.triton.pick import (
    ROW_WORDS,
    PickWorkspace,
    choose,
    decode,
    out_width,
    pack_row,
    padded_count,
    sample,
)
from ragate_engine.kernels.triton.plan import (
    CHUNK,
    HEADER,
    ITEM,
    READERS,
    ROWS,
    WANTED,
    order,
    pack,
    plan_attention,
)
from ragate_engine.kv import KVCache
from ragate_engine.model import Decoder
from ragate_engine.request import MAX_LOGPROBS, Row, StepPlan
from ragate_engine.steps import Chosen, Flight, Ints, adapters_of, step_rows

FIELDS = 5
"""ids, positions, slots, row_table, part_of; and adapter, where any row has one."""
BUCKETS = (8, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
ONLY_SMALL = 1024
"""Rows up to which it pays not to launch attention kernels that have nothing to do."""
MAX_PARTS = 16384
"""Partial results of attention that there is room for; what needs more is not split."""


def buckets_of(max_step_tokens: int) -> list[int]:
    """The padded row counts of steps of up to `max_step_tokens` rows."""
    largest = next((b for b in BUCKETS if b >= max_step_tokens), max_step_tokens)
    return [*(b for b in BUCKETS if b < largest), largest]


def most_wanted_of(max_batch: int) -> int:
    """The padded number of rows whose logits a step may want."""
    return -(-max_batch // 16) * 16


@dataclass(eq=False)
class CardFlight(Flight):
    """A step on the card, and where its choice will be."""

    ready: torch.cuda.Event
    out: npt.NDArray[np.int32]
    chosen: bool
    """Whether the choice is queued already."""


class Pinned:
    """Page-locked memory that the host writes and the card copies from: two of each, used in turn."""

    def __init__(self, *shape: int) -> None:
        self._tensors = [torch.empty(shape, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._arrays: list[npt.NDArray[np.int32]] = [tensor.numpy() for tensor in self._tensors]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def next(self) -> npt.NDArray[np.int32]:
        """The buffer to fill; waits until the card has taken what was in it."""
        self._turn ^= 1
        self._copied[self._turn].synchronize()
        return self._arrays[self._turn]

    def send(self, to: torch.Tensor, lines: int) -> None:
        """Queue the copy of the first `lines` of the buffer that `next` gave."""
        to[:lines].copy_(self._tensors[self._turn][:lines], non_blocking=True)
        self._copied[self._turn].record()


class Shape(NamedTuple):
    """What decides the launches of a forward pass: the key of its graph."""

    bucket: int
    only_small: bool
    """Attention has small items only, and no partial results to merge."""
    top: int
    """Alternatives of the choice that is made in the same graph; -1 where the choice comes later."""
    adapted: bool
    """Some rows have an adapter."""


class CardSteps:
    """Forward passes and choices, queued on one stream."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        max_batch: int,
        max_step_tokens: int,
        max_len: int,
        config: EngineConfig,
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        model = decoder.config
        card = torch.device("cuda")
        self.buckets = buckets_of(max_step_tokens)
        self.most_wanted = most_wanted_of(max_batch)
        self.shape = decoder.layers[0].shape
        self.use_graphs = config.cuda_graphs
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[object, ...], torch.cuda.CUDAGraph | None] = {}

        self.table_width = -(-max_len // BLOCK_SIZE)
        self._tables = np.zeros((max_batch, self.table_width), np.int32)
        self._filled = [0] * max_batch
        self._owners: list[tuple[int, int]] = [(-1, -1)] * max_batch
        largest = self.buckets[-1]
        words = HEADER + (FIELDS + bool(decoder.adapters)) * largest + self.most_wanted * (1 + ROW_WORDS)
        # an item writes the result of a row or more, or a partial or more
        words += ITEM * (largest + MAX_PARTS) + max_batch * self.table_width + 3
        self._plan = torch.empty(words, dtype=torch.int32, device=card)
        self._plan_host = Pinned(words)
        self._partials = torch.empty(
            MAX_PARTS * self.shape.heads * (self.shape.head_dim + 2), dtype=torch.float32, device=card
        )

        vocab = model.vocab_size
        self._logits = torch.empty(self.most_wanted, vocab, dtype=torch.float32, device=card)
        self.sampled = torch.zeros(max_batch, dtype=torch.int32, device=card)
        self._pick = PickWorkspace(self.most_wanted, vocab, card)
        self._asked = torch.zeros(self.most_wanted, ROW_WORDS, dtype=torch.int32, device=card)
        self._asked_host = Pinned(self.most_wanted, ROW_WORDS)
        self._mask_words = -(-vocab // 32)
        self._masks = torch.empty(self.most_wanted, self._mask_words, dtype=torch.int32, device=card)
        self._masks_host: Pinned | None = None
        self._out = torch.empty(self.most_wanted * out_width(MAX_LOGPROBS), dtype=torch.int32, device=card)
        self._lines = np.arange(max(max_batch, 1), dtype=np.int32)
        self._out_host = [torch.empty(self._out.shape, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._turn = 0
        self.stream.wait_stream(torch.cuda.current_stream())  # where all this, and the weights, were made

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What a thread that runs steps must be in; it leaves when the last step is over."""
        with torch.cuda.stream(self.stream):
            try:
                yield
            finally:
                with suppress(RuntimeError):  # of a card that is lost, its user hears elsewhere
                    self.stream.synchronize()

    # ---- forward ----

    def launch(self, plan: StepPlan) -> CardFlight:
        """Queue the forward pass of a step; and the choice of its tokens, where no grammar or noise has a say."""
        rows: Sequence[Row] = plan.rows
        starts, counts, tables, ids = self._gather(rows)
        singles = len(ids) == len(rows)
        if not singles or (len(rows) >= READERS and int(starts.max()) >= CHUNK - 1):
            turn = order(starts, counts, tables)
            starts, counts, tables = starts[turn], counts[turn], tables[turn]
            rows = [rows[i] for i in turn.tolist()]
            if singles:
                ids = [ids[i] for i in turn.tolist()]
        tokens: Sequence[int] | npt.NDArray[np.int64] = ids
        if singles:
            position, owner = starts, self._lines[: len(rows)]
            first = last = owner
        else:
            tokens, position, owner, last = step_rows(rows, starts, counts)
            first = last + 1 - counts
        attention = plan_attention(first, starts, counts, tables, self.shape, device.programs(), MAX_PARTS)
        wanting, slots, count, plain = [], [], 0, True
        for i, row in enumerate(rows):
            if row.wants_logits:
                request = row.request
                params = request.params
                wanting.append(i)
                slots.append(request.slot)
                if params.logprobs > count:
                    count = params.logprobs
                if params.temperature > 0 or request.grammar is not None:
                    plain = False
        M, W = len(tokens), len(wanting)
        bucket = next(b for b in self.buckets if b >= M)
        most = min(bucket, self.most_wanted)

        buffer = self._plan_host.next()
        buffer[:HEADER] = 0
        buffer[ROWS], buffer[WANTED] = M, W
        places = tables[owner, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        at = HEADER
        fields: list[tuple[Sequence[int] | npt.NDArray[np.integer], int]]
        fields = [(tokens, 0), (position, 0), (places, -1), (owner, 0), (attention.part_of, -1)]
        adapters = adapters_of(rows, owner) if self.decoder.adapters else None
        if adapters is not None:
            fields.append((adapters, -1))
        for field, padding in fields:
            buffer[at : at + M] = field
            if bucket > M:
                buffer[at + M : at + bucket] = padding
            at += bucket
        buffer[at : at + W] = last if len(rows) == W else last[wanting]
        buffer[at + W : at + most] = 0
        at += most
        asked = buffer[at : at + most * ROW_WORDS].reshape(most, ROW_WORDS)
        asked[:W] = 0
        asked[:W, 0] = -1
        asked[:W, 1] = slots
        used = pack(buffer, at + most * ROW_WORDS, attention, tables)

        self._plan_host.send(self._plan, used)
        top = padded_count(count) if plain and W else -1
        # two kinds of attention are enough: each kind of step is captured once, which takes a tenth of a second
        only_small = len(attention.big) == 0 and attention.parts == 0 and bucket <= ONLY_SMALL
        key = Shape(bucket, only_small, top, adapters is not None)
        with self._graph(key) as fresh:
            if fresh:
                self._forward(key)
        flight = CardFlight(
            list(rows) if len(rows) == W else [rows[i] for i in wanting],
            [],
            torch.cuda.Event(),
            np.empty((0, 0), np.int32),
            top >= 0,
        )
        if flight.chosen:
            self._fetch(flight, out_width(top))
        return flight

    def _forward(self, key: Shape) -> None:
        """Launch the kernels of a pass over the plan buffer."""
        bucket = key.bucket
        count = FIELDS + key.adapted
        fields = self._plan[HEADER : HEADER + count * bucket].view(count, bucket)
        most = min(bucket, self.most_wanted)
        at = HEADER + count * bucket
        wanted = self._plan[at : at + most]
        asked = self._plan[at + most : at + most * (1 + ROW_WORDS)].view(most, ROW_WORDS)
        step = StepInputs(
            positions=fields[1],
            slots=fields[2],
            row_table=fields[3],
            tables=self._plan,
            work=Work(self._plan, fields[4], self._partials, True, not key.only_small, not key.only_small),
            wanted=wanted,
            rows=self._plan[ROWS : ROWS + 1],
            wanted_rows=self._plan[WANTED : WANTED + 1],
            sampled=self.sampled,
            adapters=fields[FIELDS] if key.adapted else None,
        )
        self.decoder.forward(fields[0], step, self.kv, out=self._logits[:most])
        if key.top >= 0:
            self._choose(asked, None, key.top, sampling=False)

    @contextmanager
    def _graph(self, key: tuple[object, ...]) -> Iterator[bool]:
        """Replay the graph of `key`; or yields True where its launches must be made: the first time they run as
        they are (and are compiled), the second time they are captured."""
        graph = self._graphs.get(key)
        if graph is not None:
            yield False
            graph.replay()
        elif not self.use_graphs or key not in self._graphs:
            self._graphs[key] = None
            yield True
        else:
            graph = torch.cuda.CUDAGraph()
            # not torch.cuda.graph, which waits for the whole card first: another engine may be capturing
            with ALONE:
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    yield True
                except BaseException:
                    with suppress(RuntimeError):  # the first error is the one to report
                        graph.capture_end()
                    raise
                graph.capture_end()
            self._graphs[key] = graph
            graph.replay()

    def _gather(self, rows: Sequence[Row]) -> tuple[Ints, Ints, Ints, list[int]]:
        """Starts, counts [R] and block tables [R, B] of `rows`; and the ids of those that are single tokens.

        Tables are kept per place among the running requests and extended as they grow.
        """
        starts, counts, places, ids, widest = [], [], [], [], 1
        for row in rows:
            request, start, count = row.request, row.start, row.count
            place, blocks = request.slot, request.blocks
            listed = len(blocks)
            owner = (request.id, request.epoch)
            if self._owners[place] != owner:
                self._owners[place] = owner
                self._filled[place] = 0
            filled = self._filled[place]
            if filled < listed:
                self._tables[place, filled:listed] = blocks[filled:]
                self._filled[place] = listed
            if listed > widest:
                widest = listed
            starts.append(start)
            counts.append(count)
            places.append(place)
            if count == 1:
                tokens = request.tokens
                ids.append(tokens[start] if start < len(tokens) else -1 - place)
        return np.array(starts, np.int32), np.array(counts, np.int32), self._tables[places, :widest], ids

    # ---- choice ----

    def masks(self, count: int) -> Ints:
        """In page-locked memory, from where they are copied to the card."""
        if self._masks_host is None:
            if not count:
                return np.empty((0, self._mask_words), np.int32)
            self._masks_host = Pinned(self.most_wanted, self._mask_words)
        return self._masks_host.next()[:count]

    def choose(self, flight: Flight, mask_of: Sequence[int], masks: Ints) -> None:
        """Queue the choice of a token for each row, where `launch` has not, and the copy of the results to the host."""
        assert isinstance(flight, CardFlight)
        W = len(flight.rows)
        if W == 0 or flight.chosen:
            return
        asked = self._asked_host.next()
        asked[:W] = 0
        sampling, count, slots = False, 0, []
        for i, row in enumerate(flight.rows):
            params = row.request.params
            slots.append(row.request.slot if flight.valid[i] else -1)
            if params.logprobs > count:
                count = params.logprobs
            if params.temperature > 0 and flight.valid[i]:
                sampling = True
                pack_row(asked, i, params, row.start + row.count)
        asked[:W, 0] = mask_of
        asked[:W, 1] = slots
        top = padded_count(count)
        most = next((b for b in self.buckets if W <= b < self.most_wanted), self.most_wanted)
        self._asked_host.send(self._asked, W)
        masked = len(masks) > 0
        if masked and self._masks_host is not None:
            self._masks_host.send(self._masks, len(masks))
        with self._graph(("choose", most, masked, top, sampling)) as fresh:
            if fresh:
                self._choose(self._asked[:most], self._masks if masked else None, top, sampling)
        flight.chosen = True
        self._fetch(flight, out_width(top))

    def _choose(self, asked: torch.Tensor, mask: torch.Tensor | None, top: int, sampling: bool) -> None:
        """Launch the kernels of a choice; the plan buffer knows how many rows are real."""
        most, width = asked.shape[0], out_width(top)
        out = self._out[: most * width].view(most, width)
        count = self._plan[WANTED : WANTED + 1]
        arguments = (self._pick, self._logits[:most], asked, mask, out, self.sampled, count)
        choose(*arguments)
        if sampling:
            sample(*arguments)

    def _fetch(self, flight: CardFlight, width: int) -> None:
        """Queue the copy of a choice's results, lines of `width` words, to the host."""
        size = len(flight.rows) * width
        self._turn ^= 1
        host = self._out_host[self._turn][:size]
        host.copy_(self._out[:size], non_blocking=True)
        flight.ready.record()
        flight.out = host.numpy().reshape(-1, width)

    def read(self, flight: Flight) -> Chosen:
        """Wait for what was chosen."""
        assert isinstance(flight, CardFlight)
        if not flight.rows:
            return Chosen([], [], [], np.empty((0, 0), np.int32), np.empty((0, 0), np.float32))
        flight.ready.synchronize()
        found = decode(flight.out)
        return Chosen(
            found.ids.tolist(), found.logits.tolist(), found.lse.tolist(), found.top_ids, found.top_logits
        )
