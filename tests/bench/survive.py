"""What is left after kill -9, Ctrl-C and SIGTERM at random moments: a tiny model on a CPU.

    uv run tests/bench/survive.py kills [--times 35]     every command killed, run again, and compared
    uv run tests/bench/survive.py soak [--times 200]     short runs, random options and signals, one folder
    uv run tests/bench/survive.py pushes [--times 100]   each to a Hub with random faults, by LFS or Xet
    uv run tests/bench/survive.py tracked [--times 40]   trainings, each with a W&B that has random faults

Commands run in processes forked after the imports, so that they start at once; afterwards every file must be
whole. Prints a line for each command, and what was lost. In `pushes` and `tracked` time-outs are seconds.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_DISABLE_XET": "1",
    "HF_XET_CLIENT_READ_TIMEOUT": "2s",
    "NO_PROXY": "127.0.0.1",
}
PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from servers.base import Fault, chance_fault  # noqa: E402
from servers.hub import HubServer  # noqa: E402
from servers.wandb_server import WandbServer  # noqa: E402
from speed import small_model  # noqa: E402

import finetune_r1  # noqa: E402
from finetune_r1 import Run, read_json, read_jsonl  # noqa: E402

ROWS = PROJECT / "data" / "medical_sample.jsonl"
TIMES = {"kills": 35, "soak": 200, "pushes": 100, "tracked": 40}
Work = Callable[[], Any]
# What a command does in a folder that has a finished run, and the result that is compared.
Job = tuple[Callable[[Path], Work], Callable[[Path], Any]]


class Harness:
    """The model, the Hub, chance, and what was lost."""

    def __init__(self, scratch: Path, model: Path, hub: HubServer, seed: int):
        self.scratch = scratch
        self.model = model
        self.hub = hub
        self.chance = random.Random(seed)
        self.log = scratch / "log"
        self.log.touch()
        self.lost: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()

    def train(self, *options: object) -> list[object]:
        """The command of a small training."""
        small = "--max-seq-length 512 --effective-batch 2 --max-new-tokens 4 --logging-steps 1 "
        small += "--learning-rate 1e-2 --warmup-steps 1 --no-load-in-4bit --no-wandb"
        return ["train", "--model", self.model, "--dataset", ROWS, *small.split(), *options]

    def perform(
        self, work: Work, seconds: float = 600, number: int = signal.SIGKILL
    ) -> tuple[int, str]:
        """Runs in a process, with a signal after so many seconds; the exit code and what was printed.

        The code is negative for a signal, and 70 after a traceback.
        """
        before = self.log.stat().st_size
        pid = os.fork()
        if not pid:
            os._exit(run_child(work, self.log))
        until = time.monotonic() + seconds
        done, status = os.waitpid(pid, os.WNOHANG)
        while not done and time.monotonic() < until:
            time.sleep(0.005)
            done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            os.kill(pid, number)
            _, status = os.waitpid(pid, 0)
        said = self.log.read_bytes()[before:].decode(errors="replace")
        return os.waitstatus_to_exitcode(status), said

    def finish(self, *arguments: object) -> None:
        """Runs a command that has to end well."""
        code, said = self.perform(command(*arguments))
        assert code == 0, said


def run_child(work: Work, log: Path) -> int:
    """Does the work of a forked process, which prints to the log."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code: Any = 0
    try:
        work()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def command(*arguments: object) -> Work:
    def work() -> None:
        sys.argv = ["finetune_r1.py", *map(str, arguments)]
        finetune_r1.app(sys.argv[1:], prog_name="finetune_r1.py")

    return work


def torn(folder: Path, since: float = 0) -> list[str]:
    """Files written since then that can't be read; names with a dot are of unfinished ones."""
    from PIL import Image
    from safetensors import safe_open

    readers: dict[str, Callable[[Path], Any]] = {
        ".json": read_json,
        ".jsonl": read_jsonl,
        ".safetensors": lambda path: safe_open(path, "np"),
        ".png": lambda path: Image.open(path).load(),
    }
    broken = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix not in readers or path.stat().st_mtime < since:
            continue
        try:
            readers[path.suffix](path)
        except Exception as error:
            broken.append(f"{path}: {type(error).__name__}: {error}")
    return broken


def explains(code: int, said: str) -> bool:
    """Whether a command failed with a message that says what to do."""
    return code == 1 and "hint:" in said and "Traceback" not in said


