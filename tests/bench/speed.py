"""Training and decoding: ours, the recipe's own configuration, plain TRL + PEFT + bitsandbytes (on a GPU).

    uv run tests/bench/speed.py --model FOLDER --dataset ROWS.jsonl [--steps 60] [--repeats 2] [--out F.json]
    uv run tests/bench/speed.py --small               a tiny model on a CPU, to see that all this works

Same rows in the same order, one after the other by turns, each in a process of its own. Steps before the
third are left out of the pace (compilation, warm-up); the wall time counts all from the start of the process
to its end.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

import published  # noqa: E402

import finetune_r1  # noqa: E402
from finetune_r1 import TrainConfig  # noqa: E402

RECIPE = ["--micro-batch", "2", "--gradient-checkpointing", "unsloth"]
VARIANTS: dict[str, list[str]] = {
    "ours": [],
    "recipe": RECIPE,
    "ours-23.5": ["--gpu-memory-gib", "23.5"],
    "ours-14.5-fp16": ["--gpu-memory-gib", "14.5", "--dtype", "float16"],
    "recipe-14.5-fp16": [*RECIPE, "--gpu-memory-gib", "14.5", "--dtype", "float16"],
    "plain": [],
}


def used_rows(config: TrainConfig, tokenizer: Any) -> Any:
    """The rows that a training takes, as tokens."""
    return finetune_r1.prepare_rows(finetune_r1.read_records(config), tokenizer, config).used


def mean_tokens(rows: Any) -> float:
    return statistics.fmean(rows["tokens"][:])


def train_plainly(config: TrainConfig, folder: Path) -> None:
    """What one writes without Unsloth: nf4 by bitsandbytes, LoRA by PEFT, 2 rows at once, checkpointing."""
    import peft
    import torch
    import transformers
    import trl

    gpu = torch.cuda.is_available()
    tokenizer = finetune_r1.load_tokenizer(config.model)
    rows = used_rows(config, tokenizer)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four_bit = transformers.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.model,
        quantization_config=four_bit if gpu else None,
        dtype=torch.bfloat16,
        device_map={"": 0 if gpu else "cpu"},
    )
    modules = config.target_modules.split(",")
    lora = peft.LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=modules)
    run = finetune_r1.Run(folder)
    same_names = "max_steps warmup_steps learning_rate lr_scheduler_type weight_decay seed"
    arguments = trl.SFTConfig(
        **{name: getattr(config, name) for name in same_names.split()},
        output_dir=str(folder / "checkpoints"), max_length=config.max_seq_length, bf16=gpu, use_cpu=not gpu,
        per_device_train_batch_size=2, gradient_accumulation_steps=config.effective_batch // 2,
        optim=config.optim if gpu else "adamw_torch", logging_steps=1, report_to="none", save_strategy="no",
        disable_tqdm=True, completion_only_loss=False, gradient_checkpointing=True,
    )  # fmt: skip
    dataset = rows.select_columns(["input_ids", "completion_mask"])
    trainer = trl.SFTTrainer(
        model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=lora
    )
    trainer.remove_callback(transformers.PrinterCallback)
    callback = finetune_r1.with_base(finetune_r1.TrainingLog, transformers.TrainerCallback)
    trainer.add_callback(
        callback(run, config, round(mean_tokens(rows) * config.effective_batch), [], None)
    )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    finetune_r1.write_json(folder / "run.json", {"peak_memory_gib": finetune_r1.peak_memory_gib()})


def measure(name: str, common: list[str], folder: Path) -> dict[str, Any]:
    """One run in a process of its own: pace, peak, wall time, losses."""
    command = [sys.executable, str(PROJECT / "finetune_r1.py"), "train", *common, *VARIANTS[name]]
    command += [
        "--no-wandb",
        "--logging-steps",
        "1",
        "--max-new-tokens",
        "1",
        "--run-dir",
        str(folder),
    ]
    if name == "plain":
        command = [sys.executable, __file__, *common, "--plain", str(folder)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - started
    if done.returncode:
        return {"variant": name, "failed": done.stderr.strip().splitlines()[-1:]}
    lines = [line for line in finetune_r1.read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    steps = [
        after["seconds"] - before["seconds"] for before, after in itertools.pairwise(lines[1:])
    ]
    peak = finetune_r1.read_json(folder / "run.json")["peak_memory_gib"]
    losses = [line["loss"] for line in lines]
    pace = round(statistics.median(steps), 3)
    return {
        "variant": name,
        "s_per_step": pace,
        "peak_gib": peak,
        "wall_s": round(wall, 1),
        "losses": losses,
    }


def ending_like(generate: Any, lengths: list[int]) -> Any:
    """`generate`, in which each answer ends after so many tokens, which random weights would not do.

    `lengths` are in the order of the answers, batch after batch, and begin again.
    """
    import torch
    import transformers

    following = itertools.cycle(lengths)

    class Ends(transformers.StoppingCriteria):  # type: ignore[misc]
        written = 0

        def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
            if not self.written:
                self.lengths = torch.tensor(
                    list(itertools.islice(following, len(ids))), device=ids.device
                )
            self.written += 1
            return self.written >= self.lengths

    return lambda **options: generate(
        **options, stopping_criteria=transformers.StoppingCriteriaList([Ends()])
    )


def answer(kind: str, run: finetune_r1.Run, new_tokens: int, output: Path) -> None:
    """Tokens a second of one question and of 32, after a warm-up of 8 tokens.

    Each answer ends where its row's does, or after `new_tokens`. `plain` is Unsloth as the notebook has it,
    one batch by one `generate`.
    """
    import torch

    config = dataclasses.replace(run.config, max_new_tokens=new_tokens)
    if kind == "plain":
        os.environ["UNSLOTH_DECODE_CUDA_GRAPHS"] = "0"
        model, _ = finetune_r1.import_unsloth().from_pretrained(
            str(run.adapter), max_seq_length=config.max_seq_length, load_in_4bit=config.load_in_4bit
        )
        loaded = finetune_r1.LoadedModel(
            model, finetune_r1.load_tokenizer(run.adapter), config.lang, {}, 0.0
        )
        vars(loaded)["plan_batches"] = lambda questions, _: [list(range(len(questions)))]
    else:
        loaded = finetune_r1.LoadedModel.load_run(run)
    rows = used_rows(config, loaded.tokenizer)
    rows = sorted(rows.select(range(min(32, len(rows)))), key=lambda row: len(row["question"]))
    ends = [min(new_tokens, len(row["input_ids"]) - row["prompt_tokens"]) for row in rows]
    found, endless = {}, loaded.model.generate
    for count in (1, 32):
        loaded.model.generate = ending_like(endless, ends[:count])
        questions = [row["question"] for row in rows[:count]]
        loaded.generate(questions, dataclasses.replace(config, max_new_tokens=8))
        started = time.perf_counter()
        answers = loaded.generate(questions, config)
        pace = sum(ends[:count]) / (time.perf_counter() - started)
        texts = [answer["thought"] + answer["answer"] for answer in answers]
        found[count] = {"pace": pace, "longest": max(ends[:count]), "texts": texts}
    peak = torch.cuda.max_memory_reserved() / finetune_r1.GIB if torch.cuda.is_available() else 0.0
    finetune_r1.write_json(output, {"peak_gib": peak, **found})


def measure_decoding(run: Path, new_tokens: int) -> None:
    """Tokens a second of both kinds, each in a process of its own, and in how many answers they agree."""
    found = {}
    for kind in ("plain", "ours"):
        output = run.parent / f"answers-{kind}.json"
        command = [
            sys.executable,
            __file__,
            "--answer",
            kind,
            str(run),
            str(output),
            "--new-tokens",
            str(new_tokens),
        ]
        subprocess.run(command, check=True, capture_output=True)
        found[kind] = finetune_r1.read_json(output)
    for count in ("1", "32"):
        plain, ours = found["plain"][count], found["ours"][count]
        same = sum(a == b for a, b in zip(plain["texts"], ours["texts"], strict=True))
        paces = f"plain {plain['pace']:.1f}, ours {ours['pace']:.1f} tok/s, {ours['pace'] / plain['pace']:.2f}x"
        print(
            f"decoding {count:>2} at once, up to {ours['longest']} tokens: {paces}, same text in {same}"
        )
    print(f"GiB: plain {found['plain']['peak_gib']:.1f}, ours {found['ours']['peak_gib']:.1f}")


def matmul_tflops() -> float:
    """What this machine's GPU reaches in a bf16 product of 8192 x 8192, by events; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeat in range(40):
        if repeat == 10:
            start.record()
        left @ right
    end.record()
    torch.cuda.synchronize()
    return 30 * 2 * 8192**3 / (start.elapsed_time(end) / 1000) / 1e12


