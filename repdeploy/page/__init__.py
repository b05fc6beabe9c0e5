"""The report of a bundle: what was proved, exported and measured, as one HTML page or as Markdown, from its records alone."""
