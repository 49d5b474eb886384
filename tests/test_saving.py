"""Merged weights are base + adapter, load in plain transformers, and never lie beside an adapter."""

import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import SCRIPT, add_base, name_base

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
    assert not [
        name for name in names if name.startswith("adapter") or name.endswith((".bin", ".pt"))
    ]
    tokenizer, generation = (
        AutoTokenizer.from_pretrained(merged),
        GenerationConfig.from_pretrained(merged),
    )
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


@pytest.mark.parametrize("eos", ['</s>"', '"""', "</s>\nFROM other"])
def test_an_end_of_text_token_that_ollama_would_read_otherwise_gets_no_modelfile(
    run, merged, tmp_path, eos
):
    """It ends a value at a quotation mark before a line's end, and has no escape for it."""
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("Modelfile"))
    settings = copy / "merged" / "tokenizer_config.json"
    finetune_r1.write_json(settings, finetune_r1.read_json(settings) | {"eos_token": eos})
    saved = Run(copy).record["saved"]
    Run(copy).update(saved=saved | {"files": finetune_r1.file_sizes(copy / "merged")})
    with pytest.raises(UserError, match="--modelfile: Ollama can't stop at"):
        finetune_r1.save(run=copy, modelfile=True)
    assert not (copy / "merged" / "Modelfile").exists()


def test_the_line_for_vllm_names_base_and_adapter_or_the_merged_folder(
    run, merged, tiny_r1, tmp_path
):
    ending = "--max-model-len 768 --reasoning-parser deepseek_r1"
    assert finetune_r1.save(run=run)["serve"] == f"vllm serve {merged} {ending}"
    adapter = finetune_r1.save(run=run, as_="adapter")["serve"]
    assert adapter.startswith(
        f"vllm serve {tiny_r1} --enable-lora --lora-modules tuned={run / 'adapter'}"
    )
    template = run / "adapter" / "chat_template.jinja"
    assert (
        adapter.endswith(f"--max-lora-rank 16 --chat-template {template} {ending}")
        and template.exists()
    )
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
    assert refused.value.hint == "save elsewhere"


def test_the_size_of_a_base_model_is_known_before_and_after_its_download(tiny_r1, hub):
    import huggingface_hub

    sizes = [file.stat().st_size for file in tiny_r1.glob("*.safetensors")]
    size = sum(sizes)
    assert finetune_r1.weights_size(str(tiny_r1)) == (size, 0, 0)
    add_base(hub, tiny_r1)
    assert finetune_r1.weights_size("org/base") == (size, size, max(sizes))
    huggingface_hub.snapshot_download("org/base")
    assert finetune_r1.weights_size("org/base") == (size, 0, 0)
    hub.close()
    assert finetune_r1.weights_size("org/base") == (size, 0, 0), (
        "without a network what is there counts"
    )


def test_on_a_small_disk_one_file_of_the_base_is_there_at_a_time(
    run, merged, tiny_r1, hub, small_disk
):
    """Of those that were downloaded for this: what was in the cache stays there, and is used."""
    import huggingface_hub

    add_base(hub, tiny_r1)
    copy = small_disk.folder / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("merged*"))
    name_base(copy, "org/base")
    kept = huggingface_hub.hf_hub_download("org/base", "model-00003-of-00004.safetensors")
    finetune_r1.download_model("org/base", weights=False)
    size, _, largest = finetune_r1.weights_size("org/base")
    small_disk.hold(size + largest + 10_000)
    saved = finetune_r1.save(run=copy)
    assert saved["adapter_share"] > 0.9 and size < small_disk.most <= small_disk.size
    assert (copy / "merged" / "model.safetensors").read_bytes() == (
        merged / "model.safetensors"
    ).read_bytes()
    assert not (copy / "merged" / ".base").exists()
    cached = [file.name for file in small_disk.folder.glob("hub/*/snapshots/*/*.safetensors")]
    downloads = [
        path for method, path in hub.requests if method == "GET" and path.endswith(".safetensors")
    ]
    assert cached == [finetune_r1.Path(kept).name] and len(downloads) == 4


def test_without_room_for_the_result_nothing_is_downloaded(run, tiny_r1, hub, small_disk):
    add_base(hub, tiny_r1)
    copy = shutil.copytree(run, small_disk.folder / "run", ignore=shutil.ignore_patterns("merged*"))
    name_base(copy, "org/base")
    small_disk.hold(finetune_r1.weights_size("org/base")[0])
    with pytest.raises(UserError, match="GB are needed"):
        finetune_r1.save(run=copy)
    assert not list(small_disk.folder.rglob("model*.safetensors"))


