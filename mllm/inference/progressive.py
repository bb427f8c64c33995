"""Answers questions about one image whose budget grows: it is encoded once, and what the LLM has read of it is kept.

Knows a model, its processor, a decoding and key-value caches. Does not know batches or windows.

The prompt is [text before | m soft tokens | text behind]. Where the soft tokens of a smaller budget are the first of a
larger one, keys and values of [text before | m soft tokens] are those of a prompt with M > m soft tokens as well, since
the LLM is causal. So after growing only the M - m new soft tokens are left to read, and the text behind them, which
stands at other positions now. Both are read in one pass, with the next question; what it read of the image is kept,
and what it read of the question is not.

Shapes: m, M soft tokens before and after growing, H the LLM's hidden size, V its vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from mllm.budget import Budget, BudgetInput, TokenCount
from mllm.inference.decoding import Decoding, generate_answers
from mllm.inference.reading import read_request, samples_about
from mllm.inference.request import Answer, Files, is_trained, tokens_by_medium
from mllm.kv_cache.beam import spread
from mllm.kv_cache.copies import copy_of
from mllm.kv_cache.names import cache_argument
from mllm.media import MediaLoader
from mllm.model.media_arguments import SIZE_KEYS, VALUE_KEYS
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.precision import as_weights_of
from mllm.processing.batch import EncodedSample
from mllm.processing.processor import ElasticProcessor

MEDIUM = "image"


class ProgressiveSession:
    """Answers questions about one image at a budget that can grow. See `Answerer.begin`.

    Args:
        model: in eval mode; it must not be changed while the session lasts.
        processor: the one that belongs to it.
        decoding: how tokens are chosen.
        image: the file.
        budget: to begin with.
        loader: limits and decoders other than the default ones.

    Raises:
        MediaError: a file that is missing or cannot be read.
        ValueError: not exactly one image, one in tiles, a budget that cannot be met, or a static cache.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: ElasticForConditionalGeneration,
        processor: ElasticProcessor,
        decoding: Decoding,
        image: Files,
        budget: BudgetInput,
        *,
        loader: MediaLoader | None = None,
    ) -> None:
        if decoding.static_cache:
            raise ValueError("static_cache is true; a session keeps a cache that grows")
        if processor.host is not None:
            raise ValueError("model.host pools its soft tokens, and a session is about those that grow at their end")
        image_space = processor.space.media.get(MEDIUM)
        if image_space is not None and image_space.tiling is not None:
            raise ValueError("model.image.tiling cuts images into tiles, whose soft tokens do not grow at their end")
        self._model, self._processor, self._decoding = model, processor, decoding
        self._files = {MEDIUM: image}
        questions = read_request(self._files, [""], budget, processor, loader=loader)
        self._loaded = questions.windows[0].media
        if len(self._loaded) != 1:
            raise ValueError(f"a session is about one image, got {len(self._loaded)}")
        batch = processor.batch(questions.samples, [self._loaded], for_training=False)
        self._row, values = batch.rows[0], batch.values
        self._count = self._count_at(questions.budget)
        self.budget = questions.budget
        """The budget that the session has grown to."""
        device = self._model.device
        sizes = values.get(SIZE_KEYS[MEDIUM])
        self._features = self._model.model.encode(
            MEDIUM, values[VALUE_KEYS[MEDIUM]].to(device), None if sizes is None else sizes.to(device)
        )
        self._expert_ids = self._expert_ids_at(self._count)
        start = list(self._row.ids).index(processor.placeholder_ids[MEDIUM])
        self._before = list(self._row.ids[:start])
        self._cache = DynamicCache()
        self._unread = torch.cat([self._words(self._before), self._soft_tokens(0, self._count)], dim=1)

    @property
    def num_read_tokens(self) -> int:
        """Counts the tokens the LLM has read and kept, of the text before the image and its soft tokens."""
        return self._cache.get_seq_length()

    @property
    def num_kept_tokens(self) -> int:
        """Counts the tokens that every question at the present budget shares: those read, and those it will read."""
        return self.num_read_tokens + self._unread.shape[1]

    def num_question_tokens(self, text: str | None = None) -> int:
        """Counts the tokens of the text behind the image, which every question reads for itself."""
        return len(self._prompt(text)[0]) - self.num_kept_tokens

    @torch.no_grad()
    def extend(self, budget: BudgetInput) -> None:
        """Grows to a budget; the next question reads the new soft tokens, and only those.

        Raises:
            ValueError: a compressor whose smaller budgets are not the beginnings of its larger ones, an adapter with a
                member per scale, or a budget that cannot be met or is not larger.
        """
        budget = Budget.of(budget)
        count = self._count_at(budget)
        nested = self._model.model.compressors[MEDIUM].nested
        if nested != "prefix":
            raise ValueError(
                f"media.{MEDIUM}.compressor gives {nested} tokens: those at {self.budget} do not begin {budget}; "
                "growing needs query, or pool with order haar"
            )
        if count.tokens <= self._count.tokens:
            raise ValueError(f"budget {budget} gives {count.tokens} soft tokens; the session has {self._count.tokens}")
        if self._expert_ids_at(count) != self._expert_ids:
            raise ValueError(
                f"the adapter has an expert per scale, so nothing that was read at {self.budget} holds at {budget}; "
                "begin another session"
            )
        self._unread = torch.cat([self._unread, self._soft_tokens(self._count.tokens, count)], dim=1)
        self.budget, self._count = budget, count

    @torch.no_grad()
    def answer(self, text: str | None = None) -> Answer:
        """Answers a question about the image at the present budget, as `Answerer.answer` does."""
        processor, decoding = self._processor, self._decoding
        ids, row = self._prompt(text)
        behind = ids[self.num_kept_tokens : -1]  # `generate` reads the last one itself
        # A question of which nothing is read here is read by `generate`, in its first pass, with every beam.
        reads = self._unread.shape[1] > 0 or (decoding.num_beams > 1 and len(behind) > 0)
        cache = self._read(behind)[1] if reads else copy_of(self._cache)
        if decoding.num_beams > 1:
            cache = spread(cache, decoding.num_beams)
        prompt = torch.tensor([ids], device=self._model.device)
        inputs = {
            "input_ids": prompt,
            "attention_mask": torch.ones_like(prompt),
            **cache_argument(cache),
            **self._expert_inputs(),
        }
        generated = generate_answers(self._model, processor, decoding, inputs)[0]
        extents = [span.extent for span in row.spans]
        return Answer(
            text=processor.batch_decode([generated.ids], skip_special_tokens=True)[0].strip(),
            budget=self.budget,
            tokens=tokens_by_medium(extents, [self._count]),
            is_trained=is_trained(extents, [self._count], processor.space),
            num_prompt_tokens=len(ids),
            num_new_tokens=len(generated.ids),
            num_shared_tokens=self.num_read_tokens,
            is_cut=not generated.has_end,
            min_probability=generated.min_probability,
            mean_log_probability=generated.mean_log_probability,
        )

    @torch.no_grad()
    def logits(self, text: str | None = None) -> Tensor:
        """Computes the logits (V,) of the first token of an answer; how sure they are tells whether growing pays."""
        return self._read(self._prompt(text)[0][self.num_kept_tokens :])[0]

    def _count_at(self, budget: Budget) -> TokenCount:
        return self._row.token_counts(budget, self._processor.space)[0]

    def _expert_ids_at(self, count: TokenCount) -> dict[str, int]:
        """Tells which experts of the adapter serve the image at a count, as the model takes them."""
        names, ids = self._processor.expert_names, {}
        if names.scales:
            ids["scale_ids"] = names.scale_id([(MEDIUM, count)])
        if names.tasks:
            ids["task_ids"] = names.task_id(self._row.task, [MEDIUM])
        return ids

    def _soft_tokens(self, start: int, count: TokenCount) -> Tensor:
        """Computes the soft tokens behind the first ones, (1, M - start, H)."""
        num_tokens = self._features.lengths.new_full((1,), count.tokens)
        soft = self._model.model.compress(MEDIUM, self._features, num_tokens=num_tokens, max_tokens=count.tokens)
        return as_weights_of(self._model.get_input_embeddings(), soft[:, start:])

    def _words(self, ids: Sequence[int]) -> Tensor:
        """Embeds n ids, (1, n, H)."""
        device = self._model.device
        return self._model.model.embed_text(torch.tensor([ids], dtype=torch.int64, device=device))

    def _expert_inputs(self) -> dict[str, Tensor]:
        return {key: torch.tensor([id_], device=self._model.device) for key, id_ in self._expert_ids.items()}

    def _read(self, behind: Sequence[int]) -> tuple[Tensor, DynamicCache]:
        """Lets the LLM read in one pass what is unread of the image, which is kept, and ids behind it, which are not.

        Returns:
            Logits (V,) behind the last token, and a cache of everything up to there, for the caller to go on with.
        """
        start = self.num_read_tokens
        embeds = torch.cat([self._unread, self._words(behind)], dim=1)
        end = start + embeds.shape[1]
        cache = copy_of(self._cache)
        output = self._model(
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, end, dtype=torch.int64, device=embeds.device),
            position_ids=torch.arange(start, end, device=embeds.device)[None],
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(cache),
            **self._expert_inputs(),
        )
        if self._unread.shape[1]:
            # The question is behind the image: cropping it off leaves what every later question shares.
            self._cache = copy_of(cache)
            self._cache.crop(-len(behind))
            self._unread = self._unread[:, :0]
        return output.logits[0, -1], cache

    def _prompt(self, text: str | None) -> tuple[list[int], EncodedSample]:
        """Makes the ids of a question, with the pad id for each soft token, and its row."""
        processor = self._processor
        samples = samples_about(self._files, [text], processor)
        row = processor.batch(samples, [self._loaded], for_training=False).rows[0]
        start = len(self._before)
        assert list(row.ids[:start]) == self._before
        assert row.ids[start] == processor.placeholder_ids[MEDIUM]
        return [*self._before, *[processor.pad_id] * self._count.tokens, *row.ids[start + 1 :]], row
