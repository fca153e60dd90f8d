"""Pure text: it knows no model and no run."""
