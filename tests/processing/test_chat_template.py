"""The chat template with media parts lays a conversation out as our own encoder does."""

import copy
from typing import Any

import pytest
import tiny
from PIL import Image

from mllm.processing.chat_template import HEAD, with_media_parts
from mllm.processing.processor import ElasticProcessor

PIL_IMAGE = Image.new("RGB", (8, 8))
IMAGE, TEXT = {"type": "image", "image": PIL_IMAGE}, {"type": "text", "text": "what colour is it?"}
PLAIN_TEMPLATE = "{% for message in messages %}<s>{{ message.role }}: {{ message['content'] }}</s>{% endfor %}"
CHATS: dict[str, list[dict[str, Any]]] = {
    "image": [{"role": "user", "content": [IMAGE, TEXT]}],
    "two images": [{"role": "user", "content": [IMAGE, IMAGE, TEXT, IMAGE]}],
    "turns": [
        {"role": "user", "content": [IMAGE, TEXT]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "text", "text": "and the square?"}]},
    ],
    "text": [{"role": "user", "content": "what colour?"}],
}


def made(chat_format: str, *, names_images: bool = False, span: bool = False) -> ElasticProcessor:
    """Return a tiny processor of a chat format; `chat` has a template that writes contents as they come."""
    config = tiny.settings(("image",), image={"span": ["<s>", "</s>"] if span else []})
    tokenizer = copy.deepcopy(tiny.TOKENIZER)
    tokenizer.chat_template = PLAIN_TEMPLATE if chat_format == "chat" else None
    return tiny.processor(config, tokenizer=tokenizer, chat_format=chat_format, names_images=names_images)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    ("chat_format", "options"),
    [
        ("plain", {}),
        ("plain", {"names_images": True}),
        ("plain", {"span": True}),
        ("avsr", {}),
        ("vicuna_v1", {}),
        ("chat", {}),
    ],
)
def test_the_rendered_text_is_what_the_ids_say(chat_format: str, options: dict[str, bool], chat: str) -> None:
    processor = made(chat_format, **options)
    ends: dict[str, Any] = {"add_generation_prompt": True}
    text = processor.apply_chat_template(CHATS[chat], **ends)
    ids = processor.apply_chat_template(CHATS[chat], tokenize=True, budget="image=1" if chat != "text" else "", **ends)
    read = processor.tokenizer(str(text), add_special_tokens=False)["input_ids"]
    shown = [processor.tokenizer.decode(one).replace(" ", "") for one in (read, ids[0])]  # type: ignore[index]
    assert shown[0] == shown[1]
    image = processor.placeholder_ids["image"]
    assert read.count(image) == sum(part == IMAGE for turn in CHATS[chat] for part in turn["content"])


def test_an_answer_that_is_to_go_on_stays_open() -> None:
    processor = made("vicuna_v1")
    chat = [*CHATS["image"], {"role": "assistant", "content": "it is"}]
    closed = processor.apply_chat_template(chat, tokenize=True, budget="image=1")[0].tolist()  # type: ignore[index]
    left = processor.apply_chat_template(chat, tokenize=True, continue_final_message=True, budget="image=1")
    assert [*left[0].tolist(), processor.tokenizer.eos_token_id] == closed  # type: ignore[index]
    with pytest.raises(ValueError, match="contradict each other"):
        processor.apply_chat_template(chat, tokenize=True, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(ValueError, match="the last message must end with a text"):
        processor.apply_chat_template(
            [{"role": "user", "content": [IMAGE]}], tokenize=True, continue_final_message=True
        )


def test_a_template_that_has_media_parts_stays_as_it_is() -> None:
    processor = made("chat")
    assert processor.chat_template.startswith(HEAD)  # type: ignore[union-attr]
    processor.tokenizer.chat_template = processor.chat_template
    assert with_media_parts(processor.chat) == processor.chat_template


REFUSED = [
    ([{"role": "user"}], r"messages\[0\] must hold role and content"),
    ([{"role": "human", "content": "hi"}], r"messages\[0\].role is 'human'; allowed: system, user, assistant"),
    ([{"role": "user", "content": [{"type": "box"}]}], r"\[0\].content\[0\].type is 'box'; allowed: text, image"),
    ([{"role": "user", "content": [{"type": "image"}]}], r"is of type image and holds none; put it under 'image'"),
    ([{"role": "user", "content": [{"type": "image", "url": "http://a/b.png"}]}], "nothing is fetched from the net"),
    ([{"role": "user", "content": [{"type": "audio", "path": "a.wav"}]}], "does not take audio; it takes image"),
]


@pytest.mark.parametrize(("chat", "message"), REFUSED)
def test_a_chat_of_another_form_is_refused_with_its_place(chat: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made("plain").apply_chat_template(chat, tokenize=True)


def test_media_beside_a_chat_fill_its_places() -> None:
    processor = made("plain")
    chat = [{"role": "user", "content": [{"type": "image"}, TEXT]}]
    beside = processor.apply_chat_template(chat, tokenize=True, return_dict=True, images=[PIL_IMAGE], budget="image=4")
    inside = processor.apply_chat_template(CHATS["image"], tokenize=True, return_dict=True, budget="image=4")
    assert beside["pixel_values"].equal(inside["pixel_values"])  # type: ignore[index]
    assert beside["input_ids"].equal(inside["input_ids"])  # type: ignore[index]
    with pytest.raises(ValueError, match="1 more of image were given than the messages have places for"):
        processor.apply_chat_template(chat, tokenize=True, images=[PIL_IMAGE, PIL_IMAGE])
