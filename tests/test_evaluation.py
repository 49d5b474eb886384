"""Evaluation: base against tuned on rows not trained on, and a verdict that can be bad."""

import dataclasses
import json
import math
import random
import re
import shutil

import filelock
import pytest
from conftest import BOS, EOS, SAMPLE

import finetune_r1
import prompts
from finetune_r1 import (
    DEMO,
    REASONING_PROBLEMS,
    EvalConfig,
    LoadedModel,
    Run,
    SamplingConfig,
    TrainConfig,
    UserError,
    prepare_rows,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)

SHORT = SamplingConfig(max_new_tokens=3, temperature=0)
REST = {"A": "rest", "B": "water"}
FORMS = {"question_col": "q", "cot_col": "why", "response_col": "a"}


@pytest.fixture(scope="module")
def config(tiny_r1):
    return TrainConfig(
        model=str(tiny_r1),
        dataset=str(SAMPLE),
        split="train[8:32]",
        eval_rows=4,
        max_seq_length=768,
    )


@pytest.fixture(scope="module")
def untrained(config, unsloth):
    """The base with an adapter that changes nothing yet."""
    loaded = LoadedModel.load(config)
    loaded.add_adapter(config, kept_layers=loaded.model.config.num_hidden_layers)
    return loaded


@pytest.fixture(scope="module")
def held_out(config, untrained):
    return prepare_rows(finetune_r1.read_records(config), untrained.tokenizer, config).held_out


@pytest.fixture
def run(tiny_run, tmp_path):
    """A run, trained on the sample's first eight rows, with three of the others held out."""
    run = Run(shutil.copytree(tiny_run, tmp_path / "run"))
    write_json(run / "config.json", dataclasses.asdict(run.config) | {"eval_rows": 3})
    write_jsonl(run / "held_out.jsonl", read_jsonl(SAMPLE)[8:11])
    return run


def compared(base, tuned):
    return prompts.compare(base, tuned, seed=1)


# ------------------------------------------------------------------------------------------- losses


def test_losses_are_means_over_the_tokens_they_name(untrained, held_out):
    """By hand, from the model's own logits: of thought and answer, and of the answer alone."""
    import torch

    found, row = finetune_r1.measure_losses(untrained, held_out, "now"), held_out[0]
    with torch.no_grad():
        logits = untrained.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].float()
    learned = range(row["prompt_tokens"], row["tokens"])
    each = [-float(logits[i - 1].log_softmax(-1)[row["input_ids"][i]]) for i in learned]
    closing = f"\n</think>\n{row['answer']}{EOS}"
    answer = len(untrained.tokenizer(closing, add_special_tokens=False)["input_ids"]) - 3
    assert found["loss"][0] == pytest.approx(sum(each) / len(each), abs=1e-3)
    assert found["answer_loss"][0] == pytest.approx(sum(each[-answer:]) / answer, abs=1e-3)


def test_relevance_of_rows_that_only_just_fit_is_measured_on_whole_answers(
    config, untrained, monkeypatch
):
    """A GPU's Unsloth cuts off the end of what is too long, where the answer is."""
    columns = finetune_r1.RECIPE_COLUMNS
    texts = [("Why?", "It is so. " * 60, "So."), ("When?", "Now.", "It is then. " * 60)]
    records = [dict(zip(columns, row, strict=True)) for row in texts]
    records = finetune_r1.datasets.Dataset.from_list(records)
    all_rows = dataclasses.replace(config, eval_rows=0)
    rows = prepare_rows(records, untrained.tokenizer, all_rows).usable
    lengths = []
    hook = untrained.model.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    plain = finetune_r1.measure_losses(untrained, rows, "now")
    assert max(lengths) > max(rows["tokens"])
    lengths.clear()
    monkeypatch.setattr(untrained.model, "max_seq_length", max(rows["tokens"]))
    found = finetune_r1.measure_losses(untrained, rows, "now")
    hook.remove()
    assert max(lengths) == max(rows["tokens"])
    assert found["loss"] == plain["loss"] and found["answer_loss"] == plain["answer_loss"]
    assert all(math.isfinite(value) for values in found.values() for value in values)


