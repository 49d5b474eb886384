"""Finding and loading models: tokenizers that transformers 5 would ruin, ready 4-bit copies, moved bases."""

import dataclasses
import os
import shutil
import subprocess
import sys
import tomllib

import published
import pytest
from conftest import BOS, EOS
from servers.base import LoopbackServer
from servers.hub import HubServer

import finetune_r1
import prompts
from finetune_r1 import ROUND_TRIP, LoadedModel, Run, TrainConfig, UserError, read_json

LAYOUTS = ["tiny_r1", "tiny_deepseek", "tiny_qwen", "tiny_four_bit", "smollm2"]
QWEN = "unsloth/DeepSeek-R1-Distill-Qwen-1.5B"  # small enough for a CPU, with a ready 4-bit copy
DATASET = TrainConfig.dataset


def round_trips(tokenizer, text):
    return tokenizer.decode(tokenizer(text)["input_ids"]) == (tokenizer.bos_token or "") + text


# ------------------------------------------------------------------------------------ tokenizer


@pytest.mark.parametrize("name", LAYOUTS)
def test_load_tokenizer_round_trips_with_one_bos_in_every_layout(request, name):
    tokenizer = finetune_r1.load_tokenizer(request.getfixturevalue(name))
    assert round_trips(tokenizer, ROUND_TRIP)
    assert round_trips(tokenizer, prompts.build_prompt("为什么?", "zh"))
    assert tokenizer("Why?")["input_ids"].count(tokenizer.bos_token_id) == 1
    assert tokenizer.pad_token_id is not None and tokenizer.padding_side == "left"


def test_load_tokenizer_that_loses_text_is_refused(tiny_r1, tmp_path):
    """As transformers 5 leaves it, saved and loaded again."""
    from transformers import AutoTokenizer

    ruined = AutoTokenizer.from_pretrained(tiny_r1)
    assert "Belowisaninstruction" in ruined.decode(ruined("Below is an instruction")["input_ids"])
    ruined.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="loses text"):
        finetune_r1.load_tokenizer(tmp_path)


def test_encode_row_whose_tokens_lose_text_is_dropped_with_that_reason(tiny_r1):
    from tokenizers import normalizers

    tokenizer = finetune_r1.load_tokenizer(tiny_r1)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("mg", "")
    rows = [prompts.Row("Why?", "It is so.", f"Give 5 {unit}.") for unit in ("mg", "g")]
    statuses = [prompts.encode(row, tokenizer, "en").status for row in rows]
    assert statuses[0] != "used" == statuses[1]


# ------------------------------------------------------------------------- which model, and where


