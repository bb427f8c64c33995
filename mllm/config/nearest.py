"""Finds the key that a user meant: by another name it goes by elsewhere, by where it lies now, or by its letters.

Names alone; for messages. What is found here is named, never accepted.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches

MEDIUM_MOVES = {
    **{key: f"encoder.{key}" for key in ("feature_layer", "final_norm", "image_size", "max_num_patches")},
    **{key: f"encoder.{key}" for key in ("pad_to_square", "released_cut", "padding", "size_pixels", "crop_pixels")},
    "normalize_audio": "encoder.normalize",
    "encoder_adapter": "encoder.adapter",
    "frames": "encoder.count",
    "frame_counts": "encoder.trained_counts",
    "sampling": "encoder.sampling",
    "sample_fps": "encoder.frames_per_second",
    **{key: f"compressor.{key}" for key in ("num_queries", "window_frames", "keys", "anchors", "order")},
    "query_heads": "compressor.num_heads",
    "query_start": "compressor.start",
    "projector_size": "projector.hidden_size",
    "projector_norm": "projector.norm",
    "projector_activation": "projector.activation",
    "projector_experts": "projector.num_experts",
    "projector_top_k": "projector.top_k",
    "projector_balance_weight": "projector.balance_weight",
    "projector_z_weight": "projector.z_weight",
    "per_budget_projector": "projector.per_budget",
    "project_first": "projector.before_pooling",
    "budget_range": "budgets",
}
"""Keys that lay flat in the block of a medium, and where they are now, inside that block."""
MOVE_NOTES = {
    "budget_range": " (as {start: ..., stop: ..., step: ...})",
    "projector_size": " (and kind linear for what was 0)",
    "projector_experts": " (with kind moe)",
    "frames": " (with kind frames)",
}
MODEL_MOVES = {"names_pictures": "names_images"}
GONE = {
    "query_size": "queries have the size of the encoder's features",
    "schedule": "the learning rate falls from its peak to 0 as a cosine",
    "distill_temperature": "answers are compared as they are",
    "validation_budgets": "validation is at the sampler's points, or at the largest and the smallest budget",
}

ALIASES = {
    **dict.fromkeys(("lr", "peak_lr", "max_lr"), "learning_rate"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("betas", "adam_beta1", "adam_beta2"), "adam_betas"),
    **dict.fromkeys(("grad_clip", "clip_grad", "gradient_clip", "clip_grad_norm"), "max_grad_norm"),
    **dict.fromkeys(("grad_accum", "gradient_accumulation_steps", "accumulate_grad_batches"), "accumulation"),
    **dict.fromkeys(("warmup_ratio", "warmup"), "warmup_fraction"),
    **dict.fromkeys(("iterations", "iters", "total_steps", "num_steps", "steps"), "max_steps"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "max_epochs"), "epochs"),
    **dict.fromkeys(
        ("bs", "batch", "batch_size", "per_device_train_batch_size", "micro_batch_size"), "tokens_per_batch"
    ),
    **dict.fromkeys(("bf16", "fp16", "amp", "mixed_precision"), "precision"),
    **dict.fromkeys(("output", "output_dir", "output_path", "out_dir", "save_dir"), "out"),
    **dict.fromkeys(("num_draws",), "num_budgets"),
    **dict.fromkeys(("save_steps", "checkpoint_every"), "save_every"),
    **dict.fromkeys(("save_total_limit",), "keep_checkpoints"),
    **dict.fromkeys(("logging_steps", "log_steps"), "log_every"),
    **dict.fromkeys(("eval_steps", "eval_every"), "validate_every"),
    **dict.fromkeys(("eval_data", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("train_data", "dataset", "data_path"), "train"),
    **dict.fromkeys(("resume_from", "resume_from_checkpoint"), "resume"),
    **dict.fromkeys(("init_from", "pretrained"), "start_from"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "adapter.rank"),
    **dict.fromkeys(("lora_alpha",), "adapter.alpha"),
    **dict.fromkeys(("lora_dropout",), "adapter.dropout"),
    **dict.fromkeys(("target_modules",), "adapter.targets"),
    **dict.fromkeys(("vision_tower", "image_encoder"), "image.encoder"),
    **dict.fromkeys(("audio_encoder",), "audio.encoder"),
    **dict.fromkeys(("video_encoder",), "video.encoder"),
    **dict.fromkeys(("attn_implementation", "attn"), "attention"),
    **dict.fromkeys(("torch_dtype",), "dtype"),
    **dict.fromkeys(("device", "cpu", "no_cuda"), "use_cpu"),
    **dict.fromkeys(("model_path", "model_name_or_path", "checkpoint_path", "ckpt"), "model"),
    **dict.fromkeys(("prompt", "question", "query"), "--text"),
    **dict.fromkeys(("beams", "beam_size", "beam"), "num_beams"),
    **dict.fromkeys(("max_length", "max_tokens"), "max_new_tokens"),
}
"""What options are called elsewhere, and the end of our name for them.

