"""The form of a benchmark's YAML, as a JSON schema."""

from typing import Any

_NAME = {"type": "string", "pattern": r"^[a-z0-9][a-z0-9_.-]*$"}

_NAMES = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_SETTINGS = {"type": "object"}
_STEP = {
    "command": {"enum": ["fit", "validate", "test", "predict", "evaluate", "measure"]},
    "config": {"type": "string"},
    "function": {"type": "string"},
    "set": _SETTINGS,
    "metrics": {"type": "object", "additionalProperties": {"type": "string"}},
    "curves": {"type": "array", "items": {"type": "string"}},
    "reads": {"type": "array", "items": {"type": "string"}},
}


def _mapping(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _named(entry: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "propertyNames": _NAME, "additionalProperties": entry}


SCHEMA = _mapping(
    {
        "title": {"type": "string"},
        "note": {"type": "string"},
        "equal": {"enum": ["tokens", "seconds", "bytes", "steps"]},
        "seeds": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        "scales": _named(_SETTINGS),
        "products": _named(_mapping({**_STEP, "gives": {"type": "string"}, "seeded": {"type": "boolean"}}, "command", "gives")),
        "common": _mapping(
            {
                **{key: _STEP[key] for key in ("command", "config", "function", "set", "metrics", "curves", "reads")},
                "let": _SETTINGS,
            }
        ),
        "variants": _named(
            _mapping(
                {
                    **_STEP,
                    "title": {"type": "string"},
                    "seeds": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                    "disk": {"type": "string"},
                    "group": {"type": "string"},
                    "let": _SETTINGS,
                    "model": {"type": "string"},
                    "compared": {"type": "boolean"},
                    "evaluations": {"type": "array", "items": {"type": "string"}},
                },
                "title",
            )
        ),
        "evaluations": _named(_mapping(_STEP, "command")),
        "report": _mapping(
            {
                "baseline": {"type": "string"},
                "goal": {"type": "string"},
                "short": _mapping({"rows": _NAMES, "columns": _NAMES, "note": {"type": "string"}}, "rows", "columns"),
                "columns": _named(
                    _mapping(
                        {
                            "title": {"type": "string"},
                            "unit": {"type": "string"},
                            "better": {"enum": ["lower", "higher"]},
                            "digits": {"type": "integer", "minimum": 0},
                            "timing": {"type": "boolean"},
                            "relative": {"enum": ["ratio", "difference", "speedup", "interval", "recovered"]},
                        },
                        "title",
                    )
                ),
                "plots": _named(
                    {
                        **_mapping(
                            {
                                "kind": {"enum": ["curve", "scatter", "bars", "timeline", "heatmap", "matrix", "lines"]},
                                "x": {"type": "string"},
                                "y": {"type": "string"},
                                "marks": {"type": "string"},
                                "panels": {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 2},
                                "title": {"type": "string"},
                                "only": {"type": "array", "items": {"type": "string"}},
                            },
                            "kind",
                        ),
                        "allOf": [
                            {
                                "if": {"properties": {"kind": {"const": "timeline"}}},
                                "then": {"required": ["panels", "only"], "properties": {"only": {"maxItems": 1, "minItems": 1}}},
                                "else": {"required": ["y"]},
                            },
                            {
                                "if": {"properties": {"kind": {"const": "heatmap"}}},
                                "then": {"required": ["only"], "properties": {"only": {"minItems": 1}}},
                            },
                            {
                                "if": {"properties": {"kind": {"enum": ["matrix", "lines"]}}},
                                "then": {"required": ["only"], "properties": {"only": {"maxItems": 1, "minItems": 1}}},
                            },
                        ],
                    }
                ),
            },
            "columns",
        ),
    },
    "title",
    "note",
    "scales",
    "variants",
    "report",
)
