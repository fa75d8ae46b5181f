"""The distributed engine, on Flower: `server` and `client` are its two sides, `mail` is what travels between them.

Tried with flwr 1.41, whose internals move from version to version: `pip install 'fedms[flower]'` pins it.
"""
from __future__ import annotations

import os

# Read by Flower and Ray at their import: no usage reports, no look for updates, no package installed by a run, and actors
# that are no less urgent than the run that waits for them (Ray starts them at nice 15).
for _name, _value in {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
                      "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_USAGE_STATS_ENABLED": "0",
                      "RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}.items():
    os.environ.setdefault(_name, _value)
