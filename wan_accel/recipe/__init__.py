"""Recipes: one YAML says everything about a run."""
