"""Subcommands of `momaserve` that train and judge. `options` knows their arguments only."""
