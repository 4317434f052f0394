"""The configuration: its layers, what it refuses and in which words, and what its digest covers."""

import dataclasses
import json
import os
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_lib import artifacts
from atlas_lib.bootstrap import CONFIGS
from atlas_lib.config import load_config, parse_assignments
from atlas_lib.schema import Config
from atlas_lib.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "sft_qwen05b"


def refusal(overrides=None, name=RECIPE, overlay="") -> str:
    """The one sentence with which a configuration is refused."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\.\Z") as caught:
        load_config(name, overlay, overrides)
    return str(caught.value)


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def command_line(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "atlas_lib.config", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def layers(tmp_path, monkeypatch) -> Path:
    """A folder of layers of our own beside the real base and recipe."""
    for name in ("base", RECIPE):
        text = (CONFIGS / f"{name}.yaml").read_text("utf-8")
        (tmp_path / f"{name}.yaml").write_text(text, "utf-8")
    monkeypatch.setattr("atlas_lib.config.CONFIGS", tmp_path)
    return tmp_path


# --- layers ---------------------------------------------------------------------------------------


def test_each_layer_wins_over_the_one_below(layers):
    base = yaml.safe_load((layers / "base.yaml").read_text("utf-8"))
    base |= {"seed": 1, "label": "base"}
    base["run"] |= {"eval_slots": 1, "wandb_project": "base"}
    (layers / "base.yaml").write_text(yaml.safe_dump(base), "utf-8")
    with (layers / f"{RECIPE}.yaml").open("a", encoding="utf-8") as file:
        file.write("\nlabel: recipe\nrun: {eval_slots: 2, wandb_project: recipe}\n")
    (layers / "over.yaml").write_text("run: {eval_slots: 3}\nlabel: over\n", "utf-8")
    bare = load_config(RECIPE)
    overlaid = load_config(RECIPE, "over")
    set_on_top = load_config(RECIPE, "over", {"run.eval_slots": 4})
    assert (bare.seed, bare.label, bare.run.eval_slots) == (1, "recipe", 2)
    assert (overlaid.seed, overlaid.label, overlaid.run.eval_slots) == (1, "over", 3)
    assert overlaid.run.wandb_project == "recipe"  # a section is merged, not replaced
    assert (set_on_top.label, set_on_top.run.eval_slots) == ("over", 4)


def test_a_typo_in_a_layer_file_is_refused(layers):
    (layers / "over.yaml").write_text("data: {n_sample: 3}\n", "utf-8")
    assert "'data.n_samples'" in refusal(overlay="over")


SPELLED_OUT = {"train.learning_rate": 0.001, "lora.r": 8}


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.learning_rate": 1e-3, "lora.r": 8},
        {"train": {"learning_rate": 1e-3}, "lora": {"r": 8}},
        {"train": {"learning_rate": "1e-3"}, "lora.r": "8"},
        '{"train.learning_rate": 0.001, "lora.r": 8}',
        '{"train": {"learning_rate": 1e-3}, "lora": {"r": 8}}',
        "{train.learning_rate: 1e-3, lora.r: 8}",
        "train.learning_rate: 1.0e-3\nlora:\n  r: 8\n",
    ],
    ids=["dotted", "nested", "texts", "json", "nested json", "flow yaml", "block yaml"],
)
def test_set_may_be_spelled_in_many_ways(overrides):
    config = load_config(RECIPE, "", overrides)
    assert (config.train.learning_rate, config.lora.r) == (1e-3, 8)
    assert config.lora.lora_alpha == 32
    assert artifacts.config_digest(config) == artifacts.config_digest(
        load_config(RECIPE, "", SPELLED_OUT)
    )


@pytest.mark.parametrize("nothing", [None, {}, "", "{}", "null"])
def test_an_empty_set_changes_nothing(nothing):
    assert load_config(RECIPE, "", nothing).as_dict() == (load_config(RECIPE).as_dict())


@pytest.mark.parametrize(
    "spelling", [2e-4, "2e-4", "2.0e-4", "0.0002", *map(yaml.safe_load, ("2e-4", "2.0e-4"))]
)
def test_every_spelling_of_a_number_is_the_number(spelling):
    config = load_config(RECIPE, "", {"train.learning_rate": spelling})
    assert config.train.learning_rate == 0.0002
    assert isinstance(config.train.learning_rate, float)
    assert artifacts.config_digest(config) == artifacts.config_digest(load_config(RECIPE))


def plain_types(annotation) -> set:
    """The members of an annotation: Optional[Annotated[int, ...]] -> {int, NoneType}."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return {inner[0]}
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(plain_types, inner))
    return {annotation}


