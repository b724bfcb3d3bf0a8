"""Checkpoints as programs: configuration, modules, weight loading, presets."""
