"""What SmolLM2-135M-Instruct writes, of several kinds: rankgate/hub/written.txt, part of the default calibration text.

    python benchmarks/write.py

It goes on with openings, sampled at a temperature of 0.9, 16 at once in the fast loop. Two minutes on two cores. Which
tokens come depends on the machine's arithmetic, so what it wrote once is kept. Six documents that nobody should have to
read were taken out by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from frame import MODEL, ROOT, SEED, parser, start

from rankgate.common.files import atomic_path
from rankgate.decoding import decode
from rankgate.hub.opening import open_dense

NEW_TOKENS, BATCH, TEMPERATURE = 512, 16, 0.9
ARTICLES = (
    "The lighthouse was built in",
    "The town lies on the river",
    "She was born in 1892, the daughter of",
    "The 2004 season was the club's",
    "The species is found in",
    "The battle began on the morning of",
    "The album was released in",
    "The film received mostly positive reviews from",
)
STORIES = (
    "It was late when they reached",
    "The house had been empty for",
    "The old man looked at the sea and",
    "He had never seen so much snow",
    "The letter came on a Tuesday",
    "Once upon a time there was a miller who",
    "Il était une fois",
    "Había una vez",
)
DIALOGUES = (
    '"Where have you been?" she asked.',
    '"I don\'t think we should go," said Tom.',
    "Customer: Good morning, I would like to return this.\nClerk:",
    "Teacher: What did you learn from the book?\nStudent:",
    "A: How was your weekend?\nB:",
    "User: My computer does not start. What can I do?\nAssistant:",
    "Q: What is your favourite food?\nA:",
    "Doctor: What seems to be the problem?\nPatient:",
)
OTHERS = (
    "Dear Anna,\n\nthank you for your letter.",
    "Things to bring:\n\n1.",
    "To: all staff\nSubject: meeting on Friday\n\n",
    "Ingredients:\n\n- 200 g flour\n- 3 eggs\n",
    "The following steps explain how to",
    "Review: I bought this kettle because",
    "| Country | Capital | Population |\n| --- | --- | --- |\n",
    "Question: A train travels 60 miles in an hour. How far",
)
KINDS = (ARTICLES, STORIES, DIALOGUES, OTHERS)


def main() -> None:
    start(parser(__doc__))
    openings = list(chain.from_iterable(zip(*(kind[i::2] for kind in KINDS for i in range(2)), strict=True)))
    with atomic_path(ROOT / "rankgate" / "hub" / "written.txt") as temporary:
        temporary.write_text("\f".join(written(openings)), encoding="utf-8")


def written(openings: list[str]) -> Iterator[str]:
    """Every opening with what the model goes on with."""
    opened = open_dense(MODEL)
    opened.tokenizer.padding_side = "left"
    torch.manual_seed(SEED)
    for first in range(0, len(openings), BATCH):
        prompts = opened.tokenizer(openings[first : first + BATCH], return_tensors="pt", padding=True)
        ids = opened.model.generate(
            **prompts,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            custom_generate=decode,
        )
        yield from opened.tokenizer.batch_decode(ids, skip_special_tokens=True)


if __name__ == "__main__":
    main()
