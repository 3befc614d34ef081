import traceback
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.address import StoreAddress, parse_store_url, unix_address, upstash_address


def standalone(host: str = "h", port: int = 6379, **rest: Any) -> StoreAddress:
    return StoreAddress("standalone", nodes=((host, port),), **rest)


UNDERSTOOD: dict[str, StoreAddress] = {
    "redis://h": standalone(),
    " redis://h\n": standalone(),
    "REDIS://h/": standalone(),
    "redis://h:": standalone(),
    "redis://h:6380": standalone(port=6380),
    "redis://h/0": standalone(),
    "redis://h/15": standalone(db=15),
    "redis://h?db=7": standalone(db=7),
    "redis://my_host-1.example.com:65535": standalone("my_host-1.example.com", 65535),
    "redis://127.0.0.1:1": standalone("127.0.0.1", 1),
    "redis://[::1]": standalone("::1"),
    "redis://[2001:db8::1]:7000/2": standalone("2001:db8::1", 7000, db=2),
    "redis://:secret@h": standalone(password="secret"),
    "redis://user:secret@h": standalone(username="user", password="secret"),
    "redis://user@h": standalone(username="user"),
    "redis://@h": standalone(),
    "redis://:@h": standalone(),
    "redis://u%40x:p%3A%2F%3F%23%25%C3%BC@h": standalone(username="u@x", password="p:/?#%ü"),
    "redis://:a@b:c@h": standalone(password="a@b:c"),
    "redis://:50%off+1@h": standalone(password="50%off+1"),
    "redis://h?protocol=2": standalone(options={"protocol": "2"}),
    "valkey://h": standalone(),
    "rediss://h": standalone(tls=True),
    "valkeys://u:p@h:6380/1": standalone(port=6380, db=1, username="u", password="p", tls=True),
    "rediss://h?ssl_ca_certs=/etc/a%20b+c.pem&ssl_cert_reqs=none&ssl_check_hostname=No": standalone(
        tls=True,
        options={
            "ssl_ca_certs": "/etc/a b+c.pem",
            "ssl_cert_reqs": "none",
            "ssl_check_hostname": "false",
        },
    ),
    "unix:///run/valkey.sock": unix_address("/run/valkey.sock"),
    "unix:///a%20b/c d@e.sock?db=3": StoreAddress(
        "standalone", unix_socket="/a b/c d@e.sock", db=3
    ),
    "unix://user:s%2Fcret@/s": StoreAddress(
        "standalone", unix_socket="/s", username="user", password="s/cret"
    ),
    "unix:///s?username=user&password=s%40cret": StoreAddress(
        "standalone", unix_socket="/s", username="user", password="s@cret"
    ),
    "redis+sentinel://a,b:1,[::1]:2/mymaster": StoreAddress(
        "sentinel", nodes=(("a", 26379), ("b", 1), ("::1", 2)), service="mymaster"
    ),
    "redis+sentinel://u:p@a/my%20master/3": StoreAddress(
        "sentinel", nodes=(("a", 26379),), service="my master", db=3, username="u", password="p"
    ),
    "redis+sentinel://a/m/?db=2&ssl=yes&ssl_ca_certs=/c&sentinel_username=u&sentinel_password=p": (
        StoreAddress(
            "sentinel",
            nodes=(("a", 26379),),
            service="m",
            db=2,
            tls=True,
            options={"ssl_ca_certs": "/c", "sentinel_username": "u", "sentinel_password": "p"},
        )
    ),
    "redis+cluster://a": StoreAddress("cluster", nodes=(("a", 6379),)),
    "redis+cluster://u:p@a:1,b/0?ssl=1&ssl_check_hostname=0": StoreAddress(
        "cluster",
        nodes=(("a", 1), ("b", 6379)),
        username="u",
        password="p",
        tls=True,
        options={"ssl_check_hostname": "false"},
    ),
}


@pytest.mark.parametrize("url", UNDERSTOOD)
def test_a_form_is_understood(url: str) -> None:
    assert parse_store_url(url) == UNDERSTOOD[url]


