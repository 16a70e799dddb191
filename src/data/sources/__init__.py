"""Data sources: files, tables, Hub datasets and mixtures; the conversation schema; rejected records."""
