"""Which rows read which KV together: the attention items of one step, made on the host in a few numpy calls.

An item is up to 16 lines (small) or 128 lines (big) of queries, a line being one query head of one row, and a range of
KV chunks of 256 positions. Where an item covers all chunks of its rows, it writes their results itself; otherwise it
covers one chunk and writes a partial for each row, and the partials of a row are merged in chunk order. Either way the
result has the same bits, so the plan may follow the batch freely:

- single-token rows whose requests share whole chunks read each shared chunk together;
- other single tokens and short runs are split by chunk where there are too few of them to fill the card;
- long runs (prefill) are cut into pieces of 128 lines that cover all their chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ragate_engine.config import BLOCK_SIZE
from ragate_engine.kernels import HeadShape

Ints = npt.NDArray[np.int32]

CHUNK = 256
CHUNK_BLOCKS = CHUNK // BLOCK_SIZE
SMALL_LINES = 16
BIG_LINES = 128

# the header of the plan buffer; offsets count int32 entries from its start
ROWS, WANTED, SMALL_AT, SMALL, BIG_AT, BIG, TABLES_AT, WIDTH, PARTS = range(9)
HEADER = 16

# the columns of an item: its rows, its chunks, where its blocks are listed, the positions that its rows reach
FIRST_ROW, ROW_COUNT, FIRST_CHUNK, END_CHUNK, TABLE, LEAST, LAST, PART = range(8)
ITEM = 8

MAX_PARTS = 4096
READERS = 4
"""Rows that must share a chunk for it to be read once for all: fewer would gain less than merging costs."""
MIN_SPLIT = 3
"""Chunks from which on reading them side by side gains more than merging costs."""
SHORT = 16
"""Tokens of a run that is still cheap to split by chunk."""
PER_PROGRAM = 3
"""A short run is split where it reads more than this part of the chunks that a multiprocessor has to read."""
ORDER_COLUMNS = 8


@dataclass(frozen=True)
class AttentionPlan:
    """The items of a step, the costliest first, and where the partials of its rows are."""

    small: Ints
    """[n, 8] items of at most 16 lines: (first row, rows, first chunk, end chunk, table, least, last, part).

    `least` is the smallest position of its rows, `last` the last key that any of them sees within the chunks,
    `part` the first row's entry in `part_of`."""
    big: Ints
    """[m, 8] items of at most 128 lines."""
    part_of: Ints
    """[M] index of the row's first partial (one per chunk), or -1 where an item writes the result itself."""
    parts: int
    """Partials in use."""


