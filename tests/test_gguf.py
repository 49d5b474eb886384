"""A GGUF is the same model to a real llama.cpp: the same tokens, the same probabilities, the same end."""

import copy
import dataclasses
import hashlib
import random
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
import prompts
from finetune_r1 import Run, TrainConfig, UserError, read_json, write_json

ALPHABETS = [
    "the heart rate is widened by acidosis, and doesn't fall: we'll see. I'M ", "def f(x): return x**2",
    "0123456789.,:%/", "你好世界，。心电图", "🚀😶\u200d🌫️✅🦙", " \n\t\r", "naïveéßñøЖщуктарΩµ", "कमលាកាន់",
    "{}[]()<>|\\/#'\"`=+-*&^~_@$;!?",
]  # fmt: skip
# Of log-probabilities, in nats: 0.015 at most was seen, as llama.cpp rounds activations to 16 bits. Rows in
# a wrong order or rope without its factors move them by 2 and more.
NEAR = 0.05

PUBLISHED = tuple(finetune_r1.PRE_TOKENIZERS.items())  # before the stand-ins' are added


class LlamaServer:
    """llama.cpp's own server on a GGUF, with its prompts as text or as tokens."""

    def __init__(self, path):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(path), 2048, 1
        settings.verbosity, settings.warmup, settings.use_jinja = -1, False, True
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
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
    prompts: list[
        list[int]
    ]  # each begins with the one before, which llama.cpp still has in its cache

    def wanted(self, model=None):
        """The log-probabilities of all next tokens, after each prompt."""
        import torch

        with torch.no_grad():
            logits = (model or self.merged)(torch.tensor(self.prompts[-1:])).logits[0]
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
    texts = ["", " ", "\n\n  \n", "<think>\nWhy?\n</think>\nSo", "a<|eot_id|>b", "3.14  159\r\n26"]
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
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        target_modules=config.target_modules.split(","),
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), lora)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.05)
    model.save_pretrained(folder / "adapter")
    tokenizer = finetune_r1.load_tokenizer(base)
    finetune_r1.save_tokenizer(tokenizer, folder / "adapter", config.lang)
    (folder / "loss.png").write_bytes(b"")
    write_json(folder / "config.json", dataclasses.asdict(config))
    write_json(folder / "run.json", {"status": "finished", "started": ""})
    return Run(folder)


def know_pre_tokenizer(monkeypatch, model, name):
    """Adds a stand-in's small vocabulary to those known; how it splits text is as published."""
    tokenizer = finetune_r1.load_tokenizer(model)
    ids = tokenizer.encode(finetune_r1.PRE_TOKENIZER_TEXT)
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    monkeypatch.setitem(finetune_r1.PRE_TOKENIZERS, digest, name)


@pytest.fixture(scope="module")
def known(models, tiny_r1):
    """Models laid out like the 8B and like Qwen 2, whose vocabularies show how text is split."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        know_pre_tokenizer(monkeypatch, tiny_r1, "llama-bpe")
        layouts = {"unsloth": "llama-bpe", "qwen": "deepseek-r1-qwen"}
        folders = {}
        for layout, name in layouts.items():
            folder = models / f"strong-{layout}"
            folders[layout] = strong(published.write_model(folder, layout, varied_texts() * 9))
            know_pre_tokenizer(monkeypatch, folder, name)
        yield folders


@pytest.fixture(
    scope="module", params=[pytest.param("smollm2", marks=pytest.mark.slow), "unsloth", "qwen"]
)
def case(request, known, tmp_path_factory):
    """The demo's model, and small ones laid out like the 8B (with Llama 3's rope) and Qwen 2."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("gguf")
    step = 75  # where Llama 3's rope differs from others, prompts have to be long
    if request.param == "smollm2":
        step = 3
        run = make_run(folder / "run", request.getfixturevalue("smollm2"))
    else:
        run = make_run(folder / "run", known[request.param])
    path = Path(finetune_r1.save(run=run.folder, as_="gguf", outtype="f16")["saved"])
    merged = run / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    tokenizer = finetune_r1.load_tokenizer(merged)
    text = "\n".join(row["Question"] + row["Complex_CoT"] for row in published.sample_rows())
    ids = tokenizer(text)["input_ids"]
    steps = [ids[: step * number] for number in range(1, 21)]
    return Case(run, path, tokenizer, model, steps)


@pytest.fixture(scope="module")
def server(case):
    return LlamaServer(case.path)


@pytest.fixture(scope="module")
def r1_run(known, tiny_r1, tmp_path_factory):
    """A run of the 8B's layout, merged."""
    run = make_run(tmp_path_factory.mktemp("r1") / "run", tiny_r1, use_rslora=True)
    finetune_r1.save(run=run.folder)
    return run


# ------------------------------------------------------------------------------- equal in llama.cpp


def test_200_texts_become_the_tokenizers_tokens(case, server):
    for text in varied_texts():
        assert server.tokens(text) == case.tokenizer(text)["input_ids"], repr(text)


def test_a_chat_is_asked_by_the_training_prompt_with_one_bos(case, server):
    talk = [{"role": "user", "content": " Why {question}?\n"}]
    text = server.ask("/apply-template", messages=talk)["prompt"]
    prompt = prompts.build_prompt("Why {question}?")
    assert server.tokens(text) == case.tokenizer(prompt)["input_ids"]


def test_the_probabilities_are_torchs(case, server):
    assert case.furthest(server, case.wanted()) < NEAR


