"""Answers are kept while nothing they depend on has changed: each file and each setting is changed in turn."""

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny

from mllm.checkpoints.load import save_run
from mllm.checkpoints.model_files import files_of_model
from mllm.commands import lmms_eval
from mllm.config.data import ReaderConfig
from mllm.config.evaluation import EvaluationConfig
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.evaluation.answer_store import AnswerStore
from mllm.evaluation.fingerprint import BY_CONTENT, NEVER_IN_ANSWERS, fingerprint_of
from mllm.evaluation.run import read_sets
from mllm.media import MediaLimits
from mllm.model.trainables import set_trainables

CONFIG = tiny.settings(("image", "audio"))
CHANGES: dict[str, dict[str, Any]] = {
    "root": {"root": "."},
    "max_mismatch_seconds": {"max_mismatch_seconds": None},
    "num_beams": {"num_beams": 3},
    "length_penalty": {"length_penalty": 2.0, "num_beams": 3},
    "max_new_tokens": {"max_new_tokens": 65},
    "merge_adapter": {"merge_adapter": True},
    "constant_prompt": {"constant_prompt": True},
    "static_cache": {"static_cache": True},
    "dtype": {"dtype": "bfloat16"},
    "audio_padding": {"audio_padding": "none"},
    "untrained_padding": {"untrained_padding": True},
    "long_audio": {"long_audio": "chunk"},
    "window_seconds": {"long_audio": "chunk", "window_seconds": 20.0},
    "overlap_seconds": {"long_audio": "chunk", "overlap_seconds": 2.0},
    "limits": {"limits": MediaLimits(audio_seconds=7.0)},
    "video_backend": {"video_backend": "decord"},
    "budgets": {"budgets": "image=4"},
    "allow_untrained": {"allow_untrained": True},
    "out": {"out": "x"},
    "name": {"name": "x"},
    "limit": {"limit": 1},
    "vqav2_questions": {"vqav2_questions": "x.jsonl"},
    "allow_training_noise": {"allow_training_noise": True},
    "batch_size": {"batch_size": 1},
    "max_rows": {"max_rows": 1},
    "use_cpu": {"use_cpu": True},
    "verify": {"verify": False},
    "snr_db": {"snr_db": [0.0, 5.0]},
}
"""A change of each setting that is not a block or the name of a file, alone where it can stand alone."""
READER: dict[str, dict[str, Any]] = {
    "format": {"format": "llava"},
    "tasks": {"format": "clips", "tasks": ["asr"]},
    "text": {"format": "clips", "text": "words"},
    "prompts": {"format": "clips", "prompts": {"asr": "Say it."}},
    "transcripts": {"format": "clips", "transcripts": "t.csv"},
    "max_seconds": {"format": "lrs", "max_seconds": 3.0},
    "images": {"format": "gqa", "images": "x"},
    "annotations": {"format": "gqa", "annotations": "x"},
    "ocr_tokens": {"format": "textvqa", "ocr_tokens": False},
    "split": {"format": "mmmu", "split": "dev"},
    "images_first": {"format": "llava", "images_first": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a manifest, LLaVA's JSON and a noise."""
    root = tmp_path_factory.mktemp("fingerprint")
    model = tiny.model(CONFIG)
    set_trainables(model)
    save_run(model, tiny.processor(CONFIG), root / "run")
    (root / "run" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    messages = (Message("user", (Media("image", "a.png"), Text("what?"))), Message("assistant", (Text("red"),)))
    write_manifest(root / "m.jsonl", [Sample("a", messages, "vqa")])
    said = [{"from": "human", "value": "what?\n<image>"}, {"from": "gpt", "value": "red"}]
    (root / "l.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": said}]))
    soundfile.write(root / "noise.wav", np.zeros(16, np.float32), 16_000)
    return root


def settings_of(folder: Path, **changes: Any) -> EvaluationConfig:
    values = {"model": str(folder / "run"), "manifest": [str(folder / "m.jsonl")], "budgets": "image=1"}
    return EvaluationConfig(**{**values, **changes})


def fingerprint_at(folder: Path, **changes: Any) -> dict[str, Any]:
    config = settings_of(folder, **changes)
    return fingerprint_of(config, read_sets(config))


