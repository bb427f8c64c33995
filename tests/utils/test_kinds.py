"""Packages outside add kinds to what is open, each name once, and the command line finds those of plug-ins."""

from importlib.metadata import EntryPoint

import pytest

from mllm.evaluation.benchmark_table import benchmark_table
from mllm.evaluation.scorers.registry import BENCHMARKS, Benchmark, Column, register_benchmark
from mllm.evaluation.scoring import scorer_of
from mllm.utils import registry
from mllm.utils.registry import Registry, load_plugins


class Pool:
    """A kind of this package."""


class Mine:
    """A kind of another package."""


def test_a_kind_is_added_and_found_beside_the_others() -> None:
    kinds: Registry[type] = Registry("compressor", {"pool": Pool})
    kinds.register("mine", Mine)
    kinds.register("mine", Mine)
    assert dict(kinds) == {"pool": Pool, "mine": Mine}
    assert kinds.find("mine", key="model.image.compressor.kind") is Mine
    with pytest.raises(ValueError, match=r"^model\.image\.compressor\.kind is 'mien'; allowed: pool, mine$"):
        kinds.find("mien", key="model.image.compressor.kind")


@pytest.mark.parametrize(
    ("name", "message"), [("pool", r"'pool' is taken by .*Pool; choose"), ("", "name .* is empty")]
)
def test_a_name_is_given_once(name: str, message: str) -> None:
    kinds: Registry[type] = Registry("compressor", {"pool": Pool})
    with pytest.raises(ValueError, match=message):
        kinds.register(name, Mine)
    assert dict(kinds) == {"pool": Pool}


def test_plugins_are_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("mine", f"{__name__}:plugin", group)])
    monkeypatch.setattr(f"{__name__}.plugin", lambda: calls.append("mine"), raising=False)
    load_plugins.cache_clear()
    try:
        assert load_plugins() == load_plugins() == ("mine",)
        assert calls == ["mine"]
    finally:
        load_plugins.cache_clear()


def test_a_plugin_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("mine", "no_such_package:plugin", group)])
    load_plugins.cache_clear()
    with pytest.raises(ImportError, match=r"plug-in mine \(no_such_package:plugin\) cannot be loaded"):
        load_plugins()
    load_plugins.cache_clear()


def test_a_benchmark_of_another_package_is_scored_and_has_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BENCHMARKS, "_kinds", dict(BENCHMARKS))
    shouting = Benchmark("accuracy", (Column("Shouting"),), lambda line: float(line["hypothesis"].isupper()))
    register_benchmark("shouting", shouting)
    with pytest.raises(ValueError, match="benchmark 'gqa' is taken by"):
        register_benchmark("gqa", shouting)
    line = {"id": "a", "kind": None, "references": ["X"], "meta": {}}
    lines = [{**line, "hypothesis": "LOUD"}, {**line, "id": "b", "hypothesis": "soft"}]
    score = scorer_of("shouting").score(lines, 0)
    assert (score.metric, score.value) == ("accuracy", 0.5)
    row = {"set": "s", "task": "shouting", "kind": None, "snr_db": None, "budget": "image=1", "value": 0.5}
    table = benchmark_table([{**row, "soft_tokens": 1.0, "is_trained": True, "num_failed": 0}])
    assert table is not None
    assert table.titles[2:-1] == ["Shouting"]
