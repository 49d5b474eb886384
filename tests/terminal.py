"""A command on a terminal of its own, to which one types."""

import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

from conftest import SCRIPT


def typed(
    cwd: Path, arguments: list[str], *answers: tuple[str, str], **environment: str
) -> tuple[int, str]:
    """Types each answer once what is shown ends as run_cli; returns the exit code, and all that was seen."""
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments], cwd=cwd, env={**os.environ, **environment},
        preexec_fn=lambda: os.login_tty(its_end),
    )  # fmt: skip
    os.close(its_end)
    limit = threading.Timer(300, process.kill)
    limit.start()
    shown, since, waiting = b"", 0, list(answers)
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if waiting and re.search(waiting[0][0] + "$", shown[since:].decode(errors="ignore")):
            since = len(shown)
            os.write(terminal, waiting.pop(0)[1].encode())
    os.close(terminal)
    limit.cancel()
    print(text := shown.decode(errors="replace"))
    assert not waiting and "Traceback" not in text
    return process.wait(), text
