"""Rows: where records come from, every one accounted for, nothing cut silently, nothing forged."""

import csv
import dataclasses
import itertools
import json
import math
import random
import re

import published
import pytest
from conftest import BOS, EOS, PAD, SAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from servers.base import STALL, Fault
from servers.hub import HubServer

import finetune_r1
import prompts
from finetune_r1 import DataConfig, UserError, prepare_rows, read_records, write_jsonl
from prompts import build_prompt

GOOD = {
    "Question": "Why?",
    "Complex_CoT": "First this. Then that. At last the rest.",
    "Response": "So.",
}
COLUMNS = list(GOOD)


def records(*changes):
    return [{**GOOD, "Question": f"Why {i}?", **change} for i, change in enumerate(changes)]


@pytest.fixture
def prepare(r1_tokenizer, tmp_path):
    """What becomes of records that lie in a file: `prepare(records, eval_rows=5).account`."""

    def run(rows, **options):
        write_jsonl(tmp_path / "rows.jsonl", rows)
        config = DataConfig(dataset=str(tmp_path / "rows.jsonl"), split="train", **options)
        return prepare_rows(read_records(config), r1_tokenizer, config)

    return run


# -------------------------------------------------------------------------------------------------- sources


@pytest.fixture
def written(tmp_path):
    """The same ten rows in each file format."""
    import datasets

    rows = records(*[{}] * 10)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "lines.json", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "upper.JSON").write_text(json.dumps(rows))
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


def questions(path, split="train"):
    return read_records(DataConfig(dataset=str(path), split=split))["Question"][:]


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "upper.JSON", "lines.json", "rows.csv", "rows.parquet"]
)
def test_a_local_file_is_read_by_its_ending(written, name):
    read = read_records(DataConfig(dataset=str(written / name), split="train"))
    assert read.to_list() == records(*[{}] * 10)


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


@pytest.mark.parametrize(
    "split", ["nope", "test", "train[", "train[:1", "train[7:3]", "train[20:30]"]
)
def test_a_split_that_is_not_there_is_named(written, split):
    with pytest.raises(UserError, match=re.escape(f"--split {split}: ")):
        questions(written / "rows.jsonl", split)


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    for question in ("Why?", "How?"):
        write_jsonl(tmp_path / "rows.jsonl", [{**GOOD, "Question": question}])
        assert questions(tmp_path / "rows.jsonl") == [question]


def test_a_folders_files_are_read_in_the_order_of_their_names(tmp_path):
    for name, row in zip(("b.jsonl", "a.json"), records({}, {}), strict=True):
        (tmp_path / name).write_text(json.dumps(row))
    (tmp_path / "notes.txt").write_text("not a row")
    assert questions(tmp_path) == ["Why 1?", "Why 0?"]