REFUSED = {
    "": "known are redis, rediss",
    "h:6379": "known are redis, rediss",
    "//h": "known are redis, rediss",
    "http://h": "known are redis, rediss",
    "redis:/h": "known are redis, rediss",
    "redis://": "no host",
    "redis:///0": "no host",
    "redis://:secret@": "no host",
    "redis://:6379": "no host",
    "redis://h ost": "no host",
    "redis://a,b": r"redis\+sentinel://",
    "redis://::1": "in brackets",
    "redis://::1:6379": "in brackets",
    "redis://[::1": "in brackets",
    "redis://[::1]x": "in brackets",
    "redis://[h]": "no IPv6 address",
    "redis://h:x": "1 to 65535",
    "redis://h:0": "1 to 65535",
    "redis://h:65536": "1 to 65535",
    "redis://h:-1": "1 to 65535",
    "redis://h:٣": "1 to 65535",
    "redis://h/x": "database is no number",
    "redis://h/-1": "database is no number",
    "redis://h/1/2": "database is no number",
    "redis://h/99999999999": "database is no number",
    "redis://h/1?db=1": "twice",
    "redis://h?db=": "has no value",
    "redis://h?db=1&db=2": "twice",
    "redis://h?socket_timeout=1": "`socket_timeout` is unknown here; known are db, protocol",
    "redis://h?ssl_ca_certs=/c": "rediss://",
    "redis://h?A B=1": "a query parameter is unknown",
    "redis://h?&": "a query parameter is unknown",
    "redis://h?protocol=4": "none of 2, 3",
    "redis://h#0": "%23",
    "redis://:pa#ss@h": "%23",
    "redis://:pa/ss@h": "%2F",
    "redis://:pa?ss@h": "%3F",
    "redis://:pa%FFss@h": "UTF-8",
    "redis://h\x00": "control character",
    "rediss://h?ssl_check_hostname=maybe": "neither true nor false",
    "rediss://h?ssl_cert_reqs=CERT_NONE": "none, optional, required",
    "rediss://h?ssl=false": "`ssl` is unknown here",
    "unix://": "absolute path",
    "unix:///": "absolute path",
    "unix://run/s": "absolute path",
    "unix://:pa/ss@/s": "absolute path",
    "unix:///s?ssl_ca_certs=/c": "unknown here",
    "redis+sentinel://a": "no service",
    "redis+sentinel://a/": "no service",
    "redis+sentinel://a//1": "no service",
    "redis+sentinel://a,/m": "no host",
    "redis+sentinel://a/m/x": "database is no number",
    "redis+sentinel://a/m/1?db=1": "twice",
    "redis+sentinel://a/m?ssl=2": "neither true nor false",
    "redis+sentinel://a/m?ssl_ca_certs=/c": "ssl=true",
    "redis+sentinel://a/m?sentinel_password=a&b=c": "a query parameter is unknown",
    "redis+cluster://": "no host",
    "redis+cluster://a/1": "only database 0",
    "redis+cluster://a?db=0": "unknown here",
    "redis+cluster://a?sentinel_password=p": "unknown here",
    "redis+cluster://a?ssl_certfile=/c&ssl=false": "ssl=true",
}


@pytest.mark.parametrize("url", REFUSED)
def test_a_bad_form_is_refused_with_what_would_be_right(url: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[url]):
        parse_store_url(url)


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("https://h", 6379),
        ("https://h/", 6379),
        ("HTTPS://h", 6379),
        ("rediss://h", 6379),
        ("rediss://h:7000", 7000),
        ("rediss://default:token@h:7000", 7000),
    ],
)
def test_upstash_means_tls_and_the_token_of_the_default_user(url: str, port: int) -> None:
    expected = standalone(port=port, username="default", password="token", tls=True)
    assert upstash_address(url, " token\n") == expected


@pytest.mark.parametrize(
    ("url", "token", "reason"),
    [
        ("http://h", "token", "in the clear"),
        ("redis://h", "token", "in the clear"),
        ("h", "token", "no known form"),
        ("unix:///s", "token", "no known form"),
        ("https://h:443", "token", "takes no port"),
        ("https://", "token", "no host"),
        ("https://h", " ", "token is empty"),
        ("rediss://default:other@h", "token", "another user or password"),
        ("rediss://admin:token@h", "token", "another user or password"),
    ],
)
def test_upstash_refuses_what_is_not_safe_or_not_clear(url: str, token: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        upstash_address(url, token)


def test_an_address_does_not_show_its_secrets() -> None:
    address = parse_store_url("redis+sentinel://hush:secret@a/m?sentinel_password=quiet")
    assert not any(word in repr(address) for word in ("hush", "secret", "quiet"))


SPECIAL = st.text("/?#@:%[]&=, \\\x00\n+ü", max_size=3)


@settings(max_examples=600, deadline=None)
@given(
    form=st.sampled_from(
        [
            "redis://{user}:{password}@{host}:{port}/{end}",
            "rediss://{password}@{host}:{port}?{end}={password}",
            "unix://{user}:{password}@/run/{host}?db={end}",
            "redis+sentinel://{user}:{password}@{host}:{port},{host}/{end}",
            "redis+sentinel://{host}/service/{end}?sentinel_password={password}",
            "redis+cluster://:{password}@{host}:{port}/{end}",
            "https://:{password}@{host}:{port}/{end}",
            "{user}:{password}@{host}:{port}{end}",
        ]
    ),
    joints=st.tuples(SPECIAL, SPECIAL, SPECIAL),
    is_encoded=st.booleans(),
    user=st.sampled_from(["", "default", "x"]),
    port=st.sampled_from(["", "6379", "port", "0"]),
    end=SPECIAL,
)
def test_no_error_quotes_a_password_or_a_host(
    form: str, joints: tuple[str, str, str], is_encoded: bool, user: str, port: str, end: str
) -> None:
    password = f"{joints[0]}hush{joints[1]}quiet{joints[2]}"
    url = form.format(
        user=user,
        password=quote(password, safe="") if is_encoded else password,
        host="zebra",
        port=port,
        end=end,
    )
    for parse in (parse_store_url, lambda text: upstash_address(text, password)):
        try:
            parse(url)
        except ValueError as error:
            # As a log would show it, with what it was raised from.
            shown = "".join(traceback.format_exception(error))
            assert not any(word in shown for word in ("hush", "quiet", "zebra"))
