"""Files to model inputs: what the encoders get is what was in the files, and users cannot forge media."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch

from mllm.budget import Budget
from mllm.data.batching import SampleKey
from mllm.data.dataset import Item, ManifestDataset
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.data.skipped import SkippedSample
from mllm.media import Audio, MediaError, MediaLoader, load_audio, load_image, load_video, write_video
from mllm.processing.processor import ElasticProcessor
from mllm.transforms.augmentation import Augmentation, TimeMask
from mllm.transforms.noise import MixNoise
from mllm.utils.random_generator import random_generator


@pytest.fixture(scope="module")
def made() -> ElasticProcessor:
    return tiny.processor(tiny.settings())


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    root = tmp_path_factory.mktemp("media")
    names = tiny.write_media(root)
    parts = (*(Media(m, names[m]) for m in ("video", "image", "audio")), Text("what is this?"))
    return Sample("a", (Message("user", parts), Message("assistant", (Text("red"),))), task="test", root=root)


def test_media_are_loaded_in_order_of_appearance_with_their_true_lengths(made, sample) -> None:
    video, image, audio = made.load_media(sample)
    assert [item.medium for item in (video, image, audio)] == ["video", "image", "audio"]
    assert video.values.shape == (20, 1, 32, 32)
    assert video.raw_length == 20
    assert image.values.shape == (3, 64, 64)
    assert audio.values.shape == (80, 100)
    assert audio.raw_length == 12_800
    assert [made.extent(item).length for item in (video, image, audio)] == [20, 64, 40]


def test_a_request_from_files_equals_one_from_decoded_media(made, sample) -> None:
    budget = "image=4,audio=/4,video=/5"
    root = sample.root
    order = Sample("a", (Message("user", tuple(sorted(sample.messages[0].parts, key=_rank))),), task="t", root=root)
    files = made(order, budget)
    decoded = made(
        text="what is this?",
        images=[load_image(root / "0.png")],
        audio=[load_audio(root / "0.wav")],
        videos=[load_video(root / "0.mp4", gray=True)],
        budget=budget,
    )
    assert files.keys() == decoded.keys()
    assert all(torch.equal(files[key], decoded[key]) for key in files)
    ids = files["input_ids"][0].tolist()
    assert [ids.count(made.placeholder_ids[m]) for m in ("image", "audio", "video")] == [4, 10, 4]


def _rank(part: Media | Text) -> int:
    return ("image", "audio", "video").index(part.medium) if isinstance(part, Media) else 3


def test_the_answer_is_asked_for_and_not_shown(made, sample) -> None:
    loaded = [made.load_media(sample)]
    question = made.batch([sample], loaded, for_training=False).rows[0]
    taught = made.batch([sample], loaded, for_training=True).rows[0]
    answer = [*made.tokenizer.encode(" red", add_special_tokens=False), made.tokenizer.eos_token_id]
    assert [*question.ids, *answer] == list(taught.ids)
    assert [label for label in taught.labels if label != -100] == answer


def test_typed_placeholders_are_text(made) -> None:
    typed = "<|image_token|><image></s>"
    inputs = made(text=typed)
    special = set(made.tokenizer.all_special_ids)
    assert [token for token in inputs["input_ids"][0].tolist() if token in special] == [made.tokenizer.bos_token_id]
    assert typed in made.tokenizer.decode(inputs["input_ids"][0])


def test_a_processor_is_the_same_after_saving(made, sample, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"holds no config.json, where the media and budgets"):
        ElasticProcessor.from_pretrained(tmp_path)
    tiny.config(tiny.settings()).save_pretrained(tmp_path)  # where its media and budgets stand
    again = ElasticProcessor.from_pretrained(tmp_path)
    assert again.space == made.space
    first, second = made(sample, "image=7"), again(sample, "image=7")
    assert all(torch.equal(first[key], second[key]) for key in first)


def both(root: Path, audio: str = "clip.wav") -> Sample:
    parts = (Media("audio", audio), Media("video", "clip.mp4"), Text("?"))
    return Sample("both", (Message("user", parts), Message("assistant", (Text("red"),))), task="avsr", root=root)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Write a folder with a clip of one second: a video, and audio that is 60 ms longer."""
    frames = np.random.default_rng(0).integers(0, 255, (25, 40, 40), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", frames)
    soundfile.write(tmp_path / "clip.wav", np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    return tmp_path


def test_audio_and_video_of_one_clip_agree_in_length_or_are_refused(made, clip) -> None:
    for num_samples in (14_800, 15_999):
        soundfile.write(clip / "clip.wav", np.full(num_samples, 0.1), 16_000)
        audio, video = made.load_media(both(clip))
        assert (audio.raw_length, video.raw_length) == (16_000, 25)
    soundfile.write(clip / "clip.wav", np.full(14_000, 0.1), 16_000)
    with pytest.raises(MediaError, match=r"lasts 0\.875 seconds and the video of the same clip 1\.000") as refusal:
        made.load_media(both(clip))
    assert refusal.value.kind == "mismatch"
    left = made.load_media(both(clip), loader=MediaLoader(gray=True, max_mismatch_seconds=None))
    assert left[0].raw_length == 14_000
    (clip / "question.wav").write_bytes((clip / "clip.wav").read_bytes())
    assert made.load_media(both(clip, "question.wav"))[0].raw_length == 14_000  # not the same clip


def test_a_mismatch_is_skipped_in_training(made, clip) -> None:
    soundfile.write(clip / "clip.wav", np.full(14_000, 0.1), 16_000)
    item = ManifestDataset([both(clip)], load=made.load_media, seed=0)[0]
    assert isinstance(item, SkippedSample)
    assert item.kind == "mismatch"


def test_augmentation_is_a_function_of_seed_epoch_and_sample(made, clip) -> None:
    noise = Audio(np.random.default_rng(1).normal(0, 1, 5_000).astype(np.float32), 16_000)
    full = Augmentation(MixNoise(noise, [0.0]), TimeMask(1_600, 16_000), TimeMask(5, 25), 0.5)

    def drawn(augmentation: Augmentation, seed: int, epoch: int) -> list[torch.Tensor]:
        load = partial(made.load_media, augmentation=augmentation)
        item = ManifestDataset([both(clip)], load=load, seed=seed)[SampleKey(epoch, 0)]
        assert isinstance(item, Item)
        return [medium.values for medium in item.media]

    first = drawn(full, 0, 0)
    assert all(map(torch.equal, first, drawn(full, 0, 0)))
    for other in (drawn(full, 1, 0), drawn(full, 0, 1)):
        assert not any(map(torch.equal, first, other))
    # The audio's parts do not move the video's: crop, mask and flip are the same without them.
    without = drawn(Augmentation(video_mask=TimeMask(5, 25), flip_probability=0.5), 0, 0)
    assert torch.equal(first[1], without[1])
    assert not torch.equal(first[0], without[0])
    plain = ManifestDataset([both(clip)], load=partial(made.load_media, augmentation=full))[0]
    assert all(map(torch.equal, [m.values for m in plain.media], [m.values for m in made.load_media(both(clip))]))


def test_a_silent_clip_that_shall_get_noise_is_named(made, clip) -> None:
    soundfile.write(clip / "clip.wav", np.zeros(16_000), 16_000)
    noise = Audio(np.ones(100, dtype=np.float32), 16_000)
    load = partial(made.load_media, augmentation=Augmentation(MixNoise(noise, [0.0])))
    with pytest.raises(ValueError, match=r"audio clip\.wav: noise cannot be mixed at 0 dB: the audio is silent"):
        load(both(clip), generator=random_generator(0, 0, "a", "x"))


def test_a_clip_too_short_for_a_rate_is_named_with_frames_and_rate(made, sample, clip) -> None:
    write_video(clip / "clip.mp4", np.zeros((4, 40, 40), np.uint8))
    soundfile.write(clip / "clip.wav", np.full(2_560, 0.1), 16_000)
    with pytest.raises(ValueError, match=r"sample 'both': video=/5: a clip of 4 frames is too short"):
        made(both(clip), "audio=/4,video=/5")


def test_noise_comes_between_the_file_and_its_transform(made, sample) -> None:
    babble = Audio(np.random.default_rng(0).normal(0, 1, 16_000).astype(np.float32), 16_000)
    clean = made.load_media(sample)[2]
    noisy = [
        made.load_media(sample, noise=lambda a: MixNoise(babble, 0.0)(a, random_generator(0, 0, "a", "noise")))[2]
        for _ in range(2)
    ]
    assert torch.equal(noisy[0].values, noisy[1].values)
    assert not torch.allclose(noisy[0].values, clean.values, atol=0.05)


def test_what_a_row_cannot_meet_names_the_sample(made, sample) -> None:
    batch = made.batch([sample], [made.load_media(sample)], for_training=True)
    with pytest.raises(ValueError, match="sample 'a': video=/3 was not trained"):
        made.expand(batch, [[Budget.parse("video=/3")]], left_padding=False)


def test_media_that_do_not_match_the_conversation_are_refused(made, sample) -> None:
    loaded = made.load_media(sample)
    with pytest.raises(ValueError, match="sample 'a' speaks of video, image, audio, but has video"):
        made.batch([sample], [loaded[:1]], for_training=True)


def test_a_clip_the_encoder_cannot_take_names_the_sample(made, sample) -> None:
    short = [*made.load_media(sample)[:2], tiny.random_media("audio", 0)]
    with pytest.raises(ValueError, match="sample 'a': a clip of 0 samples"):
        made.batch([sample], [short], for_training=True)


def test_a_missing_file_is_a_media_error(made, sample) -> None:
    lost = Sample("b", (Message("user", (Media("image", "nowhere.png"),)),), task="t", root=sample.root)
    with pytest.raises(MediaError, match=r"nowhere\.png"):
        made(lost)


def test_a_medium_the_model_does_not_take_is_refused(sample) -> None:
    deaf = tiny.processor(tiny.settings(["image"]))
    with pytest.raises(ValueError, match="does not take video; it takes image"):
        deaf(sample)


def test_an_argument_that_nothing_reads_is_refused_with_the_nearest(made, sample) -> None:
    image = load_image(sample.root / "0.png")
    with pytest.raises(TypeError, match=r"the processor does not take 'image'; did you mean images\?"):
        made(text="what?", image=image)
    with pytest.raises(TypeError, match=r"the processor does not take 'budgets'; did you mean budget\?"):
        made(text="what?", images=image, budgets="image=1")
    with pytest.raises(TypeError, match=r"apply_chat_template does not take 'tools'; it takes budget"):
        made.apply_chat_template([{"role": "user", "content": "hi"}], tools=[])
    asking = [{"role": "user", "content": "hi"}]
    for key, value in {"budget": "image=4", "images": [image], "audio": [], "videos": [], "padding": True}.items():
        for inputs in ({key: value}, {"processor_kwargs": {key: value}}):
            with pytest.raises(TypeError, match=f"with tokenize false makes a text, which {key} has no part in"):
                made.apply_chat_template(asking, **inputs)
    assert made.apply_chat_template(asking, images=None) == made.apply_chat_template(asking)
    with pytest.raises(TypeError, match="the first argument is one mllm sample or several"):
        made([image])
    with pytest.raises(TypeError, match="give a message as text=, media by name"):
        made(load_image(sample.root / "0.png"), "what?")
    with pytest.raises(ValueError, match="images goes with text; a sample names its own media"):
        made(sample, images=image)
    with pytest.raises(ValueError, match="padding is False; several rows are always padded"):
        made(text=["what?", "who?"], padding=False)


@pytest.mark.parametrize("budget", ["image=4", {"image": 4}, Budget.parse("image=4")])
def test_a_budget_is_taken_in_every_form(made, sample, budget) -> None:
    inputs = made(text="what?", images=sample.root / "0.png", budget=budget)
    assert inputs["num_image_tokens"].tolist() == [4]


@pytest.mark.parametrize("budget", [16, "16", 16.0, None])
def test_a_bare_number_is_refused_with_what_to_write(made, sample, budget) -> None:
    with pytest.raises(
        ValueError, match=r'does not say of what; write the medium: "image=16" for soft tokens of an image, "audio=/4"'
    ):
        made(text="what?", images=sample.root / "0.png", budget=budget)


def test_several_texts_have_media_of_their_own(made, sample) -> None:
    path, image = sample.root / "0.png", load_image(sample.root / "0.png")
    single = [made(text="what?", images=[path, image], budget="image=4"), made(text="who?", budget="")]
    both = made(text=["what?", "who?"], images=[[path, image], None], budget="image=4")
    for row, one in enumerate(single):
        length = one["input_ids"].shape[1]
        assert both["input_ids"][row, -length:].tolist() == one["input_ids"][0].tolist()
        assert both["attention_mask"][row].sum() == length
    assert torch.equal(both["pixel_values"], single[0]["pixel_values"])
    with pytest.raises(ValueError, match="there are 2 texts and 3 entries of image; give one entry per text"):
        made(text=["what?", "who?"], images=[path] * 3)
    with pytest.raises(ValueError, match="the budget 'audio=/4' names audio, but the request holds none"):
        made(text="what?", images=path, budget="audio=/4")
    shown = Sample("b", (Message("user", (Media("image", "0.png"), Text("what?"))),), task="t", root=sample.root)
    with pytest.raises(ValueError, match="the budget 'audio=/4' names audio, but the request holds none"):
        made([shown, shown], budget="audio=/4")