def test_general_loss_is_the_mean_of_each_passage_without_a_prompt(untrained, monkeypatch):
    import torch

    found = finetune_r1.measure_losses(untrained, [], "now")["general_loss"]
    passages = [row["text"] for row in read_jsonl(finetune_r1.GENERAL_TEXTS)]
    ids = torch.tensor([untrained.tokenizer(passages[7])["input_ids"]])
    with torch.no_grad():
        scores = untrained.model(input_ids=ids).logits[0, :-1].float()
    by_hand = float(torch.nn.functional.cross_entropy(scores, ids[0, 1:]))
    assert len(found) == 40 and found[7] == pytest.approx(by_hand, abs=1e-3)
    monkeypatch.setattr(untrained.model, "max_seq_length", 50)
    by_hand = float(torch.nn.functional.cross_entropy(scores[:49], ids[0, 1:50]))
    cut = finetune_r1.measure_losses(untrained, [], "now")["general_loss"]
    assert cut[7] == pytest.approx(by_hand, abs=1e-3)


# ----------------------------------------------------------------------------------- one evaluation


def test_evaluate_untrained_adapter_changes_nothing_and_asks_the_base_by_its_chat_template(
    untrained, held_out, run, monkeypatch
):
    rendered, render_prompts = [], finetune_r1.render_prompts

    def noted(*given):
        rendered.append(render_prompts(*given))
        return rendered[-1]

    monkeypatch.setattr(finetune_r1, "render_prompts", noted)
    report = finetune_r1.evaluate(untrained, run, held_out, [], 2, SHORT)
    own = f"{BOS}<｜User｜>{held_out[0]['question']}<｜Assistant｜><think>\n"
    assert sum(own in texts for texts in rendered) == 1
    assert report["verdict"].startswith("can't") and (report["rows"], report["answers"]) == (4, 26)
    for name in ("loss", "answer_loss", "relevance", "general_loss"):
        assert not any(report[name][key] for key in ("difference", "low", "high")), name

    # A base without a template is asked as the tuned model is, so that nothing at all changes.
    monkeypatch.setattr(untrained, "base_template", None)
    report = finetune_r1.evaluate(untrained, run, held_out, [], 2, SHORT, reasoning=False)
    written = (run / "eval.json").read_bytes()
    finetune_r1.evaluate(untrained, run, held_out, [], 2, SHORT, reasoning=False)
    assert (run / "eval.json").read_bytes() == written, "the same again"
    for name, value in report.items():
        if isinstance(value, dict):
            assert not any(value[key] for key in ("difference", "low", "high")), name
    assert report["answers"] == 2 and "reasoning" not in report


def test_evaluate_grades_answers_by_option_and_by_last_number(untrained, run, monkeypatch):
    problems = read_jsonl(REASONING_PROBLEMS)
    numbers = {problem["question"]: problem["answer"] for problem in problems}

    def generate(loaded, questions, config, chat=False):
        answers = []
        for question in questions:
            text = "So it is 7." if chat else f"Of 12, {numbers.get(question)} km."
            if question not in numbers:
                text = "The answer is A." if chat else "The answer is B."
            if question == problems[3]["question"]:
                text = ""  # its thought was never closed
            ended = {"closed": bool(text), "finish_reason": "stop", "tokens": 3, "seconds": 1}
            answers.append({"question": question, "thought": "", "answer": text, **ended})
        return answers

    monkeypatch.setattr(finetune_r1, "generate", generate)
    choices = [
        {"question": "Why <b>so</b>?", "options": REST, "reference": key} for key in "BBBBBBBBBA"
    ]
    report = finetune_r1.evaluate(untrained, run, [], choices, 10, SHORT)
    assert (report["accuracy"]["base"], report["accuracy"]["tuned"]) == (0.1, 0.9)
    sevens = sum(number == 7 for number in numbers.values())
    assert report["reasoning"]["base"] == sevens / 24 and report["reasoning"]["tuned"] == 23 / 24
    assert report["verdict"] == "better: more answers are correct" and "loss" not in report
    pairs = read_json(run / "eval.json")["pairs"]
    assert [pair["reference"] for pair in pairs[9:11]] == ["A", "40"]
    page = (run / "eval.html").read_text()
    assert page.count("<h2>") == 34 and "&lt;b&gt;so&lt;/b&gt;" in page and "<b>so" not in page
    assert "| reasoning kept " in (run / "README.md").read_text() and "Expand all" in page


