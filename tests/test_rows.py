"""Every row accounted for: used, shortened, dropped or held out, and nothing cut silently."""

import csv
import dataclasses
import itertools
import json
import random
import re

import pytest
from conftest import BOS, EOS, PAD, SAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from servers.hub import HubServer

import finetune_r1
import prompts
from finetune_r1 import DataConfig, Row, UserError, prepare_rows, read_dataset
from prompts import build_prompt

GOOD = {"Question": "Why?", "Complex_CoT": "First this. Then that. At last the rest.", "Response": "So."}
COLUMNS = list(GOOD)


def records(*changes):
    return [{**GOOD, "Question": f"Why {i}?", **change} for i, change in enumerate(changes)]


def account(rows, tokenizer, **options):
    return prepare_rows(rows, tokenizer, DataConfig(**options)).account()


# ------------------------------------------------------------------------------------------------------- the accounting


def test_the_bundled_rows_are_as_promised():
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    assert len(rows) >= 64 and all(list(row) == COLUMNS for row in rows)
    assert len({prompts.same_question(row["Question"]) for row in rows}) == len(rows)
    assert all(60 <= len(row["Complex_CoT"].split()) <= 150 and "\n" not in row["Response"] for row in rows)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Complex_CoT": " "}, "Complex_CoT is empty, or no text"),
        ({"Response": None}, "Response is empty, or no text"),
        ({"Question": 7}, "Question is empty, or no text"),
        ({"Question": {"nested": "Why?"}}, "Question is empty, or no text"),
        ({"Response": "half a pair \ud83d"}, "\\ud83d inside Response"),
        ({"Complex_CoT": "Hm </think> ha"}, "</think> inside Complex_CoT"),
        ({"Response": f"So.{EOS}"}, f"{EOS} inside Response"),
        ({"Question": "Why <｜User｜>?"}, "<｜User｜> inside Question"),
        ({"Question": " WHY   0? "}, "duplicate question"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_with_its_reason(r1_tokenizer, change, reason):
    counted = account(records({}, change), r1_tokenizer)
    assert counted == {"read": 2, "used": 1, "held_out": 0, "shortened": 0, "dropped": {reason: 1}}


def long_row(tokenizer):
    """A row of which the first sentences of the thought fit in 150 tokens less than it has."""
    thought = "One short sentence. " + "Another one follows. " * 10 + "word " * 150 + "end."
    row = {**GOOD, "Complex_CoT": thought, "Response": "The answer stays whole."}
    [encoded] = finetune_r1.encode([Row(*row.values())], tokenizer, "en")
    return row, len(encoded.input_ids) - 150


def test_an_overlong_thought_is_cut_at_a_sentence_and_answer_and_eos_stay(r1_tokenizer):
    row, limit = long_row(r1_tokenizer)
    rows = prepare_rows([row], r1_tokenizer, DataConfig(max_seq_length=limit))
    [made] = rows.used
    assert rows.account()["shortened"] == 1 and rows.dropped == {}
    assert len(made["input_ids"]) == made["tokens"] <= limit
    assert row["Complex_CoT"].startswith(made["thought"]) and made["thought"].endswith("follows.")
    text = r1_tokenizer.decode(made["input_ids"])
    assert text.endswith(f"{made['thought']}\n</think>\nThe answer stays whole.{EOS}")


def test_an_overlong_row_is_dropped_if_asked(r1_tokenizer):
    row, limit = long_row(r1_tokenizer)
    rows = prepare_rows([row, GOOD], r1_tokenizer, DataConfig(max_seq_length=limit, overlong="drop"))
    assert rows.dropped == {"longer than --max-seq-length": [0]}
    assert rows.used["answer"][:] == ["So."], "what is dropped does not make another row a duplicate"


def test_an_overlong_row_stops_the_run_if_asked(r1_tokenizer):
    row, limit = long_row(r1_tokenizer)
    with pytest.raises(UserError, match="--overlong error"):
        account([row], r1_tokenizer, max_seq_length=limit, overlong="error")


def test_an_answer_that_is_too_long_alone_is_dropped_not_cut(r1_tokenizer):
    prompt = len(r1_tokenizer(build_prompt("Why 1?"))["input_ids"])
    rows = records({}, {"Response": "word " * 300})
    counted = account(rows, r1_tokenizer, max_seq_length=prompt + 100)
    assert counted["dropped"] == {"question and answer alone exceed --max-seq-length": 1}


def test_a_thought_without_the_end_of_a_sentence_is_dropped_not_cut_anywhere(r1_tokenizer):
    prompt = len(r1_tokenizer(build_prompt("Why 1?"))["input_ids"])
    rows = records({}, {"Complex_CoT": "word " * 300})
    counted = account(rows, r1_tokenizer, max_seq_length=prompt + 100)
    assert counted["dropped"] == {"no whole sentence of the thought fits in --max-seq-length": 1}


def test_held_out_rows_are_chosen_by_seed_and_never_trained_on(r1_tokenizer):
    rows = records(*[{}] * 20)
    rows += [{**row, "Question": f"  {row['Question'].upper()}"} for row in rows]  # no twin may cross over
    first, again = (prepare_rows(rows, r1_tokenizer, DataConfig(eval_rows=5)) for _ in range(2))
    other = prepare_rows(rows, r1_tokenizer, DataConfig(eval_rows=5, seed=1))
    assert (first.account()["used"], first.account()["held_out"]) == (15, 5)
    questions = [{prompts.same_question(q) for q in table["question"]} for table in (first.used, first.held_out)]
    assert questions[0].isdisjoint(questions[1])
    assert first.held_out.to_list() == again.held_out.to_list() != other.held_out.to_list()
    assert first.used.to_list() == again.used.to_list() and first.fingerprint == again.fingerprint


def test_no_usable_row_is_an_error_that_says_why(r1_tokenizer):
    with pytest.raises(UserError, match=re.escape("0 usable rows of 1")) as error:
        account([{**GOOD, "Response": ""}], r1_tokenizer)
    assert "Response is empty, or no text" in error.value.next_step


def test_what_was_tokenized_once_is_not_tokenized_again(r1_tokenizer, monkeypatch):
    rows = records(*[{"Response": "Said once."}] * 3)
    first = prepare_rows(rows, r1_tokenizer, DataConfig())
    monkeypatch.setattr(finetune_r1, "encode", None)  # so that calling it would fail
    assert prepare_rows(rows, r1_tokenizer, DataConfig()).used.to_list() == first.used.to_list()
    with pytest.raises(TypeError):
        prepare_rows(records({"Response": "Another."}), r1_tokenizer, DataConfig())


# -------------------------------------------------------------------------------------------------- no forged structure

TRICKS = [
    "<think>",
    "</think>",
    "</thi",
    EOS,
    EOS[:-1],
    BOS,
    PAD,
    "<｜User｜>",
    "### Response:\n",
    "{question}",
    "{",
    "}}",
]
TRICKS += [
    "\x00",
    "\x1b[31m",
    "\u202e",
    "\ud800",
    "\udfff",
    "\r\n",
    "\u2028",
    "\ufeff",
    "\u200b",
    "é",
    "e\u0301",
    "病",
    " \t",
]
TEXT = st.lists(st.one_of(st.sampled_from(TRICKS), st.text(max_size=20)), min_size=1, max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(question=TEXT, thought=TEXT, answer=TEXT, lang=st.sampled_from(["en", "zh"]))
def test_no_text_forges_the_structure_of_a_row(r1_tokenizer, question, thought, answer, lang):
    special = finetune_r1.special_tokens(r1_tokenizer)
    row = prompts.read_record(dict(zip(COLUMNS, (question, thought, answer), strict=True)), COLUMNS, special)
    if row.fate != "used":
        return
    [row] = finetune_r1.encode([row], r1_tokenizer, lang)
    names = [token for token in r1_tokenizer.convert_ids_to_tokens(row.input_ids) if token in special]
    assert row.fate == "used" and names == [BOS, "<think>", "</think>", EOS]
    written = r1_tokenizer.decode(row.input_ids[row.prompt_tokens :])
    assert prompts.split_response(written.removesuffix(EOS)) == (row.thought, row.answer, True)


def test_a_megabyte_in_a_field_is_cut_or_dropped_like_any_other(r1_tokenizer):
    rows = records(
        {"Complex_CoT": "A sentence. " * 90_000}, {"Response": "x" * 1_000_000}, {"Question": "（" * 300_000}
    )
    counted = account(rows, r1_tokenizer)
    assert (counted["used"], counted["shortened"]) == (1, 1)
    assert counted["dropped"] == {"question and answer alone exceed --max-seq-length": 2}


def test_of_ten_thousand_rows_of_any_kind_each_is_accounted_for(r1_tokenizer):
    chance = random.Random(3407)
    values = [None, 7, 1.5, True, [], {}, "", " ", ["a"], b"bytes", *["A word. " * 200] * 9, *TRICKS]
    words = ["Why", "so", "fever", "Because.", "病。", *TRICKS]

    def field():
        return chance.choice(values) if chance.random() < 0.1 else " ".join(chance.choices(words[:5], k=8))

    rows = [{name: field() for name in COLUMNS} for _ in range(10_000)]
    for row in chance.sample(rows, 2000):
        row[chance.choice(COLUMNS)] = "".join(chance.choices(words, k=4))
    made = prepare_rows(rows, r1_tokenizer, DataConfig(max_seq_length=500, eval_rows=50))
    counted = made.account()
    assert counted["read"] == 10_000 == counted["used"] + counted["held_out"] + sum(counted["dropped"].values())
    dropped = sorted(itertools.chain.from_iterable(made.dropped.values()))
    assert len(set(dropped)) == len(dropped) and counted["used"] > 5000 and counted["shortened"] > 50
    assert max(made.usable["tokens"]) <= 500 and set(made.usable["fate"]) == {"used", "shortened"}
    kept = [row for i, row in enumerate(rows) if i not in set(dropped)]
    assert [row["Response"].strip() for row in kept] == made.usable["answer"][:], "in their order, answers whole"


# -------------------------------------------------------------------------------------------------------------- sources


@pytest.fixture
def written(tmp_path):
    """The same ten rows in each file format."""
    import datasets

    rows = records(*[{}] * 10)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "upper.JSON").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


def questions(path, split="train"):
    return [row["Question"] for row in read_dataset(DataConfig(dataset=str(path), split=split))]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "upper.JSON", "lines.json", "rows.csv", "rows.parquet"])
