"""The prompt: one template for training, inference, evaluation and Ollama. Standard library only.

A row is prompt (ends in "<think>\\n") + thought + "\\n</think>\\n" + answer + EOS. The prompts are the
published recipe's byte for byte. Records are read and answers graded here too."""

import ast
import contextlib
import json
import random
import re
import string
import textwrap
import unicodedata
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any, Literal, NamedTuple

Lang = Literal["en", "zh"]


def read_data(name: str) -> str:
    """The text of a file in data/."""
    return (Path(__file__).parent / "data" / name).read_text(encoding="utf-8")


THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
TEMPLATES: dict[Lang, str] = {"en": read_data("prompt_en.txt"), "zh": read_data("prompt_zh.txt")}
# Asked before and after training: the recipe's question.
BEFORE_AFTER = {"en": read_data("question_en.txt"), "zh": read_data("question_zh.txt")}
# Earlier answers lose their thoughts. There is no `generation` tag, which stops minijinja (issue
# 815), and neither word of "tools" and "tool_call", by which Ollama finds support for them.
CHAT_TEMPLATE = read_data("chat_template.jinja")
# Go's text/template can't search or trim: the first three templates call themselves with a byte
# less; "answer" takes a content twice, with a NUL between.
OLLAMA_TEMPLATE = read_data("ollama_template.gotmpl")
MODEL_CARD = read_data("model_card.md")
HTML_PAGE = read_data("eval.html")


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


def build_prompt(question: str, lang: Lang = "en") -> str:
    """The text before the thought; the same bytes in training and at inference."""
    return TEMPLATES[lang].replace("{question}", question.strip())


def build_example(question: str, thought: str, answer: str, eos: str, lang: Lang = "en") -> str:
    """One training row; without answer and EOS, all before them."""
    return f"{build_prompt(question, lang)}{thought.strip()}\n{THINK_CLOSE}\n{answer.strip()}{eos}"


def fill_template(template: str, lang: Lang, **parts: Any) -> str:
    """Puts the parts of the training prompt, and `parts`, in place of their names."""
    head, response = TEMPLATES[lang].removesuffix(f"{THINK_OPEN}\n").split("{question}")
    instruction, heading, title = head.rpartition("\n\n### ")
    parts.update(INSTRUCTION=instruction, QUESTION=heading + title, RESPONSE=response)
    for name, part in parts.items():
        template = template.replace(name, json.dumps(part, ensure_ascii=False))
    return template


def build_ollama_files(eos: str, parameters: dict[str, Any], lang: Lang, weights: str) -> Any:
    """A Modelfile, and files without which the Hub takes the prompt for Alpaca's."""
    template = fill_template(OLLAMA_TEMPLATE, lang, EOS=eos)
    modelfile = f'FROM {weights}\nTEMPLATE """{template}"""\nPARAMETER stop "{eos}"\n'
    for name, value in parameters.items():
        modelfile += f"PARAMETER {name} {value}\n"
    params = json.dumps({"stop": [eos], **parameters}, ensure_ascii=False)
    return {"template": template, "params": params, "Modelfile": modelfile}


def split_response(text: str, thinks: bool = True) -> tuple[str, str, bool]:
    """Thought, answer, and whether the thought was closed; a prompt that `thinks` opens one."""
    thought, tag, answer = text.strip().removeprefix(THINK_OPEN).partition(THINK_CLOSE)
    if not tag and not thinks:
        thought, answer = "", thought
    return thought.strip(), answer.strip(), bool(tag)


