"""What is written as JSON is JSON, whatever the numbers."""

import json
import math

from mllm.utils.json_text import json_text


def test_numbers_that_are_not_finite_are_texts_and_all_else_is_itself() -> None:
    value = {"norm": math.inf, "losses": [0.1, -math.inf, (math.nan,)], "step": 3, "name": "größe", "none": None}
    text = json_text(value)
    assert "Infinity" not in text
    assert "NaN" not in text
    assert json.loads(text) == {
        "norm": "inf",
        "losses": [0.1, "-inf", ["nan"]],
        "step": 3,
        "name": "größe",
        "none": None,
    }
