"""Mixtures of experts of real fine-tunes, beside everything else that could be made of the same specialists.

Every model is made by solera's own stages (mergekit-moe by its own command line) in a work folder and kept there: what
is finished is not made again, and a killed training goes on where it stood. Figures: nats a token on test text that
nothing was trained, fitted or chosen on.

    python bench/moe.py --work /tmp/moe --jobs 2                the 260K Llama, three seeds
    python bench/moe.py ... --size large --seeds 0              a base of 5M parameters, trained here first
    python bench/moe.py ... --size smoke --seeds 0 --jobs 1     a minute's training: to see whether it runs
    python bench/moe.py ... --table                             the table of what is there
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

import solera
from bench.moe_table import report
from bench.moe_text import DOMAINS, prompts, write_text

SCALES = (0.2, 0.3, 0.4, 0.6, 1.0)
MERGEKIT_MODES = ("hidden", "cheap_embed", "random")
FITS = ("ridge", "logistic", "lda", "centroid", "nll", "prompts")


@dataclass(frozen=True)
class Size:
    """How much is trained, and how fast.

    Attributes:
        fit_tokens: of every domain, for routers.
        documents: of every domain that figures are measured on: choice and test.
        tune_tokens: of every specialist.
        tune_lr: of every specialist.
        train: settings of the training of the router alone.
        heal: settings of the healing besides teachers, student and data.
        control: the same of the dense control.
    """

    fit_tokens: int
    documents: int
    tune_tokens: int
    tune_lr: float
    train: Mapping[str, Any]
    heal: Mapping[str, Any]
    control: Mapping[str, Any]


SIZES = {
    "smoke": Size(1500, 4, 4000, 2e-3, *({"tokens": 4000, "lr": lr} for lr in (1e-2, 2e-3, 3e-3))),
    "small": Size(
        28_000,
        60,
        500_000,
        2e-3,
        {"tokens": 100_000, "lr": 1e-2},
        {"tokens": 1_000_000, "lr": 2e-3},
        {"tokens": 1_000_000, "lr": 3e-3},
    ),
    "large": Size(
        28_000,
        60,
        200_000,
        1e-3,
        {"tokens": 60_000, "lr": 3e-3},
        {"tokens": 300_000, "lr": 1e-3},
        {"tokens": 300_000, "lr": 1e-3},
    ),
}
LARGE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


class Work:
    """One seed of one way of tuning: the folder its models lie in, and what stands in the table."""

    def __init__(self, root: Path, base: Path, text: Path, size: Size, tuned: str, seed: int, threads: int) -> None:
        self.root = root
        self.base = base
        self.text = text
        self.size = size
        self.tuned = tuned
        self.seed = seed
        self.threads = threads
        root.mkdir(parents=True, exist_ok=True)

    def make(self, name: str, kind: str, settings: Mapping[str, Any], *, seed: int | None = None) -> Path:
        """The output of a stage; run unless it is there."""
        out = self.root / name
        if not out.exists():
            started = time.monotonic()
            run = {"tune": solera.tune, "merge": solera.merge, "moe": solera.build_moe, "route": solera.route}
            run |= {"distill": solera.distill, "eval": solera.evaluate}
            run[kind](settings, out, seed=self.seed if seed is None else seed, threads=self.threads)
            print(f"{self.root.name} {name}: {time.monotonic() - started:.0f} s", flush=True)
        return out

    def file(self, domain: str, part: str) -> str:
        """Where text of a domain lies."""
        return str(self.text / f"{domain}-{part}.jsonl")

    def data(self, part: str) -> dict[str, Any]:
        """The same of all domains."""
        return {domain: self.file(domain, part) for domain in DOMAINS}

    def nll(self, name: str, model: Path, part: str = "test") -> dict[str, float]:
        """Nats a token by domain, through the evaluation stage."""
        tasks = [
            {
                "name": d,
                "kind": "text",
                "domain": d,
                "window_tokens": 256,
                "data": {"path": self.file(d, part), "limit": self.size.documents},
            }
            for d in DOMAINS
        ]
        suites = [{"suite": part, "tasks": tasks}]
        out = self.make(f"eval/{part}-{name}", "eval", {"model": str(model), "suites": suites})
        found = json.loads((out / "results.json").read_text())["tasks"]
        return {task["name"]: task["extra"]["nll_per_token"] for task in found}

    def oracle(self, name: str, model: Path, part: str = "test") -> dict[str, float]:
        """The same of a mixture whose every token goes to the expert of its text's domain."""
        return self._kept(f"oracle-{part}-{name}", lambda: _forced(self, model, part))

    def _kept(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        file = self.root / "eval" / f"{name}.json"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(measure()))
        return json.loads(file.read_text())  # type: ignore[no-any-return]


