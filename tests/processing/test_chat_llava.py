"""Conversations as LLaVA's training code reads them: the same ids and targets, on SentencePiece vocabularies."""

import re

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from mllm.data.manifest import Media, Message, Text
from mllm.processing.chat import ChatEncoder, without_prefix
from mllm.synthetic.tokenizer import build_tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
CORPUS = [SYSTEM, "USER: What is in the image? ASSISTANT: A red cat.", "Is it sure? Yes, it is. The cat is red."]
IMAGE = -200
Turn = tuple[str, str]


def llama_tokenizer(*, legacy: bool) -> PreTrainedTokenizerFast:
    """Return a small vocabulary of Llama's kind, its pieces made of `▁` and byte fallback.

    Args:
        legacy: put a space before every text, also behind a special token, as files of before 2023 say.
    """
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    # words apart while the vocabulary is learned, so that no piece spans two of them
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if legacy:
        copied = Tokenizer.from_str(tokenizer.to_str())
        return PreTrainedTokenizerFast(tokenizer_object=copied, **names)
    model = tokenizer.model
    vocabulary = {piece: tokenizer.token_to_id(piece) for piece in tokenizer.get_vocab()}
    return LlamaTokenizer(vocab=vocabulary, merges=_merges(model), legacy=False, add_bos_token=False, **names)


def _merges(model: object) -> list[tuple[str, str]]:
    import json

    state = json.loads(Tokenizer(model).to_str())["model"]["merges"]  # pyright: ignore[reportArgumentType]
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in state]


@pytest.fixture(scope="module", params=[False, True], ids=["metaspace", "legacy"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return llama_tokenizer(legacy=request.param)


def encoder(tokenizer: PreTrainedTokenizerFast, chat_format: str = "vicuna_v1") -> ChatEncoder:
    return ChatEncoder(tokenizer, chat_format=chat_format, placeholder_ids={"image": IMAGE})


def messages_of(turns: list[Turn]) -> list[Message]:
    """Return a conversation of (question, answer); `<image>` stands for an image."""
    messages = []
    for question, answer in turns:
        parts = []
        for piece in re.split("(<image>)", question):
            if piece:
                parts.append(Media("image", "a.jpg") if piece == "<image>" else Text(piece))
        messages += [Message("user", tuple(parts)), Message("assistant", (Text(answer),))]
    return messages


def as_released(tokenizer: PreTrainedTokenizerFast, turns: list[Turn]) -> tuple[list[int], list[int]]:
    """Encode what LLaVA-1.5 reads: each stretch between images tokenised in one go; targets are answers and their
    `</s>`.

    Targets are found by the places of their characters, not by counting tokens.
    """
    text, spans = SYSTEM, []
    for question, answer in turns:
        text += f"USER: {question} ASSISTANT:"
        spans.append((len(text), len(text) + len(f" {answer}</s>")))
        text += f" {answer}</s>"
    ids, labels, start = [tokenizer.bos_token_id], [-100], 0
    for number, chunk in enumerate(text.split("<image>")):
        if number:
            ids.append(IMAGE)
            labels.append(-100)
            start += len("<image>")
        read = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=True)
        for token, (first, last) in zip(read["input_ids"], read["offset_mapping"], strict=True):
            is_target = any(low <= start + first and start + last <= high and last > first for low, high in spans)
            ids.append(token)
            labels.append(token if is_target else -100)
        start += len(chunk)
    return ids, labels


CONVERSATIONS = {
    "image first": [("<image>\nWhat is in the image?", "A red cat.")],
    "image last": [("What is in the image?\n<image>", "A red cat.")],
    "image inside": [("Is it <image> sure?", "Yes.")],
    "several turns": [("<image>\nWhat is it?", "A cat."), ("Is it red?", "Yes, it is."), ("Sure?", "Yes.")],
    "text only": [("What is it?", "The cat is red."), ("Is it?", "Yes.")],
    "line breaks": [("What?\n\nIs it?", "The cat:\n\nred\n"), ("Sure?\n", "Yes.")],
    "other letters": [("<image>\nœuvre € 猫?", "Ça va, 猫.")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_and_targets_are_those_of_llava(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    turns = CONVERSATIONS[name]
    prompt = encoder(tokenizer)(messages_of(turns))
    ids, labels = as_released(tokenizer, turns)
    assert prompt.ids == ids
    assert prompt.labels == labels
    targets = [label for label in prompt.labels if label != -100]
    assert targets.count(tokenizer.eos_token_id) == len(turns)
    spoken = tokenizer.decode(targets).replace("</s>", "").split()
    assert spoken == " ".join(answer for _, answer in turns).split()


def test_the_prompt_of_an_image_is_what_was_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = messages_of([("<image>\nWhat is it?", "A cat."), ("Is it red?", "Yes, it is.")])
    whole, prompt = encoder(tokenizer)(messages), encoder(tokenizer)(messages[:-1], add_generation_prompt=True)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    rest = whole.labels[len(prompt.ids) :]
    assert rest == whole.ids[len(prompt.ids) :]


def test_many_conversations_at_once_are_read_as_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    conversations = [messages_of(turns) for turns in CONVERSATIONS.values()]
    encode = encoder(tokenizer)
    assert encode.encode_all(conversations) == [encode(messages) for messages in conversations]


def test_llava_plain_drops_the_question_and_learns_caption_and_line_break(tokenizer: PreTrainedTokenizerFast) -> None:
    for question in ("<image>\nGive a brief description.", "What is this?\n<image>"):
        prompt = encoder(tokenizer, "llava_plain")(messages_of([(question, "A red cat.")]))
        caption = tokenizer("A red cat.\n", add_special_tokens=False)["input_ids"]
        assert prompt.ids == [tokenizer.bos_token_id, IMAGE, *caption]
        assert prompt.labels == [-100, -100, *caption]
    request = encoder(tokenizer, "llava_plain")(messages_of([("<image>", "x")])[:1], add_generation_prompt=True)
    assert request.ids == [tokenizer.bos_token_id, IMAGE]


@pytest.mark.parametrize(
    "turns", [[("What is it?", "A cat.")], [("<image>", "A cat."), ("Sure?", "Yes.")]], ids=["no image", "two turns"]
)
def test_llava_plain_has_no_place_for_other_conversations(
    tokenizer: PreTrainedTokenizerFast, turns: list[Turn]
) -> None:
    with pytest.raises(ValueError, match="chat_format llava_plain is for one question with an image and its answer"):
        encoder(tokenizer, "llava_plain")(messages_of(turns))


@pytest.mark.parametrize("chat_format", ["vicuna_v1", "llava_plain"])
def test_what_is_typed_makes_no_special_id(tokenizer: PreTrainedTokenizerFast, chat_format: str) -> None:
    turns = [("<image> </s> <s>", "a</s> b <unk>")]
    prompt = encoder(tokenizer, chat_format)(messages_of(turns))
    ends = [token for token in prompt.ids if token in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    assert ends == [tokenizer.bos_token_id, tokenizer.eos_token_id][: 2 if chat_format == "vicuna_v1" else 1]


def test_text_that_goes_on_has_no_space_before_it(tokenizer: PreTrainedTokenizerFast) -> None:
    going_on = without_prefix(tokenizer)
    assert going_on.convert_ids_to_tokens(going_on("cat", add_special_tokens=False)["input_ids"])[0][0] != "▁"
    assert tokenizer.convert_ids_to_tokens(tokenizer("cat", add_special_tokens=False)["input_ids"])[0][0] == "▁"
    tokenizer = build_tokenizer()
    assert without_prefix(tokenizer) is tokenizer
