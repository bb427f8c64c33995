"""Code that lies in a checkpoint never runs, whoever answers yes to transformers' question."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import tiny

from mllm.checkpoints.build import build
from mllm.checkpoints.load import save_run
from mllm.cli import main
from mllm.model.trainables import set_trainables

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import CLIPImageProcessor, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor
class Config(LlamaConfig):
    model_type = "foreign"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast): ...
class ImageProcessor(CLIPImageProcessor): ...
class FeatureExtractor(WhisperFeatureExtractor): ...
def generate(*args, **kwargs):
    raise RuntimeError("foreign")
"""
MAP = {
    "AutoConfig": "foreign.Config",
    "AutoModel": "foreign.Model",
    "AutoModelForCausalLM": "foreign.Model",
    "AutoTokenizer": ["foreign.Tokenizer", None],
    "AutoImageProcessor": "foreign.ImageProcessor",
    "AutoFeatureExtractor": "foreign.FeatureExtractor",
    "AutoProcessor": "foreign.Tokenizer",
}
KNOWN = {"auto_map": MAP}
"""Beside a type that transformers has: its own class is taken."""
UNKNOWN_CONFIG = {**KNOWN, "model_type": "foreign"}
# Where the code is named, the values that name it, and what is said: None where transformers' own class does as well,
# and nothing in particular where the refusal is transformers'.
PLACES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "known llm": ("llm/config.json", KNOWN, None),
    "unknown llm": ("llm/config.json", UNKNOWN_CONFIG, r"llm is a foreign, .* \(auto_map\); foreign code is never run"),
    "unknown encoder": ("audio/config.json", UNKNOWN_CONFIG, "audio is a foreign, .* foreign code is never run"),
    "known tokenizer": ("llm/tokenizer_config.json", KNOWN, None),
    "unknown tokenizer": ("llm/tokenizer_config.json", {**KNOWN, "tokenizer_class": "Tokenizer"}, ""),
    "known image processor": ("image/preprocessor_config.json", KNOWN, None),
    "unknown image processor": (
        "image/preprocessor_config.json",
        {**KNOWN, "image_processor_type": "ImageProcessor"},
        "transformers has no image processor 'ImageProcessor'",
    ),
    "unknown feature extractor": (
        "audio/preprocessor_config.json",
        {**KNOWN, "feature_extractor_type": "FeatureExtractor"},
        "",
    ),
}


def write_code(folder: Path, marker: Path) -> None:
    (folder / "foreign.py").write_text(CODE.format(marker=str(marker)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))


def change(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    file.with_name("manifest.json").unlink(missing_ok=True)  # who can change a file can leave out its digests


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    tiny.write_parts(folder / "parts")
    return folder / "parts"


class Yes:
    """A standard input that says yes to everything, and remembers whether it was asked."""

    def __init__(self) -> None:
        self.num_asked = 0

    def __call__(self, prompt: str = "") -> str:
        self.num_asked += 1
        return "yes"


@pytest.mark.parametrize("file_kind", PLACES)
def test_a_model_is_built_without_the_code_in_its_parts(
    file_kind: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, values, message = PLACES[file_kind]
    shutil.copytree(parts, tmp_path / "parts")
    folder = tmp_path / "parts" / Path(file).parent
    write_code(folder, tmp_path / "marker")
    change(tmp_path / "parts" / file, values)
    answers = Yes()
    monkeypatch.setattr("builtins.input", answers)
    settings = tiny.settings_on(
        {name: str(tmp_path / "parts" / name) for name in ("llm", "image", "audio")}, ("image", "audio")
    )
    if message is None:
        build(settings)
    else:
        with pytest.raises(ValueError, match=message or "contains custom code"):
            build(settings)
    assert not (tmp_path / "marker").exists()
    assert not answers.num_asked


RUN_FILES: dict[str, Callable[[Path], None]] = {
    "config of the llm": lambda folder: change(folder / "parts" / "llm" / "config.json", UNKNOWN_CONFIG),
    "config of an encoder": lambda folder: change(folder / "parts" / "audio" / "config.json", UNKNOWN_CONFIG),
    "config of the run": lambda folder: change(folder / "run" / "config.json", KNOWN),
    "tokenizer of the run": lambda folder: change(
        folder / "run" / "tokenizer_config.json", {**KNOWN, "tokenizer_class": "Tokenizer"}
    ),
}


@pytest.fixture(scope="module")
def answered(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bool, int, str]]:
    """Whether foreign code ran, the exit code, and what was said, by place: a user says yes to everything."""
    root = tmp_path_factory.mktemp("runs")
    answers = {}
    for file, change_one in RUN_FILES.items():
        folder = root / file
        shutil.copytree(parts, folder / "parts")
        sources = {name: str(folder / "parts" / name) for name in ("llm", "audio")}
        model, processor = build(tiny.settings_on(sources, ("audio",)))
        set_trainables(model)
        save_run(model, processor, folder / "run")
        for written in (folder / "run", folder / "parts" / "llm", folder / "parts" / "audio"):
            write_code(written, folder / "marker")
        change_one(folder)
        words = ["generate", "--model", str(folder / "run"), "--text", "hello", "--max_new_tokens", "1"]
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
            patch.setattr("sys.stdin", io.StringIO("yes\n" * 400))
            code = main([*words, "--use_cpu", "true"])
        answers[file] = (folder / "marker").exists(), code, said.getvalue()
    return answers


@pytest.mark.parametrize("file", RUN_FILES)
def test_yes_to_mllm_generate_runs_no_code(file: str, answered: dict[str, tuple[bool, int, str]]) -> None:
    has_run, code, said = answered[file]
    assert not has_run, said
    assert "Do you wish to run" not in said
    if file == "config of the run":
        assert code == 0, said
    else:
        assert code == 2, said
        refusal = "contains custom code" if "tokenizer" in file else "foreign code is never run"
        assert refusal in " ".join(said.split())
