"""What docs/python.md says about training runs as it stands there, in the order it stands there."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mllm
from mllm.checkpoints.build import resolved
from mllm.checkpoints.load import TRAINABLES
from mllm.training import read_config

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
SECTION = PAGE.split("## Training")[1].split("\n## ")[0]
# The page's own sizes take a minute; nothing else is changed.
SMALLER = {"num_train=200, num_validation=20, num_test=20": "num_train=12, num_validation=1, num_test=1", "100,": "2,"}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the blocks of the section leave, run in one namespace."""
    names: dict[str, Any] = {"folder": tmp_path_factory.mktemp("notebook")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(names["folder"])
        for block in re.findall(r"```python\n(.*?)```", SECTION, re.S):
            for long, short in SMALLER.items():
                block = block.replace(long, short)
            exec(compile(block, "docs/python.md", "exec"), names)
    return names


def test_a_run_and_its_pieces_train_the_same_model(names: dict[str, Any]) -> None:
    runs = [load_file(names["folder"] / "runs" / run / TRAINABLES) for run in ("notebook", "pieces")]
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert names["trainer"].state.global_step == 2
    assert (names["folder"] / "runs" / "notebook" / "settings.yaml").is_file()


def test_what_was_trained_answers(names: dict[str, Any]) -> None:
    image = next((names["folder"] / "corpus" / "images" / "test").iterdir())
    answerer = mllm.Answerer(names["model"].eval(), names["processor"])
    assert answerer.answer("what colour is the circle?", image=image, budget="image=4").tokens == {"image": 4}


def test_a_config_is_read_from_values_and_from_a_file(names: dict[str, Any]) -> None:
    written = names["folder"] / "runs" / "notebook" / "settings.yaml"
    values = {**names["config"], "train": {**names["config"]["train"], "out": "runs/notebook"}}
    read = read_config(values)
    assert read_config(written) == dataclasses.replace(read, model=resolved(read.model))
    (names["folder"] / "empty.yaml").touch()
    with pytest.raises(ValueError, match="holds no keys; a run config has the blocks model, data and train"):
        mllm.train(names["folder"] / "empty.yaml")
