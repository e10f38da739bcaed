"""What the verbs of the command line do: read their options, call the public functions, print. They import torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankgate.cli.inputs import calibrated, calibrated_for, opened, unfinished
from rankgate.cli.options import (
    calibration_text,
    chosen_attention,
    chosen_method,
    evaluation_text,
    method_was_given,
    settings_were_given,
)
from rankgate.common.terminal import return_freed_memory, say, show_table
from rankgate.errors import RankgateError

if TYPE_CHECKING:
    from rankgate.conversion.budget import Budget
    from rankgate.conversion.calibration import Stats
    from rankgate.conversion.plan import Plan
    from rankgate.hub.opening import Opened
    from rankgate.methods import Method


def finish(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps(record, allow_nan=False))


def demo(arguments: argparse.Namespace) -> None:
    from rankgate.cli.demo import demo

    finish(arguments, demo(arguments.output, say, show_table))


def analyze(arguments: argparse.Namespace) -> None:
    from rankgate.attention.attend import AttentionConfig
    from rankgate.attention.profile import profile
    from rankgate.common.files import check_writable
    from rankgate.reporting.analyze import activation_profiles, weight_spectra
    from rankgate.reporting.report import analysis_report
    from rankgate.reporting.spectra import profiles_table, spectra_summary
    from rankgate.reporting.tokens import SelectionView

    check_writable(arguments.output)
    model = opened(arguments)
    parts = {"held-out": model.windows(evaluation_text(arguments), arguments.tokens, arguments.context)}
    stats = calibrated(model, arguments, apart_from=parts["held-out"])
    if arguments.stats is None:
        same = model.windows(calibration_text(arguments), arguments.calibration_tokens, arguments.context)
        parts = {"in-sample": same[: len(parts["held-out"])], **parts}
    spectra = weight_spectra(model.model, progress=True)
    profiles = activation_profiles(model.model, stats, parts, progress=True)
    show_table(*spectra_summary(spectra))
    print()
    show_table(*profiles_table(profiles))
    facts = {
        "model": model.name,
        "calibration": f"{stats.tokens:,} tokens of {stats.text}",
        "held out": f"{parts['held-out'].numel():,} tokens of {evaluation_text(arguments)}",
        "context": f"{arguments.context} tokens",
    }
    selection = None
    if arguments.tokens_selection:
        layers = profile(model.model, parts["held-out"], AttentionConfig(tau=arguments.tau), progress=True)
        selection = SelectionView(arguments.tau, layers, model.tokenizer.batch_decode(parts["held-out"][0][:, None]))
        print()
        show_table(*selection.table)
        print(selection.summary)
    say(f"wrote {analysis_report(facts, spectra, profiles, selection).write(arguments.output)}")
    weights = [{"name": s.name, "shape": [s.m, s.n], "ranks": s.ranks} for s in spectra]
    inputs = [
        {"name": p.name, "n": p.n, "effective_rank": p.effective_rank, "residual_quantiles": p.residuals}
        for p in profiles
    ]
    record = {"model": model.name, "weights": weights, "inputs": inputs}
    finish(arguments, record if selection is None else {**record, "tokens_selection": selection.record()})


def convert(arguments: argparse.Namespace) -> None:
    from rankgate.common.files import atomic_path
    from rankgate.conversion.budget import Budget
    from rankgate.conversion.convert import convert_
    from rankgate.conversion.plan import load_settings
    from rankgate.experts import experts_of
    from rankgate.hub import checkpoint
    from rankgate.reporting.pipeline import provenance
    from rankgate.reporting.tables import LAYER_HEADERS, layer_rows

    if arguments.budget or arguments.plan:
        if settings_were_given(arguments) or (arguments.budget and arguments.plan):
            raise RankgateError("--budget and --plan choose the method; leave out its options, and one of the two")
        method: Method | None = load_settings(arguments.plan) if arguments.plan else None
    else:
        method = chosen_method(arguments)
    budget = Budget.parse(arguments.budget) if arguments.budget else None
    if budget is not None:
        if arguments.device not in {None, "cpu"}:
            raise RankgateError("plans are timed on the CPU; leave out --device")
        arguments.device = "cpu"
    plan = None
    with atomic_path(arguments.output) as temporary:
        model = opened(arguments)
        with unfinished(method, model, arguments) as kept:
            stats = calibrated_for(method, model, arguments, kept=kept)
            origin = provenance(model, stats)
            if budget is not None:
                assert stats is not None
                plan = make_plan(model, stats, budget, arguments)
                method = plan.method()
            assert method is not None
            return_freed_memory()
            layers = convert_(
                model.model, method, stats, lm_head=arguments.lm_head, consume=True, progress=True, kept=kept
            )
            checkpoint.Checkpoint(model.model, model.tokenizer, method, layers, origin).save(temporary)
        if plan is not None:
            plan.save(temporary / "plan.json")
    dense = [layer for layer in layers if layer.reason]
    show_table(LAYER_HEADERS, layer_rows(layers, experts_of(model.model)))
    share = 1 - sum(layer.m * layer.n for layer in dense) / sum(layer.m * layer.n for layer in layers)
    count = f"{len(layers) - len(dense)} of {len(layers)} layers"
    print(f"{count} converted, {share:.0%} of the weights that a token can read, written to {arguments.output}")
    record = {"output": arguments.output, "layers": len(layers), "converted": len(layers) - len(dense), "share": share}
    if plan is not None:
        show_plan(plan)
        record |= {
            "budget": str(plan.budget),
            "predicted": plan.predicted,
            "measured": {text: dataclasses.asdict(found) for text, found in plan.measured.items()},
        }
    finish(arguments, record)


def make_plan(model: Opened, stats: Stats, budget: Budget, arguments: argparse.Namespace) -> Plan:
    """Plan within `budget`, checked on what follows the calibration tokens in their text and on other kinds of text."""
    from rankgate.conversion.plan import VERIFY_TOKENS, Planner
    from rankgate.conversion.windows import overlap
    from rankgate.hub.texts import KINDS
    from rankgate.reporting.pipeline import check_text

    own, context = calibration_text(arguments), arguments.context
    whole = model.windows(own, stats.tokens + max(VERIFY_TOKENS, context), context)
    windows = {own: whole[stats.tokens // context :]}
    check_text(windows[own], stats.hashes, allow=False)
    for kind in KINDS:
        other = model.windows(f"{kind}:held-out", VERIFY_TOKENS, min(context, VERIFY_TOKENS))
        if not overlap(other, stats.hashes):
            windows[f"{kind}:held-out"] = other
    say(f"planning within {budget}, checked on {VERIFY_TOKENS:,} held-out tokens each of {', '.join(windows)}")
    return Planner(model.model, stats, windows, lm_head=arguments.lm_head, progress=True).plan(budget)


def show_plan(plan: Plan) -> None:
    from rankgate.conversion.plan import CHECKED, HEADERS, checked, table

    show_table(HEADERS, table(plan))
    print(f"\nwithin {plan.budget}, linear layers {plan.predicted['speedup']:.2f} x faster:")
    show_table(CHECKED, checked(plan))


def export(arguments: argparse.Namespace) -> None:
    from rankgate.hub.export.exports import export

    say(f"loading {arguments.directory}")
    written = export(
        arguments.directory,
        Path(arguments.output),
        arguments.format,
        lora=arguments.lora,
        template=arguments.template,
    )
    for line in written.lines():
        print(line)
    finish(arguments, dataclasses.asdict(written))


def evaluate(arguments: argparse.Namespace) -> None:
    from rankgate.common.copies import twin
    from rankgate.hub.checkpoint import is_checkpoint
    from rankgate.reporting.pipeline import Reference, attention_config, measure_checkpoint
    from rankgate.reporting.tables import HEADERS, attended, row

    settings = chosen_attention(arguments)
    if arguments.tasks:
        if settings:
            raise RankgateError("tasks are run with the model's own attention; leave out --attention")
        evaluate_tasks(arguments)
        return
    if arguments.tasks_path or arguments.limit:
        raise RankgateError("--tasks-path and --limit belong to --tasks")
    if is_checkpoint(arguments.model):
        if method_was_given(arguments):
            raise RankgateError(f"{arguments.model} is converted already; leave out the options of the method")
        say(f"loading {arguments.model} and its dense model")
        result = measure_checkpoint(
            arguments.model,
            arguments.text,
            arguments.tokens,
            arguments.context,
            dense=arguments.dense,
            prompts=arguments.prompts,
            attention=settings,
            in_sample=arguments.in_sample,
            device=arguments.device,
            progress=True,
        )
    else:
        method = chosen_method(arguments) if method_was_given(arguments) else None
        model = opened(arguments)
        windows = model.windows(evaluation_text(arguments), arguments.tokens, arguments.context)
        apart_from = None if arguments.in_sample else windows
        stats = None if method is None else calibrated_for(method, model, arguments, apart_from)
        text, in_sample = calibration_text(arguments), arguments.in_sample
        attention = attention_config(model, settings, text, windows, in_sample=in_sample, progress=True)
        reference = Reference.of(model, windows, arguments.prompts)
        if method is None:
            if attention is None:
                say("no --method given: comparing the dense model with itself")
            result = reference.compare(twin(model.model), attention=attention, progress=True)
        else:
            result = reference.measure(
                method, stats, lm_head=arguments.lm_head, attention=attention, in_sample=in_sample, progress=True
            )
    record = result.record()
    show_table(HEADERS, [row(record)])
    e = result.evaluation
    print(
        f"perplexity {e.ppl_dense:.3f} dense, {e.ppl:.3f} converted, {e.scored:,} predictions in fixed windows of "
        f"{e.context} tokens, each begun as the tokenizer begins a text; reads are modelled from stored bytes and the "
        "measured fire rate"
    )
    if record["attention"]:
        print(attended(record["attention"]))
    finish(arguments, {"model": arguments.model, **record})


def evaluate_tasks(arguments: argparse.Namespace) -> None:
    """A dense model, a converted directory, or with a method a dense model converted in memory."""
    from rankgate.conversion.convert import convert_
    from rankgate.hub.opening import open_any
    from rankgate.hub.tasks import HEADERS, run_tasks

    method = chosen_method(arguments) if method_was_given(arguments) else None
    if method is None:
        say(f"loading {arguments.model}")
        model = open_any(arguments.model, arguments.device)
    else:
        model = opened(arguments)
        stats = calibrated_for(method, model, arguments)
        convert_(model.model, method, stats, lm_head=arguments.lm_head, consume=True, progress=True)
    say(f"running {arguments.tasks}")
    scores = run_tasks(model, arguments.tasks.split(","), folder=arguments.tasks_path, limit=arguments.limit)
    show_table(HEADERS, [score.row for score in scores])
    record = {"model": arguments.model, "method": method.record() if method else None}
    finish(arguments, {**record, "tasks": [dataclasses.asdict(score) for score in scores]})


def bench(arguments: argparse.Namespace) -> None:
    from rankgate.decoding.exact import describe
    from rankgate.hub import checkpoint
    from rankgate.reporting.bench import HEADERS, bench, subjects_for, table

    converted = [name for name in arguments.models if checkpoint.is_checkpoint(name)]
    against = arguments.against or (checkpoint.source_of(converted[0]) if converted else arguments.models[0])
    models = [name for name in arguments.models if name != against or len(arguments.models) == 1]
    if arguments.exact and (dense := [name for name in models if name not in converted]):
        raise RankgateError(f"--exact takes converted models; {dense[0]} is none")
    report = bench(
        subjects_for(models, against, torchao=arguments.torchao, exact=arguments.exact, gguf=arguments.against_gguf),
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.n,
        rounds=arguments.rounds,
        long_prompt=arguments.long_prompt,
        progress=True,
    )
    show_table(HEADERS, table(report))
    print(
        f"batch 1, {arguments.prompt_tokens} prompt and {arguments.n} new tokens, medians of {arguments.rounds} rounds "
        f"in turn, {report['threads']} threads; a plain copy moves {report['copy_bytes_per_s'] / 1e9:.1f} GB/s; bytes "
        "are modelled from stored sizes and measured gates"
    )
    for row in report["rows"]:
        if row["loop"] == "exact":
            print(f"{row['name']}: {describe(row['exact'])}")
    finish(arguments, report)


def generate(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import TextStreamer

    from rankgate.decoding.exact import describe, exact_generate
    from rankgate.decoding.loop import ONE_GREEDY, fast_generate
    from rankgate.hub.opening import open_any, open_pair

    if arguments.dense and not arguments.exact:
        raise RankgateError("--dense belongs to --exact")
    say(f"loading {arguments.model}")
    if arguments.exact:
        model, converted = open_pair(arguments.model, arguments.device, dense=arguments.dense)
    else:
        model = open_any(arguments.model, arguments.device)
    tokenizer = model.tokenizer
    prompt = tokenizer(arguments.prompt, return_tensors="pt").input_ids.to(model.model.device)
    if prompt.shape[1] == 0:
        raise RankgateError("the prompt is empty; write the beginning of a text")
    if model.positions is not None and prompt.shape[1] + arguments.n > model.positions:
        whole = f"{prompt.shape[1]} tokens of prompt and {arguments.n} new ones"
        raise RankgateError(f"{whole} are more than the {model.positions} positions of {model.name}; lower -n")
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": arguments.n,
        **ONE_GREEDY,
        "streamer": None if arguments.json else TextStreamer(tokenizer, skip_special_tokens=True),
        "pad_token_id": tokenizer.pad_token_id or 0,
    }
    record: dict[str, Any] = {"prompt": arguments.prompt}
    if arguments.exact:
        out, statistics = exact_generate(model.model, converted.model, prompt, **options)
        record |= {"exact": statistics.record()}
    else:
        out = fast_generate(model.model, prompt, **options)
    new = out[0, prompt.shape[1] :]
    record |= {"text": tokenizer.decode(new, skip_special_tokens=True), "new_tokens": len(new)}
    if arguments.exact:
        print(describe(record["exact"]))
    finish(arguments, record)


def chat(arguments: argparse.Namespace) -> None:
    from rankgate.hub.opening import open_any
    from rankgate.serving.answer import Sampling
    from rankgate.serving.chat import chat

    say(f"loading {arguments.model}")
    model = open_any(arguments.model, arguments.device)
    chat(model, arguments.system, Sampling(arguments.n, arguments.temperature))


def serve(arguments: argparse.Namespace) -> None:
    try:
        from rankgate.serving.serve import Limits, Server, listen, read_key
    except ModuleNotFoundError as error:
        raise RankgateError(f"serving needs {error.name}: pip install 'rankgate[serve]'") from error
    from rankgate.hub.opening import open_any
    from rankgate.serving.answer import context_length

    key = read_key(arguments.api_key_file)
    with listen(arguments.host, arguments.port) as listener:
        say(f"loading {arguments.model}")
        model = open_any(arguments.model, arguments.device)
        context = context_length(model, arguments.context)
        bounds = arguments.max_body, arguments.parallel, arguments.max_queue, arguments.timeout, arguments.grace
        limits = Limits(context, *bounds)
        Server(model, limits, key).run(listener)
