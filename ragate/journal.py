"""The journal: an append-only file of every judged call and answer, so that a stopped run goes on by itself.

One JSON object a line, each with a checksum over its own text. Judged calls are content-addressed (their key
hashes the judge, the prompt and the schema), so they are good for ever; answers of the system under test are
good only until a `done` line says that the run they belong to has ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ragate.errors import RunError
from ragate.files import out_of_space
from ragate.run import Frozen

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from filelock import FileLock


class CallEntry(Frozen):
    """One call of the judge: the output, its token counts, and P(verdict = 1) at each verdict in it."""

    kind: Literal["call"] = "call"
    key: str
    output: str
    prompt_tokens: int
    output_tokens: int
    finish: str
    verdicts: tuple[float | None, ...] = ()


class AnswerEntry(Frozen):
    """What the system under test said for one item, or why it said nothing. `key` is from `answer_key`."""

    kind: Literal["answer"] = "answer"
    key: str
    answer: str | None = None
    contexts: tuple[str, ...] | None = None
    error: str | None = None


class StartEntry(Frozen):
    """A run opened the journal."""

    kind: Literal["start"] = "start"
    pid: int


class DoneEntry(Frozen):
    """A run ended with every score made: the answers before this line belong to it alone."""

    kind: Literal["done"] = "done"


Entry = CallEntry | AnswerEntry | StartEntry | DoneEntry

_ENTRY: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="kind")])
_LINE = re.compile(rb'(\{.*),"check":"([0-9a-f]{16})"\}', re.DOTALL)


def answer_key(identity: str, item: str, question: str) -> str:
    """Address of an answer: sha256 over who answers (`Target.identity`), the item's id and its question."""
    return hashlib.sha256(json.dumps([identity, item, question]).encode()).hexdigest()


def _line(entry: Entry) -> bytes:
    body = json.dumps(entry.model_dump(), separators=(",", ":")).encode()
    check = hashlib.sha256(body).hexdigest()[:16].encode()
    return body[:-1] + b',"check":"' + check + b'"}\n'


def _parse(line: bytes) -> Entry | None:
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    body = match[1] + b"}"
    if hashlib.sha256(body).hexdigest()[:16].encode() != match[2]:
        return None
    try:
        return _ENTRY.validate_json(body)
    except ValidationError:
        return None


def read_entries(data: bytes) -> tuple[list[Entry], list[int], int]:
    """The entries in a journal's bytes, the numbers of corrupt lines between them, where the last entry ends.

    What follows the last good line was torn by a crash and is not an error: it counts as never written.
    """
    entries: list[Entry] = []
    corrupt: list[int] = []
    suspects: list[int] = []
    end = position = 0
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        position += len(line) + 1
        entry = _parse(line)
        if entry is None:
            suspects.append(number)
            continue
        corrupt += suspects
        suspects = []
        entries.append(entry)
        end = position
    return entries, corrupt, end


def _writer(path: Path) -> str:
    """Who has the journal open, as it says itself."""
    try:
        entries, _, _ = read_entries(path.read_bytes())
    except OSError:  # it holds the lock and has no file yet
        entries = []
    starts = [entry for entry in entries if isinstance(entry, StartEntry)]
    return f"process {starts[-1].pid}" if starts else "another process"


class Journal:
    """An open journal, locked against a second run. Make one with `Journal.open`; close it, or use `with`."""

    def __init__(self, path: Path, fd: int, lock: FileLock, data: bytes) -> None:
        """Take over an open descriptor and a held lock; `data` is what the file holds now."""
        self.path = path
        self.problems: tuple[str, ...] = ()
        """Sentences about lines that could not be read: what they held is judged again."""
        self._fd = fd
        self._lock = lock
        self._unsynced = False
        self._sync_scheduled = False
        self._failure: RunError | None = None
        self._calls: dict[str, CallEntry] = {}
        self._answers: dict[str, AnswerEntry] = {}
        entries, corrupt, self._end = read_entries(data)
        if not entries and b"\n" in data:
            raise RunError(f"{path}: not a ragate journal; move it away or name another folder with --out")
        if corrupt:
            lines = ", ".join(str(n) for n in corrupt)
            self.problems = (f"{path}: skipped corrupt line {lines}; what it held will be judged again",)
        for entry in entries:
            self._remember(entry)
        os.ftruncate(fd, self._end)
        os.lseek(fd, self._end, os.SEEK_SET)

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open or create the journal at `path`, lock it and read it.

        Raises RunError when another run holds it (naming its process), or when it cannot be read or written.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(f"{path}.lock", timeout=0, thread_local=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        except Timeout:
            who = _writer(path)
            raise RunError(
                f"{path.parent}: {who} is writing a run here; wait for it, or name another folder with --out"
            ) from None
        except OSError as e:
            lock.release()
            raise RunError(
                f"{path}: cannot open the journal: {e.strerror}; name another folder with --out"
            ) from None
        try:
            journal = cls(path, fd, lock, path.read_bytes())
            journal.append(StartEntry(pid=os.getpid()))
        except BaseException:
            os.close(fd)
            lock.release()
            raise
        return journal

    def __enter__(self) -> Journal:
        """Return the journal itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the journal; an exception on its way out is not replaced by one from closing."""
        try:
            self.close()
        except RunError:
            if kind is None:
                raise

    def call(self, key: str) -> CallEntry | None:
        """The judged call with this key, or `None`."""
        return self._calls.get(key)

    def answer(self, key: str) -> AnswerEntry | None:
        """The answer with this key, if it belongs to a run that has not ended."""
        return self._answers.get(key)

    def append(self, entry: Entry) -> None:
        """Write one entry: it survives a kill at once, a power cut once the event loop's tick has ended.

        Raises RunError when the disk refuses; every entry before it is still there and still readable.
        """
        if self._failure is not None:
            raise self._failure
        line = _line(entry)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as e:
            os.ftruncate(self._fd, self._end)
            os.lseek(self._fd, self._end, os.SEEK_SET)
            raise self._refused(e) from None
        self._end += len(line)
        self._remember(entry)
        self._unsynced = True
        self._sync_soon()

    def flush(self) -> None:
        """Force everything appended so far to the disk. Raises RunError when it refuses."""
        if self._failure is not None:
            raise self._failure
        if self._unsynced:
            try:
                os.fsync(self._fd)
            except OSError as e:
                self._failure = self._refused(e)
                raise self._failure from None
            self._unsynced = False

    def close(self) -> None:
        """Flush, close and unlock; closing twice does nothing."""
        if self._fd < 0:
            return
        try:
            self.flush()
        finally:
            os.close(self._fd)
            self._fd = -1
            self._lock.release()

    def _remember(self, entry: Entry) -> None:
        if isinstance(entry, CallEntry):
            self._calls[entry.key] = entry
        elif isinstance(entry, AnswerEntry):
            self._answers[entry.key] = entry
        elif isinstance(entry, DoneEntry):
            self._answers.clear()

    def _sync_soon(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        if not self._sync_scheduled:
            self._sync_scheduled = True
            loop.call_soon(self._sync_now)

    def _sync_now(self) -> None:
        self._sync_scheduled = False
        if self._fd >= 0 and self._failure is None:
            try:
                self.flush()
            except RunError as e:
                self._failure = e  # raised by the next append, flush or close

    def _refused(self, error: OSError) -> RunError:
        first = "free some space and " if out_of_space(error) else ""
        return RunError(
            f"{self.path}: cannot write the journal: {error.strerror}; "
            f"{first}run again: what is there so far will not be judged twice"
        )
