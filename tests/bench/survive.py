"""What is left after kill -9, Ctrl-C and SIGTERM at random moments: a tiny model, a CPU, all else as it is.

    uv run tests/bench/survive.py kills [--times 35]     each command killed, begun again, and compared
    uv run tests/bench/survive.py soak [--times 200]     short runs, random options and signals, one folder
    uv run tests/bench/survive.py pushes [--times 100]   each to a Hub with random faults, by LFS and by Xet
    uv run tests/bench/survive.py tracked [--times 40]   trainings, each with a W&B that has random faults

Every command runs in a process of its own, forked from this one after the imports, so that it starts at once.
After each, every file that has a name of its own has to be whole. Prints a line a command and in the end what
was lost. The services' faults are of a seed, and the deadlines are seconds there instead of minutes.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_DISABLE_XET": "1",
    "NO_PROXY": "127.0.0.1",
}
PROJECT = Path(__file__).parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from servers.base import chance_fault  # noqa: E402
from servers.hub import HubServer  # noqa: E402
from servers.wandb_server import WandbServer  # noqa: E402
from speed import tiny_model  # noqa: E402

import finetune_r1  # noqa: E402
from finetune_r1 import Run, read_json, read_jsonl  # noqa: E402

ROWS = PROJECT / "data" / "medical_sample.jsonl"
SMALL = ["--max-seq-length", "512", "--effective-batch", "2", "--max-new-tokens", "4", "--logging-steps", "1",
         "--learning-rate", "1e-2", "--warmup-steps", "1", "--no-load-in-4bit", "--no-wandb"]  # fmt: skip


def start(work: Callable[[], Any], log: Path) -> int:
    """Forks; the child's exit code is that of `work`, or 70 if it ended in a traceback."""
    if pid := os.fork():
        return pid
    code: Any = 70
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        finetune_r1.STARTED = time.monotonic()
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def command(*arguments: object) -> Callable[[], Any]:
    def work() -> None:
        sys.argv = ["finetune_r1.py", *map(str, arguments)]
        finetune_r1.app(sys.argv[1:], prog_name="finetune_r1.py")

    return work


def ended(pid: int, after: float | None = None, number: int = signal.SIGKILL) -> int:
    """The exit code, negative for a signal; sends one `after` so many seconds unless it has ended by then."""
    until = time.monotonic() + (after if after is not None else 600)
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def torn(folder: Path, since: float = 0) -> list[str]:
    """Files with a name of their own, written since then, that cannot be read to their end."""
    from PIL import Image
    from safetensors import safe_open

    broken = []
    for path in folder.rglob("*"):
        if (
            path.is_dir()
            or path.stat().st_mtime < since
            or any(part.startswith(".") for part in path.relative_to(folder).parts)
        ):
            continue
        try:
            if path.suffix == ".json":
                read_json(path)
            elif path.suffix == ".safetensors":
                safe_open(path, "np")
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".jsonl":
                read_jsonl(path)
        except Exception as error:
            broken.append(f"{path}: {type(error).__name__}: {error}")
    return broken


def run_cli(folder: Path) -> dict[str, Any]:
    """What a run has come to, less times."""
    run = Run(folder)
    losses = {
        line["step"]: line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line
    }
    return {
        "losses": losses,
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
    }


STATUSES = ("finished", *finetune_r1.UNFINISHED)
USUAL = {"kills": 35, "soak": 200, "pushes": 100, "tracked": 40}
Job = tuple[Callable[[Path], Callable[[], Any]], Callable[[Path], Any]]


def jobs(model: Path, hub: HubServer) -> dict[str, Job]:
    """By name: the work in a folder that holds a finished run, and what can be compared when it is done."""
    train = [
        "train",
        "--model",
        model,
        "--dataset",
        ROWS,
        *SMALL,
        "--max-steps",
        24,
        "--save-steps",
        3,
    ]
    rows = [
        "format",
        "--model",
        model,
        "--dataset",
        ROWS,
        "--max-seq-length",
        512,
        "-o",
        "rows.jsonl",
    ]
    questions = model.parent / "questions.jsonl"
    finetune_r1.write_jsonl(
        questions, ({"Question": f"What is {'very ' * (n % 9)}bad?"} for n in range(64))
    )
    asked = ["infer", "--run", "done", "--file", questions, "-o", "a.jsonl", "--max-new-tokens", 24]

    def training(folder: Path) -> Callable[[], Any]:
        begun = (folder / "new" / "run.json").exists()
        return command("train", "--resume", "new") if begun else command(*train, "--run-dir", "new")

    def unpacking(folder: Path) -> Callable[[], Any]:
        return lambda: (
            os.environ.update(XDG_CACHE_HOME=str(folder / "cache")),
            finetune_r1.demo_model(),
        )

    return {
        "train": (training, lambda folder: run_cli(folder / "new")),
        "save": (
            lambda folder: command("save", "--run", "done"),
            lambda folder: (folder / "done" / "merged" / "model.safetensors").read_bytes(),
        ),
        "push": (
            lambda folder: command("push", "--repo", f"alice/{folder.name}", "--run", "done"),
            lambda folder: sorted(hub.repos["model", f"alice/{folder.name}"].files),
        ),
        "eval": (
            lambda folder: command("eval", "--run", "done", "--answers", 4, "--max-new-tokens", 24),
            lambda folder: {
                k: v for k, v in read_json(folder / "done" / "eval.json").items() if k != "pairs"
            },
        ),
        "infer --file": (
            lambda folder: command(*asked),
            lambda folder: [{**line, "seconds": 0} for line in read_jsonl(folder / "a.jsonl")],
        ),
        "format": (
            lambda folder: command(*rows),
            lambda folder: (folder / "rows.jsonl").read_text(),
        ),
        "unpacking": (
            unpacking,
            lambda folder: sorted(
                finetune_r1.file_sizes(next((folder / "cache").rglob("SmolLM2*"))).items()
            ),
        ),
    }


