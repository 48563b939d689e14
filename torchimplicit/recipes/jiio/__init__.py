"""Joint inference and input optimization (Gurumurthy et al. 2021): a decoder without an encoder, and inverse problems.

The latent of an image is the input of an equilibrium decoder with the least reconstruction error; it and the
equilibrium are found by one fixed point, :class:`~torchimplicit.JointInference`.
"""
