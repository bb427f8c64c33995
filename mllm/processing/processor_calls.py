"""Takes the calls that transformers and people make of the processor: texts with media, chats with media parts, batches
of either.

Knows requests and what transformers' processors take. Does not know decoders, encoders or how inputs are made.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Protocol, cast

from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from mllm.budget import Budget, BudgetInput
from mllm.data.manifest import Sample
from mllm.media.in_memory import InMemoryMedium
from mllm.processing.batch import Batch, Expanded
from mllm.processing.chat import ChatEncoder, Prompt, template_ends
from mllm.processing.media_inputs import LoadedMedia
from mllm.processing.requests import Request, fitting_budget, read_chat, read_rows

Conversation = Sequence[Mapping[str, Any]]
MEDIA_KEYS = {"image": "images", "audio": "audio", "video": "videos"}
"""What transformers calls the media of a request."""


class InputMaker(Protocol):
    """Names what the calls need of the processor that they are a part of: reading media, and making inputs."""

    chat: ChatEncoder

    @property
    def separator(self) -> str:
        """What stands between media and a question."""
        ...

    def load_media(
        self, sample: Sample, *, budgets: Sequence[Budget] = ..., in_memory: Sequence[InMemoryMedium | None] = ...
    ) -> list[LoadedMedia]:
        """Read the media of a sample."""
        ...

    def batch(
        self,
        samples: Sequence[Sample],
        media: Sequence[Sequence[LoadedMedia]],
        *,
        for_training: bool,
        prompts: Sequence[Prompt] | None = None,
    ) -> Batch:
        """Make a batch, before any budget is known."""
        ...

    def expand(self, batch: Batch, budgets: Sequence[Sequence[Budget]], *, left_padding: bool) -> Expanded:
        """Make inputs at budgets."""
        ...


class RenderedChat(str):
    """Holds a conversation as text, which still knows its messages: the processor tokenises those and not the text.

    So what people wrote stays text, whatever special tokens it spells.
    """

    messages: Conversation
    add_generation_prompt: bool
    continue_final_message: bool


class ProcessorCalls(ProcessorMixin):
    """Holds the part of `ElasticProcessor` that is called as transformers' processors are."""

    def __call__(
        self,
        samples: Sample | Sequence[Sample] | None = None,
        budget: BudgetInput = "",
        *,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        audio: Any = None,
        videos: Any = None,
        return_tensors: str = "pt",
        padding: bool = True,
        **unknown: object,
    ) -> BatchFeature:
        """Make inputs for `model.generate(**inputs)`.

        Args:
            samples: conversations whose media are files; or none, with `text` and its media instead.
            budget: one for all rows: a `Budget`, a text such as "image=16,audio=/4", or {"image": 16}.
            text: a user's message, whose media come first, images before audio before video; or several, with one
                entry of each medium per message. What `apply_chat_template` rendered is taken as that conversation.
            images, audio, videos: one or several: paths, bytes, PIL images, arrays (`mllm.media.in_memory`).
            return_tensors: "pt", which is what comes.
            padding: true; rows are padded on the left.
            unknown: refused.

        Returns:
            `input_ids`, `attention_mask` (B, S) and the inputs of the encoders; see `mllm.processing.batch`.

        Raises:
            TypeError: an argument that is not known; the nearest is named.
            ValueError: neither or both of `samples` and `text`, media in no form that is read, or a budget that cannot
                be met.
            MediaError: a file that cannot be used.
        """
        refuse_unknown("the processor", unknown, ("samples", "budget", "text", *MEDIA_KEYS.values()))
        media = {"image": images, "audio": audio, "video": videos}
        if (samples is None) == (text is None):
            raise ValueError("give either samples or text, and not both")
        if samples is None:
            # Without padding one row is still a batch, so only several are refused.
            texts = [text] if isinstance(text, str) else list(text or ())
            _check_form(return_tensors, padding or len(texts) == 1)
            if any(isinstance(one, RenderedChat) for one in texts):
                return self._of_rendered(texts, media, budget)
            requests = read_rows(media, texts, separator=self._processor.separator)
            return self._of_requests(requests, budget)
        if used := [MEDIA_KEYS[medium] for medium, value in media.items() if value is not None]:
            raise ValueError(f"{used[0]} goes with text; a sample names its own media")
        rows = list(samples) if isinstance(samples, Sequence) else [samples]
        if not all(isinstance(row, Sample) for row in rows):
            raise TypeError("the first argument is one mllm sample or several; give a message as text=, media by name")
        _check_form(return_tensors, padding or len(rows) == 1)
        return self._of_requests([Request(row, {}, (None,) * len(row.media)) for row in rows], budget)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Conversation | Sequence[Conversation],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str | list[str] | Tensor | BatchFeature:
        """Render one conversation or several, or make model inputs of them, as transformers' processors do.

        Args:
            conversation: messages of `role` and `content`, a text or parts such as {"type": "image", "image": ...} and
                {"type": "text", "text": ...}; see `mllm.processing.requests.read_chat`.
            tokenize: give ids, or all inputs with `return_dict`; the text otherwise.
            add_generation_prompt: end with what an answer begins behind.
            continue_final_message: leave the last message open, so that the answer goes on with it.
            processor_kwargs: of `__call__`: `budget`, and media for parts that hold none (`images`, `audio`, `videos`).
            options: the same, without the mapping. Everything else is refused, and without `tokenize` these too.

        Returns:
            Text, `input_ids` (B, S), or inputs for `model.generate(**inputs)`.

        Raises:
            TypeError: an argument that is not known; the nearest is named; or one of inputs where a text is made.
            ValueError: messages of another form, or as `__call__`.
        """
        arguments = {**(processor_kwargs or {}), **options}
        known = ("budget", "padding", *MEDIA_KEYS.values())
        refuse_unknown("apply_chat_template", {key: 0 for key in arguments if key not in known}, known)
        is_one = bool(conversation) and isinstance(conversation[0], Mapping)
        chats = cast(list[Conversation], [conversation] if is_one else list(conversation))
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        if not tokenize:
            _refuse_inputs(arguments)
            rendered = [_rendered(super(ProcessorCalls, self).apply_chat_template, chat, ends) for chat in chats]
            return rendered[0] if is_one else list(rendered)
        _check_form("pt" if return_tensors in (None, "auto") else return_tensors, arguments.get("padding", True))
        requests = self._read_chats(chats, {medium: arguments.get(key) for medium, key in MEDIA_KEYS.items()})
        prompts = [_prompt(self._processor.chat, request.sample, **ends) for request in requests]
        inputs = self._of_requests(requests, arguments.get("budget", ""), prompts)
        return inputs if return_dict else inputs["input_ids"]

    @property
    def _processor(self) -> InputMaker:
        return cast(InputMaker, self)

    def _read_chats(self, chats: Sequence[Conversation], media: Mapping[str, Any]) -> list[Request]:
        """Read conversations, with one entry of each medium per conversation for the parts that hold none."""
        separator = self._processor.separator
        if len(chats) == 1:
            media = {medium: [values] for medium, values in media.items() if values is not None}
        for medium, values in media.items():
            if values is not None and len(values) != len(chats):
                raise ValueError(f"there are {len(chats)} conversations and {len(values)} entries of {medium}")
        return [
            read_chat(chat, {m: values[row] for m, values in media.items() if values is not None}, separator=separator)
            for row, chat in enumerate(chats)
        ]

    def _of_rendered(self, texts: Sequence[str], media: Mapping[str, Any], budget: BudgetInput) -> BatchFeature:
        chats = [text for text in texts if isinstance(text, RenderedChat)]
        if len(chats) < len(texts):
            raise ValueError("some texts are of apply_chat_template and some are not; give either kind")
        requests = self._read_chats([chat.messages for chat in chats], media)
        prompts = [
            _prompt(
                self._processor.chat,
                request.sample,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
            )
            for chat, request in zip(chats, requests, strict=True)
        ]
        return self._of_requests(requests, budget, prompts)

    def _of_requests(
        self, requests: Sequence[Request], budget: BudgetInput, prompts: Sequence[Prompt] | None = None
    ) -> BatchFeature:
        samples = [request.sample for request in requests]
        shared_budget = fitting_budget(budget, samples)
        loaded = [
            self._processor.load_media(request.sample, budgets=[shared_budget], in_memory=request.in_memory)
            for request in requests
        ]
        batch = self._processor.batch(samples, loaded, for_training=False, prompts=prompts)
        return BatchFeature(self._processor.expand(batch, [[shared_budget] * len(samples)], left_padding=True).inputs)


