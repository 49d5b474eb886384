"""The published layout: the tokenizer that transformers 5 would ruin, the ready 4-bit copy, the names a user types."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import published
import pytest
from conftest import BOS, EOS, SAMPLE
from servers.base import LoopbackServer
from servers.hub import HubServer

import finetune_r1
import prompts
from finetune_r1 import ROUND_TRIP, Loaded, Run, TrainConfig, UserError, read_json

LAYOUTS = ["tiny_r1", "tiny_deepseek", "tiny_qwen", "tiny_four_bit", "smollm2"]
QWEN = "unsloth/DeepSeek-R1-Distill-Qwen-1.5B"  # a name that a CPU takes, and that has a ready 4-bit copy
DATASET = TrainConfig.dataset


@pytest.fixture(params=LAYOUTS)
def model(request):
    """The folder of a model in one of the layouts."""
    return request.getfixturevalue(request.param)


def gives_back(tokenizer, text):
    return tokenizer.decode(tokenizer(text)["input_ids"]) == (tokenizer.bos_token or "") + text


# ---------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("name", ["tiny_r1", "tiny_deepseek", "tiny_four_bit"])
def test_transformers_own_way_loses_all_white_space_so_the_stand_in_is_as_published(unsloth, request, name):
    from transformers import AutoTokenizer

    ruined = AutoTokenizer.from_pretrained(request.getfixturevalue(name))
    assert "Belowisaninstruction" in ruined.decode(ruined("Below is an instruction")["input_ids"])


def test_a_text_comes_back_byte_for_byte_with_one_bos_and_padding_of_its_own(model):
    tokenizer = finetune_r1.load_tokenizer(model)
    assert gives_back(tokenizer, ROUND_TRIP) and gives_back(tokenizer, prompts.build_prompt("为什么?", "zh"))
    assert tokenizer("Why?")["input_ids"].count(tokenizer.bos_token_id) == 1
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)


def test_what_is_saved_is_read_right_by_plain_transformers(model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = finetune_r1.load_tokenizer(model)
    finetune_r1.save_tokenizer(tokenizer, tmp_path)
    read_back = AutoTokenizer.from_pretrained(tmp_path)
    assert read_back(ROUND_TRIP)["input_ids"] == tokenizer(ROUND_TRIP)["input_ids"]
    assert (read_back.pad_token, read_back.eos_token) == (tokenizer.pad_token, tokenizer.eos_token)


def test_what_is_saved_has_the_form_that_transformers_4_and_ollama_read(model, tmp_path):
    tokenizer = finetune_r1.load_tokenizer(model)
    finetune_r1.save_tokenizer(tokenizer, tmp_path)
    settings = read_json(tmp_path / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["add_bos_token"] is True and settings["add_eos_token"] is False
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"backend", "from_slow", "is_local", "local_files_only"} & settings.keys()
    if tokenizer.chat_template:
        assert settings["chat_template"] == (tmp_path / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_a_tokenizer_that_loses_text_is_refused(tiny_r1, tmp_path):
    """As transformers 5 leaves it, saved and loaded again."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_r1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not give a text back"):
        finetune_r1.load_tokenizer(tmp_path)


def test_a_tokenizer_that_a_stranger_reads_otherwise_is_not_saved(tiny_r1, tmp_path, monkeypatch):
    """The class name is what makes the difference."""
    write_json = finetune_r1.write_json
    monkeypatch.setattr(
        finetune_r1, "write_json", lambda path, value: write_json(path, value | {"tokenizer_class": "LlamaTokenizer"})
    )
    shutil.copy(tiny_r1 / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"does not give a text back|other tokens"):
        finetune_r1.save_tokenizer(finetune_r1.load_tokenizer(tiny_r1), tmp_path)


def test_a_row_whose_tokens_do_not_give_its_text_back_is_dropped_with_that_reason(tiny_r1):
    from tokenizers import normalizers

    tokenizer = finetune_r1.load_tokenizer(tiny_r1)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("mg", "")
    rows = [prompts.Row("Why?", "It is so.", "Give 5 mg."), prompts.Row("Why?", "It is so.", "Give 5 g.")]
    fates = [row.fate for row in finetune_r1.encode(rows, tokenizer, "en")]
    assert fates == ["its tokens do not give its text back", "used"]


def test_composed_and_decomposed_accents_are_the_same_text(tiny_qwen):
    [row] = finetune_r1.encode([prompts.Row("Cafe\u0301?", "Yes.", "So.")], finetune_r1.load_tokenizer(tiny_qwen), "en")
    assert row.fate == "used"


