"""What a configuration may hold: the sections, and SFTConfig's own fields for `train`."""

import ast
import builtins
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    create_model,
    field_validator,
)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _a_boolean_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and kind is not Any and bool not in (kind, *get_args(kind)):
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


class Model(Section):
    base: str
    base_revision: str | None
    tokenizer: str
    tokenizer_revision: str | None
    instruct: str | None
    instruct_revision: str | None
    adapter: str | None
    adapter_revision: str | None
    chat_template: Literal["qwen2_5"] | None
    pad_token: str | None


class Quantization(Section):
    load_in_4bit: bool
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool


class Lora(Section):
    r: PositiveInt
    lora_alpha: PositiveInt
    lora_dropout: float = Field(ge=0, le=1)
    bias: Literal["none", "all", "lora_only"]
    target_modules: list[str]


class Data(Section):
    dataset: str
    revision: str | None
    split: str
    n_samples: PositiveInt
    n_validation: PositiveInt
    shuffle_seed: int


class Audit(Section):
    exclude_forged_turns: bool
    head_tokens: PositiveInt
    rendered_characters: PositiveInt


class Eval(Section):
    prompts: str
    prompts_revision: str | None
    limit: PositiveInt | None
    formats: list[Literal["raw", "chat"]] = Field(min_length=1)
    max_new_tokens: PositiveInt
    load_in_4bit: bool
    alpha: float = Field(gt=0, lt=1)
    clear_margin: float = Field(ge=0, lt=1)
    guardrails: bool


class Offline(Section):
    """Sizes of the embedded stand-in; configs/base.yaml says why each."""

    corpus_seed: int
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
    pretrain_learning_rate: float


@cache
def train_section() -> type[Section]:
    """TRL's SFTConfig as a section, its fields read from source: importing trl takes seconds."""
    fields: dict[str, Any] = {}
    for package, file in (
        ("transformers", "training_args.py"),
        ("trl", "trainer/base_config.py"),
        ("trl", "trainer/sft_config.py"),
    ):
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ValueError(f"{package} is not installed; run `make setup`.")
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        for node in (n for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body):
            if isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):
                fields[node.target.id] = (_annotation(node.annotation), None)
    # Its name of today also where transformers is older: memory.trainer_arguments puts it right.
    fields.setdefault("activation_checkpointing", (bool | None, None))
    return create_model("Train", __base__=Section, **fields)


def _annotation(node: ast.expr) -> Any:
    """The type that an annotation spells; the library's own enums are given by their names."""
    return eval(ast.unparse(node), {}, _Names(vars(builtins) | {"Any": Any, "Literal": Literal}))


class _Names(dict):
    def __missing__(self, name: str) -> type:
        return str
