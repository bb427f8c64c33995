"""Frozen parts in bfloat16: every medium, encoder, compressor and adapter is fitted, trained, evaluated and asked.

What is asserted is that bfloat16 says nearly what float32 says, not only that nothing stops; toy weights are drawn so
wide that another input, or another budget, says something else.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    BitImageProcessor,
    Dinov2Config,
    HubertConfig,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
)

from mllm.budget import Budget
from mllm.building import build
from mllm.cli import main
from mllm.data.manifest import Media, Message, Sample, Text, read_manifest, write_manifest
from mllm.encoders import backbone_class
from mllm.loading import TRAINABLES, export, load
from mllm.precision import dtype_of
from mllm.settings import AdapterSettings, EncoderAdapterSettings, MediumSettings, ModelSettings, TilingSettings
from mllm.trainables import NEW_TOKENS, set_trainables, trainable_names
from mllm.training.feature_building import make_features
from mllm.training.run import train
from mllm.training.settings import DataSettings, FeatureSettings, RunSettings, SamplerSettings, TrainSettings

TRUNK: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WAVE: dict[str, Any] = {
    **TRUNK,
    **{"conv_dim": (16, 16, 16), "conv_kernel": (10, 8, 4), "conv_stride": (5, 8, 8)},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
}
STABLE: dict[str, Any] = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
OTHERS = {
    "naflex": Siglip2VisionConfig(**TRUNK, patch_size=8, num_patches=16),
    "dinov2": Dinov2Config(**{key: TRUNK[key] for key in TRUNK if key != "intermediate_size"}, patch_size=8),
    "hubert": HubertConfig(**WAVE),
    "hubert_large": HubertConfig(**WAVE, **STABLE),
    "wav2vec2": Wav2Vec2Config(**WAVE),
    "wavlm": WavLMConfig(**WAVE),
}
QUERY = {"compressor": "query", "budgets": [1, 4, 16], "query_heads": 2}
RATES = {"compressor": "pool", "budgets": ["/2", "/4"]}
# By name the medium, and what differs from `tiny.MEDIA`; `encoder` is a folder.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "clip pool": ("image", {}),
    "clip pool haar": ("image", {"order": "haar", "projector_size": 0}),
    "clip pool projected first": ("image", {"project_first": True}),
    "clip pool per budget": ("image", {"per_budget_projector": True}),
    "clip pool mixture": ("image", {"projector_experts": 3}),
    "clip pool tiles": ("image", {"tiling": TilingSettings(kind="free", max_tiles=4, merge="flat")}),
    "clip query": ("image", QUERY),
    "clip query content": ("image", {**QUERY, "keys": "content", "query_size": 8}),
    "clip stack": ("image", {"compressor": "stack"}),
    "clip hybrid": ("image", {"compressor": "hybrid", "budgets": [4, 20], "query_heads": 2}),
    "naflex pool": ("image", {"encoder": "naflex", "budgets": [1, 4]}),
    "naflex query content": ("image", {**QUERY, "encoder": "naflex", "keys": "content"}),
    "dinov2 pool": ("image", {"encoder": "dinov2"}),
    "whisper pool": ("audio", {}),
    "whisper pool per budget": ("audio", {"per_budget_projector": True, "projector_activation": "relu"}),
    "whisper query": ("audio", {**QUERY, "budgets": ["/4", "/8"], "window_frames": 8}),
    "whisper stack": ("audio", {"compressor": "stack"}),
    "hubert pool": ("audio", {**RATES, "encoder": "hubert"}),
    "hubert large stack": ("audio", {**RATES, "encoder": "hubert_large", "compressor": "stack"}),
    "wav2vec2 pool": ("audio", {**RATES, "encoder": "wav2vec2"}),
    "wavlm pool": ("audio", {**RATES, "encoder": "wavlm"}),
    "listening pool": ("audio", {**RATES, "encoder": "video"}),
    "lips stack": ("video", {}),
    "lips pool": ("video", {"compressor": "pool"}),
    "lips adapted": ("video", {"encoder_adapter": EncoderAdapterSettings(rank=2, alpha=4)}),
}
FITTED = {
    *("clip pool", "clip pool haar", "clip pool per budget", "clip query", "naflex pool", "dinov2 pool"),
    *("whisper pool", "whisper pool per budget", "whisper stack", "hubert pool", "hubert large stack"),
    *("wav2vec2 pool", "wavlm pool", "listening pool", "lips stack", "lips pool", "clip stack"),
}
"""Cases whose projectors captions can choose."""
WORDS = ["red circle", "the blue square", "two", "left of the cat", "green and white", "no cross"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts with wide weights, media, and a manifest for each medium: training rows, which are captions too."""
    folder = tmp_path_factory.mktemp("precision")
    tiny.write_parts(folder, initializer_range=0.1, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, config in OTHERS.items():
            backbone_class(config)._from_config(config).save_pretrained(folder / name)
            if config.model_type in ("hubert", "wav2vec2", "wavlm"):
                Wav2Vec2FeatureExtractor(do_normalize=name == "hubert_large").save_pretrained(folder / name)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder / "naflex")
    BitImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False).save_pretrained(folder / "dinov2")
    for name in ("image", "audio", "video", *OTHERS):
        _widen(folder / name / "model.safetensors")
    files = [tiny.write_media(folder / "media", seed=seed, seconds=0.6 + 0.05 * seed) for seed in range(6)]
    for medium in ("image", "audio", "video"):
        rows = [
            Sample(
                f"{medium}{seed}",
                (
                    Message("user", (Media(medium, f"media/{own[medium]}"), Text("what is it?"))),
                    Message("assistant", (Text(WORDS[seed]),)),
                ),
                task="test",
            )
            for seed, own in enumerate(files)
        ]
        write_manifest(folder / f"{medium}.jsonl", rows)
    return folder


