"""Options for the parameters of a job: each field of `Params` and `EarlyStop` is an option, with its description."""

from typing import Annotated, Any, get_origin

import typer
from pydantic.fields import FieldInfo

from tpo.core.state import EarlyStop, Params

_FLAGS = {"sample_size": ("--sample-size", "--n", "-n"), "max_iterations": ("--iterations", "-d")}
"""Names of options that differ from `--` and the parameter's name."""

_NO_DEFAULT = ("seed", *EarlyStop.model_fields)
"""Parameters without a fixed default: a seed is drawn, and without options of `EarlyStop` there is no early stop."""


def annotations() -> dict[str, Any]:
    """Return the annotation of each option by the name of its parameter. None stands for an option not given."""
    fields = {name: field for name, field in Params.model_fields.items() if name != "early_stop"}
    return {name: _option(name, field) for name, field in (fields | EarlyStop.model_fields).items()}


def to_parameters(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given as the API's `parameters`, where `early_stop` is an object."""
    early_stop = {name: value for name, value in given.items() if name in EarlyStop.model_fields}
    parameters = {name: value for name, value in given.items() if name not in early_stop}
    return parameters | ({"early_stop": early_stop} if early_stop else {})


def _option(name: str, field: FieldInfo) -> Any:
    values: Any = list[str] if get_origin(field.annotation) is tuple else field.annotation
    flags = _FLAGS.get(name, ("--" + name.replace("_", "-"),))
    text = field.description or ""
    has_default = name not in _NO_DEFAULT and field.default not in (None, False, ())
    return Annotated[
        values | None,
        typer.Option(
            *flags, help=f"{text[0].upper()}{text[1:]}.", show_default=str(field.default) if has_default else False
        ),
    ]
