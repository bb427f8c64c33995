"""Omni-AVSR against what its released code computed: a released file, the command, and what the run folder gives."""

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rebuild import Golden
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor

from mllm.budget import Budget
from mllm.checkpoints.load import load
from mllm.cli import main
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.media import Audio
from mllm.processing.processor import LoadedMedia

GOLDEN = Golden.read("omni_avsr")
FACTS = GOLDEN.facts
VARIANTS = list(FACTS["layouts"])
QUICK = ("S/avg-pooling", "T/stack", "ST/avg-pooling")
"""Variants that every run of the tests compares; the others, which hold the same in other pairs, are slow."""
TASKS = {"audio": ("audio",), "video": ("video",), "audiovisual": ("audio", "video")}
TABLE = "llm.model.embed_tokens.weight"
SPECIAL = {token_id: token for token, token_id in FACTS["special_tokens"].items()}


def rates_of(variant: str) -> list[tuple[int, int]]:
    """Pairs of rates (audio, video) of a variant, in the order of its projectors."""
    names = [key.removeprefix(f"{variant}/").split("/") for key in FACTS["results"] if key.startswith(f"{variant}/")]
    pairs = [name[0][1:].split("v") for name in names if name[-1] == "losses"]
    return [(int(audio), int(video)) for audio, video in pairs]


def words(ids: Sequence[int]) -> str:
    """The text that stands for ids; what is special has no place in it."""
    return " ".join(f"w{token_id}" for token_id in ids if token_id not in SPECIAL)


@cache
def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    return GOLDEN.state({name: list(shape)})[name]


