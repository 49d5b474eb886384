"""The prompt: one template for training, inference, evaluation and the Modelfile. Standard library only.

A row of training text is

    prompt (ends in "<think>\\n") + thought + "\\n</think>\\n" + answer + EOS

The templates are those of the published recipe byte for byte, trailing spaces included: models published from
the recipe were trained on these bytes. What becomes of a record, as text and as tokens of the tokenizer it is
given, is decided here too, and what an answer is worth.
"""

import ast
import contextlib
import functools
import html
import itertools
import json
import random
import re
import statistics
import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

Lang = Literal["en", "zh"]

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

TEMPLATES: dict[Lang, str] = {
    "en": """\
Below is an instruction that describes a task, paired with an input that provides further context.\x20
Write a response that appropriately completes the request.\x20
Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure \
a logical and accurate response.

### Instruction:
You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment \
planning.\x20
Please answer the following medical question.\x20

### Question:
{question}

### Response:
<think>
""",
    "zh": """\
以下是描述任务的指令,以及提供进一步上下文的输入。\x20
写出一个适当完成请求的回应。\x20
在回答之前,仔细思考问题并创建一个逐步的思维链,以确保回答的逻辑性和准确性。

### 指令:
你是一位具有先进临床推理、诊断和治疗计划知识的医学专家。\x20
请回答以下医学问题。\x20

### 问题:
{question}

### 回应:
<think>
""",
}

# Asked before and after training: the recipe's question.
BEFORE_AFTER: dict[Lang, str] = {
    "en": "A 61-year-old woman with a long history of involuntary urine loss during activities like coughing "
    "or sneezing but no leakage at night undergoes a gynecological exam and Q-tip test. Based on these "
    "findings, what would cystometry most likely reveal about her residual volume and detrusor contractions?",
    "zh": "一位 61 岁的女性,长期在咳嗽或打喷嚏等活动中出现非自愿性尿失禁,但夜间没有漏尿。"
    "她接受了妇科检查和棉签测试。根据这些发现,膀胱测压术最有可能揭示她的残余体积和逼尿肌收缩情况如何?",
}


# Earlier answers lose their thoughts. There is no `generation` tag, which stops minijinja (issue
# 815), and neither word of "tools" and "tool_call", by which Ollama finds support for them.
CHAT_TEMPLATE = """\
{%- macro text(content) %}
  {%- if content is string %}
    {{- content }}
  {%- elif content %}
    {%- for part in content %}
      {{- '' if loop.first else '\\n' }}
      {{- part.text if part.type == 'text' else raise_exception('This model reads text only.') }}
    {%- endfor %}
  {%- endif %}
{%- endmacro %}
{%- set system = ['system', 'developer'] %}
{{- BOS + INSTRUCTION }}
{%- for message in messages if message.role in system and text(message.content) | trim %}
  {{- ('\\n' if loop.first else '\\n\\n') + text(message.content) | trim }}
{%- endfor %}
{%- for message in messages %}
  {%- set said = text(message.content) %}
  {%- if message.role == 'user' %}
    {{- QUESTION + said | trim }}
  {%- elif message.role == 'assistant' %}
    {%- set thought = message.reasoning_content or message.reasoning %}
    {%- if thought and '</think>' not in said %}
      {%- set said = '<think>\\n' + thought + ('\\n</think>\\n' + said if said | trim else '') %}
    {%- endif %}
    {%- set parts = said.split('</think>') %}
    {%- set thought = parts[0].split('<think>')[-1] if parts | length > 1 else '' %}
    {%- set answer = parts[-1].split('<think>')[0] | trim + eos_token %}
    {{- RESPONSE }}
    {%- if not loop.last %}
      {{- answer }}
    {%- elif '<think>' in said and parts | length == 1 %}
      {{- '<think>' + (said.split('<think>')[-1] or '\\n') }}
    {%- else %}
      {{- '<think>\\n' + thought | trim + '\\n</think>\\n' + answer }}
    {%- endif %}
  {%- elif message.role not in system %}
    {{- raise_exception('unknown role: ' + message.role) }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'assistant' %}
  {{- RESPONSE + '<think>\\n' }}
{%- endif -%}
"""

# For Ollama. As Go's text/template can't search or trim, the first three templates call themselves
# with a byte less; "answer" takes a content twice, with a NUL between.
OLLAMA_TEMPLATE = """\
{{- define "trim" }}{{ if . }}{{ $end := len (slice . 1) }}
{{- if eq (slice . 0 1) " " "\\n" "\\t" "\\r" }}{{ template "trim" (slice . 1) }}
{{- else if eq (slice . $end) " " "\\n" "\\t" "\\r" }}{{ template "trim" (slice . 0 $end) }}
{{- else }}{{ . }}{{ end }}{{ end }}{{ end }}
{{- define "head" }}{{ $end := len (slice . 1) }}
{{- if eq (slice . $end) "\\x00" }}{{ template "trim" (slice . 0 $end) }}
{{- else }}{{ template "head" (slice . 0 $end) }}{{ end }}{{ end }}
{{- define "answer" }}{{ $tagged := ge (len .) 8 }}
{{- if and $tagged (eq (slice . 0 8) "</think>") }}{{ template "head" (slice . 8) }}
{{- else if ne (slice . 0 1) "\\x00" }}{{ template "answer" (slice . 1) }}
{{- else if not (and $tagged (eq (slice . 1 8) "<think>")) }}{{ template "trim" (slice . 1) }}
{{- end }}{{ end }}
{{- INSTRUCTION }}{{ if .System }}{{ "\\n" }}{{ template "trim" .System }}{{ end }}
{{- range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}{{ QUESTION }}{{ template "trim" .Content }}{{ end }}
{{- if or $last (eq .Role "assistant") }}{{ RESPONSE }}
{{- if not $last }}{{ template "answer" (printf "%s\\x00%s" .Content .Content) }}{{ EOS }}
{{- else if ne .Role "assistant" }}<think>
{{ else if and (ge (len .Content) 7) (eq (slice .Content 0 7) "<think>") }}{{ .Content }}
{{- else }}
{{- if or .Content (not .Thinking) }}<think>
{{ .Thinking }}
</think>
{{ else }}<think>
{{ .Thinking }}{{ end }}{{ .Content }}{{ end }}{{ end }}{{ end -}}
"""