def test_it_stops_where_the_tokenizer_does(case, server):
    tokenizer = case.tokenizer
    settings = server.ask("/props")
    specials = (tokenizer.bos_token, tokenizer.eos_token)
    assert (settings["bos_token"], settings["eos_token"]) == specials

    def answer(favoured):
        return server.ask("/completion", prompt="So", n_predict=3, logit_bias=[[favoured, 1000]])

    assert answer(tokenizer.eos_token_id)["stop_type"] == "eos"
    for other in ("</think>", tokenizer.bos_token, "a"):
        [last] = tokenizer.encode(other, add_special_tokens=False)[-1:]
        assert answer(last)["stop_type"] == "limit", other


def test_in_four_bits_it_is_the_model_with_rounded_weights(case):
    """Likeliest tokens are compared, as llama.cpp then rounds activations to eight bits too."""
    import torch

    path = Path(finetune_r1.save(run=case.run.folder, as_="gguf", outtype="q4_0")["saved"])
    assert path.name == "run-q4_0.gguf"
    tokenizer = 150_000
    assert path.stat().st_size < 0.4 * case.path.stat().st_size + tokenizer
    rounded = copy.deepcopy(case.merged)
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    tied = "output.weight" not in kinds  # the output layer keeps eight bits
    assert kinds["token_embd.weight" if tied else "output.weight"].name == "Q8_0"
    names = finetune_r1.gguf_names(case.merged)
    for name, weight in rounded.state_dict().items():
        kind = kinds.get(names.get(name))
        if kind is not None and weight.ndim == 2:
            data = gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)
            weight.copy_(torch.from_numpy(data))
    server = LlamaServer(path)
    same = 0
    for prompt, right in zip(case.prompts, case.wanted(rounded), strict=True):
        top = server.top(prompt)
        same += max(top, key=top.get) == int(right.argmax())
    assert same >= 18


def test_a_tokenizer_without_bos_gets_none(r1_run, tmp_path, monkeypatch):
    """llama.cpp would begin with it whatever splits text as Llama 3 does."""
    from tokenizers.processors import ByteLevel

    skipped = shutil.ignore_patterns("merged", "gguf")
    run = Run(shutil.copytree(r1_run.folder, tmp_path / "run", ignore=skipped))
    run.update(saved={})
    tokenizer = finetune_r1.load_tokenizer(run / "adapter")
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    finetune_r1.save_tokenizer(tokenizer, run / "adapter", "en")
    know_pre_tokenizer(monkeypatch, run / "adapter", "llama-bpe")
    server = LlamaServer(finetune_r1.save(run=run.folder, as_="gguf")["saved"])
    assert server.tokens("Why?") == tokenizer("Why?")["input_ids"]


# ------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("outtype", ["bf16", "q5_1"])
def test_numbers_are_rounded_as_llama_cpp_does_it(r1_run, outtype):
    """By the package's own functions, bit for bit."""
    from safetensors.torch import load_file

    path = finetune_r1.save(run=r1_run.folder, as_="gguf", outtype=outtype)["saved"]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = {}
    for file in (r1_run / "merged").glob("*.safetensors"):
        weights.update(load_file(file))
    for name, in_gguf in {"mlp.down_proj": "ffn_down", "self_attn.o_proj": "attn_output"}.items():
        weight = weights[f"model.layers.1.{name}.weight"].float().numpy()
        whole = gguf.quantize(weight, gguf.GGMLQuantizationType[outtype.upper()])
        assert tensors[f"blk.1.{in_gguf}.weight"].data.tobytes() == whole.tobytes()
    assert all(tensors[name].tensor_type.name == "F32" for name in tensors if "norm" in name)


def test_the_lines_that_run_it(r1_run, tmp_path):
    folder = tmp_path / "my models"
    asked = {"run": r1_run.folder, "as_": "gguf", "output": folder}
    saved = finetune_r1.save(**asked, outtype="q4_0", modelfile=True)
    file = folder / "run-q4_0.gguf"
    assert shlex.split(saved["serve"]) == ["llama-server", "-m", str(file), "--jinja", "-c", "512"]
    modelfile = folder / "Modelfile"
    assert shlex.split(saved["ollama"]) == ["ollama", "create", "run", "-f", str(modelfile)]
    assert modelfile.read_text().startswith("FROM ./run-q4_0.gguf\n")
    finetune_r1.save(**asked, outtype="bf16")
    with pytest.raises(UserError, match=r"there already|already exists"):
        finetune_r1.save(**asked, outtype="q4_0")


# ----------------------------------------------------------------------------------- what is refused

OTHER_MODELS = {
    "mistral": ({"model_type": "mistral"}, "llama and qwen2 .*, not mistral"),
    "another rope": ({"model_type": "qwen2"}, "not qwen2, rope llama3"),
}


@pytest.mark.parametrize(("settings", "said"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    known, tiny_r1, tmp_path, settings, said
):
    base = shutil.copytree(tiny_r1, tmp_path / "base")
    run = make_run(tmp_path / "run", base)
    write_json(base / "config.json", read_json(base / "config.json") | settings)
    with pytest.raises(UserError, match=said):
        finetune_r1.save(run=run.folder, as_="gguf")
    assert not (run / "gguf").exists()


def test_a_tokenizer_that_splits_text_in_an_unknown_way_is_refused(r1_run, monkeypatch):
    """llama.cpp would split it in its own way, and say nothing."""
    for digest in set(finetune_r1.PRE_TOKENIZERS) - {digest for digest, _ in PUBLISHED}:
        monkeypatch.delitem(finetune_r1.PRE_TOKENIZERS, digest)
    with pytest.raises(UserError, match="does not know this tokenizer"):
        finetune_r1.save(run=r1_run.folder, as_="gguf", outtype="f16")