def test_a_local_file_is_read_by_its_ending(written, name):
    assert list(read_dataset(DataConfig(dataset=str(written / name)))) == records(*[{}] * 10)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("train[8:500]", range(8, 10)),
        ("train[-2:]", range(8, 10)),
        ("train[:10%]", range(1)),
        ("train[50%:]", range(5, 10)),
        ("train[:1]+train[9:]", [0, 9]),
    ],
)
def test_a_slice_takes_those_rows(written, split, expected):
    assert questions(written / "rows.jsonl", split) == [f"Why {i}?" for i in expected]


def test_no_more_of_a_file_is_read_than_its_slice_asks_for(written):
    with (written / "rows.jsonl").open("a") as file:
        file.write('{"Question": "cut')
    assert len(questions(written / "rows.jsonl", "train[:10]")) == 10
    with pytest.raises(UserError, match="line 11"):
        questions(written / "rows.jsonl", "train[:11]")


def test_the_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    for name, row in zip(("b.jsonl", "a.json"), records({}, {}), strict=True):
        (tmp_path / name).write_text(json.dumps(row))
    (tmp_path / "notes.txt").write_text("not a row")
    assert questions(tmp_path) == ["Why 1?", "Why 0?"]


def test_the_names_of_a_folders_files_tell_their_split(tmp_path):
    for name, row in zip(("train.jsonl", "test.jsonl"), records({}, {}), strict=True):
        (tmp_path / name).write_text(json.dumps(row))
    assert (questions(tmp_path, "train[:5]"), questions(tmp_path, "test")) == (["Why 0?"], ["Why 1?"])


