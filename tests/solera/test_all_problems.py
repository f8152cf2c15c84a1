"""A wrong recipe over wrong models: all of it is said in one go."""

from pathlib import Path

import pytest

from solera.stages import all_problems, read_stage
from solera_core.context import Context
from solera_core.errors import ConfigError


def test_a_recipe_that_is_wrong_does_not_hide_its_models(siblings: dict[str, Path], tmp_path: Path) -> None:
    """As `solera merge` says it: unknown keys and parameters, then all that planning finds without them."""
    base, a = siblings["base"], siblings["a"]
    file = tmp_path / "merge.yml"

    def problems(text: str) -> list[str]:
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_stage("merge", file)
        return str(all_problems("merge", file, caught.value, Context())).splitlines()

    found = problems(
        f"merge_method: ties\nbase_model: {base}\ndtyp: float32\nparameters: {{normalise: true}}\nmodels:\n"
        f"  - {{model: {a}, parameters: {{weight: [{{filter: qq, value: 1}}], densty: 1}}}}\n"
    )
    assert [line.partition(": ")[2][:35] for line in found[:3]] == [
        "dtyp: unknown key (did you mean 'dt",
        "parameters.normalise: ties has no s",
        "models.0.parameters.densty: ties ha",
    ]
    assert "filter 'qq' matches no tensor" in found[3]
    assert "ties needs `weight`" in found[4]
    assert len(found) == 5
    found = problems(f"merge_method: tis\nbase_model: {base}\nmodels: [{{model: none}}, {{model: {a}}}]\n")
    assert "unknown method 'tis'" in found[0]
    assert "'none' not found" in found[1]
    assert len(found) == 2
    assert len(problems("[]\n")) == 1
    found = problems(f"merge_method: tis\nmodels: [{{model: {a}}}]\ntokenizer_source: none\n")
    assert "'none' not found" in found[1]
    assert len(found) == 2
