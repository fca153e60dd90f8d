"""Write reports, explanations and model cards as HTML and Markdown."""
