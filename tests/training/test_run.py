"""From a config and real files to a run folder that loads; and what stops a run before it starts."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
import yaml
from harness import log_rows
from safetensors.torch import load_file

from mllm.checkpoints.build import resolved
from mllm.checkpoints.load import TRAINABLES, load
from mllm.cli import main
from mllm.config.run import (
    DataConfig,
    FeatureConfig,
    RunConfig,
    SamplerConfig,
    TrainConfig,
    config_yaml,
    read_run_config,
)
from mllm.data.manifest import Media, Message, Sample, Text, read_manifest, write_manifest
from mllm.training.checkpoint import OPTIMIZER
from mllm.training.dry_run import dry_run
from mllm.training.optimization import split_moments
from mllm.training.pipeline.batches import RankBatches, RankSlots
from mllm.training.pipeline.token_scan import scan_tokens
from mllm.training.run import train
from mllm.training.run_folder import newest_checkpoint, run_lock


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of a tiny model and a manifest over real files, one of them broken and one too short for its rates."""
    folder = tmp_path_factory.mktemp("world")
    tiny.write_parts(folder / "parts")
    samples = []
    for seed in range(6):
        files = tiny.write_media(folder / "media", seed=seed, seconds=0.1 if seed == 5 else 0.4 + 0.08 * seed)
        kinds = [("image",), ("audio", "video"), ("audio",)][seed % 3] if seed < 5 else ("audio",)
        parts = (*(Media(kind, f"media/{files[kind]}") for kind in kinds), Text("what is it?"))  # type: ignore[arg-type]
        messages = (Message("user", parts), Message("assistant", (Text(f"answer {seed}"),)))
        samples.append(Sample(f"sample{seed}", messages, task="test", meta={} if seed % 2 else {"seconds": 0.5}))
    (folder / "media" / "broken.wav").write_bytes(b"RIFF but not much of it")
    broken = (Media("audio", "media/broken.wav"), Text("what?"))
    samples.append(Sample("broken", (Message("user", broken), Message("assistant", (Text("nothing"),))), task="test"))
    write_manifest(folder / "train.jsonl", samples)
    write_manifest(folder / "validation.jsonl", samples[:3])
    return folder


def settings_of(
    world: Path, output: Path, *, data: dict | None = None, audio: dict | None = None, **train
) -> RunConfig:
    parts = {name: str(world / "parts" / name) for name in ("llm", "image", "audio", "video")}
    model = tiny.settings_on(parts, audio=audio or {})
    train_values = {"max_steps": 4, "save_every": 2, "log_every": 2, "progress": False, "use_cpu": True, **train}
    data_values = {"tokens_per_batch": 512, "max_rows": 3, "num_workers": 0, "max_bad_fraction": 0.1, **(data or {})}
    return RunConfig(
        model=model,
        data=DataConfig(
            train=[str(world / "train.jsonl")], validation=[str(world / "validation.jsonl")], **data_values
        ),
        sampler=SamplerConfig(mode="sandwich"),
        train=TrainConfig(out=str(output), **train_values),
    )


def captions_of(world: Path) -> Path:
    """A manifest of one image or audio and a few words per row."""
    path = world / "captions.jsonl"
    rows = [
        ("image", "0.png", "red"),
        ("image", "3.png", "a circle"),
        ("audio", "2.wav", "the cat"),
        ("audio", "1.wav", "two"),
    ]
    content = [((Media(kind, f"media/{name}"), Text("describe.")), caption) for kind, name, caption in rows]  # type: ignore[arg-type]
    messages = [
        (Message("user", content_of_user), Message("assistant", (Text(caption),)))
        for content_of_user, caption in content
    ]
    write_manifest(path, [Sample(f"caption{i}", turns, task="caption") for i, turns in enumerate(messages)])
    return path


