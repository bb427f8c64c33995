"""Teaches word projectors to hear on captions, before the first step, so that training starts from words.

Knows soft tokens, the LLM's word embeddings and captions; `word_choice.py` says which words there are. Does not know
the LLM's layers, losses or sampled budgets.

From an LLM's answers alone a projector takes thousands of steps to find which sounds make which word, since the LLM
must learn to listen at the same time. Connectionist temporal classification (Graves et al. 2006) needs no LLM: it sums
over all ways in which a caption's words, in order, with nothing between them, can lie on the features. A step costs a
tenth of one through a small LLM. What is heard is then given to the LLM as its own embeddings (LegoSLM, arXiv
2505.11352), which it must only learn to read. Where the encoder comes from a speech model, that model's own decoder
says where to begin (`word_decoder.py`).

Shapes: N items, T features, W words, H the LLM's hidden size.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast
from zlib import crc32

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_linear_schedule_with_warmup

from mllm.budget import Budget
from mllm.compressors import Pool, WordProjector
from mllm.data.manifest import Sample
from mllm.model.media_arguments import SIZE_KEYS, VALUE_KEYS
from mllm.model.modeling import Features
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor
from mllm.training.initialization.captions import check_captions, meeting, only, read_at
from mllm.training.initialization.word_choice import Spelling, choose_words, space_mark, spoken
from mllm.training.initialization.word_decoder import WordDecoder
from mllm.training.pipeline.token_scan import CHUNK

MASK_PROBABILITY, MASK_FEATURES = 0.02, 6
"""How often features begin that are put out, and how many are: a word must be heard without all of its features."""
BETAS = (0.9, 0.98)
LARGEST_GRADIENT = 1.0
WARMUP_FRACTION = 0.05
SCALED_BATCHES = 4
"""The batches by which the length of soft tokens is measured at the end."""

logger = logging.getLogger(__name__)


def word_media(model: Any) -> list[str]:
    """List the media whose projector is one to words."""
    return [medium for medium in model.model.compressors if _projector(model, medium) is not None]


@dataclass(frozen=True)
class WordLessons:
    """Says how word projectors learn to hear.

    Args:
        num_steps: a batch each.
        learning_rate: the largest; it rises in a twentieth of the steps and falls to nothing at the end.
        seed: of the features that are put out.
        decoder: knows words by the features of the audio encoder already; what it knows is where that medium's
            projector starts, and how its words sound stays as it is.
    """

    num_steps: int
    learning_rate: float
    seed: int
    decoder: WordDecoder | None = None


def teach_words(
    model: Any,
    processor: ElasticProcessor,
    samples: Sequence[Sample],
    batches: Iterable[Any],
    *,
    lessons: WordLessons,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Choose the words of every word projector, teach it to hear them, and give it their embeddings.

    Every process calls this; the gradients of all are added up.

    Args:
        samples: the captions, one medium item and one answer each.
        batches: of the captions, without end, those of this process.
        lessons: how they learn.
        progress: is called with how many of how many steps are done.

    Raises:
        ValueError: a row that is no caption (it is named), captions with too few or too many words, or a decoder of
            other features.
    """
    teachers = [
        _Teacher.of(model, processor, medium, samples, lessons.decoder if medium == "audio" else None)
        for medium in word_media(model)
    ]
    of_decoder = [teacher for teacher in teachers if teacher.starts_from_decoder]
    parameters = [parameter for teacher in teachers for parameter in teacher.learning()]
    optimizer = torch.optim.AdamW(parameters, lr=lessons.learning_rate, betas=BETAS, weight_decay=0.0)
    num_steps = lessons.num_steps
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, int(num_steps * WARMUP_FRACTION)), num_steps)
    model.eval()
    rest = iter(batches)
    for step in range(num_steps):
        batch: Batch = next(rest)["batch"]
        check_captions(batch)
        if step == 0:
            for teacher in of_decoder:
                teacher.set_nothing(batch)
        if step == num_steps // 2:
            for teacher in teachers:
                teacher.found.zero_()
        num_words = sum(teacher.listen(batch, (lessons.seed, step)) for teacher in teachers)
        _add_up(parameters, num_words)
        nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if progress is not None:
            progress(step + 1, num_steps)
    for teacher in teachers:
        teacher.projector.word_table.requires_grad_(False)
    scaled = [next(rest)["batch"] for _ in range(SCALED_BATCHES)]
    for teacher in teachers:
        teacher.give_embeddings(scaled)
        teacher.report()


