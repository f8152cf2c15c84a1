"""The stages `tune`, `distill` and `init`: recipe in, verified checkpoint out."""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from solera_core.architecture import layer_of, num_layers, text_config
from solera_core.checkpoint import Checkpoint, open_checkpoint
from solera_core.context import Context
from solera_core.data import DataSource, check_source, data_path, path_bytes, read_documents
from solera_core.digest import json_digest
from solera_core.dtypes import FLOATS, SAFETENSORS_NAME
from solera_core.errors import CheckpointError, ConfigError, ResourceError
from solera_core.output import InputRecord, check_output, data_record, input_record, write_provenance
from solera_core.plan import Plan
from solera_core.shards import find_weights, read_headers
from solera_core.staging import RESUME_KEY_FILE, check_apart, check_target, require_disk, staged
from solera_distill.config import (
    DistillConfig,
    InitConfig,
    LayerDrop,
    Objective,
    TeacherConfig,
    TrainingConfig,
    TuneConfig,
)
from solera_distill.pool import find_pool, pool_records, route_by_pool
from solera_merge.moe.targets.choice import TARGETS

if TYPE_CHECKING:
    from solera_distill.batches import Corpus

__all__ = ["distill", "init", "plan_distill", "plan_init", "plan_tune", "tune"]

_WORK: Final = ".work"
"""Folder in the staging directory for what is not part of the output."""


def tune(config: TuneConfig, out: Path, ctx: Context) -> Path:
    """Fine-tune one model on text and write it to `out`.

    Raises:
        SoleraError: bad input, a diverged training, or a full disk; `out` is then as it was.
    """
    return _Training("tune", config, config.model, ctx).run(out)


def plan_tune(config: TuneConfig, ctx: Context) -> Plan:
    """What `tune` would read, write and need."""
    return _Training("tune", config, config.model, ctx).plan()


def distill(config: DistillConfig, out: Path, ctx: Context) -> Path:
    """Teach a student what its teachers know and write it to `out`.

    Raises:
        SoleraError: bad input, a diverged training, or a full disk; `out` is then as it was.
    """
    return _distillation(config, ctx).run(out)


def plan_distill(config: DistillConfig, ctx: Context) -> Plan:
    """What `distill` would read, write and need."""
    return _distillation(config, ctx).plan()


def _distillation(config: DistillConfig, ctx: Context) -> "_Training":
    return _Training(
        "distill", config, config.student.from_, ctx, config.teachers, config.objective, config.student.layer_drop
    )


