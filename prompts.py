"""The prompt: one template for training, inference, evaluation and the Modelfile. Standard library only.

A row of training text is

    prompt (ends in "<think>\\n") + thought + "\\n</think>\\n" + answer + EOS

The templates are those of the published recipe byte for byte, trailing spaces included: models published from the
recipe were trained on these bytes.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

Lang = Literal["en", "zh"]

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

TEMPLATES: dict[Lang, str] = {
    "en": (
        "Below is an instruction that describes a task, paired with an input that provides further context. \n"
        "Write a response that appropriately completes the request. \n"
        "Before answering, think carefully about the question and create a step-by-step chain of thoughts"
        " to ensure a logical and accurate response.\n"
        "\n"
        "### Instruction:\n"
        "You are a medical expert with advanced knowledge in clinical reasoning, diagnostics,"
        " and treatment planning. \n"
        "Please answer the following medical question. \n"
        "\n"
        "### Question:\n"
        "{question}\n"
        "\n"
        "### Response:\n"
        "<think>\n"
    ),
    "zh": (
        "以下是描述任务的指令,以及提供进一步上下文的输入。 \n"
        "写出一个适当完成请求的回应。 \n"
        "在回答之前,仔细思考问题并创建一个逐步的思维链,以确保回答的逻辑性和准确性。\n"
        "\n"
        "### 指令:\n"
        "你是一位具有先进临床推理、诊断和治疗计划知识的医学专家。 \n"
        "请回答以下医学问题。 \n"
        "\n"
        "### 问题:\n"
        "{question}\n"
        "\n"
        "### 回应:\n"
        "<think>\n"
    ),
}


class Response(NamedTuple):
    """What a model wrote after the prompt. A thought that was never closed has no answer."""

    thought: str
    answer: str
    closed: bool


def build_prompt(question: str, lang: Lang = "en") -> str:
    """The text before the thought; the same bytes in training and at inference."""
    # Not str.format: a question may hold braces.
    head, tail = TEMPLATES[lang].split("{question}")
    return head + question.strip() + tail


def build_example(question: str, thought: str, answer: str, eos: str, lang: Lang = "en") -> str:
    """One training row. Starts with `build_prompt(question)`, as text and, the thought being stripped, as tokens."""
    return f"{build_prompt(question, lang)}{thought.strip()}\n{THINK_CLOSE}\n{answer.strip()}{eos}"


def split_response(text: str) -> Response:
    """Splits what follows the prompt at the first closing tag."""
    thought, tag, answer = text.partition(THINK_CLOSE)
    return Response(thought.strip(), answer.strip(), bool(tag))


def find_marker(text: str, special_tokens: Iterable[str] = ()) -> str | None:
    """The first think tag or special token inside `text`, which could forge the row's structure; None if clean."""
    return next((marker for marker in (THINK_OPEN, THINK_CLOSE, *special_tokens) if marker in text), None)