def numeric_keys(section=Config, prefix="") -> dict[str, type]:
    """Dotted key -> int or float, of every scalar number in the schema."""
    found = {}
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        kind = field.annotation
        kinds = plain_types(kind)
        if hasattr(kind, "model_fields"):
            found |= numeric_keys(kind, f"{key}.")
        elif kinds & {int, float} and str not in kinds:
            found[key] = float if float in kinds else int
    return found


NUMERIC = numeric_keys()


def test_the_numeric_keys_are_found():
    assert {"seed", "lora.r", "train.learning_rate", "eval.limit"} <= NUMERIC.keys()
    assert len(NUMERIC) > 30


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_numeric_override_round_trips(data):
    key = data.draw(st.sampled_from(sorted(NUMERIC)))
    number = st.integers(1, 10**9)
    if NUMERIC[key] is float:
        number = st.floats(1e-6, 1e12, allow_nan=False) | number
    if key in ("lora.lora_dropout", "eval.alpha", "eval.clear_margin"):
        number = st.floats(1e-6, 0.999)
    value = data.draw(number)
    for spelled in (
        {key: value},
        json.dumps({key: value}),
        f"{key}: {value!r}",
        parse_assignments([f"{key}={value!r}"]),
    ):
        config = load_config(RECIPE, "", spelled)
        found = config.flat()[key]
        assert found == value
        assert type(found) is NUMERIC[key]
    printed = yaml.safe_load(yaml.safe_dump(config.as_dict()))
    again = load_config(RECIPE, "", printed)
    assert again.as_dict() == config.as_dict()
    assert artifacts.config_digest(again) == artifacts.config_digest(config)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("train.learning_rat", "train.learning_rate"),
        ("train.gradient_acumulation_steps", "train.gradient_accumulation_steps"),
        ("learning_rate", "train.learning_rate"),
        ("data.nsamples", "data.n_samples"),
        ("model.base_revison", "model.base_revision"),
        ("lora.lora_alfa", "lora.lora_alpha"),
        ("eval.max_tokens", "eval.max_new_tokens"),
        ("sed", "seed"),
        ("trian.learning_rate", "train"),
    ],
)
@pytest.mark.parametrize("form", [lambda key: {key: 1}, lambda key: json.dumps({key: 1})])
def test_a_typo_names_the_nearest_key(typo, nearest, form):
    sentence = refusal(form(typo))
    assert repr(typo) in sentence or repr(typo.split(".")[0]) in sentence
    assert repr(nearest) in sentence


def test_a_typo_below_the_stand_in_names_the_nearest_key():
    assert "'offline.vocab_size'" in refusal({"offline.vocab_siz": 9})


def test_a_key_that_trl_dropped_is_unknown():
    assert "'train.warmup_steps'" in refusal({"train.warmup_step": 0.03})
    assert "Unknown key 'train.warmup_ratio'" in refusal({"train.warmup_ratio": 0.03})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.n_samples", "many", "integer"),
        ("data.n_samples", 1.5, "integer"),
        ("data.n_samples", None, "integer"),
        ("data.n_samples", [5], "integer"),
        ("train.learning_rate", "fast", "number"),
        ("train.max_steps", "ten", "integer"),
        ("train.packing", "maybe", "boolean"),
        ("run.require_gpu", "perhaps", "boolean"),
        ("model.base", 5, "string"),
        ("model.base", None, "string"),
        ("model.chat_template", "llama", "'qwen2_5'"),
        ("lora.target_modules", "q_proj", "list"),
        ("lora.bias", "some", "'none', 'all' or 'lora_only'"),
        ("quantization.bnb_4bit_quant_type", "int4", "'nf4' or 'fp4'"),
        ("train", 5, "dictionary"),
        ("data", None, "dictionary"),
    ],
)
def test_a_wrong_type_names_key_value_and_what_was_expected(key, value, expected):
    sentence = refusal({key: value})
    assert sentence.startswith(f"{key} is {value!r} ")
    assert type(value).__name__ in sentence
    assert expected in sentence


def test_a_wrong_type_inside_a_list_names_its_place():
    sentence = refusal({"eval.formats": ["chat", "html"]})
    assert sentence.startswith("eval.formats.1 is 'html' ")
    assert "'raw' or 'chat'" in sentence


def test_a_union_is_named_by_its_key_alone():
    """pydantic appends the union's member; `train.lr_scheduler_kwargs.dict[any,any]` is no key."""
    assert refusal({"train.lr_scheduler_kwargs": 5}).startswith("train.lr_scheduler_kwargs is 5 ")


