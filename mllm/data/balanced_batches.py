"""Plans the batches of all processes for one global step at a time, so that a step costs every process the same.

Knows batch groups of samples and how many rank slots (processes x accumulation) share a global step. Does not know
epochs, processes or what a length is made of.

A global step takes neighbours of an order by length, as many for every slot, and assigns them layer by layer: the
longest groups of the step go to different slots, and so on down. So the slots agree in rows, in their longest group
and, since the slot with least takes the most of a layer, in their sum; whichever budget the step then samples.
"""

from collections.abc import Sequence

import numpy as np

from mllm.data.batch_groups import BatchGroups

POOL_STEPS = 50
"""Groups are sorted by length within shuffled pools of about this many steps: little padding, yet well mixed."""


def fill_global_steps(
    groups: BatchGroups, order: np.ndarray, *, num_slots: int, max_tokens: int, max_rows: int | None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Cut an order of groups into global steps, as full as the limits allow.

    Groups of one kind share steps; only what is left of each kind at the end is mixed, sample by sample.

    Args:
        groups: each alone within the limits.
        order: `groups.covering`, shuffled; what is near each other in it comes near each other.
        max_tokens: most tokens of one slot, padding included.
        max_rows: most samples of one slot.

    Returns:
        The groups of every step by falling length, and those that no step could take: fewer than `num_slots`, and
        none unless every step holds one group per slot.
    """
    padded, kinds = groups.padded_tokens, groups.kinds
    most_rows = max(1, int(max_tokens / padded[order].mean()))
    pool_size = POOL_STEPS * num_slots * min(most_rows, max_rows or most_rows)
    limits = {"num_slots": num_slots, "max_tokens": max_tokens, "max_rows": max_rows}
    names = np.unique(kinds[order]).tolist()
    waiting = {kind: np.array([], dtype=np.int64) for kind in names}
    steps: list[np.ndarray] = []
    for start in range(0, len(order), pool_size):
        is_last = start + pool_size >= len(order)
        pool = order[start : start + pool_size]
        for kind in names:
            # What the last pool could not fill a step with goes first: it is the longest there was.
            part = np.concatenate([waiting[kind], pool[kinds[pool] == kind]])
            full, waiting[kind] = _cut(groups, part, **limits, is_last=is_last)
            steps += full
    left = groups.singles(np.concatenate(list(waiting.values())))
    full, rest = _cut(groups, left, **limits, is_last=True)
    steps += full
    return (steps, rest) if not len(rest) else _place_rest(groups, steps, rest, **limits)


def assign(groups: np.ndarray, costs: np.ndarray, num_slots: int) -> list[list[int]]:
    """Assign the groups of a global step to its rank slots.

    Args:
        groups: by falling length; every slot gets as many of them, or one more than others.
        costs: (K, G) what each costs at the K budgets at which slots should agree.
    """
    if num_slots == 1:
        return [groups.tolist()]
    # Budgets count alike, although tokens at the largest are many times those at the smallest.
    means = costs[:, groups].mean(axis=1, keepdims=True)
    loads = np.zeros(num_slots)
    slots: list[list[int]] = [[] for _ in range(num_slots)]
    for start in range(0, len(groups), num_slots):
        layer = groups[start : start + num_slots]
        layer_costs = (costs[:, layer] / means).sum(axis=0)
        dearest = np.argsort(-layer_costs, kind="stable")
        lightest = np.argsort(loads, kind="stable")[: len(layer)]  # of the last layer, which may be short of groups
        loads[lightest] += layer_costs[dearest]
        for slot, group in zip(lightest.tolist(), layer[dearest].tolist(), strict=True):
            slots[slot].append(group)
    return slots


def _cut(
    groups: BatchGroups, part: np.ndarray, *, num_slots: int, max_tokens: int, max_rows: int | None, is_last: bool
) -> tuple[list[np.ndarray], np.ndarray]:
    """Cut steps of what is near in length, from the shortest on; the longest, which do not fill one, come second.

    `part` holds groups of as many samples each.
    """
    if not len(part):
        return [], part
    max_groups = None if max_rows is None else max_rows // int(groups.rows[part[0]])
    padded = groups.padded_tokens[part]
    order = np.argsort(padded, kind="stable")
    part, padded = part[order], padded[order]
    steps: list[np.ndarray] = []
    start = 0
    while num_slots <= len(part) - start:
        left_per_slot = (len(part) - start) // num_slots
        per_slot = _most_per_slot(
            padded[start:], num_slots, max_tokens, min(max_groups or left_per_slot, left_per_slot)
        )
        if per_slot == left_per_slot and per_slot != max_groups and not is_last:
            break  # more of their length may come
        steps.append(part[start : start + per_slot * num_slots][::-1])
        start += per_slot * num_slots
    return steps, part[start:]


def _most_per_slot(lengths: np.ndarray, num_slots: int, max_tokens: int, most: int) -> int:
    """Count the groups that a slot takes, of lengths that never fall; at least one, since each alone fits a batch."""
    per_slot = np.arange(1, min(most, max_tokens // int(lengths[0])) + 1)
    # The longest group of a step pads all others of its slot, so the last of them decides.
    fits = per_slot * lengths[per_slot * num_slots - 1] <= max_tokens
    return int(per_slot[fits][-1])


def _place_rest(
    groups: BatchGroups,
    steps: Sequence[np.ndarray],
    rest: np.ndarray,
    *,
    num_slots: int,
    max_tokens: int,
    max_rows: int | None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Give a rest of fewer samples than slots to a step with room for one more per slot, or make two steps of one."""
    steps = list(steps)
    fullest_first = sorted(range(len(steps)), key=lambda number: -len(steps[number]))
    for number in fullest_first:
        step = steps[number]
        rows = len(step) // num_slots * int(groups.rows[step].max()) + 1
        longest = max(groups.longest_tokens[step].max(), groups.longest_tokens[rest].max())
        if rows <= (max_rows or rows) and rows * longest <= max_tokens:
            steps[number] = np.concatenate([step, rest])  # the last, so that no slot gets more than one of them
            return steps, rest[:0]
    if fullest_first and len(steps[fullest_first[0]]) > num_slots:
        both = np.concatenate([steps[fullest_first[0]], rest])
        both = both[np.argsort(-groups.longest_tokens[both], kind="stable")]
        steps[fullest_first[0]] = both[num_slots:]  # none of them is longer than what stood there in as many rows
        steps.append(both[:num_slots])
        return steps, rest[:0]
    return steps, rest
