"""Rows: where records come from, every one accounted for, nothing cut silently, nothing forged."""

import csv
import dataclasses
import json
import math
import random
import re
import resource

import published
import pytest
from conftest import BOS, EOS, PAD, SAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from servers.base import Fault

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
HEAD = ",".join(COLUMNS) + "\n"
LINE = json.dumps(GOOD, ensure_ascii=False) + "\n"


def records(*changes):
    return [{**GOOD, "Question": f"Why {i}?", **change} for i, change in enumerate(changes)]


def questions(path, split="train", **options):
    config = DataConfig(dataset=str(path), split=split, **options)
    return list(read_records(config)["Question"])


def error_of(path, split="train", **options):
    with pytest.raises(UserError) as caught:
        questions(path, split, **options)
    return str(caught.value), caught.value.hint


@pytest.fixture
def prepare(r1_tokenizer, tmp_path):
    """What becomes of records that lie in a file: `prepare(records, eval_rows=5).row_counts`."""

    def run(rows, **options):
        write_jsonl(tmp_path / "rows.jsonl", rows)
        config = DataConfig(dataset=str(tmp_path / "rows.jsonl"), split="train", **options)
        return prepare_rows(read_records(config), r1_tokenizer, config)

    return run


# -------------------------------------------------------------------------------------------- files


def write_csv(path, rows, delimiter=",", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def test_file_of_each_format_gives_the_same_records(tmp_path):
    import datasets

    rows = records(*[{}] * 3000)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "lines.json", rows)
    (tmp_path / "upper.JSON").write_text(json.dumps(rows, indent=1))
    write_csv(tmp_path / "rows.csv", rows, encoding="utf-8-sig")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for path in sorted(tmp_path.iterdir()):  # the last one is JSON
        assert read_records(DataConfig(dataset=str(path), split="train")).to_list() == rows, path
    write_jsonl(
        path, [{**GOOD, "note": 7}] * 3000 + [{**GOOD, "note": note} for note in ("7", [7])]
    )
    assert len(questions(path)) == 3002, "other columns may change their type half way"


def test_split_slice_takes_those_rows_and_a_wrong_one_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, records(*[{}] * 10))
    for split, expected in {
        "train[8:500]": [8, 9],
        "train[-1:]": [9],
        "train[:10%]": [0],
        "train[:1]+train[9:]": [0, 9],
    }.items():
        assert questions(path, split) == [f"Why {i}?" for i in expected]
    for split in ("nope", "train[", "train[7:3]", "train[20:30]"):
        message, hint = error_of(path, split)
        assert f"--split {split}: " in message and "split" in hint


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("A.TSV", "\t")])
def test_csv_text_comes_back_unchanged_under_each_separator(tmp_path, name, delimiter):
    texts = [*TRICKS, "one, two; three\tfour", 'a\nb\r\nc "quoted" \n', "007", "NA", "null", "1.50"]
    rows = [{**GOOD, "a, b; c": "x", "Response": text} for text in texts]
    write_csv(tmp_path / name, rows, delimiter)
    for row in rows:
        row["Response"] = row["Response"].replace("\r\n", "\n")
    assert read_records(DataConfig(dataset=str(tmp_path / name), split="train")).to_list() == rows
    text = (tmp_path / name).read_text("utf-8-sig")
    (tmp_path / name).write_text(f"sep={delimiter}\n{text}", encoding="utf-8")  # as Excel does
    again = read_records(DataConfig(dataset=str(tmp_path / name), split="train"))
    assert again[0] == rows[0]


