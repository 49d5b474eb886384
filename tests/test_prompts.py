"""prompts.py: one template, byte for byte; what is read of a record; no forged tags."""

import json

import pytest
from conversations import assistant, user
from hypothesis import given, settings
from hypothesis import strategies as st

import prompts
from prompts import build_example, build_prompt, find_marker, split_response

ENGLISH = """Below is an instruction that describes a task, paired with an input that provides further \
context.\x20
Write a response that appropriately completes the request.\x20
Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a \
logical and accurate response.

### Instruction:
You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment \
planning.\x20
Please answer the following medical question.\x20

### Question:
Why?

### Response:
<think>
"""
CHINESE = """以下是描述任务的指令,以及提供进一步上下文的输入。\x20
写出一个适当完成请求的回应。\x20
在回答之前,仔细思考问题并创建一个逐步的思维链,以确保回答的逻辑性和准确性。

### 指令:
你是一位具有先进临床推理、诊断和治疗计划知识的医学专家。\x20
请回答以下医学问题。\x20

### 问题:
为什么?

### 回应:
<think>
"""


@pytest.fixture(scope="module", params=["smollm2", "r1"])
def tokenizer(request, smollm2, r1_tokenizer):
    from transformers import AutoTokenizer

    return r1_tokenizer if request.param == "r1" else AutoTokenizer.from_pretrained(smollm2)


def test_build_prompt_and_example_are_the_recipes_byte_for_byte():
    assert build_prompt("Why?") == ENGLISH and build_prompt("为什么?", "zh") == CHINESE
    question = "Is {question} or {0} in ### Response: a risk?"
    assert build_prompt(question) == ENGLISH.replace("Why?", question)
    assert build_example("Why?", " Hm. \n", "\nSo.", "<eos>") == ENGLISH + "Hm.\n</think>\nSo.<eos>"


def test_split_response_takes_the_first_closing_tag_and_without_one_has_no_answer():
    assert split_response("Hm.\n</think>\nSo. </think> no") == ("Hm.", "So. </think> no", True)
    assert split_response("Hm, and it was cut") == ("Hm, and it was cut", "", False)


def test_find_marker_finds_what_could_forge_the_structure():
    texts = {"a <think> b": "<think>", "a</think>": "</think>", "the end<eos>": "<eos>"}
    for text, marker in {**texts, "if a < b > c, think": None}.items():
        assert find_marker(text, ["<eos>"]) == marker


# ------------------------------------------------------------------------------ reading of a record


def part(text, kind="text", key="text"):
    return {"type": kind, key: text}