# The model card.
WHERE_WEIGHTS = "Merged 16-bit weights are at the root, the LoRA adapter is in `adapter/`."
WHERE_ADAPTER = "This is the LoRA adapter alone; `pip install peft` to use it."
MODEL_CARD = """---
{metadata}
---
# {base}, fine-tuned on medical chains of thought

{measured}
## Use

{where} The chat template is the training prompt, so ask by chat messages. The answer follows `</think>`.

```python
from transformers import pipeline

chat = pipeline("text-generation", "{repo}", tokenizer="{repo}", dtype="auto", device_map="auto")
messages = [{{"role": "user", "content": "What widens the anion gap?"}}]
print(chat(messages, max_new_tokens={tokens})[0]["generated_text"][-1]["content"])
```

On a server:

```
{serve}
```

## Limits

For study, not a medical device: what it says can be wrong, however fluent its thought.

## Training

![training loss](loss.png)

```json
{settings}
```
"""


class Row(NamedTuple):
    """A record as it is taught; the first `prompt_tokens` of its `input_ids` are the prompt's."""

    question: str = ""
    thought: str = ""
    answer: str = ""
    status: str = "used"  # or "shortened", or the reason why it is dropped
    input_ids: Sequence[int] = ()
    prompt_tokens: int = 0
    notes: Sequence[str] = ()  # what of the record is not taught, and what looks damaged


KEPT = ("used", "shortened")


class UnusableRecord(Exception):
    """The reason why a record is dropped."""


def build_prompt(question: str, lang: Lang = "en") -> str:
    """The text before the thought; the same bytes in training and at inference."""
    # Not str.format: a question may hold braces.
    head, tail = TEMPLATES[lang].split("{question}")
    return head + question.strip() + tail


def build_example(question: str, thought: str, answer: str, eos: str, lang: Lang = "en") -> str:
    """One training row, or without answer and EOS all before them; its tokens start with the prompt's."""
    return f"{build_prompt(question, lang)}{thought.strip()}\n{THINK_CLOSE}\n{answer.strip()}{eos}"


def build_chat_template(has_bos: bool, lang: Lang = "en") -> str:
    """The chat template; `has_bos` says whether a text begins with BOS."""
    return fill_template(CHAT_TEMPLATE, lang).replace("BOS", "bos_token" if has_bos else "''")


def fill_template(template: str, lang: Lang, eos: str = "") -> str:
    """Puts the parts of the training prompt in place of their names."""
    head, response = TEMPLATES[lang].removesuffix(f"{THINK_OPEN}\n").split("{question}")
    start = head.rindex("\n\n### ")
    parts = {
        "INSTRUCTION": head[:start],
        "QUESTION": head[start:],
        "RESPONSE": response,
        "EOS": eos,
    }
    for name, part in parts.items():
        template = template.replace(name, json.dumps(part, ensure_ascii=False))
    return template


def split_response(text: str, thinks: bool = True) -> tuple[str, str, bool]:
    """Thought, answer, and whether the thought was closed: what is never closed has no answer.

    `thinks` says whether the prompt begins a thought; after another prompt all may be the answer.
    """
    thought, tag, answer = text.strip().removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    if not tag and not thinks:
        thought, answer = "", thought
    return thought.strip(), answer.strip(), bool(tag)


@functools.cache
def marker_pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, (THINK_OPEN, THINK_CLOSE, *special_tokens))))


def find_marker(text: str, special_tokens: Sequence[str] = ()) -> str | None:
    """The first think tag or special token in `text`, which could forge a row's structure."""
    # Nor can a tokenizer take half a surrogate pair. One pattern for both would be much slower.
    found = marker_pattern(tuple(special_tokens)).search(text) or re.search("[\ud800-\udfff]", text)
    return found[0].encode(errors="backslashreplace").decode() if found else None


# Column names of public reasoning datasets, the likelier first: question, thought, answer.
USUAL_COLUMNS = (
    "question problem prompt instruction query input".split(),
    "complex_cot cot reasoning reasoning_content thinking thought rationale".split(),
    "response answer output solution completion content attempt".split(),
)
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai"), "assistant"),
}
PART_TYPES = ("text", "input_text", "output_text", "message", "thinking", "reasoning")
# What exports write for a missing value, without a period.
MISSING = set(
    "nan,none,null,nil,na,n/a,n.a,<na>,#n/a,undefined,missing,not available,not applicable,tbd,"
    "[deleted],[removed],-,--,—,?,".split(",")
)
TAG = "think|thinking|thoughts?|reasoning|cot|scratchpad"
THOUGHT_OPEN = re.compile(rf"(?i)<(?:{TAG})>|<\|begin_of_thought\|>|\[THINK\]|◁think▷")
THOUGHT_CLOSE = re.compile(rf"(?i)</(?:{TAG})>|<\|end_of_thought\|>|\[/THINK\]|◁/think▷")
HTML = "a|b|br|code|div|em|font|h[1-6]|i|img|li|ol|p|pre|span|strong|su[bp]|t[dhr]|table|ul"
SUSPICIOUS = {
    "invisible characters": "[\u00a0\u00ad\u200b-\u200f\u2028-\u202e\u2060\ufeff]",
    "control characters": "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]",
    "characters of a wrong encoding": "\ufffd|[ÂÃ][\x80-\xbf]|â€",
    "escaped line ends": r"\\[nrt](?![a-zA-Z])|_x000D_",
    "HTML entities": r"&(?:#\w+|[a-zA-Z]{2,8});",
    "HTML tags": rf"(?i)</?(?:{HTML})\b[^<>]*>",
    "chat markup of another model": r"<\|\w+\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>",
}


