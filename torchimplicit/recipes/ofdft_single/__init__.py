"""One molecule's density functional, trained by implicit differentiation and by equilibrium propagation."""
