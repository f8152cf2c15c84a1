"""What the loop promises: gradients that no division changes, frozen parts that stay, teachers that are heard apart."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from solera_core.progress import Silent
from solera_distill import parts
from solera_distill.batches import Corpus, Piece
from solera_distill.loop import Settings, deterministic, train
from solera_distill.objective import StudentWithObjective, check_head, hidden_states

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def invariance() -> Any:
    """The module beside this file (tests are imported by file, not as a package)."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("invariance", HERE / "invariance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        scale = float(b[name].abs().max())
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5 * scale, msg=name)


def test_the_gradient_is_the_same_in_one_micro_batch_and_in_eight(invariance: Any, siblings: dict[str, Path]) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    whole, whole_sums = invariance.step_gradient(siblings["base"], limit=4096, accelerator=accelerator)
    single, single_sums = invariance.step_gradient(siblings["base"], limit=1, accelerator=accelerator)
    close(whole, single)
    torch.testing.assert_close(whole_sums, single_sums, rtol=1e-6, atol=0)
    assert whole_sums.min() > 0


def test_the_gradient_is_the_textbooks(invariance: Any, siblings: dict[str, Path]) -> None:
    """Against transformers' own loss on one unpadded piece at a time: CE only, mean over all learned tokens."""
    from accelerate import Accelerator

    from solera_core.causal_lm import load_model
    from solera_distill.batches import micro_batches
    from solera_distill.loop import gradient

    pieces = invariance.pieces()
    learned = int(sum(p.learned.sum() for p in pieces))
    reference: Any = load_model(siblings["base"])
    for piece in pieces:
        labels = torch.from_numpy(np.where(np.concatenate([[False], piece.learned]), piece.ids, -100)).long()
        loss = reference(input_ids=torch.from_numpy(piece.ids).long()[None], labels=labels[None]).loss
        (loss * int(piece.learned.sum()) / learned).backward()
    ours: Any = load_model(siblings["base"])
    student = StudentWithObjective(ours, kl=0.0, ce=1.0, temperature=1.0, autocast=False)
    gradient(student, student, micro_batches(pieces, 4096), learned, Accelerator(cpu=True), (), key="k")
    close(
        {n: p.grad for n, p in ours.named_parameters() if p.grad is not None},
        {n: p.grad for n, p in reference.named_parameters() if p.grad is not None},
    )


def test_the_gradient_is_the_same_on_two_ranks(invariance: Any, siblings: dict[str, Path], tmp_path: Path) -> None:
    import socket

    from accelerate import Accelerator
    from safetensors.torch import load_file

    expected, sums = invariance.step_gradient(siblings["base"], limit=4096, accelerator=Accelerator(cpu=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(sys.path)
    common = {**os.environ, "PYTHONPATH": path, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(HERE / "invariance.py"), str(siblings["base"]), str(tmp_path)]
    processes = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
    for rank in range(2):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        torch.testing.assert_close(found.pop("sums"), sums, rtol=1e-6, atol=0)
        close(found, expected)


SETTINGS = Settings(
    seed=0,
    tokens=400,
    tokens_per_step=100,
    micro_batch_tokens=100,
    lr=1e-2,
    schedule="cosine",
    warmup=0.05,
    final_lr=0.1,
    betas=(0.9, 0.95),
    clip=1.0,
    save_every=10**9,
    bfloat16=False,
)


def corpus(routes: int = 1) -> Corpus:
    random = np.random.default_rng(1)
    pieces = [
        Piece(random.integers(2, 300, 21).astype(np.int32), np.ones(20, np.bool_), i % routes, 0) for i in range(12)
    ]
    return Corpus(pieces, [1.0], 12, 0)


def run(
    model: Any, what: list[Any] | str, *, teachers: list[Any] | None = None, routes: int = 1
) -> list[dict[str, Any]]:
    part_of = parts.freeze_all_but(model, what)
    groups = parts.groups(model, part_of, lr_parts={}, weight_decay=0.0)
    kl = 1.0 if teachers else 0.0
    student = StudentWithObjective(model, kl=kl, ce=1.0 - kl, temperature=1.0, autocast=False)
    with deterministic(1):
        return train(student, groups, corpus(routes), SETTINGS, teachers=teachers or (), progress=Silent())


def test_parts_of_a_mixture_of_experts_train_alone(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    from solera_core.causal_lm import load_model

    moe = make_model(tmp_path / "moe", family="mixtral", num_local_experts=3, num_experts_per_tok=2)
    for chosen, marks in [
        (["router"], [".gate."]),
        (["ffn"], ["experts"]),
        (["router", "attention", "norms"], [".gate.", "attn", "norm"]),
    ]:
        model: Any = load_model(moe)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        run(model, chosen)
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n in before if any(mark in n for mark in marks)}


def test_each_teacher_is_heard_on_its_own_text_only(siblings: dict[str, Path]) -> None:
    from solera_core.causal_lm import load_model

    heard: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set()}
    teachers: list[Any] = [load_model(siblings["a"]), load_model(siblings["b"])]
    for i, teacher in enumerate(teachers):
        teacher.requires_grad_(False)
        teacher.base_model.register_forward_pre_hook(
            lambda _, __, kwargs, i=i: heard[i].update(tuple(r) for r in kwargs["input_ids"].tolist()), with_kwargs=True
        )
    run(load_model(siblings["base"]), "all", teachers=teachers, routes=2)
    for i in (0, 1):
        assert heard[i] == {tuple(p.ids[:-1].tolist()) for p in corpus(2).pieces if p.route == i}


def test_learning_from_oneself_changes_nothing(siblings: dict[str, Path]) -> None:
    from solera_core.causal_lm import load_model

    model: Any = load_model(siblings["base"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    log = run(model, "all", teachers=[load_model(siblings["base"])])
    assert [row["loss"] for row in log] == [0.0] * len(log)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_right_padding_changes_nothing(siblings: dict[str, Path]) -> None:
    from solera_core.causal_lm import load_model

    model: Any = load_model(siblings["base"])
    ids = torch.arange(5, 12).unsqueeze(0)
    padded = torch.cat([ids, torch.zeros(1, 9, dtype=torch.long)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(model, padded)[:, :7], hidden_states(model, ids), rtol=1e-5, atol=1e-6)


def test_a_model_with_capped_logits_is_refused(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    from solera_core.causal_lm import load_model
    from solera_core.errors import CheckpointError

    capped = make_model(tmp_path / "capped", family="gemma2", head_dim=8, final_logit_softcapping=0.05)
    with pytest.raises(CheckpointError, match="cap"):
        check_head(load_model(capped), "capped")


def test_the_callers_settings_come_back() -> None:
    threads, mode = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with deterministic(1):
        assert torch.are_deterministic_algorithms_enabled()
        torch.manual_seed(0)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (threads, mode)
    assert torch.equal(torch.rand(1), expected)
