"""Sessions, and detectors, from what other tools left: one file per source format."""
