"""Reads the budget of a prompt from an engine's `mm_processor_kwargs`, and refuses what an engine cannot meet.

Knows the words of budgets. Does not know engines, media or models.
"""

from collections.abc import Mapping

from mllm.budget import NONE, Budget, Space

KEYS = ("budget", "max_soft_tokens")


def budget_of(options: Mapping[str, object], space: Space) -> Budget:
    """Read the budget of one prompt, which every medium of it is counted at.

    Args:
        options: `budget`, in our grammar or by medium, or `max_soft_tokens`, what images get; nothing asks for the
            largest trained budget.

    Raises:
        ValueError: other options, both of them, a budget that is none, one of a medium the model does not take, or a
            cap over several media; what to write instead is named.
    """
    if unknown := sorted(set(options) - set(KEYS)):
        raise ValueError(f"mm_processor_kwargs holds {unknown[0]!r}; allowed: {', '.join(KEYS)}")
    if len(options) > 1:
        raise ValueError("mm_processor_kwargs holds budget and max_soft_tokens; one of them says it")
    if "max_soft_tokens" in options:
        tokens = options["max_soft_tokens"]
        if type(tokens) is not int or tokens < 1:
            raise ValueError(f"max_soft_tokens is {tokens!r}; it must be a whole number above 0")
        budget = Budget.parse(f"image={tokens}")
    else:
        budget = Budget.of(options.get("budget", ""))  # pyright: ignore[reportArgumentType]
    if budget.total_tokens is not None:
        example = ",".join(f"{medium}={medium_space.trained[-1]}" for medium, medium_space in space.media.items())
        raise ValueError(
            f"budget {str(budget)!r}: vLLM counts and keeps the media of a prompt one by one, so nothing can be capped "
            f"over all of them; name each medium, e.g. {example!r}. `mllm serve --engine vllm` takes caps: it splits "
            "them before the engine is asked"
        )
    if left_out := [medium for medium, amount in budget.amounts.items() if amount == NONE]:
        raise ValueError(
            f"budget {str(budget)!r}: vLLM has a place for every medium of a prompt; send none of {left_out[0]} instead"
        )
    if several := [medium for medium, amount in budget.amounts.items() if amount.kind == "each"]:
        raise ValueError(
            f"budget {str(budget)!r}: vLLM counts every {several[0]} of a prompt alike; give one amount. "
            "`mllm serve --engine vllm` takes one for each, beside each in the request"
        )
    space.check(budget)
    return budget
