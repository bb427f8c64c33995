"""Tokens that the LLM was never trained on have rows of their own, and nothing else of the LLM moves or is missed."""

import dataclasses
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mllm.budget import Budget
from mllm.checkpoints.build import build
from mllm.checkpoints.export import export
from mllm.checkpoints.load import TRAINABLES, load
from mllm.config.model import ModelConfig
from mllm.config.run import DataConfig, FeatureConfig, RunConfig, SamplerConfig, TrainConfig
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.inference.answerer import Answerer, Decoding
from mllm.inference.decoding import generate_options
from mllm.model.trainables import NEW_TOKENS, set_trainables, trainable_names
from mllm.training.optimization import named_groups
from mllm.training.run import train
from mllm.utils.sealing import renew_seal

SPAN = {"span": ["<sound>", "</sound>"]}
KNOWN = len(tiny.TOKENIZER)
# Whether the head is tied, and how many rows the embedding has beyond the tokenizer.
LLMS = {"tied": (True, 0), "untied": (False, 0), "tied spare": (True, 64), "untied spare": (False, 64)}


@dataclasses.dataclass(frozen=True)
class World:
    """An LLM and encoders on disk, audio with words on it, and a run that was trained on them."""

    folder: Path
    parts: dict[str, str]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def table(self) -> torch.Tensor:
        """The embeddings of the LLM's own file."""
        return load_file(Path(self.parts["llm"]) / "model.safetensors")["model.embed_tokens.weight"]

    def settings(self, output: Path, *, model: ModelConfig | None = None, **train: Any) -> RunConfig:
        values = {"max_steps": 4, "save_every": 2, "learning_rate": 0.01, "progress": False, "use_cpu": True, **train}
        return RunConfig(
            model=model or tiny.settings_on(self.parts, ("audio",), audio=SPAN),
            data=DataConfig(train=[str(self.folder / "train.jsonl")], tokens_per_batch=256, max_rows=2, num_workers=0),
            sampler=SamplerConfig(mode="sandwich"),
            train=TrainConfig(out=str(output), **values),
        )


def make_world(folder: Path, *, tied: bool, spare: int) -> World:
    parts = tiny.write_parts(
        folder / "parts", vocab_size=KNOWN + spare, tie_word_embeddings=tied, initializer_range=0.2
    )
    samples = []
    for seed in range(4):
        files = tiny.write_media(folder / "media", seed=seed, seconds=0.4 + 0.08 * seed)
        parts_of = (Media("audio", f"media/{files['audio']}"), Text("what is it?"))
        messages = (Message("user", parts_of), Message("assistant", (Text(f"answer {seed}"),)))
        samples.append(Sample(f"sample{seed}", messages, task="test"))
    write_manifest(folder / "train.jsonl", samples)
    return World(folder, parts)


