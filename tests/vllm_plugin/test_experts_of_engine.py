"""Experts per scale are plain LoRA folders named by their budget, and an engine is given the one of each prompt."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_runs import LLM_SIZES, MAX_NEW_TOKENS, answerer_of, engine, expected_ids, needs_vllm, samples_of
from peft import PeftConfig
from safetensors.torch import load_file
from toy_server import write_run

from mllm.checkpoints.expert_folders import ExpertFolders, read_experts
from mllm.checkpoints.export import export
from mllm.checkpoints.load import load
from mllm.checkpoints.peft_folders import ELASTIC_PREFIX, PEFT_PREFIX
from mllm.config.model import LoraBankConfig
from mllm.data.manifest import Message, Sample, Text
from mllm.vllm_plugin.engine_options import EngineOptions
from mllm.vllm_plugin.prompts import engine_prompt

SCALES = ["audio=/4", "audio=/8", "video=/2", "audio=/8,video=/5"]
BANK = LoraBankConfig(variant="mss", rank=4, alpha=8, targets=["q_proj", "v_proj"], scales=SCALES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a bank, and beside it its export for engines."""
    made = write_run(tmp_path_factory.mktemp("experts"), ("audio", "video"), text=LLM_SIZES, adapter=BANK)
    export(made, made.parent / "exported", form="experts")
    return made


@pytest.fixture(scope="module")
def experts(run: Path) -> ExpertFolders:
    """What the export says of its experts."""
    read = read_experts(run.parent / "exported")
    assert read is not None
    return read


def test_a_folder_is_what_merging_its_scale_adds_to_the_llm(run: Path, experts: ExpertFolders, tmp_path: Path) -> None:
    assert list(experts.folders) == [*SCALES, "shared"]
    export(run, tmp_path / "merged", scale="audio=/8")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    plain = load_file(run.parent / "exported" / "model.safetensors")
    folder = Path(experts.folders["audio=/8"])
    assert folder.name == "audio=per8"
    config: Any = PeftConfig.from_pretrained(str(folder))
    assert (config.r, config.lora_alpha / config.r) == (8, 2.0)
    lora = load_file(folder / "adapter_model.safetensors")
    changed = 0
    for name, weight in plain.items():
        down = lora.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if down is None:
            assert merged[name].equal(weight), name
            continue
        up = lora[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
        assert merged[name].sub(weight).allclose(2.0 * up @ down, atol=1e-5), name
        changed += 1
    assert changed == len(lora) / 2 == 4
    assert all(name.startswith(PEFT_PREFIX + ELASTIC_PREFIX) for name in lora)


def test_such_an_export_is_not_loaded_without_its_experts(run: Path) -> None:
    with pytest.raises(ValueError, match=r"holds its experts as LoRA folders, .* mllm serve --engine vllm"):
        load(run.parent / "exported", device="cpu")


def test_an_export_whose_experts_are_not_whole_is_refused(run: Path, tmp_path: Path) -> None:
    for file, name in (("audio=per8/adapter_model.safetensors", "audio=/8"), ("shared/adapter_config.json", "shared")):
        copy = tmp_path / name.replace("/", "_")
        shutil.copytree(run.parent / "exported", copy)
        (copy / "experts" / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"is missing, which .* names as the expert '{name}'"):
            read_experts(copy)
    (copy / "experts.json").write_text('{"scales": []}')
    with pytest.raises(ValueError, match="it must hold has_shared, rank, scales, tasks, and no more"):
        read_experts(copy)


def test_what_does_not_go_together_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it does not go with scale or task"):
        export(run, tmp_path / "out", scale="audio=/4", form="experts")
    simple = write_run(tmp_path, ("audio",))
    with pytest.raises(ValueError, match="the adapter has no experts per scale or task"):
        export(simple, tmp_path / "out", form="experts")


def test_an_engine_sets_room_for_loras_aside(experts: ExpertFolders) -> None:
    arguments = EngineOptions(model="x", experts=experts).arguments(["audio"], 512)
    assert (arguments["enable_lora"], arguments["max_lora_rank"], arguments["max_loras"]) == (True, 8, 5)
    with pytest.raises(ValueError, match="has LoRAs of rank 513, and vLLM takes at most 512"):
        EngineOptions(model="x", experts=replace(experts, rank=513)).arguments(["audio"], 512)


@needs_vllm
def test_vllm_answers_each_prompt_with_the_expert_of_its_budget(
    run: Path, experts: ExpertFolders, tmp_path: Path
) -> None:
    answerer = answerer_of(run)
    samples = samples_of(tmp_path, [("audio",), ("video",), ("audio", "video")])
    text = [Sample("text", (Message("user", (Text("what is said?"),)),), task="")]
    scales = {"audio": ("audio=/4", "audio=/8"), "video": ("video=/2",), "audio+video": ("audio=/8,video=/5",)}
    names = [(sample, scale) for sample in samples for scale in scales[sample.id.split(" ")[1]]]
    names += [(sample, "") for sample in text]
    prompts = [engine_prompt(answerer.processor, sample, scale) for sample, scale in names]
    numbers = {name: number for number, name in enumerate(experts.folders, start=1)}
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 5}
    with engine(run.parent / "exported", limit_mm_per_prompt={"audio": 1, "video": 1}, **options) as llm:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        chosen = [scale or "shared" for _, scale in names]
        loras = [LoRARequest(name, numbers[name], experts.folders[name]) for name in chosen]
        params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=loras)
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        bare = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]
    assert ids == [expected_ids(answerer, [sample], scale)[0] for sample, scale in names]
    assert sum(one != other for one, other in zip(ids, bare, strict=True)) > len(ids) / 4  # the experts do something
