"""Measures momaserve: `momaserve bench`. Every command prints a table and one JSON line."""
