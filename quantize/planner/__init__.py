"""Which scheme and transform each linear gets: from measurement, under a budget, rolled back where it does not help."""
