"""The gradient of one optimizer step over fixed pieces, under any division into micro-batches and processes.

Used by test_loop.py as a module, and run by it as a program, once for each of several processes.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from solera_core.causal_lm import load_model
from solera_distill.batches import Piece, micro_batches
from solera_distill.loop import gradient
from solera_distill.objective import StudentWithObjective


def pieces() -> list[Piece]:
    """Eight pieces of unequal length, half of whose tokens are learned, of two teachers."""
    random = np.random.default_rng(0)
    return [
        Piece(random.integers(2, 300, n + 1).astype(np.int32), random.random(n) < 0.5, i % 2, 0)
        for i, n in enumerate([20, 19, 7, 3, 12, 20, 2, 9])
    ]


def step_gradient(model_dir: Path, *, limit: int, accelerator: Accelerator) -> tuple[dict[str, Tensor], Tensor]:
    """The gradient by parameter name, and the sums of KL and CE."""
    model: Any = load_model(model_dir)
    teachers: list[Any] = [load_model(model_dir), load_model(model_dir)]
    for i, teacher in enumerate(teachers):
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        teacher.requires_grad_(False)
    student = StudentWithObjective(model, kl=0.8, ce=0.2, temperature=1.5, autocast=False)
    prepared = accelerator.prepare(student)
    batches = micro_batches(pieces(), limit)
    learned = sum(len(b.targets) for b in batches)
    sums = gradient(prepared, student, batches, learned, accelerator, teachers, key="k")
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, sums


def main(model: str, out: str) -> None:
    """One of two processes: its view of the gradient, into `out`."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    gradients, sums = step_gradient(Path(model), limit=40, accelerator=accelerator)
    save_file({**gradients, "sums": sums}, Path(out) / f"rank-{accelerator.process_index}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
