"""The simulated load of ranks is what the batches of a run hold, and the command tells it."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from blocks import merged

from mllm.budget import Budget
from mllm.cli import main
from mllm.config.run import read_run_config
from mllm.data.manifest import Media, Message, Sample, Text, read_manifest, write_manifest
from mllm.training.pipeline.balance import simulate
from mllm.training.pipeline.batches import RankSlots
from mllm.training.pipeline.dataset import build_sampler
from mllm.training.pipeline.loaders import media_groups, rank_batches
from mllm.training.pipeline.token_scan import extents_of, scan_tokens
from mllm.training.step import sampled_views


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run config over tiny parts, and clips of stated lengths beside conversations without media."""
    folder = tmp_path_factory.mktemp("balance")
    parts = tiny.write_parts(folder / "parts")
    rng = np.random.default_rng(0)
    samples = []
    for number in range(300):
        media = [(Media("audio", "none.wav"),), (Media("audio", "none.wav"), Media("video", "none.mp4")), ()]
        chosen = media[number % 3 if number % 20 else 2]
        answer = " ".join(["word"] * int(rng.integers(1, 6)) * (1 if chosen else 5))
        messages = (Message("user", (*chosen, Text("what?"))), Message("assistant", (Text(answer),)))
        meta = {"seconds": float(np.clip(rng.lognormal(-1.5, 0.4), 0.2, 0.9))}
        samples.append(Sample(f"s{number}", messages, task="asr", meta=meta))
    write_manifest(folder / "train.jsonl", samples)
    medium = {"encoder": {"crop_pixels": 32}, "compressor": "pool", "budgets": ["/2", "/5"]}
    values = {
        "model": {
            "llm": parts["llm"],
            "chat_format": "plain",
            "audio": {"encoder": parts["audio"], "compressor": "pool", "budgets": ["/2", "/8"]},
            "video": merged({"encoder": parts["video"]}, medium),
        },
        "data": {"train": [str(folder / "train.jsonl")], "tokens_per_batch": 400, "max_rows": 16},
        "sampler": {"mode": "random", "num_budgets": 2},
        "train": {"out": str(folder / "run"), "epochs": 1, "accumulation": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def test_the_simulation_counts_what_the_views_of_a_run_hold(config: Path) -> None:
    from mllm.checkpoints.build import build_processor
    from mllm.processing.batch import EncodedSample, MediaSpan

    settings = read_run_config(yaml.safe_load(config.read_text()))
    processor = build_processor(settings.model)
    samples = read_manifest(config.parent / "train.jsonl", config.parent)
    sampler = build_sampler(settings, processor.space)
    budget = Budget.parse("audio=/8,video=/5")
    loads = simulate(samples, processor, sampler, config=settings, num_ranks=2, epochs=1, budgets=[budget])
    scan = scan_tokens(samples, processor)
    for rank in range(2):
        batches = iter(rank_batches(samples, scan, config=settings.data, seed=0, slots=RankSlots(rank, 2, 2)))
        for step in range(3):
            drawn = fixed = 0
            for key in [*next(batches), *next(batches)]:
                prompt = processor.chat(samples[key.index].messages)
                runs = tuple(MediaSpan(extent, 0) for extent in extents_of(samples[key.index], processor))
                row = EncodedSample("x", prompt.ids, prompt.labels, runs)
                for view in sampled_views([row], sampler, step):
                    costs = row.token_counts(view.budget, processor.space)
                    drawn += len(row.ids) - len(runs) + sum(cost.tokens for cost in costs)
                fixed += (
                    len(row.ids) - len(runs) + sum(cost.tokens for cost in row.token_counts(budget, processor.space))
                )
            assert loads["as sampled"].tokens[step][rank] == drawn
            assert loads[str(budget)].tokens[step][rank] == fixed
    facts = loads["as sampled"].facts()
    assert 1 <= facts["imbalance"] <= facts["worst"]  # type: ignore[operator]
    assert sum(scan.min_tokens) < sum(scan.max_tokens)
    assert len(set(media_groups(samples))) == 3


def test_the_command_shows_every_budget_and_grouping_evens_them_out(config: Path, tmp_path: Path, capsys) -> None:
    words = ["data", "balance", "--config", str(config), "--ranks", "4", "--tokens-per-batch", "800"]
    facts = {}
    for grouped in ("false", "true"):
        kept = tmp_path / f"{grouped}.json"
        assert main([*words, "--data.group_by_media", grouped, "--json", str(kept)]) == 0
        assert "audio=/8,video=/5" in capsys.readouterr().out
        facts[grouped] = json.loads(kept.read_text())
        assert facts[grouped].keys() == {"steps", "as sampled", "audio=/2,video=/2", "audio=/8,video=/5"}
        assert sum(facts[grouped]["as sampled"]["tokens_per_rank"]) > 0
    smallest = {key: of_budget["audio=/8,video=/5"]["imbalance"] for key, of_budget in facts.items()}
    assert smallest["true"] <= 1.05
    assert main([*words, str(config.parent / "train.jsonl"), "--budgets", "audio=/2"]) == 0
    assert "audio=/2 " in capsys.readouterr().out
    assert main([*words, "--ranks", "0"]) == 2
    assert "ranks is 0; it must be at least 1" in capsys.readouterr().err
    assert main(["data", "balance", "--config", str(config), "--tokens_per_batch", "20"]) == 2
    assert "data.tokens_per_batch is 20, but" in capsys.readouterr().err
