"""Where the time went is told truly: waits, encoders, the work of decoding, and what would help."""

import logging
from itertools import islice
from pathlib import Path

import harness
import pytest
import tiny
import torch
from torch import nn

from mllm.budget import Budget
from mllm.config.run import DataConfig
from mllm.data.dataset import ManifestDataset
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.training import throughput
from mllm.training.pipeline.batches import RankSlots
from mllm.training.pipeline.loaders import encode, loading, train_loader
from mllm.training.pipeline.token_scan import scan_tokens
from mllm.training.throughput import Pace, Stopwatch, bottleneck, mean_of


class Clock:
    """A clock that moves only when something takes its time, so that a busy machine changes nothing."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def perf_counter(self) -> float:
        return self.seconds

    def take(self, seconds: float) -> None:
        self.seconds += seconds


class Slow(nn.Linear):
    """An encoder that takes a while."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(2, 2)
        self.clock = clock

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.clock.take(0.02)
        return super().forward(values)


def test_a_pace_tells_waiting_from_encoding_from_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    encoder = Slow(clock)
    pace = Pace([encoder])

    def batches():
        for _ in range(2):
            clock.take(0.05)
            yield {"seconds": {"decode": 0.5, "collate": 0.25}}

    for _ in pace.batches(batches()):
        with pace.watch.measure("step"):
            encoder(torch.zeros(1, 2))
            clock.take(0.03)
        clock.take(0.01)
    rates = pace.take()
    assert rates["seconds/waiting"] == pytest.approx(0.1)
    assert rates["seconds/encoding"] == pytest.approx(0.04)
    assert rates["seconds/model"] == pytest.approx(0.06)
    assert rates["seconds/other"] == pytest.approx(0.02)
    assert (rates["worker_seconds/decode"], rates["worker_seconds/collate"]) == (1.0, 0.5)
    assert pace.take()["seconds/waiting"] == 0
    assert mean_of([rates, rates], 2)["seconds/waiting"] == pytest.approx(rates["seconds/waiting"] / 2)


def rows(waiting: float, encoding: float, model: float, **work: float) -> list[dict[str, float]]:
    seconds = {"seconds/waiting": waiting, "seconds/encoding": encoding, "seconds/model": model, "seconds/other": 0.0}
    return [{"steps": steps, **seconds, **{f"worker_seconds/{k}": v for k, v in work.items()}} for steps in (10, 30)]


@pytest.mark.parametrize(
    ("reports", "workers", "words"),
    [
        (rows(6, 1, 3, decode=8, transform=4), 2, "waiting 60 %, model 30 %, encoding 10 %, other 0 %"),
        (rows(6, 1, 3, decode=8, transform=4), 2, "is data, and decode is 67 % of its work; about 4 workers per"),
        (rows(6, 1, 3, decode=8, transform=4), 0, "by the training process itself (data.num_workers is 0)"),
        (rows(6, 1, 3, transform=4), 2, "transform is 100 % of its work; its 2 workers could keep up"),
        (rows(0.1, 6, 3, decode=2), 2, "the bottleneck is encoders (data.features encodes once)"),
        (rows(0.1, 1, 3, decode=2), 2, "the bottleneck is the LLM, forwards and back"),
    ],
)
def test_the_line_names_what_a_run_waited_for(reports: list, workers: int, words: str) -> None:
    assert words in bottleneck(reports, workers)
    assert bottleneck([], workers) == ""


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_tell_how_long_they_took(tmp_path: Path, num_workers: int) -> None:
    names = tiny.write_media(tmp_path, seconds=0.8)
    parts = (Media("audio", names["audio"]), Media("video", names["video"]), Text("what?"))
    messages = (Message("user", parts), Message("assistant", (Text("yes"),)))
    samples = [Sample(f"s{number}", messages, task="avsr", root=tmp_path) for number in range(4)]
    settings = DataConfig(train=["x"], num_workers=num_workers, max_rows=2)
    processor, watch = tiny.processor(tiny.settings()), Stopwatch()
    loader = train_loader(
        ManifestDataset(samples, load=loading(settings, processor, augmented=True, watch=watch), seed=0),
        scan_tokens(samples, processor),
        config=settings,
        encode=lambda samples, media: encode(
            samples, media, processor=processor, budgets=[Budget.parse("audio=/4,video=/2")], watch=watch
        ),
        run=tmp_path / "run",
        seed=0,
        slots=RankSlots(),
    )
    for batch in islice(loader, 4):
        assert batch["seconds"].keys() == {"decode", "transform", "collate"}
        assert min(batch["seconds"].values()) > 0
        assert sum(batch["seconds"].values()) < 5


def test_a_run_reports_its_parts_and_says_at_the_end_what_was_slow(tmp_path: Path, caplog) -> None:
    settings = harness.run_settings(tmp_path / "run", tiny.settings(), max_steps=4, log_every=2, use_cpu=True)
    with caplog.at_level(logging.INFO, logger="mllm"):
        harness.make_trainer(settings, kinds=harness.EVERYTHING).train()
    reports = [row for row in harness.log_rows(tmp_path / "run", timed=True) if "seconds/model" in row]
    assert [row["step"] for row in reports] == [2, 4]
    for row in reports:
        parts = [row[f"seconds/{name}"] for name in ("waiting", "encoding", "model", "other")]
        assert min(parts) >= 0
        assert row["seconds/encoding"] > 0
        assert row["seconds/model"] > 0
    assert "time of a step: " in caplog.text
    assert "the bottleneck is " in caplog.text
