import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from rankgate.conversion.calibration import Stats
from rankgate.conversion.timing import Timer

SMALL = ("--context", "32", "--tokens", "96", "--calibration-tokens", "640", "--prompts", "2")
NEEDED = ("ppl_dense", "ppl", "ppl_ratio", "top1", "kl_mean", "fire_rate", "read_speedup", "bits_per_weight", "tokens")


def last(output: str) -> dict:
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "gsi", "--rank", "0.25", "--eps", "0.4"),
        ("--method", "gsi", "--basis", "context"),
        ("--method", "svd", "--energy", "0.8"),
        ("--method", "svd", "--rank", "8"),
        ("--method", "asvd", "--rank", "0.5"),
        ("--method", "asvd", "--energy", "0.95", "--allow-larger"),
        ("--method", "lrq", "--bits", "4", "--rank", "8", "--refine", "0.2", "--asymmetric"),
        ("--method", "lrq", "--bits", "8", "--rank", "0", "--refine", "0", "--lm-head"),
        ("--method", "int8"),
        ("--method", "int4", "--lm-head"),
        ("--method", "sparse", "--keep", "0.4"),
        (),
    ],
)
def test_evaluate_prints_a_table_and_json(run, model_dir, options):
    out = run("evaluate", model_dir, *options, *SMALL, "--json")
    record = last(out)
    assert all(key in record for key in NEEDED)
    assert record["tokens"] == 96 and record["scored"] == 93 and record["in_sample"] is False
    assert out.startswith("method")
    gated = {"gsi", "sparse"} & {*options} or "0.2" in options
    assert (record["fire_rate"] is not None) == bool(gated)
    assert record["lm_head"] == ("--lm-head" in options) == ("+ head" in out)
    assert (record["ppl_ratio"] == 1) == (not options)


def test_converted_directory_gives_the_same_figures(run, model_dir, tmp_path):
    method = ("--method", "gsi", "--rank", "0.25", "--eps", "0.4")
    direct = last(run("evaluate", model_dir, *method, *SMALL, "--json"))
    calibration = ("--context", "32", "--calibration-tokens", "640")
    printed = run("convert", model_dir, "-o", tmp_path / "out", *method, *calibration, "--json")
    assert "14 of 15 layers converted" in printed and "self_attn.q_proj" in printed
    assert last(printed)["converted"] == 14
    again = last(run("evaluate", tmp_path / "out", *SMALL, "--json"))
    assert {key: again[key] for key in NEEDED} == pytest.approx({key: direct[key] for key in NEEDED})
    text = last(run("generate", tmp_path / "out", "The ", "-n", "5", "--json"))
    assert text["new_tokens"] <= 5
    assert run("generate", model_dir, "The ", "-n", "5").startswith("The ")


def test_statistics_are_kept_and_reused(run, refuses, model_dir, tmp_path):
    options = ("evaluate", model_dir, "--method", "asvd", "--stats", tmp_path / "stats", *SMALL, "--json")
    first = last(run(*options))
    kept = Stats.load(tmp_path / "stats")
    assert kept.tokens == 640 and kept.text == "mixed:calibration"
    assert last(run(*options, "--calibration-text", "not/read")) == first
    assert "without output sensitivities" in refuses(*options[:3], "lrq", *options[4:])
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(other)
    assert "belong to another model" in refuses("evaluate", other, *options[2:])


def test_text_that_was_calibrated_on_is_refused_unless_marked(run, refuses, model_dir, tmp_path):
    same = ("--text", "mixed:calibration", *SMALL)
    assert "--in-sample" in refuses("evaluate", model_dir, "--method", "gsi", *same)
    out = run("evaluate", model_dir, "--method", "gsi", *SMALL, "--in-sample", "--json")
    assert last(out)["in_sample"] is True and "in-sample" in out
    held_out = ("--text", "mixed:held-out", *SMALL, "--in-sample", "--json")
    assert last(run("evaluate", model_dir, "--method", "gsi", *held_out))["in_sample"] is False
    assert last(run("evaluate", model_dir, "--method", "svd", *same, "--json"))["in_sample"] is False
    run("convert", model_dir, "-o", tmp_path / "out", *SMALL[:2], *SMALL[4:6])
    assert "--in-sample" in refuses("evaluate", tmp_path / "out", *same)
    assert last(run("evaluate", tmp_path / "out", *SMALL, "--in-sample", "--json"))["in_sample"] is True
    assert "--in-sample" not in refuses("analyze", model_dir, "-o", tmp_path / "r", "--text", "no-file")


