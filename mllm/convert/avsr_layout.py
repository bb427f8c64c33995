"""Knows how Llama-AVSR, Llama-MTSK and Omni-AVSR name what they trained, and what the shapes of it tell.

Knows names and shapes. Does not know kinds of files, options of a command, or what a run folder looks like.
Sources: Llama-AVSR (arXiv 2409.12319), Llama-MTSK (2503.06362), Omni-AVSR (2511.07253), umbertocappellazzo/Llama-AVSR
and umbertocappellazzo/Omni-AVSR.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mllm.convert.state_files import StoredWeight

TASKS = {"audio": "asr", "video": "vsr", "audiovisual": "avsr"}
"""The tasks by the names in the released files, in the order of a bank's experts."""
LETTERS = {"Q": "q_proj", "V": "v_proj"}
_LLM_LORA = re.compile(r"llm\.model\.layers\.(\d+)\.self_attn\.lora_(?:down|up)_[QV](_shared|\.\w+|)\.weight")
_VIDEO_LORA = re.compile(r"video_encoder\.encoder\.layers\.(\d+)\.self_attn\.lora_(?:down|up)_[QV]\.weight")
_OF_LIST = re.compile(r"\w+_proj\.(\d+)\.\d\.(?:weight|bias)")
_PARTS = ("audio_encoder.", "video_encoder.", "audio_proj.", "video_proj.", "llm.", "prompt_")


@dataclass(frozen=True)
class Split:
    """Holds the entries of a checkpoint by what they belong to, under their released names.

    LLM and encoders, which are large, stay in its file until they are read.
    """

    llm: dict[str, StoredWeight] = field(default_factory=dict)
    llm_lora: dict[str, Tensor] = field(default_factory=dict)
    encoders: dict[str, dict[str, StoredWeight]] = field(default_factory=dict)
    video_lora: dict[str, Tensor] = field(default_factory=dict)
    projectors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    prompts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def media(self) -> list[str]:
        """The media of this checkpoint."""
        return [medium for medium in ("audio", "video") if medium in self.encoders]


def split_state(state: Mapping[str, StoredWeight]) -> Split:
    """Sort the entries of a checkpoint, and read those that are small.

    Raises:
        ValueError: an entry of none of the parts, a part without what goes with it, or as `StoredWeight.read`.
    """
    if unknown := sorted(name for name in state if not name.startswith(_PARTS)):
        raise ValueError(f"the checkpoint holds unknown {', '.join(unknown[:3])} ({len(unknown)} in all)")
    split = Split()
    for name, value in state.items():
        part = name.split(".")[0]
        if part == "llm" and ".lora_" not in name:
            split.llm[name] = value
        elif part == "llm":
            split.llm_lora[name] = value.read()
        elif part.startswith("prompt_"):
            split.prompts[part.removeprefix("prompt_")] = value.read()
        elif part == "video_encoder" and ".lora_" in name:
            split.video_lora[name] = value.read()
        elif part.endswith("_encoder"):
            split.encoders.setdefault(part.removesuffix("_encoder"), {})[name] = value
        else:
            split.projectors.setdefault(part.removesuffix("_proj"), {})[name] = value.read()
    if split.encoders.keys() != split.projectors.keys() or not split.encoders:
        encoders, projectors = (", ".join(group) or "nothing" for group in (split.encoders, split.projectors))
        raise ValueError(f"the checkpoint holds encoders of {encoders} and projectors of {projectors}; both are needed")
    table = split.llm.get("llm.model.embed_tokens.weight")
    if table is None or len(table.shape) != 2:
        raise ValueError("the checkpoint misses llm.model.embed_tokens.weight, a matrix; it is none of these systems")
    return split


@dataclass(frozen=True)
class Projectors:
    """Holds what the shapes of a medium's projectors tell.

    Args:
        medium: audio or video.
        is_list: one per rate, or a single one.
        multiples: of the encoder's size, what each takes: frames stacked, or 1 where frames were averaged.
        hidden_size: between the two linear layers.
        has_norm: whether a LayerNorm stands behind them.
    """

    medium: str
    is_list: bool
    multiples: tuple[int, ...]
    hidden_size: int
    has_norm: bool

    @property
    def is_stack(self) -> bool:
        """Whether frames were stacked."""
        return any(multiple > 1 for multiple in self.multiples)

    def names(self) -> Iterator[tuple[int, str, str]]:
        """Yield the index, the name in the checkpoint and the name of our projector's entry, of every entry."""
        for index in range(len(self.multiples)):
            prefix = f"{self.medium}_proj." + (f"{index}." if self.is_list else "")
            for layer in ("0", "2", "3") if self.has_norm else ("0", "2"):
                for kind in ("weight", "bias"):
                    yield index, f"{prefix}{layer}.{kind}", f"{layer}.{kind}"

    def layout(self, feature_size: int, out_size: int) -> dict[str, tuple[int, ...]]:
        """Give names and shapes of every entry."""
        shapes: dict[str, tuple[int, ...]] = {}
        for index, name, entry in self.names():
            wide = {"0": (self.hidden_size, feature_size * self.multiples[index]), "2": (out_size, self.hidden_size)}
            layer, kind = entry.split(".")
            shapes[name] = wide.get(layer, (out_size,)) if kind == "weight" else (wide.get(layer, (out_size,))[0],)
        return shapes


