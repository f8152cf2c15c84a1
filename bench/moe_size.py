"""Fewer experts on real text: a small MoE is trained here, then pruned and merged in every way, seed by seed.

16 experts a layer, two a token, three domains (Shakespeare, Wikipedia, school mathematics). Printed: the mean held-out
loss over the domains (nats a token) of the whole model and of what is left of it at several sizes. Some minutes a seed.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from solera.stages import parse_settings, run_stage
from solera_core.context import Context

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXT: dict[str, dict[str, Any]] = {
    "plays": {"path": str(DATA / "text" / "tinyshakespeare.txt"), "chunk_chars": 1000},
    "wiki": {"path": str(DATA / "text" / "wikitext2-valid.txt"), "chunk_chars": 1000},
    "sums": {"path": str(DATA / "tasks" / "gsm8k-train.jsonl"), "column": "question"},
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prune, REAP": ("moe-prune", {}),
    "prune, contribution": ("moe-prune", {"score": "contribution"}),
    "prune, frequency": ("moe-prune", {"score": "frequency"}),
    "merge, REAM": ("moe-merge-experts", {}),
    "merge, REAM by contribution": ("moe-merge-experts", {"score": "contribution"}),
    "merge, REAM, groups of 4": ("moe-merge-experts", {"group_size": 4}),
    "merge, REAM, activations": ("moe-merge-experts", {"align": "activations"}),
    "merge, REAM, not aligned": ("moe-merge-experts", {"align": "none"}),
    "merge, M-SMoE": ("moe-merge-experts", {"group": "m_smoe"}),
    "merge, HC-SMoE": ("moe-merge-experts", {"group": "hc_smoe"}),
}


def run(kind: str, settings: dict[str, Any], out: Path, seed: int) -> Path:
    """One stage; a finished one is not repeated."""
    return out if out.exists() else run_stage(kind, parse_settings(kind, settings, where=kind), out, Context(seed=seed))


def train(root: Path, seed: int, tokens: int) -> Path:
    """A Mixtral of 2 million parameters."""
    text = [{**source, "limit": 600} for source in TEXT.values()]
    config = {
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
    }
    init = {"architecture": "mixtral", "config": config, "tokenizer": {"vocab_size": 1024, "data": text}}
    start = run("init", init, root / "init", seed)
    tune = {"model": str(start), "data": text, "tokens": tokens, "tokens_per_step": 4096, "lr": 3e-3}
    return run("tune", tune, root / "moe", seed)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--keep", type=int, nargs="+", default=[12, 8, 4])
    parser.add_argument("--work", type=Path, help="keep the models here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, list[dict[int, float]]] = {}
        for seed in range(options.seeds):
            root = (options.work or Path(scratch)) / str(seed)
            model = train(root, seed, options.tokens)
            data = {name: {**source, "skip": 600, "limit": 120} for name, source in TEXT.items()}
            for name, (kind, more) in METHODS.items():
                low = min(options.keep)
                settings = {"model": str(model), "keep": low, "sizes": options.keep, "data": data, **more}
                out = run(kind, settings, root / name.replace(" ", "-").replace(",", ""), seed)
                rows = json.loads((out / "solera.json").read_text(encoding="utf-8"))["checks"]["sizes"]
                found.setdefault(name, []).append({row["experts"]: row["mean"] for row in rows})
                print(seed, name, found[name][-1], flush=True)
    sizes = sorted(next(iter(found.values()))[0], reverse=True)
    print("| | " + " | ".join(map(str, sizes)) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    for name, seeds in found.items():
        cells = [" ".join(f"{losses[size]:.3f}" for losses in seeds) for size in sizes]
        means = [statistics.mean(losses[size] for losses in seeds) for size in sizes]
        print(f"| {name} | " + " | ".join(f"{m:.3f} ({c})" for m, c in zip(means, cells, strict=True)) + " |")


if __name__ == "__main__":
    main()
