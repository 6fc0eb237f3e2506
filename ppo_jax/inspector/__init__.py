"""The token inspector: what a run keeps of single tokens, and the page that shows it."""
