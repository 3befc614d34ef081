"""Agents in the service as an operator starts it: a bad one, and one that runs when it stops."""

import json
import signal
import time

import pytest

from tests.agents import AGENT
from tests.process.conftest import StartService
from tests.process.service_process import begin_session, linux_only
from tests.service import BASE

pytestmark = linux_only


@pytest.mark.parametrize(
    ("name", "workers"), [("no_such_module:f", "1"), ("tests.agents:fail", "2")]
)
def test_an_agent_that_cannot_be_had_stops_the_start_with_one_line(
    start: StartService, name: str, workers: str
) -> None:
    service = start(ONBOARDING_AGENT=name, WEB_CONCURRENCY=workers)
    assert service.wait_for_exit() == 2
    [line] = service.stderr.splitlines()
    assert "ONBOARDING_AGENT: " in line
    assert "secret" not in line


def test_who_reads_along_is_told_at_once_that_the_service_stops(start: StartService) -> None:
    service = start(ONBOARDING_AGENT=AGENT, ONBOARDING_DRAIN_S="0.3").wait_until_it_answers()
    with service.client() as client:
        session_id = begin_session(client)
        body = {"question": "talk, then wait"}
        with client.stream("POST", f"{BASE}/{session_id}/ask-stream", json=body) as stream:
            lines = (line for line in stream.iter_lines() if line)
            assert [next(lines) for _ in range(4)][2] == "event: chunk"
            service.send(signal.SIGTERM)
            begun_s = time.monotonic()
            kind, data = lines
    assert time.monotonic() - begun_s < 0.3
    assert kind == "event: bye"
    assert json.loads(data.removeprefix("data: ")) == {"type": "bye", "reason": "stopping"}
    assert service.wait_for_exit() == 0
    assert service.leaves_nothing_running()
    assert service.stderr == ""
    assert [line for line in service.lines if line["level"] not in {"info", "debug"}] == []
