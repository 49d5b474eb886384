"""Training, decoding and multiple choice, timed: this script, the recipe's configuration, plain libraries.

    python3 tests/bench/speed.py --model FOLDER --dataset ROWS.jsonl [--variants ours,recipe] [--steps 60]
                                 [--answers 400] [--choices 200] [--out FILE.json]
    python3 tests/bench/speed.py --small        two layers of random weights on a CPU, to check that it works

Every variant trains on the same rows in the same order, in a process of its own; s/step is the median after
the second step, wall time runs from the start of the process to its end. With --answers the first variant's
adapter then answers 1 and 32 questions of so many tokens, and so does Unsloth's own `generate`. With
--choices it is evaluated on so many multiple-choice questions made of the rows, with 512 new tokens.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

import published  # noqa: E402

import finetune_r1  # noqa: E402
import prompts  # noqa: E402
from finetune_r1 import read_json, read_jsonl, write_json, write_jsonl  # noqa: E402

RECIPE = ["--micro-batch", "2", "--gradient-checkpointing", "unsloth"]
FP16 = ["--gpu-memory-gib", "14.5", "--dtype", "float16"]
VARIANTS = {
    "ours": [],
    "recipe": RECIPE,
    "ours-23.5": ["--gpu-memory-gib", "23.5"],
    "ours-14.5-fp16": FP16,
    "recipe-14.5-fp16": [*RECIPE, *FP16],
    "t4": ["--gpu-memory-gib", "14.5"],  # with tests/bench/t4, so it takes the GPU for a T4
    "plain": [],  # TRL, PEFT and bitsandbytes without Unsloth, on a GPU
}


def run_script(*arguments: object, **environment: str) -> tuple[float, str]:
    """Runs a Python script; returns its seconds and stdout."""
    command = [sys.executable, *map(str, arguments)]
    started = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{command}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}")
    return seconds, done.stdout


def train(name: str, common: list[str], folder: Path) -> dict[str, Any]:
    """Trains one variant into `folder`; returns pace, memory, wall time and losses."""
    own = ["--logging-steps", "1", "--max-new-tokens", "1", "--no-wandb", "--run-dir", str(folder)]
    command = [str(PROJECT / "finetune_r1.py"), "train", *common, *own, *VARIANTS[name]]
    environment = {}
    if name == "plain":
        command = [__file__, *common, "--train-plainly", str(folder)]
    if name == "t4":
        paths = [str(PROJECT / "tests" / "bench" / "t4"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    wall, _ = run_script(*command, **environment)

    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    ends = [line["seconds"] for line in lines[1:]]
    record = read_json(folder / "run.json")
    plan = record.get("plan", {})
    return {
        "variant": name,
        "s_per_step": statistics.median(b - a for a, b in itertools.pairwise(ends)),
        "planned_gib": plan.get("estimated_peak_gib", 0.0),
        "reserved_gib": record.get("reserved_gib", record["peak_memory_gib"]),
        "micro_batch": plan.get("micro_batch", 2),
        "kept_layers": plan.get("kept_layers", 0),
        "wall_s": wall,
        "losses": [line["loss"] for line in lines],
    }


def train_plainly(config: finetune_r1.TrainConfig, folder: Path) -> None:
    """What one writes without Unsloth, on a GPU: nf4, LoRA, micro-batch 2, checkpointing."""
    import peft
    import torch
    import transformers
    import trl

    tokenizer = finetune_r1.load_tokenizer(Path(config.model))
    rows = finetune_r1.prepare_rows(finetune_r1.read_records(config), tokenizer, config).used
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.model,
        quantization_config=nf4,
        dtype=torch.bfloat16,
        device_map={"": 0},
    )
    modules = config.target_modules.split(",")
    lora = peft.LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=modules)
    arguments = trl.SFTConfig(
        output_dir=str(folder / "checkpoints"),
        max_steps=config.max_steps,
        warmup_steps=config.warmup_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        optim=config.optim,
        weight_decay=config.weight_decay,
        seed=config.seed,
        data_seed=config.seed,
        max_length=config.max_seq_length,
        completion_only_loss=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=config.effective_batch // 2,
        gradient_checkpointing=True,
        bf16=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            state.log_history[-1]["seconds"] = time.perf_counter()

    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=rows.select_columns(["input_ids", "completion_mask"]),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Clock()],
    )
    trainer.train()
    write_jsonl(folder / "metrics.jsonl", trainer.state.log_history)
    write_json(folder / "run.json", finetune_r1.peak_memory())


def decode(kind: str, run: finetune_r1.Run, tokens: int, output: Path) -> None:
    """Tokens a second for one question and for 32, after a warm-up of 8 tokens.

    No answer ends before `tokens`: trained random weights would end at random.
    """
    import torch

    config = run.config
    questions = [row["Question"] for row in read_jsonl(Path(config.dataset))[:32]]
    if kind == "unsloth":
        os.environ["UNSLOTH_DECODE_CUDA_GRAPHS"] = "0"
        unsloth = finetune_r1.import_unsloth()
        model, _ = unsloth.from_pretrained(
            str(run.adapter), max_seq_length=config.max_seq_length, load_in_4bit=config.load_in_4bit
        )
        unsloth.for_inference(model)
        tokenizer = finetune_r1.load_tokenizer(run.adapter)
    else:
        loaded = finetune_r1.LoadedModel.load_run(run)
        model = loaded.model

    def ask(questions: list[str], tokens: int) -> None:
        model.generation_config.min_new_tokens = tokens
        if kind == "unsloth":
            texts = [tokenizer.bos_token + prompts.build_prompt(each) for each in questions]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            model.generate(**inputs.to(model.device), max_new_tokens=tokens, use_cache=True)
        else:
            settings = dataclasses.replace(config, max_new_tokens=tokens)
            finetune_r1.generate(loaded, questions, settings)

    paces = {}
    for count in (1, 32):
        ask(questions[:count], min(8, tokens))
        started = time.perf_counter()
        ask(questions[:count], tokens)
        paces[count] = count * tokens / (time.perf_counter() - started)
    reserved = (
        torch.cuda.max_memory_reserved() / finetune_r1.GIB if torch.cuda.is_available() else 0
    )
    write_json(output, {"paces": paces, "reserved_gib": reserved})


def measure_decoding(run: Path, tokens: int) -> dict[str, Any]:
    """Prints tokens a second by Unsloth's own `generate` and by ours, each in a process of its own."""
    results = {}
    for kind in ("unsloth", "ours"):
        output = run.parent / f"decoding-{kind}.json"
        run_script(__file__, "--decode", kind, run, output, "--answers", tokens)
        results[kind] = read_json(output)
    plain, ours = results["unsloth"], results["ours"]
    for count in ("1", "32"):
        ratio = ours["paces"][count] / plain["paces"][count]
        print(
            f"decoding {count:>2} x {tokens} tokens: unsloth {plain['paces'][count]:.1f}, "
            f"ours {ours['paces'][count]:.1f} tok/s ({ratio:.2f}x)"
        )
    print(f"GiB: unsloth {plain['reserved_gib']:.1f}, ours {ours['reserved_gib']:.1f}", flush=True)
    return results


