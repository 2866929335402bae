"""From a checkpoint to what a runtime loads: one folder per target format."""