def first_of(value: dict[str, Any], *names: str) -> Any:
    """The first of these values that is not None, which tables put where a row lacks a key."""
    for name in names:
        if value.get(name) is not None:
            return value[name]
    return None


def read_turns(value: Any) -> list[dict[str, Any]]:
    """The messages of a conversation, also of one written as JSON or Python; empty for all else."""
    if isinstance(value, str) and re.match(r"\s*\[?\s*\{", value):
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                value = parse(value)
                break
    turns = []
    for turn in value if isinstance(value, list) else [value]:
        role = first_of(turn, "role", "from", "speaker") if isinstance(turn, dict) else None
        if not isinstance(role, str):
            return []
        role = role.strip().lower()
        turns.append({**turn, "role": ROLES.get(role, role)})
    return turns


def pick_turn(value: Any, role: str, column: str, is_whole: bool, notes: set[str]) -> Any:
    """The question of a conversation, or the answer to it; what is no conversation comes back.

    `is_whole` says that question and answer are of the same column, whose later turns can be left.
    """
    turns = read_turns(value)
    if not turns:
        return value
    roles = [turn["role"] for turn in turns]
    start = roles.index("user") if "user" in roles else 0
    end = len(roles)
    if "assistant" in roles[start:]:
        end = roles.index("assistant", start)
    asked = roles[: end if is_whole else None].count("user")
    if role == "user" and asked > 1:
        raise UnusableRecord(f"{column} has several questions")
    if (role == "user" and not asked) or (role == "assistant" and end == len(roles)):
        raise UnusableRecord(
            f"{column} has no {role} message (roles: {', '.join(dict.fromkeys(roles))})"
        )
    last = end if is_whole or role == "assistant" else end - 1
    for position, other in enumerate(roles):
        if other not in ("user", "assistant"):
            notes.add(f"{other} message not taught")
        elif position > end and "user" not in roles[end : position + 1]:
            notes.add("second answer not taught")
        elif not start <= position <= last:
            notes.add("other turns not taught")
    return turns[start if role == "user" else end]


def text_parts(value: Any, column: str, kind: str = "answer") -> Iterator[tuple[str, str]]:
    """Yields kind ("thought" or "answer") and text of a field, of a message or of its parts."""
    if isinstance(value, list):
        if len(value) != 1 and all(isinstance(part, str) for part in value):
            raise UnusableRecord(f"{column} holds {len(value)} texts, not one")
        for part in value:
            yield from text_parts(part, column, kind)
    elif isinstance(value, dict):
        part = value.get("type") or "text"
        if part not in PART_TYPES:
            raise UnusableRecord(f"{column} has a part of type {part}")
        thought = first_of(value, *USUAL_COLUMNS[1])
        text = first_of(value, "content", "value", "text")
        if part in ("thinking", "reasoning"):
            thought = text if thought is None else thought
            text = None
        if thought is None and text is None:
            fault = "has a message without text" if "role" in value else "is dict, not text"
            raise UnusableRecord(f"{column} {fault}")
        if thought is not None:
            yield from text_parts(thought, column, "thought")
        if text is not None:
            yield from text_parts(text, column, kind)
    elif value is None or value != value:  # NaN
        raise UnusableRecord(f"{column} is missing")
    elif isinstance(value, str):
        yield kind, value
    else:
        raise UnusableRecord(f"{column} is {type(value).__name__}, not text")


def split_thought(text: str, column: str) -> tuple[str, str]:
    """Thought and answer of one text, which tags divide."""
    body = text.lstrip()
    opened = THOUGHT_OPEN.match(body)
    if opened:
        body = body[opened.end() :]
    parts = THOUGHT_CLOSE.split(body)
    if len(parts) == 1:
        fault = "is not closed" if opened else "is not marked by think tags"
        raise UnusableRecord(f"the thought in {column} {fault}")
    if len(parts) > 2:
        raise UnusableRecord(f"{column} has more than one thought")
    if THOUGHT_OPEN.search(body):
        raise UnusableRecord(f"{column} has text before its thought")
    answer = re.sub(r"<\|(?:begin|end)_of_solution\|>", "", parts[1])
    for name, part in (("thought", parts[0]), ("answer", answer)):
        if not part.strip():
            raise UnusableRecord(f"the {name} in {column} is empty")
    return parts[0], answer


def read_fields(record: dict[str, Any], columns: Sequence[str], notes: set[str]) -> list[str]:
    """The texts of question, thought and answer; adds to `notes` what is left aside.

    A column may hold a conversation. Where one column is named for thought and answer, the thought
    is what its message marks as one, or tags divide it.
    """
    question_col, thought_col, answer_col = columns
    is_whole = question_col == answer_col
    value = pick_turn(record.get(question_col), "user", question_col, is_whole, notes)
    question = "\n".join(text for _, text in text_parts(value, question_col))
    found = {}
    for column in dict.fromkeys((thought_col, answer_col)):
        value = pick_turn(record.get(column), "assistant", column, is_whole, notes)
        texts: dict[str, list[str]] = {"answer": [], "thought": []}
        for kind, text in text_parts(value, column):
            texts[kind].append(text)
        found[column] = ["\n".join(texts["thought"]), "\n".join(texts["answer"])]
    inner, answer = found[answer_col]
    if thought_col != answer_col:
        thought = found[thought_col][0] or found[thought_col][1]
        if inner.strip():
            notes.add(f"thought inside {answer_col} not taught")
    elif inner.strip():
        thought = inner
    else:
        thought, answer = split_thought(answer, answer_col)
    return [question, thought, answer]


