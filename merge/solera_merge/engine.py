"""Executing a plan: threads over tensors, blocks within a tensor, one ordered stream a tensor into the writer.

At no time is more in memory than a few blocks a thread. What a thread computes depends on its tensor alone, so neither
the number of threads nor the size of the blocks can change a bit of the result. `merge_tensor` is the unit that the
writer's journal records: when it returns, its tensor is complete in the output.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from solera_core.checkpoint import Checkpoint
from solera_core.dtypes import ITEM_BYTES
from solera_core.errors import CheckpointError
from solera_core.progress import Progress
from solera_core.writer import CheckpointWriter
from solera_merge.block import BLOCK_ELEMENTS, CHUNK_ELEMENTS, Float32, Unit, block_starts
from solera_merge.drift import relative
from solera_merge.memory import Budget, default_memory_bytes, keep_freed_memory
from solera_merge.methods.catalogue import METHODS
from solera_merge.plan import COPY, TensorPlan, tensor_bytes
from solera_merge.selection import Each
from solera_merge.streams import RawStream, StreamedTensor

if TYPE_CHECKING:
    from solera_merge.torch_twins import Device

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
    memory_bytes: int | None = None,
    block_elements: int = BLOCK_ELEMENTS,
    device: "Device | None" = None,
) -> None:
    """Merge all tensors into the writer, the largest first (so that no thread is left alone with one at the end).

    Tensors that the writer has from a killed run are left as they are. `memory_bytes` bounds what the threads hold
    together: where not all of them fit, some wait. The methods that `device` has are computed there.

    Raises:
        CheckpointError: an input is not finite, or changed since it was planned; the error that came first is raised,
            and the other threads stop at their next block.
        OSError: the disk is full.
    """
    keep_freed_memory()
    stop = threading.Event()
    lock = threading.Lock()
    failed: list[BaseException] = []  # the first error; those that come after it may only be its consequences
    open_tensors = [tensor for tensor in tensors if not writer.is_done(tensor.name)]
    total = sum(checkpoints[s.model].tensors[s.name].nbytes for tensor in open_tensors for s in tensor.sources)
    budget = Budget(default_memory_bytes() if memory_bytes is None else memory_bytes)
    with (
        _one_lapack_thread(open_tensors),
        progress.task("merging", total, "bytes") as task,
        ThreadPoolExecutor(threads, "merge") as pool,
    ):

        def advance(amount: int) -> None:
            if stop.is_set():
                raise _StoppedError
            with lock:
                task.advance(amount)

        def on_threads(function: Callable[[TensorPlan], None], chosen: Sequence[TensorPlan], device: str) -> None:
            """Call it with every tensor, the largest first; the error that came first is raised."""

            def work(tensor: TensorPlan) -> None:
                try:
                    with budget.take(tensor_bytes(tensor, device=device)):
                        advance(0)  # another thread may have failed while this one waited
                        function(tensor)
                except BaseException as e:
                    with lock:
                        if not stop.is_set():
                            failed.append(e)
                            stop.set()  # here, not where it is waited for: the main thread may be slow to wake up
                    raise

            largest_first = sorted(chosen, key=lambda tensor: -tensor.spec.nbytes)
            wait([pool.submit(work, tensor) for tensor in largest_first], return_when=FIRST_EXCEPTION)
            if failed:
                raise failed[0]

        try:
            findings = _survey(tensors, checkpoints, advance, block_elements, partial(on_threads, device="cpu"))

            def merge_one(tensor: TensorPlan) -> None:
                finding = findings.get(tensor.name)
                merge_tensor(
                    tensor,
                    checkpoints,
                    writer,
                    advance,
                    finding=finding,
                    block_elements=block_elements,
                    device=device,
                )

            on_threads(merge_one, open_tensors, "cpu" if device is None else device.name)
        finally:  # also on KeyboardInterrupt
            stop.set()
            pool.shutdown(cancel_futures=True)


def _one_lapack_thread(tensors: Sequence[TensorPlan]) -> AbstractContextManager[object]:
    """LAPACK's last bits depend on the number of its threads; and ours keep the cores busy already."""
    if all(t.method == COPY or METHODS[t.method].unit_of(t.name, t.shape) != "matrices" for t in tensors):
        return nullcontext()
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(1)
    return limits


