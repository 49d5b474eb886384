"""A Hub on loopback that has the default model and dataset by their names; and a proxy that serves nothing.

    TMPDIR=/dev/shm python3 tests/bench/published_hub.py WORK ROWS.jsonl NAME=FOLDER ...

Models are served from where they are; what is pushed goes to TMPDIR. WORK/hub.json has both addresses, WORK/hub.log
and elsewhere.log a line for each request. SIGUSR1 ends the Hub alone, SIGTERM both.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from published import CARDS, medical_o1_repo
from servers.base import LoopbackServer
from servers.hub import HubServer

DATASET = "FreedomIntelligence/medical-o1-reasoning-SFT"
TOKEN = "hf_writetoken"


def log_requests(server: Any, path: Path) -> Any:
    """The server, which writes each request and its status to a file."""
    log = path.open("a", buffering=1)
    dispatch = server.dispatch

    def dispatch_and_log(request: Any) -> Any:
        reply = dispatch(request)
        log.write(f"{reply.status} {request.method} {request.path}\n")
        return reply

    server.dispatch = dispatch_and_log
    return server


def medical_rows(file: Path) -> list[dict[str, str]]:
    """The real rows, and copies under other questions, so that there are 510."""
    rows = [json.loads(line) for line in file.read_text().split("\n") if line]
    copies = []
    for case in range(1, 9):
        for row in rows:
            copies.append({**row, "Question": f"Case {case}. {row['Question']}"})
    return [*rows, *copies][:510]


def main(work: Path, rows: Path, *models: str) -> None:
    unplugged = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: unplugged.set())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with log_requests(LoopbackServer(), work / "elsewhere.log") as elsewhere:
        hub = log_requests(HubServer(tokens={TOKEN: ("alice", "write")}), work / "hub.log")
        with hub:
            hub.add_repo("dataset", DATASET, medical_o1_repo(medical_rows(rows)))
            card = f"---\n{CARDS['unsloth']}---\n".encode()
            for model in models:
                name, folder = model.split("=")
                files = {path.name: path for path in Path(folder).iterdir()}
                hub.add_repo("model", name, {**files, "README.md": card})
            ready = {"url": hub.url, "elsewhere": elsewhere.url, "pid": os.getpid()}
            (work / "hub.partial").write_text(json.dumps(ready))
            (work / "hub.partial").rename(work / "hub.json")
            unplugged.wait()
        signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