def report(results: list[dict[str, Any]], tokens: float, rows: int, ceiling: float) -> None:
    """A table.

    `ratio` and `cold` are the recipe's pace and wall time over a variant's, `loss` is the most that a loss
    differs from the recipe's, `matmul` the share of `ceiling` in TFLOP/s at the 8B's 30.9 GFLOP a token.
    """
    titles = ("s/step", "rows/s", "tok/s", "matmul", "GiB", "wall s", "ratio", "cold", "loss")
    print(f"\n{'':22}", *(f"{title:>8}" for title in titles))
    runs_of = {
        name: [r for r in results if r["variant"] == name and "failed" not in r]
        for name in VARIANTS
    }

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs_of[name])

    for name in (name for name, runs in runs_of.items() if runs and runs_of["recipe"]):
        pace, peak, wall = (median(name, key) for key in ("s_per_step", "peak_gib", "wall_s"))
        pairs = zip(runs_of[name][0]["losses"], runs_of["recipe"][0]["losses"], strict=True)
        cells = (
            f"{pace:.3f}", f"{rows / pace:.1f}", f"{tokens / pace:.0f}",
            f"{30.9e9 * tokens / pace / 1e12 / ceiling:.0%}" if ceiling else "", f"{peak:.2f}", f"{wall:.1f}",
            f"{median('recipe', 's_per_step') / pace:.2f}x", f"{median('recipe', 'wall_s') / wall:.2f}x",
            f"{max(abs(mine - recipes) for mine, recipes in pairs):.4f}",
        )  # fmt: skip
        print(f"{name:22}", *(f"{cell:>8}" for cell in cells))


