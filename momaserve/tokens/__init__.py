"""Words and pictures <-> token ids, and the grammar that every answer follows.

Knows no scheduler, no engine and no socket. `grammar` and `detokenize` run once per token in the
engine's loop, so they do constant work per token; the rest runs once per request, on any thread.
"""
