"""Word projectors learn to hear planted words, and are given the embeddings of the LLM for them."""

import logging
import re
from collections import Counter
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from word_lessons import Planted, counted, planted, settings, teach

from mllm.budget import Budget
from mllm.checkpoints.load import load_trainables, save_trainables, trainable_state
from mllm.compressors import WordProjector
from mllm.model.trainables import held_names, set_trainables, trainable_names
from mllm.training.initialization.word_choice import Spelling, choose_words, spell
from mllm.training.initialization.word_start import WordLessons, teach_words


@pytest.fixture(scope="module")
def taught() -> tuple[Any, Any]:
    """A model whose projector was taught, and its processor."""
    return teach(num_steps=300)


def test_words_are_heard_in_captions_that_taught_nothing(taught: tuple[Any, Any]) -> None:
    model, processor = taught
    projector: WordProjector = model.model.compressors["audio"].projectors[0]
    _, rows = planted(range(100, 130))
    features, _ = model.model.audio_tower(
        torch.stack([parts[0].values for parts, _ in rows]), torch.full((len(rows),), 32 * 320)
    )
    best = projector.scores(features).argmax(-1)[:, :16].tolist()
    spelled: Spelling = choose_words(counted(processor, range(60)), processor.tokenizer, 20)
    heard = [[word for before, word in pairwise([0, *row]) if word not in (0, before)] for row in best]
    said = [spelled.of(processor.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) for _, answer in rows]
    assert heard == said


def test_words_have_the_embeddings_of_the_llm_at_the_length_that_the_smallest_budget_needs(
    taught: tuple[Any, Any],
) -> None:
    model, processor = taught
    projector = model.model.compressors["audio"].projectors[0]
    spelled = choose_words(counted(processor, range(60)), processor.tokenizer, 20)
    table = model.get_input_embeddings().weight.detach()[spelled.words]
    matrix = projector.word_table.said.weight.detach().T
    scale = (matrix[1:].norm() / table.norm()).item()
    torch.testing.assert_close(matrix[1:], scale * table)
    torch.testing.assert_close(matrix[0], table.mean(0))
    assert scale > 1  # soft tokens of 8 features, of which half hold nothing


def test_what_is_heard_does_not_depend_on_how_far_a_batch_is_filled_up() -> None:
    projector = WordProjector(in_size=8, hidden_size=16, num_words=5, stretch_frames=4, out_size=6)
    torch.nn.init.normal_(projector.linear.bias)
    features = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    longer = torch.cat([features, torch.zeros(2, 6, 8)], dim=1)
    torch.testing.assert_close(projector(longer)[:, :7], projector(features))
    assert projector.count_stretches(torch.tensor([1, 4, 5, 8])).tolist() == [1, 1, 2, 2]


