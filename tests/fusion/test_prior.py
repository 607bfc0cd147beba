"""Metadata priors against closed forms, and their files."""

import math

import pytest
import torch

from l2r2_models import L2R2Error
from l2r2_models.fusion import MetadataPrior, PriorColumn
from l2r2_models.fusion.prior_file import read_prior, write_prior

LABELS = ("a", "b", "c")
TRUTH = ["a", "a", "b", "b", "b", "c"]
HABITAT = ["wet", "wet", "wet", "dry", "dry", "dry"]
IMAGE = torch.tensor([[0.2, 0.5, 0.3]])


def rows(**columns):
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def fitted(smoothing=1.0, joint=False, **columns):
    return MetadataPrior.of_rows(LABELS, TRUTH, rows(**columns), list(columns), smoothing=smoothing, joint=joint)


def normalized(values):
    return values / values.sum()


def given(counts, smoothing=1.0):
    overall = (torch.tensor([2.0, 3, 1]) + smoothing) / (6 + 3 * smoothing)
    return (torch.tensor(counts) + 3 * smoothing * overall) / (sum(counts) + 3 * smoothing), overall


@pytest.mark.parametrize("smoothing", [0.5, 1.0, 4.0])
def test_it_is_bayes_rule_on_smoothed_counts(smoothing):
    of_value, overall = given([2.0, 1.0, 0.0], smoothing)
    found = fitted(smoothing, habitat=HABITAT)(IMAGE.log(), [{"habitat": "wet"}])
    torch.testing.assert_close(found.exp()[0], normalized(IMAGE[0] * of_value / overall))


@pytest.mark.parametrize("row", [{"habitat": "never seen"}, {"habitat": ""}, {"habitat": " "}, {}, {"other": "wet"}])
def test_missing_and_unseen_values_change_nothing(row):
    for joint in (False, True):
        found = fitted(joint=joint, habitat=HABITAT)(IMAGE.log(), [row])
        torch.testing.assert_close(found.exp(), IMAGE)


def test_independent_columns_multiply_and_a_joint_one_counts_the_combination():
    month = ["5", "5", "6", "5", "6", "6"]
    wet, overall = given([2.0, 1.0, 0.0])
    may, _ = given([2.0, 1.0, 0.0])
    row = [{"habitat": "wet", "month": "5"}]
    found = fitted(habitat=HABITAT, month=month)(IMAGE.log(), row)
    torch.testing.assert_close(found.exp()[0], normalized(IMAGE[0] * wet / overall * may / overall))
    together, _ = given([2.0, 0.0, 0.0])
    prior = fitted(joint=True, habitat=HABITAT, month=month)
    torch.testing.assert_close(prior(IMAGE.log(), row).exp()[0], normalized(IMAGE[0] * together / overall))
    alone = prior(IMAGE.log(), [{"habitat": "wet"}])  # without the month, the habitat alone
    torch.testing.assert_close(alone.exp()[0], normalized(IMAGE[0] * wet / overall))


def test_a_circular_month_counts_its_neighbors_across_the_turn_of_the_year():
    prior = MetadataPrior.of_rows(LABELS, TRUTH, rows(month=["12", "12", "3", "3", "3", "6"]), ["month:12"])
    of_january, overall = given([1.0, 0.0, 0.0])  # both December rows at half weight; March is two months away
    found = prior(IMAGE.log(), [{"month": "1"}, {"month": "12"}, {"month": "13"}, {"month": "9"}, {"month": "May"}]).exp()
    torch.testing.assert_close(found[0], normalized(IMAGE[0] * of_january / overall))
    of_december, _ = given([2.0, 0.0, 0.0])
    torch.testing.assert_close(found[1], normalized(IMAGE[0] * of_december / overall))
    torch.testing.assert_close(found[2], found[0])
    torch.testing.assert_close(found[3:], IMAGE.expand(2, 3))  # nothing near September; "May" is no number
    assert PriorColumn("day", 365).weight("364", "2") == pytest.approx(1 - 3 / (365 / 6))


def test_no_probability_becomes_zero_and_no_evidence_is_overruled_by_a_single_row():
    many = 10_000
    prior = MetadataPrior.of_rows(
        LABELS, ["a"] * many + ["b", "c"], rows(site=["x"] * many + ["y", "y"]), ["site"], smoothing=0.1
    )
    found = prior(torch.zeros(2, 3), [{"site": "x"}, {"site": "y"}]).exp()
    assert (found > 0).all() and found.isfinite().all()
    torch.testing.assert_close(found.sum(-1), torch.ones(2))


def test_the_file_gives_the_same_prior_also_for_other_orders_and_more_classes(tmp_path):
    prior = MetadataPrior.of_rows(LABELS, TRUTH, rows(h=HABITAT, m=list("556565")), ["h", "m:12"], smoothing=0.5, joint=True)
    write_prior(tmp_path / "p.json", prior, {"split": "train"})
    row = [{"h": "wet", "m": "6"}]
    torch.testing.assert_close(read_prior(tmp_path / "p.json", LABELS)(IMAGE.log(), row), prior(IMAGE.log(), row))
    turned = read_prior(tmp_path / "p.json", LABELS[::-1])(IMAGE.flip(-1).log(), row).flip(-1)
    torch.testing.assert_close(turned, prior(IMAGE.log(), row))
    more = read_prior(tmp_path / "p.json", (*LABELS, "never counted"))(torch.zeros(1, 4), row)
    assert more.isfinite().all() and more.exp()[0, 3] > 0
    with pytest.raises(L2R2Error, match='fitted with the class "c"'):
        read_prior(tmp_path / "p.json", ("a", "b"))


@pytest.mark.parametrize(
    "text", ["{}", "[1]", '{"prior_version": "1", "columns": ["h"], "rows": [{"values": ["x", "y"], "counts": {}}]}']
)
def test_another_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(L2R2Error, match="is not a metadata prior"):
        read_prior(tmp_path / "p.json", LABELS)


def test_invalid_settings_are_refused():
    with pytest.raises(L2R2Error, match="got 1 for 6 rows"):
        MetadataPrior.of_rows(LABELS, TRUTH, [{}], ["h"])
    with pytest.raises(L2R2Error, match="must be positive"):
        fitted(smoothing=0, h=HABITAT)
    with pytest.raises(L2R2Error, match='"wet" is not a number'):
        MetadataPrior.of_rows(LABELS, TRUTH, rows(h=HABITAT), ["h:12"])
    for text in ("month:", ":12", "month:-1", "month:x", ""):
        with pytest.raises(L2R2Error, match="is not a column"):
            PriorColumn.parse(text)
    with pytest.raises(L2R2Error, match="at least one"):
        MetadataPrior.of_rows(LABELS, TRUTH, rows(h=HABITAT), [])


def test_the_likelihood_is_that_of_the_labels_given_the_metadata():
    of_value, _ = given([2.0, 1.0, 0.0])
    likelihood = fitted(habitat=HABITAT).log_likelihood(["a", "unknown"], rows(habitat=["wet", "wet"]))
    assert likelihood == pytest.approx(math.log(of_value[0]), abs=1e-6)
