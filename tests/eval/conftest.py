"""A tiny model that has learned something, so that a verdict on it can mean something."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solera_eval.records import ItemRecord, Kind, Results, summarise, write_results

COLOURS = {"cask": "red", "hat": "blue", "bird": "green", "door": "black", "lamp": "white", "cup": "pink"}
SIZES = ["big", "old", "new", "tiny", "soft", "cold", "dry", "fine"]


def facts(seed: int, sentences: int = 6) -> str:
    """A document of sentences whose last word follows from the noun."""
    draw = random.Random(seed)
    picked = [(draw.choice(SIZES), draw.choice(list(COLOURS))) for _ in range(sentences)]
    return "\n".join(f"the {size} {noun} is {COLOURS[noun]}" for size, noun in picked) + "\n"


def questions() -> list[dict[str, Any]]:
    """Every size with every noun: 48 prompts with their answer."""
    return [{"prompt": f"the {size} {noun} is", "answer": colour} for size in SIZES for noun, colour in COLOURS.items()]


@pytest.fixture(scope="session")
def eval_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.jsonl (held-out documents), sums.jsonl (generate), pairs.jsonl (choice)."""
    root = tmp_path_factory.mktemp("data")
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": facts(seed)} for seed in range(10_000, 10_040)],
        "sums": questions(),
        "pairs": [
            {
                "prompt": row["prompt"],
                "choices": [" " + row["answer"], *(f" {c}" for c in COLOURS.values() if c != row["answer"])][:4],
                "answer": 0,
            }
            for row in questions()
        ],
    }
    for name, content in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """A two-layer Llama trained for some seconds on the facts."""
    import torch

    from solera_core.causal_lm import load_model, load_tokenizer

    path = make_model(tmp_path_factory.mktemp("trained") / "model")
    model: Any = load_model(path)
    tokenizer = load_tokenizer(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in range(120):
            batch = tokenizer([facts(step * 8 + i) for i in range(8)], padding=False).input_ids
            length = min(len(ids) for ids in batch)
            ids = torch.tensor([row[:length] for row in batch])
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    weights = tmp_path_factory.mktemp("saved")
    model.eval()
    model.save_pretrained(weights)
    shutil.copy(weights / "model.safetensors", path / "model.safetensors")
    return path


@pytest.fixture(scope="session")
def suite_tasks(eval_data: Path) -> list[dict[str, Any]]:
    """One task of every kind on `eval_data`."""
    return [
        {"name": "facts", "kind": "text", "data": str(eval_data / "text.jsonl"), "domain": "facts"},
        {
            "name": "answers",
            "kind": "generate",
            "data": str(eval_data / "sums.jsonl"),
            "max_new_tokens": 6,
            "domain": "facts",
        },
        {"name": "choices", "kind": "choice", "data": str(eval_data / "pairs.jsonl"), "domain": "facts"},
    ]


MakeResults = Callable[..., Results]


@pytest.fixture
def make_results(tmp_path: Path) -> MakeResults:
    """`make_results(name, {task: scores})`: results on disk and in memory, made elsewhere as it were.

    Scores of a choice task are 0/1 (two choices each); of a text task (nll, tokens) pairs.
    """

    def make(
        name: str,
        tasks: dict[str, list[Any]],
        *,
        digest: str | None = "sha256:same",
        domain: str | None = "d",
        ids: list[str] | None = None,
        kind: Kind | None = None,
        vocabulary: int | None = 1000,
    ) -> Results:
        records: list[ItemRecord] = []
        figures = []
        for task, scores in tasks.items():
            found: Kind = kind or ("text" if isinstance(scores[0], tuple) else "choice")
            rows = [
                ItemRecord(task, item, domain, *_detail(found, score))
                for item, score in zip(ids or [f"i{i}" for i in range(len(scores))], scores, strict=True)
            ]
            extra = {"chance": vocabulary} if found == "text" and vocabulary else {}
            figures.append(summarise(task, found, domain, rows, extra))
            records += rows
        results = Results(
            {"name": name, "ref": name, "digest": f"blake3:{name}"},
            {"name": "made", "digest": digest},
            figures,
            records,
            {},
            str(tmp_path / name),
        )
        (tmp_path / name).mkdir(exist_ok=True)
        write_results(tmp_path / name, results)
        return results

    return make


def _detail(kind: Kind, score: Any) -> tuple[float, dict[str, Any]]:
    if kind == "text":
        nll, tokens = score
        return nll / tokens, {"nll": nll, "tokens": tokens, "bytes": 4 * tokens}
    if kind == "choice":
        return float(score), {"correct": score, "prediction": 1 - score, "logliks": [-1.0, -2.0]}
    return float(score), {"correct": score, "output": "x"}
