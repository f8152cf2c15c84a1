"""The files beside the weights after a merge with a tokenizer: ids, chat template, and what is refused."""

import json
import shutil
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from solera_core.checkpoint import open_checkpoint
from solera_core.context import Context
from solera_core.errors import CheckpointError, ConfigError, InputError
from solera_merge.config import MergeConfig
from solera_merge.plan import make_plan, plan_key
from solera_merge.run import merge
from solera_merge.tokenizer.chat import TEMPLATES, check_template

Recipe = Callable[..., MergeConfig]
MakeModel = Callable[..., Path]
Weights = Callable[[Path], dict[str, npt.NDArray[np.float32]]]

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def variant(siblings: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """`variant(name, *tokens, of="a", generation=None, template=None, **config)`: a copy with special tokens added.

    Its 304 rows have room for four of them (ids 300 to 303).
    """
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer

    def build(
        name: str,
        *tokens: str,
        of: str = "a",
        generation: dict[str, Any] | None = None,
        template: str | None = None,
        **config: Any,
    ) -> Path:
        path = Path(shutil.copytree(siblings[of], tmp_path / name))
        tokenizer = auto.from_pretrained(path)
        tokenizer.add_tokens(list(tokens), special_tokens=True)
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(path)
        (path / "config.json").write_text(json.dumps(config_of(path) | config))
        if generation is not None:
            (path / "generation_config.json").write_text(json.dumps(generation))
        return path

    return build


Variant = Callable[..., Path]


def config_of(directory: Path, name: str = "config.json") -> dict[str, Any]:
    return dict(json.loads((directory / name).read_text()))


def linear(*models: str, **content: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": list(models), "parameters": {"weight": 1}, **content}


def load(directory: Path) -> Any:
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    return auto.from_pretrained(directory)


def test_ids_are_those_of_the_model_whose_tokenizer_it_is(recipe: Recipe, variant: Variant, tmp_path: Path) -> None:
    """config.json is the base's; its ids would mean other tokens, or none, in the tokenizer of another model."""
    variant("a", "<img>", image_token_id=300)
    variant("b", "<|im_end|>", "<img>", of="b", eos_token_id=300, pad_token_id=1, generation={"eos_token_id": [1, 300]})
    content = linear("a", "b", tokenizer_source="b")
    out = merge(recipe(**content), tmp_path / "out", Context(base_dir=tmp_path))
    found = config_of(out)
    assert [found[f"{key}_token_id"] for key in ("bos", "eos", "pad", "image")] == [0, 300, 1, 301]
    assert config_of(out, "generation_config.json")["eos_token_id"] == [1, 300]
    assert found["vocab_size"] == 304


def test_a_union_ends_where_any_model_ends(recipe: Recipe, variant: Variant, tmp_path: Path) -> None:
    """Else text in the manner of the second model would run on past its end."""
    variant("a", "<x>", generation={"eos_token_id": 1, "temperature": 0.5, "do_sample": True})
    variant("b", "<|im_end|>", of="b", generation={"eos_token_id": [300, 1]})
    plan, _ = make_plan(recipe(**linear("a", "b", tokenizer_source="union")), Context(base_dir=tmp_path))
    assert json.loads(plan.files["generation_config.json"]) == {
        "eos_token_id": [1, 301],
        "temperature": 0.5,
        "do_sample": True,
    }
    assert "a generation ends at '<|im_end|>' of 'b' too" in "\n".join(plan.warnings)
    out = merge(recipe(**linear("a", "b", tokenizer_source="union")), tmp_path / "out", Context(base_dir=tmp_path))
    assert load(out).convert_ids_to_tokens(config_of(out, "generation_config.json")["eos_token_id"]) == [
        "</s>",
        "<|im_end|>",
    ]
    assert config_of(out)["eos_token_id"] == 1


def test_older_files_tell_the_same(recipe: Recipe, variant: Variant, tmp_path: Path) -> None:
    """added_tokens_decoder is brought up to date; files of other formats, which would contradict, are left out."""
    a = variant("a", "<x>")
    variant("b", "<y>", of="b")
    settings = config_of(a, "tokenizer_config.json")
    mark = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings["added_tokens_decoder"] = {"0": {"content": "<s>", **mark}, "300": {"content": "<x>", **mark}}
    settings["extra_special_tokens"] = ["<only here>"]
    (a / "tokenizer_config.json").write_text(json.dumps(settings))
    (a / "vocab.json").write_text("{}")
    (a / "added_tokens.json").write_text('{"<x>": 300}')
    (a / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    out = merge(recipe(**linear("a", "b", tokenizer_source="union")), tmp_path / "out", Context(base_dir=tmp_path))
    names = {file.name for file in out.iterdir()}
    assert not names & {"vocab.json", "added_tokens.json"}
    assert (out / "special_tokens_map.json").read_text() == '{"eos_token": "</s>"}'
    decoder = config_of(out, "tokenizer_config.json")["added_tokens_decoder"]
    assert {i: entry["content"] for i, entry in decoder.items()} == {
        "0": "<s>",
        "1": "</s>",
        "300": "<x>",
        "301": "<only here>",
        "302": "<y>",
    }
    assert load(out).convert_tokens_to_ids(["<x>", "<only here>", "<y>"]) == [300, 301, 302]


@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_tied_embeddings_and_biases_of_heads(
    recipe: Recipe, make_model: MakeModel, weights: Weights, tmp_path: Path, family: str
) -> None:
    settings: Mapping[str, Any] = {
        "gemma2": {"tie_word_embeddings": True, "head_dim": 8, "query_pre_attn_scalar": 8, "pad_token_id": 0},
        "phi": {"pad_token_id": 0},
    }[family]
    for name in "ab":
        make_model(tmp_path / name, family=family, seed=ord(name), **settings)
    tokenizer = load(tmp_path / "b")
    tokenizer.add_tokens(["<new>", *(f"<{i}>" for i in range(5))])
    make_model(tmp_path / "c", family=family, seed=9, **(dict(settings) | {"vocab_size": 306}))
    tokenizer.save_pretrained(tmp_path / "c")
    out = merge(recipe(**linear("a", "b", "c", tokenizer_source="union")), tmp_path / "out", Context(base_dir=tmp_path))
    merged = weights(out)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    moved = [name for name in merged if merged[name].shape[0] == 306]
    assert len(moved) == (1 if family == "gemma2" else 3)
    for name in moved:
        mean = (a[name][:300] + b[name][:300] + c[name][:300]) / 3
        np.testing.assert_allclose(merged[name][:300], mean, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(merged[name][300:], c[name][300:], rtol=1e-6)


def test_a_killed_run_with_another_template_is_not_gone_on_with(recipe: Recipe, siblings: dict[str, Path]) -> None:
    ctx = Context(models=siblings)
    keys = {plan_key(*make_plan(recipe(**linear("a", "b", chat_template=t)), ctx)) for t in ("chatml", "alpaca")}
    assert len(keys) == 2


def test_the_record_tells_the_inputs_as_they_are(recipe: Recipe, variant: Variant, tmp_path: Path) -> None:
    """Not as the merge sees them: `solera verify --rebuild` opens them anew, and makes the same bytes."""
    from solera.rebuild import rebuild

    a, b = variant("a", "<x>"), variant("b", "<y>", of="b")
    source = {"kind": "model_token", "model": str(b), "token": "<y>"}
    content = linear(str(a), str(b), tokenizer={"tokens": {"<x>": {"source": str(a)}, "<new>": {"source": source}}})
    out = merge(recipe(**content), tmp_path / "out", Context())
    inputs = config_of(out, "solera.json")["inputs"]
    assert [i["digest"] for i in inputs] == [open_checkpoint(p, Context()).digest() for p in (a, b)]
    assert rebuild(out, Context()).problems == ()


# Chat templates

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
DOCUMENTED = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n"
    "[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "Hello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nHi [/INST] Hello</s> [INST] Bye [/INST]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_known_format(recipe: Recipe, siblings: dict[str, Path], tmp_path: Path, name: str) -> None:
    """transformers renders it as the model family documents it."""
    out = merge(recipe(**linear("a", "b", chat_template=name)), tmp_path / "out", Context(models=siblings))
    assert load(out).apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == DOCUMENTED[name]
    assert (out / "tokenizer_config.json").read_bytes() == (siblings["a"] / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize("name", TEMPLATES)
def test_mergekits_formats(siblings: dict[str, Path], name: str) -> None:
    """Two are the same; in the others transformers renders line breaks and blanks that no model was trained on."""
    theirs = files("mergekit._data.chat_templates").joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    rendered = load(siblings["a"]).apply_chat_template(
        TALK, chat_template=theirs, tokenize=False, add_generation_prompt=True
    )
    if name in ("chatml", "mistral"):
        assert rendered == DOCUMENTED[name]
    else:
        assert rendered != DOCUMENTED[name]
        assert "".join(rendered.split()) == "".join(DOCUMENTED[name].split())


def test_the_formats_that_alternate_say_so(siblings: dict[str, Path]) -> None:
    tokenizer = load(siblings["a"])
    for name, talk in (("mistral", [TALK[1], TALK[3]]), ("alpaca", [{"role": "tool", "content": "x"}])):
        with pytest.raises(Exception, match=name):
            tokenizer.apply_chat_template(talk, chat_template=TEMPLATES[name], tokenize=False)


def test_auto_is_the_most_common_one(recipe: Recipe, variant: Variant, tmp_path: Path) -> None:
    """Of equally common ones the first in the recipe; wherever a model keeps it."""
    variant("a", template=PLAIN)
    variant("b", of="b", template=CHATML)
    c = variant("c", of="c")
    settings = config_of(c, "tokenizer_config.json")
    named = [{"name": "tools", "template": "{{ tools }}"}, {"name": "default", "template": CHATML + "\n"}]
    (c / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    variant("d", of="a")
    ctx = Context(base_dir=tmp_path)
    for models, expected in (("abc", CHATML), ("ab", PLAIN), ("ba", CHATML), ("da", PLAIN), ("ca", CHATML)):
        out = merge(recipe(**linear(*models, chat_template="auto")), tmp_path / f"out-{models}", ctx)
        found = load(out).chat_template
        assert (found["default"] if isinstance(found, dict) else found).strip() == expected.strip()
    plan, _ = make_plan(recipe(**linear("a", "d", chat_template="auto")), ctx)
    assert not plan.files  # it is the donor's own: its files are copied
    plan, _ = make_plan(
        recipe(**linear("d", "d2", chat_template="auto")),
        Context(models={"d": c.parent / "d", "d2": variant("d2", of="b")}),
    )
    assert "`auto` finds no chat template" in "\n".join(plan.warnings)


def test_a_template_replaces_that_in_the_config(recipe: Recipe, variant: Variant, tmp_path: Path) -> None:
    a = variant("a")
    settings = config_of(a, "tokenizer_config.json")
    (a / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHATML}))
    (a / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    out = merge(recipe(**linear("a", chat_template=PLAIN)), tmp_path / "out", Context(base_dir=tmp_path))
    assert load(out).apply_chat_template(TALK[1:2], tokenize=False) == "user: Hi\n"
    assert config_of(out, "tokenizer_config.json") == settings
    assert not (out / "chat_template.json").exists()
    kept = merge(recipe(**linear("a")), tmp_path / "kept", Context(base_dir=tmp_path))
    assert load(kept).chat_template == CHATML


def test_a_union_keeps_the_chat_template(recipe: Recipe, variant: Variant, tmp_path: Path) -> None:
    variant("a", "<|im_start|>", template=CHATML)
    variant("b", "<|im_end|>", of="b", template=PLAIN)
    out = merge(recipe(**linear("a", "b", tokenizer_source="union")), tmp_path / "out", Context(base_dir=tmp_path))
    assert load(out).chat_template == CHATML
    assert load(out).apply_chat_template(TALK[1:2], tokenize=True)["input_ids"][0] == 300


def test_marks_of_a_format_that_are_no_tokens(recipe: Recipe, variant: Variant, tmp_path: Path) -> None:
    def said(**content: Any) -> str:
        plan, _ = make_plan(recipe(**linear("a", "b", chat_template="chatml", **content)), Context(base_dir=tmp_path))
        return "\n".join(plan.warnings)

    variant("a")
    variant("b", of="b")
    assert "chatml writes '<|im_start|>', '<|im_end|>', which the tokenizer splits" in said()
    tokens = {mark: {"source": {"kind": "zero"}} for mark in ("<|im_start|>", "<|im_end|>")}
    assert "chatml ends with '<|im_end|>', which no `eos_token_id` is" in said(tokenizer={"tokens": tokens})


def test_templates_as_models_have_them() -> None:
    """Optional variables, tools, `generation` blocks, loop controls, contents in parts."""
    assert not check_template(
        "{% if tools is defined and tools %}{{ tools | tojson(indent=2) }}{% endif %}"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
        "{{ date_string | default('today') }}{{ strftime_now('%Y') }}{% set space = namespace(x=0) %}"
        "{% for m in messages %}{% if m.role == 'x' %}{% break %}{% endif %}"
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert not check_template("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}")
    assert not check_template("{{ raise_exception('needs a system message') }}")
    assert check_template("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}") == [
        "chat_template: leaves out something that user or assistant said"
    ]
    assert not check_template("{{ image_token }}{% for m in messages %}{{ m.content }}{% endfor %}", ["image_token"])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("chatlm", "neither a known format (did you mean 'chatml'?)"),
        ("", "neither a known format"),
        ("{% for m in messages %}{{ m.content }}", "does not parse (line 1)"),
        ("{{ messages[0].content | nosuch }}", "does not parse (line 1): No filter named 'nosuch'"),
        (
            "{% for m in messages %}{{ m.content }}{{ eos_tokn }}{% endfor %}",
            "names 'eos_tokn' (did you mean 'eos_token'?)",
        ),
        ("{{ messages[7].content.text }}", "cannot render a talk"),
        ("{{ messages.__class__.__mro__ }}{{ messages[0].content }}", "cannot render a talk"),
    ],
)
def test_chat_templates_that_are_none(recipe: Recipe, siblings: dict[str, Path], template: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(recipe(**linear("a", "b", chat_template=template)), Context(models=siblings))
    assert "chat_template: " in str(caught.value)
    assert words in str(caught.value)


# Tokenizers that cannot be


@pytest.fixture
def refused(recipe: Recipe, tmp_path: Path) -> Callable[..., str]:
    """The message of a refusal, by the plan and by the merge, which leaves nothing behind."""

    def run(kind: type[InputError], **content: Any) -> str:
        ctx = Context(base_dir=tmp_path)
        config = recipe(**content)
        with pytest.raises(kind) as caught:
            make_plan(config, ctx)
        with pytest.raises(kind):
            merge(config, tmp_path / "outputs" / "out", ctx)
        assert not (tmp_path / "outputs").exists()
        return str(caught.value)

    return run


Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (
            {"<x>": {"source": {"kind": "model_token", "model": "b", "token": "<yy>"}}},
            "'b' has no token '<yy>' (did you mean '<y>'?)",
        ),
        (
            {"<x>": {"source": {"kind": "model_token", "model": "b", "token_id": 304}}},
            "token_id 304 is not in 'b', which has 304 rows",
        ),
        (
            {"<x>": {"source": {"kind": "model_token", "model": "c", "token_id": 3}}},
            "<x>.source: 'c' is none of the models",
        ),
        ({"<x>": {"source": "bb"}}, "<x>.source: 'bb' is none of the models of this merge"),
        ({"<x>": {"source": "b"}}, "<x>.source: 'b' has no token '<x>'"),
        ({"<X>": {"source": {"kind": "zero"}}}, "<X>: no model has it, but 'a' has '<x>', and upper and lower case"),
        ({"<x>": {}}, "<x>: not in 'b': say with `source`"),
        ({"<new>": {}}, "<new>: not in 'a', 'b': say with `source`"),
    ],
)
def test_tokens_that_are_not_there(refused: Refused, variant: Variant, tokens: dict[str, Any], words: str) -> None:
    variant("a", "<x>")
    variant("b", "<y>", of="b")
    message = refused(ConfigError, **linear("a", "b", tokenizer={"source": "union", "tokens": tokens}))
    assert f"tokenizer.tokens.{words}" in message or words in message


def test_all_tokens_that_are_not_there_are_named_at_once(refused: Refused, variant: Variant) -> None:
    variant("a", "<x>")
    variant("b", "<y>", of="b")
    message = refused(ConfigError, **linear("a", "b", tokenizer={"tokens": {"<x>": {}, "<y>": {"source": "a"}}}))
    assert "tokenizer.tokens.<x>: not in 'b'" in message
    assert "tokenizer.tokens.<y>.source: 'a' has no token '<y>'" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"tokenizer": {"pad_to_multiple_of": 0}},
            "tokenizer.pad_to_multiple_of: input should be greater than 0 (given: 0)",
        ),
        ({"tokenizer": {"source": "union"}, "tokenizer_source": "union"}, "`tokenizer` is given too"),
        ({"tokenizer": {"source": "base"}}, "`base` needs a base_model"),
        ({"tokenizer": {"sauce": "a"}}, "tokenizer.sauce: unknown key (did you mean 'source'?)"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "zeros"}}}}},
            "tokenizer.tokens.x.source.kind: input should be",
        ),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "zero", "model": "a"}}}}}, "kind: zero takes nothing else"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}},
            "needs `model` and either",
        ),
        (
            {
                "tokenizer": {
                    "tokens": {"x": {"source": {"kind": "model_token", "model": "a", "token": "y", "token_id": 1}}}
                }
            },
            "needs `model` and either `token` or `token_id`",
        ),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a", "token_id": -1}}}}},
            "token_id: ",
        ),
        ({"tokenizer": {"tokens": {"x": {"force": True}}}}, "force: needs a `source`"),
        ({"tokenizer": {"tokens": {"": {"source": "a"}}}}, "'' is no token"),
    ],
)
def test_what_a_recipe_cannot_say(recipe: Recipe, content: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(**linear("a", "b", **content))
    assert words in str(caught.value)


def test_a_source_that_is_no_model(refused: Refused, variant: Variant) -> None:
    variant("a")
    variant("b", of="b")
    assert "tokenizer_source: 'union ' is none" in refused(ConfigError, **linear("a", "b", tokenizer_source="union "))
    assert "tokenizer.source: 'c' is none" in refused(ConfigError, **linear("a", "b", tokenizer={"source": "c"}))
    assert "tokenizer_source: '' is none" in refused(ConfigError, **linear("a", "b", tokenizer_source=""))


def test_bytes_and_letters_are_not_mixed(refused: Refused, variant: Variant) -> None:
    """mergekit takes `é` of the one, a byte, for `é` of the other, a letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    variant("a")
    b = variant("b", of="b")
    tokenizer = Tokenizer(models.BPE(vocab={"é": 0, "e": 1, "▁": 2}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(b / "tokenizer.json"))
    for source in ("union", "a", "b"):
        message = refused(CheckpointError, **linear("a", "b", tokenizer_source=source))
        assert (
            f"{b / 'tokenizer.json'}: the first spells tokens in bytes (as GPT-2 does), the second in letters"
            in message
        )


def test_a_tokenizer_without_json(refused: Refused, recipe: Recipe, variant: Variant, tmp_path: Path) -> None:
    variant("a")
    b = variant("b", of="b")
    (b / "tokenizer.json").rename(b / "tokenizer.model")
    message = refused(CheckpointError, **linear("a", "b", tokenizer_source="union"))
    assert f"{b}: its tokenizer (tokenizer.model) has no tokenizer.json" in message
    assert "save_pretrained" in message
    plan, _ = make_plan(recipe(**linear("b", "a")), Context(base_dir=tmp_path))
    assert "tokenizer.model" in {file.name for file in plan.sidecars}


def test_a_model_without_tokenizer(
    refused: Refused, recipe: Recipe, variant: Variant, make_model: MakeModel, tmp_path: Path
) -> None:
    """Taken to have the tokens of the others where it has as many rows; mergekit does so wherever it can't load one."""
    variant("a")
    b = variant("b", of="b")
    for file in b.glob("tokenizer*"):
        file.unlink()
    plan, _ = make_plan(recipe(**linear("a", "b", tokenizer_source="union")), Context(base_dir=tmp_path))
    assert f"{b}: has no tokenizer; taken to have that of 'a'" in plan.warnings
    c = make_model(tmp_path / "c", vocab_size=310)
    for file in c.glob("tokenizer*"):
        file.unlink()
    message = refused(CheckpointError, **linear("a", "c", tokenizer_source="union"))
    assert f"{c}: has no tokenizer, and 310 embedding rows where 'a' has 304" in message
    for extra in ({"tokenizer_source": "union"}, {"chat_template": "chatml"}):
        assert "none of the models has a tokenizer" in refused(ConfigError, **linear("b", **extra))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
def test_files_that_cannot_be_read(refused: Refused, variant: Variant, name: str) -> None:
    variant("a", template=CHATML)
    b = variant("b", of="b", template=CHATML)
    (b / name).write_bytes(b"{\xff")
    message = refused(CheckpointError, **linear("a", "b", tokenizer_source="union", chat_template="auto"))
    assert f"{b / name}: cannot be read" in message


def test_words_cannot_be_added_to_a_wordpiece_tokenizer(refused: Refused, variant: Variant) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    for name, words in (("a", ["[UNK]", "the", "cask"]), ("b", ["[UNK]", "the", "years"])):
        path = variant(name, of=name)
        tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(path / "tokenizer.json"))
    message = refused(CheckpointError, **linear("a", "b", tokenizer_source="union"))
    assert "a WordPiece tokenizer splits texts by its vocabulary alone" in message
    assert "set tokenizer_source to one of the models" in message


