"""Writes the experts of a bank as plain LoRA folders beside an LLM without them, and reads which there are.

Knows banks, files and the names of scales and tasks. Does not know engines.

An export holds `experts.json` with the names, and one folder of PEFT's format per scale or task: what PEFT's
`PeftModel` or an engine's LoRA option reads.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm.adapters.expert_ids import NO_EXPERT, ExpertNames
from mllm.adapters.lora_bank import take_out_bank
from mllm.budget import TokenCount
from mllm.checkpoints.peft_folders import (
    CONFIG_FILE,
    ELASTIC_PREFIX,
    SHARED,
    WEIGHTS_FILE,
    folder_name,
    loras_of_bank,
    write_lora,
)
from mllm.model.modeling import ElasticForConditionalGeneration

FILE = "experts.json"
FOLDER = "experts"
EXPERT_KEYS = {"scales", "tasks", "has_shared", "rank"}


@dataclass(frozen=True)
class ExpertFolders:
    """Says which experts an export has, and where.

    Args:
        names: scales or tasks that have one; a bank has one kind of them.
        rank: inner size of each.
        folders: by name.
    """

    names: ExpertNames
    rank: int
    folders: Mapping[str, str]

    def name_of(self, task: str, counts: Sequence[tuple[str, TokenCount]]) -> str | None:
        """Find the expert of a prompt whose media have these token counts; None where the LLM answers alone.

        Raises:
            ValueError: a scale or task without an expert.
        """
        if self.names.scales:
            number, names = self.names.scale_id(counts), self.names.scales
        else:
            number, names = self.names.task_id(task, [medium for medium, _ in counts]), self.names.tasks
        if number == NO_EXPERT:
            return SHARED if SHARED in self.folders else None
        return names[number]


def write_experts(model: ElasticForConditionalGeneration, names: ExpertNames, folder: Path) -> None:
    """Write every expert of the LLM's bank, together with the shared one, and take the bank out of the LLM.

    Raises:
        ValueError: no bank, or one that has a shared expert alone, which is merged.
    """
    if not (names.scales or names.tasks):
        raise ValueError("form is experts, but the adapter has no experts per scale or task")
    loras = loras_of_bank(model, names)
    take_out_bank(model.model.language_model)
    for name, lora in loras.items():
        write_lora(lora, folder / FOLDER / folder_name(name), prefix=ELASTIC_PREFIX)
    rank = max(lora.rank for lora in loras.values())
    values = {"scales": list(names.scales), "tasks": list(names.tasks), "has_shared": SHARED in loras, "rank": rank}
    (folder / FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_experts(folder: str | Path) -> ExpertFolders | None:
    """Read which experts an export has; None where all of its weights are merged.

    Raises:
        FileNotFoundError: an expert's folder lacks a file.
        ValueError: the list of experts is not what `write_experts` writes.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or set(values) != EXPERT_KEYS:
        raise ValueError(f"{path} is no list of experts; it must hold {', '.join(sorted(EXPERT_KEYS))}, and no more")
    names = ExpertNames(tuple(values["scales"]), tuple(values["tasks"]))
    written = (*names.scales, *names.tasks, *([SHARED] if values["has_shared"] else []))
    folders = {name: path.parent / FOLDER / folder_name(name) for name in written}
    for name, expert in folders.items():
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (expert / file).is_file():
                raise FileNotFoundError(f"{expert / file} is missing, which {path} names as the expert {name!r}")
    return ExpertFolders(names, values["rank"], {name: str(expert) for name, expert in folders.items()})
