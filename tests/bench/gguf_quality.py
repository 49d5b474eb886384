"""How near a run's GGUF files are to its merged weights in torch, in a real llama.cpp.

    uv run tests/bench/gguf_quality.py RUN [--prefixes 100] [--only f16,q8_0,q5_1,q4_0]

Prefixes are of the run's rows, each ten tokens longer than the one before. Prints for each format: MB, how
often the likeliest token is torch's (float32), and the largest and the mean difference of the ten likeliest
tokens' log-probabilities in nats.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import httpx
import torch
import transformers
import xllamacpp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import finetune_r1
import prompts


def make_prefixes(run: finetune_r1.Run, tokenizer, count: int) -> list[list[int]]:
    """Lists of token ids, each beginning with the one before it until a row ends."""
    rows = finetune_r1.read_jsonl(finetune_r1.DEMO_ROWS)
    prefixes = []
    for row in rows:
        text = prompts.build_example(*row.values(), tokenizer.eos_token, run.config.lang)
        ids = tokenizer(text)["input_ids"][:1000]
        for length in range(10, len(ids), 10):
            prefixes.append(ids[:length])
    return prefixes[:count]


def start_server(path: Path) -> tuple[xllamacpp.Server, httpx.Client]:
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = 2048
    settings.n_parallel = 1
    settings.verbosity = -1
    server = xllamacpp.Server(settings)
    return server, httpx.Client(base_url=server.listening_address, timeout=60)


def top_ten(client: httpx.Client, prefix: list[int]) -> dict[int, float]:
    """Log-probabilities by token; the bias keeps the drawn token, which does not count, whole."""
    request = {"prompt": prefix, "n_predict": 1, "n_probs": 10, "logit_bias": [["a", 1000]]}
    answer = client.post("/completion", json=request).raise_for_status().json()
    [step] = answer["completion_probabilities"]
    return {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--prefixes", type=int, default=100)
    parser.add_argument("--only", default="f16,q8_0,q5_1,q4_0")
    options = parser.parse_args()
    run = finetune_r1.Run.find(options.run)
    merged = finetune_r1.merged_weights(run)
    tokenizer = finetune_r1.load_tokenizer(merged)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    prefixes = make_prefixes(run, tokenizer, options.prefixes)
    expected = []
    with torch.no_grad():
        for prefix in prefixes:
            logits = model(torch.tensor([prefix])).logits[0, -1]
            expected.append(logits.log_softmax(-1))
    for outtype in options.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path, _ = finetune_r1.save_gguf(run, Path(folder), outtype, None)
            server, client = start_server(path)
            same = 0
            differences = []
            for prefix, wanted in zip(prefixes, expected, strict=True):
                top = top_ten(client, prefix)
                same += max(top, key=top.get) == int(wanted.argmax())
                for token, value in top.items():
                    differences.append(abs(value - float(wanted[token])))
            result = {
                "outtype": outtype,
                "MB": round(path.stat().st_size / 1e6),
                "same": f"{same} of {len(prefixes)}",
                "largest": round(max(differences), 3),
                "mean": round(statistics.fmean(differences), 4),
            }
            print(json.dumps(result), flush=True)
            del client, server


if __name__ == "__main__":
    main()
