"""From a run file to its records: one run, many, tuning, and the plan of what fits a device."""
