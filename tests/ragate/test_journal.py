"""The journal survives kills, torn lines, corruption and full disks, and admits one run at a time."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from ragate.errors import RunError
from ragate.journal import (
    AnswerEntry,
    CallEntry,
    DoneEntry,
    Entry,
    Journal,
    StartEntry,
    _line,
    answer_key,
    read_entries,
)

if TYPE_CHECKING:
    from pathlib import Path

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
calls = st.builds(
    CallEntry,
    key=texts,
    output=texts,
    prompt_tokens=st.integers(0, 10**6),
    output_tokens=st.integers(0, 10**6),
    finish=st.sampled_from(["stop", "length"]),
    verdicts=st.lists(st.none() | st.floats(0, 1), max_size=4).map(tuple),
)
answers = st.builds(
    AnswerEntry,
    key=texts,
    answer=st.none() | texts,
    contexts=st.none() | st.lists(texts, max_size=3).map(tuple),
    error=st.none() | texts,
)
entries = st.one_of(calls, answers, st.builds(StartEntry, pid=st.integers(1, 10**6)), st.just(DoneEntry()))


def call(key: str, output: str = "{}") -> CallEntry:
    counts = {"prompt_tokens": 3, "output_tokens": 2}
    return CallEntry(key=key, output=output, **counts, finish="stop", verdicts=(0.5, None))


@given(st.lists(entries, max_size=6), st.data())
def test_any_prefix_of_the_file_loads_to_a_prefix_of_the_entries(
    written: list[Entry], data: st.DataObject
) -> None:
    lines = [_line(entry) for entry in written]
    cut = data.draw(st.integers(0, sum(map(len, lines))))
    read, corrupt, end = read_entries(b"".join(lines)[:cut])
    whole = sum(sum(map(len, lines[: i + 1])) <= cut for i in range(len(lines)))
    assert read == written[:whole]
    assert corrupt == []
    assert end == sum(map(len, lines[:whole]))


@given(st.lists(calls, min_size=1, max_size=4), st.data())
def test_a_changed_byte_costs_its_own_line_and_no_other(
    written: list[CallEntry], data: st.DataObject
) -> None:
    lines = [_line(entry) for entry in written]
    hurt = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, len(lines[hurt]) - 2))  # its newline stays
    byte = data.draw(st.integers(0, 255).filter(lambda b: b not in (lines[hurt][at], 10)))
    changed = bytearray(lines[hurt])
    changed[at] = byte
    read, corrupt, _ = read_entries(b"".join([*lines[:hurt], bytes(changed), *lines[hurt + 1 :]]))
    assert read == [entry for i, entry in enumerate(written) if i != hurt]
    assert corrupt == ([hurt + 1] if hurt < len(lines) - 1 else [])


def test_what_was_appended_is_there_after_reopening(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        journal.append(call("a", 'é "quoted" \n'))
    with Journal.open(tmp_path / "journal.jsonl") as journal:
        assert journal.call("a") == call("a", 'é "quoted" \n')
        assert journal.call("b") is None
        assert journal.problems == ()


def test_a_torn_last_line_is_cut_off_so_that_the_next_entry_starts_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal.open(path) as journal:
        journal.append(call("a"))
        journal.append(call("b"))
    path.write_bytes(path.read_bytes()[:-5])
    with Journal.open(path) as journal:
        assert journal.call("b") is None
        journal.append(call("c"))
    read, corrupt, end = read_entries(path.read_bytes())
    assert [entry.key for entry in read if isinstance(entry, CallEntry)] == ["a", "c"]
    assert (corrupt, end) == ([], path.stat().st_size)


def test_a_corrupt_line_in_the_middle_is_reported_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal.open(path) as journal:
        journal.append(call("a"))
        journal.append(call("b"))
    path.write_bytes(path.read_bytes().replace(b'"key":"a"', b'"key":"x"'))
    with Journal.open(path) as journal:
        assert journal.problems == (f"{path}: skipped corrupt line 2; what it held will be judged again",)
        assert journal.call("a") is None
        assert journal.call("x") is None
        assert journal.call("b") == call("b")


def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text("dear diary\n")
    with pytest.raises(RunError, match="not a ragate journal"):
        Journal.open(path)
    assert path.read_text() == "dear diary\n"


def test_answers_are_good_until_the_run_they_belong_to_is_done(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    answer = AnswerEntry(key=answer_key("app", "q1", "Why?"), answer="So.", contexts=("c",))
    with Journal.open(path) as journal:
        journal.append(answer)
        journal.append(call("a"))
    with Journal.open(path) as journal:  # the run before was interrupted
        assert journal.answer(answer.key) == answer
        assert journal.answer(answer_key("another app", "q1", "Why?")) is None
        journal.append(DoneEntry())
        assert journal.answer(answer.key) is None
    with Journal.open(path) as journal:
        assert journal.answer(answer.key) is None
        assert journal.call("a") == call("a")


def test_a_second_run_in_the_folder_is_told_which_process_has_it(tmp_path: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from ragate.journal import Journal
        with Journal.open(Path({str(tmp_path / "journal.jsonl")!r})):
            print("open", flush=True)
            sys.stdin.read()
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], **pipes) as other:
        assert other.stdout
        assert other.stdout.readline() == "open\n"
        with pytest.raises(RunError, match=f"process {other.pid} is writing a run here"):
            Journal.open(tmp_path / "journal.jsonl")
        other.kill()
    with Journal.open(tmp_path / "journal.jsonl") as journal:  # a killed run holds no lock
        journal.append(call("a"))


def test_a_second_run_is_refused_while_the_first_has_the_lock_and_no_file_yet(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / "journal.jsonl.lock", thread_local=False),
        pytest.raises(RunError, match="another process is writing a run here; wait for it"),
    ):
        Journal.open(tmp_path / "journal.jsonl")


def test_a_full_disk_is_a_run_error_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.jsonl"
    write, room = os.write, 100
    with Journal.open(path) as journal:
        journal.append(call("a"))

        def almost_full(fd: int, data: bytes) -> int:
            nonlocal room
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = write(fd, bytes(data)[:room])
            room -= written
            return written

        monkeypatch.setattr(os, "write", almost_full)
        with pytest.raises(RunError, match="No space left on device; free some space and run again"):
            journal.append(call("b", "x" * 500))
        monkeypatch.undo()
        journal.append(call("c"))
    read, corrupt, end = read_entries(path.read_bytes())
    assert [entry.key for entry in read if isinstance(entry, CallEntry)] == ["a", "c"]
    assert (corrupt, end) == ([], path.stat().st_size)


def test_entries_of_one_tick_share_one_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    journal = Journal.open(tmp_path / "journal.jsonl")
    monkeypatch.setattr(os, "fsync", synced.append)

    async def append_twice() -> None:
        for key in ("a", "b"):
            journal.append(call(key))
        assert synced == []
        await asyncio.sleep(0)
        assert len(synced) == 1

    asyncio.run(append_twice())
    journal.close()
    assert len(synced) == 1


def test_a_disk_that_fails_to_sync_is_reported_by_the_next_append(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.open(tmp_path / "journal.jsonl")

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def append_twice() -> None:
        journal.append(call("a"))
        await asyncio.sleep(0)
        journal.append(call("b"))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(RunError, match="Input/output error; run again: what is there"):
        asyncio.run(append_twice())
    with pytest.raises(RunError):
        journal.close()
    monkeypatch.undo()
    Journal.open(tmp_path / "journal.jsonl").close()  # the lock was let go


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot open the journal"):
        Journal.open(tmp_path / "file" / "journal.jsonl")