def read_record(
    record: dict[str, Any], columns: Sequence[str], special_tokens: Sequence[str]
) -> Row:
    """The texts of a record, without tokens yet, or the one reason why it is dropped."""
    notes: set[str] = set()
    try:
        fields = read_fields(record, columns, notes)
        texts = [re.sub("\r\n?", "\n", text).strip() for text in fields]
        for column, text in zip(columns, texts, strict=True):
            if not text:
                raise UnusableRecord(f"{column} is empty")
            if text.casefold().strip(".") in MISSING and text != "Na":  # which is sodium
                raise UnusableRecord(f'{column} is missing ("{text}")')
            tag = THOUGHT_OPEN.search(text) or THOUGHT_CLOSE.search(text)
            marker = find_marker(text, special_tokens) or (tag and tag[0])
            if marker:
                raise UnusableRecord(f"{marker} inside {column}")
        same = [" ".join(text.casefold().split()) for text in texts]
        if same[0] in same[1:]:
            raise UnusableRecord("thought or answer repeats the question")
        if same[1] == same[2] and columns[1] != columns[2]:
            raise UnusableRecord("thought and answer are the same")
    except UnusableRecord as reason:
        return Row(status=str(reason))
    whole = "\n".join(fields)
    for name, pattern in {**SUSPICIOUS, "carriage returns (made line feeds)": "\r"}.items():
        if re.search(pattern, whole):
            notes.add(f"{name} in the text")
    question, thought, answer = texts
    return Row(question, thought, answer, notes=sorted(notes))


def drop(statuses: Sequence[str], questions: Sequence[str]) -> dict[str, list[int]]:
    """Positions of what is dropped, by reason; of rows with one question all but the first are."""
    dropped: dict[str, list[int]] = {}
    seen: set[str] = set()
    for position, (status, question) in enumerate(zip(statuses, questions, strict=True)):
        same = same_question(question)
        if status in KEPT and same in seen:
            status = "duplicate question"
        if status in KEPT:
            seen.add(same)
        else:
            dropped.setdefault(status, []).append(position)
    return dropped


def describe_counts(counts: dict[str, Any]) -> str:
    """The number of rows by what became of them, as a sentence."""
    text = f"{counts['read']} read, {counts['used']} to train on, {counts['held_out']} held out"
    if counts["shortened"]:
        text += f", {counts['shortened']} shortened"
    for reason, number in counts["dropped"].items():
        text += f"; dropped {number}: {reason}"
    for note, number in counts["notes"].items():
        text += f"; in {number}: {note}"
    return text


def describe_dropped(dropped: dict[str, list[int]]) -> str:
    """How many rows are dropped for which reason, with the numbers of the first five."""
    parts = []
    for reason, positions in dropped.items():
        some = ", ".join(str(position + 1) for position in positions[:5])
        more = ", …" if len(positions) > 5 else ""
        parts.append(f"{len(positions)}: {reason} (row {some}{more})")
    return "; ".join(parts) or "none"


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts that a tokenizer takes for special tokens."""
    return tuple(sorted(set(map(str, tokenizer.added_tokens_decoder.values()))))


def encode(rows: Sequence[Row], tokenizer: Any, lang: Lang) -> list[Row]:
    """Adds tokens to rows; where they don't have the template's structure, the status says so."""
    if not rows:
        return []
    eos = tokenizer.eos_token
    special = set(tokenizer.added_tokens_decoder)
    texts = [build_example(row.question, row.thought, row.answer, eos, lang) for row in rows]
    heads = tokenizer([build_prompt(row.question, lang) for row in rows])["input_ids"]
    *encoded, empty = tokenizer([*texts, build_example("", "", "", eos, lang)])["input_ids"]
    decoded = tokenizer.backend_tokenizer.decode_batch(encoded, skip_special_tokens=False)
    structure = [token for token in empty if token in special]
    found = []
    for row, text, ids, head, back in zip(rows, texts, encoded, heads, decoded, strict=True):
        status = "used"
        back = back.removeprefix(tokenizer.bos_token or "")
        markers = [token for token in ids if token in special]
        if markers != structure or ids[-1] != tokenizer.eos_token_id:
            status = "special tokens are not where the template has them"
        elif ids[: len(head)] != head:
            status = "its first token joins prompt and thought"
        # Qwen 2's tokenizer composes accents.
        elif unicodedata.normalize("NFC", back) != unicodedata.normalize("NFC", text):
            status = "its tokens do not give its text back"
        found.append(row._replace(input_ids=ids, prompt_tokens=len(head), status=status))
    return found


def shorten(row: Row, tokenizer: Any, lang: Lang, limit: int) -> Row:
    """Cuts the thought at a sentence, so that the row has at most `limit` tokens."""
    tokens = tokenizer(row.thought, add_special_tokens=False, return_offsets_mapping=True)
    offsets = tokens["offset_mapping"]
    keep = len(offsets)
    excess = len(row.input_ids) - limit
    while excess > 0:  # again, where the tokens around the cut came out as more than before
        keep -= excess
        if keep <= 0:
            return row._replace(status="question and answer alone exceed --max-seq-length")
        sentences = re.match(r"(?s).*(?:[.](?=\s)|[。!?！？\n])", row.thought[: offsets[keep][0]])
        if not sentences:
            return row._replace(status="no whole sentence of the thought fits in --max-seq-length")
        [shorter] = encode([row._replace(thought=sentences[0].strip())], tokenizer, lang)
        excess = len(shorter.input_ids) - limit
    return shorter._replace(status="shortened")


def column_choices(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Columns that may hold question, thought ("": the answer's column) and answer, likelier first."""
    talks = []
    tagged = []
    for name in records[0]:
        values = [record.get(name) for record in records]
        if any(map(read_turns, values)):
            talks.append(name)
        if any(isinstance(value, str) and THOUGHT_CLOSE.search(value) for value in values):
            tagged.append(name)
    choices = []
    for usual in USUAL_COLUMNS:
        ranked = {}
        for name in records[0]:
            plain = re.sub(r"[\W_]+", "_", name.partition(" (")[0].lower())  # "reasoning (…)"
            ranks = [(word != plain, rank) for rank, word in enumerate(usual) if word in plain]
            if ranks:
                ranked[name] = min(ranks)
        choices.append([*sorted(ranked, key=ranked.__getitem__), *talks])
    return [choices[0], [*choices[1], ""], [*choices[2], *tagged]]


