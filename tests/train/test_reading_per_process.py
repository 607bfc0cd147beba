"""torchrun: each process opens the images of its own rows, and no others."""

import itertools
import os
import subprocess
import sys

import pytest
from conftest import write_dataset

from l2r2_models.data.table import read_table
from l2r2_models.train.batches import EpochBatches

# notes which images this process opens, in order, in a file named by its rank
PROGRAM = """
import os, sys

opened = open(os.path.join(sys.argv.pop(1), os.environ["RANK"]), "w", buffering=1)


def note(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".png"):
        opened.write(os.path.basename(arguments[0]) + chr(10))


sys.addaudithook(note)
from l2r2_cli.commands import main

code = 0
try:
    main()
except SystemExit as end:
    code = end.code or 0
sys.stdout.flush()
sys.stderr.flush()
opened.close()
os._exit(code)  # threads of libraries would run the hook while the interpreter ends, which can abort the process
"""


def rows_of(table, rank, epoch):
    classes = table.classes()
    batches = EpochBatches([classes.index(row.label) for row in table.rows], 4, seed=0, rank=rank, world=2)
    batches.set_epoch(epoch)
    return [table.rows[i].path.name for part in batches for i in part]


def train_with_two(tmp_path, data, program):
    """Two processes train; each writes the files that it opens to opened/RANK."""
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "opened").mkdir()
    settings = dict(epochs=2, batch_size=4, size=32, precision="fp32", best_metric="fused_accuracy")
    options = ["--model", "timm:test_vit", "--no-pretrained", *(f"--set={key}={value}" for key, value in settings.items())]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", tmp_path / "program.py"]
    command = [*torchrun, tmp_path / "opened", "finetune", data, *options, "-o", tmp_path / "run"]
    two = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert two.returncode == 0, two.stderr


@pytest.mark.timeout(600)
def test_no_process_opens_an_image_that_it_does_not_use(tmp_path):
    data = write_dataset(tmp_path / "data", splits=("train", "val"))
    train_with_two(tmp_path, data, PROGRAM)
    table, checked = read_table(data), []
    for rank in (1, 0):
        opened = [name for name, _ in itertools.groupby((tmp_path / "opened" / str(rank)).read_text().split())]
        train, val = table.of_split("train"), [row.path.name for row in table.of_split("val").rows]
        own = [name for start in range(2 * rank, len(val), 4) for name in val[start : start + 2]]  # every other batch of two
        used = [*rows_of(train, rank, 0), *own, *rows_of(train, rank, 1), *own, *own]
        assert opened[len(opened) - len(used) :] == used
        checked.append(opened[: len(opened) - len(used)])
    assert checked[0] == [], "the second process checks nothing"
    assert set(checked[1]) == {row.path.name for row in table.rows}, "the first process checks every image"
