"""Executing a plan: threads over tensors, blocks within a tensor, one ordered stream a tensor into the writer.

At no time is more in memory than a few blocks a thread. What a thread computes depends on its tensor alone, so neither
the number of threads nor the size of the blocks can change a bit of the result. `merge_tensor` is the unit that a
journal will record: when it returns, its tensor is complete in the output.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any

import numpy as np

from solera_core.checkpoint import Checkpoint
from solera_core.errors import CheckpointError
from solera_core.progress import Progress
from solera_core.writer import CheckpointWriter
from solera_merge.block import BLOCK_ELEMENTS, CHUNK_ELEMENTS, Block, Float32, Unit, block_starts
from solera_merge.methods.catalogue import METHODS
from solera_merge.plan import COPY, SourceTensor, TensorPlan

__all__ = ["execute", "merge_tensor"]


class _StoppedError(Exception):
    """Another thread has failed; nothing more is to be done."""


def execute(
    tensors: Sequence[TensorPlan],
    checkpoints: Sequence[Checkpoint],
    writer: CheckpointWriter,
    *,
    threads: int,
    progress: Progress,
    block_elements: int = BLOCK_ELEMENTS,
) -> None:
    """Merge all tensors into the writer, the largest first (so that no thread is left alone with one at the end).

    Raises:
        CheckpointError: an input is not finite, or changed since it was planned; the first error found is raised, and
            the other threads stop at their next block.
        OSError: the disk is full.
    """
    stop = threading.Event()
    lock = threading.Lock()
    total = sum(checkpoints[s.model].tensors[s.name].nbytes for tensor in tensors for s in tensor.sources)
    with progress.task("merging", total, "bytes") as task, ThreadPoolExecutor(threads, "merge") as pool:

        def advance(amount: int) -> None:
            if stop.is_set():
                raise _StoppedError
            with lock:
                task.advance(amount)

        try:
            findings = _survey(tensors, checkpoints, advance, block_elements)

            def work(tensor: TensorPlan) -> None:
                finding = findings.get(tensor.name)
                merge_tensor(tensor, checkpoints, writer, advance, finding=finding, block_elements=block_elements)

            largest_first = sorted(tensors, key=lambda tensor: -tensor.spec.nbytes)
            futures = [pool.submit(work, tensor) for tensor in largest_first]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                error = future.exception() if future in done else None
                if error is not None and not isinstance(error, _StoppedError):
                    raise error
        finally:  # also on KeyboardInterrupt
            stop.set()
            pool.shutdown(cancel_futures=True)


def merge_tensor(
    tensor: TensorPlan,
    checkpoints: Sequence[Checkpoint],
    writer: CheckpointWriter,
    advance: Callable[[int], None] = lambda _: None,
    *,
    finding: Any = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> None:
    """Merge one tensor, completely.

    Args:
        tensor: its plan.
        checkpoints: the models, in the order of the plan.
        writer: gets the result.
        advance: told the bytes of input that are done.
        finding: what the method's survey over the whole model found for this tensor.
        block_elements: elements a block; a multiple of CHUNK_ELEMENTS.

    Raises:
        CheckpointError: naming the model's file, the tensor and the place of a NaN or infinity; or a tensor that should
            be equal in all models is not.
    """
    if block_elements % CHUNK_ELEMENTS:
        raise ValueError(f"block_elements must be a multiple of {CHUNK_ELEMENTS}, found {block_elements}")
    if tensor.method == COPY:
        _copy(tensor, checkpoints, writer, advance, block_elements)
        return
    streamed = _Streamed(tensor, checkpoints, block_elements, advance)
    method = METHODS[tensor.method]
    keywords = {method.parameters[name].keyword: value for name, value in tensor.parameters.items()}
    item_bytes = sum(checkpoints[s.model].tensors[s.name].nbytes for s in tensor.sources) / max(streamed.size, 1)
    # An overflow is no warning here: the writer refuses what is not finite, by name.
    with np.errstate(over="ignore", invalid="ignore"):
        formula = method.function(streamed, *([] if method.survey is None else [finding]), **keywords)
        for block in streamed.blocks(method.unit):
            writer.write_flat(tensor.name, block.start, formula(block))
            advance(round(item_bytes * block.models[0].size))


def _survey(
    tensors: Sequence[TensorPlan],
    checkpoints: Sequence[Checkpoint],
    advance: Callable[[int], None],
    block_elements: int,
) -> dict[str, Any]:
    """What the methods' surveys over the whole model find, by tensor; empty for methods without one."""
    findings: dict[str, Any] = {}
    for name in dict.fromkeys(tensor.method for tensor in tensors if tensor.method != COPY):
        survey = METHODS[name].survey
        if survey is not None:
            mine = [tensor for tensor in tensors if tensor.method == name]
            streams = [_Streamed(tensor, checkpoints, block_elements, advance) for tensor in mine]
            found = survey(streams, [tensor.parameters for tensor in mine])
            findings.update(zip((tensor.name for tensor in mine), found, strict=True))
    return findings


