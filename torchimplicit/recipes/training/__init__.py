"""Training, the same for every recipe that trains one model: settings, the loop's hooks, costs, results.

A recipe's config holds the three groups of :mod:`.settings` under the names ``optimization``, ``equilibria`` and
``machine``, beside its own. Its runner is ``Trainer(build)``, ``build`` making the :class:`~.task.Task` that the config
describes; the rest is here.
"""
