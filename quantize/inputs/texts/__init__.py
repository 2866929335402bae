"""Text written for qtool, one file a domain: paragraphs between blank lines, none of them from elsewhere."""
