"""Names shared by settings, records and reports: stages, selection rules, evaluated drafters."""

STAGES = ("attention_tuning", "bonus_calibration", "export", "evaluate")
TRAINED = STAGES[:2]
TAU = "val/tau"  # τ measured by live decoding
SELECTIONS = ("off", "cumulative_product", "min_confidence")
VARIANTS = ("untuned", "attention_tuned", "calibrated_parallel", "calibrated")