def guess_columns(records: Sequence[dict[str, Any]]) -> list[str] | None:
    """The columns for question, thought and answer that keep most of these records, as tried on them.

    None where no choice keeps more than half. Each question counts once: of Alpaca's "instruction"
    and "input" the one that differs is the question.
    """
    best = None
    most = len(records) / 2
    for question, thought, answer in itertools.product(*column_choices(records)):
        columns = [question, thought or answer, answer]
        questions = set()
        thoughts = []
        for record in records:
            row = read_record(record, columns, ())
            if row.status == "used":
                questions.add(same_question(row.question))
                thoughts.append(row.thought)
        # Bare words such as "on" and "off" only say whether to think.
        bare = r"[a-z\d_-]+|ON|OFF|On|Off|Yes|No|True|False|High|Low"
        is_switch = thought and all(re.fullmatch(bare, text) for text in thoughts)
        if len(questions) > most and not is_switch:
            best = columns
            most = len(questions)
    return best


def build_ollama_files(eos: str, parameters: dict[str, Any], lang: Lang, weights: str) -> dict:
    """A Modelfile, and files without which the Hub takes the prompt for Alpaca's."""
    template = fill_template(OLLAMA_TEMPLATE, lang, eos)
    modelfile = f'FROM {weights}\nTEMPLATE """{template}"""\nPARAMETER stop "{eos}"\n'
    for name, value in parameters.items():
        modelfile += f"PARAMETER {name} {value}\n"
    params = json.dumps({"stop": [eos], **parameters}, ensure_ascii=False)
    return {"template": template, "params": params, "Modelfile": modelfile}


# ---------------------------------------------------------------------------------- multiple choice
# Reads multiple-choice records, and which option an answer settles on.
# Promises to refuse what is unclear: a record with a reason, an answer as unread.
# Leaves published benchmark figures to lm-evaluation-harness.

# Of options and key: MedQA's, MMLU's, MedMCQA's.
CHOICE_COLUMNS = (
    ("options", "answer_idx"),
    ("options", "answer"),
    ("choices", "answer"),
    ("opa", "cop"),
)


class MultipleChoice(NamedTuple):
    """A question, its options by letter, and the letter of the right one."""

    question: str
    options: dict[str, str]
    key: str

    @property
    def text(self) -> str:
        """As it is asked."""
        options = [f"{letter}. {option}" for letter, option in self.options.items()]
        return "\n".join([self.question, *options, "Say which option is right."])


def option_name(key: Any) -> str:
    """A key or an option's name, to compare them: "(b)" is B, 2.0 is 2."""
    return str(key).strip(" .:()").removesuffix(".0").upper()


def read_options(record: dict[str, Any], column: str) -> dict[str, str]:
    """A record's options by name, or by letter in a list; empty unless 2 to 26 different texts."""
    options = record.get(column)
    if column == "opa":
        options = [record.get(f"op{letter}") for letter in "abcd"]
    for parse in (json.loads, ast.literal_eval):  # a CSV's text: JSON, or as pandas writes it
        if isinstance(options, str):
            with contextlib.suppress(ValueError, SyntaxError, TypeError):
                options = parse(options)
    pairs: list[Any] = []
    if isinstance(options, dict):  # `datasets` fills in None for other records' names
        pairs = [(name, text) for name, text in options.items() if text is not None]
    elif isinstance(options, list) and all(isinstance(each, dict) for each in options):
        pairs = [(each.get("key"), each.get("text") or each.get("value")) for each in options]
    elif isinstance(options, list):
        pairs = list(zip(string.ascii_uppercase, options, strict=False))
    named = {}
    for name, text in pairs:
        if isinstance(text, str | int | float):
            named[option_name(name)] = str(text).strip()
    different = len(set(named.values()) - {""})
    return named if 2 <= different == len(pairs) <= 26 else {}


