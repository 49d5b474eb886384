"""Code that comes with a model is never run, and nobody is asked whether to."""

import shutil

import pytest
from conftest import SAMPLE
from terminal import typed

from finetune_r1 import read_json, write_json

AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
STRANGERS = {
    "a model": ({"model_type": "evil", "auto_map": AUTO_MAP}, {}),
    "a kernel": ({"attn_implementation": "eve/kernel", "use_kernels": True}, {}),
    "a tokenizer": ({}, {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}),
}
COMMANDS = {
    "load": ["--no-load-in-4bit"],
    "infer": ["Why?", "--max-new-tokens", "2"],
    "train": ["--dataset", str(SAMPLE), "--split", "train[:4]", "--max-steps", "1"],
}


@pytest.mark.parametrize(
    ("stranger", "command"),
    [
        ("a model", "load"),
        pytest.param("a kernel", "infer", marks=pytest.mark.slow),
        pytest.param("a tokenizer", "train", marks=pytest.mark.slow),
        pytest.param("a model", "train", marks=pytest.mark.slow),
    ],
)
def test_commands_on_a_terminal_never_run_or_offer_a_models_code(
    tiny_r1, tmp_path, stranger, command
):
    config, tokenizer = STRANGERS[stranger]
    folder = shutil.copytree(tiny_r1, tmp_path / "model")
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    for name, entries in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        write_json(folder / name, read_json(folder / name) | entries)
    code, shown = typed(tmp_path, [command, "--model", str(folder), *COMMANDS[command]])
    assert "[y/N]" not in shown and not canary.exists()
    assert code == (0 if stranger == "a tokenizer" else 1), shown
