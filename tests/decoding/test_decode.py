"""The fast loop gives generate()'s tokens, sees changes of the model, and leaves to generate() what it cannot do."""

import copy
import pickle
import warnings

import pytest
import torch
from conftest import ARCHITECTURES, calibrated, tiny_model, tokens
from torch import nn
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from rankgate.common.copies import twin
from rankgate.conversion.convert import convert_
from rankgate.core import InputGroup
from rankgate.decoding import steps as module
from rankgate.decoding.loop import decode, fast_generate
from rankgate.errors import RankgateError
from rankgate.methods import ASVDConfig, GSIConfig, LRQConfig, SparseConfig

METHODS = {
    "dense": None,
    "asvd": ASVDConfig(rank=0.3, allow_larger=True),
    "lrq": LRQConfig(rank=8, refine=0.3, symmetric=False),
    "sparse": SparseConfig(keep=0.5),
    "gsi": GSIConfig(rank=0.5, eps=0.5, allow_larger=True),
    "context": GSIConfig(rank=0.25, eps=0.5, basis="context", allow_larger=True),
}
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2},
}
CAPTURED = {"gpt2", "gptj", "opt", "llama", "qwen2"}
pytestmark = pytest.mark.filterwarnings("ignore:.*without the fast path")


def variant(architecture, method, dtype=torch.float32):
    model = tiny_model(architecture, dtype)
    if METHODS[method] is None:
        return model
    converted = twin(model)
    convert_(converted, METHODS[method], calibrated(model, sensitivity=METHODS[method].needs_sensitivity))
    return converted


def captured(model):
    return module.captured(model) is not None


def both(model, ids, **options):
    """The tokens of generate(), and those of the fast loop."""
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 1, "do_sample": False, **options}
    outputs = []
    for custom in ({}, {"custom_generate": decode}):
        torch.manual_seed(4)
        outputs.append(model.generate(ids, **{"attention_mask": torch.ones_like(ids), **options}, **custom))
    return outputs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_tokens(architecture, method):
    model = variant(architecture, method)
    for mode in MODES.values():
        for length in (7, 1):
            expected, got = both(model, tokens(1, length, seed=length), **mode)
            assert torch.equal(expected, got)
    assert captured(model) == (architecture in CAPTURED and method != "context")


