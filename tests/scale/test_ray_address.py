"""`--address`: a cluster that does not answer is one sentence, and soon."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from l2r2_models import L2R2Error
from l2r2_models.scale import engine

pytest.importorskip("ray")


@pytest.fixture
def closed():
    """A port where nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        yield one.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("command", ["predict", "localize", "evaluate", "audit"])
def test_nothing_listens_at_the_address(l2r2, dataset, run, tmp_path, closed, command, scheme):
    what = {"predict": [run, dataset, "-o", tmp_path / "o"], "localize": [dataset, "--localizer", "center", "-o", tmp_path / "o"]}
    arguments = [command, *what.get(command, [run, dataset, "--split", "test"]), "--engine", "ray"]
    result = l2r2(*arguments, "--address", f"{scheme}127.0.0.1:{closed}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"Error: Invalid value: {scheme}127.0.0.1:{closed}: no Ray cluster answers here; check --address")
    assert not (tmp_path / "o").exists()


def test_a_host_that_never_answers(monkeypatch):
    monkeypatch.setattr(engine, "PATIENCE", 0.2)
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for one in (first, second):  # they fill the queue, so that the next one waits
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        with pytest.raises(L2R2Error, match="no Ray cluster answers here"):
            engine.check_address(f"127.0.0.1:{full.getsockname()[1]}")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])  # silence, and Ray's dashboard
def test_what_answers_is_no_cluster(monkeypatch, answer):
    monkeypatch.setattr(engine, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        held = []
        thread = threading.Thread(target=lambda: (held.append(server.accept()[0]), held[0].sendall(answer)))
        thread.start()
        with pytest.raises(L2R2Error, match="no Ray cluster answers here"):
            engine.check_address(address)
        thread.join()
        held[0].close()


def test_a_server_of_grpc_is_left_to_ray():
    grpc = pytest.importorskip("grpc")
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    for scheme in ("", "ray://"):
        engine.check_address(f"{scheme}127.0.0.1:{port}")
    server.stop(None)


def test_the_variable_of_ray_is_checked_too(monkeypatch, closed):
    monkeypatch.setenv("RAY_ADDRESS", f"localhost:{closed}")
    with pytest.raises(L2R2Error, match="no Ray cluster answers here"), engine.connected():
        pass


@pytest.mark.parametrize("address", ["auto", "local", "head"])
def test_an_address_without_a_port_is_left_to_ray(address):
    engine.check_address(address)


@pytest.mark.parametrize("address", ["head:port", "ray://head:99999", f"{'x' * 70}.org:1", "[::1"])
def test_an_address_that_is_none(address):
    with pytest.raises(L2R2Error, match=r"is not the address of a Ray cluster|no Ray cluster answers here"):
        engine.check_address(address)
