"""Where the recipe of a run stands: a run keeps the way to it in `OUT/recipe-dir`, so that its stages' relative paths
can be resolved later, from wherever. The way is relative to the run, so that both can move together.
"""

import os
from pathlib import Path

__all__ = ["read_recipe_dir", "write_recipe_dir"]

_MARKER = "recipe-dir"


def write_recipe_dir(run: Path, base_dir: Path) -> None:
    """Note in the run directory where its recipe's paths resolve."""
    (run / _MARKER).write_text(os.path.relpath(base_dir, run) + "\n", encoding="utf-8")


def read_recipe_dir(stage: Path) -> Path | None:
    """The recipe's folder of the run that made `OUT/stages/NAME`; None where the directory is no stage of a run."""
    run = stage.absolute().parent.parent
    marker = run / _MARKER
    return run / marker.read_text(encoding="utf-8").strip() if marker.is_file() else None