def test_projectors_start_at_what_captions_say_and_a_resumed_run_does_not_start_again(
    world: Path, tmp_path: Path
) -> None:
    data = {"captions": [str(captions_of(world))]}
    rates = {"learning_rate": 1e-9, "max_steps": 2, "save_every": 1}
    train(settings_of(world, tmp_path / "fitted", data=data, **rates))
    train(settings_of(world, tmp_path / "random", **rates))
    fitted, start = (load_file(tmp_path / name / TRAINABLES) for name in ("fitted", "random"))
    moved = {name for name, value in fitted.items() if not torch.allclose(value, start[name], atol=1e-5)}
    layers = ("image.projectors.0.2", "audio.projectors.0.2")
    assert moved == {f"model.compressors.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    (tmp_path / "fitted" / "checkpoint-00000002").rename(tmp_path / "whole")
    (tmp_path / "fitted" / TRAINABLES).unlink()
    captions_of(world).write_text("", encoding="utf-8")  # nothing is left to fit to
    train(settings_of(world, tmp_path / "fitted", data=data, **rates), resume="auto")
    resumed, whole = load_file(tmp_path / "fitted" / TRAINABLES), load_file(tmp_path / "whole" / TRAINABLES)
    assert all(value.equal(whole[name]) for name, value in resumed.items())


def test_words_are_learned_beside_projectors_that_are_fitted_and_a_resumed_run_keeps_them(
    world: Path, tmp_path: Path
) -> None:
    audio = {"projector": {"kind": "words", "num_words": 12, "stretch_frames": 2, "hidden_size": 8}}
    data = {"captions": [str(captions_of(world))]}
    rates = {"learning_rate": 1e-2, "max_steps": 2, "save_every": 1, "word_steps": 3}
    settings = settings_of(world, tmp_path / "run", data=data, audio=audio, **rates)
    assert dry_run(settings).num_rows > 0
    assert not (tmp_path / "run").exists()
    train(settings)
    trained = load_file(tmp_path / "run" / TRAINABLES)
    matrix = trained["model.compressors.audio.projectors.0.word_table.said.weight"]
    assert matrix.shape == (32, 13)
    model, processor = load(tmp_path / "run")
    table = model.get_input_embeddings().weight.detach()
    near = torch.nn.functional.cosine_similarity(matrix.T[1:, None], table[None], dim=-1).max(1)
    torch.testing.assert_close(near.values, torch.ones(12), rtol=1e-4, atol=0.0)
    heard = processor.tokenizer.convert_ids_to_tokens(near.indices.tolist())
    assert "Ġthe" in heard
    assert "Ġred" not in heard  # an image's
    captions_of(world).write_text("", encoding="utf-8")  # nothing is left to learn from
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000002")
    (tmp_path / "run" / TRAINABLES).unlink()
    train(settings_of(world, tmp_path / "run", data=data, audio=audio, **rates), resume="auto")
    resumed = load_file(tmp_path / "run" / TRAINABLES)
    assert all(value.equal(trained[name]) for name, value in resumed.items())


def test_task_weights_name_tasks_of_the_samples(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.task_weights names 'vsr'; the samples have: test"):
        train(settings_of(world, tmp_path, task_weights={"vsr": 1.5}))
    with pytest.raises(ValueError, match=r"train.task_weights.test is 0; it must be above 0"):
        settings_of(world, tmp_path, task_weights={"test": 0})


def test_a_weighted_task_moves_the_model_as_a_larger_loss_does(world: Path, tmp_path: Path) -> None:
    """The first step of AdamW does not depend on the scale of the loss, but its moments do."""
    rates = {"max_steps": 1, "save_every": 1, "max_grad_norm": 0.0}
    moments = []
    for name, weights in (("plain", {}), ("weighted", {"test": 3.0})):
        train(settings_of(world, tmp_path / name, task_weights=weights, **rates))
        moments.append(split_moments(load_file(tmp_path / name / "checkpoint-00000001" / OPTIMIZER)))
    plain, weighted = moments
    assert any(state["exp_avg"].abs().max() > 1e-6 for state in plain.values())
    for name, state in plain.items():
        torch.testing.assert_close(weighted[name]["exp_avg"], 3.0 * state["exp_avg"], rtol=1e-3, atol=1e-8)


def test_a_dry_run_finds_what_would_stop_the_run_at_its_captions_or_its_start(world: Path, tmp_path: Path) -> None:
    words = {"projector": {"kind": "words", "num_words": 999, "stretch_frames": 2, "hidden_size": 8}}
    data = {"captions": [str(captions_of(world))]}
    run = tmp_path / "run"
    assert dry_run(settings_of(world, run, data=data)).num_rows > 0  # projectors that are fitted
    with pytest.raises(ValueError, match=r"model.audio.projector.num_words is 999; the captions hold \d+ tokens"):
        dry_run(settings_of(world, run, data=data, audio=words))
    image = str(world / "parts" / "image")
    with pytest.raises(
        ValueError, match=r"train.word_decoder .*image is a clip_vision_model; allowed: a whole Whisper"
    ):
        dry_run(settings_of(world, run, data=data, audio=words, word_decoder=image))
    with pytest.raises(FileNotFoundError, match=r"train.start_from .*nowhere is no run"):
        dry_run(settings_of(world, run, start_from=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"sample 'sample1' of data.captions shows 2 media items; a caption has one"):
        dry_run(settings_of(world, run, data={"captions": [str(world / "validation.jsonl")]}))
    assert not run.exists()


def test_captions_need_projectors_that_train(world: Path, tmp_path: Path) -> None:
    data = {"captions": [str(captions_of(world))]}
    with pytest.raises(
        ValueError, match=r"data.captions fits projectors, but train.parts \['adapter'\] keeps them frozen"
    ):
        train(settings_of(world, tmp_path, data=data, parts=["adapter"]))


def test_a_run_from_files_to_a_folder_that_loads(world: Path, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path, gradient_checkpointing=True)
    assert train(settings) == tmp_path
    model, _ = load(tmp_path)
    final = load_file(tmp_path / "checkpoint-00000004" / TRAINABLES)
    saved = load_file(tmp_path / TRAINABLES)
    assert saved.keys() == final.keys()
    parameters = dict(model.named_parameters())
    assert all(
        torch.equal(value, final[name]) and torch.equal(value, parameters[name]) for name, value in saved.items()
    )
    written = read_run_config(yaml.safe_load((tmp_path / "settings.yaml").read_text()))
    assert written == dataclasses.replace(settings, model=resolved(settings.model))

    listed = [json.loads(line) for line in (tmp_path / "skipped-0.jsonl").read_text().splitlines()]
    assert {row["id"] for row in listed} == {"broken", "sample5"}
    assert {row["kind"] for row in listed} == {"unsupported", "unusable"}
    assert any("too short" in row["reason"] for row in listed)

    rows = log_rows(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]
    validated = rows[-2]
    assert "eval_loss/image=64,audio=/4,video=/2" in validated
    assert "eval_loss/image=1,audio=/8,video=/5" in validated
    assert list((tmp_path / "tensorboard").iterdir())
    with pytest.raises(ValueError, match="already holds checkpoint-00000004"):
        train(settings)
    shutil.copytree(tmp_path / "checkpoint-00000002", tmp_path / "checkpoint-00000001")  # a kill left one too many
    assert train(settings, resume="auto") == tmp_path  # complete already: nothing is trained, the folder is written
    assert load_file(tmp_path / TRAINABLES).keys() == saved.keys()
    assert sorted(path.name for path in tmp_path.glob("check*")) == ["checkpoint-00000002", "checkpoint-00000004"]


def test_in_half_precision_what_trains_and_its_moments_stay_in_single(world: Path, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path, max_steps=1, precision="bfloat16", save_every=None)
    config = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dtype="bfloat16"))
    train(config)
    for name in (TRAINABLES, OPTIMIZER):
        tensors = load_file(tmp_path / "checkpoint-00000001" / name)
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in tensors.values())
    assert math.isfinite(log_rows(tmp_path)[0]["loss"])


