"""Cutting, order and grouping: nothing lost, nothing twice, everything a pure function."""

import numpy as np
import pytest

from solera_core.data import Encoded
from solera_core.errors import DataError
from solera_distill.batches import Corpus, Cursor, Order, Piece, build_corpus, cut, micro_batches

BOS = 0


def document(length: int, *, prompt: int = 1, bos: bool = True) -> Encoded:
    ids = ([BOS] if bos else [1]) + list(range(10, 10 + length - 1))
    return Encoded(tuple(ids), tuple(i >= prompt for i in range(length)))


def learned_targets(pieces: list[tuple[tuple[int, ...], tuple[bool, ...]]]) -> list[int]:
    return [ids[t + 1] for ids, learned in pieces for t in range(len(learned)) if learned[t]]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [2, 7, 8, 9, 10, 25, 64])
def test_every_target_is_learned_exactly_once(length: int, bos: bool) -> None:
    text = document(length, bos=bos)
    pieces = cut(text, 8, bos=BOS)
    assert learned_targets(pieces) == list(text.ids[1:])
    for i, (ids, learned) in enumerate(pieces):
        assert 1 <= len(ids) - 1 <= 8
        assert len(learned) == len(ids) - 1
        assert (ids[0] == BOS) == bos
        if bos and i:
            assert not learned[0]  # the token after the repeated BOS belongs to the piece before


def test_by_hand() -> None:
    assert cut(document(6), 3, bos=BOS) == [
        ((0, 10, 11, 12), (True, True, True)),
        ((0, 12, 13, 14), (False, True, True)),
    ]


def test_pieces_of_prompt_alone_are_left_out() -> None:
    pieces = cut(document(20, prompt=16), 4, bos=BOS)
    assert learned_targets(pieces) == [25, 26, 27, 28]
    assert all(any(learned) for _, learned in pieces)


def corpus(lengths: list[int], weights: tuple[float, ...] = (1.0,), routes: int = 1) -> Corpus:
    groups: list[list[tuple[Encoded, int]]] = [[] for _ in weights]
    for i, length in enumerate(lengths):
        groups[i % len(weights)].append((document(length), i % routes))
    return build_corpus(groups, weights, 1000, bos=BOS)


def test_nothing_to_learn_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing in them to learn"):
        build_corpus([[(document(1), 0), (document(9, prompt=9), 0)]], [1.0], 8, bos=BOS)


def test_cut_documents_are_counted() -> None:
    found = build_corpus([[(document(9), 0), (document(10), 0), (document(40), 0)]], [1.0], 8, bos=BOS)
    assert (found.documents, found.cut_documents) == (3, 2)


def test_the_order_is_a_function_of_seed_and_epoch_only() -> None:
    text = corpus(list(range(5, 45)))
    walked = Order(text, 7)
    for _ in range(3):
        walked.take(Cursor(), 500)
    np.testing.assert_array_equal(walked.epoch(2), Order(text, 7).epoch(2))
    assert sorted(walked.epoch(2)) == list(range(40))
    assert list(walked.epoch(0)) != list(walked.epoch(1))
    assert list(Order(text, 8).epoch(0)) != list(Order(text, 7).epoch(0))


def test_a_stream_taken_in_other_portions_is_the_same_stream() -> None:
    text = corpus(list(range(5, 45)))

    def walk(portion: int) -> list[int]:
        order, cursor, seen = Order(text, 3), Cursor(), list[int]()
        while len(seen) < 100:  # two and a half epochs
            pieces, cursor = order.take(cursor, portion)
            seen += [len(p.ids) for p in pieces]
        return seen[:100]

    assert walk(1) == walk(170) == walk(2500)


def test_take_gives_at_least_what_is_asked_and_no_piece_more() -> None:
    pieces, _ = Order(corpus([11] * 50), 0).take(Cursor(), 95)
    assert sum(p.tokens for p in pieces) == 100


def test_weights_are_how_often_a_source_is_seen() -> None:
    text = corpus([10] * 2000, weights=(2.0, 0.25))
    counts = np.bincount([text.pieces[i].group for i in Order(text, 0).epoch(0)])
    assert counts[0] == 2000
    assert 180 < counts[1] < 320


def test_micro_batches_hold_every_piece_once_within_the_limit_and_one_route_each() -> None:
    pieces = list(corpus([5, 30, 31, 9, 12, 30, 6, 6, 29, 2, 40, 7] * 3, routes=2).pieces)
    batches = micro_batches(pieces, 100)
    for batch in batches:
        assert batch.inputs.size <= 100
        rows = batch.inputs.reshape(-1)
        assert (batch.targets == rows[batch.positions] + 1).sum() >= len(batch.targets) - batch.inputs.shape[0]
    by_route = [sum(p.tokens for p in pieces if p.route == r) for r in (0, 1)]
    assert [sum(len(b.targets) for b in batches if b.route == r) for r in (0, 1)] == by_route
    one = micro_batches(pieces, 1)  # a piece longer than the limit still goes through, alone
    assert [b.inputs.shape[0] for b in one] == [1] * len(pieces)


def test_grouping_by_length_keeps_padding_small() -> None:
    random = np.random.default_rng(0)
    pieces = list(corpus([int(n) for n in random.integers(5, 130, 100)]).pieces)
    batches = micro_batches(pieces, 4096)
    real, padded = sum(p.tokens for p in pieces), sum(b.inputs.size for b in batches)
    assert padded < 1.15 * real


def test_collated_rows_read_as_the_pieces_do() -> None:
    piece = Piece(np.array([0, 5, 6, 7], np.int32), np.array([False, True, True]), 0, 0)
    short = Piece(np.array([0, 9], np.int32), np.array([True]), 0, 0)
    (batch,) = micro_batches([short, piece], 100)
    np.testing.assert_array_equal(batch.inputs, [[0, 5, 6], [0, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [1, 2, 3])
    np.testing.assert_array_equal(batch.targets, [6, 7, 9])
