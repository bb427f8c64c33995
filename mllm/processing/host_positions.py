"""Says where the tokens of expanded rows stand, for hosts whose positions have three dimensions.

Knows expanded rows, extents and counts; the rule is `mllm.hosts.positions`. Everything here happens on the host, before
the transfer.
"""

from collections.abc import Sequence

from torch import Tensor

from mllm.budget.tiling import map_of
from mllm.hosts.positions import PlacedImage, position_table, row_positions
from mllm.processing.batch import EncodedSample, Expanded


def position_inputs(
    rows: Sequence[EncodedSample], expanded: Expanded, placeholder_id: int, *, whole_maps: bool
) -> dict[str, Tensor]:
    """Make `prompt_positions` (B, P, 3) of expanded rows; nothing where no row has an image, and all count up alone.

    Args:
        rows: of the batch that was expanded, once for all its budgets.
        expanded: rows budget by budget.
        placeholder_id: of images.
        whole_maps: pooled tokens stand as those of an image that small, and so does the text behind them.
    """
    if not any(row.spans for row in rows):
        return {}
    ids, masks = expanded.inputs["input_ids"], expanded.inputs["attention_mask"].bool()
    tables = []
    for number, counts in enumerate(expanded.token_counts):
        images = []
        for span, count in zip(rows[number % len(rows)].spans, counts, strict=True):
            grid = span.grid_of(count)
            assert grid is not None
            images.append(PlacedImage(map_of(count.tokens, grid) if whole_maps else grid, count.tokens))
        tables.append(row_positions(ids[number][masks[number]].tolist(), placeholder_id, images))
    return {"prompt_positions": position_table(tables)}
