"""Merged weights are base + adapter, load in plain transformers, and never lie beside an adapter."""

import dataclasses
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import EOS, SCRIPT
from servers.hub import HubServer

import finetune_r1
import prompts
from finetune_r1 import Run, UserError

PROBE = "Below is an instruction. Why does a raised anion gap matter in a patient with diabetes?"


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the finished run, for these tests to save from."""
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture(scope="module")
def merged(run):
    saved = finetune_r1.save(run=run)
    assert saved is not None and saved["adapter_share"] == pytest.approx(1, abs=0.05)
    return run / "merged"


def logits(model, tokenizer):
    import torch

    with torch.no_grad():
        return model(**tokenizer(PROBE, return_tensors="pt")).logits.float()


def test_merged_weights_give_the_logits_of_base_and_adapter(run, merged, tiny_r1, r1_tokenizer):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(tiny_r1, dtype="auto")
    untuned = logits(base, r1_tokenizer)
    tuned = logits(PeftModel.from_pretrained(base, run / "adapter"), r1_tokenizer)
    off, effect = (logits(plain, r1_tokenizer) - tuned).norm(), (tuned - untuned).norm()
    assert off < 0.1 * effect


def test_the_folder_is_whole_and_safe(merged, tiny_r1):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.startswith("adapter") or name.endswith((".bin", ".pt"))]
    tokenizer, generation = AutoTokenizer.from_pretrained(merged), GenerationConfig.from_pretrained(merged)
    assert tokenizer.eos_token_id == generation.eos_token_id != tokenizer.pad_token_id
    assert (generation.temperature, generation.top_p, generation.max_length) == (0.6, 0.95, None)
    assert AutoModelForCausalLM.from_pretrained(merged, dtype="auto").dtype == torch.bfloat16


def test_saving_again_does_no_work_twice(run, merged):
    before = (merged / "model.safetensors").stat().st_mtime_ns
    finetune_r1.save(run=run)
    assert (merged / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_that_is_there_is_refused_so_that_nothing_mixes(run, merged, tmp_path):
    finetune_r1.save(run=run, as_="adapter", output=tmp_path / "mine")
    with pytest.raises(UserError, match="there already"):
        finetune_r1.save(run=run, output=tmp_path / "mine")
    assert not (tmp_path / "mine" / "model.safetensors").exists()


def test_the_modelfile_has_the_training_prompt_and_stops_where_the_model_does(run, merged):
    finetune_r1.save(run=run, modelfile=True)
    text = (merged / "Modelfile").read_text()
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    assert template.replace("{{ .Prompt }}", "Why?") == prompts.build_prompt("Why?")
    assert f'PARAMETER stop "{EOS}"' in text and text.startswith("FROM .\n")
    assert "PARAMETER temperature 0.6\nPARAMETER top_p 0.95\n" in text
    finetune_r1.save(run=run)  # is still what was verified


@pytest.mark.parametrize("eos", ['</s>"', '"""', "</s>\nFROM other"])
def test_an_end_of_text_token_that_ollama_would_read_otherwise_gets_no_modelfile(run, merged, tmp_path, eos):
    """It ends a value at a quotation mark before a line's end, and has no escape for it."""
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("Modelfile"))
    settings = copy / "merged" / "tokenizer_config.json"
    finetune_r1.write_json(settings, finetune_r1.read_json(settings) | {"eos_token": eos})
    saved = Run(copy).record["saved"]
    Run(copy).update(saved=saved | {"files": finetune_r1.file_sizes(copy / "merged")})
    with pytest.raises(UserError, match="--modelfile: Ollama can't stop at"):
        finetune_r1.save(run=copy, modelfile=True)
    assert not (copy / "merged" / "Modelfile").exists()


def test_the_line_for_vllm_names_base_and_adapter_or_the_merged_folder(run, merged, tiny_r1, tmp_path):
    ending = "--reasoning-parser deepseek_r1 --max-model-len 768"
    assert finetune_r1.save(run=run)["serve"] == f"vllm serve {merged} {ending}"
    adapter = finetune_r1.save(run=run, as_="adapter")["serve"]
    assert adapter.startswith(f"vllm serve {tiny_r1} --enable-lora --lora-modules tuned={run / 'adapter'}")
    template = run / "adapter" / "chat_template.jinja"
    assert adapter.endswith(f"--max-lora-rank 16 --chat-template {template} {ending}") and template.exists()
    elsewhere = tmp_path / "my adapter"
    adapter = finetune_r1.save(run=run, as_="adapter", output=elsewhere)["serve"]
    assert f"tuned={elsewhere}" in shlex.split(adapter)