@pytest.mark.parametrize("damage", ["missing", "left over"])
def test_a_base_that_is_no_whole_model_is_not_merged_into(run, tiny_r1, tmp_path, damage):
    index = shutil.copytree(tiny_r1, tmp_path / "base") / "model.safetensors.index.json"
    places = finetune_r1.read_json(index)["weight_map"]
    norm = places.pop("model.norm.weight")
    if damage == "left over":
        places |= {"model.norm.weight": norm, "model.layers.9.mlp.up_proj.weight": norm}
    finetune_r1.write_json(index, {"weight_map": places})
    with pytest.raises(UserError, match="no whole model"):
        merge(tmp_path / "base", run / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("damage", ["missing", "left over", "changed"])
def test_a_file_that_is_not_what_was_merged_is_not_saved(run, tmp_path, monkeypatch, damage):
    """As read back from the disk, where a weight may have been left out, or something in."""
    import safetensors.torch

    def save_file(weights, *rest):
        norm = weights["model.norm.weight"]
        changes = {"left over": {"more": norm.clone()}, "changed": {"model.norm.weight": -norm}}
        weights = {**weights, **changes.get(damage, {})}
        if damage == "missing":
            del weights["model.norm.weight"]
        whole(weights, *rest)

    whole = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(UserError, match="was not written as it should be"):
        finetune_r1.save(run=run, output=tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def merge(base, adapter, folder):
    return finetune_r1.Merge("", base, adapter, folder).walk(finetune_r1.load_tokenizer(adapter))


def test_file_by_file_the_weights_are_pefts_own_bit_for_bit(run, tiny_r1, tmp_path, monkeypatch):
    """Also where base and result are spread over several files."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_r1, dtype="auto")
    base.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    monkeypatch.setattr(finetune_r1, "SHARD", 70_000)
    merge(tmp_path / "base", run / "adapter", tmp_path / "merged")
    PeftModel.from_pretrained(base, run / "adapter").merge_and_unload().save_pretrained(
        tmp_path / "pefts"
    )

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


def test_biases_and_an_output_layer_that_is_the_embedding_are_walked_through_too(
    tiny_qwen, hub, tmp_path, monkeypatch
):
    """Also file by file, where the embedding is downloaded once more."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(tiny_qwen, tie_word_embeddings=True)
    base = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    add_base(hub, tmp_path / "base")
    lora = LoraConfig(
        target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    tuned = get_peft_model(base, lora)
    tuned.save_pretrained(tmp_path / "adapter")
    tokenizer = finetune_r1.load_tokenizer(tiny_qwen)
    source = finetune_r1.download_model("org/base", weights=False)
    monkeypatch.setattr(finetune_r1, "SHARD", 100_000)
    found = finetune_r1.Merge("org/base", source, tmp_path / "adapter", tmp_path / "merged").walk(
        tokenizer
    )
    assert finetune_r1.check_merge(*found)["adapter_share"] == pytest.approx(1, abs=0.05)
    assert (
        not list(tmp_path.glob("hub/*/snapshots/*/*.safetensors")) and torch.isfinite(found).all()
    )
    merged = tuned.merge_and_unload().state_dict()
    files = list((tmp_path / "merged").glob("*.safetensors"))
    ours = {name: weight for file in files for name, weight in load_file(file).items()}
    assert len(files) > 2 and merged.keys() - ours.keys() == {"lm_head.weight"}
    assert all(weight.equal(merged[name]) for name, weight in ours.items())


def test_the_scale_of_rslora_is_pefts_too(run, tiny_r1, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    settings = finetune_r1.read_json(adapter / "adapter_config.json") | {
        "use_rslora": True,
        "lora_alpha": 5,
    }
    finetune_r1.write_json(adapter / "adapter_config.json", settings)
    merge(tiny_r1, adapter, tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_r1, dtype="auto")
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(tmp_path / "pefts")
    ours, pefts = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "pefts"))
    assert all(ours[name].equal(pefts[name]) for name in pefts)


def test_what_old_versions_saved_beside_the_weights_does_not_stop_a_merge(run, tiny_r1, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    base, extra = (
        shutil.copytree(tiny_r1, tmp_path / "base"),
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    )
    file = sorted(base.glob("*.safetensors"))[0]
    save_file({**load_file(file), extra: torch.ones(8)}, file, {"format": "pt"})
    merge(base, run / "adapter", tmp_path / "merged")
    assert extra not in load_file(tmp_path / "merged" / "model.safetensors")


def test_weights_of_an_adapter_that_find_no_place_are_not_left_out_in_silence(
    run, tiny_r1, tmp_path
):
    with pytest.raises(UserError, match="do not fit"):
        merge(tiny_r1, more_layers(run / "adapter", tmp_path), tmp_path / "merged")


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


def test_a_quantized_base_is_not_merged_into(run, tiny_four_bit, tmp_path):
    """One that is quantized without its name saying so."""
    quantized = shutil.copytree(tiny_four_bit, tmp_path / "base")
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("merged*"))
    name_base(copy, str(quantized))
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
    assert (
        finetune_r1.check_merge(base, tuned, base + 0.3 * effect + 0.05 * noise)["adapter_share"]
        > 0.9
    )
    with pytest.raises(UserError, match="do not act as base"):
        finetune_r1.check_merge(base, tuned, base + times * 0.3 * effect + 0.05 * noise)


@pytest.mark.parametrize(("share", "said"), [(0.95, False), (0.81, True), (0.55, True)])
def test_a_good_merge_of_which_rounding_swallows_a_part_is_saved_and_the_part_is_told(
    share, said, capsys
):
    """As of a short training, whose changes are as small as the steps between 16-bit numbers."""
    import torch

    torch.manual_seed(0)
    base, effect, noise = torch.randn(3, 50, 200).unbind(0)
    found = finetune_r1.check_merge(base, base + effect, base + share * effect + 0.5 * noise)
    assert found["adapter_share"] == pytest.approx(share, abs=0.05)
    assert ("of the adapter's effect" in capsys.readouterr().err) == said


@pytest.mark.parametrize("times", [0, 3])
def test_a_failed_check_leaves_no_folder(run, tmp_path, monkeypatch, times):
    """A merge that loses the adapter or has it twice, as some have: nothing may look saved afterwards."""
    copy, walk = tmp_path / "run", finetune_r1.Merge.walk
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("merged*"))

    def wrong(merge, tokenizer):
        merge.scale *= times
        return walk(merge, tokenizer)

    monkeypatch.setattr(finetune_r1.Merge, "walk", wrong)
    with pytest.raises(UserError, match="Nothing was saved"):
        finetune_r1.save(run=copy)
    assert not list(copy.glob("*merged*"))


def test_the_check_has_the_logits_of_base_of_peft_and_of_what_was_saved(
    run, merged, tiny_r1, tmp_path
):
    """Though all three are of one walk through the base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = merge(tiny_r1, run / "adapter", tmp_path / "merged")
    questions = prompts.BEFORE_AFTER.items()
    text = "\n".join(prompts.build_prompt(question, lang) for lang, question in questions)
    batch = finetune_r1.load_tokenizer(run / "adapter")(text, return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(tiny_r1, dtype="auto")
    with torch.no_grad():
        expected = [
            base(**batch),
            PeftModel.from_pretrained(base, run / "adapter")(**batch),
            plain(**batch),
        ]
    effect = (found[1] - found[0]).norm()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs.logits[0].float()).norm() < 0.05 * effect


def test_an_adapter_that_was_never_trained_changes_no_bit(run, tiny_r1, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    for name in weights:
        weights[name] = weights[name] * ("lora_A" in name)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="never trained"):
        finetune_r1.check_merge(*merge(tiny_r1, adapter, tmp_path / "merged"))


def test_a_disk_that_takes_no_more_ends_in_a_message_and_leaves_nothing(run, tmp_path):
    """A limit of 100 KiB a file stands in for the full disk: the write fails in the same place."""
    save = (
        f"ulimit -f 100; exec {sys.executable} {SCRIPT} save --run {run} --output {tmp_path}/merged"
    )
    done = subprocess.run(["bash", "-c", save], capture_output=True, text=True)
    assert done.returncode == 1 and "next:" in done.stderr and "disk" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_the_16_bit_base_is_found_behind_a_quantized_name(run, tiny_r1, tmp_path):
    renamed = tmp_path / "tiny-unsloth-bnb-4bit"
    shutil.copytree(tiny_r1, tmp_path / "tiny")
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("merged*"))
    name_base(copy, str(renamed))
    assert finetune_r1.save(run=copy)["adapter_share"] > 0.9
