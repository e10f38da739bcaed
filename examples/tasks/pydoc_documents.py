"""The documents of the task: paragraphs of a few hundred characters."""

from datasets import Dataset

from rankgate.hub.texts import HELD_OUT, load_text

LENGTHS = range(200, 1000)  # characters


def load(**_):
    paragraphs = (paragraph.strip() for paragraph in load_text(HELD_OUT).split("\n\n"))
    return {"test": Dataset.from_list([{"text": text} for text in paragraphs if len(text) in LENGTHS])}