@pytest.mark.parametrize("name", ["rows", "rows [1]*", "rows.jsonl"])
def test_the_names_of_a_folders_files_tell_their_split(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for file, row in zip(("train.jsonl", "test.jsonl"), records({}, {}), strict=True):
        (folder / file).write_text(json.dumps(row))
    assert (questions(folder, "train[:5]"), questions(folder, "test")) == (["Why 0?"], ["Why 1?"])
    assert questions(folder / "train.jsonl") == ["Why 0?"]


def test_what_is_in_a_csv_is_text_be_it_a_number_or_na(tmp_path):
    answers = ["NA", "42", "007", "1.50", "null", "true", "2020-01-01", ""]
    lines = [f"Why {i}?,Hm.,{answer},{i}" for i, answer in enumerate(answers)]
    (tmp_path / "rows.csv").write_text("\n".join([",".join(COLUMNS) + ",number", *lines]))
    read = read_records(DataConfig(dataset=str(tmp_path / "rows.csv"), split="train"))
    assert read["Response"][:] == answers


SEPARATED = [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("A.TSV", "\t")]


@pytest.mark.parametrize(("name", "delimiter"), SEPARATED)
def test_a_csv_is_read_as_it_is_separated_and_its_text_comes_back_unchanged(
    tmp_path, name, delimiter
):
    """Quoted separators and line ends too; a column's name may hold another separator."""
    texts = [*TRICKS, "one, two; three\tfour", 'a\nb\r\nc "quoted" \n', "007"]
    rows = [{**GOOD, "a, b; c": "x", "Response": text} for text in texts]
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    assert read_records(DataConfig(dataset=str(tmp_path / name), split="train")).to_list() == rows


def test_in_a_folder_of_csv_files_text_is_text_too(tmp_path):
    for name, answer in (("a.csv", "NA"), ("b.csv", "007")):
        (tmp_path / name).write_text(
            f"{HEAD}Why, so?,Hm.,{answer}\n".replace(",", ";").replace("y;", "y,")
        )
    for _ in range(2):
        read = read_records(DataConfig(dataset=str(tmp_path), split="train"))
        assert (read["Question"][:], read["Response"][:]) == (["Why, so?"] * 2, ["NA", "007"])
        (tmp_path / "dataset_infos.json").write_text("{}")  # which is none of its rows
    (tmp_path / "c.csv").write_text(HEAD + "Why?,Hm.,So.\n")
    with pytest.raises(UserError, match="separated alike"):
        questions(tmp_path)


def test_a_table_beside_a_folders_rows_is_in_nobodys_way(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [GOOD])
    (tmp_path / "notes.csv").write_text("a,b\n1,2,3\n")
    assert questions(tmp_path) == ["Why?"] * 2


def test_a_large_file_may_change_its_other_columns_half_way(tmp_path):
    """The readers take it in pieces, and would have the first piece's types for all."""
    lines = [f"Why {i}?,Hm.,So.,{i}\n" for i in range(11_000)] + ["Why?,Hm.,So.,about 7\n"]
    (tmp_path / "rows.csv").write_text(",".join(COLUMNS) + ",note\n" + "".join(lines))
    assert len(questions(tmp_path / "rows.csv")) == 11_001
    rows = records(*[{"Complex_CoT": "A word. " * 15_000}] * 100)
    write_jsonl(tmp_path / "rows.jsonl", [*rows, {**GOOD, "note": 7}])
    assert (tmp_path / "rows.jsonl").stat().st_size > 11e6
    assert questions(tmp_path / "rows.jsonl")[100:] == ["Why?"]


GOOD_LINE, HEAD = json.dumps(GOOD) + "\n", ",".join(COLUMNS) + "\n"
BROKEN = {
    "cut.jsonl": (GOOD_LINE * 2 + '{"Question": "Wh', "row 3"),
    "middle.jsonl": (GOOD_LINE + '{"Question"}\n' + GOOD_LINE, "row 2"),
    "numbers.jsonl": ("7\n", "not a mapping"),
    "latin.jsonl": ((GOOD_LINE + '{"Question": "naïve"}').encode("latin-1"), "UTF8.* row 2"),
    "surrogate.jsonl": (
        GOOD_LINE + json.dumps({**GOOD, "Response": "half a pair \ud83d"}),
        "row 2",
    ),
    "cut.json": ('[{"Question": "Why?"},\n{"Question"', "position 34"),
    "latin.csv": ((HEAD + "a,b,c\nnaïve,b,c\n").encode("latin-1"), "utf-8"),
    "utf16.csv": ((HEAD + "a,b,c\n").encode("utf-16"), "utf-8"),
    "open.csv": (HEAD + 'a,b,"c\n', "unexpected end of data"),
    "more.csv": (HEAD + "a,b,c\na,b, and c,d\n", "line 3 has 4 fields, the header 3; quote"),
    "fewer.csv": (HEAD + "a,b,c\na,b\n", "line 3 has 2 fields, the header 3"),
    "after.csv": (HEAD + 'a,"b\nb\n",c\na,b,c,d\n', "line 5"),
    "semicolons.csv": (
        HEAD.replace(",", ";") + "a;b; and c;d\n",
        "line 2.*quote a field that holds ';'",
    ),
    "cut.parquet": ("PAR1 and no more", "not a parquet file"),
    "empty.jsonl": ("", "it is empty"),
    "blank.jsonl": ("\n\n", "no data"),
    "list.json": ("[]", "no data"),
    "empty.csv": ("", "No columns"),
    "head.csv": (HEAD, "no data"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_row_where_that_is_known_and_what_is_read(tmp_path, name):
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(
        UserError, match=f"--dataset {tmp_path / name} --split train: .*{said}"
    ) as error:
        questions(tmp_path / name)
    assert ".jsonl, .json, .csv and .parquet" in error.value.hint


@pytest.mark.parametrize("name", ["folder", "absent.jsonl", "rows.xlsx"])
def test_an_empty_folder_an_absent_file_and_one_of_another_kind_are_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.xlsx").write_text("PK")
    with pytest.raises(UserError, match=f"--dataset {tmp_path / name}"):
        questions(tmp_path / name)


def test_a_folder_that_is_not_there_and_can_be_no_name_on_the_hub_is_told_so(told):
    done = told(["format", "--dataset", "my rows", "--split", "train"])
    assert (
        done.code == 1 and "my rows" in done.err and done.err.splitlines()[-1].startswith("next:  ")
    )


def test_a_broken_file_stops_the_commands_with_one_line_each_for_what_and_what_next(
    told, tiny_r1, tmp_path
):
    (tmp_path / "latin.jsonl").write_bytes((GOOD_LINE + '{"Question": "naïve"}').encode("latin-1"))
    for command in ("format", "train"):
        done = told([command, "--model", tiny_r1, "--dataset", "latin.jsonl", "--split", "train"])
        last = done.err.splitlines()[-2:]
        assert done.code == 1 and last[0].startswith("error: --dataset latin.jsonl --split train: ")
        assert last[1].startswith("next:  ") and "UTF-8" in last[1]


# ------------------------------------------------------------------------------------------- the accounting


def test_the_bundled_rows_are_as_promised():
    rows = finetune_r1.read_jsonl(SAMPLE)
    assert len(rows) >= 64 and all(list(row) == COLUMNS for row in rows)
    assert len({prompts.same_question(row["Question"]) for row in rows}) == len(rows)
    assert all(
        60 <= len(row["Complex_CoT"].split()) <= 150 and "\n" not in row["Response"] for row in rows
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Complex_CoT": " "}, "Complex_CoT is empty or not text"),
        ({"Response": None}, "Response is empty or not text"),
        ({"Question": 7}, "Question is empty or not text"),
        ({"Question": {"nested": "Why?"}}, "Question is empty or not text"),
        ({"Complex_CoT": "Hm </think> ha"}, "</think> inside Complex_CoT"),
        ({"Response": f"So.{EOS}"}, f"{EOS} inside Response"),
        ({"Question": "Why <｜User｜>?"}, "<｜User｜> inside Question"),
        ({"Question": " WHY   0? "}, "duplicate question"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_with_its_reason(prepare, change, reason):
    expected = {"read": 2, "used": 1, "held_out": 0, "shortened": 0, "dropped": {reason: 1}}
    assert prepare(records({}, change)).account == expected


@pytest.fixture
def long_row(r1_tokenizer):
    """A row, and a limit in tokens in which the first sentences of its thought fit."""
    thought = "One short sentence. " + "Another one follows. " * 10 + "word " * 150 + "end."
    row = {**GOOD, "Complex_CoT": thought, "Response": "The answer stays whole."}
    [encoded] = prompts.encode([prompts.Row(*row.values())], r1_tokenizer, "en")
    return row, len(encoded.input_ids) - 150


def test_an_overlong_thought_is_cut_at_a_sentence_and_answer_and_eos_stay(
    prepare, r1_tokenizer, long_row
):
    row, limit = long_row
    rows = prepare([row], max_seq_length=limit)
    [made] = rows.used
    assert rows.account["shortened"] == 1 and rows.dropped == {}
    assert len(made["input_ids"]) == made["tokens"] <= limit
    assert row["Complex_CoT"].startswith(made["thought"]) and made["thought"].endswith("follows.")
    text = r1_tokenizer.decode(made["input_ids"])
    assert text.endswith(f"{made['thought']}\n</think>\nThe answer stays whole.{EOS}")


def test_an_overlong_row_is_dropped_if_asked_or_stops_the_run(prepare, long_row):
    row, limit = long_row
    rows = prepare([row, GOOD], max_seq_length=limit, overlong="drop")
    assert rows.dropped == {"longer than --max-seq-length": [0]}
    assert rows.used["answer"][:] == ["So."], (
        "what is dropped does not make another row a duplicate"
    )
    with pytest.raises(UserError, match="--overlong error"):
        prepare([row], max_seq_length=limit, overlong="error")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Response": "word " * 300}, "question and answer alone exceed --max-seq-length"),
        (
            {"Complex_CoT": "word " * 300},
            "no whole sentence of the thought fits in --max-seq-length",
        ),
    ],
)
def test_what_cannot_be_cut_at_a_sentence_of_the_thought_is_dropped(
    prepare, r1_tokenizer, change, reason
):
    prompt = len(r1_tokenizer(build_prompt("Why 1?"))["input_ids"])
    rows = prepare(records({}, change), max_seq_length=prompt + 100)
    assert rows.account["dropped"] == {reason: 1}


def test_held_out_rows_are_chosen_by_seed_and_never_trained_on(prepare):
    rows = records(*[{}] * 20)
    rows += [
        {**row, "Question": f"  {row['Question'].upper()}"} for row in rows
    ]  # no twin may cross over
    first, again, other = (prepare(rows, eval_rows=5, seed=seed) for seed in (3407, 3407, 1))
    assert (first.account["used"], first.account["held_out"]) == (15, 5)
    used, held_out = (
        set(map(prompts.same_question, t["question"])) for t in (first.used, first.held_out)
    )
    assert used.isdisjoint(held_out)
    assert first.held_out.to_list() == again.held_out.to_list() != other.held_out.to_list()
    assert first.used.to_list() == again.used.to_list() and first.fingerprint == again.fingerprint


def test_no_usable_row_is_an_error_that_says_why(prepare):
    with pytest.raises(UserError, match="0 usable rows of 1") as error:
        prepare([{**GOOD, "Response": ""}])
    assert "Response is empty or not text" in error.value.hint


@pytest.mark.parametrize(
    ("chinese", "lang", "noted"), [(2, "en", True), (1, "en", False), (2, "zh", False)]
)
def test_rows_mostly_in_chinese_under_an_english_prompt_are_noted(
    prepare, capsys, chinese, lang, noted
):
    rows = [*published.CHINESE[:chinese], *records({}, {})[: 3 - chinese]]
    assert prepare(rows, lang=lang).account["used"] == 3
    assert ("--lang zh" in capsys.readouterr().err) == noted


# -------------------------------------------------------------------------------------- no forged structure

# fmt: off
TRICKS = [
    "<think>", "</think>", "</thi", EOS, EOS[:-1], BOS, PAD, "<｜User｜>", "### Response:\n",
    "{question}", "{", "}}", "\x00", "\x1b[31m", "\u202e", "\r\n", "\u2028", "\ufeff", "\u200b",
    "é", "e\u0301", "病", " \t",
]
# fmt: on
PIECE = st.one_of(st.sampled_from([*TRICKS, "\ud800", "\udfff"]), st.text(max_size=20))
TEXT = st.lists(PIECE, min_size=1, max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXT, min_size=3, max_size=3), lang=st.sampled_from(["en", "zh"]))
def test_no_text_forges_the_structure_of_a_row(r1_tokenizer, texts, lang):
    special = prompts.special_tokens(r1_tokenizer)
    row = prompts.read_record(dict(zip(COLUMNS, texts, strict=True)), COLUMNS, special)
    if row.status != "used":
        return
    [row] = prompts.encode([row], r1_tokenizer, lang)
    names = [
        token for token in r1_tokenizer.convert_ids_to_tokens(row.input_ids) if token in special
    ]
    assert row.status == "used" and names == [BOS, "<think>", "</think>", EOS]
    written = r1_tokenizer.decode(row.input_ids[row.prompt_tokens :])
    assert prompts.split_response(written.removesuffix(EOS)) == (row.thought, row.answer, True)


def test_a_very_long_field_is_cut_or_dropped_like_any_other(prepare):
    thought, answer, question = "A sentence. " * 30_000, "x" * 300_000, "（" * 100_000
    rows = records({"Complex_CoT": thought}, {"Response": answer}, {"Question": question})
    counted = prepare(rows).account
    assert (counted["used"], counted["shortened"]) == (1, 1)
    assert counted["dropped"] == {"question and answer alone exceed --max-seq-length": 2}


def test_of_two_thousand_rows_of_any_kind_each_is_accounted_for(prepare):
    chance = random.Random(3407)
    values = [
        None,
        7,
        1.5,
        True,
        [],
        {},
        "",
        " ",
        ["a"],
        {"a": 1},
        *["A word. " * 200] * 9,
        *TRICKS,
    ]
    words = ["Why", "so", "fever", "Because.", "病。", *TRICKS]

    def field():
        return (
            chance.choice(values)
            if chance.random() < 0.1
            else " ".join(chance.choices(words[:5], k=8))
        )

    rows = [{name: field() for name in COLUMNS} for _ in range(2000)]
    for row in chance.sample(rows, 400):
        row[chance.choice(COLUMNS)] = "".join(chance.choices(words, k=4))
    made = prepare(rows, max_seq_length=500, eval_rows=50)
    counted = made.account
    assert (
        counted["read"]
        == 2000
        == counted["used"] + counted["held_out"] + sum(counted["dropped"].values())
    )
    dropped = sorted(itertools.chain.from_iterable(made.dropped.values()))
    assert (
        len(set(dropped)) == len(dropped) and counted["used"] > 1000 and counted["shortened"] > 25
    )
    assert max(made.usable["tokens"]) <= 500 and set(made.usable["status"]) == {"used", "shortened"}
    kept = [row for i, row in enumerate(rows) if i not in set(dropped)]
    answers = [row["Response"].strip() for row in kept]
    assert answers == made.usable["answer"][:], "in their order, answers whole"


# -------------------------------------------------------------------------------------------------- columns

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
def test_columns_of_usual_datasets_are_offered_not_assumed_and_work_as_offered(
    r1_tokenizer, tmp_path, name
):
    record, columns = OFFERED[name]
    write_jsonl(tmp_path / "rows.jsonl", [record])
    config = DataConfig(dataset=str(tmp_path / "rows.jsonl"), split="train")
    read = read_records(config)
    with pytest.raises(
        UserError, match="has no Complex_CoT, Question, Response; its columns: "
    ) as error:
        finetune_r1.check_columns(read, config)
    quoted = [f"'{column}'" if " " in column else column for column in columns]
    assert "--question-col {} --cot-col {} --response-col {}".format(*quoted) in error.value.hint
    names = ("question_col", "cot_col", "response_col")
    named = dataclasses.replace(config, **dict(zip(names, columns, strict=True)))
    finetune_r1.check_columns(read, named)
    [row] = prepare_rows(read, r1_tokenizer, named).used
    assert (row["question"], row["thought"], row["answer"]) == ("Why?", "Hm.", "So.")


def test_a_conversation_of_several_turns_is_dropped_with_that_reason(prepare):
    turns = [
        {"role": role, "content": "Hm."} for role in ("user", "assistant", "user", "assistant")
    ]
    with pytest.raises(UserError) as error:
        prepare(
            [{"messages": turns}],
            question_col="messages",
            cot_col="messages",
            response_col="messages",
        )
    assert "messages is not one question and one answer" in error.value.hint


ALPACA = [
    {"instruction": "Answer the question.", "input": f"Why {number}?", "output": "<think>Hm.</think>So."}
    for number in range(3)
]  # fmt: skip


def test_of_alpacas_columns_the_one_whose_texts_differ_is_offered_as_the_question(
    told, tiny_r1, tmp_path
):
    write_jsonl(tmp_path / "rows.jsonl", ALPACA)
    options = ["format", "--model", tiny_r1, "--dataset", "rows.jsonl", "--split", "train"]
    offered = re.search(
        r"--question-col input --cot-col output --response-col output", told(options).err
    )
    done = told([*options, *offered[0].split(), "--json"])
    assert json.loads(done.out)["rows"]["used"] == 3 and "note:" not in done.err
    columns = ["--question-col", "instruction", "--cot-col", "output", "--response-col", "output"]
    assert "note: the column `input` is not taught" in told([*options, *columns]).err


def test_an_answer_without_a_thought_is_dropped_for_that(prepare):
    rows = [{"instruction": "Why?", "output": "So."}]
    with pytest.raises(UserError) as error:
        prepare(rows, question_col="instruction", cot_col="output", response_col="output")
    assert "no thought between think tags in output" in error.value.hint


def test_a_missing_column_is_named_beside_those_there_are(told, written):
    done = told(["format", "--dataset", "rows.csv", "--split", "train", "--cot-col", "reasoning"])
    assert done.code == 1
    assert "has no reasoning; its columns: Question, Complex_CoT, Response" in done.err


# --------------------------------------------------------------------------------------------------- format


def test_what_format_writes_is_taken_back_unchanged(told, tiny_r1, r1_tokenizer, tmp_path):
    options = f"--model {tiny_r1} --split train --max-seq-length 500 --eval-rows 8 --json".split()
    summary = json.loads(
        told(["format", "--dataset", SAMPLE, "--output", "out.jsonl", *options]).out
    )
    assert summary["rows"]["shortened"] > 0 and summary["next"].endswith(
        "--dataset out.jsonl --split train"
    )
    config = DataConfig(dataset=str(SAMPLE), split="train", max_seq_length=500, eval_rows=8)
    taken_back = dataclasses.replace(config, dataset=str(tmp_path / "out.jsonl"))
    first, second = (prepare_rows(read_records(c), r1_tokenizer, c) for c in (config, taken_back))
    for before, after in ((first.used, second.used), (first.held_out, second.held_out)):
        assert before["input_ids"][:] == after["input_ids"][:]
    text = finetune_r1.read_jsonl(tmp_path / "out.jsonl")[0]["text"]
    assert r1_tokenizer(text)["input_ids"] == second.usable[0]["input_ids"]


def test_format_shows_the_first_row_what_carries_loss_and_what_is_dropped(told, tiny_r1, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", records({}, {}, {"Question": "why 0?"}, {"Response": ""}))
    options = [
        "--model",
        tiny_r1,
        "--dataset",
        "rows.jsonl",
        "--split",
        "train",
        "--loss-on",
        "response",
    ]
    report, shown = json.loads(told(["format", *options, "--json"]).out), told(["format", *options])
    first = report["first_row"]
    assert "".join(first["tokens"]) == BOS + first["text"] and first["text"].endswith(f"\nSo.{EOS}")
    assert "".join(first["tokens"][: first["loss_from"]]) == BOS + build_prompt("Why 0?")
    assert report["dropped"] == {"Response is empty or not text": [3], "duplicate question": [2]}
    assert first["text"] in shown.err and f"without loss, {first['loss_from']} tokens:" in shown.err
    assert f".│{EOS}" in shown.err and "dropped 1: duplicate question (row 3)" in shown.err
    assert "used: 2" in shown.out and "fit_without_shortening: 2" in shown.out


@pytest.mark.parametrize(
    ("name", "said"), [("rows.parquet", ".jsonl"), ("there.jsonl", "there already")]
)
def test_format_writes_jsonl_alone_and_over_no_file(told, tmp_path, name, said):
    (tmp_path / "there.jsonl").touch()
    done = told(["format", "--output", name])
    assert done.code == 1 and f"error: --output {name}: " in done.err and said in done.err


@pytest.mark.slow
def test_model_and_dataset_come_by_name_and_the_language_is_the_subset(cli, tiny_r1):
    options = ("--model", "org/tiny", "--split", "train[:1]", "--lang", "zh", "--json")
    with HubServer(tokens={}) as hub:
        hub.add_repo("dataset", DataConfig.dataset, published.medical_o1_repo())
        hub.add_repo("model", "org/tiny", published.repo_files(tiny_r1))
        # datasets also asks datasets-server.127.0.0.1 for an export: the proxy keeps that on loopback.
        here = {"HF_ENDPOINT": hub.url, "HTTP_PROXY": hub.url}
        done = cli("format", *options, **here)
        assert done.code == 0, done.err
        # A Hub that falls silent is asked once, by a command that finds all in the cache.
        hub.faults.append(Fault("*", "", delay=STALL, times=math.inf))
        before = len(hub.requests)
        again = cli("format", *options, **here, HF_HUB_ETAG_TIMEOUT="1")
        assert again.code == 0 and again.out == done.out, again.err
        assert [path.rpartition("/")[2] for _, path in hub.requests[before:]] == ["README.md"]
    assert json.loads(done.out)["rows"]["read"] == 1
    prompt = build_prompt(published.CHINESE[0]["Question"], "zh")
    assert json.loads(done.out)["first_row"]["text"].startswith(prompt)


def test_a_hub_that_falls_silent_is_not_asked_on_and_on_about_its_files(monkeypatch):
    """Hugging Face's client would ask for a file's size for 400 seconds."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    monkeypatch.setattr(finetune_r1, "SILENT_SECONDS", {"": 0.2})
    with HubServer(tokens={"hf_a": ("alice", "read")}) as hub, finetune_r1.hub_client() as client:
        repo = hub.add_repo("dataset", "org/rows", {"rows.json": b"[]"})
        file = f"{hub.url}/datasets/org/rows/resolve/{repo.commits[0].oid}/rows.json"
        hub.faults.append(Fault("HEAD", "", delay=STALL, times=2))
        for error in (httpx.ReadTimeout, httpx.ReadTimeout, OfflineModeIsEnabled):
            with pytest.raises(error):
                client.head(file, timeout=0.15)
        assert client.get(file).content == b"[]" and client.head(file).is_success, (
            "one that is back is asked"
        )
