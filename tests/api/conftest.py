"""What the tests of the HTTP interface may ask for beside the common fixtures."""

import pytest
from httpx2 import AsyncClient

from tests.api.helpers import FINALIZE, answer_of, save


@pytest.fixture
async def finalized_id(api: AsyncClient, session_id: str) -> str:
    """Finalize a session with step 1 saved and give its id."""
    await save(api, session_id)
    answer_of(await FINALIZE.send(api, session_id))
    return session_id
