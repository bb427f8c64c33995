"""Grows an image's budget to 256 soft tokens after a question at fewer, beside reading the prompt of 256 anew.

    python benchmarks/growing_budget.py [--repeats 9] [--threads 1] [--device cpu]

The model is that of `grouped_questions.py` with a query compressor of 256 queries; the question behind the image has
about 20 tokens. Grown is `session.extend("image=256")` and the first logits of the question, in a session that was
asked at the smaller budget. From scratch encodes the image and reads the whole prompt, as every released system
does for each budget (gordonhu608/MQT-LLaVA @92c35d0, llava/model/llava_arch.py:143-146, called by every `generate`,
language_model/llava_llama.py:110-139); from its features, which a session keeps as well, compressor and LLM do all of
their work anew. All run in this
process in turns; logits are compared first, and a difference above 1e-5 of the largest stops the benchmark. Shown are
medians and the range of the middle half, and beside each ratio the one that FLOPs (`mllm/evaluation/flops.py`) predict.
Times are CPU time of the process, or wall time on a GPU.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from grouped_questions import build_model
from outcomes import Outcome, append, timed
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from turns import in_turns, options, ratio, spread

from mllm.config.medium import ImageConfig, ImageEncoderConfig, ImageQueryConfig
from mllm.evaluation.flops import Item, llm_flops, request_cost
from mllm.inference.answerer import Answerer
from mllm.inference.progressive import ProgressiveSession
from mllm.inference.reading import read_request

STARTS = (16, 64, 128)
MOST = 256
GOAL_START, GOAL = 64, 1.3
QUESTION = "how many objects are there, and what is the colour of the one that is left of the largest square?"


def runs_of(answerer: Answerer, image: Path) -> dict[str, Callable[[ProgressiveSession], Tensor]]:
    """Make the first logits of an answer at the largest budget, given a session at a smaller one."""
    questions = read_request({"image": image}, [QUESTION], f"image={MOST}", answerer.processor)
    samples, media, budget = questions.samples, questions.windows[0].media, questions.budget
    batch = answerer.processor.batch(samples, [media], for_training=False)
    expanded = answerer.processor.expand(batch, [[budget]], left_padding=True).inputs
    inputs = {key: value.to(answerer.model.device) for key, value in expanded.items()}
    model: Any = answerer.model
    with torch.no_grad():
        features = {"image": model.model.encode("image", inputs["pixel_values"])}

    def grown(session: ProgressiveSession) -> Tensor:
        session.extend(budget)
        return session.logits(QUESTION)

    @torch.no_grad()
    def scratch(_: ProgressiveSession) -> Tensor:
        return model(**inputs, use_cache=True, logits_to_keep=1).logits[0, -1]

    @torch.no_grad()
    def encoded(_: ProgressiveSession) -> Tensor:
        return model(**inputs, features=features, use_cache=True, logits_to_keep=1).logits[0, -1]

    return {"from scratch": scratch, "from its features": encoded, "grown": grown}


def predicted(config: Any, session: ProgressiveSession, num_prompt_tokens: int) -> tuple[float, float]:
    """Compute the ratios of FLOPs: from scratch, and from its features, to grown."""
    patches = 576
    whole = request_cost(config, [Item("image", patches, MOST)], num_prompt_tokens=num_prompt_tokens, num_new_tokens=1)
    read = session.num_read_tokens
    new = llm_flops(config.text_config, num_tokens=num_prompt_tokens - read, past_tokens=read, num_logits=1)
    new += whole.compressor
    return whole.total / new, (whole.total - whole.encoder) / new


def compare(arguments: argparse.Namespace, image: Path) -> tuple[Table, list[Outcome]]:
    """Check equality first, then time in turns."""
    device = torch.device(arguments.device)
    encoder = ImageEncoderConfig(source="random")
    medium = ImageConfig(encoder=encoder, compressor=ImageQueryConfig(), budgets=[*STARTS, MOST])
    model, processor = build_model(device, getattr(torch, arguments.dtype), medium)
    answerer = Answerer(model, processor)
    runs = runs_of(answerer, image)
    table = Table(title=f"from a kept cache to {MOST} soft tokens: seconds to the first logits")
    columns = ("kept soft tokens", *runs, "times faster", "FLOPs", "than from features", "FLOPs", "largest difference")
    for column in columns:
        table.add_column(column, justify="right")
    outcomes = []
    for start in STARTS:

        def begin(start: int = start) -> ProgressiveSession:
            session = answerer.begin(image=image, budget=f"image={start}")
            session.logits(QUESTION)
            return session

        logits = {name: run(begin()) for name, run in runs.items()}
        off = float((logits["grown"] - logits["from scratch"]).abs().max() / logits["from scratch"].abs().max())
        if off > (1e-5 if arguments.dtype == "float32" else 2e-2):
            raise SystemExit(f"{start} tokens: logits of a grown budget differ by {off:.1e} of the largest")
        session = begin()
        length = session.num_read_tokens + session.num_question_tokens(QUESTION) + MOST - start
        whole, alone = predicted(model.config, session, length)
        times = in_turns(runs, arguments.repeats, device, begin)
        scratch, encoded, grown = times.values()
        ratios = (ratio(scratch, grown), f"{whole:.2f}", ratio(encoded, grown), f"{alone:.2f}")
        table.add_row(str(start), *map(spread, times.values()), *ratios, f"{off:.1e}")
        if start == GOAL_START:
            what, check = f"budget grown from {start} to {MOST}", f"logits within {off:.0e} of the largest"
            outcomes += [
                timed(what, "from scratch", scratch, grown, check=check, predicted=whole, goal=GOAL),
                timed(what, "from the image's features", encoded, grown, check=check, predicted=alone),
            ]
    return table, outcomes


def main() -> None:
    arguments = options(__doc__, 9, with_device=True)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        noise = torch.randint(0, 256, (336, 336, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(image)
        table, outcomes = compare(arguments, image)
    Console(width=180).print(table)
    append(outcomes, arguments.results)


if __name__ == "__main__":
    main()
