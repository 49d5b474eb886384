"""The three lines that a user types, as typed, against what is published, which a Hub on loopback serves.

    python3 tests/bench/three_lines.py [PHASE ...] [--ram FOLDER] [--out FOLDER] [--old FOLDER] [--seconds S]
    .venv/bin/python tests/bench/three_lines.py --tiny      a tiny model on a CPU, to see that all this works

`make` and `serve` put up the Hub: the default model, in 16 bit and as the 4-bit copy that Unsloth takes, and
the dataset. `train`, `infer` and `push` are typed in a fresh home; a proxy notes each request that goes
elsewhere. `check` loads by name what was pushed (by_name.py), from an empty cache, `check-old` with the
transformers in --old. When the Hub is gone (`unplug`) the `offline` ones train and ask again, at last with no
more in the cache than the first two lines had fetched. Phases not named are all that were not done before: a
second call goes on where the first ended, as the Hub is a process of its own. No phase begins that may not be
done by --seconds. What was said is in log.txt, all else in state.json.
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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
BASE, PUSHED, TOKEN = (
    "unsloth/DeepSeek-R1-Distill-Llama-8B",
    "alice/DeepSeek-R1-Medical-COT",
    "hf_writetoken",
)
LOGS = ("hub.log", "elsewhere.log")
NOT_INHERITED = re.compile(
    r"(HF_|HUGGING|TRANSFORMERS_|WANDB_|UNSLOTH_|KAGGLE_|XDG_|NETRC)|.*_proxy$", re.IGNORECASE
)
FACTS = {  # as printed, the first and the last of each
    "s/step": r"([\d.]+) s/step", "loss": r"step \d+/\d+.*  loss ([\d.]+) ",
    "peak GiB": r"peak_memory_gib: ([\d.]+)", "answer": r"(\d+ tokens in [\d.]+ s)",
    "verified": r"verified: (.*)", "next": r"next: (.*)",
}  # fmt: skip


class Place:
    """Where all lies, and what was done. The user's files are on the disk, if it has room for them."""

    def __init__(self, asked: argparse.Namespace):
        self.work, self.ram, self.out, self.gpu = asked.work, asked.ram, asked.out, asked.gpu
        self.old, self.tiny = asked.old, asked.tiny
        for folder in (self.work, self.ram, self.out):
            folder.mkdir(parents=True, exist_ok=True)
        self.base = (
            BASE.replace("8B", "0.01B") if self.tiny else BASE
        )  # the larger is refused on a CPU
        new = {
            "used": used(self.work, self.ram),
            "user": str(roomy(46e9, self.work, self.ram) / "user"),
        }
        state = self.work / "state.json"
        self.state = json.loads(state.read_text()) if state.exists() else {**new, "phases": {}}
        self.user = Path(self.state["user"])

    def keep(self) -> None:
        (self.work / "state.json").write_text(json.dumps(self.state, indent=2, ensure_ascii=False))
        for name in ("state.json", "log.txt", "served.err", "check.json", "check-old.json", *LOGS):
            if (self.work / name).exists():
                shutil.copy(self.work / name, self.out)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Of a user with a token, who is run_cli of the Hub; nothing of the libraries' is inherited."""
        home.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not NOT_INHERITED.match(name)}
        kept |= {name: self.state["hub"]["elsewhere"] for name in ("http_proxy", "https_proxy")}
        kept |= {
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_TOKEN": TOKEN,
        }
        return kept | {"no_proxy": "127.0.0.1", "HF_ENDPOINT": self.state["hub"]["url"]} | more

    def run(
        self, name: str, line: str, environment: dict[str, str], limit: float
    ) -> dict[str, Any]:
        """A line typed in the user's folder: how it ended, after how long, and what it said."""
        began = time.monotonic()
        with (
            (self.work / f"{name}.out").open("w") as out,
            (self.work / f"{name}.err").open("w") as err,
        ):
            how: dict[str, Any] = {
                "stdin": subprocess.DEVNULL,
                "stdout": out,
                "stderr": err,
                "start_new_session": True,
            }
            process = subprocess.Popen(["bash", "-c", line], cwd=self.user, env=environment, **how)
            for number, patience in ((None, limit), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
                if number:
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
                    break
        seconds, code = round(time.monotonic() - began, 1), process.returncode
        said = [(self.work / f"{name}.{end}").read_text(errors="replace") for end in ("out", "err")]
        with (self.work / "log.txt").open("a") as log:
            log.write(f"\n===== {name}: {line}\n----- stdout\n{said[0]}\n----- stderr\n{said[1]}\n")
            log.write(f"----- exit code {code} after {seconds} s\n")
        found = {fact: re.findall(pattern, "\n".join(said)) for fact, pattern in FACTS.items()}
        facts = {
            fact: " to ".join(dict.fromkeys([all[0], all[-1]]))
            for fact, all in found.items()
            if all
        }
        return {"ok": code == 0, "code": code, "seconds": seconds, "line": line, "facts": facts}


def used(*disks: Path) -> list[float]:
    return [shutil.disk_usage(disk).used / 1e9 for disk in disks]


def roomy(size: float, *places: Path) -> Path:
    """The first with so much room, or the one with the most."""
    free = {place: shutil.disk_usage(place).free for place in places}
    return next(
        (place for place in places if free[place] > size),
        max(places, key=lambda place: free[place]),
    )


@contextlib.contextmanager
def most_used(place: Place) -> Iterator[list[float]]:
    """GB that disk and memory disk hold at most, beyond what they held at first."""
    most, ended = [0.0, 0.0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.3):
            now = zip(most, used(place.work, place.ram), place.state["used"], strict=True)
            most[:] = [round(max(before, gigabytes - first), 1) for before, gigabytes, first in now]

    (thread := threading.Thread(target=sample)).start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


# ---------------------------------------------------------------------------------------------------- phases

# Of a place, the phase's own name, and the most seconds it may take.
Phase = Callable[[Place, str, float], dict[str, Any]]


def make(place: Place, name: str, limit: float) -> dict[str, Any]:
    """The models' repositories."""
    place.user.mkdir(parents=True, exist_ok=True)
    kind = "--tiny" if place.tiny else f"--four-bit {place.ram}/r1-4bit"
    maker = f"{sys.executable} {place.gpu}/make_8b.py --vocabulary {place.gpu}/tokenizer.model"
    return place.run(
        name, f"{maker} --out {place.ram}/r1 {kind}", {**os.environ, "HF_HUB_OFFLINE": "1"}, limit
    )


def serve(place: Place, name: str, limit: float) -> dict[str, Any]:
    """The Hub lives on after this process: in a session of its own, published_hub.py."""
    ready, until = place.work / "hub.json", time.monotonic() + limit
    ready.unlink(missing_ok=True)
    models = {place.base: place.ram / "r1", f"{place.base}-unsloth-bnb-4bit": place.ram / "r1-4bit"}
    served = [f"{model}={folder}" for model, folder in models.items() if folder.exists()]
    command = [
        PROJECT / "tests/bench/published_hub.py",
        place.work,
        place.gpu / "medical_o1_en.jsonl",
        *served,
    ]
    with (place.work / "served.err").open("w") as log:
        how: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": log,
            "stderr": log,
            "start_new_session": True,
        }
        process = subprocess.Popen(
            [sys.executable, *command], env={**os.environ, "TMPDIR": str(place.ram)}, **how
        )
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
    with socket.socket() as door:
        return {
            "ok": door.connect_ex(("127.0.0.1", int(place.state["hub"]["url"].rpartition(":")[2])))
            != 0
        }


