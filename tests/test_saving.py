"""Merged weights are base + adapter bit for bit, load everywhere, and say what they came from."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EOS, SCRIPT, add_base, name_base

import finetune_r1
from finetune_r1 import Run, UserError, read_json, write_json


def all_weights(folder):
    """Every tensor in a folder's safetensors files."""
    from safetensors.torch import load_file

    weights = {}
    for file in folder.glob("*.safetensors"):
        weights.update(load_file(file))
    return weights


def untouched_copy(run, folder):
    """A copy of a run without what was saved of it."""
    copy = Run(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("merged", "gguf")))
    copy.update(saved={})
    return copy


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the finished run, for these tests to save from."""
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture(scope="module")
def merged(run):
    saved = finetune_r1.save(run=run)
    assert 0.9 < saved["adapter_effect_kept"] < 1.1
    return run / "merged"


# ---------------------------------------------------------------------------------------------- merging

KINDS = {
    "four shards, Llama 3's rope": ("tiny_r1", {}, {}),
    "two shards": ("tiny_deepseek", {}, {}),
    "rslora": ("tiny_r1", {"use_rslora": True, "lora_alpha": 5}, {}),
    "biases": ("tiny_qwen", {}, {}),
    "tied embeddings in one file": ("tiny_qwen", {}, {"tie_word_embeddings": True}),
    "fp16": ("tiny_r1", {}, {"dtype": "float16"}),
}


@pytest.mark.parametrize(("base", "lora", "changes"), KINDS.values(), ids=KINDS)
def test_merge_equals_pefts_merge_bit_for_bit(request, tmp_path, base, lora, changes):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    source = request.getfixturevalue(base)
    if changes:
        changes = dict(changes)
        dtype = getattr(torch, changes.pop("dtype", "bfloat16"))
        settings = AutoConfig.from_pretrained(source, **changes)
        AutoModelForCausalLM.from_config(settings, dtype=dtype).save_pretrained(tmp_path / "base")
        source = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    settings = LoraConfig(
        target_modules=["q_proj", "k_proj", "o_proj", "down_proj"], init_lora_weights=False, **lora
    )
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    kept = finetune_r1.merge_adapter(source, tmp_path / "adapter", tmp_path / "merged")

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    pefts = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    ours, before = all_weights(tmp_path / "merged"), all_weights(source)
    assert ours.keys() == before.keys() <= pefts.keys() and 0.9 < kept < 1.1
    assert all(weight.equal(pefts[name]) for name, weight in ours.items())
    changed = {name.split(".")[-2] for name in ours if not ours[name].equal(before[name])}
    assert changed == {"q_proj", "k_proj", "o_proj", "down_proj"}
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "merged").iterdir()}
    assert modes == {0o644}, "a server under another user has to read it"


def spoil(adapter, change):
    """Applies `change` to the adapter's weights, by name."""
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(change(weights), adapter / "adapter_model.safetensors")


def another_layer(weights):
    more = {
        name.replace(".layers.1.", ".layers.2."): weight.clone() for name, weight in weights.items()
    }
    return weights | more


REFUSED = {
    "never trained": (
        lambda all: {n: w * ("lora_A" in n) for n, w in all.items()},
        "merge check failed",
    ),
    "of a deeper model": (another_layer, r"has no place for the adapter's .*\.layers\.2\."),
    "of a narrower model": (
        lambda all: {n: w[..., :8].clone() if "lora_A" in n else w for n, w in all.items()},
        "does not fit the base",
    ),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_adapter_without_effect_or_place_is_refused(run, tmp_path, change, said):
    copy = untouched_copy(run, tmp_path / "run")
    spoil(copy / "adapter", change)
    name_base(copy.folder, copy.config.model)  # and forgets the hashes
    with pytest.raises(UserError, match=said):
        finetune_r1.save(run=copy.folder)
    assert not list(copy.folder.glob("*merged*")), "nothing may look saved"


def test_tensor_that_reads_back_otherwise_is_refused(run, tmp_path, monkeypatch):
    class Lossy(io.BufferedRandom):
        def write(self, data):
            return len(data)

    real = Path.open

    def lossy(path, mode="r", **options):
        return Lossy(io.FileIO(path, "r+")) if mode == "r+b" else real(path, mode, **options)

    copy = untouched_copy(run, tmp_path / "run")
    monkeypatch.setattr(Path, "open", lossy)
    with pytest.raises(UserError, match="reads back differently"):
        finetune_r1.save(run=copy.folder)
    assert not list(copy.folder.glob("*merged*"))


# ----------------------------------------------------------------------------------------- the folder


def test_merged_folder_loads_in_transformers_and_is_a_repository(merged):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "README.md"} <= names
    assert {"loss.png", "adapter"} <= names and not list(merged.glob("adapter_*"))
    adapter = {path.name for path in (merged / "adapter").iterdir()}
    assert adapter == {"adapter_config.json", "adapter_model.safetensors"}
    settings = read_json(merged / "adapter" / "adapter_config.json")
    assert set(settings) == {"base_model_name_or_path", *finetune_r1.ADAPTER_KEYS}, "for old PEFT"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    generation = GenerationConfig.from_pretrained(merged)
    assert tokenizer.eos_token_id == generation.eos_token_id != tokenizer.pad_token_id
    assert (generation.temperature, generation.top_p, generation.max_length) == (0.6, 0.95, None)
    assert AutoModelForCausalLM.from_pretrained(merged, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{"temperature": 0.9, "max_length": 4096}, None])
