import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline import storage
from pipeline.errors import UserError
from pipeline.patience import Patience, retried
from tests.processes import wait_for
from tests.proxy import FaultProxy


def test_brief_trouble_is_waited_for(monkeypatch):
    pauses, answers = [], [ConnectionError("gone"), OSError("AWS Error SLOW_DOWN"), "done"]
    monkeypatch.setattr("pipeline.patience.time.sleep", pauses.append)

    def call() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    patience = Patience()
    assert patience.retried(call) == "done"
    assert pauses == [0.25, 0.5]
    assert patience.retries == 2


def test_threads_share_a_count_and_copies_begin_anew(monkeypatch):
    monkeypatch.setattr("pipeline.patience.time.sleep", lambda seconds: None)
    patience, answers = Patience(7.0), [ConnectionError("gone")] * 40

    def call() -> None:
        if answers:
            raise answers.pop()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(patience.retried, call) for _ in range(8)]:
            done.result()
    assert patience.retries == 40
    copy = pickle.loads(pickle.dumps(patience))
    assert (copy.seconds, copy.retries) == (7.0, 0)


def test_patience_ends_and_mistakes_are_not_waited_for(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("pipeline.patience.time.sleep", pauses.append)

    def gone() -> None:
        raise ConnectionError("gone")

    def wrong() -> None:
        with storage.translated("place"):
            raise FileNotFoundError("place")

    with pytest.raises(ConnectionError):
        Patience(0.0).retried(gone)
    with pytest.raises(UserError, match="place: not found"):
        Patience(0.0).retried(wrong)
    assert pauses == []


def test_who_stays_away_is_named_after_the_set_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pipeline.patience.time.monotonic", lambda: now[0])
    monkeypatch.setattr("pipeline.patience.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    for trouble, words in (
        (ConnectionResetError("by peer"), r"does not answer \(by peer\)"),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject"), "does not answer: check AWS_ENDPOINT_URL"),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during GetObject"), "answers with errors of its own"),
    ):
        began = now[0]

        def away(trouble: OSError = trouble) -> None:
            with storage.translated("s3://bucket/key"):
                raise trouble

        with pytest.raises(UserError, match=rf"^s3://bucket/key: .*{words}.* \(waited 20 s\)$"):
            Patience(20).retried(away)
        assert now[0] - began == pytest.approx(20)


def test_an_upload_whose_end_is_not_known_is_done_again(s3, bucket, monkeypatch):
    with FaultProxy(s3.endpoint) as proxy, ThreadPoolExecutor() as pool:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage.reconnect()
        proxy.set("no_upload", "POST ", "?uploadId")
        written = pool.submit(retried, lambda: storage.write_bytes(f"{bucket}/a", b"x"))
        wait_for("its end", lambda: proxy.counts["no_upload"])
        proxy.set()
        written.result()
        assert storage.read_bytes(f"{bucket}/a") == b"x"
