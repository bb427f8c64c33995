"""Audio and video of one clip are brought to one length when they are close, and refused when they are not."""

import numpy as np
import pytest

from mllm.media import Audio, MediaError, Video, audio_as_long_as_video


def clip(num_frames: int, num_samples: int) -> tuple[Audio, Video]:
    samples = np.arange(1, num_samples + 1, dtype=np.float32)
    return Audio(samples, 16_000), Video(np.zeros((num_frames, 4, 4), np.uint8), 25.0)


@pytest.mark.parametrize("extra", [-1_280, -1, 0, 1, 1_280])
def test_a_small_difference_is_cut_or_filled_with_silence(extra: int) -> None:
    audio, video = clip(50, 32_000 + extra)
    agreed = audio_as_long_as_video(audio, video, path="a.wav", max_mismatch_seconds=0.08).samples
    assert len(agreed) == 50 * 640
    kept = min(32_000, 32_000 + extra)
    np.testing.assert_array_equal(agreed[:kept], audio.samples[:kept])
    assert not agreed[kept:].any()


@pytest.mark.parametrize("extra", [-1_281, 1_281])
def test_a_larger_one_is_refused(extra: int) -> None:
    audio, video = clip(50, 32_000 + extra)
    with pytest.raises(MediaError, match=r"video of the same clip 2\.000; they may differ by 0\.08") as refusal:
        audio_as_long_as_video(audio, video, path="a.wav", max_mismatch_seconds=0.08)
    assert (refusal.value.kind, refusal.value.path) == ("mismatch", "a.wav")
    assert len(audio_as_long_as_video(audio, video, path="a.wav", max_mismatch_seconds=0.1).samples) == 32_000
