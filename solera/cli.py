"""The `solera` command. Every heavy import happens inside the command that needs it."""

import atexit
import errno
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from solera_core.context import Context
from solera_core.errors import ResourceError, SoleraError
from solera_core.version import __version__

__all__ = ["app", "main"]

EXIT_CODES = (
    "Exit codes: 0 right, 1 a gate failed, 2 a gate was inconclusive, 3 bad input, "
    "4 environment (disk, memory, network), 70 a bug of solera, 130 interrupted."
)

INTERRUPTED = 130
BUG = 70
"""EX_SOFTWARE of sysexits.h. Not Python's own 1, which means here that a gate failed."""

atexit.register(gc.freeze)  # else Python looks for cycles in all it has loaded before it leaves: 0.3 s of every merge

app = typer.Typer(
    name="solera",
    help="Blend fine-tuned checkpoints, distil the blend, prove that quality held, publish.\n\n" + EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan (reads, writes, memory, disk, every parameter) and stop.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else goes to stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Root of all randomness (default: the recipe's, else 0).")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output of solera, atomically, at the end.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin weights through torch's weights_only loader.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let Python code inside a checkpoint run. Only for code you have read."),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Worker threads (default: all cores).")]
Jobs = Annotated[
    int, typer.Option("--jobs", "-j", min=1, help="Stages that do not read each other run side by side, this many.")
]
Config = Annotated[Path, typer.Argument(help="YAML file with the settings.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="Output directory; must not exist.", show_default=False)]


def _context(base_dir: Path, seed: int | None, quiet: bool, **options: Any) -> Context:
    from solera.console import make_progress

    return Context(seed=seed or 0, base_dir=base_dir, progress=make_progress(quiet=quiet), **options)


def _emit(result: dict[str, Any], *, as_json: bool, text: str) -> None:
    print(json.dumps(result, indent=2) if as_json else text)  # noqa: T201  (results belong on stdout)


def _stage_command(kind: str, summary: str) -> Callable[..., None]:
    """One command per kind of stage that turns a settings file into an output directory."""

    def command(
        config: Config,
        out: Out,
        dry_run: DryRun = False,
        as_json: Json = False,
        seed: Seed = None,
        quiet: Quiet = False,
        overwrite: Overwrite = False,
        allow_pickle: AllowPickle = False,
        trust_remote_code: TrustRemoteCode = False,
        threads: Threads = None,
    ) -> None:
        _stage(
            kind,
            config,
            out,
            dry_run=dry_run,
            as_json=as_json,
            seed=seed,
            quiet=quiet,
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            threads=threads,
        )

    command.__doc__ = summary
    return command


def _stage(
    kind: str,
    config: Path,
    out: Path,
    *,
    dry_run: bool,
    as_json: bool,
    seed: int | None,
    quiet: bool,
    keep_intermediate: Path | None = None,
    **options: Any,
) -> None:
    """Plan or run one stage; `options` are fields of the context."""
    from solera.stages import all_problems, plan_stage, read_stage, run_stage
    from solera_core.errors import ConfigError
    from solera_core.staging import check_apart, check_target

    try:
        parsed, base_dir = read_stage(kind, config)
    except ConfigError as e:
        raise all_problems(kind, config, e, _context(Path(), seed, quiet, **options)) from e
    if keep_intermediate is not None:
        if "documents" not in type(parsed).model_fields:
            raise ConfigError(f"--keep-intermediate: {config} holds a single merge, which makes nothing in between")
        parsed = parsed.model_copy(update={"keep_intermediate": keep_intermediate})
    ctx = _context(base_dir, seed, quiet, **options)
    check_target(out, overwrite=ctx.overwrite)
    if dry_run:
        plan = plan_stage(kind, parsed, ctx)
        read = [Path(row["path"]) for row in plan.reads if "path" in row]
        check_apart(out, [path for path in read if (path / "config.json").exists()], read)
        _show_plan(plan, as_json=as_json)
        return
    written = run_stage(kind, parsed, out, ctx)
    provenance = json.loads((written / "solera.json").read_text(encoding="utf-8"))
    page = _moe_page(written, as_json=as_json) if kind == "moe" else {}
    _emit(
        {"out": str(written), "kind": kind, "digest": provenance["digest"], "checks": provenance["checks"], **page},
        as_json=as_json,
        text=f"{written}: written and checked ({provenance['digest'][:19]}...)",
    )


def _moe_page(out: Path, *, as_json: bool) -> dict[str, str]:
    """Write the page of a MoE that was measured, and print its table; where the page is."""
    from solera.moe_report import page_beside, read_mixture, reading, summary_rows, worth
    from solera.report import RunSummary, write_report

    mixture = read_mixture(out, out.name)
    if mixture is None:
        return {}
    page = page_beside(out)
    write_report(RunSummary(title=f"mixture of experts: {out.name}", mixtures=[mixture]), page)
    if not as_json:
        from solera.console import print_rows

        print_rows("on held-out text, less is better", summary_rows(mixture))
        print("\n".join([*reading(mixture), worth(mixture)]))  # noqa: T201
        print(f"{page}: the report")  # noqa: T201
    return {"report": str(page)}


def _show_plan(plan: Any, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan.to_json(), indent=2))  # noqa: T201
    else:
        from solera.console import print_plan

        print_plan(plan)


@app.command("merge")
def merge_command(
    config: Config,
    out: Out,
    dry_run: DryRun = False,
    as_json: Json = False,
    seed: Seed = None,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    threads: Threads = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Bound of the memory, e.g. 512MB (default: a quarter of what is free, at most 2GB)."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where the hot methods compute: cpu, or what torch calls it (cuda, cuda:1, mps).")
    ] = "cpu",
    compat: Annotated[
        str | None,
        typer.Option(help="`mergekit`: its own methods on whole tensors, for the same bytes, rounding included."),
    ] = None,
    attest: Annotated[
        bool, typer.Option("--attest", help="Hash every byte of the inputs, not only samples of large ones.")
    ] = False,
    no_reload_check: Annotated[
        bool, typer.Option("--no-reload-check", help="Do not load the output through transformers.")
    ] = False,
    keep_intermediate: Annotated[
        Path | None,
        typer.Option(
            "--keep-intermediate", help="Where to keep what the named documents of the file make (default: nowhere)."
        ),
    ] = None,
    no_fsync: Annotated[
        bool, typer.Option("--no-fsync", help="Do not wait for the disk: a power cut soon after may lose the output.")
    ] = False,
) -> None:
    """Merge checkpoints into one (reads mergekit's YAML)."""
    from solera_core.sizes import parse_bytes

    gc.disable()  # this process ends with the merge, and leaves no cycles worth a twentieth of its time
    _stage(
        "merge",
        config,
        out,
        dry_run=dry_run,
        as_json=as_json,
        seed=seed,
        quiet=quiet,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        threads=threads,
        memory_bytes=None if memory is None else parse_bytes(memory, where="--memory"),
        device=device,
        compat=compat,
        attest=attest,
        reload_check=not no_reload_check,
        flush=not no_fsync,
        keep_intermediate=keep_intermediate,
    )


