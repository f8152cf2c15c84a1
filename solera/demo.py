"""`solera demo`: write the embedded data, then run `recipes/demo.yml` on it."""

from importlib import resources
from pathlib import Path

from solera.demo_data import write_demo_data
from solera.recipe import Recipe, load_recipe
from solera_core.errors import ConfigError

__all__ = ["demo_recipe", "shipped_recipe"]


def demo_recipe(out: Path, *, seed: int | None = None) -> Recipe:
    """Write the demo's data and recipe into `out`, and load the recipe. The same bytes on every call."""
    write_demo_data(out / "data")
    file = out / "demo.yml"
    file.write_text(shipped_recipe("demo"), encoding="utf-8")
    return load_recipe(file, seed=seed)


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