@pytest.mark.parametrize("verb", ["generate", "evaluate", "analyze", "convert"])
def test_a_device_that_is_not_there_is_refused(refuses, model_dir, tmp_path, verb):
    rest = {"generate": ("The ",), "convert": ("-o", tmp_path / "out"), "analyze": ("-o", tmp_path / "out")}.get(
        verb, ()
    )
    assert "there is no cuda:99 here; use --device cpu" in refuses(verb, model_dir, *rest, "--device", "cuda:99")
    assert "use cpu, cuda or cuda:1" in refuses(verb, model_dir, *rest, "--device", "abacus")
    assert not (tmp_path / "out").exists()


def test_plans_are_made_on_the_cpu(refuses, model_dir, tmp_path):
    options = ("-o", tmp_path / "out", "--budget", "bits=5", "--device", "cuda")
    assert "leave out --device" in refuses("convert", model_dir, *options)


def test_budget_plans_and_the_plan_applies_again(run, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Timer, "_dense", lambda self, outputs, n: 1.0)
    monkeypatch.setattr(Timer, "_quantized", lambda self, m, n, s: (s.bits / 16, self._group(m, n, s, 0)[1]))
    calibration = ("--context", "64", "--calibration-tokens", "640", "--stats", tmp_path / "stats")
    out = run("convert", model_dir, "-o", tmp_path / "a", "--budget", "bits=9", "--lm-head", *calibration, "--json")
    record = last(out)
    texts = {"mixed:calibration", "written:held-out", "code:held-out", "pydoc:held-out"}
    assert record["predicted"]["bits"] <= 9 and record["measured"].keys() == texts
    assert all(found["bits"] <= 9 and found["scored"] == 2016 for found in record["measured"].values())
    assert "within bits=9, linear layers" in out and "int4" in out and "code:held-out" in out
    plan = tmp_path / "a" / "plan.json"
    run("convert", model_dir, "-o", tmp_path / "b", "--plan", plan, "--lm-head", *calibration)
    a, b = (last(run("evaluate", tmp_path / name, *SMALL, "--json")) for name in "ab")
    assert {key: a[key] for key in NEEDED} == {key: b[key] for key in NEEDED}


def test_bench_puts_models_side_by_side(run, model_dir, tmp_path):
    run("convert", model_dir, "-o", tmp_path / "out", "--method", "int8")
    out = run("bench", tmp_path / "out", "--prompt-tokens", "8", "-n", "4", "--rounds", "2", "--json")
    rows = {(row["model"], row["loop"]): row for row in last(out)["rows"]}
    assert len(rows) == 4  # dense models run in float32 and bfloat16, see below
    names = [row["name"] for row in last(out)["rows"]]
    assert len(names) == len(set(names)) == 6
    ours = rows[str(tmp_path / "out"), "decode"]
    for key in ("decode_tok_s", "decode_speedup", "prefill_tok_s", "bytes_per_token", "peak_memory_bytes"):
        assert ours[key] > 0
    assert max(row["decode_speedup"] for row in last(out)["rows"] if row["dense"]) == 1
    assert "x dense" in out and "a plain copy moves" in out


def test_analyze_writes_a_report(run, model_dir, tmp_path):
    out = run("analyze", model_dir, "-o", tmp_path / "report", *SMALL[:6], "--json")
    assert len(last(out)["weights"]) == 14 and len(last(out)["inputs"]) == 8
    assert "theoretical speedup" in out
    assert (tmp_path / "report" / "index.html").stat().st_size > 50_000


ATTENTION = {
    ("--attention", "paper", "--tau", "0.9"): "paper, tau=0.9",
    (
        "--attention",
        "windowed",
        "--window",
        "9",
        "--tau",
        "0.9",
        "--cascade",
    ): "the last 9 tokens and the first 4, cascaded",
    ("--attention", "windowed", "--keys", "0.95"): "a window and a tolerance for each head",
}


@pytest.mark.parametrize("options", ATTENTION, ids=" ".join)
def test_evaluate_with_fewer_keys(run, model_dir, tmp_path, options, monkeypatch):
    monkeypatch.setattr("rankgate.ops.attention.STEP", 16)  # texts are short
    context = ("--context", "100", "--tokens", "200", "--calibration-tokens", "640", "--prompts", "1")
    out = run("evaluate", model_dir, *options, *context, "--json")
    direct = last(out)["attention"]
    assert ATTENTION[options] in out
    assert 0 < direct["keys_read"] < 1
    assert last(run("evaluate", model_dir, *context, "--json"))["attention"] is None
    run("convert", model_dir, "-o", tmp_path / "out", "--method", "svd", "--energy", "0.5")
    again = last(run("evaluate", tmp_path / "out", *options, *context, "--json"))
    assert again["method"]["name"] == "svd" and 0 < again["attention"]["keys_read"] < 1


