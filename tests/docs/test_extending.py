"""The page on extending works as printed: its package keeps its contracts, trains, is evaluated and answers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
PARTS = ("gated_pool", "vit", "bottleneck", "counting")
MAX_LINES = 50
COUNTS = ["2", "3"]
# One process does everything, since most of the time of a short one goes into importing torch. It says what follows.
DRIVER = """
import shlex, sys
import pytest
from transformers import ViTConfig, ViTImageProcessor, ViTModel

def begin(what):
    sys.stdout.flush(), sys.stderr.flush()
    print(f"@@@ {what}", flush=True)

begin("contracts")
print("exit code", int(pytest.main(["-q", "-p", "no:cacheprovider", "tests"])))
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained("vit")
ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("vit")
from mllm.cli import main
for line in sys.argv[1:]:
    begin(line)
    print("exit code", main(shlex.split(line)[1:]))
"""
REFUSED = "mllm train --config mine.yaml --model.image.compressor.order haar"


def files_of_the_page() -> dict[str, str]:
    """Every block that begins with the name of a file, by that name."""
    blocks = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", PAGE, re.M | re.S)
    return dict(blocks)


def commands_of_the_page() -> list[str]:
    return re.findall(r"^mllm .+$", PAGE, re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package of the page, installed as a plug-in, and something to train on."""
    made = tmp_path_factory.mktemp("extending")
    for name, text in files_of_the_page().items():
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    toml = re.search(r"^```toml\n\[project\.entry-points\.\"(.+?)\"\]\n(.*?)^```$", PAGE, re.M | re.S)
    assert toml is not None
    installed = made / "my_parts-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[{toml[1]}]\n" + toml[2].replace('"', ""))
    shutil.copy(ROOT / "tests" / "fixtures" / "astronaut_face.jpg", made / "face.jpg")
    with (made / "counts.jsonl").open("w") as file:
        for number, count in enumerate(COUNTS):
            question = [{"type": "image", "path": "face.jpg"}, {"type": "text", "text": "how many?"}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": count}]
            file.write(json.dumps({"id": str(number), "task": "counting", "messages": messages}) + "\n")
    return made


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    """What each step of the driver wrote, by its name."""
    command = [sys.executable, "-c", DRIVER, *commands_of_the_page(), REFUSED]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return dict(part.split("\n", 1) for part in done.stdout.split("@@@ ")[1:])


def test_each_part_is_about_40_lines() -> None:
    files = files_of_the_page()
    for part in PARTS:
        code = [line for line in files[f"my_parts/{part}.py"].splitlines() if line.strip()]
        assert len(code) <= MAX_LINES, f"{part} has {len(code)} lines"


@pytest.mark.slow
def test_the_parts_keep_their_contracts(said: dict[str, str]) -> None:
    assert re.search(r"\b7 passed\b", said["contracts"]), said["contracts"]
    assert "exit code 0" in said["contracts"]


@pytest.mark.slow
def test_a_run_trains_evaluates_and_answers_with_the_parts_as_printed(said: dict[str, str], folder: Path) -> None:
    lines = commands_of_the_page()
    assert [line.split()[1] for line in lines] == ["train", "evaluate", "generate"]
    for line in lines:
        assert "exit code 0" in said[line], said[line]
    table = (folder / "runs" / "mine" / "evaluation" / "benchmarks.md").read_text()
    assert re.search(r"^\| budget .*\| Counting \|", table, re.M)
    assert re.search(r"^\| image=16 ", table, re.M)
    assert "soft tokens: image 9 (this budget was not trained)" in said[lines[2]]


@pytest.mark.slow
def test_a_key_of_another_kind_is_refused_by_name(said: dict[str, str]) -> None:
    assert "exit code 2" in said[REFUSED]
    assert "model.image.compressor.order" in said[REFUSED]
