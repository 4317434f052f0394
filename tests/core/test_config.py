"""The configuration: its layers, what it refuses and in which words, and what its digest covers."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from checks import refusal, run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_lib import artifacts
from atlas_lib.bootstrap import CONFIGS
from atlas_lib.config import load_config, parse_assignments
from atlas_lib.schema import BY_DEVICE, Config
from atlas_lib.stages import STAGES

RECIPE = "sft_qwen05b"


def refused(overrides) -> str:
    """The sentence with which SET is refused."""
    return refusal(load_config, RECIPE, "", overrides)


@pytest.fixture
def layers(tmp_path, monkeypatch) -> Path:
    """A configs folder of our own with the real base and recipe."""
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
    assert "'data.n_samples'" in refusal(load_config, RECIPE, "over")


@pytest.mark.parametrize(
    ("extended", "sentence"),
    [
        ({"mine": "theirs"}, "Unknown config 'theirs'"),
        ({"mine": "theirs", "theirs": "mine"}, "configs/mine.yaml extends itself through theirs"),
    ],
)
def test_a_recipe_that_extends_nothing_or_itself_is_refused(extended, sentence, layers):
    for name, below in extended.items():
        (layers / f"{name}.yaml").write_text(f"extends: {below}\n", "utf-8")
    assert sentence in refusal(load_config, "mine")


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.learning_rate": "1e-3", "lora.r": "8"},
        {"train": {"learning_rate": 1e-3}, "lora": {"r": 8}},
        '{"train.learning_rate": 0.001, "lora.r": 8}',
        "{train.learning_rate: 1e-3, lora.r: 8}",
        "train.learning_rate: 1.0e-3\nlora:\n  r: 8\n",
    ],
    ids=["dotted texts", "nested", "json", "flow yaml", "block yaml"],
)
def test_set_may_be_spelled_in_many_ways(overrides):
    expected = load_config(RECIPE, "", {"train.learning_rate": 0.001, "lora.r": 8})
    assert (expected.train.learning_rate, expected.lora.r) == (1e-3, 8)
    assert load_config(RECIPE, "", overrides).as_dict() == expected.as_dict()


@pytest.mark.parametrize("nothing", [None, {}, "", "{}", "null"])
def test_an_empty_set_changes_nothing(nothing):
    assert load_config(RECIPE, "", nothing).as_dict() == load_config(RECIPE).as_dict()


NUMBERS = {k: type(v) for k, v in load_config(RECIPE).flat().items() if type(v) in (int, float)}
BELOW_ONE = ("lora.lora_dropout", "eval.alpha", "eval.clear_margin")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_number_round_trips_in_every_spelling(data):
    key = data.draw(st.sampled_from(sorted(NUMBERS)))
    number = st.integers(1, 4096 if key == "lora.r" else 10**9)
    if NUMBERS[key] is float:
        number = st.floats(1e-6, 0.999 if key in BELOW_ONE else 1e12)
    value = data.draw(number)
    for spelled in (
        {key: value},
        json.dumps({key: value}),
        f"{key}: {value!r}",
        parse_assignments([f"{key}={value!r}"]),
    ):
        config = load_config(RECIPE, "", spelled)
        assert config.flat()[key] == value
        assert type(config.flat()[key]) is NUMBERS[key]
    again = load_config(RECIPE, "", yaml.safe_load(yaml.safe_dump(config.as_dict())))
    assert again.as_dict() == config.as_dict()
    assert artifacts.config_digest(again) == artifacts.config_digest(config)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("train.learning_rat", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("data.nsamples", "data.n_samples"),
        ("eval.max_tokens", "eval.max_new_tokens"),
        ("offline.vocab_siz", "offline.vocab_size"),
        ("sed", "seed"),
        ("train.warmup_ratio", "train.warmup_steps"),  # dropped by TRL
    ],
)
def test_a_typo_names_the_nearest_key(typo, nearest):
    assert refused({typo: 1}).startswith(f"Unknown key {typo!r}; ")
    assert repr(nearest) in refused({typo: 1})


SEEDS = ("seed", "train.seed", "data.shuffle_seed", "offline.corpus_seed")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.n_samples", "many", "integer"),
        ("data.n_samples", 1.5, "integer"),
        ("data.n_samples", None, "integer"),
        ("data.n_samples", 0, "greater than 0"),
        ("data.n_samples", True, "not be true or false"),
        ("data.n_validation", -1, "greater than 0"),
        ("eval.limit", 0, "greater than 0"),
        ("train.learning_rate", "fast", "number"),
        ("train.learning_rate", 0, "greater than 0"),  # it would train nothing
        ("train.learning_rate", float("nan"), "number"),
        *((key, value, "") for key in BELOW_ONE for value in (-1, float("nan"), 3.69, True)),
        ("train.packing", "maybe", "boolean"),
        # It would train on the user's turns, which 03 refuses; to run 02 again would not help.
        *(("train.assistant_only_loss", value, "should be True") for value in (False, None)),
        ("train.lr_scheduler_kwargs", 5, "dictionary"),  # without the name of a union's member
        ("train.save_strategy", False, "not be true or false"),  # what YAML makes of a bare `no`
        ("run.require_gpu", "perhaps", "boolean"),
        ("model.base", None, "string"),
        ("lora.target_modules", "q_proj", "list"),
        ("lora.bias", "some", "'none', 'all' or 'lora_only'"),
        ("train", 5, "dictionary"),
        ("train.per_device_train_batch_size", 0, "greater than 0"),
        ("train.gradient_accumulation_steps", 0, "greater than 0"),
        ("train.num_train_epochs", 0, "greater than 0"),
        ("train.num_train_epochs", -1, "greater than 0"),
        ("train.max_steps", 0, "greater than 0"),
        ("train.max_steps", -2, "greater than 0"),
        ("train.max_length", 0, "greater than 0"),
        ("train.learning_rate", -1.0, "greater than 0"),
        ("train.train_sampling_strategy", "foo", "'random', 'sequential' or 'group_by_length'"),
        ("lora.r", 10**20, "less than or equal to 4096"),
        ("lora.lora_dropout", 1, "less than 1"),
        *((key, -1, "greater than or equal to 0") for key in SEEDS),
        *((key, 2**40, "less than 4294967296") for key in SEEDS),
    ],
)
def test_a_wrong_value_names_key_value_and_what_was_expected(key, value, expected):
    sentence = refused({key: value})
    assert sentence.startswith(f"{key} is {value!r} ({type(value).__name__}); ")
    assert expected in sentence


def test_a_wrong_value_in_a_list_names_its_place():
    sentence = refused({"eval.formats": ["chat", "html"]})
    assert sentence.startswith("eval.formats.1 is 'html' ")
    assert "'raw' or 'chat'" in sentence


@pytest.mark.parametrize(
    ("key", "expected"),
    [("lora.", "'lora.'; the nearest known one is 'lora.r'"), ("Lora.r", "'Lora'")],
)
def test_an_unknown_key_is_named_as_it_was_written(key, expected):
    assert refused({key: 1}).startswith(f"Unknown key {expected}")


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("-08", -8), ("1e3", 1000), ("2E-4", 2e-4), ("1.e2", 100), ("0x10", 16)],
)
def test_a_number_is_what_it_looks_like(text, value):
    assert parse_assignments([f"lora.r={text}"]) == {"lora.r": value}


def test_text_that_only_resembles_a_number_stays_text():
    for text in ("1e", "060db64", "e3", "1e3x", "12e4567"):
        assert parse_assignments([f"data.revision={text}"]) == {"data.revision": text}


@pytest.mark.parametrize("text", ["&a {x: *a}", "&a [*a]", "[" * 2000, "2026-99-99", "{"])
def test_a_value_that_is_no_tree_is_refused_with_its_key(text):
    sentence = refusal(parse_assignments, [f"lora={text}"])
    assert sentence.startswith(f"--set lora={text} is not YAML: ")


@pytest.mark.parametrize("name", ["x" * 300, "../base", "a\0b", ""])
def test_a_name_that_is_no_file_of_configs_is_unknown(name):
    assert refusal(load_config, name).startswith(f"Unknown config {name!r}; there are: ")


@pytest.mark.parametrize("names", [("nope", ""), (RECIPE, "nope")])
def test_an_unknown_config_or_overlay_lists_those_that_exist(names):
    sentence = refusal(load_config, *names)
    assert "'nope'" in sentence
    existing = {path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "base"}
    assert existing <= set(sentence.rstrip(".").replace(",", "").split())


@pytest.mark.parametrize("name", ["smoke", "base"])
def test_an_overlay_alone_is_no_recipe(name):
    assert "whole recipe such as sft_qwen05b" in refusal(load_config, name)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        *((given, "SET must map") for given in ("[1, 2]", "train.max_steps=10", [1], {1: 2})),
        *((given, "SET is not YAML") for given in ("{", "a: b: c", '{"seed": 1')),
    ],
)
def test_set_must_be_a_mapping(given, words):
    assert words in refused(given)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hub_token", "canary", "set HF_TOKEN instead"),
        ("push_to_hub", True, "set output.hub_repo instead"),
        ("pad_token", "x", "set model.pad_token instead"),
        ("eos_token", "x", "the chat template determines"),
        *((key, True, "the hardware decides") for key in BY_DEVICE),
        *((key, False, "the hardware decides") for key in BY_DEVICE),
    ],
)
def test_an_argument_that_another_key_or_the_device_decides_is_refused(key, value, words):
    sentence = refused({f"train.{key}": value})
    assert sentence.startswith(f"train.{key} is refused: ")
    assert words in sentence
    assert "canary" not in sentence


@pytest.mark.parametrize(("key", "value"), [("max_steps", -1), ("max_steps", 1), ("seed", 0)])
def test_the_ends_of_a_range_are_accepted(key, value):
    assert (
        load_config(RECIPE, "", {f"train.{key}": value}).train.model_dump(exclude_unset=True)[key]
        == value
    )


def test_a_resolved_configuration_cannot_be_changed():
    config = load_config(RECIPE)
    for section, key in ((config, "seed"), (config.train, "learning_rate")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, key, 1)


# --- the recipe -----------------------------------------------------------------------------------


PUBLISHED = """
seed: 42
model.base: Qwen/Qwen2.5-0.5B
model.base_revision: 060db6499f32faf8b98477b0a26969ef7d8b9987
model.tokenizer: Qwen/Qwen2.5-0.5B-Instruct
model.tokenizer_revision: 7ae557604adf67be50417f59c2c2f167def9a775
model.instruct: Qwen/Qwen2.5-0.5B-Instruct
model.instruct_revision: 7ae557604adf67be50417f59c2c2f167def9a775
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
    resolved, stated = load_config(f"{RECIPE}_published").flat(), yaml.safe_load(PUBLISHED)
    assert {key: resolved[key] for key in stated} == stated
    default = load_config(RECIPE).flat()
    changed = {key for key in default if default[key] != resolved[key]}
    assert changed == {"train.activation_checkpointing"}  # left to the free memory
    assert default["train.activation_checkpointing"] is None


