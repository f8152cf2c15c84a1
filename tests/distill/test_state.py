"""States on disk: whole or absent, and exact."""

from pathlib import Path

import torch

from solera_distill.batches import Cursor
from solera_distill.state import Position, State, StateFolder, optimizer_moments, restore


def train_a_little(steps: int) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    advance(model, optimizer, range(steps))
    return model, optimizer


def advance(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(torch.full((1, 3), float(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, step: int) -> State:
    parameters = dict(model.named_parameters())
    moments = optimizer_moments(optimizer, {id(p): n for n, p in parameters.items()})
    position = Position(step, 10 * step, Cursor(1, 2), [{"step": step, "loss": 0.1}])
    return State(position, {n: p.data for n, p in parameters.items()}, moments)


def test_a_restored_run_goes_on_exactly(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "states")
    folder.save(state_of(*train_a_little(3), 3))
    model, optimizer = train_a_little(0)
    state = folder.load()
    assert state is not None
    assert state.position == Position(3, 30, Cursor(1, 2), [{"step": 3, "loss": 0.1}])
    restore(state, dict(model.named_parameters()), optimizer)
    advance(model, optimizer, range(3, 6))
    expected, _ = train_a_little(6)
    assert torch.equal(model.weight, expected.weight)
    assert torch.equal(model.bias, expected.bias)


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "states")
    for step in (1, 2, 3):
        folder.save(state_of(*train_a_little(step), step))
    assert [p.name for p in (tmp_path / "states").iterdir()] == ["step-000000003"]
    folder.remove()
    assert not (tmp_path / "states").exists()
    assert folder.load() is None


def test_an_unfinished_or_damaged_state_is_none(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "states")
    folder.save(state_of(*train_a_little(1), 1))
    unfinished = tmp_path / "states" / "writing-2"
    unfinished.mkdir()
    (unfinished / "tensors.safetensors").write_bytes(b"")
    assert (found := folder.load()) is not None
    assert found.position.step == 1
    folder.save(state_of(*train_a_little(2), 2))  # over the leftover of its own name
    assert [p.name for p in (tmp_path / "states").iterdir()] == ["step-000000002"]
    (tmp_path / "states" / "step-000000002" / "tensors.safetensors").write_bytes(b"torn")
    assert folder.load() is None
