"""Converted models that several processes share, by transformers' tensor parallelism (gloo, two processes)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB, calibrated, tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from rankgate import RankgateConfig, RankgateError, convert_
from rankgate.core import GatedGroup, GroupedLinear, Subspace
from rankgate.decoding.loop import fast_generate
from rankgate.hub.quantizer import RankgateQuantizer
from rankgate.hub.sharding import Share, SummedLinear, shard_, take_styles
from rankgate.methods import GSIConfig, Int8Config, LRQConfig, SVDConfig

METHODS = {
    "lrq": LRQConfig(rank=8, refine=0.3, rounds=1),
    "groups": LRQConfig(rank=0, refine=0.0, group_size=32, symmetric=False),
    "int8": Int8Config(),
    "svd": SVDConfig(rank=0.75, allow_larger=True),
}
ALONE = SimpleNamespace(group_name="nobody")  # never asked for a sum
STYLES = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
STYLES |= {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


def dense(**changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**{**sizes, **heads, **changes}, attention_bias=True, mlp_bias=True)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def converted(name: str, **changes: int) -> LlamaForCausalLM:
    model, method = dense(**changes), METHODS[name]
    convert_(model, method, calibrated(model, sensitivity=method.needs_sensitivity))
    return model


def styles(model: LlamaForCausalLM) -> dict[str, str]:
    return {name: STYLES[leaf] for name, _ in model.named_modules() if (leaf := name.rpartition(".")[2]) in STYLES}


def worker(folder: Path) -> None:
    """What each process does: open every model here with a share of it and as a whole."""
    found = {}
    for name in METHODS:
        whole = AutoModelForCausalLM.from_pretrained(folder / name)
        half = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(tp_size=2))
        ids = tokens(2, 12)
        with torch.no_grad():
            a, b = half(ids).logits, whole(ids).logits
        texts = [fast_generate(model, ids, max_new_tokens=8, do_sample=False).tolist() for model in (half, whole)]
        layer = half.model.layers[0]
        shapes = [layer.self_attn.q_proj.out_features, layer.mlp.down_proj.in_features]
        try:
            half.save_pretrained(folder / f"{name}-half")
            said = ""
        except RankgateError as error:
            said = str(error)
        found[name] = [float((a - b).norm() / b.norm()), texts[0] == texts[1], shapes, said]
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))


def test_two_processes_answer_as_one(tmp_path: Path):
    for name in METHODS:
        converted(name).save_pretrained(tmp_path / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == METHODS.keys()
    for distance, same, shapes, said in found.values():
        assert distance < 2e-3 and same and shapes == [64, 128]
        assert "save it where it is whole" in said


@pytest.mark.parametrize("name", METHODS)
def test_parts_add_up_to_the_layer(name: str):
    """In one process, without a sum over processes: rows follow each other, columns are added."""
    model, x = converted(name), torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    whole = {kind: layer for kind in ("up_proj", "down_proj") for layer in [getattr(model.model.layers[0].mlp, kind)]}
    rows, columns = [], 0
    for rank in range(2):
        part = converted(name)
        shard_(part, styles(part), Share(rank, 2, ALONE))
        mlp = part.model.layers[0].mlp
        rows.append(mlp.up_proj.group.reference(x[:, :128])[:, mlp.up_proj.start : mlp.up_proj.stop])
        rows[-1] += mlp.up_proj.bias
        assert isinstance(mlp.down_proj, SummedLinear)
        columns = columns + mlp.down_proj.group.reference(x[:, 128 * rank : 128 * rank + 128])
    up, down = whole["up_proj"], whole["down_proj"]
    expected = up.group.reference(x[:, :128])[:, up.start : up.stop] + up.bias
    torch.testing.assert_close(torch.cat(rows, 1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(columns, down.group.reference(x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_shared():
    model = converted("int8")
    for size, said in ((3, "num_attention_heads is 4"), (4, "num_key_value_heads is 2")):
        with pytest.raises(RankgateError, match=said):
            shard_(model, styles(model), Share(0, size, ALONE))
    narrow = converted("int8", intermediate_size=192)
    with pytest.raises(RankgateError, match="no whole blocks of 64"):
        shard_(narrow, styles(narrow), Share(0, 2, ALONE))
    gated = dense()
    convert_(gated, GSIConfig(rank=0.5, eps=0.3, allow_larger=True), calibrated(gated))
    with pytest.raises(RankgateError, match="needs all of its input"):
        shard_(gated, styles(gated), Share(0, 2, ALONE))


def test_a_rule_for_converted_and_dense_layers_is_refused():
    plan = {"layers.*.up_proj": "colwise", "norm": "replicated"}
    assert take_styles(["layers.0.up_proj"], ["layers.0.other"], plan) == {"layers.0.up_proj": "colwise"}
    assert plan == {"norm": "replicated"}
    with pytest.raises(RankgateError, match="dense"):
        take_styles(["layers.0.up_proj"], ["layers.1.up_proj"], {"layers.*.up_proj": "colwise"})


def test_experts_are_refused():
    config = RankgateConfig("int8", modules=[], experts=["model.layers.0.mlp.experts"])
    wanted = SimpleNamespace(config=SimpleNamespace(distributed_config=DistributedConfig(tp_size=2)))
    with pytest.raises(RankgateError, match="experts that are converted"):
        RankgateQuantizer(config, pre_quantized=True)._tp_size(wanted)


def test_gradients_are_refused():
    group = GatedGroup(Subspace(torch.eye(4), None), torch.eye(4), None)
    layer = SummedLinear(GroupedLinear(group, 0, 4, None), group, ALONE)
    with pytest.raises(RankgateError, match="cannot be trained"):
        layer(torch.ones(4, requires_grad=True))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
