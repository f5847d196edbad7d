"""The result file of a cell: its form, reading and checking. Imports nothing heavy."""

import json
from pathlib import Path
from typing import Any

import jsonschema

from ...errors import InputError

_NUMBER = {"type": ["number", "null"]}  # null: not a finite number
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["run", "metrics", "cost", "environment"],
    "additionalProperties": False,
    "properties": {
        "run": {
            "type": "object",
            "required": ["benchmark", "scale", "variant", "title", "seed", "fingerprint", "commands", "config", "products"],
            "properties": {
                "benchmark": {"type": "string"},
                "scale": {"type": "string"},
                "variant": {"type": "string"},
                "title": {"type": "string"},
                "note": {"type": "string"},
                "seed": {"type": "integer"},
                "fingerprint": {"type": "string"},
                "products": {"type": "object", "additionalProperties": {"type": "number"}},
                "commands": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
                "config": {"type": ["object", "null"]},
            },
        },
        "metrics": {
            "type": "object",
            "required": ["final", "curves"],
            "properties": {
                "final": {"type": "object", "additionalProperties": _NUMBER},
                "curves": {
                    "type": "object",
                    "additionalProperties": {"type": "array", "items": {"type": "array", "items": _NUMBER, "maxItems": 2}},
                },
            },
        },
        "cost": {
            "type": "object",
            "required": ["seconds", "evaluation_seconds", "peak_memory_bytes"],
            "additionalProperties": _NUMBER,
        },
        "environment": {
            "type": "object",
            "required": ["commit", "clean", "code", "cpu", "gpus", "threads", "packages", "data", "models"],
        },
    },
}


def check_result(result: Any, where: str) -> dict[str, Any]:
    """Return a result that has the form of one.

    Args:
        result: Content of a result file.
        where: Its name, for the message.

    Raises:
        InputError: If it has not; the message says where it is wrong.
    """
    try:
        jsonschema.validate(result, _SCHEMA)
    except jsonschema.ValidationError as error:
        raise InputError(
            f"{where} is no result of a benchmark: {error.json_path.removeprefix('$.')}: {error.message[:200]}."
        ) from error
    return dict(result)


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Return the results of a folder, sorted by file name.

    Raises:
        InputError: If a file is no JSON or no result.
    """
    results = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{file} is damaged ({error}). Restore it, or remove it and run its benchmark again.") from error
        results.append(check_result(content, str(file)))
    return results
