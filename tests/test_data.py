"""Every row accounted for: used, shortened, dropped or held out, and nothing cut silently."""

import csv
import dataclasses
import json
import re

import pytest
from conftest import EOS, SAMPLE
from servers.hub import HubServer

import finetune_r1
import prompts
from finetune_r1 import DataConfig, UserError, prepare_rows
from prompts import build_prompt

GOOD = {"Question": "Why?", "Complex_CoT": "First this. Then that. At last the rest.", "Response": "So."}
COLUMNS = list(GOOD)


def records(*changes):
    return [{**GOOD, "Question": f"Why {i}?", **change} for i, change in enumerate(changes)]


def account(rows, tokenizer, **options):
    return prepare_rows(rows, tokenizer, DataConfig(**options))[2]


def test_the_bundled_rows_are_as_promised():
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    assert len(rows) >= 64 and all(list(row) == COLUMNS for row in rows)
    assert len({prompts.same_question(row["Question"]) for row in rows}) == len(rows)
    assert all(60 <= len(row["Complex_CoT"].split()) <= 150 and "\n" not in row["Response"] for row in rows)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Complex_CoT": " "}, "Complex_CoT is empty or not text"),
        ({"Response": None}, "Response is empty or not text"),
        ({"Question": 7}, "Question is empty or not text"),
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
    """A row of which the first two of three sentences of thought fit in 150 tokens less than it has."""
    thought = "One short sentence. " + "Another one follows. " * 10 + "word " * 150 + "end."
    row = {**GOOD, "Complex_CoT": thought, "Response": "The answer stays whole."}
    return row, len(finetune_r1.encode_row(tokenizer, *row.values(), "en").input_ids) - 150


def test_an_overlong_thought_is_cut_at_a_sentence_and_answer_and_eos_stay(r1_tokenizer):
    row, limit = long_row(r1_tokenizer)
    [made], _, counted = prepare_rows([row], r1_tokenizer, DataConfig(max_seq_length=limit))
    assert counted["shortened"] == 1 and counted["dropped"] == {}
    assert len(made.input_ids) <= limit
    assert row["Complex_CoT"].startswith(made.thought) and made.thought.endswith("follows.")
    text = r1_tokenizer.decode(made.input_ids)
    assert text.endswith(f"{made.thought}\n</think>\nThe answer stays whole.{EOS}")


def test_an_overlong_row_is_dropped_if_asked(r1_tokenizer):
    row, limit = long_row(r1_tokenizer)
    counted = account([row, GOOD], r1_tokenizer, max_seq_length=limit, overlong="drop")
    assert counted["dropped"] == {"duplicate question": 1} or counted["dropped"] == {"longer than --max-seq-length": 1}
    assert counted["used"] == 1


def test_an_overlong_row_stops_the_run_if_asked(r1_tokenizer):
    row, limit = long_row(r1_tokenizer)
    with pytest.raises(UserError, match="--overlong error"):
        account([row], r1_tokenizer, max_seq_length=limit, overlong="error")


def test_an_answer_that_is_too_long_alone_is_dropped_not_cut(r1_tokenizer):
    prompt = len(r1_tokenizer(build_prompt("Why 1?"))["input_ids"])
    rows = records({}, {"Response": "word " * 300})
    counted = account(rows, r1_tokenizer, max_seq_length=prompt + 100)
    assert counted["dropped"] == {"no room for a sentence of the thought": 1}


def test_held_out_rows_are_chosen_by_seed_and_never_trained_on(r1_tokenizer):
    rows = records(*[{}] * 20)
    used, held_out, counted = prepare_rows(rows, r1_tokenizer, DataConfig(eval_rows=5))
    again = prepare_rows(rows, r1_tokenizer, DataConfig(eval_rows=5))
    other = prepare_rows(rows, r1_tokenizer, DataConfig(eval_rows=5, seed=1))
    assert (counted["used"], counted["held_out"]) == (15, 5)
    assert {r.question for r in used}.isdisjoint(r.question for r in held_out)
    assert (used, held_out) == again[:2] and held_out != other[1]


@pytest.mark.parametrize("rows", [[], [{**GOOD, "Response": ""}]])
def test_no_usable_row_is_an_error_that_says_why(r1_tokenizer, rows):
    with pytest.raises(UserError, match=re.escape("0 usable rows")):
        account(rows, r1_tokenizer)


@pytest.fixture
def written(tmp_path):
    """The same two rows in each file format."""
    import datasets

    rows = records({}, {})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with (tmp_path / "rows.csv").open("w") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_local_file_is_read_by_its_ending(written, suffix):
    read = finetune_r1.read_dataset(DataConfig(dataset=str(written / f"rows.{suffix}")))
    assert list(read) == records({}, {})


def test_a_slice_takes_those_rows(written):
    read = finetune_r1.read_dataset(DataConfig(dataset=str(written / "rows.jsonl"), split="train[1:2]"))
    assert read["Question"][:] == ["Why 1?"]


def test_a_missing_column_is_named_beside_those_there_are(written):
    config = DataConfig(dataset=str(written / "rows.csv"), cot_col="reasoning")
    with pytest.raises(UserError, match="--cot-col reasoning") as error:
        finetune_r1.read_dataset(config)
    assert "Question, Complex_CoT, Response" in error.value.next_step


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_format_writes_is_taken_back_unchanged(tiny_r1, r1_tokenizer, tmp_path, suffix):
    config = DataConfig(model=str(tiny_r1), dataset=str(SAMPLE), split="train")
    summary = finetune_r1.format_(config, output=tmp_path / f"out.{suffix}")
    taken_back = dataclasses.replace(config, dataset=str(tmp_path / f"out.{suffix}"))
    first, second = (prepare_rows(finetune_r1.read_dataset(c), r1_tokenizer, c)[0] for c in (config, taken_back))
    assert summary is not None and summary["rows"]["used"] == len(first) == 96
    assert first == second
    texts = finetune_r1.read_dataset(taken_back)["text"][:]
    assert [r1_tokenizer(text)["input_ids"] for text in texts] == [row.input_ids for row in second]


@pytest.mark.parametrize(("lang", "first"), [("en", "Why?"), ("zh", "为什么?")])
def test_model_and_dataset_come_by_name_from_the_hub_and_the_language_is_the_subset(cli, tiny_r1, lang, first):
    card = "---\nconfigs:\n- config_name: en\n  data_files: en.json\n- config_name: zh\n  data_files: zh.json\n---\n"
    files = {"README.md": card.encode()}
    for subset, question in (("en", "Why?"), ("zh", "为什么?")):
        rows = [{**GOOD, "Question": question}, {**GOOD, "Question": question + "?"}]
        files[f"{subset}.json"] = json.dumps(rows).encode()
    with HubServer(tokens={}) as hub:
        hub.add_repo("dataset", "org/medical", files)
        hub.add_repo("model", "org/tiny", {path.name: path.read_bytes() for path in tiny_r1.iterdir()})
        # datasets also asks datasets-server.127.0.0.1 for an export: the proxy keeps that on loopback.
        options = ("--model", "org/tiny", "--dataset", "org/medical", "--split", "train[:1]", "--lang", lang, "--json")
        done = cli("format", *options, HF_ENDPOINT=hub.url, HTTP_PROXY=hub.url)
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"]["read"] == 1 and build_prompt(first, lang) in done.err
