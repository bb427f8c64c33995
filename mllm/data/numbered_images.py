"""Numbers the images of a conversation, so that a question can speak of one of several.

Knows messages. Does not know files, tokenizers or templates.
"""

from collections.abc import Sequence

from mllm.data.manifest import Media, Message, Part, Text


def number_images(messages: Sequence[Message]) -> list[Message]:
    """Number the images of a conversation, so that a question can speak of one: "image 1 is <image>, image 2 is
    <image>. Which is larger?".

    Images are counted through the conversation. Those that follow each other are parted by commas and end with a full
    stop. Source: the declarations of MMICL (arXiv 2309.07915), counted from 1.
    """
    count, named = 0, []
    for message in messages:
        parts: list[Part] = []
        for position, part in enumerate(message.parts):
            if not _is_image(part):
                parts.append(part)
                continue
            count += 1
            follows = position + 1 < len(message.parts) and _is_image(message.parts[position + 1])
            parts += [Text(f"image {count} is "), part, Text(", " if follows else ". ")]
        named.append(Message(message.role, tuple(parts)))
    return named


def _is_image(part: Part) -> bool:
    return isinstance(part, Media) and part.medium == "image"