DAMAGE = {  # of a model's folder: a pattern of files, and what the last one becomes
    "has no config.json": ("config.json", None),
    "has no tokenizer.json": ("tokenizer.json", None),
    "no .safetensors weights": ("*.safetensors", None),
    "holds a LoRA adapter": ("config.json", "adapter_config.json"),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_load_folder_that_is_no_whole_model_names_what_is_wrong(
    tiny_deepseek, run_cli, tmp_path, said
):
    folder = shutil.copytree(tiny_deepseek, tmp_path / "model-8B")  # which is no size
    pattern, renamed = DAMAGE[said]
    for path in folder.glob(pattern):
        path.rename(folder / renamed) if renamed else path.unlink()
    done = run_cli(["load", "--model", "model-8B"])
    assert done.code == 1 and said in done.err and "error: " in done.err and "hint: " in done.err


def test_load_missing_path_is_not_found_and_8b_without_a_gpu_is_refused_offline(run_cli):
    for name in ("/models/DeepSeek-R1-8B", "./gone-8b/2", "nowhere"):
        done = run_cli(["load", "--model", name])
        assert done.code == 1 and f"--model {name} not found" in done.err
        assert "billion" not in done.err
    done = run_cli(["load"])
    assert done.code == 1 and "8.0 billion parameters" in done.err and "demo" in done.err


def test_infer_with_moved_base_takes_model_path(tiny_r1, tiny_run, run_cli, tmp_path):
    """A run trained on a folder that is elsewhere now, as Kaggle's used at home."""
    run = Run(shutil.copytree(tiny_run, tmp_path / "run"))
    settings = read_json(run / "config.json") | {"model": "/kaggle/input/r1/8b/2"}
    finetune_r1.write_json(run / "config.json", settings)
    ask = ["infer", "Why?", "--run", "run", "--max-new-tokens", 2]
    gone = run_cli(ask)
    assert gone.code == 1 and "--model /kaggle/input/r1/8b/2 not found" in gone.err
    assert "--model PATH" in gone.err and "billion" not in gone.err
    assert run_cli([*ask, "--model", tiny_r1]).code == 0


def test_infer_with_base_of_another_shape_is_refused(smollm2, tiny_run, run_cli):
    done = run_cli(["infer", "Why?", "--run", tiny_run, "--model", smollm2])
    assert done.code == 1 and "does not fit" in done.err and "check --model" in done.err


@pytest.mark.parametrize("damage", ["missing tensor", "extra tensor", "another shape"])
def test_load_run_adapter_that_does_not_fit_is_refused_though_hashes_agree(
    tiny_run, tmp_path, damage
):
    from safetensors.torch import load_file, save_file

    run = Run(shutil.copytree(tiny_run, tmp_path / "run"))
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    if damage == "missing tensor":
        del weights[name]
    elif damage == "extra tensor":
        weights["more"] = weights[name].clone()
    else:
        weights[name] = weights[name][:8].clone()
    save_file(weights, file)
    run.update(adapter={file.name: finetune_r1.file_hash(file)})
    with pytest.raises(UserError, match="does not fit"):
        LoadedModel.load_run(run)


def test_load_run_has_the_saved_adapters_weights(tiny_run):
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    state = get_peft_model_state_dict(LoadedModel.load_run(Run(tiny_run)).model)
    saved = load_file(tiny_run / "adapter" / "adapter_model.safetensors")
    assert state.keys() == saved.keys()
    assert all((state[name].cpu() == saved[name]).all() for name in saved)


def test_four_bit_name_is_the_repository_that_unsloth_has_ready():
    ready = TrainConfig.model + "-unsloth-bnb-4bit"
    for model, weights in {
        TrainConfig.model: ready,
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ready,
        TrainConfig.model + "-bnb-4bit": TrainConfig.model + "-bnb-4bit",
        "alice/her-model-8B": "alice/her-model-8B",
    }.items():
        assert finetune_r1.four_bit_name(TrainConfig(model=model)) == weights
    config = TrainConfig(load_in_4bit=False)
    assert finetune_r1.four_bit_name(config) == TrainConfig.model


@pytest.mark.parametrize("layout", ["tiny_deepseek", "tiny_qwen", "tiny_four_bit"])
def test_published_layout_trains_and_saves_with_eos_and_bos_right(
    request, tiny_run, tiny_r1, tmp_path, layout
):
    """DeepSeek pads with EOS, R1-Distill-Qwen leaves BOS to a class, a 4-bit copy needs its 16-bit base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = str(request.getfixturevalue(layout))
    config = dataclasses.replace(Run(tiny_run).config, model=model, max_steps=2)
    finetune_r1.train_run(config, Run(tmp_path / "run"))
    base = str(tiny_r1) if layout == "tiny_four_bit" else None
    finetune_r1.save(run=tmp_path / "run", model=base)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert round_trips(tokenizer, ROUND_TRIP) and tokenizer.eos_token == EOS
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


# ------------------------------------------------------------------------------ the three lines


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
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf")}
    command = [sys.executable, *line.split()]
    environment = {**os.environ, **here, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def lines(hub, tmp_path_factory):
    """What each line printed, the folder they were typed in, and the requests to anything but the Hub.

    README's way offline: what is needed is loaded while online, then the Hub is not asked again.
    """
    folder = tmp_path_factory.mktemp("user")
    offline = {"HF_HUB_OFFLINE": "1"}
    model = f"--model {QWEN} --max-seq-length 1024"
    short = "--max-steps 2 --warmup-steps 1 --learning-rate 1e-2 --effective-batch 2"
    done = {}
    with LoopbackServer() as elsewhere:
        proxies = {"https_proxy": elsewhere.url, "http_proxy": elsewhere.url}
        for name, line, more in [
            ("train", f"train {model} {short} --max-new-tokens 4", {}),
            ("infer", "infer question --max-new-tokens 4", {}),
            ("push", "push --repo alice/DeepSeek-R1-Medical-COT", {}),
            ("infer offline", "infer question --max-new-tokens 4", offline),
            ("format offline", f"format {model}", offline),
            ("train offline", f"train {model} {short} --max-new-tokens 4", offline),
            ("save offline", "save", offline),
        ]:
            before = len(hub.requests)
            line = f"{finetune_r1.__file__} {line}"
            done[name] = typed(line, folder, hub, HF_TOKEN="hf_writetoken", **proxies, **more)
            assert not more or len(hub.requests) == before, name
        yield done, folder, list(elsewhere.requests)


def test_three_lines_work_by_name_online_and_offline(lines):
    done = lines[0]
    for name in done:
        assert done[name].returncode == 0, (name, done[name].stderr)
        assert "Ġ" not in done[name].stdout + done[name].stderr, "a byte-level token as such"
    online, offline = done["infer"], done["infer offline"]
    assert online.stdout == offline.stdout
    assert online.stderr.splitlines()[-2] == offline.stderr.splitlines()[-2]


def test_train_by_name_records_the_commits_of_base_and_4_bit_copy(lines, hub):
    run = sorted((lines[1] / "runs").iterdir())[0]
    names = (QWEN, f"{QWEN}-unsloth-bnb-4bit")
    commits = {name: hub.repos["model", name].commits[-1].oid for name in names}
    assert read_json(run / "run.json")["model_revisions"] == commits
    assert read_json(run / "adapter" / "adapter_config.json")["base_model_name_or_path"] == QWEN


def test_three_lines_ask_nobody_but_the_hub(lines):
    """Its own service for datasets is a host beside it; no telemetry goes to the Hub either."""
    own = "http://datasets-server.127.0.0.1"
    assert [path for _, path in lines[2] if not path.startswith(own)] == []


def test_pushed_model_loads_by_name_also_by_the_lines_on_its_card(lines, hub, tmp_path):
    repo = hub.repos["model", "alice/DeepSeek-R1-Medical-COT"]
    card = repo.commits[-1].files["README.md"].decode()
    to_paste = card.split("```python\n")[1].split("```")[0]
    (tmp_path / "stranger.py").write_text(f"""
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
name = "alice/DeepSeek-R1-Medical-COT"
text = {prompts.build_prompt("Why?")!r}
tokenizer = AutoTokenizer.from_pretrained(name)
batch = tokenizer(text, return_tensors="pt")
assert tokenizer.decode(batch["input_ids"][0]) == {BOS!r} + text
merged = AutoModelForCausalLM.from_pretrained(name)(**batch).logits
base = AutoModelForCausalLM.from_pretrained("{QWEN}")
before = base(**batch).logits
tuned = PeftModel.from_pretrained(base, name, subfolder="adapter")(**batch).logits
print(float((merged - tuned).norm() / (merged - before).norm()))
{to_paste}""")
    done = typed("stranger.py", tmp_path, hub, HF_TOKEN="hf_writetoken")
    assert done.returncode == 0, done.stderr
    off, answer = done.stdout.split("\n", 1)
    assert float(off) < 0.9, "rounding, beside the effect of a very short training"
    assert answer.strip() and "DeepSeek-R1-Medical-COT" in to_paste


@pytest.mark.slow
def test_resume_after_a_new_commit_of_the_base_takes_the_old_one(lines, hub, tmp_path):
    copy = shutil.copytree(lines[1], tmp_path / "later")
    run = sorted((copy / "runs").iterdir())[0]
    record = read_json(run / "run.json")
    finetune_r1.write_json(run / "run.json", record | {"status": "interrupted"})
    shutil.rmtree(run / "adapter")
    model = hub.repos["model", f"{QWEN}-unsloth-bnb-4bit"]
    last = model.commits[-1]
    model.commits.append(dataclasses.replace(last, title="README", parent=last.oid))
    done = typed(f"{finetune_r1.__file__} train --resume {run}", copy, hub)
    assert done.returncode == 0, done.stderr
    assert read_json(run / "run.json")["model_revisions"] == record["model_revisions"]


def test_unsloth_constant_is_the_pinned_version():
    text = (finetune_r1.DATA.parent / "pyproject.toml").read_text()
    assert f"unsloth=={finetune_r1.UNSLOTH}" in tomllib.loads(text)["project"]["dependencies"]
