"""The model: padding and batch mates do not matter, one encoding serves many budgets, text alone is the plain LLM."""

import pytest
import tiny
import torch
from tiny_models import BUDGETS, ROWS
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GemmaConfig, Qwen2Config, Qwen3Config

from mllm.adapters import adapters_disabled
from mllm.budget import Budget
from mllm.checkpoints.build import config_of_parts
from mllm.model.configuration import ElasticConfig
from mllm.model.modeling import ElasticForConditionalGeneration

CONFIG = tiny.settings()


@pytest.fixture(scope="module")
def model() -> ElasticForConditionalGeneration:
    return tiny.model(CONFIG)


@pytest.fixture(scope="module")
def made() -> tiny.ElasticProcessor:
    return tiny.processor(CONFIG)


def logits(model: ElasticForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each row, its padding cut away."""
    with torch.no_grad():
        out = model(**inputs).logits
    return [row[mask.bool()] for row, mask in zip(out, inputs["attention_mask"], strict=True)]


@pytest.mark.parametrize("left_padding", [True, False])
def test_a_row_in_a_mixed_batch_equals_the_row_alone(model, made, left_padding: bool) -> None:
    together = made.expand(tiny.batch(made, ROWS), [BUDGETS], left_padding=left_padding).inputs
    if left_padding:
        mask = together["attention_mask"]
        together["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    rows = logits(model, together)
    for index, (row, budget) in enumerate(zip(ROWS, BUDGETS, strict=True)):
        alone = made.expand(tiny.batch(made, [row]), [[budget]], left_padding=False).inputs
        torch.testing.assert_close(rows[index], logits(model, alone)[0], rtol=1e-4, atol=1e-5)


def test_one_encoding_serves_several_budgets(model, made) -> None:
    batch = tiny.batch(made, ROWS)
    budgets = [Budget.parse("image=64,audio=/4,video=/2"), Budget.parse("image=1,audio=/8,video=/5")]
    expanded = made.expand(batch, [[budget] * len(ROWS) for budget in budgets], left_padding=False)
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    rows = logits(model, expanded.inputs)
    handle.remove()
    assert len(calls) == 1
    for number, budget in enumerate(budgets):
        alone = logits(model, made.expand(batch, [[budget] * len(ROWS)], left_padding=False).inputs)
        for index, row in enumerate(alone):
            torch.testing.assert_close(rows[number * len(ROWS) + index], row, rtol=1e-4, atol=1e-5)


def test_soft_tokens_lie_at_their_placeholders(model, made) -> None:
    inputs = made.expand(tiny.batch(made, ROWS), [BUDGETS], left_padding=True).inputs
    embeds = model.model.embed(inputs["input_ids"], inputs)
    for medium in ("image", "audio", "video"):
        keys = [
            key
            for key in inputs
            if key.startswith((medium, f"num_{medium}")) or (medium == "image" and key == "pixel_values")
        ]
        features = getattr(model.model, f"get_{medium}_features")(**{key: inputs[key] for key in keys})
        placed = embeds[inputs["input_ids"] == made.placeholder_ids[medium]]
        torch.testing.assert_close(placed, torch.cat(features.pooler_output))
    text = ~torch.isin(inputs["input_ids"], torch.tensor(list(made.placeholder_ids.values())))
    torch.testing.assert_close(embeds[text], model.get_input_embeddings()(inputs["input_ids"][text]))


def test_loss_is_taken_at_targets_only_and_positions_give_the_same_logits(model, made) -> None:
    expanded = made.expand(tiny.batch(made, ROWS, for_training=True), [BUDGETS], left_padding=False)
    targets = expanded.targets()
    with torch.no_grad():
        whole = model(**expanded.inputs, labels=expanded.labels)
        picked = model(**expanded.inputs, logit_positions=targets.positions).logits
    torch.testing.assert_close(picked, whole.logits.flatten(0, 1)[targets.positions])
    torch.testing.assert_close(torch.nn.functional.cross_entropy(picked, targets.ids), whole.loss)
    answers = [made.tokenizer.encode(f" {answer}", add_special_tokens=False) for _, answer in ROWS]
    expected = [token for ids in answers for token in [*ids, made.tokenizer.eos_token_id]]
    assert targets.ids.tolist() == expected
    assert targets.rows.tolist() == [row for row, ids in enumerate(answers) for _ in range(len(ids) + 1)]


def test_placeholders_without_tokens_are_refused_with_both_counts(model, made) -> None:
    inputs = made.expand(tiny.batch(made, ROWS[:1]), [[Budget.parse("image=4")]], left_padding=False).inputs
    with pytest.raises(ValueError, match="4 image placeholders in the text for 0 image soft tokens"):
        model(input_ids=inputs["input_ids"])
    inputs["num_image_tokens"] = torch.tensor([5])
    with pytest.raises(ValueError, match="4 image placeholders in the text for 5 image soft tokens"):
        model(**inputs)


@pytest.mark.parametrize("config_class", [Qwen2Config, Qwen3Config, GemmaConfig, Gemma2Config, Gemma3TextConfig])
def test_text_alone_is_the_unmodified_llm(config_class) -> None:
    text = config_class(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_config(text).eval()
    config = config_of_parts(
        tiny.settings(["audio"], adapter=False),
        text_config=text,
        encoder_configs={"audio": tiny.encoder_configs()["audio"]},
        placeholder_ids={"audio": 120},
    )
    model = ElasticForConditionalGeneration(config).eval()
    model.model.language_model = plain.model
    model.lm_head = plain.get_output_embeddings()
    ids = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        # A placeholder id beyond the vocabulary is fine: it is never looked up.
        spliced = torch.cat([ids, torch.full((2, 3), 120)], 1)
        media = {"audio_values": torch.randn(2, 80, 100), "audio_lengths": torch.tensor([3840, 3840])}
        out = model(input_ids=spliced, num_audio_tokens=torch.tensor([3, 3]), audio_rates=torch.tensor([4, 4]), **media)
        torch.testing.assert_close(out.logits[:, :11], plain(input_ids=ids).logits)


def test_disabled_adapters_give_the_frozen_llm_bit_for_bit(made) -> None:
    adapted, frozen = tiny.model(CONFIG), tiny.model(tiny.settings(adapter=False))
    inputs = made.expand(tiny.batch(made, ROWS), [BUDGETS], left_padding=False).inputs
    with torch.no_grad():
        plain = frozen(**inputs).logits
        assert not torch.allclose(adapted(**inputs).logits, plain, atol=1e-3)
        with adapters_disabled(adapted):
            assert torch.equal(adapted(**inputs).logits, plain)
        assert not torch.allclose(adapted(**inputs).logits, plain, atol=1e-3)


def test_an_llm_that_scales_its_logits_is_refused() -> None:
    text = tiny.llm_config(logit_scale=0.5)
    with pytest.raises(ValueError, match="logit_scale"):
        ElasticForConditionalGeneration(
            config_of_parts(tiny.settings([]), text_config=text, encoder_configs={}, placeholder_ids={})
        )


GENERATION: dict[str, dict] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
}


def generate(model, made, rows, budgets, **options) -> list[list[int]]:
    inputs = made.expand(tiny.batch(made, rows), [budgets], left_padding=True).inputs
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, disable_compile=True, **options)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def trimmed(ids: list[int], made) -> list[int]:
    """Up to the end of the answer: what follows in a batch is padding."""
    end = made.tokenizer.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids


@pytest.mark.parametrize("name", ["greedy", "beams", "returned beams", "static cache"])
def test_batched_generation_equals_single_with_mixed_budgets(model, made, name: str) -> None:
    options = GENERATION[name]
    together = generate(model, made, ROWS, BUDGETS, **options)
    number = options.get("num_return_sequences", 1)
    for index, (row, budget) in enumerate(zip(ROWS, BUDGETS, strict=True)):
        alone = generate(model, made, [row], [budget], **options)
        part = together[index * number : (index + 1) * number]
        assert [trimmed(ids, made) for ids in part] == [trimmed(ids, made) for ids in alone]


def test_prompt_lookup_gives_the_greedy_answer(model, made) -> None:
    for row, budget in zip(ROWS, BUDGETS, strict=True):
        assert generate(model, made, [row], [budget], prompt_lookup_num_tokens=2) == generate(
            model, made, [row], [budget]
        )


def test_generation_encodes_each_item_once_whatever_the_beams(model, made) -> None:
    items = []
    handle = model.model.audio_tower.register_forward_hook(lambda _, args, __: items.append(len(args[0])))
    generate(model, made, ROWS, BUDGETS, num_beams=3)
    handle.remove()
    assert items == [2]


def test_a_setting_that_nobody_reads_is_refused() -> None:
    values = tiny.config(tiny.settings(("image",))).to_dict()
    values["media"]["image"]["projector"]["hiden_size"] = 8
    with pytest.raises(ValueError, match=r"config.json: unknown key media.image.projector.hiden_size; did you mean"):
        ElasticConfig.from_dict(values)
