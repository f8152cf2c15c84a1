"""The training loop: one optimizer step after the other, thin, on accelerate.

What it promises, and tests prove:
- The gradient of a step is that of the mean over all learned tokens of the step, however they are divided over
  micro-batches and processes.
- A killed run, started again, ends with the same bytes as one that was not disturbed.
- With `keep_best` the model ends as it was where the held-out loss was least, the start included.
- Nothing is silent: a loss or gradient that is not finite ends the run, naming step and rate.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from solera_core.errors import ConfigError
from solera_core.progress import Progress
from solera_core.threads import torch_threads
from solera_distill.batches import Corpus, MicroBatch, Order, micro_batches
from solera_distill.heldout import HeldOut, measure
from solera_distill.objective import StudentWithObjective, half, hidden_states, output_matrix
from solera_distill.schedule import Schedule, rate
from solera_distill.state import Position, State, StateFolder, optimizer_moments, restore

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Settings", "deterministic", "least_heldout", "train"]


@dataclass(frozen=True)
class Settings:
    """Plain values of one run; the recipe's keys of the same names say what they mean."""

    seed: int
    tokens: int
    tokens_per_step: int
    micro_batch_tokens: int
    lr: float
    schedule: Schedule
    warmup: float
    final_lr: float
    betas: tuple[float, float]
    clip: float
    save_every: int
    bfloat16: bool
    keep_best: bool = False
    patience: int | None = None


@contextlib.contextmanager
def deterministic(threads: int | None) -> Iterator[None]:
    """Deterministic kernels, `threads` threads, and the caller's random state as it was, for the time of a run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to repeat a matrix product exactly
    kernels = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a debugging aid that writes every new tensor twice
    try:
        with torch_threads(threads), torch.random.fork_rng():
            yield
    finally:
        torch.use_deterministic_algorithms(kernels)
        memory.fill_uninitialized_memory = fill


def train(
    student: StudentWithObjective,
    groups: list[dict[str, Any]],
    corpus: Corpus,
    settings: Settings,
    *,
    teachers: Sequence[Any] = (),
    heldout: HeldOut | None = None,
    states: StateFolder | None = None,
    progress: Progress,
    accelerator: "Accelerator | None" = None,
    after_step: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train `student` in place; returns the rows of training.jsonl.

    Args:
        student: model and objective; parameters that require no gradient stay as they are.
        groups: optimizer groups with `share`, the multiplier of the rate.
        corpus: the text; the route of a piece is the index of its teacher.
        settings: everything else.
        teachers: frozen models; needed when the objective has a divergence.
        heldout: measured before, at every `save_every` tokens and after.
        states: where to keep the state of the run; a state found there is resumed.
        progress: where to report.
        accelerator: default: one made here, from the environment that `accelerate launch` sets.
        after_step: called with the step's number when its state, if one was due, is on the disk.

    Raises:
        ConfigError: the training diverged.
    """
    if accelerator is None:
        from accelerate import Accelerator

        accelerator = Accelerator()
    device = accelerator.device
    model = student.model
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, fused=device.type in ("cpu", "cuda"))
    prepared, prepared_optimizer = accelerator.prepare(student, optimizer)
    for teacher in {id(t): t for t in teachers}.values():
        teacher.to(device)
    position = Position()
    state = None if states is None else states.load()
    if state is not None:
        restore(state, parameters, optimizer)
        position = state.position
        progress.note(f"resumed at {position.tokens} of {settings.tokens} tokens")
    names = {id(p): n for n, p in parameters.items()}
    order = Order(corpus, settings.seed)
    limit = min(settings.micro_batch_tokens, math.ceil(settings.tokens_per_step / accelerator.num_processes))

    best: dict[str, Tensor] = {} if state is None else state.best

    def look_at_heldout() -> None:
        if heldout is not None:
            row = measure(model, heldout, limit=limit, bfloat16=settings.bfloat16, device=device)
            position.log.append({"step": position.step, "tokens": position.tokens, "heldout": row})
            if settings.keep_best and least_heldout(position.log)["step"] == position.step:
                best.update({n: p.detach().clone() for n, p in parameters.items()})

    with progress.task("training", settings.tokens, "tokens") as task:
        task.advance(min(position.tokens, settings.tokens))
        if position.step == 0 and not position.log:
            look_at_heldout()
        prepared.train()
        while position.tokens < settings.tokens and not _is_over(position.log, settings.patience):
            asked = min(settings.tokens_per_step, settings.tokens - position.tokens)
            pieces, cursor = order.take(position.cursor, asked)
            tokens = sum(p.tokens for p in pieces)
            share = rate(
                min(1.0, (position.tokens + tokens) / settings.tokens),
                schedule=settings.schedule,
                warmup=settings.warmup,
                final=settings.final_lr,
            )
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * share * group["share"]
            batches = micro_batches(pieces, limit)
            learned = sum(len(b.targets) for b in batches)
            sums = gradient(
                prepared, student, batches, learned, accelerator, teachers, key=f"{settings.seed}/{position.step}"
            )
            kl, ce = (sums / learned).tolist()
            loss = student.kl * kl + student.ce * ce
            clipped: Any = accelerator.clip_grad_norm_(list(parameters.values()), settings.clip)
            norm = float(clipped)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise ConfigError(
                    f"step {position.step + 1}, learning rate {settings.lr * share:.3g}: the loss is {loss:.6g}, "
                    f"the norm of its gradient {norm:.6g}: the training diverged; lower `lr`, or look for "
                    "damaged weights"
                )
            prepared_optimizer.step()
            prepared_optimizer.zero_grad()
            due = position.tokens // settings.save_every < (position.tokens + tokens) // settings.save_every
            position.step += 1
            position.tokens += tokens
            position.cursor = cursor
            row: dict[str, Any] = {
                "step": position.step,
                "tokens": position.tokens,
                "loss": loss,
                "lr": settings.lr * share,
                "gradient_norm": norm,
            }
            position.log.append(row | ({"kl": kl, "ce": ce} if student.kl and student.ce else {}))
            task.advance(tokens, f"loss {loss:.3f}")
            done = position.tokens >= settings.tokens
            if due or done:
                look_at_heldout()
            if states is not None and due and not done and accelerator.is_main_process:
                states.save(State(position, dict(parameters), optimizer_moments(optimizer, names), best))
            if after_step is not None:
                after_step(position.step)
    if position.tokens < settings.tokens:
        progress.note(f"stopped at {position.tokens} of {settings.tokens} tokens: the held-out loss falls no more")
    if best:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(best[name])
    model.eval()
    return position.log