def refuse_unknown(what: str, arguments: Mapping[str, object], known: Sequence[str]) -> None:
    """Refuse arguments that nothing reads.

    Raises:
        TypeError: the first of them, with the known one it is most like.
    """
    for key in arguments:
        near = get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
        raise TypeError(f"{what} does not take {key!r}; {hint}")


def _refuse_inputs(arguments: Mapping[str, Any]) -> None:
    """Refuse, by a TypeError, an argument of inputs where a text is made; one that is None is none."""
    if used := [key for key, value in arguments.items() if value is not None]:
        raise TypeError(
            f"apply_chat_template with tokenize false makes a text, which {used[0]} has no part in; give {used[0]} to "
            "the processor together with that text, or set tokenize"
        )


def _check_form(return_tensors: object, padding: object) -> None:
    if return_tensors != "pt":
        raise ValueError(f"return_tensors is {return_tensors!r}; only 'pt' can be made")
    if padding not in (True, "longest"):
        raise ValueError(f"padding is {padding!r}; several rows are always padded to the longest (True)")


def _prompt(chat: ChatEncoder, sample: Sample, *, add_generation_prompt: bool, continue_final_message: bool) -> Prompt:
    if not continue_final_message:
        return chat(sample.messages, add_generation_prompt=add_generation_prompt)
    if add_generation_prompt:
        raise ValueError("add_generation_prompt and continue_final_message contradict each other; give one of them")
    return chat.unfinished(sample.messages)


def _rendered(render: Any, messages: Conversation, ends: Mapping[str, bool]) -> RenderedChat:
    """Render the text of a conversation, which remembers it."""
    with template_ends():
        text = RenderedChat(render(messages, tokenize=False, **ends))
    text.messages = messages
    text.add_generation_prompt = ends["add_generation_prompt"]
    text.continue_final_message = ends["continue_final_message"]
    return text