BROKEN = {
    "cut.jsonl": (LINE * 2 + '{"Question": "Wh', "line 3", "repair"),
    "numbers.jsonl": ("7\n", "not a JSON object", "copy"),
    "latin.jsonl": ((LINE + '{"Question": "naïve"}').encode("latin-1"), "can't decode", "UTF-8"),
    "pair.jsonl": (json.dumps({**GOOD, "Response": "\ud83d!"}), "surrogates", "copy"),
    "open.csv": (HEAD + 'a,b,"c\n', "line 2: unexpected end", "repair"),
    "more.csv": (HEAD + "a,b,c\na,b, and c,d\n", "line 3: more or fewer .* quote", "repair"),
    "twice.csv": ("a,b,a\n1,2,3\n", "a name in it twice", "repair"),
    "cut.parquet": ("PAR1 and no more", "[Pp]arquet", "copy"),
    "empty.jsonl": ("", "no rows", "widen"),
    "head.csv": (HEAD, "no rows", "widen"),
    "rows.xlsx": ("PK", "nothing to read", ".jsonl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_with_its_line_and_fitting_advice(tmp_path, name):
    content, said, advised = BROKEN[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    message, hint = error_of(tmp_path / name)
    assert message.startswith(f"--dataset {tmp_path / name}") and re.search(said, message)
    assert re.search(advised, hint) and ("UTF-8" in hint) == (advised == "UTF-8")


def test_missing_file_is_not_found_without_a_word_about_syntax():
    for name in ("absent.jsonl", "data/absent.csv", "my rows", "/nowhere/rows"):
        message, hint = error_of(name)
        assert message == f"--dataset {name} --split train: not found." and "path" in hint


# ------------------------------------------------------------------------------------------ folders


def test_folder_reads_every_format_in_the_order_of_names_and_says_what_it_left(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", records({}, {}))
    (tmp_path / "b.csv").write_text(HEAD + "How?,Hm.,So.\n")
    (tmp_path / "c.json").write_text(json.dumps([{**GOOD, "Question": "Where?"}]))
    (tmp_path / "notes.txt").write_text("no row")
    write_repository(tmp_path, {".cache/a.jsonl": b"no row"})
    assert questions(tmp_path) == ["Why 0?", "Why 1?", "How?", "Where?"]
    assert f"{tmp_path / 'notes.txt'} is not read" in capsys.readouterr().err


def test_folder_takes_splits_from_the_names_of_files(tmp_path):
    folder = tmp_path / "rows [1]*.jsonl"
    (folder / "data").mkdir(parents=True)
    files = ("train.jsonl", "data/my-test_2.jsonl", "validation-00000-of-00001.jsonl")
    for file, row in zip(files, records({}, {}, {}), strict=True):
        (folder / file).write_text(json.dumps(row))
    found = [questions(folder, split) for split in ("train[:5]", "test", "validation")]
    assert found == [["Why 0?"], ["Why 1?"], ["Why 2?"]]
    assert questions(folder / "train.jsonl") == ["Why 0?"]
    for lang in ("en", "zh"):  # a folder for each subset or language
        write_repository(folder, {f"{lang}/train.jsonl": LINE.replace("Why", lang).encode()})
    assert (questions(folder), questions(folder, subset="zh")) == (["en?"], ["zh?"])
    assert "nothing to read in" in error_of(folder, subset="fr")[0]


def test_saved_dataset_is_loaded_with_its_splits(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(records(*[{}] * 5))
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([4])}).save_to_disk(tmp_path / "two")
    assert questions(tmp_path / "one", "train[1:3]") == ["Why 1?", "Why 2?"]
    assert questions(tmp_path / "two", "test") == ["Why 4?"]
    assert "'train', 'test'" in error_of(tmp_path / "two", "dev")[0]


def write_repository(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


CONFIGS = b"---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---\n"
FAULTS = {  # of a repository: its files, what the message says, what the hint says
    "script": ({"script.py": b"x"}, "Dataset scripts are no longer supported", "JSONL"),
    "unlike": ({"a.jsonl": LINE.encode(), "b.jsonl": b'{"q": 1}\n'}, "cast", "different columns"),
    "cut": ({"a.jsonl": LINE.encode() + b'{"Question": "Wh'}, "JSON", "JSONL copy"),
    "none": ({"a.xyz": b"x"}, "data file", "JSONL"),
}


def test_repository_with_a_fault_is_named_with_it(hub_rows, tmp_path):
    for name, (files, said, advised) in FAULTS.items():
        hub_rows.add_repo("dataset", f"org/{name}", files)
        folder = write_repository(tmp_path / name, {"README.md": CONFIGS, **files})
        for source in (f"org/{name}", folder):
            message, hint = error_of(source)
            assert said in message and advised in hint, (source, message, hint)


# ------------------------------------------------------------------------------------------ the Hub


@pytest.fixture
def hub_rows(hub, monkeypatch, tmp_path):
    """A Hub that `datasets`, which has read its environment, asks too; its cache is empty."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HTTP_PROXY", hub.url)  # it also asks datasets-server.127.0.0.1
    return hub


def test_recipes_dataset_by_name_or_downloaded_takes_subset_or_language(hub_rows, tmp_path):
    files = published.medical_o1_repo()
    hub_rows.add_repo("dataset", DataConfig.dataset, files)
    chinese = [row["Question"] for row in published.CHINESE]
    for source in (DataConfig.dataset, write_repository(tmp_path / "repo", files)):
        assert len(questions(source, "train[:7]")) == 7
        assert questions(source, lang="zh") == questions(source, subset="zh_mix") == chinese
        message, hint = error_of(source, subset="fr")
        assert "'fr' not found" in message and "'zh_mix'" in message and "--subset" in hint
        message, _ = error_of(source, "test")
        assert "test" in message and "train" in message


def test_hub_dataset_with_only_a_default_configuration_needs_no_subset(hub_rows):
    hub_rows.add_repo("dataset", "GBaker/MedQA", published.medqa_repo())
    read = read_records(DataConfig(dataset="GBaker/MedQA", split="test"))
    assert len(read) == 2 and "options" in read.column_names
    assert "['default']" in error_of("GBaker/MedQA", subset="en")[0]


@pytest.mark.parametrize(("status", "advised"), [(403, "login"), (500, "busy")])
def test_hub_that_refuses_a_file_is_not_taken_for_a_wrong_split(hub_rows, status, advised):
    hub_rows.add_repo("dataset", "org/rows", {"rows.jsonl": LINE.encode()})
    hub_rows.faults.append(Fault("GET", "rows.jsonl", status=status, times=math.inf))
    message, hint = error_of("org/rows")
    assert str(status) in message and advised in hint and "split" not in hint
    message, hint = error_of("org/absent")
    assert "doesn't exist on the Hub" in message and "login" in hint


def test_hub_that_is_not_reached_is_named_and_what_is_cached_is_read(hub_rows, monkeypatch):
    from huggingface_hub import constants

    hub_rows.add_repo("dataset", "org/rows", {"README.md": CONFIGS, "rows.jsonl": LINE.encode()})
    assert questions("org/rows") == ["Why?"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert questions("org/rows") == ["Why?"]
    message, hint = error_of("org/others")
    assert "Couldn't reach" in message and "HF_HUB_OFFLINE" in hint and "UTF-8" not in hint


def test_cache_that_is_full_or_no_folder_is_named(hub_rows, monkeypatch, tmp_path):
    """A limit on the size of files stands for a full disk; local files need no cache at all."""
    text = json.dumps({**GOOD, "Response": "word " * 80_000}).encode()
    name = "org/rows"
    hub_rows.add_repo("dataset", name, {"README.md": CONFIGS, "rows.jsonl": text})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        message, hint = error_of(name)
        assert "disk is full" in hint and "HF_HOME" in hint and "split" not in hint
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    message, hint = error_of(name)
    assert str(tmp_path / "file") in message and "HF_HOME" in hint and "split" not in hint
    assert questions(write_repository(tmp_path / "plain", {"rows.jsonl": text})) == ["Why?"]


# ----------------------------------------------------------------------------------- the accounting


def test_every_record_is_counted_with_what_became_of_it(prepare):
    rows = records({}, {"Response": None}, {"Question": " WHY, 0 "}, {"Response": f"a{EOS}"})
    rows += [{**GOOD, "Complex_CoT": "Look at <b>this</b>.\r\nThen that."}]
    made = prepare(rows)
    reasons = ["Response is missing", "duplicate question", f"{EOS} inside Response"]
    assert made.dropped == dict(zip(reasons, [[1], [2], [3]], strict=True))
    notes = ["markup in the text", "carriage returns (made line feeds) in the text"]
    counts = {"read": 5, "used": 2, "held_out": 0, "shortened": 0}
    what = {"dropped": dict.fromkeys(reasons, 1), "notes": dict.fromkeys(notes, 1)}
    assert made.row_counts == {**counts, **what}
    assert made.used["thought"][1] == "Look at <b>this</b>.\nThen that."


def test_overlong_thought_is_cut_at_a_sentence_and_answer_and_eos_stay(prepare, r1_tokenizer):
    thought = "One short sentence. " + "Another one follows. " * 10 + "word " * 150 + "end."
    row = {**GOOD, "Complex_CoT": thought, "Response": "The answer stays whole."}
    encoded = prompts.encode(prompts.Row(*row.values()), r1_tokenizer, "en")
    limit = len(encoded.input_ids) - 150  # the first sentences fit
    rows = prepare([row], max_seq_length=limit)
    [made] = rows.used
    assert rows.row_counts["shortened"] == 1 and rows.dropped == {}
    assert len(made["input_ids"]) == made["tokens"] <= limit
    assert thought.startswith(made["thought"]) and made["thought"].endswith("follows.")
    text = r1_tokenizer.decode(made["input_ids"])
    assert text.endswith(f"{made['thought']}\n</think>\nThe answer stays whole.{EOS}")


def test_row_that_cannot_be_cut_at_a_sentence_is_dropped(prepare, r1_tokenizer):
    prompt = len(r1_tokenizer(build_prompt("Why 1?"))["input_ids"])
    long = "word " * 300
    changes = [{"Response": long}, {"Complex_CoT": long}, {"Question": "x" + "（" * 100_000}]
    rows = prepare(records({}, *changes), max_seq_length=prompt + 100)
    assert rows.dropped == {"no sentence of the thought fits in --max-seq-length": [1, 2, 3]}


def test_held_out_rows_are_chosen_by_seed_and_never_trained_on(prepare):
    rows = records(*[{}] * 20)
    # No twin may cross over.
    rows += [{**row, "Question": f"  {row['Question'].upper()}!"} for row in rows]
    first, again, other = (prepare(rows, eval_rows=5, seed=seed) for seed in (3407, 3407, 1))
    assert (first.row_counts["used"], first.row_counts["held_out"]) == (15, 5)
    used = set(map(prompts.same_question, first.used["question"]))
    assert used.isdisjoint(map(prompts.same_question, first.held_out["question"]))
    assert first.held_out.to_list() == again.held_out.to_list() != other.held_out.to_list()
    assert first.used.to_list() == again.used.to_list() and first.fingerprint == again.fingerprint


# ------------------------------------------------------------------------------ no forged structure

# fmt: off
TRICKS = [
    "<think>", "</think>", "</thi", EOS, EOS[:-1], BOS, PAD, "<｜User｜>", "### Response:\n",
    "{question}", "{", "}}", "\x00", "\x1b[31m", "\u202e", "\r\n", "\u2028", "\ufeff", "\u200b",
    "é", "e\u0301", "病", " \t",
]
# fmt: on
PIECE = st.one_of(
    st.sampled_from(TRICKS), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
TEXT = st.lists(PIECE, min_size=1, max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXT, min_size=3, max_size=3), lang=st.sampled_from(["en", "zh"]))
def test_no_text_forges_the_structure_of_a_row(r1_tokenizer, texts, lang):
    special = list(map(str, r1_tokenizer.added_tokens_decoder.values()))
    row = prompts.read_record(dict(zip(COLUMNS, texts, strict=True)), COLUMNS, special)
    if row.status != "used":
        return
    row = prompts.encode(row, r1_tokenizer, lang)
    names = r1_tokenizer.convert_ids_to_tokens(row.input_ids)
    markers = [name for name in names if name in special]
    assert row.status == "used" and markers == [BOS, "<think>", "</think>", EOS]
    written = r1_tokenizer.decode(row.input_ids[row.prompt_tokens :])
    assert prompts.split_response(written.removesuffix(EOS)) == (row.thought, row.answer, True)


def test_two_thousand_rows_of_any_kind_are_each_accounted_for(prepare):
    chance = random.Random(3407)
    values = [None, 7, 1.5, True, [], {}, "", " ", "nan", ["a"], {"a": 1}, *TRICKS]
    values += ["A word. " * 200] * 9
    words = ["Why", "so", "fever", "Because.", "病。", *TRICKS]

    def field():
        if chance.random() < 0.1:
            return chance.choice(values)
        return " ".join(chance.choices(words[:5], k=8))

    rows = [{name: field() for name in COLUMNS} for _ in range(2000)]
    for row in chance.sample(rows, 400):
        row[chance.choice(COLUMNS)] = "".join(chance.choices(words, k=4))
    made = prepare(rows, max_seq_length=500, eval_rows=50)
    counts = made.row_counts
    dropped = sorted(position for positions in made.dropped.values() for position in positions)
    assert counts["used"] + counts["held_out"] + len(set(dropped)) == 2000 == counts["read"]
    assert sum(counts["dropped"].values()) == len(dropped)
    assert counts["used"] > 1000 and counts["shortened"] > 10
    assert max(made.usable["tokens"]) <= 500 and set(made.usable["status"]) == {"used", "shortened"}
    texts = [row["Response"] for number, row in enumerate(rows) if number not in dropped]
    answers = [text[0] if isinstance(text, list) else text for text in texts]
    cleaned = [answer.replace("\r\n", "\n").strip() for answer in answers]
    assert cleaned == made.usable["answer"][:], "in their order, answers whole"


# ------------------------------------------------------------------------------------------ columns


def test_missing_column_is_an_error_with_the_columns_that_are_there(run_cli, tiny_r1, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "Why?", "answer": "<think>Hm.</think>So."}])
    options = ["format", "--model", tiny_r1, "--dataset", "rows.jsonl", "--split", "train"]
    done = run_cli(options)
    assert done.code == 1 and "has question, answer, not Question, Complex_CoT" in done.err
    options += "--question-col question --cot-col answer --response-col answer --json".split()
    assert json.loads(run_cli(options).out)["rows"]["used"] == 1


def test_no_usable_row_is_an_error_with_counts_and_reasons(prepare):
    rows = [{"question": f"Why {i}?", "kind": "on", "answer": "<think>Hm.</think>So"} for i in "ab"]
    with pytest.raises(UserError, match=r"2 read, 0 to train on.*; 2 dropped: <think> inside"):
        prepare(rows, question_col="question", cot_col="kind", response_col="answer")
    with pytest.raises(UserError, match=r"2 read, 0 to train on, 2 held out"):
        prepare(records({}, {}), eval_rows=2)


# ------------------------------------------------------------------------------------------- format


def test_rows_that_format_writes_are_taken_back_unchanged(run_cli, tiny_r1, r1_tokenizer, tmp_path):
    options = f"--model {tiny_r1} --split train --max-seq-length 500 --eval-rows 8 --json".split()
    done = run_cli(["format", "--dataset", SAMPLE, "--output", "out.jsonl", *options])
    summary = json.loads(done.out)
    assert summary["rows"]["shortened"] > 0
    config = DataConfig(dataset=str(SAMPLE), split="train", max_seq_length=500, eval_rows=8)
    taken_back = dataclasses.replace(config, dataset=str(tmp_path / "out.jsonl"))
    first, second = (prepare_rows(read_records(c), r1_tokenizer, c) for c in (config, taken_back))
    for before, after in ((first.used, second.used), (first.held_out, second.held_out)):
        assert before["input_ids"][:] == after["input_ids"][:]
    text = finetune_r1.read_jsonl(tmp_path / "out.jsonl")[0]["text"]
    assert r1_tokenizer(text)["input_ids"] == second.usable[0]["input_ids"]


def test_format_shows_masked_tokens_and_what_is_dropped(run_cli, tiny_r1, tmp_path):
    rows = records({}, {}, {"Question": "why 0"}, {"Response": "N/A"}, {"Response": "a&lt;b"})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    options = ["format", "--model", tiny_r1, "--dataset", "rows.jsonl", "--split", "train"]
    options += ["--loss-on", "response"]
    report, shown = json.loads(run_cli([*options, "--json"]).out), run_cli(options)
    first = report["first_row"]
    assert "".join(first["tokens"]) == BOS + first["text"] and first["text"].endswith(f"\nSo.{EOS}")
    assert "".join(first["tokens"][: first["loss_from"]]) == BOS + build_prompt("Why 0?")
    reason = "a text in Response is empty or missing"
    assert report["dropped"] == {reason: [3], "duplicate question": [2]}
    assert f"{first['loss_from']} masked" in shown.err and f".│{EOS}" in shown.err
    names = [line[:10].partition(":")[0].strip() for line in shown.out.splitlines()]
    assert names == ["rows", "dropped", "", "tokens"]
    assert f"1, {reason} (first: row 4)" in shown.out and "1 with markup in the text" in shown.out
    assert "5 read, 3 to train on" in shown.out


def test_format_writes_over_no_file(run_cli, tmp_path):
    (tmp_path / "there.jsonl").touch()
    done = run_cli(["format", "--output", "there.jsonl"])
    assert done.code == 1 and "error: --output there.jsonl already exists" in done.err
