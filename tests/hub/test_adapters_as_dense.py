"""LoRA on a converted model against PEFT on a dense one with the same, dequantised weights."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import calibrated, tiny_model, tokens
from peft import EvaConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights

from rankgate.conversion.convert import convert_
from rankgate.decoding.loop import fast_generate
from rankgate.errors import RankgateError
from rankgate.hub.adapters import adaptable
from rankgate.hub.loading import dequantize_
from rankgate.methods import GSIConfig, Int4Config, LRQConfig, SparseConfig, SVDConfig
from rankgate.quantized import QuantizedGroup

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of what is meant
IDS = tokens(2, 12)
TOLERANCE = 1e-5  # relative, of two layers in float32: 100 roundings of 2⁻²⁴
FEW = ["q_proj", "v_proj", "down_proj"]
METHODS = (
    LRQConfig(rank=4, refine=0.3, rounds=1),
    GSIConfig(rank=0.5, eps=0.3),
    SVDConfig(rank=0.5),
    SparseConfig(keep=0.5),
)
NAMES = {"llama": FEW, "qwen2": FEW, "gpt2": ["c_attn"]}
SETTINGS = {
    "all-linear": {"target_modules": "all-linear"},
    "all but one": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "dora": {"use_dora": True},
    "dora everywhere, dropout": {"target_modules": "all-linear", "use_dora": True, "lora_dropout": 0.3},
    "rank-stabilised": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "all biases": {"bias": "all"},
    "ranks": {"rank_pattern": {"q_proj": 4, "c_attn": 4}, "alpha_pattern": {"v_proj": 16}},
    "dense modules": {"modules_to_save": ["lm_head"]},
    "one layer": {"layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "new tokens": {"trainable_token_indices": [5, 6]},
    "invoked": {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"},
}


def pair(architecture="llama", **options):
    """A converted model, and a dense one of what its codes stand for."""
    model = tiny_model(architecture, **options)
    convert_(model, Int4Config())
    dense = copy.deepcopy(model)
    dequantize_(dense)
    return model, dense


def config(model, dense, **settings):
    made = LoraConfig(r=2, lora_alpha=4, **{"target_modules": NAMES[model.config.model_type], **settings})
    return made if dense else adaptable(made)


def stirred(model):
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad or "lora_" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def adapted(model, dense, **settings):
    torch.manual_seed(0)
    return stirred(get_peft_model(model, config(model, dense, **copy.deepcopy(settings))))


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch):
    """Kernels round x, which has its own tests: here both sides multiply in float32."""
    monkeypatch.setattr(QuantizedGroup, "forward", QuantizedGroup.reference)


def logits(model, **how):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **how).logits


def gradients(model):
    torch.manual_seed(3)  # of dropout
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {n.replace(".base_layer", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.eval()
    return found


def close(got, expected):
    return (got - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("architecture", NAMES)
def test_values_and_gradients(architecture, settings, tmp_path):
    fan = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    models = [adapted(model, dense, **settings, **fan) for dense, model in enumerate(pair(architecture))]
    assert close(*map(logits, models))
    got, expected = map(gradients, models)
    assert got.keys() == expected.keys() and len(got) > 0
    assert all(close(got[name], expected[name]) for name in expected)
    models[0].save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        pair(architecture)[0], tmp_path, config=adaptable(LoraConfig.from_pretrained(tmp_path))
    )
    assert torch.equal(logits(again), logits(models[0]))


def test_several_adapters():
    def tell(model, dense):
        """What is said under each adapter, and after they have gone."""
        torch.manual_seed(0)
        every = {"target_modules": "all-linear"}
        adapters = {"b": {**every, "use_dora": True}, "c": {"use_rslora": True}, "d": every}
        peft = get_peft_model(model, config(model, dense, **every), adapter_name="a")
        for name, settings in adapters.items():
            peft.add_adapter(name, config(model, dense, **settings))
        stirred(peft)
        for how in ("linear", "svd"):
            peft.add_weighted_adapter(["a", "d"], [0.5, 0.5], how, combination_type=how)
        for name in ("a", "b", "c", "linear", "svd", "a"):
            peft.set_adapter(name)
            yield logits(peft)
        yield logits(peft, adapter_names=["a", "c"])
        peft.base_model.set_adapter(["a", "c"])
        yield logits(peft)
        with peft.disable_adapter():
            yield logits(peft)
        peft.delete_adapter("a")
        peft.set_adapter("b")
        yield logits(peft)
        left = peft.unload()
        assert not any("lora" in name for name, _ in left.named_modules())
        yield logits(left)

    model, dense = pair()
    before = logits(model)
    told = list(zip(tell(model, False), tell(dense, True), strict=True))
    assert all(close(got, expected) for got, expected in told)
    assert torch.equal(told[-1][0], before) and torch.equal(told[8][0], before)
    assert len({round(got.norm().item(), 4) for got, _ in told[:5]}) == 5


def test_eva_starts_from_activations():
    data = [
        {"input_ids": tokens(4, 16, seed=i), "attention_mask": torch.ones(4, 16, dtype=torch.long)} for i in range(4)
    ]
    found = []
    for dense, model in enumerate(pair()):
        torch.manual_seed(0)
        settings = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0, tau=0.9)}
        peft = get_peft_model(model, config(model, dense, **settings))
        initialize_lora_eva_weights(peft, data, show_progress_bar=False)
        found.append([A.T @ A for name, A in peft.named_parameters() if "lora_A" in name])
    assert all(close(got, expected) for got, expected in zip(*found, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_dora_beside_every_method(method):
    """Untrained it changes nothing, gates or not."""
    model = tiny_model("llama")
    convert_(model, method, calibrated(model, sensitivity=method.needs_sensitivity))
    before = logits(model)
    peft = get_peft_model(model, config(model, False, target_modules="all-linear", use_dora=True))
    assert close(logits(peft), before)
    assert not close(logits(stirred(peft)), before)


def test_the_fast_loop_beside_dora():
    model, _ = pair()
    adapted(model, False, target_modules="all-linear", use_dora=True).eval()
    prompt = IDS[:1, :8]
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(fast_generate(model, prompt, **how), model.generate(prompt, **how))


DENSE_STARTS = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "orthogonal", "lora_ga", "mica")


@pytest.mark.parametrize("start", DENSE_STARTS)
def test_what_starts_from_dense_weights_is_refused(start):
    made = LoraConfig(target_modules=FEW)
    made.init_lora_weights = start
    with pytest.raises(RankgateError, match='needs the dense weights; with converted ones use True, False, "gaussian"'):
        adaptable(made)


@pytest.mark.parametrize("target", ["lm_head", "mlp", "up_proj"])
def test_converted_weights_are_not_trained(target):
    model = tiny_model("llama")
    convert_(model, Int4Config(), lm_head=True)
    with pytest.raises(RankgateError, match="is converted and cannot be trained"):
        get_peft_model(model, config(model, False, modules_to_save=[target]))


@pytest.mark.parametrize("tied", [False, True])
def test_a_rounded_output_embedding(tied):
    def converted():
        model = tiny_model("llama", tie_word_embeddings=tied)
        convert_(model, Int4Config(), lm_head=True)
        return model

    count = sum(
        name.endswith("lora_A.default")
        for name, _ in adapted(converted(), False, **SETTINGS["all-linear"]).named_modules()
    )
    assert count == 14
    with pytest.raises(RankgateError, match="takes no adapter"):
        adapted(converted(), False, target_modules=["lm_head"])
    for settings in (
        {"trainable_token_indices": [5]},
        {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]},
    ):
        if tied:
            with pytest.raises(RankgateError, match="convert without lm_head"):
                adapted(converted(), False, **settings)
        else:
            adapted(converted(), False, **settings)


def test_configurations_that_are_not_adaptable():
    """Nothing is left out in silence: of a model that is partly dense, PEFT would take that part for all linears."""

    def partly():
        model = tiny_model("llama")
        convert_(model, Int4Config(), overrides={"model.layers.0.mlp.up_proj": None})
        return model

    for made in (LoraConfig(target_modules="all-linear"), LoHaConfig(target_modules="all-linear")):
        with pytest.raises(RankgateError, match=r"adaptable\(LoraConfig"):
            get_peft_model(partly(), made)
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(partly(), LoraConfig(target_modules=FEW))
    dense = get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear"))
    assert sum("lora_A.default" in name for name, _ in dense.named_parameters()) == 14
    some = adapted(partly(), False, target_modules="all-linear")
    assert sum(name.endswith("lora_A.default.weight") for name, _ in some.named_parameters()) == 14


def test_merging_is_refused_and_changes_nothing():
    model = adapted(pair()[0], False, target_modules="all-linear")
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(RankgateError, match="cannot be merged into converted weights"):
            merge()
        assert torch.equal(logits(model), before)


def test_nothing_is_adapted_in_silence_where_only_rankgate_and_peft_are_imported():
    program = """
import rankgate, peft, transformers
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
)
model = transformers.AutoModelForCausalLM.from_config(config)
rankgate.convert_(model, rankgate.Int8Config(), overrides={"mlp": None})
peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "adaptable" in done.stderr.splitlines()[-1]
