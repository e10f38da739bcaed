"""From which length on attention to fewer keys pays: results/attention_speed/cpu.json, h100.json.

    python benchmarks/attention_speed.py --model smollm2-135m --text FILE [--device cuda] [--lengths 512 2048]

One layer in the middle of SmolLM2-135M and real text. Prefill: choosing representatives anew, by cascade, and reading
all queries, against scaled_dot_product_attention of the same queries, keys and values. Decoding: one query, its
selection included, against the same; and by head on a CPU, attention of a captured step against that of dense ones.
Also bytes of the cache. Times are the medians of repeats in turn, as ratios; the absolute ones are kept for GPUs only,
where the model is bfloat16. A quiet machine, ten minutes on two cores.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from frame import Columns, Content, Row, card, device_name, in_turn, parser, place, record, source, start, table
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from rankgate.attention.attend import decoder
from rankgate.attention.held import HeldRows
from rankgate.attention.probe import dense, probing
from rankgate.attention.select import Selection, cascade, select, unit
from rankgate.attention.strands import Heads, Strand
from rankgate.hub.opening import Opened, open_dense
from rankgate.ops.cpu import team
from rankgate.ops.cpu.attention import Attention

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LAYER, REPEATS, SINKS, REPLAYS = 15, 5, 4, 100
SETTINGS = {  # of key heads: all alike by the layer's states, or each by its own keys
    "windowed, τ = 0.3, w = 128": Heads(128, 0.3),
    "by head: w = 128, τ = 0.4": Heads(128, 0.4),
    "by head: w = 256, no representatives": Heads(256, None),
}


def main() -> None:
    options = parser(__doc__, "--device", "--model")
    options.add_argument("--text", required=True)
    options.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    arguments = start(options)
    device = arguments.device
    opened = open_dense(arguments.model, device)
    if device != "cpu":
        opened.model.to(torch.bfloat16)
    _, layers = decoder(opened.model)
    del layers[LAYER + 1 :]
    opened.model.config.num_hidden_layers = len(layers)
    opened.model.config.max_position_embeddings = max(arguments.lengths)  # its speed, not what it says, is measured
    settings = {"device": card(device), "layer": LAYER, "repeats": REPEATS}
    rows = measured(opened, arguments.text, arguments.lengths)
    record(f"attention_speed/{device_name(device)}", settings, rows)


def measured(opened: Opened, text: str, lengths: list[int]) -> Iterator[Row]:
    for length in lengths:
        taken = captured(opened.model, opened.windows(text, length, length))
        for row in rows_of(*taken):
            yield {"length": length, **row}


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
def rows_of(states: list[Tensor], taken: tuple[Tensor, Tensor, Tensor, float]) -> list[Row]:
    (before, x), (q, k, v, scale) = states, taken
    device = x.device.type
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
        together = name.startswith("windowed") or own.tau is None
        parts = [list(range(heads))] if together else [[h] for h in range(heads)]

        def read(parts: list[list[int]] = parts, own: Heads = own) -> list[Strand]:
            strands = [Strand(part, own, SINKS) for part in parts]
            for strand in strands:
                attend(strand, (q, k, v), x, anew, scale)
            return strands

        def read_one(name: str = name) -> list[Tensor]:
            return [attend(strand.copy(), one, x[-1:], None, scale) for strand in held[name]]

        held[name] = read()
        calls[name] = read
        calls[f"{name}, decoding"] = read_one
        if device == "cpu" and not name.startswith("windowed"):
            calls[f"{name}, captured"] = replays(one, HeldRows(held[name], 2 * k.shape[2]).buffers, k.shape[2], scale)
    if device == "cpu":
        cache = [F.pad(t, (0, 0, 0, t.shape[2])) for t in (k, v)]
        calls["dense, captured"] = replays(one, cache, k.shape[2], scale)
    seconds = {name: statistics.median(times) for name, times in in_turn(calls, REPEATS, device).items()}

    def ratio(name: str, dense: str, key: str, prefix: str = "") -> Row:
        """Against dense attention; on a GPU also absolute."""
        own, reference = seconds[name], seconds[dense]
        absolute = {} if device == "cpu" else {f"{prefix}ms": 1e3 * own, f"dense_{prefix}ms": 1e3 * reference}
        return {key: own / reference, **absolute}

    out: list[Row] = []
    for name, selection in (("select", anew), ("cascade", chain)):
        out.append({"what": name, **ratio(name, "dense", "x dense"), "r": selection.share, "dots": selection.dots})
    for name, strands in held.items():
        cache = sum(strand.nbytes for strand in strands) / (k.nbytes + v.nbytes)
        step_ratio = ratio(f"{name}, decoding", "dense, decoding", "decode", "decode_")
        captured = f"{name}, captured"
        replay_ratio = ratio(captured, "dense, captured", "captured") if captured in seconds else {}
        out.append({"what": name, **ratio(name, "dense", "x dense"), **step_ratio, **replay_ratio, "cache": cache})
    return out


def replays(one: tuple[Tensor, ...], cache: list[Tensor], at: int, scale: float) -> Callable[[], None]:
    """Attention of a captured step for one token at a position, REPLAYS times."""
    out, position = torch.empty(1, 1, one[0].shape[1], one[2].shape[3]), torch.tensor([[at]])
    given = [t.contiguous() for t in one]
    attention = Attention(*given, cache, position, scale=scale, window=0, cap=0.0, sinks=None, out=out)
    program = team.program(attention.rows * REPLAYS)
    kept = given, cache, position, out, attention
    return lambda: team.run(program) if kept else None


def attend(
    strand: Strand, qkv: tuple[Tensor, Tensor, Tensor], x: Tensor, selection: Selection | None, scale: float
) -> Tensor:
    """By the layer's states, which `selection` is among, if all heads read together; else by the head's own keys."""
    q, k, v = qkv
    queries = strand.queries(q.shape[1] // k.shape[1])
    by_states = len(strand.heads) == k.shape[1]
    states, known = (x, selection) if by_states else (None, None)
    return strand.attend(q[0, queries], k[0, strand.heads], v[0, strand.heads], states, known, scale)


def of(what: str, key: str) -> Callable[[Row], float]:
    """A figure in the row of a length."""
    return lambda r: float(r[what][key])


def prefill(what: str) -> Callable[[Row], float]:
    """Against dense, with the selection that it needs: of states by cascade; by-head attention chooses by itself."""
    return lambda r: float(r[what]["x dense"] + (r["cascade"]["x dense"] if what.startswith("windowed") else 0))


def cell(value: Callable[[Row], float]) -> Callable[[Row], str]:
    return lambda r: f"{value(r):.2f}"


def pays_from(rows: list[Row], ratio: Callable[[Row], float]) -> str:
    """The least length from which on it is below 1."""
    slow = max((r["length"] for r in rows if ratio(r) >= 1), default=0)
    fast = [r["length"] for r in rows if r["length"] > slow]
    return f"from {min(fast)}" if fast else f"not up to {rows[-1]['length']}"


LENGTH: Columns = {"T": lambda r: str(r["length"])}
CHOOSING: Columns = {
    "r/T": cell(of("select", "r")),
    "anew": cell(of("select", "x dense")),
    "cascade": cell(of("cascade", "x dense")),
}


def section(content: Content) -> str:
    """One device: prefill, decoding and the cache, as multiples of dense attention's."""
    settings, lengths = content["settings"], dict.fromkeys(r["length"] for r in content["results"])
    rows = [{"length": T, **{r["what"]: r for r in content["results"] if r["length"] == T}} for T in lengths]
    kinds = [what for what in rows[0] if what not in ("length", "select", "cascade")]
    reading = {what: cell(prefill(what)) for what in kinds}
    steps = {f"{what}: step": cell(of(what, "decode")) for what in kinds}
    steps |= {f"{what}: captured": cell(of(what, "captured")) for what in kinds if "captured" in rows[0][what]}
    caches = {f"{what}: cache": cell(of(what, "cache")) for what in kinds}
    pays = "\n".join(
        f"- {what}: prefill {pays_from(rows, prefill(what))}, decoding {pays_from(rows, of(what, 'decode'))}"
        for what in kinds
    )
    return f"""## Speed with fewer keys ({place(content)})

One layer (number {settings["layer"]}) of SmolLM2-135M on real text of T tokens; medians of
{settings["repeats"]} in turn, as multiples of `scaled_dot_product_attention` of the same queries. *anew* and
*cascade*: choosing representatives of states, alone. The others: attention with all that it needs to choose (windowed:
by cascade). {source(content)}

{table(rows, LENGTH, CHOOSING, reading)}

One new token, and bytes of the cache, likewise. *captured*: attention of a captured step, against a dense one's.

{table(rows, LENGTH, steps, caches)}

Faster than dense attention from which T on, as far as measured:

{pays}
"""


if __name__ == "__main__":
    main()
