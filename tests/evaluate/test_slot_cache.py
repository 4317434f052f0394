"""Steps of few shapes and CUDA graphs against the plain ones; what attention reads."""

import cuda_graphs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atlas_lib import compat
from atlas_lib.evaluate import decoding, slot_cache
from benchmarks.eval import traced_steps

CAP = 50
SHAPE = {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 56}
STOPS = [3, 4]


@pytest.fixture(scope="module")
def model():
    """Seven query heads share keys, as in Qwen2.5-0.5B; random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=90, intermediate_size=96, num_hidden_layers=2, **SHAPE)
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():  # far from ties, and stops after very different lengths
        parameter.data *= 8
    return model.eval()


@pytest.fixture(scope="module")
def prompts():
    torch.manual_seed(1)
    lengths = torch.randint(1, 120, (40,)).tolist()
    return [torch.randint(5, 90, (length,)).tolist() for length in lengths]


@pytest.fixture(scope="module")
def expected(model, prompts):
    """New ids of transformers' generate, a prompt at a time."""
    rows = {}
    for index, ids in enumerate(prompts):
        found = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            eos_token_id=STOPS,
            pad_token_id=0,
            max_new_tokens=CAP,
        )
        rows[index] = found[0, len(ids) :].tolist()
    return rows


def decoded(model, prompts, slots):
    return dict(torch.inference_mode()(decoding.decode)(model, prompts, STOPS, CAP, slots))


@pytest.fixture
def fixed(monkeypatch):
    monkeypatch.setattr(slot_cache, "FIXED_SHAPES", ("cpu",))


def test_shapes_are_few_and_not_much_larger_than_needed():
    sizes = {n: slot_cache.rounded_up(n, 10_000) for n in range(1, 2049)}
    assert all(n <= size <= max(1.25 * n, n + 15) for n, size in sizes.items())
    assert all(size % 16 == 0 for size in sizes.values())
    assert len(set(sizes.values())) < 28
    assert slot_cache.rounded_up(520, 541) == 541


@pytest.mark.parametrize("slots", [1, 5, 40])
def test_shared_keys_give_the_rows_of_plain_generation(model, prompts, expected, slots):
    lengths = {len(ids) for ids in expected.values()}
    assert len(lengths) > 8 and CAP in lengths and min(lengths) < 5
    assert decoded(model, prompts, slots) == expected


@pytest.mark.parametrize("slots", [1, 5, 40])
def test_replayed_graphs_give_the_rows_of_plain_generation(
    model, prompts, expected, slots, fixed, monkeypatch, capsys
):
    """Windows of several lengths, slots freed and filled again, rows moved."""
    made, passes = cuda_graphs.emulate(monkeypatch), []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert decoded(model, prompts, slots) == expected
    hook.remove()
    assert len(made) >= 5
    assert sum(graph.replays for graph in made) > len(passes) > len(made)
    assert "graph" not in capsys.readouterr().out


def test_without_graphs_the_shapes_stay_and_one_line_says_why(
    model, prompts, expected, fixed, capsys
):
    """PyTorch for CPUs cannot capture."""
    assert decoded(model, prompts, 5) == expected
    assert capsys.readouterr().out.count("decoding without CUDA graphs") == 1


def test_a_graph_with_other_tokens_is_not_used(
    model, prompts, expected, fixed, monkeypatch, capsys
):
    made = cuda_graphs.emulate(monkeypatch, wrong=True)
    assert decoded(model, prompts, 5) == expected
    assert len(made) == 1 and made[0].replays == 1
    assert "without CUDA graphs, which is slower: the first tokens of one differ" in (
        capsys.readouterr().out
    )


def test_a_model_that_waits_for_a_result_is_decoded_without_graphs(
    model, prompts, expected, fixed, monkeypatch, capsys
):
    made = cuda_graphs.emulate(monkeypatch)

    def wait(module, args, output):
        output[0].sum().item()

    hook = model.register_forward_hook(wait)
    assert decoded(model, prompts, 5) == expected
    hook.remove()
    assert len(made) == 1 and made[0].replays == 0
    assert "not permitted when stream is capturing" in capsys.readouterr().out


class AttentionCalls(TorchDispatchMode):
    """Keys and values of every one-token call of an attention kernel."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in str(func) and args[2].shape[2] != args[0].shape[2]:
            self.seen.append(args[:3])
        return output


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("packs", [True, False], ids=["transformers_packs", "it_repeats_keys"])
def test_a_step_reads_the_cache_itself_in_every_precision(
    model, prompts, monkeypatch, dtype, packs
):
    """transformers 5.16 repeats keys for one query as well: forced on the installed version."""
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    compat.choose_attention("cpu", dtype)
    if not packs and hasattr(sdpa_attention, "pack_gqa"):
        monkeypatch.setattr(sdpa_attention, "is_torchdynamo_compiling", lambda: True)
    half = Qwen2ForCausalLM(model.config).to(getattr(torch, dtype)).eval()
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with torch.inference_mode(), AttentionCalls() as calls:
        rows = decoding.decode(half, prompts[:6], STOPS, 8, 3)
        next(rows)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before  # also between two rows
        list(rows)
    assert len(calls.seen) > 10
    caches = {key.untyped_storage().data_ptr() for _, key, _ in calls.seen}
    caches |= {value.untyped_storage().data_ptr() for _, _, value in calls.seen}
    assert len(caches) == 2 * model.config.num_hidden_layers
    for query, key, value in calls.seen:
        assert query.shape[1:] == (2, 7, 4) and query.is_contiguous()
        assert key.shape[1] == value.shape[1] == 2 and key.stride(-1) == value.stride(-1) == 1


def test_a_traced_step_at_the_true_shape_touches_keys_and_values_once():
    """24 layers, two key heads of 64, float16; keys repeated for seven heads are the comparison."""
    packed, repeated = ({run["slots"]: run for run in half} for half in halves(traced_steps()))
    for slots, run in packed.items():
        kept = 24 * 2 * 2 * slots * run["window"] * 64 * 2
        touched = run["by_operation"]["scaled_dot_product_attention"]
        assert kept < touched < 1.02 * kept
        assert "reshape" not in run["by_operation"]  # it would be a copy
        assert repeated[slots]["by_operation"]["reshape"] > 7 * kept
        assert repeated[slots]["bytes"] > 6 * run["bytes"]


def halves(rows):
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]
