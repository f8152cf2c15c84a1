"""The publish stage of a recipe: the model with everything the run knows of it."""

from pathlib import Path

from solera.assemble import Evidence
from solera.pipeline import RunOutcome
from solera.publish import PublishConfig, publish
from solera.recipe import Recipe
from solera.summary import evaluated, summarise
from solera_core.context import Context

__all__ = ["release"]


def release(config: PublishConfig, out: Path, ctx: Context, *, run: RunOutcome, recipe: Recipe) -> Path:
    """Write the publishable directory at `out` and, where the recipe names a repository, upload it.

    The evidence is what the run has measured so far: the results of every model, the verdict that `when` waits for,
    the recipe, and the report as it stands before this stage.

    Raises:
        SoleraError: as `solera.publish.publish`.
    """
    report = run.out / "report.html"
    summarise(recipe, run).write_report(report)
    results = dict(evaluated(recipe, run))
    verdict = run.out / "stages" / config.when / "verdict.json" if config.when else None
    evidence = Evidence(
        results=results if config.model in results else {},
        model=config.model if config.model in results else None,
        verdict=verdict,
        recipe=run.out / "recipe.yml",
        report=report,
    )
    publish(config, ctx, evidence=evidence, out=out)
    return out