def _forced(work: Work, model: Path, part: str) -> dict[str, float]:
    from solera_core.causal_lm import load_model, load_tokenizer
    from solera_core.data import DataSource, read_documents
    from solera_core.likelihood import score_documents
    from solera_core.threads import torch_threads
    from solera_merge.moe.routing import forced_route

    mixture, tokenizer = load_model(model), load_tokenizer(model)
    found: dict[str, float] = {}
    for expert, domain in enumerate(DOMAINS):
        documents = list(
            read_documents([DataSource(path=work.file(domain, part), limit=work.size.documents)], base_dir=Path())
        )
        with forced_route(mixture, expert), torch_threads(work.threads):
            scores = score_documents(mixture, tokenizer, documents, window_tokens=256, batch_tokens=4096)
        found[domain] = sum(s.nll for s in scores) / sum(s.tokens for s in scores)
    return found


def mean(by_domain: Mapping[str, float]) -> float:
    return sum(by_domain.values()) / len(by_domain)


def specialists(work: Work) -> dict[str, Path]:
    parts = {} if work.tuned == "full" else {"parts": ["ffn"]}
    return {
        domain: work.make(
            domain,
            "tune",
            {
                "model": str(work.base),
                "data": {domain: work.file(domain, "train")},
                "tokens": work.size.tune_tokens,
                "lr": work.size.tune_lr,
                "tokens_per_step": 2048,
                **parts,
            },
        )
        for domain in DOMAINS
    }


def merges(work: Work, experts: Mapping[str, Path]) -> dict[str, Path]:
    """Average, task arithmetic at every scale, TIES."""
    given = [{"model": str(path), "parameters": {"weight": 1}} for path in experts.values()]
    found = {"average": work.make("average", "merge", {"merge_method": "linear", "models": given})}
    for scale in SCALES:
        models = [{"model": str(path), "parameters": {"weight": scale}} for path in experts.values()]
        settings: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": str(work.base), "models": models}
        found[f"task arithmetic {scale}"] = work.make(f"arithmetic-{scale}", "merge", settings)
    settings = {"merge_method": "ties", "base_model": str(work.base), "models": given, "parameters": {"density": 0.5}}
    found["TIES"] = work.make("ties", "merge", settings)
    return found