@pytest.fixture(scope="module", params=LLMS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    tied, spare = LLMS[request.param]
    made = make_world(tmp_path_factory.mktemp("new"), tied=tied, spare=spare)
    train(made.settings(made.run))
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tied LLM without spare rows; nothing is trained yet."""
    return make_world(tmp_path_factory.mktemp("plain"), tied=True, spare=0)


def test_only_the_rows_of_new_tokens_move_and_they_are_saved(world: World) -> None:
    start, _ = build(tiny.settings_on(world.parts, ("audio",), audio=SPAN))
    model, processor = load(world.run)
    ids = [processor.tokenizer.convert_tokens_to_ids(token) for token in SPAN["span"]]
    assert min(ids) >= KNOWN
    assert model.config.new_tokens == dict(zip(SPAN["span"], ids, strict=True))
    saved = load_file(world.run / TRAINABLES)
    assert saved.keys() == set(trainable_names(model))
    rows = saved[NEW_TOKENS]
    assert rows.shape == (2, 32)
    assert rows.equal(model.model.embed_text(torch.tensor([ids]))[0])
    assert (rows - start.model.embed_text(torch.tensor([ids]))[0]).norm(dim=1).min() > 1e-2
    assert model.get_input_embeddings().weight.equal(world.table)
    assert model.lm_head.weight.shape == world.table.shape
    tied = model.config.text_config.tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_an_llm_whose_table_were_longer_would_read_the_same(world: World) -> None:
    """The plain class of transformers, its table resized and the rows put in, on the same ids."""
    model, processor = load(world.run, merge_adapter=True)
    reference = AutoModelForCausalLM.from_pretrained(world.parts["llm"])
    reference.resize_token_embeddings(len(processor.tokenizer) + 64, mean_resizing=False)
    places = list(model.config.new_tokens.values())
    with torch.no_grad():
        reference.get_input_embeddings().weight[places] = model.model.new_tokens.rows
    for name, weight in model.model.language_model.named_parameters():  # the adapter is in it
        if not name.startswith("embed_tokens"):
            reference.model.get_parameter(name).data.copy_(weight)
    ids = torch.tensor([[tiny.TOKENIZER.bos_token_id, places[0], 40, 50, places[1], 60]])
    logits = model(input_ids=ids).logits
    assert logits.shape[-1] == len(world.table)
    wanted = reference(ids).logits[..., : logits.shape[-1]]
    if model.config.text_config.tie_word_embeddings:  # there the reference says the new tokens by their new rows
        logits, wanted = (
            each[..., [i for i in range(len(world.table)) if i not in places]] for each in (logits, wanted)
        )
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def test_the_llms_own_table_is_never_read_for_a_new_token(world: World) -> None:
    model, _ = load(world.run)
    ids = torch.tensor([[*model.config.new_tokens.values(), 5]])
    expected = model(input_ids=ids).logits
    spare = [token_id for token_id in model.config.new_tokens.values() if token_id < len(world.table)]
    assert len(spare) in (0, 2)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.get_input_embeddings().weight.data[spare] = torch.nan
    assert model(input_ids=ids).logits.equal(expected)


def test_an_export_answers_alike_and_never_says_a_mark(world: World, tmp_path: Path) -> None:
    export(world.run, tmp_path / "out")
    merged, processor = load(world.run, merge_adapter=True)
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    batch = tiny.batch(processor, [([tiny.random_media("audio", 37), "what is it?"], "now")])
    inputs = processor.expand(batch, [[_budget("audio=/4")]], left_padding=True).inputs
    assert exported(**inputs).logits.equal(merged(**inputs).logits)
    assert exported.get_input_embeddings().weight.equal(world.table)
    audio = str(world.folder / "media" / "1.wav")
    for beams in (1, 3):
        decoding = Decoding(num_beams=beams, max_new_tokens=8)
        answers = [Answerer(*pair, decoding=decoding)(audio=audio) for pair in ((merged, processor), (exported, again))]
        assert answers[0].text == answers[1].text
    # A model that would say nothing but a mark says something else.
    token_id = merged.config.new_tokens["<sound>"]
    if token_id < len(world.table):
        exported.lm_head.weight = torch.nn.Parameter(exported.lm_head.weight.clone())
        exported.lm_head.weight.data[token_id] *= 1e4
        exported.lm_head.weight.data[token_id + 1] = -exported.lm_head.weight.data[token_id]
        answerer = Answerer(exported, again, decoding=Decoding(max_new_tokens=4))
        options = generate_options(exported, again, answerer.decoding)
        assert {token_id, token_id + 1} <= set(options["suppress_tokens"])
        ids = exported.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert "sound" not in again.tokenizer.decode(ids)


def _budget(text: str) -> Budget:
    return Budget.parse(text)


def test_every_way_of_answering_reads_the_rows(world: World) -> None:
    """Alone and in batches, with shared beginnings, a constant prompt and beams; and without the rows it is another."""
    model, processor = load(world.run)
    folder, names = world.folder / "media", ["1.wav", "3.wav"]
    audios = [str(folder / name) for name in names]
    texts = ["what is it?", "who is speaking and how loud is it?"]
    for beams in (1, 3):
        answerer = Answerer(model, processor, decoding=Decoding(num_beams=beams, max_new_tokens=8))
        alone = [answerer(text, audio=audio).text for audio in audios for text in texts]
        assert [answer.text for audio in audios for answer in answerer.answer_questions(texts, audio=audio)] == alone
        samples = [
            Sample(f"{name} {text}", (Message("user", (Media("audio", name), Text(text))),), "test", root=folder)
            for name in names
            for text in texts
        ]
        kept = Answerer(model, processor, decoding=answerer.decoding, constant_prompt=True)
        for way in (answerer, kept):
            assert [answer.text for answer in way.answer_samples(samples, ["audio=/4"] * 4)] == alone
    inputs = processor.expand(
        tiny.batch(processor, [([tiny.random_media("audio", 37), "what?"], "now")]),
        [[_budget("audio=/4")]],
        left_padding=False,
    ).inputs
    before = model(**inputs).logits
    with torch.no_grad():
        model.model.new_tokens.rows[1] += 1.0
    after = model(**inputs).logits
    places = (inputs["input_ids"][0] == model.config.new_tokens["</sound>"]).nonzero()
    assert before[0, : int(places)].equal(after[0, : int(places)])
    assert not torch.allclose(before[0, int(places) :], after[0, int(places) :])


def test_options_of_generate_that_look_at_the_prompts_ids_find_no_id_behind_the_vocabulary(world: World) -> None:
    model, processor = load(world.run)
    batch = tiny.batch(processor, [([tiny.random_media("audio", 37), "what is it?"], "")] * 2)
    for share in (False, True):
        expanded = processor.expand(batch, [[_budget("audio=/4")] * 2], left_padding=True, share_prefixes=share)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": processor.pad_id}
        penalised = model.generate(
            **expanded.inputs, **options, repetition_penalty=1.3, no_repeat_ngram_size=2, eos_token_id=None
        )
        new = penalised[0, expanded.inputs["input_ids"].shape[1] :].tolist()
        assert len(set(pairwise(new))) == len(new) - 1
        assert penalised[0].equal(penalised[1])


def test_a_resumed_run_is_the_same_bit_for_bit(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000004")
    (tmp_path / "run" / TRAINABLES).unlink()
    train(world.settings(tmp_path / "run", gradient_checkpointing=True), resume="auto")
    whole, resumed = (load_file(run / TRAINABLES) for run in (world.run, tmp_path / "run"))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():  # activations that are computed again are the same ones
        assert value.equal(resumed[name]), name


@pytest.mark.parametrize("packing", [True, False])
def test_packed_rows_and_one_budget_at_a_time_teach_the_same_rows(plain: World, tmp_path: Path, packing: bool) -> None:
    results = []
    for memory in ("fast", "low"):
        train(plain.settings(tmp_path / memory, max_steps=2, packing=packing, memory=memory))
        results.append(load_file(tmp_path / memory / TRAINABLES)[NEW_TOKENS])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_rows_learn_with_kept_features_and_beside_an_llm_that_learns_whole(plain: World, tmp_path: Path) -> None:
    config = plain.settings(tmp_path / "kept", max_steps=2)
    start, _ = build(config.model)
    before = start.model.new_tokens.rows  # type: ignore[union-attr]
    data = dataclasses.replace(config.data, features=FeatureConfig(folder=str(tmp_path / "features"), versions=1))
    train(dataclasses.replace(config, data=data))
    whole = dataclasses.replace(config.model, adapter=None)
    train(plain.settings(tmp_path / "whole", model=whole, max_steps=2, parts=["compressors", "llm"]))
    for name in ("kept", "whole"):
        saved = load_file(tmp_path / name / TRAINABLES)
        assert (saved[NEW_TOKENS] - before).norm(dim=1).min() > 1e-3
        assert ("model.language_model.embed_tokens.weight" in saved) == (name == "whole")
    model, _ = load(tmp_path / "whole")
    assert model.model.new_tokens.rows.equal(load_file(tmp_path / "whole" / TRAINABLES)[NEW_TOKENS])


def test_rows_learn_whatever_parts_are_named_at_the_rate_of_the_compressors_and_do_not_decay(plain: World) -> None:
    model, _ = build(tiny.settings_on(plain.parts, ("audio",), audio=SPAN))
    for parts in (("compressors",), ("adapter",), ("llm",), ("compressors", "adapter")):
        assert NEW_TOKENS in set_trainables(model, parts)
    groups = named_groups(model, learning_rate=1e-3, part_learning_rates={"compressors": 1e-2}, weight_decay=0.1)
    [group] = [group for group in groups if NEW_TOKENS in group["names"]]
    assert (group["lr"], group["weight_decay"]) == (1e-2, 0.0)
    assert "model.compressors.audio.projectors.0.0.bias" in group["names"]


def test_a_new_token_begins_as_its_text_is_read(plain: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain.parts["llm"])
    starts = []
    for seed in (0, 1):
        config = dataclasses.replace(tiny.settings_on(plain.parts, ("audio",), audio=SPAN), seed=seed)
        starts.append(build(config)[0].model.new_tokens.rows.detach())  # type: ignore[union-attr]
    assert starts[0].equal(starts[1])
    for row, text in zip(starts[0], SPAN["span"], strict=True):
        pieces = plain.table[tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert len(pieces) > 1
        assert torch.nn.functional.cosine_similarity(row, pieces.mean(0), dim=0) == pytest.approx(1.0)
        assert row.norm() == pytest.approx(pieces.norm(dim=1).mean().item(), rel=1e-5)


def test_tokens_that_the_llm_knows_stay_as_they_are(plain: World, tmp_path: Path) -> None:
    settings = tiny.settings_on(plain.parts, ("audio",), audio={"span": ["<audio>", "</audio>"]})
    model, processor = build(settings)
    assert model.config.new_tokens == {}
    assert model.model.new_tokens is None
    assert NEW_TOKENS not in set_trainables(model)
    ids = processor.chat.span_ids["audio"]
    assert [one for pair in ids for one in pair] == tiny.TOKENIZER.convert_tokens_to_ids(["<audio>", "</audio>"])
    # So does every mark of a run from before there were rows: its config does not name any.
    run = train(plain.settings(tmp_path / "run", model=settings, max_steps=2))
    config = run / "config.json"
    config.write_text(config.read_text().replace('"new_tokens": {},', ""))
    renew_seal(run, [config.name])
    assert '"new_tokens"' not in config.read_text()
    assert load(run)[0].model.new_tokens is None


def test_a_token_that_the_tokenizer_knows_and_the_table_does_not_gets_a_row(tmp_path: Path) -> None:
    world = make_world(tmp_path, tied=True, spare=0)
    tokenizer = AutoTokenizer.from_pretrained(world.parts["llm"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sound>"], "pad_token": "<|gap|>"})
    assert tokenizer.pad_token_id == KNOWN == 865
    tokenizer.save_pretrained(world.parts["llm"])
    run = train(world.settings(tmp_path / "run", max_steps=2))
    model, processor = load(run)
    assert list(model.config.new_tokens) == ["<sound>", "</sound>"]
    assert processor.pad_id < KNOWN  # a row of padding would be looked up
    tokenizer.eos_token = "<|gap|>"
    tokenizer.save_pretrained(world.parts["llm"])
    with pytest.raises(ValueError, match=r"eos_token '<\|gap\|>' the id 865, but the LLM embeds 865 tokens"):
        build(tiny.settings_on(world.parts, ("audio",), audio=SPAN))


def test_a_second_stage_takes_rows_over_by_their_tokens(plain: World, tmp_path: Path) -> None:
    first = train(plain.settings(tmp_path / "first", max_steps=2))
    both = tiny.settings_on(plain.parts, ("image", "audio"), image={"span": ["<look>", "</look>"]}, audio=SPAN)
    second = train(
        plain.settings(tmp_path / "second", model=both, max_steps=1, learning_rate=1e-9, start_from=str(first))
    )
    models = [load(folder)[0] for folder in (first, second)]
    assert list(models[1].config.new_tokens) == ["<look>", "</look>", "<sound>", "</sound>"]
    for token in SPAN["span"]:
        rows = [model.model.embed_text(torch.tensor([[model.config.new_tokens[token]]])) for model in models]
        torch.testing.assert_close(*rows, atol=1e-6, rtol=0.0)
    none = tiny.settings_on(plain.parts, ("audio",))
    with pytest.raises(ValueError, match=r"it has a row for the new token </sound>, which is none here; set the span"):
        train(plain.settings(tmp_path / "third", model=none, max_steps=1, start_from=str(first)))
