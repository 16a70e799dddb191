"""Decide which stages are finished, resumed or restarted, by comparing settings and inputs with the records."""