def merge_tensor(
    tensor: TensorPlan,
    checkpoints: Sequence[Checkpoint],
    writer: CheckpointWriter,
    advance: Callable[[int], None] = lambda _: None,
    *,
    finding: Any = None,
    block_elements: int = BLOCK_ELEMENTS,
    device: "Device | None" = None,
) -> None:
    """Merge one tensor, completely.

    Args:
        tensor: its plan.
        checkpoints: the models, in the order of the plan.
        writer: gets the result.
        advance: told the bytes of input that are done.
        finding: what the method's survey over the whole model found for this tensor.
        block_elements: elements a block; a multiple of CHUNK_ELEMENTS.
        device: computes the methods that it has; None: all on the CPU.

    Raises:
        CheckpointError: naming the model's file, the tensor and the place of a NaN or infinity; or a tensor that should
            be equal in all models is not.
    """
    if tensor.mergekit is not None:
        from solera_merge.compat import merge_whole

        merge_whole(tensor, checkpoints, writer, advance)
        return
    if block_elements % CHUNK_ELEMENTS:
        raise ValueError(f"block_elements must be a multiple of {CHUNK_ELEMENTS}, found {block_elements}")
    if tensor.method == COPY:
        _copy(tensor, checkpoints, writer, advance, block_elements)
        return
    drift = np.zeros(2)
    if finding is not None:  # over the whole model: what is fused makes no difference
        _merge_blocks(tensor, 0, checkpoints, writer, advance, finding, block_elements, drift)
        return
    raw = _is_plain(tensor, checkpoints)
    begin = 0
    for piece in tensor.pieces:
        if raw:
            _merge_raw(piece, begin, checkpoints, writer, advance, block_elements, device, drift)
        else:
            _merge_blocks(piece, begin, checkpoints, writer, advance, None, block_elements, drift)
        begin += piece.spec.size


def _merge_blocks(
    tensor: TensorPlan,
    begin: int,
    checkpoints: Sequence[Checkpoint],
    writer: CheckpointWriter,
    advance: Callable[[int], None],
    finding: Any,
    block_elements: int,
    drift: npt.NDArray[np.float64],
    first: int = 0,
) -> None:
    """Through the readable formula, from the block that begins at `first` on.

    `begin` is where the tensor begins in what is stored and written; `drift` is added to.
    """
    from solera_merge.kernels.drift import add_drift_of_block

    streamed = StreamedTensor(tensor, checkpoints, block_elements, advance, begin)
    method = METHODS[tensor.method]
    keywords = method.keywords(tensor.parameters)
    infos = [checkpoints[s.model].tensors[s.name] for s in tensor.sources]
    item_bytes = sum(info.nbytes / max(info.size, 1) for info in infos)
    # An overflow is no warning here: the writer refuses what is not finite, by name.
    with np.errstate(over="ignore", invalid="ignore"):
        formula = method.function(streamed, *([] if method.survey is None else [finding]), **keywords)
        for block in streamed.blocks(method.unit_of(tensor.name, tensor.shape)):
            merged = formula(block)
            add_drift_of_block(merged, block.models[0] if block.base is None else block.base, drift)
            if block.start >= first:
                writer.annotate(tensor.name, relative(drift))
                _write(writer, tensor, begin + block.start, merged)
                advance(round(item_bytes * block.models[0].size))


