"""Measures what a budget saves beside what the FLOP model says: answers and one training step of a small model.

    python benchmarks/budget_cost.py [--repeats 7] [--threads 1]

The model has random weights: a CLIP encoder with 12 x 12 patches, pooling, and a 6-layer Llama with LoRA. Budgets are
timed in turn, repeat by repeat, so that a slow moment of the machine hits all of them; shown are medians and the range
of the middle half. Before anything is timed, answers and losses of all budgets together must equal those of each alone.
The baseline is the same model at its largest budget; there is no released code to follow.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from outcomes import Outcome, append, timed
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig
from turns import in_turns, milliseconds, options, ratio_of, unprepared

from mllm.adapters import build_adapter
from mllm.budget import Budget
from mllm.checkpoints.build import config_of_parts
from mllm.config.medium import ImageConfig, ImageEncoderConfig
from mllm.config.model import LoraConfig, ModelConfig
from mllm.config.processor import ProcessorConfig
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.evaluation.flops import Item, RequestCost, llm_flops, request_cost, train_factor
from mllm.inference.answerer import Answer, Answerer, Decoding
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.trainables import set_trainables
from mllm.processing.batch import Batch
from mllm.processing.processor import PLACEHOLDER_TOKENS, ElasticProcessor, LoadedMedia
from mllm.synthetic.tokenizer import build_tokenizer
from mllm.training.loss import loss_of_logits
from mllm.training.step import fixed_views, make_training_batch, num_targets

BUDGETS = [Budget.parse(f"image={count}") for count in (144, 36, 9, 1)]
NUM_ROWS = 4
NUM_NEW_TOKENS = 8
ANSWER = "place blue at f two now and then again"
Columns = Mapping[str, tuple[Callable[[Budget], object], Callable[[Answer], int]]]
"""By name: what is run at a budget, and the FLOPs of one row of it."""


def build_model() -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """Build a model of 15 million parameters with random weights, and its processor."""
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, image_size=96, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )
    medium = ImageConfig(encoder=ImageEncoderConfig(source="random", feature_layer=-1), budgets=[144, 36, 9, 1])
    lora = LoraConfig(rank=16, targets=["q_proj", "v_proj"])
    settings = ModelConfig(llm="random", chat_format="plain", image=medium, adapter=lora)
    placeholder_ids = {"image": cast(int, tokenizer.convert_tokens_to_ids(PLACEHOLDER_TOKENS["image"]))}
    torch.manual_seed(0)
    model = ElasticForConditionalGeneration(
        config_of_parts(settings, text_config=text, encoder_configs={"image": vision}, placeholder_ids=placeholder_ids)
    )
    build_adapter(model.model.language_model, lora)
    set_trainables(model)
    kept = ProcessorConfig(chat_format="plain", preprocessors={"image": {}})
    processor = ElasticProcessor(tokenizer, model.config, kept)
    return model.eval(), processor


def build_batch(processor: ElasticProcessor, *, for_training: bool) -> Batch:
    """Make rows of one random image and a question."""
    generator = torch.Generator().manual_seed(1)
    prompt = (
        Media("image", "none"),
        Text("what colour is the circle left of the square and how many objects are there?"),
    )
    messages = (Message("user", prompt), Message("assistant", (Text(ANSWER),)))
    samples = [Sample(f"row{number}", messages, task="vqa") for number in range(NUM_ROWS)]
    media = [[LoadedMedia("image", torch.randn(3, 96, 96, generator=generator))] for _ in samples]
    return processor.batch(samples, media, for_training=for_training)


def train_step(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, batch: Batch, budgets: Sequence[Budget]
) -> float:
    """Go forward and backward once, gradients cleared; return the loss."""
    training_batch = make_training_batch(batch, fixed_views(batch.rows, budgets), processor)
    logits = model(**training_batch.inputs, logit_positions=training_batch.positions).logits
    loss = loss_of_logits(logits, training_batch.targets, num_targets(batch.rows)).total
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


def check_equality(answerer: Answerer, prompts: Batch, training_rows: Batch) -> None:
    """Check that all budgets together give what each gives alone."""
    together = answerer.answer_batch(prompts, [[budget] * NUM_ROWS for budget in BUDGETS])
    alone = [answerer.answer_batch(prompts, [[budget] * NUM_ROWS])[0] for budget in BUDGETS]
    if [[answer.text for answer in row] for row in together] != [[answer.text for answer in row] for row in alone]:
        raise SystemExit("FAILED: answers at all budgets together differ from those at each budget alone")
    model, processor = answerer.model, answerer.processor
    losses = [train_step(model, processor, training_rows, [budget]) for budget in BUDGETS]
    packed = train_step(model, processor, training_rows, BUDGETS)
    if abs(packed - statistics.mean(losses)) > 1e-5 * packed:
        raise SystemExit(
            f"FAILED: the loss over all budgets is {packed}, the mean of each alone {statistics.mean(losses)}"
        )


def request_flops(model: ElasticForConditionalGeneration, answer: Answer, num_new_tokens: int) -> RequestCost:
    """Count by the FLOP model one row."""
    item = Item("image", 144, answer.tokens["image"])
    return request_cost(model.config, [item], num_prompt_tokens=answer.num_prompt_tokens, num_new_tokens=num_new_tokens)


def step_flops(model: ElasticForConditionalGeneration, training_rows: Batch, answer: Answer) -> int:
    """Count by the FLOP model one row of a step: the encoder forwards, the frozen LLM forwards and back."""
    learned = num_targets(training_rows.rows) // NUM_ROWS
    num_tokens = answer.num_prompt_tokens + learned
    llm = llm_flops(model.config.text_config, num_tokens=num_tokens, num_logits=learned, adapter=model.config.adapter)
    cost = request_flops(model, answer, 1)
    return cost.encoder + 3 * cost.compressor + train_factor() * llm


def answer_exactly(answerer: Answerer, prompts: Batch, budget: Budget, num_new_tokens: int) -> list[Answer]:
    """Give answers of exactly so many tokens, so that every budget decodes equally long."""
    answerer.model.generation_config.min_new_tokens = num_new_tokens
    answerer.decoding = Decoding(max_new_tokens=num_new_tokens)
    return answerer.answer_batch(prompts, [[budget] * NUM_ROWS])[0]


def main() -> None:
    """Check, measure and print."""
    arguments = options(__doc__, 7)
    model, processor = build_model()
    answerer = Answerer(model, processor, Decoding(max_new_tokens=NUM_NEW_TOKENS))
    prompts, training_rows = (build_batch(processor, for_training=training) for training in (False, True))
    check_equality(answerer, prompts, training_rows)
    answers = {budget: answer_exactly(answerer, prompts, budget, 1)[0] for budget in BUDGETS}
    columns: Columns = {
        "first token": (
            lambda budget: answer_exactly(answerer, prompts, budget, 1),
            lambda answer: request_flops(model, answer, 1).total,
        ),
        f"{NUM_NEW_TOKENS} tokens": (
            lambda budget: answer_exactly(answerer, prompts, budget, NUM_NEW_TOKENS),
            lambda answer: request_flops(model, answer, NUM_NEW_TOKENS).total,
        ),
        "train step": (
            lambda budget: train_step(model, processor, training_rows, [budget]),
            lambda answer: step_flops(model, training_rows, answer),
        ),
    }
    title = f"CPU time, {NUM_ROWS} rows, {arguments.threads} threads"
    append(compare(answers, columns, title=title, repeats=arguments.repeats), arguments.results)


def compare(answers: Mapping[Budget, Answer], columns: Columns, *, title: str, repeats: int) -> list[Outcome]:
    """Measure and print, and make the outcomes of the smallest budget."""
    device = torch.device("cpu")
    measured = {
        name: in_turns(unprepared({str(budget): partial(run, budget) for budget in answers}), repeats, device)
        for name, (run, _) in columns.items()
    }
    table = Table(title=f"{title}, median (middle half) of {repeats}; equality checks passed", title_justify="left")
    table.add_column("budget")
    for name in columns:
        for column in (f"{name} ms", "faster", "FLOP model", "GFLOP/s"):
            table.add_column(column, justify="right")
    first, *_, last = answers
    outcomes = []
    for budget, answer in answers.items():
        cells = []
        for name, (_, flops) in columns.items():
            times, most = measured[name][str(budget)], measured[name][str(first)]
            predicted = flops(answers[first]) / flops(answer)
            speed = NUM_ROWS * flops(answer) / statistics.median(times) / 1e9
            cells += [
                milliseconds(times, digits=0),
                f"{ratio_of(most, times):.2f}x",
                f"{predicted:.2f}x",
                f"{speed:.0f}",
            ]
            if budget == last:
                what, check = f"{name} at {last}", "answers and loss as each alone"
                outcomes.append(timed(what, f"at {first}", most, times, check=check, predicted=predicted))
        table.add_row(str(budget), *cells)
    Console(width=140).print(table)
    return outcomes


if __name__ == "__main__":
    main()
