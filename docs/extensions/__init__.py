"""What the documentation's generator runs beside its own: extensions of Python-Markdown and of Griffe."""
