"""Lines from files and pipes, and translations to them: one line for each."""