def measure_choices(run: Path, dataset: Path, number: int, new_tokens: int) -> dict[str, Any]:
    """Times `eval` on questions like MedQA's: a row's question, its answer and three others' as options."""
    rows = read_jsonl(dataset)
    chance = random.Random(0)
    questions = []
    for position in range(number):
        row = rows[position % len(rows)]
        others = [other["Response"] for other in chance.sample(rows, 4) if other is not row][:3]
        options = chance.sample([row["Response"], *others], 4)
        questions.append(
            {
                "question": f"Case {position + 1}. {row['Question']}",  # none was trained on
                "options": {
                    letter: text[:80] for letter, text in zip("ABCD", options, strict=True)
                },
                "answer_idx": "ABCD"[options.index(row["Response"])],
            }
        )
    file = run.parent / "choices.jsonl"
    write_jsonl(file, questions)
    command = ["eval", "--run", run, "--dataset", file, "--split", "train", "--answers", number]
    limit = ["--max-new-tokens", new_tokens, "--json"]
    seconds, said = run_script(PROJECT / "finetune_r1.py", *command, *limit)
    report = json.loads(said)
    print(
        f"eval of {number} choices and 24 problems, before and after, "
        f"{new_tokens} tokens each: {seconds:.0f} s; {report['verdict']}",
        flush=True,
    )
    return {"seconds": seconds, "report": report}


