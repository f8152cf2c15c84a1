"""The same on a real pretrained model and real text, where they are present."""

import json
from pathlib import Path
from typing import Any

from solera_core.context import Context
from solera_core.strict import parse
from solera_distill.config import DistillConfig, TuneConfig
from solera_distill.run import distill, tune


def checks(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "solera.json").read_text())["checks"]  # type: ignore[no-any-return]


def test_a_real_model_learns_shakespeare_and_teaches_a_smaller_one(shared_data: Path, tmp_path: Path) -> None:
    """stories260K (Llama, tied embeddings) on tinyshakespeare; then its own middle layers left out, and healed."""
    text = str(shared_data / "text" / "tinyshakespeare.txt")
    models = {"base": shared_data / "weights" / "stories260K-hf", "poet": tmp_path / "poet"}
    ctx = Context(models=models, threads=1)
    common = {
        "data": {"path": text, "skip": 20, "limit": 60},
        "eval_data": {"path": text, "limit": 6},
        "tokens": "20k",
        "tokens_per_step": 1024,
        "lr": 3e-3,
    }
    tune(parse(TuneConfig, {"model": "base", **common}, where="r"), tmp_path / "poet", ctx)
    tuned = checks(tmp_path / "poet")
    assert 4.0 < tuned["heldout_nll_before"] < 5.5
    assert tuned["heldout_nll_after"] < tuned["heldout_nll_before"] - 1.0
    recipe = {"teachers": [{"model": "poet"}], "student": {"from": "poet", "layer_drop": {"layers": 3}}, **common}
    distill(parse(DistillConfig, recipe, where="r"), tmp_path / "short", ctx)
    short = checks(tmp_path / "short")
    assert short["layers_kept"][0] == 0
    assert short["layers_kept"][-1] == 4
    assert short["layer_drop_nll"] == sorted(short["layer_drop_nll"])
    assert tuned["heldout_nll_after"] < short["heldout_nll_after"] < short["heldout_nll_before"] - 0.2
