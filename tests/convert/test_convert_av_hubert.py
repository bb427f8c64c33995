"""Which entries a released AV-HuBERT may hold, and what becomes of the encoder that is made of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from released_av_hubert import released
from safetensors.torch import load_file
from torch import Tensor

from mllm.checkpoints.build import build
from mllm.cli import main
from mllm.convert.av_hubert import FINE_TUNED_PREFIX, convert_file, convert_state
from mllm.encoders.av_hubert import AVHubertEncoder

SETTINGS = {"encoder_attention_heads": 2, "layer_norm_first": True}


@pytest.fixture(scope="module")
def encoder() -> AVHubertEncoder:
    torch.manual_seed(0)
    return AVHubertEncoder(tiny.encoder_configs()["video"]).eval()  # pyright: ignore[reportArgumentType]


def write(path: Path, state: dict[str, Tensor], settings: dict[str, Any] | None = None) -> Path:
    torch.save({"cfg": {"model": {"w2v_args": {"model": settings or SETTINGS}}}, "model": state}, path)
    return path


@pytest.mark.parametrize("prefix", ["", FINE_TUNED_PREFIX])
def test_pretrained_and_fine_tuned_files_give_the_same_encoder(tmp_path: Path, encoder: Any, prefix: str) -> None:
    state = released(encoder, prefix) | ({"decoder.embed_tokens.weight": torch.zeros(3, 2)} if prefix else {})
    made = convert_file(write(tmp_path / "x.pt", state))
    assert made.is_fine_tuned == bool(prefix)
    assert made.dropped == (["decoder.embed_tokens.weight"] if prefix else []) + [f"{prefix}mask_emb"]
    clip = tiny.random_media("video", 6).values[None]
    assert made.encoder(video=clip).equal(encoder(video=clip))


def test_what_is_missing_unknown_misshapen_or_unsupported_is_named(encoder: Any) -> None:
    state = released(encoder)
    first = "encoder.layers.0.fc1.bias"
    with pytest.raises(ValueError, match=r"misses encoder.layers.0.feed_forward.intermediate_dense.bias \(1 in all\)"):
        convert_state({name: value for name, value in state.items() if name != first}, SETTINGS)
    with pytest.raises(ValueError, match=r"holds unknown encoder.extra \(1 in all\)"):
        convert_state(state | {"encoder.extra": torch.zeros(1)}, SETTINGS)
    with pytest.raises(ValueError, match=r"intermediate_dense.bias has the shape \(3,\) in the checkpoint; expected"):
        convert_state(state | {first: torch.zeros(3)}, SETTINGS)
    with pytest.raises(ValueError, match="does not tell encoder_attention_heads"):
        convert_state(state, {})
    with pytest.raises(ValueError, match="modality_fuse is 'add' in the file; only 'concat' can be converted"):
        convert_state(state, {**SETTINGS, "modality_fuse": "add"})
    with pytest.raises(ValueError, match=r"misses post_extract_proj.weight; it is no AV-HuBERT"):
        convert_state({}, SETTINGS)


def test_the_command_writes_a_folder_that_a_run_can_name(
    tmp_path: Path, encoder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.pt", released(encoder))
    assert main(["convert", "av-hubert", str(path), "--out", str(tmp_path / "made")]) == 0
    assert "1 entry was not needed: mask_emb" in capsys.readouterr().out
    assert json.loads((tmp_path / "made" / "config.json").read_text())["model_type"] == "av_hubert"
    assert load_file(tmp_path / "made" / "model.safetensors").keys() == encoder.state_dict().keys()
    parts = tiny.write_parts(tmp_path / "parts")
    model, _ = build(tiny.settings_on({**parts, "video": str(tmp_path / "made")}, ("video",)))
    encoder_part: Any = model.model.encoder("video")
    assert encoder_part.backbone.post_extract_proj.weight.equal(encoder.post_extract_proj.weight)
    assert main(["convert", "av-hubert", str(tmp_path / "none.pt"), "--out", str(tmp_path / "other")]) == 2