def kills(
    times: int, model: Path, all_jobs: dict[str, Job], scratch: Path, chance: random.Random
) -> list[str]:
    """Every job is done undisturbed, then killed once or twice at random and begun again until it is done."""
    lost: list[str] = []
    finished = scratch / "finished"
    finished.mkdir()
    os.chdir(finished)
    train = [
        "train",
        "--model",
        model,
        "--dataset",
        ROWS,
        *SMALL,
        "--max-steps",
        4,
        "--eval-rows",
        4,
    ]
    assert ended(start(command(*train, "--run-dir", "done"), scratch / "log")) == 0, (
        scratch / "log"
    ).read_text()
    undisturbed = {}
    for name, (work, outcome) in all_jobs.items():
        shutil.copytree(finished, folder := scratch / name.replace(" ", "-"))
        os.chdir(folder)
        began = time.monotonic()
        assert ended(start(work(folder), folder / "log")) == 0, (folder / "log").read_text()
        undisturbed[name] = time.monotonic() - began, outcome(folder)
        print(f"     {name:14} undisturbed: {undisturbed[name][0]:.1f} s", flush=True)
    for number in range(times):
        name = list(all_jobs)[number % len(all_jobs)]
        (work, outcome), (seconds, expected) = all_jobs[name], undisturbed[name]
        shutil.copytree(finished, folder := scratch / f"{number}")
        os.chdir(folder)
        moments = [chance.uniform(0, seconds) for _ in range(chance.choice([1, 2]))]
        codes: list[int] = []
        for moment in [*moments, None]:
            if 0 not in codes:  # it was too quick for the signal
                codes.append(ended(start(work(folder), folder / "log"), moment))
                lost += torn(folder)
        if codes[-1]:
            lost.append(f"{name}: {codes}\n{(folder / 'log').read_text()[-3000:]}")
        elif outcome(folder) != expected:
            lost.append(f"{name}: killed after {moments}, it came to something else")
        when = ", ".join(f"{moment:.1f}" for moment in moments)
        print(
            f"{number:4} {name:14} killed after {when} of {seconds:.1f} s, exit codes {codes}",
            flush=True,
        )
        shutil.rmtree(folder)
    return lost


