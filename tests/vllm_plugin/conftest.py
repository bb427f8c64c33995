"""Where vLLM is not installed its tests are skipped, or fail if `REQUIRE_VLLM=1` says that they must run."""

import os
from importlib.util import find_spec

import pytest

HAS_VLLM = find_spec("vllm") is not None
NEEDS_VLLM = ("test_engine", "test_renderer", "test_tensor_parallel", "test_served_engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs vLLM."""
    if HAS_VLLM or os.environ.get("REQUIRE_VLLM") == "1":
        return
    skip = pytest.mark.skip(reason="needs vLLM, which holds other libraries back: make test-vllm")
    for item in items:
        if item.path.stem in NEEDS_VLLM:
            item.add_marker(skip)