@dataclass
class _Teacher:
    """Teaches the word projector of one medium.

    Args:
        found: (3,) float64, of the captions of this process in the second half of the steps: their words, the negative
            log likelihood of these, and how many have no place for theirs.
    """

    model: Any
    processor: ElasticProcessor
    medium: str
    projector: WordProjector
    spelling: Spelling
    found: Tensor

    @classmethod
    def of(
        cls,
        model: Any,
        processor: ElasticProcessor,
        medium: str,
        samples: Sequence[Sample],
        decoder: WordDecoder | None,
    ) -> "_Teacher":
        """Choose the words of a medium by its captions, and start from what the decoder knows of them."""
        projector = _projector(model, medium)
        assert projector is not None
        counts, tokenizer = _counted(samples, processor, medium), processor.tokenizer
        mark = space_mark(tokenizer)
        known = None if decoder is None else lambda word: spoken(word, mark) in decoder.rows
        try:
            spelling = choose_words(counts, tokenizer, projector.num_words, known=known)
        except ValueError as error:
            raise ValueError(f"model.{medium}.{error}") from error
        if decoder is not None:
            words = [spoken(word, mark) for word in tokenizer.convert_ids_to_tokens(spelling.words)]
            _start_from(projector, decoder, words, medium)
        projector.word_table.requires_grad_(False)
        projector.word_table.heard.requires_grad_(decoder is None)
        return cls(model, processor, medium, projector, spelling, torch.zeros(3, dtype=torch.float64))

    @property
    def starts_from_decoder(self) -> bool:
        """Whether a decoder knew how words sound, which is then not learned."""
        return not self.projector.word_table.heard.weight.requires_grad

    def learning(self) -> list[nn.Parameter]:
        """List what learns to hear: all but the embeddings, and but the sound of words that a decoder knew."""
        return [value for value in self.projector.parameters() if value.requires_grad]

    @torch.no_grad()
    def set_nothing(self, batch: Batch) -> None:
        """Let nothing be heard as loud as the best word is on average: most stretches end no word."""
        batch = only(batch, self.medium)
        best = torch.zeros(2, dtype=torch.float64)
        if batch.rows:
            features, items = self._encoded(batch), [row.spans[0].item for row in batch.rows]
            scores = self.projector.scores(features.values[items])[..., 1:].amax(-1)
            counts = self.projector.count_stretches(features.lengths[items])
            within = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
            best = torch.stack([scores[within].double().sum(), within.sum().double()])
        best = cast(Tensor, reduce(best.to(self.model.device), "sum"))
        self.projector.nothing.weight.zero_()
        self.projector.nothing.bias.fill_(float(best[0] / best[1].clamp(min=1)))

    def listen(self, batch: Batch, seeds: Sequence[int]) -> int:
        """Add the gradient of a batch's captions, summed over their words, and return how many words they have.

        Args:
            seeds: of the features that are put out, with the captions' ids.
        """
        batch = only(batch, self.medium)
        if not batch.rows:
            return 0
        features, items = self._encoded(batch), [row.spans[0].item for row in batch.rows]
        spelled = [self.spelling.of(row.labels) for row in batch.rows]
        num_features = features.values.shape[1]
        kept = torch.stack([_kept(num_features, [*seeds, crc32(row.sample_id.encode())]) for row in batch.rows])
        values = features.values[items] * kept.to(features.values)[..., None]
        scores = self.projector.scores(values).log_softmax(-1, dtype=torch.float32)
        num_stretches = self.projector.count_stretches(features.lengths[items])
        lost = functional.ctc_loss(
            scores.transpose(0, 1),
            torch.tensor([word for words in spelled for word in words], device=scores.device),
            num_stretches,
            torch.tensor([len(words) for words in spelled], device=scores.device),
            reduction="sum",
            zero_infinity=True,  # a caption that has no place has no likelihood, and its gradient would be no number
        )
        lost.backward()
        places = zip(spelled, num_stretches.tolist(), strict=True)
        placed = [words for words, most in places if _least_stretches(words) <= most]
        num_words = sum(map(len, placed))
        found = [num_words, lost.item(), len(spelled) - len(placed)]
        self.found += torch.tensor(found, dtype=torch.float64)
        return num_words

    @torch.no_grad()
    def _encoded(self, batch: Batch) -> Features:
        device = self.model.get_input_embeddings().weight.device
        values, sizes = (batch.values.get(keys[self.medium]) for keys in (VALUE_KEYS, SIZE_KEYS))
        assert values is not None
        return self.model.model.encode(self.medium, values.to(device), None if sizes is None else sizes.to(device))

    def _trained(self) -> list[Budget]:
        """List the trained budgets of the medium, largest first."""
        return [Budget({self.medium: amount}) for amount in self.processor.space.media[self.medium].trained]

    @torch.no_grad()
    def give_embeddings(self, batches: Sequence[Batch]) -> None:
        """Give every word the LLM's embedding, scaled so that soft tokens at the smallest budget are as long as words.

        They are means over the most features, nearly all of which hold nothing, and so the shortest; see
        `projector_fit._solve`. Nothing has the mean of the embeddings, as it is.
        """
        embed = self.model.get_input_embeddings()
        matrix = self.projector.word_table.said.weight
        ids = torch.tensor(self.spelling.words, device=embed.weight.device)
        words = embed(ids).to(matrix)
        matrix.zero_()
        matrix[:, 1:] = words.T
        squares = torch.zeros(2, dtype=torch.float64)
        smallest = self._trained()[-1]
        for batch in batches:
            able = meeting(only(batch, self.medium), (smallest,), self.processor)
            if not able.rows:
                continue
            _, soft, counts, _ = read_at(self.model, self.processor, able, smallest, self.medium, self._encoded(able))
            squares += torch.tensor([float(soft.double().square().sum()), float(counts.sum())], dtype=torch.float64)
        squares = cast(Tensor, reduce(squares.to(matrix.device), "sum"))
        length = (squares[0] / squares[1].clamp(min=1)).sqrt()
        if length > 0:
            matrix *= (words.square().sum(-1).mean().sqrt() / length).to(matrix)
        matrix[:, 0] = words.mean(0)

    def report(self) -> None:
        """Log how well the words are heard, on all processes, and how many captions were too short for theirs."""
        num_words, lost, too_short = cast(Tensor, reduce(self.found.to(self.model.device), "sum")).tolist()
        logger.info(
            "%s: %d words, heard at %.2f nats each over the last captions",
            self.medium,
            self.projector.num_words,
            lost / max(num_words, 1),
        )
        if too_short:
            logger.warning(
                "%s: %d times a caption had more words than features, and taught nothing", self.medium, too_short
            )


