"""Prepares a request for the model: media decoded and transformed, text as ids, budgets as counts.

Everything that can be wrong with a request shows here, before it waits for the model. Runs on several threads.

Knows the processor, the loader and budgets. Does not know HTTP or weights.
"""

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm.budget import Budget, Space, TokenCount
from mllm.config.long_audio import LongAudio
from mllm.inference.long_audio import load_windows
from mllm.processing.batch import Batch, EncodedSample
from mllm.processing.media_inputs import LoadedMedia
from mllm.processing.processor import ElasticProcessor
from mllm.processing.requests import Request, read_chat
from mllm.router.choice import BudgetChooser
from mllm.serving.budgets import BudgetPolicy, ItemBudget, RequestBudget
from mllm.serving.decoders import PooledLoader
from mllm.serving.errors import SAMPLE_ID, bad_request, refusal_of
from mllm.serving.media_cache import MediaCache, MediaItem, Window, Windows
from mllm.utils.fail_points import fail_point


@dataclass(frozen=True)
class CountedSample(EncodedSample):
    """Holds a conversation whose media have been counted: each item has a budget of its own."""

    counted: tuple[TokenCount, ...] = ()

    def token_counts(self, budget: Budget, space: Space) -> list[TokenCount]:
        """Return what was counted, whatever the budget says."""
        return list(self.counted)


@dataclass(frozen=True)
class PromptMedium:
    """Holds one medium of a conversation: what it holds, the number of its message, and the key that named it."""

    medium: str
    content: bytes
    turn: int
    where: str


@dataclass(frozen=True)
class Conversation:
    """Holds what a client asks: turns of texts and media, the media in order, and their budgets."""

    turns: tuple[tuple[str, tuple["str | PromptMedium", ...]], ...]
    budget: RequestBudget

    @property
    def media(self) -> list[PromptMedium]:
        """Return all media in order of appearance."""
        return [part for _, parts in self.turns for part in parts if isinstance(part, PromptMedium)]


@dataclass(frozen=True)
class PromptRow:
    """Holds one row of a batch, ready for the model: a conversation about one window of its media."""

    row: CountedSample
    items: tuple[MediaItem, ...]
    keys: tuple[str, ...]
    num_prompt_tokens: int
    start: float = 0.0
    stop: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """Holds a request that can be answered: a row for each window, and how many of its media were known before."""

    rows: tuple[PromptRow, ...]
    num_known_media: int