def trained(folder: Path) -> dict[str, Any]:
    """Losses and weights of a run."""
    lines = read_jsonl(folder / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return {
        "losses": losses,
        "adapter": (folder / "adapter/adapter_model.safetensors").read_bytes(),
    }


# ------------------------------------------------------------------------------------------------ kills


def jobs(harness: Harness) -> dict[str, Job]:
    """By name: what is killed, and what has to come out."""
    questions = harness.scratch / "questions.jsonl"
    rows = [{"Question": f"What is {'very ' * (number % 9)}bad?"} for number in range(64)]
    finetune_r1.write_jsonl(questions, rows)
    infer = ["infer", "--run", "done", "--file", questions, "-o", "a.jsonl", "--max-new-tokens", 24]
    formatted = ["format", "--model", harness.model, "--dataset", ROWS, "-o", "rows.jsonl"]

    def train(folder: Path) -> Work:
        if (folder / "new" / "run.json").exists():
            return command("train", "--resume", "new")
        options = ["--max-steps", 24, "--save-steps", 3, "--run-dir", "new"]
        return command(*harness.train(*options))

    def unpack(folder: Path) -> Work:
        def work() -> None:
            os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
            finetune_r1.demo_model()

        return work

    def report(folder: Path) -> dict[str, Any]:
        return {**read_json(folder / "done" / "eval.json"), "pairs": None}

    def answers(folder: Path) -> list[Any]:
        return [{**line, "seconds": 0} for line in read_jsonl(folder / "a.jsonl")]

    def unpacked(folder: Path) -> list[tuple[str, int]]:
        [model] = (folder / "cache").rglob("SmolLM2*")
        return sorted((path.name, path.stat().st_size) for path in model.iterdir())

    def pushed(folder: Path) -> list[str]:
        return sorted(harness.hub.repos["model", f"alice/{folder.name}"].files)

    def merged(folder: Path) -> list[bytes]:
        weights = sorted((folder / "done" / "merged").glob("*.safetensors"))
        return [path.read_bytes() for path in weights]

    def push(folder: Path) -> Work:
        repo = f"alice/{folder.name}"
        return command("push", "--repo", repo, "--run", "done", "--base-model", "org/base")

    limits = ["--answers", 4, "--max-new-tokens", 24]
    return {
        "train": (train, lambda folder: trained(folder / "new")),
        "save": (lambda folder: command("save", "--run", "done"), merged),
        "push": (push, pushed),
        "eval": (lambda folder: command("eval", "--run", "done", *limits), report),
        "infer --file": (lambda folder: command(*infer), answers),
        "format": (
            lambda folder: command(*formatted),
            lambda folder: (folder / "rows.jsonl").read_text(),
        ),
        "unpack": (unpack, unpacked),
    }


def kills(harness: Harness, times: int, names: list[str]) -> None:
    """Does every job undisturbed, then kills it once or twice and runs it again until it is done."""
    finished = harness.scratch / "finished"
    finished.mkdir()
    os.chdir(finished)
    harness.finish(*harness.train("--max-steps", 4, "--eval-rows", 4, "--run-dir", "done"))
    chosen = {name: job for name, job in jobs(harness).items() if not names or name in names}
    undisturbed = {}
    for name, (work, outcome) in chosen.items():
        folder = shutil.copytree(finished, harness.scratch / name.replace(" ", "-"))
        os.chdir(folder)
        started = time.monotonic()
        code, said = harness.perform(work(folder))
        assert code == 0, said
        undisturbed[name] = (time.monotonic() - started, outcome(folder))
        print(f"     {name:14} undisturbed: {undisturbed[name][0]:.1f} s", flush=True)
    for number in range(times):
        name = list(chosen)[number % len(chosen)]
        work, outcome = chosen[name]
        seconds, expected = undisturbed[name]
        folder = shutil.copytree(finished, harness.scratch / str(number))
        os.chdir(folder)
        moments = [harness.chance.uniform(0, seconds) for _ in range(harness.chance.choice([1, 2]))]
        codes: list[int] = []
        for moment in [*moments, 600]:
            if 0 not in codes:  # it was too quick for the signal
                code, said = harness.perform(work(folder), moment)
                codes.append(code)
                harness.lost += torn(folder)
        if codes[-1]:
            harness.lost.append(f"{name}: {codes}\n{said[-3000:]}")
        elif outcome(folder) != expected:
            harness.lost.append(f"{name}: killed after {moments}, it came to something else")
        when = ", ".join(f"{moment:.1f}" for moment in moments)
        print(f"{number:4} {name:14} killed after {when} of {seconds:.1f} s: {codes}", flush=True)
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------- soak


def random_command(harness: Harness) -> list[object]:
    """A training, mostly with sound options, or another command on one of the runs."""
    chance = harness.chance
    named = chance.choice([run.folder for run in Run.all()] or [Path("runs/none")])

    def mostly(bad: object, *good: object) -> object:
        return chance.choice(good) if chance.random() > 0.04 else bad

    fresh = {
        "--max-steps": chance.randint(1, 12),
        "--save-steps": chance.randint(1, 4),
        "--lora-r": mostly(0, 2, 4),
        "--keep-checkpoints": chance.randint(1, 3),
        "--eval-rows": mostly(200, 0, 2),
        "--lr-scheduler-type": chance.choice(["linear", "cosine", "constant"]),
        "--optim": mostly("adam", "adamw_8bit", "adamw_torch", "sgd"),
        "--micro-batch": mostly(3, 1, 2),
        "--split": mostly("train[:0]", "train[:12]", "train"),
        "--run-dir": mostly(named, f"runs/{chance.randrange(10**6)}"),
    }
    options = [part for pair in fresh.items() for part in pair]
    others: list[list[object]] = [
        ["train", "--resume"],
        ["train", "--resume", named, "--lora-r", 4],
        ["save", "--run", named],
        ["save", "--as", "gguf"],
        ["eval", "--run", named, "--answers", 1, "--max-new-tokens", 2],
        ["infer", "Why?", "--run", named, "--max-new-tokens", 2],
        ["push", "--repo", "a/b", "--base-model", "org/base", "--dry-run", "--run", named],
        ["runs"],
    ]
    return chance.choice([harness.train(*options), chance.choice(others)])


def soak(harness: Harness, times: int) -> None:
    """Random commands, a third with a signal; then every run is finished, resumed, or refused."""
    os.chdir(harness.scratch)
    for number in range(times):
        arguments = random_command(harness)
        kind = harness.chance.choice([0] * 4 + [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        moment = harness.chance.uniform(0, 3) if kind else 600
        started = time.time() - 1
        code, said = harness.perform(command(*arguments), moment, kind or signal.SIGKILL)
        harness.counts[f"exit code {code}"] += 1
        if code not in (0, 2, 130, 143, -9, -2, -15) and not explains(code, said):
            harness.lost.append(f"{arguments}: {code}\n{said[-3000:]}")
        harness.lost += torn(harness.scratch / "runs", started)
        print(f"{number:4} {code:4} signal {int(kind):2}", *arguments, flush=True)
    for run in Run.all():
        if run.record["status"] == "finished":
            run.adapter  # noqa: B018  (raises without one)
            continue
        code, said = harness.perform(command("train", "--resume", run.folder))
        harness.counts[f"resumed, exit code {code}"] += 1
        if code and not explains(code, said):
            harness.lost.append(f"{run} can't be resumed: {code}\n{said[-3000:]}")


# ------------------------------------------------------------------------------------ pushes and tracked


unhurried_client = finetune_r1.hub_client


def quick_client() -> Any:
    """The script's HTTP client, which waits for two seconds instead of 30."""
    client = unhurried_client()
    send = client.send

    def send_quickly(request: Any, **options: Any) -> Any:
        request.extensions["timeout"] = dict.fromkeys(request.extensions["timeout"], 2)
        return send(request, **options)

    client.send = send_quickly
    return client


def random_faults(harness: Harness, within: int) -> list[Fault]:
    return [
        chance_fault(harness.chance, within=within) for _ in range(harness.chance.randint(1, 2))
    ]


def describe(faults: list[Fault]) -> str:
    return ", ".join(str(fault.status or f"{min(fault.delay, 99)} s late") for fault in faults)


def is_complete(hub: HubServer, repo: str) -> bool:
    """Whether the repository has the run's weights and adapter, byte for byte."""
    wanted = {path.name: path for path in Path("done/merged").glob("*.safetensors")}
    name = "adapter/adapter_model.safetensors"
    wanted[name] = Path("done", name)
    found = hub.repos.get(("model", repo))
    files = found.files if found else {}
    return all(files.get(name) == path.read_bytes() for name, path in wanted.items())


def pushes(harness: Harness, times: int) -> None:
    """A push says that it is complete exactly where it is, and another one completes it."""
    from huggingface_hub import constants  # reads the endpoint that main sets

    os.chdir(harness.scratch)
    harness.finish(*harness.train("--max-steps", 2, "--run-dir", "done"))
    harness.finish("save", "--run", "done")
    finetune_r1.READ_AGAIN_SECONDS = 1

    def push(repo: str, way: str) -> tuple[int, str]:
        def work() -> None:
            constants.HF_HUB_DISABLE_XET = way == "lfs"
            command("push", "--repo", repo, "--run", "done", "--base-model", "org/base")()

        return harness.perform(work, 90)

    finetune_r1.hub_client = quick_client
    for number in range(times):
        repo = f"alice/push-{number}"
        way = harness.chance.choice(["lfs", "xet"])
        if harness.chance.random() < 0.3:
            harness.hub.add_repo("model", repo, {"notes.md": b"mine"})
        faults = random_faults(harness, within=20)
        name = f"push {number} by {way}, {describe(faults)}"
        harness.hub.faults[:] = faults
        started = time.monotonic()
        code, said = push(repo, way)
        seconds = time.monotonic() - started
        harness.hub.faults.clear()
        complete = is_complete(harness.hub, repo)
        harness.counts[f"exit code {code}, {'complete' if complete else 'not complete'}"] += 1
        honest = complete if code == 0 else not complete or "could not be read back" in said
        if not honest or (code and not explains(code, said)):
            harness.lost.append(f"{name}: {code}, complete: {complete}\n{said[-1500:]}")
        if code:
            again, said = push(repo, way)
            if again or not is_complete(harness.hub, repo):
                harness.lost.append(f"{name}: once more, {again}\n{said[-1500:]}")
        print(f"{number:4} {code:4} {seconds:5.1f} s  complete {complete!s:5}  {name}", flush=True)
    finetune_r1.hub_client = unhurried_client


def tracked(harness: Harness, times: int) -> None:
    """Whatever W&B does, a training ends well, and says how W&B gets what it lacks."""
    os.chdir(harness.scratch)
    key = "a" * 40
    os.environ |= {"WANDB_API_KEY": key, "WANDB_MODE": "online"}
    for number in range(times):
        run = Run(Path(f"runs/{number}"))
        with WandbServer(keys={key: "alice"}) as server:
            os.environ["WANDB_BASE_URL"] = server.url
            server.faults += random_faults(harness, within=40)
            name = f"training {number}, {describe(server.faults)}"
            line = harness.train("--wandb", "--max-steps", 24, "--run-dir", run)
            started = time.monotonic()
            code, said = harness.perform(command(*line), 120)
            seconds = time.monotonic() - started
        steps = set()
        for logged in server.runs.values():
            steps |= {row.get("train/global_step") for row in logged.history}
        arrived = steps >= set(range(1, 25))
        harness.counts[f"exit code {code}, {'all' if arrived else 'not all'} at W&B"] += 1
        if code == 0:
            finished = run.record["status"] == "finished" and run.adapter.is_dir()
            noted = "wandb sync" in said or "without W&B" in said
            good = finished and (arrived or noted)
        else:
            good = explains(code, said) and "step 00001" not in said
        if not good:
            harness.lost.append(f"{name}: {code}, arrived: {arrived}\n{said[-1500:]}")
        print(f"{number:4} {code:4} {seconds:5.1f} s  arrived {arrived!s:5}  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(TIMES), nargs="+")
    parser.add_argument("--times", type=int)
    parser.add_argument("--only", help="of the jobs to kill, separated by commas")
    parser.add_argument("--model", type=Path, help="default: two layers of random weights")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="survive-"))
    lost = 0
    with HubServer(tokens={"hf_writetoken": ("alice", "write")}) as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writetoken"}
        finetune_r1.prepare_environment()
        finetune_r1.import_unsloth(for_training=True)
        for module in ("peft", "trl", "wandb", "matplotlib.pyplot", "datasets", "pandas"):
            __import__(module)
        model = scratch / "tiny"
        if options.model:
            shutil.copytree(options.model, model)
        else:
            small_model(model)
        for what in options.what:
            (scratch / what).mkdir()
            harness = Harness(scratch / what, model, hub, options.seed)
            times = options.times or TIMES[what]
            started = time.monotonic()
            if what == "kills":
                kills(harness, times, options.only.split(",") if options.only else [])
            else:
                {"soak": soak, "pushes": pushes, "tracked": tracked}[what](harness, times)
            seconds = time.monotonic() - started
            print(json.dumps(harness.counts, indent=2))
            print(*harness.lost, sep="\n")
            print(f"{what}: {times} in {seconds:.0f} s, lost: {len(harness.lost)}", flush=True)
            lost += len(harness.lost)
    os.chdir(PROJECT)
    shutil.rmtree(scratch)
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
