"""Read lines from files and pipes, and write their translations: one line for each."""
