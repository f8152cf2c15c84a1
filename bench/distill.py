"""The fused linear + KL loss against the textbook one: peak memory, CPU time, equal gradients.

The textbook: both logit matrices in full, log_softmax, kl_div, autograd. Each run is a process of its own with one
thread; runs are interleaved, medians printed. Memory is the peak above the loaded tensors.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time


def measure(kind: str, n: int, d: int, v: int) -> None:
    """One process: print CPU seconds, peak MB above the inputs, and a checksum of the gradients."""
    import torch

    from solera_distill.losses import fused_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(n, d, requires_grad=True)
    head = (torch.randn(v, d) * d**-0.5).requires_grad_()
    teacher_hidden, teacher_head = torch.randn(n, d), torch.randn(v, d) * d**-0.5
    targets = torch.randint(0, v, (n,))
    torch.nn.functional.log_softmax(torch.randn(8, 8), -1)  # first use of the kernels
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    if kind == "fused":
        loss, _ = fused_loss(
            hidden, head, targets, teacher_hidden=teacher_hidden, teacher_head=teacher_head, kl=1.0, ce=0.0, scale=1 / n
        )
    else:
        student = torch.log_softmax(hidden @ head.T, -1)
        teacher = torch.log_softmax(teacher_hidden @ teacher_head.T, -1)
        loss = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="sum") / n
    loss.backward()  # type: ignore[no-untyped-call]  # torch ships backward untyped
    used = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - floor
    assert hidden.grad is not None
    assert head.grad is not None
    print(used, peak / 1024, loss.item(), hidden.grad.double().norm().item(), head.grad.double().norm().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--measure", choices=["fused", "textbook"])
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.tokens, options.hidden, options.vocabulary)
        return
    seen: dict[str, list[list[float]]] = {"textbook": [], "fused": []}
    for _ in range(options.runs):
        for kind, rows in seen.items():
            command = [sys.executable, __file__, "--measure", kind]
            command += ["--tokens", str(options.tokens), "--hidden", str(options.hidden)]
            command += ["--vocabulary", str(options.vocabulary)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append([float(x) for x in done.stdout.split()])
    print(f"N={options.tokens} D={options.hidden} V={options.vocabulary}, float32, 1 thread, {options.runs} runs")
    medians = {kind: [statistics.median(column) for column in zip(*rows, strict=True)] for kind, rows in seen.items()}
    for kind, (cpu, peak, loss, grad_hidden, grad_head) in medians.items():
        gradients = f"|dh| {grad_hidden:.6e}  |dW| {grad_head:.6e}"
        print(f"{kind:<10} {cpu:6.2f} CPU s  {peak:7.0f} MB  loss {loss:.6f}  {gradients}")
    print(
        f"fused / textbook: time {medians['fused'][0] / medians['textbook'][0]:.2f}, "
        f"memory {medians['fused'][1] / medians['textbook'][1]:.2f}"
    )


if __name__ == "__main__":
    main()