def _widen(path: Path) -> None:
    from safetensors.torch import save_file

    state = load_file(path)
    wide = {name: value * 4 if name.endswith("weight") and value.dim() == 2 else value for name, value in state.items()}
    save_file(wide, path, metadata={"format": "pt"})


def model_settings(world: Path, name: str, **changes: Any) -> ModelSettings:
    medium, own = CASES[name]
    given = {**tiny.MEDIA[medium], "crop_pixels": 32, **own}
    given["encoder"] = str(world / given.get("encoder", medium))
    if given["encoder"].endswith("naflex"):
        given.pop("feature_layer", None)
    adapter = AdapterSettings(rank=4, alpha=8, targets=["q_proj", "v_proj"])
    settings: dict[str, Any] = {"adapter": adapter, "dtype": "bfloat16", **changes}
    return ModelSettings(
        llm=str(world / "llm"),
        chat_format="plain",
        **{medium: MediumSettings(**given)},  # pyright: ignore[reportArgumentType]
        **settings,
    )


def run_settings(world: Path, output: Path, name: str, model: ModelSettings, **data: Any) -> RunSettings:
    rows = [str(world / f"{CASES[name][0]}.jsonl")]
    if name in FITTED and "features" not in data:
        data["captions"] = rows
    return RunSettings(
        model=model,
        data=DataSettings(
            train=rows, validation=rows, tokens_per_batch=1024, max_rows=3, num_workers=0, **data
        ),
        sampler=SamplerSettings(mode="sandwich"),
        train=TrainSettings(
            output=str(output),
            max_steps=2,
            learning_rate=1e-3,
            precision=model.dtype,  # pyright: ignore[reportArgumentType]
            progress=False,
            tensorboard=False,
            log_every=1,
            validate_every=2,
            use_cpu=True,
        ),
    )


def losses(run: Path, key: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@torch.no_grad()
def logits(model: Any, processor: Any, world: Path, medium: str) -> Tensor:
    """Log-probabilities of the answers' words at every budget."""
    found = []
    samples = read_manifest(world / f"{medium}.jsonl", world)[:3]
    for amount in processor.space.media[medium].trained:
        budget = Budget({medium: amount})
        loaded = [processor.load_media(sample, budgets=[budget]) for sample in samples]
        batch = processor.batch(samples, loaded, for_training=False)
        expanded = processor.expand(batch, [[budget] * len(samples)], left_padding=True)
        found.append(model(**expanded.inputs).logits[:, -1].float())
    return torch.stack(found).log_softmax(-1)


def distance(found: Tensor, expected: Tensor) -> float:
    """How far apart, as a share of how far apart the answers to different media are."""
    spread = (expected - expected.mean(dim=1, keepdim=True)).square().mean().sqrt()
    return float((found - expected).square().mean().sqrt() / spread)


@pytest.mark.parametrize("name", CASES)
def test_a_run_in_bfloat16_is_nearly_that_in_float32(world: Path, tmp_path: Path, name: str, capsys: Any) -> None:
    medium = CASES[name][0]
    for dtype in ("bfloat16", "float32"):
        own = model_settings(world, name, dtype=dtype)
        train(run_settings(world, tmp_path / dtype, name, own))
    halves, wholes = (losses(tmp_path / dtype) for dtype in ("bfloat16", "float32"))
    assert halves == pytest.approx(wholes, rel=0.03)
    assert losses(tmp_path / "bfloat16", "eval_loss") == pytest.approx(
        losses(tmp_path / "float32", "eval_loss"), rel=0.03
    )
    saved = load_file(tmp_path / "bfloat16" / TRAINABLES)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    half, processor = load(tmp_path / "bfloat16", dtype="bfloat16")
    assert dtype_of(half.model.tower(medium)) == dtype_of(half.model.language_model) == torch.bfloat16
    own = dict(half.named_parameters())
    assert all(own[name].equal(value) for name, value in saved.items()), "what was trained is not rounded"
    whole, _ = load(tmp_path / "bfloat16")
    expected = logits(whole, processor, world, medium)
    assert expected.std(dim=1).mean() > 1e-3, "these media all say the same"
    assert distance(logits(half, processor, world, medium), expected) < 0.25
    file = str(world / "media" / f"0.{ {'image': 'png', 'audio': 'wav', 'video': 'mp4'}[medium]}")
    words = ["--model", str(tmp_path / "bfloat16"), "--dtype", "bfloat16", "--use-cpu", "--max-new-tokens", "3"]
    assert main(["generate", *words, f"--{medium}", file, "--text", "what is it?"]) == 0
    asked = ["--manifest", str(world / f"{medium}.jsonl"), "--output", str(tmp_path / "evaluation")]
    assert main(["evaluate", *words, *asked]) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert {row["num_failed"] for row in results["rows"]} == {0}
