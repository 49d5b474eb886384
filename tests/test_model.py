"""Model: tokenizers that transformers 5 would ruin, ready 4-bit copies, the names that a user types."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tomllib

import published
import pytest
from conftest import BOS, EOS, SAMPLE
from servers.base import STALL, Fault, LoopbackServer
from servers.hub import HubServer

import finetune_r1
import prompts
from finetune_r1 import ROUND_TRIP, LoadedModel, Run, TrainConfig, UserError, read_json

LAYOUTS = ["tiny_r1", "tiny_deepseek", "tiny_qwen", "tiny_four_bit", "smollm2"]
QWEN = "unsloth/DeepSeek-R1-Distill-Qwen-1.5B"  # a name that a CPU takes, and that has a ready 4-bit copy
DATASET = TrainConfig.dataset


@pytest.fixture(params=LAYOUTS)
def model(request):
    """The folder of a model in one of the layouts."""
    return request.getfixturevalue(request.param)


def gives_back(tokenizer, text):
    return tokenizer.decode(tokenizer(text)["input_ids"]) == (tokenizer.bos_token or "") + text


# -------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("name", ["tiny_r1", "tiny_deepseek", "tiny_four_bit"])
def test_transformers_own_way_loses_all_white_space_so_the_stand_in_is_as_published(
    unsloth, request, name
):
    from transformers import AutoTokenizer

    ruined = AutoTokenizer.from_pretrained(request.getfixturevalue(name))
    assert "Belowisaninstruction" in ruined.decode(ruined("Below is an instruction")["input_ids"])


def test_a_text_comes_back_byte_for_byte_with_one_bos_and_padding_of_its_own(model):
    tokenizer = finetune_r1.load_tokenizer(model)
    assert gives_back(tokenizer, ROUND_TRIP) and gives_back(
        tokenizer, prompts.build_prompt("为什么?", "zh")
    )
    assert tokenizer("Why?")["input_ids"].count(tokenizer.bos_token_id) == 1
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)


def without_eos(folder):
    settings = read_json(folder / "tokenizer_config.json")
    del settings["eos_token"]
    finetune_r1.write_json(folder / "tokenizer_config.json", settings)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (without_eos, "has no end-of-text token"),
        (lambda folder: [path.unlink() for path in folder.glob("*.safetensors")], "safetensors"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused_with_its_name(
    tiny_deepseek, told, tmp_path, damage, said
):
    damage(shutil.copytree(tiny_deepseek, tmp_path / "model"))
    done = told(["load", "--model", "model"])
    assert done.code == 1 and said in done.err and "error: " in done.err and "next: " in done.err


def test_a_tokenizer_that_loses_text_is_refused(tiny_r1, tmp_path):
    """As transformers 5 leaves it, saved and loaded again."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_r1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="loses text"):
        finetune_r1.load_tokenizer(tmp_path)


def test_a_row_whose_tokens_do_not_give_its_text_back_is_dropped_with_that_reason(tiny_r1):
    from tokenizers import normalizers

    tokenizer = finetune_r1.load_tokenizer(tiny_r1)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("mg", "")
    rows = [
        prompts.Row("Why?", "It is so.", "Give 5 mg."),
        prompts.Row("Why?", "It is so.", "Give 5 g."),
    ]
    statuses = [row.status for row in prompts.encode(rows, tokenizer, "en")]
    assert statuses == ["its tokens do not give its text back", "used"]


def test_composed_and_decomposed_accents_are_the_same_text(tiny_qwen):
    tokenizer = finetune_r1.load_tokenizer(tiny_qwen)
    [row] = prompts.encode([prompts.Row("Cafe\u0301?", "Yes.", "So.")], tokenizer, "en")
    assert row.status == "used"


def test_format_shows_a_text_with_its_spaces_in_both_languages(tiny_r1, told, tmp_path):
    finetune_r1.write_jsonl(tmp_path / "zh.jsonl", published.CHINESE)
    options = ["--model", tiny_r1, "--split", "train", "--json"]
    shown = json.loads(told(["format", "--dataset", SAMPLE, *options]).out)
    assert "Below is an instruction" in "".join(shown["first_row"]["tokens"])
    shown = json.loads(told(["format", "--dataset", "zh.jsonl", "--lang", "zh", *options]).out)
    assert shown["rows"]["used"] == len(published.CHINESE) and shown["tokens"]["min"] > 150