@app.command("extract-lora")
def extract_lora_command(
    base: Annotated[str, typer.Argument(help="The model that the adapter will be for.", show_default=False)],
    fine_tuned: Annotated[str, typer.Argument(help="Its fine-tune.", show_default=False)],
    out: Out,
    rank: Annotated[int | None, typer.Option(help="Rank of every update.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the share of the squared norm of each change to keep, e.g. 0.95.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="Bound of the ranks that --energy leads to.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Only modules whose name this regular expression matches.")
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Not the modules that this regular expression matches.")] = None,
    embeddings: Annotated[
        str, typer.Option(help="A changed embedding or head: save (in full), lora, or skip.")
    ] = "save",
    modules_to_save: Annotated[
        str, typer.Option(help="Changed norms and the like: auto (saved in full), or none of them.")
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Of the adapter: float32, float16, bfloat16 (default: that of the models).")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    seed: Seed = None,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    threads: Threads = None,
) -> None:
    """Write the difference of two models as a LoRA adapter, with the error of every tensor."""
    from solera_core.staging import check_target
    from solera_core.strict import parse
    from solera_merge.adapters.extract import ExtractConfig, extract_lora, plan_extract

    settings = {
        "base_model": base,
        "model": fine_tuned,
        "rank": rank,
        "energy": energy,
        "max_rank": max_rank,
        "target_modules": target_modules,
        "exclude": exclude,
        "embeddings": embeddings,
        "modules_to_save": modules_to_save,
        "dtype": dtype,
    }
    config = parse(ExtractConfig, settings, where="extract-lora")
    ctx = _context(
        Path(),
        seed,
        quiet,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        threads=threads,
    )
    check_target(out, overwrite=overwrite)
    if dry_run:
        _show_plan(plan_extract(config, ctx), as_json=as_json)
        return
    found = extract_lora(config, out, ctx)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))  # noqa: T201
        return
    from solera.console import print_rows

    print_rows(f"{base} to {fine_tuned}", found.rows)
    for warning in found.warnings:
        ctx.progress.note(f"warning: {warning}")
    print(f"{out}: written; base + adapter misses {found.error:.3g} of the change (relative Frobenius norm)")  # noqa: T201


app.command("moe")(_stage_command("moe", "Build a sparse mixture of experts out of dense specialists."))
app.command("moe-prune")(_stage_command("moe-prune", "Leave out the experts of a MoE that add least (REAP)."))
app.command("moe-merge-experts")(_stage_command("moe-merge-experts", "Average experts of a MoE that are alike."))
app.command("moe-extract-lora")(
    _stage_command("moe-extract-lora", "Write specialists as LoRA adapters of their base, with a router over requests.")
)
app.command("route")(_stage_command("route", "Fit a router that sends every request to one of several whole models."))
app.command("distill")(_stage_command("distill", "Teach a student (or heal a mixture) by one or several teachers."))
app.command("tune")(_stage_command("tune", "Fine-tune a base into a specialist."))


@app.command("eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.", show_default=False)],
    suite: Annotated[list[Path], typer.Option("--suite", help="Suite file; may be given several times.")],
    out: Annotated[Path, typer.Option("--out", help="Results directory; must not exist.")],
    dry_run: DryRun = False,
    as_json: Json = False,
    seed: Seed = None,
    quiet: Quiet = False,
    overwrite: Overwrite = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    threads: Threads = None,
) -> None:
    """Measure a model on suites of text, multiple-choice and generation tasks, item by item."""
    from solera_core.staging import check_apart, check_target
    from solera_core.strict import parse
    from solera_eval.config import EvalConfig
    from solera_eval.run import evaluate, plan_evaluate

    config = parse(EvalConfig, {"model": model, "suites": [str(s) for s in suite]}, where="eval")
    ctx = _context(
        Path(),
        seed,
        quiet,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        threads=threads,
    )
    check_target(out, overwrite=overwrite)
    if dry_run:
        plan = plan_evaluate(config, ctx)
        check_apart(out, [Path(row["path"]) for row in plan.reads if row["kind"] == "model"])
        _show_plan(plan, as_json=as_json)
        return
    written = evaluate(config, out, ctx)
    results = json.loads((written / "results.json").read_text(encoding="utf-8"))
    lines = [
        f"{t['name']:<24} {t['metric']:<16} {_number(t['value'])}  "
        f"[{_number(t['low'])}, {_number(t['high'])}]  n={t['n']}"
        for t in results["tasks"]
    ]
    _emit(results, as_json=as_json, text="\n".join([*lines, f"{written}: results and items written"]))


