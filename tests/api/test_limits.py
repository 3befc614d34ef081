"""Limits over HTTP."""

from app.api.problems import describe
from app.errors import RateLimitedError


def test_a_refusal_says_when_there_is_room_again() -> None:
    scope = {"type": "http", "raw_path": b"/somewhere"}
    for error, retry_after in [
        (RateLimitedError("Too much; ask again in 17 seconds", 17), "17"),
        (RateLimitedError(), "1"),
    ]:
        response = describe(scope, error)
        assert response.status_code == 429
        assert response.headers.getlist("retry-after") == [retry_after]
