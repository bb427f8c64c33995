"""Writes a chat template for transformers whose messages may hold media parts, from the one our own encoder follows.

Knows Jinja and the tokens of media. Does not know files or tokenizers' vocabularies. `ChatEncoder` never reads what
people wrote through this: it is for `apply_chat_template(..., tokenize=False)` and for whoever looks at a checkpoint.
"""

from mllm.processing.chat import ChatEncoder

HEAD = "{#- mllm: media parts become their tokens, then the chat template follows -#}\n"
# A message that is a text stays as it is, since templates were written for those.
_FLATTEN = """{%- set flat = namespace(messages=[], images=0) -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set content -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}
TEXT
MEDIA{%- else -%}
{{- raise_exception('this model takes no part of type ' ~ part.type) -}}
{%- endif -%}
{%- endfor -%}
{%- endset -%}
{%- set flat.messages = flat.messages + [dict(message, content=content)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
_TEXT = "{{- part.text -}}"
_SEPARATED = (
    "{%- if loop.previtem is defined and loop.previtem.type != 'text' and not part.text.startswith(SEPARATOR) -%}"
    "{{- SEPARATOR -}}{%- endif -%}{{- part.text -}}"
)
# The first stage of LLaVA reads the media of a question and not its words.
_UNREAD = "{%- if message.role != 'user' -%}{{- part.text -}}{%- endif -%}"
_NUMBERED = (
    "{%- set flat.images = flat.images + 1 -%}{{- 'image ' ~ flat.images ~ ' is ' ~ MARK -}}"
    "{{- ', ' if loop.nextitem is defined and loop.nextitem.type in ('image', 'image_url') else '. ' -}}"
)


def with_media_parts(chat: ChatEncoder, *, separator: str = "") -> str:
    """Return a template that renders parts of text and media as the encoder lays them out, one token per medium.

    Args:
        separator: put between a medium and a text after it that does not begin with it already.
    """
    template = chat.template or chat.tokenizer.get_chat_template()
    if template.startswith(HEAD):  # of a checkpoint that was saved with it
        return template
    text = _UNREAD if chat.chat_format == "llava_plain" else _SEPARATED if separator else _TEXT
    branches = []
    for medium in chat.placeholder_ids:
        mark = _quoted("".join(chat.tokenizer.convert_ids_to_tokens(chat.media_ids(medium))))
        shown = _NUMBERED if chat.names_images and medium == "image" else "{{- MARK -}}"
        branches.append(f"{{%- elif part.type in ('{medium}', '{medium}_url') -%}}\n{shown.replace('MARK', mark)}\n")
    flatten = _FLATTEN.replace("TEXT", text).replace("MEDIA", "".join(branches))
    return HEAD + flatten.replace("SEPARATOR", _quoted(separator)) + template


def _quoted(text: str) -> str:
    """Quote a text as a string literal of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
