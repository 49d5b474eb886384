"""The cells of a notebook, in a real Jupyter kernel, as Kaggle and Colab have one."""

import re
import sys

import nbclient
import nbformat
import pytest
from conftest import SAMPLE, SCRIPT


@pytest.fixture
def cells(tmp_path):
    """Runs lines as cells with `!` before them; returns what each of them printed."""

    def run(*lines):
        # What a kernel sets that lives in another environment than the project, as on Kaggle and Colab.
        setting = nbformat.v4.new_code_cell("%env MPLBACKEND=module://of_the_kernel.backend_inline")
        sources = [
            nbformat.v4.new_code_cell(f"!{sys.executable} {SCRIPT} {line}") for line in lines
        ]
        notebook = nbformat.v4.new_notebook(cells=[setting, *sources])
        nbclient.NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()
        return ["".join(output.text for output in cell.outputs) for cell in notebook.cells[1:]]

    return run


def test_the_lines_work_in_a_notebook_and_do_not_flood_it(cells, tiny_r1, tmp_path):
    """Its kernel names a matplotlib backend of its own, which this project's environment lacks."""
    options = (
        f"--model {tiny_r1} --no-wandb --max-seq-length 768 --effective-batch 2 --max-new-tokens 3"
    )
    train = (
        f"train --max-steps 3 {options} --dataset {SAMPLE} --split train[:8] --run-dir runs/cell"
    )
    trained, listed = cells(train, "runs")
    assert "step 00003/00003" in trained and "Traceback" not in trained and "leaked" not in trained
    assert (tmp_path / "runs" / "cell" / "loss.png").stat().st_size > 10_000
    assert len(trained.splitlines()) < 60 and re.search(r"cell +finished", listed)