def read_multiple_choice(
    records: Iterable[dict[str, Any]], columns: tuple[str, str]
) -> tuple[dict[int, MultipleChoice], dict[int, str]]:
    """Reads `columns` of options and key: choices, and reasons where there is none, by position.

    Options: a dict, list, list of {"key", "text" or "value"}, one of these as text, or opa to opd.
    Key: a letter, text or number. Numbers count from 0 if one is 0, from 1 if one is the number of
    its options; ValueError if neither or both are among them.
    """
    read = []
    numbers = []
    for record in records:
        options, key = read_options(record, columns[0]), record.get(columns[1])
        name = option_name(key)
        read.append((record, options, key))
        if options and name.isdecimal() and name not in [*options, *options.values()]:
            numbers.append((int(name), len(options)))

    # What numbers mean is told by all records.
    from_0 = any(number == 0 for number, _ in numbers)
    from_1 = any(number == last for number, last in numbers)
    if numbers and from_0 == from_1:
        occur = "both occur" if from_0 else "never occur"
        raise ValueError(
            f"{columns[1]}: do numbers count from 0 or 1? 0 and the number of options {occur}"
        )

    choices = {}
    reasons = {}
    for position, (record, named, key) in enumerate(read):
        question = record.get("question") or record.get("Question")
        options = dict(zip(string.ascii_uppercase, named.values(), strict=False))
        wanted = option_name(key)
        fits = []
        for number, (letter, name) in enumerate(zip(options, named, strict=True), start=from_1):
            numbered = wanted == str(number) and wanted not in named
            if name == wanted or options[letter] == key or numbered:
                fits.append(letter)
        if not isinstance(question, str) or not question.strip():
            reasons[position] = "the question is empty or not text"
        elif not named:
            value = record.get(columns[0])
            reasons[position] = f"{columns[0]} is not 2 to 26 different texts: {value!r:.200}"
        elif len(fits) != 1:
            count = "two" if fits else "none"
            reasons[position] = f"{columns[1]} {key!r} fits {count} of {named}"
        else:
            choices[position] = MultipleChoice(question, options, fits[0])
    return choices, reasons


# An option is its letter, or «C» where its text was; "A man", "C. difficile" and "C or D" are none.
# The patterns are in ASCII mode, where \b also stands between Chinese and a letter.
NO_OPTION = r"-|[.] | or | and |[、和或]"
OPTION = rf"(?i:option |choice |选项)?«?\b([B-HJ-Z]|[AI](?! (?!is)[a-z]))\b»?(?!{NO_OPTION})"
ANSWER = r"(?:\b(?i:answer|option|choice|diagnosis|treatment|step|one)\b|答案|选项|最)"
GAP = r"[^«]{0,60}?"
IS = r"(?:\b(?i:is|be)\b|:|为|是|选) ?"
CHOOSE = r"(?i:\b(?:choose|chose|select|pick|with|for|it's|it is|so|therefore) |选择?)"
START = r"(?i:^ ?|\b(?:to|that|but|so|think|therefore) |所以)"
RIGHT = r"(?:\b(?:right|correct|best|answer|most)\b|正确|答案|最|合适)"
CLAIMS = (  # the clearer first
    ANSWER + GAP + IS + OPTION,  # "the best answer is (C)", "答案：C"
    CHOOSE + OPTION,  # "I would choose C", "应选C"
    START + OPTION + GAP + RIGHT,  # "so C is right", "C选项正确"
    rf"^[ >-]*{OPTION} ?$",  # "C", "C. It lowers the risk"
    r"«(.)»",  # "Give aspirin"
)
# What follows one of these in a clause claims nothing: "not C", "C is wrong", "不选C".
NEGATION = r"(?i:\b(?:not|neither|incorrect|wrong|unlike|less|rather)\b|n't|[不非错]|排除)"


