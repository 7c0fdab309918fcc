"""The report of a study, rendered from its results alone."""
