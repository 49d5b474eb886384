"""README's three lines as typed, against a Hub on loopback that has what is published.

    python3 tests/bench/three_lines.py [PHASE ...] [--gpu FOLDER] [--ram FOLDER] [--seconds S]
    python3 tests/bench/three_lines.py --tiny        two small layers on a CPU, to check that it works

`make` and `serve` put up the Hub: the default model in 16 bit, its ready 4-bit repository, and the dataset.
`train`, `infer` and `push` are typed in a fresh home, with a proxy that notes every request elsewhere. `check`
loads what was pushed by its name, from an empty cache (by_name.py); `check-old` with the packages in --old.
After `unplug`, which ends the Hub, `offline-train` and `offline-infer` use the cache. Without names all phases
run that have not yet: a second call continues, as the Hub is a process of its own. A phase begins only if
--seconds leave its usual time. Prints for each phase its seconds, the most GB on disk and memory disk, the most
anonymous memory (GiB), requests elsewhere, and what it said; all output is in WORK/log.txt.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parents[2]
BASE = "unsloth/DeepSeek-R1-Distill-Llama-8B"
PUSHED = "alice/DeepSeek-R1-Medical-COT"
TOKEN = "hf_writetoken"
# Puts the seconds since the line was typed before each line of its stderr.
TIMED = """while IFS= read -r line; do printf '%4d  %s\\n' "$SECONDS" "$line"; done"""
NOT_INHERITED = (
    "HF_",
    "HUGGING",
    "TRANSFORMERS_",
    "WANDB_",
    "UNSLOTH_",
    "KAGGLE_",
    "XDG_",
    "NETRC",
)
FACTS = {  # as printed; the first and the last of each are shown
    "s/step": r"([\d.]+) s/step",
    "loss": r"loss ([\d.]+)  [\d.]+ s/step",
    "planned GiB": r"estimated\s+peak\s+([\d.]+)",
    "peak GiB": r"peak memory \(GiB\): +([\d.]+)",
    "answer": r"(\d+ tokens, [\d.]+ s)",
    "verified": r"verified: +(.*)",
    "error": r"error: (.*)",
}


class Place:
    """Where everything is, and what was done. The user's files are on the disk, if it has room."""

    def __init__(self, options: argparse.Namespace):
        self.work, self.ram, self.gpu, self.old = (
            path and path.resolve()
            for path in (options.work, options.ram, options.gpu, options.old)
        )
        for folder in (self.work, self.ram):
            folder.mkdir(parents=True, exist_ok=True)
        self.tiny = options.tiny
        self.rows = self.gpu / "medical_o1_en.jsonl"
        if self.tiny:
            self.rows = PROJECT / "data" / "medical_sample.jsonl"
        self.base = BASE.replace("8B", "0.01B") if self.tiny else BASE  # no 8B without a GPU
        file = self.work / "state.json"
        self.state: dict[str, Any] = {"user": str(self.roomy(46e9) / "user"), "phases": {}}
        if file.exists():
            self.state = json.loads(file.read_text())
        self.user = Path(self.state["user"])
        self.user.mkdir(exist_ok=True)

    def roomy(self, size: float) -> Path:
        """The disk if it has room for so many bytes, else the memory disk."""
        return self.work if shutil.disk_usage(self.work).free > size else self.ram

    def save(self) -> None:
        (self.work / "state.json").write_text(json.dumps(self.state, indent=2, ensure_ascii=False))

    def environment(self, home: Path) -> dict[str, str]:
        """A user's, with a token and the Hub's address; nothing of the libraries' is inherited."""
        home.mkdir(parents=True, exist_ok=True)
        kept = {}
        for name, value in os.environ.items():
            if not name.startswith(NOT_INHERITED) and not name.lower().endswith("_proxy"):
                kept[name] = value
        return {
            **kept,
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_TOKEN": TOKEN,
            "HF_ENDPOINT": self.state["hub"]["url"],
            "http_proxy": self.state["hub"]["elsewhere"],
            "https_proxy": self.state["hub"]["elsewhere"],
            "no_proxy": "127.0.0.1",
        }

    def run(
        self, name: str, line: str, environment: dict[str, str], limit: float
    ) -> dict[str, Any]:
        """Types a line in the user's folder; returns how it ended and what it said."""
        started = time.monotonic()
        files = [self.work / f"{name}.{end}" for end in ("out", "err")]
        with files[0].open("w") as out, files[1].open("w") as err:
            process = subprocess.Popen(
                ["bash", "-c", f"{line} 2> >({TIMED} >&2)"],
                cwd=self.user,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            most = watch(process, [self.work, self.ram], limit)
        seconds = round(time.monotonic() - started, 1)
        out, err = (file.read_text(errors="replace") for file in files)
        with (self.work / "log.txt").open("a") as log:
            log.write(f"\n===== {name}: {line}\n{out}\n----- stderr\n{err}\n")
            log.write(f"----- exit code {process.returncode} after {seconds} s\n")
        facts = {}
        for fact, pattern in FACTS.items():
            found = re.findall(pattern, f"{out}\n{err}")
            if found:
                facts[fact] = " to ".join(dict.fromkeys([found[0], found[-1]]))
        return {"ok": process.returncode == 0, "seconds": seconds, "facts": facts, **most}


def watch(process: subprocess.Popen[bytes], disks: list[Path], limit: float) -> dict[str, float]:
    """Waits for a process; returns the most GB added to each disk, and GiB of anonymous memory."""
    before = [shutil.disk_usage(disk).used for disk in disks]
    added = [0.0, 0.0]
    anonymous = 0.0
    until = time.monotonic() + limit
    while process.poll() is None:
        if time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for number, disk in enumerate(disks):
            now = (shutil.disk_usage(disk).used - before[number]) / 1e9
            added[number] = round(max(added[number], now), 1)
        anonymous = max(anonymous, anonymous_gib(process.pid))
        time.sleep(0.2)
    return {"disk_gb": added[0], "ram_gb": added[1], "anonymous_gib": round(anonymous, 2)}


def anonymous_gib(pid: int) -> float:
    """Anonymous memory of a process and its descendants, as Linux counts it."""
    kib = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(OSError):  # it has ended
                status = Path(f"/proc/{process.pid}/status").read_text()
                kib += sum(map(int, re.findall(r"RssAnon:\s+(\d+)", status)))
    return kib / 1024**2


# ---------------------------------------------------------------------------------------------- phases

# Of a place, the phase's name, and the most seconds it may take.
Phase = Callable[[Place, str, float], dict[str, Any]]


def make(place: Place, name: str, limit: float) -> dict[str, Any]:
    """The models' repositories."""
    if place.tiny:
        import speed

        tiny = speed.small_model(place.ram / "r1")
        speed.published.write_four_bit(place.ram / "r1-4bit", tiny)
        return {"ok": True}
    maker = f"{sys.executable} {place.gpu}/make_8b.py --vocabulary {place.gpu}/tokenizer.model"
    line = f"{maker} --out {place.ram}/r1 --four-bit {place.ram}/r1-4bit"
    return place.run(name, line, {**os.environ, "HF_HUB_OFFLINE": "1"}, limit)


def serve(place: Place, name: str, limit: float) -> dict[str, Any]:
    """Starts published_hub.py in a session of its own."""
    ready = place.work / "hub.json"
    ready.unlink(missing_ok=True)
    command = [sys.executable, PROJECT / "tests" / "bench" / "published_hub.py", place.work]
    command.append(place.rows)
    four_bit = f"{place.base}-unsloth-bnb-4bit"
    for model, folder in ((place.base, place.ram / "r1"), (four_bit, place.ram / "r1-4bit")):
        if folder.exists():
            command.append(f"{model}={folder}")
    with (place.work / "served.err").open("w") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(place.ram)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    until = time.monotonic() + limit
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError((place.work / "served.err").read_text()[-1000:] or "no Hub in time")
        time.sleep(0.1)
    place.state["hub"] = json.loads(ready.read_text())
    return {"ok": True}


def unplug(place: Place, name: str, limit: float) -> dict[str, Any]:
    """Ends the Hub; the proxy stays."""
    os.kill(place.state["hub"]["pid"], signal.SIGUSR1)
    time.sleep(2)
    port = int(place.state["hub"]["url"].rpartition(":")[2])
    with socket.socket() as client:
        return {"ok": client.connect_ex(("127.0.0.1", port)) != 0}


def typed(line: str, tiny: str = "") -> Phase:
    """A line after `python3 finetune_r1.py`; with --tiny also the options `tiny`."""

    def phase(place: Place, name: str, limit: float) -> dict[str, Any]:
        for file in ("finetune_r1.py", "prompts.py"):
            shutil.copy(PROJECT / file, place.user)
        shutil.copytree(PROJECT / "data", place.user / "data", dirs_exist_ok=True)
        environment = place.environment(place.user / "home")
        if name.startswith("offline"):  # the proxy would note what is asked of the real Hub
            environment["HF_HUB_OFFLINE"] = "1"
            del environment["HF_ENDPOINT"]
        whole = f"python3 finetune_r1.py {line}"
        if place.tiny:
            whole += f" {tiny.format(place.base)}"
        return place.run(name, whole, environment, limit)

    return phase


def check(place: Place, name: str, limit: float) -> dict[str, Any]:
    """Loads what was pushed; the base is the user's download, which need not be there twice."""
    home = Path(place.state.setdefault("check", str(place.roomy(20e9) / "check")))
    environment = place.environment(home)
    base = f".cache/huggingface/hub/models--{place.base.replace('/', '--')}"
    if not (home / base).exists():
        (home / base).parent.mkdir(parents=True, exist_ok=True)
        (home / base).symlink_to(place.user / "home" / base)
    if name == "check-old":
        environment["PYTHONPATH"] = f"{place.old}:{environment.get('PYTHONPATH', '')}"
    result = place.work / f"{name}.json"
    script = PROJECT / "tests" / "bench" / "by_name.py"
    line = f"python3 {script} {PUSHED} {place.base} {place.rows} {result}"
    record = place.run(name, line, environment, limit)
    facts = json.loads(result.read_text())
    return {**record, "ok": record["ok"] and not facts["problems"], "facts": facts}


TINY = "--model {} --max-seq-length 1024 --effective-batch 2 --max-new-tokens 8"
OFFLINE = "train --max-steps 3 --warmup-steps 1 --max-new-tokens 40"
PHASES: dict[str, tuple[Phase, float, float]] = {  # with its usual and most seconds on a GPU
    "make": (make, 60, 200),
    "serve": (serve, 15, 60),
    "train": (
        typed("train --max-steps 60", f"{TINY} --max-steps 8 --learning-rate 1e-2"),
        130,
        270,
    ),
    "infer": (typed('infer "What widens the anion gap?"', "--max-new-tokens 20"), 50, 130),
    "push": (typed(f"push --repo {PUSHED}"), 160, 330),
    "check": (check, 60, 240),
    "check-old": (check, 50, 150),
    "unplug": (unplug, 1, 20),
    "offline-train": (typed(OFFLINE, TINY), 60, 170),
    "offline-infer": (typed('infer "question"', "--max-new-tokens 8"), 40, 130),
}


def perform(place: Place, name: str, limit: float) -> None:
    """Runs a phase, notes what it asked elsewhere, and prints what came out."""
    elsewhere = place.work / "elsewhere.log"
    before = elsewhere.stat().st_size if elsewhere.exists() else 0
    started = time.monotonic()
    try:
        record = PHASES[name][0](place, name, limit)
    except Exception as error:
        record = {"ok": False, "facts": {"harness": f"{type(error).__name__}: {error}"}}
    asked = elsewhere.read_text()[before:].splitlines() if elsewhere.exists() else []
    # `datasets` makes that name of the endpoint's: it is the Hub's.
    record["elsewhere"] = [line for line in asked if "//datasets-server.127.0.0.1" not in line]
    record["ok"] = record["ok"] and not record["elsewhere"]
    place.state["phases"][name] = {"seconds": round(time.monotonic() - started, 1), **record}
    place.save()
    shown = {key: value for key, value in place.state["phases"][name].items() if key != "facts"}
    print(f"{name}: {json.dumps(shown)}")
    for fact, value in record.get("facts", {}).items():
        print(f"    {fact}: {value if isinstance(value, str) else json.dumps(value)}")
    sys.stdout.flush()


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phases", nargs="*", help=f"of {', '.join(PHASES)}")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--gpu", type=Path, default=PROJECT / ".gpu", help="make_8b.py and its files"
    )
    parser.add_argument(
        "--old", type=Path, help="a folder with transformers 4.57 and what it needs"
    )
    parser.add_argument(
        "--ram", type=Path, default="/dev/shm/three-lines", help="72 GB for the Hub"
    )
    parser.add_argument("--work", type=Path, default="/tmp/three-lines", help="46 GB for the user")
    parser.add_argument("--seconds", type=float, default=3600)
    options = parser.parse_args()
    place = Place(options)
    done = place.state["phases"]
    for name in options.phases or [name for name in PHASES if name not in done]:
        left = options.seconds - (time.monotonic() - started)
        if left < PHASES[name][1]:
            break
        if name != "check-old" or place.old:
            perform(place, name, min(PHASES[name][2], left))
            if name in ("make", "serve") and not done[name]["ok"]:
                break
    print("left:", *[name for name in PHASES if name not in done] or ["nothing"])
    if "offline-infer" in done:
        os.kill(place.state["hub"]["pid"], signal.SIGTERM)


if __name__ == "__main__":
    main()