def plain(text: str) -> str:
    """The text without markup, LaTeX, brackets and full-width letters."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    text = re.sub(r"\\boxed|<answer>|【答案】", "answer: ", text)
    return re.sub(r"\\[a-zA-Z]+|</?\w+>|[*_`$#<>«»(){}\[\]\"“”]", "", text)


def predicted_option(answer: str, options: dict[str, str]) -> str | None:
    """The letter of the option that an answer settles on; None if it is unread or stays open.

    The first of `CLAIMS` that occurs counts, if all its occurrences mean one option.
    """
    text = plain(answer)
    for letter in sorted(options, key=lambda letter: len(options[letter]), reverse=True):
        option = re.escape(plain(options[letter]).strip(" ."))
        if len(option) > 1:
            text = re.sub(rf"(?ai)(?<!\w){option}(?!\w)", f"«{letter}»", text)
    # Into clauses, of which "Answer:\nC" is one.
    text = re.sub(r"(:|therefore,|so,)\s+", r"\1 ", text)
    clauses = []
    for clause in re.split(r"[!?;。,\n]|[.](?! [a-z])", text):
        clauses.append(re.sub(f"{NEGATION}.*", " not", clause))
    for pattern in CLAIMS:
        found: set[str] = set()
        for clause in clauses:
            found.update(re.findall(pattern, clause, re.ASCII))
        found &= options.keys()
        if found:
            return found.pop() if len(found) == 1 else None
    return None


# --------------------------------------------------------------------------------------- evaluation
# What an evaluation says, in the same order on the terminal, the card and the page: the verdict,
# then what changed, with 95% intervals. A damaged training must never be called better.
# Standard library only: neither a grader nor a bootstrap needs more.

SIDES = {"base": "Before", "tuned": "After"}
Measures = dict[str, list[float]]  # by name, one number per row or answer
MIN_ROWS = 8  # for a verdict
RESAMPLES = 2000  # of the bootstrap
MIN_THOUGHT_SHARE = 0.25  # of the rows' own thoughts; less is no step-by-step reasoning
MAX_GENERAL_LOSS_INCREASE = 0.1  # nats per token, a tenth more perplexity
# What is reported, in this order; all other measures are in eval.json alone.
REPORTED = {
    "loss": "held-out loss (lower is better)",
    "relevance": "relevance",
    "accuracy": "accuracy",
    "closed": "thoughts closed",
    "stopped": "finished by itself",
    "reasoning": "reasoning kept",
}
REPORT_HEADINGS = ("measure", "before", "after", "change (95% interval)")


def last_number(answer: str) -> float | None:
    """The last number in an answer; it may have thousands separators, decimals and a unit."""
    text = re.sub(r"\{,\}|\\,|,\\!", ",", answer)  # as LaTeX writes 1,200
    number = r"(?<![A-Za-z\d^])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    found = re.findall(number, text.replace("−", "-"))
    return float(found[-1].replace(",", "")) if found else None


def measure(answer: dict[str, Any]) -> dict[str, float]:
    """Counts in an answer; `repetition` is the share of 4-grams that occurred before."""
    words = f"{answer['thought']} {answer['answer']}".split()
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    counts = {
        "closed": float(answer["closed"]),
        "stopped": float(answer["finish_reason"] == "stop"),
        "thought_words": len(answer["thought"].split()),
        "answer_words": len(answer["answer"].split()),
        "bullets": len(re.findall(r"(?m)^\s*(?:[-*•]|\d+[.)])", answer["answer"])),
        "repetition": 1 - len(set(runs)) / len(runs) if runs else 0.0,
    }
    if "chosen" in answer:
        counts["accuracy"] = float(answer["right"])
        counts["unread"] = float(answer["chosen"] is None)
    return counts


def compare(base: Sequence[float], tuned: Sequence[float], seed: int) -> dict[str, float]:
    """Means over the same rows, and tuned minus base with its 95% bootstrap interval."""
    differences = [after - before for before, after in zip(base, tuned, strict=True)]
    chance = random.Random(seed)
    means = []
    for _ in range(RESAMPLES):
        means.append(statistics.fmean(chance.choices(differences, k=len(differences))))
    cuts = statistics.quantiles(means, n=40)
    return {
        "base": round(statistics.fmean(base), 4),
        "tuned": round(statistics.fmean(tuned), 4),
        "difference": round(statistics.fmean(differences), 4),
        "low": round(cuts[0], 4),
        "high": round(cuts[-1], 4),
    }


def build_report(
    base: Measures,
    tuned: Measures,
    pairs: list[dict[str, Any]],
    problems: list[dict[str, Any]],
    rows: int,
    seed: int,
) -> dict[str, Any]:
    """Compares measures of rows with those of answers to them and to reasoning problems."""
    sides = {"base": dict(base), "tuned": dict(tuned)}
    for side, measures in sides.items():
        for pair in pairs:
            for name, value in measure(pair[side]).items():
                measures.setdefault(name, []).append(value)
        if problems:
            measures["reasoning"] = [float(pair[side]["right"]) for pair in problems]
    compared = {}
    for name in sides["base"]:
        compared[name] = compare(sides["base"][name], sides["tuned"][name], seed)

    # All closed thoughts together, in characters, which count in every language.
    closed = [pair for pair in pairs if pair["tuned"]["closed"] and "reference_thought" in pair]
    thought = sum(len(pair["tuned"]["thought"]) for pair in closed)
    reference = sum(len(pair["reference_thought"]) for pair in closed)
    report: dict[str, Any] = {
        "verdict": verdict(compared, rows, thought < MIN_THOUGHT_SHARE * reference),
        "rows": rows,
        "answers": len(pairs),
        "problems": len(problems),
        **compared,
        "pairs": pairs + problems,
    }
    if "general_loss" in compared and compared["general_loss"]["low"] > MAX_GENERAL_LOSS_INCREASE:
        report["verdict"] += "; general text is predicted worse"
    if problems and compared["reasoning"]["high"] < 0:
        _, before, after, _ = report_rows(report)[-1]
        report["verdict"] += f"; reasoning lost: {before} problems solved before, {after} after"
    return report


def verdict(measures: dict[str, dict[str, float]], rows: int, shrunk: bool = False) -> str:
    """In words, from the intervals of an evaluation, its rows, and whether thoughts shrank.

    A model that learned the style alone has a lower loss too, but its answers depend less on their
    questions, so relevance drops.
    """
    if rows < MIN_ROWS:
        return f"can't tell: at least {MIN_ROWS} rows are needed, not {rows}"
    if "accuracy" in measures:
        accuracy, unread = measures["accuracy"], measures["unread"]
        if accuracy["low"] <= 0 <= accuracy["high"]:
            return "can't tell: the 95% interval of the change in accuracy includes 0"
        said = "better: more" if accuracy["low"] > 0 else "worse: fewer"
        said += " answers are correct"
        if unread["low"] > 0:
            said += "; more could not be read"
        if unread["high"] < 0:
            said += "; fewer could not be read"
        return said
    if measures["loss"]["low"] > 0:
        return "worse: held-out loss increased"
    if measures["relevance"]["high"] < 0:
        return "worse: answers are less specific to their questions"
    if measures["loss"]["high"] >= 0:
        return "can't tell: the 95% interval of the change in loss includes 0"
    but = "can't tell: held-out loss decreased, but"
    if "closed" in measures and measures["closed"]["high"] < 0:
        return f"{but} fewer thoughts were closed within --max-new-tokens"
    if "closed" in measures and not measures["closed"]["tuned"]:
        return f"{but} no thought was closed within --max-new-tokens"
    if shrunk:
        return f"{but} thoughts are much shorter than the rows' own"
    return "better: held-out loss decreased; answers remain question-specific"


def report_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The reported measures under `REPORT_HEADINGS`; a change is that of the printed numbers."""
    units = {"loss": (1, 3, ""), "relevance": (1, 3, ""), "accuracy": (100, 1, "%")}
    units["reasoning"] = (report["problems"], 0, f" of {report['problems']}")
    rows = []
    for name, label in REPORTED.items():
        if name in report:
            scale, digits, unit = units.get(name, (100, 0, "%"))
            value = {}
            for key, number in report[name].items():
                value[key] = round(number * scale, digits) + 0.0  # no -0.0
            change = f"{value['tuned'] - value['base']:+.{digits}f}"
            interval = f"{value['low']:+.{digits}f} to {value['high']:+.{digits}f}"
            before = f"{value['base']:.{digits}f}{unit}"
            after = f"{value['tuned']:.{digits}f}{unit}"
            rows.append((label, before, after, f"{change} ({interval})"))
    return rows


