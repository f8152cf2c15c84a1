"""The load-balancing loss: by hand, against transformers' own, and in the gradient of a step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from solera_core.causal_lm import load_model, load_tokenizer
from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_core.strict import parse
from solera_distill.balance import balance_loss, router_modules, router_outputs
from solera_distill.batches import Piece, micro_batches
from solera_distill.config import TuneConfig
from solera_distill.loop import gradient
from solera_distill.objective import StudentWithObjective
from solera_distill.run import plan_tune, tune

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "granitemoe": {"num_local_experts": 4},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 24},
    "flex_olmo": {"num_experts": 4},
}


@pytest.fixture(scope="module", params=FAMILIES)
def moe(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]
) -> Path:
    """A mixture of four experts, two a token, whose routers are far from even."""
    path = tmp_path_factory.mktemp("moe") / request.param
    return _uneven(make_model(path, family=request.param, num_experts_per_tok=2, **FAMILIES[request.param]))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    path = tmp_path_factory.mktemp("mixtral") / "moe"
    return _uneven(make_model(path, family="mixtral", num_experts_per_tok=2, num_local_experts=4))


def _uneven(path: Path) -> Path:
    """Routers whose rows differ in size, so that some experts are chosen far more often than others."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    routers = [name for name, t in tensors.items() if t.shape == (4, 32)]
    assert len(routers) == 2
    for name in routers:
        tensors[name] *= torch.tensor([[40.0], [20.0], [4.0], [1.0]])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def theirs(logits_NE: torch.Tensor, mask_N: torch.Tensor | None, k: int = 2) -> torch.Tensor:
    """Of one layer, by transformers. It counts k choices a token, so that it is k where the load is even, not 1."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss: Any = load_balancing_loss_func((logits_NE,), logits_NE.shape[-1], k, mask_N)
    return loss / k  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("logits", "chosen", "expected"),
    [
        ([[0.0, 0.0], [0.0, 0.0]], [[0], [1]], 1.0),  # even
        ([[99.0, 0.0], [99.0, 0.0]], [[0], [0]], 2.0),  # everything to one of two
        ([[0.0, np.log(3)], [0.0, np.log(3)]], [[1], [1]], 1.5),  # f = (0, 1), P = (1/4, 3/4)
        ([[0.0, np.log(3)], [0.0, np.log(3)]], [[0, 1], [0, 1]], 1.0),  # both experts work on every token
    ],
)
def test_by_hand(logits: list[list[float]], chosen: list[list[int]], expected: float) -> None:
    layer = torch.tensor(logits), torch.tensor(chosen)
    assert float(balance_loss([layer], torch.tensor([0, 1]))) == pytest.approx(expected)
    worst = torch.tensor([[0.0, 99.0], *logits]), torch.tensor([chosen[0], *chosen])  # a first token that only pads
    assert float(balance_loss([worst], torch.tensor([1, 2]))) == pytest.approx(expected)
    other = torch.zeros(2, 2), torch.tensor([[0], [1]])
    assert float(balance_loss([layer, other], torch.tensor([0, 1]))) == pytest.approx((expected + 1) / 2)


def test_every_target_agrees_with_transformers(moe: Path) -> None:
    """On a padded batch, with the padding masked."""
    model: Any = load_model(moe)
    ids = torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    mask[2, 2:] = 0
    routers = router_modules(model, "moe")
    assert len(routers) == 2
    with torch.no_grad(), router_outputs(routers) as ours:
        model(input_ids=ids, use_cache=False)
    loss = balance_loss(ours, mask.reshape(-1).nonzero().squeeze(1))
    expected = torch.stack([theirs(logits, mask) for logits, _ in ours]).mean()
    torch.testing.assert_close(loss, expected)
    assert 1.001 < float(loss) < 4
    assert abs(float(balance_loss(ours, torch.arange(36))) - float(loss)) > 1e-4  # padding would count
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert len(ours) == 2  # outside nothing is gathered


@pytest.mark.parametrize("prompts", [False, True])
def test_the_gradient_is_that_of_both_losses(mixtral: Path, prompts: bool) -> None:
    """Two micro-batches, padded; against transformers' logits, router logits and balancing loss. With prompts, only
    learned tokens count: those that a prompt or padding holds do not.
    """
    from accelerate import Accelerator

    draw = np.random.default_rng(0)
    pieces = [
        Piece(draw.integers(2, 300, n + 1).astype(np.int32), draw.random(n) < (0.5 if prompts else 2.0), 0, 0)
        for n in (41, 40, 20, 19, 18)
    ]
    batches = micro_batches(pieces, 96)
    assert [batch.inputs.shape for batch in batches] == [(2, 41), (3, 20)]
    assert all(len(batch.positions) < batch.inputs.size for batch in batches)
    learned = sum(len(batch.targets) for batch in batches)

    reference: Any = load_model(mixtral)
    for batch in batches:
        out = reference(input_ids=torch.from_numpy(batch.inputs), output_router_logits=True, use_cache=False)
        positions = torch.from_numpy(batch.positions)
        logits = out.logits.reshape(-1, out.logits.shape[-1])[positions]
        ce = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.targets), reduction="sum")
        mask = torch.zeros(batch.inputs.size).index_fill_(0, positions, 1.0)
        even = torch.stack([theirs(layer, mask) for layer in out.router_logits]).mean()
        loss: Any = (ce + 0.3 * len(positions) * even) / learned
        loss.backward()

    ours: Any = load_model(mixtral)
    student = StudentWithObjective(
        ours, kl=0.0, ce=1.0, temperature=1.0, autocast=False, balance=0.3, routers=router_modules(ours, "moe")
    )
    gradient(student, student, batches, learned, Accelerator(cpu=True), (), key="k")
    for (name, parameter), expected in zip(ours.named_parameters(), reference.parameters(), strict=True):
        scale = float(expected.grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_training_evens_the_load(mixtral: Path, tmp_path: Path, ctx: Context, small: dict[str, Any]) -> None:
    recipe = {"model": str(mixtral), "data": ["math.jsonl", "code.jsonl"], "parts": ["router"], **small, "lr": 0.1}
    for weight in (0.0, 1.0):
        tune(parse(TuneConfig, {**recipe, "balance": weight}, where="r"), tmp_path / str(weight), ctx)
    lines = [json.loads(line)["text"] for line in (ctx.base_dir / "code.jsonl").read_text().splitlines()]
    tokenizer: Any = load_tokenizer(mixtral)
    ids = torch.tensor([tokenizer("".join(lines)).input_ids[:120]])
    loads: list[float] = []
    for path in (mixtral, tmp_path / "0.0", tmp_path / "1.0"):
        model: Any = load_model(path)
        with torch.no_grad(), router_outputs(router_modules(model, "moe")) as routed:
            model(input_ids=ids, use_cache=False)
        loads.append(float(balance_loss(routed, torch.arange(120))))
    before, without, balanced = loads
    assert balanced - 1 < 0.5 * min(before - 1, without - 1), loads


def test_a_dense_model_has_no_load(ctx: Context, small: dict[str, Any]) -> None:
    """Refused by the plan, before weights are read."""
    config = parse(TuneConfig, {"model": "base", "data": "math.jsonl", "balance": 0.01, **small}, where="r")
    with pytest.raises(ConfigError, match=r"balance: .*base is a llama, no mixture of experts .*leave balance out"):
        plan_tune(config, ctx)