def test_the_smoke_run_is_50_steps_of_the_recipe():
    recipe, smoke = (load_config(RECIPE, o).flat() for o in ("", "smoke"))
    changed = {key for key in smoke if smoke[key] != recipe.get(key)}
    assert smoke["train.max_steps"] == 50
    assert smoke["label"]
    assert smoke["output.hub_repo"] is None
    assert changed <= {
        "label", "train.max_steps", "data.n_samples", "data.n_validation", "eval.limit",
        "eval.formats", "output.hub_repo",
    }  # fmt: skip


ALL_LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
FASTER = {"train.train_sampling_strategy": "group_by_length"}
VARIANTS = {
    "sft_qwen05b_fast": FASTER,
    "sft_qwen05b_all_linear": FASTER
    | {"train.max_length": 2048, "lora.target_modules": ALL_LINEAR},
}


@pytest.mark.parametrize(("name", "changes"), VARIANTS.items(), ids=VARIANTS)
def test_a_variant_differs_from_the_recipe_in_these_keys(name, changes):
    variant, recipe = load_config(name), load_config(RECIPE)
    ours, published = (artifacts.made_from("03_sft_train", c) for c in (variant, recipe))
    differ = {key: ours[key] for key in ours if ours[key] != published.get(key, "absent")}
    assert differ == changes
    assert published.keys() <= ours.keys()
    assert variant.output.hub_repo != recipe.output.hub_repo
    assert variant.label


