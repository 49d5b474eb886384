"""Small repositories laid out like the published models, data sets and log-ins, made on the spot.

As published, as far as is known: every file's name, what is in config.json (of transformers 4),
generation_config.json, tokenizer_config.json and special_tokens_map.json, the parts of tokenizer.json, the
added tokens with their order and which are special, what the chat template renders, the weights' files, which
modules the 4-bit repository leaves in 16 bit, the data sets' files, configs and columns, a log-in's answer.
Not as published: a vocabulary of a thousand tokens, so that all ids differ; two layers of 64 dimensions with
random weights; the text of cards, rows and questions. From memory: Qwen's added tokens beside those in R1's
template, its config, the cards of the two layouts by DeepSeek, and what an OAuth log-in shows.

Call `finetune_r1.import_unsloth()` first: Unsloth has to be imported before transformers.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Layout = Literal["unsloth", "deepseek", "qwen"]
Row = Mapping[str, Any]

SAMPLE = Path(__file__).parents[1] / "data" / "medical_sample.jsonl"
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|finetune_right_pad_id|>"
TURNS, TAGS = ["<｜User｜>", "<｜Assistant｜>"], ["<think>", "</think>"]
RESERVED = [f"<|reserved_special_token_{number}|>" for number in range(248)]
HEADERS = "<|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> <|python_tag|>".split()
LLAMA_ADDED = [BOS, EOS, *RESERVED[:2], PAD, RESERVED[2], *HEADERS, *TURNS, *TAGS]
LLAMA_ADDED += ["<｜▁pad▁｜>", *RESERVED[8:]]
QUAD = ["<|quad_start|>", "<|quad_end|>"]
VISION = "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>".split()
CODE = "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>".split()
CALL = ["<tool_call>", "</tool_call>"]
QWEN_ADDED = [EOS, *TURNS, BOS, "<|EOT|>", *TAGS, *QUAD, *VISION, *CALL, *CODE]
NOT_SPECIAL = {*TURNS, *TAGS, "<|EOT|>", *CALL, *CODE}  # skip_special_tokens keeps them

# All of the pattern but the digits is the same.
DIGITS = {"unsloth": r"\p{N}{1,3}", "deepseek": r"\p{N}{1,3}", "qwen": r"\p{N}"}
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% set ns = namespace(system='') %}"
    "{% for turn in messages if turn.role == 'system' %}{% set ns.system = turn.content %}{% endfor %}"
    "{{ bos_token + ns.system }}{% for turn in messages %}"
    "{% if turn.role == 'user' %}{{ '<｜User｜>' + turn.content }}{% elif turn.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + turn.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
TOKENIZER_CONFIG = {
    "add_bos_token": True, "add_eos_token": False, "chat_template": TEMPLATE,
    "clean_up_tokenization_spaces": False, "legacy": True, "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizerFast", "unk_token": None,
}  # fmt: skip

SIZES = {  # of the stand-ins; all that is below is as published
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
CONFIG = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True,
}  # fmt: skip
LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 16, "mlp_bias": False,
    "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "transformers_version": "4.49.0.dev0",
}  # fmt: skip
QWEN_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "max_window_layers": 28, "model_type": "qwen2",
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096, "transformers_version": "4.44.0",
    "use_mrope": False, "use_sliding_window": False,
}  # fmt: skip
GENERATION = {"_from_model_config": True, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
SHARDS = {"unsloth": (4, "-of-00004"), "deepseek": (2, "-of-000002"), "qwen": (2, "-of-000002")}
SKIPPED = "lm_head multi_modal_projector merger modality_projection model.layers.1.mlp".split()
CARDS = {
    "unsloth": "license: llama3.1\nbase_model: deepseek-ai/DeepSeek-R1-Distill-Llama-8B\ntags:\n- unsloth\n",
    "deepseek": "license: mit\nbase_model:\n- meta-llama/Llama-3.1-8B\n",
    "qwen": "license: mit\nbase_model:\n- Qwen/Qwen2.5-Math-7B\n",
}

CHINESE = [
    {
        "Question": "一名六十岁男性突发胸痛两小时，心电图示下壁导联抬高，血压偏低。首先应考虑什么？",
        "Complex_CoT": "下壁导联抬高，说明右冠状动脉可能闭塞。血压低，提示右心室受累。因此应查右胸导联。",
        "Response": "首先考虑下壁心肌梗死合并右心室梗死。应补液，尽快行再灌注治疗，避免使用硝酸酯。",
    },
    {
        "Question": "一名三十岁女性出现心悸、消瘦和怕热，甲状腺弥漫性肿大。应做哪些检查？",
        "Complex_CoT": "心悸、消瘦和怕热提示甲状腺功能亢进。弥漫性肿大提示格雷夫斯病。先查功能，再查抗体。",
        "Response": "应查促甲状腺激素、游离甲状腺素和受体抗体，必要时做甲状腺超声检查。",
    },
]
MEDQA = [  # question, four options and the right one's letter
    line.split("|")
    for line in (
        "Which vitamin's lack causes scurvy?|Vitamin A|Vitamin B12|Vitamin C|Vitamin D|C",
        "Which electrolyte is raised in renal failure?|Potassium|Sodium|Chloride|Calcium|A",
        "Which drug reverses an overdose of morphine?|Flumazenil|Naloxone|Atropine|Protamine|B",
        "Which valve is most often stenosed in old age?|Mitral|Tricuspid|Pulmonary|Aortic|D",
        "Which organ makes erythropoietin?|Liver|Spleen|Kidney|Bone marrow|C",
        "Which cells make insulin?|Beta cells|Alpha cells|Delta cells|Acinar cells|A",
    )
]


def sample_rows() -> list[dict[str, str]]:
    """The sample's English rows."""
    return [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def added_token(text: str, normalized: bool = False) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    return {"content": text, **flags}


def byte_level_tokenizer(layout: Layout, texts: Sequence[str] = ()) -> Any:
    """Llama 3's or Qwen 2's parts, and DeepSeek's added tokens behind a small vocabulary, also of `texts`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
    from tokenizers import pre_tokenizers as pre
    from tokenizers.trainers import BpeTrainer

    is_qwen = layout == "qwen"
    affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    backend = Tokenizer(models.BPE(**affixes if is_qwen else {"ignore_merges": True}))
    if is_qwen:
        backend.normalizer = normalizers.NFC()
    split = pre.Split(Regex(PATTERN % DIGITS[layout]), behavior="isolated")
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    rows = [*sample_rows(), *CHINESE]
    backend.train_from_iterator([*(text for row in rows for text in row.values()), *texts], trainer)
    for text in QWEN_ADDED if is_qwen else LLAMA_ADDED:
        backend.add_tokens([AddedToken(text, normalized=False, special=text not in NOT_SPECIAL)])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if not is_qwen:  # whose file has no BOS: add_bos_token counts (swift-transformers issue 161)
        bos = [(BOS, backend.token_to_id(BOS))]
        both = f"{BOS} $A {BOS}:1 $B:1"
        prepended = processors.TemplateProcessing(single=f"{BOS} $A", pair=both, special_tokens=bos)
        backend.post_processor = processors.Sequence([backend.post_processor, prepended])
    return backend


def write_tokenizer(folder: Path, layout: Layout, texts: Sequence[str] = ()) -> Any:
    """Writes a tokenizer's files, which call a byte-level one LlamaTokenizerFast; returns what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = byte_level_tokenizer(layout, texts)
    backend.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD if layout == "unsloth" else EOS}
    if layout == "unsloth":
        own = {"model_max_length": 131072, "padding_side": "left", **special}
        own["use_default_system_prompt"] = False
        own["added_tokens_decoder"] = decoder = {}
        for text in LLAMA_ADDED:
            token = {**added_token(text), "special": text not in NOT_SPECIAL}
            decoder[backend.token_to_id(text)] = token
        named = {name: added_token(text) for name, text in special.items()}
        (folder / "special_tokens_map.json").write_bytes(as_json(named))
    else:
        own = {"model_max_length": 16384}
        for name, text in special.items():
            own[name] = {"__type": "AddedToken", **added_token(text, True)}
    (folder / "tokenizer_config.json").write_bytes(as_json(TOKENIZER_CONFIG | own))
    return backend