def report_note(report: dict[str, Any]) -> str:
    """How the reported measures were taken."""
    notes = []
    if "loss" in report:
        notes.append("Loss: nats per token of thought and answer.")
        notes.append("Relevance: increase in answer loss when paired with another row's question.")
    if report["answers"]:
        notes.append(f"{report['answers']} answers: the base was asked by {report['asked_by']},")
        notes.append("the tuned model by the training prompt.")
    if "unread" in report:
        before = report["unread"]["base"] * report["answers"]
        after = report["unread"]["tuned"] * report["answers"]
        notes.append(f"No option could be read, so wrong: {before:.0f} before, {after:.0f} after.")
    return " ".join(notes)


def as_report(report: dict[str, Any]) -> str:
    """An evaluation as Markdown: the verdict first, then its measures."""
    text = f"On {report['rows']} held-out rows: **{report['verdict']}**.\n\n"
    for row in (REPORT_HEADINGS, ["---"] * len(REPORT_HEADINGS), *report_rows(report)):
        text += f"| {' | '.join(row)} |\n"
    return f"{text}\n{report_note(report)}\n"


def how_it_ended(answer: dict[str, Any]) -> str:
    """In words, of an answer that `generate` made."""
    thought = "thought closed" if answer["closed"] else "no thought"
    if not answer["closed"] and not answer["answer"]:
        thought = f"no answer: {THINK_CLOSE} not generated"
    return f"{thought}, {'EOS' if answer['finish_reason'] == 'stop' else 'hit the token limit'}"


def fold(text: str) -> str:
    """The text with what is repeated three times in a row, or more, written once and counted."""

    def once(match: re.Match[str]) -> str:
        said, space = match.groups()
        times = (len(match[0]) + len(space)) // len(said + space)  # none after the last one
        return f"{said} [{times} times]"

    # Nine characters or more, from the beginning of a word on.
    repeated = r"(?<![^\s。!?！？])(\S.{7,300}?\S)(\s*)(?:\1\2)+\1(?![a-zA-Z])"
    return re.sub(repeated, once, text, flags=re.DOTALL)


ANSWERS_PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 80rem; margin: auto; padding: 1rem; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding-right: 1rem; }
section { display: grid; gap: 1rem 2rem; overflow-wrap: anywhere;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
pre, h2 { font: inherit; white-space: pre-wrap; margin: 0; }
h2 { font-weight: bold; border-top: 1px solid #999; margin-top: 1.5rem; padding-top: 1rem; }
h3, summary, p { font-size: 0.9rem; color: #555; }
</style>
<h1>$verdict</h1>
<table>$details</table>
<h3>On $rows rows</h3>
<table>$measures</table>
<p>$note Nothing here is medical advice.</p>
<button onclick="document.querySelectorAll('details').forEach(item => item.open = true)">
expand all</button>
$answers
</html>
""")


def as_html(report: dict[str, Any], details: dict[str, str]) -> str:
    """A page with the report and all answers side by side; `details` name run, model, settings."""
    tables = []
    for rows in (details.items(), [REPORT_HEADINGS, *report_rows(report)]):
        table = ""
        for heading, *cells in rows:
            table += f"\n<tr><th>{html.escape(heading)}"
            for cell in cells:
                table += f"<td>{html.escape(cell)}"
        tables.append(table)
    answers = ""
    for pair in report["pairs"]:
        answers += f"<h2>{html.escape(pair['question'])}</h2>\n<section>\n"
        for side, title in SIDES.items():
            thought = html.escape(fold(pair[side]["thought"]))
            answers += f"<div><h3>{title}: {html.escape(how_it_ended(pair[side]))}</h3>"
            answers += f"<pre>{html.escape(fold(pair[side]['answer']))}</pre>"
            if thought:
                answers += f"<details><summary>thought</summary><pre>{thought}</pre></details>"
            answers += "</div>\n"
        answers += f"<div><h3>Reference</h3><pre>{html.escape(pair['reference'])}</pre></div>"
        answers += "</section>\n"
    return ANSWERS_PAGE.substitute(
        title=html.escape(details["run"]),
        verdict=html.escape(report["verdict"].capitalize()),
        details=tables[0],
        rows=report["rows"],
        measures=tables[1],
        note=html.escape(report_note(report)),
        answers=answers,
    )


def as_markdown(pair: dict[str, Any]) -> str:
    """A question with both answers, for the model card."""
    text = f"**Question.** {as_text(pair['question'])}\n"
    for side, title in SIDES.items():
        text += f"\n**{title}** ({as_text(how_it_ended(pair[side]))}).\n\n"
        for line in fold(pair[side]["answer"] or pair[side]["thought"]).splitlines():
            text += f"> {as_text(line)}  \n"  # two spaces keep the line's end
    return text


def as_text(line: str) -> str:
    """Markdown that shows a line as it is: no mark in it is taken for markup or HTML."""
    markup = r"[\\`*_\[\]<&|~$]|^[-+=#>]|(?<=\d)[.)](?!\S)"
    return re.sub(markup, r"\\\g<0>", " ".join(line.split()))


def same_question(question: str) -> str:
    """Equal for questions that differ in case, spacing and punctuation only, but in no number."""
    text = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    # Kept are signs of mathematics and what stands within a number, such as 1.5 or 120/80.
    plain = re.sub(r"(?<!\d)[^\w<=>+±%]+|[^\w<=>+±%]+(?!\d)", "", text)
    return plain or text
