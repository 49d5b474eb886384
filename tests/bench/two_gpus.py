"""Memory and pace of `torchrun --nproc-per-node 2 finetune_r1.py train`, per process, beside one GPU.

    python3 tests/bench/two_gpus.py --model FOLDER --dataset ROWS.jsonl [--steps 20] [--only two,two-expandable]
    python3 tests/bench/two_gpus.py --small     two layers of random weights, two CPU processes

Prints for each variant and rank: peak GiB allocated and reserved, GiB reserved after steps 1, 6 and the last,
the allocator's retries, whether its segments are expandable, s/step (median after the second), the first and
last loss, and the largest difference of a loss from the first variant's. "-14.5" is a limit of 14.5 GiB in
fp16, as on a pair of T4s; the other endings are remedies against memory that is reserved and not used.
`resumed` is stopped on two GPUs by SIGTERM and resumed on one.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

FP16 = ["--gpu-memory-gib", "14.5", "--dtype", "float16"]
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # before torch is imported
GIB = 1024**3
# Processes, options of `train`, environment, and the remedy in `work`.
VARIANTS: dict[str, tuple[int, list[str], dict[str, str], str]] = {
    "one": (1, [], {}, ""),
    "two": (2, [], {}, ""),
    "two-expandable": (2, [], EXPANDABLE, ""),
    "two-fixed": (2, [], {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, ""),
    "two-emptied": (2, [], {}, "empty the cache after the first step"),
    "two-views": (2, [], {}, "gradients as views of DDP's buckets"),
    "one-14.5": (1, FP16, {}, ""),
    "two-14.5": (2, FP16, {}, ""),
    "two-14.5-expandable": (2, FP16, EXPANDABLE, ""),
    "two-14.5-emptied": (2, FP16, {}, "empty the cache after the first step"),
}


def work(output: Path, remedy: str, arguments: list[str]) -> None:
    """One process: the script's command, with the memory noted after each step."""
    import finetune_r1

    def train_steps(*positional: Any, **named: Any) -> Any:
        note_memory(output.with_suffix(f".{finetune_r1.RANK}.json"), remedy)
        return unchanged(*positional, **named)

    unchanged = finetune_r1.train_steps
    finetune_r1.train_steps = train_steps
    finetune_r1.app(arguments, prog_name="finetune_r1.py")


def note_memory(file: Path, remedy: str) -> None:
    """Has every Trainer write times and memory to `file`, and applies the remedy."""
    import torch
    import transformers

    on_gpu = torch.cuda.is_available()
    steps: list[dict[str, float]] = []

    class Notes(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            step = {"step": state.global_step, "time": time.perf_counter()}
            if on_gpu:
                step["reserved"] = torch.cuda.memory_reserved() / GIB
                if remedy.startswith("empty") and state.global_step == 1:
                    torch.cuda.empty_cache()
            steps.append(step)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            result: dict[str, Any] = {"steps": steps}
            if on_gpu:
                segments = torch.cuda.memory_snapshot()
                result["allocated"] = torch.cuda.max_memory_allocated() / GIB
                result["reserved"] = torch.cuda.max_memory_reserved() / GIB
                result["retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
                result["expandable"] = any(segment["is_expandable"] for segment in segments)
            file.write_text(json.dumps(result))

    transformers.trainer.DEFAULT_CALLBACKS.append(Notes)
    if remedy.startswith("gradients"):
        ddp = torch.nn.parallel.DistributedDataParallel
        ddp.__init__ = functools.partialmethod(ddp.__init__, gradient_as_bucket_view=True)


def start(
    processes: int, output: Path, remedy: str, arguments: list[str], **environment: str
) -> subprocess.Popen[str]:
    """Starts `work` in so many processes."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--"]
    command += [__file__, "--work", str(output), remedy, *arguments]
    log = output.with_suffix(".log").open("w")
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def difference(mine: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(mine, others, strict=True))


def report(name: str, output: Path, run: Path, first: Path) -> None:
    """Prints a line for each rank."""
    record = json.loads((run / "run.json").read_text())
    planned = record["plan"]["estimated_peak_gib"]
    mine = losses(run)
    for rank, path in enumerate(sorted(output.parent.glob(f"{output.stem}.?.json"))):
        result = json.loads(path.read_text())
        times = [step["time"] for step in result["steps"][1:]]
        pace = statistics.median(b - a for a, b in zip(times, times[1:], strict=False))
        reserved = [f"{step.get('reserved', 0):.2f}" for step in result["steps"]]
        print(
            f"{name:20} rank {rank}  planned {planned:.1f}  allocated {result.get('allocated', 0):.2f}"
            f"  reserved {result.get('reserved', 0):.2f} (after step 1 {reserved[0]}, 6 "
            f"{reserved[:6][-1]}, last {reserved[-1]}) GiB  retries {result.get('retries', 0)}  "
            f"expandable {result.get('expandable', False)}  {pace:.3f} s/step  "
            f"loss {mine[0]:.4f} to {mine[-1]:.4f}, diff {difference(mine, losses(first)):.4f}",
            flush=True,
        )


def resume(folder: Path, common: list[str], steps: int, first: Path) -> None:
    """Kills a training on two GPUs after its checkpoint, and resumes it on one."""
    run = folder / "resumed"
    options = [*common, "--save-steps", str(max(1, steps // 3)), "--run-dir", str(run)]
    process = start(2, folder / "killed", "", options)
    while process.poll() is None and not list(run.glob("checkpoints/*/trainer_state.json")):
        time.sleep(0.2)
    process.terminate()  # torchrun passes it on
    process.wait()
    status = json.loads((run / "run.json").read_text())["status"]
    again = start(1, folder / "again", "", ["train", "--resume", str(run)])
    if again.wait():
        print("resumed failed:", (folder / "again.log").read_text()[-2000:])
        return
    record = json.loads((run / "run.json").read_text())
    print(
        f"resumed: {status} on two, resumed on one after step {record['resumed_at'][-1]}; "
        f"losses differ by {difference(losses(run), losses(first)):.4f} at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--dataset", default=str(PROJECT / "data" / "medical_sample.jsonl"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="effective batch size")
    parser.add_argument(
        "--only",
        help=f"of {', '.join(VARIANTS)}, resumed",
        default="one,two,two-expandable,one-14.5,two-14.5,resumed",
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="two-gpus-"))
    if options.small:
        from speed import small_model

        options.model = str(small_model(folder / "tiny"))
        options.steps, options.only = 6, "one,two,resumed"
    common = ["train", "--model", options.model, "--dataset", options.dataset, "--no-wandb"]
    common += ["--max-steps", str(options.steps), "--effective-batch", str(options.batch)]
    common += ["--logging-steps", "1", "--max-new-tokens", "1"]
    names = options.only.split(",")
    for name in names:
        first = folder / f"run-{names[0]}"
        if name == "resumed":
            resume(folder, common, options.steps, first)
            continue
        processes, own, environment, remedy = VARIANTS[name]
        output, run = folder / f"{name.replace('.', '_')}.json", folder / f"run-{name}"
        arguments = [*common, *own, "--run-dir", str(run)]
        code = start(processes, output, remedy, arguments, **environment).wait()
        if code:
            print(f"{name} failed: {output.with_suffix('.log').read_text()[-2000:]}", flush=True)
        else:
            report(name, output, run, first)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
