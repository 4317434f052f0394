"""`Config`: the keys that a configuration may hold, with their types and ranges."""

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    PrivateAttr,
    ValidationInfo,
    field_validator,
)

BY_DEVICE = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "use_cpu")
REFUSED = {f"train.{key}": "remove it, the hardware decides" for key in BY_DEVICE} | {
    "train.hub_token": "it would leave a secret in files, set HF_TOKEN instead",
    "train.push_to_hub": "set output.hub_repo instead",
    "train.eos_token": "remove it, the chat template determines how a turn ends",
    "train.pad_token": "set model.pad_token instead",
}  # arguments of SFTConfig, with the reason
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _reject_boolean_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        kinds = (kind, *get_args(kind))
        if isinstance(value, bool) and Any not in kinds and bool not in (*kinds, *map(type, kinds)):
            raise ValueError("it should not be true or false")
        return value


class Run(Section):
    require_gpu: bool
    eval_slots: PositiveInt | None
    wandb_project: str
    checkpoint_minutes: float = Field(ge=0)
    session_hours: float | None = Field(gt=0)


class Output(Section):
    hub_repo: str | None
    hub_private: bool
    export: list[Literal["merged", "f16", "q8_0", "q4_k_m"]]
    push_export: bool


class Model(Section):
    base: str
    base_revision: str | None
    tokenizer: str
    tokenizer_revision: str | None
    instruct: str | None
    instruct_revision: str | None
    adapter: str | None
    adapter_revision: str | None
    adapter_base: str | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any]
    eos_token: str | None
    pad_token: str | None


class Quantization(Section):
    load_in_4bit: bool
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool


class Lora(Section):
    r: int = Field(gt=0, le=4096)
    lora_alpha: PositiveInt
    lora_dropout: float = Field(ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"]
    target_modules: list[str]


class Data(Section):
    dataset: str
    revision: str | None
    split: str
    n_samples: PositiveInt
    n_validation: PositiveInt
    shuffle_seed: Seed
    exclude_overlap: bool


class Audit(Section):
    exclude_forged_turns: bool
    head_tokens: PositiveInt
    rendered_characters: PositiveInt


class Train(Section):
    """Arguments of TRL's SFTConfig; other keys are checked when they are loaded."""

    model_config = ConfigDict(extra="allow")

    activation_checkpointing: bool | None = None
    assistant_only_loss: Literal[True] = True  # what the audit verifies
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: float | None = Field(None, gt=0)
    logging_first_step: bool | None = None
    logging_nan_inf_filter: bool | None = None
    logging_steps: float | None = Field(None, gt=0)
    max_length: PositiveInt | None = None
    max_steps: PositiveInt | Literal[-1] = -1
    num_train_epochs: float = Field(3.0, gt=0)
    per_device_train_batch_size: PositiveInt = 8
    report_to: str | list[str] | None = None
    save_strategy: str | None = None
    seed: Seed | None = None
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] | None = None
    warmup_steps: float | None = None


class Eval(Section):
    benchmarks: list[Literal["ifeval", "ifbench"]]
    prompts: str
    prompts_revision: str | None
    limit: PositiveInt | None
    other_limit: PositiveInt | None
    formats: list[Literal["raw", "chat"]] = Field(min_length=1)
    max_new_tokens: PositiveInt
    load_in_4bit: bool
    alpha: float = Field(gt=0, lt=1)
    clear_margin: float = Field(ge=0, lt=1)
    guardrails: bool

    @field_validator("benchmarks")
    @classmethod
    def _ifeval_first_and_each_once(cls, names: list[str]) -> list[str]:
        if names[:1] != ["ifeval"] or len(set(names)) < len(names):
            raise ValueError("it should begin with ifeval, on which the verdict is, each name once")
        return names


class Offline(Section):
    """Sizes of the tiny model and its data; configs/base.yaml gives the reason for each."""

    corpus_seed: Seed
    taught: list[str]
    n_conversations: PositiveInt
    n_texts: PositiveInt
    texts_per_document: PositiveInt
    n_prompts_per_type: list[PositiveInt] = Field(min_length=2, max_length=2)
    n_dev_prompts_per_type: list[PositiveInt] = Field(min_length=2, max_length=2)
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    pretrain_steps: PositiveInt
    pretrain_batch: PositiveInt
    pretrain_length: PositiveInt
    pretrain_learning_rate: float = Field(gt=0)


class Config(Section):
    """A resolved configuration."""

    seed: Seed
    label: str
    run: Run
    model: Model
    quantization: Quantization
    lora: Lora
    data: Data
    audit: Audit
    train: Train
    eval: Eval
    output: Output
    offline: Offline
    _parameters: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        """CONFIG, OVERLAY and SET that it was loaded from."""
        return self._parameters

    def as_dict(self) -> dict[str, Any]:
        """Plain values by section; `train` with only the keys that a layer set."""
        return self.model_dump(exclude_unset=True)

    def flat(self) -> dict[str, Any]:
        """`as_dict` with dotted keys: {"lora.r": 16, ...}."""
        return flatten(self.as_dict())


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
