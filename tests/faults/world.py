"""A run of six steps on real files and real parts at toy size, and what must be the same however it was interrupted."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import tiny

from mllm.config.evaluation import EvaluationConfig
from mllm.config.run import DataConfig, FeatureConfig, RunConfig, SamplerConfig, TrainConfig
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.evaluation.run import evaluate
from mllm.training.feature_cache.building import make_features
from mllm.training.folder_check import check_folder
from mllm.training.run import train
from mllm.utils.run_paths import list_checkpoints

STEPS = 6
ANSWERS = ["place blue", "set red at two", "lay green"]


@dataclass(frozen=True)
class World:
    """Parts, media and a manifest in one folder."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "World":
        """Write eight clips of different lengths, and the parts of a model."""
        tiny.write_parts(folder / "parts")
        samples = []
        for seed in range(8):
            files = tiny.write_media(folder / "media", seed=seed, seconds=0.4 + 0.04 * seed)
            parts = (Media("audio", f"media/{files['audio']}"), Text("what?"))
            messages = (Message("user", parts), Message("assistant", (Text(ANSWERS[seed % 3]),)))
            samples.append(Sample(f"s{seed}", messages, "asr"))
        write_manifest(folder / "train.jsonl", samples)
        return cls(folder)

    def config(self, out: Path, *, workers: int = 0, features: Path | None = None, **train: object) -> RunConfig:
        """A run with noise that depends on the epoch, random budgets and a checkpoint every second step."""
        parts = {name: str(self.folder / "parts" / name) for name in ("llm", "image", "audio", "video")}
        noise = {"noise": str(self.folder / "media" / "0.wav"), "snr_db": [None, 0.0]}
        kept = None if features is None else FeatureConfig(folder=str(features), versions=2)
        values = {
            "max_steps": STEPS,
            "save_every": 2,
            "learning_rate": 0.01,
            "log_every": 1,
            "progress": False,
            **train,
        }
        return RunConfig(
            model=tiny.settings_on(parts, ["audio"]),
            data=DataConfig(
                train=[str(self.folder / "train.jsonl")], num_workers=workers, max_rows=2, features=kept, **noise
            ),
            sampler=SamplerConfig(mode="random", num_budgets=2),
            train=TrainConfig(out=str(out), use_cpu=True, tensorboard=False, **values),
        )

    def train(self, out: Path, *, workers: int = 0, **changes: object) -> None:
        """Train, or go on."""
        train(self.config(out, workers=workers, **changes), resume="auto")

    def evaluate(self, model: Path, out: Path) -> None:
        """Evaluate a run, or go on."""
        config = EvaluationConfig(
            model=str(model),
            manifest=[str(self.folder / "train.jsonl")],
            budgets="audio=/4;audio=/8",
            out=str(out),
            batch_size=1,
            max_new_tokens=4,
            use_cpu=True,
        )
        evaluate(config)

    def make_features(self, folder: Path) -> None:
        """Encode all samples, or go on."""
        make_features(self.config(folder / "run", features=folder / "features"))


def digests_of_run(run: Path) -> dict[str, str]:
    """Digests of what a finished run has learned: its model, and the weights and moments of its last checkpoint."""
    files = [run / "trainables.safetensors"]
    files += [run / f"checkpoint-{STEPS:08d}" / name for name in ("trainables.safetensors", "optimizer.safetensors")]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def problems_of_run(run: Path, expected: dict[str, str]) -> list[str]:
    """List what is wrong with a finished run: other weights, leftovers, damage, or steps that its log has not once."""
    problems = check_folder(run).problems
    if (found := digests_of_run(run)) != expected:
        problems.append(f"other weights: {[name for name in expected if found[name] != expected[name]]}")
    problems += [f"left over: {path.name}" for path in run.iterdir() if path.name.startswith(".")]
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    if steps != list(range(1, STEPS + 1)):
        problems.append(f"steps in the log: {steps}")
    if len(list_checkpoints(run)) != 2:
        problems.append(f"checkpoints: {[path.name for path in list_checkpoints(run)]}")
    return problems
