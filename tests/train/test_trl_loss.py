"""TRL's loss on a CPU, and on a GPU whose Triton kernels do not compile."""

import pytest
import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils

from atlas_lib import devices, models
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
