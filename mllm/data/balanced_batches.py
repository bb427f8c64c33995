"""The batches of all processes for one step at a time, so that a step costs every process the same.

Knows units of samples and how many lanes (processes x accumulation) share a step. Does not know epochs, processes or
what a length is made of.

A round takes neighbours of an order by length, the same number for every lane, and deals them out layer by layer: the
longest units of the round go to different lanes, and so on down. So the lanes agree in rows, in their longest unit
and, since the lane with least takes the most of a layer, in their sum; whichever budget the step then draws.
"""

from collections.abc import Sequence

import numpy as np

from mllm.data.batch_units import Units

POOL_ROUNDS = 50
"""Units are sorted by length within shuffled pools of about this many rounds: little padding, yet well mixed."""


def fill_rounds(
    units: Units, order: np.ndarray, *, num_lanes: int, max_tokens: int, max_rows: int | None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Cut an order of units into rounds, as full as the limits allow.

    Units of one kind share rounds; only what is left of each at the end is mixed, sample by sample.

    Args:
        units: each alone within the limits.
        order: `units.dealt`, shuffled; what is near each other in it comes near each other.
        max_tokens: most tokens of one lane, padding included.
        max_rows: most samples of one lane.

    Returns:
        The units of every round by falling length, and those that no round could take: fewer than `num_lanes`, and
        none unless every round holds one unit per lane.
    """
    padded, kinds = units.padded, units.kinds
    most = max(1, int(max_tokens / padded[order].mean()))
    size = POOL_ROUNDS * num_lanes * min(most, max_rows or most)
    limits = {"num_lanes": num_lanes, "max_tokens": max_tokens, "max_rows": max_rows}
    names = np.unique(kinds[order]).tolist()
    waiting = {kind: np.array([], dtype=np.int64) for kind in names}
    rounds: list[np.ndarray] = []
    for start in range(0, len(order), size):
        is_last = start + size >= len(order)
        pool = order[start : start + size]
        for kind in names:
            part = np.concatenate([waiting[kind], pool[kinds[pool] == kind]])
            made, waiting[kind] = _cut(units, part, **limits, is_last=is_last)
            rounds += made
    left = units.alone(np.concatenate(list(waiting.values())))
    made, rest = _cut(units, left, **limits, is_last=True)
    rounds += made
    return (rounds, rest) if not len(rest) else _place(units, rounds, rest, **limits)


def deal(units: np.ndarray, costs: np.ndarray, num_lanes: int) -> list[list[int]]:
    """The units of a round by lane.

    Args:
        units: by falling length; every lane gets as many of them, or one more than others.
        costs: (K, U) what each costs at the K budgets at which lanes should agree.
    """
    if num_lanes == 1:
        return [units.tolist()]
    means = costs[:, units].mean(axis=1, keepdims=True)
    loads = np.zeros(num_lanes)
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    for start in range(0, len(units), num_lanes):
        layer = units[start : start + num_lanes]
        own = (costs[:, layer] / means).sum(axis=0)
        dearest = np.argsort(-own, kind="stable")
        lightest = np.argsort(loads, kind="stable")[: len(layer)]
        loads[lightest] += own[dearest]
        for lane, unit in zip(lightest.tolist(), layer[dearest].tolist(), strict=True):
            lanes[lane].append(unit)
    return lanes


def _cut(
    units: Units, part: np.ndarray, *, num_lanes: int, max_tokens: int, max_rows: int | None, is_last: bool
) -> tuple[list[np.ndarray], np.ndarray]:
    """Rounds of what is near in length, from the shortest on, and the longest, which do not fill one.

    `part` holds units of as many samples each.
    """
    if not len(part):
        return [], part
    max_units = None if max_rows is None else max_rows // int(units.rows[part[0]])
    padded = units.padded[part]
    order = np.argsort(padded, kind="stable")
    part, padded = part[order], padded[order]
    rounds: list[np.ndarray] = []
    start = 0
    while num_lanes <= len(part) - start:
        there = (len(part) - start) // num_lanes
        most = min(max_units or there, there)
        rows = _most_rows(padded[start:], num_lanes, max_tokens, most)
        if rows == there and rows != max_units and not is_last:
            break  # more of their length may come
        rounds.append(part[start : start + rows * num_lanes][::-1])
        start += rows * num_lanes
    return rounds, part[start:]


def _most_rows(lengths: np.ndarray, num_lanes: int, max_tokens: int, most: int) -> int:
    """Units per lane, of lengths that never fall; at least one, since no unit is longer than a batch."""
    rows = np.arange(1, min(most, max_tokens // int(lengths[0])) + 1)
    fits = rows * lengths[rows * num_lanes - 1] <= max_tokens
    return int(rows[fits][-1])


def _place(
    units: Units,
    rounds: Sequence[np.ndarray],
    rest: np.ndarray,
    *,
    num_lanes: int,
    max_tokens: int,
    max_rows: int | None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Give a rest of fewer samples than lanes to a round with room for one more per lane, or make two rounds of one."""
    rounds = list(rounds)
    by_rows = sorted(range(len(rounds)), key=lambda number: -len(rounds[number]))
    for number in by_rows:
        own = rounds[number]
        rows = len(own) // num_lanes * int(units.rows[own].max()) + 1
        longest = max(units.longest[own].max(), units.longest[rest].max())
        if rows <= (max_rows or rows) and rows * longest <= max_tokens:
            rounds[number] = np.concatenate([own, rest])  # the last, so that no lane gets more than one of them
            return rounds, rest[:0]
    if by_rows and len(rounds[by_rows[0]]) > num_lanes:
        both = np.concatenate([rounds[by_rows[0]], rest])
        both = both[np.argsort(-units.longest[both], kind="stable")]
        rounds[by_rows[0]] = both[num_lanes:]  # none of them is longer than what stood there in as many rows
        rounds.append(both[:num_lanes])
        return rounds, rest[:0]
    return rounds, rest
