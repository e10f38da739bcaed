"""Requests at once, to our server and to vLLM's with the same model: results/concurrency.json.

    python benchmarks/concurrency.py [--vllm PYTHON] [--rounds 3]

SmolLM2-135M as lrq with the default settings, behind `rankgate serve`, and with `--vllm`, the interpreter of an
environment that has vLLM and this package, behind `vllm serve` by our plugin; there also its W4A16 export (int4) and
the dense model. 64 completions of at most 64 tokens at temperature 0, at concurrency 1 and 16; tokens per second of all
of them, every server in a process of its own, in turn, the median of the rounds. An answer that is not, to the letter,
what the same server wrote for the same prompt alone is counted. 15 minutes with vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from frame import MODEL, Columns, Content, Row, parser, record, source, start, table

from rankgate.cli import main as rankgate
from rankgate.hub.sources import load, resolve

REQUESTS, TOKENS, CONCURRENCY, PORT = 64, 64, (1, 16), 8765
PROMPTS = [f"Chapter {number}. The lighthouse keeper and his dog" for number in range(REQUESTS)]
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
WAIT = 300  # seconds for a server to begin


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM")
    options.add_argument("--rounds", type=int, default=3)
    arguments = start(options)
    settings = {"model": MODEL, "requests": REQUESTS, "new_tokens": TOKENS, "rounds": arguments.rounds}
    record("concurrency", settings, measured(arguments))


def measured(arguments: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        commands = servers(Path(folder), arguments.vllm)
        found: dict[str, list[Row]] = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                with serving(command, Path(folder) / "log") as address:
                    found[name].append(asyncio.run(load_of(address)))
        for name, rounds in found.items():
            for at_once in CONCURRENCY:
                speeds = [result[f"tokens_per_s at {at_once}"] for result in rounds]
                others = [result[f"other answers at {at_once}"] for result in rounds]
                yield {
                    "server": name,
                    "at_once": at_once,
                    "tokens_per_s": statistics.median(speeds),
                    "other_answers": max(others),
                }


def servers(folder: Path, vllm: str | None) -> dict[str, list[str]]:
    """Commands by name, with their models made."""
    run(["convert", MODEL, "-o", str(folder / "lrq")])
    ours = [sys.executable, "-m", "rankgate.cli", "serve", str(folder / "lrq"), "--device", "cpu", "--port", str(PORT)]
    found = {"rankgate serve, lrq": ours}
    if vllm is not None:
        run(["convert", MODEL, "-o", str(folder / "int4"), "--method", "lrq", "--rank", "0", "--refine", "0"])
        run(["export", str(folder / "int4"), "-o", str(folder / "w4a16"), "--format", "compressed-tensors"])
        model, tokenizer = load(resolve(MODEL))
        model.save_pretrained(folder / "dense")
        tokenizer.save_pretrained(folder / "dense")
        for name, directory in (("lrq by our plugin", "lrq"), ("W4A16 export", "w4a16"), ("dense", "dense")):
            engine = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / directory)]
            limits = ["--max-model-len", "512", "--max-num-seqs", str(max(CONCURRENCY)), "--dtype", "bfloat16"]
            found[f"vllm serve, {name}"] = [*engine, *limits, "--port", str(PORT)]
    return found


def run(command: list[str]) -> None:
    if rankgate(command):
        raise SystemExit(f"rankgate {' '.join(command)} failed")


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[str]:
    """The address of a server in a process of its own."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **VLLM})
        address, end = f"http://127.0.0.1:{PORT}", time.monotonic() + WAIT
        try:
            while not healthy(address):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(log.read_text()[-4000:])
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def healthy(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health").status_code == 200
    except httpx2.TransportError:
        return False


async def load_of(address: str) -> dict[str, Any]:
    """Tokens per second, and answers that are not what they were at concurrency 1, by concurrency."""
    found: dict[str, Any] = {}
    async with httpx2.AsyncClient(base_url=address, timeout=300) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        await asked(client, model, PROMPTS[:16], 16)  # warms up
        alone: list[str] = []
        for at_once in CONCURRENCY:
            begin = time.perf_counter()
            answers = await asked(client, model, PROMPTS, at_once)
            seconds = time.perf_counter() - begin
            texts = [answer["choices"][0]["text"] for answer in answers]
            alone = alone or texts
            found[f"tokens_per_s at {at_once}"] = sum(a["usage"]["completion_tokens"] for a in answers) / seconds
            found[f"other answers at {at_once}"] = sum(a != b for a, b in zip(alone, texts, strict=True))
    return found


async def asked(client: httpx2.AsyncClient, model: str, prompts: list[str], at_once: int) -> list[dict[str, Any]]:
    places = asyncio.Semaphore(at_once)

    async def one(prompt: str) -> dict[str, Any]:
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        async with places:
            response = await client.post("/v1/completions", json=body)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    return await asyncio.gather(*map(one, prompts))


COLUMNS: Columns = {
    "server": lambda r: r["server"],
    "requests at once": lambda r: str(r["at_once"]),
    "tokens/s, × ours with one": lambda r: f"{r['tokens_per_s'] / r['ours']:.2f}",
    "answers unlike those alone": lambda r: str(r["other_answers"]),
}


def section(content: Content) -> str:
    settings, rows = content["settings"], content["results"]
    ours = rows[0]["tokens_per_s"]
    return f"""## Requests at once (CPU)

{settings["requests"]} completions of at most {settings["new_tokens"]} tokens by SmolLM2-135M, temperature 0; ours in
float32 between the products, vLLM in bfloat16. An answer may differ from the one asked for alone where two tokens
are as likely but for rounding. {source(content)}

{table([{**row, "ours": ours} for row in rows], COLUMNS)}
"""


if __name__ == "__main__":
    main()
