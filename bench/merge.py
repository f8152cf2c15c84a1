"""Merging: whole processes of solera and mergekit on the same synthetic Llama-shaped models, beside `cp`.

Base and three fine-tunes are generated (a fine-tune changes 40 % of the entries). A round runs each contestant once,
so that whatever else the machine does meets all of them; figures are medians over the rounds, ratios are medians of the
ratios within a round. The page cache is warm unless said otherwise.

    python bench/merge.py                    mid size (0.27B parameters), all methods that both have
    python bench/merge.py --size big         1.1B parameters
    python bench/merge.py --small-tensors    36,000 tiny tensors
    python bench/merge.py --cap 512          under a memory limit in MB (needs a writable memory control group)
    python bench/merge.py --start            a tiny merge: what is fixed
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from solera_core.dtypes import from_float32
from solera_core.writer import CheckpointWriter, TensorSpec

MB = 1 << 20
POOL = 1 << 23
SIZES = {"tiny": (128, 352, 4, 1000), "mid": (1024, 2816, 16, 32000), "big": (2048, 5632, 19, 32000)}
GROUP = Path("/sys/fs/cgroup/memory/solera-bench")

# Method -> (parameters for all, takes a base, number of models besides it)
METHODS: dict[str, tuple[dict[str, Any], bool, int]] = {
    "linear": ({"weight": 0.4}, False, 3),
    "slerp": ({"t": 0.4}, True, 1),
    "task_arithmetic": ({"weight": 0.5}, True, 2),
    "ties": ({"weight": 0.5, "density": 0.3}, True, 2),
    "dare_ties": ({"weight": 0.5, "density": 0.3}, True, 2),
    "dare_linear": ({"weight": 0.5, "density": 0.3}, True, 2),
    "breadcrumbs": ({"weight": 0.5, "density": 0.3, "gamma": 0.01}, True, 2),
    "breadcrumbs_ties": ({"weight": 0.5, "density": 0.3, "gamma": 0.01}, True, 2),
    "della": ({"weight": 0.5, "density": 0.3, "epsilon": 0.1}, True, 2),
    "della_linear": ({"weight": 0.5, "density": 0.3, "epsilon": 0.1}, True, 2),
    "model_stock": ({}, True, 2),
    "nuslerp": ({"weight": 0.5}, False, 2),
    "multislerp": ({"weight": 0.5}, False, 3),
    "karcher": ({}, False, 3),
    "nearswap": ({"t": 0.001}, True, 1),
    "arcee_fusion": ({}, True, 1),
    "sce": ({"select_topk": 0.3}, True, 2),
    "ram": ({}, True, 2),
    "ramplus_tl": ({}, True, 2),
    "passthrough": ({}, False, 1),
}


@dataclass(frozen=True)
class Cost:
    """Of one process and its children."""

    wall_s: float
    cpu_s: float
    anon_mb: float


def generate(directory: Path, size: tuple[int, int, int, int], seed: int | None, dtype: str = "BF16") -> None:
    """The base (seed None) or a fine-tune of it."""
    hidden, ffn, layers, vocab = size
    specs = [TensorSpec("model.embed_tokens.weight", dtype, (vocab, hidden))]
    for layer in range(layers):
        p = f"model.layers.{layer}."
        specs += [TensorSpec(f"{p}self_attn.{m}_proj.weight", dtype, (hidden, hidden)) for m in "qkvo"]
        specs += [TensorSpec(f"{p}mlp.{m}_proj.weight", dtype, (ffn, hidden)) for m in ("gate", "up")]
        specs += [TensorSpec(f"{p}mlp.down_proj.weight", dtype, (hidden, ffn))]
        specs += [TensorSpec(f"{p}{n}_layernorm.weight", dtype, (hidden,)) for n in ("input", "post_attention")]
    specs += [TensorSpec("model.norm.weight", dtype, (hidden,)), TensorSpec("lm_head.weight", dtype, (vocab, hidden))]
    config = {
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
    write(directory, specs, config, seed)


def generate_small_tensors(directory: Path, count: int, seed: int | None) -> None:
    """A model of that many matrices of 8 x 8, named as the experts of a mixture; only solera is asked to read it."""
    layers = max(count // 384, 1)
    specs = [
        TensorSpec(f"model.layers.{layer}.mlp.experts.{e}.{m}_proj.weight", "BF16", (8, 8))
        for layer in range(layers)
        for e in range(128)
        for m in ("gate", "up", "down")
    ]
    write(directory, specs, {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": 8}, seed)


def write(directory: Path, specs: Sequence[TensorSpec], config: Mapping[str, Any], seed: int | None) -> None:
    """Values come from a pool, at another place for every tensor: fast, and no two tensors are equal."""
    pool = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32) * np.float32(0.02)
    if seed is not None:
        noise = np.random.default_rng(seed)
        changed = noise.random(POOL, dtype=np.float32) < 0.4
        pool += changed * noise.standard_normal(POOL, dtype=np.float32) * np.float32(0.002)
    directory.mkdir(parents=True)
    stored = {dtype: from_float32(pool, dtype) for dtype in {s.dtype for s in specs}}
    with CheckpointWriter(directory, specs, shard_bytes=1_000_000_000) as writer:
        for index, spec in enumerate(specs):
            raw = stored[spec.dtype]
            width = raw.size // POOL
            done, place = 0, index * 7919 % POOL
            while done < spec.size:
                n = min(spec.size - done, POOL - place, 1 << 20)
                writer.write_raw(spec.name, done, raw[place * width : (place + n) * width], checked=True)
                done, place = done + n, (place + n) % POOL
        writer.finish()
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def run(command: Sequence[str], *, capped: bool = False) -> Cost:
    """One process: wall time, CPU time through wait4, and the peak of its anonymous memory, looked at every 5 ms."""
    started = time.monotonic()
    inside = ["bash", "-c", f'echo $$ > {GROUP}/cgroup.procs; exec "$@"', "-"] if capped else []
    process = subprocess.Popen([*inside, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = [0.0]
    ended = threading.Event()

    def watch() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while not ended.wait(0.005):
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            peak[0] = max([peak[0], *(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))])

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    ended.set()
    watcher.join()
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed ({status}):\n{errors[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak[0])


def recipe(root: Path, method: str, file: Path) -> Path:
    """A recipe that both tools read."""
    parameters, based, count = METHODS[method]
    content: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16", "parameters": dict(parameters)}
    content["models"] = [{"model": str(root / name)} for name in "abc"[:count]]
    if based:
        content["base_model"] = str(root / "base")
    if not parameters:
        del content["parameters"]
    file.write_text(yaml.safe_dump(content))
    return file


class Table:
    """Rounds of contestants, interleaved."""

    def __init__(self, root: Path, rounds: int, rest: float = 0) -> None:
        self._root = root
        self._rounds = rounds
        self._rest = rest

    def row(self, title: str, contestants: Mapping[str, Sequence[str]], *, capped: Sequence[str] = ()) -> None:
        """Print medians, and the ratio of every contestant to the first one. `{out}` is where it may write."""
        costs: dict[str, list[Cost]] = {name: [] for name in contestants}
        for _ in range(self._rounds):
            for name, command in contestants.items():
                out = self._root / "out"
                shutil.rmtree(out, ignore_errors=True)
                os.sync()  # what an earlier contestant left to be written must not slow this one
                # A virtual machine gives free memory back to its host, within a second or so, and taking it again costs
                # a second a GB. Either all begin when it is gone, or right after as much as the output needs was freed;
                # then who needs it sooner (cp) finds more of it.
                if self._rest:
                    time.sleep(self._rest)
                else:
                    shutil.copytree(self._root / "a", self._root / "warm")
                    shutil.rmtree(self._root / "warm")
                costs[name].append(run([part.format(out=out) for part in command], capped=name in capped))
        shutil.rmtree(self._root / "out", ignore_errors=True)
        first = next(iter(costs.values()))
        for name, found in costs.items():
            ratio = statistics.median(c.wall_s / f.wall_s for c, f in zip(found, first, strict=True))
            wall, cpu, anon = (statistics.median(getattr(c, k) for c in found) for k in ("wall_s", "cpu_s", "anon_mb"))
            print(f"{title:<18} {name:<22} {wall:8.2f} {ratio:8.2f} {cpu:8.2f} {anon:9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["mid", "big"], default="mid")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--no-peer", action="store_true", help="leave mergekit out")
    parser.add_argument("--cap", type=int, metavar="MB", help="ours again under this much memory, page cache included")
    parser.add_argument("--small-tensors", action="store_true")
    parser.add_argument("--start", action="store_true")
    parser.add_argument(
        "--rest", type=float, default=0, metavar="S", help="seconds of rest before each (see Table.row)"
    )
    parser.add_argument("--folder", type=Path, help="where to put the models (default: the temporary directory)")
    options = parser.parse_args()
    os.environ["PYTHONDONTWRITEBYTECODE"] = ""  # a compiled cache is what users have
    with tempfile.TemporaryDirectory(prefix="solera-bench-", dir=options.folder) as scratch:
        root = Path(scratch)
        print(f"{'work':<18} {'process':<22} {'wall s':>8} {'ratio':>8} {'CPU s':>8} {'anon MB':>9}")
        if options.small_tensors:
            small_tensors(root, options.rounds)
            return
        size = "tiny" if options.start else options.size
        for name, seed in (("base", None), ("a", 1), ("b", 2), ("c", 3)):
            generate(root / name, SIZES[size], seed)
        table = Table(root, options.rounds, options.rest)
        python = sys.executable
        copy = ["cp", "-r", str(root / "a"), "{out}"]
        durable_copy = ["bash", "-c", f"cp -r {root / 'a'} {{out}} && sync"]
        if options.start:
            table.row(
                "start", {"python": [python, "-c", "pass"], "import numba": [python, "-c", "import numba, numpy"]}
            )
        if options.cap:
            GROUP.mkdir(exist_ok=True)
            (GROUP / "memory.limit_in_bytes").write_text(str(options.cap * MB))
        for method in ["linear"] if options.start else options.methods:
            file = str(recipe(root, method, root / f"{method}.yml"))
            ours = [python, "-m", "solera", "merge", file, "{out}", "-q"]
            contestants = {"cp": copy, "solera --no-fsync": [*ours, "--no-fsync"], "solera": ours}
            if method == "linear":
                contestants["cp + sync"] = durable_copy
            if not options.no_peer:
                contestants["mergekit"] = [python, "-m", "mergekit.scripts.run_yaml", file, "{out}"]
            if options.cap:
                contestants[f"solera in {options.cap} MB"] = [*ours, "--no-fsync"]
            table.row(method, contestants, capped=[f"solera in {options.cap} MB"])


def small_tensors(root: Path, rounds: int) -> None:
    """What a tensor costs by itself, at rising counts."""
    table = Table(root, rounds)
    for count in (9216, 18432, 36864):
        for name, seed in (("a", 1), ("b", 2), ("c", 3)):
            shutil.rmtree(root / name, ignore_errors=True)
            generate_small_tensors(root / name, count, seed)
        file = str(recipe(root, "linear", root / "linear.yml"))
        table.row(
            f"{count} tensors",
            {"solera": [sys.executable, "-m", "solera", "merge", file, "{out}", "-q", "--no-reload-check"]},
        )


if __name__ == "__main__":
    main()