def test_analyze_shows_which_tokens_stand_for_others(run, model_dir, tmp_path):
    options = ("--tokens-selection", "--tau", "0.9", *SMALL[:6])
    out = run("analyze", model_dir, "-o", tmp_path / "report", *options, "--json")
    found = last(out)["tokens_selection"]
    assert len(found["layers"]) == 2 and found["tau"] == 0.9
    assert 0 < found["saved_full"] < 1 and "The cascade saves" in out
    assert (tmp_path / "report" / "tokens.png").exists()
    assert "Tokens that stand for others" in (tmp_path / "report" / "index.html").read_text()


def test_bad_input_is_one_line_and_exit_code_2(refuses, model_dir, tmp_path):
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9 " * 500)
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("short text")
    (tmp_path / "broken").write_bytes(b"nonsense")
    (tmp_path / "bad model").mkdir()
    for file in model_dir.iterdir():
        (tmp_path / "bad model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "bad model" / "model.safetensors").write_bytes(b"\xff" * 300)
    evaluate = ("evaluate", model_dir, *SMALL)
    gsi = (*evaluate, "--method", "gsi")
    convert = ("convert", model_dir, "-o", tmp_path / "out")
    (tmp_path / "no plan").write_text("{}")
    cases = {
        ("evaluate", "no/such/dir"): "no model at no/such/dir",
        ("evaluate", tmp_path): "no config.json",
        ("evaluate", tmp_path / "empty"): "is not a model",
        ("evaluate", tmp_path / "bad model", *SMALL): "cannot load",
        (*gsi, "--rank", "0"): "rank 0 is out of range",
        (*gsi, "--rank", "33"): "exceeds the 32 inputs",
        (*gsi, "--rank", "1.5"): "rank 1.5 is out of range",
        (*evaluate, "--rank", "many"): "neither a whole number nor a fraction",
        (*gsi, "--eps", "-0.1"): "eps -0.1 is out of range",
        (*evaluate, "--method", "svd", "--eps", "0.1"): "--eps does not belong to --method svd",
        (*evaluate, "--method", "svd", "--energy", "2"): "energy 2.0 is out of range",
        (*gsi, "--bits", "4"): "--bits does not belong to --method gsi",
        (*evaluate, "--method", "int8", "--asymmetric"): "--asymmetric does not belong to --method int8",
        (*evaluate, "--method", "int4", "--allow-larger"): "--allow-larger does not belong to --method int4",
        (*evaluate, "--method", "lrq", "--bits", "5"): "5 bits are not supported",
        (*evaluate, "--method", "lrq", "--rank", "-1"): "rank -1",
        (*evaluate, "--method", "lrq", "--rank", "0.5"): "lrq takes a whole number",
        (*evaluate, "--method", "lrq", "--refine", "2"): "refine 2.0 is out of range",
        (*evaluate, "--method", "sparse", "--keep", "0"): "keep 0.0 is out of range",
        (*evaluate, "--method", "int3"): "invalid choice",
        (*evaluate, "--text", tmp_path / "empty"): "is empty",
        (*evaluate, "--text", tmp_path / "short"): "short: the text has 10 tokens",
        (*evaluate, "--text", tmp_path / "latin"): "not UTF-8",
        (*evaluate, "--text", tmp_path / "none"): "no text file at",
        (*evaluate, "--text", "hf:no-org/no-set"): "no-org/no-set",
        (*evaluate, "--method", "gsi", "--stats", tmp_path / "broken"): "damaged or not a Rankgate statistics file",
        (*evaluate, "--method", "gsi", "--calibration-tokens", "32", "--rank", "1.0", "--allow-larger"): "too few",
        (*evaluate, "--context", "256", "--tokens", "256"): "longer than the 128 positions",
        (*evaluate, "--tokens", "0"): "argument --tokens",
        (*evaluate, "--attention", "dense"): "invalid choice",
        (*evaluate, "--tau", "0.3"): "--tau belongs to --attention",
        (*evaluate, "--attention", "windowed", "--tau", "2"): "tau 2.0 is out of range",
        (*evaluate, "--attention", "windowed", "--window", "0"): "0 is too few",
        (*evaluate, "--attention", "windowed", "--stride", "2"): "--stride belongs to --cascade",
        (*evaluate, "--attention", "windowed", "--keys", "0"): "keys 0.0 is out of range",
        (*evaluate, "--attention", "windowed", "--keys", "0.01"): "ask for",
        (*evaluate, "--attention", "windowed", "--keys", "0.9", "--tau", "0.1"): "--keys chooses",
        (*evaluate, "--attention", "paper", "--window", "5"): "paper has none",
        ("convert", model_dir, "-o", tmp_path / "empty" / "out"): "cannot write",
        ("convert", model_dir, "-o", tmp_path): "not empty",
        ("convert", "no/such/dir", "-o", tmp_path / "out"): "no model at",
        (
            "convert",
            model_dir,
            "-o",
            tmp_path / "out",
            *SMALL[:2],
            "--calibration-text",
            tmp_path / "short",
        ): "10 tokens",
        (*convert, "--budget", "ppl=0.9"): "budget ppl=0.9 is out of range",
        (*convert, "--budget", "speed"): "write ppl=1.01, top1=0.98 or bits=5",
        (*convert, "--budget", "bits=5", "--method", "int8"): "leave out its options",
        (*convert, "--budget", "bits=5", "--plan", tmp_path / "no plan"): "one of the two",
        (*convert, "--plan", tmp_path / "no plan"): "is not a plan",
        (*convert, "--plan", tmp_path / "nowhere"): "is not a plan",
        ("bench", "no/such/dir"): "no model at",
        ("bench", model_dir, "-n", "2"): "at least 3 new",
        ("bench", model_dir, "--prompt-tokens", "100"): "100 prompt and 128 new tokens",
        ("analyze", model_dir, "-o", tmp_path / "empty"): "cannot write",
        ("demo", "-o", tmp_path / "empty"): "cannot write",
        ("generate", model_dir, ""): "prompt is empty",
        ("generate", model_dir, "x", "-n", "0"): "argument -n",
        ("frobnicate",): "invalid choice",
        (): "arguments are required",
    }
    before = sorted(tmp_path.iterdir())
    for argv, message in cases.items():
        assert message in refuses(*argv), argv
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written


def test_a_converted_directory_needs_its_dense_model(run, refuses, model_dir, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_dir, source)
    run("convert", source, "-o", tmp_path / "out", "--method", "svd")
    assert "leave out the options" in refuses("evaluate", tmp_path / "out", "--method", "svd")
    assert "converted already" in refuses("convert", tmp_path / "out", "-o", tmp_path / "twice")
    tiny = tiny_model("gpt2")
    tiny.save_pretrained(tmp_path / "other")
    shutil.copy(model_dir / "tokenizer.json", tmp_path / "other")
    shutil.copy(model_dir / "tokenizer_config.json", tmp_path / "other")
    assert "--dense" in refuses("evaluate", tmp_path / "out", "--dense", tmp_path / "other", *SMALL)
    shutil.rmtree(source)
    assert "no model at" in refuses("evaluate", tmp_path / "out", *SMALL)
    run("evaluate", tmp_path / "out", "--dense", model_dir, *SMALL)


def test_help_does_not_import_torch():
    code = "import sys; sys.argv = ['rankgate', '--help']\nfrom rankgate.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'rich' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in ("demo", "analyze", "convert", "evaluate", "generate"))


def test_a_closed_pipe_is_not_an_error(model_dir):
    command = [sys.executable, "-m", "rankgate.cli", "convert", str(model_dir), "--method", "svd"]
    out = Path(os.environ.get("TMPDIR", "/tmp")) / f"rankgate-pipe-{os.getpid()}"
    process = subprocess.Popen([*command, "-o", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    shutil.rmtree(out, ignore_errors=True)
    assert process.wait() == 0 and "Traceback" not in errors


def test_generate_stays_within_the_positions_and_writes_one_text(run, refuses, model_dir, tmp_path):
    assert "more than the 128 positions" in refuses("generate", model_dir, "x" * 120, "-n", 20)
    model = tmp_path / "beams"
    shutil.copytree(model_dir, model)
    settings = json.loads((model / "generation_config.json").read_text())
    wishes = {**settings, "num_beams": 3, "return_dict_in_generate": True}
    (model / "generation_config.json").write_text(json.dumps(wishes))
    assert last(run("generate", model, "The keeper", "-n", 4, "--json"))["new_tokens"] <= 4
    run("generate", model, "The keeper", "-n", 4)


def test_what_a_terminal_cannot_show_is_replaced(model_dir):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    options = ("--method", "svd", "--rank", "0.5", "--allow-larger", *SMALL)
    command = [sys.executable, "-m", "rankgate.cli", "evaluate", str(model_dir), *options]
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"svd k=0.5?min(m,n)" in done.stdout