@pytest.mark.parametrize("architecture", sorted(CAPTURED))
def test_bfloat16_steps_are_as_close_to_float32_as_the_model_is(architecture, monkeypatch):
    """Tokens may tie in bfloat16, so the step itself is compared, along one text."""
    model, wide = tiny_model(architecture, torch.bfloat16), tiny_model(architecture)
    wide.load_state_dict(model.state_dict())
    ids = tokens(1, 20)
    both(model, ids[:, :4])
    assert captured(model)
    capture = module.captured(model)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :1], past_key_values=cache)
        shapes = [layer.keys.shape for layer in cache.layers]
        buffers = [torch.zeros(1, s[1], 32, s[3], dtype=torch.bfloat16) for s in shapes for _ in "kv"]
        steps = [capture(ids[:, i : i + 1], torch.tensor([[i]]), buffers).float() for i in range(20)]
        exact, plain = wide(input_ids=ids).logits[0], model(input_ids=ids).logits[0].float()
    assert (torch.cat(steps) - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("method", ["dense", "gsi"])
def test_the_cache_grows(method, monkeypatch):
    monkeypatch.setattr(module, "CAPACITY", 8)
    model = variant("llama", method)
    for length, new in ((3, 30), (7, 2), (8, 1), (9, 9), (40, 30)):
        expected, got = both(model, tokens(1, length, seed=length), max_new_tokens=new, min_new_tokens=new)
        assert torch.equal(expected, got)


@pytest.mark.parametrize("method", ["dense", "gsi"])
def test_stops_where_generate_stops(method):
    model = variant("llama", method)
    ids = tokens(1, 5)
    free, _ = both(model, ids, eos_token_id=0, min_new_tokens=0)
    options = {"eos_token_id": int(free[0, 10]), "min_new_tokens": 0}
    expected, got = both(model, ids, **options)
    assert torch.equal(expected, got)
    assert got.shape[1] < free.shape[1]

    class AtLength(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 8)

    expected, got = both(model, ids, stopping_criteria=StoppingCriteriaList([AtLength()]))
    assert torch.equal(expected, got)
    assert got.shape[1] == 8
    assert both(model, ids, max_new_tokens=1, min_new_tokens=1)[1].shape[1] == 6


class Recorder(BaseStreamer):
    def __init__(self):
        self.received = []

    def put(self, value):
        self.received.append(value.flatten().tolist())

    def end(self):
        self.received.append("end")


@pytest.mark.parametrize("rows", [1, 2])
def test_streamers_hear_what_generate_tells_them(rows):
    model, ids = tiny_model("llama"), tokens(1, 5).repeat(rows, 1)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    plain, fast = Recorder(), Recorder()
    if rows == 1:
        model.generate(ids, streamer=plain, **options)
        fast_generate(model, ids, streamer=fast, **options)
        assert plain.received == fast.received
        assert len(plain.received) > 2
    else:
        with pytest.raises(ValueError, match="streamer"):
            fast_generate(model, ids, streamer=fast, num_beams=2, **options)


@pytest.mark.parametrize("method", ["dense", "lrq", "gsi"])
@pytest.mark.parametrize("architecture", sorted(CAPTURED))
def test_several_sequences(architecture, method, monkeypatch):
    """Of different lengths, filled up from the left, and when the cache grows; some end before others."""
    monkeypatch.setattr(module, "CAPACITY", 8)
    model, ids = variant(architecture, method), tokens(3, 9)
    filled = torch.ones_like(ids)
    filled[0, :4] = filled[2, :1] = 0
    usual = fast_generate(model, ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[:, 9:]
    for mask in (torch.ones_like(ids), filled):
        for options in (*MODES.values(), {"eos_token_id": [int(usual[0, 5]), int(usual[1, 8])], "min_new_tokens": 0}):
            expected, got = both(model, ids, attention_mask=mask, **options)
            assert torch.equal(expected, got)
    assert module.captured(model, sequences=3) is not None


def test_a_sequence_is_answered_as_if_it_were_alone():
    model, ids = variant("llama", "lrq"), tokens(4, 20)
    mask = torch.ones_like(ids)
    lengths = 20, 3, 11, 1
    for row, length in enumerate(lengths):
        mask[row, : 20 - length] = 0
    together = both(model, ids, attention_mask=mask)[1]
    for row, length in enumerate(lengths):
        assert torch.equal(together[row, 20 - length :], both(model, ids[row : row + 1, 20 - length :])[1][0])


def test_several_answers_of_a_step_that_cannot_be_captured():
    """Read by the model itself, filling included."""
    model, ids = variant("llama", "context"), tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for options in ({}, {"num_return_sequences": 2, **MODES["sampling"]}):
        expected, got = both(model, ids, attention_mask=mask, **options)
        assert torch.equal(expected, got)
    assert module.captured(model, sequences=3) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6])}, "not on the left"),
        ({"num_return_sequences": 33, "do_sample": True}, "too many sequences"),
    ],
)
def test_other_batches_are_left_to_the_model(options, reason):
    model, ids = variant("llama", "asvd"), tokens(2, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            expected, got = both(model, ids, **options)
            assert torch.equal(expected, got)
    assert sum(reason in str(w.message) for w in caught) == 1
    assert not captured(model)


def test_beams_are_left_to_the_model():
    model, ids = variant("llama", "asvd"), tokens(2, 6)
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        expected, got = both(model, ids, **options)
        assert torch.equal(expected, got)
    assert not captured(model)


def test_positions_caches_and_dictionaries_are_left_to_the_model():
    model, ids = tiny_model("llama"), tokens(1, 6)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 1, "do_sample": False}
    for extra in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
        {"position_ids": torch.arange(6)[None] + 3},
    ):
        assert torch.equal(model.generate(ids, **options, **extra), fast_generate(model, ids, **options, **extra))
    given = DynamicCache(config=model.config)
    assert torch.equal(fast_generate(model, ids, past_key_values=given, **options), model.generate(ids, **options))
    assert given.get_seq_length() == 13
    result = fast_generate(model, ids, return_dict_in_generate=True, output_logits=True, **options)
    assert len(result.logits) == 8
    assert not captured(model)


def test_other_generation_modes_are_refused():
    with pytest.raises(RankgateError, match="custom_generate"):
        fast_generate(tiny_model("llama"), tokens(1, 6), prompt_lookup_num_tokens=2, max_new_tokens=4, pad_token_id=1)


