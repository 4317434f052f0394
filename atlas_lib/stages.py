"""The stages, once: what each one reads, what decides its result, whether it needs a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One notebook and the folder that it writes below OUT."""

    name: str
    needs: tuple[str, ...]  # stages whose folders it reads
    keys: tuple[str, ...]  # configuration keys and sections that decide its result, beside theirs
    gpu: bool = False


DATA_PREP, TEMPLATE_AUDIT = "01_data_prep", "02_template_audit"
SFT_TRAIN, IFEVAL_EVAL = "03_sft_train", "04_ifeval_eval"
STAGES = {
    stage.name: stage
    for stage in (
        Stage(DATA_PREP, (), ("data",)),
        Stage(
            TEMPLATE_AUDIT,
            (DATA_PREP,),
            (
                "model.tokenizer",
                "model.tokenizer_revision",
                "model.chat_template",
                "model.pad_token",
                "model.base",
                "model.base_revision",
                "train.max_length",
                "audit",
            ),
        ),
        Stage(
            SFT_TRAIN,
            (DATA_PREP, TEMPLATE_AUDIT),
            ("seed", "quantization", "lora", "train"),
            gpu=True,
        ),
        Stage(IFEVAL_EVAL, (SFT_TRAIN,), ("model", "eval", "label"), gpu=True),
    )
}


def earlier(name: str) -> list[str]:
    """The stages below `name`, in the order in which they run."""
    return [stage for stage in STAGES if stage < name]


def deciding_keys(name: str) -> tuple[str, ...]:
    """Keys and sections that decide the result of stage `name`, those of earlier stages included."""
    return tuple(key for stage in (*earlier(name), name) for key in STAGES[stage].keys)
