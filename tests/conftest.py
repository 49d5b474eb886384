"""What the tests share: a home of their own, small models, the CLI as a user runs it, and one demo for all.

Nothing here needs a network, a GPU or an account. Two workers (pytest-xdist) take file after file.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

# Handed on by the environment: the workers share one folder, in which each has a home.
SHARED = Path(os.environ.get("FINETUNE_R1_TESTS") or tempfile.mkdtemp(prefix="finetune-r1-tests-"))
os.environ["FINETUNE_R1_TESTS"] = str(SHARED)
DEMO = SHARED / "demo"
HOME = Path(tempfile.mkdtemp(prefix="home-", dir=SHARED))
for name in [
    name for name in os.environ if name.startswith(("HF_", "HUGGING", "WANDB_", "KAGGLE_"))
]:
    del os.environ[name]
for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "UV"):
    os.environ.pop(name, None)
    os.environ.pop(name.lower(), None)
# Without bytecode each of the many processes would spend seconds on compiling the packages.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Before any library reads them. The endpoint is a port that nothing listens on.
os.environ |= {
    "HOME": str(HOME),
    "XDG_CACHE_HOME": str(SHARED / "cache"),  # the demo model is unpacked once
    "HF_HOME": str(HOME / "hf"),
    "NETRC": str(HOME / "netrc"),
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_XET": "1",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "NO_PROXY": "127.0.0.1",
}

import published  # noqa: E402
import pytest  # noqa: E402
from published import BOS, EOS, PAD  # noqa: E402, F401

# A shell's background job ignores Ctrl-C and so would its children; the tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` ignores

SCRIPT = Path(__file__).parents[1] / "finetune_r1.py"
SAMPLE = SCRIPT.parent / "data" / "medical_sample.jsonl"


class SmallDisk:
    """A folder that stands for a disk; small files beside the weights take no room on it."""

    def __init__(self, folder: Path):
        self.folder, self.size = folder, 10**12

    def used(self) -> int:
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        large = [path for path in paths if path.suffix != ".json" and not path.is_symlink()]
        return sum(path.stat().st_size for path in large)

    def hold(self, size: int) -> None:
        """Leaves room for so many bytes more."""
        self.size = self.used() + size

    def usage(self, _: object) -> Any:
        return SimpleNamespace(free=self.size - self.used())


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def home() -> Path:
    return HOME


@pytest.fixture
def cli(tmp_path):
    """Runs the script as a user does, in an empty folder: `cli("train", "--max-steps", 2, HF_TOKEN="…")`."""

    def run(*arguments: object, cwd: Path = tmp_path, stdin: str = "", **environment: str) -> Done:
        command = [sys.executable, SCRIPT, *map(str, arguments)]
        environment = {**os.environ, **environment}
        done = subprocess.run(
            command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def run_cli(unsloth, capfd, monkeypatch, tmp_path):
    """The command line in this process, which has the imports behind it: `run_cli(["infer", "Why?"])`."""
    import finetune_r1

    def run(arguments, cwd=tmp_path):
        monkeypatch.chdir(cwd)
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            finetune_r1.app([str(argument) for argument in arguments], prog_name="finetune_r1.py")
        return Done(end.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A disk for the Hub's cache, and for a run, that holds as much as a test says."""
    from huggingface_hub import constants

    import finetune_r1

    disk = SmallDisk(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(finetune_r1.shutil, "disk_usage", disk.usage)
    return disk


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub for the client of this process, which has read its environment, with a cache of its own."""
    from huggingface_hub import constants, hf_api
    from servers.hub import HubServer

    with HubServer(
        tokens={"hf_writetoken": ("alice", "write"), "hf_readtoken": ("alice", "read")}
    ) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        yield server


def add_base(hub, folder):
    """Puts a model's files on the Hub as org/base."""
    hub.add_repo("model", "org/base", {path.name: path.read_bytes() for path in folder.iterdir()})


def name_base(run, model):
    """Makes a run one of another base, as if it was trained on that."""
    import finetune_r1

    config = dataclasses.replace(finetune_r1.Run(run).config, model=model)
    finetune_r1.write_json(run / "config.json", dataclasses.asdict(config))
    settings = finetune_r1.read_json(run / "adapter" / "adapter_config.json")
    settings["base_model_name_or_path"] = model
    finetune_r1.write_json(run / "adapter" / "adapter_config.json", settings)
    finetune_r1.Run(run).update(adapter={}, model_revisions={})  # and its hashes


def pytest_collection_modifyitems(items):
    """Last those of the demo, as it takes minutes."""
    items.sort(key=lambda item: "demo" in item.fixturenames)


def pytest_runtest_setup(item):
    """The first worker to get here starts the demo, to which both give way: it takes longest."""
    session = item.session
    if not hasattr(session, "gives_way") and any(
        "demo" in other.fixturenames for other in session.items
    ):
        with contextlib.suppress(FileExistsError):
            DEMO.mkdir()
            recorded = '"$@" >out 2>err; echo $? >code.new; mv code.new code'
            command = [sys.executable, SCRIPT, "demo", "--json", "--run-dir", "runs/demo"]
            subprocess.Popen(["sh", "-c", recorded, "sh", *command], cwd=DEMO)
        session.gives_way = os.nice(5)


def pytest_unconfigure(config):
    """The workers' folders go when the last of them is done."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(SHARED, ignore_errors=True)


@pytest.fixture(scope="session")
def demo():
    """The demo, run once as a user runs it: its working folder, its run folder, and what it printed."""
    while not (code := DEMO / "code").exists():
        time.sleep(1)
    done = Done(int(code.read_text()), (DEMO / "out").read_text(), (DEMO / "err").read_text())
    assert done.code == 0, done.err
    return DEMO, DEMO / "runs" / "demo", done


@pytest.fixture(scope="session")
def unsloth():
    """It has to be imported before transformers; whoever uses a model or a tokenizer asks for this first."""
    import finetune_r1

    return finetune_r1.import_unsloth()


@pytest.fixture(scope="session")
def smollm2(unsloth):
    """The demo model's folder."""
    import finetune_r1

    return finetune_r1.demo_model()


@pytest.fixture(scope="session")
def models(unsloth, tmp_path_factory):
    """Where the small models below lie."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_r1(models):
    """A folder like the default model's repository, with two layers of random weights."""
    return published.write_model(models / "tiny-r1", "unsloth")


@pytest.fixture(scope="session")
def tiny_deepseek(models):
    """The same by DeepSeek, who pads with EOS."""
    return published.write_model(models / "tiny-deepseek", "deepseek")


@pytest.fixture(scope="session")
def tiny_qwen(models):
    """R1's distillation into a Qwen 2."""
    return published.write_model(models / "tiny-qwen", "qwen")


@pytest.fixture(scope="session")
def tiny_four_bit(models, tiny_r1):
    """The ready 4-bit repository that Unsloth takes in the default model's place."""
    return published.write_four_bit(models / "tiny-r1-unsloth-bnb-4bit", tiny_r1)


@pytest.fixture(scope="session")
def r1_tokenizer(tiny_r1):
    """The tokenizer that is in tiny_r1, which AutoTokenizer would ruin."""
    import finetune_r1

    return finetune_r1.load_tokenizer(tiny_r1)


def small_config(model, **changes):
    """Settings of a training of seconds."""
    import finetune_r1

    settings = {
        **{"model": str(model), "dataset": str(SAMPLE), "split": "train[:24]", "wandb": False},
        **{"max_seq_length": 768, "max_steps": 6, "effective_batch": 4, "micro_batch": 2},
        **{"warmup_steps": 1, "learning_rate": 1e-2, "logging_steps": 1, "max_new_tokens": 4},
    }
    return finetune_r1.TrainConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def tiny_run(tiny_r1, tmp_path_factory):
    """The folder of a finished 4-bit run of the model above."""
    import finetune_r1

    config = small_config(
        tiny_r1, split="train[:8]", max_steps=3, effective_batch=2, micro_batch=None, warmup_steps=0,
        logging_steps=10,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("runs") / "run"
    loaded, _ = finetune_r1.train_run(config, finetune_r1.Run(folder))
    assert "Linear4bit" in {type(module).__name__ for module in loaded.model.modules()}
    return folder
