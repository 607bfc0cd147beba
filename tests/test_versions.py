"""The versions that a run records."""

from importlib.metadata import PackageNotFoundError

import l2r2_models.versions
from l2r2_models.runs import surroundings


def test_a_package_without_metadata_is_of_unknown_version(monkeypatch):
    """As where the package runs from a source folder: a training used to fail at its very end."""

    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(l2r2_models.versions, "version", version)
    assert surroundings()["versions"]["l2r2-models"] == "unknown"
