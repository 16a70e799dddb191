"""conf/ as one checked configuration: composed, and every key, type and range compared with conf/."""
