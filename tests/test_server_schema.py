"""The OpenAPI document as schemathesis takes it at its word: random requests of every operation, good and bad.

No answer is a fault of the server's, and every answer is one that the document tells of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("schemathesis", reason="schemathesis is not installed")

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from sfumato.pipeline import Pipeline
from sfumato.server import a1111, controlnet, openai
from sfumato.server.app import create_app
from sfumato.server.desk import Desk, Settings
from sfumato.server.keys import Limits

from .served import served

EXAMPLES = 4  # of each operation, good ones and bad ones each
HELD = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.fixture(scope="module")
def document(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    """The document of a server with all doors, whose limits let only small jobs be drawn."""
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", adapters=[])
    limits = Limits(requests=10**9, pixels=32 * 32, steps=4, count=2, waiting=50)
    desk = Desk(pipeline, Settings(tmp_path_factory.mktemp("schema") / "data", limits=limits))
    app = create_app(desk, routers=[a1111.router, controlnet.router, openai.router], grace=0.0)
    with served(app) as port:
        found = schemathesis.openapi.from_dict(app.openapi())
        found.config.update(base_url=f"http://127.0.0.1:{port}")
        yield found


def test_every_answer_is_one_that_is_told_of(document: schemathesis.BaseSchema) -> None:
    answered: Counter[int] = Counter()
    wrong: list[str] = []
    few = settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    for operation in (each.ok() for each in document.get_all_operations()):

        def holds(case: schemathesis.Case) -> None:
            answer = case.call(timeout=60)
            answered[answer.status_code // 100] += 1
            try:
                case.validate_response(answer, checks=HELD)
            except FailureGroup as found:
                wrong.extend(f"{case.operation.label}: {each}" for each in found.exceptions)

        for mode in GenerationMode:
            with suppress(Unsatisfiable):  # nothing about some operations can be wrong
                few(given(case=operation.as_strategy(generation_mode=mode))(holds))()
    assert not wrong, "\n\n".join(wrong)
    assert answered[2] > 20 and answered[4] > 20 and set(answered) <= {2, 3, 4}, answered
