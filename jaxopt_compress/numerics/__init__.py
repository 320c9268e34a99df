"""Arrays in, arrays out: number formats, rounding, packing, thresholds, factorizations."""