def test_format_shows_a_text_with_its_spaces_in_both_languages(tiny_r1, told, tmp_path):
    finetune_r1.write_jsonl(tmp_path / "zh.jsonl", published.CHINESE)
    shown = told(["format", "--model", tiny_r1, "--dataset", SAMPLE, "--split", "train", "--json"])
    assert "Below is an instruction" in "".join(json.loads(shown.out)["first_row"]["tokens"])
    shown = json.loads(told(["format", "--model", tiny_r1, "--dataset", "zh.jsonl", "--split", "train", "--lang", "zh",
                             "--json"]).out)  # fmt: skip
    assert shown["rows"]["used"] == len(published.CHINESE) and shown["tokens"]["min"] > 150


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["tiny_deepseek", "tiny_qwen", "tiny_four_bit"])
def test_every_layout_is_trained_and_saved(request, name, tmp_path):
    """DeepSeek's own pads with EOS, R1-Distill-Qwen leaves BOS to a class; the ready 4-bit copy has no 16-bit weights
    of its own, so that its adapter is merged into the model it is a copy of."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = request.getfixturevalue(name)
    config = TrainConfig(
        model=str(folder), dataset=str(SAMPLE), split="train[:4]", max_seq_length=1024, max_steps=2, effective_batch=2,
        warmup_steps=0, learning_rate=1e-2, max_new_tokens=4, wandb=False,
    )  # fmt: skip
    loaded, _ = finetune_r1.train_run(config, Run(tmp_path / "run"))
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id != loaded.tokenizer.eos_token_id
    finetune_r1.save(run=tmp_path / "run")
    merged = tmp_path / "run" / "merged"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert gives_back(tokenizer, ROUND_TRIP) and tokenizer.eos_token == EOS != tokenizer.pad_token
    assert AutoModelForCausalLM.from_pretrained(merged).generation_config.pad_token_id == tokenizer.pad_token_id


def test_what_is_saved_tells_older_programs_the_rope_settings(tiny_run, tmp_path):
    """Without them transformers 4 and Ollama take a theta of 10000 and no scaling, and say nothing."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    finetune_r1.save(run=run)
    settings = read_json(run / "merged" / "config.json")
    base = published.LLAMA_CONFIG
    assert settings["rope_theta"] == base["rope_theta"] and settings["rope_scaling"] == base["rope_scaling"]
    assert settings["rope_parameters"]["rope_theta"] == base["rope_theta"] and settings["torch_dtype"] == "bfloat16"


def test_answers_come_from_the_adapter_on_the_base_that_it_was_trained_on(tiny_run):
    """As it is loaded for `infer` and `eval`: base, adapter added, weights filled in."""
    from safetensors.torch import load_file

    loaded = Loaded.of_run(Run(tiny_run))
    saved = load_file(tiny_run / "adapter" / "adapter_model.safetensors")
    import peft

    state = peft.get_peft_model_state_dict(loaded.model)
    assert state.keys() == saved.keys() and all((state[name].cpu() == saved[name]).all() for name in saved)


def test_an_adapter_of_another_shape_is_refused(tiny_run, tmp_path):
    from safetensors.torch import load_file, save_file

    run = shutil.copytree(tiny_run, tmp_path / "run")
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    del weights[next(iter(weights))]
    save_file(weights, file)
    with pytest.raises(UserError, match="not those of the run's settings"):
        Loaded.of_run(Run(run))


def test_tables_of_a_4_bit_copy_that_are_in_16_bit_are_widened_and_that_is_told(tiny_four_bit, capsys):
    """As a copy has them that was quantized while torch's default was bfloat16: on a GPU its answers are NaN."""
    import torch

    model = Loaded.for_use(TrainConfig(model=str(tiny_four_bit))).model
    assert "in 16 bit" not in capsys.readouterr().err, "the published copy's are in 32"
    states = [m.weight.quant_state for m in model.modules() if getattr(getattr(m, "weight", None), "quant_state", None)]
    assert states
    for state in states:
        state.code, state.state2.code = state.code.bfloat16(), state.state2.code.bfloat16()
    finetune_r1.widen_tables(model)
    assert all(part.code.dtype == torch.float32 for state in states for part in (state, state.state2))
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
def test_the_weights_of_a_name_are_those_that_unsloth_has_ready(unsloth, model, four_bit, weights):
    assert finetune_r1.weights_name(TrainConfig(model=model, load_in_4bit=four_bit)) == weights


# --------------------------------------------------------------------------------------------------------- three lines


@pytest.fixture(scope="module")
def hub(unsloth, tiny_qwen, tmp_path_factory):
    """A Hub with the published repositories, under names that a CPU takes."""
    four_bit = published.write_four_bit(tmp_path_factory.mktemp("models") / "four-bit", tiny_qwen)
    with HubServer(tokens={"hf_writetoken": ("alice", "write")}) as server:
        server.add_repo("model", QWEN, published.repo_files(tiny_qwen))
        server.add_repo("model", f"{QWEN}-unsloth-bnb-4bit", published.repo_files(four_bit))
        server.add_repo("dataset", DATASET, published.medical_o1_repo())
        yield server