With dashes before it a name is the whole option: a block may have a key of that name that is something else.
"""


def nearest(key: str, allowed: Sequence[str]) -> str:
    """Return the end of a message: the key that is meant, or where it is now, or all that are allowed.

    Args:
        key: as it was written, with dots.
        allowed: every key there is, with dots.
    """
    block, _, word = key.rpartition(".")
    if moved := _moved(block, word, allowed):
        return moved
    if meant := ALIASES.get(word.lower()):
        # First the block that was written, where it has one.
        within = f"{block}.{meant.rpartition('.')[2]}"
        known = [name for name in allowed if f"--{name}" == meant or name == meant or name.endswith(f".{meant}")]
        if within in allowed:
            return f"did you mean {within}?"
        if known:
            return f"did you mean {min(known, key=lambda name: name.count('.'))}?"
    if same := [name for name in allowed if name.rpartition(".")[2] == word]:
        return f"did you mean {max(same, key=lambda name: _common(name, key))}?"
    if block in allowed:
        beside = [name.rpartition(".")[2] for name in allowed if name.rpartition(".")[0] == block]
        close = get_close_matches(word, beside, n=1, cutoff=0.6)
        return f"did you mean {block}.{close[0]}?" if close else f"keys of {block}: {', '.join(beside) or 'none'}"
    # Someone who leaves a block out writes the last part right, so that is compared too.
    last = {name.rpartition(".")[2]: name for name in reversed(allowed)}
    close = get_close_matches(key, allowed, n=1, cutoff=0.75)
    close = close or [last[name] for name in get_close_matches(word, list(last), n=1, cutoff=0.6)]
    close = close or get_close_matches(key, allowed, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(allowed)}"


def _moved(block: str, word: str, allowed: Sequence[str]) -> str:
    """Say where a key is that lay elsewhere; empty where it never did."""
    if medium := re.search(r"(^|\.)(image|audio|video)$", block):
        if word in MEDIUM_MOVES:
            return _new_path(block, medium[2], MEDIUM_MOVES[word], MOVE_NOTES.get(word, ""), allowed)
        if word in GONE:
            return f"it is gone: {GONE[word]}"
    elif f"{block}.{MODEL_MOVES.get(word)}".removeprefix(".") in allowed:
        return f"it is now {block}.{MODEL_MOVES[word]}".replace(" .", " ")
    elif word in GONE and block.rpartition(".")[2] in ("train", "sampler"):
        return f"it is gone: {GONE[word]}"
    return ""


def _new_path(block: str, medium: str, path: str, note: str, allowed: Sequence[str]) -> str:
    if (now := f"{block}.{path}") in allowed:
        return f"it is now {now}{note}"
    parent = block.removesuffix(medium)
    others = [f"{parent}{other}.{path}" for other in ("image", "audio", "video") if other != medium]
    others = [name for name in others if name in allowed]
    return f"it goes with {' or '.join(others)}{note}" if others else ""


def _common(name: str, key: str) -> tuple[int, int]:
    """Count the blocks two keys begin with in common; of equal ones the shorter name is nearer."""
    count = 0
    for one, other in zip(name.split("."), key.split("."), strict=False):
        if one != other:
            break
        count += 1
    return count, -len(name)