def test_what_stops_a_run_before_it_trains(world: Path, tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        train(settings_of(world, tmp_path))
    with pytest.raises(ValueError, match=r"data.tokens_per_batch is 40, but 2 samples are longer .* up to 7\d tokens"):
        train(settings_of(world, tmp_path, data={"tokens_per_batch": 40}))
    twice = settings_of(world, tmp_path)
    twice = dataclasses.replace(twice, data=dataclasses.replace(twice.data, train=twice.data.train * 2))
    with pytest.raises(ValueError, match="the id 'sample0' is used by two of the manifests"):
        train(twice)
    assert newest_checkpoint(tmp_path) is None


def test_a_token_scan_knows_the_tokens_of_every_sample_at_the_largest_budget(world: Path, tmp_path: Path) -> None:
    from mllm.budget import Budget
    from mllm.data.manifest import read_manifest

    processor = tiny.processor(tiny.settings(video={"encoder": {"crop_pixels": 32}}))
    samples = read_manifest(world / "train.jsonl", world)[:5]
    scan = scan_tokens(samples, processor, cache_file=tmp_path / "scan.json")
    for index in (1, 3):  # those whose lengths are read from the headers
        batch = processor.batch(samples[index : index + 1], [processor.load_media(samples[index])], for_training=True)
        inputs = processor.expand(batch, [[Budget()]], left_padding=False).inputs
        assert scan.max_tokens[index] == inputs["input_ids"].shape[1]
        assert scan.num_targets[index] == sum(label != -100 for label in batch.rows[0].labels)
    (tmp_path / "scan.json").write_text((tmp_path / "scan.json").read_text().replace("[", "[1000, ", 1))
    assert (
        scan_tokens(samples, processor, cache_file=tmp_path / "scan.json").max_tokens[0] == 1000
    )  # read, not made again
    assert scan_tokens(samples[:4], processor, cache_file=tmp_path / "scan.json").max_tokens == scan.max_tokens[:4]


def test_a_step_holds_the_same_batches_however_it_is_split() -> None:
    lengths = [5 + 3 * (index % 7) for index in range(50)]

    def steps(num_processes: int, accumulation: int) -> list[list[tuple]]:
        samples = [
            iter(RankBatches(lengths, max_tokens=64, slots=RankSlots(rank, num_processes, accumulation)))
            for rank in range(num_processes)
        ]
        batches_of_steps = [[next(batches) for _ in range(accumulation) for batches in samples] for _ in range(30)]
        return [[tuple(batch) for batch in batches] for batches in batches_of_steps]

    assert steps(1, 4) == steps(2, 2) == steps(4, 1)
    batches = RankBatches(lengths, max_tokens=64, slots=RankSlots(accumulation=4))
    assert batches.steps(1) < 30 <= batches.steps(20)
    first = [key.index for step in steps(1, 4)[: batches.steps(1)] for batch in step for key in batch]
    assert set(first) == set(range(50))


ALTERNATING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant') }}{% endif %}"
    "{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""As Gemma, Mistral and others insist."""


def with_template(world: Path, folder: Path) -> Path:
    """The tiny LLM with a chat template that takes no system turn."""
    shutil.copytree(world / "parts" / "llm", folder)
    (folder / "chat_template.jinja").write_text(ALTERNATING)
    return folder


def test_a_conversation_the_template_refuses_is_one_bad_sample(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = read_manifest(world / "train.jsonl", world)
    odd = dataclasses.replace(
        samples[0], id="odd", messages=(Message("system", (Text("Be kind."),)), *samples[0].messages)
    )
    write_manifest(world / "odd.jsonl", [*samples, odd])
    settings = settings_of(world, tmp_path / "run")
    model = dataclasses.replace(settings.model, llm=str(with_template(world, tmp_path / "llm")), chat_format="chat")
    data = dataclasses.replace(settings.data, train=[str(world / "odd.jsonl")])
    settings = dataclasses.replace(settings, model=model, data=data)
    train(settings)
    reason = "the chat template refuses the turns system, user, assistant: Conversation roles must alternate"
    assert caplog.text.count(f"sample 'odd' is skipped: sample 'odd': {reason}") == 1
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped-0.jsonl").read_text().splitlines()]
    assert {row["id"] for row in listed} == {"broken", "sample5", "odd"}
    assert all(reason in row["reason"] for row in listed if row["id"] == "odd")
    write_manifest(world / "all_odd.jsonl", [odd, dataclasses.replace(odd, id="too")])
    data = dataclasses.replace(settings.data, train=[str(world / "all_odd.jsonl")])
    with pytest.raises(ValueError, match=rf"sample 'odd': {reason}(?s:.*)2 of 2 samples are refused"):
        train(
            dataclasses.replace(settings, data=data, train=dataclasses.replace(settings.train, out=str(tmp_path / "b")))
        )


def test_data_are_looked_at_before_the_llm_is_built(world: Path, tmp_path: Path) -> None:
    """The LLM has a config and a tokenizer but no weights: whatever is wrong with the data is found without them."""
    shutil.copytree(world / "parts" / "llm", tmp_path / "llm", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = settings_of(world, tmp_path / "run")
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, llm=str(tmp_path / "llm")))
    with pytest.raises((OSError, ValueError), match=r"safetensors|weights|no file"):
        train(settings)  # good data: now the weights are missing
    good = (world / "train.jsonl").read_text().splitlines()
    soundfile.write(world / "silent.wav", np.zeros(16_000), 16_000)
    (world / "bad.jsonl").write_text("\n".join([good[0], "{", good[1], '{"id": "x"}', "[]"]))
    (world / "gone.jsonl").write_text("\n".join([*good, *(gone_row(number) for number in range(60))]))
    messages = (Message("user", (Media("image", "media/3.png"),)), Message("assistant", (Text("red"),)))
    write_manifest(world / "other.jsonl", [Sample("sample0", messages, task="caption")])
    bad, gone = ([str(world / f"{name}.jsonl")] for name in ("bad", "gone"))
    for changes, message in (
        ({"train": bad}, r"\.jsonl:2: not JSON(?s:.*)\n.*:4: messages: is missing(?s:.*)\n.*:5: a row must be"),
        ({"train": gone}, r"image media/gone0\.png: there is no such file(?s:.*)and 40 more\n.*60 of 67"),
        ({"validation": gone}, r"data\.validation: 60 of 67 samples lack a file; every one is needed"),
        ({"captions": gone}, r"data\.captions: 60 of 67 samples lack a file; every one is needed"),
        (
            {"captions": [str(world / "other.jsonl")], "features": FeatureConfig(folder=str(tmp_path / "kept"))},
            r"the id 'sample0' is one sample in data.train and another in data.captions",
        ),
        ({"noise": str(world / "silent.wav"), "snr_db": [0.0]}, r"data\.noise .*silent\.wav: the noise is silent"),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(settings, data=dataclasses.replace(settings.data, **changes)))


def gone_row(number: int) -> str:
    parts = [{"type": "image", "path": f"media/gone{number}.png"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
    return json.dumps({"id": f"gone{number}", "task": "test", "messages": messages})


def test_a_few_missing_files_are_told_at_the_start_and_left_out(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = (world / "train.jsonl").read_text().splitlines()
    (world / "few.jsonl").write_text("\n".join([*good, gone_row(0)]))
    settings = settings_of(world, tmp_path / "run")
    train(dataclasses.replace(settings, data=dataclasses.replace(settings.data, train=[str(world / "few.jsonl")])))
    assert "data.train: 1 of 8 samples lack a file and are left out" in caplog.text


def test_a_bad_manifest_is_told_line_by_line_on_the_terminal(world: Path, tmp_path: Path, capsys) -> None:
    (world / "bad.jsonl").write_text("{\n" * 25)
    settings = settings_of(world, tmp_path / "run")
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, train=[str(world / "bad.jsonl")]))
    (tmp_path / "run.yaml").write_text(config_yaml(settings))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    shown = capsys.readouterr().err.splitlines()
    lines = [line for line in shown if "not JSON" in line]
    assert len(lines) == 20
    assert lines[0].startswith("mllm: ")
    assert "bad.jsonl:20: not JSON" in lines[-1]
    assert shown[-1] == "and 5 more"