def read_projectors(medium: str, state: Mapping[str, Tensor], *, feature_size: int) -> Projectors:
    """Read what the projectors of a medium are.

    Args:
        state: their entries by released names.
        feature_size: of the encoder.

    Raises:
        ValueError: an input that is no multiple of the encoder's size, or no projector at all.
    """
    name = f"{medium}_proj"
    indices = [int(match[1]) for entry in state if (match := _OF_LIST.fullmatch(entry))]
    is_list, count = bool(indices), max(indices, default=0) + 1
    multiples = []
    for index in range(count):
        first = f"{name}.{index}.0.weight" if is_list else f"{name}.0.weight"
        if first not in state or state[first].dim() != 2:
            raise ValueError(f"the checkpoint misses {first}, a matrix")
        in_size = state[first].shape[1]
        if in_size % feature_size or not in_size:
            raise ValueError(
                f"{first} takes {in_size} values, no multiple of the {feature_size} of the {medium} encoder"
            )
        multiples.append(in_size // feature_size)
    prefix = f"{name}.0." if is_list else f"{name}."
    return Projectors(
        medium,
        is_list,
        tuple(multiples),
        hidden_size=state[f"{prefix}0.weight"].shape[0],
        has_norm=f"{prefix}3.weight" in state,
    )


@dataclass(frozen=True)
class Loras:
    """Holds LoRAs beside the queries and values of a stack of layers.

    Args:
        prefix: of the names, up to the number of the layer.
        num_layers: how many layers have them.
        inner_size: the rank proper.
        experts: what follows the letter in each name: "" or `_shared` for the shared one, `.audio` and so on.
    """

    prefix: str
    num_layers: int
    inner_size: int
    experts: tuple[str, ...]

    def name(self, layer: int, direction: str, letter: str, expert: str) -> str:
        """Give the released name of one matrix."""
        return f"{self.prefix}{layer}.self_attn.lora_{direction}_{letter}{expert}.weight"

    def layout(self, in_size: int, out_sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Give names and shapes of every entry; `out_sizes` by letter."""
        shapes = {}
        for layer in range(self.num_layers):
            for letter in LETTERS:
                for expert in self.experts:
                    shapes[self.name(layer, "down", letter, expert)] = (self.inner_size, in_size)
                    shapes[self.name(layer, "up", letter, expert)] = (out_sizes[letter], self.inner_size)
        return shapes

    def matrices(self, state: Mapping[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
        """Make our entries: PEFT's LoRA where there is one expert, else those of a bank, experts stacked.

        Args:
            prefix: of our names, up to the number of the layer; a `{}` in it stands for that.
        """
        single = len(self.experts) == 1
        made = {}
        for layer in range(self.num_layers):
            for letter, target in LETTERS.items():
                for direction, side in (("down", "A"), ("up", "B")):
                    matrices = [state[self.name(layer, direction, letter, expert)].float() for expert in self.experts]
                    name = f"{prefix.format(layer)}.{target}.lora_{side}"
                    if single:
                        made[f"{name}.default.weight"] = matrices[0]
                    else:
                        made[name] = torch.stack(matrices)
        return made


def read_llm_loras(state: Mapping[str, Tensor], num_layers: int) -> tuple[Loras | None, str]:
    """Read the LoRAs of the LLM, and the variant they are: `s`, `t` or `st`.

    Raises:
        ValueError: experts that are none of these variants, or a name that is none of a LoRA.
    """
    if not state:
        return None, ""
    matches = [_LLM_LORA.fullmatch(name) for name in state]
    if None in matches:
        name = list(state)[matches.index(None)]
        raise ValueError(f"the checkpoint holds unknown {name}")
    experts = {match[2] for match in matches if match is not None}
    tasks = tuple(f".{task}" for task in TASKS)
    variants: dict[str, Sequence[str]] = {"s": ("",), "t": tasks, "st": ("_shared", *tasks)}
    for variant, ends in variants.items():
        if set(ends) == experts:
            return Loras("llm.model.layers.", num_layers, _inner_size(state), tuple(ends)), variant
    names = ", ".join(repr(expert) for expert in sorted(experts))
    known = f"'', all of {', '.join(tasks)}, and these with '_shared'"
    raise ValueError(f"the names of the LLM's LoRAs end in {names}; known are {known}")


def read_video_loras(state: Mapping[str, Tensor], num_layers: int) -> Loras | None:
    """Read the LoRAs of the lip encoder; None where there are none.

    Raises:
        ValueError: a name that is none of a LoRA.
    """
    if not state:
        return None
    if unknown := [name for name in state if not _VIDEO_LORA.fullmatch(name)]:
        raise ValueError(f"the checkpoint holds unknown {unknown[0]}")
    return Loras("video_encoder.encoder.layers.", num_layers, _inner_size(state), ("",))


def _inner_size(state: Mapping[str, Tensor]) -> int:
    """Count the rows of the first matrix downwards; the others are looked at when all shapes are compared."""
    down = next((value for name, value in state.items() if ".lora_down_" in name and value.dim() == 2), None)
    if down is None or not len(down):
        raise ValueError(f"the checkpoint holds {min(state)}, but no matrix that goes with it (lora_down)")
    return down.shape[0]
