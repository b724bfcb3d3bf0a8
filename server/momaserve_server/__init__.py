"""The HTTP server and the `momaserve` command. Knows only the engine's public names."""
