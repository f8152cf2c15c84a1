"""Extracting a LoRA: whole processes of solera and mergekit on a synthetic Llama; how far each is from the fine-tune.

The fine-tune differs from its base by a matrix of falling spectrum in every linear layer (singular values ~ 1/k, as
those of real fine-tunes fall) plus noise; norms and embeddings are those of the base. Contestants take turns; figures
are medians over the rounds. The error is measured the same way for both: peft's own formula on the adapter that was
written, against the fine-tune, relative to the change.

    python -m bench.extract_lora                     0.1B parameters, rank 32
    python -m bench.extract_lora --size tiny --rank 8
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.merge import Cost, generate, run
from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.output import write_metadata
from solera_core.writer import CheckpointWriter, TensorSpec

SIZES = {"tiny": (256, 688, 2, 1000), "small": (768, 2048, 12, 8000)}
BIN = Path(sys.executable).parent


def fine_tune(base: Path, directory: Path) -> None:
    """The base plus a change of falling spectrum in every linear layer."""
    source = open_checkpoint(base, Context())
    directory.mkdir()
    specs = [TensorSpec(name, info.dtype, info.shape) for name, info in source.tensors.items()]
    random = np.random.default_rng(5)
    with CheckpointWriter(directory, specs) as writer:
        for spec in specs:
            values = source.read(spec.name)
            if "_proj" in spec.name:
                k = min(spec.shape) // 4
                left = random.standard_normal((spec.shape[0], k), dtype=np.float32)
                right = random.standard_normal((k, spec.shape[1]), dtype=np.float32)
                change = (left / np.arange(1, k + 1, dtype=np.float32)) @ right
                values = (values + np.float32(1e-4) * change).astype(np.float32)
            writer.write_flat(spec.name, 0, values.reshape(-1))
        writer.finish()
    write_metadata(directory, config=source.config, sidecars=[])


def error(base: Path, tuned: Path, adapter: Path) -> float:
    """Norm of (base + adapter - fine-tune) over that of (fine-tune - base)."""
    models = [open_checkpoint(str(ref), Context()) for ref in (f"{base}+{adapter}", tuned, base)]
    missing = change = 0.0
    for name in models[1].tensors:
        ours, goal, start = (model.read_flat(name).astype(np.float64) for model in models)
        missing += float(np.sum((ours - goal) ** 2))
        change += float(np.sum((goal - start) ** 2))
    return math.sqrt(missing / change)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="extract-") as scratch:
        root = Path(scratch)
        generate(root / "base", SIZES[options.size], None, "F32")
        fine_tune(root / "base", root / "tuned")
        rank = str(options.rank)
        pair = [str(root / "base"), str(root / "tuned")]
        contestants = {
            "solera": [sys.executable, "-m", "solera", "extract-lora", *pair, "{out}", "--rank", rank, "--quiet"],
            "mergekit": [
                *(str(BIN / "mergekit-extract-lora"), "--base-model", pair[0], "--model", pair[1]),
                *("--out-path", "{out}", "--max-rank", rank, "--quiet"),
            ],
        }
        costs: dict[str, list[Cost]] = {name: [] for name in contestants}
        errors: dict[str, float] = {}
        for _ in range(options.rounds):
            for name, command in contestants.items():
                out = root / "out"
                shutil.rmtree(out, ignore_errors=True)
                costs[name].append(run([part.format(out=out) for part in command]))
                errors[name] = error(*(root / "base", root / "tuned"), out)
        for name, found in costs.items():
            wall, cpu, memory = (
                statistics.median(getattr(cost, key) for cost in found) for key in ("wall_s", "cpu_s", "anon_mb")
            )
            print(f"{name:<9} {wall:8.1f} s {cpu:8.1f} CPU s {memory:8.0f} MB   error {errors[name]:.6f}")
        print(json.dumps({"errors": errors, "rounds": options.rounds, "rank": options.rank, "size": options.size}))


if __name__ == "__main__":
    main()