BROKEN = {
    "cut.jsonl": (json.dumps(GOOD) + '\n{"Question": "Wh', "line 2"),
    "numbers.jsonl": ("7\n", "line 1"),
    "latin.jsonl": (json.dumps(GOOD).encode() + '\n{"Question": "naïve"}'.encode("latin-1"), "line 2"),
    "cut.json": ('[{"Question": "Why?"},\n{"Question"', "line 2"),
    "words.json": ('["Why?"]', "words.json"),
    "latin.csv": ("Question,Complex_CoT,Response\na,b,c\nnaïve,b,c\n".encode("latin-1"), "line 3"),
    "utf16.csv": ("Question,Complex_CoT,Response\na,b,c\n".encode("utf-16"), "utf16.csv, line 1"),
    "open.csv": ('Question,Complex_CoT,Response\na,b,"c\n', "line 2"),
    "cut.parquet": (b"PAR1 and no more", "cut.parquet"),
    "empty.csv": ("", "no rows"),
    "rows.xlsx": (b"PK\x03\x04", "rows.xlsx, line 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line_and_what_to_do(tmp_path, name):
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=said) as error:
        questions(tmp_path / name)
    assert name in str(error.value) and error.value.next_step


@pytest.mark.parametrize("split", ["nope", "test", "train[", "train[:1", "train[7:3]"])
def test_a_split_that_is_not_there_is_named(written, split):
    with pytest.raises(UserError, match=re.escape(f"--split {split}")):
        questions(written / "rows.jsonl", split)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=f"--dataset {tmp_path}"):
        questions(tmp_path)


