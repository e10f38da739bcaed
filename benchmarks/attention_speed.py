"""From which length on attention to fewer keys pays: results/attention_speed_cpu.json, or _h100.json.

    python benchmarks/attention_speed.py --model smollm2-135m --text FILE [--device cuda] [--lengths 512 2048]

One layer in the middle of SmolLM2-135M and real text. Prefill: choosing representatives anew, by cascade, and reading
all queries, against scaled_dot_product_attention of the same queries, keys and values. Decoding: one query, its
selection included, against the same. Also bytes of the cache. Times are the medians of repeats in turn, as ratios; the
absolute ones are kept for GPUs only, where the model is bfloat16. A quiet machine, ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu import device_name
from provenance import write
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from rankgate.attention.attend import decoder
from rankgate.attention.probe import dense, probing
from rankgate.attention.select import Selection, cascade, select, unit
from rankgate.attention.strands import Heads, Strand
from rankgate.hub.opening import open_dense

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LAYER = 15
REPEATS = 5
SINKS = 4
SETTINGS = {  # of key heads: all alike by the layer's states, or each by its own keys
    "windowed, τ = 0.3, w = 128": Heads(128, 0.3),
    "by head: w = 128, τ = 0.4": Heads(128, 0.4),
    "by head: w = 256, no representatives": Heads(256, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    arguments = parser.parse_args()
    opened = open_dense(arguments.model, arguments.device)
    if arguments.device != "cpu":
        opened.model.to(torch.bfloat16)
    _, layers = decoder(opened.model)
    del layers[LAYER + 1 :]
    opened.model.config.num_hidden_layers = len(layers)
    opened.model.config.max_position_embeddings = max(arguments.lengths)  # its speed, not what it says, is measured
    results = []
    for length in arguments.lengths:
        ids = opened.windows(arguments.text, length, length)
        results += [{"length": length, **row} for row in rows(*captured(opened.model, ids), arguments.device)]
        print(*results[-2 - len(SETTINGS) :], sep="\n", flush=True)
        name = torch.cuda.get_device_name() if arguments.device != "cpu" else "CPU"
        settings = {"device": name, "layer": LAYER, "repeats": REPEATS}
        write(f"attention_speed_{device_name(arguments.device)}", settings, results)


def captured(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor, float]]:
    """Unit states at the inputs of the last two layers (T × d), and q, k, v and the scale of the last."""
    states: list[Tensor] = []
    taken: list[Any] = []

    def probe(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        taken[:] = [(q, k, v, scale)]
        return dense(q, k, v, scale)

    handles = [
        layer.register_forward_pre_hook(lambda _, args: states.append(unit(args[0][0])))
        for layer in decoder(model)[1][-2:]
    ]
    with torch.inference_mode(), probing(model, probe):
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return states, taken[0]


@torch.inference_mode()
def rows(states: list[Tensor], taken: tuple[Tensor, Tensor, Tensor, float], device: str) -> list[dict[str, Any]]:
    (before, x), (q, k, v, scale) = states, taken
    first, anew = select(before, 0.3), select(x, 0.3)
    chain = cascade(x, 0.3, first)
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense(q, k, v, scale),
        "select": lambda: select(x, 0.3),
        "cascade": lambda: cascade(x, 0.3, first),
    }
    one = q[:, :, -1:], k[:, :, -1:], v[:, :, -1:]
    past = k[:, :, :-1], v[:, :, :-1]

    def step() -> Tensor:  # as with transformers' DynamicCache
        keys, values = (torch.cat(pair, 2) for pair in zip(past, one[1:], strict=True))
        return F.scaled_dot_product_attention(one[0], keys, values, scale=scale, enable_gqa=True)

    calls["dense, decoding"] = step
    held: dict[str, list[Strand]] = {}
    for name, own in SETTINGS.items():
        heads = k.shape[1]
        parts = [slice(0, heads)] if name.startswith("windowed") else [slice(h, h + 1) for h in range(heads)]

        def read(parts: list[slice] = parts, own: Heads = own) -> list[Strand]:
            strands = [Strand(part, own, SINKS) for part in parts]
            for strand in strands:
                attend(strand, (q, k, v), x, anew if len(parts) == 1 else None, scale)
            return strands

        held[name] = read()
        calls[name] = read
        calls[f"{name}, decoding"] = (
            lambda name=name: [  # type: ignore[misc]
                attend(strand.copy(), one, x[-1:], None, scale) for strand in held[name]
            ]
        )
    seconds = timed(calls, device)
    plain = k.nbytes + v.nbytes
    out = [row("select", seconds["select"], seconds["dense"], device, r=anew.share, dots=anew.dots)]
    out.append(row("cascade", seconds["cascade"], seconds["dense"], device, r=chain.share, dots=chain.dots))
    for name, strands in held.items():
        step_seconds, dense_seconds = seconds[f"{name}, decoding"], seconds["dense, decoding"]
        more = {"decode": step_seconds / dense_seconds, "cache": sum(strand.nbytes for strand in strands) / plain}
        if device != "cpu":
            more |= {"decode_ms": 1e3 * step_seconds, "dense_decode_ms": 1e3 * dense_seconds}
        out.append(row(name, seconds[name], seconds["dense"], device, **more))
    return out


def attend(
    strand: Strand, qkv: tuple[Tensor, Tensor, Tensor], x: Tensor, selection: Selection | None, scale: float
) -> Tensor:
    q, k, v = qkv
    per_key = q.shape[1] // k.shape[1]
    mine, queries = strand.heads, strand.queries(per_key)
    states = x if strand.heads.stop - strand.heads.start == k.shape[1] else None
    return strand.attend(q[0, queries], k[0, mine], v[0, mine], states, selection, scale)


def row(name: str, seconds: float, reference: float, device: str, **more: float) -> dict[str, Any]:
    """`x dense`: of a dense prefill of this layer."""
    absolute = {} if device == "cpu" else {"ms": 1e3 * seconds, "dense_ms": 1e3 * reference}
    return {"what": name, "x dense": seconds / reference, **absolute, **more}


def timed(calls: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Median seconds, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