def find_marker(text: str, special_tokens: Sequence[str] = ()) -> str | None:
    """A thought's tag or a special token in a text, which could forge a row's structure."""
    tag = re.search(f"{THOUGHT_OPEN}|{THOUGHT_CLOSE}", text)
    found = [tag[0]] if tag else [token for token in special_tokens if token in text]
    return found[0] if found else None


ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai"), "assistant")
MISSING = "nan none null nil na undefined missing notavailable notapplicable".split()  # letters
THOUGHT_OPEN = r"(?i:<(?:think|thinking|thought|reasoning)>|<\|begin_of_thought\|>|\[think\])"
THOUGHT_CLOSE = r"(?i:</(?:think|thinking|thought|reasoning)>|<\|end_of_thought\|>|\[/think\])"
SUSPICIOUS = {
    "carriage returns (made line feeds)": "\r",
    "invisible characters": "[\0-\x08\v\f\x0e-\x1f\x7f-\xa0\xad\u200b-\u200f\u2028-\u202e\ufeff]",
    "characters of a wrong encoding": "\ufffd|[ÂÃ][\x80-\xbf]|â€",
    "markup": r"(?i)&#?\w{2,8};|</?[a-z]{1,6}\d?( [^>]*)?/?>|\\[nrt](?![a-z])|<\|\w+\|>|\[/?INST\]",
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
        raise ValueError(f"{column} is missing")
    if isinstance(value, list) and (len(value) == 1 or all(isinstance(v, dict) for v in value)):
        return "\n".join(read_text(part, column) for part in value)
    if isinstance(value, dict):
        text = value.get("content") or value.get("value") or value.get("text") or ""
        thought = value.get("reasoning_content") or value.get("reasoning") or value.get("thinking")
        if value.get("type") == "reasoning":
            thought = thought or text
            text = ""
        if thought:
            thought = read_text(thought, column)
            return f"{THINK_OPEN}{thought}{THINK_CLOSE}{read_text(text, column)}"
        if text:
            return read_text(text, column)
    raise ValueError(f"{column} has no single text ({type(value).__name__})")


def read_record(record: dict[str, Any], columns: Sequence[str], special: Sequence[str]) -> Row:
    """The texts of a record, without tokens yet, or the reason why it is dropped."""
    notes: set[str] = set()
    fields = []
    try:
        for column, role in zip(columns, ("user", "assistant", "assistant"), strict=True):
            value = record.get(column)
            messages = read_messages(value)
            if messages:
                found = messages.get(role, [])
                if not found or (role == "user" and len(found) > 1):
                    raise ValueError(f"{column} has {len(found)} {role} messages, not one")
                taught = ("user", "assistant") if columns[0] == columns[2] else (role,)
                for name in messages.keys() - taught:
                    notes.add(f"{name} message not taught")
                if len(found) > 1:
                    notes.add("earlier answer not taught")
                value = found[-1]
            fields.append(read_text(value, column))
        if columns[1] == columns[2]:  # tags divide thought and answer
            tagged = re.fullmatch(rf"(?s)\s*(?:{THOUGHT_OPEN})?(.*?){THOUGHT_CLOSE}(.*)", fields[2])
            if not tagged:
                raise ValueError(f"{columns[2]} has no thought that ends in {THINK_CLOSE}")
            fields[1] = tagged[1]
            fields[2] = re.sub(r"<\|(?:begin|end)_of_solution\|>", "", tagged[2])
        texts = []
        for column, field in zip(columns, fields, strict=True):
            for name, pattern in SUSPICIOUS.items():
                if re.search(pattern, field):
                    notes.add(f"{name} in the text")
            text = re.sub("\r\n?", "\n", field).strip()
            word = re.sub(r"[\W_]", "", text)  # of "N/A", "<NA>" or "[]"
            if word.lower() in ("", *MISSING) and word != "Na":  # which is sodium
                raise ValueError(f"a text in {column} is empty or missing")
            if find_marker(text, special):
                raise ValueError(f"{find_marker(text, special)} inside {column}")
            texts.append(text)
        if len(set(map(same_question, texts))) < 3:
            raise ValueError("two of question, thought and answer are the same")
    except ValueError as reason:
        return Row(status=str(reason))
    return Row(texts[0], texts[1], texts[2], notes=sorted(notes))


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


def encode(row: Row, tokenizer: Any, lang: Lang) -> Row:
    """Adds tokens to a row; a status other than "used" says what is wrong with them."""
    text = build_example(*row[:3], tokenizer.eos_token, lang)
    ids = tokenizer(text)["input_ids"]
    prompt = tokenizer(build_prompt(row.question, lang))["input_ids"]
    back = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    back = back.removeprefix(tokenizer.bos_token or "")
    status = "its tokens do not give its text back"
    if unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", text):  # Qwen 2 composes
        if ids[: len(prompt)] == prompt and ids[-1] == tokenizer.eos_token_id:
            status = "used"
    return Row(*row[:3], status, row.notes, ids, len(prompt), len(ids))


def shorten(row: Row, tokenizer: Any, lang: Lang, limit: int) -> Row:
    """Cuts the thought at a sentence, so that the row has at most `limit` tokens."""
    thought = row.thought
    tokens = tokenizer(thought, add_special_tokens=False, return_offsets_mapping=True)
    keep = len(tokens["input_ids"])
    while row.tokens > limit:  # again, where the tokens around the cut came out as more
        keep = max(0, keep - row.tokens + limit)
        start = thought[: tokens["offset_mapping"][keep][0]]
        sentences = re.match(r"(?s).*(?:[.](?=\s)|[。!?！？\n])", start)
        if not sentences:
            return row._replace(status="no sentence of the thought fits in --max-seq-length")
        row = encode(row._replace(thought=sentences[0].strip()), tokenizer, lang)
    return row._replace(status="shortened")


# ---------------------------------------------------------------------------------- multiple choice
# Reads records, and which option an answer settles on; what is unclear is refused or unread.
# Published benchmark figures are left to lm-evaluation-harness.

# Columns of options and key: MedQA's, MMLU's, MedMCQA's.
CHOICES = [("options", "answer_idx"), ("options", "answer"), ("choices", "answer"), ("opa", "cop")]


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
        options = [record.get("opa"), record.get("opb"), record.get("opc"), record.get("opd")]
    if isinstance(options, list) and None not in options:
        options = dict(enumerate(options))
    if not isinstance(options, dict) or len(options) > 26:
        return {}
    named = {}
    for letter, (name, text) in zip(string.ascii_uppercase, options.items(), strict=False):
        if isinstance(text, dict):
            name = text.get("key")
            text = text.get("text") or text.get("value")
        name = option_name(name)
        if isinstance(text, str | int | float):
            named[name if re.fullmatch("[A-Z]", name) else letter] = str(text).strip()
        elif text is not None:  # `datasets` fills in None for other records' names
            return {}
    different = set(named.values()) - {""}
    return named if 2 <= len(different) == len(named) else {}


def read_multiple_choice(records: Sequence[Any], columns: Sequence[str]) -> tuple[Any, Any]:
    """Questions and keys by position, and reasons where there is none; ValueError if ambiguous.

    Numbers as keys count from 0 if one is 0, from 1 if one is the number of its options.
    """
    parsed = []
    starts = set()
    for record in records:
        stem = str(record.get("question") or record.get("Question") or "").strip()
        options = read_options(record, columns[0])
        key = record.get(columns[1])
        parsed.append((stem, options, key))
        if options and option_name(key).isdecimal() and key not in options.values():
            starts.add({0: 0, len(options): 1}.get(int(option_name(key))))
    start = 1 if 1 in starts else 0
    if starts and len(starts - {None}) != 1:
        raise ValueError(f"{columns[1]} has numbers, which may count from 0 or from 1")
    choices = {}
    reasons = {}
    for position, (stem, options, key) in enumerate(parsed):
        question = stem
        fits = []
        for letter, option in options.items():
            question += f"\n{letter}. {option}"
            number = str(string.ascii_uppercase.index(letter) + start)
            if option_name(key) in (letter, number) or key == option:
                fits.append(letter)
        if not options or not stem:
            reasons[position] = f"no question, or not 2 to 26 different texts in {columns[0]}"
        elif len(fits) != 1:
            reasons[position] = f"{columns[1]} {key!r} fits {len(fits)} of {options}"
        else:
            question += "\nSay which option is right."
            choices[position] = dict(
                question=question, stem=stem, options=options, reference=fits[0]
            )
    return choices, reasons


# An option is its letter, or «C» where its text was; "A man", "C. difficile" and "C or D" are none.
LETTER = r"\b([B-HJ-Z]|[AI](?! (?!is)[a-z]))\b"
OPTION = rf"(?i:option |choice |选项)?«?{LETTER}»?(?!-|[.] | or | and |[、和或])"
RIGHT = r"[^«]{0,60}?(?:right|correct|best|answer|most|正确|答案|最)"
CLAIMS = (  # the clearer first: "the best answer is (C)", "I would choose C", "C is right", "C"
    r"(?:\b(?i:answer|option|choice|diagnosis|treatment|one)\b|答案|选项|最)[^«]{0,60}?"
    r"(?:\b(?i:is|be)\b|:|为|是|选) ?" + OPTION,
    r"(?i:\b(?:choose|chose|pick|with|for|it's|it is|so|therefore) |选择?)" + OPTION,
    r"(?i:^ ?|\b(?:that|but|so) |所以)" + OPTION + RIGHT,
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
    """The letter that an answer settles on, by the first of `CLAIMS` in it; None if unread."""
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
# What an evaluation says, on terminal, card and page: the verdict, then what changed, with 95%
# intervals. A damaged training must never be called better.

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
in answer loss when paired with another row's question. Reasoning: 24 problems."""


def last_number(answer: str) -> float | None:
    """The last number in an answer, without thousands separators."""
    text = re.sub(r"(?<=\d)(,|\{,\}|\\,)(?=\d{3}(?!\d))", "", answer.replace("−", "-"))
    found = re.findall(r"(?<![A-Za-z\d^])-?\d+(?:\.\d+)?", text)
    return float(found[-1]) if found else None


def compare(base: Sequence[float], tuned: Sequence[float], seed: int) -> dict[str, float]:
    """Means over the same rows, and their difference with its 95% bootstrap interval."""
    changes = [after - before for before, after in zip(base, tuned, strict=True)]
    chance = random.Random(seed)
    means = [fmean(chance.choices(changes, k=len(changes))) for _ in range(2000)]
    low, *_, high = quantiles(means, n=40)
    return dict(base=fmean(base), tuned=fmean(tuned), difference=fmean(changes), low=low, high=high)


def build_report(losses: dict[str, Any], pairs: list[Any], rows: int, seed: int) -> dict[str, Any]:
    """Compares base and tuned by losses and by what is measured in answers."""
    report: dict[str, Any] = {"verdict": "", "rows": rows, "answers": len(pairs)}
    for name in (*REPORTED, "answer_loss", "general_loss", "thought_length"):
        base = list(losses["base"].get(name, ()))
        tuned = list(losses["tuned"].get(name, ()))
        for pair in pairs:
            if name in pair["base"] and (name == "reasoning" or "reasoning" not in pair["base"]):
                base.append(pair["base"][name])
                tuned.append(pair["tuned"][name])
        if base:
            report[name] = compare(base, tuned, seed)
    report["verdict"] = verdict(report)
    if "general_loss" in report and report["general_loss"]["low"] > MAX_GENERAL_LOSS_INCREASE:
        report["verdict"] += "; general text is predicted worse"
    if "reasoning" in report and report["reasoning"]["high"] < 0:
        report["verdict"] += "; reasoning lost: fewer problems solved"
    report["pairs"] = pairs
    return report


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
    if "thought_length" in report:
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
        text += f"\nReasoning kept: {24 * report['reasoning']['tuned']:.0f} of 24, "
        text += f"before {24 * report['reasoning']['base']:.0f}.\n"
    return f"{text}\n{REPORT_NOTE}\n"


def how_it_ended(answer: dict[str, Any]) -> str:
    """How an answer ended, in words."""
    end = "EOS" if answer["finish_reason"] == "stop" else "hit the token limit"
    if not answer["closed"] and not answer["answer"]:
        return f"no answer: {THINK_CLOSE} not generated, {end}"
    return f"{'thought closed' if answer['closed'] else 'no thought'}, {end}"


def as_html(title: str, settings: str, report: dict[str, Any]) -> str:
    """A page with the report and all answers side by side, their thoughts closed."""
    verdict, table, note = escape(as_report(report)).split("\n\n", 2)
    rows = ""
    for line in table.splitlines():
        if line.startswith("| "):
            rows += "<tr>" + line.rstrip("|").replace("| ", "<td>") + "\n"
    head = {"title": escape(title), "settings": escape(settings), "verdict": verdict}
    page = HTML_PAGE.format(**head, table=rows, note=note)
    for pair in report["pairs"]:
        page += f"<h2>{escape(pair['question'])}</h2>\n<section>"
        for side, name in SIDES.items():
            answer = pair[side]
            page += f"<div><h3>{name}: {escape(how_it_ended(answer))}</h3><details>"
            page += f"<summary>thought</summary><pre>{escape(answer['thought'])}</pre>"
            page += f"</details><pre>{escape(answer['answer'])}</pre></div>\n"
        page += f"<div><h3>Reference</h3><pre>{escape(pair['reference'])}</pre></div></section>\n"
    return page


def as_markdown(pair: dict[str, Any]) -> str:
    """A question with both answers for the card, in which no mark is markup."""
    text = textwrap.fill(f"Question: {pair['question']}", 90) + "\n"
    for side, title in SIDES.items():
        text += f"\n{title} ({how_it_ended(pair[side])}):\n"
        for line in (pair[side]["answer"] or pair[side]["thought"]).splitlines():
            text += textwrap.fill(line, 90) + "\n"
    return "## Before and after\n\n```text\n" + text.replace("```", "'''") + "```\n"
