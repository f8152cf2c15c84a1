"""Who teaches what: documents to teachers by domain, and whether teacher and student speak of the same tokens."""

from collections.abc import Callable, Sequence
from typing import Any

from solera_core.data import Document
from solera_core.errors import CheckpointError, ConfigError, DataError
from solera_distill.config import TeacherConfig

__all__ = ["check_taught", "check_tokenizers", "check_vocabulary", "route_by_domain"]


def route_by_domain(teachers: Sequence[TeacherConfig]) -> Callable[[Document], int]:
    """The index of the teacher of a document: that of its domain, else the one without a domain.

    The returned function raises DataError for a document that nobody teaches.
    """
    by_domain = {t.domain: i for i, t in enumerate(teachers)}

    def route(document: Document) -> int:
        index = by_domain.get(document.domain, by_domain.get(None))
        if index is None:
            known = ", ".join(repr(t.domain) for t in teachers)
            what = f"domain {document.domain!r}" if document.domain is not None else "no domain"
            raise DataError(
                f"document {document.id} has {what}, which no teacher teaches (they teach {known}); "
                "add a teacher for it, or one without `domain`, or leave the text out"
            )
        return index

    return route


def check_taught(teachers: Sequence[TeacherConfig], routes: Sequence[int]) -> None:
    """Every teacher has text to teach.

    Raises:
        ConfigError: one has none: it would be loaded and never heard.
    """
    for i, teacher in enumerate(teachers):
        if i not in routes:
            what = f"domain {teacher.domain!r}" if teacher.domain is not None else "what the other teachers leave over"
            raise ConfigError(f"teachers: {teacher.model}: the data has no text of {what}")


def check_tokenizers(teacher: Any, student: Any, teacher_ref: str, student_ref: str) -> None:
    """The two vocabularies map the same tokens to the same ids.

    Raises:
        CheckpointError: naming the first token by id that differs.
    """
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs == ours:
        return
    by_id = [{i: t for t, i in v.items()} for v in (theirs, ours)]
    for i in sorted(set(by_id[0]) | set(by_id[1])):
        a, b = by_id[0].get(i), by_id[1].get(i)
        if a != b:
            raise CheckpointError(
                f"the tokenizers of teacher {teacher_ref} ({len(theirs)} tokens) and student {student_ref} "
                f"({len(ours)} tokens) differ: token {i} is {a!r} there and {b!r} here; a student learns from "
                "teachers of its own vocabulary"
            )


def check_vocabulary(tokenizer: Any, rows: int, where: str) -> None:
    """Every token has a row in the embedding.

    Raises:
        CheckpointError: the tokenizer knows ids beyond it.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise CheckpointError(
            f"{where}: token {token!r} has id {largest}, but the model's vocabulary has {rows} rows; "
            "the tokenizer belongs to another model"
        )
