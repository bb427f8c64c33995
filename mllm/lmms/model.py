"""Defines the chat model that lmms-eval runs: `lmms-eval --model mllm --model_args pretrained=RUN,budget=image=64`.

Knows lmms-eval's model class and its requests. Does not know tasks or scores. Nothing is caught here: a request that
cannot be answered ends the evaluation, instead of counting as an empty answer.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from mllm.checkpoints.load import load
from mllm.evaluation.request_costs import ModelCosts
from mllm.inference.answerer import Answer
from mllm.lmms.answering import BudgetedAnswers, Request, read_budget
from mllm.lmms.conversation import read_generation
from mllm.media import MediaLoader
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.processor import ElasticProcessor
from mllm.router.router import router_for

ALLOWED = ("pretrained", "budget", "batch_size", "device", "dtype", "attention")
Key = tuple[Any, ...]

logger = logging.getLogger(__name__)


class ElasticChat(lmms):
    """Answers with an elastic model at one budget, or at several, of which `reported` says whose answers are given.

    Args:
        pretrained: run folder or exported model.
        budget: soft tokens of each image, audio or video, with `+` for the comma: `image=64+audio=/4`; or several, all
            answered in the batch that encodes.
        batch_size: requests answered together.
        device: where to run; the GPU if there is one. With several processes each takes its own.
        dtype: data type of the frozen parts.
        attention: attention implementation of the LLM.
        loaded: the model and its processor where they are at hand already, on the device.
        unknown: any other argument is refused.

    Raises:
        ValueError: an argument that is missing or not known, or a budget that the model cannot meet.
        FileNotFoundError: no model in the folder.
    """

    is_simple = False

    def __init__(
        self,
        *,
        pretrained: str = "",
        budget: str | Sequence[str] | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "float32",
        attention: str = "sdpa",
        loaded: tuple[ElasticForConditionalGeneration, ElasticProcessor] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        _check_arguments(pretrained, batch_size, dtype, unknown)
        self.device = torch.device(device if device not in (None, "cuda") else device_of_rank())
        model, processor = loaded or load(pretrained, dtype=dtype, device=self.device, attention=attention)
        texts = list(budget) if isinstance(budget, list | tuple) else [budget]
        budgets = [read_budget(text, processor) for text in texts]
        for one in budgets:
            if not processor.space.is_trained(one):
                logger.warning("the budget %s was not trained", one)
        loader = MediaLoader(gray=True, limits=processor.limits)
        folder = Path(pretrained)
        self.answers = BudgetedAnswers(
            model,
            processor,
            budgets,
            batch_size=int(batch_size),
            loader=loader,
            router=router_for(folder, budgets),
            request_costs=ModelCosts(model, processor, folder),
        )
        self.reported = 0
        self._known: dict[Key, list[Answer]] = {}

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Gives the answers at the reported budget; those at the others are kept for when it is their turn.

        Raises:
            MediaError, ValueError: a request that cannot be answered.
        """
        keyed = self._keyed(requests)
        new = {key: request for key, request in keyed if key not in self._known}
        with tqdm(total=len(new), desc="mllm", disable=self.rank != 0 or not new) as bar:
            answers = self.answers(list(new.values()), bar.update)
        self._known |= zip(new, answers, strict=True)
        results = []
        for key, request in keyed:
            answer = self._known[key][self.reported]
            counts = TokenCounts(input_tokens=answer.num_prompt_tokens, output_tokens=answer.num_new_tokens)
            results.append(GenerationResult(request.generation.cut(answer.text), counts))
        return results

    def soft_tokens(self) -> dict[str, float]:
        """Computes the mean soft tokens of a request at the reported budget so far, by medium."""
        used = [known[self.reported].tokens for known in self._known.values()]
        media = dict.fromkeys(medium for tokens in used for medium in tokens)
        return {medium: sum(tokens.get(medium, 0) for tokens in used) / len(used) for medium in media}

    def _keyed(self, requests: list[Instance]) -> list[tuple[Key, Request]]:
        seen: dict[Key, int] = {}
        keyed = []
        for instance in requests:
            context, to_messages, arguments, doc_id, task, split = instance.args
            key: Key = (task, split, doc_id, context, repr(sorted(arguments.items())))
            repeat = seen[key] = seen.get(key, -1) + 1
            document = self.task_dict[task][split]
            request = Request(
                name=f"{task} {split} {doc_id}",
                generation=read_generation(arguments, repeat=repeat),
                messages=lambda to_messages=to_messages, document=document, id=doc_id: to_messages(document[id]),
            )
            keyed.append(((*key, repeat), request))
        return keyed

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuses: lmms-eval asks chat models for answers and never for likelihoods.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("mllm answers (generate_until); it is not asked for likelihoods as a chat model")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuses: each request is one conversation here.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("mllm answers one conversation at a time; tasks of several rounds are not served")


def _check_arguments(pretrained: str, batch_size: int | str, dtype: str, unknown: dict[str, Any]) -> None:
    if "budgets" in unknown:
        raise ValueError(
            "budgets is not an argument: one evaluation of lmms-eval reports one budget; give budget=..., "
            "or run several with `mllm lmms-eval --budgets`"
        )
    if unknown:
        raise ValueError(f"{min(unknown)} is not an argument of this model; allowed: {', '.join(ALLOWED)}")
    if not pretrained:
        raise ValueError("pretrained is missing; it names a run folder or an exported model")
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be a number of at least 1")
    if dtype not in (allowed := ("float32", "bfloat16", "float16")):
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(allowed)}")


def device_of_rank() -> str:
    """Name the GPU of this process, or the CPU where there is none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
