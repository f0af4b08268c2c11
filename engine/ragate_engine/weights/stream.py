"""Weights on their way from files to a card: read ahead by several threads, through pinned memory, while others load.

A tensor's bytes are read from the page cache straight into a pinned buffer (a thread does some 5 to 10 GB/s) and
copied from there to the card on a stream of the thread's own; each thread has two buffers, so that it reads into one
while the other travels. What the bytes mean (`Stored.decode`) is worked out on the card: quantized weights cross as
they lie in the file. So start-up is bound by the disk, or by PCIe where the file is in the page cache.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ragate_engine.errors import ModelFileError
from ragate_engine.quant.tensor import Form, QuantTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from io import FileIO
    from pathlib import Path
    from types import TracebackType

Weight = torch.Tensor | QuantTensor

CHUNK_BYTES = 8 << 20
"""Size of a pinned buffer, of which each thread has two."""
AHEAD_BYTES = 256 << 20
"""Read ahead of what is asked for: the device memory that loading takes beside the weights."""
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Source:
    """A file as it was when its header was read: what lies where is known only as long as it stays so."""

    path: Path
    size: int
    changed: tuple[int, int]
    """Its inode and the time of its last change, in nanoseconds."""

    @classmethod
    def of(cls, path: Path) -> Source:
        """The file as it is now; take it before the header is read. Raises OSError."""
        return cls(path, *_state(os.stat(path)))

    def open(self) -> FileIO:
        """The file, unbuffered. Raises ModelFileError where it is not the one it was, or cannot be read."""
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
        except OSError as error:
            raise self.unreadable(error) from None
        if _state(os.fstat(file.fileno())) != (self.size, self.changed):
            file.close()
            raise ModelFileError(f"{self.path} changed while it was read: start again")
        return file

    def unreadable(self, error: OSError) -> ModelFileError:
        """The sentence for a file that the system does not read."""
        return ModelFileError(f"{self.path} cannot be read: {error.strerror or error}")


def _state(stat: os.stat_result) -> tuple[int, tuple[int, int]]:
    return stat.st_size, (stat.st_ino, stat.st_mtime_ns)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes are, and what makes a tensor of them. Called, it is read on the host."""

    source: Source
    offset: int
    nbytes: int
    decode: Callable[[torch.Tensor], Weight]
    """Takes the bytes, uint8 [nbytes], on any device; the result is there too and may be a view of them."""
    mapped: bool = False
    """Whether the host maps the file (then what is never touched is never read) rather than copies from it."""
    form: Form | None = None
    """What the header tells of its weights."""

    def __call__(self) -> Weight:
        """The tensor, on the CPU. Raises ModelFileError where the file cannot be read or has changed."""
        with self.source.open() as file:
            if self.mapped:
                whole = torch.from_file(
                    str(self.source.path), shared=False, size=self.source.size, dtype=torch.uint8
                )
                return self.decode(whole[self.offset : self.offset + self.nbytes])
            data = torch.empty(self.nbytes, dtype=torch.uint8)
            self.read_into(file, 0, data)
        return self.decode(data)

    def read_into(self, file: FileIO, start: int, out: torch.Tensor) -> None:
        """Fill `out`, uint8 on the host, with the tensor's bytes from `start` on. Raises ModelFileError."""
        rest = out.numpy().data
        try:
            file.seek(self.offset + start)
            while rest:  # one read gives 2 GiB at most
                count = file.readinto(rest)  # lets go of the GIL
                if not count:
                    raise ModelFileError(
                        f"{self.source.path} became shorter while it was read: fetch it again"
                    )
                rest = rest[count:]
        except OSError as error:
            raise self.source.unreadable(error) from None


@dataclass(frozen=True)
class Joined:
    """A weight that is stored as several tensors, which need not be neighbours: codes, scales, zero points."""

    parts: Mapping[str, Stored]
    """Each of them plain: its `decode` gives a tensor."""
    join: Callable[[dict[str, Weight]], Weight]
    """Makes the weight of its parts, on whatever device they are."""
    form: Form | None = None
    """What the header tells of its weights."""

    def __call__(self) -> Weight:
        """The weight, on the CPU. Raises ModelFileError as `Stored` does, or what `join` finds wrong."""
        return self.join({key: part() for key, part in self.parts.items()})


