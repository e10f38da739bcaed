"""The options that several verbs share; of a method one per setting, for every method that has it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rankgate.errors import RankgateError

if TYPE_CHECKING:
    from rankgate.methods import Method

DEFAULT = "lrq"
NAMES = ("gsi", "svd", "asvd", "lrq", "int8", "int4", "sparse")
SETTINGS = ("rank", "eps", "energy", "basis", "bits", "refine", "symmetric", "group_size", "keep", "allow_larger")
ATTENTION = ("tau", "window", "cascade", "stride", "keys")
UNLESS_GIVEN: dict[str, dict[str, Any]] = {"svd": {"energy": 0.9}, "asvd": {"rank": 0.5}}  # where one of two is needed


def add_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method (evaluate without any of these: the dense model against itself)")
    group.add_argument("--method", choices=NAMES, help=f"how to convert (default: {DEFAULT})")
    group.add_argument(
        "--rank",
        type=rank,
        metavar="INT_OR_FRACTION",
        help="k, or a share of full rank; lrq: the mean over groups (default: gsi 0.25, asvd 0.5, lrq 16)",
    )
    group.add_argument("--eps", type=float, metavar="FLOAT", help="gsi: tolerance of the gate (default: 0.05)")
    group.add_argument(
        "--energy", type=float, metavar="FLOAT", help="svd, asvd: share of energy to keep (default: svd 0.9)"
    )
    group.add_argument("--basis", choices=("calibrated", "context"), help="gsi: where the subspace comes from")
    group.add_argument("--bits", type=int, metavar="4|8", help="lrq: of the weights that are always read (default: 4)")
    group.add_argument(
        "--refine", type=float, metavar="SHARE", help="lrq: channels whose refinement is read (default: 0.05)"
    )
    group.add_argument(
        "--asymmetric", dest="symmetric", action="store_const", const=False, help="lrq: a zero point beside each scale"
    )
    group.add_argument("--group-size", type=int, metavar="32|64", help="lrq: inputs that share a scale (default: 64)")
    group.add_argument("--keep", type=float, metavar="SHARE", help="sparse: channels that are read (default: 0.5)")
    group.add_argument(
        "--allow-larger",
        action="store_const",
        const=True,
        help="gsi, svd, asvd: convert layers that do not get smaller, too",
    )
    group.add_argument("--lm-head", action="store_true", help="also convert the output embedding, to int8")


def add_attention(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("attention to fewer keys (also of a converted model)")
    group.add_argument(
        "--attention",
        choices=("paper", "windowed"),
        help="paper: among representative tokens; windowed: to representatives, and exactly to recent tokens",
    )
    group.add_argument("--tau", type=float, metavar="FLOAT", help="tolerance of a representative (default: 0.3)")
    group.add_argument("--window", type=positive, metavar="N", help="windowed: recent tokens read (default: 128)")
    group.add_argument("--cascade", action="store_const", const=True, help="inherit and repair from layer to layer")
    group.add_argument("--stride", type=positive, metavar="N", help="layers between repairs (default: 1)")
    group.add_argument(
        "--keys", type=float, metavar="SHARE", help="windowed: choose for every head, to read this share of the keys"
    )


def add_tasks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tasks of lm-evaluation-harness, instead of a comparison on text")
    group.add_argument("--tasks", metavar="NAME[,NAME]", help="run these (extra `eval`)")
    group.add_argument("--tasks-path", metavar="DIR", help="folder with tasks of your own (YAML)")
    group.add_argument("--limit", type=positive, metavar="N", help="documents of each task (default: all)")


def add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens-selection", action="store_true", help="also which tokens stand for the others")
    parser.add_argument("--tau", type=float, default=0.3, metavar="FLOAT", help="its tolerance (default: 0.3)")


def chosen_attention(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The settings of `AttentionConfig` and of `choose_heads` that the options give; None without --attention."""
    given = {name: value for name in ATTENTION if (value := getattr(arguments, name)) is not None}
    if arguments.attention is None:
        if given:
            raise RankgateError(f"--{next(iter(given))} belongs to --attention; add --attention windowed")
        return None
    if "keys" in given and (given.keys() - {"keys"} or arguments.attention == "paper"):
        raise RankgateError(
            "--keys chooses windows and tolerances for every head; use it with --attention windowed alone"
        )
    if arguments.attention == "paper" and "window" in given:
        raise RankgateError("--window belongs to --attention windowed; paper has none")
    if "stride" in given and "cascade" not in given:
        raise RankgateError("--stride belongs to --cascade")
    return {"rule": arguments.attention, **given}


