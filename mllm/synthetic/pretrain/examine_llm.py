"""Examines the synthetic LLM on text it has not read: questions on scenes, and phones to sentences.

Knows the held-out split, greedy decoding and the scores. Does not know how the LLM was trained.
"""

from collections.abc import Sequence
from typing import Any

import jiwer
import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from mllm.synthetic.images.questions import KINDS, one_question_per_kind
from mllm.synthetic.pretrain.blurred_text import BAG_WORDS
from mllm.synthetic.pretrain.text import Example, PretrainingText, Spoken
from mllm.synthetic.tokenizer import word_id

# Name of the paper -> what it shows of an utterance, and the settings that are random in training.
SPEECH_PAPERS: dict[str, tuple[tuple[str, ...], dict]] = {
    "phones": (("phones",), {"noise": 0.0}),
    "phones_noise20": (("phones",), {"noise": 0.2}),
    "audio4": (("audio",), {"noise": 0.0, "audio_rate": 4}),
    "audio8": (("audio",), {"noise": 0.0, "audio_rate": 8}),
    "audio16": (("audio",), {"noise": 0.0, "audio_rate": 16}),
    "audio4_noise50": (("audio",), {"noise": 0.5, "audio_rate": 4}),
    "video2": (("video",), {"noise": 0.1, "video_rate": 2}),
    "video5": (("video",), {"noise": 0.1, "video_rate": 5}),
    "audio4_noise50_video2": (("audio", "video"), {"noise": 0.5, "audio_rate": 4, "video_rate": 2}),
}
SCENE_PAPERS: dict[str, tuple[str, dict]] = {
    "text": ("scene_text", {}),
    "bags64": ("scene_bags", {"side": 8, "noise": 0.1}),
    "bags16": ("scene_bags", {"side": 4, "noise": 0.1}),
    "bags4": ("scene_bags", {"side": 2, "noise": 0.1}),
    "bags1": ("scene_bags", {"side": 1, "noise": 0.1}),
}


def examine(
    model: LlamaForCausalLM,
    tokenizer,
    spoken: Sequence[Spoken],
    *,
    split: str = "validation",
    num_scenes: int = 80,
    seed: int = 0,
) -> dict[str, float]:
    """Measure accuracy in percent per question kind ("text/colour") and word error rate in percent ("wer/audio4").

    Every question is asked by itself, one of each kind per scene.
    """
    results: dict[str, float] = {}
    for name, (kind, settings) in SCENE_PAPERS.items():
        text = PretrainingText(tokenizer, spoken, split=split, seed=seed + 1)
        scores = scene_accuracy(model, text, kind, num_scenes, **settings)
        results |= {f"{name}/{question}": value for question, value in scores.items()}
    for name, (media, settings) in SPEECH_PAPERS.items():
        text = PretrainingText(tokenizer, spoken, split=split, seed=seed + 1)
        results[f"wer/{name}"] = sentence_wer(model, text, media, **settings)
    return results


def scene_accuracy(
    model: LlamaForCausalLM, text: PretrainingText, kind: str, num_scenes: int, **settings
) -> dict[str, float]:
    """Measure the percent of right answers per question kind on `num_scenes` scenes of the split of `text`."""
    right: dict[str, list[bool]] = {question: [] for question in KINDS}
    for _ in range(num_scenes // 20):
        scenes = [next(text.scenes) for _ in range(20)]
        pairs = [(scene, question) for scene in scenes for question in one_question_per_kind(scene, text.generator)]
        examples = [text.sample(kind, scene=scene, questions=[question], **settings) for scene, question in pairs]
        guesses = _decode(model, text, examples, max_new_tokens=1)
        for (_, question), guess in zip(pairs, guesses, strict=True):
            right[question.kind].append(guess == question.answer)
    return {question: round(100.0 * float(np.mean(marks)), 1) for question, marks in right.items() if marks}


def sentence_wer(model: LlamaForCausalLM, text: PretrainingText, media: tuple[str, ...], **settings) -> float:
    """Measure the corpus word error rate in percent of greedy decoding over all utterances of `text`."""
    hypotheses: list[str] = []
    for start in range(0, len(text.spoken), 50):
        examples = [text.speech(utterance, media, **settings) for utterance in text.spoken[start : start + 50]]
        hypotheses += _decode(model, text, examples, max_new_tokens=16)
    references = [utterance.sentence for utterance in text.spoken]
    return round(100.0 * float(jiwer.wer(references, hypotheses)), 1)


@torch.no_grad()
def _decode(model: LlamaForCausalLM, text: PretrainingText, examples: list[Example], max_new_tokens: int) -> list[str]:
    """Decode answers greedily, to examples that are cut before their (only) answer and padded on the left."""
    table = model.model.embed_tokens.weight
    bag_ids = torch.tensor([word_id(text.tokenizer, word) for word in BAG_WORDS])
    ends = [example.answers[0][1] for example in examples]
    longest = max(ends)
    inputs, mask = table.new_zeros(len(examples), longest, table.shape[1]), torch.zeros(len(examples), longest).long()
    for row, (example, end) in enumerate(zip(examples, ends, strict=True)):
        inputs[row, longest - end :] = F.embedding(torch.tensor(example.ids[:end]), table)
        mask[row, longest - end :] = 1
        if example.bags:
            positions = torch.tensor(example.bag_positions) + (longest - end)
            inputs[row, positions] = torch.from_numpy(np.concatenate(example.bags)) @ table[bag_ids]
    generator: Any = model  # its type stubs do not know that a Llama can generate
    ids = generator.generate(
        inputs_embeds=inputs,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=text.tokenizer.pad_token_id,
    )
    return [answer.strip() for answer in text.tokenizer.batch_decode(ids, skip_special_tokens=True)]