def typed(line: str, tiny: str = "", home: str = "home") -> Phase:
    """A line with `python3 finetune_r1.py` before it, in --tiny with `tiny` behind it."""

    def phase(place: Place, name: str, limit: float) -> dict[str, Any]:
        for file in ("finetune_r1.py", "prompts.py"):
            shutil.copy(PROJECT / file, place.user)
        whole = (
            f"python3 finetune_r1.py {line} {tiny.format(place.base) if place.tiny else ''}".strip()
        )
        environment = place.environment(place.user / home)
        if name.startswith(
            "offline"
        ):  # then huggingface.co would be asked, which the proxy would note
            environment["HF_HUB_OFFLINE"] = "1"
            del environment["HF_ENDPOINT"]
        if name == "push":  # the cache as it was before, for later; it takes no room
            links: dict[str, Any] = {"symlinks": True, "copy_function": os.link}
            shutil.copytree(place.user / "home", place.user / "home-before", **links)
        return place.run(name, whole, environment, limit)

    return phase


def check(place: Place, name: str, limit: float) -> dict[str, Any]:
    """Both versions share one download, and the user's of the base, which need not be there twice."""
    home = Path(place.state.setdefault("check", str(roomy(20e9, place.ram, place.work) / "check")))
    base = f".cache/huggingface/hub/models--{place.base.replace('/', '--')}"
    environment = place.environment(home)
    if (place.user / "home" / base).exists() and not (home / base).exists():
        (home / base).parent.mkdir(parents=True)
        (home / base).symlink_to(place.user / "home" / base)
    if name == "check-old":
        environment["PYTHONPATH"] = f"{place.old}:{environment.get('PYTHONPATH', '')}"
    found, rows = place.work / f"{name}.json", place.gpu / "medical_o1_en.jsonl"
    line = f"python3 {PROJECT}/tests/bench/by_name.py {PUSHED} {place.base} {rows} {found}"
    record = place.run(name, line, environment, limit)
    facts: dict[str, Any] = json.loads(found.read_text())
    samples = "".join(path.read_text() for path in sorted(place.user.glob("runs/*/samples.jsonl")))
    others = {
        "recipe's": "".join(
            json.loads(line)["tuned"]["thought"] for line in samples.split("\n")[:1]
        )
    }
    others["the anion gap"] = (place.work / "infer.err").read_text() + (
        place.work / "infer.out"
    ).read_text()
    same = {title: shared_start(text, others[title]) for title, text in facts["texts"].items()}
    problems = facts["problems"]
    if name == "check-old":
        new = json.loads((place.work / "check.json").read_text())
        there = {f"{title}, there": new["texts"].get(title, "") for title in facts["texts"]}
        same |= {
            title: shared_start(facts["texts"][title.removesuffix(", there")], it)
            for title, it in there.items()
        }
        if abs(facts["loss"].get("merged", 0) - new["loss"].get("merged", 9)) > 0.02:
            problems.append("loss")
    run_cli = {"problems": problems, "as in 4 bit, and in the newer": same}
    return {**record, "ok": record["ok"] and not problems, "facts": facts | run_cli}


