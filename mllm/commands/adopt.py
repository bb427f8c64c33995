"""Runs `mllm adopt`: examines a pretrained VLM or audio LLM, compares it with itself, and writes a run config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm.commands.new_config import write_new_config, yaml_scalar

SUMMARY = "Make a pretrained VLM or audio LLM elastic: look it over, compare it with itself, write a run config."
POSITIONAL = "model"
SECONDS = 10.0
"""Length of the clip whose cost is shown of an audio LLM."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Examine a pretrained model that is to be taken whole, and write a config that `mllm train --config` reads.

    The model is refused where what this project computes on it differs from what transformers computes, at the full
    budget or at a reduced one."""

    model: str
    """Folder or hub name of the model, such as a LLaVA, an InternVL or a Qwen2-Audio."""
    out: str = "adopted.yaml"
    """File to write; one that is there is left alone."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to compare in, and to keep the frozen model in when training."""
    manifest: str = "train.jsonl"
    """Manifest to train on."""
    run_folder: str | None = None
    """Folder of the run; `runs` and the name of the config when left out."""


def run(settings: Settings) -> int:
    """Examine, probe, and write the config."""
    from mllm.checkpoints.adoption import examine, probe
    from mllm.commands.terminal import console, quiet_loading

    quiet_loading()
    findings = examine(settings.model)
    out = console()
    for line in _report(settings.model, findings):
        out.print(line, soft_wrap=True, highlight=False)
    probe(settings.model, dtype=settings.dtype)
    out.print(f"compared with the host's own pipeline in {settings.dtype}, full and reduced: equal", highlight=False)
    path = write_new_config(config_text(settings, findings), settings.out)
    out.print(f"written: {path}; then mllm train --config {path}", soft_wrap=True, highlight=False)
    return 0


def _report(reference: str, findings: Any) -> list[str]:
    """Describe the host in lines of text."""
    lines = [f"{reference}: {findings.model_type}, reads {findings.medium}"]
    for name, (kind, size) in (
        ("encoder", findings.encoder),
        ("projector", findings.projector),
        ("LLM", findings.llm),
    ):
        lines.append(f"  {name:<10}{kind}, {size:,} parameters")
    if findings.keeps_shape:
        rows, columns = findings.grid
        lines.append("  tokens    by the size of an image, whose shape is kept")
        unit = f"an image of {rows} x {columns} tokens"
    elif findings.grid is not None:
        rows, columns = findings.grid
        lines.append(f"  tokens    {rows * columns} per tile, {rows} x {columns}")
        unit = "a tile"
    else:
        whole = f", in whole windows of {findings.whole_seconds:g} seconds" if findings.whole_seconds else ""
        lines.append(f"  tokens    {findings.tokens_per_second:g} per second{whole}")
        unit = f"{findings.whole_seconds or SECONDS:g} seconds"
    lines.append(f"  budgets   {', '.join(findings.budgets)} (proposed)")
    lines.append(f"  cost      {_cost_line(reference, findings, unit)}")
    return lines


def _cost_line(reference: str, findings: Any, unit: str) -> str:
    """Say what pooling can save, or why that is not known."""
    try:
        shares = cost_shares(reference, findings)
    except ValueError as error:  # an LLM that the formula does not cover is adopted all the same
        return f"not counted: {error}"
    return (
        f"{shares[0]:.0%} of the products of reading {unit} are the encoder's and projector's, which pooling does not "
        f"save; at {findings.budgets[-1]} the whole costs {shares[1]:.0%}"
    )


def cost_shares(reference: str, findings: Any) -> tuple[float, float]:
    """Return the part of encoder and projector in reading one tile or clip at the full budget, and the part of that
    which the smallest budget costs in all.

    Raises:
        ValueError: an LLM that the formula does not cover.
    """
    from mllm.checkpoints.pretrained import host_config
    from mllm.evaluation.flops import Item, host_flops, llm_flops

    config = host_config(reference)
    smallest = findings.budgets[-1]
    is_grid = findings.grid is not None
    seconds = findings.whole_seconds or SECONDS
    full = findings.grid[0] * findings.grid[1] if is_grid else round(seconds * findings.tokens_per_second)
    least = full // int(smallest.removeprefix("/")) if smallest.startswith("/") else int(smallest)
    encoder = host_flops(config, Item(findings.medium, full, full))
    reading = [llm_flops(config.get_text_config(), num_tokens=tokens) for tokens in (full, least)]
    whole = encoder + reading[0]
    return encoder / whole, (encoder + reading[1]) / whole


def config_text(settings: Settings, findings: Any) -> str:
    """Return the config as YAML, with comments."""
    are_counts = findings.budgets[0].isdigit()
    counts = ", ".join(budget if are_counts else f'"{budget}"' for budget in findings.budgets)
    unit = "soft tokens per tile" if are_counts else "of the host's own tokens per soft token"
    seen = ", ".join(map(str, findings.resolutions))
    smaller = f"  # max_image_tokens: [{seen}]  # random ones of images that are seen smaller too: image<=N\n"
    run_folder = settings.run_folder or f"runs/{Path(settings.out).stem}"
    return f"""# Written by `mllm adopt`. `mllm train --help` tells of the keys; the command line overrules this file:
#   mllm train --config {settings.out} --train.learning_rate 1e-4
model:
  host: {yaml_scalar(settings.model)}  # frozen, whole; at its full budget it answers as before, bit for bit
  dtype: {settings.dtype}
  {findings.medium}:
    budgets: [{counts}]  # {unit}; the first is the host's own
  adapter:  # a LoRA for rows at reduced budgets alone
    kind: gated_lora
    rank: 16
    alpha: 32
    targets: [q_proj, k_proj, v_proj, o_proj]
data:
  train: [{yaml_scalar(settings.manifest)}]  # one JSON object per line; `mllm data check` looks it over
  tokens_per_batch: 8192  # most tokens of a micro-batch; less where memory is short
  max_rows: 8
sampler:
  mode: sandwich  # each step: the full budget as teacher, the smallest, and random ones between
  num_budgets: 3
  distill_weight: 1.0  # learn from the host's own answers alone; below 1 from the manifest's answers too
{smaller if seen else ""}train:
  out: {yaml_scalar(run_folder)}  # checkpoints, log.jsonl, and at the end the model that `mllm generate --model` reads
  epochs: 1
  learning_rate: 2.0e-4
  warmup_fraction: 0.03
  precision: {settings.dtype}
  save_every: 500  # steps; after a stop, the same line with `--resume auto` goes on from the newest
"""
