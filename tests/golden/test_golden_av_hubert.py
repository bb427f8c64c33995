"""AV-HuBERT against what its released code computed: through a `.pt` file, the converter and our own encoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rebuild import Golden
from torch import Tensor

from mllm.convert.av_hubert import convert_file

GOLDEN = Golden.read("av_hubert")
CASES = list(GOLDEN.facts["cases"])


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    facts = GOLDEN.facts["cases"][request.param]
    path: Path = tmp_path_factory.mktemp(request.param) / "released.pt"
    torch.save({"args": None, "cfg": {"model": facts["config"]}, "model": GOLDEN.state(facts["layout"])}, path)
    return request.param, convert_file(path).encoder


def golden_input(name: str) -> Tensor:
    facts = GOLDEN.facts["inputs"][name]
    return GOLDEN.array(facts["name"], facts["shape"])


def assert_golden(result: Tensor, name: str) -> None:
    """Equal where the golden array is a number; NaN marks what is padding."""
    expected = GOLDEN.arrays[name]
    assert result.shape == expected.shape
    is_number = ~expected.isnan()
    assert is_number.any()
    torch.testing.assert_close(result[is_number], expected[is_number], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_golden_front_end(case: tuple[str, Any]) -> None:
    name, encoder = case
    video = golden_input("video").transpose(1, 2)  # (N, 1, T, H, W) there, (N, T, 1, H, W) here
    assert_golden(encoder.feature_extractor_video.resnet(video).transpose(1, 2), f"{name}/resnet")


@torch.no_grad()
def test_golden_features_of_video(case: tuple[str, Any]) -> None:
    name, encoder = case
    assert_golden(encoder(video=golden_input("video").transpose(1, 2)), f"{name}/video_only")


@torch.no_grad()
def test_golden_features_of_padded_video(case: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The released front end reads what stands beyond a clip's end, which in these inputs is noise."""
    name, encoder = case
    monkeypatch.setattr(encoder.config, "masks_front_end", False)
    lengths = torch.tensor(GOLDEN.facts["inputs"]["padded_lengths"])
    assert_golden(encoder(video=golden_input("video").transpose(1, 2), lengths=lengths), f"{name}/video_only_padded")


@torch.no_grad()
def test_where_padding_is_zero_the_masked_front_end_gives_the_released_features(
    case: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, encoder = case
    lengths = torch.tensor(GOLDEN.facts["inputs"]["padded_lengths"])
    noisy = golden_input("video").transpose(1, 2)
    is_frame = torch.arange(noisy.shape[1]) < lengths[:, None]
    zeroed = noisy * is_frame[:, :, None, None, None]
    ours = encoder(video=noisy, lengths=lengths)
    monkeypatch.setattr(encoder.config, "masks_front_end", False)
    torch.testing.assert_close(ours[is_frame], encoder(video=zeroed, lengths=lengths)[is_frame])


@torch.no_grad()
def test_golden_features_of_audio_and_video(case: tuple[str, Any]) -> None:
    name, encoder = case
    features = encoder(video=golden_input("video").transpose(1, 2), audio=golden_input("audio").transpose(1, 2))
    assert_golden(features, f"{name}/audio_video")
