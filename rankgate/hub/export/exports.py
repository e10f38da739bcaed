"""`rankgate export`: a directory of a converted model, in the format of another engine."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rankgate.common.files import atomic_path
from rankgate.errors import RankgateError
from rankgate.hub import checkpoint, sources
from rankgate.hub.export import card, compressed, gguf
from rankgate.hub.export.lora import write as write_adapter


@dataclass(frozen=True)
class Exported:
    """What was written, where, and in which types: layers by the name of their type."""

    output: str
    adapter: str | None
    types: dict[str, int]
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """In words."""
        kinds = ", ".join(f"{count} layers as {kind}" for kind, count in self.types.items())
        adapter = [f"wrote {self.adapter}: the low rank"] if self.adapter else []
        return [f"wrote {self.output}: {kinds}", *adapter, *self.notes]


def export(directory: str, output: Path, form: str, *, lora: bool = False, template: str | None = None) -> Exported:
    """Write the converted model of `directory` as `output`, all or nothing.

    form: "compressed-tensors" (a directory) or "gguf" (a file, whose other tensors come from `template`, by default the
    file that the model was converted from). lora: the low rank as an adapter beside it, called like it with -lora.
    Raises RankgateError for what the format cannot carry, and says what to do.
    """
    if not checkpoint.is_checkpoint(directory):
        raise RankgateError(f"{directory} is not a converted model; give a directory that rankgate convert wrote")
    if template is not None and form != "gguf":
        raise RankgateError("--template belongs to --format gguf")
    if form == "gguf" and output.suffix.lower() != ".gguf":
        raise RankgateError(f"a GGUF file is called so: give -o {output}.gguf")
    converted = checkpoint.load(directory)
    beside = output.with_name(f"{output.stem}-lora{output.suffix}" if form == "gguf" else f"{output.name}-lora")
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(output))
        second = stack.enter_context(atomic_path(beside)) if lora else None
        if form == "gguf":
            written = gguf.write(converted.model, _template(converted, template), temporary, second)
            return Exported(str(output), str(beside) if lora else None, written.types, _notes(written))
        found = compressed.write(converted.model, converted.tokenizer, temporary, lora=lora)
        types = Counter(map(compressed.kind, found))
        adapter = (beside.name, write_adapter(found, output.name, second)) if second else None
        command = f"rankgate export {directory} -o {output} --format {form}{' --lora' if lora else ''}"
        readme = card.text(converted, types, command, output.name, adapter)
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        return Exported(str(output), str(beside) if lora else None, dict(types))


def _notes(written: gguf.Written) -> list[str]:
    if not written.inexact_scales:
        return []
    share = written.inexact_scales / written.groups
    return [f"{written.inexact_scales:,} scales of groups ({share:.2%}) are too small for float16 and were rounded"]


def _template(converted: checkpoint.Checkpoint, given: str | None) -> Path:
    """The GGUF file to copy the rest from."""
    if given is not None:
        if not Path(given).is_file():
            raise RankgateError(f"no file at {given}; give a GGUF file of the dense model")
        return Path(given)
    source = converted.provenance.source if converted.provenance else ""
    if source in sources.EMBEDDED:
        return sources.fetch_embedded(source)
    if source.lower().endswith(".gguf") and Path(source).is_file():
        return Path(source)
    raise RankgateError("the model was not converted from a GGUF file; give one of the dense model with --template")