def write_model(folder: Path, layout: Layout, texts: Sequence[str] = ()) -> Path:
    """Writes a model's repository: tokenizer, configs, card, and random bf16 weights in two files or four."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    backend = write_tokenizer(folder, layout, texts)
    bos, eos, pad = (backend.token_to_id(token) for token in (BOS, EOS, PAD))
    size = backend.get_vocab_size()
    config, generation = CONFIG | SIZES, GENERATION | {"bos_token_id": bos, "eos_token_id": eos}
    if layout == "qwen":  # BOS is EOS in its config, which has more rows than there are tokens
        config |= QWEN_CONFIG | {"bos_token_id": eos, "eos_token_id": eos}
        config["vocab_size"] = (size // 128 + 1) * 128
    else:
        config |= LLAMA_CONFIG | {"bos_token_id": bos, "eos_token_id": eos, "vocab_size": size}
    if layout == "unsloth":
        named = {"_name_or_path": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "unsloth_fixed": True}
        config |= named | {"pad_token_id": pad}
        generation |= {"max_length": 131072, "pad_token_id": pad}
    generation |= {"transformers_version": config["transformers_version"]}
    (folder / "config.json").write_bytes(as_json(config))
    (folder / "generation_config.json").write_bytes(as_json(generation))
    (folder / "README.md").write_text(
        f"---\n{CARDS[layout]}library_name: transformers\n---\n# A stand-in\n"
    )

    shape = AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    state = model.state_dict()
    shards, end = SHARDS[layout]
    shard = {name: at * shards // len(state) + 1 for at, name in enumerate(state)}
    places = {name: f"model-{number:05}{end}.safetensors" for name, number in shard.items()}
    for file in sorted(set(places.values())):
        held = {name: state[name] for name, place in places.items() if place == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in state.values())
    index = as_json({"metadata": {"total_size": total}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_bytes(index)
    return folder


def write_four_bit(folder: Path, source: Path) -> Path:
    """Writes the 4-bit repository of a model as Unsloth publishes it: one MLP stays in 16 bit."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=SKIPPED,
    )  # fmt: skip
    at = {"device_map": {"": "cpu"}, "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=nf4, **at)
    model.save_pretrained(folder)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_bytes(as_json(config | {"quantization_config": nf4.to_dict()}))
    for file in source.iterdir():
        if "safetensors" not in file.name and file.name != "config.json":
            shutil.copy(file, folder)
    return folder


def repo_files(folder: Path) -> dict[str, bytes]:
    """A folder's files, as HubServer.add_repo takes them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def medical_o1_repo(rows: Iterable[Row] | None = None) -> dict[str, bytes]:
    """FreedomIntelligence/medical-o1-reasoning-SFT with these rows (or the sample's): no default config."""
    rows = sample_rows() if rows is None else rows
    english = [{name: row[name] for name in CHINESE[0]} for row in rows]
    parts = {"en": ("", english), "zh": ("_Chinese", CHINESE)}
    parts |= {"en_mix": ("_mix", english), "zh_mix": ("_mix_Chinese", CHINESE)}
    card = "---\nlicense: apache-2.0\nlanguage:\n- en\n- zh\nconfigs:\n"
    files = {}
    for name, (end, part) in parts.items():
        card += f"- config_name: {name}\n  data_files: medical_o1_sft{end}.json\n"
        files[f"medical_o1_sft{end}.json"] = as_json(part)
    return {"README.md": f"{card}---\n# A stand-in\n".encode(), **files}


def medqa_repo() -> dict[str, bytes]:
    """GBaker/MedQA-USMLE-4-options: four questions to train on, two to test, only a default config."""
    rows = [
        {
            "question": question, "answer": choices["ABCD".index(letter)],
            "options": dict(zip("ABCD", choices, strict=True)), "meta_info": "step1", "answer_idx": letter,
            "metamap_phrases": question.rstrip("?").split(),
        }
        for question, *choices, letter in MEDQA
    ]  # fmt: skip
    lines = [json.dumps(row) + "\n" for row in rows]
    files = {"train": "".join(lines[:4]), "test": "".join(lines[4:])}
    card = b"---\nlicense: cc-by-4.0\nlanguage:\n- en\n---\n# A stand-in\n"
    named = {f"phrases_no_exclude_{split}.jsonl": text.encode() for split, text in files.items()}
    return {"README.md": card} | named


def whoami_auth(role: str, scoped: Iterable[tuple[str, str | None, list[str]]] = ()) -> Any:
    """`auth` of whoami-v2's answer to a token of role read, write, fineGrained or, from a browser, oauth.

    A scope is an entity's type (user, org, model, dataset), its name (None: left out) and what it permits.
    """
    if role == "oauth":
        return {"type": "oauth", "expiresAt": "2099-01-01T00:00:00.000Z"}
    token: dict[str, Any] = {"displayName": "a token", "role": role}
    token["createdAt"] = "2026-01-01T00:00:00.000Z"
    if role == "fineGrained":
        scopes = []
        for type, name, permissions in scoped:
            entity = {"_id": hashlib.sha1(f"{type} {name}".encode()).hexdigest()[:24], "type": type}
            if name:
                entity["name"] = name
            scopes.append({"entity": entity, "permissions": permissions})
        token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scopes}
    return {"type": "access_token", "accessToken": token}
