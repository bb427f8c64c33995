"""Released LLaVA-1.5, MQT-LLaVA and M3 at toy size: what is read from them, refused and written, and what it is for."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM

from mllm.checkpoints.load import load
from mllm.cli import main
from mllm.compressors.query import sincos_positions
from mllm.convert.llava import convert
from mllm.convert.llava_options import LLM, SYSTEMS, VISION, Options
from mllm.data.manifest import Text
from mllm.inference.answerer import Answerer, Decoding, request

WIDTH, FEATURES, HIDDEN, PATCHES, QUERIES = 32, 16, 24, 64, 16
ENCODER_PREFIX = "model.vision_tower.vision_tower.vision_model."
STAGE_1 = "query_abstractor.bin"
LLAVA_CONFIG = {
    **{k: v for k, v in tiny.llm_config().to_dict().items() if k not in ("rope_parameters", "dtype")},
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "tie_word_embeddings": False,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": FEATURES,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
}
SCALES = {"matryoshka_vis_token_scale": [64, 16, 4, 1]}


def frozen(*, with_encoder: bool = True) -> dict[str, Tensor]:
    """LLM and encoder under released names, and what old checkpoints hold besides."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llm = LlamaForCausalLM(tiny.llm_config(tie_word_embeddings=False)).state_dict()
        vision = CLIPVisionModel(tiny.encoder_configs()["image"]).state_dict()  # pyright: ignore
    state = {**llm, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    if with_encoder:
        state |= {f"{ENCODER_PREFIX}{name}": value for name, value in vision.items()}
        state[f"{ENCODER_PREFIX}embeddings.position_ids"] = torch.arange(PATCHES + 1)[None]
    return {name: value.clone() for name, value in state.items()}


def drawn(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"{prefix}{name}": torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}


def projector() -> dict[str, Tensor]:
    shapes = {"0.weight": (HIDDEN, FEATURES), "0.bias": (HIDDEN,), "2.weight": (WIDTH, HIDDEN), "2.bias": (WIDTH,)}
    return drawn("model.mm_projector.", shapes)


def queries() -> dict[str, Tensor]:
    size, shapes = FEATURES, {}
    shapes |= {"query": (QUERIES, size), "proj": (size, WIDTH)}
    shapes |= {"attn.in_proj_weight": (3 * size, size), "attn.in_proj_bias": (3 * size,)}
    shapes |= {"attn.out_proj.weight": (size, size), "attn.out_proj.bias": (size,)}
    shapes |= {f"ln_{letter}.{kind}": (size,) for letter in "qkv" for kind in ("weight", "bias")}
    positions = sincos_positions((4, 4), size, torch.device("cpu")).half()
    prefix = "model.query_abstractor."
    return {**drawn(prefix, shapes), f"{prefix}pos_embed": positions}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny.write_parts(tmp_path_factory.mktemp("parts"))


def write_folder(folder: Path, state: dict[str, Tensor], parts: dict[str, str], *, kind: str, **options: Any) -> Path:
    """A checkpoint as hubs hold it: weights of a kind, config and tokenizer."""
    folder.mkdir()
    values = {"mm_vision_tower": parts["image"], **LLAVA_CONFIG, **options}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    tiny.TOKENIZER.save_pretrained(folder)
    if kind == "one":
        save_file(state, folder / "model.safetensors")
        return folder
    names, files = sorted(state), {}
    for number, shard_names in enumerate((names[::2], names[1::2]), start=1):
        shard = {name: state[name] for name in shard_names}
        if kind == "safetensors":
            file = f"model-0000{number}-of-00002.safetensors"
            save_file(shard, folder / file)
        else:
            file = f"pytorch_model-0000{number}-of-00002.bin"
            torch.save(shard, folder / file)
        files |= dict.fromkeys(shard_names, file)
    whole = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    (folder / f"{whole}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def write_manifest(folder: Path, image: str) -> Path:
    parts = [{"type": "image", "path": image}, {"type": "text", "text": "what?"}]
    answer = {"role": "assistant", "content": "red"}
    messages = [{"role": "user", "content": parts}, answer]
    row = {"id": "a", "task": "vqa", "messages": messages, "meta": {"answers": ["red"] * 10}}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def test_m3_from_shards_is_a_run_folder_that_is_moved_asked_and_trained_on(
    tmp_path: Path, parts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    state = frozen() | projector()
    folder = write_folder(tmp_path / "m3", state, parts, kind="safetensors", **SCALES)
    assert main(["convert", "llava-m3", str(folder), "--out", str(tmp_path / "made")]) == 0
    shown = capsys.readouterr().out
    assert "averaged behind the projector, 24 inside; trained at 1, 4, 16, 64 tokens; padded to a square" in shown
    assert "LLM: in the checkpoint; vision encoder: in the checkpoint" in shown
    shutil.rmtree(folder)
    moved = Path(shutil.move(tmp_path / "made", tmp_path / "elsewhere"))
    media = tiny.write_media(tmp_path / "media")
    image = str(tmp_path / "media" / media["image"])
    options = ["--image", image, "--text", "what?", "--max-new-tokens", "2", "--use-cpu"]
    for budget in ("image=16", "image=7"):
        assert main(["generate", "--model", str(moved), "--budget", budget, *options]) == 0
    words = ["--model.llm", str(moved / "llm"), "--model.image.encoder", str(moved / "image")]
    words += ["--model.image.budgets", "[1, 4, 16, 64]", "--model.image.projector.before_pooling", "true"]
    words += ["--sampler.mode", "all"]
    words += ["--data.train", str(write_manifest(tmp_path / "media", media["image"])), "--data.num_workers", "0"]
    words += ["--train.out", str(tmp_path / "trained"), "--train.max_steps", "1", "--model.chat_format", "vicuna_v1"]
    words += ["--train.parts", "[compressors, llm]", "--train.use_cpu", "true"]
    assert main(["train", *words]) == 0
    assert set(load(tmp_path / "trained")[1].space.media["image"].trained) == set(
        load(moved)[1].space.media["image"].trained
    )


def test_everything_of_a_checkpoint_with_its_encoder_comes_from_it(tmp_path: Path, parts: dict[str, str]) -> None:
    """In half precision, as the released ones are; the parts keep it, what trains is float32."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in frozen().items()}
    state |= {name: value.half() for name, value in projector().items()}
    state[f"{ENCODER_PREFIX}pre_layrnorm.bias"] = torch.full((FEATURES,), 0.5).half()
    folder = write_folder(tmp_path / "m3", state, parts, kind="bin", **SCALES)
    convert(folder, tmp_path / "run", system="llava-m3", options=Options())
    model, processor = load(tmp_path / "run")
    weights = model.state_dict()
    for name, ours in (
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.mm_projector.2.weight", "model.compressors.image.projectors.0.2.weight"),
        (f"{ENCODER_PREFIX}pre_layrnorm.bias", "model.vision_tower.backbone.pre_layrnorm.bias"),
    ):
        assert weights[ours].equal(state[name].float()), name
    assert load_file(tmp_path / "run" / "llm" / "model.safetensors")["lm_head.weight"].dtype == torch.float16
    assert model.config.text_config.rope_parameters["rope_theta"] == 500.0
    assert {amount.value for amount in processor.space.media["image"].trained} == {1, 4, 16, 64}


def test_an_encoder_that_is_not_in_the_checkpoint_is_the_one_it_names(tmp_path: Path, parts: dict[str, str]) -> None:
    folder = write_folder(tmp_path / "llava", frozen(with_encoder=False) | projector(), parts, kind="one")
    facts = convert(folder, tmp_path / "run", system="llava", options=Options())
    assert facts[1] == f"LLM: in the checkpoint; vision encoder: {parts['image']}"
    assert not (tmp_path / "run" / "image").exists()
    model, _ = load(tmp_path / "run")
    weights = {name: value for name, value in model.state_dict().items() if ".vision_tower." in name}
    stored = load_file(Path(parts["image"]) / "model.safetensors")
    prefix = "model.vision_tower.backbone."
    assert weights
    assert all(value.equal(stored[name.removeprefix(prefix)]) for name, value in weights.items())


def test_llava_is_elastic_without_training_and_says_so(
    tmp_path: Path, parts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Only all patches were trained; the other counts are there for whoever asks for the baseline."""
    folder = write_folder(tmp_path / "llava", frozen() | projector(), parts, kind="bin")
    assert main(["convert", "llava", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert "trained at 64 tokens only, other counts are untrained" in capsys.readouterr().out
    _, processor = load(tmp_path / "run")
    assert [str(one) for one in processor.space.media["image"].trained] == ["64"]
    media = tiny.write_media(tmp_path / "media")
    manifest = write_manifest(tmp_path / "media", media["image"])
    words = ["evaluate", "--model", str(tmp_path / "run"), "--manifest", str(manifest), "--use-cpu"]
    words += ["--max-new-tokens", "2", "--out", str(tmp_path / "report"), "--budgets", "image=64"]
    assert main([*words, "--budgets", "image=9"]) == 2
    assert "budget 'image=9' was not trained (image: 64); allow_untrained" in capsys.readouterr().err
    assert main(words) == 0
    assert main([*words, "--budgets", "image=9", "--allow-untrained"]) == 0


def test_mqt_has_every_even_count_and_its_first_tokens_do_not_change(tmp_path: Path, parts: dict[str, str]) -> None:
    state = frozen() | queries()
    folder = write_folder(tmp_path / "mqt", state, parts, kind="safetensors")
    facts = convert(folder, tmp_path / "run", system="mqt-llava", options=Options())
    assert facts[0].startswith("images: 16 queries of 16 with 2 heads; trained at 2, 4, 6, 8, 10, 12, 14, 16 tokens")
    model, processor = load(tmp_path / "run")
    trained = {amount.value for amount in processor.space.media["image"].trained}
    assert trained == set(range(2, 17, 2))
    weights = model.state_dict()
    for name, value in state.items():
        if name.startswith("model.query_abstractor."):
            ours = name.replace("query_abstractor", "compressors.image")
            assert weights[ours].equal(value.float()), name
    features = model.model.encode("image", torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    few, many = (
        model.model.compress("image", features, num_tokens=torch.tensor([n]), max_tokens=n) for n in (3, QUERIES)
    )
    torch.testing.assert_close(few, many[:, :3])


def test_a_first_stage_is_the_connector_alone(tmp_path: Path, parts: dict[str, str]) -> None:
    torch.save(queries(), tmp_path / STAGE_1)
    words = ["--llm", parts["llm"], "--vision", parts["image"], "--query-heads", "4", "--out", str(tmp_path / "run")]
    assert main(["convert", "mqt-llava", str(tmp_path / STAGE_1), *words]) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == []
    model, processor = load(tmp_path / "run")
    assert [one.value for one in processor.space.media["image"].trained] == [QUERIES]
    assert model.model.compressors["image"].attn.num_heads == 4
    assert model.config.sources["llm"]["reference"] == parts["llm"]
    torch.save(projector(), tmp_path / "mm_projector.bin")
    chosen = Options(llm=parts["llm"], vision=parts["image"])
    facts = convert(tmp_path / "mm_projector.bin", tmp_path / "linear", system="llava", options=chosen)
    assert facts[1] == f"LLM: {parts['llm']}; vision encoder: {parts['image']}"


@pytest.mark.parametrize(("aspect", "chosen"), [("pad", None), ("square", None), ("square", "pad"), (None, None)])
def test_images_become_square_as_the_checkpoint_says(
    tmp_path: Path, parts: dict[str, str], aspect: str | None, chosen: Any
) -> None:
    """The released code pads with the mean colour and centres, or cuts the middle out where its config is silent."""
    vision = tmp_path / "vision"
    shutil.copytree(parts["image"], vision)
    clip = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    clip.save_pretrained(vision)
    state = frozen(with_encoder=False) | projector()
    folder = write_folder(tmp_path / "llava", state, parts, kind="one", image_aspect_ratio=aspect)
    options = Options(vision=str(vision), image_aspect_ratio=chosen)
    convert(folder, tmp_path / "run", system="llava", options=options)
    _, processor = load(tmp_path / "run")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
    values = processor.transform("image", image).values
    if (chosen or aspect) == "pad":
        square = Image.new("RGB", (61, 61), tuple(int(mean * 255) for mean in clip.image_mean))  # pyright: ignore
        square.paste(image, (0, 10))
        image = square
    expected = clip(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(values, expected, atol=0.03, rtol=0)


def test_the_answers_of_a_moved_run_are_those_before(tmp_path: Path, parts: dict[str, str]) -> None:
    folder = write_folder(tmp_path / "mqt", frozen() | queries(), parts, kind="bin")
    convert(folder, tmp_path / "run", system="mqt-llava", options=Options())
    media = tiny.write_media(tmp_path / "media")
    image = tmp_path / "media" / media["image"]

    def answer(run: Path) -> Any:
        return Answerer(*load(run), Decoding(max_new_tokens=4))("what?", image=image, budget="image=6")

    before = answer(tmp_path / "run")
    shutil.move(tmp_path / "run", tmp_path / "other")
    after = answer(tmp_path / "other")
    assert (after.text, after.tokens) == (before.text, before.tokens)


def test_a_question_stands_behind_a_line_break_as_in_the_released_prompts(
    tmp_path: Path, parts: dict[str, str]
) -> None:
    folder = write_folder(tmp_path / "llava", frozen() | projector(), parts, kind="one", model_type="llava")
    convert(folder, tmp_path / "run", system="llava", options=Options())
    model, processor = load(tmp_path / "run")
    media = tiny.write_media(tmp_path / "media")
    answerer = Answerer(model, processor, Decoding(max_new_tokens=4))
    image = tmp_path / "media" / media["image"]
    plain, broken = (answerer(text, image=image) for text in ("what?", "\nwhat?"))
    assert (plain.text, plain.num_prompt_tokens) == (broken.text, broken.num_prompt_tokens)
    row = processor.batch(
        [request({"image": image}, "what?", separator="\n")[0]],
        [[processor.transform("image", Image.open(image).convert("RGB"))]],
        for_training=False,
    ).rows[0]
    line_break = tiny.TOKENIZER("\nwhat?", add_special_tokens=False)["input_ids"]
    start = list(row.ids).index(processor.placeholder_ids["image"]) + 1
    assert list(row.ids)[start : start + len(line_break)] == line_break
    assert plain.num_prompt_tokens == len(row.ids) - 1 + PATCHES
    assert request({}, "what?", separator="\n")[0].messages[0].parts == (Text("what?"),)


def test_the_recipes_train_what_the_released_systems_were_trained_at() -> None:
    configs = Path(__file__).parents[2] / "configs"
    m3, mqt = (yaml.safe_load((configs / f"{name}.yaml").read_text())["model"] for name in ("m3", "mqt_stage2"))
    assert tuple(m3["image"]["budgets"]) == SYSTEMS["llava-m3"].scales
    assert (m3["image"]["compressor"], m3["image"]["projector"]) == ("pool", {"before_pooling": True})
    assert mqt["image"]["budgets"] == {"start": 2, "stop": 256, "step": 2}
    assert (mqt["image"]["compressor"]["kind"], mqt["image"]["compressor"]["keys"]) == ("query", "position")
    assert mqt["llm"] == LLM  # M3 begins with the LLM of LLaVA-1.5, which its own converter reads
    for published in (m3, mqt):
        encoder = published["image"]["encoder"]
        assert (encoder["source"], encoder["feature_layer"]) == (VISION, -2)


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", ["query_abstractor.bin", "pytorch_model.bin"])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "was_run"
    torch.save({**queries(), "model.query_abstractor.ln_x": Harmful(mark)}, tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        assert main(["convert", "mqt-llava", str(path), "--out", str(tmp_path / "made")]) == 2
        refused = "holds posix.system() at 'model.query_abstractor.ln_x' where a tensor is expected; nothing of it was"
        assert refused in capsys.readouterr().err
    assert not mark.exists()
    assert not (tmp_path / "made").exists()


MATRIX, NEWLINE = "model.mm_projector.0.weight", "model.image_newline"
CHANGES = [
    ("llava", {NEWLINE: torch.ones(WIDTH)}, {}, {}, r"holds unknown model.image_newline \(1 in all\)"),
    ("llava", {"model.norm.weight": None}, {}, {}, r"misses model.norm.weight \(1 in all\)"),
    ("llava", {"model.norm.weight": torch.ones(3)}, {}, {}, r"norm.weight has the shape \(3,\) .*; expected \(32,\)"),
    (
        "llava",
        {f"{ENCODER_PREFIX}pre_layrnorm.bias": None},
        {},
        {},
        r"vision_tower \(option vision\): .* misses pre_layrnorm",
    ),
    ("llava", {f"{ENCODER_PREFIX}pre_layrnorm.bias": torch.ones(3)}, {}, {}, r"pre_layrnorm.bias has the shape \(3,\)"),
    ("llava", {MATRIX: None}, {}, {}, "misses model.mm_projector.0.weight, a matrix"),
    ("llava", {MATRIX: torch.ones(HIDDEN, 17)}, {}, {}, r"mm_projector.0.weight has the shape \(24, 17\)"),
    ("llava", {"model.mm_projector.4.bias": torch.ones(1)}, {}, {}, "holds unknown model.mm_projector.4.bias"),
    ("llava", queries(), {}, {}, r"holds both of model.query_abstractor.\* and model.mm_projector.\*"),
    ("llava", {"model.embed_tokens.weight": torch.ones(9, WIDTH)}, {}, {}, "holds .* tokens, but the LLM embeds 9"),
    ("llava", {}, SCALES, {}, r"matryoshka_vis_token_scale is \[64, 16, 4, 1\] in .*; it is no LLaVA-1.5"),
    ("llava", {}, {"mm_hidden_size": 8}, {}, "mm_hidden_size is 8 in .*, but the vision encoder is 16 wide"),
    ("llava", {}, {"model_type": "mpt"}, {}, "model_type is mpt in .*; only llava_llama or llava or llama can be"),
    ("llava", {}, {"mm_projector_type": "linear"}, {}, "is linear in .*, but the checkpoint holds a mlp2x_gelu"),
    ("llava", {}, {"mm_patch_merge_type": "spatial_unpad"}, {}, "is spatial_unpad in .*; only flat can be converted"),
    ("llava", {}, {"image_aspect_ratio": "anyres"}, {}, "image_aspect_ratio is anyres in .*; only pad or square"),
    ("llava", {}, {}, {"budgets": [65]}, r"budgets is \[65\]; this checkpoint gives counts 1..64, each named once"),
    ("llava", {}, {}, {"query_heads": 2}, "query_heads goes with MQT-LLaVA; LLaVA-1.5 has no queries"),
    ("llava-m3", {}, {}, {}, "has no matryoshka_vis_token_scale, so it is a LLaVA-1.5 that was not trained at several"),
    ("mqt-llava", {}, {}, {}, r"holds a projector \(LLaVA-1.5, LLaVA-1.5-M3\); it is no MQT-LLaVA"),
]
QUERY_CHANGES = [
    ({"ln_k.bias": None}, {}, "misses model.query_abstractor.ln_k.bias"),
    ({"gate": torch.ones(1)}, {}, "holds unknown model.query_abstractor.gate"),
    ({"proj": torch.ones(WIDTH, FEATURES)}, {}, r"abstractor.proj has the shape \(32, 16\) .*; expected \(16, 32\)"),
    ({"query": torch.ones(15, FEATURES)}, {}, "query holds 15 queries, which form no square grid"),
    ({"query": torch.ones(16, 12)}, {}, "query is 12 wide, but the vision encoder is 16 wide"),
    ({"query": None}, {}, "misses model.query_abstractor.query, a matrix"),
    ({}, {"query_heads": 3}, "query_heads is 3, which does not divide the 16 of the queries"),
    ({}, {"budgets": [4, 4]}, r"budgets is \[4, 4\]; this checkpoint gives counts 1..16, each named once"),
]


def refused(folder: Path, system: str, options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(folder / "x", folder / "run", system=system, options=options)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("system", "changed", "options", "chosen", "message"), CHANGES, ids=[c[4][:40] for c in CHANGES]
)
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path,
    parts: dict[str, str],
    system: str,
    changed: dict[str, Any],
    options: dict[str, Any],
    chosen: dict[str, Any],
    message: str,
) -> None:
    state = {**frozen(), **projector(), **changed}
    changed_state = {name: value.clone() for name, value in state.items() if value is not None}
    write_folder(tmp_path / "x", changed_state, parts, kind="one", **options)
    refused(tmp_path, system, Options(**chosen), message)


@pytest.mark.parametrize(("changed", "chosen", "message"), QUERY_CHANGES, ids=[c[2][:40] for c in QUERY_CHANGES])
def test_queries_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, parts: dict[str, str], changed: dict[str, Any], chosen: dict[str, Any], message: str
) -> None:
    state = {**queries(), **{f"model.query_abstractor.{name}": value for name, value in changed.items()}}
    (tmp_path / "x").mkdir()
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "x" / STAGE_1)
    refused(tmp_path, "mqt-llava", Options(llm=parts["llm"], vision=parts["image"], **chosen), message)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no JSON file"),
        ("[]", "holds no JSON object"),
        ("{}", "holds no weight_map"),
        ('{"weight_map": {"a": "../x.bin"}}', r"names '\.\./x\.bin', which is no file beside it"),
        ('{"weight_map": {"b": "x.safetensors"}}', "and x.safetensors disagree about a"),
    ],
)
def test_an_index_that_contradicts_its_files_is_refused(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "x").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "x" / "x.safetensors")
    (tmp_path / "x" / "pytorch_model.bin.index.json").write_text(index)
    refused(tmp_path, "llava", Options(), message)


def test_a_folder_without_weights_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    refused(tmp_path, "llava", Options(), "holds no weights; looked for model.safetensors, pytorch_model.bin, query")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        convert(tmp_path / "none", tmp_path / "run", system="llava", options=Options())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_large_llm_is_written_in_several_files_and_stays_in_its_own_until_then(
    tmp_path: Path, parts: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = frozen() | projector()
    folder = write_folder(tmp_path / "m3", state, parts, kind=kind, **SCALES)
    largest = max(value.nbytes for name, value in state.items() if name.startswith("model.layers."))
    monkeypatch.setattr("mllm.checkpoints.tensor_files.SHARD_BYTES", 2 * largest)
    convert(folder, tmp_path / "out", system="llava-m3", options=Options())
    files = sorted((tmp_path / "out" / "llm").glob("*.safetensors"))
    assert len(files) > 2
    written = {name: value for file in files for name, value in load_file(file).items()}
    assert written.keys() == {name for name in frozen(with_encoder=False) if not name.endswith("inv_freq")}
    assert all(torch.equal(value, state[name]) for name, value in written.items())
    model, _ = load(tmp_path / "out", device="cpu")
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
