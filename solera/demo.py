"""`solera demo`: write the embedded data, then run `recipes/demo.yml` on it."""

import tempfile
from dataclasses import replace
from importlib import resources
from pathlib import Path

from solera.demo_data import write_demo_data
from solera.pipeline import PlannedStage, plan_run
from solera.preflight import check_run_directory
from solera.recipe import Recipe, load_recipe
from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_core.staging import disk_errors

__all__ = ["demo_recipe", "plan_demo", "shipped_recipe"]


def demo_recipe(out: Path, *, seed: int | None = None) -> Recipe:
    """Write the demo's data and recipe into `out`, and load the recipe. The same bytes on every call.

    Raises:
        TargetError: `out` cannot be a directory.
        DiskFullError: there is no room for the data.
    """
    check_run_directory(out)
    with disk_errors(out):
        write_demo_data(out / "data")
        file = out / "demo.yml"
        file.write_text(shipped_recipe("demo"), encoding="utf-8")
    return load_recipe(file, seed=seed)


def plan_demo(out: Path, ctx: Context, *, seed: int | None = None) -> list[PlannedStage]:
    """The plan of the demo into `out`. Nothing is written there: the data are made in a temporary folder.

    Raises:
        SoleraError: as `solera.pipeline.plan_run`.
    """
    with tempfile.TemporaryDirectory(prefix="solera-demo-") as scratch:
        planned = plan_run(demo_recipe(Path(scratch), seed=seed), out, ctx)
        return [replace(stage, plan=stage.plan.renamed(scratch, str(out))) for stage in planned]


def shipped_recipe(name: str) -> str:
    """The text of a recipe that comes with solera: packaged in a wheel, `recipes/` in a checkout.

    Raises:
        ConfigError: no such recipe.
    """
    packaged = resources.files("solera") / "recipes" / f"{name}.yml"
    checkout = Path(__file__).resolve().parent.parent / "recipes" / f"{name}.yml"
    for place in (packaged, checkout):
        if place.is_file():
            return place.read_text(encoding="utf-8")
    raise ConfigError(f"no recipe {name!r} comes with this installation")
