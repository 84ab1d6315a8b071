"""The JSON Schema of spanlock.yaml, for editors; kept in deploy/spanlock.schema.json."""

import json

from sidecar.config.schema import Settings


def json_schema() -> str:
    """JSON Schema 2020-12, as committed."""
    schema = Settings.model_json_schema()
    return (
        json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1, sort_keys=True)
        + "\n"
    )
