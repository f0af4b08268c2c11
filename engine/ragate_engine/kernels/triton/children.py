"""Compiles kernels in forked processes: Triton's compiler holds Python's lock, so its threads take turns.

Children launch nothing. They compile for the card that they are told of, into Triton's cache on disk, and whoever
launches a kernel next finds it there. Where a child fails, hangs or is killed, a kernel is compiled where it is used.
"""

from __future__ import annotations

import gc
import hashlib
import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import torch

MOST = 16
"""Children at once."""
PATIENCE = 20.0
"""Seconds to wait for the next kernel before the children are given up."""

Job = Callable[[], object]


class Children:
    """Processes that share a list of jobs, from the moment this is made until `close`."""

    def __init__(self, jobs: Sequence[Job], prepare: Callable[[], object], count: int | None = None) -> None:
        """Fork `count` children; each calls `prepare` and then takes jobs until none is left.

        At most 256 jobs. Raises OSError where no process can be made.
        """
        self._done: set[int] = set()
        self._gone = False
        self._pids: list[int] = []
        take, give = os.pipe()
        os.write(give, bytes(range(len(jobs))))
        os.close(give)
        self._reports, report = os.pipe()
        try:
            for _ in range(min(count or os.cpu_count() or 1, MOST, len(jobs))):
                with warnings.catch_warnings():
                    # Python warns of forking beside threads: what a child may wait for ever for, it is killed over
                    warnings.simplefilter("ignore", DeprecationWarning)
                    pid = os.fork()
                if pid == 0:
                    _work(jobs, prepare, take, report)
                self._pids.append(pid)
        except OSError:
            self.close()
            raise
        finally:
            os.close(take)
            os.close(report)

    def wait(self, jobs: Collection[int], stopped: threading.Event) -> None:
        """Until `jobs` are done, no child is left, nothing came for `PATIENCE` seconds, or `stopped` is set."""
        last = time.monotonic()
        while not self._gone and not stopped.is_set() and not self._done.issuperset(jobs):
            if select.select([self._reports], [], [], 0.05)[0]:
                found = os.read(self._reports, 256)
                self._done.update(found)
                self._gone = not found
                last = time.monotonic()
            elif time.monotonic() - last > PATIENCE:
                self._gone = True

    def close(self) -> None:
        """End what still runs."""
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self._pids = []
        os.close(self._reports)


def _work(jobs: Sequence[Job], prepare: Callable[[], object], take: int, report: int) -> None:
    """A child's life. It never returns, and never frees what it has from its parent: that might be on the card."""
    try:
        gc.disable()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nowhere, standard)
        # the parent's sockets, files and card are not a child's to keep open
        ends = sorted((take, report))
        for first, last in zip((2, *ends), (*ends, os.sysconf("SC_OPEN_MAX")), strict=True):
            os.closerange(first + 1, last)
        torch.set_num_threads(1)  # the threads that share large operations have stayed with the parent
        prepare()
        while index := os.read(take, 1):
            with suppress(Exception):
                jobs[index[0]]()
            os.write(report, index)  # of a failure too: who waits compiles it itself, and sees why it fails
    finally:
        os._exit(0)


class _NoCard:
    """What Triton asks of its driver in order to compile, for a card of one capability."""

    def __init__(self, capability: tuple[int, int]) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_only(capability: tuple[int, int]) -> None:
    """From now on, in this process, launching a kernel compiles it and what launches it, and does no more."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_and_return(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, warmup=True, **kwargs)
        with suppress(Exception):  # from 3.7 on Triton has one launcher for all kernels
            CudaLauncher(kernel.src, kernel.metadata)
        return kernel

    driver.set_active(_NoCard(capability))
    JITFunction.run = compile_and_return


class Marker:
    """Says, in Triton's own cache, that everything for one model, card and version of the kernels is there."""

    FILE = "ragate-compiled"

    def __init__(self, *what: object) -> None:
        from triton.runtime.cache import get_cache_manager, triton_key

        text = "\n".join([triton_key(), *map(repr, what)])
        self._cache = get_cache_manager(hashlib.sha256(text.encode()).hexdigest())

    def found(self) -> bool:
        """Whether `leave` was called before, and the cache not emptied since."""
        return bool(self._cache.has_file(self.FILE))

    def leave(self) -> None:
        """Remember it."""
        self._cache.put("", self.FILE, binary=False)
