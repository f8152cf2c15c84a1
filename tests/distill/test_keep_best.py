"""`keep_best` and `patience`: the model ends as it was where the held-out loss was least, also after a kill."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from solera_core.causal_lm import load_model
from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_core.progress import Silent
from solera_core.strict import parse
from solera_distill import parts
from solera_distill.batches import Corpus, Piece
from solera_distill.config import TuneConfig
from solera_distill.heldout import HeldOut
from solera_distill.loop import Settings, deterministic, least_heldout, train
from solera_distill.objective import StudentWithObjective
from solera_distill.run import plan_tune, tune
from solera_distill.state import StateFolder

SETTINGS = Settings(
    seed=0,
    tokens=1600,
    tokens_per_step=100,
    micro_batch_tokens=100,
    lr=1e-2,
    schedule="constant",
    warmup=0.0,
    final_lr=1.0,
    betas=(0.9, 0.95),
    clip=1.0,
    save_every=100,
    bfloat16=False,
    keep_best=True,
)
"""Sixteen steps with a look after each; random text is learned by heart, so the held-out loss falls, then rises."""

Weights = dict[str, torch.Tensor]


def corpus(seed: int) -> Corpus:
    """Random tokens; two thirds of them from a small range, which can be learned from other text of this kind."""
    draw = np.random.default_rng(seed)
    rows = [np.where(draw.random(21) < 0.67, draw.integers(2, 12, 21), draw.integers(2, 300, 21)) for _ in range(10)]
    return Corpus([Piece(row.astype(np.int32), np.ones(20, np.bool_), 0, 0) for row in rows], [1.0], 10, 0)


def run(
    start: Path,
    settings: Settings,
    *,
    states: StateFolder | None = None,
    stop_at: int | None = None,
    heldout: bool = True,
) -> tuple[Weights, list[dict[str, Any]], dict[int, Weights]]:
    """Train; the weights at the end, the log, and the weights after every step (0: before the first).

    Raises:
        KeyboardInterrupt: after step `stop_at`.
    """
    model: Any = load_model(start)
    groups = parts.groups(model, parts.freeze_all_but(model, "all"), lr_parts={}, weight_decay=0.0)
    student = StudentWithObjective(model, kl=0.0, ce=1.0, temperature=1.0, autocast=False)

    def weights() -> Weights:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    steps = {0: weights()}

    def after_step(step: int) -> None:
        steps[step] = weights()
        if step == stop_at:
            raise KeyboardInterrupt

    with deterministic(1):
        log = train(
            student,
            groups,
            corpus(1),
            settings,
            heldout=HeldOut(corpus(2), ["all"]) if heldout else None,
            states=states,
            progress=Silent(),
            after_step=after_step,
        )
    return weights(), log, steps


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_of_all_looks_is_kept(siblings: dict[str, Path]) -> None:
    end, log, steps = run(siblings["base"], SETTINGS)
    looks = {row["step"]: row["heldout"]["nll"] for row in log if "heldout" in row}
    assert list(looks) == list(range(17))
    best = min(looks, key=looks.__getitem__)
    assert 0 < best < 16  # neither the start nor the end
    assert same(end, steps[best])
    last, plain_log, _ = run(siblings["base"], dataclasses.replace(SETTINGS, keep_best=False))
    assert plain_log == log
    assert same(last, steps[16])
    assert not same(last, end)


def test_it_is_never_worse_than_the_start(siblings: dict[str, Path]) -> None:
    """At a rate that does nothing but harm the model ends as it was."""
    end, log, steps = run(siblings["base"], dataclasses.replace(SETTINGS, lr=1.0, tokens=400))
    assert least_heldout(log)["step"] == 0
    assert log[-1]["heldout"]["nll"] > log[0]["heldout"]["nll"] + 0.5
    assert same(end, steps[0])


def test_patience_ends_after_so_many_looks_in_vain(siblings: dict[str, Path]) -> None:
    _, whole, steps = run(siblings["base"], SETTINGS)
    best = least_heldout(whole)["step"]
    for patience in (1, 2):
        end, log, _ = run(siblings["base"], dataclasses.replace(SETTINGS, patience=patience))
        assert log[-1]["step"] == best + patience
        assert log == whole[: len(log)]
        assert same(end, steps[best])
    end, log, _ = run(siblings["base"], dataclasses.replace(SETTINGS, patience=2, keep_best=False))
    assert same(end, steps[best + 2])
    _, log, _ = run(siblings["base"], dataclasses.replace(SETTINGS, patience=16))
    assert log == whole


def test_the_mean_over_domains_decides() -> None:
    """Not the mean over tokens, in which a large domain would hide a small one."""
    rows: list[dict[str, Any]] = [
        {"step": 0, "heldout": {"nll": 2.0, "tokens": 10, "domains": {"large": 2.0, "small": 2.0}}},
        {"step": 1, "heldout": {"nll": 1.9, "tokens": 10, "domains": {"large": 1.8, "small": 2.8}}},
        {"step": 1, "loss": 0.1},
        {"step": 2, "heldout": {"nll": 1.95, "tokens": 10, "domains": {"large": 1.94, "small": 2.0}}},
        {"step": 3, "heldout": {"nll": 1.95, "tokens": 10, "domains": {"large": 1.94, "small": 2.0}}},
    ]
    assert least_heldout(rows)["step"] == 2


@pytest.mark.parametrize(("save_every", "patience"), [(100, 2), (200, 1)])
def test_a_stopped_run_goes_on_and_ends_the_same(
    siblings: dict[str, Path], tmp_path: Path, save_every: int, patience: int
) -> None:
    """Wherever it was stopped: before the best look, behind it, and when it was over but not yet written."""
    settings = dataclasses.replace(SETTINGS, save_every=save_every, patience=patience)
    end, log, _ = run(siblings["base"], settings)
    best, last = least_heldout(log)["step"], log[-1]["step"]
    assert 1 < best < last < 16
    for stop_at in (1, best, best + 1, last):
        states = StateFolder(tmp_path / str(stop_at))
        with pytest.raises(KeyboardInterrupt):
            run(siblings["base"], settings, states=states, stop_at=stop_at)
        again, its_log, _ = run(siblings["base"], settings, states=states)
        assert its_log == log, stop_at
        assert same(again, end), stop_at


def test_patience_without_held_out_text_never_ends(siblings: dict[str, Path]) -> None:
    _, log, _ = run(siblings["base"], dataclasses.replace(SETTINGS, tokens=200, patience=1), heldout=False)
    assert [row["step"] for row in log] == [1, 2]


@pytest.fixture
def recipe(small: dict[str, Any]) -> dict[str, Any]:
    """A rate that harms: the start is the best."""
    return {"model": "base", "data": "math.jsonl", "eval_data": "held.jsonl", "save_every": 200, **small, "lr": 1.0}


def test_the_stage_says_what_it_kept(
    recipe: dict[str, Any], tmp_path: Path, ctx: Context, siblings: dict[str, Path]
) -> None:
    from safetensors.torch import load_file

    notes: list[str] = []

    class Listening:
        task = ctx.progress.task

        def note(self, message: str) -> None:
            notes.append(message)

    config = parse(TuneConfig, {**recipe, "keep_best": True, "patience": 3}, where="r")
    tune(config, tmp_path / "out", dataclasses.replace(ctx, progress=Listening()))
    checks = json.loads((tmp_path / "out" / "solera.json").read_text())["checks"]
    assert checks["kept_at_tokens"] == 0
    assert checks["heldout_nll_after"] == checks["heldout_nll_before"]
    assert checks["heldout_nll_after_by_domain"] == checks["heldout_nll_before_by_domain"]
    assert same(load_file(tmp_path / "out" / "model.safetensors"), load_file(siblings["base"] / "model.safetensors"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "heldout" in row]) == 4
    assert any(
        note == f"stopped at {rows[-1]['tokens']} of 1600 tokens: the held-out loss falls no more" for note in notes
    )


def test_the_plan_counts_the_weights_that_are_kept(recipe: dict[str, Any], ctx: Context) -> None:
    plans = [plan_tune(parse(TuneConfig, {**recipe, "keep_best": kept}, where="r"), ctx) for kept in (False, True)]
    weights = plans[0].writes[0]["bytes"]
    assert plans[1].memory_bytes - plans[0].memory_bytes == weights
    assert plans[1].writes[1]["bytes"] - plans[0].writes[1]["bytes"] == weights


@pytest.mark.parametrize("setting", [{"keep_best": True}, {"patience": 2}])
def test_both_go_by_held_out_text(
    recipe: dict[str, Any], setting: dict[str, Any], write_jsonl: Callable[..., Path]
) -> None:
    del recipe["eval_data"]
    with pytest.raises(ConfigError, match="keep_best and patience go by the loss on held-out text; give eval_data"):
        parse(TuneConfig, {**recipe, **setting}, where="r")
