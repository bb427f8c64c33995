"""Names, or the sample itself, say which audio and video are one clip."""

from typing import Any

import pytest

from mllm.data.av_pairs import clip_pairs
from mllm.data.manifest import Media, Message, Sample, Text


def sample(*messages: list[str], meta: dict[str, Any] | None = None) -> Sample:
    """Return a sample of messages, each a list of "a:file" (audio), "v:file" (video)."""
    kinds = {"a": "audio", "v": "video", "i": "image"}
    made = tuple(
        Message("user", (*(Media(kinds[m[0]], m[2:]) for m in names), Text("?")))  # type: ignore[arg-type]
        for names in messages
    )
    return Sample("x", (*made, Message("assistant", (Text("!"),))), "avsr", meta=meta or {})


def test_one_name_is_one_clip() -> None:
    assert clip_pairs(sample(["a:s/1.wav", "v:v/1.mp4"])) == [(0, 1)]
    assert clip_pairs(sample(["v:1.mp4", "i:1.png", "a:1.mp4"])) == [(2, 0)]
    assert clip_pairs(sample(["i:1.png", "a:1.wav", "v:1.mp4"], ["a:2.wav", "v:2.mp4"])) == [(1, 2), (3, 4)]
    assert clip_pairs(sample(["a:question.wav", "v:scene.mp4"])) == []
    assert clip_pairs(sample(["a:1.wav"], ["v:1.mp4"])) == []
    assert clip_pairs(sample(["a:1.wav"])) == []


def test_the_sample_overrules_names() -> None:
    assert clip_pairs(sample(["a:1.wav", "v:2.mp4"], meta={"one_clip": True})) == [(0, 1)]
    assert clip_pairs(sample(["a:1.wav", "v:1.mp4"], meta={"one_clip": False})) == []
    with pytest.raises(ValueError, match=r"sample 'x': meta\.one_clip must be true or false, got 'yes'"):
        clip_pairs(sample(["a:1.wav"], meta={"one_clip": "yes"}))
