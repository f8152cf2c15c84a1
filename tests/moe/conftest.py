"""Text that tells tiny specialists apart, specialists that need no training, and short ways to build and to run."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from solera_core.context import Context
from solera_core.strict import parse
from solera_merge.moe.build import build_moe
from solera_merge.moe.config import MoeConfig

ALPHABETS = {"letters": "abcdefgh", "digits": "0123456789", "signs": "+-*/()[]"}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def domain_text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three jsonl files of random words, each over its own characters: 40 documents of some 150 tokens."""
    root = tmp_path_factory.mktemp("text")
    files: dict[str, Path] = {}
    for seed, (name, alphabet) in enumerate(ALPHABETS.items()):
        draw = random.Random(seed)
        rows = [
            {"text": " ".join("".join(draw.choices(alphabet, k=draw.randint(1, 6))) for _ in range(50))}
            for _ in range(40)
        ]
        files[name] = root / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def moe_config() -> Callable[..., MoeConfig]:
    """`moe_config(base, {name: path}, data=None, router={}, **settings)`; a random router unless data is given."""

    def make(
        base: Path,
        experts: dict[str, Path],
        data: dict[str, Path] | None = None,
        router: dict[str, Any] | None = None,
        **settings: Any,
    ) -> MoeConfig:
        fit: dict[str, Any] = {"fit": "random"}
        if data is not None:
            fit = {"fit": "ridge", "data": {n: str(p) for n, p in data.items()}, "tokens_per_domain": 1500}
        raw = {
            "base_model": str(base),
            "experts": [{"name": name, "model": str(path)} for name, path in experts.items()],
            "router": {**fit, **(router or {})},
            **settings,
        }
        return parse(MoeConfig, raw, where="test")

    return make


@pytest.fixture(scope="session")
def build(moe_config: Callable[..., MoeConfig]) -> Callable[..., Path]:
    """`build(out, base, {name: path}, data=None, ctx=None, ...)`: as `moe_config`, and built."""

    def make(out: Path, base: Path, experts: dict[str, Path], *, ctx: Context | None = None, **settings: Any) -> Path:
        return build_moe(moe_config(base, experts, **settings), out, ctx or Context())

    return make


@pytest.fixture(scope="session")
def logits() -> Callable[..., Any]:
    """`logits(path)`: of one fixed sequence of 60 tokens, loaded by plain AutoModelForCausalLM in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    def run(path: Path) -> Any:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        model, info = loaded
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ids = torch.randint(0, model.config.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            return model.eval()(input_ids=ids).logits

    return run


@pytest.fixture(scope="session")
def specialists(
    tmp_path_factory: pytest.TempPathFactory, siblings: dict[str, Path], domain_text: dict[str, Path]
) -> dict[str, Path]:
    """Three copies of `siblings["base"]` whose last feed-forward network favours the tokens of one domain each.

    Neuron 0 of it computes z * silu(z) >= 0 with z = g x, and its output column points from the head's mean row to
    the mean of the rows of the domain's tokens: a constant bias towards that domain's vocabulary. No training is
    needed, and the right expert is better than another on its text by construction.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("specialists")
    tokenizer = AutoTokenizer.from_pretrained(siblings["base"])
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Path] = {}
    for name, file in domain_text.items():
        model = AutoModelForCausalLM.from_pretrained(siblings["base"], dtype=torch.float32)
        text = "".join(json.loads(line)["text"] for line in file.read_text().splitlines())
        tokens = sorted(set(tokenizer(text, add_special_tokens=False).input_ids))
        head = model.lm_head.weight
        mlp = model.model.layers[-1].mlp
        with torch.no_grad():
            direction = head[tokens].mean(0) - head.mean(0)
            g = torch.randn(mlp.gate_proj.weight.shape[1], generator=generator)
            mlp.gate_proj.weight[0] = g
            mlp.up_proj.weight[0] = g
            mlp.down_proj.weight[:, 0] = direction / direction.norm()
        made[name] = root / name
        model.save_pretrained(made[name])
        for path in siblings["base"].glob("tokenizer*"):
            shutil.copy(path, made[name] / path.name)
    return made


@pytest.fixture(scope="session")
def with_own_attention(
    tmp_path_factory: pytest.TempPathFactory, specialists: dict[str, Path]
) -> Callable[[float], dict[str, Path]]:
    """`with_own_attention(noise)`: the specialists with attention of their own, so far off the base's."""

    def make(noise: float) -> dict[str, Path]:
        root = tmp_path_factory.mktemp("tuned")
        for seed, (name, path) in enumerate(specialists.items()):
            shutil.copytree(path, root / name)
            tensors = load_file(path / "model.safetensors")
            draw = np.random.default_rng(seed)
            for key, value in tensors.items():
                if "self_attn" in key:
                    tensors[key] = value + noise * draw.standard_normal(value.shape).astype(value.dtype)
            save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
        return {name: root / name for name in specialists}

    return make