# ----------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module", params=["tiny_deepseek", "tiny_qwen", "tiny_four_bit"])
def saved(request, tmp_path_factory):
    """A base model's folder, the model trained in memory, and the folder of its merged weights."""
    base, run = request.getfixturevalue(request.param), tmp_path_factory.mktemp("saved") / "run"
    config = TrainConfig(
        model=str(base), dataset=str(SAMPLE), split="train[:4]", max_seq_length=1024, max_steps=2,
        warmup_steps=0, effective_batch=2, learning_rate=1e-2, max_new_tokens=4, wandb=False,
    )  # fmt: skip
    loaded, _ = finetune_r1.train_run(config, Run(run))
    finetune_r1.save(run=run)
    return base, loaded, run / "merged"


def test_every_layout_is_trained_and_saved(saved):
    """DeepSeek's own pads with EOS, R1-Distill-Qwen leaves BOS to a class; the ready 4-bit copy has no 16-bit
    weights of its own, so that its adapter is merged into the model it is a copy of."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, loaded, merged = saved
    assert (
        loaded.model.config.pad_token_id
        == loaded.tokenizer.pad_token_id
        != loaded.tokenizer.eos_token_id
    )
    tokenizer, model = (
        AutoTokenizer.from_pretrained(merged),
        AutoModelForCausalLM.from_pretrained(merged),
    )
    assert gives_back(tokenizer, ROUND_TRIP) and tokenizer.eos_token == EOS != tokenizer.pad_token
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_answers_come_from_the_adapter_on_the_base_that_it_was_trained_on(tiny_run):
    """As it is loaded for `infer` and `eval`: base, adapter added, weights filled in."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    state = get_peft_model_state_dict(LoadedModel.load_run(Run(tiny_run)).model)
    saved = load_file(tiny_run / "adapter" / "adapter_model.safetensors")
    assert state.keys() == saved.keys() and all(
        (state[name].cpu() == saved[name]).all() for name in saved
    )


@pytest.mark.parametrize(
    "damage", ["a tensor is missing", "a tensor too many", "another shape", "a NaN"]
)
def test_an_adapter_whose_weights_do_not_fit_is_not_used_though_its_run_vouches_for_it(
    tiny_run, tmp_path, damage
):
    """As it may come from a stranger, with hashes that agree; PEFT alone would warn of it, or of nothing."""
    from safetensors.torch import load_file, save_file

    run = Run(shutil.copytree(tiny_run, tmp_path / "run"))
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    if damage == "a tensor is missing":
        del weights[name]
    elif damage == "a tensor too many":
        weights["more"] = weights[name].clone()
    elif damage == "another shape":
        weights[name] = weights[name][:8].clone()
    else:
        weights[name][0, 0] = float("nan")
    save_file(weights, file)
    run.update(adapter={file.name: finetune_r1.file_hash(file)})
    for use in (LoadedModel.load_run, finetune_r1.merged_weights):
        with pytest.raises(UserError, match="adapter: its weights do not fit, or are no numbers"):
            use(run)
    assert not (run / "merged").exists()


def test_tables_of_a_4_bit_copy_that_are_in_16_bit_are_widened_and_that_is_told(
    tiny_four_bit, capsys
):
    """A copy has them that was quantized while torch's default was bfloat16: on a GPU its answers are NaN."""
    import torch

    model = LoadedModel.load(TrainConfig(model=str(tiny_four_bit))).model
    assert "in 16 bit" not in capsys.readouterr().err, "the published copy's are in 32"
    weights = [getattr(module, "weight", None) for module in model.modules()]
    states = [weight.quant_state for weight in weights if getattr(weight, "quant_state", None)]
    assert states
    for state in states:
        state.code, state.state2.code = state.code.bfloat16(), state.state2.code.bfloat16()
    finetune_r1.widen_tables(model)
    assert all(
        part.code.dtype == torch.float32 for state in states for part in (state, state.state2)
    )
    assert f"{2 * len(states)} tables in 16 bit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "four_bit", "weights"),
    [
        (TrainConfig.model, True, TrainConfig.model + "-unsloth-bnb-4bit"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", True, TrainConfig.model + "-unsloth-bnb-4bit"),
        (TrainConfig.model, False, TrainConfig.model),
        (TrainConfig.model + "-bnb-4bit", True, TrainConfig.model + "-bnb-4bit"),
        ("alice/her-model-8B", True, "alice/her-model-8B"),
    ],
)
def test_the_weights_of_a_name_are_those_that_unsloth_has_ready(
    monkeypatch, model, four_bit, weights
):
    """Downloaded are the small files of the one that was named, and all of the other."""
    asked = []

    def download(name, weights=True, revision=None):
        asked.append(name)
        if weights:
            raise StopAsyncIteration

    monkeypatch.setattr(finetune_r1, "check_model", lambda config, revision: None)
    monkeypatch.setattr(finetune_r1, "download_model", download)
    with pytest.raises(StopAsyncIteration):
        LoadedModel.load(TrainConfig(model=model, load_in_4bit=four_bit))
    assert asked == [model, weights]


