"""Time and memory of `format` for rows as many and as long as the whole English dataset's.

uv run tests/bench/format_rows.py [MODEL]        a folder or a Hub name; without one the demo's tokenizer
"""

import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT))

import finetune_r1  # noqa: E402

ROWS = 20_000
THOUGHT_WORDS = 440  # about 760 tokens a row, of which the template has 110


def write_rows(path: Path) -> None:
    """Thoughts are the bundled rows' sentences, drawn at random."""
    chance = random.Random(3407)
    bundled = finetune_r1.read_jsonl(finetune_r1.DEMO_ROWS)
    sentences = []
    for row in bundled:
        sentences += row["Complex_CoT"].split(". ")
    rows = []
    for number in range(ROWS):
        words: list[str] = []
        while len(words) < THOUGHT_WORDS:
            words += chance.choice(sentences).split()
        row = bundled[number % len(bundled)]
        question = f"{row['Question']} Case {number}."
        rows.append({**row, "Question": question, "Complex_CoT": " ".join(words)})
    finetune_r1.write_jsonl(path, rows)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(finetune_r1.demo_model())
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows)
        command = [sys.executable, PROJECT / "finetune_r1.py", "format", "--model", model]
        command += ["--dataset", rows, "--split", "train", "--json"]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    print(f"{seconds:.1f} s, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