class _Streamed:
    """`solera_merge.block.Tensor` over checkpoints: every pass reads anew, so nothing is held."""

    def __init__(
        self,
        tensor: TensorPlan,
        checkpoints: Sequence[Checkpoint],
        block_elements: int,
        advance: Callable[[int], None],
    ) -> None:
        self.size = tensor.spec.size
        self.shape = tensor.shape
        self.sources = tuple(source.model for source in tensor.models)
        self.keys = tensor.keys
        self._tensor = tensor
        self._checkpoints = checkpoints
        self._step = block_elements
        self._advance = advance
        self._checked = False

    def blocks(self, unit: Unit = "elements") -> Iterator[Block]:
        for start, stop in pairwise(block_starts(self.shape, unit, self._step)):
            base = None if self._tensor.base is None else self._read(self._tensor.base, start, stop)
            self._advance(0)  # raises when another thread has failed
            yield Block(start, base, tuple(self._read(source, start, stop) for source in self._tensor.models))
        self._checked = True

    def _read(self, source: SourceTensor, start: int, stop: int) -> Float32:
        checkpoint = self._checkpoints[source.model]
        values = checkpoint.read_flat(source.name, start, stop)
        if not self._checked:
            _require_finite(values, checkpoint, source.name, start)
        return values


def _require_finite(values: Float32, checkpoint: Checkpoint, name: str, start: int) -> None:
    finite = np.isfinite(values)
    if finite.all():
        return
    info = checkpoint.tensors[name]
    place = int(np.argmin(finite))
    index = tuple(int(i) for i in np.unravel_index(start + place, info.shape))
    raise CheckpointError(
        f"{info.file}: tensor {name!r} {info.shape} of model {checkpoint.ref!r} holds {values[place]} at {index}; "
        "the model is damaged or diverged in training: leave it out, or repair it"
    )


def _copy(
    tensor: TensorPlan,
    checkpoints: Sequence[Checkpoint],
    writer: CheckpointWriter,
    advance: Callable[[int], None],
    step: int,
) -> None:
    """Tables of integers or flags: equal in all models, else there is no right answer."""
    size = tensor.spec.size
    for start in range(0, size, step):
        stop = min(start + step, size)
        blocks = [checkpoints[s.model].read_raw(s.name, start, stop) for s in tensor.models]
        for source, block in zip(tensor.models[1:], blocks[1:], strict=True):
            if not np.array_equal(block, blocks[0]):
                first = checkpoints[tensor.models[0].model].tensors[tensor.models[0].name]
                other = checkpoints[source.model].tensors[source.name]
                raise CheckpointError(
                    f"{first.file} and {other.file}: tensor {tensor.name!r} ({tensor.dtype}) is not floating-point and "
                    "differs, so it can be neither merged nor copied"
                )
        writer.write_raw(tensor.name, start, blocks[0])
        advance(sum(block.size for block in blocks))
