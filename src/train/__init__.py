"""The pipeline: configuration, Lightning modules, stages. Puts `data` and `models` together."""

__version__ = "0.1.0"  # of the whole project; pyproject.toml reads it
