"""The prompt: one template for training, inference, evaluation and the Modelfile. Standard library only.

A row of training text is

    prompt (ends in "<think>\\n") + thought + "\\n</think>\\n" + answer + EOS

The templates are those of the published recipe byte for byte, trailing spaces included: models published from
the recipe were trained on these bytes. What becomes of a record, as text and as tokens of the tokenizer it is
given, is decided here too, and what an answer is worth.
"""

import ast
import contextlib
import html
import json
import random
import re
import statistics
import string
import unicodedata
from collections.abc import Sequence
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


# A conversation as clients render it (Jinja); earlier answers lose their thoughts. Other engines fail
# on a `generation` tag (minijinja issue 815), and Ollama takes the words "tools" and "tool_call" in
# it for support of them.
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
{%- set state = namespace(gap='\\n', open=false) %}
{{- BOS + INSTRUCTION }}
{%- for message in messages if message.role in ['system', 'developer'] %}
  {%- set said = text(message.content) | trim %}
  {%- if said %}
    {{- state.gap + said }}
    {%- set state.gap = '\\n\\n' %}
  {%- endif %}
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
      {%- set state.open = true %}
    {%- else %}
      {{- '<think>\\n' + thought | trim + '\\n</think>\\n' + answer }}
    {%- endif %}
  {%- elif message.role not in ['system', 'developer'] %}
    {{- raise_exception('This model knows system, user and assistant, not ' + message.role + '.') }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not state.open %}
  {{- RESPONSE + '<think>\\n' }}
{%- endif -%}
"""

# The same for Ollama. Go's text/template can't search or trim, so the first three templates call
# themselves with a byte less; "answer" takes a content twice, with a NUL between. The text around
# .Thinking tells Ollama the tags.
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

# Lines on the card that make `chat`, from merged weights or from the adapter alone.
CHAT_BY_WEIGHTS = """\
from transformers import pipeline

chat = pipeline("text-generation", "{repo}", dtype="auto", device_map="auto")"""
CHAT_BY_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForCausalLM.from_pretrained("{repo}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
chat = pipeline("text-generation", model, tokenizer=tokenizer)"""
WHERE_WEIGHTS = "Merged 16-bit weights are at the root, the LoRA adapter is in `adapter/`."
WHERE_ADAPTER = "This is the LoRA adapter alone, for `{base}`."

# The model card of a run, of its merged weights and of a repository.
MODEL_CARD = """---
{metadata}
---
# {base}, fine-tuned {again}on medical chains of thought

{evaluation}
## Before and after

{sample}
## Use

{where} The chat template is the prompt that the model was trained on, so ask it by chat messages. It
thinks first; its answer follows `</think>`.

```python
{chat}
messages = [{{"role": "user", "content": "What widens the anion gap?"}}]
print(chat(messages, max_new_tokens={tokens})[0]["generated_text"][-1]["content"])
```

On a server (a GGUF file is downloaded first):

```
{serve}
```

## Limits

For study, not a medical device: what it says can be wrong, and nobody's health should be decided by it. It was
tuned on few rows and knows what its base model knows; a fluent thought does not make an answer right.

## Training and evaluation

![training loss](loss.png)

```json
{numbers}
```
"""


class Row(NamedTuple):
    """A record as it is taught; the first `prompt_tokens` of its `input_ids` are the prompt's."""

    question: str = ""
    thought: str = ""
    answer: str = ""
    status: str = "used"  # or "shortened", or the reason why it is dropped
    notes: Sequence[str] = ()  # what of the record is not taught, and what looks damaged
    input_ids: Sequence[int] = ()
    prompt_tokens: int = 0
    tokens: int = 0


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
    """`has_bos` says whether a text begins with BOS."""
    return fill_template(CHAT_TEMPLATE, lang).replace("BOS", "bos_token" if has_bos else "''")


def fill_template(template: str, lang: Lang, eos: str = "") -> str:
    """Put the parts of the training prompt in place of their names."""
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


def find_marker(text: str, special_tokens: Sequence[str] = ()) -> str | None:
    """A think tag or special token in a text, which could forge a row's structure."""
    for marker in (THINK_OPEN, THINK_CLOSE, *special_tokens):
        if marker in text:
            return marker
    return None


ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant"}
MISSING = "nan none null nil na n/a n.a <na> #n/a undefined missing - ?".split()
THOUGHT_OPEN = r"(?i:<(?:think|thinking|thought|reasoning)>|<\|begin_of_thought\|>|\[think\])"
THOUGHT_CLOSE = r"(?i:</(?:think|thinking|thought|reasoning)>|<\|end_of_thought\|>|\[/think\])"
SUSPICIOUS = {
    "carriage returns (made line feeds)": "\r",
    "invisible characters": "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\xa0\xad\u200b-\u200f\u2028-\u202e\ufeff]",
    "characters of a wrong encoding": "\ufffd|[ÂÃ][\x80-\xbf]|â€",
    "markup": r"&#?\w{2,8};|</?[a-zA-Z]{1,6}\d?( [^<>]*)?/?>|\\[nrt](?![a-zA-Z])|<\|\w+\|>|\[/?INST\]",
}


