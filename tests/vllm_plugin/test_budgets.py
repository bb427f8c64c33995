"""Budgets are read from the options of an engine's prompts as everywhere, and what an engine cannot meet is refused."""

from typing import Any

import pytest
import tiny

from mllm.budget import Budget
from mllm.config.space import space_of
from mllm.vllm_plugin.budgets import budget_of

SPACE = space_of(tiny.settings().media)


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({}, ""),
        ({"budget": "audio=/4,image=16"}, "image=16,audio=/4"),
        ({"budget": {"image": 16, "video": "/2"}}, "image=16,video=/2"),
        ({"max_soft_tokens": 16}, "image=16"),
    ],
)
def test_the_forms_of_a_budget(options: dict[str, Any], budget: str) -> None:
    assert budget_of(options, SPACE) == Budget.parse(budget)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "total<=10"}, r"name each medium, e\.g\. 'image=1,audio=/8,video=/5'\. `mllm serve --engine vllm`"),
        ({"budget": "image=16,total<=30"}, "nothing can be capped over all of them"),
        ({"budget": "tiles<=2"}, "this model does not cut images into tiles"),
        ({"budget": 16}, "budget"),
        ({"budget": "image=16", "max_soft_tokens": 16}, "one of them says it"),
        ({"max_soft_tokens": "16"}, "max_soft_tokens is '16'; it must be a whole number above 0"),
        ({"max_soft_tokens": True}, "max_soft_tokens is True"),
        ({"budget": "image=64:16"}, "vLLM counts every image of a prompt alike; give one amount"),
        ({"num_crops": 4}, "holds 'num_crops'; allowed: budget, max_soft_tokens"),
    ],
)
def test_what_cannot_be_met_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budget_of(options, SPACE)
