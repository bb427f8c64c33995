"""Plans which sample is answered at which budgets: the work list, checked before anything runs.

Knows samples, budgets and the model's space. Does not know models or files.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from mllm.budget import NONE, Amount, Budget, Space
from mllm.data.manifest import Sample
from mllm.evaluation.answer_store import Key
from mllm.evaluation.media_stamps import NO_MEDIA, media_stamp_of
from mllm.evaluation.metrics import vqa_accuracy
from mllm.evaluation.scorers.registry import BENCHMARKS
from mllm.evaluation.scorers.submissions import SUBMISSIONS, Answer
from mllm.evaluation.scoring import scorer_of


@dataclass(frozen=True)
class Work:
    """One sample under one noise, and the budgets to answer it at."""

    set_name: str
    sample: Sample
    snr_db: float | None
    budgets: tuple[Budget, ...]
    media_stamp: str = NO_MEDIA

    def key(self, budget: Budget) -> Key:
        """Makes the key of the answer at a budget."""
        return Key(self.set_name, self.sample.id, self.snr_db, str(budget), self.media_stamp)

    @property
    def media_key(self) -> Hashable:
        """Returns what is equal for work of the same media; noise is made for each sample anew."""
        return self.sample.media_key if self.snr_db is None else (self.sample.id, self.set_name, self.snr_db)

    @property
    def media(self) -> tuple[str, ...]:
        """Lists the media of the sample in order of appearance."""
        return tuple(part.medium for part in self.sample.media)


def plan(
    sets: Mapping[str, Sequence[Sample]],
    budgets: Sequence[Budget],
    *,
    space: Space,
    snrs_db: Sequence[float | None] = (None,),
    allow_untrained: bool = False,
) -> list[Work]:
    """Makes the work list, in the order of the sets.

    A sample is answered at every budget that names a medium it holds, cut down to the media it holds, each once; noise
    is for samples with audio. Tokens per second are seen to be trained or not when a sample is at hand, not here.

    Raises:
        ValueError: an amount that was not trained unless `allow_untrained`, a task without a metric, answers that
            cannot be scored, a medium the model does not take, a sample no budget is for, or a budget that is for no
            sample.
    """
    for budget in budgets:
        if unknown := budget.media - set(space.media):
            allowed = ", ".join(space.media) or "text only"
            raise ValueError(f"budget {budget} names {min(unknown)}; this model takes {allowed}")
        space.check(budget)
        untrained = any(_is_untrained(m, amount, space) for m, amount in budget.amounts.items())
        if not allow_untrained and (untrained or not space.is_trained(replace(budget, amounts={}))):
            raise ValueError(untrained_message(budget, space))
    work, used = [], set()
    for name, samples in sets.items():
        _check_answers(name, samples)
        for sample in samples:
            _check(name, sample, space)
            suited = [(budget, _cut(budget, sample)) for budget in budgets if _is_for(budget, sample)]
            if not suited:
                held = " and ".join(sorted({part.medium for part in sample.media}))
                raise ValueError(f"sample {sample.id!r} of {name} holds {held}, which none of the budgets names")
            used |= {budget for budget, _ in suited}
            sample_budgets = tuple(dict.fromkeys(cut for _, cut in suited))
            has_audio = any(part.medium == "audio" for part in sample.media)
            stamp, sample_snrs = media_stamp_of(sample), snrs_db if has_audio else (None,)
            work += [Work(name, sample, snr_db, sample_budgets, stamp) for snr_db in sample_snrs]
    if idle := [budget for budget in budgets if budget not in used]:
        raise ValueError(f"budget {str(idle[0])!r} is for no sample: none holds a medium it names")
    return work


def references_of(sample: Sample) -> list[str]:
    """Lists the right answers: `meta.answers` if there are several, else the last message; none if a server judges.

    Raises:
        ValueError: `meta.answers` is no list of texts, or there is no last message of the assistant's.
    """
    answers = sample.meta.get("answers")
    if answers is not None:
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"sample {sample.id!r}: meta.answers must be a list of texts, got {answers!r}")
        return answers
    if is_for_server(sample):
        return []
    if sample.messages[-1].role != "assistant":
        raise ValueError(f"sample {sample.id!r} has no answer to compare with: its last message is the user's")
    return [sample.messages[-1].text]


def is_for_server(sample: Sample) -> bool:
    """Tells whether a server judges the sample: a benchmark's, without an answer, in a form that can be submitted."""
    return sample.messages[-1].role != "assistant" and sample.task in BENCHMARKS and sample.task in SUBMISSIONS


def untrained_message(budget: Budget, space: Space) -> str:
    """Words the refusal of a budget that training did not sample."""
    trained = "; ".join(f"{m}: {', '.join(map(str, space.media[m].choices))}" for m in budget.amounts)
    if budget.num_frames is not None:
        trained += f"; frames: {', '.join(map(str, space.media['video'].frame_counts))}"
    return f"budget {str(budget)!r} was not trained ({trained}); allow_untrained evaluates it and marks its rows"


def _is_untrained(medium: str, amount: Amount, space: Space) -> bool:
    return amount.kind != "per_second" and not space.media[medium].is_trained(amount)


def _check(name: str, sample: Sample, space: Space) -> None:
    scorer_of(sample.task)
    references = references_of(sample)
    if sample.task in BENCHMARKS:
        _check_question(name, sample, references)
    elif sample.task == "vqa":
        try:
            vqa_accuracy(references, "")
        except ValueError as error:
            raise ValueError(f"sample {sample.id!r} of {name}: meta.answers: {error}") from error
    elif len(references) != 1:
        raise ValueError(f"sample {sample.id!r} of {name}: task {sample.task} needs one answer, got {len(references)}")
    for part in sample.media:
        if part.medium not in space.media:
            allowed = ", ".join(space.media) or "text only"
            raise ValueError(f"sample {sample.id!r} of {name} holds {part.medium}; this model takes {allowed}")


def _check_question(name: str, sample: Sample, references: Sequence[str]) -> None:
    if not sample.media:
        raise ValueError(f"sample {sample.id!r} of {name} holds no image; {sample.task} asks about images")
    try:
        BENCHMARKS[sample.task].check(references, sample.meta)
        if is_for_server(sample):
            SUBMISSIONS[sample.task].check(Answer(sample.id, "", sample.meta))
    except ValueError as error:
        raise ValueError(f"sample {sample.id!r} of {name}: {error}") from error


def _check_answers(name: str, samples: Sequence[Sample]) -> None:
    for task in dict.fromkeys(sample.task for sample in samples):
        open_ones = [sample for sample in samples if sample.task == task and is_for_server(sample)]
        if open_ones and len(open_ones) < sum(sample.task == task for sample in samples):
            raise ValueError(
                f"{len(open_ones)} of the samples of {name} for {task} have no answer, such as {open_ones[0].id!r}, "
                "and the others have; a server judges all of them or none"
            )


def _is_for(budget: Budget, sample: Sample) -> bool:
    held = {part.medium for part in sample.media}
    left_out = {medium for medium, amount in budget.amounts.items() if amount == NONE}
    return not budget.media or not held or bool(held & budget.media and held - left_out)


def _cut(budget: Budget, sample: Sample) -> Budget:
    held = {part.medium for part in sample.media}
    cut = budget.only(held)
    return cut if held else replace(cut, total_tokens=None)
