"""Evaluation: base against tuned on the same rows, not trained on, and a verdict that can be bad."""

import collections
import copy
import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
import sys

import published
import pytest
from conftest import BOS, EOS, SAMPLE
from servers.hub import HubServer

import finetune_r1
import prompts
from finetune_r1 import (
    DEMO,
    EvalConfig,
    LoadedModel,
    Run,
    SamplingConfig,
    TrainConfig,
    UserError,
    prepare_rows,
    read_jsonl,
)

SHORT = SamplingConfig(max_new_tokens=4)
REST = {"A": "rest", "B": "water"}


@pytest.fixture(scope="module")
def config(tiny_r1):
    return TrainConfig(
        model=str(tiny_r1), dataset=str(SAMPLE), split="train[:24]", eval_rows=4, max_seq_length=768,
        max_steps=1, effective_batch=4, warmup_steps=0, learning_rate=2e-2, max_new_tokens=8, wandb=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def untrained(config, unsloth):
    """The base with an adapter that changes nothing yet."""
    loaded = LoadedModel.load(config)
    loaded.add_adapter(config, kept_layers=loaded.model.config.num_hidden_layers)
    return loaded


@pytest.fixture
def run(tiny_run, tmp_path):
    return Run(shutil.copytree(tiny_run, tmp_path / "run"))


def evaluated(run, **options):
    return finetune_r1.eval_(EvalConfig(max_new_tokens=4, **options), run.folder)


def named(*texts):
    return dict(zip(finetune_r1.RECIPE_COLUMNS, texts, strict=True))


# ----------------------------------------------------------------------------------------------------- losses


def test_losses_are_means_over_the_tokens_they_name(config, untrained):
    """By hand, from the model's own logits: of thought and answer, and of the answer alone."""
    import torch

    rows = prepare_rows(finetune_r1.read_records(config), untrained.tokenizer, config).held_out
    found, row = finetune_r1.row_losses(untrained, rows), rows[0]
    with torch.no_grad():
        logits = untrained.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].float()
    learned = range(row["prompt_tokens"], row["tokens"])
    each = [-float(logits[i - 1].log_softmax(-1)[row["input_ids"][i]]) for i in learned]
    closing = f"\n</think>\n{row['answer']}{EOS}"
    answer = len(untrained.tokenizer(closing, add_special_tokens=False)["input_ids"]) - 3
    assert found["loss"][0] == pytest.approx(sum(each) / len(each), abs=1e-3)
    assert found["answer_loss"][0] == pytest.approx(sum(each[-answer:]) / answer, abs=1e-3)