def shared_start(text: str, other: str) -> str:
    text = text.strip()
    length = next((length for length in range(len(text), 0, -1) if text[:length] in other), 0)
    return f"{length} of {len(text)} characters"


TINY = "--model {} --max-seq-length 1024 --effective-batch 2 --max-new-tokens 8"
OFFLINE = "train --max-steps 3 --warmup-steps 1 --max-new-tokens 40"
PHASES: dict[
    str, tuple[Phase, float, float]
] = {  # its usual seconds on a GPU, and the most it gets
    "make": (make, 60, 200),
    "serve": (serve, 15, 60),
    "train": (
        typed("train --max-steps 60", f"{TINY} --max-steps 8 --learning-rate 1e-2"),
        150,
        270,
    ),
    "infer": (typed('infer "What widens the anion gap?"', "--max-new-tokens 20"), 55, 130),
    "push": (typed(f"push --repo {PUSHED}"), 180, 330),
    "check": (check, 100, 240),
    "check-old": (check, 60, 150),
    "unplug": (unplug, 1, 20),
    "offline-train": (typed(OFFLINE, TINY), 80, 170),
    "offline-infer": (typed('infer "question"', "--max-new-tokens 8"), 55, 130),
    "offline-train-before-push": (typed(OFFLINE, TINY, "home-before"), 80, 170),
    "offline-infer-before-push": (
        typed('infer "question"', "--max-new-tokens 8", "home-before"),
        55,
        130,
    ),
}


