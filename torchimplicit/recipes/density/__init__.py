"""Density functionals of molecules: their data, their training by the densities at their minima, and their use.

- Data: ``chemistry`` (geometries), ``sources`` (files of them), ``integrals`` and ``compute`` (PySCF), ``record`` and
  ``storage`` (a molecule's matrices, and their file), ``labels`` (further densities), ``prepare`` (many molecules),
  ``split``; ``command`` is ``torchimplicit molecules``.
- Training by minima: ``settings``, ``case`` (a molecule and its minimizer), ``weights``, ``penalties`` and
  ``objective`` (the loss and its derivatives), ``training``, ``history``, ``quality``, ``pictures``.
- Networks of coefficients: ``learning_settings``, ``examples``, ``pretraining_loss``, ``stepping``, ``pretrain`` and
  ``finetune``, ``report``.
- Use: ``predict``, ``forces``, ``guess``, ``places``; ``apply`` is ``torchimplicit density``.
- Tables: ``gradients`` (measured by ``adjoints``, ``adjoint_solvers`` and ``optimum``, see ``gradient_figures``),
  ``single``, ``molecules``, ``stability`` (``counted``), ``finetuning`` (``schooling``) and ``cost``, on ``results``.
"""