def soak(times: int, model: Path, scratch: Path, chance: random.Random) -> list[str]:
    """Random commands, a third with a signal; then every run has to be finished, go on, or be refused."""
    os.chdir(scratch)
    lost, codes, log = [], Counter[str](), scratch / "log"
    base = ["train", "--model", model, "--dataset", ROWS, *SMALL]

    def mostly(bad: Any, *good: Any) -> Any:
        return chance.choice(good) if chance.random() > 0.04 else bad

    def choose() -> list[Any]:
        named = chance.choice([run.folder for run in Run.all(*STATUSES)] or [Path("runs/none")])
        fresh = [*base, "--max-steps", chance.randint(1, 12), "--save-steps", chance.randint(1, 4),
                 "--lora-r", mostly(0, 2, 4), "--keep-checkpoints", chance.randint(1, 3),
                 "--eval-rows", mostly(200, 0, 2), "--overlong", mostly("error", "shorten-thought", "drop"),
                 "--lr-scheduler-type", chance.choice(["linear", "cosine", "constant"]),
                 "--optim", mostly("adam", "adamw_8bit", "adamw_torch", "sgd"),
                 "--micro-batch", mostly(3, 1, 2), "--split", mostly("train[:0]", "train[:12]", "train"),
                 "--run-dir", mostly(named, f"runs/{chance.randrange(10**6)}")]  # fmt: skip
        others: list[list[Any]] = [
            ["train", "--resume"], ["train", "--resume", named, "--max-time", "1s"], ["save", "--run", named],
            ["train", "--resume", named, "--lora-r", 4], ["save", "--as", "gguf"],
            ["eval", "--run", named, "--answers", 1, "--max-new-tokens", 2],
            ["infer", "Why?", "--run", named, "--max-new-tokens", 2],
            ["push", "--repo", "a/b", "--dry-run", "--run", named],
        ]  # fmt: skip
        return chance.choice([fresh, chance.choice(others)])

    for number in range(times):
        arguments, number_sent = (
            choose(),
            chance.choice([None] * 4 + [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]),
        )
        moment = chance.uniform(0, 3) if number_sent else None
        before, began = log.stat().st_size if log.exists() else 0, time.time() - 1
        code = ended(start(command(*arguments), log), moment, number_sent or signal.SIGKILL)
        said = log.read_text(errors="replace")[before:]
        codes[f"exit code {code}"] += 1
        if code not in (0, 1, 2, 130, 143, -9, -2, -15) or (code == 1 and "next:" not in said):
            lost.append(f"{arguments}: {code}\n{said[-3000:]}")
        lost += torn(scratch / "runs", since=began)
        options = arguments[len(base) :] if arguments[: len(base)] == base else arguments
        print(f"{number:4} {code:4} {number_sent and number_sent.name}", *options, flush=True)
    for run in Run.all(*STATUSES):
        if run.record["status"] != "finished":
            before = log.stat().st_size
            code = ended(start(command("train", "--resume", run.folder), log))
            said = log.read_text(errors="replace")[before:]
            codes[
                "unfinished, went on to its end"
                if code == 0
                else "unfinished, refused with a message"
            ] += 1
            if code not in (0, 1) or (code == 1 and "next:" not in said):
                lost.append(f"{run} does not go on: {code}\n{said[-3000:]}")
        elif not run_cli(run.folder)["adapter"]:
            lost.append(f"{run} is finished without an adapter")
        codes["runs in the end"] += 1
    print(json.dumps(codes, indent=2))
    return lost


def said_why(code: int, said: str) -> bool:
    """Whether a command that did not end well said what to do, and that in words."""
    return code == 1 and "next:" in said and "Traceback" not in said


def pushes(
    times: int, model: Path, hub: HubServer, scratch: Path, chance: random.Random
) -> list[str]:
    """A push has to end, to say that it is complete exactly where it is, and to be completed by another."""
    from huggingface_hub import constants  # not before main has set the endpoint, which it reads

    os.chdir(scratch)
    lost, codes, log = [], Counter[str](), scratch / "log"
    for line in (
        [
            "train",
            "--model",
            model,
            "--dataset",
            ROWS,
            *SMALL,
            "--max-steps",
            2,
            "--run-dir",
            "done",
        ],
        ["save", "--run", "done"],
    ):
        assert ended(start(command(*line), log)) == 0, log.read_text()
    finetune_r1.SILENT_SECONDS = {"whoami": 2, "": 1}
    finetune_r1.STALLED_SECONDS, finetune_r1.READ_AGAIN_SECONDS = 6, 1

    def push(repo: str, way: str, limit: float) -> tuple[int, str]:
        def work() -> None:
            constants.HF_HUB_DISABLE_XET = way == "lfs"
            command("push", "--repo", repo, "--run", "done")()

        before = log.stat().st_size
        code = ended(start(work, log), limit)
        return code, log.read_text(errors="replace")[before:]

    for number in range(times):
        repo, way = f"alice/{number}", chance.choice(["lfs", "xet"])
        if chance.random() < 0.3:
            hub.add_repo("model", repo, {"notes.md": b"mine"})
        faults = [chance_fault(chance, within=20) for _ in range(chance.choice([1, 1, 2]))]
        hub.faults[:] = faults
        told_as = [
            f"{fault.status or ('stall' if fault.delay > 1 else 'delay')}" for fault in faults
        ]
        began = time.monotonic()
        code, said = push(repo, way, 90)
        seconds = time.monotonic() - began
        hub.faults.clear()
        whole = complete(hub, repo, Path("done"))
        unread = "could not be read back" in said
        codes[f"exit code {code}, {'complete' if whole else 'not complete'}"] += 1
        if code == -signal.SIGKILL:
            lost.append(
                f"push {number} by {way}, {told_as}: had not ended after {seconds:.0f} s\n{said[-1500:]}"
            )
        elif (code == 0) != whole and not (whole and unread):
            lost.append(
                f"push {number} by {way}, {told_as}: {code}, complete: {whole}\n{said[-1500:]}"
            )
        elif code and not said_why(code, said):
            lost.append(f"push {number} by {way}, {told_as}: {code}\n{said[-1500:]}")
        again, said = push(repo, way, 90) if code else (0, "")
        if again or not complete(hub, repo, Path("done")):
            lost.append(f"push {number} by {way}, {told_as}: once more, {again}\n{said[-1500:]}")
        print(f"{number:4} {way} {code:4} {seconds:5.1f} s  {whole!s:5}  {told_as}", flush=True)
    print(json.dumps(codes, indent=2))
    return lost


