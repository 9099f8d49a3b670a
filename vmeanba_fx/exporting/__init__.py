"""Writing a rewritten model for where it will run (`export`, `formats`), and reading a file that may be hostile (`archive`)."""