def tiny_model(folder: Path) -> Path:
    """A model of the published layout, with two layers of random weights."""
    finetune_r1.import_unsloth()
    return published.write_model(folder, "unsloth")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--dataset", default=str(finetune_r1.DEMO_ROWS))
    parser.add_argument("--max-steps", "--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--variants", help=f"of {', '.join(VARIANTS)}; default: all, with --small the first two"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=0, help="an answer at most, to measure decoding too"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    finetune_r1.prepare_environment()
    if asked.answer:
        kind, run, output = asked.answer
        answer(kind, finetune_r1.Run(Path(run)), asked.new_tokens, Path(output))
        sys.exit()
    scratch = Path(tempfile.mkdtemp())
    if asked.small:
        asked.model, asked.max_steps, asked.repeats = str(tiny_model(scratch / "tiny")), 6, 1
        asked.variants = asked.variants or "ours,recipe"
    variants = asked.variants.split(",") if asked.variants else list(VARIANTS)
    config = TrainConfig(model=asked.model, dataset=asked.dataset, max_steps=asked.max_steps)
    if asked.plain:
        train_plainly(config, asked.plain)
        sys.exit()
    common = [
        "--model",
        asked.model,
        "--dataset",
        asked.dataset,
        "--max-steps",
        str(asked.max_steps),
    ]
    results = []
    for repeat in range(asked.repeats):
        for number, name in enumerate(variants):
            results.append(measure(name, common, scratch / f"{repeat}-{number}"))
            print(json.dumps({k: v for k, v in results[-1].items() if k != "losses"}), flush=True)
    mean = mean_tokens(used_rows(config, finetune_r1.load_tokenizer(asked.model)))
    if asked.new_tokens and "failed" not in results[0]:
        measure_decoding(scratch / "0-0", asked.new_tokens)
    report(results, mean * config.effective_batch, config.effective_batch, matmul_tflops())
    if asked.out:
        finetune_r1.write_json(asked.out, results)
