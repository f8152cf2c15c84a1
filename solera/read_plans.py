"""What the commands that only read would read: `--dry-run` of gate, inspect, diff and verify."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from solera.diffing import open_all
from solera.rebuild import plan_rebuild
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import DataError
from solera_core.hub import resolve, split_adapter
from solera_core.lora import CONFIG_FILE, is_adapter, open_stored
from solera_core.plan import Plan
from solera_core.provenance import read_provenance

__all__ = ["plan_diff", "plan_gate", "plan_inspect", "plan_verify"]

_BLOCKS_BYTES: Final = 1 << 26  # of the values that are compared or hashed at a time


def plan_gate(baseline: Path, candidate: Path, policy: Any) -> Plan:
    """The two result directories, and the resolved policy.

    Raises:
        DataError: a file that is not there.
    """
    files = [directory / name for directory in (baseline, candidate) for name in ("results.json", "items.jsonl")]
    if absent := [file for file in files if not file.is_file()]:
        raise DataError(f"{absent[0]}: no such file; {absent[0].parent} is not a result directory")
    reads = _rows(files)
    return _plan("gate", reads, 4 * sum(row["bytes"] for row in reads), policy.model_dump(mode="json"))


def plan_inspect(model: str, ctx: Context) -> Plan:
    """Config and weight files of a checkpoint, of which headers are read.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    if split_adapter(model, ctx) is None and is_adapter(resolve(model, ctx, weights="later").path):
        adapter = open_stored(model, ctx)
        weights = {info.file for info in adapter.source.tensors.values()}
        reads = _rows([adapter.directory / CONFIG_FILE, *sorted(weights)])
        return _plan("inspect", [{**r, "headers only": Path(r["path"]) in weights} for r in reads], 0, {"model": model})
    checkpoint = open_checkpoint(model, ctx)
    files = {info.file for info in checkpoint.tensors.values()}
    reads = _rows([checkpoint.path / "config.json", *sorted(files), *checkpoint.sidecars])
    return _plan("inspect", [{**row, "headers only": Path(row["path"]) in files} for row in reads], 0, {"model": model})


def plan_diff(refs: Sequence[str], ctx: Context) -> Plan:
    """The base and the models, every tensor of which is read.

    Raises:
        CheckpointError: as `open_checkpoint`, of every model.
    """
    reads: list[dict[str, Any]] = []
    for checkpoint in open_all(refs, ctx):
        size = sum(info.nbytes for info in checkpoint.tensors.values())
        reads.append(
            {
                "what": checkpoint.ref,
                "path": str(checkpoint.path),
                "bytes": size,
                "download_bytes": checkpoint.missing_bytes,
                "tensors": len(checkpoint.tensors),
            }
        )
    return _plan("diff", reads, _BLOCKS_BYTES, {"base": refs[0], "models": list(refs[1:])})


def plan_verify(directory: Path, ctx: Context, *, rebuild: bool) -> Plan:
    """Every file of the directory; with `rebuild`, also what making it again needs.

    Raises:
        CheckpointError: not a directory that solera made.
        SoleraError: what the stage's own planner refuses.
    """
    record = read_provenance(directory)
    reads = _rows(sorted(p for p in directory.rglob("*") if p.is_file()))
    parameters = {"directory": str(directory), "rebuild": rebuild, "kind": record["kind"]}
    plan = _plan("verify", reads, _BLOCKS_BYTES, parameters)
    if not rebuild:
        return plan
    again = plan_rebuild(directory, ctx)
    return Plan(
        stage="verify",
        reads=[*plan.reads, *again.reads],
        writes=[{**row, "what": f"{row['what']} (in a temporary folder)"} for row in again.writes],
        memory_bytes=again.memory_bytes,
        disk_bytes=again.disk_bytes,
        parameters={**parameters, "recipe": again.parameters},
        rows=again.rows,
        warnings=again.warnings,
    )


def _rows(files: Iterable[Path]) -> list[dict[str, Any]]:
    return [{"what": file.name, "path": str(file), "bytes": file.stat().st_size} for file in files]


def _plan(stage: str, reads: list[dict[str, Any]], memory_bytes: int, parameters: dict[str, Any]) -> Plan:
    return Plan(stage, reads=reads, writes=[], memory_bytes=memory_bytes, disk_bytes=0, parameters=parameters)
