"""`nmt prepare`: read, normalise, filter and encode the text of a corpus, in several processes, and report on it."""