@pytest.mark.parametrize("value", [0, -1, -5000])
@pytest.mark.parametrize("key", ["data.n_samples", "data.n_validation", "eval.limit", "lora.r"])
def test_counts_must_be_positive(key, value):
    assert refusal({key: value}).startswith(f"{key} is {value} (int); it should be greater than 0")


@pytest.mark.parametrize("value", [True, "true", "yes"])
def test_a_boolean_is_not_a_count(value):
    assert refusal({"data.n_samples": value}).startswith(f"data.n_samples is {value!r} ")


def test_not_a_number_is_not_a_number():
    assert refusal({"train.learning_rate": float("nan")}).startswith("train.learning_rate is nan ")


@pytest.mark.parametrize("where", [{"name": "nope"}, {"overlay": "nope"}])
def test_an_unknown_config_or_overlay_lists_those_that_exist(where):
    sentence = refusal(**where)
    assert "'nope'" in sentence
    names = [path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "base"]
    assert set(names) <= set(sentence.rstrip(".").replace(",", "").split())


@pytest.mark.parametrize("name", ["smoke", "offline", "base"])
def test_an_overlay_alone_is_no_recipe(name):
    assert "whole recipe such as sft_qwen05b" in refusal(name=name)


@pytest.mark.parametrize("given", ["[1, 2]", "5", "train.max_steps=10", [1]])
def test_set_must_be_a_mapping(given):
    assert "SET must map" in refusal(given)


@pytest.mark.parametrize("given", ["{", "a: b: c", '{"seed": 1', "{seed: [1}"])
def test_a_broken_set_is_one_sentence(given):
    assert "SET" in refusal(given)


def test_a_key_of_set_that_is_no_text_is_refused():
    assert "1" in refusal({1: 2})


@pytest.mark.parametrize("given", ["train.save_strategy: no", {"train.save_strategy": False}])
def test_yamls_bare_no_is_no_save_strategy(given):
    """YAML reads a bare `no` as false, which TRL refuses only after the model has been loaded."""
    assert refusal(given).startswith("train.save_strategy is False ")


def test_a_resolved_configuration_cannot_be_changed():
    config = load_config(RECIPE)
    for section, key in ((config, "seed"), (config.train, "learning_rate"), (config.data, "split")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, key, 1)


# --- the recipe -----------------------------------------------------------------------------------


PUBLISHED = """
seed: 42
label: ""
model.base: Qwen/Qwen2.5-0.5B
model.base_revision: 060db6499f32faf8b98477b0a26969ef7d8b9987
model.tokenizer: Qwen/Qwen2.5-0.5B-Instruct
model.tokenizer_revision: 7ae557604adf67be50417f59c2c2f167def9a775
model.instruct: Qwen/Qwen2.5-0.5B-Instruct
model.instruct_revision: 7ae557604adf67be50417f59c2c2f167def9a775
model.adapter: null
model.chat_template: null
model.pad_token: null
quantization.load_in_4bit: true
quantization.bnb_4bit_quant_type: nf4
quantization.bnb_4bit_use_double_quant: true
lora.r: 16
lora.lora_alpha: 32
lora.lora_dropout: 0.05
lora.bias: none
lora.target_modules: [q_proj, k_proj, v_proj, o_proj]
data.dataset: HuggingFaceH4/ultrachat_200k
data.revision: 8049631c405ae6576f93f445c6b8166f76f5505a
data.split: train_sft
data.n_samples: 5000
data.n_validation: 500
data.shuffle_seed: 42
train.learning_rate: 2.0e-4
train.num_train_epochs: 1
train.per_device_train_batch_size: 4
train.gradient_accumulation_steps: 4
train.warmup_steps: 0.03
train.max_length: 1024
train.assistant_only_loss: true
train.activation_checkpointing: true
train.logging_steps: 10
train.logging_nan_inf_filter: false
train.save_strategy: "no"
train.report_to: wandb
output.hub_repo: "{user}/atlas-sft-qwen05b-v2"
eval.prompts: google/IFEval
eval.prompts_revision: 966cd89545d6b6acfd7638bc708b98261ca58e84
eval.limit: null
"""


def test_the_published_recipe_is_as_stated():
    resolved, stated = load_config(RECIPE).flat(), yaml.safe_load(PUBLISHED)
    assert {key: resolved[key] for key in stated} == stated


