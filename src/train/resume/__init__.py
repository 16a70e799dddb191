"""Which stages are finished, continued or started anew: settings and inputs compared with the records."""
