"""Joint inference beside nested optimization, and the images of decoders trained by it (Gurumurthy et al. 2021)."""
