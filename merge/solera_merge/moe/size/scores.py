"""Which experts stay, and which become one: formulas over a layer's usage.

E experts, K of them to be left, F neurons of an expert.
"""

from collections.abc import Callable, Sequence

import numpy as np

from solera_merge.moe.size.groups import Group
from solera_merge.moe.size.usage import LayerUsage

__all__ = [
    "average",
    "closest_groups",
    "contribution",
    "frequency",
    "greedy_groups",
    "linked_groups",
    "match_neurons",
    "most_salient",
    "reap",
    "similarity",
]

Array = np.ndarray


def reap(usage: LayerUsage) -> Array:
    """REAP (arXiv 2510.13999): S_e = mean, over the tokens routed to e, of g_e(x) * ||FFN_e(x)||_2; (E,).

    An expert that no token is routed to has 0. g_e is the weight that the model gives it: over the renormalised top k
    where the model renormalises, over the plain softmax where it does not.
    """
    found: Array = usage.contribution / np.maximum(usage.counts, 1)
    return found


def contribution(usage: LayerUsage) -> Array:
    """The same over all tokens, (E,): REAP times frequency, what the layer's output loses without the expert."""
    found: Array = usage.contribution / max(usage.tokens, 1)
    return found


def frequency(usage: LayerUsage) -> Array:
    """The share of the tokens that are routed to each expert, (E,)."""
    return usage.counts / max(usage.tokens, 1)


def most_salient(scores_E: Array, keep: int) -> list[int]:
    """The `keep` experts with the highest scores, in their old order; of equals the first."""
    return sorted(np.argsort(-scores_E, kind="stable")[:keep].tolist())


def similarity(usage: LayerUsage, *, outputs: bool) -> Array:
    """How alike experts are, (E, E) in [-1, 1]: the cosine of their router logits over the tokens; with `outputs` the
    mean of that and the cosine of their mean outputs.
    """
    found = _cosines(usage.logits)
    return (found + _cosines(usage.outputs @ usage.outputs.T)) / 2 if outputs else found


def closest_groups(scores_E: Array, similar_EE: Array, keep: int) -> list[list[int]]:
    """The experts with the highest scores lead; every other joins the leader that it is most like.

    The grouping of M-SMoE (arXiv 2310.01334), whose scores are frequencies, whose likeness is that of router logits.
    """
    leaders = most_salient(scores_E, keep)
    groups = [[leader] for leader in leaders]
    for e in range(len(scores_E)):
        if e not in leaders:
            groups[int(np.argmax(similar_EE[leaders, e]))].append(e)
    return groups


def greedy_groups(scores_E: Array, similar_EE: Array, keep: int, *, size: int) -> list[list[int]]:
    """The leaders, from the highest score on, take the experts that are most like them, until a group has `size`.

    The grouping of REAM (arXiv 2604.04356), whose scores are REAP's: a few large groups around the most salient
    experts, the other leaders stay as they are. Where `size` would leave experts over, it is as large as it must be.
    """
    leaders = most_salient(scores_E, keep)
    size = max(size, -(-len(scores_E) // keep))
    groups = {leader: [leader] for leader in leaders}
    left = [e for e in range(len(scores_E)) if e not in groups]
    for leader in sorted(leaders, key=lambda e: -scores_E[e]):
        nearest = sorted(left, key=lambda e: -similar_EE[leader, e])
        groups[leader] += sorted(nearest[: size - 1])
        left = [e for e in left if e not in groups[leader]]
    return [groups[leader] for leader in leaders]


def linked_groups(scores_E: Array, points_ED: Array, keep: int) -> list[list[int]]:
    """Average linkage of the experts' mean outputs by their Euclidean distance (HC-SMoE, arXiv 2410.08589).

    The member with the highest score leads; groups are in the order of their leaders.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    labels = cut_tree(linkage(points_ED, method="average"), n_clusters=keep)[:, 0]
    groups: list[list[int]] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label).tolist()
        leader = max(members, key=lambda e: (scores_E[e], -e))
        groups.append([leader, *(e for e in members if e != leader)])
    return sorted(groups)


def match_neurons(leader_FX: Array, member_FX: Array) -> tuple[int, ...]:
    """The order of the member's neurons in which they are most like the leader's, one to one.

    Maximises the sum of the cosines (linear assignment); X is whatever describes a neuron: its weights, or its
    activations on some tokens.
    """
    from scipy.optimize import linear_sum_assignment

    cosine_FF = _unit(leader_FX) @ _unit(member_FX).T
    _, order = linear_sum_assignment(cosine_FF, maximize=True)
    return tuple(int(j) for j in order)


def average(members: Sequence[int], counts_E: Array, match: Callable[[int, int], tuple[int, ...] | None]) -> Group:
    """The group whose members weigh as often as they are chosen; where none ever is, its leader alone.

    Args:
        members: the leader first.
        counts_E: tokens routed to every expert.
        match: of a leader and a member, the order of the member's neurons.
    """
    leader = members[0]
    used = [leader, *(e for e in members[1:] if counts_E[e] > 0)]  # one that is never chosen adds nothing
    total = float(counts_E[used].sum())
    weights = [float(counts_E[e]) / total for e in used] if total else [1.0]
    return Group(tuple(used), tuple(weights), (None, *(match(leader, e) for e in used[1:])))


def _cosines(gram_EE: Array) -> Array:
    length_E = np.sqrt(np.maximum(np.diag(gram_EE), 1e-300))
    found: Array = gram_EE / np.outer(length_E, length_E)
    return found


def _unit(x_FX: Array) -> Array:
    found: Array = x_FX / np.maximum(np.linalg.norm(x_FX, axis=1, keepdims=True), 1e-30)
    return found
