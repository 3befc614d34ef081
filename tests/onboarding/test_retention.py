"""What ends a session before its lifetime, as tables; what is left of a damaged one."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.errors import InvalidRequestError
from app.onboarding.recovery import Remains, plan_recovery
from app.onboarding.retention import (
    HOUR_MS,
    LONGEST_AGE_HOURS,
    LONGEST_INTERVAL_S,
    MOST_SESSIONS,
    SHORTEST_INTERVAL_S,
    DeleteReason,
    ExpiryRule,
    SessionFacts,
    Since,
    Terms,
    check_config,
    parse_expiry_rules,
    plan_cleanup,
    plan_expiry,
    terms_of,
)
from app.onboarding.sessions import SessionStatus
from app.settings import SettingsError, load_settings
from app.store.files import write_info
from app.store.keys import Keys
from app.store.recovery import read_parts
from tests.store.sessions import describe

PENDING, PROCESSING = SessionStatus.PENDING, SessionStatus.PROCESSING
COMPLETE, ERROR = SessionStatus.COMPLETE, SessionStatus.ERROR

NOW_MS = 1_769_847_300_250

DESCRIBED = """[
    {"status": "error", "older_than_hours": 1, "since": "ended"},
    {"status": "complete", "older_than_hours": 6, "since": "ended"},
    {"older_than_hours": 24}
]"""
"""Failed ones after an hour, completed ones after six, any after a day."""


def rule(hours: float, status: SessionStatus | None = None, since: str = "created") -> ExpiryRule:
    return ExpiryRule(status=status, older_than_hours=hours, since=Since(since))


def hours_ago(hours: float) -> int:
    return int(NOW_MS - hours * HOUR_MS)


def facts(
    status: SessionStatus = PENDING,
    *,
    created: float = 0,
    ended: float | None = None,
    activity: float = 0,
    held: bool = False,
    session_id: str = "s",
) -> SessionFacts:
    """Describe a session by how many hours ago things happened to it."""
    return SessionFacts(
        session_id,
        status,
        held,
        hours_ago(created),
        None if ended is None else hours_ago(ended),
        hours_ago(activity),
    )


class TestWhichSessionsARuleEnds:
    @pytest.mark.parametrize(
        ("ending", "session", "is_due"),
        [
            # Any status, from the creation on: what came after it does not matter.
            (rule(24), facts(created=24), True),
            (rule(24), facts(created=25, activity=0), True),
            (rule(24), facts(PROCESSING, created=25), True),
            (rule(24), facts(COMPLETE, created=25, ended=0), True),
            (rule(24), facts(ERROR, created=25, ended=0), True),
            (rule(24), facts(created=23.999), False),
            (rule(24), facts(COMPLETE, created=23, ended=30, activity=30), False),
            # From the end of the generation on, which a session must have come to.
            (rule(1, ERROR, "ended"), facts(ERROR, created=90, ended=1), True),
            (rule(1, ERROR, "ended"), facts(ERROR, created=90, ended=0.999), False),
            (rule(1, ERROR, "ended"), facts(ERROR, created=90), False),
            (rule(1, ERROR, "ended"), facts(COMPLETE, created=90, ended=90), False),
            (rule(1, ERROR, "ended"), facts(PENDING, created=90), False),
            (rule(6, COMPLETE, "ended"), facts(COMPLETE, created=6, ended=6), True),
            (rule(6, COMPLETE, "ended"), facts(COMPLETE, created=90, ended=5.999), False),
            (rule(2, None, "ended"), facts(ERROR, ended=2), True),
            (rule(2, None, "ended"), facts(COMPLETE, ended=2), True),
            (rule(2, None, "ended"), facts(PENDING, created=90, activity=90), False),
            # From the last accepted write on.
            (rule(3, None, "activity"), facts(created=90, activity=3), True),
            (rule(3, None, "activity"), facts(created=90, activity=2.999), False),
            (rule(3, PROCESSING, "activity"), facts(PROCESSING, created=90, activity=4), True),
            (rule(3, PROCESSING, "activity"), facts(PENDING, created=90, activity=4), False),
            # At once, and never.
            (rule(0), facts(created=0), True),
            (rule(0, COMPLETE, "ended"), facts(COMPLETE, ended=0), True),
            (rule(0), facts(created=-1), False),
            (rule(LONGEST_AGE_HOURS), facts(created=LONGEST_AGE_HOURS - 1), False),
            (rule(0.5), facts(created=0.5), True),
            (rule(0.5), facts(created=0.49), False),
        ],
    )
    def test_is_told_by_status_and_age(
        self, ending: ExpiryRule, session: SessionFacts, is_due: bool
    ) -> None:
        expected = {"s": ending} if is_due else {}
        assert plan_expiry([ending], [session], NOW_MS) == expected
        held = session._replace(is_held=True)
        assert plan_expiry([ending], [held], NOW_MS) == {}

    def test_begins_at_the_very_millisecond(self) -> None:
        born = facts(created=0)
        at_ms = born.created_ms + HOUR_MS
        assert plan_expiry([rule(1)], [born], at_ms - 1) == {}
        assert plan_expiry([rule(1)], [born], at_ms) == {"s": rule(1)}

    def test_is_told_by_the_first_rule_that_says_so(self) -> None:
        first, second, third = parse_expiry_rules(DESCRIBED)
        sessions = [
            facts(ERROR, created=30, ended=2, session_id="failed, also a day old"),
            facts(ERROR, created=30, ended=0.5, session_id="failed just now, a day old"),
            facts(ERROR, created=3, ended=0.5, session_id="failed just now"),
            facts(COMPLETE, created=7, ended=6, session_id="completed"),
            facts(COMPLETE, created=23, ended=5, session_id="completed lately"),
            facts(PROCESSING, created=24, session_id="a day old"),
            facts(PENDING, created=23, session_id="young"),
        ]
        assert plan_expiry([first, second, third], sessions, NOW_MS) == {
            "failed, also a day old": first,
            "failed just now, a day old": third,
            "completed": second,
            "a day old": third,
        }
        by_another_order = plan_expiry([third, first], sessions, NOW_MS)
        assert by_another_order["failed, also a day old"] == third

    def test_are_none_without_a_rule_and_none_without_a_session(self) -> None:
        assert plan_expiry([], [facts(created=10_000)], NOW_MS) == {}
        assert plan_expiry([rule(0)], [], NOW_MS) == {}

    def test_may_come_as_iterators_that_can_be_read_once(self) -> None:
        sessions = [facts(created=2, session_id="1"), facts(created=2, session_id="2")]
        assert plan_expiry(iter([rule(1)]), iter(sessions), NOW_MS).keys() == {"1", "2"}

    @given(
        rules=st.lists(
            st.builds(
                rule,
                st.floats(0, LONGEST_AGE_HOURS),
                st.sampled_from([None, *SessionStatus]),
                st.sampled_from(list(Since)),
            )
        ),
        sessions=st.lists(
            st.builds(
                facts,
                st.sampled_from(list(SessionStatus)),
                created=st.floats(0, 10_000),
                ended=st.none() | st.floats(0, 10_000),
                activity=st.floats(0, 10_000),
                held=st.booleans(),
                session_id=st.uuids().map(str),
            )
        ),
    )
    def test_never_hold_answers_that_were_never_exported_and_always_meet_the_terms(
        self, rules: list[ExpiryRule], sessions: list[SessionFacts]
    ) -> None:
        by_id = {each.session_id: each for each in sessions}
        due = plan_expiry(rules, sessions, NOW_MS)
        for session_id, ending in due.items():
            session, terms = by_id[session_id], terms_of(ending, NOW_MS)
            assert not session.is_held
            assert terms.spares_held
            assert not terms.statuses or session.status in terms.statuses
            assert terms.since is not None
            moment_ms = session.moment_ms(terms.since)
            assert moment_ms is not None
            assert moment_ms <= terms.before_ms
        for session_id in by_id.keys() - due.keys():
            for ending in rules:
                assert plan_expiry([ending], [by_id[session_id]], NOW_MS) == {}


@pytest.mark.parametrize(
    ("ending", "terms"),
    [
        (rule(1), Terms((), Since.CREATED, NOW_MS - HOUR_MS, spares_held=True)),
        (
            rule(0.5, ERROR, "ended"),
            Terms((ERROR,), Since.ENDED, NOW_MS - HOUR_MS // 2, spares_held=True),
        ),
        (rule(0, None, "activity"), Terms((), Since.ACTIVITY, NOW_MS, spares_held=True)),
    ],
)
def test_what_must_hold_for_a_rule_is_what_the_rule_says(ending: ExpiryRule, terms: Terms) -> None:
    assert terms_of(ending, NOW_MS) == terms


class TestRulesAsText:
    def test_the_described_ones(self) -> None:
        assert parse_expiry_rules(DESCRIBED) == (
            rule(1, ERROR, "ended"),
            rule(6, COMPLETE, "ended"),
            rule(24),
        )

    @pytest.mark.parametrize(
        ("text", "rules"),
        [
            ("[]", ()),
            (' [ {"older_than_hours": 0} ] ', (rule(0),)),
            ('[{"older_than_hours":1.5,"since":"activity"}]', (rule(1.5, None, "activity"),)),
            ('[{"status":null,"older_than_hours":2}]', (rule(2),)),
            (
                '[{"status":"pending","older_than_hours":876000}]',
                (rule(LONGEST_AGE_HOURS, PENDING),),
            ),
        ],
    )
    def test_good_ones(self, text: str, rules: tuple[ExpiryRule, ...]) -> None:
        assert parse_expiry_rules(text) == rules

    @pytest.mark.parametrize(
        ("text", "where"),
        [
            ("", ""),
            ("no JSON", ""),
            ("[", ""),
            ("{}", "/"),
            ("1", "/"),
            ("null", "/"),
            ('"[]"', "/"),
            ('{"older_than_hours": 1}', "/"),
            ("[1]", "/0"),
            ("[{}]", "/0/older_than_hours"),
            ('[{"older_than_hours": 1}, {"older_than_hours": -1}]', "/1/older_than_hours"),
            ('[{"older_than_hours": "1"}]', "/0/older_than_hours"),
            ('[{"older_than_hours": true}]', "/0/older_than_hours"),
            ('[{"older_than_hours": null}]', "/0/older_than_hours"),
            ('[{"older_than_hours": NaN}]', ""),
            ('[{"older_than_hours": 876000.5}]', "/0/older_than_hours"),
            ('[{"older_than_hours": 1e400}]', ""),
            ('[{"older_than_hours": 1, "status": "done"}]', "/0/status"),
            ('[{"older_than_hours": 1, "status": "Error"}]', "/0/status"),
            ('[{"older_than_hours": 1, "status": ["error"]}]', "/0/status"),
            ('[{"older_than_hours": 1, "since": "updated"}]', "/0/since"),
            ('[{"older_than_hours": 1, "since": null}]', "/0/since"),
            ('[{"older_than_hours": 1, "older": 1}]', "/0/older"),
        ],
    )
    def test_bad_ones_are_answered_with_what_would_be_right(
        self, text: str, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = '{"status": "error", "older_than_hours": 1, "since": "ended"}'
        with pytest.raises(ValueError, match="a JSON list of rules such as") as raised:
            parse_expiry_rules(text)
        message = str(raised.value)
        assert right in message
        assert where in message
        assert "\n" not in message
        parse_expiry_rules(f"[{right}]")

        if not text:
            return
        monkeypatch.setenv("ONBOARDING_EXPIRY_RULES", text)
        with pytest.raises(SettingsError) as refused:
            load_settings()
        assert str(refused.value) == f"ONBOARDING_EXPIRY_RULES: {message}"

    def test_the_settings_have_those_of_the_environment_and_none_out_of_the_box(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert load_settings().expiry_rules == ()
        assert load_settings().session_ttl_s == 7 * 86_400
        monkeypatch.setenv("ONBOARDING_EXPIRY_RULES", "")
        assert load_settings().expiry_rules == ()
        monkeypatch.setenv("ONBOARDING_EXPIRY_RULES", DESCRIBED)
        assert load_settings().expiry_rules == parse_expiry_rules(DESCRIBED)

    @pytest.mark.parametrize(
        ("variable", "value"),
        [
            ("ONBOARDING_MAX_SESSIONS", "-1"),
            ("ONBOARDING_MAX_SESSIONS", "many"),
            ("ONBOARDING_MAX_SESSIONS", "1000000001"),
            ("ONBOARDING_CAPACITY_POLICY", "evict"),
            ("ONBOARDING_CLEANUP_INTERVAL_S", "0"),
            ("ONBOARDING_CLEANUP_INTERVAL_S", "nan"),
            ("ONBOARDING_CLEANUP_INTERVAL_S", "inf"),
            ("ONBOARDING_CLEANUP_INTERVAL_S", "31536001"),
        ],
    )
    def test_other_settings_of_the_life_of_sessions_are_refused_by_their_variable(
        self, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(variable, value)
        with pytest.raises(SettingsError, match=f"^{variable}: "):
            load_settings()

    @given(
        st.lists(
            st.builds(
                rule,
                st.floats(0, LONGEST_AGE_HOURS),
                st.sampled_from([None, *SessionStatus]),
                st.sampled_from(list(Since)),
            )
        )
    )
    def test_come_back_as_they_were_written(self, rules: list[ExpiryRule]) -> None:
        text = json.dumps([each.model_dump(mode="json") for each in rules])
        assert parse_expiry_rules(text) == tuple(rules)

    def test_cannot_be_changed_afterwards(self) -> None:
        (fixed,) = parse_expiry_rules('[{"older_than_hours": 1}]')
        with pytest.raises(ValidationError):
            fixed.older_than_hours = 2


class TestWhichSessionsACleanUpIsAbout:
    @pytest.mark.parametrize(
        ("status", "hours", "everything", "terms"),
        [
            (ERROR, None, False, Terms((ERROR,))),
            (None, 0, False, Terms((), Since.CREATED, NOW_MS)),
            (None, 1.5, False, Terms((), Since.CREATED, NOW_MS - HOUR_MS * 3 // 2)),
            (COMPLETE, 6, False, Terms((COMPLETE,), Since.CREATED, NOW_MS - 6 * HOUR_MS)),
            (None, None, True, Terms()),
            (None, LONGEST_AGE_HOURS, False, Terms((), Since.CREATED, NOW_MS - 876_000 * HOUR_MS)),
            # All of a status is a status.
            (PENDING, None, True, Terms((PENDING,))),
            (None, 1, True, Terms((), Since.CREATED, NOW_MS - HOUR_MS)),
        ],
    )
    def test_is_said_by_its_filters(
        self, status: SessionStatus | None, hours: float | None, everything: bool, terms: Terms
    ) -> None:
        planned = plan_cleanup(status, hours, NOW_MS, everything=everything)
        assert planned == terms
        assert not planned.spares_held

    def test_must_be_said(self) -> None:
        with pytest.raises(InvalidRequestError, match="older_than_hours"):
            plan_cleanup(None, None, NOW_MS, everything=False)

    @pytest.mark.parametrize("hours", [-0.001, LONGEST_AGE_HOURS + 1, float("nan"), float("inf")])
    def test_is_not_said_by_an_age_that_there_is_not(self, hours: float) -> None:
        with pytest.raises(InvalidRequestError, match="0 to 876000"):
            plan_cleanup(None, hours, NOW_MS, everything=False)


class TestConfig:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"max_sessions": 0},
            {"max_sessions": MOST_SESSIONS},
            {"max_sessions": None},
            {"cleanup_interval_s": SHORTEST_INTERVAL_S},
            {"cleanup_interval_s": LONGEST_INTERVAL_S},
            {"cleanup_interval_s": 60},
            {"cleanup_interval_s": None},
            {"max_sessions": 5, "cleanup_interval_s": 0.5},
        ],
    )
    def test_what_may_be_set_comes_back(self, changes: dict[str, Any]) -> None:
        assert check_config(changes) == changes

    @pytest.mark.parametrize(
        ("changes", "pointers"),
        [
            ({"max_sessions": -1}, {"/max_sessions"}),
            ({"max_sessions": MOST_SESSIONS + 1}, {"/max_sessions"}),
            ({"max_sessions": 1.0}, {"/max_sessions"}),
            ({"max_sessions": "5"}, {"/max_sessions"}),
            ({"max_sessions": True}, {"/max_sessions"}),
            ({"cleanup_interval_s": 0}, {"/cleanup_interval_s"}),
            ({"cleanup_interval_s": 0.099}, {"/cleanup_interval_s"}),
            ({"cleanup_interval_s": LONGEST_INTERVAL_S + 1}, {"/cleanup_interval_s"}),
            ({"cleanup_interval_s": float("nan")}, {"/cleanup_interval_s"}),
            ({"cleanup_interval_s": float("inf")}, {"/cleanup_interval_s"}),
            ({"cleanup_interval_s": "60"}, {"/cleanup_interval_s"}),
            ({"capacity_policy": "refuse"}, {"/capacity_policy"}),
            (
                {"max_sessions": "x", "cleanup_interval_s": -1, "b": 1},
                {"/max_sessions", "/cleanup_interval_s", "/b"},
            ),
        ],
    )
    def test_what_may_not_is_refused_by_its_name(
        self, changes: dict[str, Any], pointers: set[str]
    ) -> None:
        with pytest.raises(InvalidRequestError) as refused:
            check_config(changes)
        assert {fault["pointer"] for fault in refused.value.faults} == pointers
        for pointer in pointers:
            assert pointer[1:] in refused.value.detail


@pytest.mark.parametrize(
    ("reason", "event"),
    [
        (DeleteReason.REQUEST, "deleted"),
        (DeleteReason.CLEANUP, "deleted"),
        (DeleteReason.UNREADABLE, "deleted"),
        (DeleteReason.ERASURE, "deleted"),
        (DeleteReason.RULE, "expired"),
        (DeleteReason.LIFETIME, "expired"),
        (DeleteReason.CAPACITY, "evicted"),
    ],
)
def test_why_a_session_went_tells_what_the_feed_says(reason: DeleteReason, event: str) -> None:
    assert reason.event == event


# --- Recovery -------------------------------------------------------------------------------------

Found = dict[str, Any]
"""What stands under the keys of a session: bytes for a string, a dict for a hash."""

PIN, TOTAL = "p1", 5

STREAM = object()
WRONG_TYPE = None
"""Stands for a key of a type that none of ours has."""


def named(found: object) -> str:
    """Name what was found, the same in every process."""
    return "a stream" if found is STREAM else repr(found)


def step_text(number: int, version: int = 1, **other: Any) -> bytes:
    record = {"step_id": number, "version": version, "saved_at": "2026-01-31T08:15:00.250Z"}
    return orjson.dumps({**record, "data": {"a": number}, **other})


def body(transfer: str) -> dict[bytes, bytes]:
    flat = [str(part).encode() for part in write_info(describe(transfer, b"a"))]
    return dict(zip(flat[::2], flat[1::2], strict=True))


def whole() -> Found:
    """Give what is found of a session that is whole: finalized, steps 1 and 3 saved, 2 deleted."""
    created, at = b"1769840000000", b"1769841000000"
    return {
        "metadata": {
            b"created_at": created,
            b"language": b"pt-BR",
            b"custom": b'{"source":"test"}',
            b"workspace_id": b"w\xc3\xa9",
            b"user_id": b"u1",
            b"record": b"onboarding:idem:0a",
        },
        "progress": {
            b"status": b"complete",
            b"saved": b"10100",
            b"ever": b"11100",
            b"held": b"0",
            b"highest": b"4",
            b"created_at": created,
            b"updated_at": at,
            b"deadline": b"1770500000000",
            b"finalized_at": at,
            b"ended_at": at,
            b"revision": b"2",
            b"changes": b"9",
            b"catalogue": PIN.encode(),
            b"v1": b"3",
            b"s1": at,
            b"v2": b"5",
            b"s2": at,
            b"v3": b"1",
            b"s3": at,
        },
        "events": STREAM,
        "ops": {b"turn": b"1"},
        "step:1": step_text(1, 3),
        "step:3": step_text(3),
        "export": b'{"version":"2.0","steps":{},"checksum":"sha256:' + b"0" * 64 + b'"}',
        "result": body("r"),
        "upload": body("u"),
    }


def recover(found: Found) -> Remains | None:
    parts: dict[str, tuple[bytes, Any]] = {}
    for name, value in found.items():
        match value:
            case bytes():
                parts[name] = (b"string", value)
            case dict():
                parts[name] = (b"hash", [text for pair in value.items() for text in pair])
            case _:
                parts[name] = (b"stream", []) if value is STREAM else (b"list", b"")
    readable = read_parts(Keys(hash_tag=False).session("s"), parts)
    return plan_recovery(readable, pin=PIN, total=TOTAL, now_ms=NOW_MS)


def recovered(found: Found) -> Remains:
    remains = recover(found)
    assert remains is not None
    check_shape(remains)
    return remains


def check_shape(remains: Remains) -> None:
    """Whatever was found, what is written can be read again and contradicts itself nowhere."""
    progress = remains.progress
    assert progress["status"] == "error"
    assert progress["error_message"]
    saved = [number for number, mark in enumerate(progress["saved"], start=1) if mark == "1"]
    assert not progress["saved"].strip("01")
    assert saved == [
        int(name.removeprefix("step:")) for name in remains.kept if name.startswith("step:")
    ]
    for number in saved:
        assert int(progress[f"v{number}"]) >= 1
        assert int(progress[f"s{number}"]) >= 0
    for name in ("highest", "created_at", "revision", "ended_at", "reported_at"):
        assert progress[name].isascii()
        assert int(progress[name]) >= 0
    assert max(saved, default=0) <= int(progress["highest"]) <= len(progress["saved"])
    assert progress["finalized_at"].isascii()
    assert progress["finalized_at"] == "" or progress["finalized_at"].isdecimal()
    assert progress["held"] in ("0", "1")
    assert progress["catalogue"]
    assert isinstance(orjson.loads(remains.owner["custom"]), dict)
    assert remains.owner["language"]
    assert not set(remains.kept) & set(remains.lost)


def unmarked(lost: list[str]) -> list[str]:
    """Leave out the progress, which marks a step that is not there any more."""
    return [name for name in lost if name != "progress"]


class TestWhatIsLeftOfASession:
    def test_that_is_whole_is_everything_and_its_status_is_error(self) -> None:
        remains = recovered(whole())
        assert sorted(remains.kept) == [
            *("events", "export", "metadata", "progress", "result"),
            *("step:1", "step:3", "upload"),
        ]
        assert remains.lost == []
        before = {name.decode(): text.decode() for name, text in whole()["progress"].items()}
        kept = [
            *("saved", "highest", "created_at", "finalized_at", "revision", "catalogue", "held"),
            *("v1", "s1", "v3", "s3"),
        ]
        assert {name: remains.progress[name] for name in kept} == {n: before[n] for n in kept}
        assert remains.progress["ended_at"] == str(NOW_MS)
        assert remains.owner == {
            name.decode(): text.decode() for name, text in whole()["metadata"].items()
        }

    def test_goes_on_with_the_versions_of_deleted_steps(self) -> None:
        assert recovered(whole()).progress.get("v2") == "5"

    def test_still_knows_which_steps_were_ever_saved(self) -> None:
        assert recovered(whole()).progress.get("ever") == "11100"

    @pytest.mark.parametrize(
        "damage",
        [
            b"",
            b"hello",
            b"\x93NUMPY\x01\x00\xff",
            b"null",
            b"[]",
            b"{}",
            step_text(1, 3)[:-1],
            step_text(1, 3) * 2,
            step_text(2, 3),
            step_text(1, 0),
            step_text(1, -1),
            orjson.dumps({"step_id": 1, "version": "3", "saved_at": "x", "data": {"a": 1}}),
            orjson.dumps({"step_id": 1, "version": 1.5, "saved_at": "x", "data": {"a": 1}}),
            orjson.dumps({"step_id": 1, "version": 3, "saved_at": "x", "data": [1]}),
            orjson.dumps({"step_id": 1, "version": 3, "saved_at": "x", "data": None}),
            orjson.dumps({"step_id": 1, "version": 3, "saved_at": "x"}),
            {b"step_id": b"1"},
            WRONG_TYPE,
        ],
        ids=named,
    )
    def test_is_all_but_the_step_that_cannot_be_read(self, damage: object) -> None:
        remains = recovered({**whole(), "step:1": damage})
        assert unmarked(remains.lost) == ["step:1"]
        assert remains.progress["saved"] == "00100"
        assert "s1" not in remains.progress
        assert remains.progress["highest"] == "4"

    @pytest.mark.parametrize(
        "unlike_ours",
        [
            orjson.dumps({"step_id": 1, "version": True, "saved_at": "x", "data": {"a": 1}}),
            orjson.dumps({"step_id": True, "version": 3, "saved_at": "x", "data": {"a": 1}}),
            orjson.dumps({"step_id": 1, "version": 3, "data": {"a": 1}}),
            orjson.dumps({"step_id": 1, "version": 3, "saved_at": 7, "data": {"a": 1}}),
            orjson.dumps({"data": {"a": 1}, "step_id": 1, "version": 3, "saved_at": "x"}),
            step_text(1, 3)[:-1] + b',"foreign":1}',
        ],
        ids=named,
    )
    def test_has_no_step_that_a_look_at_it_would_not_read(self, unlike_ours: bytes) -> None:
        remains = recovered({**whole(), "step:1": unlike_ours})
        assert unmarked(remains.lost) == ["step:1"]

    def test_is_all_but_the_step_that_is_gone(self) -> None:
        found = whole()
        del found["step:3"]
        remains = recovered(found)
        assert unmarked(remains.lost) == ["step:3"]
        assert remains.progress["saved"] == "10000"

    def test_has_a_step_too_that_nobody_had_marked(self) -> None:
        remains = recovered({**whole(), "step:5": step_text(5, 8)})
        assert "step:5" in remains.kept
        assert remains.progress["saved"] == "10101"
        assert (remains.progress["v5"], remains.progress["highest"]) == ("8", "5")

    @pytest.mark.parametrize("damage", [{}, b"hello", STREAM, WRONG_TYPE, "gone"], ids=named)
    def test_whose_progress_is_lost_is_read_off_the_steps(self, damage: object) -> None:
        found = {**whole(), "progress": damage}
        if damage == "gone":
            del found["progress"]
        remains = recovered(found)
        assert remains.lost == ["progress"]
        progress = remains.progress
        assert progress["saved"] == "10100"
        assert (progress["v1"], progress["v3"], progress["highest"]) == ("3", "1", "3")
        assert (progress["s1"], progress["s3"]) == (str(NOW_MS), str(NOW_MS))
        assert progress["created_at"] == "1769840000000"
        assert progress["catalogue"] == PIN
        # There is an export, of which nobody knows what it holds.
        assert (progress["finalized_at"], progress["revision"]) == ("", "1")
        assert progress["held"] == "1"
        assert "export" in remains.kept

    @pytest.mark.parametrize(
        ("field", "text"),
        [
            (b"status", b"done"),
            (b"saved", b"10x00"),
            (b"saved", b""),
            (b"highest", b"-1"),
            (b"highest", b"many"),
            (b"created_at", b"yesterday"),
            (b"revision", b"1.5"),
            (b"changes", b""),
            (b"deadline", b"\xff\xfe"),
            (b"updated_at", b"\xd9\xa3"),
            (b"created_at", b"\xd9\xa3"),
            (b"finalized_at", b"\xd9\xa3"),
            (b"v1", b"x"),
            (b"s1", b"x"),
            (b"s1", b"\xd9\xa3"),
            (b"catalogue", b""),
        ],
    )
    def test_has_a_progress_that_can_be_read_whatever_was_wrong_with_one_field(
        self, field: bytes, text: bytes
    ) -> None:
        remains = recovered({**whole(), "progress": {**whole()["progress"], field: text}})
        assert remains.lost in ([], ["progress"])
        assert {"step:1", "step:3", "metadata", "export"} <= set(remains.kept)

    @pytest.mark.parametrize("field", sorted(whole()["progress"]))
    def test_has_a_progress_that_can_be_read_whichever_field_was_gone(self, field: bytes) -> None:
        progress = whole()["progress"]
        del progress[field]
        remains = recovered({**whole(), "progress": progress})
        assert {"step:1", "step:3", "metadata", "export"} <= set(remains.kept)
        assert remains.progress["saved"] == "10100"

    @pytest.mark.parametrize("damage", [{}, b"hello", STREAM, WRONG_TYPE, "gone"], ids=named)
    def test_whose_metadata_is_lost_belongs_to_nobody(self, damage: object) -> None:
        found = {**whole(), "metadata": damage}
        if damage == "gone":
            del found["metadata"]
        remains = recovered(found)
        assert remains.lost == ["metadata"]
        assert remains.owner == {
            "language": "en",
            "custom": "{}",
            "created_at": "1769840000000",
        }

    @pytest.mark.parametrize(
        ("field", "text", "owner"),
        [
            (b"custom", b"[]", {"custom": "{}", "language": "pt-BR", "user_id": "u1"}),
            (b"custom", b"{", {"custom": "{}", "language": "pt-BR", "user_id": "u1"}),
            (b"custom", b"\xff", {"custom": "{}", "language": "pt-BR", "user_id": "u1"}),
            (b"language", b"", {"custom": '{"source":"test"}', "language": "en"}),
            (b"language", b"\xff", {"custom": '{"source":"test"}', "language": "en"}),
        ],
    )
    def test_keeps_of_damaged_metadata_what_can_be_read(
        self, field: bytes, text: bytes, owner: dict[str, str]
    ) -> None:
        remains = recovered({**whole(), "metadata": {**whole()["metadata"], field: text}})
        assert remains.lost == ["metadata"]
        assert owner.items() <= remains.owner.items()
        assert remains.owner["workspace_id"] == "wé"

    @pytest.mark.parametrize(
        "damage",
        [b"", b"hello", b"{}", b"[]", b'{"checksum":1', {}, STREAM, WRONG_TYPE],
        ids=named,
    )
    def test_whose_export_is_lost_is_open_again_and_its_answers_count_as_never_exported(
        self, damage: object
    ) -> None:
        remains = recovered({**whole(), "export": damage})
        assert remains.lost == ["export"]
        assert remains.progress["finalized_at"] == ""
        assert remains.progress["held"] == "1"
        assert remains.progress["revision"] == "2"

    def test_that_was_saved_again_after_its_export_counts_as_never_exported(self) -> None:
        progress = {**whole()["progress"], b"finalized_at": b"", b"held": b"1"}
        assert recovered({**whole(), "progress": progress}).progress["held"] == "1"

    @pytest.mark.parametrize("name", ["result", "upload", "events", "ops"])
    @pytest.mark.parametrize("damage", [b"hello", WRONG_TYPE], ids=named)
    def test_is_all_but_what_has_another_type(self, name: str, damage: object) -> None:
        remains = recovered({**whole(), name: damage})
        assert remains.lost == [name]
        assert {"step:1", "step:3", "metadata", "progress", "export"} <= set(remains.kept)

    @pytest.mark.parametrize("damage", [b"hello", b"{}", {}, WRONG_TYPE], ids=named)
    def test_is_all_but_the_draft_that_cannot_be_read(self, damage: object) -> None:
        assert recovered({**whole(), "draft:2": damage}).lost == ["draft:2"]

    @pytest.mark.parametrize(
        "found",
        [
            {},
            {"ops": {b"turn": b"1"}},
            {"metadata": {}, "progress": {}},
            {"metadata": WRONG_TYPE, "progress": b"x"},
            {"step:1": b"x", "export": b"x", "result": b"x", "events": b"x"},
            {"progress": {b"saved": b"111"}},
        ],
        ids=named,
    )
    def test_is_nothing_when_nothing_can_be_read(self, found: Found) -> None:
        assert recover(found) is None

    @pytest.mark.parametrize("name", sorted({*whole()} - {"ops", "progress"}))
    def test_is_any_part_that_can_be_read_alone(self, name: str) -> None:
        remains = recovered({name: whole()[name]})
        assert remains.kept == [name]
        assert set(remains.lost) == {"metadata", "progress"} - {name}

    @given(
        st.dictionaries(
            st.sampled_from([*whole(), "step:2", "draft:1"]),
            st.one_of(
                st.none(),
                st.just(STREAM),
                st.binary(max_size=8),
                st.sampled_from([step_text(1), step_text(2, 7), step_text(3)]),
                st.dictionaries(
                    st.sampled_from([*whole()["progress"], *whole()["metadata"], b"\xff"]),
                    st.sampled_from([b"", b"1", b"\xff", b"10101", b"{}", b"x", b"99"]),
                ),
            ),
        )
    )
    def test_is_always_a_session_that_can_be_read(self, damage: Found) -> None:
        remains = recover({**whole(), **damage})
        if remains is not None:
            check_shape(remains)
