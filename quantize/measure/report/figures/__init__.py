"""The report's figures, one family a module: each a function of findings and statistics to a Section."""
