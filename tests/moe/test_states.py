"""The statistics are of exactly what the routers of the finished MoE read."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solera_core.causal_lm import load_model
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError
from solera_core.progress import Silent
from solera_merge.moe.calibration import Sequences
from solera_merge.moe.dense import Dense, read_dense
from solera_merge.moe.layers import Layers, dense_layers
from solera_merge.moe.routing import first_choices, forced_route, mean_nll
from solera_merge.moe.states import RouterStatistics, Taught, batches, taught_states
from solera_merge.moe.targets.mixtral import TARGET


def sequences(lengths: list[int], seed: int) -> Sequences:
    draw = np.random.default_rng(seed)
    ids = tuple(tuple(int(t) for t in draw.integers(0, 304, size=n)) for n in lengths)
    return Sequences(ids, tuple((True,) * n for n in lengths))


def statistics(
    base: Path, experts: list[Dense], text: list[Sequences], scratch: Path, layers: Layers | None = None
) -> list[RouterStatistics]:
    trunk = read_dense("trunk", open_checkpoint(base, Context()))
    taught = [Taught(e, f"router.data.{e}", sequences) for e, sequences in enumerate(text)]
    options: dict[str, Any] = {"scratch": scratch, "keep": False, "threads": 1, "progress": Silent()}
    return [layer.statistics for layer in taught_states(trunk, experts, taught, layers=layers, **options)]


def test_batches_keep_every_token_in_order() -> None:
    text = sequences([400, 400, 400, 400, 400, 7], 0)
    found = [ids for ids, _ in batches(text)]
    assert [tuple(ids.shape) for ids in found] == [(2, 400), (2, 400), (1, 400), (1, 7)]
    assert [t for ids in found for t in ids.flatten().tolist()] == [t for s in text.ids for t in s]


def test_statistics_are_of_what_the_built_routers_read(
    siblings: dict[str, Path], tmp_path: Path, build: Callable[..., Path]
) -> None:
    names = ("a", "b")
    out = build(tmp_path / "moe", siblings["base"], {n: siblings[n] for n in names})
    experts = [read_dense(n, open_checkpoint(siblings[n], Context())) for n in names]
    text = [sequences([40, 40, 9], 1), sequences([40, 12], 2)]
    found = statistics(siblings["base"], experts, text, tmp_path)
    assert len(found) == 2

    # The other road: run the built MoE with every token sent to the domain's expert, and watch the routers' inputs.
    moe = load_model(out)
    for layer in (0, 1):
        gram, sums = np.zeros((32, 32)), np.zeros((2, 32))
        for e, domain in enumerate(text):
            seen: list[Any] = []
            handle = TARGET.router_module(moe, layer).register_forward_pre_hook(
                lambda module, inputs, seen=seen: seen.append(inputs[0].detach().reshape(-1, 32).double().numpy())
            )
            with forced_route(moe, e):
                mean_nll(moe, domain)
            handle.remove()
            x = np.concatenate(seen)
            assert len(x) == domain.tokens
            gram += x.T @ x
            sums[e] += x.sum(axis=0)
        np.testing.assert_allclose(found[layer].gram, gram, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(found[layer].sums, sums, rtol=1e-5, atol=1e-3)
        assert found[layer].counts.tolist() == [89, 52]
    # and another expert's networks would give other states in layer 1, so the comparison can fail
    swapped = statistics(siblings["base"], experts[::-1], text, tmp_path)
    np.testing.assert_allclose(swapped[0].gram, found[0].gram, rtol=1e-5, atol=1e-3)
    assert np.abs(swapped[1].gram - found[1].gram).max() > 1


def test_nan_states_name_layer_domain_and_document(siblings: dict[str, Path], tmp_path: Path) -> None:
    import torch

    base = read_dense("trunk", open_checkpoint(siblings["base"], Context()))
    layers = dense_layers(base, base, tmp_path / "layer", threads=1)
    expert = read_dense("expert 'a'", open_checkpoint(siblings["a"], Context()))
    ids = ((1,) * 20, (1,) * 10 + (7,) + (1,) * 9)
    text = Sequences(ids, ((True,) * 20,) * 2, ((0, "a.jsonl:1"), (15, "a.jsonl:7"), (30, "a.jsonl:9")))
    with torch.no_grad():  # the model is small enough to be kept, so what is damaged here is what runs
        layers.load(0).get_parameter("model.embed_tokens.weight")[7] = float("nan")
    with pytest.raises(CheckpointError, match=r"data.0: text of a.jsonl:7 to a.jsonl:9 gives states .* layer 0"):
        statistics(siblings["base"], [expert], [text], tmp_path, layers)
    layers = dense_layers(base, base, tmp_path / "layer", threads=1)
    with torch.no_grad():
        layers.load(1).get_parameter("model.layers.0.self_attn.q_proj.weight").fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"data.0: text of a.jsonl:1 to a.jsonl:7 gives states .* layer 1"):
        statistics(siblings["base"], [expert], [text], tmp_path, layers)


def test_one_layer_is_in_memory_at_a_time(
    siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("solera_merge.moe.layers._KEEP_BYTES", 0)
    base = read_dense("trunk", open_checkpoint(siblings["base"], Context()))
    layers = dense_layers(base, base, tmp_path / "layer", threads=1)
    gc.disable()  # whenever the interpreter would look for cycles
    try:
        first = weakref.ref(layers.load(0))
        layers.load(1)
        assert first() is None
    finally:
        gc.enable()


def test_mean_nll_is_the_loss_of_transformers(siblings: dict[str, Path]) -> None:
    import torch

    model = load_model(siblings["base"])
    text = sequences([50], 3)
    ids = torch.tensor(text.ids)
    with torch.inference_mode():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert mean_nll(model, text) == pytest.approx(expected, rel=1e-6)
    # unscored tokens do not count
    half = Sequences(text.ids, ((False,) * 25 + (True,) * 25,))
    labels = torch.where(torch.tensor(half.targets), ids, -100)
    with torch.inference_mode():
        expected = float(model(input_ids=ids, labels=labels).loss)
    assert mean_nll(model, half) == pytest.approx(expected, rel=1e-6)


def test_first_choices_count_every_token_once_a_layer(
    siblings: dict[str, Path], tmp_path: Path, build: Callable[..., Path]
) -> None:
    model = load_model(build(tmp_path / "moe", siblings["base"], {n: siblings[n] for n in "abc"}))
    text = sequences([30, 30, 4], 4)
    with first_choices(model, 3) as counts:
        mean_nll(model, text)
    assert counts.sum(axis=1).tolist() == [64, 64]
    assert (counts > 0).all()  # a random router sends some everywhere