def mergekit_moe(work: Work, experts: Mapping[str, Path], trunk: Path, mode: str, top_k: int, name: str) -> Path:
    """The peer's own command line. Its gates do not depend on k: k = 1 is the same build with another config.json."""
    out = work.root / name
    if out.exists():
        return out
    scratch = work.root / f".{name}"
    shutil.rmtree(scratch, ignore_errors=True)
    if top_k == 1:
        shutil.copytree(mergekit_moe(work, experts, trunk, mode, 2, name.replace("k1", "k2")), scratch)
        config = json.loads((scratch / "config.json").read_text())
        (scratch / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    else:
        settings: dict[str, Any] = {
            "base_model": str(trunk),
            "gate_mode": mode,
            "dtype": "float32",
            "experts_per_token": 2,
            "experts": [
                {"source_model": str(path), "positive_prompts": prompts(work.text, domain)}
                for domain, path in experts.items()
            ],
        }
        file = work.root / f"{name}.yml"
        file.write_text(yaml.safe_dump(settings))
        seed = ["--random-seed", str(work.seed)]
        command = [sys.executable, "-m", "mergekit.scripts.moe", str(file), str(scratch), "--quiet", *seed]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    scratch.rename(out)
    return out


def mixture(
    work: Work, experts: Mapping[str, Path], name: str, *, fit: str, top_k: int = 2, trunk: str = "base"
) -> Path:
    """Our build; routers are fitted and judged on calibration text."""
    rows: list[dict[str, Any]] = [{"name": domain, "model": str(path)} for domain, path in experts.items()]
    router: dict[str, Any] = {"fit": fit, "data": work.data("calibration"), "tokens_per_domain": work.size.fit_tokens}
    if fit == "prompts":
        rows = [{**row, "prompts": prompts(work.text, row["name"])} for row in rows]
    if fit == "nll":
        router["unlabelled"] = [work.file(domain, "calibration") for domain in DOMAINS]
    settings = {"base_model": str(work.base), "trunk": trunk, "experts": rows, "top_k": top_k, "router": router}
    return work.make(name, "moe", settings)


def taught(work: Work, experts: Mapping[str, Path], student: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """A student taught by the specialists, each on the text of its domain."""
    return work.make(
        name,
        "distill",
        {
            "teachers": [{"model": str(path), "domain": domain} for domain, path in experts.items()],
            "student": {"from": str(student)},
            "data": work.data("train"),
            "tokens_per_step": 2048,
            **settings,
        },
    )


def columns(work: Work) -> None:
    """Make and measure all of it; rows.json grows as rows are done, in the order of the table."""
    rows: dict[str, dict[str, float]] = {}

    def row(name: str, found: Mapping[str, float]) -> None:
        rows[name] = dict(found)
        scratch = work.root / ".rows.json"
        scratch.write_text(json.dumps(rows, indent=1))
        scratch.rename(work.root / "rows.json")

    row("base", work.nll("base", work.base))
    experts = specialists(work)
    alone = {domain: work.nll(domain, path) for domain, path in experts.items()}
    row("specialists", {domain: alone[domain][domain] for domain in DOMAINS})
    blends = merges(work, experts)
    dev = {name: mean(work.nll(name.replace(" ", "-"), path, "calibration")) for name, path in blends.items()}
    scale = min((name for name in blends if name.startswith("task")), key=lambda name: dev[name])
    best = blends[min(blends, key=lambda name: dev[name])]
    row("average merge", work.nll("average", blends["average"]))
    row("task arithmetic, best scale", work.nll(scale.replace(" ", "-"), blends[scale]))
    row("TIES", work.nll("TIES", blends["TIES"]))
    for mode in MERGEKIT_MODES:
        for k in (1, 2):
            name = f"mergekit-{mode}-k{k}"
            row(f"mergekit-moe {mode}, k={k}", work.nll(name, mergekit_moe(work, experts, work.base, mode, k, name)))
    if work.tuned == "full":
        name = "mergekit-hidden-k2-merged"
        built = mergekit_moe(work, experts, best, "hidden", 2, name)
        row("mergekit-moe hidden, k=2, base_model: the best merge", work.nll(name, built))
    row("model-level router", work.nll("route", model_router(work, experts)))
    for fit in FITS:
        for k in (1, 2) if fit in ("ridge", "logistic") else (2,):
            name = f"{fit}-k{k}"
            built = mixture(work, experts, name, fit=fit, top_k=k)
            if not any(known.startswith("oracle") for known in rows):
                row("oracle-routed, base trunk", work.oracle("base-trunk", built))
            row(f"fit {fit}, k={k}", work.nll(name, built))
    if work.tuned == "full":
        start = mixture(work, experts, "ridge-k2-auto", fit="ridge", trunk="auto")
        row("oracle-routed, trunk: auto", work.oracle("auto-trunk", start))
        row("fit ridge, k=2, trunk: auto", work.nll("ridge-k2-auto", start))
    else:  # only feed-forward networks differ, so every trunk is the base's
        start = work.root / "ridge-k2"
    settings = {
        "model": str(start),
        "data": work.data("train"),
        "parts": ["router"],
        "balance": 0.01,
        "eval_data": {
            d: {"path": work.file(d, "calibration"), "limit": max(work.size.documents // 3, 2)} for d in DOMAINS
        },
        "keep_best": True,
        "save_every": work.size.train["tokens"] // 4,
        "tokens_per_step": 2048,
    }
    trained = work.make("trained", "tune", {**settings, **work.size.train})
    row("trained router, from ridge, k=2", work.nll("trained", trained))
    row("healed", work.nll("healed", taught(work, experts, start, "healed", work.size.heal)))
    row("control", work.nll("control", taught(work, experts, best, "control", work.size.control)))


def model_router(work: Work, experts: Mapping[str, Path]) -> Path:
    return work.make(
        "route",
        "route",
        {
            "base_model": str(work.base),
            "specialists": [{"name": domain, "model": str(path)} for domain, path in experts.items()],
            "data": work.data("calibration"),
            "documents_per_domain": max(work.size.documents, 12),
            "window_tokens": 256,
        },
    )


def large_base(root: Path, text: Path, threads: int) -> Path:
    """A Llama of 5M parameters that has seen wiki text and a third of every domain."""
    from solera_core.context import Context
    from solera_core.strict import parse
    from solera_distill.config import InitConfig
    from solera_distill.run import init

    files = [str(text / f"{domain}-train.jsonl") for domain in (*DOMAINS, "wiki")]
    if not (root / "seedling").exists():
        seedling = {"architecture": "llama", "config": LARGE, "tokenizer": {"vocab_size": 2048, "data": files}}
        init(parse(InitConfig, seedling, where="init"), root / "seedling", Context(seed=0))
    if not (root / "base").exists():
        limits = (600, 1000, 300)
        data: list[dict[str, Any]] = [{"path": file, "limit": n} for file, n in zip(files, limits, strict=False)]
        data.append({"path": files[3]})
        settings = {
            "model": str(root / "seedling"),
            "data": data,
            "tokens": 800_000,
            "lr": 1.5e-3,
            "sequence_tokens": 256,
            "tokens_per_step": 2048,
            "save_every": 50_000,
        }
        solera.tune(settings, root / "base", seed=0, threads=threads)
    return root / "base"


def one(shared: Path, root: Path, size: str, tuned: str, seed: int, threads: int) -> str:
    """A process of its own: one seed of one way of tuning."""
    base = root / size / "base" if size == "large" else shared / "weights" / "stories260K-hf"
    columns(Work(root / size / f"{tuned}-{seed}", base, root / "text", SIZES[size], tuned, seed, threads))
    return f"{size} {tuned} {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shared", type=Path, default=Path("../shared/data"), help="folder of the real text and weights"
    )
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept; start again to go on")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuned", choices=["ffn", "full"], nargs="+", default=["ffn", "full"])
    parser.add_argument("--jobs", type=int, default=1, help="seeds and ways side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--table", action="store_true", help="print what is there and make nothing")
    options = parser.parse_args()
    shared, root = options.shared.resolve(), options.work.resolve()
    if not options.table:
        os.environ |= {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
        write_text(shared, root / "text")
        if options.size == "large":
            large_base(root / "large", root / "text", options.threads)
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            jobs = [
                pool.submit(one, shared, root, options.size, tuned, seed, options.threads)
                for seed in options.seeds
                for tuned in options.tuned
            ]
            for job in jobs:
                print(f"done: {job.result()}", flush=True)
    report(root / options.size, options.tuned)


if __name__ == "__main__":
    main()
