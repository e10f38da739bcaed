"""What works with which architecture: results/architectures/cpu.json, h100.json.

    python benchmarks/architectures.py [--device cuda] [NAME ...]

Tiny models with random weights (`configurations`), dense and as int8. Convert: the share of its matrices that was
converted, embeddings apart. Fast loop: whether a step of it is captured, and whether greedy text is that of
generate(); a token may be another one where the model itself sees a tie, to 1 % of the largest logit. Attention:
whether keys can be selected. Stored: logits after saving and loading. What is refused says why. Two minutes.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator

import torch
import transformers
from configurations import CONFIGURATIONS, LENGTH, VOCABULARY, tiny
from frame import Columns, Content, Row, card, device_name, parser, place, record, source, start, table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankgate import AttentionConfig, Int8Config, RankgateError, convert_, select_tokens_, twin
from rankgate.decoding import decode
from rankgate.decoding.steps import captured

PROMPT, NEW, TIE = 14, 30, 1e-2


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default="cpu")
    options.add_argument("names", nargs="*", metavar="NAME", help="of these first, then of all others")
    arguments = start(options)
    settings = {"device": card(arguments.device), "prompt": PROMPT, "new_tokens": NEW, "length": LENGTH}
    warnings.simplefilter("ignore")
    record(f"architectures/{device_name(arguments.device)}", settings, measured(arguments.device, arguments.names))


def measured(device: str, first: list[str]) -> Iterator[Row]:
    for name in dict.fromkeys([*first, *CONFIGURATIONS]):
        if not hasattr(transformers, f"{CONFIGURATIONS[name][0]}Config"):
            continue  # newer than this version
        dense = tiny(name).to(device)
        converted = twin(dense)
        reports = convert_(converted, Int8Config())
        matrices = [r for r in reports if r.name != "lm_head"]
        share = sum(r.m * r.n for r in matrices if not r.reason) / sum(r.m * r.n for r in matrices)
        yield {
            "model": name,
            "converted": share,
            "dense": fast(dense),
            "int8": fast(converted),
            "attention": selected(dense),
            "stored": stored(converted),
        }


def prompt(model: PreTrainedModel) -> Tensor:
    return torch.randint(4, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)


def fast(model: PreTrainedModel) -> str:
    """That a step was captured, or why the loop left the text to the model; "wrong" if the text is another one."""
    ids = prompt(model)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 1, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        expected, got = model.generate(ids, **options), model.generate(ids, custom_generate=decode, **options)
    if not same(model, expected, got):
        return "wrong"
    if captured(model) is not None:
        return "captured"
    return next(str(w.message).partition("fast path: ")[2] for w in told if "fast path" in str(w.message))


@torch.no_grad()
def same(model: PreTrainedModel, expected: Tensor, got: Tensor) -> bool:
    """Whether two texts are, up to a token that is as likely as the other."""
    other = (expected != got)[0].nonzero()
    if not len(other):
        return True
    at = int(other[0])
    logits = model(expected[:, :at]).logits[0, -1]
    return bool((logits[expected[0, at]] - logits[got[0, at]]).abs() <= TIE * logits.abs().max())


@torch.no_grad()
def selected(model: PreTrainedModel) -> str:
    """Whether attention by our rule, with a window that holds all keys, is the model's own; or why it is refused."""
    ids = prompt(model)
    expected = model(ids).logits
    try:
        handle = select_tokens_(model, AttentionConfig(window=LENGTH))
        got = model(ids).logits
        handle.remove()
    except RankgateError as error:
        return str(error)
    return "works" if torch.allclose(expected, got, rtol=1e-3, atol=1e-3) else "wrong"


@torch.no_grad()
def stored(model: PreTrainedModel) -> str:
    """Whether a model that was saved and loaded gives the same logits."""
    ids = prompt(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).to(model.device)
    return "same" if torch.equal(loaded(ids).logits, model(ids).logits) else "other"


def section(content: Content) -> str:
    rows = content["results"]
    steps = [kind for row in rows for kind in (row["dense"], row["int8"])]
    columns: Columns = {
        "model": lambda r: r["model"],
        "converted": lambda r: f"{r['converted']:.0%}",
        "fast loop, dense": lambda r: r["dense"],
        "fast loop, int8": lambda r: r["int8"],
        "attention": lambda r: r["attention"],
        "stored": lambda r: r["stored"],
    }
    return f"""## Architectures ({place(content)})

Tiny models with random weights, float32: {len(rows)} configurations, of which steps are captured of
{sum(r["dense"] == "captured" for r in rows)} as they are and of {sum(r["int8"] == "captured" for r in rows)} converted;
{steps.count("wrong")} wrong. Converted: of all matrices but embeddings. {source(content)}

{table(rows, columns)}
"""


if __name__ == "__main__":
    main()