def complete(hub: HubServer, repo: str, run: Path) -> bool:
    """Whether the repository has the weights and the adapter of the run, byte for byte."""
    there = hub.repos.get(("model", repo))
    wanted = {"model.safetensors": run / "merged" / "model.safetensors"}
    wanted["adapter/adapter_model.safetensors"] = run / "adapter" / "adapter_model.safetensors"
    return there is not None and all(
        name in there.files and there.files[name] == path.read_bytes()
        for name, path in wanted.items()
    )


def tracked(times: int, model: Path, scratch: Path, chance: random.Random) -> list[str]:
    """A training ends whatever W&B does, and what W&B lacks is run_cli; or it is refused before it begins."""
    os.chdir(scratch)
    lost, codes, log = [], Counter[str](), scratch / "log"
    finetune_r1.WANDB_SECONDS = 5
    options = [option for option in SMALL if option != "--no-wandb"]
    for number in range(times):
        with WandbServer(keys={"a" * 40: "alice"}) as server:
            os.environ |= {
                "WANDB_BASE_URL": server.url,
                "WANDB_API_KEY": "a" * 40,
                "WANDB_MODE": "online",
            }
            server.faults += [
                chance_fault(chance, within=40) for _ in range(chance.choice([1, 1, 2]))
            ]
            told_as = [
                f"{f.status or ('stall' if f.delay > 1 else 'delay')}" for f in server.faults
            ]
            line = ["train", "--model", model, "--dataset", ROWS, *options, "--max-steps", 24]
            before, began = log.stat().st_size if log.exists() else 0, time.monotonic()
            code = ended(start(command(*line, "--run-dir", f"runs/{number}"), log), 120)
            seconds, said = time.monotonic() - began, log.read_text(errors="replace")[before:]
        run, rows = Run(Path(f"runs/{number}")), [row.history for row in server.runs.values()]
        arrived = bool(rows) and {row.get("train/global_step") for row in rows[0]} >= set(
            range(1, 25)
        )
        codes[f"exit code {code}, {'all' if arrived else 'not all'} at W&B"] += 1
        if code == 0:
            status, has = (
                run.record["status"],
                (run / "adapter" / "adapter_model.safetensors").exists(),
            )
            if status != "finished" or not has or not (arrived or "wandb sync" in said):
                lost.append(
                    f"training {number}, {told_as}: {status}, {has}, {arrived}\n{said[-1500:]}"
                )
        elif not said_why(code, said) or "step 00001" in said:
            lost.append(
                f"training {number}, {told_as}: {code} after {seconds:.0f} s\n{said[-1500:]}"
            )
        print(f"{number:4} {code:4} {seconds:5.1f} s  {arrived!s:5}  {told_as}", flush=True)
    print(json.dumps(codes, indent=2))
    return lost


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(USUAL), nargs="+")
    parser.add_argument("--times", type=int)
    parser.add_argument("--only", help="of the jobs to kill, separated by commas")
    parser.add_argument("--model", type=Path, help="default: two layers of random weights")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="survive-"))
    with HubServer(tokens={"hf_writetoken": ("alice", "write")}) as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writetoken"}
        finetune_r1.prepare_environment()
        finetune_r1.import_unsloth()
        for module in ("peft", "trl", "wandb", "matplotlib.pyplot", "datasets"):
            __import__(module)
        model = (
            shutil.copytree(asked.model, scratch / "tiny")
            if asked.model
            else tiny_model(scratch / "tiny")
        )
        all_jobs = {
            name: job
            for name, job in jobs(model, hub).items()
            if not asked.only or name in asked.only.split(",")
        }
        lost = []
        for what in asked.what:
            (folder := scratch / what).mkdir()
            began, chance, times = (
                time.monotonic(),
                random.Random(asked.seed),
                asked.times or USUAL[what],
            )
            if what == "kills":
                found = kills(times, model, all_jobs, folder, chance)
            elif what == "pushes":
                found = pushes(times, model, hub, folder, chance)
            else:
                found = {"soak": soak, "tracked": tracked}[what](times, model, folder, chance)
            print(
                *found,
                f"{what}: {times} in {time.monotonic() - began:.0f} s, lost: {len(found)}",
                sep="\n",
                flush=True,
            )
            lost += found
    os.chdir(PROJECT)
    shutil.rmtree(scratch)
    sys.exit(bool(lost))
