"""`python -m fedms.config` writes the JSON schema of a run file to standard output."""

from __future__ import annotations

import json

from fedms.config.reference import json_schema

print(json.dumps(json_schema(), indent=1))