def _write(writer: CheckpointWriter, tensor: TensorPlan, start: int, merged: Float32) -> None:
    from solera_merge.kernels.formats import CODES, narrow

    if tensor.dtype in CODES:
        values = np.ascontiguousarray(merged)
        raw = np.empty(values.size * ITEM_BYTES[tensor.dtype], np.uint8)
        if not narrow(values, values.size, raw, CODES[tensor.dtype], 0):
            writer.write_raw(tensor.name, start, raw, checked=True)
            return
    writer.write_flat(tensor.name, start, merged)  # says what is not finite or too large


def _survey(
    tensors: Sequence[TensorPlan],
    checkpoints: Sequence[Checkpoint],
    advance: Callable[[int], None],
    block_elements: int,
    on_threads: Callable[[Callable[[TensorPlan], None], Sequence[TensorPlan]], None],
) -> dict[str, Any]:
    """What the methods' surveys over the whole model find, by tensor; empty for methods without one."""
    findings: dict[str, Any] = {}
    ours = [tensor for tensor in tensors if tensor.method != COPY and tensor.mergekit is None]
    for name in dict.fromkeys(tensor.method for tensor in ours):
        survey = METHODS[name].survey
        if survey is not None:
            mine = [tensor for tensor in ours if tensor.method == name]
            streams = [StreamedTensor(tensor, checkpoints, block_elements, advance) for tensor in mine]
            found = survey(streams, [tensor.parameters for tensor in mine], _each(mine, on_threads))
            findings.update(zip((tensor.name for tensor in mine), found, strict=True))
    return findings


def _each(
    tensors: Sequence[TensorPlan],
    on_threads: Callable[[Callable[[TensorPlan], None], Sequence[TensorPlan]], None],
) -> Each:
    """`on_threads` for those who know the tensors by their numbers."""
    numbers = {tensor.name: i for i, tensor in enumerate(tensors)}

    def each(function: Callable[[int], None], chosen: Sequence[int]) -> None:
        on_threads(lambda tensor: function(numbers[tensor.name]), [tensors[i] for i in chosen])

    return each


def _is_plain(tensor: TensorPlan, checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether a fused twin of the method can work on the stored bytes."""
    from solera_merge.fused import has_twin
    from solera_merge.kernels.formats import CODES

    return (
        has_twin(tensor.method, tensor.parameters)
        and tensor.dtype in CODES
        and all(checkpoints[s.model].is_plain(s.name, tuple(CODES)) for s in tensor.sources)
    )


def _merge_raw(
    tensor: TensorPlan,
    begin: int,
    checkpoints: Sequence[Checkpoint],
    writer: CheckpointWriter,
    advance: Callable[[int], None],
    block_elements: int,
    device: "Device | None",
    drift: npt.NDArray[np.float64],
) -> None:
    """Through a twin of the formula, compiled or on a device: the same bits, sooner. `begin` as for `_merge_blocks`."""
    from solera_merge.fused import ROWS, NotFiniteError, merged_blocks

    method = METHODS[tensor.method]
    keywords = method.keywords(tensor.parameters)
    if device is not None and device.has(tensor.method):
        twin = device.merged_blocks
        stream = RawStream(
            tensor, checkpoints, device.block_elements, advance, buffers=2, buffer=device.buffer, begin=begin
        )
    else:
        twin = merged_blocks
        unit: Unit = "rows" if tensor.method in ROWS else "elements"
        step = block_starts(tensor.shape, unit, block_elements)[1] if tensor.spec.size else 1
        stream = RawStream(tensor, checkpoints, step, advance, begin=begin)
    before = drift.copy()
    with stream as raw:
        start = 0
        try:
            for block, out in twin(tensor.method, raw, tensor.dtype, keywords, drift):
                writer.annotate(tensor.name, relative(drift))
                writer.write_raw(tensor.name, begin + block.start, out, checked=True)
                raw.advance(block)
                start = block.start + block.n
            return
        except NotFiniteError:
            pass
    # Something is not finite: the readable formula meets it again and says what and where.
    drift[:] = before
    _merge_blocks(tensor, begin, checkpoints, writer, advance, None, block_elements, drift, first=start)


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