def read_messages(value: Any) -> dict[str, list[Any]]:
    """The messages of a conversation by role; empty for all else."""
    if isinstance(value, str) and re.search("""["'](role|from)["']:""", value):
        value = parse_text(value)
    messages: dict[str, list[Any]] = {}
    for message in value if isinstance(value, list) else [value]:
        role = isinstance(message, dict) and (message.get("role") or message.get("from"))
        if not isinstance(role, str):
            return {}
        role = role.strip().lower()
        messages.setdefault(ROLES.get(role, role), []).append(message)
    return messages


def read_text(value: Any, column: str) -> str:
    """The text of a field, a message or its parts; a thought that is marked as one gets tags."""
    if isinstance(value, str):
        return value
    if value is None or value != value:  # NaN
        raise UnusableRecord(f"{column} is missing")
    if isinstance(value, list) and (len(value) == 1 or all(isinstance(v, dict) for v in value)):
        return "\n".join(read_text(part, column) for part in value)
    if isinstance(value, dict):
        text = value.get("content") or value.get("value") or value.get("text") or ""
        thought = value.get("reasoning_content") or value.get("reasoning") or value.get("thinking")
        if value.get("type") == "reasoning":
            thought, text = thought or text, ""
        if thought:
            thought = read_text(thought, column)
            return f"{THINK_OPEN}{thought}{THINK_CLOSE}{read_text(text, column)}"
        if text:
            return read_text(text, column)
    raise UnusableRecord(f"{column} has no single text ({type(value).__name__})")


def read_fields(record: dict[str, Any], columns: Sequence[str], notes: set[str]) -> list[str]:
    """Question, thought and answer; adds to `notes` what is not taught."""
    texts = []
    for column, role in zip(columns, ("user", "assistant", "assistant"), strict=True):
        value = record.get(column)
        messages = read_messages(value)
        if messages:
            found = messages.get(role, [])
            if not found or (role == "user" and len(found) > 1):
                raise UnusableRecord(f"{column} has {len(found)} {role} messages, not one")
            taught = {"user", "assistant"} if columns[0] == columns[2] else {role}
            notes.update(f"{name} message not taught" for name in messages.keys() - taught)
            if len(found) > 1:
                notes.add("earlier answer not taught")
            value = found[-1]
        texts.append(read_text(value, column))
    if columns[1] == columns[2]:  # tags divide thought and answer
        tagged = re.fullmatch(rf"(?s)\s*(?:{THOUGHT_OPEN})?(.*?){THOUGHT_CLOSE}(.*)", texts[2])
        if not tagged:
            raise UnusableRecord(f"{columns[2]} has no thought that ends in {THINK_CLOSE}")
        texts[1] = tagged[1]
        texts[2] = re.sub(r"<\|(?:begin|end)_of_solution\|>", "", tagged[2])
    return texts


def read_record(record: dict[str, Any], columns: Sequence[str], special: Sequence[str]) -> Row:
    """The texts of a record, without tokens yet, or the reason why it is dropped."""
    notes: set[str] = set()
    try:
        fields = read_fields(record, columns, notes)
        texts = [re.sub("\r\n?", "\n", text).strip() for text in fields]
        for column, text in zip(columns, texts, strict=True):
            if text.lower().rstrip(".") in ("", *MISSING) and text != "Na":  # which is sodium
                raise UnusableRecord(f"a text in {column} is empty or missing")
            tag = re.search(f"{THOUGHT_OPEN}|{THOUGHT_CLOSE}", text)
            marker = tag[0] if tag else find_marker(text, special)
            if marker:
                raise UnusableRecord(f"{marker} inside {column}")
        if len({same_question(text) for text in texts}) < 3:
            raise UnusableRecord("two of question, thought and answer are the same")
    except UnusableRecord as reason:
        return Row(status=str(reason))
    for name, pattern in SUSPICIOUS.items():
        if re.search(pattern, "\n".join(fields)):
            notes.add(f"{name} in the text")
    return Row(*texts, notes=sorted(notes))


