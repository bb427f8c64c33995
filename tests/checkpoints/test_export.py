"""An export holds what a model that is merged in memory would save, bit for bit, and never has all of it in memory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_hosts
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, MixtralConfig, MixtralForCausalLM

import mllm
from mllm.adapters import merge_adapters, select_experts
from mllm.checkpoints import tensor_files
from mllm.checkpoints.build import build
from mllm.checkpoints.export import export
from mllm.checkpoints.load import load, save_run
from mllm.checkpoints.sources import WEIGHTS, weight_files
from mllm.config.model import LoraBankConfig, LoraConfig, ModelConfig
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.trainables import set_trainables
from mllm.utils.fail_points import InjectedError, arm

MEDIA = ("image", "audio")


def write_run(folder: Path, settings: ModelConfig, parts: tuple[str, ...] = ("compressors", "adapter")) -> Path:
    """A run whose trainables were moved away from where a seed puts them."""
    model, processor = build(settings)
    set_trainables(model, parts)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_run(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Frozen parts, and beside them an LLM of experts, of which transformers puts weights together when it loads."""
    folder = tmp_path_factory.mktemp("parts")
    sizes = tiny.llm_config().to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = MixtralConfig(
        **{key: sizes[key] for key in kept}, num_key_value_heads=2, num_local_experts=3, max_position_embeddings=512
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        MixtralForCausalLM(config).save_pretrained(folder / "experts")
    tiny.TOKENIZER.save_pretrained(folder / "experts")
    return {**tiny.write_parts(folder), "experts": str(folder / "experts")}


def settings_of(kind: str, parts: dict[str, str]) -> ModelConfig:
    settings = tiny.settings_on(parts, MEDIA)
    if kind == "a bank":
        return replace(settings, adapter=LoraBankConfig(variant="st", rank=4, alpha=8))
    if kind == "an LLM of experts":
        return replace(settings, llm=parts["experts"])
    if kind == "LoRA in an encoder":
        lora = {"rank": 4, "alpha": 8, "targets": ["q_proj"]}
        return tiny.settings_on(parts, MEDIA, image={"encoder": {"adapter": lora}})
    return replace(settings, adapter=LoraConfig(rank=4, alpha=8, targets=["q_proj", "down_proj"]))


def saved_in_memory(run: Path, folder: Path, dtype: str, *, task: str | None = None) -> dict[str, torch.Tensor]:
    """What a model that is loaded, merged and saved whole leaves on the disk."""
    model, processor = load(run, dtype=dtype, device="cpu")
    if model.config.host_config is None:
        task_id = None if task is None else processor.expert_names.tasks.index(task)
        select_experts(model.model.language_model, scale_id=None, task_id=task_id)
        merge_adapters(model)
    model.save_pretrained(folder)
    return load_file(folder / WEIGHTS)


def state_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert state[name].equal(tensor), name


CASES = [
    *(("a LoRA", dtype) for dtype in ("float32", "bfloat16", "float16")),
    *((kind, dtype) for kind in ("a bank", "LoRA in an encoder", "an LLM of experts") for dtype in ("float32", "bf16")),
]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_it_is_what_a_model_in_memory_saves(kind: str, dtype: str, parts: dict[str, str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", settings_of(kind, parts))
    task = "asr" if kind == "a bank" else None
    export(run, tmp_path / "out", dtype=dtype, task=task)
    assert_same(state_in(tmp_path / "out"), saved_in_memory(run, tmp_path / "whole", dtype, task=task))
    again, _ = mllm.load(tmp_path / "out", dtype=dtype)
    assert isinstance(again, ElasticForConditionalGeneration)
    export(tmp_path / "out", tmp_path / "copy", dtype=dtype)
    assert_same(state_in(tmp_path / "copy"), state_in(tmp_path / "out"))


@pytest.mark.parametrize("is_tied", [True, False])
def test_an_llm_that_trained_is_taken_from_the_run(is_tied: bool, tmp_path: Path) -> None:
    parts = tiny.write_parts(tmp_path / "parts", tie_word_embeddings=is_tied)
    settings = replace(tiny.settings_on(parts, ("image",)), adapter=None)
    run = write_run(tmp_path / "run", settings, ("compressors", "llm"))
    export(run, tmp_path / "out", dtype="bfloat16")
    assert_same(state_in(tmp_path / "out"), saved_in_memory(run, tmp_path / "whole", "bfloat16"))
    assert ("lm_head.weight" in state_in(tmp_path / "out")) is not is_tied


@pytest.mark.parametrize("kind", ["a LoRA", "an LLM of experts"])
def test_its_llm_alone_is_the_merged_one(kind: str, parts: dict[str, str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", settings_of(kind, parts))
    export(run, tmp_path / "llm", form="llm")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    model, _ = load(run, device="cpu", merge_adapter=True)
    assert_same(dict(llm.base_model.state_dict()), dict(model.model.language_model.state_dict()))
    assert llm.get_output_embeddings().weight.equal(model.lm_head.weight)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl_moe", "gemma3"])
def test_a_host_is_written_with_its_adapter(family: str, tmp_path: Path) -> None:
    tiny_hosts.require(family)
    host = tiny_hosts.write(family, tmp_path / "host")
    model, processor = tiny_hosts.adopted(host, family)
    set_trainables(model)
    save_run(model, processor, tmp_path / "run")
    for dtype in ("float32", "bfloat16"):
        export(tmp_path / "run", tmp_path / dtype, dtype=dtype)
        assert_same(state_in(tmp_path / dtype), saved_in_memory(tmp_path / "run", tmp_path / f"{dtype} whole", dtype))
        mllm.load(tmp_path / dtype, dtype=dtype)


def test_one_in_several_files_is_loaded_whole(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", settings_of("a LoRA", parts))
    export(run, tmp_path / "one")
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 50_000)
    export(run, tmp_path / "several")
    files = weight_files(tmp_path / "several")
    assert len(files) > 2
    held = [list(load_file(file).values()) for file in files]
    assert all(len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= 50_000 for tensors in held)
    assert_same(state_in(tmp_path / "several"), state_in(tmp_path / "one"))
    for name in ("config.json", "generation_config.json", "processor_config.json"):
        assert (tmp_path / "several" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    expected = mllm.load(tmp_path / "one")[0].state_dict()
    mllm.register()
    for model in (
        mllm.load(tmp_path / "several")[0],
        AutoModelForImageTextToText.from_pretrained(tmp_path / "several"),
    ):
        assert_same(dict(model.state_dict()), dict(expected))


def test_after_an_error_nothing_is_left(parts: dict[str, str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", settings_of("a LoRA", parts))
    arm("weights.file:raise")
    try:
        with pytest.raises(InjectedError, match=r"injected at weights\.file"):
            export(run, tmp_path / "out")
    finally:
        arm("")
    assert not (tmp_path / "out").exists()
    export(run, tmp_path / "out")


SCRIPT = """
import json, os, resource, sys
from transformers import CLIPVisionModel, LlamaForCausalLM
from mllm.checkpoints import tensor_files
from mllm.checkpoints.export import export
from mllm.checkpoints.load import load
tensor_files.SHARD_BYTES = int(sys.argv[1])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for task, options in json.loads(sys.argv[2]):
    if os.fork() == 0:
        before = peak()
        model = (load if task == "load" else export)(**options)
        os.write(1, (json.dumps([task, peak() - before]) + "\\n").encode())
        os._exit(0)
    os.wait()
"""


def run_apart(shard_bytes: int, *tasks: tuple[str, dict[str, Any]], fail_point: str = "") -> Any:
    """Do tasks, each in a process of its own; their MiB at the peak above what imports take are printed."""
    environment = {**os.environ, "MLLM_FAIL_POINT": fail_point, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SCRIPT, str(shard_bytes), json.dumps(tasks)]
    return subprocess.run(words, capture_output=True, text=True, check=True, env=environment)


@pytest.mark.slow
def test_one_that_was_killed_is_no_model(parts: dict[str, str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", settings_of("a LoRA", parts))
    options = {"folder": str(run), "out": str(tmp_path / "out")}
    run_apart(50_000, ("export", options), fail_point="weights.file:kill@2")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    with pytest.raises(FileNotFoundError, match="holds no model"):
        mllm.load(tmp_path / "out")
    mllm.register()
    with pytest.raises(ValueError, match=r"Unrecognized model in .*config\.json"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="is in use; name a new or an empty folder"):
        export(run, tmp_path / "out")


@pytest.mark.slow
def test_the_memory_it_takes_is_one_file_and_a_few_tensors(tmp_path: Path) -> None:
    """The LLM takes 600 MiB in its file; a whole model was 640 and 950 MiB in memory here, and is 1,250 as float32."""
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12}
    parts = tiny.write_parts(tmp_path / "parts", **sizes)
    run = str(write_run(tmp_path / "run", replace(settings_of("a LoRA", parts), audio=None)))
    said = run_apart(
        64 * 2**20,
        ("export", {"folder": run, "out": str(tmp_path / "float32")}),
        ("export", {"folder": run, "out": str(tmp_path / "bfloat16"), "dtype": "bfloat16"}),
        ("load", {"folder": run, "device": "cpu"}),
        ("load", {"folder": run, "device": "cpu", "dtype": "bfloat16"}),
    ).stdout
    exported, in_half, mapped, rounded = (json.loads(line)[1] for line in said.splitlines())
    assert len(weight_files(tmp_path / "float32")) > 8
    assert exported < 250
    assert in_half < 250
    assert mapped < 150, "weights that are not rounded stay in their file"
    assert rounded < 300 * 1.4, "and those that are rounded are in memory once"