@pytest.mark.parametrize("name", [RECIPE, *VARIANTS])
def test_the_offline_overlay_needs_neither_gpu_nor_hub(name):
    config = load_config(name, "offline")
    assert not config.run.require_gpu
    assert config.label.startswith("offline overlay")
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
    [
        ("weight_decay", "1e-2", 0.01),
        ("optim_args", None, None),
        ("optim", "adamw_torch", "adamw_torch"),
    ],
)
def test_any_other_argument_of_sftconfig_has_its_type(key, given, value):
    assert (
        load_config(RECIPE, "", {f"train.{key}": given}).train.model_dump(exclude_unset=True)[key]
        == value
    )


# --- the digest -----------------------------------------------------------------------------------

NO_STAGE = "05"
FIRST_CHANGED = {
    "data.dataset": ("other/name", "01_data_prep"),
    "data.n_samples": (4999, "01_data_prep"),
    "data.shuffle_seed": (43, "01_data_prep"),
    "train.max_length": (2048, "02_template_audit"),
    "model.base": ("other/name", "02_template_audit"),
    "model.tokenizer": ("other/name", "02_template_audit"),
    "model.chat_template": ("qwen2_5", "02_template_audit"),
    "audit.exclude_forged_turns": (False, "02_template_audit"),
    "seed": (43, "03_sft_train"),
    "quantization.load_in_4bit": (False, "03_sft_train"),
    "lora.r": (8, "03_sft_train"),
    "train.weight_decay": (0.1, "03_sft_train"),
    "model.instruct": ("other/name", "04_ifeval_eval"),
    "model.adapter": ("other/name", "04_ifeval_eval"),
    "eval.limit": (40, "04_ifeval_eval"),
    "label": ("other", "04_ifeval_eval"),
    "eval.prompts": ("embedded:dev", "04_ifeval_eval"),
    "run.require_gpu": (False, NO_STAGE),
    "run.eval_slots": (7, NO_STAGE),
    "train.report_to": ("none", NO_STAGE),
    "train.disable_tqdm": (True, NO_STAGE),
    "train.dataloader_num_workers": (2, NO_STAGE),
    "train.output_dir": ("other", NO_STAGE),
    "train.run_name": ("other", NO_STAGE),
    "offline.vocab_size": (900, NO_STAGE),  # without the tiny model
}