def test_the_smoke_run_is_50_steps_of_the_recipe():
    recipe, smoke = (load_config(RECIPE, o).flat() for o in ("", "smoke"))
    changed = {key for key in smoke if smoke[key] != recipe.get(key)}
    assert smoke["train.max_steps"] == 50
    assert smoke["label"]
    assert changed <= {
        "label", "train.max_steps", "data.n_samples", "data.n_validation", "eval.limit",
        "eval.formats", "output.hub_repo",
    }  # fmt: skip
    assert smoke["output.hub_repo"] is None


def test_the_stand_in_needs_neither_gpu_nor_hub():
    config = load_config(RECIPE, "offline")
    assert not config.run.require_gpu
    assert (
        config.label
        == "offline overlay with a tiny model: shows that the code works, says nothing about Qwen"
    )
    names = (config.model.base, config.model.tokenizer, config.data.dataset, config.eval.prompts)
    assert all(name.startswith("embedded:") for name in names)
    assert config.model.instruct is None
    assert len(config.offline.taught) >= 8


# --- the schema of train: -------------------------------------------------------------------------


def test_the_typed_keys_are_fields_of_trls_sftconfig():
    import trl

    real = {field.name for field in dataclasses.fields(trl.SFTConfig) if field.init}
    assert Config.model_fields["train"].annotation.model_fields.keys() <= real


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [("weight_decay", "1e-2", 0.01), ("bf16", None, None), ("optim", "adamw_torch", "adamw_torch")],
)
def test_any_other_argument_of_sftconfig_has_its_type(key, given, value):
    assert load_config(RECIPE, "", {f"train.{key}": given}).train.arguments()[key] == value


def test_no_heavy_library_is_imported_to_validate():
    heavy = "{'torch', 'transformers', 'trl', 'peft', 'datasets', 'bitsandbytes'}"
    code = (
        "import sys; from atlas_lib import artifacts; from atlas_lib.config import load_config\n"
        "config = load_config('sft_qwen05b', 'offline', {'train.learning_rate': '1e-3'})\n"
        "artifacts.config_digest(config, '01_data_prep')\n"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    assert python(code) == "[]"


# --- the digest -----------------------------------------------------------------------------------

FIRST_CHANGED = {
    "data.dataset": ("other/name", "01_data_prep"),
    "data.n_samples": (4999, "01_data_prep"),
    "data.n_validation": (499, "01_data_prep"),
    "data.shuffle_seed": (43, "01_data_prep"),
    "train.max_length": (2048, "02_template_audit"),
    "model.tokenizer": ("other/name", "02_template_audit"),
    "model.chat_template": ("qwen2_5", "02_template_audit"),
    "audit.exclude_forged_turns": (False, "02_template_audit"),
    "seed": (43, "03_sft_train"),
    "model.base": ("other/name", "02_template_audit"),
    "quantization.load_in_4bit": (False, "03_sft_train"),
    "lora.r": (8, "03_sft_train"),
    "train.learning_rate": (1e-4, "03_sft_train"),
    "train.weight_decay": (0.1, "03_sft_train"),
    "eval.limit": (40, "04_ifeval_eval"),
    "eval.prompts": ("other/name", "04_ifeval_eval"),
}


def changed_stages(overrides: dict) -> list[str]:
    before, after = load_config(RECIPE), load_config(RECIPE, "", overrides)
    return [s for s in STAGES if artifacts.made_from(s, before) != artifacts.made_from(s, after)]


@pytest.mark.parametrize("key", FIRST_CHANGED)
def test_a_key_changes_the_digest_of_its_stage_and_of_all_later_ones(key):
    value, first = FIRST_CHANGED[key]
    assert changed_stages({key: value}) == [s for s in STAGES if s >= first]


@pytest.mark.parametrize("key", ["model.instruct", "model.instruct_revision", "model.adapter"])
def test_what_only_04_reads_does_not_ask_for_training_again(key):
    assert changed_stages({key: "other/name"}) == ["04_ifeval_eval"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.require_gpu", False),
        ("run.eval_slots", 7),
        ("run.wandb_project", "other"),
        ("train.report_to", "none"),
        ("train.disable_tqdm", True),
        ("train.dataloader_num_workers", 2),
    ],
)
def test_where_it_runs_is_not_in_the_digest(key, value):
    assert changed_stages({key: value}) == []


def test_the_stand_ins_sizes_do_not_decide_a_run_without_it():
    assert changed_stages({"offline.vocab_size": 900}) == []


def test_asking_the_dev_prompts_does_not_ask_for_training_again():
    assert changed_stages({"eval.prompts": "embedded:dev"}) == ["04_ifeval_eval"]


