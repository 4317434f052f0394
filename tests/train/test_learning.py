"""Losses by kind of token during a training: right, and without an effect on the training."""

from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from atlas_lib import devices, models
from atlas_lib.train import learning

CPU = devices.Device("cpu", "float32", "test")
N, STOP = -100, 9


@pytest.mark.parametrize(
    ("labels", "first", "content", "stop"),
    [
        ([N, N, 3, 4, 5, STOP, N], [2], [3, 4], [5]),
        ([N, 3, STOP, N, N, 5, 6, STOP], [1, 5], [6], [2, 7]),
        ([N, 3, 4, 5], [1], [2, 3], []),  # cut by max_length: the end is not there
        ([N, STOP, N], [1], [], []),
        ([N, N], [], [], []),
    ],
)
def test_each_response_has_a_first_token_and_a_stop(labels, first, content, stop):
    assert learning.kinds_of(labels, STOP) == {"first": first, "content": content, "stop": stop}


def test_long_content_is_thinned_evenly():
    places = learning.kinds_of([N, *range(10, 1000), STOP, N], STOP)["content"]
    assert len(places) <= learning.CONTENT
    assert len({b - a for a, b in pairwise(places)}) == 1


ROWS = [
    {"input_ids": [*range(15, 35 + n), STOP], "labels": [N] * 4 + [*range(19, 35 + n), STOP]}
    for n in range(10)
]


def train(config, folder, callbacks: list) -> SFTTrainer:
    torch.manual_seed(0)
    arguments = {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": 2}
    arguments |= {"max_steps": 10, "logging_steps": 5, "save_strategy": "no", "learning_rate": 1e-3}
    trainer = SFTTrainer(
        models.load_weights("base", config, CPU, in_4bit=False),
        SFTConfig(str(folder), **arguments),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=models.load_tokenizer(config),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def watched(tiny_config, tmp_path_factory):
    """(trainer, callback) of a short training with the callback."""

    def respond(model) -> list[dict]:
        ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
        return [{"response": str(ids.tolist())}]

    callback = learning.KindLosses(ROWS, STOP, respond)
    return train(tiny_config, tmp_path_factory.mktemp("watched"), [callback]), callback


def test_losses_and_responses_are_logged_from_before_training_to_its_end(watched):
    log = [entry for entry in watched[0].state.log_history if "loss_stop" in entry]
    assert [entry["step"] for entry in log] == list(range(11))
    assert [entry["step"] for entry in log if "sampled" in entry] == [0, 2, 5, 8, 10]
    assert log[-1]["loss_content"] < log[0]["loss_content"]


def test_the_losses_are_those_of_all_logits(watched):
    trainer, callback = watched
    model = trainer.model.eval()
    expected = {kind: [] for kind in learning.KINDS}
    for row in ROWS[: learning.ROWS]:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        for kind, places in learning.kinds_of(row["labels"], STOP).items():
            expected[kind] += [-log_p[place - 1, ids[0, place]].item() for place in places]
    means = {f"loss_{kind}": sum(each) / len(each) for kind, each in expected.items()}
    assert callback.losses(model) == pytest.approx(means, rel=1e-5)


def test_the_training_is_the_same_without_it(watched, tiny_config, tmp_path):
    plain, other = train(tiny_config, tmp_path, []).model.state_dict(), watched[0].model
    assert all(torch.equal(plain[name], tensor) for name, tensor in other.state_dict().items())
