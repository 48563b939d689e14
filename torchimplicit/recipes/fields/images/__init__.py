"""Pictures as fields: fitted, completed from a part of their pixels, and sampled at any size."""