def test_texts_that_are_split_otherwise_are_told(recipe: Recipe, variant: Variant, tmp_path: Path) -> None:
    a = variant("a")
    b = variant("b", of="b")
    content = config_of(b, "tokenizer.json")
    content["model"]["merges"] = content["model"]["merges"][:5]
    (b / "tokenizer.json").write_text(json.dumps(content))
    plan, _ = make_plan(recipe(**linear("a", "b", tokenizer_source="union")), Context(base_dir=tmp_path))
    warning = next(w for w in plan.warnings if "sample texts are split differently" in w)
    assert warning.startswith(f"{b / 'tokenizer.json'}: ")
    assert "'b' was not trained on texts that are split in this way" in warning
    assert str(a) not in warning


def test_tables_with_rows_for_some_tokens_are_not_moved(
    refused: Refused, recipe: Recipe, variant: Variant, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    for name, tokens in (("a", ["<x>"]), ("b", ["<x>"]), ("c", ["<y>"])):
        path = variant(name, *tokens, of=name)
        tensors = load_file(path / "model.safetensors")
        tensors["model.embed_tokens_per_layer.weight"] = np.zeros((290, 8), np.float32)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    message = refused(CheckpointError, **linear("a", "c", tokenizer_source="union"))
    assert "'model.embed_tokens_per_layer.weight' (290, 8) has other rows than the embedding (304)" in message
    _, models = make_plan(recipe(**linear("a", "b", tokenizer_source="union")), Context(base_dir=tmp_path))
    assert not any(c.is_derived(name) for c in models.checkpoints for name in c.tensors)


def test_what_is_wrong_with_tokenizers_is_told_beside_the_rest(refused: Refused, variant: Variant) -> None:
    variant("a", "<x>")
    variant("b", of="b")
    models = [{"model": "a", "parameters": {"weight": [{"filter": "self_atn", "value": 1}, {"value": 1}]}}, "b"]
    tokens = {"<x>": {"source": {"kind": "model_token", "model": "b", "token": "<z>"}}}
    content: dict[str, Any] = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    message = refused(ConfigError, **content, tokenizer={"tokens": tokens}, chat_template="{{ nobody }}")
    for words in ("'b' has no token '<z>'", "names 'nobody'", "filter 'self_atn' matches no tensor"):
        assert words in message
