"""Limits: how they are written, what callers are told of them, and who counts as one caller."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.onboarding.limits import (
    Limit,
    Policy,
    Standing,
    caller_of_address,
    describe_refusal,
    digest_caller,
    parse_limit,
)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("600/minute", Limit(600, 60)),
        ("1/second", Limit(1, 1)),
        ("1000000/hour", Limit(1_000_000, 3600)),
        ("10/day", Limit(10, 86_400)),
        ("off", None),
    ],
)
def test_a_limit_is_a_number_per_unit_of_time_or_off(text: str, limit: Limit | None) -> None:
    assert parse_limit(text) == limit


@pytest.mark.parametrize(
    "text",
    [
        *("", "600", "minute", "600/", "/minute", "600/minute/minute", "600 minute", "600/ minute"),
        *("0/minute", "-1/minute", "+1/minute", "06/minute", "1.5/minute", "1e3/minute"),
        *("1000001/minute", "9" * 5000 + "/minute", "600/week", "600/60", "600/Minute"),
        *("OFF", "none", "0", "٦/minute", "600/minute\n", "600/minute, 10/second"),
    ],
)
def test_anything_else_is_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(ValueError, match="such as 600/minute, or off") as refused:
        parse_limit(text)
    assert "second, minute, hour, day" in str(refused.value)


def test_a_refusal_says_what_there_was_too_much_of_and_when_to_come_again() -> None:
    details = {describe_refusal(Standing(policy, Limit(9, 60), 0, 3)) for policy in Policy}
    assert len(details) == len(Policy)
    assert all(detail.endswith("; ask again in 3 seconds") for detail in details)
    soon = Standing(Policy.REQUESTS, Limit(9, 60), 0, 1)
    assert describe_refusal(soon).endswith("; ask again in 1 second")


@pytest.mark.parametrize(
    ("host", "caller"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("::1", "::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::ffff:c000:207", "192.0.2.7"),
        ("unknown", "unknown"),
        ("", "unknown"),
        ("machine:admin-key", "unknown"),
        ("x" * 100_000, "unknown"),
        (None, "local"),
    ],
)
def test_a_caller_is_an_address_or_the_network_that_no_site_has_less_of(
    host: str | None, caller: str
) -> None:
    assert caller_of_address(host) == f"address:{caller}"


@given(network=st.integers(0, 2**64 - 1), hosts=st.lists(st.integers(0, 2**64 - 1), min_size=2))
def test_no_choice_of_an_address_in_its_network_makes_somebody_another_caller(
    network: int, hosts: list[int]
) -> None:
    network |= 1 << 63  # beyond what stands for IPv4
    callers = {caller_of_address(write_ipv6(network << 64 | host)) for host in hosts}
    assert len(callers) == 1
    assert caller_of_address(write_ipv6((network ^ 1) << 64)) not in callers


def write_ipv6(number: int) -> str:
    digits = f"{number:032x}"
    return ":".join(digits[at : at + 4] for at in range(0, 32, 4))


def test_a_digest_tells_callers_apart_and_does_not_name_them() -> None:
    callers = ["user:jane", "user:june", "192.0.2.7", "", "\udcff", "x" * 10_000]
    digests = [digest_caller(caller) for caller in callers]
    assert len({*digests}) == len(callers)
    assert {len(digest) for digest in digests} == {32}
    assert all(set(digest) <= set("0123456789abcdef") for digest in digests)
