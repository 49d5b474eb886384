"""Loads by its name, as a stranger does, what was pushed: without Unsloth, with the installed transformers.

    python3 tests/bench/by_name.py PUSHED BASE ROWS.jsonl RESULT.json

The tokenizer is compared with the bare tokenizer.json of BASE, the merged weights with BASE and the adapter
in adapter/. A part that fails is noted, and the next one tried.
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

ROUND_TRIP = "pH 7.21,\n\n  阴离子间隙升高：乳酸、酮体。 naïve café 🩺\n\tdef gap(na, cl):\n\t\treturn na - cl\n"
ROPE = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}

pushed, base_name, rows, output = sys.argv[1:]
row = json.loads(Path(rows).read_text().split("\n")[0])
taught = prompts.build_example(row["Question"], row["Complex_CoT"], row["Response"], "")
found: dict[str, Any] = {"transformers": transformers.__version__, "seconds": {}, "problems": []}


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    except Exception as error:
        found["problems"].append(f"{name} failed: {type(error).__name__}: {error}"[:600])
    found["seconds"][name] = round(time.monotonic() - started, 1)
    Path(output).write_text(json.dumps(found, ensure_ascii=False, indent=2))


def require(name: str, value: Any, expected: Any) -> None:
    found[name] = value
    if value != expected:
        found["problems"].append(f"{name}: {value}, not {expected}")


def load(name: str) -> Any:
    device = 0 if torch.cuda.is_available() else "cpu"
    return transformers.AutoModelForCausalLM.from_pretrained(
        name, torch_dtype=torch.bfloat16, device_map={"": device}
    )


def logits(model: Any, name: str) -> Any:
    """Of a whole row; its loss is noted."""
    ids = torch.tensor([tokenizer(taught)["input_ids"]], device=model.device)
    scores = model(ids).logits[0].float()
    loss = torch.nn.functional.cross_entropy(scores[:-1], ids[0, 1:])
    found[f"loss, {name}"] = round(float(loss), 4)
    return scores


with torch.no_grad():
    with part("tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(pushed)
        truth = Tokenizer.from_file(hf_hub_download(base_name, "tokenizer.json"))
        texts = [taught, ROUND_TRIP]
        for lang in ("en", "zh"):
            texts.append(prompts.build_prompt("What widens the anion gap?", lang))
        ids = [tokenizer(text)["input_ids"] for text in texts]
        require("ids are right", ids == [truth.encode(text).ids for text in texts], True)
        decoded = [tokenizer.decode(each, skip_special_tokens=True) for each in ids]
        require("round trip", decoded == texts, True)
        turns = [{"role": "user", "content": "What widens the anion gap?"}]
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        is_prompt = chat == tokenizer.bos_token + texts[2]
        require("chat template gives the prompt", is_prompt, True)
    with part("merged"):
        merged = load(pushed)
        config = merged.config.to_dict()
        rope = config.get("rope_parameters") or {
            **(config["rope_scaling"] or {}),
            "rope_theta": config["rope_theta"],
        }
        require("rope", {name: rope.get(name) for name in ROPE}, ROPE)
        merged_logits = logits(merged, "merged")
    with part("adapter"):
        import peft

        base = load(base_name)
        base_logits = logits(base, "base")
        tuned = peft.PeftModel.from_pretrained(base, pushed, subfolder="adapter").eval()
        tuned_logits = logits(tuned, "adapter")
        effect = tuned_logits - base_logits
        share = ((merged_logits - base_logits) * effect).sum() / effect.square().sum()
        found["adapter's share in merged"] = round(float(share), 4)
        if abs(found["adapter's share in merged"] - 1) > 0.15:
            found["problems"].append("the merged weights do not act as base and adapter")