def add_calibration(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("texts: a UTF-8 file, hf:ORG/NAME[:CONFIG[:SPLIT]] or what comes with Rankgate")
    group.add_argument("--calibration-text", metavar="FILE", help="default: mixed:calibration")
    group.add_argument("--calibration-tokens", type=positive, default=8192, metavar="N", help="default: 8192")
    group.add_argument("--context", type=positive, default=512, metavar="N", help="tokens in a window (default: 512)")
    group.add_argument("--stats", metavar="FILE", help="reuse calibration statistics, or keep them here")
    return group


def add_texts(parser: argparse.ArgumentParser, tokens: int) -> None:
    group = add_calibration(parser)
    group.add_argument("--text", metavar="FILE", help="text to evaluate on (default: mixed:held-out)")
    group.add_argument("--tokens", type=positive, default=tokens, metavar="N", help=f"default: {tokens}")


def calibration_text(arguments: argparse.Namespace) -> str:
    from rankgate.hub.texts import CALIBRATION

    return arguments.calibration_text or CALIBRATION


def evaluation_text(arguments: argparse.Namespace) -> str:
    from rankgate.hub.texts import HELD_OUT

    in_sample = getattr(arguments, "in_sample", False)
    return arguments.text or (calibration_text(arguments) if in_sample else HELD_OUT)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number ≥ 0")
    return int(text)


def positive(text: str) -> int:
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("0 is too few")
    return int(text)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:1 (default: cuda where there is one)")


def add_exact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exact", action="store_true", help="the dense model's text: the converted DIR only drafts")
    parser.add_argument("--dense", metavar="MODEL", help="dense model for --exact (default: as recorded in DIR)")


def add_subjects(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL_OR_DIR")
    parser.add_argument("--against", metavar="MODEL", help="dense model to compare with (default: as recorded in DIR)")
    parser.add_argument("--exact", action="store_true", help="also each DIR as a draft that its dense model verifies")
    parser.add_argument("--torchao", action="store_true", help="also torchao int8 and int4, eager and compiled")
    parser.add_argument(
        "--against-gguf",
        nargs="+",
        default=[],
        metavar="FILE",
        help="also llama.cpp with these files of the same model, and quality beside speed (needs llama-cpp-python)",
    )


def add_serving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=natural, default=8000, help="0: a free one (default: 8000)")
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="the key that requests must bring (default: in RANKGATE_API_KEY, or none)",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--context", type=positive, metavar="N", help="tokens of prompt and answer (default: what the model has)"
    )
    group.add_argument(
        "--max-body", type=positive, default=1 << 20, metavar="BYTES", help="of a request (default: 1 MiB)"
    )
    group.add_argument("--parallel", type=positive, default=16, metavar="N", help="answers at once (default: 16)")
    group.add_argument("--max-queue", type=natural, default=64, metavar="N", help="requests that wait (default: 64)")
    group.add_argument(
        "--timeout", type=positive, default=300, metavar="SECONDS", help="of a request, waiting too (default: 300)"
    )
    group.add_argument(
        "--grace", type=positive, default=30, metavar="SECONDS", help="to finish in when told to stop (default: 30)"
    )


def temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2")
    return value


def rank(text: str) -> int | float:
    try:
        return float(text) if any(mark in text for mark in ".eE") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor a fraction such as 0.25") from None


def chosen_method(arguments: argparse.Namespace) -> Method:
    """The method that the options describe; an option of another method is an error, not ignored."""
    from rankgate.methods import METHODS

    name = arguments.method or DEFAULT
    settings = given(arguments)
    config: Any = METHODS[name]
    for key in settings:
        if key not in config.__dataclass_fields__:
            option = "asymmetric" if key == "symmetric" else key.replace("_", "-")
            raise RankgateError(f"--{option} does not belong to --method {name}")
    if not settings.keys() - {"allow_larger"}:
        settings |= UNLESS_GIVEN.get(name, {})
    method: Method = config(**settings)
    return method


def settings_were_given(arguments: argparse.Namespace) -> bool:
    return arguments.method is not None or bool(given(arguments))


def method_was_given(arguments: argparse.Namespace) -> bool:
    return settings_were_given(arguments) or arguments.lm_head


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings among the options, as far as they were given."""
    return {key: value for key in SETTINGS if (value := getattr(arguments, key)) is not None}