# ------------------------------------------------------------------------------------------------ three lines


@pytest.fixture(scope="module")
def hub(unsloth, tiny_qwen, tmp_path_factory):
    """A Hub with the published repositories, under names that a CPU takes."""
    four_bit = published.write_four_bit(tmp_path_factory.mktemp("models") / "four-bit", tiny_qwen)
    with HubServer(tokens={"hf_writetoken": ("alice", "write")}) as server:
        server.add_repo("model", QWEN, published.repo_files(tiny_qwen))
        server.add_repo("model", f"{QWEN}-unsloth-bnb-4bit", published.repo_files(four_bit))
        server.add_repo("dataset", DATASET, published.medical_o1_repo())
        yield server


def typed(line, folder, hub, **environment):
    """A line that a user types in `folder`, whose home is there too."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        **environment,
    }
    command = [sys.executable, *line.split()]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def lines(hub, tmp_path_factory):
    """What each line printed, the folder they were typed in, and the requests to anything but the Hub, which
    go to a proxy that would keep them. Offline there is what `train` left in the cache: the 4-bit copy."""
    folder = tmp_path_factory.mktemp("user")
    offline, model = {"HF_HUB_OFFLINE": "1"}, f"--model {QWEN} --max-seq-length 1024"
    small = (
        "--max-steps 2 --warmup-steps 1 --learning-rate 1e-2 --effective-batch 2 --max-new-tokens 4"
    )
    with LoopbackServer() as elsewhere:
        here = {
            "https_proxy": elsewhere.url,
            "http_proxy": elsewhere.url,
            "HF_TOKEN": "hf_writetoken",
        }
        done = {}
        for name, line, more in [
            ("train", f"train {model} {small}", {}),
            ("infer", "infer question --max-new-tokens 4", {}),
            ("infer offline", "infer question --max-new-tokens 4", offline),
            ("format offline", f"format {model}", offline),
            ("push", "push --repo alice/DeepSeek-R1-Medical-COT", {}),
        ]:
            before = len(hub.requests)
            done[name] = typed(f"{finetune_r1.__file__} {line}", folder, hub, **here, **more)
            assert not more or len(hub.requests) == before
        yield done, folder, list(elsewhere.requests)


@pytest.mark.parametrize("line", ["train", "infer", "infer offline", "format offline", "push"])
def test_the_lines_work_by_name_with_and_without_a_network(lines, line):
    done = lines[0][line]
    assert done.returncode == 0, done.stderr
    assert "Ġ" not in done.stdout + done.stderr, "a byte-level token as such"


def test_the_same_question_gets_the_same_answer_without_a_network(lines):
    online, offline = lines[0]["infer"], lines[0]["infer offline"]
    assert online.stderr.splitlines()[-2] == offline.stderr.splitlines()[-2]


def test_the_ready_4_bit_copy_is_trained_and_its_commit_noted(lines, hub):
    [run] = (lines[1] / "runs").iterdir()
    commits = {
        name: hub.repos["model", name].commits[-1].oid
        for name in (QWEN, f"{QWEN}-unsloth-bnb-4bit")
    }
    assert read_json(run / "run.json")["model_revisions"] == commits
    assert read_json(run / "adapter" / "adapter_config.json")["base_model_name_or_path"] == QWEN


def test_nothing_but_the_hub_is_asked_for_anything(lines):
    """Its own service for datasets is a host beside it."""
    assert [
        path for _, path in lines[2] if not path.startswith("http://datasets-server.127.0.0.1")
    ] == []


@pytest.fixture
def here(hub, monkeypatch):
    """Has this process ask that Hub, which is silent after `here()`."""
    from huggingface_hub import constants, hf_api

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    yield lambda path="": hub.faults.append(Fault("*", path, delay=STALL, times=math.inf))
    hub.faults.clear()


def test_a_silent_hub_is_waited_for_once_where_the_cache_has_the_model(
    hub, here, told, monkeypatch
):
    """Only by what has to know the newest commit: a run has its own."""
    train = [
        "train",
        "--model",
        QWEN,
        "--dataset",
        SAMPLE,
        "--split",
        "train[:4]",
        "--max-seq-length",
        1024,
    ]
    train += [
        "--max-steps",
        1,
        "--learning-rate",
        1e-2,
        "--effective-batch",
        2,
        "--max-new-tokens",
        2,
    ]
    train += ["--run-dir", "runs/a"]
    assert told(train).code == 0 and told(["save", "--output", "full"]).code == 0
    monkeypatch.setattr(finetune_r1, "SILENT_SECONDS", dict.fromkeys(finetune_r1.SILENT_SECONDS, 1))
    here()
    train[-1] = "runs/b"
    for line, requests in (
        (train, 1),
        (["infer", "Why?", "--max-new-tokens", 2], 0),
        (["save"], 0),
    ):
        before = len(hub.requests)
        done = told(line)
        assert done.code == 0, done.err
        assert len(hub.requests) - before == requests, hub.requests[before:]


def test_weights_that_stop_coming_are_told_with_what_to_do(hub, here, told, tiny_r1, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CLIENT_READ_TIMEOUT", "500ms")
    hub.add_repo("model", "org/tiny", published.repo_files(tiny_r1))
    here("/xorbs/")
    load = ["load", "--model", "org/tiny", "--no-load-in-4bit"]
    done = told(load)
    assert done.code == 1 and "the Hub was not reached" in done.err and "Traceback" not in done.err
    hub.faults.clear()
    assert told(load).code == 0


def test_what_was_pushed_loads_by_name_and_gives_texts_back(lines, hub, tmp_path):
    """Also by the lines on its card, as they stand."""
    [card] = [path.read_text() for path in lines[1].glob("runs/*/README.md")]
    to_paste = card.split("```python\n")[1].split("```")[0]
    (tmp_path / "stranger.py").write_text(f"""
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
text = {prompts.build_prompt("Why?")!r}
tokenizer = AutoTokenizer.from_pretrained("alice/DeepSeek-R1-Medical-COT")
batch = tokenizer(text, return_tensors="pt")
assert tokenizer.decode(batch["input_ids"][0]) == {BOS!r} + text
merged = AutoModelForCausalLM.from_pretrained("alice/DeepSeek-R1-Medical-COT")(**batch).logits
base = AutoModelForCausalLM.from_pretrained("{QWEN}")
before = base(**batch).logits
tuned = PeftModel.from_pretrained(base, "alice/DeepSeek-R1-Medical-COT", subfolder="adapter")(**batch).logits
print(float((merged - tuned).norm() / (merged - before).norm()))
{to_paste}""")
    done = typed("stranger.py", tmp_path, hub, HF_TOKEN="hf_writetoken")
    assert done.returncode == 0, done.stderr
    off, answer = done.stdout.split("\n", 1)
    assert float(off) < 0.9, "rounding, beside the effect of a very short training"
    assert answer.strip() and "What widens" not in answer and "DeepSeek-R1-Medical-COT" in to_paste


@pytest.mark.slow
def test_a_commit_on_the_hub_does_not_keep_a_run_from_going_on(lines, hub, tmp_path):
    """It goes on with the model that it was begun with."""
    copy = shutil.copytree(lines[1], tmp_path / "later")
    [run] = (copy / "runs").iterdir()
    record = read_json(run / "run.json")
    finetune_r1.write_json(run / "run.json", record | {"status": "interrupted"})
    shutil.rmtree(run / "adapter")
    model = hub.repos["model", f"{QWEN}-unsloth-bnb-4bit"]
    model.commits.append(
        dataclasses.replace(model.commits[-1], title="README", parent=model.commits[-1].oid)
    )
    done = typed(f"{finetune_r1.__file__} train --resume", copy, hub)
    assert done.returncode == 0, done.stderr
    assert read_json(run / "run.json")["model_revisions"] == record["model_revisions"]


def test_inner_parts_of_unsloth_are_replaced_in_the_pinned_version_on_a_gpu_alone(monkeypatch):
    import torch

    pins = tomllib.loads((finetune_r1.PROJECT / "pyproject.toml").read_text())["project"][
        "dependencies"
    ]
    assert f"unsloth=={finetune_r1.UNSLOTH}" in pins and not finetune_r1.knows_unsloth()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert finetune_r1.knows_unsloth()
    monkeypatch.setattr(finetune_r1, "UNSLOTH", "2026.10.10")
    assert not finetune_r1.knows_unsloth()
