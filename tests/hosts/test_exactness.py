"""A host at its full budget answers as before, bit for bit; below it, as the host itself on fewer features."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hosts
import torch
import transformers as hf

from mllm.budget import Budget
from mllm.checkpoints import adoption
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.media import Audio
from mllm.training import host_answers

FAST = ["llava", "idefics3", "qwen3_vl", "gemma3", "qwen2_audio"]
FAMILIES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in tiny_hosts.HOSTS]
OF_IMAGES = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name, host in tiny_hosts.HOSTS.items()
    if host.medium == "image"
]
LINEAR = ("qwen3_5", "qwen3_5_moe")
"""Families some layers of which have linear attention."""
IN_TILES = [name for name in OF_IMAGES if getattr(name, "values", [name])[0] not in tiny_hosts.KEEP_SHAPE]


def reduced_budgets(processor: Any) -> list[str]:
    space = processor.space.media[processor.host.medium]
    return [f"{space.medium}={amount}" for amount in space.trained[1:]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_host_at_full_is_the_host_bit_for_bit_and_below_it_the_host_on_pooled_features(
    folders: Any, family: str, dtype: str
) -> None:
    adoption.probe(folders(family), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_never_touches_the_full_budget(adopted: Any, family: str, dtype: str) -> None:
    model, processor, host = adopted(family, dtype)
    raw = tiny_hosts.medium(family)
    theirs = adoption.host_inputs(processor, raw, host)
    ours = tiny_hosts.inputs(processor, [raw])
    assert ours["scale_ids"].tolist() == [-1]
    with torch.no_grad():
        assert torch.equal(model(**ours).logits, host(**theirs).logits)
        for budget in reduced_budgets(processor):
            reduced = tiny_hosts.inputs(processor, [raw], budget)
            without = host(**adoption.oracle_inputs(model, host, reduced, theirs)).logits
            assert not torch.equal(model(**reduced).logits, without)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_at_full_are_those_of_the_hosts_own_pipeline(adopted: Any, family: str, beams: int) -> None:
    model, processor, host = adopted(family)
    raw = tiny_hosts.medium(family, seed=1)
    options = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False}
    theirs = adoption.host_inputs(processor, raw, host)
    expected = host.generate(**theirs, **options)[:, theirs["input_ids"].shape[1] :]
    ours = tiny_hosts.inputs(processor, [raw])
    assert torch.equal(model.generate(**ours, **options)[:, ours["input_ids"].shape[1] :], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_at_different_budgets_share_a_batch_and_answer_as_alone(adopted: Any, family: str) -> None:
    model, processor, _host = adopted(family)
    raws = [tiny_hosts.medium(family, seed=seed) for seed in (0, 1, 2)]
    budgets = ["", *reduced_budgets(processor)[:2]]
    together = mixed(processor, raws, budgets)
    assert together["scale_ids"].tolist() == [-1, 0, 0]
    with torch.no_grad():
        logits = model(**together).logits[:, -1]
        alone = [
            model(**tiny_hosts.inputs(processor, [raw], budget)).logits[0, -1]
            for raw, budget in zip(raws, budgets, strict=True)
        ]
    torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-4, atol=2e-5)


def mixed(processor: Any, raws: list[Any], budgets: list[str]) -> dict[str, torch.Tensor]:
    """One padded batch, a budget per row."""
    medium = processor.host.medium
    wrapped = raws if medium == "image" else [(raw, 16_000) for raw in raws]
    loaded = [[processor.transform(medium, value)] for value in map(raw_of, wrapped)]
    messages = (Message("user", (Media(medium, "x"), Text("what is this?"))),)
    samples = [Sample(f"row{number}", messages, task="test") for number in range(len(raws))]
    batch = processor.batch(samples, loaded, for_training=False)
    return processor.expand(batch, [[Budget.parse(budget) for budget in budgets]], left_padding=True).inputs


def raw_of(value: Any) -> Any:
    return Audio(*value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_row_of_a_mixed_training_batch_has_no_gradient(adopted: Any, family: str) -> None:
    model, processor, _host = adopted(family)
    raws = [tiny_hosts.medium(family, seed=seed) for seed in (0, 1)]
    inputs = mixed(processor, raws, ["", reduced_budgets(processor)[-1]])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weights = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    for weight in weights:
        weight.requires_grad_(True)
    logits = model(**inputs).logits
    of_full = torch.autograd.grad(logits[0].square().sum(), weights, retain_graph=True)
    of_reduced = torch.autograd.grad(logits[1].square().sum(), weights)
    assert not any(gradient.any() for gradient in of_full)
    assert all(gradient.any() for gradient in of_reduced)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_a_pass_without_a_cache(adopted: Any, family: str) -> None:
    model, processor, _host = adopted(family)
    raw, budgets = tiny_hosts.medium(family), reduced_budgets(processor)
    # At full both are the host's own. Linear attention reads a prompt in chunks and what follows token by token, and
    # the library's two ways may differ there by more than the last digits of a product.
    cached, whole = tiny_hosts.cached_and_whole(model, tiny_hosts.inputs(processor, [raw]))
    atol = max(2e-5, 2 * float((cached - whole).abs().max())) if family in LINEAR else 2e-5
    assert atol < 2e-4
    cached, whole = tiny_hosts.cached_and_whole(model, tiny_hosts.inputs(processor, [raw], budgets[0]))
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_medium_reaches_the_answer_at_the_smallest_budget(adopted: Any, family: str) -> None:
    model, processor, _host = adopted(family)
    budget = reduced_budgets(processor)[-1]
    inputs = [tiny_hosts.inputs(processor, [tiny_hosts.medium(family, seed=seed)], budget) for seed in (0, 1)]
    assert torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
    with torch.no_grad():
        first, second = (model(**one).logits[0, -1] for one in inputs)
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("family", IN_TILES)
def test_a_changed_patch_shows_most_at_its_own_soft_token(adopted: Any, family: str) -> None:
    model, processor, _host = adopted(family)
    rows, columns = processor.facts["image"].grid
    (height, width), generator = processor.facts["image"].image_pixels, torch.Generator().manual_seed(0)
    plain = torch.randn(1, 3, height, width, generator=generator).repeat(rows * columns, 1, 1, 1)
    changed, side = plain.clone(), height // rows
    for cell in range(rows * columns):
        top, left = side * (cell // columns), side * (cell % columns)
        changed[cell, :, top : top + side, left : left + side] += 2.0
    sizes = None
    if processor.host.family.images.reads_maps:  # each image as a thumbnail
        plain, changed = plain.flatten(1)[:, None], changed.flatten(1)[:, None]
        sizes = torch.tensor([[rows, columns, 1, 1, rows, columns]]).expand(len(plain), -1)
    with torch.no_grad():
        before, after = (model.model.encode("image", pixels, sizes).values for pixels in (plain, changed))
    assert (after - before).norm(dim=-1).argmax(dim=1).tolist() == list(range(rows * columns))


@pytest.mark.parametrize("family", OF_IMAGES)
@pytest.mark.parametrize("size", [(24, 24), (30, 40), (60, 20), (100, 100)])
def test_tiles_and_patches_are_counted_by_size_as_the_hosts_processor_makes_them(
    adopted: Any, family: str, size: tuple[int, int]
) -> None:
    _, processor, _ = adopted(family)
    item = processor.host(tiny_hosts.image(*size))
    assert item.ids.count(processor.host.placeholder_id) == (item.num_images if item.tiles is None else 1)
    known = processor.host.size_of(*size)
    assert (known.num_images, known.num_tags) == (item.num_images, item.num_tags)
    assert known.grid[0] * known.grid[1] == item.tokens
    patches = processor.host.family.patches
    if patches is not None and patches.grid_of is not None:
        grid_of = patches.grid_of(processor.host.processor.image_processor, processor.host.config, *size)
        assert grid_of == item.grid


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in ("llava", "idefics3", "qwen3_vl")])
def test_conversations_of_several_turns_and_images_are_prompts_of_the_hosts_own_pipeline(
    adopted: Any, family: str
) -> None:
    model, processor, host = adopted(family)
    first, second, third = (tiny_hosts.image(30 + 20 * seed, 40, seed=seed) for seed in range(3))
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is <image> this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat </s>"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "and these?"}]},
    ]
    ours = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, images=[first, second, third]
    )
    placeholders = ours["input_ids"] == processor.host.placeholder_id
    items = [processor.host(raw) for raw in (first, second, third)]
    # What people typed is none.
    assert int(placeholders.sum()) == sum(item.num_images * item.tokens for item in items)
    # The host's own pipeline would take "<image>" and "</s>" for what they look like, so it is asked without.
    plain = json.loads(json.dumps(chat).replace("<image> ", "").replace(" </s>", ""))
    text = processor.tokenizer.apply_chat_template(
        plain, chat_template=processor.host.chat_template, tokenize=False, add_generation_prompt=True
    )
    theirs = processor.host.processor(text=[text], images=[first, second, third], return_tensors="pt")
    ours = processor.apply_chat_template(
        plain, tokenize=True, return_dict=True, add_generation_prompt=True, images=[first, second, third]
    )
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**ours).logits, host(**theirs).logits)


RATES_HZ = {"qwen2_audio": 25.0, "glmasr": 12.5, "granite_speech": 10.0}


@pytest.mark.parametrize(
    "family", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RATES_HZ]
)
def test_a_clip_has_so_many_soft_tokens_per_second(adopted: Any, family: str) -> None:
    host = adopted(family)[1].host
    silence = np.zeros(40 * 16_000, dtype=np.float32)
    for seconds in (6, 24):
        assert host(Audio(silence[: seconds * 16_000], 16_000)).tokens == seconds * RATES_HZ[family]
    with pytest.raises(ValueError, match="the host takes audio at 16000 Hz, got 8000 Hz"):
        host(Audio(silence, 8_000))
    if family == "qwen2_audio":
        with pytest.raises(ValueError, match=r"lasts 40\.00 seconds, and the host's processor would cut it at 30$"):
            host(Audio(silence, 16_000))
        with pytest.raises(ValueError, match=r"a clip of 0\.01 seconds is too short for the host"):
            host(Audio(silence[:160], 16_000))


def test_a_llava_with_a_siglip_encoder_is_itself_at_full(tmp_path: Path) -> None:
    model, processor = tiny_hosts.make_host(tiny_hosts.SIGLIP_LLAVA, hf.LlavaForConditionalGeneration)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        adoption.probe(str(tmp_path), dtype=dtype)


@pytest.mark.slow
def test_a_paligemma_reads_its_question_both_ways_and_its_answer_one(adopted: Any, tmp_path: Path) -> None:
    model, processor, host = adopted("paligemma")
    raw, question = tiny_hosts.image(), "what is\nthis?"  # a question may have several lines
    turns = (Message("user", (Media("image", "x"), Text(question))), Message("assistant", (Text("a red one"),)))
    batch = processor.batch(
        [Sample("row", turns, task="test")], [[processor.transform("image", raw)]], for_training=True
    )
    ours = processor.expand(batch, [[Budget()]], left_padding=False).inputs
    theirs = processor.host.processor(
        text=["<image>" + question], images=[raw], suffix=["a red one"], return_tensors="pt"
    )
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert theirs.pop("labels").ge(0).sum() == len("a red one") + 1
    with torch.no_grad():
        assert torch.equal(model(**ours).logits, host(**theirs).logits)
        theirs["token_type_ids"].zero_()
        assert not torch.equal(model(**ours).logits, host(**theirs).logits)
    for messages, reason in (
        ((*turns, *turns), "it takes one question about an image, and one answer"),
        ((Message("user", (Text("what?"),)),), "it takes one question about an image, and one answer"),
        ((turns[0], Message("assistant", (Text("a\nb"),))), "a paligemma gives answers of one line alone"),
    ):
        with pytest.raises(ValueError, match=reason):
            processor.chat(messages)
    with pytest.raises(ValueError, match=r"a question in both directions, up to its last token$"):
        model.read_prompts(**tiny_hosts.inputs(processor, [raw]))
    line = [ord("a"), 108, ord("b"), 2]
    assert host_answers._first_line(line, [2], processor) == [ord("a"), 2]
    assert host_answers._first_line(line, [2], adopted("llava")[1]) == line
    older, older_processor = tiny_hosts.make_host(tiny_hosts.PALIGEMMA_1, hf.PaliGemmaForConditionalGeneration)
    older.save_pretrained(tmp_path)
    older_processor.save_pretrained(tmp_path)
    assert model.model.language_model.config._attn_implementation == "eager"  # Gemma 2 knows no other
    for dtype in ("float32", "bfloat16"):
        adoption.probe(str(tmp_path), dtype=dtype)


def test_a_host_whose_numbers_differ_is_refused(folders: Any, adopted: Any) -> None:
    model, processor, _ = adopted("llava")
    other, _ = tiny_hosts.make("llava", seed=1)
    with pytest.raises(ValueError, match=r"logits of image 1 at the full budget differ from the host's own by up to"):
        adoption._compare(model, processor, other, tiny_hosts.image(), budgets=("36",), number=0)


def test_a_host_whose_prompts_differ_is_refused(folders: Any, tmp_path: Path) -> None:
    model, processor = tiny_hosts.make("llava")
    processor.patch_size = 8  # what its processor writes is a quarter of what its encoder gives
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="wrote 9 placeholders for 1 tiles of 36 tokens"):
        adoption.probe(str(tmp_path))
