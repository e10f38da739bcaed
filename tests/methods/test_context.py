import pytest
import torch
from conftest import tiny_model, tokens
from transformers import StaticCache

from rankgate.common.copies import twin
from rankgate.conversion.convert import convert_, converted_layers
from rankgate.conversion.gates import record_gates
from rankgate.methods import GSIConfig
from rankgate.methods.context import Basis

N, K = 16, 4


def test_basis_grows_by_the_residual_and_stays_orthonormal():
    torch.manual_seed(0)
    basis = Basis(K, torch.empty(N, dtype=torch.float64))
    x = torch.randn(N, dtype=torch.float64)
    first = basis.step(x, eps=0.1)
    assert first.fire and first.slot == 0 and first.ratio == 1
    again = basis.step(3 * x, eps=0.1)
    assert not again.fire and again.slot is None and again.ratio < 1e-12
    torch.testing.assert_close(again.seen, 3 * x)
    for _ in range(20):
        basis.step(torch.randn(N, dtype=torch.float64), eps=0.1)
        V = basis.V[: basis.filled]
        torch.testing.assert_close(V @ V.T, torch.eye(len(V), dtype=V.dtype))
    assert basis.filled == K


def test_a_full_basis_gives_up_its_least_used_direction():
    basis = Basis(2, torch.empty(N))
    axes = torch.eye(N)
    basis.step(axes[0], 0.1)
    basis.step(axes[1], 0.1)
    for _ in range(5):
        basis.step(axes[0], 0.1)
    assert basis.step(axes[2], 0.1).slot == 1
    assert not basis.step(axes[0] + axes[2], 0.1).fire
    assert basis.step(axes[1], 0.1).fire


def test_a_closed_gate_is_within_tolerance_of_dense():
    eps = 0.4
    dense = tiny_model("llama", torch.float64)
    model = twin(dense)
    convert_(model, GSIConfig(rank=0.25, eps=eps, basis="context"))
    checks = []

    def check(layer, args, output):
        W = layer.W
        exact = torch.nn.functional.linear(args[0], W, layer.bias)
        bound = eps * torch.linalg.matrix_norm(W, 2) * args[0].norm(dim=-1)
        checks.append(((output - exact).norm(dim=-1) <= bound * (1 + 1e-9)).all())

    for _, layer in converted_layers(model):
        layer.register_forward_hook(check)
    with torch.no_grad(), record_gates(model) as gates:
        model(input_ids=tokens(2, 40))
    assert len(checks) == 14 and all(checks)
    assert all(0 < log.rate < 1 for log in gates.values())
    assert all(0 < log.columns <= 12 for log in gates.values())


def test_a_new_text_starts_with_an_empty_basis():
    model = tiny_model("llama")
    convert_(model, GSIConfig(rank=0.25, eps=0.5, basis="context"))
    ids = tokens(1, 12)
    with torch.no_grad():
        first = model(input_ids=ids).logits
        model(input_ids=tokens(1, 30, seed=9))
        assert torch.equal(model(input_ids=ids).logits, first)
        cache = StaticCache(config=model.config, max_cache_len=64)
        assert torch.allclose(model(input_ids=ids, past_key_values=cache).logits, first, atol=1e-5)
        cache.reset()
        assert torch.allclose(model(input_ids=ids, past_key_values=cache).logits, first, atol=1e-5)


def test_a_converted_twin_has_its_own_texts():
    dense = tiny_model("llama")
    model = twin(dense)
    convert_(model, GSIConfig(rank=0.25, eps=0.5, basis="context"))
    copy = twin(model)
    ids = tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(copy(input_ids=ids).logits, model(input_ids=ids).logits)
    trackers = {layer.subspace.tracker for _, layer in converted_layers(model)}
    others = {layer.subspace.tracker for _, layer in converted_layers(copy)}
    assert len(trackers) == len(others) == 1 and trackers != others


def test_a_layer_called_on_its_own_says_what_it_needs():
    model = tiny_model("llama")
    convert_(model, GSIConfig(rank=0.25, basis="context"))
    with pytest.raises(RuntimeError, match="only through the model"):
        model.model.layers[0].mlp(torch.randn(1, 3, 32))
