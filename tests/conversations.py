"""Conversations as clients send them, and the text that each has to become."""

from typing import Any, NamedTuple

import prompts

EOS = "<｜end▁of▁sentence｜>"
Message = dict[str, Any]
CALL = {"id": "1", "type": "function", "function": {"name": "lookup", "arguments": "{}"}}


def system(content: Any) -> Message:
    return user(content, "system")


def user(content: Any, role: str = "user") -> Message:
    return {"role": role, "content": content}


def assistant(content: Any, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


class Case(NamedTuple):
    """`turns` are questions and answers in turn, `ending` is where the model goes on."""

    messages: list[Message]
    turns: list[str]
    ending: str = "<think>\n"
    system: str = ""
    is_answered: bool = False  # the last message is a whole answer, which EOS ends unless continued

    def text(self, lang: prompts.Lang = "en", eos: str = EOS, continued: bool = False) -> str:
        head, tail = prompts.build_prompt("|", lang).split("|")
        start = head.rindex("\n\n### ")
        respond = tail.removesuffix("<think>\n")
        text = head[:start]
        if self.system:
            text += "\n" + self.system
        for position, turn in enumerate(self.turns):
            text += respond + turn + eos if position % 2 else head[start:] + turn
        text += respond + self.ending
        if self.is_answered and not continued:
            text += eos
        return text

    @property
    def asks(self) -> bool:
        return self.messages[-1]["role"] != "assistant"


ENDED = "<think>\nHm.\n</think>\nSo"
TAGGED = "<think>\nHm.\n</think>\n\nSo."
CASES = {
    "one question": Case([user(" Why {question}?\n")], ["Why {question}?"]),
    "system message": Case([system("Be brief.\n"), user("Why?")], ["Why?"], system="Be brief."),
    "two system messages": Case(
        [system("Be brief."), user("Why?"), system("No lists."), system("")],
        ["Why?"],
        system="Be brief.\n\nNo lists.",
    ),
    "two turns, thought between tags": Case(
        [user("Why?"), assistant(TAGGED), user("And 因?")], ["Why?", "So.", "And 因?"]
    ),
    "two turns, thought without its first tag": Case(
        [user("Why?"), assistant("因\n</think>\nSo é."), user("And?")], ["Why?", "So é.", "And?"]
    ),
    "two turns, thought in a field": Case(
        [user("Why?"), assistant("So.", reasoning_content="Hm."), user("And?")],
        ["Why?", "So.", "And?"],
    ),
    "two turns, no thought": Case(
        [user("Why?"), assistant(" So. "), user("And?")], ["Why?", "So.", "And?"]
    ),
    "two turns, thought never closed": Case(
        [user("Why?"), assistant("<think>\nHm"), user("And?")], ["Why?", "", "And?"]
    ),
    "open thought": Case([user("Why?"), assistant("<think>\nHm, so")], ["Why?"], "<think>\nHm, so"),
    "open thought, empty": Case([user("Why?"), assistant("<think>\n")], ["Why?"]),
    "open thought in a field": Case(
        [user("Why?"), assistant("", reasoning_content="Hm, so")], ["Why?"], "<think>\nHm, so"
    ),
    "answer": Case(
        [user("Why?"), assistant("So", reasoning_content="Hm.")], ["Why?"], ENDED, is_answered=True
    ),
    "answer between tags": Case(
        [user("Why?"), assistant(ENDED)], ["Why?"], ENDED, is_answered=True
    ),
    "answer without a thought": Case(
        [user("Why?"), assistant("So")], ["Why?"], "<think>\n\n</think>\nSo", is_answered=True
    ),
}
# What Ollama has no field for.
OPENAI_CASES = {
    "text parts": Case([user(parts("Why", "so?"))], ["Why\nso?"]),
    "text parts in a system message": Case(
        [system(parts("Be brief.")), user(parts("Why?"))], ["Why?"], system="Be brief."
    ),
    "open thought in text parts": Case(
        [user("Why?"), assistant(parts("<think>\nHm"))], ["Why?"], "<think>\nHm"
    ),
    "open thought beside null": Case(
        [user("Why?"), assistant(None, reasoning_content="Hm")], ["Why?"], "<think>\nHm"
    ),
    "thought in vLLM's field": Case(
        [user("Why?"), assistant("So", reasoning="Hm.")], ["Why?"], ENDED, is_answered=True
    ),
    "null beside a call": Case(
        [user("Why?"), assistant(None, tool_calls=[CALL]), user("And?")], ["Why?", "", "And?"]
    ),
    "developer message": Case(
        [{"role": "developer", "content": "Be brief."}, user("Why?")], ["Why?"], system="Be brief."
    ),
}
REFUSED = {
    "tool": ([user("Why?"), {"role": "tool", "content": "4"}], "unknown role: tool"),
    "image": ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "text only"),
}