def print_table(results: list[dict[str, Any]]) -> None:
    """`ratio` is the recipe's s/step over a variant's, `loss diff` the largest difference from its losses."""
    recipes = {result["variant"]: result for result in results}
    titles = "s/step ratio batch kept planned reserved wall first last diff".split()
    print(f"\n{'':17}", *(f"{title:>8}" for title in titles))
    for result in results:
        losses = result["losses"]
        ratio = difference = ""
        if "recipe" in recipes:
            recipe = recipes["recipe"]
            ratio = f"{recipe['s_per_step'] / result['s_per_step']:.2f}x"
            pairs = zip(losses, recipe["losses"], strict=True)
            difference = f"{max(abs(mine - theirs) for mine, theirs in pairs):.4f}"
        cells = [
            f"{result['s_per_step']:.3f}",
            ratio,
            str(result["micro_batch"]),
            str(result["kept_layers"]),
            f"{result['planned_gib']:.1f}",
            f"{result['reserved_gib']:.2f}",
            f"{result['wall_s']:.1f}",
            f"{losses[0]:.4f}",
            f"{losses[-1]:.4f}",
            difference,
        ]
        print(f"{result['variant']:17}", *(f"{cell:>8}" for cell in cells))


def small_model(folder: Path) -> Path:
    """A model of the published layout, with two layers of random weights."""
    finetune_r1.import_unsloth()
    return published.write_model(folder, "unsloth")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--dataset", default=str(finetune_r1.DEMO_ROWS))
    parser.add_argument("--variants", default="ours,recipe", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--steps", "--max-steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--answers", type=int, default=0, help="tokens of an answer")
    parser.add_argument("--choices", type=int, default=0, help="multiple-choice questions")
    parser.add_argument("--new-tokens", type=int, default=512, help="for each of the choices")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train-plainly", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--decode", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    finetune_r1.prepare_environment()
    if options.decode:
        kind, run, output = options.decode
        decode(kind, finetune_r1.Run(Path(run)), options.answers, Path(output))
        return
    scratch = Path(tempfile.mkdtemp(prefix="speed-"))
    if options.small:
        options.model = str(small_model(scratch / "tiny"))
        options.steps = 6
    common = ["--model", options.model, "--dataset", options.dataset]
    common += ["--max-steps", str(options.steps)]
    if options.train_plainly:
        config = finetune_r1.TrainConfig(
            model=options.model, dataset=options.dataset, max_steps=options.steps
        )
        train_plainly(config, options.train_plainly)
        return

    found: dict[str, Any] = {"training": []}
    variants = options.variants.split(",")
    for repeat in range(options.repeats):
        for name in variants:
            try:
                result = train(name, common, scratch / f"{name}-{repeat}")
            except RuntimeError as error:
                print(f"{name} failed: {error}", flush=True)
                continue
            found["training"].append(result)
            shown = {key: value for key, value in result.items() if key != "losses"}
            print(json.dumps(shown), flush=True)
    print_table(found["training"])
    if options.out:
        write_json(options.out, found)  # and again in the end
    first = scratch / f"{variants[0]}-0"
    if options.answers:
        found["decoding"] = measure_decoding(first, options.answers)
    if options.choices:
        dataset = Path(options.dataset)
        found["choices"] = measure_choices(first, dataset, options.choices, options.new_tokens)
    if options.out:
        write_json(options.out, found)


if __name__ == "__main__":
    main()
