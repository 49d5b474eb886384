"""The recipes against each other: published and thorough on the same model, rows and held-out rows.

    uv run tests/bench/recipes.py [--rows FILE] [--model PATH] [--learning-rate 2e-3] [--visits 480]

For each seed twenty rows are held out, and nothing sees them before the end. Three trainings follow:

    published        --visits rows in steps of 8
    thorough         as many visits in steps of 16
    thorough-in-full its recipe, of three epochs instead of one, as the file is small

Thorough keeps the weights that do best on ten of its own rows, which it then does not train on, measured five
times. Prints the held-out losses of a run in a line, and in the end each training's means over the seeds.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from damage import before_after, divided, measure

import finetune_r1
from finetune_r1 import RECIPES, TrainConfig, read_jsonl, write_jsonl

HELD_OUT, KEPT_BACK, MEASURED, EPOCHS = 20, 10, 5, 3.0
MEASURES = ("loss", "answer_loss", "relevance", "general_loss")


def recipe(name: str, visits: int, rows: int) -> dict[str, Any]:
    """The settings of a training on so many rows."""
    settings = dict(RECIPES["published" if name == "published" else "thorough"])
    steps = visits // settings.get("effective_batch", TrainConfig.effective_batch)
    if name == "thorough-in-full":
        settings["epochs"] = EPOCHS
        steps = math.ceil(EPOCHS * (rows - KEPT_BACK) / settings["effective_batch"])
    else:
        settings |= {"epochs": None, "max_steps": steps, "warmup_steps": min(5, steps // 2)}
    if name != "published":
        settings |= {"eval_rows": KEPT_BACK, "eval_steps": max(1, steps // MEASURED)}
    return settings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="published,thorough,thorough-in-full")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rows", type=Path, default=finetune_r1.DEMO_ROWS, help="in the recipe's columns"
    )
    parser.add_argument("--model", help="default: the demo's")
    parser.add_argument("--learning-rate", type=float, help="of both, instead of the recipes'")
    parser.add_argument(
        "--visits", type=int, default=480, help="rows seen in training at equal compute"
    )
    parser.add_argument("--max-seq-length", type=int, default=TrainConfig.max_seq_length)
    parser.add_argument("--out", type=Path, default=Path("recipes.json"))
    asked = parser.parse_args()
    finetune_r1.prepare_environment()
    finetune_r1.Console.quiet = True
    model = asked.model or str(finetune_r1.demo_model())
    every, results = read_jsonl(asked.rows), []
    for seed in range(TrainConfig.seed, TrainConfig.seed + asked.seeds):
        rows, held_out = divided(every, HELD_OUT, seed)
        for name in asked.only.split(","):
            trained = Path(tempfile.mkdtemp()) / "rows.jsonl"
            write_jsonl(trained, rows)
            settings = recipe(name, asked.visits, len(rows))
            settings |= {"model": model, "dataset": str(trained), "split": "train", "seed": seed}
            settings |= {"load_in_4bit": False, "max_seq_length": asked.max_seq_length}
            settings |= {"max_new_tokens": 1, "wandb": False}
            if asked.learning_rate:
                settings["learning_rate"] = asked.learning_rate
            report = measure(TrainConfig(**settings), held_out, answers=0, new_tokens=1)
            finetune_r1.remove(trained.parent)
            result = {
                "recipe": name,
                "seed": seed,
                "verdict": report["verdict"],
                "rows": report.get("rows"),
            }
            result |= {measured: before_after(report, measured) for measured in MEASURES}
            result["seconds"] = report["seconds"]
            results.append(result)
            print(json.dumps(result), flush=True)
            finetune_r1.write_json(asked.out, results)
    for name in asked.only.split(","):
        means = {}
        for measured in MEASURES:
            pairs = [run[measured] for run in results if run["recipe"] == name and run[measured]]
            if pairs:
                means[measured] = [
                    round(statistics.fmean(side), 4) for side in zip(*pairs, strict=True)
                ]
        print(f"{name:17}", json.dumps(means))
