"""Tokenizers of the output: mergekit's vocabulary and rows, and what it loses: padding, ids, how texts are split."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from solera.rebuild import rebuild
from solera.recipe import load_recipe
from solera_core.context import Context
from solera_core.errors import ConfigError
from solera_core.provenance import read_provenance
from solera_merge.config import MergeConfig
from solera_merge.run import merge, plan_merge

Recipe = Callable[..., MergeConfig]
Weights = Callable[[Path], dict[str, npt.NDArray[np.float32]]]
MakeModel = Callable[..., Path]

PROSE = [
    "the cask gives the spirit its colour and the years give it its name",
    "Once upon a time there was a small model that learned from three large ones.",
    "seven times six is forty two, and one and two make three",
]
CODE = [
    "def add(a, b):\n    return a + b\n",
    "class Cask:\n    def __init__(self, name):\n        self.name = name\n        self.years = []\n",
    "for year in range(10):\n    print(year, cask.name)\n",
]
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def byte_level(texts: Sequence[str], size: int, added: Sequence[tuple[str, bool]] = ()) -> Any:
    """BPE over bytes, as GPT-2's; `added` tokens with whether they are special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(t, special=special, normalized=not special) for t, special in added])
    return tokenizer


def sentencepiece(texts: Sequence[str], size: int, kind: str = "BPE", added: Sequence[tuple[str, bool]] = ()) -> Any:
    """BPE or Unigram over letters with ▁ for spaces, as Llama 2 and T5 have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>") if kind == "BPE" else models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer: Any = (
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
        if kind == "BPE"
        else trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(t, special=special, normalized=not special) for t, special in added])
    return tokenizer


def save(tokenizer: Any, directory: Path, **settings: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for file in directory.glob("tokenizer*"):
        file.unlink()
    fast(tokenizer_object=tokenizer, **{**names, **settings}).save_pretrained(directory)


@pytest.fixture
def model(make_model: MakeModel, tmp_path: Path) -> Callable[..., Path]:
    """`model(name, tokenizer, rows=None, seed=0, **config)`: a tiny model with that tokenizer and as many rows."""

    def build(name: str, tokenizer: Any, rows: int | None = None, **config: Any) -> Path:
        settings = {key: config.pop(key) for key in ("chat_template", "eos_token") if key in config}
        size = rows if rows is not None else tokenizer.get_vocab_size()
        path = make_model(tmp_path / name, vocab_size=size, **config)
        save(tokenizer, path, **settings)
        return path

    return build


Model = Callable[..., Path]


@pytest.fixture(scope="session")
def run_mergekit() -> Callable[..., None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what mergekit and its dependencies warn about is theirs
        from mergekit.config import MergeConfiguration
        from mergekit.merge import MergeOptions, run_merge

    def run(content: dict[str, Any], out: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_merge(
                MergeConfiguration.model_validate(content), str(out), MergeOptions(quiet=True, write_model_card=False)
            )

    return run


def vocabulary(directory: Path) -> dict[str, int]:
    """As transformers has it."""
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    return dict(auto.from_pretrained(directory).get_vocab())


def config_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


@pytest.fixture
def both(
    recipe: Recipe, run_mergekit: Callable[..., None], weights: Weights, tmp_path: Path
) -> Callable[..., tuple[dict[str, int], dict[str, int], Mapping[str, Any], Mapping[str, Any]]]:
    """`both(**content)`: vocabulary by solera and mergekit, tensors by solera and mergekit."""

    def run(**content: Any) -> tuple[dict[str, int], dict[str, int], Mapping[str, Any], Mapping[str, Any]]:
        run_mergekit(content, tmp_path / "theirs")
        ours = merge(recipe(**content), tmp_path / "ours", Context())
        return vocabulary(ours), vocabulary(tmp_path / "theirs"), weights(ours), weights(tmp_path / "theirs")

    return run


Both = Callable[..., tuple[dict[str, int], dict[str, int], Mapping[str, Any], Mapping[str, Any]]]


def require_equal_rows(
    mine: Mapping[str, int], theirs: Mapping[str, int], a: Mapping[str, Any], b: Mapping[str, Any]
) -> None:
    """The same tokens, and for every token the same rows of embedding and head; all other tensors equal."""
    assert mine.keys() == theirs.keys()
    tokens = sorted(mine)
    for name in a:
        if name in TABLES:
            np.testing.assert_allclose(
                a[name][[mine[t] for t in tokens]], b[name][[theirs[t] for t in tokens]], rtol=1e-6, atol=1e-8
            )
        else:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6, atol=1e-8)


TOKENIZERS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "bytes": lambda: (
        byte_level(PROSE, 280, [("<|im_start|>", True)]),
        byte_level(CODE, 290, [("<think>", False), ("<|im_start|>", True)]),
        byte_level(PROSE + CODE, 300, [("<tool>", True)]),
    ),
    "letters": lambda: (
        sentencepiece(PROSE, 60, added=[("<|im_start|>", True)]),
        sentencepiece(CODE, 70),
        sentencepiece(PROSE + CODE, 80, added=[("<tool>", True)]),
    ),
    "unigram": lambda: (
        sentencepiece(PROSE, 50, "Unigram", [("<|im_start|>", True)]),
        sentencepiece(PROSE + CODE, 80, "Unigram"),
        sentencepiece(CODE, 45, "Unigram", [("<tool>", True)]),
    ),
}


@pytest.mark.parametrize("source", ["union", "base", "b"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_vocabulary_and_rows_are_mergekits(both: Both, model: Model, kind: str, source: str) -> None:
    """Three tokenizers of one kind; tokens that all, two, or one of the models have, and only the base."""
    tokenizers = TOKENIZERS[kind]()
    paths = [str(model(n, t, seed=i)) for i, (n, t) in enumerate(zip(("base", "b", "c"), tokenizers, strict=True))]
    mine, theirs, a, b = both(
        merge_method="task_arithmetic",
        base_model=paths[0],
        models=[{"model": p, "parameters": {"weight": 0.5}} for p in paths[1:]],
        tokenizer_source=paths[1] if source == "b" else source,
        dtype="float32",
    )
    require_equal_rows(mine, theirs, a, b)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_of_no_model_of_the_merge(
    both: Both, recipe: Recipe, model: Model, tmp_path: Path, kind: str
) -> None:
    """Any model or directory with a tokenizer: mergekit's vocabulary and rows; tokens that no model has get zeros."""
    first, second, third = TOKENIZERS[kind]()
    paths = [str(model(n, t, seed=i)) for i, (n, t) in enumerate((("base", first), ("b", second)))]
    outside = tmp_path / "outside"
    outside.mkdir()
    save(third, outside)
    content: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": paths[0],
        "models": [{"model": paths[1], "parameters": {"weight": 0.5}}],
        "tokenizer_source": str(outside),
        "dtype": "float32",
    }
    mine, theirs, a, b = both(**content)
    assert mine == theirs == vocabulary(outside)
    assert config_of(tmp_path / "ours")["vocab_size"] == len(mine)
    require_equal_rows(mine, theirs, a, b)
    new = [i for token, i in mine.items() if token not in {**vocabulary(Path(paths[0])), **vocabulary(Path(paths[1]))}]
    assert new
    assert not any(a[name][new].any() for name in TABLES)
    plan = plan_merge(recipe(**content), Context())
    assert any(
        str(outside) == row["what"] and row["read as"] == "its tokenizer only" for row in plan.reads if "read as" in row
    )
    record = read_provenance(tmp_path / "ours")
    assert [item["ref"] for item in record["inputs"]] == [*reversed(paths), str(outside)]
    assert rebuild(tmp_path / "ours", Context()).problems == ()


