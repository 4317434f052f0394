"""03 trains the tiny model with templates other than Qwen2.5's, from rows with labels."""

import json
import shutil

import numpy as np
import pytest
import templates
import torch
from checks import run_python
from tiny import TINY

from atlas_lib import artifacts
from atlas_lib.config import load_config
from atlas_lib.loss_mask import labelling
from atlas_lib.loss_mask.audit import AUDIT_ROWS
from atlas_lib.loss_mask.token_rows import labelled
from atlas_lib.loss_mask.turns import ChatTemplate
from atlas_lib.standin import corpus, tiny_model

KINDS = {"ChatML": templates.CHATML, "brackets": templates.BRACKETS, "think": templates.THINK}


@pytest.fixture(
    params=[
        "brackets",
        "think",
        pytest.param("ChatML", marks=pytest.mark.long),
        pytest.param("whitespace is swallowed", marks=pytest.mark.long),
    ]
)
def kind(request, tmp_path, tiny_config):
    """(name, SET of a run with that template)."""
    from transformers import AutoTokenizer

    name, text = request.param, KINDS.get(request.param, templates.CHATML)
    (tmp_path / "chat.jinja").write_text(text, "utf-8")
    overrides = {"model.chat_template": str(tmp_path / "chat.jinja"), "train.max_length": 96}
    if name not in KINDS:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model.build("tokenizer", tiny_config))
        templates.swallow_whitespace(tokenizer)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        overrides["model.tokenizer"] = str(tmp_path / "tokenizer")
    return name, TINY | overrides


@pytest.mark.slow
def test_03_trains_exactly_the_audited_labels(kind, tmp_path):
    name, overrides = kind
    given = [f"--set={key}={value}" for key, value in overrides.items()]
    stages = ["01_data_prep", "02_template_audit", "03_sft_train"]
    run = ["-m", "tools.run", *stages, "--overlay", "offline", "--out", tmp_path / "run", *given]
    done = run_python(*run)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    audited = artifacts.read_jsonl(tmp_path / "run" / "02_template_audit" / AUDIT_ROWS)
    assert {row["verdict"] for row in audited} == {"ok"}
    rows = sum(len(row["labels_sha256"]) for row in audited)
    summary = json.loads((tmp_path / "run" / "03_sft_train" / "summary.json").read_text("utf-8"))
    assert summary["rows_compared_with_audit"] == rows
    assert (rows > len(audited)) == (name == "think")


@pytest.mark.slow
def test_attention_that_cannot_be_decoded_is_refused_before_the_training(tmp_path, tiny_config):
    folder = shutil.copytree(tiny_model.build("base", tiny_config), tmp_path / "sliding")
    shape = json.loads((folder / "config.json").read_text("utf-8"))
    shape |= {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    shape.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(shape), "utf-8")
    given = [f"--set={key}={value}" for key, value in (TINY | {"model.base": folder}).items()]
    out = ["--overlay", "offline", "--out", tmp_path / "run"]
    done = run_python(
        "-m", "tools.run", "01_data_prep", "02_template_audit", "03_sft_train", *out, *given
    )
    assert done.returncode == 1
    assert "Decoding does not support sliding_attention attention" in done.stderr
    assert not (tmp_path / "run" / "03_sft_train" / "train_log.jsonl").exists()


def test_the_loss_is_cross_entropy_at_those_labels(kind, tmp_path, tiny_config):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from atlas_lib import models

    config = load_config("sft_qwen05b", "offline", kind[1])
    tokenizer = models.load_tokenizer(config)
    chats = [row["messages"] for row in corpus.conversations(3, 12, config.offline.taught)]
    rows = labelled(ChatTemplate(tokenizer), chats)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trainer"), use_cpu=True, report_to="none", max_length=96
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model.build("base", tiny_config))
    trainer = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    expected = [
        labelling.labels_sha256(row["input_ids"][:96], row["labels"][:96])
        for row in rows
        if any(label != labelling.IGNORED for label in row["labels"][:96])
    ]
    kept = trainer.train_dataset
    assert [labelling.labels_sha256(row["input_ids"], row["labels"]) for row in kept] == expected
    batch = trainer.data_collator([kept[at] for at in range(4)])
    with torch.inference_mode():
        loss = trainer.compute_loss(model.eval(), dict(batch)).item()
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    picked = []
    for at in range(4):
        labels = kept[at]["labels"]
        picked += [
            -torch.log_softmax(logits[at, position - 1], -1)[label].item()
            for position, label in enumerate(labels)
            if label != labelling.IGNORED
        ]
    assert loss == pytest.approx(np.mean(picked), abs=2e-6)