def same_question(question: str) -> str:
    """Equal for questions that differ in case, spacing and punctuation only, but in no number."""
    text = unicodedata.normalize("NFKC", question).casefold()
    return " ".join(re.sub(r"[^\w<=>+±%]+", " ", text).split()) or text


def describe_counts(counts: dict[str, Any]) -> str:
    """The number of rows by what became of them, as a sentence."""
    text = f"{counts['read']} read, {counts['used']} to train on, {counts['held_out']} held out"
    if counts["shortened"]:
        text += f", {counts['shortened']} shortened"
    for reason, number in counts["dropped"].items():
        text += f"; {number} dropped: {reason}"
    for note, number in counts["notes"].items():
        text += f"; {number} with {note}"
    return text


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts that a tokenizer takes for special tokens."""
    return list(map(str, tokenizer.added_tokens_decoder.values()))


def encode(rows: Sequence[Row], tokenizer: Any, lang: Lang) -> list[Row]:
    """Adds tokens to rows; a status other than "used" says what is wrong with them."""
    rows = [*rows, Row()]
    texts = [build_example(*row[:3], tokenizer.eos_token, lang) for row in rows]
    encoded = tokenizer(texts)["input_ids"]
    heads = tokenizer([build_prompt(row.question, lang) for row in rows])["input_ids"]
    decoded = tokenizer.backend_tokenizer.decode_batch(encoded, skip_special_tokens=False)
    special = tokenizer.added_tokens_decoder
    structure = [token for token in encoded[-1] if token in special]  # of the empty row
    found = []
    for row, text, ids, head, back in zip(rows, texts, encoded, heads, decoded, strict=True):
        back = back.removeprefix(tokenizer.bos_token or "")
        status = "used"
        if ids[: len(head)] != head or [token for token in ids if token in special] != structure:
            status = "its tokens do not have the template's structure"
        # Qwen 2's tokenizer composes accents.
        elif unicodedata.normalize("NFC", back) != unicodedata.normalize("NFC", text):
            status = "its tokens do not give its text back"
        found.append(Row(*row[:3], status, row.notes, ids, len(head), len(ids)))
    return found[:-1]


def shorten(row: Row, tokenizer: Any, lang: Lang, limit: int) -> Row:
    """Cuts the thought at a sentence, so that the row has at most `limit` tokens."""
    tokens = tokenizer(row.thought, add_special_tokens=False, return_offsets_mapping=True)
    keep = len(tokens["input_ids"])
    shorter = row
    while shorter.tokens > limit:  # again, where the tokens around the cut came out as more
        keep = max(0, keep - shorter.tokens + limit)
        thought = row.thought[: tokens["offset_mapping"][keep][0]]
        sentences = re.match(r"(?s).*(?:[.](?=\s)|[。!?！？\n])", thought)
        if not sentences:
            return row._replace(status="no sentence of the thought fits in --max-seq-length")
        [shorter] = encode([row._replace(thought=sentences[0].strip())], tokenizer, lang)
    return shorter._replace(status="shortened")


def build_ollama_files(
    eos: str, context: int, sampling: dict[str, float], lang: Lang
) -> dict[str, str]:
    """Files to push beside a GGUF; without them the Hub takes the prompt for Alpaca's."""
    params = {"stop": [eos], "num_ctx": context, **sampling}
    return {
        "template": fill_template(OLLAMA_TEMPLATE, lang, eos),
        "params": json.dumps(params, ensure_ascii=False),
    }


def build_modelfile(
    eos: str, context: int, sampling: dict[str, float], lang: Lang, weights: str
) -> str:
    """A Modelfile for `weights` beside it; `context` is in tokens."""
    template = fill_template(OLLAMA_TEMPLATE, lang, eos)
    text = f'FROM {weights}\nTEMPLATE """{template}"""\nPARAMETER stop "{eos}"\n'
    for name, value in {"num_ctx": context, **sampling}.items():
        text += f"PARAMETER {name} {value}\n"
    return text


# ---------------------------------------------------------------------------------- multiple choice
# Reads multiple-choice records, and which option an answer settles on. Promises to refuse what is
# unclear, or to call it unread. Leaves published benchmark figures to lm-evaluation-harness.

# Of options and key: MedQA's, MMLU's, MedMCQA's.
CHOICE_COLUMNS = [("options", "answer_idx"), ("options", "answer"), ("choices", "answer")]
CHOICE_COLUMNS += [("opa", "cop")]


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


def parse_text(value: Any) -> Any:
    """The list or object that a text holds as JSON or Python, as in CSV; another value as it is."""
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError):
            return parse(value)
    return value


