"""Photos and predictions in an object store: a simulated S3 on loopback, through pyarrow's own client."""

import os
import urllib.request

import pytest
from conftest import sentence, write_dataset
from pyarrow import parquet

from l2r2_models import L2R2Error, Predictor
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file
from l2r2_models.scale import read_table
from l2r2_models.scale.places import Place

server = pytest.importorskip("moto.server")


@pytest.fixture
def bucket(monkeypatch):
    """URL of an empty bucket."""
    store = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    address = "http://{}:{}".format(*store.get_host_and_port())
    settings = {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    urllib.request.urlopen(urllib.request.Request(f"{address}/photos", method="PUT")).close()
    yield "s3://photos"
    store.stop()


def upload(folder, url):
    for file in sorted(folder.iterdir()):
        Place.of(f"{url}/{file.name}").write(file.read_bytes())


def one_process(run, folder, url, out, **options):
    """Rows of the same images in a folder of this machine, under their names in the store."""
    predictor = Predictor.from_pretrained(run, device="cpu", workers=0, **options)
    predict_to_file(predictor, gather([folder]).without_boxes(), out)
    rows = parquet.read_table(out).to_pylist()
    for row in rows:
        row["file"] = row["file"].replace(str(folder), url)
        row["failure"] = row["failure"] and row["failure"].replace(str(folder), url)
    return rows


def test_objects_are_listed_read_written_and_deleted(bucket):
    for name in ("cam/b.jpg", "cam/a.jpg", "cam/.hidden.jpg", "cam/notes.txt"):
        Place.of(f"{bucket}/{name}").write(name.encode())
    folder = Place.of(f"{bucket}/cam")
    images = list(folder.images())
    assert [(str(place), size) for place, (size, _) in images] == [(f"{bucket}/cam/a.jpg", 9), (f"{bucket}/cam/b.jpg", 9)]
    assert images[0][0].read() == b"cam/a.jpg" and all(state[1] > 0 for _, state in images)
    images[0][0].delete()
    assert [str(place) for place, _ in folder.images()] == [f"{bucket}/cam/b.jpg"]
    with pytest.raises(L2R2Error, match=r"s3://photos/cam/a\.jpg: no such file"):
        images[0][0].read()
    with pytest.raises(L2R2Error, match=r"s3://nowhere/a\.jpg: cannot be written"):
        Place.of("s3://nowhere/a.jpg").write(b"1")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_bucket_is_predicted_into_a_bucket_and_continued(l2r2, bucket, run, tmp_path):
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_worker_niceness", "0")
    images = write_dataset(tmp_path / "data", count=20) / "images"
    (images / "bad.jpg").write_bytes(b"text")
    upload(images, f"{bucket}/2026")
    command = ["predict", run, f"{bucket}/2026", "--localizer", "center", "-o", f"{bucket}/out", "--engine", "ray"]
    ray.init("local", num_cpus=1, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    try:
        result = l2r2(*command)
    finally:
        ray.shutdown()
    assert result.returncode == 1 and "21 images" in result.stdout and "1 failed" in result.stdout, result.stderr
    expected = one_process(run, images, f"{bucket}/2026", tmp_path / "one.parquet", localizer="center")
    assert read_table(f"{bucket}/out").to_pylist() == expected
    assert "1 of them from before" in l2r2(*command).stdout  # without an engine: nothing is left to do
    assert "different localizer" in sentence(l2r2(*command[:3], *command[5:]))
