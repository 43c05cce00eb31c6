"""Relative position bias: a table of (2h-1)(2w-1)+3 rows spread over all pairs of tokens, and its gradient."""