@app.command("gate")
def gate_command(
    baseline: Annotated[Path, typer.Option("--baseline", help="Results directory of the model to hold up to.")],
    candidate: Annotated[Path, typer.Option("--candidate", help="Results directory of the model in question.")],
    policy: Annotated[Path | None, typer.Option("--policy", help="Policy file: margins, confidence, tiers.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decide PASS (0), FAIL (1) or INCONCLUSIVE (2): is the candidate not worse by more than the margin?"""
    from solera_core.strict import load_yaml, parse
    from solera_eval.config import GatePolicy
    from solera_eval.gate import gate

    del quiet  # nothing here takes long enough to speak of
    settings = parse(GatePolicy, load_yaml(policy) if policy else {}, where=str(policy or "policy"))
    if dry_run:
        from solera.read_plans import plan_gate

        _show_plan(plan_gate(baseline, candidate, settings), as_json=as_json)
        return
    verdict = gate(baseline, candidate, settings)
    data = verdict.to_json()
    lines = [f"{t['name']:<24} {t['verdict']:<13} {_margin_line(t)}" for t in data["tasks"]]
    _emit(data, as_json=as_json, text="\n".join([*lines, *data["reasons"], data["verdict"]]))
    raise typer.Exit(_verdict_code(data["verdict"]))


def _margin_line(task: dict[str, Any]) -> str:
    figure = "ratio" if "ratio" in task else "difference"
    needed = f", {task['n_needed']} items needed" if task.get("n_needed") else ""
    return (
        f"{figure} {_number(task[figure])}, bound {_number(task['bound'])}, margin {task['margin']:g}, "
        f"n={task['n']}{needed}"
    )


def _number(value: float | None) -> str:
    """`-` where one item gives no interval."""
    return "-" if value is None else f"{value:.4f}"


def _verdict_code(verdict: str | None) -> int:
    return {"FAIL": 1, "INCONCLUSIVE": 2}.get(verdict or "", 0)


@app.command("publish")
def publish_command(
    directory: Annotated[Path, typer.Argument(help="A checkpoint written by solera.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Repository on the hub, `name/model`.", show_default=False)],
    license_id: Annotated[
        str | None, typer.Option("--license", help="Licence of the output, when the parents disagree.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public (default: private).")] = False,
    tag: Annotated[str | None, typer.Option("--tag", help="Tag the commit.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the model card and upload to the hub at HF_ENDPOINT, then check what arrived."""
    from solera.publish import PublishConfig, plan_publish, publish
    from solera_core.strict import parse

    settings = {"model": str(directory), "repo": repo, "license": license_id, "private": not public, "tag": tag}
    config = parse(PublishConfig, settings, where="publish")
    ctx = _context(Path(), None, quiet)
    if dry_run:
        _show_plan(plan_publish(config, ctx), as_json=as_json)
        return
    result = publish(config, ctx)
    _emit(result.to_json(), as_json=as_json, text=f"{result.url} at commit {result.commit}: uploaded and verified")


@app.command("run")
def run_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", help="Run directory (default: runs/NAME).")] = None,
    variables: Annotated[list[str] | None, typer.Option("--set", help="name=value for the recipe's vars.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    seed: Seed = None,
    quiet: Quiet = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    threads: Threads = None,
    jobs: Jobs = 1,
) -> None:
    """Run a recipe: specialists to a judged, publishable model, with a report. Finished stages are not repeated."""
    from solera.recipe import load_recipe

    loaded = load_recipe(recipe, seed=seed, variables=_variables(variables or []))
    run_dir = out if out is not None else Path("runs") / recipe.stem
    ctx = _context(
        recipe.parent, seed, quiet, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, threads=threads
    )
    if dry_run:
        from solera.pipeline import plan_run

        _show_run_plan(plan_run(loaded, run_dir, ctx), run_dir, as_json=as_json)
        return
    _run(loaded, run_dir, ctx, as_json=as_json, jobs=jobs)


def _show_run_plan(planned: list[Any], out: Path, *, as_json: bool) -> None:
    from solera.console import print_run_plan
    from solera.planning import total

    needed = total({p.name: p.plan for p in planned if p.status != "cached"})
    if as_json:
        stages = [
            {"name": p.name, "kind": p.kind, "inputs": p.inputs, "status": p.status, "plan": p.plan.to_json()}
            for p in planned
        ]
        print(json.dumps({"out": str(out), "stages": stages, "total": needed}, indent=2))  # noqa: T201
    else:
        print_run_plan(planned, needed, out)


def _run(recipe: Any, out: Path, ctx: Context, *, as_json: bool, jobs: int) -> None:
    from solera.pipeline import run_recipe

    outcome = run_recipe(recipe, out, ctx, jobs=jobs)
    from solera.summary import summarise

    summary = summarise(recipe, outcome)
    summary.write_report(out / "report.html")
    if as_json:
        print(json.dumps(summary.to_json(), indent=2))  # noqa: T201
    else:
        summary.print_tables()
        print(f"report: {out / 'report.html'}")  # noqa: T201
    raise typer.Exit(_verdict_code(outcome.verdict))


def _variables(pairs: list[str]) -> dict[str, str]:
    from solera_core.errors import ConfigError

    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: expected name=value")
        values[name] = value
    return values


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("runs/demo"),
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    seed: Seed = None,
    threads: Threads = None,
    jobs: Jobs = 2,
) -> None:
    """The main job on a laptop, offline: three specialists, their blends, a healed mixture, a student, the verdict."""
    from solera.demo import demo_recipe, plan_demo

    ctx = _context(Path(), None, quiet, threads=threads)
    if dry_run:
        _show_run_plan(plan_demo(out, ctx, seed=seed), out, as_json=as_json)
        return
    _run(demo_recipe(out, seed=seed), out, ctx, as_json=as_json, jobs=jobs)


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.", show_default=False)],
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """What a checkpoint (or a LoRA adapter) is: family, sizes, tensors, tokenizer, licence, where it came from."""
    from solera_core.inspect import describe_reference

    ctx = _context(Path(), None, quiet, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if dry_run:
        from solera.read_plans import plan_inspect

        _show_plan(plan_inspect(model, ctx), as_json=as_json)
        return
    facts = describe_reference(model, ctx)
    width = max(len(k) for k in facts)
    _emit(
        facts, as_json=as_json, text="\n".join(f"{k:<{width}}  {_short(v)}" for k, v in facts.items() if v is not None)
    )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_short(v) for v in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@app.command("diff")
def diff_command(
    models: Annotated[
        list[str],
        typer.Argument(help="A and B: how B differs from A. With --base: any number of models.", show_default=False),
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="The common ancestor: how the models' changes of it agree.")
    ] = None,
    rank: Annotated[
        bool,
        typer.Option("--rank", help="Effective and stable rank of every matrix's change (slow: a minute for 0.3B)."),
    ] = False,
    top: Annotated[int, typer.Option("--top", min=0, help="Tensors listed (0: all).")] = 15,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Write a heat map, layer by kind, as .svg or .html.")
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(help="Sorted by and in the picture: relative_change, changed, rank, cosine or sign_conflict."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    threads: Threads = None,
) -> None:
    """How models differ, tensor by tensor: relative change, cosine, sign conflict, effective rank."""
    from solera.diff_report import check_picture, measure_of, print_diff
    from solera.diff_report import picture as draw
    from solera.diffing import compare, refs_of

    refs = refs_of(models, base)
    shown = measure_of(measure, len(refs) - 1, ranks=rank)
    if picture is not None:
        check_picture(picture)
    ctx = _context(Path(), None, quiet, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, threads=threads)
    if dry_run:
        from solera.read_plans import plan_diff

        _show_plan(plan_diff(refs, ctx), as_json=as_json)
        return
    found = compare(refs, ctx, ranks=rank)
    if picture is not None:
        draw(found, shown, picture)
        ctx.progress.note(f"{picture}: written")
    if as_json:
        print(json.dumps(found.to_json(), indent=2))  # noqa: T201
    else:
        print_diff(found, top=top, measure=shown)


@app.command("plan")
def plan_command(
    what: Annotated[
        list[str], typer.Argument(help="A recipe or merge config; or models that might be merged.", show_default=False)
    ],
    base: Annotated[str | None, typer.Option("--base", help="The common ancestor of the models.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only what would be read to answer.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    threads: Threads = None,
) -> None:
    """What a recipe would do; or what could be done with some models: do they fit, what to try, recipes to paste."""
    from solera.plan_command import is_settings, kind_of_settings, plan_models, plan_settings, print_advice

    ctx = _context(Path(), None, quiet, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, threads=threads)
    if not is_settings(what):
        if dry_run:
            from solera.read_plans import plan_diff

            _show_plan(plan_diff([*([base] if base is not None else []), *what], ctx), as_json=as_json)
            return
        advice = plan_models(what, base, ctx)
        if as_json:
            print(json.dumps(advice.to_json(), indent=2))  # noqa: T201
        else:
            print_advice(advice)
        return
    file = Path(what[0])
    kind = kind_of_settings(file)
    if kind == "recipe":
        run_command(file, dry_run=True, as_json=as_json, quiet=quiet, trust_remote_code=trust_remote_code)
        return
    plan, models, notes = plan_settings(kind, file, ctx)
    if as_json:
        print(json.dumps({**plan.to_json(), "models": models, "advice": notes}, indent=2))  # noqa: T201
        return
    from solera.console import print_models

    print_models(models)
    _show_plan(plan, as_json=False)
    for note in notes:
        print(f"advice: {note}")  # noqa: T201


@app.command("verify")
def verify_command(
    directory: Annotated[Path, typer.Argument(help="A checkpoint written by solera.", show_default=False)],
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make it again from its recipe and compare the bytes.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check every file and tensor against the digests in solera.json."""
    from solera.rebuild import rebuild as make_again
    from solera_core.errors import VerificationError
    from solera_core.provenance import verify

    ctx = _context(Path(), None, quiet, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if dry_run:
        from solera.read_plans import plan_verify

        _show_plan(plan_verify(directory, ctx, rebuild=rebuild), as_json=as_json)
        return
    problems = verify(directory)
    evidence: tuple[str, ...] = ()
    if rebuild and not problems:
        rebuilt = make_again(directory, ctx)
        problems, evidence = list(rebuilt.problems), rebuilt.evidence
    if problems:
        message = "\n".join(f"{directory}: {p}" for p in problems)
        facts = {"directory": str(directory), "whole": False, "problems": problems}
        raise typer.Exit(_fail(message, "VerificationError", VerificationError.exit_code, as_json, **facts))
    how = "every byte made again from its recipe is equal" if rebuild else "every file and tensor equals its digest"
    if evidence:
        how += f" (evidence, which equals its digest but is not made again: {', '.join(evidence)})"
    _emit(
        {"directory": str(directory), "whole": True, "rebuilt": rebuild, "evidence": list(evidence), "problems": []},
        as_json=as_json,
        text=f"{directory}: {how}",
    )


@app.command("schema")
def schema_command(
    kind: Annotated[str, typer.Argument(help="recipe, suite, policy, or a kind of stage.")] = "recipe",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """JSON Schema of a settings file, for editors and agents; always JSON on stdout."""
    from solera.schema import schema

    del as_json, quiet
    print(json.dumps(schema(kind), indent=2))  # noqa: T201


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)  # noqa: T201
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())  # noqa: T201


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code (see EXIT_CODES); errors are one message on stderr, no traceback.

    With --json an error is also one object on stdout: `{"error": message, "kind": its class, "exit_code": code}`.
    SOLERA_TRACEBACK=1 shows the traceback as well; an exception that nobody foresaw always shows it.
    """
    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == INTERRUPTED:  # typer turns KeyboardInterrupt into this code
            return _fail("interrupted; run the same command again to go on", "Interrupted", INTERRUPTED, as_json)
        return code if isinstance(code, int) else 0
    except SoleraError as e:
        return _fail(str(e), type(e).__name__, e.exit_code, as_json)
    except typer.Abort:
        return _fail("aborted", "Interrupted", INTERRUPTED, as_json)
    except typer.TyperException as e:  # usage errors; typer's own code for them, 2, means INCONCLUSIVE here
        context = getattr(e, "ctx", None)
        usage = context.get_usage() + "\n" if context else ""
        return _fail(usage + e.format_message(), "UsageError", 3, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        return _fail(_os_error(e), type(e).__name__, ResourceError.exit_code, as_json)
    except MemoryError:
        return _fail(_NO_MEMORY, "MemoryError", ResourceError.exit_code, as_json)
    except Exception as e:
        if "not enough memory" in str(e) or "can't allocate memory" in str(e):  # torch says it with a RuntimeError
            return _fail(_NO_MEMORY, "MemoryError", ResourceError.exit_code, as_json)
        return _fail(
            f"{type(e).__name__}: {e}\nThis is a bug of solera, not a mistake of yours: please report it with the "
            "lines above and the settings that led here",
            type(e).__name__,
            BUG,
            as_json,
        )


_NO_MEMORY = "not enough memory; close other programs, or choose smaller models or batches (micro_batch_tokens)"


def _os_error(e: OSError) -> str:
    reason = e.strerror or str(e) or type(e).__name__
    place = f"{e.filename}: " if e.filename is not None else ""
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{place}{reason}: the disk, the quota or the largest file allowed is used up; make room and run again"
    return f"{place}{reason}"


def _fail(message: str, kind: str, code: int, as_json: bool, **facts: Any) -> int:
    """Say what is wrong, and return the exit code."""
    if os.environ.get("SOLERA_TRACEBACK") or code == BUG:
        import traceback

        traceback.print_exc()
    print(f"solera: {message}", file=sys.stderr)  # noqa: T201
    if as_json:
        print(json.dumps({"error": message, "kind": kind, "exit_code": code, **facts}, indent=2))  # noqa: T201
    return code
