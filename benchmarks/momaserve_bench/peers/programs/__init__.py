"""Programs that hold one engine each and answer on standard input; each runs in its engine's own
environment, so none imports another package of ours but `run_momaserve`, which runs in ours."""
