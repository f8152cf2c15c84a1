"""One task under one loaded model: its items' records. Imports torch when it is called."""

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from solera_eval.config import ChoiceTask, EvalConfig, GenerateTask, TextTask
from solera_eval.records import ItemRecord
from solera_eval.suite import ChoiceItem, GenerateItem, LoadedTask, TextItem

if TYPE_CHECKING:
    from solera_eval.score import ChoiceScore

__all__ = ["extract", "score_task", "settings_of"]

_VERSIONS = ("torch", "transformers", "tokenizers")


def settings_of(config: EvalConfig, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """What results say of how they were made; `tokenizer` is `describe_prefix`, of a route by specialist."""
    return {
        "batch_tokens": config.batch_tokens,
        "dtype": config.dtype,
        "tokenizer": tokenizer,
        "versions": {package: importlib.metadata.version(package) for package in _VERSIONS},
    }


def score_task(
    model: Any, tokenizer: Any, task: LoadedTask, batch_tokens: int, advance: Any
) -> tuple[list[ItemRecord], dict[str, Any]]:
    """The records of one task, and what is worth knowing about how they were made."""
    from solera_core.generate import generate
    from solera_core.likelihood import context_tokens, score_documents
    from solera_eval.score import score_choices

    settings = task.config
    if isinstance(settings, TextTask):
        texts = [item for item in task.items if isinstance(item, TextItem)]
        window = min(settings.window_tokens, context_tokens(model) or settings.window_tokens)
        documents = [item.document for item in texts]
        scores = score_documents(
            model, tokenizer, documents, window_tokens=window, batch_tokens=batch_tokens, advance=advance
        )
        records = [
            ItemRecord(
                task.name,
                item.id,
                task.domain(item),
                score.nll / score.tokens,
                {"nll": score.nll, "tokens": score.tokens, "bytes": score.bytes},
            )
            for item, score in zip(texts, scores, strict=True)
        ]
        return records, {"chance": model.config.get_text_config().vocab_size, "window_tokens": window}
    if isinstance(settings, ChoiceTask):
        questions = [item for item in task.items if isinstance(item, ChoiceItem)]
        found = score_choices(model, tokenizer, questions, batch_tokens=batch_tokens, advance=advance)
        records = [_choice_record(task, settings, item, score) for item, score in zip(questions, found, strict=True)]
        chance = sum(1 / len(item.choices) for item in questions) / len(questions)
        return records, {"chance": chance, "normalise": settings.normalise}
    prompts = [item for item in task.items if isinstance(item, GenerateItem)]
    outputs = generate(
        model,
        tokenizer,
        [item.prompt for item in prompts],
        max_new_tokens=settings.max_new_tokens,
        stop=settings.stop,
        batch_tokens=batch_tokens,
        advance=advance,
    )
    records = [_answer_record(task, settings, item, output) for item, output in zip(prompts, outputs, strict=True)]
    return records, {"chance": 0.0, "max_new_tokens": settings.max_new_tokens}


def _choice_record(task: LoadedTask, settings: ChoiceTask, item: ChoiceItem, score: "ChoiceScore") -> ItemRecord:
    sizes: Mapping[str, Sequence[int]] = {
        "none": [1] * len(item.choices),
        "bytes": [len(choice.encode()) for choice in item.choices],
        "tokens": score.tokens,
    }
    values = [ll / size for ll, size in zip(score.log_likelihoods, sizes[settings.normalise], strict=True)]
    prediction = max(range(len(values)), key=lambda c: (values[c], -c))  # the first of equals
    correct = int(prediction == item.answer)
    detail = {"correct": correct, "prediction": prediction, "logliks": list(score.log_likelihoods)}
    return ItemRecord(task.name, item.id, task.domain(item), float(correct), detail)


def _answer_record(task: LoadedTask, settings: GenerateTask, item: GenerateItem, output: str) -> ItemRecord:
    answer = extract(output, settings.extract)
    correct = int(answer is not None and answer.strip() in {accepted.strip() for accepted in item.answers})
    detail: dict[str, Any] = {"correct": correct, "output": output}
    if settings.extract is not None:
        detail["extracted"] = answer
    return ItemRecord(task.name, item.id, task.domain(item), float(correct), detail)


def extract(output: str, pattern: str | None) -> str | None:
    """The part of the output that counts: all of it, or the pattern's first match (its first group, if it has one)."""
    if pattern is None:
        return output
    match = re.search(pattern, output)
    if match is None:
        return None
    return match.group(1) if match.re.groups else match.group(0)
