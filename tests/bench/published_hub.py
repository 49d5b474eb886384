"""A Hub on loopback that serves, by their names, the default model and dataset; and a proxy that serves none.

    TMPDIR=/dev/shm python3 tests/bench/published_hub.py WORK ROWS.jsonl NAME=FOLDER ...

The folders' files are served from where they lie; what is pushed lands in TMPDIR. WORK/hub.json tells both
addresses, once they answer; WORK/hub.log and elsewhere.log have a line a request. SIGUSR1 ends the Hub alone,
SIGTERM both.
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

DATASET, TOKEN = "FreedomIntelligence/medical-o1-reasoning-SFT", "hf_writetoken"


def noted(server: Any, path: Path) -> Any:
    """The server, which writes down what it is asked and how it answered."""
    log, dispatch = path.open("a", buffering=1), server.dispatch

    def dispatch_noted(request: Any) -> Any:
        reply = dispatch(request)
        log.write(f"{reply.status} {request.method} {request.path}\n")
        return reply

    server.dispatch = dispatch_noted
    return server


def medical_rows(file: Path) -> list[dict[str, str]]:
    """The real rows, and others made of them, so that there are 510 different questions."""
    real = [json.loads(line) for line in file.read_text().split("\n") if line]
    others = [
        {**row, "Question": f"Case {case}. {row['Question']}"}
        for case in range(1, 9)
        for row in real
    ]
    return [*real, *others][:510]


def main(work: Path, rows: Path, models: dict[str, Path]) -> None:
    unplugged = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: unplugged.set())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with noted(LoopbackServer(), work / "elsewhere.log") as elsewhere:
        with noted(HubServer(tokens={TOKEN: ("alice", "write")}), work / "hub.log") as hub:
            hub.add_repo("dataset", DATASET, medical_o1_repo(medical_rows(rows)))
            for name, folder in models.items():
                files = {path.name: path for path in folder.iterdir()}
                hub.add_repo(
                    "model", name, {"README.md": f"---\n{CARDS['unsloth']}---\n".encode(), **files}
                )
            urls = {"url": hub.url, "elsewhere": elsewhere.url, "pid": os.getpid()}
            (work / "hub.partial").write_text(json.dumps(urls))
            (work / "hub.partial").rename(work / "hub.json")
            unplugged.wait()
        signal.pause()


if __name__ == "__main__":
    named = dict(it.split("=") for it in sys.argv[3:])
    main(Path(sys.argv[1]), Path(sys.argv[2]), {name: Path(at) for name, at in named.items()})
