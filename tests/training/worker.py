"""What one of several processes does: the toy runs of `test_distributed.py`. Started by a launcher, not by pytest.

python worker.py FOLDER SCENARIO [SCENARIO ...] [--deepspeed CONFIG | --fsdp2]

A scenario whose run folder holds a checkpoint is resumed from it.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from caption_fit import fit
from harness import make_trainer, run_settings
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from word_lessons import WORDS, teach

from mllm.config.model import LoraBankConfig, MomeConfig
from mllm.config.run import RunConfig, SamplerConfig
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.training.run_folder import newest_checkpoint
from mllm.utils.distributed import finish_launch, prepare_launch

import tiny  # isort: skip

# Rows 0..7 hold these; every process gets every second batch, so processes lack media at every step.
SKEWED = [("image",), ("audio",), (), ("video", "audio"), ("image",), ("image",), ("video",), ()]
EVEN: dict[str, Any] = {"media": ("audio", "video"), "kinds": [("audio", "video"), ("video",), ("audio",)], "rows": 9}
SCENARIOS: dict[str, dict[str, Any]] = {
    "even": {**EVEN, "batches": None, "micro_batches": 4},
    "resumed": {**EVEN, "batches": None, "micro_batches": 4},
    "skewed": {
        "media": ("image", "audio", "video"),
        "kinds": SKEWED,
        "rows": 8,
        "batches": [[row] for row in range(8)],
        "micro_batches": 2,
    },
}
# One budget at a time: processes then run different numbers of views, and DeepSpeed does not go with it.
LOW_SCENARIOS: dict[str, dict[str, Any]] = {"low": {**SCENARIOS["skewed"], "train": {"memory": "low"}}}
# All budgets learn from a frozen copy of what trains, which every process has for itself.
TAUGHT_SCENARIOS: dict[str, dict[str, Any]] = {
    "taught": {
        **SCENARIOS["skewed"],
        "sampler": SamplerConfig(mode="random", num_budgets=2, teacher="frozen"),
        "train": {"start_from": "the harness starts all runs alike"},
    }
}
# Rows that all processes but one lack the members of: each holds one task and one scale.
ADAPTER_SCENARIOS: dict[str, dict[str, Any]] = {
    name: {
        "media": ("audio", "video"),
        "kinds": [("audio",), ("video",)],
        "rows": 8,
        "batches": [[row] for row in range(8)],
        "micro_batches": 2,
        "adapter": adapter,
    }
    for name, adapter in {
        "st": LoraBankConfig(variant="st", rank=4, alpha=8),
        "mss": LoraBankConfig(variant="mss", rank=4, alpha=8, scales=["audio=/4", "audio=/8", "video=/2", "video=/5"]),
        "mome": MomeConfig(num_experts=5, top_k=2, bottleneck=4),
    }.items()
}
# The LLM itself learns, and at every step one process has an image and the other text alone.
WHOLE_SCENARIOS: dict[str, dict[str, Any]] = {
    "whole": {
        "media": ("image",),
        "kinds": [("image",), ()],
        "rows": 8,
        "batches": [[row] for row in range(8)],
        "micro_batches": 2,
        "adapter": None,
        "train": {"parts": ["compressors", "llm"], "learning_rate": 1e-4},
    }
}
# A projector whose tables are kept with what trains and do not train.
WORD_SCENARIOS: dict[str, dict[str, Any]] = {
    "hearing": {
        **EVEN,
        "batches": None,
        "micro_batches": 4,
        "blocks": {"audio": {"projector": WORDS}},
        "train": {"start_from": "the harness starts all runs alike"},
    }
}
ALL_SCENARIOS = {
    **SCENARIOS,
    **LOW_SCENARIOS,
    **TAUGHT_SCENARIOS,
    **ADAPTER_SCENARIOS,
    **WHOLE_SCENARIOS,
    **WORD_SCENARIOS,
}


def scenario_settings(name: str, folder: Path, num_processes: int, **train: Any) -> RunConfig:
    """Settings of a scenario; its micro-batches per step are shared by the processes."""
    scenario = ALL_SCENARIOS[name]
    train |= scenario.get("train", {})
    train["accumulation"] = scenario["micro_batches"] // num_processes
    model = tiny.settings(scenario["media"], **scenario.get("blocks", {}))
    model = replace(model, adapter=scenario.get("adapter", model.adapter))
    sampler = scenario.get("sampler", SamplerConfig(mode="random", num_budgets=2))
    return run_settings(folder / name, model, sampler=sampler, save_every=2, **train)


def run_scenario(name: str, settings: RunConfig, *, shards_llm: bool = False) -> Any:
    """Train a scenario; the trainer afterwards."""
    scenario = ALL_SCENARIOS[name]
    trainer = make_trainer(
        settings,
        kinds=scenario["kinds"],
        batches=scenario["batches"],
        rows=9 if scenario["batches"] is None else 8,
        shards_llm=shards_llm,
    )
    newest = newest_checkpoint(Path(settings.train.out))
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest.folder))
    return trainer


def frozen_counts(model: ElasticForConditionalGeneration) -> dict[str, list[int]]:
    """Frozen numbers of each parameter of the LLM's layers: those on this process, and all."""
    layers = model.model.language_model.layers
    frozen = {name: value for name, value in layers.named_parameters() if not value.requires_grad}
    here = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in frozen.items()}
    return {name: [here[name].numel(), value.numel()] for name, value in frozen.items()}


def fit_captions(folder: Path, rank: int, world: int) -> None:
    """Fit toy projectors to captions dealt out so that of two processes each lacks a medium; save the weights."""
    settings = tiny.settings(("image", "audio"), image={"projector": "linear"})
    model, _ = fit(settings, ["image", "audio"], batch_size=1, rank=rank, world=world)
    save_file(model.model.compressors.state_dict(), folder / f"captions-{rank}-of-{world}.safetensors")


def learn_words(folder: Path, rank: int, world: int) -> None:
    """Teach a toy projector words by captions dealt out over processes; save the weights."""
    model, _ = teach(num_steps=4, batch_size=20 // world, rank=rank, world=world)
    save_file(model.model.compressors.state_dict(), folder / f"words-{rank}-of-{world}.safetensors")


STARTS = {"captions": fit_captions, "words": learn_words}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("scenarios", nargs="+")
    parser.add_argument("--deepspeed")
    parser.add_argument("--fsdp2", action="store_true")
    arguments = parser.parse_args()
    prepare_launch(use_cpu=True, deepspeed=arguments.deepspeed is not None)
    for name in arguments.scenarios:
        if name in STARTS:
            STARTS[name](arguments.folder, PartialState().process_index, 2)
            continue
        settings = scenario_settings(name, arguments.folder, 2, deepspeed=arguments.deepspeed)
        trainer = run_scenario(name, settings, shards_llm=arguments.fsdp2)
        budgets = [str(one.budget) for step in range(50) for one in trainer.sampler(step)]
        (arguments.folder / f"{name}-draws-{trainer.args.process_index}.txt").write_text("\n".join(budgets))
        if arguments.fsdp2:
            counts = json.dumps(frozen_counts(trainer.elastic))
            (arguments.folder / f"{name}-frozen-{trainer.args.process_index}.json").write_text(counts)
    finish_launch(0)


if __name__ == "__main__":
    main()
