"""Videos as fields of time and place: fitted, and sampled at any size and any number of frames."""