def least_heldout(log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of training.jsonl with the least held-out loss, the mean over domains; the first of equal ones."""
    return min((row for row in log if "heldout" in row), key=lambda row: _mean_of_domains(row["heldout"]))


def _is_over(log: Sequence[dict[str, Any]], patience: int | None) -> bool:
    """Whether the last row is a look at the held-out text, and it and `patience - 1` before it were in vain.

    A function of the log alone, so that a run that was killed when it was over is over when it is resumed.
    """
    if patience is None or not log or "heldout" not in log[-1]:
        return False
    rows = [row for row in log if "heldout" in row]
    return len(rows) - 1 - rows.index(least_heldout(log)) >= patience


def _mean_of_domains(heldout: dict[str, Any]) -> float:
    domains = list(heldout.get("domains", {"": heldout["nll"]}).values())
    return float(sum(domains) / len(domains))


def gradient(
    prepared: Any,
    student: StudentWithObjective,
    batches: Sequence[MicroBatch],
    learned: int,
    accelerator: "Accelerator",
    teachers: Sequence[Any],
    *,
    key: str,
) -> Tensor:
    """Leave the gradient of the mean loss over `learned` tokens in the parameters; returns the sums of KL and CE.

    Micro-batches go to the processes in turn. Every process runs equally many, because FSDP gathers weights in each
    forward: who has one too few runs its last again with weight 0. DDP averages gradients, so losses are multiplied by
    the number of processes; it synchronises once, in the last backward.
    """
    device, world, rank = accelerator.device, accelerator.num_processes, accelerator.process_index
    rounds = math.ceil(len(batches) / world)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for turn in range(rounds):
        number = turn * world + rank
        batch = batches[min(number, len(batches) - 1)]
        weight = 1.0 if number < len(batches) else 0.0
        inputs = torch.from_numpy(batch.inputs).to(device)
        positions = torch.from_numpy(batch.positions).to(device)
        teacher_hidden = teacher_head = None
        if student.kl:
            teacher = teachers[batch.route]
            with torch.no_grad(), half(device, student.autocast):
                hidden_BTE = hidden_states(teacher, inputs)
            teacher_hidden = hidden_BTE.reshape(-1, hidden_BTE.shape[-1])
            if len(batch.positions) != teacher_hidden.shape[0]:
                teacher_hidden = teacher_hidden.index_select(0, positions)
            teacher_head = output_matrix(teacher)
        torch.manual_seed(_seed(f"{key}/{number}"))  # dropout, where a model has it
        with accelerator.no_sync(prepared) if turn < rounds - 1 else contextlib.nullcontext():
            loss, parts = prepared(
                inputs,
                positions,
                torch.from_numpy(batch.targets).to(device),
                weight * world / learned,
                teacher_hidden,
                teacher_head,
            )
            accelerator.backward(loss)
        sums += weight * parts
    return accelerator.reduce(sums, reduction="sum")  # type: ignore[no-any-return]


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"dropout/{key}".encode()).digest()[:8], "little") >> 1
