"""Leaving out layers: which, what the config becomes, and that the result computes what it should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError
from solera_core.output import check_output
from solera_distill.config import LayerDrop
from solera_distill.student import choose_layers, layers_to_keep, shortened_config, write_layers


def drop(**given: Any) -> LayerDrop:
    return LayerDrop.model_validate(given)


def test_how_many_stay() -> None:
    assert layers_to_keep(drop(layers=3), 5, "m") == 3
    assert layers_to_keep(drop(ratio=0.5), 5, "m") == 3  # 2.5, rounded half up
    assert layers_to_keep(drop(ratio=0.1), 5, "m") == 2
    assert layers_to_keep(drop(keep=[0, 4]), 5, "m") == [0, 4]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"layers": 6}, "6 of m, which has only 5 layers"),
        ({"keep": [0, 5]}, "layer 5 of m, which has layers 0 to 4"),
    ],
)
def test_impossible_wishes(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layers_to_keep(drop(**given), 5, "m")


def test_the_choice_is_greedy_and_keeps_the_ends() -> None:
    cost = {0: -9.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: -9.0}  # leaving out an end would be cheapest, and is not considered

    def loss_without(gone: frozenset[int]) -> float:
        together = 5.0 if {2, 3} <= gone else 0.0  # 2 and 3 stand in for each other: scoring each once would miss it
        return 10.0 + sum(cost[i] for i in gone) + together

    assert choose_layers(5, 3, loss_without) == ([0, 3, 4], [10.0, 11.0, 14.0])
    assert choose_layers(5, 5, loss_without) == ([0, 1, 2, 3, 4], [10.0])


def test_ties_go_to_the_deeper_layer() -> None:
    assert choose_layers(4, 3, lambda gone: 1.0)[0] == [0, 1, 3]


CONFIG: dict[str, Any] = {"model_type": "x", "num_hidden_layers": 4, "hidden_size": 8}


def test_what_is_told_per_layer_is_renumbered() -> None:
    config = CONFIG | {
        "layer_types": ["a", "b", "c", "d"],
        "mlp_only_layers": [0, 2, 3],
        "first_k_dense_replace": 2,
        "sliding_window_pattern": 2,
        "architectures": ["A", "B", "C", "D"],
        "decoder_sparse_step": 1,
    }
    assert shortened_config(config, [0, 2, 3], "m") == CONFIG | {
        "num_hidden_layers": 3,
        "layer_types": ["a", "c", "d"],
        "mlp_only_layers": [0, 1, 2],
        "first_k_dense_replace": 1,
        "architectures": ["A", "B", "C", "D"],
        "decoder_sparse_step": 1,
    }
    assert config["layer_types"] == ["a", "b", "c", "d"]
    assert shortened_config(config, [0, 1, 2, 3], "m") == config


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"full_attention_interval": 2}, "full_attention_interval.*position"),
        ({"mystery": [1, 2, 3, 4]}, "'mystery' has 4 entries, as many as layers"),
        ({"text_config": {"num_hidden_layers": 4}}, "top level"),
    ],
)
def test_what_cannot_be_renumbered_is_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        shortened_config(CONFIG | extra, [0, 3], "m")


@pytest.mark.parametrize(
    "family, config",
    [
        ("llama", {}),
        (
            "gemma3_text",
            {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4},
        ),
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_the_shortened_model_computes_what_the_model_with_skipped_layers_does(
    tmp_path: Path, make_model: Callable[..., Path], family: str, config: dict[str, Any]
) -> None:
    import torch

    from solera_core.causal_lm import load_model
    from solera_distill.objective import hidden_states
    from solera_distill.skipping import layer_stack, without_layers

    whole = make_model(tmp_path / "whole", family=family, num_hidden_layers=4, **config)
    write_layers(open_checkpoint(whole, Context()), [0, 2, 3], tmp_path / "short")
    assert check_output(tmp_path / "short")["layers"] == 3
    model = load_model(whole)
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        everything = hidden_states(model, ids)
        with without_layers(layer_stack(model, 4, "m"), {1}):
            expected = hidden_states(model, ids)
        torch.testing.assert_close(hidden_states(model, ids), everything, rtol=0, atol=0)  # the hooks are gone
        ours = hidden_states(load_model(tmp_path / "short"), ids)
    torch.testing.assert_close(ours, expected)
    assert not torch.allclose(ours, everything)
