"""Child processes that compile: all jobs are done, and one that fails, dies or hangs keeps nobody waiting."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("triton")

from ragate_engine.kernels.triton import children
from ragate_engine.kernels.triton.children import Children, Marker


def write(folder: Path, i: int) -> None:
    (folder / str(i)).write_text(str(os.getpid()))


def test_children_share_the_jobs_and_each_is_done_once(tmp_path: Path) -> None:
    def job(i: int) -> None:
        with open(tmp_path / str(i), "x") as file:  # fails where the job was done before
            file.write(f"{os.getpid()} {prepared}")

    prepared = ""

    def prepare() -> None:
        nonlocal prepared
        prepared = "yes"

    started = Children([partial(job, i) for i in range(40)], prepare, 3)
    pids = set(started._pids)
    started.wait(range(40), threading.Event())
    assert started._done == set(range(40))
    started.close()
    wrote = [path.read_text().split() for path in tmp_path.iterdir()]
    assert len(wrote) == 40
    assert {int(pid) for pid, _ in wrote} <= pids and os.getpid() not in pids
    assert {said for _, said in wrote} == {"yes"} and prepared == ""


def test_a_job_that_raises_or_kills_its_process_leaves_the_others_to_be_done(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    jobs = [partial(write, tmp_path, 0), fail, die, *(partial(write, tmp_path, i) for i in range(3, 20))]
    started = Children(jobs, lambda: None, 2)
    started.wait(range(20), threading.Event())
    assert started._done == set(range(20)) - {2}  # and `wait` has returned: no child is left
    started.close()
    assert {path.name for path in tmp_path.iterdir()} == {str(i) for i in range(20)} - {"1", "2"}


def test_children_that_hang_are_given_up_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "PATIENCE", 0.5)
    started = Children([partial(write, tmp_path, 0), partial(time.sleep, 1000)], lambda: None, 2)
    pids = started._pids
    started.wait(range(2), threading.Event())
    assert started._done == {0}
    started.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_who_stops_waits_no_longer() -> None:
    stopped = threading.Event()
    stopped.set()
    started = Children([partial(time.sleep, 1000)], lambda: None, 1)
    started.wait([0], stopped)
    assert started._done == set()
    started.close()


def test_a_marker_is_found_for_the_same_things_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    marker = Marker((9, 0), "a model", 16)
    assert not marker.found()
    marker.leave()
    assert Marker((9, 0), "a model", 16).found()
    assert not Marker((8, 0), "a model", 16).found()