class _Training:
    """One `tune` or `distill`: its inputs opened and checked as far as headers and configs tell."""

    def __init__(
        self,
        kind: str,
        config: TrainingConfig,
        student: str,
        ctx: Context,
        teachers: Sequence[TeacherConfig] = (),
        objective: Objective = Objective(kl=0.0, ce=1.0),  # noqa: B008  (frozen)
        drop: LayerDrop | None = None,
    ) -> None:
        self.kind = kind
        self.config = config
        self.ctx = ctx
        self.teachers = teachers
        self.objective = objective
        self.drop = drop
        self.student = open_checkpoint(student, ctx)
        self.pool = find_pool(teachers, ctx)
        if self.pool is None:
            self.teacher_checkpoints = [open_checkpoint(t.model, ctx) for t in teachers]
        else:
            self.teacher_checkpoints = list(self.pool.specialists.values())
        for checkpoint in (self.student, *self.teacher_checkpoints):
            _check_trainable(checkpoint, config.sequence_tokens)
        if config.balance:
            _check_balanced(self.student)
        self.keep = self._keep()

    def _keep(self) -> int | list[int] | None:
        if self.drop is None:
            return None
        from solera_distill.student import layers_to_keep

        layers = num_layers(self.student.config)
        if layers is None:
            raise CheckpointError(f"{self.student.ref}: its config does not say how many layers it has")
        return layers_to_keep(self.drop, layers, self.student.ref)

    def plan(self) -> Plan:
        config = self.config
        sources = [("data", s) for s in config.data] + [("eval_data", s) for s in config.eval_data or ()]
        reads = [_model_row(self.student)] + [_model_row(c) for c in self.teacher_checkpoints]
        reads += [_model_row(self.pool.base)] if self.pool is not None and self.pool.base is not None else []
        reads += [_data_row(name, s, self.ctx.base_dir) for name, s in sources]
        layers = num_layers(self.student.config) or 1
        kept = self.keep if isinstance(self.keep, int) else len(self.keep or range(layers))
        tensors = self.student.tensors.items()
        parameters = sum(t.size for name, t in tensors if layer_of(name) is None)
        parameters += round(sum(t.size for name, t in tensors if layer_of(name) is not None) * kept / layers)
        out_bytes = parameters * (4 if self.dtype == "float32" else 2)
        best_bytes = parameters * 4 if config.keep_best else 0
        state_bytes = parameters * 12 + best_bytes
        taught = {c.path: c for c in self.teacher_checkpoints}.values() if self.objective.kl else ()
        teacher_bytes = sum(t.size for c in taught for t in c.tensors.values())
        teacher_bytes *= 4 if config.precision == "float32" else 2
        return Plan(
            stage=self.kind,
            reads=reads,
            writes=[
                {"what": "weights", "bytes": out_bytes},
                {"what": "state of the run, while it runs", "bytes": state_bytes},
            ],
            memory_bytes=parameters * 16 + best_bytes + teacher_bytes + self._activation_bytes(kept),
            disk_bytes=out_bytes + 2 * state_bytes,
            parameters={
                **_recipe(config),
                "dtype": self.dtype,
                "steps": math.ceil(config.tokens / config.tokens_per_step),
                "layers": self.keep if self.keep is not None else layers,
                "seed": self.ctx.seed,
            },
            warnings=self._warnings(),
        )

    def _activation_bytes(self, layers: int) -> int:
        """What a micro-batch of a decoder keeps for its backward pass, roughly, and the chunks of the loss."""
        inner = text_config(self.student.config)
        width = int(inner.get("hidden_size") or 0)
        feed_forward = int(inner.get("intermediate_size") or 4 * width)
        experts = int(inner.get("num_experts_per_tok") or 1)
        tokens = min(self.config.micro_batch_tokens, self.config.tokens_per_step + self.config.sequence_tokens)
        return 4 * tokens * layers * (18 * width + 5 * feed_forward * experts) + (1 << 27)

    def _warnings(self) -> list[str]:
        warnings: list[str] = []
        if self.objective.kl and self.objective.temperature != 1.0:
            warnings.append("temperature differs from 1, which is right for language models (arXiv 2502.08606)")
        if self.config.eval_data is None:
            warnings.append("no eval_data: nothing will say whether the training helped; a falling loss does not")
        return warnings

    @property
    def dtype(self) -> str:
        """Of the written weights: as asked for, or as most of the bytes of the student's checkpoint."""
        if self.config.dtype is not None:
            return self.config.dtype
        count: Counter[str] = Counter()
        for tensor in self.student.tensors.values():
            count[tensor.dtype] += tensor.nbytes
        stored = count.most_common(1)[0][0]
        return next(
            (name for name, short in SAFETENSORS_NAME.items() if short == stored and name != "float64"), "float32"
        )

    def records(self) -> list[InputRecord]:
        """What goes in, with digests."""
        base_dir = self.ctx.base_dir
        found = [input_record(self.student, "student" if self.teachers else "model")]
        if self.pool is not None:
            found += pool_records(self.pool, self.teachers[0].model, self.ctx)
        else:
            found += self._teacher_records()
        found += [data_record("data", s, base_dir) for s in self.config.data]
        return found + [data_record("eval_data", s, base_dir) for s in self.config.eval_data or ()]

    def _teacher_records(self) -> list[InputRecord]:
        return [
            input_record(c, f"teacher {t.domain}" if t.domain else "teacher")
            for t, c in zip(self.teachers, self.teacher_checkpoints, strict=True)
        ]

    def run(self, out: Path) -> Path:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ResourceError(
                f"{self.kind}: was started in {os.environ['WORLD_SIZE']} processes, but stages run in one process for "
                "now; start it without `accelerate launch` or `torchrun`"
            )
        check_target(out, overwrite=self.ctx.overwrite)
        models = [d for c in (self.student, *self.teacher_checkpoints) for d in c.directories]
        models += [] if self.pool is None else self.pool.directories
        check_apart(out, models, _files([*self.config.data, *(self.config.eval_data or ())], self.ctx.base_dir))
        require_disk(out, self.plan().disk_bytes)
        records = self.records()
        recipe = _recipe(self.config)
        key = self._resume_key(recipe, records)
        with staged(out, overwrite=self.ctx.overwrite, resume_key=key) as staging:
            work = staging / _WORK
            _keep_only(staging, {_WORK, RESUME_KEY_FILE})
            checks = self._train(staging, work)
            shutil.rmtree(work)
            checks = {**check_output(staging, trust_remote_code=self.ctx.trust_remote_code), **checks}
            write_provenance(
                staging, kind=self.kind, recipe=recipe, seed=self.ctx.seed, inputs=records, tensors=None, checks=checks
            )
        return out

    def _resume_key(self, recipe: Mapping[str, Any], records: Sequence[InputRecord]) -> str:
        """Everything that the bytes of the output depend on; a state of another key is thrown away."""
        import torch
        import transformers

        threads = self.ctx.threads or torch.get_num_threads()
        versions = [torch.__version__, transformers.__version__, str(threads), str(torch.cuda.is_available())]
        inputs = [[r.name, r.ref, r.digest] for r in records]
        return json_digest(
            {"kind": self.kind, "recipe": recipe, "seed": self.ctx.seed, "inputs": inputs, "with": versions}
        )

    def _train(self, staging: Path, work: Path) -> dict[str, Any]:
        from accelerate import Accelerator

        from solera_core.causal_lm import load_model, load_tokenizer, save_model
        from solera_distill import parts
        from solera_distill.balance import router_modules
        from solera_distill.loop import Settings, deterministic, least_heldout, train
        from solera_distill.objective import StudentWithObjective, check_head, experts_for, output_matrix
        from solera_distill.state import StateFolder
        from solera_distill.teaching import check_taught, check_tokenizers, check_vocabulary, route_by_domain
        from solera_distill.text import heldout_corpus, read_groups, training_corpus

        config, ctx = self.config, self.ctx
        tokenizer: Any = load_tokenizer(self.student.path, trust_remote_code=ctx.trust_remote_code)
        for checkpoint in self.teacher_checkpoints:
            theirs = load_tokenizer(checkpoint.path, trust_remote_code=ctx.trust_remote_code)
            check_tokenizers(theirs, tokenizer, checkpoint.ref, self.student.ref)
        tokenizer.model_max_length = 1 << 40  # long documents are cut here: transformers need not warn of them
        text = read_groups(config.data, ctx.base_dir)
        if self.pool is not None:
            route = route_by_pool(self.pool, text.all, ctx)
        else:
            route = route_by_domain(self.teachers) if self.teachers else _same_route
        corpus = training_corpus(text, tokenizer, config.sequence_tokens, route=route, progress=ctx.progress)
        if self.pool is None:
            check_taught(self.teachers, [p.route for p in corpus.pieces])
        heldout = None
        if config.eval_data is not None:
            held = read_groups(config.eval_data, ctx.base_dir)
            heldout = heldout_corpus(held, text, tokenizer, config.sequence_tokens)
        work.mkdir(exist_ok=True)
        accelerator = Accelerator()
        with deterministic(ctx.threads):
            checks: dict[str, Any] = {"data": _data_check(corpus)}
            source = self._student_directory(work, corpus, accelerator.device, checks)
            model = load_model(source, trust_remote_code=ctx.trust_remote_code)
            loaded: dict[Path, Any] = {}
            directories = [self._directory(c, work) for c in self.teacher_checkpoints] if self.objective.kl else []
            for directory in directories:
                if directory not in loaded:
                    loaded[directory] = load_model(
                        directory, dtype=config.precision, trust_remote_code=ctx.trust_remote_code
                    ).requires_grad_(False)
            for any_model, where in [(model, self.student.ref), *((m, str(d)) for d, m in loaded.items())]:
                check_vocabulary(tokenizer, output_matrix(any_model).shape[0], where)
                experts_for(any_model, accelerator.device)
                check_head(any_model, where)
            part_of = parts.freeze_all_but(model, config.parts)
            groups = parts.groups(model, part_of, lr_parts=config.lr_parts, weight_decay=config.weight_decay)
            log = train(
                StudentWithObjective(
                    model,
                    kl=self.objective.kl,
                    ce=self.objective.ce,
                    temperature=self.objective.temperature,
                    autocast=config.precision == "bfloat16",
                    balance=config.balance,
                    routers=router_modules(model, self.student.ref) if config.balance else (),
                ),
                groups,
                corpus,
                Settings(
                    seed=ctx.seed,
                    tokens=config.tokens,
                    tokens_per_step=config.tokens_per_step,
                    micro_batch_tokens=config.micro_batch_tokens,
                    lr=config.lr,
                    schedule=config.schedule,
                    warmup=config.warmup,
                    final_lr=config.final_lr,
                    betas=config.betas,
                    clip=config.clip,
                    save_every=config.save_every,
                    bfloat16=config.precision == "bfloat16",
                    keep_best=config.keep_best,
                    patience=config.patience,
                ),
                teachers=[loaded[d] for d in directories],
                heldout=heldout,
                states=StateFolder(work / "states"),
                progress=ctx.progress,
                accelerator=accelerator,
            )
            save_model(model.cpu(), staging, like=source, dtype=self.dtype, sidecars_from=self.student.path)
        (staging / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
        rows = [row["heldout"] for row in log if "heldout" in row]
        if config.keep_best:
            kept = least_heldout(log)
            rows.append(kept["heldout"])
            checks["kept_at_tokens"] = kept["tokens"]
        if rows:
            checks |= {"heldout_nll_before": rows[0]["nll"], "heldout_nll_after": rows[-1]["nll"]}
            if "domains" in rows[0]:
                checks |= {
                    "heldout_nll_before_by_domain": rows[0]["domains"],
                    "heldout_nll_after_by_domain": rows[-1]["domains"],
                }
        return checks

    def _student_directory(self, work: Path, corpus: "Corpus", device: Any, checks: dict[str, Any]) -> Path:
        """A directory with the student as it starts; `checks` gets what was chosen."""
        if self.keep is None:
            return self._directory(self.student, work)
        from solera_distill.student import write_layers

        chosen = work / "layers.json"
        if isinstance(self.keep, list):
            checks["layers_kept"] = self.keep
        elif chosen.exists():
            checks |= json.loads(chosen.read_text(encoding="utf-8"))
        else:
            found = self._choose_layers(self.keep, work, corpus, device)
            scratch = chosen.with_suffix(".new")
            scratch.write_text(json.dumps(found), encoding="utf-8")
            scratch.rename(chosen)
            checks |= found
        target = work / "student"
        if target.exists():
            shutil.rmtree(target)
        write_layers(self.student, checks["layers_kept"], target)
        return target

    def _choose_layers(self, wanted: int, work: Path, corpus: "Corpus", device: Any) -> dict[str, Any]:
        from solera_core.causal_lm import load_model
        from solera_distill.batches import Corpus, Cursor, Order
        from solera_distill.heldout import HeldOut, measure
        from solera_distill.objective import experts_for
        from solera_distill.skipping import layer_stack, without_layers
        from solera_distill.student import choose_layers

        assert self.drop is not None
        layers = num_layers(self.student.config) or 0
        model: Any = load_model(self._directory(self.student, work), trust_remote_code=self.ctx.trust_remote_code)
        model.to(device)
        experts_for(model, device)
        stack = layer_stack(model, layers, self.student.ref)
        pieces, _ = Order(corpus, self.ctx.seed).take(Cursor(), min(self.drop.calibration_tokens, corpus.tokens))
        routes = sorted({p.route for p in corpus.pieces})
        sample = HeldOut(Corpus(pieces, corpus.weights, 0, 0), [str(r) for r in range(routes[-1] + 1)])

        def loss_without(gone: frozenset[int]) -> float:
            with without_layers(stack, gone):
                row = measure(model, sample, limit=self.config.micro_batch_tokens, bfloat16=False, device=device)
            return float(row["nll"])

        kept, losses = choose_layers(layers, wanted, loss_without)
        self.ctx.progress.note(
            f"layers kept: {kept} of {layers}; loss {losses[0]:.3f} -> {losses[-1]:.3f} before training"
        )
        return {"layers_kept": kept, "layer_drop_nll": losses}

    def _directory(self, checkpoint: Checkpoint, work: Path) -> Path:
        """A directory that transformers loads as exactly this checkpoint: its own, or one written here.

        Written where weights are pickled, adapters are laid over them, or a redundant tied head is stored.
        """
        weights = find_weights(checkpoint.path, allow_pickle=self.ctx.allow_pickle)
        plain = not weights.pickled and not any(checkpoint.is_derived(n) for n in checkpoint.tensors)
        if plain and read_headers(weights).keys() == checkpoint.tensors.keys():
            return checkpoint.path
        from solera_distill.student import write_layers

        target = work / f"model-{json_digest([checkpoint.ref]).removeprefix('blake3:')[:16]}"
        if target.exists():
            shutil.rmtree(target)
        write_layers(checkpoint, None, target)
        return target


def _keep_only(directory: Path, names: Collection[str]) -> None:
    """Remove what a killed run had begun to write beside its state."""
    for path in directory.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _same_route(_: object) -> int:
    return 0


def _data_check(corpus: "Corpus") -> dict[str, int]:
    return {
        "documents": corpus.documents,
        "documents_cut": corpus.cut_documents,
        "pieces": len(corpus.pieces),
        "tokens": corpus.tokens,
    }


def _check_trainable(checkpoint: Checkpoint, sequence_tokens: int) -> None:
    config = text_config(checkpoint.config)
    if "quantization_config" in checkpoint.config:
        raise CheckpointError(
            f"{checkpoint.ref}: is quantised; only full-precision models can be trained or teach here"
        )
    odd = next(
        (
            t
            for t in checkpoint.tensors.values()
            if t.dtype.startswith("F8") or t.dtype not in (*FLOATS, "I64", "I32", "BOOL")
        ),
        None,
    )
    if odd is not None:
        raise CheckpointError(
            f"{checkpoint.ref}: tensor {odd.name!r} is stored as {odd.dtype}; dequantise the model first"
        )
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and sequence_tokens > longest:
        raise ConfigError(
            f"sequence_tokens: {sequence_tokens} is more than {checkpoint.ref} was made for "
            f"(max_position_embeddings {longest})"
        )


def _check_balanced(checkpoint: Checkpoint) -> None:
    kind = text_config(checkpoint.config).get("model_type")
    if kind not in TARGETS:
        raise ConfigError(
            f"balance: {checkpoint.ref} is a {kind}, no mixture of experts whose routers are known here "
            f"({', '.join(TARGETS)}); leave balance out"
        )


def _model_row(checkpoint: Checkpoint) -> dict[str, Any]:
    size = sum(t.nbytes for t in checkpoint.tensors.values())
    return {"what": checkpoint.ref, "path": str(checkpoint.path), "bytes": size, "kind": "model"}


def _data_row(name: str, source: DataSource, base_dir: Path) -> dict[str, Any]:
    """One data source; a missing file is an error in a plan too."""
    path = data_path(source, base_dir)
    if path is None:
        return {"what": source.path, "path": source.path, "bytes": None, "kind": name, "note": "not fetched yet"}
    check_source(source, base_dir=base_dir)
    return {"what": source.path, "path": str(path), "bytes": path_bytes(path), "kind": name}


def _files(sources: Sequence[DataSource], base_dir: Path) -> list[Path]:
    return [path for source in sources if (path := data_path(source, base_dir)) is not None]


def _recipe(config: TrainingConfig | InitConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True)


def plan_init(config: InitConfig, ctx: Context) -> Plan:
    """What `init` would read, write and need."""
    from solera_distill.init import build_config, count_parameters

    parameters = count_parameters(build_config(config.architecture, config.config, tokens=config.tokenizer.vocab_size))
    size = parameters * (4 if config.dtype == "float32" else 2)
    return Plan(
        stage="init",
        reads=[_data_row("tokenizer.data", s, ctx.base_dir) for s in config.tokenizer.data],
        writes=[{"what": "weights", "bytes": size}],
        memory_bytes=parameters * 8,
        disk_bytes=size,
        parameters={**_recipe(config), "parameters": parameters, "seed": ctx.seed},
    )


def init(config: InitConfig, out: Path, ctx: Context) -> Path:
    """Train a tokenizer, draw a model at random, and write both to `out`.

    Raises:
        SoleraError: bad input or a full disk; `out` is then as it was.
    """
    from solera_core.causal_lm import save_model
    from solera_distill.init import build_config, build_model
    from solera_distill.tokenizer import save_tokenizer, train_tokenizer

    check_target(out, overwrite=ctx.overwrite)
    check_apart(out, [], _files(config.tokenizer.data, ctx.base_dir))
    require_disk(out, plan_init(config, ctx).disk_bytes)
    wanted = config.tokenizer
    records = [data_record("tokenizer.data", s, ctx.base_dir) for s in wanted.data]
    documents = read_documents(wanted.data, base_dir=ctx.base_dir)
    tokenizer = train_tokenizer(
        documents,
        vocab_size=wanted.vocab_size,
        split_digits=wanted.split_digits,
        special_tokens=wanted.special_tokens,
        chat_template=wanted.chat_template,
        model_max_length=config.config.get("max_position_embeddings"),
    )
    if len(tokenizer) < wanted.vocab_size:
        ctx.progress.note(f"the text gave {len(tokenizer)} tokens of the {wanted.vocab_size} asked for")
    model = build_model(build_config(config.architecture, config.config, tokens=len(tokenizer)), seed=ctx.seed)
    with staged(out, overwrite=ctx.overwrite) as staging:
        work = staging / _WORK
        save_tokenizer(tokenizer, work)
        save_model(model, staging, like=None, dtype=config.dtype, sidecars_from=work)
        shutil.rmtree(work)
        checks = check_output(staging)
        write_provenance(
            staging, kind="init", recipe=_recipe(config), seed=ctx.seed, inputs=records, tensors=None, checks=checks
        )
    return out
