"""A GGUF is the same model to a real llama.cpp: the same tokens, the same probabilities, the same end."""

import dataclasses
import hashlib
import random
import resource
import shlex
import shutil
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import httpx
import published
import pytest
from conftest import SAMPLE

import finetune_r1
from finetune_r1 import Run, TrainConfig, UserError, read_json, write_json

ALPHABETS = [
    "the heart rate is widened by acidosis, and doesn't fall: we'll see. I'M ", "def f(x): return x**2",
    "0123456789.,:%/", "你好世界，。心电图", "🚀😶\u200d🌫️✅🦙", " \n\t\r", "naïveéßñøЖщуктарΩµ", "कमលាកាន់",
    "{}[]()<>|\\/#'\"`=+-*&^~_@$;!?",
]  # fmt: skip
# Of log-probabilities, in nats: 0.015 at most was seen, as llama.cpp rounds activations to 16 bits. Rows in
# a wrong order or rope without its factors move them by 2 and more.
NEAR = 0.05
# What base + adapter are off merged weights, which are rounded to 16 bits; 0.051 at most were seen.
ROUNDED = 0.2


PUBLISHED = tuple(finetune_r1.PRE_TOKENIZERS.items())  # before the stand-ins' are added


class LlamaServer:
    """llama.cpp's own server on a GGUF, with its prompts as text or as tokens."""

    def __init__(self, path, adapter=None):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(path), 2048, 1
        settings.verbosity, settings.warmup, settings.use_jinja = -1, False, True
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        if adapter:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = xllamacpp.Server(settings)  # which ends when it is held no more
        self.client = httpx.Client(base_url=self.server.listening_address, timeout=60)

    def ask(self, path, **request):
        answer = self.client.post(path, json=request) if request else self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def tokens(self, text):
        return self.ask("/tokenize", content=text, add_special=True)["tokens"]

    def top(self, prompt):
        """Log-probabilities of the ten likeliest next tokens, by their ids."""
        # What is generated does not matter; half a character would come without probabilities.
        settings = {"n_predict": 1, "n_probs": 10, "logit_bias": [["a", 1000]]}
        [step] = self.ask("/completion", prompt=prompt, **settings)["completion_probabilities"]
        return {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}


class Case(NamedTuple):
    """A run, its GGUF in f16, and what torch has of it in float32."""

    run: Run
    path: Path
    tokenizer: Any
    merged: Any
    tuned: Any  # base and adapter, as PEFT has them
    prompts: list[
        list[int]
    ]  # each begins with the one before, which llama.cpp still has in its cache

    def wanted(self, model):
        """The log-probabilities of all next tokens, after each prompt."""
        import torch

        with torch.no_grad():
            logits = model(torch.tensor(self.prompts[-1:])).logits[0]
        return [logits[len(prompt) - 1].log_softmax(-1) for prompt in self.prompts]

    def furthest(self, server, wanted):
        """The largest difference of the ten likeliest tokens' log-probabilities after any of the prompts."""
        differences = []
        for prompt, right in zip(self.prompts, wanted, strict=True):
            top = server.top(prompt)
            differences += [abs(value - float(right[token])) for token, value in top.items()]
        return max(differences)


def varied_texts():
    """200 texts of pieces of several kinds of characters; the same at each call."""
    chance = random.Random(0)
    texts = [
        "",
        " ",
        "\n",
        "\n\n  \n",
        "<think>\nWhy?\n</think>\nSo",
        "a<|eot_id|>b",
        "3.14  159\r\n26",
    ]
    while len(texts) < 200:
        text = ""
        for _ in range(chance.randint(1, 8)):
            alphabet = chance.choice(ALPHABETS)
            as_it_is = alphabet[chance.randrange(len(alphabet)) :]
            text += chance.choice([as_it_is, "".join(chance.choices(alphabet, k=8))])
        texts.append(
            unicodedata.normalize("NFC", text)
        )  # as Qwen's tokenizer does it, and llama.cpp not
    return texts


def strong(folder):
    """Gives a small model larger weights, so that it matters what it attends to, and biases."""
    import torch
    from safetensors.torch import load_file, save_file

    chance = torch.Generator().manual_seed(2)
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        for name, weight in weights.items():
            if name.endswith("bias"):
                weights[name] = torch.randn(weight.shape, generator=chance).to(weight.dtype)
            elif "norm" not in name:
                weights[name] = weight * 8
        save_file(weights, file, {"format": "pt"})
    return folder