def test_rows_that_only_just_fit_are_evaluated_and_nothing_is_cut_behind_our_back(
    config, untrained, monkeypatch
):
    """Another row's question and thought before this answer would be longer than --max-seq-length; a GPU's
    Unsloth then cuts off its end, where the answer is."""
    long = [named("Why?", "It is so. " * 60, "So."), named("When?", "Now.", "It is then. " * 60)]
    records = finetune_r1.datasets.Dataset.from_list(long)
    rows = prepare_rows(
        records, untrained.tokenizer, dataclasses.replace(config, eval_rows=0)
    ).usable
    fed = []
    noted = untrained.model.register_forward_pre_hook(
        lambda _, __, given: fed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    plain = finetune_r1.row_losses(untrained, rows)
    assert max(fed) > max(rows["tokens"])
    fed.clear()
    monkeypatch.setattr(untrained.model, "max_seq_length", max(rows["tokens"]))
    found = finetune_r1.row_losses(untrained, rows)
    noted.remove()
    assert max(fed) == max(rows["tokens"]), "the other's beginning was left out"
    assert found["loss"] == plain["loss"] and found["answer_loss"] == plain["answer_loss"]
    assert all(math.isfinite(value) for values in found.values() for value in values)


# ------------------------------------------------------------------------------------------------- the report


def test_nothing_is_found_where_there_is_nothing(config, untrained, run):
    held_out = prepare_rows(finetune_r1.read_records(config), untrained.tokenizer, config).held_out
    report = finetune_r1.evaluate(untrained, run, held_out, [], 2, config)
    assert report["rows"] == 4 and report["answers"] == 2
    measures = {name: value for name, value in report.items() if isinstance(value, dict)}
    assert measures.keys() >= {
        "loss", "answer_loss", "relevance", "closed", "stopped", "repetition", "answer_words"
    }  # fmt: skip
    assert all(
        value["difference"] == value["low"] == value["high"] == 0 for value in measures.values()
    )
    assert math.isfinite(report["loss"]["base"]) and report["verdict"].startswith("can't tell")


def test_the_same_evaluation_gives_the_same_report_again_with_a_picture_in_the_card(run, tmp_path):
    finetune_r1.write_jsonl(tmp_path / "rows.jsonl", read_jsonl(SAMPLE)[8:14])

    def evaluate():
        evaluated(run, dataset=str(tmp_path / "rows.jsonl"), split="train")
        [report] = run.folder.glob("eval*.json")
        return report, report.read_bytes()

    first = evaluate()
    assert evaluate() == first
    picture = first[0].with_suffix(".png")
    assert picture.stat().st_size > 10_000 and picture.name.startswith("eval-rows-train-")
    assert f"![before and after]({picture.name})" in (run / "README.md").read_text()


def test_the_report_is_a_table_within_80_columns_once(run, told):
    words = [
        "eval",
        "--run",
        run.folder,
        "--dataset",
        SAMPLE,
        "--split",
        "train[8:20]",
        "--answers",
        2,
    ]
    done = told([*words, "--max-new-tokens", 3])
    lines = done.out.splitlines()
    assert (
        done.code == 0
        and lines[0].startswith("On 12 held-out rows: ")
        and max(map(len, lines)) <= 80
    )
    start = lines.index(next(line for line in lines if line.startswith("measure")))
    table = "\n".join(lines[start + 1 :])
    assert re.search(
        r"^loss +\d+\.\d{3} +\d+\.\d{3} +[-+]\d\.\d{3} \(.* to .*\) lower$", table, re.MULTILINE
    )
    assert re.search(r"^answer loss .* lower$", table, re.MULTILINE)
    assert re.search(r"^relevance .* higher$", table, re.MULTILINE)
    assert re.search(r"^thought words +\d+\.\d +\d+\.\d .*\)$", table, re.MULTILINE)
    assert "base:" not in done.out and "Losses are in nats per token" in done.err


def test_a_finished_evaluation_waits_for_whoever_uses_the_run(config, untrained, run):
    code = "import sys, time, pathlib, filelock\nwith filelock.FileLock(sys.argv[1]):"
    code += "print(1, flush=True); time.sleep(1); pathlib.Path(sys.argv[2]).touch()"
    command = [sys.executable, "-c", code, run / ".lock", run / "left"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
    finetune_r1.evaluate(
        untrained, run, None, [prompts.MultipleChoice("Why?", REST, "B")], 1, SHORT
    )
    assert (run / "left").exists() and (run / "eval.json").exists()
    holder.wait()


def test_the_base_is_asked_by_its_own_chat_template_too_as_often_as_told(
    untrained, run, monkeypatch
):
    asked, of_model = [], LoadedModel.asked

    def noted(*given):
        asked.append(of_model(*given))
        return asked[-1]

    monkeypatch.setattr(LoadedModel, "asked", noted)
    choices = [
        prompts.MultipleChoice("Why?", REST, "B"),
        prompts.MultipleChoice("Why is <b>that</b> so?", REST, "A"),
    ]
    finetune_r1.evaluate(untrained, run, None, choices, 2, SHORT, "eval", 2)
    own = f"{BOS}<｜User｜>{choices[0].text}<｜Assistant｜><think>\n"
    assert sum(own in texts for texts in asked) == 2, "once for each sample"
    report = finetune_r1.read_json(run / "eval.json")
    assert [pair["reference"] for pair in report["pairs"]] == ["B", "B", "A", "A"]
    first, second = (pair["chat"]["thought"] for pair in report["pairs"][:2])
    assert first != second and report["rows"] == 2 and report["answers"] == 4
    page = (run / "eval.html").read_text()
    assert page.count("<section>") == 4 and "&lt;b&gt;that&lt;/b&gt;" in page and "<b>" not in page
    assert page.count("<h3>Before, own chat (") == 4


def test_a_change_is_measured_from_the_better_of_both_befores():
    def answered(closed, words):
        return {
            "thought": "so",
            "answer": "so " * words,
            "closed": closed,
            "finish_reason": "stop",
            "seconds": 1,
        }

    def report(base, chat, tuned):
        sides = {"question": "Why?", "base": base, "chat": chat, "tuned": tuned}
        before, after = ({"loss": [1.0] * 9, "relevance": [1.0] * 9} for _ in range(2))
        return prompts.build_report(
            before, after, [[copy.deepcopy(sides)] for _ in range(9)], 9, seed=1
        )

    no, yes = answered(False, 2), answered(True, 5)
    for base, chat in ((no, yes), (yes, no)):
        found = report(base, chat, yes)
        assert found["closed"]["difference"] == 0 and found["closed"]["base"] == float(
            base["closed"]
        )
        assert found["closed"]["chat"] == float(chat["closed"])
        words = found["answer_words"]
        assert words["difference"] == words["tuned"] - words["base"], (
            "neither number is the better one"
        )


@pytest.fixture
def file_of(run, tmp_path, monkeypatch):
    """The name of the file that `eval` would write: `file_of(split="train[8:]")`."""
    rows = [row | {"Short": "So."} for row in read_jsonl(SAMPLE)[8:60]]  # not trained on
    finetune_r1.write_jsonl(tmp_path / "mine.jsonl", rows)
    settings = finetune_r1.read_json(run / "config.json")
    settings |= {"dataset": str(tmp_path / "mine.jsonl"), "split": "train"}
    finetune_r1.write_json(run / "config.json", settings)
    monkeypatch.setattr(LoadedModel, "load_run", lambda *_: None)
    monkeypatch.setattr(finetune_r1, "evaluate", lambda *given: {"name": given[-2]})
    return lambda **asked: evaluated(run, **asked)["name"]


def test_an_evaluation_is_named_by_its_rows(file_of, tmp_path):
    mine = str(tmp_path / "mine.jsonl")
    for name, asked in {
        "eval-train-20-30": {"split": "train[20:30]"},
        "eval-mine-train": {"dataset": mine, "split": "train"},
        "eval-mine-zh-train-4-6": {"dataset": mine, "split": "train[4:6]", "subset": "zh"},
    }.items():
        assert re.fullmatch(f"{name}-[0-9a-f]{{4}}", file_of(**asked)) and file_of(
            **asked
        ) == file_of(**asked)


def test_no_two_evaluations_have_one_file(file_of, tmp_path):
    mine = str(tmp_path / "mine.jsonl")
    slices = ["train[:20]", "train[20:]", "train[-20:]", "train[:20%]", "train[:2]+train[20:]"]
    names = [file_of(dataset=mine, split=split) for split in slices]
    names += [file_of(subset="zh"), file_of(response_col="Short"), "eval"]
    assert len(set(names)) == len(names), names


def test_the_card_shows_the_largest_evaluation_of_each_kind(run):
    kinds = {"eval": ("loss", 12), "eval-mine-4f2a": ("loss", 9), "eval-train-8-10-90b1": ("loss", 2),
             "eval-medqa-test-77e0": ("accuracy", 100), "eval-other-3c3c": ("accuracy", 40)}  # fmt: skip
    for name, (measure, rows) in kinds.items():
        values = {measure: [0.5] * rows, "relevance": [0.5] * rows}
        finetune_r1.write_json(
            run / f"{name}.json", prompts.build_report(values, values, [], rows, seed=1)
        )
    finetune_r1.write_card(run)
    card = (run / "README.md").read_text()
    assert re.findall(r"On (\d+) held-out", card) == ["12", "100"]
    assert re.findall(r"\((eval\S*)\.png\)", card) == ["eval", "eval-medqa-test-77e0"]


# ---------------------------------------------------------------------------------- which rows, which columns


def test_held_out_rows_stay_those_of_the_run_whatever_becomes_of_the_dataset(
    config, tmp_path, capsys, monkeypatch
):
    data, rows = tmp_path / "rows.jsonl", read_jsonl(SAMPLE)
    finetune_r1.write_jsonl(data, rows[:24])
    config = dataclasses.replace(config, dataset=str(data), split="train")
    finetune_r1.train_run(config, run := Run(tmp_path / "run"))
    before = evaluated(run, answers=0)
    finetune_r1.write_jsonl(data, rows[4:30])
    assert evaluated(run, answers=0) == before and before["rows"] == 4
    # The same rows by name: what was trained on is left out, and said.
    capsys.readouterr()
    written = {path: path.read_bytes() for path in run.folder.glob("eval*")}
    report = evaluated(run, dataset=str(data), split="train", answers=0)
    assert {path: path.read_bytes() for path in written} == written, "this one has files of its own"
    assert len(list(run.folder.glob("eval*"))) == 2 * len(written) == 6
    held_out = {row["Question"] for row in read_jsonl(run / "held_out.jsonl")}
    trained = {row["Question"] for row in rows[:24]} - held_out
    left_out = sum(row["Question"] in trained for row in rows[4:30])
    assert report["rows"] == 26 - left_out < 26
    assert f"{left_out} of 26 questions are left out" in capsys.readouterr().err
    finetune_r1.write_jsonl(data, [row for row in rows if row["Question"] in trained])
    monkeypatch.setattr(
        finetune_r1, "import_unsloth", None
    )  # it takes long, so this is said before
    with pytest.raises(UserError, match="no question is left"):
        evaluated(run, dataset=str(data), split="train")


def test_a_run_that_held_no_rows_out_has_to_be_told_which(run):
    with pytest.raises(UserError, match="held no rows out"):
        evaluated(run)


def test_rows_may_be_in_other_columns(run, tmp_path):
    rows = [
        dict(zip(("q", "why", "a"), row.values(), strict=True)) for row in read_jsonl(SAMPLE)[30:33]
    ]
    finetune_r1.write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = {"question_col": "q", "cot_col": "why", "response_col": "a"}
    asked = {"dataset": str(tmp_path / "rows.jsonl"), "split": "train"}
    assert evaluated(run, **asked, **columns, answers=0)["rows"] == 3
    with pytest.raises(UserError, match="its columns: q, why, a"):
        evaluated(run, **asked)


# -------------------------------------------------------------------------------------------- multiple choice


def test_a_dataset_in_medqas_columns_is_graded_and_an_open_thought_counts_as_no_answer(
    run, tmp_path
):
    choice = {
        "question": "What widens the anion gap?",
        "options": {"A": "lactate", "B": "water"},
        "answer_idx": "A",
    }
    finetune_r1.write_jsonl(tmp_path / "choice.jsonl", [choice] * 2)
    asked = {"dataset": str(tmp_path / "choice.jsonl"), "split": "train"}
    report = evaluated(run, **asked, answers=5)
    assert report["rows"] == report["answers"] == 2 and report["verdict"].startswith("can't tell")
    assert set(report["accuracy"].values()) == {0}
    card = (run / "README.md").read_text()
    assert "accuracy | 0.00 | 0.00" in card and "An answer is unread if" in card
    assert re.search(r"^\| unread \| 1.00 \| 1.00 \| .* \| lower \|$", card, re.MULTILINE)
    with pytest.raises(UserError, match="--answers 0"):
        evaluated(run, **asked, answers=0)


def test_medqa_is_graded_from_the_hub_by_the_command_line(run, cli):
    """Its only configuration is taken, which has not the language's name."""
    medqa = "GBaker/MedQA-USMLE-4-options"
    asked = ["eval", "--run", run, "--max-new-tokens", 4, "--answers", 2, "--json"]
    with HubServer() as hub:
        hub.add_repo("dataset", medqa, published.medqa_repo())
        done = cli(*asked, "--dataset", medqa, "--split", "test", HF_ENDPOINT=hub.url)
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"] == 2 and "accuracy" in json.loads(done.out)


@pytest.mark.parametrize(
    ("answers", "accuracy", "unread", "verdict"),
    [
        (("A.", "B."), (0.1, 0.9), (0, 0), "better: more answers are right"),
        (
            ("Rest or water.", "B."),
            (0, 0.9),
            (1, 0),
            "better: more answers are right; fewer could not be read",
        ),
        (
            ("B.", "Who knows?"),
            (0.9, 0),
            (0, 1),
            "worse: fewer answers are right; more could not be read",
        ),
    ],
)
def test_right_and_unread_answers_are_counted_for_each_side(
    config, untrained, run, monkeypatch, answers, accuracy, unread, verdict
):
    def answer_both(loaded, questions, config, chat=False):
        written = {"thought": "", "closed": True, "finish_reason": "stop", "tokens": 1}
        sides = {
            n: written | {"answer": answer}
            for n, answer in zip(("base", "tuned"), answers, strict=True)
        }
        return [
            {"question": question} | {n: s | {"seconds": 1} for n, s in sides.items()}
            for question in questions
        ]

    monkeypatch.setattr(LoadedModel, "answer_both", answer_both)
    choices = [prompts.MultipleChoice("Why?", REST, key) for key in [*"BBBBBBBBB", "A"]]
    report = finetune_r1.evaluate(untrained, run, None, choices, 10, config)
    assert (report["accuracy"]["base"], report["accuracy"]["tuned"]) == accuracy
    assert (report["unread"]["base"], report["unread"]["tuned"]) == unread
    assert report["verdict"] == verdict
    assert not any("unread" in row for row in prompts.report_rows({"loss": report["accuracy"]}))


def test_questions_trained_on_and_those_without_a_key_are_left_out_of_multiple_choice(
    run, tmp_path, capsys
):
    trained = [row["Question"] for row in read_jsonl(SAMPLE)[:8]]
    nearly = re.sub(r"\d+", "31", trained[0])
    assert nearly != trained[0]
    questions = [
        trained[1],
        nearly,
        "What widens the anion gap?",
        "Which vitamin's lack causes scurvy?",
    ]
    texts = dict(zip(("opa", "opb", "opc", "opd"), "CDAB", strict=True))
    rows = [{"question": question, **texts, "cop": 0, "exp": None} for question in questions]
    finetune_r1.write_jsonl(tmp_path / "medmcqa.jsonl", [*rows, {**rows[2], "cop": -1}])
    asked = {"dataset": str(tmp_path / "medmcqa.jsonl"), "split": "train"}
    assert evaluated(run, **asked)["rows"] == 2
    told = capsys.readouterr().err
    assert (
        "2 of 5 questions are left out: trained on" in told
        and "1 of 5 questions are left out\nrow 4: cop -1 fits none of" in told
    )
    with pytest.raises(UserError, match="no question is left"):
        evaluated(run, **asked | {"split": "train[4:]"})
    # A run of an earlier version kept no more than hashes.
    hashes = list(finetune_r1.read_json(run / "trained.json"))
    finetune_r1.write_json(run / "trained.json", hashes)
    assert evaluated(run, **asked)["rows"] == 3


# ----------------------------------------------------------------------------------------- what was forgotten

GENERAL = SAMPLE.with_name("general.jsonl")


def test_the_general_texts_are_as_promised(r1_tokenizer):
    """Forty passages of ten kinds, a paragraph or two each, and eight questions; nothing forges a row."""
    rows = read_jsonl(GENERAL)
    kinds = collections.Counter(row["kind"] for row in rows)
    assert kinds.pop("question") == 8 and len(kinds) == 10 and set(kinds.values()) == {4}
    texts = [row["text"] for row in rows]
    assert len(set(map(prompts.same_question, texts))) == len(rows) == 48
    special = (*prompts.special_tokens(r1_tokenizer), "<|im_end|>", "<|endoftext|>")
    assert not any(prompts.find_marker(text, special) for text in texts)
    for row in rows:
        if row["kind"] == "chinese":
            assert 150 <= len(row["text"]) <= 200, row
        elif row["kind"] != "question":
            assert 60 <= len(row["text"].split()) <= 120, row
    assert sum(re.search("[一-鿿]", row["text"]) is not None for row in rows) == 5
    assert not set(texts) & {row["Question"] for row in read_jsonl(SAMPLE)}


def test_general_loss_is_the_mean_of_each_passage_without_a_prompt(config, untrained, monkeypatch):
    """By hand, from the model's own logits; what is longer than a row may be is cut."""
    import torch

    found = finetune_r1.forgetting(untrained, "now")["general_loss"]
    passages = [row["text"] for row in read_jsonl(GENERAL) if row["kind"] != "question"]
    ids = torch.tensor([untrained.tokenizer(passages[7])["input_ids"]])
    with torch.no_grad():
        scores = untrained.model(input_ids=ids).logits[0, :-1].float()
    by_hand = float(torch.nn.functional.cross_entropy(scores, ids[0, 1:]))
    assert len(found) == 40 and found[7] == pytest.approx(by_hand, abs=1e-3)
    monkeypatch.setattr(untrained.model, "max_seq_length", 50)
    by_hand = float(torch.nn.functional.cross_entropy(scores[:49], ids[0, 1:50]))
    cut = finetune_r1.forgetting(untrained, "now")["general_loss"]
    assert cut[7] == pytest.approx(by_hand, abs=1e-3)


def test_half_as_many_everyday_questions_are_asked_and_counted_apart(
    config, untrained, run, monkeypatch
):
    """Of the eight, five are finished before and none after; a row's answers count for the shares alone."""
    asked = []

    def answer_both(loaded, questions, config, chat=False):
        asked.extend(questions)
        pairs = []
        for number, question in enumerate(questions):
            ended = {
                "thought": "",
                "answer": "",
                "seconds": 1,
                "closed": number < 7,
                "finish_reason": "stop",
            }
            cut = ended | {"finish_reason": "length"}
            pairs.append({"question": question, "base": ended, "tuned": cut})
        return pairs

    monkeypatch.setattr(LoadedModel, "answer_both", answer_both)
    rows = prepare_rows(
        finetune_r1.read_records(config), untrained.tokenizer, config
    ).held_out.select([0, 1])
    report = finetune_r1.evaluate(untrained, run, rows, [], 16, config)
    everyday = [row["text"] for row in read_jsonl(GENERAL) if row["kind"] == "question"]
    assert (
        asked == [*rows["question"], *everyday]
        and report["answers"] == 2
        and report["everyday"] == 8
    )
    assert report["everyday_stopped"]["base"] == 5 / 8 and report["everyday_stopped"]["tuned"] == 0
    assert report["stopped"] == compared([1.0, 1.0], [0.0, 0.0])
    note = prompts.report_note(report)
    assert re.search(
        r"loss (\d+\.\d\d) to \1 \(\+0\.00\), everyday questions finished 5 to 0 of 8\. ", note
    )
    lines = {row[0]: row[-1] for row in prompts.report_rows(report)}
    assert lines["general loss"] == "lower" and lines["everyday stopped"] == "higher"
    # None are asked where no row is, and then no number is made up.
    report = finetune_r1.evaluate(untrained, run, rows, [], 0, config)
    assert "everyday_stopped" not in report and "general_loss" in report
    assert "everyday" not in prompts.report_note(report)


@pytest.mark.parametrize(
    ("change", "ending"),
    [
        (0.08, "before or more"),
        (0.2, "or more; general text is predicted worse than before"),
        (-1.0, "or more"),
    ],
)
def test_a_verdict_tells_when_general_text_is_predicted_clearly_worse(change, ending):
    base = {"loss": [3.0] * 9, "relevance": [0.5] * 9, "general_loss": [2.0, 3.0] * 20}
    tuned = {
        "loss": [2.0] * 9,
        "relevance": [0.5] * 9,
        "general_loss": [2.0 + change, 3.0 + change] * 20,
    }
    said = prompts.build_report(base, tuned, [], 9, seed=1)["verdict"]
    assert said.startswith("better: ") and said.endswith(ending)


# ------------------------------------------------------------------------------------------------ the verdict


def compared(base, tuned):
    return prompts.compare(base, tuned, seed=1)


FELL, ROSE = compared([3.0, 3.1, 2.9], [2.0, 2.2, 1.8]), compared([2.0, 2.2, 1.8], [3.0, 3.1, 2.9])
EITHER = compared([1.0, 3.0], [3.0, 1.0])


def test_a_comparison_has_both_means_and_an_interval_that_holds_the_difference():
    assert (
        FELL["base"] == 3
        and FELL["tuned"] == 2
        and FELL["low"] <= FELL["difference"] == -1 <= FELL["high"] < 0
    )
    assert EITHER["difference"] == 0 and (EITHER["low"], EITHER["high"]) == (-2, 2)
    assert compared([0.0, 0.0, 1.0] * 9, [1.0, 0.0, 1.0] * 9)["low"] > 0


@pytest.mark.parametrize(
    ("loss", "relevance", "verdict"),
    [
        (FELL, ROSE, "better"),
        (FELL, EITHER, "better"),
        (FELL, FELL, "worse: its answers depend less"),  # it learned the style alone
        (ROSE, ROSE, "worse: the held-out loss rose"),
        (EITHER, EITHER, "can't tell"),
    ],
)
def test_the_verdict_follows_the_intervals(loss, relevance, verdict):
    assert prompts.verdict({"loss": loss, "relevance": relevance}, rows=8).startswith(verdict)


@pytest.mark.parametrize(
    "measures", [{"loss": FELL, "relevance": ROSE}, {"accuracy": ROSE}, {"accuracy": FELL}]
)
def test_a_few_rows_tell_nothing(measures):
    assert prompts.verdict(measures, rows=7) == "can't tell: 7 rows are too few, it takes 8"
    assert prompts.verdict(measures, rows=1).startswith("can't tell: 1 row is")
    assert not prompts.verdict(measures, rows=8).startswith("can't")


@pytest.mark.parametrize(
    ("words", "verdict"), [(40, "better: "), (1, "can't tell: .* much shorter")]
)
def test_a_training_that_unlearned_to_think_is_not_called_better(words, verdict):
    """Neither on one row's nor on the other's account: all thoughts that were closed count together."""
    answer = {"answer": "So.", "closed": True, "finish_reason": "stop", "seconds": 1}
    sides = {side: answer | {"thought": "so " * words} for side in ("base", "tuned")}
    questions = [[{"question": "Why?", "reference_thought": "so " * 60, **sides}] for _ in range(9)]
    before, after = ({"loss": [loss] * 9, "relevance": [1.0] * 9} for loss in (3.0, 2.0))
    report = prompts.build_report(before, after, copy.deepcopy(questions), 9, seed=1)
    assert re.match(verdict, report["verdict"])


@pytest.mark.parametrize(
    ("closed", "verdict"),
    [
        (compared([0.0, 0.0], [0.0, 1.0]), "better: .* before or more$"),
        (compared([0.0, 0.0], [0.0, 0.0]), "can't tell: .* no thought was closed"),
        (compared([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]), "can't tell: .* fewer thoughts were closed"),
    ],
)
def test_a_model_that_closes_no_thought_is_not_called_better_without_a_word(closed, verdict):
    assert re.match(
        verdict, prompts.verdict({"loss": FELL, "relevance": ROSE, "closed": closed}, rows=8)
    )


@pytest.mark.slow
def test_a_model_tuned_on_shuffled_answers_is_not_called_better(smollm2, tmp_path):
    rows = read_jsonl(SAMPLE)
    answers = [row["Response"] for row in rows]
    random.Random(1).shuffle(answers)
    shuffled = tmp_path / "shuffled.jsonl"
    finetune_r1.write_jsonl(
        shuffled, [{**row, "Response": a} for row, a in zip(rows, answers, strict=True)]
    )
    config = TrainConfig(
        model=str(smollm2), **{**DEMO, "dataset": str(shuffled), "max_new_tokens": 1}
    )
    loaded, _ = finetune_r1.train_run(config, run := Run(tmp_path / "run"))
    as_they_were = TrainConfig(
        model=str(smollm2), **DEMO
    )  # the same questions are held out, by the same seed
    held_out = prepare_rows(
        finetune_r1.read_records(as_they_were), loaded.tokenizer, as_they_were
    ).held_out
    report = finetune_r1.evaluate(loaded, run, held_out, [], 0, config)
    assert report["loss"]["high"] < 0, "the style alone lowers the loss"
    assert report["verdict"].startswith(("worse", "can't tell"))
