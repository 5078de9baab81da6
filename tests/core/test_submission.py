"""Submissions: a known field in the wrong object is refused with the place where it belongs."""

import pytest

from tpo.core.errors import InvalidInputError
from tpo.core.state import EarlyStop
from tpo.jobs.submission import Submit, SubmitParameters
from tpo.openai.requests import ChatRequest

BODY = {"input": "Hello"}


@pytest.mark.parametrize("name", SubmitParameters.model_fields)
def test_parameter_next_to_input_names_its_place(name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{name}: belongs under parameters$"):
        Submit.model_validate({**BODY, name: 1})


@pytest.mark.parametrize("name", EarlyStop.model_fields)
def test_early_stop_field_names_its_place(name: str) -> None:
    for body, found in (({name: 1}, name), ({"parameters": {name: 1}}, f"parameters.{name}")):
        with pytest.raises(InvalidInputError, match=f"^{found}: belongs under parameters.early_stop$"):
            Submit.model_validate({**BODY, **body})


@pytest.mark.parametrize("name", Submit.model_fields)
def test_body_field_under_parameters_names_its_place(name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^parameters.{name}: belongs in the body, next to input$"):
        Submit.model_validate({**BODY, "parameters": {name: 1}})


def test_openai_request_names_the_place_with_its_own_names() -> None:
    request = ChatRequest.model_validate(
        {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "tpo": {"patience": 1}}
    )
    with pytest.raises(InvalidInputError, match=r"^tpo.patience: belongs under tpo.early_stop$"):
        request.submission()