def test_such_a_tokenizer_keeps_the_owners_ids_of_other_files(
    recipe: Recipe, model: Model, weights: Weights, tmp_path: Path
) -> None:
    """generation_config.json and config.json name the same tokens as before; padding is the named model's."""
    a = model("a", byte_level(PROSE, 280, [("<end>", True)]), rows=300)
    (a / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 280], "temperature": 0.7}))
    other = model("other", byte_level(PROSE, 280, [("<x>", True), ("<end>", True)]), rows=296, seed=3)
    for entry in ("model.safetensors", "generation_config.json"):
        (other / entry).unlink()
    content = linear(a, tokenizer_source=str(other), parameters={"normalize": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = merge(recipe(**content), tmp_path / "out", Context())
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [1, 281], "temperature": 0.7}
    assert config_of(out)["vocab_size"] == 296
    for name in TABLES:
        mine, own = weights(out)[name], weights(a)[name]
        np.testing.assert_allclose(mine[281], 0.2 * own[280], rtol=1e-6)
        np.testing.assert_allclose(mine[282:], 0.2 * own[282:296], rtol=1e-6)  # padding of both: the model's own


def test_a_stage_gives_its_tokenizer(model: Model, tmp_path: Path) -> None:
    """A directory without a config, and the name of an earlier stage, which is made first."""
    from solera.pipeline import run_recipe

    a, b = (model(n, byte_level(PROSE, 280, t), seed=i) for i, (n, t) in enumerate((("a", []), ("b", [("<x>", True)]))))
    (tmp_path / "only").mkdir()
    save(byte_level(PROSE, 280, [("<y>", True)]), tmp_path / "only")
    text = f"""
solera: 1
stages:
  last: {{merge: {{merge_method: passthrough, models: [{{model: {a}}}], tokenizer_source: first}}}}
  other: {{merge: {{merge_method: passthrough, models: [{{model: {a}}}], tokenizer: {{source: {tmp_path / "only"}}}}}}}
  first: {{merge: {{merge_method: passthrough, models: [{{model: {b}}}]}}}}
"""
    (tmp_path / "recipe.yml").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_recipe(load_recipe(tmp_path / "recipe.yml"), tmp_path / "run", Context())
    stages = tmp_path / "run" / "stages"
    assert vocabulary(stages / "last") == vocabulary(b)
    assert vocabulary(stages / "other") == vocabulary(tmp_path / "only")


def test_a_tokenizer_source_that_leads_nowhere(recipe: Recipe, model: Model, tmp_path: Path) -> None:
    a = model("a", byte_level(PROSE, 280))
    (tmp_path / "empty").mkdir()
    for source, words in ((str(tmp_path / "ab"), "did you mean"), (str(tmp_path / "empty"), "has no tokenizer")):
        with pytest.raises(ConfigError, match=words):
            merge(recipe(**linear(a, tokenizer_source=source)), tmp_path / "out", Context())


def linear(*paths: Path, **content: Any) -> dict[str, Any]:
    """A recipe that weighs the models differently, so that no two of them can be confused."""
    weights = (0.2, 0.5, 0.3)
    models = [{"model": str(p), "parameters": {"weight": w}} for p, w in zip(paths, weights, strict=False)]
    return {"merge_method": "linear", "models": models, "dtype": "float32", **content}


TOKENS: dict[str, dict[str, Any]] = {
    "another model's token": {"<|im_start|>": {"source": {"kind": "model_token", "model": "b", "token": "self"}}},
    "a row": {"<|im_start|>": {"source": {"kind": "model_token", "model": "c", "token_id": 7}}},
    "zeros": {"<new>": {"source": {"kind": "zero"}}, "def": {"source": {"kind": "zero"}}},
    "another model": {"<think>": {"source": "b"}, "ame": {"source": "c"}},
    "forced": {"e": {"source": "c", "force": True}, "<think>": {"source": {"kind": "zero"}, "force": True}},
    "new tokens": {
        "<one>": {"source": {"kind": "model_token", "model": "b", "token": "<think>"}},
        "<two>": {"source": {"kind": "model_token", "model": "a", "token": "</s>"}},
    },
}


@pytest.mark.parametrize("source", ["union", "b"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_single_tokens_are_as_in_mergekit(both: Both, model: Model, tokens: str, source: str, tmp_path: Path) -> None:
    three = (
        byte_level(PROSE, 280, [("<|im_start|>", True)]),
        byte_level(CODE, 300, [("<think>", False)]),
        byte_level(PROSE + CODE, 310),
    )
    paths = [model(name, t, seed=i) for i, (name, t) in enumerate(zip("abc", three, strict=True))]
    text = json.dumps(TOKENS[tokens])
    for name in "abc":
        text = text.replace(f'"{name}"', json.dumps(str(tmp_path / name)))
    mine, theirs, a, b = both(
        **linear(
            *paths, tokenizer={"source": source if source == "union" else str(paths[1]), "tokens": json.loads(text)}
        )
    )
    assert TOKENS[tokens].keys() <= mine.keys()
    require_equal_rows(mine, theirs, a, b)


def test_padding_that_the_recipe_asks_for_is_mergekits(both: Both, model: Model, tmp_path: Path) -> None:
    """Behind the tokens the mean of the rows that have a token, up to the multiple; existing padding is dropped."""
    a = model("a", byte_level(PROSE, 280), rows=352)
    b = model("b", byte_level(CODE, 290), rows=300, seed=1)
    mine, theirs, ours, other = both(**linear(a, b, tokenizer={"source": "union", "pad_to_multiple_of": 64}))
    require_equal_rows(mine, theirs, ours, other)
    assert 256 < len(mine) < 320
    for name in TABLES:
        assert ours[name].shape == (320, 32)
        np.testing.assert_allclose(ours[name][len(mine) :], other[name][len(mine) :], rtol=1e-5, atol=1e-8)
    assert config_of(tmp_path / "ours")["vocab_size"] == config_of(tmp_path / "theirs")["vocab_size"] == 320


def test_padding_is_filled_where_all_vocabularies_agree_too(both: Both, model: Model) -> None:
    """Nothing needs to be moved, and the number of rows stays: the rows without a token still get the mean."""
    tokenizer = byte_level(PROSE, 281)
    a, b = (model(name, tokenizer, rows=320, seed=i) for i, name in enumerate("ab"))
    mine, _, ours, other = both(**linear(a, b, tokenizer={"source": "union", "pad_to_multiple_of": 64}))
    assert len(mine) < 320
    for name in TABLES:
        np.testing.assert_allclose(ours[name], other[name], rtol=1e-5, atol=1e-8)


def test_stacked_layers_take_the_rows_of_their_own_models(both: Both, model: Model) -> None:
    """The embedding is made of the first slice's models, the head of the last one's; tokens of neither get zeros."""
    three = (byte_level(PROSE, 280), byte_level(CODE, 290), byte_level(PROSE + CODE, 300))
    paths = [str(model(name, t, seed=i)) for i, (name, t) in enumerate(zip("abc", three, strict=True))]
    slices = [
        {"sources": [{"model": paths[0], "layer_range": [0, 1]}]},
        {"sources": [{"model": paths[1], "layer_range": [0, 2]}]},
        {"sources": [{"model": paths[2], "layer_range": [1, 2]}]},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        require_equal_rows(
            *both(merge_method="passthrough", slices=slices, base_model=paths[0], tokenizer_source="union")
        )


def test_padded_rows_stay(
    recipe: Recipe, run_mergekit: Callable[..., None], model: Model, weights: Weights, tmp_path: Path
) -> None:
    """As in Qwen: more rows than tokens. mergekit shrinks the table to its tokens."""
    base = byte_level(PROSE, 280)
    a = model("a", base, rows=320)
    b = model("b", byte_level(PROSE, 280, [("<tool>", True)]), rows=320, seed=1)
    content = linear(a, b, tokenizer_source="union", parameters={"normalize": False})
    run_mergekit(content, tmp_path / "theirs")
    out = merge(recipe(**content), tmp_path / "out", Context())
    assert vocabulary(out) == vocabulary(tmp_path / "theirs") == vocabulary(b)
    assert config_of(out)["vocab_size"] == 320
    assert config_of(tmp_path / "theirs")["vocab_size"] == 281
    for name in TABLES:
        merged, x, y = (weights(p)[name] for p in (out, a, b))
        assert merged.shape == (320, 32)
        np.testing.assert_allclose(merged[280], 0.7 * y[280], rtol=1e-5)  # `<tool>`: only b has it
        for rows in (slice(280), slice(281, None)):
            np.testing.assert_allclose(merged[rows], 0.2 * x[rows] + 0.5 * y[rows], rtol=1e-5, atol=1e-8)


def test_tokens_beyond_the_rows_are_left_out(
    recipe: Recipe, run_mergekit: Callable[..., None], model: Model, weights: Weights, tmp_path: Path
) -> None:
    """A tokenizer may have more tokens than the model has rows. mergekit gives the table too many rows, or stops."""
    a = model("a", byte_level(PROSE, 280, [("<x>", True), ("<y>", True)]), rows=281)
    b = model("b", byte_level(PROSE, 280, [("<z>", True)]), rows=280, seed=1)
    ctx = Context()
    out = merge(recipe(**linear(a, b, tokenizer_source="union")), tmp_path / "out", ctx)
    found = vocabulary(out)
    assert {"<y>", "<z>"} & found.keys() == set()
    assert found["<x>"] == 280
    assert weights(out)[TABLES[0]].shape == (281, 32)
    cut = merge(recipe(**linear(b, a, tokenizer_source=str(b))), tmp_path / "cut", ctx)
    with pytest.raises(KeyError, match="280"):  # the id of `<z>`
        run_mergekit(linear(a, b, tokenizer_source=str(b), base_model=str(a)), tmp_path / "theirs")
    assert len(vocabulary(cut)) == config_of(cut)["vocab_size"] == 280
    trained = byte_level(PROSE, 280)
    c = model("c", trained, rows=270, seed=2)  # pieces with their merge rules go, too
    short = merge(recipe(**linear(c, b, tokenizer_source=str(c))), tmp_path / "short", ctx)
    assert max(vocabulary(short).values()) == 269
    assert weights(short)[TABLES[0]].shape == (270, 32)


def test_equal_vocabularies_move_nothing(recipe: Recipe, siblings: dict[str, Path], tmp_path: Path) -> None:
    """The files are copied byte for byte, and the merge is the one without a tokenizer."""
    from solera_merge.plan import make_plan

    ctx = Context(models=siblings)
    plain = make_plan(recipe(**linear(Path("a"), Path("b"))), ctx)
    for wanted in ({"tokenizer_source": "union"}, {"tokenizer_source": "b"}, {"tokenizer": {"source": "a"}}):
        plan, models = make_plan(recipe(**linear(Path("a"), Path("b"), **wanted)), ctx)
        assert not plan.files
        assert plan.tensors == plain[0].tensors
        assert plan.config == plain[0].config
        assert all(c.is_plain(name, ("F32",)) for c in models.checkpoints for name in c.tensors)
        assert plan.warnings == plain[0].warnings


def test_only_what_moves_is_read_row_by_row(recipe: Recipe, model: Model) -> None:
    from solera_merge.plan import make_plan

    a = model("a", byte_level(PROSE, 280))
    b = model("b", byte_level(PROSE, 280, [("<x>", True)]), seed=1)
    _, models = make_plan(recipe(**linear(a, b, tokenizer_source=str(b))), Context())
    first, second = models.checkpoints
    assert {name for name in first.tensors if first.is_derived(name)} == set(TABLES)
    assert not any(second.is_derived(name) for name in second.tensors)


def test_any_range_of_a_moved_table_is_read(recipe: Recipe, model: Model) -> None:
    """Ranges begin and end anywhere in a row, and take memory by their own length."""
    import tracemalloc

    from solera_merge.plan import make_plan

    a = model("a", byte_level(PROSE, 280), rows=290)
    b = model("b", byte_level(CODE, 300), rows=310, seed=1)
    wanted = {"source": "union", "pad_to_multiple_of": 128, "tokens": {"<n>": {"source": {"kind": "zero"}}}}
    _, models = make_plan(recipe(**linear(a, b, tokenizer=wanted)), Context())
    for checkpoint in models.checkpoints:
        for name in TABLES:
            whole = checkpoint.read_flat(name)
            assert whole.size == checkpoint.tensors[name].size
            for start, stop in ((0, 0), (0, 1), (31, 33), (5, 5000), (8999, 9500), (whole.size - 7, whole.size)):
                np.testing.assert_array_equal(checkpoint.read_flat(name, start, stop), whole[start:stop])
            tracemalloc.start()
            checkpoint.read_flat(name, 320, 352)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < whole.nbytes / 4


def tokens_of(directory: Path, text: str) -> list[str]:
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    return list(auto.from_pretrained(directory).tokenize(text))


TEXT = "   the class of names: self.name = name\n    return <tool>x</tool> \n\n\nOnce upon a time\tthere was 42"


def test_a_union_splits_texts_as_before(
    recipe: Recipe, run_mergekit: Callable[..., None], model: Model, tmp_path: Path
) -> None:
    """Of the model whose tokenizer it extends, however different the other is; mergekit's splits them anew."""
    a = model("a", byte_level(PROSE, 280))
    b = model("b", byte_level(CODE, 300, [("    ", False), ("<|im_end|>", True)]), seed=1)
    content = linear(a, b, tokenizer_source="union", base_model=str(a))
    run_mergekit(content, tmp_path / "theirs")
    out = merge(recipe(**content), tmp_path / "out", Context())
    assert "self" in vocabulary(out)
    assert "    " in vocabulary(out)
    assert tokens_of(out, TEXT) == tokens_of(a, TEXT)
    assert tokens_of(tmp_path / "theirs", TEXT) != tokens_of(a, TEXT)
    assert tokens_of(out, "a<|im_end|>b") == ["a", "<|im_end|>", "b"]


def test_a_union_of_one_base_with_more_tokens_splits_all_texts_as_before(
    recipe: Recipe, model: Model, tmp_path: Path
) -> None:
    base = ([*PROSE, *CODE], 310)
    a = model("a", byte_level(*base, [("<tool>", False), ("</tool>", False)]))
    b = model("b", byte_level(*base, [("<|im_start|>", True), ("</tool>", False)]), seed=1)
    out = merge(recipe(**linear(a, b, tokenizer_source="union")), tmp_path / "out", Context())
    for directory, text in ((a, TEXT), (b, "<|im_start|>" + TEXT.replace("<tool>", ""))):
        assert tokens_of(out, text) == tokens_of(directory, text)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_every_class_of_transformers_reads_it(recipe: Recipe, model: Model, tmp_path: Path, name: str) -> None:
    """Some classes build themselves anew from the vocabulary and the merge rules in tokenizer.json."""
    make = sentencepiece if name == "LlamaTokenizer" else byte_level
    a = model("a", make(PROSE, 280, added=[("<x>", True)]))
    b = model("b", make(CODE, 290, added=[("<y>", True)]), seed=1)
    for path in (a, b):
        settings = json.loads((path / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": name, "unk_token": "<s>"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    out = merge(recipe(**linear(a, b, tokenizer_source="union")), tmp_path / "out", Context())
    found, first = vocabulary(out), vocabulary(a)
    assert found.keys() == first.keys() | vocabulary(b).keys()
    assert {token: found[token] for token in first} == first
    assert tokens_of(out, PROSE[1]) == tokens_of(a, PROSE[1])


def scores(directory: Path, ids: list[int], known: list[int]) -> Any:
    """Logits of a text at the ids that a model knows. Shape [tokens, ids]."""
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.no_grad():
        return auto.from_pretrained(directory)(torch.tensor([ids])).logits[0][:, known]


def nll(logits: Any, labels: list[int]) -> float:
    """Mean negative log-likelihood of a text; `labels` are columns of the logits."""
    import torch

    log = torch.log_softmax(logits.double(), -1)
    return float(-log[range(len(labels) - 1), labels[1:]].mean())


@pytest.mark.parametrize("which", [0, 1])
def test_a_model_scores_its_own_text_as_before(recipe: Recipe, model: Model, tmp_path: Path, which: int) -> None:
    """Passed through a union, the logits of a model's own tokens are the same, to the last bit."""
    paths = (model("a", byte_level(PROSE, 280), rows=288), model("b", byte_level(CODE, 300), seed=1))
    own = vocabulary(paths[which])
    slices = [{"sources": [{"model": str(paths[which]), "layer_range": [0, 2]}]}]
    content = {"merge_method": "passthrough", "slices": slices, "base_model": str(paths[0])}
    out = merge(recipe(**content, tokenizer_source="union"), tmp_path / "out", Context())
    new = vocabulary(out)
    text = [own[token] for token in tokens_of(paths[which], "\n".join(PROSE + CODE))]
    moved = [new[token] for token in tokens_of(paths[which], "\n".join(PROSE + CODE))]
    order = sorted(own, key=own.__getitem__)
    before = scores(paths[which], text, [own[token] for token in order])
    after = scores(out, moved, [new[token] for token in order])
    assert (before == after).all()
    assert nll(before, text) == nll(after, text)


def test_a_model_with_all_tokens_has_its_likelihoods(recipe: Recipe, model: Model, tmp_path: Path) -> None:
    a = model("a", byte_level(PROSE, 280))
    b = model("b", byte_level(PROSE, 280, [("<x>", True)]), seed=1)
    content = {"merge_method": "passthrough", "slices": [{"sources": [{"model": str(b), "layer_range": [0, 2]}]}]}
    out = merge(recipe(**content, base_model=str(a), tokenizer_source="union"), tmp_path / "out", Context())
    ids = [vocabulary(b)[token] for token in tokens_of(b, " ".join(PROSE) + "<x>")]
    every = list(range(281))
    assert nll(scores(out, ids, every), ids) == nll(scores(b, ids, every), ids)


@pytest.mark.parametrize("source", ["base", "union"])
def test_a_language_model_of_other_tokens_into_a_tower(
    recipe: Recipe, weights: Weights, tmp_path: Path, source: str
) -> None:
    """Tokens that only the vision-language model has (its image token) keep its rows; the others meet by token."""
    from dataclasses import replace

    from tests.merge.families import FAMILIES, context

    first, second = sentencepiece(PROSE, 50, added=[("<image>", True)]), sentencepiece(PROSE + CODE, 60)
    text = replace(FAMILIES["llama"], settings={**FAMILIES["llama"].settings, "vocab_size": second.get_vocab_size()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers warns about in some families is its own
        paths = {"vlm": FAMILIES["llava"].build(tmp_path / "vlm", 0), "text": text.build(tmp_path / "text", 1)}
        save(first, paths["vlm"])
        save(second, paths["text"])
        config = recipe(
            merge_method="linear",
            base_model="vlm",
            towers={"language": {"models": [{"model": "vlm"}, {"model": "text"}], "parameters": {"weight": 0.5}}},
            tokenizer_source=source,
        )
        out = merge(config, tmp_path / "out", context(paths))
    vlm, other, merged = (weights(p) for p in (paths["vlm"], paths["text"], out))
    found, mine, theirs = (vocabulary(p) for p in (out, paths["vlm"], paths["text"]))
    assert found.keys() == (mine.keys() | theirs.keys() if source == "union" else mine.keys())
    for table in TABLES:
        name = next(n for n in merged if n.endswith(table.removeprefix("model.")))
        for token, i in found.items():
            rows = [vlm[name][mine[token]]] if token in mine else []
            rows += [other[table][theirs[token]]] if token in theirs else []
            np.testing.assert_allclose(merged[name][i], sum(rows) / len(rows), rtol=1e-5, atol=1e-7)
    assert found["<image>"] == mine["<image>"]
    assert any("vision" in name for name in merged)


def test_gpt2_and_gpt_neox(recipe: Recipe, make_model: MakeModel, shared_data: Path, tmp_path: Path) -> None:
    """Both byte-level, with other merge rules, and in the second added tokens for runs of spaces.

    The union extends GPT-2's: its texts are split as before, and the texts of GPT-NeoX, split by its own tokenizer,
    have the logits of before.
    """
    from tokenizers import Tokenizer
    from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

    gpt2: Any = GPT2Tokenizer
    fast: Any = PreTrainedTokenizerFast
    files = shared_data / "tokenizers"
    if not files.is_dir():
        pytest.skip(f"the tokenizers of GPT-2 and GPT-NeoX are not present at {files}")
    saved = {
        "gpt2": (gpt2(vocab=str(files / "gpt2/vocab.json"), merges=str(files / "gpt2/merges.txt")), 50304),
        "neox": (fast(tokenizer_file=str(files / "gpt-neox-20b/tokenizer.json"), eos_token="<|endoftext|>"), 50432),
    }
    for name, (tokenizer, rows) in saved.items():
        make_model(tmp_path / name, vocab_size=rows, hidden_size=8, seed=rows)
        tokenizer.save_pretrained(tmp_path / name)
    slices = [{"sources": [{"model": "neox", "layer_range": [0, 2]}]}]
    content = {"merge_method": "passthrough", "slices": slices, "base_model": "gpt2", "tokenizer_source": "union"}
    out = merge(recipe(**content), tmp_path / "out", Context(base_dir=tmp_path, reload_check=False))
    union, old, other = (Tokenizer.from_file(str(tmp_path / n / "tokenizer.json")) for n in ("out", "gpt2", "neox"))
    new = union.get_vocab()
    assert new.keys() == old.get_vocab().keys() | other.get_vocab().keys()
    assert config_of(out)["vocab_size"] == len(new) == max(new.values()) + 1
    text = TEXT + Path(__file__).read_text(encoding="utf-8")
    assert union.encode(text).ids == old.encode(text).ids
    split = other.encode(text[:2000])
    before = scores(tmp_path / "neox", split.ids, list(range(other.get_vocab_size())))
    moved = [new[str(other.id_to_token(i))] for i in range(other.get_vocab_size())]
    after = scores(out, [moved[i] for i in split.ids], moved)
    assert (before == after).all()
    assert nll(before, split.ids) == nll(after, split.ids)