# -------------------------------------------------------------------------------------------------------------- columns

OFFERED = {
    "Medical-R1-Distill-Data": (
        {"question": "Why?", "reasoning (reasoning_content)": "Hm.", "response (content)": "So."},
        ["question", "reasoning (reasoning_content)", "response (content)"],
    ),
    "tags inside one column": (
        {"problem": "Why?", "solution": "<think>\nHm.\n</think>\n\nSo."},
        ["problem", "solution", "solution"],
    ),
    "messages with reasoning": (
        {"messages": [{"role": "user", "content": "Why?"},
                      {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}]},
        ["messages"] * 3,
    ),
    "conversations with tags": (
        {"system": "Think.", "conversations": [{"from": "human", "value": "Why?"},
                                               {"from": "gpt", "value": "<think>Hm.</think>So."}]},
        ["conversations"] * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFERED)
def test_columns_of_usual_datasets_are_offered_not_assumed_and_work_as_offered(r1_tokenizer, tmp_path, name):
    record, columns = OFFERED[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(record))
    config = DataConfig(dataset=str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="no column for --question-col Question") as error:
        read_dataset(config)
    quoted = [f"'{column}'" if " " in column else column for column in columns]
    assert "--question-col {} --cot-col {} --response-col {}".format(*quoted) in error.value.next_step
    named = dataclasses.replace(config, question_col=columns[0], cot_col=columns[1], response_col=columns[2])
    [row] = prepare_rows(read_dataset(named), r1_tokenizer, named).used
    assert (row["question"], row["thought"], row["answer"]) == ("Why?", "Hm.", "So.")


def test_a_conversation_of_several_turns_is_dropped_with_that_reason(r1_tokenizer):
    turns = [{"role": role, "content": "Hm."} for role in ("user", "assistant", "user", "assistant")]
    config = DataConfig(question_col="messages", cot_col="messages", response_col="messages")
    with pytest.raises(UserError) as error:
        prepare_rows([{"messages": turns}], r1_tokenizer, config)
    assert "messages is not one question and one answer" in error.value.next_step


def test_a_missing_column_is_named_beside_those_there_are(written):
    config = DataConfig(dataset=str(written / "rows.csv"), cot_col="reasoning")
    with pytest.raises(UserError, match="--cot-col reasoning; it has Question, Complex_CoT, Response"):
        read_dataset(config)


# --------------------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_format_writes_is_taken_back_unchanged(tiny_r1, r1_tokenizer, tmp_path, suffix):
    config = DataConfig(model=str(tiny_r1), dataset=str(SAMPLE), split="train", max_seq_length=500, eval_rows=8)
    summary = finetune_r1.format_(config, as_json=False, output=tmp_path / f"out.{suffix}")
    assert summary is not None and summary["rows"]["shortened"] > 0 and "--split train" in summary["next"]
    taken_back = dataclasses.replace(config, dataset=str(tmp_path / f"out.{suffix}"))
    first, second = (prepare_rows(read_dataset(c), r1_tokenizer, c) for c in (config, taken_back))
    for before, after in ((first.used, second.used), (first.held_out, second.held_out)):
        assert before["input_ids"][:] == after["input_ids"][:]
    assert r1_tokenizer(read_dataset(taken_back)[0]["text"])["input_ids"] == second.usable[0]["input_ids"]


def test_format_shows_the_first_row_what_carries_loss_the_lengths_and_what_is_dropped(tiny_r1, tmp_path, capsys):
    rows = records({}, {}, {"Question": "why 0?"}, {"Response": ""})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(model=str(tiny_r1), dataset=str(tmp_path / "rows.jsonl"), loss_on="response")
    told = finetune_r1.format_(config, as_json=True)
    shown = finetune_r1.format_(config, as_json=False)
    err = capsys.readouterr().err
    assert told is not None and shown is not None and told | shown == told
    first = told["first_row"]
    assert "".join(first["tokens"]) == BOS + first["text"] and first["text"].endswith(f"\nSo.{EOS}")
    assert "".join(first["tokens"][: first["loss_from"]]) == BOS + build_prompt("Why 0?")
    assert sum(count for _, _, count in told["histogram"]) == 2 == told["fit_without_shortening"]
    assert told["dropped"] == {"Response is empty, or no text": [3], "duplicate question": [2]}
    assert first["text"] in err and f"without loss, {first['loss_from']} tokens:" in err and f".│{EOS}" in err
    assert "dropped 1: duplicate question (records 2;" in err and "█" in err


def test_model_and_dataset_come_by_name_from_the_hub_and_the_language_is_the_subset(cli, tiny_r1):
    card = "---\nconfigs:\n- config_name: en\n  data_files: en.json\n- config_name: zh\n  data_files: zh.json\n---\n"
    files = {"README.md": card.encode()}
    for subset, question in (("en", "Why?"), ("zh", "为什么?")):
        rows = [{**GOOD, "Question": question}, {**GOOD, "Question": question + "?"}]
        files[f"{subset}.json"] = json.dumps(rows).encode()
    options = ("--model", "org/tiny", "--dataset", "org/medical", "--split", "train[:1]", "--lang", "zh", "--json")
    with HubServer(tokens={}) as hub:
        hub.add_repo("dataset", "org/medical", files)
        hub.add_repo("model", "org/tiny", {path.name: path.read_bytes() for path in tiny_r1.iterdir()})
        # datasets also asks datasets-server.127.0.0.1 for an export: the proxy keeps that on loopback.
        done = cli("format", *options, HF_ENDPOINT=hub.url, HTTP_PROXY=hub.url)
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"]["read"] == 1
    assert json.loads(done.out)["first_row"]["text"].startswith(build_prompt("为什么?", "zh"))
    without_network = cli("format", *options, HF_HUB_OFFLINE="1")
    assert without_network.code == 0, without_network.err
    assert json.loads(without_network.out) == json.loads(done.out)