class Preparer:
    """Prepares the requests of one model.

    Args:
        loader: decodes.
        long_audio: what becomes of audio longer than its encoder's window.
        max_prompt_tokens: longest prompt, soft tokens included.
        chooser: resolves open budgets.
    """

    def __init__(
        self,
        processor: ElasticProcessor,
        loader: PooledLoader,
        policy: BudgetPolicy,
        cache: MediaCache,
        *,
        long_audio: LongAudio,
        max_prompt_tokens: int,
        chooser: BudgetChooser,
    ) -> None:
        self.processor = processor
        self.loader = loader
        self.policy = policy
        self.cache = cache
        self.long_audio = long_audio
        self.max_prompt_tokens = max_prompt_tokens
        self.chooser = chooser
        # The tokenizer is told by a switch of its own whether special tokens are text: two threads must not meet there,
        # or what a user typed would be read as a special token.
        self._tokenizer_lock = threading.Lock()

    def prepare(self, conversation: Conversation, is_cancelled: Callable[[], bool]) -> Prepared:
        """Prepare one request.

        Raises:
            RequestError: 400, a file that cannot be used, a budget that cannot be met, or a prompt that is too long.
            Cancelled: nobody waits any more.
        """
        fail_point("serve.prepare")
        groups = _groups(conversation.media, has_clips="video" not in self.processor.sampling)
        loader = self.loader.until(is_cancelled)
        windows_of_groups: list[Windows] = []
        keys: list[str] = []
        num_known = 0
        for group in groups:
            media = [conversation.media[index] for index in group]
            budgets = [conversation.budget.items[index] for index in group]
            is_whole = len(groups) == 1
            key = self._key(media, budgets, is_whole)
            windows, is_known = self.cache.get(key, lambda: self._load(media, budgets, loader, is_whole))  # noqa: B023
            windows_of_groups.append(windows)
            keys += [key] * len(group)
            num_known += len(group) * is_known
        order = [index for group in groups for index in group]
        stretches = list(zip(*windows_of_groups, strict=True)) if windows_of_groups else [()]
        rows = [self._row(conversation, order, keys, stretch) for stretch in stretches]
        return Prepared(tuple(rows), num_known)

    def _key(self, media: Sequence[PromptMedium], budgets: Sequence[ItemBudget], is_whole: bool) -> str:
        """Write what makes two groups of media the same to their encoders; the transforms are always the same."""
        digest = hashlib.sha256(media[0].content).hexdigest()
        names = "+".join(medium.medium for medium in media)
        is_image = media[0].medium == "image"
        cuts = _cuts(budgets[0]) if is_image and self.processor.tiling is not None else ""
        if is_image and (most := budgets[0].budget.max_image_tokens) is not None:
            cuts = f"image<={most}"
        return f"{digest} {names} {cuts} {'windows' if is_whole and self.long_audio.mode == 'chunk' else ''}"

    def _load(
        self, media: Sequence[PromptMedium], budgets: Sequence[ItemBudget], loader: PooledLoader, is_whole: bool
    ) -> Windows:
        """Decode and transform media that belong together: one, or the audio and the frames of one clip."""
        # The same object, by which the audio and the frames of one clip are known.
        content = [{"type": medium.medium, medium.medium: media[0].content} for medium in media]
        request = read_chat([{"role": "user", "content": content}])
        cuts: list[Budget] = [budgets[0].budget]
        tiling = self.processor.tiling
        if media[0].medium == "image" and tiling is not None and budgets[0].is_free:
            # Which cut is taken is known when all media are: it is cut in every way.
            tile = self.processor.facts["image"].image_pixels
            assert tile is not None
            most = max(rows * columns for rows, columns in tiling.shapes(tile))
            cuts = [Budget(max_tiles=number) for number in range(most + 1)]
        how = self.long_audio if is_whole else LongAudio()
        try:
            windows = load_windows(
                request.sample, self.processor, how, loader=loader, budgets=cuts, in_memory=request.in_memory
            )
            return tuple(
                Window(window.start, window.stop, tuple(self._item(loaded) for loaded in window.media))
                for window in windows
            )
        except ValueError as error:
            raise refusal_of(error, media[0].where) from error

    def _item(self, loaded: LoadedMedia) -> MediaItem:
        return MediaItem(loaded, self.processor.extent(loaded))

    def _row(
        self, conversation: Conversation, order: Sequence[int], keys: Sequence[str], stretch: Sequence[Window]
    ) -> PromptRow:
        """Make a row about one window of every group."""
        item_by_index = dict(zip(order, [item for window in stretch for item in window.items], strict=True))
        items = tuple(item_by_index[index] for index in sorted(item_by_index))
        request = self._request(conversation)
        try:
            with self._tokenizer_lock:
                batch = self.processor.batch(
                    [replace(request.sample, id=SAMPLE_ID)],
                    [[item.loaded for item in items]],
                    for_training=False,
                    with_values=False,
                )
            plain = batch.rows[0]
            counts = self._counts(plain, conversation.budget)
            row = CountedSample(plain.sample_id, plain.ids, plain.labels, plain.spans, plain.task, tuple(counts))
            # What does not go together, such as experts for one scale only, is refused here and not in the batch.
            expanded = self.processor.expand(Batch([row]), [[Budget()]], left_padding=True)
        except ValueError as error:
            raise refusal_of(error) from error
        length = expanded.inputs["input_ids"].shape[1]
        if length > self.max_prompt_tokens:
            raise bad_request(
                f"the request is {length} tokens long, {sum(count.tokens for count in counts)} of them soft; allowed "
                f"are {self.max_prompt_tokens}",
                "messages",
            )
        times = (stretch[0].start, stretch[0].stop) if stretch else (0.0, 0.0)
        return PromptRow(row, items, tuple(dict.fromkeys(keys)), length, *times)

    def _counts(self, row: EncodedSample, budget: RequestBudget) -> list[TokenCount]:
        """Count the tokens of a row's media, at budgets that are chosen for it where the request leaves them open.

        Raises:
            RequestError: 400, as `BudgetPolicy.counts`, or nothing that may be chosen.
        """
        if budget.choosing is None:
            return self.policy.counts([span.extent for span in row.spans], budget)
        try:
            choice = self.chooser.choose(row, budget.choosing)
            return row.token_counts(choice.budgets[choice.first], self.policy.space)
        except ValueError as error:
            raise refusal_of(error, "budget") from error

    def _request(self, conversation: Conversation) -> Request:
        """Write the conversation in the form that all of the package reads."""
        messages: list[Mapping[str, Any]] = [
            {"role": role, "content": [_part(part) for part in parts]} for role, parts in conversation.turns
        ]
        return read_chat(messages, separator=self.processor.separator)


def _part(part: str | PromptMedium) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": part.medium, part.medium: part.content}


def _cuts(item: ItemBudget) -> str:
    """Tell what decides how an image is cut into tiles."""
    return "every cut" if item.is_free else str(item.budget)


def _groups(media: Sequence[PromptMedium], *, has_clips: bool) -> list[list[int]]:
    """Group the numbers of media that are read together: audio and frames of one clip in one message; others alone."""
    waiting: dict[tuple[int, bytes], int] = {}
    groups: list[list[int]] = []
    for index, medium in enumerate(media):
        key = (medium.turn, medium.content)
        other = waiting.get(key) if has_clips and medium.medium != "image" else None
        if other is not None and len(groups[other]) == 1 and media[groups[other][0]].medium != medium.medium:
            groups[other].append(index)
            continue
        if medium.medium != "image":
            waiting[key] = len(groups)
        groups.append([index])
    return groups


__all__ = ["Conversation", "CountedSample", "Prepared", "Preparer", "PromptMedium", "PromptRow"]