def released_state(variant: str) -> dict[str, Tensor]:
    layout = FACTS["layouts"][variant]
    state = {name: weight(name, tuple(shape)) for name, shape in layout.items()}
    if FACTS["llm_config"]["tie_word_embeddings"]:
        state["llm.lm_head.weight"] = state[TABLE]
    return state | {f"prompt_{task}": state[TABLE][ids][None] for task, ids in FACTS["prompts"].items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Configs, tokenizer and feature extractor that the checkpoint does not hold."""
    folder = tmp_path_factory.mktemp("sources")
    text = LlamaConfig(**FACTS["llm_config"])
    vocabulary = {SPECIAL.get(token_id, f"w{token_id}"): token_id for token_id in range(text.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"bos_token": SPECIAL[text.bos_token_id], "eos_token": SPECIAL[text.eos_token_id], "pad_token": "<pad>"}
    extra = [token for token in SPECIAL.values() if token not in special.values()]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=extra, **special)
    fast.save_pretrained(folder / "llm")
    text.save_pretrained(folder / "llm")
    whisper = WhisperConfig(**FACTS["whisper_config"])
    whisper.save_pretrained(folder / "whisper")
    seconds = whisper.max_source_positions // 50
    extractor = WhisperFeatureExtractor(feature_size=whisper.num_mel_bins, chunk_length=seconds)
    extractor.save_pretrained(folder / "whisper")
    return {name: str(folder / name) for name in ("llm", "whisper")}


@pytest.fixture(
    scope="module",
    params=[variant if variant in QUICK else pytest.param(variant, marks=pytest.mark.slow) for variant in VARIANTS],
)
def case(request: pytest.FixtureRequest, sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The variant, and the model and the processor of its run folder."""
    folder: Path = tmp_path_factory.mktemp("omni")
    torch.save(released_state(request.param), folder / "released.pt")
    lora = FACTS["lora"]
    audio, video = (list(dict.fromkeys(rates)) for rates in zip(*rates_of(request.param), strict=True))
    options = {
        **sources,
        "out": str(folder / "run"),
        "audio_rates": audio,
        "video_rates": video,
        "video_heads": FACTS["av_hubert_config"]["encoder_attention_heads"],
        "video_norms_first": FACTS["av_hubert_config"]["layer_norm_first"],
        "video_scaling": lora["av_hubert"]["scaling"],
        "reduction": lora["llm"]["reduction"],
        "alpha": lora["llm"]["alpha"],
        "normalize_audio": False,
        "released_behaviour": True,
        **{f"prompt_{task}": words(ids) for task, ids in FACTS["prompts"].items()},
    }
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    assert main(["convert", "omni-avsr", str(folder / "released.pt"), *arguments]) == 0
    (folder / "released.pt").unlink()
    return request.param, *load(folder / "run")


@cache
def loaded(processor: Any) -> dict[str, list[LoadedMedia]]:
    """The inputs as the model takes them, by medium."""
    facts = FACTS["inputs"]
    waves = GOLDEN.array(facts["audio"]["name"], facts["audio"]["shape"], facts["audio"]["scale"])
    clips = GOLDEN.array(facts["video"]["name"], facts["video"]["shape"])
    waves = [Audio(np.ascontiguousarray(wave[:, 0].numpy()), 16_000) for wave in waves]
    return {
        "audio": [processor.transform("audio", wave) for wave in waves],
        "video": [LoadedMedia("video", clip, len(clip)) for clip in clips],
    }


def expanded(processor: Any, task: str, rates: Sequence[tuple[int, int]], *, for_training: bool) -> Any:
    """The inputs of a task: all samples with their transcripts, or the first alone to be transcribed."""
    media = loaded(processor)
    rows = FACTS["inputs"]["tokens"] if for_training else FACTS["inputs"]["tokens"][:1]
    samples = [
        Sample(
            f"row{index}",
            (
                Message("user", (*(Media(medium, "x") for medium in TASKS[task]), Text(words(FACTS["prompts"][task])))),  # type: ignore[arg-type]
                Message("assistant", (Text(words(row)),)),
            ),
            task="",
        )
        for index, row in enumerate(rows)
    ]
    items = [[media[medium][index] for medium in TASKS[task]] for index in range(len(rows))]
    batch = processor.batch(samples, items, for_training=for_training)
    budgets = [Budget.parse("audio=/{},video=/{}".format(*pair)) for pair in rates]
    return processor.expand(batch, [[budget] * len(rows) for budget in budgets], left_padding=not for_training)


def assert_golden(result: Tensor, name: str) -> None:
    """Equal where the golden array is a number."""
    expected = GOLDEN.arrays[name]
    assert result.shape == expected.shape, name
    is_number = ~expected.isnan()
    torch.testing.assert_close(
        result[is_number], expected[is_number], rtol=1e-4, atol=1e-4, msg=lambda m: f"{name}: {m}"
    )


@torch.no_grad()
def test_golden_features_and_tokens(case: Any) -> None:
    variant, model, processor = case
    for medium, items in loaded(processor).items():
        values = torch.stack([item.values for item in items])
        if medium == "audio":
            golden_mel = GOLDEN.arrays["whisper_input_features"]
            torch.testing.assert_close(values[..., : golden_mel.shape[-1]], golden_mel, rtol=1e-4, atol=1e-4)
        features = model.model.encode(medium, values, torch.tensor([item.raw_length for item in items]))
        assert_golden(features.values[:, : int(features.lengths.max())], f"{medium}_encoder")
        for rate in sorted({pair[medium == "video"] for pair in rates_of(variant)}):
            counts = features.lengths // rate
            soft = model.model.compress(
                medium,
                features,
                num_tokens=counts,
                rates=torch.full_like(counts, rate),
                max_tokens=int(counts.max()),
            )
            assert_golden(soft, f"{variant.split('/')[1]}/{medium}_tokens/{rate}")


@torch.no_grad()
def test_golden_logits_and_losses(case: Any) -> None:
    """All pairs of rates in one pass; what rows of few tokens are padded with comes behind all that is compared."""
    variant, model, processor = case
    names = ["{}/a{}v{}".format(variant, *pair) for pair in rates_of(variant)]
    num_rows, num_positions = len(FACTS["inputs"]["tokens"]), len(FACTS["inputs"]["tokens"][0])
    losses: dict[str, list[float]] = {name: [] for name in names}
    for task, weight_of_task in zip(TASKS, FACTS["loss_weights"], strict=True):
        made = expanded(processor, task, rates_of(variant), for_training=True)
        logits = model(**made.inputs).logits
        for number, (name, pair) in enumerate(zip(names, rates_of(variant), strict=True)):
            end = expanded(processor, task, [pair], for_training=True).labels.shape[1]
            rows = slice(number * num_rows, (number + 1) * num_rows)
            assert_golden(logits[rows, end - num_positions : end], f"{name}/logits/{task}")
            loss = model.loss_function(logits[rows], made.labels[rows], vocab_size=logits.shape[-1])
            losses[name].append(float(loss) * weight_of_task)
    for name in names:
        assert losses[name] == pytest.approx(FACTS["results"][f"{name}/losses"], rel=1e-4, abs=1e-4)


@torch.no_grad()
def test_golden_transcripts(case: Any) -> None:
    variant, model, processor = case
    keys = [key.split("/") for key in FACTS["results"] if key.startswith(f"{variant}/") and "/beams" in key]
    assert keys
    for task, pair, beams in (key[2:] for key in keys):
        audio, video = pair[1:].split("v")
        made = expanded(processor, task, [(int(audio), int(video))], for_training=False)
        ids = model.generate(
            **made.inputs,
            num_beams=int(beams.removeprefix("beams")),
            max_new_tokens=int(FACTS["inputs"]["generation"].rpartition("=")[2]),
            do_sample=False,
            eos_token_id=FACTS["llm_config"]["eos_token_id"],
            pad_token_id=processor.pad_id,
        )
        new_ids = ids[0, made.inputs["input_ids"].shape[1] :].tolist()
        assert new_ids == FACTS["results"]["/".join([variant, task, pair, beams])], (task, pair, beams)


def test_every_result_is_compared() -> None:
    """Nothing in the files is left out by the names the tests look for."""
    pairs = {variant: rates_of(variant) for variant in VARIANTS}
    losses = {"{}/a{}v{}/losses".format(v, *pair) for v, rates in pairs.items() for pair in rates}
    beams = {key for key in FACTS["results"] if "/beams" in key}
    assert losses | beams == set(FACTS["results"])
    logits = {f"{key.removesuffix('/losses')}/logits/{task}" for key, task in itertools.product(losses, TASKS)}
    tokens = {
        f"{variant.split('/')[1]}/{medium}_tokens/{pair[medium == 'video']}"
        for variant, rates in pairs.items()
        for pair, medium in itertools.product(rates, ("audio", "video"))
    }
    assert logits | tokens | {"audio_encoder", "video_encoder", "whisper_input_features"} == set(GOLDEN.arrays)
