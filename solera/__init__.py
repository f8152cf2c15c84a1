"""solera: blend fine-tuned checkpoints, distil the blend, prove that quality held, publish.

    import solera
    solera.merge("ties.yml", "out/blend")
    solera.build_moe({"base_model": "out/blend", "experts": [...], ...}, "out/moe")
    solera.run("recipe.yml", "runs/first")

Settings are a YAML file or a mapping; paths in a file are relative to it, in a mapping to the working directory.
Importing this package imports neither torch nor transformers; each function does when it is called.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solera_core.context import Context
from solera_core.progress import Progress, Silent
from solera_core.version import __version__

if TYPE_CHECKING:
    from solera.pipeline import RunOutcome
    from solera.publish import PublishResult

__all__ = ["__version__", "build_moe", "distill", "evaluate", "merge", "publish", "route", "run", "tune"]

Settings = Mapping[str, Any] | str | Path


def merge(config: Settings, out: str | Path, **options: Any) -> Path:
    """Merge checkpoints (mergekit's YAML language). See `solera merge --help`.

    Options of every stage: `seed=0`, `overwrite=False`, `allow_pickle=False`, `trust_remote_code=False`,
    `threads=None`, `progress=Silent()`.

    Returns:
        The output directory, whole and checked.

    Raises:
        solera_core.errors.SoleraError: and then nothing is left at `out`.
    """
    return _stage("merge", config, out, **options)


def build_moe(config: Settings, out: str | Path, **options: Any) -> Path:
    """Build a sparse mixture of experts out of dense specialists. Options as in `merge`."""
    return _stage("moe", config, out, **options)


def route(config: Settings, out: str | Path, **options: Any) -> Path:
    """Fit a router over whole models, to be opened by `solera_merge.route.RoutedModels`. Options as in `merge`."""
    return _stage("route", config, out, **options)


def distill(config: Settings, out: str | Path, **options: Any) -> Path:
    """Teach a student, or heal a mixture, by one or several teachers. Options as in `merge`."""
    return _stage("distill", config, out, **options)


def tune(config: Settings, out: str | Path, **options: Any) -> Path:
    """Fine-tune a base into a specialist. Options as in `merge`."""
    return _stage("tune", config, out, **options)


def evaluate(config: Settings, out: str | Path, **options: Any) -> Path:
    """Measure models on suites, item by item; with a `gate`, judge one against another. Options as in `merge`."""
    return _stage("eval", config, out, **options)


def publish(directory: str | Path, repo: str, **settings: Any) -> "PublishResult":
    """Upload a checkpoint with its card to the hub at HF_ENDPOINT. Settings: `private`, `license`, `tag`."""
    from solera.publish import PublishConfig
    from solera.publish import publish as upload
    from solera_core.strict import parse

    return upload(parse(PublishConfig, {"model": str(directory), "repo": repo, **settings}, where="publish"), Context())


def run(
    recipe: Settings,
    out: str | Path,
    *,
    seed: int | None = None,
    variables: Mapping[str, str] | None = None,
    threads: int | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> "RunOutcome":
    """Run a recipe and write its report; finished stages are not repeated."""
    from solera.pipeline import run_recipe
    from solera.recipe import load_recipe, parse_recipe
    from solera.summary import summarise

    loaded = (
        parse_recipe(recipe, base_dir=Path(), where="recipe", seed=seed, variables=variables)
        if isinstance(recipe, Mapping)
        else load_recipe(Path(recipe), seed=seed, variables=variables)
    )
    outcome = run_recipe(loaded, Path(out), Context(threads=threads, progress=progress or Silent()), jobs=jobs)
    summarise(loaded, outcome).write_report(Path(out) / "report.html")
    return outcome


def _stage(kind: str, config: Settings, out: str | Path, **options: Any) -> Path:
    from solera.stages import parse_settings, read_stage, run_stage

    if isinstance(config, Mapping):
        parsed, base_dir = parse_settings(kind, config, where=kind), Path()
    else:
        parsed, base_dir = read_stage(kind, Path(config))
    return run_stage(kind, parsed, Path(out), Context(base_dir=base_dir, **options))
