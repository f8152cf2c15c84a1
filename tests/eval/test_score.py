import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from solera_core.causal_lm import load_model, load_tokenizer
from solera_core.data import DataSource, read_documents
from solera_core.errors import CheckpointError, DataError
from solera_core.likelihood import Query, log_likelihoods, score_documents, windows
from solera_core.prefix import describe_prefix, prefix_id, prompt_ids
from solera_eval.score import score_choices
from solera_eval.suite import ChoiceItem, TextItem

TOLERANCE = 2e-4  # nats a document, fp32, for another batch shape


@pytest.fixture(scope="module")
def model(trained: Path) -> Any:
    return load_model(trained)


@pytest.fixture(scope="module")
def tokenizer(trained: Path) -> Any:
    return load_tokenizer(trained)


@pytest.fixture(scope="module")
def texts(eval_data: Path) -> list[TextItem]:
    documents = read_documents(DataSource(path=str(eval_data / "text.jsonl"), limit=12), base_dir=Path())
    return [TextItem(d.id, d) for d in documents]


@pytest.fixture(scope="module")
def pairs() -> list[ChoiceItem]:
    return [
        ChoiceItem("one", "the big cask is", (" red", " blue", " green"), 0),
        ChoiceItem("two", "the old hat is", (" red", " blue and the cold hat is blue"), 1),
        ChoiceItem("bare", "", ("the hat is blue", "blue hat the is"), 0),
    ]


def reference(model: Any, ids: list[int], first: int) -> float:
    """Log-likelihood of ids[first:] given what precedes, by the plainest means."""
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
    return sum(float(logprobs[t - 1, ids[t]]) for t in range(first, len(ids)))


def score_text(model: Any, tokenizer: Any, items: list[TextItem], **settings: Any) -> Any:
    return score_documents(model, tokenizer, [item.document for item in items], **settings)


# windows


def test_windows_score_every_token_once_with_context() -> None:
    assert list(windows(5, 10)) == [(0, 1, 5)]
    assert list(windows(6, 2)) == [(0, 1, 3), (2, 3, 5), (3, 5, 6)]
    for tokens in range(2, 40):
        for window in range(1, 12):
            cut = list(windows(tokens, window))
            assert [p for _, first, end in cut for p in range(first, end)] == list(range(1, tokens))
            assert all(begin < first and end - 1 - begin <= window for begin, first, end in cut)
            assert all(end - 1 - begin == window for begin, _, end in cut[1:])  # later windows have a full context


# text