def test_every_setting_was_thought_about() -> None:
    """A new setting fails here until it stands in one of the lists: that it changes answers, or why it does not."""
    assert {field.name for field in fields(EvaluationConfig)} == CHANGES.keys() | {*BY_CONTENT, "reader"}
    assert {field.name for field in fields(ReaderConfig)} == READER.keys()
    assert NEVER_IN_ANSWERS.keys() < CHANGES.keys()
    assert all(len(why) > 10 for why in NEVER_IN_ANSWERS.values())


@pytest.mark.parametrize("key", CHANGES)
def test_each_setting_counts_unless_it_is_known_not_to(folder: Path, key: str) -> None:
    common = {"noise": str(folder / "noise.wav"), "snr_db": [0.0]} if key == "snr_db" else {}
    if key == "length_penalty":
        common = {"num_beams": 3}
    if key in ("window_seconds", "overlap_seconds"):
        common = {"long_audio": "chunk"}
    before, after = fingerprint_at(folder, **common), fingerprint_at(folder, **{**common, **CHANGES[key]})
    assert (before == after) == (key in NEVER_IN_ANSWERS)
    changed = CHANGES[key][key]
    wanted = asdict(changed) if isinstance(changed, MediaLimits) else changed
    assert after.get(key, wanted) == wanted


@pytest.mark.parametrize("key", READER)
def test_each_setting_of_the_reader_counts(folder: Path, key: str) -> None:
    changed = ReaderConfig(**READER[key])
    plain = ReaderConfig(**({} if key == "format" else {"format": READER[key]["format"]}))
    sets = {"m": [Sample("a", (), "vqa")]}
    with_plain, with_change = (fingerprint_of(settings_of(folder, reader=reader), sets) for reader in (plain, changed))
    assert with_plain != with_change


def test_what_a_reader_makes_of_a_file_counts(folder: Path) -> None:
    llava = [
        fingerprint_at(
            folder, manifest=[str(folder / "l.json")], reader=ReaderConfig(format="llava", images_first=first)
        )
        for first in (False, True)
    ]
    assert llava[0]["manifests"] != llava[1]["manifests"]


def test_each_file_of_the_model_counts_but_for_what_is_never_read(folder: Path) -> None:
    before = fingerprint_at(folder)
    names = [file.name for file in files_of_model(folder / "run")]
    assert {"config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"} <= set(names)
    assert "trainables.safetensors" in names
    assert list(before["model"]) == names
    for name in [*names, "something_new.json"]:
        file = folder / "run" / name
        kept = file.read_bytes() if file.exists() else None
        file.write_bytes((kept or b"") + b" ")
        assert fingerprint_at(folder) != before, name
        file.unlink() if kept is None else file.write_bytes(kept)
        assert fingerprint_at(folder) == before
    for name in ("settings.yaml", "log.jsonl", "demo.json", "README.md", ".hidden"):
        (folder / "run" / name).write_text("x")
    (folder / "run" / "evaluation").mkdir()
    assert fingerprint_at(folder) == before


