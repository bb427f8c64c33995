"""What people wrote stays text, answers are the targets, and each medium is one placeholder."""

import pytest
from transformers import AddedToken, PreTrainedTokenizerFast

from mllm.data.manifest import Media, Message, Text
from mllm.data.numbered_images import number_images
from mllm.processing import chat
from mllm.processing.chat import ChatEncoder
from mllm.synthetic.tokenizer import build_tokenizer

QUESTION = Message("user", (Media("image", "a.png"), Text("what colour is the circle?")))
ANSWER = Message("assistant", (Text("red"),))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def encoder(tokenizer: PreTrainedTokenizerFast, chat_format: str) -> ChatEncoder:
    ids = tokenizer.convert_tokens_to_ids
    return ChatEncoder(
        tokenizer,
        chat_format=chat_format,
        placeholder_ids={"image": ids("<|image_token|>")},
        span_ids={"image": [[ids("<image>")], [ids("</image>")]]},
    )


def test_plain_is_what_the_synthetic_llm_has_read(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = encoder(tokenizer, "plain")([QUESTION, ANSWER, Message("user", (Text("how many?"),)), ANSWER])
    text = "<s><image><|image_token|></image> what colour is the circle? red</s> how many? red</s>"
    assert tokenizer.decode(prompt.ids, skip_special_tokens=False) == text
    assert prompt.media == ("image",)
    targets = [token for token in prompt.labels if token != -100]
    assert targets == tokenizer.convert_tokens_to_ids(["Ġred", "</s>", "Ġred", "</s>"])
    assert all(label in (token, -100) for token, label in zip(prompt.ids, prompt.labels, strict=True))


@pytest.mark.parametrize("chat_format", ["plain", "vicuna_v1"])
def test_the_prompt_is_a_prefix_of_the_whole_conversation(tokenizer: PreTrainedTokenizerFast, chat_format: str) -> None:
    encode = encoder(tokenizer, chat_format)
    whole, prompt = encode([QUESTION, ANSWER]), encode([QUESTION], add_generation_prompt=True)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    first_target = next(index for index, label in enumerate(whole.labels) if label != -100)
    assert first_target == len(prompt.ids)


def test_a_space_of_the_template_belongs_to_the_word_after_it(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = encoder(tokenizer, "vicuna_v1")([Message("user", (Text("hello"),)), ANSWER])
    text = tokenizer.decode(prompt.ids, skip_special_tokens=False)
    assert text.endswith("USER: hello ASSISTANT: red</s>")
    assert prompt.ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_tokenizers_own_template_is_used(tokenizer: PreTrainedTokenizerFast) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match="has no chat template"):
        encoder(other, "chat")
    other.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prompt = encoder(other, "chat")([QUESTION, ANSWER])
    text = other.decode(prompt.ids, skip_special_tokens=False)
    assert text.replace(" ", "") == "[user]<image><|image_token|></image>whatcolouristhecircle?</s>[assistant]red</s>"
    assert [t for t in prompt.labels if t != -100] == other.convert_tokens_to_ids(["Ġred", "</s>"])


def test_an_end_of_turn_without_a_role_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of many chats the end of a turn is an added token that only says it is special, beside another end of text."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    other = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    other.add_tokens(AddedToken("<|end|>", special=True))
    other.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|end|>{% endfor %}"
    prompt = encoder(other, "chat")([QUESTION, ANSWER])
    assert [t for t in prompt.labels if t != -100] == other.convert_tokens_to_ids(["Ġred", "<|end|>"])


def test_a_template_that_drops_a_message_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    other.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="drops, repeats or reorders"):
        encoder(other, "chat")([QUESTION, ANSWER])


@pytest.mark.parametrize(
    ("seconds", "template", "reason"),
    [
        (0.05, "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.05 s"),
        (60.0, "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ],
)
def test_a_template_that_never_ends_is_ended(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, seconds: float, template: str, reason: str
) -> None:
    monkeypatch.setattr(chat, "MAX_TEMPLATE_SECONDS", seconds)
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    other.chat_template = template
    with pytest.raises(ValueError, match=f"the chat template refuses the turns user, assistant: .*{reason}"):
        encoder(other, "chat")([QUESTION, ANSWER])


@pytest.mark.parametrize(
    "typed", ["<image>", "</s>", "<|image_token|>", "a <s> b</s><|image_token|>", "<pad>\n<audio>", "\ue0000\ue001"]
)
def test_what_a_user_types_never_becomes_a_special_id(tokenizer: PreTrainedTokenizerFast, typed: str) -> None:
    prompt = encoder(tokenizer, "plain")([Message("user", (Text(typed),)), Message("assistant", (Text(typed),))])
    special = set(tokenizer.all_special_ids)
    assert [token for token in prompt.ids if token in special] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert prompt.media == ()
    ids = [token for token in prompt.ids if token not in special]
    assert tokenizer.decode(ids).count(typed.strip()) == 2


def test_a_medium_the_model_does_not_take_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="does not take audio; it takes image"):
        encoder(tokenizer, "plain")([Message("user", (Media("audio", "a.wav"),))])


def test_an_unknown_format_names_the_known_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="allowed: plain, avsr, llava_plain, vicuna_v1, chat"):
        encoder(tokenizer, "llama")


def test_images_are_numbered_where_that_is_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    two = Message("user", (Media("image", "a.png"), Media("image", "b.png"), Text("which is larger?")))
    third = Message("user", (Text("and "), Media("image", "c.png"), Text("what colour is it?")))
    image = tokenizer.convert_tokens_to_ids("<|image_token|>")
    named, plain = (
        ChatEncoder(tokenizer, chat_format="plain", placeholder_ids={"image": image}, names_images=names)
        for names in (True, False)
    )
    conversation = [two, ANSWER, third, ANSWER]
    prompt = named(conversation)
    assert tokenizer.decode(prompt.ids, skip_special_tokens=True).split("red")[0].split() == (
        ["image", "1", "is", ",", "image", "2", "is", ".", "which", "is", "larger?"]
    )
    assert prompt.media == plain(conversation).media == ("image",) * 3
    assert prompt.ids.count(image) == 3
    before, others = plain(conversation), [label for label in prompt.labels if label != -100]
    assert others == [label for label in before.labels if label != -100]
    assert [message.text for message in number_images(conversation)][2] == "and image 3 is . what colour is it?"


def test_text_without_images_stays_as_it_is() -> None:
    audio = Message("user", (Media("audio", "a.wav"), Text("what?")))
    assert number_images([audio, ANSWER]) == [audio, ANSWER]