def test_text_equals_the_plainest_computation(model: Any, tokenizer: Any, texts: list[TextItem]) -> None:
    scores = score_text(model, tokenizer, texts, window_tokens=128, batch_tokens=512)
    for item, score in zip(texts, scores, strict=True):
        ids = tokenizer(item.text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert score.tokens == len(ids) - 1
        assert score.bytes == len(item.text.encode())
        assert score.nll == pytest.approx(-reference(model, ids, 1), abs=TOLERANCE)


def test_windowed_text_equals_windows_by_hand(model: Any, tokenizer: Any, texts: list[TextItem]) -> None:
    (score,) = score_text(model, tokenizer, texts[:1], window_tokens=16, batch_tokens=64)
    ids = tokenizer(texts[0].text).input_ids
    expected = sum(reference(model, ids[begin:end], first - begin) for begin, first, end in windows(len(ids), 16))
    assert score.tokens == len(ids) - 1
    assert score.nll == pytest.approx(-expected, abs=TOLERANCE)


@pytest.mark.parametrize("batch_tokens", [1, 100, 700, 100_000])
def test_text_does_not_depend_on_batch_or_company(
    model: Any, tokenizer: Any, texts: list[TextItem], batch_tokens: int
) -> None:
    expected = score_text(model, tokenizer, texts, window_tokens=40, batch_tokens=333)
    found = score_text(model, tokenizer, texts[::-1], window_tokens=40, batch_tokens=batch_tokens)[::-1]
    assert [s.tokens for s in found] == [s.tokens for s in expected]
    assert [s.nll for s in found] == pytest.approx([s.nll for s in expected], abs=TOLERANCE)


def test_the_window_never_exceeds_the_models_context(
    model: Any, tokenizer: Any, texts: list[TextItem], tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": "".join(item.text for item in texts)}])
    (document,) = read_documents(DataSource(path="x.jsonl"), base_dir=tmp_path)
    item = TextItem(document.id, document)
    wide, full, half = (
        score_text(model, tokenizer, [item], window_tokens=window, batch_tokens=512)[0] for window in (10_000, 128, 64)
    )
    assert full.tokens > 128
    assert wide == full
    assert half.tokens == full.tokens
    assert half.nll != full.nll


def test_only_completions_are_scored(
    model: Any, tokenizer: Any, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": "the big cask is", "completion": " red"}])
    (document,) = read_documents(DataSource(path="x.jsonl"), base_dir=tmp_path)
    (score,) = score_text(model, tokenizer, [TextItem(document.id, document)], window_tokens=64, batch_tokens=64)
    head, tail = tokenizer("the big cask is").input_ids, tokenizer(" red", add_special_tokens=False).input_ids
    assert (score.tokens, score.bytes) == (len(tail), 4)
    assert score.nll == pytest.approx(-reference(model, head + tail, len(head)), abs=TOLERANCE)


# choices


def test_choices_equal_the_plainest_computation(model: Any, tokenizer: Any, pairs: list[ChoiceItem]) -> None:
    for item, score in zip(pairs, score_choices(model, tokenizer, pairs, batch_tokens=512), strict=True):
        head = len(tokenizer(item.prompt).input_ids) if item.prompt else 1
        for choice, value, tokens in zip(item.choices, score.log_likelihoods, score.tokens, strict=True):
            ids = tokenizer(item.prompt + choice).input_ids
            assert tokens == len(ids) - head
            assert value == pytest.approx(reference(model, ids, head), abs=TOLERANCE)


@pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
def test_choices_do_not_depend_on_batch(model: Any, tokenizer: Any, pairs: list[ChoiceItem], batch_tokens: int) -> None:
    expected = score_choices(model, tokenizer, pairs, batch_tokens=77)
    found = score_choices(model, tokenizer, pairs[::-1], batch_tokens=batch_tokens)[::-1]
    for a, b in zip(found, expected, strict=True):
        assert a.log_likelihoods == pytest.approx(b.log_likelihoods, abs=TOLERANCE)


def test_a_boundary_inside_a_token_scores_the_same_text_for_all(model: Any, tokenizer: Any) -> None:
    # "the ca" + "sk" joins into other tokens than "the ca" + "p": all choices start from the last shared token
    item = ChoiceItem("x", "the ca", ("sk is red", "p is pink"), 0)
    (score,) = score_choices(model, tokenizer, [item], batch_tokens=512)
    wholes = [tokenizer(item.prompt + choice).input_ids for choice in item.choices]
    head = tokenizer(item.prompt).input_ids
    shared = 0
    while all(whole[shared] == head[shared] for whole in wholes) and shared < len(head) - 1:
        shared += 1
    if all(whole[shared] == head[shared] for whole in wholes):
        shared += 1
    assert score.log_likelihoods == pytest.approx([reference(model, whole, shared) for whole in wholes], abs=TOLERANCE)
    assert shared < len(head), "the example no longer merges across the boundary; choose another"


def test_queries_that_begin_others_share_their_pass(model: Any) -> None:
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    queries = [Query((0, 5, 6), (2,), (7,)), Query((0, 5), (1,), (9,)), Query((0, 5, 6), (0, 2), (5, 3))]
    alone = [log_likelihoods(model, [q], batch_tokens=64)[0] for q in queries]
    hook = model.model.layers[0].register_forward_hook(count)
    together = log_likelihoods(model, queries, batch_tokens=3)  # room for one row a pass
    hook.remove()
    assert together == pytest.approx(alone, abs=1e-5)
    assert forwards == 1 + 2  # one for the three queries, two for the look at the head


# what is not a plain Llama


def rewrapped(tokenizer: Any, processor: Any, **special: str) -> Any:
    """The same vocabulary with another post-processor and other special tokens."""
    import transformers
    from tokenizers import Tokenizer

    backend: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processor
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=backend, **special)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    ],
)
def test_other_architectures_equal_the_plainest_computation(
    tmp_path: Path, make_model: Callable[..., Path], texts: list[TextItem], family: str, config: dict[str, Any]
) -> None:
    path = make_model(tmp_path / family, family=family, **config)
    other, tokenizer = load_model(path), load_tokenizer(path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3.0)  # so that scaled logits are far from plain ones
    scores = score_text(other, tokenizer, texts[:4], window_tokens=128, batch_tokens=300)
    for item, score in zip(texts, scores, strict=False):
        assert score.nll == pytest.approx(-reference(other, tokenizer(item.text).input_ids, 1), rel=1e-5, abs=1e-3)