def make_run(folder, base, **settings):
    """A run on `base`, with an adapter that is as if trained."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = TrainConfig(
        model=str(base), dataset=str(SAMPLE), max_seq_length=512, lora_alpha=24, **settings
    )
    lora = LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, use_rslora=config.use_rslora,
        target_modules=config.target_modules.split(","),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), lora)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.05)
    model.save_pretrained(folder / "adapter")
    finetune_r1.save_tokenizer(finetune_r1.load_tokenizer(base), folder / "adapter")
    write_json(folder / "config.json", dataclasses.asdict(config))
    write_json(folder / "run.json", {"status": "finished", "started": ""})
    return Run(folder)


def take_for_merged(run, folder):
    """Makes a folder of weights what `save` has merged and verified."""
    run.update(
        saved={"folder": str(folder), "files": finetune_r1.file_sizes(folder), "checked": {}}
    )


def base_gguf(run, folder):
    """The base of a run as a GGUF."""
    other = Run(
        shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("gguf", "merged"))
    )
    take_for_merged(other, Path(run.config.model).resolve())
    return finetune_r1.save(run=other.folder, as_="gguf", outtype="f16")["saved"]


def know_pre_tokenizer(monkeypatch, model, name):
    """Adds a stand-in's small vocabulary to those that are known; how it splits text is as published."""
    tokenizer = finetune_r1.load_tokenizer(model)
    ids = tokenizer.encode(finetune_r1.PRE_TOKENIZER_TEXT)
    monkeypatch.setitem(
        finetune_r1.PRE_TOKENIZERS, hashlib.sha256(str(ids).encode()).hexdigest(), name
    )


@pytest.fixture(scope="module")
def known(models, tiny_r1):
    """Models laid out like the 8B and like Qwen 2, whose vocabularies show it if text is split otherwise."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        know_pre_tokenizer(monkeypatch, tiny_r1, "llama-bpe")
        layouts = {"unsloth": "llama-bpe", "qwen": "deepseek-r1-qwen"}
        folders = {}
        for layout, name in layouts.items():
            folders[layout] = strong(
                published.write_model(models / f"strong-{layout}", layout, varied_texts() * 9)
            )
            know_pre_tokenizer(monkeypatch, folders[layout], name)
        yield folders


@pytest.fixture(
    scope="module", params=[pytest.param("smollm2", marks=pytest.mark.slow), "unsloth", "qwen"]
)
def case(request, known, tmp_path_factory):
    """The demo's model, and small ones laid out like the 8B (with Llama 3's rope) and like Qwen 2."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("gguf")
    if request.param == "smollm2":
        run, step = make_run(folder / "run", request.getfixturevalue("smollm2")), 3
    else:  # where Llama 3's rope differs from others, prompts have to be long
        run, step = make_run(folder / "run", known[request.param]), 75
    path = Path(finetune_r1.save(run=run.folder, as_="gguf", outtype="f16")["saved"])
    merged, _ = finetune_r1.merged_weights(run)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    base_model = AutoModelForCausalLM.from_pretrained(run.config.model, dtype=torch.float32)
    tokenizer = finetune_r1.load_tokenizer(merged)
    text = "\n".join(row["Question"] + row["Complex_CoT"] for row in published.sample_rows())
    ids = tokenizer(text)["input_ids"]
    tuned = PeftModel.from_pretrained(base_model, run.adapter).eval()
    return Case(
        run, path, tokenizer, model, tuned, [ids[: step * number] for number in range(1, 21)]
    )


@pytest.fixture(scope="module")
def server(case):
    return LlamaServer(case.path)


@pytest.fixture(scope="module")
def r1_run(known, tiny_r1, tmp_path_factory):
    """A run of the 8B's layout."""
    return make_run(tmp_path_factory.mktemp("r1") / "run", tiny_r1, use_rslora=True)


def test_200_texts_become_the_tokenizers_tokens(case, server):
    for text in varied_texts():
        assert server.tokens(text) == case.tokenizer(text)["input_ids"], repr(text)


def test_a_chat_tells_thought_from_answer_and_is_sampled_as_the_base_was(case, server):
    """What it says is forced here: small models with random weights close no thought."""
    talk, forced = [{"role": "user", "content": "Why?"}], 'root ::= "Hm, so.\\n</think>\\nBecause."'
    [choice] = server.ask("/v1/chat/completions", messages=talk, grammar=forced, max_tokens=60)[
        "choices"
    ]
    said = choice["message"]
    assert (said["reasoning_content"].strip(), said["content"].strip()) == ("Hm, so.", "Because.")
    assert choice["finish_reason"] == "stop"
    own = finetune_r1.own_sampling(read_json(case.run / "merged" / "generation_config.json"))
    found = server.ask("/props")["default_generation_settings"]["params"]
    assert found["temperature"] == pytest.approx(own["temperature"])
    assert found["top_p"] == pytest.approx(own.get("top_p", 1.0))


