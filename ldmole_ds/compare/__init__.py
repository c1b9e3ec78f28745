"""Methods against each other under one budget: which runs, one process each, and what they amount to."""
