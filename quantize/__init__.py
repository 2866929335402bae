"""The compiler: everything offline, from a model to artifacts on disk."""