def test_a_tokenizer_without_bos_gets_none(r1_run, tmp_path, monkeypatch):
    """llama.cpp would begin with it whatever splits text as Llama 3 does."""
    from tokenizers.processors import ByteLevel

    finetune_r1.merged_weights(r1_run)
    run = Run(shutil.copytree(r1_run.folder, tmp_path / "run"))
    tokenizer = finetune_r1.load_tokenizer(run / "merged")
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    for folder in (run / "adapter", run / "merged"):
        finetune_r1.save_tokenizer(tokenizer, folder)
    take_for_merged(run, run / "merged")
    know_pre_tokenizer(monkeypatch, run / "merged", "llama-bpe")
    server = LlamaServer(finetune_r1.save(run=run.folder, as_="gguf")["saved"])
    assert server.tokens("Why?") == tokenizer("Why?")["input_ids"]


def test_the_probabilities_are_torchs(case, server):
    assert case.furthest(server, case.wanted(case.merged)) < NEAR


def test_the_adapters_file_on_the_bases_file_is_the_tuned_model(case, tmp_path):
    base = base_gguf(case.run, tmp_path / "base")
    adapter = finetune_r1.save(run=case.run.folder, as_="gguf-adapter")["saved"]
    tuned = LlamaServer(base, adapter)
    assert case.furthest(tuned, case.wanted(case.tuned)) < NEAR
    assert case.furthest(tuned, case.wanted(case.merged)) < ROUNDED


def test_it_stops_where_the_tokenizer_does(case, server):
    tokenizer = case.tokenizer
    settings = server.ask("/props")
    assert (settings["bos_token"], settings["eos_token"]) == (
        tokenizer.bos_token,
        tokenizer.eos_token,
    )

    def answer(favoured):
        return server.ask("/completion", prompt="So", n_predict=3, logit_bias=[[favoured, 1000]])

    assert answer(tokenizer.eos_token_id)["stop_type"] == "eos"
    for other in ("</think>", tokenizer.bos_token, "a"):
        [last] = tokenizer.encode(other, add_special_tokens=False)[-1:]
        assert answer(last)["stop_type"] == "limit", other


def test_in_eight_bits_the_likeliest_tokens_stay(case):
    path = finetune_r1.save(run=case.run.folder, as_="gguf")["saved"]
    assert (
        path.endswith("run-q8_0.gguf")
        and Path(path).stat().st_size < 0.6 * case.path.stat().st_size
    )
    server, same = LlamaServer(path), 0
    for prompt, right in zip(case.prompts, case.wanted(case.merged), strict=True):
        top = server.top(prompt)
        same += max(top, key=top.get) == int(right.argmax())
    assert same >= 19


def test_a_file_says_what_the_model_is(r1_run):
    path = finetune_r1.save(run=r1_run.folder, as_="gguf", outtype="bf16")["saved"]
    about = LlamaServer(path).ask("/v1/models")["data"][0]["meta"]
    assert (about["n_ctx_train"], about["n_embd"]) == (131072, 64)
    fields = gguf.GGUFReader(path).fields
    assert (
        fields["general.name"].contents() == "run"
        and fields["general.base_model.0.name"].contents()
    )
    assert fields["llama.rope.freq_base"].contents() == 500000


def test_of_an_adapter_it_says_its_scale(r1_run):
    """llama.cpp divides alpha by r, and knows no other way."""
    path = finetune_r1.save(run=r1_run.folder, as_="gguf-adapter")["saved"]
    file = gguf.GGUFReader(path)
    assert (
        path.endswith("gguf/run-f16-lora.gguf")
        and file.fields["general.type"].contents() == "adapter"
    )
    assert file.fields["adapter.lora.alpha"].contents() == pytest.approx(24 / 16**0.5 * 16)
    assert {tensor.name.rpartition(".")[2] for tensor in file.tensors} == {"lora_a", "lora_b"}
    assert len(file.tensors) == 2 * 2 * 7


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_numbers_are_rounded_as_llama_cpp_does_it(r1_run, outtype, monkeypatch):
    """By the package's own functions, bit for bit, however many rows are converted at once."""
    from safetensors.torch import load_file

    monkeypatch.setattr(finetune_r1, "GGUF_ROWS", 24)
    path = finetune_r1.save(run=r1_run.folder, as_="gguf", outtype=outtype)["saved"]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = load_file(r1_run / "merged" / "model.safetensors")
    for name, in_gguf in {"mlp.down_proj": "ffn_down", "self_attn.o_proj": "attn_output"}.items():
        weight = weights[f"model.layers.1.{name}.weight"].float().numpy()
        whole = gguf.quantize(weight, gguf.GGMLQuantizationType[outtype.upper()])
        assert tensors[f"blk.1.{in_gguf}.weight"].data.tobytes() == whole.tobytes()
    assert all(tensors[name].tensor_type.name == "F32" for name in tensors if "norm" in name)


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


