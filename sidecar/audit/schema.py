"""The JSON Schema of the audit log, one record a line; kept in deploy/audit.schema.json."""

import json
from typing import Any

from pydantic import TypeAdapter

from sidecar.audit.log import KINDS, Record


def audit_schema() -> str:
    """JSON Schema 2020-12, as committed."""
    records = [_record(kind, name.decode()) for kind, name in KINDS.items()]
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of the Spanlock audit log",
        "oneOf": records,
    }
    return json.dumps(schema, indent=1) + "\n"


def _record(kind: type[Record], name: str) -> dict[str, Any]:
    properties: dict[str, Any] = {"kind": {"const": name}}
    for field, annotation in kind.__annotations__.items():
        properties[field] = TypeAdapter(annotation).json_schema()
    return {
        "title": name,
        "description": " ".join((kind.__doc__ or "").split()),
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