def perform(place: Place, name: str, limit: float) -> None:
    logs = {log: place.work / log for log in LOGS}
    before = {log: path.stat().st_size if path.exists() else 0 for log, path in logs.items()}
    began = time.monotonic()
    with most_used(place) as gigabytes:
        try:
            record = PHASES[name][0](place, name, limit)
        except Exception as error:
            record = {"ok": False, "facts": {"harness": f"{type(error).__name__}: {error}"}}
    asked = {
        log: path.read_text()[before[log] :].splitlines() if path.exists() else []
        for log, path in logs.items()
    }
    # That name datasets makes of the endpoint's: it is the Hub's.
    elsewhere = [
        line for line in asked["elsewhere.log"] if "http://datasets-server.127.0.0.1" not in line
    ]
    fetched = [
        re.search(r"20\d GET /((?!api|xet).*)/resolve/[^/]+/(.*)", line)
        for line in asked["hub.log"]
    ]
    record |= {"ok": record["ok"] and not elsewhere, "elsewhere": elsewhere, "gigabytes": gigabytes}
    record |= {"fetched": Counter(" ".join(match.groups()) for match in fetched if match)}
    record |= {"refused": Counter(line for line in asked["hub.log"] if line[0] in "45")}
    place.state["phases"][name] = {"seconds": round(time.monotonic() - began, 1)} | record
    place.keep()
    print(f"{name}: {'ok' if record['ok'] else 'NOT OK'}", flush=True)


def report(place: Place) -> None:
    for name, record in place.state["phases"].items():
        disk, memory = record["gigabytes"]
        how = f"{'ok' if record['ok'] else 'NOT OK':7}{record['seconds']:7} s  "
        how += f"disk {disk:5} GB  memory {memory:5} GB"
        print(f"{name:26}{how}  elsewhere: {record['elsewhere'] or 'nothing'}")
        for title, value in record.get("facts", {}).items():
            if value:
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                print(f"    {title}: {text}")
    print(
        "left:",
        *[name for name in PHASES if name not in place.state["phases"]] or ["nothing"],
        flush=True,
    )


if __name__ == "__main__":
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phases", nargs="*", help=f"of {', '.join(PHASES)}")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--gpu", type=Path, default=PROJECT / ".gpu", help="what shared/gpu/pack.sh packed"
    )
    parser.add_argument(
        "--old", type=Path, help="a folder with transformers 4.57, tokenizers and huggingface_hub"
    )
    parser.add_argument(
        "--ram", type=Path, default="/dev/shm/three-lines", help="for the Hub and the checks: 72 GB"
    )
    parser.add_argument(
        "--work", type=Path, default="/tmp/three-lines", help="for the user's files: 46 GB"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default="/tmp/three-lines/out",
        help="gets logs and results, as they come",
    )
    parser.add_argument("--seconds", type=float, default=3600)
    asked = parser.parse_args()
    for name in ("gpu", "old", "ram", "work", "out"):
        setattr(asked, name, (path := getattr(asked, name)) and path.resolve())
    place = Place(asked)
    room = {
        str(disk): f"{shutil.disk_usage(disk).free / 1e9:.0f} GB free"
        for disk in (place.work, place.ram)
    }
    print(room, "user:", place.user, flush=True)
    for name in asked.phases or [name for name in PHASES if name not in place.state["phases"]]:
        left = asked.seconds - (time.monotonic() - began)
        if left < PHASES[name][1]:
            break
        if name != "check-old" or place.old:
            perform(place, name, min(PHASES[name][2], left))
            if name in ("make", "serve") and not place.state["phases"][name]["ok"]:
                break
    report(place)
    if "offline-infer-before-push" in place.state["phases"]:
        os.kill(place.state["hub"]["pid"], signal.SIGTERM)