def test_a_tokenizer_without_bos_starts_from_eos(model: Any, tokenizer: Any, texts: list[TextItem]) -> None:
    plain = rewrapped(tokenizer, processors.ByteLevel(), eos_token="</s>")
    assert describe_prefix(plain) == {"text_prefix": "eos", "text_prefix_id": 1, "prompt_has_bos": False}
    assert describe_prefix(tokenizer) == {"text_prefix": "bos", "text_prefix_id": 0, "prompt_has_bos": True}
    (score,) = score_text(model, plain, texts[:1], window_tokens=128, batch_tokens=512)
    ids = [1, *plain(texts[0].text).input_ids]
    assert score.tokens == len(ids) - 1
    assert score.nll == pytest.approx(-reference(model, ids, 1), abs=TOLERANCE)
    nothing = rewrapped(tokenizer, processors.ByteLevel())
    assert prefix_id(nothing) is None
    (score,) = score_text(model, nothing, texts[:1], window_tokens=128, batch_tokens=512)
    assert score.tokens == len(ids) - 2  # the first token has nothing before it


def test_a_prompt_whose_only_token_merges_is_scored_from_the_prefix(model: Any, tokenizer: Any) -> None:
    plain = rewrapped(tokenizer, processors.ByteLevel(), eos_token="</s>")
    item = ChoiceItem("x", "m", ("e is red", "e is blue"), 0)
    wholes = [[1, *plain(item.prompt + choice).input_ids] for choice in item.choices]
    assert wholes[0][1] != plain("m").input_ids[0], "the example no longer merges; choose another"
    (score,) = score_choices(model, plain, [item], batch_tokens=512)
    assert score.tokens == tuple(len(whole) - 1 for whole in wholes)
    assert score.log_likelihoods == pytest.approx([reference(model, whole, 1) for whole in wholes], abs=TOLERANCE)


def test_an_eos_that_the_tokenizer_appends_is_no_part_of_a_prompt(tokenizer: Any) -> None:
    closing = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    fast = rewrapped(tokenizer, closing, bos_token="<s>", eos_token="</s>")
    assert fast("the hat").input_ids[-1] == 1
    assert prompt_ids(fast, "the hat") == tokenizer("the hat").input_ids


# refusals


def test_a_model_with_nan_is_refused_with_the_item(
    trained: Path, tokenizer: Any, texts: list[TextItem], pairs: list[ChoiceItem]
) -> None:
    broken: Any = load_model(trained)
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    with pytest.raises(CheckpointError, match=f"document {texts[0].id}.*nan"):
        score_text(broken, tokenizer, texts, window_tokens=64, batch_tokens=512)
    with pytest.raises(CheckpointError, match=r"item one.*nan"):
        score_choices(broken, tokenizer, pairs, batch_tokens=512)


def test_a_choice_beyond_the_context_is_refused(model: Any, tokenizer: Any) -> None:
    item = ChoiceItem("long", "the big cask is red " * 60, (" a", " b"), 0)
    with pytest.raises(DataError, match=r"item long: .* context of 128"):
        score_choices(model, tokenizer, [item], batch_tokens=512)
