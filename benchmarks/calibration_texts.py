"""What the choice of the calibration text costs: results/calibration_texts.json.

    python benchmarks/calibration_texts.py ../shared/data/wikitext-2 CHATTERBOT [--device cuda] [--model PATH]

CHATTERBOT: the folder `chatterbot_corpus/data/english` of the wheel of that name (`pip download chatterbot-corpus`;
BSD licence), conversations that people wrote. The same settings of `lrq`, calibrated on the default text, on the one
before it, and on text of the same source as what is measured: WikiText-2 (valid, test), Python's library, these
conversations. An hour on two cores that do nothing else, five minutes on a GPU.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import yaml
from frame import MODEL, SEED, Columns, Content, Row, card, parser, record, source, start, table
from torch import Tensor

from rankgate.common.copies import twin
from rankgate.conversion.calibration import calibrate
from rankgate.conversion.convert import convert_
from rankgate.conversion.windows import token_windows
from rankgate.hub.opening import Opened, open_dense
from rankgate.hub.texts import CALIBRATION, load_text
from rankgate.methods import LRQConfig
from rankgate.reporting.pipeline import Reference
from rankgate.reporting.tables import describe

CONTEXT, CALIBRATION_TOKENS = 512, 8_192
METHODS = (LRQConfig(), LRQConfig(refine=0.0))
DEFAULTS = (CALIBRATION, "pydoc:calibration")
OWN = "the same source as"


def main() -> None:
    options = parser(__doc__, "folder", "--device", "--model")
    options.add_argument("conversations", type=Path)
    options.add_argument("--tokens", type=int, default=16_384, help="of each measured text")
    arguments = start(options)
    opened = open_dense(arguments.model)
    opened.model.to(arguments.device)
    tokens = arguments.tokens
    settings = {"model": MODEL, "calibration_tokens": CALIBRATION_TOKENS, "tokens": tokens, "context": CONTEXT}
    rows = measured(opened, arguments.folder, arguments.conversations, tokens)
    record("calibration_texts", {**settings, "device": card(arguments.device)}, rows)


def measured(opened: Opened, folder: Path, conversations: Path, tokens: int) -> Iterator[Row]:
    """Rows by calibration text, setting and measured text."""
    wiki = {part: (folder / f"{part}.txt").read_text(encoding="utf-8") for part in ("valid", "test")}
    spoken = dialogues(conversations)
    texts = {
        "WikiText-2": (wiki["valid"], wiki["test"]),
        "code": (load_text("code:calibration"), load_text("code:held-out")),
        "dialogue": spoken,
    }
    references = {name: Reference.of(opened, cut(opened, test, tokens), 0) for name, (_, test) in texts.items()}
    calibrations = {f"{OWN} {name}": (own, [name]) for name, (own, _) in texts.items()}
    calibrations |= {name: (load_text(name), list(texts)) for name in DEFAULTS}
    for calibration, (text, names) in calibrations.items():
        stats = calibrate(opened.model, cut(opened, text, CALIBRATION_TOKENS), sensitivity=True)
        for method in METHODS:
            model = twin(opened.model)
            convert_(model, method, stats)
            for name in names:
                figures = references[name].compare(model).record()
                kept = {key: figures[key] for key in ("kl_mean", "top1", "ppl_ratio", "bits_per_weight")}
                yield {"calibration": calibration, "method": method.record(), "text": name, **kept}


def cut(opened: Opened, text: str, tokens: int) -> Tensor:
    return token_windows(opened.tokenizer, text, tokens, CONTEXT)


def dialogues(folder: Path) -> tuple[str, str]:
    """The conversations dealt into two texts, in an order that mixes their subjects."""
    talks = [
        "\n".join(f"- {line}" for line in talk)
        for path in sorted(folder.glob("*.yml"))
        for talk in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    ]
    random.Random(SEED).shuffle(talks)
    return "\n\n".join(talks[::2]), "\n\n".join(talks[1::2])


def section(content: Content) -> str:
    settings, rows = content["settings"], content["results"]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    own = {(str(r["method"]), r["text"]): r["kl_mean"] for r in rows if r["calibration"] == f"{OWN} {r['text']}"}
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        calibration = "text of the same source" if row["calibration"].startswith(OWN) else row["calibration"]
        key = calibration, str(row["method"])
        line = found.setdefault(key, {"calibration": calibration, "method": row["method"]})
        ratio = row["kl_mean"] / own.get((key[1], row["text"]), math.nan)
        line[row["text"]] = f"{row['kl_mean']:.4f} (x {ratio:.2f}), {row['top1']:.3f}"
    columns: Columns = {
        "calibrated on": lambda r: r["calibration"],
        "setting": lambda r: describe(r["method"]),
        **{name: lambda r, name=name: r.get(name, "-") for name in texts},
    }
    return f"""## The calibration text

{settings["model"]}, calibrated on {settings["calibration_tokens"]:,} tokens, measured on {settings["tokens"]:,} of each
of three texts: KL (x that of calibrating on text of the same source), and top-1 agreement. Conversations: the package
chatterbot-corpus. {source(content)}

{table(sorted(found.values(), key=lambda r: str(r["method"])), columns)}
"""


if __name__ == "__main__":
    main()
