"""A fusion is chosen by regret on two kinds of held-out rows; it is never worse than fg, and likelihood breaks ties."""

import pytest
import torch
from conftest import write_run
from typer.testing import CliRunner

from l2r2_cli.commands import app
from l2r2_models.data.table import ImageTable, Row
from l2r2_models.evaluate.choose import choose, lead_alone, references
from l2r2_models.evaluate.fit_run import fit_run
from l2r2_models.evaluate.fuse import Column, Fitted, fit, is_swapped
from l2r2_models.evaluate.logits import BranchLogits
from l2r2_models.fusion import create_fusion


def column(right, nll=1.0, rows=100):
    return Column(right / rows, 0.1, nll, (torch.arange(rows) < right).double())


def candidate(name, plain, swapped, nll=1.0, rows=100):
    columns = {"plain": column(plain, nll, rows), "swapped": column(swapped, nll, rows)}
    return Fitted(create_fusion(name, 2, 3), columns, torch.empty(0, 3))


COMPARED = {
    "full": {"plain": column(80), "swapped": column(20)},
    "fg": {"plain": column(85), "swapped": column(70)},
    "average": {"plain": column(92), "swapped": column(45)},
}


def test_the_smallest_regret_where_it_is_largest_is_chosen():
    found = choose(
        {
            "average": candidate("average", 92, 45),
            "robust": candidate("robust", 89, 69),
            "agreement": candidate("agreement", 85, 70),
        },
        COMPARED,
    )
    assert found.name == "robust"
    assert found.regret["average"] == pytest.approx({"plain": 0.0, "swapped": 0.25})
    assert found.reason.startswith("robust trails") and "3.0 on plain rows and 1.0 on swapped rows" in found.reason


def test_a_fusion_that_loses_to_fg_on_either_column_is_never_chosen():
    """The failure this is for: best on swapped rows, far behind fg on plain ones."""
    losing = candidate("weighted_logits", 76, 90, nll=0.1)
    found = choose({"weighted_logits": losing, "robust": candidate("robust", 85, 70)}, COMPARED)
    assert found.name == "robust" and "1 fusion" in found.reason


@pytest.mark.parametrize(("swapped", "name"), [(696, "agreement"), (680, "robust")])
def test_less_than_a_point_away_may_be_lost_for_more_at_home(swapped, name):
    """However sure the loss: 4 of 1,000 rows, each of which fg has right."""
    compared = {
        n: {c: column(round(1000 * f.accuracy), rows=1000) for c, f in columns.items()} for n, columns in COMPARED.items()
    }
    rows = {n: candidate(n, plain, away, rows=1000) for n, plain, away in (("robust", 850, 700), ("agreement", 910, swapped))}
    assert choose(rows, compared).name == name


def test_where_all_are_right_the_likelihood_decides():
    sure = {name: {"plain": column(100), "swapped": column(100)} for name in COMPARED}
    same = {n: candidate(n, 100, 100, nll) for n, nll in (("robust", 0.3), ("agreement", 0.1), ("average", 0.2))}
    found = choose(same, sure)
    assert found.name == "agreement" and "lowest NLL" in found.reason


def test_one_row_in_a_hundred_is_no_reason_but_ten_are():
    def better(right):
        return choose({"robust": candidate("robust", 85, 70, 0.5), "average": candidate("average", right, 70)}, COMPARED).name

    assert better(86) == "robust" and better(95) == "average"


@pytest.mark.parametrize(("right", "name"), [(99, "fg alone"), (100, "agreement")])
def test_a_fusion_must_be_more_accurate_than_fg_beyond_chance(right, name):
    """A lower NLL is not enough: held-out rows are easy, and branches that agree are more confident."""
    alone = {"plain": column(97, 0.5), "swapped": column(97, 0.5)}
    better = candidate("agreement", right, 97, nll=0.1)
    found = choose(
        {"fg alone": Fitted(create_fusion("robust", 2, 3), alone, torch.empty(0, 3)), "agreement": better},
        {"fg": alone, "full": alone},
    )
    assert found.name == name and ("beyond chance" in found.reason) == (name == "fg alone")


def test_fg_alone_is_calibrated(tmp_path):
    """Its confidence is compared with that of fusions, and shown to users."""
    data = rows(tmp_path, misled=True)
    data.logits["fg"].mul_(10)  # far too confident
    (name, fitted), *_ = lead_alone(data).items()
    assert name == "fg alone" and fitted.columns["plain"].ece < references(data)["fg"]["plain"].ece / 2
    assert fitted.columns["plain"].accuracy == references(data)["fg"]["plain"].accuracy
    again = create_fusion(fitted.fusion.config(), ("full", "fg"), 5)
    again.load_state_dict(fitted.fusion.state_dict())
    again.fit(data.logits["fg"], data.logits["full"][None], data.labels)
    assert again.weight == 1 and again.decided(data.logits["fg"], torch.ones(800)).all()


def rows(tmp_path, misled, seed=0):
    """200 objects as they are and on three other backgrounds each; full names the class at home, and away another one."""
    generator = torch.Generator().manual_seed(seed)
    path = [tmp_path / f"{i}.png" for i in range(200)]
    made = [Row(p) for p in path] + [Row(p, background=Row(tmp_path / "b.png")) for p in path for _ in range(3)]
    labels = torch.cat([torch.arange(200), torch.arange(200).repeat_interleave(3)]) % 5
    away = torch.arange(800) >= 200
    said = torch.where(away & misled, (labels + 1) % 5, labels)
    noise = torch.randn(2, 800, 5, generator=generator)
    logits = {"full": 4 * torch.eye(5)[said] + noise[0], "fg": 2 * torch.eye(5)[labels] + noise[1]}
    return BranchLogits(logits, torch.ones(800, dtype=torch.bool), labels, ImageTable(tmp_path, tuple(made)))


@pytest.mark.parametrize("misled", [False, True])
def test_what_is_chosen_is_no_worse_than_fg_on_rows_of_either_kind(tmp_path, misled):
    data = rows(tmp_path, misled)
    chosen = choose({**fit(data), **lead_alone(data)}, references(data))
    fusion = {**fit(data), **lead_alone(data)}[chosen.name].fusion
    new = rows(tmp_path, misled, seed=1)
    right = (fusion(new.logits["fg"], new.logits["full"][None]).argmax(-1) == new.labels).double()
    fg = (new.logits["fg"].argmax(-1) == new.labels).double()
    away = is_swapped(new)
    assert right[~away].mean() > fg[~away].mean() + (-0.01 if misled else 0.02)  # where full can be believed, it is
    assert right[away].mean() > fg[away].mean() - 0.03


def test_fuse_prints_both_columns_and_its_reason(tmp_path, dataset):
    run = write_run(tmp_path / "run")
    result = CliRunner().invoke(app, ["fuse", str(run), str(dataset)])
    assert result.exit_code == 0, result.output
    assert "plain" in result.output and "swapped" in result.output
    report = fit_run(run, dataset, "val", save=False)
    assert report.reason in result.output and report.backgrounds == "both"
    assert {"fg", "full", "average"} <= set(report.table) and set(report.table["fg"]) == {"plain", "swapped"}
    assert not fit_run(run, dataset, "val", method="robust", save=False).reason
    for backgrounds, warned in (
        ("plain", "on unchanged backgrounds only"),
        ("swapped", "on other backgrounds only"),
        ("both", ""),
    ):
        found = [w for w in fit_run(run, dataset, "val", backgrounds=backgrounds, save=False).warnings if "backgrounds only" in w]
        assert len(found) == bool(warned) and all(warned in w for w in found), backgrounds