@pytest.mark.parametrize("key", FIRST_CHANGED)
def test_a_key_changes_the_digest_of_its_stage_and_of_all_later_ones(key):
    value, first = FIRST_CHANGED[key]
    configs = load_config(RECIPE), load_config(RECIPE, "", {key: value})
    before, after = ({s: artifacts.made_from(s, c) for s in STAGES} for c in configs)
    assert [s for s in STAGES if before[s] != after[s]] == [s for s in STAGES if s >= first]


def test_the_digest_is_the_same_in_every_process():
    code = (
        "from atlas_lib import artifacts, config, stages\n"
        "here = config.load_config('sft_qwen05b', 'offline')\n"
        "print(*(artifacts.config_digest(here, stage) for stage in stages.STAGES))"
    )
    here = load_config(RECIPE, "offline")
    expected = [artifacts.config_digest(here, stage) for stage in STAGES]
    for seed in ("0", "1"):
        assert run_python("-c", code, PYTHONHASHSEED=seed).stdout.split() == expected
    assert len(set(expected)) == 4
    assert all(len(digest) == 12 for digest in expected)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_yaml_that_loads_back_to_the_same_values():
    given = ("--set", "train.learning_rate=2e-5", "--set", "label=né")
    done = run_python("-m", "atlas_lib.config", RECIPE, "--overlay", "offline", *given)
    config = load_config(RECIPE, "offline", {"train.learning_rate": 2e-5, "label": "né"})
    assert (done.returncode, done.stderr) == (0, "")
    assert load_config(RECIPE, "", done.stdout).as_dict() == config.as_dict()
    assert done.stdout.splitlines()[-1] == f"# digest: {artifacts.config_digest(config)}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "Unknown config 'nope'"),
        ([RECIPE, "--set", "data.n_samples"], "KEY=VALUE"),
        ([RECIPE, "--set", "data.n_samples=[1"], "data.n_samples"),
    ],
    ids=["config", "no equals sign", "broken yaml"],
)
def test_the_command_fails_with_one_sentence(arguments, words):
    done = run_python("-m", "atlas_lib.config", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
