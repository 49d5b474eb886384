"""What comes from a stranger is data: no code of a model or an adapter is run, and nobody is asked about it.

Where transformers lacks code that a model brings, it asks on a terminal, `Do you wish to run the custom code?
[y/N]`. Whoever is asked here says yes.
"""

import shutil

import published
import pytest
from conftest import SAMPLE
from servers.hub import HubServer
from terminal import typed

from finetune_r1 import LoadedModel, Run, TrainConfig, UserError, read_json, write_json

TRAIN = ["--dataset", SAMPLE, "--split", "train[:4]", "--max-seq-length", 1024, "--max-steps", 1]
TRAIN += ["--effective-batch", 2, "--max-new-tokens", 2, "--no-wandb", "--no-load-in-4bit"]
MODEL = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
ELSEWHERE = {name: f"eve/code--{place}" for name, place in MODEL.items()}
TOKENIZER = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
# What config.json and tokenizer_config.json say, and the file that a message names; None where transformers
# has the code itself.
STRANGERS = {
    "a model": ({"model_type": "evil", "auto_map": MODEL}, {}, "config.json asks for code"),
    "a model of another repository": (
        {"model_type": "evil", "auto_map": ELSEWHERE},
        {},
        "config.json asks",
    ),
    "a model that is too new": ({"model_type": "evil"}, {}, "config.json asks for code"),
    "a kernel": (
        {"attn_implementation": "eve/kernel", "use_kernels": True},
        {},
        "lacks: llama eve/kernel",
    ),
    "a kernel, hidden": ({"_attn_implementation": "eve/kernel"}, {}, "config.json asks for code"),
    "a tokenizer": (
        {},
        {"tokenizer_class": "Evil", "auto_map": TOKENIZER},
        "model contains custom code",
    ),
    "code that is not needed": ({"auto_map": MODEL | TOKENIZER}, {"auto_map": TOKENIZER}, None),
}


def spoil(path, **entries):
    write_json(path, read_json(path) | entries)


@pytest.fixture(params=STRANGERS)
def stranger(request, tiny_r1, tmp_path, monkeypatch):
    """What is said about a model that names code; the code, were it run, would leave a file."""
    settings, tokenizer, said = STRANGERS[request.param]
    folder = shutil.copytree(tiny_r1, tmp_path / "model")
    code = f"import transformers as t\nopen({str(tmp_path / 'canary')!r}, 'w')\n"
    code += (
        "class Config(t.LlamaConfig): model_type = 'evil'\nclass Model(t.LlamaForCausalLM): pass\n"
    )
    code += "class Tokenizer(t.PreTrainedTokenizerFast): pass\ndef generate(*_, **__): pass\n"
    (folder / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).write_text(code)
    spoil(folder / "config.json", **settings, kernel_config={"RMSNorm": "eve/kernel:RMSNorm"})
    spoil(folder / "tokenizer_config.json", **tokenizer)
    spoil(folder / "generation_config.json", custom_generate=str(folder))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    yield said
    assert not (tmp_path / "canary").exists()


def trained_on(model, tiny_run, folder):
    """A run that says that it was trained on `model`."""
    run = Run(shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("merged")))
    spoil(run / "config.json", model=str(model))
    spoil(run / "adapter" / "adapter_config.json", base_model_name_or_path=str(model))
    run.update(adapter={})
    return run


def test_every_command_refuses_code_with_one_message_or_needs_none(
    stranger, tiny_run, told, tmp_path
):
    run = trained_on(tmp_path / "model", tiny_run, tmp_path / "run")
    for line in (
        ["load", "--model", "model", "--no-load-in-4bit"],
        ["infer", "Why?", "--model", "model", "--max-new-tokens", 2],
        ["train", "--model", "model", *TRAIN],
        ["save", "--run", "run"],
    ):
        done = told(line)
        # The tokenizer that is merged is the adapter's own.
        if stranger is None or (line[0] == "save" and "custom code" in stranger):
            assert done.code == 0, done.err
        else:
            assert done.code == 1 and stranger in done.err and "is not run" in done.err, line
            assert done.err.count("error: ") == 1 and "Traceback" not in done.err
    assert told(["format", "--model", "model", "--dataset", SAMPLE, "--split", "train"]).code == 0
    for settings in (run / "merged").glob("*.json"):
        assert "auto_map" not in settings.read_text(), "nor is it handed on"


def test_on_a_terminal_nobody_is_asked(tiny_r1, tiny_run, tmp_path):
    """`save` was the one that asked."""
    folder = shutil.copytree(tiny_r1, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    spoil(folder / "config.json", model_type="evil", auto_map=MODEL)
    run = trained_on(folder, tiny_run, tmp_path / "run")
    code, shown = typed(tmp_path, ["save", "--run", str(run.folder)])
    assert code == 1 and "[y/N]" not in shown and "config.json asks for code" in shown
    assert not (tmp_path / "canary").exists()


def test_a_repository_that_names_another_base_beside_its_weights_is_refused(
    unsloth, tiny_r1, monkeypatch
):
    """Unsloth would load what its adapter_config.json names."""
    from huggingface_hub import constants, hf_api

    with HubServer() as hub:
        url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        other = {
            "adapter_config.json": b'{"base_model_name_or_path": "eve/code", "peft_type": "LORA"}'
        }
        hub.add_repo("model", "eve/mixed-1M", published.repo_files(tiny_r1) | other)
        with pytest.raises(UserError, match="an adapter and merged weights"):
            LoadedModel.load(TrainConfig(model="eve/mixed-1M", load_in_4bit=False))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["load", "infer", "train", "format"])
def test_nor_by_any_other_command(stranger, command, tmp_path):
    options = {
        "load": ["--no-load-in-4bit"],
        "infer": ["Why?", "--max-new-tokens", 2],
        "train": TRAIN,
    }
    options["format"] = ["--dataset", SAMPLE, "--split", "train"]
    line = [command, "--model", "model", *options[command]]
    code, shown = typed(tmp_path, list(map(str, line)))
    assert "[y/N]" not in shown
    assert code == (0 if stranger is None or command == "format" else 1)
    assert code == 0 or stranger in shown
