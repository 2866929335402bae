"""The proof that a package computes what its checkpoint says: node by node, as a whole, and step by step."""
