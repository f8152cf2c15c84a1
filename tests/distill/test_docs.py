"""The recipes printed in docs/distill.md are recipes."""

import re
from pathlib import Path
from typing import Any

import yaml

from solera_core.strict import parse
from solera_distill.config import DistillConfig, InitConfig, LayerDrop, TuneConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distill.md"


def test_the_recipes_on_the_page_parse() -> None:
    blocks: list[Any] = [yaml.safe_load(b) for b in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)]
    models: list[Any] = [TuneConfig, DistillConfig, InitConfig]
    for model, block in zip(models, blocks, strict=True):
        parse(model, block, where=str(PAGE))
    rows: list[Any] = [
        yaml.safe_load(r) for r in re.findall(r"^\| `(\{from: .*?\})` \|", PAGE.read_text(), re.MULTILINE)
    ]
    assert len(rows) == 4
    for row in rows:
        parse(DistillConfig, {**blocks[1], "student": row}, where=str(PAGE))


def test_the_defaults_on_the_page_are_the_defaults() -> None:
    page = PAGE.read_text()
    fields = TuneConfig.model_fields
    keys = ("sequence_tokens", "tokens_per_step", "micro_batch_tokens", "precision", "parts", "balance", "keep_best")
    for key in keys:
        assert f"| `{key}` | {fields[key].default} |" in page
    assert fields["patience"].default is None
    assert "| `patience` | null |" in page
    assert f"| `schedule`, `warmup`, `final_lr` | {fields['schedule'].default}, {fields['warmup'].default}" in page
    assert (fields["lr"].default, fields["save_every"].default) == (1e-3, 500_000)
    assert "| `lr` | 1e-3 |" in page
    assert "| `save_every` | 500k |" in page
    assert f"`calibration_tokens` ({LayerDrop.model_fields['calibration_tokens'].default})" in page
