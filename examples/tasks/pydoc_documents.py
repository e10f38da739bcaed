"""The documents of the task: paragraphs of a few hundred characters."""

from datasets import Dataset

from rankgate.hub.texts import load_text

LENGTHS = range(200, 1000)  # characters


def load(**_):
    paragraphs = (paragraph.strip() for paragraph in load_text("pydoc:held-out").split("\n\n"))
    return {"test": Dataset.from_list([{"text": text} for text in paragraphs if len(text) in LENGTHS])}