@pytest.fixture(scope="module")
def lines(hub, tmp_path_factory):
    """The three lines in a home of their own: what each printed, and the folder they were typed in. Every request to
    anything but the Hub goes to a proxy, which would keep it."""
    folder = tmp_path_factory.mktemp("user")
    with LoopbackServer() as elsewhere:
        here = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writetoken", "HF_HOME": str(folder / "hf")}
        here |= {"https_proxy": elsewhere.url, "http_proxy": elsewhere.url, "no_proxy": "127.0.0.1"}

        def typed(*line, **more):
            command = [sys.executable, finetune_r1.__file__, *line]
            environment = {**os.environ, **here, **more}
            return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

        small = ["--model", QWEN, "--max-seq-length", "1024", "--effective-batch", "2", "--max-new-tokens", "4"]
        done = {"train": typed("train", "--max-steps", "2", "--warmup-steps", "1", "--learning-rate", "1e-2", *small)}
        done["infer"] = typed("infer", "question", "--max-new-tokens", "4")
        # With the 4-bit copy alone in the cache, as `train` leaves it, and no network.
        done["offline"] = typed("infer", "question", "--max-new-tokens", "4", HF_HUB_OFFLINE="1")
        before = len(hub.requests)
        done["offline train"] = typed("train", "--max-steps", "2", "--warmup-steps", "1", *small, HF_HUB_OFFLINE="1")
        assert len(hub.requests) == before
        done["push"] = typed("push", "--repo", "alice/DeepSeek-R1-Medical-COT", "--json")
        yield done, folder, list(elsewhere.requests)


@pytest.mark.parametrize("line", ["train", "infer", "offline", "offline train", "push"])
def test_the_lines_work_by_name_with_and_without_a_network(lines, line):
    done = lines[0][line]
    assert done.returncode == 0, done.stderr
    assert "Ġ" not in done.stdout + done.stderr, "a byte-level token as such"


def test_the_same_question_gets_the_same_answer_without_a_network(lines):
    assert lines[0]["infer"].stderr.splitlines()[-2] == lines[0]["offline"].stderr.splitlines()[-2]


def test_the_ready_4_bit_copy_is_trained_and_its_commit_noted(lines, hub):
    [run, _] = sorted((lines[1] / "runs").iterdir())
    noted = read_json(run / "run.json")["model_revisions"]
    commits = {name: hub.repos["model", name].commits[-1].oid for name in (QWEN, f"{QWEN}-unsloth-bnb-4bit")}
    assert noted == commits
    assert read_json(run / "adapter" / "adapter_config.json")["base_model_name_or_path"] == QWEN


def test_nothing_but_the_hub_is_asked_for_anything(lines):
    """Its own service for datasets is a host beside it."""
    assert [path for _, path in lines[2] if not path.startswith("http://datasets-server.127.0.0.1")] == []


def test_what_was_pushed_loads_by_name_and_gives_texts_back(lines, hub, tmp_path):
    code = f"""
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
text = {prompts.build_prompt("Why?")!r}
tokenizer = AutoTokenizer.from_pretrained("alice/DeepSeek-R1-Medical-COT")
batch = tokenizer(text, return_tensors="pt")
assert tokenizer.decode(batch["input_ids"][0]) == {BOS!r} + text
merged = AutoModelForCausalLM.from_pretrained("alice/DeepSeek-R1-Medical-COT")
base = AutoModelForCausalLM.from_pretrained("{QWEN}")
before = base(**batch).logits
adapter = PeftModel.from_pretrained(base, "alice/DeepSeek-R1-Medical-COT", subfolder="adapter")
print(float((merged(**batch).logits - adapter(**batch).logits).norm() / (merged(**batch).logits - before).norm()))
"""
    here = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writetoken", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.9, "rounding, beside the effect of a very short training"


def test_a_commit_on_the_hub_does_not_keep_a_run_from_going_on(lines, hub):
    """It goes on with the model that it was begun with."""
    _, folder, _ = lines
    copy = shutil.copytree(folder, folder.parent / "later")
    run = max((copy / "runs").iterdir())
    record = read_json(run / "run.json")
    finetune_r1.write_json(run / "run.json", record | {"status": "interrupted"})
    shutil.rmtree(run / "adapter")
    model = hub.repos["model", f"{QWEN}-unsloth-bnb-4bit"]
    model.commits.append(dataclasses.replace(model.commits[-1], title="README", parent=model.commits[-1].oid))
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(copy / "hf")}
    command = [sys.executable, finetune_r1.__file__, "train", "--resume", run]
    done = subprocess.run(command, cwd=copy, env=os.environ | here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_json(run / "run.json")["model_revisions"] == record["model_revisions"]
