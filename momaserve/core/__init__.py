"""Scheduling and KV bookkeeping: integers only, no torch."""
