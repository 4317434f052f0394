"""README's worked example runs: another model of the Qwen2 architecture, a local jsonl."""

import itertools
import json
import re
import shlex

import pytest
from checks import ROOT, run_python

from atlas_lib.config import load_config, parse_assignments
from atlas_lib.standin import corpus

ON_A_CPU = {"run.require_gpu": "false", "train.max_steps": "2", "data.n_samples": "32"}


def example() -> list[str]:
    """The arguments of README's command for another model and other data."""
    text = (ROOT / "README.md").read_text("utf-8")
    section = text.partition("## Another model, other data")[2]
    command = re.search(r"```sh\n(.*?)```", section, flags=re.S)[1]
    return shlex.split(command.replace("\\\n", " "))[1:]  # without "python"


def test_the_command_is_valid_as_it_stands():
    overrides = [value for flag, value in itertools.pairwise(example()) if flag == "--set"]
    config = load_config("sft_qwen05b", "", parse_assignments(overrides))
    assert (config.label, config.output.hub_repo) == ("mine", None)
    assert config.eval.formats == ["raw", "chat"]


@pytest.mark.slow
@pytest.mark.long
def test_another_model_and_a_local_jsonl(trained_tokenizer, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    made = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(trained_tokenizer), **shape, **heads))
    made.save_pretrained(tmp_path / "models" / "mine")
    trained_tokenizer.save_pretrained(tmp_path / "models" / "mine")
    chats = corpus.conversations(7, 60, ["punctuation:no_comma", "detectable_format:title"])
    lines = [json.dumps(chat) for chat in chats]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats.jsonl").write_text("\n".join(lines) + "\n", "utf-8")

    names = ("models/mine", "data/chats.jsonl", "runs/mine")
    places = {name: str(tmp_path / name) for name in names}
    command = [re.sub("|".join(places), lambda m: places[m[0]], part) for part in example()]
    command += [part for key, value in ON_A_CPU.items() for part in ("--set", f"{key}={value}")]
    done = run_python(*command, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    stage = tmp_path / "runs" / "mine" / "03_sft_train"
    summary = json.loads((stage / "summary.json").read_text("utf-8"))
    assert summary["steps"] == 2
    # r = 16 on q, k, v, o of three layers of width 48 with keys and values of width 16
    assert summary["trainable_parameters"] == 3 * 16 * (2 * (48 + 48) + 2 * (48 + 16))
    adapter = json.loads((stage / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert adapter["base_model_name_or_path"] == str(tmp_path / "models" / "mine")

    for parameter in made.parameters():
        parameter.data += 0.01
    made.save_pretrained(tmp_path / "models" / "mine")
    changed = f"content of {tmp_path / 'models' / 'mine'}"
    earlier = ("01_data_prep", "02_template_audit")
    forced = run_python(*(part for part in command if part not in earlier), "--force")
    assert forced.returncode == 1
    assert re.search(rf"^error: .*02_template_audit does not fit.*{changed}", forced.stderr, re.M)
    again = run_python(*command, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    first, second, third = re.findall(r"^── \w+: (?!took)(.*)", again.stdout, flags=re.M)
    assert first == "finished and unchanged, reused"
    assert changed in second
    assert third.startswith("not run yet")  # --force removed its manifest
