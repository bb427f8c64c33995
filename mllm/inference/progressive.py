"""A session about one image whose budget grows: the image is encoded once, and what the LLM has read is kept.

Knows an answerer and key-value caches. Does not know how tokens are chosen or where an image comes from.

The prompt is [text before | m soft tokens | text behind]. Where the soft tokens of a smaller budget are the first of a
larger one, keys and values of [text before | m soft tokens] are those of a prompt with M > m soft tokens as well, since
the LLM is causal. So after growing only the M - m new soft tokens are left to read, and the text behind them, which
stands at other positions now. Both are read in one pass, with the next question; what it read of the image is kept,
and what it read of the question is not.

Shapes: m, M soft tokens before and after growing, H the LLM's hidden size, V its vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from mllm.budget import Budget, BudgetInput, TokenCount
from mllm.inference.request import Answer, Files, is_trained, tokens_by_medium
from mllm.kv_cache.beam import spread
from mllm.kv_cache.names import cache_argument
from mllm.model.backbone import SIZE_KEYS, VALUE_KEYS
from mllm.model.precision import as_weights_of
from mllm.processing.batch import Row

if TYPE_CHECKING:
    from mllm.inference.answerer import Answerer

MEDIUM = "image"


class Growing:
    """Questions about one image at a budget that can grow. See `Answerer.begin`.

    Args:
        answerer: its model must not be changed while the session lasts.
        image: the file.
        budget: to begin with.

    Raises:
        MediaError: a file that is missing or cannot be read.
        ValueError: not exactly one image, one in tiles, a budget that cannot be met, or a static cache.
    """

    @torch.no_grad()
    def __init__(self, answerer: "Answerer", image: Files, budget: BudgetInput) -> None:
        if answerer.decoding.static_cache:
            raise ValueError("static_cache is true; a session keeps a cache that grows")
        own = answerer.processor.space.media.get(MEDIUM)
        if own is not None and own.tiling is not None:
            raise ValueError("media.image.tiling cuts images into tiles, whose runs do not grow at their end")
        self.answerer, self._model = answerer, answerer.model
        self._files = {MEDIUM: image}
        samples, self._loaded, asked = answerer.read_request(self._files, [""], budget)
        if len(self._loaded) != 1:
            raise ValueError(f"a session is about one image, got {len(self._loaded)}")
        batch = answerer.processor.batch(samples, [self._loaded], for_training=False)
        self._row, values = batch.rows[0], batch.values
        self._cost = self._cost_of(asked)
        self.budget = asked
        """What the session has grown to."""
        device = self._model.device
        sizes = values.get(SIZE_KEYS[MEDIUM])
        self._features = self._model.model.encode(
            MEDIUM, values[VALUE_KEYS[MEDIUM]].to(device), None if sizes is None else sizes.to(device)
        )
        self._members = self._members_at(self._cost)
        place = list(self._row.ids).index(answerer.processor.placeholder_ids[MEDIUM])
        self._before = list(self._row.ids[:place])
        self._cache = DynamicCache()
        self._unread = torch.cat([self._words(self._before), self._soft_tokens(0, self._cost)], dim=1)

    @property
    def num_read_tokens(self) -> int:
        """Tokens the LLM has read and kept, of the text before the image and its soft tokens."""
        return self._cache.get_seq_length()

    @property
    def num_kept_tokens(self) -> int:
        """Tokens that every question at the present budget shares: those that are read, and those it will read."""
        return self.num_read_tokens + self._unread.shape[1]

    def num_question_tokens(self, text: str | None = None) -> int:
        """Tokens of the text behind the image, which every question reads for itself."""
        return len(self._prompt(text)[0]) - self.num_kept_tokens

    @torch.no_grad()
    def extend(self, budget: BudgetInput) -> None:
        """Grow to a budget; the next question reads the new soft tokens, and only those.

        Raises:
            ValueError: a compressor whose smaller budgets are not the beginnings of its larger ones, an adapter with a
                member per scale, or a budget that cannot be met or is not larger.
        """
        asked = Budget.of(budget)
        cost = self._cost_of(asked)
        nested = self._model.model.compressors[MEDIUM].nested
        if nested != "prefix":
            raise ValueError(
                f"media.{MEDIUM}.compressor gives {nested} tokens: those at {self.budget} do not begin {asked}; "
                "growing needs query, or pool with order haar"
            )
        if cost.tokens <= self._cost.tokens:
            raise ValueError(f"budget {asked} gives {cost.tokens} soft tokens; the session has {self._cost.tokens}")
        if self._members_at(cost) != self._members:
            raise ValueError(
                f"the adapter has an expert per scale, so nothing that was read at {self.budget} holds at {asked}; "
                "begin another session"
            )
        self._unread = torch.cat([self._unread, self._soft_tokens(self._cost.tokens, cost)], dim=1)
        self.budget, self._cost = asked, cost

    @torch.no_grad()
    def answer(self, text: str | None = None) -> Answer:
        """Answer a question about the image at the present budget, as `Answerer.answer` does."""
        processor, decoding = self.answerer.processor, self.answerer.decoding
        ids, row = self._prompt(text)
        behind = ids[self.num_kept_tokens : -1]  # `generate` reads the last one itself
        # A question of which nothing is read here is read by `generate`, in its first pass, with every beam.
        reads = self._unread.shape[1] > 0 or (decoding.num_beams > 1 and len(behind) > 0)
        cache = self._read(behind)[1] if reads else _copy(self._cache)
        if decoding.num_beams > 1:
            cache = spread(cache, decoding.num_beams)
        prompt = torch.tensor([ids], device=self._model.device)
        options = {**self._member_inputs(), **self.answerer.options()}
        with decoding.chance():
            found = self._model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), **cache_argument(cache), **options
            )
        new = self.answerer.ended(found[0, len(ids) :].tolist())
        extents = [run.extent for run in row.runs]
        return Answer(
            text=processor.batch_decode([new], skip_special_tokens=True)[0].strip(),
            budget=self.budget,
            tokens=tokens_by_medium(extents, [self._cost]),
            is_trained=is_trained(extents, [self._cost], processor.space),
            num_prompt_tokens=len(ids),
            num_new_tokens=len(new),
            num_shared_tokens=self.num_read_tokens,
            is_cut=self.answerer.is_cut(new),
        )

    @torch.no_grad()
    def logits(self, text: str | None = None) -> Tensor:
        """Logits (V,) of the first token of an answer: how sure the model is tells whether growing is worth it."""
        return self._read(self._prompt(text)[0][self.num_kept_tokens :])[0]

    def _cost_of(self, budget: Budget) -> TokenCount:
        return self._row.token_counts(budget, self.answerer.processor.space)[0]

    def _members_at(self, cost: TokenCount) -> dict[str, int]:
        """Which experts of the adapter serve the image at a cost, as the model takes them."""
        members, own = self.answerer.processor.expert_names, {}
        if members.scales:
            own["scale_ids"] = members.scale_id([(MEDIUM, cost)])
        if members.tasks:
            own["task_ids"] = members.task_id(self._row.task, [MEDIUM])
        return own

    def _soft_tokens(self, start: int, cost: TokenCount) -> Tensor:
        """(1, M - start, H), those behind the first ones."""
        counts = self._features.lengths.new_full((1,), cost.tokens)
        soft = self._model.model.compress(MEDIUM, self._features, num_tokens=counts, max_tokens=cost.tokens)
        return as_weights_of(self._model.get_input_embeddings(), soft[:, start:])

    def _words(self, ids: Sequence[int]) -> Tensor:
        """(1, n, H) of n ids."""
        device = self._model.device
        return self._model.model.words(torch.tensor([ids], dtype=torch.int64, device=device))

    def _member_inputs(self) -> dict[str, Tensor]:
        return {name: torch.tensor([own], device=self._model.device) for name, own in self._members.items()}

    def _read(self, behind: Sequence[int]) -> tuple[Tensor, DynamicCache]:
        """Let the LLM read in one pass what is unread of the image, which is kept, and ids behind it, which are not.

        Returns:
            Logits (V,) behind the last token, and a cache of everything up to there, for the caller to go on with.
        """
        start = self.num_read_tokens
        embeds = torch.cat([self._unread, self._words(behind)], dim=1)
        end = start + embeds.shape[1]
        cache = _copy(self._cache)
        output = self._model(
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, end, dtype=torch.int64, device=embeds.device),
            position_ids=torch.arange(start, end, device=embeds.device)[None],
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(cache),
            **self._member_inputs(),
        )
        if self._unread.shape[1]:
            self._cache = _copy(cache)
            self._cache.crop(-len(behind))
            self._unread = self._unread[:, :0]
        return output.logits[0, -1], cache

    def _prompt(self, text: str | None) -> tuple[list[int], Row]:
        """The ids of a question, the pad id in place of each soft token, and its row."""
        processor = self.answerer.processor
        samples = [request.sample for request in self.answerer.requests_about(self._files, [text])]
        row = processor.batch(samples, [self._loaded], for_training=False).rows[0]
        place = len(self._before)
        assert list(row.ids[:place]) == self._before
        assert row.ids[place] == processor.placeholder_ids[MEDIUM]
        return [*self._before, *[processor.pad_id] * self._cost.tokens, *row.ids[place + 1 :]], row


def _copy(cache: DynamicCache) -> DynamicCache:
    """A cache that grows by itself. What is appended makes new tensors, so those that are there are not copied."""
    own = DynamicCache()
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own