def _projector(model: Any, medium: str) -> WordProjector | None:
    compressor = model.model.compressors[medium]
    first = compressor.projectors[0] if isinstance(compressor, Pool) else None
    return first if isinstance(first, WordProjector) else None


@torch.no_grad()
def _start_from(projector: WordProjector, decoder: WordDecoder, words: Sequence[str], medium: str) -> None:
    """Read features as a decoder does, in place of at random; the part that is not linear adds nothing yet.

    Args:
        words: of the projector, in its order, with spaces before them.

    Raises:
        ValueError: the decoder reads features of another size.
    """
    if projector.linear.weight.shape != decoder.weight.shape:
        raise ValueError(
            f"train.word_decoder reads features of {len(decoder.weight)} numbers, and those of model.{medium}.encoder "
            f"have {projector.linear.in_features}; give the speech model that the encoder comes from"
        )
    projector.linear.weight.copy_(decoder.weight)
    projector.linear.bias.copy_(decoder.bias)
    for value, known in zip((projector.norm.weight, projector.norm.bias), decoder.norm, strict=True):
        value.copy_(known)
    last = cast(nn.Linear, projector.mlp[-1])
    heard = projector.word_table.heard
    for value in (last.weight, last.bias, heard.weight, heard.bias):
        value.zero_()
    unknown = [word for word in words if word not in decoder.rows]
    if unknown:
        logger.warning("%s: train.word_decoder does not know %s, which are never heard", medium, ", ".join(unknown))
    numbers = [number for number, word in enumerate(words) if word in decoder.rows]
    heard.weight[numbers] = decoder.embeddings[[decoder.rows[words[number]] for number in numbers]].to(heard.weight)


def _counted(samples: Sequence[Sample], processor: ElasticProcessor, medium: str) -> Counter[int]:
    """Count the target tokens of a medium's captions."""
    messages = [sample.messages for sample in samples if any(part.medium == medium for part in sample.media)]
    counts: Counter[int] = Counter()
    for start in range(0, len(messages), CHUNK):
        for prompt in processor.chat.encode_all(messages[start : start + CHUNK]):
            counts.update(label for label in prompt.labels if label >= 0)
    return counts


def _least_stretches(words: Sequence[int]) -> int:
    """Return how many stretches CTC needs for words: one for each, and one of nothing between two that are alike."""
    return len(words) + sum(one == other for one, other in pairwise(words))


def _kept(num_features: int, seeds: Sequence[int]) -> Tensor:
    """Put out some features of an item, a few at a time: (T,) with 0 there and 1 elsewhere."""
    begins = torch.from_numpy(np.random.default_rng(seeds).random(num_features) < MASK_PROBABILITY).float()
    before = functional.pad(begins, (MASK_FEATURES - 1, 0))
    return 1.0 - functional.max_pool1d(before[None], MASK_FEATURES, stride=1)[0]


def _add_up(parameters: Sequence[nn.Parameter], num_words: int) -> None:
    """Add up the gradients of all processes, per word of all of them."""
    gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
    counted = torch.tensor([float(num_words)], device=gradients[0].device)
    whole = cast(Tensor, reduce(torch.cat([counted, *(gradient.flatten() for gradient in gradients)]), "sum"))
    parts = (whole[1:] / whole[0].clamp(min=1)).split([value.numel() for value in parameters])
    for value, part in zip(parameters, parts, strict=True):
        value.grad = part.view_as(value)
