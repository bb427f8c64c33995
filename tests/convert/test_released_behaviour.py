"""`released_behaviour`: off, a clip does not see its batch mates; on, batches are what the released AVSR code makes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import WavLMConfig

from mllm.budget import Budget
from mllm.checkpoints.build import build
from mllm.checkpoints.load import load, save_run
from mllm.config.medium import AudioEncoderConfig
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.encoders import build_encoder, encoder_facts
from mllm.encoders.audio import released_frames
from mllm.model.trainables import set_trainables
from mllm.processing.processor import LoadedMedia

BUDGET = Budget.parse("audio=/4,video=/2")
LENGTHS = {"audio": (40, 28), "video": (10, 6)}


@pytest.fixture(scope="module", params=[False, True], ids=["off", "on"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Any, Any]:
    """The switch, and a model and a processor that were saved and loaded with it."""
    folder: Path = tmp_path_factory.mktemp("parts")
    config = tiny.settings_on(tiny.write_parts(folder / "parts"), ("audio", "video"))
    config = replace(config, chat_format="avsr", released_behaviour=request.param)
    model, processor = build(config)
    set_trainables(model)
    save_run(model, processor, folder / "run")
    return request.param, *load(folder / "run")


def clips(number: int, *, padded: bool = False) -> list[LoadedMedia]:
    """Audio and lips of a row; `padded` with what stands behind them in a batch, as if that were theirs."""
    audio, lips = (tiny.random_media(medium, LENGTHS[medium][number], seed=number) for medium in ("audio", "video"))
    if not padded:
        return [audio, lips]
    silence = torch.zeros(LENGTHS["video"][0] - lips.raw_length, *lips.values.shape[1:])
    audio = replace(audio, raw_length=LENGTHS["audio"][0] * 320)  # its window holds silence behind it already
    return [audio, replace(lips, values=torch.cat([lips.values, silence]), raw_length=LENGTHS["video"][0])]


@torch.no_grad()
def logits(model: Any, processor: Any, rows: list[list[LoadedMedia]]) -> list[Tensor]:
    """Logits of each row up to where the shortest of all ends, its transcript last."""
    user = Message("user", (Media("audio", "x"), Media("video", "x"), Text("red")))
    samples = [Sample(f"row{i}", (user, Message("assistant", (Text("blue"),))), task="") for i in range(len(rows))]
    batch = processor.batch(samples, rows, for_training=True)
    expanded = processor.expand(batch, [[BUDGET] * len(rows)], left_padding=False)
    ends = [int((row != -100).nonzero().max()) + 1 for row in expanded.labels]
    return [row[:end] for row, end in zip(model(**expanded.inputs).logits, ends, strict=True)]


def test_a_batch_equals_its_rows_alone_or_padded_to_the_longest(case: tuple[bool, Any, Any]) -> None:
    is_released, model, processor = case
    together = logits(model, processor, [clips(0), clips(1)])
    alone = [logits(model, processor, [clips(number)])[0] for number in (0, 1)]
    torch.testing.assert_close(together[0], alone[0], rtol=1e-4, atol=1e-5)
    if is_released:
        assert together[1].shape != alone[1].shape
        padded = logits(model, processor, [clips(1, padded=True)])[0]
        torch.testing.assert_close(together[1], padded, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(together[1], alone[1], rtol=1e-4, atol=1e-5)


def test_rows_of_a_training_batch_are_masked_unless_it_is_on(case: tuple[bool, Any, Any]) -> None:
    is_released, _, processor = case
    rows = [([tiny.random_media("audio", 40), "red"], "blue"), ([tiny.random_media("audio", 40), "red"], "blue at two")]
    for for_training in (True, False):
        batch = tiny.batch(processor, rows, for_training=for_training)
        expanded = processor.expand(batch, [[Budget.parse("audio=/4")] * 2], left_padding=not for_training)
        is_masked = bool((expanded.inputs["attention_mask"] == 0).any())
        assert is_masked == (for_training and not is_released)


def test_the_layout_is_that_of_the_released_systems(case: tuple[bool, Any, Any]) -> None:
    _, _, processor = case
    rows = [([tiny.random_media("audio", 40), tiny.random_media("video", 10), "red"], "blue")]
    row = tiny.batch(processor, rows, for_training=True).rows[0]
    token = tiny.TOKENIZER
    words = [token(word, add_special_tokens=False)["input_ids"] for word in ("red", "blue")]
    placeholders = [processor.placeholder_ids[medium] for medium in ("audio", "video")]
    assert row.ids == [token.bos_token_id, *placeholders, *words[0], *words[1], token.eos_token_id]  # pyright: ignore
    learned = [*words[1], token.eos_token_id]  # pyright: ignore
    assert row.labels == [-100] * (len(row.ids) - len(learned)) + learned


def test_the_released_cut_is_theirs_to_the_frame() -> None:
    config = tiny.encoder_configs()["audio"]
    config.max_source_positions = 1500
    counts = [1, 319, 320, 7999, 8000, 8320, *range(8000, 40_000, 320), 479_999]
    expected = [max(int(count / 16000 * 50), 25) for count in counts]
    assert [released_frames(count) for count in counts] == expected
    assert released_frames(9280) == 28  # where 9280 // 320 is 29
    block = AudioEncoderConfig(source="", released_cut=True)
    facts = encoder_facts(config, block)
    assert [facts.num_frames(count) for count in counts] == expected
    config.max_source_positions = 50
    encoder: Any = build_encoder("audio", config, block)
    assert encoder.lengths(torch.tensor(counts)).tolist() == expected


def test_the_switch_needs_the_layout_and_whisper() -> None:
    with pytest.raises(ValueError, match="released_behaviour needs chat_format avsr, the released layout; got plain"):
        replace(tiny.settings(("audio",)), released_behaviour=True)
    with pytest.raises(
        ValueError, match=r"model.audio.encoder.released_cut is True .* a wavlm; it is about Whisper's window"
    ):
        encoder_facts(WavLMConfig(), AudioEncoderConfig(source="", released_cut=True))