# --------------------------------------------------------------------------------- the eval command


def test_eval_prints_the_table_that_card_and_page_show(run, run_cli):
    done = run_cli(["eval", "--run", run.folder, "--answers", 2, "--max-new-tokens", 3])
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "On 3 held-out rows: can't tell: at least 8 rows are needed, not 3."
    assert max(map(len, lines)) <= 80
    names = [line.split("|")[1].strip() for line in lines[4:9]]
    measures = ["held-out loss", "relevance", "thoughts closed", "finished by itself"]
    assert names == [*measures, "reasoning kept"]
    for line in lines[4:9]:
        assert re.search(r" [\d.]+%? \| [+-][\d.]+%? \([+-].* to [+-].*\) \|$", line), line
    assert not re.search(r"-0(\.0+)?\b(?!\.)", done.out)
    card, page = (run / "README.md").read_text(), (run / "eval.html").read_text()
    assert done.out.strip() in card and run.name in page
    assert all(f"<tr><td>{name}" in page for name in names)
    assert (run / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_eval_of_other_rows_skips_duplicates_of_training_questions(run, run_cli, tmp_path):
    rows = read_jsonl(SAMPLE)[6:10]
    renamed = [dict(zip(FORMS.values(), row.values(), strict=True)) for row in rows]
    write_jsonl(tmp_path / "mine.jsonl", renamed)
    line = ["eval", "--run", run.folder, "--dataset", tmp_path / "mine.jsonl", "--split"]
    columns = ["--question-col", "q", "--cot-col", "why", "--response-col", "a"]
    done = run_cli([*line, "train", *columns, "--answers", 0, "--json"])
    assert done.code == 0 and json.loads(done.out)["rows"] == 2, done.err
    assert "4 questions, 4 usable, 2 of them not trained on" in done.err
    [report] = run.folder.glob("eval-mine-????.json")
    assert not (run / "eval.json").exists() and report.with_suffix(".html").exists()
    done = run_cli([*line, "train[:2]", *columns])
    assert done.code == 1 and "no question is left" in done.err
    done = run_cli([*line, "train"])
    assert done.code == 1 and "has q, why, a, not Question" in done.err


def test_eval_grades_multiple_choice_and_names_the_rows_it_refuses(run, run_cli, tmp_path):
    trained = read_jsonl(SAMPLE)[1]["Question"]
    rows = [
        {"question": "What widens the anion gap?", "options": REST, "answer_idx": "A"},
        {"question": trained, "options": REST, "answer_idx": "A"},
        {"question": "What is of use?", "options": REST, "answer_idx": "C"},
    ]
    write_jsonl(tmp_path / "choice.jsonl", rows)
    line = ["eval", "--run", run.folder, "--dataset", tmp_path / "choice.jsonl", "--split", "train"]
    done = run_cli([*line, "--max-new-tokens", 3, "--json"])
    report = json.loads(done.out)
    assert report["rows"] == 1 and "loss" not in report
    assert report["unread"]["tuned"] == 1 and report["accuracy"]["tuned"] == 0
    assert "row 2: " in done.err and "3 questions, 2 usable, 1 of them not trained on" in done.err
    assert "| accuracy           |   0.0% |   0.0% | +0.0% (" in (run / "README.md").read_text()
    done = run_cli([*line, "--answers", 0])
    assert done.code == 1 and "no question is left" in done.err
    write_jsonl(tmp_path / "choice.jsonl", [rows[0] | {"answer_idx": 1}])
    done = run_cli(line)
    assert done.code == 1 and "may count from 0 or from 1" in done.err


def test_eval_of_a_locked_run_is_refused_before_anything_is_computed(run, run_cli, monkeypatch):
    monkeypatch.setattr(finetune_r1, "read_records", None)
    with filelock.FileLock(run / ".lock"):
        done = run_cli(["eval", "--run", run.folder])
    assert done.code == 1 and "is locked by another process" in done.err


def test_evaluation_rows_each_set_has_a_report_of_its_own(run):
    def name(**options):
        return finetune_r1.evaluation_rows(run, EvalConfig(**options))[0]

    assert name() == "eval"
    splits = ["train[:20]", "train[20:]", "train[-20:]", "train[:20%]", "train[:2]+train[20:]"]
    names = [name(dataset="my rows.jsonl", split=split) for split in splits]
    assert all(re.fullmatch("eval-my-rows-[0-9a-f]{4}", each) for each in names)
    names += [name(subset="zh"), name(response_col="Short")]
    assert len(set(names)) == len(names), names
    write_json(run / "config.json", dataclasses.asdict(run.config) | {"eval_rows": 0})
    with pytest.raises(UserError, match="no held-out rows"):
        name()


# ------------------------------------------------------------------------------- reasoning problems


def test_reasoning_problems_have_numbers_as_answers_and_four_are_chinese():
    problems = read_jsonl(REASONING_PROBLEMS)
    assert len(problems) == 24 and all(float(problem["answer"]) for problem in problems)
    assert sum("一" <= text["question"][0] <= "鿿" for text in problems) == 4


NUMBERS = {
    "No idea.": None,
    "It takes 3 steps: 42": 42,
    "**1,758 euros**.": 1758,
    r"So \boxed{1{,}758}": 1758,
    r"\[ 1\,758 \text{ km}^2 \]": 1758,
    "3.20.": 3.2,
    "3, 4, 5": 5,
    "about 240km/h": 240,
    "It is −5 °C": -5,
    "40 rolls of CO2, B12 and m^2": 40,
    "星期６": 6,
}


def test_last_number_of_an_answer_is_read():
    assert {answer: prompts.last_number(answer) for answer in NUMBERS} == NUMBERS


# -------------------------------------------------------------------------------------- the verdict

FELL, ROSE = compared([3.0, 3.1, 2.9], [2.0, 2.2, 1.8]), compared([2.0, 2.2, 1.8], [3.0, 3.1, 2.9])
EITHER = compared([1.0, 3.0], [3.0, 1.0])
LONG = compared([0.5] * 3, [0.7] * 3)
FEWER_CLOSED = compared([1.0] * 3, [0.0] * 3)
LEARNED = {"answers": 0, "loss": FELL, "relevance": ROSE}
ANSWERED = LEARNED | {"answers": 3, "closed": EITHER, "thought_length": LONG}


def test_compare_gives_both_means_and_an_interval_that_holds_the_difference():
    assert FELL["base"] == 3 and FELL["tuned"] == 2
    assert FELL["difference"] == pytest.approx(-1)
    assert FELL["low"] <= FELL["difference"] <= FELL["high"] < 0
    assert EITHER["difference"] == 0 and (EITHER["low"], EITHER["high"]) == (-2, 2)
    assert compared([0.0, 0.0, 1.0] * 9, [1.0, 0.0, 1.0] * 9)["low"] > 0


@pytest.mark.parametrize(
    ("measures", "verdict"),
    [
        (LEARNED, "better: held-out loss decreased; answers remain question-specific"),
        (LEARNED | {"relevance": FELL}, "worse: answers are less specific"),  # the style alone
        (LEARNED | {"loss": ROSE}, "worse: held-out loss increased"),
        (LEARNED | {"loss": EITHER}, "can't tell: .* in loss includes 0"),
        (ANSWERED, "better"),
        (ANSWERED | {"closed": FEWER_CLOSED}, "can't tell: .* unclosed or too short"),
        ({"accuracy": ROSE}, "better: more answers are correct$"),
    ],
)
def test_verdict_follows_the_intervals(measures, verdict):
    assert re.match(verdict, prompts.verdict({"rows": 8, **measures}))
    few = prompts.verdict({"rows": 7, **measures})
    assert few == "can't tell: at least 8 rows are needed, not 7"


@pytest.mark.parametrize(("words", "verdict"), [(40, "better: "), (1, "can't .* too short")])
def test_verdict_on_a_training_that_unlearned_to_think_is_not_better(words, verdict):
    pair = {"question": "Why?", "reference": "So.", "thought": "so " * 60}
    for side in prompts.SIDES:
        answer = {"answer": "So.", "closed": True, "finish_reason": "stop", "seconds": 1}
        pair[side] = answer | {"thought": "so " * words}
        finetune_r1.grade(pair[side], pair)
    losses = {}
    for side, loss in (("base", 3.0), ("tuned", 2.0)):
        losses[side] = {"loss": [loss] * 9, "relevance": [1.0] * 9}
    report = prompts.build_report(losses, [pair] * 9, 9, seed=1)
    assert re.match(verdict, report["verdict"])


@pytest.mark.parametrize(
    ("general", "solved", "ending"),
    [
        (0.08, 21, "question-specific"),
        (0.2, 22, "question-specific; general text is predicted worse"),
        (0.0, 8, "question-specific; reasoning lost: fewer problems solved"),
    ],
)
def test_verdict_says_what_was_lost_elsewhere(general, solved, ending):
    before = {"loss": [3.0] * 9, "relevance": [0.5] * 9, "general_loss": [2.0, 3.0] * 20}
    after = before | {"loss": [2.0] * 9, "general_loss": [2.0 + general, 3.0 + general] * 20}
    answer = {"closed": True, "thought_length": 1.0}
    problems = []
    for number in range(24):
        base, tuned = answer | {"reasoning": number < 22}, answer | {"reasoning": number < solved}
        problems.append({"base": base, "tuned": tuned})
    report = prompts.build_report({"base": before, "tuned": after}, problems, 9, seed=1)
    assert report["verdict"].startswith("better: ") and report["verdict"].endswith(ending)
    line = f"| reasoning kept     |    92% | {solved / 24:6.0%} | {(solved - 22) / 24:+.0%} ("
    assert line in prompts.as_report(report)


def test_report_counts_thoughts_of_held_out_rows_apart_from_reasoning_problems():
    row = {"closed": True, "thought_length": 1.0}
    problem = {"closed": False, "reasoning": False}
    pairs = [{"base": row, "tuned": row}] * 9 + [{"base": problem, "tuned": problem}] * 24
    report = prompts.build_report(
        {"base": {"loss": [1.0] * 9}, "tuned": {"loss": [0.5] * 9}}, pairs, 9, seed=1
    )
    assert report["closed"]["tuned"] == 1.0 and report["reasoning"]["tuned"] == 0.0


@pytest.mark.slow
def test_evaluate_model_tuned_on_shuffled_answers_is_not_called_better(smollm2, tmp_path):
    rows = read_jsonl(SAMPLE)
    answers = [row["Response"] for row in rows]
    random.Random(1).shuffle(answers)
    shuffled = tmp_path / "shuffled.jsonl"
    write_jsonl(shuffled, [{**row, "Response": a} for row, a in zip(rows, answers, strict=True)])
    settings = {**DEMO, "dataset": str(shuffled), "max_new_tokens": 1}
    config = TrainConfig(model=str(smollm2), **settings)
    loaded, _ = finetune_r1.train_run(config, run := Run(tmp_path / "run"))
    as_they_were = TrainConfig(model=str(smollm2), **DEMO)  # the same seed holds the same rows out
    records = finetune_r1.read_records(as_they_were)
    held_out = prepare_rows(records, loaded.tokenizer, as_they_were).held_out
    report = finetune_r1.evaluate(loaded, run, held_out, [], 0, config)
    assert report["loss"]["high"] < 0, "the style alone lowers the loss"
    assert report["verdict"].startswith(("worse", "can't tell"))
