"""Without network access, the cache answers at once."""

import socket

import pytest
from huggingface_hub import constants

from l2r2_models import L2R2Error, load_checkpoint
from l2r2_models.data.table import read_table
from l2r2_models.offline import cache_if_offline


@pytest.fixture
def online(monkeypatch):
    """As on a user's machine: requests are allowed, there is no proxy, and `online(known)` decides which names resolve."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def names(known):
        def resolve(host, *_):
            asked.append(host)
            if not known:
                raise socket.gaierror(-2, "Name or service not known")
            return []

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        return asked

    return names


def test_a_checkpoint_of_the_hub_is_one_sentence_and_no_request_is_repeated(online, capfd):
    asked = online(known=False)
    with pytest.raises(L2R2Error, match="no such folder, and the Hub cannot be reached; download it once with `hf download"):
        load_checkpoint("hf-hub:somebody/some-model")
    assert len(asked) == 1 and "Retrying" not in capfd.readouterr().err  # only our own look at the name
    assert constants.HF_HUB_OFFLINE is False


def test_a_data_set_of_the_hub_is_one_sentence_and_no_request_is_repeated(online, capfd):
    asked = online(known=False)
    with pytest.raises(L2R2Error, match=r"hf:somebody/some-data: cannot be loaded .* the first call needs network access"):
        read_table("hf:somebody/some-data")
    assert len(asked) == 1 and "Retrying" not in capfd.readouterr().err


@pytest.mark.parametrize("proxy", [False, True])
def test_nothing_changes_where_the_hub_may_be_reached(online, monkeypatch, proxy):
    online(known=not proxy)
    if proxy:
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with cache_if_offline():
        assert constants.HF_HUB_OFFLINE is False
