"""The prompt: one template for training, inference, evaluation and the Modelfile. Standard library only.

A row of training text is

    prompt (ends in "<think>\\n") + thought + "\\n</think>\\n" + answer + EOS

The templates are those of the published recipe byte for byte, trailing spaces included: models published from
the recipe were trained on these bytes. What becomes of a record, as text and as tokens of the tokenizer it is
given, is decided here too, and what an answer is worth.
"""

import ast
import contextlib
import json
import random
import re
import statistics
import string
import textwrap
import unicodedata
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

Lang = Literal["en", "zh"]


def read_template(name: str) -> str:
    """The text of a file in data/."""
    return (Path(__file__).parent / "data" / name).read_text(encoding="utf-8")


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
CHAT_TEMPLATE = read_template("chat_template.jinja")

# For Ollama. As Go's text/template can't search or trim, the first three templates call themselves
# with a byte less; "answer" takes a content twice, with a NUL between.
OLLAMA_TEMPLATE = read_template("ollama_template.gotmpl")

# The model card.
WHERE_WEIGHTS = "Merged 16-bit weights are at the root, the LoRA adapter is in `adapter/`."
WHERE_ADAPTER = "This is the LoRA adapter alone; `pip install peft` to use it."
MODEL_CARD = read_template("model_card.md")


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


def build_ollama_files(eos: str, parameters: dict[str, Any], lang: Lang, weights: str) -> dict:
    """A Modelfile, and files without which the Hub takes the prompt for Alpaca's."""
    template = fill_template(OLLAMA_TEMPLATE, lang, eos)
    modelfile = f'FROM {weights}\nTEMPLATE """{template}"""\nPARAMETER stop "{eos}"\n'
    for name, value in parameters.items():
        modelfile += f"PARAMETER {name} {value}\n"
    params = json.dumps({"stop": [eos], **parameters}, ensure_ascii=False)
    return {"template": template, "params": params, "Modelfile": modelfile}


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

SIDES = {"base": "Before", "tuned": "After"}
MIN_ROWS = 8  # for a verdict
MIN_THOUGHT_LENGTH = 0.25  # of the rows' own thoughts
MAX_GENERAL_LOSS_INCREASE = 0.1  # nats per token
# Reported in this order, in this format; eval.json has a little more.
REPORTED = {
    "loss": ("held-out loss", ".3f"),
    "relevance": ("relevance", ".3f"),
    "accuracy": ("accuracy", ".1%"),
    "unread": ("no option read", ".1%"),
    "closed": ("thoughts closed", ".0%"),
    "stopped": ("finished by itself", ".0%"),
    "reasoning": ("reasoning kept", ".0%"),
}
REPORT_NOTE = """\
Loss: nats per token of thought and answer, lower is better. Relevance: increase
in answer loss when paired with another row's question. Reasoning: 24 problems.
The base is asked by its own chat template if it has one."""


HTML_PAGE = read_template("eval.html")


def last_number(answer: str) -> float | None:
    """The last number in an answer, without thousands separators."""
    text = re.sub(r"(?<=\d)(,|\{,\}|\\,)(?=\d{3}(?!\d))", "", answer.replace("−", "-"))
    found = re.findall(r"(?<![A-Za-z\d^])-?\d+(?:\.\d+)?", text)
    return float(found[-1]) if found else None


def compare(base: Sequence[float], tuned: Sequence[float], seed: int) -> dict[str, float]:
    """Means over the same rows, and their difference with its 95% bootstrap interval."""
    changes = [after - before for before, after in zip(base, tuned, strict=True)]
    chance = random.Random(seed)
    means = [statistics.fmean(chance.choices(changes, k=len(changes))) for _ in range(2000)]
    cuts = statistics.quantiles(means, n=40)
    return {
        "base": statistics.fmean(base),
        "tuned": statistics.fmean(tuned),
        "difference": statistics.fmean(changes),
        "low": cuts[0],
        "high": cuts[-1],
    }


def build_report(losses: dict[str, Any], pairs: list[Any], rows: int, seed: int) -> dict[str, Any]:
    """Compares base and tuned by losses and by what is measured in answers."""
    report: dict[str, Any] = {"verdict": "", "rows": rows, "answers": len(pairs)}
    for name in (*REPORTED, "answer_loss", "general_loss", "thought_length"):
        answered = [pair for pair in pairs if name in pair["base"]]
        base = losses["base"].get(name) or [pair["base"][name] for pair in answered]
        tuned = losses["tuned"].get(name) or [pair["tuned"][name] for pair in answered]
        if base:
            report[name] = compare(base, tuned, seed)
    said = verdict(report)
    if "general_loss" in report and report["general_loss"]["low"] > MAX_GENERAL_LOSS_INCREASE:
        said += "; general text is predicted worse"
    if "reasoning" in report and report["reasoning"]["high"] < 0:
        said += "; reasoning lost: fewer problems solved"
    return {**report, "verdict": said, "pairs": pairs}


