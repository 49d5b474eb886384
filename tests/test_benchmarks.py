"""The benchmarks run, in a short form, on a CPU with a tiny model."""

import json
import subprocess
import sys

import pytest
from conftest import SCRIPT

BENCH = SCRIPT.parent / "tests" / "bench"


def run(name, *options):
    command = [sys.executable, BENCH / name, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_speed_small_prints_training_decoding_and_choices(tmp_path):
    out = tmp_path / "speed.json"
    measured = ["--answers", 8, "--choices", 8, "--new-tokens", 8, "--out", out]
    said = run("speed.py", "--small", *measured)
    found = json.loads(out.read_text())
    ours, recipe = found["training"]
    assert ours["losses"] == pytest.approx(recipe["losses"], abs=0.005)
    assert ours["micro_batch"] == 8 and recipe["micro_batch"] == 2
    assert found["decoding"]["ours"]["paces"].keys() == {"1", "32"}
    assert found["choices"]["report"]["answers"] == 8
    assert ["recipe", "1.00x"] in [line.split()[:3:2] for line in said.splitlines()]


@pytest.mark.slow
def test_two_gpus_small_has_the_losses_of_one_process_and_resumes():
    _, *lines, resumed = run("two_gpus.py", "--small").splitlines()  # the first is Unsloth's
    assert [line.split()[:3:2] for line in lines] == [["one", "0"], ["two", "0"], ["two", "1"]]
    assert all(
        float(line.split()[-1]) < 0.005 for line in [*lines, resumed.removesuffix(" at most")]
    )


@pytest.mark.slow
def test_three_lines_tiny_end_well_and_ask_nobody_else(tmp_path):
    said = run("three_lines.py", "--tiny", "--work", tmp_path / "work", "--ram", tmp_path / "ram")
    phases = json.loads((tmp_path / "work" / "state.json").read_text())["phases"]
    assert all(phase["ok"] for phase in phases.values()), said
    assert said.endswith("left: check-old\n")


@pytest.mark.slow
def test_survive_kills_and_soak_lose_nothing(tiny_r1):
    options = ["--times", 3, "--only", "infer --file", "--model", tiny_r1]
    said = run("survive.py", "kills", "soak", *options)
    assert said.count("killed after") == 3 and said.count("lost: 0") == 2


@pytest.mark.slow
def test_damage_that_leaks_is_not_scored_and_empty_thoughts_are_refused(tiny_r1, tmp_path):
    """Only a model that can learn tells the other kinds from an honest training."""
    out = tmp_path / "damage.json"
    options = ["--only", "thoughts-empty,leaked", "--steps", 1, "--model", tiny_r1]
    said = run("damage.py", *options, "--out", out)
    empty, leaked = json.loads(out.read_text())
    assert "0 usable rows of 84" in empty["verdict"] and leaked["verdict"].startswith("not scored")
    assert leaked["skipped"] == 12 and said.endswith("2 runs, not allowed: none\n")


@pytest.mark.slow
def test_recipes_are_compared_on_the_same_rows(tiny_r1, tmp_path):
    out = tmp_path / "recipes.json"
    options = ["--seeds", 1, "--visits", 16, "--only", "published,thorough", "--model", tiny_r1]
    said = run("recipes.py", *options, "--out", out)
    published, thorough = json.loads(out.read_text())
    assert published["rows"] == thorough["rows"] == 20
    assert published["loss"][0] == thorough["loss"][0]
    assert published["loss"][1] != thorough["loss"][1]
    assert [line.split()[0] for line in said.splitlines()[-2:]] == ["published", "thorough"]
