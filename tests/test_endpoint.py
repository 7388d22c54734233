"""Endpoints that answer, fail, are late or talk nonsense: asked again where that helps, else named clearly."""

import socket
import sys
import time

import pytest
from openai_server import OpenAIServer

from sami_fast.endpoint import Endpoint, EndpointError, NoAnswerError

pytest.importorskip("openai")


def ask(server, **options):
    endpoint = Endpoint("small-model", server.url, **{"timeout": 10.0, "max_retries": 3} | options)
    return endpoint.complete("Say hello.", max_tokens=7, temperature=0.3, seed=11)


def test_asks_and_answers():
    with OpenAIServer(lambda messages: messages[0]["content"].upper()) as server:
        assert ask(server) == "SAY HELLO."
        assert Endpoint("m", server.url).complete("x", max_tokens=1, temperature=0) == "X"
    first, second = server.requests
    assert first == {
        "model": "small-model",
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 7,
        "temperature": 0.3,
        "seed": 11,
    }
    assert "seed" not in second


def test_busy_and_failing_endpoints_are_asked_again():
    answers = iter([429, 500, 503, "at last"])
    with OpenAIServer(lambda _: next(answers)) as server:
        assert ask(server) == "at last"
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [429, 500])
def test_retries_are_bounded(status):
    with OpenAIServer(lambda _: status) as server, pytest.raises(EndpointError) as error:
        ask(server)
    assert len(server.requests) == 4
    assert str(error.value).startswith(f"small-model: {server.url} answered {status}: ")


def test_refusals_are_not_repeated():
    with OpenAIServer(lambda _: 401) as server, pytest.raises(EndpointError, match=r"answered 401: .*status 401 asked"):
        ask(server)
    assert len(server.requests) == 1


def test_late_answers():
    with (
        OpenAIServer(lambda _: time.sleep(0.6) or "late") as server,
        pytest.raises(EndpointError, match=r"small-model: http.* gave no answer in 0.1 s"),
    ):
        ask(server, timeout=0.1, max_retries=1)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>busy</html>", "out of form"),
        (b'{"choices": []}', "out of form"),
        (b'{"choices": null}', "out of form"),
        (b'{"choices": [{"message": null}]}', "out of form"),
        (b"[1, 2]", "out of form"),
        (b'{"choices": [{"message": {"content": null}}]}', "without text"),
        (" \n", "without text"),
    ],
    ids=repr,
)
def test_answers_out_of_form(answer, message):
    with (
        OpenAIServer(lambda _: answer) as server,
        pytest.raises(EndpointError, match=f"^small-model: .*{message}") as raised,
    ):
        ask(server)
    assert raised.type is (NoAnswerError if message == "without text" else EndpointError)


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(EndpointError, match=r"^m: http.* cannot be reached"):
        Endpoint("m", url, max_retries=0).complete("x", max_tokens=1, temperature=0)


def test_keys(monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(EndpointError, match="m: expected an API key in the environment variable SOME_KEY"):
        Endpoint("m", api_key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "secret")
    Endpoint("m", api_key_env="SOME_KEY")
    with pytest.raises(EndpointError) as error:
        Endpoint("m", "http://127.0.0.1:1/v1", api_key_env="SOME_KEY", max_retries=0).complete(
            "x", max_tokens=1, temperature=0
        )
    assert "secret" not in str(error.value)


def test_bad_arguments_and_a_missing_package(monkeypatch):
    for options, message in (
        ({"timeout": 0}, "timeout"),
        ({"max_retries": -1}, "max_retries"),
        ({"model": ""}, "model"),
    ):
        with pytest.raises(ValueError, match=f"^{message}: expected"):
            Endpoint(**{"model": "m", "base_url": "http://x/v1"} | options)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(EndpointError, match="m: the package openai is not installed; run: pip install openai"):
        Endpoint("m", "http://x/v1")
