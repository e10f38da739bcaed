"""Padding, batches and `generate()`: a sequence gets the same answer whatever it shares the batch with."""

import pytest
import torch
from conftest import ARCHITECTURES, calibrated, tiny_model, tokens

from rankgate.common.copies import twin
from rankgate.conversion.convert import convert_
from rankgate.conversion.gates import record_gates
from rankgate.methods import ASVDConfig, GSIConfig

METHODS = {
    "asvd": ASVDConfig(rank=0.3, allow_larger=True),
    "gsi": GSIConfig(rank=0.5, eps=0.5, allow_larger=True),
    "context": GSIConfig(rank=0.25, eps=0.5, basis="context", allow_larger=True),
}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 1}


def converted(architecture, name, dtype=torch.float64):
    dense = tiny_model(architecture, dtype)
    model = twin(dense)
    convert_(model, METHODS[name], calibrated(dense))
    return model


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_batch_equals_one_by_one(architecture, name):
    model = converted(architecture, name)
    sequences = [tokens(1, length, seed=length) for length in (19, 7, 12)]
    width = max(s.shape[1] for s in sequences)
    ids = torch.cat([torch.nn.functional.pad(s, (0, width - s.shape[1]), value=1) for s in sequences])
    mask = torch.cat([(torch.arange(width) < s.shape[1]).long()[None] for s in sequences])
    with torch.no_grad(), record_gates(model) as gates:
        batch = model(input_ids=ids, attention_mask=mask).logits
        rates = [log.rate for log in gates.values()]
        for row, sequence in zip(batch, sequences, strict=True):
            alone = model(input_ids=sequence, attention_mask=torch.ones_like(sequence)).logits[0]
            torch.testing.assert_close(row[: sequence.shape[1]], alone)
    assert not rates or 0 < sum(rates) < len(rates)  # gates of both kinds took part


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_padded_generation_equals_one_by_one(architecture, name):
    model = converted(architecture, name)
    long, short = tokens(1, 12, seed=1), tokens(1, 5, seed=2)
    ids = torch.cat([long, torch.cat([torch.ones(1, 7, dtype=torch.long), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    both = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, 12:]
    for row, prompt in zip(both, (long, short), strict=True):
        alone = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        assert torch.equal(row, alone[0, prompt.shape[1] :])


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 4},
    "returned beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_generation_with_a_cache_equals_generation_without(architecture, name, mode):
    """Without a cache every step reads the whole text again, so state carried from step to step must match it."""
    model = converted(architecture, name)
    ids = tokens(2, 6, seed=3)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = {**GREEDY, **MODES[mode], "use_cache": use_cache}
        outputs.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options))
    assert torch.equal(*outputs)


def test_mamba_decodes_what_it_reads():
    for name in METHODS:
        model = converted("mamba", name)
        ids = tokens(2, 6, seed=3)
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
        with torch.no_grad():
            expected = model(input_ids=new[:, :-1]).logits[:, 5:].argmax(-1)
        assert torch.equal(new[:, 6:], expected)