@pytest.mark.parametrize("architecture", sorted(CAPTURED))
def test_weights_that_change_in_place_are_seen(architecture):
    model, ids = variant(architecture, "asvd"), tokens(1, 6)
    before = both(model, ids)[1]
    capture = module.captured(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    expected, got = both(model, ids)
    assert torch.equal(expected, got)
    assert not torch.equal(before, got)
    assert module.captured(model) is capture


def test_what_is_replaced_is_seen():
    model, ids = tiny_model("llama"), tokens(1, 6)
    first = both(model, ids)[1]

    def layer():
        model.model.layers[1].mlp.act_fn = nn.Tanh()

    def parameter():
        model.model.layers[0].mlp.down_proj.weight = nn.Parameter(torch.randn(32, 48))

    def data():
        model.model.layers[0].self_attn.o_proj.weight.data = torch.randn(32, 32)

    def conversion():
        convert_(model, METHODS["asvd"], calibrated(model))

    for change in (layer, parameter, data, conversion):
        change()
        expected, got = both(model, ids)
        assert torch.equal(expected, got)
        assert not torch.equal(first, got)
        assert captured(model)
        first = got
    model.double()
    assert torch.equal(*both(model, ids))
    model.model.layers[1].mlp.register_forward_hook(lambda m, i, o: -o)
    expected, got = both(model, ids)
    assert torch.equal(expected, got)
    assert not torch.equal(first, got)


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


class Selecting(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x[x > 0].sum()


@pytest.mark.parametrize("kind", [Branching, Selecting])
def test_what_depends_on_values_is_not_frozen(kind):
    model = tiny_model("llama")
    old = model.model.layers[1].mlp.down_proj
    new = kind(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    model.model.layers[1].mlp.down_proj = new
    with pytest.warns(UserWarning, match="without the fast path"):
        expected, got = both(model, tokens(1, 6))
    assert torch.equal(expected, got)
    assert not captured(model)


def test_what_depends_on_the_position_in_python_is_not_frozen(monkeypatch):
    model = tiny_model("llama")
    forward, norm, lengths = model.model.forward, model.model.norm.forward, []

    def counting(*args, past_key_values, **kwargs):
        lengths.append(past_key_values.get_seq_length())
        return forward(*args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(model.model, "forward", counting)
    monkeypatch.setattr(model.model.norm, "forward", lambda x: norm(x) * (1 + lengths[-1] % 3))
    expected, got = both(model, tokens(1, 6))
    assert torch.equal(expected, got)
    assert not captured(model)


def test_a_wrong_capture_is_not_used(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(module.Capture, "__call__", lambda self, token, position, buffers: torch.zeros(1, 260))
    with pytest.warns(UserWarning, match="off by"):
        expected, got = both(model, tokens(1, 6))
    assert torch.equal(expected, got)


def test_a_capture_leaves_nothing_in_the_model():
    for method in ("lrq", "gsi"):
        model = variant("llama", method)
        before = copy.deepcopy(model.state_dict())
        both(model, tokens(1, 6))
        assert model.config._attn_implementation == "sdpa"
        assert all(not m._memos for m in model.modules() if isinstance(m, InputGroup))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert not captured(copy.deepcopy(model))
    dense = tiny_model("llama")
    both(dense, tokens(1, 6))
    assert torch.equal(*both(pickle.loads(pickle.dumps(dense)), tokens(1, 6)))


def test_threads_and_gradients_are_as_before():
    model, threads = tiny_model("llama"), torch.get_num_threads()

    class Failing(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == 9:
                raise KeyboardInterrupt
            return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        both(model, tokens(1, 6), custom_generate=decode, stopping_criteria=StoppingCriteriaList([Failing()]))
    assert torch.get_num_threads() == threads
    ids = both(model, tokens(1, 6))[1]
    assert not ids.is_inference()
    model.requires_grad_(True)(input_ids=ids, labels=ids).loss.backward()


def test_answers_do_not_depend_on_longer_ones_before():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", max_position_embeddings=16, rope_parameters=scaling)
    states = []
    for length in (20, 40, 20):
        fast_generate(model, tokens(1, length), max_new_tokens=2, do_sample=False)
        states.append(int(model.model.rotary_emb.max_seq_len_cached))
    assert states == [21, 41, 21]
