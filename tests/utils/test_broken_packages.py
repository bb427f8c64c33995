"""Optional packages that are installed but broken are hidden from transformers, where that is called for."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from mllm.checkpoints.build import build
from mllm.checkpoints.load import save_run
from mllm.config.run import DataConfig, RunConfig, TrainConfig, config_yaml
from mllm.model.trainables import set_trainables

ROOT = Path(__file__).parents[2]
OPTIONAL = ("torchaudio", "torchvision", "decord", "deepspeed", "espeakng_loader", "tensorboard")
LIGHT = """
import sys
before = list(sys.meta_path)
import mllm, mllm.training.feature_cache.worker
assert sys.meta_path == before
assert not [name for name in ("torch", "transformers", "torchaudio") if name in sys.modules]
"""
USED = """
import sys
import mllm
mllm.load, mllm.Answerer, mllm.train, mllm.ElasticProcessor
mllm.register()
mllm.register()
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
assert type(AutoConfig.for_model("elastic")).__name__ == "ElasticConfig"
from pathlib import Path
import yaml
from mllm.config.run import read_run_config
from mllm.training.run import launch
from mllm.utils.distributed import prepare_launch
prepare_launch(use_cpu=True, deepspeed=False)
assert "deepspeed" not in sys.modules  # evaluations do not wait for its import
launch(read_run_config(yaml.safe_load(Path(sys.argv.pop(1)).read_text())))
import torch
from accelerate.utils import extract_model_from_parallel
extract_model_from_parallel(torch.nn.Linear(1, 1))  # as at the end of every training
from mllm.cli import main
sys.exit(main(["generate", *sys.argv[1:], "--max-new-tokens", "2"]))
"""


def run_beside_broken_packages(folder: Path, code: str, *words: str) -> str:
    """Run code in a process where the optional packages are broken; what it wrote to standard error."""
    for name in OPTIONAL:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise OSError('libc10_cuda.so: cannot open shared object file')")
    environment = {"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *words]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stderr


def test_importing_says_nothing_of_them(tmp_path: Path) -> None:
    assert "is left out" not in run_beside_broken_packages(tmp_path, LIGHT)


@pytest.mark.slow
def test_names_registration_and_an_answer_do_without_them(tmp_path: Path) -> None:
    settings = tiny.settings_on(tiny.write_parts(tmp_path / "parts"), ["audio"])
    model, processor = build(settings)
    set_trainables(model)
    save_run(model, processor, tmp_path / "run")
    audio = tmp_path / tiny.write_media(tmp_path)["audio"]
    (tmp_path / "broken").mkdir()
    train = TrainConfig(out=str(tmp_path / "trained"), max_steps=1, use_cpu=True)
    config = RunConfig(model=settings, data=DataConfig(train=["train.jsonl"]), train=train)
    (tmp_path / "run.yaml").write_text(config_yaml(config))
    words = [tmp_path / "run.yaml", "--model", tmp_path / "run", "--audio", audio]
    said = run_beside_broken_packages(tmp_path / "broken", USED, *map(str, words))
    for name in ("torchaudio", "deepspeed"):
        assert f"{name} is installed but broken and is left out" in said
    assert "soft tokens: audio 10" in said
