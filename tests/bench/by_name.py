"""Loads by name, as a stranger does, what was pushed: without Unsloth, with whatever transformers is there.

    python3 tests/bench/by_name.py PUSHED BASE ROWS.jsonl FOUND.json

Tokenizer (against the bare tokenizer.json of BASE, whatever a config calls it), merged weights, BASE with the
adapter in adapter/. A part that fails is run_cli, and the next one tried; FOUND.json is written after each.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer

import prompts

pushed, base_name, rows, output = sys.argv[1:]
ROUND_TRIP = "pH 7.21,\n\n  阴离子间隙升高：乳酸、酮体。 naïve café 🩺\n\tdef gap(na, cl):\n\t\treturn na - cl\n"
QUESTIONS = {"recipe's": prompts.BEFORE_AFTER["en"], "the anion gap": "What widens the anion gap?"}
row = json.loads(Path(rows).read_text().split("\n")[0])
TAUGHT = prompts.build_example(row["Question"], row["Complex_CoT"], row["Response"], "")
how: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "device_map": {"": 0 if torch.cuda.is_available() else "cpu"},
}
found: dict[str, Any] = {"transformers": transformers.__version__}
found |= {"failed": {}, "seconds": {}, "loss": {}, "texts": {}}


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    except Exception as error:
        found["failed"][name] = f"{type(error).__name__}: {error}"[:600]
    found["seconds"][name] = round(time.monotonic() - began, 1)
    found["problems"] = [name for name, is_so in problems().items() if is_so] + [
        f"{name} failed" for name in found["failed"]
    ]
    Path(output).write_text(json.dumps(found, ensure_ascii=False, indent=2))


def problems() -> dict[str, bool]:
    rope = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}
    return {
        "ids": found.get("ids are right") is False,
        "round trip": found.get("round trip") is False,
        "rope": found.get("rope", rope) != rope,
        "adapter's share": abs(found.get("adapter's share in merged", 1) - 1) > 0.15,
    }


def logits(model: Any, name: str) -> Any:
    """On a whole row; its loss is noted."""
    ids = torch.tensor([tokenizer(TAUGHT)["input_ids"]], device=model.device)
    scores = model(ids).logits[0].float()
    found["loss"][name] = round(
        float(torch.nn.functional.cross_entropy(scores[:-1], ids[0, 1:])), 4
    )
    return scores


def answer(model: Any, question: str) -> str:
    """As the model card does it, greedily: 40 tokens."""
    batch = tokenizer(prompts.build_prompt(question), return_tensors="pt").to(model.device)
    ids = model.generate(**batch, max_new_tokens=40, do_sample=False)[0]
    return str(tokenizer.decode(ids[batch["input_ids"].shape[1] :]))


with torch.no_grad():
    with part("tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(pushed)
        truth = Tokenizer.from_file(hf_hub_download(base_name, "tokenizer.json"))
        texts = [TAUGHT, ROUND_TRIP, *map(prompts.build_prompt, QUESTIONS.values(), ("en", "zh"))]
        ids = [tokenizer(text)["input_ids"] for text in texts]
        found["ids are right"] = ids == [truth.encode(text).ids for text in texts]
        found["round trip"] = [
            tokenizer.decode(each, skip_special_tokens=True) for each in ids
        ] == texts
        run_cli = ("eos_token", "pad_token", "padding_side", "model_max_length")
        found["tokenizer"] = {name: getattr(tokenizer, name) for name in run_cli}
        found["tokenizer"] |= {"class": type(tokenizer).__name__, "gives": list(tokenizer("a"))}
        found["chat"] = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Why?"}], tokenize=False
        )
    with part("merged"):
        merged = transformers.AutoModelForCausalLM.from_pretrained(pushed, **how)
        config, frequencies = merged.config.to_dict(), merged.model.rotary_emb.inv_freq
        rope = config.get("rope_parameters") or {
            **(config["rope_scaling"] or {}),
            "rope_theta": config["rope_theta"],
        }
        found["rope"] = {name: rope.get(name) for name in ("rope_theta", "rope_type", "factor")}
        found["frequencies"] = [
            round(float(frequencies[at]), 12) for at in (1, len(frequencies) // 2, -1)
        ]
        merged_logits = logits(merged, "merged")
        found["texts"] = {name: answer(merged, question) for name, question in QUESTIONS.items()}
    with part("adapter"):
        import peft

        base = transformers.AutoModelForCausalLM.from_pretrained(base_name, **how)
        base_logits = logits(base, "base")
        tuned = peft.PeftModel.from_pretrained(base, pushed, subfolder="adapter").eval()
        tuned_logits = logits(tuned, "adapter")
        effect = tuned_logits - base_logits
        found["adapter's share in merged"] = round(
            float(((merged_logits - base_logits) * effect).sum() / effect.square().sum()), 4
        )
        found["merged is off by"] = round(
            float((merged_logits - tuned_logits).norm() / tuned_logits.norm()), 4
        )
        found["adapter's text"] = answer(tuned, QUESTIONS["recipe's"])