@pytest.mark.parametrize("as_", ["gguf", "gguf-adapter"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "mistral"}, "llama and qwen2 .*; this is mistral"),
        ({"rope_parameters": YARN, "rope_scaling": YARN}, "this is llama, rope yarn"),
        ({"model_type": "qwen2"}, "this is qwen2, rope llama3"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused_at_once(
    known, tiny_r1, tmp_path, settings, said, as_
):
    base = shutil.copytree(tiny_r1, tmp_path / "base")
    run = make_run(tmp_path / "run", base)
    write_json(base / "config.json", read_json(base / "config.json") | settings)
    with pytest.raises(UserError, match=said):
        finetune_r1.save(run=run.folder, as_=as_)
    assert not {"gguf", "merged"} & {path.name for path in run.folder.iterdir()}


def test_a_tokenizer_that_splits_text_in_an_unknown_way_is_refused(r1_run, monkeypatch):
    """llama.cpp would split it in its own way, and say nothing."""
    for digest in set(finetune_r1.PRE_TOKENIZERS) - {digest for digest, _ in PUBLISHED}:
        monkeypatch.delitem(finetune_r1.PRE_TOKENIZERS, digest)
    with pytest.raises(UserError, match="splits text is none of llama-bpe, deepseek-r1-qwen"):
        finetune_r1.save(run=r1_run.folder, as_="gguf", outtype="f16")


@pytest.mark.parametrize("number", [1e5, float("nan")])
def test_a_number_that_the_type_does_not_reach_is_refused_and_no_file_is_left(
    r1_run, tmp_path, number
):
    from safetensors.torch import load_file, save_file

    finetune_r1.merged_weights(r1_run)
    copy = Run(
        shutil.copytree(r1_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("gguf"))
    )
    weights = load_file(copy / "merged" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = number
    save_file(weights, copy / "merged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"--outtype f16: blk\.1\.ffn_up\.weight holds") as refused:
        finetune_r1.save(run=copy.folder, as_="gguf", outtype="f16")
    assert "bf16" in refused.value.hint and not list((copy / "gguf").iterdir())


def test_a_disk_that_takes_no_more_ends_in_a_message_and_leaves_nothing(r1_run, tmp_path):
    """A limit of 20 KiB a file stands in for the full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, limits[1]))
    try:
        with pytest.raises(OSError) as failed:
            finetune_r1.save(run=r1_run.folder, as_="gguf-adapter", output=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "disk" in str(finetune_r1.advice(failed.value)) and not list(tmp_path.iterdir())


def test_the_lines_that_run_it(r1_run, tmp_path):
    folder = tmp_path / "my models"
    saved = finetune_r1.save(
        run=r1_run.folder, as_="gguf", output=folder, outtype="f16", modelfile=True
    )
    file = folder / "run-f16.gguf"
    assert shlex.split(saved["serve"]) == ["llama-server", "-m", str(file), "--jinja", "-c", "512"]
    assert shlex.split(saved["ollama"]) == [
        "ollama",
        "create",
        "run",
        "-f",
        str(folder / "Modelfile"),
    ]
    assert (folder / "Modelfile").read_text().startswith("FROM ./run-f16.gguf\nTEMPLATE")
    finetune_r1.save(run=r1_run.folder, as_="gguf", output=folder, outtype="bf16")
    with pytest.raises(UserError, match="there already"):
        finetune_r1.save(run=r1_run.folder, as_="gguf", output=folder, outtype="f16")
    serve = finetune_r1.save(run=r1_run.folder, as_="gguf-adapter", output=folder)["serve"]
    adapter = folder / "run-f16-lora.gguf"
    assert shlex.split(serve)[:5] == ["llama-server", "-m", "BASE.gguf", "--lora", str(adapter)]
