"""Tests of `momaserve.models`: configuration, weights, presets, random weights, info."""
