"""The parts of a report: each takes a `Study` and returns plain values for report.json."""