def test_a_checkpoint_counts_with_the_processor_of_its_run(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    checkpoint = run / "checkpoint-00000002"
    checkpoint.mkdir()
    for name in ("config.json", "trainables.safetensors"):
        shutil.copy(run / name, checkpoint / name)
    (checkpoint / "optimizer.safetensors").write_bytes(b"moments")
    before = fingerprint_at(folder, model=str(run), checkpoint="2")
    assert (
        fingerprint_at(folder, model=str(checkpoint))
        == fingerprint_at(folder, model=str(run), checkpoint="auto")
        == before
    )
    read = ("run/processor_config.json", "run/tokenizer.json", "run/chat_template.jinja")
    read += (f"run/{checkpoint.name}/config.json", f"run/{checkpoint.name}/trainables.safetensors")
    for name in read:
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(kept + b" ")
        assert fingerprint_at(folder, model=str(run), checkpoint="2") != before, name
        (tmp_path / name).write_bytes(kept)
    for name in ("run/config.json", "run/trainables.safetensors", f"run/{checkpoint.name}/optimizer.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
        assert fingerprint_at(folder, model=str(run), checkpoint="2") == before, name


def test_a_checkpoint_has_results_of_its_own_beside_it(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 10):
        (run / f"checkpoint-{step:08d}").mkdir(parents=True)
        (run / f"checkpoint-{step:08d}" / "config.json").write_text("{}")
    named = settings_of(folder, model=str(run), checkpoint="2", name="beams")
    assert named.output_folder == run / "evaluation-checkpoint-00000002" / "beams"
    inside = settings_of(folder, model=str(run / "checkpoint-00000002"))
    assert inside.output_folder == run / "evaluation-checkpoint-00000002"
    assert settings_of(folder, model=str(run), checkpoint="2", out="x").output_folder == Path("x")
    of_lmms = lmms_eval.Settings(model=str(run / "checkpoint-00000002"), tasks=["gqa"], budgets="image=4")
    assert of_lmms.output_folder == run / "lmms_eval-checkpoint-00000002"
    assert lmms_eval.Settings(model=str(run), tasks=["gqa"], budgets="image=4").output_folder == run / "lmms_eval"
    newest = settings_of(folder, model=str(run), checkpoint="auto").pinned()
    (run / "checkpoint-00000020").mkdir()
    (run / "checkpoint-00000020" / "config.json").write_text("{}")
    assert newest.model_folder == run / "checkpoint-00000010"
    assert settings_of(folder, model=str(run), checkpoint="auto").model_folder == run / "checkpoint-00000020"


def test_a_part_from_elsewhere_counts_where_no_digest_tells_it(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["sources"] = {"llm": {"reference": "a", "sha256": "a" * 64}, "audio": {"reference": "b/c", "sha256": ""}}
    (run / "config.json").write_text(json.dumps(config))
    before = fingerprint_at(folder, model=str(run))
    assert (
        fingerprint_at(folder, model=str(run), sources={"llm": "/elsewhere"}) == before
    )  # loading compares its weights
    assert fingerprint_at(folder, model=str(run), sources={"audio": "b/d"}) != before


def test_manifests_and_noise_count_by_their_content(folder: Path, tmp_path: Path) -> None:
    noise = {"noise": str(folder / "noise.wav"), "snr_db": [0.0]}
    assert fingerprint_at(folder, seed=1) == fingerprint_at(folder)  # of the bootstrap alone
    assert fingerprint_at(folder, seed=1, **noise) != fingerprint_at(folder, **noise)
    copy = tmp_path / "noise.wav"
    copy.write_bytes((folder / "noise.wav").read_bytes())
    assert fingerprint_at(folder, noise=str(copy), snr_db=[0.0]) == fingerprint_at(folder, **noise)
    soundfile.write(copy, np.ones(16, np.float32), 16_000)
    assert fingerprint_at(folder, noise=str(copy), snr_db=[0.0]) != fingerprint_at(folder, **noise)
    (tmp_path / "m.jsonl").write_bytes((folder / "m.jsonl").read_bytes())
    assert fingerprint_at(folder, manifest=[str(tmp_path / "m.jsonl")]) == fingerprint_at(folder)
    (tmp_path / "m.jsonl").write_text((folder / "m.jsonl").read_text().replace("what?", "which?"))
    assert fingerprint_at(folder, manifest=[str(tmp_path / "m.jsonl")]) != fingerprint_at(folder)


def test_evaluations_of_one_model_lie_beside_each_other_by_name(folder: Path, tmp_path: Path) -> None:
    first, second = (settings_of(folder, model=str(tmp_path / "run"), name=name) for name in (None, "beams"))
    assert first.output_folder == tmp_path / "run" / "evaluation"
    assert second.output_folder == tmp_path / "run" / "evaluation" / "beams"
    digest = "a" * 64
    AnswerStore(first.output_folder).claim({"num_beams": 1, "model": {"config.json": digest}, "reader": {"text": "x"}})
    changed = {"num_beams": 3, "model": {"config.json": "b" * 64}, "reader": {"text": "x"}}
    with pytest.raises(
        ValueError,
        match=r"another evaluation \(model.config.json has changed; num_beams was 1 and is 3\); "
        r"give this one a name to keep it beside them \(--name NAME\), or choose another --out",
    ):
        AnswerStore(first.output_folder).claim(changed)
    AnswerStore(second.output_folder).claim(changed)
    AnswerStore(second.output_folder).claim(json.loads(json.dumps(changed)))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "answers", "submissions", "/x"])
def test_a_name_is_that_of_a_folder(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name must be that of a folder"):
        settings_of(folder, name=name)
    with pytest.raises(ValueError, match="one of the two says where results go"):
        settings_of(folder, name="x", out="y")