def order(starts: Ints, counts: Ints, tables: Ints) -> npt.NDArray[np.intp]:
    """The order to plan requests in: single tokens first, sharers of chunks side by side, then longer runs.

    `starts` and `counts` [R] are the position of each request's first token and its tokens, `tables` [R, B].
    """
    full = np.where(counts == 1, (starts + 1) // CHUNK, 0)
    deepest = int(full.max(initial=0))
    if np.count_nonzero(full) < READERS:
        return np.argsort(counts > 1, kind="stable")
    columns = np.arange(deepest)
    if deepest > ORDER_COLUMNS:
        columns = np.unique(np.linspace(0, deepest - 1, ORDER_COLUMNS).round().astype(np.intp))
    ends = np.where(columns < full[:, None], tables[:, columns * CHUNK_BLOCKS + CHUNK_BLOCKS - 1], -1)
    return np.lexsort((*ends.T[::-1], counts > 1))


def plan_attention(
    first_row: Ints,
    starts: Ints,
    counts: Ints,
    tables: Ints,
    shape: HeadShape,
    programs: int,
    max_parts: int = MAX_PARTS,
) -> AttentionPlan:
    """Plan one step of R requests, whose rows follow each other in this order.

    `first_row`, `starts`, `counts` [R]: first row of each request's run, position of its first token, tokens.
    `tables` [R, B]: block tables. `programs`: multiprocessors to keep busy. Rows beyond `max_parts` partials are
    planned without. Raises ValueError where more than 16 query heads share a KV head.
    """
    group = shape.heads // shape.kv_heads
    if group > SMALL_LINES:
        raise ValueError(
            f"{group} query heads share one KV head: the Triton attention takes at most {SMALL_LINES}"
        )
    per_piece = BIG_LINES // group
    positions = starts + counts - 1
    singles, longest = len(counts) == int(counts.sum()), int(positions.max())
    if singles and (longest < CHUNK or (len(counts) < READERS and longest < (MIN_SPLIT - 1) * CHUNK)):
        # single tokens, nothing to share nor to split: an item each
        items = np.zeros((len(counts), ITEM), np.int32)
        items[:, FIRST_ROW], items[:, ROW_COUNT], items[:, END_CHUNK] = first_row, 1, positions // CHUNK + 1
        items[:, TABLE] = np.arange(len(counts))
        items[:, LEAST] = items[:, LAST] = starts
        items[:, PART] = -1
        costly_first = np.argsort(-starts, kind="stable")
        return AttentionPlan(items[costly_first], items[:0], items[:, PART], 0)
    chunks = positions // CHUNK + 1
    pieces = -(-counts // per_piece)
    read = int((pieces * chunks).sum()) * shape.kv_heads / programs
    lonely = int(pieces.sum()) * shape.kv_heads < programs
    split = (chunks >= MIN_SPLIT) & np.where(counts <= SHORT, chunks * PER_PROGRAM > read, lonely)

    single = counts == 1
    shared = _Shared.find(first_row, starts, tables, single, per_piece)
    in_parts = split | shared.readers
    over = in_parts & (np.cumsum(np.where(in_parts, counts * chunks, 0)) > max_parts)
    if over.any():
        shared = _Shared.find(first_row, starts, tables, single & ~over, per_piece)
        in_parts = (split & ~over) | shared.readers
    cost = np.where(in_parts, counts * chunks, 0)
    base = np.where(in_parts, np.cumsum(cost) - cost, -1)

    # pieces: runs of rows of one request that are read together
    if len(counts) == int(counts.sum()):
        owner = np.arange(len(counts))
        piece_first, piece_rows, least, last, part = first_row, counts, starts, positions, base
        part_of = base
    else:
        owner, k = _expand(pieces)
        piece_first = first_row[owner] + k * per_piece
        piece_rows = np.minimum(counts[owner] - k * per_piece, per_piece)
        least = starts[owner] + k * per_piece
        last = least + piece_rows - 1
        part = np.where(in_parts[owner], base[owner] + k * per_piece * chunks[owner], -1)
        row_owner, row = _expand(counts)
        part_of = np.where(in_parts[row_owner], base[row_owner] + row * chunks[row_owner], -1)

    # one item a piece where it writes its result itself, else one a chunk, less the chunks read with others
    whole = np.flatnonzero(part < 0)
    columns = [
        (whole, np.zeros(len(whole), np.int64), last[whole] // CHUNK + 1),
    ]
    cut = np.flatnonzero(part >= 0)
    if len(cut):
        index, chunk = _expand(last[cut] // CHUNK + 1)
        index = cut[index]
        if len(shared.items):
            own = ~shared.covers(owner[index], chunk)
            index, chunk = index[own], chunk[own]
        columns.append((index, chunk, chunk + 1))
    piece, first, end = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    items = np.empty((len(piece) + len(shared.items), ITEM), np.int32)
    own_items = items[: len(piece)]
    own_items[:, FIRST_ROW] = piece_first[piece]
    own_items[:, ROW_COUNT] = piece_rows[piece]
    own_items[:, FIRST_CHUNK] = first
    own_items[:, END_CHUNK] = end
    own_items[:, TABLE] = owner[piece]
    own_items[:, LEAST] = least[piece]
    own_items[:, LAST] = np.minimum(last[piece], end * CHUNK - 1)
    own_items[:, PART] = part[piece]
    if len(shared.items):
        items[len(piece) :] = shared.items
        items[len(piece) :, PART] = base[shared.items[:, TABLE]]

    items = items[np.argsort(items[:, FIRST_CHUNK] * CHUNK - items[:, LAST], kind="stable")]
    small = items[:, ROW_COUNT] * group <= SMALL_LINES
    return AttentionPlan(items[small], items[~small], part_of.astype(np.int32), int(cost.sum()))


@dataclass(frozen=True)
class _Shared:
    """Chunks that several single-token rows read together."""

    readers: npt.NDArray[np.bool_]
    """[R] does the request read any chunk with others?"""
    items: Ints
    """[n, 8], all but `part`."""
    grid: npt.NDArray[np.bool_]
    """[requests looked at, chunks] is this chunk read with others?"""
    line: npt.NDArray[np.intp]
    """[R] the request's line in `grid`; the last line is of the others."""

    def covers(self, request: npt.NDArray[np.intp], chunk: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Is `chunk` of `request` read with others?"""
        width = self.grid.shape[1]
        known: npt.NDArray[np.bool_] = self.grid[self.line[request], np.minimum(chunk, width - 1)] & (
            chunk < width
        )
        return known

    @classmethod
    def find(
        cls,
        first_row: Ints,
        starts: Ints,
        tables: Ints,
        eligible: npt.NDArray[np.bool_],
        per_piece: int,
    ) -> _Shared:
        """The chunks with enough readers among the neighbours that are `eligible`, and the items that read them."""
        none = cls(
            np.zeros(len(starts), bool),
            np.empty((0, ITEM), np.int32),
            np.zeros((1, 1), bool),
            np.zeros(0, np.intp),
        )
        requests = np.flatnonzero(eligible)
        full = (starts[requests] + 1) // CHUNK
        width = int(full.max(initial=0))
        if len(requests) < READERS or width == 0:
            return none
        # a chunk is known by its last block: equal blocks hold equal prefixes
        ends = tables[requests, CHUNK_BLOCKS - 1 : width * CHUNK_BLOCKS : CHUNK_BLOCKS]
        there = np.arange(width) < full[:, None]
        joins = np.zeros(ends.shape, bool)
        joins[1:] = (ends[1:] == ends[:-1]) & there[1:] & there[:-1]
        joins[1:] &= (np.diff(first_row[requests]) == 1)[:, None]
        # chunk by chunk: a reader that does not join the one before begins a new set of readers
        heads = np.flatnonzero(~joins.T.ravel())
        length = np.diff(heads, append=joins.size)
        heads, length = heads[length >= READERS], length[length >= READERS]
        if len(heads) == 0:
            return none
        pieces = -(-length // per_piece)
        size = -(-length // pieces)
        which, k = _expand(pieces)
        begin = heads[which] + k * size[which]
        rows = np.minimum(size[which], length[which] - k * size[which])
        chunk, line = np.divmod(begin, len(requests))
        marks = np.zeros(joins.size + 1, np.int32)
        np.add.at(marks, heads, 1)
        np.add.at(marks, heads + length, -1)
        grid = np.zeros((len(requests) + 1, width), bool)
        grid[:-1] = np.cumsum(marks[:-1]).reshape(width, len(requests)).T > 0
        places = np.stack([line, line + rows], axis=1).ravel()
        owner = requests[line]
        items = np.empty((len(line), ITEM), np.int32)
        items[:, FIRST_ROW] = first_row[owner]
        items[:, ROW_COUNT] = rows
        items[:, FIRST_CHUNK] = chunk
        items[:, END_CHUNK] = chunk + 1
        items[:, TABLE] = owner
        items[:, LEAST] = np.minimum.reduceat(np.append(starts[requests], 0), places)[::2]
        items[:, LAST] = (chunk + 1) * CHUNK - 1
        readers = none.readers.copy()
        readers[requests] = grid[:-1].any(1)
        lines = np.full(len(starts), len(requests), np.intp)
        lines[requests] = np.arange(len(requests))
        return cls(readers, items, grid, lines)


def _expand(counts: Ints) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
    """For counts (2, 3): owners (0, 0, 1, 1, 1) and numbers within each (0, 1, 0, 1, 2)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    return owner, np.arange(len(owner)) - np.repeat(ends - counts, counts)


def packed_size(plan: AttentionPlan, tables: Ints) -> int:
    """Entries that `pack` writes at most, alignment included."""
    return plan.small.size + plan.big.size + tables.size + 3


def pack(buffer: Ints, at: int, plan: AttentionPlan, tables: Ints) -> int:
    """Write items and `tables` [R, B] into `buffer` from entry `at` on, and into its header where; the next free entry.

    `rows`, `wanted` and the per-row fields (`part_of` among them) are the caller's. Raises ValueError where the
    buffer is too short.
    """
    at = -(-at // 4) * 4
    if at + packed_size(plan, tables) - 3 > len(buffer):
        raise ValueError(
            f"the plan needs {at + packed_size(plan, tables)} entries and its buffer has {len(buffer)}"
        )
    for data, offset_at in ((plan.small, SMALL_AT), (plan.big, BIG_AT), (tables, TABLES_AT)):
        buffer[at : at + data.size] = data.ravel()
        buffer[offset_at] = at
        at += data.size
    buffer[SMALL] = len(plan.small)
    buffer[BIG] = len(plan.big)
    buffer[WIDTH] = tables.shape[1]
    buffer[PARTS] = plan.parts
    return at
