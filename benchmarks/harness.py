"""The same perplexity from lm-evaluation-harness and from our own evaluation, on SmolLM2-135M: results/harness.json.

    python benchmarks/harness.py

Needs the extra `eval` and nothing else: the documents are paragraphs of Python's own language reference. Ten minutes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch
from frame import MODEL, ROOT, Columns, Content, Row, parser, record, source, start, table

from rankgate.common.copies import twin
from rankgate.conversion.calibration import calibrate
from rankgate.conversion.convert import convert_
from rankgate.conversion.evaluation import evaluate
from rankgate.hub.opening import Opened, open_dense
from rankgate.hub.tasks import run_tasks
from rankgate.hub.texts import CALIBRATION
from rankgate.methods import GSIConfig, Int4Config, LRQConfig
from rankgate.reporting.tables import describe

TASKS = ROOT / "examples" / "tasks"
CONTEXT, CALIBRATION_TOKENS, DOCUMENTS = 512, 4096, 100
METHODS = (None, Int4Config(), LRQConfig(rank=16, refine=0.05), GSIConfig(rank=0.25, eps=0.2))


def main() -> None:
    start(parser(__doc__))
    record("harness", {"model": MODEL, "documents": DOCUMENTS}, measured())


def measured() -> Iterator[Row]:
    sys.path.insert(0, str(TASKS))
    from pydoc_documents import load

    opened = open_dense(MODEL)
    texts = [row["text"] for row in load()["test"]][:DOCUMENTS]
    stats = calibrate(opened.model, opened.windows(CALIBRATION, CALIBRATION_TOKENS, CONTEXT), sensitivity=True)
    for method in METHODS:
        converted = Opened(opened.name, twin(opened.model), opened.tokenizer)
        if method is not None:
            convert_(converted.model, method, stats)
        scores = run_tasks(converted, ["pydoc"], folder=str(TASKS), limit=DOCUMENTS)
        yield {
            "method": None if method is None else method.record(),
            "harness": next(score.value for score in scores if score.metric == "byte_perplexity"),
            "ours": byte_perplexity(opened, converted, texts),
        }


def byte_perplexity(opened: Opened, converted: Opened, texts: list[str]) -> float:
    """Of all texts, each after the token that begins one."""
    loss = 0.0
    for text in texts:
        ids = opened.tokenizer(text, add_special_tokens=False).input_ids
        window = torch.tensor([[opened.tokenizer.bos_token_id, *ids]])
        found = evaluate(opened.model, converted.model, window)
        loss += found.loss * found.scored
    return math.exp(loss / sum(len(text.encode()) for text in texts))


COMPARED: Columns = {
    "method": lambda r: "dense" if r["method"] is None else describe(r["method"]),
    "lm-evaluation-harness": lambda r: f"{r['harness']:.6f}",
    "ours": lambda r: f"{r['ours']:.6f}",
    "relative difference": lambda r: f"{abs(r['harness'] / r['ours'] - 1):.1e}",
}


def section(content: Content) -> str:
    settings = content["settings"]
    return f"""## lm-evaluation-harness

Perplexity per byte of {settings["model"]} on {settings["documents"]} paragraphs of Python's language reference (task
`pydoc` in `examples/tasks`), by the harness and by our own evaluation of the same tokens. {source(content)}

{table(content["results"], COMPARED)}
"""


if __name__ == "__main__":
    main()