def test_generation_settings_of_any_base_are_saved(run, tiny_r1, tmp_path, settings):
    """transformers refuses to save a temperature without do_sample."""
    base = shutil.copytree(tiny_r1, tmp_path / "base")
    (base / "generation_config.json").unlink()
    if settings:
        write_json(base / "generation_config.json", settings)
    copy = untouched_copy(run, tmp_path / "run")
    finetune_r1.save(run=copy.folder, model=str(base))
    saved = read_json(copy / "merged" / "generation_config.json")
    assert saved["do_sample"] is False and "max_length" not in saved
    assert saved.get("temperature") == (settings or {}).get("temperature")


def test_saving_again_keeps_the_weights_and_damaged_ones_are_refused(run, merged, tmp_path):
    before = (merged / "config.json").stat().st_mtime_ns
    finetune_r1.save(run=run)
    assert (merged / "config.json").stat().st_mtime_ns == before
    copy = shutil.copytree(run, tmp_path / "run")
    file = sorted((copy / "merged").glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file.name} is missing, or was changed"):
        finetune_r1.save(run=copy)


def test_output_that_exists_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="--output .* already exists"):
        finetune_r1.save(run=run, output=tmp_path)


def test_modelfile_stops_where_the_model_does_and_ollama_quantizes(run, merged):
    saved = finetune_r1.save(run=run, modelfile=True)
    text = (merged / "Modelfile").read_text()
    assert text.startswith("FROM .\n") and EOS in text
    assert saved["ollama"] == f"ollama create --quantize q4_K_M run -f {merged / 'Modelfile'}"
    expected = f"vllm serve {merged} --max-model-len 768 --reasoning-parser deepseek_r1"
    assert saved["serve"] == expected
    finetune_r1.save(run=run)  # is still what was verified


# ------------------------------------------------------------------------------------------- the disk


def test_size_of_a_base_is_known_before_and_after_its_download(tiny_r1, hub):
    import huggingface_hub

    size = sum(file.stat().st_size for file in tiny_r1.glob("*.safetensors"))
    assert finetune_r1.weights_size(str(tiny_r1)) == (size, 0)
    add_base(hub, tiny_r1)
    assert finetune_r1.weights_size("org/base") == (size, size)
    huggingface_hub.snapshot_download("org/base")
    assert finetune_r1.weights_size("org/base") == (size, 0)
    hub.close()
    assert finetune_r1.weights_size("org/base") == (size, 0), "without a network the cache counts"


def test_without_room_for_the_result_nothing_is_downloaded(run, tiny_r1, hub, small_disk):
    add_base(hub, tiny_r1)
    copy = untouched_copy(run, small_disk.folder / "run")
    name_base(copy.folder, "org/base")
    small_disk.hold(finetune_r1.weights_size("org/base")[0])
    with pytest.raises(UserError, match="not enough disk space"):
        finetune_r1.save(run=copy.folder)
    assert not list(small_disk.folder.rglob("model*.safetensors"))


def test_full_disk_ends_in_a_message_and_leaves_nothing(run, tmp_path):
    """A limit of 50 KiB a file stands in for it: the write fails in the same place."""
    line = (
        f"ulimit -f 50; exec {sys.executable} {SCRIPT} save --run {run} --output {tmp_path}/merged"
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 1 and "disk" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- the base


def test_base_that_is_quantized_or_has_moved_is_named_by_model(
    run, tiny_four_bit, tiny_r1, tmp_path
):
    quantized = shutil.copytree(tiny_four_bit, tmp_path / "base")
    copy = untouched_copy(run, tmp_path / "run")
    name_base(copy.folder, str(quantized))
    with pytest.raises(UserError, match="is not 16-bit") as refused:
        finetune_r1.save(run=copy.folder)
    assert "--model PATH" in refused.value.hint
    name_base(copy.folder, str(tmp_path / "gone" / "8b"))
    with pytest.raises(UserError) as refused:
        finetune_r1.save(run=copy.folder)
    assert "--model PATH" in refused.value.hint
    assert finetune_r1.save(run=copy.folder, model=str(tiny_r1))["adapter_effect_kept"] > 0.9


def test_second_generation_keeps_the_licence_of_the_first(run, merged, tmp_path):
    from huggingface_hub import ModelCard

    first = ModelCard.load(merged / "README.md")
    assert first.data.license == "llama3.1" and first.data.base_model is None, "of a folder"
    copy = untouched_copy(run, tmp_path / "run")
    name_base(copy.folder, str(shutil.copytree(merged, tmp_path / "merged")))
    finetune_r1.save(run=copy.folder)
    assert ModelCard.load(copy / "merged" / "README.md").data.license == "llama3.1"


def test_adapter_that_was_changed_is_refused(run, tmp_path):
    copy = untouched_copy(run, tmp_path / "run")
    (copy / "adapter" / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config\.json is missing, or was changed"):
        finetune_r1.save(run=copy.folder)
