"""JSON schemas from outside: the only place that compiles them. Nothing that a schema refers to is fetched or read."""

from typing import Any

import jsonschema_rs

_HINT = (
    "References must stay inside the schema, such as #/$defs/NAME, and $schema must be a published draft: "
    "nothing is fetched from a server or read from a file"
)


def compile_schema(schema: dict[str, Any]) -> jsonschema_rs.Validator:
    """Compile a JSON schema. Raises ValueError if it is not valid, or if it refers to anything outside itself."""
    try:
        return jsonschema_rs.validator_for(schema, offline=True)
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        reason = str(error).splitlines()[0]
        # The library has no error class of its own for references: its message names the registry of documents.
        hint = f". {_HINT}" if "registry" in reason else ""
        raise ValueError(f"is not a JSON schema: {reason}{hint}") from None
