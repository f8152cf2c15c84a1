"""What a stage will have written, as far as headers tell: config, names, shapes and dtypes; the weights are holes.

A whole recipe can so be planned, and refused, before its first stage has run: the planners read nothing but headers,
and cannot tell such a checkpoint from the one that will be.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from solera.stages import Stage
from solera_core.architecture import is_embedding, is_head, num_layers, ties_embeddings
from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.dtypes import FLOATS, SAFETENSORS_NAME
from solera_core.lora import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from solera_core.output import write_metadata
from solera_core.writer import TensorSpec, layout

__all__ = ["write_skeleton"]


def write_skeleton(stage: Stage, directory: Path, ctx: Context) -> None:
    """Write what `stage` would make into `directory`; nothing for a stage that makes no model.

    Raises:
        SoleraError: whatever the stage's own planner would refuse.
    """
    config: Any = stage.config
    match stage.kind:
        case "init":
            _write_init(directory, config)
        case "tune":
            _write_like(directory, open_checkpoint(config.model, ctx), config.dtype)
        case "merge" if getattr(config, "adapter", None) is not None:
            from solera_merge.adapters.merge import plan_merge_adapters

            rows = plan_merge_adapters(config, ctx).rows
            shapes = {row["module"]: row["shape"] for row in rows if isinstance(row["shape"], list)}
            _write_adapter(directory, {m: (s[0], s[1]) for m, s in shapes.items() if not is_embedding(f"{m}.weight")})
        case "extract-lora":
            from solera_merge.adapters.extract import linear_modules

            _write_adapter(directory, linear_modules(config, ctx))
        case "merge":
            from solera_merge.plan import make_plan

            plan, _ = make_plan(config, ctx)
            _write(directory, plan.config, plan.specs, plan.sidecars, plan.files)
        case "moe":
            from solera_merge.moe.inputs import open_inputs
            from solera_merge.moe.targets.target import Sizes
            from solera_merge.moe.write import moe_specs, torch_dtype_name

            inputs = open_inputs(config, ctx)
            trunk, experts, width = inputs.trunk, len(inputs.experts), inputs.width
            dtype = torch_dtype_name(trunk, config.dtype)
            content = inputs.target.config(
                trunk.fields, Sizes(experts, config.top_k, width, inputs.shared), dtype=dtype
            )
            specs = moe_specs(
                inputs.target, trunk, experts=experts, width=width, dtype=config.dtype, shared=inputs.shared
            )
            _write(directory, content, specs, trunk.checkpoint.sidecars)
        case "moe-prune" | "moe-merge-experts":
            from solera_merge.moe.size.shrink import shrunk_skeleton

            _write(directory, *shrunk_skeleton(config, ctx))
        case "moe-extract-lora":
            from solera_merge.moe.size.low_rank import extract_skeleton

            extract_skeleton(config, directory, ctx)
        case "route":
            from solera_merge.route.build import route_skeleton

            route_skeleton(config, directory, ctx)
        case "distill":
            _write_student(directory, open_checkpoint(config.student.from_, ctx), config)
        case _:
            pass


def _write_adapter(directory: Path, modules: Mapping[str, tuple[int, int]]) -> None:
    """A LoRA of rank 1 for every module (out, in): which of them changed, and by what rank, only values tell."""
    specs = [
        TensorSpec(f"{PREFIX}{module}.lora_{half}.weight", "F32", shape)
        for module, (rows, columns) in modules.items()
        for half, shape in (("A", (1, columns)), ("B", (rows, 1)))
    ]
    _write(directory, {}, specs, [])
    (directory / "model.safetensors").rename(directory / WEIGHTS_FILE)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": list(modules), "bias": "none"}
    (directory / CONFIG_FILE).write_text(json.dumps(settings), encoding="utf-8")


def _write(
    directory: Path,
    config: Mapping[str, Any],
    specs: Iterable[TensorSpec],
    sidecars: Iterable[Path],
    files: Mapping[str, bytes] | None = None,
) -> None:
    directory.mkdir(parents=True)
    (shard,) = layout(list(specs), shard_bytes=1 << 62)
    file = directory / shard.file
    file.write_bytes(shard.header)
    os.truncate(file, shard.nbytes)
    if config:  # files of weights have none
        write_metadata(directory, config=config, sidecars=sidecars, files=files)


def _write_like(directory: Path, model: Checkpoint, dtype: str | None, keep: list[int] | None = None) -> None:
    """The tensors of a model, in another dtype, or of some of its layers only."""
    config, names = model.config, {name: name for name in model.tensors}
    if keep is not None:
        from solera_distill.student import renumbered, shortened_config

        config = shortened_config(config, keep, model.ref)
        names = {old: new for old in names if (new := renumbered(old, keep)) is not None}
    specs = [
        TensorSpec(new, SAFETENSORS_NAME[dtype] if dtype and info.dtype in FLOATS else info.dtype, info.shape)
        for old, new in names.items()
        for info in [model.tensors[old]]
    ]
    config |= {"dtype": dtype} if dtype else {}
    _write(directory, config, specs, model.sidecars)


def _write_student(directory: Path, start: Checkpoint, config: Any) -> None:
    keep: list[int] | None = None
    if config.student.layer_drop is not None:
        from solera_distill.student import layers_to_keep

        layers = num_layers(start.config) or 0
        wanted = layers_to_keep(config.student.layer_drop, layers, start.ref)
        # Which layers stay is found by running the model; the first and the last do.
        keep = wanted if isinstance(wanted, list) else [*range(wanted - 1), layers - 1]
    _write_like(directory, start, config.dtype, keep)


def _write_init(directory: Path, config: Any) -> None:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    from solera_distill.init import build_config, build_model

    settings = build_config(config.architecture, config.config, tokens=config.tokenizer.vocab_size)
    with torch.device("meta"):
        model = build_model(settings, seed=0)
    content = json.loads(model.config.to_json_string()) | {"dtype": config.dtype}
    tied = ties_embeddings(content)
    specs = [
        TensorSpec(name, SAFETENSORS_NAME[config.dtype] if tensor.is_floating_point() else "I64", tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if not (tied and is_head(name))
    ]
    _write(directory, content, specs, [])
    Tokenizer(BPE()).save(str(directory / "tokenizer.json"))  # the real one is trained when the stage runs
