"""What goes with a host and what does not is said before anything is loaded, by the key as a user types it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_hosts
import yaml

from mllm.checkpoints.adoption import examine
from mllm.checkpoints.build import build
from mllm.checkpoints.pretrained import host_config, llm_config
from mllm.commands import adopt
from mllm.config.model import ModelConfig
from mllm.config.reading import read
from mllm.config.run import read_run_config
from mllm.hosts.families import HOSTS, NOT_YET, find_family

HOST: dict[str, Any] = {"host": "x", "image": {"budgets": [36, 4]}}
REFUSED = {
    r"^model\.llm or host must be given, and not both$": {"llm": "y"},
    r"^model\.chat_format is plain, and a host has its own template; leave it out$": {"chat_format": "plain"},
    r"^model\.names_images is set, and a host has its own chat template": {"names_images": True},
    r"^model\.video does not go with a host yet; allowed: image, audio$": {
        "video": {"encoder": {"kind": "frames"}, "budgets": [4]}
    },
    r"^model\.host is given without a medium; give the budgets of image or audio$": {"image": None},
    r"^model\.image\.encoder is the host's own; leave it out$": {"image": {"encoder": "z", "budgets": [4]}},
    r"^model\.image\.tiling is the host's own; leave it out$": {
        "image": {"tiling": "pinpoints", "budgets": [4], "projector": "none"}
    },
    r"^model\.image\.span is the host's own; leave it out$": {"image": {"span": ["<a>", "<b>"], "budgets": [4]}},
    r"^model\.image\.compressor\.kind is query, and a host allows pool alone$": {
        "image": {"compressor": "query", "budgets": [4]}
    },
    r"^model\.image\.compressor\.order is haar, and a host allows raster alone$": {
        "image": {"compressor": {"kind": "pool", "order": "haar"}, "budgets": [4]}
    },
    r"^model\.image\.projector\.kind is mlp, and a host allows none alone$": {
        "image": {"projector": "mlp", "budgets": [4]}
    },
    r"^model\.adapter\.kind is lora, which would change answers at the host's full budget; allowed: gated_lora$": {
        "adapter": "lora"
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_host_decides_itself_is_refused_by_its_key(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(ModelConfig, {**HOST, **REFUSED[message]}, path="model")


def test_what_only_a_host_has_a_use_for_is_refused_without_one() -> None:
    image = {"encoder": "z", "budgets": [4]}
    with pytest.raises(ValueError, match=r"^model\.image\.projector\.kind is none, which goes with model\.host alone$"):
        read(ModelConfig, {"llm": "y", "image": {**image, "projector": "none"}}, path="model")
    with pytest.raises(ValueError, match=r"^model\.adapter\.kind is gated_lora, which goes with model\.host alone$"):
        read(ModelConfig, {"llm": "y", "image": image, "adapter": "gated_lora"}, path="model")
    with pytest.raises(ValueError, match=r"^model\.image\.encoder is missing$"):
        read(ModelConfig, {"llm": "y", "image": {"budgets": [4], "projector": "mlp"}}, path="model")


def test_a_run_on_a_host_trains_its_adapter_alone() -> None:
    run = {"model": {**HOST, "adapter": "gated_lora"}, "data": {"train": ["a"]}, "train": {"out": "o", "max_steps": 1}}
    assert read_run_config(run).parts == ("adapter",)
    for changes, message in (
        (
            {"train": {**run["train"], "parts": ["adapter", "llm"]}},
            r"holds llm, but the parts of model\.host stay frozen",
        ),
        ({"model": HOST}, r"^nothing would learn: model\.host stays frozen and there is no model\.adapter$"),
        ({"data": {"train": ["a"], "features": {"folder": "f"}}}, r"^data\.features does not go with model\.host yet"),
    ):
        with pytest.raises(ValueError, match=message):
            read_run_config({**run, **changes})
    alone = {"llm": "y", "image": {"encoder": "z", "budgets": [4]}}
    with pytest.raises(ValueError, match=r"^data\.host_answer_tokens is set, but there is no model\.host that could"):
        read_run_config({**run, "model": alone, "data": {"train": ["a"], "host_answer_tokens": 4}})


@pytest.mark.parametrize("model_type", [*NOT_YET, "mllama"])
def test_a_family_that_is_not_there_yet_is_refused_by_name(model_type: str) -> None:
    why = f" ({NOT_YET[model_type]})" if model_type in NOT_YET else ""
    message = (
        f"some/model is a {model_type}, which is not supported yet as model.host{why}; allowed: {', '.join(HOSTS)}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_family(model_type, reference="some/model")


def test_an_llm_is_no_host_and_a_host_no_llm(tmp_path: Path) -> None:
    parts = tiny.write_parts(tmp_path / "parts")
    with pytest.raises(ValueError, match=r"is a llama, which is not supported yet as model\.host"):
        host_config(parts["llm"])
    folder = tiny_hosts.write("internvl", tmp_path / "internvl")
    with pytest.raises(ValueError, match="is a internvl, and no LLM is taken out of it"):
        llm_config(folder)


def test_budgets_begin_with_the_hosts_own(tmp_path: Path) -> None:
    folder = tiny_hosts.write("llava", tmp_path)
    with pytest.raises(
        ValueError, match=r"model\.image\.budgets begins with 9; the largest must be .* full budget, 36"
    ):
        build(read(ModelConfig, {"host": folder, "image": {"budgets": [9, 1]}}, path="model"))
    with pytest.raises(ValueError, match=r"^model\.audio is set, but this host reads image$"):
        build(read(ModelConfig, {"host": folder, "audio": {"budgets": ["/1"]}}, path="model"))


def test_budgets_of_images_that_keep_their_shape_are_rates_from_1_on(tmp_path: Path) -> None:
    folder = tiny_hosts.write("qwen2_vl", tmp_path / "qwen2_vl")
    for budgets in (["/2", "/4"], [16, 4]):
        with pytest.raises(ValueError, match=r"model\.image\.budgets begins with .* full budget, /1$"):
            build(read(ModelConfig, {"host": folder, "image": {"budgets": budgets}}, path="model"))
    folder = tiny_hosts.write("llava", tmp_path / "llava")
    with pytest.raises(ValueError, match=r"model\.image\.budgets begins with /1; .* full budget, 36$"):
        build(read(ModelConfig, {"host": folder, "image": {"budgets": ["/1", "/4"]}}, path="model"))


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_hosts.write("llava", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if "multi_modal_projector" in name)
    del state[name]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not those of its config: missing .*multi_modal_projector"):
        build(read(ModelConfig, {"host": folder, "image": {"budgets": [36, 1]}}, path="model"))


@pytest.mark.parametrize(
    ("family", "part", "changes", "message"),
    [
        ("llava", "image_processor", {"crop_size": {"height": 32, "width": 32}}, r"tiles of \(32, 32\) .* \(24, 24\)"),
        ("llava", None, {"patch_size": 8}, "wrote 9 placeholders for 1 tiles of 36 tokens"),
        ("llava", None, {"patch_size": None}, "unsupported operand"),
        ("llava_next", "image_processor", {"crop_size": {"height": 32, "width": 32}}, "division by zero"),
        ("qwen3_vl", "image_processor", {"patch_size": 8}, r"values of size \(384,\), and the encoder reads \(96,\)"),
        ("qwen3_vl", "image_processor", {"merge_size": 1}, "wrote 144 placeholders for 1 tiles of 36 tokens"),
        pytest.param(  # slow as all of this family: its processor wants torchvision in the oldest release
            *("gemma4", "image_processor", {"patch_size": 8}),
            r"values of size \(192,\), and the encoder reads \(48,\)",
            marks=pytest.mark.slow,
        ),
        (
            "qwen2_audio",
            "feature_extractor",
            {"feature_size": 128},
            r"\(128, 3000\), and the encoder reads \(80, 3000\)",
        ),
    ],
)
def test_a_processor_of_other_sizes_than_the_config_is_refused_before_a_file_is_read(
    family: str, part: str | None, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tiny_hosts.write(family, tmp_path)
    values = json.loads((tmp_path / "processor_config.json").read_text())
    (values if part is None else values[part]).update(changes)
    (tmp_path / "processor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"^the processor of this {family} does not go with its config .*{message}"):
        _built(folder, family)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("processor_config.json", "^Can't load image processor for"),
        ("chat_template.jinja", "^the processor of this internvl holds no chat template, or several$"),
        (
            "tokenizer_config.json",
            "^the processor of this internvl does not go with .* no attribute start_image_token$",
        ),
        ("model.safetensors", r"holds no model\.safetensors and no model\.safetensors\.index\.json$"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(name: str, message: str, tmp_path: Path) -> None:
    folder = tiny_hosts.write("internvl", tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises((ValueError, OSError), match=message):
        _built(folder, "internvl")


def _built(folder: str, family: str) -> Any:
    block = {"budgets": list(examine(folder).budgets)}
    return build(read(ModelConfig, {"host": folder, tiny_hosts.HOSTS[family].medium: block}, path="model"))


def test_a_vision_encoder_whose_features_are_no_grid_is_refused(tmp_path: Path) -> None:
    folder = tiny_hosts.write("llava", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_feature_select_strategy": "full"}))
    with pytest.raises(ValueError, match="selects features by 'full' from a clip_vision_model"):
        build(read(ModelConfig, {"host": folder, "image": {"budgets": [36, 1]}}, path="model"))


def test_the_attention_that_is_chosen_is_that_of_the_llm(tmp_path: Path) -> None:
    folder = tiny_hosts.write("llava", tmp_path)
    values = {"host": folder, "image": {"budgets": [36, 1]}, "attention": "eager"}
    model, _ = build(read(ModelConfig, values, path="model"))
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.encoder("image").backbone["vision_tower"].config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_a_mixture_of_experts_is_adopted_though_its_cost_is_not_counted(tmp_path: Path) -> None:
    folder = tiny_hosts.write("qwen3_5_moe", tmp_path / "host")
    findings = examine(folder)
    assert adopt._report(folder, findings)[-1] == (
        "  cost      not counted: qwen3_5_moe_text is a mixture of experts; the cost formula covers dense decoders"
    )
    text = adopt.config_text(adopt.Settings(model=folder), findings)
    line = "  # max_image_tokens: [1024, 256]  # random ones of images that are seen smaller too: image<=N\n"
    assert line in text
    config = read_run_config(yaml.safe_load(text.replace(line, line.replace("# ", "", 1))))
    assert config.sampler.max_image_tokens == [1024, 256]
