"""Pages and Markdown made of what was found."""
