"""Writes many answers at once with one model: media are encoded once, and rows are read and decoded together.

transformers' `generate` does the decoding. Its continuous batching takes token ids alone and no soft tokens; so that
answers of different lengths leave and join all the same, a batch may be interrupted: what the LLM has read of each
answer is kept (see `mllm.kv_cache.rows`), and a new batch is put together of those that go on and those that come in.
New prompts are read in groups of like lengths, so that short ones are not padded to the longest.

Knows the model, the processor and answers. Does not know HTTP, queues or files.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mllm.budget import Budget
from mllm.inference.decoding import Decoding, end_ids_of, generate_options
from mllm.kv_cache.names import cache_argument
from mllm.kv_cache.rows import row_of, split_by_length, stack_rows
from mllm.kv_cache.system_prompt import SystemPrompt
from mllm.model.media_arguments import SIZE_KEYS, VALUE_KEYS
from mllm.model.modeling import ElasticForConditionalGeneration, Features
from mllm.processing.batch import Batch, EncodedSample
from mllm.processing.media_inputs import stack_media
from mllm.processing.placeholders import IGNORED_LABEL
from mllm.processing.processor import ElasticProcessor
from mllm.serving.answering import AnswerRun, ReadPrompt, decoder_of
from mllm.serving.media_cache import MediaItem
from mllm.utils.fail_points import fail_point

ENCODED_TOGETHER = 8
"""Items of one call of an encoder, so that its memory is bounded."""
CALL_TOKENS = 96
"""Prompts are read in one more group where that saves so many tokens of padding: about what a call takes by itself."""
EXPERT_KEYS = ("scale_ids", "task_ids")


class Engine:
    """Writes answers with a model, on whichever thread calls it; one at a time.

    Args:
        on_encoded: called with every item that was encoded just now.

    Raises:
        ValueError: a host whose prompts cannot be read in parts.
    """

    def __init__(
        self,
        model: ElasticForConditionalGeneration,
        processor: ElasticProcessor,
        *,
        on_encoded: Callable[[MediaItem], None] = lambda item: None,
    ) -> None:
        if processor.host is not None and (reason := processor.host.family.reads_whole):
            raise ValueError(
                f"a server reads prompts in parts, so that answers can be interrupted, and those of this "
                f"{processor.host.config.model_type} cannot be: {reason}"
            )
        self.model = model
        self.processor = processor
        self.decode = decoder_of(processor.tokenizer)
        self._on_encoded = on_encoded
        self._ends = frozenset(end_ids_of(model, processor))
        self._system_prompt = SystemPrompt()

    @torch.no_grad()
    def write(self, runs: Sequence[AnswerRun], is_interrupted: Callable[[int, int], bool]) -> None:
        """Go on with answers until all have ended, or until they are interrupted.

        Args:
            runs: answers that have not ended.
            is_interrupted: asked after every token with the steps so far and how many answers go on.
        """
        fail_point("serve.answer")
        self._read([run for run in runs if run.read is None])
        rows = [run.read for run in runs if run.read is not None]
        for run in runs:
            run.read = None  # the new batch holds copies; if it fails, prompts are read anew
        watch = _Watch(runs, self._ends, self.decode, is_interrupted)
        options = self._options(runs)
        options["stopping_criteria"] = StoppingCriteriaList([watch])
        if any(run.rules.temperature is not None for run in runs):
            options["logits_processor"] = LogitsProcessorList([_Draws(runs)])
        inputs = self._next_inputs(rows)
        cache = stack_rows([row.past for row in rows])
        # Each answer has rules of its own for its end; `generate` asks the model's config where it is told of none.
        config = self.model.generation_config
        ends, config.eos_token_id = config.eos_token_id, None
        try:
            device = self.model.device
            inputs = {key: value.to(device) for key, value in inputs.items()}
            self.model.generate(**inputs, **cache_argument(cache), **options)
        finally:
            config.eos_token_id = ends
        longest = inputs["input_ids"].shape[1]
        for number, (run, row) in enumerate(zip(runs, rows, strict=True)):
            if run.ending is None:
                num_tokens = run.prompt.num_prompt_tokens + len(run.ids) - 1
                kept = row_of(cache, number, num_padding=longest - row.num_tokens, num_tokens=num_tokens)
                run.read = replace(row, past=kept, next_token=run.ids[-1], next_embed=None)

    def _read(self, runs: Sequence[AnswerRun]) -> None:
        """Let the LLM read the prompts of answers, and what they have written before."""
        items = list(dict.fromkeys(item for run in runs for item in run.prompt.items))
        self._encode([item for item in items if item.features is None])
        lengths = [run.prompt.num_prompt_tokens + len(run.ids) for run in runs]
        for group in split_by_length(lengths, call_tokens=CALL_TOKENS):
            self._read_together([runs[number] for number in group])

    def _read_together(self, runs: Sequence[AnswerRun]) -> None:
        rows, shown = _numbered(runs)
        features = {encoder: self._stacked(items) for encoder, items in shown.items()}
        batch = Batch(rows)
        can_share = self.processor.shares_beginnings
        expanded = self.processor.expand(batch, [[Budget()] * len(rows)], left_padding=True, share_prefixes=can_share)
        constant = None
        if can_share:
            placeholders = self.processor.placeholder_ids.values()
            constant = self._system_prompt.of_batch(self.model.model.language_model, expanded.inputs, placeholders)
        inputs = {key: value.to(self.model.device) for key, value in expanded.inputs.items()}
        cache, last_embeds = self.model.read_prompts(**inputs, features=features, constant_prompt=constant)
        ids, mask = expanded.inputs["input_ids"], expanded.inputs["attention_mask"]
        experts = {key: expanded.inputs[key].tolist() for key in EXPERT_KEYS if key in expanded.inputs}
        positions = expanded.inputs.get("prompt_positions")
        lengths = mask.sum(dim=1).tolist()
        for number, run in enumerate(runs):
            row = row_of(cache, number, num_padding=ids.shape[1] - lengths[number], num_tokens=lengths[number] - 1)
            of_row = {key: values[number] for key, values in experts.items()}
            embed = None if last_embeds is None else last_embeds[number]
            # Behind a prompt positions count on, so a table of one entry says all that is left to say of them.
            behind = None if positions is None else positions[number, -1:] - (positions.shape[1] - 1)
            run.read = ReadPrompt(row, int(ids[number, -1]), of_row, embed, behind)

    def _next_inputs(self, rows: Sequence[ReadPrompt]) -> dict[str, Tensor]:
        """Return the inputs of `generate` for rows that have been read but for the last token of each.

        What has been read is looked at no more, so its ids may be padding and its embeddings zeros.
        """
        longest = max(row.num_tokens for row in rows)
        pad_id = self.processor.pad_id
        ids = torch.full((len(rows), longest), pad_id)
        ids[:, -1] = torch.tensor([row.next_token for row in rows])
        starts = longest - torch.tensor([row.num_tokens for row in rows])
        mask = (torch.arange(longest) >= starts[:, None]).long()
        inputs = {key: torch.tensor([row.expert_ids[key] for row in rows]) for key in rows[0].expert_ids}
        if any(row.positions is not None for row in rows):
            plain = torch.zeros(1, 3, dtype=torch.int64)
            tables = [plain if row.positions is None else row.positions for row in rows]
            inputs["prompt_positions"] = torch.stack(tables)
        if any(row.next_embed is not None for row in rows):
            is_soft = torch.tensor([row.next_embed is not None for row in rows])
            ids[is_soft, -1] = pad_id  # the logits have no place for it, and what looks ids up in them must not look
            embeds = self.model.model.embed_text(ids[:, -1:].to(self.model.device))[:, 0]
            embeds[is_soft] = torch.stack([row.next_embed for row in rows if row.next_embed is not None])
            inputs["inputs_embeds"] = embeds.new_zeros(len(rows), longest, embeds.shape[-1])
            inputs["inputs_embeds"][:, -1] = embeds
        return {"input_ids": ids, "attention_mask": mask, **inputs}

    def _options(self, runs: Sequence[AnswerRun]) -> dict[str, Any]:
        """Lists the arguments of `generate` that `Answerer` uses for greedy answers, up to the longest of these."""
        longest = max(run.rules.max_new_tokens - len(run.ids) for run in runs)
        return generate_options(self.model, self.processor, Decoding(max_new_tokens=longest, ignores_end=True))

    def _encode(self, items: Sequence[MediaItem]) -> None:
        """Run the encoders over items that have not been through them."""
        for encoder in dict.fromkeys(item.loaded.encoder for item in items):
            # By length, so that streams are padded little.
            of_encoder = sorted(
                (item for item in items if item.loaded.encoder == encoder), key=lambda item: item.loaded.raw_length
            )
            for start in range(0, len(of_encoder), ENCODED_TOGETHER):
                self._encode_together(encoder, of_encoder[start : start + ENCODED_TOGETHER])

    def _encode_together(self, encoder: str, items: Sequence[MediaItem]) -> None:
        values = stack_media([item.loaded for item in items])
        sizes = values.get(SIZE_KEYS[encoder])
        device = self.model.device
        features = self.model.model.encode(
            encoder, values[VALUE_KEYS[encoder]].to(device), None if sizes is None else sizes.to(device)
        )
        start = 0
        for item in items:
            rows = slice(start, start + item.loaded.num_items)
            start = rows.stop
            # Copies, so that an item that is kept does not keep the others of its batch.
            longest = int(features.lengths[rows].max())
            grids = None if features.grids is None else features.grids[rows].clone()
            item.keep(Features(features.values[rows, :longest].clone(), features.lengths[rows].clone(), grids))
            self._on_encoded(item)

    def _stacked(self, items: Sequence[MediaItem]) -> Features:
        """Return the features of all items of one encoder, one after the other."""
        features = [item.features for item in items if item.features is not None]
        longest = max(one.values.shape[1] for one in features)
        padded = [torch.nn.functional.pad(one.values, (0, 0, 0, longest - one.values.shape[1])) for one in features]
        grids = [one.grids for one in features if one.grids is not None]
        lengths = torch.cat([one.lengths for one in features])
        return Features(torch.cat(padded), lengths, torch.cat(grids) if grids else None)


def _numbered(runs: Sequence[AnswerRun]) -> tuple[list[EncodedSample], dict[str, list[MediaItem]]]:
    """Number the items of a batch: its rows with what they have written, and by encoder the items, each once."""
    shown: dict[str, list[MediaItem]] = {}
    numbers: dict[MediaItem, int] = {}
    counts: dict[str, int] = {}
    rows: list[EncodedSample] = []
    for run in runs:
        row = run.prompt.row
        spans = []
        for span, item in zip(row.spans, run.prompt.items, strict=True):
            encoder = item.loaded.encoder
            if item not in numbers:
                numbers[item] = counts.get(encoder, 0)
                counts[encoder] = numbers[item] + item.loaded.num_items
                shown.setdefault(encoder, []).append(item)
            spans.append(replace(span, item=numbers[item]))
        labels = [*row.labels, *[IGNORED_LABEL] * len(run.ids)]
        rows.append(replace(row, ids=[*row.ids, *run.ids], labels=labels, spans=tuple(spans)))
    return rows, shown


class _Watch(StoppingCriteria):
    """Sees every token as it is chosen, and says which rows are done.

    A row that has ended may be stepped on until the batch is; what comes then is nobody's.
    """

    def __init__(
        self,
        runs: Sequence[AnswerRun],
        ends: frozenset[int],
        decode: Callable[[Sequence[int]], str],
        is_interrupted: Callable[[int, int], bool],
    ) -> None:
        self.runs, self.ends, self.decode, self.is_interrupted = runs, ends, decode, is_interrupted
        self.steps = 0
        self.is_over = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore
        if not self.is_over:  # on a GPU the library looks at what is said here one step late
            for run, token in zip(self.runs, input_ids[:, -1].tolist(), strict=True):
                if run.ending is None:
                    run.take(token, self.ends, self.decode)
            self.steps += 1
            going_on = sum(run.ending is None for run in self.runs)
            self.is_over = going_on == 0 or self.is_interrupted(self.steps, going_on)
        done = [self.is_over or run.ending is not None for run in self.runs]
        return torch.tensor(done, device=input_ids.device)


class _Draws(LogitsProcessor):
    """Lets the best token of a row that is drawn be one that is drawn: logits over temperature, with Gumbel noise."""

    def __init__(self, runs: Sequence[AnswerRun]) -> None:
        self.runs = runs

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore
        scores = scores.clone()
        for row, run in enumerate(self.runs):
            if run.rules.temperature is not None and run.ending is None:
                noise = run.noise(scores.shape[-1]).to(scores.device)
                scores[row] = scores[row] / run.rules.temperature + noise
        return scores
