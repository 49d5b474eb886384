"""prompts.py: one template, byte for byte; the same tokens in training as at inference; no forged tags."""

import pytest
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


@pytest.mark.parametrize(
    ("lang", "question", "prompt"), [("en", "Why?", ENGLISH), ("zh", "为什么?", CHINESE)]
)
def test_the_prompt_is_the_recipes_byte_for_byte(lang, question, prompt):
    assert build_prompt(question, lang) == prompt


def test_an_example_is_prompt_thought_answer_eos():
    assert build_example("Why?", " Hm. \n", "\nSo.", "<eos>") == ENGLISH + "Hm.\n</think>\nSo.<eos>"


def test_braces_and_template_markers_in_a_question_stay_as_they_are():
    question = "Is {question} or {0} in ### Response: a risk?"
    assert build_prompt(question) == ENGLISH.replace("Why?", question)


@pytest.mark.parametrize(
    ("text", "response"),
    [
        ("Hm.\n</think>\nSo. </think> no", ("Hm.", "So. </think> no", True)),
        ("Hm, and then it was cut", ("Hm, and then it was cut", "", False)),
    ],
)
def test_a_response_splits_at_its_first_closing_tag_and_has_no_answer_without_one(text, response):
    assert split_response(text) == response


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("a <think> b", "<think>"),
        ("a</think>", "</think>"),
        ("the end<eos>", "<eos>"),
        ("half a pair \ud83d", "\\ud83d"),
        ("if a < b > c, think", None),
    ],
)
def test_what_could_forge_the_structure_is_found(text, marker):
    assert find_marker(text, ["<eos>"]) == marker


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(str.strip)


def encoded(tokenizer, *fields, lang="en"):
    return prompts.encode([prompts.Row(*(field.strip() for field in fields))], tokenizer, lang)[0]


@settings(max_examples=200, deadline=None)
@given(question=TEXT, thought=TEXT, answer=TEXT, lang=st.sampled_from(["en", "zh"]))
def test_a_row_starts_with_the_tokens_of_its_prompt(tokenizer, question, thought, answer, lang):
    if find_marker(question + thought + answer, prompts.special_tokens(tokenizer)):
        return
    row = encoded(tokenizer, question, thought, answer, lang=lang)
    if (
        row.status != "used"
    ):  # SmolLM2 has no token for some bytes, and takes a special one for them: found, and dropped
        assert tokenizer.unk_token_id in row.input_ids
    assert (
        row.input_ids[: row.prompt_tokens] == tokenizer(build_prompt(question, lang))["input_ids"]
    )


def test_a_row_has_one_bos_at_its_start_one_eos_at_its_end_and_each_tag_once(tokenizer):
    ids = encoded(tokenizer, "Why?", "Hm.", "So.").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    text = tokenizer.decode(ids)
    assert text.count("<think>") == text.count("</think>") == 1
    for tag in {"<think>", "</think>"} & tokenizer.get_vocab().keys():  # where the tags are tokens
        assert ids.count(tokenizer.convert_tokens_to_ids(tag)) == 1


def test_what_is_counted_in_an_answer():
    thought, answer = "so it is and so it is and so it is", "- rest\n- water\nThat is all."
    counted = prompts.measure(
        {"thought": thought, "answer": answer, "closed": True, "finish_reason": "length"}
    )
    assert counted["closed"] == 1.0 and counted["stopped"] == 0.0
    assert counted["thought_words"] == 11 and counted["answer_words"] == 7
    assert counted["bullets"] == pytest.approx(2 / 3)
    assert counted["repetition"] == pytest.approx(4 / 15), (
        "of 15 runs of four words 4 stood there before"
    )

    counted = prompts.measure(
        {"thought": "", "answer": "", "closed": False, "finish_reason": "stop"}
    )
    assert counted["repetition"] == counted["bullets"] == counted["answer_words"] == 0


REPEATED = {
    "It is so. " * 14 + "Then it ends.": "It is so. [14 times] Then it ends.",
    "- drink water\n" * 3 + "- rest": "- drink water [3 times]\n- rest",
    "膀胱测压术最有可能揭示。" * 5: "膀胱测压术最有可能揭示。 [5 times]",
    "One thing twice. One thing twice. 1.000000000000000000000000000": None,
}


@pytest.mark.parametrize("text", REPEATED)
def test_what_is_said_three_times_in_a_row_is_shown_once_with_its_number(text):
    assert prompts.fold(text) == (REPEATED[text] or text)
