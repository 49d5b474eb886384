"""The benchmarks run, in a short form, on a CPU with a tiny model."""

import json
import subprocess
import sys

import pytest
from conftest import SCRIPT

BENCH = SCRIPT.parent / "tests" / "bench"


def run(name, *options):
    done = subprocess.run(
        [sys.executable, BENCH / name, *map(str, options)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [[], ["--new-tokens", "8"]])
def test_speed_of_training_and_decoding(decoding):
    said = run("speed.py", "--small", "--variants", "recipe", *decoding)
    *lines, last = said.splitlines()
    [measured] = [json.loads(line) for line in lines if line.startswith("{")]
    assert measured["variant"] == "recipe" and measured["s_per_step"] > 0
    assert last.split()[0] == "recipe" and last.split()[-3:] == ["1.00x", "1.00x", "0.0000"]
    assert said.count(" at once, up to 8 tokens: plain ") == (2 if decoding else 0)


@pytest.mark.slow
def test_nothing_is_lost_by_signals_at_random_moments(tiny_r1):
    said = run(
        "survive.py", "kills", "soak", "--times", 3, "--only", "infer --file", "--model", tiny_r1
    )
    assert said.count("killed after") == 3 and said.count("lost: 0") == 2


@pytest.mark.slow
def test_a_leak_is_not_scored_and_an_empty_thought_is_refused(tiny_r1, tmp_path):
    """The other damages are run_cli from an honest training by a model that can learn."""
    options = ["--only", "thoughts-empty,leaked", "--steps", 1, "--model", tiny_r1]
    said = run("damage.py", *options, "--out", tmp_path / "damage.json")
    empty, leaked = json.loads((tmp_path / "damage.json").read_text())
    assert "0 usable rows of 84" in empty["verdict"] and leaked["verdict"].startswith("not scored")
    assert leaked["left out"] == 12 and said.endswith("2 runs, 0 ended as they must not: none\n")


@pytest.mark.slow
def test_the_recipes_are_compared_on_the_same_rows_at_equal_compute(tiny_r1, tmp_path):
    options = ["--seeds", 1, "--visits", 16, "--only", "published,thorough", "--model", tiny_r1]
    said = run("recipes.py", *options, "--out", tmp_path / "recipes.json")
    published, thorough = json.loads((tmp_path / "recipes.json").read_text())
    assert published["rows"] == thorough["rows"] == 20
    assert (
        published["loss"][0] == thorough["loss"][0] and published["loss"][1] != thorough["loss"][1]
    )
    assert [line.split()[0] for line in said.splitlines()[-2:]] == ["published", "thorough"]