ONE, TWO, THREE = ("m", "m", "m"), ("q", "a", "a"), ("q", "t", "a")
TAGGED = "<think>Hm.</think>So."
# What is read as ("Why?", "Hm.", "So."), with the notes.
READ = [
    # One column for each, also as lists of one string, parts of text or a message.
    (THREE, {"q": "Why?", "t": "Hm.", "a": "So."}, []),
    (THREE, {"q": ["Why?"], "t": ["Hm."], "a": ["So."]}, []),
    (THREE, {"q": [part("Why?")], "t": {"text": "Hm."}, "a": assistant("So.")}, []),
    # Thought and answer in one column, divided by tags of any kind.
    (TWO, {"q": "Why?", "a": TAGGED}, []),
    (TWO, {"q": "Why?", "a": "Hm.\n</think>\n\nSo."}, []),
    (TWO, {"q": "Why?", "a": "<|begin_of_thought|>\nHm.\n<|end_of_thought|>\n"
           "<|begin_of_solution|>\nSo.\n<|end_of_solution|>"}, []),
    # Conversations: keys, roles, None beside a value, parts, reasoning beside the content.
    (ONE, {"m": [user("Why?", "User"), assistant(TAGGED, role="MODEL ")]}, []),
    (ONE, {"m": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": TAGGED}]}, []),
    (ONE, {"m": [{"role": None, "content": None, "from": "human", "value": "Why?"},
                 {"role": "assistant", "content": TAGGED, "from": None, "value": None}]}, []),
    (ONE, {"m": [user([part("Why?")]), assistant([part("Hm.", "thinking", "thinking"), part("So.")])]},
     []),
    (ONE, {"m": [user("Why?"), assistant([part("Hm.", "reasoning"), part("So.")])]}, []),
    (ONE, {"m": [user("Why?"), assistant("So.", thinking="Hm.", reasoning=None)]}, []),
    (ONE, {"m": json.dumps([user("Why?"), assistant(TAGGED)])}, []),
    (ONE, {"m": repr([user("Why?"), assistant(TAGGED)])}, []),
    (("p", "c", "c"), {"p": [user("Why?")], "c": [assistant(TAGGED)]}, []),
    # A column that is named is the one that is taught.
    (("m", "r", "m"), {"m": [user("Why?"), assistant("So.")], "r": "Hm."}, []),
    (("q", "r", "m"), {"q": "Why?", "m": [assistant("So.")], "r": ["Hm."]}, []),
    # What is in the record and is not taught.
    (("p", "r", "c"), {"p": "Why?", "r": "Hm.", "c": [user("Why?"), assistant("So.")]},
     ["user message not taught"]),
    (ONE, {"m": [user("Be kind.", "System"), user("Why?"), assistant(TAGGED)]},
     ["system message not taught"]),
    (ONE, {"m": [assistant("Hello."), user("Why?"), assistant(TAGGED)]},
     ["earlier answer not taught"]),
    (("m", "t", "a"), {"m": [user("Why?"), assistant("Old.")], "t": "Hm.", "a": "So."},
     ["assistant message not taught"]),
]  # fmt: skip


def test_read_record_gives_question_thought_answer_and_what_is_not_taught():
    for columns, record, notes in READ:
        row = prompts.read_record(record, columns, ("<eos>",))
        assert row == prompts.Row("Why?", "Hm.", "So.", notes=notes), record


SAME = "two of question, thought and answer are the same"
EMPTY = "a text in {} is empty or missing"
DROPPED = [
    # A named thought that is the answer, or the question; a thought that is marked in the answer.
    (("m", "r", "m"), {"m": [user("Why?"), assistant("So.")], "r": " so. "}, SAME),
    (("m", "r", "m"), {"m": [user("Why?"), assistant(TAGGED)], "r": "Aha."}, "<think> inside m"),
    (("m", "r", "m"), {"m": [user("Why?"), assistant("So.", reasoning="Hm.")], "r": "Aha."},
     "<think> inside m"),
    # Missing values.
    (THREE, {"q": "Why?", "a": "So."}, "t is missing"),
    (THREE, {"q": "Why?", "t": float("nan"), "a": "So."}, "t is missing"),
    (THREE, {"q": "Why?", "t": "nan", "a": "So."}, EMPTY.format("t")),
    (THREE, {"q": "Why?", "t": "Hm.", "a": " N/A "}, EMPTY.format("a")),
    (THREE, {"q": "Why?", "t": "None.", "a": "So."}, EMPTY.format("t")),
    # Other types.
    (THREE, {"q": 7, "t": "Hm.", "a": "So."}, "q has no single text (int)"),
    (THREE, {"q": "Why?", "t": ["Hm.", "Aha."], "a": "So."}, "t has no single text (list)"),
    (ONE, {"m": [user([part("Why?"), part({}, "image_url", "image_url")]), assistant(TAGGED)]},
     "m has no single text (dict)"),
    # Conversations.
    (ONE, {"m": [user("Why?"), assistant("So."), user("How?"), assistant(TAGGED)]},
     "m has 2 user messages, not one"),
    (ONE, {"m": [user("Why?")]}, "m has 0 assistant messages, not one"),
    (ONE, {"m": [user("Why?"), assistant(None, tool_calls=[1])]}, "m has no single text (dict)"),
    (ONE, {"m": [{"type": "human", "content": "Why?"}, {"type": "ai", "content": TAGGED}]},
     "<think> inside m"),
    # Tags.
    (TWO, {"q": "Why?", "a": "So."}, "a has no thought that ends in </think>"),
    (TWO, {"q": "Why?", "a": "<think></think>So."}, EMPTY.format("a")),
    (TWO, {"q": "Why?", "a": TAGGED * 2}, "<think> inside a"),
    (TWO, {"q": "Why?", "a": "Well, <think>Hm.</think>So."}, "<think> inside a"),
    (THREE, {"q": "Why?", "t": "<thinking>Hm.</thinking>", "a": "So."}, "<thinking> inside t"),
    (THREE, {"q": "Why?<eos>", "t": "Hm.", "a": "So."}, "<eos> inside q"),
]  # fmt: skip


def test_read_record_that_cannot_be_taught_is_dropped_with_the_true_reason():
    for columns, record, reason in DROPPED:
        row = prompts.read_record(record, columns, ("<eos>",))
        assert row == prompts.Row(status=reason), record
    assert prompts.read_record({"q": "Why?", "t": "Hm.", "a": "Na"}, THREE, ()).answer == "Na"


SUSPICIOUS = {
    "invisible characters": ["\ufeffSo.", "So\u200b.", "So\x1b[31m."],
    "characters of a wrong encoding": ["naÃ¯ve", "itâ€™s", "na\ufffdve"],
    "markup": [
        "a &lt; b",
        "it&#39;s",
        "<p>So.</p>",
        "<br/>",
        "So,\\n- so",
        "<|im_end|>",
        "[INST] So",
    ],
    "carriage returns (made line feeds)": ["So,\r\nso."],
    None: ["1 < 2 & 3 > 2; naïve – 病: [a] <= b"],
}


def test_read_record_with_suspicious_text_is_taught_and_noted():
    for name, texts in SUSPICIOUS.items():
        for text in texts:
            row = prompts.read_record({"q": "Why?", "t": "Hm.", "a": text}, THREE, ())
            assert row.answer == text.replace("\r", "")
            assert row.notes == ([f"{name} in the text"] if name else []), text


def test_same_question_ignores_spelling_but_no_number():
    same = [("Why, so?", " why SO"), ("为什么？", "为什么?"), ("Give 5\u00a0mg", "give 5 mg.")]
    other = [
        ("Give 1.5 mg", "Give 15 mg"),
        ("120/80?", "12080?"),
        ("a < b?", "a > b?"),
        ("???", "!"),
    ]
    for first, second in same:
        assert prompts.same_question(first) == prompts.same_question(second)
    for first, second in other:
        assert prompts.same_question(first) != prompts.same_question(second)


# ------------------------------------------------------------------------------------------- tokens

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(str.strip)


def encoded(tokenizer, *fields, lang="en"):
    return prompts.encode(prompts.Row(*map(str.strip, fields)), tokenizer, lang)


@settings(max_examples=200, deadline=None)
@given(question=TEXT, thought=TEXT, answer=TEXT, lang=st.sampled_from(["en", "zh"]))
def test_a_row_starts_with_the_tokens_of_its_prompt(tokenizer, question, thought, answer, lang):
    special = list(map(str, tokenizer.added_tokens_decoder.values()))
    if find_marker(question + thought + answer, special):
        return
    row = encoded(tokenizer, question, thought, answer, lang=lang)
    if row.status != "used":  # SmolLM2 takes a special token for bytes that it lacks: dropped
        assert tokenizer.unk_token_id in row.input_ids
    head = tokenizer(build_prompt(question, lang))["input_ids"]
    assert row.input_ids[: row.prompt_tokens] == head


def test_a_row_has_one_bos_at_its_start_one_eos_at_its_end_and_each_tag_once(tokenizer):
    ids = encoded(tokenizer, "Why?", "Hm.", "So.").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    text = tokenizer.decode(ids)
    assert text.count("<think>") == text.count("</think>") == 1
    for tag in {"<think>", "</think>"} & tokenizer.get_vocab().keys():  # where the tags are tokens
        assert ids.count(tokenizer.convert_tokens_to_ids(tag)) == 1
