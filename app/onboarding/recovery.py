"""What is made of a damaged session: everything that can still be read, and nothing else."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from typing_extensions import TypedDict

from app.clock import LAST_MS
from app.onboarding.sessions import SessionStatus


class RecoveryView(TypedDict):
    """What is left of a damaged session, and what is not, by the names of its keys."""

    session_id: str
    status: Literal["error"]
    kept: list[str]
    lost: list[str]


class Found(NamedTuple):
    """What can be read of a session, part by part, whatever else is wrong with it.

    `progress` and `owner` are the fields of its hashes that are text; `progress_is_whole` and
    `owner_is_whole` tell whether they are read as they are. `versions` are those of the steps that
    can be read. `kept` and `lost` name the other keys, without the session's id.
    """

    progress: Mapping[str, str]
    progress_is_whole: bool
    owner: Mapping[str, str]
    owner_is_whole: bool
    versions: Mapping[int, int]
    has_export: bool
    kept: list[str]
    lost: list[str]


class Remains(NamedTuple):
    """What a recovered session consists of.

    `progress` and `owner` are the fields that its hashes are to have, `kept` and `lost` name its
    keys without its id; those that are lost are to be removed.
    """

    progress: dict[str, str]
    owner: dict[str, str]
    kept: list[str]
    lost: list[str]


def plan_recovery(found: Found, *, pin: str, total: int, now_ms: int) -> Remains | None:
    """Make a session of what can be read of it; None when that is nothing.

    `pin` and `total` are those of its catalogue. Its status is `error`. It stays finalized when its
    export can be read and its progress tells since when; else its answers count as in no export.
    """
    kept = [f"step:{number}" for number in sorted(found.versions)] + found.kept
    marks = found.progress.get("saved", "")
    if len(marks) != total or marks.strip("01"):
        marks = ""
    gone = [
        f"step:{number}"
        for number in range(1, total + 1)
        if marks[number - 1 : number] == "1"
        and number not in found.versions
        and f"step:{number}" not in found.lost
    ]
    lost = [*gone, *found.lost]
    was_exported = found.progress.get("revision", "0") != "0"
    is_export_lost = was_exported and not found.has_export
    if is_export_lost and "export" not in lost and found.progress.get("export_lost") != "1":
        lost.append("export")
    saved = "".join("1" if number in found.versions else "0" for number in range(1, total + 1))
    for name, is_whole in (
        ("metadata", found.owner_is_whole),
        ("progress", found.progress_is_whole and marks == saved),
    ):
        (kept if is_whole else lost).append(name)
    if not set(kept) - {"tokens"}:
        # A session of which nothing is left has nothing to open.
        return None

    before = {name: text for name, text in found.progress.items() if _is_count(text)}
    created = before.get("created_at") or found.owner.get("created_at", "")
    created = created if _is_count(created) else str(now_ms)
    finalized = before.get("finalized_at", "") if found.has_export else ""
    # Versions of steps that were deleted go on counting.
    numbered = {name: text for name, text in before.items() if _is_of_step(name, total)}
    highest = max([int(before.get("highest", 0)), *found.versions])
    ever = found.progress.get("ever", "")
    progress = {
        **{name: text for name, text in numbered.items() if name.startswith("v")},
        **{f"v{number}": str(version) for number, version in found.versions.items()},
        **{f"s{number}": numbered.get(f"s{number}", str(now_ms)) for number in found.versions},
        "status": SessionStatus.ERROR.value,
        "saved": saved,
        "ever": ever if len(ever) == total and not ever.strip("01") else saved,
        "highest": str(min(total, highest)),
        "created_at": created,
        "finalized_at": finalized,
        "revision": before.get("revision", "1" if found.has_export else "0"),
        "export_lost": "1" if is_export_lost else "0",
        "catalogue": pin,
        "held": "0" if finalized and before.get("held") == "0" else "1",
        "ended_at": str(now_ms),
        "error_message": "The session was damaged; what could be read of it was kept",
        "reported_at": str(now_ms),
    }
    for name in ("request_count", "total_processing_ms"):
        if name in before:
            progress[name] = before[name]
    owner = {
        **{name: text for name, text in found.owner.items() if name in _OWNER},
        "language": found.owner.get("language") or "en",
        "custom": found.owner.get("custom") or "{}",
        "created_at": created,
    }
    return Remains(progress, owner, kept, lost)


_OWNER = frozenset({"workspace_id", "user_id", "record"})


def _is_count(text: str) -> bool:
    # Nothing that is counted goes further than times do.
    return text.isascii() and text.isdecimal() and len(text) < 16 and int(text) <= LAST_MS


def _is_of_step(name: str, total: int) -> bool:
    number = name[1:]
    return name[:1] in {"v", "s"} and _is_count(number) and 1 <= int(number) <= total
