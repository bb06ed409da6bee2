"""The shipped recipes (data only): recipes/<variant>/<method>.yaml and recipes/accelerate/<engine>.yaml."""
