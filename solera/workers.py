"""Stages side by side: one process each, so that none waits for another's threads and torch stays single-minded.

On small models two processes of one thread do nearly twice the work of one process of two threads.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from solera.console import Lines
from solera.stages import run_stage
from solera_core.context import Context
from solera_core.progress import Silent
from solera_core.strict import Strict

__all__ = ["start_stage", "workers"]


@contextmanager
def workers(jobs: int) -> Iterator[Executor]:
    """An executor that runs `jobs` stages at a time; with one job, here and at once."""
    if jobs == 1:
        yield _Here()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_die_with_parent, initargs=(os.getpid(),)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def start_stage(
    executor: Executor, name: str, kind: str, config: Strict, out: Path, ctx: Context, *, jobs: int
) -> "Future[Path]":
    """Run one stage in the executor; its progress lines carry the stage's name where several run."""
    if jobs == 1:
        return executor.submit(run_stage, kind, config, out, ctx)
    threads = ctx.threads or max(1, (os.cpu_count() or 1) // jobs)
    quiet = isinstance(ctx.progress, Silent)
    plain = replace(ctx, threads=threads, progress=Silent())
    return executor.submit(_run_in_worker, name, kind, config, out, plain, quiet)


def _run_in_worker(name: str, kind: str, config: Strict, out: Path, ctx: Context, quiet: bool) -> Path:
    return run_stage(kind, config, out, ctx if quiet else replace(ctx, progress=Lines(name)))


def _die_with_parent(parent: int) -> None:
    """A killed run must not leave workers behind that go on writing (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


class _Here(Executor):
    """Runs what is submitted in this process, before `submit` returns."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as e:
            future.set_exception(e)
        return future
