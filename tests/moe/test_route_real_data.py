"""A route over specialists of a real pretrained model, on real text, where they are present."""

import json
from pathlib import Path
from typing import Any

import solera
from solera_merge.route import RoutedModels


def test_specialists_of_a_real_model_behind_one_door(shared_data: Path, tmp_path: Path) -> None:
    """stories260K on Shakespeare and on Wikipedia: the route is as good as the oracle, and far better than either."""
    base = str(shared_data / "weights" / "stories260K-hf")
    files = {"plays": "tinyshakespeare.txt", "wiki": "wikitext2-valid.txt"}
    text = {name: str(shared_data / "text" / file) for name, file in files.items()}
    for name, path in text.items():
        data = {"path": path, "chunk_chars": 600, "limit": 40}
        solera.tune(
            {"model": base, "data": data, "tokens": 6000, "tokens_per_step": 1024, "lr": 3e-3},
            tmp_path / name,
            threads=1,
        )
    config: dict[str, Any] = {
        "base_model": base,
        "specialists": [{"name": name, "model": str(tmp_path / name)} for name in text],
        "data": {name: {"path": path, "chunk_chars": 300, "skip": 80, "limit": 24} for name, path in text.items()},
    }
    out = solera.route(config, tmp_path / "route", threads=1)
    checks = json.loads((out / "solera.json").read_text())["checks"]
    means = checks["mean_bits_per_byte"]
    assert checks["accuracy"]["domain"] >= 0.9
    assert means["routed"] < 0.97 * min(means["plays"], means["wiki"])
    assert means["routed"] < means["base"] - 0.5
    assert means["routed"] - means["oracle"] < 0.05
    answers = RoutedModels.open(out).route(
        ["First Citizen:\nWe are accounted poor", "The album was released in 2008 by"]
    )
    assert answers == ["plays", "wiki"]
