"""What the synthetic LLM reads, how bags become embeddings, and what the shipped LLM can do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import mllm.synthetic
from mllm.synthetic.images.questions import COLUMN_WORDS, ROW_WORDS, Question
from mllm.synthetic.images.questions import KINDS as QUESTION_KINDS
from mllm.synthetic.images.scenes import Scene, SceneObject
from mllm.synthetic.pretrain.blurred_text import BAG_WORDS
from mllm.synthetic.pretrain.examine_llm import SCENE_PAPERS, scene_accuracy, sentence_wer
from mllm.synthetic.pretrain.initialise_llm import PREVIOUS_HEADS, initialise
from mllm.synthetic.pretrain.llm import collate, embed, llm_config, pretrain_llm, sample_batch
from mllm.synthetic.pretrain.text import KINDS, PretrainingText, Spoken, speak_sentences
from mllm.synthetic.speech.phones import PHONE_IDS
from mllm.synthetic.tokenizer import build_tokenizer, word_id

ASSETS = Path(mllm.synthetic.__file__).parent / "assets"
SCENE = Scene((SceneObject("circle", "red", "k", column=1, row=4),), "night", "brown")
# "lay": silence, l, ey, silence
LAY = Spoken("lay", np.array([PHONE_IDS[p] for p in ("sil", "l", "ey", "sil")]), np.array([0.1, 0.2, 0.4, 0.56]))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def text(tokenizer) -> PretrainingText:
    return PretrainingText(tokenizer, [LAY], split="train", seed=0)


def words(tokenizer, example) -> str:
    """A sequence as text, a star for every bag."""
    places = set(example.bag_positions)
    tokens = tokenizer.convert_ids_to_tokens(example.ids)
    return "".join("*" if i in places else t for i, t in enumerate(tokens)).replace("Ġ", " ")


QUESTIONS = [Question("colour", "what colour is the circle?", "red"), Question("time", "is it day or night?", "night")]
QUESTIONS_TEXT = " what colour is the circle? red</s> is it day or night? night</s>"


def test_a_scene_is_told_or_shown_and_asked(text, tokenizer) -> None:
    sample = text.sample("scene_text", scene=SCENE, questions=QUESTIONS)
    assert words(tokenizer, sample) == "<s> night, ground brown; circle red k x2 y5." + QUESTIONS_TEXT
    shown = text.sample("scene_bags", scene=SCENE, questions=QUESTIONS, side=2)
    assert words(tokenizer, shown) == "<s><image>****</image>" + QUESTIONS_TEXT
    assert [(kind, tokenizer.decode(shown.ids[at])) for kind, at in shown.answers] == [
        ("colour", "red"),
        ("time", "night"),
    ]
    assert [sample.ids[i] for i, weight in enumerate(sample.weights) if weight == 1.0] == [
        word_id(tokenizer, "red"),
        word_id(tokenizer, "night"),
    ]


def test_speech_is_heard_seen_or_both_and_written_down(text, tokenizer) -> None:
    said = " transcribe speech to text. lay</s>"
    assert words(tokenizer, text.speech(LAY, ("phones",), noise=0.0)) == "<s><audio> _l _ey</audio>" + said
    heard = text.speech(LAY, ("audio",), noise=0.0, audio_rate=8)  # 28 frames at 50 Hz
    assert words(tokenizer, heard) == "<s><audio>***</audio>" + said
    both = text.speech(LAY, ("audio", "video"), noise=0.0, audio_rate=16, video_rate=5)  # 28 and 14 frames
    assert words(tokenizer, both) == "<s><audio>*</audio><video>**</video> transcribe speech and video to text. lay</s>"
    seen = text.speech(LAY, ("video",), noise=0.0, video_rate=2)
    assert words(tokenizer, seen) == "<s><video>" + "*" * 7 + "</video> transcribe video to text. lay</s>"


def test_sequences_are_a_function_of_the_seed(tokenizer) -> None:
    def ids_of(seed: int) -> list[list[int]]:
        text = PretrainingText(tokenizer, [LAY], split="train", seed=seed)
        return [example.ids for example in sample_batch(text, 0.5, 1000)]

    assert ids_of(1) == ids_of(1) != ids_of(2)


def test_a_batch_has_about_the_tokens_asked_for_at_every_stage(tokenizer) -> None:
    text = PretrainingText(tokenizer, [LAY], split="train", seed=0)
    for progress in (0.0, 0.5, 1.0):
        sizes = [sum(len(example.ids) for example in sample_batch(text, progress, 3000)) for _ in range(4)]
        assert np.mean(sizes) == pytest.approx(3000 * 1.03, rel=0.12)


def hints(tokenizer, example) -> list[tuple[str, str]]:
    """The words at which the example has hints, a star for a bag, and the words of the hints."""
    places = set(example.bag_positions)
    ids = [(example.ids[position], word) for position, word in example.hints]
    stars = [position in places for position, _ in example.hints]
    pairs = [tuple(tokenizer.convert_ids_to_tokens(list(pair))) for pair in ids]
    return [("*" if star else at[1:], word[1:]) for star, (at, word) in zip(stars, pairs, strict=True)]


def test_hints_say_where_things_are_and_how_many_there_were_so_far(tokenizer) -> None:
    text = PretrainingText(tokenizer, [], split="train", seed=0)
    others = (SceneObject("star", "red", "m", 3, 2), SceneObject("cross", "blue", "m", 0, 0))
    scene = Scene((*SCENE.objects, *others), "day", "pink")
    places = [QUESTIONS[0], Question("relation", "is the circle above the star?", "no")]
    questions = [("circle", "x2"), ("circle", "y5"), ("star", "x4"), ("star", "y3")]
    hinted = hints(tokenizer, text.sample("scene_text", scene=scene, questions=places))
    assert sorted(hinted[:3]) == [("blue", "one"), ("red", "one"), ("red", "two")]
    assert hinted[3:] == questions
    shown = text.sample("scene_bags", scene=scene, questions=places, side=8)
    assert hints(tokenizer, shown) == [("*", "one"), ("*", "one"), ("*", "two"), *questions]
    assert [position - 2 for position, _ in shown.hints[:3]] == [0, 2 * 8 + 3, 4 * 8 + 1], "behind <s> and <image>"
    assert hints(tokenizer, text.sample("scene_bags", scene=scene, questions=places, side=4)) == questions
    batch = collate([shown, shown])
    hinted = [(position, word) for position, word in shown.hints]
    both = hinted + [(position + len(shown.ids), word) for position, word in hinted]
    assert list(zip(batch.hint_positions.tolist(), batch.hint_ids.tolist(), strict=True)) == both


def test_counting_is_practised_most_in_the_middle(tokenizer) -> None:
    text = PretrainingText(tokenizer, [], split="train", seed=0)
    fractions = []
    for text.progress in (0.0, 0.5, 1.0):
        kinds = [kind for _ in range(60) for kind, _ in text.sample("scene_text").answers]
        fractions.append(kinds.count("count") / len(kinds))
    assert fractions[1] > 0.6 > 0.4 > fractions[2] > fractions[0]


def test_an_unknown_kind_is_refused(text) -> None:
    with pytest.raises(ValueError, match="'poem'; allowed: scene_text, scene_bags, phones"):
        text.sample("poem")


def test_the_first_layer_begins_by_looking_back_and_places_in_order(tokenizer) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llm_config(tokenizer))
    initialise(model, tokenizer)
    model.set_attn_implementation("eager")
    ids = torch.randint(20, len(tokenizer), (1, 40))
    attention = model(ids, output_attentions=True).attentions[0][0]  # (heads, 40, 40)
    for weights, (distance, _) in zip(attention, PREVIOUS_HEADS, strict=True):
        looked_back = 39 - weights[39].topk(2 if distance % 1 else 1).indices.float().mean()
        assert float(looked_back) == distance
    table = model.model.embed_tokens.weight
    for words in (COLUMN_WORDS, ROW_WORDS):
        places = torch.stack([table[word_id(tokenizer, word)] for word in words])
        direction = places[-1] - places[0]
        ranks = (places @ direction).argsort()
        assert float(torch.corrcoef(torch.stack([ranks.float(), torch.arange(8.0)]))[0, 1]) > 0.5


def test_a_bag_is_the_weighted_sum_of_its_words_and_padding_is_last(text, tokenizer) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llm_config(tokenizer))
    table = model.get_input_embeddings().weight
    examples = [text.sample(kind) for kind in KINDS]
    batch = collate(examples)
    embedded = embed(model, batch, torch.tensor([word_id(tokenizer, word) for word in BAG_WORDS]))
    for row, example in enumerate(examples):
        bags = iter(np.concatenate(example.bags)) if example.bags else iter(())
        for position, token in enumerate(example.ids):
            expected = table[token]
            if position in example.bag_positions:
                bag = next(bags)
                expected = sum(float(bag[i]) * table[word_id(tokenizer, BAG_WORDS[i])] for i in np.flatnonzero(bag))
            torch.testing.assert_close(embedded[row, position], expected, atol=1e-5, rtol=1e-4)
        assert not batch.weights[row, len(example.ids) :].any()


@pytest.mark.slow
def test_pretraining_leaves_a_checkpoint_and_the_log_of_its_run(tmp_path) -> None:
    pytest.importorskip("espeakng_loader")
    results = pretrain_llm(tmp_path, seed=1, steps=3, tokens_per_step=400, num_utterances=20, examine_every_steps=3)
    rows = [json.loads(line) for line in (tmp_path / "log_llm.jsonl").read_text().splitlines()]
    assert rows[0]["seed"] == 1
    assert [row["step"] for row in rows[1:]] == [3]
    assert results.items() <= rows[-1].items()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == model.config.vocab_size


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "llm", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(ASSETS / "llm")


def test_the_shipped_tokenizer_is_the_one_that_is_built(shipped, tokenizer) -> None:
    assert shipped[1].get_vocab() == tokenizer.get_vocab()
    assert shipped[1].pad_token == "<pad>"


@pytest.mark.slow
def test_the_shipped_llm_answers_questions_on_descriptions_of_held_out_scenes(shipped) -> None:
    """A question of every kind on scenes of the test split, which no pre-training has read."""
    model, tokenizer = shipped
    scores = scene_accuracy(model, PretrainingText(tokenizer, [], split="test", seed=42), "scene_text", 100)
    assert set(scores) == set(QUESTION_KINDS)
    assert min(scores.values()) >= 95.0, scores


@pytest.mark.slow
def test_the_shipped_llm_reads_bags_and_phones(shipped) -> None:
    model, tokenizer = shipped
    kind, settings = SCENE_PAPERS["bags64"]
    scores = scene_accuracy(model, PretrainingText(tokenizer, [], split="test", seed=43), kind, 40, **settings)
    assert min(scores[kind] for kind in ("time", "ground", "colour", "letter", "relation")) >= 95.0, scores
    assert scores["count"] >= 70.0, scores
    pytest.importorskip("espeakng_loader")
    text = PretrainingText(tokenizer, speak_sentences(100, split="test", seed=44), split="test", seed=44)
    assert sentence_wer(model, text, ("phones",), noise=0.0) <= 5.0