def test_a_caption_with_more_words_than_it_is_long_is_counted_and_teaches_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Row 2 has three words and one frame, which is less than a token of the largest budget too."""
    caplog.set_level(logging.WARNING, "mllm")
    taught = []
    for rows in ([0, 1], [0, 1, 2]):
        model, processor = tiny.model(settings()), tiny.processor(settings())
        model.model.audio_tower = Planted()
        samples, loaded = planted(range(60))
        media = [loaded[row][0] for row in rows]
        if 2 in rows:
            media[2] = [tiny.LoadedMedia("audio", media[2][0].values, 320)]
        batch = processor.batch([samples[row] for row in rows], media, for_training=True)
        teach_words(
            model,
            processor,
            samples,
            repeat({"batch": batch}),
            lessons=WordLessons(num_steps=4, learning_rate=1e-2, seed=0),
        )
        taught.append(model.model.compressors.state_dict())
    assert "audio: 2 times a caption had more words than features, and taught nothing" in caplog.messages
    for name, value in taught[0].items():
        torch.testing.assert_close(taught[1][name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_a_stretch_becomes_the_mean_of_its_words() -> None:
    projector = WordProjector(in_size=3, hidden_size=4, num_words=2, stretch_frames=1, out_size=5)
    features = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(1))
    heard = projector.norm(projector.linear(features) + projector.mlp(features))
    scores = torch.cat([projector.nothing(heard), projector.word_table.heard(heard)], -1)
    expected = scores.exp() / scores.exp().sum(-1, keepdim=True) @ projector.word_table.said.weight.T
    torch.testing.assert_close(projector(features), expected)


def test_rare_tokens_are_spelled_by_common_ones() -> None:
    assert spell("there", {"t": 3.0, "h": 3.0, "e": 3.0, "r": 3.0, "the": 2.0, "re": 2.5}) == ["the", "re"]
    tokenizer = tiny.TOKENIZER
    texts = [" red square", " red circle", " red", " blue"]
    counts = Counter(token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"])
    strings = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in counts}
    num_words = len({character for string in strings.values() for character in string}) + 8
    spelling = choose_words(counts, tokenizer, num_words)
    assert len(set(spelling.words)) == num_words
    for token, string in strings.items():
        words = [str(tokenizer.convert_ids_to_tokens(spelling.words[number - 1])) for number in spelling.of([token])]
        assert "".join(words) == string
    [red] = tokenizer(" red", add_special_tokens=False)["input_ids"]
    assert spelling.of([red]) == [1 + spelling.words.index(red)]  # the commonest is a word


def test_too_many_and_too_few_words_are_refused_by_the_key() -> None:
    processor = tiny.processor(settings())
    counts = counted(processor, range(60))
    with pytest.raises(ValueError, match=r"projector\.num_words is 3; the captions have \d+ characters"):
        choose_words(counts, processor.tokenizer, 3)
    with pytest.raises(
        ValueError, match=r"projector\.num_words is 500; the captions hold \d+ tokens; allowed: as many"
    ):
        choose_words(counts, processor.tokenizer, 500)


def test_the_smallest_budget_is_as_long_as_words(taught: tuple[Any, Any]) -> None:
    model, processor = taught
    matrix = model.model.compressors["audio"].projectors[0].word_table.said.weight.data
    of_nothing, matrix[:, 0] = matrix[:, 0].clone(), 0.0
    _, rows = planted(range(40))
    batch = tiny.batch(processor, rows, for_training=True)
    inputs = processor.expand(batch, [[Budget.parse("audio=/8")] * 40], left_padding=False).inputs
    embeds = model.model.embed(inputs["input_ids"], inputs).detach()
    matrix[:, 0] = of_nothing
    soft = embeds[inputs["input_ids"] == processor.placeholder_ids["audio"]]
    spelled = choose_words(counted(processor, range(60)), processor.tokenizer, 20)
    words = model.get_input_embeddings().weight.detach()[spelled.words]
    torch.testing.assert_close(soft.square().sum(1).mean(), words.square().sum(1).mean(), rtol=1e-2, atol=0.0)


def test_a_checkpoint_without_a_table_of_words_is_refused_beside_sharded_values_too(tmp_path: Path) -> None:
    """With DeepSpeed tables are read alone, and what trains is left to it."""
    model = tiny.model(settings())
    set_trainables(model)
    held, state = held_names(model), {name: value.clone() for name, value in trainable_state(model).items()}
    assert len(held) == 3
    assert not {*held} & {*trainable_names(model)}
    assert {*held} < state.keys()
    save_trainables({name: value + 1 for name, value in state.items()}, tmp_path / "whole")
    load_trainables(model, tmp_path / "whole", held, beside=trainable_names(model))
    moved = {name for name, value in trainable_state(model).items() if not value.equal(state[name])}
    assert moved == {*held}
    for name in held:
        save_trainables({key: value for key, value in state.items() if key != name}, tmp_path / "less")
        with pytest.raises(ValueError, match=rf"does not fit the model: missing {re.escape(name)}$"):
            load_trainables(model, tmp_path / "less", held, beside=trainable_names(model))
    save_trainables({**state, "other": torch.ones(1)}, tmp_path / "more")
    with pytest.raises(ValueError, match=r"does not fit the model: unexpected other$"):
        load_trainables(model, tmp_path / "more", held, beside=trainable_names(model))