@pytest.mark.parametrize("key", ["train.output_dir", "train.run_name"])
def test_names_are_not_in_the_digest(key):
    config = load_config(RECIPE, "", {key: "canary"})
    assert changed_stages({key: "canary"}) == []
    assert "canary" not in json.dumps(artifacts.made_from("04_ifeval_eval", config))


def test_a_token_is_refused():
    sentence = refusal({"train.hub_token": "canary"})
    assert "HF_TOKEN" in sentence
    assert "canary" not in sentence


def test_the_digest_is_the_same_in_every_process():
    code = (
        "from atlas_lib import artifacts, config, stages\n"
        "here = config.load_config('sft_qwen05b', 'offline')\n"
        "print(*(artifacts.config_digest(here, stage) for stage in stages.STAGES))"
    )
    here = load_config(RECIPE, "offline")
    expected = " ".join(artifacts.config_digest(here, stage) for stage in STAGES)
    assert {python(code, PYTHONHASHSEED=str(seed)) for seed in (0, 1)} == {expected}
    assert len(set(expected.split())) == 4
    assert all(len(digest) == 12 for digest in expected.split())


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_yaml_that_loads_back_to_the_same_values():
    done = command_line(
        RECIPE, "--overlay", "offline", "--set", "train.learning_rate=2e-5", "--set", "label=né"
    )
    config = load_config(RECIPE, "offline", {"train.learning_rate": 2e-5, "label": "né"})
    assert (done.returncode, done.stderr) == (0, "")
    assert load_config(RECIPE, "", done.stdout).as_dict() == config.as_dict()
    assert done.stdout.splitlines()[-1] == f"# digest: {artifacts.config_digest(config)}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "Unknown config 'nope'"),
        ([RECIPE, "--overlay", "nope"], "'nope'"),
        ([RECIPE, "--set", "train.learning_rat=1"], "'train.learning_rate'"),
        ([RECIPE, "--set", "data.n_samples=0"], "data.n_samples is 0"),
        ([RECIPE, "--set", "data.n_samples"], "KEY=VALUE"),
        ([RECIPE, "--set", "data.n_samples=[1"], "data.n_samples"),
    ],
    ids=["config", "overlay", "key", "value", "no equals sign", "broken yaml"],
)
def test_the_command_says_one_sentence_and_fails(arguments, words):
    done = command_line(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


# --- recipes of ours, on top of the published one -------------------------------------------------

OURS = {
    "sft_qwen05b_fast": {
        "train.activation_checkpointing": None,
        "train.train_sampling_strategy": "group_by_length",
    },
    "sft_qwen05b_all_linear": {
        "train.activation_checkpointing": None,
        "train.train_sampling_strategy": "group_by_length",
        "train.max_length": 2048,
        "lora.target_modules": [
            f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
        ],
    },
}


@pytest.mark.parametrize(("name", "changes"), OURS.items(), ids=OURS.keys())
def test_our_variants_differ_from_the_recipe_in_what_they_say(name, changes):
    ours, recipe = (
        artifacts.made_from("03_sft_train", load_config(n)) for n in (name, "sft_qwen05b")
    )
    differ = {key: ours[key] for key in ours if ours[key] != recipe.get(key, "absent")}
    assert differ == changes
    assert recipe.keys() <= ours.keys()
    repositories = {load_config(n).output.hub_repo for n in (name, "sft_qwen05b")}
    assert len(repositories) == 2


@pytest.mark.parametrize("name", OURS)
def test_our_variants_are_labelled_and_take_overlays(name):
    assert load_config(name).label
    assert load_config(name, "offline").data.dataset == "embedded:ultrachat"
    assert load_config(name, "offline").label.startswith("offline overlay")


def test_a_recipe_that_extends_nothing_known_is_named(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("seed: 1\n", "utf-8")
    (tmp_path / "mine.yaml").write_text("extends: theirs\n", "utf-8")
    monkeypatch.setattr("atlas_lib.config.CONFIGS", tmp_path)
    with pytest.raises(ValueError, match=r"Unknown config 'theirs'"):
        load_config("mine")


def test_recipes_that_extend_each_other_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("atlas_lib.config.CONFIGS", tmp_path)
    for name, below in {"base": "", "mine": "theirs", "theirs": "mine"}.items():
        (tmp_path / f"{name}.yaml").write_text(f"extends: {below}\n" if below else "", "utf-8")
    with pytest.raises(ValueError, match=r"configs/mine.yaml extends itself through theirs"):
        load_config("mine")