class Uploader:
    """Loads tensors to a device by name, reading ahead in the order in which they will be asked for.

    A tensor that is asked for out of order comes too, later; a loader of another kind than `Stored` and `Joined` is
    simply called. The tensors are ready on the stream that is current where `load` is called. Use it with `with`.
    """

    def __init__(
        self,
        tensors: Mapping[str, Callable[[], Weight]],
        order: Iterable[str],
        device: torch.device,
        *,
        threads: int = THREADS,
        chunk_bytes: int = CHUNK_BYTES,
        ahead_bytes: int = AHEAD_BYTES,
    ) -> None:
        self.device = device
        if device.type == "cuda" and device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._tensors = tensors
        stored = {name: _stored(name, loader) for name, loader in tensors.items()}
        self._stored = {key: part for parts in stored.values() for key, part in parts.items()}
        self._order = deque(key for name in order for key in stored[name])
        self._chunk_bytes = chunk_bytes
        self._ahead_bytes = ahead_bytes
        self._flying: dict[str, _Flight] = {}
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name="ragate-upload", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        self._read_ahead()

    def load(self, name: str) -> Weight:
        """The tensor on the device. Raises KeyError, ModelFileError, or torch's errors about the device."""
        loader = self._tensors[name]
        if isinstance(loader, Joined):
            return loader.join({part: self._arrived(_part_of(name, part)) for part in loader.parts})
        return self._arrived(name) if isinstance(loader, Stored) else loader()

    def _arrived(self, key: str) -> Weight:
        """One of `_stored` on the device."""
        flight = self._flying.pop(key, None)
        if flight is None:
            with suppress(ValueError):
                self._order.remove(key)
            flight = self._start(self._stored[key], urgent=True)
        self._read_ahead()
        return self._stored[key].decode(flight.landed())

    def close(self) -> None:
        """Stop reading ahead and wait for the copies under way."""
        with self._wake:
            self._closing = True
            self._jobs.clear()
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        self._flying.clear()

    def __enter__(self) -> Uploader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_ahead(self) -> None:
        """Start the next tensors, as many as `ahead_bytes` allows."""
        flying = sum(len(flight.data) for flight in self._flying.values())
        while self._order and flying < self._ahead_bytes:
            key = self._order[0]
            stored = self._stored[key]
            try:
                self._flying[key] = self._start(stored)
            except torch.OutOfMemoryError:
                return  # whoever asks for it will hear, or there will be room by then
            self._order.popleft()
            flying += stored.nbytes

    def _start(self, stored: Stored, urgent: bool = False) -> _Flight:
        """Make room on the device and give the tensor's chunks to the threads."""
        starts = range(0, stored.nbytes, self._chunk_bytes)
        flight = _Flight(torch.empty(stored.nbytes, dtype=torch.uint8, device=self.device), len(starts))
        jobs = [_Job(stored, flight, at, min(at + self._chunk_bytes, stored.nbytes)) for at in starts]
        with self._wake:
            if urgent:
                self._jobs.extendleft(reversed(jobs))
            else:
                self._jobs.extend(jobs)
            self._wake.notify(len(jobs))
        return flight

    def _next_job(self) -> _Job | None:
        with self._wake:
            while not (self._jobs or self._closing):
                self._wake.wait()
            return self._jobs.popleft() if self._jobs else None

    @torch.inference_mode()  # tensors made under it may be written nowhere else
    def _work(self) -> None:
        lane: _Lane | None = None
        while (job := self._next_job()) is not None:
            try:
                lane = lane or _Lane(self.device, self._chunk_bytes)
                job.flight.chunk_done(lane.carry(job))
            except BaseException as error:  # whatever it is, the one who waits must hear of it
                job.flight.failed(error)
        if lane is not None:
            lane.close()


def _stored(name: str, loader: Callable[[], Weight]) -> dict[str, Stored]:
    """What lies in files of a weight, by names that no other weight uses."""
    if isinstance(loader, Joined):
        return {_part_of(name, part): stored for part, stored in loader.parts.items()}
    return {name: loader} if isinstance(loader, Stored) else {}


def _part_of(name: str, part: str) -> str:
    return f"{name}/{part}"


class _Flight:
    """A tensor under way: its bytes on the device, and what to wait for before they may be used."""

    def __init__(self, data: torch.Tensor, chunks: int) -> None:
        self.data = data
        # the memory may have belonged to a tensor that the caller's stream still reads
        self.allocated = _event(data.device)
        self._left = chunks
        self._copies: list[torch.cuda.Event] = []
        self._error: BaseException | None = None
        self._wake = threading.Condition()

    def chunk_done(self, copied: torch.cuda.Event | None) -> None:
        """A chunk was sent off; `copied` happens when it has arrived."""
        with self._wake:
            self._left -= 1
            if copied is not None:
                self._copies.append(copied)
            self._wake.notify()

    def failed(self, error: BaseException) -> None:
        """A chunk will never come."""
        with self._wake:
            self._error = error
            self._wake.notify()

    def landed(self) -> torch.Tensor:
        """The bytes, ready on the current stream. Raises what the threads met."""
        with self._wake:
            while self._left and self._error is None:
                self._wake.wait()
            if self._error is not None:
                raise self._error
        for copied in self._copies:
            copied.wait()
        return self.data


@dataclass(frozen=True)
class _Job:
    """Bytes [start, stop) of a tensor."""

    stored: Stored
    flight: _Flight
    start: int
    stop: int


class _Lane:
    """What a thread owns: open files, two pinned buffers and a stream. On a CPU, buffers alone (for tests)."""

    def __init__(self, device: torch.device, chunk_bytes: int) -> None:
        card = device.type == "cuda"
        if card:
            torch.cuda.set_device(device)  # of this thread
        self._stream = torch.cuda.Stream(device) if card else None
        self._buffers = [torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=card) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._files: dict[Source, FileIO] = {}

    def carry(self, job: _Job) -> torch.cuda.Event | None:
        """Read the chunk and send it off; returns what happens when it has arrived."""
        self._turn ^= 1
        busy = self._copied[self._turn]
        if busy is not None:
            busy.synchronize()
        buffer = self._buffers[self._turn][: job.stop - job.start]
        source = job.stored.source
        if source not in self._files:
            self._files[source] = source.open()
        job.stored.read_into(self._files[source], job.start, buffer)
        target = job.flight.data[job.start : job.stop]
        if self._stream is None or job.flight.allocated is None:
            target.copy_(buffer)
            return None
        with torch.cuda.stream(self._stream):
            job.flight.allocated.wait()
            target.copy_(buffer, non_blocking=True)
            copied = _event(target.device)
        self._copied[self._turn] = copied
        return copied

    def close(self) -> None:
        """Wait for the copies, so that buffers and tensors may go; close the files."""
        for copied in self._copied:
            if copied is not None:
                copied.synchronize()
        for file in self._files.values():
            file.close()


def _event(device: torch.device) -> torch.cuda.Event | None:
    """What happens when all that the current stream has been given is done; `None` on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # who waits for it sleeps
    event.record()
    return event
