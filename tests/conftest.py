"""Fixtures shared by all tests: tiny real checkpoints, a tiny trained tokenizer, the public data if present."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings

hypothesis_settings.register_profile("solera", deadline=None)  # a busy machine is no failure
hypothesis_settings.load_profile("solera")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; tiny models gain nothing from threads

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"

MakeModel = Callable[..., Path]

_CORPUS = [
    "the cask gives the spirit its colour and the years give it its name",
    "def add(a, b):\n    return a + b\n",
    "one and two make three; seven times six is forty two",
    "Once upon a time there was a small model that learned from three large ones.",
    "class Cask:\n    def __init__(self, name):\n        self.name = name\n",
    "0 1 2 3 4 5 6 7 8 9 + - * / = ( ) [ ] { } ? ! , . : ;",
]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public data; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real public data is not present at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 300 tokens with <s> and </s>, as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer_class: Any = PreTrainedTokenizerFast  # untyped upstream

    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = tokenizer_class(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def make_model(tokenizer_dir: Path) -> MakeModel:
    """`make_model(path, seed=0, family="llama", dtype="float32", base=None, noise=0.02, shards=1, **config)`.

    Writes a tiny real checkpoint with transformers. With `base` (a directory) the weights are that model's plus
    Gaussian noise of relative size `noise`: a sibling. Every parameter is perturbed, norms included.
    """
    return lambda path, **options: _make_model(path, tokenizer_dir, **options)


def _make_model(
    path: Path,
    tokenizer_dir: Path,
    *,
    seed: int = 0,
    family: str = "llama",
    dtype: str = "float32",
    base: Path | None = None,
    noise: float = 0.02,
    shards: int = 1,
    **config: Any,
) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    auto_model: Any = AutoModelForCausalLM  # untyped upstream

    settings: dict[str, Any] = {
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    settings.update(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if base is None:
            model = auto_model.from_config(AutoConfig.for_model(family, **settings))
        else:
            model = auto_model.from_pretrained(base, dtype="float32")
        with torch.no_grad():
            for parameter in model.parameters():
                scale = noise * (parameter.std().item() if parameter.numel() > 1 else 1.0) if base else 0.02
                parameter.add_(torch.randn_like(parameter) * max(scale, 1e-3))
    model = model.to(getattr(torch, dtype))
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(path, max_shard_size=total if shards == 1 else max(total // shards, 1))
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, path / file.name)
    return path


@pytest.fixture(scope="session")
def siblings(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> dict[str, Path]:
    """`base`, `a`, `b`, `c`: one tiny Llama and three fine-tunes of it (read-only; copy before changing)."""
    root = tmp_path_factory.mktemp("siblings")
    base = make_model(root / "base")
    return {"base": base} | {
        name: make_model(root / name, base=base, seed=i + 1, noise=0.1) for i, name in enumerate("abc")
    }


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list[dict[str, Any]]], Path]:
    """Write rows as jsonl and return the path."""

    def write(path: Path, rows: list[dict[str, Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
