"""Read sentence pairs from files, the hub or the phrasebook, and filter them."""