def read_options(record: dict[str, Any], column: str) -> dict[str, str]:
    """A record's options by letter; empty unless they are 2 to 26 different texts."""
    options = parse_text(record.get(column))
    if column == "opa":
        options = [record.get(f"op{letter}") for letter in "abcd"]
    if isinstance(options, list) and all(isinstance(each, dict) for each in options):
        options = {each.get("key"): each.get("text") or each.get("value") for each in options}
    elif isinstance(options, list):
        options = {number: "" if each is None else each for number, each in enumerate(options)}
    if not isinstance(options, dict) or len(options) > 26:
        return {}
    named = {}
    for letter, (name, text) in zip(string.ascii_uppercase, options.items(), strict=False):
        name = option_name(name)
        if isinstance(text, str | int | float):
            named[name if re.fullmatch("[A-Z]", name) else letter] = str(text).strip()
        elif text is not None:  # `datasets` fills in None for other records' names
            return {}
    different = set(named.values()) - {""}
    return named if 2 <= len(different) == len(named) else {}


def read_multiple_choice(
    records: Sequence[dict[str, Any]], columns: tuple[str, str]
) -> tuple[dict[int, MultipleChoice], dict[int, str]]:
    """Choices by position, and reasons where there is none.

    A key is a letter, a text or a number. Numbers count from 0 if one is 0, from 1 if one is the
    number of its options; ValueError if neither or both are among them.
    """
    choices = {}
    reasons = {}
    all_options = [read_options(record, columns[0]) for record in records]
    bases = set()
    for record, options in zip(records, all_options, strict=True):
        key = record.get(columns[1])
        if options and option_name(key).isdecimal() and key not in options.values():
            bases.add({0: 0, len(options): 1}.get(int(option_name(key))))
    if bases and len(bases - {None}) != 1:
        raise ValueError(f"{columns[1]} has numbers, which may count from 0 or from 1")
    for position, (record, options) in enumerate(zip(records, all_options, strict=True)):
        question = record.get("question") or record.get("Question")
        key = record.get(columns[1])
        fits = []
        for number, letter in enumerate(options, 1 if 1 in bases else 0):
            if option_name(key) in (letter, str(number)) or key == options[letter]:
                fits.append(letter)
        if not options or not isinstance(question, str) or not question.strip():
            reasons[position] = f"no question, or not 2 to 26 different texts in {columns[0]}"
        elif len(fits) != 1:
            reasons[position] = f"{columns[1]} {key!r} fits {len(fits)} of {options}"
        else:
            choices[position] = MultipleChoice(question, options, fits[0])
    return choices, reasons


# An option is its letter, or «C» where its text was; "A man", "C. difficile" and "C or D" are none.
OPTION = r"(?i:option |choice |选项)?«?\b([B-HJ-Z]|[AI](?! (?!is)[a-z]))\b»?(?!-|[.] | or | and |[、和或])"
CLAIMS = (  # the clearer first: "the best answer is (C)", "I would choose C", "C is right", "C"
    r"(?:\b(?i:answer|option|choice|diagnosis|treatment|one)\b|答案|选项|最)[^«]{0,60}?"
    r"(?:\b(?i:is|be)\b|:|为|是|选) ?" + OPTION,
    r"(?i:\b(?:choose|chose|pick|with|for|it's|it is|so|therefore) |选择?)" + OPTION,
    r"(?i:^ ?|\b(?:that|but|so) |所以)"
    + OPTION
    + r"[^«]{0,60}?(?:right|correct|best|answer|most|正确|答案|最)",
    rf"^[ >-]*{OPTION} ?$",
    r"«(.)»",
)
# What follows one of these in a clause claims nothing: "not C", "C is wrong", "不选C".
NEGATION = r"(?i:\b(?:not|neither|incorrect|wrong|unlike|rather)\b|n't|[不非错]|排除).*"


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
    for letter in sorted(options, key=lambda letter: -len(options[letter])):
        option = re.escape(plain(options[letter]).strip(" ."))
        if len(option) > 1:
            text = re.sub(rf"(?ai)(?<!\w){option}(?!\w)", f"«{letter}»", text)
    text = re.sub(r"(:|therefore,|so,)\s+", r"\1 ", text)
    clauses = re.split(r"[!?;。,\n]|[.](?! [a-z])", text)
    for pattern in CLAIMS:
        found: set[str] = set()
        for clause in clauses:
            found.update(re.findall(pattern, re.sub(NEGATION, " not", clause), re.ASCII))
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
