"""Pre-trains the small synthetic LLM on text, sharp and blurred, and saves it as a Hugging Face checkpoint.

Knows the optimizer, the batches and when to examine. Does not know images, audio or encoders; what the LLM reads is
in `text.py`. Run once; the result is shipped in `assets/llm` and stays frozen.

Shapes: B sequences, T tokens of the longest, n bags and h hints of the batch, K bag words, H model width.
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mllm.checkpoints.pretrained import load_checked
from mllm.synthetic.pretrain.blurred_text import BAG_WORDS
from mllm.synthetic.pretrain.examine_llm import examine
from mllm.synthetic.pretrain.files import header, save_half, write_line
from mllm.synthetic.pretrain.initialise_llm import initialise
from mllm.synthetic.pretrain.text import KINDS, Example, PretrainingText, speak_sentences
from mllm.synthetic.tokenizer import build_tokenizer, word_id

logger = logging.getLogger(__name__)

LOG = "log_llm.jsonl"
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 150
HINT_LAYERS = 3  # layers after which hints should be known; the two behind them are left to use them
HINT_WEIGHT = 0.15  # of a hint, against 1 for a word to predict; falls to nothing in the last fifth of the training
# Tokens per kind of sequence, relative, at the start and at the end of training: looking things up is learnt first.
EARLY_TOKEN_FRACTIONS = dict(zip(KINDS, (0.33, 0.36, 0.06, 0.07, 0.05, 0.12, 0.01), strict=True))
LATE_TOKEN_FRACTIONS = dict(zip(KINDS, (0.2, 0.22, 0.05, 0.16, 0.1, 0.26, 0.01), strict=True))


@dataclass(frozen=True)
class Batch:
    """Padded sequences, their bags, and the loss weight of every token."""

    ids: Tensor  # (B, T)
    weights: Tensor  # (B, T)
    bags: Tensor  # (n, K)
    bag_positions: Tensor  # (n,) into the B * T positions
    hint_positions: Tensor  # (h,) into the B * T positions
    hint_ids: Tensor  # (h,)


def llm_config(tokenizer: Any) -> LlamaConfig:
    """Give the shipped architecture: 5 layers of width 192, about 2.4 million parameters, embeddings tied."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        attention_bias=True,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.06,
    )


