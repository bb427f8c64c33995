"""Tiled images and videos of images through the whole model: order, batches, budgets, beams, cost, training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from blocks import medium
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mllm.budget import Budget
from mllm.config.model import ModelConfig, VideoConfig
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.evaluation.flops import items_of, request_cost
from mllm.inference.answerer import Answerer, Decoding
from mllm.media import MediaError, write_video
from mllm.model.trainables import set_trainables
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor, LoadedMedia
from mllm.processing.token_order import NEWLINE, order_of

FLAT = {"compressor": "query", "budgets": [2, 4, 16], "tiling": {"kind": "free", "max_tiles": 4, "merge": "flat"}}
VIDEO = {"encoder": {"kind": "frames", "count": 4, "trained_counts": [4, 2, 1]}, "budgets": [1, 4, 16]}


def tiled(video: bool = False, **image: Any) -> ModelConfig:
    image_config = {"tiling": {"kind": "pinpoints"}, **image}
    made = tiny.settings(("image",), image=image_config)
    if not video:
        return made
    return ModelConfig(llm="none", chat_format="plain", adapter=made.adapter, image=made.image, video=frames())


def frames(**changes: Any) -> VideoConfig:
    return medium("video", VIDEO, **changes)


def image(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("media")
    for number, (height, width) in enumerate(((90, 130), (60, 200), (150, 140), (40, 40))):
        image(height, width, number).save(made / f"{number}.png")
    rng = np.random.default_rng(0)
    write_video(made / "clip.mp4", rng.integers(0, 255, (24, 48, 48, 3), dtype=np.uint8))
    write_video(made / "short.mp4", rng.integers(0, 255, (3, 48, 48, 3), dtype=np.uint8))
    return made


def sample(folder: Path, *names: str, name: str = "a", text: str = "what is it?") -> Sample:
    media = [Media("video" if file.endswith("mp4") else "image", file) for file in names]
    return Sample(name, (Message("user", (*media, Text(text))), Message("assistant", (Text("red"),))), "t", root=folder)


def batch_at(processor: ElasticProcessor, samples: list[Sample], budgets: list[str]) -> Batch:
    parsed = [Budget.parse(text) for text in budgets]
    return processor.batch(samples, [processor.load_media(one, budgets=parsed) for one in samples], for_training=False)


@pytest.mark.parametrize(
    "budget", ["image=64", "image=16", "image=4", "image=1", "image=9,tiles<=2", "image=4,tiles<=0"]
)
def test_the_prompt_holds_the_tokens_of_every_tile_in_their_order(folder: Path, budget: str) -> None:
    """Against every tile compressed alone and put together by hand; rows of other media stand beside it."""
    config = tiled()
    model, processor = tiny.model(config), tiny.processor(config)
    batch = batch_at(processor, [sample(folder, "0.png"), sample(folder, "1.png", "3.png")], [budget])
    expanded = processor.expand(batch, [[Budget.parse(budget)] * 2], left_padding=True)
    with torch.no_grad():
        embeds = model.model.embed(expanded.inputs["input_ids"], expanded.inputs)
        is_soft = expanded.inputs["input_ids"] == processor.placeholder_ids["image"]
        expected = []
        for row, costs in zip(batch.rows, expanded.token_counts, strict=True):
            for span, cost in zip(row.spans, costs, strict=True):
                shown = batch.values["pixel_values"][span.item : span.item + cost.num_images]
                parts = [
                    model.model.get_image_features(tile[None], torch.tensor([cost.each])).pooler_output[0]
                    for tile in shown
                ]
                for piece, index in order_of(span.extent, cost, processor.tiling).tolist():
                    expected.append(model.model.newline.vector if piece == NEWLINE else parts[piece][index])
    torch.testing.assert_close(embeds[is_soft], torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_without_tiling_nothing_is_new(folder: Path) -> None:
    config = tiny.settings(("image",))
    model, processor = tiny.model(config), tiny.processor(config)
    assert model.model.newline is None
    assert not any("newline" in name for name in model.state_dict())
    inputs = processor(sample(folder, "0.png"), "image=4")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "num_image_tokens"}


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("image", [{}, FLAT], ids=["spatial", "flat"])
def test_budgets_with_different_tiles_are_answered_together_and_encoded_once(
    folder: Path, image: dict[str, Any], num_beams: int
) -> None:
    config = tiled(**image)
    answerer = Answerer(tiny.model(config, seed=3), tiny.processor(config), Decoding(num_beams, max_new_tokens=4))
    samples = [sample(folder, "0.png", name="a"), sample(folder, "2.png", "3.png", name="b")]
    budgets = ["image=16", "image=4,tiles<=2", "image=2,tiles<=0", "total<=60"]
    batch = batch_at(answerer.processor, samples, budgets)
    seen: list[int] = []
    encoder = answerer.model.model.vision_tower
    handle = encoder.register_forward_hook(lambda _, value, __: seen.append(len(value[0])))
    together = answerer.answer_batch(batch, [[Budget.parse(text)] * 2 for text in budgets])
    handle.remove()
    assert len(seen) == 1
    different = [len(media.values) for one in samples for media in load(answerer.processor, one, budgets)]
    assert seen == [sum(different)]
    for answers, budget in zip(together, budgets, strict=True):
        alone = [answerer.answer_samples([one], [budget])[0] for one in samples]
        assert [answer.text for answer in answers] == [answer.text for answer in alone]
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]


def load(processor: ElasticProcessor, one: Sample, budgets: list[str]) -> list[LoadedMedia]:
    return processor.load_media(one, budgets=[Budget.parse(text) for text in budgets])


def test_a_cut_that_was_not_loaded_is_refused_with_the_sample(folder: Path) -> None:
    processor = tiny.processor(tiled())
    one = sample(folder, "0.png", name="p")
    batch = processor.batch([one], [processor.load_media(one)], for_training=False)
    with pytest.raises(ValueError, match=r"sample 'p': the image was loaded as 2x2 and its budget cuts it into 1x2"):
        processor.expand(batch, [[Budget.parse("tiles<=2")]], left_padding=True)


def test_decoded_images_and_files_give_the_same(folder: Path) -> None:
    processor = tiny.processor(tiled(video=True))
    budget = "image=4,tiles<=2"
    files = processor(sample(folder, "0.png", "2.png"), budget)
    decoded = processor(
        text="what is it?",
        images=[Image.open(folder / name).convert("RGB") for name in ("0.png", "2.png")],
        budget=budget,
    )
    assert files.keys() == decoded.keys()
    assert all(torch.equal(files[key], decoded[key]) for key in files)


@pytest.mark.parametrize(
    ("budget", "shown"), [("video=4", [0, 1, 2, 3]), ("video=4,frames=2", [0, 2]), ("video=16,frames=1", [1])]
)
def test_frames_are_images_and_fewer_of_them_are_taken_evenly(folder: Path, budget: str, shown: list[int]) -> None:
    config = tiled(video=True, tiling=None)
    model, processor = tiny.model(config), tiny.processor(config)
    inputs = processor([sample(folder, "clip.mp4"), sample(folder, "3.png", "clip.mp4")], f"image=9,{budget}")
    values = inputs["pixel_values"]
    assert len(values) == 4 + 1 + 4
    each = int(budget.split("=")[1].split(",")[0])
    with torch.no_grad():
        embeds = model.model.embed(inputs["input_ids"], inputs)

        def soft(item: int, count: int) -> torch.Tensor:
            return model.model.get_image_features(values[item][None], torch.tensor([count])).pooler_output[0]

        expected = [*(soft(i, each) for i in shown), soft(4, 9), *(soft(5 + i, each) for i in shown)]
    is_soft = inputs["input_ids"] == processor.placeholder_ids["image"]
    torch.testing.assert_close(embeds[is_soft], torch.cat(expected), rtol=1e-5, atol=1e-6)
    assert processor.placeholder_ids["video"] == processor.placeholder_ids["image"]
    assert "media" in model.config.to_dict()
    assert set(model.config.encoded_media) == {"image"}
    assert model.config.space == processor.space


def test_frames_and_tiles_stand_in_one_batch(folder: Path) -> None:
    config = tiled(video=True)
    answerer = Answerer(tiny.model(config, seed=3), tiny.processor(config), Decoding(max_new_tokens=6))
    samples = [sample(folder, "clip.mp4", "0.png", name="a"), sample(folder, "1.png", "clip.mp4", name="b")]
    budgets = ["image=16,video=4,frames=2", "image=4,video=4,tiles<=2", "total<=90"]
    batch = batch_at(answerer.processor, samples, budgets)
    together = answerer.answer_batch(batch, [[Budget.parse(text)] * 2 for text in budgets])
    for answers, budget in zip(together, budgets, strict=True):
        for answer, one in zip(answers, samples, strict=True):
            alone = answerer.answer_samples([one], [budget])[0]
            assert (answer.text, answer.tokens) == (alone.text, alone.tokens)
    assert together[0][0].tokens["video"] == 2 * 4
    assert all(sum(answer.tokens.values()) <= 90 for answer in together[2])


def test_a_total_over_a_video_takes_the_most_tokens_and_then_the_most_frames(folder: Path) -> None:
    processor = tiny.processor(tiled(video=True))
    (loaded,) = processor.load_media(sample(folder, "clip.mp4"))
    row = processor.batch([sample(folder, "clip.mp4")], [[loaded]], for_training=False).rows[0]
    for total in range(1, 70):
        result = [(f * n, f) for f in (1, 2, 4) for n in (1, 4, 16) if f * n <= total]
        (cost,) = row.token_counts(Budget.parse(f"total<={total}"), processor.space)
        assert (cost.tokens, cost.frames) == max(result)


def test_frames_that_cannot_be_shown_are_refused_with_those_that_can(folder: Path) -> None:
    processor = tiny.processor(tiled(video=True))
    with pytest.raises(ValueError, match=r"frames=3 cannot be met: 4 frames were taken .*; allowed are 1, 2, 4"):
        processor(sample(folder, "clip.mp4"), "frames=3")
    with pytest.raises(ValueError, match=r"short\.mp4: the video has 3 frames, and 4 are to be taken from it"):
        processor(sample(folder, "short.mp4"))
    video = tiny.processor(tiny.settings(("video",)))
    with pytest.raises(ValueError, match="frames=2: the videos of this model are not frames of images"):
        video(sample(folder, "clip.mp4"), "frames=2")


def test_frames_per_second_take_fewer_of_a_short_clip(folder: Path) -> None:
    config = tiled()
    video = frames(encoder={"count": 8, "trained_counts": [], "sampling": "fps", "frames_per_second": 5.0})
    config = ModelConfig(llm="none", chat_format="plain", image=config.image, video=video)
    (loaded,) = tiny.processor(config).load_media(sample(folder, "clip.mp4"))
    assert len(loaded.values) == 4  # 0.96 seconds


def test_a_broken_image_is_named_and_does_not_stop_the_others(folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    processor = tiny.processor(tiled())
    with pytest.raises(MediaError, match=r"cut\.png"):
        processor.load_media(sample(folder, "cut.png"))


def test_what_is_too_long_for_the_llm_is_refused_whole(folder: Path) -> None:
    processor = tiny.processor(tiled())
    processor.context_tokens = 100
    with pytest.raises(ValueError, match=r"sample 'long' is \d+ tokens long, \d+ of them soft, .* at most 100"):
        processor(sample(folder, "0.png", name="long"), "image=64")
    assert processor(sample(folder, "0.png"), "image=1")["input_ids"].shape[1] < 100


@pytest.mark.parametrize("budget", ["image=16", "image=4,tiles<=0", "video=4,frames=2", "video=4"])
@pytest.mark.parametrize("image", [{}, FLAT], ids=["spatial", "flat"])
def test_the_cost_is_what_runs(folder: Path, image: dict[str, Any], budget: str) -> None:
    """Encoder and compressor of every image that is encoded, and of every one that is shown."""
    config = tiled(video=True, **image)
    model, processor = tiny.model(config), tiny.processor(config)
    parsed = Budget.parse(budget)
    batch = batch_at(processor, [sample(folder, "0.png" if "image" in budget else "clip.mp4")], [budget])
    (cost,) = batch.rows[0].token_counts(parsed, processor.space)
    extent = batch.rows[0].spans[0].extent
    counted = request_cost(model.config, items_of(extent, cost), num_prompt_tokens=9, num_new_tokens=1)
    inputs = processor.expand(batch, [[parsed]], left_padding=True).inputs
    with torch.no_grad():
        with FlopCounterMode(display=False) as encoder, sdpa_kernel(SDPBackend.MATH):
            features = model.model.encode("image", inputs["pixel_values"])
        items = inputs.get("image_index", torch.arange(len(features.values)))

        def compress(item: torch.Tensor) -> None:
            tokens = inputs["num_image_tokens"][:1]
            model.model.compress("image", features, num_tokens=tokens, index=item[None], max_tokens=cost.each)

        compress(items[0])  # folds what is constant
        with FlopCounterMode(display=False) as compressor, sdpa_kernel(SDPBackend.MATH):
            for item in items:
                compress(item)
    assert counted.encoder == encoder.get_total_flops()
    assert counted.compressor == compressor.get_total_flops()
    assert len(items) == cost.num_images


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (
            {"encoder": {"count": 6}},
            "model.video.encoder.trained_counts holds 4; allowed are the divisors of 6 frames: 1, 2, 3, 6",
        ),
        (
            {"encoder": {"sampling": "fps"}},
            "model.video.encoder.frames_per_second is None; a number above 0 goes with sampling fps",
        ),
        ({"compressor": "query"}, "model.video.compressor.window_frames is missing"),
        ({"compressor": "pool"}, "model.video.compressor is that of the image block where encoder.kind is frames"),
        ({"encoder": {"kind": "lips", "count": 4}}, "model.video.encoder.count goes with kind frames, not with lips"),
        ({"encoder": {"count": 0, "trained_counts": []}}, "model.video.encoder.count is 0; it must be at least 1"),
        ({"budgets": ["/4"]}, r"model.video.budgets are rates \(/4\); frames take counts"),
    ],
)
def test_settings_of_frames_that_make_no_sense_are_refused(video: dict[str, Any], message: str) -> None:
    image = tiny.settings(("image",)).image
    with pytest.raises(ValueError, match=message):
        ModelConfig(llm="none", image=image, video=frames(**video))


def test_frames_need_images() -> None:
    with pytest.raises(
        ValueError, match=r"video.encoder.kind is frames, which are encoded like images; give an image block"
    ):
        ModelConfig(llm="none", video=frames())


@pytest.mark.parametrize("files", [(), ("3.png",), ("clip.mp4",)], ids=["text", "thumbnail", "frames"])
def test_a_process_without_newlines_still_touches_it(folder: Path, tmp_path: Path, files: tuple[str, ...]) -> None:
    """One process of a group: whatever its rows hold, the gradient of every trained parameter is there."""
    config = tiled(video=True, tiling={"kind": "free", "max_tiles": 4, "merge": "flat"})
    model, processor = tiny.model(config), tiny.processor(config)
    set_trainables(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        one = sample(folder, *files)
        batch = processor.batch([one], [processor.load_media(one)], for_training=True)
        expanded = processor.expand(batch, [[Budget()]], left_padding=False)
        model.train()(**expanded.inputs, labels=expanded.labels).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert not model.model.newline.vector.grad.any()


def test_every_sample_of_a_batch_may_have_its_own_cap(folder: Path) -> None:
    processor = tiny.processor(tiled())
    samples = [sample(folder, "0.png", "2.png", name="a"), sample(folder, "1.png", name="b")]
    caps = [Budget.parse("total<=60"), Budget.parse("total<=200")]
    loaded = [processor.load_media(one, budgets=[cap]) for one, cap in zip(samples, caps, strict=True)]
    costs = processor.expand(
        processor.batch(samples, loaded, for_training=False), [caps], left_padding=True
    ).token_counts
    first, second = (sum(cost.tokens for cost in row) for row in costs)
    assert 30 < first <= 60 < second <= 200
