from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from solera_core.causal_lm import load_model, load_tokenizer
from solera_core.errors import DataError
from solera_core.generate import cut_at_stop, generate
from solera_eval.task import extract

PROMPTS = ["the big cask is", "the old hat is", "the tiny bird is", "hat", "the soft lamp is\nthe big cask is"]


@pytest.fixture(scope="module")
def model(trained: Path) -> Any:
    return load_model(trained)


@pytest.fixture(scope="module")
def tokenizer(trained: Path) -> Any:
    return load_tokenizer(trained)


def greedy(model: Any, tokenizer: Any, prompt: str, steps: int) -> str:
    """One token after the other, without cache or padding."""
    ids = tokenizer(prompt).input_ids
    start = len(ids)
    with torch.inference_mode():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_generation_is_greedy(model: Any, tokenizer: Any) -> None:
    found = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_tokens=4096)
    assert found == [greedy(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert found[0].startswith(" red\n")


@pytest.mark.parametrize("batch_tokens", [1, 40, 60])
def test_generation_does_not_depend_on_the_batch(model: Any, tokenizer: Any, batch_tokens: int) -> None:
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_tokens=4096)
    apart = generate(model, tokenizer, PROMPTS[::-1], max_new_tokens=8, batch_tokens=batch_tokens)[::-1]
    assert apart == together


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),  # learned positions
        ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    ],
)
def test_left_padding_moves_no_position(
    tmp_path: Path, make_model: Callable[..., Path], family: str, config: dict[str, Any]
) -> None:
    path = make_model(tmp_path / family, family=family, **config)
    other, tokenizer = load_model(path), load_tokenizer(path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(4.0)  # no near ties
    found = generate(other, tokenizer, PROMPTS, max_new_tokens=6, batch_tokens=4096)
    assert found == [greedy(other, tokenizer, prompt, 6) for prompt in PROMPTS]


def test_stop_strings_end_rows_and_the_batch(model: Any, tokenizer: Any) -> None:
    lengths: list[int] = []
    hook = model.register_forward_hook(lambda *_: lengths.append(1))
    found = generate(model, tokenizer, PROMPTS[:3], max_new_tokens=60, stop=["\n"], batch_tokens=4096)
    hook.remove()
    assert found == [" red", " blue", " green"]
    assert len(lengths) < 20


def test_the_checkpoints_own_sampling_settings_do_not_apply(model: Any, tokenizer: Any) -> None:
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_tokens=4096)
    own = model.generation_config
    try:
        own.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, min_new_tokens=7, suppress_tokens=[5, 6, 7])
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_tokens=4096) == expected
        assert model.generation_config is own
    finally:
        own.update(
            do_sample=False, temperature=None, repetition_penalty=None, min_new_tokens=None, suppress_tokens=None
        )


def test_every_eos_of_the_checkpoint_ends_a_row(model: Any, tokenizer: Any) -> None:
    (whole,) = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=6, batch_tokens=64)
    newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [1, newline]
    try:
        (cut,) = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=6, batch_tokens=64)
    finally:
        model.generation_config.eos_token_id = own
    assert cut == whole.split("\n")[0]


def test_a_prompt_without_room_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="context of 128"):
        generate(model, tokenizer, ["the hat is blue " * 60], max_new_tokens=8, batch_tokens=64)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [("4\n5", ["\n"], "4"), ("a b c", ["c", " b"], "a"), ("abc", [], "abc"), ("abc", ["x"], "abc"), ("abc", ["a"], "")],
)
def test_cut_at_the_earliest_stop(text: str, stop: list[str], expected: str) -> None:
    assert cut_at_stop(text, stop) == expected


@pytest.mark.parametrize(
    ("output", "pattern", "expected"),
    [
        ("so 12 or 13", None, "so 12 or 13"),
        ("so 12 or 13", r"\d+", "12"),
        ("#### 42", r"#### (-?\d+)", "42"),
        ("none", r"\d", None),
        ("a", r"(b)?a", None),
    ],
)
def test_extraction(output: str, pattern: str | None, expected: str | None) -> None:
    assert extract(output, pattern) == expected
