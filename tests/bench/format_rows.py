"""How long `format` takes for rows as many and as long as the whole English dataset's.

    uv run tests/bench/format_rows.py [MODEL]        a folder or a Hub name; without one the demo's tokenizer

Prints seconds and peak memory; nothing is kept from one start to the next.
"""

import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT))

import finetune_r1  # noqa: E402

ROWS, THOUGHT_WORDS = 20_000, 440  # about 760 tokens a row, the template's 110 among them


def write_rows(path: Path) -> None:
    """Thoughts are the bundled rows' sentences in another order each time."""
    chance = random.Random(3407)
    bundled = finetune_r1.read_jsonl(finetune_r1.DEMO_ROWS)
    sentences = [part for row in bundled for part in re.split(r"(?<=\.) ", row["Complex_CoT"])]
    with path.open("w") as file:
        for number in range(ROWS):
            thought: list[str] = []
            while len(thought) < THOUGHT_WORDS:
                thought += chance.choice(sentences).split()
            row = bundled[number % len(bundled)]
            changed = {
                "Question": f"{row['Question']} Case {number}.",
                "Complex_CoT": " ".join(thought),
            }
            file.write(json.dumps(row | changed) + "\n")


def measure(*arguments: str) -> None:
    started = time.perf_counter()
    command = [sys.executable, str(PROJECT / "finetune_r1.py"), "format", *arguments]
    _, status, used = os.wait4(os.spawnv(os.P_NOWAIT, sys.executable, command), 0)
    assert status == 0
    print(
        f"{time.perf_counter() - started:.1f} s, peak memory {used.ru_maxrss / 1024**2:.2f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows)
        model = sys.argv[1] if len(sys.argv) > 1 else str(finetune_r1.demo_model())
        measure("--model", model, "--dataset", str(rows), "--split", "train", "--json")