def pretrain_llm(
    out: str | Path,
    *,
    seed: int = 0,
    steps: int = 6000,
    tokens_per_step: int = 2048,
    num_utterances: int = 8000,
    examine_every_steps: int = 1000,
    time_limit_seconds: float | None = None,
    resume: bool = False,
) -> dict[str, float]:
    """Train the LLM and write it to `out` in float16, with its tokenizer and `log_llm.jsonl`.

    Args:
        out: folder for the checkpoint; an interim one is written at every examination.
        seed: of the initial weights and of everything the LLM reads.
        steps: optimizer steps; the learning rate warms up and falls to zero as a cosine.
        tokens_per_step: tokens of one optimizer step, padding not counted.
        num_utterances: sentences that are synthesised for their phone timings.
        examine_every_steps: steps between two examinations on the validation split.
        time_limit_seconds: finish the schedule within this time even when fewer steps fit into it; None for no limit.
        resume: go on from the checkpoint and the log in `out`, with a fresh optimizer and other text.

    Returns:
        the results of the last examination.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model, done, seconds = _start(out, tokenizer, seed, resume)
    started = time.monotonic() - seconds
    spoken = speak_sentences(num_utterances, split="train", seed=seed)
    text = PretrainingText(tokenizer, spoken, split="train", seed=seed + done)
    held_out = speak_sentences(max(20, num_utterances // 40), split="validation", seed=seed)
    bag_ids = torch.tensor([word_id(tokenizer, word) for word in BAG_WORDS])
    optimizer = _optimizer(model)
    log = (out / LOG).open("a" if resume else "w")
    facts = {"seed": seed, "begins_at_step": done, "steps": steps, "tokens_per_step": tokens_per_step}
    facts |= {"learning_rate": PEAK_LEARNING_RATE, "num_utterances": num_utterances}
    write_line(log, header(model, **facts))
    logger.info("pre-training an LLM of %d parameters", sum(p.numel() for p in model.parameters()))

    results: dict[str, float] = {}
    progress = _Progress(steps, time_limit_seconds, started)
    step, losses = done, []
    while not progress.is_over(step):
        done_fraction = progress.fraction(step)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * _schedule(done_fraction) * min(1.0, (step + 1 - done) / WARM_UP_STEPS)
        examples = sample_batch(text, done_fraction, tokens_per_step)
        hint_weight = HINT_WEIGHT * min(1.0, max(0.0, 5.0 * (1.0 - done_fraction)))
        losses.append(_train_step(model, optimizer, examples, bag_ids, hint_weight))
        step += 1
        if step % examine_every_steps == 0 or progress.is_over(step):
            results = examine(model.eval(), tokenizer, held_out, seed=seed)
            model.train()
            row = {"step": step, "seconds": round(time.monotonic() - started), "loss": float(np.mean(losses))}
            write_line(log, row | results)
            logger.info("step %d loss %.4f %s", step, row["loss"], json.dumps(results))
            losses = []
            _save(model, tokenizer, out)
    log.close()
    return results


def sample_batch(text: PretrainingText, done: float, num_tokens: int) -> list[Example]:
    """Sample sequences of mixed kinds until `num_tokens` are reached; `done` (0..1) of the training is over."""
    generator = text.generator
    text.progress = min(done, 1.0)
    examples: list[Example] = []
    for kind in KINDS:
        wanted = num_tokens * ((1 - done) * EARLY_TOKEN_FRACTIONS[kind] + done * LATE_TOKEN_FRACTIONS[kind])
        while wanted > 0:
            example = text.sample(kind)
            # The last one is kept in proportion to what is still wanted, so that the fractions hold on average.
            if wanted < len(example.ids) and generator.random() > wanted / len(example.ids):
                break
            examples.append(example)
            wanted -= len(example.ids)
    return examples


def collate(examples: Sequence[Example]) -> Batch:
    """Pad sequences on the right to the longest of them."""
    longest = max(len(example.ids) for example in examples)
    ids, weights = (np.zeros((len(examples), longest), kind) for kind in (np.int64, np.float32))
    positions: list[int] = []
    hints: list[tuple[int, int]] = []
    bags = [np.zeros((0, len(BAG_WORDS)), np.float32)]
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        weights[row, : len(example.ids)] = example.weights
        positions.extend(row * longest + position for position in example.bag_positions)
        hints.extend((row * longest + position, word) for position, word in example.hints)
        bags.extend(example.bags)
    return Batch(
        ids=torch.from_numpy(ids),
        weights=torch.from_numpy(weights),
        bags=torch.from_numpy(np.concatenate(bags)),
        bag_positions=torch.tensor(positions, dtype=torch.int64),
        hint_positions=torch.tensor([position for position, _ in hints], dtype=torch.int64),
        hint_ids=torch.tensor([word for _, word in hints], dtype=torch.int64),
    )


def embed(model: LlamaForCausalLM, batch: Batch, bag_ids: Tensor) -> Tensor:
    """Compute input embeddings (B, T, H): of words where a word stands, the weighted sum over the bag's words
    elsewhere."""
    table = model.model.embed_tokens.weight
    embedded = F.embedding(batch.ids, table)
    mixed = batch.bags @ table[bag_ids]
    return embedded.flatten(0, 1).index_copy(0, batch.bag_positions, mixed).view_as(embedded)


def _train_step(
    model: LlamaForCausalLM, optimizer, examples: list[Example], bag_ids: Tensor, hint_weight: float
) -> float:
    """Take one optimizer step over sequences of similar length at a time; return the loss per unit of weight."""
    total_weight = sum(sum(example.weights) for example in examples)
    total = 0.0
    # The weight of the whole step divides every group's loss, so that gradients add up as if there were one batch.
    for group in _by_length(examples):
        batch = collate(group)
        out = model.model(
            inputs_embeds=embed(model, batch, bag_ids), use_cache=False, output_hidden_states=hint_weight > 0
        )
        weights = batch.weights[:, 1:]
        is_target = weights > 0
        logits = model.lm_head(out.last_hidden_state[:, :-1][is_target])
        nll = F.cross_entropy(logits, batch.ids[:, 1:][is_target], reduction="none")
        loss = (nll * weights[is_target]).sum() / total_weight
        total += float(loss.detach())
        if hint_weight > 0:
            loss = loss + hint_weight * _hint_loss(model, out.hidden_states[HINT_LAYERS], batch) / total_weight
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _hint_loss(model: LlamaForCausalLM, hidden: Tensor, batch: Batch) -> Tensor:
    """Measure how badly a layer's hidden states (B, T, H), read as if they were the last, predict the words of the
    hints."""
    logits = model.lm_head(model.model.norm(hidden.flatten(0, 1)[batch.hint_positions]))
    return F.cross_entropy(logits, batch.hint_ids, reduction="sum")


def _by_length(examples: list[Example], max_padded_tokens: int = 800) -> Iterator[list[Example]]:
    ordered = sorted(examples, key=lambda example: len(example.ids))
    group: list[Example] = []
    for example in ordered:
        if group and (len(group) + 1) * len(example.ids) > max_padded_tokens:
            yield group
            group = []
        group.append(example)
    yield group


def _start(out: Path, tokenizer: Any, seed: int, resume: bool) -> tuple[LlamaForCausalLM, int, float]:
    """Make the model to train, and say how many steps and seconds it has behind it."""
    if resume:
        last = json.loads((out / LOG).read_text().splitlines()[-1])
        begun: Any = load_checked(LlamaForCausalLM, str(out), llm_config(tokenizer), dtype=torch.float32)
        return begun.train(), last["step"], last["seconds"]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llm_config(tokenizer))
    initialise(model, tokenizer)
    return model.train(), 0, 0.0


def _optimizer(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), eps=1e-8, foreach=True)


def _schedule(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


@dataclass
class _Progress:
    """Tracks how much of the training is done: by steps, or by time where that is the tighter limit."""

    steps: int
    time_limit_seconds: float | None
    started: float

    def fraction(self, step: int) -> float:
        by_steps = (step + 1) / self.steps
        if self.time_limit_seconds is None:
            return by_steps
        return max(by_steps, (time.monotonic() - self.started) / self.time_limit_seconds)

    def is_over(self, step: int) -> bool:
        return step >= self.steps or self.fraction(step - 1) >= 1.0


def _save(model: LlamaForCausalLM, tokenizer, out: Path) -> None:
    save_half(model, out, without=["lm_head.weight"])
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=24,
    ).save_pretrained(out)
    tokenizer.save_pretrained(out)