def verdict(report: dict[str, Any]) -> str:
    """In words, by the intervals; style alone lowers the loss, but relevance too."""
    if report["rows"] < MIN_ROWS:
        return f"can't tell: at least {MIN_ROWS} rows are needed, not {report['rows']}"
    if "relevance" in report and report["relevance"]["high"] < 0:
        return "worse: answers are less specific to their questions"
    name = "accuracy" if "accuracy" in report else "loss"
    change = report[name]
    if change["low"] <= 0 <= change["high"]:
        return f"can't tell: the 95% interval of the change in {name} includes 0"
    if name == "accuracy":
        outcome = "better: more" if change["low"] > 0 else "worse: fewer"
        return f"{outcome} answers are correct"
    if change["low"] > 0:
        return "worse: held-out loss increased"
    if report["answers"]:
        short = report["thought_length"]["tuned"] < MIN_THOUGHT_LENGTH
        if short or report["closed"]["high"] < 0:
            return "can't tell: held-out loss decreased, but thoughts are unclosed or too short"
    return "better: held-out loss decreased; answers remain question-specific"


def as_report(report: dict[str, Any]) -> str:
    """Markdown of 80 columns, the verdict first."""
    text = f"""On {report["rows"]} held-out rows: {report["verdict"]}.

| measure            | before |  after | change (95% interval) |
|--------------------|-------:|-------:|-----------------------|
"""
    for name, (label, style) in REPORTED.items():
        if name in report:
            value = report[name]
            text += f"| {label:18} | {value['base']:z6{style}} | {value['tuned']:z6{style}} | "
            text += f"{value['difference']:+z{style}} "
            text += f"({value['low']:+z{style}} to {value['high']:+z{style}}) |\n"
    if "reasoning" in report:
        before, after = (round(24 * report["reasoning"][side]) for side in ("base", "tuned"))
        text += f"\nReasoning kept: {after} of 24, before {before}.\n"
    return f"{text}\n{REPORT_NOTE}\n"


def how_it_ended(answer: dict[str, Any]) -> str:
    """How an answer ended, in words."""
    end = "EOS" if answer["finish_reason"] == "stop" else "hit the token limit"
    if answer["closed"]:
        return f"thought closed, {end}"
    if answer["answer"]:
        return f"no thought, {end}"
    return f"no answer: {THINK_CLOSE} not generated, {end}"


def fold(text: str) -> str:
    """What is repeated three times or more is written once."""
    repeated = r"(?s)(?<![^\s。])(\S.{8,300}?)\1{2,}"
    return re.sub(repeated, lambda said: f"{said[1]}[{len(said[0]) // len(said[1])} times] ", text)


def as_html(title: str, settings: str, report: dict[str, Any]) -> str:
    """A page with the report and all answers side by side; thoughts are folded."""
    rows = []
    for line in as_report(report).splitlines():
        if line.startswith("| "):
            cells = line.strip("| ").split("|")
            rows.append("<tr><td>" + "<td>".join(escape(cell.strip()) for cell in cells))
    page = HTML_PAGE.format(
        title=escape(title),
        settings=escape(settings),
        verdict=escape(f"{report['rows']} held-out rows: {report['verdict']}."),
        table="\n".join(rows),
        note=escape(REPORT_NOTE),
    )
    for pair in report["pairs"]:
        page += f"<h2>{escape(pair['question'])}</h2>\n<section>"
        for side, name in SIDES.items():
            answer = pair[side]
            thought = escape(fold(answer["thought"]))
            page += f"<div><h3>{name}: {escape(how_it_ended(answer))}</h3>"
            page += f"<details><summary>thought</summary><pre>{thought}</pre></details>"
            page += f"<pre>{escape(fold(answer['answer']))}</pre></div>\n"
        page += f"<div><h3>Reference</h3><pre>{escape(pair['reference'])}</pre></div></section>\n"
    return page


def as_markdown(pair: dict[str, Any]) -> str:
    """A question with both answers for the card, in which no mark is markup."""
    lines = ["Question: " + pair["question"]]
    for side, title in SIDES.items():
        lines += ["", f"{title} ({how_it_ended(pair[side])}):"]
        lines += fold(pair[side]["answer"] or pair[side]["thought"]).splitlines()
    text = "\n".join(textwrap.fill(line, 90) for line in lines)
    return "```text\n" + text.replace("```", "'''") + "\n```\n"
