"""TRL's loss: on a CPU, on a GPU whose Triton kernels do not compile, and checked by hand."""

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.kernels import chunked_logprob
from trl.trainer import utils

from atlas_lib import devices, models
from atlas_lib.loss_mask import audit, labelling
from atlas_lib.train import trl_loss

CPU = devices.Device("cpu", "float32", "test")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """What `fit_loss` sets in TRL is as before after each test."""
    for module, name in (
        (utils, "_use_triton"),
        (utils, "_CHUNKED_LOGPROB_CHUNK_SIZE"),
        (chunked_logprob, "_use_triton"),
        (chunked_logprob, "TOKEN_CHUNK_SIZE"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))


def test_on_a_cpu_positions_are_skipped_and_the_value_is_kept(tiny_config, monkeypatch, capsys):
    base = models.load_weights("base", tiny_config, CPU, in_4bit=False)
    utils.add_fused_lm_head(base)
    capsys.readouterr()  # the first test that needs the tiny model builds it, and prints so
    ids = torch.arange(40)[None]
    labels = ids.clone()
    labels[:, :30] = -100
    scored, whole = [], utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "apply", lambda h, *a: scored.append(len(h)) or whole(h, *a)
    )
    losses = [base(input_ids=ids, labels=labels, fused_lm_head=True).loss.item()]
    monkeypatch.setattr(trl_loss, "CPU_TILE", (4, 100))  # several tiles of this small model
    trl_loss.fit_loss("cpu", "float32")
    losses.append(base(input_ids=ids, labels=labels, fused_lm_head=True).loss.item())
    assert scored == [39, 10]  # nothing is compiled
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert capsys.readouterr().out == ""


def test_kernels_that_do_not_compile_are_replaced_and_the_reason_is_printed(monkeypatch, capsys):
    """The meta device stands in for a GPU: its tensors exist, and TRL takes it for one."""

    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler. Please specify via CC.")

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # knows no meta device
    monkeypatch.setattr(chunked_logprob, "_forward_kernel", Kernel())
    monkeypatch.setattr(chunked_logprob, "_use_triton", lambda device: device.type != "cpu")
    trl_loss.fit_loss("meta", "float16")
    [line] = capsys.readouterr().out.splitlines()
    assert "do not run (Failed to find C compiler. Please specify via CC)" in line
    assert not chunked_logprob._use_triton(torch.device("meta"))
    assert utils._use_triton(
        torch.device("meta")
    )  # unsupervised positions are skipped all the same
    trl_loss.fit_loss("meta", "float16")  # torch operations run
    assert capsys.readouterr().out == ""


@pytest.fixture
def trainer(tiny_config, tmp_path):
    """A trainer of twelve rows of other lengths, whose labels begin at the fifth token."""
    rows = [{"input_ids": list(range(5, 17 + n))} for n in range(12)]
    rows = [row | {"labels": [-100] * 4 + row["input_ids"][4:]} for row in rows]
    arguments = {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": 4}
    return SFTTrainer(
        models.load_weights("base", tiny_config, CPU, in_4bit=False),
        SFTConfig(str(tmp_path), **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=models.load_tokenizer(tiny_config),
    )


def test_the_trainers_loss_is_the_mean_over_the_labelled_tokens(trainer):
    before = torch.get_rng_state()
    by_trainer, by_hand = trl_loss.compare_losses(trainer)
    assert by_trainer == pytest.approx(by_hand, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


def not_shifted(trainer, model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())


def without_labels(trainer, model, inputs):
    return SFTTrainer.compute_loss(trainer, model, inputs | {"labels": inputs["input_ids"]})


@pytest.mark.parametrize("fault", [not_shifted, without_labels])
def test_a_loss_of_other_tokens_shows(trainer, fault):
    trainer.compute_loss = fault.__get__(trainer)
    by_trainer, by_hand = trl_loss.compare_losses(trainer)
    assert by_trainer != pytest.approx(by_hand, rel=1e-2)


def record_of(rows: list[dict]) -> list[dict]:
    hashes = [labelling.labels_sha256(row["input_ids"], row["labels"]) for row in rows]
    return [{"idx": n, "verdict": "ok", "labels_sha256": [h]} for n, h in enumerate(hashes)]


COLLATORS = {
    "shifted": lambda batch: batch | {"labels": batch["labels"].roll(1, -1)},
    "the user's tokens too": lambda batch: batch | {"labels": batch["input_ids"]},
}


@pytest.mark.parametrize("fault", COLLATORS)
def test_a_collator_that_changes_labels_is_refused(trainer, fault):
    """The data set stays as audited; the order of the training does not depend on the check."""
    records, before = record_of(trainer.train_dataset), torch.get_rng_state()
    assert audit.check_batches(trainer.get_train_dataloader(), records) == 12
    assert torch.equal(torch.get_rng_state(), before)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: COLLATORS[fault](collate(rows))
    with pytest.raises(ValueError, match="labels of conversation 0 are not those of the audit"):
        audit.check_batches(trainer.get_train_dataloader(), records)
