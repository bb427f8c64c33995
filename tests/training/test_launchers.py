"""One run config, four ways to start it, one result: what `accelerate launch`, `torchrun` and `deepspeed` leave behind.

Real files, real parts on disk, the real command line; two CPU processes each.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from free_ports import free_port
from safetensors.torch import load_file, save_file

from mllm.checkpoints.load import TRAINABLES, load
from mllm.config.run import DataConfig, RunConfig, SamplerConfig, TrainConfig, config_yaml
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.inference.answerer import Answerer
from mllm.inference.decoding import Decoding
from mllm.model.trainables import NEW_TOKENS
from mllm.training.run import train
from mllm.training.run_folder import read_checkpoint

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": "torchrun --standalone --nproc_per_node 2 -m mllm",
    "accelerate": "accelerate launch --config_file configs/accelerate_ddp.yaml -m mllm",
    "deepspeed": "deepspeed --num_accelerators 2 --no_local_rank --module mllm",
    "fsdp2": "accelerate launch --config_file configs/accelerate_fsdp2.yaml -m mllm",
    "zero2": "accelerate launch --config_file configs/accelerate_zero2.yaml -m mllm",
    "zero3": "accelerate launch --config_file configs/accelerate_zero3.yaml -m mllm",
}
OVERRIDES = {"deepspeed": "--train.deepspeed configs/zero2.json"}
PORTS = {"accelerate launch": "--main_process_port", "deepspeed": "--master_port"}
"""How a launcher is told where its processes meet; otherwise all that run at a time would meet in one place."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run over three media; some steps hold a medium on one process only.

    The LLM has no rows for the marks around audio.
    """
    folder = tmp_path_factory.mktemp("launchers")
    parts = tiny.write_parts(folder / "parts")
    samples = []
    for seed in range(8):
        files = tiny.write_media(folder / "media", seed=seed, seconds=0.4 + 0.05 * seed)
        kinds = [("image",), ("audio", "video"), ("audio",), ("image",)][seed % 4]
        content = (*(Media(kind, f"media/{files[kind]}") for kind in kinds), Text("what is it?"))  # type: ignore[arg-type]
        messages = (Message("user", content), Message("assistant", (Text(f"answer {seed}"),)))
        samples.append(Sample(f"sample{seed}", messages, task="test"))
    write_manifest(folder / "train.jsonl", samples)
    return RunConfig(
        model=tiny.settings_on(parts, audio={"span": ["<sound>", "</sound>"]}),
        data=DataConfig(train=[str(folder / "train.jsonl")], tokens_per_batch=256, max_rows=1, num_workers=0),
        sampler=SamplerConfig(mode="random", num_budgets=2),
        train=TrainConfig(out=str(folder / "one"), max_steps=3, learning_rate=0.01, progress=False, use_cpu=True),
    )


@pytest.fixture(scope="module")
def one_process(settings: RunConfig) -> dict[str, torch.Tensor]:
    """What one process makes of twice the micro-batches per step."""
    config = dataclasses.replace(settings, train=dataclasses.replace(settings.train, accumulation=2))
    return load_file(train(config) / TRAINABLES)


def launch(settings: RunConfig, folder: Path, launcher: str) -> subprocess.CompletedProcess[str]:
    """Train in two processes by a command line; the run is written to `folder / "run"`."""
    (folder / "run.yaml").write_text(config_yaml(settings))
    start = LAUNCHERS[launcher]
    for name, key in PORTS.items():
        start = start.replace(name, f"{name} {key} {free_port()}", 1) if start.startswith(name) else start
    command = f"{start} train --config {folder / 'run.yaml'} --train.out {folder / 'run'}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        f"{command} {OVERRIDES.get(launcher, '')}".split(),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def answers(run: Path, media: Path) -> list[str]:
    """What a finished run says of an image at its smallest and at its largest budget."""
    answerer = Answerer(*load(run), Decoding(max_new_tokens=8))
    return [
        answerer.answer("what is it?", image=media / "0.png", budget=budget).text for budget in ("image=1", "image=64")
    ]


@pytest.mark.slow
def test_zero3_refuses_an_llm_that_is_not_whole(settings: RunConfig, tmp_path: Path) -> None:
    """There transformers reads names and shapes in another way, which knows of no shapes."""
    shutil.copytree(settings.model.llm, tmp_path / "llm")
    weights = tmp_path / "llm" / "model.safetensors"
    state = load_file(weights)
    state["model.norm.weight"] = torch.zeros(7)
    state["model.norm.scale"] = torch.zeros(7)
    save_file(state, weights, metadata={"format": "pt"})
    broken = dataclasses.replace(settings, model=dataclasses.replace(settings.model, llm=str(tmp_path / "llm")))
    done = launch(broken, tmp_path, "zero3")
    assert done.returncode != 0
    message = "unexpected model.norm.scale; model.norm.weight has shape (7,), the model has (32,)"
    assert message in " ".join(done.stderr.split()), done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_trains_what_one_process_trains(
    settings: RunConfig, one_process: dict[str, torch.Tensor], tmp_path: Path, launcher: str
) -> None:
    done = launch(settings, tmp_path, launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    saved = load_file(tmp_path / "run" / TRAINABLES)
    assert saved.keys() == one_process.keys()
    assert NEW_TOKENS in saved
    # ZeRO-3 serves runs of several budgets in one call, which adds in another order, and Adam divides a gradient near 0
    # by its own size: one weight of a thousand then differs by half a percent of one step, which is 0.01.
    atol = 1e-4 if launcher == "zero3" else 1e-5
    for name, value in one_process.items():
        torch.testing.assert_close(
            saved[name], value, rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert read_checkpoint(tmp_path / "run" / "checkpoint-00000003").facts["processes"] == 2
    assert ("are in 2 shards" in done.stderr) == (launcher == "fsdp2")
    one = Path(settings.train.out)
    assert answers(tmp_path / "run", one.parent / "media") == answers(one, one.parent / "media")
