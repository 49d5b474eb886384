"""The recipes beside each other: published and thorough on the same model, rows and held-out rows.

    uv run tests/bench/recipes.py [--rows FILE] [--model PATH] [--learning-rate 2e-3] [--visits 480]

Twenty rows are held out by each seed, and no training sees them. `published` and `thorough` visit --visits rows
in steps of 8 and 16; `thorough-in-full` takes three epochs. Thorough keeps the best of five checkpoints by
ten of its own rows, which it does not train on. Prints the held-out losses of a run in a line, and the means.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from damage import before_after, measure, split

import finetune_r1
from finetune_r1 import RECIPES, TrainConfig, read_jsonl, write_jsonl

HELD_OUT = 20
KEPT_BACK = 10
EPOCHS = 3.0
MEASURES = ("loss", "answer_loss", "relevance", "general_loss")
NAMES = ("published", "thorough", "thorough-in-full")


def recipe(name: str, visits: int, rows: int) -> dict[str, Any]:
    """The settings of a recipe for so many rows."""
    if name == "published":
        steps = visits // TrainConfig.effective_batch
        return {"max_steps": steps, "warmup_steps": min(5, steps // 2)}
    settings = dict(RECIPES["thorough"])
    steps = visits // settings["effective_batch"]
    if name == "thorough-in-full":
        settings["epochs"] = EPOCHS
        steps = math.ceil(EPOCHS * (rows - KEPT_BACK) / settings["effective_batch"])
    else:
        settings |= {"epochs": None, "max_steps": steps}
    settings["warmup_steps"] = 0  # its warmup_ratio counts
    return {**settings, "eval_rows": KEPT_BACK, "eval_steps": max(1, steps // 5)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(NAMES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=finetune_r1.DEMO_ROWS)
    parser.add_argument("--model", help="default: the demo's")
    parser.add_argument("--learning-rate", type=float, default=TrainConfig.learning_rate)
    parser.add_argument("--visits", type=int, default=480, help="rows seen in training")
    parser.add_argument("--max-seq-length", type=int, default=TrainConfig.max_seq_length)
    parser.add_argument("--out", type=Path, default=Path("recipes.json"))
    options = parser.parse_args()
    finetune_r1.prepare_environment()
    finetune_r1.Console.quiet = True
    model = options.model or str(finetune_r1.demo_model())
    records = read_jsonl(options.rows)
    names = options.only.split(",")
    results = []
    for seed in range(TrainConfig.seed, TrainConfig.seed + options.seeds):
        rows, held_out = split(records, HELD_OUT, seed)
        for name in names:
            dataset = Path(tempfile.mkdtemp()) / "rows.jsonl"
            write_jsonl(dataset, rows)
            same = {
                "model": model,
                "dataset": str(dataset),
                "split": "train",
                "seed": seed,
                "load_in_4bit": False,
                "max_seq_length": options.max_seq_length,
                "max_new_tokens": 1,
                "learning_rate": options.learning_rate,
                "wandb": False,
            }
            config = TrainConfig(**{**recipe(name, options.visits, len(rows)), **same})
            report = measure(config, held_out, answers=0, new_tokens=1)
            finetune_r1.remove(dataset.parent)
            result = {"recipe": name, "seed": seed, "seconds": report["seconds"]}
            result |= {"verdict": report["verdict"], "rows": report.get("rows")}
            result |= {measured: before_after(report, measured) for measured in MEASURES}
            results.append(result)
            print(json.dumps(result), flush=True)
            finetune_r1.write_json(options.out, results)
    for name in names:
        means = {}
        for measured in MEASURES:
            pairs = [run[measured] for run in results if run["recipe"] == name and run[measured]]
            if pairs:
                sides = zip(*pairs, strict=True)
                means[measured] = [round(statistics.fmean(side), 4) for side in sides]
        print(f"{name:17}", json.dumps(means))


if __name__ == "__main__":
    main()
