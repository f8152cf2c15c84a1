"""Memory of fitting a router against the number of experts, beside that of one dense model.

    python bench/moe_memory.py [--experts 2 4 8] [--fit ridge] [--layers 24] [--hidden 384]

Makes a Llama-shaped base and specialists of random weights and text of as many domains, builds the MoE in a process of
its own, and reads from the system (VmHWM) how far the memory of that process rose while the router was fitted and its
temperature chosen, over what it held before. Writing and the identity check, which come before, are told apart.
"""

import argparse
import ctypes
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

VOCABULARY = 2048
TOKENS = 800


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8])
    options.add_argument("--fit", default="ridge")
    options.add_argument("--layers", type=int, default=24)
    options.add_argument("--hidden", type=int, default=384)
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child is not None:
        print(json.dumps(build(given.child)))
        return
    with tempfile.TemporaryDirectory(prefix="solera-moe-memory-") as place:
        root = Path(place)
        dense = make(root, max(given.experts), given.layers, given.hidden)
        print(f"one dense model in float32: {dense / 1e6:.0f} MB; fit: {given.fit}; {TOKENS} tokens a domain\n")
        print("| experts | whole MoE, MB | writing and proof, MB | fit and temperature, MB | of one dense model | s |")
        print("|---|---|---|---|---|---|")
        for count in given.experts:
            recipe = write_recipe(root, count, given.fit)
            done = subprocess.run(
                [sys.executable, __file__, "--child", str(recipe)], check=True, stdout=subprocess.PIPE, text=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {count} | {found['moe'] / 1e6:.0f} | {found['before'] / 1e6:.0f} | {found['fit'] / 1e6:.0f} | "
                f"{found['fit'] / dense:.2f} | {found['fit_s']:.0f} |",
                flush=True,
            )


def make(root: Path, experts: int, layers: int, hidden: int) -> int:
    """Base, specialists and text under `root`; bytes of one model in float32."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    make_fast: Any = PreTrainedTokenizerFast
    fast = make_fast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        bos_token_id=0,
        eos_token_id=1,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    size: int = 4 * sum(p.numel() for p in model.parameters())
    draw = random.Random(0)
    for e in range(-1, experts):
        name = "base" if e < 0 else f"e{e}"
        if e >= 0:
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if ".mlp." in key:
                        parameter.add_(0.002 * torch.randn_like(parameter))
            letters = [chr(ord("a") + (3 * e + i) % 26) for i in range(4)]
            lines = [" ".join("".join(draw.choices(letters, k=4)) for _ in range(60)) for _ in range(40)]
            (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        model.save_pretrained(root / name)
        fast.save_pretrained(root / name)
    return size


def write_recipe(root: Path, experts: int, fit: str) -> Path:
    names = [f"e{e}" for e in range(experts)]
    router = {
        "fit": fit,
        "data": {name: str(root / f"{name}.jsonl") for name in names},
        "tokens_per_domain": TOKENS,
    }
    recipe = {
        "base_model": str(root / "base"),
        "experts": [{"name": name, "model": str(root / name)} for name in names],
        "router": router,
    }
    file = root / f"moe-{experts}.json"
    file.write_text(json.dumps(recipe))
    return file


class Watch:
    """Sets the high-water mark of this process back when the router's part begins."""

    def __init__(self) -> None:
        self.before = self.held = 0
        self.began = 0.0

    @contextmanager
    def _task(self, title: str) -> Iterator["Watch"]:
        if title == "reading router inputs" and not self.began:
            self.before = memory_bytes("VmHWM")
            trim()
            self.held = memory_bytes("VmRSS")
            self.began = time.perf_counter()
        yield self

    def task(self, title: str, total: float, unit: str = "") -> AbstractContextManager[Any]:
        """As `solera_core.progress.Progress` has it."""
        del total, unit
        return self._task(title)

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Nothing is shown."""
        del amount, note

    def note(self, message: str) -> None:
        """Nothing is shown."""
        del message


def build(recipe: Path) -> dict[str, float]:
    """Build in this process; bytes above what the imports take."""
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    from solera_core.context import Context
    from solera_core.strict import parse
    from solera_merge.moe.build import build_moe
    from solera_merge.moe.config import MoeConfig

    torch.set_num_threads(1)
    out = recipe.with_suffix("")
    config = parse(MoeConfig, json.loads(recipe.read_text()), where=str(recipe))
    trim()
    start = memory_bytes("VmRSS")
    watch = Watch()
    build_moe(config, out, Context(threads=1, progress=watch))
    moe = 2 * sum(file.stat().st_size for file in out.glob("*.safetensors"))  # stored in bfloat16
    return {
        "moe": moe,
        "before": watch.before - start,
        "fit": memory_bytes("VmHWM") - watch.held,
        "fit_s": time.perf_counter() - watch.began,
    }


def trim() -> None:
    """Give freed memory back, and set the high-water mark to what is held now."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def memory_bytes(key: str) -> int:
    """`VmRSS`: resident memory; `VmHWM`: its high-water mark."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