def test_what_would_fill_the_disk_is_refused_before_it_starts_with_the_way_out(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    half = {tmp_path / "merged": free * 6 // 10, tmp_path / "cache" / "hub": free * 6 // 10}
    for path, size in half.items():
        finetune_r1.check_room({path: size}, "save elsewhere")
    with pytest.raises(UserError, match=r"GB free, .* GB are needed") as refused:
        finetune_r1.check_room(half, "save elsewhere")
    assert refused.value.next_step == "save elsewhere"


def test_the_size_of_a_base_model_is_known_before_and_after_its_download(tiny_r1, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants, hf_api

    size = sum(file.stat().st_size for file in tiny_r1.glob("*.safetensors"))
    assert finetune_r1.weights_size(str(tiny_r1)) == (size, 0)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        hub.add_repo("model", "org/base", {path.name: path.read_bytes() for path in tiny_r1.iterdir()})
        assert finetune_r1.weights_size("org/base") == (size, size)
        huggingface_hub.snapshot_download("org/base")
        assert finetune_r1.weights_size("org/base") == (size, 0)
    assert finetune_r1.weights_size("org/base") == (size, 0), "without a network what was downloaded counts"


@pytest.mark.parametrize("damage", ["missing", "left over"])
def test_merged_weights_that_are_no_whole_model_are_not_saved(run, tmp_path, monkeypatch, damage):
    """As read back from the disk, where a weight may have been left out, or something in."""
    whole = finetune_r1.merge

    def merge(source, adapter, folder):
        from safetensors.torch import load_file, save_file

        whole(source, adapter, folder)
        weights = load_file(folder / "model.safetensors")
        norm = weights.pop("model.norm.weight")
        if damage == "left over":
            weights |= {"model.norm.weight": norm, "model.layers.9.mlp.up_proj.weight": norm.clone()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(finetune_r1, "merge", merge)
    with pytest.raises(UserError, match="no whole model"):
        finetune_r1.save(run=run, output=tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_file_by_file_the_weights_are_pefts_own_bit_for_bit(run, tiny_r1, tmp_path, monkeypatch):
    """Also where base and result are spread over several files."""
    import huggingface_hub
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_r1, dtype="auto")
    base.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    split = huggingface_hub.split_torch_state_dict_into_shards
    small = lambda weights, max_shard_size: split(weights, max_shard_size="70KB")  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "split_torch_state_dict_into_shards", small)
    finetune_r1.merge(tmp_path / "base", run / "adapter", tmp_path / "merged")
    PeftModel.from_pretrained(base, run / "adapter").merge_and_unload().save_pretrained(tmp_path / "pefts")

    def weights(folder):
        files = sorted(folder.glob("*.safetensors"))
        return {name: weight for file in files for name, weight in load_file(file).items()}

    files = {path.name for path in (tmp_path / "merged").glob("model-*")}
    index = finetune_r1.read_json(tmp_path / "merged" / "model.safetensors.index.json")
    ours, pefts, before = (weights(tmp_path / name) for name in ("merged", "pefts", "base"))
    assert len(files) > 3 and files == set(index["weight_map"].values())
    assert ours.keys() == pefts.keys() == index["weight_map"].keys()
    assert all(ours[name].equal(pefts[name]) for name in ours)
    changed = {name.split(".")[-2] for name in ours if not ours[name].equal(before[name])}
    assert changed == set(Run(run).config.target_modules.split(","))


def test_the_scale_of_rslora_is_pefts_too(run, tiny_r1, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    settings = finetune_r1.read_json(adapter / "adapter_config.json") | {"use_rslora": True, "lora_alpha": 5}
    finetune_r1.write_json(adapter / "adapter_config.json", settings)
    finetune_r1.merge(tiny_r1, adapter, tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_r1, dtype="auto")
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(tmp_path / "pefts")
    ours, pefts = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "pefts"))
    assert all(ours[name].equal(pefts[name]) for name in pefts)


def test_what_old_versions_saved_beside_the_weights_does_not_stop_a_merge(run, tiny_r1, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    base, extra = shutil.copytree(tiny_r1, tmp_path / "base"), "model.layers.0.self_attn.rotary_emb.inv_freq"
    file = sorted(base.glob("*.safetensors"))[0]
    save_file({**load_file(file), extra: torch.ones(8)}, file, {"format": "pt"})
    finetune_r1.merge(base, run / "adapter", tmp_path / "merged")
    assert extra not in load_file(tmp_path / "merged" / "model.safetensors")


def test_weights_of_an_adapter_that_find_no_place_are_not_left_out_in_silence(run, tiny_r1, tmp_path):
    with pytest.raises(UserError, match="do not fit"):
        finetune_r1.merge(tiny_r1, more_layers(run / "adapter", tmp_path), tmp_path / "merged")


def more_layers(adapter, tmp_path):
    """The adapter with one more layer than the base."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapter, tmp_path / "more")
    weights = load_file(folder / "adapter_model.safetensors")
    for name, weight in list(weights.items()):
        if ".layers.1." in name:
            weights[name.replace(".layers.1.", ".layers.2.")] = weight.clone()
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def name_base(run, config):
    finetune_r1.write_json(run / "config.json", dataclasses.asdict(config))
    settings = finetune_r1.read_json(run / "adapter" / "adapter_config.json")
    settings["base_model_name_or_path"] = config.model
    finetune_r1.write_json(run / "adapter" / "adapter_config.json", settings)
    Run(run).update(adapter={})  # its hashes


def test_a_quantized_base_is_not_merged_into(run, tiny_four_bit, tmp_path):
    """One that is quantized without its name saying so."""
    quantized = shutil.copytree(tiny_four_bit, tmp_path / "base")
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("merged*"))
    name_base(copy, dataclasses.replace(Run(copy).config, model=str(quantized)))
    with pytest.raises(UserError, match="is quantized"):
        finetune_r1.save(run=copy)


def test_an_adapter_that_was_never_trained_is_not_merged():
    import torch

    same = torch.ones(3, 5)
    with pytest.raises(UserError, match="never trained"):
        finetune_r1.check_merge(same, same, same)


@pytest.mark.parametrize("times", [0, 2])
def test_a_lost_or_doubled_adapter_is_caught(times):
    """The probe itself: logits in which the adapter's effect is there `times` times, and rounding noise."""
    import torch

    torch.manual_seed(0)
    base, effect, noise = torch.randn(3, 50, 200).unbind(0)
    tuned = base + 0.3 * effect
    assert finetune_r1.check_merge(base, tuned, base + 0.3 * effect + 0.05 * noise)["adapter_share"] > 0.9
    with pytest.raises(UserError, match="do not act as base"):
        finetune_r1.check_merge(base, tuned, base + times * 0.3 * effect + 0.05 * noise)


@pytest.mark.parametrize(("share", "said"), [(0.95, False), (0.81, True), (0.55, True)])
def test_a_good_merge_of_which_rounding_swallows_a_part_is_saved_and_the_part_is_told(share, said, capsys):
    """As of a short training, whose changes are as small as the steps between 16-bit numbers."""
    import torch

    torch.manual_seed(0)
    base, effect, noise = torch.randn(3, 50, 200).unbind(0)
    found = finetune_r1.check_merge(base, base + effect, base + share * effect + 0.5 * noise)
    assert found["adapter_share"] == pytest.approx(share, abs=0.05)
    assert ("of the adapter's effect" in capsys.readouterr().err) == said


def test_a_failed_check_leaves_no_folder(run, tmp_path, monkeypatch):
    """A merge that loses the adapter, as some have: nothing may look saved afterwards."""
    copy, whole = tmp_path / "run", finetune_r1.merge
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("merged*"))

    def merge(source, adapter, folder):
        from safetensors.torch import load_file, save_file

        lost = shutil.copytree(adapter, tmp_path / "lost")
        weights = load_file(lost / "adapter_model.safetensors")
        save_file({name: weight * 0 for name, weight in weights.items()}, lost / "adapter_model.safetensors")
        whole(source, lost, folder)

    monkeypatch.setattr(finetune_r1, "merge", merge)
    with pytest.raises(UserError, match="Nothing was saved"):
        finetune_r1.save(run=copy)
    assert not list(copy.glob("*merged*"))


def test_a_disk_that_takes_no_more_ends_in_a_message_and_leaves_nothing(run, tmp_path):
    """A limit of 100 KiB a file stands in for the full disk: the write fails in the same place."""
    save = f"ulimit -f 100; exec {sys.executable} {SCRIPT} save --run {run} --output {tmp_path}/merged"
    done = subprocess.run(["bash", "-c", save], capture_output=True, text=True)
    assert done.returncode == 1 and "next:" in done.stderr and "disk" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_the_16_bit_base_is_found_behind_a_quantized_name(run, tiny_r1, tmp_path):
    renamed = tmp_path / "tiny-unsloth-bnb-4bit"
    shutil.copytree(tiny_r1, tmp_path / "tiny")
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("merged*"))
    config = dataclasses.replace(Run(copy).config, model=str(renamed))
    name_base(copy, config)
    assert finetune_r1.save(run=copy)["adapter_share"] > 0.9
