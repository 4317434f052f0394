"""The single definition of the stages: inputs, the config keys that matter, use of a GPU."""

from dataclasses import dataclass

DATA_PREP, TEMPLATE_AUDIT = "01_data_prep", "02_template_audit"
SFT_TRAIN, IFEVAL_EVAL = "03_sft_train", "04_ifeval_eval"


@dataclass(frozen=True)
class Stage:
    """One notebook and the folder that it writes below OUT."""

    needs: tuple[str, ...]  # stages whose folders it reads
    decided_by: tuple[str, ...]  # prefixes of the config keys that determine its result
    gpu: bool = False


AUDITED = ("model.tokenizer", "model.base", "model.chat_template", "model.eos_token")
AUDITED += ("model.pad_token",)
STAGES = {
    DATA_PREP: Stage((), ("data.",)),
    TEMPLATE_AUDIT: Stage((DATA_PREP,), (*AUDITED, "train.max_length", "audit.")),
    SFT_TRAIN: Stage(
        (DATA_PREP, TEMPLATE_AUDIT), ("seed", "quantization.", "lora.", "train."), gpu=True
    ),
    IFEVAL_EVAL: Stage((SFT_TRAIN,), ("model.", "eval.", "label"), gpu=True),
}


def earlier(name: str) -> list[str]:
    """The stages before `name`, in the order in which they run."""
    return [stage for stage in STAGES if stage < name]


def decided_by(name: str) -> tuple[str, ...]:
    """Prefixes of the config keys that determine stage `name`, those of earlier stages included."""
    return tuple(key for stage in (*earlier(name), name) for key in STAGES[stage].decided_by)
