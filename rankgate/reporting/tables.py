"""Results as rows of text, once, for the terminal, the HTML report and the generated documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

from rankgate.conversion.convert import LayerReport
from rankgate.quantized import GROUP

HEADERS = (
    "method",
    "text",
    "ppl ratio",
    "top-1",
    "KL mean",
    "same text",
    "fire rate",
    "reads / dense",
    "bits / weight",
    "layers",
)
LAYER_HEADERS = ("layer", "m x n", "rank", "energy kept", "stays dense because")


def describe(method: Mapping[str, Any]) -> str:
    """'gsi k=0.25·n eps=0.05' from the recorded settings of a method."""
    words = [method["name"]]
    rank = method.get("rank")
    if method["name"] == "lrq":
        grid = f"{method['bits']} bits{'' if method['symmetric'] else ' asymmetric'}"
        size = method.get("group_size", GROUP)
        words += [grid] + [f"groups of {size}"] * (size != GROUP)
        words += [f"r={rank}", f"refine={method['refine']:g}"]
    elif method["name"] == "planned":
        words.append(f"{sum(setting is not None for setting in method['settings'].values())} groups")
    elif rank is not None:
        full = "n" if method["name"] == "gsi" else "min(m,n)"
        words.append(f"k={rank:g}·{full}" if isinstance(rank, float) else f"k={rank}")
    if method.get("energy") is not None:
        words.append(f"energy={method['energy']:g}")
    if method.get("eps") is not None:
        words.append(f"eps={method['eps']:g}")
    if method.get("keep") is not None:
        words.append(f"keep={method['keep']:g}")
    if method.get("basis") == "context":
        words.append("context basis")
    if method.get("allow_larger"):
        words.append("all layers")
    return " ".join(words)


def row(record: Mapping[str, Any]) -> tuple[str, ...]:
    """One result (`pipeline.Result.record`) under HEADERS."""
    calibrated = record["calibration_tokens"] > 0
    return (
        describe(record["method"]) + (" + head" if record.get("lm_head") else ""),
        "in-sample" if record["in_sample"] else "held-out" if calibrated else "uncalibrated",
        number(record["ppl_ratio"], 4),
        number(record["top1"], 4),
        number(record["kl_mean"], 4),
        "-" if record["identical_text"] is None else f"{record['identical_text']:.0%}",
        "-" if record["fire_rate"] is None else f"{record['fire_rate']:.1%}",
        f"{1 / record['read_speedup']:.3f}",
        f"{record['bits_per_weight']:.2f}",
        f"{record['layers_converted']} of {record['layers']}",
    )


def layer_rows(layers: Sequence[LayerReport], stacks: Collection[str]) -> list[tuple[str, ...]]:
    """What was done to linears, under LAYER_HEADERS: one row for each; and for each stack of experts, all together.

    stacks: names of the modules whose children are experts. Of these the rank is the least and the largest, the energy
    kept the mean and the least, and a reason why some stay dense comes with their number.
    """
    together: dict[str, list[LayerReport]] = {}
    for layer in layers:
        expert, _, leaf = layer.name.rpartition(".")
        stack = expert.rpartition(".")[0]
        together.setdefault(f"{stack}.*.{leaf}" if stack in stacks else layer.name, []).append(layer)
    return [_layer_row(name, members) for name, members in together.items()]


def _layer_row(name: str, members: list[LayerReport]) -> tuple[str, ...]:
    count, shape = len(members), f"{members[0].m} x {members[0].n}"
    ranks = [layer.rank for layer in members if layer.rank is not None]
    kept = [layer.kept for layer in members if layer.kept is not None]
    reasons = Counter(layer.reason for layer in members if layer.reason)
    return (
        name,
        shape if count == 1 else f"{count} of {shape}",
        "-".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else "-",
        (f"{fmean(kept):.4f}" + (f", least {min(kept):.4f}" if count > 1 else "")) if kept else "-",
        "; ".join(reason if times == count else f"{times}: {reason}" for reason, times in reasons.items()),
    )


def attended(attention: Mapping[str, Any]) -> str:
    """One sentence on the attention of a record."""
    if attention["heads"] is not None:
        how = "a window and a tolerance for each head"
    else:
        ways = [f"tau={attention['tau']:g}", "cascaded" if attention["cascade"] else "chosen anew in every layer"]
        if attention["rule"] == "windowed":
            ways.insert(1, f"the last {attention['window']} tokens and the first {attention['sinks']}")
        how = ", ".join(ways)
    return f"attention: {attention['rule']}, {how}; {attention['keys_read']:.1%} of the keys of dense attention read"


def verdict(records: Sequence[Mapping[str, Any]], loss: float = 0.01) -> str:
    """One sentence: the fewest reads among the rows that are not in-sample and lose at most `loss` in perplexity."""
    good = [r for r in records if not r["in_sample"] and r["ppl_ratio"] <= 1 + loss]
    if not good:
        return f"No setting stays within {loss:.0%} of the dense perplexity."
    best = max(good, key=lambda r: r["read_speedup"])
    return (
        f"Fewest reads within {loss:.0%} of the dense perplexity: {describe(best['method'])}, "
        f"{1 / best['read_speedup']:.2f} x dense" + (", which saves nothing." if best["read_speedup"] <= 1 else ".")
    )


def number(value: float, digits: int) -> str:
    """Fixed point, or scientific where that would only print digits."""
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.2g}"


def markdown(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, first column left, the rest right."""
    rule = [":--", *["--:"] * (len(headers) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headers, rule, *rows])
