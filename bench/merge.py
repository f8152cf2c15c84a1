"""Merging: whole processes of solera and mergekit on the same synthetic Llama-shaped bf16 models, beside `cp`.

Base and two fine-tunes of about `--millions` parameters are generated (a fine-tune changes 40 % of the entries).
Runs are interleaved; wall and CPU seconds and peak memory are medians. The page cache is warm.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from solera_core.writer import CheckpointWriter, TensorSpec

METHODS = {
    "linear": "merge_method: linear\ndtype: bfloat16\nmodels:\n  - {{model: {a}, parameters: {{weight: 0.6}}}}\n"
    "  - {{model: {b}, parameters: {{weight: 0.4}}}}\n",
    "slerp": "merge_method: slerp\ndtype: bfloat16\nbase_model: {a}\nmodels:\n  - {{model: {a}}}\n  - {{model: {b}}}\n"
    "parameters: {{t: 0.4}}\n",
    "task_arithmetic": "merge_method: task_arithmetic\ndtype: bfloat16\nbase_model: {base}\nmodels:\n"
    "  - {{model: {a}, parameters: {{weight: 0.5}}}}\n  - {{model: {b}, parameters: {{weight: 0.5}}}}\n",
    "ties": "merge_method: ties\ndtype: bfloat16\nbase_model: {base}\nmodels:\n"
    "  - {{model: {a}, parameters: {{weight: 1, density: 0.5}}}}\n"
    "  - {{model: {b}, parameters: {{weight: 1, density: 0.5}}}}\n",
    "dare_ties": "merge_method: dare_ties\ndtype: bfloat16\nbase_model: {base}\nmodels:\n"
    "  - {{model: {a}, parameters: {{weight: 0.5, density: 0.5}}}}\n"
    "  - {{model: {b}, parameters: {{weight: 0.5, density: 0.5}}}}\n",
}


@dataclass(frozen=True)
class Cost:
    """Of one process."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def specs(millions: float) -> tuple[dict[str, object], list[TensorSpec]]:
    """A Llama shape of about that many parameters."""
    layers = 12 if millions < 400 else 22
    hidden = 64 * max(1, round((millions * 1e6 / (layers * 11.5 + 12)) ** 0.5 / 64))
    ffn, vocab = int(2.75 * hidden) // 64 * 64, 8000
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    found = [TensorSpec("model.embed_tokens.weight", "BF16", (vocab, hidden))]
    for layer in range(layers):
        p = f"model.layers.{layer}."
        found += [TensorSpec(f"{p}self_attn.{m}_proj.weight", "BF16", (hidden, hidden)) for m in "qkvo"]
        found += [TensorSpec(f"{p}mlp.{m}_proj.weight", "BF16", (ffn, hidden)) for m in ("gate", "up")]
        found += [TensorSpec(f"{p}mlp.down_proj.weight", "BF16", (hidden, ffn))]
        found += [
            TensorSpec(f"{p}{n}.weight", "BF16", (hidden,)) for n in ("input_layernorm", "post_attention_layernorm")
        ]
    found += [TensorSpec("model.norm.weight", "BF16", (hidden,)), TensorSpec("lm_head.weight", "BF16", (vocab, hidden))]
    return config, found


def generate(directory: Path, millions: float, seed: int | None) -> None:
    """The base (seed None) or a fine-tune of it."""
    config, layout = specs(millions)
    directory.mkdir(parents=True)
    writer = CheckpointWriter(directory, layout)
    for index, spec in enumerate(layout):
        size = int(np.prod(spec.shape))
        values = np.random.default_rng(index).standard_normal(size, dtype=np.float32) * np.float32(0.02)
        if seed is not None:
            noise = np.random.default_rng([seed, index])
            changed = noise.random(size, dtype=np.float32) < 0.4
            values += changed * noise.standard_normal(size, dtype=np.float32) * np.float32(0.002)
        writer.write_flat(spec.name, 0, values)
    writer.finish()
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def run(command: list[str]) -> Cost:
    """One process; its own CPU time and peak memory through wait4."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="solera-bench-") as scratch:
        root = Path(scratch)
        for name, seed in (("base", None), ("a", 1), ("b", 2)):
            generate(root / name, options.millions, seed)
        size = sum(f.stat().st_size for f in (root / "a").iterdir())
        print(
            f"models of {size / 2e6:.0f}M parameters ({size / 1e9:.2f} GB), bf16, "
            f"{os.cpu_count()} cores, {options.runs} runs"
        )
        print(
            f"{'method':<16} {'solera s':>9} {'mergekit s':>11} {'cp s':>6} {'mergekit/solera':>16} {'solera/cp':>10} "
            f"{'CPU s':>12} {'peak MB':>13}"
        )
        for method in options.methods:
            config = root / f"{method}.yml"
            config.write_text(METHODS[method].format(**{n: root / n for n in ("base", "a", "b")}))
            ours: list[Cost] = []
            theirs: list[Cost] = []
            copies: list[Cost] = []
            for _ in range(options.runs):
                for costs, command in (
                    (ours, [sys.executable, "-m", "solera", "merge", str(config), str(root / "out-s"), "-q"]),
                    (theirs, [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), str(root / "out-m")]),
                    (copies, ["cp", "-r", str(root / "a"), str(root / "out-c")]),
                ):
                    costs.append(run(command))
                    for leftover in ("out-s", "out-m", "out-c"):
                        shutil.rmtree(root / leftover, ignore_errors=True)
            w = [statistics.median(c.wall_s for c in costs) for costs in (ours, theirs, copies)]
            cpu = [statistics.median(c.cpu_s for c in costs) for costs in (ours, theirs)]
            peak = [statistics.median(c.peak_mb for c in costs) for costs in (ours, theirs)]
            print(
                f"{method:<16} {w[0]:9.2f} {w[1]:11.2f} {w[2]:6.2f} {w[1] / w[0]:15.1f}x {w[0] / w[2]:9.1f}x "
                f"{cpu[0]:5.1f}/{cpu[1]:<6.1f} {peak[0]:6.0f}/{peak[1]:<6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
